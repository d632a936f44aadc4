"""Results that travel: out of one results folder, with or without their weights, and into another as if they had been made there."""

from __future__ import annotations

import hashlib
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fffsweep.pipeline.remote_store import open_store
from fffsweep.pipeline.store import DamagedArtifact, ForeignManifest, Manifest, Store, is_weight
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.decisions import FILE as DECISIONS
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.merge import Names, decisions_of, merged, names_here
from fffsweep.sweeps.record import Lease, TrialState, check_extends, load, study_folder
from fffsweep.sweeps.verify import DONE, config_of, examine, project, write_record

SUMS = "SHA256SUMS"  # of the manifests, as `sha256sum --check` reads it


@dataclass(frozen=True)
class Imported:
    """What an import brought. problems: what was left out and why, a line each. renamed: trials that have other names here, likewise."""

    studies: tuple[str, ...]
    num_new: int
    num_known: int
    num_absent: int
    problems: tuple[str, ...]
    renamed: tuple[str, ...] = ()


def export_results(name: str, results: Path, folder: Path, without_weights: bool = False) -> int:
    """Write a study's record and results to `folder`, which `import_results` reads. Returns how many stage runs it holds.

    With `without_weights` tensors and prepared data stay behind and the manifests say so. Raises ConfigError if there is no such
    study, the folder is not empty or a result is damaged.
    """
    stored = load(study_folder(results, name))
    if stored is None:
        raise ConfigError(f"study {name!r}: there is none under {results / 'studies'}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: expected a new or empty folder")
    source, target = open_store(results / "store"), Store(folder / "store")
    keys = list(dict.fromkeys(stage["key"] for trial in stored["trials"] for stage in trial["stages"]))
    sums = []
    for key in filter(source.has, keys):
        manifest, wrong, is_damaged = examine(source, key)
        if wrong and is_damaged:
            raise ConfigError(f"{wrong[0]}; fffsweep verify {name} --repair withdraws it, and the sweep makes it anew")
        if manifest is None:
            raise ConfigError(wrong[0])
        left = {n for n, artifact in manifest.artifacts.items() if artifact.absent or (without_weights and is_weight(n))}
        artifacts = {n: replace(artifact, absent=n in left) for n, artifact in manifest.artifacts.items()}
        target.adopt(
            replace(manifest, artifacts=artifacts), {a.sha256: source.read(manifest, n) for n, a in artifacts.items() if not a.absent}
        )
        path = target.manifest_path(key)
        sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    (folder / SUMS).write_text("".join(sums))
    record = study_folder(folder, name)
    record.mkdir(parents=True)
    for file in ("study.json", DECISIONS):
        if (study_folder(results, name) / file).exists():
            shutil.copyfile(study_folder(results, name) / file, record / file)
    return len(sums)


