"""A cell of a host in a native run, shared by the edits of notebook 11."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication.statistics import Interval, cluster_bootstrap, wider, wilson
from writesae.edit import Edit, edited_hidden
from writesae.evaluate.firings import Places
from writesae.hosts.base import Host, Run
from writesae.recurrence import Factors

RESAMPLES = 500


@dataclass
class Site:
    """One cell of a host in a native run. write: the definition of its native write.

    windows: the numbers of the run's windows; None if these are 0, 1, ..."""

    host: Host
    run: Run
    layer: int
    head: int
    write: str
    windows: np.ndarray | None = None

    @cached_property
    def factors(self) -> Factors:
        return self.host.factors(self.run, self.layer, self.head)

    def places(self, firings: pd.DataFrame) -> Places:
        """Return where firings are in the run."""
        return Places.of(firings, None if self.windows is None else pd.Index(self.windows).get_indexer(firings.window))

    def native(self, rows: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return key [n, d_k], value [n, d_v] and Frobenius norm [n] of the native writes at these places."""
        key, value = self.factors.key[rows, position], self.factors.write(self.write)[rows, position]
        return key, value, key.norm(dim=-1) * value.norm(dim=-1)

    @torch.no_grad()
    def logits(self, rows: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Return the native logits [n, V] at these places."""
        return self.host.logits(self.run.final[rows, position])

    def edited(self, edit: Edit, steps: int) -> torch.Tensor:
        """Return the final hidden states [n, steps, D] under an edit."""
        return edited_hidden(self.host, self.run, self.layer, self.head, edit, steps)


def unit(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Return random unit vectors along the last dimension."""
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def interval(values, clusters, statistic=np.mean, seed: int = 0) -> Interval:
    """Return the bootstrap interval by cluster, from RESAMPLES resamples."""
    return cluster_bootstrap(values, clusters, statistic, RESAMPLES, seed)


def share_interval(happened, *clusters, seed: int) -> Interval:
    """Return the wider of Wilson's interval of a share and its bootstraps by each kind of cluster."""
    bootstraps = [interval(happened, labels, seed=seed) for labels in clusters]
    return wider(wilson(int(happened.sum()), len(happened)), *bootstraps)
