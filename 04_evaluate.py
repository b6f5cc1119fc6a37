"""Stage 4: does it hold? Accuracy with intervals, controls, curves of K and of the number of pairs, latents, a page to look at.

reads   features.safetensors · reward_head.safetensors · activations/ · pairs.jsonl · the SAE
writes  evaluation.json   every number but times        timings.json   seconds
        report.html       one file, opens offline       *.png          its pictures

    python 04_evaluate.py --run runs/demo
    python 04_evaluate.py --run runs/demo --sweeps full --other safe=runs/demo-safe
    python 04_evaluate.py --run runs/demo --explain "Can a duck swim?" "Yes." "No, ducks cannot swim."

Test pairs are scored here for the first time. Every control gets the same pairs, the same loss and the same search on dev:

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
import shlex
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import report as page
from sae import SAEError, load_sae

stage1, stage2, stage3 = (importlib.import_module(n) for n in ("01_extract", "02_select_features", "03_train_head"))
TRAIN, DEV, TEST = stage1.TRAIN, stage1.DEV, stage1.TEST
# dense and words have no K: dev chooses their L2 penalty instead
DENSE = {d: {"columns": slice(None), "weight_decay": d} for d in (0.0001, 0.001, 0.01, 0.1, 1.0)}
WORD_COLUMNS = 2**13     # at most
DRAWS = 2000
SAYS = {"random_directions": "on this data, at this K, the SAE's choice of directions adds nothing measurable",
        "random_latents": "which latents are taken makes no measurable difference on this data, at this K",
        "activations": "projecting the hidden state is not measurably better than reading the SAE's activations",
        "words": "not shown to tell more than the wording alone",
        "length": "not shown to tell more than the length alone",
        "shuffled_labels": "not shown to do better than with shuffled labels"}


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
    """r_chosen - r_rejected of each seed [seeds, n] → accuracy (strict), interval, ties and the figure with ties as half."""
    right = (differences > 0).astype(float)
    mean, low, high = bootstrap(right, groups)
    return {"accuracy": mean, "low": low, "high": high, "ties": float((differences == 0).mean()),
            "ties_half": float(points(differences).mean()), "n": len(groups), "groups": len(np.unique(groups)),
            "seeds": right.mean(1).tolist()}


def gap(ours, theirs, groups):
    """SparseRM minus a control, pair by pair, ties as half → {mean, low, high}."""
    return dict(zip(("mean", "low", "high"), bootstrap(points(ours).mean(0) - points(theirs), groups)))


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

class Data:
    """Everything cached about a run: z of both sides [n, d], split, group, lengths, and what stages 2 and 3 recorded."""

    def __init__(self, run, sae_path=None):
        self.run = run = Path(run)
        self.features, self.meta = stage1.load_stage(run / "features.safetensors", "02_select_features.py", "select")
        self.head, self.head_meta = stage1.load_stage(run / "reward_head.safetensors", "03_train_head.py", "head")
        self.paths, shard_meta = stage2.shard_files(run, self.meta["layer"])
        if [stage1.file_hash(p) for p in self.paths] != self.meta["parent"]["activations"]:
            raise stage1.UserError(f"the activations are not those that features.safetensors was made from · {run} · run 02 and 03 again")
        if self.head_meta["parent"]["features"] != stage1.file_hash(run / "features.safetensors"):
            raise stage1.UserError(f"reward_head.safetensors was made from another features.safetensors · {run} · run 03 again")
        chunks = list(stage2.read_chunks(self.paths))
        self.z = [torch.cat([c[side] for c in chunks]).float() for side in ("chosen", "rejected")]
        self.split, self.group, self.tokens = read_columns(chunks)
        if not (self.split == TEST).any():
            raise stage1.UserError(f"no pair is in the test split · {run} · more pairs, or another --split in 01")
        self.pairs = [json.loads(line) for line in (run / "pairs.jsonl").open(encoding="utf-8")]
        place = sae_path or self.meta["sae"]
        self.sae = load_sae(place, getattr(torch, self.meta["sae_dtype"]), k=self.meta["k_sae"])
        if stage1.file_hash(self.sae.info["weights"]) != self.meta["parent"]["sae"]:
            raise stage1.UserError(f"not the SAE that features.safetensors was made with · {place} · run 02 again, or pass --sae")


def read_columns(chunks):
    """Chunks of shards → split [n], group [n], (chosen, rejected) lengths."""
    column = lambda name: torch.cat([c[name] for c in chunks])
    return column("split"), column("group").numpy(), (column("chosen_tokens").numpy(), column("rejected_tokens").numpy())


def standardise(chosen, rejected, split):
    """Scores of both sides → the same with mean 0, std 1 on train."""
    mean, std = stage2.standardisation((chosen, rejected), split == TRAIN)
    return (chosen - mean) / std, (rejected - mean) / std


def fit_and_test(chosen, rejected, split, options, settings, seeds=(0,), scale=True):
    """Search on dev, read test, as stage 3 does for SparseRM → (name of the chosen option, r_chosen - r_rejected [n_test]).

    scale: standardise on train first. seeds: heads to train, of which the one with the lowest dev loss is kept.
    """
    if scale:
        chosen, rejected = standardise(chosen, rejected, split)
    name, heads, losses, _ = stage3.fit_best(chosen, rejected, split, options, seeds, **settings)
    head, columns, test = heads[int(np.argmin(losses))], options[name]["columns"], split == TEST
    return name, (stage3.apply_head(head, chosen[test][:, columns]) - stage3.apply_head(head, rejected[test][:, columns])).numpy()


# ---------------------------------------------------------------- the controls

def gaussian_directions(count, width, seed):
    """Random directions of norm 1, [count, width]."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def random_latents(frequency, count, seed):
    """`count` latents drawn among those that fire at all on train responses → [count] int64."""
    alive = (frequency > 0).nonzero().flatten()
    return alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:count]]


