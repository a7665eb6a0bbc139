"""Each class of transformers with a delta rule: against the library's forward and decoding, and step loops.

The classes of test_hosts.py are not here. Routers of mixtures of experts, and norms inside attention modules
that are called as they are, compute in fp32 whatever the model's dtype; `ROUNDED` allows for that.
"""

import pytest
import torch
from conftest import SMALL, small
from helpers import EDIT_PLACES, assert_close, several_edits, stepped_logits
from supported_models import test_each_class_is_in_the_table as test_each_class_is_in_the_table

from writesae.edit import edited_hidden, generate_under, hidden_under, make_edit
from writesae.harvesting import harvest
from writesae.hosts.load import load_host
from writesae.recurrence import step_states
from writesae.shift import predict_shift

LIBRARY = 5e-6  # the library's recurrence is in fp32, whatever the model's type
ROUNDED = 2e-6
LAYER, HEAD = 1, 2

EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24)
NO_ROTATION = dict(rope_type="default", rope_theta=None)  # as the released OLMo-Hybrid
OLMO = dict(model_type="olmo_hybrid", head_dim=12, pad_token_id=0, eos_token_id=0, rope_parameters=NO_ROTATION)
ROTATION = dict(rope_type="default", rope_theta=1e4)
CLASSES = {  # fields beside those of SMALL
    "Qwen3_5MoeForCausalLM": EXPERTS | dict(model_type="qwen3_5_moe_text", tie_word_embeddings=False),
    "Qwen3NextForCausalLM": EXPERTS | dict(model_type="qwen3_next", mlp_only_layers=[3]),
    "OlmoHybridForCausalLM": OLMO,
    "OlmoHybridForCausalLM, rotary, beta below 1": OLMO | dict(rope_parameters=ROTATION, linear_allow_neg_eigval=False),
    "KimiLinearForCausalLM": dict(
        num_hidden_layers=6,
        layer_types=SMALL["gated_deltanet"]["layer_types"],
        mlp_layer_types=["dense"] + ["sparse"] * 5,
        num_local_experts=6,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        kv_lora_rank=16,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=14,
    ),
}


def make(name):
    host = small("kda" if name == "KimiLinearForCausalLM" else "gated_deltanet", **CLASSES[name])
    assert type(host.model).__name__ == name.split(",")[0]
    host.model.set_experts_implementation("eager")  # the usual one has no fp64
    return host


@pytest.fixture(scope="module", params=list(CLASSES))
def host(request):
    return make(request.param)


