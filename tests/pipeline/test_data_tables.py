"""Files of every kind, read plainly and through `datasets` alike; bad rows keep file, row and reason."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fffsweep.pipeline.data import tables
from fffsweep.pipeline.data.loading import DatasetsReader
from fffsweep.pipeline.data.rows import BadRow, BadRows, TaskRows, check_labels, hold_out, parse_rows
from fffsweep.pipeline.data.tables import DataFile, PlainReader, check_file, columns_of, documents_of, labels_of, rows_of
from fffsweep.pipeline.tasks import TASKS, Task

PAIR = Task("pair", "classification", 2, ("one", "two"), ("accuracy",), label_names=("no", "yes"))
ROWS = [{"one": "a cat", "two": 'the "dog"', "label": "0"}, {"one": "a, b", "two": "line\nend", "label": "1"}]


@pytest.fixture(params=["plain", "datasets"])
def reader(request, tmp_path):
    return PlainReader() if request.param == "plain" else DatasetsReader(tmp_path / "cache")


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataFile(path, name)


def test_equal_rows_from_every_kind_of_file(tmp_path, reader):
    folder = tmp_path / "with [brackets] and *"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=1)
    files = [
        DataFile(folder / "rows.parquet", "rows.parquet"),
        written(folder, "rows.jsonl", "\n\n".join(map(json.dumps, ROWS))),
        written(folder, "rows.csv", '\ufeffone,two,label\r\na cat,"the ""dog""",0\r\n"a, b","line\nend",1\r\n'),
    ]
    for file in files:
        assert [dict(row) for _, row in rows_of(file, reader)] == ROWS
        assert columns_of(file) == ["one", "two", "label"]
        assert [label for _, label in labels_of(file, "label")] == ["0", "1"]
    tsv = written(folder, "rows.tsv", 'one\ttwo\tlabel\na "cat\tthe dog\t0\n')
    assert list(rows_of(tsv, reader)) == [(2, {"one": 'a "cat', "two": "the dog", "label": "0"})]


def test_rows_that_cannot_be_read_are_numbered_and_explained(tmp_path, reader, monkeypatch):
    jsonl = written(tmp_path, "a.jsonl", '{"one": 1}\n{"one": \n\n[1]\n"x"\n{"one": 2}')
    found = [(number, row.reason if isinstance(row, BadRow) else row["one"]) for number, row in rows_of(jsonl, reader)]
    assert found == [
        (1, 1),
        (2, "no JSON: Expecting value at column 9"),
        (4, "expected a JSON object, got list"),
        (5, "expected a JSON object, got str"),
        (6, 2),
    ]
    tsv = written(tmp_path, "a.tsv", "one\ttwo\nx\ty\nx\nx\ty\tz\n")
    assert [(n, r.reason) for n, r in rows_of(tsv, reader) if isinstance(r, BadRow)] == [
        (3, "1 fields, expected 2"),
        (4, "3 fields, expected 2"),
    ]
    csv = written(tmp_path, "a.csv", 'one,two\nx,y\n"x"z,y\n"p\nq",r\nu,v\n"open,\nw,w\n')
    assert [(n, r.reason if isinstance(r, BadRow) else r["one"]) for n, r in rows_of(csv, reader)] == [
        (2, "x"),
        (3, "no CSV: ',' expected after '\"'"),
        (4, "p\nq"),
        (6, "u"),
        (7, "no CSV: unexpected end of data"),
        (8, "w"),
    ]
    stray = written(tmp_path, "stray.csv", 'one,two\n"open,1\n' + "u,v\n" * 30 + '"a, b",1\nu,v\n')
    assert [n for n, r in rows_of(stray, reader) if isinstance(r, BadRow)] == [2]
    assert [n for n, r in rows_of(stray, reader) if not isinstance(r, BadRow)] == list(range(3, 35))
    monkeypatch.setattr(tables, "_LONGEST_RECORD", 3)
    assert [n for n, r in rows_of(stray, reader) if not isinstance(r, BadRow)] == list(range(3, 35))


def test_paragraphs_are_documents_and_long_ones_are_cut(tmp_path, reader, monkeypatch):
    text = written(tmp_path, "a.txt", "\none\ntwo\n\n \nthree\r\n\nfour")
    assert [(number, document.split()) for number, document in documents_of(text, reader, "text")] == [
        (2, ["one", "two"]),
        (6, ["three"]),
        (8, ["four"]),
    ]
    monkeypatch.setattr("fffsweep.pipeline.data.tables._LONGEST_DOCUMENT", 5)
    long = written(tmp_path, "b.txt", "aaaa\nbbbb\ncc\ndddd\n")
    assert [document for _, document in documents_of(long, reader, "text")] == ["aaaa\nbbbb\n", "cc\ndddd\n"]


