"""Bits in and bits out, and what a codebook takes on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from by_hand import chain
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_bnn as pb
from pyro_bnn.models import Codebook, CodebookGuide, WeightSharing, coding, huffman, packing


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(0, 24), count=st.integers(0, 90), seed=st.integers(0, 2**16))
def test_every_value_comes_back(bits: int, count: int, seed: int) -> None:
    """For all widths and lengths, with the fewest bytes that hold them, also across chunks."""
    values = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    for chunk in (8, 2**19):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "_CHUNK", chunk)
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


@pytest.mark.parametrize("count", [1, 50, 4096, 4097, 30000])
@pytest.mark.parametrize("skew", [0.0, 0.5, 3.0])
def test_huffman_codes(count: int, skew: float) -> None:
    """Symbols come back, in at most the entropy and a bit each, and in the sizes of another construction."""
    generator = torch.Generator().manual_seed(0)
    p = torch.arange(1.0, 301.0) ** -skew
    values = torch.multinomial(p, count, replacement=True, generator=generator).to(torch.int32)
    counts = torch.bincount(values, minlength=300)
    lengths = huffman.code_lengths(counts)
    packed, lanes = huffman.encode(values, lengths)
    assert torch.equal(huffman.decode(packed, lanes, lengths, count), values)
    bits = int(lanes.sum())
    assert bits == int((counts * lengths.long()).sum()) and len(packed) == -(-bits // 8)
    shares = counts.double() / count
    entropy = float(torch.special.entr(shares).sum()) / float(torch.log(torch.tensor(2.0)))
    assert entropy * count <= bits + 1e-6 and bits <= (entropy + 1) * count + 1e-6
    weights, total = sorted(counts[counts > 0].tolist()), 0  # the sum of all inner nodes of the tree
    while len(weights) > 1:
        merged = weights.pop(0) + weights.pop(0)
        total += merged
        weights = sorted([*weights, merged])
    assert bits == (total or count)


def test_long_huffman_codes_are_cut() -> None:
    """Counts that grow as Fibonacci numbers would make words as long as there are symbols."""
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = huffman.code_lengths(torch.tensor(counts))
    assert int(lengths.max()) <= huffman.LONGEST and sum(2.0**-n for n in lengths.tolist()) == 1
    values = torch.arange(30, dtype=torch.int32).repeat(3)
    assert torch.equal(huffman.decode(*huffman.encode(values, lengths), lengths, 90), values)


def test_damaged_huffman_codes() -> None:
    values = torch.randint(9, (5000,), generator=torch.Generator().manual_seed(0))
    lengths = huffman.code_lengths(torch.bincount(values))
    packed, lanes = huffman.encode(values, lengths)
    with pytest.raises(ValueError, match="are not 5000 symbols"):
        huffman.decode(packed[:-1], lanes, lengths, 5000)
    with pytest.raises(ValueError, match="not 4990 symbols of this code"):
        huffman.decode(packed, lanes, lengths, 4990)
    with pytest.raises(ValueError, match="of no Huffman code"):
        huffman.decode(packed, lanes, torch.full_like(lengths, 2), 5000)


@pytest.mark.parametrize("codes", [1, 2, 40])
@pytest.mark.parametrize("zero", [False, True])
def test_a_codebook_comes_back_bit_for_bit(codes: int, zero: bool) -> None:
    """Labels, codes, outliers and weights between codes, whatever merged before."""
    model = WeightSharing(chain(2, 30, 1).float(), pb.likelihoods.Gaussian(0.3), 10)
    book = CodebookGuide(model, codes, blend=0.2, outliers=0.1, zero=zero).book
    if codes == 40:
        book.merge(tightness=3.0)
    book = book.compact()
    other = coding.decode(coding.describe(book), coding.encode(book))
    assert isinstance(other, Codebook) and other.sites == book.sites and other.zero == zero
    for (name, a), (_, b) in zip(book.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_the_report_is_what_is_on_disk(tmp_path: Path) -> None:
    """Bytes by hand, and the file's size up to its header."""
    net = chain(2, 64, 64, 1).float()
    model = WeightSharing(net, pb.likelihoods.Gaussian(0.3), 10)
    guide = CodebookGuide(model, 100, blend=0.02, outliers=0.01, smallest=0)
    report = guide.compression_report()
    n, k, o, e = (report[name] for name in ("weights", "codes", "outliers", "between"))
    assert n == 64 * 2 + 64 * 64 + 64 and k == 100 and e == int(0.02 * (n - o) + 1e-6) and o == int(0.005 * n)
    bits = coding.describe(guide.book)
    assert report["bytes"] == {
        "labels": report["bytes"]["labels"],
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


def test_more_symbols_than_words_are_refused() -> None:
    with pytest.raises(ValueError, match="65,537 symbols have no words of at most 16 bits"):
        huffman.code_lengths(torch.ones(2**16 + 1, dtype=torch.long))
