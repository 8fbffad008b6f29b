"""Serves a posterior over HTTP: trains one, exports it to one module without Pyro, and answers with its predictions.

    pip install 'pyro-bnn[integrations]'
    uvicorn serve:app                                    # in this folder
    curl localhost:8000/predict -H 'content-type: application/json' -d '{"rows": [[0.5], [3.0]]}'

The exported module is a plain function of tensors, so that the threads of the server run it side by side;
``posterior.predict`` would let them take turns. FastAPI runs a ``def`` endpoint in a pool of threads.
"""

from __future__ import annotations

from typing import Annotated

import torch
from fastapi import Body, FastAPI, HTTPException
from torch import nn

import pyro_bnn as pb

#: rows of x in the units of training, as the field "rows" of a request
Rows = Annotated[list[list[float]], Body(embed=True)]


def trained(epochs: int = 50) -> pb.Posterior:
    """A posterior of y = sin(3 x) + N(0, 0.1^2), of x in [-2, 2]."""
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 200)[:, None]
    y = (3 * x).sin() + 0.1 * torch.randn_like(x)
    net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    model = pb.models.Rank1(net, pb.likelihoods.Gaussian(), len(x))
    guide = pb.models.Rank1Guide(model, components=4)
    return pb.inference.fit(model, guide, (x, y), epochs=epochs, batch_size=50, lr=1e-2, seed=0, progress=False)


def server_of(posterior: pb.Posterior, width: int) -> FastAPI:
    """An application that predicts with one exported module.

    :param width: numbers in a row of x.
    """
    module = posterior.export(torch.zeros(16, width), outputs=("mean", "std", "epistemic"), seed=0)
    app = FastAPI(title="A posterior")

    @app.post("/predict")
    def predict(rows: Rows) -> dict[str, list[float]]:
        """Of each row: the mean, the standard deviation of y, and the part of it that is doubt about the weights."""
        if not rows or any(len(row) != width for row in rows):
            raise HTTPException(422, f"expected at least one row, each of {width} numbers")
        with torch.inference_mode():
            found = module(torch.tensor(rows))
        values = {"mean": found["mean"], "std": found["std"], "epistemic_std": found["epistemic"].sqrt()}
        return {name: value.flatten().tolist() for name, value in values.items()}

    return app


def __getattr__(name: str) -> FastAPI:
    """``uvicorn serve:app`` trains when it asks for the application, and an import does not."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return server_of(trained(), width=1)
