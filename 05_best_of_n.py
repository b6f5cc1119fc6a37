"""Stage 5: use the reward: sample and rank candidates, build or filter preference pairs.

    python 05_best_of_n.py sample --prompts data/prompts.jsonl --reward runs/demo/reward_head.safetensors --n 8
    python 05_best_of_n.py rank   --candidates FILE --reward runs/demo/reward_head.safetensors
    python 05_best_of_n.py pairs  --candidates runs/demo/candidates.jsonl --reward … --min-margin 0.5
    python 05_best_of_n.py pairs  --filter pairs.jsonl --reward …

sample  reads prompts (JSONL: prompt), writes candidates.jsonl: prompt, candidates, scores, best, policy, reward, settings
rank    reads {prompt, candidates[, labels]} or {prompt, response[, id]} of any engine, writes a row a prompt with scores, ranking, best
pairs   writes what TRL's DPOTrainer reads: prompt, chosen, rejected (messages), score_chosen, score_rejected, margin, id

Best-of-n is not in the paper. The curve is the expectation over *all* subsets of m of the n candidates, not the first m; the
KL figure log m - (m - 1) / m is an upper bound of what choosing the best of m costs.
"""

import argparse
import collections
import importlib
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from parts import report
from parts.chat import chat_string, control_tokens, render
from parts.files import UserError, file_hash, named_in_errors, read_meta, run_main, write_rows, write_text
from parts.rows import ACCEPTED, are_numbers, read_candidates, read_prompts, read_rows

stage1, stage3 = (importlib.import_module(n) for n in ("01_extract", "03_train_head"))


# ---------------------------------------------------------------- sampling

def prompt_ids(tokenizer, prompt):
    """A prompt (str or messages) with the generation prompt → token ids."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    pattern, _ = control_tokens(tokenizer)
    turns = [{**m, "content": pattern.sub(lambda found: found[0][0] + " " + found[0][1:], m["content"])} for m in turns]
    return tokenizer(chat_string(tokenizer, turns, add_generation_prompt=True), add_special_tokens=False)["input_ids"]


def stop_ids(backbone):
    """Tokens that end an answer: the configured ones, and the mark that the chat template closes a turn with."""
    configured = backbone.model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {backbone.tokenizer.eos_token_id}
    text = render(backbone.tokenizer, "a", "b")
    return {i for i in ids | {text.ids[text.eot]} if i is not None}


def draw(logits, uniform, temperature, top_p):
    """Logits [n, vocab] and one uniform number a row → tokens [n], nucleus sampling by the inverse CDF.

    One number a row and step, from the row's own generator: the same text whatever else is sampled beside it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probability, order = torch.softmax(logits.double() / temperature, -1).sort(descending=True, stable=True)
    cumulative = probability.cumsum(-1)
    probability = probability * (cumulative - probability < top_p)          # the smallest set whose mass reaches top_p
    cumulative = probability.cumsum(-1)
    at = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)
    return order.gather(-1, at.clamp_max(logits.shape[-1] - 1)).squeeze(-1)


