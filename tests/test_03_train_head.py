"""Stage 3, against numbers worked by hand, plain loops, scipy, and what stages 1 and 2 left."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from scipy.optimize import approx_fprime, linprog, minimize
from tiny import assert_one_line_error, command, succeed

from parts.chat import Text
from parts.files import read_meta

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
self_check = importlib.import_module("tools.self_check")
TRAIN, DEV, TEST = range(3)


def draw(*shape, seed):
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def accuracy_of(head, chosen, rejected):
    """Share of pairs with r_chosen > r_rejected."""
    return (head(chosen) > head(rejected)).float().mean().item()


# ---------------------------------------------------------------- the losses

def test_bradley_terry_is_the_mean_of_minus_log_sigmoid():
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([2.0, -0.5])
    # Δ = 0: -log(1/2) = 0.693147 · Δ = 1: log(1 + e^-1) = 0.313262
    by_hand = (0.693147 + 0.313262) / 2
    assert stage3.bradley_terry_loss(chosen, rejected) == pytest.approx(by_hand, abs=1e-6)


def test_bradley_terry_does_not_overflow():
    assert stage3.bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0])) == 1000


@pytest.mark.parametrize("margin, of_each", [(1.0, [0, 1.5, 0.5]), (3.0, [1, 3.5, 2.5])])
def test_the_margin_loss_is_zero_beyond_the_margin_and_linear_below(margin, of_each):
    chosen, rejected = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 0.5])
    assert (chosen - rejected).tolist() == [2, -0.5, 0.5]
    assert stage3.margin_loss(chosen, rejected, margin) == pytest.approx(sum(of_each) / 3)


def test_bce_takes_each_response_by_itself():
    # chosen at 0: log 2 = 0.693147 · rejected at 1: log(1 + e) = 1.313262
    by_hand = (0.693147 + 1.313262) / 2
    found = stage3.bce_loss(torch.tensor([0.0]), torch.tensor([1.0]))
    assert found == pytest.approx(by_hand, abs=1e-6)


def test_the_gradient_of_bradley_terry_is_that_of_its_formula():
    chosen, rejected = draw(6, seed=0).requires_grad_(), draw(6, seed=1).requires_grad_()
    stage3.bradley_terry_loss(chosen, rejected).backward()
    differences = (chosen - rejected).tolist()
    by_hand = torch.tensor([-1 / (1 + math.exp(d)) for d in differences]) / 6      # -σ(-Δ) / n
    torch.testing.assert_close(chosen.grad, by_hand)
    torch.testing.assert_close(rejected.grad, -by_hand)


# ---------------------------------------------------------------- the heads

def test_a_linear_head_is_a_weighted_sum_and_a_bias():
    head = stage3.head_from({"w1": torch.tensor([2.0, -1.0]), "b1": torch.tensor([0.5])})
    assert head(torch.tensor([[1.0, 3.0], [0.0, 1.0]])).tolist() == [2 - 3 + 0.5, -1 + 0.5]


def test_an_mlp_head_is_what_a_loop_over_its_hidden_units_gives():
    head = stage3.start_head(3, "mlp", hidden=5).requires_grad_(False)
    head.b2.fill_(0.7)
    x = draw(4, 3, seed=1)
    for row in x:
        reward = float(head.b2)
        for unit in range(5):
            before = float(head.b1[unit]) + sum(float(head.w1[unit, i] * row[i]) for i in range(3))
            reward += max(0.0, before) * float(head.w2[unit])
        assert float(head(row[None])) == pytest.approx(reward, abs=1e-6)


def test_a_linear_head_that_has_seen_no_pair_gives_rewards_of_0():
    assert not stage3.start_head(4)(draw(5, 4, seed=0)).any()


def test_an_mlp_that_has_seen_no_pair_is_uniform_in_one_over_root_inputs():
    mlp = stage3.start_head(400, "mlp", hidden=100)
    for parameter, inputs in ((mlp.w1, 400), (mlp.b1, 400), (mlp.w2, 100)):
        limit = inputs ** -0.5
        assert 0.9 * limit < parameter.abs().max() <= limit
        assert parameter.min() < 0 < parameter.max()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_read_from_its_tensors_gives_the_same_rewards(kind):
    head = stage3.start_head(6, kind, hidden=4).requires_grad_(False)
    for n, parameter in enumerate(head.parameters()):
        parameter.copy_(draw(*parameter.shape, seed=n))
    again = stage3.head_from(head.state_dict())
    x = draw(9, 6, seed=9)
    assert again.kind == kind
    assert torch.equal(again(x), head(x))
    assert not again(x).requires_grad


def test_the_mlp_of_the_paper_has_132097_parameters():
    head = stage3.start_head(256, "mlp")
    assert stage3.trained_parameters(head) == 256 * 512 + 512 + 512 + 1 == 132_097


def test_a_linear_head_has_a_weight_a_direction_and_a_bias():
    assert stage3.trained_parameters(stage3.start_head(256)) == 257


def test_the_penalty_is_on_all_weights_and_on_no_bias():
    linear, mlp = stage3.start_head(3), stage3.start_head(3, "mlp", hidden=2)
    assert [id(weight) for weight in linear.weights()] == [id(linear.w1)]
    assert [id(weight) for weight in mlp.weights()] == [id(mlp.w1), id(mlp.w2)]


def test_the_output_bias_is_added_to_every_reward():
    x = draw(5, 3, seed=0)
    for kind in ("linear", "mlp"):
        head = stage3.start_head(3, kind, hidden=2).requires_grad_(False)
        before = head(x)
        head.output_bias().add_(2.5)
        torch.testing.assert_close(head(x), before + 2.5)


# ---------------------------------------------------------------- what a trained head minimises

LOSSES = [("bt", 1.0), ("margin", 0.5), ("margin", 2.0), ("bce", 1.0)]


def naive_loss(name, margin, reward_chosen, reward_rejected):
    """The loss in float64 NumPy."""
    difference = reward_chosen - reward_rejected
    if name == "bt":
        return np.log1p(np.exp(-difference)).mean()
    if name == "margin":
        return np.maximum(0, margin - difference).mean()
    of_chosen = np.log1p(np.exp(-reward_chosen)).mean()
    of_rejected = np.log1p(np.exp(reward_rejected)).mean()
    return (of_chosen + of_rejected) / 2


def overlapping_pairs(n=80, width=3):
    """Pairs that no line divides, dev the same as train → chosen, rejected [2n, width], split.

    What both sides share cancels in a difference, and is noise to a loss of single responses.
    """
    shared = draw(n, width, seed=4) * torch.tensor([0.0, 0.0, 4.0])
    chosen = shared + draw(n, width, seed=5) + torch.tensor([0.5, 0.0, 1.0])
    rejected = shared + draw(n, width, seed=6)
    split = torch.tensor([TRAIN] * n + [DEV] * n)
    return chosen.repeat(2, 1), rejected.repeat(2, 1), split


def least_margin_loss(chosen, rejected, margin):
    """The margin loss as a linear program: one slack a pair → w."""
    difference = chosen - rejected
    n, width = difference.shape
    cost = np.concatenate([np.zeros(width), np.ones(n) / n])
    rows = -np.concatenate([difference, np.eye(n)], 1)              # w·d + slack >= margin
    bounds = [(None, None)] * width + [(0, None)] * n
    return linprog(cost, rows, -margin * np.ones(n), bounds=bounds).x[:width]


def least_smooth_loss(name, chosen, rejected, decay):
    """w for which loss + decay/2 · ‖w‖² is least, the bias free → w."""
    width = chosen.shape[1]

    def objective(weights):
        w, b = weights[:width], weights[width]
        penalty = decay / 2 * (w**2).sum()
        return naive_loss(name, None, chosen @ w + b, rejected @ w + b) + penalty
    return minimize(objective, np.zeros(width + 1), tol=1e-10).x[:width]


def solution(loss, margin, chosen, rejected, split, decay):
    """The weights that scipy finds on the train pairs."""
    train = (split == TRAIN).numpy()
    sides = chosen.double().numpy()[train], rejected.double().numpy()[train]
    if loss == "margin":
        return least_margin_loss(*sides, margin)
    return least_smooth_loss(loss, *sides, decay)


def loss_of(head, name, margin, chosen, rejected):
    """The naive loss of a head's rewards."""
    return naive_loss(name, margin, *(head(side).double().numpy() for side in (chosen, rejected)))


