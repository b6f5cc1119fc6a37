"""Sparse autoencoders of a residual stream: the published layouts, read into one form.

    pre  = (z - b_in) @ W_enc + b_enc      z [.., d_model]: the residual stream after block L
    f    = activation(pre)                 [.., d_sae] >= 0, mostly 0; a latent "fires" where f > 0
    z'   = f @ W_dec + b_dec               row j of W_dec is the direction of latent j

    python sae.py info PATH

This file needs torch, numpy and safetensors only (huggingface_hub for hub:…) and can be copied
alone. tools/train_sae.py trains one, tools/check_sae.py says how well one fits a model.
"""

import argparse
import json
import math
import os
import re
import sys
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # only the name of an error

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open


class SAEError(ValueError):
    """A checkpoint that cannot be used; the text says what, where and what to do."""

    def __init__(self, text):
        # the names that a file brings into it may hold newlines
        one_line = "".join(c if c.isprintable() else " " for c in text)
        super().__init__(one_line)


# ---------------------------------------------------------------- the SAE

@dataclass
class SAE:
    """The one form in memory. All weights are in the units of the raw residual stream."""
    W_enc: torch.Tensor             # [d_model, d_sae]
    b_enc: torch.Tensor             # [d_sae]
    W_dec: torch.Tensor             # [d_sae, d_model]
    b_dec: torch.Tensor             # [d_model]
    b_in: torch.Tensor              # [d_model], what is subtracted from the input (b_dec or 0)
    activation: str                 # relu, topk, jumprelu, gated, groupmax
    k: int = 0                      # of topk and groupmax
    threshold: torch.Tensor = None  # [d_sae], of jumprelu
    b_gate: torch.Tensor = None     # [d_sae], of gated; so are b_mag and r_mag
    b_mag: torch.Tensor = None
    r_mag: torch.Tensor = None
    norm: str = "none"              # scaling by the token itself: constant_norm_rescale, layer_norm
    info: dict = field(default_factory=dict)    # layout, model, layer, hook, l0, folded, warning …

    @property
    def d_model(self):
        return self.W_enc.shape[0]

    @property
    def d_sae(self):
        return self.W_enc.shape[1]

    def encode(self, z):
        """Residual stream [.., d_model] → latents [.., d_sae]."""
        x, _, _ = self.normalise(z.to(self.W_enc))
        x = x - self.b_in   # not folded into b_enc: b_enc - b_in @ W_enc loses digits in float32
        if self.activation == "gated":
            return self.gated(x)

        # few passes over [.., d_sae] from here on: each costs nearly as much as the product
        pre = F.linear(x, self.W_enc.T, self.b_enc)
        if self.activation == "relu":
            return pre.relu_()
        if self.activation == "jumprelu":
            return pre.masked_fill_(pre <= self.threshold.clamp_min(0), 0)
        if self.activation == "topk":
            return keep_largest(pre, self.k)
        # groupmax: the largest of each of k consecutive groups
        grouped = pre.unflatten(-1, (self.k, -1))
        return keep_largest(grouped, 1).flatten(-2)

    def gated(self, x):
        """Two sets of biases on one product: whether a latent fires, and how strongly.

        The Gated SAE of Rajamanoharan et al. 2024.
        """
        pre = x @ self.W_enc
        gate = pre + self.b_gate > 0
        magnitude = (pre * self.r_mag.exp() + self.b_mag).relu_()
        return magnitude * gate

    def decode(self, f, like=None):
        """Latents [.., d_sae] → residual stream [.., d_model].

        like: the input, needed where the SAE scales every token by itself (norm is not "none").
        """
        out = f @ self.W_dec + self.b_dec
        if self.norm == "none":
            return out
        if like is None:
            raise SAEError(f"decode needs the input · {self.norm} depends on the token · "
                           "call decode(f, like=z)")
        _, scale, shift = self.normalise(like.to(self.W_enc))
        return out * scale + shift

    def reconstruct(self, z):
        """decode(encode(z)), [.., d_model]."""
        return self.decode(self.encode(z), like=z)

    def normalise(self, z):
        """→ (what the encoder sees, scale, shift): decode multiplies by scale and adds shift."""
        if self.norm == "constant_norm_rescale":    # to norm √d
            scale = z.norm(dim=-1, keepdim=True).clamp_min(1e-8) / math.sqrt(self.d_model)
            return z / scale, scale, 0.0
        if self.norm == "layer_norm":
            shift = z.mean(-1, keepdim=True)
            std = z.std(-1, keepdim=True)
            return (z - shift) / (std + 1e-5), std, shift
        return z, 1.0, 0.0


def keep_largest(pre, k):
    """The k largest of the last dimension where they are positive, the rest 0. Works in place."""
    best = pre.topk(k, sorted=False)
    return pre.zero_().scatter_(-1, best.indices, best.values.relu())


# ---------------------------------------------------------------- does it fit: health figures

def health(sae, z):
    """How well the SAE fits residual vectors z [n, d] → {explained_variance, l0, silent, n}.

    explained variance = 1 - Σ‖z - z'‖² / Σ‖z - mean‖² around the mean of *these* vectors. Give the
    scored token's vectors alone: among others, the distance between the two means would count as
    variance and hide a bad fit.
    """
    error = torch.zeros((), dtype=torch.float64)
    alive = torch.zeros(sae.d_sae, dtype=torch.bool, device=z.device)
    fired = 0
    for chunk in z.split(1024):
        f = sae.encode(chunk)
        rest = sae.decode(f, like=chunk).float() - chunk.float()
        error += rest.square().sum().double().cpu()
        alive |= (f > 0).any(0)
        fired += int((f > 0).sum())
    around_mean = z.float() - z.float().mean(0)
    total = around_mean.square().sum().double().cpu()
    return {"explained_variance": float(1 - error / total), "l0": fired / len(z),
            "silent": float((~alive).float().mean()), "n": len(z)}


