"""What models that people use ask of a machine: stages 1 to 3 on random weights in their true
shapes, cut to the blocks that are read.

    python benchmarks/sizes.py --write                          all shapes
    python benchmarks/sizes.py --only "Qwen3-1.7B" --write      one of them, beside the others' rows

Random weights cost what trained ones cost. Each shape is saved to a folder with the demo model's
tokenizer (the embedding keeps its true number of rows), then stage 1 reads some pairs of
data/safe.jsonl, stages 2 and 3 use SAEs of random numbers. Printed: the most memory of each stage,
seconds a pair (the difference between two runs of stage 1, so that opening the model does not
count), and the share of the arithmetic limit: the FLOPs of blocks 0..L for the distinct tokens,
against plain products with the same matrices in the same number format.

The figures for one GPU are computed, not measured: the same FLOPs at 40 % of 150 TFLOP/s, and the
weights that lie in memory.
"""

import multiprocessing
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import ROOT, line, stage1
from parts.files import read_json_rows, run_main
from parts.models import load_tokenizer
from sae import SAE
from tools.train_sae import save_sae

# name: (kind, what its configuration says, blocks kept, layer, dtype, widths of SAEs)
GEMMA = {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256_000,
         "query_pre_attn_scalar": 256, "sliding_window": 4096}
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
         "tie_word_embeddings": False}
QWEN = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "tie_word_embeddings": True}
SHAPES = {
    "Gemma-2-2B": ("gemma2", GEMMA, 14, "float32", (16_384, 65_536)),
    "Llama-3.1-8B": ("llama", LLAMA, 16, "bfloat16", (32_768, 131_072)),
    "Qwen3-1.7B": ("qwen3", QWEN, 15, "float32", (32_768,)),
}
FEW, MORE = 4, 20           # pairs of the two runs of stage 1; MORE are read in 02 and 03 too


# ---------------------------------------------------------------- random weights

def save_model(folder, kind, shape, blocks, dtype):
    """A model of random weights in this shape, with the demo model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(kind, num_hidden_layers=blocks, bos_token_id=1, eos_token_id=2,
                                  pad_token_id=2, max_position_embeddings=8192, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model = model.to_empty(device="cpu")
    fill(model)
    model.save_pretrained(folder)
    load_tokenizer("demo").save_pretrained(folder)


def fill(model):
    """Give every parameter small random numbers, the same million over and over: that is quick."""
    some = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for part in flat.split(len(some)):
            part.copy_(some[:len(part)])


def save_random_sae(path, d_model, width, layer, dtype):
    """A TopK SAE of random unit decoder rows."""
    rows = torch.empty(width, d_model, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for part in rows.split(2**12):
        part.copy_(torch.nn.functional.normalize(
            torch.randn(part.shape, generator=generator), dim=1))
    zero = torch.zeros(d_model, dtype=dtype)
    sae = SAE(rows.T, torch.zeros(width, dtype=dtype), rows, zero, zero, "topk", k=64,
              info={"layer": layer})
    save_sae(sae, path)


# ---------------------------------------------------------------- measuring

def apart(function, *args):
    """Call a function in a process of its own: what a stage takes at most, as the kernel tells it,
    is never less than what the process holds that starts it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def measure(name, folder):
    """One shape → its figures."""
    kind, shape, blocks, dtype, widths = SHAPES[name]
    layer = blocks - 1
    apart(save_model, folder / "model", kind, shape, blocks, dtype)
    few, more = [extract(folder, layer, dtype, pairs) for pairs in (FEW, MORE)]
    run = folder / f"run-{MORE}"
    found = {
        "blocks": blocks, "dtype": dtype, "pairs": MORE,
        "extract": more, "seconds_a_pair": (more["seconds"] - few["seconds"]) / (MORE - FEW),
        **apart(arithmetic, folder / "model", run, layer, dtype),
        "saes": {},
    }
    limit = found["flops_a_pair"] / found["product_flops_a_second"]
    found["share_of_limit"] = limit / found["seconds_a_pair"]
    for width in widths:
        path = folder / f"sae-{width}.safetensors"
        apart(save_random_sae, path, shape["hidden_size"], width, layer, getattr(torch, dtype))
        select = common.run_script("02_select_features.py", "--run", run, "--sae", path,
                                   "--sae-dtype", dtype)
        train = common.run_script("03_train_head.py", "--run", run)
        found["saes"][str(width)] = {"select": select, "train": train}
        path.unlink()
    return found


