"""A study as table, JSON, CSV, Parquet, Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
import json as json_module
import re
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fffsweep.dashboards.queries import QUALITY, StudyView
from fffsweep.dashboards.summary import Row, interval_note, rows, used_columns
from fffsweep.dashboards.trial import TrialView
from fffsweep.dashboards.verdicts import decidability

FORMATS = ("table", "json", "csv", "parquet", "latex", "markdown")
RESULTS_SCHEMA, PARETO_SCHEMA = "fffsweep.results/1", "fffsweep.pareto/1"
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}


def print_results(view: StudyView, format: str, out: IO[str]) -> None:
    """Write the study to `out`. Raises ValueError for an unknown format, and for Parquet's bytes on a terminal."""
    if format == "parquet":
        if out.isatty():
            raise ValueError(
                "format parquet: bytes are not for a terminal; send them to a file, as in `... --format parquet > study.parquet`"
            )
        out.buffer.write(parquet(view))  # type: ignore[attr-defined]
    elif format == "table":
        table(view, out)
    elif format in FORMATS:
        writer = {"json": json, "csv": csv_text, "latex": latex, "markdown": markdown}[format]
        out.write(writer(view))
    else:
        raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")


def table(view: StudyView, out: IO[str]) -> None:
    """The results for people: drawn on a terminal, aligned plain lines elsewhere."""
    _print_table(view, rows(view), out)


def pareto_table(view: StudyView, out: IO[str]) -> None:
    """The front, best in the first objective first, then the layouts that it dominates, then the controls."""
    members = [entry.trial for entry in view.front()]
    others = sorted((trial for trial in view.trials if trial not in members), key=lambda trial: not trial.in_study)
    _print_table(view, rows(view, [*members, *others]), out)


def _print_table(view: StudyView, shown: list[Row], out: IO[str]) -> None:
    columns = used_columns(shown)
    cells = [[row.cells[column.key] for column in columns] for row in shown]
    titles = [column.title for column in columns]
    if out.isatty():
        drawn = Table(title=Text(f"{view.name}: {view.state}"), title_justify="left")
        for column in columns:
            drawn.add_column(Text(column.title), justify="right" if column.numeric else "left", overflow="fold")
        for row, line in zip(shown, cells, strict=True):
            drawn.add_row(*map(Text, line), style="bold" if row.on_front else "")
        console = Console(file=out)
        console.print(drawn)
        console.print(Text("\n".join(notes(view))))
        return
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    for line in (titles, *cells):
        padded = [
            text.rjust(width) if column.numeric else text.ljust(width) for text, width, column in zip(line, widths, columns, strict=True)
        ]
        out.write("  ".join(padded).rstrip() + "\n")
    out.write("\n".join(notes(view)) + "\n")


def notes(view: StudyView) -> list[str]:
    """What a reader of the table must know."""
    said = [f"* on the Pareto front of {', '.join(f'{name} ({way})' for name, way in view.objectives.items())}.", interval_note(view)]
    if view.finished:
        judged = decidability(view)
        said.append(judged.reason[0].upper() + judged.reason[1:] + ".")
    if view.constraints:
        searched = [trial for trial in view.finished if trial.in_study]
        keep = sum(not view.violated(trial) for trial in searched)
        said.append(f"{keep} of {len(searched)} finished trials keep {' and '.join(view.constraints)}.")
    likes = [task for task in view.tasks if task.endswith("-like")]
    if likes:
        said.append(f"{', '.join(likes)}: stand-ins, not GLUE scores.")
    return said


def json(view: StudyView) -> str:
    """`fffsweep.results/1`: every trial with all of its metrics and their intervals."""
    trials = [
        {
            "trial": trial.id,
            "layout": trial.layout,
            "control": ", ".join(trial.controls) or None,
            "state": trial.state,
            "params": trial.params,
            "metrics": trial.metrics,
            "intervals": _intervals(trial, list(trial.averages)),
        }
        for trial in view.trials
    ]
    return json_module.dumps({"schema": RESULTS_SCHEMA, "study": view.name, "trials": trials}, indent=1, allow_nan=False) + "\n"


