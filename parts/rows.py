"""Rows of data files: preference pairs in any of the usual layouts, prompts, candidates.

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

from parts.chat import is_conversation, render
from parts.files import UserError
from parts.models import await_hub

ACCEPTED = ("prompt, chosen, rejected | chosen, rejected | question, mc1_targets or mc2_targets | "
            "prompt, response_0, response_1 with safer_response_id, better_response_id")


# ---------------------------------------------------------------- files → rows

def read_rows(path):
    """Yield (where, row) of a JSONL, JSON or CSV file (also .gz), or hub:REPO[:CONFIG][:SPLIT]."""
    if str(path).startswith("hub:"):
        yield from read_hub(path)
        return
    path = Path(path)
    if not path.is_file():
        raise UserError(f"file not found · {path} · name a .jsonl, .json or .csv file, or hub:REPO")
    if path.suffix in (".parquet", ".arrow", ".tsv", ".xlsx"):
        raise UserError(f"{path.suffix} is not read · {path} · "
                        "convert it to .jsonl, or put it into a folder and name hub:FOLDER")

    suffix = Path(path.name.removesuffix(".gz")).suffix
    readers = {".csv": read_csv, ".json": read_json}
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rb") as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        try:
            yield from readers.get(suffix, read_jsonl)(text, path)
        except UserError:
            raise
        except UNREADABLE as error:
            raise UserError(f"not readable as {suffix[1:]} ({error}) · {path} · "
                            "mend or convert the file") from None


UNREADABLE = (ValueError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error, RecursionError)


def read_csv(text, path):
    """Yield the rows of a table, each named by the line where it ends: cells may hold newlines."""
    table = csv.DictReader(text)
    for row in table:
        yield f"{path}:{table.line_num}", row


def read_json(text, path):
    """Yield the rows of an array."""
    array = json.load(text)
    if not isinstance(array, list):
        raise UserError(f"not an array of rows · {path} · "
                        "put the rows into [ ], or one a line into a .jsonl file")
    for n, row in enumerate(array):
        yield f"{path}:[{n}]", row


def read_jsonl(text, path):
    """Yield the rows of a file with one JSON object a line."""
    for n, line in enumerate(text, 1):
        if line.strip():
            yield f"{path}:{n}", parse_line(line, f"{path}:{n}")


def parse_line(line, where):
    """One JSON object of a JSONL file → dict."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"invalid JSON ({error.msg}, column {error.colno}) · {where} · "
                        "mend or delete this line") from None


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
        yield f"{name}[{n}]", row


# ---------------------------------------------------------------- rows → pairs

class NoLayout(UserError):
    """The columns of a row are those of no layout."""


class NoPair(Exception):
    """Why a row of a known layout gives no pair."""


def pairs_of_row(row, label=None):
    """One row of any accepted layout → list of (prompt, chosen, rejected).

    Instead a str, where there is none: why. label: safer or better, for PKU-SafeRLHF. Errors:
    NoLayout.
    """
    columns = set(row)
    try:
        if "question" in columns and columns & {"mc1_targets", "mc2_targets"}:
            return pairs_of_truthfulqa(row)
        if {"prompt", "response_0", "response_1"} <= columns:
            return pairs_of_pku(row, label)
        if {"chosen", "rejected"} <= columns:
            return pairs_of_trl(row)
    except NoPair as reason:
        return str(reason)
    raise NoLayout(f"columns not recognised: {', '.join(sorted(map(str, columns)))}")


def pairs_of_truthfulqa(row):
    """Each right answer against a wrong one, which are taken in turn."""
    target = row.get("mc2_targets") or row["mc1_targets"]
    right = [choice for choice, label in zip(target["choices"], target["labels"]) if label]
    wrong = [choice for choice, label in zip(target["choices"], target["labels"]) if not label]
    if not wrong:
        raise NoPair("no wrong answer")
    return [(row["question"], answer, wrong[n % len(wrong)]) for n, answer in enumerate(right)]


