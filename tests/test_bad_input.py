"""A table of bad inputs: each is refused with exit code 2 and one line of three parts, and no file
that was there has changed."""

import gzip
import importlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading

import pytest
import tiny
from tiny import command

stage1 = importlib.import_module("01_extract")


def line_of(**row):
    """A row of JSONL."""
    return (json.dumps(row) + "\n").encode()


PAIR = line_of(prompt="a", chosen="b", rejected="c")
PKU = line_of(prompt="q", response_0="a", response_1="b", safer_response_id=0)

# {run}: a finished run · {model}: its backbone · {at}: the folder of pairs.jsonl, sae.safetensors
# and of the file at fault
ONE = "01_extract --model {model} --layer 1 --run {run} --pairs {at}/"
TWO = "02_select_features --run {run} --sae {at}/"
THREE = "03_train_head --run {run}"
FOUR = "04_evaluate --run {run} --texts 0 --sweeps none --folds 3"
SAMPLE = "05_best_of_n sample --reward {run}/reward_head.safetensors --prompts {at}/"
RANK = "05_best_of_n rank --reward {run}/reward_head.safetensors --candidates {at}/"
PAIRS = "05_best_of_n pairs --reward {run}/reward_head.safetensors"
FILTER = "05_best_of_n pairs --filter {at}/pairs.jsonl --reward "
TRAIN = "tools/train_sae --model {model} --layer 1 --out {at}/new.safetensors --texts {at}/"
CHECK = "tools/check_sae {at}/sae.safetensors --model {model} --texts {at}/"

