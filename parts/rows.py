"""Rows of data files, and the preference pairs in them, in any of the usual layouts.

    for where, row in read_rows("pairs.jsonl"):             where: file and line, for messages
        for prompt, chosen, rejected in pairs_of_row(row):  prompt: text, or messages
"""

import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from parts.chat import render
from parts.files import UserError
from parts.messages import (
    Unreadable,
    as_turns,
    check_asks,
    check_prompt,
    context_and_answer,
    messages_of,
    read_prompt,
    turns_of_transcript,
)
from parts.models import await_hub

ACCEPTED = ("prompt, chosen, rejected | chosen, rejected | question, mc1_targets or mc2_targets | "
            "prompt, response_0, response_1 with safer_response_id, better_response_id")


# ---------------------------------------------------------------- files → rows

def read_rows(path):
    """Yield (where, row) of a JSONL, JSON or CSV file (also .gz), or hub:REPO[:CONFIG][:SPLIT].

    A row of a table that does not fit its header is an OddRow.
    """
    if str(path).startswith("hub:"):
        yield from read_hub(path)
        return
    path = Path(path)
    if not path.is_file():
        raise UserError(f"file not found · {path} · name a .jsonl, .json or .csv file, or hub:REPO")
    if path.suffix in (".parquet", ".arrow", ".xlsx"):
        raise UserError(f"{path.suffix} is not read · {path} · "
                        "convert it to .jsonl, or put it into a folder and name hub:FOLDER")

    suffix = Path(path.name.removesuffix(".gz")).suffix
    reader = read_table if suffix in (".csv", ".tsv") else read_json
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rb") as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        try:
            for where, row in reader(text, path):
                yield where, without_nan(row)
        except UserError:
            raise
        except UNREADABLE as error:
            raise UserError(f"not readable as {suffix[1:]} ({error}) · {path} · "
                            "mend or convert the file") from None


def without_nan(row):
    """A row whose empty cells are None: pandas writes NaN."""
    if not isinstance(row, dict):
        return row
    return {name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()}


UNREADABLE = (ValueError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error, RecursionError)


@dataclass
class OddRow:
    """A row of a table that does not fit the header, and why."""
    reason: str
    cells: list


def read_table(text, path):
    """Yield the rows of a table, each named by the line where it ends: cells may hold newlines.

    The header decides between comma, semicolon and tab.
    """
    csv.field_size_limit(2**31 - 1)
    first_line = text.readline()
    if first_line.strip().startswith("sep="):           # as Excel writes it
        first_line = text.readline()
    delimiter = max(",;\t", key=first_line.count)
    table = csv.reader(itertools.chain([first_line], text), delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(table, [])]
    named = [name for name in header if name]
    if len(set(named)) != len(named):
        raise UserError(f"two columns of one name ({', '.join(header)}) · {path} · rename one")

    try:
        for cells in table:
            if not cells:                               # a blank line
                continue
            where = f"{path}:{table.line_num}"
            while len(cells) > len(header) and not cells[-1]:
                cells.pop()                             # commas at the end
            if len(cells) == len(header):
                yield where, dict(zip(header, cells))
            else:
                reason = f"{len(cells)} cells, the header has {len(header)}"
                yield where, OddRow(reason, cells)
    except csv.Error as error:
        reason = str(error).replace("unexpected end of data", "a quote is never closed")
        raise UserError(f"not readable as a table ({reason}) · {path}:{table.line_num} · "
                        "mend the quotes of this row") from None


def read_json(text, path):
    """Yield the rows of a file that holds one array, or one JSON object a line."""
    blank_lines = 0
    line = text.readline()
    while line and not line.strip():
        blank_lines += 1
        line = text.readline()
    if line.lstrip().startswith("["):
        for n, row in enumerate(json.loads(line + text.read())):
            yield f"{path}:[{n}]", row
        return

    for n, row in enumerate(itertools.chain([line], text), blank_lines + 1):
        if row.strip():
            yield f"{path}:{n}", parse_line(row, f"{path}:{n}")


