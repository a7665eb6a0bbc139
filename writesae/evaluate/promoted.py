"""Tokens that an atom promotes and demotes at its largest firings, predicted and measured.

One native write norm of the atom is added to the state (scope "cache"), and the logits are read one token
later. Shifts are relative to the mean over the vocabulary. Kinds:

- paper:    prod alpha . <key, q_t> . <W_O value, W_U[token]>, by decay alone and the direct path (App. A);
- exact:    the derivative of the logits along the exact change of the head, every path to first order;
- measured: logits of the edited run minus those of the native run.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from writesae.edit import head_change, make_edit
from writesae.evaluate.features import FORWARD_MODE
from writesae.hosts.base import Host, Run
from writesae.recurrence import torch_defaults
from writesae.sae.model import SAE
from writesae.shift import direct_path, reads
from writesae.text import Windows

KINDS = ("paper", "exact", "measured")
HORIZON = 1  # tokens from the write to the logits


@torch_defaults()
def token_shifts(
    host: Host, run: Run, cell: tuple[int, int], write: str, rows, position, key, value
) -> dict[str, torch.Tensor]:
    """Return the shifts of all tokens at R firings: kind -> [R, vocabulary].

    rows, position [R] int64: places in the run; key [R, d_k], value [R, d_v]: the unit atoms.
    """
    factors = host.factors(run, *cell)
    norm = factors.key[rows, position].norm(dim=-1) * factors.write(write)[rows, position].norm(dim=-1)
    value = value * norm[:, None]
    edit = make_edit(rows, position, key[:, None], value[:, None], scope="cache")
    change, start = head_change(factors, edit, HORIZON + 1)[0][:, 1:], position + 1

    def logits(change: torch.Tensor) -> torch.Tensor:
        return host.logits(host.branch(run, *cell, rows, start, change)[0][:, -1])

    with FORWARD_MODE:
        native, exact = torch.func.jvp(logits, (torch.zeros_like(change),), (change,))
    with torch.no_grad():
        decay = reads(factors, rows, position, HORIZON, key)[0].diagonal()
        direct = direct_path(host, *cell, value.float(), torch.arange(host.vocabulary))
        shifts = dict(paper=decay[:, None] * direct.T, exact=exact, measured=logits(change) - native)
    return {kind: (x - x.mean(-1, keepdim=True)).detach() for kind, x in shifts.items()}


@torch_defaults()
def mean_shifts(
    host: Host, windows: Windows, saes: list[tuple[tuple, SAE, pd.DataFrame]], write: str, batch: int
) -> list[dict[str, torch.Tensor]]:
    """Return per SAE the mean shifts of its atoms, kind -> [n_atoms, vocabulary]; 0 for atoms without firing.

    saes: (cell, SAE, its firings: window, position, atom). batch: windows per run, which all SAEs share.
    """
    sums = [{kind: torch.zeros(sae.n_atoms, host.vocabulary) for kind in KINDS} for _, sae, _ in saes]
    needed = np.unique(np.concatenate([firings.window for _, _, firings in saes]))
    for chunk in np.split(needed, range(batch, len(needed), batch)):
        run = host.run(windows.tokens[torch.from_numpy(chunk)])
        for totals, (cell, sae, firings) in zip(sums, saes, strict=True):
            part = firings[firings.window.isin(chunk)]
            if part.empty:
                continue
            rows = torch.from_numpy(np.searchsorted(chunk, part.window))
            position, atom = (torch.tensor(part[name].to_numpy()) for name in ("position", "atom"))
            key, value = (side[atom] for side in sae.atoms())
            shifts = token_shifts(host, run, cell, write, rows, position, key, value)
            for kind in KINDS:
                totals[kind].index_add_(0, atom, shifts[kind].float())
    for totals, (_, sae, firings) in zip(sums, saes, strict=True):
        counts = torch.tensor(np.bincount(firings.atom, minlength=sae.n_atoms)).clamp_min(1)
        for kind in KINDS:
            totals[kind] /= counts[:, None]
    return sums


def top_tokens(shifts: dict[str, torch.Tensor], firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return one row per (atom, kind, promoted or demoted, rank): token, mean shift, n firings, r2.

    shifts: of one SAE, from `mean_shifts`. r2: of the kind as a prediction of `measured`.
    """
    atoms, n = np.unique(firings.atom, return_counts=True)
    measured, tables = shifts["measured"][atoms], []
    total = (measured - measured.mean(1, keepdim=True)).square().sum(1)
    for kind in KINDS:
        means = shifts[kind][atoms]
        r2 = 1 - (measured - means).square().sum(1) / total
        for sign, direction in ((1, "promoted"), (-1, "demoted")):
            top = (sign * means).topk(count)
            table = dict(atom=atoms.repeat(count), kind=kind, direction=direction)
            table |= dict(rank=np.tile(np.arange(1, count + 1), len(atoms)), token=top.indices.flatten())
            table |= dict(shift=sign * top.values.flatten(), n=n.repeat(count))
            table |= dict(r2=np.nan if kind == "measured" else r2.repeat_interleave(count))
            tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)
