"""The multiverse, compared with the plain replacement test; its tables, compared with values by hand."""

import copy
from itertools import product
from math import prod

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from helpers import train_sae
from pydantic import BaseModel

from replication.pages import heads_and_seeds, multiverse
from replication.statistics import cluster_bootstrap
from replication.study import training
from replication.study.profile import HostSection, load_profile
from replication.study.stages import rows_with
from replication.study.study import Study
from writesae import files
from writesae.edit import edited_hidden, kl, make_edit
from writesae.evaluate import firings, replacement
from writesae.harvesting import harvest
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.sae.train import TrainingSettings
from writesae.text import Windows

CELL, HORIZON = (1, 2), 3


def in_fp32(host):
    return type(host)(copy.deepcopy(host.model).float(), None, "small")


@pytest.fixture(scope="module")
def single(host):
    """Each host family in fp32, the precision of the experiments."""
    return in_fp32(host)


@pytest.fixture(scope="module")
def small(gated_deltanet):
    return in_fp32(gated_deltanet)


def cell_sae_of(host, tokens, target, write):
    """A cell with an SAE of random weights. These tests need no trained atoms."""
    torch.manual_seed(2)
    factors = harvest(host, tokens, [CELL], batch=3, progress=False)[CELL]
    sae = SAE(Architecture(n_atoms=24, k=4), host.d_k, host.d_v)
    return firings.encode_cell(CELL, target, write, sae, factors)


def some_firings(cell_sae, count=4):
    every = firings.all_firings(cell_sae, torch.tensor([0, 1, 2]), 8, 80)
    drawn = firings.draw_in_rounds(every, count, seed=5)
    return drawn, firings.Places.of(drawn)


# The measurement


def test_the_next_token_is_the_replacement_test_s(single, tokens):
    """Compares the columns of the default reading with `replacement.replace`, on each host family."""
    for target in ("state", "write"):
        run, cell_sae = single.run(tokens), cell_sae_of(single, tokens, target, "added")
        some, order = some_firings(cell_sae), ["window", "position", "amplitude", "read"]
        here = multiverse.measure(single, run, cell_sae, *some, 3, HORIZON).sort_values(order)
        there = replacement.replace(single, run, cell_sae, *some, 3).sort_values(order)
        assert here[order].to_numpy().tolist() == there[order].to_numpy().tolist()
        for name in ("atom", "delete", "random", "mean_write", "resampled"):
            found, wanted = here[f"{name}.next.native_patched"], there[f"kl_{name}"]
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-9, err_msg=f"{target} {name}")


@pytest.mark.parametrize(("target", "write"), [("state", "effective"), ("write", "added")])
def test_every_column_is_a_run_of_that_edit(small, tokens, target, write):
    """Compares each condition, horizon and direction with an edited run, built from full matrices."""
    run, cell_sae, seed = small.run(tokens), cell_sae_of(small, tokens, target, write), 3
    drawn, places = some_firings(cell_sae, 2)
    table = multiverse.measure(small, run, cell_sae, drawn, places, seed, HORIZON)
    f = small.factors(run, *CELL)
    put_in = replacement.replacements(cell_sae, places, f, seed)
    put_in["fresh"] = multiverse.fresh(seed, places, small.d_k, small.d_v)
    for row in table.itertuples():
        i = int(np.flatnonzero((drawn.window == row.window) & (drawn.position == row.position))[0])
        w, t = torch.tensor([row.window]), torch.tensor([row.position])
        native = f.key[w, t][0, :, None] * f.write(write)[w, t][0]
        norm = row.coefficient if row.amplitude == "coefficient" else native.norm()
        matrices = {name: norm * put_in[name][0][i].T @ put_in[name][1][i] for name in multiverse.PUT_IN}
        for name, matrix in (matrices | dict(delete=0 * native)).items():
            edit = make_edit(w, t, torch.eye(small.d_k)[None], (matrix - native)[None], row.read)
            hidden = edited_hidden(small, run, *CELL, edit, HORIZON + 1)[0]
            pair = small.logits(run.final[w[0], t[0] : t[0] + HORIZON + 1]), small.logits(hidden)
            for direction, (p, q) in zip(multiverse.DIRECTIONS, (pair, pair[::-1])):
                wanted = kl(p, q)
                wanted = dict(writing=wanted[0], next=wanted[1], mean=wanted[1:].mean())
                for horizon in multiverse.HORIZONS:
                    if (row.read, horizon) == ("cache", "writing"):
                        continue
                    found = table.loc[row.Index, f"{name}.{horizon}.{direction}"]
                    assert found == pytest.approx(wanted[horizon].item(), rel=2e-3, abs=1e-9), (
                        name,
                        horizon,
                        direction,
                    )


