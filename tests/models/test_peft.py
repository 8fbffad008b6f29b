"""Particles and the PEFT library: what is written opens there, what it writes opens here, with the same outputs."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.models import Bella, ParticleGuide, load_adapters, save_adapters


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Conv1d(6, 5, 2)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.stem(x)).tanh().flatten(2)).mean(-1))


def gpt() -> nn.Module:
    config = transformers.GPT2Config(
        **{"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "num_labels": 3},
        **{"pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    )
    return transformers.GPT2ForSequenceClassification(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **{"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3},
        **{"intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    return transformers.BertForSequenceClassification(config)


TOKENS = torch.randint(1, 17, (4, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "convolutions": (Images, IMAGES, {"select": ["stem", "mix", "head"]}),
    "a head of their own": (Images, IMAGES, {"select": ["stem"], "head": "head"}),
    "layers that store [in, out]": (gpt, TOKENS, {"select": r".*\.c_(attn|proj)"}),
    "attention and embeddings": (bert, TOKENS, {"select": ".*query|.*value|.*word_embeddings", "head": "classifier"}),
    "gains and biases": (Images, IMAGES, {"select": ["stem"], "affine": True}),
    "biases and a head": (bert, TOKENS, {"select": [".*query"], "head": "classifier", "affine": r".*Norm\.bias"}),
    "rank-stabilised": (bert, TOKENS, {"select": [r".*\.dense"], "rank_stabilised": True, "alpha": 3.0}),
}


def case(name: str, **options: Any) -> tuple[nn.Module, Any, Bella, ParticleGuide]:
    torch.manual_seed(0)
    make, x, own = CASES[name]
    net = make().eval()
    output = None if isinstance(net, Images) else "logits"
    model = Bella(net, pb.likelihoods.Categorical(), 10, output=output, **own | options)
    guide = ParticleGuide(model, particles=2, init_scale=0.5)
    for parameter in model.own_parameters():
        guide.coordinates()[parameter].normal_()
    return net, x, model, guide


def outputs(model: Bella, guide: ParticleGuide, x: Any) -> Tensor:
    return pb.Posterior(model, guide).predict(x, num_samples=1).outputs[0]


def logits(net: Any, x: Any) -> Tensor:
    with torch.no_grad():
        y = net(x)
    return y if isinstance(y, Tensor) else y.logits


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("name", CASES)
def test_a_particle_opens_in_peft(name: str, tmp_path: Path) -> None:
    net, x, model, guide = case(name)
    members = outputs(model, guide, x)
    for i, folder in enumerate(save_adapters(model, guide, tmp_path / "particles")):
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder).eval()
        torch.testing.assert_close(logits(adapted, x), members[i], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(members[i], logits(net, x), atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [2, 3])
def test_a_checkpoint_of_peft_starts_a_particle(name: str, rank: int, tmp_path: Path) -> None:
    """Also one of a lower rank and of another alpha, and of a network whose other particles stay where they are."""
    net, x, model, guide = case(name, rank=3)
    config = peft.LoraConfig(
        **{"r": rank, "lora_alpha": 5, "init_lora_weights": False, "use_rslora": rank == 3},
        target_modules=[weight.rpartition(".")[0] for weight in model.weights],
        modules_to_save=[name.rpartition(".")[0] for name in model.own_parameters()] or None,
    )
    adapted = peft.get_peft_model(copy.deepcopy(net), config).eval()
    saved = [p for n, p in adapted.named_parameters() if "modules_to_save" in n and n.endswith("bias")]
    with torch.no_grad():
        for parameter in saved:
            parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    before = outputs(model, guide, x)
    load_adapters(model, guide, [tmp_path / "adapter"])
    after = outputs(model, guide, x)
    torch.testing.assert_close(after[0], logits(adapted, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0], atol=1e-3)


def test_there_and_back(tmp_path: Path) -> None:
    """Bit for bit, and over an older set of particles."""
    _, _, model, guide = case("convolutions")
    folders = save_adapters(model, guide, tmp_path / "particles")
    folders = save_adapters(model, guide, tmp_path / "particles")
    other = ParticleGuide(model, particles=2)
    load_adapters(model, other, folders)
    assert all(torch.equal(v, other.coordinates()[n]) for n, v in guide.coordinates().items())


def test_bad_input(tmp_path: Path) -> None:
    _, _, model, guide = case("convolutions")
    folders = save_adapters(model, guide, tmp_path / "particles")
    with pytest.raises(ValueError, match="3 checkpoints for 2 particles"):
        load_adapters(model, guide, [*folders, folders[0]])
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_adapters(model, guide, [tmp_path])
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").write_text("")
    with pytest.raises(FileExistsError, match="other files"):
        save_adapters(model, guide, tmp_path / "others")
    start = {n: v.clone() for n, v in guide.coordinates().items()}
    for options, said in (
        ({"select": ["stem", "mix"]}, "head.lora_A.weight', but the model has no such factors"),
        ({"select": ["stem"], "head": "head"}, "has no 'head.weight' among its modules_to_save"),
        ({"rank": 2}, "has rank 4"),
    ):
        _, _, another, own = case("convolutions", **options)
        with pytest.raises(ValueError, match=said):
            load_adapters(another, own, folders)
    config = json.loads((folders[1] / "adapter_config.json").read_text())
    for change, said in (({"peft_type": "IA3"}, "of type 'IA3'"), ({"use_dora": True}, "use_dora=True")):
        (folders[1] / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            load_adapters(model, guide, folders)
    (folders[1] / "adapter_config.json").write_text(json.dumps(config))
    tensors = safetensors.torch.load_file(folders[1] / "adapter_model.safetensors")
    tensors["base_model.model.head.lora_A.weight"] = torch.zeros(4, 9)
    safetensors.torch.save_file(tensors, folders[1] / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="for another network"):
        load_adapters(model, guide, folders)
    (folders[1] / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        load_adapters(model, guide, folders)
    assert all(torch.equal(v, start[n]) for n, v in guide.coordinates().items()), "nothing is half loaded"


def saved_twice(tmp_path: Path) -> tuple[Bella, ParticleGuide, Path, Path]:
    """Two saves of two particles, of which the second has another alpha."""
    _, _, model, guide = case("convolutions")
    save_adapters(model, guide, tmp_path / "old")
    _, _, other, own = case("convolutions", alpha=32)
    save_adapters(other, own, tmp_path / "new")
    return model, guide, tmp_path / "old", tmp_path / "new"


def test_what_an_interrupted_save_leaves_is_refused(tmp_path: Path) -> None:
    """Proves that particles of two saves, and tensors beside the configuration of another save, are never mixed."""
    model, guide, old, new = saved_twice(tmp_path)
    start = {n: v.clone() for n, v in guide.coordinates().items()}
    apart = [old / "particle_0", new / "particle_1"]
    load_adapters(model, guide, apart)
    for name, value in start.items():
        guide.coordinates()[name].copy_(value)
    shutil.copytree(new / "particle_1", old / "particle_1", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="'particle_0' and 'particle_1' in .* come from two saves"):
        load_adapters(model, guide, [old / "particle_0", old / "particle_1"])
    shutil.copy(new / "particle_0" / "adapter_model.safetensors", old / "particle_0")
    with pytest.raises(ValueError, match=r'has .*"lora_alpha": .*was saved with .*"lora_alpha": 32'):
        load_adapters(model, guide, [old / "particle_0"])
    assert all(torch.equal(v, start[n]) for n, v in guide.coordinates().items()), "nothing is half loaded"


def test_a_flipped_bit_of_an_adapter_is_refused(tmp_path: Path) -> None:
    """Proves for bits all over the numbers that the digest finds them, and that PEFT's own files need none."""
    _, _, model, guide = case("convolutions")
    folder = save_adapters(model, guide, tmp_path / "particles")[0]
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in range(header, len(content), max(1, (len(content) - header) // 40)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            load_adapters(model, guide, [folder])
    file.write_bytes(content)
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"format": "pt"})
    load_adapters(model, guide, [folder])


