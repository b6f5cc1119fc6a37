"""Stage 1: preference pairs → residual-stream vectors of a frozen language model.

reads   --pairs   prompt, chosen, rejected in any of the usual layouts (see README, "Pairs")
writes  pairs.jsonl                             id, prompt, chosen, rejected, group, split, category, source
        dropped.jsonl                           rows that could not be used, with the reason
        activations/layer16-00000-of-00001.safetensors
            chosen, rejected [n, d]             the vector z of the scored token at the output of block L
            pair, group [n] int64 · split [n] uint8 (0 train, 1 dev, 2 test)
            chosen_tokens, rejected_tokens [n] int32 (length of the response)

    python 01_extract.py --model demo --pairs data/truthful.jsonl --layer 16 --run runs/demo
    torchrun --nproc-per-node 4 -- 01_extract.py --model … --run …        (with the --, or torchrun takes --run for its own)

The paper does not say which token is read: --token names four rules. It pads its batches; here texts that share a
beginning are laid into one tree, so that no token is computed twice, and the forward pass ends at block L.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parts.chat import PLAIN_TEMPLATE, Text, control_tokens, render, takes_system_turn
from parts.files import UserError, file_hash, moved_into_place, run_main, save_stage, up_to_date
from parts.files import load_stage as load_stage  # save_stage and load_stage are what others read and write stage files with
from parts.models import describe, from_pretrained, load_config, load_tokenizer
from parts.rows import read_rows, usable_pairs

SPLITS = ("train", "dev", "test")
TRAIN, DEV, TEST = range(3)         # how the files number them
RULES = ("last", "eot", "content", "mean")
SHARD_PAIRS = 1024      # a shard is the unit that a killed run does not have to compute again


# ---------------------------------------------------------------- questions, and the side they fall on

def plain_text(prompt):
    """A prompt's text, normalised: the same question counts as the same in every file."""
    text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
    return " ".join(text.split()).casefold()


def question_of(prompt):
    """What a pair is grouped and split by: the prompt, of a dialogue its first user turn (data sets cut one dialogue at many turns)."""
    if isinstance(prompt, list):
        prompt = next((m["content"] for m in prompt if m["role"] == "user"), prompt[0]["content"])
    return plain_text(prompt)


