"""A cell's history: the factors of all states, and what is computed from them without states.

    X_t = exp(log_decay_t) X_{t-1} + key_t value_t^T      (target "state"; Sec. 2 of the paper; X starts at 0)
    X_t = key_t value_t^T                                 (target "write")

In a chunk, a linear function of X_t is D times that of the writes, plus a term carried from the chunk before;
D_ts = exp(log_decay_{s+1} + ... + log_decay_t). Decays are summed in fp64, since long sums are subtracted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.recurrence import TensorFields, decay_between, decay_until, split_chunks

CHUNK = 64
GROUP = 64  # maximum number of windows, or places, per batch
VECTOR_GROUP = 8  # the same for windows whose states are rebuilt
VECTOR_NUMBERS = 2**26  # maximum size of the states that are rebuilt at once (but at least one window)


class Origin(NamedTuple):
    """The cell of a history. write: added or effective, the definition of its native write."""

    host: str | None
    layer: int
    head: int
    write: str


class Chunks(NamedTuple):
    """A history cut into C chunks of L tokens, the last one padded with zeros."""

    key: Tensor  # [N, C, L, d_k]
    value: Tensor  # [N, C, L, d_v]
    decay: Tensor  # [N, C, L, L]: from token s to token t of the same chunk, 0 where s > t
    carry: Tensor  # [N, C, L]: from the last token of the chunk before to token t


@dataclass(frozen=True, eq=False)
class History(TensorFields):
    """N windows of T tokens of one cell, each from a zero state; floating point, fp32 in a harvest.

    key [N, T, d_k]; value [N, T, d_v]; log_decay [N, T] (target "state") or None (target "write"). origin:
    the cell, if known, which an SAE records. Raises ValueError for wrong shapes, dtypes and values.
    """

    key: Tensor
    value: Tensor
    log_decay: Tensor | None = None
    origin: Origin | None = field(default=None, kw_only=True)

    factored: ClassVar[bool] = True  # inner products with rank-1 matrices need no X_t

    def __post_init__(self) -> None:
        shapes = [tuple(x.shape) for x in self.tensors().values()]
        fits = self.key.dim() == 3 and self.value.dim() == 3 and all(s[:2] == shapes[0][:2] for s in shapes)
        if not fits or 0 in shapes[0] + shapes[1] or len(shapes) == 3 and len(shapes[2]) != 2:
            wanted = "key [N, T, d_k], value [N, T, d_v] and log_decay [N, T] or None"
            raise ValueError(f"A history needs {wanted}; got {shapes}.")
        self._check_values()

    def _check_values(self) -> None:
        tensors = self.tensors()
        if len({x.dtype for x in tensors.values()}) > 1 or not self.key.is_floating_point():
            listed = ", ".join(f"{name} in {x.dtype}" for name, x in tensors.items())
            raise ValueError(f"A history needs all its tensors in one floating-point type; got {listed}.")
        if all(torch.isfinite(x.sum()) for x in tensors.values()):  # fast; a sum can also overflow
            return
        bad = {name: (~x.isfinite()).reshape(*self.shape, -1).sum(-1) for name, x in tensors.items()}
        per_token = sum(bad.values())
        if not per_token.any():
            return
        window, position = per_token.nonzero()[0].tolist()
        names = " and ".join(name for name, count in bad.items() if count[window, position])
        count = int(per_token.sum())
        values = f"{count} values that are" if count > 1 else "1 value that is"
        place = f"window {window}, position {position}: in {names}"
        raise ValueError(f"The harvest holds {values} not finite, the first at {place}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T): windows, and tokens per window."""
        return self.key.shape[0], self.key.shape[1]

    @property
    def d_k(self) -> int:
        return self.key.shape[2]

    @property
    def d_v(self) -> int:
        return self.value.shape[2]

    @property
    def target(self) -> str:
        return "write" if self.log_decay is None else "state"

    def __len__(self) -> int:
        return self.key.shape[0]

    def __getitem__(self, index: Tensor | slice | list[int] | int) -> History:
        """Return the windows at `index`; for an int a history with N = 1."""
        if isinstance(index, int):
            index = [index]
        return self.map(lambda x: x[index])

    def groups(self, windows: int = GROUP) -> Iterator[History]:
        """Yield the history in parts of at most `windows` windows, in order."""
        for start in range(0, len(self), windows):
            yield self[start : start + windows]

    def factors_at(self, window: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return key [M, d_k] and value [M, d_v] at chosen places: window [M], position [M] (int64)."""
        return self.key[window, position], self.value[window, position]

    def fingerprint(self) -> str:
        """Return a hash of all values."""
        digest = hashlib.sha256(str((self.shape, self.target, self.key.dtype)).encode())
        for x in self.tensors().values():
            digest.update(x.detach().cpu().contiguous().numpy())
        return digest.hexdigest()

    def double(self) -> History:
        """Return the same history in fp64."""
        return self.map(Tensor.double)

    def walk(self) -> Iterator[Tensor]:
        """Yield X_0, X_1, ... one token at a time, each [N, d_k, d_v], by the recurrence as written above."""
        state = torch.zeros_like(self.key[:, 0, :, None] * self.value[:, 0, None, :])
        for t in range(self.key.shape[1]):
            write = self.key[:, t, :, None] * self.value[:, t, None, :]
            state = write if self.log_decay is None else self.log_decay[:, t, None, None].exp() * state + write
            yield state

    def steps(self) -> Tensor:
        """Return all X_t, [N, T, d_k, d_v], which is large: writes, to which the decayed past is added."""
        states = self._writes()
        if self.log_decay is not None:
            decay = self.log_decay.exp().view(*self.shape, -1, 1)
            for t in range(1, self.shape[1]):
                states[:, t].addcmul_(decay[:, t], states[:, t - 1])
        return states

    def _writes(self) -> Tensor:
        """Return what enters the states at each token, [N, T, d_k, d_v]."""
        return self.key[..., None] * self.value[..., None, :]

    @cached_property
    def chunks(self) -> Chunks:
        """The padded chunks and their decays (target "state" only)."""
        key, value = (split_chunks(x, CHUNK) for x in (self.key, self.value))
        total = split_chunks(self.log_decay, CHUNK, -1).double().cumsum(-1)
        return Chunks(key, value, decay_between(total, key.dtype), total.exp().to(key.dtype))

    def read(self, left: Tensor, right: Tensor, bf16: bool = False) -> Tensor:
        """Return left_i^T X_t right_i, [N, T, n], for left [n, d_k], right [n, d_v]; bf16: rounded."""
        product = _RoundedProduct.apply if bf16 else lambda x, y: x @ y.T
        if self.log_decay is None:
            return product(self.key, left) * product(self.value, right)
        chunks = self.chunks
        x = product(chunks.key, left) * product(chunks.value, right)
        out = _Scan.apply(x, chunks.decay, chunks.carry)
        return out.flatten(1, 2)[:, : self.key.shape[1]]

    def project(self, matrix: Tensor) -> Tensor:
        """Return <X_t, matrix>, [N, T], for matrix [d_k, d_v], differentiable in the matrix."""
        if self.log_decay is None:
            return self._inner(matrix)
        chunks = self.chunks
        x = ((chunks.key @ matrix) * chunks.value).sum(-1, keepdim=True)
        return _Scan.apply(x, chunks.decay, chunks.carry).flatten(1)[:, : self.key.shape[1]]

    def _inner(self, matrix: Tensor) -> Tensor:
        write = ((self.key @ matrix) * self.value).sum(-1)
        return write if self.log_decay is None else _scan(self.log_decay, write)

    def energy(self, centre: Tensor | None = None) -> Tensor:
        """Return ||X_t - centre||_F^2, [N, T]; centre [d_k, d_v], by default zero; computed in fp64."""
        centre = self.key.new_zeros(self.d_k, self.d_v) if centre is None else centre
        centre = centre.double()
        parts = []
        for part in (group.double() for group in self.groups()):
            parts.append(part._energy() - 2 * part._inner(centre) + centre.square().sum())
        return torch.cat(parts).clamp_min(0).to(self.key.dtype)

    def _energy(self) -> Tensor:
        """Sum Gram matrices of keys and values within a chunk, and carry one state per window."""
        if self.log_decay is None:
            return self.key.square().sum(-1) * self.value.square().sum(-1)
        state = self.key.new_zeros(len(self), self.d_k, self.d_v)
        out = []
        for key, value, decay, carry in zip(*(x.unbind(1) for x in self.chunks)):
            gram = (key @ key.transpose(1, 2)) * (value @ value.transpose(1, 2))
            cross = (decay @ ((key @ state) * value).sum(-1, keepdim=True)).squeeze(-1)
            within = ((decay @ gram) * decay).sum(-1)
            out.append(within + 2 * carry * cross + carry.square() * state.square().sum((1, 2))[:, None])
            state = carry[:, -1, None, None] * state + (key * decay[:, -1, :, None]).transpose(1, 2) @ value
        return torch.cat(out, dim=1)[:, : self.key.shape[1]]

    def mean(self) -> Tensor:
        """Return the mean of X_t over all windows and positions, [d_k, d_v]; computed in fp64."""
        total = sum(part.double()._sum() for part in self.groups())
        return (total / (self.shape[0] * self.shape[1])).to(self.key.dtype)

    def _sum(self) -> Tensor:
        """Weight the write at s by 1 + alpha_{s+1} + alpha_{s+1} alpha_{s+2} + ...: a scan from the end."""
        weight = torch.ones_like(self.key[..., 0])
        if self.log_decay is not None:
            weight = _scan(self.log_decay.roll(-1, dims=1).flip(1), weight).flip(1)
        return torch.einsum("nt,ntk,ntv->kv", weight, self.key, self.value)

    def matrices(self, window: Tensor, position: Tensor) -> Tensor:
        """Return X at chosen places, [M, d_k, d_v]: window [M], position [M] (int64)."""
        parts = list(map(self._matrices, window.split(GROUP), position.split(GROUP)))
        return torch.cat(parts) if parts else self.key.new_zeros(0, self.d_k, self.d_v)

    def _matrices(self, window: Tensor, position: Tensor) -> Tensor:
        if self.log_decay is None:
            return self.key[window, position, :, None] * self.value[window, position, None, :]
        total = self.log_decay[window].double().cumsum(1)
        since = total.gather(1, position[:, None]) - total
        later = torch.arange(total.shape[1], device=total.device) > position[:, None]
        weight = since.masked_fill(later, -torch.inf).exp().to(self.key.dtype)
        return (self.key[window] * weight[..., None]).transpose(1, 2) @ self.value[window]


@dataclass(frozen=True, eq=False)
class States:
    """All X_t of some windows as they are, [N, T, d_k, d_v], with the products of a history."""

    matrices: Tensor

    def read(self, left: Tensor, right: Tensor, bf16: bool = False) -> Tensor:
        """Return the same as History.read, without rounding."""
        return self.matrices.flatten(-2) @ (left[:, :, None] * right[:, None]).flatten(1).T

    def read_at(self, indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return `read` of the atoms `indices` [N, T, k] of each token, [N, T, k]."""
        left, right = (F.embedding(indices, x) for x in (left, right))
        return ((left @ self.matrices) * right).sum(-1)

    def project(self, matrix: Tensor) -> Tensor:
        """Return the same as History.project."""
        return self.matrices.flatten(-2) @ matrix.flatten()


@dataclass(frozen=True, eq=False)
class VectorHistory(History):
    """States with one decay per key channel, as in RWKV-7 and GLA, rebuilt for a few windows at a time:

        X_t = diag(exp(log_decay_t)) X_{t-1} + key_t value_t^T - erase_t taken_t^T

    log_decay, erase [N, T, d_k]; taken [N, T, d_v]: the erase's value side, read from X_{t-1}.
    """

    erase: Tensor | None = None
    taken: Tensor | None = None

    factored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        shapes = {name: tuple(x.shape) for name, x in self.tensors().items()}
        key, value = shapes["key"], shapes["value"]
        wanted = dict(key=key, value=(*key[:2], *value[2:]), log_decay=key, erase=key, taken=value)
        if len(shapes) != 5 or len(key) != 3 or len(value) != 3 or 0 in key + value or shapes != wanted:
            wanted = "key, log_decay, erase [N, T, d_k] and value, taken [N, T, d_v]"
            raise ValueError(f"A history with vector decays needs {wanted}; got {shapes}.")
        self._check_values()

    def groups(self, windows: int = VECTOR_GROUP) -> Iterator[History]:
        return super().groups(min(windows, VECTOR_GROUP, at_once(self)))

    def walk(self) -> Iterator[Tensor]:
        state = torch.zeros_like(self.key[:, 0, :, None] * self.value[:, 0, None, :])
        for t in range(self.key.shape[1]):
            erased = self.erase[:, t, :, None] * self.taken[:, t, None]
            write = self.key[:, t, :, None] * self.value[:, t, None] - erased
            state = self.log_decay[:, t, :, None].exp() * state + write
            yield state

    def _writes(self) -> Tensor:
        return torch.stack([self.key, -self.erase], -1) @ torch.stack([self.value, self.taken], -2)

    def read(self, left: Tensor, right: Tensor, bf16: bool = False) -> Tensor:
        """Return the same as History.read, from states and without rounding."""
        return States(self.steps()).read(left, right)

    def _inner(self, matrix: Tensor) -> Tensor:
        return self.steps().flatten(-2) @ matrix.flatten()

    def _energy(self) -> Tensor:
        return self.steps().square().sum((-1, -2))

    def _sum(self) -> Tensor:
        return self.steps().sum((0, 1))

    def _matrices(self, window: Tensor, position: Tensor) -> Tensor:
        if at_once(self) >= GROUP:
            unique, which = window.unique(return_inverse=True)
            return self[unique].steps()[which, position]
        key, value, log_decay, erase, taken = (x[window] for x in self.tensors().values())
        seen = (torch.arange(key.shape[1], device=key.device) <= position[:, None])[..., None]
        weight = decay_until(log_decay, seen)
        return (key * weight).mT @ value - (erase * weight).mT @ taken


def at_once(history: History) -> int:
    """Return the number of windows, at least one, whose states are rebuilt at once."""
    return max(1, VECTOR_NUMBERS // (history.shape[1] * history.d_k * history.d_v))


def _scan(log_decay: Tensor, x: Tensor) -> Tensor:
    """Return p_t = exp(log_decay_t) p_{t-1} + x_t, [N, T], by a plain loop."""
    out, decay = x.clone(), log_decay.exp()
    for t in range(1, x.shape[1]):
        out[:, t].addcmul_(decay[:, t], out[:, t - 1])
    return out


class _RoundedProduct(torch.autograd.Function):
    """x y^T of x [..., d], without gradient, and y [n, d], both rounded to bf16; sums and result in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        shape, x = x.shape[:-1], x.bfloat16().flatten(0, -2)
        ctx.save_for_backward(x)
        return _mm(x, y.bfloat16().T).view(*shape, -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, _mm(grad.bfloat16().flatten(0, -2).T, *ctx.saved_tensors)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Return a b of bf16 matrices, in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _Scan(torch.autograd.Function):
    """p_t = alpha_t p_{t-1} + x_t for x [N, C, L, n]: D x within chunks, then the carried row."""

    @staticmethod
    def forward(ctx, x: Tensor, decay: Tensor, carry: Tensor) -> Tensor:
        ctx.save_for_backward(decay, carry)
        out = decay @ x
        for c in range(1, out.shape[1]):
            out[:, c].addcmul_(carry[:, c, :, None], out[:, c - 1, -1:])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Apply the transpose: D^T grad, plus the gradient of later chunks through the carried row."""
        decay, carry = ctx.saved_tensors
        out = decay.transpose(-1, -2) @ grad
        carried = (carry[:, :, None] @ grad).squeeze(2)  # [N, C, n]: gradient of the row carried into chunk c
        for c in range(out.shape[1] - 1, 0, -1):
            out[:, c - 1].addcmul_(decay[:, c - 1, -1, :, None], carried[:, c, None])
            carried[:, c - 1].addcmul_(carry[:, c - 1, -1:], carried[:, c])
        return out, None, None
