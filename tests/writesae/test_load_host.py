"""Error messages of load_host for models, weights, tokenizers and hub ids that it refuses.

No test here uses a network.
"""

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import SMALL, small
from helpers import FakeHub, Malicious, assert_close
from safetensors.torch import load_file, save_file

from writesae.hosts import load
from writesae.hosts.base import Shape
from writesae.hosts.hub import MODEL_FILES, download_sizes, fetch
from writesae.hosts.load import adapter, load_host, read_shape

TOKENS = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(1))


def tokenizer_of(size: int = 270):
    from transformers import PreTrainedTokenizerFast

    from replication.study import docstrings as corpus

    trained = corpus.train_tokenizer(["some words and more words"] * 3, 260)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=corpus.END_OF_TEXT)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(size - len(tokenizer))])
    return tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A small Mamba-2 in the library's format, with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    adapter("mamba2").build(SMALL["mamba2"]).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def logits(host) -> torch.Tensor:
    return host.logits(host.run(TOKENS).final)


# Folders.


def test_a_device_map_takes_accelerate_and_no_device(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"'cpu' or on those of a device map: give one of the two\."):
        load_host(folder, device="cpu", device_map="auto")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"A device map needs accelerate: pip install 'writesae\[devices\]'"):
        load_host(folder, device_map="auto")


def test_weights_that_no_device_holds_and_shared_weights_are_refused():
    model = small("mamba2").model
    load._check_spread(model, "mine")
    model.backbone.layers[2] = model.backbone.layers[1]
    with pytest.raises(ValueError, match="Layers of mine share weights, which are on one device"):
        load._check_spread(model, "mine")
    with pytest.raises(ValueError, match="leaves weights of mine in memory or on a disk"):
        load._check_spread(model.to("meta"), "mine")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_a_device_map_with_accelerate_gives_the_same_host(folder, tmp_path):
    """Weights that accelerate puts on a disk are refused, since adapters read weights where they are."""
    host = load_host(folder, device_map={"": "cpu"})
    assert_close(logits(host), logits(load_host(folder)), "logits", 1e-6)
    layers = {f"backbone.layers.{layer}": "disk" if layer == 3 else "cpu" for layer in range(host.layers)}
    offloading = {"backbone.embeddings": "cpu", "backbone.norm_f": "cpu", "lm_head": "cpu"} | layers
    with pytest.raises(ValueError, match=r"cannot be read|leaves weights of .* in memory or on a disk"):
        load_host(folder, device_map=offloading)


def test_a_model_of_another_class_is_told_which_there_are(folder):
    for settings in (dict(model_type="gpt2"), dict(model_type="nobody_knows"), dict(model_type="vit")):
        (folder / "config.json").write_text(json.dumps(settings))
        names = "Qwen3_5ForCausalLM", "Mamba2ForCausalLM", "RWKV7ForCausalLM", "DeltaNetForCausalLM", "GLAForCausalLM"
        known = ".*".join(names)
        with pytest.raises(ValueError, match=f"no host family has that class: {known}"):
            load_host(folder)


@pytest.mark.parametrize(
    ("kind", "near"),
    [
        ("qwen3", r" Its name is near .*Qwen3_5ForCausalLM"),
        ("mamba", r" Its name is near .*Mamba2ForCausalLM"),
        ("rwkv8", r" Its name is near RWKV7ForCausalLM\.$"),
        ("gpt2", r"GLAForCausalLM [^.]*\.$"),
    ],
)
def test_a_model_of_another_class_is_told_which_are_near(folder, kind, near):
    (folder / "config.json").write_text(json.dumps(dict(model_type=kind)))
    with pytest.raises(ValueError, match=f"no host family has that class: .*{near}"):
        load_host(folder)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"config\.json cannot be read \(\w+: .*\): it may be damaged, or is no JSON object"
    ):
        load_host(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("backbone.layers.1.mixer.A_log"), r"lacks 1 weights, first backbone\.layers\.1\.mixer\.A_log"),
        (
            lambda t: t.update({"backbone.layers.9.norm.weight": torch.ones(40)}),
            r"has 1 weights that its class does not take, first backbone\.layers\.9\.norm\.weight",
        ),
        (
            lambda t: t.update({"backbone.norm_f.weight": torch.ones(7)}),
            r"another size than its config says, first backbone\.norm_f\.weight: \[7\], not \[40\]",
        ),
    ],
)
def test_missing_extra_and_misshapen_weights_are_named(folder, change, says):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{says}.*it is damaged or of another model"):
        load_host(folder)


