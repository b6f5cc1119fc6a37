"""Stage 5: sampling against softmax and generate, the curve against all subsets, files against the
reward model."""

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
from parts.chat import prompt_ids
from parts.sampled import score_sampled

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
stage5 = importlib.import_module("05_best_of_n")
PROMPTS = [
    "Is water wet?",
    "Which colour has the sky on a clear day?",
    [{"role": "user", "content": "One two three?"}],
]


# ---------------------------------------------------------------- drawing a token

def frequencies(logits, temperature=1.0, top_p=1.0, n=20_000):
    """How often draw() takes each token when the uniform numbers lie evenly."""
    uniform = (torch.arange(n) + 0.5) / n
    tokens = stage5.draw(torch.tensor(logits).expand(n, -1), uniform, temperature, top_p)
    return (torch.bincount(tokens, minlength=len(logits)) / n).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_are_as_frequent_as_softmax_says(temperature):
    logits = [0.3, -1.0, 2.0, 0.3, -30.0]
    weights = [math.exp(x / temperature) for x in logits]
    softmax = [weight / sum(weights) for weight in weights]
    assert frequencies(logits, temperature) == pytest.approx(softmax, abs=2e-4)


P = [0.05, 0.4, 0.15, 0.3, 0.1]
NUCLEUS = {                             # top_p → the smallest set of P that has this mass
    0.01: [1],
    0.3: [1],
    0.6: [1, 3],
    0.9: [1, 3, 2, 4],
    0.999: [1, 3, 2, 4, 0],
}


@pytest.mark.parametrize("top_p", NUCLEUS)
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p):
    kept = NUCLEUS[top_p]
    mass = sum(P[token] for token in kept)
    expected = [P[token] / mass if token in kept else 0 for token in range(5)]
    logits = [math.log(p) for p in P]
    assert frequencies(logits, top_p=top_p) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("top_p", NUCLEUS)
def test_the_ends_of_the_uniform_numbers_draw_the_ends_of_the_nucleus(top_p):
    ends_of_rand = torch.tensor([0.0, 1 - 2**-24])
    found = stage5.draw(torch.tensor(P).log().expand(2, -1), ends_of_rand, 1.0, top_p)
    assert found.tolist() == [NUCLEUS[top_p][0], NUCLEUS[top_p][-1]]


def test_of_four_equal_tokens_top_p_a_half_keeps_two():
    assert frequencies([0.0] * 4, top_p=0.5) == pytest.approx([0.5, 0.5, 0, 0])


def test_temperature_0_takes_the_largest():
    assert frequencies([0.1, 0.3, 0.2], temperature=0) == [0, 1, 0]


# ---------------------------------------------------------------- sampling

@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def policy(request, tmp_path_factory):
    """Output weights of its own: a random Gemma would say the prompt's last token for ever."""
    folder = tmp_path_factory.mktemp("policy") / request.param
    model = tiny.save_model(folder, request.param, tie_word_embeddings=False)
    return stage1.load_backbone(model)


def sampled_texts(backbone, prompt, n, **settings):
    """The answers of sample_candidates to one prompt."""
    texts, _ = stage5.sample_candidates(backbone, [prompt], n, **settings)
    return texts


@pytest.mark.parametrize("prompt", PROMPTS, ids=["first", "second", "messages"])
def test_greedy_candidates_are_what_generate_gives(prompt, policy):
    ids = torch.tensor([prompt_ids(policy.tokenizer, prompt)])
    stop = sorted(stage5.stop_ids(policy))
    out = policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                max_new_tokens=24, pad_token_id=0, eos_token_id=stop)
    answer = policy.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()
    assert len(answer) > 20
    found = sampled_texts(policy, prompt, 3, temperature=0, max_new_tokens=24)
    assert found == [answer] * 3


SETTINGS = {"temperature": 0.7, "max_new_tokens": 16}


def test_the_same_seed_samples_the_same_candidates(policy):
    four = sampled_texts(policy, PROMPTS[1], 4, **SETTINGS)
    assert sampled_texts(policy, PROMPTS[1], 4, **SETTINGS) == four


def test_a_candidate_does_not_depend_on_how_many_there_are(policy):
    four = sampled_texts(policy, PROMPTS[1], 4, **SETTINGS)
    assert sampled_texts(policy, PROMPTS[1], 2, **SETTINGS) == four[:2]


def test_candidates_do_not_depend_on_the_prompts_that_share_their_pass(policy):
    together, _ = stage5.sample_candidates(policy, PROMPTS, 4, **SETTINGS)
    alone = [sampled_texts(policy, prompt, 4, **SETTINGS) for prompt in PROMPTS]
    assert together == sum(alone, [])


def test_an_answer_is_cut_at_the_most_new_tokens(policy):
    _, long = stage5.sample_candidates(policy, PROMPTS, 4, **SETTINGS)
    _, cut = stage5.sample_candidates(policy, PROMPTS, 4, **SETTINGS | {"max_new_tokens": 5})
    assert cut.rows == [row[:5] for row in long.rows]
    assert not any(ended for ended, row in zip(cut.ended, long.rows) if len(row) >= 5)
    assert not all(cut.ended)


