"""The functions of `import writesae as ws` against the tensor functions and slow loops.

The tests use arguments other than the defaults.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_close

import writesae as ws
from writesae.edit import edited_hidden, make_edit
from writesae.evaluate.firings import Places, encode_cell
from writesae.evaluate.replacement import replace
from writesae.recurrence import step_states
from writesae.shift import PREDICTORS, cache_gamma, direct_path, gamma, logit_gradient, reads
from writesae.text import Windows

ROOT = Path(__file__).resolve().parents[2]
LAYER, HEAD = 1, 2


@pytest.fixture(scope="module")
def single(host):
    """Each host family in fp32, as a user loads it."""
    return type(host)(copy.deepcopy(host.model).float(), None, "small")


@pytest.fixture(scope="module")
def windows(tokens):
    return Windows(tokens, torch.tensor([4, 4, 7]))


def trained(host, windows, target):
    cell = ws.harvest(host, windows, layer=LAYER, head=HEAD, batch=2, progress=False)
    settings = ws.TrainingSettings(n_atoms=24, k=4, tokens=90 * 30, batch_windows=3, lr=3e-3, final_lr=3e-4, seed=1)
    return cell, ws.train(cell.history(target), settings, progress=False)[0]


def test_importing_takes_no_torch_and_offers_every_name():
    code = "import sys, writesae as ws; print({'torch', 'pandas', 'numpy'} & {*sys.modules}, dir(ws) == sorted(ws.__all__))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["set()", "True"]
    assert all(callable(getattr(ws, name)) for name in ws.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ws.nothing  # noqa: B018


def test_a_harvest_of_one_cell_is_that_of_a_list(single, windows):
    cells = [(LAYER, HEAD), (0, 1)]
    several = ws.harvest(single, windows.tokens, cells=cells, batch=1, progress=False)
    for layer, head in cells:
        one = ws.harvest(single, windows, layer=layer, head=head, batch=1, progress=False)
        assert one.origin[:3] == several[layer, head].origin[:3] == ("small", layer, head)
        assert one.query is None and one.key.dtype == torch.float32
        for name, x in one.tensors().items():
            assert torch.equal(x, getattr(several[layer, head], name)), name
    states = step_states(single.factors(single.run(windows.tokens), LAYER, HEAD))
    assert_close(several[LAYER, HEAD].history("state").steps(), states, "states", 1e-5)
    twice = ws.harvest(single, windows, cells=[*cells, list(cells[0])], progress=False)
    assert list(twice) == cells and len(twice[cells[0]].key) == len(windows)
    for wrong in (cells[0], [(1, 2, 3)]):
        with pytest.raises(ValueError, match="Each cell is a pair"):
            ws.harvest(single, windows, cells=wrong, progress=False)
    for wrong in (dict(layer=1), dict(cells=cells, layer=1, head=2), {}):
        with pytest.raises(ValueError, match="one cell .layer= and head=. or of a list of cells"):
            ws.harvest(single, windows, **wrong)


@pytest.mark.parametrize("target", ["state", "write"])
def test_firings_are_the_largest_coefficients(single, windows, target):
    cell, sae = trained(single, windows, target)
    found = ws.find_firings(sae, cell, windows, first=5, last=70)
    assert list(found) == ["window", "passage", "position", "atom", "coefficient"]
    every = ws.find_firings(sae, cell, windows)
    pd.testing.assert_frame_equal(every.query("5 <= position < 70").reset_index(drop=True), found)
    assert every.position.min() < 5 and every.position.max() >= 70
    assert (found.passage == np.array([4, 4, 7])[found.window]).all()
    indices, coefficients = sae.encode_history(cell.history(target))
    for row in found.sample(15, random_state=0).itertuples():
        place = coefficients[row.window, row.position]
        assert row.coefficient == pytest.approx(place.max().item())
        assert row.atom == indices[row.window, row.position][place.argmax()]
    pd.testing.assert_frame_equal(ws.find_firings(sae, cell, windows, target=target, first=5, last=70), found)


def test_firings_of_what_does_not_fit_are_refused(gated_deltanet, windows):
    cell, sae = trained(gated_deltanet, windows, "write")
    with pytest.raises(ValueError, match="harvested over 3 windows of 90 tokens, and these are 2 windows of 90 tokens"):
        ws.find_firings(sae, cell, windows[slice(2)])
    with pytest.raises(ValueError, match="and these are 3 windows of 80 tokens"):
        ws.find_firings(sae, cell, windows.beginnings(80))
    for first, last in ((-1, 9), (9, 9), (5, 91)):
        with pytest.raises(ValueError, match=f"0 <= first < last <= 90, not first {first} and last {last}"):
            ws.find_firings(sae, cell, windows, first=first, last=last)
    with pytest.raises(ValueError, match="This SAE is in torch.float32 and the data in torch.float16"):
        sae.encode_history(cell.history("write").map(torch.Tensor.half))
    other = ws.harvest(gated_deltanet, windows, layer=0, head=1, progress=False)
    with pytest.raises(ValueError, match=r"cell .layer, head. \(1, 2\), and the harvest is of \(0, 1\)"):
        ws.find_firings(sae, other, windows)
    unknown = ws.train(ws_history(cell), settings(), progress=False)[0]
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        ws.find_firings(unknown, cell, windows)
    with pytest.raises(ValueError, match="does not say which cell"):
        ws.replace_writes(gated_deltanet, windows, unknown, pd.DataFrame(), target="write")


def settings():
    return ws.TrainingSettings(n_atoms=24, k=4, tokens=90 * 6, batch_windows=3, seed=1)


def ws_history(cell):
    """A history without the name of its cell."""
    return type(cell.history("write"))(cell.key, cell.added)


def test_replaced_writes_are_the_replacement_test(single, windows):
    """Batches of two windows against one run of all three; the second call also names the cell."""
    cell, sae = trained(single, windows, "write")
    firings = ws.find_firings(sae, cell, windows).sample(9, random_state=3)
    options = dict(conditions=("delete", "atom", "random"), scopes=("cache", "write"), seed=5)
    ours = ws.replace_writes(single, windows, sae, firings, batch=2, batch_rows=40, **options)
    kept = firings[firings.position < 88]
    cell_sae = encode_cell((LAYER, HEAD), "write", "added", sae, cell)
    theirs = replace(single, single.run(windows.tokens), cell_sae, kept, Places.of(kept), **options)
    keys = ["read", "amplitude", "window", "position"]
    ours, theirs = (x.sort_values(keys).reset_index(drop=True) for x in (ours, theirs))
    assert len(ours) == 4 * len(kept) and not {"kl_mean_write", "row"} & {*ours}
    pd.testing.assert_frame_equal(ours, theirs, rtol=2e-3, atol=3e-9)
    again = ws.replace_writes(single, windows, sae, firings, layer=LAYER, head=HEAD, target="write", **options)
    assert_close(torch.tensor(again.sort_values(keys).kl_random.to_numpy()), ours.kl_random.to_list(), "KL", 2e-3)


def test_replacements_that_cannot_be_are_refused(gated_deltanet, windows):
    cell, sae = trained(gated_deltanet, windows, "write")
    firings = ws.find_firings(sae, cell, windows, first=88)
    with pytest.raises(ValueError, match="no firing has two tokens after it"):
        ws.replace_writes(gated_deltanet, windows, sae, firings)
    with pytest.raises(ValueError, match="replacement test has no 'nothing'"):
        ws.replace_writes(gated_deltanet, windows, sae, firings, conditions=("nothing",))
    firings = ws.find_firings(sae, cell, windows, last=80)
    plain = uncentred(cell)  # it has neither a mean nor atoms of a higher rank
    own = ws.find_firings(plain, cell, windows).head(5)
    with pytest.raises(ValueError, match="none of the conditions atom_and_mean, whole_atom"):
        ws.replace_writes(gated_deltanet, windows, plain, own, conditions=("atom_and_mean", "whole_atom"))
    with pytest.raises(ValueError, match="Nothing is asked"):
        ws.replace_writes(gated_deltanet, windows, sae, firings, scopes=())


def uncentred(cell):
    return ws.train(cell.history("write"), settings().model_copy(update=dict(centre="none")), progress=False)[0]


def test_firings_of_other_windows_or_of_another_sae_are_refused(gated_deltanet, windows):
    cell, sae = trained(gated_deltanet, windows, "write")
    later = ws.harvest(gated_deltanet, windows[slice(1, 3)], layer=LAYER, head=HEAD, progress=False)
    firings = ws.find_firings(sae, later, windows[slice(1, 3)])
    with pytest.raises(ValueError, match=r"of the \d+ firings are not of this SAE on these windows"):
        ws.replace_writes(gated_deltanet, windows, sae, firings)
    with pytest.raises(ValueError, match="A firing is in window 1, and there are 1 windows"):
        ws.replace_writes(gated_deltanet, windows[slice(1)], sae, firings)
    with pytest.raises(ValueError, match="firings are not of this SAE"):
        ws.replace_writes(gated_deltanet, windows, uncentred(cell), ws.find_firings(sae, cell, windows))
    moved = ws.replace_writes(gated_deltanet, windows, sae, firings.assign(window=firings.window + 1))
    direct = ws.replace_writes(gated_deltanet, windows[slice(1, 3)], sae, firings)
    assert_close(torch.tensor(moved.kl_atom.to_numpy()), direct.kl_atom.to_list(), "KL", 1e-3)


def test_one_atom_has_no_random_other_one(gated_deltanet, windows):
    cell, sae = trained(gated_deltanet, windows, "write")
    alone = copy.deepcopy(sae)
    with torch.no_grad():
        alone.encoder.bias.fill_(-1e6)
        alone.encoder.bias[3] = 0
    firings = ws.find_firings(alone, cell, windows).head(4)
    assert set(firings.atom) == {3}
    with pytest.raises(ValueError, match="Only one atom fires"):
        ws.replace_writes(gated_deltanet, windows, alone, firings)
    tests = ws.replace_writes(gated_deltanet, windows, alone, firings, conditions=("atom",))
    assert tests.kl_atom.notna().all()


def test_a_host_of_16_bits_is_warned_of(gated_deltanet, windows):
    cell, sae = trained(gated_deltanet, windows, "write")
    rounded = type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).bfloat16(), None, "small")
    firings = ws.find_firings(sae, ws.harvest(rounded, windows, layer=LAYER, head=HEAD, progress=False), windows)
    with pytest.warns(UserWarning, match="computes in torch.bfloat16: KLs of single writes are mostly rounding"):
        ws.replace_writes(rounded, windows, sae, firings.head(8))


def test_a_projection_on_a_host_of_64_bits(gated_deltanet, windows):
    """At that amplitude the atom's inner product with what is left of the write is zero."""
    cell, sae = trained(gated_deltanet, windows, "write")
    precise = type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).double(), None, "small")
    firings = ws.find_firings(sae, cell, windows).head(12)
    options = dict(conditions=("atom", "mean_write"), amplitudes=("projection",))
    ours, single = (ws.replace_writes(host, windows, sae, firings, **options) for host in (precise, gated_deltanet))
    assert_close(torch.tensor(ours.kl_atom.to_numpy()), single.kl_atom.to_list(), "KL", 1e-2)


