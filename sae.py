"""Sparse autoencoders of a residual stream: one form in memory, every published layout read into it, one trainer.

    pre  = (z - b_in) @ W_enc + b_enc        z [.., d_model], the residual stream after block L, unscaled
    f    = activation(pre)                   [.., d_sae] >= 0, mostly 0; a latent "fires" where f > 0
    z'   = f @ W_dec + b_dec                 row j of W_dec is the direction of latent j

    python sae.py info  PATH
    python sae.py check PATH --model M --texts FILE
    python sae.py train --model demo --layer 16 --texts FILE --width 4608 --k 64 --out my-sae.safetensors

This file needs torch, numpy and safetensors only (huggingface_hub for hub:…) and can be copied alone; `train` and `check`
also need 01_extract.py.
"""

import argparse
import importlib
import json
import math
import os
import re
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # only the name of an error

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


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


# ---------------------------------------------------------------- our own file

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "b_in", "threshold", "b_gate", "b_mag", "r_mag")


def write_tensors(path, tensors, text):
    """Write safetensors with the metadata key `sparserm` through a temporary name: a kill leaves the old file or the new."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.touch()
        mode = part.stat().st_mode              # safetensors would leave a file that only its owner can read
        save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, part, metadata={"sparserm": text})
        part.chmod(mode)
        os.replace(part, path)
    except SafetensorError as error:
        raise SAEError(f"cannot be written ({error}) · {path} · check the rights and the free space") from None
    finally:
        part.unlink(missing_ok=True)


def save_sae(sae, path, dtype=torch.float32):
    """Write our own layout: the tensors, and one metadata key `sparserm` (sorted JSON)."""
    info = {n: v for n, v in sae.info.items() if n not in ("file", "weights")}          # where it was read from
    info |= {"stage": "sae", "activation": sae.activation, "k": sae.k, "norm": sae.norm}
    write_tensors(path, {n: getattr(sae, n).to(dtype) for n in NAMES if getattr(sae, n) is not None}, json.dumps(info, sort_keys=True))


# ---------------------------------------------------------------- reading what others publish

def load_sae(path, dtype=torch.float32, device="cpu", k=None, revision=None):
    """Any layout of LAYOUTS below → SAE. `path`: file, folder, hub:REPO[:SUBFOLDER]. Errors: SAEError.

    Nothing in a checkpoint is run: no pickle but a third party's .pt, and that with weights_only=True.
    """
    weights, config = find_checkpoint(path, revision)
    tensors, own = read_tensors(weights)
    layout = own.get("stage") and "sparserm" or layout_of(tensors, config, weights)
    try:
        sae = BUILD[layout](tensors, own if layout == "sparserm" else config, weights, k)
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


# A layout is told by the names of its tensors (first match), never by a folder's name.
LAYOUTS = (
    ("Gemma Scope", {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}),
    ("sparsify", {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}),
    ("dictionary_learning TopK", {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k"}),
    ("dictionary_learning gated", {"encoder.weight", "decoder.weight", "gate_bias", "mag_bias", "r_mag", "decoder_bias"}),
    ("dictionary_learning", {"encoder.weight", "encoder.bias", "decoder.weight", "bias"}),
    ("Llama Scope", {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}),
    ("OpenMOSS", {"W_E", "b_E", "W_D", "b_D"}),
    ("dictionary_learning Matryoshka", {"W_enc", "W_dec", "b_enc", "b_dec", "k", "group_sizes"}),
    ("Qwen-Scope", {"W_enc", "W_dec", "b_enc", "b_dec", ".pt"}),
    ("SAELens", {"W_enc", "W_dec", "b_dec"}),
)


def layout_of(tensors, config, path):
    """Names of the tensors → the name of the layout; refuses what is no SAE of a residual stream."""
    extra = set(tensors) & {"W_skip", "affine_skip_connection", "W_gate_enc", "encoder_glu.weight"}
    nested = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    flags = [n for n in ("transcode", "skip_connection", "use_glu_encoder", "affine_skip_connection") if config.get(n) is True]
    if extra or flags:
        raise SAEError(f"refused: {', '.join(sorted(extra | set(flags)))} means a transcoder, a skip connection or a GLU encoder, "
                       f"not an SAE of one activation · {path} · choose a residual-stream SAE")
    hooks = [str(c.get(n)) for c in (config, nested) for n in ("hook_name", "hook_point", "hook_point_in", "hf_hook_point_in",
             "hook_point_out", "hf_hook_point_out") if c.get(n)] + re.findall(r"layers\.\d+\.[a-z_.]+", path.parent.name)
    hooks += [str(config["trainer"].get("submodule_name"))] if isinstance(config.get("trainer"), dict) else []
    differ = [config[a] for a, b in (("hook_point_in", "hook_point_out"), ("hf_hook_point_in", "hf_hook_point_out"))
              if config.get(a) and config.get(b) and config[a] != config[b]]
    wrong = [h for h in hooks if re.search(r"mlp|attn|attention|hook_z|\.q\b|\.k\b|\.v\b|hook_resid_(pre|mid)", h)]
    wrong += differ
    if wrong:
        raise SAEError(f"refused: trained on {wrong[0]}, not on a block's output · {path} · choose a residual-stream (resid_post) SAE")
    is_pt = path.suffix == ".pt"
    if is_pt and {"W_enc", "W_dec", "threshold"} <= set(tensors) and "k" not in tensors:
        return "dictionary_learning JumpReLU"
    for name, keys in LAYOUTS:
        if keys <= set(tensors) | ({".pt"} if is_pt else set()):
            return name
    raise SAEError(f"unknown layout · {path} holds {', '.join(sorted(tensors)[:12]) or 'no tensors'} · known: "
                   f"{', '.join(name for name, _ in LAYOUTS)}")


def hook_layer(name):
    """blocks.12.hook_resid_post, model.layers.12.output, layers.12 … → 12, or None."""
    found = re.search(r"(?:blocks|layers|layer|h|L)[._]?(\d+)", str(name))
    return int(found[1]) if found else None


def fold_scale(sae, scale_in, scale_out, why, path):
    """Trained on scale_in · z, its output scale_out · z: put both into the weights; f stays what it was."""
    check_shapes(sae, path)
    sae.W_enc = sae.W_enc.float() * scale_in
    sae.b_in = sae.b_in.float() / scale_in
    sae.W_dec, sae.b_dec = sae.W_dec.float() / scale_out, sae.b_dec.float() / scale_out
    sae.info["folded"] = why
    return sae


def gate_by_norm(sae, path):
    """The gate compares pre · ‖decoder row‖ with the threshold: θ_j = θ / ‖d_j‖, or a rescaled TopK."""
    check_shapes(sae, path)
    norm = sae.W_dec.float().norm(dim=1)
    if sae.activation == "jumprelu":
        sae.threshold = sae.threshold.float() / norm
    elif sae.activation in ("topk", "groupmax"):
        sae.W_enc, sae.b_enc, sae.W_dec = sae.W_enc.float() * norm, sae.b_enc.float() * norm, sae.W_dec.float() / norm[:, None]
    sae.info["folded"] = " and ".join(filter(None, [sae.info.get("folded"), "decoder norms into the gate"]))
    return sae


def full(value, like):
    """A scalar threshold → one for each latent [d_sae]."""
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        raise TypeError("the threshold is not a float tensor")
    value = torch.as_tensor(value, dtype=torch.float32).flatten()
    return value.expand(len(like)).clone() if len(value) == 1 else value


def from_own(t, config, path, k):
    """Ours: the tensors of the form in memory."""
    info = {n: v for n, v in config.items() if n not in ("activation", "k", "norm", "stage")}
    return SAE(**{n: t[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec", "b_in")}, activation=config["activation"], k=config["k"],
               norm=config["norm"], **{n: t[n] for n in NAMES[5:] if n in t}, info=info)


def from_gemma_scope(t, config, path, k):
    """Gemma Scope 1 (npz) and 2 (safetensors): JumpReLU, nothing scaled. Layer and L0 stand in the path or config."""
    hook = config.get("hf_hook_point_in") or (re.findall(r"layer_\d+", str(path)) or [None])[-1]
    l0 = config.get("l0") or next(iter(re.findall(r"l0_(\d+)", str(path.parent))), None)
    info = {"model": config.get("model_name"), "hook": hook, "layer": hook_layer(hook), "l0": l0 and float(l0)}
    return SAE(t["w_enc"], t["b_enc"], t["w_dec"], t["b_dec"], torch.zeros_like(t["b_dec"]), "jumprelu",
               threshold=t["threshold"], info=info)


def from_saelens(t, config, path, k):
    """SAELens v3 to v6: cfg.json decides the activation and what is subtracted, scaled or normalised."""
    if not config:
        raise SAEError(f"cfg.json is missing · beside {path} · it decides the activation and the scale; fetch the whole folder")
    meta = {**config, **config.get("metadata", {})}
    kwargs = config.get("activation_fn_kwargs") or {}
    kind = config.get("architecture", "standard")
    if kind == "standard" and (config.get("activation_fn_str") or config.get("activation_fn")) == "topk":
        kind, config = "topk", {**kwargs, **config}
    if kind == "standard" and config.get("activation_fn_str", "relu") != "relu":
        raise SAEError(f"refused: activation_fn_str {config['activation_fn_str']} · {path} · relu and topk are read")
    names = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
    if kind not in names:
        raise SAEError(f"refused: architecture {kind} · {path} · standard, topk, jumprelu and gated are read")
    factor = t.get("scaling_factor", t.get("finetuning_scaling_factor"))
    if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
        raise SAEError(f"refused: the tensor scaling_factor is not all ones · {path} · its meaning is not settled")
    norm = config.get("normalize_activations", "none")
    norm = {True: "expected_average_only_in", False: "none", None: "none"}.get(norm, norm) if not isinstance(norm, str) else norm
    if norm not in ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"):
        raise SAEError(f"refused: normalize_activations {norm} · {path} · its meaning is not known here")
    b_dec = t["b_dec"]
    sae = SAE(t["W_enc"], t["b_enc"] if kind != "gated" else torch.zeros_like(t["b_gate"]), t["W_dec"], b_dec,
              b_dec if config.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec), names[kind],
              norm=norm if norm in ("constant_norm_rescale", "layer_norm") else "none",
              info={"model": meta.get("model_name"), "hook": meta.get("hook_name") or meta.get("hook_point"),
                    "layer": hook_layer(meta.get("hook_name") or meta.get("hook_point")), "neuronpedia": meta.get("neuronpedia_id")})
    if kind == "topk":
        sae.k = int(config["k"])
        sae = gate_by_norm(sae, path) if config.get("rescale_acts_by_decoder_norm") else sae
    if kind == "jumprelu":
        sae.threshold = t["threshold"]
    if kind == "gated":
        sae.b_gate, sae.b_mag, sae.r_mag = t["b_gate"], t["b_mag"], t["r_mag"]
    if norm == "expected_average_only_in":
        scale = config.get("norm_scaling_factor") or meta.get("norm_scaling_factor")
        if not scale:
            raise SAEError(f"refused: normalize_activations expected_average_only_in without norm_scaling_factor · {path} · "
                           "the scale of the data set is not in the file; fold it with SAELens and save again")
        sae = fold_scale(sae, float(scale), float(scale), f"input scale {scale:.6g}", path)
    return sae


def from_sparsify(t, config, path, k):
    """EleutherAI sparsify: TopK or GroupMax; the folder is named after the hook point."""
    hook = path.parent.name
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise SAEError(f"refused: activation {activation} · {path} · topk and groupmax are read")
    return SAE(t["encoder.weight"].T, t["encoder.bias"], t["W_dec"], t["b_dec"], t["b_dec"], activation, k=int(k or config["k"]),
               info={"hook": hook, "layer": hook_layer(hook), "model": config.get("model")})


def from_openmoss(t, config, path, k):
    """Llama Scope and newer: trained on √d / (mean norm) · z; the gate may look at decoder norms.

    The scalar jump_relu_threshold is in units of the raw stream, a log_jumprelu_threshold tensor in those of training.
    """
    new = "W_E" in t
    W_enc, b_enc = (t["W_E"], t["b_E"]) if new else (t["encoder.weight"].T, t["encoder.bias"])
    W_dec, b_dec = (t["W_D"], t["b_D"]) if new else (t["decoder.weight"].T, t["decoder.bias"])
    act = config.get("act_fn", "jumprelu")
    if act not in ("relu", "topk", "jumprelu"):
        raise SAEError(f"refused: act_fn {act} · {path} · relu, topk and jumprelu are read")
    norm = config.get("norm_activation", "dataset-wise")
    hook = config.get("hook_point_in") or config.get("hook_point") or ""
    model = config.get("model_name") or (re.findall(r"Llama3_1-8B-Base", str(path)) or [None])[0]
    stored = {side: t.get(f"dataset_average_activation_norm.{config.get(f'hook_point_{side}')}") for side in ("in", "out")}
    mean = config.get("dataset_average_activation_norm") or (None if None in stored.values() else {n: float(v) for n, v in stored.items()})
    root = math.sqrt(W_enc.shape[0])
    sae = SAE(W_enc, b_enc, W_dec, b_dec, b_dec if config.get("apply_decoder_bias_to_pre_encoder") else torch.zeros_like(b_dec),
              act, norm="constant_norm_rescale" if norm == "token-wise" else "none",
              info={"hook": hook, "layer": hook_layer(hook), "model": model})
    if act == "topk":
        sae.k = int(k or config["top_k"])
    if act == "jumprelu":
        stored = t.get("log_jumprelu_threshold", t.get("activation_function.log_jumprelu_threshold"))
        in_raw_units = root / mean["in"] if mean and norm == "dataset-wise" else 1.0      # only the number in the config is
        sae.threshold = full(stored, b_enc).exp() if stored is not None else full(config["jump_relu_threshold"] * in_raw_units, b_enc)
    if config.get("sparsity_include_decoder_norm"):
        sae = gate_by_norm(sae, path)               # before the scale: the norms as stored
    if norm == "dataset-wise":
        if not mean:
            raise SAEError(f"refused: norm_activation dataset-wise without dataset_average_activation_norm · {path} · "
                           "the scale is not in the file")
        why = " and ".join(filter(None, [sae.info.get("folded"), f"input scale √d / {mean['in']:.6g}"]))
        sae = fold_scale(sae, root / mean["in"], root / mean["out"], why, path)
    elif norm not in ("inference", "token-wise"):
        raise SAEError(f"refused: norm_activation {norm} · {path} · dataset-wise, inference and token-wise are read")
    return sae


def from_dictionary_learning(t, config, path, k):
    """dictionary_learning: relu, gated, TopK, BatchTopK (a JumpReLU at inference), Matryoshka, JumpReLU."""
    trainer = config.get("trainer", {})
    kind = trainer.get("dict_class", "")
    info = {"model": trainer.get("lm_name"), "layer": trainer.get("layer"), "hook": trainer.get("submodule_name")}
    info["layer"] = info["layer"] if isinstance(info["layer"], int) else hook_layer(info["layer"])
    if "gate_bias" in t:
        b_dec, m = t["decoder_bias"], len(t["r_mag"])
        return SAE(t["encoder.weight"].T, torch.zeros(m), t["decoder.weight"].T, b_dec, b_dec, "gated", b_gate=t["gate_bias"],
                   b_mag=t["mag_bias"], r_mag=t["r_mag"], info=info)
    if "k" not in t and "threshold" in t:
        return SAE(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], torch.zeros_like(t["b_dec"]), "jumprelu",
                   threshold=full(t["threshold"], t["b_enc"]), info=info)
    if "k" not in t:
        return SAE(t["encoder.weight"].T, t["encoder.bias"], t["decoder.weight"].T, t["bias"], t["bias"], "relu", info=info)
    W = (t["W_enc"], t["b_enc"], t["W_dec"]) if "W_enc" in t else (t["encoder.weight"].T, t["encoder.bias"], t["decoder.weight"].T)
    sae = SAE(*W, t["b_dec"], t["b_dec"], "topk", k=int(t["k"]), info=info)
    threshold = float(t.get("threshold", -1.0))
    if "BatchTopK" in kind or "group_sizes" in t or (not kind and threshold >= 0):
        if not kind and "group_sizes" not in t:
            info["warning"] = "no config: read as a BatchTopK SAE, because a threshold is set"
        if threshold < 0:
            info["warning"] = "the threshold of this BatchTopK SAE was never set: top-k per token is used"
        else:
            sae.activation, sae.k, sae.threshold = "jumprelu", 0, full(threshold, W[1])
    return sae


def from_qwen_scope(t, config, path, k):
    """Qwen-Scope: TopK; k stands in the repository's name only (…-L0_50)."""
    found = re.findall(r"L0_(\d+)", str(path))
    if not (k or found):
        raise SAEError(f"k is not in the file · {path} · pass --k-sae N, the number after L0_ in the repository's name")
    return SAE(t["W_enc"].T, t["b_enc"], t["W_dec"].T, t["b_dec"], torch.zeros_like(t["b_dec"]), "topk", k=int(k or found[-1]),
               info={"layer": hook_layer(path.name), "model": next(iter(re.findall(r"Qwen[\w.]+-[\d.]+B(?:-Base)?", str(path))), None)})