def test_candidates_and_seeds_differ(policy):
    of_two_seeds = [sampled_texts(policy, PROMPTS[1], 4, **SETTINGS, seed=seed) for seed in (0, 1)]
    assert len({text for four in of_two_seeds for text in four}) == 8


def test_every_candidate_prompt_and_seed_has_its_own_uniform_numbers():
    some = [stage5.uniform_numbers(prompt, 200, 2, seed)
            for prompt in PROMPTS[:2] for seed in (0, 1)]
    u = torch.cat(some).flatten()
    assert len(u.unique()) > 1595                               # of 1600
    assert abs(u.mean() - 0.5) < 0.03
    assert (u[1:] - u[:-1]).abs().mean() > 0.3                  # 1/3 where they are independent


def test_the_uniform_numbers_of_sampling_are_those_of_each_step(backbone_of, monkeypatch):
    seen = []

    def noted(logits, uniform, *_):
        seen.append(uniform)
        return torch.full(uniform.shape, 9)
    monkeypatch.setattr(stage5, "draw", noted)
    stage5.sample_candidates(backbone_of("llama"), PROMPTS[:2], 5, max_new_tokens=3, seed=4)
    expected = torch.cat([stage5.uniform_numbers(prompt, 5, 3, 4) for prompt in PROMPTS[:2]])
    assert torch.equal(torch.stack(seen, 1), expected)


def sampling_says(monkeypatch, steps):
    """Let draw() give these tokens, a list a step."""
    left = iter(steps)

    def drawn(*_):
        return torch.tensor(next(left))
    monkeypatch.setattr(stage5, "draw", drawn)
    return left


def test_an_answer_ends_at_the_mark_that_closes_a_turn(backbone_of, monkeypatch):
    backbone = backbone_of("llama")
    end = backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")
    eos = backbone.tokenizer.eos_token_id
    steps = [[40, 41], [end, 42], [43, 44], [45, eos], [46, 47]]
    left = sampling_says(monkeypatch, steps)
    expected = [backbone.tokenizer.decode(ids).strip() for ids in ([40], [41, 42, 44])]
    assert sampled_texts(backbone, "a", 2, max_new_tokens=9) == expected
    assert next(left) == [46, 47]                   # nothing is sampled once all have ended


# ---------------------------------------------------------------- scored while sampling

def head_on(backbone, token, normalise="none"):
    """A RewardModel with a random linear head on block 1."""
    g = torch.Generator().manual_seed(1)
    tensors = {
        "directions": torch.randn(6, tiny.WIDTH, generator=g), "mean": torch.zeros(6),
        "std": torch.ones(6), "w1": torch.randn(6, generator=g), "b1": torch.zeros(1),
        "temperature": torch.ones(1), "range": torch.ones(1),
    }
    meta = {"layer": 1, "token": token, "max_length": 256, "normalise": normalise,
            "norm_eps": 1e-6}
    return stage3.RewardModel(tensors, meta, backbone)


ANSWERS = ["It is.", "It is blue, surely not green.", "", "Yes",
           "One two three four five six seven eight nine ten.",
           "Is"]            # said as I, s: its text is one token
ONE_OF_SIX = {"tokenised anew it differs": 1}
EVICTED = ONE_OF_SIX | {"a sliding window evicts keys": 4}
READ_OFF = [
    ("llama", "mean", ONE_OF_SIX), ("llama", "last", ONE_OF_SIX), ("llama", "eot", ONE_OF_SIX),
    ("llama", "content", ONE_OF_SIX), ("gpt2", "mean", ONE_OF_SIX), ("gpt2", "last", ONE_OF_SIX),
    ("gpt_neox", "mean", ONE_OF_SIX), ("gpt_neox", "last", ONE_OF_SIX),
    ("phi", "content", ONE_OF_SIX),
    ("mistral", "last", EVICTED), ("gemma2", "last", EVICTED),
]


