"""A rank-1 network of the digits, trained by a loop around Hugging Face Accelerate.

    pip install -e '.[integrations]'
    python examples/with_accelerate.py [--epochs 20] [--precision bf16]
    torchrun --nproc-per-node 2 examples/with_accelerate.py

The loop is the same on one core, on several GPUs and in mixed precision: ``pb.inference.Objective`` is the loss as a
module, which ``prepare`` takes like any other. Takes some seconds on one core.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--precision", default="no", help="of the network, such as bf16")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of one step of the optimiser")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
    )
    set_seed(options.seed, device_specific=True)  # processes have draws of their own
    task = pb.data.digits()
    loader = DataLoader(TensorDataset(task.x_train, task.y_train), batch_size=64, shuffle=True)

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), num_data=len(task.x_train))
    guide = pb.models.Rank1Guide(model, components=2)
    objective = pb.inference.Objective(model, guide, kl_annealing=len(loader) * options.epochs / 2)
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)

    # what is prepared is the objective itself on one device, and a wrapper around it on several
    prepared, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    for _ in range(options.epochs):
        for x, y in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(x, y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()

    # every process has the same posterior, and evaluates it
    posterior = accelerator.unwrap_model(prepared).posterior()
    scores = pb.diagnostics.evaluate(posterior, (task.x_test, task.y_test))
    accelerator.print(f"accuracy {scores['accuracy']:.3f}, NLL {scores['nll']:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
