"""From GLUE's test splits to the files that its server takes: every task, in its own download's layout and in the hub's."""

import json
import random
import shutil

import pytest
import torch

from fffsweep.pipeline.data import check
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.model import FffConfig, FffForMaskedLM
from fffsweep.pipeline.stage import StageContext, get_stage, stage_run
from fffsweep.pipeline.stages.finetune import Finetune, FinetuneConfig
from fffsweep.pipeline.stages.prepare import PrepareConfig
from fffsweep.pipeline.tasks import GLUE_TASKS, TASKS

WORDS = [f"{a}{b}" for a in ("ba", "ri", "mo") for b in ("ka", "lo", "ne", "shi")]
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
# What the server asks for (gluebenchmark.com/faq): names of files, header, labels by name or number.
SERVER = {
    "cola": {"CoLA": ("0", "1")},
    "sst2": {"SST-2": ("0", "1")},
    "mrpc": {"MRPC": ("0", "1")},
    "stsb": {"STS-B": None},
    "qqp": {"QQP": ("0", "1")},
    "mnli": {"MNLI-m": NLI, "MNLI-mm": NLI, "AX": NLI},
    "qnli": {"QNLI": ENTAILMENT},
    "rte": {"RTE": ENTAILMENT},
    "wnli": {"WNLI": ("0", "1")},
}
# Folder; training file; test file: headers as GLUE's download has them, A and B the texts, L the label, N the row's number.
CLASSIC = {
    "cola": ("CoLA", "", "gj04\tL\t\tA", {"test": ("index\tsentence", "N\tA")}),
    "sst2": ("SST-2", "sentence\tlabel", "A\tL", {"test": ("index\tsentence", "N\tA")}),
    "mrpc": (
        "MRPC",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "L\t7\t8\tA\tB",
        {"test": ("index\t#1 ID\t#2 ID\t#1 String\t#2 String", "N\t7\t8\tA\tB")},
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tsentence1\tsentence2\tscore",
        "N\tg\tA\tB\tL",
        {"test": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2", "N\tg\tf\ty\t9\ts\ts\tA\tB")},
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "N\t1\t2\tA\tB\tL",
        {"test": ("id\tquestion1\tquestion2", "N\tA\tB")},
    ),
    "mnli": (
        "MNLI",
        "index\tsentence1\tsentence2\tgold_label",
        "N\tA\tB\tL",
        dict.fromkeys(("test_matched", "test_mismatched"), ("index\tpairID\tsentence1\tsentence2", "N\tp\tA\tB")),
    ),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "N\tA\tB\tL", {"test": ("index\tquestion\tsentence", "N\tA\tB")}),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "N\tA\tB\tL", {"test": ("index\tsentence1\tsentence2", "N\tA\tB")}),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel", "N\tA\tB\tL", {"test": ("index\tsentence1\tsentence2", "N\tA\tB")}),
}
SIZES = {"test": 7, "test_matched": 5, "test_mismatched": 6, "ax": 4}


def texts(count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 6))) for _ in range(count)]


def tsv(header, row, count, seed, labels=("",)):
    """Lines with A, B, L and N filled in."""
    first, second = texts(count, seed), texts(count, seed + 1)
    cells = [{"A": first[number], "B": second[number], "L": labels[number % len(labels)], "N": str(number)} for number in range(count)]
    lines = ["\t".join(cell.get(field, field) for field in row.split("\t")) for cell in cells]
    return "".join(f"{line}\n" for line in ([header] if header else []) + lines)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("\n\n".join(f"{text}." for text in texts(300, 99)))
    return folder


@pytest.fixture(scope="module")
def classic(corpus):
    """All nine tasks as GLUE's download has them, and the diagnostic rows."""
    for name, (folder, header, row, tests) in CLASSIC.items():
        at = corpus / "glue" / folder
        at.mkdir(parents=True)
        labels = TASKS[name].label_names or (("1.5", "4.0", "5.0") if name == "stsb" else ("0", "1"))
        for seed, split in enumerate(("train", *(each.replace("validation", "dev") for each in TASKS[name].validation_splits))):
            (at / f"{split}.tsv").write_text(tsv(header, row, 20, 10 * seed, labels))
        for split, form in tests.items():
            (at / f"{split}.tsv").write_text(tsv(*form, SIZES[split], 50))
    (corpus / "glue" / "diagnostic").mkdir()
    (corpus / "glue" / "diagnostic" / "diagnostic.tsv").write_text(tsv("index\tsentence1\tsentence2", "N\tA\tB", SIZES["ax"], 60))
    return corpus


