"""The work of stage `prepare`: read, clean, split, train or load the vocabulary, tokenise, pack, write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fffsweep.pipeline.data.cleaning import CleanCorpus, clean_corpus
from fffsweep.pipeline.data.packing import Packer, join_texts, pack, write_corpus, write_rows
from fffsweep.pipeline.data.rows import BadRows, TaskRows, check_index, hold_out
from fffsweep.pipeline.data.sources import open_source
from fffsweep.pipeline.data.text import HeldOutSentences
from fffsweep.pipeline.data.vocabulary import Encoder, make_tokenizer, read_vocabulary, save_tokenizer, train_vocabulary
from fffsweep.pipeline.encoder_folder import vocabulary_path
from fffsweep.pipeline.stage import Metrics, StageContext, StopRequested
from fffsweep.pipeline.tasks import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fffsweep.pipeline.stages.prepare import PrepareConfig

_VOCABULARY_BYTES = 64 * 1_000_000  # more text hardly changes the pieces


class Lines:
    """Documents of a clean corpus, one a line; every n-th, so that about `most_bytes` are read. May be iterated again."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._step = path, -(-path.stat().st_size // most_bytes)

    def __iter__(self) -> Iterator[str]:
        with self._path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file):
                if number % self._step == 0:
                    yield line


