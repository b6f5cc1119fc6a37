"""Stage 4: does it hold? A verdict in words, accuracy with intervals, controls, curves, a page.

reads   features.safetensors · reward_head.safetensors · activations/ · pairs.jsonl · the SAE
writes  evaluation.json     every number but times      timings.json    seconds
        report.html         one file, opens offline     *.png           its pictures

    python 04_evaluate.py --run runs/demo-safe
    python 04_evaluate.py --run runs/demo-safe --sweeps full --other truthful=runs/demo-truthful
    python 04_evaluate.py --run runs/demo-safe --explain "Can a duck swim?" "Yes." "No, it cannot."

Two questions, kept apart. *How good is this head?* One number on the test split, which no choice of
this run has seen. *Does the method need its parts?* Five folds over all pairs: each pair is tested
once, by heads trained on the other four fifths, and everything is chosen again within those:
latents, mean and std, K and the penalty, by cross-validation inside. Every control gets the same
search:

    dense                   all of the hidden state z
    random_directions       Gaussian directions instead of decoder rows
    picked_directions       of 16,384 Gaussian ones those that separate best: the same freedom to
                            choose, without an SAE
    picked_latents          of at most 16,384 decoder rows those that separate best, by the same
                            statistic
    difference_of_means     one direction, mean z of chosen minus mean z of rejected
    principal_directions    of the differences z_chosen - z_rejected
    random_latents          decoder rows of latents drawn among those that fire
    activations             the SAE's activations f_j of the chosen latents instead of <z, d_j>
    words                   1- and 2-grams of the response: what the wording alone gives away
    length                  the longer (or the shorter) response, whichever wins on the other folds
    blind                   dense, on responses read under one fixed prompt that is not theirs: what
                            the answer gives away without its question (on 300 pairs at most)
    shuffled_labels         the whole method on shuffled labels: about one half. One draw: where
                            the sides are easily told, a small imbalance of it is learned
    paper                   the paper's own head: MLP of 512, margin loss, K = 128

An interval is the middle 95 % of 2,000 bootstrap draws over prompts. "Better than a control" needs
the interval of the *difference* clear of 0 (there a tie counts half). The paper reports no
intervals.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import re
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from parts import contexts, explain, latents, report
from parts.chat import render
from parts.devices import one_thread
from parts.files import (
    UserError,
    file_hash,
    load_stage,
    read_json_rows,
    run_main,
    write_text,
)
from parts.statistics import (
    bootstrap,
    calibration,
    gap,
    length_figures,
    side_by_side,
    summary,
)
from sae import SAEError

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
TEST = stage1.TEST
SIDES = ("chosen", "rejected")
CANDIDATES = 16_384         # directions that the picked controls choose from, at most
WORD_COLUMNS = 2**13        # grams, at most
BLIND_PAIRS = 300
SHOWN_LATENTS = 20          # with contexts
QUIZZED_LATENTS = 10
BLIND_PROMPT = "Please answer."
FORMAT = 4                  # of evaluation.json: one of an older format is made anew


# ---------------------------------------------------------------- the data of a run

class Pairs:
    """Pairs with z of both sides [n, d], group, fold, response lengths, and rows in pairs.jsonl."""

    def __init__(self, z, split, group, tokens, pairs, folds=5):
        self.z = z                  # [chosen, rejected], each [n, d] float32
        self.split = split          # [n]
        self.group = group          # [n] numpy
        self.tokens = tokens        # [chosen, rejected], each [n] numpy
        self.pairs = pairs
        self.folds = min(folds, len(np.unique(group)))
        everything = torch.ones(len(split), dtype=torch.bool)
        self.fold = stage2.folds_of(torch.from_numpy(group), everything, self.folds)    # [n]

    def part(self, rows):
        """Only the pairs where rows [n] is true."""
        at = rows.nonzero().flatten().numpy()
        return Pairs([z[rows] for z in self.z], self.split[rows], self.group[at],
                     [tokens[at] for tokens in self.tokens], [self.pairs[n] for n in at],
                     self.folds)

    def used(self, left_out):
        """Which pairs are in none of these folds, bool [n]."""
        return ~torch.isin(self.fold, torch.tensor(left_out, dtype=torch.int8))

    def responses(self):
        """The texts of both sides: [chosen, rejected], each a list of n."""
        return [[pair[side] for pair in self.pairs] for side in SIDES]


def read_pairs(run, paths, meta=None):
    """All pairs of a run, from its shards → what Pairs takes.

    meta: of features.safetensors, for z as stage 2 projects it; else z as it was extracted.
    """
    chunks = list(stage2.read_chunks(paths))
    columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    z = [columns[side].float() for side in SIDES]
    if meta:
        z = [stage2.normalise(side, meta["normalise"], meta["norm_eps"]) for side in z]
    return {"z": z, "split": columns["split"], "group": columns["group"].numpy(),
            "tokens": [columns[f"{side}_tokens"].numpy() for side in SIDES],
            "pairs": read_json_rows(Path(run) / "pairs.jsonl")}


class Data(Pairs):
    """The pairs of the run that is evaluated, and what stages 2 and 3 recorded."""

    def __init__(self, run, name=None, sae_path=None, folds=5):
        self.run = Path(run)
        self.folder = stage2.folder_of(run, name)
        self.head_path = self.folder / "reward_head.safetensors"
        features = stage2.features_path(run, name)
        self.features, self.meta = load_stage(features, "02_select_features.py", "select")
        self.head, self.head_meta = load_stage(self.head_path, "03_train_head.py", "head")
        paths, _ = stage2.shard_files(run, self.meta["layer"], self.meta["token"])
        if [file_hash(path) for path in paths] != self.meta["parent"]["activations"]:
            raise UserError("the activations are not those that features.safetensors was made "
                            f"from · {run} · run 02 and 03 again")
        if self.head_meta["parent"]["features"] != file_hash(features):
            raise UserError(f"{self.head_path} was made from another features.safetensors · "
                            f"{run} · run 03 again")
        super().__init__(**read_pairs(run, paths, self.meta), folds=folds)
        if self.folds < 3:
            raise UserError(f"{self.folds} prompts cannot be tested by folds · {run} · "
                            "more pairs: 200 prompts are a start")
        self.sae = self.open_sae(sae_path or self.meta["sae"])
        lowest, highest = self.head["latents"].aminmax()
        if lowest < 0 or highest >= self.sae.d_sae:
            raise UserError(f"it names latents that the SAE does not have · {self.head_path} · "
                            "run 03 again")
        self.settings = self.head_meta["settings"]
        self.asked = self.head_meta["asked"]
        self.total = self.meta["k"]                 # latents a side that stage 2 kept
        self.counts = fold_counts(self.sae, self.sae_z, self.fold)

    @functools.cached_property
    def sae_z(self):
        """z as the SAE reads it: not normalised."""
        if self.meta["normalise"] == "none":
            return self.z
        paths, _ = stage2.shard_files(self.run, self.meta["layer"], self.meta["token"])
        return read_pairs(self.run, paths)["z"]

    def open_sae(self, place):
        """The SAE that stage 2 chose the latents with."""
        sae = stage2.open_sae(place, self.meta["sae_dtype"], self.meta["k_sae"])
        if file_hash(sae.info["weights"]) != self.meta["parent"]["sae"]:
            raise UserError("not the SAE that features.safetensors was made with · "
                            f"{place} · run 02 again, or pass --sae")
        return sae

    def selected(self, left_out):
        """Stage 2's selection without some folds → latents."""
        return select_without(self.counts, self.fold, left_out, self.meta["k_asked"])

    @functools.cached_property
    def selections(self):
        """{folds left out: latents}, for every training."""
        return {left_out: self.selected(left_out) for left_out in self.left_outs()}

    def left_outs(self):
        """Every set of folds that is left out of a training: none, one, two."""
        numbers = range(self.folds)
        return [(), *itertools.combinations(numbers, 1), *itertools.combinations(numbers, 2)]


