"""Where the directions of a head fire, read off the run's own responses, and a quiz on their names.

A latent is named by looking at the tokens on which it fires, with what stands around them. A name
that one gives is a guess; the quiz tests it: of five snippets of other texts, in which one does the
latent *not* fire? (Intruder detection, as in topic models: Chang et al. 2009.) Random directions
that fire as often are mixed in: what they score is what a name is worth that means nothing.
"""

import collections
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from parts.chat import render
from parts.files import UserError
from parts.latents import last_turn, latent_activations, pieces

AROUND = 12             # tokens shown on either side of the one where a direction fires
MOST_RESPONSES = 500    # read for the contexts, and as many for the quiz
MOST_TOKENS = 40_000
RANDOM = 3              # directions mixed into the quiz
SNIPPET = 12            # tokens of a snippet
TASKS = 10              # a direction
FEWEST_TASKS = 4        # fewer say nothing


# ---------------------------------------------------------------- the tokens of many responses

@dataclass
class Reading:
    """The response tokens [T] of some texts, one text behind the other."""
    responses: list         # (pair, side) of each text
    borders: np.ndarray     # [R + 1], text r has the tokens borders[r] … borders[r + 1] - 1
    tokens: list            # T strings
    fires: torch.Tensor     # [T, m] activations f_j of the latents, 0 where one does not fire
    along: torch.Tensor     # [T, RANDOM] projections on the random directions
    at_mean: torch.Tensor   # bool [R, m]: does it fire on the mean of a text's tokens?
    parts: list             # of each text: what its tokens add to the reward, or None

    def text_of(self):
        """The number of the text that each token stands in → [T]."""
        return np.repeat(np.arange(len(self.responses)), np.diff(self.borders))


def some_responses(pairs, most=MOST_RESPONSES):
    """Different responses of some pairs, at most so many → [(pair, side)].

    Whole pairs are taken, in the order of a hash of their ids: the same ones every time.
    """
    found = {}
    for pair in sorted(pairs, key=lambda pair: hashlib.sha256(pair["id"].encode()).digest()):
        for side in ("chosen", "rejected"):
            found.setdefault((json.dumps(pair["prompt"]), pair[side]), (pair, side))
        if len(found) >= most:
            break
    return list(found.values())


def read_tokens(model, sae, responses, probes):
    """Read the tokens of responses [(pair, side)] → Reading.

    model: a RewardModel with its backbone. probes: random directions [RANDOM, d]. Of very long
    responses only so many are read that there are at most MOST_TOKENS tokens.
    """
    backbone, layer = model.backbone, model.meta["layer"]
    wanted = model.tensors["latents"]
    texts = []
    room = MOST_TOKENS
    for pair, side in responses:
        text = render(backbone.tokenizer, pair["prompt"], pair[side], model.meta["max_length"])
        room -= text.stop - text.first
        if texts and room < 0:
            break
        texts.append(text)

    rows = [None] * len(texts)
    for members, (hidden,) in backbone.hidden_rows([text.ids for text in texts], [layer]):
        for index, places in members:
            text = texts[index]
            own = torch.from_numpy(places[text.first:text.stop]).to(hidden.device)
            rows[index] = read_one(model, sae, hidden[own].float().cpu(), wanted, probes)

    tokens = []
    for text in texts:
        tokens += pieces(backbone.tokenizer, text.ids[:text.stop], text.first)
    fires, along, at_mean, parts = zip(*rows)
    lengths = [text.stop - text.first for text in texts]
    return Reading(responses[:len(texts)], np.cumsum([0, *lengths]), tokens, torch.cat(fires),
                   torch.cat(along), torch.stack(at_mean), list(parts))


def read_one(model, sae, z, wanted, probes):
    """z of one response's tokens [t, d] → (f [t, m], projections [t, RANDOM], fires at the mean
    [m], parts of the reward [t] or None)."""
    f = latent_activations(sae, z, wanted)
    at_mean = latent_activations(sae, z.mean(0, keepdim=True), wanted)[0] > 0
    parts = model.parts_of(z).tolist() if model.reads_tokens() else None
    return f.half(), z @ probes.T, at_mean, parts


