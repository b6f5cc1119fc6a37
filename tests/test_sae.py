"""sae.py against formulas: every published layout is written on the spot and read back, and an oracle in float64 NumPy
(each family's own equations, nothing folded) says which latents fire and what the reconstruction is."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

import sae as S
from parts import sae_tools

health = importlib.import_module("02_select_features").health

D, M, K = 8, 24, 5


# ---------------------------------------------------------------- checkpoints as others publish them

def random_weights():
    """Random tensors under their names in memory; multiples of 1/64, which bfloat16 and float16 hold exactly."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(*shape, generator=g).mul(40).round() / 64).clamp(-3, 3)
    return {"W_enc": draw(D, M), "W_dec": draw(M, D), "b_dec": draw(D),
            **{n: draw(M) for n in ("b_enc", "threshold", "log_threshold", "b_gate", "b_mag", "r_mag")}}


SAME = {n: n for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
THETA = {"threshold": "threshold"}
GEMMA = {n.lower(): n for n in (*SAME, *THETA)}
LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
GATED = {"encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag"}
LENS, MOSS, DL = "x/sae_weights.safetensors", "x/checkpoints/final.safetensors", "x/ae.pt"
LAYOUTS = {     # name: (weights file, config file, {name in the file: name in memory})
    "gemma npz": ("layer_12/width_16k/average_l0_82/params.npz", "config.json", SAME | THETA),      # google/gemma-scope-…
    "gemma npz, small letters": ("layer_12/width_16k/average_l0_82/params.npz", "config.json", GEMMA),
    "gemma 2": ("resid_post/layer_12_width_16k_l0_small/params.safetensors", "config.json", GEMMA),
    "saelens": (LENS, "cfg.json", SAME),
    "saelens jumprelu": (LENS, "cfg.json", SAME | THETA),
    "saelens gated": (LENS, "cfg.json", {n: n for n in ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")}),
    "sparsify": ("layers.12/sae.safetensors", "cfg.json",
                 {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}),
    "llama scope": (MOSS, "hyperparams.json", LINEAR | {"decoder.bias": "b_dec"}),
    "llama scope r1": (LENS, "config.json", LINEAR | {"decoder.bias": "b_dec", "log_jumprelu_threshold": "log_threshold"}),
    "openmoss": (LENS, "config.json", {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}),
    "dl": (DL, "config.json", LINEAR | {"bias": "b_dec"}),
    "dl gated": (DL, "config.json", GATED | {"r_mag": "r_mag"}),
    "dl topk": (DL, "config.json", LINEAR | {"b_dec": "b_dec"}),
    "dl matryoshka": (DL, "config.json", SAME),
    "dl jumprelu": (DL, "config.json", SAME | THETA),
    "qwen": (f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/layer12.sae.pt", None, SAME | {"W_enc": "W_enc.T", "W_dec": "W_dec.T"}),
}


def write(root, layout, config=None, extra=None, dtype=torch.float32, file=None):
    """Write one checkpoint → its folder. `extra`: tensors added or replaced, by their name in the file; None removes one."""
    default, config_file, names = LAYOUTS[layout]
    file, w = root / (file or default), random_weights()
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {stored: w[n.removesuffix(".T")].T if n.endswith(".T") else w[n] for stored, n in names.items()}
    tensors = {n: t.to(dtype).contiguous() for n, t in tensors.items()} | (extra or {})
    tensors = {n: t for n, t in tensors.items() if t is not None}
    if file.suffix == ".npz":
        np.savez(file, **{n: np.asarray(t) for n, t in tensors.items()})
    else:
        (torch.save if file.suffix == ".pt" else save_file)(tensors, file)
    if config is not None:
        (folder / config_file).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


# ---------------------------------------------------------------- the oracle: (input, decoder norms) → (codes, what is decoded)

W64 = {n: t.numpy().astype(np.float64) for n, t in random_weights().items()}


def relu(x, n):
    f = np.maximum(x @ W64["W_enc"] + W64["b_enc"], 0)
    return f, f


def topk(x, n):
    pre, f = relu(x, n)[0] * n, np.zeros((len(x), M))
    for row, values in enumerate(pre):
        for j in sorted(range(M), key=lambda j: -values[j])[:K]:
            f[row, j] = values[j]
    return f, f / n


def groupmax(x, n, groups=6):
    pre, f = relu(x, n)[0], np.zeros((len(x), M))
    for row, values in enumerate(pre):
        for start in range(0, M, M // groups):
            best = max(range(start, start + M // groups), key=lambda j: values[j])
            f[row, best] = values[best]
    return f, f


def jumprelu(x, n, theta=W64["threshold"]):
    pre = x @ W64["W_enc"] + W64["b_enc"]
    f = np.where((pre * n > theta) & (pre > 0), pre, 0)
    return f, f


def gated(x, n):
    magnitude = x @ (W64["W_enc"] * np.exp(W64["r_mag"])) + W64["b_mag"]
    f = np.where(x @ W64["W_enc"] + W64["b_gate"] > 0, np.maximum(magnitude, 0), 0)
    return f, f


jumprelu_06 = partial(jumprelu, theta=0.6)
jumprelu_raw = partial(jumprelu, theta=0.6 * np.sqrt(D) / 4)         # Llama Scope's scalar is in units of the raw stream
jumprelu_log = partial(jumprelu, theta=np.exp(W64["log_threshold"]))


def oracle(z, act, subtract=True, scale=(1, 1), norms=False, token=None):
    """What a family computes for vectors z [n, d] → (codes, reconstruction), float64."""
    x, times, plus = z, 1, 0
    if token == "norm":
        times = np.linalg.norm(z, axis=1, keepdims=True) / np.sqrt(D)
        x = z / times
    if token == "layer":
        plus, times = z.mean(1, keepdims=True), z.std(1, ddof=1, keepdims=True)
        x = (z - plus) / (times + 1e-5)
    n = np.linalg.norm(W64["W_dec"], axis=1) if norms else np.ones(M)
    f, decoded = act(scale[0] * x - (W64["b_dec"] if subtract else 0), n)
    return f, (decoded @ W64["W_dec"] + W64["b_dec"]) / scale[1] * times + plus


POST = "blocks.12.hook_resid_post"
OUTPUT = "model.layers.12.output"


def lens(architecture=None, **settings):
    """cfg.json of SAELens: v6 keeps the origin in `metadata`, older ones (no architecture here) at the top."""
    origin = {"model_name": "m", "hook_name": POST}
    return {"architecture": architecture, "metadata": origin, **settings} if architecture else {**origin, **settings}


def moss(act="jumprelu", **settings):
    """hyperparams.json or config.json of OpenMOSS."""
    return {"act_fn": act, "hook_point_in": POST, "hook_point_out": POST, "use_glu_encoder": False, "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": 4.0, "out": 5.0}, "jump_relu_threshold": 0.6, "top_k": K, **settings}


def dl(name, **settings):
    return {"trainer": {"dict_class": name, "layer": 12, "lm_name": "m", "submodule_name": "resid_post_layer_12", **settings}}


def scalars(threshold, **more):
    return {"k": torch.tensor(K), "threshold": torch.tensor(threshold), **more}


RAW, NORMS = {"subtract": False}, {"norms": True}
DATA = {"scale": (0.7, 0.7)}
SCOPE = {"subtract": False, "scale": (np.sqrt(D) / 4, np.sqrt(D) / 5)}
AVERAGE, PER_TOKEN = "expected_average_only_in", "constant_norm_rescale"
NESTED = {"group_sizes": torch.tensor([8, 16])}
FAMILIES = [    # what it is: (layout, config, activation of the oracle, its settings, extra tensors)
    ("Gemma Scope", "gemma npz", None, jumprelu, RAW),
    ("Gemma Scope, small letters", "gemma npz, small letters", None, jumprelu, RAW),
    ("Gemma Scope 2", "gemma 2", {"model_name": "m", "hf_hook_point_in": OUTPUT, "hf_hook_point_out": OUTPUT}, jumprelu, RAW),
    ("Gemma Scope 2 without config", "gemma 2", None, jumprelu, RAW),
    ("SAELens standard", "saelens", lens("standard"), relu),
    ("SAELens topk", "saelens", lens("topk", k=K), topk),
    ("SAELens jumprelu", "saelens jumprelu", lens("jumprelu"), jumprelu),
    ("SAELens gated", "saelens gated", lens("gated"), gated),
    ("SAELens v3", "saelens", {"hook_point": POST, "normalize_activations": False}, relu),
    ("SAELens v5 topk", "saelens", lens(activation_fn_str="topk", activation_fn_kwargs={"k": K}), topk),
    ("SAELens b_dec not subtracted", "saelens jumprelu", lens("jumprelu", apply_b_dec_to_input=False), jumprelu, RAW),
    ("SAELens decoder norms", "saelens", lens("topk", k=K, rescale_acts_by_decoder_norm=True), topk, NORMS),
    ("SAELens token norm", "saelens jumprelu", lens("jumprelu", normalize_activations=PER_TOKEN), jumprelu, {"token": "norm"}),
    ("SAELens layer norm", "saelens", lens("standard", normalize_activations="layer_norm"), relu, {"token": "layer"}),
    ("SAELens data scale", "saelens", lens("standard", normalize_activations=AVERAGE, norm_scaling_factor=0.7), relu, DATA),
    ("SAELens data scale v3", "saelens", lens(normalize_activations=True, norm_scaling_factor=0.7), relu, DATA),
    ("SAELens factor of ones", "saelens", lens("standard"), relu, {}, {"scaling_factor": torch.ones(M)}),
    ("sparsify topk", "sparsify", {"activation": "topk", "k": K, "num_latents": M, "transcode": False}, topk),
    ("sparsify topk by default", "sparsify", {"k": K, "expansion_factor": 3, "d_in": D}, topk),
    ("sparsify groupmax", "sparsify", {"activation": "groupmax", "k": 6}, groupmax),
    ("Llama Scope", "llama scope", moss(), jumprelu_raw, SCOPE),
    ("Llama Scope, norms", "llama scope", moss(sparsity_include_decoder_norm=True), jumprelu_raw, SCOPE | NORMS),
    ("Llama Scope topk", "llama scope", moss("topk"), topk, SCOPE),
    ("Llama Scope topk, norms", "llama scope", moss("topk", sparsity_include_decoder_norm=True), topk, SCOPE | NORMS),
    ("Llama Scope, b_dec subtracted", "llama scope", moss(apply_decoder_bias_to_pre_encoder=True), jumprelu_raw,
     SCOPE | {"subtract": True}),
    ("Llama Scope R1", "llama scope r1", moss(norm_activation="inference"), jumprelu_log, RAW),
    ("OpenMOSS inference", "openmoss", moss("topk", norm_activation="inference"), topk, RAW),
    ("OpenMOSS token-wise, norms", "openmoss", moss(norm_activation="token-wise", sparsity_include_decoder_norm=True), jumprelu_06,
     {**RAW, **NORMS, "token": "norm"}),
    ("OpenMOSS log threshold", "openmoss", moss(), jumprelu_log, SCOPE, {"log_jumprelu_threshold": random_weights()["log_threshold"]}),
    ("OpenMOSS scale and threshold as tensors", "openmoss", moss(dataset_average_activation_norm=None), jumprelu_log,
     RAW | {"scale": (np.sqrt(D) / 4, np.sqrt(D) / 4)}, {"activation_function.log_jumprelu_threshold": random_weights()["log_threshold"],
                                                         f"dataset_average_activation_norm.{POST}": torch.tensor(4.0)}),
    ("dl AutoEncoder", "dl", dl("AutoEncoder"), relu),
    ("dl Gated", "dl gated", dl("GatedAutoEncoder"), gated),
    ("dl TopK", "dl topk", dl("AutoEncoderTopK"), topk, {}, scalars(0.6)),
    ("dl BatchTopK", "dl topk", dl("BatchTopKSAE"), jumprelu_06, {}, scalars(0.6)),
    ("dl BatchTopK, threshold never set", "dl topk", dl("BatchTopKSAE"), topk, {}, scalars(-1.0)),
    ("dl Matryoshka", "dl matryoshka", dl("MatryoshkaBatchTopKSAE"), jumprelu_06, {}, scalars(0.6, **NESTED)),
    ("dl Matryoshka, threshold never set", "dl matryoshka", dl("MatryoshkaBatchTopKSAE"), topk, {}, scalars(-1.0, **NESTED)),
    ("dl JumpReLU", "dl jumprelu", dl("JumpReluAutoEncoder"), jumprelu, RAW),
    ("Qwen-Scope", "qwen", None, topk, RAW),
]
FAMILIES += [(f"{name}, no config", layout, None, *rest) for name, layout, _, *rest in FAMILIES
             if name in ("dl AutoEncoder", "dl Gated", "dl BatchTopK", "dl Matryoshka", "dl JumpReLU")]


@pytest.mark.parametrize("layout, config, act, reading, extra", [pytest.param(*(*f, {}, {})[1:6], id=f[0]) for f in FAMILIES])
def test_a_published_layout_gives_the_latents_and_reconstruction_of_its_equations(tmp_path, request, layout, config, act, reading, extra):
    z = torch.randn(4, 16, D, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.5
    codes, wanted = oracle(z.double().flatten(0, 1).numpy(), act, **reading)
    sae = S.load_sae(write(tmp_path, layout, config, extra))
    f, case = sae.encode(z), request.node.callspec.id
    assert f.shape == (4, 16, M) and 0.02 < (codes > 0).mean() < 0.9        # else the comparison says little
    assert ((f > 0).flatten(0, 1).numpy() == (codes > 0)).all()
    for got, right in ((f, codes), (sae.reconstruct(z), wanted), (sae.decode(f, like=z), wanted)):
        assert np.linalg.norm(got.double().flatten(0, 1).numpy() - right) <= 1e-5 * np.linalg.norm(right)
    assert sae.info["layer"] == (None if "no config" in case else 12)
    assert bool(sae.info.get("warning")) == ("never set" in case or case == "dl BatchTopK, no config")      # a guess is said


# ---------------------------------------------------------------- the form in memory

ONE_EACH = [("saelens", lens("topk", k=K, normalize_activations="layer_norm")), ("saelens gated", lens("gated")), ("llama scope", moss()),
            ("sparsify", {"activation": "groupmax", "k": 6}), ("dl", None)]


def assert_same(a, b):
    for name in S.NAMES:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (x.dtype == y.dtype == torch.float32 and torch.equal(x, y)), name
    assert (a.activation, a.k, a.norm, a.info["layer"], a.info["layout"]) == (b.activation, b.k, b.norm, b.info["layer"], b.info["layout"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout, config", ONE_EACH)
def test_half_precision_is_read_into_float32_and_a_file_named_itself_is_its_folder(tmp_path, layout, config, dtype):
    whole = S.load_sae(write(tmp_path / "float32", layout, config))
    write(tmp_path / "half", layout, config, dtype=dtype)
    assert_same(S.load_sae(tmp_path / "half" / LAYOUTS[layout][0]), whole)


@pytest.mark.parametrize("layout, config", ONE_EACH)
def test_saving_and_loading_gives_the_same_sae(tmp_path, layout, config):
    first = S.load_sae(write(tmp_path, layout, config))
    sae_tools.save_sae(first, tmp_path / "own" / "sae.safetensors")
    again = S.load_sae(tmp_path / "own")
    assert_same(again, first)
    assert (again.d_model, again.d_sae) == (D, M) and os.listdir(tmp_path / "own") == ["sae.safetensors"]


def plain_sae(activation, **settings):
    """Three latents in two dimensions: x, y, and one that never fires."""
    W = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    return S.SAE(W, torch.zeros(3), W.T.contiguous(), torch.zeros(2), torch.zeros(2), activation, **settings)


def test_a_negative_jumprelu_threshold_lets_no_negative_value_through():
    f = plain_sae("jumprelu", threshold=torch.full((3,), -5.0)).encode(torch.tensor([[-1.0, 2.0], [-9.0, -0.5]]))
    assert f.tolist() == [[0, 2, 0], [0, 0, 0]]


def test_a_jumprelu_latent_exactly_at_its_threshold_does_not_fire():
    f = plain_sae("jumprelu", threshold=torch.full((3,), 2.0)).encode(torch.tensor([[2.0, 2.5]]))
    assert f.tolist() == [[0, 2.5, 0]]


def test_zeros_among_the_k_largest_do_not_fire():
    f = plain_sae("topk", k=2).encode(torch.tensor([[-1.0, 2.0], [-1.0, -1.0], [3.0, 2.0]]))
    assert f.tolist() == [[0, 2, 0], [0, 0, 0], [3, 2, 0]]


def test_decoding_per_token_scaled_latents_without_their_input_is_refused():
    sae = plain_sae("relu", norm="constant_norm_rescale")
    with pytest.raises(S.SAEError, match="constant_norm_rescale"):
        sae.decode(sae.encode(torch.ones(1, 2)))


# ---------------------------------------------------------------- refusals

class Trap:
    """Unpickling it makes a folder."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


SKIP, LONG, NAN = torch.zeros(D, D), torch.zeros(M + 1), torch.full((M,), float("nan"))
REFUSED = [     # (layout, config, extra tensors, what the error names[, weights file])
    ("sparsify", {"k": K, "transcode": True}, {}, "transcode"),
    ("sparsify", {"k": K, "skip_connection": True}, {}, "skip_connection"),
    ("sparsify", {"k": K}, {"W_skip": SKIP}, "W_skip"),
    ("gemma 2", None, {"affine_skip_connection": SKIP}, "affine_skip_connection"),
    ("gemma 2", {"hf_hook_point_in": "model.layers.12.input", "hf_hook_point_out": OUTPUT}, {}, "model.layers.12.(input|output)"),
    ("llama scope", moss(hook_point_out="blocks.13.hook_resid_post"), {}, "blocks.1[23].hook_resid_post"),
    ("llama scope", moss(use_glu_encoder=True), {}, "use_glu_encoder"),
    ("sparsify", {"k": K}, {}, r"trained on layers\.5\.mlp", "layers.5.mlp/sae.safetensors"),
    ("saelens", lens("standard", metadata={"hook_name": "blocks.3.hook_mlp_out"}), {}, "blocks.3.hook_mlp_out"),
    ("saelens", {"hook_point": "blocks.3.attn.hook_z"}, {}, "blocks.3.attn.hook_z"),
    ("dl", dl("AutoEncoder", submodule_name="mlp_layer_12"), {}, "mlp_layer_12"),
    ("saelens", lens("temporal"), {}, "temporal"),
    ("saelens", lens("transcoder"), {}, "transcoder"),
    ("saelens", lens(activation_fn_str="tanh-relu"), {}, "tanh-relu"),
    ("sparsify", {"k": K, "activation": "abstopk"}, {}, "abstopk"),
    ("llama scope", moss("prolu"), {}, "prolu"),
    ("llama scope", moss(norm_activation="batch-wise"), {}, "batch-wise"),
    ("saelens", lens("standard", normalize_activations=AVERAGE), {}, "norm_scaling_factor"),
    ("saelens", lens(normalize_activations=True), {}, "norm_scaling_factor"),
    ("saelens", lens("standard", normalize_activations="z-score"), {}, "z-score"),
    ("saelens", lens("standard"), {"scaling_factor": torch.full((M,), 2.0)}, "scaling_factor"),
    ("saelens", lens("standard"), {"b_enc": LONG}, r"b_enc.*\[25\].*\[24\]"),
    ("saelens", lens("standard"), {"W_dec": torch.zeros(D, M)}, r"W_dec.*\[8, 24\].*\[24, 8\]"),
    ("saelens", lens("topk", k=K, rescale_acts_by_decoder_norm=True), {"b_enc": LONG}, r"b_enc.*25"),
    ("saelens jumprelu", lens("jumprelu"), {"threshold": LONG}, r"threshold.*\[25\].*\[24\]"),
    ("saelens", lens("standard"), {"W_enc": torch.zeros(M)}, "W_enc"),
    ("llama scope", moss(sparsity_include_decoder_norm=True), {"decoder.weight": torch.zeros(M, D)}, "W_dec|decoder.weight"),
    ("gemma npz", None, {"b_enc": NAN}, "b_enc.*NaN"),
    ("saelens jumprelu", lens("jumprelu"), {"threshold": NAN}, "threshold.*NaN"),
    ("llama scope", moss(), {"decoder.bias": torch.full((D,), float("inf"))}, "b_dec.*Inf"),
    ("saelens", lens("standard"), {"b_enc": None}, "b_enc"),
    ("saelens gated", lens("gated"), {"r_mag": None}, "r_mag"),
    ("saelens", lens("jumprelu"), {}, "threshold"),
    ("saelens", lens("topk"), {}, "'k'"),
    ("saelens", lens(activation_fn_str="topk", activation_fn_kwargs={}), {}, r"\bk\b"),
    ("saelens", lens("standard", metadata=[1]), {}, "metadata|configuration"),
    ("dl", {"trainer": "x"}, {}, "trainer|configuration"),
    ("sparsify", None, {}, "'k'"),
    ("sparsify", {"k": M + 1}, {}, "k = 25"),
    ("llama scope", moss(dataset_average_activation_norm=None), {}, "dataset_average_activation_norm"),
    ("qwen", None, {}, "--k-sae", "layer12.sae.pt"),
    ("saelens", lens("standard"), {"W_enc": None}, "unknown layout.*W_dec.*known.*Gemma Scope"),
    ("saelens", "{not json", {}, "not valid JSON.*cfg.json"),
    ("saelens", [1], {}, "not a JSON object"),
    ("gemma npz", None, {"b_enc": np.array([{}] * M, dtype=object)}, "not a readable.*params.npz"),
]


@pytest.mark.parametrize("layout, config, extra, culprit, file", [pytest.param(*(*r, None)[:5], id=f"{r[0]}: {r[3]}") for r in REFUSED])
def test_what_cannot_be_used_is_refused_with_the_name_of_the_culprit(tmp_path, layout, config, extra, culprit, file):
    with pytest.raises(S.SAEError) as error:
        S.load_sae(write(tmp_path, layout, config, extra, file=file))
    assert re.search(culprit, str(error.value)) and " · " in str(error.value), error.value


def test_a_pickled_object_is_refused_and_not_executed(tmp_path):
    with pytest.raises(S.SAEError, match="pickle.*ae.pt"):
        S.load_sae(write(tmp_path, "dl", None, {"extra": Trap(tmp_path / "executed")}))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("layout", ["gemma 2", "gemma npz", "dl"])
def test_a_truncated_file_is_called_unreadable(tmp_path, layout):
    folder, file = write(tmp_path, layout), tmp_path / LAYOUTS[layout][0]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(S.SAEError, match=f"not a readable checkpoint.*{file.name}"):
        S.load_sae(folder)


def test_an_empty_folder_and_a_folder_of_two_saes_are_refused_with_what_they_hold(tmp_path):
    with pytest.raises(S.SAEError, match="holds nothing"):
        S.load_sae(tmp_path)
    for name in ("a", "b"):
        write(tmp_path, "gemma 2", file=f"{name}.safetensors")
    with pytest.raises(S.SAEError, match="several.*a.safetensors, b.safetensors"):
        S.load_sae(tmp_path)


# ---------------------------------------------------------------- health and the command line

def test_health_equals_a_figure_worked_by_hand():
    # top-1 of (4, 1) and (0, 1) keeps (4, 0) and (0, 1): error 1; around the mean (2, 1) the total is 4 + 4
    got = health(plain_sae("topk", k=1), torch.tensor([[4.0, 1.0], [0.0, 1.0]]))
    assert got == {"explained_variance": pytest.approx(1 - 1 / 8), "l0": 1.0, "silent": pytest.approx(1 / 3), "n": 2}


def test_info_prints_layout_and_width_and_a_missing_file_is_one_line_and_exit_code_2(tmp_path):
    call = lambda path: subprocess.run([sys.executable, S.__file__, "info", path], capture_output=True, text=True)
    good, bad = call(write(tmp_path, "llama scope", moss())), call(tmp_path / "missing")
    assert good.returncode == 0 and "Llama Scope" in good.stdout and f"{D} → {M}" in good.stdout, good.stderr
    assert bad.returncode == 2 and bad.stdout == "" and re.fullmatch(r"error: .*missing.*\n", bad.stderr)


def test_sae_py_copied_alone_into_another_folder_reads_an_sae(tmp_path):
    shutil.copy(tiny.ROOT / "sae.py", tmp_path)
    path = tiny.save_sae(tmp_path / "own.safetensors")
    code = f"import torch; from sae import load_sae; print(load_sae({path!r}).encode(torch.ones(2, {tiny.WIDTH})).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert "torch.Size([2, 64])" in done.stdout, done.stderr
