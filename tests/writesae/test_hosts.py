"""Every adapter against its model's own forward and against a step loop in fp64.

Some tests are for Gated DeltaNet alone.
"""

import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from writesae.evaluate.cells import numerical_rank
from writesae.hosts import base
from writesae.hosts.gated_deltanet import rms_norm
from writesae.hosts.layers import short_convolution, slow_decays
from writesae.hosts.load import adapter, load_host
from writesae.hosts.past import Record
from writesae.recurrence import step_states

LIBRARY = 5e-6  # the library's recurrence is in fp32, whatever the model's type


def library_logits(host, tokens, **more):
    with torch.no_grad():
        return host.model(input_ids=tokens, use_cache=False, **more).logits


def test_logits_are_the_librarys(host, run, tokens):
    assert_close(host.logits(run.final), library_logits(host, tokens).float(), "logits", LIBRARY)


def test_outputs_and_last_state_are_the_step_loops(host, run):
    for layer, head in host.cells:
        factors = host.factors(run, layer, head)
        states = step_states(factors)
        read = (states.mT @ factors.query[..., None])[..., 0]
        record = run.records[layer]
        outputs = record.outputs - record.factors.get("skip", 0)  # Mamba-2's D x, which bypasses the state
        assert_close(outputs[:, :, head], read, f"output of {layer}.{head}", 1e-12)
        assert_close(run.records[layer].end[:, head], states[:, -1], f"state of {layer}.{head}", 1e-12)


def test_effective_write_is_the_states_whole_change(host, run):
    factors = host.factors(run, 1, 3)
    states = step_states(factors)
    change = states[:, 1:] - factors.log_decay.exp()[:, 1:, :, None] * states[:, :-1]
    if factors.effective is None:
        assert numerical_rank(change[0]) == 2  # RWKV-7 erases along another key than it writes
    else:
        assert_close(factors.key[:, 1:, :, None] * factors.effective[:, 1:, None], change, "effective write", 1e-12)


def test_factors_follow_the_librarys_gates(gated_deltanet, tokens):
    """beta and the decay against the library's formula, computed from the layer's input."""
    layer, head, host = 1, 2, gated_deltanet
    run = host.run(tokens)
    mixer, block = host.blocks[layer].linear_attn, host.blocks[layer]
    normed = rms_norm(run.records[layer].hidden, block.input_layernorm)
    log_decay = -mixer.A_log.exp() * torch.nn.functional.softplus(mixer.in_proj_a(normed) + mixer.dt_bias)
    factors = host.factors(run, layer, head)
    assert_close(factors.log_decay[..., 0], log_decay[..., head], "log decay", 1e-12)
    assert_close(factors.key.norm(dim=-1), torch.ones_like(factors.key[..., 0]), "key norms", 1e-3)


def test_library_state_is_ours(gated_deltanet, tokens):
    """Our last state against the recurrent state in the library's cache: same orientation, same values."""
    host = gated_deltanet
    with torch.no_grad():
        cache = host.model(input_ids=tokens, use_cache=True).past_key_values
    state = host.run(tokens).records[1].end
    assert_close(state.float(), cache.layers[1].recurrent_states[0].float(), "cached state", LIBRARY)


@pytest.mark.parametrize("start", [0, 1, 2, 40, 83])
def test_branch_without_a_change_is_the_native_run(host, run, start):
    rows, steps = torch.tensor([0, 1, 2, 1]), 7
    starts = torch.tensor([start, max(start - 1, 0), start, 0])
    final, _ = host.branch(run, 0, 1, rows, starts, torch.zeros(4, steps, host.d_v, dtype=torch.float64))
    native = torch.stack([run.final[r, s : s + steps] for r, s in zip(rows, starts, strict=True)])
    assert_close(final, native, "final hidden states", 1e-12)


