"""Wider sweeps than stage 4 makes: loss × head on a finished run, and layers × token rules of a
backbone.

    python benchmarks/sweeps.py heads --run runs/demo-safe
    python benchmarks/sweeps.py layers --model demo --pairs data/safe.jsonl \\
        --layers 10 14 16 18 22 --tokens last content mean

heads: every loss with a linear head and with the paper's MLP, tested on every pair by the five
folds of stage 4; a linear head gets its search over K and L2, an MLP takes all directions.
Differences to linear Bradley-Terry are paired.
layers: a dense head on z needs no SAE, so it says how much of the preference a layer and a token
rule hold at all; five folds over the train and dev pairs, so that a choice made from it has not
seen the test split.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import printed_interval, stage1, stage2, stage3, stage4
from parts.files import run_main
from parts.statistics import gap, summary

LOSSES = ("bt", "margin", "bce")


def heads(args):
    """Loss × head on a run → {both: summary, choices of each fold, difference to linear bt}."""
    data = stage4.Data(args.run, args.name, args.sae)
    data.asked = {**data.asked, "k": "auto", "l2": "auto"}      # however its own head was made
    outcomes = {}
    for kind, method in {"linear": linear, "mlp": stage4.paper}.items():
        for loss in LOSSES:
            outcomes[f"{kind} {loss}"] = method(data, loss=loss)

    found = {}
    ours = outcomes["linear bt"].differences
    for name, outcome in outcomes.items():
        row = summary(outcome.differences, data.group)
        behind = gap(outcome.differences, ours, data.group)
        found[name] = {**row, "choices": outcome.choices, "minus_linear_bt": behind}
        print(f"{name:<16} {printed_interval(row, 'accuracy')}   K {ks_of(outcome):<9} "
              f"minus linear bt {printed_interval(behind, sign='+')}")
    return found


def linear(data, loss):
    """A linear head with a loss, K and L2 chosen within the folds → Outcome."""
    data.settings = {**stage3.DEFAULTS, "kind": "linear", "loss": loss}
    return stage4.sparserm(data)


def ks_of(outcome):
    """The values of K that the folds chose: 16 to 64."""
    ks = sorted({k for k, _ in outcome.choices})
    return str(ks[0]) if len(ks) == 1 else f"{ks[0]} to {ks[-1]}"


def layers(args):
    """Dense head on every layer and token rule → {token: {layer: summary}}."""
    common.run_script("01_extract.py", "--model", args.model, "--pairs", args.pairs,
                      "--token", *args.tokens, "--layer", *args.layers, "--run", args.out)
    found = {token: {} for token in args.tokens}
    for token in args.tokens:
        for layer in args.layers:
            paths, _ = stage2.shard_files(args.out, layer, token)
            read = stage4.read_pairs(args.out, paths)
            pairs = stage4.Pairs(**read)
            seen = pairs.part(pairs.split != stage4.TEST)
            row = summary(common.dense_out_of_fold(seen).differences, seen.group)
            found[token][str(layer)] = row
            print(f"{token:<8} layer {layer:<3} dense {printed_interval(row, 'accuracy')}",
                  flush=True)
    return found


def main():
    """The command."""
    p = common.command_line(__doc__)
    sub = p.add_subparsers(dest="command", required=True)
    q = sub.add_parser("heads")
    q.add_argument("--run", required=True, help="folder of a run with stages 1 to 3 done")
    q.add_argument("--name", help="the features and head in RUN/NAME/")
    q.add_argument("--sae", help="the SAE, where it is not at the place recorded by stage 2")
    r = sub.add_parser("layers")
    r.add_argument("--model", default="demo")
    r.add_argument("--pairs", required=True)
    r.add_argument("--layers", type=int, nargs="+", default=[10, 12, 14, 16, 18, 20, 22])
    r.add_argument("--tokens", nargs="+", choices=stage1.RULES, default=["mean"])
    r.add_argument("--out", default="runs/sweeps",
                   help="folder of the extracted run (default runs/sweeps)")
    for command in (q, r):
        command.add_argument("--json", help="also write the figures here")
    args = p.parse_args()
    found = heads(args) if args.command == "heads" else layers(args)
    if args.json:
        common.write_json(args.json, found)


if __name__ == "__main__":
    run_main(main)
