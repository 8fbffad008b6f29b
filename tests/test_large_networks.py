"""Published networks x models, at their depth and width, on small inputs.

The table of docs/networks.md says of every pair here and in test_network_kinds.py whether it works or is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from network_ways import CLASSES, MODELS, Kind, whole_way, without
from torch import Tensor, nn
from torchvision.models import segmentation

import pyro_bnn as pb
from pyro_bnn.models.architectures import wide_resnet_28_10

N = 4
VOCABULARY = 20
COMPUTED = "computes its weight"


def pictures(side: int = 32, seed: int | None = None) -> Callable[[], Tensor]:
    """Of a seed where others have a unit so near the kink of a ReLU that one of two roundings puts it beyond."""
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    return lambda: torch.randn(N, 3, side, side, generator=generator)


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=CLASSES, **options)


def maxvit() -> nn.Module:
    """MaxViT-T; windows of 2 x 2 instead of 7 x 7, as 64 pixels leave 2 x 2 at the last stage."""
    return torchvision.models.MaxVit(
        input_size=(64, 64),
        stem_channels=64,
        partition_size=2,
        block_channels=[64, 128, 256, 512],
        block_layers=[2, 2, 5, 2],
        head_dim=32,
        stochastic_depth_prob=0.2,
        num_classes=CLASSES,
    )


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = pytest.importorskip("timm").create_model(name, num_classes=CLASSES, **options)
        return made

    return make


def transformer(config: str, network: str, checkpointing: bool = False, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        made: nn.Module = getattr(transformers, network)(getattr(transformers, f"{config}Config")(**options))
        if checkpointing:
            made.gradient_checkpointing_enable()
        return made.eval()

    return make


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(2, VOCABULARY, (N, 6))}


SMALL_ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {**SMALL_ENCODER, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}

wav2vec2 = transformer(
    "Wav2Vec2",
    "Wav2Vec2ForSequenceClassification",
    **SMALL_ENCODER,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    classifier_proj_size=16,
    apply_spec_augment=False,
    num_labels=CLASSES,
)


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(N, 2000)}


NETWORKS: dict[str, Kind] = {
    "resnet50": Kind(vision("resnet50"), pictures()),
    "wrn-28-10": Kind(lambda: wide_resnet_28_10(CLASSES), pictures(16, seed=1)),
    "vit-b/16": Kind(vision("vit_b_16", image_size=32), pictures()),
    "convnext-t": Kind(vision("convnext_tiny"), pictures()),
    "swin-t": Kind(vision("swin_t"), pictures()),
    "densenet121": Kind(vision("densenet121"), pictures()),
    "densenet121, memory efficient": Kind(
        vision("densenet121", memory_efficient=True),
        pictures(),
    ),
    "efficientnet-b0": Kind(vision("efficientnet_b0"), pictures()),
    "maxvit-t": Kind(maxvit, pictures(64)),
    "fcn-resnet50": Kind(
        lambda: segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES),
        pictures(),
        output="out",
    ),
    "lraspp-mobilenet-v3": Kind(
        lambda: segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES),
        pictures(),
        output="out",
    ),
    "timm regnety_002": Kind(timm("regnety_002"), pictures()),
    "timm mixer_s32": Kind(timm("mixer_s32_224", img_size=64), pictures(64)),
    "timm xcit_nano": Kind(
        timm("xcit_nano_12_p16_224", img_size=64),
        pictures(64),
        refused={"Rank1": "does not depend on the sample", "Bella": "does not depend on the sample"},
    ),
    "timm xcit_nano, without its positions": Kind(
        timm("xcit_nano_12_p16_224", img_size=64),
        pictures(64),
        select={model: without("token_projection", "temperature", "cls_token") for model in MODELS},
    ),
    "llama, language model": Kind(transformer("Llama", "LlamaForCausalLM", **LLAMA), tokens, class_dim=-1),
    "bert, checkpointing": Kind(
        transformer(
            "Bert",
            "BertForSequenceClassification",
            checkpointing=True,
            **SMALL_ENCODER,
            vocab_size=VOCABULARY,
            num_labels=CLASSES,
        ),
        tokens,
    ),
    "vit of transformers": Kind(
        transformer(
            "ViT", "ViTForImageClassification", **SMALL_ENCODER, image_size=32, patch_size=8, num_labels=CLASSES
        ),
        lambda: {"pixel_values": torch.randn(N, 3, 32, 32)},
    ),
    "clip, classifier": Kind(
        transformer(
            "CLIP",
            "CLIPForImageClassification",
            vision_config={**SMALL_ENCODER, "image_size": 32, "patch_size": 8},
            text_config=SMALL_ENCODER,
            num_labels=CLASSES,
        ),
        lambda: {"pixel_values": torch.randn(N, 3, 32, 32)},
    ),
    "wav2vec2": Kind(wav2vec2, sound, refused={"Rank1": COMPUTED, "Bella": COMPUTED}),
    "wav2vec2, without its normalised layer": Kind(
        wav2vec2,
        sound,
        select={model: without("pos_conv", "norm", "masked_spec_embed") for model in MODELS},
    ),
    "mamba, language model": Kind(
        transformer(
            "Mamba",
            "MambaForCausalLM",
            hidden_size=16,
            num_hidden_layers=3,
            state_size=4,
            vocab_size=VOCABULARY,
            pad_token_id=0,
        ),
        tokens,
        class_dim=-1,
        refused={"Rank1": "torch.Tensor.squeeze, which has no rule"},
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_published_network(name: str, model: str, tmp_path: Path) -> None:
    """Proves that the pair works, from gradients like those of plain autograd to ArviZ, or is refused as documented."""
    whole_way(NETWORKS[name], model, tmp_path, N)


@pytest.mark.slow
def test_all_weights_of_a_large_network_are_not_converted_unasked() -> None:
    """Proves that draws of 23 million weights go to ArviZ in short form, and whole only when that was asked for."""
    model = pb.models.Dense(torchvision.models.resnet50(num_classes=CLASSES), pb.likelihoods.Categorical(), N)
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model))
    short = pb.diagnostics.to_arviz(posterior, groups="posterior", num_samples=2, seed=0)
    assert sum(values.size for values in short["posterior"].data_vars.values()) < 10_000
    with pytest.raises(ValueError, match="max_values"):
        pb.diagnostics.to_arviz(posterior, groups="posterior", sites=".*weight", num_samples=2, seed=0)
