"""Firings, and seeded rules that draw some of them before any outcome is measured.

A firing is (window, position, atom, coefficient): the atom with the largest coefficient at a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from writesae.history import History
from writesae.recurrence import Factors, torch_defaults
from writesae.sae.model import SAE
from writesae.sae.sparsity import Active
from writesae.text import Windows


@dataclass
class CellSAE:
    """An SAE of a cell, applied to some windows.

    target, write: its training data. indices, coefficients [N, T, slots]: active atoms. writes: the native
    writes; mean_write [d_k, d_v]: their mean. alive: the atoms that are active anywhere, ascending. flat,
    states: a flat SAE and the states that it encodes, for the condition flat_svd.
    """

    layer: int
    head: int
    target: str
    write: str
    sae: SAE
    indices: Tensor
    coefficients: Tensor
    writes: History
    flat: SAE | None = None
    states: History | None = None
    mean_write: Tensor = field(init=False)
    alive: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean_write = self.writes.mean()
        self.alive = self.indices[self.coefficients > 0].unique()


def encode_cell(cell: tuple[int, int], target: str, write: str, sae: SAE, factors: Factors) -> CellSAE:
    """Return the SAE of a cell (layer, head), applied to harvested factors."""
    active = sae.encode_history(factors.history(target, write))
    return CellSAE(*cell, target, write, sae, *active, factors.history("write", write))


@torch_defaults()
def all_firings(active: Active | CellSAE, passage: Tensor, first: int, last: int) -> pd.DataFrame:
    """Return all firings at first <= t < last: window, passage, position, atom, coefficient."""
    coefficient, slot = active.coefficients[:, first:last].max(-1)
    atom = active.indices[:, first:last].gather(-1, slot[..., None])[..., 0]
    window, position = torch.meshgrid(torch.arange(len(atom)), torch.arange(first, last), indexing="ij")
    columns = dict(window=window, passage=passage[window], position=position, atom=atom)
    columns["coefficient"] = coefficient.double()
    frame = pd.DataFrame({name: x.flatten().numpy() for name, x in columns.items()})
    return frame[frame.coefficient > 0].reset_index(drop=True)


def firings_at(active: Active | CellSAE, places: pd.DataFrame) -> pd.DataFrame:
    """Return places (window, position, ...) with the atom and coefficient of each; 0 where none is active."""
    window, position = (torch.tensor(places[name].to_numpy()) for name in ("window", "position"))
    coefficient, slot = active.coefficients[window, position].max(-1)
    atom = active.indices[window, position].gather(-1, slot[:, None])[:, 0]
    return places.assign(atom=atom.numpy(), coefficient=coefficient.double().numpy())


def draw_positions(passage: Tensor, first: int, last: int, count: int, seed: int) -> pd.DataFrame:
    """Return `count` places (window, passage, position), uniform over the positions first <= t < last.

    passage [N]: of each window. ValueError for more places than there are.
    """
    length = last - first
    if count > (most := len(passage) * length):
        raise ValueError(f"{count} places are asked for and the windows hold {most}: ask for fewer.")
    drawn = np.sort(np.random.default_rng(seed).choice(most, count, replace=False))
    window = drawn // length
    return pd.DataFrame(dict(window=window, passage=passage.numpy()[window], position=first + drawn % length))


@torch_defaults()
def find_firings(
    sae: SAE,
    cell: Factors,
    windows: Windows,
    *,
    target: str | None = None,
    write: str | None = None,
    first: int = 0,
    last: int | None = None,
) -> pd.DataFrame:
    """Return all firings of an SAE on a harvested cell: window, passage, position, atom, raw coefficient.

    cell: harvested over these windows. first, last: only positions first <= t < last. target, write: of the
    SAE's training data, by default from its config. Raises ValueError if its config has none, for another
    cell, for positions outside the windows, and for a harvest over windows of another number or length.
    """
    if not isinstance(cell, Factors) or not isinstance(windows, Windows):
        raise ValueError("Firings are found in the factors of one cell (harvest with layer and head) and Windows.")
    given, over = tuple(windows.tokens.shape), tuple(cell.key.shape[:2])
    if given != over:
        one, other = (f"{count} windows of {length} tokens" for count, length in (over, given))
        raise ValueError(f"The cell was harvested over {one}, and these are {other}.")
    last = given[1] if last is None else last
    if not 0 <= first < last <= given[1]:
        raise ValueError(f"Positions are 0 <= first < last <= {given[1]}, not first {first} and last {last}.")
    trained, origin = (sae.config.layer, sae.config.head), cell.origin
    if origin and trained[0] is not None and trained != (harvested := (origin.layer, origin.head)):
        raise ValueError(f"The SAE is of the cell (layer, head) {trained}, and the harvest is of {harvested}.")
    active = sae.encode_history(cell.history(*trained_on(sae, target, write)))
    return all_firings(active, windows.passage, first, last)


def trained_on(sae: SAE, target: str | None, write: str | None) -> tuple[str, str]:
    """Return the target and write given, else those of the SAE's config. ValueError for none."""
    target, write = target or sae.config.target, write or sae.config.write
    if target is None or write is None:
        raise ValueError("This SAE does not say what it was trained on: pass target (state or write) and write.")
    return target, write


