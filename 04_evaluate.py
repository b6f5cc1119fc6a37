"""Stage 4: does it hold? Accuracy with intervals, controls, curves of K and of the number of pairs.

reads   features.safetensors · reward_head.safetensors · activations/ · pairs.jsonl · the SAE
writes  evaluation.json   every number but times        timings.json   seconds

    python 04_evaluate.py --run runs/demo
    python 04_evaluate.py --run runs/demo --sweeps full --other safe=runs/demo-safe

Test pairs are read here for the first time. Every control gets the same pairs, the same loss and the same search on dev:

    dense               the same head on the whole hidden state z
    random_directions   Gaussian directions instead of decoder rows
    random_latents      decoder rows of latents drawn at random among those that fire
    activations         the SAE's activations f_j of the chosen latents instead of <z, d_j>
    words               1- and 2-grams of the response, hashed: what the wording alone gives away
    length              the longer (or the shorter) response, whichever wins on train
    shuffled_labels     the whole method on labels shuffled before selection: must be near 0.5

An interval is the middle 95 % of 2,000 bootstrap draws over groups (prompts). "Better than a control" needs the interval of
the *difference* clear of 0. The paper reports no intervals.
"""

import argparse
import importlib
import json
import math
import re
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sae import SAEError, load_sae

stage1, stage2, stage3 = (importlib.import_module(n) for n in ("01_extract", "02_select_features", "03_train_head"))
TRAIN, DEV, TEST = range(3)
DECAYS = (0.001, 0.01, 0.1, 1.0)        # dense and words have no K: dev chooses their L2 penalty instead
WORD_COLUMNS = 2**13     # at most
DRAWS = 2000


# ---------------------------------------------------------------- statistics

def bootstrap(values, groups, draws=DRAWS, seed=0):
    """Mean of per-pair values [n] → (mean, low, high): percentile bootstrap over groups, 95 %."""
    _, inverse = np.unique(groups, return_inverse=True)
    total, count = np.bincount(inverse, values), np.bincount(inverse)
    pick = np.random.default_rng(seed).integers(len(count), size=(draws, len(count)))
    means = total[pick].sum(1) / count[pick].sum(1)
    return float(np.mean(values)), *map(float, np.quantile(means, (0.025, 0.975)))


def summary(differences, groups):
    """r_chosen - r_rejected of each seed [seeds, n] → accuracy (strict), interval, ties and the figure with ties as half."""
    right, ties = (differences > 0).astype(float), (differences == 0).astype(float)
    mean, low, high = bootstrap(right.mean(0), groups)
    return {"accuracy": mean, "low": low, "high": high, "ties": float(ties.mean()), "ties_half": float((right + ties / 2).mean()),
            "n": len(groups), "groups": len(np.unique(groups)), "seeds": right.mean(1).tolist()}


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
        run = Path(run)
        self.features, self.meta = stage1.load_stage(run / "features.safetensors", "02_select_features.py")
        self.head, self.head_meta = stage1.load_stage(run / "reward_head.safetensors", "03_train_head.py")
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
        self.sae = load_sae(sae_path or self.meta["sae"])
        if stage2.sae_hash(sae_path or self.meta["sae"], self.sae) != self.meta["parent"]["sae"]:
            raise stage1.UserError(f"not the SAE that features.safetensors was made with · {sae_path or self.meta['sae']} · run 02 again")


def read_columns(chunks):
    """Chunks of shards → split [n], group [n], (chosen, rejected) lengths."""
    column = lambda name: torch.cat([c[name] for c in chunks])
    return column("split"), column("group").numpy(), (column("chosen_tokens").numpy(), column("rejected_tokens").numpy())


def standardise(chosen, rejected, split):
    """Scores of both sides → the same with mean 0, std 1 on train."""
    train = split == TRAIN
    mean, std = stage2.standardisation(torch.cat([chosen[train], rejected[train]]))
    return (chosen - mean) / std, (rejected - mean) / std


def differences(heads, columns, chosen, rejected, split):
    """r_chosen - r_rejected of the test pairs for each head → [heads, n_test]."""
    c, r = chosen[split == TEST][:, columns], rejected[split == TEST][:, columns]
    return np.stack([(stage3.apply_head(h, c) - stage3.apply_head(h, r)).numpy() for h in heads])


def fit_and_test(chosen, rejected, split, options, seeds, settings):
    """Standardise, search on dev, read test → (name of the chosen option, r_chosen - r_rejected [seeds, n_test])."""
    chosen, rejected = standardise(chosen, rejected, split)
    name, heads, _, _ = stage3.fit_best(chosen, rejected, split, options, seeds, **settings)
    return name, differences(heads, options[name]["columns"], chosen, rejected, split)


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


