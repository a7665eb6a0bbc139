"""KLs of replacements predicted without a run, against edited runs one at a time and hand-made tables."""

import copy

import pandas as pd
import pytest
import torch
from helpers import assert_close

from replication.pages import predicted_kl
from writesae.edit import edited_hidden, kl, make_edit
from writesae.evaluate import firings
from writesae.evaluate.predicted_kl import DELETION, predict_replacements
from writesae.harvesting import harvest
from writesae.sae.train import TrainingSettings, train
from writesae.shift import predict_kl

CELL = (1, 2)


@pytest.fixture(scope="module")
def single(gated_deltanet):
    """The host in fp32, the precision of the experiments."""
    return type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).float(), None, "small")


@pytest.fixture(scope="module")
def cell_sae(single, tokens):
    factors = harvest(single, tokens, [CELL], batch=2, progress=False)[CELL]
    settings = TrainingSettings(n_atoms=24, k=4, tokens=90 * 9, batch_windows=3, lr=3e-3, final_lr=3e-4, centre="none")
    return firings.encode_cell(
        CELL, "write", "added", train(factors.history("write"), settings, progress=False)[0], factors
    )


def test_candidates_are_edited_runs_and_predictions_are_those_of_one_edit(single, tokens, cell_sae):
    drawn = firings.draw_in_rounds(firings.all_firings(cell_sae, torch.tensor([0, 1, 2]), 8, 80), 4, seed=5)
    places, run = firings.Places.of(drawn), single.run(tokens)
    options = dict(atoms=3, readings=[0, 1, 3], batch_rows=11)
    table = predict_replacements(single, run, cell_sae, drawn, places, 5, **options)
    assert len(table) == 4 * 5 and (table.groupby(["window", "position"]).candidate.last() == DELETION).all()
    assert (table.candidate == table.atom)[table.own].all() and table.own.sum() == 4
    key, value = (side.detach() for side in cell_sae.sae.atoms())
    factors = single.factors(run, *CELL)
    for row in table.itertuples():
        at = torch.tensor([row.window]), torch.tensor([row.position])
        native, write = factors.key[at], factors.added[at]
        size = 0.0 if row.candidate == DELETION else native.norm() * write.norm()
        left, right = (
            torch.stack([native[0], key[row.candidate]]),
            torch.stack([-write[0], size * value[row.candidate]]),
        )
        edit = make_edit(*at, left[None], right[None])
        logits = single.logits(edited_hidden(single, run, *CELL, edit, 2)[:, -1])
        measured = kl(single.logits(run.final[at[0], at[1] + 1]), logits).item()
        assert row.kl == pytest.approx(measured, rel=1e-3, abs=1e-9)
        for readings in (1, 3):
            one = predict_kl(single, tokens, edit, layer=CELL[0], head=CELL[1], steps=2, readings=readings)
            assert getattr(row, f"kl_{readings}") == pytest.approx(one.item(), rel=1e-2, abs=1e-9)
        if row.candidate != DELETION:
            cosine = (key[row.candidate] @ native[0]) * (value[row.candidate] @ write[0]) / size
            assert row.cosine == pytest.approx(cosine.item(), abs=1e-5)


def test_the_second_order_form_of_all_tokens_is_the_kl_of_a_small_change(single, tokens, cell_sae):
    """With a reading per token, fisher is half the Fisher norm of the linear change: near the KL of a small one."""
    drawn = firings.all_firings(cell_sae, torch.tensor([0, 1, 2]), 8, 80)[:2]
    places, run = firings.Places.of(drawn), single.run(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "layers", CELL[0] + 1)
        short = single.run(tokens)
        table = predict_replacements(single, short, cell_sae, drawn, places, 5, atoms=2, readings=[300])
    assert run.tokens.equal(short.tokens)
    assert_close(torch.tensor(table.fisher), torch.tensor(table.kl), "second-order form", 0.3)


def candidates():
    """Two firings of one SAE: their own atom, three drawn atoms, and deletion."""
    rows = [
        # own, candidate, kl, kl_1, fisher, cosine
        (0, True, 9, 3.0, 9.0, 8.0, 0.9),
        (0, False, 1, 1.0, 2.0, 3.0, 0.1),
        (0, False, 2, 2.0, 1.0, 2.0, 0.2),
        (0, False, 3, 4.0, 7.0, 1.0, 0.3),
        (0, False, DELETION, 2.5, 9.5, 9.0, 0.0),
        (1, True, 8, 1.0, 1.0, 1.0, 0.9),
        (1, False, 1, 6.0, 6.0, 6.0, 0.3),
        (1, False, 2, 5.0, 5.0, 5.0, 0.2),
        (1, False, 3, 4.0, 4.0, 4.0, 0.1),
        (1, False, DELETION, 2.0, 3.0, 0.5, 0.0),
    ]
    frame = pd.DataFrame(rows, columns=["position", "own", "candidate", "kl", "kl_1", "fisher", "cosine"])
    return frame.assign(host="h", target="write", passage=frame.position, window=0)


def test_each_way_chooses_among_the_drawn_atoms():
    table = predicted_kl.by_firing(candidates()).set_index(["position", "way"])
    assert table.kl_chosen.to_dict() == {
        (0, "kl_1"): 2.0,
        (0, "fisher"): 4.0,
        (0, "cosine"): 4.0,
        (1, "kl_1"): 4.0,
        (1, "fisher"): 4.0,
        (1, "cosine"): 6.0,
    }
    assert table.kl_best.unique().tolist() == [1.0, 4.0] and table.n_atoms.eq(3).all()
    assert table.loc[(1, "kl_1"), "kl_own"] == 1.0 and table.loc[(1, "kl_1"), "kl_delete"] == 2.0
    assert not table.loc[(0, "kl_1"), "agrees"]
    assert table.loc[(1, "kl_1"), "agrees"] and not table.loc[(1, "fisher"), "agrees"]


def test_the_summary_is_of_both_firings():
    class Written:
        def write(self, name, table):
            assert name == "predicted_kl_summary"
            return table

    summary = predicted_kl.summarise(Written(), predicted_kl.by_firing(candidates())).set_index("way")
    one = summary.loc["kl_1"]
    assert (one.n, one.n_passages, one.n_atoms) == (2, 2, 3)
    assert one.excess == 1.5 and (one.excess_low, one.excess_high) == (1.0, 2.0)
    assert (one.own_beats, one.chosen_beats, one.agrees) == (0.5, 0.5, 0.5)
    shown = predicted_kl.shown(summary.reset_index())
    assert shown.shape == (3, 7) and shown["atoms scored by"].tolist()[0] == "1 backward pass"
