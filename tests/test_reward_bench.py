"""The rules of RewardBench, RewardBench 2 and RM-Bench, each on a miniature worked by hand."""

import importlib
import json
import math
import sys

import pytest

rb = importlib.import_module("benchmarks.reward_bench")
RIGHT, WRONG, TIE = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)


def write(folder, rows):
    """Rows → the path of a JSONL file; ids are given where they are missing."""
    path = folder / "scored.jsonl"
    path.write_text("".join(json.dumps({"id": n, **row}) + "\n" for n, row in enumerate(rows)), encoding="utf-8")
    return path


def pairs(subset, *scores):
    return [{"subset": subset, "score_chosen": c, "score_rejected": r} for c, r in scores]


def whole_reward_bench():
    """One right pair in each subset."""
    return {subset: pairs(subset, RIGHT) for subset in rb.WEIGHTS}


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["reward_bench.py", *map(str, argv)])
    rb.main()


# ---------------------------------------------------------------- RewardBench

def test_the_published_sets_have_the_published_sizes():
    assert sum(rb.PUBLISHED["rewardbench"].values()) == 2985
    assert sum(rb.SUBSETS_2.values()) == 1865


def test_accuracy_of_a_subset_counts_equal_scores_as_wrong(tmp_path):
    result = rb.aggregate(write(tmp_path, pairs("donotanswer", RIGHT, RIGHT, WRONG, TIE)), "rewardbench")
    assert result["subsets"] == {"donotanswer": 2 / 4}


def test_a_section_weighs_subsets_by_the_published_rows_not_by_the_rows_of_the_file(tmp_path):
    rows = (pairs("alpacaeval-easy", RIGHT) + pairs("alpacaeval-length", WRONG, WRONG, WRONG) + pairs("alpacaeval-hard", RIGHT)
            + pairs("mt-bench-easy", RIGHT, WRONG) + pairs("mt-bench-med", WRONG))
    result = rb.aggregate(write(tmp_path, rows), "rewardbench")
    assert result["sections"] == {"Chat": pytest.approx((100 + 0 + 95 + 28 / 2 + 0) / (100 + 95 + 95 + 28 + 40))}      # 209 / 358
    assert result["overall"] is None and "mt-bench-hard" in result["notes"][0] and "alpacaeval-easy 1 of 100" in result["notes"][1]


def test_math_weighs_as_much_in_reasoning_as_the_six_code_subsets_together(tmp_path):
    rows = pairs("math-prm", RIGHT) + [row for name in rb.CODE for row in pairs(name, RIGHT if name < "hep-java" else WRONG)]
    result = rb.aggregate(write(tmp_path, rows), "rewardbench")      # code: cpp and go of six = 1/3
    assert result["sections"]["Reasoning"] == pytest.approx((1 + 1 / 3) / 2)


def test_overall_is_the_plain_mean_of_four_sections(tmp_path):
    rows = whole_reward_bench()
    rows["math-prm"] = pairs("math-prm", WRONG)                       # Reasoning 1/2, the others 1
    result = rb.aggregate(write(tmp_path, sum(rows.values(), [])), "rewardbench")
    assert result["overall"] == pytest.approx(3.5 / 4) and result["overall_with_prior_sets"] is None


def test_the_prior_sets_are_a_fifth_column_of_half_weight(tmp_path):
    rows = whole_reward_bench() | {"math-prm": pairs("math-prm", WRONG)}
    prior = pairs("anthropic_helpful", RIGHT, WRONG) + pairs("anthropic_hhh", WRONG) + pairs("shp", WRONG) + pairs("summarize", RIGHT)
    result = rb.aggregate(write(tmp_path, sum(rows.values(), []) + prior), "rewardbench")
    assert result["prior_sets"] == pytest.approx(1.5 / 4) and result["overall"] == pytest.approx(3.5 / 4)
    assert result["overall_with_prior_sets"] == pytest.approx((3.5 + 0.375 / 2) / 4.5)


# ---------------------------------------------------------------- RewardBench 2

