"""Does another statistic than the firing frequency choose better latents? Read on folds of train
and dev; test is not opened.

    python benchmarks/selection.py runs/demo runs/demo-safe --json selection.json

Each criterion ranks the latents on the train part of five folds by prompt, the first K of either
side give the directions, and the head is trained as in stage 4. Beside each accuracy (a tie counts
half): the paired difference to the paper's criterion.
"""

import collections
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import stage2, stage3, stage4
from parts.files import run_main
from parts.statistics import gap, summary

PAPER = "frequency (the paper)"
RANDOM = "random directions"


# ---------------------------------------------------------------- the criteria

def auroc(chosen, rejected):
    """Columns [n, m] of both sides → the share of all (chosen, rejected) couples where chosen is
    higher, ties half, less 1/2 [m]."""
    n = len(chosen)
    both = torch.cat([chosen, rejected]).T.contiguous()
    found = []
    for rows in both.split(512):                                # latents at a time
        values = rows.sort(dim=1).values
        below = torch.searchsorted(values, rows)
        not_above = torch.searchsorted(values, rows, right=True)
        ranks = (below + not_above + 1) / 2                     # equals share a rank
        found.append(ranks[:, :n].double().sum(1) - n * (n + 1) / 2)
    return torch.cat(found).float() / (n * len(rejected)) - 0.5


def effect(chosen, rejected):
    """Mean of chosen minus rejected, over its standard deviation from pair to pair [m]; 0 where it
    never differs."""
    difference = chosen - rejected
    return difference.mean(0) / difference.std(0).clamp_min(1e-6)


def fires(sides):
    """Activations of both sides → 1 where a latent fires."""
    return [(side > 0).float() for side in sides]


def frequency_gap(activations, projections):
    """How much more often a latent fires in chosen responses."""
    chosen, rejected = fires(activations)
    return (chosen - rejected).mean(0)


# (activations of both sides, projections of both sides) → separation [d_sae]
CRITERIA = {
    PAPER: frequency_gap,
    "frequency / its std": lambda activations, _: effect(*fires(activations)),
    "AUROC of f": lambda activations, _: auroc(*activations),
    "mean difference of f / its std": lambda activations, _: effect(*activations),
    "AUROC of <z, d>": lambda _, projections: auroc(*projections),
    "mean difference of <z, d> / its std": lambda _, projections: effect(*projections),
}


# ---------------------------------------------------------------- the comparison

def compare(data, ks, seeds):
    """→ {criterion, random directions, dense:
    {K: accuracy with a tie as half, minus_frequency, minus_random}}."""
    activations = [data.sae.encode(z) for z in data.z]
    projections = stage4.score_pairs(data, data.sae.W_dec)
    folds = collections.defaultdict(list)   # (criterion, K): differences [seeds, n] of each fold
    groups = []
    for split in common.fold_splits(data.split, data.group):
        train = split == stage4.TRAIN
        groups.append(data.group[(split == stage4.TEST).numpy()])
        train_activations = [side[train] for side in activations]
        train_projections = [side[train] for side in projections]
        separation = {}
        for name, criterion in CRITERIA.items():
            separation[name] = criterion(train_activations, train_projections)
        for k in ks:
            for name, drawn in directions_of(data, separation, k, seeds).items():
                views = [stage4.score_pairs(data, directions) for directions in drawn]
                differences = [fit(view, split) for view in views]
                folds[name, k].append(np.stack(differences))
        folds["dense", ks[0]].append(fit(data.z, split, stage4.DENSE)[None])
    whole = {key: np.concatenate(parts, 1) for key, parts in folds.items()}
    return rows_of(whole, np.concatenate(groups))


def directions_of(data, separation, k, seeds):
    """The directions of each criterion, and random ones → {name: list of [2K, d]}."""
    found = {}
    for name, values in separation.items():
        chosen_latents = stage2.select_latents(values, torch.zeros_like(values), k)
        found[name] = [data.sae.W_dec[chosen_latents]]
    width = data.z[0].shape[1]
    found[RANDOM] = [stage4.gaussian_directions(2 * k, width, seed) for seed in range(seeds)]
    return found


def fit(view, split, options=stage4.ALL):
    """A head on one view → its differences on the test part of a fold."""
    return stage4.fit_and_test(view, split, options, stage3.DEFAULTS)


def rows_of(whole, groups):
    """Differences over all folds {(name, K): [seeds, n]} → {name: {K: row}}."""
    found = {}
    for (name, k), differences in whole.items():
        row = summary(differences, groups)
        kept = {key: row[key] for key in ("ties_half", "half_low", "half_high", "n")}
        kept["minus_frequency"] = gap(differences, whole[PAPER, k], groups)
        kept["minus_random"] = gap(differences, whole[RANDOM, k], groups)
        found.setdefault(name, {})[str(k)] = kept
    return found


# ---------------------------------------------------------------- command line

def show(run, ks, rows):
    """The lines to print of one run."""
    print(f"\n{run}\n{'K a side':<38}" + "".join(f"{k:>30}" for k in ks))
    for name, row in rows.items():
        text = f"{name:<38}"
        for cell in row.values():
            behind = common.printed_interval(cell["minus_frequency"], sign="+")
            text += f"{cell['ties_half']:.3f} {behind}".rjust(30)
        print(text, flush=True)


def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders with stages 1 to 3 done")
    p.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    p.add_argument("--seeds", type=int, default=5, help="draws of random directions (default 5)")
    p.add_argument("--json", help="also write the figures here")
    args = p.parse_args()
    found = {}
    for run in args.runs:
        rows = compare(stage4.Data(run), args.ks, args.seeds)
        found[Path(run).resolve().name] = rows
        show(run, args.ks, rows)
    if args.json:
        common.write_json(args.json, found)


if __name__ == "__main__":
    run_main(main)
