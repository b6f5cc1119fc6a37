"""Stage 5: sampling against softmax and generate, the curve against all subsets, files against the reward model."""

import importlib
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_one_line_error, command, save_rows

from parts import report

stage1, stage3, stage5 = (importlib.import_module(n) for n in ("01_extract", "03_train_head", "05_best_of_n"))
PROMPTS = ["Is water wet?", "Which colour has the sky on a clear day?", [{"role": "user", "content": "One two three?"}]]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def policy(request, tmp_path_factory):
    """Output weights of its own: a random Gemma would say the prompt's last token for ever."""
    folder = tmp_path_factory.mktemp("policy") / request.param
    return stage1.load_backbone(tiny.save_model(folder, request.param, tie_word_embeddings=False))


# ---------------------------------------------------------------- sampling

def frequencies(logits, temperature=1.0, top_p=1.0, n=20_000):
    """How often draw() takes each token when the uniform numbers lie evenly."""
    uniform = (torch.arange(n) + 0.5) / n
    return torch.bincount(stage5.draw(torch.tensor(logits).expand(n, -1), uniform, temperature, top_p), minlength=len(logits)) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_are_as_frequent_as_softmax_says(temperature):
    logits = [0.3, -1.0, 2.0, 0.3, -30.0]
    weights = [math.exp(x / temperature) for x in logits]
    assert frequencies(logits, temperature).tolist() == pytest.approx([w / sum(weights) for w in weights], abs=2e-4)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p):
    p = [0.05, 0.4, 0.15, 0.3, 0.1]
    kept, mass = [], 0.0
    for i in sorted(range(5), key=lambda i: -p[i]):
        if mass < top_p:
            kept, mass = [*kept, i], mass + p[i]
    expected = [p[i] / mass if i in kept else 0 for i in range(5)]
    assert frequencies([math.log(x) for x in p], top_p=top_p).tolist() == pytest.approx(expected, abs=2e-4)
    ends = stage5.draw(torch.tensor(p).log().expand(2, -1), torch.tensor([0.0, 1 - 2**-24]), 1.0, top_p)
    assert ends.tolist() == [kept[0], kept[-1]]              # the first and the last number that torch.rand can give


def test_four_equal_tokens_and_top_p_a_half_keep_two_and_temperature_0_takes_the_largest():
    assert frequencies([0.0] * 4, top_p=0.5).tolist() == pytest.approx([0.5, 0.5, 0, 0])
    assert frequencies([0.1, 0.3, 0.2], temperature=0).tolist() == [0, 1, 0]


def test_greedy_candidates_are_what_generate_gives(policy):
    for prompt in PROMPTS:
        ids = torch.tensor([stage5.prompt_ids(policy.tokenizer, prompt)])
        out = policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0,
                                    eos_token_id=sorted(stage5.stop_ids(policy)))
        expected = policy.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()
        assert len(expected) > 20
        assert stage5.sample_candidates(policy, prompt, 3, temperature=0, max_new_tokens=24)[0] == [expected] * 3


def test_a_candidate_depends_on_its_number_and_the_seed_alone(policy):
    sampled = lambda n, seed=0: stage5.sample_candidates(policy, PROMPTS[1], n, temperature=0.7, max_new_tokens=16, seed=seed)[0]
    four = sampled(4)
    assert sampled(2) == four[:2] and sampled(4) == four and len(set(four)) == 4 and not set(sampled(4, seed=1)) & set(four)


def test_every_candidate_prompt_and_seed_has_its_own_uniform_numbers(backbone_of, monkeypatch):
    seen = []
    monkeypatch.setattr(stage5, "draw", lambda logits, uniform, *_: seen.append(uniform) or torch.full(uniform.shape, 9))
    for prompt, seed in itertools.product(PROMPTS[:2], (0, 1)):
        stage5.sample_candidates(backbone_of("llama"), prompt, 200, max_new_tokens=2, seed=seed)
    u = torch.cat(seen)                                     # 2 prompts · 2 seeds · 2 steps · 200 candidates
    assert len(u.unique()) > 1595 and abs(u.mean() - 0.5) < 0.03 and abs(u[1:] - u[:-1]).mean() > 0.3


def test_an_answer_ends_at_the_mark_that_closes_a_turn(backbone_of, monkeypatch):
    backbone = backbone_of("llama")
    end = backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")
    script = iter([[40, 41], [end, 42], [43, 44], [45, backbone.tokenizer.eos_token_id], [46, 47]])
    monkeypatch.setattr(stage5, "draw", lambda *_: torch.tensor(next(script)))
    expected = [backbone.tokenizer.decode(ids).strip() for ids in ([40], [41, 42, 44])]
    assert stage5.sample_candidates(backbone, "a", 2, max_new_tokens=9)[0] == expected and next(script) == [46, 47]


