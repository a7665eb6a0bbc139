"""How a page begins and ends: its result at the top, and a verdict that answers its title at the end.

Both are computed from the page's tables: the result by `findings`, the verdict here. They are about the hosts
and choices of the profile mini; with another profile a page says so."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from IPython.display import DisplayHandle, Markdown, display
from statsmodels.stats.proportion import proportion_confint

from replication import findings
from replication.findings import (
    HOSTS,
    LACKING,
    MAIN,
    Results,
    estimate,
    has_words,
    largest_recall,
    listed,
    of_hosts,
    percent,
    r2,
    win_rate,
)
from replication.plots import HOST
from replication.study.paths import ROOT
from replication.study.study import Study


def opening() -> DisplayHandle:
    """Display the place at the top of a page where `conclude` writes its result."""
    return display(Markdown("**Result.** The last cell of this page writes it here."), display_id=True)


def conclude(opened: DisplayHandle, page: str, study: Study) -> Markdown:
    """Write the result of a page into its opening, and return the page's verdict."""
    if not has_words(study):
        remark = "The sentences of this page are about the profile mini; the tables and figures are those of this one."
        opened.update(Markdown(remark))
        return Markdown(remark)
    results = Results(study.paths.results)
    try:
        finding, answer = (sentence(results) for sentence in PAGES[page])
    except FileNotFoundError as missing:  # what only `make sweep` or `make repeats` leaves
        remark = f"The table {Path(missing.filename).name} is not there yet, so this page has no result in words."
    except LACKING:
        remark = "With these choices the tables lack rows of the profile mini, so this page has no result in words."
    else:
        opened.update(Markdown(f"**Result.** {finding}"))
        return Markdown(answer)
    opened.update(Markdown(remark))
    return Markdown(remark)


def apart(low: float, high: float, words: tuple[str, str] = ("ahead of", "behind")) -> str:
    """Return one of two words if a difference with this interval is above or below 0, else a third."""
    return words[0] if low > 0 else words[1] if high < 0 else "not significantly different from"


def points(row: pd.Series) -> str:
    return f"{estimate(row, 'difference')} points"


def hosts(results: Results) -> str:
    cells = {host: results.rows("all_cells", host=host) for host in HOSTS}
    shares = listed(f"{(x.half_life_median >= 4).mean():.0%}" for x in cells.values())
    costs = listed(f"{1000 * x.cost.median():.1f}" for x in cells.values())
    worth = listed(f"{(x.cost_low > 0).sum()} of {len(x)}" for x in cells.values())
    return (
        f"On the three hosts {shares} of the cells have a half-life of 4 tokens or more. The cost of removing a "
        f"cell's writes differs between hosts: without them the loss rises by {costs} millinats per token in "
        f"the median cell, and certainly rises in {worth} cells."
    )


def harvest(results: Results) -> str:
    rows = [results.rows("harvest", host=host).iloc[0] for host in HOSTS]
    times = listed(f"{row.numbers_per_state / row.numbers_per_token:.0f}" for row in rows)
    return (
        f"Yes, without states: a cell's history takes {times} times fewer numbers on the three hosts, and every "
        "product with the states is exact. RWKV-7 saves least, because its decay and its erasure are vectors."
    )


def train_saes(results: Results) -> str:
    table = results.rows("saes")
    main = table[table.role.str.startswith("main")]
    shares = [100 * main[main.target == target].fvu.median() for target in ("state", "write")]
    alive = (main.alive / main.n_atoms).min()
    return (
        f"Training works, and the dictionaries are coarse: the median SAE leaves {shares[0]:.0f}% of its states "
        f"or {shares[1]:.0f}% of its writes unexplained, and at least {alive:.0%} of the atoms of each are in "
        "use. An atom that replaces a write is therefore an approximation of it, which the next pages test."
    )


def atoms(results: Results) -> str:
    table = results.rows("atom_mixtures", host=MAIN, role="main", components=2)
    two = table[table.ci_high < 0]
    names = (
        listed(f"the {row.place} cell's {row.target}-trained SAE" for row in two.itertuples()) if len(two) else "none"
    )
    return (
        f"Of {len(table)} SAEs of the main host, the BIC of two Gaussians is certainly below that of one in "
        f"{len(two)} ({names}). One skewed group would give the same, and claim A4 asks for more. Elsewhere the "
        "cosines are one bulk with a tail, and register and bundle name its two ends rather than two kinds."
    )


def logit_shift(results: Results) -> str:
    layer, first = (r2(results, x, 10.0) for x in ("through_layer", "exact"))
    return (
        "A write's effect on a logit can be predicted without a fit if the edited layer is taken exactly: even "
        f"at ten native norms R2 is {layer:.2f}, where first order has {first:.1f}. The paper's fitted scalar "
        "tests whether the shift is linear in the size of the edit, not whether the formula predicts it."
    )