def steps_that_say_the_answers(tokenizer, prompts):
    """ANSWERS to each prompt as the tokens of each step; the last step ends the longest."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ANSWERS[:-1]]
    said.append(tokenizer.convert_tokens_to_ids(list(ANSWERS[-1])))
    length = max(map(len, said)) + 1
    padded = [ids + [end] * (length - len(ids)) for ids in said] * prompts
    return [list(step) for step in zip(*padded)]


def sample_the_answers(reward, prompts, monkeypatch, steps=-1):
    """→ (prompt of each row, texts, Sampled) of ANSWERS to each prompt, all in one pass.

    steps: where sampling stops; the default cuts the longest before its end mark, None nothing.
    """
    said = steps_that_say_the_answers(reward.backbone.tokenizer, len(prompts))[:steps]
    sampling_says(monkeypatch, said)
    layer = 1 if reward.meta["token"] == "mean" else None
    texts, sampled = stage5.sample_candidates(reward.backbone, prompts, len(ANSWERS), layer=layer,
                                              max_new_tokens=len(said))
    return [prompt for prompt in prompts for _ in ANSWERS], texts, sampled


def assert_read_off_as_scored(reward, prompts, texts, sampled):
    """The rewards of the sampling are those of a pass of its own → how many were scored anew."""
    scores, outside, why, reasons = score_sampled(reward, prompts, texts, sampled)
    own, own_outside, own_why = reward.score_each(prompts, texts)
    std = float(torch.tensor([score for score in own if score is not None]).std())
    for text, score, wanted in zip(texts, scores, own, strict=True):
        assert score == (pytest.approx(wanted, abs=1e-3 * std) if text else None)
    assert (outside, why) == (own_outside, own_why)
    return reasons


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("family, token, ordinary", READ_OFF)
def test_rewards_read_off_the_sampling_are_those_of_a_pass_of_its_own(
        family, token, ordinary, prompts, backbone_of, monkeypatch):
    reward = head_on(backbone_of(family), token)
    rows, texts, sampled = sample_the_answers(reward, prompts, monkeypatch)
    assert texts == ANSWERS * len(prompts)
    reasons = assert_read_off_as_scored(reward, rows, texts, sampled)
    assert reasons == {reason: count * len(prompts) for reason, count in ordinary.items()}


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2"])
def test_a_window_does_not_hinder_the_mean_of_answers_that_ended(family, backbone_of, monkeypatch):
    reward = head_on(backbone_of(family), "mean")
    rows, texts, sampled = sample_the_answers(reward, PROMPTS, monkeypatch, steps=None)
    assert max(map(len, sampled.rows)) > tiny.WINDOW and all(sampled.ended)
    reasons = assert_read_off_as_scored(reward, rows, texts, sampled)
    assert reasons == {reason: 3 * count for reason, count in ONE_OF_SIX.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_rewards_of_answers_that_are_cut_short_are_read_off_as_well(
        steps, family, backbone_of, monkeypatch):
    reward = head_on(backbone_of(family), "mean")
    rows, texts, sampled = sample_the_answers(reward, PROMPTS, monkeypatch, steps)
    assert max(map(len, sampled.rows)) == steps
    assert_read_off_as_scored(reward, rows, texts, sampled)


def test_rewards_of_vectors_of_one_length_are_read_off_as_well(backbone_of, monkeypatch):
    reward = head_on(backbone_of("llama"), "mean", normalise="rms")
    assert_read_off_as_scored(reward, *sample_the_answers(reward, PROMPTS, monkeypatch))


def test_what_lies_outside_is_told_of_answers_read_off_the_sampling(backbone_of, monkeypatch):
    reward = head_on(backbone_of("llama"), "mean")
    rows, texts, sampled = sample_the_answers(reward, PROMPTS, monkeypatch)
    spoken = [(row, text) for row, text in zip(rows, texts) if text]
    largest = reward.scores_of(reward.hidden(*zip(*spoken))).abs().amax(1)
    reward.range = float(largest.mean())
    _, outside, _, _ = score_sampled(reward, rows, texts, sampled)
    told = [is_outside for is_outside, text in zip(outside, texts) if text]
    assert told == (largest > reward.range).tolist()
    assert {False, True} == set(told)


# ---------------------------------------------------------------- the curve

def best_of_all_subsets(rows, m):
    """Mean value of the best-scored of each subset of m rows (score, value); ties: any of them."""
    found = []
    for some in itertools.combinations(rows, m):
        highest = max(score for score, _ in some)
        winners = [value for score, value in some if score == highest]
        found.append(sum(winners) / len(winners))
    return sum(found) / len(found)


ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), min_size=1, max_size=8)


@given(ROWS)
def test_the_curve_is_the_average_over_all_subsets(rows):
    scores, values = zip(*rows)
    curve = stage5.best_of_curve(scores, values)
    expected = {m: best_of_all_subsets(rows, m) for m in {1, 2, 4, 8, len(rows)} if m <= len(rows)}
    assert curve == pytest.approx(expected)


@pytest.mark.parametrize("m, nats", [(1, 0), (4, 1.386294 - 0.75)])
def test_the_kl_bound_is_log_m_less_m_minus_1_over_m(m, nats):
    assert stage5.kl_bound(m) == pytest.approx(nats, abs=1e-6)


def labelled_rows():
    """Nine prompts with six candidates and one with three."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for n in (6,) * 9 + (3,):
        scores = torch.rand(n, generator=g).tolist()
        labels = torch.randint(2, (n,), generator=g).tolist()
        rows.append({"scores": scores, "labels": labels})
    return rows


def label_of_best(row):
    """The label of the highest score."""
    return row["labels"][row["scores"].index(max(row["scores"]))]


def test_each_m_counts_the_prompts_with_as_many_candidates():
    found = stage5.curve_of(labelled_rows())
    assert found["prompts"] == 10 and found["n"] == 6
    assert {m: at["prompts"] for m, at in found["curve"].items()} == {1: 10, 2: 10, 4: 9, 6: 9}


def test_the_oracle_is_never_below_the_reward():
    curve = stage5.curve_of(labelled_rows())["curve"]
    assert all(at["oracle"] >= at["label"] for at in curve.values())


def test_the_best_of_one_is_a_random_pick():
    rows = labelled_rows()
    first = stage5.curve_of(rows)["curve"][1]
    mean = sum(sum(row["labels"]) / len(row["labels"]) for row in rows) / 10
    assert first["label"] == pytest.approx(mean)
    assert first["oracle"] == pytest.approx(mean)


