"""One cell of a host in a native run, and what the edits of notebook 09 share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication.statistics import Interval, cluster_bootstrap
from writesae.edit import Edit, edited_hidden
from writesae.hosts.base import Host, Run
from writesae.recurrence import Factors

RESAMPLES = 500


@dataclass
class Site:
    """One cell of a host during a native run; write: which definition its native write has."""

    host: Host
    run: Run
    layer: int
    head: int
    write: str

    @cached_property
    def factors(self) -> Factors:
        return self.host.factors(self.run, self.layer, self.head)

    def native(self, rows: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Key [n, d_k], value [n, d_v] and Frobenius norm [n] of the native writes at these places."""
        key, value = self.factors.key[rows, position], self.factors.write(self.write)[rows, position]
        return key, value, key.norm(dim=-1) * value.norm(dim=-1)

    @torch.no_grad()
    def logits(self, rows: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The native logits [n, V] at these places."""
        return self.host.logits(self.run.final[rows, position])

    def edited(self, edit: Edit, steps: int) -> torch.Tensor:
        """Final hidden states [n, steps, D] under an edit."""
        return edited_hidden(self.host, self.run, self.layer, self.head, edit, steps)


def unit(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Random unit vectors along the last dimension."""
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def places(frame: pd.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns row (the window within a run) and position, as tensors [n]."""
    return torch.tensor(frame.row.to_numpy()), torch.tensor(frame.position.to_numpy())


def in_batches(frame: pd.DataFrame, size: int):
    """(first window, its lines with their row in the run) for every batch of `size` windows that has lines."""
    for number, part in frame.groupby(frame.window // size):
        yield int(number) * size, part.assign(row=part.window - int(number) * size)


def interval(values, clusters, statistic=np.mean, seed: int = 0) -> Interval:
    """The bootstrap interval by cluster, as often resampled as all of notebook 09."""
    return cluster_bootstrap(values, clusters, statistic, RESAMPLES, seed)
