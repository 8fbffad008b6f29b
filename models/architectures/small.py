"""Networks that train in seconds on a CPU."""

from collections.abc import Sequence

from torch import Tensor, nn


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Fully connected ReLU network: ``[N, ...]`` with ``in_features`` elements per row ``-> [N, out_features]``.

    :param hidden: widths of the hidden layers.
    """
    widths = [in_features, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, next_width in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out_features))


def digits_cnn(out_features: int = 10, in_channels: int = 1, width: int = 32) -> nn.Sequential:
    """Three 3 x 3 convolutions with batch normalisation: ``[N, in_channels, H, W] -> [N, out_features]``.

    Designed for the 8 x 8 digits; it accepts any image of at least 4 x 4 pixels, because the last feature maps are
    averaged to 2 x 2.
    """

    def conv(in_channels: int, out_channels: int) -> list[nn.Module]:
        layer = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return [layer, nn.BatchNorm2d(out_channels), nn.ReLU()]

    return nn.Sequential(
        *conv(in_channels, width),
        *conv(width, width),
        nn.MaxPool2d(2),
        *conv(width, 2 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, out_features),
    )


class LSTMClassifier(nn.Module):
    """An LSTM and a linear layer on the last hidden state of each direction: ``[N, T, in] -> [N, num_classes]``."""

    def __init__(
        self, in_features: int, hidden: int, num_classes: int, num_layers: int = 1, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_features, hidden, num_layers, batch_first=True, bidirectional=bidirectional)
        self.classifier = nn.Linear(hidden * (2 if bidirectional else 1), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        directions = 2 if self.lstm.bidirectional else 1
        return self.classifier(hidden[-directions:].transpose(0, 1).flatten(1))
