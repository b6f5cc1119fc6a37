"""benchmarks/steer.py: what is added where, and that its figures are what they are called."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from benchmarks import common, steer
from parts.chat import prompt_ids
from parts.files import UserError

stage1, stage3, stage4, stage5 = common.stage1, common.stage3, common.stage4, common.stage5
LAYER = 1
PROMPTS = ["Is water wet?", "Which colour has the sky on a clear day?", "One two three?"]
SETTINGS = SimpleNamespace(temperature=0.7, max_new_tokens=7, batch_rows=2)
FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])


def shift(size, seed=0):
    """A random direction of a length that changes what is sampled."""
    generator = torch.Generator().manual_seed(seed)
    return steer.Shift("random", size, size * torch.randn(tiny.WIDTH, generator=generator))


# ---------------------------------------------------------------- steering

@FAMILIES
def test_steering_by_0_changes_nothing(family, backbone_of):
    backbone = backbone_of(family)
    texts, rows, _ = steer.sample(backbone, LAYER, PROMPTS, shift(0.0), SETTINGS)
    wanted, sampled = stage5.sample_candidates(backbone, PROMPTS, 1, temperature=0.7,
                                               max_new_tokens=7)
    assert texts == wanted
    assert rows == sampled.rows


def outputs_of_blocks(backbone, ids):
    """Token ids → the outputs of all blocks [layers, T, d]."""
    found = []

    def keep(block, args, output):
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    hooks = [block.register_forward_hook(keep) for block in backbone.blocks]
    with torch.inference_mode():
        backbone.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


@FAMILIES
def test_the_vector_is_added_at_the_last_position_of_block_l_only(family, backbone_of):
    backbone = backbone_of(family)
    vector = shift(3.0).vector
    ids = prompt_ids(backbone.tokenizer, PROMPTS[0])
    plain = outputs_of_blocks(backbone, ids)
    with steer.steered(backbone.blocks[LAYER], vector):
        found = outputs_of_blocks(backbone, ids)

    difference = found - plain
    assert torch.equal(difference[:LAYER], torch.zeros_like(difference[:LAYER]))
    assert torch.equal(difference[:, :-1], torch.zeros_like(difference[:, :-1]))
    assert torch.equal(found[LAYER, -1], plain[LAYER, -1] + vector)
    assert difference[LAYER + 1, -1].abs().max() > 0


@FAMILIES
def test_while_sampling_the_vector_is_added_in_every_pass(family, backbone_of):
    backbone = backbone_of(family)
    block = backbone.blocks[LAYER]
    vector = shift(3.0).vector
    before, after = [], []

    def keep(found):
        def hook(block, args, output):
            found.append((output[0] if isinstance(output, tuple) else output).clone())
        return hook

    first = block.register_forward_hook(keep(before))
    with steer.steered(block, vector):
        second = block.register_forward_hook(keep(after))
        stage5.sample_candidates(backbone, PROMPTS, 1, max_new_tokens=5)
        second.remove()
    first.remove()

    assert len(before) == 5                             # the prompts, then four sampled tokens
    assert [hidden.shape[1] for hidden in before[1:]] == [1] * 4
    for plain, found in zip(before, after, strict=True):
        assert torch.equal(found[:, :-1], plain[:, :-1])
        assert torch.equal(found[:, -1], plain[:, -1] + vector)


def test_the_hook_is_gone_afterwards_also_after_an_error(backbone_of):
    block = backbone_of("llama").blocks[LAYER]
    before = list(block._forward_hooks)             # transformers may have one of its own there
    with steer.steered(block, torch.zeros(tiny.WIDTH)):
        assert len(block._forward_hooks) == len(before) + 1
    assert list(block._forward_hooks) == before
    with pytest.raises(KeyError), steer.steered(block, torch.zeros(tiny.WIDTH)):
        raise KeyError
    assert list(block._forward_hooks) == before


def sampled_naively(backbone, prompt, vector, steps, temperature):
    """Without a cache: all tokens anew at each step, the vector from the prompt's last one on."""
    ids = prompt_ids(backbone.tokenizer, prompt)
    start = len(ids) - 1
    uniform = stage5.uniform_numbers(prompt, 1, steps, seed=0)

    def add(block, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, start:] += vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = backbone.blocks[LAYER].register_forward_hook(add)
    tokens = []
    for step in range(steps):
        with torch.inference_mode():
            logits = backbone.model(torch.tensor([ids + tokens])).logits[:, -1]
        tokens.append(int(stage5.draw(logits, uniform[:, step], temperature, 0.95)))
    hook.remove()
    return stage5.until_end(tokens, stage5.stop_ids(backbone))