def test_documents_that_are_no_text_are_bad_rows(tmp_path, reader):
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"])}), tmp_path / "a.parquet")
    jsonl = written(tmp_path, "a.jsonl", '{"text": "a"}\n{"other": 1}\n{"text": 3}\n')
    parquet = DataFile(tmp_path / "a.parquet", "a.parquet")
    assert list(documents_of(parquet, reader, "text")) == [(1, "a"), (2, BadRow("text is missing")), (3, "b")]
    assert list(documents_of(jsonl, reader, "text")) == [(1, "a"), (2, BadRow("text is missing")), (3, BadRow("text is no text"))]


@pytest.mark.parametrize("before", [b"", b"x" * ((1 << 22) - 1), b"x\n" * (1 << 21)])
def test_broken_encoding_is_found_to_the_line(tmp_path, before):
    lines = before.count(b"\n")
    check_file(written(tmp_path, "good.txt", before + "né\n".encode()))
    with pytest.raises(ValueError, match=rf"^bad.txt, line {lines + 2}: byte 0xe9 is not UTF-8; expected UTF-8"):
        check_file(written(tmp_path, "bad.txt", before + b"a\nn\xe9e\n"))
    with pytest.raises(ValueError, match=rf"^cut.txt, line {lines + 1}: byte 0xc3"):
        check_file(written(tmp_path, "cut.txt", before + b"n\xc3"))


def test_a_damaged_parquet_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^a.parquet: .*; expected a Parquet file"):
        check_file(written(tmp_path, "a.parquet", b"PAR1 no"))
    with pytest.raises(ValueError, match=r"^none.txt: No such file"):
        check_file(DataFile(tmp_path / "none.txt", "none.txt"))


def parsed(rows, task=PAIR, bad=None):
    return parse_rows(task, enumerate(rows, 1), "f", bad or BadRows())


def test_rows_are_normalised_and_labels_are_numbers(tmp_path):
    rows = parsed(
        [{"one": " a  b", "two": "c", "label": value} for value in ("yes", 0, "1", 1.0)] + [{"one": "a", "two": "c", "label": "no"}],
    )
    assert rows.labels == [1, 0, 1, 1, 0]
    assert rows.texts[0] == ("a b", "c")
    scores = parsed([{"sentence1": "a", "sentence2": "b", "label": "4.25"}], TASKS["stsb"])
    assert scores.labels == [4.25]


@pytest.mark.parametrize(
    ("names", "labels", "numbers"),
    [
        (("-", "+"), ["+", "-", " - "], [1, 0, 0]),  # a dash is a missing label elsewhere
        (("1", "2", "3"), [3, 1, "2", 3.0], [2, 0, 1, 2]),  # a name before a number
        (("no", "yes"), [1, "0", 0.0, "yes"], [1, 0, 0, 1]),
    ],
)
def test_a_label_goes_by_its_name_first(names, labels, numbers):
    task = Task("own", "classification", len(names), ("one",), ("accuracy",), label_names=names)
    bad = BadRows()
    assert parsed([{"one": "a", "label": label} for label in labels], task, bad).labels == numbers
    assert bad.total == 0
    assert check_labels(task, enumerate(labels, 1), "f") == len(labels)


def test_a_row_s_number_is_its_column_or_its_place():
    good = {"one": "a", "two": "b", "label": 0}
    numbers = (7, "12", 3.0, "x", None, float("inf"), float("nan"), 2**63, -(2**63))
    assert parsed([{**good, "idx": number} for number in numbers]).index == [7, 12, 3, 3, 4, 5, 6, 7, -(2**63)]
    assert parsed([good, good]).index == [0, 1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"one": "a", "two": None, "label": 0}, "two is missing"),
        ({"one": "a", "label": 0}, "two is missing"),
        ({"one": 3, "two": "b", "label": 0}, "one is int, not text"),
        ({"one": "", "two": " \u200b", "label": 0}, "one and two are empty"),
        ({"one": "a", "two": "\ud83d", "label": 0}, "two holds half a surrogate pair"),
        ({"one": "a", "two": "b", "label": None}, "label is missing"),
        ({"one": "a", "two": "b", "label": "-"}, "label is missing"),
        ({"one": "a", "two": "b", "label": float("nan")}, "label is missing"),
        (BadRow("no JSON"), "no JSON"),
    ],
)
def test_bad_rows_are_left_out_counted_and_listed(tmp_path, row, reason):
    good = {"one": "a", "two": "b", "label": 0}
    with BadRows(tmp_path / "bad.jsonl") as bad:
        assert parsed([good, row, good, row], bad=bad).index == [0, 2]
    assert bad.total == 2
    assert bad.summary()["counts"] == [{"file": "f", "reason": reason, "rows": 2}]
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert listed == [{"file": "f", "row": 2, "reason": reason}, {"file": "f", "row": 4, "reason": reason}] == bad.first


