"""RWKV-7: the chunked recurrence, the plain model and its adapter against the equations in fp64."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, small
from helpers import assert_close, assert_gradients_close, stepped

from writesae.edit import edited_hidden, make_edit
from writesae.hosts.load import adapter, load_host
from writesae.hosts.past import Past, extend
from writesae.hosts.rwkv7 import RWKV7
from writesae.hosts.rwkv7_model import CHUNK, RWKV7Config, check, from_pth, release_name
from writesae.recurrence import Groups, diagonal_delta_chunks, step_states
from writesae.shift import direct_path

LAYER, HEAD = 1, 2
EDGES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 83]


@pytest.fixture(scope="module")
def host():
    return small("rwkv7")


@pytest.fixture(scope="module")
def run(host, tokens):
    return host.run(tokens)


def stepped_model(model, tokens, edit=lambda layer, t, state: (state, state)):
    """Logits [B, T, vocabulary] and each layer's last state from the equations, one token at a time.
    `edit` takes a layer, t and the state [B, H, d_k, d_v] at t. It returns the state that the queries read
    and the state that is carried to t + 1."""
    w, c = dict(model.named_parameters()), model.config
    heads, eps, last, states, logits = c.num_heads, c.norm_eps, {}, {}, []

    def standard(x, epsilon):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()

    def norm(x, name):
        return standard(x, eps) * w[name + ".weight"] + w[name + ".bias"]

    def blend(x, at, name):
        return x + (last.get(at, torch.zeros_like(x)) - x) * w[name].flatten()

    for t in range(tokens.shape[1]):
        x = norm(w["model.embeddings.weight"][tokens[:, t]], "model.layers.0.pre_norm")
        for layer in range(c.num_hidden_layers):
            block = f"model.layers.{layer}."
            a, y = block + "attn.", norm(x, block + "attn_norm")
            mixed = {i: blend(y, (layer, "attn"), f"{a}x_{i}") for i in "rwkvag"}
            last[layer, "attn"] = y

            def low_rank(i, f, a=a, mixed=mixed):
                bias = w.get(f"{a}{i}_lora.lora.2.bias", 0)
                return f(mixed[i] @ w[f"{a}{i}_lora.lora.0.weight"].T) @ w[f"{a}{i}_lora.lora.2.weight"].T + bias

            r, k, v = (mixed[i] @ w[f"{a}{i}_proj.weight"].T for i in "rkv")
            decay = torch.exp(-0.6065306597126334 * low_rank("w", torch.tanh).sigmoid())
            rate, gate = low_rank("a", lambda z: z).sigmoid(), low_rank("g", torch.sigmoid)
            v_first = v if layer == 0 else v_first  # noqa: F821
            v = v if layer == 0 else v + (v_first - v) * low_rank("v", lambda z: z).sigmoid()
            kk, k = k * w[a + "k_k"], k + k * (rate - 1) * w[a + "k_a"]
            r, decay, rate, kk, k, v = (z.unflatten(-1, (heads, -1)) for z in (r, decay, rate, kk, k, v))
            kk = kk / kk.square().sum(-1, keepdim=True).sqrt()
            old = states.get(layer, k.new_zeros(*k.shape, v.shape[-1]))
            erased = torch.einsum("bhk,bhj,bhjv->bhkv", rate * kk, kk, old)
            new = decay[..., None] * old - erased + k[..., None] * v[..., None, :]
            read, states[layer] = edit(layer, t, new)
            out = standard(torch.einsum("bhkv,bhk->bhv", read, r), 12 * eps)
            out = out.flatten(-2) * w[a + "g_norm.weight"] + w[a + "g_norm.bias"]
            out = out + ((r * k * w[a + "r_k"]).sum(-1, keepdim=True) * v).flatten(-2)
            x = x + (out * gate) @ w[a + "o_proj.weight"].T
            y = norm(x, block + "ffn_norm")
            inner = blend(y, (layer, "ffn"), block + "ffn.x_k") @ w[block + "ffn.key.weight"].T
            last[layer, "ffn"] = y
            x = x + inner.clamp(min=0).square() @ w[block + "ffn.value.weight"].T
        logits.append(norm(x, "model.norm") @ model.lm_head.weight.T)
    return torch.stack(logits, 1), [states[layer] for layer in range(c.num_hidden_layers)]


def cells(length=83, d_k=6, d_v=10, lead=(2, 3)):
    """Random fp64 factors shaped as RWKV-7's, each [*lead, T, d]."""
    g = torch.Generator().manual_seed(0)
    query, key, probe = torch.randn(3, *lead, length, d_k, generator=g, dtype=torch.float64)
    rate, decay = torch.rand(2, *lead, length, d_k, generator=g, dtype=torch.float64)
    added, probe = torch.randn(*lead, length, d_v, generator=g, dtype=torch.float64), F.normalize(probe, dim=-1)
    return dict(query=query, key=key, added=added, log_decay=-0.6 * decay, erase=rate * probe, probe=probe)


