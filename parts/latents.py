"""The texts that stage 4 shows: what a head's latents are, why one answer scores higher.

    python 04_evaluate.py --run runs/demo --explain ID                one pair of the run
    python 04_evaluate.py --run runs/demo --explain PROMPT A B        any two responses

A latent's row says where it fires, how much weight the head gives it, and what text lies furthest
along its direction. That is a description. Only an ablation (a score set to its mean) is an
intervention, and one on the head's input only: what the language model would have written or
computed without the latent is not asked here.
"""

import json
import math

import numpy as np
import torch

from parts.chat import render
from parts.files import UserError
from parts.models import check_weights

TEST = 2            # how pairs.jsonl's splits are numbered in the files

# ---------------------------------------------------------------- activations and tokens

def latent_activations(sae, z, latents):
    """f_j(z) of some latents, [n, len(latents)]."""
    return torch.cat([sae.encode(part)[:, latents] for part in z.split(1024)])


def top_tokens(backbone, directions, count=8):
    """Logit lens: directions [m, d] → the tokens whose logit each raises most, lists of strings.

    The direction takes the place of the last block's output; what comes after (final norm, output
    matrix) is the model's own. Where its checkpoint lacks that: no tokens, and a note.
    """
    try:
        check_weights(backbone)
    except UserError as error:
        print(f"note: no tokens are shown for the latents: {error}")
        return [[]] * len(directions)

    def put_direction(block, args, output):
        if isinstance(output, tuple):
            return (directions[:, None].to(output[0]), *output[1:])
        return directions[:, None].to(output)

    # any token will do: the hook replaces all that comes of it
    any_token = torch.zeros(len(directions), 1, dtype=torch.long, device=backbone.device)
    with backbone.one_pass, torch.inference_mode():
        hook = backbone.blocks[-1].register_forward_hook(put_direction)
        try:
            logits = backbone.model(input_ids=any_token, use_cache=False).logits[:, 0]
        finally:
            hook.remove()

    found = []
    for best in logits.topk(count).indices.tolist():
        found.append([backbone.tokenizer.decode([token]) for token in best])
    return found


def pieces(tokenizer, ids, first):
    """What each token from `first` on adds to the text → list of str.

    A character of several tokens comes with its last one.
    """
    found = []
    start = max(0, first - 1)   # with the token before: alone, a token may lose its leading space
    for stop in range(first + 1, len(ids) + 1):
        before = tokenizer.decode(ids[start:first])
        new = tokenizer.decode(ids[start:stop])[len(before):]
        # \ufffd: a part of a character, which has at most four bytes
        whole = not new.endswith("\ufffd") or stop - first == 4
        found.append(new if whole else "")
        if whole:
            start = stop - 1
            first = stop
    return found


def token_activations(backbone, sae, texts, layer, latents, last=0):
    """Rendered texts and the latents wanted of each → for each [(token, [f_j of its latents])].

    The tokens from its response on. last: only so many at the end (0: all); the SAE encodes no
    others.
    """
    found = [None] * len(texts)
    for members, (hidden,) in backbone.hidden_rows([text.ids for text in texts], [layer]):
        for index, places in members:
            text = texts[index]
            shown = places[text.first:][-last:]
            z = hidden[torch.from_numpy(shown)].float().cpu()
            parts = z.split(256)            # 131k latents of so many tokens fit into memory
            values = [sae.encode(part)[:, latents[index]] for part in parts]
            tokens = pieces(backbone.tokenizer, text.ids, text.first)[-last:]
            found[index] = []
            for token, row in zip(tokens, torch.cat(values).tolist(), strict=True):
                found[index].append((token, [round(f, 3) for f in row]))
    return found


# ---------------------------------------------------------------- the rows of the report

