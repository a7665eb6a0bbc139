"""The tokens that each atom promotes and demotes, for the atom browser and the control of notebook 03."""

from __future__ import annotations

import pandas as pd

from replication.study.firings import firing_windows
from replication.study.study import Suite
from writesae.evaluate.atoms import ATOM_KEYS, top_firings
from writesae.evaluate.promoted import mean_shifts, top_tokens

FIRINGS = 3  # per atom, those with the largest coefficients, over which its shifts are averaged


def measure(suite: Suite, host_name: str, firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the `count` most promoted and demoted tokens of every atom of these firings of a host's main
    SAEs: the columns of `top_tokens` and of ATOM_KEYS."""
    data, picked = suite.profile.data, top_firings(firings, FIRINGS).sort_values(["window", "position"])
    cells, parts = zip(*picked.groupby(["layer", "head", "target"]), strict=True)
    saes = [(cell[:2], suite.sae(host_name, *cell), part) for cell, part in zip(cells, parts)]
    windows, write = firing_windows(suite, host_name), suite.profile.saes.write
    means = mean_shifts(suite.host(host_name), windows, saes, write, data.batch_windows)
    tables = [
        top_tokens(shifts, part, count).assign(host=host_name, layer=layer, head=head, target=target)
        for shifts, part, (layer, head, target) in zip(means, parts, cells)
    ]
    return pd.concat(tables, ignore_index=True)


def run(suite: Suite, host_name: str, firings: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return `measure` of all firings of a host, kept in build/ and computed where something has changed."""
    places = top_firings(firings, FIRINGS)[[*ATOM_KEYS, "window", "position"]].to_numpy().tolist()
    inputs = dict(data=suite.profile.data, saes=suite.sae_files(host_name), write=suite.profile.saes.write)
    inputs |= dict(count=count, places=places)

    def compute(_: str) -> pd.DataFrame:
        return measure(suite, host_name, firings, count)

    return suite.staged("promoted", host_name, [host_name], compute, [__name__], inputs)
