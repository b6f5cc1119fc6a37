"""Random bytes and values in the place of what a user or a killed machine left.

Valid data comes back as it was written; of anything else there is an answer or one line, never a
traceback. A line that begins with "unexpected" says that a check is missing.

SPARSERM_FAULTS=all: 2,600 cases, otherwise a tenth; -s prints what came of them.
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
import zlib
from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from parts import candidates, report, rows, statistics
from parts.files import UserError, run_main
from sae import SAEError

stage1 = importlib.import_module("01_extract")
SHARE = 1 if os.environ.get("SPARSERM_FAULTS") == "all" else 0.1
TABLE = collections.defaultdict(collections.Counter)


def number_of(cases):
    """How many of them are tried."""
    return round(cases * SHARE)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    for title, counts in TABLE.items():
        print(f"\n{title:<24} {', '.join(f'{what} {n}' for what, n in counts.items())}", end="")
    print()


# ---------------------------------------------------------------- the readers

SETTINGS = SimpleNamespace(seed=0, pairs="p.jsonl", split="0.7,0.1,0.2")     # of stage 1
FORMS = ("jsonl", "json", "csv", "jsonl.gz", "json.gz")


def write_form(path, form, table):
    """Rows → a file of this form. csv: a cell that is no text is JSON."""
    if form == "csv":
        with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.writer(file)
            header = None
            for row in table:
                if isinstance(row, dict):
                    if list(row) != header:
                        header = list(row)
                        writer.writerow(header)
                    cells = [v if isinstance(v, str) else json.dumps(v) for v in row.values()]
                    writer.writerow(cells)
        return
    if form.startswith("jsonl"):
        data = "".join(json.dumps(row) + "\n" for row in table).encode()
    else:
        data = json.dumps(table).encode()
    path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)


def read_pairs(path):
    """What stage 1 makes of the rows of a file → [(prompt, chosen, rejected)]."""
    tokenizer = tiny.make_tokenizer()
    found = []
    for n, (where, raw) in enumerate(rows.read_rows(path)):
        first = None if n else where
        pairs, reasons = rows.usable_pairs(tokenizer, raw, "safer", 200, first)
        assert all(isinstance(reason, str) and reason for reason in reasons)
        for pair in pairs:
            made = stage1.pair_row(raw, where, pair, SETTINGS)
            assert json.loads(json.dumps(made)) == made
            assert made["split"] in stage1.SPLITS
            found.append((made["prompt"], made["chosen"], made["rejected"]))
    return found


def judged(kind, read, path):
    """What was read, or None where it was refused; only a UserError of three parts may come."""
    try:
        found = read(path)
    except UserError as error:
        text = " ".join(str(error).split())
        assert text.count(" · ") >= 2, text
        TABLE[kind]["refused in one line"] += 1
        return None
    TABLE[kind]["read"] += 1
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the files of one case are written over those of the last."""
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------- valid data

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
TRIPLES = st.lists(st.tuples(WORDS, WORDS, WORDS).filter(lambda t: t[1] != t[2]),
                   min_size=1, max_size=4)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def explicit(p, a, b):
    return {"prompt": p, "chosen": a, "rejected": b}, (p, a, b)


def messages(p, a, b):
    row = {"prompt": user(p), "chosen": assistant(a), "rejected": assistant(b)}
    return row, (user(p), a, b)


def conversations(p, a, b):
    row = {"chosen": user(p) + assistant(a), "rejected": user(p) + assistant(b)}
    return row, (user(p), a, b)


def truthful_qa(p, a, b):
    return {"question": p, "mc1_targets": {"choices": [b, a], "labels": [0, 1]}}, (p, a, b)


def safe_rlhf(p, a, b):
    return {"prompt": p, "response_0": b, "response_1": a, "safer_response_id": 1}, (p, a, b)


# a layout: (prompt, chosen, rejected) → (its row, the pair that stage 1 makes of it)
LAYOUTS = [explicit, messages, conversations, truthful_qa, safe_rlhf]


