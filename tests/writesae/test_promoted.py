"""Promoted tokens: each kind of shift against edited runs, finite differences and loops over firings."""

from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from helpers import assert_close
from sklearn.metrics import r2_score

from writesae.edit import edited_hidden, make_edit
from writesae.evaluate import promoted
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.text import Windows

CELL = (1, 2)
ROWS, POSITION = torch.tensor([0, 1, 2, 1]), torch.tensor([20, 50, 70, 8])


def sides(host, count):
    torch.manual_seed(3)
    unit = torch.nn.functional.normalize
    return unit(torch.randn(count, host.d_k).double(), dim=-1), unit(torch.randn(count, host.d_v).double(), dim=-1)


def edited(host, run, key, value, size):
    """Logits one token after an atom is added at `size` native write norms, one firing at a time."""
    found = []
    for row, t, a, b in zip(ROWS.tolist(), POSITION.tolist(), key, value, strict=True):
        factors = host.factors(run, *CELL)
        norm = torch.linalg.matrix_norm(torch.outer(factors.key[row, t], factors.write("added")[row, t]))
        where = torch.tensor([row]), torch.tensor([t])
        edit = make_edit(*where, a[None, None], size * norm * b[None, None], scope="cache")
        found.append(host.unembed(edited_hidden(host, run, *CELL, edit, promoted.HORIZON + 1)[:, -1])[0])
    return torch.stack(found)


def centred(x):
    return x - x.mean(-1, keepdim=True)


def test_measured_shifts_are_those_of_edited_runs(host, run):
    key, value = sides(host, len(ROWS))
    found = promoted.token_shifts(host, run, CELL, "added", ROWS, POSITION, key, value)
    wanted = edited(host, run, key, value, 1.0) - host.unembed(run.final[ROWS, POSITION + 1])
    assert_close(found["measured"], centred(wanted), "measured", 2e-3)  # host.logits gives fp32


def test_the_exact_prediction_is_the_derivative_of_edited_runs(host, run):
    key, value = sides(host, len(ROWS))
    found = promoted.token_shifts(host, run, CELL, "added", ROWS, POSITION, key, value)
    difference = (edited(host, run, key, value, 5e-4) - edited(host, run, key, value, -5e-4)) / 1e-3
    assert_close(found["exact"], centred(difference), "exact", 1e-3)


def test_the_paper_s_prediction_is_its_formula(host, run):
    key, value = sides(host, len(ROWS))
    found = promoted.token_shifts(host, run, CELL, "added", ROWS, POSITION, key, value)["paper"]
    factors, wanted = host.factors(run, *CELL), []
    for row, t, a, b in zip(ROWS.tolist(), POSITION.tolist(), key, value, strict=True):
        norm = factors.key[row, t].norm() * factors.write("added")[row, t].norm()
        read = (a * factors.log_decay[row, t + 1].exp() * factors.query[row, t + 1]).sum()
        wanted.append(norm * read * (host.unembedding() @ (host.output_projection(*CELL) @ b.float())))
    assert_close(found, centred(torch.stack(wanted)), "paper", 1e-6)


def test_means_are_over_an_atom_s_firings_one_at_a_time(gated_deltanet, tokens):
    host, windows = gated_deltanet, Windows(tokens, torch.arange(len(tokens)))
    torch.manual_seed(1)
    sae = SAE(Architecture(n_atoms=5, k=2), host.d_k, host.d_v).double()
    firings = pd.DataFrame(dict(window=[0, 1, 2, 2], position=[30, 40, 20, 60], atom=[3, 1, 3, 3]))
    found = promoted.mean_shifts(host, windows, [(CELL, sae, firings)] * 2, "added", batch=2)
    run, (key, value) = host.run(tokens), sae.atoms()
    for kind in promoted.KINDS:
        wanted = torch.zeros(5, host.vocabulary, dtype=torch.float64)
        for row in firings.itertuples():
            at = torch.tensor([row.window]), torch.tensor([row.position])
            one = promoted.token_shifts(host, run, CELL, "added", *at, key[[row.atom]], value[[row.atom]])[kind]
            wanted[row.atom] += one[0] / (firings.atom == row.atom).sum()
        assert_close(found[0][kind], wanted, kind, 1e-4)
        assert torch.equal(found[0][kind], found[1][kind])
        assert (found[0][kind][[0, 2, 4]] == 0).all()


def test_top_tokens_by_hand():
    measured = torch.tensor([[0.0, 0, 0, 0], [3, -1, 2, -4]])
    shifts = dict(measured=measured, exact=measured / 2, paper=-measured)
    firings = pd.DataFrame(dict(atom=[1, 1, 1]))
    table = promoted.top_tokens(shifts, firings, 2)
    assert (table.n == 3).all() and len(table) == 3 * 2 * 2
    told = table.set_index(["kind", "direction", "rank"]).sort_index()
    assert told.token.to_dict()["measured", "promoted", 1] == 0
    assert told.loc[("measured", "promoted")].token.tolist() == [0, 2]
    assert told.loc[("measured", "demoted")].token.tolist() == [3, 1]
    assert told.loc[("paper", "promoted")].token.tolist() == [3, 1]
    assert told.loc[("exact", "demoted")]["shift"].tolist() == [-2, -0.5]
    fits = table.groupby("kind").r2.first()
    assert fits["exact"] == pytest.approx(r2_score(measured[1], measured[1] / 2)) == pytest.approx(0.75)
    assert fits["paper"] == pytest.approx(r2_score(measured[1], -measured[1])) == pytest.approx(-3)
    assert table[table.kind == "measured"].r2.isna().all()


def test_several_threads_have_the_shifts_of_one(host, run):
    place = host, run, CELL, "added", ROWS, POSITION, *sides(host, len(ROWS))
    wanted = promoted.token_shifts(*place)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: promoted.token_shifts(*place), range(12)):
            assert_close(found["exact"], wanted["exact"], "exact", 1e-12)