SLOW = {"lr": 0.01, "epochs": 1200, "patience": 1200}


@pytest.mark.parametrize("loss, margin", LOSSES)
def test_a_trained_linear_head_is_the_solution_that_scipy_finds(loss, margin):
    pairs = overlapping_pairs()
    head, _ = stage3.fit_head(*pairs, loss=loss, margin=margin, weight_decay=0.0, **SLOW)
    wanted = solution(loss, margin, *pairs, decay=0.0)
    assert head.w1.tolist() == pytest.approx(wanted, rel=0.03, abs=0.01)


def test_weight_decay_is_an_l2_penalty_on_the_weights():
    pairs = overlapping_pairs()
    head, _ = stage3.fit_head(*pairs, weight_decay=0.5, lr=0.002, epochs=400, patience=400)
    wanted = solution("bt", None, *pairs, decay=0.5)
    assert head.w1.tolist() == pytest.approx(wanted, abs=0.02)
    for other in (0.0, 0.25, 1.0):                  # that is no accident of these pairs
        assert abs(solution("bt", None, *pairs, decay=other) - wanted).max() > 0.08


def test_the_losses_have_solutions_that_the_tests_above_tell_apart():
    pairs = overlapping_pairs()
    found = [solution(loss, margin, *pairs, decay=0.0) for loss, margin in LOSSES]
    for n, one in enumerate(found):
        for other in found[:n]:
            assert one != pytest.approx(other, rel=0.1, abs=0.05)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("loss, margin", LOSSES)
def test_the_loss_that_comes_with_a_head_is_its_loss_on_dev(kind, loss, margin):
    chosen, rejected, split = noisy_scores()
    head, found = stage3.fit_head(chosen, rejected, split, kind=kind, loss=loss, margin=margin,
                                  hidden=4, epochs=20)
    by_hand = loss_of(head, loss, margin, chosen[split == DEV], rejected[split == DEV])
    assert found == pytest.approx(by_hand, abs=1e-5)