def prepared(folder, output, tasks=GLUE_TASKS, **settings):
    config = PrepareConfig(source="directory", path=str(folder), tasks=tasks, vocabulary_size=256, sequence_length=16, **settings)
    return run(config, output)


def run(config, output):
    check(config)
    (output / "output").mkdir(parents=True)
    metrics = get_stage("prepare").run(config, StageContext(0, {}, {}, output / "output", output / "work"))
    return output / "output", metrics


@pytest.fixture(scope="module")
def data(classic, tmp_path_factory):
    return prepared(classic, tmp_path_factory.mktemp("prepared"), validation_share=0.2)[0]


@pytest.fixture
def tuned(new_context, tmp_path):
    """Finetunes a model that read nothing on a task; the lines of each file of predictions."""

    def tune(data, task, shift=0.0, **settings):
        torch.manual_seed(0)
        layer = {"variant": "fff", "trees": 1, "depth": 2}
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
        config = FffConfig(vocab_size=len(PreparedData(data).tokenizer()), feedforward=layer, **sizes)
        FffForMaskedLM(config).save_pretrained(tmp_path / "model")
        context = new_context(task, inputs={"prepare": data, "pretrain": tmp_path})
        metrics = Finetune().run(FinetuneConfig(task=task, epochs=1, batch_size=8, **settings), context)
        found = {path.stem: path.read_text().splitlines() for path in (context.output / "predictions").iterdir()}
        return found, metrics

    return tune


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_a_submission_has_the_server_s_files_and_form(task, data, tuned):
    found, _ = tuned(data, task, learning_rate=0.3 if task == "stsb" else 1e-3)
    assert set(found) == {*SERVER[task], *TASKS[task].validation_splits, "selection"}
    for split, name in zip(TASKS[task].test_splits, TASKS[task].submission_names, strict=True):
        header, *lines = found[name]
        assert header == "index\tprediction"
        index, predictions = zip(*(line.split("\t") for line in lines), strict=True)
        assert index == tuple(str(row) for row in range(SIZES[split]))
        allowed = SERVER[task][name]
        assert all(each in allowed if allowed else 0 <= float(each) <= 5 for each in predictions)
    without, _ = tuned(data, task, submission=False)
    assert set(without) == set(found) - set(SERVER[task])


def test_test_rows_are_those_of_the_files(classic, data):
    tokenizer = PreparedData(data).tokenizer()
    tests = PreparedData(data).task("mnli").tests
    assert list(tests) == ["test_matched", "test_mismatched", "ax"]
    for rows, first, second in zip(tests["ax"].input_ids, texts(4, 60), texts(4, 61), strict=True):
        assert tokenizer.decode(rows) == f"[CLS] {first} [SEP] {second} [SEP]"
    described = PreparedData(data).description()
    assert described["tasks"]["mnli"]["ax"]["rows"] == 4
    assert "glue/diagnostic/diagnostic.tsv" in [each["file"] for each in described["read"]]


def test_held_out_sentences_include_those_of_the_test_split(corpus, tmp_path):
    folder = shutil.copytree(corpus / "corpus", tmp_path / "data" / "corpus").parent
    sentence = " ".join(WORDS[:9])
    with (folder / "corpus" / "a.txt").open("a") as file:
        file.write(f"\n\n{WORDS[0]} {sentence}.")
    for split in ("train", "validation"):
        write_jsonl(folder / "sst2" / f"{split}.jsonl", [{"sentence": text, "label": 0} for text in ("ba ka", "ri lo")])
    _, metrics = prepared(folder, tmp_path / "without", ["sst2"], validation_share=0.2)
    assert metrics["data/contaminated"] == 0
    write_jsonl(folder / "sst2" / "test.jsonl", [{"sentence": f"{sentence}.", "label": -1, "idx": 0}])
    _, metrics = prepared(folder, tmp_path / "with", ["sst2"], validation_share=0.2)
    assert metrics["data/contaminated"] == 1


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def schema(folder, test):
    """rte as the hub has it, its test split in two files."""
    for split in ("train", "validation"):
        rows = [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(zip(texts(20, 1), texts(20, 2), strict=True))]
        write_jsonl(folder / "rte" / f"{split}.jsonl", rows)
    for part in (0, 1):
        write_jsonl(folder / "rte" / f"test-0000{part}.jsonl", test[2 * part : 2 * part + 2])
    return folder