def parse_line(line, where):
    """One line of a file with an object a line → what it holds."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"invalid JSON ({error.msg}, column {error.colno}) · {where} · "
                        "mend or delete this line; rows stand one a line, or all in [ ]") from None


def read_hub(name):
    """hub:REPO[:CONFIG][:SPLIT] through the `datasets` package (REPO may be a local folder)."""
    await_hub()
    try:
        import datasets
    except ImportError:
        raise UserError(f"package datasets is missing · {name} · pip install datasets") from None
    repo, *rest = name.removeprefix("hub:").split(":")
    if len(rest) > 1:
        config, split = rest[:2]
    else:
        config, split = None, rest[0] if rest else "train"
    try:
        rows = datasets.load_dataset(repo, config, split=split)
    except Exception as error:      # datasets raises all sorts; the first line says what is wrong
        reason = str(error).splitlines()[0]
        raise UserError(f"datasets could not read it ({reason}) · {name} · "
                        "check the name, the split and the connection") from None
    for n, row in enumerate(rows):
        yield f"{name}[{n}]", without_nan(row)


# ---------------------------------------------------------------- rows → pairs

# columns that may hold the prompt; the first that is there counts
PROMPTS = ("prompt", "question", "instruction", "query", "conversations", "conversation", "input",
           "messages")
SYSTEM = ("system", "system_prompt", "system_message")
# they change what the model would see, and are not read: named, with a count
CONTEXT = ("tools", "functions", "image", "audio", "video", "document", "context", "history",
           "input")
# what stage 5 writes beside candidates
OF_CANDIDATES = {"candidates", "response", "labels", "ids", "scores", "outside", "reasons", "best",
                 "ranking", "reward", "policy", "models", "settings"}
SHORT = 40      # characters of a label
# they say something of the pair, and are no part of the conversation
ABOUT = {"id", "source", "category", "subset", "dataset", "split", "language", "lang", "model",
         "chosen_model", "rejected_model", "type", "label", "rating", "score", "url", "license"}


class NoLayout(UserError):
    """The columns of a row are those of no layout."""


def pairs_of_row(row, label=None):
    """One row of any accepted layout → list of (prompt, chosen, rejected).

    Instead a str, where there is none: why. label: safer or better, for PKU-SafeRLHF. Errors:
    NoLayout.
    """
    columns = {name for name, value in row.items() if value is not None}
    try:
        if "question" in columns and columns & {"mc1_targets", "mc2_targets"}:
            pairs = pairs_of_truthfulqa(row)
        elif {"prompt", "response_0", "response_1"} <= columns:
            pairs = pairs_of_pku(row, label)
        elif {"chosen", "rejected"} <= set(row):
            pairs = pairs_of_trl(row)
        else:
            names = ", ".join(sorted(map(str, row)))
            missing = {"chosen", "rejected"} - set(row)
            if len(missing) == 1:
                raise NoLayout(f"no {missing.pop()} among the columns: {names}")
            raise NoLayout(f"columns not recognised: {names}")
        return [(behind_context(row, prompt), *sides) for prompt, *sides in pairs]
    except Unreadable as reason:
        return str(reason)


def pairs_of_truthfulqa(row):
    """Each right answer against a wrong one, which are taken in turn."""
    target = row.get("mc2_targets") or row.get("mc1_targets")
    if not isinstance(target, dict) or not {"choices", "labels"} <= set(target):
        raise Unreadable("mc1_targets and mc2_targets need choices and labels")
    right = [choice for choice, label in zip(target["choices"], target["labels"]) if label]
    wrong = [choice for choice, label in zip(target["choices"], target["labels"]) if not label]
    if not wrong:
        raise Unreadable("no wrong answer")
    return [(row["question"], answer, wrong[n % len(wrong)]) for n, answer in enumerate(right)]


def pairs_of_pku(row, label):
    """PKU-SafeRLHF: two responses, and two labels that may differ: which counts is not guessed."""
    if f"{label}_response_id" not in row:
        raise UserError("this layout holds two labels · "
                        "columns safer_response_id, better_response_id · "
                        "pass --label safer or --label better")
    best = str(row[f"{label}_response_id"]).strip().removesuffix(".0")
    if best not in ("0", "1"):
        raise Unreadable("no label")
    chosen, rejected = row[f"response_{best}"], row[f"response_{1 - int(best)}"]
    return [(row["prompt"], chosen, rejected)]


def pairs_of_trl(row):
    """chosen and rejected, with a prompt (explicit) or without (implicit: what both begin with)."""
    chosen, rejected = messages_of(row["chosen"]), messages_of(row["rejected"])
    if isinstance(chosen, str) != isinstance(rejected, str):    # one only looks like messages
        chosen = row["chosen"] if isinstance(row["chosen"], str) else chosen
        rejected = row["rejected"] if isinstance(row["rejected"], str) else rejected
    name, prompt = prompt_column(row), prompt_of_row(row)
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        return pairs_of_lists(prompt, chosen, rejected)
    if prompt:
        prompt, chosen, rejected = split_explicit(prompt, chosen, rejected)
        was_transcript = isinstance(row[name], str) and isinstance(prompt, list)
        if was_transcript and isinstance(chosen, str) and isinstance(rejected, str):
            chosen, rejected = chosen.strip(), rejected.strip()
        return [(prompt, chosen, rejected)]
    if name and not both_transcripts(chosen, rejected) and isinstance(chosen, str):
        raise Unreadable("an empty or non-text prompt")
    return [split_implicit(row, chosen, rejected)]


def pairs_of_lists(prompt, chosen, rejected):
    """RM-Bench, RewardBench 2: lists of texts. Side by side if equally long, else all with all."""
    if not isinstance(rejected, list):
        rejected = [rejected]
    together = zip if len(chosen) == len(rejected) else itertools.product
    return [(prompt, good, bad) for good, bad in together(chosen, rejected)]


# ---------------------------------------------------------------- the prompt, and what is before it

def prompt_column(row):
    """The name of the column that holds the prompt; of empty ones the first; None where none is."""
    filled = [name for name in PROMPTS if row.get(name) not in (None, "", [])]
    there = [name for name in PROMPTS if name in row]
    return next(iter(filled + there), None)


def system_column(row):
    """The name of the column that holds a system turn, or None."""
    return next((name for name in SYSTEM if row.get(name)), None)


def prompt_of_row(row):
    """→ the prompt: text or messages; None where the row has none.

    Alpaca splits it into instruction and input.
    """
    name = prompt_column(row)
    value = row.get(name)
    if value in (None, "", []):
        return None
    if name == "instruction" and isinstance(value, str) and str(row.get("input") or "").strip():
        value = f"{value}\n\n{row['input']}"
    return read_prompt(value)


def behind_context(row, prompt):
    """A prompt → behind the turns of the columns system and history, where the row has them."""
    before = history_of(row)
    system = row.get(system_column(row))
    if not before and not system:
        return prompt
    check_prompt(prompt)
    turns = as_turns(prompt)
    said = [turn for turn in turns if turn["role"] != "system"]
    if said[:len(before)] == before:            # it is in the conversation too
        before = []
    if system:
        system = {"role": "system", "content": system}
        own = [turn for turn in turns if turn["role"] == "system"]
        if not own:
            before = [system, *before]
        elif own[0]["content"].strip() != str(system["content"]).strip():
            raise Unreadable("two system turns, in the prompt and in a column of its own")
    return [*before, *turns]


def history_of(row):
    """The column history as messages: they, or [[user, assistant], …]; [] where it is none."""
    history = row.get("history")
    if not isinstance(history, (list, tuple)) or not history:
        return []
    if all(isinstance(turn, dict) for turn in history):
        return messages_of(history)
    turns = []
    for exchange in history:
        if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
            return []
        turns.append({"role": "user", "content": exchange[0]})
        turns.append({"role": "assistant", "content": exchange[1]})
    return turns


# ---------------------------------------------------------------- prompt, chosen, rejected

def split_explicit(prompt, chosen, rejected):
    """A prompt, and answers or whole conversations → (prompt, chosen, rejected), the prompt once.
    """
    check_prompt(prompt)
    turns = as_turns(prompt)
    if both_transcripts(chosen, rejected) and holds(turns_of_transcript(chosen), turns):
        chosen, rejected = turns_of_transcript(chosen), turns_of_transcript(rejected)
    before, answer, answer_rejected = split_sides(*without_prompt(prompt, chosen, rejected))
    if not before:
        return prompt, answer, answer_rejected
    if holds(before, turns):
        return as_plain(prompt, before), answer, answer_rejected
    if any(turn["role"] == "user" for turn in before):
        raise Unreadable("the conversation does not hold the prompt")
    system = [turn for turn in before if turn["role"] == "system"]
    rest = [turn for turn in before if turn["role"] != "system"]
    return [*system, *turns, *rest], answer, answer_rejected


def split_sides(chosen, rejected):
    """Two answers, or conversations that part in the last turn → (what is before, both answers)."""
    before, answer = context_and_answer(chosen)
    before_rejected, answer_rejected = context_and_answer(rejected)
    if before != before_rejected:
        raise Unreadable("the two conversations part before the last turn")
    return before, answer, answer_rejected


def holds(conversation, turns):
    """Does each of these turns stand in the conversation?"""
    said = [turn["content"].strip() for turn in conversation]
    return all(turn["content"].strip() in said for turn in turns)


def as_plain(prompt, turns):
    """Messages → the text of the prompt where they say no more than that."""
    if isinstance(prompt, str) and len(turns) == 1:
        return prompt
    return turns


def without_prompt(prompt, chosen, rejected):
    """Both answers without the prompt's text, where both repeat it."""
    if not repeat_prompt(prompt, chosen, rejected):
        return chosen, rejected
    length = len(prompt.strip())
    return chosen.strip()[length:].strip(), rejected.strip()[length:].strip()


