"""writesae.sae.model: SAEs saved in folders, in the older file format, and on a simulated Hub."""

import base64
import json

import pytest
import torch
from helpers import FakeHub
from safetensors.torch import load_file, save_file

from writesae.sae.config import SAEConfig
from writesae.sae.model import SAE

N, K, D_K, D_V = 12, 3, 5, 7
PARTS = [("bilinear", "rank1"), ("bilinear", "flat"), ("dense", "rank1"), ("dense", "flat"), ("tied", "rank1")]
KINDS = [dict(encoder=a, decoder=b) for a, b in PARTS] + [dict(rank=2), dict(rank=3)]
KINDS += [dict(activation=name) for name in ("batch_topk", "jumprelu", "gated", "soft_gated")]


def config_of(**changes) -> SAEConfig:
    fields = dict(host="toy", layer=3, head=1, target="state", write="added", n_atoms=N, k=K, d_k=D_K, d_v=D_V, seed=0)
    return SAEConfig(**fields | changes)


def sae_of(**changes) -> SAE:
    torch.manual_seed(2)
    sae = SAE(config_of(**changes), D_K, D_V)
    sae.mean.normal_()
    sae.scale.fill_(2.5)
    sae.encoder.bias.data.normal_(std=0.1)
    return sae


@pytest.fixture
def folder(tmp_path):
    sae_of().save(tmp_path / "sae")
    return tmp_path / "sae"


def same_tensors(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def change_config(folder, **fields) -> None:
    """Set fields of config.json; a field set to None is removed."""
    content = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: x for name, x in content.items() if x is not None}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_the_sae_and_its_config(kind, tmp_path):
    sae, config = sae_of(**kind), config_of(**kind)
    sae.save(tmp_path / "cell.1")
    assert sorted(p.name for p in (tmp_path / "cell.1").iterdir()) == ["config.json", "model.safetensors"]
    content = json.loads((tmp_path / "cell.1" / "config.json").read_text())
    assert len(content.pop("sha256")) == 64 and content == config.model_dump()
    assert load_file(tmp_path / "cell.1" / "model.safetensors").keys() == sae.state_dict().keys()
    again = SAE.load(tmp_path / "cell.1", expect=dict(host="toy", layer=3, head=1, target="state", d_k=D_K))
    assert again.config == config and same_tensors(again, sae)
    x = torch.randn(4, D_K, D_V)
    for a, b in zip(again.encode(x), sae.encode(x), strict=True):
        assert torch.equal(a, b)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_saving_again_replaces_the_sae(folder):
    sae_of(encoder="dense", seed=5).save(folder)
    again = SAE.load(folder)
    assert again.config.seed == 5 and same_tensors(again, sae_of(encoder="dense", seed=5))


