"""Labels for language models, of tokens that a tokenizer made."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.inputs import labels


def next_token_labels(input_ids: object, attention_mask: object = None, ignore_index: int = -100) -> Tensor:
    """What the logits of a causal language model should predict at each token: the next token.

        y_nt = input_ids_n,t+1   where the tokens t and t + 1 are real,   else ignore_index

    The last token of a row has nothing after it, and padding, on either side, is neither a label nor has one. Trained
    with ``Categorical(class_dim=-1, ignore_index=ignore_index)``. Models of transformers move labels themselves only
    for a loss of their own, which is not used here.

    :param input_ids: tokens, integers ``[N, T]``.
    :param attention_mask: ``[N, T]``, 1 or True for real tokens and 0 for padding; by default all are real.
    :param ignore_index: the label where there is none.
    :returns: labels ``[N, T]``, int64, on the device of ``input_ids``. Set those of a prompt to ``ignore_index`` too if
        it is not to be learned.
    :raises TypeError: when the tokens or ``ignore_index`` are not integers.
    :raises ValueError: when they are not ``[N, T]``, the mask has another shape, or holds other numbers than 0 and 1.
    """
    ignore_index = checks.label("ignore_index", ignore_index)
    tokens = labels(input_ids, "input_ids")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"input_ids has dtype {tokens.dtype}; expected integers, the numbers of tokens")
    if tokens.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(tokens.shape)}; expected [N, T], a row of tokens for each text")
    real = torch.ones_like(tokens) if attention_mask is None else labels(attention_mask, "attention_mask")
    if real.shape != tokens.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(real.shape)}; expected that of input_ids, {tuple(tokens.shape)}"
        )
    if not bool(((real == 0) | (real == 1)).all()):
        raise ValueError("attention_mask holds numbers other than 0 and 1; expected 1 for real tokens, 0 for padding")
    real = real.bool().to(tokens.device)
    y = torch.full_like(tokens, ignore_index, dtype=torch.int64)
    y[:, :-1] = torch.where(real[:, :-1] & real[:, 1:], tokens[:, 1:].long(), ignore_index)
    return y
