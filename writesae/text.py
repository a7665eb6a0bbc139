"""Text other than the docstrings: files of text, a .jsonl or .parquet file, or a data set of the Hub, streamed.

A *document* is one file, one line or one row. Documents are read one at a time, in the order of their source, and only as
many as are asked for. The hash of a document's text alone says whether SAEs train on it or every experiment reads it, so
the two never overlap; a text that comes again is passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from pydantic import BaseModel, ConfigDict, model_validator

from replication.study.paths import ROOT


def split_of(sha256: str, splits: dict[str, range]) -> str:
    """The split that a text belongs to, by its hash alone; `splits`: its buckets of 0 to 99."""
    bucket = int(sha256[:8], 16) % 100
    return next(name for name, buckets in splits.items() if bucket in buckets)


SPLITS = {"sae": range(0, 80), "heldout": range(80, 100)}  # no host is trained on these texts here


class Corpus(BaseModel):
    """Where documents come from: a `path`, or a `dataset` that the library `datasets` reads.

    path: a .jsonl or a .parquet file, a folder (every .txt in it and below is a document), or a pattern of files such as
    docs/**/*.md; relative to the repository.
    dataset: an id of the Hub, or a folder in the Hub's format; revision, config, split: which part of it.
    column: the field or column that holds the text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = None
    dataset: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    column: str = "text"

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_source(self) -> Corpus:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a corpus is either a path or a dataset: give one of the two")
        if self.path and (self.revision or self.config or self.split):
            raise ValueError("revision, config and split are for a dataset: leave them out beside a path")
        return self

    @property
    def place(self) -> Path:
        """The file, folder or pattern here, if it is one."""
        return ROOT / Path(self.path or self.dataset).expanduser()

    def files(self) -> list[Path]:
        """The files here that it is read from, in order; none for a data set of the Hub."""
        if self.place.is_file():
            return [self.place]
        if self.path and "*" in self.path:
            found = map(Path, glob(str(self.place), recursive=True))
        else:
            found = self.place.rglob("*.txt" if self.path else "*")
        return sorted(x for x in found if x.is_file())

    def __str__(self) -> str:
        return self.path or self.dataset

    def documents(self) -> Iterator[str]:
        """The texts, one at a time.

        Raises FileNotFoundError for a path, data set or revision that does not exist, ConnectionError where the Hub is not
        reached, ModuleNotFoundError where `datasets` is needed and not installed, and ValueError for a column that is
        missing, a text that is none, a damaged file (with its line, where it has lines) and a source without a document.
        """
        empty = True
        for text in self._read():
            empty = False
            yield text
        if empty:
            raise ValueError(f"The corpus {self} is empty: it holds no document.")

    def texts(self, split: str) -> Iterator[str]:
        """The documents of one split ("sae" or "heldout"), without repeats. Raises as `documents`, and ValueError for
        another split."""
        if split not in SPLITS:
            raise ValueError(f"The corpus {self} has no split {split!r}: choose one of {', '.join(SPLITS)}.")
        seen = set()
        for text in self.documents():
            sha = hashlib.sha256(text.encode()).digest()
            if sha not in seen and split_of(sha.hex(), SPLITS) == split:
                seen.add(sha)
                yield text

    def identity(self) -> dict:
        """What identifies the text in a fingerprint: the contents of the files here, or the data set's id and revision."""
        return self.model_dump() | {"files": self.files()}

    def _read(self) -> Iterator[str]:
        if self.path and not self.place.exists() and "*" not in self.path:
            raise FileNotFoundError(f"There is no file or folder {self.place}: give the corpus another path.")
        if self.dataset:
            name = str(self.place) if self.place.exists() else self.dataset
            return self._rows(name, name=self.config, revision=self.revision, split=self.split or "train")
        files = self.files()
        if self.place.suffix == ".jsonl":
            return chain.from_iterable(_json_lines(path, self.column) for path in files)
        if self.place.suffix == ".parquet" and files:
            return self._rows("parquet", data_files=list(map(str, files)), split="train")
        if self.place.is_file():
            raise ValueError(
                f"{self.place} is no corpus: give a folder of .txt files, a pattern such as docs/**/*.md, a .jsonl or a .parquet "
                "file, or a dataset."
            )
        return _text_files(files)

    def _rows(self, *which, **options) -> Iterator[str]:
        """The column of every row of a data set, streamed: nothing is downloaded but what is read."""
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"The corpus {self} needs the package datasets: pip install datasets.") from error
        with _one_sentence(self):
            rows = datasets.load_dataset(*which, streaming=True, **options)
            columns = rows.column_names or list(next(iter(rows), {self.column: None}))
            if self.column not in columns:
                raise _Said(f"The corpus {self} has no column {self.column!r}: it has {', '.join(columns)}.")
            for number, row in enumerate(rows.select_columns([self.column]), start=1):
                yield _text(row[self.column], f"{self}, row {number}")


