"""Atoms one by one: the same atom in another SAE, the contexts of its firings, the tokens at which it fires."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pandas as pd
import torch
import torch.nn.functional as F

from writesae.evaluate.firings import CellSAE
from writesae.sae.model import SAE
from writesae.text import Windows

CLASSES = ("register", "bundle")
MATCH = 0.9  # an atom is found again in another seed where its best |cosine| exceeds this
ATOM_KEYS = ["host", "layer", "head", "target", "atom"]


def best_match(atoms: tuple, others: tuple) -> torch.Tensor:
    """[n]: the largest |cosine| of each atom (key [n, d_k], value [n, d_v], of unit norm) with any of the others."""
    return ((atoms[0] @ others[0].T) * (atoms[1] @ others[1].T)).abs().amax(1)


def matches(seeds: dict[int, SAE], seed: int = 0) -> pd.DataFrame:
    """A line for every atom of each SAE and every other SAE: `best`, its best |cosine| there, and `chance`, the best
    where the other's values are dealt out to its keys anew."""
    tables = []
    for own, other in permutations(seeds, 2):
        mine, (key, value) = seeds[own].atoms(), seeds[other].atoms()
        dealt = value[torch.randperm(len(value), generator=torch.Generator().manual_seed(seed))]
        found = dict(best=best_match(mine, (key, value)).numpy(), chance=best_match(mine, (key, dealt)).numpy())
        tables.append(pd.DataFrame(dict(seed=own, other_seed=other, atom=range(len(mine[0])), **found)))
    return pd.concat(tables, ignore_index=True)


# Exemplars (Table 1, Fig. 11)


def choose_exemplars(alive: pd.DataFrame, counts: dict[str, int], fewest_passages: int) -> pd.DataFrame:
    """The most-firing atoms of each class, as many as counts[class], among those that fire in enough passages."""
    able = alive[alive.passages >= fewest_passages]
    return pd.concat([able[able["class"] == name].nlargest(count, "firings") for name, count in counts.items()])


def marked(tokenizer, tokens: Sequence[int], position: int, before: int = 14, after: int = 6) -> str:
    """The text around a position, its token between ⟦ and ⟧, line breaks as ⏎."""
    parts = tokens[max(0, position - before) : position], [tokens[position]], tokens[position + 1 :][:after]
    left, token, right = (_text(tokenizer, part) for part in parts)
    return f"{left}⟦{token}⟧{right}"


def _text(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False).replace("\n", "⏎")


def top_contexts(tokenizer, windows: Windows, firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """The `count` firings of each atom with the largest coefficients, one a passage, with their text."""
    largest = firings.sort_values("coefficient", ascending=False, kind="stable")
    top = largest.drop_duplicates([*ATOM_KEYS, "passage"]).groupby(ATOM_KEYS).head(count)
    top = top.assign(rank=top.groupby(ATOM_KEYS).cumcount() + 1).sort_values([*ATOM_KEYS, "rank"])
    text = [marked(tokenizer, windows.tokens[row.window].tolist(), row.position) for row in top.itertuples()]
    return top.assign(text=text).reset_index(drop=True)


def frequent_tokens(tokenizer, windows: Windows, firings: pd.DataFrame, count: int = 3) -> str:
    """The tokens at which an atom fires most often, with their shares of its firings."""
    tokens = windows.tokens[torch.tensor(firings.window.to_numpy()), torch.tensor(firings.position.to_numpy())]
    shares = pd.Series(tokens.numpy()).value_counts(normalize=True).head(count)
    return ", ".join(f"{_text(tokenizer, [token])!r} {share:.0%}" for token, share in shares.items())


def sides(subject: CellSAE, firings: pd.DataFrame) -> pd.DataFrame:
    """A line an atom: medians over its firings of |cosine| of its key to the write's key, and of its value."""
    window, position, atom = (torch.tensor(firings[name].to_numpy()) for name in ("window", "position", "atom"))
    found = {}
    for name, own in zip(("key", "value"), subject.sae.atoms(), strict=True):
        native = F.normalize(getattr(subject.writes, name)[window, position], dim=-1)
        found[f"cosine_{name}"] = (own[atom] * native).sum(-1).abs().numpy()
    return firings[["atom"]].assign(**found).groupby("atom", as_index=False).median()
