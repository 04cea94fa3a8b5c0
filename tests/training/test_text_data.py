import bz2
import gzip
import json
import lzma

import datasets
import pytest

from hf_variational.training.data import _PIECE, END_OF_TEXT, load_text, pack, train_tokenizer

TEXT = "The quick brown fox.\n\n  Zwölf Boxkämpfer – 素早い狐 🦊\ttab\r\nend"


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat. " * 4, "the dog sat on the log. " * 4, "the end"], 280)


def document_texts(dataset):
    documents, current = [], ""
    for row in dataset:
        current += row["text"]
        if row["ends_document"]:
            documents.append(current)
            current = ""
    assert current == ""
    return documents


# ---- reading ----


@pytest.mark.parametrize(
    ("ending", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open)]
)
def test_reads_text_files_plain_and_compressed(tmp_path, ending, opener):
    file = tmp_path / f"a.txt{ending}"
    with opener(file, "wb") as stream:
        stream.write(TEXT.encode())
    assert document_texts(load_text(file)) == [TEXT]
    assert document_texts(load_text(str(file))) == [TEXT]


def test_reads_json_lines_patterns_and_lists_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a.txt").write_text("ay")
    rows = [{"text": "one", "n": 1}, {"text": "two"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert document_texts(load_text(str(tmp_path / "*.txt"))) == ["ay", "bee"]
    assert document_texts(load_text([tmp_path / "c.jsonl", tmp_path / "b.txt"])) == ["one", "two", "bee"]
    with lzma.open(tmp_path / "d.jsonl.xz", "wb") as stream:
        stream.write(b'{"body": "x"}')
    assert document_texts(load_text({"files": str(tmp_path / "d.jsonl.xz"), "text_column": "body"})) == ["x"]


def test_separator_divides_a_file_into_documents(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text("one<|endoftext|>two<|endoftext|>\n")
    assert document_texts(load_text(file, document_separator="<|endoftext|>")) == ["one", "two"]


@pytest.mark.parametrize("unit", ["word word\n", "word ", "wordword"])
def test_long_documents_are_cut_into_pieces_and_lose_nothing(tmp_path, unit):
    text = unit * (3 * _PIECE // len(unit))
    (tmp_path / "long.txt").write_text(text)
    dataset = load_text(tmp_path / "long.txt")
    assert len(dataset) >= 3 and max(map(len, dataset["text"])) <= _PIECE
    assert list(dataset["ends_document"]) == [False] * (len(dataset) - 1) + [True]
    assert document_texts(dataset) == [text]


def test_language_reference_comes_with_python():
    import pydoc_data.topics

    documents = document_texts(load_text("pydoc_data.topics"))
    assert documents == list(pydoc_data.topics.topics.values())


def test_any_datasets_source(tmp_path):
    (tmp_path / "lines.txt").write_text("first\nsecond\n")
    lines = load_text({"dataset": "text", "data_files": str(tmp_path / "lines.txt"), "rows_are_documents": False})
    assert list(lines["text"]) == ["first", "second"] and list(lines["ends_document"]) == [False, False]
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"body": ["a", "b"], "n": [1, 2]})})
    saved.save_to_disk(tmp_path / "saved")
    rows = load_text({"dataset": str(tmp_path / "saved"), "text_column": "body"})
    assert list(rows["text"]) == ["a", "b"] and rows.column_names == ["text"]
    assert load_text(saved["train"], text_column="body").column_names == ["text"]
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load_text({"dataset": str(tmp_path / "saved"), "split": "test"})
    with pytest.raises(ValueError, match="no column 'text'; it has body, n"):
        load_text({"dataset": str(tmp_path / "saved")})


