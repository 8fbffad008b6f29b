"""Corrupted test data: how predictions fare on inputs that differ more and more from those of training.

Images have eight kinds of corruption and tables two, each at severities 1 to 5. :func:`corrupt` and
:func:`corrupt_table` corrupt one batch; :func:`image_shift` and :func:`table_shift` gather several kinds for
``evaluate(posterior, data, shift=...)``.

Everything follows from the inputs and the seed: a row becomes the same in every batch and on every device. The random
numbers of a row come from a generator that is seeded with a hash of the seed and of the row itself, and are the same
at all severities, so that a higher severity is more of the same.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pyro_bnn.data.image_corruptions import IMAGES, generator_of, normals, row_seeds
from pyro_bnn.entry import checks
from pyro_bnn.inputs import describe, is_array, is_numbers, require_finite, tensor

__all__ = [
    "IMAGE_KINDS",
    "SEVERITIES",
    "TABLE_KINDS",
    "corrupt",
    "corrupt_table",
    "image_shift",
    "table_shift",
]

#: the kinds of corruption of images
IMAGE_KINDS = tuple(IMAGES)
#: the kinds of corruption of tables
TABLE_KINDS = ("noise", "missing")
#: the severities of every kind, from slight to strong; 0 leaves inputs as they are
SEVERITIES = (1, 2, 3, 4, 5)
#: the longest shorter side, in pixels, of images that get the constants of CIFAR-10-C
SMALL = 64
#: standard deviation of the noise in a table at each severity, in standard deviations of the column
TABLE_NOISE = (0.1, 0.2, 0.4, 0.6, 0.8)

#: a number, or one for each channel or column
PerColumn = float | Sequence[float] | Tensor
#: a corruption of several severities: ``corruption(x, severity)``
Corruption = Callable[[Tensor, int], Tensor]

#: what rounding may add to pixels outside [0, 1]
_TOLERANCE = 1e-5
_COLOUR = (1, 3)


def corrupt(
    x: Tensor, kind: str, severity: int, *, mean: PerColumn = 0.0, std: PerColumn = 1.0, seed: int = 0
) -> Tensor:
    r"""Corrupts images: ``[N, C, H, W]``, in the same form as they were given.

    Pixels p lie in [0, 1], and ``x = (p - mean) / std``, as torchvision's ``Normalize`` makes it. The corruption is
    applied to ``p = x std + mean``, the result is clamped to [0, 1] and normalised again. The defaults are for images
    in [0, 1], as :mod:`pyro_bnn.data` reads them; pixels from 0 to 255 have ``std=1/255``.

    ===============  ===================================  ====================================  ======================
    kind             what becomes of p                    c, shorter side up to 64 pixels       c, larger images
    ===============  ===================================  ====================================  ======================
    ``noise``        p + c z, z ~ N(0, 1) for each number .04, .06, .08, .09, .1                .08, .12, .18, .26, .38
    ``blur``         convolved with a Gaussian of         .4, .6, .7, .8, 1                     1, 2, 3, 4, 6
                     standard deviation c pixels
    ``brightness``   v + c, for the value v of hue,       .05, .1, .15, .2, .3                  .1, .2, .3, .4, .5
                     saturation, value; grey: p + c
    ``contrast``     m + c (p - m), with the mean m of    .75, .5, .4, .3, .15                  .4, .3, .2, .1, .05
                     each channel of the image
    ``rotation``     rotated by c degrees, in one of two  10, 20, 30, 40, 50                    the same
                     directions; black comes in
    ``translation``  moved by c of the side, rounded up   .05, .1, .15, .2, .25                 the same
                     to whole pixels, in one of four
                     directions; black comes in
    ``pixelate``     shrunk to floor(c side) pixels and   .95, .9, .85, .75, .65                .6, .5, .4, .3, .25
                     enlarged again, both with a box
    ``jpeg``         through a JPEG of quality c          80, 65, 58, 50, 40                    25, 18, 15, 10, 7
    ===============  ===================================  ====================================  ======================

    The constants of small images are those of CIFAR-10-C (32 pixels) and those of larger ones those of ImageNet-C
    (224 pixels); they are not scaled further. On images of very few pixels they are thus strong, and neighbouring
    severities of ``pixelate`` and ``translation`` may be the same. Rotations and translations are not in these
    benchmarks. ``blur`` reflects the image at its edges, where they repeat the last pixel.

    The noise and the directions of an image depend on the seed and on its pixels alone, and not on the other rows;
    equal images have equal noise.

    :param x: floats with 1 or 3 channels.
    :param kind: one of :data:`IMAGE_KINDS`.
    :param severity: 1 to 5; 0 returns x as it is.
    :param mean: what was subtracted from the pixels: a number, or one for each channel.
    :param std: what they were divided by afterwards.
    :param seed: of the noise and of the directions.
    :returns: a tensor of the shape, the dtype and the device of x.
    :raises TypeError: when x is not one array of floats, or an argument has the wrong type.
    :raises ValueError: when x is not ``[N, C, H, W]`` with 1 or 3 channels, is not finite, or its pixels are not in
        [0, 1]; for another kind or severity; and when mean and std do not fit the channels.

    Source: Hendrycks and Dietterich (2019, arXiv 1903.12261), with the constants of ``make_cifar_c.py`` and
    ``make_imagenet_c.py`` in github.com/hendrycks/robustness.
    """
    one = IMAGES[_known(kind, IMAGE_KINDS)]
    severity = _severity(severity)
    seed = checks.count("seed", seed, least=0)
    x = _floats(x)
    if x.dim() != 4 or x.shape[1] not in _COLOUR or 0 in x.shape[1:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected images [N, C, H, W] with 1 or 3 channels. Images with the "
            "channels last are x.permute(0, 3, 1, 2), grey ones without channels x.unsqueeze(1)"
        )
    wide = x.float() if torch.finfo(x.dtype).bits < 32 else x
    centre, scale = (_per_column(name, value, wide, 1) for name, value in (("mean", mean), ("std", std)))
    if not bool((scale > 0).all()):
        raise ValueError(f"std={std!r}: expected positive numbers")
    is_plain = not bool(centre.any()) and bool((scale == 1).all())
    pixels = wide if is_plain else wide * scale + centre
    _require_pixels(pixels, x.dtype)
    if severity == 0 or not len(x):
        return x
    constants = one.small if min(x.shape[2:]) <= SMALL else one.large
    pixels = pixels.clamp(0, 1)
    rows = row_seeds(pixels, seed) if one.is_random else []
    found = one.apply(pixels, constants[severity - 1], rows).clamp(0, 1)
    return (found if is_plain else (found - centre) / scale).to(x.dtype)


def corrupt_table(x: Tensor, kind: str, severity: int, *, mean: PerColumn, std: PerColumn, seed: int = 0) -> Tensor:
    """Corrupts the rows of a table, ``[N, D]``.

    ===========  =================================================  ======================
    kind         what becomes of x                                  k at severities 1 to 5
    ===========  =================================================  ======================
    ``noise``    x + k std z, z ~ N(0, 1) for each number           .1, .2, .4, .6, .8
    ``missing``  ceil(k D) columns, the same for all rows and       .1, .2, .3, .4, .5
                 chosen by the seed, are the mean of the column
    ===========  =================================================  ======================

    A higher severity has the same noise, only larger, and lacks more columns beside those of a lower one. The noise of
    a row depends on the seed and on its own numbers alone.

    :param x: floats.
    :param kind: one of :data:`TABLE_KINDS`.
    :param severity: 1 to 5; 0 returns x as it is.
    :param mean: mean of each column over the training rows, in the unit of x; 0 for standardised columns.
    :param std: standard deviation of each column over the training rows; 1 for standardised columns.
    :param seed: of the noise and of the columns.
    :returns: a tensor of the shape, the dtype and the device of x.
    :raises TypeError: when x is not one array of floats, or an argument has the wrong type.
    :raises ValueError: when x is not ``[N, D]`` or not finite, for another kind or severity, and when mean and std do
        not fit the columns.
    """
    _known(kind, TABLE_KINDS)
    severity = _severity(severity)
    seed = checks.count("seed", seed, least=0)
    x = _floats(x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected the rows of a table, [N, D]")
    centre, scale = (_per_column(name, value, x, 1) for name, value in (("mean", mean), ("std", std)))
    if not bool((scale >= 0).all()):
        raise ValueError(f"std={std!r}: expected no negative numbers")
    if severity == 0 or not len(x):
        return x
    if kind == "noise":
        rows = row_seeds((x - centre) / torch.where(scale > 0, scale, 1), seed)
        return x + TABLE_NOISE[severity - 1] * scale * normals(x, rows)
    columns = x.shape[1]
    order = torch.randperm(columns, generator=generator_of(seed))
    missing = torch.zeros(columns, dtype=torch.bool)
    missing[order[: math.ceil(columns * severity / 10)]] = True
    return torch.where(missing.to(x.device), centre, x)


def image_shift(
    kinds: str | Sequence[str] | None = None, *, mean: PerColumn = 0.0, std: PerColumn = 1.0, seed: int = 0
) -> dict[str, Corruption]:
    """Corruptions of images, for ``evaluate(posterior, data, shift=...)``.

    :param kinds: one or several of :data:`IMAGE_KINDS`; by default all.
    :param mean, std, seed: see :func:`corrupt`.
    :returns: ``{kind: f}`` with ``f(x, severity) = corrupt(x, kind, severity, mean=mean, std=std, seed=seed)``.
    :raises TypeError, ValueError: for a kind that is not known, or none.
    """
    return {
        kind: partial(_of_images, kind=kind, mean=mean, std=std, seed=seed) for kind in _several(kinds, IMAGE_KINDS)
    }


def table_shift(x_train: Tensor, kinds: str | Sequence[str] | None = None, *, seed: int = 0) -> dict[str, Corruption]:
    """Corruptions of a table, for ``evaluate(posterior, data, shift=...)``.

    :param x_train: training inputs, ``[N, D]``, from which the mean and the standard deviation of every column come.
    :param kinds: one or several of :data:`TABLE_KINDS`; by default all.
    :param seed: see :func:`corrupt_table`.
    :returns: ``{kind: f}`` with ``f(x, severity) = corrupt_table(x, kind, severity, mean=..., std=..., seed=seed)``.
    :raises TypeError, ValueError: when ``x_train`` is not ``[N, D]`` with at least one row, and for a kind that is not
        known, or none.
    """
    rows = _floats(x_train, "x_train")
    if rows.dim() != 2 or 0 in rows.shape:
        raise ValueError(f"x_train has shape {tuple(rows.shape)}; expected the rows of a table, [N, D] with N >= 1")
    std, mean = torch.std_mean(rows, 0, correction=0)
    return {kind: partial(_of_table, kind=kind, mean=mean, std=std, seed=seed) for kind in _several(kinds, TABLE_KINDS)}


def _of_images(x: Tensor, severity: int, *, kind: str, mean: PerColumn, std: PerColumn, seed: int) -> Tensor:
    return corrupt(x, kind, severity, mean=mean, std=std, seed=seed)


def _of_table(x: Tensor, severity: int, *, kind: str, mean: Tensor, std: Tensor, seed: int) -> Tensor:
    return corrupt_table(x, kind, severity, mean=mean, std=std, seed=seed)


# -------------------------------------------------------------------------------------------------------------- checks


def _known(kind: object, kinds: Sequence[str]) -> str:
    kind = checks.text("kind", kind)
    if kind in kinds:
        return kind
    near = difflib.get_close_matches(kind.lower(), kinds, 2, cutoff=0.5)
    nearest = f"; the nearest is {' or '.join(map(repr, near))}" if near else ""
    raise ValueError(f"kind={kind!r}: expected one of {', '.join(map(repr, kinds))}{nearest}")


def _several(kinds: str | Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    given = tuple(known) if kinds is None else checks.names("kinds", kinds)
    if not given:
        raise ValueError(f"kinds={kinds!r}: expected at least one of {', '.join(map(repr, known))}")
    return tuple(dict.fromkeys(_known(kind, known) for kind in given))


def _severity(severity: object) -> int:
    found = checks.count("severity", severity, least=0)
    if found > SEVERITIES[-1]:
        raise ValueError(
            f"severity={severity!r}: expected {', '.join(map(str, SEVERITIES))}, or 0 for no corruption; the nearest "
            f"is {SEVERITIES[-1]}"
        )
    return found


def _floats(x: object, name: str = "x") -> Tensor:
    """x as a tensor of finite floats."""
    if not (is_array(x) or is_numbers(x)):
        raise TypeError(f"{name} is {describe(x)}; expected one tensor or array of inputs")
    found = tensor(x, name)
    if not found.is_floating_point():
        raise TypeError(
            f"{name} has dtype {found.dtype}; expected floats, as the network takes them: bytes are x.float() / 255"
        )
    require_finite(found, name)
    return found


def _per_column(name: str, value: PerColumn, x: Tensor, axis: int) -> Tensor:
    """A number, or one for each index of an axis, in a shape that broadcasts with x."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    found = torch.tensor(checks.finite(name, value), dtype=torch.float64) if is_one else tensor(value, name)
    found = found.detach().to(x.dtype).to(x.device)
    size = x.shape[axis]
    if found.dim() > 1 or found.dim() == 1 and len(found) != size:
        what = "channel" if x.dim() == 4 else "column"
        raise ValueError(
            f"{name} has shape {tuple(found.shape)}; expected a number, or one for each {what} of x, of which there "
            f"are {size}"
        )
    require_finite(found, name)
    return found.reshape(-1, *[1] * (x.dim() - axis - 1)) if found.dim() else found


def _require_pixels(pixels: Tensor, given: torch.dtype) -> None:
    if not pixels.numel():
        return
    low, high = float(pixels.min()), float(pixels.max())
    slack = max(_TOLERANCE, 4 * torch.finfo(given).eps)
    if low < -slack or high > 1 + slack:
        raise ValueError(
            f"the pixels of x, x * std + mean, lie in [{low:.4g}, {high:.4g}]; expected [0, 1]. Give corrupt or "
            "image_shift the mean= and std= with which they were normalised, x = (pixels - mean) / std: std=1/255 if x "
            "goes from 0 to 255, mean=0.5, std=0.5 if it goes from -1 to 1"
        )
