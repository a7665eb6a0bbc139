"""writesae.sae.pretrained: folders and hub repositories of SAEs, through a Hub that answers from a dict."""

import base64
import json

import pytest
import torch
from helpers import FakeHub
from safetensors.torch import load_file, save_file

from writesae.sae import model
from writesae.sae.model import SAE, SAEConfig
from writesae.sae.pretrained import PretrainedSAE

N, K, D_K, D_V = 12, 3, 5, 7
PARTS = [("bilinear", "rank1"), ("bilinear", "flat"), ("dense", "rank1"), ("dense", "flat")]


def config_of(**changes) -> SAEConfig:
    fields = dict(host="toy", layer=3, head=1, target="state", write="added", encoder="bilinear", decoder="rank1")
    return SAEConfig(**fields | dict(n_atoms=N, k=K, d_k=D_K, d_v=D_V, seed=0) | changes)


def sae_of(encoder: str = "bilinear", decoder: str = "rank1") -> SAE:
    torch.manual_seed(2)
    sae = SAE(N, K, D_K, D_V, encoder=encoder, decoder=decoder)
    sae.mean.normal_()
    sae.scale.fill_(2.5)
    sae.encoder.bias.data.normal_(std=0.1)
    return sae


@pytest.fixture
def folder(tmp_path):
    PretrainedSAE.of(sae_of(), config_of()).save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def same_tensors(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("encoder", "decoder"), PARTS)
def test_a_folder_holds_the_sae_and_its_config(encoder, decoder, tmp_path):
    sae, config = sae_of(encoder, decoder), config_of(encoder=encoder, decoder=decoder)
    PretrainedSAE.of(sae, config).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text()) == config.model_dump()
    assert load_file(tmp_path / "model.safetensors").keys() == sae.state_dict().keys()
    again = PretrainedSAE.from_pretrained(tmp_path, expect=dict(host="toy", layer=3, d_k=D_K))
    assert again.config == config and same_tensors(again, sae)
    x = torch.randn(6, D_K, D_V)
    assert torch.equal(again.encode(x).coefficients, sae.encode(x).coefficients)
    assert not any(p.requires_grad for p in again.parameters())


def test_an_sae_of_a_stage_can_be_passed_on(tmp_path):
    model.save(sae_of(), config_of(), tmp_path / "stem")
    passed = PretrainedSAE.of(*model.load(tmp_path / "stem"))
    passed.save_pretrained(tmp_path / "sae")
    again = PretrainedSAE.from_pretrained(tmp_path / "sae")
    model.save(again, again.config, tmp_path / "back")
    assert same_tensors(model.load(tmp_path / "back")[0], sae_of())


def test_the_card_says_what_the_sae_is_of(folder):
    card = (folder / "README.md").read_text()
    assert "sparse autoencoder of the states of toy, layer 3, head 1" in card
    assert "12 atoms of 5 x 7" in card and "library_name: writesae" in card


def test_saving_again_replaces_what_stands_there(folder):
    PretrainedSAE.of(sae_of("dense"), config_of(encoder="dense", seed=5)).save_pretrained(folder)
    again = PretrainedSAE.from_pretrained(folder)
    assert again.config.seed == 5 and same_tensors(again, sae_of("dense"))


def test_a_config_of_another_sae_is_refused():
    with pytest.raises(ValueError, match="k = 4, the SAE has 3"):
        PretrainedSAE.of(sae_of(), config_of(k=4))


@pytest.mark.parametrize(("name", "value"), [("host", "other"), ("layer", 4), ("target", "write"), ("d_k", 7)])
def test_a_wrong_pairing_is_refused(folder, name, value):
    with pytest.raises(ValueError, match=f"but {name} {value} was asked for"):
        PretrainedSAE.from_pretrained(folder, expect={name: value})


def without(name):
    return lambda tensors: {k: x for k, x in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("encoder.bias"), r"Missing key\(s\) in state_dict: \"encoder\.bias\""),
        (lambda t: t | {"encoder.gate": torch.ones(2)}, r"Unexpected key\(s\) in state_dict: \"encoder\.gate\""),
        (lambda t: t | {"mean": torch.ones(2)}, "size mismatch for mean"),
    ],
)
def test_other_tensors_are_refused(folder, change, says):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"(?s)does not hold the tensors that config.json describes.*{says}"):
        PretrainedSAE.from_pretrained(folder)


def test_damaged_folders_are_refused(folder):
    weights, description = folder / "model.safetensors", folder / "config.json"
    whole, good = weights.read_bytes(), json.loads(description.read_text())
    weights.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="damaged or was cut short"):
        PretrainedSAE.from_pretrained(folder)
    weights.write_bytes(whole)
    for bad, says in [
        (json.dumps(good)[:-20], "not a JSON object"),
        (json.dumps([good, 1]), "not a JSON object"),
        (json.dumps(good | {"format_version": 0}), "format version 0, this code reads 1"),
        (json.dumps(good | {"k": 0}), "does not describe an SAE"),
        (json.dumps({"model_type": "gpt2"}), "format version None"),
    ]:
        description.write_text(bad)
        with pytest.raises(ValueError, match=says):
            PretrainedSAE.from_pretrained(folder)
    description.write_text(json.dumps(good))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        PretrainedSAE.from_pretrained(folder)


def test_an_sae_of_the_hub_is_downloaded_and_then_in_the_cache(folder, monkeypatch, tmp_path):
    files = {p.name: p.read_bytes() for p in folder.iterdir()} | {"pytorch_model.bin": b"not wanted"}
    hub = FakeHub(monkeypatch, tmp_path / "cache", {"someone/sae": files})
    for _ in range(2):
        sae = PretrainedSAE.from_pretrained("someone/sae", cache_dir=tmp_path / "cache", expect=dict(layer=3))
        assert sae.config == config_of() and same_tensors(sae, sae_of())
    fetched = sorted(path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path)
    assert fetched == ["config.json", "model.safetensors"]


def test_an_sae_that_is_nowhere_is_said_to_be_missing(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, tmp_path / "cache", {"someone/other": {"config.json": b"{}"}})
    with pytest.raises(FileNotFoundError, match="no folder someone/sae, and no model of that name"):
        PretrainedSAE.from_pretrained("someone/sae", cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"someone/other holds no model\.safetensors"):
        PretrainedSAE.from_pretrained("someone/other", cache_dir=tmp_path / "cache")
    hub.answers["/"] = hub.httpx.ConnectError("no network")
    with pytest.raises(
        ConnectionError, match=r"cannot be reached: its config\.json, model\.safetensors would be downloaded"
    ):
        PretrainedSAE.from_pretrained("someone/sae", cache_dir=tmp_path / "cache")


def test_an_sae_is_pushed_to_the_hub(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, tmp_path / "cache", {})
    PretrainedSAE.of(sae_of(), config_of()).push_to_hub("someone/sae", token="hf_x")
    assert (hub.created[0]["organization"], hub.created[0]["name"]) == ("someone", "sae")
    lines = [json.loads(line) for line in hub.commits[0].splitlines()]
    sent = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
    (tmp_path / "got").mkdir()
    for name, content in sent.items():
        (tmp_path / "got" / name).write_bytes(content)
    assert same_tensors(PretrainedSAE.from_pretrained(tmp_path / "got"), sae_of())
