"""Commands that take a trial's model further: pick, export, predict."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

RESULTS = Path("results")

Study = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, or the path of its config.")]
Trial = Annotated[str, typer.Argument(metavar="TRIAL", help="A trial of it, such as 1x8 or none.")]
Folder = Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Folder of all results.")]
Task = Annotated[str | None, typer.Option("--task", help="The model finetuned on this task; without it the pretrained one.")]
Replicate = Annotated[int, typer.Option("--replicate", min=0, help="Which of the trial's pretraining seeds.")]


def pick(
    study: Study,
    trial: Trial,
    alias: Annotated[str, typer.Option("--alias", metavar="NAME", help="Alias in the model registry, such as champion.")],
    fresh_seeds: Annotated[
        int | None,
        typer.Option(
            "--fresh-seeds", min=0, help="Seeds that the choice is run again on; by default as many as the study has, 0 for none."
        ),
    ] = None,
    task: Task = None,
    replicate: Replicate = 0,
    executor: Annotated[Literal["ray", "inline"], typer.Option(help="Where the fresh seeds are run.")] = "ray",
    results: Folder = RESULTS,
) -> int:
    """Run a trial again on fresh seeds, then register its model in MLflow with the evidence for it."""
    from fffsweep.cli import name_of
    from fffsweep.dashboards.choice import pick as pick_trial
    from fffsweep.sweeps.progress import TerminalProgress

    with TerminalProgress() as progress:
        picked = pick_trial(results, name_of(study), trial, alias, fresh_seeds, task, replicate, progress, executor)
    if picked is None:
        print("stopped: the same command goes on from here")
        return 130
    print("\n".join(picked.to_lines()))
    return 0


def export(
    study: Study,
    trial: Trial,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it: absent or empty.")],
    task: Task = None,
    replicate: Replicate = 0,
    results: Folder = RESULTS,
) -> None:
    """Write a trial's model as a Hugging Face directory, which AutoModelForMaskedLM or ...ForSequenceClassification loads."""
    from fffsweep.cli import name_of
    from fffsweep.dashboards.choice import export_trial
    from fffsweep.dashboards.queries import load_study

    print(export_trial(load_study(results, name_of(study)), trial, folder, task, replicate))


def predict(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `fffsweep export` wrote.")],
    source: Annotated[
        str, typer.Argument(metavar="[FILE]", help="Texts, one a line, a pair's separated by a tab; - for standard input.")
    ] = "-",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, with every score.")] = False,
) -> None:
    """Labels of texts by an exported classifier, or guesses for the [MASK] in them by a masked-language model."""
    from fffsweep.pipeline.predict import PredictError, Predictor

    try:
        texts = (sys.stdin.read() if source == "-" else Path(source).read_text()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PredictError(f"{source}: {error}; expected a UTF-8 text file, or - for standard input") from None
    for prediction in Predictor(folder).predict(texts):
        if as_json:
            print(json.dumps(asdict(prediction), ensure_ascii=False))
        else:
            sure = max(prediction.scores.values(), default=None)
            print(prediction.label if sure is None else f"{prediction.label}\t{sure:.4f}")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (pick, export, predict):
        app.command()(command)