def sides(host, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(d, generator=generator, dtype=torch.float64) for d in (host.d_k, host.d_v))


@pytest.mark.parametrize("scope", ["write", "cache"])
def test_an_edit_of_plain_numbers_is_the_edit_of_tensors(host, run, windows, scope):
    key, value = sides(host)
    edit = ws.Edit.at(window=2, position=37, key=key.tolist(), value=value.numpy(), scope=scope)
    ours = ws.run_edited(host, windows, edit, layer=LAYER, head=HEAD, steps=4)
    at = torch.tensor([2]), torch.tensor([37])
    tensors = make_edit(*at, key.float().double()[None, None], value[None, None], scope)
    theirs = host.logits(edited_hidden(host, run, LAYER, HEAD, tensors, 4))
    native = host.logits(run.final[2:3, 37:41])
    assert ours.shape == (1, 4, 300)
    assert_close(ours - native, theirs - native, "change of the logits", 1e-4)
    assert (ours - native).norm() > 1e-3


def test_edits_out_of_place_are_refused(gated_deltanet, windows):
    key, value = sides(gated_deltanet)
    with pytest.raises(ValueError, match=r"takes key \[d_k\] and value \[d_v\]; got \[1, 12\], \[20\]"):
        ws.Edit.at(0, 3, key[None], value)
    with pytest.raises(ValueError, match="no read scope 'later'"):
        ws.Edit.at(0, 3, key, value, "later")
    with pytest.raises(ValueError, match="no window 3: it has 0 to 2"):
        ws.run_edited(gated_deltanet, windows, ws.Edit.at(3, 3, key, value), layer=LAYER, head=HEAD, steps=2)
    with pytest.raises(ValueError, match="no predictor 'guess': choose one of through_layer, through_norm, exact"):
        ws.predict_shift(gated_deltanet, windows, ws.Edit.at(0, 3, key, value), 5, layer=1, head=2, steps=2, by="guess")
    with pytest.raises(ValueError, match="no token 300"):
        ws.predict_shift(gated_deltanet, windows, ws.Edit.at(0, 3, key, value), 300, layer=1, head=2, steps=2)


