"""Controls in JupyterLab: look at any atom (notebook 03), install any word after any prompt (notebook 12).

Front ends without ipywidgets show the page of the first atom or of the default prompt."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import HTML, display
from ipywidgets import Dropdown, FloatText, Text, Textarea, interactive

from replication.html import atom_html, contexts, fires_on, install_html
from replication.pages import promoted
from replication.plots import named
from replication.study.firings import firing_windows
from replication.study.stages import rows_with
from replication.study.study import Study
from writesae.edit import Edit, generate_under
from writesae.evaluate import install
from writesae.evaluate.atoms import ATOM_KEYS
from writesae.evaluate.steering import Goal, directions
from writesae.shift import direct_path, gamma, logit_gradient, reads
from writesae.text import end_of_text, token_ids

CONTEXTS = 5  # per atom
TOKENS = 5  # promoted and demoted tokens of each kind
PROMPT = "Return the mean of the elements of the array along the given axis. The"
TARGET = "values"
MAGNITUDE = 3.0  # native write norms, as in the paper's Table 3
NAMES = dict(paper="the paper's direction", gamma="top singular pair of Γ")
PREDICTED = dict(predicted_paper="predicted by the paper's formula")
PREDICTED |= dict(predicted_exact="predicted, exact to first order")


def show(page: Callable[..., str], **controls) -> None:
    """Display controls, one per argument of `page`, with the page for their present values and a button that
    shows the page for other values; a ValueError becomes its sentence."""

    def answer(**values) -> HTML:
        try:
            return HTML(page(**values))
        except ValueError as error:
            return HTML(f"<p><b>{escape(str(error))}</b></p>")

    widget = interactive(answer, dict(manual=True, manual_name="Show", auto_display=True), **controls)
    first = answer(**{name: control.value for name, control in controls.items()}).data
    text = "An HTML page, with controls where the notebook runs in JupyterLab."
    display(widget._repr_mimebundle_() | {"text/html": first, "text/plain": text}, raw=True)


# An atom


def atoms(study: Study, alive: pd.DataFrame, firings: pd.DataFrame) -> None:
    """Display any alive atom of the main host's cell. alive, firings: what pages.atoms.run returns."""
    place = study.profile.section("atoms", study.main).place
    table = rows_with(alive, host=study.main, place=place, role="main")
    table = table.sort_values("firings", ascending=False, kind="stable")
    table = pd.concat([table[table.target == target] for target in study.profile.saes.targets])
    label = "trained on {}s, atom {}: {}, cosine {:.2f}, {:,} firings"
    columns = (table[name] for name in ("target", "atom", "class", "cosine", "firings"))
    options = [(label.format(*row), number) for number, row in enumerate(zip(*columns, strict=True))]

    def page(atom: int) -> str:
        row = table.iloc[atom]
        return atom_page(study, row, rows_with(firings, **row[ATOM_KEYS]))

    show(page, atom=Dropdown(options=options, layout=dict(width="40em")))


def atom_page(study: Study, row: pd.Series, firings: pd.DataFrame) -> str:
    """Return the page of one atom, given its row of atoms.csv and all of its firings."""
    tokenizer, windows = study.host(row.host).tokenizer, firing_windows(study, row.host)
    facts = {"class": row["class"], "median cosine to the write": row.cosine, "of the keys": row.cosine_key}
    facts |= {"of the values": row.cosine_value, "at random firings": row.elsewhere}
    facts |= {"firings": f"{row.firings:,} in {row.passages} passages", "share of tokens": f"{row.rate:.2%}"}
    facts |= {"fires on": fires_on(tokenizer, windows, firings)[row.atom]}
    title = f"Atom {row.atom} (layer {row.layer} head {row['head']} of {named(row.host)}, trained on {row.target}s)"
    shown = contexts(tokenizer, windows, firings, CONTEXTS)[row.atom]
    return atom_html(title, facts, shown, promoted.measure(study, row.host, firings, TOKENS), tokenizer)


# An install


def installs(study: Study) -> None:
    """Display the install of any word after any prompt, on the main host."""
    typed = dict(prompt=Textarea(PROMPT), word=Text(TARGET), magnitude=FloatText(MAGNITUDE))
    show(lambda **values: install_page(study, **values), **typed)


