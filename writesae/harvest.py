"""Harvest: the factors of chosen cells over many windows, in one pass of the model; never a state.

Per token and cell: key, value of the write, log decay. For d_k = d_v = 128 that is 257 numbers where the paper's
extraction keeps states of 16,384.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from writesae import corpus
from writesae.history import History, VectorHistory
from writesae.hosts import Host
from writesae.recurrence import taken_by_erase

Cell = tuple[int, int]


@dataclass
class Windows:
    """tokens [N, T] int64; passage [N] the number of the passage each was cut from (windows of one passage are related)."""

    tokens: torch.Tensor
    passage: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> Windows:
        return Windows(self.tokens[index], self.passage[index])


def cut_windows(tokenizer, texts: list[str], length: int, limit: int | None = None) -> Windows:
    """Whole windows of `length` tokens cut from each text on its own; a text's first window begins with end-of-text.

    Texts shorter than a window are passed over. Raises ValueError where fewer than `limit` windows come out, or none.
    """
    tokens, passage = [], []
    for number, window in each_window(tokenizer, texts, length):
        if limit and len(tokens) == limit:
            break
        tokens.append(window)
        passage.append(number)
    if not tokens or (limit and len(tokens) < limit):
        raise ValueError(
            f"{len(texts)} passages give {len(tokens)} windows of {length} tokens where {limit or 'at least one'} "
            f"{'are' if limit else 'is'} asked for: passages shorter than the window give none; lower the window or the number."
        )
    return Windows(torch.tensor(tokens), torch.tensor(passage))


def each_window(tokenizer, texts: Iterable[str], length: int) -> Iterator[tuple[int, list[int]]]:
    """(number of the text, `length` token ids) of every whole window, one at a time, as `cut_windows` says; the texts may
    be a stream."""
    for number, text in enumerate(texts):
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        for start in range(0, len(ids) - length + 1, length):
            yield number, ids[start : start + length]


def split_windows(host: Host, split: str, length: int, limit: int) -> Windows:
    """The first `limit` windows of a split of the installed corpus, in order of the passages' hashes."""
    return cut_windows(host.tokenizer, corpus.texts(split), length, limit)


@torch.no_grad()
def harvest(host: Host, tokens: torch.Tensor, cells: list[Cell], batch: int, progress: bool = True) -> dict[Cell, dict]:
    """Factors of the cells over tokens [N, T]: per cell key [N, T, d_k], added, effective [N, T, d_v], log_decay [N, T];
    where decays are vectors, key, log_decay, erase [N, T, d_k], added and taken [N, T, d_v] (VectorHistory).

    Only the layers up to the last cell are run. Raises ValueError for a cell the host does not have, and, through
    History, where a value is not finite.
    """
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
    """A cell's harvest as what an SAE trains on: target "state" (the state itself) or "write" (the native write)."""
    if target == "state" and "taken" in factors:
        return VectorHistory(factors["key"], factors["added"], factors["log_decay"], factors["erase"], factors["taken"])
    if target == "state":
        return History(factors["key"], factors["effective"], factors["log_decay"])
    if target == "write":
        return History(factors["key"], factors[write], None)
    raise ValueError(f"There is no training target {target!r}: choose state or write.")
