"""Sequences on disk: nothing lost, nothing doubled, read back by memory map."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fffsweep.pipeline.data.packing import Packer, join_texts, pack, write_corpus, write_rows
from fffsweep.pipeline.data.prepared import PreparedData, Sequences
from fffsweep.pipeline.data.vocabulary import SPECIAL_TOKENS, Encoder, make_tokenizer

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([*SPECIAL_TOKENS, *WORDS], lowercase=True)


@settings(max_examples=30)
@given(documents=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40), min_size=1, max_size=30), block=st.integers(1, 200))
def test_packing_keeps_every_token_in_order(tokenizer, tmp_path_factory, documents, block):
    folder = tmp_path_factory.mktemp("pack")
    texts = folder / "texts.txt"
    texts.write_text("".join(" ".join(words) + "\n" for words in documents))
    encoder = Encoder(tokenizer)
    packer = Packer(folder / "raw", 8, encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fffsweep.pipeline.data.packing._BLOCK_BYTES", block)
        assert sum(pack(texts, encoder, packer)) == texts.stat().st_size
        left_over = packer.close()
        stream = [i for words in documents for i in (*map(tokenizer.token_to_id, words), encoder.sep)]
        assert packer.num_sequences == len(stream) // 7
        assert left_over == len(stream) % 7
        if not packer.num_sequences:
            return
        write_corpus(folder / "raw", packer.num_sequences, 8, packer.dtype, folder / "corpus" / "train.arrow")
    corpus = PreparedData(folder).corpus("train")
    assert corpus.shape == (len(stream) // 7, 8)
    assert corpus.dtype == np.uint16
    assert (corpus[:, 0] == encoder.cls).all()
    assert corpus[:, 1:].ravel().tolist() == stream[: len(stream) // 7 * 7]


def test_corpus_is_a_read_only_map_of_one_standard_arrow_batch(tmp_path):
    ids = np.arange(600_000 * 16, dtype=np.uint32).reshape(-1, 16)
    (tmp_path / "raw").write_bytes(ids.tobytes())
    write_corpus(tmp_path / "raw", len(ids), 16, np.uint32, tmp_path / "corpus" / "train.arrow")
    before = pa.total_allocated_bytes()
    corpus = PreparedData(tmp_path).corpus("train")
    assert np.array_equal(corpus, ids)
    assert not corpus.flags.writeable
    assert pa.total_allocated_bytes() - before < 1_000_000
    with pa.OSFile(str(tmp_path / "corpus" / "train.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema == pa.schema([("input_ids", pa.list_(pa.uint32(), 16))])
    assert table.num_rows == len(ids)


@given(st.integers(0, 30), st.none() | st.integers(0, 30), st.integers(8, 24))
def test_joined_texts_are_cut_as_transformers_cuts_them(num_first, num_second, length):
    from tokenizers import Tokenizer, models, processors

    tokenizer = Tokenizer(models.WordPiece({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3, "b": 4}, unk_token="[UNK]"))
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:0 [SEP]:0", [("[CLS]", 0), ("[SEP]", 1)])
    tokenizer.enable_truncation(length, strategy="longest_first")
    first, second = ["a"] * num_first, None if num_second is None else ["b"] * num_second
    joined = join_texts(
        np.full(num_first, 3, dtype=np.uint16), None if second is None else np.full(len(second), 4, dtype=np.uint16), length, 0, 1
    )
    expected = tokenizer.encode(first, second, is_pretokenized=True).ids
    assert joined.dtype == np.uint16
    assert len(joined) == len(expected) <= length
    kept = [np.count_nonzero(joined == i) for i in range(5)]
    assert kept[:2] == [expected.count(0), expected.count(1)]
    assert abs(kept[3] - expected.count(3)) <= 1
    assert kept[3] + kept[4] == expected.count(3) + expected.count(4)


def test_rows_are_read_back(tmp_path):
    rows = [np.array(ids, dtype=np.uint16) for ids in ([2, 7, 3], [2, 3], [2, 9, 9, 9, 3])]
    columns = {"label": np.array([0.5, 1, 2], dtype=np.float32), "index": np.array([0, 1, 4])}
    write_rows(rows, columns, tmp_path / "split.arrow")
    from fffsweep.pipeline.data.prepared import _split

    split = _split(tmp_path / "split.arrow")
    assert [ids.tolist() for ids in split.input_ids] == [ids.tolist() for ids in rows]
    assert split.labels.tolist() == [0.5, 1, 2]
    assert split.labels.dtype == np.float32
    assert split.index.tolist() == [0, 1, 4]
    assert len(split) == 3


def test_rows_of_an_older_result_are_numbered_by_place(tmp_path):
    from fffsweep.pipeline.data.prepared import _split

    rows = [np.array(ids, dtype=np.uint16) for ids in ([2, 7, 3], [2, 3])]
    write_rows(rows, {"label": np.array([0, 1])}, tmp_path / "split.arrow")
    assert _split(tmp_path / "split.arrow").index.tolist() == [0, 1]


def test_a_split_may_be_empty(tmp_path):
    from fffsweep.pipeline.data.prepared import _split

    write_rows([], {"label": np.empty(0, dtype=np.int64), "index": np.empty(0, dtype=np.int64)}, tmp_path / "split.arrow")
    assert len(_split(tmp_path / "split.arrow")) == len(_split(tmp_path / "split.arrow").input_ids) == 0


def test_sequences_index_as_lists_do():
    sequences = Sequences(np.array([0, 2, 2, 5]), np.arange(5))
    plain = [[0, 1], [], [2, 3, 4]]
    assert [sequences[i].tolist() for i in (0, 1, 2, -1, -3)] == [plain[i] for i in (0, 1, 2, -1, -3)]
    assert [each.tolist() for each in sequences[1:]] == plain[1:]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            sequences[outside]