def head_on(backbone, token, layer=1):
    """A RewardModel with a random linear head."""
    g = torch.Generator().manual_seed(1)
    tensors = {"directions": torch.randn(6, tiny.WIDTH, generator=g), "mean": torch.zeros(6), "std": torch.ones(6),
               "w1": torch.randn(6, generator=g), "b1": torch.zeros(1), "temperature": torch.ones(1)}
    return stage3.RewardModel(tensors, {"layer": layer, "token": token, "max_length": 256}, backbone)


ANSWERS = ["It is.", "It is blue, surely not green.", "", "Yes", "One two three four five six seven eight nine ten."]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["first", "second", "messages"])
@pytest.mark.parametrize("family, token", [("llama", "last"), ("llama", "eot"), ("llama", "content"), ("llama", "mean"), ("gpt2", "last"),
                                           ("gpt_neox", "last"), ("phi", "content"), ("gemma2", "last"), ("mistral", "last")])
def test_rewards_read_off_the_sampling_are_those_of_a_pass_of_its_own(family, token, prompt, backbone_of, monkeypatch):
    """Answers of different lengths: one empty, one cut off by max_new_tokens, one whose tokens are not those of its text."""
    backbone = backbone_of(family)
    reward, end = head_on(backbone, token), backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = [backbone.tokenizer(text, add_special_tokens=False)["input_ids"] + [end] for text in ANSWERS]
    said.append([backbone.tokenizer.convert_tokens_to_ids(c) for c in "Is"] + [end])            # I, s: its text is one token
    steps = max(map(len, said)) - 1                                     # the longest is cut before its end mark
    script = iter([[(ids + [end] * steps)[i] for ids in said] for i in range(steps)])
    monkeypatch.setattr(stage5, "draw", lambda *_: torch.tensor(next(script)))
    texts, sampled = stage5.sample_candidates(backbone, prompt, len(said), max_new_tokens=steps)
    assert texts == [*ANSWERS, "Is"]
    scores, reasons = stage5.score_sampled(reward, prompt, texts, sampled)
    own = reward.score([prompt] * len(texts), texts)
    assert scores == pytest.approx(own, abs=1e-4 * torch.tensor(own).std().item() + 1e-5)
    ordinary = {"mean": {"token rule mean": 6}}.get(token) or (
        {"a sliding window evicts keys": 6} if family in ("gemma2", "mistral") else {"empty": 1, "tokenised anew it differs": 1})
    assert reasons == ordinary


# ---------------------------------------------------------------- the curve

@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), min_size=1, max_size=8))
def test_the_curve_is_the_average_over_all_subsets(rows):
    scores, values = zip(*rows)
    curve = stage5.best_of_curve(scores, values)
    assert set(curve) == {m for m in (1, 2, 4, 8) if m <= len(rows)} | {len(rows)}
    for m, found in curve.items():
        winners = [[v for s, v in some if s == max(some)[0]] for some in itertools.combinations(rows, m)]       # ties: any of them
        assert found == pytest.approx(sum(sum(w) / len(w) for w in winners) / len(winners))


def test_choosing_one_of_one_costs_nothing_and_of_four_at_most_0_636_nats():
    assert stage5.kl_bound(1) == 0 and stage5.kl_bound(4) == pytest.approx(1.386294 - 0.75, abs=1e-6)


def test_the_oracle_is_never_below_the_reward_and_each_m_counts_the_prompts_with_as_many_candidates():
    rng = torch.Generator().manual_seed(0)
    rows = [{"scores": torch.rand(n, generator=rng).tolist(), "labels": torch.randint(2, (n,), generator=rng).tolist()}
            for n in (6,) * 9 + (3,)]
    found = stage5.curve_of(rows)
    assert found["prompts"] == 10 and found["n"] == 6 and {m: c["prompts"] for m, c in found["curve"].items()} == {1: 10, 2: 10, 4: 9, 6: 9}
    assert all(c["oracle"] >= c["label"] for c in found["curve"].values())
    first, last = found["curve"][1], found["curve"][6]
    assert first["label"] == pytest.approx(first["oracle"]) == pytest.approx(sum(sum(r["labels"]) / len(r["labels"]) for r in rows) / 10)
    top, random_pick = stage5.top_of(rows)
    assert random_pick == pytest.approx(first["label"])
    assert top == pytest.approx(sum(r["labels"][r["scores"].index(max(r["scores"]))] for r in rows) / 10)
    assert last["label"] == pytest.approx(sum(r["labels"][r["scores"].index(max(r["scores"]))] for r in rows[:9]) / 9)
    assert "label" not in stage5.curve_of([{"scores": [1.0]}])["curve"][1]


