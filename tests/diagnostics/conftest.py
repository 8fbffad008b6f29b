"""Every test starts from the same random numbers: what takes no seed draws from torch's global generator."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
