"""Stage 4: does it hold? Accuracy with intervals, controls, curves of K and of the number of pairs, latents, a page to look at.

reads   features.safetensors · reward_head.safetensors · activations/ · pairs.jsonl · the SAE
writes  evaluation.json   every number but times        timings.json   seconds
        report.html       one file, opens offline       *.png          its pictures

    python 04_evaluate.py --run runs/demo
    python 04_evaluate.py --run runs/demo --sweeps full --other safe=runs/demo-safe
    python 04_evaluate.py --run runs/demo --explain "Can a duck swim?" "Yes." "No, ducks cannot swim."

Nothing was chosen by test pairs before this stage. Every control gets the same pairs and the same loss, and its choices on dev:

    dense               the same head on the whole hidden state z
    random_directions   Gaussian directions instead of decoder rows
    random_latents      decoder rows of latents drawn at random among those that fire
    activations         the SAE's activations f_j of the chosen latents instead of <z, d_j>
    words               1- and 2-grams of the response, hashed: what the wording alone gives away
    length              the longer (or the shorter) response, whichever wins on train
    shuffled_labels     the whole method on labels shuffled before selection: must be near 0.5

An interval is the middle 95 % of 2,000 bootstrap draws over groups (prompts). "Better than a control" needs the interval of
the *difference* clear of 0 (there a tie counts half). The paper reports no intervals.
"""

import argparse
import importlib
import json
import math
import re
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from parts import explain, report
from parts.files import UserError, file_hash, load_stage, run_main, write_text
from sae import SAEError, load_sae

stage1, stage2, stage3 = (importlib.import_module(n) for n in ("01_extract", "02_select_features", "03_train_head"))
TRAIN, TEST = stage1.TRAIN, stage1.TEST
# dense and words have no K: dev chooses their L2 penalty instead
DENSE = {d: {"columns": slice(None), "weight_decay": d} for d in (0.0001, 0.001, 0.01, 0.1, 1.0)}
ALL = {"all": {"columns": slice(None)}}
SIDES, RANDOM = ("chosen", "rejected"), ("random_directions", "random_latents")
WORD_COLUMNS = 2**13     # at most
FORMAT = 2               # of evaluation.json: one of an older format is made anew
DRAWS = 2000


# ---------------------------------------------------------------- statistics

def bootstrap(values, groups, draws=DRAWS, seed=0):
    """Mean of values [seeds, n] over seeds and pairs → (mean, low, high): percentile bootstrap, 95 %.

    A draw takes groups with replacement, and seeds too where there are several: which random directions were drawn is as
    much chance as which prompts were.
    """
    values = np.atleast_2d(values)
    _, inverse = np.unique(groups, return_inverse=True)
    count, rng = np.bincount(inverse), np.random.default_rng(seed)
    total = np.stack([np.bincount(inverse, v) for v in values])                         # [seeds, groups]
    means = np.empty(draws)
    for n in range(draws):
        pick = rng.integers(len(count), size=len(count))
        rows = rng.integers(len(values), size=len(values))
        means[n] = total[rows][:, pick].sum(1).mean() / count[pick].sum()
    return float(values.mean()), *map(float, np.quantile(means, (0.025, 0.975)))


def points(differences):
    """r_chosen - r_rejected → 1 where right, 0 where wrong, 1/2 for a tie (a control that says nothing is a coin)."""
    return (differences > 0) + (differences == 0) / 2


def summary(differences, groups):
    """r_chosen - r_rejected of each seed [seeds, n] → accuracy (strict) and its interval, the share of ties, and the same with a
    tie as half: ties_half, half_low, half_high."""
    right, ties = (differences > 0).astype(float), float((differences == 0).mean())
    strict = bootstrap(right, groups)
    half = bootstrap(points(differences), groups) if ties else strict
    return {**dict(zip(("accuracy", "low", "high"), strict)), "ties": ties, **dict(zip(("ties_half", "half_low", "half_high"), half)),
            "n": len(groups), "groups": len(np.unique(groups)), "seeds": right.mean(1).tolist()}


def gap(ours, theirs, groups):
    """SparseRM minus a control, pair by pair, ties as half → {mean, low, high}."""
    return dict(zip(("mean", "low", "high"), bootstrap(points(ours).mean(0) - points(theirs), groups)))


