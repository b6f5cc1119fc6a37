"""What stage 4 (and the curve of stage 5) shows: the table it prints and what it says in words, the pictures, the page.

    python 04_evaluate.py --run runs/demo                             report.html and the pictures
"""

import base64
import io
import json
import shlex
from pathlib import Path

from parts.files import moved_into_place, write_text

TEMPLATE = Path(__file__).parent / "report.html"
COLOURS = {"sparserm": "#2166ac", "dense": "#666666", "random_directions": "#b2182b", "random_latents": "#ef8a62",
           "activations": "#1b7837", "words": "#8073ac", "length": "#b08d57", "shuffled_labels": "#999999"}


# ---------------------------------------------------------------- pictures and page

def picture(draw, path):
    """Draw with matplotlib once → PNG file, and its bytes as base64 for the page. None where matplotlib is missing."""
    try:
        import matplotlib.figure
    except ImportError:
        return None
    figure = matplotlib.figure.Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    with moved_into_place(path) as part:
        part.write_bytes(buffer.getvalue())
    return base64.b64encode(buffer.getvalue()).decode()


def shown(name):
    """sparserm → SparseRM, random_latents → random latents."""
    return "SparseRM" if name == "sparserm" else name.replace("_", " ")


def accuracy_plot(axes, accuracy):
    """A dot and its interval: SparseRM on top, then the controls by accuracy. A ring where ties count half."""
    names = sorted(accuracy, key=lambda n: (n == "sparserm", accuracy[n]["accuracy"], n))
    for y, name in enumerate(names):
        row = accuracy[name]
        axes.plot([row["low"], row["high"]], [y, y], color=COLOURS[name], lw=3 if name == "sparserm" else 1.5)
        axes.plot(row["accuracy"], y, "o", color=COLOURS[name])
        if row["ties"] > 0.005:
            axes.plot(row["ties_half"], y, "o", color=COLOURS[name], mfc="none")
    axes.axvline(0.5, color="#bbbbbb", lw=1, ls=":")
    axes.set_yticks(range(len(names)), list(map(shown, names)))
    axes.set_xlabel("accuracy on test pairs, 95 % interval over prompts")


def curve_plot(axes, curve, label):
    """Accuracy against K or the number of train pairs, a band for SparseRM and for random directions. A tie counts half: a head
    that dev stopped before its first step says nothing, and is a coin, not always wrong."""
    for name in (n for n in COLOURS if n in curve):
        xs = sorted(map(int, curve[name]))
        rows = [curve[name][str(x)] for x in xs]
        axes.plot(xs, [r["ties_half"] for r in rows], "o-", ms=4, lw=2.5 if name == "sparserm" else 1.2, color=COLOURS[name],
                  label=shown(name))
        if name in ("sparserm", "random_directions"):
            axes.fill_between(xs, [r["half_low"] for r in rows], [r["half_high"] for r in rows], color=COLOURS[name], alpha=0.12, lw=0)
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
    axes.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", color=COLOURS["sparserm"])
    axes.set_xlabel("confidence")
    axes.set_ylabel("share right")


def best_of_plot(axes, curve):
    """Best-of-n of stage 5, {m: row}: with labels the mean label by reward, by an oracle and of a random pick; else the mean reward."""
    ms, labelled, blue = list(curve), "label" in curve[1], COLOURS["sparserm"]
    axes.plot(ms, [row["label" if labelled else "reward"] for row in curve.values()], "o-", color=blue, label="by the reward")
    if labelled:
        axes.plot(ms, [row["oracle"] for row in curve.values()], "s--", color=COLOURS["dense"], label="oracle")
        axes.axhline(curve[1]["label"], color="#bbbbbb", lw=1, ls=":", label="random pick")
        axes.legend(frameon=False, fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ms, [f"{m}\n{row['kl_bound']:.2f}" for m, row in curve.items()])
    axes.minorticks_off()
    axes.set_xlabel("best of m candidates; below: KL to the policy is at most … nats")
    axes.set_ylabel("mean label" if labelled else "mean reward")


