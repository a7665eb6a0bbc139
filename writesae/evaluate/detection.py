"""How well the firings of atoms follow from the text: an interpretability score without a language model.

A reader sees the token, the token before it and the position, and says where an atom fires. On some passages
the rate of every atom is estimated per position, per token and per pair of tokens; each estimate is shrunk
towards that of the coarser view. On other passages the firings are detected by these rates. The score of an
atom is the area under the ROC curve (AUC), the probability that a firing has a higher rate than another
place: 0.5 is chance, 1 is complete.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

SHRINK = 2.0  # observations that the coarser view counts for
POSITIONS = 16  # number of ranges of positions, of equal width
VIEWS = ("position", "token", "pair", "all")  # all: pair of tokens and position, as if independent


def detect(
    labels: Tensor, tokens: Tensor, fit: Tensor, atoms: Sequence[int], first: int = 1, fewest: int = 5
) -> pd.DataFrame:
    """Return one row per atom with at least `fewest` firings in both parts: atom, n_fit, n_test, auc_VIEW.

    labels [N, T] int64: the atom that fires at each place, -1 for none; tokens [N, T] int64; fit [N] bool:
    the windows on which rates are estimated, the others are for the test (windows of one passage belong to
    one part); atoms: those to examine; first: the first position, at least 1, since the token before it is
    seen. Raises ValueError if one part is empty.
    """
    if first < 1 or fit.all() or not fit.any():
        raise ValueError("Detection needs windows in both parts, and positions from 1 on.")
    window, position = np.indices(tuple(labels[:, first:].shape))
    current, before = tokens[:, first:].numpy(), tokens[:, first - 1 : -1].numpy()
    keys = dict(
        position=position * POSITIONS // position.shape[1],
        token=current,
        pair=before * (int(tokens.max()) + 1) + current,
    )
    labels, part = labels[:, first:].numpy(), fit.numpy()[window]
    chosen = np.asarray(atoms)
    n_fit, n_test = ((labels[at][:, None] == chosen).sum(0) for at in (part, ~part))
    enough = np.minimum(n_fit, n_test) >= fewest
    chosen, table = chosen[enough], dict(atom=chosen[enough], n_fit=n_fit[enough], n_test=n_test[enough])
    fired = labels[part][:, None] == chosen
    base = np.broadcast_to(fired.mean(0), ((~part).sum(), len(chosen)))
    rates = {name: _rates(keys[name][part], fired, keys[name][~part], base) for name in ("position", "token")}
    rates["pair"] = _rates(keys["pair"][part], fired, keys["pair"][~part], rates["token"])
    scores = {name: _log_odds(rate) for name, rate in rates.items()}
    scores["all"] = scores["pair"] + scores["position"] - _log_odds(base)
    happened = labels[~part][:, None] == chosen
    return pd.DataFrame(table | {f"auc_{name}": auc(scores[name], happened) for name in VIEWS})


def _rates(fit: np.ndarray, fired: np.ndarray, test: np.ndarray, coarser: np.ndarray) -> np.ndarray:
    """Return the rates [m, atoms] at keys test [m], from fired [n, atoms] at keys fit [n], shrunk."""
    known, which = np.unique(fit, return_inverse=True)
    rows, columns = fired.nonzero()
    sums = np.zeros((len(known) + 1, fired.shape[1]))  # the last row: of a key that was not seen
    np.add.at(sums, (which[rows], columns), 1)
    seen = np.append(np.bincount(which, minlength=len(known)), 0)
    at = np.minimum(np.searchsorted(known, test), len(known) - 1)
    at = np.where(known[at] == test, at, len(known))
    return (sums[at] + SHRINK * coarser) / (seen[at] + SHRINK)[:, None]


def _log_odds(rate: np.ndarray) -> np.ndarray:
    rate = rate.clip(1e-9, 1 - 1e-9)
    return np.log(rate) - np.log1p(-rate)


def auc(scores: np.ndarray, happened: np.ndarray) -> np.ndarray:
    """Return, for each column of scores [m, atoms] and happened [m, atoms] bool, the probability that a row
    where it happened has a higher score than one where it did not; equal scores count one half."""
    areas = []
    for score, wanted in zip(scores.T, happened.T, strict=True):
        other = np.sort(score[~wanted])
        below = np.searchsorted(other, score[wanted], "left") + np.searchsorted(other, score[wanted], "right")
        areas.append(below.mean() / (2 * len(other)))
    return np.array(areas)
