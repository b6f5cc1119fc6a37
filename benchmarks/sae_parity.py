"""Does load_sae read every family as its own package does, to the last digit, and how fast is
encode?

    python benchmarks/sae_parity.py [--write]          the comparison; exit 1 if anything differs by
                                                       more than 1e-5, or if nothing at all could
                                                       be compared with one of the packages
    python benchmarks/sae_parity.py --speed [--write]  tokens/s: ours, SAELens, and x @ W_enc alone

The peer's class creates and saves a small random SAE, or, where a peer only reads, a file of the
published layout is written here. Then the peer and load_sae both read that file, and what they make
of the same random z [256, 64] is compared:

    firing   share of the entries of [256, 512] where one has f > 0 and the other not
    f, z'    largest |ours - theirs| of a token over the largest |theirs| of that token

Nothing is fetched: in SAELens' loaders for files of the hub, what downloads is replaced by what
returns the local file, nothing else. A package that is missing, or fails on its own file, is a line
"not run" with the reason. Needs benchmarks/requirements.txt. --write puts the figures into
benchmarks/results/sae_parity.json.
"""

import importlib
import json
import os
import statistics
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from parts.files import run_main
from sae import SAEError, load_sae

os.environ.update(HF_HUB_OFFLINE="1", SPARSIFY_DISABLE_TRITON="1")      # before a peer is imported
D = 64                  # width of the residual stream
M = 512                 # latents
K = 16                  # of TopK
TOKENS = 256
LIMIT = 1e-5
COMPARED = ("firing", "f", "reconstruction")
HOOK = {"hook_name": "blocks.5.hook_resid_post", "model_name": "tiny"}
NORMS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
LOADERS = "sae_lens.loading.pretrained_sae_loaders"


# ---------------------------------------------------------------- random weights

def random_tensor(name, shape):
    """Weights for unequal decoder norms, biases that matter, thresholds on both sides of 0."""
    if len(shape) == 2:
        latent_norm = 0.5 + 1.5 * torch.rand(M)
        if shape[1] != M:
            latent_norm = latent_norm[:, None]
        return torch.randn(shape) / D ** 0.5 * latent_norm
    if "threshold" in name:
        return 3 * torch.rand(shape) - 0.5 if shape else torch.tensor(1.0)
    return 0.3 * torch.randn(shape)


def randomise(module):
    """Fill all float parameters and buffers of a peer's module."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(random_tensor(name, tensor.shape))
    return module


def random_tensors(**shapes):
    """Names with __ for a dot → random tensors."""
    return {name.replace("__", "."): random_tensor(name, shape) for name, shape in shapes.items()}


def put(folder, config=None, tensors=None, name="sae_weights.safetensors", config_name="cfg.json"):
    """Write a checkpoint → the path of the weights."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


# --------------- one function a peer: (folder, setting …) → (path, encode, decode); SAELens first

def saelens(folder, kind, training=False, **settings):
    """SAELens' class saves, SAELens' load_from_disk reads. A training class is saved for
    inference: BatchTopK as a JumpReLU."""
    lens = importlib.import_module("sae_lens")
    name = f"{kind}TrainingSAE" if training else f"{kind}SAE"
    metadata = importlib.import_module("sae_lens.saes.sae").SAEMetadata(**HOOK)
    config = getattr(lens, f"{name}Config")(d_in=D, d_sae=M, metadata=metadata, **settings)
    sae = randomise(getattr(lens, name)(config))
    if settings.get("normalize_activations") == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(0.37)       # SAELens folds this one before it saves
    save = sae.save_inference_model if training else sae.save_model
    save(folder)
    return folder, *saelens_reads(folder)


def saelens_reads(folder, **options):
    """→ encode and decode of what SAELens makes of this folder."""
    lens = importlib.import_module("sae_lens")
    sae = lens.SAE.load_from_disk(folder, dtype="float32", **options)
    return sae.encode, sae.decode


