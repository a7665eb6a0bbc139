"""Page 18: its comparisons by loops over places, and its sentences."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from replication.pages import residual_features as page
from writesae.sae.vectors import VectorSAE
from writesae.text import Windows

R, STEPS, N = 4, 5, 14


def changes():
    g = torch.Generator().manual_seed(3)
    measured = torch.randn(R, STEPS, N, generator=g)
    return measured + 0.3 * torch.randn(R, STEPS, N, generator=g), measured


def test_the_columns_of_a_place_by_loops():
    predicted, measured = changes()
    columns = page.compared(predicted, measured)
    for r in range(R):
        p, m = predicted[r].double().numpy(), measured[r].double().numpy()
        assert columns["residual"][r] == pytest.approx(((p - m) ** 2).sum(), rel=1e-5)
        assert columns["total_later"][r] == pytest.approx((m[1:] ** 2).sum(), rel=1e-5)
        tops = [set(np.argsort(-x[1:].max(0))[: page.TOP]) for x in (p, m)]
        assert columns["hits"][r] == len(tops[0] & tops[1]) < page.TOP + 1
        step, feature = np.unravel_index(p[1:].argmax(), p[1:].shape)
        assert (columns["feature"][r], columns["later"][r]) == (feature, step + 1)
        assert columns["measured"][r] == pytest.approx(m[step + 1, feature], rel=1e-5)
        assert columns["same_token"][r] == (m[1:, feature].argmax() == step)


def test_places_are_measured_in_their_own_window(gated_deltanet, tokens):
    """An atom that is the native write raises what taking it out lowers, to first order in its size."""
    host, windows = gated_deltanet, Windows(tokens, torch.tensor([4, 4, 6]))
    width = host.unembedding().shape[1]
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(*shape, generator=g).double() for shape in ((width, N), (N,), (N, width), (width,))]
    sae = vars(VectorSAE(*weights, k=2, metadata=dict(layer=3)))
    places = dict(
        window=[0, 1, 2, 2], position=[40, 30, 50, 60], passage=[4, 4, 6, 6], coefficient=[1.0, 1.0, 1.0, 0.0]
    )
    firings, cell = pd.DataFrame(places).assign(atom=7), (1, 2)
    native = host.factors(host.run(tokens), *cell).at(*torch.tensor([places["window"], places["position"]]))
    key, value = (torch.nn.functional.normalize(x, dim=-1) for x in (native.key, native.added))
    edits = [(*cell, firings, key, value)]
    table = page.of_windows(1, host, windows, edits, sae, 2, "added", STEPS)
    assert len(table) == 2 * 2 * 3 and set(zip(table.window, table.position)) == {(1, 30), (2, 50)}
    assert (table.distance == 2).all()
    exact = table[table.predictor == "exact"].set_index(["object", "window"])
    assert exact.predicted["write"].to_numpy() == pytest.approx(exact.predicted["atom"].to_numpy(), rel=1e-6)
    assert (exact.feature["write"] == exact.feature["atom"]).all()
    through = table[table.predictor == "through_layer"]
    assert (through.residual < table[table.predictor == "direct"].residual.to_numpy()).all()


def rows():
    one = dict(host="gated_deltanet", layer=2, head=1, distance=4, object="atom", predictor="through_layer")
    values = dict(residual=[1.0, 3.0], total=[10.0, 30.0], residual_later=[0.5, 0.5], total_later=[5.0, 5.0])
    values |= dict(hits=[10, 5], same_token=[True, False], predicted=[2.0, 1.0], measured=[2.0, 2.0], passage=[1, 2])
    return pd.DataFrame(values).assign(**one)


def test_the_summary():
    cells = pd.DataFrame(dict(host=["gated_deltanet"], layer=[2], head=[1], place=["middle"]))
    summary = page.summarise(rows(), cells, 50, 1)
    row = summary.iloc[0]
    assert (row.r2, row.r2_later, row.hits, row.same_token) == pytest.approx((0.9, 0.9, 0.75, 0.5))
    assert row.r2_top == pytest.approx(1 - 1 / 8) and row.r2_low <= row.r2 <= row.r2_high and row.cells == "middle"
    assert page.readable(summary)["R2"].iloc[0].startswith("0.900 [")


def test_atoms_are_named_by_all_their_firings(gated_deltanet, tokens, monkeypatch):
    """The table has one place of the atom; its name comes from its three firings."""
    table = rows().assign(atom=[7, 8], feature=[0, 1], window=0, position=[40, 50], later=1)
    firings = pd.DataFrame(dict(window=[0, 1, 2, 0], position=[40, 30, 30, 9], atom=[7, 7, 7, 8]))
    windows = Windows(tokens.clone(), torch.tensor([4, 4, 6]))
    text = SimpleNamespace(decode=lambda x, **_: str(list(x)))
    windows.tokens[1:, 30] = 99
    profile = SimpleNamespace(seed=1, residual_features=SimpleNamespace(test_windows=3))
    profile.data = SimpleNamespace(first_position=4, batch_windows=2)
    study = SimpleNamespace(main="gated_deltanet", profile=profile, cell=lambda *_: (2, 1))
    study.windows, study.host = lambda *_: windows, lambda _: SimpleNamespace(tokenizer=text)
    sae = SimpleNamespace(metadata=dict(layer=3), encode=lambda x: torch.ones(3, tokens.shape[1], 2))
    monkeypatch.setattr(page, "stream", lambda *_: None)
    monkeypatch.setattr(page, "saes_on", lambda *given: given[-1])
    monkeypatch.setattr(page, "firings_of", lambda _, wanted, at: firings[[wanted[:2] == ((2, 1), "write")] * 4])
    named = page.examples(study, sae, table)["the atom fires on"]
    assert named.iloc[0].startswith("7: '[99]' 67%, ")
