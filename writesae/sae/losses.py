"""The loss of a sparse autoencoder of matrices: without states where the parts allow it, else on states.

With x = (X - mean) / scale, atoms v_i w_i^T, coefficients c and G_ij = (v_i . v_j)(w_i . w_j), the error is
||x - sum_i c_i v_i w_i^T||^2 = ||x||^2 - 2 sum_i c_i <v_i w_i^T, x> + c^T G c. A learnt bias B takes the
place of x by x - B there. The mean error is the fraction of variance unexplained (FVU), about the SAE's own
mean. The dead-atom loss is that of Gao et al. 2024, App. A.2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.history import History
from writesae.sae.model import SAE


class Loss(NamedTuple):
    """The total loss of a batch, with gradient, and detached parts; coefficients are in scaled units."""

    total: Tensor  # scalar
    fvu: Tensor  # scalar
    squared: Tensor  # [N, T], ||x - xhat||^2
    indices: Tensor  # [N, T, slots]
    coefficients: Tensor  # [N, T, slots]


def loss_of(
    sae: SAE, history: History, energy: Tensor, dead: Tensor | None = None, bf16: bool = False, **weights: float
) -> Loss:
    """Return `factored_loss` where SAE and history allow it, else `dense_loss`."""
    if sae.factored and history.factored:
        return factored_loss(sae, history, energy, dead, **weights, bf16=bf16)
    return dense_loss(sae, history.steps(), dead, **weights)


def factored_loss(
    sae: SAE,
    history: History,
    energy: Tensor,
    dead: Tensor | None = None,
    aux_weight: float = 1e-2,
    k_aux: int = 256,
    bf16: bool = False,
) -> Loss:
    """Return the loss of a bilinear or tied + rank-1 SAE on every token, without states.

    energy [N, T]: history.energy(sae.mean), in raw units; dead [D]: silent atoms; bf16: as in History.read.
    """
    encoder, decoder = sae.encoder, sae.decoder
    pre = sae.overlaps(encoder, history, encoder.bias, bf16)
    indices, coefficients = sae.select(pre, ordered=False)
    overlaps = sae.overlaps(decoder, history, bf16=bf16)
    rest, scaled = overlaps, energy / sae.scale**2
    if sae.bias is not None:
        rest = overlaps - ((decoder.key @ sae.bias.detach()) * decoder.value).sum(-1)  # without its gradient
        overlaps = overlaps - ((decoder.key @ sae.bias) * decoder.value).sum(-1)
        scaled = scaled - 2 * history.project(sae.bias / sae.scale) + sae.bias.square().sum()
    if sae.activation.every:
        gram = _gram(decoder.key, decoder.value)
        squared = _squared_error(scaled, overlaps, coefficients, gram)
        fvu = squared.mean()
        total, gate = fvu + sae.activation.penalty(pre), sae.activation.gate(pre)
        if gate is not None:
            total = total + _squared_error(scaled.detach(), overlaps.detach(), gate, gram.detach()).mean()
    else:
        cross = (coefficients * overlaps.gather(-1, indices)).sum(-1)
        squared = scaled - 2 * cross + _quadratic(decoder.key, decoder.value, indices, coefficients)
        fvu = total = squared.mean()
    if dead is not None and len(dead) and aux_weight > 0:
        firing = top_positive(pre.index_select(-1, dead), k_aux)
        residual_overlaps = rest.index_select(-1, dead) - _explained(sae, indices, coefficients, dead)
        gram = _gram(decoder.key[dead], decoder.value[dead])
        total = total + aux_weight * _squared_error(squared.detach(), residual_overlaps, firing, gram).mean()
    return Loss(total, fvu.detach(), squared.detach(), indices, coefficients.detach())


def _squared_error(energy: Tensor, overlaps: Tensor, coefficients: Tensor, gram: Tensor) -> Tensor:
    """Return ||x - sum_i c_i atom_i||^2, [N, T], from ||x||^2, <atom_i, x>, c and G."""
    return energy - 2 * (coefficients * overlaps).sum(-1) + ((coefficients @ gram) * coefficients).sum(-1)


def _gram(key: Tensor, value: Tensor) -> Tensor:
    return (key @ key.T) * (value @ value.T)


def _quadratic(key: Tensor, value: Tensor, indices: Tensor, coefficients: Tensor) -> Tensor:
    """Return c^T G c of every token's active atoms, [N, T], from a table of G if it is small."""
    atoms, k = len(key), indices.shape[-1]
    if atoms * atoms <= 2 * indices.numel() * k:
        pairs = indices[..., :, None] * atoms + indices[..., None, :]
        gram = _gram(key, value).flatten().index_select(0, pairs.flatten()).view(pairs.shape)
        return ((gram * coefficients[..., None, :]).sum(-1) * coefficients).sum(-1)
    active = (F.embedding(indices.flatten(0, -2), factor) for factor in (key, value))
    return _Quadratic.apply(coefficients.flatten(0, -2), *active).view(indices.shape[:-1])


