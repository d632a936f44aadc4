"""The report of a study: one HTML file that needs nothing else, or Markdown, LaTeX, or figures for a paper."""

from __future__ import annotations

import datetime
import importlib.util
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

import fffsweep
from fffsweep.dashboards import depth_figures, figures, formats, print_figures, speed_figures, training_figures
from fffsweep.dashboards.figures import COLOURS, Figure
from fffsweep.dashboards.queries import QUALITY, StudyView
from fffsweep.dashboards.summary import number, rows, used_columns, with_interval
from fffsweep.dashboards.tables import paper_speed_table, paper_table, task_table
from fffsweep.dashboards.trial import TrialView
from fffsweep.dashboards.verdicts import claims, decidability, layouts

HERE = Path(__file__).parent
_MOST_ROWS = 80  # trials; beyond, dominated ones are left out of the report's tables
_LEAF_MAPS = 2
_SECTIONS = (
    ("answers", "Answers"),
    ("results", "Results"),
    ("figures", "Figures"),
    ("setup", "Set-up"),
    ("provenance", "Provenance"),
    ("reproduce", "Reproduce"),
    ("paper", "The paper"),
)


@cache
def templates() -> jinja2.Environment:
    """The pages' templates; everything is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "duration": duration, "size": size, "moment": moment}
    return environment


def plotly_script() -> Path:
    """plotly.js as the plotly package brings it; plotly itself is not imported, which would take a second."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise RuntimeError("package plotly is not installed: pip install plotly")
    return Path(spec.origin).parent / "package_data" / "plotly.min.js"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 10 s`, `5 h 2 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def moment(seconds: float) -> str:
    """A time since 1970 as date and time, UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def write_report(view: StudyView, path: Path) -> Path:
    """Write the HTML report to `path` and return it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(view))
    return path


def write(view: StudyView, path: Path, format: str = "html") -> list[Path]:
    """Write the report as `html`, `md` or `latex` to `path`, or `figures` (SVG and PDF) into the folder `path`; the files written.

    Raises ValueError for another format, and where nothing can be written there.
    """
    if format not in ("html", "md", "latex", "figures"):
        raise ValueError(f"format {format!r}: expected one of html, md, latex, figures")
    try:
        return _written(view, Path(path), format)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); name another place with --output") from None


def _written(view: StudyView, path: Path, format: str) -> list[Path]:
    if format == "html":
        return [write_report(view, path)]
    if format == "figures":
        return print_figures.write_figures(view, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(view) if format == "md" else latex(view))
    return [path]


def html(view: StudyView) -> str:
    """The whole report as text."""
    shown = shown_trials(view)
    table = rows(view, shown)
    return (
        templates()
        .get_template("report.html")
        .render(
            view=view,
            style=Markup((HERE / "static" / "style.css").read_text()),
            script=Markup((HERE / "static" / "figures.js").read_text()),
            plotly=Markup(plotly_script().read_text()),
            colours=COLOURS,
            version=fffsweep.__version__,
            written=moment(view.updated_at),
            sections=_SECTIONS,
            tiles=tiles(view),
            decidable=decidability(view),
            claims=claims(view),
            columns=used_columns(table),
            rows=table if any(trial.metrics or trial.error for trial in view.trials) else [],
            left_out=len(view.trials) - len(shown),
            notes=formats.notes(view),
            tasks=task_table(view, shown),
            figures=report_figures(view),
            setup=setup(view),
            config=yaml.safe_dump(view.config, sort_keys=False, allow_unicode=True),
            provenance=provenance(view),
            keys=[(trial.id, trial.state, trial.collect_key or "–") for trial in shown],
            commands=commands(view),
            paper=paper_table(),
            paper_speed=paper_speed_table(),
        )
    )


def shown_trials(view: StudyView) -> list[TrialView]:
    """Every trial of a study of usual size; the front and the controls of a larger one."""
    if len(view.trials) <= _MOST_ROWS:
        return view.trials
    front = {entry.trial.id for entry in view.front()}
    return [trial for trial in view.trials if trial.controls or trial.id in front]


def report_figures(view: StudyView) -> list[Figure]:
    """Figures of the report, those that have something to show."""
    if not view.finished:
        return []
    deepest = sorted(layouts(view), key=lambda trial: -trial.shape.depth if trial.shape else 0)[:_LEAF_MAPS]
    curved = training_figures.chosen_for_curves(view)
    found = [
        figures.pareto(view, *figures.pareto_axes(view)),
        depth_figures.quality_by_depth(view),
        depth_figures.quality_by_active_width(view),
        depth_figures.loss_by_active_width(view),
        *speed_figures.speedups(view),
        depth_figures.retention_by_depth(view),
        training_figures.curves(view, curved),
        training_figures.left_turns(layouts(view)[: training_figures.MOST_CURVES]),
        *(training_figures.leaf_usage(trial) for trial in deepest),
    ]
    return [figure for figure in found if figure is not None and figure.spec["data"]]


