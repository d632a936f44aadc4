"""Source `directory`: which files below a folder hold the text and the tasks. Reads no rows; `tables` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fffsweep.pipeline.data.tables import KINDS, DataFile
from fffsweep.pipeline.stages.prepare import CustomTask, PrepareConfig
from fffsweep.pipeline.tasks import AX, Task

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
_CLASSIC_AX = ("diagnostic", "diagnostic.tsv")
_PARENTS = ("glue", "tasks", ".")
_TABLES = [suffix for suffix in KINDS if KINDS[suffix] != "text"]
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


def unlabelled_files(config: PrepareConfig) -> dict[str, dict[str, list[DataFile]]]:
    """task -> test split -> files, for the test splits that are there beside GLUE tasks in a directory."""
    if config.source != "directory":
        return {}
    root = _folder(config.path or "", "path")
    built_in = [task for entry, task in zip(config.tasks, config.task_list, strict=True) if isinstance(entry, str)]
    found = {task.name: {split: _test_split(root, task, split) for split in task.test_splits} for task in built_in}
    return {name: there for name, splits in found.items() if (there := {split: files for split, files in splits.items() if files})}


def _test_split(root: Path, task: Task, split: str) -> list[DataFile]:
    classic, columns = _CLASSIC[task.name]
    if split == AX:
        folder, file, stem = _folder_of(root, {AX, _CLASSIC_AX[0]}), _CLASSIC_AX[1], "test"
    else:
        folder, file, stem = _folder_of(root, {task.name, classic.lower()}), f"{split}.tsv", split
    if folder is None:
        return []
    name = folder.relative_to(root).as_posix()
    if (folder / file).exists() and (split == AX or _is_classic(folder, task)):
        renamed = {ours: theirs for ours, theirs in columns.items() if isinstance(theirs, str)}
        return [DataFile(folder / file, f"{name}/{file}", {**renamed, "idx": "id" if task.name == "qqp" else "index"})]
    return _files_of(folder, stem, name)


def _built_in(root: Path, task: Task) -> dict[str, list[DataFile]]:
    classic, columns = _CLASSIC[task.name]
    folder = _folder_of(root, {task.name, classic.lower()})
    if folder is None:
        looked = ", ".join(f"{parent}/{task.name}" for parent in _PARENTS[:2])
        raise ValueError(f"task {task.name}: no folder of it in {root}; expected {looked}, {task.name} or {classic}")
    name = folder.relative_to(root).as_posix()
    if not _is_classic(folder, task):
        return _splits(folder, task, name)
    files = {split: folder / _classic_file(split) for split in ("train", *task.validation_splits)}
    return {split: [_existing(path, f"{name}/{path.name}", columns)] for split, path in files.items()}


def _folder_of(root: Path, names: set[str]) -> Path | None:
    """The first folder with one of these names, lower-case, where tasks are looked for."""
    for parent in (root / name for name in _PARENTS if (root / name).is_dir()):
        for folder in sorted(path for path in parent.iterdir() if path.is_dir() and path.name.lower() in names):
            return folder
    return None


def _is_classic(folder: Path, task: Task) -> bool:
    return (folder / "train.tsv").exists() and (folder / _classic_file(task.validation_splits[0])).exists()


def _classic_file(split: str) -> str:
    return f"{split.replace('validation', 'dev')}.tsv"


def _existing(path: Path, name: str, columns: dict[str, str | int]) -> DataFile:
    if not path.exists():
        raise ValueError(f"{name}: missing; expected it beside train.tsv, as in GLUE's own download")
    return DataFile(path, name, columns)


def _splits(folder: Path, task: Task, name: str) -> dict[str, list[DataFile]]:
    """Files `<split>.EXT` or `<split>-*.EXT` of each split."""
    found = {}
    for split in ("train", *task.validation_splits):
        found[split] = _files_of(folder, split, name)
        if not found[split]:
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            kinds = ", ".join(_TABLES)
            raise ValueError(
                f"task {task.name}: no {split} split in {folder}, which holds {there}; expected {split}.EXT, EXT one of {kinds}"
            )
    return found


def _files_of(folder: Path, split: str, name: str) -> list[DataFile]:
    paths = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in _TABLES and (p.stem == split or p.stem.startswith(f"{split}-"))]
    return [DataFile(path, f"{name}/{path.name}") for path in paths]


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