def predicted(host, cell, goal: Goal, edit: Edit) -> dict[str, float]:
    """Return the shift of the target's logit by all writes of one trial, as predicted by the paper (App. A)
    and exactly to first order (x^T Gamma w)."""
    factors, starts, steps = host.factors(goal.run, *cell), goal.starts, goal.steps
    key, value = edit.left[0], edit.right[0]
    gradient, _ = logit_gradient(host, goal.run, *cell, goal.rows, starts, steps, goal.tokens)
    influence = gamma(factors, goal.rows, starts, gradient)[0, : goal.writes]
    exact, decayed = torch.einsum("wk,wkv,wv->w", key, influence, value), []
    for w in range(goal.writes):
        decayed.append(reads(factors, goal.rows, starts + w, steps - 1 - w, key[w : w + 1])[0][0, 0])
    direct = direct_path(host, *cell, value, goal.tokens)[0]
    return dict(paper=float((torch.stack(decayed) * direct).sum()), exact=float(exact.sum()))


def install_word(study: Study, prompt: str, word: str, magnitude: float) -> tuple[pd.DataFrame, dict]:
    """Install a word by writes at the prompt's last tokens, in the cell of the profile's section `install`.

    Return one row per direction (shift of the target's logit, its rank and log-probability), and the greedy
    continuations: unedited, paper, gamma -> tokens. Raises ValueError for unusable input."""
    if not 0 < magnitude < float("inf"):
        raise ValueError(f"The magnitude is {magnitude:g}: give one above 0, in native write norms.")
    host, settings = study.host(study.main), study.profile.section("install", study.main)
    cell, room = study.cell(study.main, settings.place), study.profile.data.window - settings.new_tokens - 1
    ids = token_ids(host.tokenizer, prompt)
    if not settings.writes <= len(ids) <= room:
        raise ValueError(f"The prompt has {len(ids)} tokens: type one of {settings.writes} to {room}.")
    targets, write = torch.tensor([[install.word_token(host.tokenizer, word)]]), study.profile.saes.write
    run = host.run(torch.tensor([[end_of_text(host.tokenizer), *ids]]))
    writes = dict(writes=settings.writes, write=write)
    trial = install.setting(host, run, targets, np.array(["typed"]), settings.writes, **writes)
    goal = trial.goal
    native = host.logits(run.final[:, -1])
    texts, rows = dict(unedited=install.native_continuations(host, run, settings.new_tokens)[0].tolist()), []
    for name in install.ONE_CELL:
        edits = directions(host, goal, [cell], name, magnitude)
        tokens, edited = generate_under(host, run, edits, settings.new_tokens)
        texts[name] = tokens[0].tolist()
        shifts = predicted(host, cell, goal, edits[cell])
        row = dict(direction=name) | {f"predicted_{kind}": shift for kind, shift in shifts.items()}
        row["measured"] = float((edited - native)[0, goal.tokens[0]])
        for when, logits in (("native", native), ("edited", edited)):
            row[f"rank_{when}"] = int(install.ranks(logits, goal.tokens))
            row[f"log_p_{when}"] = float(F.log_softmax(logits, -1)[0, goal.tokens[0]])
        rows.append(row)
    return pd.DataFrame(rows), texts


def install_page(study: Study, prompt: str, word: str, magnitude: float) -> str:
    """Return the page of an install, with the target marked. Raises as `install_word`."""
    table, texts = install_word(study, prompt, word, magnitude)
    tokenizer, writes = study.host(study.main).tokenizer, study.profile.section("install", study.main).writes
    token, decode = install.word_token(tokenizer, word), tokenizer.decode
    shifts = table[["direction", *PREDICTED, "measured"]].rename(columns=PREDICTED)
    shifts["direction"] = shifts.direction.map(NAMES)
    shifts["rank"] = [f"{row.rank_native} → {row.rank_edited}" for row in table.itertuples()]
    shifts["log p"] = [f"{row.log_p_native:.2f} → {row.log_p_edited:.2f}" for row in table.itertuples()]
    summary = (
        f"{writes} writes of {magnitude:g} native write norms at the end of “{prompt}”, for the token "
        f"{decode([token])!r} (native rank {table.rank_native[0]}). Shift of its logit, nothing fitted:"
    )
    marked = {
        NAMES.get(name, name): [[decode([t])] if t == token else decode([t]) for t in text]
        for name, text in texts.items()
    }
    return install_html(summary, shifts, marked)
