"""A choice put to the proof: the chosen trial once more on seeds that had no part in choosing it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import reduce
from typing import Any

from fffsweep.sweeps.config import SweepConfig


def confirming(study: Mapping[str, Any], trial: Mapping[str, Any], num_seeds: int, num_fresh: int) -> SweepConfig:
    """Config of the study that runs a trial, which has `num_seeds` pretraining seeds, and its reference on `num_fresh` further ones.

    study, trial: of a study record. The seeds that the trial was chosen on are in it too; their results are in the store and are
    reused, so only the fresh ones cost anything. A searched trial keeps its settings; its reference is trained with them too.
    """
    config = deepcopy(study["config"])
    for path, value in trial["params"].items():
        *blocks, name = path.split(".")
        if blocks:  # a setting; the others are the shape, which the layout says
            reduce(lambda block, inner: block.setdefault(inner, {}), blocks, config)[name] = value
    reference = next((text for text in config["controls"] if text.startswith("reference_dense")), None)
    variant = trial["model"]["feedforward"]["variant"]
    controls = [reference] if reference else []
    if variant in ("none", "random_routing", "unchanged"):
        controls.append(next(text for text in trial["controls"] if text.startswith(variant)))
    # A dense control is the layout of as many trees of depth 0; a study needs a layout even where the choice is `none`.
    layout = trial["layout"] or next(each["layout"] for each in study["trials"] if each["layout"])
    return SweepConfig.model_validate(
        {
            **config,
            "name": confirming_name(study["name"], trial["id"]),
            "description": f"Trial {trial['id']} of {study['name']} on fresh seeds, before it is picked",
            "layouts": [] if config["layouts"] == [] else [layout],  # an encoder that is left as it is may be all there is
            "depth": None,
            "width": None,
            "search": None,
            "sampler": "grid",
            "constraints": [],
            "early_stopping": None,
            "controls": controls,
            "seeds": {"pretrain": num_seeds + num_fresh, "finetune": config["seeds"]["finetune"]},
        }
    )


def confirming_name(study: str, trial: str) -> str:
    """Name of that study."""
    name = f"pick-{trial}-of-{study}"
    while len(name.encode()) > 80:
        name = name[:-1]
    return name