def import_results(folder: Path, results: Path) -> Imported:
    """Merge the results in `folder`, a results folder or an export of one, into `results`.

    Every key is computed again from what the manifest says was run, every artifact is compared with its checksum; what does not fit is
    left out, and said. A study that is here already must be the same but for what may grow; what both have stays as it is here, and a
    searched trial of another point than ours of that name gets another name. MLflow and Optuna are told of every trial as if it had run
    here. Raises ConfigError, before anything is written, if there is nothing to import, another version wrote it, a study is another
    one here, or a driver is at work on it.
    """
    records = {unquote(path.parent.name): path.parent for path in sorted((folder / "studies").glob("*/study.json"))}
    if not records:
        raise ConfigError(f"{folder}: expected a results folder with studies/NAME/study.json, as fffsweep run and export-results leave it")
    studies = {name: stored for name, record in records.items() if (stored := load(record)) is not None}
    for name, stored in studies.items():
        check_extends(config_of(stored, records[name]), load(study_folder(results, name)))
    leases: list[Lease] = []
    try:
        leases.extend(Lease(study_folder(results, name)) for name in studies)
        source, target = Store(folder / "store"), open_store(results / "store")
        names = {name: _names_of(stored, records[name], study_folder(results, name)) for name, stored in studies.items()}
        problems: list[str] = []
        num_new = num_known = num_absent = 0
        sums = _sums(folder)
        for key in list(source.keys()):
            manifest, wrong = _examined(source, key, sums)
            problems += wrong
            if manifest is None or wrong:
                continue
            try:
                is_better = _is_better(manifest, target)
            except ForeignManifest as error:
                problems.append(f"{error}; the one here stays")
                continue
            num_absent += sum(artifact.absent for artifact in manifest.artifacts.values())
            if is_better:
                target.forget(key)
                target.adopt(manifest, {a.sha256: source.read(manifest, n) for n, a in manifest.artifacts.items() if not a.absent})
                num_new += 1
            else:
                num_known += 1
        untold = {name: _merge_study(name, stored, records[name], results, target, names[name]) for name, stored in studies.items()}
    finally:
        for lease in leases:
            lease.release()
    if mend := [f"fffsweep verify {shlex.quote(name)} --repair" for name, number in untold.items() if number]:
        raise ConfigError(f"all is imported, but MLflow was not told of {sum(untold.values())} runs: {' and '.join(mend)} tells them")
    renamed = [
        f"{name}: trial {there} of there is {here} here, where that name is another point's"
        for name, both in names.items()
        for there, here in both.changed.items()
    ]
    return Imported(tuple(studies), num_new, num_known, num_absent, tuple(problems), tuple(renamed))


def _names_of(stored: dict[str, Any], there: Path, here: Path) -> Names:
    """What the trials of a record are called here. Raises ConfigError if some cannot be."""
    ours = load(here)
    return names_here(config_of(ours or stored, here), _trials_of(ours), _trials_of(stored), Decisions(here).read())


def _trials_of(stored: dict[str, Any] | None) -> list[TrialState]:
    return [TrialState.from_json(trial) for trial in stored["trials"]] if stored else []


def _merge_study(name: str, stored: dict[str, Any], there: Path, results: Path, store: Store, names: Names) -> int:
    """Returns how many runs MLflow was not told of."""
    folder = study_folder(results, name)
    ours = load(folder)
    config = config_of(ours or stored, folder)
    trials, taken = merged(_trials_of(ours), _trials_of(stored), names, store)
    if ours is None and (there / DECISIONS).exists() and not (folder / DECISIONS).exists():
        shutil.copyfile(there / DECISIONS, folder / DECISIONS)
    decisions = Decisions(folder)
    for decision in list(decisions_of(Decisions(there).read(), list(decisions.read()), names, taken if ours else ())):
        decisions.write(**decision)
    for trial in trials:
        for stage in trial.stages:
            if stage.state in DONE and not store.has(stage.planned.run.key):
                stage.state, stage.duration_s = "waiting", None
        if trial.state == "complete" and trial.stages[-1].state not in DONE:
            trial.state = "waiting"
    untold = project(config, trials, results, store)
    write_record(config, folder, trials, store, float((ours or stored)["created_at"]))
    return untold


def _examined(source: Store, key: str, sums: dict[str, str]) -> tuple[Manifest | None, list[str]]:
    path = source.manifest_path(key)
    expected = sums.get(path.relative_to(source.root.parent).as_posix())
    if expected is not None and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        return None, [f"manifest {path} is damaged: it differs from its checksum in {SUMS}; left out"]
    found = examine(source, key)
    return found.manifest, [f"{problem}; left out" for problem in found.problems]


def _is_better(manifest: Manifest, target: Store) -> bool:
    """Whether a result is new here, was here without bytes that it has, or could not be read here. Raises ForeignManifest."""
    try:
        here = target.get(manifest.key).artifacts
    except (KeyError, DamagedArtifact):
        return True
    return any(artifact.absent and name in manifest.artifacts and not manifest.artifacts[name].absent for name, artifact in here.items())


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def to_lines(imported: Imported) -> list[str]:
    """For reading."""
    absent = f", {imported.num_absent} artifacts left behind where they were made" if imported.num_absent else ""
    whole = f"{', '.join(imported.studies)}: {imported.num_new} stage runs imported, {imported.num_known} were here already{absent}"
    return [*imported.problems, *imported.renamed, whole]
