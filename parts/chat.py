"""Prompt and response → token ids, through the tokenizer's own chat template.

The one path, for training and for scoring:

    what a file holds → messages {role, content, …} → the template's text → Text: ids and places
"""

import ast
import functools
import json
import os
import re
import tempfile
from dataclasses import dataclass

import numpy as np

from parts.files import UserError

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token or '' }}{% endif %}"
    "{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{{ (eos_token or '') if m['role'] == 'assistant' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}")
TODAY = "26 Jul 2024"   # for templates that print a date: a text has to give the same ids tomorrow


class Unreadable(UserError):
    """Why a text cannot be read as it is meant: nothing that the model should see may be lost."""


@dataclass
class Text:
    """A rendered conversation."""
    ids: list           # token ids of the whole
    first: int          # first token of the response
    last: int           # one past its last token
    eot: int            # the end-of-turn token
    notes: tuple = ()   # what is not read as it was written, sentences


# ---------------------------------------------------------------- what files hold → messages

ROLES = {"human": "user", "prompter": "user", "instruction": "user", "gpt": "assistant",
         "bot": "assistant", "model": "assistant", "ai": "assistant", "chatgpt": "assistant",
         "response": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
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
    raise Unreadable("looks like a list of messages but is neither JSON nor Python")


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
    fields = {name: value for name, value in raw.items()
              if name not in names and value not in (None, "", [], {})}
    if not isinstance(role, str):
        raise Unreadable("messages without role and content")
    if content is None and ("tool_calls" in fields or "function_call" in fields):
        content = ""                    # a call needs no words
    role = ROLES.get(role.strip().lower(), role)
    return {"role": role, "content": text_of_parts(content), **fields}


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


def with_last_turn(prompt, response):
    """A prompt and a response of one or more messages → (prompt with the first of them, last text).

    An agent's answer stands behind its calls and what the tools said. Errors: Unreadable.
    """
    before, answer = context_and_answer(messages_of(response))
    if before:
        prompt = messages_of(prompt)
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


# a speaker's name and a colon, as in "Human: …" or "### Assistant: …"
SPEAKER = rf"(?:#+[ ]*)?({'|'.join(ROLES)})[ ]*:"


def turns_of_transcript(text):
    """A dialogue written as one text → messages, or None where it is none.

    It begins with a speaker's name, and both sides speak. hh-rlhf writes

        \\n\\nHuman: Is water wet?\\n\\nAssistant: Yes, it is.

    Others write a speaker a line, or all in one line: names count only behind the widest gap that
    shows both sides, so that "Assistant:" within an answer is a part of it.
    """
    text = text.replace("\r\n", "\n").strip()
    if not re.match(SPEAKER, text, re.IGNORECASE):
        return None
    for gap in (r"\n[ ]*\n\s*", r"\n\s*", r"\s+"):
        _, *parts = re.split(rf"(?:^|{gap}){SPEAKER}", text, flags=re.IGNORECASE)
        turns = [{"role": ROLES[name.lower()], "content": said.strip()}
                 for name, said in zip(parts[0::2], parts[1::2])]
        if {"user", "assistant"} <= {turn["role"] for turn in turns}:
            return turns
    return None


# ---------------------------------------------------------------- one conversation → token ids

def render(tokenizer, prompt, response, max_length=None):
    """Prompt (str or messages) + response → Text. The one path to token ids.

    Equal to apply_chat_template(messages, add_generation_prompt=False): the template alone adds
    BOS. Control tokens typed into a text do not act as such. Longer than max_length: whole turns of
    the prompt are cut from the left, then its words, and a note says so; never the response.
    Errors: Unreadable, where the model would not see all of it.
    """
    check_prompt(prompt)
    check_text(response, "response")
    written = [*as_turns(prompt), {"role": "assistant", "content": response}]
    conversation = clean_turns(tokenizer, written)
    check_rendering(tokenizer, conversation)
    *turns, answer = conversation
    notes = set()
    if conversation != written:
        notes.add("control tokens typed into a text are split, so that they do not act")
    while True:
        text = render_turns(tokenizer, turns, answer["content"])
        excess = len(text.ids) - max_length if max_length else 0
        if excess <= 0:
            text.notes = (*text.notes, *sorted(notes))
            return text
        notes.add("the prompt loses its beginning: longer than --max-length")
        turns = cut_prompt(tokenizer, turns, excess)
        if turns is None:
            raise Unreadable("response longer than max length · "
                             f"{len(text.ids)} tokens, {max_length} allowed · "
                             "shorten it, or run stage 1 with a larger --max-length")


def prompt_ids(tokenizer, prompt):
    """A prompt (str or messages) with the generation prompt → token ids, to sample an answer."""
    check_prompt(prompt)
    turns = clean_turns(tokenizer, as_turns(prompt))
    check_rendering(tokenizer, [*turns, {"role": "assistant", "content": "a"}])
    text = chat_string(tokenizer, turns, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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


def clean_turns(tokenizer, turns):
    """Messages {role, content, …} → the same without control tokens."""
    def clean(value):
        if isinstance(value, str):
            return without_control_tokens(tokenizer, value)
        if isinstance(value, dict):
            return {name: clean(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return value
    return [clean(turn) for turn in turns]


def render_turns(tokenizer, turns, response):
    """Messages + response → Text."""
    full = chat_string(tokenizer, [*turns, {"role": "assistant", "content": response}])
    start, stop = place_of_response(tokenizer, turns, full)
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    offsets = encoded["offset_mapping"]             # (first character, one past the last) a token

    inside = [n for n, (begin, end) in enumerate(offsets) if begin < stop and end > start]
    if inside:
        first, last = inside[0], inside[-1] + 1
    else:                                           # an empty response: read the token before it
        last = max(1, sum(end <= start for _, end in offsets))
        first = last - 1

    _, control_ids = control_tokens(tokenizer)
    behind = [n for n in range(last, len(ids)) if ids[n] in control_ids]
    eot = behind[0] if behind else len(ids) - 1
    notes = ()
    if not all(text.strip() in full for text in [response, *(turn["content"] for turn in turns)]):
        notes = ("the chat template changes a text, for example cuts thoughts out of it",)
    return Text(ids, first, last, eot, notes)


def place_of_response(tokenizer, turns, full):
    """The characters [start, stop) of `full` that are the response.

    A template may change the text, trim it for example, so it is not searched for. Another
    conversation is rendered, whose answer is a character that occurs nowhere else; what stands
    around it stands around the response too:

        full     <|im_start|>assistant\\nThe sky is blue.<|im_end|>\\n
        other    <|im_start|>assistant\\n\\ue000<|im_end|>\\n        \\ue000: a private character
    """
    stand_in = "\ue000"
    other = chat_string(tokenizer, [*turns, {"role": "assistant", "content": stand_in}])
    before, _, after = other.rpartition(stand_in)
    start = len(os.path.commonprefix([before, full]))
    stop = len(full) - len(after) if full.endswith(after) else len(full)
    return start, stop


def cut_prompt(tokenizer, turns, excess):
    """Drop all up to the next user turn, or the first `excess` tokens of a lone one → turns.

    None where nothing is left to cut.
    """
    system = turns[:1] if turns[0]["role"] == "system" else []
    rest = turns[len(system):]
    later_users = [n for n, turn in enumerate(rest) if n and turn["role"] == "user"]
    if later_users:
        return system + rest[later_users[0]:]
    if len(rest) != 1:
        return None

    content = rest[0]["content"]
    encoded = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    if excess >= len(offsets):
        return None
    content = content[max(1, offsets[excess][0]):]
    space = content.find(" ", 0, 30)                # begin with a whole word, where there is one
    return [*system, {**rest[0], "content": content[space + 1:] or content}]


# ---------------------------------------------------------------- is all of it rendered

def check_rendering(tokenizer, turns):
    """Refuse turns and fields of turns that the chat template does not print. Errors: Unreadable.
    """
    role = lost_role(tokenizer, tuple(turn["role"] for turn in turns))
    if role:
        raise Unreadable(f"the chat template does not render a turn of role {role} at this place")
    for n, turn in enumerate(turns):
        for name in turn.keys() - {"role", "content"}:
            without = {key: value for key, value in turn.items() if key != name}
            if chat_string(tokenizer, turns) == string_or_none(
                    tokenizer, [*turns[:n], without, *turns[n + 1:]]):
                raise Unreadable(f"the chat template does not render {name} of a message")


def string_or_none(tokenizer, messages):
    """chat_string(), or None where the template refuses them."""
    try:
        return chat_string(tokenizer, messages)
    except Unreadable:
        return None


@functools.lru_cache(maxsize=4096)
def lost_role(tokenizer, roles):
    """The first of these roles whose turn leaves no trace in the rendered text, or None.

    Tried on turns that hold one private character each.
    """
    marks = [chr(0xE000 + n) for n in range(len(roles))]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
    text = string_or_none(tokenizer, turns)
    if text is None:                    # then the real one is refused too, in the template's words
        return None
    for role, mark in zip(roles, marks):
        if mark not in text:
            return role
    return None


# ---------------------------------------------------------------- the chat template

def chat_string(tokenizer, messages, **kwargs):
    """Messages → the text that the chat template makes of them; the date is pinned.

    A system turn that it refuses or loses goes into the first user turn. Errors: Unreadable.
    """
    can_fold = [message["role"] for message in messages[:2]] == ["system", "user"]
    try:
        text = apply_template(tokenizer, messages, **kwargs)
    except Unreadable:
        if not can_fold:
            raise
    else:
        # Mistral's template loses the system turn unless the last turn is the user's
        if not can_fold or messages[0]["content"].strip() in text:
            return text
    folded = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
    return apply_template(tokenizer, [folded, *messages[2:]], **kwargs)


def apply_template(tokenizer, messages, **kwargs):
    """tokenizer.apply_chat_template as text, on a fixed day."""
    from jinja2.exceptions import TemplateError
    pinned = "{% macro strftime_now(form) %}" + TODAY + "{% endmacro +%}"
    template = pinned + tokenizer.get_chat_template()
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template,
                                             date_string=TODAY, **kwargs)
    # a template is a program: it may refuse a conversation, or stumble over a field of it
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise Unreadable(f"refused by the chat template ({error})") from None


def takes_system_turn(tokenizer):
    """Does the chat template have a system turn? Else its text comes before the first user turn."""
    answer = {"role": "assistant", "content": "c"}
    apart = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}, answer]
    folded = [{"role": "user", "content": "Be brief.\n\nb"}, answer]
    return chat_string(tokenizer, apart) != chat_string(tokenizer, folded)


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """The tokenizer's control tokens → (pattern that finds them in a text, set of their ids)."""
    ids = set(tokenizer.all_special_ids)
    ids |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = [name for name in tokenizer.convert_ids_to_tokens(sorted(ids)) if name.strip()]
    names.sort(key=len, reverse=True)               # the longest first: one may begin with another
    pattern = "|".join(re.escape(name) for name in names) or "(?!)"
    return re.compile(pattern), ids


def without_control_tokens(tokenizer, text):
    """A control token typed into a text → with a space after its first character: it cannot act."""
    pattern, _ = control_tokens(tokenizer)
    return pattern.sub(lambda found: found[0][0] + " " + found[0][1:], text)


# ---------------------------------------------------------------- many rendered texts

class RenderedTexts:
    """Texts in order, written to a file without a name.

    So each is rendered once, and a million of them take no memory.
    """

    def __init__(self):
        self.file = tempfile.TemporaryFile()
        self.place = 0              # where the next text to read begins

    def extend(self, texts):
        """Append some texts."""
        self.file.seek(0, os.SEEK_END)
        for text in texts:
            record = np.array([len(text.ids), text.first, text.last, text.eot, *text.ids],
                              dtype=np.int32)
            self.file.write(record.tobytes())

    def take(self, count):
        """→ the next `count` texts, list of Text."""
        self.file.seek(self.place)
        texts = []
        for _ in range(count):
            length, first, last, eot = np.frombuffer(self.file.read(16), np.int32).tolist()
            ids = np.frombuffer(self.file.read(4 * length), np.int32).tolist()
            texts.append(Text(ids, first, last, eot))
        self.place = self.file.tell()
        return texts