def latent_activations(sae, z, latents):
    """f_j(z) of some latents, [n, len(latents)]."""
    return torch.cat([sae.encode(part)[:, latents] for part in z.split(1024)])


def activation_pairs(data, latents):
    """SAE activations of both sides, [n, len(latents)] each."""
    return [latent_activations(data.sae, z, latents) for z in data.z]


def score_pairs(data, directions):
    """Alignment scores of both sides, [n, len(directions)] each."""
    return [stage2.alignment_scores(z, directions) for z in data.z]


def word_features(texts, split):
    """1- and 2-grams of the responses, hashed; those in at least two train responses become columns (the WORD_COLUMNS most
    frequent), weighted by rarity, rows of norm 1 → [n, columns] a side."""
    grams = [[{zlib.crc32(g.encode()) % 2**20 for g in (*words, *map(" ".join, zip(words, words[1:])))}
              for words in (re.findall(r"\w+", text.casefold()) for text in side)] for side in texts]
    count = Counter(g for side in grams for n in (split == TRAIN).nonzero().flatten().tolist() for g in side[n])
    column = {g: i for i, (g, c) in enumerate(count.most_common(WORD_COLUMNS)) if c > 1}
    rarity = torch.tensor([math.log(2 * len(split) / count[g]) for g in column])
    sides = []
    for side in grams:
        matrix = torch.zeros(len(side), len(column))
        for n, found in enumerate(side):
            matrix[n, [column[g] for g in found if g in column]] = 1.0
        sides.append(F.normalize(matrix * rarity, dim=1))
    return sides


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


def method_from_scratch(data, z, split, k_total, options, settings, seeds=(0,)):
    """Selection, projection, head on the given sides and split (for shuffled labels and for fewer pairs)."""
    latents = select_on(data, z, split, k_total)
    total = len(latents) // 2
    options = {k: stage3.k_options(total, k)[k] for k in options if k <= total} or stage3.k_options(total, total)
    return fit_and_test(*(stage2.alignment_scores(side, data.sae.W_dec[latents]) for side in z), split, options, settings, seeds)


def select_on(data, z, split, k):
    """Stage 2's selection on the train pairs of another split or labelling → latents."""
    return stage2.select_latents(*stage2.firing_frequencies(data.sae, [{"chosen": z[0], "rejected": z[1], "split": split}])[:2], k)


