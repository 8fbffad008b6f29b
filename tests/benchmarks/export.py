"""Exported posteriors in ONNX Runtime beside ``predict``: ``python -m tests.benchmarks.export``.

ResNet-18 on images of 32 x 32 under rank-1, low-rank particles and mean field: bytes of the ONNX file, in times of the
bytes of one network, and the time of a prediction for one batch by ``posterior.predict``, the exported module and ONNX
Runtime, whose results agree. Rank-1 and low-rank files hold W once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor
from torch.export import Dim
from torchvision.models import resnet18

import pyro_bnn as pb
from pyro_bnn.models import Bella, Dense, MeanFieldGuide, ParticleGuide, Rank1, Rank1Guide
from tests.benchmarks.measure import interleaved, report

#: networks that a prediction averages
FUNCTIONS = 8
ROWS = 16


def posterior_of(form: str) -> tuple[pb.Posterior, int]:
    """A posterior, and the draws of each member that make :data:`FUNCTIONS` functions."""
    torch.manual_seed(0)
    net, likelihood = resnet18(num_classes=10), pb.likelihoods.Categorical()
    if form == "rank-1":
        rank1 = Rank1(net, likelihood, 50_000).eval()
        return pb.Posterior(rank1, Rank1Guide(rank1, 4).eval()), FUNCTIONS // 4
    if form == "low-rank":
        bella = Bella(net, likelihood, 50_000).eval()
        return pb.Posterior(bella, ParticleGuide(bella, FUNCTIONS, init_scale=0.01).eval()), 1
    dense = Dense(net, likelihood, 50_000).eval()
    return pb.Posterior(dense, MeanFieldGuide(dense, init_scale=1e-3).eval()), FUNCTIONS


def in_runtime(module: Any, x: Tensor, folder: Path) -> tuple[Callable[[], list[Any]], int]:
    """A prediction by ONNX Runtime with as many threads as torch has, and the bytes of the file."""
    path = folder / "posterior.onnx"
    torch.onnx.export(module, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: Dim.DYNAMIC},))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    return partial(session.run, None, {module.inputs[0]: x.numpy()}), sum(f.stat().st_size for f in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    x = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one = sum(tensor.numel() * tensor.element_size() for tensor in resnet18(num_classes=10).state_dict().values())
    rows: list[dict[str, Any]] = []
    for form in ("rank-1", "low-rank", "dense"):
        posterior, draws = posterior_of(form)
        start = time.perf_counter()
        module = posterior.export(x, draws, seed=0)
        export_seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            run, size = in_runtime(module, x, Path(folder))
            expected = posterior.predict(x, draws, seed=0).mean
            error = float((torch.as_tensor(run()[0]) - expected).abs().max())
            seconds = interleaved(
                {
                    "predict": partial(
                        lambda p, n: (q := p.predict(x, n, seed=0), q.mean, q.epistemic), posterior, draws
                    ),
                    "module": partial(module, x),
                    "onnx": run,
                },
                rounds,
                warmup=1,
            )
        rows.append(
            {
                "form": form,
                "functions": FUNCTIONS,
                "images": ROWS,
                "file_mb": size / 1e6,
                "times_one_network": size / one,
                "export_seconds": export_seconds,
                "predict_seconds": seconds["predict"],
                "module_seconds": seconds["module"],
                "onnx_seconds": seconds["onnx"],
                "largest_difference": error,
            }
        )
    report("export", rows)


if __name__ == "__main__":
    main()
