"""How fast is stage 1? Every figure is a ratio to a named peer, measured in the same run on the same token sequences.

    python benchmarks/extract.py --pairs data/truthful.jsonl [--pairs … --candidates FILE --limit 200 --write]
    python benchmarks/extract.py --memory 20000         # peak memory of stage 1 while the number of pairs grows
    python benchmarks/extract.py --gpu                  # a random Llama of 1.7 B parameters in bfloat16 on a CUDA device

reads   --pairs        preference pairs, any layout that stage 1 reads
        --candidates   JSONL, one prompt a line: prompt, candidates (16 are used); without it 16 are made up, see `made_up_candidates`
writes  with --write   benchmarks/results/extract.json

Everyone renders with stage 1, reads the output of block L at the last token, in float32 on the CPU, with the threads torch takes:

    hidden_states     transformers: causal model with lm_head, output_hidden_states=True, 16 texts a batch, file order     wanted ≥ 6 ×
    hook              transformers: base model (no lm_head), all blocks, a forward hook, 16 a batch, sorted by length      wanted ≥ 3 ×
    transformer_lens  TransformerBridge, same weights: run_with_cache(names_filter, stop_at_layer=L+1), 16, file order     wanted ≥ 5 ×
    limit             2 FLOPs a weight of blocks 0..L and distinct token, and attention, at the speed of F.linear          wanted ≥ 60 %

A ratio is taken of tokens/s (tokens of the texts, without padding) within one round; the table shows the median of --rounds. Peers pad on
the right and run without gradients. TransformerLens comes with benchmarks/requirements.txt; where it is missing it is left out.
"""

import argparse
import importlib
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
files, models = (importlib.import_module(f"parts.{n}") for n in ("files", "models"))
stage1 = importlib.import_module("01_extract")
BATCH, CANDIDATES, MAX_LENGTH = 16, 16, 2048
WANTED = {"hidden_states": 6, "hook": 3, "transformer_lens": 5, "limit": 0.6, "difference": 1e-4}


# ---------------------------------------------------------------- what is extracted

def pairs_of_file(tokenizer, path, limit):
    """The first `limit` usable pairs → list of (prompt, chosen, rejected)."""
    pairs = []
    for _, row in stage1.read_rows(path):
        pairs += stage1.usable_pairs(tokenizer, row, "safer", MAX_LENGTH)[0]
        if len(pairs) >= limit:
            break
    return pairs[:limit]


def made_up_candidates(pairs, prompts):
    """→ [(prompt, 16 answers)]: the prompt's own answers, then answers of other rows, so candidates share hardly more than the prompt."""
    own, draw = {}, random.Random(0)
    for prompt, *answers in pairs:
        own.setdefault(json.dumps(prompt), (prompt, {}))[1].update(dict.fromkeys(answers))
    others = list(dict.fromkeys(answer for _, answers in own.values() for answer in answers))
    rows = []
    for prompt, answers in list(own.values())[:prompts]:
        foreign = [a for a in draw.sample(others, min(len(others), 2 * CANDIDATES)) if a not in answers]
        rows.append((prompt, (list(answers) + foreign)[:CANDIDATES]))
    return rows


def workloads(args, tokenizer):
    """Yield (name, list of Text): the pairs files, then the candidates."""
    pairs = {path: pairs_of_file(tokenizer, path, args.limit) for path in args.pairs}
    texts = {Path(path).name: [(p, answer) for p, *both in rows for answer in both] for path, rows in pairs.items()}
    if args.candidates:
        rows = [(row["prompt"], row["candidates"][:CANDIDATES]) for _, row in stage1.read_rows(args.candidates)][:args.prompts]
        name = f"{Path(args.candidates).name}, up to {CANDIDATES} candidates"
    else:
        rows = made_up_candidates(pairs[args.pairs[0]], args.prompts)
        name = f"{Path(args.pairs[0]).name}, {CANDIDATES} made-up candidates (own answers, then other rows')"
    texts[name] = [(prompt, answer) for prompt, answers in rows for answer in answers]
    for name, both in texts.items():
        yield name, [stage1.render(tokenizer, prompt, answer, MAX_LENGTH) for prompt, answer in both]


