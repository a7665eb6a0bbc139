"""Changes of a residual SAE's features: against edited runs, finite differences, and one another."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_close

from writesae.edit import edited_hidden, head_change, make_edit
from writesae.evaluate.features import PREDICTORS, feature_changes, feature_gamma
from writesae.sae.vectors import VectorSAE

LAYER, HEAD, AT, STEPS = 1, 2, 3, 6
ROWS, T0 = torch.tensor([0, 1, 2, 2]), torch.tensor([20, 50, 70, 31])


@pytest.fixture(scope="module")
def sae(run):
    g = torch.Generator().manual_seed(2)
    d = run.final.shape[-1]
    encoder, decoder = (torch.randn(*shape, generator=g).double() for shape in ((d, 9), (9, d)))
    biases = torch.randn(9, generator=g).double(), torch.randn(d, generator=g).double()
    return VectorSAE(encoder, biases[0], decoder, biases[1], k=3)


def edit_of(host, size, scope="write"):
    g = torch.Generator().manual_seed(3)
    left, right = (torch.randn(4, 2, d, generator=g).double() for d in (host.d_k, host.d_v))
    return make_edit(ROWS, T0, left, size * right, scope)


def stream(host, run, edit, at):
    """The residual stream [4, STEPS, D] behind a layer in edited runs: the input of the next one, or the last."""
    if at == host.layers - 1:
        return edited_hidden(host, run, LAYER, HEAD, edit, STEPS)
    caught = []

    def catch(layer, record):
        if layer == at + 1:
            caught.append(record.hidden)

    change, _ = head_change(host.factors(run, LAYER, HEAD), edit, STEPS)
    host.branch(run, LAYER, HEAD, edit.rows, edit.starts, change, alter=catch)
    return caught[0][..., : run.final.shape[-1]]


@pytest.mark.parametrize("at", [LAYER, AT, 4])
@pytest.mark.parametrize("scope", ["write", "cache"])
def test_measured_changes_are_those_of_edited_runs(host, run, sae, at, scope):
    at = min(at, host.layers - 1)
    edit, nothing = edit_of(host, 0.4, scope), edit_of(host, 0.0, scope)
    changes = feature_changes(host, run, LAYER, HEAD, edit, sae, at, STEPS)
    wanted = (stream(host, run, edit, at) - stream(host, run, nothing, at)) @ sae.encoder
    assert_close(changes["measured"], wanted, "measured changes", 1e-9)
    if at == LAYER:
        assert_close(changes["through_layer"], wanted, "changes behind the edited layer", 1e-9)


def test_predictions_are_of_first_order(host, run, sae):
    """At half the size the error is a quarter; the two predictions agree in the limit."""
    one, half = (feature_changes(host, run, LAYER, HEAD, edit_of(host, x), sae, AT, STEPS) for x in (5e-5, 2.5e-5))
    assert set(one) == {*PREDICTORS, "measured"}
    for name in ("through_layer", "exact"):
        assert_close(half[name], half["measured"], name, 1e-2)
        errors = [(x[name] - x["measured"]).norm() for x in (one, half)]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_the_direct_path_is_the_projected_change_of_the_head(host, run, sae):
    edit = edit_of(host, 0.4)
    direct = feature_changes(host, run, LAYER, HEAD, edit, sae, AT, 2)["direct"]
    row, now = 1, host.factors(run, LAYER, HEAD).at(ROWS, T0)
    read = (edit.left @ now.query[:, :, None] * edit.right).sum(1)[row]
    wanted = sae.encoder.T @ (host.output_projection(LAYER, HEAD).double() @ read)
    assert_close(direct[row, 0], wanted, "direct path", 1e-6)


def test_gamma_of_a_feature_gives_the_first_order_change_of_every_write(host, run, sae):
    edit, feature = edit_of(host, 1.0), 5
    wanted = feature_changes(host, run, LAYER, HEAD, edit, sae, AT, STEPS)["exact"][:, -1, feature]
    found = feature_gamma(host, run, LAYER, HEAD, ROWS, T0, sae, AT, feature, STEPS)
    got = torch.einsum("rjk,rkv,rjv->r", edit.left, found, edit.right)
    assert_close(got, wanted, "change by Gamma", 1e-6)


def test_an_sae_below_the_edit_is_refused(host, run, sae):
    for at in (LAYER - 1, host.layers):
        with pytest.raises(ValueError, match=f"from the edited one on, 1 to {host.layers - 1}, not {at}"):
            feature_changes(host, run, LAYER, HEAD, edit_of(host, 1.0), sae, at, STEPS)


def test_an_sae_of_another_width_is_refused(host, run, sae):
    narrow = VectorSAE(sae.encoder[:-4], sae.encoder_bias, sae.decoder[:, :-4], sae.decoder_bias[:-4], k=3)
    width = len(sae.encoder)
    with pytest.raises(ValueError, match=f"reads vectors of {width - 4} numbers, and the residual stream has {width}"):
        feature_changes(host, run, LAYER, HEAD, edit_of(host, 1.0), narrow, AT, STEPS)
    with pytest.raises(ValueError, match="the residual stream has"):
        feature_gamma(host, run, LAYER, HEAD, ROWS, T0, narrow, AT, 5, STEPS)


def test_several_threads_have_the_changes_of_one(host, run, sae):
    place = LAYER, HEAD, edit_of(host, 0.4), sae, AT, STEPS
    wanted = feature_changes(host, run, *place)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: feature_changes(host, run, *place), range(12)):
            for name in wanted:
                assert_close(got[name], wanted[name], name, 1e-12)
