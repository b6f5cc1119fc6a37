"""Which of the paper's relations hold on several preference sets: each trained on its own train split, each head tested on all.

    python benchmarks/does_it_hold.py TruthfulQA=truthfulqa.jsonl HH=hh_harmless.jsonl … --write

runs stages 1 to 4 (found complete, they are not run again) into runs/does-it-hold/NAME and prints the tables of the README;
--write puts the figures into benchmarks/results/does_it_hold.json; --tables prints the tables of that file again.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "does_it_hold.json"
NAMES = ("sparserm", "dense", "random_directions", "random_latents", "activations", "words", "length", "shuffled_labels")


def run_stages(sets, args):
    """→ {name: what the tables need of its evaluation.json}."""
    runs = {name: Path(args.out) / name for name in sets}

    def stage(script, run, *more):
        print(f"{run.name}: {script}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, ROOT / script, "--run", run, *map(str, more)], check=True, stdout=subprocess.DEVNULL)
    for name, file in sets.items():
        stage("01_extract.py", runs[name], "--model", args.model, "--pairs", file, "--layer", args.layer, "--token", args.token)
        stage("02_select_features.py", runs[name], "--sae", args.sae)
        stage("03_train_head.py", runs[name])
    found = {}
    for name, run in runs.items():
        others = [x for other in runs if other != name for x in ("--other", f"{other}={runs[other]}")]
        stage("04_evaluate.py", run, "--sweeps", args.sweeps, *others)
        evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
        found[name] = {key: evaluation[key] for key in ("accuracy", "differences", "curves", "other", "calibration", "length", "sae", "run",
                                                        "fold", "stability", "explanations")}
    return found


def interval(row, mean="accuracy", sign="", ends=("low", "high")):
    """.586 [.510, .660]"""
    return "{} [{}, {}]".format(*(f"{row[n]:{sign}.3f}".replace("0.", ".", 1) for n in (mean, *ends)))


def half(row):
    """Accuracy with a tie as half, as the differences have it; how many ties there are."""
    return interval(row, "ties_half", ends=("half_low", "half_high")) + (f", {row['ties']:.0%} ties" if row["ties"] > 0.005 else "")


def head_line(first, found):
    """The first two lines of a table with a column for each set."""
    return f"| {first} | " + " | ".join(found) + " |\n" + "|---" * (1 + len(found)) + "|\n"


def line(name, cells):
    """A line of a table."""
    return f"| {name} | " + " | ".join(cells) + " |\n"


def tables(found):
    """The figures → markdown: accuracy of SparseRM and the controls; SparseRM minus each; K against random directions."""
    text = head_line("test accuracy, a tie as half", found) + line("test pairs / prompts", [
        f"{r['accuracy']['sparserm']['n']} / {r['accuracy']['sparserm']['groups']}" for r in found.values()])
    text += line("K chosen on dev", [str(r["accuracy"]["sparserm"]["choice"]) for r in found.values()])
    for name in NAMES:
        text += line(name.replace("_", " "), [half(r["accuracy"][name]) for r in found.values()])
    text += "\n" + head_line("SparseRM minus", found)
    for name in NAMES[1:]:
        text += line(name.replace("_", " "), [interval(r["differences"][name], "mean", "+") for r in found.values()])
    text += "\n" + head_line("minus random directions, at K =", found)
    for k in (1, 2, 4, 8, 16, 32, 64, 128):
        text += line(str(k), [interval(r["curves"]["k"]["random_directions"][str(k)]["behind"], "mean", "+")
                              if str(k) in r["curves"]["k"]["random_directions"] else "–" for r in found.values()])
    return text


def other_tables(found):
    """The figures → markdown: every head on every set, and who wins there."""
    text = head_line("trained on ↓, tested on →", found)
    for name, r in found.items():
        text += line(name, [interval(r["other"][other]) if other != name else interval(r["accuracy"]["sparserm"]) for other in found])
    across = [row for r in found.values() for row in r["other"].values()]
    if all("controls" in row for row in across):
        text += "\n" + head_line(f"of {len(across)} couples", ("SparseRM better", "not told apart", "worse"))
        for name in NAMES[1:]:
            behind = [row["controls"][name]["behind"] for row in across]
            better, worse = sum(b["low"] > 0 for b in behind), sum(b["high"] < 0 for b in behind)
            text += line(f"than {name.replace('_', ' ')}", [str(better), str(len(behind) - better - worse), str(worse)])
    return text


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sets", nargs="*", metavar="NAME=FILE")
    p.add_argument("--model", default="demo")
    p.add_argument("--layer", type=int, default=16)
    p.add_argument("--token", default="last")
    p.add_argument("--sae", default=str(ROOT / "assets/sae-smollm2-135m-layer16.safetensors"))
    p.add_argument("--sweeps", choices=("small", "full"), default="full")
    p.add_argument("--out", default="runs/does-it-hold")
    p.add_argument("--write", action="store_true")
    p.add_argument("--tables", action="store_true")
    p.add_argument("--picture", metavar="PNG", help="with --tables: draw the K curve of the first set, as in the README")
    args = p.parse_args()
    if not args.tables and not (args.sets and all("=" in s for s in args.sets)):
        p.error("name the sets: NAME=FILE …")
    found = json.loads(RESULTS.read_text("utf-8")) if args.tables else run_stages(dict(s.split("=", 1) for s in args.sets), args)
    if args.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1, sort_keys=False) + "\n")
    if args.picture:
        name, first = next(iter(found.items()))
        sys.path.insert(0, str(ROOT))
        report = importlib.import_module("parts.report")
        curve = {n: first["curves"]["k"][n] for n in ("sparserm", "random_directions", "activations", "dense")}
        report.picture(lambda axes: report.curve_plot(axes, curve, f"K, directions a side ({name})"), args.picture)
    print(tables(found), other_tables(found), sep="\n")


if __name__ == "__main__":
    main()