def test_files_of_the_older_format_are_read(folder, tmp_path):
    """name.json has the config and a sha256, name.safetensors the weights.

    The oldest configs have neither `activation` nor `rank`.
    """
    change_config(folder, activation=None, rank=None)
    (folder / "config.json").rename(tmp_path / "old.1.json")
    (folder / "model.safetensors").rename(tmp_path / "old.1.safetensors")
    again = SAE.load(tmp_path / "old.1", expect=dict(head=1))
    assert again.config == config_of() and same_tensors(again, sae_of())
    with pytest.raises(ValueError, match="but head 2 was asked for"):
        SAE.load(tmp_path / "old.1", expect=dict(head=2))
    weights = tmp_path / "old.1.safetensors"
    weights.write_bytes(flip(weights.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged or was cut short: its sha256 is not the one in old\.1\.json"):
        SAE.load(tmp_path / "old.1")
    sae_of(seed=8).save(tmp_path / "old.1")
    assert SAE.load(tmp_path / "old.1").config.seed == 8, "a folder comes first"


@pytest.mark.parametrize(
    ("name", "value"),
    [("host", "other"), ("layer", 4), ("head", 0), ("target", "write"), ("d_k", 7), ("write", "effective")],
)
def test_a_wrong_pairing_is_refused(folder, name, value):
    actual = getattr(config_of(), name)
    with pytest.raises(ValueError, match=f"is an SAE of {name} {actual}, but {name} {value} was asked for"):
        SAE.load(folder, expect={name: value})


def test_an_unknown_expectation_is_refused(folder):
    with pytest.raises(ValueError, match="no field cell"):
        SAE.load(folder, expect={"cell": (3, 1)})


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
    change_config(folder, sha256=None)
    with pytest.raises(ValueError, match=f"(?s)does not hold the tensors that config.json describes.*{says}"):
        SAE.load(folder)


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize("harm", [lambda b: b[:-9], flip, lambda b: b""])
def test_damaged_weights_are_refused(harm, folder):
    path = folder / "model.safetensors"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged or was cut short: its sha256 is not the one in config\.json"):
        SAE.load(folder)


def test_weights_that_are_cut_short_are_refused_without_a_checksum(folder):
    change_config(folder, sha256=None)
    assert same_tensors(SAE.load(folder), sae_of())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="it may be damaged or cut short"):
        SAE.load(folder)


def test_values_that_are_not_finite_are_refused(tmp_path):
    sae = sae_of()
    sae.decoder.value.data[4, 2] = torch.nan
    sae.save(tmp_path)
    with pytest.raises(ValueError, match=r"values that are not finite, first in decoder\.value"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(format_version=0), "format version 0, this code reads 1"),
        (dict(format_version=None), "format version None"),
        (dict(k=0), "does not describe an SAE: k: "),
        (dict(rank=2, encoder="dense"), "does not describe an SAE: No SAE dense . rank1 of rank 2"),
        (dict(width=4), "does not describe an SAE: width: "),
        (dict(d_k=D_K + 1), "does not hold the tensors"),
    ],
)
def test_other_configs_are_refused(fields, says, folder):
    change_config(folder, **fields)
    with pytest.raises(ValueError, match=says):
        SAE.load(folder)


def test_folders_without_a_config_or_weights_are_refused(folder):
    description = folder / "config.json"
    good = description.read_text()
    for bad in (good[:-20], json.dumps([json.loads(good), 1])):
        description.write_text(bad)
        with pytest.raises(ValueError, match="or is no JSON object"):
            SAE.load(folder)
    description.write_text(good)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        SAE.load(folder)
    description.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        SAE.load(folder)


def test_an_sae_of_the_hub_is_downloaded_and_then_in_the_cache(folder, monkeypatch, tmp_path):
    files = {p.name: p.read_bytes() for p in folder.iterdir()} | {"pytorch_model.bin": b"not wanted"}
    hub = FakeHub(monkeypatch, tmp_path / "cache", {"someone/sae": files})
    for _ in range(2):
        sae = SAE.load("someone/sae", cache_dir=tmp_path / "cache", expect=dict(layer=3))
        assert sae.config == config_of() and same_tensors(sae, sae_of())
    fetched = sorted(path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path)
    assert fetched == ["config.json", "model.safetensors"]


def test_an_sae_that_is_nowhere_is_said_to_be_missing(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, tmp_path / "cache", {"someone/other": {"config.json": b"{}"}})
    with pytest.raises(FileNotFoundError, match="no folder someone/sae, and no model of that name"):
        SAE.load("someone/sae", cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="no revision v2"):
        SAE.load("someone/other", revision="v2", cache_dir=tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"someone/other holds no model\.safetensors"):
        SAE.load("someone/other", cache_dir=tmp_path / "cache")
    hub.answers["/"] = hub.httpx.ConnectError("no network")
    says = r"cannot be reached \(ConnectError: no network\): its config\.json, model\.safetensors would be downloaded"
    with pytest.raises(ConnectionError, match=says):
        SAE.load("someone/sae", cache_dir=tmp_path / "cache")


def test_an_sae_is_pushed_to_the_hub(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, tmp_path / "cache", {})
    sae_of().push_to_hub("someone/sae", token="hf_x")
    assert (hub.created[0]["organization"], hub.created[0]["name"]) == ("someone", "sae")
    lines = [json.loads(line) for line in hub.commits[0].splitlines()]
    sent = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
    (tmp_path / "got").mkdir()
    for name, content in sent.items():
        (tmp_path / "got" / name).write_bytes(content)
    again = SAE.load(tmp_path / "got")
    assert same_tensors(again, sae_of()) and again.config == config_of()
    card = (tmp_path / "got" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: writesae\n")
    assert "sparse autoencoder of the states of toy, layer 3, head 1" in card and "12 atoms of 5 x 7" in card
