"""The cost of writing nothing in a cell, against a step loop."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_close
from writesae.evaluate.cells import cost_of_no_writes, state_reads, survey_cells
from writesae.recurrence import step_states


def test_a_heads_reads_are_the_step_loops(host, run):
    for layer, head in [(0, 1), (host.recurrent_layers[-1], host.heads - 1)]:
        factors = host.factors(run, layer, head)
        reads = (step_states(factors).mT @ factors.query[..., None])[..., 0]
        assert_close(state_reads(run.records[layer], head), reads, "reads of the state", 1e-10)


def plain_losses(host, run, layer=None, head=None):
    """Return the loss of each window by a plain forward pass, without the reads of one head's state."""
    positions = torch.arange(run.tokens.shape[1]).expand(run.tokens.shape)
    hidden = host.embed(run.tokens)
    for number in range(host.layers):
        record = host.mix(number, hidden, None, positions)
        if number == layer:
            factors = host.cell_factors(record, head)
            for t, (state, _) in enumerate(factors.walk()):
                record.outputs[:, t, head] -= (factors.query[:, t, None] @ state)[:, 0]
        hidden = host.finish(number, record, None)
    losses = F.cross_entropy(host.unembed(hidden)[:, :-1].mT, run.tokens[:, 1:], reduction="none")
    return losses.mean(1)


def test_the_cost_is_the_loss_without_the_state_minus_native(host, run):
    assert host.d_k != host.d_v or host.family == "kda"  # which has one size for both
    cells = [(host.recurrent_layers[1], 2), (host.recurrent_layers[-1], 0)]
    table = cost_of_no_writes(host, run, cells)
    native = plain_losses(host, run)
    wanted = torch.cat([plain_losses(host, run, *cell) - native for cell in cells])
    assert wanted.abs().min() > 1e-5
    assert_close(torch.tensor(table.cost), wanted, "costs", 1e-8)
    assert table[["layer", "head"]].drop_duplicates().values.tolist() == [list(cell) for cell in cells]
    assert table.window.tolist() == [0, 1, 2, 0, 1, 2]


def test_without_writes_the_head_only_loses_its_reads(gated_deltanet, tokens):
    """A forward pass in which beta is 0 for one head, at all tokens, has the same loss."""
    host, (layer, head) = gated_deltanet, (1, 3)
    run = host.run(tokens)
    mixer = host.blocks[layer].linear_attn

    def silence(module, inputs, output):
        output[..., head] = -1e4  # beta is its sigmoid
        return output

    hook = mixer.in_proj_b.register_forward_hook(silence)
    try:
        silent = plain_losses(host, run)
    finally:
        hook.remove()
    cost = torch.tensor(cost_of_no_writes(host, run, [(layer, head)]).cost)
    assert_close(cost, silent - plain_losses(host, run), "cost", 1e-8)


@pytest.mark.parametrize(("cell", "message"), [((2, 0), "Layer 2 of small is not recurrent"), ((0, 9), "no head 9")])
def test_a_cell_must_exist(gated_deltanet, tokens, cell, message):
    with pytest.raises(ValueError, match=message):
        cost_of_no_writes(gated_deltanet, gated_deltanet.run(tokens), [cell])


def test_the_spectrum_is_of_the_states_before_every_8th_token(host, run):
    cell = host.recurrent_layers[1], 2
    states = step_states(host.factors(run, *cell))
    for first in (9, 21, 90):
        sigma = torch.linalg.svdvals(states[:4, first - 1 :: 8].double()).flatten(0, 1)
        found = survey_cells(host, run, first, [cell]).sigma1_over_sigma2[0]
        assert found == pytest.approx((sigma[:, 0] / sigma[:, 1]).median().item(), rel=1e-6)
    for first in (0, 91):
        with pytest.raises(ValueError, match=f"first_position is from 1 to 90, .* not {first}"):
            survey_cells(host, run, first, [cell])
