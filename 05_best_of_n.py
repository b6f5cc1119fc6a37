"""Stage 5: use the reward: sample and rank candidates, build or filter preference pairs, export.

    python 05_best_of_n.py sample --reward HEAD --prompts data/prompts.jsonl --n 8
    python 05_best_of_n.py rank   --reward HEAD --candidates my-candidates.jsonl
    python 05_best_of_n.py pairs  --reward HEAD --candidates candidates.jsonl --min-margin 0.5
    python 05_best_of_n.py pairs  --reward HEAD --filter my-pairs.jsonl
    python 05_best_of_n.py export --reward HEAD --out my-reward-model

sample  reads   prompts: JSONL with prompt
        writes  candidates.jsonl: prompt, candidates, scores, outside, best, policy, reward,
                models (a hash of policy and backbone), settings
rank    reads   {prompt, candidates[, labels]} or {prompt, response[, id]} of any engine
        writes  a row a prompt with scores, ranking, best
pairs   reads   candidates, or existing pairs to filter
        writes  what TRL's DPOTrainer reads: prompt, chosen, rejected (messages), score_chosen,
                score_rejected, margin, id
export  writes  a folder for AutoModelForSequenceClassification and whatever builds on it: the
                backbone up to block L and the head folded to one vector (parts/export.py)

Best-of-n is not in the paper. The curve is the expectation over *all* subsets of m of the n
candidates, not the first m; the KL figure log m - (m - 1) / m is an upper bound of what choosing
the best of m costs.
"""

import argparse
import collections
import functools
import importlib
import itertools
import json
import math
import re
import shlex
from pathlib import Path

import torch
from tqdm import tqdm

from parts import report
from parts.candidates import are_numbers, read_candidates, read_prompts
from parts.chat import prompt_ids, render
from parts.export import (
    check_free,
    exported_tokenizer,
    logits_of_folder,
    model_card,
    save_classifier,
    sequence_classifier,
)
from parts.files import (
    UserError,
    file_hash,
    folder_moved_into_place,
    named_in_errors,
    read_meta,
    run_main,
    write_rows,
    write_text,
)
from parts.messages import Unreadable, with_last_turn
from parts.models import (
    check_length,
    check_weights,
    demo_file,
    identity,
    licence_of,
    load_tokenizer,
)
from parts.rows import ACCEPTED, as_written, in_words, read_rows, tell_notes, usable_pairs
from parts.sampled import HiddenSums, Sampled, score_sampled

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
# flags that decide what is sampled
SAMPLING = ("n", "temperature", "top_p", "max_new_tokens", "seed")


# ---------------------------------------------------------------- sampling

def stop_ids(backbone):
    """Tokens that end an answer: the configured ones and the chat template's end of a turn."""
    configured = backbone.model.generation_config.eos_token_id
    ids = set(configured) if isinstance(configured, list) else {configured}
    ids.add(backbone.tokenizer.eos_token_id)
    text = render(backbone.tokenizer, "a", "b")
    ids.add(text.ids[text.eot])
    return ids - {None}


