"""Corruptions of images and tables: exact values, seeds, rows of their own, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretend_device import DEVICE, PretendDevice
from torch import Tensor

from pyro_bnn.data import digits
from pyro_bnn.data.corruptions import (
    IMAGE_KINDS,
    SEVERITIES,
    TABLE_KINDS,
    corrupt,
    corrupt_table,
    image_shift,
    table_shift,
)

#: means and standard deviations that torchvision's ImageNet weights are used with
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(channels: int = 3, height: int = 12, width: int = 20, rows: int = 6, **kind: Any) -> Tensor:
    """Smooth images of whole bytes over 255, each with a wave of its own."""
    down, right = torch.arange(height).double()[:, None] / height, torch.arange(width).double() / width
    waves = [
        torch.sin(2 * math.pi * ((1 + row % 3) * down + (row % 2) * right) + channel)
        for row in range(rows)
        for channel in range(channels)
    ]
    pixels = (127 + 100 * torch.stack(waves)).round() / 255
    return pixels.view(rows, channels, height, width).to(kind.get("dtype", torch.float32))


def table(rows: int = 200, columns: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 5 + 3 * torch.randn(rows, columns, generator=generator)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().square().mean().sqrt())


@pytest.mark.parametrize("kind", IMAGE_KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (1, 20, 12), (3, 66, 80), (1, 1, 1), (3, 2, 5)], ids=str)
def test_an_image_keeps_its_form_and_pixels_stay_in_range(kind: str, shape: tuple[int, int, int]) -> None:
    """Proves for grey, coloured, wide, high, large and tiny images that shape and dtype stay, and pixels in [0, 1]."""
    for dtype in (torch.float32, torch.float64, torch.float16):
        x = images(*shape, dtype=dtype)
        before = x.clone()
        for severity in SEVERITIES:
            found = corrupt(x, kind, severity)
            assert found.shape == x.shape and found.dtype == dtype
            assert float(found.min()) >= 0 and float(found.max()) <= 1
        assert torch.equal(x, before), "what was given is not changed"


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_severity_0_is_the_image_and_none_is_less_than_the_one_below(kind: str) -> None:
    """Proves that the distance from the clean images grows with the severity, on images large enough for steps."""
    for x in (images(3, 40, 60), images(1, 72, 90)):
        assert corrupt(x, kind, 0) is x
        distances = [distance(corrupt(x, kind, severity), x) for severity in SEVERITIES]
        assert distances[0] > 0 and distances == sorted(distances) and distances[-1] > 1.2 * distances[0]


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_an_image_becomes_the_same_in_every_batch(kind: str) -> None:
    """Proves that neither the other rows, nor their order, nor their number has a part in what becomes of an image."""
    x = images()
    whole = corrupt(x, kind, 3)
    alone = torch.cat([corrupt(row, kind, 3) for row in x.split(1)])
    turned = corrupt(x.flip(0), kind, 3).flip(0)
    for other in (alone, turned):
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["noise", "rotation", "translation"])
def test_the_seed_decides_and_nothing_else_does(kind: str) -> None:
    """Proves that the same seed gives the same bits, that another gives others, and that torch's own state is left."""
    x = images(rows=24)
    state = torch.get_rng_state()
    first = corrupt(x, kind, 4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(corrupt(x, kind, 4, seed=7), first)
    assert not torch.equal(corrupt(x, kind, 4, seed=8), first)
    assert not torch.equal(corrupt(x, kind, 4, seed=2**64 + 7), first), "a large seed is one of its own"


@pytest.mark.parametrize("kind", sorted(set(IMAGE_KINDS) - {"noise", "rotation", "translation"}))
def test_kinds_without_chance_have_no_seed(kind: str) -> None:
    assert torch.equal(corrupt(images(), kind, 2, seed=0), corrupt(images(), kind, 2, seed=1))


def test_noise_is_that_of_the_benchmarks_and_the_same_at_all_severities() -> None:
    """Proves the standard deviation for both sizes, and that a severity scales one draw. Of 8 x 3 x 40 x 50 numbers
    the standard deviation is known to 1 / sqrt(2 x 48,000), so 2 % are six standard errors."""
    for size, expected in (((40, 50), [0.04, 0.06, 0.08, 0.09, 0.1]), ((65, 70), [0.08, 0.12, 0.18, 0.26, 0.38])):
        x = 0.5 + 1e-3 * images(3, *size, rows=8, dtype=torch.float64)  # so far from 0 and 1 that little is clamped
        noise = [corrupt(x, "noise", severity) - x for severity in SEVERITIES]
        for draw, scale in zip(noise[:3], expected, strict=False):
            assert float(draw.std()) == pytest.approx(scale, rel=0.02)
        unclamped = (noise[1].abs() < 0.45) & (noise[0].abs() < 0.45)
        torch.testing.assert_close(noise[1][unclamped], noise[0][unclamped] * expected[1] / expected[0])
        assert abs(float(np.corrcoef(noise[0][0].flatten(), noise[0][1].flatten())[0, 1])) < 0.06, "rows differ"


def test_brightness_of_grey_adds_a_constant_and_stops_at_white() -> None:
    x = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    for severity, c in zip(SEVERITIES, (0.05, 0.1, 0.15, 0.2, 0.3), strict=True):
        torch.testing.assert_close(corrupt(x, "brightness", severity), (x + c).clamp(max=1), rtol=0, atol=1e-7)


def test_brightness_of_colours_keeps_hue_and_saturation() -> None:
    """Proves the value of hue, saturation, value against Python's own conversion, pixel by pixel."""
    import colorsys

    x = torch.cat([images(3), torch.zeros(1, 3, 12, 20)])
    found = corrupt(x, "brightness", 4).permute(0, 2, 3, 1).flatten(0, 2)
    for before, after in zip(x.permute(0, 2, 3, 1).flatten(0, 2).tolist()[::37], found.tolist()[::37], strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2)), abs=1e-6)