SMALL_MLP = {"w1": (2, 3), "b1": (2,), "w2": (2,), "b2": (1,)}


def unpacked(numbers):
    """All numbers of a small MLP in a row → {name: array}."""
    arrays = {}
    start = 0
    for name, shape in SMALL_MLP.items():
        size = math.prod(shape)
        arrays[name] = numbers[start:start + size].reshape(shape)
        start += size
    return arrays


def mlp_in_numpy(numbers, x):
    """Rewards of the small MLP."""
    t = unpacked(numbers)
    return np.maximum(0, x @ t["w1"].T + t["b1"]) @ t["w2"] + t["b2"]


def adam_by_finite_differences(objective, x, steps, lr):
    """Adam with gradients that are differences of the objective → where it ends."""
    m = v = np.zeros_like(x)
    for step in range(1, steps + 1):
        gradient = approx_fprime(x, objective, 1e-7)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        x = x - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return x


@pytest.mark.parametrize("loss, margin", LOSSES)
def test_an_mlp_takes_the_steps_of_adam_down_its_loss(loss, margin):
    chosen, rejected, split = overlapping_pairs()
    settings = {"kind": "mlp", "hidden": 2, "loss": loss, "margin": margin, "weight_decay": 0.1}
    start, _ = stage3.fit_head(chosen, rejected, split, epochs=0, **settings)
    head, _ = stage3.fit_head(chosen, rejected, split, epochs=8, lr=0.02, **settings)
    sides = chosen.double().numpy(), rejected.double().numpy()      # dev is the same as train

    def objective(numbers):
        t = unpacked(numbers)
        penalty = 0.1 / 2 * ((t["w1"]**2).sum() + (t["w2"]**2).sum())
        return naive_loss(loss, margin, *(mlp_in_numpy(numbers, side) for side in sides)) + penalty
    numbers = torch.cat([start.state_dict()[name].flatten() for name in SMALL_MLP]).double().numpy()
    wanted = unpacked(adam_by_finite_differences(objective, numbers, 8, 0.02))
    for name, tensor in head.state_dict().items():
        np.testing.assert_allclose(tensor, wanted[name], atol=2e-3, err_msg=name)


# ---------------------------------------------------------------- training

def noisy_scores(n=120, m=10, told=1.5, seed=2):
    """Few pairs, many columns, one of which tells something: a head overfits.

    → chosen, rejected [n, m], split [n].
    """
    chosen, rejected = draw(n, m, seed=seed), draw(n, m, seed=seed + 1)
    chosen[:, 0] += told
    return chosen, rejected, torch.tensor([TRAIN, DEV, TEST, DEV] * (n // 4))


def plain_descent(chosen, rejected, split, epochs, lr=0.05, decay=0.01):
    """Full-batch Adam written out, on w·(c - r) alone → the weights after 0, 1, … epochs."""
    d = (chosen - rejected)[split == TRAIN].double()
    w, m, v = (torch.zeros(d.shape[1], dtype=torch.float64) for _ in range(3))
    states = [w]
    for step in range(1, epochs + 1):
        g = -(torch.sigmoid(-d @ w)[:, None] * d).mean(0) + decay * w
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        w = w - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        states.append(w)
    return states


def losses_on_dev(states, chosen, rejected, split):
    """Bradley-Terry loss on dev of each of some weights → list."""
    d = (chosen - rejected)[split == DEV].double()
    return [float(torch.log1p(torch.exp(-d @ w)).mean()) for w in states]


DESCENT = {"lr": 0.05, "weight_decay": 0.01}


def test_training_returns_the_weights_of_the_best_epoch_on_dev():
    scores = noisy_scores()
    states = plain_descent(*scores, 80)
    losses = losses_on_dev(states, *scores)
    best = losses.index(min(losses))
    assert 3 < best < 70 and losses[-1] > losses[best] + 0.01       # it overfits after the best

    head, on_dev = stage3.fit_head(*scores, epochs=80, patience=80, **DESCENT)
    torch.testing.assert_close(head.w1.double(), states[best], rtol=1e-3, atol=1e-3)
    assert on_dev == pytest.approx(losses[best], abs=1e-5)


def calls_of_bradley_terry(monkeypatch):
    """→ a list that gets (number of pairs, is this a training step) of each call."""
    calls = []
    real = stage3.bradley_terry_loss

    def noted(chosen, rejected):
        calls.append((len(chosen), torch.is_grad_enabled()))
        return real(chosen, rejected)
    monkeypatch.setattr(stage3, "bradley_terry_loss", noted)
    return calls


def test_it_stops_when_dev_has_not_improved_for_patience_epochs(monkeypatch):
    scores = noisy_scores()
    losses = losses_on_dev(plain_descent(*scores, 80), *scores)
    best = losses.index(min(losses))
    calls = calls_of_bradley_terry(monkeypatch)
    stage3.fit_head(*scores, epochs=80, patience=7, **DESCENT)
    looks_at_dev = sum(not trains for _, trains in calls)
    assert abs(looks_at_dev - (best + 1 + 7)) <= 1


def test_a_single_epoch_already_trains():
    head, on_dev = stage3.fit_head(*noisy_scores(), epochs=1, **DESCENT)
    assert head.w1.any()
    assert on_dev < math.log(2)


def test_where_pairs_are_many_an_epoch_is_a_part_of_them(monkeypatch):
    monkeypatch.setattr(stage3, "EPOCH_PAIRS", 20)
    calls = calls_of_bradley_terry(monkeypatch)
    stage3.fit_head(*noisy_scores(400), batch=8, epochs=2)
    assert [n for n, trains in calls if trains] == [8, 8, 4, 8, 8, 4]


def test_where_pairs_are_many_every_epoch_draws_other_ones(monkeypatch):
    monkeypatch.setattr(stage3, "EPOCH_PAIRS", 20)
    chosen, rejected, split = noisy_scores(400, told=2)
    head, _ = stage3.fit_head(chosen, rejected, split, batch=8, lr=0.05)
    assert accuracy_of(head, chosen[split == TEST], rejected[split == TEST]) > 0.8


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("loss", ["bt", "margin", "bce"])
def test_every_head_learns_with_every_loss(kind, loss):
    chosen, rejected, split = noisy_scores(200, told=2)
    head, _ = stage3.fit_head(chosen, rejected, split, kind=kind, loss=loss, hidden=16)
    assert accuracy_of(head, chosen[split == TEST], rejected[split == TEST]) > 0.65


def test_only_the_columns_that_are_named_are_read():
    chosen, rejected, split = noisy_scores()
    columns = torch.tensor([0, 3, 7])
    head, loss = stage3.fit_head(chosen, rejected, split, columns=columns, epochs=5)
    alone, same = stage3.fit_head(chosen[:, columns], rejected[:, columns], split, epochs=5)
    assert torch.equal(head.w1, alone.w1)
    assert loss == same


def test_test_pairs_never_touch_the_head():
    chosen, rejected, split = noisy_scores()
    before, _ = stage3.fit_head(chosen, rejected, split)
    chosen[split == TEST] = torch.nan
    after, _ = stage3.fit_head(chosen, rejected, split)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])