def test_what_nobody_has_read_changes_nothing(single, tokens):
    """Compares the KL at the writing position with 0: equal if only the cache is edited, larger otherwise."""
    cell_sae = cell_sae_of(single, tokens, "write", "added")
    table = multiverse.measure(single, single.run(tokens), cell_sae, *some_firings(cell_sae), 3, HORIZON)
    writing = table.filter(like=".writing.")
    assert writing.shape[1] == 2 * 6
    assert (writing[table.read == "cache"] == 0).all(axis=None)
    assert (writing[table.read == "write"] > 0).any(axis=None)
    assert (table.loc[table.read == "cache"].filter(like=".next.") > 0).any(axis=None)


def test_a_fresh_direction_follows_from_seed_and_firing_alone(small, tokens):
    drawn, places = some_firings(cell_sae_of(small, tokens, "write", "added"))
    left, right = multiverse.fresh(3, places, 12, 20)
    matrices = left.mT @ right
    torch.testing.assert_close(matrices.flatten(1).norm(dim=1), torch.ones(len(drawn)))
    again = multiverse.fresh(3, firings.Places.of(drawn.iloc[::-1]), 12, 20)
    torch.testing.assert_close(again[0].flip(0).mT @ again[1].flip(0), matrices, rtol=0, atol=0)
    other = multiverse.fresh(4, places, 12, 20)
    assert ((other[0].mT @ other[1] - matrices).flatten(1).norm(dim=1) > 0.1).all()
    assert ((matrices[0] * matrices[1]).sum()).abs() < 0.9


def test_both_ways_of_a_coin():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    found = multiverse.both_ways(p.log()[None], q.log()[None])
    assert found.shape == (2, 1)
    assert found[0].item() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-6)
    assert found[1].item() == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5), rel=1e-6)


def test_batches_do_not_change_the_table(small, tokens):
    cell_sae = cell_sae_of(small, tokens, "state", "added")
    arguments = small, small.run(tokens), cell_sae, *some_firings(cell_sae), 3, HORIZON
    order = ["window", "position", "amplitude", "read"]
    one, all_ = (multiverse.measure(*arguments, batch_rows=n).sort_values(order) for n in (1, 4096))
    np.testing.assert_allclose(one.filter(like="."), all_.filter(like="."), rtol=2e-3, atol=1e-9)


# Firings


def test_the_most_firing_atoms_and_no_others():
    frame = pd.DataFrame(dict(window=0, position=range(1000), atom=[0] * 500 + [1] * 350 + [2] * 150, coefficient=1.0))
    assert multiverse.most_firing(frame, 2, 40, seed=0).atom.value_counts().to_dict() == {0: 20, 1: 20}
    assert multiverse.most_firing(frame, 2, 600, seed=0).atom.value_counts().to_dict() == {0: 300, 1: 300}
    with pytest.raises(ValueError, match="hold 600"):
        multiverse.most_firing(frame, 2, 601, seed=0)


def test_definitions_that_differ(tokens, single):
    factors = harvest(single, tokens[:1], [CELL], batch=1, progress=False)[CELL]
    wanted = dict.fromkeys(["gated_deltanet", "delta_net", "kda"], ("added", "effective"))
    assert training.write_definitions(factors) == wanted.get(single.family, ("added",))


