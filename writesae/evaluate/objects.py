"""The replacement test on three objects: the native write, the state, the SAE's reconstruction of it.

At a firing (position t) with atom a and coefficient c, r is another alive atom, M is what the SAE adds to the
sum of its atoms (`SAE.offset`), and Xhat is its whole reconstruction of the state S_t, with M. The object is
replaced under three conditions:

| object         | offset_kept | instead of           | atom    | delete     | random           |
|----------------|-------------|----------------------|---------|------------|------------------|
| write          | no          | the native write     | c a     | 0          | c r              |
| state          | no          | S_t                  | c a     | 0          | c r              |
| state          | yes         | S_t                  | M + c a | M          | M + c r          |
| reconstruction | yes         | S_t                  | Xhat    | Xhat - c a | Xhat - c a + c r |

SAEs of writes have the first row only, and the third row needs an offset that is not zero. The difference of
new and old matrix is added to the state at t, the writing token reads it, and it moves on with the
transitions. The outcome is KL(native, patched) in nats at t + 1.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from writesae.edit import head_change, kl, make_edit
from writesae.evaluate.firings import CellSAE, Places
from writesae.evaluate.replacement import STEPS, full_rank, patched_logits, replacements
from writesae.hosts.base import Host, Run
from writesae.recurrence import Factors, torch_defaults

CONDITIONS = ("atom", "delete", "random")
MOST_OBJECTS = 4  # of one SAE: the rows of the table above

Objects = dict[tuple[str, bool], Tensor]  # (object, offset_kept) -> matrices [n, conditions, d_k, d_v]


def state_edits(cell_sae: CellSAE, places: Places, factors: Factors, seed: int) -> tuple[Objects, Tensor]:
    """Return new minus old matrix [n, 3, d_k, d_v] for every object, and the atom's cosine to the write [n].

    factors: of the cell over the run, fp32. The conditions have the order of CONDITIONS.
    """
    sae, native = cell_sae.sae, factors.at(places.row, places.position)
    terms = replacements(cell_sae, places, factors, seed)
    atom, other = (terms[name][0].mT @ terms[name][1] for name in ("atom", "random"))
    write = native.key[:, :, None] * native.write(cell_sae.write)[:, None]
    cosine = (atom * write).sum((1, 2)) / write.norm(dim=(1, 2))
    atom, other = (places.coefficient.to(atom.dtype)[:, None, None] * x for x in (atom, other))
    new = torch.stack([atom, torch.zeros_like(atom), other], 1)
    edits = {("write", False): new - write[:, None]}
    if cell_sae.target == "state":
        state = factors.history("state").matrices(places.row, places.position)[:, None]
        active = (x[places.window, places.position] for x in (cell_sae.indices, cell_sae.coefficients))
        edits["state", False] = new - state
        if sae.offset.any():
            edits["state", True] = sae.offset + new - state
        edits["reconstruction", True] = (sae.decode(*active) - atom)[:, None] + new - state
    return edits, cosine


def edited_head(factors: Factors, places: Places, edits: Tensor) -> Tensor:
    """Return the head's change [n, conditions, STEPS, d_v] when matrices [n, conditions, d_k, d_v] are added
    to the state at each place."""
    count = edits.shape[1]
    rows, position = (x.repeat_interleave(count) for x in (places.row, places.position))
    edit = make_edit(rows, position, *full_rank(edits.flatten(0, 1)), "write")
    return head_change(factors, edit, STEPS)[0].unflatten(0, (-1, count))


@torch_defaults()
def replace_objects(
    host: Host,
    run: Run,
    cell_sae: CellSAE,
    firings: pd.DataFrame,
    places: Places,
    seed: int,
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Return a row per firing and object: firing, cosine, object, offset_kept, kl_atom, kl_delete, kl_random.

    cosine: of the atom to the native write. KLs in nats. places: where the firings are in the run, each with
    a token after it. batch_rows: edited rows per run. Random draws depend only on the seed and the place.
    """
    factors, tables = host.factors(run, cell_sae.layer, cell_sae.head), []
    for part, some in places.pieces(len(CONDITIONS) * MOST_OBJECTS, batch_rows):
        edits, cosine = state_edits(cell_sae, some, factors, seed)
        native = host.logits(run.final[some.row, some.position + 1])
        change = edited_head(factors, some, torch.cat(list(edits.values()), 1))
        divergence = kl(native[:, None], patched_logits(host, run, cell_sae, some, change))
        shared = firings.iloc[part].assign(cosine=cosine.numpy())
        for (name, kept), values in zip(edits, divergence.split(len(CONDITIONS), 1), strict=True):
            columns = {f"kl_{condition}": x.numpy() for condition, x in zip(CONDITIONS, values.T, strict=True)}
            tables.append(shared.assign(object=name, offset_kept=kept, **columns))
    where = dict(layer=cell_sae.layer, head=cell_sae.head, target=cell_sae.target)
    return pd.concat(tables, ignore_index=True).assign(host=host.name, **where, centre=cell_sae.sae.config.centre)
