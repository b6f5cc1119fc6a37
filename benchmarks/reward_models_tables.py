"""The results of reward_models.py → its figures, and those → markdown."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import (
    by_sign,
    difference,
    gap_interval,
    half,
    head_line,
    line,
    mean_interval,
    stage3,
    without_zeros,
)
from benchmarks.reward_models_peers import pairs_of_run
from parts.statistics import points

NAMES = {
    "sparserm": "SparseRM",
    "paper": "the paper's head (MLP, margin)",
    "full": "full fine-tuning (TRL)",
    "lora": "LoRA (TRL, PEFT)",
    "dense": "dense head on z",
    "mlp": "2-layer MLP on z",
}
FINE_TUNED = ("full", "lora")
DECIDE = ("model", "layer", "max_length", "train_pairs", "dev_pairs", "test_pairs", "curve",
          "other_pairs")            # the settings that decide which pairs a run has


# ---------------------------------------------------------------- results → figures

def nll(differences, temperature):
    """Negative log-likelihood of r_chosen - r_rejected → float."""
    return float(F.softplus(-torch.tensor(differences) / temperature).mean())


def temperature_of(row):
    """Dev's own temperature, for every method by the same rule."""
    return stage3.fit_temperature(torch.tensor(row["dev"]))


def figures_of_sets(found, runs):
    """The results of all jobs {(set, n): {method: [of each seed]}} → {set: {n: figures}}."""
    pairs = {key: pairs_of_run(run) for key, run in runs.items()}
    most = {}                           # train pairs of the largest run of each set
    for name, n in runs:
        most[name] = max(n, most.get(name, 0))
    tests = {name: pairs[name, n]["test"] for name, n in most.items()}

    result = {}
    for (name, n), methods in found.items():
        prepared = json.loads((Path(runs[name, n]) / "prepared.json").read_text("utf-8"))
        groups = groups_of(pairs[name, n]["test"])
        others = {other: groups_of(rows) for other, rows in tests.items() if other != name}
        rows = {method: figures_of(name, method, seeds, methods["sparserm"], groups, others)
                for method, seeds in methods.items()}
        rows["sparserm"]["peak_gib"] = prepared["peak_gib"]
        result.setdefault(name, {})[str(n)] = {
            "pairs": {split: len(rows) for split, rows in pairs[name, n].items()},
            "methods": rows,
            "cut": prepared["cut"],
            "texts": prepared["texts"],
            "k": methods["sparserm"][0]["k"],
            "l2": methods["sparserm"][0]["l2"],
        }
    return result


def groups_of(rows):
    """The questions of some pairs."""
    return np.array([row["group"] for row in rows])


def figures_of(name, method, seeds, sparserm, groups, others):
    """One method on one set → its row. seeds, sparserm: results of each seed."""
    first = seeds[0]
    ours = np.array([row["test"][name] for row in sparserm])
    theirs = np.array([row["test"][name] for row in seeds])
    row = {**summary(theirs, groups), "behind": behind(ours, theirs, groups)}
    row["nll"] = float(np.mean([nll(seed["test"][name], temperature_of(seed)) for seed in seeds]))
    for key in ("seconds", "trained"):
        row[key] = float(np.mean([seed[key] for seed in seeds]))
    for key in ("texts_a_second", "peak_gib"):
        row[key] = first.get(key)
    if method == "sparserm":
        row["seconds_padded"] = first.get("seconds_padded")
    known = {other: of for other, of in others.items()
             if other in first["test"] and other in sparserm[0]["test"]}
    if known:
        row["others"] = on_other_sets(first, sparserm[0], known)
    return row


