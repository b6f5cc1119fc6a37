"""How fast is stage 1? Every figure is a ratio to a named peer, measured in the same run on the
same token sequences.

    python benchmarks/extract.py --pairs data/truthful.jsonl [--pairs … --candidates FILE --write]
    python benchmarks/extract.py --memory 20000     # peak memory of stage 1 while the pairs grow
    python benchmarks/extract.py --gpu              # a random Llama of 1.7 B parameters in bfloat16
                                                    # on a CUDA device

reads   --pairs        preference pairs, any layout that stage 1 reads
        --candidates   JSONL, one prompt a line: prompt, candidates (16 are used); without it 16 are
                       made up, see `made_up_candidates`
writes  with --write   benchmarks/results/extract.json

Everyone renders with stage 1, reads the output of block L at the last token, in float32 on the
CPU, with the threads torch takes:

    hidden_states     wanted ≥ 6 ×    transformers: causal model with lm_head, 16 a batch, file
                                      order, output_hidden_states=True
    hook              wanted ≥ 3 ×    transformers: base model (no lm_head), all blocks, a forward
                                      hook, 16 a batch, sorted by length
    transformer_lens  wanted ≥ 5 ×    TransformerBridge, same weights, 16, file order:
                                      run_with_cache(names_filter, stop_at_layer=L+1)
    limit             wanted ≥ 60 %   2 FLOPs a weight of blocks 0..L and distinct token, and
                                      attention, at the speed of F.linear

A ratio is taken of tokens/s (tokens of the texts, without padding) within one round; the table
shows the median of --rounds. Peers pad on the right and run without gradients. TransformerLens
comes with benchmarks/requirements.txt; where it is missing it is left out.
"""

import json
import os
import platform
import random
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import (
    ROOT,
    head_line,
    least_work,
    line,
    matrices,
    peak_mb,
    product_speeds,
    size_of,
    stage1,
    timed,
)
from parts.files import run_main
from parts.models import load_tokenizer, locate_model
from parts.rows import read_rows

BATCH = 16              # texts of a peer's forward pass
CANDIDATES = 16         # of a prompt
MAX_LENGTH = 2048
WANTED = {"hidden_states": 6, "hook": 3, "transformer_lens": 5, "limit": 0.6, "difference": 1e-4}


# ---------------------------------------------------------------- what is extracted

def pairs_of_file(tokenizer, path, limit):
    """The first `limit` usable pairs → list of (prompt, chosen, rejected)."""
    pairs = []
    for _, _, pair in common.pairs_of_file(tokenizer, path, "safer", MAX_LENGTH):
        pairs.append((pair.prompt, pair.chosen, pair.rejected))
        if len(pairs) == limit:
            break
    return pairs


def made_up_candidates(pairs, prompts):
    """→ [(prompt, 16 answers)]: the prompt's own answers, then answers of other rows, so candidates
    share hardly more than the prompt."""
    own = {}                            # prompt as JSON: (prompt, its answers as keys)
    for prompt, chosen, rejected in pairs:
        _, answers = own.setdefault(json.dumps(prompt), (prompt, {}))
        answers |= {chosen: None, rejected: None}
    everyone = {}
    for _, answers in own.values():
        everyone |= answers

    draw = random.Random(0)
    rows = []
    for prompt, answers in list(own.values())[:prompts]:
        drawn = draw.sample(list(everyone), min(len(everyone), 2 * CANDIDATES))
        foreign = [answer for answer in drawn if answer not in answers]
        rows.append((prompt, [*answers, *foreign][:CANDIDATES]))
    return rows


def candidates_of(path, prompts):
    """--candidates → [(prompt, answers)]."""
    rows = [row for _, row in read_rows(path)][:prompts]
    return [(row["prompt"], row["candidates"][:CANDIDATES]) for row in rows]