def test_the_best_of_all_is_the_label_of_the_highest_score():
    rows = labelled_rows()
    last = stage5.curve_of(rows)["curve"][6]
    assert last["label"] == pytest.approx(sum(map(label_of_best, rows[:9])) / 9)


def test_the_top_ranked_and_a_random_pick_count_every_prompt():
    rows = labelled_rows()
    top, random_pick = stage5.top_of(rows)
    assert top == pytest.approx(sum(map(label_of_best, rows)) / 10)
    assert random_pick == pytest.approx(stage5.curve_of(rows)["curve"][1]["label"])


def test_a_curve_without_labels_has_the_reward_alone():
    [found] = stage5.curve_of([{"scores": [1.0]}])["curve"].values()
    assert found == {"prompts": 1, "reward": 1.0, "kl_bound": 0.0}


LABELLED = {"scores": [0.5, -1, 2, 0], "labels": [1, 0, 0, 1]}


def lines_drawn(row):
    """The picture of a single prompt → (its curve, the heights of each line drawn)."""
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    curve = stage5.curve_of([row])["curve"]
    report.best_of_plot(axes, curve)
    return curve, [list(line.get_ydata()) for line in axes.get_lines()]


def test_the_picture_shows_label_oracle_and_random_pick():
    curve, drawn = lines_drawn(LABELLED)
    label, oracle = ([at[name] for at in curve.values()] for name in ("label", "oracle"))
    assert drawn == [label, oracle, [0.5, 0.5]]


def test_the_picture_without_labels_shows_the_reward():
    curve, drawn = lines_drawn({"scores": LABELLED["scores"]})
    assert drawn == [[at["reward"] for at in curve.values()]]


# ---------------------------------------------------------------- the commands

@pytest.fixture
def at(finished, tmp_path):
    """Paths: head (of the finished run), out and what lies beside it, and a file to fill."""
    return SimpleNamespace(
        head=finished / "reward_head.safetensors",
        file=tmp_path / "rows.jsonl",
        out=tmp_path / "out.jsonl",
        curve=tmp_path / "out.curve.json",
        dropped=tmp_path / "out.dropped.jsonl",
        part=tmp_path / "out.jsonl.part",
    )


@pytest.fixture(scope="module")
def reward(finished):
    """The RewardModel of the finished run."""
    return stage3.RewardModel.load(finished / "reward_head.safetensors")


def read(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


COMMANDS = {
    "sample": ["sample", "--prompts"],
    "rank": ["rank", "--candidates"],
    "pairs": ["pairs", "--candidates"],
    "filter": ["pairs", "--filter"],
}


def call(at, name, rows, *args):
    """A command of stage 5 on a file of rows → (exit code, stdout, stderr)."""
    words = [*COMMANDS[name], save_rows(at.file, rows), "--reward", at.head, "--out", at.out]
    return command("05_best_of_n", *words, *args)


def done(at, *args):
    """The rows that a command wrote."""
    code, _, err = call(at, *args)
    assert code == 0, err
    return read(at.out)


# ---------------------------------------------------------------- sample

SHORT = ["--n", 3, "--max-new-tokens", 8]


@pytest.mark.parametrize("family", ["the backbone", "gpt2"])
def test_sample_scores_n_candidates_a_prompt_and_names_the_best(family, at, reward, folder_of):
    other = [] if family == "the backbone" else ["--policy", folder_of(family)]
    rows = done(at, "sample", [{"prompt": prompt} for prompt in PROMPTS], *SHORT, *other)
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        scores = reward.score([row["prompt"]] * 3, row["candidates"])
        assert row["scores"] == pytest.approx(scores, abs=1e-4)
        assert row["best"] == row["candidates"][row["scores"].index(max(row["scores"]))]


def test_sample_says_what_each_row_was_made_with(at, reward):
    [row] = done(at, "sample", [{"prompt": "a"}], *SHORT)
    assert row["policy"] == reward.meta["model"]
    assert row["reward"] == stage1.file_hash(at.head)
    assert row["settings"] == {
        "n": 3, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 8, "seed": 0}


def test_a_prompt_that_stands_twice_is_sampled_once(at):
    rows = done(at, "sample", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}], *SHORT)
    assert [row["prompt"] for row in rows] == ["a", "b"]


def test_the_texts_do_not_depend_on_how_many_rows_share_a_pass(at):
    prompts = [{"prompt": prompt} for prompt in [*PROMPTS, "a", "One two?"]]
    of_64 = done(at, "sample", prompts, *SHORT)
    for count in (1, 6, 9):
        at.out.unlink()
        found = done(at, "sample", prompts, *SHORT, "--batch-rows", count)
        for row, expected in zip(found, of_64, strict=True):
            assert row["candidates"] == expected["candidates"]
            assert row["scores"] == pytest.approx(expected["scores"], abs=1e-4)


def test_sample_and_rank_tell_which_answers_lie_outside(at, reward):
    sampled = done(at, "sample", [{"prompt": "a"}, {"prompt": "b"}], *SHORT)
    ranked = done(at, "rank", sampled)
    for row in sampled + ranked:
        _, outside = reward.score([row["prompt"]] * 3, row["candidates"], check=True)
        assert row["outside"] == outside