def last_turn(prompt, most=300):
    """What to show of a prompt: its last turn, its last `most` characters."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text[-most:]


def extreme_texts(data, direction, count):
    """The `count` responses furthest along a direction, and least → {highest, lowest}.

    Of the train pairs; each a list of (pair, side, score).
    """
    train = (data.split != TEST).nonzero().flatten()
    by_side = [z[train] @ direction for z in data.z]
    scores = torch.stack(by_side, 1).flatten()      # chosen, rejected, chosen …
    order = scores.argsort(descending=True, stable=True).tolist()
    return {"highest": first_different(data, train, scores, order, count),
            "lowest": first_different(data, train, scores, order[::-1], count)}


def first_different(data, train, scores, order, count):
    """The first `count` different responses in this order → [(pair, side, score)].

    One answer may stand in several pairs.
    """
    rows = {}
    for at in order:
        pair = data.pairs[int(train[at // 2])]
        side = ("chosen", "rejected")[at % 2]
        rows.setdefault((json.dumps(pair["prompt"]), pair[side]), (pair, side, float(scores[at])))
        if len(rows) == count:
            break
    return list(rows.values())


def with_heat(data, backbone, rows, last=60):
    """[(latent, pair, side, score)] → rows to show, with the latent's activation at each token.

    last: how many tokens of each text, from its end.
    """
    max_length = data.meta["max_length"]
    texts = []
    latents = []
    for latent, pair, side, _ in rows:
        texts.append(render(backbone.tokenizer, pair["prompt"], pair[side], max_length))
        latents.append([latent])
    activations = token_activations(backbone, data.sae, texts, data.meta["layer"], latents, last)
    found = []
    for (_, pair, side, score), tokens in zip(rows, activations):
        heat = [[token, value] for token, (value,) in tokens]
        found.append({"id": pair["id"], "side": side, "score": score,
                      "prompt": last_turn(pair["prompt"]), "heat": heat})
    return found


def latent_rows(data, head, adds, backbone, intervals, texts, shown=20):
    """Kept latents → rows of evaluation.json, by falling part in telling train pairs apart.

    adds: that part, [2K]. intervals: (low, high) of each difference of the frequencies, on test.
    backbone: None for no tokens and texts. texts: how many at either end, for the first `shown`.
    """
    latents = data.head["latents"].tolist()
    weights = head.w1.tolist() if head.kind == "linear" else [None] * len(latents)
    tokens = top_tokens(backbone, data.head["directions"]) if backbone else [[]] * len(latents)
    page = data.sae.info.get("neuronpedia")
    rows = []
    for n in adds.argsort(descending=True, stable=True).tolist():
        latent = latents[n]
        rows.append({
            "latent": latent,
            "side": "chosen" if n < len(latents) // 2 else "rejected",
            "weight": weights[n],
            "adds": float(adds[n]),
            "frequency_chosen": float(data.features["frequency_chosen"][latent]),
            "frequency_rejected": float(data.features["frequency_rejected"][latent]),
            "low": intervals[n][0],
            "high": intervals[n][1],
            "tokens": tokens[n],
            "texts": {},
            "link": page and f"https://www.neuronpedia.org/{page}/{latent}",
        })
        if backbone and texts and len(rows) <= shown:
            rows[-1]["texts"] = extreme_texts(data, data.head["directions"][n], texts)
    add_heat(data, backbone, rows)
    return rows


def add_heat(data, backbone, rows):
    """Replace the texts of all rows by what is shown of them; all are read together."""
    wanted = []
    for row in rows:
        for many in row["texts"].values():
            wanted.extend((row["latent"], *text) for text in many)
    heat = with_heat(data, backbone, wanted) if wanted else []

    done = 0
    for row in rows:
        for end, many in row["texts"].items():
            row["texts"][end] = heat[done:done + len(many)]
            done += len(many)


def most_wrong(data, differences, count=10):
    """The test pairs ranked wrong with the greatest confidence → list of dict.

    differences: r_chosen - r_rejected of the test pairs.
    """
    temperature = float(data.head["temperature"])
    test_rows = (data.split == TEST).nonzero().flatten().tolist()
    found = []
    for n in np.argsort(differences, kind="stable")[:count]:
        if differences[n] < 0:
            pair = data.pairs[test_rows[n]]
            found.append({
                "id": pair["id"],
                "difference": float(differences[n]),
                "confidence": float(1 / (1 + math.exp(differences[n] / temperature))),
                "prompt": last_turn(pair["prompt"]),
                "chosen": pair["chosen"][:600],
                "rejected": pair["rejected"][:600],
            })
    return found


# ---------------------------------------------------------------- why A beat B

def pair_to_explain(data, words):
    """--explain: the id of a pair, or prompt, A, B → (prompt, A, B), names of A and B."""
    if len(words) == 1:
        for pair in data.pairs:
            if pair["id"] == words[0]:
                return (pair["prompt"], pair["chosen"], pair["rejected"]), ("chosen", "rejected")
        raise UserError(f"no pair has this id · --explain {words[0]} · "
                        f"ids are in {data.run}/pairs.jsonl")
    if len(words) != 3:
        raise UserError("--explain takes an id, or a prompt and two responses · "
                        f"{len(words)} values · quote each of them")
    return words, ("A", "B")


def explain_pair(data, model, words, names, top=10):
    """`words`: prompt, A, B → prints what made the difference."""
    prompt, a, b = words
    texts = [model.render(prompt, response) for response in (a, b)]
    hidden = model.read(texts)                          # [2, d]
    rewards = model.reward_of(hidden).tolist()
    parts = model.contributions(hidden)                 # [2, 2K]
    difference = parts[0] - parts[1]
    order = difference.abs().argsort(descending=True)[:top].tolist()
    latents = [int(data.head["latents"][n]) for n in order]
    layer = data.meta["layer"]
    fired = token_activations(model.backbone, data.sae, texts, layer, [latents, latents])

    print(f"\nprompt   {last_turn(prompt)}")
    for name, response, reward in zip(names, (a, b), rewards):
        print(f"{name:<8} {reward:+.3f}   {' '.join(response.split())[:200]}")

    for name, is_outside in zip(names, model.outside(hidden).tolist()):
        if is_outside:
            print(f"note: {name} lies outside of what training saw: its reward is a guess")

    margin = rewards[0] - rewards[1]
    probability = float(torch.sigmoid(torch.tensor(margin / model.temperature)))
    adds_up = "each direction ablated by itself: these do not add up"
    if model.head.kind == "linear":
        adds_up = "all directions together add up to it exactly"
    print(f"\n{names[0]} minus {names[1]}: {margin:+.3f}, "
          f"preferred with probability {probability:.2f}")
    print(f"{adds_up}; the {len(order)} largest of {len(difference)}:")
    print(f"\n  latent  side       adds  of {names[0]:<9} of {names[1]:<9} fires on")
    for column, (n, latent) in enumerate(zip(order, latents)):
        side = "chosen" if n < len(difference) // 2 else "rejected"
        where = [tokens_that_fire(tokens, column) for tokens in fired]
        adds, of_a, of_b = float(difference[n]), float(parts[0, n]), float(parts[1, n])
        print(f"  {latent:>6}  {side:<8} {adds:+.3f}   {of_a:+.3f}       {of_b:+.3f}       "
              f"{names[0]}: {where[0]}   {names[1]}: {where[1]}")


def tokens_that_fire(tokens, column):
    """The tokens of a text on which one of the latents fires → str of at most 60 characters."""
    fired = [repr(token) for token, values in tokens if values[column] > 0]
    return " ".join(fired)[:60] or "–"
