"""What stage 4 shows of latents and pairs, against the language model's own logits and hidden states, loops, and hand-worked cases."""

import base64
import importlib
import json
import re
import shutil
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from matplotlib.figure import Figure
from tiny import assert_one_line_error, command
from transformers import AutoConfig, AutoModelForCausalLM

from parts import explain, report
from sae import load_sae

stage1, stage3, stage4 = (importlib.import_module(n) for n in ("01_extract", "03_train_head", "04_evaluate"))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- what a latent is

@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "phi"])
def test_top_tokens_are_those_of_the_models_own_logits_when_a_direction_is_the_output_of_its_last_block(family, folder_of):
    backbone = stage1.load_backbone(folder_of(family))
    for n, p in enumerate(p for p in backbone.model.parameters() if p.dim() == 1):
        p.copy_(draw(len(p), seed=n))                       # the final norm of a new model has weight 1 and bias 0
    directions = torch.nn.functional.normalize(draw(6, tiny.WIDTH), dim=1)
    put = lambda block, args, out: (directions[:, None], *out[1:]) if isinstance(out, tuple) else directions[:, None]
    hook = backbone.blocks[-1].register_forward_hook(put)
    logits = backbone.model(torch.full((6, 1), 9)).logits[:, 0]
    hook.remove()
    best = [sorted(range(len(row)), key=row.__getitem__)[:-4:-1] for row in logits.tolist()]
    assert explain.top_tokens(backbone, directions, 3) == [[backbone.tokenizer.decode(i) for i in row] for row in best]
    assert len({row[0] for row in best}) > 1


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return load_sae(tiny.save_sae(tmp_path_factory.mktemp("sae") / "sae.safetensors"))


@pytest.mark.parametrize("pack", ["tree", "pad"])
def test_activations_of_texts_read_together_are_those_of_each_text_alone(pack, backbone_of, sae, monkeypatch):
    backbone, passes, real = backbone_of("gemma2"), [], stage1.forward_to
    monkeypatch.setattr(backbone, "pack", pack)
    monkeypatch.setattr(stage1, "forward_to", lambda *args, **inputs: passes.append(1) or real(*args, **inputs))
    asked = [("Is water wet?", "Yes, it is."), ("Is water wet?", "No."), ("Which colour has the sky?", ""), ("Is water wet?", "Yes, two.")]
    texts, latents = [stage1.render(backbone.tokenizer, *words) for words in asked], [[3], [5, 60, 5], [7, 8], list(range(64))]
    found = explain.token_activations(backbone, sae, texts, 1, latents)
    assert len(passes) == 1
    for text, wanted, rows in zip(texts, latents, found):
        hidden = backbone.model(torch.tensor([text.ids]), output_hidden_states=True).hidden_states[2][0, text.first:]
        by_hand = [[max(0.0, float(z @ sae.W_dec[j])) for j in wanted] for z in hidden]            # unit rows, no biases
        torch.testing.assert_close(torch.tensor([row for _, row in rows]), torch.tensor(by_hand), rtol=1e-3, atol=6e-4)
        assert [token for token, _ in rows] == [backbone.tokenizer.decode(i) for i in text.ids[text.first:]]
    assert "".join(token for token, _ in found[0]) == "Yes, it is.<|im_end|>\n"


