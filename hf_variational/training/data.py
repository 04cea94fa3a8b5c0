"""Text in, blocks of tokens out: local files or any `datasets` source, a byte-level BPE tokenizer, packing.

`datasets` and `tokenizers` are imported where they are used, so that importing this module costs nothing.
"""

import bz2
import glob
import gzip
import importlib
import json
import lzma
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..evaluation.domains import text_prefix
from .naming import refuse_unknown

LANGUAGE_REFERENCE = "pydoc_data.topics"
END_OF_TEXT, PADDING, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unk|>"
# The 256 bytes and the three special tokens: what a byte-level vocabulary holds before it has learnt anything.
SMALLEST_VOCABULARY = 256 + 3
# Characters of a piece: a tokenizer's memory grows with the longest text it is given at once.
_PIECE = 2**15
_FILE_KEYS = ("files", "text_column", "document_separator")
_DATASET_KEYS = (
    "dataset",
    "name",
    "split",
    "data_files",
    "data_dir",
    "revision",
    "streaming",
    "text_column",
    "rows_are_documents",
)
_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


# ---- Reading ----


def load_text(source, text_column: str = "text", document_separator: str | None = None):
    """
    Text as a dataset with the columns `text` and `ends_document`.

    Args:
        source:
            - a file or a pattern, or a list of them: `.txt` (any ending but `.jsonl` is read as text) or `.jsonl` (one
              JSON object with a text a line), plain or as `.gz`, `.xz` or `.bz2`. Files are read into memory; a corpus
              that does not fit goes through `datasets` (`{"dataset": "text", "data_files": ...}`);
            - `"pydoc_data.topics"`: the language reference that every CPython carries, about 0.5 MB;
            - a mapping: `{"files": ..., "text_column": ..., "document_separator": ...}`, or `{"dataset": ...}` with
              the arguments of `datasets.load_dataset` (`name`, `split`, `data_files`, `data_dir`, `revision`,
              `streaming`), `text_column`, and `rows_are_documents` (default true; false where a row is a line of a
              longer text);
            - a dataset, which is returned with its text column named `text`.
        text_column (`str`, defaults to `"text"`): The field with the text.
        document_separator (`str`, *optional*):
            What stands between the documents of a text file, for example `"<|endoftext|>"`. Without it a file is one
            document.

    Raises:
        ValueError: for a file that is empty, not text, or damaged; it names the file.
    """
    if hasattr(source, "map") and hasattr(source, "features"):
        return _named_text(source, text_column, True)
    if isinstance(source, Mapping):
        if "dataset" in source:
            return _load_dataset(dict(source))
        refuse_unknown(source, _FILE_KEYS if "files" in source else (*_FILE_KEYS, *_DATASET_KEYS), "A text source")
        if "files" not in source:
            raise ValueError(f"A text source names its `files` or its `dataset`, got {dict(source)}.")
        options = {"text_column": text_column, "document_separator": document_separator, **source}
        return load_text(options.pop("files"), **options)
    if source == LANGUAGE_REFERENCE:
        return _as_dataset(importlib.import_module(LANGUAGE_REFERENCE).topics.values())
    paths = [source] if isinstance(source, (str, os.PathLike)) else list(source or [])
    if not paths:
        raise ValueError(f"A text source is a path, a list of paths or a mapping, got {source!r}.")
    return _as_dataset(
        document
        for path in paths
        for file in _matching(path)
        for document in _documents(file, text_column, document_separator)
    )


def _matching(path) -> list[Path]:
    text = os.path.expanduser(os.fspath(path))
    if os.path.isfile(text):
        return [Path(text)]
    found = sorted(Path(match) for match in glob.glob(text, recursive=True) if os.path.isfile(match))
    if not found:
        raise FileNotFoundError(
            f"There is no file {text!r} (looked in {os.getcwd()}). A data set of the Hub is written as "
            f"{{dataset: {text}, split: train}}."
        )
    return found


def _read(file: Path) -> str:
    opener = _OPENERS.get(file.suffix.lower(), open)
    try:
        with opener(file, "rb") as stream:
            content = stream.read()
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise
        raise ValueError(f"{file} cannot be decompressed ({error}): it is damaged, or not {file.suffix}.") from error
    if not content.strip():
        raise ValueError(f"{file} is empty: there is no text in it. Name another file, or fill it.")
    if b"\0" in content:
        raise ValueError(
            f"{file} is not a text file: it has a zero byte at offset {content.index(0)}. Give UTF-8 text or JSON "
            "lines."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}. Convert it, for "
            "example with `iconv -t UTF-8`."
        ) from error


