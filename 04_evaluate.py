"""Stage 4: does it hold? Accuracy with intervals, controls, curves, latents, a page to look at.

reads   features.safetensors · reward_head.safetensors · activations/ · pairs.jsonl · the SAE
writes  evaluation.json   every number but times        timings.json   seconds
        report.html       one file, opens offline       *.png          its pictures

    python 04_evaluate.py --run runs/demo
    python 04_evaluate.py --run runs/demo --sweeps full --other safe=runs/demo-safe
    python 04_evaluate.py --run runs/demo --explain "Can a duck swim?" "Yes." "No."

Nothing was chosen by test pairs before this stage. Every control gets the same pairs and the same
loss, and its choices on dev:

    dense               the same head on the whole hidden state z
    random_directions   Gaussian directions instead of decoder rows
    random_latents      decoder rows of latents drawn at random among those that fire
    activations         the SAE's activations f_j of the chosen latents instead of <z, d_j>
    words               1- and 2-grams of the response, hashed: what the wording alone gives away
    length              the longer (or the shorter) response, whichever wins on train
    shuffled_labels     the whole method on labels shuffled before selection: must be near 0.5

An interval is the middle 95 % of 2,000 bootstrap draws over groups (prompts). "Better than a
control" needs the interval of the *difference* clear of 0 (there a tie counts half). The paper
reports no intervals.
"""

import argparse
import contextlib
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

from parts import latents, report
from parts.files import UserError, file_hash, load_stage, run_main, write_text
from parts.statistics import (
    bootstrap,
    bootstrap_weights,
    calibration,
    length_figures,
    points,
    side_by_side,
    summary,
)
from sae import SAEError

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
TRAIN, DEV, TEST = stage1.TRAIN, stage1.DEV, stage1.TEST
NO_SPLIT = 3                # a pair that is neither of the three: left out
SIDES = ("chosen", "rejected")
WORD_COLUMNS = 2**13        # at most
FORMAT = 2                  # of evaluation.json: one of an older format is made anew

# dense and words have no K: dev chooses their L2 penalty instead
PENALTIES = (0.0001, 0.001, 0.01, 0.1, 1.0)
DENSE = {penalty: {"columns": slice(None), "weight_decay": penalty} for penalty in PENALTIES}
ALL = {"all": {"columns": slice(None)}}


# ---------------------------------------------------------------- the data of a run

class Pairs:
    """Pairs of a run: z of both sides, split, group, lengths, and their rows in pairs.jsonl."""

    def __init__(self, z, split, group, tokens, pairs):
        self.z = z                  # [chosen, rejected], each [n, d] float32
        self.split = split          # [n]
        self.group = group          # [n] numpy
        self.tokens = tokens        # [chosen, rejected], each [n] numpy
        self.pairs = pairs

    @property
    def train(self):
        """Which pairs are in the train split, bool [n]."""
        return self.split == TRAIN

    @property
    def test(self):
        """Which pairs are in the test split, bool [n]."""
        return self.split == TEST

    def part(self, rows):
        """Only the pairs where rows [n] is true: all that a control may see of them."""
        at = rows.nonzero().flatten().numpy()
        return Pairs([z[rows] for z in self.z], self.split[rows], self.group[at],
                     [tokens[at] for tokens in self.tokens],
                     [self.pairs[n] for n in at])

    def responses(self):
        """The texts of both sides: [chosen, rejected], each a list of n."""
        return [[pair[side] for pair in self.pairs] for side in SIDES]


def read_pairs(run, paths):
    """All pairs of a run, from its activation shards → what Pairs takes."""
    chunks = list(stage2.read_chunks(paths))
    columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    with open(Path(run) / "pairs.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {
        "z": [columns[side].float() for side in SIDES],
        "split": columns["split"],
        "group": columns["group"].numpy(),
        "tokens": [columns[f"{side}_tokens"].numpy() for side in SIDES],
        "pairs": rows,
    }


