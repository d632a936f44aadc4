"""What the GPU kernels are meant to reach on an H100, and whether a run's rows reach it: a part of `make gpu-check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """The least `ratio` of rows at hidden 768, caches hot, that must not be below `bar`. tokens: None for every batch there is a row of."""

    text: str
    ratio: str
    bar: float
    layout: str = "1x11"
    dtype: str = "bfloat16"
    direction: str = "forward"
    tokens: int | None = None

    def holds_for(self, row: dict[str, Any]) -> bool:
        """Whether a row counts: the best CMM of its case, or the training with CMM."""
        if self.ratio in ("speedup_vs_dense", "speedup_vs_masked"):
            wanted: dict[str, Any] = {"suite": "training", "variant": "cmm", "precision": "bf16", "layout": self.layout}
        else:
            wanted = {"suite": "gpu", "best": True, "mode": "hot", "layout": self.layout, "dtype": self.dtype, "direction": self.direction}
            wanted |= {} if self.tokens is None else {"tokens": self.tokens}
        return all(row.get(name) == value for name, value in (wanted | {"hidden": 768}).items())


GOALS = (
    Goal("bfloat16 over the best dense layer, every batch", "speedup_vs_best_dense", 1.0),
    Goal("bfloat16 over the best dense layer, 16,384 tokens", "speedup_vs_best_dense", 4.1, tokens=16384),
    Goal("float32 without TF32 over the best dense layer, 16,384 tokens", "speedup_vs_best_dense", 15.0, dtype="float32", tokens=16384),
    Goal("1x15, bfloat16 over the best dense layer", "speedup_vs_best_dense", 40.0, layout="1x15", tokens=16384),
    Goal("bfloat16 forward and backward over the best dense layer", "speedup_vs_best_dense", 3.0, direction="train"),
    Goal("bfloat16 over gathered rows and batched products, 16,384 tokens", "speedup_vs_gather", 40.0, tokens=16384),
    Goal("training in bfloat16 over a dense layer", "speedup_vs_dense", 1.5),
)


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with the least ratio that was seen, and whether it is met; None for both where no row tells."""
    found = []
    for goal in GOALS:
        ratios = [row[goal.ratio] for row in rows if goal.holds_for(row)]
        seen = min(ratios) if ratios and None not in ratios else None
        found.append({"goal": goal.text, "bar": goal.bar, "ratio": seen, "met": None if seen is None else seen >= goal.bar})
    return found


def lines(found: list[dict[str, Any]]) -> str:
    """A line a goal."""
    words = {None: "not measured", True: "met", False: "MISSED"}
    return "\n".join(
        f"{each['goal']:66} bar {each['bar']:5.1f}  " + ("" if each["ratio"] is None else f"{each['ratio']:7.2f}  ") + words[each["met"]]
        for each in found
    )
