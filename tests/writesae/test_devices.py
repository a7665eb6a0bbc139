"""A host on another device, or on two: its inputs and outputs are on the CPU, everything else on the device.

No GPU is needed: tests/elsewhere.py is a stand-in. GPU kernels are not tested.
"""

import copy

import pandas as pd
import pytest
import torch
from conftest import SMALL
from elsewhere import ELSEWHERE, THIRD, Elsewhere, mark, moved, place
from helpers import assert_close

from replication.pages.cache_edits import newlines, readers
from replication.pages.cache_edits.site import Site
from writesae.edit import generate_under, make_edit, run_edited
from writesae.evaluate import replacement
from writesae.evaluate.cells import cost_of_no_writes
from writesae.evaluate.firings import Places, encode_cell
from writesae.harvesting import harvest
from writesae.hosts import load
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.shift import gamma, logit_gradient, predict_kl, predict_shift


def spread(host):
    """A copy of a host on two devices: the layers from the third on are on the second, everything else on the first."""
    model = copy.deepcopy(host.model)
    if load.shares_weights(model):
        pytest.skip("Layers that share weights are on one device.")
    mark(model, ELSEWHERE)
    for layer in model.base_model.layers[2:]:
        mark(layer, THIRD)
    return type(host)(model, None, host.name)


def asked(host, tokens, dtype=torch.float64, layer=1):
    """Everything that the experiments ask of a host, as {name: tensor}."""
    run = host.run(tokens)
    cell = layer, 1
    factors, generator = host.factors(run, *cell), torch.Generator().manual_seed(0)
    rows, position = torch.tensor([0, 2, 1]), torch.tensor([20, 20, 20])
    key, value = (torch.randn(3, d, generator=generator, dtype=torch.float64).to(dtype) for d in (host.d_k, host.d_v))
    edits = {cell: make_edit(rows, position, key[:, None], value[:, None])}
    continued, first = generate_under(host, run, edits, 3)
    gradient, native = logit_gradient(host, run, *cell, rows, position, 4, torch.tensor([5, 6, 7]))
    place = dict(layer=cell[0], head=cell[1], steps=4)
    edit = make_edit(rows, position, key[:, None], value[:, None])
    closed = {by: predict_shift(host, tokens, edit, 5, **place, by=by) for by in ("through_layer", "through_norm")}
    nothing = torch.zeros(3, 1, dtype=dtype)
    watched = newlines.Amplifier(rows, key[:, None], value[:, None], nothing[:, 0], nothing + 2, rows > 0, rows[:1])
    site = Site(host, run, *cell, "added")
    amplified, amounts, _ = newlines.generate_amplified(site, watched, 3)
    extra = (key[:, None, :, None] * value[:, None, None]).expand(-1, host.heads, -1, -1)
    kept = newlines.generate_amplified(site, newlines.KeptOffsets(rows, torch.tensor([2, 0, 1]), extra), 3)
    firings = pd.DataFrame(dict(position=[20, 30], host="h", atom=0, coefficient=1.0, window=[0, 2]))
    heard = readers.readers(site, (key[0], value[0]), firings, 3, 2, seed=0)
    harvested = harvest(host, tokens, [cell], 2, progress=False)[cell]
    return (
        harvested.tensors()
        | closed
        | dict(
            divergence=predict_kl(host, tokens, edit, **place, readings=2),
            continued=continued,
            first=first,
            influence=gamma(factors, rows, position, gradient),
            native=native,
            amplified=amplified,
            amounts=amounts,
            kept_tokens=kept.tokens,
            kept_norms=kept.written,
            kept_states=kept.states,
            heard=torch.from_numpy(heard[["signal", "baseline"]].to_numpy()),
            direct=host.unembedding() @ host.output_projection(*cell),
        )
    )


def test_all_that_is_asked_of_a_host_elsewhere_is_what_it_says_here(host, tokens):
    expected = asked(host, tokens)
    with Elsewhere():
        found = asked(moved(host), tokens)
        assert not [name for name, x in found.items() if place(x)]
    for name, x in found.items():
        assert_close(x, expected[name], name, 1e-12)


