"""Prompt and response → token ids, through the tokenizer's own chat template.

The one path, for training and for scoring:

    what a file holds → messages {role, content, …} → the template's text → Text: ids and places
"""

import functools
import os
import re
import tempfile
from dataclasses import dataclass

import numpy as np

from parts.messages import Unreadable, as_turns, check_prompt, check_text

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token or '' }}{% endif %}"
    "{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{{ (eos_token or '') if m['role'] == 'assistant' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}")
TODAY = "26 Jul 2024"   # for templates that print a date: a text has to give the same ids tomorrow
PINNED = "{% macro strftime_now(form) %}" + TODAY + "{% endmacro +%}"       # before a template


@dataclass
class Text:
    """A rendered conversation."""
    ids: list           # token ids of the whole
    first: int          # first token of the response
    stop: int           # one past its last token
    eot: int            # the end-of-turn token
    notes: tuple = ()   # what is not read as it was written, sentences


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
    check_text(text, "prompt")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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
    check_text(full, "conversation")                                # its fields too
    begins, ends = place_of_response(tokenizer, turns, full)        # of characters
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    offsets = encoded["offset_mapping"]             # (first character, one past the last) a token

    inside = [n for n, (begin, end) in enumerate(offsets) if begin < ends and end > begins]
    if inside:
        first, stop = inside[0], inside[-1] + 1
    else:                                           # an empty response: read the token before it
        stop = max(1, sum(end <= begins for _, end in offsets))
        first = stop - 1

    _, control_ids = control_tokens(tokenizer)
    behind = [n for n in range(stop, len(ids)) if ids[n] in control_ids]
    eot = behind[0] if behind else len(ids) - 1
    notes = ()
    if not all(text.strip() in full for text in [response, *(turn["content"] for turn in turns)]):
        notes = ("the chat template changes a text, for example cuts thoughts out of it",)
    return Text(ids, first, stop, eot, notes)


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
    whole = None
    for n, turn in enumerate(turns):
        for name in turn.keys() - MAY_BE_LEFT_OUT:
            whole = whole or chat_string(tokenizer, turns)
            without = {key: value for key, value in turn.items() if key != name}
            if whole == string_or_none(tokenizer, [*turns[:n], without, *turns[n + 1:]]):
                raise Unreadable(f"the chat template does not render {name} of a message")


# every message has the first two; the last only tells which call a tool answers
MAY_BE_LEFT_OUT = {"role", "content", "tool_call_id"}


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
    template = PINNED + tokenizer.get_chat_template()
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
            record = np.array([len(text.ids), text.first, text.stop, text.eot, *text.ids],
                              dtype=np.int32)
            self.file.write(record.tobytes())

    def take(self, count):
        """→ the next `count` texts, list of Text."""
        self.file.seek(self.place)
        texts = []
        for _ in range(count):
            length, first, stop, eot = np.frombuffer(self.file.read(16), np.int32).tolist()
            ids = np.frombuffer(self.file.read(4 * length), np.int32).tolist()
            texts.append(Text(ids, first, stop, eot))
        self.place = self.file.tell()
        return texts
