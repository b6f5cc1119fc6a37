"""Which of the paper's relations hold on several preference sets, by five folds of stage 4.

    python benchmarks/does_it_hold.py TruthfulQA=truthfulqa.jsonl HH=hh_harmless.jsonl … --write

runs stages 1 to 4 (found complete, they are not run again) into runs/does-it-hold/NAME, with token
rule `mean`; with `last` beside it in NAME/last; and with `last` and z / rms, which is the head that
`export` takes, in NAME/export. Prints the tables of docs/results.md. --write puts the figures into
benchmarks/results/does_it_hold.json; --tables prints the tables of that file again, --picture draws
its K curve.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import DEMO_SAE, head_line, line
from parts import report
from parts.files import run_main
from parts.statistics import is_clear

METHODS = ("sparserm", "paper", "dense", "picked_directions", "picked_latents", "random_directions",
           "random_latents", "activations", "principal_directions", "difference_of_means", "words",
           "length", "blind", "shuffled_labels")
KEPT = ("verdict", "accuracy", "differences", "curves", "categories", "length", "sae", "run",
        "repeated_answers")
# what a head reads: the flags of stage 2; all but the first lie in a folder of their own
READINGS = {
    "mean": ("--token", "mean"),
    "last": ("--token", "last", "--name", "last"),
    "export": ("--token", "last", "--normalise", "rms", "--name", "export"),
}
KS = ("1", "2", "4", "8", "16", "32", "64", "128")


# ---------------------------------------------------------------- the stages

def run_stages(sets, args):
    """→ {reading: {name: what the tables need of its evaluation.json}}."""
    found = {reading: {} for reading in READINGS}
    for name, file in sets.items():
        run = Path(args.out) / name
        stage("01_extract.py", run, "--model", args.model, "--pairs", file, "--layer", args.layer,
              "--token", "mean", "last", "--max-length", args.max_length)
        for reading, flags in READINGS.items():
            beside = [] if reading == "mean" else ["--name", reading]
            folder = run if reading == "mean" else run / reading
            stage("02_select_features.py", run, "--sae", args.sae, "--layer", args.layer, *flags)
            stage("03_train_head.py", run, *beside)
            texts = [] if reading == "mean" else ["--texts", "0"]
            stage("04_evaluate.py", run, *beside, *texts)
            evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
            found[reading][name] = {key: evaluation[key] for key in KEPT}
    return found


def stage(script, run, *flags):
    """Run one stage."""
    print(f"{run.name}: {script}", file=sys.stderr, flush=True)
    common.run_script(script, "--run", run, *flags)


# ---------------------------------------------------------------- tables

def spoken(name):
    """random_latents → random latents."""
    names = {"sparserm": "**SparseRM** (linear, K auto)",
             "paper": "the paper's head (MLP, K = 128)",
             "difference_of_means": "difference of means (one direction)",
             "blind": "blind (answer alone, 300 pairs)"}
    return names.get(name, name.replace("_", " "))


def number(x, signed=False):
    """0.634 → .634; with a sign: +.634."""
    text = f"{x:+.3f}" if signed else f"{x:.3f}"
    return text.replace("0.", ".", 1)


def accuracy_table(found):
    """Accuracy out of fold of SparseRM and all controls, a column a set."""
    ours = [row["accuracy"]["sparserm"] for row in found.values()]
    text = head_line("accuracy, strict", found)
    text += line("pairs / prompts", [f"{row['n']} / {row['groups']}" for row in ours])
    text += line("K in the five folds", [report.ks_of(row) for row in ours])
    for name in METHODS:
        cells = []
        for row in found.values():
            of = row["accuracy"].get(name)
            cells.append(accuracy_cell(of) if of else "–")
        text += line(spoken(name), cells)
    return text


def accuracy_cell(row):
    """.794 [.736, .847], and the share of ties where it is not small."""
    ties = f", {row['ties']:.0%} ties" if row["ties"] > 0.005 else ""
    return f"{number(row['accuracy'])} [{number(row['low'])}, {number(row['high'])}]{ties}"


def gap_cell(row):
    """A difference with its interval, bold where it is clear of 0."""
    if row["low"] is None:
        return f"{number(row['mean'], True)} (cannot tell)"
    text = (f"{number(row['mean'], True)} [{number(row['low'], True)}, "
            f"{number(row['high'], True)}]")
    return f"**{text}**" if is_clear(row) else text


def differences_table(found):
    """SparseRM minus each control, a column a set."""
    text = head_line("SparseRM minus", found)
    for name in METHODS[1:]:
        cells = [gap_cell(row["differences"][name]) if name in row["differences"] else "–"
                 for row in found.values()]
        text += line(spoken(name), cells)
    return text


def k_table(found, control="random_directions"):
    """SparseRM minus a control with K fixed, a column a set."""
    text = head_line(f"minus {spoken(control)}, at K =", found)
    for k in KS:
        cells = []
        for row in found.values():
            curve = row["curves"]["k"].get(control, {})
            cells.append(gap_cell(curve[k]["behind"]) if k in curve else "–")
        text += line(k, cells)
    return text


def rules_table(found):
    """Both token rules side by side: accuracy of SparseRM, the dense head and the paper's head."""
    names = list(found["mean"])
    text = head_line("accuracy, `last` → `mean`", names)
    for method in ("sparserm", "dense", "paper", "random_directions"):
        cells = []
        for name in names:
            last, mean = [found[rule][name]["accuracy"][method]["accuracy"]
                          for rule in ("last", "mean")]
            cells.append(f"{number(last)} → {number(mean)}")
        text += line(spoken(method), cells)
    for k in ("1", "4", "16"):
        cells = []
        for name in names:
            gaps = [found[rule][name]["curves"]["k"]["random_directions"].get(k)
                    for rule in ("last", "mean")]
            cells.append(" → ".join(gap_cell(gap["behind"]) if gap else "–" for gap in gaps))
        text += line(f"SparseRM − random directions, K = {k}", cells)
    return text