# Universes


def a_table(seed=0, hosts=("a",), firings=12):
    """Firings with random KLs, for each combination of the choices that select the firings."""
    generator, rows = np.random.default_rng(seed), []
    names = ["atom", *multiverse.CONTROLS]
    columns = [".".join(x) for x in product(names, multiverse.HORIZONS, multiverse.DIRECTIONS)]
    drawn = product(hosts, *(multiverse.CHOICES[c] for c in multiverse.DRAWN))
    for host, target, centre, write, pooling in drawn:
        for i, read, amplitude in product(range(firings), ("write", "cache"), multiverse.AMPLITUDES):
            row = dict(host=host, target=target, centre=centre, write=write, pooling=pooling, place="middle")
            row |= dict(layer=1, head=0)
            row |= dict(atom=i % 4, passage=i % 3, window=i, position=9, read=read, amplitude=amplitude)
            rows.append(row | dict(zip(columns, generator.random(len(columns)))))
    return pd.DataFrame(rows)


def test_there_are_as_many_universes_as_choices_multiply_to():
    lines = multiverse.universes(multiverse.gains(a_table(hosts=("a", "b"))), resamples=20, seed=0)
    assert prod(map(len, multiverse.CHOICES.values())) == 2**5 * 3 * 5 * 5 == 2400
    assert lines.groupby("host").size().to_dict() == dict(a=2400, b=2400)
    assert not lines.duplicated(["host", *multiverse.CHOICES]).any()
    assert len(rows_with(lines, **multiverse.DEFAULT)) == len(rows_with(lines, **multiverse.PAPER)) == 2
    assert "cache, writing" not in set(lines.reading)


def test_win_rates_by_hand():
    table = a_table()
    lines = multiverse.universes(multiverse.gains(table), resamples=200, seed=1)
    for line in lines.sample(40, random_state=0).itertuples():
        read, horizon = line.reading.split(", ")
        part = table[(table.target == line.target) & (table.write == line.write) & (table.pooling == line.pooling)]
        part = part[part.centre == line.centre]
        part = part[(part.read == read) & (part.amplitude == line.amplitude)]
        atom, other = (part[f"{name}.{horizon}.{line.kl_direction}"] for name in ("atom", line.control))
        assert line.n == 12 and line.n_atoms == 4 and line.n_passages == 3
        assert line.win_rate == pytest.approx(np.mean([a < o for a, o in zip(atom, other)]))
        assert line.median_gain == pytest.approx(np.median(other.to_numpy() - atom.to_numpy()))
        assert line.ci_low <= line.win_rate <= line.ci_high
        wanted = cluster_bootstrap((atom < other).to_numpy(float), part.atom, resamples=200, seed=1)
        assert (line.boot_low, line.boot_high) == pytest.approx(tuple(wanted))
        wanted = cluster_bootstrap((atom < other).to_numpy(float), part.passage, resamples=200, seed=1)
        assert (line.passage_low, line.passage_high) == pytest.approx(tuple(wanted))


def test_a_tie_is_no_win():
    table = a_table()
    columns = [name for name in table if "." in name]
    table[columns] = 0.25
    assert (multiverse.universes(multiverse.gains(table), 10, 0).win_rate == 0).all()


def test_one_bootstrap_for_all_columns():
    generator = np.random.default_rng(0)
    values, clusters = generator.random((50, 3)), generator.integers(0, 7, 50).astype(str)
    low, high = cluster_bootstrap(values, clusters, resamples=300, seed=4)
    for column in range(3):
        wanted = cluster_bootstrap(values[:, column], clusters, resamples=300, seed=4)
        assert (low[column], high[column]) == pytest.approx(tuple(wanted), rel=1e-12)
    assert np.isnan(cluster_bootstrap(values, ["one"] * 50)).all()