def fold_counts(sae, z, fold):
    """In how many responses of each fold does each latent fire → [folds, 2, d_sae]."""
    return stage2.firing_counts(sae, [{"chosen": z[0], "rejected": z[1]}], fold)


def select_without(counts, fold, left_out, k):
    """Stage 2's selection from fold_counts(), some folds left out → latents."""
    return stage2.select_latents(*stage2.frequencies(counts, fold, left_out), k)


def other_set(data, name, run):
    """The pairs of another run whose questions are not in this one."""
    paths, meta = stage2.shard_files(run, data.meta["layer"], data.meta["token"])
    for key in ("model", "files", "template", "layer", "token", "max_length"):
        if meta[key] != data.meta[key]:
            raise UserError(f"{key} {meta[key]} there, {data.meta[key]} here · "
                            f"--other {name}={run} · extract it with the same {key}")
    other = Pairs(**read_pairs(run, paths, data.meta))
    unseen = torch.from_numpy(~np.isin(other.group, data.group))
    if not unseen.any():
        raise UserError(f"no question that this run has not · --other {name}={run} · another data "
                        "set; for pairs of the same questions score the test pairs with "
                        "RewardModel")
    return other.part(unseen)


# ---------------------------------------------------------------- folds

@dataclass
class View:
    """What a head sees of pairs."""
    scores: object              # function of Pairs → [chosen, rejected], [n, m] each
    columns: object = None      # function of K → column numbers; None: there is no K
    scale: bool = True          # standardise first


def first_columns(k):
    """Of directions in order: the first 2K."""
    return torch.arange(2 * k)


@dataclass
class Outcome:
    """A method tested on every pair once."""
    differences: np.ndarray                         # r_chosen - r_rejected [n]
    choices: list = field(default_factory=list)     # (K, L2) of each fold
    by_k: dict = field(default_factory=dict)        # {K: differences [n]}
    of_others: dict = field(default_factory=dict)   # {name of another set: differences}


@dataclass
class Fitted:
    """A head with the scaling that it was trained on."""
    head: torch.nn.Module
    columns: object
    mean: torch.Tensor
    std: torch.Tensor

    def rewards(self, sides):
        """[chosen, rejected] → what the head says of each, [n] each."""
        return [self.head(((x - self.mean) / self.std)[:, self.columns]) for x in sides]

    def differences(self, sides):
        """[chosen, rejected] → r_chosen - r_rejected [n]."""
        chosen, rejected = self.rewards(sides)
        return chosen - rejected

    def losses(self, sides, pair_loss):
        """[chosen, rejected] → the loss of each pair [n]."""
        return pair_loss(*self.rewards(sides))


def fit_path(view, sides, rows, ks, penalties, settings):
    """Yield ((K, L2), Fitted) for every K and penalty; trained on the given rows (bool [n])."""
    mean, std = torch.zeros(()), torch.ones(())
    if view.scale:
        mean, std = stage2.standardisation(sides, rows)
    chosen, rejected = [(x[rows] - mean) / std for x in sides]
    for k in ks:
        columns = slice(None) if view.columns is None else view.columns(k)
        path = stage3.penalty_path(chosen[:, columns], rejected[:, columns], penalties,
                                   settings["loss"], settings["margin"])
        for l2, head in path:
            yield (k, l2), Fitted(head, columns, mean, std)