def test_what_edited_runs_from_the_same_places_share_changes_no_bit(host, run, monkeypatch):
    """Runs from two sets of places in turn, with other changes each time, with and without kept states."""
    generator = torch.Generator().manual_seed(8)
    places = [(torch.tensor([0, 1, 0]), torch.tensor([5, 9, 5])), (torch.tensor([2, 2]), torch.tensor([4, 30]))]
    cases = [
        (rows, starts, torch.randn(len(rows), 3, host.d_v, generator=generator).to(run.final))
        for rows, starts in places
    ]
    layer = host.recurrent_layers[0]
    kept = [host.branch(run, layer, 1, *case)[0] for case in cases + cases[:1] + cases[:1]]
    assert run.records[-1].kept is not None
    monkeypatch.setattr(base, "KEPT_NUMBERS", 0)
    for record in run.records:
        record.kept = None
    anew = [host.branch(run, layer, 1, *case)[0] for case in cases + cases[:1] + cases[:1]]
    assert run.records[-1].kept is None
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_branch_is_the_edited_layer_and_the_layers_above(host, run, layer):
    """Without a change the layer's output is the next layer's input; a change moves no earlier output."""
    rows, starts = torch.tensor([0, 2, 1]), torch.tensor([30, 50, 0])
    change = torch.zeros(3, 5, host.d_v, dtype=torch.float64)
    native, _ = host.edited_layer(run, layer, 1, rows, starts, change)
    wanted = run.records[layer + 1].hidden[rows[:, None], starts[:, None] + torch.arange(5)]
    assert_close(native, wanted, "output of the layer", 1e-12)
    change[:, 2] = torch.randn(3, host.d_v, generator=torch.Generator().manual_seed(5)).double()
    hidden, _ = host.edited_layer(run, layer, 1, rows, starts, change)
    moved = (hidden - native).norm(dim=-1) > 1e-12  # [3, 5]
    assert not moved[:, :2].any() and moved[:, 2].all() and not moved[:, 4].any()
    final, _ = host.layers_above(run, layer, rows, starts, hidden)
    assert torch.equal(final, host.branch(run, layer, 1, rows, starts, change)[0])


def test_branch_isolates_rows(host, run):
    rows, starts = torch.tensor([0, 0, 2]), torch.tensor([30, 30, 50])
    change = torch.zeros(3, 5, host.d_v, dtype=torch.float64)
    change[1] = torch.randn(5, host.d_v, generator=torch.Generator().manual_seed(5)).double()
    final, _ = host.branch(run, 1, 0, rows, starts, change)
    assert_close(final[0], run.final[0, 30:35], "row beside an edited one", 1e-12)
    assert_close(final[2], run.final[2, 50:55], "row of another window", 1e-12)
    assert (final[1] - run.final[0, 30:35]).norm() > 1e-3


