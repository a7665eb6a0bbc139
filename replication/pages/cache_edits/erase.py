"""Erase an atom where it fires, add it where it does not (the paper's App. I.4)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication.pages.cache_edits.site import Site, interval, share_interval
from replication.statistics import ci, paired_wilcoxon, wider, with_ends
from writesae.edit import make_edit
from writesae.evaluate.firings import CellSAE, Places
from writesae.evaluate.install import ranks
from writesae.evaluate.replacement import STEPS
from writesae.sae.model import SAE
from writesae.sae.sparsity import Active


@torch.no_grad()
def log_p(site: Site, places: Places, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return log p [n, V] of the token after the next, after left right^T ([n, d_k], [n, d_v]) is added."""
    edit = make_edit(places.row, places.position, left[:, None], right[:, None])
    return F.log_softmax(site.host.logits(site.edited(edit, STEPS)[:, -1]), -1)


def native_log_p(site: Site, places: Places) -> torch.Tensor:
    """Return the same log-probabilities without an edit."""
    return F.log_softmax(site.logits(places.row, places.position + STEPS - 1), -1)


def token_drops(site: Site, firings: pd.DataFrame, atoms: np.ndarray) -> torch.Tensor:
    """Return the decrease of each log p under deletion of the native write, summed over firings: [atoms, V].

    The largest entry of a row is the atom's preferred token (App. I.4). atoms: ascending."""
    places, total = site.places(firings), torch.zeros(len(atoms), site.host.vocabulary)
    key, value, _ = site.native(places.row, places.position)
    fall = native_log_p(site, places) - log_p(site, places, key, -value)
    return total.double().index_add(0, torch.from_numpy(np.searchsorted(atoms, firings.atom)), fall.double())


def draw_places(firings: pd.DataFrame, active: Active | CellSAE, atoms, count: int, seed: int) -> pd.DataFrame:
    """Draw `count` firings of each atom, and as many firings of other atoms where this atom is not active.

    coefficient: that of the firing; elsewhere the median of the drawn firings (the paper's a*)."""
    places = Places.of(firings)
    indices, coefficients = (x[places.window, places.position] for x in (active.indices, active.coefficients))
    drawn = []
    for atom in atoms:
        silent = firings[~((indices == atom) & (coefficients > 0)).any(-1).numpy()]
        fired = firings[firings.atom == atom].sample(count, random_state=seed)
        other = silent.sample(min(count, len(silent)), random_state=seed)
        drawn.append(fired.assign(where="firing"))
        drawn.append(other.assign(where="elsewhere", atom=atom, coefficient=fired.coefficient.median()))
    return pd.concat(drawn).sort_values(["window", "position"], kind="stable").reset_index(drop=True)


def others(alive: torch.Tensor, atom: torch.Tensor, seed: int) -> torch.Tensor:
    """Return another alive atom for each atom [n]; alive [A]: ascending, with these atoms among them."""
    drawn = torch.randint(len(alive) - 1, atom.shape, generator=torch.Generator().manual_seed(seed))
    return alive[drawn + (drawn >= torch.searchsorted(alive, atom))]


def writes_at(where: str, native, atom, other, size: torch.Tensor, doses) -> list[tuple]:
    """Return (condition, dose, key, value) of the edits at one kind of places; the sides are (key, value).

    At firings `delete` removes the native write, `subtract` the atom and `random` another atom at its
    coefficient. Elsewhere `add` adds the atom at dose x size, `random` another atom."""
    if where == "firing":
        subtracted = dict(subtract=atom, random=other)
        return [("delete", 1.0, native[0], -native[1])] + [(n, 1.0, k, -size * v) for n, (k, v) in subtracted.items()]
    return [(n, m, k, m * size * v) for m in doses for n, (k, v) in dict(add=atom, random=other).items()]


def erase(site: Site, sae: SAE, drawn: pd.DataFrame, preferred: dict, alive, doses, seed: int) -> pd.DataFrame:
    """Return the change of the token's log p per (place, condition, dose, source of the preferred token).

    drawn: rows of `draw_places`; preferred: {source: {atom: token}}; alive [A]: atoms, ascending."""
    atoms, tables = sae.atoms(), []
    for where, part in drawn.groupby("where", sort=False):
        places = site.places(part)
        sides = [[x[a] for x in atoms] for a in (places.atom, others(alive, places.atom, seed))]
        native, before = site.native(places.row, places.position)[:2], native_log_p(site, places)
        size = places.coefficient[:, None].to(atoms[0])
        for condition, dose, key, value in writes_at(where, native, *sides, size, doses):
            after = log_p(site, places, key, value)
            for source, tokens in preferred.items():
                token = torch.tensor([tokens[a] for a in part.atom])
                first, second = (x.gather(-1, token[:, None])[:, 0] for x in (before, after))
                columns = dict(token=token, log_p=first, change=second - first)
                columns |= dict(native_rank=ranks(before, token), edited_rank=ranks(after, token))
                labels = dict(condition=condition, dose=dose, token_from=source)
                tables.append(part.assign(**labels, **{name: x.numpy() for name, x in columns.items()}))
    return pd.concat(tables, ignore_index=True)


def summarise_erase(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return changes of log p, tests, ranks per (host, atom or all, where, condition, dose, token_from).

    Bootstrap by passage; for all atoms, the wider of passage and atom. falls: share of decreases, with Wilson's too."""
    rows, keys = [], ["host", "target", "where", "condition", "dose", "token_from"]
    for values, group in table.groupby(keys, sort=False):
        for atom, part in [("all", group), *group.groupby("atom")]:
            by = ["passage", "atom"] if part.atom.nunique() > 1 else ["passage"]
            ends, falls = [interval(part.change, part[name], np.median, seed) for name in by], part.change < 0
            shares = share_interval(falls, *(part[name] for name in by), seed=seed)
            row = dict(zip(keys, values, strict=True), atom=str(atom), n=len(part), n_passages=part.passage.nunique())
            row |= dict(median_change=part.change.median()) | ci(wider(*ends))
            row |= with_ends("falls", falls.mean(), shares)
            row["wilcoxon_p"] = paired_wilcoxon(part.log_p + part.change, part.log_p)
            rows.append(row | {f"median_{n}": part[n].median() for n in ("native_rank", "edited_rank")})
    return pd.DataFrame(rows)