def fit_one(view, sides, rows, k, l2, settings):
    """fit_path of one K and one penalty → Fitted."""
    [(_, fitted)] = fit_path(view, sides, rows, [k], [l2], settings)
    return fitted


def out_of_fold(pairs, select, ks, settings, rule="auto", curve=False, others=None,
                penalties=stage3.PENALTIES):
    """Test a method on every pair, by heads that have seen neither it nor its fold → Outcome.

    select: function of the folds left out → View, chosen without them. Inside the other folds K and
    L2 are chosen by cross-validation; a head trained without folds a and b is tested on b for the
    choice when a is the test fold, and on a when b is: so five folds inside five cost ten fits.
    curve: also every K by itself. others: other sets to read with a head of all pairs.
    """
    losses = losses_within(pairs, select, ks, penalties, settings)
    outcome = Outcome(np.zeros(len(pairs.fold)))
    for test in range(pairs.folds):
        rows = pairs.used((test,))
        seen = {option: loss[rows] for option, loss in losses[test].items()}
        choice = stage3.choose(seen, pairs.group[rows.numpy()], rule)
        outcome.choices.append(choice)
        wanted = {choice}
        if curve:
            wanted |= {stage3.best_of_k(seen, k) for k in ks}

        at = (pairs.fold == test).numpy()
        found = test_fold(pairs, select, test, sorted(wanted), settings)
        outcome.differences[at] = found[choice]
        if curve:
            for (k, _), differences in found.items():
                outcome.by_k.setdefault(k, np.zeros(len(pairs.fold)))[at] = differences
    if others:
        k, l2 = Counter(outcome.choices).most_common(1)[0][0]
        view = select(())
        fitted = fit_one(view, view.scores(pairs), pairs.used(()), k, l2, settings)
        for name, other in others.items():
            outcome.of_others[name] = fitted.differences(view.scores(other)).numpy()
    return outcome


def losses_within(pairs, select, ks, penalties, settings):
    """What K and L2 are chosen by when a fold is the test fold → {fold: {(K, L2): losses [n]}}.

    0 at the pairs of the test fold itself: no head of its table has a say there.
    """
    pair_loss = stage3.loss_named(settings["loss"], settings["margin"])
    losses = {fold: {} for fold in range(pairs.folds)}
    for a, b in itertools.combinations(range(pairs.folds), 2):
        view = select((a, b))
        sides = view.scores(pairs)
        rows = pairs.used((a, b))
        for option, fitted in fit_path(view, sides, rows, ks, penalties, settings):
            values = fitted.losses(sides, pair_loss)
            for test, judge in ((a, b), (b, a)):    # unseen by this head, b helps to choose for a
                table = losses[test].setdefault(option, torch.zeros(len(pairs.fold)))
                on = pairs.fold == judge
                table[on] = values[on]
    return losses


def test_fold(pairs, select, test, options, settings):
    """One fold by heads of all others → {(K, L2): r_chosen - r_rejected of its pairs}."""
    view = select((test,))
    sides = view.scores(pairs)
    rows = pairs.used((test,))
    tested = [side[pairs.fold == test] for side in sides]
    found = {}
    for k, l2 in options:
        fitted = fit_one(view, sides, rows, k, l2, settings)
        found[k, l2] = fitted.differences(tested).numpy()
    return found


def too_few(pairs):
    """Too few prompts for a search inside the folds."""
    return len(np.unique(pairs.group)) < 2 * stage2.FEWEST_GROUPS or pairs.folds < 3


def fixed_choice(pairs, select, settings, k):
    """As out_of_fold, without a search: where prompts are too few, K and L2 are set."""
    l2 = stage3.WITHOUT_SEARCH["l2"]
    outcome = Outcome(np.zeros(len(pairs.fold)), [(k, l2)] * pairs.folds)
    for test in range(pairs.folds):
        found = test_fold(pairs, select, test, [(k, l2)], settings)
        outcome.differences[(pairs.fold == test).numpy()] = found[k, l2]
    return outcome


def all_of_z(left_out=()):
    """The View of all of z; it depends on no fold."""
    def scores(pairs):
        return pairs.z
    return View(scores)


def dense_out_of_fold(pairs, settings):
    """A linear head on all of z, its penalty chosen within the folds → Outcome."""
    if too_few(pairs):
        return fixed_choice(pairs, all_of_z, settings, None)
    return out_of_fold(pairs, all_of_z, [None], settings)


# ---------------------------------------------------------------- SparseRM itself

def ks_of(data, found):
    """The values of K to choose from, of `found` a side; a fold that has fewer takes all it has."""
    if data.asked["k"].isdigit():
        return [min(int(data.asked["k"]), found)]
    return stage3.k_values(found)


def test_method(data, select, ks, others=None, curve=False):
    """out_of_fold with the settings of the head, or without a search on very few prompts."""
    if too_few(data):
        k = min(stage3.WITHOUT_SEARCH["k"], ks[-1] or 1)
        return fixed_choice(data, select, data.settings, k)
    rule = data.asked["k"] if data.asked["k"] in ("auto", "best") else "best"
    penalties = stage3.PENALTIES if data.asked["l2"] == "auto" else [data.asked["l2"]]
    return out_of_fold(data, select, ks, data.settings, rule, curve, others, penalties)


