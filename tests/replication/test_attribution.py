"""Page 16: its numbers by hand, on small hosts."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_close

from replication.pages import attribution
from writesae.evaluate.attribution import overwriters, weights
from writesae.text import Windows

HORIZON = 20


@pytest.fixture
def windows(tokens):
    return Windows(tokens, torch.tensor([7, 7, 9]))


def test_shares_of_a_layer_are_those_of_a_loop_over_reads(host, run, windows):
    table = attribution.of_layer(1, host, windows, HORIZON)
    assert list(table["head"].unique()) == list(range(host.heads)) and list(table.passage[:3]) == [7, 7, 9]
    assert table.error.max() < 1e-5
    row = table[table["head"] == 2].iloc[1]
    factors = host.factors(run, 1, 2).at(slice(1, 2))
    sizes = (weights(factors)[0].abs() * factors.added[0].norm(dim=-1)).numpy()
    own, near, mass = [], [], np.zeros(sizes.shape[0])
    for t in range(HORIZON, len(sizes)):
        share = sizes[t, : t + 1] / sizes[t, : t + 1].sum()
        own.append(share[t])
        near.append(share[max(0, t - attribution.NEAR + 1) :].sum())
        mass[: t + 1] += share[::-1]
    assert row.share_own == pytest.approx(np.mean(own), rel=1e-6)
    assert row.share_last_8 == pytest.approx(np.mean(near), rel=1e-6)
    assert row.half_distance == int((mass.cumsum() / mass.sum() < 0.5).sum())
    assert 0 <= row.opposed < 0.5
    erases = factors.erase is not None and bool(factors.erase.any())
    assert (row.decay_error > 1e-3) == erases


def test_writes_of_firings_are_followed_in_their_own_window(gated_deltanet, windows):
    host = gated_deltanet
    firings = pd.DataFrame(dict(window=[1, 2, 2, 0], position=[5, 30, 80, 3], atom=[4, 4, 9, 9], passage=[7, 9, 9, 7]))
    table = attribution.of_windows(1, host, windows, (1, 2), firings, 2, HORIZON)
    assert list(zip(table.window, table.position)) == [(1, 5), (2, 30)]  # 80 is too late, window 0 is another group's
    factors = host.factors(host.run(windows.tokens), 1, 2)
    found = weights(factors)[2].abs()
    sizes = found * factors.added[2].norm(dim=-1)
    shares, reads = sizes / sizes.sum(1, keepdim=True), slice(30 + attribution.NEAR, 30 + HORIZON)
    row = table.iloc[1]
    assert row.token == windows.tokens[2, 30]
    assert row.far == pytest.approx(shares[reads, 30].mean().item())
    assert row.reach == pytest.approx((found[reads, 30].sum() / found[30 : 30 + HORIZON, 30].sum()).item())
    which, erased = overwriters(factors)
    assert (row.wait, row.erased) == (which[2, 30] - 30, pytest.approx(erased[2, 30].item()))
    later = windows.tokens[2, 31:] == row.token
    assert_close(row.by_chance, later.double().mean(), "by chance", 1e-6)
    assert row.left <= row.decay + 1e-9


def writes(**columns):
    table = dict(host="rwkv7", passage=[0, 0, 1, 1], left=[0.1, 0.3, 0.2, 0.2], decay=[0.4, 0.4, 0.4, 0.4])
    table |= dict(erased=[0.1, 0.2, 0.3, 0.4], wait=[1, 2, 3, 9], same_token=[1.0, 0.0, 0.0, 0.0], by_chance=0.05)
    return pd.DataFrame(table | columns)


def test_fates_count_what_all_tokens_erased_and_who_erased_most():
    row = attribution.fates(writes(), 200, 1).iloc[0]
    assert row.all_erased == pytest.approx(0.5)
    assert (row.same_token, row.by_chance, row.wait) == (pytest.approx(0.25), pytest.approx(0.05), 2.5)


def test_a_host_that_only_decays_has_no_eraser():
    table = attribution.fates(pd.concat([writes(), writes(host="mamba2", erased=np.nan)]), 50, 1)
    assert table.same_token.isna().tolist() == [False, True]
    assert attribution.readable_fates(table)["same token id (%)"].tolist()[1] == ""


def test_classes_weigh_atoms_equally():
    table = pd.DataFrame({"host": "rwkv7", "class": "bundle", "atom": [1, 1, 1, 2], "reach": [0.2, 0.2, 0.2, 0.6]})
    row = attribution.by_class(table, 100, 1).iloc[0]
    assert (row.reach, row.n_atoms, row.n) == (pytest.approx(0.4), 2, 4)