def test_the_curve_of_sample_ends_at_the_mean_of_the_best_rewards(at):
    rows = done(at, "sample", [{"prompt": "a"}, {"prompt": "b"}], *SHORT)
    curve = json.loads(at.curve.read_text())["curve"]
    assert curve["3"]["reward"] == pytest.approx(sum(max(row["scores"]) for row in rows) / 2)


@pytest.fixture
def counted(monkeypatch):
    """The prompts that sample_candidates was asked for, one after the other."""
    asked = []
    real = stage5.sample_candidates

    def noted(policy, prompts, **settings):
        asked.extend(prompts)
        return real(policy, prompts, **settings)
    monkeypatch.setattr(stage5, "sample_candidates", noted)
    return asked


CASES = [f"Is water wet, case {n} – now?" for n in range(4)]


def sample_here(at, *args):
    """The sample command within this module, where `counted` sees it."""
    rows = save_rows(at.file, [{"prompt": prompt} for prompt in CASES])
    paths = "--prompts", rows, "--reward", at.head, "--out", at.out
    with tiny.argv("sample", *paths, *SHORT, *args):
        stage5.main()


@pytest.mark.parametrize("cut", ['"candidates"', "–"], ids=["between values", "within a character"])
def test_a_killed_sample_run_goes_on_and_ends_with_the_same_file(cut, at, counted):
    two_a_pass = "--batch-rows", 6
    sample_here(at, *two_a_pass)
    whole, curve = at.out.read_bytes(), at.curve.read_bytes()
    first, second, third, _ = whole.splitlines(keepends=True)
    at.part.write_bytes(first + second + third[:third.index(cut.encode()) + 1])
    at.out.unlink()
    at.curve.unlink()
    counted.clear()

    sample_here(at, *two_a_pass)
    assert counted == CASES[2:]
    assert at.out.read_bytes() == whole and at.curve.read_bytes() == curve
    assert not at.part.exists()


@pytest.mark.parametrize("whole_rows", [1, 2, 3])
def test_a_sample_run_killed_while_a_pass_was_written_ends_with_the_same_file(whole_rows, at):
    sample_here(at)                             # all four prompts in one pass
    whole = at.out.read_bytes()
    at.part.write_bytes(b"".join(whole.splitlines(keepends=True)[:whole_rows]))
    at.out.unlink()
    sample_here(at)
    assert at.out.read_bytes() == whole


def test_a_finished_sample_run_is_not_sampled_again(at, counted):
    sample_here(at)
    whole = at.out.read_bytes()
    counted.clear()
    sample_here(at)
    assert counted == []
    assert at.out.read_bytes() == whole


def test_another_seed_samples_every_prompt_again(at, counted):
    sample_here(at)
    whole = at.out.read_bytes()
    counted.clear()
    sample_here(at, "--seed", 1)
    assert counted == CASES
    assert at.out.read_bytes() != whole


# ---------------------------------------------------------------- rank

CANDIDATES = [
    {"prompt": PROMPTS[0], "candidates": ["It is.", "No, ten.", "surely green.", "yes"],
     "labels": [1, 0, 0, 1]},
    {"prompt": PROMPTS[2], "candidates": ["One.", "blue bile", "Yes, it is.", "seven"],
     "labels": [0, 0, 1, 0]},
]


def test_rank_orders_the_candidates_by_the_reward(at, reward):
    rows = done(at, "rank", CANDIDATES)
    for row, source in zip(rows, CANDIDATES, strict=True):
        scores = reward.score([source["prompt"]] * 4, source["candidates"])
        ranking = sorted(range(4), key=lambda place: -scores[place])
        assert row["scores"] == pytest.approx(scores, abs=1e-4)
        assert row["ranking"] == ranking
        assert row["best"] == source["candidates"][ranking[0]]


def test_rank_keeps_what_a_row_holds(at):
    rows = done(at, "rank", CANDIDATES)
    for row, source in zip(rows, CANDIDATES, strict=True):
        assert {name: row[name] for name in source} == source


def test_rank_gives_the_curve_of_the_labels_and_draws_it(at):
    rows = done(at, "rank", CANDIDATES)
    curve = json.loads(at.curve.read_text())["curve"]
    assert curve["1"]["label"] == 3 / 8
    assert curve["4"]["label"] == sum(row["labels"][row["ranking"][0]] for row in rows) / 2
    assert curve["4"]["oracle"] == 1
    assert at.curve.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


TOO_LONG = {"prompt": "long", "candidates": ["blue " * 3000, "It is."]}


def test_a_candidate_that_is_too_long_is_ranked_last_and_said_so(at):
    code, out, err = call(at, "rank", [CANDIDATES[0], TOO_LONG])
    assert code == 0, err
    assert "note: 1 candidates have no score (1 × response longer than max length)" in out
    _, row = read(at.out)
    assert row["reasons"] == ["response longer than max length", None]
    assert row["scores"][0] is None
    assert row["ranking"] == [1, 0] and row["best"] == "It is."


def test_a_candidate_without_a_score_is_not_in_the_curve(at):
    done(at, "rank", [CANDIDATES[0], TOO_LONG])
    curve = json.loads(at.curve.read_text())["curve"]
    assert [curve[m]["prompts"] for m in ("1", "2", "4")] == [2, 1, 1]