def summary(differences, groups):
    """Differences of each seed [seeds, n] → accuracy, low, high (a tie is wrong); with a tie as
    half: ties_half, half_low, half_high."""
    right = (differences > 0).astype(float)
    strict = mean_interval(right, groups)
    with_halves = mean_interval(points(differences), groups)
    return {
        "accuracy": strict["mean"],
        "low": strict["low"],
        "high": strict["high"],
        "ties": float((differences == 0).mean()),
        "ties_half": with_halves["mean"],
        "half_low": with_halves["low"],
        "half_high": with_halves["high"],
        "n": len(groups),
        "groups": len(np.unique(groups)),
        "seeds": right.mean(1).tolist(),
    }


def behind(ours, theirs, groups):
    """SparseRM minus a method, pair by pair, [seeds, n] each → {mean, low, high}."""
    return gap_interval(points(ours) - points(theirs), groups)


def on_other_sets(theirs, ours, groups):
    """The first seed on the test pairs of the other sets together → its row."""
    def pooled(row):
        return np.concatenate([row["test"][other] for other in groups])[None]
    where = np.concatenate([of[:len(theirs["test"][other])] for other, of in groups.items()])
    return {**summary(pooled(theirs), where), "names": list(groups),
            "behind": behind(pooled(ours), pooled(theirs), where)}


# ---------------------------------------------------------------- rows that are not measured again

def add_fine_tuned(found, stored):
    """Into the figures of --frozen-only: the rows of full and lora of an earlier results file, in
    runs with the same pairs."""
    before = stored.get("settings", {})
    before = before.get("fine_tuned", before)
    others = [name for name in DECIDE if before.get(name) != found["settings"][name]]
    if others:
        print(f"note: no rows of full and lora: the results file has another {', '.join(others)}",
              file=sys.stderr)
        return
    found["settings"]["fine_tuned"] = before
    found["rates"] = stored["rates"]
    for name, sizes in found["sets"].items():
        for n, run in sizes.items():
            earlier = stored["sets"].get(name, {}).get(n, {"pairs": None, "methods": {}})
            if earlier["pairs"] != run["pairs"]:
                continue
            for method in FINE_TUNED:
                if method in earlier["methods"]:
                    row = earlier["methods"][method]
                    run["methods"][method] = compared(run["methods"]["sparserm"], row)


def compared(ours, row):
    """A stored row with SparseRM minus it, of two accuracies on the same pairs."""
    row = {**row, "behind": not_paired(ours, row)}
    others = row.pop("others", None)
    of_ours = ours.get("others", {})
    if others and all(of_ours.get(key) == others[key] for key in ("names", "n", "groups")):
        row["others"] = {**others, "behind": not_paired(of_ours, others)}
    return row


def not_paired(ours, theirs):
    """The difference of two accuracies, its interval as if they were independent: from the
    distance of each to its own limits, squared and added (Newcombe, 1998)."""
    up, down = [], []
    for row, above, below in ((ours, up, down), (theirs, down, up)):
        above.append(row["half_high"] - row["ties_half"])
        below.append(row["ties_half"] - row["half_low"])
    mean = ours["ties_half"] - theirs["ties_half"]
    return {"mean": mean, "low": mean - float(np.hypot(*down)),
            "high": mean + float(np.hypot(*up)), "paired": False}


# ---------------------------------------------------------------- figures → markdown

COLUMNS = ("accuracy", "SparseRM minus it", "NLL", "other sets", "SparseRM minus it, there",
           "trained parameters", "seconds", "texts/s", "peak GiB")


def table(found):
    """A table for each set with all its train pairs, then the curve over their number."""
    text = ""
    for name, sizes in found["sets"].items():
        run = largest(sizes)
        pairs = run["pairs"]
        text += head_line(f"{name}: {pairs['train']} train, {pairs['test']} test pairs, "
                          f"{run['cut']} of {run['texts']:,} texts cut", COLUMNS)
        for method in methods_of(run):
            row = run["methods"][method]
            cells = cells_of(method, row, found["backbone_parameters"])
            text += line(NAMES[method] + seeds_of(row), cells)
        text += "\n"
    for name, sizes in found["sets"].items():
        if len(sizes) > 1:
            text += curve_table(name, sizes)
    return text