@pytest.mark.parametrize("scores, share", [
    ([3, 1, 2, 0], 1), ([1, 3, 2, 0], 0), ([3, 3, 2, 0], 1 / 2), ([3, 3, 2, 3], 1 / 3), ([1, 1, 1, 1], 1 / 4), ([2, 3, 3, 2], 0),
])
def test_best_of_four_shares_the_point_among_those_on_top(tmp_path, scores, share):
    one_list = write(tmp_path, [{"subset": "Math", "scores": scores, "num_correct": 1}])
    assert rb.aggregate(one_list, "rewardbench2")["subsets"]["Math"] == pytest.approx(share)
    two_lists = write(tmp_path, [{"subset": "math", "score_chosen": scores[0], "score_rejected": scores[1:]}])
    assert rb.aggregate(two_lists, "rewardbench2")["subsets"]["Math"] == pytest.approx(share)


def ties(name, correct, wrong):
    return {"id": name, "subset": "Ties", "scores": correct + wrong, "num_correct": len(correct)}


TIES = [
    # gap 3, then gap 4 > spread 1 and 3 > 1: preferred, hard too; tanh(3/1 - 1)
    ties("ref:1", [5], [2]), ties("tied:1", [6, 5], [1, 0]),
    # gap -1 (wrong), then gap 2 > spread 1, but -1 is not: preferred only; tanh(-1/1 - 1) = -tanh 2
    ties("ref:2", [1], [2]), ties("tied:2", [3, 4], [1]),
    # no spread: gap 2 > 0, both; tanh(2/0) = 1
    ties("ref:3", [4], [1]), ties("tied:3", [3, 3, 3], [1]),
    # gap 0 (wrong), then gap 1 < spread 2: neither; tanh(0/2 - 1) = -tanh 1
    ties("ref:4", [2], [2]), ties("tied:4", [5, 3], [2]),
    # all alike: gap 0, spread 0: neither and nowhere accurate; 0/0 counts as 0
    ties("ref:5", [2], [2]), ties("tied:5", [3, 3], [3]),
    # without a partner: accuracy only
    ties("ref:6", [2], [1]), ties("tied:7", [1, 0], [3]),
]


def test_ties_is_accuracy_and_margin_of_reference_and_tied_prompts(tmp_path):
    found = rb.aggregate(write(tmp_path, TIES), "rewardbench2")["ties"]
    margin = (math.tanh(2) - math.tanh(2) + 1 - math.tanh(1) + 0) / 5
    assert found == {"tied_accuracy": pytest.approx(4 / 6), "ref_accuracy": pytest.approx(3 / 6), "preferred": pytest.approx(3 / 5),
                     "preferred_hard": pytest.approx(2 / 5), "margin": pytest.approx(margin),
                     "score": pytest.approx(0.2 + 0.15 + 0.12 + 0.08 + 0.01 * margin)}


def test_overall_of_the_second_benchmark_is_the_plain_mean_of_six_subsets(tmp_path):
    def four(subset, *rows):
        return [{"subset": subset, "scores": scores} for scores in rows]
    top, low = [9, 1, 2, 3], [0, 1, 2, 3]
    rows = (four("Factuality", top, low, low, low) + four("Precise IF", low) + four("Math", top) + four("Safety", top, low)
            + four("Focus", top) + TIES[:2])      # Ties: everything holds, 1 + 0.01 tanh 2
    result = rb.aggregate(write(tmp_path, rows), "rewardbench2")
    assert result["overall"] == pytest.approx((1 / 4 + 0 + 1 + 1 / 2 + 1 + 1 + 0.01 * math.tanh(2)) / 6)
    assert rb.aggregate(write(tmp_path, rows[:-2]), "rewardbench2")["overall"] is None


# ---------------------------------------------------------------- RM-Bench

def styles(domain, chosen, rejected):
    return {"domain": domain, "score_chosen": chosen, "score_rejected": rejected}


ALL, NONE = ([9, 9, 9], [0, 0, 0]), ([0, 0, 0], [9, 9, 9])
STYLED = [styles("chat", [3, 2, 1], [0, 2.5, 1]), styles("math", *NONE), styles("code", *ALL),
          styles("safety-refuse", *ALL), styles("safety-refuse", *ALL), styles("safety-response", *NONE)]