def test_contrast_draws_pixels_to_the_mean_of_their_channel() -> None:
    x = images(3)
    mean = x.mean((2, 3), keepdim=True)
    for severity, c in zip(SEVERITIES, (0.75, 0.5, 0.4, 0.3, 0.15), strict=True):
        found = corrupt(x, "contrast", severity)
        torch.testing.assert_close(found, mean + c * (x - mean))
        torch.testing.assert_close(found.std((2, 3)), c * x.std((2, 3)))


def test_blur_is_the_gaussian_of_scipy() -> None:
    """Proves the standard deviation in pixels, and that a bright point stays one in sum."""
    from scipy.ndimage import gaussian_filter

    x = images(1, 30, 24, dtype=torch.float64)
    for severity, c in zip(SEVERITIES, (0.4, 0.6, 0.7, 0.8, 1.0), strict=True):
        expected = gaussian_filter(x.numpy(), (0, 0, c, c), mode="mirror", truncate=4.0)
        np.testing.assert_allclose(corrupt(x, "blur", severity).numpy(), expected, atol=1e-6)
    point = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    point[0, 0, 7, 7] = 1
    assert float(corrupt(point, "blur", 5).sum()) == pytest.approx(1)


def test_translation_moves_whole_pixels_in_four_directions() -> None:
    """Proves that every image is moved by exactly the stated share of its side, with black where nothing was."""
    x = images(1, 20, 32, rows=60)
    down, right = (3, 5)  # .15 of 20 and of 32, rounded up
    moves = {"right": (0, -right), "left": (0, right), "down": (-down, 0), "up": (down, 0)}
    candidates = {name: torch.zeros_like(x) for name in moves}
    candidates["up"][:, :, :-down] = x[:, :, down:]
    candidates["down"][:, :, down:] = x[:, :, :-down]
    candidates["left"][..., :-right] = x[..., right:]
    candidates["right"][..., right:] = x[..., :-right]
    found = corrupt(x, "translation", 3)
    chosen = [{name for name in moves if torch.equal(found[row], candidates[name][row])} for row in range(len(x))]
    assert all(len(names) == 1 for names in chosen) and set.union(*chosen) == set(moves)
    tiny = torch.rand(1, 1, 8, 8)
    sides = {round(math.sqrt(float((corrupt(tiny, "translation", s) == 0).sum()) / 8) ** 2) for s in SEVERITIES}
    assert sides == {1, 2}, "of 8 pixels, 5 and 10 % are one, and 25 % are two"


