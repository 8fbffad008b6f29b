"""What is said of whole sequences, such as texts, from what is said of each of their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor


class Sequences:
    r"""Uncertainties of N sequences, ``[N]`` each and in nats: sums over their tokens t that count.

    p_s(y_t) is the probability of token t by function s of S (the draws of all members), given the tokens before it
    that were in the input, and p(y_t) = (1/S) sum_s p_s(y_t)::

        entropy             sum_t H[p(y_t)]
        aleatoric           sum_t (1/S) sum_s H[p_s(y_t)]
        mutual_information  sum_t (H[p(y_t)] - (1/S) sum_s H[p_s(y_t)]), their difference, also ``epistemic``
        log_prob(y)         log (1/S) sum_s prod_t p_s(y_t)
        log_prob_by_token(y)    sum_t log (1/S) sum_s p_s(y_t)

    The last two are different models of a text. In :meth:`log_prob` one function writes the whole of it: this is the
    posterior predictive of the sequence, the "expectation of products" of Malinin and Gales, which ``evaluate`` calls
    the NLL of a row. In :meth:`log_prob_by_token` a new function writes every token, as when probabilities are averaged
    at each step of generation: the "product of expectations".

    A sum is of the text that was given, not of all texts. Averaged over texts that are sampled token by token from
    p(y_t), :attr:`entropy` is the entropy of that distribution over texts, by the chain rule; the entropy of one given
    text estimates it. :attr:`mutual_information` does not let earlier tokens tell which function writes, so it grows
    with the length, and may exceed log S, which the mutual information of text and function cannot.

    :attr:`per_token` has all of these divided by the number of tokens.

    Made by ``Prediction.sequences``. Source: Malinin and Gales (2021), "Uncertainty estimation in autoregressive
    structured prediction", sections 2 and 3; Kuhn, Gal and Farquhar (2023) for the normalisation by length.

    :param tokens: ``entropy``, ``aleatoric`` and ``epistemic`` of every token, ``[N, T]``.
    :param mask: the tokens that count, booleans ``[N, T]``.
    :param token_log_prob: gives, for labels and a mask, the log probability of every label that counts under every
        function, ``[draws, members, N, T]``, and 0 elsewhere.
    :param divisor: by what the sums are divided, ``[N]``; by default 1.
    """

    def __init__(
        self,
        tokens: Mapping[str, Tensor],
        mask: Tensor,
        token_log_prob: Callable[[Tensor, Tensor], Tensor],
        divisor: Tensor | None = None,
    ) -> None:
        self.mask, self._tokens, self._token_log_prob, self._divisor = mask, tokens, token_log_prob, divisor

    def __repr__(self) -> str:
        each = "per token" if self._divisor is not None else "summed over tokens"
        return f"Sequences({len(self.mask)} of up to {int(self.length.max())} tokens, {each})"

    @property
    def length(self) -> Tensor:
        """``[N]``: number of tokens that count."""
        return self.mask.flatten(1).sum(1)

    @property
    def per_token(self) -> Sequences:
        """The same, divided by the number of tokens of each sequence; 0 for a sequence in which none count."""
        return Sequences(self._tokens, self.mask, self._token_log_prob, self.length.clamp_min(1))

    @property
    def entropy(self) -> Tensor:
        """``[N]``: sum of the entropies of the averaged probabilities: aleatoric plus epistemic."""
        return self._sum(self._tokens["entropy"])

    @property
    def aleatoric(self) -> Tensor:
        """``[N]``: sum of the entropies that remain when the weights are known."""
        return self._sum(self._tokens["aleatoric"])

    @property
    def epistemic(self) -> Tensor:
        """``[N]``: sum of the mutual informations of each token and the weights."""
        return self._sum(self._tokens["epistemic"])

    @property
    def mutual_information(self) -> Tensor:
        """``[N]``: another name of :attr:`epistemic`."""
        return self.epistemic

    def log_prob(self, y: Tensor) -> Tensor:
        """``[N]``: log probability of the texts y when one function writes all of a text.

        :param y: labels ``[N, T]``; those at tokens that do not count are not read.
        :raises TypeError: when y does not hold integers.
        :raises ValueError: when y has another shape, is no class, or is masked at a token that counts.
        """
        each = self._token_log_prob(y, self.mask).flatten(3).sum(-1).flatten(0, 1)
        return self._sum(each.logsumexp(0) - math.log(len(each)))

    def log_prob_by_token(self, y: Tensor) -> Tensor:
        """``[N]``: log probability of the texts y when functions are averaged at every token.

        :param y: see :meth:`log_prob`, also for the errors.
        """
        each = self._token_log_prob(y, self.mask).flatten(0, 1)
        return self._sum(each.logsumexp(0) - math.log(len(each)))

    def _sum(self, values: Tensor) -> Tensor:
        """Of ``[N, T]`` over the tokens that count, and of ``[N]`` itself; divided where that was asked for."""
        total = values if values.dim() == 1 else values.masked_fill(~self.mask, 0.0).flatten(1).sum(1)
        return total if self._divisor is None else total / self._divisor
