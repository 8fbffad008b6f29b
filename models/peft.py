"""Saves particles as LoRA checkpoints of the PEFT library and loads them: ``adapter_config.json`` and safetensors.

PEFT puts A on the input side and B on the output side of a layer; here A belongs to the last and B to the first
dimension of the stored weight. The two differ only for embedding tables and for layers that store ``[in, out]``.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pyro_bnn import display
from pyro_bnn.files import digest_of, replacing_folder, write_tensors
from pyro_bnn.models.bella import Bella, ParticleGuide, draw_factor
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.selection import is_linear

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys of the metadata of tensors that are written here; adapters of other libraries do not have them.
#: the same for all particles of one save
_SAVE = "pyro_bnn.save"
_DIGEST = "pyro_bnn.digest"
#: the scaling in the configuration: an interrupted save may leave the tensors beside an older configuration
_SCALING = "pyro_bnn.scaling"
#: kinds of layers whose stored weight has its input at dimension 0
_INPUT_FIRST = ("embedding", "linear, [in, out]")


def save_adapters(model: Bella, guide: ParticleGuide | DrawsGuide, path: str | os.PathLike[str]) -> list[Path]:
    """Writes particle i to the folder ``path/particle_i``, which ``peft.PeftModel.from_pretrained(net, ...)`` opens.

    Heads and normalisation layers that belong to each particle are saved as PEFT's ``modules_to_save``.

    :param guide: the guide of the particles, ``posterior.guide``; or stored draws of any posterior of this model,
        ``posterior.as_draws(n).guide``, whose draws become particles: draw i of member k is particle
        ``i num_members + k``.
    :return: the folders of the particles, in order.
    :raises TypeError: for another model than Bella, and for a guide whose members are not points.
    :raises ValueError: for weights of a kind for which PEFT has no adapter, or a guide of another model.
    :raises FileExistsError: when ``path`` exists and contains anything except such folders.
    """
    path, points = Path(path), _points(model, guide)
    names = [f"particle_{i}" for i in range(len(next(iter(points.values()))))]
    kinds = {weight: _kind(model, weight) for weight in model.weights}
    for parameter in model.own_parameters():
        _require_own_layer(model, parameter)
    _require_distinct_ends(model, [weight.rpartition(".")[0] for weight in kinds])
    if path.exists() and not all(re.fullmatch(r"particle_\d+", child.name) for child in path.iterdir()):
        raise FileExistsError(f"{path} exists and holds other files; choose another path or remove it")
    values = {name: value.cpu() for name, value in points.items()}
    save = uuid.uuid4().hex
    with replacing_folder(path, last=_CONFIG) as temporary:
        for i, name in enumerate(names):
            tensors: dict[str, Tensor] = {}
            for weight, kind in kinds.items():
                a, b = (values[model.site(f"{weight}.{factor}")][i] for factor in "AB")
                keys = _keys(weight.rpartition(".")[0], kind)
                tensors |= {k: t.contiguous() for k, t in zip(keys, _to_peft(a, b, kind), strict=True)}
            own = {parameter: values[model.site(parameter)][i] for parameter in model.own_parameters()}
            for parameter, value in (_given(model) | own).items():
                tensors[_PREFIX + parameter] = value.cpu().clone(memory_format=torch.contiguous_format)
            (temporary / name).mkdir()
            config = _config(model, kinds)
            seal = {_SAVE: save, _DIGEST: digest_of(tensors), _SCALING: _scaling(config)}
            write_tensors(temporary / name / _TENSORS, tensors, {"format": "pt"} | seal)
            (temporary / name / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for stale in path.glob("particle_*"):
        if stale.name not in names:
            for file in (_CONFIG, _TENSORS):
                (stale / file).unlink(missing_ok=True)
            if not any(stale.iterdir()):
                stale.rmdir()
    return [path / name for name in names]


def load_adapters(model: Bella, guide: ParticleGuide, paths: list[str | os.PathLike[str]] | list[Path]) -> None:
    """Sets particles to LoRA checkpoints: particle i to the adapter in the folder ``paths[i]``.

    A checkpoint may have a lower rank than the model, and another alpha: B is rescaled accordingly.

    :raises TypeError: for another model than Bella, or another guide than particles.
    :raises ValueError: for more checkpoints than particles, a checkpoint that is damaged or not LoRA, one whose layers
        differ from those of the model, or particles of two saves in one folder, which an interrupted save can leave.
    :raises FileNotFoundError: when a folder has no checkpoint.
    """
    if not isinstance(guide, ParticleGuide):
        raise TypeError(f"load_adapters moves the particles of a ParticleGuide, got {display.name_of(guide)}")
    _points(model, guide)  # refuses another model
    if len(paths) > guide.num_members:
        raise ValueError(
            f"expected at most one checkpoint for each particle, got {len(paths)} checkpoints for {guide.num_members} "
            "particles: give fewer paths, or build the guide with more particles"
        )
    found = [_read(model, Path(path)) for path in paths]  # all of them, before any particle moves
    _require_one_save([Path(path) for path in paths])
    values = guide.coordinates()
    for i, particle in enumerate(found):
        for name, value in particle.items():
            values[model.site(name)][i].copy_(value)


def _points(model: object, guide: object) -> dict[str, Tensor]:
    """``{site: [particles, *event]}``.

    :raises TypeError: for a model or guide that has none.
    :raises ValueError: when the guide is not of this model.
    """
    if not isinstance(model, Bella):
        raise TypeError(
            f"an adapter of PEFT is a low-rank term beside a frozen weight, which {display.name_of(model)} does not "
            "have: give a pyro_bnn.models.Bella, or save plain networks, posterior.networks(n)"
        )
    if isinstance(guide, DrawsGuide):
        points = {name: value.flatten(0, 1) for name, value in guide.draws().items()}
    elif isinstance(guide, MixtureGuide) and guide.is_deterministic:
        points = guide.coordinates()
    else:
        raise TypeError(
            f"an adapter of PEFT is a point, and {display.name_of(guide)} has none for every member: give a "
            "ParticleGuide, or n draws of a posterior of this model, posterior.as_draws(n).guide"
        )
    for site in model.sites():
        if site.name not in points or points[site.name].shape[1:] != site.shape:
            raise ValueError(
                f"the guide has no values of the shape {tuple(site.shape)} for {site.name!r}: give the guide that "
                "belongs to this model"
            )
    return points


def _require_one_save(paths: list[Path]) -> None:
    """
    :raises ValueError: when adapters in one folder come from different saves.
    """
    saves: dict[Path, dict[str, Path]] = {}
    for path in paths:
        if (save := _metadata(path).get(_SAVE)) is not None:
            saves.setdefault(path.resolve().parent, {}).setdefault(save, path)
    for folder, of in saves.items():
        if len(of) > 1:
            old, new, *_ = sorted(path.name for path in of.values())
            raise ValueError(
                f"{old!r} and {new!r} in {str(folder)!r} come from two saves, the later of which was interrupted: save "
                "the particles again. To combine particles of two saves, move them to separate folders"
            )


def _kind(model: Bella, weight: str) -> str:
    """The kind of layer that determines how PEFT arranges the factors of this weight."""
    owner = model.core().owner(weight)
    _require_own_layer(model, weight)
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and owner.groups == 1:
        return "convolution"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    inside_attention = isinstance(owner, NonDynamicallyQuantizableLinear)  # whose forward is never called
    if is_linear(owner) and not inside_attention:
        return "linear" if isinstance(owner, nn.Linear) else "linear, [in, out]"
    raise ValueError(
        f"PEFT has no adapter for {weight!r} of a {type(owner).__name__}: leave it out with select=, or save the "
        "posterior with posterior.save()"
    )


def _require_own_layer(model: Bella, name: str) -> None:
    """Requires that a parameter belongs to a single layer, because PEFT saves whole layers."""
    parameter = model.core().parameters_by_name()[name]
    tied = sum(p is parameter for _, p in model.core().net.named_parameters(remove_duplicate=False)) > 1
    if tied or "." not in name:
        what = "is tied to another" if tied else "belongs to the network itself and to no layer of it"
        raise ValueError(
            f"PEFT has no adapter for {name!r}, which {what}: leave it out with select= or affine=, or save the "
            "posterior with posterior.save()"
        )


def _saved_modules(model: Bella) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in model.own_parameters()))


def _given(model: Bella) -> dict[str, Tensor]:
    """All tensors, statistics included, of the layers that PEFT saves in full, with the values of the given network."""
    layers = {module: model.core().net.get_submodule(module) for module in _saved_modules(model)}
    return {f"{module}.{name}": v for module, layer in layers.items() for name, v in layer.state_dict().items()}


def _require_distinct_ends(model: Bella, adapted: list[str]) -> None:
    """PEFT matches ``modules_to_save`` by the ends of names, and so might also replace an adapted layer."""
    ends = tuple(_saved_modules(model))
    for name in adapted:
        parts = name.split(".")
        if any(".".join(parts[: i + 1]).endswith(ends) for i in range(len(parts))):
            raise ValueError(
                f"PEFT matches the ends of names and would treat {name!r} as one of its modules_to_save "
                f"({', '.join(ends)}): leave one of them out with select= or affine=, or save the posterior with "
                "posterior.save()"
            )


def _keys(module: str, kind: str) -> list[str]:
    """The names of A and B in PEFT's file."""
    names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    return [f"{_PREFIX}{module}.{name}" for name in names]


