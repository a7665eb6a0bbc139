"""The training of recall hosts, and the summaries of page 17 on tables made by hand."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from replication import __main__
from replication.commands import read_yaml, train_recall
from replication.commands.train_recall import Recipe, accuracies, new_host, pairs_at, train
from replication.pages import recall
from writesae.evaluate.recall import answered
from writesae.hosts.load import load_host


@pytest.fixture
def recipe():
    found = read_yaml(Recipe, train_recall.FOLDER / "recipes.yaml", "recipes.yaml")
    steps = {name: family.model_copy(update=dict(steps=20, lr=0.005)) for name, family in found.families.items()}
    return found.model_copy(update=dict(keys=8, values=4, tokens=64, test_contexts=6, families=steps, loads=[0.25, 1]))


def test_loads_come_in_by_and_by(recipe):
    recipe = recipe.model_copy(update=dict(loads=[0.25, 0.5, 1, 2]))
    generator = torch.Generator().manual_seed(0)
    drawn = [{pairs_at(recipe, 16, step, 100, generator) for _ in range(60)} for step in (0, 13, 26, 49, 99)]
    assert drawn == [{4}, {4, 8}, {4, 8, 16}, {4, 8, 16, 32}, {4, 8, 16, 32}]


@pytest.mark.parametrize("family", recall.FAMILIES)
def test_a_trained_host_is_read_back_and_kept(family, recipe, tmp_path, monkeypatch, capsys):
    recipe = recipe.model_copy(update=dict(sides=[8], loads=[0.25, 1]))
    monkeypatch.setattr(train_recall, "FOLDER", tmp_path)
    monkeypatch.setattr(train_recall, "read_yaml", lambda *_: recipe)
    assert __main__.main(["train-recall", f"{family}-8"]) == 0
    host = load_host(tmp_path / f"{family}-8")
    assert (host.d_k, host.d_v, host.cells, host.name) == (8, 8, [(0, 0)], f"recall-{family}-8")
    assert host.tokenizer("k3 v2").input_ids == [3, 10]
    record = json.loads((tmp_path / f"{family}-8" / "training.json").read_text())
    contexts = recipe.task.draw(6, 2, 2, torch.Generator().manual_seed(recipe.seed + 1))
    assert record["right_2"] == pytest.approx(answered(host, contexts).float().mean().item(), abs=0.2)  # fp16
    capsys.readouterr()
    assert __main__.main(["train-recall", f"{family}-8"]) == 0
    assert f"{family}-8 is there" in capsys.readouterr().out


def test_a_short_training_learns_something(recipe):
    recipe = recipe.model_copy(update=dict(keys=4, values=3, tokens=512, loads=[0.125]))
    family = recipe.families["rwkv7"].model_copy(update=dict(steps=150, lr=0.02))
    host, history = train(recipe.model_copy(update=dict(families=dict(rwkv7=family))), "rwkv7", 8)
    assert accuracies(recipe, new_host(recipe, "rwkv7", 8), 8)["right_1"] < 0.7 < history[-1]["right_1"]


def test_an_unknown_host_is_one_sentence(capsys):
    assert __main__.main(["train-recall", "mamba2-33"]) == 1
    assert "no host mamba2-33: choose from gated_deltanet-16," in capsys.readouterr().err


def rows():
    """Two trainings of one SAE on four contexts: the first query is not answered right natively."""
    labels = dict(family="mamba2", side=32, pairs=8, target="write", centre="none", k=1, n_atoms=256, fvu=0.25)
    tables = []
    for number, kept in ((1, [1, 1, 0, 1]), (2, [1, 0, 0, 1])):
        columns = dict(context=range(4), right=[False, True, True, True], kept_atom=kept, loss_atom=[0, 1, 5, 1])
        columns |= dict(loss_delete=2) | {f"kept_{x}": 0 for x in ("matched", "reconstruction", "random", "delete")}
        tables.append(pd.DataFrame(columns).assign(of="write", sae_seed=number, **labels))
        meanings = dict(association=[0, 1], n=[3, 1], own=[True, number == 1], pure=[1.0, 0.0], cosine=[0.95, 0.5])
        tables.append(pd.DataFrame(meanings).assign(of="association", sae_seed=number, **labels))
    return pd.concat(tables, ignore_index=True)


def test_shares_are_of_queries_answered_right_and_of_all_trainings():
    (row,) = recall.saes(rows(), 200, 1).itertuples()
    assert (row.trainings, row.n, row.fvu, row.k, row.n_atoms, row.answers) == (2, 3, 0.25, 1, 256, 0.75)
    assert row.kept_atom == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert row.win == pytest.approx(2 / 3)
    assert (row.own, row.pure, row.found) == (0.75, 0.75, 0.5)
    assert row.kept_delete == 0 and 0 < row.kept_delete_high <= 1
    assert 0 <= row.kept_atom_low < row.kept_atom < row.kept_atom_high <= 1


def test_hosts_are_counted_by_context():
    columns = dict(context=range(4), right=[True, True, False, True], answers=[1.0, 0.5, 0.0, 1.0], of="host")
    columns |= dict(says_new=[True, False, True, True], kept_delete=False, others_counterfactual=[1, 0.5, 1, np.nan])
    columns |= dict(others_delete=[0.5, 1, 1, np.nan], family="rwkv7", side=16, pairs=4)
    (row,) = recall.hosts(pd.DataFrame(columns), 200, 1).itertuples()
    assert (row.n, row.n_right, row.answers) == (4, 3, 0.625)
    assert row.says_new == pytest.approx(2 / 3) and row.kept_delete == 0
    assert row.others == pytest.approx(0.75)


def test_sentences_have_the_numbers_of_the_table():
    summary = recall.saes(rows(), 200, 1)
    smaller, untaught = (
        summary.assign(side=16, pairs=4, kept_atom=0.25),
        _truth(summary).assign(side=64, pairs=16, answers=0.1),
    )
    text = recall.answer(pd.concat([summary, smaller, _truth(summary), untaught]))
    assert (
        "larger? not settled on Mamba-2**" in text
        and "Mamba-2 25% (16), 50% (32)" in text
        and "true dictionary 100%" in text
    )
    assert "Left out, because they answer less than half of the queries right: Mamba-2 64 (10%)." in text
    poor = summary.assign(kept_atom=0.5, kept_atom_high=0.8)
    assert "not on Mamba-2**" in recall.answer(pd.concat([poor, _truth(summary)]))
    sure = summary.assign(kept_atom=0.97, kept_atom_low=0.94)
    assert "Yes on Mamba-2**" in recall.answer(pd.concat([sure, _truth(summary)]))


def _truth(summary):
    return summary.assign(target="truth", n_atoms=128, kept_atom=1.0)