@pytest.mark.parametrize("change", [0.2, -0.3, 3.0])
def test_dev_pairs_only_choose_among_the_epochs_of_one_training(change):
    chosen, rejected, split = noisy_scores()
    walk = plain_descent(chosen, rejected, split, 40)
    chosen[split == DEV] += change * draw(60, 10, seed=5)
    head, _ = stage3.fit_head(chosen, rejected, split, epochs=40, patience=99, **DESCENT)
    distances = [float((head.w1 - w).abs().max()) for w in walk]
    assert min(distances) < 1e-3
    assert sorted(distances)[1] > 1e-3             # the epochs are further apart than that


def test_swapping_chosen_and_rejected_everywhere_negates_the_weights():
    chosen, rejected, split = noisy_scores()
    head, _ = stage3.fit_head(chosen, rejected, split)
    swapped, _ = stage3.fit_head(rejected, chosen, split)
    torch.testing.assert_close(swapped.w1, -head.w1)
    right = accuracy_of(head, chosen, rejected)
    assert 0.5 < right < 1
    assert accuracy_of(swapped, chosen, rejected) == pytest.approx(1 - right)


def test_the_temperature_has_the_least_loss_on_dev():
    difference = 4 * draw(300, seed=3) + 3

    def loss(temperature):
        return sum(math.log1p(math.exp(-d / temperature)) for d in difference.tolist()) / 300
    best = minimize(lambda log_t: loss(math.exp(log_t[0])), [0.0]).x[0]
    assert stage3.fit_temperature(difference) == pytest.approx(math.exp(best), rel=0.03)


def test_the_temperature_of_pairs_that_are_all_right_is_not_0():
    assert stage3.fit_temperature(torch.tensor([1.0, 2.0, 3.0])) > 0.1


def test_the_temperature_of_rewards_that_are_all_the_same_is_1():
    assert stage3.fit_temperature(torch.zeros(5)) == 1


# ---------------------------------------------------------------- the stage

@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, its head still to be trained."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/reward_head.safetensors").unlink()
    return tmp_path / "run"


FLAGS = ["--seeds", 2, "--epochs", 60]


def train(run, *args):
    """Run stage 3 → (tensors, metadata)."""
    succeed("03_train_head", "--run", run, *FLAGS, *args)
    return stage1.load_stage(run / "reward_head.safetensors")


def change_features(run, split, factor):
    """Multiply the scores of the pairs in one split."""
    t, meta = stage1.load_stage(run / "features.safetensors")
    for side in ("chosen", "rejected"):
        t[side][t["split"] == split] *= factor
    stage1.save_stage(run / "features.safetensors", t, meta)


def standardised_scores(run):
    """→ chosen, rejected [n, 2K] with mean 0 and std 1 on train, and split."""
    t, _ = stage1.load_stage(run / "features.safetensors")
    chosen, rejected = ((t[side] - t["mean"]) / t["std"] for side in ("chosen", "rejected"))
    return chosen, rejected, t["split"]