def repeat_prompt(prompt, chosen, rejected):
    """Do both answers begin with the prompt? One of a word or two says nothing: "Hello" … "Hello!".
    """
    if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        return False
    if len(prompt.split()) < 3:
        return False
    ends = [side.strip()[len(prompt.strip()):] for side in (chosen, rejected)
            if side.strip().startswith(prompt.strip())]
    return len(ends) == 2 and all(end[:1].isspace() for end in ends)


def both_transcripts(chosen, rejected):
    """Are both sides dialogues, each written as one text?"""
    are_texts = isinstance(chosen, str) and isinstance(rejected, str)
    return are_texts and bool(turns_of_transcript(chosen) and turns_of_transcript(rejected))


def split_implicit(row, chosen, rejected):
    """What both sides begin with is the prompt → (prompt, chosen, rejected)."""
    if type(chosen) is not type(rejected) or not chosen or not rejected:
        raise Unreadable("chosen and rejected are not both text or both messages")
    if both_transcripts(chosen, rejected):
        chosen, rejected = turns_of_transcript(chosen), turns_of_transcript(rejected)
    if isinstance(chosen, str):
        refuse_unknown_text(row)
        return split_common_text(chosen, rejected)
    before, answer, answer_rejected = split_sides(chosen, rejected)
    if answer == answer_rejected:
        raise Unreadable("chosen and rejected are the same conversation")
    return before, answer, answer_rejected