def hash_number(text):
    """48 bits of SHA-256 → int: an id that JSON and int64 both hold exactly."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def split_of(prompt, seed=0, shares=(0.7, 0.1, 0.2)):
    """"train", "dev" or "test" by a hash of (seed, normalised question): no file or order can move it."""
    place = hash_number(f"{seed}:{question_of(prompt)}") / 2**48
    return SPLITS[min(2, int(np.searchsorted(np.cumsum(shares), place, side="right")))]


# ---------------------------------------------------------------- the frozen backbone

@dataclass
class Backbone:
    """A frozen language model with what identifies it and how it is run."""
    model: torch.nn.Module
    tokenizer: object
    blocks: torch.nn.ModuleList
    meta: dict                      # model, revision, backbone, template, dtype, attention: recorded in every file
    pack: str = "tree"
    budget: int = 512               # tokens a forward pass
    notes: list = field(default_factory=list)

    @property
    def device(self):
        return self.model.get_input_embeddings().weight.device


ONE_PASS = threading.Lock()         # the hooks of one forward pass would see that of another thread too


class ReachedBlock(Exception):
    """Ends the forward pass once the last wanted block has given its output."""


def load_backbone(name, revision=None, dtype="auto", device="auto", device_map=None, pack="tree", budget=None):
    """Load model and tokenizer → Backbone. Errors: UserError. Remote code is never run."""
    tokenizer = load_tokenizer(name, revision)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no such device here ({str(error).splitlines()[0]}) · --device {device} · "
                        "pass cpu, or a device that torch finds") from None
    meta = describe(name, load_config(name, revision), tokenizer, revision, dtype, device)
    spread = {"device_map": device_map} if device_map else {}
    model = from_pretrained("AutoModelForCausalLM", name, revision, dtype=getattr(torch, meta["dtype"]),
                            attn_implementation=meta["attention"], **spread)
    return make_backbone(model if device_map else model.to(device), tokenizer, meta, pack, budget)


def make_backbone(model, tokenizer, meta, pack="tree", budget=None):
    """A loaded model → Backbone: frozen, its blocks found, tree packing checked against single texts."""
    model.eval().requires_grad_(False)
    config = model.config.get_text_config()
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers]
    if not lists:
        raise UserError(f"no list of {config.num_hidden_layers} blocks found · {meta['model']} · only decoder models work")
    # one number of each matrix tells a fine-tuned copy apart; None: this block lies on the disk
    matrices = [p for block in lists[0] for p in [p for p in block.parameters() if p.dim() == 2][:16]]
    meta = {**meta, "weights": [None if p.is_meta else float(f"{float(p.flatten()[p.numel() // 2]):.3g}") for p in matrices],
            "parameters": sum(p.numel() for p in model.parameters())}
    backbone = Backbone(model, tokenizer, lists[0], meta, pack, budget or (512 if model.device.type == "cpu" else 4096))
    if not takes_system_turn(tokenizer):
        backbone.notes.append("the chat template has no system turn: where there is one, it is put in front of the first user turn")
    if tokenizer.chat_template == PLAIN_TEMPLATE:
        backbone.notes.append("the model has no chat template: a plain one (User: … Assistant: …) is used")
    if pack == "tree" and not packing_holds(backbone):
        backbone.pack = "pad"
        backbone.notes.append("the model does not honour a 4D mask: length-sorted padding is used")
    return backbone


# ---------------------------------------------------------------- many texts in one forward pass

# A row is a tree. Texts that begin alike share the nodes of their beginning:
#
#     node    0  1  2  3  4  5  6  7        "S Q a b" "S Q a c d" "S Q e f"   (sorted)
#     token   S  Q  a  b  c  d  e  f
#     depth   0  1  2  3  3  4  2  3        the position id is the depth
#
#             S ── Q ─┬─ a ─┬─ b
#                     │     └─ c ── d       d attends to S Q a c d: itself and its ancestors,
#                     └─ e ── f             not to b (a cousin), nor to e, f
#
# so eight tokens are computed instead of thirteen, and each text gets the hidden state it would have alone.

@dataclass
class Row:
    """One forward pass: `ids`, `depth` [T], `sees` bool [T, T], and for each text (its index, its nodes)."""
    ids: np.ndarray
    depth: np.ndarray
    sees: np.ndarray
    members: list


def tree_rows(sequences, budget):
    """Token sequences → Rows of at most `budget` nodes (a longer text has its own row)."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    ids, depth, spans, members, path = [], [], [], [], np.zeros(0, int)
    before = []
    for i in order:
        seq = sequences[i]
        shared = common_prefix(before, seq)          # the longest any earlier text has: they are sorted
        if ids and len(ids) + len(seq) - shared > budget:
            yield finish_row(ids, depth, spans, members)
            ids, depth, spans, members, path, shared = [], [], [], [], path[:0], 0
        stem, start = path[:shared], len(ids)
        ids.extend(seq[shared:])
        depth.extend(range(shared, len(seq)))
        spans.append((start, len(ids), stem))
        path = np.concatenate([stem, np.arange(start, len(ids))])
        members.append((i, path))
        before = seq
    if ids:
        yield finish_row(ids, depth, spans, members)


