"""The criterion of each claim of paper/claims.csv, written before any run."""

from __future__ import annotations

import numpy as np

from replication.scorecard.measures import (
    Rule,
    against_flat,
    alive_by_k,
    busiest_register,
    class_axis,
    class_difference,
    class_share,
    contrast,
    cosine_correlation,
    failure_gap,
    installed,
    jumprelu_registers,
    logit_r2,
    lowest_bin,
    native_inclusion,
    per_firing,
    population,
    ratio_of_medians,
    register_cosine,
    saturation,
    second_component,
    seed_overlap,
    sigma_falls,
    sign_agreement,
    summary,
    threshold_ratio,
    win_rate,
)

CHANGE = ("median_change", "ci_low", "ci_high")
EVERY = dict(target="state", token_from="other", atom="all")
HALF = "interval of the win rate (wider of the bootstraps by atom and by passage) above 0.5"
REGISTER = "median cosine of register atoms to the native write above 0 (interval over atoms)"
FLOOR = "interval of the win rate (wider of the bootstraps by atom and by passage) holds 0.5: the atom is no better than deletion"
SMALL_FORMULA = "median R2 over (atom, eps) of the paper's formula, nothing fitted, below 0.5"
QWEN_4B, QWEN_27B = "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-27B"
FLAT = "win rate less that of a flat SAE's top singular pair, middle cell, matched norm"
RULES: dict[str, Rule] = {
    "R1": Rule(HALF, "05_replacement", 0.5, "above", win_rate("pooled")),
    "R2": Rule(HALF, "05_replacement", 0.5, "above", win_rate("early")),
    "R3": Rule(HALF, "05_replacement", 0.5, "above", win_rate("middle")),
    "R4": Rule(HALF, "05_replacement", 0.5, "above", win_rate("late")),
    "R5": Rule(
        "ratio of median KLs, deletion over atom, above 1", "05_replacement", 1, "above", ratio_of_medians("delete")
    ),
    "R6": Rule(
        "ratio of median KLs, random over atom, above 1", "05_replacement", 1, "above", ratio_of_medians("random")
    ),
    "R7": Rule(
        "share with atom < deletion < random above 1/6, what three unordered numbers give",
        "05_replacement",
        1 / 6,
        "above",
        per_firing(lambda p: (p.kl_atom < p.kl_delete) & (p.kl_delete < p.kl_random)),
    ),
    "R8": Rule(
        "median over firings of KL(delete) / KL(atom) above 1",
        "05_replacement",
        1,
        "above",
        per_firing(lambda p: p.kl_delete / p.kl_atom, np.median),
    ),
    "R9": Rule(
        "median over firings of KL(random) / KL(atom) above 1",
        "05_replacement",
        1,
        "above",
        per_firing(lambda p: p.kl_random / p.kl_atom, np.median),
    ),
    "R10": Rule(
        "failure rate in the lowest quartile of KL(delete) above that in the highest",
        "05_replacement",
        0,
        "above",
        failure_gap,
    ),
    "P1": Rule("interval of the mean win rate over atoms above 0.5", "07_population", 0.5, "above", population("all")),
    "P2": Rule("the same over register atoms", "07_population", 0.5, "above", population("register")),
    "P3": Rule("the same over bundle atoms", "07_population", 0.5, "above", population("bundle")),
    "P4": Rule(
        "mean win rates of the classes do not differ (95% interval of the difference holds 0)",
        "07_population",
        0,
        "equal",
        class_difference,
    ),
    "P5": Rule(
        "no correlation of cosine and win rate (95% interval holds 0)", "07_population", 0, "equal", cosine_correlation
    ),
    "C1": Rule(
        "median R2 over (atom, eps), with the paper's fitted scalar, above 0.9",
        "04_logit_shift",
        0.9,
        "above",
        logit_r2("paper_fitted"),
    ),
    "C2": Rule(
        "the same at the token of rank 5",
        "04_logit_shift",
        0.9,
        "above",
        summary("logit_shift_ranks", "r2_median", "ci_low", "ci_high", predictor="paper_fitted", rank=5),
    ),
    "C3": Rule(
        "sign of the shift is that of the paper's formula in more than half",
        "04_logit_shift",
        0.5,
        "above",
        sign_agreement,
    ),
    "I2": Rule(
        "inclusion rises for targets of native rank 101-1000 at 3x", "10_install", 0, "above", installed("middle")
    ),
    "I3": Rule(
        "more than 1 in 100 targets ranked 101 to 1,000 come without an edit (interval by prompt)",
        "10_install",
        0.01,
        "above",
        native_inclusion,
    ),
    "I4": Rule("inclusion rises over all targets at 3x", "10_install", 0, "above", installed("all")),
    "I5": Rule("inclusion at 3x exceeds that at 6x", "10_install", 0, "above", saturation),
    "I6": Rule(
        "inclusion of targets of native rank above 1000 does not rise at 3x", "10_install", 0, "equal", installed("far")
    ),
    "I7": Rule(
        "inclusion over all targets does not rise at 3x", "10_install", 0, "equal", installed("all"), family="mamba2"
    ),
    "C4": Rule(SMALL_FORMULA, "04_logit_shift", 0.5, "below", logit_r2("paper"), family="mamba2"),
    "C5": Rule(SMALL_FORMULA, "04_logit_shift", 0.5, "below", logit_r2("paper"), model=QWEN_4B),
    "X1": Rule(HALF, "05_replacement", 0.5, "above", win_rate("pooled"), family="mamba2"),
    "X2": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="gated_deltanet"),
    "X3": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="rwkv7"),
    "X4": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="mamba2"),
    "X5": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="gla"),
    "X6": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="delta_net"),
    "X7": Rule(REGISTER, "07_population", 0, "above", register_cosine, model=QWEN_4B),
    "X8": Rule(REGISTER, "07_population", 0, "above", register_cosine, model=QWEN_27B),
    "X9": Rule(FLOOR, "05_replacement", 0.5, "equal", win_rate("pooled"), family="delta_net"),
    "X10": Rule(FLOOR, "05_replacement", 0.5, "equal", win_rate("pooled"), model=QWEN_4B),
    "X11": Rule(
        f"{FLAT}: no difference (95% interval holds 0)",
        "05_replacement",
        0,
        "equal",
        against_flat,
        family="gated_deltanet",
    ),
    "X12": Rule(f"{FLAT}: below 0", "05_replacement", 0, "below", against_flat, family="rwkv7"),
    "X13": Rule(f"{FLAT}: above 0", "05_replacement", 0, "above", against_flat, family="mamba2"),
    "A1": Rule(
        "share of alive atoms among all below 1/2 (Wilson)", "03_atoms", 0.5, "below", class_share("alive", "n_atoms")
    ),
    "A2": Rule(
        "registers among alive atoms above 1/2 (Wilson)", "03_atoms", 0.5, "above", class_share("registers", "alive")
    ),
    "A3": Rule(
        "bundles among alive atoms below 1/2 (Wilson)", "03_atoms", 0.5, "below", class_share("bundles", "alive")
    ),
    "A4": Rule(
        "delta BIC of two components against one below 0 (atoms resampled)", "03_atoms", 0, "below", second_component
    ),
    "A5": Rule(
        "alive atoms with |cosine| > 0.9 in another seed: below 1 in 10", "03_atoms", 0.1, "below", seed_overlap
    ),
    "A6": Rule(
        "the most-firing register fires at over 1% of tokens (Wilson)", "03_atoms", 0.01, "above", busiest_register
    ),
    "A7": Rule(
        "registers at tau 0.02 over those at 0.10 below 2 (atoms resampled)", "03_atoms", 2, "below", threshold_ratio
    ),
    "A8": Rule("more alive atoms at the largest k than at the smallest (Newcombe)", "03_atoms", 0, "above", alive_by_k),
    "P6": Rule(
        "lowest win rate of the cosine bins (5 atoms or more) above 0.5", "07_population", 0.5, "above", lowest_bin
    ),
    "P7": Rule(
        "deletion disrupts the top token of registers more", "07_population", 0, "above", class_axis("flip_delete")
    ),
    "P8": Rule("the atom disrupts it alike in both classes", "07_population", 0, "equal", class_axis("flip_atom")),
    "P9": Rule("median delta KL alike in both classes", "07_population", 0, "equal", class_axis("delta_kl")),
    "P10": Rule("registers fire more often", "07_population", 0, "above", class_axis("firings_per_10k")),
    "B1": Rule(
        "a larger share of dead atoms in the flat SAE than in the bilinear one (Newcombe)",
        "11_ablations",
        0,
        "above",
        contrast("dense+flat", "dead_fraction"),
    ),
    "B2": Rule(
        "FVU of the flat SAE over that of the bilinear one below 1 (passages resampled), middle",
        "11_ablations",
        1,
        "below",
        contrast("dense+flat", "fvu_ratio"),
    ),
    "B3": Rule("the same, early", "11_ablations", 1, "below", contrast("dense+flat", "fvu_ratio", "early")),
    "B4": Rule("the same, late", "11_ablations", 1, "below", contrast("dense+flat", "fvu_ratio", "late")),
    "B5": Rule(
        "median cosine of the JumpReLU SAE's registers to the native write above 0 (interval over atoms)",
        "11_ablations",
        0,
        "above",
        jumprelu_registers,
    ),
    "B6": Rule(
        "FVU of the gated SAE over that of TopK above 1 (passages resampled)",
        "11_ablations",
        1,
        "above",
        contrast("bilinear+rank1+gated", "fvu_ratio"),
    ),
    "B7": Rule(
        "atoms of rank 2 beat deletion no more and no less often than those of rank 1",
        "11_ablations",
        0,
        "equal",
        contrast("bilinear+rank2", "win_rate_coefficient"),
    ),
    "S1": Rule(
        "1 - overlap of the 32 tokens that the atom and a random rank-1 write of its norm move most above 0.9",
        "11_ablations",
        0.9,
        "above",
        summary(
            "selectivity_overlap",
            "selectivity",
            "ci_low",
            "ci_high",
            target="state",
            cells="pooled",
            control="random",
            top=32,
        ),
    ),
    "D1": Rule(
        "mean log sigma1/sigma2 of heads falls from the early to the late layer", "00_hosts", 0, "above", sigma_falls
    ),
    "R11": Rule(
        "deletion at all register firings of a passage costs less than 0.05 bits per token (interval over passages)",
        "09_cache_edits",
        0.05,
        "below",
        summary("register_erase_summary", "rise", "rise_low", "rise_high", target="state", condition="delete"),
    ),
    "R12": Rule(
        "matched-norm random writes in their place cost more bits per token than deletion",
        "09_cache_edits",
        0,
        "above",
        summary("register_erase_summary", "excess", "excess_low", "excess_high", target="state", condition="random"),
    ),
    "H1": Rule(
        "mean over the layer's heads of the win rate above 0.5 (bootstrap over heads)",
        "11_multiverse",
        0.5,
        "above",
        summary("heads_summary", "mean_win_rate", "ci_low", "ci_high", target="state", amplitude="coefficient"),
    ),
    "E1": Rule(
        "median change of log p of the atoms' preferred tokens, found in other text, below 0 under deletion",
        "09_cache_edits",
        0,
        "below",
        summary("cache_erase_summary", *CHANGE, **EVERY, **{"where": "firing", "condition": "delete", "dose": 1.0}),
    ),
    "E2": Rule(
        "no median change of the same when the atoms are added elsewhere at 4x",
        "09_cache_edits",
        0,
        "equal",
        summary("cache_erase_summary", *CHANGE, **EVERY, **{"where": "elsewhere", "condition": "add", "dose": 4.0}),
    ),
    "I1": Rule(
        "the target's logit moves in the direction that the paper's formula says in more than half",
        "09_cache_edits",
        0.5,
        "above",
        summary("single_write_summary", "sign_agreement", "ci_low", "ci_high", direction="paper", predictor="paper"),
    ),
    "N1": Rule(
        "more than 1 newline per 400 tokens at baseline (interval over prompts)",
        "09_cache_edits",
        1,
        "above",
        summary("newlines_summary", "newlines", "newlines_low", "newlines_high", role="baseline"),
    ),
    "N2": Rule(
        "fewer newlines at 5x than at baseline, same prompts (interval over prompts)",
        "09_cache_edits",
        0,
        "below",
        summary("newlines_summary", "change", "change_low", "change_high", mode="offset", role="boundary", dose=5.0),
    ),
}