def method_from_scratch(data, z, split, seeds, k_total, options, settings):
    """Selection, projection, head on the given sides and split (for shuffled labels and for fewer pairs)."""
    chunk = {"chosen": z[0], "rejected": z[1], "split": split}
    latents = stage2.select_latents(*stage2.firing_frequencies(data.sae, [chunk])[:2], k_total)
    total = len(latents) // 2
    options = {k: o for k, o in stage3.k_options(total).items() if k in options} or stage3.k_options(total, total)
    scores = [stage2.alignment_scores(side, data.sae.W_dec[latents]) for side in z]
    return fit_and_test(*scores, split, options, seeds, settings)


def controls(data, seeds):
    """All controls → {name: (chosen option, r_chosen - r_rejected [seeds, n_test])}."""
    f, split, settings = data.features, data.split, data.head_meta["settings"]
    total, width = data.meta["k"], data.z[0].shape[1]
    options = stage3.k_options(total, "auto" if data.head_meta["k_curve"] else data.head_meta["k"])
    decays = {d: {"columns": slice(None), "weight_decay": d, "kind": "linear"} for d in DECAYS}
    frequency = f["frequency_chosen"] + f["frequency_rejected"]

    def project_all(make):
        fits = [fit_and_test(*score_pairs(data, make(s)), split, options, [0], settings) for s in seeds]
        return [name for name, _ in fits], np.concatenate([d for _, d in fits])
    texts = [[p[side] for p in data.pairs] for side in ("chosen", "rejected")]
    longer = [torch.from_numpy(t).float()[:, None] for t in data.tokens]
    sign = torch.sign((longer[0] - longer[1])[split == TRAIN].sign().sum())
    jobs = {
        "dense": lambda: fit_and_test(*data.z, split, decays, [0], settings),
        "random_directions": lambda: project_all(lambda s: gaussian_directions(2 * total, width, s)),
        "random_latents": lambda: project_all(lambda s: data.sae.W_dec[random_latents(frequency, 2 * total, s)]),
        "activations": lambda: fit_and_test(*activation_pairs(data, f["latents"]), split, options, [0], settings),
        "words": lambda: fit_and_test(*word_features(texts, split), split, decays, [0], settings),
        "length": lambda: (float(sign), ((longer[0] - longer[1]) * sign)[split == TEST].T.numpy()),
        "shuffled_labels": lambda: shuffled(data, seeds, total, options, settings),
    }
    return {name: job() for name, job in tqdm(jobs.items(), desc="controls", unit="control", disable=None)}


def shuffled(data, seeds, total, options, settings):
    """The whole method on shuffled labels, once for each seed."""
    fits = [method_from_scratch(data, shuffled_sides(data.z, data.split, s), data.split, [0], total, options, settings) for s in seeds]
    return [name for name, _ in fits], np.concatenate([d for _, d in fits])


# ---------------------------------------------------------------- curves

def k_curve(data, seeds):
    """Accuracy on test with K fixed: SparseRM and the controls that have a K, K = 1, 2, 4 … → {name: {K: summary}}."""
    f, split, settings, total = data.features, data.split, data.head_meta["settings"], data.meta["k"]
    groups = data.group[(split == TEST).numpy()]
    frequency, width = f["frequency_chosen"] + f["frequency_rejected"], data.z[0].shape[1]
    sources = {"sparserm": [f["directions"]], "random_directions": [gaussian_directions(2 * total, width, s) for s in seeds],
               "random_latents": [data.sae.W_dec[random_latents(frequency, 2 * total, s)] for s in seeds]}
    scores = {name: [score_pairs(data, d) for d in many] for name, many in sources.items()}
    scores["activations"] = [activation_pairs(data, f["latents"])]
    options, curve = stage3.k_options(total), {name: {} for name in scores}
    for k in tqdm(options, desc="K curve", unit="K", disable=None):
        found = {name: np.concatenate([fit_and_test(*both, split, {k: options[k]}, [0], settings)[1] for both in many])
                 for name, many in scores.items()}
        for name, d in found.items():
            curve[name][str(k)] = summary(d, groups)
            if name != "sparserm":
                gap = bootstrap((found["sparserm"] > 0).mean(0) - (d > 0).mean(0), groups)
                curve[name][str(k)]["behind"] = dict(zip(("mean", "low", "high"), gap))
    return curve


