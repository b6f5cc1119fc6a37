"""What is shown of latents and pairs, against the model's own logits, hidden states, and loops."""

import importlib
import re
import statistics

import numpy as np
import pytest
import tiny
import torch
from tiny import assert_one_line_error, command
from transformers import AutoConfig, AutoModelForCausalLM

from parts import latents
from parts.chat import render
from parts.files import UserError
from sae import load_sae

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
TRAIN, DEV, TEST = range(3)
END = "<|im_end|>\n"            # what the template puts after a response


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_pairs(z, split, pairs):
    """Pairs of one token a response, each a prompt of its own."""
    n = len(split)
    tokens = [np.ones(n, int), np.ones(n, int)]
    return stage4.Pairs(z, torch.tensor(split), np.arange(n), tokens, pairs)


@pytest.fixture(scope="module")
def opened(finished):
    """(Data, RewardModel with its backbone) of the finished run."""
    return stage4.Data(finished), stage3.RewardModel.load(finished / "reward_head.safetensors")


# ---------------------------------------------------------------- tokens that a direction raises

def logits_after(backbone, directions):
    """The model's own logits where its last block puts out directions [m, d] → [m, vocabulary]."""
    def put(block, args, output):
        if isinstance(output, tuple):
            return (directions[:, None], *output[1:])
        return directions[:, None]

    hook = backbone.blocks[-1].register_forward_hook(put)
    logits = backbone.model(torch.full((len(directions), 1), 9)).logits[:, 0]
    hook.remove()
    return logits


def check_top_tokens(backbone):
    directions = torch.nn.functional.normalize(draw(6, tiny.WIDTH), dim=1)
    best = []
    for row in logits_after(backbone, directions).tolist():
        falling = sorted(range(len(row)), key=row.__getitem__, reverse=True)
        best.append([backbone.tokenizer.decode(token) for token in falling[:3]])
    assert latents.top_tokens(backbone, directions, 3) == best
    assert len({tokens[0] for tokens in best}) > 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "phi"])
def test_top_tokens_are_those_of_the_models_own_final_norm_and_output(family, folder_of):
    backbone = stage1.load_backbone(folder_of(family))
    vectors = [p for p in backbone.model.parameters() if p.dim() == 1]
    for n, vector in enumerate(vectors):        # the final norm of a new model has weight 1, bias 0
        vector.copy_(draw(len(vector), seed=n))
    check_top_tokens(backbone)


NARROW = {"ffn_dim": 64, "word_embed_proj_dim": 16}         # the output is projected


@pytest.mark.parametrize("family, more", [("olmo", {}), ("opt", NARROW)])
def test_top_tokens_where_the_final_norm_has_no_weight_or_the_output_is_projected(family, more):
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), initializer_range=0.3,
                                  pad_token_id=0, **tiny.SIZES | more)
    model = AutoModelForCausalLM.from_config(config).float()
    check_top_tokens(stage1.make_backbone(model, tokenizer, {"model": family}))


# ---------------------------------------------------------------- activations of tokens

@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return load_sae(tiny.save_sae(tmp_path_factory.mktemp("sae") / "sae.safetensors"))


WATER = "Is water wet?"
CONVERSATIONS = [(WATER, "Yes, it is."), (WATER, "No."), ("Which colour has the sky?", ""),
                 (WATER, "Yes, two.")]
WANTED = [[3], [5, 60, 5], [7, 8], list(range(64))]


def activations_by_hand(sae, hidden, wanted):
    """f_j = max(0, <z, d_j>) of some latents [n][len(wanted)]: the SAE of tests has no biases."""
    return [[max(0.0, float(z @ sae.W_dec[j])) for j in wanted] for z in hidden]


def hidden_alone(backbone, text):
    """The hidden states after block 1 of a text read alone, of its response [T, d]."""
    output = backbone.model(torch.tensor([text.ids]), output_hidden_states=True)
    return output.hidden_states[2][0, text.first:]


@pytest.mark.parametrize("pack", ["tree", "pad"])
def test_activations_of_texts_read_together_are_those_of_each_text_alone(
        pack, backbone_of, sae, monkeypatch):
    backbone = backbone_of("gemma2")
    monkeypatch.setattr(backbone, "pack", pack)
    texts = [render(backbone.tokenizer, *words) for words in CONVERSATIONS]
    found = latents.token_activations(backbone, sae, texts, 1, WANTED)
    for text, wanted, rows in zip(texts, WANTED, found, strict=True):
        by_hand = activations_by_hand(sae, hidden_alone(backbone, text), wanted)
        values = torch.tensor([values for _, values in rows])
        torch.testing.assert_close(values, torch.tensor(by_hand), rtol=1e-3, atol=6e-4)


