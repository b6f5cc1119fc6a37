"""Chat templates in the style of the families in use, written here; each with a tokenizer that has its control tokens.

The tokenizers add BOS to a plain text (Llama, Gemma and Mistral do), so that a template which brings its own would double it.
"""

import functools
import importlib
import json
from datetime import datetime

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_rows, succeed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from parts import rows
from parts.self_check import self_check

stage1, stage5 = (importlib.import_module(n) for n in ("01_extract", "05_best_of_n"))

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
GEMMA_2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set first_user_prefix = "" %}{%- set loop_messages = messages %}{%- endif %}
{%- for message in loop_messages %}{%- set role = "model" if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"""
QWEN_25 = """{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN_3 = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- set content = message.content %}
{%- if message.role == 'assistant' %}{%- set thought = '' %}
{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}
{%- for message in loop_messages %}{%- if message["role"] == "user" %}
{%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
{%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
{%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}{%- endfor %}"""
SMOLLM_2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
PHI_3 = """{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

CHATML = ["<|im_start|>", "<|im_end|>"]
TURN = ["<start_of_turn>", "<end_of_turn>"]
FAMILIES = {        # template, BOS, EOS, other control tokens, end of turn, BOS in a conversation, takes a system turn of its own
    "Llama-3": (LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>", 1, True),
    "Gemma-2": (GEMMA_2, "<bos>", "<eos>", TURN, "<end_of_turn>", 1, False),
    "Gemma-3": (GEMMA_3, "<bos>", "<eos>", TURN, "<end_of_turn>", 1, False),
    "Qwen2.5": (QWEN_25, None, "<|endoftext|>", CHATML, "<|im_end|>", 0, True),
    "Qwen3": (QWEN_3, None, "<|endoftext|>", CHATML, "<|im_end|>", 0, True),
    "Mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], "</s>", 1, False),
    "SmolLM2": (SMOLLM_2, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"], "<|im_end|>", 0, True),
    "ChatML": (tiny.CHATML, "<s>", "</s>", CHATML, "<|im_end|>", 0, True),
    "Phi": (PHI_3, "<s>", "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<|end|>", 0, True),
    "base model": (stage1.PLAIN_TEMPLATE, "<s>", "</s>", [], "</s>", 1, True),
}


@functools.cache
def tokenizer_of(family):
    """Byte-level BPE with the control tokens of a family; <think> and </think> are tokens, but not control tokens, as in Qwen3."""
    template, bos, eos, control = FAMILIES[family][:4]
    special = list(dict.fromkeys(["<pad>", *filter(None, [bos, eos]), *control]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(tiny.SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, special.index(bos))])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token=bos, eos_token=eos,
                                   additional_special_tokens=control, chat_template=template)
    made.add_tokens(["<think>", "</think>"])
    return made


def turn(role, content):
    return {"role": role, "content": content}


LONG = [turn("user", "Is water wet?"), turn("assistant", "Yes, it is."), turn("user", "Which colour has the sky?")]
EVERY = pytest.mark.parametrize("family", FAMILIES)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<\ue000"), min_size=1, max_size=25).filter(str.strip)


@given(st.sampled_from(sorted(FAMILIES)), WORDS, WORDS, WORDS)
def test_the_ids_are_those_of_apply_chat_template_without_a_generation_prompt(family, first, second, response):
    tokenizer = tokenizer_of(family)
    for turns in ([turn("user", first)], [turn("user", first), turn("assistant", "Yes."), turn("user", second)]):
        wanted = tokenizer.apply_chat_template([*turns, turn("assistant", response)], add_generation_prompt=False, return_dict=True,
                                               date_string="26 Jul 2024")["input_ids"]
        assert stage1.render(tokenizer, turns, response).ids == wanted


@EVERY
def test_bos_comes_as_often_as_the_template_says_and_never_twice_in_a_row(family):
    tokenizer, bos = tokenizer_of(family), FAMILIES[family][1]
    if bos:
        bos = tokenizer.convert_tokens_to_ids(bos)
        assert tokenizer("a")["input_ids"][0] == bos            # adding it again would be easy
        for prompt in ("Is water wet?", LONG):
            assert stage1.render(tokenizer, prompt, "Yes.").ids.count(bos) == FAMILIES[family][5]
            assert stage5.prompt_ids(tokenizer, prompt).count(bos) == FAMILIES[family][5]


@EVERY
def test_eot_is_the_end_of_turn_token_behind_the_response_and_nothing_but_the_end_follows(family):
    tokenizer, end = tokenizer_of(family), FAMILIES[family][4]
    for prompt, response in (("Is water wet?", "Yes, it is."), (LONG, "It is blue, surely not green."), (LONG, "one\n\ntwo\n")):
        text = stage1.render(tokenizer, prompt, response)
        assert tokenizer.convert_ids_to_tokens(text.ids[text.eot]) == end and text.eot >= text.last
        assert response.strip() == tokenizer.decode(text.ids[text.first:text.last]).strip()
        rest = tokenizer.decode(text.ids[text.eot + 1:]).replace(tokenizer.eos_token, "")           # Phi's closes the whole as well
        assert not rest.strip() and "assistant" not in rest and "model" not in rest, rest


@EVERY
def test_a_system_turn_is_rendered_or_folded_into_the_first_user_turn_and_never_lost(family):
    tokenizer, own = tokenizer_of(family), FAMILIES[family][6]
    for turns in ([turn("user", "Is water wet?")], LONG):
        text = stage1.render(tokenizer, [turn("system", "Be brief, seven."), *turns], "Yes.")
        assert tokenizer.decode(text.ids).count("Be brief, seven.") == 1
        folded = [turn("user", "Be brief, seven.\n\n" + turns[0]["content"]), *turns[1:]]
        assert (text == stage1.render(tokenizer, folded, "Yes.")) == (not own)
    assert stage1.takes_system_turn(tokenizer) == own


def test_that_a_template_has_no_system_turn_is_said(tmp_path):
    model = tiny.save_model(tmp_path / "model", template=MISTRAL)
    rows = save_rows(tmp_path / "p.jsonl", [{"prompt": [turn("system", "Be brief."), *LONG], "chosen": "Blue.", "rejected": "Green."}])
    assert "no system turn" in succeed("01_extract", "--model", model, "--pairs", rows, "--layer", 0, "--run", tmp_path / "run")


@pytest.mark.parametrize("prompt, response", [("q", None), ("q", [{"role": "assistant", "content": "a"}]), (5, "a"),
                                              ([{}], "a"), ([], "a"), ({"role": "user", "content": "q"}, "a")])
def test_what_is_no_text_is_named_and_not_scored(prompt, response):
    with pytest.raises(TypeError, match=f"{type(prompt).__name__} and {type(response).__name__}"):
        stage1.render(tiny.make_tokenizer(), prompt, response)


@EVERY
def test_control_tokens_typed_into_a_turn_do_not_act(family):
    tokenizer = tokenizer_of(family)
    acting = lambda turns, response: [i for i in stage1.render(tokenizer, turns, response).ids if i in tokenizer.all_special_ids]
    harmless = acting(LONG, "Blue.")
    for token in tokenizer.all_special_tokens:
        for typed in (token, f"a{token}b", token * 2, token[:3] + token + token[3:]):
            for place in range(3):
                turns = [{**m, "content": m["content"] + typed} if i == place else m for i, m in enumerate(LONG)]
                assert acting(turns, "Blue.") == harmless, typed
            assert acting(LONG, "Blue." + typed) == acting(LONG, typed + "Blue.") == harmless, typed
            asked = [i for i in stage5.prompt_ids(tokenizer, [turn("user", typed)]) if i in tokenizer.all_special_ids]
            assert asked == [i for i in stage5.prompt_ids(tokenizer, [turn("user", "a")]) if i in tokenizer.all_special_ids], typed


@EVERY
def test_a_long_prompt_loses_its_beginning_and_the_response_nothing(family):
    tokenizer, response = tokenizer_of(family), "It is blue, surely not green, surely wet."
    whole, least = stage1.render(tokenizer, LONG, response), len(stage1.render(tokenizer, "sky?", response).ids)
    inside = whole.ids[whole.first:whole.last]
    for limit in range(least, len(whole.ids) + 1):
        text = stage1.render(tokenizer, LONG, response, limit)
        assert len(text.ids) <= limit and text.ids[text.first:text.last] == inside
    with pytest.raises(stage1.UserError, match="longer than max length"):
        stage1.render(tokenizer, LONG, response, len(inside))


@EVERY
def test_an_empty_assistant_turn_is_refused(family):
    tokenizer = tokenizer_of(family)
    reason = lambda prompt, chosen: rows.problem_with(tokenizer, prompt, chosen, "Green.", 2048)
    assert reason(LONG, "Blue.") is None
    for empty in ("", " \n"):
        assert "empty" in reason(LONG, empty) and "empty" in reason([LONG[0], turn("assistant", empty), LONG[2]], "Blue.")


def test_a_date_in_the_template_is_the_same_every_day(monkeypatch):
    import transformers.utils.chat_template_utils as theirs

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 1, 2)
    tokenizer = tokenizer_of("Llama-3")
    today = stage1.render(tokenizer, "a", "b").ids
    monkeypatch.setattr(theirs, "datetime", Later)
    assert "02 Jan 2031" in tokenizer.apply_chat_template([turn("user", "a")], tokenize=False)          # the change does act
    assert stage1.render(tokenizer, "a", "b").ids == today and "26 Jul 2024" in tokenizer.decode(today)


def test_an_answer_of_qwen3_begins_behind_the_thinking_block_or_holds_its_own():
    tokenizer = tokenizer_of("Qwen3")
    plain = stage1.render(tokenizer, LONG, "Blue.")
    assert tokenizer.decode(plain.ids[:plain.first]).endswith("assistant\n<think>\n\n</think>\n\n")
    thought = stage1.render(tokenizer, LONG, "<think>\nsurely\n</think>\n\nBlue.")
    inside = tokenizer.decode(thought.ids[thought.first:thought.last])
    assert inside.startswith("surely") and inside.endswith("</think>\n\nBlue.") and thought.ids[thought.eot] == plain.ids[plain.eot]
    earlier = stage1.render(tokenizer, [LONG[0], turn("assistant", "<think>\nsurely\n</think>\n\nYes, it is."), LONG[2]], "Blue.")
    assert earlier.ids == plain.ids                     # thoughts of earlier turns are dropped by the template, as when it is asked


@EVERY
def test_the_self_check_finds_no_second_bos_and_every_end_token(family, tmp_path):
    model = tiny.save_model(tmp_path / "model", tokenizer=tokenizer_of(family))
    pairs, sae = tiny.save_pairs(tmp_path / "p.jsonl", 24), tiny.save_sae(tmp_path / "sae.safetensors")
    succeed("01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", tmp_path / "run")
    succeed("02_select_features", "--run", tmp_path / "run", "--sae", sae, "--k", 4)
    succeed("03_train_head", "--run", tmp_path / "run", "--seeds", 1, "--epochs", 5)
    found = self_check(tmp_path / "run")
    assert len(found) == 9 and all(holds for _, holds, _ in found), json.dumps(found, ensure_ascii=False)
