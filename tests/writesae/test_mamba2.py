"""The Mamba-2 adapter against the library's models, their decoding and a step loop in fp64."""

import copy
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import OTHERS, SMALL
from conftest import small as small_class
from helpers import assert_close

from writesae.edit import edited_hidden, head_change, make_edit
from writesae.hosts.load import adapter
from writesae.hosts.mamba2 import Mamba2
from writesae.recurrence import Factors, Groups, decayed_chunks, step_states
from writesae.shift import direct_path, predict_shift

LIBRARY = 5e-6  # the library's scan and norms are in fp32, whatever the model's type
LAYER, HEAD = 1, 2
CLASSES = ["mamba2", *(name for name, fields in OTHERS.items() if fields["family"] == "mamba2")]


def small(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    model = adapter("mamba2").build(SMALL["mamba2"] | fields)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3)  # larger random weights make the upper layers clearly nonlinear
        elif (p == p[0]).all():
            p.data += 0.3 * torch.randn_like(p)  # norms, skips and biases are otherwise all 1 or all 0
    return Mamba2(model.to(dtype), None, "small")


@pytest.fixture(scope="module", params=CLASSES)
def host(request):
    return small_class(request.param)


@pytest.fixture(scope="module")
def run(host, tokens):
    return host.run(tokens)


def library_logits(host, tokens, **more):
    with torch.no_grad():
        return host.model(input_ids=tokens, use_cache=False, **more).logits


def cells(length=83, groups=2, heads=4, d_k=6, d_v=10, batch=2):
    """Random fp64 queries and keys [B, T, H_k, d_k], writes [B, T, H, d_v] and log decays [B, T, H]."""
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, batch, length, groups, d_k, generator=g, dtype=torch.float64)
    added = torch.randn(batch, length, heads, d_v, generator=g, dtype=torch.float64)
    return query, key, added, -0.3 * torch.rand(batch, length, heads, generator=g, dtype=torch.float64)