class Data(Pairs):
    """The pairs of the run that is evaluated, and what stages 2 and 3 recorded."""

    def __init__(self, run, sae_path=None):
        self.run = Path(run)
        self.features, self.meta = load_stage(self.run / "features.safetensors",
                                              "02_select_features.py", "select")
        self.head, self.head_meta = load_stage(self.run / "reward_head.safetensors",
                                               "03_train_head.py", "head")
        paths, _ = stage2.shard_files(run, self.meta["layer"])
        self.check_lineage(paths)
        super().__init__(**read_pairs(run, paths))
        if not self.test.any():
            raise UserError(f"no pair is in the test split · {run} · more pairs, or another "
                            "--split in 01")
        self.sae = self.open_sae(sae_path or self.meta["sae"])
        self.settings = self.head_meta["settings"]      # of fit_head: the controls get the same
        self.total = self.meta["k"]                     # latents a side that were selected

    def check_lineage(self, paths):
        """Refuse files that do not belong together."""
        if [file_hash(path) for path in paths] != self.meta["parent"]["activations"]:
            raise UserError("the activations are not those that features.safetensors was made "
                            f"from · {self.run} · "
                            "run 02 and 03 again")
        if self.head_meta["parent"]["features"] != file_hash(self.run / "features.safetensors"):
            raise UserError("reward_head.safetensors was made from another features.safetensors · "
                            f"{self.run} · run 03 again")

    def open_sae(self, place):
        """The SAE that stage 2 chose the latents with."""
        sae = stage2.open_sae(place, self.meta["sae_dtype"], self.meta["k_sae"])
        if file_hash(sae.info["weights"]) != self.meta["parent"]["sae"]:
            raise UserError(f"not the SAE that features.safetensors was made with · {place} · run "
                            "02 again, or pass --sae")
        return sae


def other_set(data, name, run):
    """The test pairs of another run whose questions this head has not seen."""
    paths, meta = stage2.shard_files(run, data.meta["layer"])
    for key in ("model", "files", "template", "layer", "token", "max_length"):
        if meta[key] != data.meta[key]:
            raise UserError(f"{key} {meta[key]} there, {data.meta[key]} here · --other "
                            f"{name}={run} · extract it with the same {key}")
    other = Pairs(**read_pairs(run, paths))
    # questions that this head was trained on
    seen = np.isin(other.group, data.group[(data.split != TEST).numpy()])
    unseen = other.test & ~torch.from_numpy(seen)
    if not unseen.any():
        raise UserError(f"no test pair that this head has not seen · --other {name}={run} · "
                        "another data set")
    return other.part(unseen)


# ---------------------------------------------------------------- what the controls see of a pair

def score_pairs(pairs, directions):
    """Alignment scores of both sides, [n, len(directions)] each."""
    return [stage2.alignment_scores(z, directions) for z in pairs.z]


def activation_pairs(pairs, sae, chosen_latents):
    """SAE activations of both sides, [n, len(chosen_latents)] each."""
    return [latents.latent_activations(sae, z, chosen_latents) for z in pairs.z]


