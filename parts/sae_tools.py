"""The commands of sae.py: what a checkpoint is, how well it fits a model on your texts, and training a TopK SAE.

    python sae.py info  PATH
    python sae.py check PATH --model M --texts FILE
    python sae.py train --model demo --layer 16 --texts FILE --width 4608 --k 64 --out my-sae.safetensors

The shipped SAE was made by it (assets/README.md). Not part of the method: SparseRM takes the SAE as it finds it.
"""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from parts.chat import is_conversation, render
from parts.files import save_stage
from parts.rows import pairs_or_reason, read_rows
from sae import NAMES, SAE, SAEError, load_sae

stage1, stage2 = (importlib.import_module(n) for n in ("01_extract", "02_select_features"))


def read_texts(path):
    """Texts of a JSONL file (also .gz): rows with `text`, with `messages`, or pairs → list of str or messages."""
    texts = []
    for _, row in read_rows(path):
        of = row.get if isinstance(row, dict) else lambda name: None
        if isinstance(of("text"), str):
            texts.append(row["text"])
        elif is_conversation(of("messages")):
            texts.append(row["messages"])
        else:
            found = pairs_or_reason(row, "better")
            for prompt, *answers in found if isinstance(found, list) else []:
                turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
                both = [[*turns, {"role": "assistant", "content": answer}] for answer in answers]
                texts += [text for text in both if is_conversation(text)]
    if not texts:
        raise SAEError(f"no texts · {path} · rows need text, messages, or prompt, chosen, rejected")
    return texts


def sequences_of(backbone, texts, max_length, cuts=0, rng=None):
    """Texts → (token sequences, for each whether its last token is a scored one).

    `cuts`: each conversation also ends `cuts` times at a random place of its answer, closed with the template's own
    end. In the tree that is a branch of two tokens, and every one is a new scored position.
    """
    sequences, scored = [], []
    for text in texts:
        if isinstance(text, str):
            ids = backbone.tokenizer(text)["input_ids"]
            parts = [ids[i:i + max_length] for i in range(0, len(ids), max_length)]
            sequences += [p for p in parts if len(p) > 1]
            scored += [False] * (len(sequences) - len(scored))
            continue
        text = render(backbone.tokenizer, text[:-1], text[-1]["content"])
        start = max(text.first + 1, min(text.last, max_length))
        ends = [text.last] + [int(c) for c in rng.integers(text.first + 1, start + 1, cuts)] if cuts else [text.last]
        for end in dict.fromkeys(e for e in ends if e <= max_length):
            sequences.append(text.ids[:end] + text.ids[text.last:])
            scored.append(True)
    return sequences, scored


def activations(backbone, texts, layer, max_length, cuts=0, rng=None, repeats=False):
    """Yield (all [n, d], scored [m, d]) a forward pass, without position 0. A token that texts share (a system prompt) comes
    once a pass, or with `repeats` as often as it stands in the texts.

    The first token is an attention sink: its vector is huge, the same in every text, and says nothing.
    """
    sequences, scored = sequences_of(backbone, texts, max_length, cuts, rng)
    for members, (hidden,) in stage1.hidden_rows(backbone, sequences, [layer]):
        every = np.concatenate([path[1:] for _, path in members])
        every = every if repeats else np.unique(every)
        ends = np.array([path[-1] for i, path in members if scored[i]], dtype=int)
        hidden = hidden.float().cpu()
        yield hidden[torch.from_numpy(every)], hidden[torch.from_numpy(ends)]


def sample_activations(backbone, texts, layer, max_length=512):
    """→ (all tokens [n, d], scored tokens [m, d]) of some texts as they are, for stage2.health()."""
    rows = list(activations(backbone, texts, layer, max_length, repeats=True))
    return torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows])


def save_sae(sae, path, dtype=torch.float32):
    """Write our own layout: the tensors, and one metadata key `sparserm` (sorted JSON)."""
    info = {n: v for n, v in sae.info.items() if n not in ("file", "weights")}          # where it was read from
    info |= {"stage": "sae", "activation": sae.activation, "k": sae.k, "norm": sae.norm}
    save_stage(path, {n: getattr(sae, n).detach().to(dtype).clone() for n in NAMES if getattr(sae, n) is not None}, info)


