"""Page 18: a write in the words of a residual-stream SAE, predicted and measured.

One SAE of the residual stream behind the layer of the last chosen cell of the main host is trained by the
trainer of states and writes, on vectors. At places uniform over held-out positions, in each chosen cell, two
edits are made: the native write is taken out ("write": the changes with the opposite sign are what it
raised), and the atom of the write-trained SAE that fires there is added at the native write's norm ("atom").
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from replication import layout
from replication import statistics as stats
from replication.study import fingerprint
from replication.study.firings import firings_of, saes_on
from replication.study.study import Study
from replication.study.training import main_role
from writesae.edit import make_edit
from writesae.evaluate.atoms import frequent_tokens
from writesae.evaluate.features import PREDICTORS, feature_changes
from writesae.evaluate.firings import draw_positions, firings_at
from writesae.files import load_tensors, save_tensors, up_to_date
from writesae.history import History
from writesae.hosts.base import Host
from writesae.sae.train import train
from writesae.sae.vectors import VectorSAE
from writesae.text import Windows

OBJECTS = ("write", "atom")
TOP = 10  # features that are compared by name
NAMES = dict(through_layer="through the layer", exact="first order", direct="direct path")


def stream(host: Host, windows: Windows, layer: int, batch: int) -> torch.Tensor:
    """Return the residual stream [N, T, D] behind a layer, fp32 on the CPU."""
    width, parts = host.unembedding().shape[1], windows.tokens.split(batch)
    with torch.no_grad():
        return torch.cat([host.run(part, upto=layer + 1).final[..., :width].float().cpu() for part in parts])


def residual_sae(study: Study) -> VectorSAE:
    """Return the SAE of the main host's residual stream, trained once and kept in build/.

    The first positions of a window, at which no experiment looks, are left out of its training. metadata:
    layer, and fvu, the error on held-out windows about their mean, as a share of the variance.
    """
    name, data, section = study.main, study.profile.data, study.profile.residual_features
    settings = section.training.model_copy(update=dict(seed=study.profile.seed))
    path = study.paths.build / "residual" / f"{name}.safetensors"
    layer = max(study.cell(name, place)[0] for place in study.profile.hosts[name].paper_places)
    inputs = dict(host=study.host_fingerprint(name), windows=study.windows_hash(name, "sae"), count=section.windows)
    inputs |= dict(settings=settings, layer=layer, first=data.first_position)
    inputs |= dict(heldout=study.windows_hash(name, "heldout"), tested=section.test_windows)
    expected = fingerprint.fingerprint(["replication.pages.residual_features"], **inputs)
    if not up_to_date(path, expected):
        windows, heldout = study.windows(name, "sae")[: section.windows], study.windows(name, "heldout")
        options = study.host(name), layer, data.batch_windows
        x = stream(options[0], windows, *options[1:])[:, data.first_position :]
        ones = torch.ones(*x.shape[:2], 1)
        sae, _ = train(History(ones, x).to(study.device), settings, progress=False)
        sae = VectorSAE.of_rows(sae.cpu())
        test = stream(options[0], heldout[: section.test_windows], *options[1:])[:, data.first_position :]
        error = (test - sae.decode(sae.encode(test))).square().sum() / (test - test.mean((0, 1))).square().sum()
        tensors = dict(encoder=sae.encoder, encoder_bias=sae.encoder_bias)
        tensors |= dict(decoder=sae.decoder, decoder_bias=sae.decoder_bias)
        save_tensors(path, tensors, dict(fingerprint=expected, fvu=float(error), layer=layer, k=settings.k))
    tensors, record = load_tensors(path)
    return VectorSAE(**tensors, k=record["k"], metadata=dict(layer=record["layer"], fvu=record["fvu"]))


def measure(study: Study, sae: VectorSAE) -> pd.DataFrame:
    """Write results residual_features.csv: one row per (cell, object, place, predictor). Return it.

    residual, total: sums over features and the tokens from the write on of the squared error and of the
    squared measured change of pre-activations; residual_later, total_later: without the writing token. hits:
    of the TOP features predicted to rise most at a later token, those among the measured TOP. feature, later:
    the one that is predicted to rise most, and how many tokens later; predicted, measured: its rise then;
    same_token: whether its measured rise is largest then."""
    name, section, profile = study.main, study.profile.residual_features, study.profile
    windows = study.windows(name, "heldout")[: section.test_windows]
    last = windows.tokens.shape[1] - section.horizon
    first, role = profile.data.first_position, main_role(study, "none", profile.seed)
    drawn = draw_positions(windows.passage, first, last, section.places, profile.seed)
    cells = [study.cell(name, place) for place in profile.hosts[name].paper_places]
    saes = saes_on(study, name, windows, [(cell, "write", role) for cell in cells])
    edits = []
    for cell, cell_sae in zip(cells, saes, strict=True):
        firings = firings_at(cell_sae, drawn)
        key, value = (side[torch.tensor(firings.atom.to_numpy())] for side in cell_sae.sae.atoms())
        edits.append((*cell, firings, key, value))
    size = profile.data.batch_windows
    given = dict(host=study.host(name), windows=windows, edits=edits, sae=vars(sae), size=size)
    given |= dict(write=profile.saes.write, horizon=section.horizon)
    groups = range(0, len(windows), size)
    return study.gather("residual_features", [study.stage("residual_features", name, groups, of_windows, **given)])


def of_windows(
    start: int, host: Host, windows: Windows, edits: list, sae: dict, size: int, write: str, horizon: int
) -> pd.DataFrame:
    """Return the rows of the places in `size` windows."""
    sae, tables = VectorSAE(**sae), []
    run = host.run(windows.tokens[start : start + size])
    for layer, head, firings, key, value in edits:
        here = firings.window.between(start, start + size - 1) & (firings.coefficient > 0)
        if not here.any():
            continue
        part, chosen = firings[here], torch.tensor(here.to_numpy())
        key, value = key[chosen], value[chosen]
        rows, position = (torch.tensor(x.to_numpy()) for x in (part.window - start, part.position))
        native = host.factors(run, layer, head).at(rows, position)
        own = native.key, native.write(write)
        norm = own[0].norm(dim=-1) * own[1].norm(dim=-1)
        sides = dict(write=(own[0], -own[1], -1), atom=(key, norm[:, None] * value, 1))
        for name in OBJECTS:
            left, right, sign = sides[name]
            edit = make_edit(rows, position, left[:, None], right[:, None])
            changes = feature_changes(host, run, layer, head, edit, sae, sae.metadata["layer"], horizon)
            changes = {kind: sign * x for kind, x in changes.items()}
            for predictor in PREDICTORS:
                columns = compared(changes[predictor], changes["measured"])
                columns |= dict(host=host.name, layer=layer, head=head, object=name, predictor=predictor)
                tables.append(part.assign(**columns, distance=sae.metadata["layer"] - layer))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"host": []})


def compared(predicted: torch.Tensor, measured: torch.Tensor) -> dict:
    """Return the columns of `measure` for changes [R, steps, n]."""
    columns = {}
    for name, x in (("residual", predicted - measured), ("total", measured)):
        squares = x.double().square().sum(-1)
        columns |= {name: squares.sum(1).numpy(), f"{name}_later": squares[:, 1:].sum(1).numpy()}
    rises = [x[:, 1:].max(1) for x in (predicted, measured)]
    tops = [rise.values.topk(TOP).indices for rise in rises]
    columns["hits"] = (tops[0][:, :, None] == tops[1][:, None]).any(-1).sum(1).numpy()
    rows, feature = torch.arange(len(predicted)), tops[0][:, 0]
    steps = [rise.indices[rows, feature] for rise in rises]
    columns |= dict(feature=feature.numpy(), later=1 + steps[0].numpy())
    columns |= dict(predicted=predicted[rows, 1 + steps[0], feature].double().numpy())
    columns |= dict(measured=measured[rows, 1 + steps[0], feature].double().numpy())
    return columns | dict(same_token=(steps[0] == steps[1]).numpy())


def summarise(table: pd.DataFrame, cells: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return a row per (cell, object, predictor): R2 about no change, and shares; bootstraps by passage.

    r2, r2_later: 1 - residual / total over all features, places and tokens, with and without the writing
    token. hits: mean share of the TOP features; same_token: share of places; r2_top: R2 of the feature that
    is predicted to rise most. cells: cells.csv, for the column `cells`."""
    keys = ["host", "layer", "head", "distance", "object", "predictor"]

    def row(part: pd.DataFrame) -> dict:
        options = part.passage, resamples, seed
        numbers = dict(n=len(part), n_passages=part.passage.nunique())
        tops = (part.predicted - part.measured) ** 2, part.measured**2
        pairs = dict(r2=(part.residual, part.total), r2_later=(part.residual_later, part.total_later), r2_top=tops)
        for name, (miss, size) in pairs.items():
            high, low = (1 - end for end in stats.ratio_bootstrap(miss, size, *options))
            numbers |= stats.with_ends(name, 1 - miss.sum() / size.sum(), stats.Interval(low, high))
        for name, values in dict(hits=part.hits / TOP, same_token=part.same_token.astype(float)).items():
            ends = stats.cluster_bootstrap(values, part.passage, np.mean, resamples, seed)
            numbers |= stats.with_ends(name, values.mean(), ends)
        return numbers

    summary = stats.per_group(table, keys, row)
    where = ["host", "layer", "head"]
    return cells[[*where, "place"]].rename(columns=dict(place="cells")).merge(summary, on=where)


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary for a reader, without the direct path's shares."""

    columns = {"layers between": summary.distance, "n": summary.n}
    columns |= {"R2": layout.plain(summary, "r2", digits=3)}
    columns |= {"R2, later tokens": layout.plain(summary, "r2_later", digits=3)}
    columns |= {f"of the top {TOP} (%)": layout.estimates(summary, "hits")}
    rows = summary.assign(prediction=summary.predictor.map(NAMES)).rename(columns=dict(object="edit"))
    return layout.shown(rows, ["cells", "edit", "prediction"], columns)