def test_a_run_in_double_precision_is_so_throughout(host, run):
    """Central differences of size 1e-9 and 1e-6 agree; with any rounding to fp32, 1e-9 would give noise.

    Without this, tests at a tolerance of 1e-10 would depend on the processor.
    """
    at = torch.tensor([1]), torch.tensor([30])
    change = torch.randn(1, 9, host.d_v, generator=torch.Generator().manual_seed(3)).double()

    def slope(size):
        ahead, behind = (host.branch(run, 0, 1, *at, sign * size * change)[0] for sign in (1, -1))
        return (ahead - behind) / (2 * size)

    assert slope(1e-6).norm() > 1e-2
    assert_close(slope(1e-9), slope(1e-6), "slope", 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_the_librarys(gated_deltanet, dtype):
    """Our norms equal the library's bit for bit; the gated norm is tested through `finish`."""
    host = type(gated_deltanet)(deepcopy(gated_deltanet.model).to(dtype), None, "small")
    torch.manual_seed(1)
    x, outputs = torch.randn(2, 5, host.model.config.hidden_size).to(dtype), torch.randn(2, 5, host.heads, host.d_v)
    block = host.blocks[1]
    assert torch.equal(rms_norm(x, block.input_layernorm), block.input_layernorm(x))
    mixer = block.linear_attn
    gate = mixer.in_proj_z(block.input_layernorm(x))
    normed = mixer.norm(outputs.to(dtype).reshape(-1, host.d_v), gate.reshape(-1, host.d_v)).view_as(gate)
    wanted = x + mixer.out_proj(normed)
    wanted = wanted + block.mlp(block.post_attention_layernorm(wanted))
    assert torch.equal(host.finish(1, Record(x, outputs, beside={"gate": gate}), None), wanted)


def test_branch_refuses_to_leave_the_window(host, run):
    with pytest.raises(ValueError, match="leaves its window of 90 tokens"):
        host.branch(run, 1, 0, torch.tensor([0]), torch.tensor([88]), torch.zeros(1, 3, host.d_v, dtype=torch.float64))


def test_greedy_decoding_is_the_models(host, tokens):
    """Decoded tokens against the model's own forward over the whole text, repeated for every token."""
    prompt = tokens[:, :50]
    sofar = prompt
    for _ in range(8):
        sofar = torch.cat([sofar, library_logits(host, sofar)[:, -1:].argmax(-1)], 1)
    wanted, run, rows = sofar[:, 50:], host.run(prompt), torch.arange(3)
    pasts = [host.past_at(record, rows, torch.full((3,), 50)) for record in run.records]
    assert torch.equal(host.decode(pasts, host.logits(run.final[:, -1]).argmax(-1), 50, 7), wanted)


@pytest.mark.parametrize(
    ("layer", "head", "says"), [(2, 0, "Layer 2 of small is not recurrent"), (1, 4, "has no head 4")]
)
def test_wrong_cells_are_refused(gated_deltanet, tokens, layer, head, says):
    host = gated_deltanet
    run = host.run(tokens)
    with pytest.raises(ValueError, match=says):
        host.factors(run, layer, head)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_short_convolution_is_torchs(width, bias):
    conv = torch.nn.Conv1d(5, 5, width, groups=5, bias=bias, padding=width - 1, dtype=torch.float64)
    conv.requires_grad_(False)
    inputs = torch.randn(2, 7, 5, dtype=torch.float64)
    wanted = conv(inputs.mT)[..., :7].mT
    assert_close(short_convolution(inputs, None, conv.weight, conv.bias), wanted, "whole", 1e-14)
    before = F.pad(inputs, (0, 0, width - 1, 0))[:, 4 : 4 + width - 1]
    assert_close(short_convolution(inputs[:, 4:], before, conv.weight, conv.bias), wanted[:, 4:], "rest", 1e-14)
    half = [x if x is None else x.bfloat16() for x in (inputs, None, conv.weight, conv.bias)]
    in_fp32 = short_convolution(*(x if x is None else x.float() for x in half))
    assert torch.equal(short_convolution(*half), in_fp32.bfloat16())  # rounded once, at the end


def test_slow_decays_have_memory():
    torch.manual_seed(0)
    a_log, dt_bias = slow_decays(4000)
    alpha = torch.exp(-a_log.exp() * torch.nn.functional.softplus(dt_bias))
    half_life = torch.log(torch.tensor(0.5)) / alpha.log()
    low, middle, high = half_life.quantile(torch.tensor([0.05, 0.5, 0.95]))
    assert 0.3 < low < 3 < middle < 30 < high < 700


def test_load_host_reads_what_was_saved(host, tokens, tmp_path):
    """Saving in the library's format and loading again gives the same logits in fp32."""
    from transformers import PreTrainedTokenizerFast

    from replication.study import docstrings as corpus

    host.model.save_pretrained(tmp_path)
    trained = corpus.train_tokenizer(["some words and more words"] * 3, 280)
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=corpus.END_OF_TEXT).save_pretrained(tmp_path)
    loaded = load_host(tmp_path)
    assert type(loaded) is type(host) and loaded.recurrent_layers == host.recurrent_layers
    assert (loaded.d_k, loaded.d_v, loaded.heads) == (12, 12 if loaded.family == "kda" else 20, 4)
    assert_close(loaded.logits(loaded.run(tokens).final), library_logits(host, tokens).float(), "loaded logits", 2e-5)


def test_load_host_refuses_other_things(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_host(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2", architectures=["GPT2LMHeadModel"])))
    with pytest.raises(ValueError, match="no host family has that class"):
        load_host(tmp_path)


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match="no host family 'lstm'"):
        adapter("lstm").build({})
