"""writesae.sae.model: encoding and decoding against matrices."""

import copy

import pytest
import torch
from helpers import assert_close

from writesae.history import History
from writesae.sae import model
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.sae.train import TrainingSettings

PARTS = [("bilinear", "rank1"), ("bilinear", "flat"), ("dense", "rank1"), ("dense", "flat"), ("tied", "rank1")]
KINDS = [dict(encoder=a, decoder=b) for a, b in PARTS] + [dict(rank=2), dict(rank=3)]
KINDS += [dict(activation=name) for name in ("batch_topk", "jumprelu", "gated", "soft_gated")]
KINDS += [dict(centre="bias"), dict(centre="none", encoder="dense")]
N, K, D_K, D_V = 12, 3, 5, 7


def history_of(target: str) -> History:
    torch.manual_seed(1)
    log_decay = -0.1 * torch.rand(3, 70, dtype=torch.float64) if target == "state" else None
    return History(torch.randn(3, 70, D_K).double(), torch.randn(3, 70, D_V).double(), log_decay)


def sae_of(**kind) -> SAE:
    torch.manual_seed(2)
    sae = SAE(Architecture(n_atoms=N, k=K, **kind), D_K, D_V)
    if sae.config.centre == "mean":
        sae.mean.normal_()
    if sae.bias is not None:
        sae.bias.data.normal_()
    sae.scale.fill_(2.5)
    sae.encoder.bias.data.normal_(std=0.1)
    return sae


@pytest.mark.parametrize("target", ["state", "write"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_history_is_encoded_as_its_matrices_are(kind, target, monkeypatch):
    monkeypatch.setattr(model, "GROUP_ELEMENTS", 1)  # one window per group
    history, sae = history_of(target), sae_of(**kind).double()
    got, wanted = sae.encode_history(history), sae.encode(history.steps())
    active = wanted.coefficients > 0
    assert active.any() and torch.equal(got.indices[active], wanted.indices[active])
    assert_close(got.coefficients, wanted.coefficients, "coefficients", 1e-12)
    assert (got.coefficients[..., :-1] >= got.coefficients[..., 1:]).all(), "the largest coefficient comes first"
    assert sae.factored == (sae.rank == 1 and sae.config.encoder != "dense" and sae.config.decoder == "rank1")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "activation" not in kind])
def test_encoding_and_decoding_by_their_definition(kind):
    sae, x = sae_of(**kind).double(), torch.randn(D_K, D_V, dtype=torch.float64)
    pre = [((x - sae.mean) / sae.scale * w).sum() + b for w, b in zip(sae.encoder.weight(), sae.encoder.bias)]
    top = torch.stack(pre).topk(K)
    indices, coefficients = sae.encode(x)
    assert torch.equal(indices, top.indices)
    assert_close(coefficients, top.values.relu() * sae.scale, "raw coefficients", 1e-12)
    added_to = sae.mean if sae.bias is None else sae.bias * sae.scale
    expected = added_to + sum(c * sae.decoder.weight()[i] for i, c in zip(indices, coefficients))
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
    if sae.config.encoder == "dense":
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


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(encoder="bilinear?"), "encoder\n.*'bilinear', 'dense' or 'tied'"),
        (dict(decoder="rank2"), "decoder\n.*'rank1' or 'flat'"),
        (dict(activation="relu"), "activation\n.*'topk', 'batch_topk', 'jumprelu', 'gated' or 'soft_gated'"),
        (dict(k=0), "k\n.*greater than 0"),
        (dict(k=N + 1), "k = 13 exceeds n_atoms = 12"),
        (dict(encoder="tied", decoder="flat"), "No SAE tied . flat"),
        (dict(rank=0), "rank\n.*greater than 0"),
        (dict(rank=2, encoder="dense"), "No SAE dense . rank1 of rank 2"),
        (dict(width=3), "width\n.*not permitted"),
    ],
)
def test_impossible_architectures_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Architecture(**dict(n_atoms=N, k=K) | fields)


def test_any_description_of_an_architecture_makes_an_sae():
    settings = TrainingSettings(n_atoms=N, k=K, encoder="tied", tokens=100, seed=7)
    config = SAE(settings, D_K, D_V).config
    expected = dict(n_atoms=N, k=K, encoder="tied", decoder="rank1", d_k=D_K, d_v=D_V, seed=7, host=None, target=None)
    assert {name: getattr(config, name) for name in expected} == expected
    assert SAE(config.model_copy(update=dict(host="toy")), D_K, D_V).config.host == "toy"


@pytest.mark.parametrize("name", ["batch_topk", "gated"])
def test_encoding_changes_no_sae(name):
    sae = sae_of(activation=name)
    before = copy.deepcopy(sae.state_dict())
    sae.encode(torch.randn(6, D_K, D_V))
    assert all(torch.equal(x, before[name]) for name, x in sae.state_dict().items())


def test_matrices_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="takes matrices"):
        sae_of().encode(torch.zeros(D_V, D_K))
    swapped = History(torch.zeros(1, 2, D_V), torch.zeros(1, 2, D_K))
    with pytest.raises(ValueError, match="5 x 7 matrices, not 7 x 5"):
        sae_of().encode_history(swapped)