def stepped(query, key, added, log_decay, state=None):
    """Outputs [B, T, H, d_v] and states [B, T, H, d_k, d_v] from the step loop, one head at a time."""
    outputs, states = [], []
    for head in range(added.shape[2]):
        q, k = (x[:, :, head * key.shape[2] // added.shape[2]] for x in (query, key))
        factors = Factors(q, k, added[:, :, head], log_decay[:, :, head, None])
        states.append(step_states(factors, None if state is None else state[:, head]))
        outputs.append((states[-1].mT @ q[..., None])[..., 0])
    return torch.stack(outputs, 2), torch.stack(states, 2)


# The chunked recurrence.


@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
@pytest.mark.parametrize("carried", [False, True])
def test_chunks_are_the_step_loop(chunk, carried):
    parts, state = cells(), torch.randn(2, 4, 6, 10).double() if carried else None
    outputs, end = decayed_chunks(*parts, state=state, chunk=chunk)
    wanted, states = stepped(*parts, state)
    assert_close(outputs, wanted, "outputs", 1e-12)
    assert_close(end, states[:, -1], "last state", 1e-12)


@pytest.mark.parametrize("chunk", [16, 200])
def test_rows_read_states_that_they_share(chunk):
    parts = [torch.cat([x, x + 0.1 * i]) for i, x in enumerate(cells())]
    states, which = torch.randn(3, 4, 6, 10).double(), torch.tensor([2, 0, 2, 2])
    wanted, end = decayed_chunks(*parts, state=states[which])
    outputs, none = decayed_chunks(*parts, state=states, groups=Groups(which, 3), end=False, chunk=chunk)
    assert_close(outputs, wanted, "outputs", 1e-12)
    assert none is None
    assert_close(decayed_chunks(*parts, state=states, groups=Groups(which, 3), chunk=chunk)[1], end, "last", 1e-12)


def test_gradients_are_the_step_loops():
    parts = [x.requires_grad_() for x in (*cells(length=20), torch.randn(2, 4, 6, 10).double())]
    outputs, end = decayed_chunks(*parts[:4], state=parts[4], chunk=8)
    wanted, states = stepped(*parts)
    direction, of_end = torch.randn_like(wanted), torch.randn_like(end)
    ours = torch.autograd.grad((outputs * direction).sum() + (end * of_end).sum(), parts)
    theirs = torch.autograd.grad((wanted * direction).sum() + (states[:, -1] * of_end).sum(), parts)
    for name, mine, other in zip(("query", "key", "added", "log_decay", "state"), ours, theirs, strict=True):
        assert_close(mine, other, f"gradient of {name}", 1e-11)


def test_slow_decays_after_fast_ones_are_exact_in_fp32():
    """fp32 sums of logarithms would lose the slow decays after the fast ones: error 1e-4, tolerance 1e-6."""
    parts = cells(length=64)
    parts[3][:, :40] -= 100
    outputs, _ = decayed_chunks(*(x.float() for x in parts))
    assert_close(outputs, decayed_chunks(*(x.float().double() for x in parts))[0], "outputs", 1e-6)


# The adapter against the library.


def test_logits_are_the_librarys(host, run, tokens):
    assert_close(host.logits(run.final), library_logits(host, tokens).float(), "logits", LIBRARY)


@pytest.mark.parametrize(
    "fields",
    [
        dict(time_step_limit=(0.01, 0.05)),
        dict(use_bias=True, use_conv_bias=False),
        dict(n_groups=1, residual_in_fp32=False, tie_word_embeddings=False),
        dict(n_groups=4),
    ],
)
def test_logits_with_the_configs_other_settings(fields, tokens):
    host = small(**fields)
    ours = host.logits(host.run(tokens).final)
    assert_close(ours, library_logits(host, tokens), "logits", LIBRARY)
    assert (ours - small().logits(small().run(tokens).final)).norm() > 1e-2 * ours.norm()


EXPERTS = dict(n_routed_experts=4, moe_intermediate_size=24, moe_shared_expert_intermediate_size=32)
EXPERTS |= dict(moe_latent_size=16, routed_scaling_factor=1.5, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nemotron_h", dict(hybrid_override_pattern="MM*MEM", **EXPERTS)),
        ("nemotron_h", dict(time_step_min=0.02, use_bias=True, n_groups=1)),
        ("bamba", dict(time_step_limit=(0.01, 0.05), attention_bias=True, mlp_bias=True, num_key_value_heads=5)),
        ("bamba", dict(mamba_proj_bias=True, mamba_conv_bias=False, mamba_n_groups=4, attn_layer_indices=None)),
        ("granitemoehybrid", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)),
        ("granitemoehybrid", dict(position_embedding_type="rope", mamba_n_groups=1)),
        ("falcon_h1", dict(mamba_rms_norm=False, mamba_n_groups=1)),
        ("falcon_h1", dict(mamba_norm_before_gate=True, projectors_bias=True, mamba_proj_bias=True)),
        ("zamba2", dict(use_shared_attention_adapter=True, use_mem_rope=False, num_mem_blocks=1)),
        ("zamba2", dict(time_step_min=0.02, add_bias_linear=True, num_key_value_heads=1)),
    ],
)
def test_logits_of_a_class_with_its_other_settings(name, fields, tokens):
    """Whole windows, and edited runs without a change from two places (experts and some norms compute in fp32)."""
    host = small_class(name, **fields)
    host.model.set_experts_implementation("eager")  # the library's grouped products are not for fp64
    run = host.run(tokens)
    assert_close(host.logits(run.final), library_logits(host, tokens).float(), "logits", LIBRARY)
    plain = small_class(name)
    assert (host.logits(run.final) - plain.logits(plain.run(tokens).final)).norm() > 1e-2
    starts = torch.tensor([30, 50])
    same, _ = host.branch(run, 0, 1, torch.tensor([1, 2]), starts, torch.zeros(2, 5, host.d_v).double())
    native = torch.stack([run.final[1, 30:35], run.final[2, 50:55]])
    assert_close(same, native, "a run without a change", 1e-6)


