"""Every layout and file form that --pairs takes, each with the trap that its users met."""

import csv
import datetime
import gzip
import importlib
import io
import json
import re

import pytest
import tiny
from tiny import assert_one_line_error, command, make_pairs, save_rows, succeed

from parts.files import UserError
from parts.rows import read_rows, usable_pairs

stage1 = importlib.import_module("01_extract")


def turns(*contents):
    """Messages, the user's first."""
    return [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


def answer(content):
    """The message of an assistant, alone."""
    return [{"role": "assistant", "content": content}]


def hh(*contents):
    """A transcript of hh-rlhf."""
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {c}" for n, c in enumerate(contents))


def sides(chosen, rejected):
    """A row without a prompt column."""
    return {"chosen": chosen, "rejected": rejected}


def asked(prompt, chosen, rejected, **more):
    """A row with a prompt column."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


SYSTEM = {"role": "system", "content": "s"}
TALK = turns("q", "a", "r")
SAYS = {"user": "human", "assistant": "gpt", "system": "system"}


def from_value(messages):
    """Messages as ShareGPT writes them."""
    return [{"from": SAYS[turn["role"]], "value": turn["content"]} for turn in messages]


def parts(*texts):
    """The content of a message as a list of parts."""
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


CALL = {"type": "function", "function": {"name": "weigh", "arguments": {"what": "otter"}}}
# prints the calls, the reasoning and the name of a turn
ALL_FIELDS = tiny.CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.name %}({{ m.name }}) {% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}")
CALLED = [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "content": "9 kg", "name": "weigh"}]


# ---------------------------------------------------------------- layouts

PAIRS = {       # layout and trap: (row, [(prompt, chosen, rejected)])
    "TRL explicit, RewardBench": (
        asked("q", "a", "b", subset="s", id=7),
        [("q", "a", "b")]),
    "TRL explicit: messages": (
        asked(TALK, answer("b"), answer("c")),
        [(TALK, "b", "c")]),
    "TRL explicit: the prompt as messages, and whole conversations": (
        asked(TALK, [*TALK, *answer("b")], [*TALK, *answer("c")]),
        [(TALK, "b", "c")]),
    "TRL implicit: words that begin alike are not cut in two": (
        sides("The sky is blueish.", "The sky is black."),
        [("The sky is", "blueish.", "black.")]),
    "TRL implicit: one side holds the other": (
        sides("Is it so?", "Is it so? No."),
        [("Is it", "so?", "so? No.")]),
    "TRL implicit: messages": (
        sides([*TALK, *answer("b")], [*TALK, *answer("c")]),
        [(TALK, "b", "c")]),
    "TRL implicit: a system turn stays": (
        sides([SYSTEM, *turns("q", "a")], [SYSTEM, *turns("q", "b")]),
        [([SYSTEM, *turns("q")], "a", "b")]),
    "hh-rlhf: split at the common prefix, not at the last Assistant:": (
        sides(hh("q", "a", "r", "b"), hh("q", "a", "r", "c")),
        [(TALK, "b", "c")]),
    "hh-rlhf: Assistant: within an answer": (
        sides(hh("q", "Write: Assistant: hello"), hh("q", "no")),
        [(turns("q"), "Write: Assistant: hello", "no")]),
    "hh-rlhf: spaces in front lose no turn": (
        sides(" " + hh("q", "a", "r", "b")[2:], " " + hh("q", "a", "r", "c")[2:]),
        [(TALK, "b", "c")]),
    "UltraFeedback: no doubled prompt": (
        asked("q", turns("q", "a"), turns("q", "b"), score_chosen=8.0),
        [("q", "a", "b")]),
    "UltraFeedback: a system turn in the conversation is not lost": (
        asked("q", [SYSTEM, *turns("q", "a")], [SYSTEM, *turns("q", "b")]),
        [([SYSTEM, *turns("q")], "a", "b")]),
    "UltraFeedback: several turns, none doubled": (
        asked("q", turns("q", "a", "r", "b"), turns("q", "a", "r", "c")),
        [(TALK, "b", "c")]),
    "RewardBench 2: one right answer, three wrong": (
        asked("q", ["a"], ["b", "c", "d"]),
        [("q", "a", "b"), ("q", "a", "c"), ("q", "a", "d")]),
    "RewardBench 2: several right answers": (
        asked("q", ["a", "b"], ["c", "d", "e"]),
        [("q", right, wrong) for right in "ab" for wrong in "cde"]),
    "RM-Bench: like style against like style": (
        asked("q", ["a", "b", "c"], ["d", "e", "f"]),
        [("q", "a", "d"), ("q", "b", "e"), ("q", "c", "f")]),
    "TruthfulQA: one right answer": (
        {"question": "q", "mc1_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 0]}},
        [("q", "a", "b")]),
    "TruthfulQA: the wrong answers in turn": (
        {"question": "q", "mc2_targets": {"choices": list("abcde"), "labels": [1, 1, 1, 0, 0]}},
        [("q", "a", "d"), ("q", "b", "e"), ("q", "c", "d")]),
    "TruthfulQA: all right answers, where both columns are there": (
        {"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
         "mc2_targets": {"choices": ["a", "b", "c", "d"], "labels": [1, 0, 1, 1]}},
        [("q", "a", "b"), ("q", "c", "b"), ("q", "d", "b")]),
}
OTTERS = "You know otters."
PAIRS |= {      # columns
    "columns: question and system": (
        {"system": OTTERS, "question": "How heavy?", **sides("Nine kilos.", "Nine tons.")},
        [([{"role": "system", "content": OTTERS}, *turns("How heavy?")],
          "Nine kilos.", "Nine tons.")]),
    "columns: instruction and input, as in Alpaca": (
        {"instruction": "Count them.", "input": "one two", **sides("Two.", "Three.")},
        [("Count them.\n\none two", "Two.", "Three.")]),
    "columns: instruction with an empty input": (
        {"instruction": "Count.", "input": "", **sides("It is one.", "It is two.")},
        [("Count.", "It is one.", "It is two.")]),
    "columns: query, beside what only says something of the pair": (
        {"query": "How heavy?", "source": "a zoo", "score": "9.5", **sides("Light.", "Heavy.")},
        [("How heavy?", "Light.", "Heavy.")]),
    "columns: system text beside a prompt": (
        asked("q", "a", "b", system_prompt="s"),
        [([SYSTEM, *turns("q")], "a", "b")]),
    "columns: system text that the prompt has too": (
        asked([SYSTEM, *turns("q")], "a", "b", system="s"),
        [([SYSTEM, *turns("q")], "a", "b")]),
    "columns: history as exchanges": (
        asked("r", "b", "c", history=[["q", "a"]]),
        [(TALK, "b", "c")]),
    "columns: history as messages, behind the system text": (
        asked("r", "b", "c", history=turns("q", "a"), system="s"),
        [([SYSTEM, *TALK], "b", "c")]),
    "columns: conversations with from and value": (
        {"conversations": from_value(TALK), **sides(*map(from_value, [answer("b"), answer("c")]))},
        [(TALK, "b", "c")]),
}
PAIRS |= {      # messages
    "messages: one alone, no list": (
        asked(turns("q")[0], answer("a")[0], answer("b")[0]),
        [(turns("q"), "a", "b")]),
    "messages: roles human and gpt": (
        sides(*[[{"role": "human", "content": "q"}, {"role": "gpt", "content": c}] for c in "ab"]),
        [(turns("q"), "a", "b")]),
    "messages: roles prompter and Bot": (
        asked([{"role": "prompter", "content": "q"}], *[[{"role": "Bot", "content": c}]
                                                        for c in "ab"]),
        [(turns("q"), "a", "b")]),
    "messages: the role model": (
        asked("q", *[[{"role": "model", "content": c}] for c in "ab"]),
        [("q", "a", "b")]),
    "messages: parts of text are joined": (
        asked([{"role": "user", "content": parts("one", "two")}],
              [{"role": "assistant", "content": parts("a")}],
              [{"role": "assistant", "content": parts("b")}]),
        [(turns("one\ntwo"), "a", "b")]),
    "messages: lists of roles and of contents": (
        asked({"role": ["user", "assistant", "user"], "content": ["q", "a", "r"]}, "b", "c"),
        [(TALK, "b", "c")]),
    "messages: fields that are empty or that no model reads": (
        asked([{"role": "user", "content": "q", "tool_calls": None, "weight": 1, "id": "u1"}],
              "a", "b"),
        [(turns("q"), "a", "b")]),
    "messages: as JSON with blanks in a text": (
        asked(' [ {"role": "user", "content": "q"} ]', json.dumps(answer("a"), indent=1),
              json.dumps(answer("b"))),
        [(turns("q"), "a", "b")]),
    "messages: as Python prints them": (
        asked(str(TALK), str(answer("b")), str(answer("c")[0])),
        [(TALK, "b", "c")]),
    "messages: a whole conversation as Python prints it": (
        asked("q", str(turns("q", "it's a")), str(turns("q", "b"))),
        [("q", "it's a", "b")]),
    "messages: an answer that shows a message is a text": (
        asked("q", "Send {role: user, content: hi}.", "['red', 'blue']"),
        [("q", "Send {role: user, content: hi}.", "['red', 'blue']")]),
    "messages: what an agent did before both answers": (
        asked("q", [*turns("q")[1:], *answer("I look."), {"role": "tool", "content": "t"},
                    *answer("a")],
              [*answer("I look."), {"role": "tool", "content": "t"}, *answer("b")]),
        [([*turns("q"), *answer("I look."), {"role": "tool", "content": "t"}], "a", "b")]),
}
PAIRS |= {      # transcripts, and answers that repeat the prompt
    "hh-rlhf: Windows' ends of lines": (
        sides(*[hh("q", "a", "r", c).replace("\n", "\r\n") for c in "bc"]),
        [(TALK, "b", "c")]),
    "hh-rlhf: a System part": (
        sides(*["\n\nSystem: s" + hh("q", c) for c in ("It is so.", "It is not.")]),
        [([SYSTEM, *turns("q")], "It is so.", "It is not.")]),
    "transcript: in the prompt, which ends with the assistant's name": (
        asked(hh("q", "a", "r") + "\n\nAssistant:", " b", " c"),
        [(TALK, "b", "c")]),
    "transcript: in the prompt, which ends with the user's turn": (
        asked(hh("q", "a", "r"), "b", "c"),
        [(TALK, "b", "c")]),
    "transcript: other names, a line a turn": (
        asked("User: q\nBot: a\nUser: r\nBot:", "b", "c"),
        [(TALK, "b", "c")]),
    "transcript: names behind marks of headings": (
        sides(*[f"### Human: q\n### Assistant: a\n### Human: r\n### Assistant: {c}" for c in "bc"]),
        [(TALK, "b", "c")]),
    "transcript: all in one line": (
        asked("prompter: q assistant: a prompter: r", "b", "c"),
        [(TALK, "b", "c")]),
    "transcript: a text that only begins with a name": (
        asked("User: how do I log in?", "AI: so.", "AI: not."),
        [("User: how do I log in?", "AI: so.", "AI: not.")]),
    "the prompt again in front of both answers": (
        asked("Is an otter heavy?", "Is an otter heavy? No.", "Is an otter heavy?\nYes."),
        [("Is an otter heavy?", "No.", "Yes.")]),
    "the transcript again in front of both answers": (
        asked(hh("q", "a", "r"), *[hh("q", "a", "r", c) for c in "bc"]),
        [(TALK, "b", "c")]),
    "the messages of the prompt again in front of both answers": (
        asked(TALK, [*TALK, *answer("b")], [*TALK, *answer("c")]),
        [(TALK, "b", "c")]),
    "transcript: headings need no gap": (
        asked("### Human: q### Assistant: a### Human: r### Assistant:", "b", "c"),
        [(TALK, "b", "c")]),
    "transcript: words before a colon are no speakers": (
        asked("Model: a phone\nSystem: new\nUser: Ann\nProblem: none", "b", "c"),
        [("Model: a phone\nSystem: new\nUser: Ann\nProblem: none", "b", "c")]),
    "messages: a text that begins with messages and goes on": (
        asked('[{"role": "user", "content": "hi"}]\n\nHow many messages?', "b", "c"),
        [('[{"role": "user", "content": "hi"}]\n\nHow many messages?', "b", "c")]),
    "messages: one answer is a message in JSON, as it was asked for": (
        asked("q", '{"role": "assistant", "content": "Hello"}', "I cannot."),
        [("q", '{"role": "assistant", "content": "Hello"}', "I cannot.")]),
    "messages: None within a field": (
        asked([{"role": "user", "content": "q", "extra": {"a": None}}], "b", "c"),
        [(turns("q"), "b", "c")]),
    "columns: a history that the conversations hold too": (
        asked("r", [*TALK, *answer("b")], [*TALK, *answer("c")], history=[["q", "a"]]),
        [(TALK, "b", "c")]),
    "columns: a system turn in front of the answers comes first": (
        asked("q", [SYSTEM, *answer("a")], [SYSTEM, *answer("b")]),
        [([SYSTEM, *turns("q")], "a", "b")]),
    "PKU-SafeRLHF: a label of a table with decimals": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": "1.0"},
        [("q", "b", "a")]),
    "a greeting in front of both answers is no repeated prompt": (
        asked("Hello", "Hello there.", "Hello you."),
        [("Hello", "Hello there.", "Hello you.")]),
}
REASONS = {     # layout and trap: (row, what the reason says)
    "TRL implicit: nothing in common is no prompt": (
        sides("Yes.", "No."), "non-text prompt"),
    "messages: the last turn is the user's": (
        sides(turns("q", "a", "r"), turns("q", "a", "s")), "not an assistant turn"),
    "messages: two user turns that differ": (
        sides([*turns("q"), *turns("r")], [*turns("q"), *turns("s")]), "not an assistant turn"),
    "messages: they part earlier": (
        sides(turns("q", "a", "r", "b"), turns("q", "c", "r", "b")), "part before"),
    "messages: the same conversation twice": (
        sides(turns("q", "a"), turns("q", "a")), "the same conversation"),
    "columns: an unknown one beside two plain texts": (
        {"riddle": "What is it?", **sides("It is so.", "It is not.")},
        "no column is known to hold the prompt, and riddle might"),
    "columns: an unknown one with messages": (
        {"dialogue": turns("q"), **sides("It is so.", "It is not.")}, "and dialogue might"),
    "columns: two system texts": (
        asked([SYSTEM, *turns("q")], "a", "b", system="another"), "two system turns"),
    "columns: an empty question": (
        {"question": " ", **sides("It is so.", "It is not.")}, "non-text prompt"),
    "messages: from without value": (
        asked([{"from": "human"}], "a", "b"), "without role and content"),
    "messages: roles and contents of different numbers": (
        asked({"role": ["user", "assistant"], "content": ["q"]}, "a", "b"), "different lengths"),
    "messages: as numpy prints them": (
        asked("q", "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]",
              "b"), "looks like a list of messages but is neither JSON nor Python"),
    "messages: JSON that was cut short": (
        asked('[{"role": "user", "content": "q', "a", "b"), "looks like a list of messages"),
    "messages: thoughts of an answer": (
        asked("q", [{**answer("a")[0], "reasoning_content": "so"}], answer("a")),
        "the answer has reasoning_content"),
    "messages: an answer that is a call": (
        asked("q", [{"role": "assistant", "content": None, "tool_calls": [CALL]}], answer("a")),
        "the answer has tool_calls"),
    "messages: thoughts that the template does not print": (
        asked([*turns("q"), {**answer("a")[0], "thinking": "so"}, *turns("r")], "b", "c"),
        "the chat template does not render thinking"),
    "messages: calls that the template does not print": (
        asked(CALLED, "a", "b"), "the chat template does not render"),
    "messages: audio": (
        asked([{"role": "user", "content": [{"type": "input_audio", "data": "…"}]}], "a", "b"),
        "a part of type input_audio"),
    "messages: a conversation about something else than the prompt": (
        asked("p", turns("q", "a"), turns("q", "b")), "does not hold the prompt"),
    "messages: a part that is no text": (
        asked("q", answer([{"type": "image", "url": "x.png"}]), answer("b")),
        "a part of type image"),
    "messages: an empty assistant turn in the prompt": (
        asked(turns("q", "", "r"), "a", "b"), "empty assistant turn"),
    "messages: an assistant turn of spaces in the prompt": (
        asked(turns("q", " \n", "r"), "a", "b"), "empty assistant turn"),
    "hh-rlhf: one side goes on": (
        sides(hh("q", "a", "r", "b"), hh("q", "a", "r", "c", "t", "d")), "part before"),
    "hh-rlhf: an earlier answer differs": (
        sides(hh("q", "a", "r", "b"), hh("q", "x", "r", "b")), "part before"),
    "hh-rlhf: the last answer is empty": (
        sides(hh("q", ""), hh("q", "b")), "empty or non-text response"),
    "PKU-SafeRLHF: no label": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": -1}, "no label"),
    "PKU-SafeRLHF: null for a label": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": None},
        "no label"),
    "PKU-SafeRLHF: a word for a label": (
        {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": "both"},
        "no label"),
    "TruthfulQA: no wrong answer": (
        {"question": "q", "mc2_targets": {"choices": ["a", "b"], "labels": [1, 1]}},
        "no wrong answer"),
    "TruthfulQA: choices without labels": (
        {"question": "q", "mc1_targets": {"choices": ["a", "b"]}}, "need choices and labels"),
}


def pairs_of(row, label=None, template=tiny.CHATML):
    """→ ([(prompt, chosen, rejected)], reasons)."""
    label = label or ("safer" if "safer_response_id" in row and "better_response_id" not in row
                      else None)
    found, reasons = usable_pairs(tiny.make_tokenizer(template), row, label, 2048)
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in found], reasons


@pytest.mark.parametrize("trap", PAIRS)
def test_a_layout_gives_its_pairs(trap):
    row, wanted = PAIRS[trap]
    assert pairs_of(row) == (wanted, [])


@pytest.mark.parametrize("trap", REASONS)
def test_a_row_without_a_usable_pair_gives_the_reason(trap):
    row, says = REASONS[trap]
    found, reasons = pairs_of(row, "safer")
    assert not found
    assert len(reasons) == 1 and says in reasons[0]


NOT_SYSTEM_LATER = tiny.CHATML.replace("<|im_start|>{{ m['role'] }}",
                                       "{% if m.role != 'system' or loop.first %}<|im_start|>"
                                       "{{ m['role'] }}", 1).replace("<|im_end|>\n{% endfor",
                                                                     "<|im_end|>\n{% endif %}"
                                                                     "{% endfor")
ONLY_KNOWN = tiny.CHATML.replace("{% for m in messages %}",
                                 "{% for m in messages if m.role in ('user', 'assistant') %}")


@pytest.mark.parametrize("template, prompt, role", [
    (ONLY_KNOWN, [{"role": "developer", "content": "d"}, *turns("q")], "developer"),
    (ONLY_KNOWN, [*turns("q"), {"role": "tool", "content": "t"}], "tool"),
    (NOT_SYSTEM_LATER, [*turns("q", "a"), SYSTEM, *turns("r")], "system"),
])
def test_a_turn_that_the_template_does_not_print_is_a_reason(template, prompt, role):
    found, reasons = pairs_of(asked(prompt, "b", "c"), template=template)
    assert not found
    assert reasons == [f"the chat template does not render a turn of role {role} at this place"]


def test_fields_that_the_template_prints_go_through_it():
    tokenizer = tiny.make_tokenizer(ALL_FIELDS)
    thoughtful = [*turns("q"), {**answer("a")[0], "reasoning_content": "so"}]
    for prompt, printed in [(CALLED, "[weigh]"), (CALLED, "(weigh) 9 kg"),
                            ([*thoughtful, *turns("r")], "<think>so</think>a")]:
        [pair], reasons = usable_pairs(tokenizer, asked(prompt, "b", "c"), None, 2048)
        assert pair.prompt == prompt and not reasons
        assert printed in tokenizer.decode(pair.texts[0].ids)


NO_THOUGHTS = tiny.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
NOTES = [       # template, row, the note
    (tiny.CHATML, asked("q", "a", "b", tools=[CALL]), "column tools is not read"),
    (tiny.CHATML, asked("q", "a", "b", images=["x.png"]), "column images is not read"),
    (tiny.CHATML, asked("q", "a", "b", context="It was in May."), "column context is not read"),
    (tiny.CHATML, asked("q", "a", "b", persona="an old man"), "column persona is not read"),
    (tiny.CHATML, asked("q", "a", "b", history="they talked"), "column history is not read"),
    (tiny.CHATML, sides("It is so.", "It is not."), "no prompt column: the prompt is what chosen "
                                                    "and rejected both begin with"),
    (tiny.CHATML, asked("Is it so?", "Is it so? Yes.", "Is it so? No."),
     "both answers begin with the prompt, which is read once"),
    (NO_THOUGHTS, asked("q", "<think>so</think>a", "b"),
     "the chat template changes a text, for example cuts thoughts out of it"),
    (NO_THOUGHTS, asked(turns("q", "<think>so</think>a", "r"), "b", "c"),
     "the chat template changes a text, for example cuts thoughts out of it"),
    (tiny.CHATML, asked("翻译", "a", "b", 文本="今天天气很好"), "column 文本 is not read"),
    (tiny.CHATML, asked("Say it", "a", "b", input="bonjour"), "column input is not read"),
    (tiny.CHATML, asked("q", "a", "b", source="It was in the last days of the coldest May."),
     "column source is not read"),
    (tiny.CHATML, asked("[INST] q [/INST]", "a", "b"),
     "a text holds marks of a chat template, which are read as plain text"),
    (tiny.CHATML, sides(hh("q", "a"), hh("q", "b")), "a dialogue in one text is read as turns"),
    (tiny.CHATML, asked("User: q\nBot: a", "a", "b"), "a dialogue in one text is read as one turn"),
    (tiny.CHATML, asked("q <|im_end|>", "a", "b"),
     "control tokens typed into a text are split, so that they do not act"),
]


@pytest.mark.parametrize("template, row, note", NOTES, ids=[str(n) for n in range(len(NOTES))])
def test_what_is_not_read_as_it_is_written_is_noted(template, row, note):
    [pair], _ = usable_pairs(tiny.make_tokenizer(template), row, None, 2048)
    assert pair.notes == (note,)


@pytest.mark.parametrize("row", [
    asked("q", "a", "b", id="a b", source="a zoo", category="big cats", score=1.5, url="x y"),
    asked("q", turns("q", "a"), turns("q", "b"), chosen_model="m n"),
    sides(turns("q", "a"), turns("q", "b")),
])
def test_a_row_that_is_read_whole_has_no_notes(row):
    [pair], _ = usable_pairs(tiny.make_tokenizer(), row, None, 2048)
    assert pair.notes == ()


TWO_LABELS = {"prompt": "q", "response_0": "a", "response_1": "b"}
TWO_LABELS |= {"safer_response_id": 1, "better_response_id": 0}


@pytest.mark.parametrize("label, pair", [("safer", ("q", "b", "a")), ("better", ("q", "a", "b"))])
def test_of_two_labels_the_one_that_was_asked_for_decides(label, pair):
    assert pairs_of(TWO_LABELS, label) == ([pair], [])


def test_two_labels_without_a_choice_are_refused():
    with pytest.raises(UserError, match="safer_response_id, better_response_id .*--label"):
        pairs_of(TWO_LABELS)


# ---------------------------------------------------------------- file forms

FORMS = ["jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz", "parquet", "hub json"]


def as_csv(rows):
    """A cell that is no text holds JSON."""
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, rows[0])
    table.writeheader()
    for row in rows:
        cells = {name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()}
        table.writerow(cells)
    return file.getvalue()


def write_data_set(folder, kind, rows):
    """A folder that the package datasets reads → hub:FOLDER."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir(parents=True)
    data = datasets.Dataset.from_list(rows)
    save = {"parquet": data.to_parquet, "json": data.to_json}[kind]
    save(folder / f"train.{kind}")
    return f"hub:{folder}"


def write_rows(folder, form, rows):
    """Rows in one of FORMS → what --pairs takes."""
    if form in ("parquet", "hub json"):
        return write_data_set(folder / "set", form.split()[-1], rows)
    kind = form.removesuffix(".gz")
    if kind == "csv":
        text = as_csv(rows)
    elif kind == "json":
        text = json.dumps(rows, indent=1)
    else:
        text = "\n".join(map(json.dumps, rows))
    path = folder / f"p.{form}"
    path.write_bytes(gzip.compress(text.encode()) if form.endswith(".gz") else text.encode())
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own for the package datasets, where it is there."""
    try:
        import datasets
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def extract(tmp_path, folder_of):
    """Run stage 1 on what --pairs takes → what it printed. The run is tmp_path/run."""
    def run_stage1(pairs, *more):
        args = ["--model", folder_of("llama"), "--pairs", pairs, "--layer", 0]
        return succeed("01_extract", *args, "--run", tmp_path / "run", *more)
    return run_stage1


def rows_of(path):
    """The rows of a JSONL file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def extracted(run):
    """id, prompt, chosen and rejected of the rows of pairs.jsonl."""
    wanted = ("id", "prompt", "chosen", "rejected")
    return [{name: row[name] for name in wanted} for row in rows_of(run / "pairs.jsonl")]


@pytest.mark.parametrize("form", FORMS)
def test_newlines_and_quotes_survive_every_form_through_stage_1(form, tmp_path, extract, cache):
    rows = [
        asked("a, \"b\"\n\nc\r\nd", "Ω\n", "=cmd|' /C calc'!A0", id="one"),
        asked("x\ty", "\\n is not a newline", "[]", id="two"),
    ]
    extract(write_rows(tmp_path, form, rows))
    assert extracted(tmp_path / "run") == rows


@pytest.mark.parametrize("form", FORMS)
def test_messages_survive_every_form_through_stage_1(form, tmp_path, extract, cache):
    extract(write_rows(tmp_path, form, [asked(TALK, answer("b"), answer("c"), id="three")]))
    assert extracted(tmp_path / "run") == [asked(TALK, "b", "c", id="three")]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_and_blank_lines_are_no_part_of_the_rows(form, tmp_path):
    rows = [asked("a", "b", "c"), asked("d", "e", "f")]
    path = write_rows(tmp_path, form, rows)
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        file.write(text.replace("\n", "\n\n"))
    assert [row for _, row in read_rows(path)] == rows


def test_a_split_of_a_data_set_is_named_behind_its_folder(tmp_path, cache):
    rows = [asked("q", "a", "b")]
    place = write_data_set(tmp_path / "set", "json", rows)
    (tmp_path / "set/train.json").rename(tmp_path / "set/test.json")
    assert [row for _, row in read_rows(f"{place}:test")] == rows


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_the_same_file_in_another_folder_gives_the_same_pairs(form, tmp_path, extract):
    rows = [{**row, "id": None} for row in make_pairs(6)]       # they are named by their lines
    made = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        extract(write_rows(folder, form, rows))
        made.append((tmp_path / "run/pairs.jsonl").read_bytes())
    assert made[0] == made[1]
    assert len({row["id"] for row in extracted(tmp_path / "run")}) == 6


def test_limit_keeps_that_many_pairs_also_where_a_row_holds_several(tmp_path, extract):
    rows = [asked(f"q{i}", ["a", "b", "c"], ["d", "e", "f"]) for i in range(4)]
    assert "4 kept" in extract(save_rows(tmp_path / "p.jsonl", rows), "--limit", 4)
    ids = [row["id"] for row in extracted(tmp_path / "run")]
    assert ids == ["1#0", "1#1", "1#2", "2"]


def test_notes_are_counted_and_printed_the_most_frequent_first(tmp_path, extract):
    rows = [asked(f"q{n}", "a", "b", images=["x.png"]) for n in range(3)]
    rows[0]["tools"] = [CALL]
    out = extract(save_rows(tmp_path / "p.jsonl", rows))
    assert ("note: column images is not read (3 pairs)\n"
            "note: column tools is not read (1 pairs)\n") in out


# ---------------------------------------------------------------- tables

def read(path, text):
    """The rows of a file that holds this text."""
    path.write_text(text, encoding="utf-8", newline="")
    return [row for _, row in read_rows(path)]


ROW = {"prompt": "Well, is it?", "chosen": "a;b", "rejected": "c"}


@pytest.mark.parametrize("name, text", [
    ("p.csv", 'prompt,chosen,rejected\n"Well, is it?",a;b,c\n'),
    ("p.csv", ' prompt , chosen,rejected \n"Well, is it?",a;b,c,,\n'),
    ("p.csv", 'prompt;chosen;rejected\r\nWell, is it?;"a;b";c\r\n'),
    ("p.csv", "prompt\tchosen\trejected\nWell, is it?\ta;b\tc\n"),
    ("p.tsv", "prompt\tchosen\trejected\n\nWell, is it?\ta;b\tc\n"),
    ("p.csv", 'sep=;\nprompt;chosen;rejected\n"Well, is it?";"a;b";c\n'),
    ("p.json", json.dumps(ROW) + "\n"),
    ("p.jsonl", json.dumps([ROW], indent=1)),
    ("p.jsonl", "\n \n" + json.dumps([ROW])),
])
def test_a_table_is_read_whatever_parts_its_cells_and_rows(name, text, tmp_path):
    assert read(tmp_path / name, text) == [ROW]


def test_nan_of_a_table_in_json_is_an_empty_cell(tmp_path):
    text = '{"instruction": "Sum it", "input": NaN, "chosen": "a", "rejected": "b"}'
    [row] = read(tmp_path / "p.jsonl", text)
    assert pairs_of(row) == ([("Sum it", "a", "b")], [])


def test_a_dropped_row_of_a_data_set_may_hold_a_date(tmp_path, extract, cache):
    rows = [asked(f"q{n}", "a", "b", when=datetime.datetime(2024, 1, n + 1)) for n in range(3)]
    rows[1]["chosen"] = "b"
    extract(write_data_set(tmp_path / "set", "parquet", rows))
    [dropped] = rows_of(tmp_path / "run/dropped.jsonl")
    assert dropped["row"]["when"] == "2024-01-02 00:00:00"


def test_half_of_a_utf_16_pair_in_a_field_of_a_message_is_a_reason():
    prompt = [*turns("q"), {**answer("a")[0], "reasoning_content": "so \ud83d"}, *turns("r")]
    found, reasons = pairs_of(asked(prompt, "b", "c"), template=ALL_FIELDS)
    assert not found and "half of a UTF-16 pair" in reasons[0]


def test_the_id_of_a_call_may_be_left_out_by_the_template():
    prompt = [*turns("q"), {**answer("")[0], "tool_calls": [CALL]},
              {"role": "tool", "content": "9 kg", "tool_call_id": "c1"}]
    found, reasons = pairs_of(asked(prompt, "b", "c"), template=ALL_FIELDS)
    assert found == [(prompt, "b", "c")] and not reasons


def test_a_cell_of_any_length_is_read(tmp_path):
    long = "word " * 100_000
    [row] = read(tmp_path / "p.csv", f"prompt,chosen,rejected\nq,{long},b\n")
    assert row["chosen"] == long


@pytest.mark.parametrize("cells, says", [
    ("Well, is it?,a,b", "4 cells, the header has 3"),
    ("q,a", "2 cells, the header has 3"),
    ("q,a,b,,c", "5 cells, the header has 3"),
])
def test_a_row_that_does_not_fit_the_header_is_dropped_with_its_line(
        cells, says, tmp_path, extract):
    path = tmp_path / "p.csv"
    path.write_text(f"prompt,chosen,rejected\nq,a,b\n{cells}\n")
    extract(path)
    [row] = rows_of(tmp_path / "run/dropped.jsonl")
    assert row == {"where": f"{path}:3", "reason": says, "row": cells.split(",")}
    assert [row["prompt"] for row in extracted(tmp_path / "run")] == ["q"]


@pytest.mark.parametrize("text, says", [
    ("prompt,chosen,chosen\nq,a,b\n", "two columns of one name .* rename one"),
    ('prompt,chosen,rejected\nq,a,"b\nr,c,d\n', "a quote is never closed.* · .*p.csv:3 · "),
    ('prompt,chosen,rejected\nq,"a" so,b\n', "expected after .* · .*p.csv:2 · "),
])
def test_a_table_that_could_be_read_in_two_ways_is_refused(text, says, tmp_path):
    with pytest.raises(UserError, match=says):
        read(tmp_path / "p.csv", text)


# ---------------------------------------------------------------- rows that cannot be used

UNUSABLE = [        # a line of a JSONL file, what the reason says
    (r'{"prompt": "z", "chosen": "\ud800", "rejected": "c"}', "half of a UTF-16 pair"),
    (r'{"prompt": "", "chosen": "\ud800", "rejected": "c"}', "empty or non-text prompt"),
    ('{"prompt": "z", "chosen": " ", "rejected": "c"}', "empty or non-text response"),
    ('{"prompt": "z", "chosen": null, "rejected": "c"}', "empty or non-text response"),
    ('{"prompt": 5, "chosen": "b", "rejected": "c"}', "the prompt is no text but int"),
    ('{"prompt": null, "chosen": "Yes, we do.", "rejected": "Yes, we don\'t."}', "non-text prompt"),
    ('{"prompt": "", "chosen": "a b", "rejected": "a c"}', "empty or non-text prompt"),
    ('{"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}', "without role and content"),
    ('{"prompt": "q", "chosen": "a"}', "no rejected among the columns: chosen, prompt"),
    ('{"prompt": "q"}', "columns not recognised: prompt"),
    ("5", "not a JSON object"),
]


@pytest.fixture
def mixed(tmp_path):
    """As many good rows, and below them those that cannot be used → a JSONL file."""
    good = [json.dumps(row) for row in make_pairs(len(UNUSABLE))]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join([*good, *(line for line, _ in UNUSABLE)]))
    return path