def pairs_of_pku(row, label):
    """PKU-SafeRLHF: two responses, and two labels that may differ: which counts is not guessed."""
    if f"{label}_response_id" not in row:
        raise UserError("this layout holds two labels · "
                        "columns safer_response_id, better_response_id · "
                        "pass --label safer or --label better")
    best = int(row[f"{label}_response_id"])
    if best not in (0, 1):
        raise NoPair("no label")
    return [(row["prompt"], row[f"response_{best}"], row[f"response_{1 - best}"])]


def pairs_of_trl(row):
    """chosen and rejected, with a prompt (explicit) or without (implicit: what both begin with)."""
    prompt = messages_of(row.get("prompt"))
    chosen = messages_of(row["chosen"])
    rejected = messages_of(row["rejected"])
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        return pairs_of_lists(prompt, chosen, rejected)

    both_lists = isinstance(chosen, list) and isinstance(rejected, list)
    whole_conversations = both_lists and len(chosen) > 2 and len(rejected) > 2
    empty_cell = "prompt" in row and isinstance(chosen, str) and not is_transcript(chosen)
    is_implicit = prompt in (None, "", []) and not empty_cell
    if is_implicit or whole_conversations:
        return [split_common(chosen, rejected)]
    return [(prompt, answer_of(chosen), answer_of(rejected))]


def pairs_of_lists(prompt, chosen, rejected):
    """RM-Bench, RewardBench 2: lists of texts. Side by side if equally long, else all with all."""
    if not isinstance(rejected, list):
        rejected = [rejected]
    together = zip if len(chosen) == len(rejected) else itertools.product
    return [(prompt, good, bad) for good, bad in together(chosen, rejected)]


def answer_of(side):
    """A text, or messages that hold one answer → the text."""
    if not isinstance(side, list):
        return side
    if not is_conversation(side):
        raise NoPair("messages without role and content")
    answers = [turn for turn in side if turn["role"] == "assistant"]
    if len(answers) != 1 or side[-1]["role"] != "assistant":
        raise NoPair("the answer is not one assistant turn")
    return answers[0]["content"]


def split_common(chosen, rejected):
    """Implicit prompt: what both conversations begin with → (prompt, chosen, rejected)."""
    if type(chosen) is not type(rejected) or not chosen or not rejected:
        raise NoPair("chosen and rejected are not both text or both messages")
    if isinstance(chosen, str) and is_transcript(chosen) and is_transcript(rejected):
        return split_common(turns_of_transcript(chosen), turns_of_transcript(rejected))
    if isinstance(chosen, str):
        return split_common_text(chosen, rejected)

    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    last_turns = chosen[shared:] + rejected[shared:]
    if len(chosen) != shared + 1 or len(rejected) != shared + 1:
        raise NoPair("the two conversations part before the last turn")
    if any(turn["role"] != "assistant" for turn in last_turns):
        raise NoPair("the two conversations part before the last turn")
    return chosen[:shared], chosen[shared]["content"], rejected[shared]["content"]


def split_common_text(chosen, rejected):
    """Two texts → (their common beginning, up to a whole word, and what follows in each)."""
    shared = len(os.path.commonprefix([chosen, rejected]))
    while 0 < shared and not chosen[shared - 1].isspace():
        shared -= 1
    return chosen[:shared].strip(), chosen[shared:], rejected[shared:]


def messages_of(value):
    """A CSV cell or JSON value → str or list of {role, content}."""
    if isinstance(value, str) and value.startswith('[{"'):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return value
    return list(value) if isinstance(value, (list, tuple)) else value


def is_transcript(text):
    """Is it written as hh-rlhf writes a dialogue?"""
    return re.match(r"\s*Human:", text) is not None