def test_the_librarys_decoding_is_the_whole_run(host, run, tokens):
    """The library's model with its cache, fed token by token."""
    cache, logits = None, []
    name = "cache_params" if host.model.config.model_type == "mamba2" else "past_key_values"
    for t in range(24):
        more = {name: cache} if name == "cache_params" else {name: cache, "position_ids": torch.full((3, 1), t)}
        with torch.no_grad():
            output = host.model(input_ids=tokens[:, t : t + 1], use_cache=True, **more)
        cache = output[name]
        logits.append(output.logits[:, 0])
    assert_close(host.logits(run.final[:, :24]), torch.stack(logits, 1).float(), "logits", LIBRARY)


def test_nothing_is_erased(host, run):
    factors = host.factors(run, LAYER, HEAD)
    states = step_states(factors)
    change = states[:, 1:] - factors.log_decay.exp()[:, 1:, :, None] * states[:, :-1]
    assert_close(factors.key[:, 1:, :, None] * factors.write("effective")[:, 1:, None], change, "write", 1e-12)
    assert factors.erase is None and torch.equal(factors.added, factors.effective)


def test_factors_are_what_the_librarys_scan_takes(host, run, tokens):
    """The factors against the arguments of the library's own call. Heads 2 and 3 share the second group."""
    taken = {}

    def capture(x, dt, A, B, C, chunk_size, D, dt_bias, **_):
        taken.update(x=x, dt=F.softplus(dt + dt_bias), A=A, B=B, C=C, D=D)
        return torch.zeros_like(x)

    with_scan(host, capture, tokens, layer=0)
    factors, skip = host.factors(run, 0, HEAD), run.records[0].factors["skip"][:, :, HEAD]
    step, value = taken["dt"][:, :, HEAD, None], taken["x"][:, :, HEAD]
    wanted = dict(query=taken["C"][:, :, 1], key=taken["B"][:, :, 1], added=step * value)
    for name, tensor in wanted.items():
        assert_close(getattr(factors, name), tensor, name, LIBRARY)
    assert_close(factors.log_decay, step * taken["A"][HEAD], "log decay", LIBRARY)
    assert_close(skip, taken["D"][HEAD] * value, "skip", LIBRARY)


def test_library_state_is_ours_transposed(host, run, tokens):
    with torch.no_grad():
        output = host.model(input_ids=tokens, use_cache=True)
    cache = output.get("cache_params", output.get("past_key_values"))
    for layer in host.recurrent_layers:
        record = run.records[layer]
        assert_close(record.end.mT, cache.layers[layer].recurrent_states[0], f"cached state of layer {layer}", LIBRARY)


def test_a_sequence_in_two_pieces_is_the_whole(host, run, tokens):
    positions = host._positions(tokens)
    for cut in (1, 2, 41):
        hidden = [host.embed(tokens[:, :cut]), host.embed(tokens[:, cut:])]
        for layer in range(host.layers):
            first = host.mix(layer, hidden[0], None, positions[:, :cut])
            past = host.past_at(first, torch.arange(3), torch.full((3,), cut))
            second = host.mix(layer, hidden[1], past, positions[:, cut:])
            hidden = [host.finish(layer, first, None), host.finish(layer, second, past)]
            if layer in host.recurrent_layers:
                assert_close(second.end, run.records[layer].end, f"last state of layer {layer}, cut {cut}", 1e-10)
        assert_close(torch.cat(hidden, 1), run.final, f"final hidden states, cut {cut}", 1e-10)


def test_greedy_decoding_is_the_librarys(host, tokens):
    prompt, rows = tokens[:, :50], torch.arange(3)
    with torch.no_grad():
        mask = torch.ones_like(prompt)
        wanted = host.model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 50:]
    run = host.run(prompt)
    pasts = [host.past_at(record, rows, torch.full((3,), 50)) for record in run.records]
    assert torch.equal(host.decode(pasts, host.logits(run.final[:, -1]).argmax(-1), 50, 7), wanted)
    assert len(wanted.unique()) > 3


def test_output_projection_and_unembedding_are_the_librarys(host):
    value, token = torch.randn(5, host.d_v).double(), torch.tensor([5, 6])
    slots = torch.zeros(5, host.heads * host.d_v, dtype=torch.float64)
    slots[:, HEAD * host.d_v : (HEAD + 1) * host.d_v] = value
    factors = dict(falcon_h1=0.8 * 1.7, granitemoehybrid=0.7 / 0.4)  # of the mixer or the residual, and the logits
    logits = host.model.lm_head(host.mixer(LAYER).out_proj(slots)) * factors.get(host.model.config.model_type, 1)
    assert_close(direct_path(host, LAYER, HEAD, value.float(), token), logits[:, token].T, "direct path", 1e-5)


