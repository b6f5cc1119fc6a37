"""Wider sweeps than stage 4 makes: loss × head on a finished run, and layers × token rules of a
backbone.

    python benchmarks/sweeps.py heads --run runs/demo
    python benchmarks/sweeps.py layers --model demo --pairs data/safe.jsonl \\
        --layers 10 14 16 18 22 --tokens last content mean

heads: every head gets the same search over K on dev and is read once on test; differences to linear
Bradley-Terry are paired.
layers: a dense head on z needs no SAE, so it says how much of the preference a layer and a token
hold at all; measured on dev and train only, five folds by prompt, so that a choice made from it has
not seen the test split.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import printed_interval, stage1, stage2, stage3, stage4
from parts.files import load_stage, run_main
from parts.statistics import gap, summary


def heads(args):
    """Loss × head on the features of a run → {both: summary, difference to linear bt, K}."""
    t, meta = load_stage(Path(args.run) / "features.safetensors", "02_select_features.py")
    chosen, rejected = stage3.standardised(t)
    test = t["split"] == stage4.TEST
    groups = t["group"][test].numpy()
    options = stage3.k_options(meta["k"])

    found = {}
    differences = {}
    for kind in ("linear", "mlp"):
        for loss in ("bt", "margin", "bce"):
            name = f"{kind} {loss}"
            settings = {**stage3.DEFAULTS, "kind": kind, "loss": loss}
            fitted = stage4.fit_control(chosen, rejected, t["split"], options, settings,
                                        range(args.seeds), scale=False)
            differences[name] = fitted.differences(chosen[test], rejected[test])[None]
            found[name] = {**summary(differences[name], groups), "k": fitted.choice}

    for name, row in found.items():
        behind = gap(differences[name], differences["linear bt"], groups)
        row["minus_linear_bt"] = behind
        print(f"{name:<16} {printed_interval(row, 'accuracy')}   K {row['k']:<4} minus linear bt "
              f"{printed_interval(behind, sign='+')}")
    return found


def layers(args):
    """Dense head on every layer and token rule → {token: {layer: summary}}."""
    found = {}
    for token in args.tokens:
        run = Path(args.out) / token
        common.run_script("01_extract.py", "--model", args.model, "--pairs", args.pairs,
                          "--token", token, "--run", run, "--layer", *args.layers)
        found[token] = {}
        for layer in args.layers:
            paths, _ = stage2.shard_files(run, layer)
            row = dense_on_folds(stage4.Pairs(**stage4.read_pairs(run, paths)))
            found[token][str(layer)] = row
            print(f"{token:<8} layer {layer:<3} dense {printed_interval(row, 'accuracy')}",
                  flush=True)
    return found


def dense_on_folds(pairs):
    """A dense head on five folds of the train and dev pairs → summary."""
    differences = []
    groups = []
    for split in common.fold_splits(pairs.split, pairs.group):
        differences.append(stage4.fit_and_test(pairs.z, split, stage4.ALL, stage3.DEFAULTS))
        groups.append(pairs.group[(split == stage4.TEST).numpy()])
    return summary(np.concatenate(differences)[None], np.concatenate(groups))


def main():
    """The command."""
    p = common.command_line(__doc__)
    sub = p.add_subparsers(dest="command", required=True)
    q = sub.add_parser("heads")
    q.add_argument("--run", default="runs/demo")
    q.add_argument("--seeds", type=int, default=5)
    r = sub.add_parser("layers")
    r.add_argument("--model", default="demo")
    r.add_argument("--pairs", default="data/safe.jsonl")
    r.add_argument("--layers", type=int, nargs="+", default=[10, 12, 14, 16, 18, 20, 22])
    r.add_argument("--tokens", nargs="+", choices=stage1.RULES, default=["last"])
    r.add_argument("--out", default="runs/sweeps",
                   help="folder of the extracted runs (default runs/sweeps)")
    for command in (q, r):
        command.add_argument("--json", help="also write the figures here")
    args = p.parse_args()
    found = heads(args) if args.command == "heads" else layers(args)
    if args.json:
        common.write_json(args.json, found)


if __name__ == "__main__":
    run_main(main)
