"""Every layout that --pairs takes, each with the trap that its users met: as a file, through stage 1, to pairs.jsonl and dropped.jsonl."""

import csv
import gzip
import importlib
import json
import re

import pytest
import tiny
from tiny import command, succeed

stage1 = importlib.import_module("01_extract")


def turns(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


def hh(*contents):
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {c}" for n, c in enumerate(contents))


SYSTEM, TALK = {"role": "system", "content": "s"}, turns("q", "a", "r")
TRAPS = {       # the trap: (row, what becomes of it: [(prompt, chosen, rejected)] or the reason in dropped.jsonl)
    "TRL implicit: words that begin alike are not cut in two": (
        {"chosen": "The sky is blueish.", "rejected": "The sky is black."}, [("The sky is", "blueish.", "black.")]),
    "TRL implicit: nothing in common is no prompt": ({"chosen": "Yes.", "rejected": "No."}, "prompt"),
    "TRL implicit: one side holds the other": ({"chosen": "Is it so?", "rejected": "Is it so? No."}, [("Is it", "so?", "so? No.")]),
    "messages: the last turn is the user's": ({"chosen": turns("q", "a", "r"), "rejected": turns("q", "a", "s")}, "part before|assistant"),
    "messages: two user turns that differ": ({"chosen": [*turns("q"), *turns("r")], "rejected": [*turns("q"), *turns("s")]}, "part before"),
    "messages: they part earlier": ({"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "c", "r", "b")}, "part before"),
    "messages: the same conversation twice": ({"chosen": turns("q", "a"), "rejected": turns("q", "a")}, "part before|same"),
    "messages: a system turn stays": (
        {"chosen": [SYSTEM, *turns("q", "a")], "rejected": [SYSTEM, *turns("q", "b")]}, [([SYSTEM, *turns("q")], "a", "b")]),
    "messages: parts of several kinds": ({"prompt": "q", "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
                                          "rejected": turns("q", "b")}, "without role and content"),
    "hh-rlhf: split at the common prefix, not at the last Assistant:": (
        {"chosen": hh("q", "a", "r", "b"), "rejected": hh("q", "a", "r", "c")}, [(TALK, "b", "c")]),
    "hh-rlhf: one side goes on": ({"chosen": hh("q", "a", "r", "b"), "rejected": hh("q", "a", "r", "c", "t", "d")}, "part before"),
    "hh-rlhf: an earlier answer differs": ({"chosen": hh("q", "a", "r", "b"), "rejected": hh("q", "x", "r", "b")}, "part before"),
    "hh-rlhf: the last answer is empty": ({"chosen": hh("q", ""), "rejected": hh("q", "b")}, "empty"),
    "hh-rlhf: Assistant: within an answer": (
        {"chosen": hh("q", "Write: Assistant: hello"), "rejected": hh("q", "no")}, [(turns("q"), "Write: Assistant: hello", "no")]),
    "hh-rlhf: spaces in front lose no turn": (
        {"chosen": " " + hh("q", "a", "r", "b")[2:], "rejected": " " + hh("q", "a", "r", "c")[2:]}, [(TALK, "b", "c")]),
    "UltraFeedback: no doubled prompt": ({"prompt": "q", "chosen": turns("q", "a"), "rejected": turns("q", "b")}, [("q", "a", "b")]),
    "UltraFeedback: a system turn in the conversation is not lost": (
        {"prompt": "q", "chosen": [SYSTEM, *turns("q", "a")], "rejected": [SYSTEM, *turns("q", "b")]}, [([SYSTEM, *turns("q")], "a", "b")]),
    "UltraFeedback: several turns, none doubled": (
        {"prompt": "q", "chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "a", "r", "c")}, [(TALK, "b", "c")]),
    "prompt as messages and whole conversations": (
        {"prompt": TALK, "chosen": [*TALK, *turns("", "b")[1:]], "rejected": [*TALK, *turns("", "c")[1:]]}, [(TALK, "b", "c")]),
    "PKU-SafeRLHF: no label": ({"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": -1}, "no label"),
    "PKU-SafeRLHF: the second is the safer": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 1, "better_response_id": 0}, [("q", "b", "a")]),
    "RewardBench: text": ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": "s", "id": 7}, [("q", "a", "b")]),
    "RewardBench 2: one right answer, three wrong": (
        {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"]}, [("q", "a", "b"), ("q", "a", "c"), ("q", "a", "d")]),
    "RewardBench 2: several right answers": (
        {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d", "e"]}, [("q", x, y) for x in "ab" for y in "cde"]),
    "RM-Bench: like style against like style": (
        {"prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}, [("q", "a", "d"), ("q", "b", "e"), ("q", "c", "f")]),
    "TruthfulQA: every right answer against a wrong one": (
        {"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
         "mc2_targets": {"choices": ["a", "b", "c", "d"], "labels": [1, 0, 1, 1]}}, [("q", "a", "b"), ("q", "c", "b"), ("q", "d", "b")]),
    "TruthfulQA: no wrong answer": ({"question": "q", "mc2_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "no wrong answer"),
    "TruthfulQA: choices without labels": ({"question": "q", "mc1_targets": {"choices": ["a", "b"]}}, "malformed"),
    "an empty assistant turn in the prompt": ({"prompt": turns("q", "", "r"), "chosen": "a", "rejected": "b"}, "empty assistant turn"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_gives_the_right_pairs_or_a_reason(trap, tokenizer):
    row, wanted = TRAPS[trap]
    found, reasons = stage1.usable_pairs(tokenizer, row, "safer", 2048)
    if isinstance(wanted, str):
        assert not found and len(reasons) == 1 and re.search(wanted, reasons[0]), (found, reasons)
    else:
        assert found == wanted and not reasons


FORMS = ["jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz", "parquet", "hub json"]


def write_rows(folder, form, rows):
    """Rows in one of FORMS → what --pairs takes."""
    if form in ("parquet", "hub json"):
        datasets = pytest.importorskip("datasets")
        (folder / "set").mkdir()
        getattr(datasets.Dataset.from_list(rows), f"to_{form.split()[-1]}")(folder / "set" / f"train.{form.split()[-1]}")
        return f"hub:{folder / 'set'}"
    path = folder / f"p.{form}"
    with (gzip.open if form.endswith("gz") else open)(path, "wt", encoding="utf-8", newline="") as file:
        if form.startswith("csv"):
            table = csv.DictWriter(file, rows[0])
            table.writeheader(), table.writerows({n: v if isinstance(v, str) else json.dumps(v) for n, v in r.items()} for r in rows)
        else:
            file.write(json.dumps(rows, indent=1) if form.startswith("json.") or form == "json" else "\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_newlines_quotes_and_messages_survive_every_form_through_stage_1(form, tmp_path, folder_of, monkeypatch):
    if form in ("parquet", "hub json"):
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"id": "one", "prompt": "a, \"b\"\n\nc\r\nd", "chosen": "Ω\n", "rejected": "=cmd|' /C calc'!A0"},
            {"id": "two", "prompt": "x\ty", "chosen": "\\n is not a newline", "rejected": "[]"}]
    talk = [{"id": "three", "prompt": TALK, "chosen": turns("", "b")[1:], "rejected": turns("", "c")[1:]}]
    for n, some in enumerate((rows, talk)):
        (tmp_path / str(n)).mkdir()
        pairs = write_rows(tmp_path / str(n), form, some)
        succeed("01_extract", "--model", folder_of("llama"), "--pairs", pairs, "--layer", 0, "--run", tmp_path / f"run{n}")
        found = [json.loads(line) for line in open(tmp_path / f"run{n}/pairs.jsonl", encoding="utf-8")]
        text = lambda side: side if isinstance(side, str) else side[-1]["content"]
        assert [(r["id"], r["prompt"], r["chosen"], r["rejected"]) for r in found] == [
            (r["id"], r["prompt"], text(r["chosen"]), text(r["rejected"])) for r in some]


@pytest.mark.parametrize("form, place", [("jsonl", "p.jsonl:3"), ("csv", "p.csv:6"), ("json", "p.json:[2]"), ("parquet", "set[2]")])
def test_a_dropped_row_is_named_by_its_line_and_counted(form, place, tmp_path, folder_of, monkeypatch):
    if form == "parquet":
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": "a\nb", "chosen": "c", "rejected": "d"}, {"prompt": "e\nf", "chosen": "g", "rejected": "h"},
            {"prompt": "i", "chosen": "same", "rejected": "same"}]
    pairs = write_rows(tmp_path, form, rows)
    out = succeed("01_extract", "--model", folder_of("llama"), "--pairs", pairs, "--layer", 0, "--run", tmp_path / "run")
    [dropped] = [json.loads(line) for line in open(tmp_path / "run/dropped.jsonl", encoding="utf-8")]
    assert "2 kept, 1 dropped" in out and dropped["where"].endswith(place) and dropped["reason"] and dropped["row"] == rows[2]


@pytest.mark.parametrize("good, bad, code", [(2, 2, 0), (2, 3, 2)])
def test_more_than_half_dropped_is_an_error_and_half_is_not(good, bad, code, tmp_path, folder_of):
    rows = [*tiny.make_pairs(good), *[{"prompt": "a", "chosen": "b", "rejected": ""}] * bad]
    result = command("01_extract", "--model", folder_of("llama"), "--pairs", tiny.save_rows(tmp_path / "p.jsonl", rows), "--layer", 0,
                     "--run", tmp_path / "run")
    assert result[0] == code and len((tmp_path / "run/dropped.jsonl").read_text().splitlines()) == bad
    if code:
        tiny.assert_one_line_error(result, "more than half", "an empty or non-text response", "p.jsonl:3")
        assert not (tmp_path / "run/pairs.jsonl").exists()
