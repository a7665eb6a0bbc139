"""Harvest: the factors of chosen cells over many windows, in one pass of the model; never a state.

Per token and cell: key, value of the write, log decay. For d_k = d_v = 128 that is 257 numbers where the paper's
extraction keeps states of 16,384.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from tqdm import tqdm

from writesae import corpus
from writesae.documents import Corpus
from writesae.history import History, VectorHistory
from writesae.hosts import Host
from writesae.recurrence import taken_by_erase

Cell = tuple[int, int]


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


def split_windows(host: Host, split: str, length: int, limit: int, text: Corpus | None = None) -> Windows:
    """The first `limit` windows of a split: of the installed docstrings, in order of the passages' hashes, or of another
    corpus, in its own order. Raises ValueError where there are fewer, and what `Corpus.documents` raises."""
    if text is None:
        return cut_windows(host.tokenizer, corpus.texts(split), length, limit)
    return cut_windows(host.tokenizer, text.texts(split), length, limit, f" of {text}, split {split},")


@torch.no_grad()
def harvest(host: Host, tokens: torch.Tensor, cells: list[Cell], batch: int, progress: bool = True) -> dict[Cell, dict]:
    """Factors of the cells over tokens [N, T]: per cell key [N, T, d_k], added, effective [N, T, d_v], log_decay [N, T];
    where decays are vectors, key, log_decay, erase [N, T, d_k], added and taken [N, T, d_v] (VectorHistory).

    Only the layers up to the last cell are run. Raises ValueError for no cell or one that the host does not have, a batch
    below 1 and tokens that Host.run refuses, and, through History, where a value is not finite.
    """
    if not cells:
        raise ValueError(f"A harvest needs at least one cell: {host.name} has them in layers {host.recurrent_layers}.")
    if batch < 1:
        raise ValueError(f"A batch takes at least one window, not {batch}.")
    host.check_tokens(tokens)
    for layer, head in cells:
        host.check_cell(layer, head)
    upto = max(layer for layer, _ in cells) + 1
    parts: dict[Cell, list[dict]] = {cell: [] for cell in cells}
    for rows in tqdm(tokens.split(batch), desc="harvest", disable=not progress):
        run = host.run(rows, upto=upto)
        for cell in cells:
            f = host.cell_factors(run.records[cell[0]], cell[1])
            part = dict(key=f.key, added=f.added)
            if host.scalar_decay:
                part |= dict(effective=f.effective, log_decay=f.log_decay[..., 0])
            else:
                part |= dict(log_decay=f.log_decay, erase=f.erase, taken=taken_by_erase(f))
            parts[cell].append({name: x.float().cpu() for name, x in part.items()})
    return {
        cell: {name: torch.cat([part.pop(name) for part in found]) for name in list(found[0])}
        for cell, found in parts.items()
    }


def history(factors: dict, target: str, write: str = "added") -> History:
    """A cell's harvest as what an SAE trains on: target "state" (the state itself) or "write" (the native write).

    Raises ValueError for another target, and for a write that was not harvested (where decays are vectors, the effective).
    """
    if target == "state" and "taken" in factors:
        return VectorHistory(factors["key"], factors["added"], factors["log_decay"], factors["erase"], factors["taken"])
    if target == "state":
        return History(factors["key"], factors["effective"], factors["log_decay"])
    if target == "write":
        if write not in ("added", "effective") or write not in factors:
            known = [name for name in ("added", "effective") if name in factors]
            raise ValueError(f"This harvest has no rank-1 write {write!r}: choose {' or '.join(known)}.")
        return History(factors["key"], factors[write], None)
    raise ValueError(f"There is no training target {target!r}: choose state or write.")
