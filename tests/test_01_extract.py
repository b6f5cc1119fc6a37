"""Stage 1: the hook, texts that share a pass, the split and the shards.

Against transformers' own forward pass, naive searches, and what one process writes without a stop.
"""

import importlib
import json
import os
import shutil
import string
import subprocess
import sys
import weakref

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import argv, assert_one_line_error, command, make_pairs, save_rows, succeed
from transformers import AutoModelForCausalLM

from parts import chat, packing

stage1 = importlib.import_module("01_extract")
FAMILIES = list(tiny.FAMILIES)
LAST = tiny.LAYERS - 1
END = tiny.SPECIAL.index("<|im_end|>")


def some_ids(n, seed=0):
    """Random tokens, none of them a control token → list of n ints."""
    return torch.randint(10, 400, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def read_rows_of(path):
    """The rows of a JSONL file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def args_of(model, pairs, run):
    """The arguments of a run on layer 0."""
    return ["--model", model, "--pairs", pairs, "--layer", 0, "--run", run]


def bytes_of(run):
    """{path within the folder: bytes} of every file."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


# ---------------------------------------------------------------- the hook

def states_of_transformers(backbone, ids):
    """hidden_states of one text alone, list of [T, d]; the last one is after the final norm."""
    with torch.inference_mode():
        states = backbone.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [state[0] for state in states]


def last_block_of(backbone, ids):
    """The output of the last block for one text alone, [T, d]."""
    [states] = backbone.forward_to([LAST], input_ids=torch.tensor([ids]))
    return states[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_of_block_l_is_hidden_states_l_plus_1(family, backbone_of):
    backbone = backbone_of(family)
    ids = some_ids(20)
    found = backbone.forward_to([0, 1], input_ids=torch.tensor([ids]))
    wanted = states_of_transformers(backbone, ids)
    torch.testing.assert_close(found[0][0], wanted[1])
    torch.testing.assert_close(found[1][0], wanted[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_last_block_it_is_the_state_before_the_final_norm(family, backbone_of):
    backbone = backbone_of(family)
    ids = some_ids(20)
    found = last_block_of(backbone, ids)
    after = states_of_transformers(backbone, ids)[-1]
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    [norm] = [m for name, m in backbone.model.base_model.named_children() if name in names]
    torch.testing.assert_close(norm(found), after)
    assert not torch.allclose(found, after, rtol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_above_l_and_no_lm_head_runs(family, backbone_of):
    backbone = backbone_of(family)
    calls = []

    def note(name):
        return lambda module, args: calls.append(name)

    watched = {**dict(enumerate(backbone.blocks)), "head": backbone.model.get_output_embeddings()}
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in watched.items()]
    backbone.forward_to([1], input_ids=torch.tensor([some_ids(9)]))
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1]


# ---------------------------------------------------------------- many texts in one pass

def branching_texts():
    """Texts longer than the window: two stems, branches of branches, a twin, a text in another."""
    stem = some_ids(14, 1)
    other = some_ids(9, 2)
    arm = stem + some_ids(10, 3)
    return [
        stem + some_ids(6, 4),
        arm + some_ids(5, 5),
        arm + some_ids(16, 6),
        arm,
        stem + some_ids(6, 4),
        other + some_ids(2, 7),
        other + some_ids(12, 8),
        some_ids(13, 9),
    ]


def far_apart(found, wanted):
    """The largest relative error of a token's state."""
    return ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max()


@pytest.mark.parametrize("pack", ["tree", "pad"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_has_the_state_in_a_shared_pass_that_it_has_alone(family, pack, folder_of):
    backbone = stage1.load_backbone(folder_of(family), pack=pack, budget=150)
    assert backbone.pack == pack                                # it was not refused
    texts = branching_texts()
    assert min(map(len, texts)) > tiny.WINDOW
    for members, hidden in backbone.hidden_rows(texts, [1, 1, LAST]):
        for index, places in members:
            assert len(places) == len(texts[index])
            first, again, last = (states[torch.from_numpy(places)] for states in hidden)
            alone = states_of_transformers(backbone, texts[index])[2]
            assert far_apart(first, alone) < 1e-4
            assert far_apart(again, alone) < 1e-4               # a layer may be asked for twice
            assert far_apart(last, last_block_of(backbone, texts[index])) < 1e-4


@pytest.mark.parametrize("pack", ["tree", "pad"])
def test_every_text_is_in_one_pass_and_a_pass_holds_several(pack, folder_of):
    backbone = stage1.load_backbone(folder_of("llama"), pack=pack, budget=150)
    texts = branching_texts()
    passes = [members for members, _ in backbone.hidden_rows(texts, [0])]
    seen = [index for members in passes for index, _ in members]
    assert sorted(seen) == list(range(len(texts)))
    assert len(passes) < len(texts)


def test_the_mask_of_a_padded_pass_tells_tokens_from_padding():
    inputs, _ = packing.padded_inputs([[5, 6], [7, 8, 9], [4]], [1, 0, 2], "cpu")
    assert inputs["input_ids"].tolist() == [[7, 8, 9], [5, 6, 0], [4, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]


def without_tree_mask(module, args, kwargs):
    mask = kwargs.get("attention_mask")
    is_tree = mask is not None and mask.dim() == 4
    return args, {**kwargs, "attention_mask": None if is_tree else mask}


def without_positions(module, args, kwargs):
    return args, {**kwargs, "position_ids": None}


def sees_all_without_a_mask(module, args, kwargs):
    """As a model that is not causal by itself."""
    if kwargs.get("attention_mask") is not None:
        return args, kwargs
    tokens = kwargs["input_ids"].shape[1]
    return args, {**kwargs, "attention_mask": torch.zeros(1, 1, tokens, tokens)}


@pytest.fixture
def own_backbone(folder_of):
    """A backbone that a test may change."""
    return stage1.load_backbone(folder_of("llama"))


def test_packing_holds_for_a_model_that_honours_mask_and_positions(own_backbone):
    assert packing.packing_holds(own_backbone)


@pytest.mark.parametrize("fault", [without_tree_mask, without_positions, sees_all_without_a_mask])
def test_packing_does_not_hold_where_a_tree_gives_other_states_than_a_text(fault, own_backbone):
    own_backbone.model.register_forward_pre_hook(fault, with_kwargs=True)
    assert not packing.packing_holds(own_backbone)


def test_packing_does_not_hold_for_a_mask_that_forgets_the_window(tmp_path, monkeypatch):
    """The window is longer than a few tokens: it takes a long text to notice."""
    folder = tiny.save_model(tmp_path / "model", "mistral", sliding_window=40)
    backbone = stage1.load_backbone(folder)
    assert packing.packing_holds(backbone)

    def causal(model, row, device):
        return packing.additive_mask(row.sees, model.dtype)

    monkeypatch.setattr(packing, "attention_masks", causal)
    assert not packing.packing_holds(backbone)


def test_a_model_that_ignores_the_mask_falls_back_to_padding_and_says_so_once(own_backbone):
    assert (own_backbone.pack, own_backbone.notes) == ("tree", [])
    model = own_backbone.model
    model.register_forward_pre_hook(without_tree_mask, with_kwargs=True)
    fallen = stage1.make_backbone(model, own_backbone.tokenizer, own_backbone.meta)
    assert fallen.pack == "pad"
    assert len(fallen.notes) == 1 and "padding" in fallen.notes[0]


SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12)


def beginnings_of(row, sequences):
    """The tokens up to each node of a row → {node: tuple of tokens}."""
    found = {}
    for index, path in row.members:
        for n, node in enumerate(path.tolist()):
            found[node] = tuple(sequences[index][:n + 1])
    return found


@given(SEQUENCES, st.integers(5, 60))
def test_a_tree_holds_every_sequence_along_its_path(sequences, budget):
    placed = []
    for row in packing.tree_rows(sequences, budget):
        for index, path in row.members:
            placed.append(index)
            assert row.ids[path].tolist() == sequences[index]
            assert row.depth[path].tolist() == list(range(len(sequences[index])))
    assert sorted(placed) == list(range(len(sequences)))


@given(SEQUENCES, st.integers(5, 60))
def test_a_tree_holds_each_beginning_once_and_keeps_to_the_budget(sequences, budget):
    for row in packing.tree_rows(sequences, budget):
        beginnings = beginnings_of(row, sequences)
        assert sorted(beginnings) == list(range(len(row.ids)))
        assert len(set(beginnings.values())) == len(row.ids)
        assert len(row.ids) <= budget or len(row.members) == 1


@given(SEQUENCES, st.integers(5, 60))
def test_a_tree_ends_only_where_the_next_sequence_no_longer_fits(sequences, budget):
    rows = list(packing.tree_rows(sequences, budget))
    for row, after in zip(rows, rows[1:]):
        following = sequences[after.members[0][0]]
        together = set(beginnings_of(row, sequences).values())
        together |= {tuple(following[:n + 1]) for n in range(len(following))}
        assert len(together) > budget


@given(SEQUENCES, st.integers(5, 60))
def test_a_token_of_a_tree_sees_itself_and_its_ancestors(sequences, budget):
    for row in packing.tree_rows(sequences, budget):
        beginnings = beginnings_of(row, sequences)
        for a, upto_a in beginnings.items():
            for b, upto_b in beginnings.items():
                assert row.sees[a, b] == (upto_a[:len(upto_b)] == upto_b)


# ---------------------------------------------------------------- which token is read

RESPONSE = "It is blue, surely."


def places_of(rule, ids, inner):
    """Which tokens a rule reads: a search for the response's own tokens."""
    starts = [i for i in range(len(ids)) if ids[i:i + len(inner)] == inner]
    if rule == "last":
        return [len(ids) - 1]
    if rule == "eot":
        return [max(i for i, token in enumerate(ids) if token == END)]
    if rule == "content":
        return [starts[0] + len(inner) - 1]
    return list(range(starts[0], starts[0] + len(inner)))


def answers(backbone):
    """Three answers to one question, the last of them RESPONSE → list of Text."""
    said = ["It is blue, not.", "No.", RESPONSE]
    return [chat.render(backbone.tokenizer, "Which colour?", answer) for answer in said]


@pytest.mark.parametrize("rule", stage1.RULES)
def test_each_rule_reads_the_token_that_a_naive_search_finds(rule, backbone_of):
    backbone = backbone_of("gpt2")
    inner = backbone.tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]
    texts = answers(backbone)
    ids = texts[2].ids
    assert ids[-1] != END and len(inner) > 3                        # the rules do differ here

    found = stage1.residuals(backbone, texts, [1], [rule])[1, rule][2]
    wanted = states_of_transformers(backbone, ids)[2][places_of(rule, ids, inner)].mean(0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_several_rules_and_layers_at_once_give_what_each_gives_alone(backbone_of):
    backbone = backbone_of("gemma2")
    texts = answers(backbone)
    together = stage1.residuals(backbone, texts, [0, LAST], stage1.RULES)
    assert set(together) == {(layer, rule) for layer in (0, LAST) for rule in stage1.RULES}
    for (layer, rule), z in together.items():
        alone = stage1.residuals(backbone, texts, [layer], [rule])
        assert list(alone) == [(layer, rule)]
        torch.testing.assert_close(z, alone[layer, rule])


def test_several_rules_and_layers_take_one_pass(own_backbone, monkeypatch):
    passes = []
    forward_to = stage1.forward_to

    def counted(model, blocks, layers, **inputs):
        passes.append(layers)
        return forward_to(model, blocks, layers, **inputs)

    monkeypatch.setattr(stage1, "forward_to", counted)
    stage1.residuals(own_backbone, answers(own_backbone), [0, LAST], stage1.RULES)
    assert passes == [[0, LAST]]


def test_a_rule_that_there_is_not_is_an_error_that_names_those_there_are(backbone_of):
    [text, *_] = answers(backbone_of("gpt2"))
    with pytest.raises(stage1.UserError, match="unknown token rule first .*mean.*content"):
        stage1.token_range(text, "first")


# ---------------------------------------------------------------- the split

QUESTIONS = st.text(string.printable, max_size=30)


def many_spaces(text):
    return "  " + text.replace(" ", " \t ") + "\n"


CHANGED = st.sampled_from([str.upper, str.lower, str.title, many_spaces])


@given(QUESTIONS, st.integers(0, 9), CHANGED)
def test_case_and_spaces_do_not_move_a_question_to_another_split(question, seed, change):
    question += " is it?"
    assert stage1.split_of(change(question), seed) == stage1.split_of(question, seed)


@given(QUESTIONS, st.integers(0, 9))
def test_a_dialogue_falls_in_the_split_of_its_first_question(question, seed):
    question += " is it?"
    first = {"role": "user", "content": question}
    more = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    system = {"role": "system", "content": "Be brief."}
    for prompt in ([first], [first, *more], [system, first, *more]):
        assert stage1.split_of(prompt, seed) == stage1.split_of(question, seed)


@pytest.mark.parametrize("shares", [(0.7, 0.1, 0.2), (0.2, 0.5, 0.3)])
def test_the_splits_have_the_shares_asked_for(shares):
    drawn = [stage1.split_of(f"question {i}", shares=shares) for i in range(4000)]
    assert tuple(round(drawn.count(name) / 4000, 1) for name in stage1.SPLITS) == shares


def test_the_shares_are_7_1_and_2_tenths_where_none_are_asked_for():
    drawn = [stage1.split_of(f"question {i}") for i in range(4000)]
    assert [round(drawn.count(name) / 4000, 1) for name in stage1.SPLITS] == [0.7, 0.1, 0.2]


def test_another_seed_draws_the_splits_independently():
    pairs = [[stage1.split_of(f"question {i}", seed) for seed in (0, 1)] for i in range(4000)]
    moved = sum(a != b for a, b in pairs) / 4000
    assert moved == pytest.approx(1 - (0.49 + 0.01 + 0.04), abs=0.04)


def test_pairs_cut_from_one_dialogue_are_one_group(tmp_path, folder_of):
    first = [{"role": "user", "content": "Is it?"}]
    more = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    other = [{"role": "user", "content": "Why?"}]
    rows = [{"prompt": prompt, "chosen": "It is so.", "rejected": "It is not."}
            for prompt in (first, first + more, other)]
    pairs = save_rows(tmp_path / "pairs.jsonl", rows)
    succeed("01_extract", *args_of(folder_of("gpt2"), pairs, tmp_path / "run"))
    begin, later, apart = [row["group"] for row in read_rows_of(tmp_path / "run" / "pairs.jsonl")]
    assert begin == later != apart


def test_splits_and_groups_do_not_depend_on_the_file_and_its_order(tmp_path, folder_of):
    found = []
    for name, rows in (("a", make_pairs(30)), ("b", make_pairs(30)[::-2])):
        pairs = save_rows(tmp_path / f"{name}.jsonl", rows)
        succeed("01_extract", *args_of(folder_of("gpt2"), pairs, tmp_path / name))
        rows = read_rows_of(tmp_path / name / "pairs.jsonl")
        found.append({row["prompt"]: (row["split"], row["group"]) for row in rows})
    assert len(found[0]) == 30 and len(found[1]) == 15
    assert found[1].items() <= found[0].items()


# ---------------------------------------------------------------- the shards

@pytest.fixture(scope="module")
def sharded(tmp_path_factory, folder_of):
    """A run of 20 pairs, two layers and two rules, in shards of 8, and what made it."""
    run = tmp_path_factory.mktemp("sharded") / "run"
    pairs = tiny.save_pairs(run.parent / "pairs.jsonl", 20)
    wanted = ["--layer", 0, 2, "--token", "mean", "last"]
    args = ["--model", folder_of("gemma2"), "--pairs", pairs, *wanted, "--run"]
    with argv(*args, run), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "SHARD_PAIRS", 8)
        stage1.main()
    return run, args


KEYS = [(layer, rule) for layer in (0, 2) for rule in ("mean", "last")]
SHARDS = [f"layer{layer}-{rule}-{n:05d}-of-00003.safetensors" for layer, rule in KEYS
          for n in range(3)]


def opened_shards(run):
    """→ list of (path, rows of pairs.jsonl, tensors, metadata as it stands in the file)."""
    rows = read_rows_of(run / "pairs.jsonl")
    found = []
    for number, name in enumerate(SHARDS):
        start = 8 * (number % 3)
        path = run / "activations" / name
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            found.append((path, rows[start:start + 8], tensors, file.metadata()))
    return found


def test_there_is_one_file_a_layer_rule_and_shard_and_no_other(sharded):
    shards = [f"activations/{name}" for name in SHARDS]
    assert sorted(bytes_of(sharded[0])) == sorted([*shards, "pairs.jsonl", "dropped.jsonl"])


def test_the_columns_of_a_shard_have_the_shapes_and_types_of_the_contract(sharded):
    for _, rows, tensors, _ in opened_shards(sharded[0]):
        n = len(rows)
        kinds = {name: (tuple(column.shape), column.dtype) for name, column in tensors.items()}
        assert kinds == {
            "chosen": ((n, tiny.WIDTH), torch.float32),
            "rejected": ((n, tiny.WIDTH), torch.float32),
            "pair": ((n,), torch.int64),
            "group": ((n,), torch.int64),
            "split": ((n,), torch.uint8),
            "chosen_tokens": ((n,), torch.int32),
            "rejected_tokens": ((n,), torch.int32),
        }


def test_a_shard_repeats_what_pairs_jsonl_says(sharded):
    for path, rows, tensors, _ in opened_shards(sharded[0]):
        start = 8 * int(path.stem.split("-")[2])
        assert tensors["pair"].tolist() == list(range(start, start + len(rows)))
        assert tensors["group"].tolist() == [row["group"] for row in rows]
        assert [("train", "dev", "test")[i] for i in tensors["split"]] == [r["split"] for r in rows]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_lengths_in_a_shard_are_those_of_the_responses_alone(side, sharded):
    tokenizer = tiny.make_tokenizer()
    for _, rows, tensors, _ in opened_shards(sharded[0]):
        alone = [tokenizer(row[side], add_special_tokens=False)["input_ids"] for row in rows]
        assert tensors[f"{side}_tokens"].tolist() == [len(ids) for ids in alone]


def test_the_metadata_of_a_shard_is_one_key_of_sorted_json_that_names_its_parent(sharded):
    run, _ = sharded
    for path, _, _, raw in opened_shards(run):
        meta = json.loads(raw["sparserm"])
        assert list(raw) == ["sparserm"] and raw["sparserm"] == json.dumps(meta, sort_keys=True)
        assert meta["parent"] == {"pairs": stage1.file_hash(run / "pairs.jsonl")}
        assert path.name.startswith(f"layer{meta['layer']}-{meta['token']}-")


def test_a_row_of_pairs_jsonl_has_the_columns_of_the_contract(sharded):
    columns = {"id", "prompt", "chosen", "rejected", "group", "split", "category", "source"}
    for row in read_rows_of(sharded[0] / "pairs.jsonl"):
        assert set(row) == columns


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_shards_of_one_run_hold_what_each_text_gives_alone(side, sharded, backbone_of):
    backbone = backbone_of("gemma2")
    for _, rows, tensors, raw in opened_shards(sharded[0]):
        meta = json.loads(raw["sparserm"])
        for row, vector in zip(rows, tensors[side], strict=True):
            text = chat.render(backbone.tokenizer, row["prompt"], row[side])
            ids = torch.tensor([text.ids])
            [states] = backbone.forward_to([meta["layer"]], input_ids=ids)
            alone = states[0, text.first:text.stop].mean(0)
            if meta["token"] == "last":
                alone = states[0, -1]
            assert (vector - alone).norm() < 1e-4 * alone.norm()


# ---------------------------------------------------------------- each text is rendered once

def test_a_run_renders_the_two_texts_of_a_usable_pair_once(tmp_path, folder_of, monkeypatch):
    rows = [*make_pairs(5), {"prompt": "q", "chosen": "a", "rejected": " "}]
    pairs = save_rows(tmp_path / "p.jsonl", rows)
    rendered = []
    render_turns = chat.render_turns            # the work of render(), whoever calls it

    def counted(tokenizer, turns, response):
        rendered.append((turns[-1]["content"], response))
        return render_turns(tokenizer, turns, response)

    monkeypatch.setattr(chat, "render_turns", counted)
    monkeypatch.setattr(stage1, "SHARD_PAIRS", 2)
    with argv(*args_of(folder_of("llama"), pairs, tmp_path / "run"), "--layer", 0, 1):
        stage1.main()
    sides = [(row["prompt"], row[side]) for row in rows[:5] for side in ("chosen", "rejected")]
    assert rendered == sides                    # those of the last row are refused unread


def test_rendered_texts_come_back_in_order_also_where_more_are_added_meanwhile():
    texts = [chat.Text(some_ids(n, n), n // 3, n // 2, n - 1) for n in range(4, 40)]
    kept = chat.RenderedTexts()
    kept.extend(texts[:10])
    assert kept.take(4) == texts[:4]
    kept.extend(texts[10:])
    assert kept.take(0) == []
    assert kept.take(32) == texts[4:]


# ---------------------------------------------------------------- a run that was killed, or changed

@pytest.fixture
def cut(sharded, tmp_path, monkeypatch):
    """The sharded run as a kill leaves it: a shard missing, one cut short, a file half written."""
    run = shutil.copytree(sharded[0], tmp_path / "run")
    (run / "activations/layer0-mean-00001-of-00003.safetensors").unlink()
    short = run / "activations/layer2-last-00002-of-00003.safetensors"
    short.write_bytes(short.read_bytes()[:900])
    (run / "activations/.layer2-last-00002-of-00003.safetensors.77.part").write_bytes(b"half")
    monkeypatch.setattr(stage1, "SHARD_PAIRS", 8)
    return run


def test_a_killed_run_goes_on_to_the_same_bytes(sharded, cut):
    with argv(*sharded[1], cut):
        stage1.main()
    found = {name: data for name, data in bytes_of(cut).items() if not name.endswith(".part")}
    assert found == bytes_of(sharded[0])


def test_a_killed_run_computes_only_the_shards_that_are_missing(sharded, cut, monkeypatch):
    computed = []
    extract_shard = stage1.extract_shard

    def counted(backbone, rows, start, *rest):
        computed.append(start)
        return extract_shard(backbone, rows, start, *rest)

    monkeypatch.setattr(stage1, "extract_shard", counted)
    with argv(*sharded[1], cut):
        stage1.main()
    assert computed == [8, 16]


def test_a_complete_run_does_not_open_the_model(sharded, tmp_path, monkeypatch):
    run = shutil.copytree(sharded[0], tmp_path / "run")
    monkeypatch.setattr(stage1, "SHARD_PAIRS", 8)
    monkeypatch.setattr(stage1, "load_backbone", None)
    with argv(*sharded[1], run):
        stage1.main()
    assert bytes_of(run) == bytes_of(sharded[0])


# ---------------------------------------------------------------- a folder that is in use

@pytest.fixture(scope="module")
def used(tmp_path_factory, folder_of):
    """A run of 20 pairs on layer 0, and the arguments that made it, up to the folder."""
    run = tmp_path_factory.mktemp("used") / "run"
    pairs = tiny.save_pairs(run.parent / "pairs.jsonl", 20)
    args = ["--model", folder_of("gemma2"), "--pairs", pairs, "--layer", 0, "--run"]
    succeed("01_extract", *args, run)
    return run, args


CHANGES = {
    "length": ["--max-length", 60],
    "seed": ["--seed", 1],
    "shares": ["--split", "0.5,0.2,0.3"],
    "pairs": ["--limit", 19],
    "dtype": ["--dtype", "bfloat16"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_in_a_folder_in_use_are_refused_and_nothing_touched(change, used, tmp_path):
    run = shutil.copytree(used[0], tmp_path / "again")
    result = command("01_extract", *used[1], run, *CHANGES[change])
    assert_one_line_error(result, run, "--overwrite")
    assert bytes_of(run) == bytes_of(used[0])


@pytest.mark.parametrize("change", CHANGES)
def test_with_overwrite_a_folder_in_use_is_as_if_it_were_new(change, used, tmp_path):
    args = used[1]
    fresh = tmp_path / "fresh"
    again = shutil.copytree(used[0], tmp_path / "again")
    succeed("01_extract", *args, fresh, *CHANGES[change])
    out = succeed("01_extract", *args, again, *CHANGES[change], "--overwrite")
    assert "1 computed, 0 found complete" in out
    assert bytes_of(fresh) == bytes_of(again)
    assert bytes_of(fresh) != bytes_of(used[0])


def test_the_error_says_which_setting_is_another(used, tmp_path):
    run = shutil.copytree(used[0], tmp_path / "again")
    result = command("01_extract", *used[1], run, "--max-length", 60)
    assert_one_line_error(result, "max_length 2048", "max_length 60")


def test_overwrite_does_not_compute_again_what_is_the_same(used, tmp_path):
    run = shutil.copytree(used[0], tmp_path / "again")
    out = succeed("01_extract", *used[1], run, "--overwrite")
    assert "0 computed, 1 found complete" in out


@pytest.mark.parametrize("more", [["--token", "last"], ["--layer", 2]])
def test_another_rule_or_layer_is_written_beside_what_is_there(more, used, tmp_path):
    run = shutil.copytree(used[0], tmp_path / "again")
    succeed("01_extract", *used[1], run, *more)
    before = bytes_of(used[0])
    after = bytes_of(run)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


@pytest.mark.parametrize("flag", ["--run", "--pairs"])
def test_the_run_and_the_pairs_have_to_be_named(flag, used, tmp_path, capsys):
    args = [*used[1], tmp_path / "run"]
    at = args.index(flag)
    with argv(*args[:at], *args[at + 2:]), pytest.raises(SystemExit) as stopped:
        stage1.main()
    assert stopped.value.code == 2
    assert f"required: {flag}" in capsys.readouterr().err


# ---------------------------------------------------------------- processes, memory, devices

def test_two_processes_of_torchrun_write_the_bytes_that_this_one_writes(tmp_path, folder_of):
    pairs = tiny.save_pairs(tmp_path / "p.jsonl", stage1.SHARD_PAIRS + 4)
    args = ["--model", folder_of("llama"), "--pairs", pairs, "--layer", 0, 1, "--run"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    script = [tiny.ROOT / "01_extract.py", *map(str, args), tmp_path / "two"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *script],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("4 computed, 0 found complete") == 1           # one of them prints

    assert "4 computed" in succeed("01_extract", *args, tmp_path / "one")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def texts_of(count, length):
    """Texts whose last token is read."""
    return [chat.Text(some_ids(length, seed), 3, length - 1, length - 1) for seed in range(count)]


def last_states(backbone, texts):
    """What rule `last` reads at block 1, [n, d]."""
    return stage1.residuals(backbone, texts, [1], ["last"])[1, "last"]


def test_out_of_memory_halves_the_tokens_of_a_pass_and_goes_on(own_backbone, monkeypatch, capsys):
    texts = texts_of(40, 30)
    wanted = last_states(own_backbone, texts)
    forward_to = stage1.forward_to

    def small(model, blocks, layers, **inputs):
        if inputs["input_ids"].numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward_to(model, blocks, layers, **inputs)

    monkeypatch.setattr(stage1, "forward_to", small)
    found = last_states(own_backbone, texts)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert own_backbone.budget == 128
    assert capsys.readouterr().out.count("out of memory") == 2              # 512 → 256 → 128


def test_out_of_memory_with_one_text_a_pass_is_an_error(own_backbone, monkeypatch):
    def full(model, blocks, layers, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stage1, "forward_to", full)
    with pytest.raises(stage1.UserError, match="out of memory even with one text"):
        last_states(own_backbone, texts_of(2, 9))


def test_device_map_auto_gives_the_same_states(backbone_of, folder_of):
    texts = texts_of(3, 20)
    spread = stage1.load_backbone(folder_of("gemma2"), device_map="auto")
    wanted = last_states(backbone_of("gemma2"), texts)
    assert torch.equal(last_states(spread, texts), wanted)


@pytest.fixture
def on_disk(folder_of, tmp_path):
    """A backbone two of whose blocks lie on the disk, as where a model is larger than memory."""
    names = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    place = {**dict.fromkeys([f"model.{name}" for name in names], "cpu"), "lm_head": "cpu"}
    place |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        folder_of("gemma2"), dtype=torch.float32, attn_implementation="eager",
        device_map=place, offload_folder=tmp_path)
    return stage1.make_backbone(model, tiny.make_tokenizer(), {"model": "spread"})


def test_blocks_on_the_disk_give_the_same_states(backbone_of, on_disk):
    texts = texts_of(3, 20)
    wanted = last_states(backbone_of("gemma2"), texts)
    assert on_disk.pack == "tree"
    assert torch.equal(last_states(on_disk, texts), wanted)


def test_blocks_on_the_disk_are_left_out_of_what_tells_a_model_apart(backbone_of, on_disk):
    found = on_disk.meta["weights"]
    wanted = backbone_of("gemma2").meta["weights"]
    assert all(a in (None, b) for a, b in zip(found, wanted, strict=True))
    assert 0 < found.count(None) < len(found)


def test_pairs_are_read_a_row_at_a_time(tmp_path, folder_of, monkeypatch):
    """Memory must not grow with the file: when a row is read, the one before is no longer held."""
    pairs = tiny.save_pairs(tmp_path / "p.jsonl", 50)
    alive = weakref.WeakSet()
    held = []                                   # how many rows, each time that one is read
    read_rows = stage1.read_rows

    class Watched(dict):
        __hash__ = object.__hash__

    def watched(path):
        for where, row in read_rows(path):
            row = Watched(row)
            alive.add(row)
            held.append(len(alive))
            yield where, row

    monkeypatch.setattr(stage1, "read_rows", watched)
    with argv(*args_of(folder_of("llama"), pairs, tmp_path / "run")):
        stage1.main()
    assert len(held) == 50
    assert max(held) <= 3


# ---------------------------------------------------------------- what cannot be used

def dropped_ids(run):
    return [row["row"]["id"] for row in read_rows_of(run / "dropped.jsonl")]


def test_pairs_whose_two_sides_are_the_same_tokens_are_dropped(tmp_path):
    rows = make_pairs(4)
    rows[0]["rejected"] = rows[0]["chosen"]
    rows[1]["rejected"] = rows[1]["chosen"] + " \n"             # this template trims
    model = tiny.save_model(tmp_path / "model", template=tiny.NO_SYSTEM)
    pairs = save_rows(tmp_path / "p.jsonl", rows)
    out = succeed("01_extract", *args_of(model, pairs, tmp_path))
    assert "2 kept, 2 dropped" in out
    assert dropped_ids(tmp_path) == ["p0", "p1"]


def test_a_text_that_cannot_be_cut_to_max_length_is_dropped(tmp_path, folder_of):
    rows = make_pairs(4)
    rows[1]["chosen"] = "wet " * 90
    rows[2]["prompt"] = [{"role": "system", "content": "wet " * 90}]        # nothing to cut here
    pairs = save_rows(tmp_path / "p.jsonl", rows)
    succeed("01_extract", *args_of(folder_of("gpt2"), pairs, tmp_path), "--max-length", 80)
    assert dropped_ids(tmp_path) == ["p1", "p2"]
    reasons = {row["reason"] for row in read_rows_of(tmp_path / "dropped.jsonl")}
    assert reasons == {"response longer than max length"}


@pytest.mark.parametrize("flag, value, words", [
    ("--layer", -1, ["layer -1", "0 to 2"]),
    ("--split", "0.5,0.2,0.2", ["--split", "add up to 1"]),
    ("--split", "1,2,3", ["--split"]),
])
def test_a_bad_argument_is_one_line_that_names_it(flag, value, words, tmp_path, folder_of):
    pairs = tiny.save_pairs(tmp_path / "p.jsonl", 6)
    args = args_of(folder_of("gpt2"), pairs, tmp_path / "run")
    assert_one_line_error(command("01_extract", *args, flag, value), *words)


def test_a_half_copied_model_is_one_line_that_names_it(tmp_path, folder_of):
    model = shutil.copytree(folder_of("gpt2"), tmp_path / "half")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    pairs = tiny.save_pairs(tmp_path / "p.jsonl", 6)
    args = args_of(model, pairs, tmp_path / "run")
    assert_one_line_error(command("01_extract", *args), model)