# ---------------------------------------------------------------- the commands

@pytest.fixture
def at(finished, tmp_path):
    """Paths: head (of the finished run), out, dropped, and a file to fill."""
    return SimpleNamespace(head=finished / "reward_head.safetensors", out=tmp_path / "out.jsonl", curve=tmp_path / "out.curve.json",
                           dropped=tmp_path / "out.dropped.jsonl", part=tmp_path / "out.jsonl.part", file=tmp_path / "rows.jsonl")


@pytest.fixture(scope="module")
def reward(finished):
    return stage3.RewardModel.load(finished / "reward_head.safetensors")


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def call(at, name, rows, *args):
    """A command of stage 5 on a file of rows → exit code, stdout, stderr."""
    flag = {"sample": "--prompts", "rank": "--candidates", "pairs": "--candidates", "filter": "--filter"}[name]
    arguments = "pairs" if name == "filter" else name, flag, save_rows(at.file, rows), "--reward", at.head, "--out", at.out
    return command("05_best_of_n", *arguments, *args)


def done(at, *args):
    """The rows that a command wrote."""
    code, _, err = call(at, *args)
    assert code == 0, err
    return read(at.out)


SHORT = ["--n", 3, "--max-new-tokens", 8]


def test_sample_scores_n_candidates_a_prompt_and_names_the_best(at, reward, folder_of):
    for policy in ([], ["--policy", folder_of("gpt2")]):
        rows = done(at, "sample", [{"prompt": p} for p in [*PROMPTS, PROMPTS[0]]], *SHORT, *policy)
        assert [r["prompt"] for r in rows] == PROMPTS and rows[0]["policy"] == (policy or ["", reward.meta["model"]])[1]
        for row in rows:
            assert row["scores"] == pytest.approx(reward.score([row["prompt"]] * 3, row["candidates"]), abs=1e-4)
            assert row["best"] == row["candidates"][max(range(3), key=row["scores"].__getitem__)]
            assert row["settings"] == {"n": 3, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 8, "seed": 0}
        curve = json.loads(at.curve.read_text())["curve"]
        assert curve["3"]["reward"] == pytest.approx(sum(max(r["scores"]) for r in rows) / 3)


@pytest.mark.parametrize("cut", ['"candidates"', "–"], ids=["between values", "within a character"])
def test_a_killed_sample_run_goes_on_and_ends_with_the_same_file(cut, at, monkeypatch):
    prompts = [{"prompt": f"{p}, case {i} – now?"} for i, p in enumerate(PROMPTS[:2] * 2)]
    done(at, "sample", prompts, *SHORT)
    whole, curve = at.out.read_bytes(), at.curve.read_bytes()
    lines = whole.splitlines(keepends=True)
    at.part.write_bytes(b"".join(lines[:2]) + lines[2][:lines[2].index(cut.encode()) + 1])
    at.out.unlink(), at.curve.unlink()
    sampled, sample = [], stage5.sample_candidates
    monkeypatch.setattr(stage5, "sample_candidates", lambda policy, prompt, **kw: sampled.append(prompt) or sample(policy, prompt, **kw))
    again = ("sample", "--prompts", at.file, "--reward", at.head, "--out", at.out, *SHORT)
    for expected in ([p["prompt"] for p in prompts[2:]], []):          # the second time, all is there
        with tiny.argv(*again):
            stage5.main()
        assert sampled == expected and at.out.read_bytes() == whole and at.curve.read_bytes() == curve and not at.part.exists()
        sampled.clear()
    with tiny.argv(*again, "--seed", 1):
        stage5.main()
    assert len(sampled) == 4 and at.out.read_bytes() != whole


CANDIDATES = [{"prompt": PROMPTS[0], "candidates": ["It is.", "No, ten.", "surely green.", "yes"], "labels": [1, 0, 0, 1]},
              {"prompt": PROMPTS[2], "candidates": ["One.", "blue bile", "Yes, it is.", "seven"], "labels": [0, 0, 1, 0]}]


