"""Which of the paper's relations hold on several preference sets: each trained on its own train
split, each head tested on all.

    python benchmarks/does_it_hold.py TruthfulQA=truthfulqa.jsonl HH=hh_harmless.jsonl … --write

runs stages 1 to 4 (found complete, they are not run again) into runs/does-it-hold/NAME and prints
the tables of the README; --write puts the figures into benchmarks/results/does_it_hold.json;
--tables prints the tables of that file again.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import DEMO_SAE, difference, half, head_line, interval, line
from parts import report
from parts.files import run_main

NAMES = ("sparserm", "dense", "random_directions", "random_latents", "activations", "words",
         "length", "shuffled_labels")
KEPT = ("accuracy", "differences", "curves", "other", "calibration", "length", "sae", "run", "fold",
        "stability", "explanations")


# ---------------------------------------------------------------- the stages

def run_stages(sets, args):
    """→ {name: what the tables need of its evaluation.json}."""
    runs = {name: Path(args.out) / name for name in sets}
    for name, file in sets.items():
        stage("01_extract.py", runs[name], "--model", args.model, "--pairs", file,
              "--layer", args.layer, "--token", args.token)
        stage("02_select_features.py", runs[name], "--sae", args.sae)
        stage("03_train_head.py", runs[name])

    found = {}
    for name, run in runs.items():
        others = []
        for other in runs:
            if other != name:
                others += ["--other", f"{other}={runs[other]}"]
        stage("04_evaluate.py", run, "--sweeps", args.sweeps, *others)
        evaluation = json.loads((run / "evaluation.json").read_text("utf-8"))
        found[name] = {key: evaluation[key] for key in KEPT}
    return found


def stage(script, run, *flags):
    """Run one stage."""
    print(f"{run.name}: {script}", file=sys.stderr, flush=True)
    common.run_script(script, "--run", run, *flags)


# ---------------------------------------------------------------- tables

def tables(found):
    """The figures → markdown: accuracy of SparseRM and the controls; SparseRM minus each; K against
    random directions."""
    return "\n".join([accuracy_table(found), differences_table(found), k_table(found)])


def accuracy_table(found):
    """Accuracy of SparseRM and of all controls, a column each set."""
    ours = [row["accuracy"]["sparserm"] for row in found.values()]
    text = head_line("test accuracy, a tie as half", found)
    text += line("test pairs / prompts", [f"{row['n']} / {row['groups']}" for row in ours])
    text += line("K chosen on dev", [str(row["choice"]) for row in ours])
    for name in NAMES:
        text += line(spoken(name), [half(row["accuracy"][name]) for row in found.values()])
    return text


def differences_table(found):
    """SparseRM minus each control, a column each set."""
    text = head_line("SparseRM minus", found)
    for name in NAMES[1:]:
        text += line(spoken(name), [difference(row["differences"][name]) for row in found.values()])
    return text


def k_table(found):
    """SparseRM minus random directions with K fixed, a column each set."""
    text = head_line("minus random directions, at K =", found)
    for k in ("1", "2", "4", "8", "16", "32", "64", "128"):
        cells = []
        for row in found.values():
            curve = row["curves"]["k"]["random_directions"]
            cells.append(difference(curve[k]["behind"]) if k in curve else "–")
        text += line(k, cells)
    return text


def other_tables(found):
    """The figures → markdown: every head on every set, and who wins there."""
    text = head_line("trained on ↓, tested on →", found)
    for name, row in found.items():
        on = {**row["other"], name: row["accuracy"]["sparserm"]}
        text += line(name, [interval(on[other]) for other in found])

    across = []
    for row in found.values():
        across += row["other"].values()
    if all("controls" in couple for couple in across):
        text += "\n" + couples_table(across)
    return text


def couples_table(across):
    """On how many couples of two sets SparseRM is clearly better or worse than each control."""
    text = head_line(f"of {len(across)} couples", ("SparseRM better", "not told apart", "worse"))
    for name in NAMES[1:]:
        behind = [couple["controls"][name]["behind"] for couple in across]
        better = sum(gap["low"] > 0 for gap in behind)
        worse = sum(gap["high"] < 0 for gap in behind)
        counts = (better, len(behind) - better - worse, worse)
        text += line(f"than {spoken(name)}", [str(count) for count in counts])
    return text


def spoken(name):
    """random_latents → random latents."""
    return name.replace("_", " ")


def draw(found, path):
    """The K curve of the first set → PNG file."""
    name, first = next(iter(found.items()))
    shown = ("sparserm", "random_directions", "activations", "dense")
    curve = {control: first["curves"]["k"][control] for control in shown}
    report.picture(path, report.curve_plot, curve, f"K, directions a side ({name})")


# ---------------------------------------------------------------- command line

def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("sets", nargs="*", metavar="NAME=FILE")
    p.add_argument("--model", default="demo")
    p.add_argument("--layer", type=int, default=16)
    p.add_argument("--token", default="last")
    p.add_argument("--sae", default=str(DEMO_SAE))
    p.add_argument("--sweeps", choices=("small", "full"), default="full")
    p.add_argument("--out", default="runs/does-it-hold")
    p.add_argument("--write", action="store_true")
    p.add_argument("--tables", action="store_true")
    p.add_argument("--picture", metavar="PNG",
                   help="with --tables: draw the K curve of the first set, as in the README")
    args = p.parse_args()
    sets = common.named_sets(args.sets)
    if not args.tables and not sets:
        p.error("name the sets: NAME=FILE …")

    found = common.read_result("does_it_hold") if args.tables else run_stages(sets, args)
    if args.write:
        common.write_result("does_it_hold", found, sort_keys=False)
    if args.picture:
        draw(found, args.picture)
    print(tables(found), other_tables(found), sep="\n")


if __name__ == "__main__":
    run_main(main)