def tiles(view: StudyView) -> list[tuple[str, str, str]]:
    """Name, value and remark of the figures at the top."""
    front, progress = view.front(), view.progress
    fastest = max(
        (
            (1 / time, trial)
            for trial in view.finished
            if trial.in_study and trial.variant == "fff" and (time := trial.value(view.rel_time))
        ),
        key=lambda pair: pair[0],
        default=None,
    )
    shown = [
        ("trials", f"{len(view.finished)} of {len(view.trials)}", "finished"),
        ("stage runs", f"{progress['finished']} of {progress['total']}", f"{duration(view.compute_s)} of computing"),
        ("replicates", " to ".join(map(str, dict.fromkeys(view.seeds_of_trials))), "pretraining seeds of each trial"),
        ("Pareto front", str(len(front)), "trials" if len(front) != 1 else "trial"),
    ]
    if view.reference:
        whole = with_interval(view.reference.estimate(QUALITY), 1)
        shown.append(("dense quality", whole.partition(" ")[0], f"{whole.partition(' ')[2]} reference_dense, selection rows".strip()))
    if fastest:
        shown.append(("fastest tree layer", f"{fastest[0]:.1f}x", f"{fastest[1].id}, over the dense reference{view.where_timed}"))
    return shown


def setup(view: StudyView) -> list[tuple[str, str]]:
    """What was varied and what was held fixed."""
    config, stages = view.config, view.config.get("stages", {})
    model = {name: value for name, value in config.get("model", {}).items() if not isinstance(value, dict)}
    space = config.get("layouts") or [trial.layout for trial in view.trials if trial.in_study]
    shown = [
        ("objectives", "; ".join(f"{name} ({direction})" for name, direction in view.objectives.items())),
        ("layouts", ", ".join(map(str, space[:40])) + (f" and {len(space) - 40} more" if len(space) > 40 else "")),
        ("controls", ", ".join(config.get("controls", [])) or "none"),
        ("model", _listed(model)),
        ("seeds", _listed(view.config.get("seeds", {}))),
    ]
    return shown + [(name, _listed(settings)) for name, settings in stages.items() if isinstance(settings, dict)]


def _listed(settings: dict[str, Any]) -> str:
    plain = {name: value for name, value in settings.items() if value not in (None, {}, [])}
    return ", ".join(f"{name} {_flat(value)}" for name, value in plain.items())


def _flat(value: Any) -> str:
    """A setting's value without brackets."""
    if isinstance(value, dict):
        return "/".join(map(_flat, value.values()))
    return " ".join(map(_flat, value)) if isinstance(value, list) else str(value)


def provenance(view: StudyView) -> list[tuple[str, str]]:
    """What code, machines and data the results come from."""
    found = view.provenance
    machines = [
        f"{m.get('cpu', 'unknown processor')}, {m.get('num_cores')} cores, {' '.join(m.get('instruction_sets', []))}"
        + (f", {', '.join(m['gpus'])}" if m.get("gpus") else "")
        for m in found["machines"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return [
        ("commit", "; ".join(found["commits"]) or "unknown"),
        ("versions", versions or "unknown"),
        ("machine", "; ".join(machines) or "unknown"),
        ("device", ", ".join(found["devices"]) or "unknown"),
        ("data fingerprint", found["data"] or "unknown"),
        ("seeds", _listed(found["seeds"])),
    ]


def commands(view: StudyView) -> list[tuple[str, str]]:
    """What each command reproduces."""
    name = shlex.quote(view.name)
    return [
        ("Run the sweep, or what is left of it:", f"fffsweep run {shlex.quote(view.name + '.yaml')}"),
        ("Every metric of every trial with its interval:", f"fffsweep results {name} --format json"),
        ("The results table:", f"fffsweep results {name} --format table"),
        ("The Pareto front with its intervals and probabilities:", f"fffsweep pareto {name} --json"),
        ("This report, its tables, its figures:", f"fffsweep report {name} --format html|md|latex|figures"),
    ]


def markdown(view: StudyView) -> str:
    """Answers and results in Markdown."""
    judged = decidability(view)
    text = f"# {formats.plain(view.name)}\n\n{formats.plain(view.description)}\n\n{formats.plain(judged.reason)}.\n\n## Answers\n\n"
    for claim in claims(view):
        text += f"- **{claim.question}** {claim.answer}\n"
        text += "".join(f"  - {formats.plain(f.trial)}: {formats.plain(f.measured)}; {f.answer}; {f.confidence}\n" for f in claim.findings)
    text += f"\n## Results\n\n{formats.markdown(view)}\n"
    tasks = task_table(view, shown_trials(view))
    if tasks["rows"]:
        lines = [tasks["titles"], ["---"] * len(tasks["titles"]), *tasks["rows"]]
        rows_of_text = ("| " + " | ".join(map(formats.plain, line)) + " |\n" for line in lines)
        text += "## Single tasks, validation splits\n\n" + "".join(rows_of_text) + "\n"
    text += "## Reproduce\n\n"
    return text + "".join(f"{what}\n\n    {command}\n\n" for what, command in commands(view))


def latex(view: StudyView) -> str:
    """The results and the answers as LaTeX tables."""
    text = formats.latex(view) + "\n\\begin{tabular}{llll}\n\\toprule\nclaim & layout & measured & answer \\\\\n\\midrule\n"
    for claim in claims(view):
        for finding in claim.findings:
            cells = (claim.question, finding.trial, finding.measured, finding.answer)
            text += _latex_row(cells)
    text += "\\bottomrule\n\\end{tabular}\n"
    tasks = task_table(view, shown_trials(view))
    if not tasks["rows"]:
        return text
    text += f"\n\\begin{{tabular}}{{l{'r' * (len(tasks['titles']) - 1)}}}\n\\toprule\n{_latex_row(tasks['titles'])}\\midrule\n"
    return text + "".join(map(_latex_row, tasks["rows"])) + "\\bottomrule\n\\end{tabular}\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(formats.escaped, cells)) + " \\\\\n"
