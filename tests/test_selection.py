"""benchmarks/selection.py: its statistics against plain loops; what it may read."""

import statistics

import numpy as np
import pytest
import torch

from benchmarks import common, selection

stage4 = common.stage4
COLUMNS = range(3)


@pytest.fixture(scope="module")
def sides():
    """Columns of small whole numbers, so that many are equal: chosen, rejected [9, 3]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 4, (9, 3), generator=generator).float() for _ in range(2)]


@pytest.mark.parametrize("column", COLUMNS)
def test_auroc_is_a_loop_over_all_couples(column, sides):
    chosen, rejected = sides[0], sides[1][:7]
    couples = [(c > r) + (c == r) / 2
               for c in chosen[:, column].tolist() for r in rejected[:, column].tolist()]
    found = selection.auroc(chosen, rejected)[column]
    assert float(found) == pytest.approx(statistics.mean(couples) - 0.5, abs=1e-6)


@pytest.mark.parametrize("column", COLUMNS)
def test_an_effect_is_a_mean_over_its_deviation(column, sides):
    differences = (sides[0] - sides[1])[:, column].tolist()
    wanted = statistics.mean(differences) / statistics.stdev(differences)
    assert float(selection.effect(*sides)[column]) == pytest.approx(wanted, abs=1e-6)


def test_the_effect_of_what_never_differs_is_nothing(sides):
    assert selection.effect(sides[0], sides[0]).tolist() == [0, 0, 0]


def test_the_papers_criterion_is_the_difference_of_firing_frequencies():
    chosen = torch.tensor([[0.0, 2.0], [1.0, 0.5], [0.0, 0.0], [3.0, 1.0]])
    rejected = torch.tensor([[0.0, 2.0], [0.0, 0.5], [0.0, 9.0], [3.0, 1.0]])
    found = selection.CRITERIA[selection.PAPER]([chosen, rejected], None)
    assert found.tolist() == [2 / 4 - 1 / 4, 3 / 4 - 4 / 4]


# ---------------------------------------------------------------- folds

def test_every_train_or_dev_pair_is_tested_once_and_never_beside_its_prompt():
    split = torch.tensor([0, 0, 1, 2, 0, 0, 1, 0, 2, 0, 0, 0])
    group = np.array([30, 30, 11, 50, 7, 7, 90, 41, 50, 12, 66, 81])
    tested = torch.zeros(12)
    for part in common.fold_splits(split, group):
        assert (part[split == 2] == stage4.NO_SPLIT).all()
        sets = [set(group[(part == n).numpy()]) for n in (0, 1, 2)]
        assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
        tested += part == stage4.TEST
    assert tested.tolist() == (split != 2).float().tolist()


# ---------------------------------------------------------------- the comparison

@pytest.fixture(scope="module")
def compared(finished):
    """→ (data, its comparison, a function that compares again)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.stage3.DEFAULTS, "epochs", 20)

        def compare(data):
            return selection.compare(data, [2], seeds=2)
        data = stage4.Data(finished)
        yield data, compare(data), compare


def test_each_criterion_is_compared_with_the_papers(compared):
    _, found, _ = compared
    assert set(found) == {*selection.CRITERIA, "random directions", "dense"}
    of_paper = found[selection.PAPER]["2"]["ties_half"]
    for row in found.values():
        behind = row["2"]["ties_half"] - of_paper
        assert row["2"]["minus_frequency"]["mean"] == pytest.approx(behind)


def test_all_pairs_but_those_of_the_test_split_are_counted(compared):
    data, found, _ = compared
    assert found["dense"]["2"]["n"] == int((~data.test).sum())


def test_criteria_are_compared_without_the_test_pairs(compared):
    data, found, compare = compared
    other = stage4.Data(data.run)
    for z in other.z:
        z[other.test] = 99.0
    assert compare(other) == found
