"""Mamba-2 checkpoints in the authors' format against the authors' forward as a loop over tokens."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import Malicious, assert_close
from mamba2_releases import COMMON, RELEASES, sizes, tensors_of, words
from safetensors.torch import save_file

from writesae.hosts.load import load_host
from writesae.hosts.mamba2_release import from_release, is_release, library_config

LIBRARY = 5e-6  # the library's scan and norms are in fp32, whatever the model's type


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def reference(t: dict[str, torch.Tensor], settings: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, 272] of one text, per token and head as in mamba_ssm's Mamba2.step; states [p, n]."""
    s, t = sizes(settings), {name: x.double() for name, x in t.items()}
    inner, width, layers = s["expand"] * settings["d_model"], s["ngroups"] * s["d_state"], range(settings["n_layer"])
    heads = inner // s["headdim"]
    windows = [torch.zeros(inner + 2 * width, s["d_conv"]).double() for _ in layers]
    states = [torch.zeros(heads, s["headdim"], s["d_state"]).double() for _ in layers]
    logits = []
    for token in tokens:
        residual = t["backbone.embedding.weight"][token]
        for layer in layers:
            w = {n.split("mixer.")[1]: x for n, x in t.items() if n.startswith(f"backbone.layers.{layer}.mixer.")}
            u = rms(residual) * t[f"backbone.layers.{layer}.norm.weight"]
            z, xbc, dt = (w["in_proj.weight"] @ u + w.get("in_proj.bias", 0)).split([inner, inner + 2 * width, heads])
            windows[layer] = torch.cat([windows[layer][:, 1:], xbc[:, None]], 1)
            x, b, c = F.silu((windows[layer] * w["conv1d.weight"][:, 0]).sum(1) + w["conv1d.bias"]).split(
                [inner, width, width]
            )
            dt = F.softplus(dt + w["dt_bias"]).clamp(*s["dt_limit"])
            y = []
            for head in range(heads):
                group = slice(s["d_state"] * (head * s["ngroups"] // heads), None)
                key, query = b[group][: s["d_state"]], c[group][: s["d_state"]]
                value = x[head * s["headdim"] :][: s["headdim"]]
                decay = (-w["A_log"][head].exp() * dt[head]).exp()
                states[layer][head] = decay * states[layer][head] + dt[head] * torch.outer(value, key)
                y.append(states[layer][head] @ query + w["D"][head] * value)
            gated = (torch.cat(y) * F.silu(z)).view(s["ngroups"], -1)
            residual = (
                residual + w["out_proj.weight"] @ (rms(gated).flatten() * w["norm.weight"]) + w.get("out_proj.bias", 0)
            )
        logits.append(t["lm_head.weight"] @ (rms(residual) * t["backbone.norm_f.weight"]))
    return torch.stack(logits)


def written(folder, settings: dict, tensors: dict, pickled: bool = True):
    (folder / "config.json").write_text(json.dumps(settings))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=list(RELEASES))
def settings(request):
    return COMMON | RELEASES[request.param]


TOKENS = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pickled", [True, False])
def test_a_release_is_read(settings, pickled, tmp_path):
    tensors = tensors_of(settings)
    model = from_release(written(tmp_path, settings, tensors, pickled), torch.float64)
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    wanted = torch.stack([reference(tensors, settings, row) for row in TOKENS])
    assert_close(logits, wanted, "logits", LIBRARY)
    tied = model.lm_head.weight is model.backbone.embeddings.weight
    assert tied == settings["tie_embeddings"]


def test_load_host_takes_a_release_and_a_tokenizer(settings, tmp_path):
    tensors = tensors_of(settings)
    written(tmp_path, settings, tensors)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: .*take 'EleutherAI/gpt-neox-20b'"):
        load_host(tmp_path)
    host = load_host(tmp_path, "cpu", torch.float64, tokenizer=words())
    wanted = torch.stack([reference(tensors, settings, row) for row in TOKENS])
    assert_close(host.logits(host.run(TOKENS).final), wanted, "logits of the adapter", LIBRARY)
    s = sizes(settings)
    assert (host.d_k, host.d_v, host.layers) == (s["d_state"], s["headdim"], settings["n_layer"])
    words().save_pretrained(tmp_path)
    host.model.save_pretrained(tmp_path / "library")
    words().save_pretrained(tmp_path / "library")
    again = load_host(tmp_path / "library", "cpu", torch.float64)
    assert_close(again.logits(again.run(TOKENS).final), wanted, "logits of the saved model", LIBRARY)


def without(name):
    return lambda t: {n: x for n, x in t.items() if n != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("backbone.layers.1.mixer.D"), r"lacks the tensor backbone\.layers\.1\.mixer\.D"),
        (without("backbone.embedding.weight"), r"lacks the tensor backbone\.embeddings\.weight"),
        (lambda t: t | {"backbone.layers.0.mlp.fc1.weight": torch.ones(3)}, r"nothing takes its tensor backbone.*fc1"),
        (lambda t: t | {"backbone.norm_f.weight": torch.ones(3)}, r"norm_f\.weight has shape \[3\], not \[64\]"),
        (lambda t: t | {"lm_head.weight": torch.ones(272, 64)}, "has a lm_head.weight of its own"),
    ],
)
def test_other_weights_are_refused(change, says, tmp_path):
    settings = COMMON | RELEASES["default"]
    written(tmp_path, settings, change(tensors_of(settings)))
    with pytest.raises(ValueError, match=says):
        from_release(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(ssm_cfg={}), "layer = Mamba1, and only Mamba2"),
        (dict(ssm_cfg=dict(layer="Mamba2", norm_before_gate=True)), "norm_before_gate = True, and only False"),
        (dict(ssm_cfg=dict(layer="Mamba2", d_mystery=4)), "unknown settings d_mystery"),
        (dict(attn_layer_idx=[1]), r"attn_layer_idx = \[1\]"),
        (dict(d_intermediate=64), "d_intermediate = 64"),
        (dict(model_type="mamba2"), "no config.json of mamba_ssm"),
    ],
)
def test_other_architectures_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        library_config(COMMON | RELEASES["default"] | change)


def test_damaged_releases_are_refused(tmp_path):
    settings = COMMON | RELEASES["default"]
    with pytest.raises(FileNotFoundError):
        from_release(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        from_release(tmp_path)
    path = written(tmp_path, settings, tensors_of(settings)) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="may be damaged or cut short"):
        from_release(tmp_path)
    torch.save({"x": Malicious(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="more than tensors and plain values, and was not loaded"):
        from_release(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_librarys_own_configs_are_no_releases(settings):
    assert is_release(settings)
    assert not is_release(library_config(settings).to_dict())
