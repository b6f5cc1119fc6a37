"""What stage 4 (and the curve of stage 5) shows: the table it prints and what it says in words, the
pictures, the page.

    python 04_evaluate.py --run runs/demo                             report.html and the pictures
"""

import base64
import io
import json
import shlex
from pathlib import Path

from parts.files import moved_into_place, write_text
from parts.statistics import is_clear

TEMPLATE = Path(__file__).parent / "report.html"
COLOURS = {"sparserm": "#2166ac", "paper": "#053061", "dense": "#666666",
           "random_directions": "#b2182b", "picked_directions": "#d6604d",
           "picked_latents": "#e08214", "random_latents": "#ef8a62", "activations": "#1b7837",
           "difference_of_means": "#5aae61", "principal_directions": "#9970ab",
           "words": "#8073ac", "length": "#b08d57", "blind": "#4d9221",
           "shuffled_labels": "#999999"}
IN_CURVE = ("sparserm", "random_directions", "picked_directions", "activations", "dense")
SOME_TIES = 0.005       # a smaller share of ties is not worth a mark


# ---------------------------------------------------------------- pictures

def picture(path, draw, *what):
    """draw(axes, *what) → a PNG file and its bytes as base64; None without matplotlib."""
    try:
        import matplotlib.figure
    except ImportError:
        return None
    figure = matplotlib.figure.Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, *what)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    with moved_into_place(path) as part:
        part.write_bytes(buffer.getvalue())
    return base64.b64encode(buffer.getvalue()).decode()


def shown(name):
    """sparserm → SparseRM, random_latents → random latents."""
    return "SparseRM" if name == "sparserm" else name.replace("_", " ")


def accuracy_plot(axes, accuracy):
    """Dots with intervals: SparseRM on top, then by accuracy; a ring: ties as half."""
    names = sorted(accuracy,
                   key=lambda name: (name == "sparserm", accuracy[name]["accuracy"], name))
    for y, name in enumerate(names):
        row = accuracy[name]
        colour = COLOURS[name]
        axes.plot([row["low"], row["high"]], [y, y], color=colour,
                  lw=3 if name == "sparserm" else 1.5)
        axes.plot(row["accuracy"], y, "o", color=colour)
        if row["ties"] > SOME_TIES:
            axes.plot(row["ties_half"], y, "o", color=colour, mfc="none")
    axes.axvline(0.5, color="#bbbbbb", lw=1, ls=":")
    axes.set_yticks(range(len(names)), [shown(name) for name in names])
    axes.set_xlabel("accuracy out of fold, 95 % interval over prompts")


def curve_plot(axes, curve, label):
    """Accuracy against K or the number of train pairs, a band for SparseRM and for random
    directions. A tie counts as wrong, as in the tables."""
    for name in IN_CURVE:
        if name not in curve:
            continue
        xs = sorted(int(x) for x in curve[name])
        rows = [curve[name][str(x)] for x in xs]
        colour = COLOURS[name]
        width = 2.5 if name == "sparserm" else 1.2
        axes.plot(xs, [row["accuracy"] for row in rows], "o-", ms=4, lw=width, color=colour,
                  label=shown(name))
        if name in ("sparserm", "random_directions"):
            low = [row["low"] for row in rows]
            high = [row["high"] for row in rows]
            axes.fill_between(xs, low, high, color=colour, alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy out of fold")
    axes.legend(frameon=False, fontsize=8)


def reliability_plot(axes, calibration):
    """Confidence σ(|Δr| / T) against how often the higher reward was right, bins of equal mass."""
    bins = calibration["bins"]
    axes.plot([0.5, 1], [0.5, 1], color="#bbbbbb", lw=1, ls=":")
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-",
              color=COLOURS["sparserm"])
    axes.set_xlabel("confidence")
    axes.set_ylabel("share right")


def best_of_plot(axes, curve):
    """Best-of-n of stage 5, {m: row}: mean label if there are labels, else mean reward."""
    ms = list(curve)
    labelled = "label" in curve[1]
    wanted = "label" if labelled else "reward"
    axes.plot(ms, [row[wanted] for row in curve.values()], "o-", color=COLOURS["sparserm"],
              label="by the reward")
    if labelled:
        axes.plot(ms, [row["oracle"] for row in curve.values()], "s--", color=COLOURS["dense"],
                  label="oracle")
        axes.axhline(curve[1]["label"], color="#bbbbbb", lw=1, ls=":", label="random pick")
        axes.legend(frameon=False, fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ms, [f"{m}\n{row['kl_bound']:.2f}" for m, row in curve.items()])
    axes.minorticks_off()
    axes.set_xlabel("best of m candidates; below: KL to the policy is at most … nats")
    axes.set_ylabel(f"mean {wanted}")


# ---------------------------------------------------------------- the page