def prepare(config: PrepareConfig, context: StageContext) -> Metrics:
    """Write the artifacts of one prepare run to `context.output`. Raises ValueError if the data does not serve."""
    start = time.monotonic()
    context.work.mkdir(parents=True, exist_ok=True)
    with BadRows(context.output / "bad_rows.jsonl") as bad:
        source = open_source(config, context.work)
        rows = {task.name: _splits(source.task_rows(task, bad), task, config, context.seed) for task in config.task_list}
        tests = {task.name: _tests(source.test_rows(task, bad), task) for task in config.task_list}
        held_out = HeldOutSentences(_held_out_texts(config.task_list, rows, tests))
        corpus = clean_corpus(source.documents(), config, held_out, context, bad)
    tokenizer = _tokenizer(config, corpus)
    save_tokenizer(tokenizer, context.output / "tokenizer", config.sequence_length)
    encoder = Encoder(tokenizer)
    packed, rate = _pack_corpus(config, context, corpus, encoder)
    tasks = {task.name: _write_task(task, rows[task.name] | tests[task.name], config, context.output, encoder) for task in config.task_list}
    description = {
        "schema": "fffsweep.data/1",
        "source": config.source,
        "read": source.describe(),
        "corpus": {**corpus.summary(), "held_out_sentences": held_out.num_sentences, **packed},
        "vocabulary": {"size": encoder.vocabulary_size, "trained": config.vocabulary_file is None},
        "tasks": tasks,
        "bad_rows": bad.summary(),
    }
    (context.output / "data.json").write_text(
        json.dumps(description, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return {
        **{f"data/{split}_sequences": packed[split]["sequences"] for split in ("train", "validation")},
        "data/train_tokens": packed["train"]["sequences"] * config.sequence_length,
        "data/duplicates": corpus.num_duplicates,
        "data/contaminated": corpus.num_contaminated,
        "data/bad_rows": bad.total,
        "data/vocabulary_size": encoder.vocabulary_size,
        "time/prepare_s": time.monotonic() - start,
        "time/tokenise_mb_per_s": rate,
    }


def _splits(rows: dict[str, TaskRows], task: Task, config: PrepareConfig, seed: int) -> dict[str, TaskRows]:
    for split in ("train", *task.validation_splits):
        if not len(rows[split]):
            raise ValueError(f"task {task.name}: no row of split {split} can be used; expected at least one with text and label")
    train, selection = hold_out(rows["train"], config.selection_share, seed)
    if not len(selection):
        raise ValueError(
            f"task {task.name}: its {len(train)} training rows have one {task.text_columns[0]} between them, and rows with the same first "
            "text stay on one side, so none can be held out to select by; expected at least two: add rows, or name another column first"
        )
    return {"train": train, "selection": selection, **{split: rows[split] for split in task.validation_splits}}


def _tests(rows: dict[str, TaskRows], task: Task) -> dict[str, TaskRows]:
    for split, found in rows.items():
        check_index(task, split, found)
    return rows


def _held_out_texts(tasks: tuple[Task, ...], rows: dict[str, dict[str, TaskRows]], tests: dict[str, dict[str, TaskRows]]) -> Iterator[str]:
    for task in tasks:
        for found in (*(rows[task.name][split] for split in task.validation_splits), *tests[task.name].values()):
            yield from chain.from_iterable(found.texts)


def _tokenizer(config: PrepareConfig, corpus: CleanCorpus) -> Tokenizer:
    if config.vocabulary_file is not None:
        pieces = read_vocabulary(vocabulary_path(config.vocabulary_file))
    else:
        pieces = train_vocabulary(Lines(corpus.train, _VOCABULARY_BYTES), config.vocabulary_size, config.lowercase)
    return make_tokenizer(pieces, config.lowercase)


def _pack_corpus(
    config: PrepareConfig, context: StageContext, corpus: CleanCorpus, encoder: Encoder
) -> tuple[dict[str, dict[str, int]], float]:
    """Counts of each split, and MB of text tokenised and packed in a second of one core."""
    packed: dict[str, dict[str, int]] = {}
    start, done = time.thread_time(), 0
    total = corpus.train.stat().st_size + corpus.validation.stat().st_size
    for split, texts in (("train", corpus.train), ("validation", corpus.validation)):
        raw = context.work / f"{split}.ids"
        packer = Packer(raw, config.sequence_length, encoder)
        for num_bytes in pack(texts, encoder, packer):
            done += num_bytes
            context.progress(done, total, "bytes tokenised")
            if context.stop_requested():
                raise StopRequested
        left_over = packer.close()
        if not packer.num_sequences:
            raise ValueError(
                f"corpus: the {split} text fills no sequence of {config.sequence_length} tokens ({texts.stat().st_size} bytes); "
                "expected at least one: add text, or raise validation_share"
            )
        write_corpus(raw, packer.num_sequences, config.sequence_length, packer.dtype, context.output / "corpus" / f"{split}.arrow")
        raw.unlink()
        packed[split] = {"sequences": packer.num_sequences, "tokens_left_over": left_over}
    return packed, total / 1e6 / max(time.thread_time() - start, 1e-9)


def _write_task(task: Task, splits: dict[str, TaskRows], config: PrepareConfig, output: Path, encoder: Encoder) -> dict[str, Any]:
    """Write one task's splits; what data.json says of it."""
    folder = output / "tasks" / task.name
    counts: dict[str, Any] = {}
    for split, rows in splits.items():
        parts = [encoder.encode_each([texts[column] for texts in rows.texts]) for column in range(len(task.text_columns))]
        pairs = [(texts[0], texts[1] if len(texts) == 2 else None) for texts in zip(*parts, strict=True)]
        ids = [join_texts(first, second, config.sequence_length, encoder.cls, encoder.sep) for first, second in pairs]
        columns = {"index": np.array(rows.index, dtype=np.int64)}
        if split not in task.test_splits:
            columns["label"] = np.array(rows.labels, dtype=np.float32 if task.kind == "regression" else np.int64)
        write_rows(ids, columns, folder / f"{split}.arrow")
        room = config.sequence_length - 1 - len(task.text_columns)
        num_truncated = sum(sum(map(len, texts)) > room for texts in zip(*parts, strict=True))
        counts[split] = {"rows": len(rows), "truncated": num_truncated}
    (folder / "task.json").write_text(json.dumps({"task": asdict(task), "splits": counts}, indent=1, sort_keys=True) + "\n")
    return counts
