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
from scipy.optimize import approx_fprime, minimize
from tiny import assert_one_line_error, command, succeed

from parts.chat import Text
from parts.files import read_meta

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
self_check = importlib.import_module("tools.self_check")
TEST = stage1.TEST


def draw(*shape, seed):
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def accuracy_of(head, chosen, rejected):
    """Share of pairs with r_chosen > r_rejected."""
    return (head(chosen) > head(rejected)).float().mean().item()


# ---------------------------------------------------------------- the losses

def test_bradley_terry_is_minus_log_sigmoid_of_each_pair():
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([2.0, -0.5])
    # Δ = 0: -log(1/2) = 0.693147 · Δ = 1: log(1 + e^-1) = 0.313262
    found = stage3.bradley_terry_loss(chosen, rejected)
    assert found.tolist() == pytest.approx([0.693147, 0.313262], abs=1e-6)


def test_bradley_terry_does_not_overflow():
    assert stage3.bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0])) == 1000


@pytest.mark.parametrize("margin, of_each", [(1.0, [0, 1.5, 0.5]), (3.0, [1, 3.5, 2.5])])
def test_the_margin_loss_is_zero_beyond_the_margin_and_linear_below(margin, of_each):
    chosen, rejected = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 0.5])
    assert (chosen - rejected).tolist() == [2, -0.5, 0.5]
    assert stage3.margin_loss(chosen, rejected, margin).tolist() == pytest.approx(of_each)


@pytest.mark.parametrize("margin", [1.0, 3.0])
def test_the_corner_of_the_margin_loss_is_a_parabola_over_a_tenth_of_the_margin(margin):
    short = margin * torch.tensor([-0.06, -0.05, 0.0, 0.05, 0.06])          # of the margin
    # at 0: 0.05² / (4 · 0.05) = 0.0125 · at 0.05: 0.1² / (4 · 0.05) = 0.05
    by_hand = [0, 0, 0.0125 * margin, 0.05 * margin, 0.06 * margin]
    found = stage3.margin_loss(margin - short, torch.zeros(5), margin)
    assert found.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_bce_takes_each_response_by_itself():
    # chosen at 0: log 2 = 0.693147 · rejected at 1: log(1 + e) = 1.313262
    by_hand = (0.693147 + 1.313262) / 2
    found = stage3.bce_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert found.tolist() == pytest.approx([by_hand, 0.693147], abs=1e-6)


def test_the_gradient_of_bradley_terry_is_that_of_its_formula():
    chosen, rejected = draw(6, seed=0).requires_grad_(), draw(6, seed=1).requires_grad_()
    stage3.bradley_terry_loss(chosen, rejected).sum().backward()
    differences = (chosen - rejected).tolist()
    by_hand = torch.tensor([-1 / (1 + math.exp(d)) for d in differences])       # -σ(-Δ)
    torch.testing.assert_close(chosen.grad, by_hand)
    torch.testing.assert_close(rejected.grad, -by_hand)


