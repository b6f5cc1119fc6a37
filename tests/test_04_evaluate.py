"""Stage 4, against numbers worked by hand, plain loops, and the reward model itself."""

import argparse
import base64
import importlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from tiny import assert_one_line_error, command, succeed

from parts import explain, report
from parts.files import read_meta, write_rows

stage1, stage3, stage4 = (importlib.import_module(n) for n in ("01_extract", "03_train_head", "04_evaluate"))
TRAIN, DEV, TEST = range(3)
CONTROLS = {"dense", "random_directions", "random_latents", "activations", "words", "length", "shuffled_labels"}


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_bootstrap_is_a_plain_loop_that_draws_whole_groups_and_seeds(seeds):
    rng, means = np.random.default_rng(1), []
    groups, values = rng.integers(12, size=40) * 1000 + 7, rng.random((seeds, 40))
    names, rng = sorted(set(groups.tolist())), np.random.default_rng(3)
    for _ in range(200):
        drawn, rows = rng.integers(len(names), size=len(names)), rng.integers(seeds, size=seeds)
        means.append(statistics.mean([v for s in rows for g in drawn for v, of in zip(values[s], groups) if of == names[g]]))
    low, *_, high = statistics.quantiles(means, n=40, method="inclusive")        # 1/40 is 2.5 %
    assert stage4.bootstrap(values, groups, draws=200, seed=3) == pytest.approx((values.mean(), low, high))


def test_the_interval_of_an_accuracy_is_close_to_the_one_of_the_normal_law():
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    found = stage4.bootstrap(np.repeat([1.0, 0.0], [300, 100]), np.arange(400))
    assert found == pytest.approx((0.75, 0.75 - half, 0.75 + half), abs=0.006)


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_of_an_accuracy_and_of_a_paired_difference_are_those_of_scipy(paired):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(60), rng.integers(1, 5, size=60))
    ours, theirs = (rng.normal(shift, 1, (1, len(groups))) + rng.normal(0, 0.5, 60)[groups] for shift in (0.6, 0.2))
    values = (stage4.points(ours) - stage4.points(theirs) if paired else stage4.points(ours))[0]
    sums, counts = (np.array([f(values[groups == g]) for g in range(60)]) for f in (np.sum, len))
    ratio = lambda s, n, axis: s.sum(axis) / n.sum(axis)                    # of drawn groups: their sums over their sizes
    wanted = stats.bootstrap((sums, counts), ratio, paired=True, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    found = stage4.gap(ours, theirs, groups) if paired else stage4.summary(ours, groups)
    assert (found["low"], found["high"]) == pytest.approx(wanted, abs=0.01) and wanted.high - wanted.low > 0.1


def test_ten_copies_of_a_row_in_one_group_tell_no_more_than_one():
    right = (np.random.default_rng(0).random(50) < 0.7).astype(float)
    copied, as_rows = (stage4.bootstrap(np.repeat(right, 10), g) for g in (np.repeat(np.arange(50), 10), np.arange(500)))
    assert copied == pytest.approx(stage4.bootstrap(right, np.arange(50)))
    assert copied[2] - copied[1] > 2.5 * (as_rows[2] - as_rows[1])       # sqrt(10) times as wide


def test_a_tie_is_wrong_and_is_a_half_under_the_half_point_rule():
    found = stage4.summary(np.array([[1.0, 0.0, -1.0, 2.0], [0.0, 0.0, 1.0, 1.0]]), np.array([5, 5, 6, 7]))
    # right 2 and 2 of 4, ties 1 and 2 of 4
    assert found["accuracy"] == 0.5 and found["seeds"] == [0.5, 0.5] and found["ties"] == 3 / 8
    assert found["ties_half"] == 0.5 + 3 / 16 and found["n"] == 4 and found["groups"] == 3
    assert found["low"] <= 0.5 <= found["high"]
    silent = stage4.summary(np.zeros((1, 4)), np.arange(4))             # a control that says nothing: a coin
    assert [silent[n] for n in ("accuracy", "high", "ties_half", "half_low", "half_high")] == [0, 0, 0.5, 0.5, 0.5]


def evaluated(run):
    return stage4.evaluate(stage4.Data(run), argparse.Namespace(seeds=1, sweeps="none", other=[], texts=0))[0]


@pytest.fixture(scope="module")
def before(finished):
    return evaluated(finished)


def test_differences_are_taken_pair_by_pair_and_a_tie_is_a_half(finished, monkeypatch):
    found = stage4.gap(np.array([[2.0, 1.0, -1.0, 0.0]]), np.array([[0.0, 1.0, 0.0, -1.0]]), np.arange(4))
    assert found["mean"] == (0.5 + 0 - 0.5 + 0.5) / 4
    data = stage4.Data(finished)
    model, test = stage3.RewardModel(data.head, data.head_meta, None), data.split == TEST
    own = np.subtract(*(model.reward_of(z[test]).numpy() for z in data.z))[None]
    a, real = float((own > 0).mean()), stage4.controls
    same, mirrored = "dense", "words"
    fake = lambda name, row: {same: (*row[:2], [own]), mirrored: (*row[:2], [-own])}.get(name, row)
    monkeypatch.setattr(stage4, "controls", lambda *args: {name: fake(name, row) for name, row in real(*args).items()})
    found = evaluated(finished)
    assert 0 < a < 1 and found["accuracy"][same]["low"] < a < found["accuracy"][same]["high"]
    assert found["differences"][same] == {"mean": 0, "low": 0, "high": 0}          # right on the same pairs: no doubt at all
    # +1 where the head is right, -1 where it is wrong: twice the accuracy, less 1, and so is the interval
    b = found["accuracy"]["sparserm"]
    assert found["differences"][mirrored] == pytest.approx({n: 2 * b[m] - 1 for n, m in
                                                              (("mean", "accuracy"), ("low", "low"), ("high", "high"))})


def test_calibration_is_a_plain_loop_over_bins_of_at_least_50_pairs_whose_outcome_is_who_won():
    d, t = np.random.default_rng(4).normal(0.5, 2, size=330), 1.7
    found = stage4.calibration(d, t)
    p, right = [1 / (1 + math.exp(-abs(x) / t)) for x in d], [float(x > 0) for x in d]
    assert found["nll"] == pytest.approx(sum(math.log(1 + math.exp(-x / t)) for x in d) / 330)
    assert found["brier"] == pytest.approx(sum((a - b) ** 2 for a, b in zip(p, right)) / 330)
    sizes, order, ece = [b["n"] for b in found["bins"]], sorted(range(330), key=lambda i: p[i]), 0.0
    assert sum(sizes) == 330 and len(sizes) == 6 and min(sizes) >= 50 and max(sizes) - min(sizes) <= 1
    for b in found["bins"]:
        rows, order = order[:b["n"]], order[b["n"]:]
        mean_p, mean_right = (sum(x[i] for i in rows) / len(rows) for x in (p, right))
        assert (b["confidence"], b["accuracy"]) == pytest.approx((mean_p, mean_right)) and b["accuracy"] < 1
        ece += len(rows) / 330 * abs(mean_p - mean_right)
    assert found["ece"] == pytest.approx(ece)
    assert len(stage4.calibration(d[:49], t)["bins"]) == 1 and len(stage4.calibration(np.tile(d, 9), t)["bins"]) == 10


def test_length_figures_by_hand():
    found = stage4.length_figures(np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, 4.0]), np.array([10, 20, 30]), np.array([10, 10, 29]))
    # at most a tenth apart: 10 and 10 (right), 30 and 29 (wrong). Lengths 10 20 30 10 10 29, rewards 1 2 3 0 5 4:
    # means 18.1667 and 2.5, Σ xy - n·mx·my = 306 - 272.5, Σx² = 2441 - 1980.17, Σy² = 55 - 37.5
    assert found["matched_n"] == 2 and found["matched_accuracy"] == 0.5
    assert found["correlation"] == pytest.approx(33.5 / math.sqrt(460.8333 * 17.5), abs=1e-5)
    far = stage4.length_figures(np.zeros(2), np.zeros(2), np.full(2, 10), np.full(2, 20))
    assert far == {"correlation": 0.0, "matched_n": 0, "matched_accuracy": None}


