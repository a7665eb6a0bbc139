"""Which tokens each atom promotes and demotes, for the atom browser and notebook 03."""

from __future__ import annotations

import pandas as pd

from replication.study.study import Suite
from writesae.evaluate.promoted import Dictionary, mean_shifts, top_tokens
from writesae.text import Windows


def run(suite: Suite, name: str, windows: Windows, own: list[Dictionary], count: int) -> pd.DataFrame:
    """The host's table of top tokens (kept in build/ only: some 70,000 lines a host), computed where something changed."""
    write, batch = suite.profile.saes.write, suite.profile.data.batch_windows

    def compute(_: str) -> pd.DataFrame:
        found = mean_shifts(suite.host(name), windows, own, write, batch)
        tables = [
            top_tokens(shifts, x.firings, count).assign(host=name, layer=x.layer, head=x.head, target=x.target)
            for shifts, x in zip(found, own, strict=True)
        ]
        return pd.concat(tables, ignore_index=True)

    places = [x.firings[["window", "position", "atom"]].to_numpy().tolist() for x in own]
    cells = [(x.layer, x.head, x.target) for x in own]
    inputs = dict(data=suite.profile.data, saes=suite.sae_files(name), write=write, count=count)
    return suite.staged("promoted", name, [name], compute, [__name__], inputs | dict(places=places, cells=cells))