def test_one_text_of_a_pair_may_be_empty():
    """As in two training rows of QQP: without them the task would never be complete."""
    bad = BadRows()
    rows = parsed(
        [{"one": "", "two": "b", "label": 0}, {"one": "a", "two": " ", "label": 1}, {"one": "a", "two": "b", "label": 1}], bad=bad
    )
    assert (rows.texts, rows.groups) == ([("", "b"), ("a", ""), ("a", "b")], ["b", "a", "a"])
    assert bad.total == 0
    single = Task("single", "classification", 2, ("one",), ("accuracy",))
    assert len(parsed([{"one": " ", "label": 0}], single, bad)) == 0
    assert bad.summary()["counts"] == [{"file": "f", "reason": "one is empty", "rows": 1}]


@pytest.mark.parametrize(
    ("task", "label", "allowed"),
    [
        (PAIR, 2, "expected 0, 1 or no, yes; mend"),
        (PAIR, "maybe", "expected 0, 1 or no, yes; mend"),
        (PAIR, 0.5, "expected 0, 1 or no, yes; mend"),
        (PAIR, -1, "expected 0, 1 or no, yes; mend"),
        (TASKS["stsb"], 5.1, "expected a number from 0 to 5; mend"),
        (TASKS["stsb"], "inf", "expected a number from 0 to 5; mend"),
    ],
)
def test_a_label_out_of_range_stops_with_file_and_row(task, label, allowed):
    good = {**dict.fromkeys(task.text_columns, "a"), "label": 1}
    with pytest.raises(ValueError, match=allowed) as caught:
        parsed([good, {**good, "label": label}], task)
    assert f"f, row 2: label {label!r} of task {task.name}" in str(caught.value)


def test_a_missing_column_lists_those_there_are():
    with pytest.raises(ValueError, match=r"f: column 'two' of task pair is missing, got columns one, label;"):
        parsed([{"one": "a", "label": 1}])


def test_hold_out_is_by_group_and_depends_on_the_seed_alone():
    rows = TaskRows(
        [(f"t{i}",) for i in range(200)], [float(i % 2) for i in range(200)], [str(i // 4) for i in range(200)], list(range(200))
    )
    kept, held = hold_out(rows, 0.1, seed=0)
    assert len(held) == 20
    assert not set(kept.groups) & set(held.groups)
    assert sorted(kept.texts + held.texts) == sorted(rows.texts)
    assert kept.texts == [text for text in rows.texts if text in set(kept.texts)]
    assert all(rows.texts[number] == text for number, text in zip(held.index, held.texts, strict=True))
    again = hold_out(rows.take(reversed(range(200))), 0.1, seed=0)
    assert set(again[1].texts) == set(held.texts)
    assert set(hold_out(rows, 0.1, seed=1)[1].texts) != set(held.texts)


def test_pairs_with_one_first_text_stay_on_one_side():
    premises = [f"premise {number}" for number in range(20)]
    rows = parsed([{"one": premise, "two": f"claim {number}", "label": 0} for number in range(5) for premise in premises])
    kept, held = hold_out(rows, 0.1, seed=0)
    assert (len(kept), len(held)) == (90, 10)
    assert {texts[0] for texts in kept.texts}.isdisjoint(texts[0] for texts in held.texts)


@pytest.mark.parametrize(("num_rows", "num_groups", "num_held"), [(1, 1, 0), (2, 2, 1), (9, 1, 0), (3, 3, 1)])
def test_hold_out_of_few_rows_never_takes_all(num_rows, num_groups, num_held):
    rows = TaskRows([("t",)] * num_rows, [0.0] * num_rows, [str(i % num_groups) for i in range(num_rows)], list(range(num_rows)))
    kept, held = hold_out(rows, 0.1, seed=0)
    assert (len(kept), len(held)) == (num_rows - num_held, num_held)