def saelens_v5(folder, **extra):
    """A configuration as SAELens wrote it before version 6: everything at the top level."""
    config = {"architecture": "standard", "d_in": D, "d_sae": M, "dtype": "float32",
              "device": "cpu", "hook_layer": 5, "model_name": "tiny",
              "hook_point": HOOK["hook_name"], "finetuning_scaling_factor": False,
              "normalize_activations": False, **extra}
    tensors = random_tensors(W_enc=(D, M), b_enc=(M,), W_dec=(M, D), b_dec=(D,))
    put(folder, config, {**tensors, "scaling_factor": torch.ones(M)})
    return folder, *saelens_reads(folder)


def through_saelens(folder, loader, repo, inside, scale=None):
    """SAELens' loader for a layout of the hub → encode, decode. `scale`: folded in, as
    from_pretrained does from its own list."""
    loaders = importlib.import_module(LOADERS)

    def local(repo_id, filename, subfolder="", **_):
        return str(folder / subfolder / filename)

    def shapes(repo_id, filename):
        tensors = load_file(folder / filename)
        return {name: list(tensor.shape) for name, tensor in tensors.items()}

    def convert(path, device, cfg_overrides):               # SAELens calls it by these names
        load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]
        overrides = {**cfg_overrides, "d_in": D, "d_sae": M}
        with patch.object(loaders, "hf_hub_download", local), \
                patch.object(loaders, "get_safetensors_tensor_shapes", shapes):
            return load(repo, inside, device, False, overrides)[:2]

    lens = importlib.import_module("sae_lens")
    sae = lens.SAE.load_from_disk(folder, dtype="float32", converter=convert)
    if scale:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae.encode, sae.decode


# ---------------------------------------------------------------- layouts that SAELens only reads

def gemma_scope(folder, generation):
    """Gemma Scope 1 (npz) or 2 (safetensors), read by SAELens."""
    tensors = random_tensors(w_enc=(D, M), w_dec=(M, D), b_enc=(M,), b_dec=(D,), threshold=(M,))
    if generation == 1:
        repo = "google/gemma-scope-2b-pt-res"
        inside = "layer_5/width_16k/average_l0_84"
        tensors = {name.replace("w_", "W_"): tensor for name, tensor in tensors.items()}
        path = put(folder / inside, None, tensors, "params.npz")
    else:
        repo = "google/gemma-scope-2-270m-pt"
        inside = "resid_post/layer_5_width_16k_l0_medium"
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt",
                  "hf_hook_point_in": "model.layers.5.output"}
        path = put(folder / inside, config, tensors, "params.safetensors", "config.json")
    return path.parent, *through_saelens(folder, f"gemma_{generation + 1}", repo, inside)


def llama_scope(folder, gate, average=3.0, r1=False):
    """Llama Scope, or its R1 sequel, read by SAELens. `gate`: compare pre with θ, or
    pre · ‖decoder row‖ (all of norm 1, or not)."""
    if gate == "decoder norms":
        raise NotImplementedError("SAELens leaves the decoder norms out of the gate, "
                                  "the authors' code multiplies them in")
    tensors = random_tensors(encoder__weight=(M, D), encoder__bias=(M,), decoder__weight=(D, M),
                             decoder__bias=(D,))
    if gate == "decoder norms, all 1":
        tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
    hook = HOOK["hook_name"]
    config = {"d_model": D, "d_sae": M, "expansion_factor": M // D, "act_fn": "jumprelu",
              "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": gate != "pre",
              "apply_decoder_bias_to_pre_encoder": False, "hook_point_in": hook,
              "hook_point_out": hook}
    if r1:      # θ a latent, and the average norm among the weights
        tensors["log_jumprelu_threshold"] = torch.rand(M)
        tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(average)
        loader, repo, inside = "llama_scope_r1_distill", "fnlp/Llama-Scope-R1-Distill", "L5R"
        put(folder / inside, config, tensors, config_name="config.json")
    else:
        config["jump_relu_threshold"] = 1.5
        config["dataset_average_activation_norm"] = {"in": average, "out": average}
        loader, repo = "llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x"
        inside = "Llama3_1-8B-Base-L5R-8x"
        put(folder / inside, config, tensors, "checkpoints/final.safetensors", "hyperparams.json")
    read = through_saelens(folder, loader, repo, inside, D ** 0.5 / average)
    return folder / inside, *read


