"""A small network whose weights share codes, and what its distributions are, weight by weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from by_hand import chain
from pyro import poutine
from torch import Tensor

from pyro_bnn import priors
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    Codebook,
    CodebookGuide,
    WeightSharing,
)
from pyro_bnn.models.weight_sharing.shared_normal import SharedNormal

N = 60


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, torch.sin(x[:, 0])


def sharing(sampling: Any = "codebook", codes: int = 12, prior: Any = None, **options: Any) -> Any:
    model = WeightSharing(chain(2, 16, 8, 1), Gaussian(0.3), N, prior=prior or priors.Normal(0.0, 0.7))
    guide = CodebookGuide(model, codes, sampling=sampling, **{"blend": 0.1, "outliers": 0.06, "smallest": 1} | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # deviations that differ by code
        for rho in (guide.book.rho, guide.book.outlier_rho):
            rho.copy_(-2 + 0.7 * torch.randn(rho.shape, generator=generator, dtype=rho.dtype))
    return model, guide


def elements(book: Codebook, soft: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and deviations of the mixture of every weight, ``[n, 2]``, read off the codebook one by one."""
    loc, scale = book.means().detach(), book.scales().detach()
    out, mid = book.outliers.tolist(), book.between.tolist()
    rows = []
    for i, code in enumerate(book.codes().tolist()):
        if i in out:
            j = out.index(i)
            s = math.log1p(math.exp(float(book.outlier_rho[j].detach()))) + 1e-7
            rows.append((1.0, float(book.outlier_loc[j].detach()), s, 0.0, s))
        elif i in mid:
            j = mid.index(i)
            (a, b), t = book.pair[j].tolist(), float(book.alpha[j])
            m1, m2, s1, s2 = (float(v) for v in (loc[a], loc[b], scale[a], scale[b]))
            if soft:
                rows.append((t, m1, s1, m2, s2))
            else:
                s = math.hypot(t * s1, (1 - t) * s2)
                rows.append((1.0, t * m1 + (1 - t) * m2, s, 0.0, s))
        else:
            rows.append((1.0, float(loc[code]), float(scale[code]), 0.0, 1.0))
    t, m1, s1, m2, s2 = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return torch.stack([t, 1 - t], 1), torch.stack([m1, m2], 1), torch.stack([s1, s2], 1)


def distributions(guide: CodebookGuide) -> dict[str, SharedNormal]:
    return {
        name: SharedNormal(table, shape)
        for (name, shape), table in zip(guide.book.sites, guide.book.tables(guide.sampling == "mixture"), strict=True)
    }


PRIORS = {
    "normal": priors.Normal(0.1, 0.7),
    "laplace": priors.Laplace(0.0, 0.4),
    "mixture": priors.GaussianMixture([-0.3, 0.0, 0.4], [0.2, 0.05, 0.3], [1.0, 2.0, 1.0]),
}


def prior_site(model: Any, name: str) -> Any:
    x, y = data()
    return poutine.trace(model).get_trace(x, y).nodes[name]["fn"]