# The chunked recurrence.


@pytest.mark.parametrize("chunk", [1, 7, 32, 83, 200])
@pytest.mark.parametrize("carried", [False, True])
def test_chunks_are_the_step_loop(chunk, carried):
    parts, state = cells(), torch.randn(2, 3, 6, 10).double() if carried else None
    outputs, end, before = diagonal_delta_chunks(**parts, state=state, chunk=chunk)
    wanted, states = stepped(parts, state)
    assert_close(outputs, wanted, "outputs", 1e-12)
    assert_close(end, states[:, :, -1], "last state", 1e-12)
    first = torch.zeros_like(states[:, :, 0]) if state is None else state
    edges = torch.cat([first[:, :, None], states[:, :, chunk - 1 : -1 : chunk]], 2)
    assert_close(before, edges, "states before the chunks", 1e-12)


def test_gradients_are_the_step_loops():
    assert_gradients_close(
        lambda parts, state: diagonal_delta_chunks(**parts, state=state, chunk=8)[:2], cells(length=20), 1e-11
    )


@pytest.mark.parametrize("chunk", [32, 64])
def test_the_fastest_decays_are_exact_in_fp32(chunk):
    """Half of the channels decay by exp(-0.6065) per token: 1/W reaches 1e16 in a chunk of 64."""
    parts = cells(length=130)
    parts["log_decay"] = torch.full_like(parts["log_decay"], -0.6065)
    parts["log_decay"][..., ::2] = 0
    made = []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: x.float().to(dtype).requires_grad_() for name, x in parts.items()}
        outputs, _, _ = diagonal_delta_chunks(**leaves, chunk=chunk if dtype == torch.float32 else 1)
        made.append([outputs, *torch.autograd.grad(outputs.square().sum(), list(leaves.values()))])
    for name, mine, other in zip(["outputs", *parts], *made, strict=True):
        assert_close(mine, other, name, 2e-6)


