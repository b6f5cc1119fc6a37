"""Train a TopK SAE on the residual stream of a model, reading your texts.

    python -m tools.train_sae --model demo --layer 16 --texts FILE --width 4608 --k 64 \\
        --out my-sae.safetensors

The shipped SAE was made by it (assets/README.md). Not part of the method: SparseRM takes the SAE as
it finds it.

TopK (Gao et al. 2024): loss = error / variance, of all tokens and of scored ones, each around its
own mean and weighted by --end-share; AuxK: latents that have not fired lately learn to explain what
is left; decoder rows have norm 1; Adam with warm-up and linear decay. Scored positions are the ends
of conversations, which a reward is read from; an answer cut at any word and closed with the
template's own end gives a new one for the price of two tokens.
"""

import argparse
import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from parts.chat import is_conversation, render
from parts.files import run_main, save_stage
from parts.rows import pairs_or_reason, read_rows
from sae import SAE, TENSORS, SAEError, describe, health, load_sae

stage1 = importlib.import_module("01_extract")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


# ---------------------------------------------------------------- texts

def read_texts(path):
    """Texts of a JSONL file (also .gz): rows with `text`, with `messages`, or pairs.

    → list of str or messages.
    """
    texts = []
    for _, row in read_rows(path):
        texts += texts_of_row(row)
    if not texts:
        raise SAEError(f"no texts · {path} · rows need text, messages, or prompt, chosen, rejected")
    return texts


def texts_of_row(row):
    """One row → its texts: one, both sides of a pair, or none."""
    if not isinstance(row, dict):
        return []
    if isinstance(row.get("text"), str):
        return [row["text"]]
    if is_conversation(row.get("messages")):
        return [row["messages"]]
    pairs = pairs_or_reason(row, "better")
    if isinstance(pairs, str):
        return []
    conversations = []
    for prompt, *answers in pairs:
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        for answer in answers:
            conversations.append([*turns, {"role": "assistant", "content": answer}])
    return [conversation for conversation in conversations if is_conversation(conversation)]


def sequences_of(backbone, texts, max_length, cuts=0, rng=None):
    """Texts → (token sequences, for each whether its last token is a scored one).

    cuts: each conversation also ends so many times at a random place of its answer, closed with the
    template's own end. In the tree that is a branch of two tokens, and every one is a new scored
    position.
    """
    sequences = []
    scored = []
    for text in texts:
        if isinstance(text, str):
            ids = backbone.tokenizer(text)["input_ids"]
            parts = [ids[start:start + max_length] for start in range(0, len(ids), max_length)]
            new = [part for part in parts if len(part) > 1]
        else:
            new = endings_of(backbone, text, max_length, cuts, rng)
        sequences += new
        scored += [not isinstance(text, str)] * len(new)
    return sequences, scored


def endings_of(backbone, conversation, max_length, cuts, rng):
    """A conversation, and `cuts` beginnings of it closed with the end of the turn → token
    sequences."""
    text = render(backbone.tokenizer, conversation[:-1], conversation[-1]["content"])
    ends = [text.last]
    if cuts:
        longest = max(text.first + 1, min(text.last, max_length))
        ends += rng.integers(text.first + 1, longest + 1, cuts).tolist()
    closing = text.ids[text.last:]
    return [text.ids[:end] + closing for end in dict.fromkeys(ends) if end <= max_length]


# ---------------------------------------------------------------- activations

def activations(backbone, texts, layer, max_length, cuts=0, rng=None, repeats=False):
    """Yield (all [n, d], scored [m, d]) a forward pass, without position 0.

    A token that texts share (a system prompt) comes once a pass, or with `repeats` as often as it
    stands in the texts. The first token is an attention sink: its vector is huge, the same in every
    text, and says nothing.
    """
    sequences, scored = sequences_of(backbone, texts, max_length, cuts, rng)
    for members, (hidden,) in backbone.hidden_rows(sequences, [layer]):
        hidden = hidden.float().cpu()
        every = np.concatenate([places[1:] for _, places in members])
        if not repeats:
            every = np.unique(every)
        ends = np.array([places[-1] for index, places in members if scored[index]], dtype=int)
        yield hidden[torch.from_numpy(every)], hidden[torch.from_numpy(ends)]


