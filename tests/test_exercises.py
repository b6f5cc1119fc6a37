"""EXERCISES.md: its commands and its code run, its ranges hold what was measured, and the tests of
exercises/mine.py are red as shipped and green with the project's own functions."""

import json
import os
import re
import subprocess
import sys
import types

import pytest
import tiny
from played import lines_of, lines_of_make_demo, play, read, run_code, world

from benchmarks import printed, quiz

TEXT = read("EXERCISES.md")
EXERCISES = printed.exercises_of(TEXT)
PRINTED = json.loads(read("benchmarks/results/printed.json"))
PARTS = ["Predict", "Do", "Expect", "Why"]


# ---------------------------------------------------------------- what is expected

def test_there_are_ten_and_each_has_all_its_parts():
    assert list(EXERCISES) == [str(n) for n in range(1, 11)]
    for number, text in EXERCISES.items():
        found = re.findall(r"^\*\*(\w+)\b.*?\*\*", text, re.M)
        assert [part for part in found if part in PARTS] == PARTS, number


def test_the_figures_were_printed_by_the_code_that_stands_there():
    assert PRINTED["exercises_code"] == printed.fingerprint(printed.blocks_of(TEXT))


@pytest.mark.parametrize("number", EXERCISES)
def test_what_was_printed_lies_in_the_range_that_is_named(number):
    ranges = printed.ranges_of(EXERCISES[number])
    measured = PRINTED["exercises"][number]
    assert set(measured) == set(ranges)

    for name, (low, high) in ranges.items():
        assert low <= measured[name] <= high, (name, measured[name])


def test_the_figures_of_the_demo_s_runs_are_those_of_the_results():
    committed = json.loads(read("benchmarks/results/does_it_hold.json"))["mean"]
    for name in ("safe", "truthful"):
        for method in ("sparserm", "blind"):
            wanted = committed[name]["accuracy"][method]["accuracy"]
            assert PRINTED["exercises"]["5"][f"{name}, {method}"] == pytest.approx(wanted, abs=6e-4)
        wanted = committed[name]["curves"]["k"]["random_directions"]["1"]["behind"]["mean"]
        assert PRINTED["exercises"]["1"][f"{name}, minus random at K = 1"] == pytest.approx(
            wanted, abs=6e-4)


def test_only_what_needs_a_person_has_no_range():
    assert [number for number, text in EXERCISES.items() if not printed.ranges_of(text)] == [
        "3", "8"]


def test_what_a_reader_of_the_quiz_scored_is_what_is_on_record():
    saved = json.loads(read("benchmarks/results/quiz.json"))["safe"]
    null = saved["null"]
    named = [row for row in saved["names"] if row["description"]]
    held = [row for row in named if quiz.holds(row, null)]
    assert (f"named {len(named)} of {len(saved['names'])} latents; it had {null['right']} of "
            f"{null['tasks']} on the random directions, and of {len(named)} names {len(held)} held"
            ) in " ".join(EXERCISES["8"].split())


def test_a_range_is_read_as_it_is_written():
    text = "**Expect.** `a, b` -0.5 to 0.25 · `c`\n3\n\n**Why.** `d` 1 to 2"
    assert printed.ranges_of(text) == {"a, b": (-0.5, 0.25)} | {"c": (3, 3)}


# ---------------------------------------------------------------- commands and code

SHORT_ANSWERS = {"sample": ["--max-new-tokens", 3]}
WITHOUT_SEARCH = {"03_train_head.py": ["--l2", 0.1]}        # for L2; stage 4 has none then either

# a list of names as the page of stage 4 saves it
NAMES = {"names": [{"index": 3, "description": "a colour", "right": 8, "tasks": 10}],
         "null": {"right": 4, "tasks": 30}}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """make demo and then all exercises in a folder of tiny files → {number: what its code prints},
    commands that failed."""
    folder = tmp_path_factory.mktemp("exercises")
    texts = {}
    with world(folder):
        (folder / "names-safe.json").write_text(json.dumps(NAMES))
        commands = play(lines_of_make_demo(), SHORT_ANSWERS)
        for number, text in EXERCISES.items():
            texts[number] = ""
            for kind, block in printed.blocks_of(text):
                if kind == "bash":
                    commands += play(lines_of(block), WITHOUT_SEARCH)
                else:
                    _, shown = run_code(block, "EXERCISES.md")
                    texts[number] += shown
    return texts, [(line, err[-600:]) for line, code, err in commands if code]


def test_every_command_runs_as_it_stands(played):
    _, failed = played
    assert not failed