def test_rank_orders_by_the_reward_and_gives_the_accuracy_where_there_are_labels(at, reward):
    rows = done(at, "rank", CANDIDATES)
    for row, source in zip(rows, CANDIDATES, strict=True):
        scores = reward.score([source["prompt"]] * 4, source["candidates"])
        assert {n: row[n] for n in source} == source and row["scores"] == pytest.approx(scores, abs=1e-4)
        assert row["ranking"] == sorted(range(4), key=lambda i: -scores[i]) and row["best"] == source["candidates"][row["ranking"][0]]
    curve = json.loads(at.curve.read_text())["curve"]
    assert curve["4"]["label"] == sum(r["labels"][r["ranking"][0]] for r in rows) / 2
    assert curve["1"]["label"] == 3 / 8 and curve["4"]["oracle"] == 1
    assert at.curve.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("labelled", [True, False])
def test_the_picture_shows_the_numbers_of_the_curve(labelled):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    rows = [{"scores": [0.5, -1, 2, 0], "labels": [1, 0, 0, 1]} if labelled else {"scores": [0.5, -1, 2, 0]}]
    curve, axes = stage5.curve_of(rows)["curve"], figure.subplots()
    report.best_of_plot(axes, curve)
    drawn = [list(line.get_ydata()) for line in axes.get_lines()]
    names = ("label", "oracle") if labelled else ("reward",)
    assert drawn[:len(names)] == [[row[name] for row in curve.values()] for name in names]
    assert len(drawn) == (3 if labelled else 1) and (not labelled or drawn[2] == [0.5, 0.5])


def test_a_candidate_that_is_too_long_is_ranked_last_and_said_so(at, reward):
    rows = [CANDIDATES[0], {"prompt": "long", "candidates": ["blue " * 3000, "It is."]}]
    code, out, err = call(at, "rank", rows)
    found = read(at.out)
    assert code == 0 and "1 prompts have a candidate that is too long" in out, err
    assert found[1]["scores"][0] is None and found[1]["ranking"] == [1, 0] and found[1]["best"] == "It is."
    assert json.loads(at.curve.read_text())["prompts"] == 1
    assert_one_line_error(call(at, "rank", rows[1:]), "longer than")


def test_rows_of_a_prompt_and_a_response_are_grouped(at):
    flat = [{"prompt": r["prompt"], "response": r["candidates"][i], "id": f"{n}.{i}"} for i in range(4) for n, r in enumerate(CANDIDATES)]
    rows = done(at, "rank", flat)
    assert [r["candidates"] for r in rows] == [r["candidates"] for r in CANDIDATES] and rows[1]["ids"] == ["1.0", "1.1", "1.2", "1.3"]
    assert [r["scores"] for r in rows] == [pytest.approx(r["scores"], abs=1e-4) for r in done(at, "rank", CANDIDATES)]


def test_pairs_are_the_best_against_the_worst_by_this_reward_and_not_by_scores_of_another(at, reward):
    rows = done(at, "pairs", [CANDIDATES[0], CANDIDATES[1] | {"scores": [9.0, 8.0, 7.0, 6.0]},
                              {"prompt": "a", "candidates": ["b", "", "b"]}])
    assert len(rows) == 2
    for row, source in zip(rows, CANDIDATES):
        scores = dict(zip(source["candidates"], reward.score([source["prompt"]] * 4, source["candidates"])))
        best, worst = max(scores, key=scores.get), min(scores, key=scores.get)
        assert row["chosen"] == [{"role": "assistant", "content": best}] and row["rejected"] == [{"role": "assistant", "content": worst}]
        assert row["margin"] == pytest.approx(scores[best] - scores[worst], abs=1e-3) == row["score_chosen"] - row["score_rejected"]
        assert row["prompt"][0] == {"role": "user", "content": "Is water wet?" if row is rows[0] else "One two three?"}
    assert [(r["id"], "two different" in r["reason"]) for r in read(at.dropped)] == [("2", True)]


def test_plain_gives_strings_and_a_least_margin_drops_with_its_reason(at):
    rows = done(at, "pairs", CANDIDATES, "--plain")             # strings and messages in one file: TRL could not read it
    assert [r["prompt"] for r in rows] == [PROMPTS[0]] and rows[0]["chosen"] in CANDIDATES[0]["candidates"]
    assert "messages" in read(at.dropped)[-1]["reason"]
    margins = [r["margin"] for r in done(at, "pairs", CANDIDATES)]
    middle = sum(margins) / 2
    kept = done(at, "pairs", CANDIDATES, "--min-margin", middle)
    assert [r["margin"] for r in kept] == [max(margins)] and str(middle) in read(at.dropped)[0]["reason"]


