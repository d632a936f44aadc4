"""A stage whose source changed must change its version, else results of the old source would pass for results of the new one.

`make record-stages` writes stage_versions.json anew. It refuses a changed source under an unchanged version, unless it is told
with SAME_RESULT=1 that no result can change, as when code was only moved or renamed.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from pathlib import Path

import pytest

from fffsweep.pipeline.stage import get_stage, stage_names

CHECKOUT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("stage_versions.json")
# What carries configs and results from stage to stage without having a part in what a result is.
CARRIERS = {f"pipeline/{name}.py" for name in ("checkpoint", "lease", "machine", "model_settings", "settings", "stage", "store")}


def meaning(path: Path) -> str:
    """Hash of what a source says: of Python its syntax tree without comments, docstrings and layout, else its bytes."""
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(_plain(ast.parse(path.read_text())).encode()).hexdigest()


def _plain(node: object) -> str:
    """Text of a syntax tree that every supported Python writes alike: fields that are empty are left out."""
    if isinstance(node, list):
        return "[" + ",".join(map(_plain, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    kept = [f"{name}={_plain(value)}" for name, value in fields.items() if value not in (None, [])]
    return f"{type(node).__name__}({','.join(kept)})"


def sources(name: str) -> list[str]:
    """Files that a stage's result depends on, relative to the checkout: its module, then those it declares."""
    stage = type(get_stage(name))
    module = Path(inspect.getfile(stage)).resolve()
    files = [module]
    for pattern in stage.sources:
        found = sorted(path for path in CHECKOUT.glob(pattern) if path.is_file())
        if not found:
            raise ValueError(f"stage {name} declares {pattern!r}: there is no such file; sources are paths from the checkout's top")
        files += found
    return list(dict.fromkeys(path.relative_to(CHECKOUT).as_posix() for path in files))


def state(name: str) -> dict[str, object]:
    return {"version": get_stage(name).version, "sources": {path: meaning(CHECKOUT / path) for path in sources(name)}}


def changes(recorded: dict[str, str], present: dict[str, str]) -> list[str]:
    """Sources that differ, with how."""
    told = [f"{path} changed" for path in present if path in recorded and recorded[path] != present[path]]
    told += [f"{path} was added" for path in present if path not in recorded]
    return told + [f"{path} is gone" for path in recorded if path not in present]


def complaint(name: str, recorded: dict, present: dict) -> str | None:
    """What is wrong with a stage beside its record, or None."""
    told = "; ".join(changes(recorded["sources"], present["sources"]))
    if recorded["version"] != present["version"]:
        return f"stage {name} is version {present['version']}, {TABLE.name} says {recorded['version']}: run make record-stages"
    if told:
        return (
            f"stage {name} is still version {present['version']}, but {told}: raise its version and run make record-stages "
            "(or, if no result can change, make record-stages SAME_RESULT=1)"
        )
    return None


@pytest.mark.parametrize("name", stage_names())
def test_sources_are_those_of_the_recorded_version(name: str) -> None:
    table = json.loads(TABLE.read_text())
    assert name in table, f"stage {name} is not in {TABLE.name}: run make record-stages"
    assert (told := complaint(name, table[name], state(name))) is None, told


@pytest.mark.parametrize("name", stage_names())
def test_every_imported_pipeline_module_is_declared(name: str) -> None:
    """A forgotten source would let its changes pass unseen."""
    declared = set(sources(name))
    waiting, seen = list(declared), set()
    while waiting:
        path = waiting.pop()
        if path in seen | CARRIERS or not path.startswith("pipeline/") or not path.endswith(".py"):
            continue
        seen.add(path)
        waiting += _imported(CHECKOUT / path)
    missing = seen - declared
    assert not missing, f"stage {name} imports {', '.join(sorted(missing))}: add to its `sources`"


def _imported(path: Path) -> list[str]:
    """Pipeline modules that a file imports, without those of other stages, of which only the config can be of use."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = name.removeprefix("fffsweep.").replace(".", "/") + ".py"
            if file.startswith("pipeline/") and not file.startswith("pipeline/stages/") and (CHECKOUT / file).is_file():
                found.append(file)
    return found


@pytest.mark.parametrize(
    ("after", "same"),
    [
        ("# why\nRATE = 1 # now\ndef f( x ):\n    'Doc, reworded.'\n    return x*RATE\n", True),
        ("RATE = 2\ndef f(x):\n    'Doc.'\n    return x * RATE\n", False),
        ("RATE = 1\ndef f(x):\n    'Doc.'\n    return x + RATE\n", False),
        ("RATE = 1\ndef f(y):\n    'Doc.'\n    return y * RATE\n", False),
    ],
    ids=["comments, docstring, layout", "constant", "operator", "name"],
)
def test_meaning(tmp_path: Path, after: str, same: bool) -> None:
    before, changed = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text("RATE = 1\ndef f(x):\n    'Doc.'\n    return x * RATE\n")
    changed.write_text(after)
    assert (meaning(before) == meaning(changed)) == same


def test_complaint_names_the_file_and_the_mend() -> None:
    recorded = {"version": 1, "sources": {"a.py": "1", "b.py": "2"}}
    assert complaint("collect", recorded, recorded) is None
    told = complaint("collect", recorded, {"version": 1, "sources": {"a.py": "1", "b.py": "3"}})
    assert told is not None
    assert "b.py changed" in told
    assert "raise its version" in told
    raised = complaint("collect", recorded, {"version": 2, "sources": {"a.py": "1", "b.py": "3"}})
    assert raised is not None
    assert "run make record-stages" in raised


def record(same_result: bool) -> str | None:
    """Write the table, or say why not."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    present = {name: state(name) for name in stage_names()}
    for name, entry in present.items():
        if name in table and table[name]["version"] == entry["version"] and not same_result:
            told = complaint(name, table[name], entry)
            if told:
                return told
    TABLE.write_text(json.dumps(present, indent=1) + "\n")
    return None


if __name__ == "__main__":
    sys.exit(record("--same-result" in sys.argv[1:]))