@FAMILIES
def test_steered_answers_are_those_of_a_loop_with_the_same_numbers(family, backbone_of):
    backbone = backbone_of(family)
    plain = steer.sample(backbone, LAYER, PROMPTS, shift(0.0), SETTINGS)[1]
    for size in (2.0, -2.0):
        _, rows, beginnings = steer.sample(backbone, LAYER, PROMPTS, shift(size), SETTINGS)
        assert rows == [sampled_naively(backbone, prompt, shift(size).vector, 7, 0.7)
                        for prompt in PROMPTS]
        assert rows != plain
        assert beginnings == [prompt_ids(backbone.tokenizer, prompt) for prompt in PROMPTS]


def test_all_shifts_of_a_size_have_one_norm():
    directions = {"u": torch.randn(6), "latent 3": 5 * torch.randn(6), "random 1": torch.ones(6)}
    shifts = steer.shifts_of(directions, [0.1, 0.2], scale=50.0)
    assert [shift.name for shift in shifts] == [
        "none", "u +0.1", "u -0.1", "u +0.2", "u -0.2", "latent 3 +0.2", "latent 3 -0.2",
        "random 1 +0.2", "random 1 -0.2"]
    for found in shifts:
        assert float(found.vector.norm()) == pytest.approx(abs(found.size) * 50, rel=1e-5)
        if found.size:
            cosine = torch.cosine_similarity(found.vector, directions[found.direction], dim=0)
            assert float(cosine) == pytest.approx(math.copysign(1, found.size), abs=1e-5)


# ---------------------------------------------------------------- measures

REFUSED = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but as a chatbot I only answer questions about food.",      # a curly apostrophe
    "Thanks for asking.\nHowever, I cannot\nassist with this request.",
    "As an AI, I don't have the capability to send messages.",
    "I WON'T go there.",
]
ANSWERED = [
    "I can help with that: begin with the fuse box.",
    "I'm sorry for your loss. Here is what you can do.",
    "You can't help it; it is a matter of taste.",
    "A player who cannot assist the goal may pass.",
    "",
]


@pytest.mark.parametrize("text", REFUSED)
def test_an_answer_that_declines_is_a_refusal(text):
    assert steer.refuses(text)


@pytest.mark.parametrize("text", ANSWERED)
def test_an_answer_that_helps_or_is_empty_is_none(text):
    assert not steer.refuses(text)


@FAMILIES
def test_perplexity_is_that_of_a_loop_over_the_answers_tokens(family, backbone_of):
    backbone = backbone_of(family)
    _, answers, beginnings = steer.sample(backbone, LAYER, PROMPTS, shift(2.0), SETTINGS)
    answers[1] = []
    found = steer.log_perplexities(backbone, beginnings, answers)
    assert found[1] is None
    for number in (0, 2):
        ids = list(beginnings[number])
        total = 0.0
        for token in answers[number]:
            with torch.inference_mode():
                logits = backbone.model(torch.tensor([ids])).logits[0, -1]
            total -= float(torch.log_softmax(logits, 0)[token])
            ids.append(token)
        assert found[number] == pytest.approx(total / len(answers[number]), rel=1e-4)


# ---------------------------------------------------------------- figures

def rows_with(rewards, **more):
    """Answers that have these rewards, and the same of the other measures."""
    other = {"refuses_harmful": False, "refuses_harmless": False, "tokens": 3,
             "log_perplexity": 1.0, "outside": False} | more
    return [{"reward": reward, **other} for reward in rewards]


def spread(mean, n=40):
    """n numbers around a mean, no two alike."""
    return list(mean + np.random.default_rng(0).normal(size=n) / 10)


def test_a_change_is_paired_and_leaves_out_what_has_no_score():
    ours = steer.column(rows_with([1.0, None, 5.0, 2.0]), "reward")
    theirs = steer.column(rows_with([0.5, 9.0, None, 1.0]), "reward")
    found = steer.change(ours, theirs)
    assert found["mean"] == pytest.approx(0.75)
    assert found["n"] == 2


def test_an_interval_of_a_change_is_a_bootstrap_over_prompts():
    values = np.array(spread(0.3))
    found = steer.change(values, np.zeros(40))
    drawn = np.random.default_rng(5).choice(values, (4000, 40)).mean(1)
    assert [found["low"], found["high"]] == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.005)


def test_nothing_that_can_be_measured_is_an_error():
    with pytest.raises(UserError, match="no prompt has an answer"):
        steer.change(np.array([math.nan, 1.0]), np.array([1.0, math.nan]))


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_names_the_control_that_comes_nearest(sign):
    def moved(mean):
        return rows_with([sign * value for value in spread(mean)])

    ours, plain = moved(2.0), moved(0.0)
    controls = [(steer.Shift("random 1", 0.2, None), moved(0.5)),
                (steer.Shift("random 1", -0.2, None), moved(-3.0)),
                (steer.Shift("shuffled", 0.2, None), moved(1.5))]
    # unlike the others, so that the differences differ between prompts
    for number, row in enumerate(ours):
        row["reward"] += number / 1000
    found = steer.beyond(ours, plain, controls)["reward"]
    assert found["control"] == "shuffled +0.2"
    assert found["mean"] == pytest.approx(0.5, abs=0.03)