def draw(logits, uniform, temperature, top_p):
    """Logits [n, vocab] and one uniform number a row → tokens [n], nucleus sampling by the inverse
    CDF.

    One number a row and step, from the row's own generator: the same text whatever else is sampled
    beside it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probability = torch.softmax(logits.double() / temperature, -1)
    probability, order = probability.sort(descending=True, stable=True)
    mass_before = probability.cumsum(-1) - probability
    probability = probability * (mass_before < top_p)       # the likeliest, until they reach top_p
    cumulative = probability.cumsum(-1)
    wanted = uniform[:, None].double() * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, wanted, right=True).clamp_max(logits.shape[-1] - 1)
    return order.gather(-1, place).squeeze(-1)


def uniform_numbers(prompt, n, steps, seed):
    """The uniform numbers [n, steps] of n candidates: of prompt, seed and candidate alone."""
    key = stage1.hash_number(stage1.plain_text(prompt))
    rows = []
    for candidate in range(n):
        generator = torch.Generator().manual_seed((key + 1_000_003 * seed + candidate) % 2**63)
        rows.append(torch.rand(steps, generator=generator))
    return torch.stack(rows)


def sample_candidates(backbone, prompts, n, temperature=1.0, top_p=0.95, max_new_tokens=128, seed=0,
                      layer=None, progress=None):
    """n answers of the policy to each prompt → (texts, a row an answer, prompt by prompt; Sampled).

    Several prompts share a pass: they are padded on the left, computed once, and the cache of each
    is shared by its n answers. layer: add up the hidden states of that block, for token rule
    `mean`.
    """
    device = backbone.device
    ids = [prompt_ids(backbone.tokenizer, prompt) for prompt in prompts]
    stop = stop_ids(backbone)
    ends = torch.tensor(sorted(stop), device=device)
    uniform = torch.cat([uniform_numbers(prompt, n, max_new_tokens, seed) for prompt in prompts])
    uniform = uniform.to(device)                                # [rows, steps]

    watch = None
    with backbone.one_pass, torch.inference_mode():
        if layer is not None:
            watch = HiddenSums(backbone.blocks[layer], len(uniform))
        try:
            steps, state = decode(backbone, ids, n, ends, uniform, temperature, top_p, watch,
                                  progress)
        finally:
            sums = watch.finish() if watch else None

    tokens = torch.stack(steps, 1).tolist()
    rows = [until_end(row, stop) for row in tokens]
    ended = [len(row) < len(all_of_row) for row, all_of_row in zip(rows, tokens)]
    texts = backbone.tokenizer.batch_decode(rows, skip_special_tokens=True)
    padding = [max(map(len, ids)) - len(prompt) for prompt in ids for _ in range(n)]
    return ([text.strip() for text in texts],
            Sampled(ids, n, rows, ended, state, padding, sums))


def decode(backbone, ids, n, ends, uniform, temperature, top_p, watch, progress):
    """Sample token by token → (list of tokens [rows], a step each; the cache)."""
    from transformers import DynamicCache
    device = backbone.device
    cache = DynamicCache(config=backbone.model.config)
    longest = max(map(len, ids))
    prompt_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    positions = (prompt_mask.cumsum(1) - 1).clamp_min(0)
    output = backbone.model(padded.to(device), attention_mask=prompt_mask.to(device),
                            position_ids=positions.to(device), cache=cache, use_cache=True,
                            logits_to_keep=1)
    logits = output.logits[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    mask = prompt_mask.repeat_interleave(n, 0).to(device)
    position = torch.tensor([len(row) for row in ids]).repeat_interleave(n).to(device)

    steps = []                                                  # of tokens [rows]
    running = torch.ones(len(mask), dtype=torch.bool, device=device)
    for step in range(uniform.shape[1]):
        tokens = draw(logits, uniform[:, step], temperature, top_p)
        tokens = torch.where(running, tokens, ends[0])          # fed, and cut off by until_end()
        steps.append(tokens)
        if progress:
            progress(int(running.sum()))
        running &= ~torch.isin(tokens, ends)
        last = step + 1 == uniform.shape[1]
        if not running.any() or (last and not watch):
            break
        if watch:  # it also has to see the last token of an answer cut short
            watch.counted = running
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        output = backbone.model(tokens[:, None], attention_mask=mask,
                                position_ids=position[:, None],
                                cache=cache, use_cache=True, logits_to_keep=1)
        if last:
            break
        logits = output.logits[:, -1]
        position = position + 1
    return steps, cache


def until_end(tokens, stop):
    """The tokens before the first that ends an answer."""
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[:place]
    return tokens


# ---------------------------------------------------------------- the curve

def best_of_curve(scores, values, wanted=None):
    """Expected value of the best-scored of m candidates, over all subsets of size m → {m:
    expectation}, m in `wanted`.

    scores, values: lists of n numbers of one prompt. With candidates sorted by score, the i-th
    (1-based) is the best of C(i-1, m-1) of the C(n, m) subsets. Equal scores share their value.
    """
    n = len(scores)
    values_of_score = {}
    for score, value in zip(scores, values):
        values_of_score.setdefault(score, []).append(value)
    ordered = []
    for score in sorted(scores):
        shared = values_of_score[score]
        ordered.append(sum(shared) / len(shared))

    curve = {}
    for m in wanted or sizes(n):
        shares = [math.comb(i, m - 1) / math.comb(n, m) for i in range(n)]
        curve[m] = sum(share * value for share, value in zip(shares, ordered))
    return curve


def sizes(n):
    """1, 2, 4, … and n."""
    return sorted({2**i for i in range(12) if 2**i < n} | {n})


def kl_bound(m):
    """log m - (m - 1) / m nats: upper bound of KL(best-of-m policy ‖ policy)."""
    return math.log(m) - (m - 1) / m


def mean_best_of(rows, m, by, value):
    """The expectation of best_of_curve at m, averaged over prompts. by, value: names of columns."""
    return sum(best_of_curve(row[by], row[value], [m])[m] for row in rows) / len(rows)


def curve_of(rows):
    """Rows with candidates, scores and perhaps labels → {prompts, n, curve: {m: {prompts, reward,
    kl_bound[, label, oracle]}}}.

    m goes up to the most candidates that a prompt has; each m is averaged over the prompts that
    have as many.
    """
    n = max(len(row["scores"]) for row in rows)
    labelled = all("labels" in row for row in rows)
    curve = {}
    for m in sizes(n):
        enough = [row for row in rows if len(row["scores"]) >= m]
        curve[m] = {"prompts": len(enough), "reward": mean_best_of(enough, m, "scores", "scores"),
                    "kl_bound": kl_bound(m)}
        if labelled:
            curve[m]["label"] = mean_best_of(enough, m, "scores", "labels")
            curve[m]["oracle"] = mean_best_of(enough, m, "labels", "labels")
    return {"prompts": len(rows), "n": n, "curve": curve}


def top_of(rows):
    """Mean label of the top-ranked candidate, and of a random pick, over all prompts."""
    best = [row["labels"][ranking_of(row["scores"])[0]] for row in rows]
    random_pick = [sum(row["labels"]) / len(row["labels"]) for row in rows]
    return sum(best) / len(rows), sum(random_pick) / len(rows)


def finish(out, rows):
    """Write, draw and print the best-of-n curve, of the candidates that have a score."""
    reasons = reasons_of(rows)
    if reasons:
        print(f"note: {reasons.total()} candidates have no score ({in_words(reasons)}): "
              "ranked last, not in the curve")
    scored = [row for row in map(with_scores, rows) if row["scores"]]
    if not scored:
        return
    result = curve_of(scored)
    labelled = "label" in result["curve"][1]
    write_text(out.with_suffix(".curve.json"), json.dumps(result, indent=1) + "\n")
    drawn = report.picture(out.with_suffix(".curve.png"), report.best_of_plot, result["curve"])
    report.print_curve(out, result, scored, top_of(scored) if labelled else None, drawn)


def reasons_of(rows):
    """Why candidates have no score → Counter."""
    return collections.Counter(reason for row in rows for reason in row.get("reasons", [])
                               if reason)


def with_scores(row):
    """A row of candidates → the same without those that have no score."""
    scored = [place for place, score in enumerate(row["scores"]) if score is not None]
    columns = [name for name in ("candidates", "scores", "labels", "outside") if name in row]
    return {**row, **{name: [row[name][place] for place in scored] for name in columns}}


def ranking_of(scores):
    """Places from the best score to the worst, the first of equal ones first; None comes last."""
    return sorted(range(len(scores)),
                  key=lambda place: math.inf if scores[place] is None else -scores[place])


def best_of(row):
    """The candidate with the highest score; None where none has one."""
    first = ranking_of(row["scores"])[0]
    return None if row["scores"][first] is None else row["candidates"][first]


def are_scores(values, count):
    """Is it a list of so many numbers, or None where a candidate has no score?"""
    if not isinstance(values, list) or len(values) != count:
        return False
    numbers = [value for value in values if value is not None]
    return are_numbers(numbers, len(numbers))


# ---------------------------------------------------------------- sample

def sample(args):
    """Sample n candidates a prompt and score them; goes on where a killed call stopped."""
    reward_meta = read_meta(args.reward, "03_train_head.py")
    policy_name = args.policy or args.model or reward_meta["model"]
    tokenizer = load_tokenizer(policy_name, revision_of(policy_name, reward_meta))
    prompts = prompts_to_sample(args, tokenizer)
    made_with = {"policy": policy_name, "reward": file_hash(args.reward),
                 "models": identity_of_models(args, policy_name, reward_meta),
                 "settings": {name: getattr(args, name) for name in SAMPLING}}
    out = beside_the_head(args, "candidates.jsonl")
    part = out.with_suffix(".jsonl.part")

    rows = finished_rows(out, made_with) | finished_rows(part, made_with)
    if out.exists() and not rows:
        print(f"note: {out} is replaced: it was made with another model, head or settings")
    passes = groups_of(prompts, max(1, args.batch_rows // args.n))
    missing = [some for some in passes if any(json.dumps(prompt) not in rows for prompt in some)]
    if missing:                             # whole passes, so that the numbers are the same bytes
        rows |= sample_missing(args, missing, made_with, reward_meta, part)
    rows = [rows[json.dumps(prompt)] for prompt in prompts]
    write_rows(out, rows)
    part.unlink(missing_ok=True)
    finish(out, rows)


def prompts_to_sample(args, tokenizer):
    """The prompts that the policy's chat template takes; the others are named."""
    prompts, reasons = read_prompts(args.prompts, functools.partial(prompt_ids, tokenizer))
    if reasons:
        where, reason = next(iter(reasons.items()))
        print(f"note: {len(reasons)} rows are left out, the first because: {reason} ({where})")
    return prompts[:args.limit]


