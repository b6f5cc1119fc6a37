"""Stage 4, against numbers worked by hand, plain loops, and the reward model itself."""

import argparse
import base64
import importlib
import json
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

from parts.files import file_hash, load_stage, read_meta, save_stage, write_rows
from parts.statistics import bootstrap_weights
from sae import SAE

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
TRAIN, DEV, TEST = range(3)
SIDES = ("chosen", "rejected")
CONTROLS = {"dense", "random_directions", "random_latents", "activations", "words", "length",
            "shuffled_labels"}
DRAWN = {"random_directions", "random_latents", "shuffled_labels"}     # a row for each seed
CURVES = {"sparserm", "random_directions", "random_latents", "activations", "dense"}


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---------------------------------------------------------------- what the controls see of a pair

SPLIT = torch.tensor([TRAIN, TRAIN, TEST, DEV])
TEXTS = [["a b", "A c!", "z y z y", "a b"], ["a, b", "d", "z y", "b z y"]]


def test_only_grams_of_two_train_responses_become_columns_and_rows_have_norm_1():
    chosen, rejected = stage4.WordFeatures(TEXTS, SPLIT)(TEXTS)
    assert chosen.shape == rejected.shape == (4, 3)         # a (three times), b, "a b" (twice each)
    norms = torch.cat([chosen, rejected]).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 1, 0, 1, 1, 0, 0, 1]))


def test_the_same_words_give_the_same_row_and_the_most_frequent_one_weighs_least():
    chosen, rejected = stage4.WordFeatures(TEXTS, SPLIT)(TEXTS)
    assert torch.equal(chosen[0], rejected[0])
    assert torch.equal(chosen[0], chosen[3])
    assert (chosen[0] > 0).all()
    only_a = chosen[1].argmax()
    assert chosen[0].argmin() == only_a


def test_words_of_dev_test_and_other_sets_change_no_row_of_train():
    others = [["a b", "A c!", "q q", "q"], ["a, b", "d", "q", "q"]]
    features = stage4.WordFeatures(TEXTS, SPLIT)
    for found in (features(others), stage4.WordFeatures(others, SPLIT)(others)):
        for side, wanted in zip(found, features(TEXTS)):
            assert torch.equal(side[:2], wanted[:2])


def filler(rng):
    return " ".join(rng.choices("the cat sat on a mat while it rained".split(), k=5))


def test_a_word_that_decides_everything_gives_the_words_an_accuracy_of_1():
    rng = random.Random(0)
    split = torch.tensor([TRAIN, TRAIN, DEV, TEST] * 20)
    texts = []
    for word in ("yes", "no"):
        texts.append([f"{filler(rng)} {word} {filler(rng)}" for _ in split])
    assert (on_words(texts, split) > 0).all()


def test_responses_without_a_common_word_are_ties_for_the_words():
    split = torch.tensor([TRAIN, TRAIN, DEV, TEST] * 20)
    texts = [[f"{side}{n}" for n in range(80)] for side in "ab"]
    assert (on_words(texts, split) == 0).all()


def on_words(texts, split):
    """A head on the words of the train pairs → its differences on the 20 test pairs."""
    chosen, rejected = stage4.WordFeatures(texts, split)(texts)
    fitted = stage4.fit_control(chosen, rejected, split, stage4.ALL, {}, scale=False)
    differences = fitted.differences(chosen[split == TEST], rejected[split == TEST])
    assert differences.shape == (20,)
    return differences


def test_random_directions_have_norm_1_and_differ_from_draw_to_draw():
    directions = stage4.gaussian_directions(6, 32, 1)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(6))
    assert not torch.equal(directions, stage4.gaussian_directions(6, 32, 2))


def test_random_latents_are_different_ones_among_those_that_fire_on_either_side():
    n = torch.arange(100)
    frequencies = {"frequency_chosen": (n % 3 == 1) * 0.01, "frequency_rejected": (n == 0) * 0.01}
    sae = argparse.Namespace(W_dec=n[:, None].float())          # decoder row n holds n
    data = argparse.Namespace(features=frequencies, sae=sae)
    draws = []
    for seed in range(5):
        draws.append(stage4.living_directions(data, 20, seed).flatten().int().tolist())
    for latents in draws:
        assert len(set(latents)) == 20
        assert all(latent % 3 == 1 or latent == 0 for latent in latents)
    assert len(set(map(tuple, draws))) == 5
    assert len(stage4.living_directions(data, 99, 0)) == 34     # all there are


