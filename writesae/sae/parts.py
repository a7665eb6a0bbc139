"""Encoders and decoders of a sparse autoencoder of matrices (the paper's Table 10)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from writesae.sae.sparsity import ACTIVATIONS


class _Factors(nn.Module):
    """n rank-1 matrices key_i value_i^T."""

    def __init__(self, n_atoms: int, d_k: int, d_v: int) -> None:
        super().__init__()
        self.key = nn.Parameter(F.normalize(torch.randn(n_atoms, d_k), dim=-1))
        self.value = nn.Parameter(F.normalize(torch.randn(n_atoms, d_v), dim=-1))

    def weight(self) -> Tensor:
        """The matrices themselves, [n, d_k, d_v]."""
        return self.key[:, :, None] * self.value[:, None, :]

    @torch.no_grad()
    def normalise(self) -> None:
        """Unit key and value factors (Table 10)."""
        for factor in (self.key, self.value):
            factor.copy_(F.normalize(factor, dim=-1))

    @torch.no_grad()
    def assign(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Make the atoms `rows` [r] the matrices key value^T: key [r, d_k], value [r, d_v]."""
        self.key[rows], self.value[rows] = key.to(self.key), value.to(self.value)


class _LowRank(nn.Module):
    """n matrices sum_r key_ir value_ir^T of a higher rank."""

    def __init__(self, n_atoms: int, d_k: int, d_v: int, rank: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(n_atoms, rank, d_k))
        self.value = nn.Parameter(torch.randn(n_atoms, rank, d_v))
        self.normalise()

    def weight(self) -> Tensor:
        """The matrices themselves, [n, d_k, d_v]."""
        return self.key.transpose(1, 2) @ self.value

    @torch.no_grad()
    def normalise(self) -> None:
        """Matrices of unit Frobenius norm."""
        size = self.weight().flatten(1).norm(dim=1).clamp_min(1e-12).sqrt()[:, None, None]
        for factor in (self.key, self.value):
            factor.div_(size)

    @torch.no_grad()
    def assign(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Make the matrices `rows` [m] equal sum_r key_r value_r^T: key [m, rank, d_k], value [m, rank, d_v]."""
        self.key[rows], self.value[rows] = key.to(self.key), value.to(self.value)


class _Matrices(nn.Module):
    """n matrices without structure."""

    def __init__(self, n_atoms: int, d_k: int, d_v: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(F.normalize(torch.randn(n_atoms, d_k * d_v), dim=-1).view(n_atoms, d_k, d_v))

    def weight(self) -> Tensor:
        """The matrices themselves, [n, d_k, d_v]."""
        return self.matrix

    @torch.no_grad()
    def assign(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Make the matrices `rows` [r] equal key value^T: key [r, d_k], value [r, d_v]."""
        self.matrix[rows] = (key[:, :, None] * value[:, None, :]).to(self.matrix)


class _Encoder:
    """What encoders add to their matrices: the bias, and the pre-activations of matrices."""

    factored = False  # whether its filters are key_i value_i^T, so that a history is encoded without its states

    def dense(self, x: Tensor) -> Tensor:
        """<weight_i, x> + bias_i for x [..., d_k, d_v] -> [..., n]."""
        return F.linear(x.flatten(-2), self.weight().flatten(1), self.bias)

    @torch.no_grad()
    def clear_bias(self, rows: Tensor) -> None:
        self.bias[rows] = 0


class BilinearEncoder(_Encoder, _Factors):
    """The paper's matched filter: key [n, d_k], value [n, d_v], bias [n]."""

    factored = True

    def __init__(self, n_atoms: int, d_k: int, d_v: int) -> None:
        super().__init__(n_atoms, d_k, d_v)
        self.bias = nn.Parameter(torch.zeros(n_atoms))


class TiedEncoder(_Encoder, nn.Module):
    """The decoder's own atoms as matched filters; bias [n]. What changes the atoms changes the filters."""

    factored = True

    def __init__(self, decoder: RankOneDecoder) -> None:
        super().__init__()
        object.__setattr__(self, "decoder", decoder)  # not a submodule: the parameters are the decoder's
        self.bias = nn.Parameter(torch.zeros(len(decoder.key)))

    @property
    def key(self) -> Tensor:
        return self.decoder.key

    @property
    def value(self) -> Tensor:
        return self.decoder.value

    def weight(self) -> Tensor:
        """The matrices themselves, [n, d_k, d_v]."""
        return self.decoder.weight()

    def normalise(self) -> None:
        """Nothing: the decoder does."""

    def assign(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Nothing: the decoder does."""


class LowRankEncoder(_Encoder, _LowRank):
    """Matched filters of a higher rank: key [n, rank, d_k], value [n, rank, d_v], bias [n]."""

    def __init__(self, n_atoms: int, d_k: int, d_v: int, rank: int) -> None:
        super().__init__(n_atoms, d_k, d_v, rank)
        self.bias = nn.Parameter(torch.zeros(n_atoms))


class DenseEncoder(_Encoder, _Matrices):
    """A linear map of vec(x): matrix [n, d_k, d_v], bias [n]. Table 10 puts no norm on it."""

    def __init__(self, n_atoms: int, d_k: int, d_v: int) -> None:
        super().__init__(n_atoms, d_k, d_v)
        self.bias = nn.Parameter(torch.zeros(n_atoms))

    def normalise(self) -> None:
        """Nothing: a dense encoder is free."""


class RankOneDecoder(_Factors):
    """Atoms key_i value_i^T: key [n, d_k], value [n, d_v]."""

    def dense(self, indices: Tensor, coefficients: Tensor) -> Tensor:
        """sum_j coefficients_j atom_indices_j for [..., k] -> [..., d_k, d_v]."""
        key, value = F.embedding(indices, self.key), F.embedding(indices, self.value)
        return (key * coefficients[..., None]).transpose(-1, -2) @ value


class _WholeDecoder:
    """Decoding with the atoms multiplied out."""

    def dense(self, indices: Tensor, coefficients: Tensor) -> Tensor:
        """sum_j coefficients_j atom_indices_j for [..., k] -> [..., d_k, d_v]."""
        weight = self.weight()
        spread = coefficients.new_zeros(*indices.shape[:-1], len(weight)).scatter(-1, indices, coefficients)
        return (spread @ weight.flatten(1)).unflatten(-1, weight.shape[1:])


class LowRankDecoder(_WholeDecoder, _LowRank):
    """Atoms of a higher rank: key [n, rank, d_k], value [n, rank, d_v]."""


class FlatDecoder(_WholeDecoder, _Matrices):
    """Atoms without structure: matrix [n, d_k, d_v]."""

    @torch.no_grad()
    def normalise(self) -> None:
        """Atoms of unit Frobenius norm (Table 10)."""
        self.matrix.div_(self.matrix.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None])


ENCODERS = {"bilinear": BilinearEncoder, "dense": DenseEncoder, "tied": TiedEncoder}
DECODERS = {"rank1": RankOneDecoder, "flat": FlatDecoder}


def check_parts(encoder: str, decoder: str, activation: str, rank: int) -> None:
    """Raises ValueError, in one sentence, for parts that do not exist or do not fit together."""
    if encoder not in ENCODERS or decoder not in DECODERS:
        raise ValueError(f"No SAE {encoder} + {decoder}: encoders {list(ENCODERS)}, decoders {list(DECODERS)}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"No SAE with the activation {activation}: choose one of {list(ACTIVATIONS)}.")
    if encoder == "tied" and decoder != "rank1":
        raise ValueError(f"No SAE tied + {decoder}: a tied encoder takes the atoms of a rank1 decoder.")
    if rank < 1 or rank > 1 and (encoder, decoder) != ("bilinear", "rank1"):
        raise ValueError(f"No SAE {encoder} + {decoder} of rank {rank}: above 1 only bilinear + rank1 has one.")
