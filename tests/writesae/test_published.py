"""writesae.sae.published: files in the author's format against the author's functions as loops."""

import io
import json
import math
import pickle
import zipfile

import pytest
import torch
from helpers import Malicious, assert_close

from writesae.history import History
from writesae.sae.model import SAE
from writesae.sae.published import KINDS, load_authors_sae, read_authors_firings

N, K, D_1, D_2 = 11, 3, 5, 7


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of the author's code; its factors are not normalised."""
    g = torch.Generator().manual_seed(3)
    shapes = dict(
        V=(N, 1, D_1), W=(N, 1, D_2), V_enc=(N, 1, D_1), W_enc=(N, 1, D_2), V_dec=(N, 1, D_1), W_dec=(N, 1, D_2)
    )
    shapes |= dict.fromkeys(("b_enc", "b_gate", "b_mag", "r_mag", "log_threshold"), (N,))
    shapes |= {"bias": (D_1, D_2), "encoder.weight": (N, D_1 * D_2), "encoder.bias": (N,)}
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
            pre.append(sum(terms) + t["b_gate" if kind == "bilinear_gated" else "b_enc"][i])
    return pre


def their_coefficients(kind: str, t: dict, x: torch.Tensor) -> torch.Tensor:
    """The coefficient of every atom at one matrix, [N], without BatchTopK."""
    pre = their_pre(kind, t, x)
    if kind == "bilinear_jumprelu":
        made = [p if p > t["log_threshold"][i].exp() else 0.0 for i, p in enumerate(pre)]
    elif kind == "bilinear_gated":
        size = [(p - t["b_gate"][i]) * t["r_mag"][i].exp() + t["b_mag"][i] for i, p in enumerate(pre)]
        made = [max(m, 0.0) / (1 + math.exp(-p / 0.1)) for p, m in zip(pre, size, strict=True)]
    else:
        largest = sorted(pre)[-K]
        made = [max(p, 0.0) if p >= largest else 0.0 for p in pre]
    return torch.tensor([float(c) for c in made], dtype=torch.float64)


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
        wanted = their_coefficients(kind, t, x)
        indices, coefficients = sae.encode((x.T if transposed else x).float())
        assert_close(torch.zeros(N).scatter(0, indices, coefficients), wanted, "coefficients", 1e-5)
        bias = t["bias"] if "bias" in t else t["decoder.bias"].reshape(D_1, D_2)
        theirs = bias + sum(c * their_atom(kind, t, i) for i, c in enumerate(wanted))
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
        (dict(sae_type="bilinear_relu"), {}, "is of the type bilinear_relu, and only bilinear, bilinear_tied"),
        (dict(sae_type="bilinear_gated"), {}, "lacks b_gate, b_mag, r_mag and has b_enc besides"),
        (dict(sae_type="flat"), {}, "lacks decoder.bias, decoder.weight, encoder.bias, encoder.weight and has V_dec"),
        (dict(use_batchtopk=True), {}, "was trained with BatchTopK and has no threshold: pass heldout="),
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


def states_of(windows: int, tokens: int) -> History:
    g = torch.Generator().manual_seed(6)
    key, value, decay = (torch.randn(windows, tokens, d, generator=g) for d in (D_1, D_2, 1))
    return History(key, value, -decay[..., 0].abs())


def test_the_threshold_of_batch_topk_is_the_one_that_their_rule_has_on_the_whole_text(tmp_path, monkeypatch):
    """Their rule over all tokens as one batch, and ours per token, have the same active atoms."""
    monkeypatch.setattr("writesae.sae.model.GROUP_ELEMENTS", 2 * 9 * N)  # two windows at a time
    path, states = written(tmp_path / "best.pt", config=config_of(use_batchtopk=True)), states_of(5, 9)
    sae, t = load_authors_sae(path, "host", heldout=states), tensors_of("bilinear")
    pre = torch.tensor([their_pre("bilinear", t, x) for x in states.steps().flatten(0, 1)])
    cut = pre.flatten().sort(descending=True).values[K * 45 - 1]
    assert cut > 0 and sae.config.activation == "batch_topk"
    wanted = torch.where(pre >= cut - 1e-5, pre, 0.0).view(5, 9, N)
    indices, coefficients = sae.encode_history(states)
    assert_close(torch.zeros(5, 9, N).scatter(-1, indices, coefficients), wanted, "coefficients", 1e-5)
    assert (coefficients > 0).sum() == K * 45
    sae.save(tmp_path / "sae")
    assert SAE.load(tmp_path / "sae").activation.threshold == sae.activation.threshold > 0


RECORD = dict(feature_id=412, firing_position=37, kl_atom=0.1, kl_ablate=0.2, kl_random=0.4)


def test_the_rows_of_their_substitution_test_are_rows_of_ours(tmp_path):
    records = [RECORD, RECORD | dict(feature_id=7, kl_atom=0.3, note="x")]
    path = tmp_path / "L9.json"
    path.write_text(json.dumps(dict(config=dict(layer=9, head=4, feature_ids=[412]), summary={}, records=records)))
    table = read_authors_firings(path)
    assert table.atom.tolist() == [412, 7] and table.position.tolist() == [37, 37]
    assert (table.kl_atom < table.kl_delete).tolist() == [True, False] and (table.kl_random == 0.4).all()
    assert table[["layer", "head", "amplitude"]].drop_duplicates().values.tolist() == [[9, 4, "matched_norm"]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (dict(records=[RECORD]), "it has config"),
        (dict(config=dict(layer=9, head=4), records=[]), "at least one of records"),
        (dict(config=dict(layer=9, head=4), records=[RECORD, dict(feature_id=1)]), "lacks firing_position, kl_atom"),
    ],
)
def test_other_json_is_no_substitution_test(content, says, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        read_authors_firings(tmp_path / "x.json")


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