def test_rotation_is_about_the_centre_and_goes_both_ways() -> None:
    """Proves the angle of a line through the centre, 40 degrees at severity 4, to one side or the other."""
    x = torch.zeros(1, 1, 61, 61)
    x[..., 30, 5:56] = 1
    angles = set()
    for seed in range(8):
        turned = corrupt(x, "rotation", 4, seed=seed)[0, 0]
        row, column = (torch.nonzero(turned > 0.5).double() - 30).unbind(1)
        slope = float((row * column).sum() / column.square().sum())
        angles.add(round(math.degrees(math.atan(-slope))))
    assert angles == {-40, 40}


def test_pixelate_is_the_box_of_pillow_and_leaves_what_is_even() -> None:
    for height, width in ((32, 32), (8, 8), (23, 47), (70, 101)):
        x = images(1, height, width, rows=2)
        shares = (0.95, 0.9, 0.85, 0.75, 0.65) if min(height, width) <= 64 else (0.6, 0.5, 0.4, 0.3, 0.25)
        for severity, c in zip(SEVERITIES, shares, strict=True):
            small = (int(c * width), int(c * height))
            for row, found in zip(x[:, 0], corrupt(x, "pixelate", severity)[:, 0], strict=True):
                pixels = Image.fromarray(row.numpy()).resize(small, Image.Resampling.BOX)
                expected = np.asarray(pixels.resize((width, height), Image.Resampling.BOX))
                np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    even = torch.full((1, 3, 9, 13), 0.3)
    torch.testing.assert_close(corrupt(even, "pixelate", 5), even)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_pillow(channels: int) -> None:
    """Proves the quality, and that the image before it is rounded to bytes."""
    import io

    x = images(channels, 40, 56, rows=2)
    for severity, quality in zip(SEVERITIES, (80, 65, 58, 50, 40), strict=True):
        for row, found in zip(x, corrupt(x, "jpeg", severity), strict=True):
            byte = (row * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
            file = io.BytesIO()
            Image.fromarray(byte).save(file, "JPEG", quality=quality)
            expected = np.asarray(Image.open(file)).reshape(40, 56, channels).transpose(2, 0, 1)
            np.testing.assert_allclose(found.numpy() * 255, expected, atol=1e-4)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_normalised_images_are_corrupted_as_their_pixels_are(kind: str) -> None:
    """Proves that the normalisation is undone before and done again after, for channels of their own and for bytes."""
    x = images(3, dtype=torch.float32)
    expected = corrupt(x, kind, 3)
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    for given_mean, given_std in ((MEAN, STD), (list(MEAN), np.array(STD)), (torch.tensor(MEAN), torch.tensor(STD))):
        found = corrupt((x - mean) / std, kind, 3, mean=given_mean, std=given_std)
        torch.testing.assert_close(found * std + mean, expected, rtol=0, atol=3e-6)
    bytes_ = corrupt(x * 255, kind, 3, std=1 / 255)
    torch.testing.assert_close(bytes_ / 255, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_double_precision_has_the_same_noise(kind: str) -> None:
    single, double = images(), images(dtype=torch.float64)
    found = corrupt(double, kind, 3)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), corrupt(single, kind, 3), rtol=0, atol=2e-6)


