"""The report beside the trials in MLflow: the page and its figures as artifacts of the one run `report` of a study's experiment."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fffsweep
from fffsweep.dashboards import report
from fffsweep.dashboards.print_figures import write_figures
from fffsweep.dashboards.queries import StudyView
from fffsweep.dashboards.verdicts import claims
from fffsweep.pipeline.secrets import mask
from fffsweep.pipeline.settings import canonical_json
from fffsweep.sweeps.backends import is_installed, mlflow_uri

NAME = "report"


class NotLogged(Exception):
    """MLflow could not be given the report; the message says why and what to do."""


def publish_report(view: StudyView) -> str | None:
    """Log `report.html` and `figures/*.svg` and describe the experiment; the run's id, None before a trial has finished or without MLflow.

    There is one such run: the newest takes the place of the one before, and one made of the same results stays as it is.
    Raises NotLogged if MLflow cannot be reached or has no such experiment.
    """
    if not view.finished or not is_installed("mlflow"):
        return None
    from fffsweep.pipeline.tracking import is_outside, replace_files

    said = "\n".join(f"- **{claim.question}** {claim.answer}" for claim in claims(view))
    about = f"{view.description or f'Sweep {view.name}'}\n\n{said}\n\nTables and figures: `{NAME}.html` among the artifacts of run {NAME}."
    results = [(trial.id, trial.state, trial.collect_key) for trial in view.trials]
    made_of = hashlib.sha256(canonical_json([fffsweep.__version__, view.config, results]).encode()).hexdigest()

    def write(folder: Path) -> None:
        report.write_report(view, folder / f"{NAME}.html")
        write_figures(view, folder / "figures", ("svg",))

    try:
        return replace_files(mlflow_uri(view.results), view.name, NAME, about, made_of, write)
    except Exception as error:
        if not is_outside(error):
            raise
        reason = mask(" ".join(str(error).split()))[:300]
        raise NotLogged(f"MLflow was not given the report: {reason}; `fffsweep verify` with --repair gives it") from error