def controls(data, seeds):
    """All controls → {name: (chosen option, r_chosen - r_rejected [seeds, n_test])}. The heads get what SparseRM's got."""
    f, split, settings, total = data.features, data.split, data.head_meta["settings"], data.meta["k"]
    options = stage3.k_options(total, data.head_meta["asked"]["k"])
    trials = range(data.head_meta["asked"]["seeds"])
    texts = [[p[side] for p in data.pairs] for side in ("chosen", "rejected")]
    longer = torch.from_numpy(data.tokens[0] - data.tokens[1]).float()
    sign = torch.sign(longer[split == TRAIN].sign().sum())

    def several(fit):
        fits = [fit(seed) for seed in seeds]
        return [name for name, _ in fits], np.stack([d for _, d in fits])

    def random_basis(name):
        scores = lambda seed: score_pairs(data, directions_of(data, name, 2 * total, seed))
        return several(lambda seed: fit_and_test(*scores(seed), split, options, settings, trials))

    def one(name, difference):
        return name, difference[None]
    jobs = {
        "dense": lambda: one(*fit_and_test(*data.z, split, DENSE, settings, trials)),
        "random_directions": lambda: random_basis("random_directions"),
        "random_latents": lambda: random_basis("random_latents"),
        "activations": lambda: one(*fit_and_test(*activation_pairs(data, f["latents"]), split, options, settings, trials)),
        "words": lambda: one(*fit_and_test(*word_features(texts, split), split, DENSE, {**settings, "kind": "linear"}, scale=False)),
        "length": lambda: one(float(sign), (longer * sign)[split == TEST].numpy()),
        "shuffled_labels": lambda: several(lambda s: method_from_scratch(data, shuffled_sides(data.z, split, s), split, total, options,
                                                                         settings, trials)),
    }
    return {name: job() for name, job in tqdm(jobs.items(), desc="controls", unit="control", disable=None)}


# ---------------------------------------------------------------- curves

def k_curve(data, seeds, dense):
    """Accuracy on test with K fixed: SparseRM and the controls that have a K, K = 1, 2, 4 … → {name: {K: summary}}."""
    split, settings, total = data.split, data.head_meta["settings"], data.meta["k"]
    groups = data.group[(split == TEST).numpy()]
    scores = {"sparserm": [score_pairs(data, data.features["directions"])],
              "activations": [activation_pairs(data, data.features["latents"])]}
    for name in ("random_directions", "random_latents"):
        scores[name] = [score_pairs(data, directions_of(data, name, 2 * total, seed)) for seed in seeds]
    options, curve = stage3.k_options(total), {name: {} for name in scores}
    for k in tqdm(options, desc="K curve", unit="K", disable=None):
        found = {name: np.stack([fit_and_test(*both, split, {k: options[k]}, settings)[1] for both in many])
                 for name, many in scores.items()}
        for name, d in found.items():
            curve[name][str(k)] = summary(d, groups) | ({"behind": gap(found["sparserm"], d, groups)} if name != "sparserm" else {})
    return curve | {"dense": {str(k): dense for k in options}}         # has no K: the same everywhere


def pairs_curve(data, seeds, sizes=(50, 100, 200, 500, 1000)):
    """Accuracy on test with fewer train pairs, selection redone on them → {name: {number: summary}}."""
    split, settings, k = data.split, data.head_meta["settings"], data.head_meta["k"]
    groups, train = data.group[(split == TEST).numpy()], (split == TRAIN).nonzero().flatten()
    order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    curve = {name: {} for name in ("sparserm", "dense", "random_directions", "random_latents", "activations")}
    for n in tqdm([*(s for s in sizes if s < len(train)), len(train)], desc="pairs curve", unit="size", disable=None):
        part = split.clone()
        part[order[n:]] = 3                     # neither train, dev nor test
        fit = lambda both, part=part: fit_and_test(*both, part, {k: {"columns": slice(None)}}, settings)[1]
        found = {"sparserm": method_from_scratch(data, data.z, part, k, {k}, settings)[1][None],
                 "dense": fit_and_test(*data.z, part, DENSE, settings)[1][None],
                 "activations": fit(activation_pairs(data, select_on(data, data.z, part, k)))[None],
                 **{name: np.stack([fit(score_pairs(data, directions_of(data, name, 2 * k, s))) for s in seeds])
                    for name in ("random_directions", "random_latents")}}
        for name, d in found.items():
            curve[name][str(n)] = summary(d, groups)
    return curve


# ---------------------------------------------------------------- are the latents, and what is said of them, worth believing

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


