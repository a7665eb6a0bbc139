"""replication.pages.headline: its table against win rates computed by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from replication.pages import headline

PLACES = {"middle": (4, 3), "weighty": (5, 1)}


class SmallStudy:
    """A study with two cells of one host; `write` keeps the tables."""

    main = "a"
    cells = pd.DataFrame([dict(host="a", layer=x, head=y, place=name) for name, (x, y) in PLACES.items()])
    profile = SimpleNamespace(seed=7, replacement=SimpleNamespace(bootstrap=300))

    def __init__(self):
        self.tables = {}

    def write(self, name, table):
        self.tables[name] = table
        return table


def firings_of(seeds=(7, 1007, 2007), places=60) -> pd.DataFrame:
    """Random KLs per cell, target, centre and draw; the draw `atoms` has the first seed only."""
    generator, parts = np.random.default_rng(0), []
    for layer, head in PLACES.values():
        for target in ("state", "write"):
            for centre in ("mean", "none"):
                for draw, seed in [("positions", s) for s in seeds] + [("atoms", seeds[0])]:
                    for amplitude in ("coefficient", "projection"):
                        part = pd.DataFrame(dict(window=np.arange(places), position=20, passage=np.arange(places) // 3))
                        part = part.assign(layer=layer, head=head, target=target, centre=centre, draw=draw, seed=seed)
                        names = ("atom", "random", "delete", "reconstruction", "native_rescaled", "atom_and_mean")
                        kls = {f"kl_{name}": generator.exponential(size=places) for name in names}
                        if amplitude == "projection":
                            kls |= {f"kl_{name}": np.nan for name in names[3:]}
                        if centre == "none":
                            kls["kl_atom_and_mean"] = np.nan
                        columns = dict(host="a", amplitude=amplitude, atom=np.arange(places) % 5, coefficient=1.0)
                        parts.append(part.assign(cosine=generator.normal(size=places), **columns, **kls))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def firings():
    return firings_of()


@pytest.fixture(scope="module")
def table(firings):
    return headline.summarise(SmallStudy(), firings)


def test_rates_are_means_over_places_and_seeds(table, firings):
    where = dict(target="write", centre="none", draw="positions", amplitude="coefficient")
    row = table[(table[list(where)] == pd.Series(where)).all(axis=1) & (table.condition == "atom")]
    row = row[row.cells == "middle"].iloc[0]
    part = firings[(firings[list(where)] == pd.Series(where)).all(axis=1) & (firings.layer == 4)]
    won = part.kl_atom < part.kl_delete
    assert (row.n, row.seeds) == (60, 3)
    assert row.win_rate == pytest.approx(won.mean())
    assert [row.lowest, row.highest] == pytest.approx(
        [won.groupby(part.seed).mean().min(), won.groupby(part.seed).mean().max()]
    )
    assert row.between_seeds == pytest.approx(won.groupby(part.seed).mean().std())
    shares = part.groupby("seed").kl_atom.mean() / part.groupby("seed").kl_delete.mean()
    assert row.recovered == pytest.approx(1 - shares.mean())
    assert row.recovered_low < row.recovered < row.recovered_high
    assert row.cosine_below_zero == pytest.approx((part.cosine < 0).mean())


def test_the_paper_s_saes_at_every_place_and_training(firings):
    table = headline.paper_places(SmallStudy(), firings)
    where = dict(target="state", centre="mean", draw="positions", amplitude="coefficient", layer=4)
    wanted = firings[(firings[list(where)] == pd.Series(where)).all(axis=1)]
    assert set(table.place) == {"middle"} and len(table) == 60 * 3 == len(wanted)
    assert table.kl_atom.tolist() == wanted.kl_atom.tolist() and table.seed.tolist() == wanted.seed.tolist()


def test_only_the_paper_s_places_are_pooled(table):
    pooled, middle = (
        table[table.cells == name].drop(columns="cells").reset_index(drop=True) for name in ("pooled", "middle")
    )
    pd.testing.assert_frame_equal(pooled, middle)
    assert len(table[table.cells == "weighty"]) == len(middle)


def test_conditions_that_were_not_measured_have_no_row(table):
    measured = table.groupby(["centre", "amplitude"]).condition.unique().map(set)
    assert measured["none", "coefficient"] == {"atom", "random", "reconstruction", "native_rescaled"}
    assert measured["mean", "coefficient"] == measured["none", "coefficient"] | {"atom_and_mean"}
    assert measured["mean", "projection"] == {"atom", "random"}


def test_one_row_per_cell_is_the_paper_s_protocol(table):
    assert table[table.paper].cells.tolist() == ["pooled", "middle", "weighty"]
    assert (table[table.paper][list(headline.PAPER)] == pd.Series(headline.PAPER)).all(axis=None)


def test_contrasts_are_paired_by_place_and_seed(firings):
    shifted = firings.copy()
    rows = {target: shifted[shifted.target == target].index for target in ("state", "write")}
    shifted.loc[rows["write"], ["kl_atom", "kl_delete"]] = shifted.loc[
        rows["state"], ["kl_atom", "kl_delete"]
    ].to_numpy()
    same = headline.contrasts(SmallStudy(), shifted)
    assert (same[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    apart = headline.contrasts(SmallStudy(), firings).set_index(["centre", "amplitude", "cells"])
    part = firings[(firings.draw == "positions") & (firings.centre == "none") & (firings.layer == 4)]
    part = part[part.amplitude == "coefficient"]
    won = (part.kl_atom < part.kl_delete).groupby(part.target).mean()
    assert apart.loc[("none", "coefficient", "middle"), "difference"] == pytest.approx(won["write"] - won["state"])
