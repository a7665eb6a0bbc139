"""The attention map of a recurrent head against the head's own output, step loops and edited runs."""

import pytest
import torch
from helpers import assert_close

from writesae.edit import edited_hidden, make_edit
from writesae.evaluate.attribution import attribution, logit_parts, overwriters, survival, weights, without_erase
from writesae.evaluate.cells import state_reads
from writesae.recurrence import step_states

LAYER, HEAD = 1, 2


def erases(factors):
    return factors.erase is not None and bool(factors.erase.any())


def test_map_times_writes_is_the_heads_own_output(host, run):
    for layer, head in [(LAYER, HEAD), host.cells[-1], host.cells[0]]:
        read = attribution(host, run, layer, head) @ host.factors(run, layer, head).added
        assert_close(read, state_reads(run.records[layer], head), f"output of L{layer}H{head}", 1e-6)


def test_map_is_what_a_step_loop_reads_of_one_write_alone(host, run):
    factors, s = host.factors(run, LAYER, HEAD), 30
    alone = torch.zeros_like(factors.added)
    alone[:, s] = factors.added[:, s]
    factors.added, found = alone, weights(factors)
    reads = (step_states(factors).mT @ factors.query[..., None])[..., 0]
    assert_close(found[:, :, s, None] * alone[:, None, s], reads, "reads of one write", 1e-9)
    assert not found.triu(1).any()


def test_without_erase_only_decays_are_left(host, run):
    factors = host.factors(run, LAYER, HEAD)
    found = weights(without_erase(factors))
    t, s = 40, 25
    kept = factors.log_decay[:, s + 1 : t + 1].sum(1).exp() * factors.key[:, s]
    assert_close(found[:, t, s], (factors.query[:, t] * kept).sum(-1), "by decay", 1e-9)
    exact = weights(factors)
    assert torch.equal(found, exact) == (not erases(factors))


def test_survival_is_the_length_of_the_moved_key(host, run):
    factors = host.factors(run, LAYER, HEAD)
    found, s, t = survival(factors), 20, 33
    moved = factors.key[:, s, None]
    for step in range(s + 1, t + 1):
        moved = factors.at(slice(None), step).transition(moved)
    assert_close(found[:, t, s], moved[:, 0].norm(dim=-1), "survival", 1e-9)
    assert not found.triu(1).any()


def test_a_repeated_key_overwrites_its_write(gated_deltanet, tokens):
    """Where the same key comes again with beta = 1, the delta rule removes the whole write."""
    factors = gated_deltanet.factors(gated_deltanet.run(tokens), LAYER, HEAD)
    for x in (factors.key, factors.probe):
        x[:, 50] = factors.key[:, 30]
    factors.erase[:, 50] = factors.log_decay[:, 50].exp() * factors.key[:, 50]
    factors.erase[:, 31:50] = 0
    which, share = overwriters(factors)
    assert (which[:, 30] == 50).all()
    assert_close(share[:, 30], factors.log_decay[:, 31:51].sum((1, 2)).exp(), "all that was left", 1e-3)
    assert_close(survival(factors)[:, 50, 30], torch.zeros(len(which)).double(), "rest", 1e-3)


def test_a_host_that_only_decays_has_no_overwriters(host, run):
    factors = host.factors(run, LAYER, HEAD)
    if not erases(factors):
        with pytest.raises(ValueError, match="no token erases"):
            overwriters(factors)
    else:
        which, share = overwriters(factors)
        assert share.min() >= 0 and (which[share > 0] > torch.arange(which.shape[1]).expand_as(which)[share > 0]).all()


def test_parts_of_a_logit_are_its_change_when_one_write_is_scaled(host, run, tokens):
    chosen = torch.tensor([7, 100, 250])
    parts, factors = logit_parts(host, run, LAYER, HEAD, chosen), host.factors(run, LAYER, HEAD)
    rows, s, size = torch.arange(3), torch.tensor([5, 40, 77]), 1e-3
    shifts = []
    for sign in (size, -size):
        edit = make_edit(rows, s, factors.key[rows, s][:, None], sign * factors.added[rows, s][:, None], "write")
        for row, part in enumerate(edit.part(torch.tensor([number])) for number in range(3)):
            final = edited_hidden(host, run, LAYER, HEAD, part, tokens.shape[1] - int(s[row]))[0, -1]
            shifts.append(host.unembed(final)[chosen[row]])  # fp64; host.logits would give fp32
    measured = (torch.stack(shifts[:3]) - torch.stack(shifts[3:])) / (2 * size)
    assert_close(parts[rows, s], measured, "parts of the logit", 1e-3)
