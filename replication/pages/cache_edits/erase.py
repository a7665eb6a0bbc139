"""Erase an atom where it fires, add it where it does not (the paper's App. I.4)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication.pages.cache_edits.site import Site, interval, places
from replication.statistics import paired_wilcoxon, wilson
from writesae.edit import make_edit
from writesae.evaluate.firings import Encoded
from writesae.evaluate.install import ranks
from writesae.evaluate.replacement import STEPS
from writesae.sae.model import SAE


@torch.no_grad()
def log_p(site: Site, rows, position, left, right) -> torch.Tensor:
    """Log-probabilities [n, V] that the token after the write reads out, with left right^T ([n, d_k], [n, d_v]) added."""
    edit = make_edit(rows, position, left[:, None], right[:, None])
    return F.log_softmax(site.host.logits(site.edited(edit, STEPS)[:, -1]), -1)


def native_log_p(site: Site, rows, position) -> torch.Tensor:
    """The same without an edit."""
    return F.log_softmax(site.logits(rows, position + STEPS - 1), -1)


def token_drops(site: Site, firings: pd.DataFrame, atoms: np.ndarray) -> torch.Tensor:
    """[atoms, V]: for each atom and token, the fall of log p by deletion of the native write, summed over its firings.

    The largest entry of a line is the atom's preferred token (App. I.4). firings: with their row; atoms: ascending.
    """
    (rows, position), total = places(firings), torch.zeros(len(atoms), site.host.vocabulary)
    key, value, _ = site.native(rows, position)
    fall = native_log_p(site, rows, position) - log_p(site, rows, position, key, -value)
    return total.double().index_add(0, torch.from_numpy(np.searchsorted(atoms, firings.atom)), fall.double())


def draw_places(firings: pd.DataFrame, encoded: Encoded, atoms: np.ndarray, count: int, seed: int) -> pd.DataFrame:
    """`count` of these firings of each atom, and as many of the places where it is not among the active ones.

    coefficient: the firing's own; elsewhere the median one of the drawn firings (the paper's a*).
    """
    window, position = (torch.tensor(firings[name].to_numpy()) for name in ("window", "position"))
    indices, coefficients = encoded.indices[window, position], encoded.coefficients[window, position]
    drawn = []
    for atom in atoms:
        silent = firings[~((indices == atom) & (coefficients > 0)).any(-1).numpy()]
        own = firings[firings.atom == atom].sample(count, random_state=seed)
        other = silent.sample(min(count, len(silent)), random_state=seed)
        drawn.append(own.assign(where="firing"))
        drawn.append(other.assign(where="elsewhere", atom=atom, coefficient=own.coefficient.median()))
    return pd.concat(drawn).sort_values(["window", "position"], kind="stable").reset_index(drop=True)


def others(alive: torch.Tensor, atom: torch.Tensor, seed: int) -> torch.Tensor:
    """For each atom [n] another alive one; alive [A]: ascending, with these atoms among them."""
    drawn = torch.randint(len(alive) - 1, atom.shape, generator=torch.Generator().manual_seed(seed))
    return alive[drawn + (drawn >= torch.searchsorted(alive, atom))]


def writes_at(where: str, native, atom, other, size: torch.Tensor, doses) -> list[tuple]:
    """(condition, dose, key, value) of what is added at places of one kind; native, atom, other: (key, value) pairs.

    At firings `delete` takes the native write out, `subtract` the atom at its coefficient, `random` another atom at the
    same one. Elsewhere `add` puts the atom in at dose x size, `random` another atom.
    """
    if where == "firing":
        taken = dict(subtract=atom, random=other)
        return [("delete", 1.0, native[0], -native[1])] + [(n, 1.0, k, -size * v) for n, (k, v) in taken.items()]
    return [(n, m, k, m * size * v) for m in doses for n, (k, v) in dict(add=atom, random=other).items()]


def erase(site: Site, sae: SAE, drawn: pd.DataFrame, preferred: dict, alive, doses, seed: int) -> pd.DataFrame:
    """A line a (place, condition, dose, source of the preferred token): the change of the token's log-probability.

    drawn: lines of `draw_places` with their row; preferred: {source: {atom: token}}; alive [A]: atoms, ascending.
    """
    atoms, tables = sae.atoms(), []
    for where, part in drawn.groupby("where", sort=False):
        rows, position = places(part)
        atom = torch.tensor(part.atom.to_numpy())
        sides = [[x[a] for x in atoms] for a in (atom, others(alive, atom, seed))]
        native, before = site.native(rows, position)[:2], native_log_p(site, rows, position)
        size = torch.tensor(part.coefficient.to_numpy())[:, None].to(atoms[0])
        for condition, dose, key, value in writes_at(where, native, *sides, size, doses):
            after = log_p(site, rows, position, key, value)
            for source, tokens in preferred.items():
                token = torch.tensor([tokens[a] for a in part.atom])
                one, two = (x.gather(-1, token[:, None])[:, 0] for x in (before, after))
                numbers = dict(token=token, log_p=one, change=two - one)
                numbers |= dict(native_rank=ranks(before, token), edited_rank=ranks(after, token))
                said = dict(condition=condition, dose=dose, token_from=source)
                tables.append(part.drop(columns="row").assign(**said, **{n: x.numpy() for n, x in numbers.items()}))
    return pd.concat(tables, ignore_index=True)


def summarise_erase(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A line a (host, atom or all of them, where, condition, dose, token_from): median change of log p with its bootstrap
    interval by passage (over all atoms: the wider of by passage and by atom), share of falls (Wilson), paired Wilcoxon p,
    median ranks."""
    rows, keys = [], ["host", "target", "where", "condition", "dose", "token_from"]
    for values, group in table.groupby(keys, sort=False):
        for atom, part in [("all", group), *group.groupby("atom")]:
            by = ["passage", "atom"] if part.atom.nunique() > 1 else ["passage"]
            found, falls = [interval(part.change, part[name], np.median, seed) for name in by], part.change < 0
            row = dict(zip(keys, values, strict=True), atom=str(atom), n=len(part), n_passages=part.passage.nunique())
            row["median_change"] = part.change.median()
            row |= dict(ci_low=min(x.low for x in found), ci_high=max(x.high for x in found), falls=falls.mean())
            row["falls_low"], row["falls_high"] = wilson(int(falls.sum()), len(part))
            row["wilcoxon_p"] = paired_wilcoxon(part.log_p + part.change, part.log_p).p
            rows.append(row | {f"median_{n}": part[n].median() for n in ("native_rank", "edited_rank")})
    return pd.DataFrame(rows)