def test_other_adapters_are_not_replaced(tmp_path: Path) -> None:
    _, _, model, guide = case("convolutions")
    (tmp_path / "loras" / "mine").mkdir(parents=True)
    (tmp_path / "loras" / "mine" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="other files"):
        save_adapters(model, guide, tmp_path / "loras")
    assert (tmp_path / "loras" / "mine" / "adapter_config.json").exists()


def test_a_lower_rank_leaves_no_dead_columns(tmp_path: Path) -> None:
    """Rows of A beyond the rank of the file are those of a new layer: from zeros in A and B nothing would ever move."""
    _, x, model, guide = case("convolutions", rank=2)
    folders = save_adapters(model, guide, tmp_path / "particles")
    _, _, wide, own = case("convolutions", rank=4)
    load_adapters(wide, own, folders)
    torch.testing.assert_close(outputs(wide, own, x), outputs(model, guide, x), rtol=1e-4, atol=1e-5)
    assert bool((own.coordinates()["head.weight.A"].flatten(2).norm(dim=-1) > 0).all())


def test_tied_weights_and_heads_of_another_shape(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight  # type: ignore[union-attr]
    model = Bella(net, None)
    with pytest.raises(ValueError, match="tied"):
        save_adapters(model, ParticleGuide(model), tmp_path / "particles")
    _, _, model, guide = case("a head of their own")
    folders = save_adapters(model, guide, tmp_path / "particles")
    tensors = safetensors.torch.load_file(folders[1] / "adapter_model.safetensors")
    tensors["base_model.model.head.weight"] = torch.zeros(1, 5)
    safetensors.torch.save_file(tensors, folders[1] / "adapter_model.safetensors")
    start = {n: v.clone() for n, v in guide.coordinates().items()}
    with pytest.raises(ValueError, match="for another network"):
        load_adapters(model, guide, folders)
    assert all(torch.equal(v, start[n]) for n, v in guide.coordinates().items())


def test_what_all_particles_share_must_be_the_same(tmp_path: Path) -> None:
    """PEFT saves a layer in full: statistics other than the network's are refused, and nothing is half loaded."""
    net, _, model, guide = case("gains and biases")
    folders = save_adapters(model, guide, tmp_path / "particles")
    tensors = safetensors.torch.load_file(folders[1] / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.norm.running_var"], net.norm.running_var)  # type: ignore[operator, union-attr]
    tensors["base_model.model.norm.running_var"] += 1
    safetensors.torch.save_file(tensors, folders[1] / "adapter_model.safetensors")
    start = {n: v.clone() for n, v in guide.coordinates().items()}
    with pytest.raises(ValueError, match="'norm.running_var' differs from that of the network"):
        load_adapters(model, guide, folders)
    assert all(torch.equal(v, start[n]) for n, v in guide.coordinates().items())
    _, _, model, guide = case("convolutions", select=["stem"], affine=True)
    other = save_adapters(*case("a head of their own")[2:], tmp_path / "others")
    with pytest.raises(ValueError, match="has no 'norm.weight' among its modules_to_save: leave affine= out"):
        load_adapters(model, guide, other)


def test_layers_that_peft_would_confuse(tmp_path: Path) -> None:
    """PEFT takes a layer for one to be saved in full when its name ends alike, and gains must not be tied."""

    class Confused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other_norm = nn.LayerNorm(3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.other_norm(self.norm(x))

    tied = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.LayerNorm(3))
    tied[2].weight = tied[1].weight  # type: ignore[union-attr]
    for net, said in ((Confused(), "would treat 'other_norm' as one of its modules_to_save"), (tied, "tied")):
        model = Bella(net, None, affine=True)
        with pytest.raises(ValueError, match=said):
            save_adapters(model, ParticleGuide(model), tmp_path / "particles")
        assert not (tmp_path / "particles").exists()


@pytest.mark.parametrize(
    "net",
    [
        nn.Linear(3, 2),
        nn.ConvTranspose1d(2, 3, 2),
        nn.LSTM(3, 4),
        nn.MultiheadAttention(4, 2),
        nn.Conv2d(4, 4, 3, groups=2),
    ],
)
def test_layers_that_peft_cannot_have(net: nn.Module, tmp_path: Path) -> None:
    model = Bella(net, None)
    with pytest.raises(ValueError, match="PEFT has no adapter for"):
        save_adapters(model, ParticleGuide(model), tmp_path / "particles")
    assert not (tmp_path / "particles").exists()


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_draws_of_any_posterior_of_the_model_travel(tmp_path: Path) -> None:
    """Proves that a mean field around low-rank terms, whose members are no points, is saved by its draws, in order."""
    net, x, model, _ = case("layers that store [in, out]")
    guide = pb.models.MeanFieldGuide(model, 2, init_scale=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"MeanFieldGuide has none for every member: .*as_draws\(n\)\.guide"):
        save_adapters(model, guide, tmp_path / "particles")  # type: ignore[arg-type]
    posterior = pb.Posterior(model, guide).as_draws(3, seed=0)
    expected = posterior.predict(x).outputs.flatten(0, 1)
    folders = save_adapters(model, posterior.guide, tmp_path / "particles")  # type: ignore[arg-type]
    assert len(folders) == len(expected) == 6
    for folder, member in zip(folders, expected, strict=True):
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(net), folder).eval()
        torch.testing.assert_close(logits(adapted, x), member, rtol=1e-4, atol=1e-5)


def test_what_has_no_particles_is_refused(tmp_path: Path) -> None:
    """Proves it for models without low-rank terms, and for guides of another kind or another model, in both ways."""
    _, _, model, guide = case("convolutions")
    rank1 = pb.models.Rank1(Images(), None)
    with pytest.raises(TypeError, match=r"which Rank1 does not have: .*networks\(n\)"):
        save_adapters(rank1, pb.models.Rank1Guide(rank1), tmp_path / "particles")  # type: ignore[arg-type]
    _, _, other, _ = case("convolutions", rank=2)
    with pytest.raises(ValueError, match=r"no values of the shape \(2, .*belongs to this model"):
        save_adapters(other, guide, tmp_path / "particles")
    folders = save_adapters(model, guide, tmp_path / "particles")
    with pytest.raises(TypeError, match="moves the particles of a ParticleGuide, got DrawsGuide"):
        load_adapters(model, pb.Posterior(model, guide).as_draws(1).guide, folders)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belongs to this model"):
        load_adapters(other, guide, folders)
