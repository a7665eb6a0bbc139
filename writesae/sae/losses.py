"""The loss of a sparse autoencoder of matrices, without states where the parts allow it, and on states for all others.

For a bilinear or tied encoder and a rank-1 decoder the squared error of a token needs no d_k x d_v matrix. With
x = (X - mean) / scale, atoms v_i w_i^T, coefficients c and G_ij = (v_i . v_j)(w_i . w_j),

    ||x - sum_i c_i v_i w_i^T||^2 = ||x||^2 - 2 sum_i c_i <v_i w_i^T, x> + c^T G c.

Its mean over tokens is the fraction of variance unexplained (FVU), because the mean of ||x||^2 is 1. The dead-atom loss
follows Gao et al. 2024 (Scaling and evaluating sparse autoencoders, App. A.2): atoms that have long been silent
reconstruct the residual e = x - xhat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.history import History
from writesae.sae.model import SAE
from writesae.sae.parts import RankOneDecoder


class Loss(NamedTuple):
    """One batch: total (with gradient), and detached parts. Coefficients are in scaled units."""

    total: Tensor  # scalar
    fvu: Tensor  # scalar
    squared: Tensor  # [N, T], ||x - xhat||^2
    indices: Tensor  # [N, T, slots]
    coefficients: Tensor  # [N, T, slots]


def factored_loss(
    sae: SAE,
    history: History,
    energy: Tensor,
    dead: Tensor | None = None,
    aux_weight: float = 1e-2,
    k_aux: int = 256,
    bf16: bool = False,
) -> Loss:
    """The loss of a bilinear or tied + rank-1 SAE on every token, without states.

    energy [N, T] is history.energy(sae.mean), in raw units; dead [D] int64 are the silent atoms (None or empty: no
    dead-atom loss). bf16: as History.read takes it.
    """
    encoder, decoder = sae.encoder, sae.decoder
    pre = sae.overlaps(encoder, history, encoder.bias, bf16)
    indices, coefficients = sae.select(pre, ordered=False)
    overlaps = sae.overlaps(decoder, history, bf16=bf16)
    scaled = energy / sae.scale**2
    if sae.activation.every:
        squared = _squared_error(scaled, overlaps, coefficients, _gram(decoder))
        fvu = squared.mean()
        total, gate = fvu + sae.activation.penalty(pre), sae.activation.gate(pre)
        if gate is not None:
            total = total + _squared_error(scaled, overlaps.detach(), gate, _gram(decoder).detach()).mean()
    else:
        cross = (coefficients * overlaps.gather(-1, indices)).sum(-1)
        squared = scaled - 2 * cross + _quadratic(decoder, indices, coefficients)
        fvu = total = squared.mean()
    if dead is not None and len(dead) and aux_weight > 0:
        firing = top_positive(pre.index_select(-1, dead), k_aux)
        left = overlaps.index_select(-1, dead) - _explained(sae, indices, coefficients, dead)
        total = total + aux_weight * _dead_loss(sae, squared.detach(), left, firing, dead)
    return Loss(total, fvu.detach(), squared.detach(), indices, coefficients.detach())


def _squared_error(energy: Tensor, overlaps: Tensor, coefficients: Tensor, gram: Tensor) -> Tensor:
    """||x - sum_i c_i atom_i||^2, [N, T], from energy ||x||^2, overlaps <atom_i, x>, c [N, T, n] and G [n, n]."""
    return energy - 2 * (coefficients * overlaps).sum(-1) + ((coefficients @ gram) * coefficients).sum(-1)


def _gram(decoder: RankOneDecoder) -> Tensor:
    """G, [n, n]."""
    return (decoder.key @ decoder.key.T) * (decoder.value @ decoder.value.T)


def _quadratic(decoder: RankOneDecoder, indices: Tensor, coefficients: Tensor) -> Tensor:
    """c^T G c of every token's active atoms, [N, T]; G is looked up in the table of all pairs if that is small."""
    atoms, k = len(decoder.key), indices.shape[-1]
    if atoms * atoms <= 2 * indices.numel() * k:
        table = _gram(decoder)
        pairs = indices[..., :, None] * atoms + indices[..., None, :]
        gram = table.flatten().index_select(0, pairs.flatten()).view(pairs.shape)
        return ((gram * coefficients[..., None, :]).sum(-1) * coefficients).sum(-1)
    key, value = (F.embedding(indices.flatten(0, -2), factor) for factor in (decoder.key, decoder.value))
    return _Quadratic.apply(coefficients.flatten(0, -2), key, value).view(indices.shape[:-1])