def test_tokens_are_those_of_the_response_up_to_its_end(backbone_of, sae):
    backbone = backbone_of("llama")
    texts = [render(backbone.tokenizer, *words) for words in CONVERSATIONS]
    found = latents.token_activations(backbone, sae, texts, 1, WANTED)
    for text, (_, response), rows in zip(texts, CONVERSATIONS, found, strict=True):
        tokens = [token for token, _ in rows]
        assert tokens == [backbone.tokenizer.decode(token) for token in text.ids[text.first:]]
        if response:                # where there is none, its first token is the newline before it
            assert "".join(tokens) == response + END


def test_short_texts_are_read_in_one_forward_pass(backbone_of, sae, monkeypatch):
    backbone = backbone_of("llama")
    passes = []
    real = stage1.forward_to

    def counted(*args, **inputs):
        passes.append(1)
        return real(*args, **inputs)
    monkeypatch.setattr(stage1, "forward_to", counted)
    texts = [render(backbone.tokenizer, *words) for words in CONVERSATIONS]
    latents.token_activations(backbone, sae, texts, 1, WANTED)
    assert len(passes) == 1


def test_characters_of_several_tokens_are_shown_whole(backbone_of, sae):
    backbone = backbone_of("llama")
    text = render(backbone.tokenizer, WATER, "Nö 🦆.")
    tokens, = latents.token_activations(backbone, sae, [text], 1, [[3, 4]])
    shown = [token for token, _ in tokens]
    assert "".join(shown) == "Nö 🦆." + END
    assert any("🦆" in token for token in shown)
    assert not any("\ufffd" in token for token in shown)


class Stripping:
    """A tokenizer that, like SentencePiece's, drops the space before the first token."""
    words = ["<s>", " Yes", ",", " it", " is"]

    def decode(self, ids):
        return "".join(self.words[token] for token in ids).lstrip(" ")


def test_a_token_keeps_its_leading_space_where_the_tokenizer_leaves_it_out():
    found = latents.pieces(Stripping(), [0, 1, 2, 3, 4], first=1)
    assert found == [" Yes", ",", " it", " is"]


def test_only_the_last_tokens_of_a_long_text_are_shown(opened):
    data, model = opened
    pair = {"id": "long", "prompt": WATER, "chosen": "wet " * 50 + "end"}
    row, = latents.with_heat(data, model.backbone, [(3, pair, "chosen", 1.5)], last=7)
    assert len(row["heat"]) == 7
    assert "".join(token for token, _ in row["heat"]).endswith("end" + END)
    assert row["score"] == 1.5


def test_activations_of_latents_are_those_of_the_sae(opened):
    data, _ = opened
    found = latents.latent_activations(data.sae, data.z[0], [5, 0, 63])
    by_hand = torch.tensor(activations_by_hand(data.sae, data.z[0], [5, 0, 63]))
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- texts that lie furthest along

DIRECTION = torch.tensor([0.6, 0.8])
ACROSS = torch.tensor([0.8, -0.6])
CHAT = [{"role": "user", "content": "q"}]
# id, split, prompt, chosen, rejected, how far along the direction either lies
ROWS = [
    ("a", TRAIN, "p", "x", "y", 5.0, -1.0),
    ("b", DEV, "q", "s", "t", 3.0, 2.0),
    ("c", TEST, "p", "u", "v", 99.0, -99.0),
    ("d", TRAIN, CHAT, "s", "w", -4.0, 4.0),        # another prompt than that of b
    ("e", TRAIN, "q", "s", "z", 3.0, -2.0),         # the chosen answer of b again
]


