"""Page 08: what is put in, against fp64 loops; identities of the codebooks; the summaries by hand."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_close

from replication import statistics
from replication.pages import baselines
from replication.study.fingerprint import Later
from replication.study.profile import Baselines
from writesae.edit import edited_hidden, kl, make_edit
from writesae.evaluate import replacement
from writesae.evaluate.firings import Places, draw_positions, encode_cell, firings_at
from writesae.harvesting import harvest
from writesae.sae.train import TrainingSettings, train

CELL = (1, 2)
SETTINGS = Baselines(places=7, nearest=[1, 3], fitted=250, components=[3, 240], side_components=[5, 20])


@pytest.fixture(scope="module")
def host(gated_deltanet):
    """The small host in fp32, the precision of the experiments."""
    return type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).float(), None, "small")


@pytest.fixture(scope="module")
def factors(host, tokens):
    return harvest(host, tokens, [CELL], batch=2, progress=False)[CELL]


@pytest.fixture(scope="module")
def saes(factors):
    def trained(target, centre, k):
        options = dict(n_atoms=24, tokens=30 * 60, batch_windows=3, lr=3e-3, final_lr=3e-4, seed=1)
        sae, _ = train(factors.history(target), TrainingSettings(k=k, centre=centre, **options), progress=False)
        return encode_cell(CELL, target, "added", sae, factors)

    return [
        trained("write", "mean", 4),
        trained("write", "none", 4),
        trained("state", "none", 4),
        trained("write", "none", 1),
    ]


@pytest.fixture(scope="module")
def books(factors, tokens):
    return fitted(factors, tokens)


def fitted(factors, tokens):
    ids = torch.cat([tokens[:2].flatten().unique(), torch.tensor([299_999])])
    return baselines.fit_codebooks(factors.history("write"), tokens, ids, 24, SETTINGS, seed=5)


@pytest.fixture(scope="module")
def places(saes):
    return firings_at(saes[0], draw_positions(torch.tensor([4, 5, 6]), 8, 80, SETTINGS.places, seed=2))


@pytest.fixture(scope="module")
def table(host, tokens, saes, books, places):
    options = dict(saes={CELL: saes}, codebooks={CELL: lambda: books}, settings=SETTINGS, batch_rows=100)
    return baselines.compare(host, host.run(tokens), saes[0], places, Places.of(places), 3, **options)


def native(factors, places):
    at = factors.at(torch.tensor(places.window.to_numpy()), torch.tensor(places.position.to_numpy()))
    return at.key, at.added


def matrices(terms):
    return (terms[0].mT @ terms[1]).double()


# What is put in


def test_the_nearest_write_is_that_of_a_plain_loop(factors, books, places):
    key, value = native(factors, places)
    for size in books.sizes:
        index = baselines.nearest(key, value, books.key[:size], books.value[:size])
        for i in range(len(key)):
            write, cosines = torch.outer(key[i], value[i]).double(), []
            for j in range(size):
                other = torch.outer(books.key[j], books.value[j]).double()
                cosines.append(abs((write * other).sum() / (write.norm() * other.norm())).item())
            assert cosines[index[i]] == pytest.approx(max(cosines), rel=1e-5)
    assert books.sizes == [24, 72]


def test_the_drawn_writes_are_training_writes_and_depend_on_the_seed(factors, tokens, books):
    writes = factors.history("write")
    key, value = (torch.nn.functional.normalize(x.flatten(0, 1), dim=-1) for x in (writes.key, writes.value))
    assert len(books.key) == 72
    cosine = (books.key @ key.T) * (books.value @ value.T)
    assert (cosine.max(1).values > 1 - 1e-5).all()
    other = baselines.fit_codebooks(writes, tokens, books.token_ids, 24, SETTINGS, seed=6)
    assert not torch.equal(other.key, books.key)


def test_no_amplitude_is_nearer_than_the_projection(factors, saes, places, books):
    key, value = native(factors, places)
    write = (key[:, :, None] * value[:, None]).double()
    means = replacement.full_rank(books.token_means[: len(key)])
    for terms in (replacement.rank_one(books.key[:7], books.value[:7]), means):
        best = matrices(replacement.projected(terms, key, value))
        error = (best - write).flatten(1).norm(dim=1)
        for factor in (-1.0, 0.0, 0.9, 1.1, 2.0):
            assert ((factor * best - write).flatten(1).norm(dim=1) > error).all()
        cosine = (best * write).sum((1, 2)) / (best.flatten(1).norm(dim=1) * write.flatten(1).norm(dim=1))
        assert (cosine > 0).all()


def test_a_token_mean_is_the_mean_over_its_places(factors, tokens, books):
    for number in (0, 3):
        window, position = (tokens == books.token_ids[number]).nonzero(as_tuple=True)
        writes = factors.history("write").matrices(window, position).double()
        assert_close(books.token_means[number], writes.mean(0), "token mean", 1e-5)
    assert_close(books.token_means[-1], books.mean, "mean of a token without writes", 0)


def test_axes_are_those_of_the_writes_as_matrices(factors, books):
    """The left singular vectors of all writes side by side."""
    writes = factors.history("write").matrices(*torch.cartesian_prod(torch.arange(3), torch.arange(90)).T).double()
    left = torch.linalg.svd(writes.transpose(0, 1).flatten(1), full_matrices=False).U
    assert_close((books.key_axes[:, :3].double().T @ left[:, :3]).abs(), torch.eye(3), "key axes", 1e-3)


def test_components_are_orthonormal_and_explain_most_of_the_writes(factors, books):
    flat = books.components.flatten(1)
    assert_close(flat @ flat.T, torch.eye(240), "components", 1e-3)
    writes = factors.history("write").matrices(*torch.cartesian_prod(torch.arange(3), torch.arange(90)).T).flatten(1)
    energy = torch.linalg.svdvals(writes).square()
    assert (writes @ flat[:3].T).square().sum() > 0.9 * energy[:3].sum()


# The measurement


def test_each_kl_is_that_of_one_edit(host, tokens, factors, saes, books, places, table):
    """Compares replacements of every rank with a run of that edit, built here from full matrices."""
    run, (key, value) = host.run(tokens), native(factors, places)
    some = Places.of(places)
    terms = baselines.codebook_terms(books, key, value, tokens[some.window, some.position])
    terms |= baselines.pca_terms(books, key, value, SETTINGS)
    terms |= baselines.sae_terms(saes[0], some, host.factors(run, *CELL), 3)
    assert {len(x[0][0]) for x in terms.values()} == {1, host.d_k}
    for method, put_in in terms.items():
        rows = table[np.logical_and.reduce([table[name] == x for name, x in method._asdict().items()])]
        assert rows.position.tolist() == places.position.tolist()
        for i, row in enumerate(rows.itertuples()):
            w, t = torch.tensor([row.window]), torch.tensor([row.position])
            delta = matrices(put_in)[i] - torch.outer(key[i], value[i]).double()
            edit = make_edit(w, t, torch.eye(host.d_k)[None], delta.float()[None], "write")
            patched = host.logits(edited_hidden(host, run, *CELL, edit, 2)[:, -1])
            wanted = kl(host.logits(run.final[w, t + 1]), patched).item()
            assert row.kl == pytest.approx(wanted, rel=5e-3, abs=1e-9), method


def test_deletion_is_that_of_the_replacement_test(host, tokens, saes, places, table):
    options = dict(conditions=("delete", "atom"), scopes=("write",), amplitudes=("coefficient", "projection"))
    other = replacement.replace(host, host.run(tokens), saes[0], places, Places.of(places), 3, **options)
    for amplitude, part in other.groupby("amplitude"):
        rows = table[table.method.eq("atom") & table.centre.eq("mean") & table.amplitude.eq(amplitude)]
        np.testing.assert_allclose(rows.kl, part.kl_atom, rtol=2e-3, atol=1e-9)
        np.testing.assert_allclose(rows.kl_delete, part.kl_delete, rtol=2e-3, atol=1e-9)


def test_a_codebook_with_the_native_write_and_all_components_give_it_back(host, tokens, factors, saes, books, places):
    key, value = native(factors, places)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (key, -value)]  # the sign is free
    books = books._replace(key=torch.cat([unit[0], books.key]), value=torch.cat([unit[1], books.value]))
    options = dict(saes={CELL: saes}, codebooks={CELL: lambda: books}, settings=SETTINGS, batch_rows=1)
    table = baselines.compare(host, host.run(tokens), saes[0], places, Places.of(places), 3, **options)
    exact = table[table.method.eq("nearest_write") | table.method.eq("pca") & table["size"].eq(240)
                  | table.method.eq("side_pca") & table["size"].eq(20)]  # fmt: skip
    assert len(exact) == 6 * SETTINGS.places
    assert (exact.kl < 1e-8).all() and (exact.kl_delete > 1e-6).all()
    assert exact.cosine.to_numpy() == pytest.approx(1, abs=1e-5)
    assert table[table.method.eq("pca") & table["size"].eq(3)].kl.max() > 1e-6


def test_every_method_has_a_name_and_says_what_it_stores(host, table):
    assert set(table.method) == set(baselines.NAMES)
    stored = table.drop_duplicates(baselines.KEYS).set_index(["method", "centre", "target", "size", "amplitude"]).stored
    sides, whole = host.d_k + host.d_v, host.d_k * host.d_v
    assert stored["nearest_write", "none", "write", 72, "projection"] == 72 * sides
    assert stored["atom", "none", "state", 24, "coefficient"] == 24 * sides
    assert stored["reconstruction", "mean", "write", 24, "fitted"] == 24 * sides + whole
    assert stored["pca", "none", "write", 3, "fitted"] == 3 * whole


def test_without_an_active_atom_nothing_is_put_in(host, tokens, saes, places):
    silent = Places.of(places.assign(coefficient=0.0))
    terms = baselines.sae_terms(saes[1], silent, host.factors(host.run(tokens), *CELL), 3)
    for method, (_, right) in terms.items():
        assert bool(right.any()) == (method.method in ("best_atom", "reconstruction")
                                     or method[0::4] == ("random", "projection")), method  # fmt: skip


# Summaries


def some_rows():
    """Two cells, two methods: the reference has half the KL of deletion, the other 0.4 or 1.5 times it."""
    rows = []
    for layer, position in ((a, b) for a in (1, 4) for b in range(6)):
        place = dict(host="h", layer=layer, head=0, window=position // 2, passage=position // 2, position=position)
        kl_delete = 1.0 + position
        for name, factor in dict(best_atom=0.5, atom=0.5, kmeans=0.4 if position % 3 else 1.5).items():
            method = baselines.Method(name, "write", "none", 8, "projection", 80, 2)
            rows.append(place | method._asdict() | dict(kl=factor * kl_delete, kl_delete=kl_delete, cosine=0.3))
    return pd.DataFrame(rows), pd.DataFrame(dict(host="h", layer=[1, 4], head=0, place=["early", "middle"]))


def test_summary_counts_wins_and_weighs_kl():
    table, cells = some_rows()
    summary = baselines.summarise(table, cells, 100, 0).set_index(["cells", "method"])
    assert summary.n.to_dict()["pooled", "atom"] == 12 and summary.n["early", "atom"] == 6
    assert summary.win_rate["pooled", "kmeans"] == pytest.approx(4 / 6)
    assert summary.recovered["middle", "best_atom"] == pytest.approx(0.5)
    kl = 0.4 * (2 + 3 + 5 + 6) + 1.5 * (1 + 4)
    row = summary.loc["pooled", "kmeans"]
    assert row.recovered == pytest.approx(1 - kl / 21)
    assert row.recovered_low < row.recovered < row.recovered_high


def test_contrasts_are_paired_by_place():
    table, cells = some_rows()
    shuffled = table.sample(frac=1, random_state=0)
    rows = baselines.contrasts(shuffled, cells, 100, 0).set_index(["reference", "cells", "method"])
    row = rows.loc["best_atom", "pooled", "kmeans"]
    assert row.n == 12 and row.atom_closer == pytest.approx(2 / 6)
    assert row.difference == pytest.approx((0.4 * 16 + 1.5 * 5) / 21 - 0.5)
    assert rows.difference["atom", "early", "best_atom"] == 0


def test_pooled_are_the_papers_cells():
    table, cells = some_rows()
    summary = baselines.summarise(table, cells.assign(place=["early", "regime"]), 100, 0)
    counts = summary[summary.method == "atom"].set_index("cells").n
    assert counts.to_dict() == dict(pooled=6, early=6, regime=6)


def test_a_reader_sees_what_the_best_atom_recovers_beyond_each_replacement():
    table, cells = some_rows()
    table = pd.concat([table, table[table.method == "kmeans"].assign(method="kmeans_pair", kl=0.9 * table.kl_delete)])
    shown = baselines.shown_contrasts(baselines.contrasts(table, cells, 100, 0)).reset_index().set_index("against")
    pair = shown.loc["k-means, top singular pair"]
    assert pair["numbers per write"] == 2 and pair["more KL recovered (points)"] == "40 [40, 40]"
    assert pair["nearer (% of places)"] == "100 [100, 100]"
    assert not shown.index.str.startswith("best atom; SAE of").any()


def test_ratio_bootstrap_draws_whole_clusters():
    generator = np.random.default_rng(0)
    a, b, clusters = generator.random(40), 1 + generator.random(40), np.repeat(range(8), 5)
    low, high = statistics.ratio_bootstrap(a, b, clusters, resamples=400, seed=3)
    draws = np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), size=400)
    plain = [sum(n * a[clusters == c].sum() for c, n in enumerate(row))
             / sum(n * b[clusters == c].sum() for c, n in enumerate(row)) for row in draws]  # fmt: skip
    assert (low, high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])))
    assert np.isnan(statistics.ratio_bootstrap(a, b, np.zeros(40), 10, 0)).all()


def test_codebooks_are_fitted_when_they_are_needed(factors, tokens, books):
    later = Later(fitted, factors=factors, tokens=tokens)
    assert_close(later().centroids, books.centroids, "centroids", 0)
