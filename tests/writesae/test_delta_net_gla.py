"""DeltaNet and GLA: the chunked recurrence, the plain models and their adapters.

The references are the equations, computed token by token in fp64, and logits of flash-linear-attention's own
models. tests/fla_run.py recorded these logits.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from helpers import assert_close, assert_gradients_close, stepped
from safetensors.torch import load_file

from writesae.edit import edited_hidden, make_edit
from writesae.evaluate.cells import survey_cells
from writesae.hosts.load import adapter, load_host
from writesae.hosts.past import Past, extend
from writesae.recurrence import Groups, diagonal_chunks, step_states
from writesae.shift import direct_path

FAMILIES = ("delta_net", "gla")
RECORDED = Path(__file__).resolve().parents[1] / "fla"
LAYER, HEAD = 1, 2
EDGES = [0, 1, 15, 16, 17, 63, 64, 65, 83]


def small(family, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    model = adapter(family).build(SMALL[family] | fields)
    for name, p in model.named_parameters():
        p.data.mul_(20 if "conv1d" in name else 3)
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    return adapter(family)(model.to(dtype), None, "small")


@pytest.fixture(scope="module", params=FAMILIES)
def host(request):
    return small(request.param)


@pytest.fixture(scope="module")
def run(host, tokens):
    return host.run(tokens)


def stepped_model(model, tokens, edit=lambda layer, t, state, write: (state, state)):
    """Logits [B, T, vocabulary] and each layer's last state from the equations, one token at a time.
    `edit` takes a layer, t, the state at t and the write at t, both [B, H, d_k, d_v]. It returns the state
    that the queries read and the state that is carried to t + 1."""
    w, c = dict(model.named_parameters()), model.config
    delta, last, states, logits = c.model_type == "delta_net", {}, {}, []

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name + ".weight"]

    for t in range(tokens.shape[1]):
        x = w["model.embeddings.weight"][tokens[:, t]]
        for layer in range(c.num_hidden_layers):
            block = f"model.layers.{layer}."
            a, y = block + "attn.", norm(x, block + "attn_norm")
            q, k, v = (y @ w[f"{a}{i}_proj.weight"].T for i in "qkv")
            if delta:
                for i, z in zip("qkv", (q, k, v)):
                    last.setdefault((layer, i), [torch.zeros_like(z)] * 3).append(z)
                q, k, v = (
                    F.silu(sum(z * w[f"{a}{i}_conv1d.weight"][:, 0, n] for n, z in enumerate(last[layer, i][-4:])))
                    for i in "qkv"
                )
            q, k, v = (z.unflatten(-1, (c.num_heads, -1)) for z in (q, k, v))
            old = states.get(layer, k.new_zeros(*k.shape, v.shape[-1]))
            if delta:
                q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
                beta = (1 / (1 + torch.exp(-(y @ w[a + "b_proj.weight"].T))))[..., None]
                kept = old - (beta * k)[..., None] * torch.einsum("bhk,bhkv->bhv", k, old)[..., None, :]
                v = beta * v
            else:
                gate = y @ w[a + "gk_proj.0.weight"].T @ w[a + "gk_proj.1.weight"].T + w[a + "gk_proj.1.bias"]
                decay = (1 / (1 + torch.exp(-gate))) ** (1 / 16)
                kept = decay.unflatten(-1, (c.num_heads, -1))[..., None] * old
            write = k[..., None] * v[..., None, :]
            read, states[layer] = edit(layer, t, kept + write, write)
            out = torch.einsum("bhkv,bhk->bhv", read, q) / k.shape[-1] ** 0.5
            if delta:
                out = norm(out, a + "o_norm").flatten(-2)
            else:
                gate = y @ w[a + "g_proj.weight"].T
                out = norm(out, a + "g_norm_swish_gate").flatten(-2) * gate / (1 + torch.exp(-gate))
            x = x + out @ w[a + "o_proj.weight"].T
            y, m = norm(x, block + "mlp_norm"), block + "mlp."
            gate = y @ w[m + "gate_proj.weight"].T
            inner = gate / (1 + torch.exp(-gate)) * (y @ w[m + "up_proj.weight"].T)
            x = x + inner @ w[m + "down_proj.weight"].T
        logits.append(norm(x, "model.norm") @ model.lm_head.weight.T)
    return torch.stack(logits, 1), [states[layer] for layer in range(c.num_hidden_layers)]


# The chunked recurrence with one decay per channel.


def cells(length=83, d_k=6, d_v=10, strength=0.6):
    """Random fp64 factors shaped as GLA's, each [2, 3, T, d]; the log decays are between -strength and 0."""
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, length, d_k, generator=g, dtype=torch.float64)
    decay = torch.rand(2, 3, length, d_k, generator=g, dtype=torch.float64)
    added = torch.randn(2, 3, length, d_v, generator=g, dtype=torch.float64)
    return dict(query=query, key=key, added=added, log_decay=-strength * decay)


