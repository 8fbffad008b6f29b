"""How layers are named: one way for every keyword, names before patterns, and errors that suggest what was meant."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Bella, CodebookGuide, Dense, Rank1, SpikeSlab, WeightSharing
from pyro_bnn.priors import Laplace, Normal
from pyro_bnn.priors.choice import resolve
from pyro_bnn.selection import pattern_matches, select_parameters


class Mixed(nn.Module):
    """One module of each kind, and a parameter of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4, 4))


WEIGHTS = [
    *("features.0.weight", "features.3.weight", "attention.in_proj_weight", "attention.out_proj.weight"),
    *("recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "embed.weight", "head.weight"),
]
NET = Mixed()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in net.named_parameters() if name in WEIGHTS}


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("head.weight", ["head.weight"]),
        ("head", ["head.weight"]),
        ("features", ["features.0.weight", "features.3.weight"]),
        ("features.3", ["features.3.weight"]),
        (r"features\..*", ["features.0.weight", "features.3.weight"]),
        (r"feat\w+", ["features.0.weight", "features.3.weight"]),
        (r"features\.\d", ["features.0.weight", "features.3.weight"]),
        (r".*_l0", ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"]),
        (r".*proj", ["attention.out_proj.weight"]),
        (nn.Conv2d, ["features.0.weight", "features.3.weight"]),
        (nn.modules.conv._ConvNd, ["features.0.weight", "features.3.weight"]),
        (nn.MultiheadAttention, ["attention.in_proj_weight", "attention.out_proj.weight"]),
        (nn.Linear, ["attention.out_proj.weight", "head.weight"]),
        ("all-linear", ["attention.out_proj.weight", "head.weight"]),
        (NET.features, ["features.0.weight", "features.3.weight"]),
        (NET.features[3], ["features.3.weight"]),
        (NET, WEIGHTS),
        (lambda name, p: p.shape[0] == 3, ["head.weight"]),
        (lambda name, p: name.startswith("embed"), ["embed.weight"]),
        ([nn.Embedding, "head.weight"], ["embed.weight", "head.weight"]),
        ([NET.head, NET.embed, "features.0"], ["features.0.weight", "embed.weight", "head.weight"]),
        (
            ("head.weight", nn.Linear, lambda name, p: p.dim() == 4),
            [
                *("features.0.weight", "features.3.weight", "attention.out_proj.weight", "head.weight"),
            ],
        ),
    ],
)
def test_select(select: Any, expected: list[str]) -> None:
    """By name, whole-name pattern, module type, module, function, and several: each once, in the network's order."""
    assert select_parameters(select, weights(NET), NET) == expected


@pytest.mark.parametrize(
    "select", ["head.weigh", r"feature", nn.Conv1d, lambda name, p: False, ["head.weight", nn.LSTM], "norm", NET.norm]
)
def test_a_selection_that_matches_nothing_is_refused(select: Any) -> None:
    """A pattern must match a whole name, and each of several must match something."""
    with pytest.raises(ValueError, match="matches none of the parameters"):
        select_parameters(select, weights(NET), NET)


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("head.weigh", "nearest names are 'head.weight'"),
        ("featuers", "nearest names are 'features'"),
        ("out_proj", r"names are whole names, and a pattern of all that end so is '.\*out_proj'"),
        ("0.weight", r"so is '.\*0.weight'; the nearest names are .*'features.0.weight'"),
        ("norm", "'norm' is a LayerNorm that has none"),
        ("head.bias", "'head.bias' is another parameter; the nearest names are 'head"),
        (nn.Conv1d, "nearest types of modules that have some are 'Conv2d'"),
        (lambda name, p: False, "some of them are 'features.0.weight'"),
        ("zzz", r"no names are like it: there are 'attention', .* and \d+ more"),
    ],
)
def test_an_error_suggests_what_was_meant(select: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        select_parameters(select, weights(NET), NET)


def test_an_error_suggests_at_most_five_names() -> None:
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(30)))
    with pytest.raises(ValueError) as raised:
        select_parameters("3.weights", dict(net.named_parameters()), net)
    assert str(raised.value).split("names are ")[1].count("'") == 2 * 5 and len(str(raised.value)) < 200