def separation_on_test(data):
    """Interval of μ_c - μ_r of the head's latents on the *test* pairs → (low, high) [2K'] each.

    On train it would be too narrow: the latents were chosen there for that difference.
    """
    test = data.split == TEST
    fires = [latent_activations(data.sae, z[test], data.head["latents"]) > 0 for z in data.z]
    drawn = bootstrap_weights(data.group[test.numpy()], DRAWS)
    return np.quantile((drawn @ (fires[0].float() - fires[1].float()) / drawn.sum(1, keepdim=True)).numpy(), (0.025, 0.975), axis=0)


def ablation_test(data, model, draws=20):
    """Do the latents that tell train pairs apart do so on test? Set their scores to the mean there, against random ones, of those
    that help on train too, of equal total |weight| → {number: {top, random: summary; fall: how much more accuracy the top ones cost;
    reached: what share of their weight the random ones have}}.

    An intervention on the head's input, not on the language model. That the top ones matter on *train* is by construction.
    """
    parts = [model.contributions(z[data.split == TRAIN]) for z in data.z]
    adds = (parts[0] - parts[1]).mean(0)
    weight = (torch.cat(parts).abs().mean(0) if "w2" in model.head else model.head["w1"].abs()).numpy()
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


def fold(data, model):
    """A linear head is one vector u of the residual stream: its cosine to the mean of chosen minus rejected on train, and to the
    dense head's vector (trained with the same search)."""
    if "w2" in model.head:
        return None
    train, (u, _) = data.split == TRAIN, model.vector()
    _, heads, _, _ = stage3.fit_best(*standardise(*data.z, data.split), data.split, DENSE, (0,), **data.head_meta["settings"])
    _, std = stage2.standardisation(data.z, train)
    cosine = lambda other: float(F.cosine_similarity(u, other, 0))
    return {"norm": float(u.norm()), "cosine_mean_difference": cosine((data.z[0][train] - data.z[1][train]).mean(0)),
            "cosine_dense": cosine(heads[0]["w1"] / std)}


def most_wrong(data, difference, count=10):
    """The test pairs ranked wrong with the greatest confidence."""
    rows = (data.split == TEST).nonzero().flatten().tolist()
    wrong = [n for n in np.argsort(difference, kind="stable")[:count] if difference[n] < 0]
    return [{"id": data.pairs[rows[n]]["id"], "difference": float(difference[n]),
             "confidence": float(1 / (1 + math.exp(difference[n] / float(data.head["temperature"])))),
             "prompt": page.last_turn(data.pairs[rows[n]]["prompt"]),
             **{side: data.pairs[rows[n]][side][:600] for side in ("chosen", "rejected")}} for n in wrong]


def in_words(result, sae_warnings):
    """What a reader should not overlook → list of sentences."""
    found = [f"{name.replace('_', ' ')} ({row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]): {SAYS[name]}"
             for name, row in result["differences"].items() if name in SAYS and row["low"] <= 0 <= row["high"]]
    found += [f"{name.replace('_', ' ')} ({row['mean']:+.3f}): measurably better than SparseRM here"
              for name, row in result["differences"].items() if row["high"] < 0]
    accuracy = result["accuracy"]
    if accuracy["sparserm"]["low"] <= 0.5:
        found.insert(0, "the interval of SparseRM's own accuracy reaches down to one half: no better than a coin is not ruled out")
    if accuracy.get("shuffled_labels", {"low": 0})["low"] > 0.5:
        found.insert(0, "with shuffled labels the method is right more than half the time: test pairs leak into training, look for it")
    if accuracy.get("words", {"high": 1})["high"] < 0.5:
        found.append("words: below one half, so the lead over them looks larger than it is")
    return found + [f"SAE: {w}" for w in sae_warnings]


# ---------------------------------------------------------------- the stage

def head_rewards(data, z):
    """Rewards of the trained head of a run on residual vectors [n, d] → numpy [n]."""
    return stage3.RewardModel(data.head, data.head_meta, None).reward_of(z).numpy()


