"""Page 90: a model, a text, a cell and a word of the reader's choice.

The page's own choice (DEFAULTS) writes into the folders of the profile. Every other choice has folders of its
own, results/own_models/NAME and figures/own_models/NAME; NAME: the model, the cell and a hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pydantic

import writesae as ws
from replication import layout
from replication.study import paths
from replication.study.lock import writing
from replication.study.study import Study, folder_or_id, open_study
from writesae.evaluate.firings import draw_in_rounds
from writesae.evaluate.install import word_token
from writesae.hosts.base import Host
from writesae.hosts.hub import commit
from writesae.text import Corpus

DEFAULTS = dict(model="models/gated_deltanet", tokenizer=None, text=None, layer=4, head=3, word=" list")
FOLDER = "own_models"


@dataclass
class Choice:
    """What a reader chose. token: of the word in a text; origin: fields of the table's sidecar."""

    study: Study
    host: Host
    corpus: Corpus
    cell: tuple[int, int]
    token: int
    origin: dict
    began: float = field(default_factory=time.monotonic)

    def write(self, table: pd.DataFrame, **columns) -> pd.DataFrame:
        """Write own_model.csv, with the cell and these columns, and return it as it is read back."""
        layer, head = self.cell
        table = table.assign(host=self.host.name, layer=layer, head=head, **columns)
        seconds = round(time.monotonic() - self.began, 3)
        return self.study.write("own_model", table, self.host.name, seconds, **self.origin)

    def written(self) -> str:
        """Return where the page has put its table and its figure."""
        table, figure = map(paths.shortened, (self.study.paths.results, self.study.paths.figures))
        return f"The table is {table}/own_model.csv, the figure {figure}/fig90_own_model.png."


def choose(profile, *, model, tokenizer, text, layer, head, word) -> Choice:
    """Load what the parameters of page 90 name, and take the lock of the folders that the page writes.

    A number may be given as text and text as a number, as papermill does; paths are read by `paths.typed`.
    Raises ValueError for a value that does not fit, before computing, and as `open_study` and `load_host`."""
    study = open_study(profile, lock=False)
    chosen = dict(model=local_or_id(model), tokenizer=local_or_id(tokenizer), text=place(text), word=str(word))
    chosen |= dict(layer=whole_number(layer, "layer"), head=whole_number(head, "head"))
    if chosen["model"] is None:
        raise ValueError(f"model must be a folder or a Hub id, such as {DEFAULTS['model']}.")
    folder, tokens = (name and folder_or_id(name) for name in (chosen["model"], chosen["tokenizer"]))
    host, cell = ws.load_host(folder, tokenizer=tokens), (chosen["layer"], chosen["head"])
    host.check_cell(*cell)
    token = word_token(host.tokenizer, chosen["word"])
    if chosen != DEFAULTS:
        study.paths = paths.Paths(f"{FOLDER}/{name_of(host, chosen | dict(profile=study.profile.name))}")
    writing(study.paths)
    revisions = {} if Path(folder).exists() else {host.name: commit(folder)}
    corpus = Corpus(path=chosen["text"] or f"{Path(pydantic.__file__).parent}/**/*.py", root=paths.ROOT)
    return Choice(study, host, corpus, cell, token, chosen | dict(token=token, revisions=revisions))


