"""Sparse autoencoders of a residual stream: one form in memory, and every published layout read into it.

    pre  = (z - b_in) @ W_enc + b_enc        z [.., d_model], the residual stream after block L, unscaled
    f    = activation(pre)                   [.., d_sae] >= 0, mostly 0; a latent "fires" where f > 0
    z'   = f @ W_dec + b_dec                 row j of W_dec is the direction of latent j

    python sae.py info  PATH
    python sae.py check PATH --model M --texts FILE
    python sae.py train --model demo --layer 16 --texts FILE --width 4608 --k 64 --out my-sae.safetensors

This file needs torch, numpy and safetensors only (huggingface_hub for hub:…) and can be copied alone; the commands are in
parts/sae_tools.py and use the stages.
"""

import importlib
import json
import math
import re
import sys
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

    def __init__(self, text):                       # one line, whatever names and values a file brings into it
        super().__init__("".join(c if c.isprintable() else " " for c in text))


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
    norm: str = "none"              # per-token scaling that cannot be folded: constant_norm_rescale, layer_norm
    info: dict = field(default_factory=dict)    # layout, model, layer, hook, stated l0, folded, warning …

    @property
    def d_model(self):
        return self.W_enc.shape[0]

    @property
    def d_sae(self):
        return self.W_enc.shape[1]

    def encode(self, z):
        """Residual stream [.., d_model] → latents [.., d_sae]."""
        x, _, _ = self.normalise(z.to(self.W_enc))
        x = x - self.b_in                           # subtracted, not folded into b_enc: that cancels in float32
        if self.activation == "gated":
            pre = x @ self.W_enc
            return (pre * self.r_mag.exp() + self.b_mag).relu_() * (pre + self.b_gate > 0)
        pre = F.linear(x, self.W_enc.T, self.b_enc)         # then as few passes over [.., d_sae] as possible: they cost like the product
        if self.activation == "jumprelu":
            return pre.masked_fill_(pre <= self.threshold.clamp_min(0), 0)
        if self.activation == "relu":
            return pre.relu_()
        if self.activation == "groupmax":           # the largest of each of k consecutive groups
            grouped = pre.unflatten(-1, (self.k, -1))
            best = grouped.max(-1, keepdim=True)
            return grouped.zero_().scatter_(-1, best.indices, best.values.relu()).flatten(-2)
        best = pre.topk(self.k, sorted=False)
        return pre.zero_().scatter_(-1, best.indices, best.values.relu())

    def decode(self, f, like=None):
        """Latents → residual stream. `like`: the input, needed where the SAE scales every token by itself."""
        out = f @ self.W_dec + self.b_dec
        if self.norm == "none":
            return out
        if like is None:
            raise SAEError(f"decode needs the input · {self.norm} depends on the token · call decode(f, like=z)")
        _, scale, shift = self.normalise(like.to(self.W_enc))
        return out * scale + shift

    def reconstruct(self, z):
        """decode(encode(z)), [.., d_model]."""
        return self.decode(self.encode(z), like=z)

    def normalise(self, z):
        """→ (what the encoder sees, scale, shift) with z = seen · scale + shift."""
        if self.norm == "constant_norm_rescale":
            scale = z.norm(dim=-1, keepdim=True).clamp_min(1e-8) / math.sqrt(self.d_model)
            return z / scale, scale, 0.0
        if self.norm == "layer_norm":
            shift = z.mean(-1, keepdim=True)
            scale = z.std(-1, keepdim=True) + 1e-5
            return (z - shift) / scale, z.std(-1, keepdim=True), shift
        return z, 1.0, 0.0


# ---------------------------------------------------------------- reading what others publish

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "b_in", "threshold", "b_gate", "b_mag", "r_mag")


