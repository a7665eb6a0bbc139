"""Installs in one cell, a layer and all cells: what the tables count, against direct runs of a small host."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from statsmodels.stats.proportion import proportion_confint

from replication.pages import install_cells as page
from replication.study.profile import InstallCells
from writesae.edit import generate_under
from writesae.evaluate import install, steering
from writesae.evaluate.steering import Goal, directions, end_logits
from writesae.text import Windows

CELL = (1, 2)
INSTALL = SimpleNamespace(
    rank_classes=dict(middle=(5, 80), far=(100, 300)), targets_per_class=2, writes=3, new_tokens=5
)
SETTINGS = InstallCells(
    prompts=3,
    prompt_tokens=40,
    distances=[4, 6],
    delays=[9],
    out_of_context=1,
    beyond=50,
    refinement=2,
    sizes=[0.1, 1.0, 3.0],
    counts=[2],
    ceiling_sizes=[1.0, 20.0],
    batch_rows=7,
)
CLASSES = dict(frequent=torch.arange(300) < 100, rare=torch.arange(300) >= 200, semantic=torch.arange(300) % 2 == 0)
KEYS = ["cells", "direction", "magnitude", "writes"]


@pytest.fixture(scope="module")
def single(gated_deltanet):
    """The small host in fp32, the precision of the experiments."""
    return type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).float(), None, "small")


@pytest.fixture(scope="module")
def given(single, tokens):
    prompts = Windows(tokens[:, :40], torch.arange(3))
    settings = dict(install=INSTALL, settings=SETTINGS, write="added", seed=1)
    return dict(host=single, prompts=prompts, cell=CELL, classes=CLASSES) | settings


@pytest.fixture(scope="module")
def table(given):
    return page._trials(4, **given)


def goal_of(given, rows, distance=4):
    run = given["host"].run(given["prompts"].tokens)
    return Goal(run, torch.tensor(rows.prompt.to_numpy()), torch.tensor(rows.target.to_numpy()), 40 - distance, 3)


# The measures


def test_native_losses_are_those_of_one_longer_run(host, tokens):
    run, rows = host.run(tokens[:, :50]), torch.tensor([2, 0])
    more = torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(5))
    longer = host.run(torch.cat([tokens[rows, :50], more], 1))
    wanted = F.cross_entropy(host.logits(longer.final[:, 49:-1]).flatten(0, 1), more.flatten(), reduction="none")
    assert_close(install.native_losses(host, run, rows, more), wanted.view(2, 6), "losses", 1e-5)


def test_the_kl_elsewhere_leaves_the_target_out():
    generator = torch.Generator().manual_seed(0)
    native, edited = torch.randn(2, 3, 8, generator=generator)
    tokens = torch.tensor([2, 7, 0])
    ours = install.kl_elsewhere(native, edited.scatter(1, tokens[:, None], 50.0), tokens)
    for row, token in enumerate(tokens):
        p, q = (np.delete(x[row].double().softmax(-1).numpy(), token) for x in (native, edited))
        p, q = p / p.sum(), q / q.sum()
        assert float(ours[row]) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


def test_targets_out_of_context_are_far_and_not_in_the_prompt():
    generator = torch.Generator().manual_seed(0)
    logits, prompts = torch.randn(4, 300, generator=generator), torch.randint(0, 300, (4, 30), generator=generator)
    targets, labels = install.draw_out_of_context(logits, prompts, CLASSES, 150, 2, seed=3)
    assert labels.tolist() == ["frequent", "frequent", "rare", "rare", "semantic", "semantic"]
    ranks = 1 + (logits[:, None] > logits.gather(1, targets)[..., None]).sum(-1)
    assert ranks.min() > 150
    for row in range(4):
        assert not set(targets[row].tolist()) & set(prompts[row].tolist())
        assert all(CLASSES[label][token] for label, token in zip(labels, targets[row], strict=True))
    again, _ = install.draw_out_of_context(logits, prompts, CLASSES, 150, 2, seed=4)
    assert not torch.equal(again, targets)
    with pytest.raises(ValueError, match="the class rare has 0 beyond rank 300 that are not in a prompt"):
        install.draw_out_of_context(logits, prompts, dict(rare=CLASSES["rare"]), 300, 1, seed=3)


def test_a_refinement_leaves_what_comes_next_alone(single, given):
    run = single.run(given["prompts"].tokens)
    tokens = single.logits(run.final[:, -1]).argmax(-1)
    tokens[1] = 9
    goal = Goal(run, torch.arange(3), tokens, 36, 3)
    edits = directions(single, goal, [(0, 1), CELL], "random", 0.01)
    logits = end_logits(single, goal, edits)
    both, better = install.refined(single, goal, edits, logits, 3)
    for cell, edit in edits.items():
        assert torch.equal(both[cell].left[[0, 2]], edit.left[[0, 2]])
        assert not torch.equal(both[cell].right[1], edit.right[1])
    assert_close(better, end_logits(single, goal, both), "logits", 1e-5)
    assert install.log_p(better, tokens)[1] > install.log_p(logits, tokens)[1]
    first = torch.tensor([0])
    same, _ = install.refined(single, goal.part(first), steering.part(edits, first), logits[:1], 3)
    assert torch.equal(same[CELL].left, edits[CELL].left[:1])


# The table of trials


def test_every_condition_has_its_trials(given, table):
    counts = table.groupby(KEYS).size()
    assert counts["all", "layerwise", 1.0, 3] == counts["all", "refined", 1.0, 3] == 3 * (4 + 3)
    assert counts["one", "refined", 3.0, 3] == counts["all", "layerwise", 1.0, 1] == 3 * 2, "narrow: the middle class"
    assert counts["all", "random", 0.1, 3] == counts["2", "refined", 3.0, 3] == 3 * 4
    assert not table.duplicated([*KEYS, "prompt", "target", "target_class"]).any()
    costs = (table.target_class == "middle") & (table.cells != "2")
    assert table.extra_loss.notna().equals(costs) and table.times_said.notna().equals(costs)
    swept = (table.cells == "2") | (table.cells == "all") & (table.magnitude != 1)
    assert table.included_edited.isna().equals(swept & ~costs)
    later, delayed = (page._trials(distance, **given) for distance in (6, 9))
    assert set(later.groupby(KEYS).size()) == {3 * 4} and not later.delayed.any()
    assert set(delayed.groupby(KEYS).size()) == {3 * 2} and delayed.delayed.all()


@pytest.mark.parametrize(
    ("cells", "direction"), [("one", "gamma"), ("layer", "gamma"), ("all", "gamma"), ("all", "layerwise")]
)
def test_trials_are_those_of_direct_runs(given, table, cells, direction):
    rows = table.query("cells == @cells and direction == @direction and magnitude == 1 and writes == 3")
    rows, single = rows.sort_values(["prompt", "target"]), given["host"]
    goal = goal_of(given, rows)
    where = dict(one=[CELL], layer=[(1, head) for head in range(4)], all=single.cells)[cells]
    said, logits = generate_under(single, goal.run, directions(single, goal, where, direction), INSTALL.new_tokens)
    native, target = single.logits(goal.run.final[:, -1])[goal.rows], goal.tokens[:, None]
    assert ((rows.edited_rank == 1).to_numpy() == (logits.argmax(-1) == goal.tokens).numpy()).all()
    assert rows.included_edited.tolist() == (said == target).any(1).int().tolist()
    assert_close(rows.kl_elsewhere.to_numpy(), install.kl_elsewhere(native, logits, goal.tokens), "KL", 1e-3)
    lift = install.log_p(logits, goal.tokens) - install.log_p(native, goal.tokens)
    assert_close(rows.first_step_lift.to_numpy(), lift, "lift", 1e-3)
    few, costs = torch.tensor((rows.target_class == "middle").to_numpy()), rows[rows.target_class == "middle"]
    assert costs.times_said.tolist() == (said == target).sum(1)[few].tolist()
    before = install.native_continuations(single, goal.run, INSTALL.new_tokens)[goal.rows]
    texts = [install.native_losses(single, goal.run, goal.rows[few], x[few]).mean(1) for x in (said, before)]
    assert_close(costs.extra_loss.to_numpy(), texts[0] - texts[1], "extra loss", 1e-3)


def test_the_total_size_is_that_of_all_writes(given, table):
    rows = table.query("cells == '2' and direction == 'layerwise' and magnitude == 3")
    goal, single = goal_of(given, rows), given["host"]
    squares = {cell: goal.sizes(single, cell).square().sum(1) for cell in single.cells}
    gain = page._gains_of(single, goal)
    best = sorted(single.cells, key=gain.get)[-2:]
    wanted = 3 * (sum(squares[cell] for cell in best) / sum(squares.values())).sqrt()
    assert_close(rows.total_size.to_numpy(), wanted, "total size", 1e-5)
    logits = end_logits(single, goal, directions(single, goal, best, "layerwise", 3.0))
    assert ((rows.edited_rank == 1).to_numpy() == (logits.argmax(-1) == goal.tokens).numpy()).all()
    assert table.query("cells == 'all' and magnitude == 0.1").total_size.to_numpy() == pytest.approx(0.1)


def test_writes_in_more_cells_and_refined_ones_do_more(table):
    table = table[table.target_class == "middle"]
    lift = table[table.magnitude == 1].groupby(["cells", "direction", "writes"]).first_step_lift.median()
    assert lift["one", "gamma", 3] < lift["layer", "gamma", 3] < lift["all", "layerwise", 3]
    assert (
        lift["all", "layerwise", 3] <= lift["all", "refined", 3] and lift["all", "random", 3] < lift["all", "gamma", 3]
    )


def test_the_summary_counts_trials():
    rows = pd.DataFrame(dict(target_class=["middle"] * 5 + ["far", "rare"], distance=[3, 3, 9, 9, 20, 3, 3]))
    rows = rows.assign(host="small", cells="all", direction="gamma", magnitude=1.0, writes=3, prompt=[0, 1] * 3 + [2])
    rows = rows.assign(edited_rank=[1, 2, 1, 1, 1, 7, 1], included_edited=[1, 1, 1, 1, 1, 0, 1], included_native=0)
    rows = rows.assign(first_step_lift=[1.0, 2, 3, 4, 9, 5, 6], kl_elsewhere=0.5, total_size=1.0, target=5)
    rows = rows.assign(delayed=rows.distance == 20, times_said=[2, *[np.nan] * 6], extra_loss=[3, *[np.nan] * 6])
    summary = page.summarise(rows).set_index(["target_class", "distance"])
    middle = summary.loc["middle", "all"]
    assert (middle.n, middle.n_costs, middle.next_token, middle.included_edited) == (4, 1, 0.75, 1.0)
    low, high = proportion_confint(1.5, 2, method="beta")  # two pairs of prompt and target, four trials
    assert middle.next_token_low <= low and middle.next_token_high >= high and middle.first_step_lift == 2.5
    assert summary.loc["all", "all"].n == 5 and summary.loc["middle", "20"].next_token == 1.0
    assert summary.loc["rare", "3"].n == 1
    shown = page.shown(page.named(page.summarise(rows), 3), "condition", names=page.RATES)
    assert shown["next token (%)"].str.startswith("50 [").all()
    assert shown.index.get_level_values("condition").tolist() == ["all cells, Γ, 1x"]


def test_classes_of_text_are_by_frequency_and_form():
    texts = [" words", "words", " ab", " longer", "x"] + ["y"] * 35
    host = SimpleNamespace(vocabulary=40, tokenizer=SimpleNamespace(decode=lambda ids: texts[ids[0]]))
    counts = [50, 3, 2, 0, 1] + [4] * 35
    classes = page.text_classes(host, torch.repeat_interleave(torch.arange(40), torch.tensor(counts)))
    assert torch.nonzero(classes["semantic"])[:, 0].tolist() == [0]  # " longer" is never seen
    assert classes["frequent"][0] and not classes["frequent"][1]
    assert classes["rare"][[1, 2, 4]].all() and not classes["rare"][[0, 3]].any()


# The frontier, the delay and the ceiling


def test_the_least_is_the_smallest_and_the_fewest():
    rows = [("1", 0.1, 0.2), ("1", 1.0, 0.5), ("4", 0.1, 0.5), ("4", 3.0, 0.96), ("all", 0.1, 0.95), ("all", 1.0, 1.0)]
    summary = pd.DataFrame(rows, columns=["cells", "magnitude", "next_token"]).assign(host="a", n=20, writes=3)
    summary = summary.assign(direction="refined", distance="3", target_class="far", next_token_low=0, next_token_high=1)
    summary["total_size"] = summary.magnitude * summary.cells.map({"1": 0.1, "4": 0.4, "all": 1.0})
    others = [summary.assign(**x) for x in (dict(direction="layerwise"), dict(distance="9"), dict(writes=1))]
    others.append(summary.assign(cells="layer", next_token=1.0))
    frontier = page.frontier(pd.concat([*others, summary]), 3, dict(a=24))
    (row,) = page.least(frontier).itertuples()
    assert (row.n, row.total_size, row.n_cells, row.magnitude, row.fewest_cells) == (20, 0.1, 24, 0.1, 4)
    (row,) = page.least(frontier[frontier.next_token < 0.9]).itertuples()
    assert np.isnan(row.fewest_cells) and row.next_token == 0.5


def test_gains_that_are_kept_are_of_the_same_cell():
    gains = pd.DataFrame(dict(host="a", layer=1, head=[0, 1, 2, 3] * 2, distance=[3] * 4 + [9] * 4, n=5))
    gains = gains.assign(gain=[2.0, 4, 4, 8, 1, 1, 2, 8])
    memory = pd.DataFrame(dict(host="a", layer=1, head=range(4), half_life_median=[2.0, 1, 3, 50]))
    kept = page.kept_gains(gains, memory)
    assert kept[kept.distance == 9].kept.tolist() == [0.5, 0.25, 0.5, 1.0]
    row = page.summarise_kept(kept).set_index("distance").loc[9]
    assert row.kept == pytest.approx(12 / 18) and row.from_memory == pytest.approx(8 / 12)
    assert row.cells_with_memory == 0.25 and row.rho > 0.7


def test_a_measured_gain_is_that_of_the_cell_alone(given):
    table, single = page._ceiling(1, **given), given["host"]
    assert len(table) == 4 * 6
    rows = table[table["head"] == 2]
    goal = goal_of(given, rows, 3)
    native = single.logits(goal.run.final[:, -1])[goal.rows]
    own = native.gather(-1, goal.tokens[:, None])[:, 0]
    edits = directions(single, goal, [CELL], "gamma")
    tried = [steering.scaled(edits, torch.full((6,), size)) for size in SETTINGS.ceiling_sizes]
    tried.append(steering.refine(single, goal, tried[1], 2))
    with torch.no_grad():
        gains = [end_logits(single, goal, x).gather(-1, goal.tokens[:, None])[:, 0] - own for x in tried]
    assert_close(rows.gain.to_numpy(), torch.stack(gains).max(0).values, "gain", 1e-3)
    assert_close(rows.ceiling.to_numpy(), steering.ceilings(single, goal, [CELL])[CELL], "ceiling", 1e-4)
    assert_close(rows.needed.to_numpy(), native.max(-1).values - own, "needed", 1e-4)
    summary = page.summarise_ceilings(table).iloc[0]
    assert (summary.n, summary.n_cells) == (6, 4)
    best = table.groupby(["prompt", "target"]).gain.max()
    assert summary.gain == pytest.approx(best.mean()) and summary.gain_low < summary.gain < summary.gain_high