def extreme(count):
    """extreme_texts of ROWS → {end: [(id, side, score)]}."""
    pairs = []
    for name, _, prompt, chosen, rejected, *_ in ROWS:
        pairs.append({"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    chosen = torch.tensor([row[5] for row in ROWS])
    rejected = torch.tensor([row[6] for row in ROWS])
    z = [scores[:, None] * DIRECTION + ACROSS for scores in (chosen, rejected)]
    data = some_pairs(z, [row[1] for row in ROWS], pairs)
    found = {}
    for end, texts in latents.extreme_texts(data, DIRECTION, count).items():
        found[end] = [(pair["id"], side, round(score, 4)) for pair, side, score in texts]
    return found


def test_extreme_texts_are_those_of_train_and_dev_in_order():
    assert extreme(3) == {
        "highest": [("a", "chosen", 5.0), ("d", "rejected", 4.0), ("b", "chosen", 3.0)],
        "lowest": [("d", "chosen", -4.0), ("e", "rejected", -2.0), ("a", "rejected", -1.0)]}


def test_an_answer_in_several_pairs_of_a_prompt_is_shown_once():
    found = extreme(99)
    assert len(found["highest"]) == len(found["lowest"]) == 7       # of 8 responses
    assert ("e", "chosen", 3.0) not in found["highest"]


@pytest.mark.parametrize("prompt, most, shown", [
    ("abc", 2, "bc"),
    ([{"content": "x"}, {"content": "abc"}], 300, "abc"),
])
def test_what_is_shown_of_a_prompt_is_the_end_of_its_last_turn(prompt, most, shown):
    assert latents.last_turn(prompt, most) == shown


# ---------------------------------------------------------------- the rows of the report

@pytest.fixture(scope="module")
def rows(opened):
    """Rows of all latents; number n adds a random number, its interval is (10n, 10n + 1)."""
    data, model = opened
    count = len(data.head["latents"])
    intervals = [(10.0 * n, 10.0 * n + 1) for n in range(count)]
    return latents.latent_rows(data, model.head, draw(count), model.backbone, intervals, 2, shown=3)


def numbered(rows, data):
    """→ [(row, its place among the latents of the head)]."""
    place = {latent: n for n, latent in enumerate(data.head["latents"].tolist())}
    return [(row, place[row["latent"]]) for row in rows]


def test_every_latent_of_the_head_has_a_row_and_rows_fall_by_what_they_add(rows, opened):
    data, _ = opened
    added = draw(len(rows)).tolist()
    assert sorted(row["latent"] for row in rows) == sorted(data.head["latents"].tolist())
    assert [row["adds"] for row in rows] == sorted(added, reverse=True)
    assert all(row["adds"] == added[n] for row, n in numbered(rows, data))


def test_a_row_holds_the_weight_the_side_and_the_interval_of_its_latent(rows, opened):
    data, _ = opened
    for row, n in numbered(rows, data):
        assert row["weight"] == float(data.head["w1"][n])
        assert row["side"] == ("chosen" if n < len(rows) / 2 else "rejected")
        assert (row["low"], row["high"]) == (10 * n, 10 * n + 1)
        assert row["link"] is None
        assert len(row["tokens"]) == 8


def test_a_row_holds_how_often_its_latent_fires_on_either_side_of_train_and_dev(rows, opened):
    data, _ = opened
    train = [n for n, split in enumerate(data.split) if split != TEST]
    for row in rows:
        for z, name in zip(data.z, ("frequency_chosen", "frequency_rejected")):
            fires = [float(z[n] @ data.sae.W_dec[row["latent"]] > 0) for n in train]
            assert row[name] == pytest.approx(statistics.mean(fires))


def test_the_first_rows_have_texts_at_both_ends_in_order(rows):
    assert [len(row["texts"]) for row in rows] == [2] * 3 + [0] * (len(rows) - 3)
    for row in rows[:3]:
        highest = [text["score"] for text in row["texts"]["highest"]]
        lowest = [text["score"] for text in row["texts"]["lowest"]]
        assert len(highest) == len(lowest) == 2
        assert highest[0] >= highest[1] > lowest[1] >= lowest[0]


def test_a_text_shows_its_own_score_and_what_its_tokens_fire(rows, opened):
    data, model = opened
    pair_named = {pair["id"]: (n, pair) for n, pair in enumerate(data.pairs)}
    for row, n in numbered(rows[:3], data):
        for text in row["texts"]["highest"] + row["texts"]["lowest"]:
            at, pair = pair_named[text["id"]]
            z = data.z[text["side"] == "rejected"][at]
            score = float(z @ data.head["directions"][n])
            hidden = hidden_alone(model.backbone, model.render(pair["prompt"], pair[text["side"]]))
            fires = max(0.0, float(hidden[-1] @ data.sae.W_dec[row["latent"]]))
            assert text["score"] == pytest.approx(score, abs=1e-4)
            assert text["prompt"] == pair["prompt"]
            assert "".join(token for token, _ in text["heat"]) == pair[text["side"]] + END
            assert text["heat"][-1] == ["\n", pytest.approx(fires, abs=2e-3)]


def rows_without_backbone(data, head):
    count = len(data.head["latents"])
    return latents.latent_rows(data, head, torch.zeros(count), None, [(None, None)] * count, 5)


def test_without_a_language_model_rows_have_no_tokens_and_no_texts(opened):
    data, model = opened
    rows = rows_without_backbone(data, model.head)
    assert len(rows) == len(data.head["latents"])
    assert all(row["tokens"] == [] and row["texts"] == {} for row in rows)


def test_a_row_without_an_interval_holds_none(opened):
    data, model = opened
    for row in rows_without_backbone(data, model.head):
        assert row["low"] is row["high"] is None


def test_a_latent_of_an_sae_with_a_page_is_linked(opened, monkeypatch):
    data, model = opened
    monkeypatch.setitem(data.sae.info, "neuronpedia", "gpt2-small/1-res-jb")
    for row in rows_without_backbone(data, model.head):
        address = "https://www.neuronpedia.org/gpt2-small/1-res-jb"
        assert row["link"] == f"{address}/{row['latent']}"


def test_a_latent_of_an_mlp_has_no_weight(opened):
    data, _ = opened
    mlp = stage3.MLPHead(len(data.head["latents"]), 3)
    assert all(row["weight"] is None for row in rows_without_backbone(data, mlp))


# ---------------------------------------------------------------- pairs that are most wrong

def wrong(count=10):
    """most_wrong of the test pairs p1, p2, p4, p5, p6, whose differences are -1, 2, -3, 0, -1."""
    split = [TRAIN, TEST, TEST, DEV, TEST, TEST, TEST]
    pairs = []
    for n in range(len(split)):
        pairs.append({"id": f"p{n}", "prompt": f"q{n}", "chosen": "c" * 700, "rejected": f"r{n}"})
    pairs[4]["prompt"] = [{"role": "user", "content": "first"}, {"role": "user", "content": "last"}]
    z = [torch.zeros(len(split), 1)] * 2
    data = some_pairs(z, split, pairs)
    data.head = {"temperature": torch.tensor([2.0])}
    return latents.most_wrong(data, np.array([-1.0, 2.0, -3.0, 0.0, -1.0]), count)


def test_the_most_wrong_pairs_have_the_lowest_differences_and_a_tie_is_not_wrong():
    found = [(row["id"], row["difference"]) for row in wrong()]
    assert found == [("p4", -3), ("p1", -1), ("p6", -1)]
    assert [row["id"] for row in wrong(1)] == ["p4"]


def test_a_wrong_pair_shows_its_confidence_and_the_beginning_of_both_responses():
    first, second, _ = wrong()
    assert first["confidence"] == pytest.approx(0.817574, abs=1e-6)         # σ(3/2)
    assert second["confidence"] == pytest.approx(0.622459, abs=1e-6)        # σ(1/2)
    assert (first["prompt"], second["prompt"]) == ("last", "q1")
    assert (first["chosen"], first["rejected"]) == ("c" * 600, "r4")


# ---------------------------------------------------------------- why A beat B

NUMBER = r" +([+-]\d+\.\d{3})"
LINE = re.compile(rf"^ +(\d+)  (?:chosen|rejected){NUMBER * 3} ", re.MULTILINE)


def explained(capsys, data, model, *words, top=99):
    """explain_pair → (what it printed, {latent: (adds, of A, of B)})."""
    latents.explain_pair(data, model, *latents.pair_to_explain(data, words), top=top)
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
    assert set(lines) == set(of_a) == set(data.head["latents"].tolist())
    for latent, (adds, a, b) in lines.items():
        assert a == pytest.approx(of_a[latent], abs=6e-4)
        assert adds == pytest.approx(a - b, abs=0.0021)

    reward_a, reward_b = model.score([prompt] * 2, [chosen, rejected])
    assert "add up to it exactly" in text
    total = sum(adds for adds, _, _ in lines.values())
    assert total == pytest.approx(reward_a - reward_b, abs=0.006)


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
        tokens = [repr(model.backbone.tokenizer.decode(i)) for i in rendered.ids[rendered.first:]]
        hidden = hidden_alone(model.backbone, rendered)
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


@pytest.mark.parametrize("words, said", [
    (["p999"], ["no pair has this id", "p999", "pairs.jsonl"]),
    (["a", "b"], ["2 values", "quote"]),
    (["a", "b", "c", "d"], ["4 values"]),
    (["a", "b", "wet " * 9999], ["longer than max length"]),
])
def test_what_explain_cannot_explain_is_one_line_in_three_parts(words, said, opened):
    data, model = opened
    with pytest.raises(UserError) as refusal:
        latents.explain_pair(data, model, *latents.pair_to_explain(data, words))
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
