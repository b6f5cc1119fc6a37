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
from pathlib import Path

from parts.chat import is_conversation, render
from parts.files import UserError
from parts.models import await_hub

ACCEPTED = ("prompt, chosen, rejected | chosen, rejected | question, mc1_targets or mc2_targets | "
            "prompt, response_0, response_1 with safer_response_id, better_response_id")


def read_rows(path):
    """Yield (where, row) of a JSONL, JSON or CSV file (also .gz), or of hub:REPO[:CONFIG][:SPLIT]."""
    if str(path).startswith("hub:"):
        yield from read_hub(path)
        return
    path = Path(path)
    if not path.is_file():
        raise UserError(f"file not found · {path} · name a .jsonl, .json or .csv file, or hub:REPO")
    if path.suffix in (".parquet", ".arrow", ".tsv", ".xlsx"):
        raise UserError(f"{path.suffix} is not read · {path} · convert it to .jsonl, or put it into a folder and name hub:FOLDER")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        name = path.name.removesuffix(".gz")
        try:
            if name.endswith(".csv"):
                table = csv.DictReader(text)        # a cell may hold newlines: a row is named by the line where it ends
                rows = ((f"{path}:{table.line_num}", row) for row in table)
            elif name.endswith(".json"):
                array = json.load(text)
                if not isinstance(array, list):
                    raise UserError(f"not an array of rows · {path} · put the rows into [ ], or one a line into a .jsonl file")
                rows = ((f"{path}:[{n}]", row) for n, row in enumerate(array))
            else:
                rows = ((f"{path}:{n}", parse_line(line, f"{path}:{n}")) for n, line in enumerate(text, 1) if line.strip())
            yield from rows
        except UserError:
            raise
        except (ValueError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error, RecursionError) as error:
            raise UserError(f"not readable as {name.rpartition('.')[2]} ({error}) · {path} · mend or convert the file") from None


def parse_line(line, where):
    """One JSON object of a JSONL file → dict."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"invalid JSON ({error.msg}, column {error.colno}) · {where} · mend or delete this line") from None


def read_hub(name):
    """hub:REPO[:CONFIG][:SPLIT] through the `datasets` package (REPO may be a local folder)."""
    await_hub()
    try:
        import datasets
    except ImportError:
        raise UserError(f"the package datasets is missing · {name} · pip install datasets") from None
    repo, *rest = name.removeprefix("hub:").split(":")
    config, split = (rest + [None])[:2] if len(rest) > 1 else (None, rest[0] if rest else "train")
    try:
        rows = datasets.load_dataset(repo, config, split=split)
    except Exception as error:      # datasets raises a wide family; its own first line says what is wrong
        raise UserError(f"datasets could not read it ({str(error).splitlines()[0]}) · {name} · "
                        "check the name, the split and the connection") from None
    for n, row in enumerate(rows):
        yield f"{name}[{n}]", row


def messages_of(value):
    """A CSV cell or JSON value → str or list of {role, content}."""
    if isinstance(value, str) and value.startswith('[{"'):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return value
    return list(value) if isinstance(value, (list, tuple)) else value


def turns_of_transcript(text):
    """An hh-rlhf transcript "\\n\\nHuman: … \\n\\nAssistant: …" → messages."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.lstrip())
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()}
            for who, said in zip(parts[1::2], parts[2::2])]


def split_common(chosen, rejected):
    """Implicit prompt: what both conversations begin with → (prompt, chosen, rejected), or None if it is not one turn."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if re.match(r"\s*Human:", chosen) and re.match(r"\s*Human:", rejected):
            return split_common(turns_of_transcript(chosen), turns_of_transcript(rejected))
        shared = len(os.path.commonprefix([chosen, rejected]))
        while 0 < shared and not chosen[shared - 1].isspace():      # back to the beginning of a word
            shared -= 1
        return chosen[:shared].strip(), chosen[shared:], rejected[shared:]
    shared = len(list(itertools.takewhile(lambda ab: ab[0] == ab[1], zip(chosen, rejected))))
    if len(chosen) == shared + 1 == len(rejected) and chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        return chosen[:shared], chosen[shared]["content"], rejected[shared]["content"]
    return None


class NoLayout(UserError):
    """The columns of a row are those of no layout."""


def pairs_of_row(row, label=None):
    """One row of any accepted layout → list of (prompt, chosen, rejected); a str says why there is none. Errors: NoLayout."""
    has = set(row)
    if {"question"} <= has and has & {"mc1_targets", "mc2_targets"}:            # TruthfulQA
        target = row.get("mc2_targets") or row["mc1_targets"]
        right = [c for c, ok in zip(target["choices"], target["labels"]) if ok]
        wrong = [c for c, ok in zip(target["choices"], target["labels"]) if not ok]
        return [(row["question"], r, wrong[i % len(wrong)]) for i, r in enumerate(right)] if wrong else "no wrong answer"
    if {"prompt", "response_0", "response_1"} <= has:                           # PKU-SafeRLHF
        if f"{label}_response_id" not in row:
            raise UserError("this layout holds two labels · columns safer_response_id, better_response_id · "
                            "pass --label safer or --label better")
        best = int(row[f"{label}_response_id"])
        return [(row["prompt"], row[f"response_{best}"], row[f"response_{1 - best}"])] if best in (0, 1) else "no label"
    if not {"chosen", "rejected"} <= has:
        raise NoLayout(f"columns not recognised: {', '.join(sorted(map(str, has)))}")
    prompt, chosen, rejected = (messages_of(row.get(name)) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):       # RM-Bench, RewardBench 2
        rejected = rejected if isinstance(rejected, list) else [rejected]
        both = zip(chosen, rejected) if len(chosen) == len(rejected) else itertools.product(chosen, rejected)
        return [(prompt, c, r) for c, r in both]
    talks = isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 2 and len(rejected) > 2
    lost = "prompt" in has and isinstance(chosen, str) and not re.match(r"\s*Human:", chosen)      # an empty cell, not TRL implicit
    if prompt in (None, "", []) and not lost or talks:          # TRL implicit, hh-rlhf, conversations that hold more than the prompt
        if type(chosen) is not type(rejected) or not chosen or not rejected:
            return "chosen and rejected are not both text or both messages"
        parts = split_common(chosen, rejected)
        return [parts] if parts else "the two conversations part before the last turn"
    sides = []
    for side in (chosen, rejected):
        if isinstance(side, list):              # messages: only the answer, or (UltraFeedback) the whole conversation
            if not side or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in side):
                return "messages without role and content"
            if side[-1].get("role") != "assistant" or len([m for m in side if m["role"] == "assistant"]) > 1:
                return "the answer is not one assistant turn"
            side = side[-1]["content"]
        sides.append(side)
    return [(prompt, *sides)]


def pairs_or_reason(row, label=None, first=None):
    """pairs_of_row of whatever a file may hold. first: where the row stands, if it is the first of its file: then a layout that is
    none is the file's, and an error."""
    try:
        return pairs_of_row(row, label) if isinstance(row, dict) else "not a JSON object"
    except NoLayout as error:
        if first:
            raise UserError(f"{error} · {first} · accepted: {ACCEPTED}") from None
        return str(error)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        return f"malformed ({type(error).__name__}: {error})"


