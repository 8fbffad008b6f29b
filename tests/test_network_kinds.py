"""Kinds of networks x models: gradients of plain autograd on explicit weights, a step, predictions, files, ArviZ.

Every pair works, or is refused for a reason that docs/networks.md lists.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchvision.models.convnext import CNBlockConfig

import pyro_bnn as pb

N, CLASSES = 6, 3
RELATIVE = 1e-5  # of float32, whose sums are of some hundred terms

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Dense": (pb.models.Dense, pb.models.MeanFieldGuide, {}),
    "Rank1": (pb.models.Rank1, pb.models.Rank1Guide, {"components": 2}),
    "WeightSharing": (pb.models.WeightSharing, pb.models.CodebookGuide, {"codes": 8}),
    "SpikeSlab": (pb.models.SpikeSlab, pb.models.MeanFieldGuide, {}),
    "Bella": (pb.models.Bella, pb.models.ParticleGuide, {"particles": 2}),
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x)).relu()
        return self.fc((h + self.b(self.a(h))).relu().mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.fc = kind(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.fc(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, CLASSES)
        self.core = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.fc(self.core(h, h).mean(1))


class SharedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).tanh()).tanh())


def partly_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    net[2].requires_grad_(False)
    return net


def spectral() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, CLASSES)
    )


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES)))


def pictures(side: int = 8) -> Tensor:
    return torch.randn(N, 3, side, side)


def vectors() -> Tensor:
    return torch.randn(N, 4)


def sequences() -> Tensor:
    return torch.randn(N, 5, 4)


def words() -> Tensor:
    return torch.randint(1, 9, (N, 5))


def config(name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{name}Config")(vocab_size=20, num_labels=CLASSES, pad_token_id=0, **options)


def language(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, f"{name}ForSequenceClassification")(config(name, **options))
        return made.eval()

    return make


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(2, 20, (N, 6))
    ids[:, -1] = 1
    return {"input_ids": ids}


Kind = tuple[Callable[[], nn.Module], Callable[[], Any]]
SMALL: dict[str, Kind] = {
    "residual": (Residual, pictures),
    "convnext": (
        lambda: torchvision.models.ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=CLASSES),
        lambda: pictures(16),
    ),
    "vit": (
        lambda: torchvision.models.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=CLASSES),
        pictures,
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), sequences),
    "gru on packed sequences": (Packed, lambda: (sequences(), torch.tensor([5, 2, 4, 1, 3, 5]))),
    "transformer": (Attends, words),
    "shared layers": (SharedLayers, vectors),
    "frozen parts": (partly_frozen, vectors),
    "spectral norm": (spectral, vectors),
    "weight norm": (weight_normed, vectors),
    "segmentation": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)),
        pictures,
    ),
}
LARGE: dict[str, Kind] = {
    "densenet": (
        lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=CLASSES),
        lambda: pictures(32),
    ),
    "bert": (
        language("Bert", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        tokens,
    ),
    "gpt2": (language("GPT2", n_embd=8, n_layer=1, n_head=2, n_positions=16), tokens),
    "llama": (
        language(
            "Llama",
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
        ),
        tokens,
    ),
    "t5": (
        language("T5", d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, eos_token_id=1, decoder_start_token_id=0),
        tokens,
    ),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=CLASSES), lambda: pictures(32)),
}

#: pairs that are refused, by what the message says
REFUSED = {
    ("spectral norm", "Dense"): "spectral_norm",
    ("spectral norm", "SpikeSlab"): "spectral_norm",
    ("spectral norm", "WeightSharing"): "spectral_norm",
    ("spectral norm", "Rank1"): "computes its weight",
    ("spectral norm", "Bella"): "computes its weight",
    ("weight norm", "Rank1"): "computes its weight",
    ("weight norm", "Bella"): "computes its weight",
}

#: what messages advise for weights that meet no sample: the table of distances of T5 is the same for all rows
SELECT = {("t5", "Rank1"): lambda name, p: p.dim() > 1 and "relative_attention_bias" not in name}


def close(own: Tensor, expected: Tensor) -> bool:
    return bool((own - expected).abs().max() <= RELATIVE * expected.abs().max().clamp_min(1e-3) * 10)


def whole_way(name: str, model_name: str, kind: Kind, tmp_path: Path) -> None:
    make, inputs = kind
    cls, guide_class, options = MODELS[model_name]
    net, x = make(), inputs()
    likelihood = pb.likelihoods.Categorical(class_dim=1)
    if (name, model_name) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, model_name]):
            cls(net, likelihood, N)
        return
    model = cls(net, likelihood, N, select=SELECT.get((name, model_name)))
    guide = guide_class(model, **options)

    # gradients, by plain autograd on the weights that a draw stands for
    posterior = pb.Posterior(model.eval(), guide.eval())
    latents = {n: v[0, 0].detach().requires_grad_() for n, v in posterior.draws(1, seed=0).items()}
    f = model.function(x, {n: v[None, None] for n, v in latents.items()}, N)[0]
    y = torch.randint(0, CLASSES, (N,) + f.shape[2:])
    weights = model.core().held(model.weights_of(latents))
    plain = pb.Posterior(model, guide).networks(1, seed=0)[0]
    args = x if isinstance(x, tuple) else () if isinstance(x, dict) else (x,)
    out = functional_call(plain, weights, args, x if isinstance(x, dict) else {})
    expected = out if isinstance(out, Tensor) else out.logits
    assert close(f.detach(), expected.detach()), "outputs"
    used = list(latents.values())
    own = torch.autograd.grad(F.cross_entropy(f, y), used, allow_unused=True)
    reference = torch.autograd.grad(F.cross_entropy(expected, y), used, allow_unused=True)
    largest = max(float(g.abs().max()) for g in reference if g is not None)
    for site, a, b in zip(latents, own, reference, strict=True):
        a, b = (torch.zeros_like(latents[site]) if g is None else g for g in (a, b))
        assert float((a - b).abs().max()) <= RELATIVE * largest * 10, site

    # the whole way of a user
    fitted = pb.inference.fit(model, guide, (x, y), epochs=1, batch_size=3, progress=False, seed=0)
    predicted = fitted.predict(x, num_samples=2, seed=0)
    assert torch.isfinite(predicted.outputs).all()
    fitted.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", make())
    assert torch.equal(loaded.predict(x, num_samples=2, seed=0).outputs, predicted.outputs)
    data = pb.diagnostics.to_arviz(fitted, x, y, num_samples=4, seed=0)
    assert data["log_likelihood"]["obs"].shape[-1] == N


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SMALL)
def test_small_network(name: str, model: str, tmp_path: Path) -> None:
    whole_way(name, model, SMALL[name], tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LARGE)
def test_larger_network(name: str, model: str, tmp_path: Path) -> None:
    whole_way(name, model, LARGE[name], tmp_path)
