"""Stage 1: preference pairs → residual-stream vectors of a frozen language model.

reads   --pairs   prompt, chosen, rejected in any of the usual layouts (see docs/formats.md)
writes  pairs.jsonl         id, prompt, chosen, rejected, group, split, category, source
        dropped.jsonl       rows that could not be used, with the reason
        activations/layer16-mean-00000-of-00001.safetensors, one set for each layer and token rule
            chosen, rejected [n, d]     the vector z of the response at the output of block L
            pair, group [n] int64 · split [n] uint8 (0 train, 1 dev, 2 test)
            chosen_tokens, rejected_tokens [n] int32 (length of the response)

    python 01_extract.py --model demo --pairs data/safe.jsonl --layer 16 --run runs/demo-safe
    torchrun --nproc-per-node 4 -- 01_extract.py --model … --run …

(with the --, or torchrun takes --run for its own)

The paper does not say which token is read: --token names four rules, and takes several in one pass.
The default is the mean over the response's tokens (docs/results.md says why). The paper pads its
batches; here texts that share a beginning are laid into one tree (parts/packing.py), so that no
token is computed twice, and the forward pass ends at block L.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parts import devices
from parts.chat import PLAIN_TEMPLATE, RenderedTexts, render, takes_system_turn
from parts.files import (
    UserError,
    file_hash,
    moved_into_place,
    read_meta,
    run_main,
    save_stage,
    up_to_date,
)
from parts.files import load_stage as load_stage  # with save_stage: how others use stage files
from parts.models import (
    check_readable,
    check_vocabulary,
    describe,
    find_blocks,
    first_uses,
    load_config,
    load_model,
    load_tokenizer,
    probe_weights,
    within_positions,
)
from parts.packing import forward_passes, packing_holds
from parts.rows import as_written, in_words, read_rows, tell_notes, usable_pairs

SPLITS = ("train", "dev", "test")
TRAIN, DEV, TEST = range(3)         # how the files number them
RULES = ("mean", "last", "eot", "content")
SHARD_PAIRS = 1024                  # pairs a shard, which a killed run need not compute again


# --------------------------------------------------------- questions, and the split they fall into

def plain_text(prompt):
    """A prompt's text, normalised: the same question counts as the same in every file."""
    if isinstance(prompt, list):
        prompt = "\n".join(message["content"] for message in prompt)
    return " ".join(prompt.split()).casefold()


def question_of(prompt):
    """What a pair is grouped and split by: the prompt, of a dialogue its first user turn.

    Data sets cut one dialogue at many turns; all of its pieces have to fall on the same side.
    """
    if isinstance(prompt, list):
        user_turns = [message["content"] for message in prompt if message["role"] == "user"]
        prompt = user_turns[0] if user_turns else prompt[0]["content"]
    return plain_text(prompt)