def load_sae(path, dtype=torch.float32, device="cpu", k=None, revision=None):
    """Any layout of LAYOUTS below → SAE. `path`: file, folder, hub:REPO[:SUBFOLDER]. Errors: SAEError.

    Nothing in a checkpoint is run: no pickle but a third party's .pt, and that with weights_only=True.
    """
    weights, config = find_checkpoint(path, revision)
    tensors, own = read_tensors(weights)
    layout = "sparserm" if own.get("stage") else layout_of(tensors, config, weights)
    try:
        sae = assemble(layout, tensors)
        READ[layout.split()[0]](sae, tensors, own if layout == "sparserm" else config, weights, k)
    except KeyError as error:
        raise SAEError(f"tensor or setting {error} is missing · {weights} ({layout}) · the checkpoint is not complete") from None
    except SAEError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise SAEError(f"the configuration or a tensor is malformed ({error}) · {weights} ({layout}) · fetch the file again") from None
    check_shapes(sae, weights)
    tensors.clear()                 # below each tensor is freed as soon as it is converted: never two copies of all
    sae.info.setdefault("layout", layout)
    sae.info.update(file=weights.name, weights=str(weights))
    for name in NAMES:
        if getattr(sae, name) is not None:
            setattr(sae, name, getattr(sae, name).to(device=device, dtype=dtype))
    return sae


def find_checkpoint(path, revision=None):
    """→ (weights file, config dict). The config lies beside the weights, or above `checkpoints/`."""
    text = str(path)
    if text.startswith("hub:") or (":" in text and not Path(text).exists()):
        text = fetch(text.removeprefix("hub:"), revision)
    path = Path(text)
    if not path.exists():
        raise SAEError(f"file not found · {path} · name an SAE file or folder, or hub:REPO[:SUBFOLDER]")
    if path.is_dir():
        found = [f for name in ("*.safetensors", "checkpoints/*.safetensors", "*.npz", "*.pt") for f in sorted(path.glob(name))]
        if len(found) != 1:
            inside = ", ".join(sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())[:12]) or "nothing"
            raise SAEError(f"{'several SAEs' if found else 'no SAE'} in this folder · {path} holds {inside} · name one file or subfolder")
        path = found[0]
    config = {}
    for folder in (path.parent, path.parent.parent):
        for name in ("cfg.json", "config.json", "hyperparams.json"):
            if not config and (folder / name).is_file() and (folder == path.parent or path.parent.name == "checkpoints"):
                try:
                    config = json.loads((folder / name).read_text("utf-8"))
                except (ValueError, OSError, RecursionError) as error:
                    raise SAEError(f"not valid JSON ({error}) · {folder / name} · fetch the file again") from None
    if not isinstance(config, dict):
        raise SAEError(f"the configuration is not a JSON object · beside {path} · fetch the file again")
    return path, config


def fetch(name, revision=None):
    """REPO[:SUBFOLDER or file] of the hub → local path; only the files of that subfolder are fetched."""
    if Path(__file__).with_name("01_extract.py").exists():
        importlib.import_module("parts.models").await_hub()
    from huggingface_hub import snapshot_download
    repo, _, inside = name.partition(":")
    beside = inside.rpartition("/")[0]              # a named file needs the configuration beside it
    patterns = [inside, f"{inside}/*", f"{inside}/checkpoints/*", f"{beside}/*.json".lstrip("/")] if inside else \
        ["*.json", "*.safetensors", "*.npz", "*.pt"]
    try:
        local = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:      # offline, no such repository, gated: the hub's own first line says which
        raise SAEError(f"the hub did not give it ({str(error).splitlines()[0]}) · {name} · check name and connection, "
                       "or pass a local folder") from None
    return str(local / inside) if inside else str(local)


