"""What a study says about each claim, how surely, and when it cannot say anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fffsweep.dashboards.queries import BASELINE, GPU_REL_TIME, QUALITY_VALIDATION, REL_TIME, StudyView
from fffsweep.dashboards.trial import TrialView
from fffsweep.sweeps import statistics as stats
from fffsweep.sweeps.statistics import Difference

KEPT = 0.96  # share of dense quality that the paper claims is kept
LEVEL = 0.05
NOT_DECIDABLE = "not decidable at this scale"
UNDECIDED = "undecided"
_REL_TIMES = {REL_TIME: ("speed", "a CPU"), GPU_REL_TIME: ("speed-gpu", "a GPU")}  # metric -> slug of its claim, and where


@dataclass(frozen=True)
class Decidability:
    """Whether differences of quality mean anything in this study, and why (not)."""

    decidable: bool
    reason: str


@dataclass(frozen=True)
class Finding:
    """One claim about one trial. `answer`: yes, no, undecided, or not decidable at this scale; `measured`, `confidence`: for people."""

    trial: str
    measured: str
    difference: Difference | None
    answer: str
    confidence: str


@dataclass(frozen=True)
class Claim:
    """A question, what its figures are, and what each layout, or trial of a search, answers."""

    slug: str
    question: str
    measure: str
    findings: tuple[Finding, ...]
    unit: str = "layouts"  # what the findings are about; trials where a search has several of a layout

    @property
    def answer(self) -> str:
        """The findings in one sentence."""
        if not self.findings:
            return "nothing to compare: the trials or times that this needs are not in the study, or not finished"
        counts = {answer: sum(f.answer == answer for f in self.findings) for answer in ("yes", "no", UNDECIDED, NOT_DECIDABLE)}
        if counts[NOT_DECIDABLE]:
            return NOT_DECIDABLE
        return ", ".join(f"{answer} for {count}" for answer, count in counts.items() if count) + f" of {len(self.findings)} {self.unit}"


def decidability(view: StudyView) -> Decidability:
    """Decidable where reference_dense beats the majority/mean baseline on the validation splits, by its interval."""
    reference = view.reference
    if reference is None:
        state = "has not finished" if any(trial.has_role("reference_dense") for trial in view.trials) else "is not in the study"
        return Decidability(False, f"the control reference_dense {state}, so nothing can be compared with it")
    scores, baselines = (reference.replicates(name) for name in (QUALITY_VALIDATION, BASELINE[QUALITY_VALIDATION]))
    shared = stats.common_replicates([scores, baselines])
    if not shared:
        return Decidability(False, "the reference has no quality beside its baseline")
    gap = stats.difference([scores[r] for r in shared], [baselines[r] for r in shared])
    shown = f"the dense reference lies {abs(gap.mean):.2f} points {'above' if gap.mean >= 0 else 'below'} the majority/mean baseline"
    if gap.interval is None:
        return Decidability(False, f"{shown}, and one replicate gives no interval to judge that by: mechanics are shown, not quality")
    shown += f" [{gap.interval[0]:+.2f}, {gap.interval[1]:+.2f}]"
    if gap.p_value is None:
        return Decidability(False, f"{shown}: the same in all replicates, so nothing tells its spread: mechanics are shown, not quality")
    if _answer(gap, gap.p_value) != "yes":
        return Decidability(False, f"{shown}: not surely above it, so mechanics are shown, not quality")
    return Decidability(True, shown)


def layouts(view: StudyView) -> list[TrialView]:
    """Finished trees of the study, the trials that claims are made about."""
    return [trial for trial in view.finished if trial.in_study and trial.shape is not None and trial.shape.depth > 0]


def claims(view: StudyView) -> list[Claim]:
    """Every claim with its findings; P values are Holm's over the layouts of each claim."""
    trees, decidable = layouts(view), decidability(view)
    unit = "layouts" if len({trial.layout for trial in trees}) == len(trees) else "trials"
    budget = "time of training" if view.matches_time else "number of training tokens"

    def against(kind: str) -> list[tuple[TrialView, Difference]]:
        pairs = [(trial, view.control(kind, trial.layout)) for trial in trees]
        found = [(trial, view.difference(trial, other, QUALITY_VALIDATION)) for trial, other in pairs if other is not None]
        return [(trial, gap) for trial, gap in found if gap is not None]

    points = "difference in quality points on the validation splits"
    found = [
        Claim(
            "quality",
            f"Is at least {100 * KEPT:.0f} % of the dense quality kept?",
            f"quality on the validation splits over that of reference_dense, same seeds, same {budget}{_beside_none(view)}",
            _judge(_kept(view, trees), decidable, lambda trial, gap: _retained(view, trial)),
        ),
        *_speed_claims(view, trees, decidable),
        Claim(
            "depth",
            "Does depth pay against a dense layer of the same active width?",
            f"{points} to dense_active of the layout",
            _judge(against("dense_active"), decidable, _points),
        ),
        Claim(
            "feedforward",
            "Does the layer pay against no feedforward at all?",
            f"{points} to none",
            _judge(against("none"), decidable, _points),
        ),
        Claim(
            "routing",
            "Does learned routing pay against a random path?",
            f"{points} to random_routing of the layout",
            _judge(against("random_routing"), decidable, _points),
        ),
    ]
    return [replace(claim, unit=unit) for claim in found]


