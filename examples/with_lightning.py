"""A rank-1 network of the digits, trained by PyTorch Lightning.

    pip install -e '.[integrations]'
    python examples/with_lightning.py [--epochs 20] [--precision bf16-mixed]

``pb.inference.Objective`` is the loss as a module, so a ``LightningModule`` has it as its only part. Checkpoints of the
trainer hold its parameters and the step of the KL annealing. Takes some seconds on one core.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb


class Bayesian(lightning.LightningModule):
    """Any objective, with Adam."""

    def __init__(self, objective: pb.inference.Objective, lr: float = 5e-3) -> None:
        super().__init__()
        self.objective, self.lr = objective, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss: Tensor = self.objective(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("held out", self.objective(*batch), prog_bar=True)  # in eval mode: the KL divergence in full

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.objective.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--precision", default="32-true", help="of the network, such as bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    lightning.seed_everything(options.seed)
    task = pb.data.digits()
    loader = DataLoader(TensorDataset(task.x_train, task.y_train), batch_size=64, shuffle=True)
    held_out = DataLoader(TensorDataset(task.x_test, task.y_test), batch_size=540)

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), num_data=len(task.x_train))
    guide = pb.models.Rank1Guide(model, components=2)
    objective = pb.inference.Objective(model, guide, kl_annealing=len(loader) * options.epochs / 2)

    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        precision=options.precision,
        gradient_clip_val=10.0,
        check_val_every_n_epoch=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(Bayesian(objective), loader, held_out)

    posterior = objective.posterior()
    scores = pb.diagnostics.evaluate(posterior, (task.x_test, task.y_test))
    print(f"accuracy {scores['accuracy']:.3f}, NLL {scores['nll']:.3f}")


if __name__ == "__main__":
    main()
