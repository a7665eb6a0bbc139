"""Which features of a residual-stream SAE a write or an atom raises, and at which tokens.

The SAE reads the residual stream after layer L, the edited one or one above. The pre-activation of feature i
is linear in that stream, so a row of the encoder takes the place of a row of the unembedding in the closed
form (`writesae.shift`). Changes of the pre-activations, in the order of their approximations:

- direct:        <q_s, x_s> <W_O w, enc_i>, the paper's path: no norm, no gate, no layer between;
- exact:         every path to first order in the head's change;
- through_layer: exact in the edited layer, to first order in the layers up to L. With L the edited layer this
                 is the measured change itself;
- measured:      the edited run minus the native run.
"""

from __future__ import annotations

import threading
from functools import partial

import torch
from torch import Tensor

from writesae.edit import Edit, head_change
from writesae.hosts.base import Host, Run
from writesae.recurrence import torch_defaults
from writesae.sae.vectors import VectorSAE
from writesae.shift import gamma, gradients

PREDICTORS = ("through_layer", "exact", "direct")
FORWARD_MODE = threading.Lock()  # torch has one level of forward mode per process


@torch_defaults()
def feature_changes(
    host: Host, run: Run, layer: int, head: int, edit: Edit, sae: VectorSAE, at: int, steps: int
) -> dict[str, Tensor]:
    """Return the changes [R, steps, n] of all features' pre-activations, from each row's start on.

    The keys are PREDICTORS and "measured". at: the layer whose output the SAE reads. through_layer and exact
    take one forward-mode pass each. Raises ValueError for a layer below the edited one, for an SAE of another
    width, and as `head_change`.
    """
    _check_sae(host, run, layer, at, sae)
    change, _ = head_change(host.factors(run, layer, head), edit, steps)
    places = run, layer, head, edit.rows, edit.starts

    def read(output: Tensor) -> Tensor:
        return _read(sae, host.layers_above(run, layer, edit.rows, edit.starts, output, upto=at)[0])

    def from_head(change: Tensor) -> Tensor:
        return read(host.edited_layer(*places, change)[0])

    with torch.no_grad():
        before, after = (host.edited_layer(*places, x)[0] for x in (torch.zeros_like(change), change))
        with FORWARD_MODE:
            native, through = torch.func.jvp(read, (before,), (after - before,))
            _, exact = torch.func.jvp(from_head, (torch.zeros_like(change),), (change,))
        path = host.output_projection(layer, head).T.to(sae.encoder) @ sae.encoder
        direct = change.to(path) @ path
        shifts = dict(through_layer=through, exact=exact, direct=direct, measured=read(after) - native)
    return {name: x.detach() for name, x in shifts.items()}


def feature_gamma(
    host: Host,
    run: Run,
    layer: int,
    head: int,
    rows: Tensor,
    starts: Tensor,
    sae: VectorSAE,
    at: int,
    feature: int,
    steps: int,
) -> Tensor:
    """Return Gamma [R, d_k, d_v] of a feature at the last of `steps` tokens from starts[r] on.

    A write x w^T at starts[r], which the token there reads, changes the pre-activation by x^T Gamma w to
    first order: one backward pass ranks every write and every atom. Raises ValueError as `feature_changes`.
    """
    _check_sae(host, run, layer, at, sae)

    def chosen(pre: Tensor) -> Tensor:
        return pre[:, [feature]]

    slopes = gradients(host, run, layer, head, rows, starts, steps, chosen, upto=at, read=partial(_read, sae))
    return gamma(host.factors(run, layer, head), rows, starts, slopes.head[:, 0])[:, 0]


def _read(sae: VectorSAE, hidden: Tensor) -> Tensor:
    """Return the pre-activations; RWKV-7's hidden states carry further values behind the stream."""
    return sae.pre(hidden[..., : len(sae.encoder)])


def _check_sae(host: Host, run: Run, layer: int, at: int, sae: VectorSAE) -> None:
    if len(sae.encoder) != (width := run.final.shape[-1]):
        raise ValueError(f"The SAE reads vectors of {len(sae.encoder)} numbers, and the residual stream has {width}.")
    if not layer <= at < host.layers:
        raise ValueError(
            f"The SAE must read behind a layer from the edited one on, {layer} to {host.layers - 1}, not {at}."
        )
