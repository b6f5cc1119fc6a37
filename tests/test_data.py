"""The project's own preference sets keep their promises."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

stage1 = importlib.import_module("01_extract")
DATA = Path(__file__).resolve().parent.parent / "data"
SETS = {"truthful": (800, 600, 20, 0.65), "safe": (500, 400, 10, 0.70)}      # pairs, prompts, subjects, words control


def rows_of(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_its_size_and_only_whole_rows(name):
    rows, (pairs, prompts, subjects, _) = rows_of(name), SETS[name]
    assert len(rows) >= pairs
    assert len({stage1.plain_text(r["prompt"]) for r in rows}) >= prompts
    assert len({r["category"] for r in rows}) >= subjects
    assert len({r["id"] for r in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "prompt", "chosen", "rejected", "category"]
        assert all(isinstance(v, str) and v == v.strip() and v for v in row.values())


@pytest.mark.parametrize("name", SETS)
def test_no_pair_or_prompt_stands_twice_in_other_words(name):
    rows = rows_of(name)
    pairs = Counter((stage1.plain_text(r["prompt"]), stage1.plain_text(r["chosen"]), stage1.plain_text(r["rejected"])) for r in rows)
    assert max(pairs.values()) == 1
    answers = [stage1.plain_text(r[side]) for r in rows for side in ("chosen", "rejected") if len(r[side].split()) > 5]
    assert len(set(answers)) == len(answers)
    prompts = sorted({stage1.plain_text(r["prompt"]) for r in rows})
    bags = [frozenset(p.strip("?.").split()) for p in prompts]
    close = [(prompts[i], prompts[j]) for i in range(len(bags)) for j in range(i) if len(bags[i] & bags[j]) > 0.8 * len(bags[i] | bags[j])]
    assert not close


def test_half_of_the_safe_set_is_harmful_and_half_harmless():
    sides = Counter(r["category"].partition("/")[0] for r in rows_of("safe"))
    assert set(sides) == {"harmful", "harmless"}
    assert 0.45 <= sides["harmful"] / sum(sides.values()) <= 0.55


@pytest.mark.parametrize("name", SETS)
def test_words_and_length_do_not_give_the_answer_away(name):
    found = importlib.import_module("benchmarks.data_statistics").statistics(DATA / f"{name}.jsonl")
    assert found["words control"] <= SETS[name][3]
    assert 0.45 <= found["chosen longer"] <= 0.55
    assert abs(found["negations chosen"] - found["negations rejected"]) <= 0.1 * found["negations chosen"]


def test_there_are_prompts_for_best_of_n():
    prompts = [json.loads(line)["prompt"] for line in (DATA / "prompts.jsonl").open(encoding="utf-8")]
    assert len(set(prompts)) >= 40
    assert not {stage1.plain_text(p) for p in prompts} & {stage1.plain_text(r["prompt"]) for r in rows_of("truthful")}