def write_page(result, run):
    """Pictures and report.html of a run → names of the files written. The page asks nothing of the network."""
    run, curves = Path(run), result["curves"]
    drawings = {"accuracy": lambda axes: accuracy_plot(axes, result["accuracy"]),
                "reliability": lambda axes: reliability_plot(axes, result["calibration"])}
    for name, label in (("k", "K, directions a side"), ("pairs", "train pairs")):
        if name in curves:
            drawings[f"curve_{name}"] = lambda axes, name=name, label=label: curve_plot(axes, curves[name], label)
    for path in {run / f"{name}.png" for name in ("curve_k", "curve_pairs")} - {run / f"{name}.png" for name in drawings}:
        path.unlink(missing_ok=True)        # of an earlier evaluation with more sweeps
    images = {name: picture(draw, run / f"{name}.png") for name, draw in drawings.items()}
    if None in images.values():
        print("note: no pictures, matplotlib is missing: pip install matplotlib")
    data = json.dumps({"evaluation": result, "images": {n: i for n, i in images.items() if i}}, sort_keys=True, ensure_ascii=False)
    page = TEMPLATE.read_text("utf-8").replace("__DATA__", data.replace("<", "\\u003c"))        # no </script> can end it
    write_text(run / "report.html", page)
    return ["report.html", *(f"{name}.png" for name, image in images.items() if image)]


# ---------------------------------------------------------------- in words

SAYS = {"random_directions": "on this data, at this K, the SAE's choice of directions adds nothing measurable",
        "random_latents": "which latents are taken makes no measurable difference on this data, at this K",
        "activations": "projecting the hidden state is not measurably better than reading the SAE's activations",
        "words": "not shown to tell more than the wording alone",
        "length": "not shown to tell more than the length alone",
        "shuffled_labels": "not shown to do better than with shuffled labels"}


def in_words(result, sae_warnings):
    """What a reader should not overlook → list of sentences."""
    found = [f"{name.replace('_', ' ')} ({row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]): {SAYS[name]}"
             for name, row in result["differences"].items() if name in SAYS and row["low"] <= 0 <= row["high"]]
    found += [f"{name.replace('_', ' ')} ({row['mean']:+.3f}): measurably better than SparseRM here"
              for name, row in result["differences"].items() if row["high"] < 0]
    accuracy = result["accuracy"]
    if accuracy["sparserm"]["low"] <= 0.5:
        found.insert(0, "the interval of SparseRM's own accuracy reaches down to one half: no better than a coin is not ruled out")
    if accuracy["sparserm"]["n"] < 50:
        found.insert(0, f"only {accuracy['sparserm']['n']} test pairs: even a large difference between two rows may be chance")
    if accuracy["shuffled_labels"]["low"] > 0.5:
        found.insert(0, "with shuffled labels the method is right more than half the time: test pairs leak into training, look for it")
    if accuracy["words"]["high"] < 0.5:
        found.append("words: below one half, so the lead over them looks larger than it is")
    return found + [f"SAE: {w}" for w in sae_warnings]


def accuracy_lines(what, rows):
    """{name: summary, of a control with `behind`} → lines: SparseRM, then the controls by accuracy."""
    yield f"\n{what} on {rows['sparserm']['n']} test pairs of {rows['sparserm']['groups']} prompts".ljust(54) + "SparseRM minus it"
    for name in sorted(rows, key=lambda n: ("behind" in rows[n], -rows[n]["accuracy"])):
        row = rows[name]
        yield (f"  {name:<18} {row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]"
               + ("   {mean:+.3f}  [{low:+.3f}, {high:+.3f}]".format(**row["behind"]) if "behind" in row else "")
               + (f"   ties {row['ties']:.1%}, as half {row['ties_half']:.3f}" if row["ties"] > 0.005 else ""))


