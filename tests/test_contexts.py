"""Where directions fire, and the quiz, against naive loops and numbers made by hand."""

import importlib
import json
import math

import numpy as np
import pytest
import tiny
import torch
from tiny import draw, linear_reward

from parts import contexts
from parts.chat import render
from parts.files import UserError
from sae import load_sae

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
WATER = "Is water wet?"


# ---------------------------------------------------------------- the tokens of many responses

@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return load_sae(tiny.save_sae(tmp_path_factory.mktemp("sae") / "sae.safetensors"))


RESPONSES = [({"id": "a", "prompt": WATER, "chosen": "Yes, it is.", "rejected": "No."}, "chosen"),
             ({"id": "a", "prompt": WATER, "chosen": "Yes, it is.", "rejected": "No."}, "rejected"),
             ({"id": "b", "prompt": "q", "chosen": "Nö 🦆.", "rejected": "x"}, "chosen")]
LATENTS = [5, 60, 7, 8]


def states_alone(backbone, pair, side):
    """The hidden states after block 1 of a response's tokens, its text read alone [t, d]."""
    text = render(backbone.tokenizer, pair["prompt"], pair[side])
    output = backbone.model(torch.tensor([text.ids]), output_hidden_states=True)
    return output.hidden_states[2][0, text.first:text.stop]


@pytest.mark.parametrize("pack", ["tree", "pad"])
def test_tokens_read_together_are_those_of_each_text_alone(pack, backbone_of, sae, monkeypatch):
    backbone = backbone_of("gemma2")
    monkeypatch.setattr(backbone, "pack", pack)
    probes = draw(contexts.RANDOM, tiny.WIDTH, seed=9)
    model = linear_reward(backbone, LATENTS)
    found = contexts.read_tokens(model, sae, RESPONSES, probes)
    for n, (pair, side) in enumerate(RESPONSES):
        own = slice(found.borders[n], found.borders[n + 1])
        z = states_alone(backbone, pair, side)
        fires = torch.tensor([[max(0.0, float(row @ sae.W_dec[j])) for j in LATENTS] for row in z])
        torch.testing.assert_close(found.fires[own].float(), fires, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.along[own], z @ probes.T, rtol=1e-3, atol=1e-3)
        assert "".join(found.tokens[own]) == pair[side]
        mean = z.mean(0)
        assert found.at_mean[n].tolist() == [bool(mean @ sae.W_dec[j] > 0) for j in LATENTS]
        [reward] = model.score([pair["prompt"]], [pair[side]])
        assert sum(found.parts[n]) + float(model.head.b1) == pytest.approx(reward, abs=1e-3)


def test_where_the_reward_is_no_sum_over_tokens_they_have_no_parts(backbone_of, sae):
    model = linear_reward(backbone_of("llama"), LATENTS, token="last")
    found = contexts.read_tokens(model, sae, RESPONSES, draw(contexts.RANDOM, tiny.WIDTH))
    assert found.parts == [None] * 3
    assert contexts.read_pairs(found)["b"]["chosen"][0][1] is None


def test_many_tokens_are_read_up_to_a_limit_and_the_first_text_always(
        backbone_of, sae, monkeypatch):
    model = linear_reward(backbone_of("llama"), LATENTS)
    probes = draw(contexts.RANDOM, tiny.WIDTH)
    whole = contexts.read_tokens(model, sae, RESPONSES, probes)
    for limit, texts in ((1, 1), (whole.borders[2], 2), (whole.borders[3], 3)):
        monkeypatch.setattr(contexts, "MOST_TOKENS", int(limit))
        found = contexts.read_tokens(model, sae, RESPONSES, probes)
        assert len(found.responses) == texts
        assert found.tokens == whole.tokens[:whole.borders[texts]]