class _Quadratic(torch.autograd.Function):
    """c^T ((K K^T) * (V V^T)) c for c [B, k], K [B, k, d_k], V [B, k, d_v] -> [B].

    The products are symmetric, so one matrix product gives each gradient where autograd needs two and a sum.
    """

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
    """<xhat, atom_j> for the silent atoms j, [N, T, D]: k rows of G a token; xhat is held constant."""
    key, value = sae.decoder.key, sae.decoder.value
    gram = (key.detach() @ key[dead].T) * (value.detach() @ value[dead].T)
    weights = coefficients.detach().flatten(0, -2)
    summed = F.embedding_bag(indices.flatten(0, -2), gram, per_sample_weights=weights, mode="sum")
    return summed.view(*indices.shape[:-1], len(dead))


def _dead_loss(sae: SAE, squared: Tensor, left: Tensor, firing: Tensor, dead: Tensor) -> Tensor:
    """mean ||e - sum_j firing_j atom_j||^2, from ||e||^2 = squared and <e, atom_j> = left."""
    key, value = sae.decoder.key[dead], sae.decoder.value[dead]
    gram = (key @ key.T) * (value @ value.T)
    return (squared - 2 * (firing * left).sum(-1) + ((firing @ gram) * firing).sum(-1)).mean()


def dense_loss(
    sae: SAE, matrices: Tensor, dead: Tensor | None = None, aux_weight: float = 1e-2, k_aux: int = 256
) -> Loss:
    """The same loss for any SAE, on matrices [N, T, d_k, d_v]: the oracle of `factored_loss`, and the dense path."""
    x = sae.standardise(matrices)
    pre = sae.encoder.dense(x)
    indices, coefficients = sae.select(pre, ordered=False)
    error = x - sae.decoder.dense(indices, coefficients)
    squared = error.square().sum((-1, -2))
    fvu = squared.mean()
    total = fvu + sae.activation.penalty(pre)
    gate = sae.activation.gate(pre)
    if gate is not None:
        again = (gate @ sae.decoder.weight().detach().flatten(1)).view_as(x)
        total = total + (x - again).square().sum((-1, -2)).mean()
    if dead is not None and len(dead) and aux_weight > 0:
        firing = top_positive(pre.index_select(-1, dead), k_aux)
        again = (firing @ sae.decoder.weight()[dead].flatten(1)).view_as(x)
        total = total + aux_weight * (error.detach() - again).square().sum((-1, -2)).mean()
    return Loss(total, fvu.detach(), squared.detach(), indices, coefficients.detach())


def top_positive(pre: Tensor, k: int) -> Tensor:
    """ReLU of the k largest of [..., n], zero elsewhere; all of them where n <= k."""
    if pre.shape[-1] <= k:
        return pre.relu()
    indices = pre.detach().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre).scatter(-1, indices, pre.gather(-1, indices).relu())


def _loss(
    sae: SAE, history: History, energy: Tensor, dead: Tensor | None = None, bf16: bool = False, **weights: float
) -> Loss:
    if sae.factored and history.factored:
        return factored_loss(sae, history, energy, dead, **weights, bf16=bf16)
    return dense_loss(sae, history.steps(), dead, **weights)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Matrix products on CUDA in TF32, or as they are; as before afterwards. Without CUDA nothing changes."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
