"""Genuine GLUE and a genuine corpus through source `directory`; and a corpus several times larger than what memory is allowed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fffsweep.pipeline.data import check
from fffsweep.pipeline.data.planning import fingerprint
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.data.rows import BadRows, hold_out, parse_rows
from fffsweep.pipeline.stage import StageContext, get_stage
from fffsweep.pipeline.stages.prepare import PrepareConfig
from fffsweep.pipeline.tasks import GLUE_TASKS, TASKS

DATA = Path(os.environ.get("FFFSWEEP_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
ROWS = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277), "wnli": (635, 71)}


def genuine(**changes):
    return PrepareConfig.model_validate({"source": "directory", "path": str(DATA), "tasks": list(GLUE_TASKS), **changes})


@pytest.mark.shared_data
def test_all_of_glue_passes_planning():
    check(genuine(vocabulary_file=str(DATA / "vocab" / "vocab.txt")))
    assert fingerprint(genuine()) != fingerprint(genuine(corpus=["corpus/train-00000*"]))


@pytest.mark.shared_data
@pytest.mark.slow
def test_genuine_tasks_and_text_are_prepared(tmp_path):
    (tmp_path / "output").mkdir()
    context = StageContext(seed=0, inputs={}, input_metrics={}, output=tmp_path / "output", work=tmp_path / "work")
    settings = genuine(
        tasks=list(ROWS),
        corpus=["corpus/train-00003*", "corpus/validation*"],
        max_corpus_bytes="2M",
        vocabulary_file=str(DATA / "vocab" / "vocab.txt"),
    )
    metrics = get_stage("prepare").run(settings, context)
    data = PreparedData(context.output)
    for name, (num_train, num_validation) in ROWS.items():
        splits = data.task(name).splits
        assert len(splits["train"]) + len(splits["selection"]) == num_train
        assert len(splits["validation"]) == num_validation
        assert len(splits["selection"]) == pytest.approx(num_train / 10, rel=0.05)
        assert all(ids[0] == 101 and ids[-1] == 102 and len(ids) <= 128 for ids in splits["validation"].input_ids)
    assert metrics["data/bad_rows"] == 0
    assert metrics["data/vocabulary_size"] == 30522
    assert data.description()["corpus"]["documents_read"] == 16_218 + 685
    assert data.tokenizer().decode(data.task("rte").splits["validation"].input_ids[0]).startswith("[CLS] dana reeve")


@pytest.mark.shared_data
def test_selection_rows_of_sst2_share_phrases_with_training_rows():
    """What docs/data.md says of them: of rows of five words and more, the share with five in a row that a training row has too."""
    import pyarrow.parquet as pq

    def read(split):
        rows = pq.read_table(DATA / "glue" / "sst2" / f"{split}.parquet").to_pylist()
        return parse_rows(TASKS["sst2"], enumerate(rows, 1), split, BadRows())

    def runs(rows):
        return [{tuple(words[at : at + 5]) for at in range(len(words) - 4)} for (text,) in rows.texts if len(words := text.split()) > 4]

    train, selection = hold_out(read("train"), 0.1, seed=0)
    known = set().union(*runs(train))
    shares = [sum(not known.isdisjoint(each) for each in runs(rows)) / len(runs(rows)) for rows in (selection, read("validation"))]
    print("share of rows with a phrase of the training rows: selection {:.2f}, validation {:.2f}".format(*shares))
    assert shares[0] > 0.95
    assert shares[1] < 0.2


MEASURE = """
import json, re, sys
from pathlib import Path
from fffsweep.pipeline.stage import StageContext, get_stage
from fffsweep.pipeline.stages.prepare import PrepareConfig
root = Path(sys.argv[1])
config = PrepareConfig(source="directory", path=str(root), vocabulary_size=2048)
(root / "output").mkdir()
context = StageContext(seed=0, inputs={}, input_metrics={}, output=root / "output", work=root / "work")
metrics = get_stage("prepare").run(config, context)
# not getrusage: its peak includes the parent's, inherited through the fork
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"rss": peak, **metrics}))
"""


def generate(folder, num_bytes, kind):
    """Text of a fixed vocabulary, no document twice, in one file of the kind."""
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    (folder / "corpus").mkdir(parents=True)
    documents = [" ".join(rng.choices(words, k=300)) for _ in range(num_bytes // 1950)]
    if kind == "parquet":
        pq.write_table(pa.table({"text": documents}), folder / "corpus" / "text.parquet", row_group_size=500)
    else:
        lines = [json.dumps({"text": each}) + "\n" for each in documents] if kind == "jsonl" else [each + "\n\n" for each in documents]
        (folder / "corpus" / f"text.{kind}").write_text("".join(lines))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "allowed"),
    [
        ("txt", 8_000_000, 16_000_000),
        pytest.param("jsonl", 8_000_000, 16_000_000, marks=pytest.mark.integration),
        # read without `datasets`, whose import takes more memory than a batch does: here batches show, by 20 MB from run to run
        pytest.param("parquet", 24_000_000, 32_000_000, marks=pytest.mark.integration),
    ],
)
def test_memory_does_not_grow_with_the_corpus(kind, size, allowed, tmp_path):
    """Ids of what the larger corpus has more take more than the growth that is allowed, its text four times that."""

    figures = []
    for num_bytes in (size, size + 4 * allowed):
        folder = generate(tmp_path / str(num_bytes), num_bytes, kind)
        done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
        figures.append(json.loads(done.stdout.splitlines()[-1]))
    grown = figures[1]["rss"] - figures[0]["rss"]
    ids = 2 * (figures[1]["data/train_tokens"] - figures[0]["data/train_tokens"])
    print(f"{kind}: {[each['rss'] >> 20 for each in figures]} MiB")
    assert ids > allowed
    assert grown < allowed