CURVES = {"k": "K, directions a side", "pairs": "train pairs"}


def write_page(result, run, names=None):
    """Pictures and report.html of a run → names of the files written.

    names: {latent: {name, right, tasks}}, as contexts.read_names() gives them.
    """
    run = Path(run)
    images = {
        "accuracy": picture(run / "accuracy.png", accuracy_plot, result["accuracy"]),
    }
    if "calibration" not in result:
        (run / "reliability.png").unlink(missing_ok=True)       # of an earlier evaluation
    else:
        images["reliability"] = picture(run / "reliability.png", reliability_plot,
                                        result["calibration"])
    for name, label in CURVES.items():
        path = run / f"curve_{name}.png"
        if result["curves"].get(name):
            images[path.stem] = picture(path, curve_plot, result["curves"][name], label)
        else:
            path.unlink(missing_ok=True)        # of an earlier evaluation with more sweeps
    images = {name: image for name, image in images.items() if image}
    if not images:
        print("note: no pictures, matplotlib is missing: pip install matplotlib")

    data = json.dumps({"evaluation": result, "images": images, "names": names or {}},
                      sort_keys=True, ensure_ascii=False)
    data = data.replace("<", "\\u003c")         # no </script> within it can end the script
    write_text(run / "report.html", TEMPLATE.read_text("utf-8").replace("__DATA__", data))
    return ["report.html", *(f"{name}.png" for name in images)]


# ---------------------------------------------------------------- in words

TOO_EASY = 0.85
ENOUGH_PROMPTS = 200


def verdict(result):
    """What this evaluation says → sentences, the most important first. One a cause."""
    accuracy = result["accuracy"]
    differences = result["differences"]
    ours = accuracy["sparserm"]
    if ours["groups"] < 20:
        return [f"Too small: {ours['groups']} prompts. Nothing can be told from so few; "
                f"{ENOUGH_PROMPTS} are a start."]
    easy = [name for name in ("words", "length") if accuracy[name]["ties_half"] >= TOO_EASY
            and is_clear(differences[name]) <= 0]
    found = about_the_set(result, easy)
    if is_clear(differences["shuffled_labels"]) <= 0 and not easy:
        found.append("Nothing to learn here: the method is not clearly better than with "
                     "shuffled labels.")
        return found
    found.append(f"SparseRM ranks {ours['accuracy']:.3f} of the pairs right "
                 f"[{ours['low']:.3f}, {ours['high']:.3f}]; the folds took K = {ks_of(ours)} "
                 "directions a side.")
    found += few_directions(result["curves"].get("k"))
    found += what_helps(differences)
    if "blind" in accuracy and accuracy["blind"]["ties_half"] > 0.65:
        found.append(f"The answer without its question gives {accuracy['blind']['ties_half']:.2f}: "
                     "a shortcut, unless an answer is right or wrong by itself.")
    return found


def about_the_set(result, easy):
    """What is to be known of the pairs before their figures → sentences. easy: the controls that
    do as well by themselves."""
    accuracy = result["accuracy"]
    found = []
    if easy:
        share = max(accuracy[name]["ties_half"] for name in easy)
        found.append(f"Too easy: {' and '.join(easy)} alone get {share:.2f}. This set cannot show "
                     "what a reward model adds.")
    if accuracy["length"]["low"] > 0.5 and "length" not in easy:
        found.append(f"Length alone ranks {accuracy['length']['accuracy']:.2f} of the pairs "
                     f"right{correlation_text(result)}: balance it, or the reward may pay for it.")
    if accuracy["sparserm"]["groups"] < ENOUGH_PROMPTS:
        found.append(f"Only {accuracy['sparserm']['groups']} prompts: the intervals are wide. "
                     f"{ENOUGH_PROMPTS} are a start.")
    if result["repeated_answers"] > 0.1:
        found.append(f"{result['repeated_answers']:.0%} of the answers stand under several "
                     "prompts: a head may know them by heart.")
    return found


def correlation_text(result):
    """What the head makes of length on the test split; nothing where there is no test pair."""
    if not result.get("length"):
        return ""
    return (" (on the test split the reward's correlation with it is "
            f"{result['length']['correlation']:+.2f})")


def ks_of(row):
    """The values of K that the folds chose: 16 to 64."""
    ks = sorted({choice[0] for choice in row["choices"]})
    return str(ks[0]) if len(ks) == 1 else f"{ks[0]} to {ks[-1]}"


