"""Where MLflow and Optuna keep what they are told: files in the results folder, or servers that the environment names.

FFFSWEEP_MLFLOW_URI: `http://host:5000` of an MLflow server, or a database. FFFSWEEP_OPTUNA_URL: `postgresql://user:password@host/name`.
With `_FILE` behind either name the address is read from a file, as secrets are mounted. Where neither is installed sweeps of a grid
run all the same; once their results are imported elsewhere, both are told of them there.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fffsweep.pipeline.secrets import mask, setting
from fffsweep.sweeps.config import ConfigError

MLFLOW, OPTUNA = "FFFSWEEP_MLFLOW_URI", "FFFSWEEP_OPTUNA_URL"
_SERVERS = ("http", "https")
_DATABASES = ("postgresql", "mysql", "sqlite")


def is_installed(module: str) -> bool:
    """Whether `mlflow` or `optuna` can be imported here."""
    return find_spec(module) is not None


def sqlite_url(path: Path) -> str:
    """Address of a local SQLite file."""
    return f"sqlite:///{path.resolve()}"


def mlflow_uri(results: Path) -> str:
    """Raises ConfigError if the address is of no kind that MLflow knows."""
    return _address(MLFLOW, (*_SERVERS, *_DATABASES)) or sqlite_url(results / "mlflow.db")


def optuna_url(results: Path) -> str:
    """Raises ConfigError if the address is not a database's."""
    return _address(OPTUNA, _DATABASES) or sqlite_url(results / "optuna.db")


def artifact_root(results: Path) -> Path | None:
    """Folder for MLflow's own files; None where its server has one."""
    return None if setting(MLFLOW) else results / "mlartifacts"


def _address(variable: str, kinds: tuple[str, ...]) -> str | None:
    try:
        address = setting(variable)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if address is None:
        return None
    kind, separator, _ = address.partition("://")
    if not separator or kind.partition("+")[0] not in kinds:
        raise ConfigError(f"{variable}={mask(address)}: expected an address that begins with {', '.join(f'{k}://' for k in kinds)}")
    return address