def pairs_curve(data, seeds, sizes=(50, 100, 200, 500, 1000)):
    """Accuracy on test with fewer train pairs, selection redone on them → {name: {number: summary}}."""
    split, settings = data.split, data.head_meta["settings"]
    groups, train = data.group[(split == TEST).numpy()], (split == TRAIN).nonzero().flatten()
    order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    k, width = data.head_meta["k"], data.z[0].shape[1]
    options, curve = {k: None}, {name: {} for name in ("sparserm", "dense", "random_directions", "random_latents", "activations")}
    frequency = data.features["frequency_chosen"] + data.features["frequency_rejected"]
    fixed = {k: {"columns": slice(None)}}
    for n in tqdm([*(s for s in sizes if s < len(train)), len(train)], desc="pairs curve", unit="size", disable=None):
        part = split.clone()
        part[order[n:]] = 3                     # neither train, dev nor test
        found = {"sparserm": method_from_scratch(data, data.z, part, [0], k, options, settings)[1],
                 "dense": fit_and_test(*data.z, part, {d: {"columns": slice(None), "weight_decay": d} for d in DECAYS}, [0], settings)[1]}
        chunk = {"chosen": data.z[0], "rejected": data.z[1], "split": part}
        latents = stage2.select_latents(*stage2.firing_frequencies(data.sae, [chunk])[:2], k)
        found["activations"] = fit_and_test(*activation_pairs(data, latents), part, fixed, [0], settings)[1]
        for name, make in (("random_directions", lambda s: gaussian_directions(2 * k, width, s)),
                           ("random_latents", lambda s: data.sae.W_dec[random_latents(frequency, 2 * k, s)])):
            found[name] = np.concatenate([fit_and_test(*score_pairs(data, make(s)), part, fixed, [0], settings)[1] for s in seeds])
        for name, d in found.items():
            curve[name][str(n)] = summary(d, groups)
    return curve


# ---------------------------------------------------------------- the stage

def head_rewards(data, z):
    """Rewards of the trained head of a run on residual vectors [n, d] → numpy [n]."""
    return stage3.RewardModel(data.head, data.head_meta, None).reward_of(z).numpy()


def other_set(data, name, run):
    """The same head on the test pairs of another run (another data set, same backbone, layer and token rule)."""
    paths, meta = stage2.shard_files(run, data.meta["layer"])
    for key in ("model", "template", "layer", "token"):
        if meta[key] != data.meta[key]:
            raise stage1.UserError(f"{key} {meta[key]} there, {data.meta[key]} here · --other {name}={run} · "
                                   f"extract it with the same {key}")
    chunks = list(stage2.read_chunks(paths))
    split, group, _ = read_columns(chunks)
    test = split == TEST
    rewards = [head_rewards(data, torch.cat([c[side] for c in chunks])[test].float()) for side in ("chosen", "rejected")]
    return summary((rewards[0] - rewards[1])[None], group[test.numpy()])


def evaluate(data, args):
    """→ (evaluation, timings): everything of evaluation.json."""
    test = (data.split == TEST)
    groups, times, seeds = data.group[test.numpy()], {}, list(range(args.seeds))

    def timed(name, call):
        started = time.perf_counter()
        result = call()
        times[name] = round(time.perf_counter() - started, 2)
        return result
    reward = [head_rewards(data, z[test]) for z in data.z]
    found = {"sparserm": (data.head_meta["k"], (reward[0] - reward[1])[None]), **timed("controls", lambda: controls(data, seeds))}
    result = {"accuracy": {name: {**summary(d, groups), "choice": choice} for name, (choice, d) in found.items()}, "differences": {}}
    for name, (_, d) in found.items():
        if name != "sparserm":
            gap = bootstrap((found["sparserm"][1] > 0).mean(0) - (d > 0).mean(0), groups)
            result["differences"][name] = dict(zip(("mean", "low", "high"), gap))
    result["calibration"] = calibration(reward[0] - reward[1], float(data.head["temperature"]))
    result["length"] = length_figures(*reward, *(t[test.numpy()] for t in data.tokens))
    result["curves"] = {}
    if args.sweeps != "none":
        result["curves"]["k"] = timed("k curve", lambda: k_curve(data, seeds if args.sweeps == "full" else seeds[:3]))
    if args.sweeps == "full":
        result["curves"]["pairs"] = timed("pairs curve", lambda: pairs_curve(data, seeds))
    trained = sum(data.head[n].numel() for n in ("w1", "b1", "w2", "b2") if n in data.head)
    backbone = data.meta["parameters"]
    result["cost"] = {"trained_parameters": trained, "backbone_parameters": backbone, "share": trained / backbone}
    result["other"] = {name: other_set(data, name, run) for name, run in args.other}
    result["sae"] = {**data.meta["health"], "warnings": data.meta["warnings"]}
    result["run"] = {n: data.meta[n] for n in ("model", "layer", "token", "sae")} | {
        "k": data.head_meta["k"], "settings": data.head_meta["settings"],
        "pairs": {name: int((data.split == s).sum()) for s, name in enumerate(stage1.SPLITS)}}
    return result, times


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", default="runs/demo", help="folder of the run (default runs/demo)")
    p.add_argument("--sae", help="the SAE, where it is not at the place recorded by stage 2")
    p.add_argument("--other", action="append", default=[], metavar="NAME=DIR", help="also score the test pairs of another run (repeatable)")
    p.add_argument("--sweeps", choices=("none", "small", "full"), default="small",
                   help="curves: none, K, or K and number of pairs (default small)")
    p.add_argument("--seeds", type=int, default=5, help="draws of random directions, latents and labels (default 5)")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = p.parse_args()
    for text in args.other:
        if "=" not in text:
            raise stage1.UserError(f"--other needs NAME=DIR · {text} · e.g. --other safe=runs/demo-safe")
    args.other = [tuple(text.split("=", 1)) for text in args.other]
    return args


