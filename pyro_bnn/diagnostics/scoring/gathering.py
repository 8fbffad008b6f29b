"""Numbers of all rows, from the batches that each of several processes has scored."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bnn.distributed import processes


def all_rows(parts: list[Tensor]) -> Tensor:
    """The numbers of all batches of all processes; those of one process after those of another."""
    own = torch.cat(parts)
    together = processes()
    return torch.cat(together.gather(own.cpu())).to(own.device) if together.are_several else own