def split_common_text(chosen, rejected):
    """Two texts → (their common beginning, up to a whole word, and what follows in each)."""
    shared = len(os.path.commonprefix([chosen, rejected]))
    while 0 < shared and not chosen[shared - 1].isspace():
        shared -= 1
    return chosen[:shared].strip(), chosen[shared:], rejected[shared:]


def refuse_unknown_text(row):
    """Beside two plain texts, a column that is not known may well hold the prompt."""
    unknown = unread_columns(row)
    if unknown:
        raise NoLayout(f"no column is known to hold the prompt, and {', '.join(unknown)} might: "
                       "rename it to prompt, or delete it")


def unread_columns(row):
    """Names of the columns of a row that hold text and are no part of what is read."""
    name_of_prompt = prompt_column(row)
    read = {name_of_prompt, system_column(row), "chosen", "rejected", *OF_CANDIDATES}
    if "chosen" not in row:
        read |= {"response_0", "response_1", "mc1_targets", "mc2_targets"}
    if name_of_prompt == "instruction":
        read.add("input")
    if history_of(row):
        read.add("history")
    return [str(name) for name, value in row.items()
            if name not in read and value and may_be_context(str(name), value)]


def notes_on_columns(row):
    """The columns of a row that are not read → sentences."""
    return [f"column {name} is not read" for name in unread_columns(row)]


def may_be_context(name, value):
    """Could this column change what the model would see? Numbers, marks and short labels cannot."""
    if any(word in name.lower() for word in CONTEXT):
        return True
    if isinstance(value, str):
        is_text = " " in value or not value.isascii()
        return is_text and not (name in ABOUT and len(value) < SHORT)
    return isinstance(value, (list, dict)) and name not in ABOUT