def replacement(results: Results) -> str:
    none, mean, scaled = (
        results.row("headline_contrasts", host=MAIN, cells="pooled", amplitude=amplitude, centre=centre)
        for amplitude, centre in (("coefficient", "none"), ("coefficient", "mean"), ("projection", "none"))
    )
    state = win_rate(results, "state")
    words = apart(state.win_rate_low - 0.5, state.win_rate_high - 0.5, ("above", "below"))
    recovered = [percent(win_rate(results, target), "recovered") for target in ("write", "state")]
    return (
        "An atom, at its own coefficient, can stand for a write if its SAE was trained on writes without "
        f"subtracting their mean: it is then {points(none)} ahead of the state-trained atom, whose rate is "
        f"{words} one half. With atoms scaled to fit the write the difference is {points(scaled)}, and with the "
        f"mean subtracted, as in the paper, {points(mean)}. Rates count places; of the mean KL of deletion, "
        f"atoms of writes at their own coefficient recover {recovered[0]} and atoms of states {recovered[1]}."
    )


def objects(results: Results) -> str:
    where = dict(host=MAIN, cells="pooled", target="state", centre="none")
    write, state = (results.row("objects_summary", object=x, **where) for x in ("write", "state"))
    rhos = [estimate(row, "rho", digits=2, scale=1) for row in (write, state)]
    return (
        "The paper's pattern is that wins do not depend on the cosine. Over the three cells their rank "
        f"correlation is {rhos[1]} where the state is replaced, and {rhos[0]} where the write is. That is "
        "without the mean; if it is subtracted, as in the paper's text, the correlation is "
        f"{findings.cosine(results, centre='mean')} where the state is replaced. Deleting the state has "
        f"{state.kl_delete / write.kl_delete:.0f} times the median KL of deleting the write."
    )


def all_writes(results: Results) -> str:
    where = dict(host=MAIN, role="pooled", layer=4, centre="none")
    read = results.row("all_writes", condition="read", target="state", **where)
    atom, whole = (results.row("all_writes", condition=x, target="write", **where) for x in ("atom", "reconstruction"))
    shares = [percent(row, "recovered", "ci_low", "ci_high") for row in (read, atom, whole)]
    overlap = read.ci_low < whole.ci_high
    return (
        f"In the middle cell, reading every state through the state-trained SAE (no mean) recovers {shares[0]} "
        "of the loss that the cell's writes are worth. Putting the write-trained SAE's top atom in every "
        f"write's place recovers {shares[1]}, and its whole reconstruction {shares[2]}. With "
        f"{read.passages:.0f} passages the intervals {'overlap' if overlap else 'are apart'}."
    )


def baselines(results: Results) -> str:
    where = dict(host=MAIN, cells="pooled", target="write", centre="none")
    where |= dict(amplitude="projection", reference="best_atom")
    others = {
        "a random atom": dict(method="random"),
        "the mean write": dict(method="mean_write"),
        "the mean write of the token": dict(method="token_mean"),
        "the nearest of 512 raw writes": dict(method="nearest_write", size=512),
        "the nearest of 512 k-means centres": dict(method="kmeans", size=512),
        "the nearest atom of an SAE with one active atom": dict(method="k1_best_atom", size=512),
    }
    parts = {}
    for name, other in others.items():
        row = results.row("baselines_contrasts", **other, **where)
        group = parts.setdefault(apart(row.difference_low, row.difference_high), [])
        group.append(f"{name} ({points(row)}; nearer at {percent(row, 'atom_closer', 'ci_low', 'ci_high')} of places)")
    return (
        "In the share of KL that is recovered, the nearest atom is "
        + "; ".join(f"{words} {listed(group)}" for words, group in parts.items())
        + "."
    )


def population(results: Results) -> str:
    rows = results.rows("population", host=MAIN, amplitude="coefficient")
    sure = {}
    for target, part in rows.groupby("target"):
        low, high = proportion_confint((part.win_rate * part.firings).round(), part.firings, method="beta")
        above, below = (low > 0.5).sum(), (high < 0.5).sum()
        sure[target] = f"{above} of {len(part)} have a win rate above one half, and {below} below it"
    return (
        f"Of the state-trained atoms {sure['state']}; of the write-trained ones {sure['write']} (by the 95% "
        "Clopper-Pearson interval of each atom). The intervals of the others contain one half."
    )