def test_extreme_texts_are_those_of_train_in_order_and_an_answer_in_several_pairs_comes_once():
    chat = [{"role": "user", "content": "q"}]
    rows = [("a", "p", "x", "y", 5.0, -1.0), ("b", "q", "s", "t", 3.0, 2.0), ("c", "p", "u", "v", 99.0, -99.0),      # c is a dev pair
            ("d", chat, "s", "w", -4.0, 4.0), ("e", "q", "s", "z", 3.0, -2.0)]         # e has the chosen answer of b
    pairs, values = [dict(zip(("id", "prompt", "chosen", "rejected"), row)) for row in rows], [row[4:] for row in rows]
    direction = torch.tensor([0.6, 0.8])
    z = [torch.tensor([side])[0][:, None] * direction + torch.tensor([0.8, -0.6]) for side in zip(*values)]
    data = SimpleNamespace(z=z, split=torch.tensor([0, 0, 1, 0, 0]), pairs=pairs)
    show = lambda found: {end: [(pair["id"], side, round(score, 4)) for pair, side, score in rows] for end, rows in found.items()}
    assert show(explain.extreme_texts(data, direction, 3)) == {
        "highest": [("a", "chosen", 5.0), ("d", "rejected", 4.0), ("b", "chosen", 3.0)],
        "lowest": [("d", "chosen", -4.0), ("e", "rejected", -2.0), ("a", "rejected", -1.0)]}
    assert [len(rows) for rows in explain.extreme_texts(data, direction, 99).values()] == [7, 7]    # 8 train responses, one twice


def test_what_is_shown_of_a_prompt_is_the_end_of_its_last_turn():
    assert explain.last_turn("abc", 2) == "bc" and explain.last_turn([{"content": "x"}, {"content": "abc"}]) == "abc"


@pytest.fixture(scope="module")
def opened(finished):
    """(Data, RewardModel with its backbone) of the finished run."""
    return stage4.Data(finished), stage3.RewardModel.load(finished / "reward_head.safetensors")


