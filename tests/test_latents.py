"""What is shown of latents and pairs, against the model's own logits, hidden states, and loops."""

import importlib
import statistics

import numpy as np
import pytest
import tiny
import torch
from tiny import draw
from transformers import AutoConfig, AutoModelForCausalLM

from parts import latents
from parts.chat import render

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
TRAIN, DEV, TEST = range(3)


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


# ---------------------------------------------------------------- activations and tokens

def activations_by_hand(sae, hidden, wanted):
    """f_j = max(0, <z, d_j>) of some latents [n][len(wanted)]: the SAE of tests has no biases."""
    return [[max(0.0, float(z @ sae.W_dec[j])) for j in wanted] for z in hidden]


def test_characters_of_several_tokens_are_shown_whole(backbone_of):
    tokenizer = backbone_of("llama").tokenizer
    text = render(tokenizer, "Is water wet?", "Nö 🦆.")
    shown = latents.pieces(tokenizer, text.ids[:text.stop], text.first)
    assert "".join(shown) == "Nö 🦆."
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


def test_activations_of_latents_are_those_of_the_sae(opened):
    data, _ = opened
    found = latents.latent_activations(data.sae, data.z[0], [5, 0, 63])
    by_hand = torch.tensor(activations_by_hand(data.sae, data.z[0], [5, 0, 63]))
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt, most, shown", [
    ("abc", 2, "bc"),
    ([{"content": "x"}, {"content": "abc"}], 300, "abc"),
])
def test_what_is_shown_of_a_prompt_is_the_end_of_its_last_turn(prompt, most, shown):
    assert latents.last_turn(prompt, most) == shown


# ---------------------------------------------------------------- the rows of the report

def rows_of(data, head, adds_firing, intervals=None, tokens=()):
    """latent_rows; number n adds a random number."""
    count = len(data.head["latents"])
    intervals = intervals or [(None, None)] * count
    return latents.latent_rows(data, head, draw(count), adds_firing, tokens, intervals)


@pytest.fixture(scope="module")
def rows(opened):
    """Rows of all latents; firing, number n adds (-1)^n n; its interval is (10n, 10n + 1)."""
    data, model = opened
    count = len(data.head["latents"])
    intervals = [(10.0 * n, 10.0 * n + 1) for n in range(count)]
    adds_firing = torch.tensor([(-1.0) ** n * n for n in range(count)])
    tokens = latents.top_tokens(model.backbone, data.head["directions"])
    return rows_of(data, model.head, adds_firing, intervals, tokens)


def numbered(rows, data):
    """→ [(row, its place among the latents of the head)]."""
    place = {latent: n for n, latent in enumerate(data.head["latents"].tolist())}
    return [(row, place[row["latent"]]) for row in rows]


def test_every_latent_has_a_row_and_rows_fall_by_what_they_add_where_they_fire(rows, opened):
    data, _ = opened
    adds = draw(len(rows)).tolist()
    assert [n for _, n in numbered(rows, data)] == list(range(len(rows)))[::-1]
    for row, n in numbered(rows, data):
        assert (row["column"], row["adds"], row["adds_firing"]) == (n, adds[n], (-1.0) ** n * n)


def test_a_weight_against_the_side_of_its_latent_is_marked(opened):
    data, model = opened
    count = len(data.head["latents"])
    weights = torch.ones(count)
    weights[[0, -1]] = -1.0             # the first of the chosen side, the last of the other
    head = stage3.LinearHead(count)
    head.w1.data.copy_(weights)
    found = rows_of(data, head, torch.zeros(count))
    against = [n for row, n in numbered(found, data) if row["against"]]
    assert against == [0, *range(count // 2, count - 1)]


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


def rows_without_backbone(data, head):
    return rows_of(data, head, torch.zeros(len(data.head["latents"])))


def test_without_a_language_model_rows_have_no_tokens(opened):
    data, model = opened
    rows = rows_without_backbone(data, model.head)
    assert len(rows) == len(data.head["latents"])
    assert all(row["tokens"] == [] and "contexts" not in row for row in rows)


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
    for row in rows_without_backbone(data, mlp):
        assert row["weight"] is None and not row["against"]


def test_what_a_direction_adds_where_it_fires_is_summed_over_those_responses(opened):
    data, model = opened
    train = [n for n, split in enumerate(data.split) if split != TEST]
    wanted = torch.zeros(len(data.head["latents"]))
    for z in data.z:
        for n in train:
            parts = model.contributions(z[n:n + 1])[0]
            for column, latent in enumerate(data.head["latents"].tolist()):
                if z[n] @ data.sae.W_dec[latent] > 0:
                    wanted[column] += parts[column] / (2 * len(train))
    torch.testing.assert_close(stage4.adds_where_it_fires(data, model), wanted)


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


# ---------------------------------------------------------------- answers of highest reward

def test_the_best_and_the_worst_answers_are_those_of_test_by_reward_each_once():
    split = [TEST, TRAIN, TEST, TEST]
    pairs = [{"id": f"p{n}", "prompt": "q", "chosen": f"c{n}", "rejected": f"r{n}",
              "category": "k"} for n in range(4)]
    pairs[3] = pairs[2] | {"id": "p3"}                          # the same texts again
    data = some_pairs([torch.zeros(4, 1)] * 2, split, pairs)
    rewards = torch.tensor([5.0, -1.0, -1.0]), torch.tensor([2.0, 7.0, 7.0])
    found = latents.extreme_answers(data, rewards, 3)
    said = {end: [(row["id"], row["side"], row["reward"], row["text"]) for row in rows]
            for end, rows in found.items()}
    assert said == {
        "best": [("p2", "rejected", 7, "r2"), ("p0", "chosen", 5, "c0"),
                 ("p0", "rejected", 2, "r0")],
        "worst": [("p2", "chosen", -1, "c2"), ("p0", "rejected", 2, "r0"),
                  ("p0", "chosen", 5, "c0")]}