ROW = {"sentence1": "ba ka", "sentence2": "ri lo", "label": -1}


@pytest.mark.parametrize(
    ("test", "index"),
    [
        ([ROW, ROW, ROW, ROW], [0, 1, 2, 3]),
        ([{**ROW, "idx": number} for number in (7, 5, 6, 4)], [7, 5, 6, 4]),
        ([ROW, {**ROW, "sentence1": None}, {**ROW, "sentence2": " "}, ROW], [0, 1, 2, 3]),
    ],
    ids=["by place", "by column", "bad rows"],
)
def test_no_row_of_a_test_split_is_lost(test, index, corpus, tmp_path, tuned):
    folder = schema(shutil.copytree(corpus / "corpus", tmp_path / "data" / "corpus").parent, test)
    data, metrics = prepared(folder, tmp_path / "run", ["rte"], validation_share=0.2)
    assert metrics["data/bad_rows"] == sum(not (row["sentence1"] and row["sentence2"].strip()) for row in test)
    found, _ = tuned(data, "rte")
    assert [int(line.split("\t")[0]) for line in found["RTE"][1:]] == index


def test_a_row_that_cannot_be_read_keeps_its_place(corpus, tmp_path):
    folder = schema(shutil.copytree(corpus / "corpus", tmp_path / "data" / "corpus").parent, [ROW] * 4)
    with (folder / "rte" / "test-00000.jsonl").open("a") as file:
        file.write("{no json\n")
    data, metrics = prepared(folder, tmp_path / "run", ["rte"], validation_share=0.2)
    rows = PreparedData(data).task("rte").tests["test"]
    assert rows.index.tolist() == [0, 1, 2, 3, 4]
    assert [len(ids) for ids in rows.input_ids][2] == 3  # [CLS] [SEP] [SEP]
    assert metrics["data/bad_rows"] == 1
    assert "kept, with an empty text" in (data / "bad_rows.jsonl").read_text()


def test_a_row_whose_number_cannot_be_known_is_refused(corpus, tmp_path):
    folder = schema(shutil.copytree(corpus / "corpus", tmp_path / "data" / "corpus").parent, [{**ROW, "idx": n} for n in (9, 8, 7, 6)])
    with (folder / "rte" / "test-00000.jsonl").open("a") as file:
        file.write("{no json\n")
    with pytest.raises(ValueError, match=r"rte/test-00000.jsonl, row 3: no JSON.*its number is not known"):
        prepared(folder, tmp_path / "run", ["rte"], validation_share=0.2)


def test_rows_left_out_do_not_shift_the_numbers_of_others(corpus, tmp_path, tuned):
    folder = schema(shutil.copytree(corpus / "corpus", tmp_path / "data" / "corpus").parent, [])
    write_jsonl(folder / "rte" / "validation.jsonl", [{**ROW, "label": 0}, {**ROW, "sentence1": None, "label": 0}, {**ROW, "label": 1}])
    for part in (0, 1):
        (folder / "rte" / f"test-0000{part}.jsonl").unlink()
    data, _ = prepared(folder, tmp_path / "run", ["rte"], validation_share=0.2)
    found, _ = tuned(data, "rte")
    assert [line.split("\t")[0] for line in found["validation"][1:]] == ["0", "2"]
    selected = PreparedData(data).task("rte").splits["selection"]
    assert [line.split("\t")[0] for line in found["selection"][1:]] == [str(number) for number in selected.index]
    assert set(found) == {"validation", "selection"}


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ([{"sentence1": "a", "label": -1}] * 2, r"rte/test-00000.jsonl: column 'sentence2' of task rte is missing"),
        ([{**ROW, "idx": 3}, {**ROW, "idx": 3}], r"task rte: 2 rows of split test have the number 3; expected each once"),
        ([], r"rte/test-00000.jsonl: column 'sentence1' of task rte is missing, got columns none"),
    ],
)
def test_a_test_split_that_cannot_be_submitted_is_refused(test, message, corpus, tmp_path):
    folder = schema(shutil.copytree(corpus / "corpus", tmp_path / "data" / "corpus").parent, test)
    (folder / "rte" / "test-00001.jsonl").unlink()
    with pytest.raises(ValueError, match=message):
        prepared(folder, tmp_path / "run", ["rte"], validation_share=0.2)