# ---------------------------------------------------------------- the peers: (ids, mask [B, T]) → residual [B, T, d] after block L

def hidden_states(backbone, layer):
    """What most people write: all blocks, the lm_head, every hidden state."""
    return lambda ids, mask: backbone.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]


def hook(backbone, layer):
    """The base model with a forward hook; the blocks above L run, as nothing stops them."""
    kept = []

    def forward(ids, mask):
        handle = backbone.blocks[layer].register_forward_hook(lambda block, args, output: kept.append(output))
        backbone.model.base_model(ids, attention_mask=mask, use_cache=False)
        handle.remove()
        output = kept.pop()
        return output[0] if isinstance(output, tuple) else output
    return forward


def transformer_lens(backbone, layer):
    """TransformerLens 3: a bridge over its own copy of the weights, with the eager attention that it asks for."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM
    folder, name = models.locate_model(backbone.meta["model"]), f"blocks.{layer}.hook_out"
    copy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = stage1.load_tokenizer(backbone.meta["model"])           # its own: the bridge changes the padding side
    bridge = TransformerBridge.boot_transformers(folder, hf_model=copy, tokenizer=tokenizer, device="cpu")
    return lambda ids, mask: bridge.run_with_cache(ids, attention_mask=mask, names_filter=name, stop_at_layer=layer + 1,
                                                   return_type=None)[1][name]


PEERS = {hidden_states: "file order", hook: "by length", transformer_lens: "file order"}


def padded_batches(texts, order, most):
    """Texts → [(indices, ids, mask)], 16 a batch; of more than `most` texts every k-th batch, so that lengths stay comparable."""
    places = list(range(len(texts)))
    if order == "by length":
        places.sort(key=lambda i: len(texts[i].ids))
    batches = [places[i:i + BATCH] for i in range(0, len(places), BATCH)]
    for batch in batches[::-(-len(texts) // most)]:
        longest = max(len(texts[i].ids) for i in batch)
        ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.long)
        for b, i in enumerate(batch):
            ids[b, :len(texts[i].ids)], mask[b, :len(texts[i].ids)] = torch.tensor(texts[i].ids), 1
        yield batch, ids, mask


def run_peer(forward, batches):
    """→ {text index: residual [d] of its last token}."""
    found = {}
    with torch.inference_mode():
        for batch, ids, mask in batches:
            hidden = forward(ids, mask)[torch.arange(len(batch)), mask.sum(1) - 1]
            found.update(zip(batch, hidden))
    return found


def ours(backbone, texts, layer):
    """Stage 1, a shard at a time → [n, d]."""
    shard = 2 * stage1.SHARD_PAIRS
    return torch.cat([stage1.residuals(backbone, texts[i:i + shard], [layer], "last")[0] for i in range(0, len(texts), shard)])


# ---------------------------------------------------------------- the limit

def matrices(backbone, layer):
    """The weight matrices of blocks 0..L."""
    return [p for block in backbone.blocks[:layer + 1] for p in block.parameters() if p.dim() == 2]


def least_work(backbone, texts, layer):
    """→ (distinct tokens, FLOPs): two a weight and token, and attention of each to itself and those before it, nothing twice."""
    config, before, tokens, seen = backbone.model.config.get_text_config(), [], 0, 0
    for ids in sorted(t.ids for t in texts):
        shared = stage1.common_prefix(before, ids)
        tokens += len(ids) - shared
        seen += (len(ids) * (len(ids) + 1) - shared * (shared + 1)) // 2
        before = ids
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return tokens, 2 * tokens * sum(w.numel() for w in matrices(backbone, layer)) + 4 * seen * width * (layer + 1)


def matmul_speed(backbone, layer, repeats=3):
    """FLOPs a second of plain matrix products in the shapes of a full row: every matrix of blocks 0..L on `budget` vectors."""
    weights, speeds = matrices(backbone, layer), []
    inputs = {width: torch.randn(backbone.budget, width) for width in {w.shape[1] for w in weights}}
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)
            speeds.append(2 * backbone.budget * sum(w.numel() for w in weights) / (time.perf_counter() - start))
    return median(speeds)


# ---------------------------------------------------------------- measuring

def timed(function, *args):
    """→ (result, seconds)."""
    start = time.perf_counter()
    return function(*args), time.perf_counter() - start


def peak_mb():
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def largest_difference(found, reference):
    """Over texts, |a - b| / |b| of vectors [n, d]."""
    return float(((found - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def one_at_a_time(backbone, texts, layer):
    """transformers' hidden state of each text alone, without padding or mask → [n, d]."""
    with torch.inference_mode():
        states = [backbone.model(torch.tensor([t.ids]), output_hidden_states=True).hidden_states for t in texts]
    return torch.stack([h[layer + 1][0, -1] for h in states])