def test_rows_of_latents_fall_by_what_they_add_on_train_and_their_texts_show_their_own_activations(opened):
    data, model = opened
    latents, train = data.head["latents"].tolist(), (data.split == 0).nonzero().flatten().tolist()
    intervals = [[10.0 * n + side for n in range(len(latents))] for side in (0, 1)]
    rows = explain.latent_rows(data, explain.train_shares(data, model)[0], model.backbone, intervals, 2, shown=3)
    assert sorted(r["latent"] for r in rows) == sorted(latents) and [len(r["texts"]) for r in rows] == [2] * 3 + [0] * (len(rows) - 3)
    assert [r["adds"] for r in rows] == sorted((r["adds"] for r in rows), reverse=True) and rows[0]["adds"] > rows[-1]["adds"]
    for row in rows:
        n, j = latents.index(row["latent"]), row["latent"]
        u = data.head["w1"][n] / data.head["std"][n] * data.head["directions"][n]
        assert row["adds"] == pytest.approx(statistics.mean(float((data.z[0][i] - data.z[1][i]) @ u) for i in train), abs=1e-5)
        assert row["weight"] == pytest.approx(float(data.head["w1"][n])) and row["side"] == ("chosen", "rejected")[n >= len(latents) // 2]
        assert (row["low"], row["high"]) == (10 * n, 10 * n + 1) and row["link"] is None and len(row["tokens"]) == 8
        for z, name in zip(data.z, ("frequency_chosen", "frequency_rejected")):
            assert row[name] == pytest.approx(statistics.mean(float(z[i] @ data.sae.W_dec[j] > 0) for i in train))
        for text in (t for end in row["texts"].values() for t in end):
            pair = next(p for p in data.pairs if p["id"] == text["id"])
            z = data.z[text["side"] == "rejected"][data.pairs.index(pair)]
            assert text["score"] == pytest.approx(float(z @ data.head["directions"][n]), abs=1e-4) and text["prompt"] == pair["prompt"]
            assert text["heat"][-1] == ["\n", pytest.approx(max(0.0, float(z @ data.sae.W_dec[j])), abs=2e-3)]       # the scored token
            assert "".join(token for token, _ in text["heat"]) == pair[text["side"]] + "<|im_end|>\n"
        for end, sign in (("highest", -1), ("lowest", 1)):
            scores = [sign * t["score"] for t in row["texts"].get(end, [])]
            assert scores == sorted(scores)


def test_without_a_language_model_rows_have_no_tokens_and_texts_and_an_sae_with_a_page_is_linked(opened, monkeypatch):
    data, _ = opened
    monkeypatch.setitem(data.sae.info, "neuronpedia", "gpt2-small/1-res-jb")
    rows = explain.latent_rows(data, torch.zeros(len(data.head["latents"])), None, [[0.0] * len(data.head["latents"])] * 2, 5)
    assert all(r["tokens"] == [] and r["texts"] == {} for r in rows)
    assert rows[0]["link"] == f"https://www.neuronpedia.org/gpt2-small/1-res-jb/{rows[0]['latent']}"


def test_only_the_last_tokens_of_a_long_text_are_shown(opened):
    data, model = opened
    pair = {"id": "long", "prompt": "Is water wet?", "chosen": "wet " * 50 + "end"}
    row, = explain.with_heat(data, model.backbone, [(3, pair, "chosen", 1.5)], last=7)
    assert "".join(token for token, _ in row["heat"]).endswith("end<|im_end|>\n") and len(row["heat"]) == 7 and row["score"] == 1.5


# ---------------------------------------------------------------- why A beat B

def explained(capsys, data, model, *words, **options):
    """explain_pair → (what it printed, {latent: the numbers of its line})."""
    explain.explain_pair(data, model, *explain.pair_to_explain(data, words), **options)
    text = capsys.readouterr().out
    lines = re.findall(r"^ +(\d+)  (?:chosen|rejected) +([+-]\d\.\d{3}) +([+-]\d\.\d{3}) +([+-]\d\.\d{3}) ", text, re.M)
    return text, {int(j): tuple(map(float, rest)) for j, *rest in lines}


@pytest.mark.parametrize("by_id", [True, False])
def test_explain_prints_both_rewards_and_what_adds_up_to_their_difference(by_id, opened, capsys):
    data, model = opened
    prompt, chosen, rejected = (data.pairs[4][n] for n in ("prompt", "chosen", "rejected"))
    words, names = ([data.pairs[4]["id"]], ("chosen", "rejected")) if by_id else ([prompt, chosen, rejected], "AB")
    text, lines = explained(capsys, data, model, *words, top=99)
    a, b = model.score([prompt] * 2, [chosen, rejected])
    assert f"{names[0]:<8} {a:+.3f}   {chosen}\n" in text and f"{names[1]:<8} {b:+.3f}   {rejected}\n" in text and prompt in text
    assert f"{names[0]} minus {names[1]}: {a - b:+.3f}, preferred with probability {model.prefer(prompt, chosen, rejected):.2f}\n" in text
    assert "add up to it exactly" in text and set(lines) == set(data.head["latents"].tolist())
    assert sum(adds for adds, _, _ in lines.values()) == pytest.approx(a - b, abs=0.006)
    assert all(adds == pytest.approx(c - r, abs=0.0021) for adds, c, r in lines.values())
    of_a = {c["latent"]: c["contribution"] for c in model.explain(prompt, chosen)["contributions"]}
    assert all(c == pytest.approx(of_a[j], abs=6e-4) for j, (_, c, _) in lines.items())
    sizes = [abs(adds) for adds, _, _ in lines.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    assert explained(capsys, data, model, *words, top=2)[1] == dict(list(lines.items())[:2])


def test_explain_shows_the_tokens_on_which_a_latent_fires_of_either_response(opened, capsys):
    data, model = opened
    text, lines = explained(capsys, data, model, "Is water wet?", "Yes.", "No, ten.", top=99)
    for name, response in (("A", "Yes."), ("B", "No, ten.")):
        whole = model.render("Is water wet?", response)
        hidden = model.backbone.model(torch.tensor([whole.ids]), output_hidden_states=True).hidden_states[2][0]
        tokens = [(repr(model.backbone.tokenizer.decode(i)), z) for i, z in list(zip(whole.ids, hidden))[whole.first:]]
        for j in lines:
            fires = [token for token, z in tokens if z @ data.sae.W_dec[j] > 0]
            shown = re.search(rf"^ +{j}  .*?{name}: (.*?)(?:   B: .*)?$", text, re.M)[1]
            assert shown == (" ".join(fires)[:60] or "–")


def test_explain_says_of_an_mlp_that_its_ablations_do_not_add_up(opened, capsys):
    data, model = opened
    mlp = {n: model.tensors[n] for n in ("latents", "directions", "mean", "std", "temperature")}
    mlp |= {"w1": draw(5, len(mlp["latents"])), "b1": draw(5, seed=1), "w2": draw(5, seed=2), "b2": torch.zeros(1)}
    text, lines = explained(capsys, data, stage3.RewardModel(mlp, model.meta, model.backbone), data.pairs[0]["id"])
    assert "these do not add up" in text and "exactly" not in text and len(lines) == min(10, len(mlp["latents"]))


@pytest.mark.parametrize("words, said", [(["p999"], ["no pair has this id", "p999", "pairs.jsonl"]), (["a", "b"], ["2 values", "quote"]),
                                         (["a", "b", "c", "d"], ["4 values"]), (["a", "b", "wet " * 9999], ["longer than max length"])])
def test_what_explain_cannot_explain_is_one_line_in_three_parts(words, said, opened):
    with pytest.raises(stage1.UserError) as refusal:
        explain.explain_pair(*opened, *explain.pair_to_explain(opened[0], words))
    text = str(refusal.value)
    assert text.count(" · ") == 2 and "\n" not in text and all(word in text for word in said)


def test_the_command_explains_a_pair_writes_nothing_and_refuses_an_unknown_id(finished):
    before = sorted(finished.rglob("*"))
    code, out, _ = command("04_evaluate", "--run", finished, "--explain", "p3")
    assert code == 0 and "chosen minus rejected" in out and sorted(finished.rglob("*")) == before
    code, _, err = command("04_evaluate", "--run", finished, "--explain", "p999")
    assert_one_line_error((code, "", err[err.index("error:"):]), "p999")


# ---------------------------------------------------------------- pictures and page

def test_a_picture_is_a_png_the_same_at_every_drawing_and_none_without_matplotlib(tmp_path, monkeypatch):
    found = [report.picture(lambda axes: axes.plot([1, 2]), tmp_path / f"{n}.png") for n in range(2)]
    assert found[0] == found[1] and base64.b64decode(found[0]) == (tmp_path / "0.png").read_bytes()
    assert (tmp_path / "0.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.picture(lambda axes: axes.plot([1]), tmp_path / "no.png") is None and not (tmp_path / "no.png").exists()


def test_the_pictures_draw_the_numbers_of_the_evaluation():
    row = lambda a, ties=0: {"accuracy": a, "low": a - 0.1, "high": a + 0.2, "ties": ties, "ties_half": a + ties / 2,
                             "half_low": a - 0.1 + ties / 2, "half_high": a + 0.2 + ties / 2}
    axes = Figure().subplots()
    report.accuracy_plot(axes, {"sparserm": row(0.6), "dense": row(0.7), "words": row(0.5, 0.25)})
    drawn = [[float(x) for x in line.get_xdata()] for line in axes.lines]              # bottom up
    assert drawn == [[0.4, 0.7], [0.5], [0.625], pytest.approx([0.6, 0.9]), [0.7], [0.5, pytest.approx(0.8)], [0.6], [0.5, 0.5]]
    assert [t.get_text().lower() for t in axes.get_yticklabels()] == ["words", "dense", "sparserm"]
    axes = Figure().subplots()
    report.curve_plot(axes, {"sparserm": {"16": row(0.9), "2": row(0.1, 1), "1": row(0.5)}, "dense": {"1": row(0.7)}}, "K")
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == [([1, 2, 16], [0.5, 0.6, 0.9]), ([1], [0.7])]
    assert len(axes.collections) == 1 and axes.get_xlabel() == "K"
    axes = Figure().subplots()
    report.reliability_plot(axes, {"bins": [{"confidence": 0.6, "accuracy": 0.5}, {"confidence": 0.9, "accuracy": 1.0}]})
    assert (list(axes.lines[1].get_xdata()), list(axes.lines[1].get_ydata())) == ([0.6, 0.9], [0.5, 1.0])


# ---------------------------------------------------------------- the stage

@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("flag, value", [("--texts", "-1"), ("--device", "nope")])
def test_a_flag_that_cannot_be_meant_is_refused_before_anything_is_computed(flag, value, run, monkeypatch):
    for name in ("fit_best", "fit_head"):
        monkeypatch.setattr(stage3, name, lambda *_, **__: pytest.fail("computed first"))
    assert_one_line_error(command("04_evaluate", "--run", run, "--seeds", 1, "--sweeps", "none", "--texts", 1, flag, value), flag)


def test_other_weights_at_the_place_of_the_backbone_are_refused_before_anything_is_computed(tmp_path, monkeypatch):
    run = tiny.make_run(tmp_path)
    shutil.rmtree(tmp_path / "model")
    tiny.save_model(tmp_path / "model", seed=9)
    code, _, err = command("04_evaluate", "--run", run, "--seeds", 1, "--sweeps", "none", "--texts", 1)
    assert code == 2 and "weights of" in err


@pytest.mark.parametrize("words", [["p999"], ["a", "b"]])
def test_what_explain_cannot_explain_is_refused_before_a_language_model_is_opened(words, run, monkeypatch):
    monkeypatch.setattr(stage1, "load_backbone", lambda *_, **__: pytest.fail("a language model was opened"))
    assert_one_line_error(command("04_evaluate", "--run", run, "--explain", *words), "--explain")


@pytest.mark.parametrize("family, sizes", [("olmo", tiny.SIZES), ("opt", tiny.SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16})])
def test_top_tokens_of_models_whose_final_norm_has_no_weight_or_that_project_their_output(family, sizes):
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), initializer_range=0.3, pad_token_id=0, **sizes)
    backbone = stage1.make_backbone(AutoModelForCausalLM.from_config(config).float(), tokenizer, {"model": family})
    x = torch.nn.functional.normalize(torch.randn(6, tiny.WIDTH), dim=1)
    hook = backbone.blocks[-1].register_forward_hook(lambda b, a, o: (x[:, None], *o[1:]) if isinstance(o, tuple) else x[:, None])
    logits = backbone.model(torch.full((6, 1), 9)).logits[:, 0]
    hook.remove()
    assert explain.top_tokens(backbone, x, 1) == [[tokenizer.decode(i)] for i in logits.argmax(1).tolist()]