@pytest.mark.parametrize("pattern", ["*fc", "layer[1", "(head"])
def test_an_invalid_regular_expression_is_told(pattern: str) -> None:
    with pytest.raises(ValueError, match="neither a name in the network nor a valid regular expression"):
        select_parameters(pattern, weights(NET), NET)
    with pytest.raises(ValueError, match=r"prior=.* nor a valid regular expression"):
        Dense(nn.Linear(2, 1), None, prior={pattern: Normal(), ".*": Normal()})


def test_an_empty_or_impossible_selection_is_refused() -> None:
    """Nothing at all, and what is none of the kinds that a selection may be."""
    candidates = weights(NET)
    for empty in ([], ()):
        with pytest.raises(ValueError, match="is empty"):
            select_parameters(empty, candidates, NET)
    for wrong in (3, [3], ["head.weight", None], NET.head.weight, int):
        with pytest.raises(TypeError, match="a pattern, a module type or a function"):
            select_parameters(wrong, candidates, NET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matches none of the parameters"):
        select_parameters("", candidates, NET)


# -------------------------------------------------------------------------------------------- names and patterns


def test_a_name_is_literal_where_the_network_has_it() -> None:
    """As a pattern the dot of "a.b" would match any letter, and "ab" a module of its own."""
    net = nn.ModuleDict({"block1": nn.ModuleDict({"0": nn.Linear(1, 1)}), "block1x0": nn.Linear(1, 1)})
    names = dict(net.named_parameters())
    assert select_parameters("block1.0", names, net) == ["block1.0.weight", "block1.0.bias"]
    assert select_parameters("block1.0.weight", names, net) == ["block1.0.weight"]
    assert select_parameters(r"block1.0.*", names, net) == [*names]


def test_tied_parameters_go_by_any_of_their_names() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(3, 4), "out": nn.Linear(4, 3, bias=False)})
    net["out"].weight = net["embed"].weight
    names = dict(net.named_parameters())
    for select in ("embed", "out", "out.weight", "o.*", net["out"], nn.Linear):
        assert select_parameters(select, names, net) == ["embed.weight"]
    with pytest.raises(ValueError, match="head: 'out.weight' is tied to another parameter"):
        Bella(nn.ModuleDict({"out": net["out"], "embed": net["embed"]}), None, head="embed")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("fc", "fc.weight", True),
        ("fc", "fc.weight.s", True),
        ("fc.weight", "fc.weight.s", True),
        (r"layer\d", "layer3.0.conv.weight", True),
        (r"layer\d\.1", "layer3.0.conv.weight", False),
        ("conv", "layer3.0.conv.weight", False),
        ("f", "fc.weight", False),
        (".*weight", "fc.weight", True),
        ("", "fc.weight", False),
    ],
)
def test_patterns_of_priors_match_whole_names_of_parameters_and_modules(
    pattern: str, name: str, expected: bool
) -> None:
    assert pattern_matches(pattern, name) == expected
    if expected:
        assert resolve({pattern: Laplace(), ".*": Normal()}, (name,), torch.zeros(2)) == Laplace()
    else:
        assert resolve({pattern: Laplace(), ".*": Normal()}, (name,), torch.zeros(2)) == Normal()


def test_a_prior_goes_to_all_that_is_below_a_module() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), nn.Linear(3, 1))
    model = Dense(net, None, prior={"0": Laplace(), r"1\.bias": Normal(0.0, 2.0), "1": Normal()})
    assert model.priors == {
        **{"0.0.weight": Laplace(), "0.0.bias": Laplace()},
        **{"1.weight": Normal(), "1.bias": Normal(0.0, 2.0)},
    }
    rank1 = Rank1(net, None, prior={"0": Laplace(), "1.weight.s": Normal(1.0, 0.1), "1": Normal()})
    assert rank1.priors["0.0.weight.r"] == Laplace() and rank1.priors["1.weight.s"] == Normal(1.0, 0.1)
    assert rank1.priors["1.weight.r"] == Normal()


