"""Stage 4, against numbers worked by hand, plain loops, and the reward model itself."""

import argparse
import base64
import importlib
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from tiny import assert_one_line_error, command, succeed

from parts.files import file_hash, load_stage, read_meta, save_stage, write_rows
from parts.statistics import group_weights, summary
from sae import SAE

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
TRAIN, DEV, TEST = range(3)
SIDES = ("chosen", "rejected")
NAMES = {"dense", "random_directions", "picked_directions", "picked_latents", "random_latents",
         "difference_of_means", "principal_directions", "activations", "words", "length",
         "shuffled_labels", "paper"}
WITH_K = {"sparserm", "random_directions", "picked_directions", "picked_latents",
          "random_latents", "activations"}
METHODS = {"sparserm": stage4.sparserm, **stage4.CONTROLS}
SETTINGS = {"kind": "linear", "loss": "bt", "margin": 1.0}


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---------------------------------------------------------------- planted pairs

def texts_for(n):
    """n pairs of texts that say who is chosen in every third pair."""
    rng = random.Random(0)
    rows = []
    for number in range(n):
        words = [" ".join(rng.choices("the cat sat on a mat".split(), k=5)) for _ in SIDES]
        if number % 3 == 0:
            words = [f"{words[0]} yes", f"{words[1]} no"]
        rows.append({"id": f"p{number}", "prompt": f"q{number}", **dict(zip(SIDES, words))})
    return rows


def planted_data(z, group=None, split=None, rows=None, tokens=None, k=3, **changes):
    """Data whose SAE is the identity: column j of z [2, n, d] is latent j and direction j.

    A prompt of its own for every pair unless `group` says otherwise.
    """
    sides = [torch.tensor(np.asarray(side), dtype=torch.float32) for side in z]
    n, width = sides[0].shape
    data = object.__new__(stage4.Data)
    stage4.Pairs.__init__(
        data, sides,
        torch.full((n,), TRAIN) if split is None else torch.as_tensor(split),
        np.arange(n) if group is None else np.asarray(group),
        [np.ones(n, int), np.ones(n, int)] if tokens is None else tokens,
        texts_for(n) if rows is None else rows)
    zero = torch.zeros(width)
    data.sae = SAE(torch.eye(width), zero, torch.eye(width), zero, zero, "relu")
    data.meta = {"normalise": "none", "k_asked": k}
    data.settings = SETTINGS
    data.asked = {"k": "auto", "l2": "auto"}
    data.head_meta = {"k": 2, "l2": 0.1}
    data.total = k
    for name, value in changes.items():
        setattr(data, name, value)
    data.counts = stage4.fold_counts(data.sae, data.z, data.fold)
    return data


def noise(n=60, width=16, seed=0, tell=0.5):
    """z [2, n, width]: noise, but for a part that tells chosen from rejected in three columns."""
    z = np.random.default_rng(seed).normal(size=(2, n, width))
    z[0, :, 1] += tell
    z[1][:, [3, 4]] += tell
    return z


def planted(**changes):
    """Data of noise() with two pairs a prompt and some lengths."""
    common = {"group": np.arange(60) // 2,
              "tokens": [np.arange(60) % 7 + 1, np.arange(60) % 5 + 1]}
    return planted_data(noise(), **common | changes)


def accuracy(differences):
    return float((differences > 0).mean())


# ---------------------------------------------------------------- folds

def test_all_pairs_of_a_prompt_are_in_one_fold_and_folds_hold_as_many_prompts():
    data = planted_data(noise(), group=np.random.default_rng(0).integers(10, 30, 60) * 1000)
    folds_of_group = {}
    for group, fold in zip(data.group.tolist(), data.fold.tolist(), strict=True):
        folds_of_group.setdefault(group, set()).add(fold)
    assert all(len(folds) == 1 for folds in folds_of_group.values())
    sizes = [sum(folds == {number} for folds in folds_of_group.values()) for number in range(5)]
    assert max(sizes) - min(sizes) <= 1


def test_a_part_of_the_pairs_holds_those_pairs_in_order():
    data = planted()
    part = data.part(torch.arange(60) % 20 == 3)
    assert [pair["id"] for pair in part.pairs] == ["p3", "p23", "p43"]
    assert part.group.tolist() == [1, 11, 21]
    assert torch.equal(part.z[1], data.z[1][[3, 23, 43]])
    assert part.tokens[0].tolist() == [4, 3, 2]


def test_pairs_used_are_those_in_none_of_the_folds_left_out():
    data = planted()
    assert data.used((1, 4)).tolist() == [fold not in (1, 4) for fold in data.fold.tolist()]
    assert data.used(()).all()


def test_latents_are_selected_on_the_pairs_of_the_folds_that_are_not_left_out():
    data = planted()
    for left_out in [(), (2,), (0, 3)]:
        rows = data.used(left_out)
        fires = [(side[rows] > 0).float().mean(0) for side in data.z]
        assert torch.equal(data.selected(left_out), stage2.select_latents(*fires, 3))


def test_left_out_are_no_fold_each_and_each_two():
    found = planted().left_outs()
    assert len(found) == len(set(found)) == 1 + 5 + 10
    assert {(), (3,), (1, 4)} <= set(found)


def changed_fold(data, test):
    """The data with z of both sides swapped and doubled, other texts and other lengths in all pairs
    of one fold but its first prompt.

    → (the data, which pairs of the fold are as they were)
    """
    of_fold = (data.fold == test).numpy()
    kept = of_fold & (data.group == data.group[of_fold][0])
    other = of_fold & ~kept
    z = [side.numpy().copy() for side in data.z]
    z[0][other], z[1][other] = 2 * z[1][other], 2 * z[0][other]
    rows = [dict(row) for row in data.pairs]
    tokens = [side.copy() for side in data.tokens]
    for n in np.flatnonzero(other):
        rows[n] |= {"chosen": "no no no", "rejected": "yes the yes"}
        tokens[0][n] = 99
    changed = planted_data(z, data.group, rows=rows, tokens=tokens)
    assert torch.equal(changed.fold, data.fold)
    return changed, kept


@pytest.mark.parametrize("name", METHODS)
def test_the_pairs_of_a_fold_change_nothing_in_the_heads_that_are_tested_on_it(name):
    data = planted()
    changed, kept = changed_fold(data, 2)
    before, after = METHODS[name](data), METHODS[name](changed)
    assert after.choices[2] == before.choices[2]
    np.testing.assert_allclose(after.differences[kept], before.differences[kept], atol=1e-5)
    assert not np.allclose(after.differences, before.differences)       # but elsewhere


def test_k_is_not_limited_by_the_latents_that_separate_in_the_fold_that_is_tested():
    data = planted(asked={"k": "3", "l2": 0.1})
    z = [side.numpy().copy() for side in data.z]
    of_fold = (data.fold == 2).numpy()
    z[0][of_fold] = -1
    z[1][of_fold] = 1                               # with these pairs none fires more in chosen
    changed = planted_data(z, data.group, asked=data.asked)
    assert stage4.sparserm(data).choices[2] == (3, 0.1)
    assert stage4.sparserm(changed).choices[2] == (3, 0.1)


@pytest.mark.parametrize("name", sorted(NAMES - {"length", "random_latents"}))
def test_the_pairs_of_a_fold_are_trained_on_where_another_fold_is_tested(name):
    data = planted()
    changed, _ = changed_fold(data, 2)
    others = (data.fold != 2).numpy()
    before, after = METHODS[name](data), METHODS[name](changed)
    assert not np.allclose(after.differences[others], before.differences[others], atol=1e-3)


# ---------------------------------------------------------------- cross-validation within the folds

KS = [1, 2]
PENALTIES = (1.0, 0.01)


def naive_columns(pairs, left_out, k):
    """2K columns: those with the largest mean difference of the pairs of the other folds."""
    rows = [n for n, fold in enumerate(pairs.fold.tolist()) if fold not in left_out]
    means = (pairs.z[0][rows] - pairs.z[1][rows]).mean(0).abs().tolist()
    return sorted(range(len(means)), key=means.__getitem__, reverse=True)[:2 * k]


def by_mean_difference(pairs):
    """select(left_out) of naive_columns."""
    def select(left_out):
        def scores(any_pairs):
            return any_pairs.z

        def columns(k):
            return torch.tensor(naive_columns(pairs, left_out, k))
        return stage4.View(scores, columns)
    return select