def select_by(selections, read):
    """→ select(left_out): the View of `read(pairs, latents)` with the latents of each selection."""
    def select(left_out):
        chosen_latents = selections[left_out]
        total = len(chosen_latents) // 2

        def columns(k):
            return stage3.columns_of(min(k, total), total)

        def scores(pairs):
            return read(pairs, chosen_latents)
        return View(scores, columns)
    return select


def project_on(data):
    """→ read(pairs, latents): alignment scores of their decoder rows."""
    def read(pairs, chosen_latents):
        return score_pairs(pairs, data.sae.W_dec[chosen_latents])
    return read


def score_pairs(pairs, directions):
    """Alignment scores of both sides, [n, len(directions)] each."""
    return [stage2.alignment_scores(z, directions) for z in pairs.z]


def sparserm(data, others=None):
    """The method: latents by firing frequency, projections on their decoder rows."""
    select = select_by(data.selections, project_on(data))
    ks = ks_of(data, data.total)
    if data.settings["kind"] == "mlp":
        return mlp_out_of_fold(data, select, ks[-1], data.settings, data.head_meta["l2"])
    return test_method(data, select, ks, others, curve=True)


def paper(data, others=None, loss="margin"):
    """The paper's own head: an MLP of 512 with the margin loss on all K directions."""
    select = select_by(data.selections, project_on(data))
    settings = {**stage3.DEFAULTS, "kind": "mlp", "loss": loss}
    return mlp_out_of_fold(data, select, data.total, settings, stage3.MLP_L2)


def mlp_out_of_fold(pairs, select, k, settings, l2):
    """An MLP on every pair: stopped on the next fold, then as many steps on all other folds."""
    settings = stage3.mlp_settings(settings)
    outcome = Outcome(np.zeros(len(pairs.fold)), [(k, l2)] * pairs.folds)
    for test in range(pairs.folds):
        following = (test + 1) % pairs.folds
        left_out = tuple(sorted((test, following)))
        train, held = mlp_sides(pairs, select(left_out), k, pairs.used(left_out), following)
        _, steps, _ = stage3.fit_mlp(*train, l2=l2, held=held, **settings)
        train, tested = mlp_sides(pairs, select((test,)), k, pairs.used((test,)), test)
        head, _, _ = stage3.fit_mlp(*train, l2=l2, steps=steps, **settings)
        found = (head(tested[0]) - head(tested[1])).numpy()
        outcome.differences[(pairs.fold == test).numpy()] = found
    return outcome


def mlp_sides(pairs, view, k, rows, held):
    """Standardised sides [chosen, rejected] → (those of the given rows, those of a fold)."""
    sides = view.scores(pairs)
    mean, std = stage2.standardisation(sides, rows)
    columns = slice(None) if view.columns is None else view.columns(k)
    scaled = [((side - mean) / std)[:, columns] for side in sides]
    return [x[rows] for x in scaled], [x[pairs.fold == held] for x in scaled]


# ---------------------------------------------------------------- the controls, a function each

def dense(data, others=None):
    """The same head on all of z: what SparseRM leaves out."""
    if data.settings["kind"] == "mlp":
        return mlp_out_of_fold(data, all_of_z, None, data.settings, data.head_meta["l2"])
    return test_method(data, all_of_z, [None], others)


def random_directions(data, others=None):
    """Gaussian directions: what any projection of this size tells."""
    directions = gaussian_directions(2 * data.total, data.z[0].shape[1])

    def select(left_out):
        return directions_view(directions)
    return test_method(data, select, ks_of(data, data.total), others, curve=True)


def directions_view(directions):
    """The View that projects on directions in the order in which they are to be taken."""
    def scores(pairs):
        return score_pairs(pairs, directions)
    return View(scores, first_columns)


def gaussian_directions(count, width, seed=0):
    """Random directions of norm 1, [count, width]."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def random_latents(data, others=None):
    """Decoder rows of latents drawn at random among those that fire: does it matter which ones?"""
    alive = (data.counts.sum((0, 1)) > 0).nonzero().flatten()
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))
    drawn = alive[order[:2 * data.total]]
    directions = data.sae.W_dec[drawn]

    def select(left_out):
        return directions_view(directions)
    return test_method(data, select, ks_of(data, len(drawn) // 2), others, curve=True)


def picked_directions(data, others=None):
    """Gaussian directions with the freedom to choose: those that separate best."""
    return picked(data, gaussian_directions(CANDIDATES, data.z[0].shape[1], seed=1), others)


def picked_latents(data, others=None):
    """Decoder rows that separate best, by another statistic than SparseRM's."""
    order = torch.randperm(data.sae.d_sae, generator=torch.Generator().manual_seed(0))
    return picked(data, data.sae.W_dec[order[:CANDIDATES]].float(), others)


