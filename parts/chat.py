"""Prompt and response → token ids, through the tokenizer's own chat template.

The one path, for training and for scoring.
"""

import functools
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


@dataclass
class Text:
    """A rendered conversation."""
    ids: list       # token ids of the whole
    first: int      # first token of the response
    last: int       # one past its last token
    eot: int        # the end-of-turn token


# ---------------------------------------------------------------- one conversation → token ids

def render(tokenizer, prompt, response, max_length=None):
    """Prompt (str or messages) + response → Text. The one path to token ids.

    Equal to apply_chat_template(messages, add_generation_prompt=False): the template alone adds
    BOS. Control tokens typed into a text do not act as such. Longer than max_length: whole turns of
    the prompt are cut from the left, then its words; never the response (then: UserError).
    """
    is_list = isinstance(prompt, (list, tuple))
    is_prompt = is_conversation(prompt) if is_list else isinstance(prompt, str)
    if not is_prompt or not isinstance(response, str):
        raise TypeError("a prompt is a text or a list of {role, content}, a response is a text; "
                        f"these are {type(prompt).__name__} and {type(response).__name__}")
    turns = clean_turns(tokenizer, prompt)
    response = without_control_tokens(tokenizer, response)
    while True:
        text = render_turns(tokenizer, turns, response)
        excess = len(text.ids) - max_length if max_length else 0
        if excess <= 0:
            return text
        turns = cut_prompt(tokenizer, turns, excess)
        if turns is None:
            raise UserError("response longer than max length · "
                            f"{len(text.ids)} tokens, {max_length} allowed · "
                            "shorten it, or run stage 1 with a larger --max-length")


def prompt_ids(tokenizer, prompt):
    """A prompt (str or messages) with the generation prompt → token ids, to sample an answer."""
    text = chat_string(tokenizer, clean_turns(tokenizer, prompt), add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def clean_turns(tokenizer, prompt):
    """A prompt → its turns, {role, content}, without control tokens."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = []
    for turn in prompt:
        role = without_control_tokens(tokenizer, turn["role"])
        turns.append({"role": role, "content": without_control_tokens(tokenizer, turn["content"])})
    return turns


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
    return Text(ids, first, last, eot)


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
    """Drop the oldest exchange, or the first `excess` tokens of a lone prompt → turns.

    None where nothing is left to cut.
    """
    system = turns[:1] if turns[0]["role"] == "system" else []
    rest = turns[len(system):]
    if not rest:
        return None
    if len(rest) > 2:
        return system + rest[2:]
    if len(rest) == 2:
        return system + rest[1:] if rest[1]["role"] == "user" else None

    content = rest[0]["content"]
    encoded = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    if excess >= len(offsets):
        return None
    content = content[max(1, offsets[excess][0]):]
    space = content.find(" ", 0, 30)                # begin with a whole word, where there is one
    return [*system, {**rest[0], "content": content[space + 1:] or content}]


# ---------------------------------------------------------------- the chat template

def chat_string(tokenizer, messages, **kwargs):
    """Messages → the text that the chat template makes of them; the date is pinned.

    A system turn that it refuses or loses goes into the first user turn.
    """
    from jinja2.exceptions import TemplateError
    can_fold = [message["role"] for message in messages[:2]] == ["system", "user"]
    try:
        text = apply_template(tokenizer, messages, **kwargs)
    except TemplateError:
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
    pinned = "{% macro strftime_now(form) %}" + TODAY + "{% endmacro +%}"
    template = pinned + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template,
                                         date_string=TODAY, **kwargs)


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


def is_conversation(messages):
    """Is this list one of messages with role and content, at least one?"""
    def is_message(message):
        if not isinstance(message, dict):
            return False
        return isinstance(message.get("content"), str) and "role" in message
    return bool(messages) and all(is_message(message) for message in messages)


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
