"""SAEs of vectors: their rules by loops, their files against SAELens, and those made of our SAEs."""

import json

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file

from writesae.history import History
from writesae.sae.config import SAEConfig
from writesae.sae.model import SAE
from writesae.sae.train import TrainingSettings, train
from writesae.sae.vectors import VectorSAE, output_side

D, N, K = 5, 8, 3


def made(rule="topk", centred=True):
    g = torch.Generator().manual_seed(7)
    shapes = (D, N), (N,), (N, D), (D,)
    threshold = torch.rand(N, generator=g) if rule == "jumprelu" else None
    tensors = [torch.randn(*shape, generator=g) for shape in shapes]
    options = dict(k=K if rule == "topk" else None, threshold=threshold, centred=centred)
    return VectorSAE(*tensors, rule, **options, metadata=dict(hook_name="blocks.2.hook_resid_post"))


X = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("rule", ["topk", "jumprelu", "standard"])
@pytest.mark.parametrize("centred", [True, False])
def test_the_folder_is_read_back_and_by_saelens(rule, centred, tmp_path):
    sae = made(rule, centred)
    sae.save(tmp_path / "sae")
    again = VectorSAE.load(tmp_path / "sae")
    assert again.rule == rule and again.metadata["hook_name"] == "blocks.2.hook_resid_post"
    for mine, other in ((sae, again), (again, sae)):
        assert torch.equal(mine.decode(mine.encode(X)), other.decode(other.encode(X)))
    reason = "sae-lens is not installed (pip install 'writesae[saelens]')"
    sae_lens = pytest.importorskip("sae_lens", reason=reason, exc_type=ImportError)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert theirs.cfg.architecture() == rule and theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert_close(sae.encode(X), theirs.encode(X), "coefficients", 1e-6)
    assert_close(sae.decode(sae.encode(X)), theirs(X), "reconstructions", 1e-6)
    theirs.save_model(tmp_path / "theirs")
    assert torch.equal(VectorSAE.load(tmp_path / "theirs").encode(X), sae.encode(X))


@pytest.mark.parametrize("rule", ["topk", "jumprelu", "standard"])
def test_the_rules_by_loops(rule):
    sae = made(rule)
    for x, got in zip(X.flatten(0, 1), sae.encode(X).flatten(0, 1)):
        pre = [float((x - sae.decoder_bias) @ sae.encoder[:, i] + sae.encoder_bias[i]) for i in range(N)]
        cut = {"topk": sorted(pre)[-K], "standard": 0.0}
        kept = [p >= cut[rule] if rule in cut else p > sae.threshold[i] for i, p in enumerate(pre)]
        assert_close(got, torch.tensor([max(p, 0.0) if k else 0.0 for p, k in zip(pre, kept)]), "coefficients", 1e-5)


def test_norms_of_a_decoder_that_scale_the_coefficients_are_folded(tmp_path):
    sae = made()
    sae.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | dict(rescale_acts_by_decoder_norm=True)))
    folded, norm = VectorSAE.load(tmp_path), sae.decoder.norm(dim=1)
    assert_close(folded.pre(X), sae.pre(X) * norm, "pre-activations", 1e-6)
    assert_close(folded.decoder.norm(dim=1), torch.ones(N), "norms", 1e-6)
    sae_lens = pytest.importorskip(
        "sae_lens", reason="sae-lens is not installed (pip install 'writesae[saelens]')", exc_type=ImportError
    )
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert_close(folded.decode(folded.encode(X)), theirs(X), "reconstructions", 1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(architecture="gated"), "of the architecture gated: those of topk, jumprelu, standard can be read"),
        (dict(normalize_activations="layer_norm"), "normalize_activations = layer_norm: fold it"),
        (dict(d_sae=N + 1), r"has no W_enc of \[5, 9\]"),
        (dict(architecture="jumprelu"), r"has no threshold of \[8\]"),
        (dict(k=None), "has no number k in its cfg.json, as SAEs of topk have"),
    ],
)
def test_other_files_are_refused(changes, says, tmp_path):
    made().save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=says):
        VectorSAE.load(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    made().save(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({name: x for name, x in tensors.items() if name != "b_dec"}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"has no b_dec of \[5\]"):
        VectorSAE.load(tmp_path)


@pytest.mark.parametrize("centre", ["mean", "bias", "none"])
def test_the_trainer_of_matrices_trains_saes_of_vectors(centre):
    """The SAE of 1 x D matrices and the one of vectors are the same function."""
    x = torch.randn(6, 20, D, generator=torch.Generator().manual_seed(1)) * 3 + 2
    settings = TrainingSettings(n_atoms=N, k=K, tokens=600, batch_windows=3, lr=3e-3, centre=centre)
    sae, _ = train(History(torch.ones(6, 20, 1), x), settings, progress=False)
    vectors = VectorSAE.of_rows(sae, model_name="small")
    wanted = sae.decode(*sae.encode(x[:, :, None]))[:, :, 0]
    assert_close(vectors.decode(vectors.encode(x)), wanted, "reconstructions", 1e-5)
    assert vectors.metadata == dict(model_name="small")
    with pytest.raises(ValueError, match="of 2 x 3 matrices, not topk of rows"):
        VectorSAE.of_rows(SAE(SAEConfig(n_atoms=4, k=2, d_k=2, d_v=3), 2, 3))


def test_the_value_sides_of_atoms_with_and_without_the_output_projection(tmp_path):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(n_atoms=N, k=K, d_k=4, d_v=D, layer=2, head=1, host="small"), 4, D)
    projection = torch.randn(7, D)
    for side, matrix in ((output_side(sae), torch.eye(D)), (output_side(sae, projection, hook_name="x"), projection)):
        for i, value in enumerate(sae.decoder.value.detach()):
            unit = matrix @ value / (matrix @ value).norm()
            assert_close(side.decoder[i], unit, "direction", 1e-6)
        assert torch.equal(side.encoder, side.decoder.T) and side.k == K
        assert (side.metadata["layer"], side.metadata["hook_head_index"]) == (2, 1)
