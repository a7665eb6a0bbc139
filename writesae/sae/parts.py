"""Encoders and decoders of a sparse autoencoder of matrices (the paper's Table 10).

Each has one matrix per atom: `weight()` returns them, [n, d_k, d_v]; `normalise()` applies the norm
constraint of Table 10; `assign(rows, key, value)` sets the matrices `rows` [r] to key value^T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from writesae.sae.config import Parts


class _RankOne(nn.Module):
    """n matrices key_i value_i^T of unit factors: key [n, d_k], value [n, d_v]."""

    def __init__(self, n_atoms: int, d_k: int, d_v: int) -> None:
        super().__init__()
        self.key = nn.Parameter(F.normalize(torch.randn(n_atoms, d_k), dim=-1))
        self.value = nn.Parameter(F.normalize(torch.randn(n_atoms, d_v), dim=-1))

    def weight(self) -> Tensor:
        return self.key[:, :, None] * self.value[:, None, :]

    @torch.no_grad()
    def normalise(self) -> None:
        for factor in (self.key, self.value):
            factor.copy_(F.normalize(factor, dim=-1))

    @torch.no_grad()
    def assign(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        self.key[rows], self.value[rows] = key.to(self.key), value.to(self.value)


class _LowRank(nn.Module):
    """n matrices sum_r key_ir value_ir^T of unit Frobenius norm: key [n, rank, d_k], value [n, rank, d_v]."""

    def __init__(self, n_atoms: int, d_k: int, d_v: int, rank: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(n_atoms, rank, d_k))
        self.value = nn.Parameter(torch.randn(n_atoms, rank, d_v))
        self.normalise()

    def weight(self) -> Tensor:
        return self.key.transpose(1, 2) @ self.value

    @torch.no_grad()
    def normalise(self) -> None:
        size = self.weight().flatten(1).norm(dim=1).clamp_min(1e-12).sqrt()[:, None, None]
        for factor in (self.key, self.value):
            factor.div_(size)

    assign = _RankOne.assign


class _Matrices(nn.Module):
    """n matrices without structure: matrix [n, d_k, d_v]."""

    def __init__(self, n_atoms: int, d_k: int, d_v: int) -> None:
        super().__init__()
        matrix = F.normalize(torch.randn(n_atoms, d_k * d_v), dim=-1)
        self.matrix = nn.Parameter(matrix.view(n_atoms, d_k, d_v))

    def weight(self) -> Tensor:
        return self.matrix

    @torch.no_grad()
    def assign(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        self.matrix[rows] = (key[:, :, None] * value[:, None, :]).to(self.matrix)


class _Encoder:
    """A bias [n] for each matrix, and pre-activations."""

    factored = False  # True: the matrices are key_i value_i^T, and a history is encoded without states

    def __init__(self, n_atoms: int, *sizes: int) -> None:
        super().__init__(n_atoms, *sizes)
        self.bias = nn.Parameter(torch.zeros(n_atoms))

    def dense(self, x: Tensor) -> Tensor:
        """Return <weight_i, x> + bias_i, [..., n], for x [..., d_k, d_v]."""
        return F.linear(x.flatten(-2), self.weight().flatten(1), self.bias)


class BilinearEncoder(_Encoder, _RankOne):
    """The paper's matched filter."""

    factored = True


class LowRankEncoder(_Encoder, _LowRank):
    """Matched filters of a higher rank."""


class DenseEncoder(_Encoder, _Matrices):
    """A linear map of vec(x)."""

    def normalise(self) -> None:
        """Do nothing: Table 10 has no norm constraint for it."""


class TiedEncoder(_Encoder, _RankOne):
    """The decoder's atoms as matched filters, and a bias."""

    factored = True
    key = property(lambda self: self.decoder.key)
    value = property(lambda self: self.decoder.value)

    def __init__(self, decoder: RankOneDecoder) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "decoder", decoder)  # not as a submodule
        self.bias = nn.Parameter(torch.zeros(len(decoder.key)))

    def normalise(self) -> None:
        """Do nothing: the decoder normalises its atoms."""


class RankOneDecoder(_RankOne):
    """Atoms key_i value_i^T."""

    def dense(self, indices: Tensor, coefficients: Tensor) -> Tensor:
        """Return sum_j coefficients_j atom_indices_j, [..., d_k, d_v], for [..., k]."""
        key, value = F.embedding(indices, self.key), F.embedding(indices, self.value)
        return (key * coefficients[..., None]).transpose(-1, -2) @ value


class _WholeDecoder:
    """Decoding with whole matrices."""

    def dense(self, indices: Tensor, coefficients: Tensor) -> Tensor:
        weight = self.weight()
        spread = coefficients.new_zeros(*indices.shape[:-1], len(weight)).scatter(-1, indices, coefficients)
        return (spread @ weight.flatten(1)).unflatten(-1, weight.shape[1:])


class LowRankDecoder(_WholeDecoder, _LowRank):
    """Atoms of a higher rank."""


class FlatDecoder(_WholeDecoder, _Matrices):
    """Atoms without structure."""

    @torch.no_grad()
    def normalise(self) -> None:
        self.matrix.div_(self.matrix.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None])


def make_parts(parts: Parts, n_atoms: int, d_k: int, d_v: int) -> tuple[nn.Module, nn.Module]:
    """Return a new encoder and decoder with random weights."""
    if parts.rank > 1:
        return tuple(part(n_atoms, d_k, d_v, parts.rank) for part in (LowRankEncoder, LowRankDecoder))
    if parts.encoder == "tied":
        decoder = RankOneDecoder(n_atoms, d_k, d_v)
        return TiedEncoder(decoder), decoder
    encoder = {"bilinear": BilinearEncoder, "dense": DenseEncoder}[parts.encoder](n_atoms, d_k, d_v)
    return encoder, {"rank1": RankOneDecoder, "flat": FlatDecoder}[parts.decoder](n_atoms, d_k, d_v)