def workloads(args, tokenizer):
    """Yield (name, list of Text): the pairs files, then the candidates."""
    pairs = {path: pairs_of_file(tokenizer, path, args.limit) for path in args.pairs}
    conversations = {}
    for path, rows in pairs.items():
        both = []
        for prompt, chosen, rejected in rows:
            both += [(prompt, chosen), (prompt, rejected)]
        conversations[Path(path).name] = both

    if args.candidates:
        rows = candidates_of(args.candidates, args.prompts)
        name = f"{Path(args.candidates).name}, up to {CANDIDATES} candidates"
    else:
        rows = made_up_candidates(pairs[args.pairs[0]], args.prompts)
        name = (f"{Path(args.pairs[0]).name}, {CANDIDATES} made-up candidates "
                "(own answers, then other rows')")
    conversations[name] = [(prompt, answer) for prompt, answers in rows for answer in answers]

    for name, both in conversations.items():
        yield name, [stage1.render(tokenizer, *conversation, MAX_LENGTH) for conversation in both]


# ------------------------------------ the peers: (ids, mask [B, T]) → residual [B, T, d] of block L

def hidden_states(backbone, layer):
    """What most people write: all blocks, the lm_head, every hidden state."""
    def forward(ids, mask):
        output = backbone.model(ids, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[layer + 1]
    return forward


def hook(backbone, layer):
    """The base model with a forward hook; the blocks above L run, as nothing stops them."""
    kept = []

    def keep(block, args, output):
        kept.append(output)

    def forward(ids, mask):
        handle = backbone.blocks[layer].register_forward_hook(keep)
        backbone.model.base_model(ids, attention_mask=mask, use_cache=False)
        handle.remove()
        output = kept.pop()
        return output[0] if isinstance(output, tuple) else output
    return forward


def transformer_lens(backbone, layer):
    """TransformerLens 3: a bridge over its own copy of the weights, with the eager attention that
    it asks for."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM
    folder = locate_model(backbone.meta["model"])
    name = f"blocks.{layer}.hook_out"
    copy = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = load_tokenizer(backbone.meta["model"])      # its own: the padding side is changed
    bridge = TransformerBridge.boot_transformers(
        folder, hf_model=copy, tokenizer=tokenizer, device="cpu")

    def forward(ids, mask):
        _, cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=name,
                                         stop_at_layer=layer + 1, return_type=None)
        return cache[name]
    return forward


PEERS = {hidden_states: "file order", hook: "by length", transformer_lens: "file order"}


def padded_batches(texts, order, most):
    """Texts → yield (indices, ids, mask), 16 a batch; of more than `most` texts every k-th batch,
    so that lengths stay comparable."""
    places = list(range(len(texts)))
    if order == "by length":
        places.sort(key=lambda i: len(texts[i].ids))
    batches = [places[i:i + BATCH] for i in range(0, len(places), BATCH)]
    step = -(-len(texts) // most)                           # rounded up
    for batch in batches[::step]:
        yield batch, *common.padded([texts[i] for i in batch])


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
    parts = []
    for start in range(0, len(texts), shard):
        some = texts[start:start + shard]
        parts.append(stage1.residuals(backbone, some, [layer], ["last"])[layer, "last"])
    return torch.cat(parts)


# ---------------------------------------------------------------- the limit

def matmul_speed(backbone, layer):
    """FLOPs a second of plain matrix products in the shapes of a full row: every matrix of blocks
    0..L on `budget` vectors."""
    return median(product_speeds(matrices(backbone, layer), backbone.budget))


# ---------------------------------------------------------------- measuring

def largest_difference(found, reference):
    """Over texts, |a - b| / |b| of vectors [n, d]."""
    return float(((found - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def one_at_a_time(backbone, texts, layer):
    """transformers' hidden state of each text alone, without padding or mask → [n, d]."""
    rows = []
    with torch.inference_mode():
        for text in texts:
            output = backbone.model(torch.tensor([text.ids]), output_hidden_states=True)
            rows.append(output.hidden_states[layer + 1][0, -1])
    return torch.stack(rows)


def tokens_of(texts):
    """Tokens of the texts, without padding."""
    return sum(len(text.ids) for text in texts)


def compare(args, backbone, peers, texts):
    """One workload → dict of figures. A round runs us, the plain products, then each peer; the
    table shows medians over rounds."""
    distinct, work = least_work(backbone, texts, args.layer)
    batches = {name: list(padded_batches(texts, order, args.peer_texts))
               for name, (_, order) in peers.items()}
    for name, (forward, _) in peers.items():                # warm up
        run_peer(forward, batches[name][:1])
    vectors = ours(backbone, texts, args.layer)
    some = list(range(0, len(texts), max(1, len(texts) // args.single)))
    alone = one_at_a_time(backbone, [texts[i] for i in some], args.layer)

    found = {"texts": len(texts), "tokens": tokens_of(texts), "distinct_tokens": distinct,
             "flops": work, "difference": largest_difference(vectors[some], alone),
             "seconds": [], "share_of_limit": [], "peers": {}}
    for name, (_, order) in peers.items():
        found["peers"][name] = about_peer(batches[name], order)
    for _ in range(args.rounds):
        _, seconds = timed(ours, backbone, texts, args.layer)
        found["seconds"].append(seconds)
        found["share_of_limit"].append(work / matmul_speed(backbone, args.layer) / seconds)
        for name, (forward, _) in peers.items():
            peer = found["peers"][name]
            residual, taken = timed(run_peer, forward, batches[name])
            peer["seconds"].append(taken)
            peer["times"].append((found["tokens"] / seconds) / (peer["tokens"] / taken))
            peer["difference"] = largest_difference(torch.stack(list(residual.values())),
                                                    vectors[list(residual)])
    return found


def about_peer(batches, order):
    """What a peer reads, before it is measured."""
    tokens = sum(int(mask.sum()) for _, _, mask in batches)
    return {"texts": sum(len(batch) for batch, _, _ in batches), "tokens": tokens, "order": order,
            "padding": size_of(mask for _, _, mask in batches) / tokens - 1,
            "seconds": [], "times": []}


def speed(args):
    """Every workload against every peer that can be run → dict of figures."""
    backbone = stage1.load_backbone(args.model, dtype="float32", device="cpu",
                                    budget=args.batch_tokens)
    jobs = list(workloads(args, backbone.tokenizer))
    ours(backbone, jobs[0][1], args.layer)
    alone = peak_mb()                       # before a peer is loaded: the memory of stage 1 alone
    print(f"{args.model}, block {args.layer}, {torch.get_num_threads()} threads, {backbone.pack} "
          f"rows of {backbone.budget} tokens · peak memory of extraction {alone:.0f} MB, weights "
          "included")
    peers = {}
    missing = []
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
    return {"model": args.model, "layer": args.layer, "batch": BATCH, "budget": backbone.budget,
            "limit": args.limit, "peak_mb": alone, "not_run": missing, "wanted": WANTED,
            "workloads": found}


# ---------------------------------------------------------------- tables

def verdict(good):
    """What is said of a wish."""
    return "met" if good else "NOT met"


def spread(values, form):
    """median [least, most]"""
    least, most = min(values), max(values)
    return f"{median(values):{form}}", f"[{least:{form}}, {most:{form}}]"


def show(name, found):
    """The lines to print of one workload."""
    seconds = median(found["seconds"])
    tokens = found["tokens"]
    off = found["difference"]
    print(f"\n{name}: {found['texts']} texts, {tokens:,} tokens, "
          f"{tokens / found['distinct_tokens']:.2f} × the distinct ones")
    print(f"  ours              {found['texts'] / seconds:.1f} texts/s, "
          f"{tokens / seconds:,.0f} tokens/s")
    print(f"  one text a time   differs by {off:.1e} of the norm, "
          f"wanted ≤ {WANTED['difference']:.0e}: {verdict(off <= WANTED['difference'])}")
    for who, peer in found["peers"].items():
        times, limits = spread(peer["times"], ".2f")
        met = verdict(median(peer["times"]) >= WANTED[who])
        print(f"  {who:<17} {times} × slower {limits}, wanted ≥ {WANTED[who]}: {met} · "
              f"{peer['tokens'] / median(peer['seconds']):,.0f} tokens/s on {peer['texts']} texts "
              f"{peer['order']}, {peer['padding']:.0%} padding, "
              f"differs by {peer['difference']:.1e}")
    share, limits = spread(found["share_of_limit"], ".0%")
    met = verdict(median(found["share_of_limit"]) >= WANTED["limit"])
    print(f"  limit             {share} of it {limits}, wanted ≥ {WANTED['limit']:.0%}: {met}")


SAID = {"hidden_states": "transformers, file order, `output_hidden_states`",
        "hook": "transformers, by length, a hook, all blocks",
        "transformer_lens": "TransformerLens, file order, stops at the same block"}


def table(found):
    """Figures of speed() → markdown, a column each workload."""
    found = found["speed"]
    work = found["workloads"].values()
    repeats = [row["tokens"] / row["distinct_tokens"] for row in work]
    speeds = [row["tokens"] / median(row["seconds"]) for row in work]

    text = head_line("", [column_of(name) for name in found["workloads"]])
    text += line("texts, tokens a distinct token",
                 [f"{row['texts']}, {times:.2f}" for row, times in zip(work, repeats)])
    text += line("stage 1, tokens/s", [f"{tokens:,.0f}" for tokens in speeds])
    for name, what in SAID.items():
        cells = [" ".join(spread(row["peers"][name]["times"], ".2f")) for row in work]
        text += line(f"{what} ({WANTED[name]} wanted)", cells)
    text += line(f"share of the arithmetic limit ({WANTED['limit']:.0%} wanted)",
                 [f"{median(row['share_of_limit']):.0%}" for row in work])
    text += line("largest difference to a text alone, of the norm",
                 [f"{row['difference']:.1e}" for row in work])
    return text


def column_of(workload):
    """What the table calls a workload."""
    name = workload.partition(".jsonl")[0]
    return name + (", 16 candidates a prompt" if "candidates" in workload else "")


# ---------------------------------------------------------------- memory

def memory_claim(found):
    """Peak memory of stage 1 against the number of pairs → markdown."""
    shards = found["memory"]["shards_mb"]
    return (f"Stage 1 on {found['memory']['pairs']:,} pairs and a tiny model: {shards[0]:.0f} MB "
            f"after the first shard, {shards[-1]:.0f} MB after the last.\n")


def synthetic_pairs(path, count):
    """Write `count` pairs of random words, one at a time."""
    draw = random.Random(0)

    def text(most):
        words = ["".join(draw.choices("abcdefghij", k=7)) for _ in range(draw.randint(3, most))]
        return " ".join(words)

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"prompt": text(20), "chosen": text(40), "rejected": text(40)}
            file.write(json.dumps(row) + "\n")


def memory(args):
    """Stage 1 on synthetic pairs through a tiny random Llama → dict of the peak memory after
    reading and after about 1,000 pairs each."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    found = {"pairs": args.memory, "start_mb": peak_mb(), "shards_mb": []}
    save = stage1.save_stage

    def save_and_look(*given):
        save(*given)
        found["shards_mb"].append(peak_mb())
        done = min(args.memory, len(found["shards_mb"]) * stage1.SHARD_PAIRS)
        print(f"{done:>9,} pairs extracted   {peak_mb():.0f} MB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        pairs = f"{folder}/pairs.jsonl"
        model = tiny.save_model(f"{folder}/model")
        synthetic_pairs(pairs, args.memory)
        stage1.save_stage = save_and_look
        with tiny.argv("--model", model, "--pairs", pairs, "--layer", 1, "--run", f"{folder}/run"):
            stage1.main()
    return found


# ---------------------------------------------------------------- GPU

def random_llama(tokenizer, device, hidden=2048, blocks=24):
    """→ Backbone of random bfloat16 weights, 1.7 B parameters at the defaults."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=blocks, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256, max_position_embeddings=MAX_LENGTH)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa")
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
    """Tokens a second on a CUDA device, and the share of its bfloat16 matmul speed → dict, or None
    without a device."""
    if not torch.cuda.is_available():
        print("--gpu was not run: torch finds no CUDA device here")
        return None
    tokenizer = load_tokenizer(args.model)
    device = torch.device("cuda")
    backbone = random_llama(tokenizer, device)
    top = matmul_peak(device)
    passes = []
    for name, texts in workloads(args, tokenizer):
        for budget in [args.batch_tokens] if args.batch_tokens else [2048, 4096, 8192]:
            backbone.budget = budget
            passes.append({"texts": name, "budget": budget,
                           **gpu_speed(args, backbone, texts, top)})
            show_gpu(passes[-1], backbone.pack, top)
    return {"device": torch.cuda.get_device_name(), "parameters": backbone.meta["parameters"],
            "layer": args.layer, "pack": backbone.pack, "matmul_flops_a_second": top,
            "peak_mb": torch.cuda.max_memory_allocated() / 2**20, "passes": passes}


def gpu_speed(args, backbone, texts, top):
    """Tokens a second of one workload at one budget. What is timed ends on the CPU: nothing is
    queued then."""
    distinct, work = least_work(backbone, texts, args.layer)
    ours(backbone, texts, args.layer)
    seconds = median(timed(ours, backbone, texts, args.layer)[1] for _ in range(args.rounds))
    return {"tokens_a_second": tokens_of(texts) / seconds,
            "distinct_tokens_a_second": distinct / seconds,
            "share_of_matmul": work / seconds / top}


def show_gpu(found, pack, top):
    """The line to print of one pass."""
    print(f"{found['texts']}, {found['budget']} tokens a pass ({pack}): "
          f"{found['tokens_a_second']:,.0f} tokens/s, "
          f"{found['distinct_tokens_a_second']:,.0f} distinct, "
          f"{found['share_of_matmul']:.0%} of a bfloat16 matmul's {top / 1e12:.0f} TFLOP/s")


# ---------------------------------------------------------------- command line

def parse_args():
    """The flags."""
    p = common.command_line(__doc__)
    p.add_argument("--model", default="demo", help="as in stage 1 (default demo)")
    p.add_argument("--layer", type=int, default=16, help="block L, not the last (default 16)")
    p.add_argument("--pairs", action="append",
                   help="preference pairs, may be repeated (default data/truthful.jsonl)")
    p.add_argument("--candidates",
                   help="rows {prompt, candidates} (default: made up from the first --pairs)")
    p.add_argument("--limit", type=int, default=200, help="pairs of each file (default 200)")
    p.add_argument("--prompts", type=int, default=25,
                   help="prompts with 16 candidates (default 25)")
    p.add_argument("--peer-texts", type=int, default=10**9,
                   help="measure peers on about so many texts, every k-th batch (default all)")
    p.add_argument("--single", type=int, default=64,
                   help="texts that are also computed one at a time (default 64)")
    p.add_argument("--rounds", type=int, default=3, help="rounds of timing (default 3)")
    p.add_argument("--batch-tokens", type=int,
                   help="tokens a pass of ours (default that of stage 1; with --gpu 2048, 4096 and "
                        "8192)")
    p.add_argument("--memory", type=int, metavar="N",
                   help="instead: peak memory of stage 1 on N synthetic pairs")
    p.add_argument("--gpu", action="store_true",
                   help="instead: a random Llama of 1.7 B parameters on a CUDA device")
    p.add_argument("--write", action="store_true",
                   help="put the figures into benchmarks/results/extract.json")
    args = p.parse_args()
    args.pairs = args.pairs or [str(ROOT / "data/truthful.jsonl")]
    return args


def about_the_machine():
    """What the figures were measured with."""
    wanted = ("torch", "transformers", "transformer-lens")
    versions = {found.name: found.version for found in distributions() if found.name in wanted}
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "versions": {**versions, "python": platform.python_version()}}


def main():
    """The command."""
    args = parse_args()
    part, measure = "speed", speed
    if args.memory:
        part, measure = "memory", memory
    elif args.gpu:
        part, measure = "gpu", gpu
    found = measure(args)
    if args.write and found is not None:
        results = common.read_result("extract")             # one part for each of the three modes
        results[part] = {**found, **about_the_machine()}
        common.write_result("extract", results)
        print("\nwritten    benchmarks/results/extract.json")


if __name__ == "__main__":
    run_main(main)