def naive_fit(pairs, left_out, option):
    """A head trained without some folds → function of other pairs → their differences."""
    k, l2 = option
    columns = naive_columns(pairs, left_out, k)
    rows = [n for n, fold in enumerate(pairs.fold.tolist()) if fold not in left_out]
    sides = [side[:, columns].double().numpy() for side in pairs.z]
    both = np.concatenate([side[rows] for side in sides])
    scaled = [(side[rows] - both.mean(0)) / both.std(0) for side in sides]
    head = stage3.fit_linear(*scaled, "bt", l2)

    def differences(others):
        z = [side[:, columns].double().numpy() for side in others.z]
        return ((z[0] - z[1]) / both.std(0)) @ head.w1.double().numpy()
    return differences


def naive_losses(pairs, test, option):
    """Mean loss on the folds that are not tested, of heads trained without each and the test."""
    losses = []
    for held in range(5):
        if held != test:
            found = naive_fit(pairs, {test, held}, option)(pairs)
            of_held = found[(pairs.fold == held).numpy()]
            losses.extend(math.log1p(math.exp(-difference)) for difference in of_held)
    return statistics.fmean(losses)


@pytest.fixture(scope="module")
def small():
    """(pairs, naive choice of each fold, out_of_fold of them with the rule `best`)."""
    z = noise(40, 6, seed=3)
    pairs = stage4.Pairs([torch.tensor(side).float() for side in z], torch.zeros(40),
                         np.arange(40) // 2, None, None)
    choices = []
    for test in range(5):
        losses = {}
        for option in itertools.product(KS, PENALTIES):
            losses[option] = naive_losses(pairs, test, option)
        choices.append(min(losses, key=losses.get))
    other = stage4.Pairs([torch.tensor(side).float() for side in noise(9, 6, seed=4)],
                         torch.zeros(9), np.arange(9), None, None)
    outcome = stage4.out_of_fold(pairs, by_mean_difference(pairs), KS, SETTINGS, "best",
                                 curve=True, others={"new": other}, penalties=PENALTIES)
    return pairs, choices, outcome, other


def test_k_and_penalty_of_each_fold_are_those_of_a_naive_nested_cross_validation(small):
    _, choices, outcome, _ = small
    assert outcome.choices == choices
    assert len(set(choices)) > 1


def test_each_pair_is_tested_by_a_head_of_the_other_folds_with_what_they_chose(small):
    pairs, choices, outcome, _ = small
    for test, option in enumerate(choices):
        at = (pairs.fold == test).numpy()
        wanted = naive_fit(pairs, {test}, option)(pairs)[at]
        np.testing.assert_allclose(outcome.differences[at], wanted, atol=1e-5)


def test_the_curve_of_k_is_tested_out_of_fold_with_the_best_penalty_of_that_k(small):
    pairs, _, outcome, _ = small
    assert set(outcome.by_k) == set(KS)
    for k, test in itertools.product(KS, range(5)):
        at = (pairs.fold == test).numpy()
        best = min(PENALTIES, key=lambda l2: naive_losses(pairs, test, (k, l2)))
        wanted = naive_fit(pairs, {test}, (k, best))(pairs)[at]
        np.testing.assert_allclose(outcome.by_k[k][at], wanted, atol=1e-5)


def test_another_set_is_read_with_a_head_of_all_pairs_and_the_commonest_choice(small):
    pairs, choices, outcome, other = small
    commonest = statistics.mode(choices)
    wanted = naive_fit(pairs, set(), commonest)(other)
    np.testing.assert_allclose(outcome.of_others["new"], wanted, atol=1e-5)


def test_the_rule_is_handed_the_loss_of_every_pair_that_is_not_in_the_test_fold(monkeypatch):
    data = planted()
    seen = []

    def noted(losses, groups, rule):
        seen.append((losses, groups.tolist(), rule))
        return min(losses)
    monkeypatch.setattr(stage3, "choose", noted)
    outcome = stage4.sparserm(data)
    for test, (losses, groups, rule) in enumerate(seen):
        rows = (data.fold != test).numpy()
        assert groups == data.group[rows].tolist()
        assert rule == "auto"
        assert {k for k, _ in losses} == {1, 2, 3}
        assert {l2 for _, l2 in losses} == set(stage3.PENALTIES)
        assert all(len(loss) == rows.sum() and (loss > 0).all() for loss in losses.values())
    assert outcome.choices == [(1, min(stage3.PENALTIES))] * 5


def test_k_and_penalty_that_were_set_are_taken_and_not_searched():
    data = planted(asked={"k": "2", "l2": 0.05})
    for name in WITH_K:
        assert METHODS[name](data).choices == [(2, 0.05)] * 5, name
    assert stage4.dense(data).choices == [(None, 0.05)] * 5


def test_of_latents_that_fewer_separate_k_is_as_large_as_all_folds_have():
    z = np.abs(noise(100))                                      # all fire, but two of them
    z[0, ::2, 0] = -1
    z[1, ::2, 1] = -1
    data = planted_data(z, k=3)
    assert {k for k, _ in stage4.sparserm(data).choices} == {1}


def test_with_fewer_than_20_prompts_nothing_is_searched():
    z = noise(19)
    data = planted_data(z)
    assert stage4.too_few(data)
    outcome = stage4.sparserm(data)
    assert outcome.choices == [(3, stage3.WITHOUT_SEARCH["l2"])] * 5
    assert outcome.by_k == {}
    assert not stage4.too_few(planted_data(noise(20)))


def test_without_a_search_each_fold_is_tested_by_a_head_of_the_others():
    pairs = stage4.Pairs([torch.tensor(side).float() for side in noise(15, 6)], torch.zeros(15),
                         np.arange(15), None, None)
    outcome = stage4.fixed_choice(pairs, by_mean_difference(pairs), SETTINGS, 2)
    for test in range(5):
        at = (pairs.fold == test).numpy()
        wanted = naive_fit(pairs, {test}, (2, stage3.WITHOUT_SEARCH["l2"]))(pairs)[at]
        np.testing.assert_allclose(outcome.differences[at], wanted, atol=1e-5)


def linear_head(*weights):
    head = stage3.LinearHead(len(weights))
    head.load_state_dict({"w1": torch.tensor(weights), "b1": torch.ones(1)})
    return head.requires_grad_(False)


def test_a_fitted_head_scales_new_pairs_by_what_it_was_trained_on():
    fitted = stage4.Fitted(linear_head(2.0, -3.0), torch.tensor([2, 0]),
                           mean=torch.tensor([1.0, 9, 2]), std=torch.tensor([2.0, 9, 4]))
    # columns 2 and 0, standardised: (10 - 2)/4 = 2 and (3 - 1)/2 = 1 · (2 - 2)/4 = 0 and 2
    sides = [torch.tensor([[3.0, 7, 10]]), torch.tensor([[5.0, 7, 2]])]
    assert fitted.differences(sides).tolist() == [(2 * 2 - 3 * 1) - (0 - 3 * 2)]
    losses = fitted.losses(sides, stage3.bradley_terry_loss)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-7))], rel=1e-3)


@pytest.mark.parametrize("scale", [True, False])
def test_a_head_is_scaled_by_both_sides_of_the_pairs_it_is_trained_on(scale):
    sides = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    rows = torch.arange(40) % 4 < 2
    view = stage4.View(None, scale=scale)
    [(_, fitted)] = stage4.fit_path(view, [*sides], rows, [None], [0.1], SETTINGS)
    train = sides[:, rows].flatten(0, 1)
    mean, std = (train.mean(0), train.std(0, correction=0)) if scale else (0, 1)
    torch.testing.assert_close(fitted.mean, torch.as_tensor(mean, dtype=torch.float32))
    torch.testing.assert_close(fitted.std, torch.as_tensor(std, dtype=torch.float32))


# ---------------------------------------------------------------- MLPs

MLP = {"kind": "mlp", "loss": "margin", "margin": 1.0, "hidden": 4, "lr": 0.01, "epochs": 5,
       "patience": 2, "seed": 0}