def test_decays_too_fast_for_a_chunk_are_refused():
    parts = cells(length=64) | dict(log_decay=torch.full((2, 3, 64, 6), -1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="choose smaller chunks"):
        diagonal_delta_chunks(**parts, chunk=64)
    assert_close(diagonal_delta_chunks(**parts, chunk=32)[0], stepped(parts)[0], "outputs", 1e-12)


@pytest.mark.parametrize("chunk", [16, 200])
def test_rows_read_states_that_they_share(chunk):
    parts = {name: torch.cat([x, x + 0.1]) for name, x in cells(length=40).items()}
    states, which = torch.randn(3, 3, 6, 10).double(), torch.tensor([2, 0, 2, 2])
    wanted, end, _ = diagonal_delta_chunks(**parts, state=states[which])
    shared = dict(state=states, groups=Groups(which, 3), chunk=chunk)
    outputs, none, _ = diagonal_delta_chunks(**parts, **shared, end=False)
    assert_close(outputs, wanted, "outputs", 1e-12)
    assert none is None


def test_chunks_are_the_dplr_operator_of_flash_linear_attention():
    library = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive", exc_type=ImportError)
    parts, state = {name: x.float() for name, x in cells().items()}, torch.randn(2, 3, 6, 10)
    wanted, last = library.dplr_recurrence(  # it scales its queries and computes in fp32
        parts["query"] * 6**0.5,
        parts["key"],
        parts["added"],
        -parts["probe"],
        parts["erase"],
        parts["log_decay"],
        initial_state=state,
    )
    outputs, end, _ = diagonal_delta_chunks(**parts, state=state)
    assert_close(outputs, wanted, "outputs", 1e-5)
    assert_close(end, last, "last state", 1e-5)


# The model.


@pytest.mark.parametrize("fields", [{}, dict(tie_word_embeddings=False, value_dim=None)])
def test_the_model_is_the_equations(fields, tokens):
    host = small("rwkv7", **fields)
    with torch.no_grad():
        wanted, states = stepped_model(host.model, tokens)
        made = host.model(input_ids=tokens, labels=tokens)
    assert_close(made.logits, wanted, "logits", 1e-10)
    loss = -wanted.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    assert_close(made.loss, loss, "loss", 1e-10)
    for layer, record in enumerate(host.run(tokens).records):
        assert_close(record.end, states[layer], f"last state of layer {layer}", 1e-10)
    assert len(wanted[0].argmax(-1).unique()) > 5


def test_a_new_model_is_the_identity_with_slow_decays(tokens):
    host = RWKV7(adapter("rwkv7").build(SMALL["rwkv7"] | dict(hidden_size=96, value_dim=96)), None, "new")
    run = host.run(tokens)
    assert torch.equal(run.final, host.embed(tokens))
    for layer in range(host.layers):
        log_decay = torch.stack([host.factors(run, layer, head).log_decay for head in range(host.heads)])
        assert -0.111 < log_decay.min() < -0.1 and -0.001 < log_decay.max() < 0
    assert torch.unique(host.model.model.layers[2].attn.w_lora.lora[2].bias).numel() == 96


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(attn=dict(layers=[1])), "no attention layers"),
        (dict(hidden_act="gelu"), "the activation sqrelu"),
        (dict(value_dim=[80, 80, 80, 80, 160]), "one value_dim"),
        (dict(head_dim=13), "Heads of 13 do not divide"),
    ],
)
def test_other_architectures_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        check(RWKV7Config(**SMALL["rwkv7"] | fields))


def test_a_cache_is_refused(host, tokens):
    with pytest.raises(ValueError, match="has no cache"):
        host.model(input_ids=tokens, use_cache=True)


# The adapter.


@pytest.mark.parametrize("length", [90, 64, 5])
def test_states_before_any_position(host, tokens, length):
    run = host.run(tokens[:, :length])
    starts = torch.tensor([s for s in (*EDGES, 64, 90) if s <= length])
    rows = torch.arange(len(starts)) % 3
    states = host.past_at(run.records[LAYER], rows, starts).state[:, HEAD]
    native = step_states(host.factors(run, LAYER, HEAD))
    for i, start in enumerate(starts):
        wanted = native[rows[i], start - 1] if start else torch.zeros_like(native[0, 0])
        assert_close(states[i], wanted, f"state before {start}", 1e-12)


def test_the_effective_write_has_rank_two_and_the_added_one(host, run):
    factors = host.factors(run, LAYER, HEAD)
    assert factors.effective is None
    states = step_states(factors)
    change = states[:, 1:] - factors.log_decay.exp()[:, 1:, :, None] * states[:, :-1]
    sizes = torch.linalg.svdvals(change)[:, 5:]
    assert (sizes[..., 2] < 1e-12 * sizes[..., 0]).all() and (sizes[..., 1] > 1e-4 * sizes[..., 0]).all()
    # of the undecayed state
    erased = factors.erase[:, 1:, :, None] * (factors.probe[:, 1:, None] @ states[:, :-1])
    assert_close(change + erased, factors.key[:, 1:, :, None] * factors.added[:, 1:, None], "added write", 1e-12)


