"""Page 14_every_cell: its summaries of a sweep's table, compared with values computed by hand."""

import numpy as np
import pandas as pd
import pytest

from replication.pages import every_cell

NAMES = ["win_atom", "ci_low_atom", "ci_high_atom", "win_random", "win_mean_write"]


def sweep_of(cells: dict, seeds=(0,), firings=40) -> pd.DataFrame:
    """A sweep of one host. cells[(head, target)] has one win rate per seed; at matched norm, half of it."""
    rows = []
    for (head, target), rates in cells.items():
        for seed, rate in zip(seeds, rates, strict=True):
            row = dict(host="a", layer=1, head=head, target=target, seed=seed, firings=firings)
            parts = dict(coefficient=1, matched_norm=2, projection=4)
            row |= {f"{name}_{amplitude}": rate / part for name in NAMES for amplitude, part in parts.items()}
            rows.append(row)
    return pd.DataFrame(rows)


def test_each_amplitude_has_its_own_lines():
    table = sweep_of({(0, "state"): [0.4], (0, "write"): [0.8]})
    table.loc[1, "firings"] = 0
    found = every_cell.by_amplitude(table)
    assert found.amplitude.tolist() == ["coefficient", "matched_norm", "projection"] and (found.target == "state").all()
    assert found.win_random.tolist() == [0.4, 0.2, 0.1]
    assert found.n.tolist() == [40, 40, 40]
    assert not found.columns[found.columns.str.contains("_coefficient|_matched_norm|_projection")].any()


def test_the_difference_of_the_targets_is_paired_by_cell():
    generator = np.random.default_rng(0)
    state = generator.random(30)
    table = sweep_of({(i, t): [state[i] + (0.1 if t == "write" else 0)] for i in range(30) for t in ("state", "write")})
    row = every_cell.targets_apart(every_cell.by_amplitude(table)).iloc[0]
    assert (row.n_cells, row.n, row.write_ahead) == (30, 30 * 40, 30)
    assert row.difference == pytest.approx(0.1)
    assert row.difference_high - row.difference_low < 1e-9  # the difference is the same in every cell
    assert row.state_high - row.state_low > 0.1  # the win rates differ between cells


def test_seeds_are_told_apart_from_cells():
    rates = {(i, "state"): [0.2 + 0.1 * i, 0.3 + 0.1 * i] for i in range(4)}
    row = every_cell.over_seeds(every_cell.by_amplitude(sweep_of(rates, seeds=(0, 1)))).iloc[0]
    assert (row.n_cells, row.n_seeds) == (4, 2)
    assert (row.lowest, row.highest) == (pytest.approx(0.35), pytest.approx(0.45))
    assert row.seed_sd == pytest.approx(0.1 / 2**0.5) and row.cell_sd == pytest.approx(0.1 / 2**0.5)
    assert row.between_sd == pytest.approx(np.std([0, 0.1, 0.2, 0.3], ddof=1))


def test_starts_are_compared_cell_by_cell():
    rates = {(i, target): [0.1 * i + gap] for i in range(5) for target, gap in dict(state=0.0, write=0.2).items()}
    plain = sweep_of(rates).assign(fvu=0.5)
    random = sweep_of({key: [0.9 - rate[0]] for key, rate in rates.items()}).assign(fvu=0.7)
    table = pd.concat([plain.assign(variant="rank1+none"), random.assign(variant="rank1+none+random")])
    table = table.assign(half_life_median=table["head"] ** 2.0)
    data, drawn = every_cell.starts(table).itertuples()
    assert (data.start, data.write_ahead, data.n_cells) == ("data", 5, 5)
    assert (drawn.start, drawn.write_ahead, drawn.fvu_state) == ("random", 0, pytest.approx(0.7))
    assert (data.difference, drawn.difference) == pytest.approx((0.2, -0.2))
    assert (data.rho, drawn.rho) == pytest.approx((1.0, -1.0)) and data.fvu_write == pytest.approx(0.5)
    shown = every_cell.shown_starts(every_cell.starts(table))
    assert shown["cells ahead"].tolist() == ["5 of 5", "0 of 5"] and len(shown.columns) + 2 <= 8
    assert every_cell.starts(table[table.variant == "rank1+none"]).start.tolist() == ["data"], "an older sweep"


def test_hosts_of_one_architecture_have_an_interval_over_hosts():
    differences, tables = dict(a=0.1, b=0.2, c=0.6), []
    for host, gap in differences.items():
        rates = {(i, target): [0.1 * i + gap * (target == "write")] for i in range(5) for target in ("state", "write")}
        tables.append(sweep_of(rates).assign(host=host, variant="rank1+none", fvu=0.5))
    saes = pd.concat(tables, ignore_index=True)
    saes["half_life_median"] = saes["head"] * np.where(saes.host == "c", -1.0, 1.0)
    table = every_cell.over_hosts(saes)
    assert table.host.tolist() == ["a", "b", "c", "mean"] and table.n_cells.tolist() == [5, 5, 5, 15]
    assert table.n.tolist() == [200, 200, 200, 600], "both targets have the same places"
    assert table.write_ahead.tolist() == [5, 5, 5, 15] and table.rho.tolist() == pytest.approx([1, 1, -1, 1 / 3])
    assert table.difference.tolist() == pytest.approx([*differences.values(), 0.3])
    reach = 4.302653 * np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    mean = table.iloc[3]
    assert (mean.difference_low, mean.difference_high) == pytest.approx((0.3 - reach, 0.3 + reach))
    shown = every_cell.shown_hosts(table)
    assert shown["cells ahead"].tolist()[-1] == "15 of 15" and len(shown.columns) + 1 <= 8


def test_the_headline_of_several_hosts_has_their_mean_per_centre():
    rates, apart = [], []
    for centre, shift in dict(mean=0.0, none=0.1, bias=9.0).items():
        for host, rate in dict(a=0.3, b=0.4, c=0.6).items():
            where = dict(host=host, centre=centre, cells="pooled", amplitude="coefficient")
            row = dict(condition="atom", draw="positions", win_rate_low=0.1, win_rate_high=0.9)
            rates += [where | row | dict(target="state", win_rate=rate)]
            rates += [where | row | dict(target="write", win_rate=rate + shift)]
            rates += [where | row | dict(target="write", win_rate=0.0, draw="atoms")]
            rates += [where | row | dict(target="write", win_rate=0.0, condition="random")]
            gap = dict(difference=shift, difference_low=shift - 1, difference_high=shift + 1)
            apart += [where | gap | dict(n=30, seeds=3), where | gap | dict(n=10, seeds=3, cells="early")]
    table = every_cell.over_headlines(pd.DataFrame(rates), pd.DataFrame(apart)).set_index(["centre", "host"])
    assert table.index.tolist() == [(centre, host) for centre in ("mean", "none") for host in ("a", "b", "c", "mean")]
    assert table.n.tolist() == [30, 30, 30, 90] * 2 and table.seeds.tolist() == [3, 3, 3, 9] * 2
    mean = table.loc["none", "mean"]
    assert (mean.state, mean.write, mean.difference) == pytest.approx((1.3 / 3, 1.6 / 3, 0.1))
    reach = 4.302653 * np.std([0.3, 0.4, 0.6], ddof=1) / 3**0.5
    assert (mean.state_low, mean.state_high) == pytest.approx((1.3 / 3 - reach, 1.3 / 3 + reach))
    assert table.loc["none", "b"].write_high == 0.9
    shown = every_cell.shown_headlines(table.reset_index())
    assert len(shown) == 8 and len(shown.columns) + 2 <= 8
