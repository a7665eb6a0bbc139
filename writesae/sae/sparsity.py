"""Sparsity rules: from the pre-activations of all atoms to the coefficients of a few (the paper's App. B, Table 5).

| rule       | active are                                                       | reference                   |
|------------|------------------------------------------------------------------|-----------------------------|
| topk       | the k largest of a token                                         | Gao et al. 2024             |
| batch_topk | the k * tokens largest of a batch; later, those above a threshold | Bussmann et al. 2024        |
| jumprelu   | those above a learnt threshold of the atom                       | Rajamanoharan et al. 2024b  |
| gated      | those that a gate lets through; a rescaled copy says how much    | Rajamanoharan et al. 2024a  |

All are held to k active atoms a token on average, so that they are compared at one sparsity. (The paper's JumpReLU is
not: at 1,142 of 2,048.) Pre-activations are in scaled units, and so are thresholds; only positive ones make an atom
active. A training step is told by pre-activations that carry a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

FOLLOW = 0.01  # BatchTopK: weight of one batch in the running mean of its threshold
WIDTH = 0.05  # JumpReLU: width of the kernel through which thresholds learn
PACE = 10.0  # JumpReLU: how much faster than other parameters the logarithms of thresholds move; runs here are short
L1 = 0.1  # Gated: weight of the sparsity term at the start
L1_PACE = 0.05  # Gated: by which share that weight changes in a step, at most


class Active(NamedTuple):
    """Some atoms of every token, and their coefficients."""

    indices: Tensor  # [..., slots] int64
    coefficients: Tensor  # [..., slots], 0 where the atom is not active


class Activation(nn.Module):
    """A rule that gives every atom a coefficient, most of them 0: slots = n_atoms. TopK alone gives k slots."""

    every = True

    def __init__(self, n_atoms: int, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor, bias: Tensor, ordered: bool = True) -> Active:
        """Pre-activations [..., n] (of which bias [n] is a part) -> the active atoms; largest first, if `ordered`."""
        coefficients = self.coefficients(pre, bias)
        if ordered:
            return Active(*reversed(coefficients.sort(-1, descending=True)))
        return Active(torch.arange(pre.shape[-1], device=pre.device).expand(pre.shape), coefficients)

    def coefficients(self, pre: Tensor, bias: Tensor) -> Tensor:
        """[..., n]."""
        raise NotImplementedError

    def penalty(self, pre: Tensor) -> Tensor | float:
        """What the rule adds to the loss of a batch."""
        return 0.0

    def gate(self, pre: Tensor) -> Tensor | None:
        """Coefficients [..., n] that are to reconstruct as well, with the atoms held fixed; None for most rules."""
        return None

    def start(self, pre: Tensor, bias: Tensor) -> None:
        """Make about k atoms a token active: pre [..., n] of some tokens, and the encoder's bias [n], before training."""

    def restart(self, atoms: Tensor, bias: Tensor) -> None:
        """Make atoms [r] that start anew as easily active as the median atom; their entries of bias [n] are 0."""


def batch_threshold(pre: Tensor, k: int) -> Tensor:
    """The smallest of the k * tokens largest positive values of [..., n]; 0 where there are fewer."""
    values = pre.detach().flatten()
    return values.topk(k * (values.numel() // pre.shape[-1])).values[-1].clamp_min(0)


class TopK(Activation):
    """The k largest pre-activations of a token after ReLU."""

    every = False

    def forward(self, pre: Tensor, bias: Tensor, ordered: bool = True) -> Active:
        indices = pre.detach().topk(self.k, dim=-1, sorted=ordered).indices
        return Active(indices, pre.gather(-1, indices).relu())


class BatchTopK(Activation):
    """k a token on average. A token alone cannot know its batch, so outside training what reaches a fixed threshold is
    active: the running mean of the smallest coefficient that a batch kept."""

    def __init__(self, n_atoms: int, k: int) -> None:
        super().__init__(n_atoms, k)
        self.register_buffer("threshold", torch.zeros(()))

    def coefficients(self, pre: Tensor, bias: Tensor) -> Tensor:
        threshold = self.threshold
        if pre.requires_grad:
            threshold = batch_threshold(pre, self.k)
            self.threshold.lerp_(threshold, FOLLOW)
        return pre.relu() * (pre.detach() >= threshold)

    @torch.no_grad()
    def start(self, pre: Tensor, bias: Tensor) -> None:
        self.threshold.copy_(batch_threshold(pre, self.k))


class _Jump(torch.autograd.Function):
    """pre * H(pre - theta), or H(pre - theta) itself; thresholds get their gradient through a kernel of WIDTH."""

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
    """A learnt positive threshold an atom, and (L0 / k - 1)^2 in the loss, with L0 the active atoms of a token."""

    def __init__(self, n_atoms: int, k: int) -> None:
        super().__init__(n_atoms, k)
        self.level = nn.Parameter(torch.full((n_atoms,), WIDTH).log() / PACE)

    def threshold(self) -> Tensor:
        """[n], exp(PACE level)."""
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
    """exp(log_scale) (pre - bias) + offset where the gate pre > 0, after ReLU. The gate learns from an L1 term and by
    reconstructing alone; the weight of that term rises and falls until k atoms a token are active."""

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
        if pre.requires_grad:
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


ACTIVATIONS = {"topk": TopK, "batch_topk": BatchTopK, "jumprelu": JumpReLU, "gated": Gated}
