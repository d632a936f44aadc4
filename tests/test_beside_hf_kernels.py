"""Our `kernels` folder and the Hugging Face package `kernels`, which transformers imports when it finds it, live side by side.

`make test-integration` downloads the package into a folder that only this test puts on the path, named by FFFSWEEP_HF_KERNELS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

CHECKOUT = Path(__file__).resolve().parent.parent

PROGRAM = """
import kernels
assert kernels.__version__ and hasattr(kernels, "get_kernel"), kernels.__file__
assert kernels.__file__.startswith({package!r}), kernels.__file__

import transformers
from transformers.utils.import_utils import is_kernels_available
model = transformers.BertModel(transformers.BertConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100))

import torch
states = model(torch.zeros(1, 4, dtype=torch.long)).last_hidden_state
assert states.shape == (1, 4, 32)

from fffsweep.kernels.cmm import cmm
from fffsweep.kernels.shape import TreeShape
shape = TreeShape(2, 3)
x, w_in, w_out = torch.randn(5, 32), torch.randn(2, shape.nodes, 32), torch.randn(2, shape.nodes, 32)
assert cmm(x, w_in, None, w_out, shape, "gelu").shape == (5, 32)

import fffsweep.kernels
assert fffsweep.kernels is not kernels and not hasattr(fffsweep.kernels, "__version__")
print("in use by transformers:", is_kernels_available())
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the folder that holds the Hugging Face package."""
    folder = os.environ.get("FFFSWEEP_HF_KERNELS")
    if folder is None:
        pytest.skip("FFFSWEEP_HF_KERNELS names no folder; make test-integration makes one")
    return Path(shutil.copytree(CHECKOUT / folder, tmp_path / "packages"))


def run(package: Path) -> str:
    """Output of PROGRAM, started in the checkout as a console script is: `-P` keeps the working folder off the path."""
    program = PROGRAM.format(package=str(package))
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_both_work_in_one_process(package: Path) -> None:
    run(package)


def test_both_work_where_transformers_takes_the_package(package: Path) -> None:
    """transformers takes versions of one range only; the package is given the lowest of it, so that it is imported for certain."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (metadata,) = package.glob("kernels-*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if line.startswith("Version: "))
    metadata.write_text("\n".join([*lines[:number], f"Version: {KERNELS_MIN_VERSION}", *lines[number + 1 :]]))
    assert "in use by transformers: True" in run(package)