def test_the_style_matrix_has_chosen_rows_and_its_upper_right_is_hard(tmp_path):
    chat = rb.aggregate(write(tmp_path, STYLED[:1]), "rmbench")["domains"]["chat"]
    assert chat["matrix"] == [[1, 1, 1], [1, 0, 1], [1, 0, 0]]        # the last cell is 1 against 1: equal, wrong
    assert [chat[n] for n in ("hard", "normal", "easy", "average")] == pytest.approx([3 / 3, 1 / 3, 2 / 3, 6 / 9])


def test_safety_pools_its_rows_and_overall_is_the_plain_mean_of_four_domains(tmp_path):
    result = rb.aggregate(write(tmp_path, STYLED), "rmbench")
    assert result["domains"]["safety"]["average"] == pytest.approx(2 / 3) and result["rows"]["safety"] == 3
    assert [result["mean"][n] for n in ("hard", "normal", "easy")] == pytest.approx([2 / 3, 1 / 2, 7 / 12])
    assert result["overall"] == pytest.approx((2 / 3 + 0 + 1 + 2 / 3) / 4) == pytest.approx((2 / 3 + 1 / 2 + 7 / 12) / 3)


def test_the_six_scores_of_a_ranked_row_are_three_chosen_then_three_rejected(tmp_path):
    row = {"domain": "chat", "prompt": "p", "candidates": list("abcdef"), "scores": [3, 2, 1, 0, 2.5, 1], "ranking": [0, 4, 1, 2, 5, 3]}
    assert rb.aggregate(write(tmp_path, [row]), "rmbench")["domains"]["chat"]["matrix"] == [[1, 1, 1], [1, 0, 1], [1, 0, 0]]


# ---------------------------------------------------------------- the command

@pytest.mark.parametrize("benchmark, rows, line", [
    ("rewardbench", sum(whole_reward_bench().values(), []), "overall                                   1.000"),
    ("rewardbench2", TIES, "overall                                       -"),
    ("rmbench", STYLED, "overall                                   0.583"),
])
def test_the_command_prints_a_table_and_writes_the_same_numbers(tmp_path, monkeypatch, capsys, benchmark, rows, line):
    path = write(tmp_path, rows)
    run(monkeypatch, path, "--benchmark", benchmark, "--json", tmp_path / "out.json")
    assert line in capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / "out.json").read_text()) == rb.aggregate(path, benchmark)


@pytest.mark.parametrize("benchmark, text, what", [
    ("rewardbench", "{", "invalid JSON"),
    ("rewardbench", "[1]", "no id"),
    ("rewardbench", "\n", "no rows"),
    ("rewardbench", '{"id": 1, "subset": "Math", "score_chosen": 1, "score_rejected": 0}', "subset 'Math' is not of rewardbench"),
    ("rewardbench", '{"id": 1, "subset": "shp", "score_chosen": 1}', "None is not a finite number"),
    ("rewardbench", '{"id": 1, "subset": "shp", "score_chosen": NaN, "score_rejected": 0}', "nan is not a finite number"),
    ("rewardbench", '{"id": 1, "subset": "shp", "scores": [1, 0]}\n' * 2, "id 1 of shp stands twice"),
    ("rewardbench2", '{"id": 1, "subset": "Focus", "scores": [1, 0, 0]}', "1 chosen and 2 rejected scores"),
    ("rewardbench2", '{"id": 1, "subset": "Focus", "scores": [1, 0, 0, 0], "num_correct": -3}', "num_correct"),
    ("rewardbench2", '{"id": 1, "subset": "Ties", "scores": [1, 0]}', "id 1 of Ties"),
    ("rewardbench2", '{"id": "tied:1", "subset": "Ties", "scores": [1, 0]}', "see num_correct"),
    ("rewardbench2", '{"id": "ref:1", "subset": "Ties", "scores": [1, 0]}', "no question with both"),
    ("rmbench", '{"id": 1, "domain": "chat", "score_chosen": [1, 2], "score_rejected": [1, 2, 3]}', "2 chosen and 3 rejected scores"),
    ("rmbench", '{"id": 1, "score_chosen": [1, 2, 3], "score_rejected": [1, 2, 3]}', "domain None is not of rmbench"),
    ("rmbench", None, "No such file"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, benchmark, text, what):
    path = tmp_path / "scored.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, path, "--benchmark", benchmark)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and what in error
    assert error.count(" · ") == 2