def test_a_row_that_cannot_be_used_is_dropped_with_its_line_and_reason(mixed, tmp_path, extract):
    extract(mixed)
    found = rows_of(tmp_path / "run/dropped.jsonl")
    for n, (row, (line, says)) in enumerate(zip(found, UNUSABLE, strict=True)):
        assert row["row"] == json.loads(line)
        assert row["where"] == f"{mixed}:{len(UNUSABLE) + 1 + n}"
        assert says in row["reason"]


def test_rows_that_cannot_be_used_leave_the_others_as_they_are(mixed, tmp_path, extract):
    out = extract(mixed)
    assert f"{len(UNUSABLE)} kept, {len(UNUSABLE)} dropped" in out
    assert extracted(tmp_path / "run") == make_pairs(len(UNUSABLE))


def test_the_reasons_are_counted_the_most_frequent_first(tmp_path, extract):
    rows = [*make_pairs(3), {"prompt": "q"}, asked("", "a b", "a c"), asked(None, "a b", "a c")]
    out = extract(save_rows(tmp_path / "p.jsonl", rows))
    assert ("dropped.jsonl: 2 × an empty or non-text prompt, "
            "1 × columns not recognised: prompt\n") in out


@pytest.mark.parametrize("form, place", [
    ("jsonl", "p.jsonl:3"),
    ("csv", "p.csv:6"),             # the line where the row ends: two cells hold a newline
    ("json", "p.json:[2]"),
    ("parquet", "set[2]"),
])
def test_a_dropped_row_is_named_by_its_place_in_the_file(form, place, tmp_path, extract, cache):
    rows = [asked("a\nb", "c", "d"), asked("e\nf", "g", "h"), asked("i", "same", "same")]
    extract(write_rows(tmp_path, form, rows))
    [dropped] = rows_of(tmp_path / "run/dropped.jsonl")
    assert dropped["where"].endswith(place)
    assert dropped["row"] == rows[2]