class _Said(ValueError):
    """A ValueError that says already what is wrong."""


@contextmanager
def _one_sentence(corpus: Corpus) -> Iterator[None]:
    """What `datasets` raises, as one sentence that says what would be right."""
    import datasets

    try:
        yield
    except _Said:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{error} Give the corpus another dataset or revision, or log in with `hf auth login`."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The corpus {corpus} holds no data that can be read: {error}.") from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{corpus} is read by a script of its own, and no such code is run here: give a revision without one, which the "
            "Hub usually keeps as `revision: refs/convert/parquet`."
        ) from error
    except (ConnectionError, TimeoutError) as error:
        offline = constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} does not answer"
        raise ConnectionError(
            f"The data set {corpus} is no folder here, and {reason}: go online, or copy its files into a folder and give "
            f"that as the corpus ({error})."
        ) from error
    except ValueError as error:  # an unknown config or split, a damaged file
        raise ValueError(f"The corpus {corpus} cannot be read: {error}") from error


def _text(value: Any, where: str) -> str:
    """The value, where it is a text; an empty one for null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Said(f"{where}: the text is a {type(value).__name__}, not a string.")
    return value


def _text_files(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: byte {error.start} is not.") from error


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one
                raise ValueError(f"{where} is not JSON: {error}.") from error
            if not isinstance(row, dict) or column not in row:
                has = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is no object"
                raise ValueError(f"{where} has no field {column!r}: {has}.")
            yield _text(row[column], where)


@dataclass
class Windows:
    """tokens [N, T] int64; passage [N] the number of the passage each was cut from (windows of one passage are related)."""

    tokens: torch.Tensor
    passage: torch.Tensor

    def kept(self) -> float:
        """The share of passages, of those read in order up to the last one here, that are long enough for a window."""
        return len(self.passage.unique()) / (int(self.passage.max()) + 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> Windows:
        return Windows(self.tokens[index], self.passage[index])

    def beginnings(self, length: int) -> Windows:
        """The first `length` tokens of each window, as prompts. Raises ValueError where the windows are shorter."""
        if not 1 <= length <= self.tokens.shape[1]:
            raise ValueError(
                f"Prompts of {length} tokens are asked for, and windows have {self.tokens.shape[1]}: shorten prompt_tokens, or "
                "raise data.window in the profile."
            )
        return Windows(self.tokens[:, :length], self.passage)


def cut_windows(tokenizer, texts: Iterable[str], length: int, limit: int | None = None, of: str = "") -> Windows:
    """Whole windows of `length` tokens cut from each text on its own; a text's first window begins with end-of-text.

    Texts shorter than a window are passed over; no more texts are read than `limit` windows need. Raises ValueError where
    fewer than `limit` windows come out, or none, and as `each_window` does; `of`: what the texts are of, for its sentence.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"At least one window must be asked for, not {limit}.")
    numbers = count()
    counted = texts if isinstance(texts, str) else (text for text, _ in zip(texts, numbers))
    cut = [(n, torch.tensor(window)) for n, window in islice(each_window(tokenizer, counted, length), limit)]
    if not cut or (limit and len(cut) < limit):
        raise ValueError(
            f"{next(numbers)} passages{of} give {len(cut)} windows of {length} tokens where {limit or 'at least one'} "
            f"{'are' if limit else 'is'} asked for: passages shorter than the window give none; lower the window or the number."
        )
    passage, tokens = zip(*cut, strict=True)
    return Windows(torch.stack(tokens), torch.tensor(passage))


def each_window(tokenizer, texts: Iterable[str], length: int) -> Iterator[tuple[int, list[int]]]:
    """(number of the text, `length` token ids) of every whole window, one at a time, as `cut_windows` says; the texts may
    be a stream. Raises ValueError for a length below 1, one text in place of several, and a tokenizer without end-of-text."""
    if length < 1:
        raise ValueError(f"A window takes at least one token, not {length}.")
    if isinstance(texts, str):
        raise ValueError("Windows are cut from a list of texts, and this is one text: put it into a list.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token, with which windows begin: set its eos_token.")
    for number, text in enumerate(texts):
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        for start in range(0, len(ids) - length + 1, length):
            yield number, ids[start : start + length]