def usable_pairs(tokenizer, row, label, max_length, first=None):
    """One row → (list of (prompt, chosen, rejected) that can be scored, list of reasons for those that cannot). first: as above."""
    found = pairs_or_reason(row, label, first)
    if isinstance(found, str):
        return [], [found]
    reasons = [problem_with(tokenizer, *pair, max_length) for pair in found]
    return [pair for pair, reason in zip(found, reasons) if not reason], [reason for reason in reasons if reason]


def problem_with(tokenizer, prompt, chosen, rejected, max_length):
    """Why a pair cannot be used → str, or None."""
    if not all(isinstance(x, str) and x.strip() for x in (chosen, rejected)):
        return "an empty or non-text response"
    if re.search("[\ud800-\udfff]", f"{prompt}{chosen}{rejected}"):
        return "half of a UTF-16 pair, which no tokenizer takes"
    if isinstance(prompt, list):
        if not is_conversation(prompt):
            return "prompt messages without role and content"
        if prompt[-1]["role"] == "assistant":
            return "the prompt ends with an assistant turn"
        if not all(m["content"].strip() for m in prompt if m["role"] == "assistant"):
            return "an empty assistant turn"
    elif not isinstance(prompt, str) or not prompt.strip():
        return "an empty or non-text prompt"
    try:
        if render(tokenizer, prompt, chosen, max_length).ids == render(tokenizer, prompt, rejected, max_length).ids:
            return "both sides are the same token sequence"
    except UserError as error:
        return str(error).partition(" · ")[0]
    except Exception as error:      # whatever a chat template says about this conversation
        if type(error).__module__.startswith("jinja2"):
            return f"refused by the chat template ({error})"
        raise
    return None


# ---------------------------------------------------------------- prompts and candidates, for stage 5

def is_prompt(value):
    """Is it a text, or messages with role and content?"""
    return is_conversation(value) if isinstance(value, list) else isinstance(value, str) and bool(value.strip())


def are_numbers(values, count):
    """Is it a list of so many numbers?"""
    return isinstance(values, list) and len(values) == count and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)


def read_prompts(path):
    """Prompts of a JSONL file, each once, in order."""
    found = {}
    for where, row in read_rows(path):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not is_prompt(prompt):
            raise UserError(f"no prompt in this row · {where} · rows need a prompt (text or messages)")
        found.setdefault(json.dumps(prompt), prompt)
    if not found:
        raise UserError(f"no prompts · {path} · rows need a prompt (text or messages)")
    return list(found.values())


def read_candidates(path):
    """Rows {prompt, candidates[, labels]} or {prompt, response[, id]} (grouped by prompt) → list of the former."""
    rows, grouped = [], {}
    for where, row in read_rows(path):
        if not isinstance(row, dict) or not is_prompt(row.get("prompt")) or not {"candidates", "response"} & set(row):
            raise UserError(f"not a row of candidates · {where} · needs prompt and candidates, or prompt and response")
        if "response" in row:
            new = {"prompt": row["prompt"], "candidates": [], "ids": []}
            group = grouped.setdefault(json.dumps(row["prompt"]), new)
            if group is new:
                rows.append(new)
            group["candidates"].append(row["response"])
            group["ids"].append(row.get("id"))
            row = group
        else:
            rows.append(dict(row))
        texts, labels = row["candidates"], row.get("labels")
        if not isinstance(texts, list) or not texts or not all(isinstance(c, str) for c in texts):
            raise UserError(f"candidates must be a list of texts, at least one · {where} · mend this row")
        if "labels" in row and not are_numbers(labels, len(texts)):
            raise UserError(f"labels must be numbers, one for each of the {len(texts)} candidates · {where} · mend this row")
    if not rows:
        raise UserError(f"no candidates · {path} · rows need prompt and candidates, or prompt and response")
    return rows