def test_arrays_and_no_rows_at_all_are_fine() -> None:
    x = images()
    assert torch.equal(corrupt(x.numpy(), "noise", 2), corrupt(x, "noise", 2))  # type: ignore[arg-type]
    for kind in IMAGE_KINDS:
        assert corrupt(x[:0], kind, 2).shape == x[:0].shape
    for kind in TABLE_KINDS:
        assert corrupt_table(table()[:0], kind, 2, mean=0.0, std=1.0).shape == (0, 7)


def test_the_built_in_digits_are_in_range() -> None:
    """Proves that what pb.data reads needs no mean and no standard deviation."""
    x = digits().x_test[:50]
    for kind, corruption in image_shift().items():
        assert torch.equal(corruption(x, 2), corrupt(x, kind, 2)) and distance(corruption(x, 2), x) > 0


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_an_image_on_another_device_becomes_the_same(kind: str) -> None:
    """Proves that nothing mixes devices, and that random numbers do not depend on the device."""
    x = images()
    expected = corrupt(x, kind, 3, mean=0.0, std=1.0)
    with PretendDevice():
        found = corrupt(x.to(DEVICE), kind, 3)
        assert found.device == DEVICE
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images() * 255, r"lie in \[\d+, 227\]; expected \[0, 1\].*std=1/255"),
        (images() * 2 - 1, r"lie in \[-.*mean=0.5, std=0.5"),
        (images()[:, :2], r"shape \(6, 2, 12, 20\); expected images \[N, C, H, W\] with 1 or 3 channels"),
        (images().permute(0, 2, 3, 1), r"channels last are x.permute\(0, 3, 1, 2\)"),
        (images()[:, 0], r"without channels x.unsqueeze\(1\)"),
        (images() * math.nan, "NaN or infinite"),
    ],
    ids=["bytes", "from -1 to 1", "two channels", "channels last", "no channel", "nan"],
)
def test_what_are_no_pixels_is_refused(x: Tensor, message: str) -> None:
    for severity in (0, 3):
        with pytest.raises(ValueError, match=message):
            corrupt(x, "noise", severity)


@pytest.mark.parametrize("x", [(images() * 255).byte(), [images(), images()], "digits"], ids=["bytes", "two", "text"])
def test_what_are_no_floats_is_refused(x: Any) -> None:
    with pytest.raises(TypeError, match=r"expected (floats|one tensor)"):
        corrupt(x, "noise", 3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"kind": "nois"}, ValueError, "expected one of 'noise', 'blur'.*the nearest is 'noise'"),
        ({"kind": "Rotate"}, ValueError, "the nearest is 'rotation'"),
        ({"kind": "fog"}, ValueError, r"'pixelate', 'jpeg'$"),
        ({"kind": 3}, TypeError, "expected a string"),
        ({"severity": 6}, ValueError, "expected 1, 2, 3, 4, 5, or 0 for no corruption; the nearest is 5"),
        ({"severity": -1}, ValueError, "severity=-1"),
        ({"severity": 2.5}, ValueError, "whole number"),
        ({"severity": True}, TypeError, "severity=True"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": None}, TypeError, "seed=None"),
        ({"std": 0.0}, ValueError, "std=0.0: expected positive numbers"),
        ({"mean": (0.5, 0.5)}, ValueError, r"mean has shape \(2,\); expected a number, or one for each channel"),
        ({"mean": math.nan}, ValueError, "mean=nan"),
        ({"std": "unit"}, TypeError, "std is str"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"kind": "noise", "severity": 3} | given
    with pytest.raises(error, match=message):
        corrupt(images(), **arguments)


# ------------------------------------------------------------------------------------------------------------ tables


def test_noise_in_a_table_follows_the_training_columns() -> None:
    """Proves the scale of each column, and that a column that is constant in training stays as it is. Of 20,000 rows a
    standard deviation is known to 1 / sqrt(40,000), half a per cent, so 3 % are six standard errors."""
    x = table(20_000, 3).double()
    std = torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64)
    for severity, k in zip(SEVERITIES, (0.1, 0.2, 0.4, 0.6, 0.8), strict=True):
        noise = corrupt_table(x, "noise", severity, mean=5.0, std=std) - x
        np.testing.assert_allclose(noise.std(0).numpy(), k * std.numpy(), rtol=0.03)
        assert bool((noise[:, 2] == 0).all())


