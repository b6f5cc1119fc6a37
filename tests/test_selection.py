"""benchmarks/selection.py: its statistics against plain loops; what it may read."""

import importlib
import statistics
import sys

import pytest
import tiny
import torch

sys.path.append(str(tiny.ROOT / "benchmarks"))
selection = importlib.import_module("selection")


def test_auroc_is_a_loop_over_all_couples_and_an_effect_is_a_mean_over_its_deviation():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randint(0, 4, (size, 3), generator=generator).float() for size in (9, 9))         # many equals
    for j, found in enumerate(selection.auroc(chosen, rejected[:7]).tolist()):
        couples = [(c > r) + (c == r) / 2 for c in chosen[:, j].tolist() for r in rejected[:7, j].tolist()]
        assert found == pytest.approx(statistics.mean(couples) - 0.5, abs=1e-6)
    for j, found in enumerate(selection.effect(chosen, rejected).tolist()):
        differences = (chosen - rejected)[:, j].tolist()
        assert found == pytest.approx(statistics.mean(differences) / statistics.stdev(differences), abs=1e-6)
    assert selection.effect(chosen, chosen).tolist() == [0, 0, 0]


def test_criteria_are_compared_without_the_test_pairs(finished):
    data = selection.stage4.Data(finished)
    found = selection.compare(data, [2], seeds=2)
    assert set(found) == {*selection.CRITERIA, "random directions", "dense"} and set(found[selection.PAPER]) == {"2"}
    assert all(row[k]["minus_frequency"]["mean"] == pytest.approx(row[k]["ties_half"] - found[selection.PAPER][k]["ties_half"])
               for row in found.values() for k in row)
    assert found["dense"]["2"]["n"] == int((data.split != selection.stage4.TEST).sum())
    for z in data.z:
        z[data.split == selection.stage4.TEST] = 99.0
    assert selection.compare(data, [2], seeds=2) == found
