"""What stage 4 shows besides figures: what the latents are, why A beat B, the pictures and the page.

    python 04_evaluate.py --run runs/demo                             report.html and the pictures
    python 04_evaluate.py --run runs/demo --explain ID                one pair of the run
    python 04_evaluate.py --run runs/demo --explain PROMPT A B        any two responses

A latent's row says where it fires, how much weight the head gives it, and what text lies furthest along its direction. That
is a description. Only an ablation (a score set to its mean) is an intervention, and one on the head's input only: what the
language model would have written or computed without the latent is not asked here.
"""

import base64
import importlib
import io
import json
from pathlib import Path

import torch

stage1 = importlib.import_module("01_extract")
TEMPLATE = Path(__file__).parent / "assets" / "report.html"
COLOURS = {"sparserm": "#2166ac", "dense": "#666666", "random_directions": "#b2182b", "random_latents": "#ef8a62",
           "activations": "#1b7837", "words": "#8073ac", "length": "#b08d57", "shuffled_labels": "#999999"}


# ---------------------------------------------------------------- what a latent is

def top_tokens(backbone, directions, count=8):
    """Logit lens: the tokens whose output logit each direction [m, d] raises most → list of lists of strings.

    The direction takes the place of the last block's output; what comes after (final norm, output matrix) is the model's own.
    """
    put = lambda block, args, out: (directions[:, None].to(out[0]), *out[1:]) if isinstance(out, tuple) else directions[:, None].to(out)
    with stage1.ONE_PASS, torch.inference_mode():
        hook = backbone.blocks[-1].register_forward_hook(put)
        try:
            ids = torch.zeros(len(directions), 1, dtype=torch.long, device=backbone.device)         # any token: nothing of it is left
            logits = backbone.model(input_ids=ids, use_cache=False).logits[:, 0]
        finally:
            hook.remove()
    return [[backbone.tokenizer.decode([i]) for i in row] for row in logits.topk(count).indices.tolist()]


def pieces(tokenizer, ids, first):
    """What each token from `first` on adds to the text → list of str. A character of several tokens comes with its last one."""
    found, start = [], max(0, first - 1)            # with the token before: alone, a token may lose its leading space
    for stop in range(first + 1, len(ids) + 1):
        new = tokenizer.decode(ids[start:stop])[len(tokenizer.decode(ids[start:first])):]
        whole = not new.endswith("\ufffd") or stop - first == 4
        found.append(new if whole else "")
        if whole:
            start, first = stop - 1, stop
    return found


def token_activations(backbone, sae, texts, layer, latents, last=0):
    """Rendered texts and the latents wanted of each → for each text [(token, [f_j of its latents])], from its response on.

    last: only so many tokens at the end (0: all); the SAE encodes no others.
    """
    found = [None] * len(texts)
    for members, (hidden,) in stage1.hidden_rows(backbone, [t.ids for t in texts], [layer]):
        for i, path in members:
            first = texts[i].first
            hidden_i = hidden[torch.from_numpy(path[first:][-last:])].float().cpu()
            values = torch.cat([sae.encode(part)[:, latents[i]] for part in hidden_i.split(256)]).tolist()      # 131k latents fit
            found[i] = [(piece, [round(v, 3) for v in row]) for piece, row in
                        zip(pieces(backbone.tokenizer, texts[i].ids, first)[-last:], values, strict=True)]
    return found