class Places(NamedTuple):
    """n firings as tensors [n]; row: of the window in a run; coefficient: fp64."""

    row: Tensor
    position: Tensor
    atom: Tensor
    coefficient: Tensor
    window: Tensor

    @classmethod
    def of(cls, firings: pd.DataFrame, row: np.ndarray | None = None) -> Places:
        """Return the places of firings; row: in the run, by default the window."""
        columns = ("position", "atom", "coefficient", "window")
        position, atom, coefficient, window = (torch.tensor(np.array(firings[name])) for name in columns)
        return cls(window if row is None else torch.tensor(row), position, atom, coefficient, window)

    def at(self, index: slice | Tensor) -> Places:
        """Return some of the places."""
        return Places(*(x[index] for x in self))

    def pieces(self, rows: int, batch_rows: int) -> Iterator[tuple[slice, Places]]:
        """Yield the places piece by piece, for edited runs of about `batch_rows` rows, `rows` per place."""
        size = max(1, batch_rows // rows)
        for part in (slice(start, start + size) for start in range(0, len(self.row), size)):
            yield part, self.at(part)

    def draw(self, seed: int, one: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Return the draws [n, ...] of `one` from generators seeded by (seed, window, position)."""
        seeds = ((seed * 1_000_003 + self.window) * 4_099 + self.position).tolist()
        return torch.stack([one(torch.Generator().manual_seed(number)) for number in seeds])


def draw_in_rounds(firings: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return `count` firings: a random one of every atom, then a second, ... ValueError for too few."""
    if len(firings) < count:
        hold = f"the held-out windows hold {len(firings)}"
        raise ValueError(f"{count} firings are asked for and {hold}: ask for fewer, or take more windows.")
    shuffled = firings.sample(frac=1.0, random_state=seed)
    turn = shuffled.groupby("atom").cumcount().to_numpy()
    order = np.argsort(turn, kind="stable")[:count]
    return shuffled.iloc[order].sort_values(["window", "position"]).reset_index(drop=True)


def draw_atoms(firings: pd.DataFrame, count: int, fewest: int, seed: int) -> np.ndarray:
    """Return `count` random atoms with at least `fewest` firings, ascending. ValueError for too few atoms."""
    counts = firings.groupby("atom").size()
    able = counts.index[counts >= fewest].to_numpy()
    if len(able) < count:
        alive = f"only {len(able)} are alive with {fewest} or more held-out firings"
        raise ValueError(f"{count} atoms are asked for and {alive}: ask for fewer, or take more windows.")
    return np.sort(np.random.default_rng(seed).choice(able, count, replace=False))


def atom_names(frame: pd.DataFrame) -> pd.Series:
    """Return layer.head.atom for each firing."""
    return frame.layer.astype(str) + "." + frame["head"].astype(str) + "." + frame.atom.astype(str)
