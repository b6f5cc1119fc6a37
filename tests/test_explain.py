"""Why one answer scores higher: what is printed, against the model's rewards and naive loops."""

import importlib
import re

import pytest
import torch
from tiny import assert_one_line_error, command, draw, linear_reward

from parts import explain
from parts.files import UserError

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
WATER = "Is water wet?"


@pytest.fixture(scope="module")
def opened(finished):
    """(Data, RewardModel with its backbone) of the finished run."""
    return stage4.Data(finished), stage3.RewardModel.load(finished / "reward_head.safetensors")


def hidden_alone(backbone, ids):
    """The hidden states after block 1 of a text read alone [T, d]."""
    output = backbone.model(torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[2][0]


# ---------------------------------------------------------------- why A beat B

NUMBER = r" +([+-]\d+\.\d{3})"
LINE = re.compile(rf"^ +(\d+)  (?:chosen|rejected){NUMBER * 3} ", re.MULTILINE)


def explained(capsys, data, model, *words, top=99):
    """explain_pair → (what it printed, {latent: (adds, of A, of B)})."""
    explain.explain_pair(data, model, *explain.pair_to_explain(data, words), top=top)
    text = capsys.readouterr().out
    lines = {}
    for latent, *numbers in LINE.findall(text):
        lines[int(latent)] = tuple(map(float, numbers))
    return text, lines


def fifth_pair(data):
    """→ its prompt and both responses."""
    return [data.pairs[4][name] for name in ("prompt", "chosen", "rejected")]


def test_explain_says_which_answer_lies_outside_of_what_training_saw(opened, capsys):
    data, model = opened
    prompt, a, b = fifth_pair(data)
    largest = [float(model.scores_of(model.hidden([prompt], [text])).abs().max()) for text in (a,
                                                                                               b)]

    model.range, before = sum(largest) / 2, model.range         # one of the two is above
    text, _ = explained(capsys, data, model, prompt, a, b)
    model.range = before

    far = "A" if largest[0] > largest[1] else "B"
    near = "B" if far == "A" else "A"
    assert f"note: {far} lies outside" in text
    assert f"note: {near} lies outside" not in text


@pytest.mark.parametrize("by_id", [True, False])
def test_explain_prints_both_responses_with_their_rewards(by_id, opened, capsys):
    data, model = opened
    prompt, chosen, rejected = fifth_pair(data)
    if by_id:
        words, names = [data.pairs[4]["id"]], ("chosen", "rejected")
    else:
        words, names = [prompt, chosen, rejected], ("A", "B")
    text, _ = explained(capsys, data, model, *words)

    a, b = model.score([prompt] * 2, [chosen, rejected])
    probability = model.prefer(prompt, chosen, rejected)
    assert prompt in text
    assert f"{names[0]:<8} {a:+.3f}   {chosen}\n" in text
    assert f"{names[1]:<8} {b:+.3f}   {rejected}\n" in text
    assert f"{names[0]} minus {names[1]}: {a - b:+.3f}, " in text
    assert f"preferred with probability {probability:.2f}\n" in text


def test_what_the_latents_add_is_what_they_give_a_less_what_they_give_b(opened, capsys):
    data, model = opened
    prompt, chosen, rejected = fifth_pair(data)
    text, lines = explained(capsys, data, model, prompt, chosen, rejected)

    of_a = {}
    for row in model.explain(prompt, chosen)["contributions"]:
        of_a[row["latent"]] = row["contribution"]
    assert lines and set(lines) <= set(of_a)
    for latent, (adds, a, b) in lines.items():
        assert a == pytest.approx(of_a[latent], abs=6e-4)
        assert adds == pytest.approx(a - b, abs=0.0021)


@pytest.mark.parametrize("top", [0, 2, 99])
def test_with_the_last_lines_the_column_of_what_is_added_adds_up(top, opened, capsys):
    data, model = opened
    prompt, chosen, rejected = fifth_pair(data)
    text, lines = explained(capsys, data, model, prompt, chosen, rejected, top=top)
    others, silent, total = [float(number) for number in re.findall(
        r"(?:more that fire|fires in neither|all together) +([+-][0-9.]+)$", text, re.M)]
    a, b = model.score([prompt] * 2, [chosen, rejected])
    assert total == pytest.approx(a - b, abs=6e-4)
    listed = sum(adds for adds, _, _ in lines.values())
    assert listed + others + silent == pytest.approx(total, abs=0.0005 * (len(lines) + 4))
    assert len(lines) <= top


def test_only_directions_whose_latent_fires_in_one_of_the_texts_are_listed(opened, capsys):
    data, model = opened
    texts = [model.render(WATER, response) for response in ("Yes.", "No, ten.")]
    _, lines = explained(capsys, data, model, WATER, "Yes.", "No, ten.")
    fires = set()
    for text in texts:
        z = hidden_alone(model.backbone, text.ids)[text.first:text.stop]
        for latent in data.head["latents"].tolist():
            if (z @ data.sae.W_dec[latent] > 0).any():
                fires.add(latent)
    assert set(lines) == fires


def test_a_name_stands_behind_its_latent(opened, capsys):
    data, model = opened
    _, lines = explained(capsys, data, model, WATER, "Yes.", "No, ten.")
    latent = next(iter(lines))
    named = stage3.RewardModel(model.tensors, model.meta, model.backbone,
                               {latent: {"name": "wet things"}})
    text, _ = explained(capsys, data, named, WATER, "Yes.", "No, ten.")
    assert re.search(rf"^ +{latent}  .*   wet things$", text, re.M)
    rows = named.explain(WATER, "Yes.")["contributions"]
    assert {row["latent"]: row["name"] for row in rows}[latent] == "wet things"


def test_explain_names_the_latents_that_add_most_first(opened, capsys):
    data, model = opened
    name = data.pairs[4]["id"]
    _, lines = explained(capsys, data, model, name)
    sizes = [abs(adds) for adds, _, _ in lines.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    _, first = explained(capsys, data, model, name, top=2)
    assert first == dict(list(lines.items())[:2])


def test_explain_shows_the_tokens_of_either_response_on_which_a_latent_fires(opened, capsys):
    data, model = opened
    responses = {"A": "Yes.", "B": "No, ten."}
    text, lines = explained(capsys, data, model, WATER, *responses.values())
    for name, response in responses.items():
        rendered = model.render(WATER, response)
        own = slice(rendered.first, rendered.stop)
        tokens = [repr(model.backbone.tokenizer.decode(i)) for i in rendered.ids[own]]
        hidden = hidden_alone(model.backbone, rendered.ids)[own]
        for latent in lines:
            on = [token for token, z in zip(tokens, hidden) if z @ data.sae.W_dec[latent] > 0]
            shown = re.search(rf"^ +{latent}  .*?{name}: (.*?)(?:   B: .*)?$", text, re.M)[1]
            assert shown == (" ".join(on)[:60] or "–")


def test_explain_says_of_an_mlp_that_its_ablations_do_not_add_up(opened, capsys):
    data, model = opened
    head = {"w1": draw(5, len(data.head["latents"])), "b1": draw(5, seed=1),
            "w2": draw(5, seed=2), "b2": torch.zeros(1)}
    mlp = stage3.RewardModel(model.tensors | head, model.meta, model.backbone)
    text, lines = explained(capsys, data, mlp, data.pairs[0]["id"], top=4)
    assert "these do not add up" in text
    assert "exactly" not in text
    assert len(lines) == 4


@pytest.mark.parametrize("sign, probability", [(1, "1.00"), (-1, "0.00")])
def test_explain_gives_a_difference_beyond_doubt_the_probability_0_or_1(
        sign, probability, opened, capsys):
    data, model = opened
    a, b = model.score([WATER] * 2, ["Yes.", "No, ten."])
    sure = {"w1": sign * 1000 * model.tensors["w1"] / (a - b), "temperature": torch.ones(1)}
    model = stage3.RewardModel(model.tensors | sure, model.meta, model.backbone)
    text, _ = explained(capsys, data, model, WATER, "Yes.", "No, ten.")
    assert f"preferred with probability {probability}\n" in text


# ---------------------------------------------------------------- token by token

FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "mistral", "qwen3"]
TEXTS = [(WATER, "Yes."), (WATER, "No, it is not; ten 🦆 say so."),
         ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": WATER}], "It")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_the_tokens_and_the_bias_add_up_to_the_reward(family, backbone_of):
    model = linear_reward(backbone_of(family), range(12))
    rewards = torch.tensor(model.score(*map(list, zip(*TEXTS))))
    for (prompt, response), reward in zip(TEXTS, rewards.tolist()):
        found = model.tokens(prompt, response)
        assert sum(found["parts"]) + found["bias"] == pytest.approx(
            reward, abs=1e-5 * float(rewards.std()))
        assert found["reward"] == pytest.approx(sum(found["parts"]) + found["bias"], abs=1e-9)
        assert "".join(found["tokens"]) == response


def test_a_token_has_the_part_of_the_formula(backbone_of):
    model = linear_reward(backbone_of("llama"), range(12))
    text = model.render(WATER, "Yes, it is.")
    own = hidden_alone(model.backbone, text.ids)[text.first:text.stop]
    found = model.tokens(WATER, "Yes, it is.")
    for z, part in zip(own, found["parts"], strict=True):
        by_hand = 0.0
        for weight, direction, mean, std in zip(model.head.w1, model.directions, model.mean,
                                                model.std):
            by_hand += float(weight * (z @ direction - mean) / std) / len(own)
        assert part == pytest.approx(by_hand, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("meta", [{"token": "last"}, {"normalise": "rms"}])
def test_where_the_reward_is_no_sum_over_tokens_there_are_no_parts(meta, backbone_of):
    model = linear_reward(backbone_of("llama"), range(12), **meta)
    assert not model.reads_tokens()
    with pytest.raises(UserError, match="a sum over tokens only with token rule mean"):
        model.tokens(WATER, "Yes.")


def test_explain_prints_the_part_of_each_token_as_a_number(opened, capsys):
    data, model = opened
    text, _ = explained(capsys, data, model, WATER, "Yes.", "No, ten.")
    for name, response in (("A", "Yes."), ("B", "No, ten.")):
        found = model.tokens(WATER, response)
        line = " · ".join(f"{token.strip()} {part:+.2f}"
                          for token, part in zip(found["tokens"], found["parts"]))
        assert f"{name}: each token's part of the reward {found['reward']:+.3f}" in text
        assert f"  {line}\n" in text


@pytest.mark.parametrize("terminal, settings, coloured", [
    (True, {"TERM": "xterm-256color"}, True),
    (True, {"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
    (True, {"TERM": "dumb"}, False),
    (False, {"TERM": "xterm-256color"}, False),
])
def test_tokens_are_shaded_only_in_a_terminal_that_has_colours(
        terminal, settings, coloured, opened, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    text, _ = explained(capsys, *opened, WATER, "Yes.", "No, ten.")
    assert ("\033[48;5;" in text) == coloured


def test_a_token_is_green_where_it_raises_the_reward_and_red_where_it_lowers_it():
    found = {"tokens": ["a", "b", "c"], "parts": [0.3, -0.3, 0.0]}
    green, red = "\033[48;5;34m\033[97ma\033[0m", "\033[48;5;124m\033[97mb\033[0m"
    assert explain.shaded(found, 0.3) == green + red + "c"


# ---------------------------------------------------------------- what cannot be explained

@pytest.mark.parametrize("words, said", [
    (["p999"], ["no pair has this id", "p999", "pairs.jsonl"]),
    (["a", "b"], ["2 values", "quote"]),
    (["a", "b", "c", "d"], ["4 values"]),
    (["a", "b", "wet " * 9999], ["longer than max length"]),
])
def test_what_explain_cannot_explain_is_one_line_in_three_parts(words, said, opened):
    data, model = opened
    with pytest.raises(UserError) as refusal:
        explain.explain_pair(data, model, *explain.pair_to_explain(data, words))
    text = str(refusal.value)
    assert text.count(" · ") == 2
    assert "\n" not in text
    assert all(word in text for word in said)


@pytest.mark.parametrize("words", [["p999"], ["a", "b"]])
def test_what_explain_cannot_explain_is_refused_before_a_language_model_is_opened(
        words, finished, monkeypatch):
    def opened_model(*_, **__):
        pytest.fail("a language model was opened")
    monkeypatch.setattr(stage1, "load_backbone", opened_model)
    assert_one_line_error(command("04_evaluate", "--run", finished, "--explain", *words),
                          "--explain", words[0])


def test_the_command_explains_a_pair_and_writes_nothing(finished):
    before = sorted(finished.rglob("*"))
    code, out, _ = command("04_evaluate", "--run", finished, "--explain", "p3")
    assert code == 0
    assert "chosen minus rejected" in out
    assert sorted(finished.rglob("*")) == before