def common_prefix(a, b):
    """Length of the common beginning of two token lists."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def finish_row(ids, depth, spans, members):
    """Fill in who sees whom: a new branch sees the stem it grows from, and itself up to here."""
    sees = np.zeros((len(ids), len(ids)), bool)
    for start, stop, stem in spans:
        sees[start:stop, stem] = True
        sees[start:stop, start:stop] = np.tri(stop - start, dtype=bool)
    return Row(np.array(ids), np.array(depth), sees, members)


def attention_masks(backbone, row):
    """Row → additive mask [1, 1, T, T] (0 or the dtype's minimum); a dict of two where the layers differ in kind.

    Additive, because eager attention adds the mask to the logits: a boolean one would pass silently and do nothing.
    """
    config = backbone.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    near = row.depth[:, None] - row.depth[None, :] < window if window else True

    def additive(allowed):
        mask = torch.zeros(allowed.shape, dtype=backbone.model.dtype)
        return mask.masked_fill_(torch.from_numpy(~allowed), torch.finfo(mask.dtype).min)[None, None].to(backbone.device)
    if len(kinds) > 1:
        return {"full_attention": additive(row.sees), "sliding_attention": additive(row.sees & near)}
    slides = window and kinds != {"full_attention"}
    return additive(row.sees & near if slides else row.sees)


def padded_batches(sequences, budget):
    """Length-sorted batches of at most `budget` tokens with padding → lists of indices."""
    batch = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if batch and len(sequences[batch[0]]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def forward_to(backbone, layers, **inputs):
    """Run the blocks up to the highest of `layers` → their outputs, list of [B, T, d]. Nothing above is computed.

    The output of block L is `hidden_states[L+1]` of transformers, but for the last block, where that entry is taken
    after the final norm; the hook gives the residual stream before it.
    """
    kept, hooks = {}, []

    def keep(layer):
        def hook(block, args, output):
            kept[layer] = output[0] if isinstance(output, tuple) else output
            if layer == max(layers):
                raise ReachedBlock
        return hook
    with ONE_PASS:
        try:
            hooks = [backbone.blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
            with torch.inference_mode():
                backbone.model(**{"use_cache": False, **inputs})
        except ReachedBlock:
            pass
        finally:
            for hook in hooks:
                hook.remove()
    return [kept[layer] for layer in layers]


def hidden_rows(backbone, sequences, layers):
    """Yield (members, hidden) a forward pass: members are (text index, its tokens' places), hidden one [T, d] a layer."""
    device = backbone.device
    if backbone.pack == "tree":
        for row in tree_rows(sequences, backbone.budget):
            ids, depth = (torch.from_numpy(x)[None].to(device) for x in (row.ids, row.depth))
            hidden = forward_to(backbone, layers, input_ids=ids, position_ids=depth, attention_mask=attention_masks(backbone, row))
            yield row.members, [h[0] for h in hidden]
        return
    for batch in padded_batches(sequences, backbone.budget):
        longest = len(sequences[batch[0]])
        ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.long)
        for b, i in enumerate(batch):               # padded on the right: positions and places stay plain
            ids[b, :len(sequences[i])] = torch.tensor(sequences[i])
            mask[b, :len(sequences[i])] = 1
        hidden = forward_to(backbone, layers, input_ids=ids.to(device), attention_mask=mask.to(device))
        yield ([(i, b * longest + np.arange(len(sequences[i]))) for b, i in enumerate(batch)],
               [h.flatten(0, 1) for h in hidden])


def residuals(backbone, texts, layers, rule, progress=None):
    """Residual-stream vectors of the token(s) that `rule` names: list of Text → [len(layers), n, d], dtype of the model."""
    width = backbone.model.config.get_text_config().hidden_size
    out = torch.empty(len(layers), len(texts), width, dtype=backbone.model.dtype)
    try:
        return fill_residuals(out, backbone, texts, layers, rule, progress)
    except torch.OutOfMemoryError:
        if backbone.budget <= 64:
            raise UserError("out of memory even with one text a forward pass · --max-length, --dtype · shorter texts, a smaller model, "
                            "bfloat16 or --device-map auto") from None
    backbone.budget //= 2               # outside of `except`: there the failed pass is still held
    torch.cuda.empty_cache()
    print(f"note: out of memory, going on with {backbone.budget} tokens a forward pass")
    return residuals(backbone, texts, layers, rule, progress)


def fill_residuals(out, backbone, texts, layers, rule, progress):
    """The work of residuals()."""
    for members, hidden in hidden_rows(backbone, [t.ids for t in texts], layers):
        places = [path[slice(*texts[i].span(rule))] for i, path in members]
        rows = torch.tensor([i for i, _ in members])
        for n, h in enumerate(hidden):
            if rule == "mean":
                vectors = torch.stack([h[torch.from_numpy(p).to(h.device)].float().mean(0) for p in places])
            else:
                vectors = h[torch.from_numpy(np.concatenate(places)).to(h.device)]
            out[n, rows] = vectors.to(out)
        if progress:
            progress(sum(len(path) for _, path in members))
    return out


def packing_holds(backbone):
    """Does a tree give the same hidden states as each text alone? Tried on three short texts that branch."""
    last = len(backbone.blocks) - 1
    rng = np.random.default_rng(0)
    stem, *tails = (rng.integers(10, backbone.model.config.get_text_config().vocab_size, n).tolist() for n in (6, 4, 5, 3))
    texts = [Text(stem + tail, 6, len(stem + tail), len(stem + tail) - 1) for tail in tails]
    try:
        packed = residuals(backbone, texts, [last], "last")[0].float()
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
        return False
    alone = torch.cat([residuals(backbone, [t], [last], "last")[0] for t in texts]).float()
    tolerance = 1e-4 if backbone.model.dtype == torch.float32 else 3e-2
    return bool((packed - alone).norm() <= tolerance * alone.norm())


# ---------------------------------------------------------------- the stage

def prepare_pairs(args, tokenizer):
    """Read, normalise, check, split; a row at a time, so that memory does not grow → what was counted.

    Writes pairs.jsonl and dropped.jsonl (this one also where too few pairs are left: it says why). Rows hold no token ids.
    """
    shares, control, run = [float(x) for x in args.split.split(",")], control_tokens(tokenizer)[0], Path(args.run)
    seen = {"kept": 0, "dropped": [], "split": collections.Counter(), "groups": set(), "typed": 0}
    line = lambda row: json.dumps(row, ensure_ascii=False) + "\n"
    write = functools.partial(open, mode="w", encoding="utf-8", errors="backslashreplace")    # half of a UTF-16 pair stays a JSON escape
    with moved_into_place(run / "pairs.jsonl") as good_path, write(good_path) as good:
        with moved_into_place(run / "dropped.jsonl") as bad_path, write(bad_path) as bad:
            for n, (where, raw) in enumerate(read_rows(args.pairs)):
                if args.limit and seen["kept"] >= args.limit:
                    break
                found, reasons = usable_pairs(tokenizer, raw, args.label, args.max_length, first=None if n else where)
                for reason in reasons:
                    bad.write(line({"where": where, "reason": reason, "row": raw}))
                    seen["dropped"].append((reason, where))
                for row in pair_rows(raw, where, found[:args.limit - seen["kept"] if args.limit else None], args, shares):
                    text = line(row)
                    good.write(text)
                    seen["kept"] += 1
                    seen["split"][row["split"]] += 1
                    seen["groups"].add(row["group"])
                    seen["typed"] += bool(control.search(text))
        if not seen["kept"]:
            reasons = "; ".join(sorted({reason for reason, _ in seen["dropped"]})[:3]) or "the file is empty"
            raise UserError(f"no usable pair ({reasons}) · {args.pairs} · rows need prompt, chosen, rejected")
        if len(seen["dropped"]) > seen["kept"]:
            raise UserError("more than half of the pairs cannot be used, the first because: {} · {} · mend the file or raise "
                            "--max-length".format(*seen["dropped"][0]))
    return seen


def pair_rows(raw, where, found, args, shares):
    """Yield the rows of pairs.jsonl that one row of the user's file gives."""
    name = raw.get("id") if isinstance(raw, dict) else None
    for n, (prompt, chosen, rejected) in enumerate(found):
        identity = (re.findall(r"\d+", where)[-1] if name is None else str(name)) + (f"#{n}" if len(found) > 1 else "")
        yield {"id": identity, "prompt": prompt, "chosen": chosen, "rejected": rejected, "group": hash_number(question_of(prompt)),
               "split": split_of(prompt, args.seed, shares), "category": raw.get("category", raw.get("subset")),
               "source": raw.get("source", Path(args.pairs).name)}


def extract_shard(backbone, tokenizer, rows, start, args, progress):
    """Pairs → {layer: tensors of one activation shard}."""
    texts = [render(tokenizer, row["prompt"], row[side], args.max_length) for row in rows for side in ("chosen", "rejected")]
    vectors = residuals(backbone, texts, args.layer, args.token, progress)
    bad = (~torch.isfinite(vectors)).any(-1).any(0).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"NaN or Inf in the residual stream · pair {rows[bad[0] // 2]['id']} · try --dtype float32, or remove the pair")
    lengths = torch.tensor([t.last - t.first for t in texts], dtype=torch.int32)
    common = {"pair": torch.arange(start, start + len(rows)), "group": torch.tensor([r["group"] for r in rows]),
              "split": torch.tensor([SPLITS.index(r["split"]) for r in rows], dtype=torch.uint8),
              "chosen_tokens": lengths[0::2], "rejected_tokens": lengths[1::2]}
    return {layer: {"chosen": v[0::2], "rejected": v[1::2], **common} for layer, v in zip(args.layer, vectors)}