def _documents(file: Path, text_column: str, separator: str | None) -> Iterable[str]:
    text = _read(file)
    stem = Path(file.stem) if file.suffix.lower() in _OPENERS else file
    if stem.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
                fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{file}, line {number} has no text in a field {text_column!r}; it has {fields}.")
            yield row[text_column]
    elif separator:
        yield from (part for part in text.split(separator) if part.strip())
    else:
        yield text


def pieces(document: str, size: int = _PIECE) -> Iterable[str]:
    """Cuts a text into pieces of at most `size` characters, before a line break or a space where there is one."""
    start = 0
    while len(document) - start > size:
        limit = start + size
        cut = max(document.rfind("\n", start + 1, limit), 0) or max(document.rfind(" ", start + 1, limit), 0) or limit
        yield document[start:cut]
        start = cut
    yield document[start:]


def _as_dataset(documents: Iterable[str]):
    from datasets import Dataset

    columns: dict[str, list] = {"text": [], "ends_document": []}
    for document in documents:
        found = [piece for piece in pieces(document) if piece]
        columns["text"] += found
        columns["ends_document"] += [False] * (len(found) - 1) + [True] * bool(found)
    return Dataset.from_dict(columns)


def _load_dataset(source: dict):
    import datasets

    refuse_unknown(source, _DATASET_KEYS, "A text source")
    text_column = source.pop("text_column", "text")
    documents = source.pop("rows_are_documents", True)
    path = os.path.expanduser(str(source.pop("dataset")))
    arguments = {"split": "train", **source}
    if os.path.isfile(os.path.join(path, "state.json")) or os.path.isfile(os.path.join(path, "dataset_dict.json")):
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            split = arguments["split"]
            if split not in loaded:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(loaded)}.")
            loaded = loaded[split]
    else:
        loaded = datasets.load_dataset(path, **arguments)
    return _named_text(loaded, text_column, documents, where=path)


def _columns(dataset) -> list[str]:
    return list(dataset.column_names if dataset.column_names is not None else next(iter(dataset)))


def _named_text(dataset, text_column: str, documents: bool, where: str = "The dataset"):
    columns = _columns(dataset)
    if text_column not in columns:
        raise ValueError(
            f"{where} has no column {text_column!r}; it has {', '.join(columns)}. Name one with `text_column`."
        )
    keep = [text_column] + (["ends_document"] if "ends_document" in columns else [])
    dataset = dataset.select_columns(keep)
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    if not documents and "ends_document" not in columns:
        dataset = dataset.map(_unfinished, batched=True)
    return dataset


def _unfinished(batch: dict) -> dict:
    return {"ends_document": [False] * len(batch["text"])}


# ---- The tokenizer ----


def train_tokenizer(texts, vocab_size: int, min_frequency: int = 2):
    """
    A byte-level BPE tokenizer: every text has tokens, and decoding gives it back.

    Its special tokens are `<|endoftext|>`, which ends a document and stands for the beginning of the next (it is the
    end *and* the beginning of a sequence), `<|pad|>` and `<|unk|>`.

    Args:
        texts: Strings, or a dataset with a column `text`.
        vocab_size (`int`): At most so many tokens; a small text may not have that many pairs.
        min_frequency (`int`, defaults to 2): Times a pair has to occur to become a token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"`vocab_size` of a byte-level tokenizer is a whole number of at least {SMALLEST_VOCABULARY} (256 bytes "
            f"and 3 special tokens), got {vocab_size!r}."
        )
    if hasattr(texts, "map"):
        texts = (row["text"] for row in texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT, PADDING, UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


# ---- Packing ----


def pack(dataset, tokenizer, block_size: int, *, separate_documents: bool = False, num_proc: int | None = None):
    """
    Blocks of `block_size` tokens, with `input_ids` and `labels`, from a dataset as [`load_text`] gives it.

    Documents follow one another with the end-of-sequence token between them. Nothing is cut off but a lone last token,
    which would have nothing to predict: the last block of each batch of rows is filled up with padding whose labels
    are -100 (it stands at the end, so it needs no mask).

    Args:
        dataset: With a column `text`, and `ends_document` where a row is a piece of a longer text.
        tokenizer: Any tokenizer with an end-of-sequence token.
        block_size (`int`): Tokens of a block, at least 2.
        separate_documents (`bool`, defaults to `False`):
            Adds `position_ids` that start again with each document, so that none attends to the one before it; the
            first token of a document is then not a target.
        num_proc (`int`, *optional*): Processes for `datasets.map`.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 2:
        raise ValueError(f"`block_size` is a whole number of at least 2, got {block_size!r}.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-sequence token to put between documents: set its `eos_token`.")
    options = {
        "tokenizer": tokenizer,
        "block_size": block_size,
        "separate_documents": separate_documents,
    }
    arguments = {"batched": True, "remove_columns": _columns(dataset), "fn_kwargs": options}
    if hasattr(dataset, "num_rows"):
        arguments.update(num_proc=num_proc, desc="Packing")
    blocks = dataset.map(_pack_batch, **arguments)
    if hasattr(blocks, "num_rows") and blocks.num_rows == 0:
        raise ValueError("The text has fewer than two tokens: there is nothing to predict.")
    return blocks


