"""Which tokens an atom promotes and demotes, predicted and measured, at the firings where its coefficient is largest.

One native write norm of the atom is added to the state at such a firing, and the logits of the whole vocabulary are read
one token later (only later tokens read the edit, as in notebook 04). An atom's shift of a token is the mean over its firings.

| predictor | which                                                                                       |
|-----------|---------------------------------------------------------------------------------------------|
| paper     | prod alpha . <key, q_t> . <W_O value, W_U[token]>: the decay alone, the direct path (App. A) |
| exact     | the true first-order path: the derivative of the logits along the exact change of the head  |
| measured  | no prediction: the edited run less the native one                                           |

A constant added to all logits changes no probability, so shifts are taken less their mean over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from replication.statistics import r2
from writesae.edit import head_change, make_edit
from writesae.hosts.base import Host, Run
from writesae.sae.model import SAE
from writesae.shift import direct_path, reads
from writesae.text import Windows

KINDS = ("paper", "exact", "measured")
HORIZON = 1  # tokens from the write to the logits


@dataclass
class Dictionary:
    """A cell with its SAE, and the firings that are looked at: window, position, atom."""

    layer: int
    head: int
    target: str
    sae: SAE
    firings: pd.DataFrame


def token_shifts(
    host: Host, run: Run, cell: tuple[int, int], write: str, rows, position, key: torch.Tensor, value: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The shifts of all tokens at R firings, kind -> [R, vocabulary], less their mean over the vocabulary.

    rows, position [R]: where in the run; key [R, d_k], value [R, d_v]: the unit atom that is added there.
    """
    factors = host.factors(run, *cell)
    norm = factors.key[rows, position].norm(dim=-1) * factors.write(write)[rows, position].norm(dim=-1)
    value = value * norm[:, None]
    edit = make_edit(rows, position, key[:, None], value[:, None], scope="cache")
    change, start = head_change(factors, edit, HORIZON + 1)[0][:, 1:], position + 1

    def logits(change: torch.Tensor) -> torch.Tensor:
        return host.logits(host.branch(run, *cell, rows, start, change)[0][:, -1])

    native, exact = torch.func.jvp(logits, (torch.zeros_like(change),), (change,))
    with torch.no_grad():
        decay = reads(factors, rows, position, HORIZON, key)[0].diagonal()
        direct = direct_path(host, *cell, value.float(), torch.arange(host.vocabulary))
        found = dict(paper=decay[:, None] * direct.T, exact=exact, measured=logits(change) - native)
    return {kind: (x - x.mean(-1, keepdim=True)).detach() for kind, x in found.items()}


@torch.no_grad()
def mean_shifts(host: Host, windows: Windows, own: list[Dictionary], write: str, batch: int) -> list[dict]:
    """For each dictionary kind -> [n_atoms, vocabulary], the mean over an atom's firings (zero for an atom without any).

    The windows are run `batch` at a time, once for all dictionaries."""
    found = [{kind: torch.zeros(x.sae.n_atoms, host.vocabulary) for kind in KINDS} for x in own]
    for start in range(0, len(windows), batch):
        here = [x.firings[(x.firings.window >= start) & (x.firings.window < start + batch)] for x in own]
        if not any(map(len, here)):
            continue
        run = host.run(windows[slice(start, start + batch)].tokens)
        for sums, dictionary, firings in zip(found, own, here, strict=True):
            if firings.empty:
                continue
            window, position, atom = (torch.tensor(firings[x].to_numpy()) for x in ("window", "position", "atom"))
            cell, sides = (dictionary.layer, dictionary.head), [x[atom] for x in dictionary.sae.atoms()]
            shifts = token_shifts(host, run, cell, write, window - start, position, *sides)
            for kind in KINDS:
                sums[kind].index_add_(0, atom, shifts[kind].float())
    for sums, dictionary in zip(found, own, strict=True):
        counts = np.bincount(dictionary.firings.atom, minlength=dictionary.sae.n_atoms)
        for kind in KINDS:
            sums[kind] /= torch.tensor(counts).clamp_min(1)[:, None]
    return found


def top_tokens(shifts: dict[str, torch.Tensor], firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """A line an (atom, kind, promoted or demoted, rank): token, mean shift (in units of the logit), firings (n), and the
    R2 of the kind's shifts of the whole vocabulary as predictions of the measured ones (missing for `measured`)."""
    rows = []
    for atom, n in firings.groupby("atom").size().items():
        for kind in KINDS:
            one = shifts[kind][atom]
            fit = np.nan if kind == "measured" else r2(shifts["measured"][atom], one)
            for sign, name in ((1, "promoted"), (-1, "demoted")):
                top = (sign * one).topk(count)
                rows += [
                    dict(
                        atom=atom,
                        kind=kind,
                        direction=name,
                        rank=rank + 1,
                        token=token,
                        shift=sign * value,
                        n=n,
                        r2=fit,
                    )
                    for rank, (token, value) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                ]
    return pd.DataFrame(rows)
