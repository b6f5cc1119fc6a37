"""Random bytes and values in the place of what a user or a killed machine left: an answer or one line, never a traceback.

SPARSERM_FAULTS=all: 2,000 cases, otherwise a tenth; -s prints what came of them. A line that begins with "unexpected" says that a
check is missing: no more than a few in a hundred of the damaged files may end so, and none of the data files.
"""

import collections
import contextlib
import csv
import gzip
import importlib
import io
import json
import os
import random
import re
import shutil

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import SAEError

stage1, stage3, stage5 = (importlib.import_module(n) for n in ("01_extract", "03_train_head", "05_best_of_n"))
SHARE = 1 if os.environ.get("SPARSERM_FAULTS") == "all" else 0.1
TABLE = collections.defaultdict(collections.Counter)


def cases(number):
    return settings(max_examples=round(number * SHARE))


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("", *(f"{name:<24} {', '.join(f'{what} {n}' for what, n in counts.items())}" for name, counts in TABLE.items()), sep="\n")


# ---------------------------------------------------------------- the readers

NAMES = st.sampled_from("prompt chosen rejected question mc1_targets mc2_targets response_0 response_1 safer_response_id choices labels "
                        "id category role content candidates response scores text messages".split())
TEXT = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "\ud800", "\x00", "<|im_end|>", "\n\nHuman: a\n\nAssistant: b", '[{"role',
                                                        "🦦", "user", "assistant", "system", "\u2028", "9" * 30]))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT), lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.one_of(NAMES, TEXT), inner, max_size=4)), max_leaves=12)
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT}), max_size=4)
ANY = st.one_of(TEXT, TURNS, VALUES)
row = lambda names, **more: st.fixed_dictionaries({**dict.fromkeys(names.split(), ANY), **more})
ROWS = st.one_of(row("prompt chosen rejected"), row("chosen rejected"), row("question mc1_targets"), row("prompt response"),
                 row("question", mc2_targets=row("choices labels")), row("prompt response_0 response_1", safer_response_id=VALUES),
                 row("prompt", candidates=st.lists(ANY, max_size=3)), st.dictionaries(NAMES, ANY, max_size=5), VALUES)


def read_all(path):
    """What stage 1 and stage 5 do with the rows of a file."""
    tokenizer = tiny.make_tokenizer()
    for where, row in stage1.read_rows(path):
        found, reasons = stage1.usable_pairs(tokenizer, row, "safer", 200)
        assert all(isinstance(r, str) and r for r in reasons)
        for made in stage1.pair_rows(row, where, found, SETTINGS, [0.7, 0.1, 0.2]):
            json.loads(json.dumps(made))
            assert made["prompt"] and made["chosen"].strip() and made["rejected"].strip() and made["split"] in stage1.SPLITS


SETTINGS = type("Args", (), {"seed": 0, "pairs": "p.jsonl"})


def judge(kind, call):
    """Only a UserError of three parts may come."""
    try:
        call()
        TABLE[kind]["read"] += 1
    except stage1.UserError as error:
        text = " ".join(str(error).split())
        assert text.count(" · ") >= 2, text
        TABLE[kind]["refused in one line"] += 1


@cases(700)
@given(st.lists(ROWS, max_size=4), st.sampled_from(["jsonl", "json", "csv", "jsonl.gz"]))
def test_rows_of_any_values_are_pairs_reasons_or_one_line(tmp_path_factory, rows, form):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{form}"
    if form == "csv":
        with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
            table = csv.writer(file)
            for row in rows:
                if isinstance(row, dict):
                    table.writerows([list(row), [v if isinstance(v, str) else json.dumps(v) for v in row.values()]])
    else:
        data = (json.dumps(rows) if form == "json" else "".join(json.dumps(row) + "\n" for row in rows)).encode()
        path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    judge("rows of any values", lambda: read_all(path))
    for read in (stage5.read_prompts, stage5.read_candidates):
        judge("prompts, candidates", lambda read=read: read(path))


GOOD = "".join(json.dumps(row) + "\n" for row in tiny.make_pairs(3)).encode()
FORMS = {"jsonl": GOOD, "json": b"[" + b",".join(GOOD.splitlines()) + b"]", "jsonl.gz": gzip.compress(GOOD),
         "json.gz": gzip.compress(b"[{}]"), "csv": b'prompt,chosen,rejected\n"a\nb",c,d\n"e""f",g,h\n'}


