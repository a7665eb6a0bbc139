"""The tables of notebook 07_objects, and the numbers of the paper that it compares with."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from replication import statistics as stats
from replication.pages import objects
from replication.scorecard.claims import CLAIMS, papers_table13, papers_value

BINS = pd.DataFrame(dict(cosine_low=[-np.inf, 0.0, 0.3], cosine_high=[0.0, 0.3, np.inf]))


def rows(count=60):
    """Places of two cells with an SAE of states; the atom of object "write" wins where its cosine is high."""
    rng = np.random.default_rng(7)
    shared = pd.DataFrame(dict(host="small", layer=np.repeat([1, 4], count // 2), head=2, target="state"))
    shared = shared.assign(centre="none", window=range(count), passage=np.arange(count) // 3, position=9)
    shared = shared.assign(atom=np.arange(count) % 5, coefficient=1.5, cosine=rng.uniform(-0.5, 0.9, count))
    shared["atom_cosine"] = shared.groupby("atom").cosine.transform("median")
    shared = shared.assign(kl_delete=rng.uniform(1, 2, count), kl_random=9.0)
    write = shared.assign(object="write", offset_kept=False, kl_atom=np.where(shared.cosine > 0.1, 0.5, 3.0))
    state = shared.assign(object="state", offset_kept=False, kl_atom=np.where(np.arange(count) % 2, 0.5, 3.0))
    return pd.concat([write, state], ignore_index=True)


def test_table13_and_the_scales_are_the_papers():
    table = papers_table13()
    pooled = (table.firings * table.atom_wins).sum() / table.firings.sum()
    assert table.firings.sum() == 2426 and table.atoms.sum() == 155
    assert pooled == pytest.approx(0.8985, abs=5e-4), "the paper's row of all atoms"
    assert (table.cosine_low.iloc[1:].to_numpy() == table.cosine_high.iloc[:-1]).all()
    notes = pd.read_csv(CLAIMS).set_index("id").note
    for claim, layer in (("R2", 1), ("R3", 9), ("R4", 17)):
        assert f"delete {papers_value(f'kl_delete_L{layer}'):.2f}" in notes[claim]


def test_the_clustered_interval_is_that_of_resampled_clusters():
    rng = np.random.default_rng(3)
    a, clusters = rng.normal(size=50), np.repeat(range(10), 5)
    b = (a + rng.normal(size=50) > 0.2).astype(float)
    result = stats.clustered_spearman(a, b, clusters, resamples=300, seed=4)
    assert result.value == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    ranks = np.stack([scipy_stats.rankdata(a), scipy_stats.rankdata(b)])
    counts = np.random.default_rng(4).multinomial(10, np.full(10, 0.1), size=300)
    samples = [np.corrcoef(np.repeat(ranks, count[clusters], axis=1))[0, 1] for count in counts]
    np.testing.assert_allclose([result.low, result.high], np.quantile(samples, [0.025, 0.975]))
    assert np.isnan(stats.clustered_spearman(a, np.ones(50), clusters, 300, 4).value)


def test_the_summary_counts_wins_per_cell_and_object():
    table, places = rows(), pd.DataFrame(dict(host="small", layer=[1, 4], head=2, place=["early", "late"]))
    summary = objects.summarise(table, places, resamples=200, seed=0).set_index(["cells", "object"])
    assert sorted(summary.index) == [(c, o) for c in ("early", "late", "pooled") for o in ("state", "write")]
    part = table[(table.object == "write") & (table.layer == 4)]
    other = objects.of_paper_cells(table, places.assign(place=["early", "weighty"]))
    assert set(other.layer) == {1}, "a cell that is not the paper's is not pooled"
    row = summary.loc["late", "write"]
    assert row.n == 30 and row.n_passages == 10
    assert row.win_rate == pytest.approx((part.kl_atom < part.kl_delete).mean())
    assert row.win_rate_low < row.win_rate < row.win_rate_high
    assert row.kl_delete == pytest.approx(part.kl_delete.median())
    assert row.rho == pytest.approx(scipy_stats.spearmanr(part.kl_atom < part.kl_delete, part.cosine).statistic)
    verdicts = objects.fingerprint(summary.reset_index(), nats=100.0, small=1e-4).set_index("object")
    assert verdicts.wins.to_dict() == dict(write="rise", state="flat")
    assert set(verdicts.scale) == {"Table 2"}, "about 1.5 is nearer to 100 than to 0.0001"
    assert set(objects.fingerprint(summary.reset_index(), 100.0, 0.1).scale) == {"footnotes"}


def test_bins_hold_their_lower_edge_and_take_the_cosine_of_the_firing_or_of_its_atom():
    table = rows()
    table.loc[[0, 60], "cosine"], table.loc[[1, 61], "atom_cosine"] = 0.3, np.nan
    binned = objects.by_cosine(table, BINS, resamples=50, seed=0)
    cells = binned.set_index(["object", "cosine_of", "bin"])
    part = table[(table.object == "state") & (table.cosine >= 0.3)]
    row = cells.loc[("state", "firing", 2)]
    assert 0 in part.index - 60 and (row.cosine_low, row.cosine_high) == (0.3, np.inf)
    assert row.n == len(part) and row.win_rate == pytest.approx((part.kl_atom < part.kl_delete).mean())
    assert row.n_atoms == len(part.groupby(["layer", "atom"]))
    assert cells.loc[("write", "firing", 0), "win_rate"] == 0
    totals = binned.groupby(["object", "cosine_of"]).n.sum()
    assert totals["write", "firing"] == 60 and totals["write", "atom"] == 59, "an atom without firings has no bin"
