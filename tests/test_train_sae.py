"""tools/train_sae.py: what it trains on, that training helps, and that a killed one goes on."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import sae as S
import tools.train_sae as T

WORDS = "the sun is hot and water cold so people drink tea or ask why a bird can fly".split()
ENDS = "<|im_end|>\n"           # how the template closes an answer


@pytest.fixture
def backbone(backbone_of):
    """Three random blocks of width 32."""
    return backbone_of("llama")


def sayings(n, seed=0):
    """n texts of six words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 6)) for _ in range(n)]


def chats(n, seed=0):
    """n conversations of two turns."""
    said = sayings(2 * n, seed)
    return [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            for asked, answer in zip(said[:n], said[n:], strict=True)]


def settings(folder, steps, k=4, **changes):
    """The arguments of tools.train_sae."""
    usual = {
        "model": "tiny", "layer": 1, "texts": "t.jsonl", "out": str(folder / "own.safetensors"),
        "width": 48, "k": k, "end_share": 0.33, "mean_share": 0.33, "cuts": 2, "turns": 2,
        "start": None,
        "tokens": steps * 64, "batch": 64, "lr": 3e-3, "buffer": 512, "seed": 0,
        "dead_after": 2000, "max_length": 96,
    }
    return SimpleNamespace(**usual | changes)


def three_pools(z):
    """The same vectors as tokens, ends and means."""
    return T.Activations(z, z, z)


def train(backbone, texts, args):
    """An SAE of layer 1, and the lines that were printed meanwhile."""
    lines = []
    return T.train(backbone, texts, 1, args, lines.append), lines


# ---------------------------------------------------------------- training

TEXTS = {"chats": chats(40), "plain": sayings(80), "both": chats(20) + sayings(40)}


@pytest.mark.parametrize("kind", TEXTS)
def test_training_explains_more_than_the_start(tmp_path, backbone, kind):
    texts = TEXTS[kind]
    z = T.sample_activations(backbone, texts[-8:], 1).tokens
    start, _ = train(backbone, texts, settings(tmp_path, 1))
    end, _ = train(backbone, texts, settings(tmp_path, 250))
    before, after = (S.health(sae, z)["explained_variance"] for sae in (start, end))
    assert after > before + 0.15


@pytest.fixture(scope="module")
def trained(backbone_of, tmp_path_factory):
    """A short training: its SAE, and the folder it was written into."""
    folder = tmp_path_factory.mktemp("trained")
    sae, _ = train(backbone_of("llama"), TEXTS["both"], settings(folder, 50))
    return SimpleNamespace(sae=sae, folder=folder)


def test_a_trained_sae_has_decoder_rows_of_norm_1(trained):
    torch.testing.assert_close(trained.sae.W_dec.norm(dim=1), torch.ones(48))


def test_no_more_than_k_latents_of_a_trained_sae_fire(trained, backbone):
    z = T.sample_activations(backbone, TEXTS["both"], 1).tokens
    fired = (trained.sae.encode(z) > 0).sum(1)
    assert 1 < fired.max() <= 4


def test_a_trained_sae_says_its_layer_and_the_number_of_its_tokens(trained):
    assert trained.sae.info["layer"] == 1
    assert trained.sae.info["tokens"] == 50 * 64


def test_a_finished_training_leaves_one_file_and_no_checkpoint(trained):
    assert os.listdir(trained.folder) == ["own.safetensors"]


def test_the_file_of_a_training_holds_its_sae_in_half_precision(trained):
    again = S.load_sae(trained.folder / "own.safetensors")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "b_in"):
        assert torch.equal(getattr(again, name), getattr(trained.sae, name).half().float()), name


def test_an_sae_in_raw_units_does_what_its_parameters_did_in_scaled_ones(tmp_path):
    args = settings(tmp_path, 1)
    z = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 5 + 3
    state = T.start_state(three_pools(z), args, torch.Generator().manual_seed(0))
    with torch.no_grad():
        state.b_enc.add_(0.5)
        assert state.scale < 0.8 and state.b_dec.norm() > 1     # else the units would hardly differ

        pre = ((z * state.scale - state.b_dec) @ state.W_enc + state.b_enc).relu()
        kth_largest = pre.sort(1).values[:, -args.k, None]
        f = torch.where(pre >= kth_largest, pre, 0)
        wanted = (f @ state.W_dec + state.b_dec) / state.scale
    got = T.finish(state, args, 1).reconstruct(z)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def that_fire(sae, z):
    """Which latents fire for any of some activations → bool [m]."""
    return (sae.encode(z) > 0).any(0)