def test_a_test_split_without_rows_is_refused(corpus, tmp_path):
    folder = schema(shutil.copytree(corpus / "corpus", tmp_path / "data" / "corpus").parent, [])
    for part in (0, 1):
        (folder / "rte" / f"test-0000{part}.jsonl").unlink()
    (folder / "rte" / "test.tsv").write_text("idx\tsentence1\tsentence2\n")
    with pytest.raises(ValueError, match=r"task rte: no row in split test; expected GLUE's test rows, or no such split"):
        prepared(folder, tmp_path / "run", ["rte"], validation_share=0.2)


def test_the_key_follows_the_test_split(corpus, tmp_path):
    folder = schema(shutil.copytree(corpus / "corpus", tmp_path / "data" / "corpus").parent, [ROW] * 4)
    config = PrepareConfig(source="directory", path=str(folder), tasks=["rte"])
    before = stage_run("prepare", config).key
    write_jsonl(folder / "rte" / "test-00001.jsonl", [ROW, {**ROW, "sentence1": "other"}])
    assert stage_run("prepare", config).key != before


@pytest.mark.parametrize("with_tests", [True, False])
def test_the_hub_s_test_splits_are_read_where_there_are_some(with_tests, corpus, tmp_path, monkeypatch):
    """Local folders in the hub's own layout stand for its data sets."""
    import datasets

    glue, text = tmp_path / "glue", tmp_path / "text"
    shutil.copytree(corpus / "corpus", text)
    (text / "a.txt").write_text((text / "a.txt").read_text().replace("\n\n", "\n"))
    (text / "a.txt").rename(text / "train.txt")
    splits = {"train": 20, "validation_matched": 10, "validation_mismatched": 10, "test_matched": 5, "test_mismatched": 6}
    kept = [split for split in splits if with_tests or "test" not in split]
    for seed, split in enumerate(kept):
        pairs = enumerate(zip(texts(splits[split], seed), texts(splits[split], seed + 50), strict=True))
        label = -1 if "test" in split else 1
        rows = [{"premise": a, "hypothesis": b, "label": label, "idx": number} for number, (a, b) in pairs]
        write_jsonl(glue / "mnli" / f"{split}.jsonl", rows)
    listed = {"mnli": kept, **({"ax": ["test"]} if with_tests else {})}
    write_jsonl(glue / "ax" / "test.jsonl", [{"premise": "ba", "hypothesis": "ri", "label": -1, "idx": number} for number in range(4)])
    (glue / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n" + "".join(f"  - split: {split}\n    path: {name}/{split}.jsonl\n" for split in found)
            for name, found in listed.items()
        )
        + "---\n"
    )
    load = datasets.load_dataset

    def local(name, *rest, revision=None, **options):
        return load(str(tmp_path / name.removeprefix("owner/")) if name.startswith("owner/") else name, *rest, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    config = PrepareConfig(
        source="hub",
        corpus=["owner/text@abc"],
        task_dataset="owner/glue@def",
        tasks=["mnli"],
        vocabulary_size=256,
        sequence_length=16,
        validation_share=0.2,
    )
    data, _ = run(config, tmp_path / "run")
    found = {split: rows.index.tolist() for split, rows in PreparedData(data).task("mnli").tests.items()}
    sizes = {"test_matched": 5, "test_mismatched": 6, "ax": 4} if with_tests else {}
    assert found == {split: list(range(size)) for split, size in sizes.items()}
