"""Every test has a parameter store of its own, since Pyro's is global and what one test leaves would train in the next,
and starts from the same random state, whatever ran before it.

Tests run in two processes (`-n 0` for one), which share the cores.
"""

import os
from collections.abc import Iterator

import pyro
import pytest
import torch

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: autograd does not work in a fork of a process in which it has started threads."""
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "killed"))


@pytest.fixture(autouse=True)
def _own_world() -> Iterator[None]:
    torch.manual_seed(0)
    with pyro.get_param_store().scope():
        yield
