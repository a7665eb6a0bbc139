"""The families of hosts, and nothing else in the package knows more than their names.

`build(family, architecture)` makes a new model with the decays that its authors train (design: a host must have
memory); `module(family)` is where its adapter stands.
"""

from __future__ import annotations

import importlib
import math

import torch

FAMILIES = {
    "gated_deltanet": "writesae.hosts.gated_deltanet",
    "mamba2": "writesae.hosts.mamba2",
    "rwkv7": "writesae.hosts.rwkv7",
    "delta_net": "writesae.hosts.delta_net",
    "gla": "writesae.hosts.gla",
}


def module(family: str):
    """The module of a family. Raises ValueError for a name that is not one."""
    if family not in FAMILIES:
        raise ValueError(f"There is no host family {family!r}: choose one of {', '.join(FAMILIES)}.")
    return importlib.import_module(FAMILIES[family])


def build(family: str, architecture: dict) -> torch.nn.Module:
    """A model with random weights and slow decays. `architecture`: the fields of the family's config."""
    return module(family).build(architecture)


def slow_decays(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A_log, dt_bias), each [heads]: A uniform in [1, 16], dt log-uniform in [1e-3, 0.1], as in Mamba's training.

    With alpha = exp(-A softplus(. + dt_bias)) heads then start with half-lives from about 1 to 600 tokens; the
    classes' own initial values give alphas near zero, and a state that holds a single write.
    """
    step = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
    inverse_softplus = step + torch.log(-torch.expm1(-step))
    return torch.empty(heads).uniform_(1, 16).log(), inverse_softplus