@settings(max_examples=number_of(600))
@given(triples=TRIPLES, layout=st.sampled_from(LAYOUTS), form=st.sampled_from(FORMS))
def test_valid_pairs_come_back_as_they_were_written(folder, triples, layout, form):
    if form == "csv":
        layout = explicit               # the cells of a table hold texts
    made = [layout(*triple) for triple in triples]
    path = folder / f"valid.{form}"
    write_form(path, form, [row for row, _ in made])
    assert read_pairs(path) == [pair for _, pair in made]


@settings(max_examples=number_of(100))
@given(prompts=st.lists(WORDS, min_size=1, max_size=4, unique=True), form=st.sampled_from(FORMS))
def test_valid_prompts_come_back_as_they_were_written(folder, prompts, form):
    path = folder / f"prompts.{form}"
    write_form(path, form, [{"prompt": prompt} for prompt in prompts])
    assert candidates.read_prompts(path) == (prompts, {})


@settings(max_examples=number_of(100))
@given(table=st.lists(st.fixed_dictionaries(
    {"prompt": WORDS, "candidates": st.lists(WORDS, min_size=1, max_size=3)}),
    min_size=1, max_size=4, unique_by=lambda row: row["prompt"]),
    form=st.sampled_from(["jsonl", "json", "jsonl.gz", "json.gz"]))
def test_valid_candidates_come_back_as_they_were_written(folder, table, form):
    path = folder / f"candidates.{form}"
    write_form(path, form, table)
    assert candidates.read_candidates(path) == table


# ---------------------------------------------------------------- rows of any values

NAMES = st.sampled_from(
    "prompt chosen rejected question mc1_targets mc2_targets response_0 response_1 "
    "safer_response_id choices labels id category role content candidates response scores text "
    "messages".split())
ODD = ["", " ", "\ud800", "\x00", "<|im_end|>", "\n\nHuman: a\n\nAssistant: b", '[{"role', "🦦",
       "user", "assistant", "system", "\u2028", "9" * 30]
TEXT = st.one_of(st.text(max_size=12), st.sampled_from(ODD))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)


def lists_and_tables(inner):
    """Of values that may be lists and tables themselves."""
    names = st.one_of(NAMES, TEXT)
    return st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4))


VALUES = st.recursive(LEAVES, lists_and_tables, max_leaves=12)
ROLES = st.sampled_from(["user", "assistant", "system"])
TURNS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT}), max_size=4)
ANY = st.one_of(TEXT, TURNS, VALUES)


def row_of(names, **more):
    """A row with these columns, of any values."""
    return st.fixed_dictionaries({**dict.fromkeys(names.split(), ANY), **more})


ROWS = st.one_of(
    row_of("prompt chosen rejected"),
    row_of("chosen rejected"),
    row_of("question mc1_targets"),
    row_of("question", mc2_targets=row_of("choices labels")),
    row_of("prompt response"),
    row_of("prompt response_0 response_1", safer_response_id=VALUES),
    row_of("prompt", candidates=st.lists(ANY, max_size=3)),
    st.dictionaries(NAMES, ANY, max_size=5),
    VALUES,
)


@settings(max_examples=number_of(700))
@given(table=st.lists(ROWS, max_size=4), form=st.sampled_from(FORMS))
def test_rows_of_any_values_are_pairs_reasons_or_one_line(folder, table, form):
    path = folder / f"any.{form}"
    write_form(path, form, table)
    found = judged("rows of any values", read_pairs, path)
    for prompt, chosen, rejected in found or []:
        assert prompt and chosen.strip() and rejected.strip()


@settings(max_examples=number_of(200))
@given(table=st.lists(ROWS, max_size=4), form=st.sampled_from(FORMS))
def test_rows_of_any_values_are_prompts_and_candidates_or_one_line(folder, table, form):
    path = folder / f"any.{form}"
    write_form(path, form, table)
    judged("prompts", candidates.read_prompts, path)
    judged("candidates", candidates.read_candidates, path)