def test_a_filter_keeps_what_the_reward_agrees_with_and_gives_a_reason_for_all_else(at, reward):
    source = tiny.make_pairs(20)
    broken = [{"id": "n", "prompt": "a", "chosen": 5, "rejected": "b"}, {"id": "e", "prompt": None, "chosen": None, "rejected": "b"},
              {"id": "t", "prompt": "a", "chosen": "b", "rejected": "b"}]
    kept = done(at, "filter", [*source, *broken], "--plain")
    sides = (reward.score([r["prompt"] for r in source], [r[side] for r in source]) for side in ("chosen", "rejected"))
    agrees = {r["id"]: c > w for r, c, w in zip(source, *sides)}
    assert 0 < len(kept) < 20 and [r["id"] for r in kept] == [i for i, yes in agrees.items() if yes]
    assert all({n: row[n] for n in source[0]} in source and row["margin"] > 0 and "reason" not in row for row in kept)
    dropped = read(at.dropped)
    assert {r["id"] for r in dropped} == {"n", "e", "t"} | {i for i, yes in agrees.items() if not yes} and all(r["reason"] for r in dropped)


# ---------------------------------------------------------------- bad input

def refused(at, *args, words=()):
    result = call(at, *args)
    assert_one_line_error(result, *words)
    assert not at.out.exists() and not at.part.exists()


@pytest.mark.parametrize("row", [
    {"prompt": "a", "candidates": []}, {"prompt": "a", "candidates": ["b", 5]}, {"prompt": "a", "candidates": "bcd"},
    {"prompt": "a", "candidates": 5}, {"prompt": "a", "response": None}, {"prompt": "a"}, {"candidates": ["b"]}, {"response": "b"},
    {"prompt": None, "candidates": ["b"]}, {"prompt": [5], "candidates": ["b"]}, {"prompt": "a", "candidates": ["b"], "labels": [1, 0]},
    {"prompt": "a", "candidates": ["b"], "labels": 1}, {"prompt": "a", "candidates": ["b"], "labels": ["good"]}, [1], 5], ids=json.dumps)
def test_a_row_that_holds_no_candidates_is_one_line_that_names_it(row, at):
    refused(at, "rank", [CANDIDATES[0], row], words=[f"{at.file}:2"])


@pytest.mark.parametrize("row", [{}, {"prompt": " "}, {"prompt": []}, {"prompt": [5]}, {"prompt": [{"role": "user"}]}, 5], ids=json.dumps)
def test_a_row_that_holds_no_prompt_is_one_line_that_names_it(row, at):
    refused(at, "sample", [{"prompt": "a"}, row], words=[f"{at.file}:2"])


@pytest.mark.parametrize("args", [("--n", 0), ("--n", -1), ("--max-new-tokens", 0), ("--temperature", -1), ("--temperature", "nan"),
                                  ("--top-p", 0), ("--top-p", 1.5), ("--limit", 0), ("--limit", -1)], ids=lambda a: f"{a[0]} {a[1]}")
def test_a_setting_that_cannot_sample_is_one_line_that_names_it(args, at):
    refused(at, "sample", [{"prompt": "a"}, {"prompt": "b"}], *args, words=[args[0]])


@pytest.mark.parametrize("name", ["sample", "rank", "pairs", "filter"])
def test_an_empty_file_a_missing_reward_and_another_backbone_are_refused(name, at, folder_of, tmp_path):
    rows = {"sample": [{"prompt": "a"}], "filter": tiny.make_pairs(2)}.get(name, CANDIDATES)
    refused(at, name, rows, "--reward", tmp_path / "none.safetensors", words=["none.safetensors", "03_train_head.py"])
    refused(at, name, rows, "--model", folder_of("gpt2"), words=[folder_of("gpt2"), "backbone"])
    refused(at, name, [], words=[at.file])


def test_pairs_takes_either_candidates_or_a_filter(at):
    refused(at, "pairs", CANDIDATES, "--filter", at.file, words=["--candidates", "--filter"])
    assert_one_line_error(command("05_best_of_n", "pairs", "--reward", at.head), "--candidates", "--filter")


def test_a_head_moved_away_from_its_run_still_ranks(at, tmp_path):
    expected, head = done(at, "rank", CANDIDATES), tmp_path / "moved/head.safetensors"
    head.parent.mkdir()
    shutil.copy(at.head, head)
    assert done(at, "rank", CANDIDATES, "--reward", head) == expected
