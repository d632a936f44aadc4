"""Secrets come from the environment or from files, and nothing that is shown or stored has them."""

import pytest

from fffsweep.pipeline.secrets import mask, setting
from fffsweep.pipeline.tracked_run import failed_stage, open_trial


@pytest.mark.parametrize(
    ("shown", "masked"),
    [
        ("postgresql://me:s3same@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("cannot reach postgresql+psycopg://me:p%40ss@db/x now", "cannot reach postgresql+psycopg://me:***@db/x now"),
        ("http://:token123@host", "http://:***@host"),
        ("s3://b/f?access_key=AKIA1&secret_key=abc/def&scheme=http", "s3://b/f?access_key=***&secret_key=***&scheme=http"),
        ("dbname=x password=hunter2 host=db", "dbname=x password=*** host=db"),
        ("http://host:5000/path and time 12:30@noon", "http://host:5000/path and time 12:30@noon"),
        ("sqlite:///results/mlflow.db", "sqlite:///results/mlflow.db"),
    ],
)
def test_addresses(shown, masked):
    assert mask(shown) == masked


def test_what_the_environment_holds_is_masked_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("FFFSWEEP_OPTUNA_URL", "postgresql://me:open%20sesame@db/x")
    assert mask("key wJalrXUtnFEMI, password open sesame, open%20sesame") == "key ***, password ***, ***"


def test_a_setting_comes_from_a_file_as_well(tmp_path, monkeypatch):
    assert setting("FFFSWEEP_TEST") is None
    (tmp_path / "secret").write_text("value\n")
    monkeypatch.setenv("FFFSWEEP_TEST_FILE", str(tmp_path / "secret"))
    assert setting("FFFSWEEP_TEST") == "value"
    monkeypatch.setenv("FFFSWEEP_TEST", "other")
    with pytest.raises(ValueError, match="both set"):
        setting("FFFSWEEP_TEST")
    monkeypatch.delenv("FFFSWEEP_TEST")
    monkeypatch.setenv("FFFSWEEP_TEST_FILE", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"FFFSWEEP_TEST_FILE=.*cannot be read"):
        setting("FFFSWEEP_TEST")


def test_mlflow_is_never_told(monkeypatch):
    address = "postgresql://me:hunter2hunter2@db/x"
    run = open_trial("1x8", {"path": address, "list": [address]}, {"note": address})
    failed = failed_stage("1x8", "prepare", "k", f"cannot connect to {address}")
    for text in (*run.params.values(), *run.all_tags.values(), *failed.all_tags.values()):
        assert "hunter2" not in text
    assert failed.all_tags["error"] == "cannot connect to postgresql://me:***@db/x"
