"""Converts descriptions of earlier format versions to the current one, so that old posteriors load unchanged.

Version 1 (pyro_bnn 0.1.0) differs from version 2 as follows:

- the prior ``GaussianMixture`` without components is now ``CodebookPrior``, and one with components also contained the
  numbers of a codebook;
- ``SpikeAndSlab(scale=)`` is now ``variance_prior=``;
- a ``Normal`` in the prior of a ``Bella`` was the prior of the elements of ``scale B A``; now it is that of A and B;
- a ``Bella`` without a head had an empty list as its head;
- weights that share their values were a ``WeightSharing`` with a codebook named ``shared``, and are now
  ``SharedWeights``;
- the patterns of a prior matched only names of parameters and sites, and now match names of modules too.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pyro_bnn.selection import pattern_matches

_OF_CODEBOOKS = ("slab", "concentration", "rate")


def from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Converts the content of ``posterior.json`` from version 1 to version 2."""
    model = dict(content["model"])
    if model["class"] == "Bella":
        model["head"] = model["head"] or None
    if model["class"] == "WeightSharing" and "shared" in model:
        model["class"], model["codebook"] = "SharedWeights", model.pop("shared")
    for name in model.keys() & {"prior", "weight_prior", "head_prior", "affine_prior"}:
        model[name] = _prior(model[name], content, of_factors=model["class"] == "Bella" and name == "prior")
    return content | {"version": 2, "model": model}


def _prior(prior: Any, content: dict[str, Any], of_factors: bool) -> Any:
    if prior is None:
        return None
    if "patterns" in prior:
        patterns = [(_whole_names(pattern, content), one) for pattern, one in prior["patterns"]]
        return {"patterns": [[pattern, _prior(one, content, of_factors)] for pattern, one in patterns]}
    match prior["class"]:
        case "GaussianMixture" if prior["locs"] is None:
            return {"class": "CodebookPrior"} | {name: prior[name] for name in _OF_CODEBOOKS}
        case "GaussianMixture":
            return {name: value for name, value in prior.items() if name not in _OF_CODEBOOKS}
        case "SpikeAndSlab":
            rest = {name: value for name, value in prior.items() if name != "scale"}
            return rest | {"variance_prior": prior["scale"]}
        case "Normal" if of_factors:
            return prior | {"loc": 0.0, "scale": _scale_of_factors(prior["scale"], content["model"])}
    return prior


def _scale_of_factors(sigma: float, bella: dict[str, Any]) -> float:
    """The standard deviation of A and B that gives every element of ``scale B A`` the standard deviation sigma."""
    rank, root = bella["rank"], math.sqrt(bella["rank"])
    scale = bella["alpha"] / (root if bella["rank_stabilised"] else rank)
    return math.sqrt(sigma / (scale * root))


def _whole_names(pattern: str, content: dict[str, Any]) -> str:
    """The pattern itself if it still matches the same sites; else a pattern of exactly the sites that it matched."""
    own = [(name, f"{name}{end}") for name in content["network"] for end in ("", ".s", ".r", ".A", ".B")]
    own += [("codes", "codes"), ("outliers", "outliers")]
    before = [site for name, site in own if re.fullmatch(pattern, name) or re.fullmatch(pattern, site)]
    if before == [site for _, site in own if pattern_matches(pattern, site)]:
        return pattern
    return "|".join(map(re.escape, before))