def other_set(data, name, run):
    """The same head on the test pairs of another run (another data set, same backbone, layer and token rule)."""
    paths, meta = stage2.shard_files(run, data.meta["layer"])
    for key in ("model", "files", "template", "layer", "token", "max_length"):
        if meta[key] != data.meta[key]:
            raise stage1.UserError(f"{key} {meta[key]} there, {data.meta[key]} here · --other {name}={run} · "
                                   f"extract it with the same {key}")
    chunks = list(stage2.read_chunks(paths))
    split, group, _ = read_columns(chunks)
    seen = np.isin(group, data.group[(data.split != TEST).numpy()])         # questions that this head was trained on
    test = (split == TEST) & ~torch.from_numpy(seen)
    if not test.any():
        raise stage1.UserError(f"no test pair that this head has not seen · --other {name}={run} · another data set")
    rewards = [head_rewards(data, torch.cat([c[side] for c in chunks])[test].float()) for side in ("chosen", "rejected")]
    return summary((rewards[0] - rewards[1])[None], group[test.numpy()])


def open_backbone(data, args):
    """The language model for --texts; None where none are asked for."""
    return stage3.RewardModel.load(data.run / "reward_head.safetensors", device=args.device).backbone if args.texts else None


def evaluate(data, args):
    """→ (evaluation, timings): everything of evaluation.json."""
    test = (data.split == TEST)
    groups, times, seeds = data.group[test.numpy()], {}, list(range(args.seeds))

    def timed(name, call):
        started = time.perf_counter()
        result = call()
        times[name] = round(time.perf_counter() - started, 2)
        return result
    others = {name: other_set(data, name, run) for name, run in args.other}        # first: what is refused costs no time
    model, backbone = stage3.RewardModel(data.head, data.head_meta, None), open_backbone(data, args)       # so does this
    latents = timed("latents", lambda: page.latent_rows(data, model, backbone, separation_on_test(data), args.texts))
    reward = [head_rewards(data, z[test]) for z in data.z]
    found = {"sparserm": (data.head_meta["k"], (reward[0] - reward[1])[None]), **timed("controls", lambda: controls(data, seeds))}
    result = {"accuracy": {name: {**summary(d, groups), "choice": choice} for name, (choice, d) in found.items()}, "differences": {}}
    for name, (_, d) in found.items():
        if name != "sparserm":
            result["differences"][name] = gap(found["sparserm"][1], d, groups)
    result["calibration"] = calibration(reward[0] - reward[1], float(data.head["temperature"]))
    result["length"] = length_figures(*reward, *(t[test.numpy()] for t in data.tokens))
    result["curves"] = {}
    if args.sweeps != "none":
        result["curves"]["k"] = timed("k curve", lambda: k_curve(data, seeds, result["accuracy"]["dense"]))
    if args.sweeps == "full":
        result["curves"]["pairs"] = timed("pairs curve", lambda: pairs_curve(data, seeds))
    trained = sum(data.head[n].numel() for n in ("w1", "b1", "w2", "b2") if n in data.head)
    backbone = data.meta["parameters"]
    result["cost"] = {"trained_parameters": trained, "backbone_parameters": backbone, "share": trained / backbone}
    result["other"] = others
    result["sae"] = {**data.meta["health"], "warnings": data.meta["warnings"]}
    result["run"] = {"model": Path(data.meta["model"]).name, "layer": data.meta["layer"], "token": data.meta["token"],
                     "sae": Path(data.meta["sae"]).name} | {      # names, not paths: a page is passed on
        "k": data.head_meta["k"], "settings": data.head_meta["settings"],
        "pairs": {name: int((data.split == s).sum()) for s, name in enumerate(stage1.SPLITS)}}
    result["stability"], result["latents"] = timed("stability", lambda: resampled_selection(data)), latents
    result["explanations"] = timed("explanations", lambda: ablation_test(data, model))
    result["fold"] = fold(data, model)
    result["wrong"] = most_wrong(data, reward[0] - reward[1])
    result["warnings"] = in_words(result, data.meta["warnings"])
    return result, times


def parse_args():
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
        raise stage1.UserError(f"at least one draw is needed · --seeds {args.seeds} · pass a number from 1")
    if args.texts < 0:
        raise stage1.UserError(f"--texts is a number from 0 · --texts {args.texts} · 0 needs no language model")
    for text in args.other:
        if "=" not in text:
            raise stage1.UserError(f"--other needs NAME=DIR · {text} · e.g. --other safe=runs/demo-safe")
    args.other = [tuple(text.split("=", 1)) for text in args.other]
    return args


