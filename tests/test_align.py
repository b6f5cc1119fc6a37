"""benchmarks/align.py, rank_answers.py and what all benchmarks share: what their figures are made
of."""

import numpy as np
import pytest
import tiny
import torch

from benchmarks import align, common, rank_answers
from parts.files import UserError

stage1 = common.stage1


# ---------------------------------------------------------------- what the benchmarks share

@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_log_likelihoods_are_those_of_each_text_alone(family, backbone_of):
    backbone = backbone_of(family)
    prompts = ["Is water wet?", "Is water wet?", "Is water blue?",
               [{"role": "user", "content": "One"}]]
    responses = ["Yes, it is.", "Yes, no.", "No", "two three four five six seven eight nine ten"]
    sums, counts = common.log_likelihoods(backbone, prompts, responses)
    for prompt, response, found, count in zip(prompts, responses, sums, counts, strict=True):
        text = stage1.render(backbone.tokenizer, prompt, response)
        with torch.inference_mode():
            logits = backbone.model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        places = range(text.first, text.eot + 1)
        wanted = sum(float(logits[place - 1, text.ids[place]]) for place in places)
        assert found == pytest.approx(wanted, rel=1e-4)
        assert count == len(places)


def rows(n):
    """n pairs, two of each question."""
    found = []
    for i in range(n):
        question = f"q{i // 2}"
        found.append({"id": str(i), "question": question, "prompt": question,
                      "chosen": f"right {i}", "rejected": f"wrong {i}"})
    return found


def test_a_cut_never_puts_a_question_on_both_sides():
    first, rest = common.cut(rows(20), 7)
    assert len(first) == 8 and first + rest == rows(20)
    assert not {row["question"] for row in first} & {row["question"] for row in rest}


def test_a_cut_of_more_than_all_rows_leaves_none():
    assert common.cut(rows(4), 9) == (rows(4), [])


def test_a_script_that_ran_says_how_long_it_took_and_how_much_memory(tmp_path):
    script = tmp_path / "fine.py"
    script.write_text("print('nobody sees this')")
    found = common.run_script(script)
    assert found["seconds"] > 0 and 0.001 < found["peak_gib"] < 10


def test_a_script_that_failed_is_an_error_with_its_flags(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match=r"fails\.py failed, exit 2 · --run here · "):
        common.run_script(script, "--run", "here")


def test_an_interval_is_written_without_the_zero_before_the_point():
    row = {"mean": -0.0126, "low": -1.0, "high": 0.2}
    assert common.printed_interval(row, sign="+") == "-0.013 [-1.000, +0.200]"
    assert common.difference(row) == "-.013 [-1.000, +.200]"


@pytest.mark.parametrize("words", [[], ["a=x", "y"]])
def test_sets_without_a_name_are_not_taken(words):
    assert common.named_sets(words) is None


def test_a_set_is_named_before_the_first_sign():
    assert common.named_sets(["a=x=1", "b=y"]) == {"a": "x=1", "b": "y"}


# ---------------------------------------------------------------- align.py

def test_flipping_swaps_the_sides_of_the_asked_share_and_no_others():
    noisy = align.flipped(rows(20), 0.3, seed=1)
    assert sum(row["flipped"] for row in noisy) == 6
    for row in noisy:
        sides = row["chosen"], row["rejected"]
        right, wrong = f"right {row['id']}", f"wrong {row['id']}"
        assert sides == ((wrong, right) if row["flipped"] else (right, wrong))


def test_which_pairs_are_flipped_depends_on_the_seed_alone():
    assert align.flipped(rows(20), 0.3, 1) == align.flipped(rows(20), 0.3, 1)
    assert align.flipped(rows(20), 0.3, 1) != align.flipped(rows(20), 0.3, 2)


@pytest.fixture
def kept(tmp_path):
    """→ a function: name of a filter → ids that it keeps of ten pairs, three of them flipped."""
    noisy = align.flipped(rows(10), 0.3, 0)
    tiny.save_rows(tmp_path / "kept-0.jsonl", noisy[:6])        # what sparserm has kept
    dense = np.array([1.0, -1] * 5)
    length = np.array([0.0, -2, 3, 1, 1, 1, 1, 1, 1, 1])

    def of(name):
        return [row["id"] for row in align.kept_by(name, noisy, dense, length, tmp_path, 0)]
    return of


def test_no_filter_keeps_all_and_the_oracle_what_was_not_flipped(kept):
    assert kept("none") == [str(n) for n in range(10)]
    true = [row["id"] for row in align.flipped(rows(10), 0.3, 0) if not row["flipped"]]
    assert kept("oracle") == true and len(true) == 7


def test_the_filters_of_dense_and_length_keep_what_these_prefer(kept):
    assert kept("dense") == ["0", "2", "4", "6", "8"]
    assert kept("length") == ["0", "2", "3", "4", "5", "6", "7", "8", "9"]      # a tie is kept


def test_the_random_filter_keeps_as_many_as_sparserm_and_the_same_ones_again(kept):
    assert len(set(kept("random"))) == 6 and kept("random") == kept("random")


def test_what_a_policy_gets_right_is_read_as_written():
    base = {"chosen": [-5, -5, -5], "rejected": [-4, -6, -5]}
    found = {"chosen": [-4, -5, -6], "rejected": [-4, -7, -5], "mc1": [1, 0]}
    right = align.right(found, base)
    assert right["likelihood"].tolist() == [False, True, False]         # a tie is not right
    assert right["implicit"].tolist() == [True, True, False]    # log-ratios 1 > 0, 0 > -1, -1 < 0
    assert right["mc1"].tolist() == [1, 0]


def test_a_policy_is_read_on_both_sides_and_on_every_candidate(backbone_of):
    backbone = backbone_of("llama")
    pairs = [{"prompt": "One", "chosen": "two", "rejected": "ten"},
             {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}]
    candidates = ["blue", "green", "a clear day"]
    question = {"prompt": "Which?", "candidates": candidates, "labels": ["b", "g", "d"]}
    found = align.read_policy(backbone, pairs, [question])

    def alone(prompt, response):
        return float(common.log_likelihoods(backbone, [prompt], [response])[0][0])
    for side in ("chosen", "rejected"):
        wanted = [alone(pair["prompt"], pair[side]) for pair in pairs]
        assert found[side] == pytest.approx(wanted, abs=1e-3)
    likeliest = max(range(3), key=lambda n: alone("Which?", candidates[n]))
    assert found["mc1"] == [question["labels"][likeliest]]


# ---------------------------------------------------------------- rank_answers.py

@pytest.mark.parametrize("scores, labels, wanted", [
    ([1, 3, 2], [0, 1, 0], 1),
    ([0, 0, 0, 0], [0, 1, 0, 0], 0.25),
    ([2, 2, 1], [1, 0, 0], 0.5),
])
def test_candidates_that_share_the_highest_score_share_the_label(scores, labels, wanted):
    assert rank_answers.label_of_best(scores, labels) == wanted
