"""Uncertainties of whole sequences against all texts of a tiny vocabulary, written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import pyro_bnn as pb

VOCABULARY, LENGTH, FUNCTIONS = 3, 4, 5
TEXTS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


def functions() -> Tensor:
    """Logits of five functions at every token of every text; they depend on the tokens before it alone."""
    generator = torch.Generator().manual_seed(0)
    tables: dict[tuple[int, ...], Tensor] = {}
    rows = []
    for text in TEXTS.tolist():
        steps = []
        for t in range(LENGTH):
            before = tuple(text[:t])
            if before not in tables:
                tables[before] = 2 * torch.randn(FUNCTIONS, VOCABULARY, generator=generator, dtype=torch.float64)
            steps.append(tables[before])
        rows.append(torch.stack(steps, 1))
    return torch.stack(rows, 1)[:, None]  # [draws, 1 member, texts, T, C]


def prediction(**options: int) -> pb.Prediction:
    return pb.Prediction(functions(), pb.likelihoods.Categorical(class_dim=-1, **options))


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def test_both_log_probabilities_are_distributions_over_texts() -> None:
    """Proves that each sums to 1 over all texts, and is the mean of products and the product of means."""
    p = functions()[:, 0].softmax(-1).gather(-1, TEXTS[None, ..., None].expand(FUNCTIONS, -1, -1, 1)).squeeze(-1)
    found = prediction().sequences()
    torch.testing.assert_close(found.log_prob(TEXTS).exp(), p.prod(-1).mean(0))
    torch.testing.assert_close(found.log_prob_by_token(TEXTS).exp(), p.mean(0).prod(-1))
    for log_prob in (found.log_prob(TEXTS), found.log_prob_by_token(TEXTS)):
        assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert float((found.log_prob(TEXTS) - found.log_prob_by_token(TEXTS)).abs().max()) > 0.1
    whole = prediction().log_prob(TEXTS).logsumexp((0, 1)) - math.log(FUNCTIONS)
    torch.testing.assert_close(found.log_prob(TEXTS), whole)


def test_the_mean_entropy_over_texts_is_that_of_their_distribution() -> None:
    """The chain rule: H[text] = sum_t E H[token t | tokens before it], texts written by the averaged functions."""
    found = prediction().sequences()
    p = found.log_prob_by_token(TEXTS).exp()
    assert float((p * found.entropy).sum()) == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-12)


def test_the_aleatoric_part_of_one_function_is_the_entropy_of_its_texts() -> None:
    one = pb.Prediction(functions()[:1], pb.likelihoods.Categorical(class_dim=-1)).sequences()
    p = one.log_prob(TEXTS).exp()
    assert float((p * one.aleatoric).sum()) == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-12)
    assert float(one.mutual_information.abs().max()) < 1e-12
    torch.testing.assert_close(one.log_prob(TEXTS), one.log_prob_by_token(TEXTS))


def test_sums_over_the_tokens_that_count() -> None:
    """Against sums written out, with texts of every length, none among them; the rest of them divided by it."""
    probs = functions()[:, 0].softmax(-1)
    length = torch.arange(len(TEXTS)) % (LENGTH + 1)
    mask = (torch.arange(LENGTH) < length[:, None]).long()
    found = prediction(ignore_index=-100).sequences(mask)
    total = (entropy(probs.mean(0)) * mask).sum(1)
    within = (entropy(probs).mean(0) * mask).sum(1)
    y = TEXTS.masked_fill(mask == 0, -100)
    p = probs.gather(-1, TEXTS[None, ..., None].expand(FUNCTIONS, -1, -1, 1)).squeeze(-1)
    log_p = torch.where(mask.bool(), p, 1.0).log()
    expected = {
        "length": length,
        "entropy": total,
        "aleatoric": within,
        "epistemic": total - within,
        "mutual_information": total - within,
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), values)
        if name != "length":
            torch.testing.assert_close(getattr(found.per_token, name), values / length.clamp_min(1))
    assert bool((found.per_token.entropy[length == 0] == 0).all())
    whole = log_p.sum(-1).logsumexp(0) - math.log(FUNCTIONS)
    torch.testing.assert_close(found.log_prob(y), whole)
    torch.testing.assert_close(found.log_prob(TEXTS), whole)  # what does not count is not read
    torch.testing.assert_close(found.per_token.log_prob(y), whole / length.clamp_min(1))
    torch.testing.assert_close(found.log_prob_by_token(y), (log_p.logsumexp(0) - math.log(FUNCTIONS)).sum(-1))
    torch.testing.assert_close(prediction(ignore_index=-100).log_prob(y).logsumexp((0, 1)) - math.log(FUNCTIONS), whole)


def test_the_mutual_information_may_exceed_that_of_text_and_function() -> None:
    """What the docstring warns of: two functions that always disagree know of each other after one token."""
    logits = torch.tensor([[20.0, -20.0], [-20.0, 20.0]], dtype=torch.float64)
    outputs = logits[:, None, None, None, :].expand(2, 1, 1, LENGTH, 2)
    found = pb.Prediction(outputs, pb.likelihoods.Categorical(class_dim=-1)).sequences()
    assert float(found.mutual_information) == pytest.approx(LENGTH * math.log(2)) and LENGTH > 1


def test_what_is_no_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="single label"):
        pb.Prediction(torch.randn(2, 1, 3, 4), pb.likelihoods.Categorical()).sequences()
    with pytest.raises(TypeError, match="sequences is not defined for Gaussian"):
        pb.Prediction(torch.randn(2, 1, 3, 4), pb.likelihoods.Gaussian(1.0)).sequences()
    with pytest.raises(ValueError, match=r"mask has shape \(81, 3\)"):
        prediction().sequences(torch.ones(81, 3))
    with pytest.raises(ValueError, match="from 0 to 2"):
        prediction().sequences(torch.arange(LENGTH).clamp_max(2).expand(81, -1))
    found = prediction(ignore_index=-100).sequences()
    with pytest.raises(ValueError, match="81 tokens count but have no label"):
        found.log_prob(TEXTS.index_fill(1, torch.tensor([0]), -100))
    with pytest.raises(ValueError, match="label 3"):
        found.log_prob(TEXTS + 1)
    with pytest.raises(ValueError, match=r"y has shape \(81, 3\)"):
        found.log_prob(TEXTS[:, 1:])
    with pytest.raises(TypeError, match="integers"):
        found.log_prob(TEXTS.double())


def test_it_says_what_it_is() -> None:
    found = prediction().sequences()
    assert repr(found) == "Sequences(81 of up to 4 tokens, summed over tokens)"
    assert repr(found.per_token) == "Sequences(81 of up to 4 tokens, per token)"