def warnings_of(sae, every=None, ended=None):
    """What looks wrong → list of sentences with the likely cause.

    every, ended: health() of all tokens, of the scored ones.
    """
    found = []
    if sae.info.get("warning"):
        found.append(sae.info["warning"])
    model = str(sae.info.get("model") or "")
    if is_base_model(model):
        name = Path(model).name if os.path.isabs(model) else model      # a report is passed on
        found.append(f"trained on {name}, by its name a base model: "
                     "on an instruct model look at the explained variance")

    fits_every = not every or every["explained_variance"] >= 0.3
    if not fits_every:
        explained = every["explained_variance"]
        found.append(f"explained variance {explained:.2f} over all tokens: the layer is off by "
                     "one, the scale is wrong, or the SAE belongs to another model")
    seen = every or ended
    stated = sae.k or sae.info.get("l0")
    if seen and stated and seen["l0"] > 2 * float(stated):
        found.append(f"L0 {seen['l0']:.0f}, stated {float(stated):.0f}: "
                     "a wrong scale or threshold, or BOS missing")
    if ended and ended["explained_variance"] < 0.2 and fits_every:
        cause = "is it an SAE of this model and layer?"
        explained = ended["explained_variance"]
        if explained > -1:
            cause = "the SAE has hardly seen a chat template; try --token content"
        found.append(f"explained variance {explained:.2f} at what is scored: {cause}")
    return found


def is_base_model(name):
    """By its name: …-Base, or of a family whose instruct models say so in theirs, and not one.

    Qwen3 has it the other way round: Qwen3-8B is the instruct model, Qwen3-8B-Base is not.
    """
    family = re.search(r"(?i)llama-?3|gemma|qwen", name)
    instruct = re.search(r"(?i)[-_]it(?![a-z0-9])|instruct|chat|qwen3", name)
    return bool(re.search(r"(?i)base\b", name) or (family and not instruct))


# ---------------------------------------------------------------- opening a checkpoint

NORMS = ("none", "constant_norm_rescale", "layer_norm")
BOOL = (True, False)
DICTIONARIES = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder",
                "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
                "MatroyshkaBatchTopKSAE")       # once misspelled
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "b_in", "threshold", "b_gate", "b_mag", "r_mag")
ENCODERS = ("W_enc", "w_enc", "W_E", "encoder.weight", "encoder_linear.weight")
PICKLES = (".pt", ".pth", ".bin")
WEIGHTS = ("*.safetensors", "*.npz", "*.pt", "*.pth", "*.bin")


@dataclass
class Checkpoint:
    """A published SAE as it lies there."""
    path: Path              # of the weights
    tensors: dict
    config: dict            # of the JSON file beside the weights; {} where there is none
    own: dict               # the metadata of our own layout; {} in all others
    repository: str         # of the hub; "" where it came from a folder
    k: int = None           # of the caller, for a TopK SAE whose files do not hold it

    def has(self, *names):
        """Are there tensors of all these names?"""
        return set(names) <= set(self.tensors)

    @property
    def settings(self):
        """The configuration as one dict.

        SAELens keeps a part of it in `metadata`, dictionary_learning in `trainer` and `buffer`.
        """
        inner = {}
        for part in ("metadata", "trainer", "buffer"):
            inner |= self.config.get(part) or {}
        return inner | self.config


def load_sae(path, dtype=torch.float32, device="cpu", k=None, revision=None):
    """Any layout of READERS below → SAE. Errors: SAEError.

    path: file, folder or hub:REPO[:SUBFOLDER]. Nothing in a checkpoint is run: no pickle is opened
    but a third party's .pt, .pth or .bin, and that with weights_only=True.
    """
    weights, config, repository = find_checkpoint(path, revision)
    tensors, own = read_tensors(weights)
    sae = read_checkpoint(Checkpoint(weights, tensors, config, own, repository, k))
    check_shapes(sae, weights)

    sae.info.update(file=weights.name, weights=str(weights))
    tensors.clear()     # so that the loop frees each as soon as it is converted: never two of all
    for name in TENSORS:
        if getattr(sae, name) is not None:
            setattr(sae, name, getattr(sae, name).to(device=device, dtype=dtype))
    return sae


def read_checkpoint(c):
    """A Checkpoint → SAE by the reader of its layout; what it trips over becomes one line."""
    layout = "layout not known"
    try:
        layout = layout_of(c)
        sae = READERS[layout](c)
        if layout != "sparserm":    # ours says all of it in the weights
            sae.info["hook"], sae.info["layer"] = site_of(c)
    except KeyError as error:
        raise SAEError(f"tensor or setting {error} is missing · {c.path} ({layout}) · "
                       "the checkpoint is not complete") from None
    except SAEError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError,
            ArithmeticError) as error:
        raise SAEError(f"the configuration or a tensor is malformed ({error}) · "
                       f"{c.path} ({layout}) · fetch the file again") from None
    sae.info.setdefault("layout", layout)
    return sae


def find_checkpoint(path, revision=None):
    """→ (weights file, config dict, repository of the hub or "")."""
    text = str(path)
    repository = ""
    if text.startswith("hub:") or (":" in text and not Path(text).exists()):
        name = text.removeprefix("hub:")
        repository = name.partition(":")[0]
        text = fetch(name, revision)
    path = Path(text)
    if not path.exists():
        raise SAEError(f"file not found · {path} · "
                       "name an SAE file or folder, or hub:REPO[:SUBFOLDER]")
    if path.is_dir():
        path = only_weights_in(path)
    return path, config_beside(path), repository


def only_weights_in(folder):
    """The one SAE of a folder. Of several files it is the one that holds an encoder."""
    found = []
    for ending in (*WEIGHTS, "checkpoints/*.safetensors"):
        found += sorted(folder.glob(ending))
    if len(found) > 1:
        found = [path for path in found if may_be_an_sae(path)]
    if len(found) != 1:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = ", ".join(str(path.relative_to(folder)) for path in files[:12]) or "nothing"
        what = "several SAEs" if found else "no SAE"
        raise SAEError(f"{what} in this folder · {folder} holds {names} · "
                       "name one file or subfolder")
    return found[0]