def test_shuffled_labels_swap_both_sides_of_half_of_train_and_dev_and_never_of_test():
    z = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
    split = torch.tensor([TRAIN, DEV, TEST] * 100)
    chosen, rejected = stage4.shuffled_sides([*z], split, 0)
    kept = ((chosen == z[0]) & (rejected == z[1])).all(1)
    swapped = ((chosen == z[1]) & (rejected == z[0])).all(1)
    assert (kept ^ swapped).all()
    assert kept[split == TEST].all()
    assert all(30 < swapped[split == part].sum() < 70 for part in (TRAIN, DEV))
    assert not torch.equal(chosen, stage4.shuffled_sides([*z], split, 1)[0])


def linear_head(*weights):
    head = stage3.LinearHead(len(weights))
    head.load_state_dict({"w1": torch.tensor(weights), "b1": torch.ones(1)})
    return head.requires_grad_(False)


def test_a_fitted_control_scales_new_pairs_by_what_it_was_trained_on():
    fitted = stage4.Fitted("all", linear_head(2.0, -3.0), torch.tensor([2, 0]),
                           mean=torch.tensor([1.0, 9, 2]), std=torch.tensor([2.0, 9, 4]))
    # columns 2 and 0, standardised: (10 - 2)/4 = 2 and (3 - 1)/2 = 1 · (2 - 2)/4 = 0 and 2
    chosen, rejected = torch.tensor([[3.0, 7, 10]]), torch.tensor([[5.0, 7, 2]])
    assert fitted.rewards(chosen).tolist() == [2 * 2 - 3 * 1 + 1]
    assert fitted.differences(chosen, rejected).tolist() == [1 - (-6)]


def test_a_control_is_scaled_by_both_sides_of_the_train_pairs_alone():
    z = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    split = torch.tensor([TRAIN, TRAIN, DEV, TEST] * 10)
    fitted = stage4.fit_control(*z, split, stage4.ALL, {"epochs": 1})
    train = z[:, split == TRAIN].flatten(0, 1)
    torch.testing.assert_close(fitted.mean, train.mean(0))
    torch.testing.assert_close(fitted.std, train.std(0, correction=0))


def test_what_a_control_says_of_a_pair_does_not_depend_on_the_other_pairs(finished):
    data = stage4.Data(finished)
    some = torch.arange(len(data.split)) % 3 == 1
    for name, (control,) in stage4.fit_controls(data, range(1)).items():
        every = control.differences(data)
        assert every.any(), name
        np.testing.assert_allclose(control.differences(data.part(some)), every[some.numpy()],
                                   rtol=1e-4, atol=1e-5, err_msg=name)


def test_shuffled_labels_take_the_latents_that_the_shuffled_pairs_select(finished):
    data = stage4.Data(finished)
    [control] = stage4.shuffled_labels(data, [0])
    sides = stage4.shuffled_sides(data.z, data.split, 0)
    fires = [(data.sae.encode(z[data.train]) > 0).float().mean(0) for z in sides]
    selected = stage2.select_latents(*fires, data.total)
    assert not torch.equal(selected, data.features["latents"])
    for scores, z in zip(control.view(data), data.z, strict=True):
        torch.testing.assert_close(scores, z @ data.sae.W_dec[selected].T)


def test_with_fewer_train_pairs_latents_are_selected_on_those_alone(finished, monkeypatch):
    data = stage4.Data(finished)
    select = stage4.select_on
    train_pairs = []

    def noted(data, z, split, k):
        train_pairs.append(int((split == TRAIN).sum()))
        return select(data, z, split, k)

    monkeypatch.setattr(stage4, "select_on", noted)
    stage4.pairs_curve(data, [0], sizes=(10,))
    assert train_pairs == [10, int(data.train.sum())]


# ---------------------------------------------------------------- are the latents worth believing

def planted_pairs(z, split, latents=()):
    """Data whose SAE is the identity: column j of z [2, n, d] is latent j and direction j."""
    sides = [torch.as_tensor(side.copy(), dtype=torch.float32) for side in z]
    n, width = sides[0].shape
    tokens = [np.ones(n, int), np.ones(n, int)]
    data = stage4.Pairs(sides, torch.as_tensor(split), np.arange(n), tokens, [{}] * n)
    zero = torch.zeros(width)
    data.sae = SAE(torch.eye(width), zero, torch.eye(width), zero, zero, "relu")
    data.head = {"latents": torch.tensor(latents, dtype=torch.int64)}
    return data


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
              "temperature": torch.ones(1)}
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