def with_effects(**probabilities):
    """Firings with a known win rate: the sum of the shares that `of` gives to each (choice, level)."""
    won = multiverse.gains(a_table(firings=20))
    share = sum((won[choice] == level) * p for (choice, level), p in probabilities["of"].items())
    order = won.groupby(["host", *multiverse.CHOICES]).cumcount()
    return won.assign(gain=np.where(order < 20 * share, 1.0, -1.0))


def test_effects_by_hand():
    """Compares the effects with the rule: 0.2, plus 0.4 if write-trained, plus 0.2 if random control."""
    won = with_effects(of={("target", "state"): 0.2, ("target", "write"): 0.6, ("control", "random"): 0.2})
    lines = multiverse.universes(won, 20, 0)
    found = multiverse.effects(won, lines, 50, 0).set_index(["choice", "level"])
    assert found.loc[("target", "state"), "mean_win_rate"] == pytest.approx(0.2 + 0.2 / 5)
    assert found.loc[("target", "write"), "mean_win_rate"] == pytest.approx(0.6 + 0.2 / 5)
    assert found.loc[("control", "random"), "mean_win_rate"] == pytest.approx(0.6)
    assert found.loc[("control", "delete"), "mean_win_rate"] == pytest.approx(0.4)
    assert found.loc[("target", "write"), "difference"] == pytest.approx(0.4)
    assert found.loc[("control", "random"), "difference"] == pytest.approx(0.2)
    assert found.loc[("control", "fresh"), "difference"] == pytest.approx(0, abs=1e-9)
    for choice, level in multiverse.DEFAULT.items():
        assert found.loc[(choice, level), "difference"] == 0
    of_target, of_control = 0.2**2, 0.2**2 * (1 / 5) * (4 / 5)
    assert found.loc[("target", "write"), "share"] == pytest.approx(of_target / (of_target + of_control))
    assert found.loc[("reading", "cache, mean"), "share"] == pytest.approx(0, abs=1e-9)
    assert found.loc[("target", "state"), "decides"] == 1
    assert found.loc[("control", "random"), "decides"] == 0
    assert found.universes["target", "state"] == 1200 and found.universes["reading", "write, next"] == 480


def test_errors_are_statsmodels_clustered_ones():
    won = multiverse.gains(a_table(3))
    found = multiverse.effects(won, multiverse.universes(won, 20, 0), 50, 0).set_index(["choice", "level"])
    means = won.assign(win=won.gain > 0).groupby("amplitude").win.mean()
    assert found.loc[("amplitude", "matched_norm"), "difference"] == pytest.approx(means.iloc[1] - means.iloc[0])
    names = [(choice, level) for choice, levels in multiverse.CHOICES.items() for level in levels[1:]]
    design = np.column_stack([np.ones(len(won))] + [won[c] == level for c, level in names]).astype(float)
    model = sm.OLS((won.gain > 0).to_numpy(float), design)
    ends = model.fit(cov_type="cluster", cov_kwds=dict(groups=won.passage)).conf_int()[1:]
    np.testing.assert_allclose(found.loc[names, ["passage_low", "passage_high"]].to_numpy(), ends, rtol=1e-6, atol=1e-9)
    naive = model.fit().conf_int()[1:]
    assert not np.allclose(naive, ends, rtol=0.05)


def test_a_choice_that_is_closed_has_no_effect_and_no_line():
    table = a_table()
    won = multiverse.gains(table[table.write == "added"])
    lines = multiverse.universes(won, 20, 0)
    assert len(lines) == 1200
    assert set(multiverse.effects(won, lines, 20, 0).choice) == set(multiverse.CHOICES) - {"write"}


# Heads, failures and significance tests


def replaced(kl_atom, kl_delete, **columns):
    n = len(kl_atom)
    base = dict(host="a", target="state", amplitude="coefficient", layer=1, head=0, atom=range(n), passage=range(n))
    return pd.DataFrame(base | dict(kl_atom=kl_atom, kl_delete=kl_delete, kl_random=1.0) | columns)