def test_missing_columns_are_the_training_mean_and_become_more() -> None:
    x, mean = table(), torch.arange(7.0)
    missing = []
    for severity in SEVERITIES:
        found = corrupt_table(x, "missing", severity, mean=mean, std=1.0)
        gone = (found == mean).all(0)
        assert torch.equal(found[:, ~gone], x[:, ~gone]) and int(gone.sum()) == math.ceil(0.7 * severity)
        missing.append({int(column) for column in torch.nonzero(gone)})
    assert all(less <= more for less, more in zip(missing, missing[1:], strict=False))
    others = {
        tuple((corrupt_table(x, "missing", 3, mean=mean, std=1.0, seed=seed) == mean).all(0).tolist())
        for seed in range(8)
    }
    assert len(others) > 1, "the seed chooses the columns"


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_a_row_of_a_table_becomes_the_same_in_every_batch(kind: str) -> None:
    """Proves that rows have no part in each other, in every precision, and with the seed alone as chance."""
    x = table()
    arguments: dict[str, Any] = {"mean": 5.0, "std": 3.0, "seed": 3}
    whole = corrupt_table(x, kind, 4, **arguments)
    assert torch.equal(torch.cat([corrupt_table(row, kind, 4, **arguments) for row in x.split(1)]), whole)
    assert torch.equal(corrupt_table(x.flip(0), kind, 4, **arguments).flip(0), whole)
    torch.testing.assert_close(corrupt_table(x.double(), kind, 4, **arguments).float(), whole, rtol=1e-5, atol=1e-5)
    assert corrupt_table(x, kind, 0, **arguments) is x
    with PretendDevice():
        assert torch.equal(corrupt_table(x.to(DEVICE), kind, 4, **arguments).cpu(), whole)


def test_a_shift_of_a_table_takes_means_and_scales_from_training_rows() -> None:
    """Proves that the unit of the columns does not matter: raw and standardised rows are corrupted alike."""
    raw, new = table(), table(30) + 1
    mean, std = raw.mean(0), raw.std(0, correction=0)
    for kind, corruption in table_shift(raw, seed=2).items():
        expected = corrupt_table((new - mean) / std, kind, 3, mean=0.0, std=1.0, seed=2)
        torch.testing.assert_close((corruption(new, 3) - mean) / std, expected, rtol=1e-4, atol=1e-4)
    assert list(table_shift(raw, "missing")) == ["missing"] and set(table_shift(raw)) == set(TABLE_KINDS)


def test_shifts_and_tables_refuse_what_they_cannot_use() -> None:
    assert list(image_shift(["blur", "noise", "blur"])) == ["blur", "noise"]
    for call, error, message in [
        (lambda: image_shift([]), ValueError, "expected at least one of"),
        (lambda: image_shift("noize"), ValueError, "the nearest is 'noise'"),
        (lambda: image_shift(7), TypeError, "kinds=7"),  # type: ignore[arg-type]
        (lambda: table_shift(table()[:0]), ValueError, r"x_train has shape \(0, 7\)"),
        (lambda: table_shift(table(), "mising"), ValueError, "the nearest is 'missing'"),
        (lambda: corrupt_table(table()[0], "noise", 1, mean=0.0, std=1.0), ValueError, r"rows of a table, \[N, D\]"),
        (lambda: corrupt_table(table(), "noise", 1, mean=0.0, std=-1.0), ValueError, "no negative numbers"),
        (lambda: corrupt_table(table(), "noise", 1, mean=[0.0, 1.0], std=1.0), ValueError, "one for each column"),
        (lambda: corrupt_table(table(), "blur", 1, mean=0.0, std=1.0), ValueError, "one of 'noise', 'missing'"),
    ]:
        with pytest.raises(error, match=message):
            call()