def test_a_sequence_in_two_pieces_is_the_whole(host, run, tokens):
    positions = host._positions(tokens)
    for cut in (1, CHUNK, 41):
        hidden = [host.embed(tokens[:, :cut]), host.embed(tokens[:, cut:])]
        for layer in range(host.layers):
            first = host.mix(layer, hidden[0], None, positions[:, :cut])
            after = host.finish(layer, first, None)
            past = extend(Past(windows={name: x[:, :0] for name, (x, _) in first.windows.items()}), first)
            second = host.mix(layer, hidden[1], past, positions[:, cut:])
            hidden = [after, host.finish(layer, second, past)]
            assert_close(second.end, run.records[layer].end, f"last state of layer {layer}, cut {cut}", 1e-10)
        assert_close(torch.cat(hidden, 1), run.final, f"final hidden states, cut {cut}", 1e-10)


@pytest.mark.parametrize("layer", [0, 3, 4])
@pytest.mark.parametrize("start", EDGES)
def test_branch_without_a_change_is_the_native_run(host, run, start, layer):
    rows, steps = torch.tensor([0, 1, 2, 1]), 7
    starts = torch.tensor([start, max(start - 1, 0), start, 0])
    final, _ = host.branch(run, layer, 1, rows, starts, torch.zeros(4, steps, host.d_v, dtype=torch.float64))
    native = torch.stack([run.final[r, s : s + steps] for r, s in zip(rows, starts, strict=True)])
    assert_close(final, native, "final hidden states", 1e-10)


def test_output_projection_and_unembedding_are_the_models(host):
    value, token = torch.randn(5, host.d_v).double(), torch.tensor([5, 6])
    slots = torch.zeros(5, host.heads * host.d_v, dtype=torch.float64)
    slots[:, HEAD * host.d_v : (HEAD + 1) * host.d_v] = value
    logits = host.model.lm_head(host.blocks[LAYER].attn.o_proj(slots))
    assert_close(direct_path(host, LAYER, HEAD, value.float(), token), logits[:, token].T, "direct path", 1e-5)


# Edits.


@pytest.mark.parametrize("scope", ["write", "cache"])
@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize("position", [0, 37, 88])
def test_an_edit_is_the_step_loop_with_the_state_changed(host, run, tokens, scope, layer, position):
    torch.manual_seed(position)
    left, right = torch.randn(1, 2, host.d_k).double(), torch.randn(1, 2, host.d_v).double()
    steps = min(6, tokens.shape[1] - position)

    def change(at, t, state):
        edited = state.clone()
        if (at, t) == (layer, position):
            edited[:, HEAD] += left[0].T @ right[0]
        return (state if scope == "cache" else edited), edited

    edit = make_edit(torch.tensor([1]), torch.tensor([position]), left, right, scope)
    ours = host.logits(edited_hidden(host, run, layer, HEAD, edit, steps))[0]
    theirs = stepped_model(host.model, tokens[1:2, : position + steps], change)[0][0, position:]
    native = host.logits(run.final[1, position : position + steps])
    assert_close(ours - native, theirs.float() - native, "change of the logits", 2e-5)
    assert (ours[1:] - native[1:]).norm() > 1e-3


# The closed form.


