"""Studies that the dashboards' tests look at, generated once a session."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fffsweep.dashboards.queries import load_study


def load_generator():
    """The module `generated.py` beside this file."""
    spec = importlib.util.spec_from_file_location("generated_studies", Path(__file__).with_name("generated.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def generated():
    return load_generator()


@pytest.fixture(scope="session")
def results(tmp_path_factory, generated):
    """Results folder with a whole study, a single-replicate one that learned nothing, one half done, and one with an evil name."""
    folder = tmp_path_factory.mktemp("results")
    generated.generate(folder, "whole")
    few = {"layouts": ("512x0", "34x3", "8x5", "1x8"), "controls": ("reference_dense(512)", "none", "dense_active(1x8)")}
    generated.generate(folder, "single", **few, replicates=1, learned=False, points=((128, "cold"),))
    generated.generate(folder, "half", finished=4)
    generated.generate(folder, EVIL, layouts=("512x0", "1x8"), controls=("reference_dense(512)",), replicates=2)
    generated.generate(folder, "fresh", layouts=("512x0", "1x8"), controls=("reference_dense(512)",), finished=0)
    return folder


EVIL = "<script>alert('evil')</script> & \"$~^_#%\\/.."


@pytest.fixture(scope="session")
def evil():
    return EVIL


@pytest.fixture(scope="session")
def whole(results):
    return load_study(results, "whole")


@pytest.fixture(scope="session")
def single(results):
    return load_study(results, "single")


@pytest.fixture(scope="session")
def half(results):
    return load_study(results, "half")


@pytest.fixture(scope="session")
def fresh(results):
    return load_study(results, "fresh")
