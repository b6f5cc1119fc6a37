"""What the latents are, whether they are worth believing, and why A beat B. For stage 4.

    python 04_evaluate.py --run runs/demo --explain ID                one pair of the run
    python 04_evaluate.py --run runs/demo --explain PROMPT A B        any two responses

A latent's row says where it fires, how much weight the head gives it, and what text lies furthest along its direction. That
is a description. Only an ablation (a score set to its mean) is an intervention, and one on the head's input only: what the
language model would have written or computed without the latent is not asked here.
"""

import importlib
import json
import math

import numpy as np
import torch
import torch.nn.functional as F

from parts.chat import render
from parts.files import UserError

stage1, stage2 = (importlib.import_module(n) for n in ("01_extract", "02_select_features"))
TRAIN, TEST = stage1.TRAIN, stage1.TEST


# ---------------------------------------------------------------- what a latent is

def latent_activations(sae, z, latents):
    """f_j(z) of some latents, [n, len(latents)]."""
    return torch.cat([sae.encode(part)[:, latents] for part in z.split(1024)])


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
    train = (data.split == TRAIN).nonzero().flatten()
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
    texts = [render(backbone.tokenizer, pair["prompt"], pair[side], data.meta["max_length"]) for _, pair, side, _ in rows]
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


# ---------------------------------------------------------------- are they worth believing

def bootstrap_weights(groups, draws, seed=0):
    """How often each row comes in each draw of groups with replacement → [draws, n] float32."""
    _, inverse = np.unique(groups, return_inverse=True)
    rng, count = np.random.default_rng(seed), inverse.max() + 1
    drawn = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(draws)])
    return torch.from_numpy(drawn[:, inverse].astype(np.float32))


def resampled_selection(data, draws=20):
    """Select again on bootstrap resamples of the train prompts → {k, draws, mean, least, chance}.

    mean, least: the share of the head's latents that are chosen again. chance: the same share where the two sides of every pair
    are swapped at random before all selecting, so that nothing separates them: few living latents are chosen again by chance too.
    """
    rows, k = (data.split == TRAIN).nonzero().flatten(), len(data.head["latents"]) // 2
    weights = bootstrap_weights(data.group[rows.numpy()], draws)
    sign = torch.where(torch.rand(len(rows), generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    found = {}
    for name, signs in (("true", torch.ones_like(sign)), ("chance", sign)):
        total = torch.zeros(1 + draws, data.sae.d_sae)                  # the first row: all pairs once
        for at in torch.arange(len(rows)).split(max(1, 2**25 // data.sae.d_sae)):
            fires = [(data.sae.encode(z[rows[at]]) > 0).float() for z in data.z]
            total += torch.cat([torch.ones(1, len(at)), weights[:, at]]) @ ((fires[0] - fires[1]) * signs[at, None])
        first, *again = (stage2.select_latents(row, torch.zeros_like(row), k).chunk(2) for row in total)
        found[name] = [sum(len(np.intersect1d(a, b)) for a, b in zip(first, other)) / (2 * k) for other in again]
    return {"k": k, "draws": draws, "mean": float(np.mean(found["true"])), "least": float(min(found["true"])),
            "chance": float(np.mean(found["chance"]))}


def separation_on_test(data, draws=2000):
    """Interval of μ_c - μ_r of the head's latents on the *test* pairs → (low, high) [2K'] each.

    On train it would be too narrow: the latents were chosen there for that difference.
    """
    test = data.split == TEST
    fires = [latent_activations(data.sae, z[test], data.head["latents"]) > 0 for z in data.z]
    drawn = bootstrap_weights(data.group[test.numpy()], draws)
    return np.quantile((drawn @ (fires[0].float() - fires[1].float()) / drawn.sum(1, keepdim=True)).numpy(), (0.025, 0.975), axis=0)


def train_shares(data, model):
    """What each direction adds to chosen minus rejected on train, on average; and its |weight| (MLP: the mean size of its
    ablation) → [2K] torch, [2K] numpy."""
    parts = [model.contributions(z[data.split == TRAIN]) for z in data.z]
    weight = torch.cat(parts).abs().mean(0) if "w2" in model.head else model.head["w1"].abs()
    return (parts[0] - parts[1]).mean(0), weight.numpy()


# ---------------------------------------------------------------- why A beat B

def pair_to_explain(data, words):
    """--explain: the id of a pair, or prompt, A, B → (prompt, A, B), names of A and B."""
    if len(words) == 1:
        pair = next((p for p in data.pairs if p["id"] == words[0]), None)
        if pair is None:
            raise UserError(f"no pair has this id · --explain {words[0]} · ids are in {data.run}/pairs.jsonl")
        return (pair["prompt"], pair["chosen"], pair["rejected"]), ("chosen", "rejected")
    if len(words) != 3:
        raise UserError(f"--explain takes an id, or a prompt and two responses · {len(words)} values · quote each of them")
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


def fold(data, model, dense):
    """A linear head is one vector u of the residual stream: its cosine to the mean of chosen minus rejected on train, and to the
    vector of the dense control's head."""
    if "w2" in model.head:
        return None
    train, (u, _) = data.split == TRAIN, model.vector()
    cosine = lambda other: float(F.cosine_similarity(u, other, 0))
    return {"norm": float(u.norm()), "cosine_mean_difference": cosine((data.z[0][train] - data.z[1][train]).mean(0)),
            "cosine_dense": cosine(dense["w1"] / dense["std"])}


def most_wrong(data, difference, count=10):
    """The test pairs ranked wrong with the greatest confidence."""
    rows = (data.split == TEST).nonzero().flatten().tolist()
    wrong = [n for n in np.argsort(difference, kind="stable")[:count] if difference[n] < 0]
    return [{"id": data.pairs[rows[n]]["id"], "difference": float(difference[n]),
             "confidence": float(1 / (1 + math.exp(difference[n] / float(data.head["temperature"])))),
             "prompt": last_turn(data.pairs[rows[n]]["prompt"]),
             **{side: data.pairs[rows[n]][side][:600] for side in ("chosen", "rejected")}} for n in wrong]