def check_row(row):
    """Refuse what is no row with columns. Errors: Unreadable."""
    if isinstance(row, OddRow):
        raise Unreadable(row.reason)
    if not isinstance(row, dict):
        raise Unreadable("not a JSON object")


def as_written(row):
    """A row as it stands in its file, for those that are left out."""
    return row.cells if isinstance(row, OddRow) else row


def tell_notes(notes, what):
    """Print each note with how many `what` it is about. notes: Counter."""
    for note, count in notes.most_common():
        print(f"note: {note} ({count} {what})")


def in_words(reasons, most=3):
    """A Counter of reasons → "2 × this, 1 × that"."""
    return ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(most))


def pairs_or_reason(row, label=None, first=None):
    """pairs_of_row() of whatever a file may hold.

    first: where the row stands, if it is the first of its file: then a layout that is none is the
    file's, and an error.
    """
    try:
        check_row(row)
        return pairs_of_row(row, label)
    except Unreadable as reason:
        return str(reason)
    except NoLayout as error:
        if first:
            raise UserError(f"{error} · {first} · accepted: {ACCEPTED}") from None
        return str(error)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        return f"malformed ({type(error).__name__}: {error})"


# ---------------------------------------------------------------- pairs that can be scored

@dataclass
class Pair:
    """A preference pair that can be scored, with its two sides as they are rendered."""
    prompt: object          # text, or messages
    chosen: str
    rejected: str
    texts: tuple            # Text of chosen, Text of rejected: see parts/chat.py
    notes: tuple            # what of its row is not read, or not as it was written: sentences


def usable_pairs(tokenizer, row, label, max_length, first=None):
    """One row → (list of Pairs that can be scored, list of reasons for those that cannot).

    first: see pairs_or_reason.
    """
    found = pairs_or_reason(row, label, first)
    if isinstance(found, str):
        return [], [found]
    pairs, reasons = [], []
    for prompt, chosen, rejected in found:
        try:
            check_pair(prompt, chosen, rejected)
            texts = render_both(tokenizer, prompt, chosen, rejected, max_length)
            notes = notes_on(row, prompt, texts)
            pairs.append(Pair(prompt, chosen, rejected, texts, notes))
        except Unreadable as reason:
            reasons.append(reason.reason)
    return pairs, reasons


def notes_on(row, prompt, texts):
    """What a reader of the data should know of how this row is read → sentences, each once."""
    notes = notes_on_columns(row)
    name = prompt_column(row)
    plain = isinstance(row.get("chosen"), str) and not both_transcripts(row["chosen"],
                                                                        row["rejected"])
    if name is None and plain:
        notes.append("no prompt column: the prompt is what chosen and rejected both begin with")
    if repeat_prompt(prompt, row.get("chosen"), row.get("rejected")):
        notes.append("both answers begin with the prompt, which is read once")
    texts_of_row = [value for value in (row.get(name), row.get("chosen"))
                    if isinstance(value, str)]
    if any(turns_of_transcript(text) for text in texts_of_row):
        in_turns = isinstance(prompt, list)
        notes.append("a dialogue in one text is read as " + ("turns" if in_turns else "one turn"))
    if any(re.search(OTHER_MARKS, text) for text in texts_of_row):
        notes.append("a text holds marks of a chat template, which are read as plain text")
    return tuple(dict.fromkeys([*notes, *texts[0].notes, *texts[1].notes]))


# of templates that someone has put around a text already
OTHER_MARKS = r"<\|im_start\|>|\[INST\]|<start_of_turn>|<\|start_header_id\|>|### Instruction:"


def check_pair(prompt, chosen, rejected):
    """Refuse what is no text, or no conversation. Errors: Unreadable."""
    if not all(isinstance(side, str) and side.strip() for side in (chosen, rejected)):
        raise Unreadable("an empty or non-text response")
    if not prompt:
        raise Unreadable("an empty or non-text prompt")
    check_asks(prompt)


def render_both(tokenizer, prompt, chosen, rejected, max_length):
    """Both sides of a pair → two Texts that differ. Errors: Unreadable."""
    texts = tuple(render(tokenizer, prompt, side, max_length) for side in (chosen, rejected))
    if texts[0].ids == texts[1].ids:
        raise Unreadable("both sides are the same token sequence")
    return texts