def side_by_side(found, groups):
    """{name: r_chosen - r_rejected [seeds, n]} → {name: summary}; of a control also `behind`: SparseRM minus it."""
    ours = found["sparserm"]
    return {name: summary(d, groups) | ({"behind": gap(ours, d, groups)} if d is not ours else {}) for name, d in found.items()}


def calibration(differences, temperature, pairs_a_bin=50):
    """Confidence p = σ(|Δr| / T) against the outcome Δr > 0 → nll, brier, ece, bins of equal mass.

    Binning σ(Δr) with the label "always chosen" would say nothing: every bin's outcome would be 1.
    """
    p = torch.sigmoid(torch.tensor(np.abs(differences)) / temperature).numpy()
    right = (differences > 0).astype(float)
    parts = np.array_split(np.argsort(p, kind="stable"), max(1, min(10, len(p) // pairs_a_bin)))
    bins = [{"confidence": float(p[i].mean()), "accuracy": float(right[i].mean()), "n": len(i)} for i in parts]
    return {"temperature": temperature, "nll": float(F.softplus(torch.tensor(-differences / temperature)).mean()),
            "brier": float(((p - right) ** 2).mean()), "bins": bins,
            "ece": sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(p)}


def length_figures(reward_chosen, reward_rejected, chosen_tokens, rejected_tokens):
    """Correlation of reward and response length; accuracy on the pairs whose lengths differ by at most a tenth."""
    lengths = np.concatenate([chosen_tokens, rejected_tokens]).astype(float)
    rewards = np.concatenate([reward_chosen, reward_rejected])
    matched = np.abs(chosen_tokens - rejected_tokens) <= 0.1 * np.maximum(chosen_tokens, rejected_tokens)
    right = reward_chosen > reward_rejected
    varied = lengths.std() > 0 and rewards.std() > 0
    return {"correlation": float(np.corrcoef(lengths, rewards)[0, 1]) if varied else 0.0, "matched_n": int(matched.sum()),
            "matched_accuracy": float(right[matched].mean()) if matched.any() else None}


# ---------------------------------------------------------------- the data of a run

class Pairs:
    """The pairs of a run: z of both sides [n, d], split, group, lengths of both sides, and their rows in pairs.jsonl."""

    def __init__(self, run, paths):
        chunks = list(stage2.read_chunks(paths))
        column = lambda name: torch.cat([c[name] for c in chunks])
        self.z = [column(side).float() for side in SIDES]
        self.split, self.group = column("split"), column("group").numpy()
        self.tokens = [column(f"{side}_tokens").numpy() for side in SIDES]
        self.pairs = [json.loads(line) for line in (Path(run) / "pairs.jsonl").open(encoding="utf-8")]

    def part(self, rows):
        """Only the pairs where rows [n] is true: all that a control may see of them."""
        at = rows.nonzero().flatten().numpy()
        return SimpleNamespace(z=[z[rows] for z in self.z], group=self.group[at], tokens=[t[at] for t in self.tokens],
                               pairs=[self.pairs[n] for n in at])


class Data(Pairs):
    """The pairs of the run that is evaluated, and what stages 2 and 3 recorded."""

    def __init__(self, run, sae_path=None):
        self.run = run = Path(run)
        self.features, self.meta = load_stage(run / "features.safetensors", "02_select_features.py", "select")
        self.head, self.head_meta = load_stage(run / "reward_head.safetensors", "03_train_head.py", "head")
        paths, _ = stage2.shard_files(run, self.meta["layer"])
        if [file_hash(p) for p in paths] != self.meta["parent"]["activations"]:
            raise UserError(f"the activations are not those that features.safetensors was made from · {run} · run 02 and 03 again")
        if self.head_meta["parent"]["features"] != file_hash(run / "features.safetensors"):
            raise UserError(f"reward_head.safetensors was made from another features.safetensors · {run} · run 03 again")
        super().__init__(run, paths)
        if not (self.split == TEST).any():
            raise UserError(f"no pair is in the test split · {run} · more pairs, or another --split in 01")
        place = sae_path or self.meta["sae"]
        self.sae = load_sae(place, getattr(torch, self.meta["sae_dtype"]), k=self.meta["k_sae"])
        if file_hash(self.sae.info["weights"]) != self.meta["parent"]["sae"]:
            raise UserError(f"not the SAE that features.safetensors was made with · {place} · run 02 again, or pass --sae")


# ---------------------------------------------------------------- the controls

def fit_control(chosen, rejected, split, options, settings, seeds=(0,), scale=True):
    """Search on dev, as stage 3 does for SparseRM → (name of the chosen option, its head, read).

    read(chosen, rejected) → r_chosen - r_rejected [n] of any pairs. scale: standardise on train first.
    seeds: heads to train, of which the one with the lowest dev loss is kept.
    """
    mean, std = stage2.standardisation((chosen, rejected), split == TRAIN) if scale else (None, None)
    scaled = lambda x: (x - mean) / std if scale else x
    name, heads, losses, _ = stage3.fit_best(scaled(chosen), scaled(rejected), split, options, seeds, **settings)
    head, columns = {**heads[int(np.argmin(losses))], "std": std}, options[name]["columns"]
    reward = lambda x: stage3.apply_head(head, scaled(x)[:, columns])
    return name, head, lambda chosen, rejected: (reward(chosen) - reward(rejected)).numpy()


def fit_and_test(chosen, rejected, split, *how, **more):
    """fit_control (how: options, settings …), read on the test pairs → (name of the chosen option, r_chosen - r_rejected [n_test])."""
    name, _, read = fit_control(chosen, rejected, split, *how, **more)
    return name, read(chosen[split == TEST], rejected[split == TEST])


def gaussian_directions(count, width, seed):
    """Random directions of norm 1, [count, width]."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def random_latents(frequency, count, seed):
    """`count` latents drawn among those that fire at all on train responses → [count] int64."""
    alive = (frequency > 0).nonzero().flatten()
    return alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:count]]


def activation_pairs(pairs, sae, latents):
    """SAE activations of both sides, [n, len(latents)] each."""
    return [explain.latent_activations(sae, z, latents) for z in pairs.z]


def score_pairs(pairs, directions):
    """Alignment scores of both sides, [n, len(directions)] each."""
    return [stage2.alignment_scores(z, directions) for z in pairs.z]


def grams(text):
    """The 1- and 2-grams of a text, hashed → set of int."""
    words = re.findall(r"\w+", text.casefold())
    return {zlib.crc32(g.encode()) % 2**20 for g in (*words, *map(" ".join, zip(words, words[1:])))}


def word_features(texts, split):
    """Responses of both sides → what turns such texts into rows [n, columns] a side: the grams of at least two train responses
    (the WORD_COLUMNS most frequent), weighted by rarity, rows of norm 1."""
    count = Counter(g for side in texts for n in (split == TRAIN).nonzero().flatten().tolist() for g in grams(side[n]))
    column = {g: i for i, (g, c) in enumerate(count.most_common(WORD_COLUMNS)) if c > 1}
    rarity = torch.tensor([math.log(2 * len(split) / count[g]) for g in column])

    def rows(side):
        matrix = torch.zeros(len(side), len(column))
        for n, text in enumerate(side):
            matrix[n, [column[g] for g in grams(text) if g in column]] = 1.0
        return F.normalize(matrix * rarity, dim=1)
    return lambda texts: [rows(side) for side in texts]


def shuffled_sides(z, split, seed):
    """Swap chosen and rejected of half of the train and dev pairs; test keeps its labels."""
    swap = (torch.rand(len(split), generator=torch.Generator().manual_seed(seed)) < 0.5) & (split != TEST)
    return [torch.where(swap[:, None], b, a) for a, b in (z, z[::-1])]


def directions_of(data, name, count, seed):
    """The directions of a control, [count, d]: Gaussian ones, or decoder rows of random living latents."""
    if name == "random_directions":
        return gaussian_directions(count, data.z[0].shape[1], seed)
    frequency = data.features["frequency_chosen"] + data.features["frequency_rejected"]
    return data.sae.W_dec[random_latents(frequency, count, seed)]


def select_on(data, z, split, k):
    """Stage 2's selection on the train pairs of another split or labelling → latents."""
    return stage2.select_latents(*stage2.firing_frequencies(data.sae, [{"chosen": z[0], "rejected": z[1], "split": split}])[:2], k)


def controls(data, seeds, sets):
    """All controls → {name: (chosen option, head, [r_chosen - r_rejected [seeds, n] of each of the sets of pairs])}.

    A control is a view: what it sees of pairs, [n, m] a side. The heads get what SparseRM's got.
    """
    latents, split, settings, total = data.features["latents"], data.split, data.head_meta["settings"], data.meta["k"]
    options, trials = stage3.k_options(total, data.head_meta["asked"]["k"]), range(data.head_meta["asked"]["seeds"])
    texts = lambda pairs: [[p[side] for p in pairs.pairs] for side in SIDES]
    longer = lambda pairs: (pairs.tokens[0] - pairs.tokens[1]).astype(np.float32)
    sign = np.sign(np.sign(longer(data)[split == TRAIN]).sum())

    def fit(view, options=options, settings=settings, seeds=trials, train=data, **how):
        name, head, read = fit_control(*view(train), split, options, settings, seeds, **how)
        return name, head, [read(*view(pairs))[None] for pairs in sets]

    def several(fit_draw):
        names, heads, found = zip(*map(fit_draw, seeds))
        return list(names), list(heads), [np.concatenate(d) for d in zip(*found)]

    def basis(name):
        return several(lambda seed: fit(partial(score_pairs, directions=directions_of(data, name, 2 * total, seed))))

    def words():
        view = word_features(texts(data), split)
        return fit(lambda pairs: view(texts(pairs)), DENSE, {**settings, "kind": "linear"}, (0,), scale=False)

    def shuffled(seed):                 # the whole method, from the selection on
        z = shuffled_sides(data.z, split, seed)
        directions = data.sae.W_dec[select_on(data, z, split, total)]
        found = len(directions) // 2
        fewer = {k: stage3.k_options(found, k)[k] for k in options if k <= found} or stage3.k_options(found, found)
        return fit(lambda pairs: score_pairs(pairs, directions), fewer, train=SimpleNamespace(z=z))
    jobs = {"dense": lambda: fit(lambda pairs: pairs.z, DENSE), **{name: partial(basis, name) for name in RANDOM},
            "activations": lambda: fit(lambda pairs: activation_pairs(pairs, data.sae, latents)), "words": words,
            "length": lambda: (float(sign), None, [sign * longer(pairs)[None] for pairs in sets]),
            "shuffled_labels": lambda: several(shuffled)}
    return {name: job() for name, job in tqdm(jobs.items(), desc="controls", unit="control", disable=None)}


# ---------------------------------------------------------------- curves

def turned(rows):
    """{size: {name: summary}} → {name: {size: summary}}."""
    return {name: {size: row[name] for size, row in rows.items()} for name in next(iter(rows.values()))}


def k_curve(data, seeds, dense):
    """Accuracy on test with K fixed: SparseRM and the controls that have a K, K = 1, 2, 4 … → {name: {K: summary}}."""
    split, settings, total = data.split, data.head_meta["settings"], data.meta["k"]
    groups = data.group[(split == TEST).numpy()]
    scores = {"sparserm": [score_pairs(data, data.features["directions"])],
              "activations": [activation_pairs(data, data.sae, data.features["latents"])],
              **{name: [score_pairs(data, directions_of(data, name, 2 * total, seed)) for seed in seeds] for name in RANDOM}}
    options, rows = stage3.k_options(total), {}
    for k in tqdm(options, desc="K curve", unit="K", disable=None):
        rows[str(k)] = {"dense": dense, **side_by_side({             # dense has no K: the same everywhere
            name: np.stack([fit_and_test(*both, split, {k: options[k]}, settings)[1] for both in many])
            for name, many in scores.items()}, groups)}
    return turned(rows)


def pairs_curve(data, seeds, sizes=(50, 100, 200, 500, 1000)):
    """Accuracy on test with fewer train pairs, selection redone on them → {name: {number: summary}}."""
    split, settings, k = data.split, data.head_meta["settings"], data.head_meta["k"]
    groups, train = data.group[(split == TEST).numpy()], (split == TRAIN).nonzero().flatten()
    order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    rows = {}
    for n in tqdm([*(s for s in sizes if s < len(train)), len(train)], desc="pairs curve", unit="size", disable=None):
        part = split.clone()
        part[order[n:]] = 3                     # neither train, dev nor test
        fit = lambda both, options=ALL, part=part: fit_and_test(*both, part, options, settings)[1]
        latents = select_on(data, data.z, part, k)
        found = {"sparserm": fit(score_pairs(data, data.sae.W_dec[latents]))[None], "dense": fit(data.z, DENSE)[None],
                 "activations": fit(activation_pairs(data, data.sae, latents))[None],
                 **{name: np.stack([fit(score_pairs(data, directions_of(data, name, 2 * k, s))) for s in seeds]) for name in RANDOM}}
        rows[str(n)] = side_by_side(found, groups)
    return turned(rows)


# ---------------------------------------------------------------- do the latents that tell train pairs apart tell test pairs apart

def ablation_test(data, model, adds, weight, draws=20):
    """Do the latents that tell train pairs apart do so on test? Set their scores to the mean there, against random ones, of those
    that help on train too, of equal total |weight| → {number: {top, random: summary; fall: how much more accuracy the top ones cost;
    reached: what share of their weight the random ones have}}.

    An intervention on the head's input, not on the language model. That the top ones matter on *train* is by construction.
    adds, weight: see explain.train_shares.
    """
    test = data.split == TEST
    scores, groups = [model.scores_of(z[test]) for z in data.z], data.group[test.numpy()]

    def without(latents):
        a, b = (stage3.apply_head(model.head, x.index_fill(1, torch.as_tensor(latents), 0.0)) for x in scores)
        return (a - b).numpy()
    order = adds.argsort(descending=True, stable=True)
    order, rng, result = order[adds[order] > 0].numpy(), np.random.default_rng(0), {}
    for m in sorted({m for m in (1, len(order) // 8, len(order) // 4) if 0 < m < len(order)}):
        drawn, wanted = [], weight[order[:m]].sum()
        for _ in range(draws):                      # as many others as it takes to reach the same total |weight|
            others = rng.permutation(order[m:])
            drawn.append(without(others[:1 + int((weight[others].cumsum() < wanted).sum())]))
        top, chance = without(order[:m])[None], np.stack(drawn)
        result[str(m)] = {"top": summary(top, groups), "random": summary(chance, groups),
                          "reached": float(min(1.0, weight[order[m:]].sum() / wanted)),
                          "fall": dict(zip(("mean", "low", "high"), bootstrap(points(chance) - points(top), groups)))}
    return result


# ---------------------------------------------------------------- the stage

def other_set(data, name, run):
    """The test pairs of another run (another data set, same backbone, layer and token rule) whose questions this head has not seen."""
    paths, meta = stage2.shard_files(run, data.meta["layer"])
    for key in ("model", "files", "template", "layer", "token", "max_length"):
        if meta[key] != data.meta[key]:
            raise UserError(f"{key} {meta[key]} there, {data.meta[key]} here · --other {name}={run} · "
                                   f"extract it with the same {key}")
    other = Pairs(run, paths)
    seen = np.isin(other.group, data.group[(data.split != TEST).numpy()])         # questions that this head was trained on
    test = (other.split == TEST) & ~torch.from_numpy(seen)
    if not test.any():
        raise UserError(f"no test pair that this head has not seen · --other {name}={run} · another data set")
    return other.part(test)


def evaluate(data, args):
    """→ (evaluation, timings): everything of evaluation.json."""
    times, seeds, meta, asked = {}, list(range(args.seeds)), data.meta, data.head_meta

    def timed(name, call, *given):
        started = time.perf_counter()
        result = call(*given)
        times[name] = round(time.perf_counter() - started, 2)
        return result
    own, others = data.part(data.split == TEST), {name: other_set(data, name, run) for name, run in args.other}
    model, sets = stage3.RewardModel(data.head, asked, None), [own, *others.values()]
    backbone = stage3.RewardModel.load(data.run / "reward_head.safetensors", device=args.device).backbone if args.texts else None
    adds, weight = explain.train_shares(data, model)                # what is refused is refused by now, and costs no time
    latents = timed("latents", explain.latent_rows, data, adds, backbone, explain.separation_on_test(data), args.texts)
    fitted = timed("controls", controls, data, seeds, sets)
    reward = [[model.reward_of(z).numpy() for z in pairs.z] for pairs in sets]
    rows = [side_by_side({"sparserm": (c - r)[None], **{name: found[n] for name, (_, _, found) in fitted.items()}}, pairs.group)
            for n, (pairs, (c, r)) in enumerate(zip(sets, reward))]
    difference, first = reward[0][0] - reward[0][1], rows[0]
    result = {"differences": {name: first[name].pop("behind") for name in fitted},
              "accuracy": {name: {**row, "choice": fitted[name][0] if name in fitted else asked["k"]} for name, row in first.items()},
              "other": {name: {**row.pop("sparserm"), "controls": row} for name, row in zip(others, rows[1:])},
              "calibration": calibration(difference, float(data.head["temperature"])),
              "length": length_figures(*reward[0], *own.tokens), "curves": {}}
    if args.sweeps != "none":
        result["curves"]["k"] = timed("k curve", k_curve, data, seeds, result["accuracy"]["dense"])
    if args.sweeps == "full":
        result["curves"]["pairs"] = timed("pairs curve", pairs_curve, data, seeds)
    trained = stage3.trained_parameters(data.head)
    result["cost"] = {"trained_parameters": trained, "backbone_parameters": meta["parameters"], "share": trained / meta["parameters"]}
    result["sae"] = {**meta["health"], "warnings": meta["warnings"]}
    sources = [name for name, _ in Counter(str(p["source"]) for p in data.pairs).most_common(5)]
    result["run"] = {"model": Path(meta["model"]).name, "layer": meta["layer"], "token": meta["token"], "sources": sources,
                     "sae": Path(meta["sae"]).name,         # names, not paths: a page is passed on
                     "k": asked["k"], "settings": asked["settings"],
                     "pairs": {name: int((data.split == s).sum()) for s, name in enumerate(stage1.SPLITS)}}
    result["stability"], result["latents"] = timed("stability", explain.resampled_selection, data), latents
    result["explanations"] = timed("explanations", ablation_test, data, model, adds, weight)
    result["fold"] = explain.fold(data, model, fitted["dense"][1])
    result["wrong"] = explain.most_wrong(data, difference)
    result["warnings"] = report.in_words(result, meta["warnings"])
    return result, times


def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", default="runs/demo", help="folder of the run (default runs/demo)")
    p.add_argument("--sae", help="the SAE, where it is not at the place recorded by stage 2")
    p.add_argument("--other", action="append", default=[], metavar="NAME=DIR", help="also score the test pairs of another run (repeatable)")
    p.add_argument("--sweeps", choices=("none", "small", "full"), default="small",
                   help="curves: none, K, or K and number of pairs (default small)")
    p.add_argument("--seeds", type=int, default=5, help="draws of random directions, latents and labels (default 5)")
    p.add_argument("--texts", type=int, default=3, help="texts shown at either end of a latent; 0 needs no language model (default 3)")
    p.add_argument("--explain", nargs="+", metavar="ID", help="only this: why one response scores higher; the id of a pair, or PROMPT A B")
    p.add_argument("--device", default="auto", help="of the language model, for --texts and --explain (default auto)")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = p.parse_args()
    if args.seeds < 1:
        raise UserError(f"at least one draw is needed · --seeds {args.seeds} · pass a number from 1")
    if args.texts < 0:
        raise UserError(f"--texts is a number from 0 · --texts {args.texts} · 0 needs no language model")
    for text in args.other:
        if "=" not in text:
            raise UserError(f"--other needs NAME=DIR · {text} · e.g. --other safe=runs/demo-safe")
    args.other = [tuple(text.split("=", 1)) for text in args.other]
    return args


def main():
    """Stage 4 from the command line."""
    args = parse_args()
    data = Data(args.run, args.sae)
    if args.explain:
        asked = explain.pair_to_explain(data, args.explain)            # before the language model is opened
        return explain.explain_pair(data, stage3.RewardModel.load(data.run / "reward_head.safetensors", device=args.device), *asked)
    out, parent = Path(args.run) / "evaluation.json", parents(args, data)
    try:
        found = json.loads(out.read_text("utf-8"))
    except (OSError, ValueError):           # none yet, or damaged
        found = {}
    if not isinstance(found, dict) or found.get("parent") != sealed(parent, found):
        result, times = evaluate(data, args)
        found = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.9g}"))
        found["parent"] = sealed(parent, found)
        write_text(Path(args.run) / "timings.json", json.dumps(times, indent=1) + "\n")
        write_text(out, json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")     # last: it says that all is done
    report.print_report(args.run, found, report.write_page(found, args.run))


def parents(args, data):
    """What an evaluation depends on: the head (its lineage leads to all the rest), other runs, the settings."""
    others = {name: [file_hash(p) for p in stage2.shard_files(run, data.meta["layer"])[0]] for name, run in args.other}
    head = file_hash(Path(args.run) / "reward_head.safetensors")
    return {"format": FORMAT, "head": head, "other": others, "sweeps": args.sweeps, "seeds": args.seeds, "texts": args.texts}


def sealed(parent, found):
    """What an evaluation depends on, and a hash of its numbers: a damaged one is made anew."""
    return {**parent, "numbers": stage1.hash_number(json.dumps({n: v for n, v in found.items() if n != "parent"}, sort_keys=True))}


if __name__ == "__main__":
    run_main(main, SAEError)
