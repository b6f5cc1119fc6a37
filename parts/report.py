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

TEMPLATE = Path(__file__).parent / "report.html"
COLOURS = {"sparserm": "#2166ac", "dense": "#666666", "random_directions": "#b2182b",
           "random_latents": "#ef8a62",
           "activations": "#1b7837", "words": "#8073ac", "length": "#b08d57",
           "shuffled_labels": "#999999"}
SOME_TIES = 0.005       # a smaller share of ties is not worth a mark


# ---------------------------------------------------------------- pictures

def picture(path, draw, *what):
    """draw(axes, *what) → a PNG file and its bytes as base64; None without matplotlib."""
    try:
        import matplotlib.figure
    except ImportError:
        return None
    figure = matplotlib.figure.Figure(figsize=(5.5, 3.2), layout="constrained")
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
    axes.set_xlabel("accuracy on test pairs, 95 % interval over prompts")


def curve_plot(axes, curve, label):
    """Accuracy against K or the number of train pairs, a band for SparseRM and for random
    directions.

    A tie counts half: a head that dev stopped before its first step says nothing, and is a coin,
    not always wrong.
    """
    for name in COLOURS:
        if name not in curve:
            continue
        xs = sorted(int(x) for x in curve[name])
        rows = [curve[name][str(x)] for x in xs]
        colour = COLOURS[name]
        width = 2.5 if name == "sparserm" else 1.2
        axes.plot(xs, [row["ties_half"] for row in rows], "o-", ms=4, lw=width, color=colour,
                  label=shown(name))
        if name in ("sparserm", "random_directions"):
            low = [row["half_low"] for row in rows]
            high = [row["half_high"] for row in rows]
            axes.fill_between(xs, low, high, color=colour, alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, a tie as half")
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


def write_page(result, run):
    """Pictures and report.html of a run → names of the files written."""
    run = Path(run)
    images = {
        "accuracy": picture(run / "accuracy.png", accuracy_plot, result["accuracy"]),
        "reliability": picture(run / "reliability.png", reliability_plot, result["calibration"]),
    }
    for name, label in CURVES.items():
        path = run / f"curve_{name}.png"
        if name in result["curves"]:
            images[path.stem] = picture(path, curve_plot, result["curves"][name], label)
        else:
            path.unlink(missing_ok=True)        # of an earlier evaluation with more sweeps
    images = {name: image for name, image in images.items() if image}
    if not images:
        print("note: no pictures, matplotlib is missing: pip install matplotlib")

    data = json.dumps({"evaluation": result, "images": images}, sort_keys=True, ensure_ascii=False)
    data = data.replace("<", "\\u003c")         # no </script> within it can end the script
    write_text(run / "report.html", TEMPLATE.read_text("utf-8").replace("__DATA__", data))
    return ["report.html", *(f"{name}.png" for name in images)]


# ---------------------------------------------------------------- in words

SAYS = {"random_directions": "on this data, at this K, the SAE's choice of directions adds nothing "
                             "measurable",
        "random_latents": "which latents are taken makes no measurable difference on this data, at "
                          "this K",
        "activations": "projecting the hidden state is not measurably better than reading the "
                       "SAE's activations",
        "words": "not shown to tell more than the wording alone",
        "length": "not shown to tell more than the length alone",
        "shuffled_labels": "not shown to do better than with shuffled labels"}


def in_words(result, sae_warnings):
    """What a reader should not overlook → list of sentences."""
    accuracy = result["accuracy"]
    ours = accuracy["sparserm"]
    found = []
    if accuracy["shuffled_labels"]["low"] > 0.5:
        found.append("with shuffled labels the method is right more than half the time: test pairs "
                     "leak into training, look for it")
    if ours["n"] < 50:
        found.append(f"only {ours['n']} test pairs: even a large difference between two rows may "
                     "be chance")
    if ours["low"] <= 0.5:
        found.append("the interval of SparseRM's own accuracy reaches down to one half: no better "
                     "than a coin is not ruled out")

    for name, row in result["differences"].items():
        if name in SAYS and row["low"] <= 0 <= row["high"]:
            interval = f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            found.append(f"{name.replace('_', ' ')} ({interval}): {SAYS[name]}")
    for name, row in result["differences"].items():
        if row["high"] < 0:
            found.append(f"{name.replace('_', ' ')} ({row['mean']:+.3f}): measurably better than "
                         "SparseRM here")
    if accuracy["words"]["high"] < 0.5:
        found.append("words: below one half, so the lead over them looks larger than it is")
    return found + [f"SAE: {warning}" for warning in sae_warnings]


# ---------------------------------------------------------------- what the stages print

def print_accuracy(what, rows):
    """Print {name: summary[, `behind`]} as a table: SparseRM, then the controls by accuracy."""
    ours = rows["sparserm"]
    title = f"{what} on {ours['n']} test pairs of {ours['groups']} prompts"
    print()
    print(f"{title:<53}SparseRM minus it")
    for name in sorted(rows, key=lambda name: ("behind" in rows[name], -rows[name]["accuracy"])):
        row = rows[name]
        line = f"  {name:<18} {row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]"
        if "behind" in row:
            line += "   {mean:+.3f}  [{low:+.3f}, {high:+.3f}]".format(**row["behind"])
        if row["ties"] > SOME_TIES:
            line += f"   ties {row['ties']:.1%}, as half {row['ties_half']:.3f}"
        print(line)


def print_k_curve(curve):
    """Accuracy by K, and where SparseRM is above random directions."""
    ks = sorted(curve["sparserm"], key=int)
    print("\n  K a side, ties half" + "".join(f"{k:>7}" for k in ks))
    for name in ("sparserm", "random_directions", "random_latents", "activations", "dense"):
        print(f"  {name:<18} " + "".join(f"{curve[name][k]['ties_half']:>7.3f}" for k in ks))
    clear = [k for k in ks if curve["random_directions"][k]["behind"]["low"] > 0]
    if clear:
        print(f"  clearly above random directions at K = {', '.join(clear)} (each K by itself)")
    else:
        print("  at no K clearly above random directions: on this data the SAE's choice adds "
              "nothing measurable")


def print_report(run, result, written):
    """The table at the end, and in words what it says."""
    rows = {}
    for name, row in result["accuracy"].items():
        behind = {"behind": result["differences"][name]} if name in result["differences"] else {}
        rows[name] = row | behind
    print_accuracy("accuracy", rows)
    if "k" in result["curves"]:
        print_k_curve(result["curves"]["k"])
    for name, row in result["other"].items():
        print_accuracy(f"{name}: the same heads", {"sparserm": row, **row["controls"]})

    c, cost, stability = result["calibration"], result["cost"], result["stability"]
    print(f"\ncalibration  T {c['temperature']:.2f} · NLL {c['nll']:.3f} · Brier {c['brier']:.3f} "
          f"· ECE {c['ece']:.3f}")
    print(f"length       correlation with the reward {result['length']['correlation']:+.2f}")
    print(f"parameters   {cost['trained_parameters']:,} trained (K = "
          f"{result['accuracy']['sparserm']['choice']} a side), "
          f"{cost['share']:.1e} of the backbone")
    print(f"selection    {stability['mean']:.0%} of the latents are chosen again on resampled "
          "train prompts "
          f"(by chance {stability['chance']:.0%})")
    print(f"written      {run}/evaluation.json, {', '.join(written)}")
    for text in result["warnings"]:
        print("note:", text)

    example = shlex.quote(result["wrong"][0]["id"]) if result["wrong"] else "ID"
    print(f"\nnext: open {run}/report.html in a browser")
    print(f"      python 04_evaluate.py --run {run} --explain {example}")
    print("      python 05_best_of_n.py sample --prompts data/prompts.jsonl --reward "
          f"{run}/reward_head.safetensors")


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
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    print(f"\nwidest gap   {' '.join(prompt.split())[:90]!r}")
    for name, score in (("best ", max(row["scores"])), ("worst", min(row["scores"]))):
        candidate = row["candidates"][row["scores"].index(score)]
        print(f"  {name} {score:+.2f}   {candidate[:90]!r}")