@pytest.mark.parametrize("number", EXERCISES)
def test_the_code_prints_each_figure_that_is_expected(number, played):
    texts, _ = played
    figures = dict(printed.FIGURE.findall(texts[number]))
    assert set(figures) == set(printed.ranges_of(EXERCISES[number]))


def test_the_control_by_hand_is_that_of_stage_4_on_other_data_too(played):
    texts, _ = played
    figures = dict(printed.FIGURE.findall(texts["2"]))
    assert float(figures["distance from stage 4"]) < 1e-6


def test_the_file_of_names_is_read_by_the_script_that_is_named():
    assert quiz.claim({"safe": NAMES}) == "safe: 1 of 1 got a name, 1 held."


# ---------------------------------------------------------------- exercises/mine.py

OWN = '''
import importlib
from sae import SAE

select_latents = importlib.import_module("02_select_features").select_latents
bradley_terry_loss = importlib.import_module("03_train_head").bradley_terry_loss


def topk_encoder(z, W_enc, b_enc, b_dec, k):
    return SAE(W_enc, b_enc, W_enc.T, b_dec, b_in=b_dec, activation="topk", k=k).encode(z)
'''


def pytest_of(folder):
    """python -m pytest on a folder → (tests that passed, that failed)."""
    env = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    words = [sys.executable, "-m", "pytest", str(folder), "-p", "no:cacheprovider",
             "--override-ini", "addopts="]
    done = subprocess.run(words, env=env, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True)
    last = done.stdout.splitlines()[-1]
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed)", last)}
    return counts.get("passed", 0), counts.get("failed", 0)


def test_the_exercise_is_red_as_shipped():
    if read("exercises/mine.py").count("raise NotImplementedError") < 3:
        pytest.skip("somebody has begun it")
    passed, failed = pytest_of(tiny.ROOT / "exercises")
    assert (passed, failed) == (0, 16)
    assert "16 tests" in EXERCISES["3"]


def test_the_exercise_is_green_with_the_functions_of_the_project(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "test_mine.py").write_text(read("exercises/test_mine.py"))
    assert pytest_of(tmp_path) == (16, 0)


# what is wrong → the function that replaces the right one
WRONG = {
    "the k largest without asking for their sign": '''
def topk_encoder(z, W_enc, b_enc, b_dec, k):
    pre = (z - b_dec) @ W_enc + b_enc
    best = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values)
''',
    "b_dec left on": '''
def topk_encoder(z, W_enc, b_enc, b_dec, k):
    pre = z @ W_enc + b_enc
    best = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
''',
    "latents of the wrong side fill up": '''
def select_latents(frequency_chosen, frequency_rejected, k):
    order = torch.sort(frequency_chosen - frequency_rejected, stable=True, descending=True).indices
    return torch.cat([order[:k], order.flip(0)[:k]])
''',
    "ties as they come": '''
def select_latents(frequency_chosen, frequency_rejected, k):
    difference = frequency_chosen - frequency_rejected
    k = min(k, int((difference > 0).sum()), int((difference < 0).sum()))
    return torch.cat([difference.topk(k).indices, (-difference).topk(k).indices])
''',
    "the formula as it stands": '''
def bradley_terry_loss(reward_chosen, reward_rejected):
    return -torch.log(torch.sigmoid(reward_chosen - reward_rejected))
''',
    "the mean": '''
def bradley_terry_loss(reward_chosen, reward_rejected):
    return torch.nn.functional.softplus(reward_rejected - reward_chosen).mean()
''',
}


def results_of(code, monkeypatch):
    """As pytest_of, with this code as mine.py, within this process: no second start of torch."""
    mine = types.ModuleType("mine")
    exec(code, mine.__dict__)
    monkeypatch.setitem(sys.modules, "mine", mine)
    names, _ = run_code(read("exercises/test_mine.py"), "exercises/test_mine.py")
    tests = [test for name, test in names.items() if name.startswith("test_")]
    failed = 0
    for test in tests:
        try:
            test()
        except Exception:
            failed += 1
    return len(tests) - failed, failed


def test_the_two_ways_to_run_the_exercise_agree(monkeypatch):
    assert results_of(OWN, monkeypatch) == (16, 0)


@pytest.mark.parametrize("what", WRONG)
def test_the_exercise_is_red_with_a_mistake_that_is_easily_made(what, monkeypatch):
    passed, failed = results_of(OWN + "\nimport torch\n" + WRONG[what], monkeypatch)
    assert passed >= 10 and failed >= 1
