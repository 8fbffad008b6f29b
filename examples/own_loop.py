"""A loop of one's own: a rank-1 network of the digits, trained by a few lines of torch.

    python examples/own_loop.py [--epochs 20]

The loss is a module, ``pb.inference.Objective``: the negative ELBO in nats per datum. Everything around it is as for
any other module: optimiser, schedule, clipping, a loss of held-out rows. Takes some seconds on one core.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    task = pb.data.digits()
    loader = DataLoader(TensorDataset(task.x_train, task.y_train), batch_size=64, shuffle=True)

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), num_data=len(task.x_train))
    guide = pb.models.Rank1Guide(model, components=2)

    losses = len(loader) * options.epochs
    objective = pb.inference.Objective(model, guide, kl_annealing=losses / 2)  # counted in losses
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3, weight_decay=0.0)  # the weights have a prior
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, losses)

    for epoch in range(options.epochs):
        objective.train()
        for x, y in loader:
            optimizer.zero_grad()
            objective(x, y).backward()
            nn.utils.clip_grad_norm_(objective.parameters(), 10.0)
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 10 == 0:
            objective.eval()  # the KL divergence in full, and no step of its annealing
            with torch.no_grad():
                held_out = objective(task.x_test, task.y_test)
            print(f"epoch {epoch + 1}: {held_out:.3f} nats per datum on held-out rows")

    posterior = objective.posterior()
    scores = pb.diagnostics.evaluate(posterior, (task.x_test, task.y_test))
    print(f"accuracy {scores['accuracy']:.3f}, NLL {scores['nll']:.3f}")


if __name__ == "__main__":
    main()
