"""The kinds of corruption of images, and the random numbers of a row.

Each takes pixels in [0, 1], ``[N, C, H, W]``, a constant c and the seeds of the rows;
:func:`~pyro_bnn.data.corruptions.corrupt` says what it does with them, and clamps the result.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

#: rows are told apart in steps of this size: a byte over 255 and a sixteenth are whole multiples of it, so that
#: rounding does not change the random numbers of an image that was normalised
_STEP = 1 / (16 * 255)


def _noise(pixels: Tensor, c: float, rows: Sequence[int]) -> Tensor:
    return pixels + c * normals(pixels, rows)


def _blur(pixels: Tensor, c: float, rows: Sequence[int]) -> Tensor:
    # Four standard deviations to each side, but no more than can be reflected; one axis after the other is faster.
    height, width = (2 * min(int(4 * c + 0.5), side - 1) + 1 for side in pixels.shape[2:])
    return F.gaussian_blur(F.gaussian_blur(pixels, [width, 1], [c, c]), [1, height], [c, c])


def _brightness(pixels: Tensor, c: float, rows: Sequence[int]) -> Tensor:
    """In hue, saturation, value the value is the largest channel, and the others are shares of it."""
    value = pixels.amax(1, keepdim=True)
    shares = torch.where(value > 0, pixels / torch.where(value > 0, value, 1), 1)  # black becomes grey
    return shares * (value + c).clamp_max(1)


def _contrast(pixels: Tensor, c: float, rows: Sequence[int]) -> Tensor:
    """Not torchvision's, which draws the channels of colours to one grey."""
    mean = pixels.mean((2, 3), keepdim=True)
    return mean + c * (pixels - mean)


def _rotation(pixels: Tensor, c: float, rows: Sequence[int]) -> Tensor:
    def turned(part: Tensor, direction: int) -> Tensor:
        return F.rotate(part, c if direction else -c, InterpolationMode.BILINEAR)

    return _in_directions(pixels, rows, 2, turned)


def _translation(pixels: Tensor, c: float, rows: Sequence[int]) -> Tensor:
    height, width = pixels.shape[2:]
    # Without rounding first .1 of 30 pixels would be 4, as 0.1 * 30 is a little more than 3.
    down, right = (math.ceil(round(c * side, 9)) for side in (height, width))

    def moved(part: Tensor, direction: int) -> Tensor:
        top, left = ((0, right), (0, -right), (down, 0), (-down, 0))[direction]
        return F.crop(part, top, left, height, width)  # black where it reaches beyond the image

    return _in_directions(pixels, rows, 4, moved)


def _pixelate(pixels: Tensor, c: float, rows: Sequence[int]) -> Tensor:
    height, width = (_averages(side, max(1, int(c * side))).to(pixels) for side in pixels.shape[2:])
    return height @ pixels @ width.T


def _jpeg(pixels: Tensor, c: float, rows: Sequence[int]) -> Tensor:
    """By Pillow: torchvision 0.29 announces that its own coding of images will be removed."""
    found = np.empty(pixels.shape, np.uint8)
    for own, image in zip(found, (pixels * 255).round().cpu().to(torch.uint8).numpy(), strict=True):
        file = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "JPEG", quality=int(c))
        coded = np.asarray(Image.open(file))
        own[...] = coded if coded.ndim == 2 else coded.transpose(2, 0, 1)
    return torch.from_numpy(found).to(pixels.device).to(pixels.dtype) / 255


class _Kind(NamedTuple):
    """``apply(pixels, c, rows)``, with c for small and for larger images; ``rows`` are the seeds of the rows."""

    apply: Callable[[Tensor, float, Sequence[int]], Tensor]
    small: tuple[float, ...]
    large: tuple[float, ...]
    is_random: bool = False


_ANGLES = (10.0, 20.0, 30.0, 40.0, 50.0)
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25)
IMAGES = {
    "noise": _Kind(_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38), is_random=True),
    "blur": _Kind(_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "brightness": _Kind(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Kind(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "rotation": _Kind(_rotation, _ANGLES, _ANGLES, is_random=True),
    "translation": _Kind(_translation, _SHARES, _SHARES, is_random=True),
    "pixelate": _Kind(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": _Kind(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}


def _averages(side: int, small: int) -> Tensor:
    """The matrix ``[side, side]`` that shrinks an axis to ``small`` pixels and enlarges it again, with a box.

    torchvision has no such box for tensors. This is Pillow's, which the benchmarks use: a pixel of the result is the
    mean of those whose centres lie within half a pixel of the result. Where a centre is on the edge, rounding decides;
    the steps are those of Pillow, so that it decides in the same way.
    """

    def box(old: int, new: int) -> Tensor:
        scale = old / new
        wide = max(scale, 1.0)
        index, centre = torch.arange(old).double(), scale * (torch.arange(new).double() + 0.5).unsqueeze(1)
        distance = (index - centre + 0.5) * (1 / wide)
        inside = (distance > -0.5) & (distance <= 0.5)
        inside &= (index >= (centre - wide / 2 + 0.5).floor()) & (index < (centre + wide / 2 + 0.5).floor())
        return inside / inside.sum(1, keepdim=True, dtype=torch.float64)

    return box(small, side) @ box(side, small)


# ------------------------------------------------------------------------------------------------------ random numbers


def row_seeds(values: Tensor, seed: int) -> list[int]:
    """A seed for each row, from a hash of the seed and of the values of the row."""
    steps = (values.detach().cpu().double().flatten(1) / _STEP).round().numpy().astype("<i8")
    start = hashlib.blake2b(f"{seed}:".encode(), digest_size=8)
    found = []
    for row in steps:
        own = start.copy()
        own.update(row.tobytes())
        found.append(int.from_bytes(own.digest(), "little") >> 1)
    return found


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def normals(like: Tensor, rows: Sequence[int]) -> Tensor:
    """Standard normals of the shape of ``like``, drawn on the CPU in float64, so that they are the same everywhere."""
    found = np.empty(like.shape)
    for own, seed in zip(found, rows, strict=True):
        own[...] = torch.randn(like.shape[1:], generator=generator_of(seed), dtype=torch.float64).numpy()
    return torch.from_numpy(found).to(like.dtype).to(like.device)


def _in_directions(
    pixels: Tensor, rows: Sequence[int], directions: int, move: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Moves each image in its own direction, which its seed decides."""
    chosen = torch.tensor([seed % directions for seed in rows])
    found = torch.empty_like(pixels)
    for direction in range(directions):
        index = torch.nonzero(chosen == direction)[:, 0].to(pixels.device)
        if len(index):
            found[index] = move(pixels[index], direction)
    return found