def compare(args, backbone, peers, texts):
    """One workload → dict of figures. A round runs us, the plain products, then each peer; the table shows medians over rounds."""
    tokens, (distinct, work) = sum(len(t.ids) for t in texts), least_work(backbone, texts, args.layer)
    batches = {name: list(padded_batches(texts, order, args.peer_texts)) for name, (_, order) in peers.items()}
    for name, (forward, _) in peers.items():                # warm up
        run_peer(forward, batches[name][:1])
    vectors = ours(backbone, texts, args.layer)
    some = range(0, len(texts), max(1, len(texts) // args.single))
    difference = largest_difference(vectors[list(some)], one_at_a_time(backbone, [texts[i] for i in some], args.layer))
    found = {"texts": len(texts), "tokens": tokens, "distinct_tokens": distinct, "flops": work, "difference": difference,
             "seconds": [], "share_of_limit": [], "peers": {}}
    for name, (_, order) in peers.items():
        real = sum(int(mask.sum()) for _, _, mask in batches[name])
        found["peers"][name] = {"texts": sum(len(batch) for batch, _, _ in batches[name]), "tokens": real, "order": order,
                                "padding": sum(mask.numel() for _, _, mask in batches[name]) / real - 1, "seconds": [], "times": []}
    for _ in range(args.rounds):
        seconds = timed(ours, backbone, texts, args.layer)[1]
        found["seconds"].append(seconds)
        found["share_of_limit"].append(work / matmul_speed(backbone, args.layer) / seconds)
        for name, (forward, _) in peers.items():
            peer = found["peers"][name]
            residual, taken = timed(run_peer, forward, batches[name])
            peer["seconds"].append(taken)
            peer["times"].append((tokens / seconds) / (peer["tokens"] / taken))
            peer["difference"] = largest_difference(torch.stack(list(residual.values())), vectors[list(residual)])
    return found


def show(name, found):
    """The table of one workload."""
    verdict = lambda good: "met" if good else "NOT met"
    seconds, tokens, share, off = median(found["seconds"]), found["tokens"], found["share_of_limit"], found["difference"]
    print(f"\n{name}: {found['texts']} texts, {tokens:,} tokens, {tokens / found['distinct_tokens']:.2f} × the distinct ones"
          f"\n  ours              {found['texts'] / seconds:.1f} texts/s, {tokens / seconds:,.0f} tokens/s"
          f"\n  one text a time   differs by {off:.1e} of the norm, wanted ≤ {WANTED['difference']:.0e}: "
          f"{verdict(off <= WANTED['difference'])}")
    for peer, f in found["peers"].items():
        times = f["times"]
        print(f"  {peer:<17} {median(times):.2f} × slower [{min(times):.2f}, {max(times):.2f}], wanted ≥ {WANTED[peer]}: "
              f"{verdict(median(times) >= WANTED[peer])} · {f['tokens'] / median(f['seconds']):,.0f} tokens/s on {f['texts']} texts "
              f"{f['order']}, {f['padding']:.0%} padding, differs by {f['difference']:.1e}")
    print(f"  limit             {median(share):.0%} of it [{min(share):.0%}, {max(share):.0%}], wanted ≥ {WANTED['limit']:.0%}: "
          f"{verdict(median(share) >= WANTED['limit'])}")


def table(found):
    """Figures of speed() → markdown, a column each workload."""
    cells = lambda first, of: "| " + " | ".join([first, *(of(w) for w in found["workloads"].values())]) + " |\n"
    names = [name.partition(".jsonl")[0] + (", 16 candidates a prompt" if "candidates" in name else "") for name in found["workloads"]]
    peer = lambda name: lambda w: "{:.2f} [{:.2f}, {:.2f}]".format(*(f(w["peers"][name]["times"]) for f in (median, min, max)))
    text = "| " + " | ".join(["", *names]) + " |\n|---" + "|---" * len(names) + "|\n"
    text += cells("texts, tokens a distinct token", lambda w: f"{w['texts']}, {w['tokens'] / w['distinct_tokens']:.2f}")
    text += cells("stage 1, tokens/s", lambda w: f"{w['tokens'] / median(w['seconds']):,.0f}")
    said = {"hidden_states": "transformers, file order, `output_hidden_states`", "hook": "transformers, by length, a hook, all blocks",
            "transformer_lens": "TransformerLens, file order, stops at the same block"}
    for name, what in said.items():
        text += cells(f"{what} ({WANTED[name]} wanted)", peer(name))
    text += cells(f"share of the arithmetic limit ({WANTED['limit']:.0%} wanted)", lambda w: f"{median(w['share_of_limit']):.0%}")
    return text + cells("largest difference to a text alone, of the norm", lambda w: f"{w['difference']:.1e}")


def speed(args):
    """Every workload against every peer that can be run → dict of figures."""
    backbone = stage1.load_backbone(args.model, dtype="float32", device="cpu", budget=args.batch_tokens)
    jobs = list(workloads(args, backbone.tokenizer))
    ours(backbone, jobs[0][1], args.layer)
    alone, peers, missing = peak_mb(), {}, []               # before a peer is loaded: the memory of stage 1 alone
    print(f"{args.model}, block {args.layer}, {torch.get_num_threads()} threads, {backbone.pack} rows of {backbone.budget} tokens · "
          f"peak memory of extraction {alone:.0f} MB, weights included")
    for peer, order in PEERS.items():
        try:
            peers[peer.__name__] = (peer(backbone, args.layer), order)
        except ImportError as error:
            missing.append(peer.__name__)
            print(f"{peer.__name__} was not run: {error}")
    found = {}
    for name, texts in jobs:
        found[name] = compare(args, backbone, peers, texts)
        show(name, found[name])
    return {"model": args.model, "layer": args.layer, "batch": BATCH, "budget": backbone.budget, "limit": args.limit, "peak_mb": alone,
            "not_run": missing, "wanted": WANTED, "workloads": found}


# ---------------------------------------------------------------- memory and GPU

def synthetic_pairs(path, count):
    """Write `count` pairs of random words, one at a time."""
    draw = random.Random(0)
    text = lambda most: " ".join("".join(draw.choices("abcdefghij", k=7)) for _ in range(draw.randint(3, most)))
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt": text(20), "chosen": text(40), "rejected": text(40)}) + "\n")


def memory(args):
    """Stage 1 on synthetic pairs through a tiny random Llama → dict of the peak memory after reading and after about 1,000 pairs each."""
    import tiny
    with tempfile.TemporaryDirectory() as folder:
        synthetic_pairs(f"{folder}/pairs.jsonl", args.memory)
        with tiny.argv("--model", tiny.save_model(f"{folder}/model"), "--pairs", f"{folder}/pairs.jsonl", "--layer", 1,
                       "--run", f"{folder}/run"):
            found, save = {"pairs": args.memory, "start_mb": peak_mb(), "shards_mb": []}, stage1.save_stage

            def saved(*given):
                save(*given)
                found["shards_mb"].append(peak_mb())
                done = min(args.memory, len(found["shards_mb"]) * stage1.SHARD_PAIRS)
                print(f"{done:>9,} pairs extracted   {peak_mb():.0f} MB", flush=True)
            stage1.save_stage = saved
            stage1.main()
    return found


def random_llama(tokenizer, device, hidden=2048, blocks=24):
    """→ Backbone of random bfloat16 weights, 1.7 B parameters at the defaults."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=blocks,
                         num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, max_position_embeddings=MAX_LENGTH)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return stage1.make_backbone(model, tokenizer, {"model": "random Llama"})


def matmul_peak(device, size=8192, repeats=20):
    """FLOPs a second of a square bfloat16 matrix product."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    for _ in range(2):                  # the first time to warm up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def gpu(args):
    """Tokens a second on a CUDA device, and the share of its bfloat16 matmul speed → dict, or None without a device."""
    if not torch.cuda.is_available():
        return print("--gpu was not run: torch finds no CUDA device here")
    tokenizer, device = stage1.load_tokenizer(args.model), torch.device("cuda")
    backbone, top, passes = random_llama(tokenizer, device), matmul_peak(device), []
    for name, texts in workloads(args, tokenizer):
        tokens, (distinct, work) = sum(len(t.ids) for t in texts), least_work(backbone, texts, args.layer)
        for backbone.budget in [args.batch_tokens] if args.batch_tokens else [2048, 4096, 8192]:
            ours(backbone, texts, args.layer)
            seconds = median(timed(ours, backbone, texts, args.layer)[1] for _ in range(args.rounds))   # ends on the CPU: nothing is queued
            passes.append({"texts": name, "budget": backbone.budget, "tokens_a_second": tokens / seconds,
                           "distinct_tokens_a_second": distinct / seconds, "share_of_matmul": work / seconds / top})
            print(f"{name}, {backbone.budget} tokens a pass ({backbone.pack}): {tokens / seconds:,.0f} tokens/s, {distinct / seconds:,.0f} "
                  f"distinct, {work / seconds / top:.0%} of a bfloat16 matmul's {top / 1e12:.0f} TFLOP/s")
    return {"device": torch.cuda.get_device_name(), "parameters": backbone.meta["parameters"], "layer": args.layer, "pack": backbone.pack,
            "matmul_flops_a_second": top, "peak_mb": torch.cuda.max_memory_allocated() / 2**20, "passes": passes}


# ---------------------------------------------------------------- command line

def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="as in stage 1 (default demo)")
    p.add_argument("--layer", type=int, default=16, help="block L, not the last (default 16)")
    p.add_argument("--pairs", action="append", help="preference pairs, may be repeated (default data/truthful.jsonl)")
    p.add_argument("--candidates", help="rows {prompt, candidates} (default: made up from the first --pairs)")
    p.add_argument("--limit", type=int, default=200, help="pairs of each file (default 200)")
    p.add_argument("--prompts", type=int, default=25, help="prompts with 16 candidates (default 25)")
    p.add_argument("--peer-texts", type=int, default=10**9, help="measure peers on about so many texts, every k-th batch (default all)")
    p.add_argument("--single", type=int, default=64, help="texts that are also computed one at a time (default 64)")
    p.add_argument("--rounds", type=int, default=3, help="rounds of timing (default 3)")
    p.add_argument("--batch-tokens", type=int, help="tokens a pass of ours (default that of stage 1; with --gpu 2048, 4096 and 8192)")
    p.add_argument("--memory", type=int, metavar="N", help="instead: peak memory of stage 1 on N synthetic pairs")
    p.add_argument("--gpu", action="store_true", help="instead: a random Llama of 1.7 B parameters on a CUDA device")
    p.add_argument("--write", action="store_true", help="put the figures into benchmarks/results/extract.json")
    args = p.parse_args()
    args.pairs = args.pairs or [str(ROOT / "data/truthful.jsonl")]
    return args


def main():
    args = parse_args()
    part, function = ("memory", memory) if args.memory else ("gpu", gpu) if args.gpu else ("speed", speed)
    found = function(args)
    if not args.write or found is None:
        return
    path = ROOT / "benchmarks/results/extract.json"         # one part for each of the three modes
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = ("torch", "transformers", "transformer-lens")
    results[part] = {**found, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
                     "versions": {d.name: d.version for d in distributions() if d.name in wanted} | {"python": platform.python_version()}}
    files.write_text(path, json.dumps(results, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwritten    {path.relative_to(ROOT)}")


if __name__ == "__main__":
    stage1.run_main(main)