def extract(folder, layer, dtype, pairs):
    """Stage 1 on the first pairs → {seconds, peak_gib}."""
    return common.run_script("01_extract.py", "--model", folder / "model", "--layer", layer,
                             "--pairs", ROOT / "data/safe.jsonl", "--limit", pairs,
                             "--dtype", dtype, "--run", folder / f"run-{pairs}")


def arithmetic(model, run, layer, dtype):
    """FLOPs a pair of blocks 0..L, and FLOPs a second of plain products with those matrices."""
    backbone = stage1.load_backbone(str(model), dtype=dtype, device="cpu")
    texts = []
    for row in read_json_rows(run / "pairs.jsonl"):
        for side in common.SIDES:
            texts.append(stage1.render(backbone.tokenizer, row["prompt"], row[side]))
    tokens, _ = common.least_work(backbone, texts, layer)
    matrices = common.matrices(backbone, 0)                     # the blocks are alike
    flops = 2 * common.size_of(matrices) * (layer + 1) * tokens / (len(texts) / 2)
    return {
        "parameters": backbone.meta["parameters"],
        "tokens_a_pair": tokens / (len(texts) / 2),
        "flops_a_pair": flops,
        "product_flops_a_second": max(common.product_speeds(matrices, backbone.budget)),
    }


# ---------------------------------------------------------------- table

def table(found):
    """The figures → markdown: what 1,000 pairs of this length need."""
    text = ("| | Gemma-2-2B, block 13 | Llama-3.1-8B, block 15 | Qwen3-1.7B, block 14 |\n"
            "|---|---|---|---|\n")
    rows = [found["shapes"][name] for name in SHAPES]
    text += line("parameters up to that block, with the embeddings",
                 [f"{row['parameters'] / 1e9:.2f} B in {row['dtype']}" for row in rows])
    text += line("distinct tokens a pair", [f"{row['tokens_a_pair']:.0f}" for row in rows])
    text += line("stage 1: most memory, measured",
                 [f"{row['extract']['peak_gib']:.1f} GiB" for row in rows])
    text += line("stage 1: seconds a pair, measured",
                 [f"{row['seconds_a_pair']:.2f}" for row in rows])
    text += line("stage 1: share of the arithmetic limit, measured",
                 [f"{row['share_of_limit']:.0%}" for row in rows])
    text += line("**1,000 pairs on these two cores**, computed from it",
                 [f"{row['seconds_a_pair'] * 1000 / 60:.0f} min" for row in rows])
    text += line("**1,000 pairs on one GPU** (40 % of 150 TFLOP/s), computed",
                 [f"{row['flops_a_pair'] * 1000 / 60e12:.0f} s" for row in rows])
    text += line("memory of that GPU for the weights in bfloat16, computed",
                 [f"{row['parameters'] * 2 / 2**30:.1f} GiB" for row in rows])
    text += line("stage 2 by SAE width: most memory, seconds, measured", [sae_cell(row)
                                                                         for row in rows])
    return text


def sae_cell(row):
    """16k 1.2 GiB, 8 s · 65k …"""
    cells = []
    for width, stages in row["saes"].items():
        select = stages["select"]
        cells.append(f"{int(width) // 1000}k: {select['peak_gib']:.1f} GiB, "
                     f"{select['seconds']:.0f} s")
    return " · ".join(cells)


# ---------------------------------------------------------------- command line

def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("--only", choices=SHAPES, help="one shape")
    p.add_argument("--folder", help="where to put the models, up to 12 GB (default: temporary)")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/sizes.json")
    args = p.parse_args()
    found = common.read_result("sizes") or {"shapes": {}}
    for name in [args.only] if args.only else SHAPES:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            found["shapes"][name] = measure(name, folder)
        finally:
            shutil.rmtree(folder)
        print(name, found["shapes"][name], flush=True)
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__,
              "cpu": torch.backends.cpu.get_cpu_capability()}
    if args.write:
        common.write_result("sizes", found)
    if set(found["shapes"]) == set(SHAPES):
        print(table(found))


if __name__ == "__main__":
    run_main(main)