def gaussian_directions(count, width, seed):
    """Random directions of norm 1, [count, width]."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def living_directions(data, count, seed):
    """Decoder rows [count, d] of random latents that fire on some train response."""
    frequency = data.features["frequency_chosen"] + data.features["frequency_rejected"]
    alive = (frequency > 0).nonzero().flatten()
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
    return data.sae.W_dec[alive[order[:count]]]


def grams(text):
    """The 1- and 2-grams of a text, hashed → set of int."""
    words = re.findall(r"\w+", text.casefold())
    pairs_of_words = [f"{first} {second}" for first, second in zip(words, words[1:])]
    return {zlib.crc32(gram.encode()) % 2**20 for gram in words + pairs_of_words}


class WordFeatures:
    """Responses → rows over the grams of at least two train responses (the WORD_COLUMNS most
    frequent).

    Weighted by rarity, log(responses / responses with this gram); rows of norm 1.
    """

    def __init__(self, texts, split):
        """texts: [chosen, rejected], each a list of n; split [n]."""
        count = Counter()
        for n in (split == TRAIN).nonzero().flatten().tolist():
            for side in texts:
                count.update(grams(side[n]))
        frequent = [gram for gram, responses in count.most_common(WORD_COLUMNS) if responses > 1]
        self.column = {gram: place for place, gram in enumerate(frequent)}
        self.rarity = torch.tensor([math.log(2 * len(split) / count[gram]) for gram in frequent])

    def rows(self, texts):
        """A list of n texts → [n, columns]."""
        matrix = torch.zeros(len(texts), len(self.column))
        for n, text in enumerate(texts):
            known = [self.column[gram] for gram in grams(text) if gram in self.column]
            matrix[n, known] = 1.0
        return F.normalize(matrix * self.rarity, dim=1)

    def __call__(self, texts):
        """Texts of both sides → rows of both sides."""
        return [self.rows(side) for side in texts]


# ---------------------------------------------------------------- one head on one view

class Fitted:
    """A head trained on one view of the train and dev pairs, and that view's scaling."""

    def __init__(self, choice, head, columns, mean, std):
        self.choice = choice        # the name of the option with the lowest dev loss
        self.head = head
        self.columns = columns
        self.mean = mean            # 0 and 1 where nothing is scaled
        self.std = std

    def rewards(self, x):
        """What the head says of one side [n, m] → [n]."""
        return self.head(((x - self.mean) / self.std)[:, self.columns])

    def differences(self, chosen, rejected):
        """r_chosen - r_rejected [n] numpy, of any pairs."""
        return (self.rewards(chosen) - self.rewards(rejected)).numpy()


def fit_control(chosen, rejected, split, options, settings, seeds=(0,), scale=True):
    """Search on dev, as stage 3 does for SparseRM → Fitted. chosen, rejected [n, m].

    scale: standardise on train first. seeds: heads to train, of which the one with the lowest dev
    loss is kept.
    """
    mean, std = torch.zeros(()), torch.ones(())
    if scale:
        mean, std = stage2.standardisation((chosen, rejected), split == TRAIN)
        chosen = (chosen - mean) / std
        rejected = (rejected - mean) / std
    choice, heads, dev_losses, _ = stage3.fit_best(chosen, rejected, split, options, seeds,
                                                   **settings)
    best = heads[int(np.argmin(dev_losses))]
    return Fitted(choice, best, options[choice]["columns"], mean, std)


class Control:
    """One trained control: a view (pairs → [n, m] a side) and the head that was fitted on it."""

    def __init__(self, data, view, options, settings=None, seeds=None, scale=True, train=None):
        """train: the pairs to fit on, where these are not the run's own. seeds: see fit_control."""
        self.view = view
        seeds = range(data.head_meta["asked"]["seeds"]) if seeds is None else seeds
        chosen, rejected = view(train or data)
        self.fitted = fit_control(chosen, rejected, data.split, options, settings or data.settings,
                                  seeds, scale)
        self.choice = self.fitted.choice

    def differences(self, pairs):
        """r_chosen - r_rejected of any pairs [n]."""
        return self.fitted.differences(*self.view(pairs))


# ------------------------------------------ the controls: each gives a list, one for a random draw

def k_options_of(data):
    """The values of K that stage 3 was asked to choose from."""
    return stage3.k_options(data.total, data.head_meta["asked"]["k"])


def dense(data, seeds):
    """The same head on all of z: what SparseRM leaves out."""
    def whole(pairs):
        return pairs.z
    return [Control(data, whole, DENSE)]


def projection(data, directions):
    """SparseRM on other directions [2K, d]."""
    def scores(pairs):
        return score_pairs(pairs, directions)
    return Control(data, scores, k_options_of(data))


def random_directions(data, seeds):
    """Gaussian directions: what any projection of this size tells."""
    width = data.z[0].shape[1]
    return [projection(data, gaussian_directions(2 * data.total, width, seed)) for seed in seeds]


