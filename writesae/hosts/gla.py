"""GLA hosts (gated linear attention, Yang et al. 2024, arXiv 2312.06635): checkpoints in flash-linear-attention's format.

A state decays by one factor a channel and nothing is erased, so that the added write is the effective one; the
factors have an erase of zeros, as all with vector decays have one. tests/test_delta_net_gla.py holds this against a
step loop in fp64 and the package's model.
"""

from __future__ import annotations

import torch

from writesae.hosts.base import Past, Record
from writesae.hosts.fla_host import FLAHost, register
from writesae.hosts.fla_models import GLAConfig, GLAForCausalLM, project_gla, recur_gla, rms
from writesae.recurrence import Factors, decay_until

MODEL_CLASSES = ("GLAForCausalLM",)
DECAY_PARAMETERS = ("gk_proj",)

register(GLAForCausalLM)


def build(architecture: dict) -> torch.nn.Module:
    """A GLA with random weights, whose decays start at half-lives of about 16 tokens. `architecture`: fields of GLAConfig."""
    return GLAForCausalLM(GLAConfig(**architecture))


class GLA(FLAHost):
    family = "gla"
    scalar_decay = False

    def mix(self, layer: int, hidden: torch.Tensor, past: Past | None, positions: torch.Tensor) -> Record:
        factors, gate = project_gla(self.blocks[layer].attn, rms(self.blocks[layer].attn_norm, hidden))
        outputs, end = recur_gla(factors, **self.carried(past))
        return Record(hidden, outputs, factors, end, beside={"gate": gate})

    def state_at(self, record: Record, rows: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The states [R, H, d_k, d_v] before starts[r] of window rows[r], from the factors by one batched product."""
        longest = max(1, int(starts.max()))
        key, added, log_decay = (record.factors[name][rows, :longest] for name in ("key", "added", "log_decay"))
        seen = (torch.arange(longest, device=starts.device) < starts[:, None])[..., None, None]
        key = key * decay_until(log_decay, seen)
        return key.permute(0, 2, 3, 1) @ added.transpose(1, 2)

    def cell_factors(self, record: Record, head: int) -> Factors:
        f = {name: x[:, :, head] for name, x in record.factors.items()}
        nothing = torch.zeros_like(f["key"])
        return Factors(**f, effective=f["added"], erase=nothing, probe=nothing)


ADAPTER = GLA
