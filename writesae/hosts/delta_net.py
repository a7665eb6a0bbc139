"""DeltaNet hosts (Yang et al. 2024, arXiv 2406.06484): checkpoints in flash-linear-attention's format.

A Gated DeltaNet that never decays: only the erase along its key takes anything out of a state, so that log decays are
zero and half-lives infinite. tests/test_delta_net_gla.py holds this against a step loop in fp64 and the package's model.
"""

from __future__ import annotations

import torch

from writesae.hosts.base import Past, Record
from writesae.hosts.fla_host import FLAHost, register
from writesae.hosts.fla_models import DeltaNetConfig, DeltaNetForCausalLM, project_delta, recur_delta, rms
from writesae.recurrence import Factors

MODEL_CLASSES = ("DeltaNetForCausalLM",)
DECAY_PARAMETERS = ()

register(DeltaNetForCausalLM)


def build(architecture: dict) -> torch.nn.Module:
    """A DeltaNet with random weights. `architecture`: fields of DeltaNetConfig."""
    return DeltaNetForCausalLM(DeltaNetConfig(**architecture))


class DeltaNet(FLAHost):
    family = "delta_net"
    scalar_decay = True

    def mix(self, layer: int, hidden: torch.Tensor, past: Past | None, positions: torch.Tensor) -> Record:
        mixer, normed = self.blocks[layer].attn, rms(self.blocks[layer].attn_norm, hidden)
        query, key, value, beta, raw = project_delta(mixer, normed, past and past.windows["conv"])
        outputs, effective, end = recur_delta(query, key, value, beta, **self.carried(past))
        factors = dict(query=query, key=key, added=beta[..., None] * value, effective=effective, beta=beta)
        factors["log_decay"] = torch.zeros_like(beta)
        reach = mixer.q_conv1d.kernel_size[0] - 1
        return Record(hidden, outputs, factors, end, windows={"conv": (raw, reach)})

    def cell_factors(self, record: Record, head: int) -> Factors:
        f = {name: x[:, :, head] for name, x in record.factors.items()}
        key, beta, log_decay = f["key"], f["beta"][..., None], f["log_decay"][..., None]
        return Factors(f["query"], key, f["added"], log_decay, effective=f["effective"], erase=beta * key, probe=key)


ADAPTER = DeltaNet
