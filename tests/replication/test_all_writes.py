"""Page 06_all_writes: shares of the loss by hand, its cases on a small host, and its sentences."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SmallProfile, SmallStudy, assert_close

from replication import statistics
from replication.pages import all_writes
from replication.pages.all_writes import Case
from replication.study.profile import HostSection, load_profile
from writesae.evaluate.all_writes import MeanWrites, replace_all_writes
from writesae.files import save_tensors
from writesae.harvesting import harvest
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.text import Windows

LAYER = 1


def losses_of(unedited, **by_condition):
    """Losses of windows 0, 1, ... under some conditions of one SAE, or without one."""
    rows = []
    for name, values in by_condition.items():
        sae = "" if name in ("none", "native") else "main write"
        for window, (loss, of_native) in enumerate(zip(values, unedited, strict=True)):
            place = dict(sae=sae, condition=name, window=window, passage=window // 2)
            place |= dict(target=sae and "write", centre=sae and "none", role="main", seed=3.0 if sae else np.nan)
            rows.append(place | dict(loss=loss, loss_native=of_native))
    return pd.DataFrame(rows).sample(frac=1.0, random_state=3)


def test_the_share_recovered_is_of_the_mean_losses():
    native = np.array([2.0, 3.0, 1.0, 2.5])
    losses = losses_of(native, none=native + [0.4, 0.2, 0.1, 0.1], atom=native + [0.3, 0.1, 0.3, 0.1], native=native)
    table = all_writes.recovered(losses, 255, 200, seed=1).set_index("condition")
    assert table.loc["atom", "recovered"] == pytest.approx(0.0)
    assert (table.loc["none", "recovered"], table.loc["native", "recovered"]) == (0.0, 1.0)
    row = table.loc["atom"]
    assert (row.windows, row.passages, row.n) == (4, 2, 4 * 255)
    numbers = row[["loss_native", "loss", "loss_none", "change"]].astype(float)
    assert numbers.tolist() == pytest.approx([2.125, 2.325, 2.325, 0.2])
    # both passages 0: the change is 0.2 of 0.3; both passages 1: 0.2 of 0.1
    assert (row.ci_low, row.ci_high) == (pytest.approx(1 - 0.2 / 0.1), pytest.approx(1 - 0.2 / 0.3))


def test_pooled_rows_are_means_over_trainings():
    generator = np.random.default_rng(2)
    native, cost = 2 + generator.random(12), 0.1 + generator.random(12)
    first = losses_of(native, none=native + cost, atom=native + 0.5 * cost)
    change = cost * generator.random(12)
    other = losses_of(native, atom=native + change).assign(sae="main-none-1042 write", seed=1042.0)
    table = all_writes.pooled(pd.concat([first, other], ignore_index=True), 255, 100, seed=1)
    (row,) = table.itertuples()
    assert (row.target, row.centre, row.condition, row.role, row.seeds) == ("write", "none", "atom", "pooled", 2)
    share = np.array([0.5, change.mean() / cost.mean()])
    assert row.recovered == pytest.approx(1 - share.mean())
    assert row.change == pytest.approx((0.5 * cost + change).mean() / 2)
    assert row.loss == pytest.approx(native.mean() + row.change) and row.n == 12 * 255
    pairs, passages = np.stack([np.r_[0.5 * cost, change], np.r_[cost, cost]], 1), np.tile(np.arange(12) // 2, 2)
    wanted = statistics.over_trainings(pairs, passages, None, np.repeat([0, 1], 12), 100, 1).interval()
    assert (row.ci_low, row.ci_high) == (pytest.approx(1 - wanted.high), pytest.approx(1 - wanted.low))


def test_the_interval_of_a_ratio_is_the_bootstrap_of_rows():
    generator = np.random.default_rng(0)
    above, below, clusters = generator.random(40), 1 + generator.random(40), generator.integers(0, 9, 40)
    slow = statistics.cluster_bootstrap(lambda rows: above[rows].mean() / below[rows].mean(), clusters, resamples=300)
    assert statistics.ratio_bootstrap(above, below, clusters, 300, 0) == pytest.approx(slow)
    assert np.isnan(statistics.ratio_bootstrap(above, below, np.zeros(40), 300, 0)).all()


def test_windows_are_of_different_passages_in_order():
    windows = Windows(torch.arange(40)[:, None], torch.arange(40) // 4)
    drawn = all_writes.one_per_passage(windows, 6, seed=3)
    assert len(drawn) == 6 and drawn.passage.unique().tolist() == drawn.passage.tolist() == sorted(drawn.passage)
    assert (drawn.tokens[:, 0] // 4 == drawn.passage).all() and (drawn.tokens[:, 0] % 4 > 0).any()
    assert len(all_writes.one_per_passage(windows, 99, seed=3)) == 10
    other = all_writes.one_per_passage(windows, 6, seed=4)
    assert not torch.equal(drawn.tokens, other.tokens)


# On a small host, in fp32


@pytest.fixture(scope="module")
def host(gated_deltanet):
    return type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).float(), None, "small")


def sae_of(host, target, head):
    torch.manual_seed(head)
    sae = SAE(Architecture(n_atoms=24, k=3), host.d_k, host.d_v).requires_grad_(False)
    fields = dict(layer=LAYER, head=head, target=target, write="added", seed=7)
    sae.config = sae.config.model_copy(update=fields)
    return sae


def case_of(host, tokens, heads, together, stored=None):
    saes = {f"survey {target}": {head: sae_of(host, target, head) for head in heads} for target in ("state", "write")}
    windows = Windows(tokens, torch.tensor([0, 1, 1]))
    return Case(LAYER, heads, together, saes, windows, Windows(tokens[:2], torch.tensor([5, 6])), stored)


OPTIONS = dict(write="added", batch=2, resamples=50, seed=0)


def test_heads_one_after_another_or_together(host, tokens):
    apart, together = (case_of(host, tokens, (1, 3), both) for both in (False, True))
    table = all_writes.measure(0, host, [apart], **OPTIONS)
    assert list(table)[:8] == all_writes.KEYS
    assert table["head"].unique().tolist() == [1, 3] and (table.role == "survey").all()
    assert set(table[table.target == "state"].condition) == {"atom", "projection", "reconstruction", "read"}
    assert set(table[table.target == "write"].condition) == {"atom", "atom_and_mean", "projection", "reconstruction"}
    bare = table[table.target == ""]
    assert set(bare.condition) == {"native", "none", "mean_write", "token_mean_write"} and bare.seed.isna().all()
    both = all_writes.measure(1, host, [apart, together], **OPTIONS)
    assert both["head"].isna().all()
    means = all_writes.mean_writes(host, together, "added", 2)
    losses = replace_all_writes(host, together.windows, together.saes, means, layer=LAYER, batch=2)
    for condition, target in (("none", ""), ("atom", "write"), ("read", "state")):
        part = losses[(losses.condition == condition) & losses.sae.isin(["", f"survey {target}"])]
        ours = both[(both.condition == condition) & (both.target == target)].loss.item()
        assert ours == pytest.approx(part.loss.mean())


def test_stored_factors_give_the_same_means(host, tokens, tmp_path):
    harvested = harvest(host, tokens[:2], [(LAYER, 3)], progress=False)[LAYER, 3]
    save_tensors(tmp_path / "cell.safetensors", harvested.tensors(), {"fingerprint": "any"})
    cases = [case_of(host, tokens, (3,), False, stored) for stored in (None, tmp_path / "cell.safetensors")]
    assert [case.role for case in cases] == ["survey", "main"]
    table = all_writes.measure(1, host, cases, **OPTIONS)
    counts = table.groupby("role").size()
    assert (counts["main"], counts["survey"], counts["pooled"]) == (4, 8, 8)
    fresh, stored = (all_writes.mean_writes(host, case, "added", 2)[3] for case in cases)
    assert torch.equal(fresh.tokens, stored.tokens)
    assert_close(stored.matrices, fresh.matrices, "mean writes", 1e-6)
    assert isinstance(fresh, MeanWrites) and set(fresh.tokens.tolist()) == set(tokens[:2].flatten().tolist())


def test_the_table_has_every_sae_of_the_suite(host, tokens, tmp_path, monkeypatch):
    """The page over a small study with one chosen cell and a surveyed layer; a second call computes nothing."""
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    cell, path = (LAYER, 3), tmp_path / "cell.safetensors"
    harvested = harvest(host, tokens, [cell], progress=False)[cell]
    save_tensors(path, harvested.tensors(), {"fingerprint": "any"})
    whole = load_profile("smoke")
    saes = whole.saes.model_copy(update=dict(trainings=dict(mean=1, none=1)))
    sections = dict(saes=saes, replacement=whole.replacement)
    sections["all_writes"] = whole.all_writes.model_copy(update=dict(windows=3, survey_windows=2))
    hosts = dict(small=HostSection(path="models", cells=dict(middle=dict(layer=LAYER, head=3))))
    study = SmallStudy(SmallProfile("small", 42, hosts, whole.data, saes, sections), host, tokens)
    for name, value in dict(
        cell=lambda *_: cell, survey_layers=lambda _: (LAYER,), harvest_path=lambda *_: path
    ).items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "sae", lambda _, layer, head, target, role: sae_of(host, target, head))
    table = all_writes.all_writes(study)
    counts = table.groupby(["role", table["head"].isna()]).size().to_dict()
    per_cell, per_sae = 4, 8  # conditions without an SAE, and those of two targets
    wanted = {("main", False): per_cell + per_sae, ("main-none-42", False): per_sae, ("pooled", False): per_sae}
    wanted |= {("survey", False): host.heads * (per_cell + per_sae), ("survey", True): per_cell + per_sae}
    assert counts == wanted
    monkeypatch.setattr(all_writes, "replace_all_writes", None)
    pd.testing.assert_frame_equal(all_writes.all_writes(study), table)
    with pytest.raises(TypeError):
        all_writes.measure(0, host, [case_of(host, tokens, (3,), False)], **OPTIONS)