# ---------------------------------------------------------------- damaged data files

def damaged(data, rng):
    """Some bytes flipped, cut, doubled, or replaced by noise."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        kind = rng.choice(["cut", "noise", "removed", "bit", "bit"])
        if kind == "cut":
            del data[at:]
        elif kind == "noise":
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == "removed":
            del data[at:at + rng.randrange(1, 40)]
        elif data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(data)


def plain_pairs(form, data):
    """The pairs of a file that still is a table of texts, read in the plainest way; else None."""
    try:
        if form.endswith("gz"):
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
        if form == "csv":
            table = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
            if any(None in row for row in table):           # more cells than the header
                return None
        elif form.startswith("jsonl"):
            table = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            table = list(json.loads(text))
        found = [(row["prompt"], row["chosen"], row["rejected"]) for row in table]
    except (ValueError, OSError, EOFError, zlib.error, csv.Error, KeyError, TypeError):
        return None
    plain = found and all(is_plain(*pair) for pair in found)
    return found if plain else None


def is_plain(*pair):
    """Three texts that no reader could take for anything else."""
    are_texts = all(isinstance(text, str) and text.strip() and text[0] != "[" for text in pair)
    return are_texts and pair[1] != pair[2] and not re.search("[\ud800-\udfff]", "".join(pair))


@pytest.fixture(scope="module")
def data_cases(folder):
    """Damaged data files: (what they still say, or None; what was read, or None)."""
    cases = []
    for seed in range(number_of(500)):
        rng = random.Random(seed)
        form = rng.choice(FORMS)
        path = folder / f"damaged.{form}"
        write_form(path, form, [dict(row, chosen=f"{row['chosen']}\n2", rejected='"no", he said')
                                for row in tiny.make_pairs(3)])
        data = damaged(path.read_bytes(), rng)
        path.write_bytes(data)
        cases.append((plain_pairs(form, data), judged("damaged data files", read_pairs, path)))
    return cases


def test_a_damaged_data_file_that_still_is_a_table_of_texts_is_read(data_cases):
    still_valid = [(wanted, read) for wanted, read in data_cases if wanted]
    assert len(still_valid) >= 0.05 * len(data_cases)        # else this says little
    for wanted, read in still_valid:
        assert read == wanted


def test_most_damaged_data_files_are_refused_or_lose_rows(data_cases):
    whole = [wanted for wanted, read in data_cases if read is not None and len(read) == 3]
    assert len(whole) < 0.5 * len(data_cases)               # else the damage is none


# ---------------------------------------------------------------- damaged files of a run

UNEXPECTED = re.compile("^error: unexpected [A-Z]", re.M)           # the name of an exception

SHARD = "activations/layer1-mean-00000-of-00001.safetensors"


@pytest.fixture(scope="module")
def done(finished, tmp_path_factory):
    """A run with all stages done: its folder, and who makes each file and who reads it."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("fuzz") / "run")
    model, pairs, sae = (finished.parent / n for n in ("model", "pairs.jsonl", "sae.safetensors"))
    prompts = [{"prompt": f"Is water wet, case {i}?"} for i in range(2)]
    prompts = tiny.save_rows(run.parent / "prompts.jsonl", prompts)
    head = run / "reward_head.safetensors"

    extract = ["01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", run]
    select = ["02_select_features", "--run", run, "--sae", sae, "--k", 8]
    train = ["03_train_head", "--run", run]
    evaluate = ["04_evaluate", "--run", run, "--texts", 0, "--sweeps", "none", "--folds", 3]
    sample = ["05_best_of_n", "sample", "--reward", head, "--prompts", prompts,
              "--n", 2, "--max-new-tokens", 3]
    rank = ["05_best_of_n", "rank", "--reward", head, "--candidates", run / "candidates.jsonl",
            "--out", run / "ranked.jsonl"]
    makers = {
        SHARD: extract,
        "features.safetensors": select,
        "reward_head.safetensors": train,
        "evaluation.json": evaluate,
        "candidates.jsonl": sample,
    }
    readers = {
        "pairs.jsonl": [select, evaluate],
        SHARD: [select],
        "features.safetensors": [train, evaluate],
        "reward_head.safetensors": [rank, evaluate],
        "candidates.jsonl": [rank],
    }

    draws, seed = 20, 0
    with pytest.MonkeyPatch.context() as patch:         # time is not what is tested here
        patch.setattr(statistics.bootstrap, "__defaults__", (draws, seed))
        patch.setattr(report, "picture", lambda *_: None)
        for line in (sample, evaluate):
            assert call(*line)[0] == 0
        yield SimpleNamespace(run=run, makers=makers, readers=readers)


