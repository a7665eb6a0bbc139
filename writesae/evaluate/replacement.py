"""The replacement test (the paper's Sec. 3.2, Table 2): take a native write out, put something in, compare the output.

Per firing, amplitude and read scope the table has the KL(native, patched) in nats of the next token's distribution, and
for each condition the loss on the token after it; of the native run, deletion and atom also the most likely token:

| condition       | put in the write's place                                                   |
|-----------------|----------------------------------------------------------------------------|
| delete          | nothing                                                                    |
| atom            | the firing's atom                                                          |
| random          | another alive atom                                                         |
| reconstruction  | the SAE's whole reconstruction (all k active atoms; with the mean for write-trained SAEs) |
| mean_write      | the cell's mean write                                                      |
| resampled       | the native write of another position                                       |
| native_rescaled | the native write itself, at the atom's norm                                |
| flat_svd        | the top singular pair of a flat SAE's reconstruction of the state (App. F.4; not with target "write") |
| whole_atom      | the firing's atom itself, where its rank is above 1 and "atom" is its top singular pair (only on request) |

amplitude "coefficient": the atom and its controls have the atom's coefficient as their norm (the reconstruction keeps its
own); "matched_norm": all have the Frobenius norm of the native write. flat_svd has the same norms as the atom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.edit import SCOPES, head_change, kl, make_edit
from writesae.evaluate.firings import CellSAE, Places
from writesae.hosts.base import Host, Run
from writesae.recurrence import Factors
from writesae.sae.parts import RankOneDecoder
from writesae.sae.train import top_singular_pair

AMPLITUDES = ("coefficient", "matched_norm")
CONDITIONS = ("delete", "atom", "random", "reconstruction", "mean_write", "resampled", "native_rescaled", "flat_svd")
RANKS = (  # conditions whose terms have the same rank run together
    ("atom", "random", "resampled", "native_rescaled", "flat_svd"),
    ("reconstruction", "mean_write", "whole_atom"),
)
STEPS = 2  # the writing token and the next one

Terms = tuple[Tensor, Tensor]  # left [n, r, d_k], right [n, r, d_v]: n matrices, each a sum of r outer products


def rank_one(key: Tensor, value: Tensor) -> Terms:
    """Return terms (left [n, 1, d_k], right [n, 1, d_v]) of unit Frobenius norm."""
    return F.normalize(key, dim=-1)[:, None], F.normalize(value, dim=-1)[:, None]


def full_rank(matrices: Tensor) -> Terms:
    """Return any matrices [n, d_k, d_v] as terms (left [n, d_k, d_k], right [n, d_k, d_v])."""
    return torch.eye(matrices.shape[1], dtype=matrices.dtype).expand(len(matrices), -1, -1), matrices


def replacements(cell_sae: CellSAE, places: Places, factors: Factors, seed: int) -> dict[str, Terms]:
    """Return what each condition but delete puts in, of unit norm; the reconstruction is in its own norm.

    factors: the cell's, over the run. Random draws depend only on the seed and the firing.
    """
    window, position, atom = places.window, places.position, places.atom
    key, value = cell_sae.sae.atoms()
    uniform = places.draw(seed, lambda generator: torch.rand(2, generator=generator, dtype=torch.float64))
    alive = cell_sae.alive
    other = alive[(uniform[:, 0] * len(alive)).long()]
    neighbour = alive[(torch.searchsorted(alive, atom) + 1) % len(alive)]
    other = torch.where(other == atom, neighbour, other)
    keys, values = (x.flatten(0, 1) for x in (cell_sae.writes.key, cell_sae.writes.value))
    drawn = (uniform[:, 1] * len(keys)).long()
    mean, native = cell_sae.mean_write.expand(len(atom), -1, -1), factors.at(places.row, position)
    put_in = {
        "atom": rank_one(key[atom], value[atom]),
        "random": rank_one(key[other], value[other]),
        "reconstruction": full_rank(reconstruction(cell_sae, window, position)),
        "mean_write": full_rank(mean / cell_sae.mean_write.norm()),
        "resampled": rank_one(keys[drawn], values[drawn]),
        "native_rescaled": rank_one(native.key, native.write(cell_sae.write)),
    }
    if cell_sae.flat is not None:
        active = cell_sae.flat.encode(cell_sae.states.matrices(window, position))
        put_in["flat_svd"] = rank_one(*top_singular_pair(cell_sae.flat.decode(*active)))
    if not isinstance(cell_sae.sae.decoder, RankOneDecoder):
        whole = cell_sae.sae.decoder.weight()[atom].detach()
        put_in["whole_atom"] = full_rank(whole / whole.flatten(1).norm(dim=1)[:, None, None])
    return put_in


def reconstruction(cell_sae: CellSAE, window: Tensor, position: Tensor) -> Tensor:
    """Return [n, d_k, d_v]: all active atoms at their coefficients; for a write-trained SAE plus its mean write."""
    active = cell_sae.indices[window, position], cell_sae.coefficients[window, position]
    decoded = cell_sae.sae.decode(*active)
    return decoded if cell_sae.target == "write" else decoded - cell_sae.sae.mean


def side_by_side(put_in: dict[str, Terms], names: Sequence[str], scales: dict[str, Tensor]) -> Terms:
    """Return conditions of the same rank, scaled to their norms: left, right [n, conditions, r, d]."""
    left = torch.stack([put_in[name][0] for name in names], 1)
    right = torch.stack([put_in[name][1] * scales[name][:, None, None] for name in names], 1)
    return left, right


def changes(factors: Factors, places: Places, take_out: Terms, put_in: Terms, scope: str) -> Tensor:
    """Return the head's change [n, conditions, STEPS, d_v] where each condition replaces the native write.

    take_out: minus the native write; put_in: terms [n, conditions, r, d], as `side_by_side` gives them.
    """
    n, count = put_in[0].shape[:2]
    left, right = (
        torch.cat([out[:, None].expand(-1, count, -1, -1), side], 2).flatten(0, 1)
        for out, side in zip(take_out, put_in, strict=True)
    )
    rows, position = (x.repeat_interleave(count) for x in (places.row, places.position))
    edit = make_edit(rows, position, left, right, scope)
    return head_change(factors, edit, STEPS)[0].view(n, count, STEPS, -1)


def patched_logits(host: Host, run: Run, cell_sae: CellSAE, places: Places, change: Tensor) -> Tensor:
    """Return the logits [n, conditions, V] after the last step, under each change [n, conditions, steps, d_v]."""
    rows, position = (x.repeat_interleave(change.shape[1]) for x in (places.row, places.position))
    hidden, _ = host.branch(run, cell_sae.layer, cell_sae.head, rows, position, change.flatten(0, 1))
    return host.logits(hidden[:, -1]).unflatten(0, change.shape[:2])


class _Outcome(NamedTuple):
    """Logits of the next token, native [n, V] and patched [n, labels, V], and the token [n] after it."""

    native: Tensor
    patched: Tensor
    following: Tensor


@torch.no_grad()
def replace(
    host: Host,
    run: Run,
    cell_sae: CellSAE,
    firings: pd.DataFrame,
    places: Places,
    seed: int,
    conditions: Sequence[str] = CONDITIONS,
    scopes: Sequence[str] = SCOPES,
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Return one row per firing, amplitude and read scope, in the order scope, amplitude, firing.

    places: where the firings are in the run, which has two tokens after each. Losses are of the token after the next.
    """
    if cell_sae.flat is None:
        conditions = tuple(name for name in conditions if name != "flat_svd")
    if isinstance(cell_sae.sae.decoder, RankOneDecoder):
        conditions = tuple(name for name in conditions if name != "whole_atom")
    size = max(1, batch_rows // (len(scopes) * len(AMPLITUDES) * len(conditions)))
    factors = host.factors(run, cell_sae.layer, cell_sae.head)
    tables = []
    for part in (slice(i, i + size) for i in range(0, len(firings), size)):
        some = places.at(part)
        put_in = replacements(cell_sae, some, factors, seed)
        native = factors.at(some.row, some.position)
        labels, change = _head_changes(factors, native, cell_sae, some, put_in, conditions, scopes)
        outcome = _Outcome(
            host.logits(run.final[some.row, some.position + 1]),
            patched_logits(host, run, cell_sae, some, change),
            run.tokens[some.row, some.position + STEPS],
        )
        shared = firings.iloc[part].assign(**_native_columns(native, cell_sae.write, put_in, outcome))
        tables += _tables(shared, labels, outcome, scopes)
    where = dict(host=host.name, layer=cell_sae.layer, head=cell_sae.head, target=cell_sae.target, write=cell_sae.write)
    return pd.concat(tables, ignore_index=True).assign(**where)


def _head_changes(factors, native, cell_sae, places, put_in, conditions, scopes) -> tuple[list[tuple], Tensor]:
    """Return labels (scope, amplitude or "", condition), and the head's change [n, labels, STEPS, d_v] under each."""
    key, write = native.key, native.write(cell_sae.write)
    norms = dict(coefficient=places.coefficient.float(), matched_norm=key.norm(dim=-1) * write.norm(dim=-1))
    own_norm = put_in["reconstruction"][1].flatten(1).norm(dim=1)
    take_out = key[:, None], -write[:, None]
    nothing = torch.zeros_like(key)[:, None, None], torch.zeros_like(write)[:, None, None]
    labels, parts = [], []
    for scope in scopes:
        labels.append((scope, "", "delete"))
        parts.append(changes(factors, places, take_out, nothing, scope))
        for amplitude in AMPLITUDES:
            scales = dict.fromkeys(conditions, norms[amplitude])
            matched = amplitude == "matched_norm"
            scales["reconstruction"] = norms[amplitude] / own_norm if matched else torch.ones_like(own_norm)
            for group in RANKS:
                names = [name for name in conditions if name in group]
                if names:
                    labels += [(scope, amplitude, name) for name in names]
                    terms = side_by_side(put_in, names, scales)
                    parts.append(changes(factors, places, take_out, terms, scope))
    return labels, torch.cat(parts, 1)


def _native_columns(native: Factors, write: str, put_in: dict[str, Terms], outcome: _Outcome) -> dict:
    """Return what the rows of a firing share: the native write's norm and cosine with the atom, and the native output."""
    key, value = native.key, native.write(write)
    atom_key, atom_value = (x[:, 0] for x in put_in["atom"])
    cosine = (atom_key * F.normalize(key, dim=-1)).sum(-1) * (atom_value * F.normalize(value, dim=-1)).sum(-1)
    return dict(
        native_norm=(key.norm(dim=-1) * value.norm(dim=-1)).numpy(),
        cosine=cosine.numpy(),
        top1_native=outcome.native.argmax(-1).numpy(),
        nll_native=F.cross_entropy(outcome.native, outcome.following, reduction="none").numpy(),
    )


def _tables(shared: pd.DataFrame, labels: list[tuple], outcome: _Outcome, scopes) -> list[pd.DataFrame]:
    """Return a table per scope and amplitude: the shared columns, and KL and loss of every condition."""
    divergence, top = kl(outcome.native[:, None], outcome.patched), outcome.patched.argmax(-1)
    following = outcome.following.repeat_interleave(len(labels))
    loss = F.cross_entropy(outcome.patched.flatten(0, 1), following, reduction="none").view(-1, len(labels))
    tables = []
    for scope in scopes:
        for amplitude in AMPLITUDES:
            table = shared.assign(amplitude=amplitude, read=scope)
            for column, (label_scope, label_amplitude, name) in enumerate(labels):
                if label_scope == scope and label_amplitude in ("", amplitude):
                    table[f"kl_{name}"] = divergence[:, column].numpy()
                    table[f"nll_{name}"] = loss[:, column].numpy()
                    if name in ("delete", "atom"):
                        table[f"top1_{name}"] = top[:, column].numpy()
            tables.append(table)
    return tables