CURVES = {
    "bt": (stage3.bradley_terry_curve, 1.0),
    "margin 0.5": (stage3.margin_curve(0.5), 0.5),
    "margin 2": (stage3.margin_curve(2.0), 2.0),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_derivatives_of_a_curve_are_its_differences(name):
    curve, margin = CURVES[name]
    t = torch.linspace(margin - 3, margin + 3, 1000, dtype=torch.float64)       # beside the corners
    step = 1e-6
    value, slope, bend = curve(t)
    above, below = curve(t + step), curve(t - step)
    torch.testing.assert_close((above[0] - below[0]) / (2 * step), slope, atol=1e-6, rtol=0)
    torch.testing.assert_close((above[1] - below[1]) / (2 * step), bend, atol=1e-4, rtol=0)
    pair_loss = stage3.loss_named(name.split()[0], margin)
    torch.testing.assert_close(value, pair_loss(t, torch.zeros_like(t)))


# ---------------------------------------------------------------- the heads

def test_a_linear_head_is_a_weighted_sum_and_a_bias():
    head = stage3.head_from({"w1": torch.tensor([2.0, -1.0]), "b1": torch.tensor([0.5])})
    assert head(torch.tensor([[1.0, 3.0], [0.0, 1.0]])).tolist() == [2 - 3 + 0.5, -1 + 0.5]


def test_an_mlp_head_is_what_a_loop_over_its_hidden_units_gives():
    head = stage3.MLPHead(3, hidden=5).requires_grad_(False)
    head.b2.fill_(0.7)
    x = draw(4, 3, seed=1)
    for row in x:
        reward = float(head.b2)
        for unit in range(5):
            before = float(head.b1[unit]) + sum(float(head.w1[unit, i] * row[i]) for i in range(3))
            reward += max(0.0, before) * float(head.w2[unit])
        assert float(head(row[None])) == pytest.approx(reward, abs=1e-6)


def test_a_linear_head_that_has_seen_no_pair_gives_rewards_of_0():
    assert not stage3.LinearHead(4)(draw(5, 4, seed=0)).any()


def test_an_mlp_that_has_seen_no_pair_is_uniform_in_one_over_root_inputs():
    mlp = stage3.MLPHead(400, hidden=100)
    for parameter, inputs in ((mlp.w1, 400), (mlp.b1, 400), (mlp.w2, 100)):
        limit = inputs ** -0.5
        assert 0.9 * limit < parameter.abs().max() <= limit
        assert parameter.min() < 0 < parameter.max()


@pytest.mark.parametrize("head", [stage3.LinearHead(6), stage3.MLPHead(6, hidden=4)],
                         ids=["linear", "mlp"])
def test_a_head_read_from_its_tensors_gives_the_same_rewards(head):
    head.requires_grad_(False)
    for n, parameter in enumerate(head.parameters()):
        parameter.copy_(draw(*parameter.shape, seed=n))
    again = stage3.head_from(head.state_dict())
    x = draw(9, 6, seed=9)
    assert again.kind == head.kind
    assert torch.equal(again(x), head(x))
    assert not again(x).requires_grad


def test_the_mlp_of_the_paper_has_132097_parameters():
    head = stage3.MLPHead(256)
    assert stage3.trained_parameters(head) == 256 * 512 + 512 + 512 + 1 == 132_097


def test_a_linear_head_has_a_weight_a_direction_and_a_bias():
    assert stage3.trained_parameters(stage3.LinearHead(256)) == 257


# ---------------------------------------------------------------- a linear head

LOSSES = [("bt", 1.0), ("margin", 0.5), ("margin", 2.0), ("bce", 1.0)]
EVERY_LOSS = pytest.mark.parametrize("loss, margin", LOSSES)
PENALTIES = [1.0, 0.1, 0.001]


def naive_loss(name, margin, reward_chosen, reward_rejected):
    """The loss of each pair, in NumPy or in float64 torch, from its formula."""
    xp = torch if isinstance(reward_chosen, torch.Tensor) else np
    difference = reward_chosen - reward_rejected
    if name == "bt":
        return xp.log1p(xp.exp(-difference))
    if name == "margin":
        short, corner = margin - difference, margin / 20
        parabola = (short + corner) ** 2 / (4 * corner)
        return xp.where(short < -corner, 0 * short, xp.where(short > corner, short, parabola))
    of_chosen, of_rejected = xp.log1p(xp.exp(-reward_chosen)), xp.log1p(xp.exp(reward_rejected))
    return (of_chosen + of_rejected) / 2


def overlapping_pairs(n=80, width=3):
    """Pairs that no line divides → chosen, rejected [n, width].

    What both sides share cancels in a difference, and is noise to a loss of single responses.
    """
    shared = draw(n, width, seed=4)
    shared[:, :-1] = 0
    chosen = 4 * shared + draw(n, width, seed=5)
    chosen[:, 0] += 0.5
    chosen[:, -1] += 1
    return chosen, 4 * shared + draw(n, width, seed=6)


def objective_of(loss, margin, l2, chosen, rejected):
    """→ function of (w, b) in one float64 tensor: mean loss + l2/2 · ‖w‖²."""
    chosen, rejected = chosen.double(), rejected.double()

    def objective(numbers):
        w, b = numbers[:-1], numbers[-1]
        of_pairs = naive_loss(loss, margin, chosen @ w + b, rejected @ w + b)
        return of_pairs.mean() + l2 / 2 * (w * w).sum()
    return objective


def gradient_at(objective, numbers):
    """The gradient by autograd."""
    numbers = torch.as_tensor(numbers, dtype=torch.float64).requires_grad_()
    [gradient] = torch.autograd.grad(objective(numbers), numbers)
    return gradient


def solution(loss, margin, l2, chosen, rejected):
    """(w, b) that scipy finds; for a loss of differences b stays 0."""
    objective = objective_of(loss, margin, l2, chosen, rejected)
    found = minimize(lambda x: float(objective(torch.from_numpy(x))),
                     np.zeros(chosen.shape[1] + 1),
                     jac=lambda x: gradient_at(objective, x).numpy(), options={"gtol": 1e-9})
    return found.x


@pytest.mark.parametrize("l2", PENALTIES)
@EVERY_LOSS
def test_a_linear_head_is_the_solution_that_scipy_finds(loss, margin, l2):
    pairs = overlapping_pairs()
    head = stage3.fit_linear(*pairs, loss, l2, margin)
    *weights, bias = solution(loss, margin, l2, *pairs)
    assert head.w1.tolist() == pytest.approx(weights, abs=2e-5)
    if loss == "bce":
        assert float(head.b1) == pytest.approx(bias, abs=2e-5)


def test_the_solutions_of_losses_and_penalties_are_told_apart():
    pairs = overlapping_pairs()
    found = [solution(loss, margin, l2, *pairs) for loss, margin in LOSSES for l2 in PENALTIES]
    for n, one in enumerate(found):
        for other in found[:n]:
            assert abs(one - other).max() > 1e-3


@pytest.mark.parametrize("l2", PENALTIES)
@EVERY_LOSS
def test_the_gradient_is_0_where_a_linear_head_ends(loss, margin, l2):
    pairs = overlapping_pairs(300, 12)
    head = stage3.fit_linear(*pairs, loss, l2, margin)
    objective = objective_of(loss, margin, l2, *pairs)
    assert gradient_at(objective, torch.cat([head.w1, head.b1])).abs().max() < 1e-5


@pytest.mark.parametrize("loss, margin", LOSSES)
def test_newton_takes_as_many_steps_as_128_latents_a_side_need(loss, margin):
    pairs = overlapping_pairs(500, 256)
    for l2 in stage3.PENALTIES:
        head = stage3.fit_linear(*pairs, loss, l2, margin)
        objective = objective_of(loss, margin, l2, *pairs)
        gradient = gradient_at(objective, torch.cat([head.w1, head.b1]))
        assert gradient.abs().max() < 1e-5, l2


@pytest.mark.parametrize("loss, margin", LOSSES[:3])
def test_the_mean_reward_of_the_pairs_is_0(loss, margin):
    chosen, rejected = overlapping_pairs()
    head = stage3.fit_linear(chosen + 3, rejected + 3, loss, 0.1, margin)
    assert abs(head(torch.cat([chosen, rejected]) + 3).mean()) < 1e-5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [1, 30])
