"""Text from files or a streamed data set of the Hugging Face Hub, cut into windows of tokens.

A *document* is one file, line or row. Documents are read in order, and only as many as are needed. The hash
of a text decides its split: SAEs train on `sae`, experiments read `heldout`. Repeated texts are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob, has_magic
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from writesae.files import local_path, reading, said
from writesae.recurrence import torch_defaults

SPLITS = {"sae": range(0, 80), "heldout": range(80, 100)}  # buckets of the hash of a text
# tokens between documents in training; the end-of-sequence token of a chat tokenizer ends a turn instead
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|rwkv_tokenizer_end_of_text|>")


def split_of(sha256: str, splits: dict[str, range]) -> str:
    """Return the split of a text with this hash. `splits`: the buckets of each split, from 0 to 99."""
    bucket = int(sha256[:8], 16) % 100
    return next(name for name, buckets in splits.items() if bucket in buckets)


class Corpus(BaseModel):
    """Where documents come from: a `path`, or a `dataset` that the library `datasets` reads.

    path: a .jsonl or .parquet file, a folder of .txt files, or a pattern such as docs/**/*.md. The
        part of it that exists is taken literally. Folders and patterns skip hidden files, follow links.
    dataset: an id of the Hub, or a folder in the Hub's format; revision, config, split: the part to read.
        Scripts are never run; data sets with a script usually have the revision refs/convert/parquet.
    column: the field or column that has the text.
    root: the folder that relative paths start from; by default the current folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = None
    dataset: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    column: str = "text"
    root: Path = Field(Path(), exclude=True)  # not part of what identifies the text

    @model_validator(mode="before")
    @classmethod
    def _accept_a_path(cls, fields: Any) -> Any:
        return {"path": fields} if isinstance(fields, str) else fields

    @model_validator(mode="after")
    def _has_one_source(self) -> Corpus:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a corpus is either a path or a dataset: give one of the two")
        if self.path and (self.revision or self.config or self.split):
            raise ValueError("revision, config and split are for a dataset: leave them out beside a path")
        return self

    def __str__(self) -> str:
        return self.path or self.dataset

    @property
    def place(self) -> Path:
        """The local file, folder or pattern; it does not exist for a data set of the Hub."""
        return self.root / local_path(str(self))

    def _pattern(self) -> tuple[Path, str]:
        """Return the part of `place` that exists, and the rest, a pattern; "." if all of it exists."""
        existing = next(path for path in (self.place, *self.place.parents) if path.exists())
        return existing, str(self.place.relative_to(existing))

    def files(self) -> list[Path]:
        """Return the local files of the corpus, each once, in order; none for a data set of the Hub."""
        existing, pattern = self._pattern()
        if existing.is_file():
            return [existing] if pattern == "." else []
        if pattern == ".":
            pattern = "**/*.txt" if self.path else "**/*"
        paths = (existing / name for name in glob(pattern, root_dir=existing, recursive=True))
        paths = sorted((path for path in paths if path.is_file()), reverse=True)
        return sorted({os.path.realpath(path): path for path in paths}.values())  # links may repeat one

    def identity(self) -> dict:
        """Return what identifies the text in a fingerprint: the fields, and the content of local files."""
        return self.model_dump() | {"files": self.files()}

    def documents(self) -> Iterator[str]:
        """Yield the texts one at a time.

        Raises FileNotFoundError for an unknown path, data set or revision, ConnectionError if the Hub cannot
        be reached, ModuleNotFoundError if `datasets` is needed and missing, and ValueError for a missing
        field, a text that is not a string, a damaged file and a corpus without documents.
        """
        empty = True
        for text in self._read():
            empty = False
            yield text
        if empty:
            raise ValueError(f"The corpus {self} is empty: it holds no document, in {len(self.files())} files.")

    def texts(self, split: str) -> Iterator[str]:
        """Yield the documents of a split, `sae` or `heldout`, without repeats.

        Raises ValueError for an unknown split and if no document is in the split, and as `documents`.
        """
        if split not in SPLITS:
            raise ValueError(f"The corpus {self} has no split {split!r}: choose one of {', '.join(SPLITS)}.")
        seen, total = set(), 0
        for text in self.documents():
            total += 1
            sha256 = hashlib.sha256(text.encode()).digest()
            if sha256 not in seen and split_of(sha256.hex(), SPLITS) == split:
                seen.add(sha256)
                yield text
        if not seen:
            raise ValueError(
                f"The corpus {self} has {total} documents, and none of them is in the split {split}: whole "
                "documents are split, by their hash, so give more documents, or cut large ones into several."
            )

    def _read(self) -> Iterator[str]:
        if self.dataset:
            name = str(self.place.resolve()) if self.place.exists() else self.dataset
            if has_magic(name):
                raise ValueError(f"The library datasets reads no folder with any of *?[ in its path: rename {name}.")
            return self._rows(name, name=self.config, revision=self.revision, split=self.split or "train")
        existing, pattern = self._pattern()
        if pattern != "." and not (existing.is_dir() and has_magic(pattern)):
            raise FileNotFoundError(f"There is no file or folder {self.place}: give the corpus another path.")
        files = self.files()
        if self.place.suffix == ".jsonl":
            return chain.from_iterable(_json_lines(path, self.column) for path in files)
        if self.place.suffix == ".parquet" and files:
            return self._rows("parquet", data_files=[escape(str(path.absolute())) for path in files], split="train")
        if self.place.is_file():
            raise ValueError(f"{self.place} is not a corpus: give a folder of .txt files, a pattern, a .jsonl.")
        return _text_files(files)

    def _rows(self, *which, **options) -> Iterator[str]:
        for number, row in enumerate(self._stream(*which, **options), start=1):
            if self.column not in row:
                raise ValueError(f"The corpus {self} has no column {self.column!r}: it has {', '.join(row)}.")
            yield as_text(row[self.column], f"{self}, row {number}")

    def _stream(self, *which, **options) -> Iterator[dict]:
        with reading(f"The corpus {self}", known=self._refusal):
            import datasets

            rows = datasets.load_dataset(*which, streaming=True, **options)
            has_column = self.column in (rows.column_names or ())
            yield from rows.select_columns([self.column]) if has_column else rows

    def _refusal(self, error: Exception) -> Exception | None:
        """Return what `documents` raises for an error of `datasets` whose cause is certain, else None."""
        if isinstance(error, ModuleNotFoundError):
            return ModuleNotFoundError(f"The corpus {self} needs `pip install {error.name}`.")
        if type(error).__name__ == "DatasetNotFoundError":
            return FileNotFoundError(f"{error} Give another dataset or revision, or log in (`hf auth login`).")
        if isinstance(error, (ConnectionError, TimeoutError)):
            advice = "go online, or copy its files into a folder and give that as the corpus"
            return ConnectionError(f"The data set {self} cannot be reached ({said(error)}): {advice}.")
        return None