@pytest.mark.parametrize("chunk", [1, 7, 16, 83, 200])
@pytest.mark.parametrize("carried", [False, True])
def test_chunks_are_the_step_loop(chunk, carried):
    parts, state = cells(), torch.randn(2, 3, 6, 10).double() if carried else None
    outputs, end = diagonal_chunks(**parts, state=state, chunk=chunk)
    wanted, states = stepped(parts, state)
    assert_close(outputs, wanted, "outputs", 1e-13)
    assert_close(end, states[:, :, -1], "last state", 1e-13)


def test_gradients_are_the_step_loops():
    assert_gradients_close(lambda parts, state: diagonal_chunks(**parts, state=state, chunk=8), cells(length=20), 1e-12)


def test_no_decay_is_too_fast():
    """fp32 chunks against fp64 steps; half of the channels decay by exp(-40) per token, the others not."""
    parts = cells(length=130)
    parts["log_decay"] = torch.full_like(parts["log_decay"], -40.0)
    parts["log_decay"][..., ::2] = 0
    made = []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: x.float().to(dtype).requires_grad_() for name, x in parts.items()}
        outputs = diagonal_chunks(**leaves)[0] if dtype == torch.float32 else stepped(leaves)[0]
        made.append([outputs, *torch.autograd.grad(outputs.square().sum(), list(leaves.values()))])
    for name, mine, other in zip(["outputs", *parts], *made, strict=True):
        assert_close(mine, other, name, 2e-6)


@pytest.mark.parametrize("chunk", [16, 200])
def test_rows_read_states_that_they_share(chunk):
    parts = {name: torch.cat([x, x - 0.1]) for name, x in cells(length=40).items()}
    states, which = torch.randn(3, 3, 6, 10).double(), torch.tensor([2, 0, 2, 2])
    wanted, end = diagonal_chunks(**parts, state=states[which])
    outputs, none = diagonal_chunks(**parts, state=states, groups=Groups(which, 3), chunk=chunk, end=False)
    assert_close(outputs, wanted, "outputs", 1e-13)
    assert none is None
    assert_close(diagonal_chunks(**parts, state=states, groups=Groups(which, 3), chunk=chunk)[1], end, "end", 1e-13)