BUILD = {"sparserm": from_own, "Gemma Scope": from_gemma_scope, "SAELens": from_saelens, "sparsify": from_sparsify,
         "Llama Scope": from_openmoss, "OpenMOSS": from_openmoss, "Qwen-Scope": from_qwen_scope,
         **{f"dictionary_learning{kind}": from_dictionary_learning for kind in ("", " TopK", " gated", " Matryoshka", " JumpReLU")}}


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


# ---------------------------------------------------------------- health, on a model's own activations

def health(sae, z):
    """How well the SAE fits residual vectors z [n, d] → dict.

    explained variance = 1 - Σ‖z - z'‖² / Σ‖z - mean‖² around the mean of *these* vectors: give the vectors of the
    scored token alone, or their common mean, far from all others, hides a bad fit.
    """
    error = torch.zeros((), dtype=torch.float64)
    alive, fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=z.device), 0
    for chunk in z.split(1024):
        f = sae.encode(chunk)
        error += (sae.decode(f, like=chunk).float() - chunk.float()).square().sum().double().cpu()
        alive |= (f > 0).any(0)
        fired += int((f > 0).sum())
    total = (z.float() - z.float().mean(0)).square().sum().double().cpu()
    return {"explained_variance": float(1 - error / total), "l0": fired / len(z), "silent": float((~alive).float().mean()), "n": len(z)}


