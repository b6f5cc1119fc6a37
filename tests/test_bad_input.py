"""A table of bad inputs: each is refused with exit code 2 and one line of three parts, and no file that was there has changed."""

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
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
ROW = lambda **row: (json.dumps(row) + "\n").encode()
ONE, TWO = "01_extract --model {model} --layer 1 --run {run} --pairs {at}/", "02_select_features --run {run} --sae {at}/"
THREE, FOUR = "03_train_head --run {run}", "04_evaluate --run {run} --texts 0 --seeds 1 --sweeps none"
HEAD = "--reward {run}/reward_head.safetensors"
SAMPLE, RANK = f"05_best_of_n sample {HEAD} --prompts {{at}}/", f"05_best_of_n rank {HEAD} --candidates {{at}}/"
PAIRS, TRAIN = f"05_best_of_n pairs {HEAD} ", "sae train --model {model} --layer 1 --out {at}/new.safetensors --texts {at}/"
CASES = [       # command, what is wrong with {at}/bad… (bytes; str: a copy of that file; None: not there), what the line names
    (ONE + "bad.jsonl", None, "file not found.*bad.jsonl"),
    (ONE + "bad.jsonl", b"", "no usable pair.*empty"),
    (ONE + "bad.jsonl", b"\n\n \n", "no usable pair"),
    (ONE + "bad.jsonl", PAIR.encode() + b"{\n", "bad.jsonl:2"),
    (ONE + "bad.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "bad.jsonl"),
    (ONE + "bad.jsonl", b"[" * 100_000, "bad.jsonl"),
    (ONE + "bad.jsonl", PAIR.encode("utf-16"), "bad.jsonl"),
    (ONE + "bad.jsonl", b"\xff\xfe\xfa", "bad.jsonl"),
    (ONE + "bad.jsonl", ROW(question="q", answer="a"), "columns not recognised: answer, question"),
    (ONE + "bad.jsonl", ROW(prompt="q", chosen="a"), "columns not recognised: chosen, prompt · .*bad.jsonl:1 "),
    (ONE + "bad.parquet", b"PAR1", "parquet is not read .* hub:FOLDER"),
    (ONE + "bad.jsonl", ROW(prompt="q", response_0="a", response_1="b", safer_response_id=0), "--label"),
    (ONE + "bad.jsonl --label better", ROW(prompt="q", response_0="a", response_1="b", safer_response_id=0), "better_response_id"),
    (ONE + "bad.jsonl", PAIR.encode() + ROW(prompt="q", chosen=1, rejected=2) * 2, "more than half"),
    (ONE + "bad.jsonl", ROW(prompt="q", chosen="a", rejected="a"), "same token sequence"),
    (ONE + "bad.jsonl --max-length 3", PAIR.encode(), "longer than max length"),
    (ONE + "bad.json", b'{"prompt": "a"}', "not an array"),
    (ONE + "bad.json", b'[{"prompt": "a"', "bad.json"),
    (ONE + "bad.csv", b"good,worse\na,b\n", "columns not recognised"),
    (ONE + "bad.csv", b'prompt,chosen,rejected\n"a,' + b"b" * 200_000, "field larger"),
    (ONE + "bad.jsonl.gz", gzip.compress(PAIR.encode())[:-9], "bad.jsonl.gz"),
    (ONE + "bad.csv.gz", b"not gzip", "bad.csv.gz"),
    (ONE + "pairs.jsonl --layer 3", b"", "layer 3.*0 to 2"),
    (ONE + "pairs.jsonl --split 0.5,0.5", b"", "--split"),
    (ONE + "pairs.jsonl --split nan,1,0", b"", "--split"),
    (ONE + "pairs.jsonl --limit 0", b"", "--limit"),
    (ONE + "pairs.jsonl --max-length 0", b"", "--max-length"),
    (ONE + "pairs.jsonl --batch-tokens -1", b"", "--batch-tokens"),
    (ONE + "pairs.jsonl --device nowhere --token content", b"", "nowhere"),
    (ONE + "pairs.jsonl --model {at}/bad", b"", "bad"),
    (ONE + "pairs.jsonl --model {at}/bad.gguf", None, "bad.gguf"),
    (ONE + "pairs.jsonl --model {at}/bad.gguf", b"GGUF and no more", "bad.gguf"),
    (ONE + "pairs.jsonl --model no/such", b"", "no/such"),
    ("01_extract --model {model} --run {run} --layer 1 --pairs hub:no/such", b"", "hub:no/such"),
    ("01_extract --model {model} --run {at}/bad --layer 1 --pairs {at}/pairs.jsonl", b"a file where a folder should be", "bad"),
    (TWO + "bad.safetensors", None, "file not found.*bad.safetensors"),
    (TWO + "bad.safetensors", b"", "bad.safetensors"),
    (TWO + "bad.safetensors", b"<!DOCTYPE html>", "bad.safetensors"),
    (TWO + "bad.safetensors", "run/features.safetensors", "unknown layout|missing"),
    (TWO + "bad.pt", b"\x80\x02cos\nsystem\n.", "bad.pt"),
    (TWO + "sae.safetensors --k 0", b"", "--k 0"),
    (TWO + "sae.safetensors --layer 2", b"", "layer 2 was not extracted"),
    ("02_select_features --run {at}/bad --sae {at}/sae.safetensors", None, "no activations.*01_extract.py"),
    ("02_select_features --run {run} --sae hub:no/such", b"", "no/such"),
    (THREE + " --k 99", b"", "--k"),
    (THREE + " --k -1", b"", "--k"),
    (THREE + " --seeds 0", b"", "--seeds"),
    (THREE + " --epochs 0", b"", "--epochs"),
    (THREE + " --lr nan", b"", "--lr"),
    (THREE + " --loss margin --margin inf", b"", "--margin"),
    (THREE + " --head mlp --hidden 0", b"", "--hidden"),
    (THREE + " --patience -1", b"", "--patience"),
    ("03_train_head --run {at}/bad", None, "features.safetensors.*02_select"),
    ("03_train_head --check --run {at}/bad", None, "features.safetensors.*02_select"),
    (FOUR + " --seeds 0", b"", "--seeds"),
    (FOUR + " --texts -1", b"", "--texts"),
    (FOUR + " --other bad", b"", "NAME=DIR"),
    (FOUR + " --other x={at}/bad", None, "bad"),
    (FOUR + " --sae {at}/bad.safetensors", None, "bad.safetensors"),
    (FOUR + " --explain no-such-id", b"", "no-such-id"),
    (FOUR + " --explain one two", b"", "--explain"),
    ("04_evaluate --run {at}/bad", None, "features.safetensors.*02_select"),
    (SAMPLE + "bad.jsonl", None, "bad.jsonl"),
    (SAMPLE + "bad.jsonl", b"", "no prompts"),
    (SAMPLE + "bad.jsonl", ROW(prompt="a") + ROW(prompt=[]), "bad.jsonl:2"),
    (SAMPLE + "bad.jsonl --n 0", ROW(prompt="a"), "--n 0"),
    (SAMPLE + "bad.jsonl --top-p 2", ROW(prompt="a"), "--top-p"),
    (SAMPLE + "bad.jsonl --temperature inf", ROW(prompt="a"), "--temperature"),
    (SAMPLE + "bad.jsonl --policy no/such", ROW(prompt="a"), "no/such"),
    (RANK + "bad.jsonl", b"", "no candidates"),
    (RANK + "bad.jsonl", ROW(prompt="a", candidates=[]), "bad.jsonl:1"),
    (RANK + "bad.jsonl", ROW(prompt="a", candidates=["b"], labels=[1, 2]), "labels"),
    (RANK + "bad.jsonl", ROW(prompt="a", candidates=["b " * 3000]), "longer than"),
    (RANK + "bad.jsonl --model {at}/bad", ROW(prompt="a", candidates=["b"]), "bad"),
    ("05_best_of_n pairs --filter {at}/pairs.jsonl --reward {run}/features.safetensors", b"", "not a reward head"),
    ("05_best_of_n pairs --filter {at}/pairs.jsonl --reward {at}/bad.safetensors", b"\0" * 99, "bad.safetensors"),
    (PAIRS, b"", "--candidates.*--filter"),
    (PAIRS + "--filter {at}/bad.jsonl", ROW(a=1), "columns not recognised"),
    (PAIRS + "--candidates {at}/bad.jsonl", b"{}\n", "bad.jsonl:1"),
    (TRAIN + "bad.jsonl", b"", "no texts"),
    (TRAIN + "pairs.jsonl --layer 9", b"", "layer 9"),
    ("sae info {at}/bad.npz", b"PK\x03\x04", "bad.npz"),
    ("sae info {at}/bad", None, "file not found"),
    ("sae check {at}/sae.safetensors --model {model} --texts {at}/bad.jsonl", b"{}\n[1]\n", "rows need text, messages, or"),
]


def bytes_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def own_process(script, *words):
    """Run a script → (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, tiny.ROOT / f"{script}.py", *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_table_has_at_least_sixty_cases_and_every_stage():
    assert len(CASES) >= 60 and {c[0].split()[0] for c in CASES} == {
        "01_extract", "02_select_features", "03_train_head", "04_evaluate", "05_best_of_n", "sae"}


@pytest.mark.parametrize("line, bad, says", CASES, ids=[f"{n} {c[0][:8]} {c[2]}" for n, c in enumerate(CASES)])
def test_bad_input_is_exit_code_2_and_one_line_and_changes_no_file(line, bad, says, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("pairs.jsonl", "sae.safetensors"):
        shutil.copy(finished.parent / name, tmp_path)
    named = re.search(r"\{at}/(bad\S*)", line)
    if named and bad is not None:
        (tmp_path / named[1]).write_bytes((tmp_path / bad).read_bytes() if isinstance(bad, str) else bad)
    before = bytes_of(tmp_path)
    script, *words = line.format(at=tmp_path, run=tmp_path / "run", model=finished.parent / "model").split()
    code, _, err = (own_process if script == "sae" else command)(script, *words)
    assert code == 2 and re.fullmatch(r"error: .+ · .+ · .+\n", err) and re.search(says, err), (code, err)
    assert "unexpected" not in err, err
    after = bytes_of(tmp_path)
    if re.search("no usable pair|more than half", err):         # dropped.jsonl then says why
        before.pop("run/dropped.jsonl"), after.pop("run/dropped.jsonl")
    assert after == before


@pytest.mark.parametrize("line, file, other", [
    (TWO + "sae.safetensors", "activations/layer1-00000-of-00001.safetensors", "features.safetensors"),
    (THREE, "features.safetensors", "reward_head.safetensors"), (FOUR, "features.safetensors", "reward_head.safetensors"),
    (FOUR, "reward_head.safetensors", "features.safetensors"), (THREE + " --check", "reward_head.safetensors", "features.safetensors"),
    (FOUR, "activations/layer1-00000-of-00001.safetensors", "features.safetensors")])
def test_a_file_of_another_stage_in_the_place_of_one_is_refused(line, file, other, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(finished.parent / "sae.safetensors", tmp_path)
    shutil.copy(finished / other, tmp_path / "run" / file)
    tiny.assert_one_line_error(command(*line.format(at=tmp_path, run=tmp_path / "run").split()), file.rpartition("/")[2], "not a ")


SILENT = ["01_extract --model no/such --layer 1 --run {at}/run --pairs {at}/pairs.jsonl",
          "01_extract --model {model} --layer 1 --run {at}/run --pairs hub:no/such", "sae info hub:no/such"]


@pytest.mark.parametrize("line", SILENT)
def test_a_hub_that_takes_the_connection_and_never_answers_is_one_line_soon(line, finished, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.create_server(("127.0.0.1", 0)) as hub:
        held = []
        threading.Thread(target=lambda: [held.append(hub.accept()) for _ in range(99)], daemon=True).start()
        for name, value in (("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}"), ("HF_HUB_ETAG_TIMEOUT", "1"), ("NO_PROXY", "*"),
                            ("HF_HOME", str(tmp_path / "cache"))):
            monkeypatch.setenv(name, value)
        script, *words = line.format(at=finished.parent, model=finished.parent / "model").split()
        code, _, err = own_process(script, *words)
    assert code == 2 and re.fullmatch(r"error: .+ · .*no/such · .+\n", err), err
    assert held                                                 # it was asked
