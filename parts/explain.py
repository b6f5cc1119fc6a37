"""Why one answer scores higher than another: what its tokens and what the directions add.

    python 04_evaluate.py --run runs/demo-safe --explain ID               one pair of the run
    python 04_evaluate.py --run runs/demo-safe --explain PROMPT A B       any two responses

With token rule `mean` and a linear head the reward is a sum over the tokens, so each token's part
is exact. But the head was trained on means of whole responses, never on a single token: a part says
where a reward came from, not what the model would think of that word alone. And what is added is a
description. Whether a direction causes a text is another question (benchmarks/steer.py).
"""

import os
import sys

import torch

from parts.files import UserError
from parts.latents import last_turn, latent_activations, pieces, side_of

LARGEST = 10        # directions listed


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


def explain_pair(data, model, words, names, top=LARGEST):
    """`words`: prompt, A, B → prints what made the difference. top: directions listed."""
    prompt, a, b = words
    texts = [model.render(prompt, response) for response in (a, b)]
    hidden = model.read(texts)                          # [2, d]
    rewards = model.reward_of(hidden).tolist()

    print(f"\nprompt   {last_turn(prompt)}")
    for name, response, reward in zip(names, (a, b), rewards):
        print(f"{name:<8} {reward:+.3f}   {' '.join(response.split())[:200]}")
    for name, is_outside in zip(names, model.outside(hidden).tolist()):
        if is_outside:
            print(f"note: {name} lies outside of what training saw: its reward is a guess")

    margin = rewards[0] - rewards[1]
    probability = float(torch.sigmoid(torch.tensor(margin / model.temperature)))
    print(f"\n{names[0]} minus {names[1]}: {margin:+.3f}, "
          f"preferred with probability {probability:.2f}")
    if model.reads_tokens():
        print_tokens(model, prompt, (a, b), names)
    print_directions(data, model, texts, model.contributions(hidden), names, top)


# ---------------------------------------------------------------- token by token

def print_tokens(model, prompt, responses, names):
    """Each token's exact part of the reward: shaded in a terminal with colours, else in numbers."""
    readings = [model.tokens(prompt, response) for response in responses]
    largest = max(abs(part) for found in readings for part in found["parts"])
    for name, found in zip(names, readings):
        print(f"\n{name}: each token's part of the reward {found['reward']:+.3f} "
              f"(the parts and the bias {found['bias']:+.3f} add up to it)")
        if has_colours():
            print("  " + shaded(found, largest))
        else:
            print("  " + " · ".join(f"{token.strip() or repr(token)} {part:+.2f}"
                                    for token, part in zip(found["tokens"], found["parts"])))


def has_colours():
    """Is this a terminal that shows them? (https://no-color.org)"""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get(
        "TERM", "dumb") != "dumb"


def shaded(found, largest):
    """Tokens on green where they raise the reward, on red where they lower it."""
    shades = []
    for token, part in zip(found["tokens"], found["parts"]):
        strength = int(3 * abs(part) / largest + 0.5) if largest else 0
        # of the 216 colours 16 + 36 red + 6 green + blue, each from 0 to 5
        colour = 16 + (6 if part > 0 else 36) * strength
        shades.append(f"\033[48;5;{colour}m\033[97m{token}\033[0m" if strength else token)
    return "".join(shades).replace("\n", " ")


# ---------------------------------------------------------------- direction by direction

def print_directions(data, model, texts, parts, names, top):
    """The directions whose latent fires in one of the texts, the largest first; the rest summed."""
    difference = parts[0] - parts[1]                            # [2K]
    fired = [fired_tokens(model, data.sae, text) for text in texts]
    fires = torch.tensor([bool(fired[0][n] or fired[1][n]) for n in range(len(difference))])
    order = difference.abs().argsort(descending=True).tolist()
    shown = [n for n in order if fires[n]][:top]
    others = [n for n in order if fires[n] and n not in shown]
    silent = [n for n in order if not fires[n]]

    if model.head.kind == "linear":
        print(f"\nthe {len(shown)} directions that add most, of those whose latent fires in "
              f"{names[0]} or {names[1]}; with the last lines the column adds up:")
    else:
        print("\neach direction ablated by itself: these do not add up")
    print(f"  latent  side       adds  of {names[0]:<9} of {names[1]:<9} fires on")
    for n in shown:
        latent = int(data.head["latents"][n])
        side = side_of(n, len(difference))
        where = [f"{name}: {in_short(of_text[n])}" for name, of_text in zip(names, fired)]
        own_name = model.names.get(latent, {}).get("name")
        if own_name:
            where.append(own_name)
        print(f"  {latent:>6}  {side:<8} {difference[n]:+.3f}   {parts[0, n]:+.3f}       "
              f"{parts[1, n]:+.3f}       {'   '.join(where)}")
    if model.head.kind == "linear":
        for rest, what in ((others, "more that fire"), (silent, "whose latent fires in neither")):
            print(f"  {len(rest):>6}  {what:<27} {float(difference[rest].sum()):+.3f}")
        print(f"  {'':>6}  {'all together':<27} {float(difference.sum()):+.3f}")


def fired_tokens(model, sae, text):
    """The tokens of a rendered response on which each latent of the head fires → list of lists."""
    stop = text.stop if model.meta["token"] == "mean" else len(text.ids)
    z = model.token_states(text, stop)
    f = latent_activations(sae, z, model.tensors["latents"])        # [t, 2K]
    tokens = pieces(model.backbone.tokenizer, text.ids[:stop], text.first)
    found = []
    for of_latent in f.T:
        places = (of_latent > 0).nonzero().flatten().tolist()
        found.append([tokens[at] for at in places])
    return found


def in_short(tokens):
    """Tokens → str of at most 60 characters."""
    return " ".join(repr(token) for token in tokens)[:60] or "–"
