"""Source `directory`: which files below a folder hold the text and the tasks. Reads no rows; `tables` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fffsweep.pipeline.data.tables import KINDS, DataFile
from fffsweep.pipeline.stages.prepare import CustomTask, PrepareConfig
from fffsweep.pipeline.tasks import Task

# GLUE as its own download has it: folder, and our columns by theirs, or by position where there is no header
_CLASSIC: dict[str, tuple[str, dict[str, str | int]]] = {
    "cola": ("CoLA", {"label": 1, "sentence": 3}),
    "sst2": ("SST-2", {}),
    "mrpc": ("MRPC", {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}),
    "stsb": ("STS-B", {"label": "score"}),
    "qqp": ("QQP", {"label": "is_duplicate"}),
    "mnli": ("MNLI", {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}),
    "qnli": ("QNLI", {}),
    "rte": ("RTE", {}),
    "wnli": ("WNLI", {}),
}
_PARENTS = ("glue", "tasks", ".")
_KINDS_TO_READ = ", ".join(KINDS)


@dataclass(frozen=True)
class CorpusFiles:
    """train: text to learn from; validation: files called `validation`, `validation-...` or `validation_...`, held out whole."""

    train: tuple[DataFile, ...]
    validation: tuple[DataFile, ...]
    ignored: tuple[str, ...]


def corpus_files(config: PrepareConfig) -> CorpusFiles:
    """Files of the corpus, in the order of their names. Raises ValueError if there are none."""
    root = _folder(config.path or "", "path")
    found: dict[Path, None] = {}
    ignored = []
    for entry in config.corpus or ("corpus",):
        paths = list(_paths(root, entry))
        if not paths:
            there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
            raise ValueError(f"corpus: {entry!r} is not in {config.path}, which holds {there}; expected a file, folder or pattern below it")
        for path in paths:
            if path.suffix.lower() in KINDS:
                found[path] = None
            else:
                ignored.append(path.relative_to(root).as_posix())
    if not found:
        raise ValueError(f"corpus: no text in {config.path} ({', '.join(ignored[:8])}); expected files ending in {_KINDS_TO_READ}")
    files = [DataFile(path, path.relative_to(root).as_posix()) for path in found]
    train = tuple(file for file in files if not _is_validation(file.path))
    if not train:
        raise ValueError(f"corpus: {config.path} holds files for validation only ({files[0].name}); expected text to train on beside them")
    return CorpusFiles(train, tuple(file for file in files if _is_validation(file.path)), tuple(ignored))


def task_files(config: PrepareConfig) -> dict[str, dict[str, list[DataFile]]]:
    """task -> split -> files, for every task that is read from files. Raises ValueError if a folder or a split is missing."""
    found = {}
    for entry, task in zip(config.tasks, config.task_list, strict=True):
        if isinstance(entry, CustomTask):
            found[task.name] = _splits(_folder(entry.path, f"path of task {task.name}"), task, task.name)
        elif config.source == "directory":
            found[task.name] = _built_in(_folder(config.path or "", "path"), task)
    return found


def _built_in(root: Path, task: Task) -> dict[str, list[DataFile]]:
    classic, columns = _CLASSIC[task.name]
    names = {task.name.lower(), classic.lower()}
    for parent in (root / name for name in _PARENTS if (root / name).is_dir()):
        for folder in sorted(path for path in parent.iterdir() if path.is_dir() and path.name.lower() in names):
            name = folder.relative_to(root).as_posix()
            if (folder / "train.tsv").exists() and (folder / _classic_file(task.validation_splits[0])).exists():
                files = {split: folder / _classic_file(split) for split in ("train", *task.validation_splits)}
                return {split: [_existing(path, f"{name}/{path.name}", columns)] for split, path in files.items()}
            return _splits(folder, task, name)
    looked = ", ".join(f"{parent}/{task.name}" for parent in _PARENTS[:2])
    raise ValueError(f"task {task.name}: no folder of it in {root}; expected {looked}, {task.name} or {classic}")


def _classic_file(split: str) -> str:
    return f"{split.replace('validation', 'dev')}.tsv"


def _existing(path: Path, name: str, columns: dict[str, str | int]) -> DataFile:
    if not path.exists():
        raise ValueError(f"{name}: missing; expected it beside train.tsv, as in GLUE's own download")
    return DataFile(path, name, columns)


def _splits(folder: Path, task: Task, name: str) -> dict[str, list[DataFile]]:
    """Files `<split>.EXT` or `<split>-*.EXT` of each split."""
    kinds = [suffix for suffix in KINDS if KINDS[suffix] != "text"]
    found = {}
    for split in ("train", *task.validation_splits):
        paths = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in kinds and (p.stem == split or p.stem.startswith(f"{split}-"))]
        if not paths:
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"task {task.name}: no {split} split in {folder}, which holds {there}; expected {split}.EXT, EXT one of {', '.join(kinds)}"
            )
        found[split] = [DataFile(path, f"{name}/{path.name}") for path in paths]
    return found


def _folder(path: str, what: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"{what}: {path} is {'not a folder' if folder.exists() else 'missing'}; expected an existing folder, got {folder.absolute()}"
        )
    return folder.resolve()


def _paths(root: Path, entry: str) -> Iterator[Path]:
    """Files of one entry, sorted, hidden ones left out."""
    if Path(entry).is_absolute() or ".." in Path(entry).parts:
        raise ValueError(f"corpus: {entry!r}: expected a file, folder or pattern below path")
    start = root / entry
    candidates = [start] if start.exists() else sorted(root.glob(entry))
    for path in candidates:
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (file for file in inside if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts))


def _is_validation(path: Path) -> bool:
    return path.stem == "validation" or path.stem.startswith(("validation-", "validation_"))
