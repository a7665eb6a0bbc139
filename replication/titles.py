"""The finding of each figure, in a sentence that is computed from the tables: the title of the figure.

`save` is how a notebook saves a figure. A title reads only tables that are written before its figure: of
earlier pages, or of earlier cells of the same page.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from replication import plots
from replication.findings import (
    HOSTS,
    LACKING,
    MAIN,
    Results,
    cells_ahead,
    ends_of_ladder,
    estimate,
    has_words,
    largest_recall,
    listed,
    of_hosts,
    r2,
    surely,
    win_rate,
)
from replication.plots import HOST
from replication.scorecard.check import WHOLE
from replication.scorecard.claims import papers_value
from replication.scorecard.verdicts import VERDICTS
from replication.study.study import Study


def save(figure: plt.Figure, name: str, study: Study) -> None:
    """Write a figure into the figures of a study, as `plots.save` does, with its finding as the title."""
    plots.save(figure, name, study.paths.figures, title(name, study))


def title(name: str, study: Study) -> str:
    """Return the title of a figure, or "" if there are no sentences for the study (`has_words`), the figure
    has none, or the tables lack its rows. Raises FileNotFoundError for a table that is not there yet."""
    if name not in TITLES or not has_words(study):
        return ""
    try:
        return TITLES[name](Results(study.paths.results))
    except LACKING:
        return ""


def share(value: float) -> str:
    return f"{value:z.0%}"


def shares(values) -> str:
    """Return shares in percent, those of all hosts as one if they are the same."""
    parts = [*map(share, values)]
    return listed(parts if len(set(parts)) > 1 else parts[:1])


def numbers(values, digits: int = 2) -> str:
    return listed(f"{value:z.{digits}f}" for value in values)


def r2_text(value: float) -> str:
    """Return an R2 as the figures show it, which draw all values below -1 at -1."""
    return f"{value:z.2f}" if value >= -1 else "below -1"


def moves(low: float, high: float) -> str:
    """Return in words how a quantity changes with another, from the interval of their rank correlation."""
    return "rises" if low > 0 else "falls" if high < 0 else "does not surely change"


def of_targets(results: Results, table: str, **values) -> list[pd.Series]:
    """Return the only row of the main host with these values, for SAEs of writes and of states."""
    return [results.row(table, host=MAIN, target=target, **values) for target in ("write", "state")]


# In the order of the pages


def fig00_hosts(results: Results) -> str:
    table = results.rows("hosts").set_index("host").loc[[*HOSTS]]
    losses = listed(f"{row.heldout_loss:.2f} ({HOST[row.Index]})" for row in table.itertuples())
    tokens = listed(dict.fromkeys(f"{tokens / 1e6:.1f}" for tokens in table.training_tokens))
    return f"On the text of the pages the loss is {losses}, after training on {tokens} million tokens"


def fig00_cells(results: Results) -> str:
    parts = [results.rows("all_cells", host=host) for host in HOSTS]
    rises = listed(f"{(part.cost_low > 0).sum()} of {len(part)}" for part in parts)
    most = listed(f"{1000 * part.cost.max():.1f}" for part in parts)
    return f"The loss surely rises without the writes of {rises} cells, by at most {most} millinats per token"


def fig01_writes(results: Results) -> str:
    norms = results.rows("harvest").median_write_norm
    ends = f"{norms.min():.2f} and {norms.max():.1f}"
    return f"The median norm of a native write lies between {ends} in {len(norms)} cells"


def fig02_saes(results: Results) -> str:
    errors = results.rows("saes", role="main").groupby("target").fvu
    states, writes = (f"{share(errors.min()[x])} to {share(errors.max()[x])}" for x in ("state", "write"))
    return f"With the mean subtracted, SAEs of the chosen cells leave {states} of states and {writes} of writes unexplained"


def fig03_classes(results: Results) -> str:
    def fit(row: pd.Series) -> str:
        return "surely" if row.ci_high < 0 else "surely not" if row.ci_low > 0 else "not surely"

    rows = of_targets(results, "atom_mixtures", place="middle", role="main", components=2)
    write, state = (fit(row) for row in rows)
    said = f"{state} for state-trained atoms, {write} for write-trained ones"
    return f"Two groups fit the cosines better than one: {said}"


def fig03_sweeps(results: Results) -> str:
    rows = results.rows("atom_thresholds", host=MAIN, place="middle", role="main").sort_values("tau")
    ends = rows.groupby("target").register_share.agg(["first", "last"]).loc[["state", "write"]]
    state, write = (f"{share(first)} and {share(last)}" for first, last in ends.values)
    registers = f"{state} of state-trained and {write} of write-trained atoms"
    return f"With thresholds of {rows.tau.min():g} and {rows.tau.max():g}, registers are {registers}"


def fig03_seeds(results: Results) -> str:
    rows = of_targets(results, "atom_match_shares", **{"class": "all"})
    write, state = (f"{100 * row['share']:.1f}%" for row in rows)
    return f"{state} of state-trained and {write} of write-trained atoms come back in another seed"


def fig03_exemplars(results: Results) -> str:
    rows = results.rows("atom_exemplars", host=MAIN, target="state").sort_values("firings", ascending=False)
    first = rows.iloc[0]
    others = f"the other exemplars at {rows.rate.iloc[1]:.1%} at most"
    return f"The {first['class']} {first.atom} fires at {first.rate:.1%} of the positions, and {others}"


def fig04_logit_shift(results: Results) -> str:
    table = results.rows("logit_shift", host=MAIN)
    rows = table[(table.atom == table.atom.iloc[0]) & (table.eps == 1)].set_index("predictor").r2
    layer, paper, fitted = (r2_text(rows[name]) for name in ("through_layer", "paper", "paper_fitted"))
    by_paper = f"{paper} by the paper's formula and {fitted} by its fit"
    return f"R² of the logit shifts of one atom is {layer} through the layer, {by_paper}"


def fig04_r2(results: Results) -> str:
    def holds(predictor: str) -> str:
        rows = results.rows("logit_shift_summary", host=MAIN, predictor=predictor).sort_values("eps")
        sizes = rows.eps[(rows.r2_median > 0.9).cummin()]
        return f"up to {sizes.max():g} native norms" if len(sizes) else "at no size"

    layer, first, paper = (holds(name) for name in ("through_layer", "exact", "paper"))
    others = f"{first} to first order, and {paper} by the paper's formula"
    return f"R² is above 0.9 {layer} through the layer, {others}"


def fig04_predicted_kl(results: Results) -> str:
    ways = ("kl_1", "cosine")
    passes, cosine = (of_hosts(results, "predicted_kl_summary", target="write", way=way) for way in ways)
    surely = "better" if all(x.rho_low > y.rho_high for x, y in zip(passes, cosine)) else "not surely better"
    values = f"Spearman {numbers(x.rho for x in passes)}, against {numbers(x.rho for x in cosine)}"
    return f"One backward pass ranks atoms by their KL {surely} than the cosine does ({values})"


def fig05_win_rates(results: Results) -> str:
    write, state = (share(win_rate(results, target).win_rate) for target in ("write", "state"))
    random = listed(share(win_rate(results, x, condition="random").win_rate) for x in ("write", "state"))
    rates = f"{write} and {state} of places (random: {random})"
    return f"Without the mean, atoms of writes and states beat deletion at {rates}"


def _paper_rows(results: Results) -> list[pd.Series]:
    where = dict(cells="pooled", amplitude="coefficient", read="write")
    return of_targets(results, "replacement_summary", **where)


def fig05_kl(results: Results) -> str:
    write, state = (numbers([1000 * x.kl_atom, 1000 * x.kl_delete]) for x in _paper_rows(results))
    return f"Median KLs of atom and deletion are {state} millinats (SAE of states), {write} (SAE of writes)"


def fig05_scatter(results: Results) -> str:
    write, state = (f"{share(x.win_rate)} and {share(x.atom_beats_random)}" for x in _paper_rows(results))
    others = f"write-trained ones at {write}"
    return f"State-trained atoms beat deletion and random atoms at {state} of firings, {others}"


def fig05_half_life(results: Results) -> str:
    def with_half_life(row: pd.Series) -> str:
        word = moves(row.rho_half_life_median_low, row.rho_half_life_median_high)
        return f"{word} for {row.target}-trained atoms (rho {row.rho_half_life_median:.2f})"

    rows = of_targets(results, "replacement_trend", amplitude="coefficient")
    return f"With the half-life of a cell the win rate {' and '.join(map(with_half_life, rows[::-1]))}"


def fig06_all_writes(results: Results) -> str:
    rows = results.rows("all_writes", role="pooled")
    rows = rows[rows["head"].notna()].set_index(["condition", "target", "centre"]).recovered
    keys = ("read", "state", "none"), ("atom", "write", "none")
    read, atom = (share(rows.xs(key).median()) for key in keys)
    read = f"states read through the SAE recover {read} of the loss"
    return f"Without the mean, in the median cell {read}, top atoms of writes {atom}"


def fig06_all_writes_cells(results: Results) -> str:
    medians = results.rows("all_writes_trend").set_index(["training", "shown"])["median"]
    state, write = (share(medians[f"{target}, with the mean", "top atom"]) for target in ("states", "writes"))
    read = share(medians["states, with the mean", "state read through the SAE"])
    atoms = f"top atoms recover {state} (states) and {write} (writes) of the loss"
    return f"In the median cell {atoms}, states read through the SAE {read}"


def fig07_objects(results: Results) -> str:
    def with_cosine(name: str) -> str:
        where = dict(object=name, cells="pooled", target="state", centre="none")
        rows = of_hosts(results, "objects_summary", **where)
        word = moves(min(row.rho_low for row in rows), max(row.rho_high for row in rows))
        return f"{word} if the {name} is replaced (rho {numbers(row.rho for row in rows)})"

    return f"SAEs without the mean: with the cosine the win rate {' and '.join(map(with_cosine, ('write', 'state')))}"


def fig07_objects_kl(results: Results) -> str:
    where = dict(cells="pooled", target="state", centre="none")
    write, state = (of_hosts(results, "objects_summary", object=x, **where) for x in ("write", "state"))
    times = listed(f"{y.kl_delete / x.kl_delete:.0f}" for x, y in zip(write, state))
    return f"Deleting the state has {times} times the median KL of deleting the write, on the three hosts"


def fig08_baselines(results: Results) -> str:
    where = dict(host=MAIN, cells="pooled", amplitude="projection", target="write", centre="none")
    size = results.row("baselines_summary", method="best_atom", **where)["size"]

    def recovered(method: str) -> str:
        return share(results.row("baselines_summary", method=method, size=size, **where).recovered)

    atom, random, kmeans, raw = map(recovered, ("best_atom", "random", "kmeans", "nearest_write"))
    others = f"of as many k-means centres {kmeans}, of raw writes {raw}; a random atom recovers {random}"
    return f"The nearest of {size} atoms recovers {atom} of the KL, {others}"


def fig08_cells(results: Results) -> str:
    where = dict(method="best_atom", target="write", centre="none", amplitude="projection")
    rows = results.rows("baselines_summary", **where)
    rows = rows[rows.cells != "pooled"].sort_values("recovered")
    low, high = (f"{share(x.recovered)} ({HOST[x.host]}, {x.cells})" for x in (rows.iloc[0], rows.iloc[-1]))
    return f"The nearest atom recovers from {low} to {high} of the KL, cell by cell"


def fig08_matched_norm(results: Results) -> str:
    write, state = (share(x.beats_delete) for x in of_targets(results, "matched_norm", condition="atom"))
    random = share(of_targets(results, "matched_norm", condition="random")[0].beats_delete)
    others = f"state-trained ones at {state} and random ones at {random}"
    return f"At the native norm, write-trained atoms beat deletion at {write} of firings, {others}"


def fig09_population(results: Results) -> str:
    rows = of_targets(results, "population_summary", amplitude="coefficient", **{"class": "all"})
    write, state = (share(row.mean_win_rate) for row in rows)
    others = f"state-trained ones at {state} (the paper: {share(papers_value('P1'))})"
    return f"Write-trained atoms beat deletion at {write} on average, {others}"


def fig10_other_hosts(results: Results) -> str:
    def rates(target: str) -> str:
        rows = of_hosts(results, "other_hosts", quantity="win rate", choice=f"{target}, coefficient")
        return shares(row.value for row in rows)

    write, state = rates("write"), rates("state")
    return f"Write-trained atoms win at {write} of firings, state-trained ones at {state} (own coefficient)"


def fig10_r2(results: Results) -> str:
    def values(predictor: str) -> str:
        return listed(r2_text(r2(results, predictor, 10.0, host)) for host in HOSTS)

    layer, first = values("through_layer"), values("exact")
    return f"At ten native norms R² is {layer} through the layer, and {first} to first order"


def fig11_erase(results: Results) -> str:
    where = dict(host=MAIN, target="state", condition="delete", atom="all", dose=1)
    other, same = (
        estimate(row, "median_change", "ci_low", "ci_high", 1, scale=1000)
        for row in (results.row("cache_erase_summary", token_from=x, **where) for x in ("other", "same"))
    )
    found = f"or {same} if it is found on the tested firings"
    return f"Deletion changes log p of the preferred token by {other} millinats, {found}"


def fig11_single(results: Results) -> str:
    def pooled(direction: str, predictor: str) -> str:
        where = dict(host=MAIN, direction=direction, predictor=predictor)
        return r2_text(results.row("single_write_summary", **where).r2_pooled)

    along = f"R² is {pooled('paper', 'paper')} by its formula and {pooled('paper', 'exact')} to first order"
    return f"Along the paper's direction {along}; along Γ it is {pooled('gamma', 'exact')} to first order"


def fig11_newlines(results: Results) -> str:
    def change(role: str) -> str:
        row = results.row("newlines_summary", host=MAIN, mode="kept", role=role, dose=5)
        return estimate(row, "change", scale=1)

    boundary, random = change("boundary"), change("random")
    changes = f"by {boundary}, random atoms by {random} per 400 tokens"
    return f"Five times as large and kept, boundary atoms change newlines {changes}"


def fig11_readers(results: Results) -> str:
    rows = results.rows("top_readers", host=MAIN).to_dict("records")
    most = [f"{row['ratio']:.1f} ({row['class']} {row['atom']})" for row in rows]
    return f"On other contexts the strongest reader reacts {listed(most)} times as much as to a random write"


def fig11_registers(results: Results) -> str:
    rows = of_targets(results, "register_erase_summary", condition="delete")
    write, state = (estimate(row, "rise", digits=1, scale=1000) for row in rows)
    changes = f"{state} (SAE of states) and {write} (of writes)"
    return f"Deleting all register firings changes the loss by {changes} millibits per token"


def fig12_install(results: Results) -> str:
    where = dict(host=MAIN, target_class="top", magnitude=3.0)
    gamma, paper = (results.row("install_summary", direction=x, **where) for x in ("gamma", "paper"))
    gamma, paper, unedited = map(share, (gamma.included_edited, paper.included_edited, paper.included_native))
    others = f"{paper} along the paper's direction and {unedited} without an edit"
    return f"Of the top-ranked targets {gamma} are said after writes along Γ, {others}"


def fig12_dose(results: Results) -> str:
    where = dict(host=MAIN, target_class="all")
    gamma, paper = (results.row("install_dose_summary", direction=x, **where) for x in ("gamma", "paper"))
    others = f"and {paper.reached:.1%} along the paper's direction"
    return f"Up to {gamma.largest_dose:g} native norms, {gamma.reached:.1%} of targets come next along Γ, {others}"


def fig12_ceiling(results: Results) -> str:
    rows = of_hosts(results, "install_ceiling_summary")
    needed, gain = (numbers([row[name] for row in rows], 1) for name in ("needed", "gain"))
    return f"A target needs {needed} nats on the three hosts, and gains {gain} in the best single cell"


def _smallest(column: pd.Series) -> str:
    """Return the smallest number of a column whose values are numbers or "all"."""
    return f"{pd.to_numeric(column, errors='coerce').min():.0f}"


def _in_cells(results: Results, **values) -> list[pd.Series]:
    nearest = _smallest(results.rows("install_cells_summary").distance)
    where = dict(target_class="middle", distance=nearest, writes=3)
    return of_hosts(results, "install_cells_summary", **where | values)


def fig12_cells(results: Results) -> str:
    def next_token(cells: str, magnitude: float) -> str:
        rows = _in_cells(results, cells=cells, direction="refined", magnitude=magnitude)
        return shares(row.next_token for row in rows)

    every, one = next_token("all", 1.0), next_token("one", 3.0)
    return f"Refined writes install {every} of targets in all cells, {one} in one cell at three times the norm"


def fig12_cost(results: Results) -> str:
    def kl(direction: str) -> str:
        rows = _in_cells(results, cells="all", direction=direction, magnitude=1.0)
        return numbers([row.kl_elsewhere for row in rows], 1)

    refined, random = kl("refined"), kl("random")
    changes = f"by {refined} nats of KL, random ones by {random}"
    return f"Refined writes of the native norm change the other tokens {changes}"


def fig12_frontier(results: Results) -> str:
    def next_token(cells: str) -> str:
        where = dict(cells=cells, target_class="all", magnitude=1.0)
        return shares(row.next_token for row in of_hosts(results, "install_frontier_summary", **where))

    fewest = _smallest(results.rows("install_frontier_summary").cells)
    every, few = next_token("all"), next_token(fewest)
    return f"At the native norm, refined writes in all cells install {every} of targets, in {fewest} cells {few}"


def fig12_delay(results: Results) -> str:
    rows = of_hosts(results, "install_memory_summary")
    word = moves(min(row.rho_low for row in rows), max(row.rho_high for row in rows))
    rhos = numbers(row.rho for row in rows)
    return (
        f"The gain kept after {rows[0].distance} tokens {word} with the half-life of the cell (rank "
        f"correlations {rhos})"
    )


def fig13_ablations(results: Results) -> str:
    rows = results.rows("ablation_contrasts", host=MAIN, place="middle", target="state")
    error, wins = (rows[rows.quantity == name] for name in ("fvu_ratio", "win_rate_coefficient"))
    times = f"{error.value.min():.2f} to {error.value.max():.2f} times the error"
    less = f"{(wins.ci_high < 0).sum()} of {len(wins)} win surely less often"
    return f"On states the variants have {times} of the bilinear rank-1 TopK SAE, and {less}"


def fig13_ladder(results: Results) -> str:
    small, large = ends_of_ladder(results)
    atoms, training = large.n_atoms / small.n_atoms, large.tokens / small.tokens
    longer = f"{atoms:.0f} times the atoms and {training:.0f} times the training"
    return f"With {longer}, SAEs of writes are {estimate(large, 'difference')} points ahead over the three cells"


def fig13_selectivity(results: Results) -> str:
    where = dict(cells="pooled", placement="coefficient", control="random")
    write, state = (share(row.atom_closer) for row in of_targets(results, "selectivity_summary", **where))
    firings = f"{state} (states) and {write} (writes) of firings"
    return f"At its own coefficient the atom is nearer than a random direction at {firings}"


def fig14_every_cell(results: Results) -> str:
    rows = of_hosts(results, "every_cell", amplitude="coefficient")
    return f"Write-trained atoms win more often than state-trained ones in {cells_ahead(rows)} cells of the three hosts"


def fig14_every_seed(results: Results) -> str:
    rows = results.rows("every_cell_seeds", amplitude="coefficient")
    rates = rows.set_index(["target", "host"]).mean_win_rate
    gaps = listed(f"{100 * (rates['write', host] - rates['state', host]):+.0f}" for host in HOSTS)
    spread = 100 * (rows.highest - rows.lowest).max()
    return f"Training on writes changes the mean over cells by {gaps} points; another seed, by at most {spread:.1f}"


def fig15_multiverse(results: Results) -> str:
    tables = [results.rows("multiverse", host=host) for host in HOSTS]
    ahead, behind = (shares(surely(table, side) / len(table) for table in tables) for side in ("ahead", "behind"))
    return f"The atom is surely ahead of the control in {ahead} of universes, surely behind in {behind}"


def fig15_effects(results: Results) -> str:
    rows = of_hosts(results, "multiverse_effects", choice="target", level="write")
    changes = listed(estimate(row, "difference", "ci_low", "ci_high") for row in rows)
    return f"Training on writes instead of states changes the win rate by {changes} points on the three hosts"


def fig15_heads(results: Results) -> str:
    rows = of_targets(results, "heads_summary", amplitude="coefficient")
    write, state = (f"{share(row.lowest)} to {share(row.highest)}" for row in rows)
    return f"Over heads, write-trained atoms beat deletion at {write} of firings, state-trained at {state}"


def fig15_seeds(results: Results) -> str:
    rows = of_targets(results, "seeds_summary", amplitude="coefficient")
    write, state = (f"{share(row.lowest)} to {share(row.highest)}" for row in rows)
    return f"Over seeds, write-trained atoms beat deletion at {write} of firings, state-trained at {state}"


def fig15_failures(results: Results) -> str:
    def ends(target: str) -> str:
        where = dict(host=MAIN, target=target, amplitude="coefficient", by="quartile")
        return shares(results.row("failures", level=level, **where).failure_rate for level in ("Q1", "Q4"))

    atoms = f"state-trained atoms at {ends('state')} of firings, write-trained at {ends('write')}"
    return f"Where it costs least and most, deletion beats {atoms}"


def fig16_cells(results: Results) -> str:
    rows = of_hosts(results, "attribution_trend")
    spans, errors = numbers([x.half_distance for x in rows], 0), numbers([x.decay_error for x in rows], 1)
    error = f"the decays alone are wrong by {errors} times the read"
    return f"In the median cell half of a read is from at most {spans} tokens ago; {error}"


def fig16_maps(results: Results) -> str:
    middle = results.rows("cells", place="middle")[["host", "layer", "head"]]
    errors = results.rows("attribution_summary").merge(middle).set_index("host").decay_error
    parts = listed(f"{errors[host]:.2f} ({HOST[host]})" for host in (MAIN, "rwkv7"))
    return f"Without the erasures, a map of these cells is wrong by {parts} times the size of the read"


def fig17_recall(results: Results) -> str:
    rows = largest_recall(results)
    own, kept = (shares(row[name] for row in rows) for name in ("own", "kept_atom"))
    answers = f"atoms keep {kept} of right answers"
    return f"At side {rows[0].side}, {own} of associations have an atom of their own, and {answers}"


def fig18_features(results: Results) -> str:
    ends = results.rows("residual_features_summary").groupby("predictor").r2_later.agg(["min", "max"])
    layer, first = (f"{low:.2f} to {high:.2f}" for low, high in ends.loc[["through_layer", "exact"]].values)
    return f"R² of the later changes of features is {layer} through the layer, and {first} to first order"


def fig19_recurrence(results: Results) -> str:
    def back(dictionary: str) -> str:
        where = dict(dictionary=dictionary, target="write", centre="none")
        return shares(row.recurs for row in of_hosts(results, "recurrence_summary", **where))

    atoms, centres = back("sae"), back("kmeans")
    return f"{atoms} of the atoms of writes come back in another training, and {centres} of k-means centres"


def fig20_scorecard(results: Results) -> str:
    status = results.rows("scorecard", counts=True).status
    settled = [name for name in VERDICTS if name != "unsettled"]
    counts = listed(f"{(status == name).sum()} {name}" for name in settled)
    return f"{share(status.isin(settled).mean())} of {len(status)} verdicts are settled: {counts}"


def fig20_repeats(results: Results) -> str:
    def same(row: pd.Series, where: str) -> str:
        return f"{share(1 - row.differ)} of {where} (stated: {share(1 - row.stated)})"

    table = results.rows("verdict_repeats")
    parts = [same(table.iloc[0], "simulated repeats")]
    parts += [same(row, "whole other runs") for _, row in table[table.compared == WHOLE].iterrows()]
    return f"Verdicts are the same in {listed(parts)}"


def fig90_own_model(results: Results) -> str:
    rates = results.rows("own_model").set_index("question").value
    atom, random, mean = (share(rates[f"{name} beats deletion"]) for name in ("atom", "random", "mean_write"))
    return f"The atom beats deletion at {atom} of firings, a random atom at {random}, the mean write at {mean}"


TITLES = {name: sentence for name, sentence in list(globals().items()) if name.startswith("fig")}