# Edits.


def with_scan(host, scan, tokens, layer=LAYER):
    """Logits of the library's own forward with `scan` as the scan of one layer."""
    mixer = host.mixer(layer)
    forward = inspect.unwrap(type(mixer).forward)
    names = {**forward.__globals__, "mamba2_chunk_scan": scan}
    mine = types.FunctionType(forward.__code__, names, "forward", forward.__defaults__, forward.__closure__)
    mixer.forward = types.MethodType(mine, mixer)
    try:
        return library_logits(host, tokens)
    finally:
        del mixer.forward


def scan_with_edit(position, delta, scope):
    """The library's scan as a step loop, with states [d_v, d_k] and delta [d_k, d_v] added at `position`."""

    def scan(x, dt, A, B, C, chunk_size, D, dt_bias, **_):
        each = x.shape[2] // B.shape[2]
        dt, B, C = F.softplus(dt + dt_bias), B.repeat_interleave(each, 2), C.repeat_interleave(each, 2)
        state, outputs = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]), []
        for t in range(x.shape[1]):
            write = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            state = (dt[:, t] * A).exp()[..., None, None] * state + write
            edited = state.clone()
            if t == position:
                edited[:, HEAD] += delta.T
            read = state if t == position and scope == "cache" else edited
            outputs.append((read @ C[:, t, :, :, None])[..., 0] + D[:, None] * x[:, t])
            state = edited
        return torch.stack(outputs, 1)

    return scan


@pytest.mark.parametrize("scope", ["write", "cache"])
@pytest.mark.parametrize("position", [0, 37, 88])
def test_an_edit_is_the_librarys_run_with_the_state_changed(host, run, tokens, scope, position):
    torch.manual_seed(position)
    left, right = torch.randn(1, 2, host.d_k).double(), torch.randn(1, 2, host.d_v).double()
    steps = min(12, tokens.shape[1] - position)
    edit = make_edit(torch.tensor([1]), torch.tensor([position]), left, right, scope)
    ours = host.logits(edited_hidden(host, run, LAYER, HEAD, edit, steps))[0]
    scan = scan_with_edit(position, left[0].T @ right[0], scope)
    theirs = with_scan(host, scan, tokens[1:2])[0, position : position + steps]
    native = host.logits(run.final[1, position : position + steps])
    assert_close(ours - native, theirs.float() - native, "change of the logits", 2e-5)
    assert (ours[1:] - native[1:]).norm() > 1e-3


def test_the_write_taken_out_leaves_the_decayed_state(host, run):
    factors, at, rows = host.factors(run, LAYER, HEAD), torch.tensor([50]), torch.tensor([2])
    edit = make_edit(rows, at, factors.key[rows, at][:, None], -factors.write("effective")[rows, at][:, None])
    change, _ = head_change(factors, edit, 1)
    states = step_states(factors.at(slice(2, 3)))[0]
    without = factors.log_decay[2, 50].exp() * states[49] - states[50]
    assert_close(change[0, 0], without.T @ factors.query[2, 50], "output change", 1e-10)


# The closed form.


@pytest.mark.parametrize("name", CLASSES)
def test_the_closed_form_explains_the_shifts_of_a_new_model(name, tokens):
    """Random writes of one native norm, with the classes' own initial weights and slow decays."""
    torch.manual_seed(0)
    fields = dict(OTHERS[name], model_type=name) if name in OTHERS else SMALL[name]
    fields = {field: x for field, x in fields.items() if field != "family"}
    host = Mamba2(Mamba2.build(fields | dict(initializer_range=0.1)).double(), None, "new")
    run, rows = host.run(tokens), torch.arange(30) % 3
    at, token = torch.randint(5, 80, (30,)), torch.randint(0, 300, (30,))
    factors = host.factors(run, LAYER, HEAD)
    size = factors.key[rows, at].norm(dim=-1) * factors.added[rows, at].norm(dim=-1)
    left, right = (F.normalize(torch.randn(30, 1, d).double(), dim=-1) for d in (host.d_k, host.d_v))
    edit = make_edit(rows, at, left, size[:, None, None] * right)
    predicted = predict_shift(host, tokens, edit, token, layer=LAYER, head=HEAD, steps=6).double()
    edited = host.unembed(edited_hidden(host, run, LAYER, HEAD, edit, 6)[:, -1])
    shift = (edited - host.unembed(run.final[rows, at + 5])).gather(-1, token[:, None])[:, 0]
    assert 1 - (predicted - shift).square().sum() / (shift - shift.mean()).square().sum() > 0.99