def test_damaged_and_missing_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"weights of .* cannot be read \(SafetensorError: .*\): they may be damaged, cut short"
    ):
        load_host(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_host(folder)
    torch.save({"x": Malicious(folder / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors and plain values, and was not loaded"):
        load_host(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("size", [301, 140])
def test_the_tokenizer_of_another_model_is_refused(folder, size, monkeypatch):
    tokenizer = tokenizer_of(301)
    if size == 140:  # a byte-level tokenizer has at least 257 ids
        monkeypatch.setattr(tokenizer, "get_vocab", lambda: {str(i): i for i in range(size)})
    with pytest.raises(
        ValueError, match=f"tokenizer has {size} ids, and .* a vocabulary of 300: it is another model's"
    ):
        load_host(folder, tokenizer=tokenizer)


def test_a_tokenizer_can_stand_elsewhere(folder, tmp_path):
    tokenizer_of(280).save_pretrained(tmp_path / "tokenizer")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: put its files there, or pass tokenizer="):
        load_host(folder)
    assert len(load_host(folder, tokenizer=tmp_path / "tokenizer").tokenizer) == 280


def test_a_folder_has_no_revisions(folder):
    with pytest.raises(ValueError, match="a folder has no revision v1"):
        load_host(folder, revision="v1")


# The tied-embedding trap of multimodal checkpoints (Qwen3.5).


def multimodal(folder, top: bool, text: bool):
    """A Qwen3.5 checkpoint as published, with its vision tower.
    Its config has tie_word_embeddings `top` at the top level and `text` in text_config."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48, patch_size=4)
    words = SMALL["gated_deltanet"] | dict(tie_word_embeddings=text)
    config = Qwen3_5Config(text_config=words, vision_config=vision, tie_word_embeddings=top)
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["tie_word_embeddings"], settings["text_config"]["tie_word_embeddings"] = top, text
    (folder / "config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize(("top", "text"), [(True, True), (True, False), (False, True)])
def test_a_tied_head_is_the_embedding_wherever_the_config_says_so(top, text, tmp_path):
    model = multimodal(tmp_path, top, text)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any("visual" in name for name in tensors) and any("language_model" in name for name in tensors)
    tensors.pop("lm_head.weight", None)  # a tied checkpoint does not contain it
    # for multi-token prediction, as in the published checkpoints
    tensors["mtp.fc.weight"] = torch.ones(48, 96)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    host = load_host(tmp_path, "cpu")
    assert torch.equal(host.model.lm_head.weight, model.model.language_model.embed_tokens.weight)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        assert_close(logits(host), model(input_ids=TOKENS, use_cache=False).logits, "logits", 2e-5)


def test_an_untied_head_is_the_checkpoints(tmp_path):
    model = multimodal(tmp_path, False, False)
    host = load_host(tmp_path, "cpu")
    assert torch.equal(host.model.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(host.model.lm_head.weight, host.model.model.embed_tokens.weight)


def test_a_head_that_nobody_has_is_refused(tmp_path):
    """The head is neither in the file nor tied, and transformers would initialise it at random."""
    multimodal(tmp_path, False, False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, first lm_head\.weight"):
        load_host(tmp_path)


# Hub ids.


@pytest.fixture
def hub(saved, monkeypatch, tmp_path):
    files = {path.name: path.read_bytes() for path in saved.iterdir()} | {"tf_model.h5": b"large"}
    return FakeHub(monkeypatch, tmp_path / "cache", {"someone/model": files})


def test_a_model_of_the_hub_is_the_same_as_its_folder(hub, saved):
    host = load_host("someone/model", "cpu")
    assert host.name == "model"
    assert torch.equal(logits(host), logits(load_host(saved, "cpu")))
    assert not any(path.endswith("h5") for _, path in hub.requests)


def test_what_is_in_the_cache_needs_no_network(hub, monkeypatch):
    load_host("someone/model", "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.answers["/"] = hub.httpx.ConnectError("no network")
    assert load_host("someone/model", "cpu").layers == 5


def test_pickles_are_downloaded_only_where_there_is_nothing_else(hub):
    from mamba2_releases import COMMON, RELEASES, tensors_of, words

    hub.repositories["someone/model"]["pytorch_model.bin"] = b"not asked for"
    load_host("someone/model", "cpu")
    assert not any(path.endswith(".bin") for _, path in hub.requests)
    settings, file = COMMON | RELEASES["default"], hub.root / "weights.bin"
    torch.save(tensors_of(settings), file)
    release = {"config.json": json.dumps(settings).encode(), "pytorch_model.bin": file.read_bytes()}
    hub.repositories["state-spaces/mamba2-tiny"] = release
    host = load_host("state-spaces/mamba2-tiny", "cpu", tokenizer=words())
    assert (host.name, host.family, host.d_k, host.d_v) == ("mamba2-tiny", "mamba2", 128, 64)


def test_a_missing_model_is_said_to_be_missing(hub):
    with pytest.raises(
        FileNotFoundError, match=r"no folder models/nothing, and no model .*huggingface\.co/models/nothing"
    ):
        load_host("models/nothing")


@pytest.mark.parametrize("name", ["a/b/c/d", "what is this?"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(hub, name):
    with pytest.raises(
        FileNotFoundError, match="no folder .*, and it is no hub id either: give a folder, or owner/name"
    ):
        load_host(name)
    assert not hub.requests


def test_a_wrong_revision_is_named(hub):
    with pytest.raises(FileNotFoundError, match="someone/model has no revision v7: give a branch, tag or commit"):
        load_host("someone/model", revision="v7")
    assert load_host("someone/model", "cpu", revision="main").layers == 5


def test_a_gated_model_says_where_to_ask(hub):
    hub.answers["/resolve/"] = dict(status_code=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(PermissionError, match="gated: accept its terms at .*someone/model and log in with .hf auth"):
        load_host("someone/model")


def test_without_a_network_the_cache_and_the_wanted_files_are_named(hub, tmp_path):
    hub.answers["/"] = hub.httpx.ConnectError("no network")
    says = r"not \(wholly\) in the cache .*cache, and https://.* cannot be reached \(Conn.*\): its .*model\*\.safetensors would"
    with pytest.raises(ConnectionError, match=says):
        load_host("someone/model")


def test_sizes_are_those_of_the_files_that_are_not_in_the_cache(hub):
    files = hub.repositories["someone/model"]
    wanted = {name: len(content) for name, content in files.items() if name != "tf_model.h5"}
    assert download_sizes("someone/model", MODEL_FILES) == wanted
    fetch("someone/model", ["config.json"])
    del wanted["config.json"]
    assert download_sizes("someone/model", MODEL_FILES) == wanted
    fetch("someone/model", MODEL_FILES)
    assert download_sizes("someone/model", MODEL_FILES) == {}
    hub.answers["/"] = hub.httpx.ConnectError("no network")
    assert download_sizes("someone/model", MODEL_FILES) == {}
    with pytest.raises(ConnectionError, match="cannot be reached"):
        download_sizes("someone/other", MODEL_FILES)


@pytest.mark.parametrize("family", list(SMALL))
def test_a_config_tells_the_shape_of_the_host(family, tmp_path):
    host = small(family)
    host.model.config.save_pretrained(tmp_path)
    sizes = len(host.recurrent_layers), host.heads, host.d_k, host.d_v
    wanted = Shape(*sizes, not host.scalar_decay, effective=family == "kda")
    assert read_shape(tmp_path) == wanted


def test_offline_mode_is_named(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="and HF_HUB_OFFLINE is set: its"):
        load_host("someone/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="local_files_only forbids a download"):
        fetch("someone/model", ["*.json"], local_files_only=True)


def test_a_hub_that_is_down_is_said_to_be_down(hub):
    hub.answers["/api/models/"] = dict(status_code=503)
    with pytest.raises(ConnectionError, match="the Hub answered 503"):
        load_host("someone/model")
