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

from writesae.history import History, States
from writesae.sae.model import SAE
from writesae.sae.sparsity import largest


class RankOne(NamedTuple):
    """Atoms key_i value_i^T: key [n, d_k], value [n, d_v]."""

    key: Tensor
    value: Tensor


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
    """Return `factored_loss` where the SAE's parts allow it, else `dense_loss`."""
    if sae.factored:
        data = history if history.factored else States(history.steps())
        return factored_loss(sae, data, energy, dead, **weights, bf16=bf16)
    return dense_loss(sae, history.steps(), dead, **weights)


def factored_loss(
    sae: SAE,
    history: History | States,
    energy: Tensor,
    dead: Tensor | None = None,
    aux_weight: float = 1e-2,
    k_aux: int = 256,
    bf16: bool = False,
) -> Loss:
    """Return the loss of a bilinear or tied + rank-1 SAE on every token, from inner products.

    energy [N, T]: history.energy(sae.mean), in raw units; dead [D]: silent atoms; bf16: as in History.read.
    """
    encoder, decoder, every = sae.encoder, sae.decoder, sae.activation.every
    at_active = isinstance(history, States) and not every  # skips the gradients of other atoms, all 0
    with torch.set_grad_enabled(torch.is_grad_enabled() and not at_active):
        pre = sae.overlaps(encoder, history, encoder.bias, bf16)
        indices, coefficients = sae.select(pre, ordered=False)
    if at_active:
        coefficients = sae.overlaps(encoder, history, encoder.bias, at=indices).relu()
        active = sae.overlaps(decoder, history, at=indices)
    else:
        overlaps = sae.overlaps(decoder, history, bf16=bf16)
        active = overlaps if every else overlaps.gather(-1, indices)
    scaled = energy / sae.scale**2
    if sae.bias is not None:
        of_bias = ((decoder.key @ sae.bias) * decoder.value).sum(-1)
        active = active - (of_bias if every else of_bias[indices])
        scaled = scaled - 2 * history.project(sae.bias / sae.scale) + sae.bias.square().sum()
    if every:
        gram = _Gram.apply(decoder.key, decoder.value)
        squared = _squared_error(scaled, active, coefficients, gram)
        fvu = squared.mean()
        total, gate = fvu + sae.activation.penalty(pre), sae.activation.gate(pre)
        if gate is not None:
            total = total + _squared_error(scaled.detach(), active.detach(), gate, gram.detach()).mean()
    else:
        cross = (coefficients * active).sum(-1)
        squared = scaled - 2 * cross + _quadratic(decoder.key, decoder.value, indices, coefficients)
        fvu = total = squared.mean()
    if dead is not None and len(dead) and aux_weight > 0:
        readers, silent = (RankOne(part.key[dead], part.value[dead]) for part in (encoder, decoder))
        if at_active:
            of_dead = sae.overlaps(readers, history, encoder.bias[dead])
            residual = sae.overlaps(silent, history)
        else:
            of_dead, residual = (x.index_select(-1, dead) for x in (pre, overlaps))
        firing = top_positive(of_dead, k_aux)
        residual = residual - _explained(sae, indices, coefficients, dead)
        if sae.bias is not None:  # without its gradient
            residual = residual - ((silent.key @ sae.bias.detach()) * silent.value).sum(-1)
        gram = _Gram.apply(silent.key, silent.value)
        total = total + aux_weight * _squared_error(squared.detach(), residual, firing, gram).mean()
    return Loss(total, fvu.detach(), squared.detach(), indices, coefficients.detach())


def _squared_error(energy: Tensor, overlaps: Tensor, coefficients: Tensor, gram: Tensor) -> Tensor:
    """Return ||x - sum_i c_i atom_i||^2, [N, T], from ||x||^2, <atom_i, x>, c and G."""
    return energy - 2 * (coefficients * overlaps).sum(-1) + _Form.apply(coefficients, gram)


class _Gram(torch.autograd.Function):
    """G = (K K^T) * (V V^T), [n, n], for K [n, d_k], V [n, d_v]."""

    @staticmethod
    def forward(ctx, key: Tensor, value: Tensor) -> Tensor:
        of_keys, of_values = key @ key.T, value @ value.T
        ctx.save_for_backward(key, value, of_keys, of_values)
        return of_keys * of_values

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        key, value, of_keys, of_values = ctx.saved_tensors
        grad = grad + grad.T
        return (grad * of_values) @ key, (grad * of_keys) @ value


class _Form(torch.autograd.Function):
    """c^T G c, [...], for c [..., n] and a symmetric G [n, n]."""

    @staticmethod
    def forward(ctx, c: Tensor, gram: Tensor) -> Tensor:
        product = c @ gram
        ctx.save_for_backward(c, product)
        return (product * c).sum(-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        c, product = ctx.saved_tensors
        grad = grad[..., None]
        of_gram = c.flatten(0, -2).T @ (grad * c).flatten(0, -2) if ctx.needs_input_grad[1] else None
        return 2 * grad * product, of_gram


def _quadratic(key: Tensor, value: Tensor, indices: Tensor, coefficients: Tensor) -> Tensor:
    """Return c^T G c of every token's active atoms, [N, T], from a table of G if it is small."""
    atoms, k = len(key), indices.shape[-1]
    if atoms * atoms <= 2 * indices.numel() * k:
        pairs = indices[..., :, None] * atoms + indices[..., None, :]
        gram = _Gram.apply(key, value).flatten().index_select(0, pairs.flatten()).view(pairs.shape)
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
    indices = largest(pre.detach(), k)
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