def test_streamed_source_is_packed_too(tmp_path, tokenizer):
    (tmp_path / "lines.txt").write_text("the cat sat on the mat\n" * 5)
    source = {"dataset": "text", "data_files": str(tmp_path / "lines.txt")}
    whole = pack(load_text(source), tokenizer, 8)
    streamed = pack(load_text({**source, "streaming": True}), tokenizer, 8)
    assert [row["input_ids"] for row in streamed] == list(whole["input_ids"])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t\n", "is empty"),
        ("picture.txt", b"\x89PNG\r\n\x1a\n\0\0\0", "not a text file: it has a zero byte at offset 8"),
        ("latin.txt", b"caf\xe9 au lait", "not UTF-8 text: byte 0xe9 at offset 3"),
        ("cut.txt.xz", lzma.compress(b"text " * 1000)[:40], "cannot be decompressed"),
        ("not.txt.gz", b"plain text", "cannot be decompressed"),
        ("empty.jsonl", b"", "is empty"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "line 1 has no text in a field 'text'; it has body"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        load_text(str(tmp_path / name))
    assert name in str(error.value)


def test_missing_files_and_unknown_keys_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        load_text(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="unknown key 'splitt': did you mean 'split'"):
        load_text({"dataset": "text", "splitt": "train"})
    with pytest.raises(ValueError, match="unknown key 'file': did you mean 'files'"):
        load_text({"file": "a.txt"})
    with pytest.raises(ValueError, match="unknown key 'split'"):
        load_text({"files": "a.txt", "split": "train"})
    with pytest.raises(ValueError, match="path, a list of paths or a mapping"):
        load_text([])


# ---- the tokenizer ----


def test_tokenizer_gives_every_text_back(tokenizer):
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.unk_token_id not in tokenizer(TEXT)["input_ids"]
    assert len(tokenizer("the cat")["input_ids"]) == 2


def test_tokenizer_has_its_special_tokens_and_is_deterministic(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 3
    assert len(tokenizer) <= 280
    again = train_tokenizer(["the cat sat on the mat. " * 4, "the dog sat on the log. " * 4, "the end"], 280)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert loaded.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("size", [0, 258, 300.0, True])
def test_tokenizer_refuses_too_small_a_vocabulary(size):
    with pytest.raises(ValueError, match=f"at least 259.*got {size}"):
        train_tokenizer(["text"], size)


# ---- packing ----


def test_blocks_are_the_documents_with_an_end_after_each(tokenizer):
    texts = ["the cat sat", "the dog sat on the log", "the end"]
    expected = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = pack(datasets.Dataset.from_dict({"text": texts}), tokenizer, 5)
    assert blocks.column_names == ["input_ids", "labels"]
    assert all(len(row["input_ids"]) == len(row["labels"]) == 5 for row in blocks)
    kept = [token for row in blocks for token in row["labels"] if token != -100]
    assert kept == expected
    last = blocks[-1]
    fill = 5 * len(blocks) - len(expected)
    assert 0 < fill < 4
    assert last["input_ids"][-fill:] == [tokenizer.pad_token_id] * fill and last["labels"][-fill:] == [-100] * fill


def test_a_lone_last_token_is_left_out(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["the cat sat"]})
    tokens = len(tokenizer("the cat sat")["input_ids"]) + 1
    assert len(pack(rows, tokenizer, tokens - 1)) == 1
    assert len(pack(rows, tokenizer, tokens - 2)) == 2


def test_pieces_of_a_document_are_joined(tokenizer):
    pieces = datasets.Dataset.from_dict({"text": ["the cat", " sat"], "ends_document": [False, True]})
    whole = datasets.Dataset.from_dict({"text": ["the cat sat"]})
    assert list(pack(pieces, tokenizer, 4)["labels"]) == list(pack(whole, tokenizer, 4)["labels"])


def test_separate_documents_start_their_positions_again(tokenizer):
    blocks = pack(datasets.Dataset.from_dict({"text": ["the", "the cat"]}), tokenizer, 6, separate_documents=True)
    (row,) = blocks
    assert row["position_ids"] == [0, 1, 0, 1, 2, 0]
    assert [label == -100 for label in row["labels"]] == [True, False, True, False, False, True]


def test_pack_refuses_what_it_cannot_pack(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["the cat"]})
    for size in (1, 2.0):
        with pytest.raises(ValueError, match=f"`block_size`.*got {size}"):
            pack(rows, tokenizer, size)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        pack(datasets.Dataset.from_dict({"text": [""]}), tokenizer, 4)
    bare = train_tokenizer(["text"], 300)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        pack(rows, bare, 4)