def print_report(run, result, written):
    """The table at the end, and in words what it says."""
    a, d = result["accuracy"], result["differences"]
    print(*accuracy_lines("accuracy", {n: row | ({"behind": d[n]} if n in d else {}) for n, row in a.items()}), sep="\n")
    if "k" in result["curves"]:
        curve = result["curves"]["k"]
        ks = sorted(curve["sparserm"], key=int)
        print("\n  K a side, ties half" + "".join(f"{k:>7}" for k in ks))
        for name in ("sparserm", "random_directions", "random_latents", "activations", "dense"):
            print(f"  {name:<18} " + "".join(f"{curve[name][k]['ties_half']:>7.3f}" for k in ks))
        clear = [k for k in ks if curve["random_directions"][k]["behind"]["low"] > 0]
        print(f"  clearly above random directions at K = {', '.join(clear)} (each K by itself)" if clear else
              "  at no K clearly above random directions: on this data the SAE's choice adds nothing measurable")
    for name, row in result["other"].items():
        print(*accuracy_lines(f"{name}: the same heads", {"sparserm": row, **row["controls"]}), sep="\n")
    c, n = result["calibration"], result["length"]
    print(f"\ncalibration  T {c['temperature']:.2f} · NLL {c['nll']:.3f} · Brier {c['brier']:.3f} · ECE {c['ece']:.3f}"
          f"\nlength       correlation with the reward {n['correlation']:+.2f}"
          f"\nparameters   {result['cost']['trained_parameters']:,} trained (K = {a['sparserm']['choice']} a side), "
          f"{result['cost']['share']:.1e} of the backbone"
          f"\nselection    {result['stability']['mean']:.0%} of the latents are chosen again on resampled train prompts "
          f"(by chance {result['stability']['chance']:.0%})"
          f"\nwritten      {run}/evaluation.json, {', '.join(written)}")
    for text in result["warnings"]:
        print("note:", text)
    print(f"\nnext: open {run}/report.html in a browser"
          f"\n      python 04_evaluate.py --run {run} --explain {shlex.quote(result['wrong'][0]['id']) if result['wrong'] else 'ID'}"
          f"\n      python 05_best_of_n.py sample --prompts data/prompts.jsonl --reward {run}/reward_head.safetensors")


def print_curve(out, result, rows, top, drawn):
    """The best-of-n curve of stage 5 and the prompt whose candidates are furthest apart. top: mean label of the top-ranked and of a
    random candidate, where there are labels."""
    print(f"\n{result['prompts']} prompts with up to {result['n']} candidates; expectation over all subsets of m"
          + ("" if top else " (without labels the curve rises by its making)")
          + "\n  best of m   prompts     reward   KL at most" + ("    label   oracle" if top else ""))
    for m, row in result["curve"].items():
        labelled = f"   {row['label']:.3f}    {row['oracle']:.3f}" if "label" in row else ""
        print(f"  {m:>9}   {row['prompts']:>7}   {row['reward']:>8.3f}   {row['kl_bound']:>10.2f}{labelled}")
    if top:
        print("\nmean label   top-ranked {:.3f} · random pick {:.3f}".format(*top))
    best = max(rows, key=lambda r: max(r["scores"]) - min(r["scores"]))
    prompt = best["prompt"] if isinstance(best["prompt"], str) else best["prompt"][-1]["content"]
    print(f"\nwidest gap   {' '.join(prompt.split())[:90]!r}"
          f"\n  best  {max(best['scores']):+.2f}   {best['candidates'][best['scores'].index(max(best['scores']))][:90]!r}"
          f"\n  worst {min(best['scores']):+.2f}   {best['candidates'][best['scores'].index(min(best['scores']))][:90]!r}"
          f"\n\nwritten {out}, {out.with_suffix('.curve.json')}" + (f", {out.with_suffix('.curve.png')}" if drawn else ""))