def read_texts(path):
    """Texts of a JSONL file (also .gz): rows with `text`, with `messages`, or pairs → list of str or messages."""
    stage1, texts = importlib.import_module("01_extract"), []
    for _, row in stage1.read_rows(path):
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
        elif isinstance(row.get("messages"), list):
            texts.append(row["messages"])
        else:
            found = stage1.pairs_of_row(row)
            for prompt, chosen, rejected in found if isinstance(found, list) else []:
                turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
                texts += [[*turns, {"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
    if not texts:
        raise SAEError(f"no texts · {path} · rows need text, messages, or prompt, chosen, rejected")
    return texts


def sequences_of(backbone, texts, max_length, cuts=0, rng=None):
    """Texts → (token sequences, for each whether its last token is a scored one).

    `cuts`: each conversation also ends `cuts` times at a random place of its answer, closed with the template's own
    end. In the tree that is a branch of two tokens, and every one is a new scored position.
    """
    stage1, sequences, scored = importlib.import_module("01_extract"), [], []
    for text in texts:
        if isinstance(text, str):
            ids = backbone.tokenizer(text)["input_ids"]
            parts = [ids[i:i + max_length] for i in range(0, len(ids), max_length)]
            sequences += [p for p in parts if len(p) > 1]
            scored += [False] * (len(sequences) - len(scored))
            continue
        text = stage1.render(backbone.tokenizer, text[:-1], text[-1]["content"])
        start = max(text.first + 1, min(text.last, max_length))
        ends = [text.last] + [int(c) for c in rng.integers(text.first + 1, start + 1, cuts)] if cuts else [text.last]
        for end in dict.fromkeys(e for e in ends if e <= max_length):
            sequences.append(text.ids[:end] + text.ids[text.last:])
            scored.append(True)
    return sequences, scored


def activations(backbone, texts, layer, max_length, cuts=0, rng=None, repeats=False):
    """Yield (all [n, d], scored [m, d]) a forward pass, without position 0. A token that texts share (a system prompt) comes
    once a pass, or with `repeats` as often as it stands in the texts.

    The first token is an attention sink: its vector is huge, the same in every text, and says nothing.
    """
    stage1 = importlib.import_module("01_extract")
    sequences, scored = sequences_of(backbone, texts, max_length, cuts, rng)
    for members, (hidden,) in stage1.hidden_rows(backbone, sequences, [layer]):
        every = np.concatenate([path[1:] for _, path in members])
        every = every if repeats else np.unique(every)
        ends = np.array([path[-1] for i, path in members if scored[i]], dtype=int)
        hidden = hidden.float().cpu()
        yield hidden[torch.from_numpy(every)], hidden[torch.from_numpy(ends)]


def sample_activations(backbone, texts, layer, max_length=512):
    """→ (all tokens [n, d], scored tokens [m, d]) of some texts as they are, for health()."""
    rows = list(activations(backbone, texts, layer, max_length, repeats=True))
    return torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows])


# ---------------------------------------------------------------- training a TopK SAE

def train(backbone, texts, layer, args, progress=print):
    """Train on streamed activations through a shuffle buffer → SAE, written to args.out. Settings: see `train --help`.

    TopK (Gao et al. 2024): loss = error / variance, of all tokens and of scored ones, each around its own mean and
    weighted by the end share; AuxK: latents that have not fired lately learn to explain what is left; decoder rows
    have norm 1; Adam with warm-up and linear decay.
    """
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    held, order = order[:max(2, min(400, len(order) // 20))], order[max(2, min(400, len(order) // 20)):]
    held = sample_activations(backbone, [texts[i] for i in held], layer, args.max_length)
    stream = stream_batches(backbone, [texts[i] for i in order], layer, args, generator)
    state = start_state(next(stream), args, generator)
    if resume(state, args):                         # go on with other texts first than those already seen
        order = [order[i] for i in torch.randperm(len(order), generator=generator.manual_seed(args.seed + state["step"])).tolist()]
        stream = stream_batches(backbone, [texts[i] for i in order], layer, args, generator)
    steps = max(1, args.tokens // args.batch)
    for step, batch in enumerate(stream, start=state["step"] + 1):
        warm, left = min(1, step / max(1, steps // 20)), min(1, (steps - step + 1) / max(1, steps * 0.3))
        for group in state["adam"].param_groups:
            group["lr"] = args.lr * warm * max(0.0, left)
        train_step(state, batch, args)
        state["step"] = step
        if step % max(1, steps // 20) == 0 or step == steps:
            sae = finish(state, args, layer)
            every, ends = health(sae, held[0]), health(sae, held[1]) if len(held[1]) > 1 else {}
            progress(f"step {step}/{steps}  all tokens: explained {every['explained_variance']:.3f}  L0 {every['l0']:.1f}  silent "
                     f"{every['silent']:.1%}  scored token: explained {ends.get('explained_variance', float('nan')):.3f}")
            save_checkpoint(state, args)
        if step >= steps:
            break
    sae.info.update(model=backbone.meta["model"], template=backbone.meta["template"], texts=Path(args.texts).name,
                    held_out={"all": every, "scored": ends}, tokens=steps * args.batch, start=args.start and Path(args.start).name,
                    settings={n: getattr(args, n) for n in ("k", "end_share", "cuts", "turns", "lr", "batch", "buffer", "seed",
                                                             "max_length")})
    save_sae(sae, args.out, torch.float16)
    checkpoint_path(args).unlink(missing_ok=True)       # only now: a kill in between loses nothing
    return sae


def stream_batches(backbone, texts, layer, args, generator):
    """Yield (all [b, d], scored [e, d]) for ever, mixed by a shuffle buffer; scored ones are drawn from the newest."""
    rng = np.random.default_rng(args.seed)
    pool, ends, ahead = [], torch.empty(0), 0
    talks = [t for t in texts if not isinstance(t, str)]
    take = args.batch - int(args.batch * args.end_share)
    while True:
        for at in range(0, len(texts), 64):
            some = [longer_talk(t, talks, args.turns, rng) for t in texts[at:at + 64]]
            for every, last in activations(backbone, some, layer, args.max_length, args.cuts, rng):
                pool.append(every)
                ends = torch.cat([ends.view(-1, last.shape[1]), last])[-args.buffer:]
                ahead += len(every)
            if ahead < args.buffer:
                continue
            pool = torch.cat(pool)[torch.randperm(ahead, generator=generator)]
            while len(pool) > max(args.buffer // 2, take):
                batch, pool = pool[:take], pool[take:]
                drawn = torch.randint(max(1, len(ends)), (args.batch - take if len(ends) else 0,), generator=generator)
                yield batch, ends[drawn]
            pool, ahead = [pool], len(pool)
        if ahead < args.buffer:                     # few texts: a smaller buffer will do
            args.buffer = max(args.batch, ahead)


def longer_talk(text, talks, turns, rng):
    """Half of the conversations go on from up to `turns` - 1 others: the end of a later turn is not the end of a first one."""
    if isinstance(text, str) or turns < 2 or rng.random() < 0.5:
        return text
    before = [talks[i] for i in rng.integers(len(talks), size=rng.integers(1, turns))]
    return [turn for talk in [*before, text] for turn in talk if turn["role"] != "system"]


def start_state(first, args, generator):
    """Parameters, Adam and what is counted. Inputs are scaled to norm √d while training; folded at the end."""
    every, ends = first
    d = every.shape[1]
    scale = math.sqrt(d) / every.norm(dim=1).mean()
    W_dec = F.normalize(torch.randn(args.width, d, generator=generator), dim=1)
    b_dec = (every * scale).mean(0)
    parameters = {"W_enc": W_dec.T.clone(), "b_enc": torch.zeros(args.width), "W_dec": W_dec, "b_dec": b_dec}
    if args.start:
        sae = load_sae(args.start)
        found, wanted = (sae.activation, sae.k, sae.norm, *sae.W_enc.shape), ("topk", args.k, "none", d, args.width)
        if found != wanted or not torch.equal(sae.b_in, sae.b_dec) or sae.info.get("layer") not in (None, args.layer):
            raise SAEError(f"training cannot go on from this SAE {found}, layer {sae.info.get('layer')} · --start {args.start} · needed "
                           f"are {wanted}, layer {args.layer} and b_dec subtracted")
        norm = sae.W_dec.norm(dim=1)            # put into the encoder: training keeps decoder rows at norm 1
        parameters = {"W_enc": sae.W_enc * norm, "b_enc": sae.b_enc * norm * scale, "W_dec": sae.W_dec / norm[:, None],
                      "b_dec": sae.b_dec * scale}
    parameters = {n: p.requires_grad_() for n, p in parameters.items()}
    variance = [float((x * scale).var(0).sum()) if len(x) > 1 else 1.0 for x in (every, ends)]
    return {**parameters, "scale": scale, "variance": variance, "step": 0, "idle": torch.zeros(args.width),
            "adam": torch.optim.Adam(parameters.values(), lr=args.lr, betas=(0.9, 0.999), fused=True)}


def train_step(state, batch, args):
    """One step of Adam on the two pools."""
    x = torch.cat(batch) * state["scale"]
    W_enc, b_enc, W_dec, b_dec = (state[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    pre = torch.relu((x - b_dec) @ W_enc + b_enc)
    best = pre.topk(args.k, sorted=False)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    error = x - (f @ W_dec + b_dec)
    n = len(batch[0])
    share = args.end_share if len(batch[1]) else 0.0
    squared = error.square().sum(1)
    loss = (1 - share) * squared[:n].mean() / state["variance"][0]
    if share:
        loss = loss + share * squared[n:].mean() / state["variance"][1]
    with torch.no_grad():
        state["idle"] += len(x)
        state["idle"][best.indices[best.values > 0]] = 0
    dead = (state["idle"] > args.dead_after).nonzero().flatten()
    if len(dead):                                   # AuxK: dead latents model the error that the living ones leave
        aux = pre[:, dead].topk(min(len(dead), x.shape[1] // 2), sorted=False)
        aux_f = torch.zeros(len(x), len(dead)).scatter(-1, aux.indices, aux.values)
        rest = error.detach()
        loss = loss + ((aux_f @ W_dec[dead] - rest).square().sum() / rest.square().sum().clamp_min(1e-8)) / 32
    state["adam"].zero_grad()
    loss.backward()
    state["adam"].step()
    with torch.no_grad():
        W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))


def finish(state, args, layer):
    """The trained parameters in raw units → SAE."""
    W_enc, b_enc, W_dec, b_dec = (state[n].detach().clone() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    sae = SAE(W_enc, b_enc / state["scale"], W_dec, b_dec / state["scale"], b_dec / state["scale"], "topk", k=args.k,
              info={"layer": layer, "hook": f"model.layers.{layer}.output"})
    return sae              # f in raw units: z·s = W f + b  ⇔  z = W (f/s) + b/s, with rows of W still of norm 1


def checkpoint_path(args):
    """Where an interrupted training left its state."""
    return Path(args.out).with_suffix(".checkpoint.safetensors")


def save_checkpoint(state, args):
    """Parameters, Adam's moments and the step: the same command goes on from here."""
    tensors = {n: state[n].detach() for n in ("W_enc", "b_enc", "W_dec", "b_dec", "idle")}
    tensors |= {f"adam{i}.{key}": value for i, s in state["adam"].state_dict()["state"].items() for key, value in s.items()}
    tensors |= {"scale": state["scale"], "variance": torch.tensor(state["variance"]), "step_done": torch.tensor(state["step"])}
    write_tensors(checkpoint_path(args), tensors, training_key(args))


def training_key(args):
    """The settings a checkpoint must share with the command that goes on from it."""
    names = ("model", "layer", "texts", "start", "width", "k", "end_share", "cuts", "turns", "tokens", "batch", "lr", "seed",
             "max_length", "dead_after")
    return json.dumps({n: getattr(args, n) for n in names}, sort_keys=True)


def resume(state, args):
    """Take up a checkpoint of the same settings → whether there is one."""
    path = checkpoint_path(args)
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            key, t = (file.metadata() or {}).get("sparserm"), {n: file.get_tensor(n) for n in file.keys()}
    except SafetensorError:
        key, t = None, {}
    names = {f"adam{i}.{what}" for i in range(4) for what in ("step", "exp_avg", "exp_avg_sq")}
    if set(t) != names | {"W_enc", "b_enc", "W_dec", "b_dec", "idle", "scale", "variance", "step_done"}:
        raise SAEError(f"not a complete checkpoint · {path} · delete it: training then begins anew")
    if key != training_key(args):
        raise SAEError(f"a checkpoint of other settings lies there · {path} · delete it, or pass the settings it was made with")
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            state[name].copy_(t[name])
    moments = {}
    for name in t:
        if name.startswith("adam"):
            i, _, key = name.removeprefix("adam").partition(".")
            moments.setdefault(int(i), {})[key] = t[name]
    state["adam"].load_state_dict({**state["adam"].state_dict(), "state": moments})
    step = min(int(t["step_done"]), max(1, args.tokens // args.batch) - 1)       # killed after the last: do that one again
    state.update(scale=t["scale"], variance=t["variance"].tolist(), step=step, idle=t["idle"])
    return True


# ---------------------------------------------------------------- commands

def warnings_of(sae, every=None, ended=None):
    """What looks wrong → list of sentences with the likely cause."""
    found, model = [sae.info["warning"]] if sae.info.get("warning") else [], str(sae.info.get("model") or "")
    families = re.search(r"(?i)llama-?3|gemma|qwen", model) and not re.search(r"(?i)it\b|instruct|chat", model)
    if re.search(r"(?i)base\b", model) or families:
        found.append(f"trained on {model}, by its name a base model: on an instruct model look at the explained variance")
    seen = every or ended
    if every and every["explained_variance"] < 0.3:
        found.append(f"explained variance {every['explained_variance']:.2f} over all tokens: the layer is off by one, the scale is wrong, "
                     "or the SAE belongs to another model")
    stated = sae.k or sae.info.get("l0")
    if seen and stated and seen["l0"] > 2 * float(stated):
        found.append(f"L0 {seen['l0']:.0f}, stated {float(stated):.0f}: a wrong scale or threshold, or BOS missing")
    if ended and ended["explained_variance"] < 0.2 and (not every or every["explained_variance"] >= 0.3):
        found.append(f"explained variance {ended['explained_variance']:.2f} at the scored token: the SAE has hardly seen a chat template; "
                     "try --token content")
    return found


def describe(sae):
    """The lines of `sae.py info`."""
    norms, i = sae.W_dec.float().norm(dim=1), sae.info
    numbers = f"k = {sae.k}" if sae.k else f"threshold {float(sae.threshold.min()):.4g} … {float(sae.threshold.max()):.4g}" \
        if sae.threshold is not None else ""
    lines = {"layout": i.get("layout"), "model": i.get("model") or "not stated", "layer": i.get("layer"), "hook": i.get("hook"),
             "width": f"{sae.d_model} → {sae.d_sae}", "activation": f"{sae.activation} {numbers}",
             "input": ("b_dec subtracted" if sae.b_in.any() else "nothing subtracted") + f", per-token scaling {sae.norm}",
             "decoder norms": f"{norms.min():.3f} … {norms.max():.3f}", "folded": i.get("folded") or "nothing", "stated L0": i.get("l0"),
             "held out": i.get("held_out"), "settings": i.get("settings")}
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items() if value is not None)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    load = argparse.ArgumentParser(add_help=False)
    load.add_argument("path", help="SAE file or folder, hub:REPO[:SUBFOLDER]")
    load.add_argument("--k-sae", type=int, help="k of a TopK SAE whose files do not hold it (Qwen-Scope)")
    load.add_argument("--revision", help="branch, tag or commit on the hub")
    load.add_argument("--sae-dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="in memory (default float32)")
    sub.add_parser("info", parents=[load], help="what a checkpoint is and how it was read")
    check = sub.add_parser("check", parents=[load], help="how well it fits a model on your texts")
    run = sub.add_parser("train", help="train a TopK SAE", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for q in (check, run):
        q.add_argument("--model", default="demo", help="demo, a hub name, a folder or a .gguf file")
        q.add_argument("--texts", required=True, help="JSONL with text, messages, or prompt, chosen, rejected")
        q.add_argument("--layer", type=int, help="block L, 0-based (check: the SAE's own)")
        q.add_argument("--max-length", type=int, default=256, help="tokens of a text")
        q.add_argument("--limit", type=int, default=400 if q is check else None, help="use only so many texts")
        q.add_argument("--seed", type=int, default=0, help="of the shuffling and the start")
    run.add_argument("--out", required=True, help="file to write, .safetensors")
    run.add_argument("--width", type=int, default=4608, help="number of latents")
    run.add_argument("--k", type=int, default=64, help="latents that may fire")
    run.add_argument("--end-share", type=float, default=0.33, help="share of scored positions in a batch")
    run.add_argument("--cuts", type=int, default=4, help="extra scored positions a conversation, its answer cut anywhere")
    run.add_argument("--turns", type=int, default=3, help="half of the conversations are joined to up to so many turns")
    run.add_argument("--start", help="go on from this TopK SAE, e.g. one that has not seen your chat template")
    run.add_argument("--tokens", type=int, default=2_000_000, help="activations to train on")
    run.add_argument("--batch", type=int, default=1024, help="activations a step")
    run.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of Adam")
    run.add_argument("--buffer", type=int, default=65536, help="activations in the shuffle buffer")
    run.add_argument("--dead-after", type=int, default=100_000, help="activations without firing after which a latent counts as dead")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p.parse_args([a for a in sys.argv[1:] if a != "--debug"])


def main():
    args = parse_args()
    if args.command == "info":
        sae = load_sae(args.path, getattr(torch, args.sae_dtype), k=args.k_sae, revision=args.revision)
        print(describe(sae), *(f"warning: {w}" for w in warnings_of(sae)), sep="\n")
        return
    stage1 = importlib.import_module("01_extract")
    backbone = stage1.load_backbone(args.model)
    if args.command == "train":
        if args.layer is None or not 0 <= args.layer < len(backbone.blocks):
            raise SAEError(f"layer {args.layer} does not exist · {args.model} has blocks 0 to {len(backbone.blocks) - 1} · pass --layer")
        sae = train(backbone, read_texts(args.texts)[:args.limit], args.layer, args, lambda line: print(line, flush=True))
        print(f"\nwritten {args.out}\n{describe(sae)}\n\nnext: python 02_select_features.py --sae {args.out}")
        return
    sae = load_sae(args.path, getattr(torch, args.sae_dtype), k=args.k_sae, revision=args.revision)
    layer = args.layer if args.layer is not None else sae.info.get("layer")
    if layer is None or sae.d_model != backbone.model.config.get_text_config().hidden_size:
        raise SAEError(f"the SAE reads width {sae.d_model}, layer {layer}; {args.model} has width "
                       f"{backbone.model.config.get_text_config().hidden_size} · {args.path} · pass the right SAE, --model and --layer")
    texts = read_texts(args.texts)
    chosen = np.random.default_rng(args.seed).permutation(len(texts))[:args.limit]
    every, ends = sample_activations(backbone, [texts[i] for i in chosen], layer, args.max_length)
    figures = [health(sae, every), health(sae, ends) if len(ends) > 1 else None]
    print(describe(sae), "", sep="\n")
    for name, h in zip(("all tokens", "scored token"), figures):
        if h:
            print(f"{name:<14} explained variance {h['explained_variance']:.3f} · L0 {h['l0']:.1f} · "
                  f"latents that never fire here {h['silent']:.1%} · {h['n']} vectors")
    print(*(f"warning: {w}" for w in warnings_of(sae, *figures)), sep="\n")


if __name__ == "__main__":
    if Path(__file__).with_name("01_extract.py").exists():
        importlib.import_module("01_extract").run_main(main, SAEError)
    else:                                       # this file was copied alone
        main()