@pytest.mark.parametrize("name", CURVES)
def test_newton_ends_at_the_same_point_wherever_it_starts(name, size, seed):
    curve, _ = CURVES[name]
    chosen, rejected = overlapping_pairs(200, 8)
    start = size * draw(8, seed=seed)
    from_zero = stage3.newton(chosen - rejected, curve, 0.01)
    from_there = stage3.newton(chosen - rejected, curve, 0.01, start)
    torch.testing.assert_close(from_there, from_zero, atol=1e-6, rtol=0)


def test_a_penalty_of_each_column_is_that_of_its_weight():
    chosen, rejected = overlapping_pairs()
    rows = chosen - rejected
    l2 = torch.tensor([1e-3, 1e-1, 1e6])
    found = stage3.newton(rows, stage3.bradley_terry_curve, l2)
    without = stage3.newton(rows[:, :2], stage3.bradley_terry_curve, l2[:2])
    assert abs(found[2]) < 1e-5
    torch.testing.assert_close(found[:2], without, atol=1e-5, rtol=0)


TYPES = {
    "float16": torch.Tensor.half,
    "float32": torch.Tensor.float,
    "float64": torch.Tensor.double,
    "NumPy float16": lambda x: x.half().numpy(),
    "NumPy float32": lambda x: x.float().numpy(),
    "NumPy float64": lambda x: x.double().numpy(),
}


