"""Factors read by other tools: against our adapters by the names of the hooks, and with the packages themselves.

The recipe of docs/bridges.md for nnsight is the last test."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import small
from helpers import assert_close

from replication.study.paths import ROOT
from writesae.edit import head_change, make_edit, run_edited
from writesae.hosts.load import load_host
from writesae.hosts.transformer_lens import factors_from_cache
from writesae.recurrence import Factors

REASON = "transformer-lens is not installed (pip install 'writesae[bridges]')"


def assert_same_factors(found: Factors, wanted: Factors, tolerance: float) -> None:
    for field in fields(Factors):
        mine, other = getattr(found, field.name), getattr(wanted, field.name)
        assert (mine is None) == (other is None), field.name
        if other is not None and field.name != "origin":
            assert_close(mine, other, field.name, tolerance)


def test_queries_and_keys_of_a_delta_net_are_normalised_and_shared(gated_deltanet, tokens):
    """A cache with q and k of arbitrary lengths; two heads share a key."""
    run, g = gated_deltanet.run(tokens), torch.Generator().manual_seed(1)
    recorded = run.records[1].factors
    cache = {f"blocks.1.linear_attn.hook_{name}": recorded[name] for name in ("beta", "log_decay")}
    cache["blocks.1.linear_attn.hook_v"] = recorded["added"] / recorded["beta"][..., None]
    for letter, name in (("q", "query"), ("k", "key")):
        size = 50 + torch.rand(*recorded[name].shape[:-1], 1, generator=g, dtype=torch.float64)  # far above the eps
        cache[f"blocks.1.linear_attn.hook_{letter}"] = recorded[name] * size
    for head in range(4):
        assert_same_factors(factors_from_cache(None, cache, 1, head), gated_deltanet.factors(run, 1, head), 1e-3)
    with pytest.raises(ValueError, match="no head 4: choose one of 0 to 3"):
        factors_from_cache(None, cache, 1, 4)
    with pytest.raises(ValueError, match=r"needs blocks.2.linear_attn.hook_q, .*use_cache=False\) records them, "):
        factors_from_cache(None, cache, 2, 0)


def test_a_mamba2_cache_has_the_outputs_of_two_modules(tokens):
    """The library's own modules compute them; two heads share a key group in this host."""
    host, cache = small("mamba2"), {}
    mixer = host.blocks[2].mixer
    keep = mixer.in_proj.register_forward_hook(lambda _, inputs, output: cache.update(projected=output))
    host.model(tokens)
    keep.remove()
    gate, convolved = mixer.intermediate_size, mixer.intermediate_size + mixer.conv_dim
    mixed = mixer.conv1d(cache["projected"][..., gate:convolved].mT)
    cache = {"blocks.2.mixer.in_proj.hook_out": cache["projected"], "blocks.2.mixer.conv1d.hook_out": mixed}
    bridge = SimpleNamespace(blocks={2: SimpleNamespace(mixer=mixer)})
    for head in range(4):
        found = factors_from_cache(bridge, cache, 2, head)
        assert_same_factors(found, host.factors(host.run(tokens), 2, head), 1e-6)


@pytest.mark.parametrize(("family", "layer", "head"), [("gated_deltanet", 4, 3), ("mamba2", 3, 5)])
def test_the_embedded_hosts_in_transformer_lens(family, layer, head):
    """Its logits are ours, and so are the factors of its cache."""
    pytest.importorskip("transformer_lens", reason=REASON, exc_type=ImportError)
    bridges = pytest.importorskip("transformer_lens.model_bridge", reason=REASON, exc_type=ImportError)
    folder = ROOT / "models" / family
    host = load_host(folder, "cpu")
    tokens = torch.randint(0, host.vocabulary, (2, 40), generator=torch.Generator().manual_seed(2))
    run = host.run(tokens)
    options = dict(hf_model=host.model, tokenizer=host.tokenizer, device="cpu")
    bridge = bridges.TransformerBridge.boot_transformers(str(folder), **options)
    if family == "mamba2":
        bridge.blocks[layer].mixer.eager_scan = True
    logits, cache = bridge.run_with_cache(tokens, use_cache=False)
    assert_close(logits, host.logits(run.final), "logits", 1e-4)
    assert_same_factors(factors_from_cache(bridge, cache, layer, head), host.factors(run, layer, head), 1e-4)


def test_factors_and_an_edit_in_a_trace():
    reason = "nnsight is not installed (pip install 'writesae[bridges]')"
    nnsight = pytest.importorskip("nnsight", reason=reason, exc_type=ImportError)
    host = load_host(ROOT / "models/gated_deltanet", "cpu")
    tokens = torch.randint(0, host.vocabulary, (2, 30), generator=torch.Generator().manual_seed(2))
    model = nnsight.NNsight(host.model)
    rule = model.model.layers[4].linear_attn.source.torch_chunk_gated_delta_rule_0
    with model.trace(tokens):
        inputs = rule.inputs.save()
    sides, gates = inputs
    hooks = dict(zip("qkv", sides)) | dict(beta=gates["beta"], log_decay=gates["g"])
    cache = {f"blocks.4.linear_attn.hook_{name}": x for name, x in hooks.items()}
    factors = factors_from_cache(None, cache, 4, 3)
    assert_same_factors(factors, host.factors(host.run(tokens), 4, 3), 1e-4)
    g = torch.Generator().manual_seed(3)
    rows, start, steps = torch.tensor([0, 1]), torch.tensor([12, 12]), 18
    edit = make_edit(rows, start, *(torch.randn(2, 1, d, generator=g) for d in (host.d_k, host.d_v)))
    change, _ = head_change(factors, edit, steps)
    with model.trace(tokens):
        rule.output[0][:, 12:, 3] += change
        logits = model.output.logits.save()
    wanted = run_edited(host, tokens, edit, layer=4, head=3, steps=steps)
    native = host.logits(host.run(tokens).final)[:, 12:]
    assert_close(logits[:, 12:] - native, wanted - native, "change of the logits", 1e-3)
    assert (wanted - native).norm() > 1