def export_table(found):
    """What the form of a sequence classifier costs: accuracy of the heads under both readings."""
    names = list(found["mean"])
    text = head_line("accuracy, strict", names)
    for reading, words in (("mean", "`mean` (default)"), ("export", "`last`, z / rms (`export`)")):
        for method in ("sparserm", "dense"):
            cells = [accuracy_cell(found[reading][name]["accuracy"][method]) for name in names]
            text += line(f"{spoken(method)}, {words}", cells)
    return text


def export_claim(found):
    """What the form costs, in words."""
    lost, gained = [], []
    for name, row in found["export"].items():
        before = found["mean"][name]["accuracy"]["sparserm"]["accuracy"]
        change = row["accuracy"]["sparserm"]["accuracy"] - before
        if abs(change) >= 0.02:
            (gained if change > 0 else lost).append(f"{name} ({number(change, True)})")
    gaps = {name: row["differences"]["random_directions"]
            for name, row in found["export"].items()}
    clear = common.by_sign({f"{name} ({common.difference(gap)})": gap
                            for name, gap in gaps.items()})
    return ("With the reading of `export` the accuracy of SparseRM is two points or more lower on "
            f"{listed(lost)}, as much higher on {listed(gained)} (no interval was computed for "
            "this change). At the K chosen it is clearly ahead of random directions on "
            f"{listed(clear[1])}, clearly behind them on {listed(clear[-1])}.\n")


def tables(found):
    """The figures → markdown."""
    mean = found["mean"]
    return "\n".join([accuracy_table(mean), differences_table(mean), k_table(mean),
                      k_table(mean, "picked_directions"), rules_table(found)])


# ---------------------------------------------------------------- in words

def claims(found):
    """What the figures say → markdown list; each sentence is made from them."""
    mean = found["mean"]
    lines = [*claims_about_k(mean), *claims_about_controls(mean), claim_about_blind(mean)]
    return "".join(f"* {text}\n" for text in lines)


def finding(found):
    """The one paragraph of the README: where SparseRM wins, and where it does not."""
    mean = found["mean"]
    learned = {name: row for name, row in mean.items()
               if is_clear(row["differences"]["shuffled_labels"]) > 0}
    nothing = [name for name in mean if name not in learned]

    def few(control, sign):
        """On how many sets SparseRM is clearly above (or below) a control at some K <= 16."""
        return number_of(any(int(k) <= 16 for k in clear_ks(row, control, sign))
                         for row in learned.values())

    def at_chosen_k(control, sign):
        return number_of(is_clear(row["differences"][control]) == sign for row in learned.values())
    return (
        f"On {len(learned)} of {len(mean)} sets there is something to learn: shuffled "
        f"labels are clearly beaten (not on {listed(nothing)}). Of these {len(learned)}, with few "
        "directions (at some K up to 16 a side), the SAE's choice is clearly better than as many "
        f"random ones on {few('random_directions', 1)}, clearly worse on "
        f"{few('random_directions', -1)}; against random ones picked by the labels it is clearly "
        f"better on {few('picked_directions', 1)}, clearly worse on "
        f"{few('picked_directions', -1)}. At the K that cross-validation takes, "
        f"SparseRM clearly beats random directions on {at_chosen_k('random_directions', 1)} and a "
        f"dense head (linear, on all of z) on {at_chosen_k('dense', 1)}; the dense head clearly "
        f"beats it on {at_chosen_k('dense', -1)}.\n")


