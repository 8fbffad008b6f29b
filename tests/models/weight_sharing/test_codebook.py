"""A codebook: its labels, its units, and a state that is loaded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from by_hand import chain
from coded_networks import N, distributions, sharing

from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    CodebookGuide,
    WeightSharing,
)
from pyro_bnn.models.weight_sharing.codebook import Between, Codebook, Codes, Outliers
from pyro_bnn.models.weight_sharing.from_weights import codebook_from_weights


def test_blending_at_both_ends_is_a_code() -> None:
    _, guide = sharing()
    book = guide.book
    for value, which in ((1.0, 0), (0.0, 1)):
        book.alpha.fill_(value)
        pair = book.pair[:, which].long()
        each = torch.cat([d.mean.flatten() for d in distributions(guide).values()])
        spread = torch.cat([d.variance.flatten() for d in distributions(guide).values()])
        torch.testing.assert_close(each[book.between], book.means()[pair])
        torch.testing.assert_close(spread[book.between], book.scales()[pair].square())


def test_the_units_are_those_of_codes_that_have_weights() -> None:
    sites = [("w", (4000,))]
    g = torch.Generator().manual_seed(0)
    loc, scale = torch.randn(4000, generator=g), torch.full((4000,), 0.1)
    book = codebook_from_weights(
        sites, loc, scale, 64, rate=4.0, distance="divergence", blend=0.0, outliers=0.0, smallest=0
    )
    assert len(book) < 64
    centres = torch.stack([book.means(), book.scales()], 1).detach().double()
    apart = torch.cdist(centres, centres).square()
    least = apart.fill_diagonal_(math.inf).amin(1)
    # the Wasserstein distance of codes is at least that of their centres
    assert float(book.units[0]) >= float(least.median()) * (1 - 1e-6)
    assert float(book.units[1]) == pytest.approx(float(book.spread.diagonal(dim1=1, dim2=2).sum(1).median()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", ["wasserstein", "divergence"])
def test_codes_of_half_precision_weights(dtype: torch.dtype, distance: Any) -> None:
    """As many codes, and as close, as for the same weights in float32; and counts that do not overflow."""
    g = torch.Generator().manual_seed(0)
    loc = (0.04 * torch.randn(150_000, generator=g)).to(dtype)
    scale = torch.full((150_000,), 1e-3)
    errors = []
    for d in (torch.float32, dtype):
        book = codebook_from_weights(
            [("w", (150_000,))],
            loc.to(d),
            scale.to(d),
            16,
            distance=distance,
            blend=0.0,
            outliers=0.0,
            iterations=5,
        )
        errors.append(float((book.means()[book.codes().long()].float() - loc.float()).square().mean().sqrt()))
        held = book.weights_per_code()
        assert int(held.sum()) == 150_000 and bool(torch.isfinite(book.log_shares()).all())
    assert errors[1] < 1.1 * errors[0] < 0.01


def test_places_of_outliers_follow_a_state_that_is_loaded() -> None:
    """Two codebooks of the same shapes, whose outliers and pairs lie in different sites."""
    books = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = WeightSharing(chain(2, 16, 8, 1), Gaussian(0.3), N)
        with torch.no_grad():
            model.core().parameters_by_name()["0.weight" if seed else "2.weight"][:] *= 10
        books.append(CodebookGuide(model, 6, blend=0.1, outliers=0.06, smallest=0).book)
    one, two = books
    assert {n: v.shape for n, v in one.state_dict().items()} == {n: v.shape for n, v in two.state_dict().items()}
    # the tables hold the outliers and pairs of their sites
    assert [len(table.loc) for table in one.tables()] != [len(table.loc) for table in two.tables()]
    two.load_state_dict(one.state_dict())
    for a, b in zip(one.tables(), two.tables(), strict=True):
        assert torch.equal(a.loc[a.labels.long()], b.loc[b.labels.long()])


def test_a_label_is_a_code_an_outlier_or_a_weight_between_codes() -> None:
    """Every weight has the Gaussian, and every entry of a table the weights, that the codebook was made with."""
    sites = [("a", (2, 2)), ("b", (3,))]
    book = Codebook(
        sites,
        torch.tensor([0, 1, 0, 0, 2, 0, 1]),
        Codes(torch.tensor([-1.0, 0.5, 2.0]), torch.zeros(3), torch.eye(2).expand(3, 2, 2).clone()),
        Outliers(torch.tensor([2, 5]), torch.tensor([7.0, 8.0]), torch.ones(2)),
        Between(torch.tensor([3]), torch.tensor([[0, 2]]), torch.tensor([51 / 255])),
    )
    assert book.labels.tolist() == [0, 1, 3, 4, 2, 3, 1]
    means = [table.loc[table.labels.long()].tolist() for table in book.tables()]
    assert means[0] == pytest.approx([-1.0, 0.5, 7.0, 0.2 * -1.0 + 0.8 * 2.0]) and means[1] == [2.0, 8.0, 0.5]
    assert [counts.tolist() for counts in book.counts()] == [[1, 1, 0, 1, 1], [0, 1, 1, 1]]
    assert book.weights_per_code().tolist() == [1, 2, 1] and float(book.weights_without_code()) == 3
    torch.testing.assert_close(book.weights_per_code(soft=True), torch.tensor([1.2, 2.0, 1.8]).double())
    assert float(book.weights_without_code(soft=True)) == 2
    assert book.is_outlier().tolist() == [True, True] and book.codes().tolist() == [0, 1, 0, 0, 2, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"assignment": torch.zeros(3, dtype=torch.long)}, "3 labels for 4 weights"),
        ({"assignment": torch.tensor([0, 0, 0, 2])}, "labels outside of 0 to 1"),
        (
            {"outliers": Outliers(torch.tensor([3]), torch.zeros(1), torch.zeros(1))},
            "an outlier or between codes twice",
        ),
        ({"outliers": Outliers(torch.tensor([4]), torch.zeros(1), torch.zeros(1))}, "positions outside of 4"),
        (
            {"between": Between(torch.tensor([3]), torch.tensor([[0, 2]]), torch.ones(1))},
            "pairs of codes outside of 0 to 1",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "assignment": torch.zeros(4, dtype=torch.long),
        "codes": Codes(torch.zeros(2), torch.zeros(2), torch.eye(2).expand(2, 2, 2).clone()),
        "outliers": Outliers(torch.tensor([0]), torch.zeros(1), torch.zeros(1)),
        "between": Between(torch.tensor([3]), torch.tensor([[0, 1]]), torch.ones(1)),
    }
    with pytest.raises(ValueError, match=f"the parts of the codebook are inconsistent: .*{message}"):
        Codebook([("w", (4,))], **(parts | change))