def few_directions(curve):
    """With how many directions the SAE's choice shows, and against which random ones → sentences,
    none without a K curve."""
    if not curve or not curve.get("random_directions"):
        return []
    clear = clear_ks(curve["random_directions"], 1)
    found = ["At no K the SAE's choice is clearly better than random directions."]
    if clear:
        found = [f"With K = {', '.join(clear)} directions a side the SAE's choice is clearly "
                 "better than random directions."]
    worse = clear_ks(curve["random_directions"], -1)
    if worse:
        found.append(f"With K = {', '.join(worse)} random directions are clearly better.")
    picked = clear_ks(curve.get("picked_directions", {}), -1)
    if picked:
        found.append(f"With K = {', '.join(picked)} random directions picked by the labels are "
                     "clearly better than the SAE's.")
    return found


def clear_ks(rows, sign):
    """The values of K at which SparseRM minus a control is clear of 0, above (1) or below (-1)."""
    return [k for k in sorted(rows, key=int) if is_clear(rows[k]["behind"]) == sign]


# control: (SparseRM is clearly better, no measurable difference, the control is clearly better)
QUESTIONS = {
    "random_directions": (
        "At the K that the folds took: clearly better than random directions",
        "At the K that the folds took: no measurable difference to random directions",
        "At the K that the folds took: random directions are clearly better"),
    "picked_directions": (
        "Clearly better than random directions picked by the labels",
        "No measurable difference to random directions picked by the labels",
        "Random directions picked by the labels are clearly better"),
    "activations": (
        "Projecting z is clearly better than reading the SAE's activations",
        "No measurable difference between projecting z and reading the SAE's activations",
        "The SAE's activations are clearly better than the projections"),
    "words": (
        "Clearly better than the wording alone, 1- and 2-grams",
        "No measurable difference to the wording alone, 1- and 2-grams",
        "The wording alone, 1- and 2-grams, is clearly better"),
    "dense": (
        "Clearly better than a dense head, linear on all of z",
        "No measurable difference to a dense head, linear on all of z",
        "A dense head, linear on all of z, is clearly better"),
    "paper": (
        "Clearly better than the paper's own head, an MLP",
        "No measurable difference to the paper's own head, an MLP",
        "The paper's own head, an MLP, is clearly better"),
}


def what_helps(differences):
    """A sentence on each control that asks a question, by the sign of SparseRM minus it; one on all
    those of which nothing can be told."""
    found = []
    untold = []
    for name, (better, level, worse) in QUESTIONS.items():
        row = differences[name]
        if row["low"] is None:
            untold.append(shown(name))
            continue
        text = {1: better, 0: level, -1: worse}[is_clear(row)]
        found.append(f"{text} ({difference_text(row)}).")
    if untold:
        found.append(f"Cannot tell, too few pairs are ranked otherwise: {', '.join(untold)}.")
    return found


def difference_text(row):
    """+0.034 [+0.010, +0.058]; without an interval: cannot tell."""
    if row["low"] is None:
        return f"{row['mean']:+.3f}, too few prompts differ to tell"
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


# ---------------------------------------------------------------- what the stages print

def print_accuracy(what, rows):
    """{name: summary, of a control with `behind`} → a table: SparseRM, then the controls."""
    ours = rows["sparserm"]
    print(f"\n{what}: {ours['n']} pairs of {ours['groups']} prompts, 95 % intervals"
          "\n                         accuracy                    SparseRM minus it")
    for name in sorted(rows, key=lambda name: (name != "sparserm", -rows[name]["ties_half"])):
        row = rows[name]
        line = f"  {name:<21} {row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]"
        if "behind" in row:
            line += f"      {difference_text(row['behind'])}"
        if row["ties"] > SOME_TIES:
            line += f"   ties {row['ties']:.1%}, as half {row['ties_half']:.3f}"
        print(line)


def print_k_curve(curve):
    """Accuracy by K, and where SparseRM is above random directions."""
    ks = sorted(curve["sparserm"], key=int)
    print("\n  K a side" + " " * 13 + "".join(f"{k:>7}" for k in ks))
    for name in IN_CURVE:
        if name in curve:
            cells = [f"{curve[name][k]['ties_half']:>7.3f}" if k in curve[name] else " " * 7
                     for k in ks]
            print(f"  {name:<21}" + "".join(cells))
    clear = clear_ks(curve.get("random_directions", {}), 1)
    if clear:
        print(f"  clearly above random directions at K = {', '.join(clear)} (each K by itself)")
    else:
        print("  at no K clearly above random directions")


