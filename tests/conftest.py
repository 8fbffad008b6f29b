"""Every test has a parameter store of its own: Pyro's is global, and what one test leaves would train in the next.

Tests run in two processes (`-n 0` for one), which share the cores.
"""

import os
from collections.abc import Iterator

import pyro
import pytest
import torch

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True)
def _own_parameter_store() -> Iterator[None]:
    with pyro.get_param_store().scope():
        yield
