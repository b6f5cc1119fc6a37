"""Time and memory of stages 2 and 3 against the number of pairs, on made-up activations of the demo
model's width.

    python benchmarks/scale.py --pairs 10000 100000 1000000 --write

Each size gets a run folder of random vectors (chosen ones moved a little along 20 decoder rows) cut
into shards as stage 1 cuts them; then 02 and 03 run as a user runs them, and the kernel says how
much memory each took at most. A million pairs need 7 GB of disk.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import DEMO_SAE, stage1
from parts.files import file_hash, run_main, save_stage
from sae import load_sae


def make_run(run, pairs, sae):
    """pairs.jsonl and activation shards of random vectors."""
    size = stage1.SHARD_PAIRS
    count = -(-pairs // size)                   # rounded up
    (run / "activations").mkdir(parents=True)
    with open(run / "pairs.jsonl", "w", encoding="utf-8") as file:
        for n in range(pairs):
            row = {"id": str(n), "prompt": f"p{n}", "chosen": "a", "rejected": "b"}
            file.write(json.dumps(row) + "\n")
    meta = {"stage": "extract", "layer": 16, "token": "mean", "model": "demo",
            "parameters": 134515008, "norm_eps": 1e-5,
            "parent": {"pairs": file_hash(run / "pairs.jsonl")}}

    generator = torch.Generator().manual_seed(0)
    for n in range(count):
        place = torch.arange(n * size, min(pairs, (n + 1) * size))
        tensors = random_shard(sae, place, generator)
        save_stage(stage1.shard_path(run, 16, "mean", n, count), tensors, meta)


def random_shard(sae, place, generator):
    """Tensors of a shard with the pairs of these numbers, each a question of its own."""
    shift = sae.W_dec[:20].sum(0) * 2
    chosen, rejected = [torch.randn(len(place), sae.d_model, generator=generator) * 5 + sae.b_dec
                        for _ in range(2)]
    split = torch.full_like(place, stage1.TRAIN)
    split[place % 10 == 7] = stage1.DEV
    split[place % 10 > 7] = stage1.TEST
    lengths = torch.full_like(place, 9, dtype=torch.int32)
    return {"chosen": chosen + shift, "rejected": rejected,
            "pair": place, "group": place.clone(), "split": split.to(torch.uint8),
            "chosen_tokens": lengths, "rejected_tokens": lengths.clone()}


def measured(script, *flags):
    """Run a stage → {seconds, peak_gib}, rounded."""
    found = common.run_script(script, *flags)
    return {"seconds": round(found["seconds"], 1), "peak_gib": round(found["peak_gib"], 2)}


def table(found):
    """The figures → markdown."""
    text = common.head_line("pairs", ["stage 2", "stage 3"])
    for pairs, stages in found.items():
        cells = [f"{row['seconds']:.1f} s, {row['peak_gib']:.2f} GiB" for row in stages.values()]
        text += common.line(f"{int(pairs):,}", cells)
    return text


def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    p.add_argument("--folder", help="where to put the runs (default: a temporary folder)")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/scale.json")
    args = p.parse_args()
    sae = load_sae(DEMO_SAE)
    found = {}
    for pairs in args.pairs:
        run = Path(tempfile.mkdtemp(dir=args.folder)) / "run"
        make_run(run, pairs, sae)
        select = measured("02_select_features.py", "--run", run, "--sae", DEMO_SAE)
        train = measured("03_train_head.py", "--run", run)
        found[str(pairs)] = {"02_select_features": select, "03_train_head": train}
        shutil.rmtree(run.parent)
        for stage, row in found[str(pairs)].items():
            print(f"{pairs:>9,} pairs   {stage:<20} {row['seconds']:>7.1f} s   "
                  f"{row['peak_gib']:.2f} GiB at most", flush=True)
    if args.write:
        common.write_result("scale", found)


if __name__ == "__main__":
    run_main(main)
