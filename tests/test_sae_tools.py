"""parts/sae_tools.py: what it trains on, that training helps, goes on after a kill, and gives an SAE in raw units."""

import importlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import parts.sae_tools as T
import sae as S

health = importlib.import_module("02_select_features").health

WORDS = "the sun is hot and water cold so people drink tea or ask why a bird can fly".split()
ENDS = "<|im_end|>\n"


@pytest.fixture
def backbone(backbone_of):
    return backbone_of("llama")             # three random blocks of width 32


def sayings(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 6)) for _ in range(n)]


def chats(n, seed=0):
    said = sayings(2 * n, seed)
    return [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in zip(said[:n], said[n:], strict=True)]


def settings(folder, steps, k=4):
    """The arguments of `sae.py train`."""
    return SimpleNamespace(model="tiny", layer=1, texts="t.jsonl", out=str(folder / "own.safetensors"), width=48, k=k,
                           end_share=0.33, cuts=2, turns=2, start=None, tokens=steps * 64, batch=64, lr=3e-3, buffer=512, seed=0,
                           dead_after=2000, max_length=96)


@pytest.mark.parametrize("texts", [chats(40), sayings(80), chats(20) + sayings(40)], ids=["chats", "plain", "both"])
def test_training_explains_more_than_the_start_with_unit_decoder_rows_and_at_most_k_latents(tmp_path, backbone, texts):
    z, _ = T.sample_activations(backbone, texts[-8:], 1)
    start = health(T.train(backbone, texts, 1, settings(tmp_path, 1), lambda line: None), z)
    sae = T.train(backbone, texts, 1, settings(tmp_path, 250), lambda line: None)
    end = health(sae, z)
    assert end["explained_variance"] > start["explained_variance"] + 0.15
    assert end["l0"] <= 4 and int((sae.encode(z) > 0).sum(1).max()) <= 4
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert sae.info["layer"] == 1 and sae.info["tokens"] == 250 * 64
    assert os.listdir(tmp_path) == ["own.safetensors"]                  # the checkpoint is gone


@pytest.mark.parametrize("killed_at", [10, 40])
def test_an_interrupted_training_goes_on_from_its_checkpoint_and_finishes(tmp_path, backbone, monkeypatch, killed_at):
    save, lines = T.save_checkpoint, []
    train = lambda k=4: T.train(backbone, chats(30), 1, settings(tmp_path, 40, k), lines.append)

    def save_and_die(state, args):
        save(state, args)
        if state["step"] == killed_at:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(T, "save_checkpoint", save_and_die)
        train()
    args = settings(tmp_path, 40)
    left = load_file(T.checkpoint_path(args))
    with pytest.raises(S.SAEError, match="other settings"):
        train(k=3)
    state = T.start_state((torch.randn(9, 32), torch.randn(9, 32)), args, torch.Generator())
    T.resume(state, args)
    save(state, args)                               # what was read is what was written, Adam's moments included
    again = load_file(T.checkpoint_path(args))
    assert again.keys() == left.keys() and all(torch.equal(again[n], left[n]) for n in left if n != "step_done")
    lines.clear()
    sae = train()
    assert not any(f"step {n}/40 " in line for line in lines for n in range(1, killed_at))
    assert sae.info["tokens"] == 40 * 64 and os.listdir(tmp_path) == ["own.safetensors"]


def test_an_sae_in_raw_units_reconstructs_what_its_parameters_did_in_the_scaled_units_of_training(tmp_path):
    args, z = settings(tmp_path, 1), torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 5 + 3
    state = T.start_state((z, z), args, torch.Generator().manual_seed(0))
    with torch.no_grad():
        state["b_enc"].add_(0.5)
    W_enc, b_enc, W_dec, b_dec, scale = (state[n].detach() for n in ("W_enc", "b_enc", "W_dec", "b_dec", "scale"))
    pre = ((z * scale - b_dec) @ W_enc + b_enc).relu()
    f = torch.where(pre >= pre.sort(1).values[:, -args.k, None], pre, 0)
    assert 1.2 < 1 / scale and b_dec.norm() > 1     # else raw and scaled units would hardly differ
    torch.testing.assert_close(T.finish(state, args, 1).reconstruct(z), (f @ W_dec + b_dec) / scale, rtol=1e-5, atol=1e-4)