# command with {at}/bad… · what is in that file (None: it is not there) · what the line says
BAD_FILES = [
    (ONE + "bad.jsonl", None, "file not found.*bad.jsonl"),
    (ONE + "bad.jsonl", b"", "no usable pair.*empty"),
    (ONE + "bad.jsonl", b"\n\n \n", "no usable pair"),
    (ONE + "bad.jsonl", PAIR + b"{\n", "bad.jsonl:2"),
    (ONE + "bad.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "bad.jsonl"),
    (ONE + "bad.jsonl", b"[" * 100_000, "bad.jsonl"),
    (ONE + "bad.jsonl", PAIR.decode().encode("utf-16"), "bad.jsonl"),
    (ONE + "bad.jsonl", b"\xff\xfe\xfa", "bad.jsonl"),
    (ONE + "bad.jsonl", line_of(question="q", answer="a"), "not recognised: answer, question"),
    (ONE + "bad.jsonl", line_of(prompt="q", chosen="a"),
     "no rejected among the columns: chosen, prompt · .*:1 "),
    (ONE + "bad.jsonl", PKU, "--label"),
    (ONE + "bad.jsonl --label better", PKU, "better_response_id"),
    (ONE + "bad.jsonl", PAIR + line_of(prompt="q", chosen=1, rejected=2) * 2, "more than half"),
    (ONE + "bad.jsonl", line_of(prompt="q", chosen="a", rejected="a"), "same token sequence"),
    (ONE + "bad.jsonl --max-length 3", PAIR, "longer than max length"),
    (ONE + "bad.jsonl", PAIR, "other pairs .* --overwrite"),
    (ONE + "bad.jsonl --overwrite", b"", "no usable pair.*empty"),
    (ONE + "bad.jsonl --overwrite", PAIR + line_of(prompt="q") * 2, "more than half"),
    (ONE + "bad.json", b'{\n"prompt": "a"}', "one a line, or all in"),
    (ONE + "bad.json", b'[{"prompt": "a"', "bad.json"),
    (ONE + "bad.csv", b"good,worse\na,b\n", "columns not recognised"),
    (ONE + "bad.csv", b'prompt,chosen,rejected\n"a,' + b"b" * 200_000, "not readable as a table"),
    (ONE + "bad.csv.gz", b"not gzip", "bad.csv.gz"),
    (ONE + "bad.jsonl.gz", gzip.compress(PAIR)[:-9], "bad.jsonl.gz"),
    (ONE + "bad.parquet", b"PAR1", "parquet is not read .* hub:FOLDER"),
    (ONE + "pairs.jsonl --run {at}/bad", b"a file in the place of a folder", "bad"),
    (ONE + "pairs.jsonl --model {at}/bad", b"", "bad"),
    (ONE + "pairs.jsonl --model {at}/bad.gguf", None, "bad.gguf"),
    (ONE + "pairs.jsonl --model {at}/bad.gguf", b"GGUF and no more", "bad.gguf"),
    (TWO + "bad.safetensors", None, "file not found.*bad.safetensors"),
    (TWO + "bad.safetensors", b"", "bad.safetensors"),
    (TWO + "bad.safetensors", b"<!DOCTYPE html>", "bad.safetensors"),
    (TWO + "bad.pt", b"\x80\x02cos\nsystem\n.", "bad.pt"),
    (TWO + "sae.safetensors --run {at}/bad", None, "no activations.*01_extract.py"),
    (THREE + " --run {at}/bad", None, "features.safetensors.*02_select"),
    (FOUR + " --run {at}/bad", None, "features.safetensors.*02_select"),
    (FOUR + " --other x={at}/bad", None, "bad"),
    (FOUR + " --sae {at}/bad.safetensors", None, "bad.safetensors"),
    (SAMPLE + "bad.jsonl", None, "bad.jsonl"),
    (SAMPLE + "bad.jsonl", b"", "no prompts"),
    (SAMPLE + "bad.jsonl", line_of(prompt=[]), "bad.jsonl:1"),
    (RANK + "bad.jsonl", b"", "no candidates"),
    (RANK + "bad.jsonl", line_of(prompt="a", candidates=[]), "bad.jsonl:1"),
    (RANK + "bad.jsonl", line_of(prompt="a", candidates=["b"], labels=[1, 2]), "labels"),
    (RANK + "bad.jsonl", line_of(prompt="a", candidates=["b " * 3000]), "longer than"),
    (RANK + "bad.jsonl --model {at}/none", line_of(prompt="a", candidates=["b"]), "/none"),
    (FILTER + "{at}/bad.safetensors", b"\0" * 99, "bad.safetensors"),
    (PAIRS + " --filter {at}/bad.jsonl", line_of(a=1), "columns not recognised"),
    (PAIRS + " --candidates {at}/bad.jsonl", b"{}\n", "bad.jsonl:1"),
    (TRAIN + "bad.jsonl", b"", "no texts"),
    (TRAIN + "bad.jsonl", line_of(text="a") * 2, "2 texts are too few"),
    (TRAIN + "bad.jsonl", line_of(messages=[{"role": "user", "content": "a"}]) * 3, "no texts"),
    (TRAIN + "bad.jsonl --max-length 2", PAIR * 3, "no text gives a token .* --max-length"),
    (TRAIN + "pairs.jsonl --start {at}/bad.safetensors", None, "bad.safetensors"),
    (TRAIN + "pairs.jsonl --out {at}/bad", None, "not the name of a .safetensors file"),
    (CHECK + "bad.jsonl", b"{}\n[1]\n", "rows need text, messages, or"),
    (CHECK + "bad.jsonl --max-length 2", PAIR, "no text gives a token .* --max-length"),
    ("tools/self_check --run {at}/bad", None, "features.safetensors.*02_select"),
    ("sae info {at}/bad.npz", b"PK\x03\x04", "bad.npz"),
    ("sae info {at}/bad", None, "file not found"),
]

# command whose files are all there · what the line says
BAD_NAMES = [
    (ONE + "pairs.jsonl --layer 3", "layer 3.*0 to 2"),
    (ONE + "pairs.jsonl --device nowhere --token content", "nowhere"),
    (ONE + "pairs.jsonl --model no/such", "no/such"),
    (ONE + "pairs.jsonl --pairs hub:no/such", "hub:no/such"),
    (TWO + "run/features.safetensors", "features of stage 2, not an SAE"),
    (ONE + "pairs.jsonl --max-length 99", "max_length 2048, this is max_length 99.*--overwrite"),
    (TWO + "sae.safetensors --layer 2", "layer 2 was not extracted"),
    (TWO + "sae.safetensors --token last", "token last was not extracted, only mean"),
    (TWO + "sae.safetensors --sae hub:no/such", "no/such"),
    (THREE + " --k some", "--k some"),
    (THREE + " --k 9", "--k 9"),
    (FOUR + " --name none", "none/reward_head.safetensors.*03_train_head"),
    (FOUR + " --other bad", "NAME=DIR"),
    (FOUR + " --explain no-such-id", "no-such-id"),
    (FOUR + " --explain one two", "--explain"),
    (SAMPLE + "prompts.jsonl --policy no/such", "no/such"),
    (FILTER + "{run}/features.safetensors", "not a reward head"),
    (PAIRS, "--candidates.*--filter"),
    (TRAIN + "pairs.jsonl --layer 9", "layer 9"),
    (TRAIN + "pairs.jsonl --start {at}/sae.safetensors", "cannot go on .* --start"),
    (TRAIN + "pairs.jsonl --width 4 --k 5", "--k 5 .* --width 4"),
    (TRAIN + "pairs.jsonl --end-share 0.5 --mean-share 0.5", "no room for ordinary tokens"),
    (CHECK + "pairs.jsonl --layer 9", "layer 9 .* blocks 0 to 2"),
]

# command · flags, each out of its range: the line names the flag
BAD_NUMBERS = {
    ONE + "pairs.jsonl": [
        "--split 0.5,0.5", "--split nan,1,0", "--limit 0", "--max-length 0", "--batch-tokens -1"],
    TWO + "sae.safetensors": ["--k 0"],
    THREE: [
        "--k 0", "--k -1", "--seeds 0", "--epochs 0", "--lr nan", "--lr -1", "--lr 0",
        "--l2 0", "--l2 -1", "--l2 nan", "--l2 inf", "--l2 much", "--k 1.5",
        "--patience -1", "--loss margin --margin nan",
        "--loss margin --margin inf", "--loss margin --margin -1", "--head mlp --hidden 0"],
    TRAIN + "pairs.jsonl": [
        "--width 0", "--k 0", "--cuts -1", "--turns 0", "--tokens 0", "--batch 0", "--buffer 0",
        "--dead-after 0", "--lr 0", "--lr nan", "--lr inf", "--end-share 1", "--end-share -1",
        "--mean-share nan", "--max-length 1", "--limit 0", "--seed -1"],
    CHECK + "pairs.jsonl": ["--max-length 1", "--limit -1", "--seed -1"],
    FOUR: ["--folds 2", "--folds 21", "--texts -1"],
    SAMPLE + "prompts.jsonl": [
        "--n 0", "--n -1", "--max-new-tokens 0", "--temperature -1", "--temperature nan",
        "--temperature inf", "--top-p 0", "--top-p 1.5", "--limit 0", "--limit -1",
        "--batch-rows 0"],
}


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run with what the commands of the tables read."""
    shutil.copytree(finished, tmp_path / "run")
    for name in ("pairs.jsonl", "sae.safetensors"):
        shutil.copy(finished.parent / name, tmp_path)
    tiny.save_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    return tmp_path


def filled(line, folder, finished):
    """A line of a table with its paths → [script, words …]."""
    return line.format(at=folder, run=folder / "run", model=finished.parent / "model").split()


def bytes_of(folder):
    """{path: content} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(words, says, folder):
    """Exit code 2, one line of three parts that says this, and no file is another."""
    before = bytes_of(folder)
    code, _, err = command(*words)
    assert code == 2, (code, err)
    assert re.fullmatch(r"error: .+ · .+ · .+\n", err) and re.search(says, err), err
    assert "unexpected" not in err
    after = bytes_of(folder)
    if re.search("no usable pair|more than half", err):         # dropped.jsonl then says why
        before.pop(folder / "run/dropped.jsonl", None)
        after.pop(folder / "run/dropped.jsonl", None)
    assert after == before


def name_of(case):
    """The name of a test: script and what the line says."""
    return f"{case[0].split()[0]} {case[-1]}"


@pytest.mark.parametrize("line, content, says", BAD_FILES, ids=map(name_of, BAD_FILES))
def test_a_bad_file_is_one_line_and_changes_no_file(line, content, says, folder, finished):
    bad = re.search(r"\{at}/(bad\S*)", line)
    if content is not None:
        (folder / bad[1]).write_bytes(content)
    assert_refused(filled(line, folder, finished), says, folder)


@pytest.mark.parametrize("line, says", BAD_NAMES, ids=map(name_of, BAD_NAMES))
def test_a_name_of_nothing_is_one_line_and_changes_no_file(line, says, folder, finished):
    assert_refused(filled(line, folder, finished), says, folder)


OUT_OF_RANGE = [(line, flags) for line, some in BAD_NUMBERS.items() for flags in some]


@pytest.mark.parametrize("line, flags", OUT_OF_RANGE, ids=map(name_of, OUT_OF_RANGE))
def test_a_number_out_of_range_is_one_line_that_names_it(line, flags, folder, finished):
    *_, flag, _ = flags.split()
    assert_refused([*filled(line, folder, finished), *flags.split()], flag, folder)


def test_the_tables_have_every_command():
    lines = [case[0] for case in BAD_FILES + BAD_NAMES + OUT_OF_RANGE]
    assert {line.split()[0] for line in lines} == {
        "01_extract", "02_select_features", "03_train_head", "04_evaluate", "05_best_of_n",
        "sae", "tools/train_sae", "tools/check_sae", "tools/self_check"}


MOVED = [
    ("sae check my-sae --model demo", "python sae.py check", "python -m tools.check_sae"),
    ("sae train --texts some.jsonl", "python sae.py train", "python -m tools.train_sae"),
    ("03_train_head --run runs/mine --check", "03_train_head.py --check",
     "python -m tools.self_check --run runs/mine"),
]


@pytest.mark.parametrize("line, old, new", MOVED)
def test_a_command_that_has_moved_names_the_new_one(line, old, new):
    assert command(*line.split()) == (2, "", f"error: moved · {old} · use {new}\n")


@pytest.mark.parametrize("module", ["train_sae", "check_sae", "self_check"])
def test_the_commands_that_the_moved_ones_name_are_there(module, capsys):
    main = importlib.import_module(f"tools.{module}").main
    with tiny.argv("--help"), pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert f"usage: python -m tools.{module} " in capsys.readouterr().out


SHARD = "activations/layer1-mean-00000-of-00001.safetensors"
FEATURES, HEAD = "features.safetensors", "reward_head.safetensors"
IN_THE_PLACE = [
    (TWO + "sae.safetensors", SHARD, FEATURES),
    (THREE, FEATURES, HEAD),
    (THREE, FEATURES, SHARD),
    (FOUR, FEATURES, HEAD),
    (FOUR, HEAD, FEATURES),
    (FOUR, SHARD, FEATURES),
    ("tools/self_check --run {run}", HEAD, FEATURES),
]


@pytest.mark.parametrize("line, file, other", IN_THE_PLACE)
def test_a_file_of_another_stage_in_the_place_of_one_is_refused(line, file, other, folder,
                                                                finished):
    shutil.copy(folder / "run" / other, folder / "run" / file)
    result = command(*filled(line, folder, finished))
    tiny.assert_one_line_error(result, file.rpartition("/")[2], "not a ")


# ---------------------------------------------------------------- a hub that is silent

@pytest.fixture
def silent_hub(tmp_path, monkeypatch):
    """A server that takes every connection and never answers → list of those it has taken.

    Processes started from here have it as their hub.
    """
    taken = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def take():
            while True:
                try:
                    taken.append(server.accept())
                except OSError:                 # closed: the test is over
                    return
        threading.Thread(target=take, daemon=True).start()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        yield taken
        for connection, _ in taken:
            connection.close()


ASKS_THE_HUB = [
    ONE + "pairs.jsonl --model no/such",
    ONE + "pairs.jsonl --pairs hub:no/such",
    TWO + "sae.safetensors --sae hub:no/such",
]


@pytest.mark.parametrize("line", ASKS_THE_HUB, ids=["model", "pairs", "sae"])
def test_a_hub_that_never_answers_is_one_line_soon(line, folder, finished, silent_hub):
    pytest.importorskip("datasets")
    script, *words = filled(line, folder, finished)
    done = subprocess.run([sys.executable, tiny.ROOT / f"{script}.py", *words],
                          capture_output=True, text=True, timeout=180)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .+ · .*no/such · .+\n", done.stderr), done.stderr
    assert silent_hub                           # it was asked
