"""The command line: quick to start, light to import, and true in what it prints."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from fffsweep import cli, doctor
from fffsweep.pipeline.remote_store import RemoteStore, StoreUnreachable
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.config import load_config
from fffsweep.sweeps.controller import Outcome
from fffsweep.sweeps.graph import build
from fffsweep.sweeps.slices import Remainder
from fffsweep.sweeps.space import expand

CHECKOUT = Path(__file__).resolve().parent.parent
TINY = str(CHECKOUT / "sweeps" / "tiny.yaml")
COMMANDS = ["doctor", "data", "plan", "run", "results", "pareto", "report", "ui", "bench", "schema"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys):
    """Runs a command that must succeed; its standard output."""

    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert exit_.value.code == code, out + err
        return out

    return run


SEEING_MODULES = "import sys; from fffsweep.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules, file=sys.stderr)"


def process(*arguments):
    """Standard output of a command in a process of its own, and the modules that it imported."""
    ended = subprocess.run([sys.executable, "-P", "-c", SEEING_MODULES, *arguments], capture_output=True, text=True, timeout=60, check=True)
    return ended.stdout, set(ended.stderr.split())


def test_help_lists_the_commands_within_a_second():
    def seconds():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime  # of processors, so that a busy machine does not count

    before = seconds()
    text, modules = process("--help")
    assert 0 < seconds() - before < 1.0
    for name in COMMANDS:
        assert f"  {name} " in text
    assert not {"torch", "ray", "mlflow", "optuna", "pyarrow"} & modules


def test_planning_needs_neither_torch_nor_ray_nor_mlflow(here):
    text, modules = process("plan", TINY)
    assert not {"torch", "ray", "mlflow", "optuna", "transformers", "datasets"} & modules
    assert "study tiny: 5 trials" in text
    assert list(here.iterdir()) == []


def test_version_and_bare_call(command):
    assert command("--version").startswith("fffsweep ")
    assert "Commands:" in command()


@pytest.mark.parametrize("suite", [["--suite", "model"], ["--suite=model"]])
def test_a_suite_may_be_named_either_way(command, suite):
    assert "usage: fffsweep bench --suite model" in command("bench", *suite, "--help")
    assert "fffsweep bench --suite model --help" in command("bench", "--help"), "the kernels' help tells of the other suites"


def test_plan_says_what_is_cached_and_measured(command, here):
    before = json.loads(command("plan", TINY, "--json"))
    assert before["schema"] == "fffsweep.plan/1"
    assert before["is_new"]
    stages = {stage["stage"]: stage for stage in before["stages"]}
    assert {name: stage["num_runs"] for name, stage in stages.items()} == {
        "prepare": 1,
        "pretrain": 5,
        "finetune": 10,
        "benchmark_cpu": 5,
        "collect": 5,
    }
    assert all(stage["num_cached"] == 0 and "guess" in stage["basis"] for stage in stages.values())
    assert [trial["trial"] for trial in before["trials"]] == ["60x0", "4x3", "none", "dense_active(4x3)", "random_routing(4x3)"]

    planned = build(load_config(TINY), expand(load_config(TINY)))
    store, output = Store(here / "results" / "store"), here / "output"
    output.mkdir()
    (output / "file").write_bytes(b"x" * 1_000_000)
    for stage in planned[0].stages[:2]:
        store.publish(stage.run, {"some": 1.0}, output, {}, 0.0, 7.0)
    after = json.loads(command("plan", TINY, "--json"))
    stages = {stage["stage"]: stage for stage in after["stages"]}
    assert (stages["prepare"]["num_cached"], stages["pretrain"]["num_cached"]) == (1, 1)
    assert stages["pretrain"]["basis"] == "1 earlier run"
    assert stages["pretrain"]["seconds"] == pytest.approx(4 * 7.0)
    assert stages["pretrain"]["num_bytes"] == pytest.approx(4 * 1_000_000)
    assert after["trials"][0]["num_cached"] == 2
    assert after["trials"][1]["num_cached"] == 1
    doubled = json.loads(command("plan", TINY, "--json", "--set", "stages.pretrain.tokens=40k"))
    assert {s["stage"]: s["seconds"] for s in doubled["stages"]}["pretrain"] == pytest.approx(5 * 14.0)  # time grows with the budget
    assert "1 earlier run" in command("plan", TINY)


def test_plan_of_a_finished_study(command, here):
    store = Store(here / "results" / "store")
    (here / "nothing").mkdir()
    for trial in build(load_config(TINY), expand(load_config(TINY))):
        for stage in trial.stages:
            store.publish(stage.run, {"some": 1.0}, here / "nothing", {}, 0.0, 1.0)
    text = command("plan", TINY)
    assert "everything is cached: nothing to run" in text


def test_schema_is_the_schema_of_configs(command):
    schema = json.loads(command("schema"))
    jsonschema.validate(yaml.safe_load(Path(TINY).read_text()), schema)


def test_the_config_in_the_docs_is_one(here):
    text = (CHECKOUT / "docs" / "config.md").read_text()
    first, second = (block.split("```")[0] for block in text.split("```yaml\n")[1:3])
    (here / "docs.yaml").write_text(f"{first}\n{second}")
    config = load_config(here / "docs.yaml")
    assert config.name == "my_sweep"
    assert config.stages.pretrain.tokens == 4_000_000
    assert len(expand(config)) == 6


def test_data_info_names_both_licences(command, here, monkeypatch):
    monkeypatch.setenv("FFFSWEEP_CACHE", str(here / "cache"))
    entries = json.loads(command("data", "info", "--json"))
    assert len(entries) >= 4
    text = command("data", "info")
    for entry in entries:
        assert entry["package"] in text
        assert entry["package_licence"]
        assert entry["texts"]
        assert not entry["fetched"]
    assert not (here / "cache").exists()


def test_doctor_reports_and_touches_nothing(command, here, monkeypatch):
    monkeypatch.setenv("FFFSWEEP_CACHE", str(here / "cache"))
    answer = json.loads(command("doctor", "--json"))
    subjects = {finding["subject"] for finding in answer["findings"]}
    assert subjects >= {
        "Python",
        "processor",
        "instruction sets",
        "memory",
        "disk",
        "GPU",
        "C++ compiler",
        "native kernels",
        "ray",
        "mlflow",
        "optuna",
    }
    assert answer["ok"]
    text = command("doctor")
    assert "fffsweep data fetch" in text
    assert list(here.iterdir()) == []


def test_doctor_fails_where_something_essential_is_missing(command, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in ("torch", "ray") else "1")
    lines = command("doctor", code=1).splitlines()
    (torch,) = [line for line in lines if line.split()[1] == "torch"]
    (ray,) = [line for line in lines if line.split()[1] == "ray"]
    assert torch.startswith("LACK")
    assert "pip install torch" in torch
    assert ray.startswith("note")
    assert "--executor inline" in ray


def test_doctor_says_how_native_calls_become_direct(command, monkeypatch):
    monkeypatch.setattr("fffsweep.kernels.library.is_called_directly", lambda: False)
    (line,) = [line for line in command("doctor").splitlines() if "native calls" in line]
    assert line.startswith("note")
    assert "through torch.ops" in line
    assert "python3-dev" in line


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    for function, error in ((lambda: json.loads("{"), json.JSONDecodeError), (lambda: {}["absent"], KeyError)):
        monkeypatch.setattr("fffsweep.sweeps.schema.sweep_schema", function)
        with pytest.raises(error):
            cli.main(["schema"])


def test_a_store_that_cannot_be_reached_is_one_line(here, monkeypatch, capsys):
    monkeypatch.setenv("FFFSWEEP_STORE", here.as_uri())
    monkeypatch.setattr(RemoteStore, "keys", lambda self: (_ for _ in ()).throw(StoreUnreachable("FFFSWEEP_STORE=s3://b: no answer")))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", TINY])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "FFFSWEEP_STORE=s3://b: no answer; mend the address, the keys or the server, then try again\n"


def test_a_part_of_a_sweep_names_the_trials_that_failed(here, capsys):
    outcome = Outcome("complete", 3, 0, ("1x8",), 1.0, Remainder(("none",)))
    assert cli._tell("study", here, outcome) == 1
    out, err = capsys.readouterr()
    assert "1 trials are left: none" in out
    assert err.startswith("failed: 1x8;")


def test_a_study_may_be_named_by_its_config(command, monkeypatch):
    asked = []
    monkeypatch.setattr("fffsweep.dashboards.queries.load_study", lambda results, name: asked.append((str(results), name)))
    monkeypatch.setattr("fffsweep.dashboards.formats.pareto_table", lambda view, out: None)
    command("pareto", TINY, "--results", "elsewhere")
    command("pareto", "some study")
    assert asked == [("elsewhere", "tiny"), ("results", "some study")]