def test_a_latent_is_idle_for_the_activations_since_it_fired_last(tmp_path):
    args = settings(tmp_path, 3)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(3, 4, 32, generator=generator)
    state = T.start_state(three_pools(batches[0]), args, generator)
    idle = [0] * args.width
    for z in batches:
        fired = that_fire(T.finish(state, args, 1), z)
        T.train_step(state, T.Activations(z, z[:0], z[:0]), args)
        idle = [0 if fires else past + 4 for fires, past in zip(fired, idle, strict=True)]
    assert set(idle) == {0, 4, 8, 12}
    assert state.idle.tolist() == idle


@pytest.mark.parametrize("dead_after, learns", [(0, True), (4, False)])
def test_only_latents_that_are_dead_learn_without_firing(tmp_path, dead_after, learns):
    args = settings(tmp_path, 1, dead_after=dead_after)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 32, generator=generator)
    state = T.start_state(three_pools(z), args, generator)
    before = state.W_dec.detach().clone()
    silent = ~that_fire(T.finish(state, args, 1), z)
    T.train_step(state, T.Activations(z, z[:0], z[:0]), args)
    moved = (state.W_dec - before).norm(dim=1) > 1e-4
    assert bool(moved[silent].any()) == learns


# ---------------------------------------------------------------- going on

STEPS = 40


@pytest.fixture(params=[10, STEPS])
def killed(request, tmp_path, backbone, monkeypatch):
    """A training killed behind a checkpoint, or behind the last: its folder, and the step."""
    save = T.save_checkpoint

    def save_and_die(state, args):
        save(state, args)
        if state.step == request.param:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(T, "save_checkpoint", save_and_die)
        train(backbone, chats(30), settings(tmp_path, STEPS))
    return SimpleNamespace(folder=tmp_path, step=request.param)


def test_a_killed_training_goes_on_from_its_checkpoint_and_finishes(killed, backbone):
    sae, lines = train(backbone, chats(30), settings(killed.folder, STEPS))
    steps = [int(line.split()[1].partition("/")[0]) for line in lines if line[:5] == "step "]
    assert min(steps) >= killed.step and steps[-1] == STEPS
    assert sae.info["tokens"] == STEPS * 64
    assert os.listdir(killed.folder) == ["own.safetensors"]


def test_a_training_that_goes_on_says_from_which_step(killed, backbone):
    _, lines = train(backbone, chats(30), settings(killed.folder, STEPS))
    behind = min(killed.step, STEPS - 1)                    # the last step is done again
    notes = [line for line in lines if line.startswith("note: ")]
    assert len(notes) == 1 and lines[0] == notes[0]
    assert f"going on behind step {behind} of {STEPS}, from {killed.folder}" in notes[0]


def test_a_training_that_begins_does_not_say_that_it_goes_on(tmp_path, backbone):
    _, lines = train(backbone, chats(30), settings(tmp_path, 3))
    assert lines and all(line.startswith("step ") for line in lines)


@pytest.fixture
def nothing_is_read(monkeypatch):
    """No text may be read through the model: it takes minutes."""
    def read(*_, **__):
        raise AssertionError("texts were read")
    monkeypatch.setattr(T, "activations", read)


def test_a_checkpoint_of_other_settings_is_refused_at_once(killed, backbone, nothing_is_read):
    with pytest.raises(S.SAEError, match="other settings"):
        train(backbone, chats(30), settings(killed.folder, STEPS, lr=1.0))


