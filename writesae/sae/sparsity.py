"""Sparsity rules: from the pre-activations of all atoms to a few coefficients (the paper's App. B, Table 5).

| rule       | active atoms                                                     | reference                  |
|------------|------------------------------------------------------------------|----------------------------|
| topk       | the k largest of a token                                         | Gao et al. 2024            |
| batch_topk | the k * tokens largest of a batch; after training by a threshold | Bussmann et al. 2024       |
| jumprelu   | those above a learnt threshold per atom                          | Rajamanoharan et al. 2024b |
| gated      | those whose gate is open; a rescaled copy gives the coefficient  | Rajamanoharan et al. 2024a |
| soft_gated | all, weighted by a sigmoid gate; rescaled in the same way        | the paper author's code    |

On average k atoms per token are active (the paper's JumpReLU: 1,142 of 2,048), those with positive
pre-activations, in scaled units; in soft_gated, k gates exceed 1/2. Rules adapt in training mode only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

PARTITIONED = 2048  # TopK: maximum length of rows that NumPy partitions
FOLLOW = 0.01  # BatchTopK: weight of one batch in the running mean of the threshold
WIDTH = 0.05  # JumpReLU: width of the kernel that gives thresholds their gradient
PACE = 10.0  # JumpReLU: speed of log thresholds relative to other parameters, since runs are short
L1 = 0.1  # Gated: weight of the sparsity term at the start
TAU = 0.1  # soft gate: its width
L1_PACE = 0.05  # Gated: maximum relative change of the L1 weight in one step


class Active(NamedTuple):
    """Some atoms of every token and their coefficients."""

    indices: Tensor  # [..., slots] int64
    coefficients: Tensor  # [..., slots], 0 where the atom is not active


class Activation(nn.Module):
    """A rule that gives every atom a coefficient, most of them 0."""

    every = True  # slots = n_atoms, not k

    def __init__(self, n_atoms: int, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor, bias: Tensor, ordered: bool = True) -> Active:
        """Return the active atoms for pre [..., n], which includes bias [n]; sorted if `ordered`."""
        coefficients = self.coefficients(pre, bias)
        if ordered:
            return Active(*reversed(coefficients.sort(-1, descending=True)))
        return Active(torch.arange(pre.shape[-1], device=pre.device).expand(pre.shape), coefficients)

    def coefficients(self, pre: Tensor, bias: Tensor) -> Tensor:
        """Return the coefficient of every atom, [..., n]."""

    def penalty(self, pre: Tensor) -> Tensor | float:
        """Return the rule's term in the loss of a batch."""
        return 0.0

    def gate(self, pre: Tensor) -> Tensor | None:
        """Return coefficients [..., n] for a second reconstruction in the loss, with fixed atoms, or None."""
        return None

    def start(self, pre: Tensor, bias: Tensor) -> None:
        """Set thresholds before training, so that about k atoms are active per token of pre [..., n]."""

    def restart(self, atoms: Tensor, bias: Tensor) -> None:
        """Make restarted atoms [r], whose bias is 0, as easily active as the median atom."""