def may_be_an_sae(path):
    """Is there an encoder in this file? Firing rates, optimizers, trainers' states hold none.

    Only names are looked at, no tensor is read for it.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
        else:
            names = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception:   # a damaged file may be the SAE; a pickle of more than tensors is none
        return path.suffix not in PICKLES
    return any(name in names for name in ENCODERS)


def config_beside(weights):
    """The JSON configuration that lies beside the weights, or above `checkpoints/` → dict."""
    folders = [weights.parent]
    if weights.parent.name == "checkpoints":
        folders.append(weights.parent.parent)
    for folder in folders:
        for name in ("cfg.json", "config.json", "hyperparams.json"):
            if (folder / name).is_file():
                config = read_json(folder / name)
                if config:
                    return config
    return {}


def read_json(path):
    """A JSON object → dict."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SAEError(f"not valid JSON ({error}) · {path} · fetch the file again") from None
    if config and not isinstance(config, dict):
        raise SAEError(f"the configuration is not a JSON object · {path} · fetch the file again")
    return config


def hub_is_silent():
    """Does the hub take a connection and say nothing? It would be waited for without end."""
    if os.environ.get("HF_HUB_OFFLINE", "0") != "0":
        return False                # it is not asked at all
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 10))
    try:
        urllib.request.urlopen(address, timeout=seconds).close()
    except OSError as error:        # any answer will do, a refusal too
        return "timed out" in str(error)
    return False


def fetch(name, revision=None):
    """REPO[:SUBFOLDER or file] of the hub → local path; nothing outside of it is fetched."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise SAEError(f"the package huggingface_hub is missing · {name} · "
                       "pip install huggingface_hub, or pass a local folder") from None
    repo, _, inside = name.partition(":")
    patterns = ["*.json", *WEIGHTS]
    if inside:
        folder = inside.rpartition("/")[0]          # a named file needs the configuration beside it
        beside = f"{folder}/*.json" if folder else "*.json"
        patterns = [inside, f"{inside}/*", f"{inside}/checkpoints/*", beside]
    try:
        local = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns,
                                       local_files_only=hub_is_silent()))
    except Exception as error:      # offline, gated, no such repository: its first line says which
        reason = str(error).splitlines()[0]
        raise SAEError(f"the hub did not give it ({reason}) · {name} · "
                       "check name and connection, or pass a local folder") from None
    return str(local / inside) if inside else str(local)


def read_tensors(path):
    """A weights file → (dict of tensors, the metadata of our own layout or {})."""
    readers = {".npz": read_npz, ".safetensors": read_safetensors}
    try:
        return readers.get(path.suffix, read_pt)(path)
    except UnpicklingError:
        raise SAEError(f"refused: the pickle holds more than tensors, or is damaged · {path} · "
                       "ask the author for safetensors") from None
    except Exception as error:      # OSError, BadZipFile, zlib.error, TypeError, MemoryError …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SAEError(f"not a readable checkpoint ({reason}) · {path} · "
                       "fetch the file again") from None


def read_safetensors(path):
    """→ (tensors, our metadata or {})."""
    with safe_open(path, "pt") as file:
        own = json.loads((file.metadata() or {}).get("sparserm", "{}"))
        if not isinstance(own, dict):
            raise ValueError("the metadata sparserm is not a JSON object")
        return {name: file.get_tensor(name) for name in file.keys()}, own


def read_npz(path):
    """→ (tensors, {}). Refuses what unpacks to far more than its size, or belies its headers."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(item.file_size for item in archive.infolist())
        if unpacked > 16 * path.stat().st_size + (1 << 20):
            raise ValueError("it unpacks to more than 16 times its size")
        for item in archive.infolist():
            with archive.open(item) as member:
                check_array(member, item)
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}, {}


def check_array(member, item):
    """Refuse an array whose header claims other than what is there."""
    if np.lib.format.read_magic(member) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    claimed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and claimed != item.file_size - member.tell():
        raise ValueError(f"{item.filename} says {list(shape)} and holds {item.file_size} bytes")


def read_pt(path):
    """→ (tensors, {}). Refuses a compressed or damaged archive.

    torch.load compares no checksum, and takes the bytes of a compressed part as they lie there.
    """
    with zipfile.ZipFile(path) as archive:
        if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
            raise ValueError("the .pt is compressed")
        has_checksums = any(item.CRC for item in archive.infolist())
        damaged = archive.testzip() if has_checksums else None
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")

    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict):
        raise ValueError("not a dictionary of tensors")
    size = path.stat().st_size
    tensors = {}
    for name, value in loaded.items():
        if isinstance(name, str) and isinstance(value, (torch.Tensor, int, float)):
            tensor = torch.as_tensor(value)
            larger = tensor.numel() * tensor.element_size() > size
            if tensor.layout != torch.strided or tensor.is_meta or larger:
                raise ValueError(f"{name} is sparse, without numbers or larger than the file")
            tensors[name] = tensor
    return tensors, {}


# ---------------------------------------------------------------- which layout is it