def identity_of_models(args, policy_name, reward_meta):
    """A hash of policy and reward backbone: a policy that is trained further is another one."""
    backbone_name = args.model or reward_meta["model"]
    policy = identity(policy_name, revision_of(policy_name, reward_meta), args.dtype, args.device)
    if policy_name == backbone_name:
        return policy
    revision = revision_of(backbone_name, reward_meta)
    return f"{policy} {identity(backbone_name, revision, reward_meta['dtype'], args.device)}"


def revision_of(name, reward_meta):
    """The revision of the reward's recorded backbone; of another model there is none."""
    return reward_meta["revision"] if name == reward_meta["model"] else None


def finished_rows(path, made_with):
    """What an earlier call with the same settings has written → {prompt as JSON: row}."""
    rows = {}
    if not path.exists():
        return rows
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:                  # the line a kill cut short
            continue
        if is_finished(row, made_with):
            rows[json.dumps(row["prompt"])] = row
    return rows


def is_finished(row, made_with):
    """Is this a whole row of candidates, made with these settings?"""
    if not isinstance(row, dict) or not {"prompt", "candidates", "best"} <= set(row):
        return False
    if not are_scores(row.get("scores"), made_with["settings"]["n"]):
        return False
    return all(row.get(name) == value for name, value in made_with.items())