def main():
    args = parse_args()
    out, parent = Path(args.run) / "evaluation.json", parents(args)
    found = json.loads(out.read_text("utf-8")) if out.exists() else {}
    if found.get("parent") != parent:
        result, times = evaluate(Data(args.run, args.sae), args)
        found = json.loads(json.dumps({**result, "parent": parent}), parse_float=lambda x: round(float(x), 9))
        stage1.write_text(out, json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        stage1.write_text(Path(args.run) / "timings.json", json.dumps(times, indent=1) + "\n")
    report(args, found)


def parents(args):
    """What an evaluation depends on: the head (its lineage leads to all the rest), other runs, the settings."""
    head = Path(args.run) / "reward_head.safetensors"
    stage1.read_meta(head, "03_train_head.py")
    others = {name: [stage1.file_hash(p) for p in stage2.shard_files(run)[0]] for name, run in args.other}
    return {"head": stage1.file_hash(head), "other": others, "sweeps": args.sweeps, "seeds": args.seeds}


def report(args, result):
    """The table at the end, and in words what it says."""
    a, d = result["accuracy"], result["differences"]
    print(f"\naccuracy on {a['sparserm']['n']} test pairs of {a['sparserm']['groups']} prompts            SparseRM minus it"
          f"\n  {'sparserm':<18} {a['sparserm']['accuracy']:.3f}  [{a['sparserm']['low']:.3f}, {a['sparserm']['high']:.3f}]   "
          f"K = {a['sparserm']['choice']} a side")
    for name in sorted(d, key=lambda n: -a[n]["accuracy"]):
        row, gap = a[name], d[name]
        print(f"  {name:<18} {row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]   "
              f"{gap['mean']:+.3f}  [{gap['low']:+.3f}, {gap['high']:+.3f}]"
              + (f"   ties {row['ties']:.1%}" if row["ties"] > 0.005 else ""))
    if "k" in result["curves"]:
        curve = result["curves"]["k"]
        ks = sorted(curve["sparserm"], key=int)
        print("\n  K a side           " + "".join(f"{k:>7}" for k in ks))
        for name in ("sparserm", "random_directions", "random_latents", "activations"):
            print(f"  {name:<18} " + "".join(f"{curve[name][k]['accuracy']:>7.3f}" for k in ks))
        clear = [k for k in ks if curve["random_directions"][k]["behind"]["low"] > 0]
        print(f"  clearly above random directions at K = {', '.join(clear)}" if clear else
              "  at no K clearly above random directions: on this data the SAE's choice adds nothing measurable")
    for name, row in result["other"].items():
        print(f"  on {name:<15} {row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]   {row['n']} pairs")
    c, n = result["calibration"], result["length"]
    print(f"\ncalibration  T {c['temperature']:.2f} · NLL {c['nll']:.3f} · Brier {c['brier']:.3f} · ECE {c['ece']:.3f}"
          f"\nlength       correlation with the reward {n['correlation']:+.2f}"
          f"\nparameters   {result['cost']['trained_parameters']:,} trained, {result['cost']['share']:.1e} of the backbone"
          f"\nwritten      {args.run}/evaluation.json"
          f"\n\nnext: python 05_best_of_n.py sample --prompts data/prompts.jsonl --reward {args.run}/reward_head.safetensors")


if __name__ == "__main__":
    stage1.run_main(main, SAEError)