@pytest.mark.parametrize("number", [1, 2])
def test_all_that_is_asked_of_a_host_on_two_devices_is_what_it_says_here(host, tokens, number):
    """The edited layer is before or after the change of the device."""
    layer = host.recurrent_layers[number]
    expected = asked(host, tokens, layer=layer)
    with Elsewhere():
        both = spread(host)
        run = both.run(tokens)
        assert [record.hidden.device for record in run.records] == [ELSEWHERE] * 2 + [THIRD] * (host.layers - 2)
        assert both.device == both.final_device == ELSEWHERE
        found = asked(both, tokens, layer=layer)
        cells = [(0, 1), (1, 0), (3, 2)]
        costs = cost_of_no_writes(both, run, cells)
        assert not [name for name, x in found.items() if place(x)]
    for name, x in found.items():
        assert_close(x, expected[name], name, 1e-12)
    pd.testing.assert_frame_equal(costs, cost_of_no_writes(host, host.run(tokens), cells))


def test_edits_of_several_layers_on_two_devices(host, tokens):
    def edited(host):
        generator, edits = torch.Generator().manual_seed(4), {}
        for cell in [(0, 1), (1, 0), (3, 2)]:
            sides = (torch.randn(2, 1, d, generator=generator).double() for d in (host.d_k, host.d_v))
            edits[cell] = make_edit(torch.tensor([0, 2]), torch.tensor([20, 30]), *sides)
        return run_edited(host, tokens, edits, steps=9)

    with Elsewhere():
        found = edited(spread(host))
    assert_close(found, edited(host), "logits", 1e-12)


def test_replacement_on_a_host_elsewhere(host, tokens):
    cell = host.recurrent_layers[1], 0
    torch.manual_seed(0)
    sae = SAE(Architecture(n_atoms=24, k=3), host.d_k, host.d_v).requires_grad_(False)
    firings = pd.DataFrame(dict(window=[0, 1], position=[20, 30], atom=[3, 4], coefficient=[0.5, 1.0]))

    def replaced(host):
        single = harvest(host, tokens, [cell], 2, progress=False)[cell]
        cell_sae = encode_cell(cell, "write", "added", sae, single)
        return replacement.replace(
            host, host.run(tokens), cell_sae, firings, Places.of(firings), seed=0, scopes=("write",)
        )

    expected = replaced(host)
    with Elsewhere():
        found = replaced(moved(host))
    pd.testing.assert_frame_equal(found, expected)


def test_the_stand_in_refuses_what_a_gpu_would():
    with Elsewhere():
        there, here = torch.ones(3).to(ELSEWHERE), torch.ones(3)
        assert there.device == ELSEWHERE
        assert here.device == there.cpu().device == torch.device("cpu")
        assert (there[torch.tensor([0, 1])] * 2).device == ELSEWHERE
        for mixed in (lambda: there + here, lambda: torch.stack([there, here]), lambda: there.add_(here)):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()
        third = torch.ones(3).to(THIRD)
        assert there.to(third.device).device == (third + 1).device == THIRD
        for mixed in (lambda: there + third, lambda: third[there.long()], lambda: torch.stack([third, there])):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("host", list(SMALL), indirect=True)
def test_a_host_in_bfloat16_answers_in_fp32_and_about_the_same(host, tokens):
    """The GPU profiles load hosts in bfloat16.

    Greedy continuations may differ from fp32, so they and their consequences are not compared. One host per family:
    random weights of some other classes amplify rounding, the library's as much as ours.
    """
    half = copy.deepcopy(host)
    half.model.bfloat16()
    found, expected = asked(half, tokens, torch.float32), asked(host, tokens)
    for name in ("key", "added", "log_decay", "native", "first", "influence", "direct"):
        assert found[name].dtype == torch.float32, name
        assert_close(found[name], expected[name], name, 0.15)