def test_latents_that_always_tell_are_selected_on_every_resample():
    data = planted_pairs(telling_latents(), [TRAIN] * 50 + [DEV, TEST] * 5, [3, 7, 11, 20])
    data.group = np.repeat(np.arange(20), 3)
    found = stage4.resampled_selection(data, draws=5)
    assert (found["k"], found["draws"]) == (2, 5)
    assert found["mean"] == found["least"] == 1
    assert found["chance"] < 0.8


def test_noise_is_selected_again_no_more_often_than_by_chance():
    z = np.random.default_rng(1).normal(size=(2, 400, 60))         # any four latents are as good
    found = stage4.resampled_selection(planted_pairs(z, [TRAIN] * 400, [0, 1, 2, 3]))
    assert found["least"] < found["mean"] < 0.5
    assert found["chance"] == pytest.approx(found["mean"], abs=0.25)


def fires_difference(z, rows, latent):
    """+1 where a latent fires in the chosen response alone, -1 in the rejected one alone."""
    return [float(z[0, n, latent] > 0) - float(z[1, n, latent] > 0) for n in rows]


def test_the_interval_of_a_separation_is_the_one_of_resampled_test_prompts():
    z = telling_latents()
    latents = [3, 7, 11, 20]
    data = planted_pairs(z, [TEST] * 50 + [DEV, TRAIN] * 5, latents)
    data.group = np.repeat(np.arange(20), 3)
    low, high = stage4.separation_on_test(data, draws=300)

    assert (low[0], high[0], low[2], high[2]) == (1, 1, -1, -1)
    assert 0 < low[1] < 35 / 50 < high[1] <= 1
    for n, latent in enumerate(latents):
        means = []
        for weights in bootstrap_weights(data.group[:50], 300).int().tolist():
            rows = [row for row, times in enumerate(weights) for _ in range(times)]
            means.append(statistics.fmean(fires_difference(z, rows, latent)))
        first, *_, last = statistics.quantiles(means, n=40, method="inclusive")
        assert (low[n], high[n]) == pytest.approx((first, last), abs=1e-5)


def test_the_interval_of_a_separation_is_close_to_the_one_of_the_normal_law():
    z = np.random.default_rng(1).normal(size=(2, 400, 4))
    low, high = stage4.separation_on_test(planted_pairs(z, [TEST] * 400, [0, 1, 2, 3]))
    for latent in range(4):
        found = np.array(fires_difference(z, range(400), latent))
        half = 1.96 * found.std() / 20
        wanted = (found.mean() - half, found.mean() + half)
        assert (low[latent], high[latent]) == pytest.approx(wanted, abs=0.015)


def test_what_a_direction_adds_on_train_is_the_mean_of_a_plain_loop(finished):
    data = stage4.Data(finished)
    adds, weight = stage4.train_shares(data, stage3.RewardModel(data.head, data.head_meta, None))
    train = [n for n, split in enumerate(data.split) if split == TRAIN]
    for n, w in enumerate(data.head["w1"]):
        vector = w / data.head["std"][n] * data.head["directions"][n]
        mean = statistics.fmean(float((data.z[0][i] - data.z[1][i]) @ vector) for i in train)
        assert adds[n] == pytest.approx(mean, abs=1e-5)
        assert weight[n] == abs(float(w))


def test_an_mlp_that_says_the_same_adds_the_same_and_weighs_by_the_size_of_ablations():
    z = np.random.default_rng(3).normal(size=(2, 12, 3))
    data = planted_pairs(z, [TRAIN] * 10 + [TEST] * 2)
    weights = [1.0, -2.0, 0.5]
    adds, weight = stage4.train_shares(data, planted_model(weights, "mlp"))
    sizes = np.abs(z[:, :10] * weights).reshape(20, 3).mean(0)
    assert adds.tolist() == pytest.approx(((z[0, :10] - z[1, :10]) * weights).mean(0), abs=1e-5)
    assert weight.tolist() == pytest.approx(sizes, abs=1e-5)


def ablated(data, model, draws):
    return stage4.ablation_test(data, model, *stage4.train_shares(data, model), draws)


