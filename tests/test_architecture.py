"""The arrows between the layers, who may import what, and how large a file may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "pipeline", "sweeps", "dashboards", "fffsweep")
MAX_LINES = 400
DEVICE_CODE = [Path("kernels/gpu") / f"{name}.py" for name in ("device", "walk", "route", "gradients")]
PEER = "sweeps/bench_peer.py"  # another way to do the same, run beside ours for comparison


@dataclass(frozen=True)
class Import:
    """One import statement: the module it names, and whether it runs when the importing module is imported."""

    module: str
    at_import: bool
    line: int
    names: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]


def modules(layer: str) -> list[Path]:
    """Python files of a layer, relative to the checkout; the links below fffsweep/ lead to the other layers and are left out."""
    if layer == "fffsweep":
        return sorted(path.relative_to(CHECKOUT) for path in (CHECKOUT / layer).glob("*.py"))
    return sorted(path.relative_to(CHECKOUT) for path in (CHECKOUT / layer).rglob("*.py"))


def imports(path: Path) -> list[Import]:
    """Every import of a file. Those under `if TYPE_CHECKING:` count as not run."""
    return list(_walk(ast.parse((CHECKOUT / path).read_text()), at_import=True))


def _walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_import, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            if module == "fffsweep":
                yield from (Import(f"fffsweep.{alias.name}", at_import, child.lineno) for alias in child.names)
            else:
                yield Import(module, at_import, child.lineno, tuple(alias.name for alias in child.names))
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(child)
        yield from _walk(child, at_import and not deferred)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


ALL = [(layer, path) for layer in LAYERS for path in modules(layer)]
every_module = pytest.mark.parametrize(("layer", "path"), ALL, ids=[str(path) for _, path in ALL])


def test_every_layer_has_modules() -> None:
    assert {layer for layer, _ in ALL} == set(LAYERS)


@every_module
def test_arrows_point_down(layer: str, path: Path) -> None:
    allowed = {"__version__", *LAYERS[: LAYERS.index(layer) + 1]}
    if layer == "fffsweep":
        allowed |= {module.stem for module in modules("fffsweep")}
    for found in imports(path):
        if found.root == "fffsweep":
            target = [*found.module.split("."), "__version__"][1]
            assert target in allowed, f"{path}:{found.line} imports {found.module}: {layer} may import from {', '.join(sorted(allowed))}"


@every_module
def test_own_modules_go_by_their_full_name(layer: str, path: Path) -> None:
    for found in imports(path):
        assert not found.module.startswith("."), f"{path}:{found.line}: relative import; write fffsweep.{layer}..."
        assert found.root not in LAYERS[:-1], f"{path}:{found.line}: import {found.module}; write fffsweep.{found.module}"


def test_kernels_need_torch_and_numpy_alone() -> None:
    for path in modules("kernels"):
        for found in imports(path):
            if found.root in sys.stdlib_module_names or found.root in ("torch", "numpy", "fffsweep"):
                continue
            lazily = found.root in ("matplotlib", "triton") and not found.at_import
            assert lazily or (found.root == "triton" and path in DEVICE_CODE), (
                f"{path}:{found.line} imports {found.module}: kernels may import torch and numpy; matplotlib and triton inside functions"
            )


def test_device_code_is_imported_lazily() -> None:
    """Triton need not be there to import whatever else the kernels hold."""
    names = {f"fffsweep.kernels.gpu.{path.stem}" for path in [*DEVICE_CODE, Path("launch.py")]}
    launch = Path("kernels/gpu/launch.py")
    for path in set(modules("kernels")) - {*DEVICE_CODE, launch}:
        for found in imports(path):
            whole = {found.module} | {f"{found.module}.{name}" for name in found.names}
            assert not (found.at_import and whole & names), f"{path}:{found.line} imports {found.module} at once"


@pytest.mark.parametrize("package", ["ray", "optuna", "fastapi", "uvicorn", "plotly", "typer"])
def test_pipeline_does_without(package: str) -> None:
    found = [f"{path}:{one.line}" for path in modules("pipeline") for one in imports(path) if one.root == package]
    assert not found


@pytest.mark.parametrize(("package", "layer"), [("mlflow", "pipeline"), ("optuna", "sweeps")])
def test_heavy_packages_have_one_importer(package: str, layer: str) -> None:
    importers = {str(path) for _, path in ALL if any(found.root == package for found in imports(path))}
    assert len(importers) == 1, f"{package} is imported by {', '.join(sorted(importers)) or 'no module'}: expected one module of {layer}/"
    assert importers.pop().startswith(f"{layer}/")


def test_ray_is_known_to_tasks_and_jobs_alone() -> None:
    """`ray_executor` runs tasks, `ray_workers` one of them on several processes.

    `submission` sends jobs. Neither is imported by what may run without Ray until it is asked for."""
    importers = {str(path) for _, path in ALL if any(found.root == "ray" for found in imports(path))}
    assert importers <= {"sweeps/ray_executor.py", "sweeps/ray_workers.py", "sweeps/submission.py", PEER}
    assert "sweeps/ray_executor.py" in importers
    assert not [path for _, path in ALL for found in imports(path) if found.root == "ray" and found.at_import]


def test_mlflow_is_known_to_tracking_alone() -> None:
    assert any(found.root == "mlflow" for found in imports(Path("pipeline/tracking.py")))


@pytest.mark.parametrize("package", ["kernels", "pipeline", "sweeps", "dashboards"])
def test_a_layer_s_own_module_stays_a_docstring(package: str) -> None:
    """A top-level `kernels` that defines anything would pass for the Hugging Face package of that name."""
    body = ast.parse((CHECKOUT / package / "__init__.py").read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, [])) is not None


def test_planning_imports_no_heavy_package() -> None:
    """A dry run must answer at once, and stage modules are imported to plan."""
    program = (
        "import sys\n"
        "from fffsweep.pipeline.stage import get_stage, stage_names\n"
        "for name in stage_names(): get_stage(name)\n"
        "import fffsweep.sweeps.config, fffsweep.sweeps.space, fffsweep.sweeps.graph\n"
        "print(*sorted({'torch', 'transformers', 'datasets', 'ray', 'mlflow', 'optuna', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.split() == []


def text_files() -> list[Path]:
    """Sources, tests and prose of the project."""
    folders = [*LAYERS[:-1], "tests", "docs", ".ci"]
    files = [path for folder in folders for path in (CHECKOUT / folder).rglob("*") if path.is_file()]
    files += [*(CHECKOUT / "fffsweep").glob("*.py"), *(path for path in CHECKOUT.iterdir() if path.is_file())]
    suffixes = {".py", ".cpp", ".h", ".md", ".yaml", ".toml", ".html", ".css", ".js", ".sh", ""}
    return sorted(path for path in files if path.suffix in suffixes and "__pycache__" not in path.parts)


def test_files_stay_small() -> None:
    sources = [path for path in text_files() if path.suffix in {".py", ".cpp", ".h"}]
    large = {str(path.relative_to(CHECKOUT)): n for path in sources if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not large, f"over {MAX_LINES} lines, split them: {large}"


def test_nothing_names_a_place_of_one_machine() -> None:
    places = re.compile("|".join(rf"(?<![\w.*~-])/{name}/" for name in ("work", "root", "opt", "home", "Users")))
    found = [
        f"{path.relative_to(CHECKOUT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if places.search(line)
    ]
    assert not found


def test_readme_names_files_that_exist() -> None:
    """Its tree, its table and its links."""
    text = (CHECKOUT / "README.md").read_text()
    named = set(re.findall(r"`((?:kernels|pipeline|sweeps|dashboards|tests|docs|fffsweep)/[\w./]*)`", text))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
    folder = ""
    for line in text.partition("## The tree")[2].partition("```\n")[2].partition("```")[0].splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
            named.add(folder)
        else:
            named.add(folder + line.split()[0].replace("*.yaml", "quickstart.yaml"))
    assert len(named) > 30
    assert {name for name in named if not (CHECKOUT / name).exists()} == set()