def shard_path(run, layer, n, count):
    """runs/demo/activations/layer16-00000-of-00001.safetensors"""
    return Path(run) / "activations" / f"layer{layer}-{n:05d}-of-{count:05d}.safetensors"


def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo", help="demo, a hub name, a folder or a .gguf file (default demo)")
    p.add_argument("--revision", help="branch, tag or commit of a hub model")
    p.add_argument("--pairs", default="data/truthful.jsonl", help="preference pairs (default data/truthful.jsonl)")
    p.add_argument("--layer", type=int, nargs="+", default=[16], help="block(s) L, 0-based; several in one pass (default 16)")
    p.add_argument("--token", choices=RULES, default="last", help="which token is read: last of the conversation, eot the end-of-turn "
                   "mark, content the response's last token, mean over the response (default last)")
    p.add_argument("--run", default="runs/demo", help="folder of all files of this run (default runs/demo)")
    p.add_argument("--max-length", type=int, default=2048, help="tokens; a longer text loses the beginning of its prompt (default 2048)")
    p.add_argument("--batch-tokens", type=int, help="tokens a forward pass (default 512 on CPU, 4096 on a GPU)")
    p.add_argument("--pack", choices=("tree", "pad"), default="tree", help="share common beginnings, or pad (default tree)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="of the model (default auto: float32 on CPU, bfloat16 on a GPU)")
    p.add_argument("--device", default="auto", help="cpu, cuda, … (default auto)")
    p.add_argument("--device-map", help="auto: spread a model over several devices")
    p.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    p.add_argument("--split", default="0.7,0.1,0.2", help="shares of train, dev, test (default 0.7,0.1,0.2)")
    p.add_argument("--limit", type=int, help="use only the first N pairs")
    p.add_argument("--label", choices=("safer", "better"), help="which label of a file that has both (PKU-SafeRLHF)")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = p.parse_args()
    args.layer = list(dict.fromkeys(args.layer))
    for flag, value in (("--limit", args.limit), ("--max-length", args.max_length), ("--batch-tokens", args.batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1 · {flag} {value} · leave it out for the default")
    shares = args.split.split(",")
    number = re.compile(r"0?\.\d+|[01](\.0*)?")
    if len(shares) != 3 or not all(number.fullmatch(x) for x in shares) or abs(sum(map(float, shares)) - 1) > 1e-6:
        raise UserError(f"--split needs three shares that add up to 1 · {args.split} · e.g. 0.7,0.1,0.2")
    return args


def main():
    """Stage 1 from the command line."""
    args = parse_args()
    config, tokenizer = load_config(args.model, args.revision), load_tokenizer(args.model, args.revision)
    for layer in args.layer:
        if not 0 <= layer < config.num_hidden_layers:
            raise UserError(f"layer {layer} does not exist · {args.model} has blocks 0 to {config.num_hidden_layers - 1} · pass --layer")
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))         # set by torchrun
    if ranks > 1:
        if args.device_map:
            raise UserError("several processes, each with a model over several devices · --device-map · leave it out under torchrun")
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))       # ranks wait for the slowest
        if args.device == "auto" and torch.cuda.is_available():
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank else sys.stdout):       # only rank 0 prints
        extract(args, config, tokenizer, rank, ranks)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def extract(args, config, tokenizer, rank, ranks):
    """Read the pairs, compute this rank's share of the shards that are missing, report."""
    run = Path(args.run)
    if rank == 0:
        seen = prepare_pairs(args, tokenizer)
    wait_for_all(ranks)                     # pairs.jsonl is there
    with open(run / "pairs.jsonl", encoding="utf-8") as file:
        pairs = sum(1 for _ in file)
    meta = {"stage": "extract", **describe(args.model, config, tokenizer, args.revision, args.dtype, args.device), "token": args.token,
            "max_length": args.max_length, "seed": args.seed, "split": args.split, "parent": {"pairs": file_hash(run / "pairs.jsonl")}}
    count = -(-pairs // SHARD_PAIRS)
    missing = {(layer, n) for layer in args.layer for n in range(count)
               if not up_to_date(shard_path(run, layer, n, count), {**meta, "layer": layer})}
    wait_for_all(ranks)                     # all have looked before any writes
    mine = sorted({n for _, n in missing})[rank::ranks]
    wanted = {(layer, n) for layer, n in missing if n in mine}
    if wanted:
        backbone = load_backbone(args.model, args.revision, args.dtype, args.device, args.device_map, args.pack, args.batch_tokens)
        print(*(f"note: {note}" for note in backbone.notes), sep="\n", end="\n" if backbone.notes else "")
        compute_shards(backbone, count, wanted, meta, args, quiet=rank > 0)
    wait_for_all(ranks)                     # all shards are there
    if rank == 0:
        for layer in args.layer:            # shards of an earlier, differently sized run would be read as well
            for path in (run / "activations").glob(f"layer{layer}-*.safetensors"):
                if not path.name.endswith(f"-of-{count:05d}.safetensors"):
                    path.unlink(missing_ok=True)        # another process may do the same
        if seen["typed"]:
            print(f"note: control tokens are typed into the text of {seen['typed']} pairs: split, so that they do not act")
        report(args, seen, len(missing), count)


def wait_for_all(ranks):
    """A barrier under torchrun; ends quietly where another rank has failed and said why."""
    if ranks > 1:
        try:
            torch.distributed.barrier()
        except RuntimeError:
            sys.exit(2)


def compute_shards(backbone, count, wanted, meta, args, quiet=False):
    """Compute and write the shards in `wanted`, (layer, number); pairs.jsonl is read a shard at a time."""
    with open(Path(args.run) / "pairs.jsonl", encoding="utf-8") as file, \
            tqdm(unit="tok", unit_scale=True, desc="extract", disable=quiet or None) as bar:
        for n in range(count):
            lines = list(itertools.islice(file, SHARD_PAIRS))
            if not any((layer, n) in wanted for layer in args.layer):
                continue
            rows = [json.loads(line) for line in lines]
            for layer, tensors in extract_shard(backbone, backbone.tokenizer, rows, n * SHARD_PAIRS, args, bar.update).items():
                if (layer, n) in wanted:
                    save_stage(shard_path(args.run, layer, n, count), tensors,
                               {**meta, **backbone.meta, "layer": layer, "pack": backbone.pack})


def report(args, seen, computed, count):
    """The table at the end."""
    by, dropped = seen["split"], seen["dropped"]
    print(f"\npairs      {seen['kept']} kept, {len(dropped)} dropped   train {by['train']} · dev {by['dev']} · test {by['test']}"
          f"\nprompts    {len(seen['groups'])} different"
          f"\nlayers     {', '.join(map(str, args.layer))} of {args.model}, token rule {args.token}"
          f"\nshards     {computed} computed, {count * len(args.layer) - computed} found complete"
          f"\nwritten    {args.run}/pairs.jsonl, {args.run}/activations/")
    if dropped:
        why = collections.Counter(reason for reason, _ in dropped).most_common(4)
        print(f"dropped    {args.run}/dropped.jsonl: {', '.join(f'{count} × {reason}' for reason, count in why)}")
    shipped = f"assets/sae-smollm2-135m-layer{args.layer[0]}.safetensors"
    which = f" --layer {args.layer[0]}" if len(args.layer) > 1 else ""
    print(f"\nnext: python 02_select_features.py --run {args.run}{which} --sae "
          f"{shipped if args.model == 'demo' and Path(shipped).exists() else 'PATH-OF-YOUR-SAE'}")


if __name__ == "__main__":
    run_main(main)