BAD = [     # a row in which some candidates cannot be scored; why
    ({"prompt": "a", "candidates": ["b", 5, "c \ud83d", ""]},
     [None, "the response is no text but int", "half of a UTF-16 pair in the response, which no "
      "tokenizer takes", "an empty response"]),
    ({"prompt": "a", "response": None}, ["the response is no text but NoneType"]),
    ({"prompt": [5], "candidates": ["b"]}, ["prompt messages without role and content"]),
    ({"prompt": "a \udc00", "candidates": ["b"]},
     ["half of a UTF-16 pair in the prompt, which no tokenizer takes"]),
    ({"prompt": "a", "candidates": [[{"role": "user", "content": "b"}], [{"from": "gpt"}]]},
     ["the answer is not an assistant turn", "messages without role and content"]),
]


@pytest.mark.parametrize("row, reasons", BAD, ids=[str(n) for n in range(len(BAD))])
def test_a_candidate_that_cannot_be_scored_gets_a_reason_and_the_others_scores(row, reasons, at):
    whole, found = done(at, "rank", [CANDIDATES[0], row])
    assert None not in whole["scores"]
    assert found["reasons"] == reasons
    assert [score is None for score in found["scores"]] == [bool(reason) for reason in reasons]


def test_the_last_message_of_a_candidate_is_scored_behind_the_others(at, reward):
    calls = [{"role": "assistant", "content": "One moment."}, {"role": "tool", "content": "wet"}]
    row = {"prompt": "a", "candidates": [[*calls, {"role": "assistant", "content": "yes"}]]}
    [found] = done(at, "rank", [row])
    prompt = [{"role": "user", "content": "a"}, *calls]
    assert found["scores"] == pytest.approx(reward.score([prompt], ["yes"]), abs=1e-4)


UNREADABLE = [      # a row whose prompt cannot be read; why
    ({"prompt": " ", "candidates": ["b"]}, "no prompt in this row"),
    ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
      "system": "t", "candidates": ["b"]}, "two system turns"),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
      "candidates": ["c"]}, "ends with an assistant turn"),
]


@pytest.mark.parametrize("row, says", UNREADABLE, ids=["blank", "two systems", "answered"])
def test_candidates_to_a_prompt_that_cannot_be_read_have_no_score(row, says, at):
    whole, found = done(at, "rank", [CANDIDATES[0], row])
    assert None not in whole["scores"]
    assert found["scores"] == [None] and says in found["reasons"][0] and found["best"] is None


def test_columns_in_front_of_the_prompt_of_candidates_are_read_once(at):
    row = {**CANDIDATES[0], "system": "Be brief.", "history": [["q", "a"]]}
    [found] = done(at, "rank", [row])
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"},
              {"role": "assistant", "content": "a"},
              {"role": "user", "content": CANDIDATES[0]["prompt"]}]
    assert found["prompt"] == prompt and not {"system", "history"} & set(found)
    code, _, err = call(at, "pairs", [found], "--min-margin", -99)
    assert code == 0, err
    [pair] = [*read(at.out), *read(at.dropped)]
    assert pair["prompt"] == prompt


def test_pairs_are_built_of_candidates_that_are_messages_of_one_turn(at):
    texts = CANDIDATES[0]["candidates"]
    row = {**CANDIDATES[0], "candidates": [[{"role": "assistant", "content": text}]
                                           for text in texts]}
    assert done(at, "pairs", [row]) == done(at, "pairs", CANDIDATES[:1])


def test_a_column_that_is_not_read_is_noted_by_rank(at):
    code, out, err = call(at, "rank", [{**CANDIDATES[0], "context": "It rained."}])
    assert code == 0, err
    assert "note: column context is not read (1 rows)" in out


def test_labels_of_a_table_are_numbers(at):
    rows = [{**CANDIDATES[0], "labels": [str(label) for label in CANDIDATES[0]["labels"]]}]
    assert done(at, "rank", rows)[0]["labels"] == CANDIDATES[0]["labels"]


def test_candidates_of_one_prompt_in_several_rows_are_ranked_together(at):
    halves = [{**CANDIDATES[0], "candidates": CANDIDATES[0]["candidates"][part],
               "labels": CANDIDATES[0]["labels"][part]} for part in (slice(0, 2), slice(2, 4))]
    expected = done(at, "rank", CANDIDATES)
    assert done(at, "rank", [halves[0], CANDIDATES[1], halves[1]]) == expected


def test_labels_of_single_responses_go_along(at):
    flat = [{"prompt": row["prompt"], "response": text, "labels": label}
            for row in CANDIDATES for text, label in zip(row["candidates"], row["labels"])]
    assert [row["labels"] for row in done(at, "rank", flat)] == [
        row["labels"] for row in CANDIDATES]


def test_labels_for_some_candidates_of_a_prompt_only_are_refused(at):
    rows = [{"prompt": "a", "response": "b", "labels": 1}, {"prompt": "a", "response": "c"}]
    refused(at, "rank", rows, words=["labels for some", f"{at.file}:2"])