# ---------------------------------------------------------------- training a TopK SAE

def train(backbone, texts, layer, args, progress=print):
    """Train on streamed activations through a shuffle buffer → SAE, written to args.out. Settings: see `train --help`.

    TopK (Gao et al. 2024): loss = error / variance, of all tokens and of scored ones, each around its own mean and
    weighted by the end share; AuxK: latents that have not fired lately learn to explain what is left; decoder rows
    have norm 1; Adam with warm-up and linear decay.
    """
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    held, order = order[:max(2, min(400, len(order) // 20))], order[max(2, min(400, len(order) // 20)):]
    held = sample_activations(backbone, [texts[i] for i in held], layer, args.max_length)
    stream = stream_batches(backbone, [texts[i] for i in order], layer, args, generator)
    state = start_state(next(stream), args, generator)
    if resume(state, args):                         # go on with other texts first than those already seen
        order = [order[i] for i in torch.randperm(len(order), generator=generator.manual_seed(args.seed + state["step"])).tolist()]
        stream = stream_batches(backbone, [texts[i] for i in order], layer, args, generator)
    steps = max(1, args.tokens // args.batch)
    for step, batch in enumerate(stream, start=state["step"] + 1):
        warm, left = min(1, step / max(1, steps // 20)), min(1, (steps - step + 1) / max(1, steps * 0.3))
        for group in state["adam"].param_groups:
            group["lr"] = args.lr * warm * max(0.0, left)
        train_step(state, batch, args)
        state["step"] = step
        if step % max(1, steps // 20) == 0 or step == steps:
            sae = finish(state, args, layer)
            every, ends = stage2.health(sae, held[0]), stage2.health(sae, held[1]) if len(held[1]) > 1 else {}
            progress(f"step {step}/{steps}  all tokens: explained {every['explained_variance']:.3f}  L0 {every['l0']:.1f}  silent "
                     f"{every['silent']:.1%}  scored token: explained {ends.get('explained_variance', float('nan')):.3f}")
            save_checkpoint(state, args)
        if step >= steps:
            break
    sae.info.update(model=backbone.meta["model"], template=backbone.meta["template"], texts=Path(args.texts).name,
                    held_out={"all": every, "scored": ends}, tokens=steps * args.batch, start=args.start and Path(args.start).name,
                    settings={n: getattr(args, n) for n in ("k", "end_share", "cuts", "turns", "lr", "batch", "buffer", "seed",
                                                             "max_length")})
    save_sae(sae, args.out, torch.float16)
    checkpoint_path(args).unlink(missing_ok=True)       # only now: a kill in between loses nothing
    return sae


def stream_batches(backbone, texts, layer, args, generator):
    """Yield (all [b, d], scored [e, d]) for ever, mixed by a shuffle buffer; scored ones are drawn from the newest."""
    rng = np.random.default_rng(args.seed)
    pool, ends, ahead = [], torch.empty(0), 0
    talks = [t for t in texts if not isinstance(t, str)]
    take = args.batch - int(args.batch * args.end_share)
    while True:
        for at in range(0, len(texts), 64):
            some = [longer_talk(t, talks, args.turns, rng) for t in texts[at:at + 64]]
            for every, last in activations(backbone, some, layer, args.max_length, args.cuts, rng):
                pool.append(every)
                ends = torch.cat([ends.view(-1, last.shape[1]), last])[-args.buffer:]
                ahead += len(every)
            if ahead < args.buffer:
                continue
            pool = torch.cat(pool)[torch.randperm(ahead, generator=generator)]
            while len(pool) > max(args.buffer // 2, take):
                batch, pool = pool[:take], pool[take:]
                drawn = torch.randint(max(1, len(ends)), (args.batch - take if len(ends) else 0,), generator=generator)
                yield batch, ends[drawn]
            pool, ahead = [pool], len(pool)
        if ahead < args.buffer:                     # few texts: a smaller buffer will do
            args.buffer = max(args.batch, ahead)


def longer_talk(text, talks, turns, rng):
    """Half of the conversations go on from up to `turns` - 1 others: the end of a later turn is not the end of a first one."""
    if isinstance(text, str) or turns < 2 or rng.random() < 0.5:
        return text
    before = [talks[i] for i in rng.integers(len(talks), size=rng.integers(1, turns))]
    return [turn for talk in [*before, text] for turn in talk if turn["role"] != "system"]


def start_state(first, args, generator):
    """Parameters, Adam and what is counted. Inputs are scaled to norm √d while training; folded at the end."""
    every, ends = first
    d = every.shape[1]
    scale = math.sqrt(d) / every.norm(dim=1).mean()
    W_dec = F.normalize(torch.randn(args.width, d, generator=generator), dim=1)
    b_dec = (every * scale).mean(0)
    parameters = {"W_enc": W_dec.T.clone(), "b_enc": torch.zeros(args.width), "W_dec": W_dec, "b_dec": b_dec}
    if args.start:
        sae = load_sae(args.start)
        found, wanted = (sae.activation, sae.k, sae.norm, *sae.W_enc.shape), ("topk", args.k, "none", d, args.width)
        if found != wanted or not torch.equal(sae.b_in, sae.b_dec) or sae.info.get("layer") not in (None, args.layer):
            raise SAEError(f"training cannot go on from this SAE {found}, layer {sae.info.get('layer')} · --start {args.start} · needed "
                           f"are {wanted}, layer {args.layer} and b_dec subtracted")
        norm = sae.W_dec.norm(dim=1)            # put into the encoder: training keeps decoder rows at norm 1
        parameters = {"W_enc": sae.W_enc * norm, "b_enc": sae.b_enc * norm * scale, "W_dec": sae.W_dec / norm[:, None],
                      "b_dec": sae.b_dec * scale}
    parameters = {n: p.requires_grad_() for n, p in parameters.items()}
    variance = [float((x * scale).var(0).sum()) if len(x) > 1 else 1.0 for x in (every, ends)]
    return {**parameters, "scale": scale, "variance": variance, "step": 0, "idle": torch.zeros(args.width),
            "adam": torch.optim.Adam(parameters.values(), lr=args.lr, betas=(0.9, 0.999), fused=True)}


def train_step(state, batch, args):
    """One step of Adam on the two pools."""
    x = torch.cat(batch) * state["scale"]
    W_enc, b_enc, W_dec, b_dec = (state[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    pre = torch.relu((x - b_dec) @ W_enc + b_enc)
    best = pre.topk(args.k, sorted=False)
    f = torch.zeros_like(pre).scatter(-1, best.indices, best.values)
    error = x - (f @ W_dec + b_dec)
    n = len(batch[0])
    share = args.end_share if len(batch[1]) else 0.0
    squared = error.square().sum(1)
    loss = (1 - share) * squared[:n].mean() / state["variance"][0]
    if share:
        loss = loss + share * squared[n:].mean() / state["variance"][1]
    with torch.no_grad():
        state["idle"] += len(x)
        state["idle"][best.indices[best.values > 0]] = 0
    dead = (state["idle"] > args.dead_after).nonzero().flatten()
    if len(dead):                                   # AuxK: dead latents model the error that the living ones leave
        aux = pre[:, dead].topk(min(len(dead), x.shape[1] // 2), sorted=False)
        aux_f = torch.zeros(len(x), len(dead)).scatter(-1, aux.indices, aux.values)
        rest = error.detach()
        loss = loss + ((aux_f @ W_dec[dead] - rest).square().sum() / rest.square().sum().clamp_min(1e-8)) / 32
    state["adam"].zero_grad()
    loss.backward()
    state["adam"].step()
    with torch.no_grad():
        W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))


def finish(state, args, layer):
    """The trained parameters in raw units → SAE."""
    W_enc, b_enc, W_dec, b_dec = (state[n].detach().clone() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    sae = SAE(W_enc, b_enc / state["scale"], W_dec, b_dec / state["scale"], b_dec / state["scale"], "topk", k=args.k,
              info={"layer": layer, "hook": f"model.layers.{layer}.output"})
    return sae              # f in raw units: z·s = W f + b  ⇔  z = W (f/s) + b/s, with rows of W still of norm 1


def checkpoint_path(args):
    """Where an interrupted training left its state."""
    return Path(args.out).with_suffix(".checkpoint.safetensors")


def save_checkpoint(state, args):
    """Parameters, Adam's moments and the step: the same command goes on from here."""
    tensors = {n: state[n].detach() for n in ("W_enc", "b_enc", "W_dec", "b_dec", "idle")}
    tensors |= {f"adam{i}.{key}": value for i, s in state["adam"].state_dict()["state"].items() for key, value in s.items()}
    tensors |= {"scale": state["scale"], "variance": torch.tensor(state["variance"]), "step_done": torch.tensor(state["step"])}
    save_stage(checkpoint_path(args), tensors, training_key(args))


def training_key(args):
    """The settings a checkpoint must share with the command that goes on from it."""
    names = ("model", "layer", "texts", "start", "width", "k", "end_share", "cuts", "turns", "tokens", "batch", "lr", "seed",
             "max_length", "dead_after")
    return {n: getattr(args, n) for n in names}


def resume(state, args):
    """Take up a checkpoint of the same settings → whether there is one."""
    path = checkpoint_path(args)
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            key, t = (file.metadata() or {}).get("sparserm"), {n: file.get_tensor(n) for n in file.keys()}
    except SafetensorError:
        key, t = None, {}
    names = {f"adam{i}.{what}" for i in range(4) for what in ("step", "exp_avg", "exp_avg_sq")}
    if set(t) != names | {"W_enc", "b_enc", "W_dec", "b_dec", "idle", "scale", "variance", "step_done"}:
        raise SAEError(f"not a complete checkpoint · {path} · delete it: training then begins anew")
    if json.loads(key or "null") != training_key(args):
        raise SAEError(f"a checkpoint of other settings lies there · {path} · delete it, or pass the settings it was made with")
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            state[name].copy_(t[name])
    moments = {}
    for name in t:
        if name.startswith("adam"):
            i, _, key = name.removeprefix("adam").partition(".")
            moments.setdefault(int(i), {})[key] = t[name]
    state["adam"].load_state_dict({**state["adam"].state_dict(), "state": moments})
    step = min(int(t["step_done"]), max(1, args.tokens // args.batch) - 1)       # killed after the last: do that one again
    state.update(scale=t["scale"], variance=t["variance"].tolist(), step=step, idle=t["idle"])
    return True


# ---------------------------------------------------------------- commands

def describe(sae):
    """The lines of `sae.py info`."""
    norms, i = sae.W_dec.float().norm(dim=1), sae.info
    numbers = f"k = {sae.k}" if sae.k else f"threshold {float(sae.threshold.min()):.4g} … {float(sae.threshold.max()):.4g}" \
        if sae.threshold is not None else ""
    lines = {"layout": i.get("layout"), "model": i.get("model") or "not stated", "layer": i.get("layer"), "hook": i.get("hook"),
             "width": f"{sae.d_model} → {sae.d_sae}", "activation": f"{sae.activation} {numbers}",
             "input": ("b_dec subtracted" if sae.b_in.any() else "nothing subtracted") + f", per-token scaling {sae.norm}",
             "decoder norms": f"{norms.min():.3f} … {norms.max():.3f}", "folded": i.get("folded") or "nothing", "stated L0": i.get("l0"),
             "held out": i.get("held_out"), "settings": i.get("settings")}
    return "\n".join(f"{name:<14} {value}" for name, value in lines.items() if value is not None)


class ManualPage(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Line breaks kept, defaults named."""


def parse_args():
    """The flags of the three commands."""
    p = argparse.ArgumentParser(prog="sae.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub = p.add_subparsers(dest="command", required=True)
    load = argparse.ArgumentParser(add_help=False)
    load.add_argument("path", help="SAE file or folder, hub:REPO[:SUBFOLDER]")
    load.add_argument("--k-sae", type=int, help="k of a TopK SAE whose files do not hold it (Qwen-Scope)")
    load.add_argument("--revision", help="branch, tag or commit on the hub")
    load.add_argument("--sae-dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="in memory")
    command = lambda name, says, example, *parents: sub.add_parser(
        name, parents=parents, help=says, description=f"{says}\n\n    python sae.py {example}", formatter_class=ManualPage)
    command("info", "what a checkpoint is and how it was read", "info my-sae.safetensors", load)
    check = command("check", "how well it fits a model on your texts", "check my-sae.safetensors --texts my.jsonl", load)
    run = command("train", "train a TopK SAE", "train --layer 16 --texts my.jsonl --out my-sae.safetensors")
    for q in (check, run):
        q.add_argument("--model", default="demo", help="demo, a hub name, a folder or a .gguf file")
        q.add_argument("--texts", required=True, help="JSONL with text, messages, or prompt, chosen, rejected")
        q.add_argument("--layer", type=int, help="block L, 0-based (check: the SAE's own)")
        q.add_argument("--max-length", type=int, default=256, help="tokens of a text")
        q.add_argument("--limit", type=int, default=400 if q is check else None, help="use only so many texts")
        q.add_argument("--seed", type=int, default=0, help="of the shuffling and the start")
    run.add_argument("--out", required=True, help="file to write, .safetensors")
    run.add_argument("--width", type=int, default=4608, help="number of latents")
    run.add_argument("--k", type=int, default=64, help="latents that may fire")
    run.add_argument("--end-share", type=float, default=0.33, help="share of scored positions in a batch")
    run.add_argument("--cuts", type=int, default=4, help="extra scored positions a conversation, its answer cut anywhere")
    run.add_argument("--turns", type=int, default=3, help="half of the conversations are joined to up to so many turns")
    run.add_argument("--start", help="go on from this TopK SAE, e.g. one that has not seen your chat template")
    run.add_argument("--tokens", type=int, default=2_000_000, help="activations to train on")
    run.add_argument("--batch", type=int, default=1024, help="activations a step")
    run.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of Adam")
    run.add_argument("--buffer", type=int, default=65536, help="activations in the shuffle buffer")
    run.add_argument("--dead-after", type=int, default=100_000, help="activations without firing after which a latent counts as dead")
    return p.parse_args([a for a in sys.argv[1:] if a != "--debug"])


def main():
    """`sae.py info`, `check` or `train`."""
    args = parse_args()
    sae = None if args.command == "train" else load_sae(args.path, getattr(torch, args.sae_dtype), k=args.k_sae, revision=args.revision)
    if args.command == "info":
        return print(describe(sae), *(f"warning: {w}" for w in stage2.warnings_of(sae)), sep="\n")
    backbone = stage1.load_backbone(args.model)
    if args.command == "train":
        if args.layer is None or not 0 <= args.layer < len(backbone.blocks):
            raise SAEError(f"layer {args.layer} does not exist · {args.model} has blocks 0 to {len(backbone.blocks) - 1} · pass --layer")
        sae = train(backbone, read_texts(args.texts)[:args.limit], args.layer, args, lambda line: print(line, flush=True))
        print(f"\nwritten {args.out}\n{describe(sae)}\n\nnext: python 02_select_features.py --sae {args.out}")
        return
    layer = args.layer if args.layer is not None else sae.info.get("layer")
    if layer is None or sae.d_model != backbone.model.config.get_text_config().hidden_size:
        raise SAEError(f"the SAE reads width {sae.d_model}, layer {layer}; {args.model} has width "
                       f"{backbone.model.config.get_text_config().hidden_size} · {args.path} · pass the right SAE, --model and --layer")
    texts = read_texts(args.texts)
    chosen = np.random.default_rng(args.seed).permutation(len(texts))[:args.limit]
    every, ends = sample_activations(backbone, [texts[i] for i in chosen], layer, args.max_length)
    figures = [stage2.health(sae, every), stage2.health(sae, ends) if len(ends) > 1 else None]
    print(describe(sae), "", sep="\n")
    for name, h in zip(("all tokens", "scored token"), figures):
        if h:
            print(f"{name:<14} explained variance {h['explained_variance']:.3f} · L0 {h['l0']:.1f} · "
                  f"latents that never fire here {h['silent']:.1%} · {h['n']} vectors")
    print(*(f"warning: {w}" for w in stage2.warnings_of(sae, *figures)), sep="\n")