# Precision and files.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_lower_precision_stays_close_to_fp64(host, tokens, dtype, tolerance):
    lower = RWKV7(copy.deepcopy(host.model).to(dtype), None, "lower")
    same_weights = RWKV7(copy.deepcopy(lower.model).double(), None, "the same weights in fp64")
    ours, wanted = lower.run(tokens), same_weights.run(tokens)
    for layer, (mine, other) in enumerate(zip(ours.records, wanted.records, strict=True)):
        assert mine.end.dtype == torch.float32
        assert_close(mine.end, other.end, f"state of layer {layer}", tolerance)
    assert_close(lower.logits(ours.final), same_weights.logits(wanted.final), "logits", tolerance)
    branched, _ = lower.branch(ours, 0, 1, torch.tensor([0]), torch.tensor([30]), torch.zeros(1, 5, host.d_v))
    assert_close(branched, ours.final[:1, 30:35], "branch", tolerance)


def as_release(model):
    """A model's weights with the names and shapes of the authors' .pth files."""
    found = {}
    for name, tensor in model.state_dict().items():
        low_rank = ".lora." in name and tensor.ndim == 2
        vector = tensor.ndim == 1 and (".lora." in name or name.rsplit(".", 1)[1] in ("k_k", "k_a", "x_k"))
        found[release_name(name)] = (tensor.T if low_rank else tensor[None, None] if vector else tensor).clone()
    return found | {f"blocks.0.att.v{i}": torch.ones(1) for i in range(3)}  # present in the files, never used


@pytest.fixture
def release(tmp_path):
    model = small("rwkv7", tie_word_embeddings=False, value_dim=None).model.float()
    return model, as_release(model), tmp_path / "model.pth"


def test_a_release_of_the_authors_is_read(release, tokens):
    model, tensors, path = release
    assert {"emb.weight", "blocks.0.ln0.weight", "ln_out.bias", "head.weight"} < set(tensors)
    names = (
        "r_k k_k k_a x_r x_w x_k x_v x_a x_g w0 w1 w2 a0 a1 a2 v0 v1 v2 g1 g2 receptance.weight key.weight value.weight"
    )
    wanted = {f"blocks.1.att.{n}" for n in (*names.split(), "output.weight", "ln_x.weight", "ln_x.bias")}
    wanted |= {f"blocks.1.{n}.{kind}" for n in ("ln1", "ln2") for kind in ("weight", "bias")}
    wanted |= {"blocks.1.ffn.x_k", "blocks.1.ffn.key.weight", "blocks.1.ffn.value.weight"}
    assert {name for name in tensors if name.startswith("blocks.1.")} == wanted
    assert tensors["blocks.1.att.w1"].shape == (48, 8) and tensors["blocks.1.att.k_k"].shape == (1, 1, 48)
    torch.save(tensors, path)
    with torch.no_grad():
        assert_close(from_pth(path)(input_ids=tokens).logits, model(input_ids=tokens).logits, "logits", 1e-6)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda t: t.pop("blocks.3.att.k_a"), r"lacks the tensor blocks\.3\.att\.k_a"),
        (lambda t: t.pop("emb.weight"), r"lacks the tensor emb\.weight"),
        (lambda t: t.update({"blocks.1.att.time_faaaa": torch.ones(1)}), r"nothing takes its tensor .*time_faaaa"),
        (lambda t: t.update({"blocks.1.att.k_a": torch.ones(7)}), r"its blocks\.1\.att\.k_a has shape \[7\]"),
    ],
)
def test_other_releases_are_refused(release, broken, says):
    _, tensors, path = release
    broken(tensors)
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=says):
        from_pth(path)


OFFICIAL = (
    dict(  # fields of the config.json of the authors' folders, as the class of transformers' pull request has them
        architectures=["Rwkv7ForCausalLM"],
        model_type="rwkv7",
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=5,
        head_dim=12,
        num_heads=4,
        intermediate_size=64,
        norm_eps=1e-5,
        norm_bias=True,
        tie_word_embeddings=False,
        wkv_state_dtype="float32",
        bos_token_id=0,
        eos_token_id=0,
    )
)
RANKS = dict(decay_low_rank_dim=8, a_low_rank_dim=8, v_low_rank_dim=6, gate_low_rank_dim=10)


