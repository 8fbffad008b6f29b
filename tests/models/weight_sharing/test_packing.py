"""Bits in and bits out, and what a codebook takes on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from by_hand import chain
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_bnn as pb
from pyro_bnn.models import Codebook, CodebookGuide, WeightSharing
from pyro_bnn.models.weight_sharing.storage import entropy_coding, packing
from pyro_bnn.models.weight_sharing.storage.packed_codebook import describe_codebook, pack_codebook, unpack_codebook


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(0, 24), count=st.integers(0, 90), seed=st.integers(0, 2**16))
def test_every_value_comes_back(bits: int, count: int, seed: int) -> None:
    """For all widths and lengths, with the fewest bytes that hold them, also across chunks."""
    values = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    for chunk in (8, 2**19):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "CHUNK", chunk)
            packed = packing.pack(values, bits)
            assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
            assert torch.equal(packing.unpack(packed, bits, count).long(), values)


def test_the_order_of_bits() -> None:
    assert packing.pack(torch.tensor([5, 1, 7]), 3).tolist() == [0b11001101, 0b1]


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, 10**7), max_size=60))
def test_positions(chosen: set[int]) -> None:
    positions = torch.tensor(sorted(chosen), dtype=torch.long)
    packed, bits = packing.pack_positions(positions)
    assert torch.equal(packing.unpack_positions(packed, bits, len(positions)), positions)
    gaps = torch.cat([torch.tensor([-1]), positions]).diff() - 1
    assert 2**bits > (int(gaps.max()) if len(gaps) else 0)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="values from 1 to 8 do not fit into 3 bits"):
        packing.pack(torch.tensor([1, 8]), 3)
    with pytest.raises(ValueError, match="5 values of 3 bits take 2 bytes, got"):
        packing.unpack(torch.zeros(3, dtype=torch.uint8), 3, 5)


def entropy_in_bits(counts: torch.Tensor) -> float:
    return float(torch.special.entr(counts.double() / counts.sum()).sum()) / math.log(2)


@pytest.mark.parametrize("count", [1, 50, 4096, 4097, 30000])
@pytest.mark.parametrize("skew", [0.0, 0.5, 3.0])
def test_entropy_coding(count: int, skew: float) -> None:
    """Symbols come back, in the entropy and what 16-bit frequencies, whole words and the states of lanes add to it."""
    p = torch.arange(1.0, 301.0) ** -skew
    values = torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    counts = torch.bincount(values, minlength=300)
    freq = entropy_coding.frequencies(counts)
    assert int(freq.sum()) == 2**16 and torch.equal(freq > 0, counts > 0)
    stream, states = entropy_coding.encode(values, freq)
    assert torch.equal(entropy_coding.decode(stream, states, freq, count), values)
    length, ideal = entropy_coding.coded_bits(counts, freq), entropy_in_bits(counts) * count
    assert ideal - 1e-6 <= length <= ideal * 1.001 + 1e-6
    # what the states hold at the end, beyond the 16 bits that they start with, and what the stream does
    bits = 8 * len(stream) + float((states.double() / 2**16).log2().sum())
    assert abs(bits - length) <= 2e-3 * length + 0.5 * len(states)  # while x is near f_s, floors matter


def test_one_lane_by_the_equations() -> None:
    """The coder's stream is read back by the docstring's equations on Python's own integers."""
    values = torch.randint(5, (200,), generator=torch.Generator().manual_seed(1)).square() // 4
    freq = entropy_coding.frequencies(torch.bincount(values, minlength=6))
    stream, states = entropy_coding.encode(values.to(torch.int32), freq)
    f = freq.tolist()
    starts = [sum(f[:s]) for s in range(6)]
    x, words, found = int(states[0]), list(zip(*[iter(stream.tolist())] * 2, strict=True)), []
    for _ in range(200):
        s = next(s for s in range(6) if starts[s] <= x % 2**16 < starts[s] + f[s])
        found.append(s)
        x = f[s] * (x // 2**16) + x % 2**16 - starts[s]
        if x < 2**16:
            low, high = words.pop(0)
            x = x * 2**16 + low + 256 * high
    assert found == values.tolist() and not words and x == 2**16


def test_the_stream_is_that_of_the_equations() -> None:
    """Also where a state is just at the bound, as of runs of a symbol with half of all frequencies."""
    for values in ([1] * 40 + [0] * 40, [0, 0, 1, 2, 0] * 20, [3, 2, 1, 0] * 9):
        freq = entropy_coding.frequencies(torch.bincount(torch.tensor(values)))
        f = freq.tolist()
        x, words = 2**16, []
        for s in reversed(values):
            if x >= f[s] * 2**16:
                words.append(x % 2**16)
                x //= 2**16
            x = (x // f[s]) * 2**16 + x % f[s] + sum(f[:s])
            assert 2**16 <= x < 2**32
        stream, states = entropy_coding.encode(torch.tensor(values, dtype=torch.int32), freq)
        assert states.tolist() == [x]
        assert stream.tolist() == [byte for word in reversed(words) for byte in (word % 256, word // 256)]


def test_half_a_bit_for_a_label() -> None:
    """Where nine of ten labels are the same, one takes less than the bit that any code of words would need."""
    values = (torch.rand(40_000, generator=torch.Generator().manual_seed(0)) < 0.1).to(torch.int32)
    counts = torch.bincount(values)
    stream, states = entropy_coding.encode(values, entropy_coding.frequencies(counts))
    assert 8 * len(stream) < 1.01 * entropy_in_bits(counts) * 40_000 < 0.48 * 40_000 and len(states) == 10


@pytest.mark.parametrize(
    "counts", [[1, 10**6], [10**9, 1, 1, 0, 5], [1] * 2**16, [3] * 1000, [2**16 - 1] + [1] * 500, [10**9] + [1] * 30000]
)
def test_frequencies(counts: list[int]) -> None:
    """They sum to 2^16 whatever rounding left over, and rare symbols keep theirs."""
    freq = entropy_coding.frequencies(torch.tensor(counts))
    assert int(freq.sum()) == 2**16 and [f > 0 for f in freq.tolist()] == [c > 0 for c in counts]


def test_damaged_streams() -> None:
    values = torch.randint(9, (5000,), generator=torch.Generator().manual_seed(0))
    freq = entropy_coding.frequencies(torch.bincount(values))
    stream, states = entropy_coding.encode(values, freq)
    with pytest.raises(ValueError, match="are not 5000 symbols"):
        entropy_coding.decode(stream[:-1], states, freq, 5000)
    with pytest.raises(ValueError, match="not 5000 symbols with these"):
        entropy_coding.decode(stream[:-2], states, freq, 5000)
    with pytest.raises(ValueError, match="not 4990 symbols with these"):
        entropy_coding.decode(stream, states, freq, 4990)
    with pytest.raises(ValueError, match="not 5000 symbols with these"):
        entropy_coding.decode(stream.flip(0), states, freq, 5000)
    with pytest.raises(ValueError, match="must sum to 65536, and are"):
        entropy_coding.decode(stream, states, freq + 1, 5000)


@pytest.mark.parametrize("codes", [1, 2, 40])
@pytest.mark.parametrize("zero", [False, True])
def test_a_codebook_comes_back_bit_for_bit(codes: int, zero: bool) -> None:
    """Labels, codes, outliers and weights between codes, whatever merged before."""
    model = WeightSharing(chain(2, 30, 1).float(), pb.likelihoods.Gaussian(0.3), 10)
    book = CodebookGuide(model, codes, blend=0.2, outliers=0.1, zero=zero).book
    if codes == 40:
        book.merge(tightness=3.0)
    book = book.compact()
    other = unpack_codebook(describe_codebook(book), pack_codebook(book))
    assert isinstance(other, Codebook) and other.sites == book.sites and other.zero == zero
    for (name, a), (_, b) in zip(book.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_an_entropy_coded_codebook_comes_back(tmp_path: Path) -> None:
    """Where most weights share a code; what the report counts is what is stored."""
    net = chain(2, 100, 100, 1).float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= torch.rand(parameter.shape) < 0.1
    model = WeightSharing(net, pb.likelihoods.Gaussian(0.3), 10)
    guide = CodebookGuide(model, 32, blend=0.0, outliers=0.0, smallest=0, zero=True)
    parts = pack_codebook(guide.book)
    labels = [parts[name] for name in ("labels", "label_states", "label_frequencies")]
    report = guide.compression_report()
    assert report["bytes"]["labels"] == sum(v.numel() * v.element_size() for v in labels)
    assert report["label_entropy"] < report["label_bits"] < 1.6 < packing.width(report["codes"])
    other = unpack_codebook(describe_codebook(guide.book), parts)
    assert torch.equal(other.labels, guide.book.labels) and torch.equal(other.units, guide.book.units)
    pb.Posterior(model, guide).save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", net)
    x = torch.randn(5, 2)
    assert torch.equal(
        loaded.predict(x, 3, seed=0).per_member, pb.Posterior(model, guide).predict(x, 3, seed=0).per_member
    )
    damaged = parts | {"label_frequencies": parts["label_frequencies"][:-1]}
    with pytest.raises(ValueError, match="the frequencies of its labels are not those of"):
        unpack_codebook(describe_codebook(guide.book), damaged)


def test_the_report_is_what_is_on_disk(tmp_path: Path) -> None:
    """Bytes by hand, and the file's size up to its header."""
    net = chain(2, 64, 64, 1).float()
    model = WeightSharing(net, pb.likelihoods.Gaussian(0.3), 10)
    guide = CodebookGuide(model, 100, blend=0.02, outliers=0.01, smallest=0, seed=0)
    report = guide.compression_report()
    n, k, o, e = (report[name] for name in ("weights", "codes", "outliers", "between"))
    assert n == 64 * 2 + 64 * 64 + 64 and k == 100 and e == int(0.02 * (n - o) + 1e-6) and o == int(0.005 * n)
    bits = describe_codebook(guide.book)
    assert report["bytes"] == {
        "labels": pack_codebook(guide.book.compact())["labels"].numel(),  # a fixed width
        "codes": 20 * k,
        "outliers": 8 * o + -(-bits["outlier_bits"] * o // 8),
        "between": e + -(-7 * e // 8) + -(-bits["between_bits"] * e // 8),
        "total": sum(v for name, v in report["bytes"].items() if name != "total"),
    }
    assert report["of_mean_field"] == report["bytes"]["total"] / (8 * n)
    assert report["of_network"] == report["bytes"]["total"] / (4 * n)
    assert report["trainable"] == 2 * k + 2 * o and report["per_trainable"] == n / report["trainable"]
    assert (
        report["other_trainable"] == 2 * (64 + 64 + 1)
        and report["label_bits"] == 8 * report["bytes"]["labels"] / n <= 7.01
    )
    assert 0 < report["label_entropy"] <= 7
    pb.Posterior(model, guide).save(tmp_path / "p")
    biases = 3 * 4 * (64 + 64 + 1)  # of the network, and means and deviations of the guide
    size = (tmp_path / "p" / "tensors.safetensors").stat().st_size
    assert report["bytes"]["total"] + biases <= size <= report["bytes"]["total"] + biases + 3000


def test_more_symbols_than_frequencies_are_refused() -> None:
    with pytest.raises(ValueError, match="65,537 symbols occur: expected from 1 to 65,536"):
        entropy_coding.frequencies(torch.ones(2**16 + 1, dtype=torch.long))