def read_pairs(reading):
    """What each response's tokens add to the reward → {id of the pair: {prompt, chosen, rejected}}.

    A side is [(token, part)]; part is None where the reward is no sum over tokens.
    """
    found = {}
    for text, (pair, side) in enumerate(reading.responses):
        start, stop = reading.borders[text], reading.borders[text + 1]
        parts = reading.parts[text] or [None] * (stop - start)
        row = found.setdefault(pair["id"], {"prompt": last_turn(pair["prompt"])})
        if side in row or row["prompt"] != last_turn(pair["prompt"]):
            continue                            # another pair of the same id: the first stays
        row[side] = [[token, part if part is None else round(part, 4)]
                     for token, part in zip(reading.tokens[start:stop], parts)]
    return found


# ---------------------------------------------------------------- contexts of a direction

def contexts(reading, values, count):
    """Where a direction fires → {top, middle, none}, lists of at most `count` windows of tokens.

    values: [T], 0 where it does not fire. top: the texts with the strongest tokens; middle: those
    nearest to the median of all tokens on which it fires; none: texts in which it never does.
    """
    text_of = reading.text_of()
    strongest = np.zeros(len(reading.responses))
    np.maximum.at(strongest, text_of, values)
    fired = values[values > 0]
    top = [text for text in np.argsort(-strongest, kind="stable")[:count] if strongest[text] > 0]
    found = {"top": [window(reading, values, peak_of(reading, values, text)) for text in top]}

    middle = []
    if len(fired):
        nearest = np.argsort(np.abs(values - np.median(fired)), kind="stable")
        taken = set(top)
        for token in nearest[:50 * count]:
            text = text_of[token]
            if values[token] > 0 and text not in taken and len(middle) < count:
                taken.add(text)
                middle.append(window(reading, values, token))
    found["middle"] = middle

    silent = np.flatnonzero(strongest == 0)[:count]
    found["none"] = [window(reading, values, reading.borders[text]) for text in silent]
    return found


def peak_of(reading, values, text):
    """The token of a text on which a direction is strongest."""
    start, stop = reading.borders[text], reading.borders[text + 1]
    return start + int(np.argmax(values[start:stop]))


def window(reading, values, token):
    """A token with AROUND others on either side → {id, side, prompt, heat: [(token, value)]}."""
    text = int(np.searchsorted(reading.borders, token, side="right")) - 1
    begins, ends = reading.borders[text], reading.borders[text + 1]
    start = max(begins, token - AROUND)
    stop = min(ends, token + AROUND + 1)
    heat = []
    for at in range(start, stop):
        heat.append([reading.tokens[at], round(float(values[at]), 3)])

    pair, side = reading.responses[text]
    return {
        "id": pair["id"],
        "side": side,
        "prompt": last_turn(pair["prompt"]),
        "heat": heat,
        "cut": [bool(start > begins), bool(stop < ends)],
    }


def histogram(reading, values, most=6):
    """Which tokens a direction fires on → {rate, different, entropy, top: [(token, share)]}.

    rate: share of all tokens; different: how many; entropy: of their shares, in bits.
    """
    on = np.flatnonzero(values > 0)
    counted = collections.Counter(reading.tokens[at] for at in on)
    shares = [count / len(on) for count in counted.values()]
    return {"rate": len(on) / len(values), "different": len(counted),
            "entropy": -sum(share * math.log2(share) for share in shares) + 0.0,
            "top": [[token, count / len(on)] for token, count in counted.most_common(most)]}


def agreement(reading, column):
    """In how many texts a latent fires at the mean, on some token, at both → shares."""
    on_token = np.zeros(len(reading.responses), bool)
    np.logical_or.at(on_token, reading.text_of(), (reading.fires[:, column] > 0).numpy())
    at_mean = reading.at_mean[:, column].numpy()
    return {"mean": float(at_mean.mean()), "token": float(on_token.mean()),
            "both": float((at_mean & on_token).mean())}


# ---------------------------------------------------------------- the quiz

