"""Labels of causal language models: the next tokens, and what is refused in their place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb

IDS = torch.tensor([[5, 6, 7, 8], [9, 9, 1, 0], [0, 0, 3, 4]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]])
MASKED = pb.likelihoods.Categorical(class_dim=-1, ignore_index=-100)


def test_labels_are_the_next_real_tokens() -> None:
    """Proves it with padding on either side, as tensors and arrays, and with another mask."""
    expected = torch.tensor([[6, 7, 8, -100], [9, 1, -100, -100], [-100, -100, 4, -100]])
    assert torch.equal(pb.data.next_token_labels(IDS, MASK), expected)
    assert torch.equal(pb.data.next_token_labels(IDS.numpy().astype(np.int32), MASK.bool().numpy()), expected)
    assert torch.equal(pb.data.next_token_labels(IDS.tolist(), MASK, ignore_index=0), expected.clamp_min(0))
    whole = pb.data.next_token_labels(IDS)
    assert whole.dtype == torch.int64 and torch.equal(whole[:, :-1], IDS[:, 1:]) and bool((whole[:, -1] == -100).all())


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((IDS.double(),), TypeError, "expected integers"),
        ((IDS[0],), ValueError, r"expected \[N, T\]"),
        ((IDS, MASK[:, 1:]), ValueError, r"attention_mask has shape \(3, 3\)"),
        ((IDS, 2 * MASK), ValueError, "other than 0 and 1"),
    ],
)
def test_what_is_no_tokens_is_refused(arguments: tuple[Any, ...], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        pb.data.next_token_labels(*arguments)


class Generator(nn.Module):
    """What a decoder of transformers shows of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 10)

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.table(input_ids)
        return y


def test_a_causal_model_is_never_trained_or_scored_on_its_own_input() -> None:
    """Proves that labels as collators of transformers make them, which are not moved, are refused wherever y is given,
    and that moved ones, labels of other models and texts of one token are not."""
    own = IDS.masked_fill(MASK == 0, -100)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    model = pb.models.Dense(Generator(), MASKED, len(IDS))
    guide = pb.models.MeanFieldGuide(model)
    posterior = pb.Posterior(model, guide)
    said = "each at its own place, but the logits of Generator at a token predict the next one"
    with pytest.raises(ValueError, match=said):
        pb.inference.fit(model, guide, inputs | {"labels": own}, epochs=1, progress=False)
    with pytest.raises(ValueError, match=said):
        pb.diagnostics.evaluate(posterior, (IDS, own))
    with pytest.raises(ValueError, match=said):
        posterior.log_likelihood(inputs, own)
    y = pb.data.next_token_labels(IDS, MASK)
    pb.inference.fit(model, guide, inputs | {"labels": y}, epochs=1, progress=False)
    assert "nll" in pb.diagnostics.evaluate(posterior, (inputs, y))
    one_token = torch.full((3, 4), 7)
    posterior.log_likelihood(one_token, one_token)
    other = pb.models.Dense(Generator().table, MASKED, len(IDS))
    pb.Posterior(other, pb.models.MeanFieldGuide(other)).log_likelihood(IDS, own)