# ------------------------------------------------------------------------------------------------ in the models


def classifier() -> nn.Module:
    """With the names of torchvision's AlexNet and VGG: layers by their place in a sequence."""
    torch.manual_seed(0)
    return torchvision.models.alexnet(num_classes=4)


@pytest.mark.parametrize("name", ["classifier.1", "classifier.6", "classifier"])
def test_head_and_select_mean_the_same_by_a_name(name: str) -> None:
    """Of "classifier.1" neither is the end of "features.classifier.1" nor a pattern: both are the layer itself."""
    net = classifier()
    selected = Bella(net, Categorical(), 10, select=name).weights
    headed = Bella(net, Categorical(), 10, select="features", head=name)
    assert selected == [n for n in headed.head_parameters if n.endswith("weight")]
    assert Bella(net, Categorical(), 10, select=name, head="classifier.4").weights == [
        n for n in selected if n != "classifier.4.weight"
    ]
    module = net.get_submodule(name)
    assert Bella(net, Categorical(), 10, select=module).weights == selected
    assert Bella(net, Categorical(), 10, select="features", head=module).head_parameters == headed.head_parameters
    assert Dense(net, Categorical(), 10, select=name).random == headed.head_parameters
    assert Rank1(net, Categorical(), 10, select=name).weights == selected


def test_a_module_of_the_users_network_is_known_in_every_model() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    below = ["2.0.weight", "2.0.bias"]
    assert Dense(net, Gaussian(), 5, select=net[2]).random == below
    assert SpikeSlab(net, Gaussian(), 5, select=[net[2]]).random == below
    assert WeightSharing(net, Gaussian(), 5, select=net[2]).random == below
    assert Rank1(net, Gaussian(), 5, select=net[2]).weights == below[:1]
    bella = Bella(net, Gaussian(), 5, select=net[2], head=net[3], affine=net[1])
    assert (bella.weights, bella.affine_parameters) == (below[:1], ["1.weight", "1.bias"])
    assert bella.head_parameters == ["3.weight", "3.bias"]
    model = WeightSharing(net, Gaussian(), 5)
    for coded in (net[2], model.core().net[2]):  # type: ignore[index]
        assert CodebookGuide(model, 3, coded=coded).book.sites[0][0] == "2.0.weight"
        assert [name for name, _ in CodebookGuide(model, 3, coded=coded).book.sites] == below


def test_a_module_of_another_network_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for other in (copy.deepcopy(net)[0], nn.Linear(2, 2)):
        for make in (lambda one: Dense(net, None, select=one), lambda one: Bella(net, None, head=one)):
            with pytest.raises(
                ValueError, match="the Linear that was given is not a module of this network.*by identity"
            ):
                make(other)


def test_a_model_does_not_keep_the_users_network_alive_and_can_be_copied_without_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model = WeightSharing(net, Gaussian(), 5)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="not a module of this network"):
            copied.weights(net[0])
        assert copied.weights("0") == model.weights(net[0]) == ["0.weight", "0.bias"]
    layer = net[0]
    del net
    gc.collect()
    with pytest.raises(ValueError, match="not a module of this network"):
        model.weights(layer)


@pytest.mark.parametrize("escaped", [False, True], ids=["as now", "as in version 1"])
def test_stored_names_pick_the_same_again(escaped: bool) -> None:
    """Files hold names, and those of before hold them escaped, in a list or with bars between them."""
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    for model in (
        Dense(net, Categorical(), 5, select="2"),
        Rank1(net, Categorical(), 5, select="2"),
        Bella(net, Categorical(), 5, select="0", head="2", affine=".*bias"),
        SpikeSlab(net, Categorical(), 5),
    ):
        arguments = json.loads(json.dumps(model.arguments())) | {"likelihood": Categorical(), "prior": model.prior}
        if escaped:
            names = [name.replace(".", r"\.") for name in arguments["select"]]
            arguments["select"] = "|".join(names) if isinstance(model, Bella) else names
        again = type(model).from_arguments(net, arguments)
        assert [site.name for site in again.sites()] == [site.name for site in model.sites()]
        assert again.arguments() == model.arguments()
