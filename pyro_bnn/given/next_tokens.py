"""Labels of causal language models: logits at a token predict the next one, so labels are tokens moved by one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def require_next_tokens(net: nn.Module, x: object, y: Tensor, labelled: Tensor | None) -> None:
    """Refuses labels that are the inputs of a causal language model of transformers, each at its own place.

    Such a model moves labels itself when it computes its own loss, and collators for it therefore do not. Here the
    likelihood compares the logits at t with the label at t, and the network would learn to repeat its input.

    :param labelled: where y holds a label, see :meth:`~pyro_bnn.likelihoods.Likelihood.labelled`.
    :raises ValueError: when every label is the token at its own place.
    """
    tokens = x.get("input_ids") if isinstance(x, Mapping) else x
    if not _is_causal(net) or not isinstance(tokens, Tensor) or tokens.shape != y.shape or tokens.dim() != 2:
        return
    there = torch.ones_like(y, dtype=torch.bool) if labelled is None else labelled
    tokens = tokens.to(y.device)
    at_place = bool(((tokens == y) | ~there).all())
    moved = bool(((tokens[:, 1:] == y[:, :-1]) | ~there[:, :-1]).all())  # as of a text that repeats one token
    if bool(there.any()) and at_place and not moved:
        raise ValueError(
            f"y holds the tokens of x, each at its own place, but the logits of {type(net).__name__} at a token "
            "predict the next one: give y = pyro_bnn.data.next_token_labels(input_ids, attention_mask), which are "
            "moved by one, with Categorical(class_dim=-1, ignore_index=-100)"
        )


def _is_causal(net: nn.Module) -> bool:
    """Whether a network is a decoder of transformers that generates text."""
    can_generate = getattr(net, "can_generate", None)
    if not callable(can_generate) or not can_generate():
        return False
    return not getattr(getattr(net, "config", None), "is_encoder_decoder", False)