def qwen_scope(folder):
    """Qwen-Scope, read by SAELens."""
    repo = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    tensors = random_tensors(W_enc=(M, D), W_dec=(D, M), b_enc=(M,), b_dec=(D,))
    path = put(folder / repo, None, tensors, "layer5.sae.pt")
    return path, *through_saelens(folder / repo, "qwen_scope", f"Qwen/{repo}", path.name)


# ---------------------------------------------------------------- the other packages

def sparsify(folder, activation, by_saelens=False):
    """EleutherAI sparsify's SparseCoder saves; it, or SAELens, reads."""
    eai = importlib.import_module("sparsify")
    folder = folder / "tiny" / "layers.5"
    config = eai.SparseCoderConfig(activation=activation, num_latents=M, k=K)
    randomise(eai.SparseCoder(D, config)).save_to_disk(folder)
    if by_saelens:
        loaders = importlib.import_module(LOADERS)
        return folder, *saelens_reads(folder, converter=loaders.sparsify_disk_loader)

    coder = eai.SparseCoder.load_from_disk(folder)
    chosen = {}

    def encode(z):
        chosen.update(zip(("acts", "indices"), coder.encode(z)))
        return torch.zeros(len(z), M).scatter_(-1, chosen["indices"], chosen["acts"])

    def decode(f):
        return coder.decode(chosen["acts"], chosen["indices"])

    return folder, encode, decode


def dictionary_learning(folder, module, kind, by_saelens=False, with_config=True, **settings):
    """A class of dictionary_learning saves its state dict as its trainer does; it, or SAELens,
    reads."""
    peer = getattr(importlib.import_module(f"dictionary_learning.{module}"), kind)
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": M, "layer": 5,
               "lm_name": "tiny", "submodule_name": "resid_post_layer_5"}
    if "k" in settings:
        trainer["k"] = settings["k"]
    config = {"trainer": trainer, "buffer": {"ctx_len": 128}} if with_config else None
    tensors = randomise(peer(D, M, **settings)).state_dict()
    path = put(folder / "ae", config, tensors, "ae.pt", "config.json")
    if by_saelens:
        read = through_saelens(folder, "dictionary_learning_1", "canrager/lm_sae", "ae")
        return path.parent, *read
    options = {"normalize_decoder": False} if kind == "AutoEncoder" else {}
    sae = peer.from_pretrained(path, **options)
    return path.parent, sae.encode, sae.decode


# ---------------------------------------------------------------- the cases

