"""Networks that torchvision lacks: plain, deterministic ``torch.nn.Module`` classes."""

from pyro_bnn.models.architectures.lenet import LeNet5, LeNet300100
from pyro_bnn.models.architectures.resnet import resnet18
from pyro_bnn.models.architectures.small import LSTMClassifier, digits_cnn, mlp
from pyro_bnn.models.architectures.wide_resnet import WideResNet, wide_resnet_28_10

__all__ = [
    "LSTMClassifier",
    "LeNet5",
    "LeNet300100",
    "WideResNet",
    "digits_cnn",
    "mlp",
    "resnet18",
    "wide_resnet_28_10",
]