def random_latents(data, seeds):
    """Decoder rows of latents drawn at random: does it matter which ones are taken?"""
    return [projection(data, living_directions(data, 2 * data.total, seed)) for seed in seeds]


def activations(data, seeds):
    """What the chosen latents fire, instead of the projection on their decoder rows."""
    def latents_of(pairs):
        return activation_pairs(pairs, data.sae, data.features["latents"])
    return [Control(data, latents_of, k_options_of(data))]


def words(data, seeds):
    """The wording of the response alone."""
    features = WordFeatures(data.responses(), data.split)

    def rows(pairs):
        return features(pairs.responses())
    return [Control(data, rows, DENSE, {**data.settings, "kind": "linear"}, seeds=(0,),
                    scale=False)]


class Longer:
    """Prefer the longer response, or the shorter, whichever wins on train: no head."""

    def __init__(self, data):
        train = data.train.numpy()
        # 1: the longer one, -1: the shorter
        self.choice = float(np.sign(np.sign(self.longer(data)[train]).sum()))

    def longer(self, pairs):
        """Tokens of chosen minus tokens of rejected [n]."""
        return (pairs.tokens[0] - pairs.tokens[1]).astype(np.float32)

    def differences(self, pairs):
        """Positive where the rule prefers chosen [n]."""
        return self.choice * self.longer(pairs)


def length(data, seeds):
    """The number of tokens alone."""
    return [Longer(data)]