@pytest.mark.parametrize("loss, margin", LOSSES)
def test_the_stage_trains_with_the_loss_and_margin_of_its_flags(loss, margin, run):
    tensors, meta = train(run, "--k", 8, "--loss", loss, "--margin", margin)
    scores = standardised_scores(run)
    fitted = [stage3.fit_head(*scores, loss=loss, margin=margin, epochs=60, seed=seed)
              for seed in range(2)]
    head, dev_loss = min(fitted, key=lambda found: found[1])
    assert meta["accuracy"]["dev_loss"] == pytest.approx(dev_loss)
    torch.testing.assert_close(tensors["w1"], head.w1)


def test_of_several_seeds_the_head_with_the_lowest_loss_on_dev_is_kept(run):
    tensors, meta = train(run, "--k", 8, "--head", "mlp", "--hidden", 5, "--seeds", 4)
    scores = standardised_scores(run)
    fitted = [stage3.fit_head(*scores, kind="mlp", hidden=5, epochs=60, seed=seed)
              for seed in range(4)]
    losses = [dev_loss for _, dev_loss in fitted]
    assert meta["seed_kept"] == losses.index(min(losses))
    torch.testing.assert_close(tensors["w1"], fitted[meta["seed_kept"]][0].w1)


def test_other_test_scores_change_only_the_parents_of_the_head_file(run):
    before, meta = train(run)
    change_features(run, TEST, -9)
    after, other = train(run)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert meta.pop("parent") != other.pop("parent")
    assert meta == other


def test_dev_sets_the_temperature(run):
    before, _ = train(run, "--k", 8)
    change_features(run, DEV, -3)
    after, _ = train(run, "--k", 8)
    assert before["temperature"] != after["temperature"]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_rewards_are_0_on_average_over_the_train_responses(kind, run):
    change_features(run, DEV, -3)
    tensors, _ = train(run, "--k", 8, "--head", kind, "--hidden", 5)
    chosen, rejected, split = standardised_scores(run)
    of_train = torch.cat([chosen[split == TRAIN], rejected[split == TRAIN]])
    assert abs(stage3.head_from(tensors)(of_train).mean()) < 1e-5


def test_k_auto_takes_the_k_with_the_lowest_loss_on_dev(run):
    chosen, rejected, split = standardised_scores(run)
    losses = {}
    for k in (1, 2, 4, 8):
        columns = [*range(k), *range(8, 8 + k)]
        _, losses[k] = stage3.fit_head(chosen[:, columns], rejected[:, columns], split, epochs=60)
    _, meta = train(run)
    assert meta["k"] == min(losses, key=losses.get)
    assert meta["k_curve"] == {str(k): pytest.approx(loss) for k, loss in losses.items()}


def test_a_head_keeps_the_first_k_directions_of_each_side(run):
    t, _ = stage1.load_stage(run / "features.safetensors")
    head, _ = train(run, "--k", 3)
    columns = [0, 1, 2, 8, 9, 10]
    for name in ("latents", "directions", "mean", "std"):
        assert torch.equal(head[name], t[name][columns]), name


def test_the_file_holds_what_scoring_needs(run):
    t, meta = train(run, "--k", 3, "--head", "mlp", "--hidden", 5)
    assert {name: tuple(tensor.shape) for name, tensor in t.items()} == {
        "latents": (6,), "directions": (6, tiny.WIDTH), "mean": (6,), "std": (6,),
        "w1": (5, 6), "b1": (5,), "w2": (5,), "b2": (1,), "temperature": (1,),
    }
    needed = {"model", "layer", "token", "template", "max_length", "sae", "settings", "backbone"}
    assert needed <= set(meta)


def test_the_metadata_is_one_key_of_sorted_json(run):
    _, meta = train(run)
    with safe_open(run / "reward_head.safetensors", "pt") as file:
        assert file.metadata() == {"sparserm": json.dumps(meta, sort_keys=True)}


def test_the_parents_are_the_hashes_of_features_pairs_and_sae(run):
    _, meta = train(run)
    assert meta["parent"] == {
        "features": stage1.file_hash(run / "features.safetensors"),
        "pairs": stage1.file_hash(run / "pairs.jsonl"),
        "sae": stage1.file_hash(meta["sae"]),
    }