def number_of(conditions):
    """How many hold → a number, or: none."""
    return sum(conditions) or "none"


def listed(names):
    """A, B and C; or: no set."""
    names = list(names)
    if not names:
        return "no set"
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def clear_ks(row, control, sign=1):
    """The values of K at which SparseRM is clearly above a control (sign -1: below)."""
    return report.clear_ks(row["curves"]["k"].get(control, {}), sign)


def claims_about_k(mean):
    """With how many directions the SAE's choice shows."""
    by_set = {name: clear_ks(row, "random_directions") for name, row in mean.items()}
    some = {name: ks for name, ks in by_set.items() if any(int(k) <= 16 for k in ks)}
    parts = [f"{name} (K = {', '.join(ks)})" for name, ks in some.items()]
    yield ("**With few directions the SAE's choice matters.** At some K up to 16 it is clearly "
           f"above random directions on {len(some)} of {len(mean)} sets. All K where it is: "
           f"{listed(parts)}.")
    at_most = [name for name, row in mean.items() if clear_ks(row, "picked_directions")]
    behind = [name for name, row in mean.items() if clear_ks(row, "picked_directions", -1)]
    yield ("**Random directions that may choose are a strong control.** Picked by the labels out "
           f"of 16,384, they are clearly behind SparseRM at some K on {listed(at_most)}, and "
           f"clearly ahead at some K on {listed(behind)}. What the SAE adds for sure is a name.")


SPOKEN = {"dense": "A dense head on all of z", "paper": "The paper's own head",
          "random_directions": "With K chosen, random directions",
          "activations": "The SAE's activations instead of the projection",
          "difference_of_means": "One direction, the difference of means,", "words": "The wording "
                                                                                     "alone"}


def claims_about_controls(mean):
    """Where each control is clearly ahead of SparseRM, and where clearly behind."""
    for control, subject in SPOKEN.items():
        sets = common.by_sign({name: row["differences"][control] for name, row in mean.items()})
        verb = "are" if control in ("activations", "random_directions") else "is"
        yield (f"{subject} {verb} clearly ahead on {listed(sets[-1])}, clearly behind on "
               f"{listed(sets[1])}, "
               "no measurable difference elsewhere.")


def claim_about_blind(mean):
    """What the answer alone gives away."""
    parts = []
    for name, row in mean.items():
        blind = row["accuracy"]["blind"]["accuracy"]
        parts.append(f"{name} {number(blind)}")
    return f"The answer without its question (`blind`): {', '.join(parts)}."


def draw(found, path):
    """The K curve of `safe` → PNG file."""
    curve = found["mean"]["safe"]["curves"]["k"]
    report.picture(path, report.curve_plot, curve, "K, directions a side (safe)")


# ---------------------------------------------------------------- command line

def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("sets", nargs="*", metavar="NAME=FILE")
    p.add_argument("--model", default="demo")
    p.add_argument("--layer", type=int, default=16)
    p.add_argument("--max-length", type=int, default=2048)
    p.add_argument("--sae", default=str(DEMO_SAE))
    p.add_argument("--out", default="runs/does-it-hold")
    p.add_argument("--name", default="does_it_hold",
                   help="of the file in benchmarks/results (default does_it_hold)")
    p.add_argument("--write", action="store_true")
    p.add_argument("--tables", action="store_true")
    p.add_argument("--picture", metavar="PNG",
                   help="draw the K curve of the set `safe`, as in the README")
    args = p.parse_args()
    sets = common.named_sets(args.sets)
    if not args.tables and not sets:
        p.error("name the sets: NAME=FILE …")

    found = common.read_result(args.name) if args.tables else run_stages(sets, args)
    if args.write:
        common.write_result(args.name, found, sort_keys=False)
    if args.picture:
        draw(found, args.picture)
    print(tables(found))
    print(claims(found))


if __name__ == "__main__":
    run_main(main)
