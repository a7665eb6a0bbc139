"""Firings: where an SAE's atoms fire on held-out text, and seeded rules that draw from them before any outcome is seen.

A firing is (window, position, atom, coefficient): the atom with the largest coefficient at that position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from writesae.history import History
from writesae.sae.model import SAE


@dataclass
class Encoded:
    """An SAE's active atoms over held-out windows: indices, coefficients [N, T, k]."""

    indices: torch.Tensor
    coefficients: torch.Tensor

    def alive(self) -> torch.Tensor:
        """The atoms that are active with a positive coefficient anywhere, ascending."""
        return self.indices[self.coefficients > 0].unique()


@torch.no_grad()
def encode(sae: SAE, history: History, batch: int = 16) -> Encoded:
    """The active atoms at every position of a held-out history."""
    parts = [sae.encode_history(history[rows]) for rows in torch.arange(len(history.key)).split(batch)]
    return Encoded(torch.cat([p.indices for p in parts]), torch.cat([p.coefficients for p in parts]))


def all_firings(encoded: Encoded, passage: torch.Tensor, first: int, last: int) -> pd.DataFrame:
    """Every firing at positions first <= t < last, with the number of its passage."""
    coefficient, slot = encoded.coefficients[:, first:last].max(-1)
    atom = encoded.indices[:, first:last].gather(-1, slot[..., None])[..., 0]
    window, position = torch.meshgrid(torch.arange(len(atom)), torch.arange(first, last), indexing="ij")
    frame = pd.DataFrame(
        dict(
            window=window.flatten().numpy(),
            passage=passage[window.flatten()].numpy(),
            position=position.flatten().numpy(),
            atom=atom.flatten().numpy(),
            coefficient=coefficient.flatten().double().numpy(),
        )
    )
    return frame[frame.coefficient > 0].reset_index(drop=True)


def draw_in_rounds(firings: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` firings spread over the atoms: a random one of every atom, then a second of every atom, and so on.

    Raises ValueError where there are fewer firings than asked for.
    """
    if len(firings) < count:
        raise ValueError(
            f"{count} firings are asked for and the held-out windows hold {len(firings)}: "
            "lower replacement.firings or raise data.heldout_windows in the profile."
        )
    shuffled = firings.sample(frac=1.0, random_state=seed)
    turn = shuffled.groupby("atom").cumcount().to_numpy()
    order = np.argsort(turn, kind="stable")[:count]
    return shuffled.iloc[order].sort_values(["window", "position"]).reset_index(drop=True)


def draw_atoms(firings: pd.DataFrame, count: int, fewest: int, seed: int) -> np.ndarray:
    """`count` atoms with at least `fewest` firings, drawn at random. Raises ValueError where there are fewer."""
    counts = firings.groupby("atom").size()
    able = counts.index[counts >= fewest].to_numpy()
    if len(able) < count:
        raise ValueError(
            f"{count} atoms are asked for and only {len(able)} are alive with {fewest} or more held-out firings: "
            "ask for fewer atoms, or raise data.heldout_windows in the profile."
        )
    return np.sort(np.random.default_rng(seed).choice(able, count, replace=False))


def atom_names(frame: pd.DataFrame) -> pd.Series:
    """Atoms of different cells are different atoms: layer.head.atom."""
    return frame.layer.astype(str) + "." + frame["head"].astype(str) + "." + frame.atom.astype(str)
