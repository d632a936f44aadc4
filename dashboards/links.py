"""From a trial to its pages in MLflow and optuna-dashboard. They are asked where it lies only when somebody follows a link."""

from __future__ import annotations

from urllib.parse import urlsplit

from fffsweep.dashboards.queries import StudyView
from fffsweep.dashboards.trial import TrialView
from fffsweep.sweeps.backends import mlflow_uri, optuna_url


def check_base(url: str | None, option: str) -> str | None:
    """`url` without a slash at its end. Raises ValueError unless it is an http or https address."""
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{option} {url!r}: expected an address such as http://localhost:5000")
    return url.rstrip("/")


def address(view: StudyView, trial: TrialView, tool: str, base: str, label: str = "") -> str:
    """Page of a trial, or of its stage run `label`, in `mlflow` or `optuna` served at `base`. Raises ValueError if it is not there."""
    if tool == "optuna":
        from fffsweep.sweeps.optuna_study import study_id

        number = study_id(optuna_url(view.results), view.name)
        return f"{base}/dashboard/studies/{number}/trials?numbers={trial.number}"
    from fffsweep.pipeline.tracking import find_run

    experiment, run = find_run(mlflow_uri(view.results), view.name, trial.id, label)
    return f"{base}/#/experiments/{experiment}/runs/{run}"
