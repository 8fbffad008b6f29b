"""What a network and its guide say of themselves: outputs of a program that observes them, and blocks."""

from __future__ import annotations

import pickle

import pytest
import torch
from by_hand import chain
from pyro import poutine

import pyro_bnn as pb
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import Dense, Rank1, Rank1Guide
from pyro_bnn.program.guide import MixtureGuide


def test_outputs_are_recorded_inside_and_not_after() -> None:
    """Proves that they are what the likelihood got, call by call, with their gradients."""
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    model = Dense(chain(2, 3, 1), Gaussian(0.5), 5)
    guide = MixtureGuide(model, 3, family="point")
    with model.recording_outputs() as outputs:
        for size in (5, 2):
            draw = poutine.trace(guide).get_trace(x[:size])
            trace = poutine.trace(poutine.replay(model, trace=draw)).get_trace(x[:size], y[:size])
            f = outputs[-1]
            assert f.shape == (3, size, 1)
            assert torch.equal(trace.nodes["obs"]["fn"].mean.reshape(f.shape), f)
        assert len(outputs) == 2
    outputs[0].sum().backward()
    assert all(p.grad is not None for p in guide.parameters() if p.numel())
    model(x, y)
    assert len(outputs) == 2


def test_a_model_that_records_can_be_pickled_and_stops_after_an_error() -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    model = Dense(chain(2, 1), None)
    with pytest.raises(ZeroDivisionError), model.recording_outputs() as outputs:
        model(x)
        copy = pickle.loads(pickle.dumps(model))
        copy(x)
        raise ZeroDivisionError
    model(x)
    assert len(outputs) == 1


def test_the_blocks_of_a_guide_hold_the_coordinates_of_all_sites() -> None:
    model = Rank1(chain(2, 3, 1), Gaussian(), 7, prior=pb.priors.HierarchicalNormal(2.5, 0.4))
    guide = Rank1Guide(model, 2)
    found = {}
    for block in guide.blocks():
        widths = [site.shape.numel() for site in block.sites]
        assert block.parameter.shape == (2, sum(widths))
        for site, part in zip(block.sites, block.parameter.split(widths, 1), strict=True):
            found[site.name] = block.kind, part.reshape(2, *site.shape)
    coordinates = guide.coordinates()
    assert found.keys() == coordinates.keys() == {site.name for site in model.sites()}
    for name, (kind, value) in found.items():
        assert torch.equal(value, coordinates[name])
        role = next(site.role for site in model.sites() if site.name == name)
        assert (
            kind
            == {"weight": "loc", "factor": "loc", "scale": "scale_loc", "share": "share_loc", "bias": "point"}[role]
        )
