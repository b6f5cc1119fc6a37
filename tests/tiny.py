"""Small things to test with, made on the spot: a tokenizer, random models, an SAE, pairs, a run.

    save_model(folder, "gemma2")         → a folder for --model, with tokenizer and chat template
    save_pairs(path, 40)                 → what --pairs takes
    save_sae(path, layer=1)              → what --sae takes
    make_run(folder)                     → model, pairs, SAE; stages 1 to 3 run in folder/run
    command("01_extract", "--run", …)    → (exit code, stdout, stderr), within this process
"""

import contextlib
import functools
import importlib
import io
import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
# PYTHONUNBUFFERED: when each line of a command is written; usual for a pipe: at the end
AT_ONCE, AT_THE_END = "1", ""
WIDTH, LAYERS, WINDOW = 32, 3, 8
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SENTENCES = ["The liver makes bile and the gallbladder stores it.", "Is water wet? Yes, it is. No, "
                                                                    "it is not.",
             "user assistant system User: Assistant: System:", "One two three four five six seven "
                                                               "eight nine ten.",
             "Which colour has the sky on a clear day at noon? It is blue, surely not green.",
             "Answer in one short sentence."]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% "
          "endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# like Gemma's: BOS comes from the template, content is trimmed, a system turn is refused
NO_SYSTEM = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ "
             "raise_exception('System role not supported') }}"
             "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% "
             "endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@functools.cache
def make_tokenizer(template=CHATML):
    """Byte-level BPE of 400 tokens. Encoding a plain text adds <s>, as Llama's and Gemma's
    tokenizers do."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                       special_tokens=[("<s>",
                                                                        SPECIAL.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>",
                                   additional_special_tokens=SPECIAL[3:], chat_template=template)


SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048}
MIXED = {"sliding_window": WINDOW,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": WINDOW},
    "qwen2": SIZES | MIXED | {"use_sliding_window": True},
    "qwen3": SIZES | MIXED | {"use_sliding_window": True},
    "gemma2": SIZES | MIXED | {"query_pre_attn_scalar": 8},
    "gemma3_text": SIZES | MIXED | {"query_pre_attn_scalar": 8},
    "phi3": SIZES,
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 1024},
    "gpt_neox": SIZES,
    "phi": SIZES,
}


def save_model(folder, family="llama", template=CHATML, seed=0, tokenizer=None, **changes):
    """A random model of three blocks, width 32, with its tokenizer → folder (str). Weights large
    enough to matter."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer(template)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), initializer_range=0.3,
                                  pad_token_id=0, bos_token_id=1,
                                  eos_token_id=2, **FAMILIES[family] | changes)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_sae(path, layer=1, model=None, width=WIDTH, d_sae=64, seed=0):
    """A random ReLU SAE with unit decoder rows, about half of whose latents fire → path (str)."""
    sae, save = importlib.import_module("sae"), importlib.import_module("tools.train_sae").save_sae
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, width, generator=generator), dim=1)
    zero = torch.zeros(width)
    info = {"layer": layer, "model": model}
    save(sae.SAE(rows.T.contiguous(), torch.zeros(d_sae), rows, zero, zero, "relu", info=info),
         path)
    return str(path)


def draw(*shape, seed=0):
    """Normal random numbers of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_reward(backbone, latents, **meta):
    """A RewardModel with a random linear head on some latents of block 1, rule mean."""
    m = len(latents)
    tensors = {"latents": torch.tensor(list(latents)), "directions": draw(m, WIDTH),
               "mean": draw(m, seed=1), "std": draw(m, seed=2).abs() + 0.1,
               "w1": draw(m, seed=3), "b1": draw(1, seed=4),
               "temperature": torch.ones(1), "range": torch.ones(1)}
    settings = {"layer": 1, "token": "mean", "max_length": 256, "normalise": "none",
                "norm_eps": 1e-6}
    stage3 = importlib.import_module("03_train_head")
    return stage3.RewardModel(tensors, settings | meta, backbone)


def make_pairs(n=60):
    """Rows of TRL's explicit layout. Two in three questions share a beginning; the good answer is
    told by its last words."""
    ends = [("it is blue.", "it is not."), ("yes, one.", "no, ten."),
            ("surely wet.", "surely green.")]
    rows = []
    for i in range(n):
        question = "Is water wet" if i % 3 else "Which colour has the sky"
        good, bad = ends[i % 3]
        rows.append({"id": f"p{i}", "prompt": f"{question}, case {i}?",
                     "chosen": f"I say {i % 7}: {good}", "rejected": f"I say {i % 5}: {bad}"})
    return rows


def save_rows(path, rows):
    """Rows → JSONL file, path (str)."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_pairs(path, n=60):
    return save_rows(path, make_pairs(n))


@contextlib.contextmanager
def argv(*args):
    """sys.argv for the main() of a stage."""
    with mock.patch.object(sys, "argv", ["stage", *map(str, args)]):
        yield


def command(script, *args):
    """Run a script as `python script.py args` would, within this process → (exit code, stdout,
    stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with argv(*args), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def succeed(script, *args):
    """The stdout of a command that must not fail."""
    code, out, err = command(script, *args)
    assert code == 0, err
    return out


def assert_one_line_error(result, *words):
    """Exit code 2, one line on stderr that begins with `error:` and names every one of `words`."""
    code, _, err = result
    assert code == 2, (code, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert str(word) in err, err


def make_run(folder, *stage1_args, pairs=60):
    """Model, pairs and SAE in `folder`; stages 1 to 3 in folder/run → Path of the run."""
    folder = Path(folder)
    model, rows = save_model(folder / "model"), save_pairs(folder / "pairs.jsonl", pairs)
    sae = save_sae(folder / "sae.safetensors", layer=1, model=model)
    run = folder / "run"
    succeed("01_extract", "--model", model, "--pairs", rows, "--layer", 1, "--run", run,
            *stage1_args)
    succeed("02_select_features", "--run", run, "--sae", sae, "--k", 8)
    succeed("03_train_head", "--run", run)
    return run
