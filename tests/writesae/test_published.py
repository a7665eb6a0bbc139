"""writesae.sae.published: files in the author's format against the author's functions as loops."""

import io
import pickle
import zipfile

import pytest
import torch
from helpers import Malicious, assert_close

from writesae.sae.model import SAE
from writesae.sae.published import KINDS, load_authors_sae

N, K, D_1, D_2 = 11, 3, 5, 7


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of the author's code; its factors are not normalised."""
    g = torch.Generator().manual_seed(3)
    shapes = dict(
        V=(N, 1, D_1), W=(N, 1, D_2), V_enc=(N, 1, D_1), W_enc=(N, 1, D_2), V_dec=(N, 1, D_1), W_dec=(N, 1, D_2)
    )
    shapes |= {"b_enc": (N,), "bias": (D_1, D_2), "encoder.weight": (N, D_1 * D_2), "encoder.bias": (N,)}
    shapes |= {"decoder.weight": (D_1 * D_2, N), "decoder.bias": (D_1 * D_2,)}
    made = {name: torch.randn(shapes[name], generator=g) for name in KINDS[kind][2]}
    return made | {"steps_since_active": torch.zeros(N, dtype=torch.long)}


def config_of(kind: str = "bilinear", **changes) -> dict:
    fields = dict(
        sae_type=kind, layer=9, head=4, n_features=N, d_k=D_1, d_v=D_2, d_in=D_1 * D_2, expansion_factor=0, k=K
    )
    return fields | dict(rank=1, use_batchtopk=False, seed=42, lr=3e-4, device="cuda", code_sha="abc") | changes


def written(path, kind="bilinear", tensors=None, config=None):
    content = dict(
        model_state_dict=tensors or tensors_of(kind), config=config or config_of(kind), epoch=19, val_mse=0.1
    )
    torch.save(content, path)
    return path


def their_pre(kind: str, t: dict, x: torch.Tensor) -> list[float]:
    """Pre-activations of one matrix [D_1, D_2], computed one product at a time."""
    pre = []
    for i in range(N):
        if "encoder.weight" in t:
            terms = [t["encoder.weight"][i, a * D_2 + b] * x[a, b] for a in range(D_1) for b in range(D_2)]
            pre.append(sum(terms) + t["encoder.bias"][i])
        else:
            v, w = ("V_dec", "W_dec") if kind == "bilinear_tied" else ("V_enc", "W_enc")
            terms = [t[v][i, 0, a] * x[a, b] * t[w][i, 0, b] for a in range(D_1) for b in range(D_2)]
            pre.append(sum(terms) + t["b_enc"][i])
    return pre


def their_atom(kind: str, t: dict, i: int) -> torch.Tensor:
    if "decoder.weight" in t:
        return t["decoder.weight"][:, i].reshape(D_1, D_2)
    v, w = ("V", "W") if kind == "rank1" else ("V_dec", "W_dec")
    return torch.outer(t[v][i, 0], t[w][i, 0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_function_is_theirs(kind, transposed, tmp_path):
    """With `transposed`, the file's d_k is our d_v, and our states are the transpose of the author's."""
    sae = load_authors_sae(written(tmp_path / "best.pt", kind), "Qwen3.5-0.8B", transposed=transposed)
    t = {name: x.double() for name, x in tensors_of(kind).items()}
    for x in torch.randn(4, D_1, D_2, generator=torch.Generator().manual_seed(5)).double():
        top = torch.stack(their_pre(kind, t, x)).topk(K)
        indices, coefficients = sae.encode((x.T if transposed else x).float())
        assert torch.equal(indices, top.indices)
        assert_close(coefficients, top.values.relu(), "coefficients", 1e-5)
        bias = t["bias"] if "bias" in t else t["decoder.bias"].reshape(D_1, D_2)
        theirs = bias + sum(max(c, 0) * their_atom(kind, t, i) for i, c in zip(top.indices, top.values, strict=True))
        assert_close(sae.decode(indices, coefficients), theirs.T if transposed else theirs, "reconstruction", 1e-5)
    assert (sae.config.d_k, sae.config.d_v) == ((D_2, D_1) if transposed else (D_1, D_2))


def test_it_can_be_passed_on_in_our_format(tmp_path):
    sae = load_authors_sae(written(tmp_path / "best.pt"), "Qwen3.5-0.8B")
    sae.save(tmp_path / "sae")
    again = SAE.load(tmp_path / "sae", expect=dict(host="Qwen3.5-0.8B", layer=9, head=4, seed=42))
    assert again.config == sae.config and again.config.target == "state"
    x = torch.randn(3, D_1, D_2)
    assert torch.equal(again.decode(*again.encode(x)), sae.decode(*sae.encode(x)))


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "bilinear_flat", "rank1"])
def test_older_files_have_factors_without_a_rank_axis(kind, tmp_path):
    """Their config also has fewer fields. Missing values are read from the tensors or passed as arguments."""
    tensors = {name: x[:, 0] if name[0] in "VW" else x for name, x in tensors_of(kind).items()}
    old = written(tmp_path / "old.pt", kind, tensors, dict(layer=9, k=K))
    new = load_authors_sae(written(tmp_path / "new.pt", kind), "host")
    with pytest.raises(ValueError, match=r"does not say head: pass head="):
        load_authors_sae(old, "host", seed=42)
    made = load_authors_sae(old, "host", head=4, seed=42)
    assert made.config == new.config
    for name, x in new.state_dict().items():
        assert torch.equal(made.state_dict()[name], x), name


