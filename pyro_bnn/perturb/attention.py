"""The rule for ``nn.MultiheadAttention``.

``F.multi_head_attention_forward`` reaches the mode as one call and runs its inner products with the mode off, so the
projections and the attention between them are written out here, with the semantics of that function.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bnn.perturb.factors import Perturbation
from pyro_bnn.perturb.mode import Call, register

_SIGNATURE = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask"),
    *("need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("static_k", "static_v", "average_attn_weights", "is_causal"),
)


_WEIGHTS = (
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight"),
    *("in_proj_bias", "out_proj_bias"),
)


@register(F.multi_head_attention_forward, signature=_SIGNATURE, weights=_WEIGHTS)
def _attention(call: Call) -> tuple[Tensor, Tensor | None]:
    if call.query.dim() != 3:
        raise ValueError(
            f"nn.MultiheadAttention got an unbatched query of shape {tuple(call.query.shape)}: its rows cannot have "
            "weights of their own. Give it a batch axis, or leave its weights out with `select=`."
        )
    length, batch, width = call.query.shape
    heads = call.num_heads
    q, k, v = _projections(call)
    mask = _additive(call.arguments.get("attn_mask"), q)
    padding = _additive(call.arguments.get("key_padding_mask"), q)

    if call.bias_k is not None:
        k = torch.cat([k, call.bias_k.expand(1, batch, -1)])
        v = torch.cat([v, call.bias_v.expand(1, batch, -1)])
        mask, padding = _pad(mask), _pad(padding)
    q = q.view(length, batch, heads, -1).permute(1, 2, 0, 3)
    k = _heads(k, batch, heads, call.arguments.get("static_k"))
    v = _heads(v, batch, heads, call.arguments.get("static_v"))
    if call.add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(t.shape[:2] + (1,) + t.shape[3:])], 2) for t in (k, v))
        mask, padding = _pad(mask), _pad(padding)

    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, heads, length, -1)
    if padding is not None:
        padding = padding.view(batch, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    dropout = call.dropout_p if call.arguments.get("training", True) else 0.0

    weights = None
    if call.arguments.get("need_weights", True):
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, dropout)
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = out.permute(2, 0, 1, 3).reshape(length, batch, width)
    out = call.mode.product(F.linear, out, call.out_proj_weight, call.out_proj_bias, dims=(-1, -1))
    if weights is not None and call.arguments.get("average_attn_weights", True):
        weights = weights.mean(1)
    return out, weights


def _projections(call: Call) -> list[Tensor]:
    """The three projected inputs, each ``[length, batch, width]``; self-attention takes one product for all three."""
    inputs = [call.query, call.key, call.value]
    separate = call.arguments.get("use_separate_proj_weight", False)
    width, bias = call.embed_dim_to_check, call.in_proj_bias
    if separate:
        weights = [call.q_proj_weight, call.k_proj_weight, call.v_proj_weight]
        perturbed: list[Perturbation | None] = [call.perturbation(w) for w in weights]
    else:
        weight, whole = call.in_proj_weight, call.perturbation(call.in_proj_weight)
        if inputs[0] is inputs[1] is inputs[2]:
            y = call.mode.product(F.linear, inputs[0], weight, bias, dims=(-1, -1))
            return list(y.chunk(3, -1))
        weights = list(weight.chunk(3))
        perturbed = [None if whole is None else whole.narrow(i * width, width) for i in range(3)]
    offset = call.perturbation(bias)
    projected = []
    for i, (x, w, factors) in enumerate(zip(inputs, weights, perturbed, strict=True)):
        layout = None
        if factors is not None or offset is not None:
            named = bias if factors is None else w if separate else call.in_proj_weight
            layout = call.mode.locate(x, named)
        projected.append(
            call.mode.product(
                F.linear,
                x,
                w,
                None if bias is None else bias[i * width : (i + 1) * width],
                dims=(-1, -1),
                weight_perturbation=factors,
                bias_perturbation=None if offset is None else offset.narrow(i * width, width),
                layout=layout,
            )
        )
    return projected


def _heads(x: Tensor, batch: int, heads: int, static: Tensor | None) -> Tensor:
    if static is not None:
        return static.view(batch, heads, *static.shape[1:])
    return x.view(x.shape[0], batch, heads, -1).permute(1, 2, 0, 3)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask (True: do not attend) as the number that is added to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask.bool(), -math.inf)


def _pad(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, 1))