def other_hosts(results: Results) -> str:
    rows, scaled = (
        of_hosts(results, "headline_contrasts", cells="middle", amplitude=x, centre="none")[1:]
        for x in ("coefficient", "projection")
    )
    parts = [f"{points(row)} on {HOST[host]}" for row, host in zip(rows, HOSTS[1:], strict=True)]
    layer, paper = (
        listed(f"{r2(results, x, 1.0, host):,{form}}" for host in HOSTS[1:])
        for x, form in (("through_layer", ".3f"), ("paper", ".0f"))
    )
    return (
        f"Training on writes instead of states changes the win rate by {listed(parts)}; with atoms scaled to "
        f"fit the write by {listed(points(row) for row in scaled)}. The closed form that takes the edited layer "
        f"exactly has an R2 of {layer} there without a fit, at the size of a native write, and the paper's "
        f"formula without its scalar {paper}."
    )


def cache_edits(results: Results) -> str:
    where = dict(host=MAIN, target="state", condition="delete", atom="all", dose=1)
    other, same = (
        estimate(
            results.row("cache_erase_summary", token_from=x, **where), "median_change", "ci_low", "ci_high", 1, 1000
        )
        for x in ("other", "same")
    )
    where = dict(host=MAIN, role="boundary", dose=5)
    beyond, cell = (
        estimate(results.row("newlines_summary", mode=mode, **where), "beyond_random", scale=1)
        for mode in ("kept", "offset")
    )
    readers = results.rows("top_readers", **{"host": MAIN, "class": "register"})
    return (
        f"Erasing an atom's write changes the log-probability of its preferred token by {other} millinats, and "
        f"by {same} if the token is found on the tested firings (the paper: -116). The change of newlines per "
        f"400 tokens by amplified atoms of line ends, minus that by random atoms, is {beyond} if they are added "
        f"to the states of every head of a layer, and {cell} if one cell is read so. The strongest readers of "
        f"register atoms react {listed(f'{x:.1f}' for x in readers.ratio)} times as much as to a random write "
        "(the paper: 5.2 to 7.5 times its own baseline). All of this is on the main host."
    )


def install(results: Results) -> str:
    where = dict(cells="all", magnitude=1, writes=3, target_class="middle", distance="3")
    refined, random = (of_hosts(results, "install_cells_summary", direction=x, **where) for x in ("refined", "random"))
    installed, trials = (
        listed(f"{row[x]:{form}}" for row in refined) for x, form in (("next_token", ".0%"), ("n", ".0f"))
    )
    costs, of_random = (listed(f"{row.kl_elsewhere:.2g}" for row in rows) for rows in (refined, random))
    rows = of_hosts(results, "install_ceiling_summary")
    enough = listed(f"{row.enough:.0%}" for row in rows)
    needed, ceiling = (listed(f"{row[name]:.1f}" for row in rows) for name in ("needed", "ceiling"))
    return (
        f"Writes in all cells, refined by gradient, install {installed} of the words of rank 101 to 1,000 three "
        f"tokens later on the three hosts ({trials} trials), and the best writes tried in one cell gain enough "
        f"for {enough}. Such a word needs {needed} nats, and the ceiling of the best cell is {ceiling} in the "
        f"mean. Writes in all cells change the rest as well: the KL of the other tokens is {costs} nats, after "
        f"random writes of the same size {of_random}."
    )


def ablations(results: Results) -> str:
    start = results.row("ablation_starts", host=MAIN, target="write")
    ladder = results.rows("ablation_ladder")
    small, large = findings.ends_of_ladder(results)
    errors = results.rows("ablation_contrasts", host=MAIN, target="state", quantity="fvu_ratio").value

    def lower(target: str, quantity: str) -> str:
        rows = results.rows("ablation_contrasts", host=MAIN, target=target, quantity=quantity, place="middle")
        return f"{(rows.ci_high < 0).sum()} of {len(rows)}"

    return (
        f"Other encoders, decoders, sparsity rules and ranks have {errors.min():.2f} to {errors.max():.2f} "
        "times the error of the bilinear rank-1 TopK SAE on states. In the middle cell the win rate is "
        f"certainly lower in {lower('state', 'win_rate_coefficient')} variants for states and "
        f"{lower('write', 'win_rate_coefficient')} for writes, and at the native write's norm in "
        f"{lower('state', 'win_rate_matched_norm')} and {lower('write', 'win_rate_matched_norm')}. Random "
        f"starts change the headline's win rate of write-trained atoms by {points(start)} over three cells; "
        f"page 14 asks it in every cell. With {large.n_atoms:,.0f} atoms and {large.tokens / small.tokens:.0f} "
        f"times the training tokens, the errors fall {findings.errors_of_ladder(results)} over the three cells "
        f"of the headline, and SAEs of writes are {points(large)} ahead ({points(small)} with the smallest "
        f"SAEs). In the middle cell they are certainly ahead at {(ladder.difference_low > 0).sum()} of "
        f"{len(ladder)} sizes, by {findings.ladder_ahead(results)}; with atoms scaled to fit the write by "
        f"{findings.ladder_ahead(results, '_projection')}."
    )