def test_only_grams_of_two_train_responses_become_columns_and_rows_have_norm_1():
    split = torch.tensor([TRAIN, TRAIN, TEST, DEV])
    texts = [["a b", "A c!", "z y z y", "a b"], ["a, b", "d", "z y", "b z y"]]
    see = stage4.word_features(texts, split)
    chosen, rejected = see(texts)
    assert chosen.shape == rejected.shape == (4, 3)                        # a (three times), b, "a b" (twice each)
    torch.testing.assert_close(torch.cat([chosen, rejected]).norm(dim=1), torch.tensor([1.0, 1, 0, 1, 1, 0, 0, 1]))
    assert torch.equal(chosen[0], rejected[0]) and torch.equal(chosen[0], chosen[3]) and (chosen[0] > 0).all()
    assert chosen[0].min() == chosen[0][chosen[1].argmax()]                # a, the most frequent, weighs least
    others = [["a b", "A c!", "q q", "q"], ["a, b", "d", "q", "q"]]
    for other in (see(others), stage4.word_features(others, split)(others)):        # whatever the texts of dev, test and other sets are
        assert torch.equal(chosen[:2], other[0][:2]) and torch.equal(rejected[:2], other[1][:2])


def test_a_word_that_decides_everything_gives_the_words_an_accuracy_of_1_and_no_common_word_gives_ties():
    rng, split = random.Random(0), torch.tensor([TRAIN, TRAIN, DEV, TEST] * 20)
    filler = lambda: " ".join(rng.choices("the cat sat on a mat while it rained".split(), k=5))
    telling = [[f"{filler()} {word} {filler()}" for _ in split] for word in ("yes", "no")]
    for texts, sign in ((telling, 1), ([[f"{side}{i}" for i in range(80)] for side in "ab"], 0)):
        _, d = stage4.fit_and_test(*stage4.word_features(texts, split)(texts), split, {0: {"columns": slice(None)}}, {}, scale=False)
        assert d.shape == (20,) and (np.sign(d) == sign).all()