def whole_number(value, name: str) -> int:
    """Return a parameter as an int: 3, 3.0 and "3" are 3. Raises ValueError for any other value."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"{name} must be a whole number, such as {DEFAULTS[name]}, and is {value!r}.")
    return int(number)


def local_or_id(value) -> str | None:
    """Return the path of a folder that a parameter names, else the Hub id; None for none."""
    if value in (None, ""):
        return None
    folder = paths.typed(str(value))
    return paths.shortened(folder) if folder.exists() else str(value)


def place(text) -> str | None:
    """Return the path or pattern of a text: from the current folder if it has files there, else from the
    repository; None for none."""
    if text in (None, ""):
        return None
    here, there = (Corpus(path=str(text), root=root) for root in (Path.cwd(), paths.ROOT))
    return paths.shortened((here if here.files() else there).place)


def name_of(host: Host, chosen: dict) -> str:
    """Return the name of the folders of a choice."""
    readable = re.sub(r"[^\w.-]+", "_", host.name)
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    return f"{readable}-L{chosen['layer']}-H{chosen['head']}-{digest}"


def draw(firings: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Return `count` firings, or all if there are fewer, as `draw_in_rounds`. Raises ValueError for none."""
    if firings.empty:
        raise ValueError("No atom fires on the held-out windows: give more text, or another cell.")
    return draw_in_rounds(firings, min(count, len(firings)), seed)


def verdict(table: pd.DataFrame) -> str:
    """Return what own_model.csv says, in three sentences."""
    rows = table.set_index("question")
    exact = rows[rows.index.str.startswith("R2 of exact at ")].iloc[0]
    lift = rows.loc["lift of the word, 3x along gamma"]
    shares = [rows.loc[f"{name} beats deletion"] for name in ("atom", "random")]
    atom, random = (layout.percent(x, "value", "ci_low", "ci_high") for x in shares)
    return (
        f"The edited run {'reads' if exact.value > 0.9 else 'does not read'} what was predicted: R2 is "
        f"{exact.value:.3f} at {exact.name.rpartition(' ')[2]} native write norms (n = {int(exact.n)}).\n"
        f"At the native write's norm the atom beats deletion on {atom} of {int(shares[0].n)} firings, and a "
        f"random atom on {random}.\n"
        f"Three writes along gamma change the log-probability of the word by "
        f"{layout.estimate(lift, 'value', 'ci_low', 'ci_high', digits=2, scale=1)} nats in "
        f"the mean over {int(lift.n)} prompts."
    )


# For readers


def shown_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Return a survey of cells for a reader."""
    columns = {"half-life (tokens)": layout.numbers(cells.half_life_median, ".1f")}
    columns |= {"sigma1/sigma2": layout.numbers(cells.sigma1_over_sigma2)}
    columns |= {"rank of added writes": cells.added_write_rank}
    columns |= {"of effective writes": cells.effective_write_rank}
    return layout.shown(cells.assign(cell=layout.cell_names(cells)), ["cell"], columns)


def shown_contexts(contexts: pd.DataFrame) -> pd.DataFrame:
    """Return the strongest firings of atoms for a reader."""
    columns = {"coefficient": layout.numbers(contexts.coefficient), "text": contexts.text}
    return layout.shown(contexts, ["atom"], columns)


def shown_rates(rates: pd.DataFrame) -> pd.DataFrame:
    """Return how often each condition beats deletion, for a reader."""
    columns = {"firings": rates.n, "share (%)": layout.estimates(rates, "value", "ci_low", "ci_high")}
    return layout.shown(rates, ["question"], columns)


def shown_scores(scores: dict[tuple[str, float], float]) -> pd.DataFrame:
    """Return R2 for a reader: predictors down, sizes across. scores: (predictor, size) -> R2."""
    rows = pd.DataFrame([*scores], columns=["predictor", "eps"])
    return layout.across(rows, ["predictor"], "eps", layout.numbers(scores.values(), ".3f"))


def shown_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """Return what installs do, for a reader: medians over prompts, and shares of prompts."""
    by = trials.groupby("direction", sort=False)
    medians = by[["native_rank", "edited_rank", "first_step_lift"]].median()
    columns = {"rank of the word": medians.native_rank.astype(int)}
    columns |= {"after the writes": medians.edited_rank.astype(int)}
    columns |= {"lift (nats)": layout.numbers(medians.first_step_lift)}
    columns |= {"said (%)": layout.numbers(by.included_edited.mean(), ".0f", 100)}
    return layout.shown(medians.reset_index(), ["direction"], columns)
