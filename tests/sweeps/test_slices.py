"""Slices of a sweep: which trials fit, on which device stages run, and results that travel."""

import json
import shutil

import pytest

from fffsweep.cli import main
from fffsweep.pipeline.stage import Resources, StageRun
from fffsweep.pipeline.store import Store
from fffsweep.sweeps import executors, slices
from fffsweep.sweeps.book import Book
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.executors import InlineExecutor
from fffsweep.sweeps.graph import build
from fffsweep.sweeps.slices import InlineOptions, Slice
from fffsweep.sweeps.space import expand
from tests.sweeps.conftest import CONFIG, write_data


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def book(tiny_directory_config, tmp_path):
    book = Book(Store(tmp_path / "store"), [])
    for plan in build(tiny_directory_config, expand(tiny_directory_config)):
        book.adopt(plan)
    return book


def end(book, trial):
    for key in book.needed(trial):
        book.set_state(key, "complete")
    trial.state = "complete"


def slice_of(minutes, tmp_path, clock):
    return Slice(InlineOptions(slice_minutes=minutes), Store(tmp_path / "store"), clock)


def test_trials_are_begun_while_they_fit(book, tmp_path, monkeypatch):
    clock = Clock()
    seconds = {"pretrain": 100.0, "prepare": 50.0}
    monkeypatch.setattr(slices.History, "median", lambda self, run: (seconds.get(run.stage, 1.0), 0, ""))
    part = slice_of(5, tmp_path, clock)
    first = part.next(book)
    assert first.plan.spec.id == book.trials[0].plan.spec.id == "15x0"
    assert part.next(book) is None  # one at a time
    assert not part.is_over
    end(book, first)
    clock.now_s = 153.0
    second = part.next(book)  # what they share is there: 103 s fit into 147
    assert second.plan.spec.id == "1x3"
    end(book, second)
    clock.now_s = 256.0
    assert part.next(book) is None
    assert part.is_over
    assert (part.remainder(book).trials, part.remainder(book).hindrance) == (("none",), None)


def test_a_trial_of_which_nothing_is_known_is_begun_only_first(book, tmp_path):
    part = slice_of(0.01, tmp_path, Clock())
    first = part.next(book)
    end(book, first)
    assert part.next(book) is None
    assert part.is_over


def test_times_of_other_machines_do_not_count(swept, tiny_directory_config, monkeypatch):
    store = Store(swept / "store")
    run = next(stage.run for plan in build(tiny_directory_config, expand(tiny_directory_config)) for stage in plan.stages)
    assert slices.History(store, slices.machine_fingerprint()).median(run) is not None
    assert slices.History(store, "another").median(run) is None


@pytest.mark.parametrize(
    ("options", "executor", "message"),
    [
        (InlineOptions(device="cpu"), "ray", "--device with executor ray"),
        (InlineOptions(only=("1x3",)), "ray", "--only with executor ray"),
        (InlineOptions(slice_minutes=0), "inline", "--slice-minutes 0: expected more than 0"),
        (InlineOptions(slice_minutes=float("nan")), "inline", "--slice-minutes nan: expected more than 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(tiny_directory_config, options, executor, message):
    with pytest.raises(ConfigError, match=message):
        options.check(tiny_directory_config, executor)


def test_a_device_that_is_not_there_is_refused(tiny_directory_config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device cuda: torch .* finds no CUDA device.*give --device cpu"):
        InlineOptions(device="cuda").check(tiny_directory_config, "inline")


@pytest.mark.parametrize(
    ("device", "stage", "gpus", "expected"),
    [
        ("cuda", "pretrain", 0, "cuda"),
        ("cuda", "finetune", 0, "cuda"),
        ("cuda", "rung", 0, "cuda"),
        ("cuda", "collect", 0, "cpu"),
        ("cpu", "pretrain", 1, "cpu"),
        ("cpu", "benchmark_gpu", 1, "cuda"),
        (None, "pretrain", 1, "cuda"),
        (None, "pretrain", 0, "cpu"),
    ],
)
def test_stages_that_can_run_on_a_gpu_follow_the_device(tmp_path, monkeypatch, device, stage, gpus, expected):
    seen = []
    monkeypatch.setattr(executors, "attempt", lambda run, store, report, stop, device, claim: seen.append(device))
    executor = InlineExecutor(Store(tmp_path), lambda: False, lambda event: None, device=device)
    executor.submit(StageRun(stage, 1, {}, 0), Resources(gpus=gpus))
    executor.wait(0)
    assert seen == [expected]


@pytest.mark.integration
def test_slices_are_merged_elsewhere_and_reported(tmp_path, monkeypatch, capfd, empty_mlflow):
    def fffsweep(*arguments, code=0):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        told = "".join(capfd.readouterr())
        assert ended.value.code == code, told
        return told

    monkeypatch.chdir(tmp_path)
    for folder in ("results", "elsewhere"):
        (tmp_path / folder).mkdir()
        shutil.copyfile(empty_mlflow, tmp_path / folder / "mlflow.db")
    write_data(tmp_path)
    (tmp_path / "sliced.yaml").write_text(CONFIG.replace("PATH", str(tmp_path)).replace("tiny-directory", "sliced"))
    run = ("run", "sliced.yaml", "--executor", "inline", "--device", "cpu")
    assert "expected one of 1x3, 15x0, none" in fffsweep(*run, "--only", "1x4", code=2)
    assert "2 trials are left: 1x3, none\nThe same command goes on from here." in fffsweep(*run, "--slice-minutes", "0.0001")
    assert "nothing was begun: trial 1x3 takes about" in fffsweep(*run, "--slice-minutes", "0.0001", code=2)
    assert "1 trials are left: none" in fffsweep(*run, "--only", "1x3", "--slice-minutes", "30")
    fffsweep("export-results", "sliced", "first", "--without-weights")
    fffsweep("import", "first", "--results", "elsewhere")
    assert states(fffsweep("results", "sliced", "--format", "json", "--results", "elsewhere")) == {"15x0", "1x3"}
    assert "sliced complete" in fffsweep(*run, "--slice-minutes", "30")
    fffsweep("export-results", "sliced", "second", "--without-weights")
    fffsweep("import", "second", "--results", "elsewhere")
    assert states(fffsweep("results", "sliced", "--format", "json", "--results", "elsewhere")) == {"15x0", "1x3", "none"}
    fffsweep("report", "sliced", "--format", "md", "--results", "elsewhere", "--output", tmp_path / "report.md")
    report = (tmp_path / "report.md").read_text()
    assert all(trial in report for trial in ("15x0", "1x3", "none"))


def states(table):
    return {row["trial"] for row in json.loads(table)["trials"] if row["state"] == "complete"}