@pytest.fixture(scope="module")
def run(host, tokens):
    return host.run(tokens)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of fewer than 300 ids."""
    from transformers import PreTrainedTokenizerFast

    from replication.study import docstrings as corpus

    trained = corpus.train_tokenizer(["some words and more words"] * 3, 260)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=corpus.END_OF_TEXT)


def test_logits_are_the_librarys(host, run, tokens):
    with torch.no_grad():
        theirs = host.model(input_ids=tokens, use_cache=False).logits
    assert_close(host.logits(run.final), theirs.float(), "logits", LIBRARY)


def test_logits_are_those_of_the_librarys_decoding(host, run, tokens):
    """The library reads 40 tokens at once and then one at a time, with its own cache."""
    with torch.no_grad():
        out = host.model(input_ids=tokens[:, :40], use_cache=True)
        logits = [out.logits]
        for t in range(40, 60):
            out = host.model(input_ids=tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    assert_close(host.logits(run.final[:, :60]), torch.cat(logits, 1).float(), "logits", LIBRARY)
    for layer in host.recurrent_layers:
        state = out.past_key_values.layers[layer].recurrent_states[0]
        ours = host.state_at(run.records[layer], torch.arange(3), torch.full((3,), 60))
        assert_close(ours, state, f"state of layer {layer}", LIBRARY)


def test_outputs_and_last_state_are_the_step_loops(host, run):
    for layer, head in host.cells:
        factors, record = host.factors(run, layer, head), run.records[layer]
        states = step_states(factors)
        read = (states.mT @ factors.query[..., None])[..., 0]
        assert_close(record.outputs[:, :, head], read, f"output of {layer}.{head}", 1e-12)
        assert_close(record.end[:, head], states[:, -1], f"state of {layer}.{head}", 1e-12)


def test_attention_layers_keep_the_outputs_of_their_heads(host, run):
    others = set(range(host.layers)) - set(host.recurrent_layers)
    assert others and all(run.records[layer].outputs.shape[:3] == (3, 90, 4) for layer in others)


def test_effective_write_is_the_states_whole_change(host, run):
    factors = host.factors(run, LAYER, HEAD)
    states = step_states(factors)
    change = states[:, 1:] - factors.log_decay.exp()[:, 1:, :, None] * states[:, :-1]
    assert_close(factors.key[:, 1:, :, None] * factors.effective[:, 1:, None], change, "effective write", 1e-12)


@pytest.mark.parametrize("scope", ["write", "cache"])
@pytest.mark.parametrize("cells", [1, 4])
def test_edits_are_a_step_loop(host, tokens, run, scope, cells):
    edits = dict(list(several_edits(host, EDIT_PLACES, scope).items())[:cells])
    starts = torch.stack([edit.starts for edit in edits.values()]).min(0).values.tolist()
    ours = host.unembed(hidden_under(host, run, edits, 8)[0])
    for row, start in enumerate(starts):
        wanted = stepped_logits(host, tokens, edits, row, start, 8)
        native = host.unembed(run.final[row, start : start + 8])
        assert_close(ours[row] - native, wanted - native, f"change of the logits of row {row}", ROUNDED)
        assert (wanted - native).norm() > 0.1


def test_decoding_from_an_edit_of_nothing_is_the_librarys(host, tokens):
    prompt = tokens[:, :50]
    nothing = [torch.zeros(3, 1, d, dtype=torch.float64) for d in (host.d_k, host.d_v)]
    edit = make_edit(torch.arange(3), torch.full((3,), 45), *nothing)
    made, _ = generate_under(host, host.run(prompt), {(LAYER, HEAD): edit}, 8)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    theirs = host.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(made, theirs[:, 50:])


def writes(host, run, size, count=24):
    """Random rank-1 writes at one place per row, of `size` native write norms, and 8 tokens from there on."""
    generator = torch.Generator().manual_seed(6)
    rows, t0 = torch.arange(3).repeat_interleave(count), torch.tensor([20, 50, 70]).repeat_interleave(count)
    key, value = (torch.randn(3 * count, 1, d, generator=generator).double() for d in (host.d_k, host.d_v))
    native = host.factors(run, LAYER, HEAD).at(rows, t0).added.norm(dim=-1)[:, None, None]
    unit = torch.nn.functional.normalize
    return make_edit(rows, t0, unit(key, dim=-1), size * native * unit(value, dim=-1))


def shifts(host, tokens, run, size, by="through_layer"):
    """The predicted and the measured changes of the logit of token 100, five tokens after each write."""
    edit = writes(host, run, size)
    predicted = predict_shift(host, tokens, edit, 100, layer=LAYER, head=HEAD, steps=6, by=by)
    final = edited_hidden(host, run, LAYER, HEAD, edit, 6)[:, -1]
    native = run.final[edit.rows, edit.starts + 5]
    return predicted.double(), (host.unembed(final) - host.unembed(native))[:, 100]


@pytest.mark.parametrize("by", ["through_layer", "exact"])
def test_the_closed_form_is_the_measured_shift_to_first_order(host, tokens, run, monkeypatch, by):
    """At a thousandth of the native write."""
    monkeypatch.setattr(host, "logits", host.unembed)  # in fp64
    predicted, measured = shifts(host, tokens, run, 1e-3, by)
    assert_close(predicted, measured, by, 5e-3)


def test_the_closed_form_through_the_layer_holds_for_larger_writes(host, tokens, monkeypatch):
    """At a tenth of the native write, with all experts at work.

    A write that changes the choice of experts above moves the logits by a jump, which no closed form has.
    """
    for module in host.model.modules():
        if hasattr(module, "top_k"):
            monkeypatch.setattr(module, "top_k", module.num_experts)
    monkeypatch.setattr(host, "logits", host.unembed)
    predicted, measured = shifts(host, tokens, host.run(tokens), 0.1)
    assert 1 - (predicted - measured).var() / measured.var() > 0.99


def test_load_host_reads_what_was_saved(host, tokens, tmp_path, words):
    """The library saves in the checkpoints' own format: single experts, one convolution each for q, k and v."""
    host.model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = load_host(tmp_path, "cpu")
    assert type(loaded) is type(host) and loaded.cells == host.cells and loaded.model is not host.model
    assert (loaded.d_k, loaded.d_v, loaded.heads) == (host.d_k, host.d_v, host.heads)
    run = loaded.run(tokens)
    with torch.no_grad():
        theirs = loaded.model(input_ids=tokens, use_cache=False).logits
        of_saved = host.model(input_ids=tokens, use_cache=False).logits
    assert_close(loaded.logits(run.final), theirs, "logits in fp32", 2e-5)
    assert_close(loaded.logits(run.final), of_saved, "logits of what was saved", 5e-5)
    edit = make_edit(torch.tensor([1]), torch.tensor([30]), torch.ones(1, 1, loaded.d_k), torch.ones(1, 1, loaded.d_v))
    assert predict_shift(loaded, tokens, edit, 7, layer=LAYER, head=HEAD, steps=4).isfinite().all()


def test_the_text_model_of_a_multimodal_mixture_of_experts_is_found(tokens, tmp_path, words):
    """As Qwen3.5 and 3.6 are published: with a vision tower, and an output matrix that only the top level ties."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48, patch_size=4)
    text = SMALL["gated_deltanet"] | EXPERTS | dict(tie_word_embeddings=False)
    torch.manual_seed(0)
    model = Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    host = load_host(tmp_path, "cpu")
    assert type(host.model).__name__ == "Qwen3_5MoeForCausalLM" and (host.d_k, host.d_v) == (12, 20)
    with torch.no_grad():
        theirs = model(input_ids=tokens, use_cache=False).logits
    assert_close(host.logits(host.run(tokens).final), theirs, "logits", 2e-5)


def test_a_harvest_of_kda_has_both_writes_and_its_states(tokens):
    host = small("kda")
    factors = harvest(host, tokens, layer=LAYER, head=HEAD, progress=False)
    native = host.factors(host.run(tokens), LAYER, HEAD)
    for name in ("added", "effective"):
        wanted = (native.key[..., None] * native.write(name)[..., None, :]).float()
        assert_close(factors.history("write", name).steps(), wanted, name, 1e-6)
    assert_close(factors.history("state").steps(), step_states(native), "states", 1e-6)