def test_random_latents_fire_random_directions_have_norm_1_and_activations_are_those_of_the_sae(finished):
    frequency = (torch.arange(100) % 3 == 1) * 0.01
    latents = [stage4.random_latents(frequency, 20, seed).tolist() for seed in range(5)]
    assert all(len(set(d)) == 20 and all(j % 3 == 1 for j in d) for d in latents) and len(set(map(tuple, latents))) == 5
    torch.testing.assert_close(stage4.gaussian_directions(6, 32, 1).norm(dim=1), torch.ones(6))
    data = stage4.Data(finished)
    by_hand = torch.tensor([[max(0.0, float(z @ data.sae.W_dec[j])) for j in (5, 0, 63)] for z in data.z[0]])   # it has no biases
    torch.testing.assert_close(explain.latent_activations(data.sae, data.z[0], [5, 0, 63]), by_hand, rtol=1e-4, atol=1e-4)


def test_shuffled_labels_swap_both_sides_of_half_of_train_and_dev_and_leave_test_alone():
    z, split = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([TRAIN, DEV, TEST] * 100)
    a, b = stage4.shuffled_sides([*z], split, 0)
    kept, swapped = (((a == x) & (b == y)).all(1) for x, y in (z, z.flip(0)))
    assert (kept ^ swapped).all() and kept[split == TEST].all()
    assert all(30 < swapped[split == s].sum() < 70 for s in (TRAIN, DEV))
    assert not torch.equal(a, stage4.shuffled_sides([*z], split, 1)[0])


# ---------------------------------------------------------------- are the latents, and what is said of them, worth believing

def test_bootstrap_weights_count_how_often_a_plain_loop_drew_the_group_of_a_row():
    groups = np.array([70, 5, 70, 9, 5, 70, 33])
    weights, rng = explain.bootstrap_weights(groups, 40, seed=3), np.random.default_rng(3)
    for row in weights.tolist():
        drawn = [(5, 9, 33, 70)[i] for i in rng.integers(4, size=4)]
        assert row == [drawn.count(g) for g in groups]
    assert weights.shape == (40, 7) and weights.dtype == torch.float32 and len({tuple(row) for row in weights.tolist()}) > 10


def fake_data(z, split, **fields):
    """As much of Data as a test needs. The SAE is the identity: column j of z is latent j and direction j."""
    chosen, rejected = (torch.as_tensor(side, dtype=torch.float32) for side in z)
    width = chosen.shape[1]
    sae = argparse.Namespace(encode=lambda x: x.relu(), d_sae=width, W_dec=torch.eye(width))
    return argparse.Namespace(z=[chosen, rejected], split=torch.as_tensor(split), group=np.arange(len(chosen)), sae=sae, **fields)


def test_latents_that_always_tell_are_selected_on_every_resample_and_the_intervals_are_those_of_resampled_rows():
    rng = np.random.default_rng(0)
    z = rng.choice([-1.0, 1.0], (2, 60, 40))
    for side, always, never in ((0, [3, 7], [11, 20]), (1, [11, 20], [3, 7])):
        z[side][:, always], z[side][:, never] = 1, -1
    z[0, :15, 7] = -1                                           # latent 7: in three quarters of the chosen responses
    z[1, 50:] *= -1                                             # those are no train pairs
    data = fake_data(z, [TRAIN] * 50 + [DEV, TEST] * 5, head={"latents": torch.tensor([3, 7, 11, 20])})
    data.group = np.repeat(np.arange(20), 3)
    found = explain.resampled_selection(data, draws=5)
    assert found == {"k": 2, "draws": 5, "mean": 1, "least": 1, "chance": found["chance"]} and found["chance"] < 0.8
    data.split = torch.tensor([TEST] * 50 + [DEV, TRAIN] * 5)   # the intervals are those of test
    low, high = explain.separation_on_test(data, draws=300)
    assert (low[0], high[0], low[2], high[2]) == (1, 1, -1, -1) and 0 < low[1] < 35 / 50 < high[1] <= 1
    for n, j in enumerate((3, 7, 11, 20)):
        means = []
        for weights in explain.bootstrap_weights(data.group[:50], 300).tolist():
            rows = [i for i, w in enumerate(weights) for _ in range(int(w))]
            means.append(statistics.mean([float(z[0, i, j] > 0) - float(z[1, i, j] > 0) for i in rows]))
        first, *_, last = statistics.quantiles(means, n=40, method="inclusive")
        assert (low[n], high[n]) == pytest.approx((first, last), abs=1e-5)


