"""Figures of Belcak & Wattenhofer 2023 (arXiv 2311.10770), as transcribed: Table 1 in `paper_glue.csv`, Table 2 in `paper_speed.csv`.

They belong to another model, other data and another machine: overlays, never competitors.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

AS_TRANSCRIBED = "paper, as transcribed"
# The paper's columns, in its order; MNLI counts twice in its averages.
TASK_COLUMNS = ("rte", "mrpc", "stsb", "sst2", "mnli", "qnli", "qqp", "avg_without_cola", "cola", "avg")


@dataclass(frozen=True)
class PaperRow:
    """One model of Table 1. `depth`, `trees`: None for models without trees; `scores`: the paper's columns, absent cells left out."""

    model: str
    depth: int | None
    trees: int | None
    width: int
    active_percent: float
    scores: dict[str, float]
    note: str

    @property
    def active_width(self) -> float:
        """Neurons used for one token."""
        return self.width if self.depth is None or self.trees is None else self.trees * (self.depth + 1)


@cache
def table() -> tuple[PaperRow, ...]:
    """Rows of Table 1."""
    return tuple(
        PaperRow(
            row["model"],
            int(row["depth"]) if row["depth"] else None,
            int(row["trees"]) if row["trees"] else None,
            int(row["width"]),
            float(row["active_percent"]),
            {name: float(row[name]) for name in TASK_COLUMNS if row[name]},
            row["source_note"],
        )
        for row in _read("paper_glue.csv")
    )


def trees() -> list[PaperRow]:
    """Rows of the depth x trees layouts at equal training budget."""
    return [row for row in table() if row.depth is not None and not row.note]


def dense() -> PaperRow:
    """The dense model that the layouts are compared with: depth 0 of the same recipe."""
    return next(row for row in trees() if row.depth == 0)


@cache
def speedups() -> tuple[dict[str, str], ...]:
    """Rows of Table 2; each column is relative to its own first row."""
    return tuple(_read("paper_speed.csv"))


def quality_and_time() -> list[tuple[str, float, float]]:
    """Model, GLUE average and relative layer time of the models that are in both tables; times of CPU level 2, over the 4095-wide layer."""
    quality = {row.model: row.scores["avg"] for row in table()}
    known = {"BERT-base-4095": "crammedBERT-4095", "BERT-base-3072": "crammedBERT-3072"}
    rows = [(known.get(row["model"], row["model"]), row["cpu_level2"]) for row in speedups()]
    return [(model, quality[model], 1 / float(speedup)) for model, speedup in rows]


def _read(name: str) -> list[dict[str, str]]:
    with (Path(__file__).parent / name).open(newline="") as file:
        return list(csv.DictReader(file))