def damaged(data, rng):
    """Some bytes flipped, cut, doubled, or replaced by noise."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1) if data else 0
        kind = rng.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 2:
            del data[at:at + rng.randrange(1, 40)]
        elif data and kind >= 3:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(data)


@cases(500)
@given(st.sampled_from(sorted(FORMS)), st.integers(0, 2**32))
def test_damaged_data_files_are_read_or_refused_in_one_line(tmp_path_factory, form, seed):
    path = tmp_path_factory.getbasetemp() / f"damaged.{form}"
    path.write_bytes(damaged(FORMS[form], random.Random(seed)))
    judge("damaged data files", lambda: read_all(path))


# ---------------------------------------------------------------- what the stages leave

@pytest.fixture(scope="module")
def done(finished, tmp_path_factory):
    """A run with all stages done: its folder, and the commands that read each file."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("fuzz") / "run")
    rows = tiny.save_rows(run.parent / "prompts.jsonl", [{"prompt": f"Is water wet, case {i}?"} for i in range(2)])
    sample = ["05_best_of_n", "sample", "--reward", run / "reward_head.safetensors", "--prompts", rows, "--n", 2, "--max-new-tokens", 3]
    evaluate = ["04_evaluate", "--run", run, "--texts", 0, "--seeds", 1, "--sweeps", "none"]
    model, pairs, sae = (finished.parent / name for name in ("model", "pairs.jsonl", "sae.safetensors"))
    first = ["01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", run]
    select = ["02_select_features", "--run", run, "--sae", sae, "--k", 8]
    train = ["03_train_head", "--run", run, "--seeds", 2, "--epochs", 60]
    patch = pytest.MonkeyPatch()                    # time is not what is tested here
    patch.setattr(importlib.import_module("04_evaluate").bootstrap, "__defaults__", (20, 0))
    patch.setattr(importlib.import_module("parts.report"), "picture", lambda *_: None)
    for line in (sample, evaluate):
        assert call(*line)[0] == 0
    rank = ["05_best_of_n", "rank", "--reward", run / "reward_head.safetensors", "--candidates", run / "candidates.jsonl",
            "--out", run / "ranked.jsonl"]
    yield run, {"pairs.jsonl": [select, evaluate], "activations/layer1-00000-of-00001.safetensors": [first, select],
                 "features.safetensors": [select, train, evaluate], "reward_head.safetensors": [train, rank, evaluate],
                 "evaluation.json": [evaluate], "candidates.jsonl": [sample, rank]}
    patch.undo()


def call(script, *words):
    """tiny.command with the modules as they are in this process."""
    module, out, err = importlib.import_module(script), io.StringIO(), io.StringIO()
    with tiny.argv(*words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            stage1.run_main(module.main, SAEError)
            return 0, out.getvalue(), err.getvalue()
        except SystemExit as stop:
            return stop.code, out.getvalue(), err.getvalue()


@cases(800)
@given(data=st.data())
def test_a_command_given_a_damaged_file_of_the_run_ends_well_or_in_one_line(done, data):
    run, readers = done
    file = data.draw(st.sampled_from(sorted(readers)))
    line = data.draw(st.sampled_from(readers[file]))
    whole = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    before = whole[run / file]
    if file.endswith("safetensors") and rng.random() < 0.8:     # most of such a file is numbers, which no header protects
        size = 8 + int.from_bytes(before[:8], "little")
        (run / file).write_bytes(damaged(before[:size], rng) + before[size:])
    else:
        (run / file).write_bytes(damaged(before, rng))
    try:
        code, _, err = call(*line)
        said = err.replace("\n", "", 1)
        assert code in (0, 2) and "Traceback" not in err
        assert code == 0 or re.fullmatch(r"error: .+ · .+ · .+", said), (file, line[0], err)
        TABLE["damaged run files"]["went on" if code == 0 else "unexpected" if "unexpected" in err else "refused in one line"] += 1
        if "unexpected" in err:
            TABLE[f"  {file.rpartition('/')[2]} · {line[0]}"][err[:150]] += 1
    finally:
        for path in run.rglob("*"):
            if path.is_file() and path not in whole:
                path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)


def test_hardly_any_damage_ends_in_a_line_that_no_check_wrote():
    counts = TABLE["damaged run files"]
    assert counts["unexpected"] <= 0.03 * counts.total() + 1, TABLE