def sample_missing(args, passes, made_with, reward_meta, part):
    """Sample and score these passes of prompts, rows appended to `part` at once → {prompt: row}."""
    policy, reward = open_models(args, made_with["policy"], reward_meta)
    check_prompts(policy, itertools.chain(*passes), args.max_new_tokens)
    read_off = args.score and reward.backbone is policy
    layer = reward_meta["layer"] if read_off and reward_meta["token"] == "mean" else None
    rows = {}
    reasons = collections.Counter()
    part.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(unit="tok", desc="sample", disable=None)
    with bar, named_in_errors(part), open(part, "a", encoding="utf-8") as file:
        file.write("\n")                    # ends a line that a kill cut short
        for some in passes:
            texts, sampled = sample_candidates(policy, some, **made_with["settings"], layer=layer,
                                               progress=bar.update)
            prompt_of_row = [prompt for prompt in some for _ in range(args.n)]
            if read_off:
                *scored, why = score_sampled(reward, prompt_of_row, texts, sampled)
                reasons += why
            else:
                scored = reward.score_each(prompt_of_row, texts)
            for number, prompt in enumerate(some):
                own = slice(number * args.n, (number + 1) * args.n)
                row = {"prompt": prompt, "candidates": texts[own]}
                add_scores(row, [column[own] for column in scored])
                row |= {"best": best_of(row), **made_with}
                rows[json.dumps(prompt)] = row
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    if read_off:
        tell_share_read_off(len(rows) * args.n, reasons)
    return rows


def check_prompts(policy, prompts, max_new_tokens):
    """Refuse a prompt that leaves no room for its answer among the policy's positions."""
    for prompt in prompts:
        length = len(prompt_ids(policy.tokenizer, prompt)) + max_new_tokens
        check_length(length, policy.model.config, policy.meta["model"])


