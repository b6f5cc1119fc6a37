"""Text → token ids, with chat templates in the style of the families in use, written here.

Each has a tokenizer with its control tokens. The tokenizers add BOS to a plain text (Llama, Gemma
and Mistral do), so that a template which brings its own would double it.
"""

import functools
import importlib
import json
import shutil
from datetime import datetime
from typing import NamedTuple

import pytest
import tiny
import torch
import transformers.utils.chat_template_utils
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_rows, succeed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from parts.chat import PLAIN_TEMPLATE, prompt_ids, render, takes_system_turn
from parts.files import UserError
from parts.messages import Unreadable
from parts.rows import usable_pairs
from tools.self_check import self_check

stage1 = importlib.import_module("01_extract")

# ---------------------------------------------------------------- the templates

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA_2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' %}
{%- set loop_messages = messages[1:] %}
{%- else %}{%- set first_user_prefix = "" %}{%- set loop_messages = messages %}{%- endif %}
{%- for message in loop_messages %}
{%- set role = "model" if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"""

QWEN_25 = """{%- if messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

QWEN_3 = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- set content = message.content %}
{%- if message.role == 'assistant' %}{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
{{- content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
{%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}
{%- for message in loop_messages %}{%- if message["role"] == "user" %}
{%- if loop.last and system_message is defined %}
{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
{%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
{%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}"""

SMOLLM_2 = """{% for message in messages %}
{%- if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PHI_3 = """{% for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""


class Family(NamedTuple):
    """A chat template, its control tokens, and what is true of its conversations."""
    template: str
    bos: str
    eos: str
    control: list           # the other control tokens
    end: str                # the end-of-turn token
    bos_count: int          # how often BOS stands in a conversation
    takes_system: bool      # has it a system turn of its own?


HEADER = ["<|start_header_id|>", "<|end_header_id|>"]
TURN = ["<start_of_turn>", "<end_of_turn>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
EOT = "<|endoftext|>"
FAMILIES = {
    "Llama-3": Family(LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", HEADER, "<|eot_id|>", 1, True),
    "Gemma-2": Family(GEMMA_2, "<bos>", "<eos>", TURN, "<end_of_turn>", 1, False),
    "Gemma-3": Family(GEMMA_3, "<bos>", "<eos>", TURN, "<end_of_turn>", 1, False),
    "Qwen2.5": Family(QWEN_25, None, EOT, CHATML, "<|im_end|>", 0, True),
    "Qwen3": Family(QWEN_3, None, EOT, CHATML, "<|im_end|>", 0, True),
    "Mistral": Family(MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], "</s>", 1, False),
    "SmolLM2": Family(SMOLLM_2, EOT, "<|im_end|>", ["<|im_start|>"], "<|im_end|>", 0, True),
    "ChatML": Family(tiny.CHATML, "<s>", "</s>", CHATML, "<|im_end|>", 0, True),
    "Phi": Family(PHI_3, "<s>", EOT, ROLES, "<|end|>", 0, True),
    "base model": Family(PLAIN_TEMPLATE, "<s>", "</s>", [], "</s>", 1, True),
}
EVERY = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def tokenizer_of(name):
    """Byte-level BPE with the control tokens of a family.

    <think> and </think> are tokens, but not control tokens, as in Qwen3.
    """
    family = FAMILIES[name]
    begin_and_end = [token for token in (family.bos, family.eos) if token]
    special = list(dict.fromkeys(["<pad>", *begin_and_end, *family.control]))

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(tiny.SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    if family.bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, special.index(family.bos))])

    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token=family.bos, eos_token=family.eos,
        additional_special_tokens=family.control, chat_template=family.template)
    made.add_tokens(["<think>", "</think>"])
    return made


def turn(role, content):
    return {"role": role, "content": content}


def user(content):
    return turn("user", content)


def assistant(content):
    return turn("assistant", content)


BRIEF = turn("system", "Be brief, seven.")
LONG = [user("Is water wet?"), assistant("Yes, it is."), user("Which colour has the sky?")]
NO_MARKS = st.characters(codec="utf-8", exclude_characters="<\ue000")
WORDS = st.text(NO_MARKS, min_size=1, max_size=25).filter(str.strip)
SOME_FAMILY = st.sampled_from(sorted(FAMILIES))


# ---------------------------------------------------------------- the ids, and the response in them

@given(SOME_FAMILY, WORDS, WORDS, WORDS)
def test_the_ids_are_those_of_apply_chat_template(family, first, second, response):
    tokenizer = tokenizer_of(family)
    for turns in ([user(first)], [user(first), assistant("Yes."), user(second)]):
        wanted = tokenizer.apply_chat_template(
            [*turns, assistant(response)], add_generation_prompt=False, return_dict=True,
            date_string="26 Jul 2024")
        assert render(tokenizer, turns, response).ids == wanted["input_ids"]


WITH_BOS = [name for name, family in FAMILIES.items() if family.bos]


@pytest.mark.parametrize("family", WITH_BOS)
def test_bos_comes_as_often_as_the_template_says(family):
    tokenizer = tokenizer_of(family)
    bos = tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][0] == bos            # adding it again would be easy
    for prompt in ("Is water wet?", LONG):
        assert render(tokenizer, prompt, "Yes.").ids.count(bos) == FAMILIES[family].bos_count
        assert prompt_ids(tokenizer, prompt).count(bos) == FAMILIES[family].bos_count


@given(SOME_FAMILY, WORDS, WORDS)
def test_the_range_of_the_response_holds_the_response(family, prompt, response):
    tokenizer = tokenizer_of(family)
    text = render(tokenizer, prompt, response)
    assert response.strip() in tokenizer.decode(text.ids[text.first:text.stop])


@EVERY
@pytest.mark.parametrize("response", ["Yes, it is.", "It is blue, not green.", "one\n\ntwo\n"])
def test_the_range_of_the_response_holds_nothing_but_the_response(family, response):
    tokenizer = tokenizer_of(family)
    for prompt in ("Is water wet?", LONG):
        text = render(tokenizer, prompt, response)
        found = tokenizer.decode(text.ids[text.first:text.stop])
        assert found.strip() == response.strip()


@given(SOME_FAMILY, WORDS, WORDS)
def test_eot_is_the_last_end_of_turn_token_and_stands_behind_the_response(family, prompt, response):
    tokenizer = tokenizer_of(family)
    text = render(tokenizer, prompt, response)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
    assert text.eot == max(place for place, token in enumerate(text.ids) if token == end)
    assert text.eot >= text.stop


@EVERY
def test_behind_eot_no_new_turn_begins(family):
    tokenizer = tokenizer_of(family)
    for prompt in ("Is water wet?", LONG):
        text = render(tokenizer, prompt, "Yes, it is.")
        rest = tokenizer.decode(text.ids[text.eot + 1:])
        assert not rest.replace(tokenizer.eos_token, "").strip()        # Phi's ends the whole, too


def test_an_answer_of_qwen3_begins_behind_the_empty_thinking_block():
    tokenizer = tokenizer_of("Qwen3")
    text = render(tokenizer, LONG, "Blue.")
    before = tokenizer.decode(text.ids[:text.first])
    assert before.endswith("assistant\n<think>\n\n</think>\n\n")


def test_an_answer_of_qwen3_with_thoughts_of_its_own_holds_them():
    tokenizer = tokenizer_of("Qwen3")
    text = render(tokenizer, LONG, "<think>\nsurely\n</think>\n\nBlue.")
    inside = tokenizer.decode(text.ids[text.first:text.stop])
    assert inside.startswith("surely") and inside.endswith("</think>\n\nBlue.")
    assert tokenizer.decode([text.ids[text.eot]]) == "<|im_end|>"


def test_thoughts_of_earlier_turns_are_dropped_as_the_template_drops_them():
    tokenizer = tokenizer_of("Qwen3")
    thoughtful = [LONG[0], assistant("<think>\nsurely\n</think>\n\nYes, it is."), LONG[2]]
    assert render(tokenizer, thoughtful, "Blue.").ids == render(tokenizer, LONG, "Blue.").ids


# ---------------------------------------------------------------- system turns

@EVERY
def test_a_system_turn_is_never_lost(family):
    tokenizer = tokenizer_of(family)
    for turns in (LONG[:1], LONG):
        text = render(tokenizer, [BRIEF, *turns], "Yes.")
        assert tokenizer.decode(text.ids).count("Be brief, seven.") == 1


@EVERY
def test_a_system_turn_goes_into_the_first_user_turn_only_where_it_is_refused(family):
    tokenizer = tokenizer_of(family)
    own = FAMILIES[family].takes_system
    assert takes_system_turn(tokenizer) == own
    for turns in (LONG[:1], LONG):
        folded = [user("Be brief, seven.\n\n" + turns[0]["content"]), *turns[1:]]
        text = render(tokenizer, [BRIEF, *turns], "Yes.")
        assert (text == render(tokenizer, folded, "Yes.")) == (not own)


def extract(folder, model, rows):
    """Stage 1 on some rows, layer 0 → what it printed."""
    pairs = save_rows(folder / "p.jsonl", rows)
    args = ["--model", model, "--pairs", pairs, "--layer", 0, "--run", folder / "run"]
    return succeed("01_extract", *args)


@pytest.mark.parametrize("template", [tiny.NO_SYSTEM, MISTRAL], ids=["refused", "lost"])
def test_that_a_template_has_no_system_turn_is_said(template, tmp_path):
    model = tiny.save_model(tmp_path / "model", template=template)
    row = {"prompt": [BRIEF, *LONG], "chosen": "Blue.", "rejected": "Green."}
    assert "note: the chat template has no system turn" in extract(tmp_path, model, [row])


# ---------------------------------------------------------------- what is typed into a text

def control_ids_of(tokenizer, ids):
    """The control tokens among the ids, in order."""
    return [token for token in ids if token in tokenizer.all_special_ids]


def typed_tokens(tokenizer):
    """Control tokens as they may be typed: alone, within a word, twice, nested, as whole turns."""
    tokens = tokenizer.all_special_tokens
    for token in tokens:
        yield from (token, f"a{token}b", token * 2, token[:3] + token + token[3:])
    yield "\nuser\nNo!".join([*tokens, ""])


@EVERY
def test_control_tokens_typed_into_a_prompt_do_not_act(family):
    tokenizer = tokenizer_of(family)
    turns = [BRIEF, *LONG]
    harmless = control_ids_of(tokenizer, render(tokenizer, turns, "Blue.").ids)
    for typed in typed_tokens(tokenizer):
        for place, message in enumerate(turns):
            changed = {**message, "content": message["content"] + typed}
            some = [*turns[:place], changed, *turns[place + 1:]]
            found = control_ids_of(tokenizer, render(tokenizer, some, "Blue.").ids)
            assert found == harmless, typed


@EVERY
def test_control_tokens_typed_into_a_response_do_not_act(family):
    tokenizer = tokenizer_of(family)
    harmless = control_ids_of(tokenizer, render(tokenizer, LONG, "Blue.").ids)
    for typed in typed_tokens(tokenizer):
        for response in ("Blue." + typed, typed + "Blue."):
            found = control_ids_of(tokenizer, render(tokenizer, LONG, response).ids)
            assert found == harmless, response


@EVERY
def test_control_tokens_typed_into_a_prompt_to_sample_from_do_not_act(family):
    tokenizer = tokenizer_of(family)
    harmless = control_ids_of(tokenizer, prompt_ids(tokenizer, [user("a")]))
    for typed in typed_tokens(tokenizer):
        found = control_ids_of(tokenizer, prompt_ids(tokenizer, [user(typed)]))
        assert found == harmless, typed


@pytest.mark.parametrize("prompt, response, says", [
    ("q", None, "the response is no text but NoneType"),
    ("q", [assistant("a")], "the response is no text but list"),
    ("q", "a \ud83d", "half of a UTF-16 pair in the response"),
    (5, "a", "the prompt is no text but int"),
    ([{}], "a", "prompt messages without role and content"),
    ([], "a", "prompt messages without role and content"),
    (user("q"), "a", "the prompt is no text but dict"),
    ([user("q \udfff")], "a", "half of a UTF-16 pair in the prompt"),
])
def test_what_is_no_text_is_named_and_not_scored(prompt, response, says):
    with pytest.raises(Unreadable, match=says):
        render(tiny.make_tokenizer(), prompt, response)


def test_a_conversation_that_the_template_refuses_is_dropped_in_its_words():
    row = {"prompt": [user("a"), user("b")], "chosen": "c", "rejected": "d"}
    found, reasons = usable_pairs(tokenizer_of("Gemma-2"), row, None, 2048)
    assert not found
    assert len(reasons) == 1
    assert reasons[0].startswith("refused by the chat template (Conversation roles must alternate")


# ---------------------------------------------------------------- texts that are too long

@EVERY
def test_a_long_prompt_loses_its_beginning_and_the_response_nothing(family):
    tokenizer = tokenizer_of(family)
    response = "It is blue, surely not green, surely wet."
    whole = render(tokenizer, LONG, response)
    least = len(render(tokenizer, "sky?", response).ids)
    for limit in range(least, len(whole.ids) + 1):
        text = render(tokenizer, LONG, response, limit)
        assert len(text.ids) <= limit
        assert text.ids[text.first:text.stop] == whole.ids[whole.first:whole.stop]


@EVERY
def test_a_response_longer_than_max_length_is_refused(family):
    tokenizer = tokenizer_of(family)
    text = render(tokenizer, LONG, "It is blue, surely.")
    with pytest.raises(UserError, match="longer than max length"):
        render(tokenizer, LONG, "It is blue, surely.", text.stop - text.first)


PIECE = st.sampled_from(["one", "wet,", "gallbladder", "Ω", "two\n"])
PIECES = st.lists(PIECE, min_size=1, max_size=30)


@given(st.integers(0, 90), PIECES)
def test_what_is_left_of_a_cut_prompt_is_its_end(room, pieces):
    tokenizer = tiny.make_tokenizer()
    prompt = " ".join(pieces)
    response = "I say three: it is blue."
    limit = len(render(tokenizer, "x", response).ids) + room
    text = render(tokenizer, prompt, response, limit)
    left = tokenizer.decode(text.ids).split("user\n", 1)[1].split("<|im_end|>")[0]
    assert left and prompt.endswith(left)
    assert len(text.ids) <= limit


@given(st.integers(0, 90), PIECES)
def test_a_prompt_is_cut_only_where_the_whole_is_too_long(room, pieces):
    tokenizer = tiny.make_tokenizer()
    prompt = " ".join(pieces)
    limit = len(render(tokenizer, "x", "Blue.").ids) + room
    whole = render(tokenizer, prompt, "Blue.")
    uncut = render(tokenizer, prompt, "Blue.", limit) == whole
    assert uncut == (len(whole.ids) <= limit)


def test_whole_turns_are_cut_before_words_and_the_system_turn_stays():
    tokenizer = tiny.make_tokenizer()
    whole = render(tokenizer, [BRIEF, *LONG], "Blue.")
    cut = render(tokenizer, [BRIEF, *LONG], "Blue.", len(whole.ids) - 1)
    assert cut.ids == render(tokenizer, [BRIEF, LONG[2]], "Blue.").ids
    assert cut.notes == ("the prompt loses its beginning: longer than --max-length",)


# ---------------------------------------------------------------- dates, and several templates

class Later(datetime):
    """A clock of another year."""

    @classmethod
    def now(cls, tz=None):
        return datetime(2031, 1, 2)


@pytest.mark.parametrize("template", [
    LLAMA_3,
    "{{ strftime_now('%d %b %Y') }}" + tiny.CHATML,
], ids=["Llama-3", "strftime_now"])
def test_a_date_in_the_template_is_the_same_every_day(template, monkeypatch):
    tokenizer = tiny.make_tokenizer(template)
    today = render(tokenizer, "a", "b").ids
    assert "26 Jul 2024" in tokenizer.decode(today)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Later)
    theirs = tokenizer.apply_chat_template([user("a")], tokenize=False)
    assert "02 Jan 2031" in theirs                                      # the change does act
    assert render(tokenizer, "a", "b").ids == today


def test_a_template_that_asks_for_date_string_gets_that_day_too():
    tokenizer = tiny.make_tokenizer("{{ date_string }}" + tiny.CHATML)
    text = render(tokenizer, "a", "b")
    assert tokenizer.decode(text.ids).startswith("26 Jul 2024<|im_start|>")


def test_of_several_chat_templates_the_default_one_is_used(tmp_path, folder_of):
    model = shutil.copytree(folder_of("gpt2"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"tool_use": "no", "default": tiny.CHATML}
    tokenizer.save_pretrained(model)

    found = []
    for name, folder in (("one", folder_of("gpt2")), ("several", model)):
        (tmp_path / name).mkdir()
        extract(tmp_path / name, folder, tiny.make_pairs(6))
        shard = stage1.shard_path(tmp_path / name / "run", 0, "mean", 0, 1)
        found.append(stage1.load_stage(shard))
    (one, one_meta), (several, several_meta) = found
    assert torch.equal(one["chosen"], several["chosen"])
    assert one_meta["template"] == several_meta["template"]


# ---------------------------------------------------------------- a whole run

# BOS from the template, no BOS at all, BOS left out; a mark of its own, EOS as the end of a turn
VARIETY = ["Llama-3", "Qwen3", "Phi", "Mistral", "base model"]


@pytest.mark.parametrize("family", VARIETY)
def test_the_self_check_holds_for_a_run_with_this_template(family, tmp_path):
    model = tiny.save_model(tmp_path / "model", tokenizer=tokenizer_of(family))
    sae = tiny.save_sae(tmp_path / "sae.safetensors", layer=0)
    run = tmp_path / "run"
    extract(tmp_path, model, tiny.make_pairs(24))
    succeed("02_select_features", "--run", run, "--sae", sae, "--k", 4)
    succeed("03_train_head", "--run", run)
    found = self_check(run)
    assert len(found) == 9
    assert all(holds for _, holds, _ in found), json.dumps(found, ensure_ascii=False)
