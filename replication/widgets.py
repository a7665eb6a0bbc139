"""Two pages to try things on: an atom of notebook 03, and an install of notebook 10 with a prompt and a word of one's own.

`atoms` and `installs` show controls with a page below them. Where nothing answers controls (a notebook on the web, a
run without a front end, an environment without ipywidgets) the page stands there alone, for the first atom and the default
prompt: the output carries the page as HTML beside the controls, and a front end takes what it can show.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import cached_property

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display

from replication import html as browser
from replication.classes import Scan
from replication.html import marked_html, sentence_html, table_html
from replication.study.study import Suite
from writesae.edit import generate
from writesae.evaluate import install, promoted
from writesae.evaluate.atoms import frequent_tokens, top_contexts
from writesae.shift import direct_path, gamma, reads

CONTEXTS = 5  # of an atom
TOKENS = 5  # promoted and demoted tokens of each kind
PROMPT = "Return the mean of the elements of the array along the given axis. The"
TARGET = "values"
MAGNITUDE = 3.0  # native write norms, as in the paper's Table 3
NAMES = dict(paper="the paper's direction", gamma="top singular pair of Γ")


# An atom


class Atoms:
    """The pages of one cell's atoms.

    alive: lines of atoms.csv. firings: those that are known already, e.g. the exemplars'; where another atom is asked for, the
    cell's held-out windows are encoded, once."""

    def __init__(self, suite: Suite, alive: pd.DataFrame, firings: pd.DataFrame, host: str | None = None):
        """The cell is the one that the profile's section `atoms` names, of the main host unless `host` says another."""
        self.suite, self.name = suite, host or suite.main
        self.place = suite.profile.section("atoms", self.name).place
        self.cell = suite.cell(self.name, self.place)
        here = (alive.host == self.name) & (alive.place == self.place) & (alive.role == "main")
        self.alive = alive[here].sort_values("firings", ascending=False)
        own = dict(host=self.name, layer=self.cell[0], head=self.cell[1])
        self.known = firings[np.logical_and.reduce([firings[column] == value for column, value in own.items()])]
        self.targets = [target for target in suite.profile.saes.targets if target in set(self.alive.target)]
        self.found: dict[str, pd.DataFrame] = {}

    @cached_property
    def scan(self) -> Scan:
        return Scan(self.suite, self.name)

    def choices(self, target: str) -> list[tuple[str, tuple[str, int]]]:
        """(label, (target, atom)) of every alive atom of the SAE trained on `target`: those whose firings are known first,
        then the others, the most firing first."""
        rows = self.alive[self.alive.target == target]
        first = rows.atom.isin(self.known[self.known.target == target].atom)
        rows = pd.concat([rows[first], rows[~first]])
        label = "{}: {}, cosine {:.2f}, {:,} firings"
        return [
            (label.format(*row), (target, row[0])) for row in zip(rows.atom, rows["class"], rows.cosine, rows.firings)
        ]

    def line(self, target: str, atom: int) -> pd.Series:
        """What atoms.csv says of the atom. Raises ValueError where it is not alive in that SAE."""
        row = self.alive[(self.alive.target == target) & (self.alive.atom == atom)]
        if row.empty:
            raise ValueError(f"Atom {atom} of the SAE trained on {target} never fires: choose one of the list.")
        return row.iloc[0]

    def firings(self, target: str, atom: int) -> pd.DataFrame:
        """Every firing of the atom on the held-out windows, as in `writesae.evaluate.firings`."""
        known = self.known[(self.known.target == target) & (self.known.atom == atom)]
        if len(known):
            return known
        if target not in self.found:
            where = dict(host=self.name, layer=self.cell[0], head=self.cell[1], target=target)
            self.found[target] = self.scan.firings(*self.cell, target, "main")[1].assign(**where)
        return self.found[target][self.found[target].atom == atom]

    def tokens(self, target: str, atom: int, firings: pd.DataFrame) -> pd.DataFrame:
        """Promoted and demoted tokens (`promoted.top_tokens`), averaged over the atom's top contexts."""
        host, windows = self.suite.host(self.name), self.scan.windows
        picked = top_contexts(host.tokenizer, windows, firings, browser.PROMOTED_FIRINGS)
        rows, within = np.unique(picked.window, return_inverse=True)
        run, where = host.run(windows.tokens[torch.from_numpy(rows)]), torch.from_numpy(within)
        key, value = (
            side[atom].expand(len(picked), -1) for side in self.suite.sae(self.name, *self.cell, target).atoms()
        )
        position, write = torch.tensor(picked.position.to_numpy()), self.suite.profile.saes.write
        shifts = promoted.token_shifts(host, run, self.cell, write, where, position, key, value)
        mean = {kind: found.float().mean(0, keepdim=True) for kind, found in shifts.items()}
        return promoted.top_tokens(mean, picked.assign(atom=0), TOKENS)

    def page(self, target: str, atom: int) -> str:
        """HTML: what the atom is, where it fires most, and the tokens that it promotes, predicted and measured."""
        row, firings = self.line(target, atom), self.firings(target, atom)
        tokenizer, windows = self.suite.host(self.name).tokenizer, self.scan.windows
        facts = {"class": row["class"], "median cosine to the write": row.cosine, "of the keys": row.cosine_key}
        facts |= {"of the values": row.cosine_value, "at other atoms' firings": row.elsewhere}
        facts |= {"firings": row.firings, "share of tokens": f"{row.rate:.2%}", "passages": row.passages}
        facts |= {"fires on": frequent_tokens(tokenizer, windows, firings)}
        contexts = browser.contexts(tokenizer, windows, firings, CONTEXTS)[atom]
        texts = "".join(f"<pre>{marked_html(parts)}</pre>" for _, parts in contexts)
        where = f"layer {self.cell[0]} head {self.cell[1]} of {self.name}, trained on {target}"
        return (
            f"<h4>Atom {atom} ({html.escape(where)})</h4>{table_html(pd.DataFrame([facts]))}"
            f"<p>Top contexts, one a passage; marked: the tokens at which it fires.</p>{texts}"
            f"{promoted_html(self.tokens(target, atom, firings), tokenizer)}"
        )


