"""Nothing of a store or a config is executed: pickles are refused, YAML makes plain values, names stay names."""

import ast
import pickle
from pathlib import Path

import pytest
import torch

from fffsweep.pipeline.checkpoint import Checkpoints, _digest
from fffsweep.sweeps.yaml_source import ConfigError, read_source

CHECKOUT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "pipeline", "sweeps", "dashboards")


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_checkpoint_is_not_executed(tmp_path, how):
    mark, aside = tmp_path / "executed", tmp_path / "aside"
    if how == "torch":
        torch.save({"step": Evil(mark)}, aside)
    else:
        aside.write_bytes(pickle.dumps(Evil(mark)))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    good = Checkpoints(folder, 60.0)
    good.save(1, {"step": 1})
    aside.replace(folder / f"step-{2:012d}-{_digest(aside)}.pt")  # its checksum is right: whoever writes the file can make it so
    assert good.load() == {"step": 1}
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # the trap works


def test_no_module_unpickles():
    """What reads files: torch.load with weights_only alone, no pickle, no YAML loader that makes objects."""
    calls = []
    for layer in LAYERS:
        for path in (CHECKOUT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                calls.append(name)
                where = f"{path.relative_to(CHECKOUT)}:{node.lineno}"
                assert name not in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "eval", "exec"), where
                if name == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), where
                if name in ("yaml.load", "yaml.load_all"):
                    assert any("Safe" in ast.unparse(argument) for argument in (*node.args, *(k.value for k in node.keywords))), where
                if name.endswith(("np.load", "numpy.load")):
                    assert not any(k.arg == "allow_pickle" for k in node.keywords), where
    assert "torch.load" in calls


def test_yaml_makes_no_objects(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "evil.yaml"
    path.write_text(f'name: !!python/object/apply:pathlib.Path.touch ["{mark}"]\n')
    with pytest.raises(ConfigError):
        read_source(path)
    path.write_text(f'name: !!python/object/apply:os.system ["touch {mark}"]\n')
    with pytest.raises(ConfigError):
        read_source(path)
    assert not mark.exists()