def _beside_none(view: StudyView) -> str:
    """What is kept without any feedforward layer: where that is as much, keeping it says nothing of trees."""
    none = view.no_feedforward
    kept = none and view.retention(none, QUALITY_VALIDATION)
    return f"; none keeps {_retained(view, none)}" if none and kept else ""


def _speed_claims(view: StudyView, trees: Sequence[TrialView], decidable: Decidability) -> list[Claim]:
    """One for each device that layers were timed on; that of the CPU where nothing was timed."""
    return [
        Claim(
            slug,
            f"Is the feedforward layer faster than the dense reference layer on {where}?",
            "speed-up of the layer on trained weights and real activations, and the speed-up that arithmetic alone would allow",
            _judge(_faster(trees, metric), decidable, lambda trial, gap, metric=metric: _speed(view, trial, metric)),
        )
        for metric, (slug, where) in _REL_TIMES.items()
        if metric in view.rel_times
    ]


def _kept(view: StudyView, trees: Sequence[TrialView]) -> list[tuple[TrialView, Difference]]:
    found = []
    for trial in trees:
        ours, theirs = view.paired(trial, view.reference, QUALITY_VALIDATION) if view.reference else ([], [])
        if ours:
            found.append((trial, stats.difference(ours, [KEPT * value for value in theirs])))
    return found


def _faster(trees: Sequence[TrialView], metric: str) -> list[tuple[TrialView, Difference]]:
    times = [(trial, list(trial.replicates(metric).values())) for trial in trees]
    return [(trial, stats.difference([1.0] * len(values), values)) for trial, values in times if values]


def _judge(gaps, decidable, describe) -> tuple[Finding, ...]:  # type: ignore[no-untyped-def]
    tested = [gap.p_value for _, gap in gaps if gap.p_value is not None]
    adjusted = iter(stats.holm(tested))
    findings = []
    for trial, gap in gaps:
        p_value = None if gap.p_value is None else next(adjusted)
        finding = Finding(trial.id, describe(trial, gap), gap, _answer(gap, p_value), _confidence(gap, p_value))
        if not decidable.decidable:
            finding = replace(finding, answer=NOT_DECIDABLE)
        findings.append(finding)
    return tuple(findings)


def _answer(gap: Difference, p_value: float | None) -> str:
    """Yes or no only where both the test and the interval say so."""
    if gap.interval is None or p_value is None or p_value >= LEVEL:
        return UNDECIDED
    low, high = gap.interval
    return "yes" if low > 0 else "no" if high < 0 else UNDECIDED


def _confidence(gap: Difference, p_value: float | None) -> str:
    if gap.interval is None:
        return "one replicate in common: no interval"
    if p_value is None:
        return f"no test: the difference is the same in all {gap.num_replicates} replicates, which tells nothing of its spread"
    shown = "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
    return f"p {shown} (Holm), {gap.num_replicates} replicates"


def _points(trial: TrialView, gap: Difference) -> str:
    shown = f"{gap.mean:+.2f} points"
    return shown if gap.interval is None else f"{shown} [{gap.interval[0]:+.2f}, {gap.interval[1]:+.2f}]"


def _retained(view: StudyView, trial: TrialView) -> str:
    kept = view.retention(trial, QUALITY_VALIDATION)
    if kept is None:
        return "not defined: the reference's mean quality is not positive"
    shown = f"{100 * kept.value:.1f} %"
    return shown if kept.interval is None else f"{shown} [{100 * kept.interval[0]:.1f}, {100 * kept.interval[1]:.1f}]"


def _speed(view: StudyView, trial: TrialView, metric: str) -> str:
    limit = view.flop_limit(trial)
    shown = f"{1 / trial.metrics[metric]:.2f}x"
    return shown if limit is None else f"{shown} of {limit:.1f}x possible"