def changed(**more):
    return lambda tensors: tensors | more


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("W_dec"), r"lacks W_dec: an SAE of the type bilinear has V_enc, W_enc, b_enc, V_dec, W_dec, bias"),
        (without("b_enc", "bias"), r"lacks b_enc, bias: "),
        (changed(b_gate=torch.ones(N)), r"has b_gate besides"),
        (changed(V_dec=torch.ones(N, 1, D_2)), r"has a V_dec of \[11, 1, 7\] instead of \[11, 5\]"),
        (changed(W_enc=torch.ones(N, 1, D_2, 1)), r"has a W_enc of \[11, 1, 7, 1\]"),
        (changed(bias=torch.ones(D_2, D_1)), r"has a bias of \[7, 5\] instead of \[5, 7\]"),
        (changed(V_dec=torch.ones(N, 2, D_1), W_dec=torch.ones(N, 2, D_2)), "atoms of rank 2"),
        (changed(bias="none"), "its bias is not a tensor"),
    ],
)
def test_other_tensors_are_refused(change, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        load_authors_sae(written(tmp_path / "best.pt", tensors=change(tensors_of("bilinear"))), "host")


@pytest.mark.parametrize(
    ("change", "given", "says"),
    [
        (dict(sae_type="bilinear_gated"), {}, "is of the type bilinear_gated, and only bilinear, bilinear_tied"),
        (dict(sae_type="flat"), {}, "lacks decoder.bias, decoder.weight, encoder.bias, encoder.weight and has V_dec"),
        (dict(use_batchtopk=True), {}, "was trained with BatchTopK"),
        (dict(n_features=2048), {}, "says n_features = 2048, its tensors have 11"),
        (dict(d_k=D_2), {}, r"has a V_dec of \[11, 1, 5\] instead of \[11, 7\]"),
        (dict(k=None), {}, "does not say k: pass k="),
        (dict(k=N + 1), {}, "k = 12 exceeds n_atoms = 11"),
        ({}, dict(layer=3), "is of layer 9, but layer 3 was given"),
        ({}, dict(width=3), "width is not needed: a file of the author may lack layer"),
    ],
)
def test_other_configs_are_refused(change, given, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        load_authors_sae(written(tmp_path / "best.pt", config=config_of(**change)), "host", **given)


def test_a_pickle_with_code_is_not_executed(tmp_path):
    content = dict(model_state_dict=tensors_of("bilinear"), config=config_of() | {"note": Malicious(tmp_path / "ran")})
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="holds more than tensors and plain values, and was not loaded"):
        load_authors_sae(tmp_path / "best.pt", "host")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(ValueError, match="was not loaded|or not from torch.save"):
        load_authors_sae(tmp_path / "plain.pt", "host")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the pickle of this test does run where it is let"


def test_damaged_files_are_refused(tmp_path):
    whole = written(tmp_path / "best.pt").read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    for content in (whole[:-200], b"", other.getvalue()):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match="it may be damaged or cut short, or not from torch.save"):
            load_authors_sae(tmp_path / "bad.pt", "host")
    torch.save(tensors_of("bilinear"), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="those hold model_state_dict and config, this one V_enc, W_enc"):
        load_authors_sae(tmp_path / "bad.pt", "host")
    with pytest.raises(FileNotFoundError):
        load_authors_sae(tmp_path / "none.pt", "host")