def print_report(folder, result, written, name=None, names=None):
    """What stage 4 prints: the head on the test split, the verdict, the tables.

    name: of the head; names: of latents, as contexts.read_names() gives them.
    """
    if result["test"]:
        test = result["test"]
        print(f"\nthis head, test split, {test['n']} pairs of {test['groups']} prompts: "
              f"{test['accuracy']:.3f} right [{test['low']:.3f}, {test['high']:.3f}]")
    print()
    for sentence in result["verdict"]:
        print(f"• {sentence}")
    rows = {}
    for method, row in result["accuracy"].items():
        behind = result["differences"].get(method)
        rows[method] = row | ({"behind": behind} if behind else {})
    print_accuracy(f"{result['run']['folds']} folds", rows)
    if result["curves"].get("k"):
        print_k_curve(result["curves"]["k"])
    print_categories(result["categories"])
    for other, rows in result["other"].items():
        print_accuracy(f"{other}, by heads of this set", rows)
    if names:
        print_names(result["latents"], names)

    print_figures(result)
    print(f"written      {folder}/evaluation.json, {', '.join(written)}")
    directions = result.get("quiz", {}).get("directions", [])
    if directions:
        print(f"quiz         name {len(directions)} directions and test the names, in "
              f"{folder}/report.html#quiz; --names takes the file that it saves")
    for text in result["sae"]["warnings"]:
        print("note: SAE:", text)
    print_next(folder, result, name)


def print_categories(categories):
    """Accuracy by category, where the pairs have several."""
    if categories:
        print("\n  category             accuracy")
    for category, row in categories.items():
        print(f"  {category:<20} {row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}] "
              f" {row['n']} pairs")


def print_figures(result):
    """Calibration and length on the test split, and how small the head is."""
    cost = result["cost"]
    print()
    if "calibration" in result:
        c = result["calibration"]
        print(f"calibration  T {c['temperature']:.2f} · NLL {c['nll']:.3f} · Brier "
              f"{c['brier']:.3f} · "
              f"ECE {c['ece']:.3f} (test split)")
        print(f"length       correlation with the reward {result['length']['correlation']:+.2f}")
    print(f"parameters   {cost['trained_parameters']:,} trained (K = {result['run']['k']} a side), "
          f"{cost['share']:.1e} of the backbone")


def print_next(folder, result, name):
    """The next commands. name: of the head, where it is not the run's first."""
    run = f"--run {folder.parent} --name {name}" if name else f"--run {folder}"
    example = shlex.quote(result["wrong"][0]["id"]) if result.get("wrong") else "ID"
    print(f"\nnext: open {folder}/report.html in a browser")
    print(f"      python 04_evaluate.py {run} --explain {example}")
    print("      python 05_best_of_n.py sample --prompts data/prompts.jsonl "
          f"--reward {folder}/reward_head.safetensors")


MOST_NAMES = 20


def print_names(rows, names):
    """The latents of a head that have a name, in the order of `rows`, with their score."""
    named = [row for row in rows if row["latent"] in names]
    if named:
        print("\n  latent  side      adds where it fires   name")
    for row in named[:MOST_NAMES]:
        print(f"  {row['latent']:>6}  {row['side']:<8}  {row['adds_firing']:>+19.4f}   "
              f"{name_text(names[row['latent']])}")
    if len(named) > MOST_NAMES:
        print(f"  {len(named) - MOST_NAMES:>6}  more have a name")
    others = len(names) - len(named)
    if others:
        print(f"note: {others} of the {len(names)} names are of latents that this head does not "
              "use")


def name_text(found):
    """{name, right, tasks} → the commas (7 of 10 right)."""
    score = f" ({found['right']} of {found['tasks']} right)" if found["tasks"] else ""
    return f"{found['name'] or 'no name'}{score}"


def print_curve(out, result, rows, top, drawn):
    """The best-of-n curve of stage 5 and the prompt whose candidates are furthest apart.

    top: mean label of the top-ranked and of a random candidate, where there are labels.
    """
    without = "" if top else " (without labels the curve rises by its making)"
    print(f"\n{result['prompts']} prompts with up to {result['n']} candidates; expectation over "
          f"all subsets of m{without}")
    print("  best of m   prompts     reward   KL at most" + ("    label   oracle" if top else ""))
    for m, row in result["curve"].items():
        labelled = f"   {row['label']:.3f}    {row['oracle']:.3f}" if "label" in row else ""
        print(f"  {m:>9}   {row['prompts']:>7}   {row['reward']:>8.3f}   "
              f"{row['kl_bound']:>10.2f}{labelled}")
    if top:
        print(f"\nmean label   top-ranked {top[0]:.3f} · random pick {top[1]:.3f}")

    print_widest_gap(max(rows, key=lambda row: max(row["scores"]) - min(row["scores"])))
    picture_path = f", {out.with_suffix('.curve.png')}" if drawn else ""
    print(f"\nwritten {out}, {out.with_suffix('.curve.json')}{picture_path}")


def print_widest_gap(row):
    """A prompt with its best and its worst candidate."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = prompt[-1]["content"]              # of the last turn
    on_one_line = " ".join(prompt.split())
    print(f"\nwidest gap   {on_one_line[:90]!r}")

    scores = row["scores"]
    for name, score in (("best ", max(scores)), ("worst", min(scores))):
        at = scores.index(score)
        candidate = row["candidates"][at]
        print(f"  {name} {score:+.2f}   {candidate[:90]!r}")