def sample_activations(backbone, texts, layer, max_length=512):
    """→ (all tokens [n, d], scored tokens [m, d]) of some texts as they are, for sae.health()."""
    every = []
    ends = []
    for all_tokens, scored in activations(backbone, texts, layer, max_length, repeats=True):
        every.append(all_tokens)
        ends.append(scored)
    return torch.cat(every), torch.cat(ends)


def stream_batches(backbone, texts, layer, args, generator):
    """Yield (all [b, d], scored [e, d]) for ever, mixed by a shuffle buffer.

    Scored ones are drawn from the newest `--buffer`.
    """
    rng = np.random.default_rng(args.seed)
    conversations = [text for text in texts if not isinstance(text, str)]
    ordinary = args.batch - int(args.batch * args.end_share)  # a batch; the rest are scored ones
    pool = Pool(args, generator)
    ends = torch.empty(0)
    while True:
        for start in range(0, len(texts), 64):
            some = [longer_conversation(text, conversations, args.turns, rng)
                    for text in texts[start:start + 64]]
            passes = activations(backbone, some, layer, args.max_length, args.cuts, rng)
            for every, scored in passes:
                pool.add(every)
                ends = torch.cat([ends.view(-1, scored.shape[1]), scored])[-args.buffer:]
            for batch in pool.batches(ordinary):
                wanted = args.batch - ordinary if len(ends) else 0
                drawn = torch.randint(max(1, len(ends)), (wanted,), generator=generator)
                yield batch, ends[drawn]
        pool.settle_for_less()


