"""The first look at a network: whatever it makes of odd inputs, noise and rows, it runs where it can, and where it
cannot the network's own words are the message, with advice that works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bnn as pb

LIKELIHOOD = pb.likelihoods.Categorical()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Finite(Plain):
    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all(), "bad input"
        return super().forward(x)


class InRange(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if not ((x >= 0) & (x <= 1)).all():  # NaN is not in it either
            raise ValueError("pixels must lie in [0, 1]")
        return super().forward(x)


class Sums(Plain):
    """Compositions: every row must add up to one."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(torch.allclose(x.sum(1), x.new_ones(())), "rows must be compositions")
        return super().forward(x)


class Noise(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


class Dropped(Plain):
    """Monte Carlo dropout: in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.a(x).tanh(), 0.3, training=True)
        return self.b(h * torch.distributions.Normal(torch.ones_like(h), 0.1).rsample())


class Gumbel(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gumbel_softmax(self.a(x)) + torch.normal(self.a(x), 0.1) + torch.rand(len(x), 1))


class Squeezes(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1)).squeeze()


class Ends(nn.Module):
    """As T5: all rows must have the same number of end tokens, by which their states are picked."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        ends = x == 1
        if len(torch.unique(ends.sum(1))) > 1:
            raise ValueError("all examples must have the same number of ends")
        h = self.e(x).cumsum(1)
        return self.o(h[ends].view(len(x), -1, 4)[:, -1])


def unit(n: int = 12) -> Tensor:
    return torch.rand(n, 5)


def sentences(n: int = 12) -> Tensor:
    return torch.cat([torch.randint(2, 10, (n, 4)), torch.ones(n, 1, dtype=torch.long)], 1)


NETWORKS: dict[str, tuple[type[nn.Module], Callable[[], Tensor]]] = {
    "finite": (Finite, unit),
    "in range": (InRange, unit),
    "compositions": (Sums, lambda: unit().softmax(1)),
    "noise": (Noise, unit),
    "dropout": (Dropped, unit),
    "gumbel": (Gumbel, unit),
    "squeeze": (Squeezes, unit),
    "ends": (Ends, sentences),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_check_their_input_or_draw_noise_run(name: str) -> None:
    """Proves for both models that look inside that such a network trains and predicts, from one row on."""
    make, inputs = NETWORKS[name]
    x = inputs()
    y = torch.randint(0, 2, (12,))
    for kind, guide, select in (
        (pb.models.Rank1, pb.models.Rank1Guide, None),
        (pb.models.Bella, pb.models.ParticleGuide, ["e", "o"] if name == "ends" else None),
    ):
        model = kind(make(), LIKELIHOOD, 12, select=select)
        fitted = pb.inference.fit(model, guide(model, 2), (x, y), epochs=1, batch_size=4, progress=False)
        assert fitted.predict(x).probs.shape == (12, 2)
        if name != "squeeze":
            model = kind(make(), LIKELIHOOD, 1, select=select)
            fitted = pb.inference.fit(model, guide(model, 2), (x[:1], y[:1]), epochs=1, progress=False)
            assert fitted.predict(x[:1]).probs.shape == (1, 2)


def test_rows_that_see_each_other_are_still_found_out_beside_noise() -> None:
    """Proves that constant noise hides no fault: the check with explicit weights is as strict as without."""

    class Mixes(Noise):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.a(x).mean()

    model = pb.models.Rank1(Mixes(), LIKELIHOOD, 12)
    with pytest.raises(RuntimeError, match="treats the rows of a batch differently"):
        pb.inference.fit(
            model, pb.models.Rank1Guide(model), (unit(), torch.randint(0, 2, (12,))), epochs=1, progress=False
        )


def test_squeeze_at_one_row_is_refused_with_advice_that_works() -> None:
    """Proves for networks run by vmap and folded ones that a lost axis is never taken for another one."""

    class Mended(Squeezes):
        def forward(self, x: Tensor) -> Tensor:
            return Plain.forward(self, x.unsqueeze(1)).squeeze(1)

    data = unit(), torch.randint(0, 2, (12,))
    for kind, guide in (
        (pb.models.Dense, pb.models.MeanFieldGuide),
        (pb.models.Rank1, pb.models.Rank1Guide),
        (pb.models.Bella, pb.models.ParticleGuide),
    ):
        for members in (1, 2):
            model = kind(Squeezes(), LIKELIHOOD, 12)
            fitted = pb.inference.fit(model, guide(model, members), data, epochs=1, progress=False)
            if kind is pb.models.Dense or kind is pb.models.Bella and members == 1:
                with pytest.raises(ValueError, match=r"axis 0.*\.squeeze\(\) an axis"):
                    fitted.predict(data[0][:1])
            else:  # the draws make several rows of it
                assert fitted.predict(data[0][:1]).probs.shape == (1, 2)
            model = kind(Mended(), LIKELIHOOD, 12)
            fitted = pb.inference.fit(model, guide(model, members), data, epochs=1, progress=False)
            assert fitted.predict(data[0][:1]).probs.shape == (1, 2)


class Graph(nn.Module):
    def __init__(self, edges: Tensor | None = None) -> None:
        super().__init__()
        self.a, self.b, self.edges = nn.Linear(5, 6), nn.Linear(6, 2), edges

    def pass_on(self, x: Tensor, edges: Tensor) -> Tensor:
        return x.index_add(0, edges[1], x[edges[0]])

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        if self.edges is None:
            assert edges is not None
            return self.b(self.pass_on(self.a(x), edges).tanh())
        return self.b(self.pass_on(self.a(x[0]), self.edges).tanh())[None]


@pytest.mark.parametrize("kind", [pb.models.Dense, pb.models.Rank1, pb.models.Bella])
def test_a_graph_is_refused_in_the_words_of_the_network_and_the_advice_works(kind: Any) -> None:
    x, edges, y = torch.randn(12, 5), torch.randint(0, 12, (2, 30)), torch.randint(0, 2, (12,))
    edges[:, 0] = 11
    model = kind(Graph(), LIKELIHOOD, 12)
    guide = {
        pb.models.Dense: pb.models.MeanFieldGuide,
        pb.models.Rank1: pb.models.Rank1Guide,
        pb.models.Bella: pb.models.ParticleGuide,
    }[kind](model)
    with pytest.raises(RuntimeError, match="IndexError: .*rows belong together.*one sample") as raised:
        pb.inference.fit(model, guide, ((x, edges), y), epochs=1, progress=False)
    assert isinstance(raised.value.__cause__, IndexError)
    whole = pb.models.Dense(Graph(edges), LIKELIHOOD, 1)
    posterior = pb.inference.fit(whole, pb.models.MeanFieldGuide(whole), (x[None], y[None]), epochs=2, progress=False)
    assert posterior.predict(x[None]).probs.shape == (1, 12, 2)


def test_a_network_that_takes_no_other_values_is_quoted() -> None:
    """Proves that the rows are not blamed where the network refused every other input."""

    class Picky(Plain):
        def __init__(self, known: Tensor) -> None:
            super().__init__()
            self.known = known

        def forward(self, x: Tensor) -> Tensor:
            if not all(torch.equal(row, self.known[i % 2]) for i, row in enumerate(x)):
                raise KeyError("no such record")
            return super().forward(x)

    x = unit(2)
    data = x, torch.randint(0, 2, (2,))
    model = pb.models.Rank1(Picky(x), LIKELIHOOD, 2)
    with pytest.raises((RuntimeError, KeyError), match="no such record"):
        pb.inference.fit(model, pb.models.Rank1Guide(model, 1), data, epochs=1, progress=False)


def test_an_error_of_the_network_itself_is_left_as_it_is() -> None:
    class Broken(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise LookupError("a vocabulary is missing")

    for kind, guide in ((pb.models.Dense, pb.models.MeanFieldGuide), (pb.models.Rank1, pb.models.Rank1Guide)):
        model = kind(Broken(), LIKELIHOOD, 12)
        with pytest.raises(LookupError, match="a vocabulary is missing"):
            pb.inference.fit(model, guide(model), (unit(), torch.randint(0, 2, (12,))), epochs=1, progress=False)


def test_an_unused_bias_says_what_helps() -> None:
    class Unused(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.linear(x, self.a.weight))

    data = unit(), torch.randint(0, 2, (12,))
    model = pb.models.Rank1(Unused(), LIKELIHOOD, 12)
    with pytest.raises(ValueError, match="'a.bias' is random, but .* never used it.*member_bias=False"):
        pb.inference.fit(model, pb.models.Rank1Guide(model), data, epochs=1, progress=False)
    model = pb.models.Rank1(Unused(), LIKELIHOOD, 12, member_bias=False)
    pb.inference.fit(model, pb.models.Rank1Guide(model), data, epochs=1, progress=False)

    bella = pb.models.Bella(Unused(), LIKELIHOOD, 12, head="a")
    with pytest.raises(ValueError, match="'a.bias'.*head="):
        pb.inference.fit(bella, pb.models.ParticleGuide(bella), data, epochs=1, progress=False)
    bella = pb.models.Bella(Unused(), LIKELIHOOD, 12, head="a.weight")
    pb.inference.fit(bella, pb.models.ParticleGuide(bella), data, epochs=1, progress=False)
