"""A rank-1 network of the digits, trained by several processes with ``DistributedDataParallel``.

    torchrun --nproc-per-node 2 examples/with_ddp.py [--epochs 20]

Each process has its part of the rows and draws of its own, and the mean of their gradients is that of the whole batch:
by NCCL with one GPU for each process, otherwise by gloo on the CPU. Takes some seconds on two cores.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_bnn as pb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    local = int(os.environ["LOCAL_RANK"])  # set by torchrun
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank = torch.distributed.get_rank()

    torch.manual_seed(options.seed + rank)  # processes have draws of their own
    task = pb.data.digits()
    rows = TensorDataset(task.x_train, task.y_train)
    sampler = DistributedSampler(rows, seed=options.seed)
    loader = DataLoader(rows, batch_size=32, sampler=sampler)

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), num_data=len(rows))  # all rows, not those of a process
    guide = pb.models.Rank1Guide(model, components=2)
    objective = pb.inference.Objective(model, guide, kl_annealing=len(loader) * options.epochs / 2).to(device)
    parallel = DistributedDataParallel(objective, find_unused_parameters=False)  # starts from the weights of rank 0
    optimizer = torch.optim.Adam(parallel.parameters(), lr=5e-3)

    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            parallel(x.to(device), y.to(device)).backward()
            optimizer.step()

    # every process has the same posterior, and evaluates it
    posterior = objective.posterior()
    scores = pb.diagnostics.evaluate(posterior, (task.x_test, task.y_test))
    if rank == 0:
        print(f"accuracy {scores['accuracy']:.3f}, NLL {scores['nll']:.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
