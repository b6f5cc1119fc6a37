"""The project's own preference sets keep their promises."""

import importlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

stage1 = importlib.import_module("01_extract")
DATA = Path(__file__).resolve().parent.parent / "data"
LEAST = {           # words: the most that a control on words alone may get right
    "truthful": SimpleNamespace(pairs=800, prompts=600, subjects=20, words=0.65),
    "safe": SimpleNamespace(pairs=500, prompts=400, subjects=10, words=0.70),
}


def read(name):
    """The rows of a file of data/."""
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def plain(rows, column):
    """A column as it is compared: without case and punctuation."""
    return [stage1.plain_text(row[column]) for row in rows]


@pytest.fixture(params=LEAST)
def name(request):
    """The name of a set."""
    return request.param


@pytest.fixture
def rows(name):
    """The rows of a set."""
    return read(name)


def test_a_set_has_its_size(name, rows):
    assert len(rows) >= LEAST[name].pairs
    assert len(set(plain(rows, "prompt"))) >= LEAST[name].prompts
    assert len({row["category"] for row in rows}) >= LEAST[name].subjects


def test_a_row_has_its_five_texts(rows):
    for row in rows:
        assert list(row) == ["id", "prompt", "chosen", "rejected", "category"]
        assert all(isinstance(text, str) and text and text == text.strip() for text in row.values())


def test_no_id_stands_twice(rows):
    assert len({row["id"] for row in rows}) == len(rows)


def test_no_pair_stands_twice(rows):
    pairs = list(zip(plain(rows, "prompt"), plain(rows, "chosen"), plain(rows, "rejected")))
    assert len(set(pairs)) == len(pairs)


def test_no_answer_of_more_than_five_words_stands_twice(rows):
    for_both = plain(rows, "chosen") + plain(rows, "rejected")
    originals = [row[side] for side in ("chosen", "rejected") for row in rows]
    long = [text for text, said in zip(for_both, originals) if len(said.split()) > 5]
    assert len(set(long)) == len(long)


def test_no_prompt_is_another_in_nearly_the_same_words(rows):
    prompts = sorted(set(plain(rows, "prompt")))
    bags = [frozenset(prompt.strip("?.").split()) for prompt in prompts]
    for i, bag in enumerate(bags):
        for j in range(i):
            assert len(bag & bags[j]) <= 0.8 * len(bag | bags[j]), (prompts[i], prompts[j])


def test_half_of_the_safe_set_is_harmful_and_half_harmless():
    sides = Counter(row["category"].partition("/")[0] for row in read("safe"))
    assert set(sides) == {"harmful", "harmless"}
    assert 0.45 <= sides["harmful"] / sides.total() <= 0.55


@pytest.fixture(scope="module")
def figures():
    """{name of a set: the figures of benchmarks/data_statistics.py}."""
    statistics = importlib.import_module("benchmarks.data_statistics").statistics
    return {name: statistics(DATA / f"{name}.jsonl") for name in LEAST}


def test_words_alone_do_not_give_the_answer_away(name, figures):
    assert figures[name]["words control"] <= LEAST[name].words


def test_length_does_not_give_the_answer_away(name, figures):
    assert 0.45 <= figures[name]["chosen longer"] <= 0.55


def test_negations_do_not_give_the_answer_away(name, figures):
    chosen, rejected = figures[name]["negations chosen"], figures[name]["negations rejected"]
    assert abs(chosen - rejected) <= 0.1 * chosen


def test_there_are_forty_prompts_for_best_of_n():
    assert len(set(plain(read("prompts"), "prompt"))) >= 40


def test_the_prompts_for_best_of_n_are_not_those_of_the_pairs():
    assert not set(plain(read("prompts"), "prompt")) & set(plain(read("truthful"), "prompt"))