def cases():
    """→ (family, peer's package, setting in words, function, its arguments), one a comparison."""
    for (name, settings), norm, subtract in product(saelens_kinds(), NORMS, (True, False)):
        said = f"{norm}, b_dec {'' if subtract else 'not '}subtracted"
        yield (f"SAELens {name}", "sae-lens", said, saelens,
               {**settings, "normalize_activations": norm, "apply_b_dec_to_input": subtract})
    yield ("SAELens, stored bfloat16", "sae-lens", "JumpReLU", saelens,
           {"kind": "JumpReLU", "dtype": "bfloat16"})
    yield "SAELens before v6", "sae-lens", "relu", saelens_v5, {"activation_fn_str": "relu"}
    yield ("SAELens before v6", "sae-lens", "topk", saelens_v5,
           {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}})
    yield "Gemma Scope 1", "sae-lens", "npz", gemma_scope, {"generation": 1}
    yield "Gemma Scope 2", "sae-lens", "safetensors", gemma_scope, {"generation": 2}
    for r1, gate in product((False, True), ("pre", "decoder norms, all 1", "decoder norms")):
        family = "Llama Scope R1" if r1 else "Llama Scope"
        yield family, "sae-lens", f"gate: {gate}", llama_scope, {"gate": gate, "r1": r1}
    yield "Qwen-Scope", "sae-lens", "TopK", qwen_scope, {}
    for activation in ("topk", "groupmax"):
        yield (f"sparsify {activation}", "eai-sparsify", "SparseCoder", sparsify,
               {"activation": activation})
    yield ("sparsify topk", "sae-lens", "its sparsify loader", sparsify,
           {"activation": "topk", "by_saelens": True})
    for (module, kind, settings), by_saelens in product(DICTIONARIES, (False, True)):
        peer = "sae-lens" if by_saelens else "dictionary-learning"
        yield (f"dictionary_learning {kind}", peer, "as trained", dictionary_learning,
               {"module": module, "kind": kind, "by_saelens": by_saelens, **settings})
    yield ("dictionary_learning BatchTopKSAE", "dictionary-learning", "no config.json",
           dictionary_learning, {"module": "trainers.batch_top_k", "kind": "BatchTopKSAE", "k": K,
                                 "with_config": False})


DICTIONARIES = [    # module, class, its settings
    ("dictionary", "AutoEncoder", {}),
    ("dictionary", "GatedAutoEncoder", {}),
    ("dictionary", "JumpReluAutoEncoder", {}),
    ("trainers.top_k", "AutoEncoderTopK", {"k": K}),
    ("trainers.batch_top_k", "BatchTopKSAE", {"k": K}),
    ("trainers.matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE",
     {"k": K, "group_sizes": [64, 136, M - 200]}),
]


def saelens_kinds():
    """SAELens' classes → [(name, arguments of saelens())]."""
    kinds = [
        ("standard", {"kind": "Standard"}),
        ("TopK", {"kind": "TopK", "k": K}),
        ("TopK, rescaled", {"kind": "TopK", "k": K, "rescale_acts_by_decoder_norm": True}),
        ("JumpReLU", {"kind": "JumpReLU"}),
        ("gated", {"kind": "Gated"}),
    ]
    trained = (("BatchTopK", {}), ("MatryoshkaBatchTopK", {"matryoshka_widths": [64, 200, M]}))
    for rescale, (kind, more) in product((False, True), trained):
        name = f"{kind} → JumpReLU{', rescaled' if rescale else ''}"
        kinds.append((name, {"kind": kind, "training": True, "k": K,
                             "rescale_acts_by_decoder_norm": rescale, **more}))
    return kinds


# ---------------------------------------------------------------- the comparison

def relative(ours, theirs):
    """Largest |ours - theirs| of a token over the largest |theirs| of that token."""
    off = (ours - theirs).abs().amax(-1)
    return float((off / theirs.abs().amax(-1).clamp_min(1e-12)).max())


