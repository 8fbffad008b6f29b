"""What older files hold, in the words of the present version."""

from __future__ import annotations

from typing import Any


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """The content of ``posterior.json`` in the form of the present version, in which it may be already."""
    return content | {"model": _shared_weights(content["model"])}


def _shared_weights(model: dict[str, Any]) -> dict[str, Any]:
    """Weights that share values were a ``WeightSharing`` with a codebook named ``shared``."""
    if model["class"] != "WeightSharing" or "shared" not in model:
        return model
    rest = {key: value for key, value in model.items() if key != "shared"}
    return rest | {"class": "SharedWeights", "codebook": model["shared"]}
