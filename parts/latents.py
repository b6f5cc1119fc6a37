"""What stage 4 says of the latents of a head, and of the pairs that it gets wrong.

A latent's row says how often it fires on either side, how much weight the head gives it, and which
tokens its direction raises. That is a description: what the language model would have written
without the latent is not asked here. Where a latent fires is in parts/contexts.py.
"""

import math

import numpy as np
import torch

from parts.files import UserError
from parts.models import check_weights

TEST = 2            # how pairs.jsonl's splits are numbered in the files

# ---------------------------------------------------------------- activations and tokens

def side_of(number, count):
    """Of `count` directions the first half is of the chosen side, the other of the rejected one."""
    return "chosen" if number < count // 2 else "rejected"


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


# ---------------------------------------------------------------- the rows of the report

def last_turn(prompt, most=300):
    """What to show of a prompt: its last turn, its last `most` characters."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text[-most:]


def latent_rows(data, head, adds, adds_firing, tokens, intervals):
    """Kept latents → rows of evaluation.json, by what a direction adds where its latent fires.

    adds: to chosen minus rejected, adds_firing: to a response, where the latent fires; both on
    average over the train and dev pairs, [2K]. tokens: of the logit lens, or nothing. intervals:
    (low, high) of each difference of the frequencies, on test.
    """
    latents = data.head["latents"].tolist()
    weights = head.w1.tolist() if head.kind == "linear" else [None] * len(latents)
    page = data.sae.info.get("neuronpedia")
    rows = []
    for n in adds_firing.abs().argsort(descending=True, stable=True).tolist():
        latent = latents[n]
        side = side_of(n, len(latents))
        against = weights[n] is not None and (weights[n] < 0) == (side == "chosen")
        rows.append({
            "latent": latent,
            "column": n,
            "side": side,
            "weight": weights[n],
            "against": against,
            "adds": float(adds[n]),
            "adds_firing": float(adds_firing[n]),
            "frequency_chosen": float(data.features["frequency_chosen"][latent]),
            "frequency_rejected": float(data.features["frequency_rejected"][latent]),
            "low": intervals[n][0],
            "high": intervals[n][1],
            "tokens": tokens[n] if tokens else [],
            "link": page and f"https://www.neuronpedia.org/{page}/{latent}",
        })
    return rows


def extreme_answers(data, rewards, count=5):
    """The responses of the test pairs with the highest and the lowest reward → {best, worst}.

    rewards: [chosen, rejected], [n_test] each.
    """
    test_rows = (data.split == TEST).nonzero().flatten().tolist()
    found = {}
    for side, of_side in zip(("chosen", "rejected"), rewards):
        for n, reward in zip(test_rows, of_side.tolist()):
            pair = data.pairs[n]
            found.setdefault((last_turn(pair["prompt"]), pair[side]), {
                "id": pair["id"], "side": side, "reward": reward, "category": pair["category"],
                "prompt": last_turn(pair["prompt"]), "text": pair[side][:600]})
    ordered = sorted(found.values(), key=lambda row: -row["reward"])
    return {"best": ordered[:count], "worst": ordered[::-1][:count]}


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
