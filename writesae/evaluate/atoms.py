"""Single atoms: the same atom in another SAE, and the contexts and tokens of its firings."""

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
MATCH = 0.9  # an atom recurs in the SAE of another seed if its best |cosine| there exceeds this
ATOM_KEYS = ["host", "layer", "head", "target", "atom"]

Pairs = tuple[torch.Tensor, torch.Tensor]  # key [n, d_k], value [n, d_v] of n matrices of rank one


def inner_products(pairs: Pairs, others: Pairs) -> torch.Tensor:
    """Return the inner product of each matrix with each other one, [n, m]: for unit sides, the cosine."""
    return (pairs[0] @ others[0].T) * (pairs[1] @ others[1].T)


def matches(seeds: dict[int, SAE], seed: int = 0) -> pd.DataFrame:
    """Return each atom's largest |cosine| in each other SAE: `best`, and `chance` with permuted values."""
    tables = []
    for number, other in permutations(seeds, 2):
        atoms, (key, value) = seeds[number].atoms(), seeds[other].atoms()
        permuted = value[torch.randperm(len(value), generator=torch.Generator().manual_seed(seed))]
        products = (inner_products(atoms, (key, side)) for side in (value, permuted))
        best, chance = (x.abs().amax(1).numpy() for x in products)
        table = dict(seed=number, other_seed=other, atom=range(len(atoms[0])), best=best, chance=chance)
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def marked(tokenizer, tokens: Sequence[int], position: int, before: int = 14, after: int = 6) -> str:
    """Return the text around a position, its token between ⟦ and ⟧, line breaks as ⏎."""
    parts = tokens[max(0, position - before) : position], [tokens[position]], tokens[position + 1 :][:after]
    left, token, right = (_text(tokenizer, part) for part in parts)
    return f"{left}⟦{token}⟧{right}"


def _text(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False).replace("\n", "⏎")


def top_firings(firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the `count` largest firings per atom, at most one per passage, with their `rank`."""
    largest = firings.sort_values("coefficient", ascending=False, kind="stable")
    top = largest.drop_duplicates([*ATOM_KEYS, "passage"]).groupby(ATOM_KEYS).head(count)
    top = top.assign(rank=top.groupby(ATOM_KEYS).cumcount() + 1)
    return top.sort_values([*ATOM_KEYS, "rank"]).reset_index(drop=True)


def top_contexts(tokenizer, windows: Windows, firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return `top_firings` with the `text` around each."""
    top = top_firings(firings, count)
    places = zip(top.window, top.position)
    return top.assign(text=[marked(tokenizer, windows.tokens[row].tolist(), at) for row, at in places])


def frequent_tokens(tokenizer, windows: Windows, firings: pd.DataFrame, count: int = 3) -> str:
    """Return the most frequent tokens of an atom's firings, with their shares."""
    window, position = (torch.tensor(firings[name].to_numpy()) for name in ("window", "position"))
    tokens = windows.tokens[window, position]
    shares = pd.Series(tokens.numpy()).value_counts(normalize=True).head(count)
    return ", ".join(f"{_text(tokenizer, [token])!r} {share:.0%}" for token, share in shares.items())


def sides(cell_sae: CellSAE, firings: pd.DataFrame) -> pd.DataFrame:
    """Return one row per atom: median |cosine| of its key and value with those of the native writes."""
    places, cosines = firings[["window", "position", "atom"]].to_numpy().T, {}
    window, position, atom = map(torch.tensor, places)
    for name, side in zip(("key", "value"), cell_sae.sae.atoms(), strict=True):
        native = F.normalize(getattr(cell_sae.writes, name)[window, position], dim=-1)
        cosines[f"cosine_{name}"] = (side[atom] * native).sum(-1).abs().numpy()
    return firings[["atom"]].assign(**cosines).groupby("atom", as_index=False).median()