def groups_of(items, size):
    """A list → its parts of at most `size`."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def add_scores(row, scored):
    """Add scores, outside and, where a candidate has no score, reasons to a row. In place."""
    row["scores"], row["outside"], reasons = scored
    row.pop("reasons", None)
    if any(reasons):
        row["reasons"] = reasons


def tell_share_read_off(candidates, reasons):
    """How many rewards were read off the sampling, and why the others were not."""
    share = 1 - reasons.total() / candidates
    others = ", ".join(f"{n} ({reason})" for reason, n in reasons.most_common()) or "none"
    print(f"scored while sampling: {share:.1%} of {candidates} candidates")
    print(f"scored the ordinary way: {others}")


def open_models(args, policy_name, reward_meta):
    """→ (Backbone to sample from, RewardModel): one language model for both where they agree."""
    backbone_name = args.model or reward_meta["model"]
    policy = stage1.load_backbone(policy_name, revision_of(policy_name, reward_meta),
                                  dtype=args.dtype, device=args.device)
    check_weights(policy)                       # all of them: it writes
    shared = policy if policy_name == backbone_name else args.model
    return policy, stage3.RewardModel.load(args.reward, model=shared, device=args.device)


def beside_the_head(args, name):
    """--out, or a file of this name beside the reward head."""
    return Path(args.out or Path(args.reward).parent / name)


# ---------------------------------------------------------------- rank

def rank(args):
    """Score candidates of any engine and put them in order."""
    rows = read_candidates(args.candidates)
    reward = stage3.RewardModel.load(args.reward, model=args.model, device=args.device)
    score_candidates(rows, reward, file_hash(args.reward))
    if all(row["scores"].count(None) == len(row["scores"]) for row in rows):
        raise UserError(f"no candidate can be scored ({in_words(reasons_of(rows))}) · "
                        f"{args.candidates} · mend them, or run stage 1 with another --max-length")
    for row in rows:
        row["ranking"] = ranking_of(row["scores"])
        row["best"] = best_of(row)
    out = beside_the_head(args, Path(args.candidates).with_suffix(".ranked.jsonl").name)
    write_rows(out, rows)
    finish(out, rows)


def score_candidates(rows, reward, head):
    """Score the candidates of all rows, see add_scores. In place."""
    readable = [row for row in rows if "unreadable" not in row]
    prompts = [row["prompt"] for row in readable for _ in row["candidates"]]
    texts = [text for row in readable for text in row["candidates"]]
    columns = reward.score_each(prompts, texts)
    done = 0
    for row in readable:
        own = slice(done, done + len(row["candidates"]))
        add_scores(row, [column[own] for column in columns])
        done = own.stop
    for row in rows:
        row["reward"] = head                        # `sample` may have left that of another head
        reason = row.pop("unreadable", None)
        if reason:
            n = len(row["candidates"])
            add_scores(row, [[None] * n, [None] * n, [reason] * n])


# ---------------------------------------------------------------- pairs

def pairs(args):
    """Preference pairs for DPO: best against worst candidate, or existing pairs, filtered."""
    if bool(args.candidates) == bool(args.filter):
        raise UserError("either candidates or pairs are needed · pairs · "
                        "pass --candidates FILE or --filter FILE")
    reward = stage3.RewardModel.load(args.reward, model=args.model, device=args.device)
    if args.filter:
        rows = list(existing_pairs(args.filter, reward, args.label))
    else:
        rows = list(best_and_worst(read_candidates(args.candidates), reward,
                                   file_hash(args.reward)))
    if not rows:
        raise UserError(f"no pairs · {args.filter} · rows need {ACCEPTED}")
    notes = collections.Counter(note for row in rows for note in row.pop("notes", ()))
    tell_notes(notes, "pairs")

    for row in rows:
        if args.plain and "reason" not in row and not isinstance(row["prompt"], str):
            row["reason"] = "the prompt is messages, --plain writes strings"
    score_rows([row for row in rows if "reason" not in row], reward, args.min_margin)
    if not args.plain:
        for row in rows:
            write_as_messages(row)

    kept = [row for row in rows if "reason" not in row]
    dropped = [row for row in rows if "reason" in row]
    out = beside_the_head(args,
                          Path(args.filter or args.candidates).with_suffix(".pairs.jsonl").name)
    write_rows(out, kept)
    write_rows(out.with_suffix(".dropped.jsonl"), dropped)
    print(f"\n{len(kept)} pairs kept, {len(dropped)} dropped")
    outside = sum(bool(row["outside"]) for row in kept)
    if outside:
        print(f"{outside} of those kept hold a text outside of what the head was trained on: "
              "a guess")
    print(f"written {out}, {out.with_suffix('.dropped.jsonl')}")
    print(f"\nnext: datasets.load_dataset('json', data_files='{out}') → trl.DPOTrainer")


def score_rows(rows, reward, min_margin):
    """Add both scores and the margin to each row, and a reason where the margin is too small."""
    prompts = [row["prompt"] for row in rows]
    chosen = reward.score(prompts, [row["chosen"] for row in rows], check=True)
    rejected = reward.score(prompts, [row["rejected"] for row in rows], check=True)
    columns = zip(rows, *chosen, *rejected)
    for row, score_chosen, outside_chosen, score_rejected, outside_rejected in columns:
        margin = score_chosen - score_rejected
        row |= {"score_chosen": score_chosen, "score_rejected": score_rejected, "margin": margin,
                "outside": outside_chosen or outside_rejected}
        if margin <= 0:
            row["reason"] = "the rejected side scores as high or higher"
        elif margin < min_margin:
            row["reason"] = f"margin below {min_margin}"


def write_as_messages(row):
    """Texts of a row → conversations of one turn, as TRL's chat templates want them."""
    if not all(isinstance(row.get(side), str) for side in ("chosen", "rejected")):
        return
    if isinstance(row["prompt"], str):
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    for side in ("chosen", "rejected"):
        row[side] = [{"role": "assistant", "content": row[side]}]


def existing_pairs(path, reward, label=None):
    """Pairs of any layout → rows {id, prompt, chosen, rejected}, or with a reason against it."""
    tokenizer = reward.backbone.tokenizer
    for n, (where, raw) in enumerate(read_rows(path)):
        found, reasons = usable_pairs(tokenizer, raw, label, reward.meta["max_length"],
                                      first=None if n else where)
        name = raw.get("id") if isinstance(raw, dict) else None
        if name is None:
            name = where.rpartition(":")[2]             # the line of the file
        for reason in reasons:
            yield {"id": name, "reason": reason,
                   "row": as_written(raw)}
        for pair in found:
            yield {"id": name, "prompt": pair.prompt, "chosen": pair.chosen,
                   "rejected": pair.rejected, "notes": pair.notes}


