"""Which splits of a GLUE task are whole: only those may enter a figure called GLUE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fffsweep.pipeline.tasks import Task

# Labelled rows of the official release (Wang et al. 2019, arXiv 1804.07461); `train` is divided into train and selection here.
OFFICIAL_ROWS: dict[str, dict[str, int]] = {
    "cola": {"train": 8551, "validation": 1043},
    "sst2": {"train": 67349, "validation": 872},
    "mrpc": {"train": 3668, "validation": 408},
    "stsb": {"train": 5749, "validation": 1500},
    "qqp": {"train": 363846, "validation": 40430},
    "mnli": {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
    "qnli": {"train": 104743, "validation": 5463},
    "rte": {"train": 2490, "validation": 277},
    "wnli": {"train": 635, "validation": 71},
}


def is_complete(task: Task, splits: Mapping[str, Any]) -> bool:
    """Whether `splits` hold every labelled row of a GLUE task; False for any other task."""
    rows = {name: len(split) for name, split in splits.items()}
    rows["train"] += rows.pop("selection", 0)
    return rows == OFFICIAL_ROWS.get(task.name)