def test_the_responses_taken_are_whole_pairs_each_text_once_in_any_order_of_the_file():
    pairs = [{"id": f"p{n}", "prompt": "q", "chosen": f"c{n}", "rejected": "r"} for n in range(9)]
    found = contexts.some_responses(pairs, most=5)
    assert contexts.some_responses(pairs[::-1], most=5) == found
    texts = [pair[side] for pair, side in found]
    assert len(set(texts)) == len(texts) == 5 and texts.count("r") == 1
    assert len(contexts.some_responses(pairs)) == 10


def test_a_pair_of_the_page_holds_both_sides_with_the_part_of_each_token(backbone_of, sae):
    model = linear_reward(backbone_of("llama"), LATENTS)
    reading = contexts.read_tokens(model, sae, RESPONSES, draw(contexts.RANDOM, tiny.WIDTH))
    found = contexts.read_pairs(reading)
    assert found["a"].keys() == {"prompt", "chosen", "rejected"}
    assert found["b"].keys() == {"prompt", "chosen"}
    tokens = model.tokens(WATER, "No.")
    assert [token for token, _ in found["a"]["rejected"]] == tokens["tokens"]
    parts = [part for _, part in found["a"]["rejected"]]
    assert parts == pytest.approx(tokens["parts"], abs=1e-3)


# ---------------------------------------------------------------- contexts of a direction

# texts, and how strongly a direction fires on their tokens
TEXTS = {"a": "0 0 5 1", "b": "2 2 2", "c": "0 0", "d": "9 0 0", "e": "0 3", "f": "0"}


def reading_of(texts, tokens=None):
    """A Reading of texts whose tokens are called a0, a1, … → (Reading, values [T])."""
    rows = [list(map(float, values.split())) for values in texts.values()]
    values = np.concatenate(rows)
    names = tokens or [f"{name}{n}" for name, row in zip(texts, rows) for n in range(len(row))]
    responses = [({"id": name, "prompt": f"q{name}"}, "chosen") for name in texts]
    fires = torch.tensor(values)[:, None]
    return contexts.Reading(responses, np.cumsum([0, *map(len, rows)]), names, fires,
                            torch.zeros(len(values), contexts.RANDOM),
                            torch.zeros(len(rows), 1, dtype=torch.bool), [None] * len(rows)), values


def ids(windows):
    return [window["id"] for window in windows]


def test_contexts_are_the_strongest_the_middling_and_the_silent_texts():
    reading, values = reading_of(TEXTS)
    found = contexts.contexts(reading, values, 2)
    assert ids(found["top"]) == ["d", "a"]          # 9, 5
    assert ids(found["middle"]) == ["b", "e"]       # the median of 1, 2, 2, 2, 3, 5, 9 is 2
    assert ids(found["none"]) == ["c", "f"]
    assert found["top"][1]["heat"] == [["a0", 0.0], ["a1", 0.0], ["a2", 5.0], ["a3", 1.0]]
    assert found["top"][1]["prompt"] == "qa"


def test_a_direction_that_never_fires_has_only_silent_contexts():
    reading, values = reading_of({"a": "0 0", "b": "0"})
    found = contexts.contexts(reading, values, 3)
    assert (found["top"], found["middle"], ids(found["none"])) == ([], [], ["a", "b"])


@pytest.mark.parametrize("at, first, last, cut", [
    (0, 0, 12, [False, True]), (20, 8, 32, [True, True]), (38, 26, 39, [True, False])])
def test_a_context_shows_twelve_tokens_on_either_side(at, first, last, cut):
    values = ["0"] * 40
    values[at] = "1"
    reading, values = reading_of({"x": "0 0", "a": " ".join(values), "y": "0 0"})
    [window] = contexts.contexts(reading, values, 1)["top"]
    assert [token for token, _ in window["heat"]] == [f"a{n}" for n in range(first, last + 1)]
    assert window["cut"] == cut