def test_the_interval_of_a_frequency_difference_is_close_to_the_one_of_the_normal_law_and_noise_is_not_selected_again():
    z = np.random.default_rng(1).normal(size=(2, 400, 60))      # d_sae 60: any four are as good
    data = fake_data(z, [TRAIN] * 400)
    data.head = {"latents": torch.tensor([0, 1, 2, 3])}
    found = explain.resampled_selection(data)
    data.split = torch.full((400,), TEST)
    low, high = explain.separation_on_test(data)
    data.split = torch.full((400,), TRAIN)
    for n in range(4):
        d = (z[0, :, n] > 0).astype(float) - (z[1, :, n] > 0)
        half = 1.96 * d.std() / 20
        assert (low[n], high[n]) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.015)
    assert found["mean"] < 0.4
    frequency = [torch.tensor((side > 0).mean(0)) for side in z]
    data.head = {"latents": stage4.stage2.select_latents(*frequency, 2)}                   # chosen on these very pairs
    again = explain.resampled_selection(data)
    assert 0 < again["mean"] < 1 and again["least"] < again["mean"]
    assert again["chance"] == pytest.approx(again["mean"], abs=0.25)                       # noise is no better than noise


def planted_model(weights, kind="linear", **tensors):
    """A reward model whose directions are the unit vectors: r = Σ w_j z_j, as a linear head or as an MLP that computes the same."""
    w, m, one = torch.tensor(weights), len(weights), torch.eye(len(weights))
    head = {"w1": w, "b1": torch.zeros(1)}
    if kind == "mlp":                                           # relu(x) - relu(-x) = x
        head = {"w1": torch.cat([one, -one]), "b1": torch.zeros(2 * m), "w2": torch.cat([w, -w]), "b2": torch.zeros(1)}
    common = {"directions": one, "mean": torch.zeros(m), "std": torch.ones(m), "temperature": torch.ones(1)}
    return stage3.RewardModel({**common, **head, **tensors}, {}, None)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_without_the_direction_that_carries_everything_accuracy_falls_to_chance_and_without_all_others_it_does_not(kind):
    rng = np.random.default_rng(0)
    z = rng.choice([-1.0, 1.0], (2, 160, 16))
    z[:, 80:, 1:] = z[::-1, :80, 1:]                            # the other columns say the opposite of pair n about pair 80 + n
    z[0, :, 5], z[1, :, 5] = 1, -1
    data, weights = fake_data(z, [TRAIN, TEST] * 80), [1.0] * 16
    weights[5] = 40.0                                           # more than all others together
    model = planted_model(weights, kind)
    found = stage4.ablation_test(data, model, *explain.train_shares(data, model), draws=6)
    helps = int(((z[0, ::2] - z[1, ::2]).mean(0) > 0).sum())     # on train
    assert set(found) == {str(m) for m in (1, helps // 8, helps // 4) if m} and found["1"]["reached"] == pytest.approx((helps - 1) / 40)
    top, chance, fall = (found["1"][n] for n in ("top", "random", "fall"))
    right = statistics.mean(float(a > b) + (a == b) / 2 for a, b in zip(*np.delete(z[:, 1::2], 5, axis=2).sum(2)))
    assert top["ties_half"] == pytest.approx(right) and 0.35 < right < 0.65
    assert chance["accuracy"] == 1 and fall["mean"] == pytest.approx(1 - right) and fall["low"] > 0.3
    assert len(top["seeds"]) == 1 and len(chance["seeds"]) == 6 and top["n"] == top["groups"] == 80


def test_random_directions_are_taken_until_their_total_weight_reaches_that_of_the_top_ones(monkeypatch):
    rng, removed, real = np.random.default_rng(2), [], stage3.apply_head
    weights = rng.uniform(0.5, 2, 24).tolist()
    weights = [-w if n % 2 else w for n, w in enumerate(weights)]
    z = rng.normal(size=(2, 60, 24))
    data, model = fake_data(z, [TRAIN] * 40 + [TEST] * 20), planted_model(weights)
    monkeypatch.setattr(stage3, "apply_head", lambda head, x: removed.append((x == 0).all(0).nonzero().flatten().tolist()) or real(head, x))
    found = stage4.ablation_test(data, model, *explain.train_shares(data, model), draws=5)
    adds = (z[0, :40] - z[1, :40]).mean(0) * weights
    order = [j for j in np.argsort(-adds).tolist() if adds[j] > 0]           # only those that help are drawn
    sizes = sorted({m for m in (1, len(order) // 8, len(order) // 4) if m})
    size = lambda latents: sum(abs(weights[j]) for j in latents)
    assert len(removed) == len(sizes) * 2 * (5 + 1) and [*found] == [str(m) for m in sizes]          # both sides
    for m, calls in zip(sizes, (removed[n:n + 12] for n in range(0, 99, 12)), strict=False):
        tops = [r for r in calls if r == sorted(order[:m])]
        others = [r for r in calls if r != sorted(order[:m])]
        assert len(tops) == 2 and len({tuple(r) for r in others}) > 1 and all(set(r) <= set(order[m:]) for r in others)
        for r in others:                                        # enough, and not enough without the last one
            assert size(r) >= size(order[:m]) - 1e-5 and size(r) - max(abs(weights[j]) for j in r) < size(order[:m])


def test_a_linear_head_as_one_vector_has_the_cosines_worked_by_hand_and_an_mlp_has_none():
    a = np.random.default_rng(0).normal(2, 1, size=(90, 1))
    z = a * [3, 4, 0], -a * [3, 4, 0]                           # mean of chosen minus rejected: along (3, 4, 0)
    data = fake_data(z, [TRAIN, DEV, TEST] * 30, head_meta={"settings": {"kind": "linear", "epochs": 30}})
    *_, dense, _ = stage4.fit_control(*data.z, data.split, stage4.DENSE, data.head_meta["settings"])
    # standardised, columns 0 and 1 are the same, so that the dense head gives them one weight: along (1/3, 1/4, 0), so (4, 3, 0)
    for w, std, norm, to_mean, to_dense in (([2.0, 0, 0], [1, 1, 1.0], 2, 3 / 5, 4 / 5), ([9.0, 24, 0], [3, 6, 1.0], 5, 1, 24 / 25),
                                            ([0, 0, 1.0], [1, 1, 4.0], 1 / 4, 0, 0), ([-4.0, -3, 0], [1, 1, 1.0], 5, -24 / 25, -1)):
        found = explain.fold(data, planted_model(w, std=torch.tensor(std)), dense)
        assert found == pytest.approx({"norm": norm, "cosine_mean_difference": to_mean, "cosine_dense": to_dense}, abs=1e-4)
    assert explain.fold(data, planted_model([1.0, 2, 3], "mlp"), dense) is None


def test_the_most_wrong_pairs_are_those_of_test_with_the_lowest_difference_and_a_tie_is_not_wrong():
    split = [TRAIN, TEST, TEST, DEV, TEST, TEST, TEST]
    pairs = [{"id": f"p{n}", "prompt": f"q{n}", "chosen": "c" * 700, "rejected": f"r{n}"} for n in range(7)]
    pairs[4]["prompt"] = [{"role": "user", "content": "first"}, {"role": "user", "content": "last"}]
    data = argparse.Namespace(split=torch.tensor(split), pairs=pairs, head={"temperature": torch.tensor([2.0])})
    found = explain.most_wrong(data, np.array([-1.0, 2.0, -3.0, 0.0, -1.0]))                 # of p1, p2, p4, p5, p6
    assert [(row["id"], row["difference"], row["prompt"]) for row in found] == [("p4", -3, "last"), ("p1", -1, "q1"), ("p6", -1, "q6")]
    assert [row["confidence"] for row in found] == pytest.approx([0.817574, 0.622459, 0.622459], abs=1e-6)      # σ(3/2), σ(1/2)
    assert (found[0]["chosen"], found[0]["rejected"]) == ("c" * 600, "r4")
    assert [row["id"] for row in explain.most_wrong(data, np.array([-1.0, 2.0, -3.0, 0.0, -1.0]), 1)] == ["p4"]
    assert explain.most_wrong(data, np.ones(5)) == []


def test_a_control_is_spoken_of_unless_the_interval_of_the_difference_is_clear_of_0():
    clear, touching, below = ({"mean": 0.1, "low": low, "high": high} for low, high in ((0.001, 0.2), (0.0, 0.2), (-0.3, -0.01)))
    fine = {"sparserm": {"low": 0.6, "n": 50}, "shuffled_labels": {"low": 0.4}, "words": {"high": 0.6}}
    said = lambda accuracy=fine, **changed: report.in_words(
        {"differences": dict.fromkeys(CONTROLS, clear) | changed, "accuracy": accuracy}, [])
    assert said() == [] and said(dense={"mean": -0.1, "low": -0.3, "high": 0.0}) == []
    for name in CONTROLS - {"dense"}:
        sentence, = said(**{name: touching})
        assert sentence.startswith(f"{name.replace('_', ' ')} (+0.100 [+0.000, ") and report.SAYS[name] in sentence
        assert said(**{name: below}) == [f"{name.replace('_', ' ')} (+0.100): measurably better than SparseRM here"]
    assert "measurably better" in said(dense=below)[0] and len(said(words=touching, dense=below, length=below)) == 3
    assert report.in_words({"differences": dict.fromkeys(CONTROLS, clear), "accuracy": fine}, ["odd"]) == ["SAE: odd"]
    assert "coin" in said(fine | {"sparserm": {"low": 0.5, "n": 50}})[0] and "leak" in said(fine | {"shuffled_labels": {"low": 0.51}})[0]
    assert "below one half" in said(fine | {"words": {"high": 0.49}})[0]
    assert "only 49 test pairs" in said(fine | {"sparserm": {"low": 0.6, "n": 49}})[0]


# ---------------------------------------------------------------- the stage

@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def evaluate(run, *args):
    """Run stage 4, without a language model unless --texts asks for it → evaluation.json."""
    succeed("04_evaluate", "--run", run, "--seeds", 1, "--texts", 0, *args)
    return json.loads((run / "evaluation.json").read_text("utf-8"))


def extract(run, out, pairs, *args):
    """Stage 1 with the model of `run`."""
    succeed("01_extract", "--model", read_meta(run / "features.safetensors")["model"], "--pairs", pairs, "--run", out, *args)


def change_run(run, change):
    """change(tensors of the shard, rows of pairs.jsonl); then pass the new hashes on, so that all files belong together."""
    shard, = (run / "activations").iterdir()
    t, meta = stage1.load_stage(shard)
    rows = [json.loads(line) for line in open(run / "pairs.jsonl", encoding="utf-8")]
    change(t, rows)
    write_rows(run / "pairs.jsonl", rows)
    stage1.save_stage(shard, t, meta | {"parent": {"pairs": stage1.file_hash(run / "pairs.jsonl")}})
    for name, parent in (("features", {"activations": [stage1.file_hash(shard)]}), ("reward_head", None)):
        t, meta = stage1.load_stage(run / f"{name}.safetensors")
        meta["parent"] |= parent or {"features": stage1.file_hash(run / "features.safetensors")}
        stage1.save_stage(run / f"{name}.safetensors", t, meta)


def test_evaluation_json_holds_every_number_that_the_design_lists(run):
    found = evaluate(run, "--sweeps", "full", "--seeds", 2, "--texts", 2, "--other", f"self={run}")
    own, curve, cost = found["accuracy"]["sparserm"], found["curves"]["k"], found["cost"]
    assert set(found["accuracy"]) == {"sparserm", *CONTROLS} and set(found["differences"]) == CONTROLS
    for name, row in found["accuracy"].items():
        assert {"accuracy", "low", "high", "ties", "n", "groups", "seeds"} <= set(row)
        assert row["n"] == row["groups"] == found["run"]["pairs"]["test"] and row["low"] <= row["accuracy"] <= row["high"]
        assert len(row["seeds"]) == (2 if name in ("random_directions", "random_latents", "shuffled_labels") else 1)
    for name, gap in found["differences"].items():
        assert gap["low"] <= gap["mean"] <= gap["high"]
        assert gap["mean"] == pytest.approx(own["ties_half"] - found["accuracy"][name]["ties_half"])
    assert any(x != own["accuracy"] for x in found["accuracy"]["shuffled_labels"]["seeds"])     # unshuffled it is SparseRM itself
    keys = {"calibration": {"temperature", "nll", "brier", "ece", "bins"}, "length": {"correlation", "matched_accuracy", "matched_n"}}
    assert all(set(found[n]) == k for n, k in keys.items()) and {"explained_variance", "l0", "warnings"} <= set(found["sae"])
    assert set(curve) == set(found["curves"]["pairs"]) == {"sparserm", "random_directions", "random_latents", "activations", "dense"}
    assert all(set(c) == {"1", "2", "4", "8"} for c in curve.values()) and curve["dense"]["1"] == found["accuracy"]["dense"]
    assert all(set(c) == {str(found["run"]["pairs"]["train"])} for c in found["curves"]["pairs"].values())
    assert cost["trained_parameters"] == 2 * found["run"]["k"] + 1 == pytest.approx(cost["share"] * cost["backbone_parameters"], rel=1e-3)
    other = found["other"]["self"]                                                              # its own test pairs
    assert {n: v for n, v in other.items() if n != "controls"} == {n: v for n, v in own.items() if n != "choice"}
    assert set(other["controls"]) == CONTROLS
    for name, row in other["controls"].items():
        assert row == {**{n: v for n, v in found["accuracy"][name].items() if n != "choice"}, "behind": found["differences"][name]}
    assert len(found["latents"]) == 2 * found["run"]["k"] == 2 * found["stability"]["k"] and set(found["explanations"]) >= {"1"}
    for row in found["latents"]:
        assert set(row) >= {"latent", "side", "frequency_chosen", "frequency_rejected", "low", "high", "weight", "tokens", "texts", "link"}
        assert -1 <= row["low"] <= row["high"] <= 1 and len(row["tokens"]) > 1
        assert {end: len(texts) for end, texts in row["texts"].items()} == {"highest": 2, "lowest": 2}
    assert found["fold"]["norm"] > 0 and all(-1 <= v <= 1 for n, v in found["fold"].items() if n != "norm")
    assert 0 < found["stability"]["least"] <= found["stability"]["mean"] <= 1 and found["warnings"]
    assert len(found["wrong"]) == min(10, round((1 - own["ties_half"]) * own["n"]))             # no ties here
    page = (run / "report.html").read_text("utf-8")
    shown = json.loads(page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
    assert shown["evaluation"] == found and set(shown["images"]) == {"accuracy", "reliability", "curve_k", "curve_pairs"}
    assert all(base64.b64decode(image) == (run / f"{name}.png").read_bytes() for name, image in shown["images"].items())


def test_without_texts_no_language_model_is_opened(run, monkeypatch):
    monkeypatch.setattr(stage1, "load_backbone", lambda *_, **__: pytest.fail("a language model was opened"))
    found = evaluate(run, "--sweeps", "none", "--texts", 0)
    assert found["latents"] and all(row["tokens"] == [] and row["texts"] == {} for row in found["latents"])
    assert (run / "report.html").exists() and (run / "accuracy.png").exists()


@pytest.mark.parametrize("word, args", [("question", ["--layer", 1, 2]), ("case", ["--layer", 1, "--split", "0.1,0.1,0.8"])])
def test_the_accuracy_and_that_on_another_set_are_those_of_scoring_the_texts_of_questions_never_seen(word, args, run, tmp_path):
    other, rows = tmp_path / "other", [{**r, "prompt": r["prompt"].replace("case", word)} for r in tiny.make_pairs(50)]
    extract(run, other, tiny.save_rows(tmp_path / "rows.jsonl", rows), *args)
    alone, found = evaluate(run, "--sweeps", "none"), evaluate(run, "--sweeps", "none", "--other", f"new={other}")
    assert {n for n in found if found[n] != alone[n]} == {"other", "parent"}
    reward, own, rows = stage3.RewardModel.load(run / "reward_head.safetensors"), *(
        [json.loads(line) for line in open(folder / "pairs.jsonl", encoding="utf-8")] for folder in (run, other))
    seen = {p["prompt"] for p in own if p["split"] != "test"}
    for pairs, row in ((own, found["accuracy"]["sparserm"]), (rows, found["other"]["new"])):
        pairs = [p for p in pairs if p["split"] == "test" and p["prompt"] not in seen]
        c, r = (reward.score([p["prompt"] for p in pairs], [p[side] for p in pairs]) for side in ("chosen", "rejected"))
        assert row["n"] == len(pairs) and row["accuracy"] == pytest.approx(sum(a > b for a, b in zip(c, r)) / len(pairs))


def test_controls_are_trained_on_this_run_and_read_on_the_other(run, tmp_path):
    rows = [{**r, "prompt": r["prompt"].replace("case", "question"), "chosen": r["chosen"] * (1 + n % 2)}
            for n, r in enumerate(tiny.make_pairs(50))]
    extract(run, tmp_path / "other", tiny.save_rows(tmp_path / "rows.jsonl", rows), "--layer", 1)
    found = evaluate(run, "--sweeps", "none", "--other", f"new={tmp_path / 'other'}")
    here, there = (next((folder / "activations").iterdir()) for folder in (run, tmp_path / "other"))
    (own, _), (other, _) = stage1.load_stage(here), stage1.load_stage(there)
    test, controls = other["split"] == TEST, found["other"]["new"]["controls"]
    length = float(found["accuracy"]["length"]["choice"]) * (other["chosen_tokens"] - other["rejected_tokens"])[test]
    assert controls["length"]["accuracy"] == pytest.approx(float((length > 0).float().mean()))
    assert 0 < controls["length"]["accuracy"] < 1
    train = torch.cat([own[side][own["split"] == TRAIN] for side in ("chosen", "rejected")])
    std = train.std(0, unbiased=False)
    scaled = [(own[side] - train.mean(0)) / std for side in ("chosen", "rejected")]
    _, heads, losses, _ = stage3.fit_best(*scaled, own["split"], stage4.DENSE, range(2), epochs=60)             # as make_run's head
    u = heads[losses.index(min(losses))]["w1"] / std
    right = [float(d @ u) > 0 for d in (other["chosen"] - other["rejected"])[test]]
    assert controls["dense"]["accuracy"] == pytest.approx(sum(right) / len(right)) and controls["dense"]["n"] == len(right)
    behind = controls["dense"]["behind"]
    assert behind["mean"] == pytest.approx(found["other"]["new"]["ties_half"] - controls["dense"]["ties_half"])
    assert behind["low"] <= behind["mean"] <= behind["high"]


def test_the_same_command_gives_the_same_bytes_in_another_process(run, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    evaluate(run, "--sweeps", "full", "--texts", 2)
    args = ["--run", str(tmp_path / "again"), "--seeds", 1, "--sweeps", "full", "--texts", 2]
    commands = f"import tiny; tiny.succeed('04_evaluate', *{args!r})"
    subprocess.run([sys.executable, "-c", commands], check=True,
                   env={**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": f"{tiny.ROOT}{os.pathsep}{tiny.ROOT / 'tests'}"})
    for name in ("evaluation.json", "report.html", "accuracy.png", "reliability.png", "curve_k.png", "curve_pairs.png"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_second_call_shows_the_same_table_and_computes_nothing_unless_the_sweeps_differ(run, monkeypatch, capsys):
    assert set(evaluate(run, "--sweeps", "small")["curves"]) == {"k"}
    found = evaluate(run, "--sweeps", "none")
    assert found["curves"] == {}
    older = json.dumps({"parent": {**found["parent"], "format": 1}, "accuracy": {}})
    (run / "evaluation.json").write_text(older)
    assert evaluate(run, "--sweeps", "none") == found
    before = (run / "evaluation.json").stat().st_mtime_ns
    monkeypatch.setattr(stage4, "evaluate", lambda *_: pytest.fail("computed again"))
    with tiny.argv("--run", run, "--seeds", 1, "--sweeps", "none", "--texts", 0):
        stage4.main()
    assert "shuffled_labels" in capsys.readouterr().out and (run / "evaluation.json").stat().st_mtime_ns == before


def test_swapped_sides_turn_the_accuracy_of_a_fixed_head_into_1_minus_it_and_leave_what_is_fitted_anew(before, run):
    def swap(t, rows):
        for a, b in (("chosen", "rejected"), ("chosen_tokens", "rejected_tokens")):
            t[a], t[b] = t[b], t[a]
        for row in rows:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    change_run(run, swap)
    a, b = before["accuracy"], evaluated(run)["accuracy"]
    assert a["sparserm"]["ties"] == 0 and b["sparserm"]["accuracy"] == pytest.approx(1 - a["sparserm"]["accuracy"])
    for name in ("dense", "words", "length", "random_directions", "activations"):
        assert b[name]["accuracy"] == pytest.approx(a[name]["accuracy"])


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_train_activations_change_nothing_that_is_read_off_test_and_test_activations_no_choice(split, before, run):
    change_run(run, lambda t, _: t.update(chosen=torch.where((t["split"] == split)[:, None], -9 * t["rejected"], t["chosen"]),
                                          chosen_tokens=t["chosen_tokens"] * ((t["split"] < TEST) | (split < TEST))))
    a, b = before["accuracy"], (after := evaluated(run))["accuracy"]
    if split == TRAIN:
        assert all(before[n] == after[n] for n in ("calibration", "length")) and any(a[n] != b[n] for n in ("dense", "activations"))
        assert all(a[n] == b[n] for n in ("sparserm", "words", "length"))
    else:
        assert {n: a[n]["choice"] for n in a} == {n: b[n]["choice"] for n in b} and before["calibration"] != after["calibration"]


def test_a_head_with_a_fixed_k_gives_the_controls_the_same_k(run):
    succeed("03_train_head", "--run", run, "--k", 3, "--head", "mlp", "--hidden", 4, "--seeds", 1, "--epochs", 20)
    found = evaluate(run, "--sweeps", "none")["accuracy"]
    assert {n: found[n]["choice"] for n in found if n not in ("dense", "words", "length")} == {
        "sparserm": 3, "activations": 3, "random_directions": [3], "random_latents": [3], "shuffled_labels": [3]}


def refused(run, *words, args=()):
    assert_one_line_error(command("04_evaluate", "--run", run, "--seeds", 1, "--sweeps", "none", "--texts", 0, *args), *words)
    assert not (run / "evaluation.json").exists()


def test_a_head_made_from_other_features_or_none_is_refused_and_the_stage_to_run_named(run):
    succeed("02_select_features", "--run", run, "--sae", read_meta(run / "features.safetensors")["sae"], "--k", 4)
    refused(run, "another features.safetensors", "03")
    (run / "reward_head.safetensors").unlink()
    refused(run, "reward_head.safetensors", "03_train_head.py")


def test_another_sae_activations_of_another_run_and_no_test_pairs_are_refused(run, tmp_path):
    refused(run, "not the SAE", args=["--sae", tiny.save_sae(tmp_path / "other.safetensors", seed=1)])
    refused(run, "none.safetensors", args=["--sae", tmp_path / "none.safetensors"])
    change_run(run, lambda t, _: t["split"].clamp_(max=DEV))
    refused(run, "test split", run)
    extract(run, run, run / "pairs.jsonl", "--layer", 1, "--token", "content")
    refused(run, "activations", run, "02")


@pytest.mark.parametrize("flag, value, word", [("--seeds", "0", "--seeds"), ("--other", "a", "NAME=DIR"), ("--other", "b=none", "none")])
def test_a_flag_that_cannot_be_meant_is_one_line_that_names_it(flag, value, word, run):
    refused(run, word, args=[flag, value])


@pytest.mark.parametrize("args, word", [(["--layer", 2], "layer"), (["--layer", 1, "--token", "eot"], "token"),
                                        (["--layer", 1, "--split", "0.8,0.2,0"], "test pair")])
def test_another_set_of_another_layer_or_token_or_without_test_pairs_is_refused(args, word, run, tmp_path):
    extract(run, tmp_path / "other", run / "pairs.jsonl", *args)
    refused(run, word, "other", args=["--other", f"x={tmp_path / 'other'}"])