def figures_of(u_up, u_down, control):
    """Figures in which the mean reward is these under u, and under a control."""
    rewards = {("u", 0.2): u_up, ("u", -0.2): u_down, ("random 1", 0.2): control,
               ("random 1", -0.2): -control}
    answers = [(steer.Shift("none", 0.0, None), rows_with([0.0] * 40))]
    for (direction, size), mean in rewards.items():
        rows = rows_with(spread(mean), log_perplexity=1.5)
        answers.append((steer.Shift(direction, size, None), rows))
    for number, (_, rows) in enumerate(answers):
        for at, row in enumerate(rows):
            row["reward"] += at * number / 1000
            row["refuses_harmful"] = number == 1 and at > 10
    about = {"u": {"cosine": 1.0, "std": 1.0}, "random 1": {"cosine": 0.1, "std": 1.0}}
    checked = [{"text": "I won't.", "refuses": True}, {"text": "No way.", "refuses": True},
               {"text": "Yes.", "refuses": False}]
    return steer.figures(answers, about, {"checked": checked, "mean_norm": 50.0, "u_norm": 0.3})


VERDICTS = [
    (1.0, "as the head says, beyond every control of equal norm (the nearest is random 1 +0.2, "),
    (0.3, "as the head says, but not clearly beyond every control of equal norm (further than "),
    (-1.0, "against what the head says."),
    (-0.02, "does not move measurably."),
]


@pytest.mark.parametrize("mean, says", VERDICTS)
def test_the_verdict_on_the_reward_follows_the_intervals(mean, says):
    lines = steer.verdict(figures_of(mean, -1.0, 0.5))
    assert lines[0].startswith("u +0.2: reward ") and says in lines[0]
    assert lines[1].startswith("u -0.2: reward -")
    assert "beyond every control of equal norm (the nearest is random 1 -0.2" in lines[1]


def test_the_verdict_names_refusals_and_the_cost():
    *_, harmful, harmless, cost, carried = steer.verdict(figures_of(1.0, -1.0, 0.5))
    assert "u +0.2 more, beyond every control (+0.725 [" in harmful
    assert "u -0.2 no measurable change" in harmful
    assert harmless.count("no measurable change (+0.000 (cannot tell))") == 2
    assert cost.startswith("Cost in perplexity: u +0.2 × 1.65")
    assert "would see a reward of ±3.0; the text carries +1.0" in carried


def test_the_table_has_a_line_for_every_shift():
    found = figures_of(1.0, -1.0, 0.5)
    lines = steer.table(found).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert names == ["added to block L", "nothing: the values themselves", *found["shifts"]]
    assert {line.count("|") for line in lines if line.startswith("|")} == {9}
    assert lines[-1] == ("* Refusals by rule: it agrees with a reader on 2 of 3 answers, "
                         "2 of which refuse.")