@pytest.mark.parametrize("by", PREDICTORS)
@pytest.mark.parametrize("several", [[11], [11, 12, 13]])
def test_predictions_take_one_token_per_row(gated_deltanet, windows, by, several):
    key, value = (side.expand(2, 1, -1).to(torch.float64) for side in sides(gated_deltanet))
    edit = make_edit(torch.tensor([0, 2]), torch.tensor([30, 60]), key, value)
    with pytest.raises(ValueError, match="one token: 2 rows, tokens"):
        predicted(gated_deltanet, windows, edit, several, 6, by)


def predicted(host, windows, edit, token, steps, by):
    return ws.predict_shift(host, windows, edit, token, layer=LAYER, head=HEAD, steps=steps, by=by)


@pytest.mark.parametrize("scope", ["write", "cache"])
def test_shifts_are_the_formulas(host, run, windows, scope):
    """exact: x^T Gamma w. transport and paper: the reads of the write at t0 times the direct path."""
    (key, value), t0, steps, token = sides(host), 20, 5, torch.tensor([250])
    edit, factors = ws.Edit.at(1, t0, key, value, scope), host.factors(run, LAYER, HEAD)
    at = torch.tensor([1]), torch.tensor([t0])
    if scope == "write":
        gradient, _ = logit_gradient(host, run, LAYER, HEAD, *at, steps, token)
        influence = gamma(factors, *at, gradient)[0, 0]
    else:
        gradient, _ = logit_gradient(host, run, LAYER, HEAD, at[0], at[1] + 1, steps - 1, token)
        influence = cache_gamma(factors, *at, gradient)[0]
    assert_close(predicted(host, windows, edit, 250, steps, "exact"), [key @ influence.double() @ value], "exact", 1e-5)
    direct = direct_path(host, LAYER, HEAD, value[None].float(), token)[0, 0]
    for by, read in zip(("paper", "transport"), reads(factors, *at, steps - 1, key[None])):
        assert_close(predicted(host, windows, edit, token, steps, by), [read[0, 0] * direct], by, 1e-5)


