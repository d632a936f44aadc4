"""Early stopping of pretraining where there are several objectives: who goes on at a rung, who waits, who is stopped for good.

A rung is a share of the pretraining budget. Within one layout the best 1/eta by held-out loss go on, decided anew with every result
(asynchronous successive halving, Li et al. 2018, arXiv 1810.05934), so a trial may wait and be called later. Across layouts a trial is
stopped when another that is at least as fast is better at the same rung by more than the seeds' noise. Optuna's own pruners know a
single objective.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fffsweep.pipeline.settings import Count, Settings
from fffsweep.sweeps.config_errors import Misfit
from fffsweep.sweeps.statistics import t_quantile

if TYPE_CHECKING:
    from fffsweep.pipeline.model_settings import ModelSettings
    from fffsweep.sweeps.config import SweepConfig

LOSS = "mlm/validation_loss"
GATHERING = 4  # a multiply-add on a tree's path takes up to so many times as long as one of a dense layer: rows are gathered
_CONFIDENCE = 0.95


class EarlyStopping(Settings):
    """rungs: how many stops there are before the whole pretraining budget, at 1/eta of it, 1/eta**2 and so on.

    eta: one in how many goes on at a rung.
    """

    eta: Count = Field(default=3, ge=2)
    rungs: Count = Field(default=2, ge=1)

    @property
    def shares(self) -> list[float]:
        """Share of the budget at each rung, rising."""
        return [self.eta ** -(self.rungs - rung) for rung in range(self.rungs)]


def check_early_stopping(config: SweepConfig) -> None:
    """Raises Misfit where a rung could not be continued or would say nothing."""
    from fffsweep.pipeline.schedules import WSD_DECAY

    stopping, recipe = config.early_stopping, config.stages.pretrain
    if stopping is None:
        return
    if recipe is None:
        raise Misfit("early_stopping without stages.pretrain: rungs are shares of a pretraining budget; remove it", "early_stopping")
    if recipe.schedule != "wsd":
        raise Misfit(
            f"early_stopping with schedule {recipe.schedule}: only wsd can be continued after a rung; set stages.pretrain.schedule to wsd",
            "early_stopping",
        )
    for path in ("schedule", "warmup", "tokens", "steps", "wall_clock_s"):
        if config.search is not None and f"stages.pretrain.{path}" in config.search.space:
            raise Misfit(
                f"search.space.stages.pretrain.{path} with early_stopping: rungs compare equal shares of one budget; remove one",
                *("search", "space", f"stages.pretrain.{path}"),
            )
    stable = (1 - WSD_DECAY) * stopping.shares[0]
    if recipe.warmup >= stable:
        raise Misfit(
            f"early_stopping with warmup={recipe.warmup:g}: expected less than {stable:.3g}, where the first rung begins to decay; "
            "lower warmup, or take fewer rungs",
            "early_stopping",
        )
    smallest = min((budget for budget in (recipe.tokens, recipe.steps) if budget is not None), default=None)
    step = recipe.batch_size * config.model.sequence_length if recipe.tokens is not None else 1
    if smallest is not None and smallest * stopping.shares[0] < 5 * step:
        raise Misfit(
            f"early_stopping: the first rung, {stopping.shares[0]:.3g} of the budget, is less than five steps; take fewer rungs",
            "early_stopping",
        )


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the feedforward layers for one token: timings exist for trained models only, and differ from run to run."""

    multiply_adds: int
    is_tree: bool

    def at_most(self, other: Cost) -> bool:
        """Whether a layer of this cost is surely at least as fast."""
        factor = GATHERING if self.is_tree and not other.is_tree else 1
        return factor * self.multiply_adds <= other.multiply_adds


def cost_of(model: ModelSettings) -> Cost:
    """Cost of a model's feedforward layers."""
    layer = model.feedforward
    return Cost(2 * model.num_layers * model.hidden_size * layer.active_width, layer.depth > 0)


@dataclass
class Racer:
    """A trial on its way. losses: for each rung reached, one held-out loss a replicate. granted: the rung that it may go to."""

    id: str
    group: str
    cost: Cost
    competes: bool = True  # with other layouts; reference_dense does not
    losses: list[list[float]] = field(default_factory=list)
    granted: int = 0
    state: Literal["running", "stopped", "failed"] = "running"

    @property
    def waits(self) -> bool:
        """Whether it stands at the rung that it may go to."""
        return self.state == "running" and len(self.losses) == self.granted + 1


@dataclass(frozen=True)
class Verdicts:
    """promoted: may go one rung on. stopped: for good, with the reason."""

    promoted: tuple[str, ...]
    stopped: dict[str, str]


def decide(racers: Sequence[Racer], eta: int, num_rungs: int, is_closed: Callable[[str], bool]) -> Verdicts:
    """What follows from the results so far; is_closed: whether no further trial will come to a group.

    A function of its arguments alone, whatever the order in which results came: called again with more, what it said stands.
    """
    stopped: dict[str, str] = {}
    for racer in racers:
        if racer.waits and racer.granted < num_rungs and racer.competes and (rival := _rival(racer, racers)) is not None:
            stopped[racer.id] = f"{rival.id} is at least as fast and better at rung {racer.granted} by more than the seeds' noise"
    groups: dict[str, list[Racer]] = defaultdict(list)
    for racer in racers:
        if racer.state != "failed":
            groups[racer.group].append(racer)
    promoted: list[str] = []
    for name, group in groups.items():
        for rung in range(num_rungs):
            reached = sorted((racer for racer in group if len(racer.losses) > rung), key=lambda racer: fmean(racer.losses[rung]))
            is_settled = is_closed(name) and not any(racer.state == "running" and len(racer.losses) <= rung for racer in group)
            quota = max(int(is_settled), len(reached) // eta)
            for place, racer in enumerate(reached):
                if not racer.waits or racer.granted != rung or racer.id in stopped:
                    continue
                if place < quota:
                    promoted.append(racer.id)
                elif is_settled:
                    stopped[racer.id] = f"number {place + 1} of {len(reached)} at rung {rung} of layout {racer.group}: {quota} go on"
    return Verdicts(tuple(promoted), stopped)


def _rival(racer: Racer, racers: Sequence[Racer]) -> Racer | None:
    """Another layout's trial that is at least as fast and surely better at the racer's rung."""
    rung = racer.granted
    noise, degrees = seed_noise(racers, rung)
    if not degrees:
        return None
    ours = racer.losses[rung]
    for other in racers:
        if other.group == racer.group or not other.competes or len(other.losses) <= rung or not other.cost.at_most(racer.cost):
            continue
        theirs = other.losses[rung]
        margin = t_quantile((1 + _CONFIDENCE) / 2, degrees) * noise * math.sqrt(1 / len(ours) + 1 / len(theirs))
        if fmean(theirs) < fmean(ours) - margin:
            return other
    return None


def seed_noise(racers: Sequence[Racer], rung: int) -> tuple[float, int]:
    """Standard deviation of the loss between seeds of one configuration, pooled over all, and its degrees of freedom, 0 if unknown."""
    squares, degrees = 0.0, 0
    for racer in racers:
        if len(racer.losses) > rung and len(racer.losses[rung]) > 1:
            mean = fmean(racer.losses[rung])
            squares += math.fsum((loss - mean) ** 2 for loss in racer.losses[rung])
            degrees += len(racer.losses[rung]) - 1
    return (math.sqrt(squares / degrees), degrees) if degrees else (0.0, 0)
