"""The cluster recipes of docs/cluster: valid by the schema of what reads them, pinned, and in words of the command line that exist."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from fffsweep.cli import app

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPES = CHECKOUT / "docs" / "cluster"


def rayjob():
    return next(document for document in yaml.safe_load_all((RECIPES / "rayjob.yaml").read_text()) if document["kind"] == "RayJob")


def whole_crd(path):
    """Schema of a RayJob out of KubeRay's CustomResourceDefinition; unknown settings are refused, as the API server does when strict."""

    def closed(value):
        if isinstance(value, list):
            return [closed(each) for each in value]
        if not isinstance(value, dict):
            return value
        if value.get("x-kubernetes-int-or-string"):
            return {"type": ["integer", "string"]}
        value = {name: closed(each) for name, each in value.items()}
        if value.get("type") == "object" and isinstance(value.get("properties"), dict):
            value.setdefault("additionalProperties", False)
        return value

    versions = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    schema = closed(next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"))
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def schemas():
    yield json.loads((CHECKOUT / "tests" / "data" / "rayjob_v1.json").read_text())
    if os.environ.get("FFFSWEEP_RAYJOB_CRD"):
        yield whole_crd(os.environ["FFFSWEEP_RAYJOB_CRD"])


def test_the_rayjob_is_one_by_its_definition():
    for schema in schemas():
        assert [error.message for error in Draft7Validator(schema).iter_errors(rayjob())] == []


@pytest.mark.parametrize("fault", [{"entrypont": "x"}, {"backoffLimit": "three"}, {"rayClusterSpec": {}}])
def test_a_wrong_rayjob_is_found_wrong(fault):
    wrong = rayjob()
    wrong["spec"] |= fault
    for schema in schemas():
        assert list(Draft7Validator(schema).iter_errors(wrong))


def test_the_rayjob_asks_for_a_token_and_its_versions_are_ours():
    cluster = rayjob()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}" in (CHECKOUT / "constraints.txt").read_text().splitlines()
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups["bench"]["labels"] == {"role": "bench"}
    pod = groups["train"]["template"]["spec"]
    drain = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    assert int(drain) < pod["terminationGracePeriodSeconds"]


def test_times_that_the_rayjob_s_head_plans_can_be_taken_on_its_node_for_timings():
    """The number of processors and the names of GPUs are part of what times are filed under."""
    cluster = rayjob()["spec"]["rayClusterSpec"]
    bench = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "bench")
    asked = [group["template"]["spec"]["containers"][0]["resources"] for group in (cluster["headGroupSpec"], bench)]
    for each in asked:
        assert each["requests"] == each["limits"]  # else the pod gets no processors of its own, and sees all of its node
    head, timed = ({name: amount for name, amount in each["limits"].items() if name != "memory"} for each in asked)
    assert head == timed


def test_the_file_for_ray_up_is_one_by_ray_s_own_schema():
    spec = importlib.util.find_spec("ray")
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((RECIPES / "ray_up.yaml").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(config)] == []
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
    assert list(Draft7Validator(schema).iter_errors({**config, "min_workers": 2}))


def test_the_slurm_script_parses_and_keeps_its_token_to_itself():
    script = (RECIPES / "slurm.sh").read_text()
    assert subprocess.run(["bash", "-n", str(RECIPES / "slurm.sh")], capture_output=True).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", script, re.MULTILINE))
    assert options["nodes"] == "3"
    assert options["signal"] == "B:TERM@120"
    assert "echo" not in script


def test_the_container_is_pinned():
    lines = (RECIPES / "Containerfile").read_text().splitlines()
    base = next(line.split()[1] for line in lines if line.startswith("FROM"))
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w-]+", base)
    installs = " ".join(lines).replace("\\", "").split("pip install")[1:]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)
    for source in (word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]):
        assert (CHECKOUT / source).exists(), source


def commands():
    """Every `fffsweep ...` line of the recipes and of docs/cluster.md."""
    for path in (*RECIPES.iterdir(), CHECKOUT / "docs" / "cluster.md"):
        text = path.read_text().replace("\\\n", " ")
        for found in re.findall(r"^(?:\$ |.*\.venv/bin/|\s*entrypoint: )?(fffsweep [a-z][^|;&#`\n]*)$", text, re.MULTILINE):
            yield path.name, found.strip()
        for found in re.findall(r'"\$fffsweep" ([^\\\n&]*)', text):
            yield path.name, f"fffsweep {found.strip()}"


def test_every_command_exists_with_its_options():
    import typer

    seen = 0
    for name, line in commands():
        words, command = shlex.split(line, comments=True)[1:], typer.main.get_command(app)
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, f"{name}: {line}"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        mine = words[: words.index("--")] if "--" in words else words
        unknown = [word for word in mine if word.startswith("-") and word.partition("=")[0] not in known]
        assert not unknown, f"{name}: {line}: {unknown}"
        seen += 1
    assert seen >= 12