def layout_of(c):
    """A Checkpoint → the name of its layout: the first that fits.

    It is told by the tensors, never by a folder's name.
    """
    if c.own.get("stage"):
        refuse_other_stages(c)
        return "sparserm"
    refuse_other_kinds(c)
    is_pickle = c.path.suffix in PICKLES
    is_openmoss = {"act_fn", "norm_activation", "jump_relu_threshold"} & set(c.settings)
    four = c.has("W_enc", "b_enc", "W_dec", "b_dec")
    two_layers = c.has("encoder.weight", "encoder.bias")

    if four and c.has("threshold") and c.path.suffix == ".npz":
        return "Gemma Scope 1"
    if c.has("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        return "Gemma Scope"
    if two_layers and c.has("W_dec", "b_dec"):
        return "sparsify"
    if two_layers and c.has("decoder.weight", "decoder.bias"):
        is_dictionary = "dict_class" in c.settings or (is_pickle and not is_openmoss)
        return "dictionary_learning new" if is_dictionary else "Llama Scope"
    if c.has("W_E", "b_E", "W_D", "b_D"):
        return "OpenMOSS"
    if two_layers and c.has("decoder.weight", "bias"):
        return "dictionary_learning"
    if two_layers and c.has("decoder.weight", "b_dec"):
        return "dictionary_learning TopK"
    if c.has("encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"):
        return "dictionary_learning gated"
    if four and c.has("k"):
        return "dictionary_learning Matryoshka"
    if four and is_pickle and c.has("threshold"):
        return "dictionary_learning JumpReLU"
    if c.has("encoder_linear.weight", "encoder_linear.bias",
             "decoder_linear.weight", "decoder_linear.bias"):
        return "Goodfire"
    if four and is_pickle:
        return "Qwen-Scope"
    if c.has("W_enc", "W_dec", "b_dec"):
        return "SAELens"
    holds = ", ".join(sorted(c.tensors)[:12]) or "no tensors"
    raise SAEError(f"unknown layout · {c.path} holds {holds} · known: {', '.join(READERS)}")


def refuse_other_stages(c):
    """Of the files that this project writes only one kind is an SAE."""
    stages = {"extract": "the hidden states of stage 1", "select": "the features of stage 2",
              "head": "a reward head of stage 3"}
    stage = str(c.own["stage"])
    if stage != "sae":
        made_with = c.own.get("sae")
        advice = f"; it was made with {made_with}" if made_with else ""
        raise SAEError(f"this is {stages.get(stage, f'a file of stage {stage}')}, not an SAE · "
                       f"{c.path} · pass the SAE itself, as --sae of 02_select_features.py{advice}")


def refuse_other_kinds(c):
    """Refuse what is no SAE of one activation: transcoders, skip connections, GLU encoders …"""
    names = {"W_skip", "affine_skip_connection", "W_gate_enc", "encoder_glu.weight", "W_E_glu"}
    found = sorted(names & set(c.tensors))
    if found:
        what = "a transcoder, a skip connection or a GLU encoder, not an SAE of one activation"
        raise refused(f"{', '.join(found)} means {what}", c.path, CHOOSE)
    check_settings(c, transcode=(False,), is_transcoder=(False,), skip_connection=(False,),
                   affine_connection=(False,), affine_skip_connection=(False,),
                   use_glu_encoder=(False,), dict_class=DICTIONARIES, io=("out",))


# ---------------------------------------------------------------- where was it trained

# Names are compared in small letters, with "_" for all other signs: model_layers_12_output.
# A block's output is called one of these; what goes into a block is the output of the one below.
MODULES = (r"(?:(?:base_model|language_model|text_model|model|transformer|decoder|backbone"
           r"|gpt_neox)_)*")
BLOCK = r"(?:layers?|blocks?|h)_?\d+"
OUTPUT = (rf"{MODULES}{BLOCK}(?:_output|_hook_out|_(?:hook_)?resid_post)?"
          rf"|(?:hook_)?resid_(?:post|out)(?:_all)?(?:_(?:{BLOCK}|\d+))?|l\d+r?")
INPUT = (rf"{MODULES}{BLOCK}(?:_input|_hook_in|_(?:hook_)?resid_pre)"
         rf"|(?:hook_)?resid_pre(?:_{BLOCK})?")
# the same within a path; L15R is Llama Scope's, …-SAE-l19.pth Goodfire's
IN_PATH = (rf"(?:^|_)((?:resid_(?:post|out|pre)_(?:all_)?)?{BLOCK}(?:_hook_resid_pre)?"
           r"|l\d+r|(?<=sae_)l\d+(?=$))(?=_|$)")

# How files, folders and repositories are called after other sites; sizes may follow: mlp_out,
# gemma-scope-2b-pt-mlp, mlp_out_layer3, Llama3_1-8B-Base-L15M-8x.
OTHER_SITES = {
    "a transcoder's input": r"\w*transcoders?|crosscoders?|clt|lorsa|l(?:x|\d+)tc",
    "attention": r"att|attn|attn_out|attention|hook_z|[qkvo]_proj|l(?:x|\d+)a",
    "the MLP": r"mlp|mlp_out|ffn|feed_?forward|l(?:x|\d+)m",
    "a norm": r"\w*layernorm|(?:model|final)_norm|ln_?(?:\d|f|final)|hook_normalized",
    "the middle of a block": r"resid_mid",
    "the embedding": r"embed|embeddings?|embed_tokens|embed_in|wte",
}
SIZE = (r"(?:all|width|average|l0|trainer|checkpoints?|seed|final|canonical|small|medium|big|large"
        r"|v\d+|\d[a-z\d]*)")
AFTER_SITE = rf"(?:_(?:{SIZE}|in|out|input|output|saes?|(?:layers?|blocks?)\d*))*"
# of a user's folders only those count that are called as published ones are: resid_post, mlp_out,
# or with a model's size, Llama3_1-8B-Base-LXM-8x
PUBLISHED = (r"^(?:resid|mlp|attn)_(?:pre|mid|post|out)(?:_all)?$|^\w*coders?(?:_all)?$"
             r"|(?:^|_)(?:\d+[bm]|gpt2|scope)(?:_|$)")

CHOOSE = "choose a residual-stream (resid_post) SAE"


def plain(name):
    """In small letters, with "_" for all other signs."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")


def site_of(c):
    """Where it was trained → (name, layer), each None where nothing says it.

    Refuses what any name of configuration, file, folder or repository says is not the output of
    a block. The layer is the configuration's, where it says one.
    """
    stated = c.settings.get("hook_layer", c.settings.get("layer"))
    stated = stated if type(stated) is int else None

    layers = {}                     # name → layer
    for name in hooks_of(c):
        layers[name] = layer_of(name, stated, c.path)
    if len(set(layers.values()) - {None}) > 1:
        raise refused(f"trained from {' to '.join(layers)}, not on one block's output", c.path,
                      CHOOSE)

    path = path_names(c)
    for name in path:
        refuse_other_site(name, c.path)
    if layers:
        name = next(iter(layers))
        return name, layers[name]
    name = last_match(IN_PATH, "_".join(plain(name) for name in path))
    if name:
        return name, layer_of(name, stated, c.path)
    return None, stated


def hooks_of(c):
    """The names that the configuration gives to where it was trained."""
    names = ("hook_name", "hook_point", "hook_point_in", "hf_hook_point_in", "hook_name_out",
             "hook_point_out", "hf_hook_point_out", "submodule_name", "act_name", "site")
    hooks = []
    for config in (c.config, c.config.get("metadata"), c.config.get("trainer")):
        hooks += [str(config[name]) for name in names if config and config.get(name)]
    return hooks


def layer_of(name, stated, path):
    """The layer whose output a name means; `stated` where the name has no number. Or refused."""
    place = plain(name)
    goes_in = re.fullmatch(INPUT, place)
    number = re.search(r"\d+", place)
    layer = int(number[0]) if number else stated
    if not goes_in and not re.fullmatch(OUTPUT, place):
        raise refused(f"trained on {name}, not on a block's output", path, CHOOSE)
    if not goes_in or layer is None:
        return layer
    if layer == 0:
        raise refused(f"trained on {name}, the embedding", path, CHOOSE)
    return layer - 1


def path_names(c):
    """The names in a path that the publisher gave, outermost first; the rest are the user's.

    From the hub: from the repository on. Elsewhere: the file, the folder that it is in (past
    folders of sizes: width_16k, trainer_0), and as many folders above as are PUBLISHED. So
    /home/me/attention-study/layers.3 says nothing of attention.
    """
    *folders, file = Path(os.path.abspath(c.path)).parts
    for depth, folder in enumerate(folders):
        if folder.startswith("models--"):               # the cache of the hub
            return [*folders[depth:], Path(file).stem]

    names = [Path(file).stem]
    while folders and re.fullmatch(rf"{SIZE}(?:_{SIZE})*", plain(folders[-1])):
        names.insert(0, folders.pop())
    if folders:
        names.insert(0, folders.pop())
    while folders and re.search(PUBLISHED, plain(folders[-1])):
        names.insert(0, folders.pop())
    if c.repository:
        names.insert(0, "models--" + c.repository.replace("/", "--"))
    return names


def refuse_other_site(name, path):
    """Refuse a file, folder or repository that is called after anything but a block's output."""
    for module in re.findall(r"(?:\w+\.)*(?:layers|blocks|h)\.\d+\.[A-Za-z]\w*[\w.]*", name):
        layer_of(module.removesuffix(".sae"), None, path)           # layers.5.mlp, h.5.attn

    words = plain(name.split("--")[-1])
    # a repository says it anywhere, a folder, which a user may have named, at its end
    after = r"(?!_only)(?:_|$)" if name.startswith("models--") else rf"{AFTER_SITE}$"
    for site, called in OTHER_SITES.items():
        if re.search(rf"(?:^|_)(?:{called}){after}", words):
            what = f"trained on {site} by its name {name}, not on a block's output"
            raise refused(what, path, CHOOSE)


# ---------------------------------------------------------------- what the readers share

def refused(what, path, advice):
    """A checkpoint that is whole but not of a kind that can be used."""
    return SAEError(f"refused: {what} · {path} · {advice}")


def last_match(pattern, text):
    """What the pattern finds last in a path or name, or None."""
    found = re.findall(pattern, str(text))
    return found[-1] if found else None


def check_settings(c, **known):
    """Refuse a setting that changes the equation, where its value is none of those in `known`.

    Of the right type too: "false" and 0 are not False. One that is missing or null has its default.
    """
    for name, values in known.items():
        value = c.settings.get(name)
        if value is not None and (type(value), value) not in [(type(v), v) for v in values]:
            read = ", ".join(json.dumps(v) for v in values)
            what = f"the equation with {name} {json.dumps(value)} is not known here"
            raise refused(what, c.path, f"known: {read}")


def per_latent(value, like):
    """A threshold, one number or one for each latent → [d_sae] float32."""
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        raise TypeError("the threshold is not a float tensor")
    value = torch.as_tensor(value, dtype=torch.float32).flatten()
    return value.expand(len(like)).clone() if len(value) == 1 else value


def note_fold(sae, why):
    """Record what was folded into the weights."""
    earlier = sae.info.get("folded")
    sae.info["folded"] = f"{earlier} and {why}" if earlier else why


def fold_scale(sae, scale_in, scale_out, why, path):
    """Trained on scale_in · z, its output scale_out · z: put both into the weights.

    (s z - b_in) W + b_enc = (z - b_in / s) (s W) + b_enc: b_enc and f stay.
    """
    check_shapes(sae, path)
    sae.W_enc = sae.W_enc.float() * scale_in
    sae.b_in = sae.b_in.float() / scale_in
    sae.W_dec = sae.W_dec.float() / scale_out
    sae.b_dec = sae.b_dec.float() / scale_out
    note_fold(sae, why)


def gate_by_norm(sae, path):
    """The gate looks at pre_j · ‖d_j‖, d_j the decoder row: put the norms into the weights.

    JumpReLU: θ_j = θ / ‖d_j‖. TopK: encoder times, decoder by the norm. ReLU: nothing changes.
    """
    check_shapes(sae, path)
    norm = sae.W_dec.float().norm(dim=1)
    if sae.activation == "jumprelu":
        sae.threshold = sae.threshold.float() / norm
    elif sae.activation == "topk":
        sae.W_enc = sae.W_enc.float() * norm
        sae.b_enc = sae.b_enc.float() * norm
        sae.W_dec = sae.W_dec.float() / norm[:, None]
    if sae.activation in ("jumprelu", "topk"):
        note_fold(sae, "decoder norms into the gate")


# ------------------------------------------------------------- a reader a family: Checkpoint → SAE

def read_own(c):
    """Ours: the tensors of the form in memory."""
    t = c.tensors
    info = dict(c.own)
    activation, k, norm, _ = [info.pop(name) for name in ("activation", "k", "norm", "stage")]
    return SAE(
        W_enc=t["W_enc"],
        b_enc=t["b_enc"],
        W_dec=t["W_dec"],
        b_dec=t["b_dec"],
        b_in=t["b_in"],
        activation=activation,
        k=k,
        threshold=t.get("threshold"),
        b_gate=t.get("b_gate"),
        b_mag=t.get("b_mag"),
        r_mag=t.get("r_mag"),
        norm=norm,
        info=info)


def read_gemma_scope(c):
    """Gemma Scope 1 (npz) and 2 (safetensors): nothing scaled or subtracted.

    Layer and L0 stand in the path or the config.
    """
    check_settings(c, architecture=("jump_relu", "jumprelu"), type=("sae",))
    t = c.tensors
    W_enc, W_dec = (t["W_enc"], t["W_dec"]) if c.has("W_enc") else (t["w_enc"], t["w_dec"])
    l0 = c.config.get("l0") or last_match(r"l0_(\d+)", c.path.parent)
    info = {"model": c.config.get("model_name"), "l0": l0 and float(l0)}
    return SAE(
        W_enc=W_enc,
        b_enc=t["b_enc"],
        W_dec=W_dec,
        b_dec=t["b_dec"],
        b_in=torch.zeros_like(t["b_dec"]),
        activation="jumprelu",
        threshold=t["threshold"],
        info=info)


def read_sparsify(c):
    """EleutherAI sparsify: the folder is named after the hook point."""
    # signed: older versions could keep the largest |pre|, negative ones too
    check_settings(c, activation=("topk", "groupmax"), signed=(False,))
    t = c.tensors
    return SAE(
        W_enc=t["encoder.weight"].T,
        b_enc=t["encoder.bias"],
        W_dec=t["W_dec"],
        b_dec=t["b_dec"],
        b_in=t["b_dec"],
        activation=c.config.get("activation") or "topk",
        k=int(c.k or c.config["k"]),
        info={"model": c.config.get("model")})


def read_saelens(c):
    """SAELens v3 to v6: cfg.json decides on the activation, and what is subtracted or scaled."""
    if not c.config:
        raise SAEError(f"cfg.json is missing · beside {c.path} · "
                       "it decides the activation and the scale; fetch the whole folder")
    check_settings(c, architecture=("standard", "topk", "jumprelu", "gated"),
                   normalize_activations=(*NORMS, "expected_average_only_in", True, False),
                   apply_b_dec_to_input=BOOL, rescale_acts_by_decoder_norm=BOOL,
                   finetuning_scaling_factor=BOOL, reshape_activations=("none",))
    check_saelens_scaling(c)
    t = c.tensors
    config = c.settings
    kind = saelens_kind(c)
    norm = config.get("normalize_activations") or "none"
    if norm is True:                                                # v3 had a bool
        norm = "expected_average_only_in"
    info = {"model": config.get("model_name"), "neuronpedia": config.get("neuronpedia_id")}
    subtracts = config.get("apply_b_dec_to_input") is not False
    b_in = t["b_dec"] if subtracts else torch.zeros_like(t["b_dec"])
    b_enc = torch.zeros(t["W_enc"].shape[-1:]) if kind == "gated" else t["b_enc"]
    sae = SAE(t["W_enc"], b_enc, t["W_dec"], t["b_dec"], b_in, kind, norm=norm, info=info)

    if kind == "gated":
        sae.b_gate, sae.b_mag, sae.r_mag = t["b_gate"], t["b_mag"], t["r_mag"]
    if kind == "jumprelu":
        sae.threshold = t["threshold"]
    if kind == "topk":
        of_activation = config.get("activation_fn_kwargs") or {}
        sae.k = int(config["k"] if "k" in config else of_activation["k"])
        if config.get("rescale_acts_by_decoder_norm"):
            gate_by_norm(sae, c.path)
    if norm == "expected_average_only_in":
        fold_saelens_scale(sae, config, c.path)
    return sae


def saelens_kind(c):
    """→ relu, topk, jumprelu or gated. Before v6 a standard one could have another activation."""
    kind = c.settings.get("architecture") or "standard"
    activations = ("relu", "topk") if kind in ("standard", "topk") else ("relu",)
    check_settings(c, activation_fn_str=activations, activation_fn=activations)
    if kind != "standard":
        return kind
    # it has two names, of which the first counts
    return c.settings.get("activation_fn_str") or c.settings.get("activation_fn") or "relu"


def check_saelens_scaling(c):
    """A fine-tuned SAE may scale its latents; one that does is refused."""
    factor = c.tensors.get("scaling_factor", c.tensors.get("finetuning_scaling_factor"))
    if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
        what = "the tensor scaling_factor is not all ones"
        raise refused(what, c.path, "its meaning is not settled")


def fold_saelens_scale(sae, config, path):
    """expected_average_only_in: one scale of the whole data set, which the file has to name."""
    scale = config.get("norm_scaling_factor")
    if not scale:
        what = "normalize_activations expected_average_only_in without norm_scaling_factor"
        advice = "the scale of the data set is not in the file; fold it with SAELens and save again"
        raise refused(what, path, advice)
    sae.norm = "none"
    fold_scale(sae, float(scale), float(scale), f"input scale {scale:.6g}", path)


def read_openmoss(c):
    """Llama Scope and newer, trained on √d / (mean norm) · z; the gate may use decoder norms."""
    check_settings(c, sae_type=("sae",), act_fn=("relu", "topk", "jumprelu"),
                   norm_activation=("dataset-wise", "inference", "token-wise"),
                   apply_decoder_bias_to_pre_encoder=BOOL, sparsity_include_decoder_norm=BOOL)
    t, config = c.tensors, c.config
    activation = config.get("act_fn") or "jumprelu"
    norm = config.get("norm_activation") or "dataset-wise"

    if c.has("W_E"):
        W_enc, b_enc, W_dec, b_dec = t["W_E"], t["b_E"], t["W_D"], t["b_D"]
    else:
        W_enc, b_enc = t["encoder.weight"].T, t["encoder.bias"]
        W_dec, b_dec = t["decoder.weight"].T, t["decoder.bias"]
    b_in = b_dec if config.get("apply_decoder_bias_to_pre_encoder") else torch.zeros_like(b_dec)
    model = config.get("model_name") or last_match(r"Llama3_1-8B-Base", c.path)
    per_token = "constant_norm_rescale" if norm == "token-wise" else "none"
    info = {"model": model}
    sae = SAE(W_enc, b_enc, W_dec, b_dec, b_in, activation, norm=per_token, info=info)

    mean_norm = openmoss_mean_norm(c) if norm == "dataset-wise" else None
    root = math.sqrt(sae.d_model)
    if activation == "topk":
        sae.k = int(c.k or config["top_k"])
    if activation == "jumprelu":
        scale = root / mean_norm["in"] if mean_norm else 1.0
        sae.threshold = openmoss_threshold(c, b_enc, scale)
    if config.get("sparsity_include_decoder_norm"):
        gate_by_norm(sae, c.path)                   # before the scale: the norms as stored
    if norm == "dataset-wise":
        if not mean_norm:
            what = "norm_activation dataset-wise without dataset_average_activation_norm"
            raise refused(what, c.path, "the scale is not in the file")
        why = f"input scale √d / {mean_norm['in']:.6g}"
        fold_scale(sae, root / mean_norm["in"], root / mean_norm["out"], why, c.path)
    return sae


def openmoss_mean_norm(c):
    """The mean norm of what goes in and what comes out → {in, out}, or None where it is not stated.

    It stands in the config, or (R1) in two tensors.
    """
    if c.config.get("dataset_average_activation_norm"):
        return c.config["dataset_average_activation_norm"]
    found = {}
    for side in ("in", "out"):
        hook = c.config.get(f"hook_point_{side}")
        found[side] = c.tensors.get(f"dataset_average_activation_norm.{hook}")
    if None in found.values():
        return None
    return {side: float(value) for side, value in found.items()}


def openmoss_threshold(c, b_enc, scale):
    """The threshold in the units of training → [d_sae].

    The tensor log_jumprelu_threshold is in them, the scalar of the config in those of the raw
    stream.
    """
    names = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
    for name in names:
        if name in c.tensors:
            return per_latent(c.tensors[name], b_enc).exp()
    return per_latent(c.config["jump_relu_threshold"] * scale, b_enc)


def read_dictionary_learning(c):
    """AutoEncoder: ReLU, one bias that is subtracted and added."""
    t = c.tensors
    return SAE(
        W_enc=t["encoder.weight"].T,
        b_enc=t["encoder.bias"],
        W_dec=t["decoder.weight"].T,
        b_dec=t["bias"],
        b_in=t["bias"],
        activation="relu",
        info={"model": c.settings.get("lm_name")})


def read_dictionary_learning_new(c):
    """AutoEncoderNew, of Anthropic's update of April 2024: ReLU, nothing subtracted."""
    t = c.tensors
    sae = SAE(
        W_enc=t["encoder.weight"].T,
        b_enc=t["encoder.bias"],
        W_dec=t["decoder.weight"].T,
        b_dec=t["decoder.bias"],
        b_in=torch.zeros_like(t["decoder.bias"]),
        activation="relu",
        info={"model": c.settings.get("lm_name")})
    if not c.config:
        sae.info["warning"] = "no config: read as a ReLU SAE, from which nothing is subtracted"
    return sae


def read_dictionary_learning_gated(c):
    """GatedAutoEncoder."""
    t = c.tensors
    W_enc = t["encoder.weight"].T
    return SAE(
        W_enc=W_enc,
        b_enc=torch.zeros(W_enc.shape[-1:]),
        W_dec=t["decoder.weight"].T,
        b_dec=t["decoder_bias"],
        b_in=t["decoder_bias"],
        activation="gated",
        b_gate=t["gate_bias"],
        b_mag=t["mag_bias"],
        r_mag=t["r_mag"],
        info={"model": c.settings.get("lm_name")})


def read_dictionary_learning_topk(c):
    """AutoEncoderTopK, BatchTopKSAE and Matryoshka.

    BatchTopK at inference is a JumpReLU with one learned threshold.
    """
    t = c.tensors
    if c.has("encoder.weight"):
        W_enc, b_enc, W_dec = t["encoder.weight"].T, t["encoder.bias"], t["decoder.weight"].T
    else:
        W_enc, b_enc, W_dec = t["W_enc"], t["b_enc"], t["W_dec"]
    k = int(t["k"] if "k" in t else c.k or c.settings["k"])         # older files do not hold it
    info = {"model": c.settings.get("lm_name")}
    sae = SAE(W_enc, b_enc, W_dec, t["b_dec"], t["b_dec"], "topk", k=k, info=info)

    threshold = float(t.get("threshold", -1.0))                     # below 0: never set
    kind = c.settings.get("dict_class") or ""
    batch = "BatchTopK" in kind or c.has("group_sizes")
    if batch and threshold < 0:
        sae.info["warning"] = ("the threshold of this BatchTopK SAE was never set: "
                               "top-k per token is used")
    elif batch or (not kind and threshold >= 0):
        sae.activation, sae.k = "jumprelu", 0
        sae.threshold = per_latent(threshold, b_enc)
        if not batch:
            sae.info["warning"] = "no config: read as a BatchTopK SAE, because a threshold is set"
    return sae


def read_dictionary_learning_jumprelu(c):
    """JumpReluAutoEncoder: nothing subtracted."""
    t = c.tensors
    return SAE(
        W_enc=t["W_enc"],
        b_enc=t["b_enc"],
        W_dec=t["W_dec"],
        b_dec=t["b_dec"],
        b_in=torch.zeros_like(t["b_dec"]),
        activation="jumprelu",
        threshold=per_latent(t["threshold"], t["b_enc"]),
        info={"model": c.settings.get("lm_name")})


def read_qwen_scope(c):
    """Qwen-Scope: TopK, nothing subtracted; k stands in the repository's name only (…-L0_50)."""
    t = c.tensors
    k = c.k or last_match(r"L0_(\d+)", c.path)
    if not k:
        raise SAEError(f"k is not in the file · {c.path} · "
                       "pass --k-sae N, the number after L0_ in the repository's name")
    model = last_match(r"Qwen[\w.]+-[\d.]+B(?:-Base)?", c.path)
    return SAE(
        W_enc=t["W_enc"].T,
        b_enc=t["b_enc"],
        W_dec=t["W_dec"].T,
        b_dec=t["b_dec"],
        b_in=torch.zeros_like(t["b_dec"]),
        activation="topk",
        k=int(k),
        info={"model": model})


def read_goodfire(c):
    """Goodfire: ReLU, nothing subtracted; model and layer stand in the name of the file."""
    t = c.tensors
    return SAE(
        W_enc=t["encoder_linear.weight"].T,
        b_enc=t["encoder_linear.bias"],
        W_dec=t["decoder_linear.weight"].T,
        b_dec=t["decoder_linear.bias"],
        b_in=torch.zeros_like(t["decoder_linear.bias"]),
        activation="relu",
        info={"model": last_match(r"(.+)-SAE-l\d+", c.path.name)})


READERS = {
    "Gemma Scope 1": read_gemma_scope,
    "Gemma Scope": read_gemma_scope,
    "SAELens": read_saelens,
    "sparsify": read_sparsify,
    "Llama Scope": read_openmoss,
    "OpenMOSS": read_openmoss,
    "dictionary_learning": read_dictionary_learning,
    "dictionary_learning new": read_dictionary_learning_new,
    "dictionary_learning TopK": read_dictionary_learning_topk,
    "dictionary_learning Matryoshka": read_dictionary_learning_topk,
    "dictionary_learning gated": read_dictionary_learning_gated,
    "dictionary_learning JumpReLU": read_dictionary_learning_jumprelu,
    "Qwen-Scope": read_qwen_scope,
    "Goodfire": read_goodfire,
    "sparserm": read_own,
}


# ---------------------------------------------------------------- does it hang together

NEEDS = {"relu": (), "topk": (), "groupmax": (), "jumprelu": ("threshold",),
         "gated": ("b_gate", "b_mag", "r_mag")}


def check_shapes(sae, path):
    """Refuse tensors that do not fit together, NaN or Inf, and a k or activation that cannot be."""
    if sae.W_enc.dim() != 2 or 0 in sae.W_enc.shape:
        shape = list(sae.W_enc.shape)
        raise SAEError(f"W_enc has shape {shape}, expected [d_model, d_sae] · {path} · not an SAE")
    d, m = sae.W_enc.shape
    shapes = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,), "b_in": (d,)}
    for name in TENSORS:
        tensor = getattr(sae, name)
        if tensor is not None:
            check_tensor(name, tensor, shapes.get(name, (m,)), sae.W_enc.shape, path)

    if str(sae.activation) not in NEEDS or sae.norm not in NORMS:
        raise SAEError(f"activation {sae.activation!r}, norm {sae.norm!r} · {path} · "
                       "fetch the file again")
    if sae.activation in ("topk", "groupmax"):
        fits = type(sae.k) is int and 0 < sae.k <= m
        if not fits or (sae.activation == "groupmax" and m % sae.k):
            raise SAEError(f"k = {sae.k} does not fit {m} latents · {path} · pass the right k")
    missing = [name for name in NEEDS[sae.activation] if getattr(sae, name) is None]
    if missing:
        raise SAEError(f"tensor {missing[0]} is missing · {path} · the checkpoint is not complete")


