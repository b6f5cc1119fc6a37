"""What benchmarks/does_it_hold.py and second_model.py say of figures, on figures made by hand."""

import pytest

from benchmarks import does_it_hold, second_model

ABOVE = {"mean": 0.2, "low": 0.1, "high": 0.3}
LEVEL = {"mean": 0.01, "low": -0.1, "high": 0.1}
BELOW = {"mean": -0.2, "low": -0.3, "high": -0.1}


def one_set(accuracy=0.8, shuffled=ABOVE, dense=LEVEL, random=LEVEL, random_at=None,
            picked_at=None):
    """The figures of one set. random_at, picked_at: {K: SparseRM minus that control}."""
    curves = {name: {str(k): {"behind": gap} for k, gap in (at or {}).items()}
              for name, at in (("random_directions", random_at), ("picked_directions", picked_at))}
    return {"accuracy": {"sparserm": {"accuracy": accuracy}}, "curves": {"k": curves},
            "differences": {"shuffled_labels": shuffled, "dense": dense,
                            "random_directions": random}}


def found(**sets):
    """The results file of these sets."""
    return {"mean": sets}


def test_the_finding_counts_sets_that_can_be_learned_by_few_directions():
    text = does_it_hold.finding(found(
        a=one_set(random_at={1: ABOVE, 128: BELOW}, picked_at={4: BELOW}, dense=BELOW),
        b=one_set(random_at={16: ABOVE}, picked_at={32: BELOW}, random=ABOVE),
        c=one_set(random_at={2: BELOW, 32: ABOVE}, picked_at={8: ABOVE}),
        coin=one_set(shuffled=LEVEL, random_at={1: ABOVE}, picked_at={1: ABOVE}, dense=ABOVE)))
    assert text == (
        "On 3 of 4 sets there is something to learn: shuffled labels are clearly beaten (not on "
        "coin). Of these 3, with few directions (at some K up to 16 a side), the SAE's choice is "
        "clearly better than as many random ones on 2, clearly worse on 1; against random ones "
        "picked by the labels it is clearly better on 1, clearly worse on 1. At the K that "
        "cross-validation takes, SparseRM clearly beats random directions on 1 and a dense head "
        "(linear, on all of z) on none; the dense head clearly beats it on 1.\n")


def test_what_the_export_costs_is_told_of_changes_of_two_points_and_of_clear_differences():
    text = does_it_hold.export_claim({
        "mean": {"a": one_set(0.80), "b": one_set(0.80), "c": one_set(0.80)},
        "export": {"a": one_set(0.77, random=ABOVE), "b": one_set(0.83, random=BELOW),
                   "c": one_set(0.81)}})
    assert "lower on a (-.030), as much higher on b (+.030)" in text
    assert text.endswith("clearly ahead of random directions on a (+.200 [+.100, +.300]), clearly "
                         "behind them on b (-.200 [-.300, -.100]).\n")


@pytest.mark.parametrize("at_k, at_1, sentences", [
    (ABOVE, BELOW, ("ahead of random directions on a (+.200 [+.100, +.300]), clearly behind them "
                    "on no set", "ahead of random directions on no set, clearly behind them on a "
                    "(-.200 [-.300, -.100])")),
    (LEVEL, LEVEL, ("on no set, clearly behind them on no set",) * 2),
])
def test_where_random_directions_stand_on_the_second_model_is_told_with_its_sign(at_k, at_1,
                                                                                 sentences):
    text = second_model.claim(found(a=one_set(random=at_k, random_at={1: at_1})))
    chosen, one = text.split("At K = 1")
    assert sentences[0] in chosen and sentences[1] in one