def _to_peft(a: Tensor, b: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "convolution":
        return a, b.reshape(b.shape + (1,) * (a.dim() - 2))
    return (b.t(), a.t()) if kind in _INPUT_FIRST else (a, b)


def _from_peft(a: Tensor, b: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "convolution":
        return a, b.flatten(1)
    return (b.t(), a.t()) if kind in _INPUT_FIRST else (a, b)


def _config(model: Bella, kinds: dict[str, str]) -> dict[str, object]:
    alpha = int(model.alpha) if model.alpha == int(model.alpha) else model.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": model.rank,
        "lora_alpha": alpha,
        "use_rslora": model.rank_stabilised,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": "linear, [in, out]" in kinds.values(),
        "target_modules": _targets(model, [weight.rpartition(".")[0] for weight in kinds]),
        "modules_to_save": _saved_modules(model) or None,
    }


def _targets(model: Bella, modules: list[str]) -> list[str] | str:
    """The names; or an exact pattern if a name is also the end of another module's name, which PEFT would adapt too."""
    others = [name for name, _ in model.core().net.named_modules() if name not in modules]
    if any(name.endswith(f".{module}") for name in others for module in modules):
        return "|".join(map(re.escape, sorted(modules)))
    return sorted(modules)


def _scaling(config: Mapping[str, object]) -> str:
    return json.dumps({name: config.get(name) for name in ("r", "lora_alpha", "use_rslora")})


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path / _TENSORS, "pt") as opened:
        return dict(opened.metadata() or {})