def check_tensor(name, tensor, wanted, of, path):
    """Refuse a tensor of another shape than `wanted`, of another type, or with NaN or Inf.

    of: the shape of W_enc, which the others have to fit.
    """
    if tuple(tensor.shape) != wanted:
        found, expected = list(tensor.shape), list(wanted)
        raise SAEError(f"{name} has shape {found}, expected {expected} from W_enc {list(of)} · "
                       f"{path} · the checkpoint is damaged or mislabelled")
    usable = tensor.is_floating_point()
    if usable:
        rows_at_a_time = max(1, 2**24 // tensor[0].numel())     # a sum in float32 makes a copy
        parts = tensor.split(rows_at_a_time)
        # one NaN or Inf makes the sum one
        usable = all(torch.isfinite(part.sum(dtype=torch.float32)) for part in parts)
    if not usable:
        raise SAEError(f"{name} holds NaN or Inf, or is not a float tensor · {path} · "
                       "fetch the file again")


# ---------------------------------------------------------------- python sae.py info PATH

def describe(sae):
    """The lines of `sae.py info`."""
    info = sae.info
    norms = sae.W_dec.float().norm(dim=1)
    subtracted = "b_dec subtracted" if sae.b_in.any() else "nothing subtracted"
    numbers = ""
    if sae.k:
        numbers = f"k = {sae.k}"
    elif sae.threshold is not None:
        numbers = f"threshold {float(sae.threshold.min()):.4g} … {float(sae.threshold.max()):.4g}"
    lines = {
        "layout": info.get("layout"),
        "model": info.get("model") or "not stated",
        "layer": info.get("layer"),
        "hook": info.get("hook") or "not stated",
        "width": f"{sae.d_model} → {sae.d_sae}",
        "activation": f"{sae.activation} {numbers}",
        "input": f"{subtracted}, per-token scaling {sae.norm}",
        "decoder norms": f"{norms.min():.3f} … {norms.max():.3f}",
        "folded": info.get("folded") or "nothing",
        "stated L0": info.get("l0"),
        "held out": info.get("held_out"),
        "settings": info.get("settings"),
    }
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items() if value is not None)


