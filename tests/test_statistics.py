"""The statistics of stage 4, against plain loops, numbers worked by hand, and scipy."""

import math
import statistics

import numpy as np
import pytest

from parts.statistics import (
    bootstrap,
    calibration,
    gap,
    group_weights,
    interval,
    is_clear,
    length_figures,
    points,
    says_little,
    side_by_side,
    summary,
    wilson,
)


def middle_95(means):
    """The limits of the middle 95 %: one fortieth is 2.5 %."""
    low, *_, high = statistics.quantiles(means, n=40, method="inclusive")
    return low, high


# ---------------------------------------------------------------- the bootstrap

def test_the_bootstrap_is_a_plain_loop_that_draws_whole_groups():
    rng = np.random.default_rng(1)
    groups = rng.integers(12, size=40) * 1000 + 7
    values = rng.random(40)
    names = sorted(set(groups.tolist()))

    rng = np.random.default_rng(3)
    means = []
    for _ in range(200):
        taken = []
        for group in rng.integers(len(names), size=len(names)):
            taken.extend(values[groups == names[group]])
        means.append(sum(taken) / len(taken))

    found = bootstrap(values, groups, draws=200, seed=3)
    assert found == pytest.approx((values.mean(), *middle_95(means)))


def test_the_interval_of_an_accuracy_is_close_to_the_one_of_the_normal_law():
    right = np.repeat([1.0, 0.0], [300, 100])
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    found = bootstrap(right, np.arange(400))
    assert found == pytest.approx((0.75, 0.75 - half, 0.75 + half), abs=0.006)


def ratio_of_sums(sums, counts, axis):
    """The mean over all pairs of the groups drawn."""
    return sums.sum(axis) / counts.sum(axis)


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_of_an_accuracy_and_of_a_paired_difference_are_those_of_scipy(paired):
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(60), rng.integers(1, 5, size=60))
    of_group = rng.normal(0, 0.5, 60)[groups]
    ours = rng.normal(0.6, 1, len(groups)) + of_group
    theirs = rng.normal(0.2, 1, len(groups)) + of_group

    if paired:
        found = gap(ours, theirs, groups)
        values = (ours > 0).astype(float) - (theirs > 0)                # there are no ties
    else:
        found = summary(ours, groups)
        values = (ours > 0).astype(float)
    sums = np.array([values[groups == group].sum() for group in range(60)])
    counts = np.bincount(groups)
    wanted = scipy_stats.bootstrap((sums, counts), ratio_of_sums, paired=True, n_resamples=9999,
                                   method="percentile", rng=1).confidence_interval

    assert (found["low"], found["high"]) == pytest.approx(wanted, abs=0.01)
    assert wanted.high - wanted.low > 0.1


def test_ten_copies_of_a_row_in_one_group_tell_no_more_than_one():
    right = (np.random.default_rng(0).random(50) < 0.7).astype(float)
    copies = np.repeat(right, 10)
    alone = bootstrap(right, np.arange(50))
    in_one_group = bootstrap(copies, np.repeat(np.arange(50), 10))
    each_by_itself = bootstrap(copies, np.arange(500))
    assert in_one_group == pytest.approx(alone)
    # √10 times as wide
    assert alone[2] - alone[1] > 2.5 * (each_by_itself[2] - each_by_itself[1])


def test_group_weights_count_how_often_a_plain_loop_drew_each_group():
    groups = np.array([70, 5, 70, 9, 5, 70, 33])
    weights = group_weights(groups, 40, seed=3)
    rng = np.random.default_rng(3)
    for row in weights.tolist():
        drawn = [(5, 9, 33, 70)[i] for i in rng.integers(4, size=4)]
        assert row == [drawn.count(group) for group in (5, 9, 33, 70)]
    assert weights.shape == (40, 4)
    assert len({tuple(row) for row in weights.tolist()}) > 10


# ---------------------------------------------------------------- where a bootstrap says too little

@pytest.mark.parametrize("right, count", [(0, 1), (1, 1), (12, 12), (119, 120), (7, 15), (0, 9)])
def test_wilsons_interval_is_that_of_scipy(right, count):
    scipy_stats = pytest.importorskip("scipy.stats")
    wanted = scipy_stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


def test_wilsons_interval_of_all_right_is_the_one_worked_by_hand():
    # n / (n + z²) to 1, with z² = 3.8415 and n = 12
    assert wilson(1.0, 12) == pytest.approx((12 / 15.8415, 1), abs=1e-5)


@pytest.mark.parametrize("count", [1, 7, 12, 120, 1000])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_wilsons_interval_holds_the_share_and_has_a_width(share, count):
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1
    assert high - low > 0.003