def quiz(rows, columns, train, test, count, seed=0):
    """Tasks for the first latents, random directions among them → {snippet, directions}.

    rows: of the report; columns: their places in `fires`. A direction: {latent (None: random),
    contexts: of train and dev texts, tasks: [{snippets, odd}] of test texts}. In a task a direction
    fires in four snippets and not in the odd one. No snippet stands in two tasks of a direction.
    """
    rates = [float((train.fires[:, column] > 0).float().mean()) for column in columns]
    directions = []
    for row, column in zip(rows, columns):
        values = [reading.fires[:, column].float().numpy() for reading in (train, test)]
        directions.append((row["latent"], *values))
    rate = float(np.median([rate for rate in rates if rate] or [0.05]))
    for n in range(RANDOM):
        border = float(train.along[:, n].quantile(1 - rate))
        values = [(reading.along[:, n] - border).clamp_min(0).numpy() for reading in (train, test)]
        directions.append((None, *values))

    snippets = cut_snippets(test)
    strongest = np.array([[values[at].max() for at in snippets] for _, _, values in directions])
    rng = np.random.default_rng(seed)
    found = []
    for number, (latent, of_train, _) in enumerate(directions):
        others_fire = np.delete(strongest, number, 0).any(0)
        tasks = make_tasks(strongest[number], others_fire, rng)
        if len(tasks) >= FEWEST_TASKS:
            shown = contexts(train, of_train, count)
            texts = [{"snippets": ["".join(test.tokens[at] for at in snippets[n]) for n in some],
                      "odd": odd} for some, odd in tasks]
            found.append({"latent": latent, "contexts": shown, "tasks": texts})
    rng.shuffle(found)
    return {"snippet": SNIPPET, "directions": found}


def cut_snippets(reading):
    """The texts in pieces of SNIPPET tokens, what is left over dropped → list of ranges."""
    found = []
    for start, stop in zip(reading.borders[:-1], reading.borders[1:]):
        for at in range(start, stop - SNIPPET + 1, SNIPPET):
            found.append(range(at, at + SNIPPET))
    return found


def make_tasks(strongest, others_fire, rng):
    """Snippets → up to TASKS of ([5 numbers], place of the odd one).

    strongest: how strongly a direction fires in each snippet; taken are those where it fires most.
    others_fire: in which another one does. The odd one is a snippet where only another does.
    """
    off = rng.permutation(np.flatnonzero((strongest == 0) & others_fire))
    on = np.argsort(-strongest, kind="stable")[:int((strongest > 0).sum())]
    count = min(TASKS, len(on) // 4, len(off))
    on = rng.permutation(on[:4 * count])
    tasks = []
    for n in range(count):
        odd = int(rng.integers(5))
        some = on[4 * n:4 * n + 4].tolist()
        some.insert(odd, int(off[n]))
        tasks.append((some, odd))
    return tasks


# ---------------------------------------------------------------- names

def read_names(path, meta=None):
    """A file of names → {latent: {name, right, tasks}}; the last two where the quiz was taken.

    meta: of the head; names that were saved for another SAE or layer are refused.
    Read are what the page saves, and rows of index and description as Neuronpedia exports them
    (JSON or JSON lines).
    """
    path = Path(path)
    advice = "a JSON file that the page saved, or rows with index and description"
    try:
        found = json_or_lines(path.read_text("utf-8"))
        if isinstance(found, dict):
            check_names(found, meta or {}, path)
            found = found["names"]
        names = {}
        for row in found:
            earlier = names.get(int(row["index"]))
            name = str(row["description"])
            names[int(row["index"])] = {
                "name": f"{earlier['name']} / {name}" if earlier else name,
                "right": row.get("right"), "tasks": row.get("tasks")}
        return names
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"file not found · {path} · --names takes {advice}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not a file of names ({type(error).__name__}: {error}) · {path} · "
                        f"--names takes {advice}") from None


def json_or_lines(text):
    """What a text of JSON holds; of a text with an object a line the list of them.

    A row alone is a list of one.
    """
    try:
        found = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    is_row = isinstance(found, dict) and "index" in found
    return [found] if is_row else found


def check_names(saved, meta, path):
    """Refuse names of another SAE or layer than the head's: the same numbers mean other latents."""
    for key in ("sae", "layer"):
        own = Path(str(meta[key])).name if key in meta else None
        if own is not None and key in saved and str(saved[key]) != own:
            raise UserError(f"these names are of {key} {saved[key]}, the head's is {own} · "
                            f"{path} · pass names of its own latents")