def picked(data, candidates, others):
    """The candidates with the largest standardised mean difference on the pairs trained on.

    |mean(<z_c - z_r, d>)| / std(<z_c - z_r, d>), from sums over each fold.
    """
    sums = torch.zeros(data.folds, len(candidates), dtype=torch.float64)
    squares = torch.zeros_like(sums)
    for number in range(data.folds):
        for rows in (data.fold == number).nonzero().flatten().split(1024):
            difference = (data.z[0][rows] - data.z[1][rows]) @ candidates.T
            sums[number] += difference.double().sum(0)
            squares[number] += difference.double().square().sum(0)

    def select(left_out):
        used = [number for number in range(data.folds) if number not in left_out]
        n = int(data.used(left_out).sum())
        mean = sums[used].sum(0) / n
        variance = (squares[used].sum(0) / n - mean.square()).clamp_min(1e-12)
        best = (mean.abs() / variance.sqrt()).argsort(descending=True, stable=True)
        return directions_view(candidates[best[:2 * data.total]])
    most = min(data.total, len(candidates) // 2)
    return test_method(data, select, ks_of(data, most), others, curve=True)


def difference_of_means(data, others=None):
    """One direction: the mean of z_chosen minus the mean of z_rejected."""
    def select(left_out):
        rows = data.used(left_out)
        direction = (data.z[0][rows] - data.z[1][rows]).mean(0, keepdim=True)

        def scores(pairs):
            return score_pairs(pairs, direction)
        return View(scores)
    return test_method(data, select, [None], others)


def principal_directions(data, others=None):
    """Principal directions of the differences z_chosen - z_rejected, the largest first."""
    most = min(2 * data.total, data.z[0].shape[1])

    def select(left_out):
        rows = data.used(left_out)
        difference = (data.z[0][rows] - data.z[1][rows]).double()
        _, vectors = torch.linalg.eigh(difference.T @ difference)       # the largest last
        return directions_view(vectors.flip(1)[:, :most].T.float())
    return test_method(data, select, ks_of(data, most // 2), others)


def activations(data, others=None):
    """What the chosen latents fire, instead of the projection on their decoder rows."""
    union = torch.unique(torch.cat(list(data.selections.values())))
    f = activation_pairs(data.sae, data.sae_z, union)           # encoded once

    def read(pairs, chosen_latents):
        if pairs is data:
            at = torch.searchsorted(union, chosen_latents)
            return [side[:, at] for side in f]
        return activation_pairs(data.sae, pairs.z, chosen_latents)
    ks = ks_of(data, data.total)
    raw = data.meta["normalise"] == "none"  # other sets hold z as it is projected
    select = select_by(data.selections, read)
    return test_method(data, select, ks, others if raw else None, curve=True)


def activation_pairs(sae, z, chosen_latents):
    """SAE activations of both sides, [n, len(chosen_latents)] each."""
    return [latents.latent_activations(sae, side, chosen_latents) for side in z]


def words(data, others=None):
    """The wording of the response alone."""
    return test_method(data, words_of(data), [None], others)


def words_of(pairs):
    """→ select(left_out): the View of WordFeatures whose grams are those of the other folds."""
    def select(left_out):
        features = WordFeatures(pairs.responses(), pairs.used(left_out))

        def rows(others):
            return features(others.responses())
        return View(rows, scale=False)
    return select


def grams(text):
    """The 1- and 2-grams of a text, hashed → set of int."""
    found = re.findall(r"\w+", text.casefold())
    pairs_of_words = [f"{first} {second}" for first, second in zip(found, found[1:])]
    return {zlib.crc32(gram.encode()) % 2**20 for gram in found + pairs_of_words}


class WordFeatures:
    """Responses → rows over the grams of at least two train responses, the most frequent ones.

    Weighted by rarity, log(responses / responses with this gram); rows of norm 1.
    """

    def __init__(self, texts, rows):
        """texts: [chosen, rejected], each a list of n; rows: those to train on, bool [n]."""
        count = Counter()
        used = rows.nonzero().flatten().tolist()
        for n in used:
            for side in texts:
                count.update(grams(side[n]))
        frequent = [gram for gram, responses in count.most_common(WORD_COLUMNS) if responses > 1]
        self.column = {gram: place for place, gram in enumerate(frequent)}
        self.rarity = torch.tensor([math.log(2 * len(used) / count[gram]) for gram in frequent])

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


def length(data, others=None):
    """The number of tokens alone: the longer response, or the shorter, whichever wins elsewhere."""
    longer = longer_by(data)
    outcome = Outcome(np.zeros(len(longer)))
    for test in range(data.folds):
        at = (data.fold == test).numpy()
        sign = float(np.sign(np.sign(longer[~at]).sum()))       # 1: the longer one, -1: the shorter
        outcome.differences[at] = sign * longer[at]
        outcome.choices.append(("longer" if sign > 0 else "shorter", None))
    sign = float(np.sign(np.sign(longer).sum()))
    outcome.of_others = {name: sign * longer_by(pairs) for name, pairs in (others or {}).items()}
    return outcome


def longer_by(pairs):
    """Tokens of chosen minus tokens of rejected [n]."""
    return (pairs.tokens[0] - pairs.tokens[1]).astype(float)


def shuffled_labels(data, others=None):
    """The whole method, from the selection on, with the sides of half of the pairs swapped."""
    coin = half_of_each_fold(data.fold)
    chosen, rejected = data.z
    swapped = Pairs([torch.where(coin[:, None], rejected, chosen),
                     torch.where(coin[:, None], chosen, rejected)],
                    data.split, data.group, data.tokens, data.pairs, data.folds)
    raw_chosen, raw_rejected = data.sae_z
    counts = fold_counts(data.sae, [torch.where(coin[:, None], raw_rejected, raw_chosen),
                                    torch.where(coin[:, None], raw_chosen, raw_rejected)],
                         data.fold)
    selections = {left_out: select_without(counts, data.fold, left_out, data.meta["k_asked"])
                  for left_out in data.left_outs()}
    read = project_on(data)

    def read_swapped(pairs, chosen_latents):
        return read(swapped if pairs is data else pairs, chosen_latents)
    select = select_by(selections, read_swapped)
    outcome = test_method(data, select, ks_of(data, data.total), others)
    sign = torch.where(coin, -1.0, 1.0).numpy()                 # the labels as they are
    outcome.differences *= sign
    return outcome


def half_of_each_fold(fold, seed=0):
    """bool [n], true for half of the pairs of each fold: then the labels say nothing on average."""
    coin = torch.zeros(len(fold), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for number in torch.unique(fold):
        members = (fold == number).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        coin[members[order[:len(members) // 2]]] = True
    return coin


CONTROLS = {"dense": dense, "random_directions": random_directions,
            "picked_directions": picked_directions, "picked_latents": picked_latents,
            "difference_of_means": difference_of_means,
            "principal_directions": principal_directions, "random_latents": random_latents,
            "activations": activations, "words": words, "length": length,
            "shuffled_labels": shuffled_labels, "paper": paper}


def blind(data, backbone):
    """A dense head on responses read under one fixed prompt → (Pairs, Outcome)."""
    order = np.argsort(data.group, kind="stable")[:BLIND_PAIRS]         # a group is a hash
    wanted = torch.zeros(len(data.group), dtype=torch.bool)
    wanted[torch.from_numpy(order.copy())] = True
    pairs = data.part(wanted)
    texts = []
    for pair in pairs.pairs:
        for side in SIDES:
            texts.append(render(backbone.tokenizer, BLIND_PROMPT, pair[side],
                                data.meta["max_length"]))
    layer, rule = data.meta["layer"], data.meta["token"]
    z = stage1.residuals(backbone, texts, [layer], [rule])[layer, rule].float()
    z = stage2.normalise(z, data.meta["normalise"], data.meta["norm_eps"])
    pairs.z = [z[0::2], z[1::2]]
    return wanted, dense_out_of_fold(pairs, data.settings)


# ---------------------------------------------------------------- the number of training pairs

def pairs_curve(data, sizes=(50, 100, 200, 500, 1000)):
    """Accuracy with fewer training pairs, everything selected on them → {name: {n: summary}}.

    In each fold whole prompts are drawn until the size is reached; K is the head's, L2 is 0.1.
    """
    most = int(min(data.used((fold,)).sum() for fold in range(data.folds)))
    rows = {}
    for size in [*(size for size in sizes if size < most), most]:
        found = {name: np.zeros(len(data.fold)) for name in ("sparserm", "dense",
                                                             "random_directions")}
        for test in range(data.folds):
            small = draw_pairs(data, data.used((test,)), size)
            fold = torch.where(small, 0, -1).to(torch.int8)             # one fold: the few
            counts = fold_counts(data.sae, data.sae_z, fold)
            chosen_latents = select_without(counts, fold, (), data.head_meta["k"])
            gaussian = gaussian_directions(max(2, len(chosen_latents)), data.z[0].shape[1])
            views = {"sparserm": score_pairs(data, data.sae.W_dec[chosen_latents]),
                     "dense": data.z, "random_directions": score_pairs(data, gaussian)}
            held = data.fold == test
            for name, sides in views.items():
                if not sides[0].shape[1]:
                    continue                        # no latent separates these few pairs
                fitted = fit_one(View(None), sides, small, None, stage3.WITHOUT_SEARCH["l2"],
                                 data.settings)
                differences = fitted.differences([side[held] for side in sides])
                found[name][held.numpy()] = differences.numpy()
        rows[str(size)] = side_by_side(found, data.group)
    return turned(rows)


def draw_pairs(data, rows, size):
    """About `size` of the given rows, whole prompts in a random order → bool [n]."""
    groups = np.unique(data.group[rows.numpy()])
    np.random.default_rng(0).shuffle(groups)
    taken = np.zeros(len(data.group), bool)
    for group in groups:
        if taken.sum() >= size:
            break
        taken |= (data.group == group) & rows.numpy()
    return torch.from_numpy(taken)


def turned(rows):
    """{size: {name: summary}} → {name: {size: summary}}."""
    names = next(iter(rows.values()))
    return {name: {size: row[name] for size, row in rows.items()} for name in names}


# ---------------------------------------------------------------- what is said of the latents

def train_shares(data, model):
    """What each direction adds to chosen minus rejected on train and dev, on average [2K]."""
    rows = data.split != TEST
    chosen, rejected = [model.contributions(z[rows]) for z in data.z]
    return (chosen - rejected).mean(0)


def adds_where_it_fires(data, model):
    """What each direction adds to a response's reward where its latent fires there, on average
    over the train and dev responses: E[1(f_j > 0) · part_j], [2K].

    Where a latent does not fire, its direction still adds something; that is in train_shares().
    """
    rows = data.split != TEST
    fires = activation_pairs(data.sae, [z[rows] for z in data.sae_z], data.head["latents"])
    parts = [model.contributions(z[rows]) * (f > 0) for z, f in zip(data.z, fires)]
    return torch.cat(parts).mean(0)


def rows_of_latents(data, model):
    """The head's latents → rows of evaluation.json; the logit lens where the model is opened."""
    tokens = latents.top_tokens(model.backbone, data.head["directions"]) if model.backbone else []
    return latents.latent_rows(data, model.head, train_shares(data, model),
                               adds_where_it_fires(data, model), tokens, separation(data))


def texts_of_latents(data, model, rows, count):
    """Read the tokens of some responses → {quiz, pairs}; contexts go into the rows.

    Contexts are of train and dev responses; the tasks of the quiz, and the pairs, of test.
    """
    probes = gaussian_directions(contexts.RANDOM, data.z[0].shape[1], seed=1)

    def read(wanted):
        pairs = [data.pairs[n] for n in wanted.nonzero().flatten().tolist()]
        return contexts.read_tokens(model, data.sae, contexts.some_responses(pairs), probes)

    of_train = read(data.split != TEST)
    for row in rows[:SHOWN_LATENTS]:
        values = of_train.fires[:, row["column"]].float().numpy()
        row["histogram"] = contexts.histogram(of_train, values)
        row["contexts"] = contexts.contexts(of_train, values, count)
        row["agreement"] = contexts.agreement(of_train, row["column"])
    if not (data.split == TEST).any():
        return {}
    of_test = read(data.split == TEST)
    quizzed = rows[:QUIZZED_LATENTS]
    columns = [row["column"] for row in quizzed]
    return {"quiz": contexts.quiz(quizzed, columns, of_train, of_test, count),
            "pairs": contexts.read_pairs(of_test)}


def separation(data):
    """Interval of μ_c - μ_r of the head's latents on the *test* pairs → [(low, high)] of each.

    On the others it would be too narrow: the latents were chosen there for that difference.
    """
    test = data.part(data.split == TEST)
    if len(np.unique(test.group)) < 2:
        return [(None, None)] * len(data.head["latents"])
    chosen, rejected = activation_pairs(data.sae, [z[data.split == TEST] for z in data.sae_z],
                                        data.head["latents"])
    difference = ((chosen > 0).float() - (rejected > 0).float()).numpy()
    intervals = []
    for column in difference.T:
        _, low, high = bootstrap(column, test.group, draws=500)
        intervals.append((low, high))
    return intervals


def fold_to_one_vector(data, model):
    """A linear head is one vector u: its norm, its cosine to the mean of chosen minus rejected."""
    if model.head.kind == "mlp":
        return None
    u, _ = model.vector()
    rows = data.split != TEST
    mean_difference = (data.z[0][rows] - data.z[1][rows]).mean(0)
    return {"norm": float(u.norm()),
            "cosine_mean_difference": float(F.cosine_similarity(u, mean_difference, 0))}


def repeated_answers(data):
    """The share of responses that stand in pairs of several prompts, case aside."""
    prompts_of = {}
    answers = []
    for side in data.responses():
        for text, group in zip(side, data.group.tolist()):
            answer = " ".join(re.findall(r"\w+", text.casefold()))
            answers.append(answer)
            prompts_of.setdefault(answer, set()).add(group)
    return sum(len(prompts_of[answer]) > 1 for answer in answers) / len(answers)


def by_category(data, differences):
    """Accuracy of each category that rows name → {category: summary}."""
    names = [pair.get("category") for pair in data.pairs]
    if len(set(names)) > 12:            # harmful/violence → harmful
        names = [name and str(name).partition("/")[0] for name in names]
    rows = {}
    for name in sorted({str(name) for name in names if name}):
        at = np.array([str(other) == name for other in names])
        rows[name] = summary(differences[at], data.group[at])
    return rows if len(rows) > 1 else {}


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
    others = {name: other_set(data, name, run) for name, run in args.other}
    model = stage3.RewardModel(data.head, data.head_meta, None)
    if args.texts:
        model = stage3.RewardModel.load(data.head_path, device=args.device)

    outcomes = {}
    methods = {"sparserm": sparserm, **CONTROLS}
    for name, method in tqdm(methods.items(), desc="folds", unit="method", disable=None):
        with watch(name), one_thread():
            outcomes[name] = method(data, others)
    result = compare(data, outcomes)
    if model.backbone:
        with watch("blind"):
            add_blind(data, model.backbone, outcomes["sparserm"], result)
    result["latents"] = rows_of_latents(data, model)
    if model.backbone:
        with watch("contexts"):
            result |= texts_of_latents(data, model, result["latents"], args.texts)
    result["other"] = compare_on(others, outcomes)
    if args.sweeps != "none":
        result["curves"]["k"] = k_curve(data, outcomes, result["accuracy"]["dense"])
    if args.sweeps == "full":
        with watch("pairs curve"):
            result["curves"]["pairs"] = pairs_curve(data)
    result["test"] = on_the_test_split(data, model, result)
    result["fold"] = fold_to_one_vector(data, model)
    result |= about_the_run(data, model)
    result["verdict"] = report.verdict(result)
    return result, watch.seconds


def compare(data, outcomes):
    """Accuracy and differences of all methods over the folds, and by category."""
    differences = {name: outcome.differences for name, outcome in outcomes.items()}
    rows = side_by_side(differences, data.group)
    behind = {}
    for name, outcome in outcomes.items():
        rows[name]["choices"] = outcome.choices
        if name != "sparserm":
            behind[name] = rows[name].pop("behind")
    return {"accuracy": rows, "differences": behind, "curves": {},
            "categories": by_category(data, differences["sparserm"]),
            "repeated_answers": repeated_answers(data)}


def add_blind(data, backbone, ours, result):
    """The control that needs the language model, on a part of the pairs."""
    wanted, outcome = blind(data, backbone)
    at = wanted.numpy()
    result["accuracy"]["blind"] = {**summary(outcome.differences, data.group[at]),
                                   "choices": outcome.choices}
    result["differences"]["blind"] = gap(ours.differences[at], outcome.differences, data.group[at])


def compare_on(others, outcomes):
    """Other sets, read with heads of all pairs of this one → {set: {sparserm: …, controls}}."""
    found = {}
    for name, pairs in others.items():
        differences = {method: outcome.of_others[name] for method, outcome in outcomes.items()
                       if name in outcome.of_others}
        if "sparserm" not in differences:
            print(f"note: --other {name} is not read: it needs a linear head and more prompts here")
        if "sparserm" in differences:
            found[name] = side_by_side(differences, pairs.group)
    return found


def k_curve(data, outcomes, dense_row):
    """Accuracy with K fixed, out of fold → {name: {K: summary}}; dense has no K."""
    ours = outcomes["sparserm"].by_k
    rows = {}
    for k in ours:
        found = {name: outcome.by_k[k] for name, outcome in outcomes.items() if k in outcome.by_k}
        rows[str(k)] = {"dense": dense_row, **side_by_side(found, data.group)}
    if not rows:
        return {}
    names = set.intersection(*(set(row) for row in rows.values()))
    return turned({k: {name: row[name] for name in names} for k, row in rows.items()})


def on_the_test_split(data, model, result):
    """How good is this head? → {…summary}, and calibration, length and the most wrong pairs."""
    own = data.part(data.split == TEST)
    if not len(own.pairs):
        return None
    reward_chosen, reward_rejected = [model.reward_of(z).numpy() for z in own.z]
    differences = reward_chosen - reward_rejected
    result["calibration"] = calibration(differences, float(data.head["temperature"]))
    result["length"] = length_figures(reward_chosen, reward_rejected, *own.tokens)
    result["wrong"] = latents.most_wrong(data, differences)
    result["answers"] = latents.extreme_answers(data, [reward_chosen, reward_rejected])
    return summary(differences, own.group)


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
            "normalise": data.meta["normalise"],
            "sources": [name for name, _ in sources],
            "k": data.head_meta["k"],
            "l2": data.head_meta["l2"],
            "folds": data.folds,
            "settings": data.settings,
            "pairs": pairs_of_split,
        },
    }


def rounded(value):
    """9 significant digits of every float: the last ones differ from machine to machine."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {str(name): rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def parents(args, data):
    """What an evaluation depends on: the head, other runs, the flags."""
    others = {}
    for name, run in args.other:
        paths, _ = stage2.shard_files(run, data.meta["layer"], data.meta["token"])
        others[name] = [file_hash(path) for path in paths]
    return {"format": FORMAT, "head": file_hash(data.head_path), "other": others,
            "sweeps": args.sweeps, "folds": args.folds, "texts": args.texts}


def sealed(parent, found):
    """What an evaluation depends on, and a hash of its numbers: a damaged one is made anew."""
    numbers = {name: value for name, value in found.items() if name != "parent"}
    return {**parent, "numbers": stage1.hash_number(json.dumps(numbers, sort_keys=True))}


def earlier_evaluation(path, parent):
    """The evaluation that lies there, if it is whole and of the same parents; else None."""
    found = whole_evaluation(path)
    return found if found and found["parent"] == sealed(parent, found) else None


def whole_evaluation(path):
    """The evaluation that lies there, if its numbers are those that it was sealed with; else None.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):           # none yet, or damaged
        return None
    parent = found.get("parent") if isinstance(found, dict) else None
    is_whole = isinstance(parent, dict) and parent == sealed(parent, found)
    return found if is_whole else None


def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True,
                   help="folder of the run")
    p.add_argument("--name",
                   help="evaluate the head in RUN/NAME/")
    p.add_argument("--sae",
                   help="the SAE, where it is not at the place recorded by stage 2")
    p.add_argument("--other", action="append", default=[], metavar="NAME=DIR",
                   help="also score the pairs of another run (repeatable)")
    p.add_argument("--folds", type=int, default=5,
                   help="folds over all pairs (default 5)")
    p.add_argument("--sweeps", choices=("none", "small", "full"), default="small",
                   help="curves: none, K, or K and number of pairs (default small)")
    p.add_argument("--texts", type=int, default=4,
                   help="contexts shown of a latent: so many where it fires most, middling, and "
                        "not at all; 0 needs no language model, and skips contexts, quiz and the "
                        "control `blind` (default 4)")
    p.add_argument("--explain", nargs="+", metavar="ID",
                   help="only this: why one response scores higher; a pair's id, or PROMPT A B")
    p.add_argument("--names", metavar="FILE",
                   help="names of latents, as the report saves them, or rows of index and "
                        "description: shown wherever a latent is shown")
    p.add_argument("--device", default="auto",
                   help="of the language model, for --texts and --explain (default auto)")
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")
    args = p.parse_args()
    if not 3 <= args.folds <= 20:
        raise UserError(f"--folds is a number from 3 to 20 · --folds {args.folds} · "
                        "leave it out for 5")
    if args.texts < 0:
        raise UserError(f"--texts is a number from 0 · --texts {args.texts} · 0 needs no model")
    for text in args.other:
        if "=" not in text:
            raise UserError(f"--other needs NAME=DIR · {text} · e.g. --other safe=runs/demo-safe")
    args.other = [tuple(text.split("=", 1)) for text in args.other]
    return args


def main():
    """Stage 4 from the command line."""
    args = parse_args()
    data = Data(args.run, args.name, args.sae, args.folds)
    names = contexts.read_names(args.names, data.meta) if args.names else {}
    if args.explain:
        words, names = explain.pair_to_explain(data, args.explain)     # before the model is opened
        model = stage3.RewardModel.load(data.head_path, device=args.device, names=args.names)
        explain.explain_pair(data, model, words, names)
        return

    out = data.folder / "evaluation.json"
    parent = parents(args, data)
    found = earlier_evaluation(out, parent)
    if found is None:
        result, seconds = evaluate(data, args)
        if out.exists():
            print(f"note: {out} is replaced")
        found = json.loads(json.dumps(rounded(result)))                 # as it will be read again
        found["parent"] = sealed(parent, found)
        write_text(data.folder / "timings.json", json.dumps(seconds, indent=1) + "\n")
        text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_text(out, text)               # last: it says that all is done
    written = report.write_page(found, data.folder, names)
    report.print_report(data.folder, found, written, args.name, names)


if __name__ == "__main__":
    run_main(main, SAEError)