def main():
    args = parse_args()
    data = Data(args.run, args.sae)
    if args.explain:
        asked = page.pair_to_explain(data, args.explain)            # before the language model is opened
        return page.explain_pair(data, stage3.RewardModel.load(data.run / "reward_head.safetensors", device=args.device), *asked)
    out, parent = Path(args.run) / "evaluation.json", parents(args, data)
    try:
        found = json.loads(out.read_text("utf-8"))
    except (OSError, ValueError):           # none yet, or damaged
        found = {}
    if not isinstance(found, dict) or found.get("parent") != sealed(parent, found):
        result, times = evaluate(data, args)
        found = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.9g}"))
        found["parent"] = sealed(parent, found)
        stage1.write_text(Path(args.run) / "timings.json", json.dumps(times, indent=1) + "\n")
        stage1.write_text(out, json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")     # last: it says that all is done
    report(args, found, page.write_page(found, args.run))


def parents(args, data):
    """What an evaluation depends on: the head (its lineage leads to all the rest), other runs, the settings."""
    others = {name: [stage1.file_hash(p) for p in stage2.shard_files(run, data.meta["layer"])[0]] for name, run in args.other}
    head = stage1.file_hash(Path(args.run) / "reward_head.safetensors")
    return {"head": head, "other": others, "sweeps": args.sweeps, "seeds": args.seeds, "texts": args.texts}


def sealed(parent, found):
    """What an evaluation depends on, and a hash of its numbers: a damaged one is made anew."""
    return {**parent, "numbers": stage1.hash_number(json.dumps({n: v for n, v in found.items() if n != "parent"}, sort_keys=True))}


def report(args, result, written):
    """The table at the end, and in words what it says."""
    a, d = result["accuracy"], result["differences"]
    print(f"\naccuracy on {a['sparserm']['n']} test pairs of {a['sparserm']['groups']} prompts            SparseRM minus it"
          f"\n  {'sparserm':<18} {a['sparserm']['accuracy']:.3f}  [{a['sparserm']['low']:.3f}, {a['sparserm']['high']:.3f}]   "
          f"K = {a['sparserm']['choice']} a side")
    for name in sorted(d, key=lambda n: -a[n]["accuracy"]):
        row, ahead = a[name], d[name]
        print(f"  {name:<18} {row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]   "
              f"{ahead['mean']:+.3f}  [{ahead['low']:+.3f}, {ahead['high']:+.3f}]"
              + (f"   ties {row['ties']:.1%}, as half {row['ties_half']:.3f}" if row["ties"] > 0.005 else ""))
    if "k" in result["curves"]:
        curve = result["curves"]["k"]
        ks = sorted(curve["sparserm"], key=int)
        print("\n  K a side           " + "".join(f"{k:>7}" for k in ks))
        for name in ("sparserm", "random_directions", "random_latents", "activations", "dense"):
            print(f"  {name:<18} " + "".join(f"{curve[name][k]['accuracy']:>7.3f}" for k in ks))
        clear = [k for k in ks if curve["random_directions"][k]["behind"]["low"] > 0]
        print(f"  clearly above random directions at K = {', '.join(clear)} (each K by itself)" if clear else
              "  at no K clearly above random directions: on this data the SAE's choice adds nothing measurable")
    for name, row in result["other"].items():
        print(f"  on {name:<15} {row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]   {row['n']} pairs")
    c, n = result["calibration"], result["length"]
    print(f"\ncalibration  T {c['temperature']:.2f} · NLL {c['nll']:.3f} · Brier {c['brier']:.3f} · ECE {c['ece']:.3f}"
          f"\nlength       correlation with the reward {n['correlation']:+.2f}"
          f"\nparameters   {result['cost']['trained_parameters']:,} trained, {result['cost']['share']:.1e} of the backbone"
          f"\nselection    {result['stability']['mean']:.0%} of the latents are chosen again on resampled train prompts "
          f"(by chance {result['stability']['chance']:.0%})"
          f"\nwritten      {args.run}/evaluation.json, {', '.join(written)}")
    for text in result["warnings"]:
        print("note:", text)
    print(f"\nnext: open {args.run}/report.html in a browser"
          f"\n      python 04_evaluate.py --run {args.run} --explain {shlex.quote(result['wrong'][0]['id']) if result['wrong'] else 'ID'}"
          f"\n      python 05_best_of_n.py sample --prompts data/prompts.jsonl --reward {args.run}/reward_head.safetensors")


if __name__ == "__main__":
    stage1.run_main(main, SAEError)