def every_cell(results: Results) -> str:
    rows, scaled = (of_hosts(results, "every_cell", amplitude=x) for x in ("coefficient", "projection"))
    random = of_hosts(results, "every_cell_starts", start="random")
    falls = [
        sum(findings.with_memory(results, host, amplitude).rho_half_life_median_high < 0 for host in HOSTS)
        for amplitude in ("coefficient", "projection")
    ]
    return (
        f"The write-trained atom is ahead in {findings.cells_ahead(rows)} cells of the three hosts, in the mean "
        f"over cells by {listed(points(row) for row in rows)}, at the atom's own coefficient; scaled to fit the "
        f"write it is ahead in {findings.cells_ahead(scaled)}. If atoms start at random, it is ahead in "
        f"{findings.cells_ahead(random)}. The state-trained atom's rate certainly falls with the half-life on "
        f"{falls[0]} of {len(HOSTS)} hosts, and on {falls[1]} if atoms are scaled to fit the write."
    )


CHOICES = dict(control="what the atom must beat", target="what the SAE is trained on", centre="the mean")
CHOICES |= dict(pooling="which firings count", amplitude="the atom's amplitude", reading="who reads the edit")
CHOICES |= dict(write="the definition of the write", kl_direction="the direction of the KL")


def multiverse(results: Results) -> str:
    parts = []
    for host in HOSTS:
        first = results.rows("multiverse_effects", host=host).drop_duplicates("choice").nlargest(2, "share")
        parts.append(f"{HOST[host]}: " + listed(f"{CHOICES[x.choice]} ({x.share:.0%})" for x in first.itertuples()))
    return f"The two choices with the largest shares of the variance between win rates are: {'; '.join(parts)}."


def scorecard(results: Results) -> str:
    kept = results.rows("scorecard", counts=True, host=MAIN)
    first = kept[kept.group == "headline"]
    counts = [f"{(first.status == name).sum()} {name}" for name in first.status.unique()]
    return (
        f"On the main host, the verdicts on the paper's headline claims are: {listed(counts)}. Of all "
        f"{len(kept)} verdicts there, {(kept.status == 'unsettled').sum()} are unsettled, and "
        f"{(kept.trainings == 1).sum()} rest on one training, so their intervals are widened by the spread "
        "between trainings elsewhere."
    )


def attribution(results: Results) -> str:
    rows = of_hosts(results, "attribution_trend")
    spans = listed(f"{row.half_distance:.0f}" for row in rows)
    own = listed(f"{row.share_own:.0%}" for row in rows)
    return (
        f"In the median cell of the three hosts, half of what a head reads was written within {spans} tokens, "
        f"and {own} is the token's own write. A map from decays alone has an error of "
        f"{findings.decay_errors(results)} times the size of the read on the Gated DeltaNet and on RWKV-7, "
        "because erasures count as well."
    )


def recall(results: Results) -> str:
    rows = largest_recall(results)
    own, nothing = (listed(f"{row[name]:.0%}" for row in rows) for name in ("own", "kept_delete"))
    return (
        f"Atoms of rank 1 do not get worse with the side where the right dictionary has rank 1: {own} of the "
        f"associations have an atom of their own at side {rows[0].side} (Gated DeltaNet, Mamba-2, RWKV-7). "
        f"Without the write {nothing} of the answers stay right, so the measure can fail. Whether the writes of "
        "a language model have such a dictionary is another question."
    )


def residual_features(results: Results) -> str:
    where = dict(cells="middle", object="atom", predictor="through_layer")
    hits = percent(results.row("residual_features_summary", **where), "hits")
    return (
        "The form through the layer predicts which features an atom raises, and when: of the ten features that "
        f"it predicts to rise most at later tokens, {hits} are among the ten that rise most."
    )


def recurrence(results: Results) -> str:
    where = dict(target="write", centre="none")
    tied, raw = (results.row("recurrence_summary", host=MAIN, dictionary=x, **where) for x in ("tied", "raw"))
    atoms, means = (
        listed(f"{results.row('recurrence_summary', host=host, dictionary=x, **where).recurs:.0%}" for host in HOSTS)
        for x in ("sae", "kmeans")
    )
    return (
        f"Few come back: {atoms} of the atoms of writes on the three hosts. Of k-means centroids of drawn "
        f"writes {means} come back. A tied encoder does not help ({tied.recurs:.0%} on the main host). The text "
        f"predicts where an atom fires, and where a raw write is nearest almost as well (AUC {raw.auc_all:.2f})."
    )


PAGES = {  # the finding and the verdict of each page, which are named after it
    path.stem: (getattr(findings, path.stem[3:]), globals().get(path.stem[3:]))
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    if hasattr(findings, path.stem[3:])
}
