"""Time and memory of stages 2 and 3 against the number of pairs, on made-up activations of the demo model's width.

    python benchmarks/scale.py --pairs 10000 100000 1000000 --write

Each size gets a run folder of random vectors (chosen ones moved a little along 20 decoder rows) cut into shards as stage 1 cuts them;
then 02 and 03 run as a user runs them, and the kernel says how much memory each took at most. A million pairs need 7 GB of disk.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
files = importlib.import_module("parts.files")
stage1, sae_file = importlib.import_module("01_extract"), importlib.import_module("sae")
SAE = ROOT / "assets" / "sae-smollm2-135m-layer16.safetensors"


def make_run(run, pairs, sae):
    """pairs.jsonl and activation shards of random vectors."""
    generator, size = torch.Generator().manual_seed(0), stage1.SHARD_PAIRS
    (run / "activations").mkdir(parents=True)
    with open(run / "pairs.jsonl", "w", encoding="utf-8") as file:
        for n in range(pairs):
            file.write(json.dumps({"id": str(n), "prompt": f"p{n}", "chosen": "a", "rejected": "b"}) + "\n")
    meta = {"stage": "extract", "layer": 16, "token": "last", "model": "demo", "parameters": 134515008,
            "parent": {"pairs": stage1.file_hash(run / "pairs.jsonl")}}
    shift, count = sae.W_dec[:20].sum(0) * 2, -(-pairs // size)
    for n in range(count):
        m = min(size, pairs - n * size)
        z = [torch.randn(m, sae.d_model, generator=generator) * 5 + sae.b_dec for _ in range(2)]
        place = torch.arange(n * size, n * size + m)
        lengths = torch.full((m,), 9, dtype=torch.int32)
        stage1.save_stage(stage1.shard_path(run, 16, n, count),
                          {"chosen": z[0] + shift, "rejected": z[1], "pair": place, "group": place.clone(),
                           "split": torch.where(place % 10 < 7, 0, torch.where(place % 10 == 7, 1, 2)).to(torch.uint8),
                           "chosen_tokens": lengths, "rejected_tokens": lengths.clone()}, meta)


def measured(*command):
    """Run → {seconds, peak_gib}."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"error: {command[0]} failed · exit {os.waitstatus_to_exitcode(status)} · see above")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gib": round(usage.ru_maxrss / 2**20, 2)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    p.add_argument("--folder", help="where to put the runs (default: a temporary folder)")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/scale.json")
    args = p.parse_args()
    sae, found = sae_file.load_sae(SAE), {}
    for pairs in args.pairs:
        run = Path(tempfile.mkdtemp(dir=args.folder)) / "run"
        make_run(run, pairs, sae)
        found[str(pairs)] = {"02_select_features": measured(ROOT / "02_select_features.py", "--run", run, "--sae", SAE),
                             "03_train_head": measured(ROOT / "03_train_head.py", "--run", run)}
        shutil.rmtree(run.parent)
        for stage, row in found[str(pairs)].items():
            print(f"{pairs:>9,} pairs   {stage:<20} {row['seconds']:>7.1f} s   {row['peak_gib']:.2f} GiB at most", flush=True)
    if args.write:
        files.write_text(ROOT / "benchmarks/results/scale.json", json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