def text_alone(prompt, candidate):
    """The text of a candidate; None where messages stand before it, which a pair cannot hold."""
    try:
        whole_prompt, text = with_last_turn(prompt, candidate)
    except Unreadable:
        return None
    return text if whole_prompt == prompt else None


def best_and_worst(rows, reward, head):
    """Candidates → rows {id, prompt, chosen: the best scored, rejected: the worst}."""
    unscored = [row for row in rows if row.get("reward") != head
                or not are_scores(row.get("scores"), len(row["candidates"]))]
    if unscored:
        score_candidates(unscored, reward, head)
    for n, row in enumerate(rows):
        texts = [text_alone(row["prompt"], candidate) for candidate in row["candidates"]]
        score_of = {text: score for text, score in zip(texts, row["scores"])
                    if text is not None and score is not None}
        if len(score_of) < 2:
            why = next((reason for reason in row.get("reasons", []) if reason), None)
            reason = "fewer than two different candidates that have a score"
            yield {"id": str(n), "prompt": row["prompt"],
                   "reason": f"{reason} ({why})" if why else reason}
            continue
        yield {"id": str(n), "prompt": row["prompt"], "chosen": max(score_of, key=score_of.get),
               "rejected": min(score_of, key=score_of.get)}


# ---------------------------------------------------------------- export

# an exported folder is compared with its head on these: short and long, a system turn, more turns
CHECK_CONVERSATIONS = [
    ("Is water wet?", "Yes."),
    ("Name a colour.", "The sky on a clear day at noon is blue, and the grass below it is green."),
    ([{"role": "system", "content": "Answer in one word."},
      {"role": "user", "content": "Is ice cold?"}], "Cold."),
    ([{"role": "user", "content": "Count to three."}, {"role": "assistant", "content": "1, 2, 3."},
      {"role": "user", "content": "And on?"}], "4, 5, 6, 7, 8 …"),
    ("Why is the sky dark at night, although there are so many stars in every direction?", "No."),
]
# how far the logits may be from the head's rewards, in std of these: half precision rounds by 0.06
# on the demo model, and the rewards of another model are about 1 away
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}


def export(args):
    """Write the reward as a sequence classifier: a folder that other tools load without our code.
    """
    meta = read_meta(args.reward, "03_train_head.py", "head")
    check_exportable(args.reward, meta)
    check_free(args.out)
    reward = stage3.RewardModel.load(args.reward, model=args.model, device=args.device)
    check_weights(reward.backbone, meta["layer"])

    dtype = getattr(torch, meta["dtype"] if args.dtype == "auto" else args.dtype)
    u, c = reward.vector()
    model = sequence_classifier(reward.backbone, meta["layer"], u, meta["norm_eps"], dtype)
    vocabulary_size = model.get_input_embeddings().num_embeddings
    tokenizer = exported_tokenizer(reward.backbone.tokenizer, vocabulary_size, meta["max_length"],
                                   meta["model"])
    model.config.pad_token_id = tokenizer.pad_token_id
    card = model_card(facts_of(args, reward, c), tokenizer)

    with folder_moved_into_place(args.out) as folder:
        save_classifier(folder, model, tokenizer, card)
        distance = distance_from_head(folder, reward, c)
        limit = max(TOLERANCE[dtype], TOLERANCE[reward.backbone.model.dtype])
        if not distance < limit:                    # nan too
            raise UserError(f"the exported model gives other rewards ({distance:.1e} of their std "
                            f"apart) · {meta['model']} in {dtype} · try --dtype float32; if that "
                            "is refused too, use RewardModel")
    report_export(args, reward, model, c, distance)


def check_exportable(path, meta):
    """Refuse a head that the form of a sequence classifier cannot hold; say how to make one."""
    wrong = []
    if meta["token"] != "last":
        wrong.append(f"it reads rule {meta['token']}")
    if meta["normalise"] != "rms":
        wrong.append("it reads z as it is")
    if meta["settings"]["kind"] != "linear":
        wrong.append("it is an MLP")
    if wrong:
        raise UserError("a sequence classifier holds a linear head on the last token and z / rms; "
                        f"of this head: {', '.join(wrong)} · {path} · make one beside it: "
                        f"{how_to_make_one(path, meta)}")