def shuffled_labels(data, seeds):
    """The whole method, selection included, with half of the train and dev pairs swapped."""
    found = []
    for seed in seeds:
        shuffled = data.part(torch.ones_like(data.split, dtype=torch.bool))
        shuffled.z = shuffled_sides(data.z, data.split, seed)
        directions = data.sae.W_dec[select_on(data, shuffled.z, data.split, data.total)]
        found.append(Control(data, scores_on(directions),
                             k_options_up_to(data, len(directions) // 2), train=shuffled))
    return found


def scores_on(directions):
    """The view that projects on these directions."""
    def scores(pairs):
        return score_pairs(pairs, directions)
    return scores


def shuffled_sides(z, split, seed):
    """Swap chosen and rejected of half of the train and dev pairs; test keeps its labels."""
    coin = torch.rand(len(split), generator=torch.Generator().manual_seed(seed)) < 0.5
    swap = (coin & (split != TEST))[:, None]
    chosen, rejected = z
    return [torch.where(swap, rejected, chosen), torch.where(swap, chosen, rejected)]


def k_options_up_to(data, found):
    """The options of K where only `found` latents a side were selected; never none."""
    options = {}
    for k in k_options_of(data):
        if k <= found:
            options |= stage3.k_options(found, k)
    return options or stage3.k_options(found, found)


def select_on(data, z, split, k):
    """Stage 2's selection on the train pairs of another split or labelling → latents."""
    chunk = {"chosen": z[0], "rejected": z[1], "split": split}
    frequency_chosen, frequency_rejected, _ = stage2.firing_frequencies(data.sae, [chunk])
    return stage2.select_latents(frequency_chosen, frequency_rejected, k)


CONTROLS = {"dense": dense, "random_directions": random_directions,
            "random_latents": random_latents,
            "activations": activations, "words": words, "length": length,
            "shuffled_labels": shuffled_labels}
# drawn at random, so more than once
SEVERAL = ("random_directions", "random_latents", "shuffled_labels")


def fit_controls(data, seeds):
    """All controls → {name: list of trained ones, one for a draw}."""
    fitted = {}
    for name, fit in tqdm(CONTROLS.items(), desc="controls", unit="control", disable=None):
        fitted[name] = fit(data, seeds)
    return fitted


def choice_of(name, drawn):
    """What dev chose for a control: one option, or one for each draw."""
    choices = [control.choice for control in drawn]
    return choices if name in SEVERAL else choices[0]


# ---------------------------------------------------------------- curves

def turned(rows):
    """{size: {name: summary}} → {name: {size: summary}}."""
    names = next(iter(rows.values()))
    return {name: {size: row[name] for size, row in rows.items()} for name in names}


def fit_and_test(view, split, options, settings):
    """Fit on train, choose on dev → r_chosen - r_rejected of the test pairs [n_test]."""
    chosen, rejected = view
    fitted = fit_control(chosen, rejected, split, options, settings)
    return fitted.differences(chosen[split == TEST], rejected[split == TEST])


def random_views(data, count, seeds):
    """`count` directions of both random kinds, per seed → {name: list of [chosen, rejected]}."""
    width = data.z[0].shape[1]
    gaussian = [gaussian_directions(count, width, seed) for seed in seeds]
    living = [living_directions(data, count, seed) for seed in seeds]
    return {"random_directions": [score_pairs(data, directions) for directions in gaussian],
            "random_latents": [score_pairs(data, directions) for directions in living]}


def k_curve(data, seeds, dense_row):
    """Test accuracy at each K = 1, 2, 4 …, of all that have a K → {name: {K: summary}}."""
    views = {
        "sparserm": [score_pairs(data, data.features["directions"])],
        "activations": [activation_pairs(data, data.sae, data.features["latents"])],
        **random_views(data, 2 * data.total, seeds),
    }
    groups = data.group[data.test.numpy()]
    rows = {}
    for k, option in tqdm(stage3.k_options(data.total).items(), desc="K curve", unit="K",
                          disable=None):
        found = {}
        for name, draws in views.items():
            found[name] = np.stack([fit_and_test(view, data.split, {k: option},
                                                 data.settings) for view in draws])
        # dense has no K: the same everywhere
        rows[str(k)] = {"dense": dense_row, **side_by_side(found, groups)}
    return turned(rows)


def pairs_curve(data, seeds, sizes=(50, 100, 200, 500, 1000)):
    """Test accuracy with fewer train pairs, selected anew → {name: {number: summary}}."""
    k = data.head_meta["k"]
    groups = data.group[data.test.numpy()]
    train_rows = data.train.nonzero().flatten()
    order = train_rows[torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(0))]
    sizes = [size for size in sizes if size < len(order)] + [len(order)]
    rows = {}
    for size in tqdm(sizes, desc="pairs curve", unit="size", disable=None):
        split = data.split.clone()
        split[order[size:]] = NO_SPLIT
        chosen_latents = select_on(data, data.z, split, k)
        views = {
            "sparserm": [score_pairs(data, data.sae.W_dec[chosen_latents])],
            "activations": [activation_pairs(data, data.sae, chosen_latents)],
            **random_views(data, 2 * k, seeds),
        }
        found = {"dense": fit_and_test(data.z, split, DENSE, data.settings)[None]}
        for name, draws in views.items():
            found[name] = np.stack([fit_and_test(view, split, ALL,
                                                 data.settings) for view in draws])
        rows[str(size)] = side_by_side(found, groups)
    return turned(rows)


# ---------------------------------------------------------------- are the latents worth believing

def train_shares(data, model):
    """What each direction adds to chosen minus rejected on train, on average [2K]; and its |weight|
    [2K] numpy.

    The weight of a direction in an MLP: the mean size of its ablation.
    """
    chosen, rejected = [model.contributions(z[data.train]) for z in data.z]
    if model.head.kind == "linear":
        weight = model.head.w1.abs()
    else:
        weight = torch.cat([chosen, rejected]).abs().mean(0)
    return (chosen - rejected).mean(0), weight.numpy()


def ablation_test(data, model, adds, weight, draws=20):
    """Do the latents that tell train pairs apart do so on test? Set their scores to the mean there,
    against random ones.

    Random ones of those that help on train too, of equal total |weight| → {number: {top, random:
    summary; fall: how much more accuracy the top ones cost; reached: what share of their weight the
    random ones have}}. An intervention on the head's input, not on the language model. That the top
    ones matter on *train* is by construction. adds, weight: see train_shares.
    """
    scores_chosen, scores_rejected = [model.scores_of(z[data.test]) for z in data.z]
    groups = data.group[data.test.numpy()]

    def without(ablated):
        ablated = torch.as_tensor(ablated)
        reward_chosen = model.head(scores_chosen.index_fill(1, ablated, 0.0))
        reward_rejected = model.head(scores_rejected.index_fill(1, ablated, 0.0))
        return (reward_chosen - reward_rejected).numpy()

    order = adds.argsort(descending=True, stable=True)
    helpful = order[adds[order] > 0].numpy()
    rng = np.random.default_rng(0)
    result = {}
    for m in sorted({1, len(helpful) // 8, len(helpful) // 4}):
        if not 0 < m < len(helpful):
            continue
        wanted = weight[helpful[:m]].sum()
        drawn = []
        for _ in range(draws):  # as many others as it takes to reach the same total |weight|
            others = rng.permutation(helpful[m:])
            enough = 1 + int((weight[others].cumsum() < wanted).sum())
            drawn.append(without(others[:enough]))
        top = without(helpful[:m])[None]
        chance = np.stack(drawn)
        fall = bootstrap(points(chance) - points(top), groups)
        result[str(m)] = {"top": summary(top, groups), "random": summary(chance, groups),
                          "reached": float(min(1.0, weight[helpful[m:]].sum() / wanted)),
                          "fall": dict(zip(("mean", "low", "high"), fall))}
    return result


def resampled_selection(data, draws=20):
    """Select again on bootstrap resamples of the train prompts → {k, draws, mean, least, chance}.

    mean, least: the share of the head's latents that are chosen again. chance: the same share where
    the two sides of every pair are swapped at random before all selecting, so that nothing
    separates them: few living latents are chosen again by chance too.
    """
    rows = data.train.nonzero().flatten()
    k = len(data.head["latents"]) // 2
    coin = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)) < 0.5
    true = again_shares(data, rows, torch.ones(len(rows)), k, draws)
    chance = again_shares(data, rows, torch.where(coin, -1.0, 1.0), k, draws)
    return {"k": k, "draws": draws, "mean": float(np.mean(true)), "least": float(min(true)),
            "chance": float(np.mean(chance))}


def again_shares(data, rows, signs, k, draws):
    """The share of the 2k latents selected on all `rows` that each resample selects again, list of
    `draws` numbers.

    signs [n]: -1 where the sides of a pair are swapped.
    """
    weights = bootstrap_weights(data.group[rows.numpy()], draws)            # [draws, n]
    weights = torch.cat([torch.ones(1, len(rows)), weights])  # the first: all pairs once
    separation = torch.zeros(1 + draws, data.sae.d_sae)
    for at in torch.arange(len(rows)).split(max(1, 2**25 // data.sae.d_sae)):
        fires_chosen, fires_rejected = [(data.sae.encode(z[rows[at]]) > 0).float() for z in data.z]
        separation += weights[:, at] @ ((fires_chosen - fires_rejected) * signs[at, None])

    first, *others = [stage2.select_latents(row, torch.zeros_like(row),
                                            k).chunk(2) for row in separation]
    shares = []
    for other in others:
        same = [len(np.intersect1d(*sides)) for sides in zip(first, other)]
        shares.append(sum(same) / (2 * k))
    return shares


def separation_on_test(data, draws=2000):
    """Interval of μ_c - μ_r of the head's latents on the *test* pairs → (low, high) [2K'] each.

    On train it would be too narrow: the latents were chosen there for that difference.
    """
    chosen, rejected = activation_pairs(data.part(data.test), data.sae, data.head["latents"])
    difference = (chosen > 0).float() - (rejected > 0).float()              # [n, 2K']
    weights = bootstrap_weights(data.group[data.test.numpy()], draws)       # [draws, n]
    means = weights @ difference / weights.sum(1, keepdim=True)
    return np.quantile(means.numpy(), (0.025, 0.975), axis=0)


def fold(data, model, dense_control):
    """A linear head is one vector u of the residual stream: its norm, its cosine to the mean of
    chosen minus rejected on train, and to the vector of the dense control's head."""
    if model.head.kind == "mlp":
        return None
    u, _ = model.vector()
    mean_difference = (data.z[0][data.train] - data.z[1][data.train]).mean(0)
    dense_vector = dense_control.fitted.head.w1 / dense_control.fitted.std
    return {"norm": float(u.norm()),
            "cosine_mean_difference": float(F.cosine_similarity(u, mean_difference, 0)),
            "cosine_dense": float(F.cosine_similarity(u, dense_vector, 0))}


# ---------------------------------------------------------------- the stage

class Stopwatch:
    """Seconds of the parts of an evaluation."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, name):
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)


def evaluate(data, args):
    """→ (evaluation, timings): everything of evaluation.json."""
    watch = Stopwatch()
    seeds = range(args.seeds)
    own = data.part(data.test)
    others = {name: other_set(data, name, run) for name, run in args.other}
    model = stage3.RewardModel(data.head, data.head_meta, None)
    backbone = None
    if args.texts:
        backbone = stage3.RewardModel.load(data.run / "reward_head.safetensors",
                                           device=args.device).backbone

    adds, weight = train_shares(data, model)  # what is refused is refused by now, and costs no time
    with watch("latents"):
        latent_rows = latents.latent_rows(data, model.head, adds, backbone,
                                          separation_on_test(data), args.texts)
    with watch("controls"):
        fitted = fit_controls(data, seeds)

    result = {"curves": {}, "latents": latent_rows, **compare(data, model, own, fitted)}
    result["other"] = {name: compare_on(pairs, model, fitted) for name, pairs in others.items()}
    if args.sweeps != "none":
        with watch("k curve"):
            result["curves"]["k"] = k_curve(data, seeds, result["accuracy"]["dense"])
    if args.sweeps == "full":
        with watch("pairs curve"):
            result["curves"]["pairs"] = pairs_curve(data, seeds)
    with watch("stability"):
        result["stability"] = resampled_selection(data)
    with watch("explanations"):
        result["explanations"] = ablation_test(data, model, adds, weight)

    result["fold"] = fold(data, model, fitted["dense"][0])
    result |= about_the_run(data, model)
    result["warnings"] = report.in_words(result, data.meta["warnings"])
    return result, watch.seconds


def margins_of(model, pairs):
    """The head's rewards of both sides, [n] numpy each."""
    return [model.reward_of(z).numpy() for z in pairs.z]


def rows_of_accuracy(pairs, model, fitted):
    """SparseRM and all controls on some pairs → {name: summary, of a control with `behind`}."""
    reward_chosen, reward_rejected = margins_of(model, pairs)
    found = {"sparserm": (reward_chosen - reward_rejected)[None]}
    for name, drawn in fitted.items():
        found[name] = np.stack([control.differences(pairs) for control in drawn])
    return side_by_side(found, pairs.group)


def compare(data, model, own, fitted):
    """Everything said of the run's own test pairs."""
    rows = rows_of_accuracy(own, model, fitted)
    rows["sparserm"]["choice"] = data.head_meta["k"]
    differences = {}
    for name, drawn in fitted.items():
        differences[name] = rows[name].pop("behind")
        rows[name]["choice"] = choice_of(name, drawn)

    reward_chosen, reward_rejected = margins_of(model, own)
    margins = reward_chosen - reward_rejected
    return {"accuracy": rows, "differences": differences,
            "calibration": calibration(margins, float(data.head["temperature"])),
            "length": length_figures(reward_chosen, reward_rejected, *own.tokens),
            "wrong": latents.most_wrong(data, margins)}


def compare_on(pairs, model, fitted):
    """The same heads on the test pairs of another run → the summary of SparseRM, and `controls`."""
    rows = rows_of_accuracy(pairs, model, fitted)
    return {**rows.pop("sparserm"), "controls": rows}


def about_the_run(data, model):
    """What was evaluated: cost, SAE, settings. Names, not paths: a page is passed on."""
    trained = stage3.trained_parameters(model.head)
    backbone_parameters = data.meta["parameters"]
    sources = Counter(str(pair["source"]) for pair in data.pairs).most_common(5)
    pairs_of_split = {}
    for number, name in enumerate(stage1.SPLITS):
        pairs_of_split[name] = int((data.split == number).sum())
    return {
        "cost": {"trained_parameters": trained, "backbone_parameters": backbone_parameters,
                 "share": trained / backbone_parameters},
        "sae": {**data.meta["health"], "warnings": data.meta["warnings"]},
        "run": {
            "model": Path(data.meta["model"]).name,
            "sae": Path(data.meta["sae"]).name,
            "layer": data.meta["layer"],
            "token": data.meta["token"],
            "sources": [name for name, _ in sources],
            "k": data.head_meta["k"],
            "settings": data.settings,
            "pairs": pairs_of_split,
        },
    }


def rounded(value):
    """9 significant digits of every float: the last ones differ from machine to machine."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def parents(args, data):
    """What an evaluation depends on: the head, the other runs, the settings."""
    others = {}
    for name, run in args.other:
        paths, _ = stage2.shard_files(run, data.meta["layer"])
        others[name] = [file_hash(path) for path in paths]
    head = file_hash(Path(args.run) / "reward_head.safetensors")
    return {"format": FORMAT, "head": head, "other": others, "sweeps": args.sweeps,
            "seeds": args.seeds, "texts": args.texts}


def sealed(parent, found):
    """What an evaluation depends on, and a hash of its numbers: a damaged one is made anew."""
    numbers = {name: value for name, value in found.items() if name != "parent"}
    return {**parent, "numbers": stage1.hash_number(json.dumps(numbers, sort_keys=True))}


def earlier_evaluation(path, parent):
    """The evaluation that lies there, if it is whole and of the same parents; else None."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):           # none yet, or damaged
        return None
    if not isinstance(found, dict) or found.get("parent") != sealed(parent, found):
        return None
    return found


def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", default="runs/demo",
                   help="folder of the run (default runs/demo)")
    p.add_argument("--sae",
                   help="the SAE, where it is not at the place recorded by stage 2")
    p.add_argument("--other", action="append", default=[], metavar="NAME=DIR",
                   help="also score the test pairs of another run (repeatable)")
    p.add_argument("--sweeps", choices=("none", "small", "full"), default="small",
                   help="curves: none, K, or K and number of pairs (default small)")
    p.add_argument("--seeds", type=int, default=5,
                   help="draws of random directions, latents and labels (default 5)")
    p.add_argument("--texts", type=int, default=3,
                   help="texts shown at either end of a latent; 0 needs no language model (default "
                        "3)")
    p.add_argument("--explain", nargs="+", metavar="ID",
                   help="only this: why one response scores higher; a pair's id, or PROMPT A B")
    p.add_argument("--device", default="auto",
                   help="of the language model, for --texts and --explain (default auto)")
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")
    args = p.parse_args()
    if args.seeds < 1:
        raise UserError(f"one draw is needed at least · --seeds {args.seeds} · a number from 1")
    if args.texts < 0:
        raise UserError(f"--texts is a number from 0 · --texts {args.texts} · 0 needs no language "
                        "model")
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
        # before the language model is opened
        words, names = latents.pair_to_explain(data, args.explain)
        model = stage3.RewardModel.load(data.run / "reward_head.safetensors", device=args.device)
        latents.explain_pair(data, model, words, names)
        return

    out = Path(args.run) / "evaluation.json"
    parent = parents(args, data)
    found = earlier_evaluation(out, parent)
    if found is None:
        result, seconds = evaluate(data, args)
        found = json.loads(json.dumps(rounded(result)))                 # as it will be read again
        found["parent"] = sealed(parent, found)
        write_text(Path(args.run) / "timings.json", json.dumps(seconds, indent=1) + "\n")
        # last: all is done
        write_text(out, json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    report.print_report(args.run, found, report.write_page(found, args.run))


if __name__ == "__main__":
    run_main(main, SAEError)