def call(script, *words):
    """tiny.command with the modules as they are in this process → (exit code, stderr)."""
    module = importlib.import_module(script)
    out, err = io.StringIO(), io.StringIO()
    with tiny.argv(*words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(module.main, SAEError)
        except SystemExit as stop:
            return stop.code, err.getvalue()
    return 0, err.getvalue()


@contextlib.contextmanager
def put_back(folder):
    """Afterwards the folder holds the same files as before."""
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        yield
    finally:
        for path in folder.rglob("*"):
            if path.is_file() and path not in whole:
                path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)


def damage_in_place(path, rng):
    """Damage a file; of safetensors mostly the header, as nothing protects the numbers."""
    data = path.read_bytes()
    size = len(data)
    if path.suffix == ".safetensors" and rng.random() < 0.8:
        size = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(damaged(data[:size], rng) + data[size:])


def outcomes(run, lines_of, cases, first_seed, title):
    """Commands, each after damage to a file of theirs → [(what, exit code, stderr)]."""
    found = []
    for seed in range(first_seed, first_seed + number_of(cases)):
        rng = random.Random(seed)
        file = rng.choice(sorted(lines_of))
        line = rng.choice(lines_of[file])
        with put_back(run):
            damage_in_place(run / file, rng)
            code, err = call(*line)
        found.append((f"{file} · {line[0]}, seed {seed}", code, err))
        TABLE[title][came_of(code, err)] += 1
        if UNEXPECTED.search(err):
            TABLE[f"  {file} · {line[0]}"][err.strip().splitlines()[-1][:150]] += 1
    return found


def came_of(code, err):
    if UNEXPECTED.search(err):
        return "unexpected"
    return "refused in one line" if code else "went on"


@pytest.fixture(scope="module")
def made(done):
    """What became of commands whose own result had been damaged."""
    lines_of = {file: [line] for file, line in done.makers.items()}
    return outcomes(done.run, lines_of, 400, 0, "damaged results")


@pytest.fixture(scope="module")
def read(done):
    """What became of commands one of whose inputs had been damaged."""
    return outcomes(done.run, done.readers, 400, 10000, "damaged inputs")


def test_a_command_given_damaged_files_ends_well_or_in_one_line(made, read):
    for what, code, err in made + read:
        said = re.sub("^.*Loading weights.*$", "", err, flags=re.M).strip()
        assert code in (0, 2), (what, code, err)
        assert code == 0 or re.fullmatch("error: .+ · .+ · .+", said), (what, err)


def test_no_damage_ends_in_a_line_that_no_check_wrote(made, read):
    unexpected = [(what, err) for what, _, err in made + read if UNEXPECTED.search(err)]
    assert not unexpected


def test_a_command_makes_its_own_damaged_result_anew(made):
    went_on = [code == 0 for _, code, _ in made]
    assert sum(went_on) >= 0.9 * len(made), [case for case in made if case[1]]


def test_some_damage_to_an_input_is_none_to_its_reader(read):
    went_on = [code == 0 for _, code, _ in read]
    assert 0.05 * len(read) <= sum(went_on) <= 0.5 * len(read)