def one_that_decides():
    """z [2, 160, 16] where column 5 is 1 in all chosen and -1 in all rejected responses.

    On test, every other pair, the others say the opposite of pair n about pair 80 + n.
    """
    z = np.random.default_rng(0).choice([-1.0, 1.0], (2, 160, 16))
    z[:, 81::2] = z[::-1, 1:80:2]
    z[0, :, 5] = 1
    z[1, :, 5] = -1
    return z


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_without_the_direction_that_carries_everything_accuracy_falls_to_chance(kind):
    z = one_that_decides()
    weights = [1.0] * 16
    weights[5] = 40.0                                       # more than all others together
    found = ablated(planted_pairs(z, [TRAIN, TEST] * 80), planted_model(weights, kind), 6)

    chosen, rejected = np.delete(z[:, 1::2], 5, axis=2).sum(2)
    right = ((chosen > rejected) + (chosen == rejected) / 2).mean()
    assert 0.35 < right < 0.65
    assert found["1"]["top"]["ties_half"] == pytest.approx(right)
    assert found["1"]["random"]["accuracy"] == 1
    assert found["1"]["fall"]["mean"] == pytest.approx(1 - right)
    assert found["1"]["fall"]["low"] > 0.3


def test_an_ablation_says_what_share_of_the_weight_the_random_directions_reached():
    z = one_that_decides()
    weights = [1.0] * 16
    weights[5] = 40.0
    found = ablated(planted_pairs(z, [TRAIN, TEST] * 80), planted_model(weights), 6)
    helpful = int(((z[0, ::2] - z[1, ::2]).mean(0) > 0).sum())          # on train
    row = found["1"]
    assert row["reached"] == pytest.approx((helpful - 1) / 40)
    assert (len(row["top"]["seeds"]), len(row["random"]["seeds"])) == (1, 6)
    assert row["top"]["n"] == row["top"]["groups"] == 80


@pytest.fixture(scope="module")
def ablations():
    """ablation_test of 24 directions of random weights with 5 draws, and what it should have done.

    → (sizes of the weights, helpful directions by falling share, what it found, for each call of
    the head which directions were set to 0)
    """
    rng = np.random.default_rng(2)
    weights = rng.uniform(0.5, 2, 24) * np.resize([1, -1], 24)
    z = rng.normal(size=(2, 60, 24))
    data = planted_pairs(z, [TRAIN] * 40 + [TEST] * 20)
    model = planted_model(weights.tolist())
    removed = []

    def note(head, inputs):
        removed.append(frozenset((inputs[0] == 0).all(0).nonzero().flatten().tolist()))
    model.head.register_forward_pre_hook(note)
    found = ablated(data, model, 5)
    adds = (z[0, :40] - z[1, :40]).mean(0) * weights
    helpful = [j for j in np.argsort(-adds).tolist() if adds[j] > 0]
    return np.abs(weights), helpful, found, removed