PLACES = pd.DataFrame(dict(host="a", place=["early", "middle"], layer=[0, 1], head=[0, 0]))


def test_heads_by_hand():
    parts = [replaced([1.0, 1.0, 3.0, 1.0], [2.0] * 4, head=0), replaced([1.0, 3.0, 3.0, 5.0], [2.0] * 4, head=3)]
    table = heads_and_seeds.per(heads_and_seeds.HEAD, pd.concat(parts), resamples=50, seed=0).set_index("head")
    assert table.win_rate.to_dict() == {0: 0.75, 3: 0.25}
    assert table.n.tolist() == [4, 4]
    assert table.kl_atom.tolist() == [1.0, 3.0]
    row = heads_and_seeds.over_heads(table.reset_index(), PLACES).iloc[0]
    assert (row.heads, row.n, row.mean_win_rate, row.lowest, row.highest) == (2, 8, 0.5, 0.25, 0.75)
    assert row.sd == pytest.approx(np.std([0.75, 0.25], ddof=1))
    assert row.own_head_in_sd == pytest.approx(0.25 / row.sd)


def test_quartiles_go_by_rank():
    found = heads_and_seeds.quartiles(pd.Series([8.0, 1, 7, 2, 6, 3, 5, 4]))
    assert found.tolist() == ["Q4", "Q1", "Q4", "Q1", "Q3", "Q2", "Q3", "Q2"]
    assert heads_and_seeds.quartiles(pd.Series([0.5] * 4)).tolist() == ["Q1", "Q2", "Q3", "Q4"]


def test_failures_by_hand():
    """Compares the failure rates with counts by hand.

    Early: KL(delete) is 1 to 4 and the two smallest fail. Middle: it is 11 to 14 and the largest fails.
    """
    early = replaced([2.0, 3.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0], layer=0)
    middle = replaced([1.0, 1.0, 1.0, 20.0], [11.0, 12.0, 13.0, 14.0], layer=1)
    table = heads_and_seeds.failures(pd.concat([middle, early], ignore_index=True), PLACES, resamples=50, seed=0)
    assert table[table.by == "place"].level.tolist() == ["early", "middle"]  # same order as in PLACES
    rates = table.set_index(["by", "level"]).failure_rate
    assert rates["all"].to_dict() == dict(all=3 / 8)
    assert rates["place"].to_dict() == dict(early=0.5, middle=0.25)
    assert rates["quartile"].to_dict() == dict(Q1=1.0, Q2=0.0, Q3=0.0, Q4=0.5)
    assert rates["quartile within cell"].to_dict() == dict(Q1=0.5, Q2=0.5, Q3=0.0, Q4=0.5)
    assert table.set_index(["by", "level"]).n["quartile"].tolist() == [2, 2, 2, 2]


def test_tests_by_hand():
    """Compares the tests with exact enumeration. Eight atoms have one firing each; six of them win."""
    delete = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    atom = delete * np.exp([0.1, 0.2, -1, -1, -1, -1, -1, -1])
    row = heads_and_seeds.tests(replaced(atom, delete), permutations=10_000, resamples=40, seed=0).iloc[0]
    ratios = np.log(atom / delete)
    signs = np.array(list(product([1, -1], repeat=8)))
    wanted = (np.abs((signs * ratios).mean(1)) >= abs(ratios.mean()) - 1e-12).mean()
    assert row.permutation_p == pytest.approx(wanted)
    assert row.permutation_by_atom_p == pytest.approx(wanted)
    assert row.mean_log_ratio == pytest.approx(ratios.mean())
    pairs = np.sign(delete[:, None] - atom)
    assert row.cliffs_delta == pytest.approx(pairs.mean())
    assert row.q1_minus_q4 == 1.0
    assert row.q1_minus_q4_p == pytest.approx(2 / 6)  # 2 of the 6 splits of four values have this difference
    assert row.cliffs_delta_low <= row.cliffs_delta <= row.cliffs_delta_high
    few = heads_and_seeds.tests(replaced(atom[:4], delete[:4]), permutations=100, resamples=40, seed=0).iloc[0]
    assert np.isnan(few.q1_minus_q4_p) and few.q1_minus_q4 == 1.0  # one firing per quartile