def test_the_same_inputs_give_the_same_bytes_in_another_process(run, tmp_path):
    shutil.copytree(run, tmp_path / "other/run")
    sae = read_meta(run / "features.safetensors")["sae"]
    mlp = ["--head", "mlp", "--hidden", "8"]
    train(run, *mlp)
    commands = f"""
import tiny
tiny.succeed("02_select_features", "--run", "run", "--sae", {sae!r}, "--k", 8)
tiny.succeed("03_train_head", "--run", "run", *{FLAGS + mlp!r})
"""
    places = os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests")])
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": places}
    subprocess.run([sys.executable, "-c", commands], check=True, cwd=tmp_path / "other",
                   env=environment)
    for name in ("features.safetensors", "reward_head.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "other/run" / name).read_bytes()


# ---------------------------------------------------------------- python -m tools.self_check

def check(run):
    """python -m tools.self_check --run RUN → (exit code, stdout, stderr)."""
    return command("tools/self_check", "--run", run)


def test_the_self_check_as_a_module_passes_on_a_finished_run(finished):
    done = subprocess.run([sys.executable, "-m", "tools.self_check", "--run", finished],
                          cwd=tiny.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 9
    assert all(line.startswith("✓ ") for line in lines)


def test_the_self_check_changes_no_file(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert check(finished)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_the_self_check_fails_on_a_head_with_other_directions(run):
    head, meta = train(run)
    head["directions"] = head["directions"].flip(0)
    stage1.save_stage(run / "reward_head.safetensors", head, meta)
    code, out, err = check(run)
    assert code == 1 and err == ""
    crosses = [line for line in out.splitlines() if line.startswith("✗")]
    assert len(crosses) == 1 and "stages 1 and 2" in crosses[0]


def test_the_self_check_names_pairs_that_have_changed_since(run):
    train(run)
    (run / "pairs.jsonl").write_text("{}\n")
    code, out, _ = check(run)
    assert code == 1
    assert "pairs.jsonl has changed since 02_select_features.py read it" in out


def test_the_self_check_names_features_that_have_changed_since(run):
    train(run)
    change_features(run, TEST, 2)
    code, out, _ = check(run)
    assert code == 1
    assert "features.safetensors has changed since 03_train_head.py read it" in out


def test_the_self_check_of_a_run_without_a_head_names_what_to_run(run):
    assert_one_line_error(check(run), "reward_head.safetensors", "not found")


def test_the_self_check_of_a_head_of_other_latents_names_what_to_run(run):
    head, meta = train(run)
    head["latents"] = head["latents"] + 1000
    stage1.save_stage(run / "reward_head.safetensors", head, meta)
    assert_one_line_error(check(run), "latents", "03_train_head.py")


# each of these takes the real function and gives one that breaks a single promise

def with_a_second_bos(real):
    def render(tokenizer, *rest):
        text = real(tokenizer, *rest)
        bos = tokenizer.bos_token_id
        return Text([bos, bos, *text.ids], text.first + 2, text.last + 2, text.eot + 2)
    return render


def without_marks_that_end_a_turn(real):
    def control_tokens(tokenizer):
        words, _ = real(tokenizer)
        return words, set()
    return control_tokens


def telling_the_place_in_the_list(real):
    def score(self, prompts, responses):
        return [reward + 0.01 * n for n, reward in enumerate(real(self, prompts, responses))]
    return score


def reading_padding(real):
    def hidden_rows(self, sequences, layers):
        if self.pack == "pad":
            sequences = [ids[:-3] + ids[-1:] * 3 for ids in sequences]
        return real(self, sequences, layers)
    return hidden_rows


def forgetting_half_of_the_head(real):
    def load(path, model=None):
        reward = real(path, model)
        if model:
            reward.head.w1.mul_(1.5)
        return reward
    return load


def preferring_both(real):
    def prefer(self, prompt, a, b):
        return 0.1 + real(self, prompt, a, b)
    return prefer


BROKEN = {
    "no second BOS": (stage3, "render", with_a_second_bos),
    "an end-of-turn token": (self_check, "control_tokens", without_marks_that_end_a_turn),
    "backwards as forwards": (stage3.RewardModel, "score", telling_the_place_in_the_list),
    "padded as packed": (stage1.Backbone, "hidden_rows", reading_padding),
    "read again from disk": (stage3.RewardModel, "load", forgetting_half_of_the_head),
    "prefer(a, b)": (stage3.RewardModel, "prefer", preferring_both),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_a_cross_in_the_self_check(what, finished, monkeypatch):
    place, name, breaks = BROKEN[what]
    monkeypatch.setattr(place, name, breaks(getattr(place, name)))
    found = self_check.self_check(finished)
    assert [holds for label, holds, _ in found if label.startswith(what)] == [False], found


def test_nothing_broken_is_nine_ticks_in_the_self_check(finished):
    assert [holds for _, holds, _ in self_check.self_check(finished)] == [True] * 9


# ---------------------------------------------------------------- the reward model

@pytest.fixture(scope="module", params=["linear", "mlp"])
def reward(request, finished, tmp_path_factory):
    """A RewardModel of 6 of 8 latents a side; reward.run is the folder of its run."""
    run = tmp_path_factory.mktemp("head") / "run"
    shutil.copytree(finished, run)
    train(run, "--head", request.param, "--hidden", 8, "--k", 6)
    model = stage3.RewardModel.load(run / "reward_head.safetensors")
    model.run = run
    return model


LINEAR = pytest.mark.parametrize("reward", ["linear"], indirect=True)
AN_MLP = pytest.mark.parametrize("reward", ["mlp"], indirect=True)


def pairs_of(run):
    """The rows of pairs.jsonl."""
    with open(run / "pairs.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def spread(scores):
    """Their standard deviation."""
    return float(torch.tensor(scores).std())


def test_a_text_gets_the_reward_that_its_stored_scores_get(reward):
    chosen, rejected, _ = standardised_scores(reward.run)
    columns = [*range(6), *range(8, 14)]
    rows = pairs_of(reward.run)
    prompts = [row["prompt"] for row in rows]
    for side, x in (("chosen", chosen), ("rejected", rejected)):
        stored = reward.head(x[:, columns])
        scored = torch.tensor(reward.score(prompts, [row[side] for row in rows]))
        assert (scored - stored).abs().max() < 1e-3 * stored.std()


def test_the_scores_of_the_train_responses_are_0_on_average(reward):
    _, _, split = standardised_scores(reward.run)
    rows = [row for row, of in zip(pairs_of(reward.run), split.tolist()) if of == TRAIN]
    responses = [row[side] for side in ("chosen", "rejected") for row in rows]
    scores = reward.score([row["prompt"] for row in rows] * 2, responses)
    assert abs(sum(scores) / len(scores)) < 1e-3 * spread(scores)


def test_a_score_does_not_depend_on_what_is_scored_beside_it(reward):
    rows = pairs_of(reward.run)[:12]
    together = reward.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    alone = [reward.score([row["prompt"]], [row["chosen"]])[0] for row in rows]
    assert alone == pytest.approx(together, abs=1e-3 * spread(together))


def test_a_score_does_not_depend_on_its_place_in_the_list(reward):
    rows = pairs_of(reward.run)[:12]
    prompts, responses = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    in_order = reward.score(prompts, responses)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist() * 2
    shuffled = reward.score([prompts[i] for i in order], [responses[i] for i in order])
    assert shuffled == pytest.approx([in_order[i] for i in order], abs=1e-3 * spread(in_order))


@pytest.fixture(scope="module")
def explained(reward):
    """What explain() says of the first pair's chosen response, {latent: its part} added."""
    row = pairs_of(reward.run)[0]
    found = reward.explain(row["prompt"], row["chosen"])
    found["score"] = reward.score([row["prompt"]], [row["chosen"]])[0]
    found["of"] = {part["latent"]: part for part in found["contributions"]}
    return found


def test_an_explained_reward_is_the_score(explained):
    assert explained["reward"] == pytest.approx(explained["score"], abs=1e-4)


def test_an_explanation_names_every_latent_and_its_side(explained, reward):
    sides = [explained["of"][latent]["side"] for latent in reward.tensors["latents"].tolist()]
    assert sides == ["chosen"] * 6 + ["rejected"] * 6


def test_an_explanation_begins_with_what_counts_most(explained):
    sizes = [abs(part["contribution"]) for part in explained["contributions"]]
    assert sizes == sorted(sizes, reverse=True)


@LINEAR
def test_the_contributions_of_a_linear_head_and_its_bias_add_up_to_its_reward(explained):
    total = sum(part["contribution"] for part in explained["contributions"])
    assert total + explained["bias"] == pytest.approx(explained["reward"], abs=1e-5)


@AN_MLP
def test_the_explanation_of_an_mlp_has_no_bias(explained):
    assert explained["bias"] is None


def test_an_explained_contribution_is_the_change_without_that_score(explained, reward):
    latents = reward.tensors["latents"].tolist()
    x = torch.tensor([[explained["of"][latent]["score"] for latent in latents]])
    for column, latent in enumerate(latents):
        without = x.clone()
        without[0, column] = 0                      # the mean of a standardised score
        by_hand = float(reward.head(x) - reward.head(without))
        assert explained["of"][latent]["contribution"] == pytest.approx(by_hand, abs=1e-5)


def test_contributions_are_those_of_a_loop_that_sets_one_score_to_its_mean(reward):
    z = 3 * draw(9, tiny.WIDTH, seed=6)
    found, rewards = reward.contributions(z), reward.reward_of(z)
    assert found.shape == (9, 12)
    for n in range(9):
        scores = torch.stack([z[n] @ direction for direction in reward.directions])
        for j in range(12):
            without = scores.clone()
            without[j] = reward.mean[j]
            [rest] = reward.head((without - reward.mean)[None] / reward.std)
            assert float(found[n, j]) == pytest.approx(float(rewards[n] - rest), abs=2e-4)


def test_an_mlp_that_computes_a_linear_head_has_its_rewards_and_contributions():
    w, z = draw(4, seed=1), draw(7, 5, seed=2)
    scale = {"directions": draw(4, 5, seed=3), "mean": draw(4, seed=4),
             "std": draw(4, seed=5).abs() + 0.5, "temperature": torch.ones(1)}
    both_signs = torch.cat([torch.eye(4), -torch.eye(4)])           # relu(x) - relu(-x) = x
    linear = {"w1": w, "b1": torch.ones(1)}
    mlp = {"w1": both_signs, "b1": torch.zeros(8), "w2": torch.cat([w, -w]), "b2": torch.ones(1)}
    linear = stage3.RewardModel(scale | linear, {}, None)
    mlp = stage3.RewardModel(scale | mlp, {}, None)

    torch.testing.assert_close(linear.reward_of(z), mlp.reward_of(z))
    torch.testing.assert_close(linear.contributions(z), mlp.contributions(z))
    for n in range(7):
        for j in range(4):
            score = float(z[n] @ scale["directions"][j])
            by_hand = float(w[j] * (score - scale["mean"][j]) / scale["std"][j])
            assert float(linear.contributions(z)[n, j]) == pytest.approx(by_hand, abs=1e-5)


@LINEAR
def test_a_linear_head_folded_to_one_vector_gives_the_same_rewards(reward):
    u, c = reward.vector()
    z = draw(20, tiny.WIDTH, seed=8)
    by_hand = []
    for vector in z:
        total = float(reward.head.b1)
        for j in range(12):
            score = (vector @ reward.directions[j] - reward.mean[j]) / reward.std[j]
            total += float(reward.head.w1[j] * score)
        by_hand.append(total)
    torch.testing.assert_close(z @ u + c, torch.tensor(by_hand), rtol=1e-4, atol=1e-4)


def test_prefer_is_the_sigmoid_of_the_difference_over_the_temperature(reward):
    row = pairs_of(reward.run)[0]
    a, b = reward.score([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
    expected = 1 / (1 + math.exp(-(a - b) / float(reward.tensors["temperature"])))
    found = reward.prefer(row["prompt"], row["chosen"], row["rejected"])
    swapped = reward.prefer(row["prompt"], row["rejected"], row["chosen"])
    assert found == pytest.approx(expected, abs=1e-3)
    assert swapped == pytest.approx(1 - expected, abs=1e-3)


def too_long(reward):
    """A response longer than max_length."""
    return "wet " * 3 * reward.meta["max_length"]


def test_as_a_trl_reward_function_it_gives_the_score_of_each_text(reward):
    rows = pairs_of(reward.run)[:3]
    prompts, responses = [row["prompt"] for row in rows], [rows[0]["chosen"], rows[1]["chosen"], ""]
    found = reward(prompts=prompts, completions=responses, completion_ids=None, trainer_state=None)
    assert found == pytest.approx(reward.score(prompts, responses), abs=1e-3)


def test_as_a_trl_reward_function_it_takes_messages(reward):
    rows = pairs_of(reward.run)[:3]
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    responses = [[{"role": "assistant", "content": row["chosen"]}] for row in rows]
    strings = reward.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    assert reward(prompts, responses) == pytest.approx(strings, abs=1e-3)


def test_as_a_trl_reward_function_it_gives_none_for_what_is_too_long(reward):
    found = reward(["a", "b", "c"], ["yes", too_long(reward), "no"])
    assert found[1] is None
    assert [found[0], found[2]] == pytest.approx(reward.score(["a", "c"], ["yes", "no"]), abs=1e-3)
    assert reward(["a"], [too_long(reward)]) == [None]


def test_as_a_trl_reward_function_it_has_a_name_and_is_no_module(reward):
    assert reward.__name__ == "sparserm_reward"
    assert not isinstance(reward, torch.nn.Module)


def test_no_texts_have_no_scores(reward):
    assert reward.score([], []) == []
    assert reward([], []) == []


@pytest.mark.parametrize("prompts, responses", [("a", ["b"]), (["a"], "b"), (["a"], ["b", "c"])])
def test_score_refuses_a_single_string_and_unequal_lists(prompts, responses, reward):
    with pytest.raises(stage1.UserError, match="score"):
        reward.score(prompts, responses)


def test_score_refuses_what_is_too_long(reward):
    with pytest.raises(stage1.UserError, match="longer"):
        reward.score(["a"], [too_long(reward)])


def test_a_copy_of_the_backbone_elsewhere_gives_the_same_scores(reward, tmp_path):
    shutil.copytree(reward.meta["model"], tmp_path / "copy")
    head = reward.run / "reward_head.safetensors"
    other = stage3.RewardModel.load(head, model=str(tmp_path / "copy"))
    texts = ["Is water wet?"], ["It is."]
    assert other.score(*texts) == reward.score(*texts)


CHANGES = [{"num_hidden_layers": 4}, {"template": tiny.NO_SYSTEM}, {"seed": 1},
           {"family": "mistral"}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_another_backbone_is_refused_with_one_line_that_names_both(change, finished, tmp_path):
    other = tiny.save_model(tmp_path / "other", **change)
    with pytest.raises(stage1.UserError) as refusal:
        stage3.RewardModel.load(finished / "reward_head.safetensors", model=other)
    line = str(refusal.value)
    assert other in line and str(finished.parent / "model") in line and "\n" not in line


# ---------------------------------------------------------------- bad input

def refused(run, *words):
    """Stage 3 ends with one line that names every one of `words`, and writes nothing."""
    assert_one_line_error(command("03_train_head", "--run", run), *words)
    assert not (run / "reward_head.safetensors").exists()


def test_stage_3_before_stage_2_names_what_to_run(run):
    (run / "features.safetensors").unlink()
    refused(run, "features.safetensors", "02_select_features.py")


def test_features_that_are_cut_short_are_refused(run):
    path = run / "features.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(run, "features.safetensors", "02_select_features.py")


@pytest.mark.parametrize("split, name", [(TRAIN, "train split"), (DEV, "dev split")])
def test_an_empty_split_is_named(split, name, run):
    t, meta = stage1.load_stage(run / "features.safetensors")
    t["split"][t["split"] == split] = TEST
    stage1.save_stage(run / "features.safetensors", t, meta)
    refused(run, name)


def test_a_file_that_is_no_reward_head_is_refused(finished):
    with pytest.raises(stage1.UserError, match="not a reward head"):
        stage3.RewardModel.load(finished / "features.safetensors")


def test_a_reward_head_that_is_not_there_names_what_makes_it(finished):
    with pytest.raises(stage1.UserError, match=r"03_train_head\.py"):
        stage3.RewardModel.load(finished / "no_head.safetensors")