def test_an_mlp_stops_on_the_next_fold_and_trains_as_long_on_all_but_the_test_fold():
    data = planted(settings=MLP, head_meta={"l2": 0.01, "k": 2})
    outcome = stage4.sparserm(data)
    options = {name: value for name, value in MLP.items() if name != "kind"}
    for test in range(5):
        following = (test + 1) % 5
        sides = scaled_scores(data, {test, following})
        held = [side[data.fold == following] for side in sides]
        train = [side[data.used((test, following))] for side in sides]
        _, steps, _ = stage3.fit_mlp(*train, l2=0.01, held=held, **options)
        sides = scaled_scores(data, {test})
        head, _, _ = stage3.fit_mlp(*[side[data.used((test,))] for side in sides], l2=0.01,
                                    steps=steps, **options)
        chosen, rejected = [head(side[data.fold == test]) for side in sides]
        at = (data.fold == test).numpy()
        np.testing.assert_allclose(outcome.differences[at], chosen - rejected, atol=1e-5)
    assert outcome.choices == [(3, 0.01)] * 5


def scaled_scores(data, left_out):
    """Scores of all pairs on the latents of the other folds, standardised on those → both sides."""
    latents = data.selected(tuple(sorted(left_out)))
    sides = [side[:, latents] for side in data.z]
    rows = data.used(tuple(left_out))
    both = torch.cat([side[rows] for side in sides])
    return [(side - both.mean(0)) / both.std(0, correction=0) for side in sides]


def test_of_an_mlp_run_the_dense_control_is_an_mlp_too():
    data = planted(settings=MLP, head_meta={"l2": 0.01, "k": 2})
    assert stage4.dense(data).choices == [(None, 0.01)] * 5
    differences = stage4.dense(planted()).differences
    assert not np.allclose(stage4.dense(data).differences, differences, atol=0.1)


def test_the_papers_head_is_an_mlp_of_512_with_the_margin_loss_on_all_k(monkeypatch):
    calls = []

    def noted(pairs, select, k, settings, l2):
        calls.append((k, settings["hidden"], settings["loss"], l2))
    monkeypatch.setattr(stage4, "mlp_out_of_fold", noted)
    stage4.paper(planted())
    assert calls == [(3, 512, "margin", stage3.MLP_L2)]


# ---------------------------------------------------------------- what the controls see of a pair

def captured(name, data, monkeypatch):
    """A control → its select(left_out), in place of any training."""
    found = []

    def capture(data, select, ks, *_, **__):
        found.append(select)
        return stage4.Outcome(np.zeros(len(data.fold)))
    monkeypatch.setattr(stage4, "test_method", capture)
    METHODS[name](data)
    [select] = found
    return select


def assert_same_scores(found, wanted):
    for scores, by_hand in zip(found, wanted, strict=True):
        np.testing.assert_allclose(scores, by_hand, rtol=1e-4, atol=1e-4)


def swapped(data):
    """The same pairs with all labels the other way round."""
    return planted_data([data.z[1], data.z[0]], data.group)


def separates(data, candidate, left_out):
    """Standardised mean difference of a direction on the pairs of the other folds."""
    used = data.used(left_out).tolist()
    values = []
    for chosen, rejected, is_used in zip(*data.z, used, strict=True):
        if is_used:
            values.append(float((chosen - rejected).double() @ candidate.double()))
    return abs(statistics.fmean(values)) / statistics.pstdev(values)


@pytest.mark.parametrize("name", ["picked_directions", "picked_latents"])
@pytest.mark.parametrize("left_out", [(), (1,), (0, 3)])
def test_directions_are_picked_by_standardised_mean_difference_on_the_other_folds(
        name, left_out, monkeypatch):
    monkeypatch.setattr(stage4, "CANDIDATES", 40)
    data = planted()
    candidates = torch.eye(16)
    if name == "picked_directions":
        candidates = stage4.gaussian_directions(40, 16, seed=1)
    found = captured(name, data, monkeypatch)(left_out).scores(data)

    order = sorted(candidates, key=lambda row: separates(data, row, left_out), reverse=True)
    best = torch.stack(order[:6])
    assert_same_scores(found, [side @ best.T for side in data.z])


def test_k_of_directions_in_an_order_is_the_first_2k(monkeypatch):
    view = captured("picked_directions", planted(), monkeypatch)((0,))
    assert view.columns(2).tolist() == [0, 1, 2, 3]


def test_an_sae_with_fewer_latents_than_2k_gives_picked_latents_all_it_has():
    data = planted(k=9)                    # 16 latents, 2 K = 18
    assert len(stage4.picked_latents(data).choices) == 5


def test_the_difference_of_means_is_the_one_of_the_other_folds(monkeypatch):
    data = planted()
    view = captured("difference_of_means", data, monkeypatch)((1, 2))
    rows = data.used((1, 2))
    direction = sum(data.z[0][rows] - data.z[1][rows]) / int(rows.sum())
    assert_same_scores(view.scores(data), [(side @ direction)[:, None] for side in data.z])
    assert view.columns is None


def test_principal_directions_are_the_right_singular_vectors_of_the_differences(monkeypatch):
    data = planted()
    view = captured("principal_directions", data, monkeypatch)((4,))
    rows = data.used((4,))
    _, _, vectors = np.linalg.svd((data.z[0][rows] - data.z[1][rows]).double().numpy())
    found = [side.abs() for side in view.scores(data)]                  # a sign says nothing
    assert_same_scores(found, [np.abs(side.numpy() @ vectors[:6].T) for side in data.z])


@pytest.mark.parametrize("name", ["random_directions", "random_latents"])
def test_what_is_drawn_at_random_depends_neither_on_labels_nor_on_folds(name, monkeypatch):
    data = planted()
    wanted = captured(name, data, monkeypatch)(()).scores(data)
    for other, left_out in [(data, (2, 3)), (swapped(data), ()), (swapped(data), (1,))]:
        assert_same_scores(captured(name, other, monkeypatch)(left_out).scores(data), wanted)


def test_random_directions_have_norm_1_and_differ_from_draw_to_draw():
    directions = stage4.gaussian_directions(6, 32, 1)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(6))
    assert not torch.equal(directions, stage4.gaussian_directions(6, 32, 2))


def test_random_latents_are_different_ones_among_those_that_fire_on_either_side(monkeypatch):
    z = -np.ones((2, 60, 40))
    z[0][:, 1::3] = 1
    z[1][7, 0] = 1
    data = planted_data(z, k=5)
    data.sae.W_dec = torch.diag(torch.arange(40.0))             # row n holds n at place n
    scores = captured("random_latents", data, monkeypatch)(()).scores(
        argparse.Namespace(z=[torch.ones(1, 40)]))
    drawn = scores[0][0].tolist()
    assert len(set(drawn)) == 10
    assert all(latent % 3 == 1 or latent == 0 for latent in drawn)


def test_activations_are_what_the_selected_latents_fire(monkeypatch):
    data = planted()
    view = captured("activations", data, monkeypatch)((0, 1))
    latents = data.selected((0, 1))
    assert_same_scores(view.scores(data), [side[:, latents].clamp_min(0) for side in data.z])
    other = data.part(torch.arange(60) < 9)
    assert_same_scores(view.scores(other), [side[:9, latents].clamp_min(0) for side in data.z])


def test_sparserm_reads_projections_on_the_selected_latents_that_do_not_end_at_0(monkeypatch):
    data = planted()
    view = captured("sparserm", data, monkeypatch)((0, 1))
    latents = data.selected((0, 1))
    assert_same_scores(view.scores(data), [side[:, latents] for side in data.z])
    assert view.columns(1).tolist() == [0, 3]                   # the first of each side


def test_the_dense_control_reads_all_of_z(monkeypatch):
    data = planted()
    assert_same_scores(captured("dense", data, monkeypatch)((1,)).scores(data), data.z)


# ---------------------------------------------------------------- shuffled labels

def test_the_labels_of_half_of_each_fold_are_shuffled():
    fold = torch.tensor([0, 1, 2] * 7 + [2] * 5)
    coin = stage4.half_of_each_fold(fold)
    assert [int(coin[fold == number].sum()) for number in range(3)] == [3, 3, 6]
    assert not torch.equal(coin, stage4.half_of_each_fold(fold, seed=1))


