"""LeNet-5 on MNIST and Fashion-MNIST, ResNet-20 on CIFAR-10: ``python -m tests.benchmarks.images [--data fashion]``.

Each method is beside its rivals. LeNet-5 has a ReLU after each layer but the last; ResNet-20 has groups of eight
channels for its norms, and trains in bfloat16. All see the same training images, in batches of 32 and without
augmentation. The last 10,000 of them choose the settings of a method, by fits to the others, once for each network,
with the first seed, or with as many as its entry in ``METHODS`` asks: those of LeNet-5 are chosen on Fashion-MNIST, and
MNIST takes them over. The networks of an ensemble and the members of rank-1 and of BatchEnsemble are four, and each
sees all images in as many epochs as one network does, or fewer. Methods that start from a trained network start from
the same one.

Of the 10,000 test images: accuracy, NLL, Brier score, ECE and AURC; how well the entropy tells them from notMNIST and
from the other set (AUROC); cA, cNLL and cECE of the first 500, corrupted in eight ways at five severities. Beside
them what a posterior takes on disk, and the seconds of training and of predicting the test images on one core.

Trained networks are kept in ``runs/images``, and rows are written as they come: the run can be stopped and continued,
and a second process can take the other data set. A row of settings that are not the best of today's is measured again.
``python -m tests.benchmarks.tables`` shows what is there.
"""