@pytest.fixture
def official(release):
    """A folder as the authors publish it: the names of .pth files after "rwkv7.", in two files, with a tokenizer."""
    from safetensors.torch import save_file

    model, tensors, path = release
    tensors |= {"blocks.0.att.v0": torch.zeros(1, 1, 48), "blocks.0.att.v1": torch.zeros(48, 6)}
    tensors |= {"blocks.0.att.v2": torch.zeros(6, 48)}
    names = {name if name == "head.weight" else f"rwkv7.{name}": x.contiguous() for name, x in tensors.items()}
    for number in range(2):
        part = dict(list(names.items())[number::2])
        save_file(part, path.parent / f"model-{number + 1:05}-of-00002.safetensors", metadata=dict(format="pt"))
    save_tokenizer(path.parent)
    return model, path.parent


@pytest.mark.parametrize("ranks", [RANKS, dict.fromkeys(RANKS), {}])
def test_the_authors_newer_layout_is_read(official, tokens, ranks):
    """With ranks in the config, null ranks, and none; against the model that the folder was made from."""
    model, folder = official
    (folder / "config.json").write_text(json.dumps(OFFICIAL | ranks))
    loaded = load_host(folder)
    assert {field: getattr(loaded.model.config, field) for field in RANKS} == RANKS
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
    assert_close(loaded.logits(loaded.run(tokens).final), wanted, "logits", 1e-6)
    half = load_host(folder, dtype=torch.bfloat16)
    assert half.model.lm_head.weight.dtype == half.model.model.layers[1].attn.k_k.dtype == torch.bfloat16


def test_the_newer_layout_that_its_config_does_not_describe_is_refused(official):
    _, folder = official
    for fields, says in (
        (dict(num_hidden_layers=6), r"lacks the tensor blocks\.5\."),
        (dict(head_dim=6), "r_k has shape"),
    ):
        (folder / "config.json").write_text(json.dumps(OFFICIAL | dict(num_heads=None) | fields))
        with pytest.raises(ValueError, match=says):
            load_host(folder)


def save_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    from replication.study import docstrings as corpus

    trained = corpus.train_tokenizer(["some words and more words"] * 3, 280)
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=corpus.END_OF_TEXT).save_pretrained(folder)


@pytest.mark.parametrize("given", ["all", "null"])
def test_load_host_reads_what_was_saved(tokens, tmp_path, given):
    # flash-linear-attention's class, which a GPU machine may load, requires d_k = d_v
    host = small("rwkv7", value_dim=None)
    host.model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    if given == "null":  # ranks that flash-linear-attention leaves to its own rule
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | dict.fromkeys(RANKS)))
    loaded = load_host(tmp_path)
    assert (type(loaded), loaded.d_k, loaded.d_v, loaded.heads, loaded.layers) == (RWKV7, 12, 12, 4, 5)
    made, wanted = loaded.logits(loaded.run(tokens).final), host.logits(host.run(tokens).final)
    assert_close(made.cpu(), wanted, "loaded logits", 2e-5)


def test_load_host_names_the_weights_that_an_older_checkpoint_lacks(tmp_path):
    """Early flash-linear-attention checkpoints store the six token-shift vectors in one tensor, x_x."""
    from safetensors.torch import load_file, save_file

    small("rwkv7", value_dim=None).model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [
        n for n in weights if n.rsplit(".", 1)[1] in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g") and "attn" in n
    ]:
        weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(ValueError, match=r"lacks 30 weights, first model\.layers\.0\.attn\.x_a"):
        load_host(tmp_path)


def test_load_host_says_what_to_do_with_one_file(tmp_path):
    (tmp_path / "RWKV-x070.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"from_pth.*put its tokenizer into the same folder"):
        load_host(tmp_path / "RWKV-x070.pth")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2", architectures=["GPT2LMHeadModel"])))
    with pytest.raises(ValueError, match="no host family has that class"):
        load_host(tmp_path)