def shuffled_by_hand(data):
    """z of both sides, half of each fold swapped, by a plain loop."""
    sides = [side.clone() for side in data.z]
    for n, is_swapped in enumerate(stage4.half_of_each_fold(data.fold).tolist()):
        if is_swapped:
            sides[0][n], sides[1][n] = data.z[1][n], data.z[0][n]
    return sides


def test_with_shuffled_labels_the_latents_are_those_that_the_shuffled_pairs_select(monkeypatch):
    data = planted()
    shuffled = planted_data(shuffled_by_hand(data), data.group)
    view = captured("shuffled_labels", data, monkeypatch)((3,))
    latents = shuffled.selected((3,))
    assert not torch.equal(latents, data.selected((3,)))
    assert_same_scores(view.scores(data), [side[:, latents] for side in shuffled.z])


def test_heads_of_shuffled_pairs_are_scored_on_the_true_labels():
    data = planted()
    outcome = stage4.shuffled_labels(data)
    of_shuffled = stage4.sparserm(planted_data(shuffled_by_hand(data), data.group))
    sign = np.where(stage4.half_of_each_fold(data.fold), -1, 1)
    assert outcome.choices == of_shuffled.choices
    np.testing.assert_allclose(outcome.differences, sign * of_shuffled.differences, atol=1e-6)


def test_on_pairs_that_anyone_tells_apart_shuffled_labels_are_near_one_half():
    data = planted_data(noise(200, tell=6))
    assert accuracy(stage4.sparserm(data).differences) == 1
    assert 0.35 < accuracy(stage4.shuffled_labels(data).differences) < 0.65


# ---------------------------------------------------------------- words and length

ROWS = torch.tensor([True, True, False, False])
TEXTS = [["a b", "A c!", "z y z y", "a b"], ["a, b", "d", "z y", "b z y"]]


def test_only_grams_of_two_train_responses_become_columns_and_rows_have_norm_1():
    chosen, rejected = stage4.WordFeatures(TEXTS, ROWS)(TEXTS)
    assert chosen.shape == rejected.shape == (4, 3)         # a (three times), b, "a b" (twice each)
    norms = torch.cat([chosen, rejected]).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 1, 0, 1, 1, 0, 0, 1]))


def test_the_same_words_give_the_same_row_and_the_most_frequent_one_weighs_least():
    chosen, rejected = stage4.WordFeatures(TEXTS, ROWS)(TEXTS)
    assert torch.equal(chosen[0], rejected[0])
    assert torch.equal(chosen[0], chosen[3])
    assert (chosen[0] > 0).all()
    only_a = chosen[1].argmax()
    assert chosen[0].argmin() == only_a


def test_words_of_pairs_that_are_not_trained_on_change_no_row():
    others = [["a b", "A c!", "q q", "q"], ["a, b", "d", "q", "q"]]
    features = stage4.WordFeatures(TEXTS, ROWS)
    for found in (features(others), stage4.WordFeatures(others, ROWS)(others)):
        for side, wanted in zip(found, features(TEXTS)):
            assert torch.equal(side[:2], wanted[:2])


def on_words(*words):
    """80 pairs whose responses are of filler and one of two words → differences of the words."""
    rng = random.Random(0)
    rows = []
    for n in range(80):
        row = {}
        for side, word in zip(SIDES, words, strict=True):
            filler = " ".join(rng.choices("the cat sat on a mat while it rained".split(), k=9))
            row[side] = f"{filler} {word}".replace("N", str(n))
        rows.append(row)
    return stage4.words(planted_data(np.zeros((2, 80, 2)), rows=rows)).differences


def test_a_word_that_decides_everything_gives_the_words_an_accuracy_of_1():
    assert (on_words("yes", "no") > 0).all()


def test_filler_alone_tells_the_words_nothing():
    assert 0.25 < accuracy(on_words("so", "so")) < 0.75


def test_responses_without_a_common_word_are_ties_for_the_words():
    rows = [{side: f"{side}{n}" for side in SIDES} for n in range(80)]
    outcome = stage4.words(planted_data(np.zeros((2, 80, 2)), rows=rows))
    assert (outcome.differences == 0).all()


def test_the_longer_or_the_shorter_response_wins_as_on_the_other_folds():
    rng = np.random.default_rng(0)
    data = planted(tokens=[rng.integers(1, 9, 60), rng.integers(1, 9, 60)])
    outcome = stage4.length(data)
    longer = (data.tokens[0] - data.tokens[1]).tolist()
    for test in range(5):
        elsewhere = 0
        for n, fold in enumerate(data.fold.tolist()):
            elsewhere += (longer[n] > 0) - (longer[n] < 0) if fold != test else 0
        sign = 1 if elsewhere > 0 else -1
        assert outcome.choices[test][0] == ("longer" if elsewhere > 0 else "shorter")
        for n in np.flatnonzero(data.fold == test):
            assert outcome.differences[n] == sign * longer[n]


def test_where_a_fold_is_the_other_way_round_its_lengths_are_all_wrong():
    data = planted_data(noise())
    longer = np.where(data.fold == 3, 5, 1), np.where(data.fold == 3, 1, 5)
    data.tokens = list(longer)
    outcome = stage4.length(data)
    assert [word for word, _ in outcome.choices] == ["shorter"] * 5
    assert ((outcome.differences < 0) == (data.fold == 3).numpy()).all()


def test_another_set_is_read_by_the_lengths_of_this_one():
    data = planted_data(noise(), tokens=[np.full(60, 2), np.full(60, 5)])
    other = planted_data(noise(4), tokens=[np.array([1, 2, 3, 4]), np.full(4, 3)])
    outcome = stage4.length(data, {"new": other})
    assert outcome.of_others["new"].tolist() == [2, 1, 0, -1]


# ---------------------------------------------------------------- answers, categories, fewer pairs

@pytest.mark.parametrize("answers, share", [
    (["yes", "no", "Yes!", "maybe"], 2 / 4),
    (["a b", "c", "d", "e"], 0),
    (["a", "a", "b", "c"], 0),              # twice under one prompt is not several prompts
])
def test_answers_are_repeated_where_they_stand_under_several_prompts(answers, share):
    rows = [dict(zip(SIDES, answers[:2])), dict(zip(SIDES, answers[2:]))]
    assert stage4.repeated_answers(planted_data(np.zeros((2, 2, 1)), rows=rows)) == share


def with_categories(*names):
    """Pairs of these categories (None: has none) → by_category of differences -1, 1, 1, 1 …"""
    rows = [{"category": name} if name else {} for name in names]
    differences = np.ones(len(names))
    differences[0] = -1
    data = planted_data(np.zeros((2, len(names), 1)), rows=rows)
    return differences, stage4.by_category(data, differences)


def test_each_category_has_the_summary_of_its_own_pairs():
    differences, found = with_categories("b", "a", None, "b")
    assert list(found) == ["a", "b"]
    assert found["b"] == summary(differences[[0, 3]], np.array([0, 3]))
    assert found["a"]["n"] == 1


def test_many_categories_are_counted_by_what_stands_before_the_slash():
    _, found = with_categories(*(f"{'ab'[n % 2]}/{n}" for n in range(13)))
    assert {name: row["n"] for name, row in found.items()} == {"a": 7, "b": 6}
    _, found = with_categories(*(f"a/{n}" for n in range(12)))
    assert len(found) == 12


@pytest.mark.parametrize("names", [("a", "a"), (None, "a"), (None, None)])
def test_of_a_single_category_or_none_nothing_is_said(names):
    _, found = with_categories(*names)
    assert found == {}


def test_with_fewer_train_pairs_latents_are_selected_on_those_alone(monkeypatch):
    data = planted()
    counted = []
    count = stage4.fold_counts

    def noted(sae, z, fold):
        counted.append(fold == 0)
        return count(sae, z, fold)
    monkeypatch.setattr(stage4, "fold_counts", noted)
    found = stage4.pairs_curve(data, sizes=(10,))
    assert {name: list(rows) for name, rows in found.items()} == dict.fromkeys(
        ("sparserm", "dense", "random_directions"), ["10", "48"])
    assert [int(rows.sum()) for rows in counted] == [10] * 5 + [48] * 5
    for test, rows in enumerate(counted[:5]):
        assert not (rows & (data.fold == test)).any()