def test_half_of_the_rows_may_be_dropped(tmp_path, extract):
    rows = [*make_pairs(2), *[asked("a", "b", "")] * 2]
    assert "2 kept, 2 dropped" in extract(save_rows(tmp_path / "p.jsonl", rows))


def test_more_than_half_dropped_is_an_error_and_dropped_jsonl_says_why(tmp_path, folder_of):
    rows = [*make_pairs(2), *[asked("a", "b", "")] * 3]
    args = ["--model", folder_of("llama"), "--pairs", save_rows(tmp_path / "p.jsonl", rows)]
    result = command("01_extract", *args, "--layer", 0, "--run", tmp_path / "run")
    assert_one_line_error(result, "more than half", "an empty or non-text response", "p.jsonl:3")
    assert len(rows_of(tmp_path / "run/dropped.jsonl")) == 3
    assert not (tmp_path / "run/pairs.jsonl").exists()


def damaged_gzip():
    """A gzip file with rubbish in its middle."""
    lines = [json.dumps(row) + "\n" for row in make_pairs(100)]
    data = bytearray(gzip.compress("".join(lines).encode()))
    data[60:90] = b"\xff" * 30
    return bytes(data)


COLUMNS = "prompt, chosen, rejected"
OTHER = b'{"question": "q", "answer": "a"}\n'
BAD_FILES = {       # (name, bytes, what the message says); test_bad_input.py has more of them
    "other columns": ("p.jsonl", OTHER, f"answer, question .*{COLUMNS}"),
    "other columns of a table": ("p.csv", b"good,bad\na,b\n", f"bad, good .*{COLUMNS}"),
    "damaged gzip": ("p.jsonl.gz", damaged_gzip(), r"not readable as jsonl \(.*p\.jsonl\.gz"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_read_is_an_error_that_says_what_it_needs(case, tmp_path, folder_of):
    name, data, says = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    args = ["--model", folder_of("llama"), "--pairs", tmp_path / name, "--layer", 0]
    result = command("01_extract", *args, "--run", tmp_path / "run")
    assert_one_line_error(result)
    assert re.search(says, result[2])
