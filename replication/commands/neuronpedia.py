"""The atom browser's data in Neuronpedia's form: a folder per SAE with batch-0.json, as of SAEDashboard.

An entry of `features` is an atom: tokens with the measured shifts that it promotes and demotes, its top
contexts, and the histogram of its coefficients. Fields of Neuronpedia that compare neurons are empty. A piece
of a context is one token where the atom fires, and all tokens up to the next such one otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path

from writesae.evaluate.promoted import KINDS
from writesae.files import write_atomically

EMPTY = ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices")
EMPTY += ("correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices")
EMPTY += ("correlated_features_l1", "correlated_features_pearson", "decoder_weights_dist")
EMPTY += ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")


def activation(context: list) -> dict:
    """Return a context [passage, spans] of the browser as an activation."""
    spans = [(x, 0.0) if isinstance(x, str) else (x[0], x[1]) for x in context[1]]
    top = max(value for _, value in spans)
    tokens, values = map(list, zip(*spans, strict=True))
    return dict(bin_min=0, bin_max=top, bin_contains=1, tokens=tokens, values=values)


def feature(sae: dict, i: int, vocabulary: dict[int, str], window: int) -> dict:
    """Return the i-th atom of an SAE of the browser's data; vocabulary: token id -> text."""
    columns = sae["columns"]
    atom, (largest, heights, _) = columns["atom"][i], columns["histogram"][i]
    promoted, up, demoted, down, _ = columns["tokens"][i][1 + KINDS.index("measured")]
    width = largest / len(heights)
    fields = dict.fromkeys(EMPTY, []) | dict(feature_index=atom)
    fields |= dict(pos_str=[vocabulary[token] for token in promoted], pos_values=up)
    fields |= dict(neg_str=[vocabulary[token] for token in demoted], neg_values=down)
    fields["frac_nonzero"] = columns["firings"][i] / sae["scanned"]
    fields["freq_hist_data_bar_values"] = [width * (bar + 0.5) for bar in range(len(heights))]
    fields["freq_hist_data_bar_heights"] = heights
    fields |= dict(n_prompts_total=sae["windows"], n_tokens_in_prompt=window)
    fields["dataset"] = "held-out windows of the profile"
    return fields | dict(activations=[activation(context) for context in columns["contexts"][i]])


def batches(data: dict) -> dict[str, dict]:
    """Return {name of a folder: its batch} for the main SAEs of the browser's data."""
    made = {}
    for sae in data["saes"]:
        if sae["role"] == "main":
            name = f"writesae-{sae['target']}-h{sae['head']}"
            vocabulary, window = data["vocabulary"][sae["host"]], data["source"]["window"]
            features = [feature(sae, i, vocabulary, window) for i in range(len(sae["columns"]["atom"]))]
            batch = dict(model_id=sae["host"], layer=sae["layer"], sae_set=name, features=features)
            made[f"{sae['host']}_{sae['layer']}-{name}"] = batch
    return made


def write(data: dict, folder: Path) -> list[Path]:
    """Write folder/NAME/batch-0.json for every main SAE, and return the paths."""
    paths = []
    for name, batch in batches(data).items():
        text = json.dumps(batch, ensure_ascii=False, allow_nan=False)
        paths.append(folder / name / "batch-0.json")
        write_atomically(paths[-1], lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return paths