def largest(sizes):
    """{number of train pairs: run} → the run with most of them."""
    return sizes[max(sizes, key=int)]


def methods_of(*runs):
    """The methods that any of the runs has, in the order of the tables."""
    return [method for method in NAMES if any(method in run["methods"] for run in runs)]


def seeds_of(row):
    """How many seeds, where there are several."""
    return f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else ""


def cells_of(method, row, backbone_parameters):
    """The cells of COLUMNS."""
    other = row.get("others")
    gap, gap_there = "–", "–"
    if method != "sparserm":
        gap = difference(row["behind"])
        gap_there = difference(other["behind"]) if other else "–"
    trained = "0"
    if row["trained"]:
        trained = f"{row['trained']:,.0f} ({share(row, backbone_parameters)})"
    return [half(row), gap, f"{row['nll']:.3f}", half(other) if other else "–", gap_there,
            trained, number(row["seconds"], ",.0f"), number(row["texts_a_second"], ".1f"),
            number(row["peak_gib"], ".1f")]


def share(row, backbone_parameters):
    """Trained parameters as a share of the backbone's."""
    return f"{100 * row['trained'] / backbone_parameters:.3g} %"


def number(value, form):
    """A dash where there is none."""
    return f"{value:{form}}" if value else "–"


def curve_table(name, sizes):
    """Accuracy over the number of train pairs."""
    runs = [sizes[n] for n in sorted(sizes, key=int)]
    text = head_line(f"{name}, train pairs (full and LoRA: first seed)",
                     [str(run["pairs"]["train"]) for run in runs])
    for method in methods_of(*runs):
        text += line(NAMES[method], [curve_cell(run["methods"].get(method)) for run in runs])
    return text


def curve_cell(row):
    """The first seed's accuracy; with its interval where there is no other seed."""
    if row is None:
        return "–"
    if len(row["seeds"]) == 1:
        return half(row)
    return without_zeros(f"{row['seeds'][0]:.3f}")


def headline(found):
    """Accuracy on every set, SparseRM minus each, and what it costs on the first set."""
    runs = {name: largest(sizes) for name, sizes in found["sets"].items()}
    name, first = next(iter(runs.items()))
    columns = [f"{name}, {run['pairs']['train']} train pairs" for name, run in runs.items()]
    for what in ("parameters trained", "seconds to train", "texts scored a second"):
        columns.append(f"{what} ({name})")

    text = head_line("test accuracy", columns)
    for method in methods_of(first):
        row = first["methods"][method]
        trained = "0"
        if row["trained"]:
            trained = f"{row['trained']:,.0f}, {share(row, found['backbone_parameters'])}"
        cells = [half(run["methods"][method]) if method in run["methods"] else "–"
                 for run in runs.values()]
        cells += [trained, number(row["seconds"], ",.0f"), number(row["texts_a_second"], ",.0f")]
        text += line(NAMES[method], cells)

    text += "\n" + head_line("SparseRM minus", runs)
    for method in methods_of(first)[1:]:
        cells = [difference(run["methods"][method]["behind"]) if method in run["methods"] else "–"
                 for run in runs.values()]
        text += line(NAMES[method], cells)
    return text


def claim(found):
    """Where each method is clearly ahead of SparseRM, and where clearly behind → markdown."""
    last = {name: largest(sizes) for name, sizes in found["sets"].items()}
    text = ""
    for method in methods_of(*last.values()):
        if method == "sparserm":
            continue
        of_sign = by_sign({name: run["methods"][method]["behind"] for name, run in last.items()
                           if method in run["methods"]})
        text += (f"* *{NAMES[method]}*: clearly ahead of SparseRM on "
                 f"{' and '.join(of_sign[-1]) or 'no set'}, clearly behind on "
                 f"{' and '.join(of_sign[1]) or 'no set'}.\n")
    return text