def examples(study: Study, sae: VectorSAE, table: pd.DataFrame, count: int = 3) -> pd.DataFrame:
    """Return the atoms of the middle cell with the largest predicted later rise of a feature, in words.

    The rule: by the prediction through the layer, each with another feature, passage and atom. An atom is named
    by the most frequent tokens of its firings, a feature by those of its 50 largest activations."""
    name, section = study.main, study.profile.residual_features
    windows, tokenizer = study.windows(name, "heldout")[: section.test_windows], study.host(name).tokenizer
    layer, head = study.cell(name, "middle")
    chosen = table[(table.layer == layer) & (table["head"] == head) & (table.object == "atom")]
    chosen = chosen[chosen.predictor == "through_layer"].sort_values("predicted", ascending=False)
    for column in ("feature", "passage", "atom"):
        chosen = chosen.drop_duplicates(column)
    (cell_sae,) = saes_on(
        study, name, windows, [((layer, head), "write", main_role(study, "none", study.profile.seed))]
    )
    firings = firings_of(study, cell_sae, windows)
    first, batch = study.profile.data.first_position, study.profile.data.batch_windows
    active = sae.encode(stream(study.host(name), windows, sae.metadata["layer"], batch))
    active[:, :first] = 0
    rows = []
    for row in chosen.head(count).itertuples():
        strongest = active[..., row.feature].flatten().topk(50)
        window, position = np.unravel_index(strongest.indices[strongest.values > 0].numpy(), active.shape[:2])
        feature = frequent_tokens(tokenizer, windows, pd.DataFrame(dict(window=window, position=position)))
        fires = frequent_tokens(tokenizer, windows, firings[firings.atom == row.atom])
        text = tokenizer.decode(windows.tokens[row.window, max(0, row.position - 8) : row.position + 1])
        words = dict(text=text, atom=f"{row.atom}: {fires}", feature=f"{row.feature}: {feature}")
        rows.append(words | dict(later=row.later, predicted=row.predicted, measured=row.measured))
    names = dict(text="text up to the write", atom="the atom fires on", feature="the feature is active on")
    names |= dict(later="tokens later", predicted="predicted rise", measured="measured rise")
    table = pd.DataFrame(rows, columns=list(names)).rename(columns=names)
    return table.round(2).set_index(names["text"])