def batch_threshold(pre: Tensor, k: int) -> Tensor:
    """Return the smallest of the k * tokens largest positive values of [..., n]; 0 where there are fewer."""
    values = pre.detach().flatten()
    return values.topk(k * (values.numel() // pre.shape[-1])).values[-1].clamp_min(0)


def largest(pre: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of each row of [..., n], in no order: [..., k].

    On a CPU, NumPy partitions short rows in a fraction of the time of torch.topk."""
    rows, n = pre.flatten(0, -2), pre.shape[-1]
    if rows.device.type == "cpu" and k < n <= PARTITIONED and rows.dtype in (torch.float32, torch.float64):
        least = torch.from_numpy(np.partition(rows.numpy(), n - k, axis=-1)[:, n - k, None])
        indices = (rows >= least).nonzero()[:, 1]
        if len(indices) == len(rows) * k:  # no row has equal values at its threshold
            return indices.view(*pre.shape[:-1], k)
    return pre.topk(k, dim=-1, sorted=False).indices


class TopK(Activation):
    """The k largest pre-activations of a token after ReLU."""

    every = False

    def forward(self, pre: Tensor, bias: Tensor, ordered: bool = True) -> Active:
        indices = pre.detach().topk(self.k, dim=-1).indices if ordered else largest(pre.detach(), self.k)
        return Active(indices, pre.gather(-1, indices).relu())


class BatchTopK(Activation):
    """The k * tokens largest pre-activations of a batch; in evaluation, those above the threshold."""

    def __init__(self, n_atoms: int, k: int) -> None:
        super().__init__(n_atoms, k)
        self.register_buffer("threshold", torch.zeros(()))

    def coefficients(self, pre: Tensor, bias: Tensor) -> Tensor:
        threshold = self.threshold
        if self.training:
            threshold = batch_threshold(pre, self.k)
            self.threshold.lerp_(threshold, FOLLOW)
        return pre.relu() * (pre.detach() >= threshold)

    @torch.no_grad()
    def start(self, pre: Tensor, bias: Tensor) -> None:
        self.threshold.copy_(batch_threshold(pre, self.k))


class _Jump(torch.autograd.Function):
    """pre * H(pre - theta), or H(pre - theta) if `step`; theta gets its gradient by a kernel of WIDTH."""

    @staticmethod
    def forward(ctx, pre: Tensor, theta: Tensor, step: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.step = step
        above = (pre > theta).to(pre)
        return above if step else pre * above

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        pre, theta = ctx.saved_tensors
        near = grad * ((pre - theta).abs() < WIDTH / 2) / WIDTH
        by_theta = -(near if ctx.step else theta * near).flatten(0, -2).sum(0)
        return (None if ctx.step else grad * (pre > theta)), by_theta, None


class JumpReLU(Activation):
    """A learnt threshold per atom. Its loss term is (L0 / k - 1)^2 for L0 active atoms per token."""

    def __init__(self, n_atoms: int, k: int) -> None:
        super().__init__(n_atoms, k)
        self.level = nn.Parameter(torch.full((n_atoms,), WIDTH).log() / PACE)

    def threshold(self) -> Tensor:
        """Return exp(PACE level), [n]."""
        return (PACE * self.level).exp()

    def coefficients(self, pre: Tensor, bias: Tensor) -> Tensor:
        return _Jump.apply(pre, self.threshold(), False)

    def penalty(self, pre: Tensor) -> Tensor:
        active = _Jump.apply(pre.detach(), self.threshold(), True).sum(-1).mean()
        return (active / self.k - 1).square()

    @torch.no_grad()
    def start(self, pre: Tensor, bias: Tensor) -> None:
        self.level.fill_(batch_threshold(pre, self.k).clamp_min(1e-6).log() / PACE)

    @torch.no_grad()
    def restart(self, atoms: Tensor, bias: Tensor) -> None:
        self.level[atoms] = self.level.median()


class Gated(Activation):
    """exp(log_scale) (pre - bias) + offset where the gate pre > 0, after ReLU.

    The gate learns from reconstruction and an L1 term, whose weight adapts to k atoms per token.
    """

    def __init__(self, n_atoms: int, k: int) -> None:
        super().__init__(n_atoms, k)
        self.log_scale = nn.Parameter(torch.zeros(n_atoms))
        self.offset = nn.Parameter(torch.zeros(n_atoms))
        self.register_buffer("l1", torch.tensor(L1))

    def coefficients(self, pre: Tensor, bias: Tensor) -> Tensor:
        magnitude = self.log_scale.exp() * (pre - bias) + self.offset
        return magnitude.relu() * (pre.detach() > 0)

    def penalty(self, pre: Tensor) -> Tensor:
        weight = self.l1.clone()
        if self.training:
            excess = (pre.detach() > 0).sum(-1).to(pre).mean() / self.k - 1
            self.l1.mul_(1 + L1_PACE * excess.clamp(-1, 1))
        return weight * self.gate(pre).sum(-1).mean()

    def gate(self, pre: Tensor) -> Tensor:
        return pre.relu()

    @torch.no_grad()
    def start(self, pre: Tensor, bias: Tensor) -> None:
        bias.sub_(batch_threshold(pre, self.k))

    @torch.no_grad()
    def restart(self, atoms: Tensor, bias: Tensor) -> None:
        self.log_scale[atoms], self.offset[atoms], bias[atoms] = 0.0, 0.0, bias.median()


class SoftGated(Gated):
    """Gated, with sigmoid(pre / TAU) in the place of the gate's step."""

    def coefficients(self, pre: Tensor, bias: Tensor) -> Tensor:
        magnitude = self.log_scale.exp() * (pre - bias) + self.offset
        return magnitude.relu() * (pre / TAU).sigmoid()


ACTIVATIONS = {"topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU, "gated": Gated, "soft_gated": SoftGated}