def test_fewer_pairs_are_whole_prompts_until_there_are_enough():
    data = planted_data(noise(), group=np.arange(60) // 4)
    drawn = stage4.draw_pairs(data, data.used((1,)), 10)
    assert drawn.sum() == 12
    assert not drawn[data.fold == 1].any()
    assert all(len(set(drawn[data.group == group].tolist())) == 1 for group in range(15))


def test_on_all_pairs_of_the_other_folds_the_dense_head_is_that_of_the_dense_control():
    data = planted(asked={"k": "auto", "l2": stage3.WITHOUT_SEARCH["l2"]})
    row = stage4.pairs_curve(data, sizes=())["dense"]["48"]
    wanted = summary(stage4.dense(data).differences, data.group)
    assert {name: row[name] for name in wanted} == wanted


def test_the_curve_of_k_keeps_random_directions_where_fewer_latents_separate():
    data = planted_data(noise(), k=15)         # of 16 latents fewer separate a side
    data.total = len(data.selected(())) // 2
    outcomes = {name: METHODS[name](data) for name in ("sparserm", "random_directions")}
    assert min(len(data.selected(out)) // 2 for out in data.left_outs()) < data.total
    found = stage4.k_curve(data, outcomes, {})
    assert {"sparserm", "random_directions", "dense"} <= set(found)


# ---------------------------------------------------------------- are the latents worth believing

def planted_model(weights, kind="linear", **tensors):
    """A reward model on the unit vectors, r = Σ w_j z_j, or an MLP that says the same."""
    w = torch.tensor(weights)
    m = len(weights)
    one = torch.eye(m)
    if kind == "linear":
        head = {"w1": w, "b1": torch.zeros(1)}
    else:                                                   # relu(x) - relu(-x) = x
        head = {"w1": torch.cat([one, -one]), "b1": torch.zeros(2 * m),
                "w2": torch.cat([w, -w]), "b2": torch.zeros(1)}
    common = {"directions": one, "mean": torch.zeros(m), "std": torch.ones(m),
              "temperature": torch.ones(1), "range": torch.ones(1)}
    return stage3.RewardModel({**common, **head, **tensors}, {}, None)


def telling_latents():
    """z [2, 60, 40] of random signs; 3 and 7 fire in chosen responses alone, 11 and 20 in rejected.

    But it is the other way round in the last 10 pairs, and 7 does not fire in the first 15.
    """
    z = np.random.default_rng(0).choice([-1.0, 1.0], (2, 60, 40))
    z[:, :, [3, 7, 11, 20]] = -1
    z[0][:, [3, 7]] = 1
    z[1][:, [11, 20]] = 1
    z[0, :15, 7] = -1
    z[1, 50:] *= -1
    return z


def fires_difference(z, rows, latent):
    """+1 where a latent fires in the chosen response alone, -1 in the rejected one alone."""
    return [float(z[0, n, latent] > 0) - float(z[1, n, latent] > 0) for n in rows]


def test_the_interval_of_a_separation_is_the_one_of_resampled_test_prompts():
    z = telling_latents()
    latents = [3, 7, 11, 20]
    group = np.repeat(np.arange(20), 3)
    data = planted_data(z, group, [TEST] * 50 + [DEV, TRAIN] * 5,
                        head={"latents": torch.tensor(latents)})
    found = stage4.separation(data)

    assert (found[0], found[2]) == ((1, 1), (-1, -1))
    assert 0 < found[1][0] < 35 / 50 < found[1][1] <= 1
    for interval, latent in zip(found, latents, strict=True):
        means = []
        for weights in group_weights(group[:50], 500).astype(int).tolist():
            rows = [n for n in range(50) for _ in range(weights[group[n]])]
            means.append(statistics.fmean(fires_difference(z, rows, latent)))
        first, *_, last = statistics.quantiles(means, n=40, method="inclusive")
        assert interval == pytest.approx((first, last), abs=1e-5)


def test_the_interval_of_a_separation_is_close_to_the_one_of_the_normal_law():
    z = np.random.default_rng(1).normal(size=(2, 400, 4))
    data = planted_data(z, split=[TEST] * 400, head={"latents": torch.arange(4)})
    for latent, interval in enumerate(stage4.separation(data)):
        found = np.array(fires_difference(z, range(400), latent))
        half = 1.96 * found.std() / 20
        wanted = (found.mean() - half, found.mean() + half)
        assert interval == pytest.approx(wanted, abs=0.02)


def test_with_less_than_two_test_prompts_a_separation_has_no_interval():
    head = {"latents": torch.tensor([3, 4])}
    data = planted_data(noise(), split=[TRAIN] * 59 + [TEST], head=head)
    assert stage4.separation(data) == [(None, None)] * 2


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_what_a_direction_adds_is_the_mean_over_train_and_dev_worked_by_hand(kind):
    z = np.random.default_rng(3).normal(size=(2, 14, 3))
    data = planted_data(z, split=[TRAIN] * 6 + [DEV] * 4 + [TEST] * 4)
    weights = [1.0, -2.0, 0.5]
    adds = stage4.train_shares(data, planted_model(weights, kind))
    wanted = ((z[0, :10] - z[1, :10]) * weights).mean(0)
    assert adds.tolist() == pytest.approx(wanted, abs=1e-5)


def folded(model):
    """fold_to_one_vector where chosen minus rejected lies along (3, 4, 0), but not on test."""
    along = np.random.default_rng(0).normal(2, 1, size=(90, 1)) * [3, 4, 0]
    along[2::3] = [0, 0, 99]
    data = planted_data(np.stack([along, -along]), split=[TRAIN, DEV, TEST] * 30)
    return stage4.fold_to_one_vector(data, model)


@pytest.mark.parametrize("weights, std, norm, to_mean", [
    ([2.0, 0, 0], [1.0, 1, 1], 2, 3 / 5),
    ([9.0, 24, 0], [3.0, 6, 1], 5, 1),
    ([0, 0, 1.0], [1.0, 1, 4], 1 / 4, 0),
    ([-4.0, -3, 0], [1.0, 1, 1], 5, -24 / 25),
])
def test_a_linear_head_as_one_vector_has_the_norm_and_cosine_worked_by_hand(
        weights, std, norm, to_mean):
    found = folded(planted_model(weights, std=torch.tensor(std)))
    assert found == pytest.approx({"norm": norm, "cosine_mean_difference": to_mean}, abs=1e-5)


def test_an_mlp_is_not_one_vector():
    assert folded(planted_model([1.0, 2, 3], "mlp")) is None


# ---------------------------------------------------------------- evaluation.json

def noisy_pairs():
    """60 pairs of two a prompt, a fifth of them labelled the other way round, in 14 categories."""
    rows = tiny.make_pairs(60)
    for n, row in enumerate(rows):
        row["prompt"] = rows[n - n % 2]["prompt"]
        row["category"] = f"{'ab'[n % 4 // 2]}/{n // 4}"
        if n % 5 == 2:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Path of a run on noisy_pairs() with stages 1 to 3 done; copy it to change it."""
    folder = tmp_path_factory.mktemp("noisy")
    model = tiny.save_model(folder / "model")
    pairs = tiny.save_rows(folder / "pairs.jsonl", noisy_pairs())
    sae = tiny.save_sae(folder / "sae.safetensors", model=model)
    run = folder / "run"
    succeed("01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", run,
            "--split", "0.6,0.1,0.3")
    succeed("02_select_features", "--run", run, "--sae", sae, "--k", 8)
    succeed("03_train_head", "--run", run)
    return run


def evaluate(run, *args, folder=None):
    """Stage 4 from the command line, without a language model unless asked → evaluation.json."""
    succeed("04_evaluate", "--run", run, "--texts", 0, *args)
    return json.loads(((folder or run) / "evaluation.json").read_text("utf-8"))


def extract(run, out, pairs, *args):
    """Stage 1 with the model of `run`."""
    model = read_meta(run / "features.safetensors")["model"]
    succeed("01_extract", "--model", model, "--pairs", pairs, "--run", out, *args)


def pairs_half_new():
    """50 pairs, two a prompt, some responses twice as long; 26 are of prompts of noisy_pairs()."""
    rows = tiny.make_pairs(50)
    for n, row in enumerate(rows):
        row["prompt"] = rows[n - n % 2]["prompt"]
        if n >= 26:
            row["prompt"] = row["prompt"].replace("case", "question")
        row["chosen"] = row["chosen"] * (1 + n % 4 // 2)
    return rows


@pytest.fixture(scope="module")
def other_run(noisy, tmp_path_factory):
    """A run of stage 1 on pairs_half_new(), of two layers."""
    folder = tmp_path_factory.mktemp("other")
    pairs = tiny.save_rows(folder / "rows.jsonl", pairs_half_new())
    extract(noisy, folder / "run", pairs, "--layer", 1, 2)
    return folder / "run"


FOLDS = 3               # fewer than usual: quicker
FULL = ["--sweeps", "full", "--texts", 2, "--folds", FOLDS]
BRIEF = ["--sweeps", "none", "--folds", FOLDS]


@pytest.fixture(scope="module")
def full_run(noisy, other_run, tmp_path_factory):
    """The noisy run after stage 4 with all there is."""
    run = shutil.copytree(noisy, tmp_path_factory.mktemp("full") / "run")
    evaluate(run, *FULL, "--other", f"new={other_run}")
    return run


@pytest.fixture(scope="module")
def full(full_run):
    return json.loads((full_run / "evaluation.json").read_text("utf-8"))


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def test_sparserm_and_every_control_have_a_row_on_all_pairs_of_the_run(full):
    assert set(full["accuracy"]) == {"sparserm", "blind", *NAMES}
    for row in full["accuracy"].values():
        assert (row["n"], row["groups"]) == (60, 30)
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["high"] > row["low"]


def test_every_method_with_a_search_has_a_choice_for_each_fold(full):
    for name, row in full["accuracy"].items():
        assert len(row["choices"]) == FOLDS
        if name in WITH_K:
            assert all(k in (1, 2, 4, 8) for k, _ in row["choices"]), name


def test_the_difference_to_a_control_is_that_of_the_accuracies_with_ties_as_half(full):
    ours = full["accuracy"]["sparserm"]["ties_half"]
    assert set(full["differences"]) == {"blind", *NAMES}
    for name, row in full["differences"].items():
        assert row["mean"] == pytest.approx(ours - full["accuracy"][name]["ties_half"])
        if row["low"] is not None:
            assert row["low"] <= row["mean"] <= row["high"]


def test_calibration_length_and_sae_have_all_their_figures(full):
    assert set(full["calibration"]) == {"temperature", "nll", "brier", "ece", "bins"}
    assert set(full["length"]) == {"correlation", "matched_accuracy", "matched_n"}
    assert {"explained_variance", "l0", "warnings"} <= set(full["sae"])


def test_curves_have_a_row_of_every_size_for_every_method_with_a_k(full):
    by_k, by_pairs = full["curves"]["k"], full["curves"]["pairs"]
    assert set(by_k) == {"dense", *WITH_K}
    assert all(set(rows) == {"1", "2", "4", "8"} for rows in by_k.values())
    assert set(by_pairs) == {"sparserm", "dense", "random_directions"}
    assert all(set(rows) == {str(60 * (FOLDS - 1) // FOLDS)} for rows in by_pairs.values())
    assert all(row == full["accuracy"]["dense"] for row in by_k["dense"].values())     # has no K


def test_categories_and_the_verdict_are_there(full):
    assert {name: row["n"] for name, row in full["categories"].items()} == {"a": 30, "b": 30}
    assert full["repeated_answers"] == 1
    assert any(sentence.startswith("100% of the answers") for sentence in full["verdict"])


def test_the_cost_is_the_share_of_the_backbone_that_was_trained(full):
    cost = full["cost"]
    assert cost["trained_parameters"] == 2 * full["run"]["k"] + 1
    share = cost["trained_parameters"] / cost["backbone_parameters"]
    assert cost["share"] == pytest.approx(share, rel=1e-8)


def test_every_latent_of_the_head_has_its_row_with_tokens_and_texts(full):
    assert len(full["latents"]) == 2 * full["run"]["k"]
    for row in full["latents"]:
        assert -1 <= row["low"] <= row["high"] <= 1
        assert len(row["tokens"]) > 1
        assert set(row["contexts"]) == {"top", "middle", "none"}
        assert all(len(windows) <= 2 for windows in row["contexts"].values())
        assert 0 <= row["agreement"]["both"] <= row["agreement"]["token"] <= 1


def test_the_shares_of_all_latents_add_up_to_the_mean_difference_of_the_rewards(full, full_run):
    reward = stage3.RewardModel.load(full_run / "reward_head.safetensors")
    data = stage4.Data(full_run)
    rows = data.split != TEST
    chosen, rejected = [reward.reward_of(z[rows]) for z in data.z]
    total = float((chosen - rejected).mean())
    assert sum(row["adds"] for row in full["latents"]) == pytest.approx(total, abs=1e-4)


def test_the_quiz_the_pairs_and_the_answers_are_those_of_the_test_split(full, full_run):
    data = stage4.Data(full_run)
    test_ids = {data.pairs[n]["id"] for n in (data.split == TEST).nonzero().flatten().tolist()}
    assert set(full["pairs"]) <= test_ids
    assert {row["id"] for end in ("best", "worst") for row in full["answers"][end]} <= test_ids
    for row in full["latents"]:
        for windows in row["contexts"].values():
            assert not test_ids & {window["id"] for window in windows}
    assert {len(task["snippets"]) for row in full["quiz"]["directions"]
            for task in row["tasks"]} <= {5}


def test_the_wrong_pairs_are_as_many_as_the_accuracy_on_test_says(full):
    test = full["test"]
    assert test["ties"] == 0
    assert 0 < len(full["wrong"]) == min(10, round((1 - test["accuracy"]) * test["n"]))


def share_right(run, pairs):
    """Accuracy of the run's head on pairs, by scoring their texts."""
    reward = stage3.RewardModel.load(run / "reward_head.safetensors")
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = [reward.score(prompts, [row[side] for row in pairs]) for side in SIDES]
    return statistics.fmean(a > b for a, b in zip(chosen, rejected))


def test_the_accuracy_of_the_head_is_that_of_scoring_the_texts_of_the_test_pairs(full, full_run):
    pairs = [row for row in rows_of(full_run / "pairs.jsonl") if row["split"] == "test"]
    assert full["test"]["n"] == len(pairs) == full["run"]["pairs"]["test"]
    assert full["test"]["groups"] == len({row["prompt"] for row in pairs})
    assert full["test"]["accuracy"] == pytest.approx(share_right(full_run, pairs))
    assert 0 < full["test"]["accuracy"] < 1


def test_the_page_holds_the_same_evaluation_and_its_pictures(full, full_run):
    page = (full_run / "report.html").read_text("utf-8")
    start = '<script type="application/json" id="data">'
    shown = json.loads(page.partition(start)[2].partition("</script>")[0])
    assert shown["evaluation"] == full
    assert set(shown["images"]) == {"accuracy", "reliability", "curve_k", "curve_pairs"}
    for name, image in shown["images"].items():
        assert base64.b64decode(image) == (full_run / f"{name}.png").read_bytes()


def test_the_same_command_gives_the_same_bytes_in_another_process(
        full_run, noisy, other_run, tmp_path):
    run = shutil.copytree(noisy, tmp_path / "again")
    args = ["--run", str(run), *FULL, "--other", f"new={other_run}"]
    path = f"{tiny.ROOT}{os.pathsep}{tiny.ROOT / 'tests'}"
    subprocess.run([sys.executable, "-c", f"import tiny; tiny.succeed('04_evaluate', *{args!r})"],
                   check=True, env={**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": path})
    written = ["evaluation.json", "report.html", *(p.name for p in full_run.glob("*.png"))]
    assert len(written) == 2 + 4
    for name in written:
        assert (run / name).read_bytes() == (full_run / name).read_bytes(), name


@pytest.mark.parametrize("value, wanted", [
    (0.1 + 0.2, 0.3),
    (257 / 9_241_705_984, 2.78087185e-8),       # a tiny share is not rounded to 0
    ([{"a": (1 / 3,)}], [{"a": [0.333333333]}]),
    ({"n": 12345678901, "ok": True, "text": None}, {"n": 12345678901, "ok": True, "text": None}),
    ({4: np.float64(1 / 3)}, {"4": 0.333333333}),
])
def test_floats_are_written_with_9_significant_digits_and_all_else_as_it_is(value, wanted):
    assert stage4.rounded(value) == wanted


def floats(value):
    """All floats inside a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in floats(item)]
    return [value] if isinstance(value, float) else []


def test_no_number_of_evaluation_json_has_more_than_9_digits(full):
    found = floats(full)
    assert len(found) > 100
    assert all(number == float(f"{number:.9g}") for number in found)


# ---------------------------------------------------------------- the control that reads texts anew

@pytest.fixture(scope="module")
def opened(noisy):
    """(Data, Backbone) of the noisy run."""
    data = stage4.Data(noisy)
    return data, stage3.RewardModel.load(data.head_path).backbone


def read_blind(data, backbone, monkeypatch):
    """blind() → (its rows, z of both sides that its dense head sees)."""
    seen = []

    def capture(pairs, select, ks, settings):
        seen.extend(select(()).scores(pairs))
        return stage4.Outcome(np.zeros(len(pairs.fold)))
    monkeypatch.setattr(stage4, "out_of_fold", capture)
    rows, _ = stage4.blind(data, backbone)
    return rows, seen


def test_blind_reads_the_responses_under_one_fixed_prompt(opened, monkeypatch):
    data, backbone = opened
    model = stage3.RewardModel.load(data.head_path, model=backbone)
    rows, seen = read_blind(data, backbone, monkeypatch)
    assert rows.all()
    for z, responses in zip(seen, data.responses(), strict=True):
        wanted = model.hidden([stage4.BLIND_PROMPT] * 60, responses)
        torch.testing.assert_close(z, wanted, rtol=1e-3, atol=1e-3)


def test_blind_is_tried_on_so_many_pairs_at_most_whole_prompts_together(opened, monkeypatch):
    data, backbone = opened
    monkeypatch.setattr(stage4, "BLIND_PAIRS", 44)
    rows, seen = read_blind(data, backbone, monkeypatch)
    assert rows.sum() == len(seen[0]) == len(seen[1]) == 44
    assert len(set(data.group[rows.numpy()].tolist())) == 22


# ---------------------------------------------------------------- another set of pairs

def test_of_another_set_only_pairs_of_questions_that_are_not_in_this_run_count(full):
    rows = full["other"]["new"]
    assert set(rows) == {"sparserm", *NAMES} - {"paper"}
    assert all((row["n"], row["groups"]) == (24, 12) for row in rows.values())


def test_differences_on_another_set_are_those_of_its_own_accuracies(full):
    rows = full["other"]["new"]
    ours = rows["sparserm"]["ties_half"]
    for name, row in rows.items():
        if name != "sparserm":
            assert row["behind"]["mean"] == pytest.approx(ours - row["ties_half"])


def test_the_dense_head_that_reads_another_set_is_one_of_all_pairs_of_this(full, noisy, other_run):
    data = stage4.Data(noisy)
    other = stage4.other_set(data, "new", other_run)
    choices = [tuple(choice) for choice in full["accuracy"]["dense"]["choices"]]
    (_, l2) = max(choices, key=choices.count)
    both = torch.cat(data.z)
    mean, std = both.mean(0), both.std(0, correction=0)
    head = stage3.fit_linear(*[(side - mean) / std for side in data.z], "bt", l2)
    chosen, rejected = [head((side - mean) / std) for side in other.z]
    row = full["other"]["new"]["dense"]
    assert row["accuracy"] == pytest.approx(accuracy((chosen - rejected).numpy()))


def test_the_pairs_that_count_are_those_of_the_other_run_in_order(noisy, other_run):
    seen = {row["prompt"] for row in rows_of(noisy / "pairs.jsonl")}
    new = [row for row in rows_of(other_run / "pairs.jsonl") if row["prompt"] not in seen]
    other = stage4.other_set(stage4.Data(noisy), "new", other_run)
    assert other.pairs == new
    model = stage3.RewardModel.load(noisy / "reward_head.safetensors")
    wanted = model.hidden([row["prompt"] for row in new], [row["chosen"] for row in new])
    torch.testing.assert_close(other.z[0], wanted, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- what depends on what

@pytest.fixture
def run(noisy, tmp_path):
    return shutil.copytree(noisy, tmp_path / "run")


def evaluated(run):
    """evaluate within this process, without curves and texts; the paper's head is too slow."""
    args = argparse.Namespace(sweeps="none", other=[], texts=0)
    with mock.patch.dict(stage4.CONTROLS, paper=stage4.length):
        result, _ = stage4.evaluate(stage4.Data(run, folds=FOLDS), args)
    return result


@pytest.fixture(scope="module")
def before(noisy):
    return evaluated(noisy)


def test_another_set_curves_and_texts_change_no_accuracy(before, full):
    found = json.loads(json.dumps(stage4.rounded(before["accuracy"])))
    assert without(found, "paper") == without(full["accuracy"], "blind", "paper")
    assert stage4.rounded(before["test"]) == full["test"]


def change_run(run, change):
    """change(tensors of the shard, rows of pairs.jsonl); the new hashes are passed on."""
    shard, = (run / "activations").glob("*.safetensors")
    tensors, meta = load_stage(shard)
    rows = rows_of(run / "pairs.jsonl")
    change(tensors, rows)
    write_rows(run / "pairs.jsonl", rows)
    save_stage(shard, tensors, meta | {"parent": {"pairs": file_hash(run / "pairs.jsonl")}})

    features, meta = load_stage(run / "features.safetensors")
    meta["parent"]["activations"] = [file_hash(shard)]
    save_stage(run / "features.safetensors", features, meta)
    head, meta = load_stage(run / "reward_head.safetensors")
    meta["parent"]["features"] = file_hash(run / "features.safetensors")
    save_stage(run / "reward_head.safetensors", head, meta)


def swap_sides(tensors, rows):
    for a, b in (SIDES, ("chosen_tokens", "rejected_tokens")):
        tensors[a], tensors[b] = tensors[b], tensors[a]
    for row in rows:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]


def test_swapped_sides_are_wrong_for_a_fixed_head_and_nothing_to_one_fitted_anew(before, run):
    change_run(run, swap_sides)
    after = evaluated(run)
    assert before["test"]["ties"] == 0
    assert after["test"]["accuracy"] == pytest.approx(1 - before["test"]["accuracy"])
    for name in ("sparserm", "dense", "words", "length", "random_directions", "activations"):
        old, new = before["accuracy"][name], after["accuracy"][name]
        assert new["accuracy"] == pytest.approx(old["accuracy"]), name


def other_activations_in(part):
    """A change of the chosen side of the pairs of one split."""
    def change(tensors, rows):
        there = tensors["split"] == part
        tensors["chosen"] = torch.where(there[:, None], -9 * tensors["rejected"], tensors["chosen"])
    return change


@pytest.mark.parametrize("part, same", [(TRAIN, True), (TEST, False)])
def test_only_test_activations_change_what_is_said_of_the_test_split(part, same, before, run):
    change_run(run, other_activations_in(part))
    after = evaluated(run)
    for name in ("test", "calibration", "length", "wrong"):
        assert (before[name] == after[name]) is same, name
    assert before["accuracy"]["sparserm"] != after["accuracy"]["sparserm"]


def test_a_run_without_test_pairs_has_an_accuracy_over_the_folds_alone(run):
    def no_test_pairs(tensors, rows):
        tensors["split"].clamp_(max=DEV)
    change_run(run, no_test_pairs)
    found = evaluate(run, *BRIEF)
    assert found["test"] is None
    assert found["accuracy"]["sparserm"]["n"] == 60
    assert "calibration" not in found


def test_the_folds_are_as_many_as_asked_for_and_else_five(full, run):
    assert full["run"]["folds"] == FOLDS
    found = evaluate(run, "--sweeps", "none")
    assert found["run"]["folds"] == 5
    assert all(len(row["choices"]) == 5 for row in found["accuracy"].values())


def test_on_normalised_scores_all_methods_but_the_activations_read_the_normalised_z(run):
    sae = read_meta(run / "features.safetensors")["sae"]
    succeed("02_select_features", "--run", run, "--sae", sae, "--k", 8, "--normalise", "rms")
    succeed("03_train_head", "--run", run)
    data = stage4.Data(run)
    for z, raw in zip(data.z, data.sae_z, strict=True):
        assert z.square().mean(1).tolist() == pytest.approx([1] * 60, rel=1e-3)
        torch.testing.assert_close(torch.nn.functional.normalize(raw),
                                   torch.nn.functional.normalize(z))
    fires = [(data.sae.encode(side) > 0).float().mean(0) for side in data.sae_z]
    assert torch.equal(data.selected(()), stage2.select_latents(*fires, 8))


# ---------------------------------------------------------------- runs that are very small

@pytest.mark.parametrize("pairs", [3, 5])
def test_a_run_of_very_few_pairs_is_evaluated_and_called_too_small(pairs, tmp_path):
    run = tiny.make_run(tmp_path, pairs=pairs)
    found = evaluate(run, "--sweeps", "small")
    assert len(found["verdict"]) == 1
    assert found["verdict"][0].startswith(f"Too small: {pairs} prompts.")


@pytest.mark.parametrize("pairs", [1, 2])
def test_prompts_that_are_too_few_for_folds_are_refused(pairs, tmp_path):
    refused(tiny.make_run(tmp_path, pairs=pairs), f"{pairs} prompts", "folds")


# ---------------------------------------------------------------- the command

def not_to_be_called(*_, **__):
    pytest.fail("this was not to be called")


@pytest.mark.parametrize("latent", [-1, 64, 2**31])
def test_a_head_with_latents_that_the_sae_does_not_have_is_refused(latent, run):
    path = run / "reward_head.safetensors"
    tensors, meta = stage3.load_stage(path)
    tensors["latents"][0] = latent
    stage3.save_stage(path, tensors, meta)
    result = tiny.command("04_evaluate", "--run", run, "--texts", 0)
    tiny.assert_one_line_error(result, "latents that the SAE does not have", path)


def test_without_texts_no_language_model_is_opened(run, monkeypatch):
    monkeypatch.setattr(stage1, "load_backbone", not_to_be_called)
    found = evaluate(run, *BRIEF)
    assert found["latents"]
    assert all(row["tokens"] == [] and "contexts" not in row for row in found["latents"])
    assert not {"quiz", "pairs"} & set(found)
    assert "blind" not in found["accuracy"]
    assert (run / "report.html").exists()


def test_a_second_call_shows_the_same_table_and_computes_nothing(
        full_run, other_run, monkeypatch, capsys):
    before = (full_run / "evaluation.json").stat().st_mtime_ns
    monkeypatch.setattr(stage4, "evaluate", not_to_be_called)
    with tiny.argv("--run", full_run, *FULL, "--other", f"new={other_run}"):
        stage4.main()
    assert "shuffled_labels" in capsys.readouterr().out
    assert (full_run / "evaluation.json").stat().st_mtime_ns == before


def test_with_other_sweeps_all_is_computed_anew_and_pictures_of_before_do_not_stay(
        full_run, tmp_path):
    run = shutil.copytree(full_run, tmp_path / "run")
    assert evaluate(run, *BRIEF)["curves"] == {}
    assert sorted(p.name for p in run.glob("*.png")) == ["accuracy.png", "reliability.png"]


def test_with_a_name_the_head_in_that_folder_is_evaluated_beside_the_one_of_the_run(run):
    succeed("03_train_head", "--run", run, "--name", "two", "--k", 2, "--l2", 0.5)
    found = evaluate(run, *BRIEF, "--name", "two", folder=run / "two")
    assert (found["run"]["k"], found["run"]["l2"]) == (2, 0.5)
    assert found["accuracy"]["sparserm"]["choices"] == [[2, 0.5]] * FOLDS
    assert (run / "two/report.html").exists()
    assert not (run / "evaluation.json").exists()


PARENT = {"format": 3, "head": "abc"}


def left_behind(path, change):
    """An evaluation, changed → what a second call makes of it."""
    found = {"accuracy": {"n": 1}, "wrong": []}
    found["parent"] = stage4.sealed(PARENT, found)
    change(found)
    path.write_text(json.dumps(found))
    return stage4.earlier_evaluation(path, PARENT)


def test_an_evaluation_that_is_whole_is_taken_up(tmp_path):
    found = left_behind(tmp_path / "evaluation.json", dict.copy)
    assert without(found, "parent") == {"accuracy": {"n": 1}, "wrong": []}


@pytest.mark.parametrize("change", [
    {"accuracy": {"n": 2}},                         # a number that was changed
    {"parent": {"format": 1, "head": "abc"}},       # an older format
    {"parent": PARENT},                             # nothing that says what the numbers were
])
def test_an_evaluation_of_another_format_or_with_changed_numbers_is_not_taken_up(change, tmp_path):
    assert left_behind(tmp_path / "evaluation.json", lambda found: found.update(change)) is None


@pytest.mark.parametrize("text", ["", "[1]", '{"parent": '])
def test_a_damaged_evaluation_or_none_is_not_taken_up(text, tmp_path):
    path = tmp_path / "evaluation.json"
    assert stage4.earlier_evaluation(path, PARENT) is None
    path.write_text(text)
    assert stage4.earlier_evaluation(path, PARENT) is None


# ---------------------------------------------------------------- what is refused

QUICK = ["--sweeps", "none", "--texts", 0]


def refused(run, *words, args=()):
    """Stage 4 refuses a run in one line that holds all words, and writes nothing."""
    assert_one_line_error(command("04_evaluate", "--run", run, *QUICK, *args), *words)
    assert not (run / "evaluation.json").exists()


def test_a_head_made_from_other_features_is_refused_and_the_stage_to_run_named(run):
    sae = read_meta(run / "features.safetensors")["sae"]
    succeed("02_select_features", "--run", run, "--sae", sae, "--k", 4)
    refused(run, "another features.safetensors", "03")


def test_a_run_without_a_head_is_refused_and_the_stage_to_run_named(run):
    (run / "reward_head.safetensors").unlink()
    refused(run, "reward_head.safetensors", "03_train_head.py")


def test_a_name_without_a_head_is_refused_though_the_run_has_one(run):
    refused(run, run / "none/reward_head.safetensors", args=["--name", "none"])


def test_activations_of_another_run_are_refused(run):
    extract(run, run, run / "pairs.jsonl", "--layer", 1, "--split", "0.2,0.2,0.6", "--overwrite")
    refused(run, "activations", run, "02")


def test_another_sae_is_refused(run, tmp_path):
    refused(run, "not the SAE", args=["--sae", tiny.save_sae(tmp_path / "sae.safetensors", seed=1)])


def test_an_sae_that_is_not_there_is_refused(run, tmp_path):
    refused(run, "none.safetensors", args=["--sae", tmp_path / "none.safetensors"])


def test_other_weights_at_the_place_of_the_backbone_are_refused_first(tmp_path, monkeypatch):
    run = tiny.make_run(tmp_path)
    shutil.rmtree(tmp_path / "model")
    tiny.save_model(tmp_path / "model", seed=9)
    monkeypatch.setattr(stage3, "fit_linear", not_to_be_called)
    refused(run, "weights of", args=["--texts", 1])


@pytest.mark.parametrize("flag, value, word", [
    ("--folds", "2", "--folds"),
    ("--folds", "21", "--folds"),
    ("--texts", "-1", "--texts"),
    ("--other", "a", "NAME=DIR"),
    ("--other", "b=none", "none"),
])
def test_a_flag_that_cannot_be_meant_is_one_line_that_names_it(flag, value, word, run, monkeypatch):
    monkeypatch.setattr(stage3, "fit_linear", not_to_be_called)     # nothing is computed first
    refused(run, word, args=[flag, value])


def test_a_device_that_does_not_exist_is_refused_before_anything_is_computed(run, monkeypatch):
    monkeypatch.setattr(stage3, "fit_linear", not_to_be_called)
    refused(run, "--device", args=["--texts", 1, "--device", "nope"])


@pytest.mark.parametrize("args, word", [
    (["--layer", 2], "layer"),
    (["--layer", 1, "--token", "eot"], "token"),
    (["--layer", 1, "--max-length", 77], "max_length"),
    (["--layer", 1], "no question that this run has not"),
])
def test_another_set_of_another_layer_or_token_or_without_new_questions_is_refused(
        args, word, run, tmp_path):
    extract(run, tmp_path / "other", run / "pairs.jsonl", *args)
    refused(run, word, "other", args=["--other", f"x={tmp_path / 'other'}"])