def read_tensors(path):
    """A weights file → (dict of tensors, our metadata or {}). Sizes are compared with the file's before memory is taken."""
    try:
        if path.suffix == ".npz":
            check_npz(path)
            with np.load(path, allow_pickle=False) as file:
                return {n: torch.from_numpy(file[n]) for n in file.files}, {}
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                own = json.loads((file.metadata() or {}).get("sparserm", "{}"))
                if not isinstance(own, dict):
                    raise ValueError("the metadata sparserm is not a JSON object")
                return {n: file.get_tensor(n) for n in file.keys()}, own
        check_pt(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(loaded, dict):
            raise ValueError("not a dictionary of tensors")
        tensors = {n: torch.as_tensor(t) for n, t in loaded.items() if isinstance(n, str) and isinstance(t, (torch.Tensor, int, float))}
        size = path.stat().st_size
        wrong = [n for n, t in tensors.items() if t.layout != torch.strided or t.is_meta or t.numel() * t.element_size() > size]
        if wrong:
            raise ValueError(f"{wrong[0]} is sparse, without numbers or larger than the file")
        return tensors, {}
    except UnpicklingError:
        raise SAEError(f"refused: the pickle holds more than tensors, or is damaged · {path} · ask the author for safetensors") from None
    except Exception as error:      # the readers raise all sorts: OSError, BadZipFile, zlib.error, TypeError, MemoryError …
        raise SAEError(f"not a readable checkpoint ({str(error).splitlines()[0] if str(error) else type(error).__name__}) · "
                       f"{path} · fetch the file again") from None


def check_npz(path):
    """Refuse an archive that unpacks to far more than its size, and arrays whose header claims other than what is there."""
    with zipfile.ZipFile(path) as file:
        if sum(item.file_size for item in file.infolist()) > 16 * path.stat().st_size + (1 << 20):
            raise ValueError("it unpacks to more than 16 times its size")
        for item in file.infolist():
            with file.open(item) as member:
                old = np.lib.format.read_magic(member) == (1, 0)
                shape, _, dtype = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(member)
                if not dtype.hasobject and math.prod(shape) * dtype.itemsize != item.file_size - member.tell():
                    raise ValueError(f"{item.filename} says {list(shape)} and holds {item.file_size} bytes")


def check_pt(path):
    """torch.load compares no checksum, and takes the bytes of a compressed part as they lie there."""
    with zipfile.ZipFile(path) as file:
        if any(item.compress_type != zipfile.ZIP_STORED for item in file.infolist()):
            raise ValueError("the .pt is compressed")
        damaged = any(item.CRC for item in file.infolist()) and file.testzip()      # all 0: saved without checksums
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")


# ---------------------------------------------------------------- the families

# A layout is told by the names of its tensors (the first row whose names are all there), never by a folder's name. `.T`: stored
# transposed. b_in: what is subtracted from the input; 0: nothing, or the configuration says. also: what else must be there; `!`: must not.
#    layout                           W_enc               b_enc           W_dec               b_dec           b_in     also
LAYOUTS = {
    "Gemma Scope 1":                  ("W_enc",            "b_enc",        "W_dec",            "b_dec",        0,       ".npz threshold"),
    "Gemma Scope":                    ("w_enc",            "b_enc",        "w_dec",            "b_dec",        0,       "threshold"),
    "sparsify":                       ("encoder.weight.T", "encoder.bias", "W_dec",            "b_dec",        "b_dec", ""),
    "Llama Scope":                    ("encoder.weight.T", "encoder.bias", "decoder.weight.T", "decoder.bias", 0,       ""),
    "OpenMOSS":                       ("W_E",              "b_E",          "W_D",              "b_D",          0,       ""),
    "dictionary_learning":            ("encoder.weight.T", "encoder.bias", "decoder.weight.T", "bias",         "bias",  ""),
    "dictionary_learning TopK":       ("encoder.weight.T", "encoder.bias", "decoder.weight.T", "b_dec",        "b_dec", "k"),
    "dictionary_learning gated":      ("encoder.weight.T", 0,              "decoder.weight.T", "decoder_bias", "decoder_bias",
                                       "gate_bias mag_bias r_mag"),
    "dictionary_learning Matryoshka": ("W_enc",            "b_enc",        "W_dec",            "b_dec",        "b_dec", "k group_sizes"),
    "dictionary_learning JumpReLU":   ("W_enc",            "b_enc",        "W_dec",            "b_dec",        0,       ".pt threshold !k"),
    "Qwen-Scope":                     ("W_enc.T",          "b_enc",        "W_dec.T",          "b_dec",        0,       ".pt"),
    "SAELens":                        ("W_enc",            0,              "W_dec",            "b_dec",        "b_dec", ""),
    "sparserm":                       ("W_enc",            "b_enc",        "W_dec",            "b_dec",        "b_in",  ".sparserm"),
}


def layout_of(tensors, config, path):
    """Names of the tensors → the name of the layout; refuses what is no SAE of a residual stream."""
    extra = set(tensors) & {"W_skip", "affine_skip_connection", "W_gate_enc", "encoder_glu.weight"}
    flags = {n for n in ("transcode", "skip_connection", "use_glu_encoder", "affine_skip_connection") if config.get(n) is True}
    if extra or flags:
        raise refused(f"{', '.join(sorted(extra | flags))} means a transcoder, a skip connection or a GLU encoder, not an SAE of one "
                      "activation", path, "choose a residual-stream SAE")
    inner = [config] + [c for c in (config.get("metadata"), config.get("trainer")) if isinstance(c, dict)]
    names = ("hook_name", "hook_point", "hook_point_in", "hf_hook_point_in", "hook_point_out", "hf_hook_point_out", "submodule_name")
    hooks = [str(c[n]) for c in inner for n in names if c.get(n)] + re.findall(r"layers\.\d+\.[a-z_.]+", path.parent.name)
    wrong = [h for h in hooks if re.search(r"mlp|attn|attention|hook_z|\.q\b|\.k\b|\.v\b|hook_resid_(pre|mid)", h)]
    wrong += [config[a] for a, b in zip(names[2:4], names[4:6]) if config.get(a) and config.get(b) and config[a] != config[b]]
    if wrong:
        raise refused(f"trained on {wrong[0]}, not on a block's output", path, "choose a residual-stream (resid_post) SAE")
    there = set(tensors) | {path.suffix}
    for layout, (*names, _, also) in LAYOUTS.items():
        needed = {n.removesuffix(".T") for n in names if n} | {n for n in also.split() if n[0] != "!"}
        if needed <= there and not {n[1:] for n in also.split() if n[0] == "!"} & there:
            return layout
    raise SAEError(f"unknown layout · {path} holds {', '.join(sorted(tensors)[:12]) or 'no tensors'} · known: {', '.join(LAYOUTS)}")


def assemble(layout, tensors):
    """The tensors of a layout under their names in memory → SAE, its activation not yet known."""
    get = lambda name: tensors[name.removesuffix(".T")].T if name.endswith(".T") else tensors[name]
    W_enc, b_enc, W_dec, b_dec, b_in = (get(name) if name else None for name in LAYOUTS[layout][:5])
    b_enc = torch.zeros(W_enc.shape[-1:]) if b_enc is None else b_enc
    return SAE(W_enc, b_enc, W_dec, b_dec, torch.zeros_like(b_dec) if b_in is None else b_in, activation="relu")


def hook_layer(name):
    """blocks.12.hook_resid_post, model.layers.12.output, layers.12 … → 12, or None."""
    found = re.search(r"(?:blocks|layers|layer|h|L)[._]?(\d+)", str(name))
    return int(found[1]) if found else None


def refused(what, path, advice):
    """A checkpoint that is whole but not of a kind that can be used."""
    return SAEError(f"refused: {what} · {path} · {advice}")


def note_fold(sae, why):
    """Record what was folded into the weights."""
    sae.info["folded"] = " and ".join(filter(None, [sae.info.get("folded"), why]))


def fold_scale(sae, scale_in, scale_out, why, path):
    """Trained on scale_in · z, its output scale_out · z: put both into the weights; f stays what it was."""
    check_shapes(sae, path)
    sae.W_enc, sae.b_in = sae.W_enc.float() * scale_in, sae.b_in.float() / scale_in
    sae.W_dec, sae.b_dec = sae.W_dec.float() / scale_out, sae.b_dec.float() / scale_out
    note_fold(sae, why)


def gate_by_norm(sae, path):
    """The gate compares pre · ‖decoder row‖ with the threshold: θ_j = θ / ‖d_j‖, or a rescaled TopK."""
    check_shapes(sae, path)
    norm = sae.W_dec.float().norm(dim=1)
    if sae.activation == "jumprelu":
        sae.threshold = sae.threshold.float() / norm
    elif sae.activation == "topk":
        sae.W_enc, sae.b_enc, sae.W_dec = sae.W_enc.float() * norm, sae.b_enc.float() * norm, sae.W_dec.float() / norm[:, None]
    note_fold(sae, "decoder norms into the gate")


def full(value, like):
    """A scalar threshold → one for each latent [d_sae]."""
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        raise TypeError("the threshold is not a float tensor")
    value = torch.as_tensor(value, dtype=torch.float32).flatten()
    return value.expand(len(like)).clone() if len(value) == 1 else value


# What the configuration adds: activation, scale, what is subtracted; where it was trained.

def read_own(sae, t, config, path, k):
    """Ours: the tensors of the form in memory."""
    sae.activation, sae.k, sae.norm = config["activation"], config["k"], config["norm"]
    for name in NAMES[5:]:
        setattr(sae, name, t.get(name))
    sae.info = {n: v for n, v in config.items() if n not in ("activation", "k", "norm", "stage")}


def read_gemma_scope(sae, t, config, path, k):
    """Gemma Scope 1 (npz) and 2 (safetensors): nothing scaled. Layer and L0 stand in the path or config."""
    sae.activation, sae.threshold = "jumprelu", t["threshold"]
    hook = config.get("hf_hook_point_in") or (re.findall(r"layer_\d+", str(path)) or [None])[-1]
    l0 = config.get("l0") or next(iter(re.findall(r"l0_(\d+)", str(path.parent))), None)
    sae.info = {"model": config.get("model_name"), "hook": hook, "layer": hook_layer(hook), "l0": l0 and float(l0)}


def read_saelens(sae, t, config, path, k):
    """SAELens v3 to v6: cfg.json decides the activation and what is subtracted, scaled or normalised."""
    if not config:
        raise SAEError(f"cfg.json is missing · beside {path} · it decides the activation and the scale; fetch the whole folder")
    meta, kind = {**config, **config.get("metadata", {})}, config.get("architecture", "standard")
    if kind == "standard" and (config.get("activation_fn_str") or config.get("activation_fn")) == "topk":
        kind, config = "topk", {**(config.get("activation_fn_kwargs") or {}), **config}
    if kind == "standard" and config.get("activation_fn_str", "relu") != "relu":
        raise refused(f"activation_fn_str {config['activation_fn_str']}", path, "relu and topk are read")
    if kind not in ("standard", "topk", "jumprelu", "gated"):
        raise refused(f"architecture {kind}", path, "standard, topk, jumprelu and gated are read")
    factor = t.get("scaling_factor", t.get("finetuning_scaling_factor"))
    if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
        raise refused("the tensor scaling_factor is not all ones", path, "its meaning is not settled")
    norm = config.get("normalize_activations") or "none"
    norm = "expected_average_only_in" if norm is True else norm                 # v3 had a bool
    if norm not in ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"):
        raise refused(f"normalize_activations {norm}", path, "its meaning is not known here")
    hook = meta.get("hook_name") or meta.get("hook_point")
    sae.info = {"model": meta.get("model_name"), "hook": hook, "layer": hook_layer(hook), "neuronpedia": meta.get("neuronpedia_id")}
    sae.activation, sae.norm = kind.replace("standard", "relu"), "none" if norm == "expected_average_only_in" else norm
    if not config.get("apply_b_dec_to_input", True):
        sae.b_in = torch.zeros_like(sae.b_dec)
    if kind == "gated":
        sae.b_gate, sae.b_mag, sae.r_mag = t["b_gate"], t["b_mag"], t["r_mag"]
    else:
        sae.b_enc = t["b_enc"]
    if kind == "jumprelu":
        sae.threshold = t["threshold"]
    if kind == "topk":
        sae.k = int(config["k"])
        if config.get("rescale_acts_by_decoder_norm"):
            gate_by_norm(sae, path)
    if norm == "expected_average_only_in":
        scale = config.get("norm_scaling_factor") or meta.get("norm_scaling_factor")
        if not scale:
            raise refused("normalize_activations expected_average_only_in without norm_scaling_factor", path,
                          "the scale of the data set is not in the file; fold it with SAELens and save again")
        fold_scale(sae, float(scale), float(scale), f"input scale {scale:.6g}", path)


def read_sparsify(sae, t, config, path, k):
    """EleutherAI sparsify: the folder is named after the hook point."""
    sae.activation = config.get("activation", "topk")
    if sae.activation not in ("topk", "groupmax"):
        raise refused(f"activation {sae.activation}", path, "topk and groupmax are read")
    sae.k, sae.info = int(k or config["k"]), {"hook": path.parent.name, "layer": hook_layer(path.parent.name), "model": config.get("model")}


def read_openmoss(sae, t, config, path, k):
    """Llama Scope and newer: trained on √d / (mean norm) · z; the gate may look at decoder norms.

    The scalar jump_relu_threshold is in units of the raw stream, a log_jumprelu_threshold tensor in those of training.
    """
    sae.activation, norm = config.get("act_fn", "jumprelu"), config.get("norm_activation", "dataset-wise")
    if sae.activation not in ("relu", "topk", "jumprelu"):
        raise refused(f"act_fn {sae.activation}", path, "relu, topk and jumprelu are read")
    if norm not in ("dataset-wise", "inference", "token-wise"):
        raise refused(f"norm_activation {norm}", path, "dataset-wise, inference and token-wise are read")
    hook = config.get("hook_point_in") or config.get("hook_point") or ""
    sae.info = {"hook": hook, "layer": hook_layer(hook),
                "model": config.get("model_name") or (re.findall(r"Llama3_1-8B-Base", str(path)) or [None])[0]}
    sae.norm = "constant_norm_rescale" if norm == "token-wise" else "none"
    if config.get("apply_decoder_bias_to_pre_encoder"):
        sae.b_in = sae.b_dec
    stored = {side: t.get(f"dataset_average_activation_norm.{config.get(f'hook_point_{side}')}") for side in ("in", "out")}
    mean = config.get("dataset_average_activation_norm") or (None if None in stored.values() else {n: float(v) for n, v in stored.items()})
    root = math.sqrt(sae.d_model)
    if sae.activation == "topk":
        sae.k = int(k or config["top_k"])
    if sae.activation == "jumprelu":
        stored = t.get("log_jumprelu_threshold", t.get("activation_function.log_jumprelu_threshold"))
        in_raw_units = root / mean["in"] if mean and norm == "dataset-wise" else 1.0      # only the number in the config is
        sae.threshold = full(config["jump_relu_threshold"] * in_raw_units, sae.b_enc) if stored is None else full(stored, sae.b_enc).exp()
    if config.get("sparsity_include_decoder_norm"):
        gate_by_norm(sae, path)                     # before the scale: the norms as stored
    if norm == "dataset-wise":
        if not mean:
            raise refused("norm_activation dataset-wise without dataset_average_activation_norm", path, "the scale is not in the file")
        fold_scale(sae, root / mean["in"], root / mean["out"], f"input scale √d / {mean['in']:.6g}", path)


def read_dictionary_learning(sae, t, config, path, k):
    """dictionary_learning: the class is told by the tensors; BatchTopK and Matryoshka are a JumpReLU at inference."""
    trainer = config.get("trainer", {})
    layer, kind = trainer.get("layer"), trainer.get("dict_class", "")
    sae.info = {"model": trainer.get("lm_name"), "layer": layer if isinstance(layer, int) else hook_layer(layer),
                "hook": trainer.get("submodule_name")}
    if "gate_bias" in t:
        sae.activation, sae.b_gate, sae.b_mag, sae.r_mag = "gated", t["gate_bias"], t["mag_bias"], t["r_mag"]
    elif "k" in t:
        sae.activation, sae.k, threshold = "topk", int(t["k"]), float(t.get("threshold", -1.0))
        batch = "BatchTopK" in kind or "group_sizes" in t
        if batch and threshold < 0:
            sae.info["warning"] = "the threshold of this BatchTopK SAE was never set: top-k per token is used"
        elif batch or (not kind and threshold >= 0):
            sae.activation, sae.k, sae.threshold = "jumprelu", 0, full(threshold, sae.b_enc)
            sae.info |= {} if batch else {"warning": "no config: read as a BatchTopK SAE, because a threshold is set"}
    elif "threshold" in t:
        sae.activation, sae.threshold = "jumprelu", full(t["threshold"], sae.b_enc)


def read_qwen_scope(sae, t, config, path, k):
    """Qwen-Scope: TopK; k stands in the repository's name only (…-L0_50)."""
    found = re.findall(r"L0_(\d+)", str(path))
    if not (k or found):
        raise SAEError(f"k is not in the file · {path} · pass --k-sae N, the number after L0_ in the repository's name")
    sae.activation, sae.k = "topk", int(k or found[-1])
    sae.info = {"layer": hook_layer(path.name), "model": next(iter(re.findall(r"Qwen[\w.]+-[\d.]+B(?:-Base)?", str(path))), None)}


# by the first word of a layout
READ = {"Gemma": read_gemma_scope, "SAELens": read_saelens, "sparsify": read_sparsify, "Llama": read_openmoss, "OpenMOSS": read_openmoss,
        "dictionary_learning": read_dictionary_learning, "Qwen-Scope": read_qwen_scope, "sparserm": read_own}


NEEDS = {"relu": (), "topk": (), "groupmax": (), "jumprelu": ("threshold",), "gated": ("b_gate", "b_mag", "r_mag")}


def check_shapes(sae, path):
    """Refuse tensors that do not fit together, and NaN or Inf."""
    if sae.W_enc.dim() != 2 or 0 in sae.W_enc.shape:
        raise SAEError(f"W_enc has shape {list(sae.W_enc.shape)}, expected [d_model, d_sae] · {path} · not an SAE")
    d, m = sae.W_enc.shape
    shapes = {"W_dec": (m, d), "b_dec": (d,), "b_in": (d,)}
    for name in NAMES:
        tensor, wanted = getattr(sae, name), shapes.get(name, (d, m) if name == "W_enc" else (m,))
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            raise SAEError(f"{name} has shape {list(tensor.shape)}, expected {list(wanted)} from W_enc [{d}, {m}] · {path} · "
                           "the checkpoint is damaged or mislabelled")
        parts = tensor.split(max(1, 2**24 // tensor[0].numel()))            # a sum in another dtype copies what it sums
        if not tensor.is_floating_point() or not all(torch.isfinite(part.sum(dtype=torch.float32)) for part in parts):
            raise SAEError(f"{name} holds NaN or Inf, or is not a float tensor · {path} · fetch the file again")
    if str(sae.activation) not in NEEDS or sae.norm not in ("none", "constant_norm_rescale", "layer_norm"):
        raise SAEError(f"activation {sae.activation!r}, norm {sae.norm!r} · {path} · fetch the file again")
    if sae.activation in ("topk", "groupmax") and not (type(sae.k) is int and 0 < sae.k <= m) or (
            sae.activation == "groupmax" and m % sae.k):
        raise SAEError(f"k = {sae.k} does not fit {m} latents · {path} · pass the right k")
    missing = [name for name in NEEDS[sae.activation] if getattr(sae, name) is None]
    if missing:
        raise SAEError(f"tensor {missing[0]} is missing · {path} · the checkpoint is not complete")


if __name__ == "__main__":
    sys.modules["sae"] = sys.modules["__main__"]        # sae_tools.py and the stages import this very module
    importlib.import_module("parts.files").run_main(importlib.import_module("parts.sae_tools").main, SAEError)