def test_training_goes_on_from_another_sae_and_refuses_one_of_another_kind(tmp_path, backbone):
    args, z = settings(tmp_path, 60), torch.cat(T.sample_activations(backbone, chats(20), 1))
    first = T.train(backbone, chats(40), 1, args, lambda line: None)
    T.save_sae(first, tmp_path / "first.safetensors")
    args.start, args.tokens, args.lr = str(tmp_path / "first.safetensors"), 64, 1e-6         # one step that moves nothing
    again = T.train(backbone, chats(40), 1, args, lambda line: None)
    torch.testing.assert_close(again.reconstruct(z), first.reconstruct(z), rtol=1e-3, atol=1e-3)
    assert again.info["start"] == "first.safetensors"
    args.width = 47
    with pytest.raises(S.SAEError, match="47"):
        T.train(backbone, chats(40), 1, args, lambda line: None)


def test_half_of_the_conversations_go_on_from_others(backbone):
    talks, rng = chats(40), np.random.default_rng(0)
    longer = [T.longer_talk(talk, talks, 3, rng) for talk in talks]
    assert all(long[-2:] == talk for long, talk in zip(longer, talks, strict=True))
    assert {len(long) for long in longer} == {2, 4, 6} and 10 < sum(len(long) > 2 for long in longer) < 30
    assert T.longer_talk("text", talks, 3, rng) == "text" and T.longer_talk(talks[0], talks, 1, rng) == talks[0]


def test_position_0_is_in_no_batch_and_every_other_token_is_there_once(backbone):
    tokenizer, talks = backbone.tokenizer, chats(3)
    plain = [tokenizer(text)["input_ids"] for text in ("", *sayings(2))]
    ended = [tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"] for talk in talks]
    assert [len(ids) for ids in plain][0] == 1      # BOS alone: nothing to take
    every, last = (torch.cat(part) for part in zip(*T.activations(backbone, ["", *sayings(2), *talks, talks[0]], 1, 96), strict=True))
    alone = {}                                      # each text by itself; key: the tokens up to this one
    for ids in plain + ended:
        z = backbone.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        alone |= {tuple(ids[:i + 1]): v for i, v in enumerate(z)}
    later = torch.stack([v for ids, v in alone.items() if len(ids) > 1])
    first = torch.stack([v for ids, v in alone.items() if len(ids) == 1])
    apart = lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    assert len(every) == len(later) and len(first) == 2
    assert apart(every, later).min(1).values.max() < 1e-4 and apart(later, every).min(1).values.max() < 1e-4
    assert apart(first, every).min() > 0.1
    ends = torch.stack([alone[tuple(ids)] for ids in [*ended, ended[0]]])
    assert apart(last, ends).min(1).values.max() < 1e-4 and apart(ends, last).min(1).values.max() < 1e-4


def test_a_cut_conversation_ends_as_the_template_ends_it(backbone):
    (talk,) = chats(1)
    sequences, scored = T.sequences_of(backbone, [talk], 96, cuts=6, rng=np.random.default_rng(0))
    whole, answer = backbone.tokenizer.apply_chat_template(talk, tokenize=False), talk[1]["content"]
    said = [backbone.tokenizer.decode(ids) for ids in sequences]
    assert said[0] == whole and all(scored) and len(said) > 3
    for cut in said:
        kept = cut.removesuffix(ENDS)[whole.index(answer):]
        assert cut.endswith(ENDS) and kept and answer.startswith(kept)