@pytest.mark.parametrize("kind", TYPES)
@EVERY_LOSS
def test_every_type_of_number_gives_the_same_head(loss, margin, kind):
    pairs = [side.half().double() for side in overlapping_pairs()]      # as float16 can hold it
    expected = stage3.fit_linear(*pairs, loss, 0.1, margin)
    head = stage3.fit_linear(*map(TYPES[kind], pairs), loss, 0.1, margin)
    assert head.w1.dtype == head.b1.dtype == torch.float32
    torch.testing.assert_close(head.w1, expected.w1, atol=1e-5, rtol=0)
    torch.testing.assert_close(head.b1, expected.b1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n, width", [(80, 3), (20, 60)])
@EVERY_LOSS
def test_each_head_of_a_path_is_that_of_its_penalty_alone(loss, margin, n, width):
    pairs = overlapping_pairs(n, width)         # 60 columns, 20 pairs: solved in their span
    found = dict(stage3.penalty_path(*pairs, PENALTIES, loss, margin))
    assert list(found) == PENALTIES
    for l2, head in found.items():
        alone = stage3.fit_linear(*pairs, loss, l2, margin)
        torch.testing.assert_close(head.w1, alone.w1, atol=1e-5, rtol=0)
        torch.testing.assert_close(head.b1, alone.b1, atol=1e-5, rtol=0)


def test_the_basis_of_rows_is_orthonormal_and_spans_them():
    rows = draw(5, 9, seed=0).double()
    rows[4] = rows[0] - 2 * rows[1]                                     # one depends on others
    basis = stage3.row_basis(rows)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(rows @ basis @ basis.T, rows)


def test_pairs_that_a_line_divides_have_a_finite_head():
    head = stage3.fit_linear(draw(30, 40, seed=0) + 5, draw(30, 40, seed=1), l2=1e-4)
    assert head.w1.isfinite().all() and head.w1.abs().max() < 100


def test_swapping_chosen_and_rejected_negates_the_weights():
    chosen, rejected = overlapping_pairs()
    head, swapped = stage3.fit_linear(chosen, rejected), stage3.fit_linear(rejected, chosen)
    torch.testing.assert_close(swapped.w1, -head.w1)
    right = accuracy_of(head, chosen, rejected)
    assert 0.5 < right < 1
    assert accuracy_of(swapped, chosen, rejected) == pytest.approx(1 - right)


def test_threads_and_processes_do_not_change_a_linear_head():
    code = """
import importlib, json, torch
stage3 = importlib.import_module("03_train_head")
g = torch.Generator().manual_seed(0)
chosen, rejected = (torch.randn(4000, 64, generator=g) for _ in range(2))
head = stage3.fit_linear(chosen + 0.1, rejected, l2=0.001)
print(json.dumps([torch.get_num_threads(), *head.w1.tolist(), *head.b1.tolist()]))
"""
    found = []
    for threads in ("1", "2", "1"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(tiny.ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=True,
                              capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    assert [int(threads) for threads, *_ in found] == [1, 2, 1]
    assert found[1][1:] == pytest.approx(found[0][1:], abs=1e-5)
    assert found[2][1:] == pytest.approx(found[0][1:], abs=1e-5)


# ---------------------------------------------------------------- K and the penalty

def test_the_ks_that_are_tried_double_up_to_all():
    assert stage3.k_values(8) == [1, 2, 4, 8]
    assert stage3.k_values(6) == [1, 2, 4, 6]
    assert stage3.k_values(1) == [1]


def test_k_directions_a_side_are_the_first_of_each_side():
    assert stage3.columns_of(2, 5).tolist() == [0, 1, 5, 6]


def losses_by_hand(of_k_1, of_k_2):
    """Losses of four pairs; that of K = 4 is 0.5 everywhere, and those of others are above it."""
    return {
        (1, 0.1): torch.tensor([0.9, 0.9, 0.9, 0.9]),           # K = 1 has a better L2
        (1, 0.01): 0.5 + torch.tensor(of_k_1),
        (2, 0.1): 0.5 + torch.tensor(of_k_2),
        (4, 0.1): torch.full((4,), 0.5),
    }


IN_TWO, IN_FOUR = [7, 7, 3, 3], [7, 5, 3, 9]
# summed by group 0.2 and -0.02: mean 0.045, SE = √(2 · 0.0242) / 4 = 0.055; each pair by itself:
# variance 4 · 0.055² / 3, SE = √(4 · 0.00403) / 4 = 0.032
NEAR = [0.1, 0.1, -0.01, -0.01]
# summed by group 0.2 and 0.02: mean 0.055, SE = √(2 · 0.0162) / 4 = 0.045
FAR = [0.1, 0.1, 0.01, 0.01]


@pytest.mark.parametrize("of_k_1, of_k_2, groups, taken", [
    (NEAR, NEAR, IN_TWO, (1, 0.01)),
    (NEAR, NEAR, IN_FOUR, (4, 0.1)),
    (FAR, NEAR, IN_TWO, (2, 0.1)),
    (FAR, FAR, IN_TWO, (4, 0.1)),
])
def test_auto_takes_the_smallest_k_within_one_standard_error(of_k_1, of_k_2, groups, taken):
    assert stage3.choose(losses_by_hand(of_k_1, of_k_2), np.array(groups)) == taken


def test_best_takes_the_least_mean_loss():
    losses = losses_by_hand(NEAR, NEAR)
    assert stage3.choose(losses, np.array(IN_TWO), "best") == (4, 0.1)
    losses[2, 0.01] = torch.tensor([0.1, 0.1, 0.9, 0.8])
    assert stage3.choose(losses, np.array(IN_TWO), "best") == (2, 0.01)


def noise(n=120, latents=400, k=32):
    """Features of n pairs whose latents tell nothing → what search() reads of stage 2."""
    fires = (draw(2, n, latents, seed=3) > 0).float()
    fold = torch.arange(n) % stage3.FOLDS
    selected = []
    for left_out in range(stage3.FOLDS):
        used = fires[:, fold != left_out].mean(1)
        selected.append(stage2.select_latents(*used, k))
    union = torch.unique(torch.stack(selected))
    return {
        "fold": fold, "group": torch.arange(n), "search_pair": torch.arange(n),
        "search_latents": torch.stack(selected), "search_union": union,
        "search_chosen": fires[0][:, union], "search_rejected": fires[1][:, union],
    }, fires


def selected_on_all_pairs(t, fires, k=32):
    """The same with the latents that all pairs choose, in every fold."""
    latents = stage2.select_latents(*fires.mean(1), k)
    union = torch.unique(latents)
    return t | {
        "search_latents": latents.repeat(stage3.FOLDS, 1), "search_union": union,
        "search_chosen": fires[0][:, union], "search_rejected": fires[1][:, union],
    }


SETTINGS = {"loss": "bt", "margin": 1.0}


def test_the_search_sees_that_latents_of_noise_tell_nothing():
    t, _ = noise()
    found = stage3.search(t, [1, 32], [0.1], SETTINGS, "best")
    assert found.losses[32, 0.1] > math.log(2)
    assert (found.differences > 0).float().mean() < 0.6


def test_latents_that_all_pairs_choose_would_flatter_a_large_k():
    found = stage3.search(selected_on_all_pairs(*noise()), [1, 32], [0.1], SETTINGS, "best")
    assert found.losses[32, 0.1] < math.log(2) - 0.1
    assert found.k == 32
    assert (found.differences > 0).float().mean() > 0.7


def scores_without(t, number, k):
    """Naive: the search scores with a fold left out → chosen, rejected [m, 2k], held [m]."""
    union, latents = t["search_union"].tolist(), t["search_latents"][number].tolist()
    half = len(latents) // 2
    places = [union.index(latent) for latent in latents[:k] + latents[half:half + k]]
    held = np.array([int(t["fold"][pair]) == number for pair in t["search_pair"]])
    sides = [t[f"search_{side}"].double().numpy()[:, places] for side in ("chosen", "rejected")]
    of_others = np.concatenate([side[~held] for side in sides])
    chosen, rejected = [(side - of_others.mean(0)) / of_others.std(0) for side in sides]
    return torch.tensor(chosen).float(), torch.tensor(rejected).float(), torch.tensor(held)


@EVERY_LOSS
def test_the_losses_of_a_search_are_those_of_a_loop_over_the_folds(loss, margin):
    t, _ = noise(60, 50, 4)
    settings = {"loss": loss, "margin": margin}
    found = stage3.search(t, [1, 4], [1.0, 0.01], settings, "best")
    assert sorted(found.losses) == [(1, 0.01), (1, 1.0), (4, 0.01), (4, 1.0)]
    for (k, l2), mean in found.losses.items():
        losses = []
        for number in range(5):
            chosen, rejected, held = scores_without(t, number, k)
            head = stage3.fit_linear(chosen[~held], rejected[~held], loss, l2, margin)
            of_pairs = naive_loss(loss, margin, head(chosen[held]).double(),
                                  head(rejected[held]).double())
            losses += of_pairs.tolist()
        assert mean == pytest.approx(sum(losses) / 60, abs=1e-5)


# ---------------------------------------------------------------- an MLP

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


@EVERY_LOSS
def test_an_mlp_takes_the_steps_of_adam_down_its_loss(loss, margin):
    chosen, rejected = overlapping_pairs()
    head, steps, _ = stage3.fit_mlp(chosen, rejected, loss, 0.1, margin, hidden=2, lr=0.02, steps=8)
    assert steps == 8
    sides = chosen.double().numpy(), rejected.double().numpy()

    def objective(numbers):
        t = unpacked(numbers)
        penalty = 0.1 / 2 * ((t["w1"]**2).sum() + (t["w2"]**2).sum())
        rewards = [mlp_in_numpy(numbers, side) for side in sides]
        return naive_loss(loss, margin, *rewards).mean() + penalty
    start = stage3.MLPHead(3, hidden=2).state_dict()
    numbers = torch.cat([start[name].flatten() for name in SMALL_MLP]).double().numpy()
    wanted = unpacked(adam_by_finite_differences(objective, numbers, 8, 0.02))
    for name, tensor in head.state_dict().items():
        np.testing.assert_allclose(tensor, wanted[name], atol=2e-3, err_msg=name)


def noisy_scores(n=60, m=10, told=1.5, seed=2):
    """Few pairs, many columns, one of which tells something: a head overfits.

    → chosen, rejected [n, m].
    """
    chosen, rejected = draw(n, m, seed=seed), draw(n, m, seed=seed + 1)
    chosen[:, 0] += told
    return chosen, rejected


HELD = noisy_scores(seed=8)
SMALL = {"loss": "bt", "hidden": 8, "lr": 0.02, "l2": 0.0}


def held_losses(epochs):
    """The loss on HELD after 1, 2 … epochs of a step each, by heads trained for so many steps."""
    losses = []
    for steps in range(1, epochs + 1):
        head, _, _ = stage3.fit_mlp(*noisy_scores(), **SMALL, steps=steps)
        losses.append(float(naive_loss("bt", None, *(head(side).double() for side in HELD)).mean()))
    return losses


def test_an_mlp_is_that_of_the_epoch_with_the_least_loss_on_held_pairs():
    losses = held_losses(50)
    best = losses.index(min(losses)) + 1
    assert 3 < best < 40 and losses[-1] > min(losses) + 0.01        # it overfits after the best

    head, steps, loss = stage3.fit_mlp(*noisy_scores(), **SMALL, held=HELD, epochs=50, patience=50)
    assert steps == best
    assert loss == pytest.approx(min(losses), abs=1e-5)
    expected, _, _ = stage3.fit_mlp(*noisy_scores(), **SMALL, steps=best)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), name


def calls_of_bradley_terry(monkeypatch):
    """→ a list that gets (number of pairs, is this a training step) of each call."""
    calls = []
    real = stage3.bradley_terry_loss

    def noted(chosen, rejected):
        calls.append((len(chosen), torch.is_grad_enabled()))
        return real(chosen, rejected)
    monkeypatch.setattr(stage3, "bradley_terry_loss", noted)
    return calls


@pytest.mark.parametrize("epochs", [5, 99])
def test_an_mlp_stops_after_patience_epochs_or_the_most_there_may_be(epochs, monkeypatch):
    losses = held_losses(50)
    best = losses.index(min(losses)) + 1
    calls = calls_of_bradley_terry(monkeypatch)
    stage3.fit_mlp(*noisy_scores(), **SMALL, held=HELD, epochs=epochs, patience=7)
    looks_at_held = sum(not trains for _, trains in calls)
    assert abs(looks_at_held - min(epochs, best + 7)) <= 1


def test_where_pairs_are_many_an_epoch_is_a_part_of_them(monkeypatch):
    monkeypatch.setattr(stage3, "EPOCH_PAIRS", 20)
    calls = calls_of_bradley_terry(monkeypatch)
    stage3.fit_mlp(*noisy_scores(400), **SMALL, batch=8, steps=6)
    assert [n for n, trains in calls if trains] == [8, 8, 4, 8, 8, 4]


def test_where_pairs_are_many_every_epoch_draws_other_ones(monkeypatch):
    monkeypatch.setattr(stage3, "EPOCH_PAIRS", 20)
    head, _, _ = stage3.fit_mlp(*noisy_scores(400, told=2), **SMALL, batch=8, steps=200)
    assert accuracy_of(head, *noisy_scores(400, told=2, seed=20)) > 0.8


@pytest.mark.parametrize("loss", ["bt", "margin", "bce"])
def test_every_head_learns_with_every_loss(loss):
    train, test = noisy_scores(200, told=2), noisy_scores(200, told=2, seed=20)
    mlp, _, _ = stage3.fit_mlp(*train, loss, hidden=16, steps=60)
    for head in (mlp, stage3.fit_linear(*train, loss)):
        assert accuracy_of(head, *test) > 0.65


# ---------------------------------------------------------------- the temperature

def test_the_temperature_has_the_least_smoothed_loss():
    difference = 4 * draw(300, seed=3) + 3
    other = 1 / 302                             # each pair counts this much the other way

    def loss(log_t):
        scaled = difference.double().numpy() / math.exp(log_t[0])
        right, wrong = np.log1p(np.exp(-scaled)), np.log1p(np.exp(scaled))
        return ((1 - other) * right + other * wrong).mean()
    best = minimize(loss, [0.0]).x[0]
    assert stage3.fit_temperature(difference) == pytest.approx(math.exp(best), rel=0.03)


def test_the_temperature_of_three_pairs_that_are_all_right_leaves_a_fifth_of_doubt():
    # of d, d, d the smoothed loss is least where σ(d / T) = 1 - 1/5, so T = d / log 4
    found = stage3.fit_temperature(torch.full((3,), 2.0))
    assert found == pytest.approx(2 / math.log(4), rel=0.03)


@pytest.mark.parametrize("count", [0, 5])
def test_the_temperature_of_rewards_that_are_all_the_same_is_1(count):
    assert stage3.fit_temperature(torch.zeros(count)) == 1


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


def features(run):
    """The tensors of stage 2."""
    t, _ = stage1.load_stage(run / "features.safetensors")
    return t


def change_test_scores(run, factor):
    """Multiply the scores of the test pairs."""
    t, meta = stage1.load_stage(run / "features.safetensors")
    for side in ("chosen", "rejected"):
        t[side][t["split"] == TEST] *= factor
    stage1.save_stage(run / "features.safetensors", t, meta)


def standardised_scores(run):
    """→ chosen, rejected [n, 2K] with mean 0 and std 1 on train and dev, and which these are."""
    t = features(run)
    chosen, rejected = ((t[side] - t["mean"]) / t["std"] for side in ("chosen", "rejected"))
    return chosen, rejected, t["split"] != TEST


@EVERY_LOSS
def test_the_stage_solves_for_the_loss_and_margin_of_its_flags(loss, margin, run):
    flags = "--k", 8, "--l2", 0.03, "--loss", loss, "--margin", margin
    tensors, meta = train(run, *flags)
    chosen, rejected, used = standardised_scores(run)
    head = stage3.fit_linear(chosen[used], rejected[used], loss, 0.03, margin)
    assert meta["l2"] == 0.03
    torch.testing.assert_close(tensors["w1"], head.w1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["auto", "best"])
def test_k_and_l2_are_those_of_the_search(rule, run):
    penalties = stage3.PENALTIES
    found = stage3.search(features(run), [1, 2, 4, 8], penalties, SETTINGS, rule)
    _, meta = train(run, "--k", rule)
    assert (meta["k"], meta["l2"]) == (found.k, found.l2)
    assert meta["search"] == {f"{k} {l2:g}": loss for (k, l2), loss in found.losses.items()}


def test_temperature_and_accuracy_are_those_of_pairs_that_no_head_had_seen(run):
    found = stage3.search(features(run), [4], [0.1], SETTINGS)
    tensors, meta = train(run, "--k", 4, "--l2", 0.1)
    assert float(tensors["temperature"]) == pytest.approx(
        stage3.fit_temperature(found.differences))
    right = [difference > 0 for difference in found.differences.tolist()]
    assert meta["accuracy_out_of_fold"] == pytest.approx(sum(right) / len(right))


def test_an_mlp_stops_on_the_held_fifth_and_takes_as_many_steps_on_all(run):
    tensors, meta = train(run, "--k", 3, "--head", "mlp", "--hidden", 5, "--lr", 0.01)
    settings = {"loss": "bt", "hidden": 5, "lr": 0.01, "l2": stage3.MLP_L2}
    chosen, rejected, held = scores_without(features(run), 0, 3)
    fifth = chosen[held], rejected[held]
    found = [stage3.fit_mlp(chosen[~held], rejected[~held], held=fifth, seed=seed, epochs=60,
                            **settings) for seed in range(2)]
    losses = [loss for _, _, loss in found]
    kept = losses.index(min(losses))
    assert (meta["seed_kept"], meta["steps"]) == (kept, found[kept][1])

    chosen, rejected, used = standardised_scores(run)
    columns = [0, 1, 2, 8, 9, 10]
    head, _, _ = stage3.fit_mlp(chosen[used][:, columns], rejected[used][:, columns], seed=kept,
                                steps=meta["steps"], **settings)
    for name in ("w1", "b1", "w2"):             # b2 is what makes the mean reward 0
        torch.testing.assert_close(tensors[name], head.state_dict()[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_other_test_scores_change_only_the_parents_of_the_head_file(kind, run):
    flags = "--head", kind, "--hidden", 5
    before, meta = train(run, *flags)
    change_test_scores(run, -9)
    after, other = train(run, *flags)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert meta.pop("parent") != other.pop("parent")
    assert meta == other


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("loss", ["bt", "bce"])
def test_rewards_are_0_on_average_over_the_train_and_dev_responses(loss, kind, run):
    tensors, _ = train(run, "--k", 8, "--head", kind, "--hidden", 5, "--loss", loss)
    chosen, rejected, used = standardised_scores(run)
    assert abs(stage3.head_from(tensors)(torch.cat([chosen[used], rejected[used]])).mean()) < 1e-5


def test_the_range_is_what_one_in_a_thousand_training_responses_exceeds():
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    limit = stage3.quantile(values, stage3.RANGE)
    assert stage3.RANGE == 0.999
    assert 4 <= int((values > limit).sum()) <= 5


def test_the_range_is_that_of_the_largest_score_of_each_training_response(run):
    tensors, _ = train(run, "--k", 3)
    chosen, rejected, used = standardised_scores(run)
    of_train = torch.cat([chosen[used], rejected[used]])[:, [0, 1, 2, 8, 9, 10]]
    assert len(of_train) < 1000                 # so that it is the largest of all
    assert float(tensors["range"]) == pytest.approx(float(of_train.abs().max()), abs=1e-4)


def test_a_named_head_lies_beside_that_of_the_run(run):
    train(run, "--k", 3)
    before = (run / "reward_head.safetensors").read_bytes()
    succeed("03_train_head", "--run", run, "--name", "other", "--k", 5)
    assert (run / "reward_head.safetensors").read_bytes() == before
    assert read_meta(run / "other/reward_head.safetensors")["k"] == 5


@pytest.fixture(scope="module")
def little(finished, tmp_path_factory):
    """A run of nine pairs up to stage 2: too few prompts for a search."""
    folder = tmp_path_factory.mktemp("little")
    pairs = tiny.save_pairs(folder / "pairs.jsonl", 9)
    run, model = folder / "run", finished.parent / "model"
    succeed("01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", run,
            "--split", "1,0,0")
    succeed("02_select_features", "--run", run, "--sae", finished.parent / "sae.safetensors",
            "--k", 8)
    return run


@pytest.mark.parametrize("flags, k, l2", [
    ([], 4, 0.1), (["--k", 2], 2, 0.1), (["--l2", 0.5], 4, 0.5)])
def test_with_fewer_than_ten_prompts_nothing_is_searched_and_said_so(flags, k, l2, little):
    out = succeed("03_train_head", "--run", little, *flags)
    meta = read_meta(little / "reward_head.safetensors")
    assert (meta["k"], meta["l2"], meta["search"]) == (k, l2, {})
    assert "note: only 9 prompts to train on, fewer than 10: no search" in out


def test_without_a_search_there_is_no_accuracy_out_of_fold(little):
    out = succeed("03_train_head", "--run", little)
    assert "nan" not in out
    with safe_open(little / "reward_head.safetensors", "pt") as file:
        assert "NaN" not in file.metadata()["sparserm"]


def test_an_mlp_of_fewer_than_ten_prompts_is_trained_or_refused_in_one_line(little):
    result = command("03_train_head", "--run", little, "--head", "mlp", "--hidden", 4)
    code, _, err = result
    if code:
        assert_one_line_error(result)
    assert "unexpected" not in err


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
        "w1": (5, 6), "b1": (5,), "w2": (5,), "b2": (1,), "temperature": (1,), "range": (1,),
    }
    needed = {"model", "layer", "token", "template", "max_length", "sae", "settings", "backbone",
              "normalise", "norm_eps", "l2", "search", "accuracy_out_of_fold"}
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


def test_the_self_check_passes_on_a_finished_run(finished):
    code, out, err = check(finished)
    assert code == 0, err
    lines = out.splitlines()
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
    change_test_scores(run, 2)
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
        return Text([bos, bos, *text.ids], text.first + 2, text.stop + 2, text.eot + 2)
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


def test_the_scores_of_the_train_and_dev_responses_are_0_on_average(reward):
    _, _, used = standardised_scores(reward.run)
    rows = [row for row, of in zip(pairs_of(reward.run), used.tolist()) if of]
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
             "std": draw(4, seed=5).abs() + 0.5, "temperature": torch.ones(1),
             "range": torch.ones(1)}
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
    prompts = [row["prompt"] for row in rows]
    responses = [rows[0]["chosen"], rows[1]["chosen"], "."]
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


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
UNSCORABLE = [      # prompt, completion
    ("a", ""),
    ("a", None),
    ("a", []),
    ("a", "yes \ud83d"),
    ("a \udfff", "yes"),
    ("a", [CALL]),
    ("a", [{"role": "assistant", "content": "yes"}, {"role": "tool", "content": "wet"}]),
    ([{"role": "user", "content": [{"type": "image"}]}], "yes"),
    (5, "yes"),
]


@pytest.mark.parametrize("prompt, completion", UNSCORABLE, ids=[str(n) for n in range(9)])
def test_as_a_trl_reward_function_it_gives_none_for_what_cannot_be_scored(
        prompt, completion, reward):
    [none, number] = reward([prompt, "a"], [completion, "yes"])
    assert none is None
    assert number == pytest.approx(reward.score(["a"], ["yes"])[0], abs=1e-3)


def test_as_a_trl_reward_function_it_scores_the_last_turn_behind_those_of_the_tools(reward):
    turns = [{"role": "assistant", "content": "One moment."}, {"role": "tool", "content": "wet"}]
    prompt = [{"role": "user", "content": "a"}]
    wanted = reward.score([[*prompt, *turns]], ["yes"])
    completion = [*turns, {"role": "assistant", "content": "yes"}]
    for given in ("a", prompt):
        assert reward([given], [completion]) == pytest.approx(wanted, abs=1e-3)
    assert wanted != pytest.approx(reward.score(["a"], ["yes"]), abs=1e-4)


TWO_PARTS = [{"type": "text", "text": "Is it"}, {"type": "text", "text": "so?"}]


@pytest.mark.parametrize("prompt", [
    [{"role": "user", "content": TWO_PARTS}],
    [{"from": "human", "value": "Is it\nso?"}],
    {"role": "prompter", "content": "Is it\nso?"},
    {"role": ["user"], "content": ["Is it\nso?"]},
    str([{"role": "user", "content": "Is it\nso?"}]),
])
def test_a_prompt_is_scored_alike_however_its_messages_are_written(prompt, reward):
    wanted = reward.score(["Is it\nso?"], ["yes"])
    assert reward.score([prompt], ["yes"]) == pytest.approx(wanted, abs=1e-4)


def test_a_dialogue_in_one_text_is_scored_as_it_is_read_from_a_file(reward):
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    turns = [{"role": role, "content": said}
             for role, said in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    wanted = reward.score([turns], ["yes"])
    assert reward.score([text], ["yes"]) == pytest.approx(wanted, abs=1e-4)
    assert reward([text], ["yes"]) == pytest.approx(wanted, abs=1e-4)


def test_a_text_is_scored_as_it_is_also_if_it_looks_like_messages(reward):
    text = '[{"role": "assistant", "content": "yes"}]'
    wanted = reward.score(["a"], [text])
    assert reward(["a"], [text]) == pytest.approx(wanted, abs=1e-4)
    assert wanted != pytest.approx(reward.score(["a"], ["yes"]), abs=1e-4)


def test_an_empty_response_has_no_score(reward):
    with pytest.raises(stage1.UserError, match="an empty response"):
        reward.score(["a"], [" \n"])


def test_of_several_texts_the_one_that_cannot_be_read_is_numbered(finished):
    reward = stage3.RewardModel.load(finished / "reward_head.safetensors")
    with pytest.raises(stage1.UserError, match="an empty response · number 1 of 3 texts"):
        reward.score(["One", "Is it?", "Two"], ["two", " ", "ten"])


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


def test_score_with_a_check_says_which_texts_lie_outside(reward, monkeypatch):
    rows = pairs_of(reward.run)[:12]
    texts = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    largest = reward.scores_of(reward.hidden(*texts)).abs().amax(1)
    monkeypatch.setattr(reward, "range", float(largest.mean()))
    rewards, outside = reward.score(*texts, check=True)
    assert rewards == pytest.approx(reward.score(*texts), abs=1e-4)
    assert outside == (largest > largest.mean()).tolist()
    assert 0 < sum(outside) < 12
    assert reward.explain(texts[0][0], texts[1][0])["outside"] == outside[0]


def test_what_is_far_from_the_training_responses_lies_outside(reward):
    _, _, used = standardised_scores(reward.run)
    row = pairs_of(reward.run)[int(used.nonzero()[0])]
    z = reward.hidden([row["prompt"]], [row["chosen"]])
    assert reward.outside(torch.cat([z, 100 * z])).tolist() == [False, True]


def test_score_of_nothing_with_a_check_is_two_empty_lists(reward):
    assert reward.score([], [], check=True) == ([], [])


def test_score_each_gives_none_for_what_is_too_long_and_for_its_check(reward):
    rewards, outside, reasons = reward.score_each(["a", "b"], ["yes", too_long(reward)])
    assert (rewards[:1], outside[:1]) == reward.score(["a"], ["yes"], check=True)
    assert (rewards[1], outside[1]) == (None, None)
    assert reasons == [None, "response longer than max length"]


def test_vectors_brought_to_one_length_are_scored_as_they_were_stored(run):
    sae = read_meta(run / "features.safetensors")["sae"]
    succeed("02_select_features", "--run", run, "--sae", sae, "--k", 8, "--normalise", "rms")
    succeed("03_train_head", "--run", run, "--k", 8)
    reward = stage3.RewardModel.load(run / "reward_head.safetensors")
    chosen, _, _ = standardised_scores(run)
    rows = pairs_of(run)
    stored = reward.head(chosen)
    scored = torch.tensor(reward.score([row["prompt"] for row in rows],
                                       [row["chosen"] for row in rows]))
    assert (scored - stored).abs().max() < 1e-3 * stored.std()


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


def test_a_run_whose_pairs_are_all_of_test_is_refused(run):
    t, meta = stage1.load_stage(run / "features.safetensors")
    t["fold"].fill_(-1)
    stage1.save_stage(run / "features.safetensors", t, meta)
    refused(run, "all pairs are in the test split")


def test_more_directions_than_were_selected_are_refused(run):
    assert_one_line_error(command("03_train_head", "--run", run, "--k", 9), "--k 9", "8 latents")


@pytest.mark.parametrize("name", ["range", "directions", "w1"])
def test_a_reward_head_without_one_of_its_tensors_is_refused(name, run):
    tensors, meta = train(run, "--k", 3)
    del tensors[name]
    stage1.save_stage(run / "reward_head.safetensors", tensors, meta)
    with pytest.raises(stage1.UserError, match=f"not a reward head: {name} missing"):
        stage3.RewardModel.load(run / "reward_head.safetensors")


def test_a_file_that_is_no_reward_head_is_refused(finished):
    with pytest.raises(stage1.UserError, match="not a reward head"):
        stage3.RewardModel.load(finished / "features.safetensors")


def test_a_reward_head_that_is_not_there_names_what_makes_it(finished):
    with pytest.raises(stage1.UserError, match=r"03_train_head\.py"):
        stage3.RewardModel.load(finished / "no_head.safetensors")