def _read(model: Bella, path: Path) -> dict[str, Tensor]:
    """``{weight.A: ..., weight.B: ..., own parameter: ...}`` of one checkpoint."""
    if not (path / _CONFIG).is_file():
        raise FileNotFoundError(f"{path} is not an adapter: it has no {_CONFIG}")
    try:
        config = json.loads((path / _CONFIG).read_text())
        tensors, metadata = safetensors.torch.load_file(path / _TENSORS), _metadata(path)
    except (ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"the adapter in {path} is damaged or has no {_TENSORS} ({error})") from None
    if metadata.get(_DIGEST) not in (None, digest_of(tensors)):
        raise ValueError(
            f"{path / _TENSORS} is damaged: its digest does not match its tensors. Save the particles again"
        )
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} holds an adapter of type {config.get('peft_type')!r}; expected 'LORA'")
    for option in ("use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(option):
            raise ValueError(f"{path} was made with {option}={config[option]!r}, which particles do not have")
    if not {"r", "lora_alpha"} <= set(config):
        raise ValueError(f"{path / _CONFIG} has no r or no lora_alpha")
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda")):
        raise ValueError(f"{path} belongs to a base network that {config['init_lora_weights']} has changed")
    if metadata.get(_SCALING) not in (None, _scaling(config)):
        raise ValueError(
            f"{path / _CONFIG} has {_scaling(config)}, but {_TENSORS} was saved with {metadata[_SCALING]}: one of them "
            "comes from another save. Save the particles again"
        )
    rank = int(config["r"])
    if rank > model.rank:
        raise ValueError(
            f"{path} has rank {rank}, more than the model's rank={model.rank}: build Bella with rank={rank} or more"
        )
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    found: dict[str, Tensor] = {}
    left = dict(tensors)
    for weight in model.weights:
        module, kind = weight.rpartition(".")[0], _kind(model, weight)
        keys = _keys(module, kind)
        if any(key not in left for key in keys):
            raise ValueError(f"{path} has no adapter for {module!r}: leave the layer out with select=")
        first, second = (left.pop(key) for key in keys)
        if first.shape[0] != rank:
            raise ValueError(f"{path} says rank {rank}, but the factors of {module!r} have rank {first.shape[0]}")
        a, b = _from_peft(first, second * (scale / model.scale), kind)
        for factor, value in (("A", a), ("B", b)):
            found[f"{weight}.{factor}"] = _padded(value, model._likes[f"{weight}.{factor}"], factor, path)
    for parameter in model.own_parameters():
        if _PREFIX + parameter not in left:
            option = "head=" if parameter in model.head_parameters else "affine="
            raise ValueError(f"{path} has no {parameter!r} among its modules_to_save: leave {option} out")
        found[parameter] = left.pop(_PREFIX + parameter)
        _require_shape(found[parameter], model._likes[parameter], path)
    _require_as_given(model, left, path)
    if left:
        raise ValueError(
            f"{path} has an adapter for {next(iter(left))!r}, but the model has no such factors: build it with select="
        )
    return found


def _require_as_given(model: Bella, left: dict[str, Tensor], path: Path) -> None:
    """Removes the tensors that PEFT saves besides a particle's own parameters, after checking their shared values."""
    for name, value in _given(model).items():
        theirs = left.pop(_PREFIX + name, None)
        if theirs is not None and not torch.equal(theirs.to(value.dtype), value.cpu()):
            raise ValueError(
                f"{path}: {name!r} differs from that of the network, which all particles share: give the network with "
                "which the adapter was saved"
            )


def _padded(value: Tensor, like: Tensor, factor: str, path: Path) -> Tensor:
    """Pads a factor to the rank of the model: rows of A as in a new layer, columns of B with zeros."""
    axis = {"A": 0, "B": 1}[factor]
    shape = list(value.shape)
    shape[axis] = like.shape[axis] - shape[axis]
    value = torch.cat([value, draw_factor(f".{factor}", value.new_empty(shape))], axis)
    _require_shape(value, like, path)
    return value


def _require_shape(value: Tensor, like: Tensor, path: Path) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{path} is for another network: a tensor has shape {tuple(value.shape)}, not {like.shape}")