def test_characters_of_several_tokens_are_shown_whole(backbone_of, finished):
    backbone, sae = backbone_of("llama"), stage4.Data(finished).sae
    text = stage1.render(backbone.tokenizer, "Is water wet?", "Nö 🦆.")
    tokens, = explain.token_activations(backbone, sae, [text], 1, [[3, 4]])
    assert "".join(token for token, _ in tokens) == "Nö 🦆.<|im_end|>\n"


def test_pictures_of_an_earlier_wider_evaluation_do_not_stay(run):
    for sweeps in ("small", "none"):
        tiny.succeed("04_evaluate", "--run", run, "--seeds", 1, "--texts", 0, "--sweeps", sweeps)
    assert sorted(p.name for p in run.glob("*.png")) == ["accuracy.png", "reliability.png"]


def test_a_share_of_one_in_a_thousand_million_is_not_rounded_to_0(run, monkeypatch):
    data, one = stage4.Data(run), torch.ones(tiny.WIDTH)
    fake = 1, {"w1": one, "std": one}, [np.ones((1, int((data.split == 2).sum())))]
    monkeypatch.setattr(stage4, "controls", lambda *_: dict.fromkeys(["dense", *report.SAYS], fake))
    data.meta["parameters"] = 9_241_705_984
    with tiny.argv("--run", run, "--texts", 0, "--sweeps", "none"), monkeypatch.context() as patch:
        patch.setattr(stage4, "Data", lambda *_: data)
        patch.setattr(report, "print_report", lambda *_: None)
        patch.setattr(report, "write_page", lambda *_: [])
        stage4.main()
    cost = json.loads((run / "evaluation.json").read_text())["cost"]
    assert cost["share"] == pytest.approx(cost["trained_parameters"] / cost["backbone_parameters"], rel=0.01)