def sample_candidates(backbone, prompt, n, temperature=1.0, top_p=0.95, max_new_tokens=128, seed=0, progress=None):
    """n answers of the policy to one prompt → (list of str, what score_sampled needs). The prompt is computed once, its cache
    shared by all n."""
    from transformers import DynamicCache
    ids = torch.tensor([prompt_ids(backbone.tokenizer, prompt)], device=backbone.device)
    ends = torch.tensor(sorted(stop_ids(backbone)), device=backbone.device)
    key = stage1.hash_number(stage1.plain_text(prompt))
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed((key + 1_000_003 * seed + i) % 2**63))
                           for i in range(n)]).to(backbone.device)
    tokens, running = [], torch.ones(n, dtype=torch.bool, device=backbone.device)
    with stage1.ONE_PASS, torch.inference_mode():
        cache = DynamicCache(config=backbone.model.config)
        logits = backbone.model(ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1].expand(n, -1)
        cache.batch_repeat_interleave(n)
        for step in range(max_new_tokens):
            token = torch.where(running, draw(logits, uniform[:, step], temperature, top_p), ends[0])
            tokens.append(token)
            if progress:
                progress(int(running.sum()))
            running &= ~torch.isin(token, ends)
            if not running.any() or step + 1 == max_new_tokens:
                break
            logits = backbone.model(token[:, None], cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    rows = torch.stack(tokens, 1).tolist()
    stop = set(ends.tolist())
    rows = [row[:next((i for i, t in enumerate(row) if t in stop), len(row))] for row in rows]
    texts = [text.strip() for text in backbone.tokenizer.batch_decode(rows, skip_special_tokens=True)]
    return texts, (ids[0].tolist(), rows, cache)


def score_sampled(reward, prompt, texts, sampled):
    """Rewards of answers just sampled from the reward's own backbone, read off the cached keys → (list of float, Counter of reasons).

    The backbone has seen every token but the end of the turn. Each answer's last token and the template's end are run once more
    on top of the cache, up to block L; what was cached behind an answer's end is masked. An answer for which that is not the
    text that `score` would see is scored by `score`, and the reason is counted.
    """
    (ids, rows, cache), backbone = sampled, reward.backbone
    rendered = [reward.render(prompt, text) for text in texts]
    cached, reasons = cache.get_seq_length(), collections.Counter()

    def reason(row, text):
        if backbone.pack == "pad":
            return "the model does not honour a 4D mask"
        if reward.meta["token"] == "mean":
            return "token rule mean"
        if getattr(backbone.model.config.get_text_config(), "sliding_window", None):
            return "a sliding window evicts keys"
        if not row:
            return "empty"
        if text.ids[:len(ids)] != ids:
            return "the template renders the prompt differently"
        if text.ids[text.last:] != rendered[0].ids[rendered[0].last:]:
            return "another end of the turn"
        return "" if text.ids[len(ids):text.last] == row else "tokenised anew it differs"
    why = [reason(row, text) for row, text in zip(rows, rendered)]
    here = [i for i, r in enumerate(why) if not r]
    scores = torch.empty(len(texts))
    if here:
        after = torch.tensor([[rows[i][-1], *rendered[i].ids[rendered[i].last:]] for i in here])            # [m, t]
        before = torch.tensor([len(ids) + len(rows[i]) - 1 for i in here])                                  # keys that are its own
        t = after.shape[1]
        sees = torch.cat([(torch.arange(cached) < before[:, None])[:, None].expand(-1, t, -1),
                          torch.ones(t, t, dtype=torch.bool).tril().expand(len(here), -1, -1)], 2)
        mask = torch.zeros(sees.shape, dtype=backbone.model.dtype).masked_fill_(~sees, torch.finfo(backbone.model.dtype).min)
        cache.batch_select_indices(torch.tensor(here, device=backbone.device))
        hidden, = stage1.forward_to(backbone, [reward.meta["layer"]], input_ids=after.to(backbone.device), cache=cache, use_cache=True,
                                    position_ids=(before[:, None] + torch.arange(t)).to(backbone.device),
                                    attention_mask=mask[:, None].to(backbone.device))
        places = [rendered[i].span(reward.meta["token"])[0] - b for i, b in zip(here, before.tolist())]
        scores[here] = reward.reward_of(hidden[range(len(here)), places].float().cpu())
    rest = [i for i, r in enumerate(why) if r]
    if rest:
        scores[rest] = torch.tensor(reward.score([prompt] * len(rest), [texts[i] for i in rest]))
        reasons.update(why[i] for i in rest)
    return scores.tolist(), reasons


# ---------------------------------------------------------------- the curve

def best_of_curve(scores, values, wanted=None):
    """Expected value of the best-scored of m candidates, over all subsets of size m → {m: expectation}, m in `wanted`.

    scores, values: lists of n numbers of one prompt. With candidates sorted by score, the i-th (1-based) is the best of
    C(i-1, m-1) of the C(n, m) subsets. Equal scores share their value.
    """
    n = len(scores)
    shared = {}
    for s, v in zip(scores, values):
        shared.setdefault(s, []).append(v)
    ordered = [sum(shared[s]) / len(shared[s]) for s in sorted(scores)]
    return {m: sum(math.comb(i, m - 1) / math.comb(n, m) * v for i, v in enumerate(ordered)) for m in wanted or sizes(n)}


def sizes(n):
    """1, 2, 4, … and n."""
    return sorted({2**i for i in range(12) if 2**i < n} | {n})


def kl_bound(m):
    """log m - (m - 1) / m nats: upper bound of KL(best-of-m policy ‖ policy)."""
    return math.log(m) - (m - 1) / m


def curve_of(rows):
    """Rows with candidates, scores and perhaps labels → {prompts, n, curve: {m: {prompts, reward, kl_bound[, label, oracle]}}}.

    m goes up to the most candidates that a prompt has; each m is averaged over the prompts that have as many.
    """
    n, labelled = max(len(r["scores"]) for r in rows), all("labels" in r for r in rows)
    curve = {}
    for m in sizes(n):
        enough = [r for r in rows if len(r["scores"]) >= m]
        mean = lambda by, of, enough=enough, m=m: sum(best_of_curve(r[by], r[of], [m])[m] for r in enough) / len(enough)
        curve[m] = {"prompts": len(enough), "reward": mean("scores", "scores"), "kl_bound": kl_bound(m)}
        if labelled:
            curve[m] |= {"label": mean("scores", "labels"), "oracle": mean("labels", "labels")}
    return {"prompts": len(rows), "n": n, "curve": curve}


def top_of(rows):
    """Mean label of the top-ranked candidate, and of a random pick, over all prompts."""
    best = [r["labels"][max(range(len(r["scores"])), key=r["scores"].__getitem__)] for r in rows]
    return sum(best) / len(rows), sum(sum(r["labels"]) / len(r["labels"]) for r in rows) / len(rows)


# ---------------------------------------------------------------- commands

def sample(args):
    """Sample n candidates a prompt and score them; goes on where an earlier, interrupted call stopped."""
    prompts = read_prompts(args.prompts)[:args.limit]
    reward_meta, head = read_meta(args.reward, "03_train_head.py"), file_hash(args.reward)
    backbone_name = args.model or reward_meta["model"]
    policy_name = args.policy or backbone_name
    settings = {n: getattr(args, n) for n in ("n", "temperature", "top_p", "max_new_tokens", "seed")}
    out = Path(args.out or Path(args.reward).parent / "candidates.jsonl")
    done = {}
    for file in (out, out.with_suffix(".jsonl.part")):
        for line in file.read_bytes().split(b"\n") if file.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:                  # the line a kill cut short
                continue
            if isinstance(row, dict) and {"prompt", "candidates", "best"} <= set(row) and are_numbers(row.get("scores"), args.n) \
                    and [row.get(name) for name in ("settings", "policy", "reward")] == [settings, policy_name, head]:
                done[json.dumps(row["prompt"])] = row
    rows = [done.get(json.dumps(p)) for p in prompts]
    if None in rows:
        revision = reward_meta["revision"] if policy_name == reward_meta["model"] else None
        policy = stage1.load_backbone(policy_name, revision, dtype=args.dtype, device=args.device)
        reward = stage3.RewardModel.load(args.reward, model=policy if policy_name == backbone_name else args.model, device=args.device)
        counted, reasons = 0, collections.Counter()
        out.parent.mkdir(parents=True, exist_ok=True)
        with named_in_errors(out), open(out.with_suffix(".jsonl.part"), "a", encoding="utf-8") as part, \
                tqdm(unit="tok", desc="sample", disable=None) as bar:
            part.write("\n")            # after the line that a kill cut short
            for n, prompt in enumerate(prompts):
                if rows[n] is None:
                    texts, sampled = sample_candidates(policy, prompt, **settings, progress=bar.update)
                    if args.score and reward.backbone is policy:
                        scores, why = score_sampled(reward, prompt, texts, sampled)
                        counted += len(texts)
                        reasons += why
                    else:
                        scores = reward.score([prompt] * len(texts), texts)
                    rows[n] = {"prompt": prompt, "candidates": texts, "scores": scores, "best": texts[scores.index(max(scores))],
                               "policy": policy_name, "reward": head, "settings": settings}
                    part.write(json.dumps(rows[n], ensure_ascii=False) + "\n")
                    part.flush()
        if counted:
            print(f"scored while sampling: {1 - reasons.total() / counted:.1%} of {counted} candidates; the ordinary way: "
                  + (", ".join(f"{n} ({why})" for why, n in reasons.most_common()) or "none"))
    write_rows(out, rows)
    out.with_suffix(".jsonl.part").unlink(missing_ok=True)
    finish(out, rows)


def rank(args):
    """Score candidates of any engine and put them in order."""
    rows = read_candidates(args.candidates)
    reward = stage3.RewardModel.load(args.reward, model=args.model, device=args.device)
    flat = [(row["prompt"], text) for row in rows for text in row["candidates"]]
    scores = iter(reward([p for p, _ in flat], [t for _, t in flat]))           # None: longer than max_length
    for row in rows:
        row["scores"] = [next(scores) for _ in row["candidates"]]
        row["ranking"] = sorted(range(len(row["scores"])), key=lambda i: math.inf if row["scores"][i] is None else -row["scores"][i])
        row["best"] = row["candidates"][row["ranking"][0]]
    whole = [row for row in rows if None not in row["scores"]]
    if not whole:
        raise UserError(f"every prompt has a candidate longer than {reward.meta['max_length']} tokens · {args.candidates} · "
                        "run stage 1 with a larger --max-length")
    if len(whole) < len(rows):
        print(f"note: {len(rows) - len(whole)} prompts have a candidate that is too long to score: ranked last, not in the curve")
    out = Path(args.out or Path(args.reward).parent / Path(args.candidates).with_suffix(".ranked.jsonl").name)
    write_rows(out, rows)
    finish(out, whole)


def finish(out, rows):
    """Write, draw and print the best-of-n curve."""
    result = curve_of(rows)
    write_text(out.with_suffix(".curve.json"), json.dumps(result, indent=1) + "\n")
    drawn = report.picture(lambda axes: report.best_of_plot(axes, result["curve"]), out.with_suffix(".curve.png"))
    report.print_curve(out, result, rows, top_of(rows) if "label" in result["curve"][1] else None, drawn)


def pairs(args):
    """Preference pairs for DPO: best against worst of the candidates, or existing pairs filtered by the reward."""
    if bool(args.candidates) == bool(args.filter):
        raise UserError("either candidates or pairs are needed · pairs · pass --candidates FILE or --filter FILE")
    kept, dropped = [], []
    reward = stage3.RewardModel.load(args.reward, model=args.model, device=args.device)
    rows = list(existing_pairs(args.filter, reward, args.label) if args.filter else
                best_and_worst(read_candidates(args.candidates), reward, file_hash(args.reward)))
    if not rows:
        raise UserError(f"no pairs · {args.filter} · rows need {ACCEPTED}")
    for row in rows:
        if args.plain and "reason" not in row and not isinstance(row["prompt"], str):
            row["reason"] = "the prompt is messages, --plain writes strings"
    usable = [r for r in rows if "reason" not in r]
    scores = [reward.score([r["prompt"] for r in usable], [r[side] for r in usable]) for side in ("chosen", "rejected")]
    for row, chosen, rejected in zip(usable, *scores):
        row |= {"score_chosen": chosen, "score_rejected": rejected, "margin": chosen - rejected}
    for row in rows:
        if "reason" not in row and row["margin"] <= 0:
            row["reason"] = "the rejected side scores as high or higher"
        elif "reason" not in row and row["margin"] < args.min_margin:
            row["reason"] = f"margin below {args.min_margin}"
        if not args.plain and all(isinstance(row.get(n), str) for n in ("chosen", "rejected")):
            row |= {"prompt": chat("user", row["prompt"]) if isinstance(row["prompt"], str) else row["prompt"],
                    "chosen": chat("assistant", row["chosen"]), "rejected": chat("assistant", row["rejected"])}
        (dropped if "reason" in row else kept).append(row)
    out = Path(args.out or Path(args.reward).parent / Path(args.filter or args.candidates).with_suffix(".pairs.jsonl").name)
    write_rows(out, kept)
    write_rows(out.with_suffix(".dropped.jsonl"), dropped)
    print(f"\n{len(kept)} pairs kept, {len(dropped)} dropped\nwritten {out}, {out.with_suffix('.dropped.jsonl')}"
          f"\n\nnext: datasets.load_dataset('json', data_files='{out}') → trl.DPOTrainer")


def chat(role, text):
    """A conversation of one turn."""
    return [{"role": role, "content": text}]


def existing_pairs(path, reward, label=None):
    """Pairs of any accepted layout → rows {id, prompt, chosen, rejected}, with a reason where one cannot be used."""
    for n, (where, raw) in enumerate(read_rows(path)):
        found, reasons = stage1.usable_pairs(reward.backbone.tokenizer, raw, label, reward.meta["max_length"], None if n else where)
        name = raw.get("id") if isinstance(raw, dict) else None
        name = where.rpartition(":")[2] if name is None else name
        yield from ({"id": name, "reason": reason, "row": raw} for reason in reasons)
        yield from ({"id": name, "prompt": p, "chosen": c, "rejected": r} for p, c, r in found)


def best_and_worst(rows, reward, head):
    """Candidates → rows {id, prompt, chosen = the best scored, rejected = the worst}. Scores of this head are not computed again."""
    for n, row in enumerate(rows):
        texts = [text for text in dict.fromkeys(row["candidates"]) if text.strip()]
        if len(texts) < 2:
            yield {"id": str(n), "prompt": row["prompt"], "reason": "fewer than two different candidates that are not empty"}
            continue
        scores = row.get("scores")
        if row.get("reward") != head or not are_numbers(scores, len(row["candidates"])):
            scores = reward.score([row["prompt"]] * len(row["candidates"]), row["candidates"])
        scores = dict(zip(row["candidates"], scores))
        yield {"id": str(n), "prompt": row["prompt"], "chosen": max(texts, key=scores.get), "rejected": min(texts, key=scores.get)}


def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--reward", default="runs/demo/reward_head.safetensors", help="head of stage 3 (default runs/demo/…)")
    common.add_argument("--out", help="file to write, .jsonl (default: beside the head, named after the input)")
    common.add_argument("--device", default="auto", help="cpu, cuda, … (default auto)")
    common.add_argument("--model", help="another copy of the reward's backbone")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub = p.add_subparsers(dest="command", required=True)
    command = lambda name, says, example: sub.add_parser(name, parents=[common], help=says, description=f"{says}\n\n    {example}",
                                                         formatter_class=argparse.RawDescriptionHelpFormatter)
    q = command("sample", "sample n candidates a prompt, score them, keep the best",
                "python 05_best_of_n.py sample --prompts data/prompts.jsonl --reward runs/demo/reward_head.safetensors --n 8")
    q.add_argument("--prompts", required=True, help="JSONL with prompt")
    q.add_argument("--policy", help="model to sample from (default: the reward's backbone)")
    q.add_argument("--n", type=int, default=16, help="candidates a prompt (default 16)")
    q.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default 1.0)")
    q.add_argument("--top-p", type=float, default=0.95, help="nucleus mass (default 0.95)")
    q.add_argument("--max-new-tokens", type=int, default=128, help="tokens an answer, at most (default 128)")
    q.add_argument("--seed", type=int, default=0, help="(default 0)")
    q.add_argument("--score", action=argparse.BooleanOptionalAction, default=True,
                   help="read the reward off the sampling where the policy is the backbone (default), or score in a pass of its own")
    q.add_argument("--limit", type=int, help="only the first N prompts")
    q.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="of the policy, and of the reward where it is the same model (default auto)")
    q = command("rank", "score and order candidates of any engine", "python 05_best_of_n.py rank --candidates my-candidates.jsonl")
    q.add_argument("--candidates", required=True, help="JSONL: prompt, candidates[, labels], or prompt, response[, id]")
    q = command("pairs", "preference pairs for DPO", "python 05_best_of_n.py pairs --filter my-pairs.jsonl --min-margin 0.5")
    q.add_argument("--candidates", help="candidates: best against worst")
    q.add_argument("--filter", help="existing pairs: drop those that the reward ranks the other way")
    q.add_argument("--min-margin", type=float, default=0.0, help="least difference of the two scores (default 0)")
    q.add_argument("--label", choices=("safer", "better"), help="for --filter on PKU-SafeRLHF")
    q.add_argument("--plain", action="store_true", help="strings instead of messages (TRL then applies no chat template)")
    args = p.parse_args()
    if args.command == "sample" and (min(args.n, args.max_new_tokens, 1 if args.limit is None else args.limit) < 1
                                     or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1):
        raise UserError(f"out of range · --n {args.n} --max-new-tokens {args.max_new_tokens} --temperature {args.temperature} "
                        f"--top-p {args.top_p} --limit {args.limit} · counts from 1, temperature from 0, top-p above 0 and at most 1")
    return args


def main():
    """Stage 5 from the command line."""
    args = parse_args()
    {"sample": sample, "rank": rank, "pairs": pairs}[args.command](args)


if __name__ == "__main__":
    run_main(main)
