"""The two standard networks for comparing compression methods (LeCun et al. 1998, *Proc. IEEE* 86)."""

from torch import Tensor, nn


class LeNet300100(nn.Module):
    """Fully connected 784-300-100-10, 266,610 parameters: ``[N, 1, 28, 28]`` or ``[N, 784] -> [N, num_classes]``."""

    def __init__(self, num_classes: int = 10, in_features: int = 784) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_features, 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LeNet5(nn.Module):
    """The Caffe variant 20-50-500-10: ``[N, in_channels, 28, 28] -> [N, num_classes]`` logits; 431,080 parameters.

    Two 5 x 5 convolutions without padding, each followed by 2 x 2 max-pooling, then two linear layers with one ReLU
    between. This is the "LeNet-5" of the compression literature (Han et al. 2016, arXiv 1510.00149).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 20, 5),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(800, 500),
            nn.ReLU(),
            nn.Linear(500, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