@pytest.mark.parametrize("name, damage", [
    ("W_enc", lambda tensor: tensor[:-1]),
    ("adam2.exp_avg", lambda tensor: tensor.flatten()),
    ("variance", lambda tensor: tensor[:2]),
    ("step_done", lambda tensor: None),
])
def test_a_damaged_checkpoint_is_refused_at_once(name, damage, killed, backbone, nothing_is_read):
    args = settings(killed.folder, STEPS)
    path = T.checkpoint_path(args)
    tensors = load_file(path)
    changed = damage(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.clone()
    T.save_stage(path, tensors, T.training_key(args))
    with pytest.raises(S.SAEError, match="not a complete checkpoint · .* · delete it"):
        train(backbone, chats(30), args)


def test_what_a_checkpoint_holds_is_taken_up_adams_moments_included(killed):
    args = settings(killed.folder, STEPS)
    before = load_file(T.checkpoint_path(args))
    other = torch.randn(9, 32)
    state = T.start_state(three_pools(other), args, torch.Generator())
    T.resume(state, T.read_checkpoint(args, 32), args)
    assert state.step == min(killed.step, STEPS - 1)        # the last step is done again

    T.save_checkpoint(state, args)
    after = load_file(T.checkpoint_path(args))
    assert after.keys() == before.keys()
    different = [name for name in before if not torch.equal(after[name], before[name])]
    assert different == (["step_done"] if killed.step == STEPS else [])


@pytest.fixture
def first(tmp_path, backbone):
    """A trained SAE to start from, and its file."""
    args = settings(tmp_path, 60)
    sae, _ = train(backbone, chats(40), args)
    path = tmp_path / "first.safetensors"
    T.save_sae(sae, path)
    return SimpleNamespace(sae=sae, path=str(path))


def test_training_starts_from_another_sae(tmp_path, backbone, first):
    z = torch.cat([*T.sample_activations(backbone, chats(20), 1)])
    one_step_that_moves_nothing = settings(tmp_path, 1, start=first.path, lr=1e-6)
    again, _ = train(backbone, chats(40), one_step_that_moves_nothing)
    torch.testing.assert_close(again.reconstruct(z), first.sae.reconstruct(z), rtol=1e-3, atol=1e-3)
    assert again.info["start"] == "first.safetensors"


def test_training_does_not_start_from_an_sae_of_another_width(tmp_path, backbone, first,
                                                              nothing_is_read):
    with pytest.raises(S.SAEError, match="47"):
        train(backbone, chats(40), settings(tmp_path, 1, start=first.path, width=47))


# ---------------------------------------------------------------- how it goes

class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(T.time, "monotonic", clock.monotonic)
    return clock


@pytest.mark.parametrize("done, gone, line", [
    (3, 30, "step 3/12  fits  00:30 gone, 01:30 left"),
    (6, 3600, "step 6/12  fits  1:00:00 gone, 1:00:00 left"),
    (12, 90, "step 12/12  fits  01:30 gone, 00:00 left"),
])
def test_a_line_of_progress_says_the_time_gone_and_left(done, gone, line, clock):
    lines = []
    progress = T.Progress(lines.append)
    progress.begin("step", 12)
    clock.now += gone
    progress.reach(done)
    progress.tell("fits")
    assert lines == [line]


def test_steps_of_an_earlier_call_do_not_shorten_the_time_left(clock):
    lines = []
    progress = T.Progress(lines.append)
    progress.begin("step", 20, 10)
    clock.now += 30
    progress.reach(15)
    progress.tell("fits")
    assert lines == ["step 15/20  fits  00:30 gone, 00:30 left"]


def test_the_time_gone_is_that_of_all_steps(clock, backbone, tmp_path, monkeypatch):
    def in_one_second(*given, step=T.train_step):
        clock.now += 1
        return step(*given)
    monkeypatch.setattr(T, "train_step", in_one_second)
    _, lines = train(backbone, TEXTS["both"], settings(tmp_path, 20))
    told = [re.search(r"^step (\d+)/20 .* 00:(\d\d) gone, 00:(\d\d) left", line) for line in lines]
    times = [tuple(map(int, found.groups())) for found in told if found]
    assert times == [(step, step, 20 - step) for step in range(1, 21)]


def test_while_the_buffer_fills_there_is_a_line_a_minute(clock):
    lines = []
    progress = T.Progress(lines.append)
    progress.begin("buffer", 1000)
    for size in range(10, 310, 10):
        clock.now += 10
        progress.fill(size)
    assert [line.split()[1] for line in lines] == ["70/1000", "140/1000", "210/1000", "280/1000"]
    progress.begin("step", 5)
    clock.now += 100
    progress.fill(500)                      # the buffer is filled up again between the steps
    assert len(lines) == 4


@pytest.mark.parametrize("steps, wanted", [(5, 5), (39, 20), (100, 20)])
def test_training_prints_a_line_at_every_twentieth(steps, wanted, tmp_path, backbone):
    _, lines = train(backbone, chats(30), settings(tmp_path, steps))
    assert len(lines) == wanted
    assert all(re.search(r"\d\d:\d\d gone, \d\d:\d\d left$", line) for line in lines)
    assert lines[-1].startswith(f"step {steps}/{steps} ") and lines[-1].endswith("00:00 left")


def test_a_training_that_diverges_is_one_line(tmp_path, backbone):
    with pytest.raises(S.SAEError, match="diverged, by step .* · --lr 1e\\+38 · "):
        train(backbone, chats(30), settings(tmp_path, 20, lr=1e38))


def test_texts_that_give_no_token_are_refused_and_not_read_for_ever(tmp_path, backbone):
    stream = T.stream_batches(backbone, ["", ""], 1, settings(tmp_path, 1), torch.Generator())
    with pytest.raises(S.SAEError, match="no text gives a token"):
        next(stream)


def test_threads_of_the_tools_wait_without_taking_a_core():
    code = "import os, sys, tools; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    for asked, wanted in (({}, "passive False"), ({"OMP_WAIT_POLICY": "active"}, "active False")):
        environment = {name: value for name, value in os.environ.items() if name[:3] != "OMP"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, text=True,
                              env=environment | asked, capture_output=True)
        assert done.stdout.split() == wanted.split(), done.stderr


# ---------------------------------------------------------------- what it trains on

def files_of(folder, kind):
    """A file of texts of this kind → its path."""
    talks = [{"messages": talk} for talk in chats(8)]
    plain = [{"text": text} for text in sayings(8)]
    rows = {"plain": plain, "chats": talks, "both": plain + talks, "pairs": tiny.make_pairs(6)}
    return tiny.save_rows(folder / f"{kind}.jsonl", rows[kind])


@pytest.mark.parametrize("kind, noted", [("plain", True), ("chats", False), ("both", False),
                                         ("pairs", False)])
def test_plain_texts_alone_are_noted_before_training_begins(kind, noted, tmp_path, folder_of):
    out = tiny.succeed("tools/train_sae", "--model", folder_of("llama"), "--layer", 1, "--texts",
                       files_of(tmp_path, kind), "--width", 8, "--k", 2, "--tokens", 32,
                       "--batch", 16, "--buffer", 32, "--out", tmp_path / "own.safetensors")
    note = "no conversation: a reward is read from the mean or the end of an answer"
    assert (note in out) == noted
    if noted:
        assert out.startswith("note: ") and "add rows with messages" in out.splitlines()[0]


def user(text):
    return {"role": "user", "content": text}


ANSWER = {"role": "assistant", "content": "tea"}


@pytest.mark.parametrize("row", [
    {"messages": [user("a")]},                          # nobody answers
    {"messages": [ANSWER]},                             # to nothing
    {"messages": [user("a"), ANSWER, user("b")]},
    {"messages": [user("a"), {"role": 7, "content": "b"}, ANSWER]},
    {"text": "half of a pair: \ud83d"},
    {"messages": [user("\udc00"), ANSWER]},
    {"prompt": "a", "chosen": "b \ud83d", "rejected": "\ud83d"},
    {"prompt": "a"},
    "a",
])
def test_a_row_that_cannot_be_read_is_left_out_and_counted(row, tmp_path, capsys):
    path = tiny.save_rows(tmp_path / "t.jsonl", [{"messages": [user("a"), ANSWER]}, row, row])
    assert T.read_texts(path) == [[user("a"), ANSWER]]
    assert capsys.readouterr().out.startswith("note: 2 rows of ")


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    folder = tiny.save_model(tmp_path / "model", template=tiny.NO_SYSTEM)
    backbone = T.stage1.load_backbone(folder)
    talk = [{"role": "system", "content": "Be brief."}, {**ANSWER, "content": "so"},
            user("why"), ANSWER]
    says = "refused by the chat template .*System role.* · 'Be brief.' … · "
    with pytest.raises(S.SAEError, match=says):
        T.sequences_of(backbone, [talk], 96)

def test_half_of_the_conversations_go_on_from_others():
    talks = chats(40)
    rng = np.random.default_rng(0)
    longer = [T.longer_conversation(talk, talks, 3, rng) for talk in talks]
    assert all(long[-2:] == talk for long, talk in zip(longer, talks, strict=True))
    assert {len(long) for long in longer} == {2, 4, 6}
    assert 10 < sum(len(long) > 2 for long in longer) < 30


def test_a_plain_text_goes_on_from_nothing():
    assert T.longer_conversation("text", chats(40), 3, np.random.default_rng(0)) == "text"


def test_with_one_turn_asked_a_conversation_stays_as_it_is():
    talks = chats(40)
    rng = np.random.default_rng(0)
    assert [T.longer_conversation(talk, talks, 1, rng) for talk in talks] == talks


@pytest.fixture
def taken(backbone):
    """What activations() gives for some texts, and the vectors of each text run by itself."""
    tokenizer = backbone.tokenizer
    talks = chats(3)
    alone = [tokenizer(text)["input_ids"] for text in ("", *sayings(2))]
    assert len(alone[0]) == 1               # BOS alone: nothing to take
    ended = [tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"] for talk in talks]

    vectors = {}                            # the tokens up to and with this one → its vector
    for ids in alone + ended:
        run = backbone.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        for place, vector in enumerate(run.hidden_states[2][0]):
            vectors[tuple(ids[:place + 1])] = vector

    texts = ["", *sayings(2), *talks, talks[0]]
    every, scored, _ = zip(*T.activations(backbone, texts, 1, 96), strict=True)
    return SimpleNamespace(
        every=torch.cat(every),
        scored=torch.cat(scored),
        first=torch.stack([vector for ids, vector in vectors.items() if len(ids) == 1]),
        later=torch.stack([vector for ids, vector in vectors.items() if len(ids) > 1]),
        ends=torch.stack([vectors[tuple(ids)] for ids in ended + ended[:1]]),
    )


def nearest(vectors, among):
    """The distance of each vector to the nearest of others."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(vectors, among, compute_mode=exact).min(1).values


def test_every_token_but_the_first_is_there_once(taken):
    assert len(taken.every) == len(taken.later)
    assert nearest(taken.every, taken.later).max() < 1e-4
    assert nearest(taken.later, taken.every).max() < 1e-4


def test_the_first_token_of_a_text_is_in_no_batch(taken):
    assert len(taken.first) == 2            # BOS of plain texts, <|im_start|> of the template
    assert nearest(taken.first, taken.every).min() > 0.1


def test_the_scored_tokens_are_the_last_ones_of_the_conversations(taken):
    assert len(taken.scored) == len(taken.ends)
    assert nearest(taken.scored, taken.ends).max() < 1e-4
    assert nearest(taken.ends, taken.scored).max() < 1e-4


@pytest.fixture
def cut(backbone):
    """A conversation and beginnings of its answer → its text, its answer and the sequences."""
    (talk,) = chats(1)
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        whole=backbone.tokenizer.apply_chat_template(talk, tokenize=False),
        answer=talk[1]["content"],
        sequences=T.sequences_of(backbone, [talk], 96, cuts=6, rng=rng),
    )


def test_a_cut_conversation_ends_as_the_template_ends_it(cut, backbone):
    texts = [backbone.tokenizer.decode(sequence.ids) for sequence in cut.sequences]
    assert texts[0] == cut.whole and len(texts) > 3
    for text in texts:
        kept = text.removesuffix(ENDS)[cut.whole.index(cut.answer):]
        assert text.endswith(ENDS) and kept and cut.answer.startswith(kept)


def test_the_answer_of_a_sequence_is_all_that_stands_before_the_template_s_end(cut, backbone):
    decode = backbone.tokenizer.decode
    for sequence in cut.sequences:
        first, last = sequence.answer
        assert decode(sequence.ids[:first]) == cut.whole[:cut.whole.index(cut.answer)]
        assert decode(sequence.ids[last:]) == ENDS


def test_a_plain_text_is_a_sequence_without_an_answer(backbone):
    sequences = T.sequences_of(backbone, sayings(2), 96)
    assert [sequence.answer for sequence in sequences] == [None, None]


def test_a_running_mean_is_that_of_the_tokens_of_an_answer_up_to_a_cut(backbone):
    texts = [*chats(3), *sayings(2)]
    rng = np.random.default_rng
    wanted = []
    for sequence in T.sequences_of(backbone, texts, 96, cuts=3, rng=rng(0)):
        if sequence.answer:
            run = backbone.model(torch.tensor([sequence.ids]), output_hidden_states=True)
            of_answer = [run.hidden_states[2][0, place] for place in range(*sequence.answer)]
            wanted.append(sum(of_answer) / len(of_answer))
    wanted = torch.stack(wanted)

    means = [found.means for found in T.activations(backbone, texts, 1, 96, 3, rng(0))]
    found = torch.cat(means)
    assert len(found) == len(wanted) > 6
    assert nearest(found, wanted).max() < 1e-4
    assert nearest(wanted, found).max() < 1e-4


# ---------------------------------------------------------------- the three pools

@pytest.mark.parametrize("kind, shares", [("both", (24, 16, 24)), ("plain", (64, 0, 0))])
def test_a_batch_has_the_shares_of_ends_and_means_that_were_asked_for(
        kind, shares, tmp_path, backbone):
    args = settings(tmp_path, 1, end_share=0.25, mean_share=0.375)
    stream = T.stream_batches(backbone, TEXTS[kind], 1, args, torch.Generator())
    for _ in range(3):
        assert tuple(map(len, next(stream))) == shares


def test_ends_and_means_are_drawn_from_the_newest():
    newest = T.Newest(4, torch.Generator().manual_seed(0))
    for start in (0, 3, 6):
        newest.add(torch.arange(start, start + 3)[:, None])
    assert {int(vector) for vector in newest.draw(200)} == {5, 6, 7, 8}


def test_a_new_vector_moves_none_of_those_that_are_there():
    newest = T.Newest(8, torch.Generator())
    newest.add(torch.zeros(8, 3))
    before = newest.vectors
    newest.add(torch.ones(3, 3))
    assert newest.vectors.data_ptr() == before.data_ptr()       # 65,536 of them are not copied
    assert newest.vectors[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_where_there_are_none_yet_none_are_drawn():
    newest = T.Newest(4, torch.Generator())
    newest.add(torch.zeros(0, 3))
    assert newest.draw(5).shape == (0, 3)


def test_the_error_of_each_pool_counts_over_its_own_variance(tmp_path):
    """A pool that is ten times as large and spreads ten times as far weighs no more."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(16, 32, generator=generator)
    start = T.start_state(T.Activations(z, 10 * z, 3 * z), settings(tmp_path, 1), generator)
    tokens, ends, means = start.variance
    assert ends / tokens == pytest.approx(100, rel=1e-4)
    assert means / tokens == pytest.approx(9, rel=1e-4)


@pytest.mark.parametrize("kind, pools", [("chats", ["tokens", "ends", "means"]),
                                         ("plain", ["tokens"])])
def test_the_fit_of_each_pool_that_there_is_is_measured(kind, pools, tmp_path, backbone):
    held = T.sample_activations(backbone, TEXTS[kind][:8], 1)
    state = T.start_state(held, settings(tmp_path, 1), torch.Generator().manual_seed(0))
    sae = T.finish(state, settings(tmp_path, 1), 1)
    found = T.health_of_pools(sae, held)
    assert list(found) == pools
    for name in pools:
        assert found[name] == S.health(sae, getattr(held, name))


def test_a_trained_sae_says_how_it_fits_the_conversations_held_out(tmp_path, backbone):
    sae, _ = train(backbone, chats(30), settings(tmp_path, 1))
    found = sae.info["held_out"]
    assert list(found) == ["tokens", "ends", "means"]
    assert found["ends"]["n"] == found["means"]["n"] == 2           # of 30, 2 are held out


def test_fewer_than_three_texts_are_refused(tmp_path, backbone):
    with pytest.raises(S.SAEError, match="2 texts are too few"):
        train(backbone, chats(2), settings(tmp_path, 1))
