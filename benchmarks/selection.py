"""Does another statistic than the firing frequency choose better latents? Read on folds of train and dev; test is not opened.

    python benchmarks/selection.py runs/demo runs/demo-safe --json selection.json

Each criterion ranks the latents on the train part of five folds by prompt, the first K of either side give the directions, and
the head is trained as in stage 4. Beside each accuracy (a tie counts half): the paired difference to the paper's criterion.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
files = importlib.import_module("parts.files")
stage1, stage2, stage3, stage4 = (importlib.import_module(n) for n in
                                  ("01_extract", "02_select_features", "03_train_head", "04_evaluate"))
fold_splits = importlib.import_module("sweeps").fold_splits
SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "epochs": 200, "patience": 20}


def auroc(chosen, rejected):
    """Columns [n, m] of both sides → the share of all (chosen, rejected) couples where chosen is higher, ties half, less 1/2 [m]."""
    both, n = torch.cat([chosen, rejected]).T.contiguous(), len(chosen)
    found = []
    for rows in both.split(512):                                            # latents at a time
        values = rows.sort(dim=1).values
        ranks = (torch.searchsorted(values, rows) + torch.searchsorted(values, rows, right=True) + 1) / 2     # equals share a rank
        found.append(ranks[:, :n].double().sum(1) - n * (n + 1) / 2)
    return torch.cat(found).float() / (n * len(rejected)) - 0.5


def effect(chosen, rejected):
    """Mean of chosen minus rejected, over its standard deviation from pair to pair [m]; 0 where it never differs."""
    difference = chosen - rejected
    return difference.mean(0) / difference.std(0).clamp_min(1e-6)


PAPER = "frequency (the paper)"
CRITERIA = {     # (activations of both sides, projections of both sides) → separation [d_sae]
    PAPER: lambda f, v: ((f[0] > 0).float() - (f[1] > 0).float()).mean(0),
    "frequency / its std": lambda f, v: effect(*((side > 0).float() for side in f)),
    "AUROC of f": lambda f, v: auroc(*f),
    "mean difference of f / its std": lambda f, v: effect(*f),
    "AUROC of <z, d>": lambda f, v: auroc(*v),
    "mean difference of <z, d> / its std": lambda f, v: effect(*v),
}


def compare(data, ks, seeds):
    """→ {criterion, random directions, dense: {K: accuracy with a tie as half, minus_frequency, minus_random}}."""
    f, v = [data.sae.encode(z) for z in data.z], stage4.score_pairs(data, data.sae.W_dec)
    found, groups = {}, []
    for part in fold_splits(data.split, data.group):
        train = part == stage4.TRAIN
        groups.append(data.group[(part == stage4.TEST).numpy()])
        rank = {name: of(*([side[train] for side in x] for x in (f, v))) for name, of in CRITERIA.items()}
        for k in ks:
            fit = lambda both, options=stage4.ALL, part=part: stage4.fit_and_test(*both, part, options, SETTINGS)[1]
            directions = {name: [data.sae.W_dec[stage2.select_latents(d, torch.zeros_like(d), k)]] for name, d in rank.items()}
            directions["random directions"] = [stage4.gaussian_directions(2 * k, data.z[0].shape[1], s) for s in range(seeds)]
            for name, many in directions.items():
                found.setdefault(name, {}).setdefault(k, []).append(np.stack([fit(stage4.score_pairs(data, d)) for d in many]))
        found.setdefault("dense", {}).setdefault(ks[0], []).append(fit(data.z, stage4.DENSE)[None])
    groups, result = np.concatenate(groups), {}
    for name, of_k in found.items():
        for k, folds in of_k.items():
            d, paper, chance = (np.concatenate(x, 1) for x in (folds, found[PAPER][k], found["random directions"][k]))
            row = stage4.summary(d, groups)
            result.setdefault(name, {})[str(k)] = {n: row[n] for n in ("ties_half", "half_low", "half_high", "n")} | {
                "minus_frequency": stage4.gap(d, paper, groups), "minus_random": stage4.gap(d, chance, groups)}
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders with stages 1 to 3 done")
    p.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    p.add_argument("--seeds", type=int, default=5, help="draws of random directions (default 5)")
    p.add_argument("--json", help="also write the figures here")
    args = p.parse_args()
    found = {}
    for run in args.runs:
        rows = found[Path(run).resolve().name] = compare(stage4.Data(run), args.ks, args.seeds)
        print(f"\n{run}\n{'K a side':<38}" + "".join(f"{k:>30}" for k in args.ks))
        for name, row in rows.items():
            cell = lambda r: "{:.3f} {mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(r["ties_half"], **r["minus_frequency"])
            print(f"{name:<38}" + "".join(f"{cell(r):>30}" for r in row.values()), flush=True)
    if args.json:
        files.write_text(args.json, json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    stage1.run_main(main)