class _Quadratic(torch.autograd.Function):
    """c^T ((K K^T) * (V V^T)) c, [B], for c [B, k], K [B, k, d_k], V [B, k, d_v]; symmetric."""

    @staticmethod
    def forward(ctx, c: Tensor, key: Tensor, value: Tensor) -> Tensor:
        of_keys, of_values = key @ key.mT, value @ value.mT
        product = ((of_keys * of_values) @ c[..., None]).squeeze(-1)
        ctx.save_for_backward(c, key, value, of_keys, of_values, product)
        return (product * c).sum(-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, key, value, of_keys, of_values, product = ctx.saved_tensors
        grad = 2 * grad[..., None]
        outer = (grad * c)[..., :, None] * c[..., None, :]
        return grad * product, (outer * of_values) @ key, (outer * of_keys) @ value


def _explained(sae: SAE, indices: Tensor, coefficients: Tensor, dead: Tensor) -> Tensor:
    """Return <xhat, atom_j> for the silent atoms j, [N, T, D], without gradient for xhat."""
    key, value = sae.decoder.key, sae.decoder.value
    gram = (key.detach() @ key[dead].T) * (value.detach() @ value[dead].T)
    weights = coefficients.detach().flatten(0, -2)
    summed = F.embedding_bag(indices.flatten(0, -2), gram, per_sample_weights=weights, mode="sum")
    return summed.view(*indices.shape[:-1], len(dead))


def dense_loss(
    sae: SAE, matrices: Tensor, dead: Tensor | None = None, aux_weight: float = 1e-2, k_aux: int = 256
) -> Loss:
    """Return the loss of any SAE on matrices [N, T, d_k, d_v]."""
    x = sae.standardise(matrices)
    pre = sae.encoder.dense(x)
    indices, coefficients = sae.select(pre, ordered=False)
    error = x - sae.decoder.dense(indices, coefficients)
    if sae.bias is not None:
        error = error - sae.bias
    squared = error.square().sum((-1, -2))
    fvu = squared.mean()
    total = fvu + sae.activation.penalty(pre)
    gate = sae.activation.gate(pre)
    if gate is not None:
        again = (gate @ sae.decoder.weight().detach().flatten(1)).view_as(x)
        rest = x if sae.bias is None else x - sae.bias.detach()
        total = total + (rest - again).square().sum((-1, -2)).mean()
    if dead is not None and len(dead) and aux_weight > 0:
        firing = top_positive(pre.index_select(-1, dead), k_aux)
        again = (firing @ sae.decoder.weight()[dead].flatten(1)).view_as(x)
        total = total + aux_weight * (error.detach() - again).square().sum((-1, -2)).mean()
    return Loss(total, fvu.detach(), squared.detach(), indices, coefficients.detach())


def top_positive(pre: Tensor, k: int) -> Tensor:
    """Return the ReLU of the k largest of [..., n] (of all if n <= k), and zero elsewhere."""
    if pre.shape[-1] <= k:
        return pre.relu()
    indices = pre.detach().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre).scatter(-1, indices, pre.gather(-1, indices).relu())


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 in matrix products on CUDA if `allowed`, and restore the setting afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
