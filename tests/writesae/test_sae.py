"""writesae.sae: encoding and decoding against matrices, and checkpoints that refuse what they should."""

import copy
import json

import pytest
import torch
from helpers import assert_close

from writesae.history import History
from writesae.sae import model
from writesae.sae.model import SAE, SAEConfig, load, save

PARTS = [("bilinear", "rank1"), ("bilinear", "flat"), ("dense", "rank1"), ("dense", "flat"), ("tied", "rank1")]
KINDS = [dict(encoder=a, decoder=b) for a, b in PARTS] + [dict(rank=2), dict(rank=3)]
KINDS += [dict(activation=name) for name in ("batch_topk", "jumprelu", "gated")]
N, K, D_K, D_V = 12, 3, 5, 7


def history_of(target: str) -> History:
    torch.manual_seed(1)
    log_decay = -0.1 * torch.rand(3, 70, dtype=torch.float64) if target == "state" else None
    return History(torch.randn(3, 70, D_K).double(), torch.randn(3, 70, D_V).double(), log_decay)


def sae_of(**kind) -> SAE:
    torch.manual_seed(2)
    sae = SAE(N, K, D_K, D_V, **kind)
    sae.mean.normal_()
    sae.scale.fill_(2.5)
    sae.encoder.bias.data.normal_(std=0.1)
    return sae


def config_of(**changes) -> SAEConfig:
    fields = dict(host="toy", layer=3, head=1, target="state", write="added", encoder="bilinear", decoder="rank1")
    return SAEConfig(**fields | dict(n_atoms=N, k=K, d_k=D_K, d_v=D_V, seed=0) | changes)


@pytest.mark.parametrize("target", ["state", "write"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_history_is_encoded_as_its_matrices_are(kind, target, monkeypatch):
    monkeypatch.setattr(model, "GROUP_ELEMENTS", 1)  # one window at a time
    history, sae = history_of(target), sae_of(**kind).double()
    got, wanted = sae.encode_history(history), sae.encode(history.steps())
    active = wanted.coefficients > 0
    assert active.any() and torch.equal(got.indices[active], wanted.indices[active])
    assert_close(got.coefficients, wanted.coefficients, "coefficients", 1e-12)
    assert (got.coefficients[..., :-1] >= got.coefficients[..., 1:]).all(), "the largest coefficient comes first"
    assert sae.factored == (sae.rank == 1 and sae.kind["encoder"] != "dense" and sae.kind["decoder"] == "rank1")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "activation" not in kind])
def test_encoding_and_decoding_by_their_definition(kind):
    sae, x = sae_of(**kind).double(), torch.randn(D_K, D_V, dtype=torch.float64)
    pre = [((x - sae.mean) / sae.scale * w).sum() + b for w, b in zip(sae.encoder.weight(), sae.encoder.bias)]
    top = torch.stack(pre).topk(K)
    indices, coefficients = sae.encode(x)
    assert torch.equal(indices, top.indices)
    assert_close(coefficients, top.values.relu() * sae.scale, "raw coefficients", 1e-12)
    expected = sae.mean + sum(c * sae.decoder.weight()[i] for i, c in zip(indices, coefficients))
    assert_close(sae.decode(indices, coefficients), expected, "reconstruction", 1e-12)


def test_coefficients_are_in_the_units_of_the_data():
    sae = sae_of()
    key, value = sae.atoms()
    sae.encoder.assign(torch.arange(N), key, value)
    sae.encoder.bias.data.zero_()
    indices, coefficients = sae.encode(sae.mean + 40 * key[4, :, None] * value[4])
    assert indices[0] == 4
    assert_close(coefficients[0], 40, "coefficient of an atom written 40 times", 1e-5)


@pytest.mark.parametrize("kind", [dict(encoder=a, decoder=b) for a, b in PARTS] + [dict(rank=2)])
def test_norms(kind):
    sae = sae_of(**kind)
    for parameter in sae.parameters():
        parameter.data.mul_(3)
    before = sae.encoder.weight().detach().clone()
    sae.normalise()
    assert_close(sae.decoder.weight().flatten(1).norm(dim=1), torch.ones(N), "norms of the atoms", 1e-6)
    if sae.kind["encoder"] == "dense":
        assert torch.equal(sae.encoder.weight(), before), "a dense encoder is free"
    elif sae.rank > 1:
        assert_close(sae.encoder.weight().flatten(1).norm(dim=1), torch.ones(N), "norms of the filters", 1e-6)
    else:
        assert_close(sae.encoder.key.norm(dim=1), torch.ones(N), "encoder keys", 1e-6)
        assert_close(sae.encoder.value.norm(dim=1), torch.ones(N), "encoder values", 1e-6)
    key, value = sae.atoms()
    assert_close(key.norm(dim=1), torch.ones(N), "unit keys", 1e-6)
    assert_close(value.norm(dim=1), torch.ones(N), "unit values", 1e-6)


@pytest.mark.parametrize("kind", [dict(encoder="dense", decoder="flat"), dict(rank=2)])
def test_atoms_of_another_decoder_are_the_nearest_rank_one(kind):
    sae = sae_of(**kind).double()
    key, value = sae.atoms()
    reached = torch.einsum("nk,nkv,nv->n", key, sae.decoder.weight(), value)
    assert_close(reached, torch.linalg.matrix_norm(sae.decoder.weight(), 2), "top singular values", 1e-12)