@pytest.mark.parametrize("groups, differ, little", [
    (19, 9, True),                      # too few groups
    (20, 9, False),
    (200, 4, True),                     # too few that are not like the rest
    (200, 5, False),
    (200, 0, True),
])
def test_a_bootstrap_needs_20_groups_and_5_that_are_not_like_the_rest(groups, differ, little):
    values = np.ones(groups)
    values[:differ] = 0
    assert says_little(values, np.arange(groups)) is little


def test_ten_pairs_of_one_prompt_that_differ_are_one_group_that_differs():
    values = np.ones(300)
    values[:40] = 0
    assert says_little(values, np.arange(300) // 10)                # 4 of 30 groups
    assert not says_little(values, np.arange(300))


@pytest.mark.parametrize("n, wrong", [(12, 0), (120, 1), (120, 0), (120, 120), (1, 0), (2, 1)])
def test_no_interval_of_an_accuracy_has_width_0(n, wrong):
    differences = np.ones(n)
    differences[:wrong] = -1
    found = summary(differences, np.arange(n))
    assert found["method"] == "Wilson"
    assert (found["low"], found["high"]) == wilson(1 - wrong / n, n)
    assert found["high"] - found["low"] > 0.02


def test_wilsons_interval_counts_prompts_and_not_pairs():
    found = interval(np.ones(60), np.arange(60) // 5)
    assert found == {"mean": 1, "low": wilson(1.0, 12)[0], "high": 1, "method": "Wilson"}


def test_an_interval_of_enough_groups_is_the_bootstraps():
    values = np.repeat([1.0, 0.0], [30, 10])
    mean, low, high = bootstrap(values, np.arange(40))
    assert interval(values, np.arange(40)) == {"mean": mean, "low": low, "high": high,
                                               "method": "bootstrap"}


# ---------------------------------------------------------------- accuracy

def test_a_tie_is_wrong_in_the_accuracy_and_a_half_under_the_half_point_rule():
    found = summary(np.array([1.0, 0.0, -1.0, 2.0, 0.0]), np.array([5, 5, 6, 7, 8]))
    assert found["accuracy"] == 2 / 5
    assert found["ties"] == 2 / 5
    assert found["ties_half"] == 3 / 5


def test_a_summary_counts_pairs_and_prompts():
    found = summary(np.ones(5), np.array([5, 5, 6, 7, 7]))
    assert (found["n"], found["groups"]) == (5, 3)


def test_the_interval_of_a_summary_is_that_of_its_accuracy():
    differences = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 90)
    groups = np.arange(90) // 2
    found = summary(differences, groups)
    strict = (differences > 0).astype(float)
    assert (found["accuracy"], found["low"], found["high"]) == bootstrap(strict, groups)
    assert found["method"] == "bootstrap"


def test_a_control_that_says_nothing_is_a_coin_under_the_half_point_rule():
    found = summary(np.zeros(4), np.arange(4))
    assert (found["accuracy"], found["ties"], found["ties_half"]) == (0, 1, 0.5)


def test_a_gap_is_taken_pair_by_pair_and_a_tie_is_a_half():
    ours = np.tile([2.0, 1.0, -1.0, 0.0], 10)
    theirs = np.tile([0.0, 1.0, 0.0, -1.0], 10)
    found = gap(ours, theirs, np.arange(40))
    assert found["mean"] == (0.5 + 0 - 0.5 + 0.5) / 4
    assert (found["mean"], found["low"], found["high"]) == bootstrap(
        np.tile([0.5, 0, -0.5, 0.5], 10), np.arange(40))


@pytest.mark.parametrize("groups, differ", [(19, 9), (100, 4), (100, 0)])
def test_a_gap_has_no_interval_where_few_prompts_differ(groups, differ):
    ours = np.ones(groups)
    theirs = np.ones(groups)
    theirs[:differ] = -1
    found = gap(ours, theirs, np.arange(groups))
    assert found == {"mean": differ / groups, "low": None, "high": None}


def three_rows():
    """SparseRM, a control right on the same pairs, one right on the others → side_by_side."""
    ours = np.random.default_rng(5).normal(0.4, 1, 60)
    found = {"sparserm": ours, "same": 3 * ours, "mirrored": -ours}
    return side_by_side(found, np.repeat(np.arange(30), 2))


def test_a_control_that_is_right_on_the_same_pairs_is_behind_by_0_and_none_can_tell():
    rows = three_rows()
    assert 0 < rows["same"]["low"] < rows["same"]["high"] < 1
    assert rows["same"]["behind"] == {"mean": 0, "low": None, "high": None}


def test_a_control_right_on_the_other_pairs_is_behind_by_twice_the_accuracy_less_1():
    rows = three_rows()
    ours = rows["sparserm"]
    wanted = {"mean": 2 * ours["accuracy"] - 1, "low": 2 * ours["low"] - 1,
              "high": 2 * ours["high"] - 1}
    assert rows["mirrored"]["behind"] == pytest.approx(wanted)


def test_rows_side_by_side_are_summaries_and_sparserm_is_not_behind_itself():
    rows = three_rows()
    ours = np.random.default_rng(5).normal(0.4, 1, 60)
    assert list(rows) == ["sparserm", "same", "mirrored"]
    assert rows["sparserm"] == summary(ours, np.repeat(np.arange(30), 2))


@pytest.mark.parametrize("low, high, wanted", [
    (0.01, 0.3, 1), (-0.3, -0.01, -1), (-0.1, 0.1, 0), (0.0, 0.2, 0), (-0.2, 0.0, 0),
    (None, None, 0),
])
def test_a_difference_is_clear_where_its_interval_does_not_touch_0(low, high, wanted):
    assert is_clear({"mean": 0.1, "low": low, "high": high}) == wanted


def test_points_are_1_where_right_0_where_wrong_and_a_half_for_a_tie():
    assert points(np.array([0.1, -3.0, 0.0])).tolist() == [1.0, 0.0, 0.5]


# ---------------------------------------------------------------- calibration

TEMPERATURE = 1.7


@pytest.fixture(scope="module")
def differences():
    return np.random.default_rng(4).normal(0.5, 2, size=330)


def confidence(difference):
    return 1 / (1 + math.exp(-abs(difference) / TEMPERATURE))


def test_nll_and_brier_are_those_of_a_plain_loop_whose_outcome_is_who_won(differences):
    log_loss, squares = [], []
    for difference in differences:
        log_loss.append(math.log(1 + math.exp(-difference / TEMPERATURE)))
        squares.append((confidence(difference) - (difference > 0)) ** 2)
    found = calibration(differences, TEMPERATURE)
    assert found["temperature"] == TEMPERATURE
    assert found["nll"] == pytest.approx(sum(log_loss) / 330)
    assert found["brier"] == pytest.approx(sum(squares) / 330)


def test_bins_hold_pairs_of_rising_confidence_and_the_ece_is_their_weighted_error(differences):
    found = calibration(differences, TEMPERATURE)
    rising = sorted(differences, key=confidence)
    error = 0.0
    for b in found["bins"]:
        members, rising = rising[:b["n"]], rising[b["n"]:]
        mean_confidence = sum(map(confidence, members)) / b["n"]
        share_right = sum(difference > 0 for difference in members) / b["n"]
        assert b["confidence"] == pytest.approx(mean_confidence)
        assert b["accuracy"] == pytest.approx(share_right)
        assert share_right < 1                              # not "always chosen"
        error += b["n"] / 330 * abs(mean_confidence - share_right)
    assert len(rising) == 0
    assert found["ece"] == pytest.approx(error)


@pytest.mark.parametrize("n, bins", [(49, 1), (99, 1), (100, 2), (330, 6), (2970, 10)])
def test_bins_are_of_equal_size_at_least_50_pairs_each_and_ten_at_most(n, bins, differences):
    found = calibration(np.tile(differences, 9)[:n], TEMPERATURE)
    sizes = [b["n"] for b in found["bins"]]
    assert len(sizes) == bins
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- length

def test_the_correlation_of_reward_and_length_is_the_one_worked_by_hand():
    found = length_figures(np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, 4.0]),
                           np.array([10, 20, 30]), np.array([10, 10, 29]))
    # lengths 10 20 30 10 10 29, mean 18.1667, Σx² - n·m² = 2441 - 1980.1667
    # rewards  1  2  3  0  5  4, mean 2.5,     Σy² - n·m² = 55 - 37.5,  Σxy - n·mx·my = 306 - 272.5
    assert found["correlation"] == pytest.approx(33.5 / math.sqrt(460.8333 * 17.5), abs=1e-5)


def test_matched_pairs_differ_in_length_by_at_most_a_tenth_of_the_longer():
    chosen_tokens, rejected_tokens = np.array([10, 20, 30, 18]), np.array([10, 10, 29, 20])
    found = length_figures(np.array([1.0, 2.0, 3.0, 1.0]), np.array([0.0, 5.0, 4.0, 0.0]),
                           chosen_tokens, rejected_tokens)
    # 10 and 10 (right), 30 and 29 (wrong), 18 and 20 (right)
    assert found["matched_n"] == 3
    assert found["matched_accuracy"] == pytest.approx(2 / 3)


def test_where_nothing_varies_or_matches_there_is_no_correlation_and_no_accuracy():
    found = length_figures(np.zeros(2), np.zeros(2), np.full(2, 10), np.full(2, 20))
    assert found == {"correlation": 0.0, "matched_n": 0, "matched_accuracy": None}