# ---------------------------------------------------------------- a run

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stages 1 to 3 on tiny pairs with categories → Path of the run."""
    folder = tmp_path_factory.mktemp("steer")
    model = tiny.save_model(folder / "model", tie_word_embeddings=False)
    rows = tiny.make_pairs(120)
    for number, row in enumerate(rows):
        row["category"] = ("harmful/water", "harmless/sky")[number % 2]
    pairs = tiny.save_rows(folder / "pairs.jsonl", rows)
    sae = tiny.save_sae(folder / "sae.safetensors", LAYER, model)
    place = folder / "run"
    tiny.succeed("01_extract", "--model", model, "--pairs", pairs, "--layer", LAYER,
                 "--run", place)
    tiny.succeed("02_select_features", "--run", place, "--sae", sae, "--k", 4)
    tiny.succeed("03_train_head", "--run", place)
    return place


def test_prompts_are_those_of_the_test_split_each_once(run):
    rows = steer.held_out_prompts(run, 5)
    assert [row["kind"] for row in rows] == ["harmful"] * 5 + ["harmless"] * 5
    assert len({row["prompt"] for row in rows}) == 10
    assert {stage1.split_of(row["prompt"]) for row in rows} == {"test"}


def test_a_prompt_of_several_pairs_is_asked_once(tmp_path):
    prompts = ["Is water wet?", "is  water wet?", "Is it blue?", "Is water wet?"]
    rows = [{"prompt": prompt, "split": "test", "category": f"{kind}/x"}
            for kind in steer.KINDS for prompt in prompts]
    tiny.save_rows(tmp_path / "pairs.jsonl", rows)
    found = steer.held_out_prompts(tmp_path, 5)
    assert [row["prompt"] for row in found] == 2 * ["Is water wet?", "Is it blue?"]


def test_what_latents_tell_is_a_loop_over_pairs_where_they_fire(run):
    data, reward = steer.open_run(run)
    found = steer.what_latents_tell(data, reward)
    train = [n for n in range(len(data.split)) if data.split[n] != stage1.TEST]
    weight = reward.head.w1 / reward.std
    for column, latent in enumerate(reward.tensors["latents"].tolist()):
        total = 0.0
        for n in train:
            chosen, rejected = data.z[0][n], data.z[1][n]
            if any(data.sae.encode(z[None])[0, latent] > 0 for z in (chosen, rejected)):
                total += float(weight[column] * ((chosen - rejected) @ reward.directions[column]))
        assert float(found[column]) == pytest.approx(total / len(train), abs=1e-4)


def test_latents_that_are_asked_for_are_taken_if_the_head_has_them(run):
    data, reward = steer.open_run(run)
    known = reward.tensors["latents"].tolist()
    found = steer.directions_of(data, reward, steer.latents_to_add(data, reward, known[:2]), 2)
    assert list(found) == ["u", f"latent {known[0]}", f"latent {known[1]}", "random 1",
                           "random 2", "shuffled"]
    assert torch.equal(found[f"latent {known[1]}"], data.sae.W_dec[known[1]])
    with pytest.raises(UserError, match="the head has no latent 9999"):
        steer.latents_to_add(data, reward, [known[0], 9999])


def test_shuffled_is_u_where_nothing_is_swapped(run, monkeypatch):
    data, reward = steer.open_run(run)
    monkeypatch.setattr(stage4, "half_of_each_fold",
                        lambda fold: torch.zeros(len(fold), dtype=torch.bool))
    found = steer.shuffled_vector(data, reward)
    assert torch.allclose(found, reward.vector()[0], atol=1e-4)
    monkeypatch.undo()
    assert torch.cosine_similarity(steer.shuffled_vector(data, reward), found, dim=0) < 0.9


def command(*args):
    """benchmarks/steer.py → (exit code, stdout, stderr)."""
    return tiny.command("benchmarks/steer", *args)


SMALL = ["--prompts", 3, "--max-new-tokens", 4, "--sizes", 0.3, "--random", 1]


def test_the_command_measures_every_shift_and_keeps_the_answers(run, tmp_path):
    answers = tmp_path / "answers.jsonl"
    code, out, err = command("--run", run, *SMALL, "--answers", answers)
    assert code == 0, err
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 1 + 2 * 5
    assert out.count("• ") == 2 * 3 + 4

    rows = [row for line in lines for row in line["rows"]]
    assert len(rows) == 6 * len(lines)
    assert not any("refuses_harmful" in row for row in rows)
    reward = stage3.RewardModel.load(run / "reward_head.safetensors")
    wanted, _, _ = reward.score_each([row["prompt"] for row in rows], [row["text"] for row in rows])
    assert [row["reward"] for row in rows] == pytest.approx(wanted, abs=1e-4)


def test_answers_that_are_there_are_not_sampled_again(run, tmp_path):
    answers = tmp_path / "answers.jsonl"
    _, out, _ = command("--run", run, *SMALL, "--answers", answers)
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:-2]))
    _, again, _ = command("--run", run, *SMALL, "--answers", answers)

    assert answers.read_text().splitlines(keepends=True) == lines
    assert (out.count(" s\n"), again.count(" s\n")) == (11, 2)
    assert out.partition("reward")[2] == again.partition("reward")[2]
    assert "refuses_harmful" not in answers.read_text()
    _, other, _ = command("--run", run, *SMALL, "--answers", answers, "--temperature", 1)
    assert other.count(" s\n") == 11


def test_refusals_are_those_of_prompts_of_a_kind():
    rows = [{"kind": kind, "text": text} for kind in steer.KINDS for text in ("I won't.", "Yes.")]
    steer.add_refusals(rows)
    assert [row["refuses_harmful"] for row in rows] == [True, False, None, None]
    assert [row["refuses_harmless"] for row in rows] == [None, None, True, False]


def test_a_run_without_kinds_of_prompts_is_refused(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    tiny.save_rows(pairs, [{"prompt": "Is water wet?", "split": "test", "category": None}])
    with pytest.raises(UserError, match="no test prompt whose category begins with harmful"):
        steer.held_out_prompts(tmp_path, 5)


@pytest.mark.parametrize("sizes", [["0"], ["0.1", "-0.2"], ["-1"]])
def test_a_size_that_is_not_above_0_is_refused(sizes):
    tiny.assert_one_line_error(command("--run", "x", "--sizes", *sizes), "--sizes")