def test_atoms_of_rank_r_are_sums_of_r_outer_products():
    sae = sae_of(rank=2)
    expected = sum(sae.decoder.key[:, r, :, None] * sae.decoder.value[:, r, None] for r in range(2))
    assert_close(sae.decoder.weight(), expected, "atoms", 1e-6)
    assert torch.linalg.matrix_rank(sae.decoder.weight()).tolist() == [2] * N
    assert torch.linalg.matrix_rank(sae.encoder.weight()).tolist() == [2] * N


def test_a_tied_encoder_is_the_decoder_and_has_only_a_bias_of_its_own():
    sae = sae_of(encoder="tied")
    assert {name for name, _ in sae.named_parameters()} == {"encoder.bias", "decoder.key", "decoder.value"}
    sae.decoder.key.data.normal_()
    assert torch.equal(sae.encoder.weight(), sae.decoder.weight())
    again = copy.deepcopy(sae)
    again.decoder.key.data.normal_()
    assert torch.equal(again.encoder.weight(), again.decoder.weight())
    assert not torch.equal(again.decoder.key, sae.decoder.key)


IMPOSSIBLE = [dict(encoder="bilinear?"), dict(decoder="rank2"), dict(activation="relu"), dict(k=0), dict(k=N + 1)]
IMPOSSIBLE += [dict(encoder="tied", decoder="flat"), dict(rank=0), dict(rank=2, encoder="dense")]


@pytest.mark.parametrize("arguments", IMPOSSIBLE)
def test_impossible_saes_are_refused(arguments):
    with pytest.raises(ValueError, match="No SAE|k must lie"):
        SAE(N, arguments.pop("k", K), D_K, D_V, **arguments)


def test_matrices_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="takes matrices"):
        sae_of().encode(torch.zeros(D_V, D_K))
    swapped = History(torch.zeros(1, 2, D_V), torch.zeros(1, 2, D_K))
    with pytest.raises(ValueError, match="5 x 7 matrices, not 7 x 5"):
        sae_of().encode_history(swapped)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    sae, config = sae_of(**kind), config_of(**kind)
    save(sae, config, tmp_path / "cell.1")
    again, read = load(tmp_path / "cell.1", expect=dict(host="toy", layer=3, head=1, target="state", d_k=D_K))
    assert read == config
    for name, x in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cell.1.json", "cell.1.safetensors"]
    x = torch.randn(4, D_K, D_V)
    for a, b in zip(again.encode(x), sae.encode(x)):
        assert torch.equal(a, b)


def test_a_checkpoint_from_before_activations_and_ranks_is_read(tmp_path):
    sae = sae_of()
    save(sae, config_of(), tmp_path / "sae")
    content = json.loads((tmp_path / "sae.json").read_text())
    del content["activation"], content["rank"]
    (tmp_path / "sae.json").write_text(json.dumps(content))
    again, config = load(tmp_path / "sae")
    assert (config.activation, config.rank) == ("topk", 1) and torch.equal(again.decoder.key, sae.decoder.key)


@pytest.mark.parametrize(
    ("name", "value"),
    [("host", "other"), ("layer", 4), ("head", 0), ("target", "write"), ("d_k", 7), ("write", "effective")],
)
def test_a_wrong_pairing_is_refused(name, value, tmp_path):
    save(sae_of(), config_of(), tmp_path / "sae")
    has = getattr(config_of(), name)
    with pytest.raises(ValueError, match=f"is an SAE of {name} {has}, but {name} {value} was asked for"):
        load(tmp_path / "sae", expect={name: value})


def test_an_unknown_expectation_is_refused(tmp_path):
    save(sae_of(), config_of(), tmp_path / "sae")
    with pytest.raises(ValueError, match="no field cell"):
        load(tmp_path / "sae", expect={"cell": (3, 1)})


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize("harm", [lambda b: b[:-9], flip, lambda b: b""])
def test_damaged_weights_are_refused(harm, tmp_path):
    save(sae_of(), config_of(), tmp_path / "sae")
    path = tmp_path / "sae.safetensors"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or was cut short"):
        load(tmp_path / "sae")


def test_damaged_or_older_descriptions_are_refused(tmp_path):
    save(sae_of(), config_of(), tmp_path / "sae")
    path = tmp_path / "sae.json"
    good = json.loads(path.read_text())
    for bad, message in [
        (good | {"format_version": 0}, "format version 0, this code reads 1"),
        (good | {"k": 0}, "does not describe an SAE"),
        (good | {"rank": 2, "encoder": "dense"}, "does not describe an SAE"),
        (good | {"d_k": D_K + 1}, "does not hold the tensors"),
        ([good], "not a JSON object"),
    ]:
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "sae")
    path.write_text(json.dumps(good)[:-20])
    with pytest.raises(ValueError, match="not a JSON object"):
        load(tmp_path / "sae")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "sae")


def test_a_config_of_another_sae_is_not_saved(tmp_path):
    wrong = [(dict(k=4), "k = 4, the SAE has 3"), (dict(decoder="flat"), "decoder = flat, the SAE has rank1")]
    wrong += [
        (dict(activation="gated"), "activation = gated, the SAE has topk"),
        (dict(rank=2), "rank = 2, the SAE has 1"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            save(sae_of(), config_of(**change), tmp_path / "sae")
    assert not list(tmp_path.iterdir())
