"""Prompt and response → token ids, through the tokenizer's own chat template: the one path, for training and for scoring."""

import functools
import os
import re
from dataclasses import dataclass

from parts.files import UserError

PLAIN_TEMPLATE = ("{% for m in messages %}{% if loop.first %}{{ bos_token or '' }}{% endif %}"
                  "{{ m['role'] | capitalize }}: {{ m['content'] }}{{ (eos_token or '') if m['role'] == 'assistant' }}\n\n"
                  "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}")


@dataclass
class Text:
    """A rendered conversation: its token ids, the token range of the response, the end-of-turn mark."""
    ids: list
    first: int      # first token of the response
    last: int       # one past its last token
    eot: int        # the end-of-turn token

    def span(self, rule):
        """Token range [start, stop) that `rule` averages over."""
        return {"last": (len(self.ids) - 1, len(self.ids)), "eot": (self.eot, self.eot + 1),
                "content": (self.last - 1, self.last), "mean": (self.first, self.last)}[rule]


def chat_string(tokenizer, messages, **kwargs):
    """The chat template's text. A system turn that it refuses goes into the first user turn; the date is pinned."""
    from jinja2.exceptions import TemplateError
    template = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro +%}" + tokenizer.get_chat_template()
    options = dict(tokenize=False, chat_template=template, date_string="26 Jul 2024", **kwargs)
    folds = len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user"
    try:
        text = tokenizer.apply_chat_template(messages, **options)
        if not folds or messages[0]["content"].strip() in text:         # Mistral's loses it unless the last turn is the user's
            return text
    except TemplateError:
        if not folds:
            raise
    folded = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
    return tokenizer.apply_chat_template([folded, *messages[2:]], **options)


def takes_system_turn(tokenizer):
    """Does the chat template have a system turn, or does its text come in front of the first user turn?"""
    turn = lambda role, content: {"role": role, "content": content}
    whole = [turn("system", "Be brief."), turn("user", "b"), turn("assistant", "c")]
    return chat_string(tokenizer, whole) != chat_string(tokenizer, [turn("user", "Be brief.\n\nb"), whole[2]])


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """The tokenizer's control tokens → (pattern that finds them in a text, set of their ids)."""
    ids = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
    names = sorted((n for n in tokenizer.convert_ids_to_tokens(sorted(ids)) if n.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)"), ids


def is_conversation(messages):
    """Is this list one of messages with role and content, at least one?"""
    return bool(messages) and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)


def render(tokenizer, prompt, response, max_length=None):
    """Prompt (str or messages) + response → Text. The one path to token ids, for training and for scoring.

    Equal to apply_chat_template(messages, add_generation_prompt=False): the template alone adds BOS. A control token
    typed into a text gets a space after its first character, so that it does not act as one. Longer than max_length:
    whole turns of the prompt are cut from the left, then its words; never the response (then: UserError).
    """
    if not isinstance(response, str) or not (isinstance(prompt, str) or isinstance(prompt, (list, tuple)) and is_conversation(prompt)):
        raise TypeError("a prompt is a text or a list of {role, content}, a response is a text; these are "
                        f"{type(prompt).__name__} and {type(response).__name__}")
    pattern, _ = control_tokens(tokenizer)
    clean = lambda text: pattern.sub(lambda m: m[0][0] + " " + m[0][1:], text)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [{"role": clean(m["role"]), "content": clean(m["content"])} for m in turns]
    response = clean(response)
    while True:
        text = render_turns(tokenizer, turns, response)
        if not max_length or len(text.ids) <= max_length:
            return text
        turns = cut_prompt(tokenizer, turns, len(text.ids) - max_length)
        if turns is None:
            raise UserError(f"response longer than max length · {len(text.ids)} tokens, {max_length} allowed · shorten it, or run stage 1 "
                            "with a larger --max-length")


def render_turns(tokenizer, turns, response):
    """Messages + response → Text, with the place of the response found by rendering a marker in its stead."""
    marker = "\ue000"
    full = chat_string(tokenizer, [*turns, {"role": "assistant", "content": response}])
    before, _, after = chat_string(tokenizer, [*turns, {"role": "assistant", "content": marker}]).rpartition(marker)
    start = len(before) if full.startswith(before) else len(os.path.commonprefix([before, full]))
    stop = len(full) - len(after) if after and full.endswith(after) else len(full)
    enc = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = enc["input_ids"], enc["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
    if not inside:                                   # an empty response: read the token before it
        last = max(1, sum(1 for a, b in offsets if b <= start))
        first = last - 1
    _, special = control_tokens(tokenizer)
    eot = next((i for i in range(last, len(ids)) if ids[i] in special), len(ids) - 1)
    return Text(ids, first, last, eot)


def cut_prompt(tokenizer, turns, excess):
    """Drop the oldest exchange, or the first `excess` tokens of a lone prompt; None when nothing is left to cut."""
    head = turns[:1] if turns[0]["role"] == "system" else []
    rest = turns[len(head):]
    if not rest:
        return None
    if len(rest) > 2:
        return head + rest[2:]
    if len(rest) == 2:
        return head + rest[1:] if rest[1]["role"] == "user" else None
    content = rest[0]["content"]
    offsets = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if excess >= len(offsets):
        return None
    content = content[max(1, offsets[excess][0]):]
    space = content.find(" ", 0, 30)                # begin with a whole word, where there is one
    return [*head, {**rest[0], "content": content[space + 1:] or content}]
