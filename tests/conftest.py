"""Every test has a parameter store of its own: Pyro's is global, and what one test leaves would train in the next."""

from collections.abc import Iterator

import pyro
import pytest


@pytest.fixture(autouse=True)
def _own_parameter_store() -> Iterator[None]:
    with pyro.get_param_store().scope():
        yield