def test_one_an_eighth_and_a_quarter_of_the_helpful_directions_are_ablated(ablations):
    _, helpful, found, removed = ablations
    sizes = sorted({1, len(helpful) // 8, len(helpful) // 4} - {0})
    assert [*found] == [str(m) for m in sizes]
    assert len(sizes) > 1
    assert len(removed) == len(sizes) * 2 * (5 + 1)                     # both sides
    for m in sizes:
        assert removed.count(frozenset(helpful[:m])) == 2


def test_random_directions_are_helpful_ones_until_their_weight_reaches_the_tops(ablations):
    weights, helpful, found, removed = ablations
    for number, m in enumerate(map(int, found)):
        top = frozenset(helpful[:m])
        drawn = set(removed[12 * number:12 * number + 12]) - {top}
        wanted = weights[helpful[:m]].sum()
        assert len(drawn) > 1
        for others in drawn:                    # enough, and not enough without the last one
            sizes = weights[list(others)]
            assert others <= set(helpful[m:])
            assert wanted - 1e-5 <= sizes.sum() < wanted + sizes.max()


DENSE_HEAD = stage4.Fitted("all", linear_head(8.0, 9.0, 0.0), slice(None), torch.zeros(3),
                           std=torch.tensor([2.0, 3, 1]))               # so along (4, 3, 0)


def folded(model):
    """fold where the mean of chosen minus rejected on train lies along (3, 4, 0)."""
    along = np.random.default_rng(0).normal(2, 1, size=(90, 1)) * [3, 4, 0]
    data = planted_pairs(np.stack([along, -along]), [TRAIN, DEV, TEST] * 30)
    return stage4.fold(data, model, argparse.Namespace(fitted=DENSE_HEAD))


@pytest.mark.parametrize("weights, std, norm, to_mean, to_dense", [
    ([2.0, 0, 0], [1.0, 1, 1], 2, 3 / 5, 4 / 5),
    ([9.0, 24, 0], [3.0, 6, 1], 5, 1, 24 / 25),
    ([0, 0, 1.0], [1.0, 1, 4], 1 / 4, 0, 0),
    ([-4.0, -3, 0], [1.0, 1, 1], 5, -24 / 25, -1),
])
def test_a_linear_head_as_one_vector_has_the_norm_and_cosines_worked_by_hand(
        weights, std, norm, to_mean, to_dense):
    found = folded(planted_model(weights, std=torch.tensor(std)))
    wanted = {"norm": norm, "cosine_mean_difference": to_mean, "cosine_dense": to_dense}
    assert found == pytest.approx(wanted, abs=1e-5)


def test_an_mlp_is_not_one_vector():
    assert folded(planted_model([1.0, 2, 3], "mlp")) is None


# ---------------------------------------------------------------- evaluation.json

def evaluate(run, *args):
    """Stage 4 from the command line, without a language model unless asked → evaluation.json."""
    succeed("04_evaluate", "--run", run, "--seeds", 1, "--texts", 0, *args)
    return json.loads((run / "evaluation.json").read_text("utf-8"))


FULL = ["--sweeps", "full", "--seeds", 2, "--texts", 2]


@pytest.fixture(scope="module")
def full_run(finished, tmp_path_factory):
    """The finished run after stage 4 with all there is; its other set is itself."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("full") / "run")
    evaluate(run, *FULL, "--other", f"self={run}")
    return run


@pytest.fixture(scope="module")
def full(full_run):
    return json.loads((full_run / "evaluation.json").read_text("utf-8"))


def test_sparserm_and_every_control_have_a_row_on_all_test_pairs(full, full_run):
    prompts = {row["prompt"] for row in rows_of(full_run / "pairs.jsonl") if row["split"] == "test"}
    assert set(full["accuracy"]) == {"sparserm", *CONTROLS}
    for row in full["accuracy"].values():
        assert row["n"] == full["run"]["pairs"]["test"]
        assert row["groups"] == len(prompts)
        assert row["low"] <= row["accuracy"] <= row["high"]


def test_controls_drawn_at_random_have_an_accuracy_and_a_choice_for_each_seed(full):
    for name, row in full["accuracy"].items():
        if name in DRAWN:
            assert len(row["seeds"]) == len(row["choice"]) == 2
        else:
            assert len(row["seeds"]) == 1
            assert not isinstance(row["choice"], list)


def test_the_difference_to_a_control_is_that_of_the_accuracies_with_ties_as_half(full):
    ours = full["accuracy"]["sparserm"]["ties_half"]
    assert set(full["differences"]) == CONTROLS
    for name, row in full["differences"].items():
        assert row["mean"] == pytest.approx(ours - full["accuracy"][name]["ties_half"])
        assert row["low"] <= row["mean"] <= row["high"]


def test_labels_are_shuffled(full):
    ours = full["accuracy"]["sparserm"]["accuracy"]         # unshuffled, it is SparseRM itself
    assert any(seed != ours for seed in full["accuracy"]["shuffled_labels"]["seeds"])


def test_calibration_length_and_sae_have_all_their_figures(full):
    assert set(full["calibration"]) == {"temperature", "nll", "brier", "ece", "bins"}
    assert set(full["length"]) == {"correlation", "matched_accuracy", "matched_n"}
    assert {"explained_variance", "l0", "warnings"} <= set(full["sae"])


def test_curves_have_a_row_of_every_size_for_every_control_with_a_k(full):
    by_k, by_pairs = full["curves"]["k"], full["curves"]["pairs"]
    assert set(by_k) == set(by_pairs) == CURVES
    assert all(set(rows) == {"1", "2", "4", "8"} for rows in by_k.values())
    assert all(set(rows) == {str(full["run"]["pairs"]["train"])} for rows in by_pairs.values())
    assert all(row == full["accuracy"]["dense"] for row in by_k["dense"].values())     # has no K


def test_the_cost_is_the_share_of_the_backbone_that_was_trained(full):
    cost = full["cost"]
    assert cost["trained_parameters"] == 2 * full["run"]["k"] + 1
    share = cost["trained_parameters"] / cost["backbone_parameters"]
    assert cost["share"] == pytest.approx(share, rel=1e-8)


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def test_on_its_own_test_pairs_as_the_other_set_every_row_is_the_same(full):
    other = full["other"]["self"]
    assert without(other, "controls") == without(full["accuracy"]["sparserm"], "choice")
    assert set(other["controls"]) == CONTROLS
    for name, row in other["controls"].items():
        assert without(row, "behind") == without(full["accuracy"][name], "choice")
        assert row["behind"] == full["differences"][name]


def test_every_latent_of_the_head_has_its_row_with_tokens_and_texts(full):
    assert len(full["latents"]) == 2 * full["run"]["k"]
    for row in full["latents"]:
        assert -1 <= row["low"] <= row["high"] <= 1
        assert len(row["tokens"]) > 1
        assert [len(row["texts"][end]) for end in ("highest", "lowest")] == [2, 2]


def test_ablations_selection_and_the_head_as_one_vector_are_there(full):
    assert {"1"} <= set(full["explanations"])
    assert full["stability"]["k"] == full["run"]["k"]
    assert 0 < full["stability"]["least"] <= full["stability"]["mean"] <= 1
    assert full["fold"]["norm"] > 0
    assert all(-1 <= cosine <= 1 for cosine in without(full["fold"], "norm").values())
    assert full["warnings"]


def test_the_wrong_pairs_are_as_many_as_the_accuracy_says(full):
    ours = full["accuracy"]["sparserm"]
    assert ours["ties"] == 0
    assert len(full["wrong"]) == min(10, round((1 - ours["accuracy"]) * ours["n"]))


def test_the_page_holds_the_same_evaluation_and_its_pictures(full, full_run):
    page = (full_run / "report.html").read_text("utf-8")
    start = '<script type="application/json" id="data">'
    shown = json.loads(page.partition(start)[2].partition("</script>")[0])
    assert shown["evaluation"] == full
    assert set(shown["images"]) == {"accuracy", "reliability", "curve_k", "curve_pairs"}
    for name, image in shown["images"].items():
        assert base64.b64decode(image) == (full_run / f"{name}.png").read_bytes()


def test_the_same_command_gives_the_same_bytes_in_another_process(full_run, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "again")
    args = ["--run", str(run), *FULL, "--other", f"self={run}"]
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


# ---------------------------------------------------------------- another set of pairs

def evaluated(run, **other):
    """evaluate within this process, with one seed, no curves and no texts; other: name → run."""
    args = argparse.Namespace(seeds=1, sweeps="none", other=list(other.items()), texts=0)
    result, _ = stage4.evaluate(stage4.Data(run), args)
    return result


@pytest.fixture(scope="module")
def before(finished):
    return evaluated(finished)


def extract(run, out, pairs, *args):
    """Stage 1 with the model of `run`."""
    model = read_meta(run / "features.safetensors")["model"]
    succeed("01_extract", "--model", model, "--pairs", pairs, "--run", out, *args)


def pairs_of_shared_prompts(word):
    """50 pairs, two a prompt, some responses twice as long. word: in place of "case"."""
    rows = tiny.make_pairs(50)
    for n, row in enumerate(rows):
        row["prompt"] = rows[n - n % 2]["prompt"].replace("case", word)
        row["chosen"] = row["chosen"] * (1 + n % 4 // 2)
    return rows


NEW_PROMPTS = ("question", ["--layer", 1, 2])
SOME_SEEN = ("case", ["--layer", 1, "--split", "0.1,0.1,0.8"])


@pytest.fixture(scope="module", params=[NEW_PROMPTS, SOME_SEEN])
def other_set(request, finished, tmp_path_factory):
    """Another set → (its folder, which of its pairs count, bool [n], the evaluation with it)."""
    word, args = request.param
    folder = tmp_path_factory.mktemp("other")
    pairs = tiny.save_rows(folder / "rows.jsonl", pairs_of_shared_prompts(word))
    extract(finished, folder / "run", pairs, *args)
    seen = set()
    for row in rows_of(finished / "pairs.jsonl"):
        if row["split"] != "test":
            seen.add(row["prompt"])
    counts = []
    for row in rows_of(folder / "run/pairs.jsonl"):
        counts.append(row["split"] == "test" and row["prompt"] not in seen)
    return folder / "run", np.array(counts), evaluated(finished, new=folder / "run")


def share_right(run, pairs):
    """Accuracy of the run's head on pairs, by scoring their texts."""
    reward = stage3.RewardModel.load(run / "reward_head.safetensors")
    prompts = [row["prompt"] for row in pairs]
    chosen, rejected = [reward.score(prompts, [row[side] for row in pairs]) for side in SIDES]
    return statistics.fmean(a > b for a, b in zip(chosen, rejected))


def test_the_accuracy_is_that_of_scoring_the_texts_of_the_test_pairs(before, finished):
    pairs = [row for row in rows_of(finished / "pairs.jsonl") if row["split"] == "test"]
    row = before["accuracy"]["sparserm"]
    assert row["n"] == len(pairs)
    assert row["accuracy"] == pytest.approx(share_right(finished, pairs))
    assert 0 < row["accuracy"] < 1


def test_the_accuracy_on_another_set_is_that_of_scoring_texts_of_prompts_never_seen(
        other_set, finished):
    other, counts, found = other_set
    pairs = [row for row, count in zip(rows_of(other / "pairs.jsonl"), counts) if count]
    row = found["other"]["new"]
    assert row["n"] == len(pairs)
    assert row["groups"] == len({pair["prompt"] for pair in pairs}) < len(pairs)
    assert row["accuracy"] == pytest.approx(share_right(finished, pairs))


def test_another_set_changes_nothing_else(other_set, before):
    _, _, found = other_set
    assert without(found, "other") == without(before, "other")


def test_controls_are_trained_on_this_run_and_read_on_the_other(other_set):
    other, counts, found = other_set
    shard, = (other / "activations").glob("layer1-*")
    tensors, _ = load_stage(shard)
    longer = (tensors["chosen_tokens"] - tensors["rejected_tokens"]).numpy()[counts]
    right = longer * found["accuracy"]["length"]["choice"] > 0
    row = found["other"]["new"]["controls"]["length"]
    assert 0 < right.mean() < 1
    assert row["accuracy"] == pytest.approx(right.mean())


def test_differences_on_another_set_are_those_of_its_own_accuracies(other_set):
    _, counts, found = other_set
    ours = found["other"]["new"]
    for row in ours["controls"].values():
        assert row["n"] == counts.sum()
        assert row["behind"]["mean"] == pytest.approx(ours["ties_half"] - row["ties_half"])
        assert row["behind"]["low"] <= row["behind"]["mean"] <= row["behind"]["high"]


# ---------------------------------------------------------------- what depends on what

@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def change_run(run, change):
    """change(tensors of the shard, rows of pairs.jsonl); the new hashes are passed on."""
    shard, = (run / "activations").iterdir()
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
    old, new = before["accuracy"], evaluated(run)["accuracy"]
    assert old["sparserm"]["ties"] == 0
    assert new["sparserm"]["accuracy"] == pytest.approx(1 - old["sparserm"]["accuracy"])
    for name in ("dense", "words", "length", "random_directions", "activations"):
        assert new[name]["accuracy"] == pytest.approx(old[name]["accuracy"])


def other_activations_in(part):
    """A change of the chosen side of the pairs of one split."""
    def change(tensors, rows):
        there = tensors["split"] == part
        tensors["chosen"] = torch.where(there[:, None], -9 * tensors["rejected"], tensors["chosen"])
        if part == TEST:
            tensors["chosen_tokens"] = tensors["chosen_tokens"] * ~there
    return change


def test_train_activations_change_nothing_that_is_read_off_test(before, run):
    change_run(run, other_activations_in(TRAIN))
    after = evaluated(run)
    old, new = before["accuracy"], after["accuracy"]
    assert before["calibration"] == after["calibration"]
    assert before["length"] == after["length"]
    assert all(old[name] == new[name] for name in ("sparserm", "words", "length"))
    assert any(old[name] != new[name] for name in ("dense", "activations"))


def test_test_activations_change_no_choice(before, run):
    change_run(run, other_activations_in(TEST))
    after = evaluated(run)
    for name, row in before["accuracy"].items():
        assert after["accuracy"][name]["choice"] == row["choice"], name
    assert before["calibration"] != after["calibration"]


def test_a_head_with_a_fixed_k_gives_the_controls_the_same_k(run):
    succeed("03_train_head", "--run", run, "--k", 3, "--head", "mlp", "--hidden", 4, "--seeds", 1,
            "--epochs", 20)
    choice = {name: row["choice"] for name, row in evaluated(run)["accuracy"].items()}
    assert choice["sparserm"] == choice["activations"] == 3
    assert all(choice[name] == [3] for name in DRAWN)


# ---------------------------------------------------------------- the command

def not_to_be_called(*_, **__):
    pytest.fail("this was not to be called")


def test_without_texts_no_language_model_is_opened(run, monkeypatch):
    monkeypatch.setattr(stage1, "load_backbone", not_to_be_called)
    found = evaluate(run, "--sweeps", "none", "--texts", 0)
    assert found["latents"]
    assert all(row["tokens"] == [] and row["texts"] == {} for row in found["latents"])
    assert (run / "report.html").exists()


def test_a_second_call_shows_the_same_table_and_computes_nothing(full_run, monkeypatch, capsys):
    before = (full_run / "evaluation.json").stat().st_mtime_ns
    monkeypatch.setattr(stage4, "evaluate", not_to_be_called)
    with tiny.argv("--run", full_run, *FULL, "--other", f"self={full_run}"):
        stage4.main()
    assert "shuffled_labels" in capsys.readouterr().out
    assert (full_run / "evaluation.json").stat().st_mtime_ns == before


def test_with_other_sweeps_all_is_computed_anew_and_pictures_of_before_do_not_stay(
        full_run, tmp_path):
    run = shutil.copytree(full_run, tmp_path / "run")
    assert evaluate(run, "--sweeps", "none")["curves"] == {}
    assert sorted(p.name for p in run.glob("*.png")) == ["accuracy.png", "reliability.png"]


PARENT = {"format": 2, "head": "abc"}


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

QUICK = ["--seeds", 1, "--sweeps", "none", "--texts", 0]


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


def test_activations_of_another_run_are_refused(run):
    extract(run, run, run / "pairs.jsonl", "--layer", 1, "--token", "content")
    refused(run, "activations", run, "02")


def test_another_sae_is_refused(run, tmp_path):
    refused(run, "not the SAE", args=["--sae", tiny.save_sae(tmp_path / "sae.safetensors", seed=1)])


def test_an_sae_that_is_not_there_is_refused(run, tmp_path):
    refused(run, "none.safetensors", args=["--sae", tmp_path / "none.safetensors"])


def test_a_run_without_test_pairs_is_refused(run):
    def no_test_pairs(tensors, rows):
        tensors["split"].clamp_(max=DEV)
    change_run(run, no_test_pairs)
    refused(run, "test split", run)


def test_other_weights_at_the_place_of_the_backbone_are_refused_first(tmp_path, monkeypatch):
    run = tiny.make_run(tmp_path)
    shutil.rmtree(tmp_path / "model")
    tiny.save_model(tmp_path / "model", seed=9)
    monkeypatch.setattr(stage3, "fit_head", not_to_be_called)
    refused(run, "weights of", args=["--texts", 1])


@pytest.mark.parametrize("flag, value, word", [
    ("--seeds", "0", "--seeds"),
    ("--texts", "-1", "--texts"),
    ("--other", "a", "NAME=DIR"),
    ("--other", "b=none", "none"),
])
def test_a_flag_that_cannot_be_meant_is_one_line_that_names_it(flag, value, word, run, monkeypatch):
    monkeypatch.setattr(stage3, "fit_head", not_to_be_called)       # nothing is computed first
    refused(run, word, args=[flag, value])


def test_a_device_that_does_not_exist_is_refused_before_anything_is_computed(run, monkeypatch):
    monkeypatch.setattr(stage3, "fit_head", not_to_be_called)
    refused(run, "--device", args=["--texts", 1, "--device", "nope"])


@pytest.mark.parametrize("args, word", [
    (["--layer", 2], "layer"),
    (["--layer", 1, "--token", "eot"], "token"),
    (["--layer", 1, "--split", "0.8,0.2,0"], "test pair"),
])
def test_another_set_of_another_layer_or_token_or_without_test_pairs_is_refused(
        args, word, run, tmp_path):
    extract(run, tmp_path / "other", run / "pairs.jsonl", *args)
    refused(run, word, "other", args=["--other", f"x={tmp_path / 'other'}"])
