"""sae.py against formulas.

Every published layout is written on the spot and read back. An oracle in float64 NumPy (each
family's own equations, nothing folded) says which latents fire and what the reconstruction is.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

import sae as S
from tools.train_sae import save_sae

D, M, K = 8, 24, 5      # width of the model, latents, how many of them fire in a TopK SAE


# ---------------------------------------------------------- checkpoints as others publish them

def random_weights():
    """Random tensors under their names in memory; multiples of 1/64, which half precision holds."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        numbers = torch.randn(*shape, generator=generator)
        return (numbers.mul(40).round() / 64).clamp(-3, 3)

    weights = {"W_enc": draw(D, M), "W_dec": draw(M, D), "b_dec": draw(D)}
    for name in ("b_enc", "threshold", "log_threshold", "b_gate", "b_mag", "r_mag"):
        weights[name] = draw(M)
    return weights


# a layout: (weights file, config file, {name in the file: name in memory}); .T: stored transposed
SAME = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
THETA = {"threshold": "threshold"}
SMALL_LETTERS = {name.lower(): name for name in SAME} | THETA
LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
NPZ = "layer_12/width_16k/average_l0_82/params.npz"
SAFE = "x/sae_weights.safetensors"
PT = "x/ae.pt"
LAYOUTS = {
    "gemma npz": (NPZ, "config.json", SAME | THETA),
    "gemma npz, small letters": (NPZ, "config.json", SMALL_LETTERS),
    "gemma 2": (
        "resid_post/layer_12_width_16k_l0_small/params.safetensors", "config.json", SMALL_LETTERS),
    "saelens": (SAFE, "cfg.json", SAME),
    "saelens jumprelu": (SAFE, "cfg.json", SAME | THETA),
    "saelens gated": (
        SAFE, "cfg.json",
        {name: name for name in ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")}),
    "sparsify": (
        "layers.12/sae.safetensors", "cfg.json",
        {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}),
    "llama scope": (
        "x/checkpoints/final.safetensors", "hyperparams.json", LINEAR | {"decoder.bias": "b_dec"}),
    "llama scope r1": (
        SAFE, "config.json",
        LINEAR | {"decoder.bias": "b_dec", "log_jumprelu_threshold": "log_threshold"}),
    "openmoss": (
        SAFE, "config.json", {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}),
    "dl": (PT, "config.json", LINEAR | {"bias": "b_dec"}),
    "dl new": (PT, "config.json", LINEAR | {"decoder.bias": "b_dec"}),
    "dl gated": (
        PT, "config.json",
        {"encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "decoder_bias": "b_dec",
         "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"}),
    "dl topk": (PT, "config.json", LINEAR | {"b_dec": "b_dec"}),
    "dl matryoshka": (PT, "config.json", SAME),
    "dl jumprelu": (PT, "config.json", SAME | THETA),
    "qwen": (
        f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/layer12.sae.pt", None,
        SAME | {"W_enc": "W_enc.T", "W_dec": "W_dec.T"}),
    "goodfire": (
        "x/Gemma-9B-SAE-l12.pt", None,
        {"encoder_linear.weight": "W_enc.T", "encoder_linear.bias": "b_enc",
         "decoder_linear.weight": "W_dec.T", "decoder_linear.bias": "b_dec"}),
}


def write(root, layout, config=None, extra=None, dtype=torch.float32, file=None):
    """Write one checkpoint → its folder.

    extra: tensors added or replaced, by their name in the file; None removes one.
    """
    default, config_file, names = LAYOUTS[layout]
    path = root / (file or default)
    path.parent.mkdir(parents=True, exist_ok=True)

    weights = random_weights()
    tensors = {}
    for stored, name in names.items():
        tensor = weights[name.removesuffix(".T")]
        tensors[stored] = (tensor.T if name.endswith(".T") else tensor).to(dtype).contiguous()
    tensors |= extra or {}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    if path.suffix == ".npz":
        np.savez(path, **{name: np.asarray(tensor) for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)

    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / config_file).write_text(text)
    return folder


# ---------------------------------------------------------------- the oracle

# An activation: (input, decoder norms) → (codes, what is multiplied with the decoder).
W64 = {name: tensor.numpy().astype(np.float64) for name, tensor in random_weights().items()}


def relu(x, norms):
    f = np.maximum(x @ W64["W_enc"] + W64["b_enc"], 0)
    return f, f


def topk(x, norms):
    pre = relu(x, norms)[0] * norms
    f = np.zeros((len(x), M))
    for row, values in enumerate(pre):
        for j in np.argsort(-values, kind="stable")[:K]:
            f[row, j] = values[j]
    return f, f / norms


def groupmax(x, norms, groups=6):
    pre = relu(x, norms)[0]
    f = np.zeros((len(x), M))
    size = M // groups
    for row, values in enumerate(pre):
        for first in range(0, M, size):
            best = first + np.argmax(values[first:first + size])
            f[row, best] = values[best]
    return f, f


def jumprelu(x, norms, theta=W64["threshold"]):
    pre = x @ W64["W_enc"] + W64["b_enc"]
    f = np.where((pre * norms > theta) & (pre > 0), pre, 0)
    return f, f


def gated(x, norms):
    magnitude = x @ (W64["W_enc"] * np.exp(W64["r_mag"])) + W64["b_mag"]
    f = np.where(x @ W64["W_enc"] + W64["b_gate"] > 0, np.maximum(magnitude, 0), 0)
    return f, f


jumprelu_06 = functools.partial(jumprelu, theta=0.6)
jumprelu_log = functools.partial(jumprelu, theta=np.exp(W64["log_threshold"]))
# the scalar of Llama Scope is in units of the raw stream
jumprelu_raw = functools.partial(jumprelu, theta=0.6 * np.sqrt(D) / 4)


def oracle(z, activation, subtract=True, scale=(1, 1), norms=False, token=None):
    """What a family computes for vectors z [n, d] → (codes, reconstruction), float64.

    subtract: b_dec from the input. scale: of what goes in and out. norms: decoder norms are in the
    gate. token: what every token is scaled by, its norm or (layer) its mean and deviation.
    """
    x, times, plus = z, 1, 0
    if token == "norm":
        times = np.linalg.norm(z, axis=1, keepdims=True) / np.sqrt(D)
        x = z / times
    if token == "layer":
        plus = z.mean(1, keepdims=True)
        times = z.std(1, ddof=1, keepdims=True)
        x = (z - plus) / (times + 1e-5)

    decoder_norms = np.linalg.norm(W64["W_dec"], axis=1) if norms else np.ones(M)
    b_in = W64["b_dec"] if subtract else 0
    f, decoded = activation(scale[0] * x - b_in, decoder_norms)
    return f, (decoded @ W64["W_dec"] + W64["b_dec"]) / scale[1] * times + plus


# ---------------------------------------------------------------- the families

POST = "blocks.12.hook_resid_post"
OUTPUT = "model.layers.12.output"


def lens(architecture=None, **settings):
    """cfg.json of SAELens: v6 keeps the origin in `metadata`, older ones at the top."""
    origin = {"model_name": "m", "hook_name": POST}
    if architecture:
        return {"architecture": architecture, "metadata": origin, **settings}
    return {**origin, **settings}


def moss(act="jumprelu", **settings):
    """hyperparams.json or config.json of OpenMOSS."""
    return {"act_fn": act, "hook_point_in": POST, "hook_point_out": POST, "use_glu_encoder": False,
            "norm_activation": "dataset-wise", "jump_relu_threshold": 0.6, "top_k": K,
            "dataset_average_activation_norm": {"in": 4.0, "out": 5.0}, **settings}


def dl(name, **settings):
    """config.json of dictionary_learning."""
    trainer = {"dict_class": name, "layer": 12, "lm_name": "m",
               "submodule_name": "resid_post_layer_12", **settings}
    return {"trainer": trainer}


def scalars(threshold, **more):
    """What a TopK SAE of dictionary_learning keeps beside the weights."""
    return {"k": torch.tensor(K), "threshold": torch.tensor(threshold), **more}


@dataclass
class Family:
    """A published kind of SAE: how it lies on disk, and what it computes."""
    name: str
    layout: str
    config: object                                  # None: there is no configuration
    activation: object                              # of the oracle
    reading: dict = field(default_factory=dict)     # settings of the oracle
    extra: dict = field(default_factory=dict)       # tensors added
    warns: bool = False                             # something has to be guessed, and that is said


RAW = {"subtract": False}
NORMS = {"norms": True}
DATA = {"scale": (0.7, 0.7)}
SCOPE = {"subtract": False, "scale": (np.sqrt(D) / 4, np.sqrt(D) / 5)}
SCOPE_ONE_NORM = {"subtract": False, "scale": (np.sqrt(D) / 4, np.sqrt(D) / 4)}
AVERAGE = "expected_average_only_in"
PER_TOKEN = "constant_norm_rescale"
NESTED = {"group_sizes": torch.tensor([8, 16])}
LOG_THETA = random_weights()["log_threshold"]
GEMMA_2 = {"model_name": "m", "hf_hook_point_in": OUTPUT, "hf_hook_point_out": OUTPUT}

FAMILIES = [
    Family("Gemma Scope", "gemma npz", None, jumprelu, RAW),
    Family("Gemma Scope, small letters", "gemma npz, small letters", None, jumprelu, RAW),
    Family("Gemma Scope 2", "gemma 2", GEMMA_2, jumprelu, RAW),
    Family("Gemma Scope 2 without config", "gemma 2", None, jumprelu, RAW),

    Family("SAELens standard", "saelens", lens("standard"), relu),
    Family("SAELens topk", "saelens", lens("topk", k=K), topk),
    Family("SAELens jumprelu", "saelens jumprelu", lens("jumprelu"), jumprelu),
    Family("SAELens gated", "saelens gated", lens("gated"), gated),
    Family("SAELens v3", "saelens", {"hook_point": POST, "normalize_activations": False}, relu),
    Family("SAELens v5 topk", "saelens",
           lens(activation_fn_str="topk", activation_fn_kwargs={"k": K}), topk),
    Family("SAELens b_dec not subtracted", "saelens jumprelu",
           lens("jumprelu", apply_b_dec_to_input=False), jumprelu, RAW),
    Family("SAELens decoder norms", "saelens",
           lens("topk", k=K, rescale_acts_by_decoder_norm=True), topk, NORMS),
    Family("SAELens token norm", "saelens jumprelu",
           lens("jumprelu", normalize_activations=PER_TOKEN), jumprelu, {"token": "norm"}),
    Family("SAELens layer norm", "saelens",
           lens("standard", normalize_activations="layer_norm"), relu, {"token": "layer"}),
    Family("SAELens data scale", "saelens",
           lens("standard", normalize_activations=AVERAGE, norm_scaling_factor=0.7), relu, DATA),
    Family("SAELens data scale v3", "saelens",
           lens(normalize_activations=True, norm_scaling_factor=0.7), relu, DATA),
    Family("SAELens factor of ones", "saelens", lens("standard"), relu,
           extra={"scaling_factor": torch.ones(M)}),

    Family("sparsify topk", "sparsify",
           {"activation": "topk", "k": K, "num_latents": M, "transcode": False}, topk),
    Family("sparsify topk by default", "sparsify",
           {"k": K, "expansion_factor": 3, "d_in": D}, topk),
    Family("sparsify groupmax", "sparsify", {"activation": "groupmax", "k": 6}, groupmax),

    Family("Llama Scope", "llama scope", moss(), jumprelu_raw, SCOPE),
    Family("Llama Scope, norms", "llama scope",
           moss(sparsity_include_decoder_norm=True), jumprelu_raw, SCOPE | NORMS),
    Family("Llama Scope topk", "llama scope", moss("topk"), topk, SCOPE),
    Family("Llama Scope topk, norms", "llama scope",
           moss("topk", sparsity_include_decoder_norm=True), topk, SCOPE | NORMS),
    Family("Llama Scope, b_dec subtracted", "llama scope",
           moss(apply_decoder_bias_to_pre_encoder=True), jumprelu_raw, SCOPE | {"subtract": True}),
    Family("Llama Scope R1", "llama scope r1",
           moss(norm_activation="inference"), jumprelu_log, RAW),
    Family("OpenMOSS inference", "openmoss", moss("topk", norm_activation="inference"), topk, RAW),
    Family("OpenMOSS token-wise, norms", "openmoss",
           moss(norm_activation="token-wise", sparsity_include_decoder_norm=True),
           jumprelu_06, {**RAW, **NORMS, "token": "norm"}),
    Family("OpenMOSS log threshold", "openmoss", moss(), jumprelu_log, SCOPE,
           extra={"log_jumprelu_threshold": LOG_THETA}),
    Family("OpenMOSS scale and threshold as tensors", "openmoss",
           moss(dataset_average_activation_norm=None), jumprelu_log, SCOPE_ONE_NORM,
           extra={"activation_function.log_jumprelu_threshold": LOG_THETA,
                  f"dataset_average_activation_norm.{POST}": torch.tensor(4.0)}),

    Family("dl AutoEncoder", "dl", dl("AutoEncoder"), relu),
    Family("dl AutoEncoderNew", "dl new", dl("AutoEncoderNew"), relu, RAW),
    Family("dl Gated", "dl gated", dl("GatedAutoEncoder"), gated),
    Family("dl TopK", "dl topk", dl("AutoEncoderTopK"), topk, extra=scalars(0.6)),
    Family("dl TopK, k in the config", "dl topk", dl("AutoEncoderTopK", k=K), topk),
    Family("dl BatchTopK", "dl topk", dl("BatchTopKSAE"), jumprelu_06, extra=scalars(0.6)),
    Family("dl BatchTopK, threshold never set", "dl topk", dl("BatchTopKSAE"), topk,
           extra=scalars(-1.0), warns=True),
    Family("dl Matryoshka", "dl matryoshka", dl("MatryoshkaBatchTopKSAE"), jumprelu_06,
           extra=scalars(0.6, **NESTED)),
    Family("dl Matryoshka, threshold never set", "dl matryoshka", dl("MatryoshkaBatchTopKSAE"),
           topk, extra=scalars(-1.0, **NESTED), warns=True),
    Family("dl Matryoshka, misspelled", "dl matryoshka", dl("MatroyshkaBatchTopKSAE"),
           jumprelu_06, extra=scalars(0.6, **NESTED)),
    Family("dl JumpReLU", "dl jumprelu", dl("JumpReluAutoEncoder"), jumprelu, RAW),

    Family("dl AutoEncoder, no config", "dl", None, relu),
    Family("dl AutoEncoderNew, no config", "dl new", None, relu, RAW, warns=True),
    Family("dl Gated, no config", "dl gated", None, gated),
    Family("dl BatchTopK, no config", "dl topk", None, jumprelu_06,
           extra=scalars(0.6), warns=True),
    Family("dl Matryoshka, no config", "dl matryoshka", None, jumprelu_06,
           extra=scalars(0.6, **NESTED)),
    Family("dl JumpReLU, no config", "dl jumprelu", None, jumprelu, RAW),

    Family("Qwen-Scope", "qwen", None, topk, RAW),
    Family("Goodfire", "goodfire", None, relu, RAW),
]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture
def opened(tmp_path, family):
    """The SAE of a family, read from its files."""
    return S.load_sae(write(tmp_path, family.layout, family.config, family.extra))


@pytest.fixture
def z():
    """Residual vectors of four texts."""
    return torch.randn(4, 16, D, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.5


def flat64(x):
    """[.., n] → [-1, n], float64 NumPy."""
    return x.double().flatten(0, 1).numpy()


def assert_close(got, wanted):
    assert np.linalg.norm(flat64(got) - wanted) <= 1e-5 * np.linalg.norm(wanted)


@every_family
def test_a_published_layout_gives_the_latents_of_its_equations(opened, family, z):
    wanted, _ = oracle(flat64(z), family.activation, **family.reading)
    codes = opened.encode(z)
    assert codes.shape == (4, 16, M)
    assert 0.02 < (wanted > 0).mean() < 0.9         # else the comparison says little
    assert ((flat64(codes) > 0) == (wanted > 0)).all()
    assert_close(codes, wanted)


@every_family
def test_a_published_layout_gives_the_reconstruction_of_its_equations(opened, family, z):
    _, wanted = oracle(flat64(z), family.activation, **family.reading)
    assert_close(opened.reconstruct(z), wanted)
    assert_close(opened.decode(opened.encode(z), like=z), wanted)


@every_family
def test_the_layer_is_known_where_a_file_or_folder_says_it(opened, family):
    says_nothing = family.name.endswith("no config")
    assert opened.info["layer"] == (None if says_nothing else 12)


@every_family
def test_what_has_to_be_guessed_is_said(opened, family):
    assert bool(opened.info.get("warning")) == family.warns


# ---------------------------------------------------------------- the form in memory

ONE_EACH = [
    ("saelens", lens("topk", k=K, normalize_activations="layer_norm")),
    ("saelens gated", lens("gated")),
    ("llama scope", moss()),
    ("sparsify", {"activation": "groupmax", "k": 6}),
    ("dl", None),
]
one_of_each = pytest.mark.parametrize("layout, config", ONE_EACH)


def assert_same(a, b):
    """Two SAEs with the same float32 weights, settings and origin."""
    for name in S.TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        if x is None or y is None:
            assert x is y, name
        else:
            assert x.dtype == y.dtype == torch.float32 and torch.equal(x, y), name
    for name in ("activation", "k", "norm"):
        assert getattr(a, name) == getattr(b, name), name
    for name in ("layer", "layout"):
        assert a.info[name] == b.info[name], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@one_of_each
def test_half_precision_is_read_into_float32(tmp_path, layout, config, dtype):
    whole = write(tmp_path / "float32", layout, config)
    half = write(tmp_path / "half", layout, config, dtype=dtype)
    assert_same(S.load_sae(half), S.load_sae(whole))


@one_of_each
def test_a_file_named_itself_is_read_as_its_folder_is(tmp_path, layout, config):
    folder = write(tmp_path, layout, config)
    assert_same(S.load_sae(tmp_path / LAYOUTS[layout][0]), S.load_sae(folder))


@one_of_each
def test_saving_and_loading_gives_the_same_sae(tmp_path, layout, config):
    first = S.load_sae(write(tmp_path, layout, config))
    save_sae(first, tmp_path / "own" / "sae.safetensors")
    again = S.load_sae(tmp_path / "own")
    assert_same(again, first)
    assert (again.d_model, again.d_sae) == (D, M)


def test_saving_writes_one_file_and_nothing_else(tmp_path):
    save_sae(S.load_sae(write(tmp_path, "saelens", lens())), tmp_path / "own" / "sae.safetensors")
    assert os.listdir(tmp_path / "own") == ["sae.safetensors"]


def plain_sae(activation, **settings):
    """Three latents in two dimensions: x, y, and one that never fires."""
    W = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    zero = torch.zeros(2)
    return S.SAE(W, torch.zeros(3), W.T.contiguous(), zero, zero, activation, **settings)


def test_a_negative_jumprelu_threshold_lets_no_negative_value_through():
    sae = plain_sae("jumprelu", threshold=torch.full((3,), -5.0))
    f = sae.encode(torch.tensor([[-1.0, 2.0], [-9.0, -0.5]]))
    assert f.tolist() == [[0, 2, 0], [0, 0, 0]]


def test_a_jumprelu_latent_exactly_at_its_threshold_does_not_fire():
    sae = plain_sae("jumprelu", threshold=torch.full((3,), 2.0))
    f = sae.encode(torch.tensor([[2.0, 2.5]]))
    assert f.tolist() == [[0, 2.5, 0]]


def test_zeros_among_the_k_largest_do_not_fire():
    sae = plain_sae("topk", k=2)
    f = sae.encode(torch.tensor([[-1.0, 2.0], [-1.0, -1.0], [3.0, 2.0]]))
    assert f.tolist() == [[0, 2, 0], [0, 0, 0], [3, 2, 0]]


def test_decoding_per_token_scaled_latents_without_their_input_is_refused():
    sae = plain_sae("relu", norm="constant_norm_rescale")
    with pytest.raises(S.SAEError, match="constant_norm_rescale"):
        sae.decode(sae.encode(torch.ones(1, 2)))


@pytest.mark.parametrize("name, base", [
    ("meta-llama/Llama-3.1-8B", True),
    ("meta-llama/Llama-3.1-8B-Instruct", False),
    ("google/gemma-2-2b", True),
    ("google/gemma-2-2b-it", False),
    ("google/gemma-2-2b-it-res", False),
    ("Qwen/Qwen2.5-7B", True),
    ("Qwen/Qwen3-8B", False),
    ("Qwen/Qwen3-8B-Base", True),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", False),
])
def test_a_base_model_is_told_by_its_name(name, base):
    assert S.is_base_model(name) is base


@pytest.mark.parametrize("model, told", [("/home/me/gemma-3-270m.gguf", "on gemma-3-270m.gguf,"),
                                         ("google/gemma-2-2b", "on google/gemma-2-2b,")])
def test_a_warning_names_a_local_model_without_its_path(model, told):
    sae = plain_sae("relu")
    sae.info["model"] = model
    [warning] = [text for text in S.warnings_of(sae) if "a base model" in text]
    assert told in warning


def test_only_where_the_decoder_norms_change_something_are_they_said_to_be_folded():
    for activation, settings, folded in (("relu", {}, False), ("topk", {"k": 1}, True)):
        sae = plain_sae(activation, **settings)
        S.gate_by_norm(sae, "here")
        assert ("folded" in sae.info) is folded


def test_health_equals_a_figure_worked_by_hand():
    # top-1 of (4, 1) and (0, 1) keeps (4, 0) and (0, 1): error 1
    # around the mean (2, 1) the total is 4 + 4
    got = S.health(plain_sae("topk", k=1), torch.tensor([[4.0, 1.0], [0.0, 1.0]]))
    assert got == {"explained_variance": pytest.approx(1 - 1 / 8), "l0": 1.0,
                   "silent": pytest.approx(1 / 3), "n": 2}


# ---------------------------------------------------------------- refusals

class Trap:
    """Unpickling it makes a folder."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@dataclass
class Refused:
    """A checkpoint that cannot be used, and what the error names."""
    culprit: str
    layout: str
    config: object = None
    extra: dict = field(default_factory=dict)
    file: str = None


SKIP = torch.zeros(D, D)
LONG = torch.zeros(M + 1)
NAN = torch.full((M,), float("nan"))
IN_GATE = moss(sparsity_include_decoder_norm=True)
ANOTHER_INPUT = {"hf_hook_point_in": "model.layers.12.input", "hf_hook_point_out": OUTPUT}
REFUSED = [
    # not an SAE of one activation
    Refused("transcode", "sparsify", {"k": K, "transcode": True}),
    Refused("skip_connection", "sparsify", {"k": K, "skip_connection": True}),
    Refused("W_skip", "sparsify", {"k": K}, {"W_skip": SKIP}),
    Refused("affine_skip_connection", "gemma 2", None, {"affine_skip_connection": SKIP}),
    Refused("use_glu_encoder", "llama scope", moss(use_glu_encoder=True)),

    # not of a block's output
    Refused("model.layers.12.(input|output)", "gemma 2", ANOTHER_INPUT),
    Refused("blocks.1[23].hook_resid_post", "llama scope",
            moss(hook_point_out="blocks.13.hook_resid_post")),
    Refused(r"trained on layers\.5\.mlp", "sparsify", {"k": K},
            file="layers.5.mlp/sae.safetensors"),
    Refused("blocks.3.hook_mlp_out", "saelens",
            lens("standard", metadata={"hook_name": "blocks.3.hook_mlp_out"})),
    Refused("blocks.3.attn.hook_z", "saelens", {"hook_point": "blocks.3.attn.hook_z"}),
    Refused("mlp_layer_12", "dl", dl("AutoEncoder", submodule_name="mlp_layer_12")),

    # a kind whose equations are not known here
    Refused("temporal", "saelens", lens("temporal")),
    Refused("transcoder", "saelens", lens("transcoder")),
    Refused("tanh-relu", "saelens", lens(activation_fn_str="tanh-relu")),
    Refused("gelu", "saelens", lens(activation_fn="gelu")),             # its other name
    Refused("gelu", "saelens", lens(activation_fn_str="relu", activation_fn="gelu")),
    Refused("abstopk", "sparsify", {"k": K, "activation": "abstopk"}),
    Refused("prolu", "llama scope", moss("prolu")),
    Refused("batch-wise", "llama scope", moss(norm_activation="batch-wise")),
    Refused("norm_scaling_factor", "saelens", lens("standard", normalize_activations=AVERAGE)),
    Refused("norm_scaling_factor", "saelens", lens(normalize_activations=True)),
    Refused("z-score", "saelens", lens("standard", normalize_activations="z-score")),
    Refused("scaling_factor", "saelens", lens("standard"),
            {"scaling_factor": torch.full((M,), 2.0)}),

    Refused('signed true', "sparsify", {"k": K, "signed": True}),
    Refused("AutoEncoderReLU", "dl new", dl("AutoEncoderReLU")),
    Refused("CrossCoder", "dl new", dl("CrossCoder")),
    Refused("GradPursuitAutoEncoder", "dl", dl("GradPursuitAutoEncoder")),
    Refused("IdentityDict", "dl topk", dl("IdentityDict"), scalars(0.6)),
    Refused('io "in"', "dl", {**dl("AutoEncoder"), "buffer": {"io": "in"}}),
    Refused("relu_squared", "gemma 2", {**GEMMA_2, "architecture": "relu_squared"}),
    Refused('type "transcoder"', "gemma 2", {**GEMMA_2, "type": "transcoder"}),
    Refused("crosscoder", "openmoss", moss(sae_type="crosscoder")),
    Refused("hook_z", "saelens", lens("standard", reshape_activations="hook_z")),
    Refused("gelu", "saelens jumprelu", lens("jumprelu", activation_fn_str="gelu")),
    Refused('activation_fn "topk"', "saelens gated", lens("gated", activation_fn="topk")),

    # a flag that is neither true nor false
    Refused('transcode "true"', "sparsify", {"k": K, "transcode": "true"}),
    Refused("skip_connection 1", "sparsify", {"k": K, "skip_connection": 1}),
    Refused('signed "yes"', "sparsify", {"k": K, "signed": "yes"}),
    Refused('apply_b_dec_to_input "false"', "saelens",
            lens("standard", apply_b_dec_to_input="false")),
    Refused("rescale_acts_by_decoder_norm 1", "saelens",
            lens("topk", k=K, rescale_acts_by_decoder_norm=1)),
    Refused('"False"', "llama scope", moss(sparsity_include_decoder_norm="False")),
    Refused("apply_decoder_bias_to_pre_encoder 0", "llama scope",
            moss(apply_decoder_bias_to_pre_encoder=0)),
    Refused("use_glu_encoder 1", "llama scope", moss(use_glu_encoder=1)),

    # tensors that do not fit together
    Refused(r"b_enc.*\[25\].*\[24\]", "saelens", lens("standard"), {"b_enc": LONG}),
    Refused(r"W_dec.*\[8, 24\].*\[24, 8\]", "saelens", lens("standard"),
            {"W_dec": torch.zeros(D, M)}),
    Refused("b_enc.*25", "saelens",
            lens("topk", k=K, rescale_acts_by_decoder_norm=True), {"b_enc": LONG}),
    Refused(r"threshold.*\[25\].*\[24\]", "saelens jumprelu", lens("jumprelu"),
            {"threshold": LONG}),
    Refused("W_enc", "saelens", lens("standard"), {"W_enc": torch.zeros(M)}),
    Refused("W_dec|decoder.weight", "llama scope", IN_GATE,
            {"decoder.weight": torch.zeros(M, D)}),

    # not finite
    Refused("b_enc.*NaN", "gemma npz", None, {"b_enc": NAN}),
    Refused("threshold.*NaN", "saelens jumprelu", lens("jumprelu"), {"threshold": NAN}),
    Refused("b_dec.*Inf", "llama scope", moss(),
            {"decoder.bias": torch.full((D,), float("inf"))}),

    # something is missing
    Refused("b_enc", "saelens", lens("standard"), {"b_enc": None}),
    Refused("r_mag", "saelens gated", lens("gated"), {"r_mag": None}),
    Refused("threshold", "saelens", lens("jumprelu")),
    Refused("'k'", "saelens", lens("topk")),
    Refused(r"\bk\b", "saelens", lens(activation_fn_str="topk", activation_fn_kwargs={})),
    Refused("'k'", "sparsify"),
    Refused("dataset_average_activation_norm", "llama scope",
            moss(dataset_average_activation_norm=None)),
    Refused("--k-sae", "qwen", file="layer12.sae.pt"),
    Refused("unknown layout.*W_dec.*known.*Gemma Scope", "saelens", lens("standard"),
            {"W_enc": None}),

    # damaged
    Refused("k = 25", "sparsify", {"k": M + 1}),
    Refused("metadata|configuration", "saelens", lens("standard", metadata=[1])),
    Refused("trainer|configuration", "dl", {"trainer": "x"}),
    Refused("not valid JSON.*cfg.json", "saelens", "{not json"),
    Refused("not a JSON object", "saelens", [1]),
    Refused("not a readable.*params.npz", "gemma npz", None,
            {"b_enc": np.array([{}] * M, dtype=object)}),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.layout}: {case.culprit}")
def test_what_cannot_be_used_is_refused_with_the_name_of_the_culprit(tmp_path, case):
    folder = write(tmp_path, case.layout, case.config, case.extra, file=case.file)
    with pytest.raises(S.SAEError) as error:
        S.load_sae(folder)
    assert re.search(case.culprit, str(error.value)) and " · " in str(error.value), error.value


@pytest.mark.parametrize("layout, config", [
    ("sparsify", {"k": K, "signed": None, "normalize_decoder": True, "multi_topk": True}),
    ("saelens", lens("standard", hook_eval="NOT_IN_USE", noise=0.5)),
    ("llama scope", moss(use_glu_encoder=None, l1_coefficient=3, act_fn="relu")),
    ("dl", dl("AutoEncoder", trainer_class="PAnnealTrainer", sparsity_function="Lp^p")),
])
def test_settings_that_do_not_change_the_equation_are_let_be(tmp_path, layout, config):
    assert S.load_sae(write(tmp_path, layout, config)).info["layer"] == 12


def test_a_pickled_object_is_refused_and_not_executed(tmp_path):
    folder = write(tmp_path, "dl", None, {"extra": Trap(tmp_path / "executed")})
    with pytest.raises(S.SAEError, match="pickle.*ae.pt"):
        S.load_sae(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("layout", ["gemma 2", "gemma npz", "dl"])
def test_a_truncated_file_is_called_unreadable(tmp_path, layout):
    folder = write(tmp_path, layout)
    file = tmp_path / LAYOUTS[layout][0]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(S.SAEError, match=f"not a readable checkpoint.*{file.name}"):
        S.load_sae(folder)


# ---------------------------------------------------------------- where it was trained

@pytest.mark.parametrize("hook, layer", [
    ("blocks.7.hook_resid_post", 7),
    ("model.layers.7", 7),
    ("model.layers.7.output", 7),
    ("model.language_model.layers.7", 7),
    ("layers.7", 7),
    ("h.7", 7),
    ("transformer.h.7", 7),
    ("gpt_neox.layers.7", 7),
    ("resid_post_layer_7", 7),
    ("resid_post/layer_7", 7),
    ("resid_out_layer7", 7),
    ("layer_7", 7),
    ("L7R", 7),
    ("blocks.7.hook_resid_pre", 6),     # what goes into block 7 comes out of block 6
    ("model.layers.7.input", 6),
    ("resid_pre_layer_7", 6),
])
def test_the_output_of_a_block_is_known_however_it_is_spelled(tmp_path, hook, layer):
    info = S.load_sae(write(tmp_path, "saelens", lens(hook_name=hook))).info
    assert (info["hook"], info["layer"]) == (hook, layer)


@pytest.mark.parametrize("hook", [
    "model.layers.7.post_feedforward_layernorm.output",
    "blocks.7.ln2.hook_normalized",
    "blocks.7.ln1.hook_normalized",
    "blocks.7.hook_resid_mid",
    "blocks.7.hook_attn_out",
    "blocks.7.attn.hook_q",
    "blocks.0.hook_resid_pre",
    "layers.7.mlp",
    "model.layers.7.self_attn.o_proj",
    "transformer.wte",
    "hook_embed",
    "model.norm",
    "ln_final.hook_normalized",
    "['resid_post_layer_7', 'resid_post_layer_8']",
])
def test_any_other_site_is_refused_by_its_name(tmp_path, hook):
    folder = write(tmp_path, "saelens", lens(hook_name=hook))
    with pytest.raises(S.SAEError, match=f"trained on {re.escape(hook)}"):
        S.load_sae(folder)


CACHE = "hub/models--someone--{}/snapshots/4f2a/"
SIZES = "width_16k/average_l0_9/params.npz"
HUB_LAYER = CACHE + "layer_3/" + SIZES


@pytest.mark.parametrize("place, layer", [
    ("resid_post_layer_8/trainer_0/ae.pt", 8),
    ("resid_out_layer3/10_32768/ae.pt", 3),
    ("resid_pre_layer_8/trainer_0/ae.pt", 7),
    ("resid_post/layer_5_width_16k_l0_small/ae.pt", 5),
    ("L4R/ae.pt", 4),
    ("x/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", 19),
    ("gpt_neox.layers.6/ae.pt", 6),
    ("blocks.8.hook_resid_pre/ae.pt", 7),
    (HUB_LAYER.format("gemma-scope-2b-pt-res"), 3),
    (CACHE.format("Llama3_1-8B-Base-LXR-8x") + "Llama3_1-8B-Base-L15R-8x/ae.pt", 15),
    # folders of the user's own
    ("attention-study/layers.3/ae.pt", 3),
    ("mlp-project/layers.3/ae.pt", 3),
    ("mlp/layer_3/width_16k/ae.pt", 3),
    ("embedding/notes/resid_post_layer_3/ae.pt", 3),
    ("transcoder-or-sae/h.3/ae.pt", 3),
    ("attention-study/ae.pt", None),
    ("attention/" + HUB_LAYER.format("gemma-scope-2b-pt-res"), 3),
])
def test_a_path_says_the_layer_and_a_user_may_call_folders_anything(tmp_path, place, layer):
    layout = "gemma npz" if place.endswith("npz") else "dl"
    write(tmp_path, layout, file=place)
    assert S.load_sae(tmp_path / place).info["layer"] == layer


@pytest.mark.parametrize("place, site", [
    ("h.1.attn/ae.pt", "h.1.attn"),
    ("gpt_neox.layers.1.mlp/ae.pt", "gpt_neox.layers.1.mlp"),
    ("layers.1.post_attention_layernorm/ae.pt", "layers.1.post_attention_layernorm"),
    ("embed_tokens/ae.pt", "the embedding"),
    ("embedding/" + SIZES, "the embedding"),
    ("transformer.wte/ae.pt", "the embedding"),
    ("mlp_out_layer3/10_32768/ae.pt", "the MLP"),
    ("attn_out/layer_5_width_16k_l0_small/ae.pt", "attention"),
    ("transcoder_all/layer_5_width_16k_l0_small/ae.pt", "a transcoder"),
    ("resid_mid_layer_5/ae.pt", "the middle"),
    ("final_norm/ae.pt", "a norm"),
    ("x/mlp_sae.pt", "the MLP"),
    ("gemma-scope-2b-pt-att/layer_3/" + SIZES, "attention"),
    ("Llama3_1-8B-Base-LXM-8x/Llama3_1-8B-Base-L15M-8x/ae.pt", "the MLP"),
    (HUB_LAYER.format("gemma-scope-9b-pt-mlp"), "the MLP"),
    (HUB_LAYER.format("gemma-scope-9b-pt-att"), "attention"),
    (HUB_LAYER.format("gemma-scope-2b-pt-transcoders"), "a transcoder"),
    (HUB_LAYER.format("skip-transcoder-Llama-3.2-1B-131k"), "a transcoder"),
    (CACHE.format("Llama3_1-8B-Base-LXTC-8x") + "ae.pt", "a transcoder"),
    (CACHE.format("Llama3_1-8B-Base-LXA-8x") + "ae.pt", "attention"),
])
def test_a_folder_or_repository_of_another_site_is_refused(tmp_path, place, site):
    layout = "gemma npz" if place.endswith("npz") else "dl"
    write(tmp_path, layout, file=place)
    with pytest.raises(S.SAEError, match=f"trained on {site}"):
        S.load_sae(tmp_path / place)


def test_a_file_named_from_within_its_folder_is_refused_as_well(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, "dl", file="layers.2.mlp/ae.pt"))
    for name in ("ae.pt", "."):
        with pytest.raises(S.SAEError, match=r"trained on layers\.2\.mlp"):
            S.load_sae(name)


@pytest.mark.parametrize("repository, wrong", [
    ("someone/gemma-scope-9b-pt-res", None),
    ("someone/gemma-scope-9b-pt-mlp", "the MLP"),
    ("someone/qwen3-4b-transcoders", "a transcoder"),
])
def test_the_repository_that_hub_names_counts(tmp_path, monkeypatch, repository, wrong):
    folder = write(tmp_path, "gemma npz")
    monkeypatch.setattr(S, "fetch", lambda name, revision: str(folder))
    if wrong is None:
        assert S.load_sae(f"hub:{repository}:layer_12").info["layer"] == 12
    else:
        with pytest.raises(S.SAEError, match=f"trained on {wrong}"):
            S.load_sae(f"hub:{repository}:layer_12")


# ---------------------------------------------------------------- which file of a folder

@pytest.mark.parametrize("ending", ["pth", "bin"])
def test_other_endings_of_a_pickle_are_read_like_pt(tmp_path, ending):
    by_default = S.load_sae(write(tmp_path / "a", "goodfire"))
    folder = write(tmp_path / "b", "goodfire", file=f"x/Gemma-9B-SAE-l12.{ending}")
    assert_same(S.load_sae(folder), by_default)
    assert by_default.info["model"] == "Gemma-9B"


@pytest.mark.parametrize("ending", ["pth", "bin"])
def test_no_pickle_is_executed_whatever_it_is_called(tmp_path, ending):
    trap = {"extra": Trap(tmp_path / "executed")}
    folder = write(tmp_path, "goodfire", None, trap, file=f"x/Gemma-9B-SAE-l12.{ending}")
    with pytest.raises(S.SAEError, match="pickle"):
        S.load_sae(folder)
    assert not (tmp_path / "executed").exists()


def put_beside(folder):
    """What trainers leave beside the weights: firing rates, states, optimizers, one not tensors."""
    save_file({"sparsity": torch.zeros(M)}, folder / "sparsity.safetensors")
    store = folder / "activations_store_state.safetensors"
    save_file({"n_dataset_processed": torch.ones(1)}, store)
    np.savez(folder / "histogram.npz", counts=np.zeros(M))
    torch.save({"global_step": 5, "num_tokens": torch.zeros(M)}, folder / "state.pt")
    torch.save({"state": {0: {"exp_avg": torch.zeros(M, D)}}}, folder / "optimizer_0.pt")
    torch.save({"args": Trap(folder / "executed")}, folder / "training_args.bin")


@pytest.mark.parametrize("layout, config", [
    ("saelens", lens()),
    ("sparsify", {"k": K}),
    ("dl", dl("AutoEncoder")),
    ("gemma npz", None),
    ("llama scope", moss()),
    ("goodfire", None),
])
def test_the_sae_of_a_folder_is_the_file_that_holds_an_encoder(tmp_path, layout, config):
    folder = write(tmp_path, layout, config)
    alone = S.load_sae(folder)
    put_beside(folder)
    assert_same(S.load_sae(folder), alone)
    assert not (folder / "executed").exists()


def test_a_damaged_sae_among_other_files_is_called_unreadable(tmp_path):
    folder = write(tmp_path, "saelens", lens())
    put_beside(folder)
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(S.SAEError, match="not a readable checkpoint.*sae_weights"):
        S.load_sae(folder)


def test_a_folder_of_side_files_alone_holds_no_sae(tmp_path):
    put_beside(tmp_path)
    with pytest.raises(S.SAEError, match="no SAE in this folder.*state.pt"):
        S.load_sae(tmp_path)


@pytest.mark.parametrize("stage, kind", [
    ("extract", "hidden states"),
    ("select", "features"),
    ("head", "a reward head"),
    ("later", "a file of stage later"),
])
def test_another_file_of_this_project_is_called_what_it_is(tmp_path, stage, kind):
    meta = {"stage": stage, "sae": "mine/sae.safetensors"}
    save_file({"directions": torch.ones(2, D)}, tmp_path / "x.safetensors",
              metadata={"sparserm": json.dumps(meta)})
    message = f"{kind}.*not an SAE.*x.safetensors.*--sae.*mine/sae.safetensors"
    with pytest.raises(S.SAEError, match=message):
        S.load_sae(tmp_path / "x.safetensors")


def test_an_empty_folder_is_refused_as_one_that_holds_nothing(tmp_path):
    with pytest.raises(S.SAEError, match="holds nothing"):
        S.load_sae(tmp_path)


def test_a_folder_of_two_saes_is_refused_with_what_it_holds(tmp_path):
    for name in ("a", "b"):
        write(tmp_path, "gemma 2", file=f"{name}.safetensors")
    with pytest.raises(S.SAEError, match="several.*a.safetensors, b.safetensors"):
        S.load_sae(tmp_path)


# ---------------------------------------------------------- the command line, the file alone

def test_info_prints_layout_and_width(tmp_path):
    out = tiny.succeed("sae", "info", write(tmp_path, "llama scope", moss()))
    assert "Llama Scope" in out
    assert f"{D} → {M}" in out


def test_info_on_a_missing_file_is_one_line_and_exit_code_2(tmp_path):
    code, out, err = tiny.command("sae", "info", tmp_path / "missing")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .*missing.*\n", err)


@pytest.mark.parametrize("words, when, reader, shown", [
    ("info {folder}", tiny.AT_ONCE, "head -2", 2),
    ("info {folder}", tiny.AT_THE_END, "true", 0),
    ("info --help", tiny.AT_THE_END, "true", 0),
])
def test_a_reader_that_stops_ends_it_quietly(tmp_path, words, when, reader, shown):
    folder = write(tmp_path, "saelens", lens())
    piped = f"{sys.executable} {S.__file__} {words.format(folder=folder)} | {reader}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {piped}"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONUNBUFFERED": when})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == shown


@pytest.mark.parametrize("name", ["check", "train"])
def test_a_command_that_has_moved_names_its_new_place(name):
    code, out, err = tiny.command("sae", name, "--out", "x.safetensors")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: moved · .*python -m tools\.{name}_sae\n", err)


def test_sae_py_copied_alone_into_another_folder_reads_an_sae(tmp_path):
    shutil.copy(tiny.ROOT / "sae.py", tmp_path)
    path = tiny.save_sae(tmp_path / "own.safetensors")
    code = ("import torch; from sae import load_sae; "
            f"print(load_sae({path!r}).encode(torch.ones(2, {tiny.WIDTH})).shape)")
    without_project = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=without_project,
                          capture_output=True, text=True)
    assert "torch.Size([2, 64])" in done.stdout, done.stderr


@pytest.fixture
def copied(tmp_path):
    """sae.py in a folder without the project, with no huggingface_hub → runs it there."""
    shutil.copy(tiny.ROOT / "sae.py", tmp_path)
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not there')")

    def command(*words):
        return subprocess.run([sys.executable, "sae.py", *words], cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    return command


@pytest.mark.parametrize("words, says", [
    (["check", "my-sae"], "error: moved · .*tools.check_sae of the SparseRM project"),
    (["train"], "error: moved · .*tools.train_sae of the SparseRM project"),
    (["info", "hub:someone/some-sae"], "error: the package huggingface_hub is missing"),
])
def test_what_sae_py_copied_alone_cannot_do_is_one_line(copied, words, says):
    done = copied(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{says}.*\n", done.stderr)