def test_rows_of_a_prompt_and_a_response_are_grouped(at):
    flat = []
    for i in range(4):
        for n, row in enumerate(CANDIDATES):
            response = row["candidates"][i]
            flat.append({"prompt": row["prompt"], "response": response, "id": f"{n}.{i}"})
    rows = done(at, "rank", flat)
    assert [row["candidates"] for row in rows] == [row["candidates"] for row in CANDIDATES]
    assert rows[1]["ids"] == ["1.0", "1.1", "1.2", "1.3"]
    for row, grouped in zip(rows, done(at, "rank", CANDIDATES), strict=True):
        assert row["scores"] == pytest.approx(grouped["scores"], abs=1e-4)


def test_a_head_moved_away_from_its_run_still_ranks(at, tmp_path):
    expected = done(at, "rank", CANDIDATES)
    moved = tmp_path / "moved/head.safetensors"
    moved.parent.mkdir()
    shutil.copy(at.head, moved)
    assert done(at, "rank", CANDIDATES, "--reward", moved) == expected


# ---------------------------------------------------------------- pairs of candidates

def said(row, side):
    """The text of a side that is a conversation of one turn."""
    [turn] = row[side]
    assert turn["role"] == "assistant"
    return turn["content"]


def test_pairs_are_the_best_against_the_worst_by_this_reward(at, reward):
    rows = done(at, "pairs", CANDIDATES)
    for row, source in zip(rows, CANDIDATES, strict=True):
        scores = reward.score([source["prompt"]] * 4, source["candidates"])
        assert said(row, "chosen") == source["candidates"][scores.index(max(scores))]
        assert said(row, "rejected") == source["candidates"][scores.index(min(scores))]
        assert row["margin"] == pytest.approx(max(scores) - min(scores), abs=1e-3)
        assert row["margin"] == row["score_chosen"] - row["score_rejected"]


def test_scores_of_another_reward_are_not_believed(at):
    others = [row | {"scores": [9.0, 8.0, 7.0, 6.0]} for row in CANDIDATES]
    assert done(at, "pairs", others) == done(at, "pairs", CANDIDATES)


def test_scores_of_this_reward_are_not_computed_again(at):
    known = {"scores": [9.0, 8.0, 7.0, 6.0], "reward": stage1.file_hash(at.head)}
    code, _, err = call(at, "pairs", [CANDIDATES[0] | known], "--min-margin", -99)
    assert code == 0, err
    [row] = read(at.out) + read(at.dropped)
    assert (said(row, "chosen"), said(row, "rejected")) == ("It is.", "yes")


def test_prompts_of_pairs_are_messages(at):
    text, messages = [row["prompt"] for row in done(at, "pairs", CANDIDATES)]
    assert text == [{"role": "user", "content": "Is water wet?"}]
    assert messages == PROMPTS[2]


def test_a_prompt_without_two_different_candidates_is_dropped_with_a_reason(at):
    rows = done(at, "pairs", [*CANDIDATES, {"prompt": "a", "candidates": ["b", "", "b"]}])
    assert len(rows) == 2
    [dropped] = read(at.dropped)
    assert dropped["id"] == "2"
    assert "two different" in dropped["reason"]


def test_plain_gives_strings(at):
    [row] = done(at, "pairs", CANDIDATES[:1], "--plain")
    assert row["prompt"] == PROMPTS[0]
    assert row["chosen"] in CANDIDATES[0]["candidates"]


def test_plain_drops_prompts_that_are_messages(at):
    """Strings and messages in one file: TRL could not read it."""
    rows = done(at, "pairs", CANDIDATES, "--plain")
    assert [row["prompt"] for row in rows] == [PROMPTS[0]]
    [dropped] = read(at.dropped)
    assert "messages" in dropped["reason"]


def test_a_least_margin_drops_what_is_below_with_a_reason(at):
    margins = [row["margin"] for row in done(at, "pairs", CANDIDATES)]
    middle = sum(margins) / 2
    kept = done(at, "pairs", CANDIDATES, "--min-margin", middle)
    assert [row["margin"] for row in kept] == [max(margins)]
    [dropped] = read(at.dropped)
    assert dropped["reason"] == f"margin below {middle}"


def test_a_pair_whose_two_sides_score_the_same_is_dropped():
    def lengths(prompts, texts, check):
        return [float(len(text)) for text in texts], [False] * len(texts)
    reward = SimpleNamespace(score=lengths)
    rows = [{"prompt": "a", "chosen": "yes", "rejected": rejected} for rejected in ("no", "ten")]
    stage5.score_rows(rows, reward, 0.0)
    assert [row["margin"] for row in rows] == [1.0, 0.0]
    assert ["reason" in row for row in rows] == [False, True]


# ---------------------------------------------------------------- pairs through a filter

def pairs_of_two_minds():
    """Twenty pairs, every third the wrong way round."""
    pairs = tiny.make_pairs(20)
    for pair in pairs[::3]:
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    return pairs


@pytest.fixture(scope="module")
def agreed(reward):
    """Twenty pairs → {id: does the reward agree with it}."""
    pairs = pairs_of_two_minds()
    prompts = [pair["prompt"] for pair in pairs]
    chosen = reward.score(prompts, [pair["chosen"] for pair in pairs])
    rejected = reward.score(prompts, [pair["rejected"] for pair in pairs])
    return {pair["id"]: c > r for pair, c, r in zip(pairs, chosen, rejected)}


