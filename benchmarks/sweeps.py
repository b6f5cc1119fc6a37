"""Wider sweeps than stage 4 makes: loss × head on a finished run, and layers × token rules of a backbone.

    python benchmarks/sweeps.py heads --run runs/demo
    python benchmarks/sweeps.py layers --model demo --pairs data/safe.jsonl --layers 10 14 16 18 22 --tokens last content mean

heads: every head gets the same search over K on dev and is read once on test; differences to linear Bradley-Terry are paired.
layers: a dense head on z needs no SAE, so it says how much of the preference a layer and a token hold at all; measured on dev and
train only, five folds by prompt, so that a choice made from it has not seen the test split.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
files = importlib.import_module("parts.files")
stage1, stage2, stage3, stage4 = (importlib.import_module(n) for n in
                                  ("01_extract", "02_select_features", "03_train_head", "04_evaluate"))
FOLDS = 5


def heads(args):
    """Loss × head on the features of a run → {loss and head: summary, difference to linear bt, K}."""
    t, meta = files.load_stage(Path(args.run) / "features.safetensors", "02_select_features.py")
    chosen, rejected = stage3.standardised(t)
    split, groups = t["split"], t["group"][t["split"] == stage4.TEST].numpy()
    settings, found = {"lr": 0.01, "weight_decay": 0.1, "epochs": 200, "patience": 20}, {}
    for kind in ("linear", "mlp"):
        for loss in ("bt", "margin", "bce"):
            k, d = stage4.fit_and_test(chosen, rejected, split, stage3.k_options(meta["k"]), {**settings, "kind": kind, "loss": loss},
                                       range(args.seeds), scale=False)
            found[f"{kind} {loss}"] = {**stage4.summary(d[None], groups), "k": k, "scores": d}
    first = found["linear bt"]["scores"]
    for name, row in found.items():
        row["minus_linear_bt"] = stage4.gap(row.pop("scores")[None], first[None], groups)
        gap = row["minus_linear_bt"]
        print(f"{name:<16} {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]   K {row['k']:<4} minus linear bt "
              f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
    return found


def fold_splits(split, group):
    """Train and dev pairs in FOLDS folds by prompt → one split a fold: a fold is its test, the next one its dev; 3 is left out."""
    fold = torch.from_numpy(np.searchsorted(np.unique(group), group)) % FOLDS
    for n in range(FOLDS):
        part = torch.where(fold == n, stage4.TEST, torch.where(fold == (n + 1) % FOLDS, stage3.DEV, stage3.TRAIN))
        yield torch.where(split == stage4.TEST, 3, part)


def layers(args):
    """Dense head on every layer and token rule → {token: {layer: summary}}."""
    found = {}
    for token in args.tokens:
        run = Path(args.out) / token
        subprocess.run([sys.executable, ROOT / "01_extract.py", "--model", args.model, "--pairs", args.pairs, "--token", token,
                        "--run", run, "--layer", *map(str, args.layers)], check=True, stdout=subprocess.DEVNULL)
        found[token] = {}
        for layer in args.layers:
            pairs = stage4.Pairs(run, stage2.shard_files(run, layer)[0])
            differences, groups = [], []
            settings = {"lr": 0.01, "weight_decay": 0.1, "epochs": 200, "patience": 20}
            for part in fold_splits(pairs.split, pairs.group):
                differences.append(stage4.fit_and_test(*pairs.z, part, stage4.ALL, settings)[1])
                groups.append(pairs.group[(part == stage4.TEST).numpy()])
            row = found[token][str(layer)] = stage4.summary(np.concatenate(differences)[None], np.concatenate(groups))
            print(f"{token:<8} layer {layer:<3} dense {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", flush=True)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    q = sub.add_parser("heads")
    q.add_argument("--run", default="runs/demo")
    q.add_argument("--seeds", type=int, default=5)
    r = sub.add_parser("layers")
    r.add_argument("--model", default="demo")
    r.add_argument("--pairs", default="data/safe.jsonl")
    r.add_argument("--layers", type=int, nargs="+", default=[10, 12, 14, 16, 18, 20, 22])
    r.add_argument("--tokens", nargs="+", choices=stage1.RULES, default=["last"])
    r.add_argument("--out", default="runs/sweeps", help="folder of the extracted runs (default runs/sweeps)")
    for command in (q, r):
        command.add_argument("--json", help="also write the figures here")
    args = p.parse_args()
    found = {"heads": heads, "layers": layers}[args.command](args)
    if args.json:
        files.write_text(args.json, json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    stage1.run_main(main)
