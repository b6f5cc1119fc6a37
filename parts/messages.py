"""What files and callers hold → messages {role, content, …}, the form that chat templates take.

    messages_of('[{"from": "human", "value": "Is it wet?"}]')
    turns_of_transcript("Human: Is it wet? Assistant: Yes.")[:1]

both give [{role: user, content: Is it wet?}].
"""

import ast
import json
import re

from parts.files import UserError


class Unreadable(UserError):
    """Why a text cannot be read as it is meant: nothing that the model should see may be lost."""

    @property
    def reason(self):
        """What is wrong, without where and what to do."""
        return str(self).partition(" · ")[0]


# ---------------------------------------------------------------- one form for messages

ROLES = {"human": "user", "prompter": "user", "user": "user", "gpt": "assistant",
         "bot": "assistant", "model": "assistant", "ai": "assistant", "chatgpt": "assistant",
         "assistant": "assistant", "system": "system", "function": "tool", "observation": "tool"}
# fields of a message that no model reads; any other has to stand in what the template prints
NOT_READ = {"id", "message_id", "parent_id", "index", "timestamp", "date", "created_at", "language",
            "lang", "model", "weight", "train", "loss", "score", "rating", "type"}


def messages_of(value):
    """What a cell or a JSON value holds → a text, or a list of messages {role, content, …}.

    Read: messages or one alone, role and content or from and value, {role: […], content: […]}, and
    all of this written down as JSON or as Python prints it. Other lists and None stay as they are.
    Errors: Unreadable.
    """
    if isinstance(value, str):
        value = decoded(value)
    if isinstance(value, dict):
        value = messages_of_columns(value)
    if isinstance(value, (list, tuple)):
        value = list(value)
        if any(isinstance(item, dict) for item in value):
            value = [message_of(item) for item in value]
    return value