def test_a_filter_keeps_the_pairs_that_the_reward_agrees_with(at, agreed):
    pairs = pairs_of_two_minds()
    kept = done(at, "filter", pairs, "--plain")
    assert 0 < len(kept) < 20
    assert [row["id"] for row in kept] == [name for name, agrees in agreed.items() if agrees]
    for row in kept:
        assert {name: row[name] for name in pairs[0]} in pairs
        assert row["margin"] > 0 and "reason" not in row


def test_a_filter_gives_a_reason_for_every_pair_that_it_drops(at, agreed):
    done(at, "filter", pairs_of_two_minds())
    dropped = read(at.dropped)
    assert [row["id"] for row in dropped] == [name for name, agrees in agreed.items() if not agrees]
    assert {row["reason"] for row in dropped} == {"the rejected side scores as high or higher"}


def test_a_filter_gives_a_reason_for_every_row_that_holds_no_pair(at):
    broken = [
        {"id": "number", "prompt": "a", "chosen": 5, "rejected": "b"},
        {"id": "null", "prompt": None, "chosen": None, "rejected": "b"},
        {"id": "the same", "prompt": "a", "chosen": "b", "rejected": "b"},
    ]
    done(at, "filter", [*tiny.make_pairs(2), *broken])
    reasons = {row["id"]: row["reason"] for row in read(at.dropped)}
    for row in broken:
        assert reasons[row["id"]]


# ---------------------------------------------------------------- bad input

def refused(at, *args, words=()):
    """A command ends with one line that names every one of `words`, and writes nothing."""
    assert_one_line_error(call(at, *args), *words)
    assert not at.out.exists() and not at.part.exists()


def test_what_filtered_pairs_do_not_keep_is_noted(at):
    row = tiny.make_pairs(1)[0] | {"system": "Be brief.", "images": ["x.png"]}
    code, out, err = call(at, "filter", [row], "--min-margin", -99)
    assert code == 0, err
    assert "note: column images is not read (1 pairs)" in out
    [kept] = [*read(at.out), *read(at.dropped)]
    assert kept["prompt"][0] == {"role": "system", "content": "Be brief."}


NO_CANDIDATES = [
    {"prompt": "a", "candidates": []},
    {"prompt": "a", "candidates": "bcd"},
    {"prompt": "a", "candidates": 5},
    {"prompt": "a"},
    {"candidates": ["b"]},
    {"response": "b"},
    {"prompt": None, "candidates": ["b"]},
    {"prompt": "a", "candidates": ["b"], "labels": [1, 0]},
    {"prompt": "a", "candidates": ["b"], "labels": 1},
    {"prompt": "a", "candidates": ["b"], "labels": ["good"]},
    [1],
    5,
]


@pytest.mark.parametrize("row", NO_CANDIDATES, ids=json.dumps)
def test_a_row_that_holds_no_candidates_is_one_line_that_names_it(row, at):
    refused(at, "rank", [CANDIDATES[0], row], words=[f"{at.file}:2"])


NO_PROMPT = [
    {},
    {"prompt": " "},
    {"prompt": []},
    {"prompt": [5]},
    {"prompt": [{"role": "user"}]},
    5,
]


@pytest.mark.parametrize("row", NO_PROMPT, ids=json.dumps)
def test_a_row_that_holds_no_prompt_is_left_out_and_named(row, at):
    code, out, err = call(at, "sample", [{"prompt": "a"}, row])
    assert code == 0, err
    assert "note: 1 rows are left out" in out and f"{at.file}:2" in out
    assert [row["prompt"] for row in read(at.out)] == ["a"]


@pytest.mark.parametrize("row", NO_PROMPT, ids=json.dumps)
def test_a_file_without_a_prompt_is_one_line_that_names_its_first_row(row, at):
    refused(at, "sample", [row], words=[f"{at.file}:1"])


def test_candidates_that_are_all_too_long_are_refused(at):
    row = {"prompt": "a", "candidates": ["blue " * 3000, "green " * 3000]}
    refused(at, "rank", [row], words=["2 × response longer than max length", at.file])


@pytest.fixture(params=COMMANDS)
def usable(request):
    """Each command with rows that it can use."""
    rows = {"sample": [{"prompt": "a"}], "filter": tiny.make_pairs(2)}
    return request.param, rows.get(request.param, CANDIDATES)


def test_a_missing_reward_names_what_makes_it(usable, at, tmp_path):
    other = "--reward", tmp_path / "none.safetensors"
    refused(at, *usable, *other, words=["none.safetensors", "03_train_head.py"])


def test_another_backbone_is_refused_and_named(usable, at, folder_of):
    refused(at, *usable, "--model", folder_of("gpt2"), words=[folder_of("gpt2"), "backbone"])


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_file_is_refused_and_named(name, at):
    refused(at, name, [], words=[at.file])


def test_pairs_takes_not_both_candidates_and_a_filter(at):
    refused(at, "pairs", CANDIDATES, "--filter", at.file, words=["--candidates", "--filter"])
