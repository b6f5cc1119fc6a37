"""The commands of a text, run in order in a folder of tiny files under the same names, with tiny
models of the same families behind the same names."""

import contextlib
import importlib
import io
import json
import re
import shlex

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_templates import tokenizer_of

from parts import models

sae = importlib.import_module("sae")
SCRIPTS = ["01_extract.py", "02_select_features.py", "03_train_head.py", "04_evaluate.py",
           "05_best_of_n.py", "sae.py"]


def read(name):
    """The text of a file of the project."""
    return (tiny.ROOT / name).read_text(encoding="utf-8")


def lines_of(text):
    """The lines of a shell script, each with its continuations."""
    return text.replace("\\\n", " ").split("\n")


def bash_of(text):
    """Markdown → the lines of its shell blocks."""
    return lines_of("\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)))


SAE_FILE = "assets/sae-smollm2-135m-layer16.safetensors"
GEMMA_SCOPE = "google/gemma-scope-2b-pt-res:layer_13/width_16k/average_l0_84"
LLAMA_SCOPE = "fnlp/Llama3_1-8B-Base-LXR-8x:Llama3_1-8B-Base-L15R-8x"
SMOLLM_SAE = "EleutherAI/sae-SmolLM2-1.7B-layer17-32x"
QWEN_SCOPE = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50:layer14.sae.pt"

DEPTH = 18                              # above every layer that a command names
FULL = {"layer_types": ["full_attention"] * DEPTH}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)}
# name: family of the model, of its chat template, what its configuration says
MODELS = {
    "demo": ("llama", "SmolLM2", {}),
    "google/gemma-2-2b-it": ("gemma2", "Gemma-2", ALTERNATING),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", "Llama-3", {}),
    "Qwen/Qwen3-1.7B": ("qwen3", "Qwen3", FULL),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", "SmolLM2", {}),
}

# flags that make a command quicker
QUICKER = {
    "tools.train_sae": ["--tokens", 600, "--batch", 64],
    "sample": ["--max-new-tokens", 3],
    "04_evaluate.py": ["--sweeps", "none", "--folds", 3],
}


def save_tiny_models(folder):
    """→ {name of a model in the README: folder of a tiny one of its family}."""
    made = {}
    for name, (family, template, changes) in MODELS.items():
        place = folder / name.replace("/", "-")
        made[name] = tiny.save_model(place, family, tokenizer=tokenizer_of(template),
                                     num_hidden_layers=DEPTH, **changes)
    return made


def save_tiny_data(folder):
    """The files that the commands read, under their names."""
    (folder / "data").mkdir()
    (folder / "assets").mkdir()

    for name in ("data/truthful.jsonl", "data/safe.jsonl", "my.jsonl", "my-pairs.jsonl",
                 "corpus.jsonl"):
        tiny.save_pairs(folder / name, 40)

    question = {"prompt": "Is water wet?"}
    answered = question | {"candidates": ["Yes.", "No, ten."]}
    tiny.save_rows(folder / "data/prompts.jsonl", [question])
    tiny.save_rows(folder / "my-candidates.jsonl", [answered])

    tiny.save_sae(folder / SAE_FILE, 16, "demo")