# The models.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [{}, dict(tie_word_embeddings=False, expand_k=1, num_heads=2, norm_eps=1e-3)])
def test_the_model_is_the_equations(family, fields, tokens):
    host = small(family, **fields)
    with torch.no_grad():
        wanted, states = stepped_model(host.model, tokens)
        made = host.model(input_ids=tokens, labels=tokens)
    assert_close(made.logits, wanted, "logits", 1e-10)
    loss = -wanted.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    assert_close(made.loss, loss, "loss", 1e-10)
    for layer, record in enumerate(host.run(tokens).records):
        assert_close(record.end, states[layer], f"last state of layer {layer}", 1e-10)
    assert len(wanted[0].argmax(-1).unique()) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_flash_linear_attentions(family):
    """The recorded checkpoint loads and gives the recorded logits.

    They were recorded on a CPU, with the reference operators in place of the Triton ones.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(60)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0")
    recorded = load_file(RECORDED / "logits.safetensors")
    host = load_host(RECORDED / family, "cpu", tokenizer=tokenizer)
    tokens, wanted = recorded["tokens"], recorded[family]
    assert_close(host.logits(host.run(tokens).final), wanted, "the host's logits", 1e-5)
    with torch.no_grad():
        assert_close(host.model(input_ids=tokens).logits, wanted, "the plain model's logits", 1e-5)
    run = host.run(tokens[:, :50])
    pasts = [host.past_at(record, torch.arange(2), torch.full((2,), 50)) for record in run.records]
    position = torch.full((2, 1), 50)
    hidden = host.embed(tokens[:, 50:51])
    for layer in range(host.layers):
        hidden = host.finish(layer, host.mix(layer, hidden, pasts[layer], position), pasts[layer])
    assert_close(host.logits(hidden)[:, 0], wanted[:, 50], "logits of one token after a cache", 1e-5)


REFUSED = [
    ("delta_net", dict(use_gate=True), "A delta_net host has use_gate False, as the published .*, and this one True"),
    ("delta_net", dict(qk_norm="sum"), "has qk_norm 'l2', .* and this one 'sum'"),
    ("delta_net", dict(attn=dict(layers=[1], num_heads=2)), "has attn None"),
    ("gla", dict(use_short_conv=True), "A gla host has use_short_conv False, .* and this one True"),
    ("gla", dict(num_kv_heads=2), "keys and values for each of its 4 heads, and this one 2"),
    ("gla", dict(clamp_min=-1.0), "has clamp_min None"),
    ("gla", dict(num_heads=7), r"7 heads do not divide expand_k times hidden_size, 48"),
]


@pytest.mark.parametrize(("family", "fields", "says"), REFUSED)
def test_other_architectures_are_refused_in_one_sentence(family, fields, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        adapter(family).build(SMALL[family] | fields)
    host = small(family)
    host.model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | fields))
    with pytest.raises(ValueError, match=says):
        load_host(tmp_path, "cpu")
    # on a GPU the model has the package's own class and exists before the check
    for name, value in fields.items():
        setattr(host.model.config, name, value)
    with pytest.raises(ValueError, match=says):
        type(host)(host.model, None, "other")


def test_a_cache_is_refused(host, tokens):
    with pytest.raises(ValueError, match="has no cache"):
        host.model(input_ids=tokens, use_cache=True)


# The adapters.


def test_blocks_are_run_from_their_weights_alone(host, run, tokens, monkeypatch):
    """The host never calls a block's forward: the forwards of flash-linear-attention need a GPU."""

    def triton(self, *args):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    for kind in (torch.nn.RMSNorm, torch.nn.Conv1d):
        monkeypatch.setattr(kind, "forward", triton)
    assert_close(host.run(tokens).final, run.final, "final hidden states", 1e-15)


@pytest.mark.parametrize("length", [90, 64, 5])
def test_states_before_any_position(host, tokens, length):
    run = host.run(tokens[:, :length])
    starts = torch.tensor([s for s in (*EDGES, 90) if s <= length])
    rows = torch.arange(len(starts)) % 3
    states = host.past_at(run.records[LAYER], rows, starts).state[:, HEAD]
    native = step_states(host.factors(run, LAYER, HEAD))
    for i, start in enumerate(starts):
        wanted = native[rows[i], start - 1] if start else torch.zeros_like(native[0, 0])
        assert_close(states[i], wanted, f"state before {start}", 1e-12)