def as_text(value: Any, place: str) -> str:
    """Return a string with U+FFFD for each half of a surrogate pair, which is no character, or "" for None.

    Raises ValueError for a value of another type; place: where it is, for the message.
    """
    if not isinstance(value, str | None):
        raise ValueError(f"{place}: the text is a {type(value).__name__}, not a string.")
    return re.sub("[\ud800-\udfff]", "\ufffd", value or "")


def _text_files(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: byte {error.start} is not.") from error


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # also bytes that are not UTF-8
                raise ValueError(f"{place} is not JSON: {error}.") from error
            if not isinstance(row, dict) or field not in row:
                content = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is no object"
                raise ValueError(f"{place} has no field {field!r}: {content}.")
            yield as_text(row[field], place)


@dataclass
class Windows:
    """Windows: tokens [N, T] int64, and passage [N], the number of the text that each was cut from."""

    tokens: Tensor
    passage: Tensor

    def kept(self) -> float:
        """Return the share of texts with a window, among the texts up to the last one with a window."""
        return len(self.passage.unique()) / (int(self.passage.max()) + 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> Windows:
        return Windows(self.tokens[index], self.passage[index])

    def beginnings(self, length: int) -> Windows:
        """Return the first `length` tokens of each window. Raises ValueError for shorter windows."""
        if not 1 <= length <= self.tokens.shape[1]:
            raise ValueError(
                f"Prompts of {length} tokens are asked for, and windows have {self.tokens.shape[1]}: ask for "
                "shorter prompts, or cut longer windows."
            )
        return Windows(self.tokens[:, :length], self.passage)


@torch_defaults()
def cut_windows(tokenizer, texts: Iterable[str], length: int, limit: int | None = None, of: str = "") -> Windows:
    """Cut each text into windows of `length` tokens; the first window of a text begins with end-of-text.

    Texts shorter than a window give none. Reads only the texts that `limit` windows need. Raises ValueError
    for fewer than `limit` windows, or none, and as `each_window`. of: e.g. " of x.jsonl", for that message.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"At least one window must be asked for, not {limit}.")
    numbers = count()
    counted = texts if isinstance(texts, str) else (text for text, _ in zip(texts, numbers))
    windows = list(islice(each_window(tokenizer, counted, length), limit))
    if len(windows) < (limit or 1):
        wanted, read = f"{limit} are" if limit else "at least one is", next(numbers)
        advice = "lower the window or the number, or give more text" if read else "give some text"
        raise ValueError(
            f"{read} passages{of} give {len(windows)} windows of {length} tokens where {wanted} asked for, and "
            f"{read - len({number for number, _ in windows})} passages are shorter than a window: {advice}."
        )
    passage, tokens = zip(*windows, strict=True)
    return Windows(torch.tensor(tokens), torch.tensor(passage))


def each_window(tokenizer, texts: Iterable[str], length: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (number of the text, `length` token ids) for every whole window, cut as in `cut_windows`.

    Raises ValueError for a length below 1, for a single text, and as `end_of_text` and `token_ids`."""
    if length < 1:
        raise ValueError(f"A window takes at least one token, not {length}.")
    if isinstance(texts, str):
        raise ValueError("Windows are cut from a list of texts, and this is one text: put it into a list.")
    separator = end_of_text(tokenizer)
    for number, text in enumerate(texts):
        ids = [separator, *token_ids(tokenizer, text)]
        for start in range(0, len(ids) - length + 1, length):
            yield number, ids[start : start + length]


def end_of_text(tokenizer) -> int:
    """Return the id of the token that separates documents, with which the first window of a text begins.

    This is the end-of-sequence token, or the first of SEPARATORS that the tokenizer has if the
    end-of-sequence token is none of them, as in chat models. Raises ValueError for a tokenizer with neither.
    """
    own = getattr(tokenizer, "eos_token", None)
    added = {str(token): i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    usual = None if own in SEPARATORS else next((added[name] for name in SEPARATORS if name in added), None)
    separator = tokenizer.eos_token_id if usual is None else usual
    if separator is None:
        raise ValueError("The tokenizer has no end-of-text token to begin windows with: set its eos_token.")
    return separator


def token_ids(tokenizer, text: str) -> list[int]:
    """Return the ids of a text, without end-of-text; text that spells a control token is ordinary text.

    Raises ValueError for a value that is no string, and for a text that the tokenizer refuses.
    """
    text = as_text(text, "A text for the tokenizer")
    with reading("A text", done="tokenized"):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