def test_the_histogram_counts_the_tokens_on_which_a_direction_fires():
    reading, values = reading_of({"a": "1 2 0 1", "b": "5 0 0 0"},
                                 tokens=["no", "no", "no", " yes", "so", "x", "y", "z"])
    found = contexts.histogram(reading, values, most=2)
    assert found["rate"] == 4 / 8
    assert (found["different"], found["entropy"]) == (3, 1.5)       # of 1/2, 1/4, 1/4
    assert found["top"] == [["no", 1 / 2], [" yes", 1 / 4]]


def test_the_agreement_of_mean_and_tokens_is_a_share_of_the_texts():
    reading, _ = reading_of(TEXTS)
    reading.at_mean = torch.tensor([[True], [False], [True], [True], [False], [False]])
    found = contexts.agreement(reading, 0)
    assert found == {"mean": 3 / 6, "token": 4 / 6, "both": 2 / 6}


# ---------------------------------------------------------------- the quiz

def some_reading(texts, seed, latents=3):
    """Random tokens; a latent fires on one in twenty, more strongly on some."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 60, texts)
    total = int(lengths.sum())
    fires = rng.random((total, latents)) * (rng.random((total, latents)) < 0.05)
    tokens = [f" {seed}.{n}" for n in range(total)]
    responses = [({"id": f"{seed}.{n}", "prompt": "q"}, "chosen") for n in range(texts)]
    along = torch.tensor(rng.standard_normal((total, contexts.RANDOM)))
    return contexts.Reading(responses, np.cumsum([0, *lengths]), tokens, torch.tensor(fires),
                            along, torch.zeros(texts, latents, dtype=torch.bool), [None] * texts)


@pytest.fixture(scope="module")
def made():
    """(train, test, the quiz on three latents)."""
    train, test = some_reading(150, 1), some_reading(150, 2)
    rows = [{"latent": 100 + n} for n in range(3)]
    return train, test, contexts.quiz(rows, range(3), train, test, 2)


def fires_in(snippet, reading, values):
    """The tokens of a snippet are numbered: does a direction fire on one of them?"""
    places = [reading.tokens.index(f" {word}") for word in snippet.split()]
    assert places == list(range(places[0], places[0] + contexts.SNIPPET))
    return any(values[place] > 0 for place in places)


def test_a_latent_fires_in_four_snippets_of_a_task_and_another_in_the_odd_one(made):
    _, test, found = made
    quizzed = [row for row in found["directions"] if row["latent"] is not None]
    assert sorted(row["latent"] for row in quizzed) == [100, 101, 102]
    for row in quizzed:
        assert len(row["tasks"]) == contexts.TASKS
        for task in row["tasks"]:
            fires = [fires_in(snippet, test, test.fires[:, row["latent"] - 100])
                     for snippet in task["snippets"]]
            assert fires == [n != task["odd"] for n in range(5)]


def test_no_snippet_stands_in_two_tasks_of_a_direction_and_all_are_of_test_texts(made):
    _, test, found = made
    for row in found["directions"]:
        texts = [snippet for task in row["tasks"] for snippet in task["snippets"]]
        assert len(set(texts)) == len(texts)
        assert all(text.startswith(" 2.") for text in texts)
        for end in ("top", "middle", "none"):
            assert all(context["id"].startswith("1.") for context in row["contexts"][end])


def test_the_random_directions_of_the_quiz_fire_as_often_as_the_latents(made):
    train, _, found = made
    assert [row["latent"] for row in found["directions"]].count(None) == contexts.RANDOM
    rate = float(np.median((train.fires > 0).double().mean(0)))
    for n in range(contexts.RANDOM):
        border = float(train.along[:, n].quantile(1 - rate))
        assert float((train.along[:, n] > border).double().mean()) == pytest.approx(rate, abs=0.002)


def test_the_odd_snippet_is_anywhere_and_the_directions_in_another_order(made):
    _, _, found = made
    places = {task["odd"] for row in found["directions"] for task in row["tasks"]}
    assert places == set(range(5))
    order = [row["latent"] for row in found["directions"]]
    assert order != [100, 101, 102, None, None, None]


def test_a_direction_with_too_few_snippets_gives_no_tasks():
    train, test = some_reading(150, 1), some_reading(150, 2)
    test.fires[:, 0] = 0
    test.fires[5, 0] = 1
    rows = [{"latent": n} for n in range(3)]
    found = contexts.quiz(rows, range(3), train, test, 2)
    assert 0 not in [row["latent"] for row in found["directions"]]


def test_of_many_snippets_those_are_taken_in_which_a_direction_fires_most():
    strongest = np.arange(100.0)
    strongest[:20] = 0
    tasks = contexts.make_tasks(strongest, np.ones(100, bool), np.random.default_rng(0))
    assert len(tasks) == contexts.TASKS
    on = sorted(n for some, odd in tasks for place, n in enumerate(some) if place != odd)
    assert on == list(range(60, 100))
    assert all(some[odd] < 20 for some, odd in tasks)


# ---------------------------------------------------------------- names

NAMED = [{"index": 7, "description": "refusals", "right": 8, "tasks": 10},
         {"index": "12", "description": "numbers"}]
WANTED = {7: {"name": "refusals", "right": 8, "tasks": 10},
          12: {"name": "numbers", "right": None, "tasks": None}}


@pytest.mark.parametrize("text", [
    json.dumps({"sae": "s", "layer": 1, "names": NAMED, "null": {"right": 6, "tasks": 30}}),
    json.dumps({"names": NAMED}, indent=1),
    json.dumps(NAMED),
    "\n".join(map(json.dumps, NAMED)) + "\n",
])
def test_names_are_read_as_the_page_saves_them_and_as_rows(text, tmp_path):
    path = tmp_path / "names.json"
    path.write_text(text)
    assert contexts.read_names(path) == WANTED


def test_two_descriptions_of_one_latent_are_both_kept(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps([{"index": 7, "description": name} for name in "ab"]))
    assert contexts.read_names(path)[7]["name"] == "a / b"


@pytest.mark.parametrize("saved, says", [
    ({"sae": "other.safetensors", "layer": 1}, "of sae other"), ({"layer": 2}, "of layer 2")])
def test_names_of_another_sae_or_layer_are_refused(saved, says, tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({**saved, "names": NAMED}))
    meta = {"sae": "/somewhere/own.safetensors", "layer": 1}
    with pytest.raises(UserError, match=says):
        contexts.read_names(path, meta)
    path.write_text(json.dumps({"sae": "own.safetensors", "layer": 1, "names": NAMED}))
    assert contexts.read_names(path, meta) == WANTED


@pytest.mark.parametrize("text, says", [
    (None, "file not found"), ("{", "not a file of names"), ("[1]", "not a file of names"),
    ('[{"index": 7}]', "KeyError"), ('{"name": []}', "KeyError"),
])
def test_what_holds_no_names_is_one_line_in_three_parts(text, says, tmp_path):
    path = tmp_path / "names.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as refusal:
        contexts.read_names(path)
    assert str(refusal.value).count(" · ") == 2


def test_the_head_loads_names_and_gives_them_in_its_explanations(finished, tmp_path):
    path = tmp_path / "names.json"
    head = finished / "reward_head.safetensors"
    latent = int(stage3.load_stage(head)[0]["latents"][0])
    path.write_text(json.dumps([{"index": latent, "description": "wet things"}]))
    model = stage3.RewardModel.load(head, names=path)
    rows = model.explain(WATER, "Yes.")["contributions"]
    assert {row["latent"]: row["name"] for row in rows}[latent] == "wet things"
    assert math.isclose(sum(row["contribution"] for row in rows) + float(model.head.b1),
                        model.score([WATER], ["Yes."])[0], abs_tol=1e-3)
