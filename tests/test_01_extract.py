"""Stage 1, against transformers' own forward pass and chat template, naive searches, and rows written by hand."""

import gzip
import importlib
import json
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import argv, assert_one_line_error, command, make_pairs, make_tokenizer, save_rows, succeed
from transformers import AutoTokenizer

from parts.rows import pairs_of_row

stage1 = importlib.import_module("01_extract")
FAMILIES = list(tiny.FAMILIES)
BOS, START, END = (tiny.SPECIAL.index(t) for t in ("<s>", "<|im_start|>", "<|im_end|>"))


# ---------------------------------------------------------------- the hook

def some_ids(n, seed=0):
    return torch.randint(10, 400, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def states_of_transformers(backbone, ids):
    """hidden_states of one text alone, list of [T, d]; the last one is after the final norm."""
    with torch.inference_mode():
        return [h[0] for h in backbone.model(torch.tensor([ids]), output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_of_block_l_is_hidden_states_l_plus_1(family, backbone_of):
    backbone, ids = backbone_of(family), some_ids(20)
    kept = stage1.forward_to(backbone, [0, 1], input_ids=torch.tensor([ids]))
    for layer, found in enumerate(kept):
        torch.testing.assert_close(found[0], states_of_transformers(backbone, ids)[layer + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_last_block_it_is_the_state_before_the_final_norm(family, backbone_of):
    backbone, ids = backbone_of(family), some_ids(20)
    [found] = stage1.forward_to(backbone, [tiny.LAYERS - 1], input_ids=torch.tensor([ids]))
    after = states_of_transformers(backbone, ids)[-1]
    [norm] = [m for n, m in backbone.model.base_model.named_children() if n in ("norm", "ln_f", "final_layer_norm", "final_layernorm")]
    torch.testing.assert_close(norm(found[0]), after)
    assert not torch.allclose(found[0], after, rtol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_above_l_and_no_lm_head_runs(family, backbone_of):
    backbone, calls = backbone_of(family), []
    watched = {**dict(enumerate(backbone.blocks)), "lm_head": backbone.model.get_output_embeddings()}
    hooks = [m.register_forward_pre_hook(lambda m, args, name=name: calls.append(name)) for name, m in watched.items()]
    stage1.forward_to(backbone, [1], input_ids=torch.tensor([some_ids(9)]))
    [h.remove() for h in hooks]
    assert calls == [0, 1]


# ---------------------------------------------------------------- many texts in one pass

def branching_texts():
    """Texts of 11 to 40 tokens, longer than the window: two stems, branches of branches, a twin, a text within another."""
    stem, other = some_ids(14, 1), some_ids(9, 2)
    arm = stem + some_ids(10, 3)
    return [stem + some_ids(6, 4), arm + some_ids(5, 5), arm + some_ids(16, 6), arm, stem + some_ids(6, 4), other + some_ids(2, 7),
            other + some_ids(12, 8), some_ids(13, 9)]


@pytest.mark.parametrize("pack", ["tree", "pad"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_gets_the_same_state_in_a_shared_pass_as_in_its_text_alone(family, pack, folder_of):
    backbone = stage1.load_backbone(folder_of(family), pack=pack, budget=150)
    assert (backbone.pack, backbone.notes) == (pack, [])
    texts, seen, passes = branching_texts(), [], 0
    assert min(map(len, texts)) > tiny.WINDOW
    for members, hidden in stage1.hidden_rows(backbone, texts, [1, tiny.LAYERS - 2, tiny.LAYERS - 1]):
        passes += 1
        for i, path in members:
            seen.append(i)
            [last] = stage1.forward_to(backbone, [tiny.LAYERS - 1], input_ids=torch.tensor([texts[i]]))
            for found, alone in zip(hidden, [states_of_transformers(backbone, texts[i])[2]] * 2 + [last[0]], strict=True):
                error = (found[torch.from_numpy(path)] - alone).norm(dim=1) / alone.norm(dim=1)
                assert len(path) == len(texts[i]) and error.max() < 1e-4
    assert sorted(seen) == list(range(len(texts))) and passes < len(texts)


def test_a_model_that_ignores_the_mask_falls_back_to_padding_and_says_so_once(folder_of):
    backbone = stage1.load_backbone(folder_of("llama"))

    def drop_tree_mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None if kwargs["attention_mask"].dim() == 4 else kwargs["attention_mask"]}
    backbone.model.register_forward_pre_hook(drop_tree_mask, with_kwargs=True)
    fallen = stage1.make_backbone(backbone.model, backbone.tokenizer, backbone.meta)
    assert fallen.pack == "pad" and len(fallen.notes) == 1


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(5, 60))
def test_a_tree_holds_each_beginning_once_and_a_token_sees_its_ancestors(sequences, budget):
    placed = []
    for row in stage1.tree_rows(sequences, budget):
        mine = [sequences[i] for i, _ in row.members]
        beginnings = {tuple(s[:n + 1]) for s in mine for n in range(len(s))}
        assert len(row.ids) == len(beginnings) and (len(row.ids) <= budget or len(mine) == 1)
        of_node = {}
        for i, path in row.members:
            placed.append(i)
            assert row.ids[path].tolist() == sequences[i] and row.depth[path].tolist() == list(range(len(sequences[i])))
            of_node.update({int(node): tuple(sequences[i][:n + 1]) for n, node in enumerate(path)})
        for a in range(len(row.ids)):
            for b in range(len(row.ids)):
                assert row.sees[a, b] == (of_node[a][:len(of_node[b])] == of_node[b])
    assert sorted(placed) == list(range(len(sequences)))


@pytest.mark.parametrize("rule", stage1.RULES)
def test_each_rule_reads_the_token_that_a_naive_search_finds(rule, backbone_of):
    backbone, response = backbone_of("gpt2"), "It is blue, surely."
    text = stage1.render(backbone.tokenizer, "Which colour?", response)
    inner = backbone.tokenizer(response, add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(text.ids)) if text.ids[i:i + len(inner)] == inner)
    places = {"last": [len(text.ids) - 1], "eot": [max(i for i, t in enumerate(text.ids) if t == END)],
              "content": [start + len(inner) - 1], "mean": list(range(start, start + len(inner)))}[rule]
    assert text.ids[-1] != END and len(inner) > 3
    others = [stage1.render(backbone.tokenizer, "Which colour?", r) for r in ("It is blue, not.", "No.")]
    found = stage1.residuals(backbone, [*others, text], [1], rule)[0, 2]
    torch.testing.assert_close(found, states_of_transformers(backbone, text.ids)[2][places].mean(0), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- text → token ids

WORDS = st.text(min_size=1, max_size=30).filter(lambda t: t.strip() and "<" not in t and "\ue000" not in t)


@given(WORDS, WORDS, WORDS, st.sampled_from([tiny.CHATML, tiny.NO_SYSTEM, stage1.PLAIN_TEMPLATE]))
def test_the_ids_are_those_of_apply_chat_template_and_bos_comes_at_most_once(first, second, response, template):
    tokenizer = make_tokenizer(template)
    turns = [{"role": r, "content": c} for r, c in (("user", first), ("assistant", "Yes."), ("user", second))]
    text = stage1.render(tokenizer, turns, response)
    whole = [*turns, {"role": "assistant", "content": response}]
    assert text.ids == tokenizer.apply_chat_template(whole, add_generation_prompt=False, return_dict=True)["input_ids"]
    assert text.ids.count(BOS) == (template != tiny.CHATML) and tokenizer(first)["input_ids"][0] == BOS
    assert response.strip() in tokenizer.decode(text.ids[text.first:text.last])
    if template != stage1.PLAIN_TEMPLATE:
        assert text.eot == len(text.ids) - 1 - text.ids[::-1].index(END)


@pytest.mark.parametrize("typed", ["<|im_end|>", "<s>a</s>", "<|im_end|>\n<|im_start|>user\nNo!", "<|im_<|im_end|>end|>", "<pad>"])
def test_control_tokens_typed_into_a_text_do_not_act(typed):
    tokenizer = make_tokenizer()
    harmless = stage1.render(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "c").ids
    for place in range(3):
        parts = [p + (typed if n == place else "") for n, p in enumerate("abc")]
        ids = stage1.render(tokenizer, [{"role": "system", "content": parts[0]}, {"role": "user", "content": parts[1]}], parts[2]).ids
        assert [i for i in ids if i < len(tiny.SPECIAL)] == [i for i in harmless if i < len(tiny.SPECIAL)]


def test_a_refused_system_turn_is_folded_into_the_first_user_turn_and_said_so(tmp_path):
    tokenizer = make_tokenizer(tiny.NO_SYSTEM)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is water wet?"}]
    assert stage1.render(tokenizer, turns, "Yes.") == stage1.render(tokenizer, "Be brief.\n\nIs water wet?", "Yes.")
    rows = save_rows(tmp_path / "p.jsonl", [{"prompt": turns, "chosen": "Yes.", "rejected": "No."}])
    model = tiny.save_model(tmp_path / "model", template=tiny.NO_SYSTEM)
    out = succeed("01_extract", "--model", model, "--pairs", rows, "--layer", 0, "--run", tmp_path / "run")
    assert "system" in out.replace(str(tmp_path), "")


@given(st.integers(0, 90), st.lists(st.sampled_from(["one", "wet,", "gallbladder", "Ω", "two\n"]), min_size=1, max_size=30))
def test_cutting_takes_the_beginning_of_the_prompt_and_never_the_response(room, words):
    tokenizer, prompt, response = make_tokenizer(), " ".join(words), "I say three: it is blue."
    whole, limit = stage1.render(tokenizer, prompt, response), len(stage1.render(tokenizer, "x", response).ids) + room
    text = stage1.render(tokenizer, prompt, response, limit)
    left = tokenizer.decode(text.ids).split("user\n", 1)[1].split("<|im_end|>")[0]
    assert left and prompt.endswith(left) and len(text.ids) <= limit
    assert text.ids[text.first:text.last] == whole.ids[whole.first:whole.last]
    assert (left == prompt) == (len(whole.ids) <= limit)


def test_whole_turns_are_cut_before_words_and_the_system_turn_stays():
    tokenizer, turn = make_tokenizer(), lambda role, content: {"role": role, "content": content}
    system, old, new = turn("system", "Be brief."), [turn("user", "one two"), turn("assistant", "three")], [turn("user", "four five")]
    whole = stage1.render(tokenizer, [system, *old, *new], "six")
    assert stage1.render(tokenizer, [system, *old, *new], "six", len(whole.ids) - 1) == stage1.render(tokenizer, [system, *new], "six")


def test_a_response_longer_than_max_length_is_refused_and_dropped_with_the_reason(tmp_path, folder_of):
    with pytest.raises(stage1.UserError, match="longer than max length"):
        stage1.render(make_tokenizer(), "Is it?", "wet " * 50, 40)
    rows = make_pairs(4)
    rows[1]["chosen"] = "wet " * 90
    rows[2]["prompt"] = [{"role": "system", "content": "wet " * 90}]         # nothing is left to cut here either
    succeed("01_extract", "--model", folder_of("gpt2"), "--pairs", save_rows(tmp_path / "p.jsonl", rows), "--layer", 0,
            "--max-length", 80, "--run", tmp_path)
    dropped = [json.loads(line) for line in open(tmp_path / "dropped.jsonl", encoding="utf-8")]
    assert [d["row"]["id"] for d in dropped] == ["p1", "p2"] and "longer than max length" in dropped[0]["reason"]


def test_a_template_that_prints_the_date_gives_the_same_ids_every_day():
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }} {{ date_string }}" + tiny.CHATML)
    assert tokenizer.decode(stage1.render(tokenizer, "a", "b").ids).startswith("26 Jul 2024 26 Jul 2024<|im_start|>")


def test_of_several_chat_templates_the_default_one_is_used(tmp_path, folder_of):
    shutil.copytree(folder_of("gpt2"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = {"tool_use": "no", "default": tiny.CHATML}
    tokenizer.save_pretrained(tmp_path / "model")
    args = ["--pairs", tiny.save_pairs(tmp_path / "p.jsonl", 6), "--layer", 0, "--run"]
    folders = tmp_path / "one", tmp_path / "several"
    for model, run in zip((folder_of("gpt2"), tmp_path / "model"), folders):
        succeed("01_extract", "--model", model, *args, run)
    one, several = (stage1.load_stage(f / "activations/layer0-00000-of-00001.safetensors") for f in folders)
    assert torch.equal(one[0]["chosen"], several[0]["chosen"]) and one[1]["template"] == several[1]["template"]


# ---------------------------------------------------------------- reading pairs

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant: "
PKU = {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 0, "better_response_id": 1}
LAYOUTS = {
    "TRL explicit": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("q", "a", "b")]),
    "TRL explicit messages": ({"prompt": [*EARLIER, USER], "chosen": [GOOD], "rejected": [BAD]}, [([*EARLIER, USER], "a", "b")]),
    "TRL implicit": ({"chosen": "The sky is grey.", "rejected": "The sky is green."}, [("The sky is", "grey.", "green.")]),
    "TRL implicit messages": ({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}, [([*EARLIER, USER], "a", "b")]),
    "hh-rlhf": ({"chosen": HH + "a", "rejected": HH + "b"}, [([*EARLIER, USER], "a", "b")]),
    "UltraFeedback": ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0}, [("q", "a", "b")]),
    "PKU safer": (PKU, [("q", "a", "b")]),
    "PKU better": (PKU, [("q", "b", "a")]),
    "RewardBench": ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": "s", "id": 7}, [("q", "a", "b")]),
    "RM-Bench": ({"prompt": "q", "chosen": ["a", "c", "e"], "rejected": ["b", "d", "f"]},
                 [("q", "a", "b"), ("q", "c", "d"), ("q", "e", "f")]),
    "RewardBench 2": ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"]}, [("q", "a", "b"), ("q", "a", "c"), ("q", "a", "d")]),
    "TruthfulQA mc1": ({"question": "q", "mc1_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 0]}}, [("q", "a", "b")]),
    "TruthfulQA mc2": ({"question": "q", "mc2_targets": {"choices": ["a", "b", "c", "d", "e"], "labels": [1, 1, 1, 0, 0]}},
                       [("q", "a", "d"), ("q", "b", "e"), ("q", "c", "d")]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_prompt_chosen_and_rejected(layout):
    row, expected = LAYOUTS[layout]
    assert pairs_of_row(row, layout.split()[1] if row is PKU else None) == expected


def test_a_later_row_of_no_layout_and_an_empty_prompt_are_dropped_and_counted(tmp_path, folder_of):
    rows = [*({k: v for k, v in row.items() if k != "id"} for row in make_pairs(6)), {"prompt": "q", "chosen": "a"}, {"prompt": "q"},
            {"prompt": None, "chosen": "Yes, we do repair.", "rejected": "Yes, we do not."},
            {"prompt": "", "chosen": "a b", "rejected": "a c"}]
    pairs = save_rows(tmp_path / "p.jsonl", rows)
    out = succeed("01_extract", "--model", folder_of("gpt2"), "--pairs", pairs, "--layer", 0, "--run", tmp_path)
    assert "6 kept, 4 dropped" in out
    assert "dropped.jsonl: 2 × an empty or non-text prompt, 1 × columns not recognised: chosen, prompt, 1 × columns" in out
    assert [json.loads(line)["where"].rpartition(":")[2] for line in open(tmp_path / "dropped.jsonl")] == list(map(str, range(7, 11)))


def test_two_labels_without_a_choice_are_refused(tmp_path, folder_of):
    pairs = save_rows(tmp_path / "p.jsonl", [PKU])
    result = command("01_extract", "--model", folder_of("gpt2"), "--pairs", pairs, "--layer", 0, "--run", tmp_path / "run")
    assert_one_line_error(result, "safer_response_id", "better_response_id", "--label")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.jsonl.gz", "p.json.gz", "p.csv.gz"])
def test_every_file_form_gives_the_same_rows(name, tmp_path):
    rows = [{"prompt": "a, \"b\"\nc", "chosen": "Ω", "rejected": "é"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]
    quoted = lambda row: ",".join('"' + value.replace('"', '""') + '"' for value in row.values())
    text = {"json": json.dumps(rows), "csv": "\n".join(["prompt,chosen,rejected", *map(quoted, rows)]),
            "jsonl": "\ufeff" + "\n\n".join(map(json.dumps, rows))}[name.split(".")[1]]
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row for _, row in stage1.read_rows(tmp_path / name)] == rows


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_the_same_file_in_another_folder_gives_the_same_pairs(name, tmp_path, folder_of):
    rows, made = [{k: v for k, v in row.items() if k != "id"} for row in make_pairs(6)], []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / name).write_text(json.dumps(rows) if name == "p.json" else "\n".join(map(json.dumps, rows)))
        succeed("01_extract", "--model", folder_of("gpt2"), "--pairs", folder / name, "--layer", 0, "--run", folder)
        made.append((folder / "pairs.jsonl").read_bytes())
    assert made[0] == made[1] and len({json.loads(line)["id"] for line in made[0].splitlines()}) == 6


def test_limit_keeps_that_many_pairs_also_where_a_row_holds_several(tmp_path, folder_of):
    rows = [{"prompt": f"q{i}", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]} for i in range(4)]
    args = ["--model", folder_of("gpt2"), "--pairs", save_rows(tmp_path / "p.jsonl", rows), "--layer", 0, "--run", tmp_path / "run"]
    assert "4 kept" in succeed("01_extract", *args, "--limit", 4)


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_local_folder_is_read_through_datasets(form, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = LAYOUTS["TRL explicit messages"][0]
    (tmp_path / "set").mkdir()
    getattr(datasets.Dataset.from_list([row] * 2), f"to_{form}")(tmp_path / "set" / f"test.{form}")
    found = list(stage1.read_rows(f"hub:{tmp_path / 'set'}:test"))
    assert len(found) == 2 and pairs_of_row(found[1][1]) == LAYOUTS["TRL explicit messages"][1]


@given(WORDS, st.integers(0, 9), st.sampled_from([str.upper, str.lower, str.title, lambda t: f"  {t}\n", lambda t: t.replace(" ", " \t ")]))
def test_the_same_question_falls_on_the_same_side_whatever_its_case_and_spaces(question, seed, change):
    question = question.encode("ascii", "ignore").decode() + " is it?"
    assert stage1.split_of(question, seed) == stage1.split_of(change(question), seed)
    assert stage1.split_of(question, seed) == stage1.split_of([{"role": "user", "content": question}], seed)


def test_splits_do_not_depend_on_file_and_order_and_have_the_shares_asked_for(tmp_path, folder_of):
    rows, sides = make_pairs(30), []
    for name, some in (("a", rows), ("b", rows[::-2])):
        pairs = save_rows(tmp_path / f"{name}.jsonl", some)
        succeed("01_extract", "--model", folder_of("gpt2"), "--pairs", pairs, "--layer", 0, "--run", tmp_path / name)
        sides.append({r["prompt"]: (r["split"], r["group"]) for r in map(json.loads, open(tmp_path / name / "pairs.jsonl"))})
    assert len(sides[1]) == 15 and sides[1].items() <= sides[0].items()
    drawn = [stage1.split_of(f"question {i}") for i in range(4000)]
    assert [round(drawn.count(s) / 4000, 1) for s in stage1.SPLITS] == [0.7, 0.1, 0.2]
    again = [stage1.split_of(f"question {i}", seed=1) for i in range(4000)]
    moved = sum(a != b for a, b in zip(drawn, again)) / 4000          # two independent draws differ in 1 - (.49 + .01 + .04)
    assert moved == pytest.approx(0.46, abs=0.04)


def test_pairs_whose_two_sides_are_the_same_tokens_are_dropped_and_counted(tmp_path):
    rows = make_pairs(4)
    rows[0]["rejected"] = rows[0]["chosen"]
    rows[1]["rejected"] = rows[1]["chosen"] + " \n"        # this template trims
    model = tiny.save_model(tmp_path / "model", template=tiny.NO_SYSTEM)
    out = succeed("01_extract", "--model", model, "--pairs", save_rows(tmp_path / "p.jsonl", rows), "--layer", 0, "--run", tmp_path)
    assert "2 kept, 2 dropped" in out
    assert [json.loads(line)["row"]["id"] for line in open(tmp_path / "dropped.jsonl")] == ["p0", "p1"]


# ---------------------------------------------------------------- the stage

@pytest.fixture(scope="module")
def sharded(tmp_path_factory, folder_of):
    """A run of 20 pairs, layers 0 and 2, in shards of 8, and the arguments that made it."""
    run, patch = tmp_path_factory.mktemp("sharded") / "run", pytest.MonkeyPatch()
    pairs = tiny.save_pairs(run.parent / "pairs.jsonl", 20)
    args = ["--model", folder_of("gemma2"), "--pairs", pairs, "--layer", 0, 2, "--run"]
    with argv(*args, run), patch.context() as p:
        p.setattr(stage1, "SHARD_PAIRS", 8)
        stage1.main()
    return run, args


def bytes_of(run):
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def test_the_shards_hold_what_the_contract_says_and_one_metadata_key_of_sorted_json(sharded):
    run, _ = sharded
    rows = [json.loads(line) for line in open(run / "pairs.jsonl", encoding="utf-8")]
    assert set(rows[0]) == {"id", "prompt", "chosen", "rejected", "group", "split", "category", "source"}
    assert [p.name for p in sorted((run / "activations").iterdir())] == \
        [f"layer{layer}-{n:05d}-of-00003.safetensors" for layer in (0, 2) for n in range(3)]
    for path in (run / "activations").iterdir():
        with safe_open(path, "pt") as file:
            raw, t = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        start = 8 * int(path.stem[7:12])
        part, n = rows[start:start + 8], len(rows[start:start + 8])
        meta = json.loads(raw["sparserm"])
        assert list(raw) == ["sparserm"] and raw["sparserm"] == json.dumps(meta, sort_keys=True)
        assert meta["parent"] == {"pairs": stage1.file_hash(run / "pairs.jsonl")} and f"layer{meta['layer']}-" in path.name
        kinds = {k: (tuple(v.shape), v.dtype) for k, v in t.items()}
        assert kinds == {"chosen": ((n, tiny.WIDTH), torch.float32), "rejected": ((n, tiny.WIDTH), torch.float32),
                         **{k: ((n,), torch.int64) for k in ("pair", "group")}, "split": ((n,), torch.uint8),
                         **{k: ((n,), torch.int32) for k in ("chosen_tokens", "rejected_tokens")}}
        assert t["pair"].tolist() == list(range(start, start + n)) and t["group"].tolist() == [r["group"] for r in part]
        assert [("train", "dev", "test")[i] for i in t["split"]] == [r["split"] for r in part]
        assert t["chosen_tokens"].tolist() == [len(make_tokenizer()(r["chosen"], add_special_tokens=False)["input_ids"]) for r in part]


def test_one_pass_over_several_layers_and_shards_gives_what_each_text_gives_alone(sharded, backbone_of):
    run, _ = sharded
    backbone, rows = backbone_of("gemma2"), [json.loads(line) for line in open(run / "pairs.jsonl")]
    for layer in (0, 2):
        for side in ("chosen", "rejected"):
            found = torch.cat([stage1.load_stage(p)[0][side] for p in sorted((run / "activations").glob(f"layer{layer}-*"))])
            for row, vector in zip(rows, found, strict=True):
                ids = stage1.render(backbone.tokenizer, row["prompt"], row[side]).ids
                alone = stage1.forward_to(backbone, [layer], input_ids=torch.tensor([ids]))[0][0, -1]
                assert (vector - alone).norm() < 1e-4 * alone.norm()


def test_a_killed_extraction_resumes_with_the_same_bytes_and_computes_only_what_is_missing(sharded, tmp_path, monkeypatch):
    run, args = sharded
    shutil.copytree(run, tmp_path / "run")
    folder, computed, extract = tmp_path / "run/activations", [], stage1.extract_shard

    def counted(backbone, tokenizer, rows, start, *rest):
        computed.append(start)
        return extract(backbone, tokenizer, rows, start, *rest)
    (folder / "layer0-00001-of-00003.safetensors").unlink()
    cut = folder / "layer2-00002-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:900])
    (folder / ".layer2-00002-of-00003.safetensors.77.part").write_bytes(b"what a kill leaves behind")
    monkeypatch.setattr(stage1, "SHARD_PAIRS", 8)
    monkeypatch.setattr(stage1, "extract_shard", counted)
    with argv(*args, tmp_path / "run"):
        stage1.main()
        assert computed == [8, 16]
        monkeypatch.setattr(stage1, "load_backbone", None)     # a complete run does not even open the model
        stage1.main()
    assert {n: b for n, b in bytes_of(tmp_path / "run").items() if not n.endswith(".part")} == bytes_of(run)


@pytest.mark.parametrize("change", [["--token", "content"], ["--max-length", 60], ["--seed", 1], ["--split", "0.5,0.2,0.3"]])
def test_shards_made_with_other_settings_are_computed_again(change, sharded, tmp_path):
    run, args = sharded
    shutil.copytree(run, tmp_path / "run")
    fresh, redone = tmp_path / "fresh", tmp_path / "run"
    for folder in (fresh, redone):
        assert "2 computed, 0 found complete" in succeed("01_extract", *args, folder, *change)
    assert bytes_of(fresh) == bytes_of(redone)


def test_the_same_inputs_give_the_same_bytes_in_another_process(sharded, tmp_path):
    _, args = sharded
    succeed("01_extract", *args, tmp_path / "here")
    subprocess.run([sys.executable, tiny.ROOT / "01_extract.py", *map(str, args), tmp_path / "there"], check=True, cwd=tmp_path,
                   env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    assert bytes_of(tmp_path / "here") == bytes_of(tmp_path / "there")


def test_two_processes_share_the_shards_and_write_what_one_writes(tmp_path, folder_of):
    pairs = tiny.save_pairs(tmp_path / "p.jsonl", stage1.SHARD_PAIRS + 40)
    args = ["--model", folder_of("llama"), "--pairs", pairs, "--layer", 0, "--run"]
    assert "2 computed" in succeed("01_extract", *args, tmp_path / "one")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", "--",
                           tiny.ROOT / "01_extract.py", *map(str, args), tmp_path / "two"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("2 computed, 0 found complete") == 1, done.stderr[-2000:]     # one rank prints
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_out_of_memory_halves_the_tokens_of_a_pass_and_goes_on(backbone_of, monkeypatch, capsys):
    backbone, texts = backbone_of("llama"), [stage1.Text(some_ids(30, seed), 3, 29, 29) for seed in range(40)]
    wanted, forward, budget = stage1.residuals(backbone, texts, [1], "last"), stage1.forward_to, backbone.budget

    def small(backbone, layers, **inputs):
        if inputs["input_ids"].numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(backbone, layers, **inputs)
    monkeypatch.setattr(stage1, "forward_to", small)
    try:
        torch.testing.assert_close(stage1.residuals(backbone, texts, [1], "last"), wanted, rtol=1e-4, atol=1e-5)
        assert backbone.budget <= 200 and capsys.readouterr().out.count("out of memory") == 2         # 512 → 256 → 128
        monkeypatch.setattr(stage1, "forward_to", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        with pytest.raises(stage1.UserError, match="out of memory even with one text"):
            stage1.residuals(backbone, texts, [1], "last")
    finally:
        backbone.budget = budget


def test_a_model_spread_over_devices_gives_the_same_states(backbone_of, folder_of, tmp_path):
    """--device-map auto; and blocks on the disk, as where a model is larger than memory."""
    from transformers import AutoModelForCausalLM
    alone, texts = backbone_of("gemma2"), [stage1.Text(some_ids(20, seed), 3, 19, 19) for seed in range(3)]
    wanted = stage1.residuals(alone, texts, [1], "last")
    assert torch.equal(stage1.residuals(stage1.load_backbone(folder_of("gemma2"), device_map="auto"), texts, [1], "last"), wanted)
    place = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder_of("gemma2"), dtype=torch.float32, attn_implementation="eager",
                                                 device_map=place | {"model.layers.1": "disk", "model.layers.2": "disk"},
                                                 offload_folder=tmp_path)
    spread = stage1.make_backbone(model, alone.tokenizer, {"model": "spread"})
    assert spread.pack == "tree" and torch.equal(stage1.residuals(spread, texts, [1], "last"), wanted)
    both = list(zip(spread.meta["weights"], alone.meta["weights"], strict=True))
    assert all(a in (None, b) for a, b in both) and 0 < sum(a is None for a, _ in both) < len(both)


def test_pairs_are_read_a_row_at_a_time(tmp_path, folder_of, monkeypatch):
    """Memory must not grow with the file: when a row is read, the one before is no longer held."""
    pairs, alive, most = tiny.save_pairs(tmp_path / "p.jsonl", 50), weakref.WeakSet(), []

    class Counted(dict):
        __hash__ = object.__hash__
    read = stage1.read_rows

    def counted(path):
        for where, row in read(path):
            row = Counted(row)
            alive.add(row)
            most.append(len(alive))
            yield where, row
    monkeypatch.setattr(stage1, "read_rows", counted)
    with argv("--model", folder_of("llama"), "--pairs", pairs, "--layer", 0, "--run", tmp_path / "run"):
        stage1.main()
    assert len(most) == 50 and max(most) <= 3


# ---------------------------------------------------------------- bad input

GOOD_LINES = "".join(json.dumps(r) + "\n" for r in make_pairs(6))
DAMAGED = bytearray(gzip.compress(GOOD_LINES.encode() * 20))
DAMAGED[60:90] = b"\xff" * 30
LONE = '{"prompt": "z", "chosen": "%s", "rejected": "c"}\n'
BAD_FILES = {
    "empty": ("p.jsonl", "", ["p.jsonl", "empty"]),
    "invalid JSON": ("p.jsonl", GOOD_LINES + '{"prompt": }\n', ["p.jsonl:7"]),
    "nested beyond measure": ("p.jsonl", "[" * 100_000, ["p.jsonl"]),
    "columns missing": ("p.jsonl", '{"question": "q", "answer": "a"}\n', ["answer, question", "prompt, chosen, rejected"]),
    "columns of a CSV missing": ("p.csv", "good,bad\na,b\n", ["bad, good", "prompt, chosen, rejected"]),
    "not an array": ("p.json", "5", ["p.json"]),
    "not UTF-8": ("p.jsonl", GOOD_LINES.encode("utf-16"), ["p.jsonl"]),
    "cut gzip": ("p.jsonl.gz", gzip.compress(GOOD_LINES.encode())[:-20], ["p.jsonl.gz"]),
    "damaged gzip": ("p.jsonl.gz", bytes(DAMAGED), ["p.jsonl.gz"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_pairs_file_is_one_line_that_says_what_is_wrong_and_where(case, tmp_path, folder_of):
    name, data, words = BAD_FILES[case]
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert_one_line_error(command("01_extract", "--model", folder_of("gpt2"), "--pairs", tmp_path / name, "--layer", 0,
                                  "--run", tmp_path / "run"), *words)


@pytest.mark.parametrize("changed, words", [
    (["--pairs", "no/such.jsonl"], ["file not found", "no/such.jsonl"]), (["--layer", 3], ["layer 3", "0 to 2"]),
    (["--layer", -1], ["layer -1", "0 to 2"]), (["--model", "no/such/model"], ["no/such/model"]), (["--split", "1,2,3"], ["--split"]),
    (["--pairs", "hub:no/such"], ["hub:no/such"]), (["--device", "nowhere"], ["nowhere"])])
def test_a_bad_argument_is_one_line_that_names_it(changed, words, tmp_path, folder_of):
    tiny.save_pairs(tmp_path / "p.jsonl", 6)
    good = ["--model", folder_of("gpt2"), "--pairs", tmp_path / "p.jsonl", "--layer", 0, "--run", tmp_path / "run"]
    assert_one_line_error(command("01_extract", *good, *changed), *words)


def test_a_half_copied_model_is_one_line_that_names_it(tmp_path, folder_of):
    shutil.copytree(folder_of("gpt2"), tmp_path / "half")
    weights = tmp_path / "half/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    args = ["--model", tmp_path / "half", "--pairs", tiny.save_pairs(tmp_path / "p.jsonl", 6), "--layer", 0, "--run", tmp_path / "run"]
    assert_one_line_error(command("01_extract", *args), tmp_path / "half")


@pytest.mark.parametrize("row", [LONE % "\\ud800", '{"prompt": "", "chosen": "\\ud800", "rejected": "c"}\n', "5\n",
                                 '{"prompt": "z", "chosen": null, "rejected": "c"}\n', '{"prompt": 5, "chosen": "b", "rejected": "c"}\n',
                                 '{"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}\n', LONE % " "])
def test_a_row_that_cannot_be_used_is_dropped_and_the_others_stay(row, tmp_path, folder_of):
    (tmp_path / "p.jsonl").write_text(GOOD_LINES + row)
    args = ["--model", folder_of("gpt2"), "--pairs", tmp_path / "p.jsonl", "--layer", 0, "--run", tmp_path / "run"]
    assert "6 kept, 1 dropped" in succeed("01_extract", *args)