def test_permutation_within_atoms_knows_that_firings_of_one_atom_are_one():
    ratio = np.r_[np.full(30, -1.0), np.full(30, -0.9), np.full(30, 0.1)]
    table = replaced(np.exp(ratio), np.ones(90), atom=np.repeat([0, 1, 2], 30))
    row = heads_and_seeds.tests(table, permutations=2000, resamples=20, seed=0).iloc[0]
    assert row.permutation_p < 0.01
    assert row.permutation_by_atom_p == pytest.approx(0.5)  # 4 of the 8 assignments of three signs


# The stage


class Settings(BaseModel):
    windows: int = 3
    firings: int = 20
    atoms: int = 3
    horizon: int = HORIZON
    batch_rows: int = 256
    head_firings: int = 15


class SmallStudy(Study):
    """A study of one cell of one small host, with random weights and random text."""

    cells = pd.DataFrame([dict(host="small", place="middle", layer=CELL[0], head=CELL[1])])

    def __init__(self, profile, host, tokens):
        super().__init__(profile)
        self.only, self.tokens = host, tokens

    def host(self, name):
        return self.only

    def host_fingerprint(self, name):
        return {}

    def windows(self, host, split):
        return Windows(self.tokens, torch.arange(len(self.tokens)))

    def windows_hash(self, host, split):
        return "windows"