def cut(dataset, tokenizer, block_size: int, *, num_proc: int | None = None):
    """
    Sequences of at most `block_size` tokens, with `input_ids`, `attention_mask` and `labels`, from a dataset as
    [`load_text`] gives it: what a pretrained model is used on.

    Each is of one document and begins as the tokenizer begins a text (of Llama with the beginning-of-sequence token,
    of GPT-2 with nothing). No other special token is in it, for nobody can tell whether the model has learnt it. What
    is shorter than `block_size` is filled up with padding.

    Args:
        dataset: With a column `text`.
        tokenizer: Any tokenizer.
        block_size (`int`): Tokens of a sequence, at least 2 more than the tokenizer begins with.
        num_proc (`int`, *optional*): Processes for `datasets.map`.

    Raises:
        ValueError: for a text with nothing to predict.
    """
    prefix = text_prefix(tokenizer)
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < len(prefix) + 2:
        raise ValueError(f"`block_size` is a whole number of at least {len(prefix) + 2}, got {block_size!r}.")
    options = {"tokenizer": tokenizer, "block_size": block_size, "prefix": prefix}
    arguments = {"batched": True, "remove_columns": _columns(dataset), "fn_kwargs": options}
    if hasattr(dataset, "num_rows"):
        arguments.update(num_proc=num_proc, desc="Cutting")
    sequences = dataset.map(cut_batch, **arguments)
    if hasattr(sequences, "num_rows") and sequences.num_rows == 0:
        raise ValueError("The text has fewer than two tokens: there is nothing to predict.")
    return sequences


def cut_batch(batch: Mapping, tokenizer, block_size: int, prefix: list[int]) -> dict[str, list]:
    """[`cut`] of a batch of rows: `{"text": [...]}`."""
    encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    step = block_size - len(prefix)
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids in encoded["input_ids"]:
        for begin in range(0, len(ids), step):
            piece = ids[begin : begin + step]
            if len(prefix) + len(piece) < 2:
                continue
            fill = step - len(piece)
            columns["input_ids"].append([*prefix, *piece] + [padding] * fill)
            columns["attention_mask"].append([1] * (block_size - fill) + [0] * fill)
            columns["labels"].append([-100] * len(prefix) + piece + [-100] * fill)
    return columns


def _pack_batch(batch: dict, tokenizer, block_size: int, separate_documents: bool) -> dict:
    texts = batch["text"]
    ends = batch.get("ends_document", [True] * len(texts))
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    tokens: list[int] = []
    starts = {0}
    for ids, end in zip(encoded, ends, strict=True):
        tokens += ids
        if end and ids:
            tokens.append(tokenizer.eos_token_id)
            starts.add(len(tokens))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    columns: dict[str, list] = {"input_ids": [], "labels": []}
    if separate_documents:
        columns["position_ids"] = []
    for begin in range(0, len(tokens), block_size):
        block = tokens[begin : begin + block_size]
        if len(block) < 2:
            break
        fill = block_size - len(block)
        labels = block + [-100] * fill
        if separate_documents:
            positions, position = [], 0
            for offset in range(block_size):
                position = 0 if offset == 0 or begin + offset in starts else position + 1
                positions.append(position)
                if position == 0:
                    labels[offset] = -100
            columns["position_ids"].append(positions)
        columns["input_ids"].append(block + [padding] * fill)
        columns["labels"].append(labels)
    return columns