@torch.no_grad()
def compare(make, arguments, z):
    """One case → {firing, f, reconstruction, l0}, or {not_run: reason} of the peer, or
    {refused: reason} of load_sae."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path, encode, decode = make(Path(folder), **arguments)
            theirs = encode(z)
            rebuilt = decode(theirs)
        except Exception as error:      # a peer that is missing or fails on its own file is a row
            return {"not_run": " ".join(f"{type(error).__name__}: {error}".split())[:220]}
        try:
            sae = load_sae(path)
        except SAEError as error:
            return {"refused": str(error).replace(folder, "…")}
        ours = sae.encode(z)
        firing = (ours > 0) != (theirs > 0)
        return {"firing": float(firing.float().mean()),
                "f": relative(ours, theirs),
                "reconstruction": relative(sae.decode(ours, like=z), rebuilt),
                "l0": float((theirs > 0).sum(-1).float().mean())}


def parity():
    """Compare all cases, print a row a family and a line a failure → list of dicts."""
    torch.manual_seed(1)
    # not centred, so that b_dec and layer_norm matter
    z = 3 * torch.randn(TOKENS, D) + 2 * torch.randn(D)
    rows = [{"family": family, "peer": peer, "setting": setting, **compare(make, arguments, z)}
            for family, peer, setting, make, arguments in cases()]
    show_families(rows)
    for row in rows:
        show_failure(row)
    return rows


def show_families(rows):
    """A table: the worst of the cases of each family."""
    print(f"| {'family':48} | {'read by':25} | cases | firing differs | f, largest | z', largest |")
    print("|---|---|---|---|---|---|")
    for family, peer in dict.fromkeys((row["family"], row["peer"]) for row in rows):
        of_family = [row for row in rows if (row["family"], row["peer"]) == (family, peer)]
        done = [row for row in of_family if "f" in row]
        worst = ["–"] * len(COMPARED)
        if done:
            worst = [f"{largest(done, name):.1e}" for name in COMPARED]
        print(f"| {family:48} | {peer + ' ' + installed(peer):25} | {len(done):5} | "
              f"{worst[0]:>14} | {worst[1]:>10} | {worst[2]:>11} |")


def largest(rows, name):
    """The largest value of a column."""
    return max(row[name] for row in rows)


def show_failure(row):
    """A line where a case was not run, was refused, or differs."""
    name = f"{row['family']} ({row['setting']}), {row['peer']}"
    if "not_run" in row:
        print(f"not run: {name} · {row['not_run']}")
    elif "refused" in row:
        print(f"✗ load_sae refused: {name} · {row['refused']}")
    elif wrong(row):
        print(f"✗ {name} · firing differs {row['firing']:.1e}, f {row['f']:.1e}, "
              f"z' {row['reconstruction']:.1e}, L0 {row['l0']:.1f}")


def wrong(row):
    """More than LIMIT away from the peer, or refused."""
    return "refused" in row or any(not row.get(name, 0.0) <= LIMIT for name in COMPARED)


# ---------------------------------------------------------------- speed

def medians(functions, repeats):
    """{name: function} → {name: median seconds}, one call of each in turn, so that all meet the
    same noise."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            _, taken = common.timed(function)
            if turn:                    # the first turn warms up
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


@torch.inference_mode()
def encode_speed(kind, d, latents, tokens, repeats):
    """Encode tokens/s on the same weights → dict."""
    lens = importlib.import_module("sae_lens")
    more = {"k": 64} if kind == "TopK" else {}
    config = getattr(lens, f"{kind}SAEConfig")(d_in=d, d_sae=latents, **more)
    theirs = getattr(lens, f"{kind}SAE")(config)
    x = torch.randn(tokens, d)
    if kind == "JumpReLU":              # the threshold that lets 80 latents a token through
        pre = (x @ theirs.W_enc).flatten()
        theirs.threshold.data.fill_(pre.topk(80 * tokens).values[-1])
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_model(folder)
        ours = load_sae(folder)
    taken = medians({"ours": lambda: ours.encode(x), "sae-lens": lambda: theirs.encode(x),
                     "matmul": lambda: x @ ours.W_enc}, repeats)
    speeds = {f"{name} tokens/s": tokens / seconds for name, seconds in taken.items()}
    return {"kind": kind, "d": d, "latents": latents, "batch": tokens,
            "l0": float((ours.encode(x) > 0).sum() / tokens), **speeds,
            "ours/sae-lens": taken["sae-lens"] / taken["ours"],
            "ours/matmul": taken["matmul"] / taken["ours"]}


