"""The guard of the gates: a marker that ran nothing fails the session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent / "conftest.py"
CASES = """
import pytest

@pytest.mark.slow
def test_runs():
    pass

@pytest.mark.gpu
def test_skips():
    pytest.skip("no device")

@pytest.mark.postgres
@pytest.mark.skipif(True, reason="no server")
def test_is_left_out():
    pass
"""


@pytest.mark.parametrize(
    ("required", "passes", "says"),
    [
        ([], True, "1 passed"),
        (["slow"], True, "marker slow: 1 ran"),
        (["gpu"], False, "marker gpu: 0 ran, at least one was required"),
        (["postgres"], False, "marker postgres: 0 ran"),
        (["sanitizer"], False, "marker sanitizer: 0 ran"),
        (["slow", "gpu"], False, "marker gpu: 0 ran"),
        (["no_such_marker"], False, "expected a marker of pyproject.toml"),
    ],
)
def test_session_fails_when_a_required_marker_ran_nothing(tmp_path: Path, required: list[str], passes: bool, says: str) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\nmarkers =\n slow\n gpu\n postgres\n sanitizer\n")
    options = [part for name in required for part in ("--require-marker", name)]
    ended = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode == 0) == passes, ended.stdout + ended.stderr
    assert says in ended.stdout + ended.stderr