def save_tiny_hub(folder):
    """SAEs in the layouts of the hub, for tiny models → {hub name: local folder or file}."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(64, tiny.WIDTH, generator=generator), dim=1)
    columns = rows.T.contiguous()
    zero = torch.zeros(tiny.WIDTH)
    wide = torch.zeros(64)

    gemma = folder / "layer_13/width_16k/average_l0_84"
    gemma.mkdir(parents=True)
    np.savez(gemma / "params.npz", W_enc=columns.numpy(), W_dec=rows.numpy(), b_enc=wide.numpy(),
             b_dec=zero.numpy(), threshold=wide.numpy() + 0.1)

    llama = folder / "Llama3_1-8B-Base-L15R-8x"
    (llama / "checkpoints").mkdir(parents=True)
    save_file({"encoder.weight": rows, "encoder.bias": wide, "decoder.weight": columns,
               "decoder.bias": zero}, llama / "checkpoints/final.safetensors")
    (llama / "hyperparams.json").write_text(json.dumps({
        "act_fn": "jumprelu", "jump_relu_threshold": 0.1, "norm_activation": "dataset-wise",
        "hook_point_in": "blocks.15.hook_resid_post",
        "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}}))

    qwen = folder / "L0_50"
    qwen.mkdir(parents=True)
    torch.save({"W_enc": rows, "W_dec": columns, "b_enc": wide, "b_dec": zero},
               qwen / "layer14.sae.pt")

    smollm = folder / "sae-SmolLM2-1.7B-layer17-32x"
    smollm.mkdir()
    save_file({"encoder.weight": rows, "encoder.bias": wide, "W_dec": rows.clone(), "b_dec": zero},
              smollm / "sae.safetensors")
    (smollm / "cfg.json").write_text(json.dumps({"activation": "topk", "expansion_factor": 2,
                                                 "k": 32, "d_in": tiny.WIDTH, "num_latents": 0,
                                                 "normalize_decoder": True, "multi_topk": False,
                                                 "skip_connection": False}))

    return {GEMMA_SCOPE: gemma, LLAMA_SCOPE: llama, QWEN_SCOPE: qwen / "layer14.sae.pt",
            SMOLLM_SAE: smollm}


def lines_of_make_demo():
    """What `make demo` runs, as commands of a user."""
    recipe = re.search(r"^demo: .*\n((?:\t.*\n)+)", read("Makefile"), re.M)[1]
    return recipe.replace("$(RUN)", "python").replace("$(SAE)", SAE_FILE).split("\n")


def run_sae(*args):
    """`python sae.py …` → (exit code, stderr). tiny.command would run a second copy of the module,
    in which nothing is patched."""
    err = io.StringIO()
    with tiny.argv(*args), contextlib.redirect_stderr(err):
        try:
            sae.main()
            code = 0
        except sae.SAEError as error:
            print(f"error: {error}", file=err)
            code = 2
        except SystemExit as stop:
            code = stop.code or 0
    return code, err.getvalue()


def run_words(words, quicker):
    """The words of a command after `python` → (exit code, stderr)."""
    if words[0] == "-m":
        words = words[1:]

    more = []
    for word in words[:2]:
        more += quicker.get(word, [])

    script, *flags = words
    if script == "sae.py":
        return run_sae(*flags, *more)

    code, _, err = tiny.command(path_of(script), *flags, *more)
    return code, err


def path_of(script):
    """01_extract.py, or tools.train_sae behind -m → what tiny.command takes."""
    return script.removesuffix(".py").replace("tools.", "tools/")


def is_of_the_project(line):
    """Is this a command of a script, or of a tool, of the project?"""
    return bool(re.match(r"\s*python (0\d_\w+\.py |sae\.py |-m tools\.)", line))


@contextlib.contextmanager
def world(folder):
    """In `folder` lie tiny files under the names of the texts; names of models and of SAEs on the
    hub lead to tiny ones."""
    model_of = save_tiny_models(folder)
    sae_of = save_tiny_hub(folder / "hub")
    save_tiny_data(folder)

    def locate_model(name):
        return model_of.get(name, name)

    def fetch(name, revision=None):
        if name not in sae_of:
            raise sae.SAEError(f"not on the hub · {name}")
        return str(sae_of[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(models, "locate_model", locate_model)
        patch.setattr(sae, "fetch", fetch)
        yield


def run_code(block, where):
    """A block of Python → (its names, what it prints). where: the file it stands in."""
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, where, "exec", dont_inherit=True), names)
    return names, out.getvalue()


def play(lines, quicker=QUICKER):
    """Run the lines that are commands of the project → [(command, exit code, stderr)].

    quicker: {script: flags that are added}.
    """
    found = []
    for line in lines:
        if is_of_the_project(line):
            words = shlex.split(line, comments=True)[1:]
            found.append((line, *run_words(words, quicker)))
    return found