def how_to_make_one(path, meta):
    """What to run for a head that `export` takes, from the activations of this one's run → str."""
    folder = Path(path).parent
    runs = [run for run in (folder, folder.parent) if (run / "activations").is_dir()]
    run = runs[0] if runs else "RUN"
    layer = str(meta["layer"])
    name = "export" if folder.name != "export" else "export-rms"
    k_sae = ["--k-sae", str(meta["k_sae"])] if meta["k_sae"] else []
    commands = [
        ["02_select_features.py", "--run", str(run), "--sae", meta["sae"], *k_sae, "--layer", layer,
         "--token", "last", "--normalise", "rms", "--name", name],
        ["03_train_head.py", "--run", str(run), "--name", name],
    ]
    text = " && ".join(f"python {shlex.join(command)}" for command in commands)
    if not list(Path(run).glob(f"activations/layer{layer}-last-*")):
        text = f"the command of stage 1 again with --token mean last, then {text}"
    return text


def distance_from_head(folder, reward, c):
    """How far an exported folder's logits are from reward - c, in std of the rewards → float."""
    conversations = []
    texts = []
    for conversation in CHECK_CONVERSATIONS:
        try:                            # without max_length: the folder cuts nothing either
            texts.append(render(reward.backbone.tokenizer, *conversation))
            conversations.append(conversation)
        except Unreadable:              # a template of one turn, for example
            continue
    wanted = reward.reward_of(reward.read(texts)) - c
    found = logits_of_folder(folder, conversations)
    return float((found - wanted).abs().max() / wanted.std())


def report_export(args, reward, model, c, distance):
    """The lines at the end."""
    family = type(model).__name__
    dtype = str(model.dtype).removeprefix("torch.")
    blocks = reward.meta["layer"] + 1
    all_blocks = len(reward.backbone.blocks)
    whole = reward.meta["parameters"]
    kept = sum(parameter.numel() for parameter in model.parameters())
    card = Path(args.out) / "README.md"

    print(f"\n{family}, {blocks} of {all_blocks} blocks, {kept:,} of {whole:,} parameters "
          f"({kept / whole:.0%}), {dtype}")
    print(f"its logit is reward - c, c = {c:.6g}; on a few texts it was at most {distance:.1e} of "
          "the rewards' std away")
    print(f"written {args.out}, how to use it: {card}")
    print("\nnext: transformers.AutoModelForSequenceClassification.from_pretrained("
          f"{str(args.out)!r})")


LOSSES = {"bt": "Bradley-Terry", "margin": "margin", "bce": "binary cross-entropy"}


def facts_of(args, reward, c):
    """What the model card says → dict. Names, no paths: the folder is passed on."""
    meta = reward.meta
    name = demo_file() if meta["model"] == "demo" else meta["model"]
    # what tells the files of a hub's model is its commit
    is_of_hub = re.fullmatch("[0-9a-f]{40}", str(meta.get("files")))
    revision = f" at {meta['revision']}" if meta["revision"] else ""
    licence = licence_of(name, meta["revision"]) or (licence_of(args.model) if args.model else None)
    return {
        "backbone": (name if is_of_hub else Path(name).name) + revision,
        "hub_name": name if is_of_hub else None,
        "licence": licence,
        "layer": meta["layer"],
        "blocks": len(reward.backbone.blocks),
        "sae": meta["sae"] if meta["sae"].startswith("hub:") else Path(meta["sae"]).name,
        "directions": 2 * meta["k"],
        "loss": LOSSES[meta["settings"]["loss"]],
        "pairs_sha256": meta["parent"]["pairs"],
        "head_sha256": file_hash(args.reward),
        "max_length": meta["max_length"],
        "constant": c,
        "temperature": reward.temperature,
        **evaluation_in_words(args.reward, meta),
    }


VERDICT_IS_OF = ("By {folds} folds over all pairs, which test the way it was made more than this "
                 "one head (K: directions kept on each side; z: the hidden state; dense head: one "
                 "that reads all of z):")


def evaluation_in_words(path, meta):
    """What stage 4 found of this head, or else what training did → {sources, accuracy, verdict}."""
    found = evaluation_of(path)
    words = {"sources": "", "accuracy": "not measured",
             "verdict": "It was not evaluated (stage 4) before it was exported."}
    if meta["accuracy_out_of_fold"] is not None:
        words["accuracy"] = (f"{meta['accuracy_out_of_fold']:.3f} of the training pairs, "
                             "cross-validated")
    if found:
        words["sources"] = ", ".join(found["run"]["sources"]) + ": "
        sentences = "\n".join(f"* {sentence}" for sentence in found["verdict"])
        basis = VERDICT_IS_OF.format(folds=found["run"]["folds"])
        words["verdict"] = f"{basis}\n\n{sentences}"
        test = found["test"]
        if test and test["low"] is not None:
            words["accuracy"] = (f"{test['accuracy']:.3f} [{test['low']:.3f}, {test['high']:.3f}] "
                                 f"of {test['n']} test pairs ({test['groups']} prompts; 95 % "
                                 "interval)")
    return words


