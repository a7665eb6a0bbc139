"""The tokens that each atom promotes and demotes, for the atom browser and the control of notebook 03."""

from __future__ import annotations

import pandas as pd

from replication.study.firings import firing_windows
from replication.study.study import Study
from writesae.evaluate.atoms import top_firings
from writesae.evaluate.promoted import mean_shifts, top_tokens

FIRINGS = 3  # an atom's shifts are averaged over its firings with the largest coefficients


def measure(study: Study, host_name: str, firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the `count` most promoted and demoted tokens of every atom of these firings of the main SAEs."""
    return _measure(host_name, **_given(study, host_name, firings), count=count)


def _given(study: Study, host_name: str, firings: pd.DataFrame) -> dict:
    picked = top_firings(firings, FIRINGS).sort_values(["window", "position"])
    saes = [(cell, study.sae(host_name, *cell), part) for cell, part in picked.groupby(["layer", "head", "target"])]
    given = dict(host=study.host(host_name), windows=firing_windows(study, host_name), saes=saes)
    return given | dict(batch=study.profile.data.batch_windows, write=study.profile.saes.write)


def _measure(_: str, host, windows, saes, write, batch, count) -> pd.DataFrame:
    means = mean_shifts(host, windows, [(cell[:2], sae, part) for cell, sae, part in saes], write, batch)
    tables = [
        top_tokens(shifts, part, count).assign(host=host.name, layer=layer, head=head, target=target)
        for shifts, ((layer, head, target), _, part) in zip(means, saes, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


def run(study: Study, host_name: str, firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return `measure` of all firings of a host, kept in build/."""
    given = _given(study, host_name, firings)
    return study.stage("promoted", host_name, [host_name], _measure, **given, count=count)