@pytest.fixture
def study(small, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    profile = load_profile("smoke")
    hosts = dict(small=HostSection(path="x", cells=dict(middle=dict(layer=CELL[0], sigma_ratio=1.0))))
    settings = TrainingSettings(n_atoms=24, k=4, tokens=90 * 30, batch_windows=3, lr=3e-3, final_lr=3e-4, seed=42)
    saes = profile.saes.model_copy(update=dict(main=settings))
    changed = dict(hosts=hosts, saes=saes, workers=1)  # other processes would keep the folder of another test
    made = SmallStudy(profile.model_copy(update=changed), small, tokens)
    factors = harvest(small, tokens, [CELL], batch=3, progress=False)[CELL]
    files.save_tensors(made.harvest_path("small", *CELL), factors.tensors(), {})
    for target, centre in product(("state", "write"), ("mean", "none")):
        kind = settings.model_copy(update=dict(centre=centre))
        train_sae(made, training.main_role(made, centre, 42), CELL, target, kind, factors)
    return made


def test_the_stage_from_nothing(study):
    others = training.other_specs(study, "small")
    assert [(spec.write, spec.target) for spec in others] == [("effective", "write")] * 2
    training.train_all(study, others)
    added = study.sae("small", *CELL, "write")
    other = multiverse._sae(study, "small", CELL, "write", "none", "effective")
    assert not torch.equal(added.decoder.key, other.decoder.key)
    with pytest.raises(ValueError, match="effective"):
        study.sae("small", *CELL, "write", "other-none")

    table = multiverse.firings_of_host(study, "small", Settings())
    counts = table.groupby(["target", "centre", "write", "pooling", "read", "amplitude"]).size()
    assert len(counts) == 2 * 2 * 2 * 3 * 2 * 2 and (counts == 20).all()
    assert table[table.pooling == "most_firing"].groupby(["target", "centre", "write"]).atom.nunique().max() <= 3
    assert table.position.max() < study.tokens.shape[1] - HORIZON
    assert np.isfinite(table.filter(like=".next.")).all(axis=None)
    won = multiverse.gains(table)
    lines = multiverse.universes(won, 20, 0)
    places = table[table.pooling == "positions"].groupby(["target", "centre", "write"])
    assert places.apply(lambda x: tuple(sorted({*zip(x.window, x.position)}))).nunique() == 1, "the same for all"
    assert len(lines) == 2400 and (lines.n == 20).all()
    effects = multiverse.effects(won, lines, 20, 0)
    assert effects.notna().all(axis=None)


def test_what_is_there_is_read_again(study, monkeypatch):
    first = training.train_all(study, training.other_specs(study, "small"))
    monkeypatch.setattr(training, "train_one", lambda *a: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(training.train_all(study, training.other_specs(study, "small")), first)
    table = multiverse.firings_of_host(study, "small", Settings())
    monkeypatch.setattr(multiverse, "_measure", lambda *a: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(multiverse.firings_of_host(study, "small", Settings()), table)


def test_hosts_without_other_writes_train_nothing(study):
    path = study.harvest_path("small", *CELL)
    factors = files.load_tensors(path)[0]
    files.save_tensors(path, factors | dict(effective=factors["added"].clone()), {})
    assert training.other_specs(study, "small") == []


def test_every_head_of_the_layer(study, monkeypatch):
    """Compares the firings per head with `head_firings`, or with all firings if a head has fewer."""
    settings = study.profile.saes.main
    monkeypatch.setattr(
        study,
        "profile",
        study.profile.model_copy(update=dict(saes=study.profile.saes.model_copy(update=dict(survey=settings)))),
    )
    table = heads_and_seeds.heads_of_host(study, "small", Settings())
    counts = table.groupby(["target", "amplitude", "head"]).size()
    assert len(counts) == 2 * 2 * 4 and (counts == 15).all()
    heads = heads_and_seeds.per(heads_and_seeds.HEAD, table, 20, 0)
    assert len(heads) == 16
    few = heads_and_seeds.heads_of_host(study, "small", Settings(head_firings=1000))
    assert few.groupby(["target", "amplitude", "head"]).size().max() <= 3 * 72


def test_every_seed_has_its_own_sae_and_firings(study, monkeypatch):
    variants = [study.profile.saes.main.model_copy(update=dict(seed=seed)) for seed in (0, 1)]
    monkeypatch.setattr(training, "seed_variants", lambda *_: variants)
    factors = harvest(study.only, study.tokens, [CELL], batch=3, progress=False)[CELL]
    for variant in variants:
        role = training.variant_name(variant)
        for target in ("state", "write"):
            train_sae(study, role, CELL, target, variant, factors)
    table = heads_and_seeds.seeds_of_host(study, "small", Settings())
    counts = table.groupby(["target", "amplitude", "seed"]).size()
    assert len(counts) == 2 * 2 * 2 and (counts == 20).all()
    one, other = (part.cosine.to_numpy() for _, part in table.query("target == 'state'").groupby("seed"))
    assert not np.allclose(one, other)
    lines = heads_and_seeds.per(["seed"], table, 20, 0)
    over = heads_and_seeds.over_seeds(lines).set_index(["target", "amplitude"])
    for (target, amplitude), row in over.iterrows():
        part = table[(table.target == target) & (table.amplitude == amplitude)]
        rates = [(p.kl_atom < p.kl_delete).mean() for _, p in part.groupby("seed")]
        assert (row.seeds, row.n) == (2, 40)
        assert row.mean_win_rate == pytest.approx(np.mean(rates))
        assert (row.lowest, row.highest) == (min(rates), max(rates))
        assert row.sd == pytest.approx(np.std(rates, ddof=1))


def test_one_cluster_says_nothing_of_a_difference():
    part, win = pd.DataFrame(dict(target=["state", "write"] * 4)), np.array([0.0, 1, 0, 0, 1, 1, 0, 1])
    levels = dict(target=["state", "write"])
    line = multiverse._fit(win, part, levels, (np.arange(8), np.zeros(8, int)))["target", "write"]
    assert line["difference"] == pytest.approx(0.5)
    assert line["ci_low"] < 0.5 < line["ci_high"]
    assert np.isnan([line["passage_low"], line["passage_high"]]).all()
