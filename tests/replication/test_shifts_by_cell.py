"""Predicted shifts in every cell (page 10), against hand-made tables and the shifts of a small host."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from replication.pages import other_hosts
from replication.study.profile import ShiftCells
from writesae.evaluate.shifts import measure_shifts
from writesae.text import Windows


def points(measured, exact, through_layer, through_norm):
    return pd.DataFrame(dict(measured=measured, exact=exact, through_layer=through_layer, through_norm=through_norm))


def test_the_errors_of_first_order_are_those_of_the_layer_and_of_what_is_above():
    generator = np.random.default_rng(0)
    measured = generator.normal(size=30)
    layer, above, rest = (0.1 * generator.normal(size=30) for _ in range(3))
    frame = points(measured, measured - above - layer, measured - above, measured - rest)
    row = other_hosts._parts(frame)
    size = measured.var() * 30
    assert row["linear_layer"] == pytest.approx((layer**2).sum() / size)
    assert row["linear_above"] == pytest.approx((above**2).sum() / size) == pytest.approx(1 - row["through_layer"])
    assert row["rest"] == pytest.approx((rest**2).sum() / size)
    both = row["linear_layer"] + row["linear_above"]
    both += 2 * row["cosine"] * np.sqrt(row["linear_layer"] * row["linear_above"])
    assert row["exact"] == pytest.approx(1 - both)


def test_opposite_errors_cancel():
    measured = np.arange(5.0)
    row = other_hosts._parts(points(measured, measured, measured - 0.3, measured))
    assert row["exact"] == 1 and row["cosine"] == pytest.approx(-1) and row["through_layer"] < 1


def test_cells_are_counted_where_a_predictor_is_ahead():
    class Written:
        def write(self, name, table):
            return table

    cells = pd.DataFrame(dict(exact=[0.9, 0.8, 0.5, 0.7], through_layer=[0.95, 0.7, 0.9, 0.6]))
    cells = cells.assign(through_norm=[0.99, 0.9, 0.95, 0.65], linear_layer=0.1, linear_above=0.05, rest=0.01)
    cells = cells.assign(host="h", eps=3.0, cosine=[0.1, -0.5, 0.2, -0.9])
    row = other_hosts.summarise_cells(Written(), cells).iloc[0]
    assert (row.n_cells, row.layer_ahead, row.norm_ahead) == (4, 0.5, 0.75)
    assert row.cosine_behind == pytest.approx(-0.7) and 0 < row.layer_ahead_low < 0.5 < row.layer_ahead_high < 1
    shown = other_hosts.shown_cells(other_hosts.summarise_cells(Written(), cells))
    assert shown.iloc[0].tolist() == ["10.00", "5.00", "1.00", "2 of 4", "3 of 4", "-0.70"]


def test_the_atoms_of_a_cell_are_native_writes_of_other_places(gated_deltanet, tokens):
    host = type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).float(), None, "small")
    windows, t0, cell = Windows(tokens, torch.arange(3)), torch.tensor([10, 30, 50]), (1, 2)
    places, options = torch.tensor([[0, 5], [2, 40]]), dict(eps=[0.5, 2.0], horizon=3, write="added")
    table = other_hosts._in_cell(cell, host, windows, t0, places, options)
    factors = host.factors(host.run(tokens), *cell)
    unit = torch.nn.functional.normalize
    key, value = (unit(torch.stack([x[0, 5], x[2, 40]]), dim=-1) for x in (factors.key, factors.added))
    by_hand = measure_shifts(host, windows, t0, cell, key, value, **options)
    for row in table.itertuples():
        part = by_hand[by_hand.eps == row.eps]
        scores = [other_hosts.r2(x.measured, x.through_norm) for _, x in part.groupby("atom")]
        assert row.through_norm == pytest.approx(np.median(scores), abs=1e-4)
    assert table[["host", "layer", "head", "n_atoms", "n_prompts"]].drop_duplicates().values.tolist() == [
        ["small", 1, 2, 2, 3]
    ]


def test_a_profile_needs_the_cells_of_its_shifts():
    with pytest.raises(ValueError, match="every"):
        ShiftCells(every=0, eps=[3.0], prompts=2, atoms=2)