def hash_number(text):
    """48 bits of SHA-256 → int: an id that JSON and int64 both hold exactly."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def split_of(prompt, seed=0, shares=(0.7, 0.1, 0.2)):
    """"train", "dev" or "test", by a hash of (seed, normalised question).

    So no file and no order can move a question to another split.
    """
    place = hash_number(f"{seed}:{question_of(prompt)}") / 2**48        # uniform in [0, 1)
    borders = np.cumsum(shares)
    return SPLITS[min(2, int(np.searchsorted(borders, place, side="right")))]


# ---------------------------------------------------------------- which token is read

def token_range(text, rule):
    """The tokens of a rendered conversation that z is read from → (first, one past the last)."""
    if rule == "last":          # of the whole rendering: often a newline after the end-of-turn mark
        return len(text.ids) - 1, len(text.ids)
    if rule == "eot":
        return text.eot, text.eot + 1
    if rule == "content":       # the last token of the response itself
        return text.stop - 1, text.stop
    if rule == "mean":          # all tokens of the response
        return text.first, text.stop
    raise UserError(f"unknown token rule {rule} · the head or features file · one of {RULES}")


# --------------------------------------------------- the frozen backbone: a hook and an early exit

class ReachedBlock(Exception):
    """Ends the forward pass once the last wanted block has given its output."""


def forward_to(model, blocks, layers, **inputs):
    """Run the blocks up to the highest of `layers` and none above → outputs, list of [B, T, d].

    The output of block L is `hidden_states[L+1]` of transformers, but for the last block, where
    that entry is taken after the final norm; the hook gives the residual stream before it.
    """
    outputs = {}

    def keep_output_of(layer):
        def hook(block, args, output):
            outputs[layer] = output[0] if isinstance(output, tuple) else output
            if layer == max(layers):
                raise ReachedBlock
        return hook

    hooks = []
    try:
        for layer in set(layers):
            hooks.append(blocks[layer].register_forward_hook(keep_output_of(layer)))
        with torch.inference_mode():
            model(**{"use_cache": False, **inputs})
    except ReachedBlock:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[layer] for layer in layers]


@dataclass
class Backbone:
    """A frozen language model with what identifies it and how it is run."""
    model: torch.nn.Module
    tokenizer: object
    blocks: torch.nn.ModuleList
    meta: dict          # model, revision, backbone, template, dtype, attention: in every file
    pack: str = "tree"
    budget: int = 512   # tokens a forward pass
    notes: list = field(default_factory=list)
    lacking: dict = field(default_factory=dict)     # weights not in the checkpoint: (block, why)
    # one pass at a time: its hooks would see the pass of another thread too
    one_pass: object = field(default_factory=threading.Lock)

    @property
    def device(self):
        return self.model.get_input_embeddings().weight.device

    def forward_to(self, layers, **inputs):
        """Outputs of the given blocks, list of [B, T, d]."""
        with self.one_pass:
            return forward_to(self.model, self.blocks, layers, **inputs)

    def hidden_rows(self, sequences, layers):
        """Token sequences → yield (members, hidden) a forward pass; hidden: a [B · T, d] a layer.

        members: which sequences, and where their tokens are, see parts/packing.py.
        """
        check_readable(self, sequences, layers)
        for inputs, members in forward_passes(self.model, sequences, self.pack, self.budget):
            hidden = self.forward_to(layers, **inputs)
            yield members, [h.flatten(0, 1) for h in hidden]


def load_backbone(name, revision=None, dtype="auto", device="auto", device_map=None, pack="tree",
                  budget=None):
    """Load model and tokenizer → Backbone. Errors: UserError. Remote code is never run."""
    tokenizer = load_tokenizer(name, revision)
    device = devices.pick_device(device)
    meta = describe(name, load_config(name, revision), tokenizer, revision, dtype, device)
    options = {"dtype": getattr(torch, meta["dtype"]), "attn_implementation": meta["attention"]}
    if device_map:
        options["device_map"] = device_map
    model, lacking = load_model(name, revision, **options)
    if not device_map:
        model = model.to(device)
    return make_backbone(model, tokenizer, meta, pack, budget, lacking)


def make_backbone(model, tokenizer, meta, pack="tree", budget=None, lacking=()):
    """A loaded model → Backbone: frozen, its blocks found, tree packing tried."""
    model.eval().requires_grad_(False)
    blocks = find_blocks(model, meta["model"])
    check_vocabulary(tokenizer, model.get_input_embeddings(), meta["model"])
    meta = {**meta, "weights": probe_weights(model, blocks, lacking),
            "parameters": sum(p.numel() for p in model.parameters())}
    budget = budget or (512 if model.device.type == "cpu" else 4096)
    backbone = Backbone(model, tokenizer, blocks, meta, pack, budget)
    if lacking:
        backbone.lacking = first_uses(model, blocks, lacking)

    if not takes_system_turn(tokenizer):
        backbone.notes.append("the chat template has no system turn: where there is one, "
                              "it is put in front of the first user turn")
    if tokenizer.chat_template == PLAIN_TEMPLATE:
        backbone.notes.append("the model has no chat template: "
                              "a plain one (User: … Assistant: …) is used")
    if pack == "tree" and not packing_holds(backbone):
        backbone.pack = "pad"
        backbone.notes.append("the model does not honour a 4D mask: length-sorted padding is used")
    return backbone


# ---------------------------------------------------------------- texts → residual-stream vectors

def residuals(backbone, texts, layers, rules, progress=None):
    """Residual-stream vectors z of rendered texts: list of Text → {(layer, rule): [n, d]}.

    One forward pass over the texts for all layers and token rules; dtype of the model.
    """
    width = backbone.model.config.get_text_config().hidden_size
    out = {}
    for layer in layers:
        for rule in rules:
            out[layer, rule] = torch.empty(len(texts), width, dtype=backbone.model.dtype)

    def fill():
        return fill_residuals(out, backbone, texts, layers, rules, progress)
    return devices.with_fewer_tokens(fill, backbone)


def fill_residuals(out, backbone, texts, layers, rules, progress):
    """Fill {(layer, rule): [n, d]}, one forward pass after the other → out."""
    for members, hidden in backbone.hidden_rows([text.ids for text in texts], layers):
        rows = [index for index, _ in members]          # which texts are in this pass
        for rule in rules:
            places = []                                 # of the tokens that the rule reads
            for index, places_of_text in members:
                first, last = token_range(texts[index], rule)
                places.append(torch.from_numpy(places_of_text[first:last]).to(hidden[0].device))
            for layer, h in zip(layers, hidden):        # h [B · T, d]
                if rule == "mean":
                    vectors = torch.stack([h[at].float().mean(0) for at in places])
                else:
                    vectors = h[torch.cat(places)]
                out[layer, rule][rows] = vectors.to(out[layer, rule])

        if progress:
            progress(sum(len(places_of_text) for _, places_of_text in members))
    return out


# ---------------------------------------------------------------- the pairs

@dataclass
class Counts:
    """What was found while the pairs were read."""
    kept: int = 0
    dropped: list = field(default_factory=list)                            # (reason, where)
    split: collections.Counter = field(default_factory=collections.Counter)
    groups: set = field(default_factory=set)
    notes: collections.Counter = field(default_factory=collections.Counter)


def prepare_pairs(args, tokenizer, rendered):
    """Read, check and split the pairs → Counts. Writes pairs.jsonl and dropped.jsonl.

    dropped.jsonl is left also where too few can be used: it says why. rendered: takes the texts of
    both sides, in the order of pairs.jsonl.
    """
    run = Path(args.run)
    with rows_file(run / "pairs.jsonl") as pairs_file:
        with rows_file(run / "dropped.jsonl") as dropped_file:
            counts = sort_pairs(args, tokenizer, pairs_file, dropped_file, rendered)
            if is_enough(counts):
                pairs_file.flush()
                make_way(args, file_hash(pairs_file.name))
        check_enough(counts, args.pairs)        # behind dropped.jsonl, which says why
    return counts


def make_way(args, pairs_hash):
    """Refuse to replace activations of other pairs without --overwrite; with it, remove them."""
    others = []
    for path in sorted((Path(args.run) / "activations").glob("*.safetensors")):
        meta = readable_meta(path)
        if meta and meta["parent"]["pairs"] != pairs_hash:
            others.append((path, meta))
    if others and not args.overwrite:
        path, meta = others[0]
        files = f"{len(others)} files, {path.name} of {meta['model']}"
        raise UserError(f"{args.run} holds activations of other pairs or another split ({files}) · "
                        "--run · pass --overwrite to replace them, or another --run")
    for path, _ in others:
        path.unlink(missing_ok=True)


def readable_meta(path):
    """The settings of a shard, or None where it is damaged: then it is made anew."""
    try:
        return read_meta(path, stage="extract")
    except UserError:
        return None


@contextlib.contextmanager
def rows_file(path):
    """A text file to write rows to, moved into place at the end.

    Half of a UTF-16 pair stays a JSON escape.
    """
    with moved_into_place(path) as part:
        with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file


def write_row(file, row):
    """Write a row as one line of JSON."""
    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")     # a date, an image


def sort_pairs(args, tokenizer, pairs_file, dropped_file, rendered):
    """Each row of --pairs into one of the two files → Counts.

    A row at a time, so that memory does not grow.
    """
    counts = Counts()
    for n, (where, raw) in enumerate(read_rows(args.pairs)):
        if args.limit and counts.kept >= args.limit:
            break
        first = where if n == 0 else None
        pairs, reasons = usable_pairs(tokenizer, raw, args.label, args.max_length, first)

        for reason in reasons:
            write_row(dropped_file, {"where": where, "reason": reason, "row": as_written(raw)})
            counts.dropped.append((reason, where))

        if args.limit:
            pairs = pairs[:args.limit - counts.kept]
        for n_of_row, pair in enumerate(pairs):
            number = n_of_row if len(pairs) > 1 else None
            row = pair_row(raw, where, pair, args, number)
            write_row(pairs_file, row)
            rendered.extend(pair.texts)
            counts.kept += 1
            counts.split[row["split"]] += 1
            counts.groups.add(row["group"])
            counts.notes.update(pair.notes)
    return counts


def pair_row(raw, where, pair, args, number=None):
    """The row of pairs.jsonl that a pair gets.

    number: which pair of its row it is, where a row gives several.
    """
    name = raw.get("id")
    if name is None:
        name = re.findall(r"\d+", where)[-1]            # the line of the file
    shares = [float(share) for share in args.split.split(",")]
    return {
        "id": str(name) if number is None else f"{name}#{number}",
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "group": hash_number(question_of(pair.prompt)),
        "split": split_of(pair.prompt, args.seed, shares),
        "category": raw.get("category", raw.get("subset")),
        "source": raw.get("source", Path(args.pairs).name),
    }


def is_enough(counts):
    """Can at least one pair be used, and at least half of them?"""
    return counts.kept and len(counts.dropped) <= counts.kept


def check_enough(counts, path):
    """Refuse a file of which no pair, or less than half, can be used."""
    if not counts.kept:
        reasons = sorted({reason for reason, _ in counts.dropped})
        why = "; ".join(reasons[:3]) or "the file is empty"
        raise UserError(f"no usable pair ({why}) · {path} · rows need prompt, chosen, rejected")
    if len(counts.dropped) > counts.kept:
        reason, where = counts.dropped[0]
        raise UserError("more than half of the pairs cannot be used, "
                        f"the first because: {reason} · {where} · "
                        "mend the file or raise --max-length")


# ---------------------------------------------------------------- shards of activations

def shard_path(run, layer, rule, n, count):
    """runs/demo-safe/activations/layer16-mean-00000-of-00001.safetensors"""
    return Path(run) / "activations" / f"layer{layer}-{rule}-{n:05d}-of-{count:05d}.safetensors"


def missing_shards(args, count, meta):
    """The (layer, rule, number) of all shards that are not there yet.

    Those of other settings are replaced only with --overwrite.
    """
    missing = set()
    for layer in args.layer:
        for rule in args.token:
            for n in range(count):
                path = shard_path(args.run, layer, rule, n, count)
                if not up_to_date(path, {**meta, "layer": layer, "token": rule}):
                    missing.add((layer, rule, n))
                    if not args.overwrite:
                        refuse_other_settings(path, meta)
    return missing


def refuse_other_settings(path, meta):
    """A whole shard that was made with other settings: say which."""
    found = readable_meta(path) if path.exists() else None
    if found is None:
        return
    different = [key for key, value in meta.items() if found.get(key) != value]
    if different:
        key = different[0]
        made_with, wanted = found.get(key), meta[key]
        raise UserError(f"{path.name} was made with {key} {made_with}, this is {key} {wanted} · "
                        f"{path.parent.parent} · pass --overwrite to replace it, or another --run")


def compute_shards(backbone, count, wanted, meta, args, rendered=None, quiet=False):
    """Compute and write the shards in `wanted`, (layer, rule, number).

    pairs.jsonl is read a shard at a time. rendered: the texts of all pairs in order, where this
    process has read them; else they are rendered here.
    """
    pairs_path = Path(args.run) / "pairs.jsonl"
    bar = tqdm(unit="tok", unit_scale=True, desc="extract", disable=quiet or None)
    with bar, open(pairs_path, encoding="utf-8") as file:
        for n in range(count):
            lines = list(itertools.islice(file, SHARD_PAIRS))
            texts = rendered.take(2 * len(lines)) if rendered else None
            here = [(layer, rule) for layer, rule, number in sorted(wanted) if number == n]
            if not here:
                continue

            rows = [json.loads(line) for line in lines]
            shards = extract_shard(backbone, rows, n * SHARD_PAIRS, args, texts, bar.update)
            for layer, rule in here:
                path = shard_path(args.run, layer, rule, n, count)
                settings = {**meta, **backbone.meta, "layer": layer, "token": rule}
                save_stage(path, shards[layer, rule], {**settings, "pack": backbone.pack})


def extract_shard(backbone, rows, start, args, texts=None, progress=None):
    """Rows of pairs.jsonl from number `start` on → {(layer, rule): tensors of a shard}."""
    if texts is None:
        texts = []
        for row in rows:
            for side in ("chosen", "rejected"):
                texts.append(render(backbone.tokenizer, row["prompt"], row[side], args.max_length))
    vectors = residuals(backbone, texts, args.layer, args.token, progress)

    columns = carried_columns(rows, texts, start)
    shards = {}
    for key, z in vectors.items():                      # z [2n, d]: chosen, rejected, chosen …
        finite = torch.isfinite(z).all(-1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            name = rows[first // 2]["id"]
            raise UserError(f"NaN or Inf in the residual stream · pair {name} · "
                            "try --dtype float32, or remove the pair")
        shards[key] = {"chosen": z[0::2], "rejected": z[1::2], **columns}
    return shards


def carried_columns(rows, texts, start=0):
    """Rows of pairs.jsonl from number `start` on, and the texts of both sides in their order → the
    tensors of a shard that later stages carry along."""
    lengths = torch.tensor([text.stop - text.first for text in texts], dtype=torch.int32)
    splits = [SPLITS.index(row["split"]) for row in rows]
    return {
        "pair": torch.arange(start, start + len(rows)),
        "group": torch.tensor([row["group"] for row in rows]),
        "split": torch.tensor(splits, dtype=torch.uint8),
        "chosen_tokens": lengths[0::2],
        "rejected_tokens": lengths[1::2],
    }


def remove_other_counts(args, count):
    """Shards of an earlier, differently sized run would be read as well."""
    for path in (Path(args.run) / "activations").glob("layer*-*-of-*.safetensors"):
        if not path.name.endswith(f"-of-{count:05d}.safetensors"):
            path.unlink(missing_ok=True)                # another process may do the same


# ---------------------------------------------------------------- the stage

def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="demo",
                   help="demo, a hub name, a folder or a .gguf file (default demo)")
    p.add_argument("--revision",
                   help="branch, tag or commit of a hub model")
    p.add_argument("--pairs", required=True,
                   help="preference pairs: a file, or hub:REPO[:CONFIG][:SPLIT]")
    p.add_argument("--layer", type=int, nargs="+", default=[16],
                   help="block(s) L, 0-based; several in one pass (default 16)")
    p.add_argument("--token", choices=RULES, nargs="+", default=["mean"],
                   help="what is read: mean over the response's tokens, "
                        "last token of the conversation, eot the end-of-turn mark, "
                        "content the response's last token; several in one pass (default mean)")
    p.add_argument("--run", required=True,
                   help="folder of all files of this run")
    p.add_argument("--overwrite", action="store_true",
                   help="replace activations of other pairs or settings in that folder")
    p.add_argument("--max-length", type=int, default=2048,
                   help="tokens; a longer text loses the beginning of its prompt (default 2048)")
    p.add_argument("--batch-tokens", type=int,
                   help="tokens a forward pass (default 512 on CPU, 4096 on a GPU)")
    p.add_argument("--pack", choices=("tree", "pad"), default="tree",
                   help="share common beginnings, or pad (default tree)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="of the model (default auto: float32 on CPU, bfloat16 on a GPU)")
    p.add_argument("--device", default="auto",
                   help="cpu, cuda, … (default auto)")
    p.add_argument("--device-map",
                   help="auto: spread a model over several devices")
    p.add_argument("--seed", type=int, default=0,
                   help="of the split (default 0)")
    p.add_argument("--split", default="0.7,0.1,0.2",
                   help="shares of train, dev, test (default 0.7,0.1,0.2)")
    p.add_argument("--limit", type=int,
                   help="use only the first N pairs")
    p.add_argument("--label", choices=("safer", "better"),
                   help="which label of a file that has both (PKU-SafeRLHF)")
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")
    args = p.parse_args()
    args.layer = list(dict.fromkeys(args.layer))
    args.token = list(dict.fromkeys(args.token))
    check_flags(args)
    return args


def check_flags(args):
    """Refuse numbers that cannot be meant."""
    for flag in ("--limit", "--max-length", "--batch-tokens"):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1 · {flag} {value} · "
                            "leave it out for the default")

    shares = args.split.split(",")
    are_shares = all(re.fullmatch(r"0?\.\d+|[01](\.0*)?", share) for share in shares)
    if len(shares) != 3 or not are_shares or abs(sum(map(float, shares)) - 1) > 1e-6:
        raise UserError(f"--split needs three shares that add up to 1 · {args.split} · "
                        "e.g. 0.7,0.1,0.2")


def main():
    """Stage 1 from the command line."""
    args = parse_args()
    config = load_config(args.model, args.revision)
    tokenizer = load_tokenizer(args.model, args.revision)
    top = config.get_text_config().num_hidden_layers - 1
    for layer in args.layer:
        if not 0 <= layer <= top:
            raise UserError(f"layer {layer} does not exist · {args.model} has blocks 0 to "
                            f"{top} · pass --layer")
    with devices.processes() as (rank, ranks):
        args.device = devices.device_of_rank(args, ranks)
        extract(args, config, tokenizer, rank, ranks)


def extract(args, config, tokenizer, rank, ranks):
    """Read the pairs, compute this process's share of the missing shards, report."""
    args.max_length = within_positions(args.max_length, config, args.model)
    rendered = None
    if rank == 0:
        rendered = RenderedTexts()
        counts = prepare_pairs(args, tokenizer, rendered)
    devices.wait_for_all(ranks)                         # pairs.jsonl is there

    with open(Path(args.run) / "pairs.jsonl", encoding="utf-8") as file:
        pairs = sum(1 for _ in file)
    count = -(-pairs // SHARD_PAIRS)                    # rounded up
    meta = settings_of(args, config, tokenizer)
    missing = missing_shards(args, count, meta)
    devices.wait_for_all(ranks)                         # all have looked before any writes

    my_numbers = sorted({n for _, _, n in missing})[rank::ranks]
    wanted = {key for key in missing if key[-1] in my_numbers}
    if wanted:
        backbone = load_backbone(args.model, args.revision, args.dtype, args.device,
                                 args.device_map, args.pack, args.batch_tokens)
        for note in backbone.notes:
            print(f"note: {note}")
        compute_shards(backbone, count, wanted, meta, args, rendered, quiet=rank > 0)
    devices.wait_for_all(ranks)                         # all shards are there

    if rank == 0:
        remove_other_counts(args, count)
        report(args, counts, len(missing), count)


def settings_of(args, config, tokenizer):
    """What the shards record, and have to agree in to be used again."""
    backbone = describe(args.model, config, tokenizer, args.revision, args.dtype, args.device)
    parent = {"pairs": file_hash(Path(args.run) / "pairs.jsonl")}
    return {"stage": "extract", **backbone, "max_length": args.max_length, "seed": args.seed,
            "split": args.split, "parent": parent}


def report(args, counts, computed, count):
    """The table at the end."""
    tell_notes(counts.notes, "pairs")
    by_split = " · ".join(f"{name} {counts.split[name]}" for name in SPLITS)
    layers = ", ".join(str(layer) for layer in args.layer)
    shards = count * len(args.layer) * len(args.token)
    print()
    print(f"pairs      {counts.kept} kept, {len(counts.dropped)} dropped   {by_split}")
    print(f"prompts    {len(counts.groups)} different")
    print(f"layers     {layers} of {args.model}, token rules {', '.join(args.token)}")
    print(f"shards     {computed} computed, {shards - computed} found complete")
    print(f"written    {args.run}/pairs.jsonl, {args.run}/activations/")
    if counts.dropped:
        reasons = collections.Counter(reason for reason, _ in counts.dropped)
        print(f"dropped    {args.run}/dropped.jsonl: {in_words(reasons, 4)}")

    shipped = f"assets/sae-smollm2-135m-layer{args.layer[0]}.safetensors"
    sae = shipped if args.model == "demo" and Path(shipped).exists() else "PATH-OF-YOUR-SAE"
    layer = f" --layer {args.layer[0]}" if len(args.layer) > 1 else ""
    token = f" --token {args.token[0]}" if len(args.token) > 1 else ""
    print(f"\nnext: python 02_select_features.py --run {args.run}{layer}{token} --sae {sae}")


if __name__ == "__main__":
    run_main(main)