def test_a_sequence_in_two_pieces_is_the_whole(host, run, tokens):
    positions = host._positions(tokens)
    for cut in (1, 3, 16, 41):
        hidden = [host.embed(tokens[:, :cut]), host.embed(tokens[:, cut:])]
        for layer in range(host.layers):
            first = host.mix(layer, hidden[0], None, positions[:, :cut])
            after = host.finish(layer, first, None)
            none = {name: x.new_zeros(len(x), reach, x.shape[-1]) for name, (x, reach) in first.windows.items()}
            past = extend(Past(windows=none), first)
            second = host.mix(layer, hidden[1], past, positions[:, cut:])
            hidden = [after, host.finish(layer, second, past)]
            assert_close(second.end, run.records[layer].end, f"last state of layer {layer}, cut {cut}", 1e-11)
        assert_close(torch.cat(hidden, 1), run.final, f"final hidden states, cut {cut}", 1e-11)


def test_output_projection_and_unembedding_are_the_models(host):
    value, token = torch.randn(5, host.d_v).double(), torch.tensor([5, 6])
    slots = torch.zeros(5, host.heads * host.d_v, dtype=torch.float64)
    slots[:, HEAD * host.d_v : (HEAD + 1) * host.d_v] = value
    logits = host.model.lm_head(host.blocks[LAYER].attn.o_proj(slots))
    assert_close(direct_path(host, LAYER, HEAD, value.float(), token), logits[:, token].T, "direct path", 1e-5)


def test_what_the_cells_are_like(host, run):
    """Added and effective writes have rank 1, and only GLA's state decays."""
    table = survey_cells(host, run, 16)
    assert set(table.added_write_rank) == set(table.effective_write_rank) == {1}
    if host.family == "delta_net":
        assert (table.half_life_median == float("inf")).all()
    else:
        assert table.half_life_median.between(1, 100).all() and table.half_life_median.nunique() == len(table)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_states_are_kept_in_fp32(family, tokens):
    lower = small(family, torch.bfloat16)
    same_weights = small(family)
    same_weights.model.load_state_dict(lower.model.state_dict())
    ours, wanted = lower.run(tokens), same_weights.run(tokens)
    assert ours.records[0].end.dtype == torch.float32
    assert_close(ours.records[0].end, wanted.records[0].end, "state of layer 0", 2e-2)
    assert_close(lower.logits(ours.final), same_weights.logits(wanted.final), "logits", 0.1)
    branched, _ = lower.branch(ours, 0, 1, torch.tensor([0]), torch.tensor([30]), torch.zeros(1, 5, lower.d_v))
    assert_close(branched, ours.final[:1, 30:35], "branch", 3e-2)


# Edits.


@pytest.mark.parametrize("scope", ["write", "cache"])
@pytest.mark.parametrize("position", [0, 37, 88])
def test_a_replaced_write_is_the_step_loop_with_another_write(host, run, tokens, scope, position):
    """A write removed and added back changes nothing; another write gives the step loop's logits."""
    torch.manual_seed(position)
    factors, steps = host.factors(run, LAYER, HEAD), min(6, tokens.shape[1] - position)
    key, added = factors.key[1, position], factors.added[1, position]
    other_key, other = torch.randn(host.d_k).double(), torch.randn(host.d_v).double()

    def change(layer, t, state, write):
        edited = state.clone()
        if (layer, t) == (LAYER, position):
            edited[:, HEAD] += torch.outer(other_key, other) - write[:, HEAD]
        return (state if scope == "cache" else edited), edited

    place = torch.tensor([1]), torch.tensor([position])
    same = make_edit(*place, torch.stack([-key, key])[None], torch.stack([added, added])[None], scope)
    native = run.final[1:2, position : position + steps]
    assert_close(edited_hidden(host, run, LAYER, HEAD, same, steps), native, "own write", 1e-12)
    replaced = make_edit(*place, torch.stack([-key, other_key])[None], torch.stack([added, other])[None], scope)
    made = host.logits(edited_hidden(host, run, LAYER, HEAD, replaced, steps))
    with torch.no_grad():
        wanted, _ = stepped_model(host.model, tokens[1:2, : position + steps], change)
    assert_close(made, wanted[:, position:], "logits of the edited run", 1e-6)
    later = slice(1, None) if scope == "cache" else slice(None)
    assert steps <= 1 or (made - host.logits(native))[:, later].norm() > 1e-3