def test_small_shifts_are_those_of_edited_runs(host, run, windows):
    """Predictions for two rows, each with its own token, against central differences."""
    key, value = (torch.nn.functional.normalize(x, dim=0) for x in sides(host, 3))
    rows, position = torch.tensor([0, 2]), torch.tensor([30, 60])
    left, right = key.expand(2, 1, -1), value.expand(2, 1, -1)
    exact = predicted(host, windows, make_edit(rows, position, left, right), [11, 12], 6, "exact")
    logits = [
        host.unembed(edited_hidden(host, run, LAYER, HEAD, make_edit(rows, position, left, size * right), 6))[:, -1]
        for size in (5e-4, -5e-4)
    ]
    shift = (logits[0] - logits[1])[torch.arange(2), torch.tensor([11, 12])] / 1e-3
    assert_close(exact, shift, "first-order shift", 1e-3)


def test_a_term_that_nobody_has_read_predicts_nothing(gated_deltanet, windows):
    edit = ws.Edit.at(0, 20, *sides(gated_deltanet), scope="cache")
    for by in PREDICTORS:
        assert predicted(gated_deltanet, windows, edit, 5, 1, by).tolist() == [0.0]


def run_example(path, heading):
    """Run the first Python example below a heading of a document, with less training; return its names."""
    text = (ROOT / path).read_text(encoding="utf-8")
    example = re.search(rf"## {heading}.*?```python\n(.*?)```", text, re.S)[1]
    assert len(example.strip().splitlines()) <= 15
    names = {}
    exec(re.sub(r"sample\(\d+", "sample(5", example.replace("tokens=50_000", "tokens=5_000")), names)
    assert list(names["firings"]) == ["window", "passage", "position", "atom", "coefficient"]
    assert len(names["tests"]) in (8, 10) and {"kl_atom", "kl_delete", "kl_random"} <= {*names["tests"]}
    return names


def test_the_example_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run_example("README.md", "Use it on your own model")
    assert re.fullmatch(r"amplitude\ncoefficient +[\d.]+\nmatched_norm +[\d.]+\n", capsys.readouterr().out)


def test_the_readme_has_what_its_example_prints(monkeypatch, capsys):
    """As it stands, with 200 firings: another processor moves a rate by less than three standard errors."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
    printed, stated = (
        re.findall(r"^(coefficient|matched_norm) +([\d.]+)$", x, re.M) for x in (capsys.readouterr().out, text)
    )
    assert len(printed) == 2
    assert dict(printed).keys() == dict(stated).keys()
    for name, share in printed:
        assert float(share) == pytest.approx(float(dict(stated)[name]), abs=0.1)


def test_the_example_of_the_guide_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run_example("docs/own-model.md", "Edit, predict, replace")
    assert names["logits"].shape == (1, 2, 4096) and names["shift"].shape == (1,)