class Pool:
    """A shuffle buffer of activations."""

    def __init__(self, args, generator):
        self.args = args
        self.generator = generator
        self.parts = []
        self.size = 0

    def add(self, vectors):
        """Put [n, d] in."""
        self.parts.append(vectors)
        self.size += len(vectors)

    def batches(self, size):
        """Yield [size, d] while the buffer is more than half full, once it has been full."""
        if self.size < self.args.buffer:
            return
        order = torch.randperm(self.size, generator=self.generator)
        mixed = torch.cat(self.parts)[order]
        while len(mixed) > max(self.args.buffer // 2, size):
            yield mixed[:size]
            mixed = mixed[size:]
        self.parts = [mixed]
        self.size = len(mixed)

    def settle_for_less(self):
        """All texts were read and the buffer is not full: a smaller one will do."""
        if self.size < self.args.buffer:
            self.args.buffer = max(self.args.batch, self.size)


def longer_conversation(text, conversations, turns, rng):
    """Half of the conversations go on from up to `turns` - 1 others.

    The end of a later turn is not the end of a first one.
    """
    if isinstance(text, str) or turns < 2 or rng.random() < 0.5:
        return text
    earlier = rng.integers(len(conversations), size=rng.integers(1, turns))
    longer = []
    for conversation in [*(conversations[n] for n in earlier), text]:
        longer += [turn for turn in conversation if turn["role"] != "system"]
    return longer


# ---------------------------------------------------------------- training

@dataclass
class State:
    """What training changes. The parameters work on inputs scaled to norm √d; folded at the end."""
    W_enc: torch.Tensor             # [d, m]
    b_enc: torch.Tensor             # [m]
    W_dec: torch.Tensor             # [m, d], rows of norm 1
    b_dec: torch.Tensor             # [d]
    scale: torch.Tensor             # input scale
    variance: list                  # of all tokens and of scored ones, scaled
    idle: torch.Tensor              # [m], activations since a latent fired last
    adam: torch.optim.Optimizer = None
    step: int = 0

    def parameters(self):
        """What Adam changes, in the order of PARAMETERS."""
        return [getattr(self, name) for name in PARAMETERS]


def train(backbone, texts, layer, args, progress=print):
    """Train on streamed activations through a shuffle buffer → SAE, written to args.out."""
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    held_count = max(2, min(400, len(order) // 20))
    held_texts = [texts[n] for n in order[:held_count]]
    order = order[held_count:]
    held = sample_activations(backbone, held_texts, layer, args.max_length)

    stream = stream_batches(backbone, [texts[n] for n in order], layer, args, generator)
    state = start_state(next(stream), args, generator)
    if resume(state, args):             # go on with other texts first than those already seen
        generator.manual_seed(args.seed + state.step)
        again = torch.randperm(len(order), generator=generator).tolist()
        stream = stream_batches(backbone, [texts[order[n]] for n in again], layer, args, generator)

    steps = steps_of(args)
    for step, batch in enumerate(stream, start=state.step + 1):
        set_learning_rate(state, step, steps, args.lr)
        train_step(state, batch, args)
        state.step = step
        if step % max(1, steps // 20) == 0 or step >= steps:
            sae = finish(state, args, layer)
            sae.info["held_out"] = {"all": health(sae, held[0]),
                                    "scored": health(sae, held[1]) if len(held[1]) > 1 else {}}
            progress(progress_line(step, steps, sae.info["held_out"]))
            save_checkpoint(state, args)
        if step >= steps:
            break

    settings = ("k", "end_share", "cuts", "turns", "lr", "batch", "buffer", "seed", "max_length")
    sae.info.update(
        model=backbone.meta["model"],
        template=backbone.meta["template"],
        texts=Path(args.texts).name,
        tokens=steps * args.batch,
        start=args.start and Path(args.start).name,
        settings={name: getattr(args, name) for name in settings})
    save_sae(sae, args.out, torch.float16)
    checkpoint_path(args).unlink(missing_ok=True)       # only now: a kill in between loses nothing
    return sae


def steps_of(args):
    """How many batches --tokens are."""
    return max(1, args.tokens // args.batch)


def set_learning_rate(state, step, steps, peak):
    """Linear warm-up over the first twentieth, linear decay over the last three tenths."""
    warm = min(1, step / max(1, steps // 20))
    left = min(1, (steps - step + 1) / max(1, steps * 0.3))
    for group in state.adam.param_groups:
        group["lr"] = peak * warm * max(0.0, left)


def progress_line(step, steps, held_out):
    """One line on how training goes."""
    every = held_out["all"]
    scored = held_out["scored"].get("explained_variance", float("nan"))
    return (f"step {step}/{steps}  all tokens: explained {every['explained_variance']:.3f}  "
            f"L0 {every['l0']:.1f}  silent {every['silent']:.1%}  scored token: explained "
            f"{scored:.3f}")


def start_state(first, args, generator):
    """The state before the first step, from random directions or from --start."""
    every, ends = first
    scale = math.sqrt(every.shape[1]) / every.norm(dim=1).mean()
    if args.start:
        parameters = parameters_of(args, every.shape[1], scale)
    else:
        directions = torch.randn(args.width, every.shape[1], generator=generator)
        W_dec = F.normalize(directions, dim=1)
        parameters = {"W_enc": W_dec.T.clone(), "b_enc": torch.zeros(args.width), "W_dec": W_dec,
                      "b_dec": (every * scale).mean(0)}
    for parameter in parameters.values():
        parameter.requires_grad_()

    variance = []
    for pool in (every, ends):
        variance.append(float((pool * scale).var(0).sum()) if len(pool) > 1 else 1.0)
    state = State(**parameters, scale=scale, variance=variance, idle=torch.zeros(args.width))
    state.adam = torch.optim.Adam(state.parameters(), lr=args.lr, betas=(0.9, 0.999), fused=True)
    return state


def parameters_of(args, width, scale):
    """The SAE of --start as training holds it: decoder rows of norm 1, inputs scaled."""
    sae = load_sae(args.start)
    found = (sae.activation, sae.k, sae.norm, *sae.W_enc.shape)
    wanted = ("topk", args.k, "none", width, args.width)
    other_layer = sae.info.get("layer") not in (None, args.layer)
    if found != wanted or other_layer or not torch.equal(sae.b_in, sae.b_dec):
        raise SAEError(f"training cannot go on from this SAE {found}, layer "
                       f"{sae.info.get('layer')} · "
                       f"--start {args.start} · needed are {wanted}, layer {args.layer} and b_dec "
                       "subtracted")
    norm = sae.W_dec.norm(dim=1)
    return {"W_enc": sae.W_enc * norm, "b_enc": sae.b_enc * norm * scale,
            "W_dec": sae.W_dec / norm[:, None], "b_dec": sae.b_dec * scale}


def train_step(state, batch, args):
    """One step of Adam on the two pools. batch: (all tokens [b, d], scored tokens [e, d])."""
    every, ends = batch
    x = torch.cat([every, ends]) * state.scale
    pre = torch.relu((x - state.b_dec) @ state.W_enc + state.b_enc)
    best = pre.topk(args.k, sorted=False)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    error = x - (f @ state.W_dec + state.b_dec)

    squared = error.square().sum(1)
    share = args.end_share if len(ends) else 0.0
    loss = (1 - share) * squared[:len(every)].mean() / state.variance[0]
    if share:
        loss = loss + share * squared[len(every):].mean() / state.variance[1]
    with torch.no_grad():
        state.idle += len(x)
        state.idle[best.indices[best.values > 0]] = 0
    dead = (state.idle > args.dead_after).nonzero().flatten()
    if len(dead):
        loss = loss + auxiliary_loss(state, pre[:, dead], dead, error.detach()) / 32

    state.adam.zero_grad()
    loss.backward()
    state.adam.step()
    with torch.no_grad():
        norm = state.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
        state.W_dec.div_(norm)


def auxiliary_loss(state, pre, dead, rest):
    """AuxK: the dead latents model what the living ones leave, `rest` [b, d]. pre [b, dead]."""
    best = pre.topk(min(len(dead), rest.shape[1] // 2), sorted=False)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    error = f @ state.W_dec[dead] - rest
    return error.square().sum() / rest.square().sum().clamp_min(1e-8)


def finish(state, args, layer):
    """The trained parameters in raw units → SAE.

    z · s = f W + b  ⇔  z = (f / s) W + b / s: f in raw units, rows of W still of norm 1.
    """
    W_enc, b_enc, W_dec, b_dec = [parameter.detach().clone() for parameter in state.parameters()]
    b_dec = b_dec / state.scale
    return SAE(W_enc, b_enc / state.scale, W_dec, b_dec, b_dec, "topk", k=args.k,
               info={"layer": layer, "hook": f"model.layers.{layer}.output"})


def save_sae(sae, path, dtype=torch.float32):
    """Write our own layout: the tensors, and one metadata key `sparserm` (sorted JSON)."""
    read_from = ("file", "weights")
    info = {name: value for name, value in sae.info.items() if name not in read_from}
    info |= {"stage": "sae", "activation": sae.activation, "k": sae.k, "norm": sae.norm}
    tensors = {}
    for name in TENSORS:
        if getattr(sae, name) is not None:
            tensors[name] = getattr(sae, name).detach().to(dtype).clone()
    save_stage(path, tensors, info)


# ---------------------------------------------------------------- interrupted training goes on

def checkpoint_path(args):
    """Where an interrupted training left its state."""
    return Path(args.out).with_suffix(".checkpoint.safetensors")


def training_key(args):
    """The settings a checkpoint must share with the command that goes on from it."""
    names = ("model", "layer", "texts", "start", "width", "k", "end_share", "cuts", "turns",
             "tokens", "batch", "lr", "seed", "max_length", "dead_after")
    return {name: getattr(args, name) for name in names}


def save_checkpoint(state, args):
    """Parameters, Adam's moments and the step: the same command goes on from here."""
    tensors = {name: getattr(state, name).detach() for name in PARAMETERS}
    tensors |= {"idle": state.idle, "scale": state.scale, "variance": torch.tensor(state.variance),
                "step_done": torch.tensor(state.step)}
    for number, moments in state.adam.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"adam{number}.{name}"] = value
    save_stage(checkpoint_path(args), tensors, training_key(args))


def read_checkpoint(path):
    """→ (settings, tensors) of a complete checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("sparserm", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError):
        settings, tensors = None, {}
    expected = {*PARAMETERS, "idle", "scale", "variance", "step_done"}
    for number in range(len(PARAMETERS)):
        expected |= {f"adam{number}.{name}" for name in ("step", "exp_avg", "exp_avg_sq")}
    if set(tensors) != expected:
        raise SAEError(f"not a complete checkpoint · {path} · delete it: training then begins anew")
    return settings, tensors


def resume(state, args):
    """Take up a checkpoint of the same settings → whether there is one."""
    path = checkpoint_path(args)
    if not path.exists():
        return False
    settings, tensors = read_checkpoint(path)
    if settings != training_key(args):
        raise SAEError(f"a checkpoint of other settings lies there · {path} · delete it, or pass "
                       "the "
                       "settings it was made with")
    with torch.no_grad():
        for name in PARAMETERS:
            getattr(state, name).copy_(tensors[name])

    moments = {}
    for number in range(len(PARAMETERS)):
        names = ("step", "exp_avg", "exp_avg_sq")
        moments[number] = {name: tensors[f"adam{number}.{name}"] for name in names}
    state.adam.load_state_dict({**state.adam.state_dict(), "state": moments})

    state.scale = tensors["scale"]
    state.variance = tensors["variance"].tolist()
    state.idle = tensors["idle"]
    state.step = min(int(tensors["step_done"]), steps_of(args) - 1)  # killed after the last: again
    return True


# ---------------------------------------------------------------- the command

class ManualPage(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Line breaks kept, defaults named."""


def add_text_flags(p, limit=None):
    """The flags that training and checking share."""
    p.add_argument("--model", default="demo",
                   help="demo, a hub name, a folder or a .gguf file")
    p.add_argument("--texts", required=True,
                   help="JSONL with text, messages, or prompt, chosen, rejected")
    p.add_argument("--layer", type=int,
                   help="block L, 0-based (of a finished SAE: its own)")
    p.add_argument("--max-length", type=int, default=256,
                   help="tokens of a text")
    p.add_argument("--limit", type=int, default=limit,
                   help="use only so many texts")
    p.add_argument("--seed", type=int, default=0,
                   help="of the shuffling and the start")
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")


def parse_args():
    """The flags."""
    p = argparse.ArgumentParser(prog="python -m tools.train_sae", description=__doc__,
                                formatter_class=ManualPage)
    add_text_flags(p)
    p.add_argument("--out", required=True,
                   help="file to write, .safetensors")
    p.add_argument("--width", type=int, default=4608,
                   help="number of latents")
    p.add_argument("--k", type=int, default=64,
                   help="latents that may fire")
    p.add_argument("--end-share", type=float, default=0.33,
                   help="share of scored positions in a batch")
    p.add_argument("--cuts", type=int, default=4,
                   help="extra scored positions a conversation, its answer cut anywhere")
    p.add_argument("--turns", type=int, default=3,
                   help="half of the conversations are joined to up to so many turns")
    p.add_argument("--start",
                   help="go on from this TopK SAE, e.g. one that has not seen your chat template")
    p.add_argument("--tokens", type=int, default=2_000_000,
                   help="activations to train on")
    p.add_argument("--batch", type=int, default=1024,
                   help="activations a step")
    p.add_argument("--lr", type=float, default=1e-3,
                   help="peak learning rate of Adam")
    p.add_argument("--buffer", type=int, default=65536,
                   help="activations in the shuffle buffer")
    p.add_argument("--dead-after", type=int, default=100_000,
                   help="activations without firing after which a latent counts as dead")
    return p.parse_args()


def main():
    """Train an SAE from the command line."""
    args = parse_args()
    backbone = stage1.load_backbone(args.model)
    blocks = len(backbone.blocks)
    if args.layer is None or not 0 <= args.layer < blocks:
        raise SAEError(f"layer {args.layer} does not exist · {args.model} has blocks 0 to "
                       f"{blocks - 1} · "
                       "pass --layer")
    texts = read_texts(args.texts)[:args.limit]
    sae = train(backbone, texts, args.layer, args, progress=print_at_once)
    print(f"\nwritten {args.out}")
    print(describe(sae))
    print(f"\nnext: python 02_select_features.py --sae {args.out}")


def print_at_once(line):
    """A line of progress, also where the output is a file."""
    print(line, flush=True)


if __name__ == "__main__":
    run_main(main, SAEError)