MOVED = {"check": "python -m tools.check_sae", "train": "python -m tools.train_sae"}


def parse_args():
    """The flags of `sae.py info`."""
    p = argparse.ArgumentParser(prog="sae.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = p.add_subparsers(dest="command", required=True)
    says = "what a checkpoint is and how it was read"
    info = commands.add_parser("info", help=says,
                               description=f"{says}\n\n    python sae.py info PATH",
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    info.add_argument("path",
                      help="SAE file or folder, hub:REPO[:SUBFOLDER]")
    info.add_argument("--k-sae", type=int,
                      help="k of a TopK SAE whose files do not hold it (Qwen-Scope)")
    info.add_argument("--revision",
                      help="branch, tag or commit on the hub")
    info.add_argument("--sae-dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                      help="in memory (default float32)")
    return p.parse_args([word for word in sys.argv[1:] if word != "--debug"])


def main():
    """`sae.py info`: what a checkpoint is and how it was read."""
    if len(sys.argv) > 1 and sys.argv[1] in MOVED:
        use = MOVED[sys.argv[1]]
        if not Path(__file__).with_name("tools").is_dir():
            use += " of the SparseRM project: sae.py alone only reads SAEs"
        raise SAEError(f"moved · python sae.py {sys.argv[1]} · use {use}")
    args = parse_args()
    sae = load_sae(args.path, getattr(torch, args.sae_dtype), k=args.k_sae, revision=args.revision)
    print(describe(sae))
    for warning in warnings_of(sae):
        print(f"warning: {warning}")


def run():
    """main(), where an error is one line and a reader that stops, like head, is none."""
    try:
        try:
            main()
        finally:
            print(end="", flush=True)       # here, not when Python has ended
    except SAEError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # what is still to be printed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run()