def pareto_json(view: StudyView) -> str:
    """`fffsweep.pareto/1`: the front, and the controls beside it."""
    names = list(view.objectives)

    def entry(trial: TrialView, p_front: float | None) -> dict[str, Any]:
        return {
            "trial": trial.id,
            "layout": trial.layout,
            "values": {name: trial.value(name) for name in names},
            "intervals": _intervals(trial, names),
            "p_front": p_front,
        }

    chances = view.front_chances(tuple(names), tuple(view.maximize))
    content = {
        "schema": PARETO_SCHEMA,
        "study": view.name,
        "objectives": view.objectives,
        "front": [entry(member.trial, member.p_front) for member in view.front()],
        "controls": [
            {**entry(trial, chances.get(trial.id)), "control": ", ".join(trial.controls)} for trial in view.finished if trial.controls
        ],
    }
    return json_module.dumps(content, indent=1, allow_nan=False) + "\n"


def _intervals(trial: TrialView, names: list[str]) -> dict[str, list[float] | None]:
    found = {name: trial.estimate(name) for name in names}
    return {
        name: None if estimate is None or estimate.interval is None else list(estimate.interval)
        for name, estimate in found.items()
        if estimate is not None
    }


def records(view: StudyView) -> list[dict[str, Any]]:
    """One flat row a trial, the same columns in every row: metrics, and intervals of the objectives as `<metric>/low` and `/high`."""
    metrics = sorted({name for trial in view.finished for name in trial.averages})
    params = sorted({name for trial in view.trials for name in trial.params})
    front = {entry.trial.id for entry in view.front()}
    chances = view.front_chances(tuple(view.objectives), tuple(view.maximize))
    table_rows = []
    for trial in view.trials:
        kept = view.retention(trial, QUALITY)
        row: dict[str, Any] = {
            "trial": trial.id,
            "layout": trial.layout,
            "control": ", ".join(trial.controls) or None,
            "state": trial.state,
            "active_width": trial.active_width,
            "width": trial.width,
            "on_front": trial.id in front,
            "p_front": chances.get(trial.id),
            "quality_retention": kept.value if kept else None,
            **{f"params/{name}": trial.params.get(name) for name in params},
            **{name: trial.value(name) for name in metrics},
        }
        for name in view.objectives:
            interval = _intervals(trial, [name]).get(name)
            row[f"{name}/low"], row[f"{name}/high"] = interval or (None, None)
        table_rows.append(row)
    return table_rows


def csv_of(lines: list[dict[str, Any]]) -> str:
    """CSV of rows that share their columns; floats keep all their digits."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def parquet_of(lines: list[dict[str, Any]]) -> bytes:
    """Parquet file of rows that share their columns."""
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), sink)
    return sink.getvalue()


def csv_text(view: StudyView) -> str:
    """One row a trial."""
    return csv_of(records(view))


def parquet(view: StudyView) -> bytes:
    """One row a trial, as `csv_text`."""
    return parquet_of(records(view))


def markdown(view: StudyView) -> str:
    """The results table in Markdown."""
    shown = rows(view)
    columns = used_columns(shown)

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(plain(cell) for cell in cells) + " |\n"

    text = line([column.title for column in columns]) + "|" + "".join(" ---: |" if c.numeric else " --- |" for c in columns) + "\n"
    text += "".join(line([row.cells[column.key] for column in columns]) for row in shown)
    return text + "".join(f"\n{plain(note)}\n" for note in notes(view))


def latex(view: StudyView) -> str:
    """The results table as a LaTeX `tabular` with booktabs rules; fronts in bold."""
    shown = rows(view)
    columns = used_columns(shown)

    def line(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\" + "\n"

    text = "% needs \\usepackage{booktabs}\n"
    text += r"\begin{tabular}{" + "".join("r" if column.numeric else "l" for column in columns) + "}\n\\toprule\n"
    text += line([escaped(column.title) for column in columns]) + "\\midrule\n"
    for row in shown:
        cells = [escaped(row.cells[column.key]) for column in columns]
        text += line([rf"\textbf{{{cell}}}" if row.on_front and cell else cell for cell in cells])
    return text + "\\bottomrule\n\\end{tabular}\n" + "".join(f"% {note}\n" for note in notes(view))


def plain(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text).replace("\n", " ")


def escaped(text: str) -> str:
    """LaTeX that shows `text` as it is."""
    return re.sub(r"[\\~^–&%$#_{}]", lambda match: _LATEX.get(match[0], "\\" + match[0]), text).replace("\n", " ")
