"""Prompts to sample from and candidates to rank: the rows that stage 5 reads."""

import collections
import json
import math

from parts.files import UserError
from parts.messages import Unreadable, check_asks
from parts.rows import (
    SYSTEM,
    behind_context,
    check_row,
    notes_on_columns,
    prompt_of_row,
    read_rows,
    tell_notes,
)

# columns of a row of candidates that hold something for each of them
EACH = ("candidates", "labels", "ids", "scores", "outside", "reasons")


def are_numbers(values, count):
    """Is it a list of so many finite numbers?"""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in values)


def prompt_to_answer(row):
    """The prompt of a row: a text or messages, behind its system turn and history.

    Errors: Unreadable.
    """
    check_row(row)
    prompt = prompt_of_row(row)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise Unreadable("no prompt in this row")
    prompt = behind_context(row, prompt)
    check_asks(prompt)
    return prompt


def read_prompts(path, check=check_asks):
    """Prompts of a file, each once, in order → (prompts, {where: why a row has none}).

    check: raises Unreadable for what cannot be answered.
    """
    found = {}
    reasons = {}
    notes = collections.Counter()
    for where, row in read_rows(path):
        try:
            prompt = prompt_to_answer(row)
            check(prompt)
            found.setdefault(json.dumps(prompt), prompt)
            notes.update(notes_on_columns(row))
        except Unreadable as reason:
            reasons[where] = str(reason)
    if not found:
        where, reason = next(iter(reasons.items()), (path, "no prompts"))
        raise UserError(f"{reason} · {where} · rows need a prompt (text or messages)")
    tell_notes(notes, "rows")
    return list(found.values()), reasons


def read_candidates(path):
    """Rows {prompt, candidates[, labels]} or {prompt, response[, id, labels]} → list of the former.

    One prompt in several rows is one prompt. A row whose prompt cannot be read keeps it as it is,
    and says in `unreadable` why its candidates get no score.
    """
    rows = {}                                   # by prompt
    notes = collections.Counter()
    for where, raw in read_rows(path):
        row = with_lists(raw, where)
        try:
            row["prompt"] = prompt_to_answer(raw)
            notes.update(notes_on_columns(raw))
            for name in ("history", *SYSTEM):   # they are in the prompt now
                row.pop(name, None)
        except Unreadable as reason:
            if row.get("prompt") is None:
                raise UserError(f"{reason} · {where} · rows need a prompt") from None
            row["unreadable"] = str(reason)
        key = json.dumps(row["prompt"])
        rows[key] = joined(rows[key], row, where) if key in rows else row
    if not rows:
        raise UserError(f"no candidates · {path} · "
                        "rows need prompt and candidates, or prompt and response")
    tell_notes(notes, "rows")
    return list(rows.values())


def with_lists(raw, where):
    """A row with one response, or with candidates → {candidates: […], labels: […], …}, checked."""
    row = dict(raw) if isinstance(raw, dict) else {}
    if "response" in row and "candidates" not in row:
        row["candidates"] = [row.pop("response")]
        row["ids"] = [row.pop("id", None)]
        if "labels" in row and not isinstance(row["labels"], list):
            row["labels"] = [row["labels"]]
    if "labels" in row and isinstance(row["labels"], list):
        row["labels"] = [number_of(label) for label in row["labels"]]
    texts = row.get("candidates")
    if not isinstance(texts, list) or not texts:
        raise UserError("not a row of candidates · "
                        f"{where} · needs prompt and candidates, at least one, or prompt and "
                        "response")
    if "labels" in row and not are_numbers(row["labels"], len(texts)):
        raise UserError(f"labels must be numbers, one for each of the {len(texts)} candidates · "
                        f"{where} · mend this row")
    return row


def number_of(label):
    """A label of a table, where numbers are texts too → a number, or what it is."""
    try:
        return float(label) if isinstance(label, str) else label
    except ValueError:
        return label


def joined(row, more, where):
    """Two rows of one prompt → one. What only one of them has for its candidates is left out."""
    if ("labels" in row) != ("labels" in more):
        raise UserError(f"labels for some of a prompt's candidates only · {where} · "
                        "add the others, or leave them all out")
    if row.get("reward") != more.get("reward"):         # scores of different heads
        row = {name: value for name, value in row.items() if name != "scores"}
    both = {name: [*row[name], *more[name]] for name in EACH if name in row and name in more}
    rest = {name: value for name, value in row.items() if name not in EACH}
    return {**rest, **both}
