"""Which atom to put in a write's place: the KL of replacements, predicted without a run and measured.

At each firing, atoms replace the native write at its norm (read scope "write"), one at a time. The KL at t +
1 is predicted from gradients of the log-probabilities of the native top tokens, which are the same for all
atoms (`writesae.shift.Gradients.last_hidden`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.edit import kl
from writesae.evaluate.firings import CellSAE, Places
from writesae.evaluate.replacement import STEPS, changes
from writesae.hosts.base import Host, Run
from writesae.shift import Gradients, gradients, top_log_probabilities

DELETION = -1  # the candidate that puts nothing in the native write's place


def predict_replacements(
    host: Host,
    run: Run,
    cell_sae: CellSAE,
    firings: pd.DataFrame,
    places: Places,
    seed: int,
    *,
    atoms: int,
    readings: Sequence[int],
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Return one row per (firing, candidate): `kl` in nats as measured, its predictions, and the cosine.

    The candidates are the firing's atom (`own`), `atoms` alive atoms, the same at all firings, and DELETION.
    kl_M, M in `readings`: predicted from the log-probabilities of the M native top tokens, by M backward
    passes for all candidates (0: the layer's change goes straight to the final norm). fisher: the second-order
    form for the largest M. cosine: of the atom to the native write. Other arguments: as for `replace`.
    """
    cell, alive = (cell_sae.layer, cell_sae.head), cell_sae.alive
    drawn = alive[torch.from_numpy(np.random.default_rng(seed).permutation(len(alive))[:atoms])]
    put_in = torch.cat([places.atom[:, None], drawn.expand(len(firings), -1)], 1)  # [n, 1 + atoms]
    key, value = (F.pad(side.detach()[put_in], (0, 0, 0, 1)) for side in cell_sae.sae.atoms())  # 0: delete
    factors, count = host.factors(run, *cell), key.shape[1]
    native = factors.at(places.row, places.position)
    write = native.write(cell_sae.write)
    norm = (native.key.norm(dim=-1) * write.norm(dim=-1))[:, None]
    terms = key[:, :, None], (norm[..., None] * value)[:, :, None]
    change = changes(factors, places, (native.key[:, None], -write[:, None]), terms, "write")
    numbers = partial(top_log_probabilities, count=max(readings))
    slopes = gradients(host, run, *cell, places.row, places.position, STEPS, numbers)
    pieces = torch.arange(len(firings)).split(max(1, batch_rows // count))
    kls = pd.concat([_kls(host, run, cell, places, change, slopes, x, readings) for x in pieces])
    cosine = (key @ native.key[..., None])[..., 0] * (value @ write[..., None])[..., 0] / norm
    columns = dict(candidate=F.pad(put_in, (0, 1), value=DELETION), cosine=cosine)
    columns["own"] = (torch.arange(count) == 0).expand(len(firings), -1)
    table = firings.loc[firings.index.repeat(count)].reset_index(drop=True)
    table = table.assign(**{name: x.flatten().numpy() for name, x in columns.items()})
    where = dict(host=host.name, layer=cell[0], head=cell[1], target=cell_sae.target)
    return table.assign(**kls.reset_index(drop=True), **where)


@torch.no_grad()
def _kls(host, run, cell, places, change: Tensor, slopes: Gradients, piece: Tensor, readings) -> pd.DataFrame:
    """Return measured and predicted KLs of all candidates at some of the firings."""
    which = piece.repeat_interleave(change.shape[1])
    rows, starts = places.row[which], places.position[which]
    output, _ = host.edited_layer(run, *cell, rows, starts, change[piece].flatten(0, 1))
    final, _ = host.layers_above(run, cell[0], rows, starts, output)
    native = slopes.logits[which]
    columns = dict(kl=kl(native, host.logits(final[:, -1])))
    for count in readings:
        columns[f"kl_{count}"] = kl(native, host.logits(slopes.last_hidden(output, which, slice(count))))
    top = top_log_probabilities(native, max(readings)).exp()
    columns["fisher"] = (top * slopes.through_layer(output, which).cpu() ** 2).sum(-1) / 2
    return pd.DataFrame({name: x.double().numpy() for name, x in columns.items()})