def speed(widths, latents, tokens, repeats):
    """Measure TopK and JumpReLU at each width, print a row each → list of dicts."""
    print(f"{latents} latents, {tokens} tokens a batch, float32, "
          f"{torch.get_num_threads()} threads, median of {repeats}")
    print("| SAE | d | L0 | ours, tokens/s | SAELens | x @ W_enc | ours/SAELens (≥ 1) | "
          "ours/matmul (≥ .70) |\n" + "|---" * 8 + "|")
    rows = []
    for d, kind in product(widths, ("TopK", "JumpReLU")):
        row = encode_speed(kind, d, latents, tokens, repeats)
        rows.append(row)
        print(f"| {kind} | {d} | {row['l0']:.0f} | {row['ours tokens/s']:,.0f} "
              f"| {row['sae-lens tokens/s']:,.0f} | {row['matmul tokens/s']:,.0f} "
              f"| {row['ours/sae-lens']:.2f} | {row['ours/matmul']:.2f} |", flush=True)
    return rows


# ---------------------------------------------------------------- in words

def claim(found):
    """What was compared and how far apart it was → markdown."""
    rows = found["parity"]["rows"]
    compared = [row for row in rows if "f" in row]
    differ = sum(row["firing"] > 0 for row in compared)
    same = "the same latents fire in all" if not differ else f"in {differ} other latents fire"
    missing = [row for row in rows if "not_run" in row]
    far = max(largest(compared, name) for name in ("f", "reconstruction"))
    return (f"{len(compared)} cases: {same}, largest relative difference {far:.1e}; "
            f"{len(missing)} could not be run.\n")


def speed_table(found):
    """Encode speed → markdown."""
    text = common.head_line("SAE of 16,384 latents, batches of 1,024",
                            ["times SAELens' speed", "of the plain matrix product"])
    for row in found["speed"]["rows"]:
        text += common.line(f"{row['kind']}, d = {row['d']:,}",
                            [f"{row['ours/sae-lens']:.2f} ×", f"{row['ours/matmul']:.0%}"])
    return text


# ---------------------------------------------------------------- command line

def installed(package):
    """Version of an installed package, or none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def parse_args():
    """The flags."""
    p = common.command_line(__doc__)
    p.add_argument("--speed", action="store_true", help="measure encode instead of comparing")
    p.add_argument("--write", action="store_true",
                   help="put the figures into results/sae_parity.json")
    p.add_argument("--widths", type=int, nargs="+", default=[576, 2304],
                   help="d of --speed (default: %(default)s)")
    p.add_argument("--latents", type=int, default=16384,
                   help="latents of --speed (default: %(default)s)")
    p.add_argument("--tokens", type=int, default=1024,
                   help="tokens a batch of --speed (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=9,
                   help="repeats of --speed (default: %(default)s)")
    return p.parse_args()


def write(part, rows):
    """Put one part of the figures into the results, with what they were measured with."""
    packages = ("torch", "numpy", "safetensors", "sae-lens", "eai-sparsify", "dictionary-learning")
    known = common.read_result("sae_parity")
    known[part] = {"rows": rows, "versions": {name: installed(name) for name in packages},
                   "threads": torch.get_num_threads()}
    common.write_result("sae_parity", known)


def verdict(rows):
    """Print how many cases were compared → exit code."""
    compared = [row for row in rows if "f" in row]
    bad = sum(wrong(row) for row in rows)
    missing = sum("not_run" in row for row in rows)
    absent = {row["peer"] for row in rows} - {row["peer"] for row in compared}
    print(f"{len(compared)} compared, {bad} refused or different by more than {LIMIT:g}, "
          f"{missing} not run"
          + "".join(f" · ✗ nothing was compared with {peer}" for peer in sorted(absent)))
    return 1 if bad or absent else 0


def main():
    """The command."""
    args = parse_args()
    warnings.simplefilter("ignore")
    if args.speed:
        rows = speed(args.widths, args.latents, args.tokens, args.repeats)
    else:
        rows = parity()
    if args.write:
        write("speed" if args.speed else "parity", rows)
    if not args.speed:
        sys.exit(verdict(rows))


if __name__ == "__main__":
    run_main(main)