def promoted_html(table: pd.DataFrame, tokenizer) -> str:
    """The tokens of one atom, a column a predictor and direction, each with its shift."""
    columns = {}
    for direction in ("promoted", "demoted"):
        for kind in promoted.KINDS:
            rows = table[(table.kind == kind) & (table.direction == direction)].sort_values("rank")
            columns[f"{direction}, {kind}"] = [
                f"{tokenizer.decode([token])!r} {shift:+.2g}" for token, shift in zip(rows.token, rows["shift"])
            ]
    r2 = table.drop_duplicates("kind").set_index("kind").r2
    return (
        f"<p>One native write norm of the atom, added at its n = {table.n.iloc[0]} top contexts: mean shift of the next "
        f"token's logits, less their mean. R2 over the vocabulary: paper {r2['paper']:.3f}, exact {r2['exact']:.3f}.</p>"
        f"{table_html(pd.DataFrame(columns))}"
    )


# An install


def one_token(tokenizer, word: str) -> int:
    """The token that is this word, with a space before it where that is one too (as it stands inside a text).

    Raises ValueError where the word is empty or more than one token."""
    if not word.strip():
        raise ValueError(f"Type a target word that is one token of the model, such as {TARGET!r}.")
    for form in [word] if word[0].isspace() else [f" {word}", word]:
        ids = tokenizer(form, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return ids[0]
    pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
    raise ValueError(f"The target must be one token, and {word!r} is {len(ids)} ({pieces}): type a more common word.")


def prompt_tokens(tokenizer, prompt: str, fewest: int, most: int) -> torch.Tensor:
    """The prompt's tokens [1, T] after end-of-text, as the hosts are trained.

    Raises ValueError where there are fewer or more than can be used."""
    ids = [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not fewest <= len(ids) - 1 <= most:
        raise ValueError(f"The prompt has {len(ids) - 1} tokens: type one of {fewest} to {most}.")
    return torch.tensor([ids])


def predicted(host, cell, trial: install.Setting, key: torch.Tensor, value: torch.Tensor, magnitude: float) -> dict:
    """Shift of the target's logit at the end of the prompt by all writes of one trial: `paper` (App. A) and `exact` (x^T
    Gamma w), nothing fitted. key [1, writes, d_k], value [1, writes, d_v]: of unit norm."""
    factors, count = host.factors(trial.run, *cell), key.shape[1]
    starts, size = torch.full_like(trial.prompt, trial.start), magnitude * trial.norms[0]
    influence = gamma(factors, trial.prompt, starts, trial.gradient)[0, :count]
    exact = size * torch.einsum("wk,wkv,wv->w", key[0], influence, value[0])
    last = trial.run.tokens.shape[1] - 1
    decayed = [
        reads(factors, trial.prompt, starts + w, last - trial.start - w, key[0, w : w + 1])[0][0, 0]
        for w in range(count)
    ]
    direct = direct_path(host, *cell, value[0], trial.target)[0]
    return dict(paper=float((size * torch.stack(decayed) * direct).sum()), exact=float(exact.sum()))


class Installs:
    """Installs of one word after one prompt: three writes at the prompt's last tokens, as in notebook 10."""

    def __init__(self, suite: Suite, host: str | None = None):
        """The cell is the one that the profile's section `install` names, of the main host unless `host` says another."""
        name = host or suite.main
        self.host, self.settings = suite.host(name), suite.profile.section("install", name)
        self.cell, self.write = suite.cell(name, self.settings.place), suite.profile.saes.write
        self.most = suite.profile.data.window - self.settings.new_tokens - 1

    def run(self, prompt: str, word: str, magnitude: float) -> tuple[pd.DataFrame, dict[str, list[int]]]:
        """A line a direction (predicted and measured shift of the target's logit, its rank and log-probability before and
        after), and the greedy continuations: unedited, paper, gamma -> tokens.

        Raises ValueError, in one sentence, for a prompt, a target or a magnitude that cannot be used."""
        if not 0 < magnitude < float("inf"):
            raise ValueError(f"The magnitude is {magnitude:g}: give one above 0, in native write norms.")
        tokens = prompt_tokens(self.host.tokenizer, prompt, self.settings.writes, self.most)
        targets = torch.tensor([[one_token(self.host.tokenizer, word)]])
        run, distance = self.host.run(tokens), self.settings.writes
        labels = np.array(["typed"])
        writes = dict(writes=self.settings.writes, write=self.write)
        trial = install.setting(self.host, run, self.cell, targets, labels, distance, **writes)
        native = self.host.logits(run.final[:, -1])
        texts = dict(unedited=install.native_continuations(self.host, run, self.settings.new_tokens)[0].tolist())
        rows = []
        for name in install.DIRECTIONS:
            key, value = install.directions(self.host, self.cell, trial, name)
            edit = install.write_edit(trial, key, value, torch.tensor([float(magnitude)]))
            made, logits = generate(self.host, run, *self.cell, edit, self.settings.new_tokens)
            texts[name] = made[0].tolist()
            row = {"direction": name}
            for kind, shift in predicted(self.host, self.cell, trial, key, value, magnitude).items():
                row[f"predicted_{kind}"] = shift
            row["measured"] = float((logits - native)[0, trial.target[0]])
            for when, found in (("native", native), ("edited", logits)):
                row[f"rank_{when}"] = int(install.ranks(found, trial.target))
                row[f"log_p_{when}"] = float(F.log_softmax(found, -1)[0, trial.target[0]])
            rows.append(row)
        return pd.DataFrame(rows), texts

    def page(self, prompt: str, word: str, magnitude: float) -> str:
        """HTML: the shifts, and the three continuations side by side with the target marked. Raises as `run` does."""
        table, texts = self.run(prompt, word, magnitude)
        token, decode = one_token(self.host.tokenizer, word), self.host.tokenizer.decode
        shown = {
            NAMES.get(name, name): marked_html([[decode([t])] if t == token else decode([t]) for t in text])
            for name, text in texts.items()
        }
        titles = "".join(f"<th>{html.escape(name)}</th>" for name in shown)
        cells = "".join(
            f'<td style="text-align: left; vertical-align: top"><pre>{text}</pre></td>' for text in shown.values()
        )
        first = table.iloc[0]
        told = pd.DataFrame(
            {
                "direction": table.direction.map(NAMES),
                "predicted by the paper's formula": table.predicted_paper,
                "predicted, exact to first order": table.predicted_exact,
                "measured": table.measured,
                "rank": [f"{row.rank_native} → {row.rank_edited}" for row in table.itertuples()],
                "log p": [f"{row.log_p_native:.2f} → {row.log_p_edited:.2f}" for row in table.itertuples()],
            }
        )
        return (
            f"<p>{self.settings.writes} writes of {magnitude:g} native write norms at the end of <i>{html.escape(prompt)}</i>, "
            f"for the token {html.escape(repr(decode([token])))} (native rank {first.rank_native}). Shift of its logit, "
            f"nothing fitted:</p>{table_html(told)}"
            f"<p>Greedy continuations, the target marked:</p><table><tr>{titles}</tr><tr>{cells}</tr></table>"
        )


# Controls


def show(page: str, controls: Callable) -> None:
    """Display the page as HTML, and beside it the widget that `controls()` makes, for front ends that answer one."""
    data = {"text/html": page, "text/plain": "An HTML page, with controls where the notebook runs in JupyterLab."}
    try:
        widget = controls()
    except ImportError:
        pass
    else:
        data = widget._repr_mimebundle_() | data
    display(data, raw=True)


def answer(page: Callable[..., str], *arguments) -> str:
    """The page, or the sentence that says what is wrong with the arguments."""
    try:
        return page(*arguments)
    except ValueError as error:
        return sentence_html(error)


def atom_controls(pages: Atoms, first: str):
    """Two menus, what the SAE is trained on and the atom, over the page, which is `first` to begin with."""
    import ipywidgets as widgets

    target = widgets.Dropdown(options=pages.targets, description="trained on")
    atom = widgets.Dropdown(options=pages.choices(pages.targets[0]), description="atom", layout=dict(width="30em"))
    page = widgets.HTML(first)

    def fill(change) -> None:
        atom.options = pages.choices(change["new"])

    def draw(change) -> None:
        page.value = "<p>Looking at its firings …</p>"
        page.value = answer(pages.page, *change["new"])

    target.observe(fill, "value")
    atom.observe(draw, "value")
    return widgets.VBox([widgets.HBox([target, atom]), page])


def install_controls(pages: Installs, first: str):
    """A prompt, a word, a magnitude and a button over the page, which is `first` to begin with."""
    import ipywidgets as widgets

    prompt = widgets.Textarea(PROMPT, description="prompt", layout=dict(width="50em"))
    word = widgets.Text(TARGET, description="word")
    magnitude = widgets.FloatText(MAGNITUDE, description="magnitude")
    button, page = widgets.Button(description="Write it"), widgets.HTML(first)

    def draw(_) -> None:
        page.value = "<p>Writing …</p>"
        page.value = answer(pages.page, prompt.value, word.value, magnitude.value)

    button.on_click(draw)
    return widgets.VBox([prompt, widgets.HBox([word, magnitude, button]), page])


def atoms(suite: Suite, alive: pd.DataFrame, firings: pd.DataFrame) -> None:
    """Under the cell: the atoms of the main host's cell, to choose from; `alive`, `firings` as `experiments.atoms.run`
    returns them."""
    pages = Atoms(suite, alive, firings)
    first = pages.page(*pages.choices(pages.targets[0])[0][1])
    show(first, lambda: atom_controls(pages, first))


def installs(suite: Suite) -> None:
    """Under the cell: a prompt and a word to install on the main host."""
    pages = Installs(suite)
    first = pages.page(PROMPT, TARGET, MAGNITUDE)
    show(first, lambda: install_controls(pages, first))