def decoded(text):
    """A text that is a written-down list of messages → that list; any other → the text."""
    # '[{"role": "user", …' and 'array([{…' begin so, and name both keys
    begins = re.match(r"""\s*(array\()?[\[({]\s*[\[({]?\s*(?=["'])""", text)
    keys = [re.search(rf"""["']({names})["']\s*:""", text)
            for names in ("role|from", "content|value")]
    if not begins or None in keys:
        return text
    for decode in (json.loads, ast.literal_eval):
        try:
            return decode(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    if begins_with_json(text):                  # and goes on with words: a text about messages
        return text
    raise Unreadable("looks like a list of messages but is neither JSON nor Python")


def begins_with_json(text):
    """Is the first part of a text whole JSON?"""
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def messages_of_columns(table):
    """{role: [a, b], content: [c, d]} → [{role: a, content: c}, …]; one message → [it]."""
    if not all(isinstance(column, (list, tuple)) for column in table.values()):
        return [table]
    if len({len(column) for column in table.values()}) != 1:
        raise Unreadable("lists of roles and contents of different lengths")
    return [dict(zip(table, cells)) for cells in zip(*table.values())]


def message_of(raw):
    """One message as it stands in a file → {role, content, other fields that are not empty}."""
    if not isinstance(raw, dict):
        raise Unreadable("messages without role and content")
    role = raw.get("role", raw.get("from"))
    content = raw.get("content", raw.get("value"))
    names = {"role", "from", "content", "value"} | NOT_READ
    fields = {name: without_none(value) for name, value in raw.items() if name not in names}
    fields = {name: value for name, value in fields.items() if value not in (None, "", [], {})}
    if not isinstance(role, str):
        raise Unreadable("messages without role and content")
    if content is None and ("tool_calls" in fields or "function_call" in fields):
        content = ""                    # a call needs no words
    role = ROLES.get(role.strip().lower(), role)
    return {"role": role, "content": text_of_parts(content), **fields}


def without_none(value):
    """A field without the None that tables fill in for what another row has."""
    if isinstance(value, dict):
        return {name: without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


def text_of_parts(content):
    """The content of a message: a text, or parts [{type: text, text}] → text."""
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise Unreadable("messages without role and content")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(text, str):
            raise Unreadable(f"a part of type {kind} in a message: only text is read")
        texts.append(text)
    return "\n".join(texts)


# ---------------------------------------------------------------- dialogues written as one text

# a speaker's name and a colon, as in "Human: …" or "### Assistant: …"
SPEAKERS = {"human": "user", "user": "user", "prompter": "user", "system": "system",
            "assistant": "assistant", "bot": "assistant", "ai": "assistant", "gpt": "assistant",
            "chatgpt": "assistant"}
SPEAKER = rf"(?:#+[ ]*)?({'|'.join(SPEAKERS)})[ ]*:"


def turns_of_transcript(text):
    """A dialogue written as one text → messages, or None where it is none.

    It begins with a speaker's name, and both sides speak. hh-rlhf writes

        \\n\\nHuman: Is water wet?\\n\\nAssistant: Yes, it is.

    Others write a speaker a line, or all in one line: names count only behind the widest gap that
    shows both sides, so that "Assistant:" within an answer is a part of it. "### Human:" needs no
    gap.
    """
    text = text.replace("\r\n", "\n").strip()
    if not re.match(SPEAKER, text, re.IGNORECASE):
        return None
    gaps = [r"\n[ ]*\n\s*", r"\n\s*", r"\s+"]
    if text.startswith("#"):
        gaps = [r"\s*(?=#)"]
    for gap in gaps:
        _, *parts = re.split(rf"(?:^|{gap}){SPEAKER}", text, flags=re.IGNORECASE)
        turns = [{"role": SPEAKERS[name.lower()], "content": said.strip()}     # name, said, name …
                 for name, said in zip(parts[0::2], parts[1::2])]
        speak = {turn["role"] for turn in turns}
        if {"user", "assistant"} <= speak and turns[0]["role"] != "assistant":
            return turns
    return None


def read_prompt(value):
    """What stands where a prompt is expected → a text or messages, in files and in calls alike.

    A dialogue written as one text becomes messages; the assistant's name at its end goes.
    """
    prompt = messages_of(value)
    if isinstance(prompt, str):
        turns = turns_of_transcript(prompt) or []
        if turns and turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
        if turns and turns[-1]["role"] == "user":
            return turns
    return prompt


# ---------------------------------------------------------------- prompt and answer

def with_last_turn(prompt, response):
    """A prompt and a response of one or more messages → (prompt with the first of them, last text).

    An agent's answer stands behind its calls and what the tools said. Errors: Unreadable.
    """
    if isinstance(response, str):               # a text stays one, also if it looks like messages
        return prompt, response
    before, answer = context_and_answer(messages_of(response))
    if before:
        prompt = read_prompt(prompt)
        check_prompt(prompt)
        prompt = [*as_turns(prompt), *before]
    return prompt, answer


def as_turns(prompt):
    """A prompt, text or messages → messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def context_and_answer(side):
    """A text, or messages that end with an answer → (messages before it, its text)."""
    if not isinstance(side, list):
        return [], side
    if not is_conversation(side):
        raise Unreadable("messages without role and content")
    *before, last = side
    if last["role"] != "assistant":
        raise Unreadable("the answer is not an assistant turn")
    for name in last.keys() - {"role", "content"}:
        raise Unreadable(f"the answer has {name}, which is not read: only its text is scored")
    return before, last["content"]


def is_conversation(messages):
    """Is this list one of messages with role and content, at least one?"""
    def is_message(message):
        if not isinstance(message, dict):
            return False
        return isinstance(message.get("content"), str) and isinstance(message.get("role"), str)
    return bool(messages) and all(is_message(message) for message in messages)


def check_prompt(prompt):
    """Refuse what is neither a text nor messages. Errors: Unreadable."""
    if not isinstance(prompt, (list, tuple)):
        check_text(prompt, "prompt")
    elif not is_conversation(prompt):
        raise Unreadable("prompt messages without role and content")
    else:
        for turn in prompt:
            check_text(turn["content"], "prompt")


def check_text(text, what):
    """Refuse what no tokenizer takes. Errors: Unreadable."""
    if not isinstance(text, str):
        raise Unreadable(f"the {what} is no text but {type(text).__name__}")
    if re.search("[\ud800-\udfff]", text):
        raise Unreadable(f"half of a UTF-16 pair in the {what}, which no tokenizer takes")


def check_asks(prompt):
    """Refuse a prompt that asks for no answer. Errors: Unreadable."""
    check_prompt(prompt)
    turns = as_turns(prompt)
    if turns[-1]["role"] == "assistant":
        raise Unreadable("the prompt ends with an assistant turn")
    if not turns[-1]["content"].strip():
        raise Unreadable("an empty or non-text prompt")
    for turn in turns:
        is_call = turn.keys() - {"role", "content"}
        if turn["role"] == "assistant" and not turn["content"].strip() and not is_call:
            raise Unreadable("an empty assistant turn")