# Precision, training, and making a model.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_lower_precision_stays_close_to_fp64(host, tokens, dtype, tolerance):
    lower = Mamba2(copy.deepcopy(host.model).to(dtype), None, "lower")
    same_weights = Mamba2(copy.deepcopy(lower.model).double(), None, "the same weights in fp64")
    ours, wanted = lower.run(tokens), same_weights.run(tokens)
    for layer in host.recurrent_layers[:3]:  # the layers above amplify the rounding of those below
        mine, other = ours.records[layer], wanted.records[layer]
        assert mine.end.dtype == torch.float32
        assert_close(mine.end, other.end, f"state of layer {layer}", tolerance)
    assert_close(lower.logits(ours.final), library_logits(lower, tokens), "logits", tolerance)
    start = torch.tensor([30])
    branched, _ = lower.branch(ours, 0, 1, torch.tensor([0]), start, torch.zeros(1, 5, host.d_v))
    assert_close(branched, ours.final[:1, 30:35], "branch", tolerance)


def test_gradients_through_the_adapter_are_the_librarys(tokens):
    host = small(torch.float32)
    host.model.train().requires_grad_(True)
    parameters, names = zip(*[(p, name) for name, p in host.model.named_parameters()], strict=True)
    theirs = torch.autograd.grad(host.model(input_ids=tokens, labels=tokens, use_cache=False).loss, parameters)
    hidden, positions = host.embed(tokens), host._positions(tokens)
    for layer in range(host.layers):
        hidden = host.finish(layer, host.mix(layer, hidden, None, positions), None)
    loss = F.cross_entropy(host.logits(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    for name, mine, other in zip(names, torch.autograd.grad(loss, parameters), theirs, strict=True):
        assert_close(mine, other, f"gradient of {name}", 2e-4)


def test_a_new_model_has_slow_decays():
    torch.manual_seed(0)
    model = adapter("mamba2").build(SMALL["mamba2"] | dict(num_heads=40, head_dim=2, n_groups=2))
    for block in model.backbone.layers:
        step, rate = F.softplus(block.mixer.dt_bias), block.mixer.A_log.exp()
        assert (step > 9e-4).all() and (step < 0.11).all() and step.max() > 10 * step.min()
        assert (rate > 1).all() and (rate < 16).all() and rate.frac().min() > 1e-6


def test_the_steps_of_a_training_host_learn_slowly():
    """The gradient is divided by 20 in the rows of in_proj that set dt, and unchanged in all other rows."""
    gradients = []
    for prepare in (lambda model: None, Mamba2.before_training):
        torch.manual_seed(0)
        model = adapter("mamba2").build(SMALL["mamba2"])
        prepare(model)
        model(input_ids=torch.arange(40).view(1, 40), labels=torch.arange(40).view(1, 40)).loss.backward()
        gradients.append(torch.stack([block.mixer.in_proj.weight.grad for block in model.backbone.layers]))
    plain, slow = (g.split([g.shape[1] - 4, 4], 1) for g in gradients)
    assert_close(slow[0], plain[0], "gradient of the other rows", 1e-5)
    assert_close(20 * slow[1], plain[1], "gradient of the rows of dt", 1e-5)


def test_heads_without_a_norm_have_no_bound(tokens):
    host = small_class("falcon_h1", mamba_rms_norm=False)
    with pytest.raises(ValueError, match="has no norm behind its heads"):
        host.normed_heads(0, host.run(tokens).records[0])
