"""Is what stands in mine.py right? Red as shipped, green when the three functions are written."""

import math

import mine
import pytest
import torch

# ---------------------------------------------------------------- the TopK encoder

# two inputs, three latents: latent 0 looks at the first input, 1 at the second, 2 at their sum
W_ENC = torch.tensor([[1.0, 0.0, 1.0],
                      [0.0, 1.0, 1.0]])
B_ENC = torch.tensor([0.0, 0.5, -1.0])
B_DEC = torch.tensor([1.0, 1.0])


def encode(z, k):
    """mine.topk_encoder with the weights above → nested list."""
    return mine.topk_encoder(torch.tensor(z), W_ENC, B_ENC, B_DEC, k).tolist()


def test_the_largest_latent_is_kept():
    # z - b_dec = (2, 3); before the choice: 2, 3 + .5, 2 + 3 - 1
    assert encode([[3.0, 4.0]], k=1) == [[0.0, 0.0, 4.0]]


def test_the_two_largest_latents_are_kept():
    assert encode([[3.0, 4.0]], k=2) == [[0.0, 3.5, 4.0]]


def test_a_latent_among_the_largest_that_is_negative_is_0():
    # z - b_dec = (1, -4): 1, -3.5, -4
    assert encode([[2.0, -3.0]], k=3) == [[1.0, 0.0, 0.0]]


def test_every_row_has_a_choice_of_its_own():
    assert encode([[3.0, 4.0], [2.0, -3.0]], k=1) == [[0.0, 0.0, 4.0], [1.0, 0.0, 0.0]]


def test_what_goes_in_is_left_as_it_was():
    z = torch.tensor([[3.0, 4.0]])
    mine.topk_encoder(z, W_ENC, B_ENC, B_DEC, 1)
    assert z.tolist() == [[3.0, 4.0]]
    assert B_ENC.tolist() == [0.0, 0.5, -1.0]


# ---------------------------------------------------------------- which latents

def select(chosen, rejected, k):
    """mine.select_latents on lists → list."""
    found = mine.select_latents(torch.tensor(chosen), torch.tensor(rejected), k)
    assert found.dtype == torch.int64
    return found.tolist()


def test_the_chosen_side_comes_first_each_by_falling_difference():
    # differences: +.1, -.2, +.3, -.4
    assert select([0.5, 0.1, 0.8, 0.1], [0.4, 0.3, 0.5, 0.5], k=2) == [2, 0, 3, 1]


def test_k_of_each_side_are_kept():
    assert select([0.5, 0.1, 0.8, 0.1], [0.4, 0.3, 0.5, 0.5], k=1) == [2, 3]


def test_both_sides_get_as_many_as_the_poorer_one_has():
    # differences: +.1, +.2, +.3, -.4: one latent only is of the rejected side
    assert select([0.5, 0.5, 0.8, 0.1], [0.4, 0.3, 0.5, 0.5], k=3) == [2, 3]


def test_a_latent_that_fires_as_often_on_both_sides_counts_on_neither():
    assert select([0.5, 0.25, 0.1], [0.5, 0.0, 0.4], k=2) == [1, 2]


def test_of_equal_differences_the_lower_number_comes_first():
    # differences: -.5, +.5, -.5, +.5, exact in binary
    assert select([0.0, 0.5, 0.25, 0.75], [0.5, 0.0, 0.75, 0.25], k=2) == [1, 3, 0, 2]


def test_the_lower_number_comes_first_among_as_many_as_an_sae_has():
    frequencies = [0.25, 0.75] * 2304
    found = select(frequencies, [0.5] * 4608, k=3)
    assert found == [1, 3, 5, 0, 2, 4]


# ---------------------------------------------------------------- Bradley-Terry

def loss(differences):
    """mine.bradley_terry_loss of pairs whose rejected reward is 0 → list."""
    chosen = torch.tensor(differences)
    return mine.bradley_terry_loss(chosen, torch.zeros_like(chosen)).tolist()


def test_equal_rewards_cost_the_logarithm_of_2():
    assert loss([0.0]) == pytest.approx([math.log(2)])


def test_a_difference_of_the_logarithm_of_3_means_three_in_four():
    # σ(log 3) = 3/4
    assert loss([math.log(3), -math.log(3)]) == pytest.approx([-math.log(3 / 4), -math.log(1 / 4)])


def test_only_the_difference_of_the_two_counts():
    both = torch.tensor([5.0])
    assert mine.bradley_terry_loss(both, both).tolist() == pytest.approx([math.log(2)])


def test_large_differences_are_neither_infinite_nor_lost():
    assert loss([1000.0, -1000.0]) == [0.0, 1000.0]


def test_the_gradient_of_a_large_difference_is_a_number():
    chosen = torch.tensor([1000.0, -1000.0], requires_grad=True)
    mine.bradley_terry_loss(chosen, torch.zeros(2)).sum().backward()
    assert chosen.grad.tolist() == [0.0, -1.0]