def turns_of_transcript(text):
    """An hh-rlhf transcript "\\n\\nHuman: … \\n\\nAssistant: …" → messages."""
    _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.lstrip())
    turns = []
    for speaker, said in zip(parts[0::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        turns.append({"role": role, "content": said.strip()})
    return turns


def pairs_or_reason(row, label=None, first=None):
    """pairs_of_row() of whatever a file may hold.

    first: where the row stands, if it is the first of its file: then a layout that is none is the
    file's, and an error.
    """
    if not isinstance(row, dict):
        return "not a JSON object"
    try:
        return pairs_of_row(row, label)
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


class Unusable(Exception):
    """Why a pair cannot be scored."""


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
            pairs.append(Pair(prompt, chosen, rejected, texts))
        except Unusable as reason:
            reasons.append(str(reason))
    return pairs, reasons


def check_pair(prompt, chosen, rejected):
    """Refuse what is no text, or no conversation. Errors: Unusable."""
    if not all(isinstance(side, str) and side.strip() for side in (chosen, rejected)):
        raise Unusable("an empty or non-text response")
    if re.search("[\ud800-\udfff]", f"{prompt}{chosen}{rejected}"):
        raise Unusable("half of a UTF-16 pair, which no tokenizer takes")
    if not isinstance(prompt, list):
        if not isinstance(prompt, str) or not prompt.strip():
            raise Unusable("an empty or non-text prompt")
        return
    if not is_conversation(prompt):
        raise Unusable("prompt messages without role and content")
    if prompt[-1]["role"] == "assistant":
        raise Unusable("the prompt ends with an assistant turn")
    if not all(turn["content"].strip() for turn in prompt if turn["role"] == "assistant"):
        raise Unusable("an empty assistant turn")


def render_both(tokenizer, prompt, chosen, rejected, max_length):
    """Both sides of a pair → two Texts that differ. Errors: Unusable."""
    try:
        texts = tuple(render(tokenizer, prompt, side, max_length) for side in (chosen, rejected))
    except UserError as error:
        raise Unusable(str(error).partition(" · ")[0]) from None
    except Exception as error:      # whatever a chat template says about this conversation
        if type(error).__module__.startswith("jinja2"):
            raise Unusable(f"refused by the chat template ({error})") from None
        raise
    if texts[0].ids == texts[1].ids:
        raise Unusable("both sides are the same token sequence")
    return texts


# ------------------------------------------------------------- prompts and candidates, for stage 5

def is_prompt(value):
    """Is it a text, or messages with role and content?"""
    if isinstance(value, list):
        return is_conversation(value)
    return isinstance(value, str) and bool(value.strip())


def are_numbers(values, count):
    """Is it a list of so many finite numbers?"""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in values)


def read_prompts(path):
    """Prompts of a JSONL file, each once, in order."""
    found = {}
    for where, row in read_rows(path):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not is_prompt(prompt):
            raise UserError(f"no prompt in this row · {where} · "
                            "rows need a prompt (text or messages)")
        found.setdefault(json.dumps(prompt), prompt)
    if not found:
        raise UserError(f"no prompts · {path} · rows need a prompt (text or messages)")
    return list(found.values())


def read_candidates(path):
    """Rows {prompt, candidates[, labels]} or {prompt, response[, id]} → list of the former."""
    rows = []
    grouped = {}                    # the rows that are made of single responses, by prompt
    for where, row in read_rows(path):
        is_row = isinstance(row, dict) and is_prompt(row.get("prompt"))
        if not is_row or not {"candidates", "response"} & set(row):
            raise UserError(f"not a row of candidates · {where} · "
                            "needs prompt and candidates, or prompt and response")
        if "response" in row:
            key = json.dumps(row["prompt"])
            if key not in grouped:
                grouped[key] = {"prompt": row["prompt"], "candidates": [], "ids": []}
                rows.append(grouped[key])
            grouped[key]["candidates"].append(row["response"])
            grouped[key]["ids"].append(row.get("id"))
            check_candidates(grouped[key], where)
        else:
            check_candidates(row, where)
            rows.append(dict(row))
    if not rows:
        raise UserError(f"no candidates · {path} · "
                        "rows need prompt and candidates, or prompt and response")
    return rows


def check_candidates(row, where):
    """Refuse candidates that are no texts, and labels that are not a number for each."""
    texts = row["candidates"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError("candidates must be a list of texts, at least one · "
                        f"{where} · mend this row")
    if "labels" in row and not are_numbers(row["labels"], len(texts)):
        raise UserError(f"labels must be numbers, one for each of the {len(texts)} candidates · "
                        f"{where} · mend this row")