def evaluation_of(path):
    """The evaluation of this head beside it; None: none, damaged, or of another head."""
    found = stage4.whole_evaluation(Path(path).parent / "evaluation.json")
    return found if found and found["parent"].get("head") == file_hash(path) else None


# ---------------------------------------------------------------- the stage

def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    add_sample_flags(add_command(
        commands, "sample", "sample n candidates a prompt, score them, keep the best",
        "python 05_best_of_n.py sample --reward HEAD --prompts data/prompts.jsonl --n 8"))
    add_rank_flags(add_command(
        commands, "rank", "score and order candidates of any engine",
        "python 05_best_of_n.py rank --reward HEAD --candidates my-candidates.jsonl"))
    add_pairs_flags(add_command(
        commands, "pairs", "preference pairs for DPO",
        "python 05_best_of_n.py pairs --reward HEAD --filter my-pairs.jsonl --min-margin 0.5"))
    add_export_flags(add_command(
        commands, "export", "a folder for AutoModelForSequenceClassification, TRL, vLLM …",
        "python 05_best_of_n.py export --reward HEAD --out my-reward-model"))
    args = p.parse_args()
    if args.command == "sample":
        check_sampling(args)
    return args


def add_command(commands, name, says, example):
    """A command with the flags that all commands share."""
    p = commands.add_parser(name, help=says, description=f"{says}\n\n    {example}",
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reward", required=True,
                   help="reward_head.safetensors of stage 3")
    p.add_argument("--device", default="auto",
                   help="cpu, cuda, … (default auto)")
    p.add_argument("--model",
                   help="another copy of the reward's backbone")
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")
    return p


def add_out_flag(p):
    """Where a command writes its rows."""
    p.add_argument("--out",
                   help="file to write, .jsonl (default: beside the head, named after the input)")


def add_sample_flags(p):
    """The flags of `sample`."""
    add_out_flag(p)
    p.add_argument("--prompts", required=True,
                   help="JSONL with prompt")
    p.add_argument("--policy",
                   help="model to sample from (default: the reward's backbone)")
    p.add_argument("--n", type=int, default=16,
                   help="candidates a prompt (default 16)")
    p.add_argument("--temperature", type=float, default=1.0,
                   help="0: greedy (default 1.0)")
    p.add_argument("--top-p", type=float, default=0.95,
                   help="nucleus mass (default 0.95)")
    p.add_argument("--max-new-tokens", type=int, default=128,
                   help="tokens an answer, at most (default 128)")
    p.add_argument("--seed", type=int, default=0,
                   help="(default 0)")
    p.add_argument("--score", action=argparse.BooleanOptionalAction, default=True,
                   help="read the reward off the sampling where the policy is the backbone "
                        "(default), or score in a pass of its own")
    p.add_argument("--batch-rows", type=int, default=64,
                   help="answers sampled at once: several prompts share a pass (default 64)")
    p.add_argument("--limit", type=int,
                   help="only the first N prompts")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="of the policy, and of the reward if it is the same model (default auto)")


def add_rank_flags(p):
    """The flags of `rank`."""
    add_out_flag(p)
    p.add_argument("--candidates", required=True,
                   help="JSONL: prompt, candidates[, labels], or prompt, response[, id]")


def add_pairs_flags(p):
    """The flags of `pairs`."""
    add_out_flag(p)
    p.add_argument("--candidates",
                   help="candidates: best against worst")
    p.add_argument("--filter",
                   help="existing pairs: drop those that the reward ranks the other way")
    p.add_argument("--min-margin", type=float, default=0.0,
                   help="least difference of the two scores (default 0)")
    p.add_argument("--label", choices=("safer", "better"),
                   help="for --filter on PKU-SafeRLHF")
    p.add_argument("--plain", action="store_true",
                   help="strings instead of messages (TRL then applies no chat template)")


def add_export_flags(p):
    """The flags of `export`."""
    p.add_argument("--out", required=True,
                   help="new folder to write")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                   help="of the weights (default auto: as the head was trained)")


def check_sampling(args):
    """Refuse numbers that cannot be meant."""
    counts = [args.n, args.max_new_tokens,
              args.batch_rows] + ([] if args.limit is None else [args.limit])
    if min(counts) < 1 or not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise UserError(f"out of range · --n {args.n} --max-new-tokens {args.max_new_tokens} "
                        f"--batch-rows {args.batch_rows} --temperature {args.temperature} "
                        f"--top-p {args.top_p} --limit {args.limit} · counts from 1, temperature "
                        "from 0, top-p above 0 and at most 1")


COMMANDS = {"sample": sample, "rank": rank, "pairs": pairs, "export": export}


def main():
    """Stage 5 from the command line."""
    args = parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_main(main)