def extreme_texts(data, direction, count):
    """The `count` train responses furthest along a direction, and least → {highest, lowest: [(pair, side, score)]}."""
    train = (data.split == stage1.TRAIN).nonzero().flatten()
    scores = torch.stack([z[train] @ direction for z in data.z], 1).flatten()           # chosen, rejected, chosen …
    order, found = scores.argsort(descending=True, stable=True).tolist(), {}
    for name, ranked in (("highest", order), ("lowest", order[::-1])):
        rows = {}                                   # the same answer may stand in several pairs: once is enough
        for at in ranked:
            pair, side = data.pairs[int(train[at // 2])], ("chosen", "rejected")[at % 2]
            rows.setdefault((json.dumps(pair["prompt"]), pair[side]), (pair, side, float(scores[at])))
            if len(rows) == count:
                break
        found[name] = list(rows.values())
    return found


def with_heat(data, backbone, rows, last=60):
    """[(latent, pair, side, score)] → rows to show: each text's `last` tokens with the latent's activation there."""
    texts = [stage1.render(backbone.tokenizer, pair["prompt"], pair[side], data.meta["max_length"]) for _, pair, side, _ in rows]
    heat = token_activations(backbone, data.sae, texts, data.meta["layer"], [[j] for j, *_ in rows], last)
    return [{"id": pair["id"], "side": side, "score": score, "prompt": last_turn(pair["prompt"]),
             "heat": [[token, value] for token, (value,) in tokens]} for (_, pair, side, score), tokens in zip(rows, heat)]


def last_turn(prompt, most=300):
    """What to show of a prompt: its last turn, its last `most` characters."""
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"])[-most:]


def latent_rows(data, adds, backbone, intervals, texts, shown=20):
    """Kept latents → rows of evaluation.json, by falling part in telling train pairs apart; texts for the first `shown`.

    adds: that part, [2K]. intervals: (low, high) of the difference of the frequencies, on test. backbone: None for no tokens, texts.
    """
    latents = data.head["latents"].tolist()
    weights = data.head["w1"].tolist() if "w2" not in data.head else [None] * len(latents)
    tokens = top_tokens(backbone, data.head["directions"]) if backbone else [[]] * len(latents)
    page, rows = data.sae.info.get("neuronpedia"), []
    for n in adds.argsort(descending=True, stable=True).tolist():
        j = latents[n]
        rows.append({"latent": j, "side": "chosen" if n < len(latents) // 2 else "rejected", "weight": weights[n], "adds": float(adds[n]),
                     **{f: float(data.features[f][j]) for f in ("frequency_chosen", "frequency_rejected")},
                     "low": float(intervals[0][n]), "high": float(intervals[1][n]), "tokens": tokens[n], "texts": {},
                     "link": page and f"https://www.neuronpedia.org/{page}/{j}"})
        if backbone and texts and len(rows) <= shown:
            rows[-1]["texts"] = extreme_texts(data, data.head["directions"][n], texts)
    flat = [(row["latent"], *text) for row in rows for side in row["texts"].values() for text in side]
    heat = iter(with_heat(data, backbone, flat) if flat else [])            # all in one packed pass
    for row in rows:
        row["texts"] = {end: [next(heat) for _ in many] for end, many in row["texts"].items()}
    return rows


# ---------------------------------------------------------------- why A beat B

def pair_to_explain(data, words):
    """--explain: the id of a pair, or prompt, A, B → (prompt, A, B), names of A and B."""
    if len(words) == 1:
        pair = next((p for p in data.pairs if p["id"] == words[0]), None)
        if pair is None:
            raise stage1.UserError(f"no pair has this id · --explain {words[0]} · ids are in {data.run}/pairs.jsonl")
        return (pair["prompt"], pair["chosen"], pair["rejected"]), ("chosen", "rejected")
    if len(words) != 3:
        raise stage1.UserError(f"--explain takes an id, or a prompt and two responses · {len(words)} values · quote each of them")
    return words, ("A", "B")


def explain_pair(data, model, words, names, top=10):
    """`words`: prompt, A, B → prints what made the difference."""
    prompt, a, b = words
    texts = [model.render(prompt, response) for response in (a, b)]
    hidden = model.read(texts)
    reward, parts = model.reward_of(hidden), model.contributions(hidden)
    difference = parts[0] - parts[1]
    order = difference.abs().argsort(descending=True)[:top].tolist()
    latents = [int(data.head["latents"][n]) for n in order]
    probability = float(torch.sigmoid((reward[0] - reward[1]) / model.temperature))
    print(f"\nprompt   {last_turn(prompt)}")
    for name, response, r in zip(names, (a, b), reward.tolist()):
        print(f"{name:<8} {r:+.3f}   {' '.join(response.split())[:200]}")
    exact = "w2" not in model.head
    print(f"\n{names[0]} minus {names[1]}: {float(reward[0] - reward[1]):+.3f}, preferred with probability {probability:.2f}\n"
          f"{'all directions together add up to it exactly' if exact else 'each direction ablated by itself: these do not add up'}; "
          f"the {len(order)} largest of {len(difference)}:\n\n  latent  side       adds  of {names[0]:<9} of {names[1]:<9} fires on")
    fired = token_activations(model.backbone, data.sae, texts, data.meta["layer"], [latents, latents])
    for column, (n, j) in enumerate(zip(order, latents)):
        where = [" ".join(repr(token) for token, f in side if f[column] > 0)[:60] or "–" for side in fired]
        side = "chosen" if n < len(difference) // 2 else "rejected"
        print(f"  {j:>6}  {side:<8} {float(difference[n]):+.3f}   {float(parts[0, n]):+.3f}       {float(parts[1, n]):+.3f}       "
              f"{names[0]}: {where[0]}   {names[1]}: {where[1]}")


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
    with stage1.moved_into_place(path) as part:
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
    stage1.write_text(run / "report.html", page)
    return ["report.html", *(f"{name}.png" for name, image in images.items() if image)]
