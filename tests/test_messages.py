"""What a command says when it does not end well, and what it leaves behind.

A damaged stage file is called that, and only that is; a reader that goes away is no fault; a
command that failed leaves no empty folder; --debug shows the traceback of every command.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parts import contents, files

SHARD = "activations/layer1-mean-00000-of-00001.safetensors"
FEATURES = "features.safetensors"
HEAD = "reward_head.safetensors"


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run, with what the commands read beside it."""
    shutil.copytree(finished, tmp_path / "run")
    for name in ("pairs.jsonl", "sae.safetensors"):
        shutil.copy(finished.parent / name, tmp_path)
    tiny.save_rows(tmp_path / "answers.jsonl", [{"prompt": "Is it wet?", "candidates": ["a", "b"]}])
    tiny.save_rows(tmp_path / "plain.jsonl", [{"text": f"Bile is made here, {n}."}
                                              for n in range(12)])
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"')
    return tmp_path


def words_of(line, folder, finished):
    """A command with its paths → [script, words …]."""
    return line.format(at=folder, run=folder / "run", model=finished.parent / "model").split()


EXTRACT = "01_extract --model {model} --layer 1 --pairs {at}/pairs.jsonl --run "
SELECT = "02_select_features --run {run} --sae {at}/sae.safetensors --k 8"
TRAIN = "03_train_head --run {run}"
EVALUATE = "04_evaluate --run {run} --texts 0 --sweeps none --folds 3"
RANK = "05_best_of_n rank --reward {run}/reward_head.safetensors --candidates {at}/answers.jsonl"
CHECK = "tools/self_check --run {run}"
TRAIN_SAE = ("tools/train_sae --model {model} --layer 1 --width 32 --k 4 --batch 32 --tokens 640 "
             "--buffer 64 --texts {at}/plain.jsonl --out {at}/")
CHECK_SAE = "tools/check_sae {at}/sae.safetensors --model {model} --texts {at}/plain.jsonl"


# ---------------------------------------------------------------- damaged stage files

def read(path):
    """→ (tensors, settings) of a stage file, read without parts/files.py."""
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["sparserm"])


def write(path, tensors, meta):
    """Write a stage file without parts/files.py."""
    save_file(tensors, path, {"sparserm": json.dumps(meta)})


def without(name):
    def damage(tensors, meta):
        del tensors[name]
    return damage


def shorter(name):
    def damage(tensors, meta):
        tensors[name] = tensors[name][:-1].clone()
    return damage


def flat(name):
    def damage(tensors, meta):
        tensors[name] = tensors[name].flatten()
    return damage


def as_type(name, dtype):
    def damage(tensors, meta):
        tensors[name] = tensors[name].to(dtype)
    return damage


def all_numbers(name, value):
    def damage(tensors, meta):
        tensors[name].fill_(value)
    return damage


def setting(name, value):
    def damage(tensors, meta):
        meta[name] = value
    return damage


def no_setting(*names):
    def damage(tensors, meta):
        *path, last = names
        for name in path:
            meta = meta[name]
        del meta[last]
    return damage


DAMAGED = [         # file, damage, the command that reads it, what the line says
    (SHARD, without("group"), SELECT, "group missing"),
    (SHARD, shorter("rejected"), SELECT, "rejected is F32 .59, 32., expected float .60, 32."),
    (SHARD, flat("chosen"), SELECT, "chosen is F32 .1920."),
    (SHARD, as_type("split", torch.float32), SELECT, "split is F32"),
    (SHARD, no_setting("norm_eps"), SELECT, "setting norm_eps missing"),
    (SHARD, no_setting("parent", "pairs"), SELECT, "setting pairs is missing"),
    (SHARD, setting("layer", "one"), SELECT, "setting layer is 'one'"),
    (FEATURES, without("frequency_rejected"), TRAIN, "frequency_rejected missing"),
    (FEATURES, without("search_rejected"), TRAIN, "search_rejected missing"),
    (FEATURES, shorter("search_latents"), TRAIN, "search_latents is I64 .4, 16., expected I64 .5"),
    (FEATURES, flat("search_chosen"), TRAIN, "search_chosen is"),
    (FEATURES, as_type("latents", torch.int32), CHECK, "latents is I32"),
    (FEATURES, as_type("fold", torch.int16), EVALUATE, "fold is I16"),
    (FEATURES, all_numbers("search_pair", 60), TRAIN, "search_pair holds numbers"),
    (FEATURES, all_numbers("search_latents", 999), TRAIN, "search_latents holds numbers"),
    (FEATURES, all_numbers("latents", -1), TRAIN, "latents holds numbers"),
    (FEATURES, setting("k", 4), TRAIN, "latents is I64 .16., expected I64 .8."),
    (FEATURES, no_setting("search_k"), TRAIN, "setting search_k is missing"),
    (HEAD, without("std"), RANK, "std missing"),
    (HEAD, without("b1"), CHECK, "b1 missing"),
    (HEAD, shorter("w1"), RANK, "w1 is F32"),
    (HEAD, flat("directions"), CHECK, "directions is F32"),
    (HEAD, as_type("w1", torch.float64), RANK, "w1 is F64"),
    (HEAD, no_setting("dtype"), RANK, "setting dtype is missing"),
    (HEAD, no_setting("settings", "kind"), CHECK, "setting kind is missing"),
    (HEAD, setting("dtype", "float"), RANK, "setting dtype is 'float'"),
    (HEAD, setting("weights", None), RANK, "setting weights is None"),
]


@pytest.mark.parametrize("file, damage, line, says", DAMAGED,
                         ids=[f"{case[2].split()[0]} {case[3]}" for case in DAMAGED])
def test_a_stage_file_that_is_whole_and_wrong_is_refused_by_name(file, damage, line, says, folder,
                                                                 finished):
    path = folder / "run" / file
    tensors, meta = read(path)
    damage(tensors, meta)
    write(path, tensors, meta)
    result = tiny.command(*words_of(line, folder, finished))
    tiny.assert_one_line_error(result, path, "damaged or of another version", "again")
    assert re.search(says, result[2]), result[2]
    assert "unexpected" not in result[2]


@pytest.mark.parametrize("file, line", [(FEATURES, SELECT), (HEAD, TRAIN)])
def test_a_stage_makes_its_own_wrong_file_anew(file, line, folder, finished):
    path = folder / "run" / file
    whole = load_file(path)
    tensors, meta = read(path)
    tensors["mean"] = tensors["mean"][:-1].clone()
    write(path, tensors, meta)
    tiny.succeed(*words_of(line, folder, finished))
    made = load_file(path)
    assert made.keys() == whole.keys()
    assert all(torch.equal(made[name], whole[name]) for name in whole)


def mlp(folder, finished):
    """The head of a run whose head is an MLP."""
    tiny.succeed(*words_of(TRAIN, folder, finished), "--head", "mlp", "--hidden", 3, "--seeds", 1)
    return read(folder / "run" / HEAD)


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
def test_an_mlp_without_one_of_its_tensors_is_refused(name, folder, finished):
    tensors, meta = mlp(folder, finished)
    del tensors[name]
    write(folder / "run" / HEAD, tensors, meta)
    result = tiny.command(*words_of(RANK, folder, finished))
    tiny.assert_one_line_error(result, f"not a reward head: {name} missing")


def test_an_mlp_that_is_whole_is_read(folder, finished):
    tensors, _ = mlp(folder, finished)
    found, meta = files.load_stage(folder / "run" / HEAD, "03_train_head.py", "head")
    assert set(found) == set(tensors) == set(contents.tensors_of(meta))


@pytest.mark.parametrize("file", [SHARD, FEATURES, HEAD])
def test_the_table_of_contents_names_every_tensor_of_a_stage_file(file, finished):
    tensors, _ = read(finished / file)
    assert set(contents.tensors_of(files.read_meta(finished / file))) == set(tensors)


# ---------------------------------------------------------------- what no check knows

def run_with(error):
    """What run_main() says of a main() that raises this."""
    def main():
        raise error

    err = io.StringIO()
    with tiny.argv(), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        files.run_main(main)
    assert stop.value.code == 2
    return err.getvalue()


@pytest.mark.parametrize("error", [
    KeyError("tokens"),
    ZeroDivisionError("division by zero"),
    RuntimeError("mat1 and mat2 shapes\ncannot be multiplied"),
    ValueError("not enough values to unpack"),
], ids=lambda error: type(error).__name__)
def test_a_fault_of_ours_does_not_blame_the_files_of_the_user(error):
    line = run_with(error)
    assert re.fullmatch(r"error: unexpected \w+: .+ · test_messages.py, line \d+ · .+\n", line)
    assert type(error).__name__ in line
    assert "--debug" in line and "report" in line
    assert "damaged" not in line and "file of the run" not in line


def allocate_too_much():
    """What torch raises where memory is short."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    return caught.value


def allocate_too_much_in_numpy():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**55, np.uint8)
    return caught.value


@pytest.mark.parametrize("fails", [MemoryError, allocate_too_much, allocate_too_much_in_numpy])
def test_too_little_memory_is_called_that(fails):
    assert run_with(fails()).startswith("error: out of memory (")


# ---------------------------------------------------------------- a reader that goes away

def run_for(reader, words, folder, **more):
    """A command whose output goes to this function → (exit code, stderr but for loading bars)."""
    script, *rest = words
    start = ["-m", script.replace("/", ".")] if "/" in script else [f"{script}.py"]
    with open(folder / "stderr", "w+") as err:
        process = subprocess.Popen([sys.executable, *start, *rest], cwd=tiny.ROOT, stderr=err,
                                   stdout=subprocess.PIPE, env={**os.environ, **more})
        reader(process.stdout)
        process.stdout.close()
        code = process.wait(120)
        err.seek(0)
        lines = re.split(r"[\r\n]+", err.read())
    return code, [line for line in lines if line and "Loading weights" not in line]


def nothing(pipe):
    """As `| true`: gone before the first line."""


def one_line(pipe):
    """As `| head -1`."""
    pipe.readline()


def assert_whole(path):
    """The file can be read, and nothing half written lies near."""
    if path.suffix == ".safetensors":
        assert load_file(path)
    else:
        assert [json.loads(row)["best"] for row in path.read_text().splitlines()]
    assert not list(path.parent.rglob(".*"))


GONE = [            # the command, its lines, a file that is whole afterwards
    (TRAIN + " --k 2", tiny.AT_THE_END, HEAD),
    (RANK + " --out {run}/ranked.jsonl", tiny.AT_ONCE, "ranked.jsonl"),
    (CHECK, tiny.AT_ONCE, HEAD),
]


@pytest.mark.parametrize("line, when, file", GONE, ids=[case[0].split()[0] for case in GONE])
def test_a_reader_that_goes_away_ends_a_command_without_a_word(line, when, file, folder, finished):
    words = words_of(line, folder, finished)
    assert run_for(nothing, words, folder, PYTHONUNBUFFERED=when) == (141, [])
    assert_whole(folder / "run" / file)


@pytest.mark.parametrize("script", ["04_evaluate", "tools/check_sae"])
def test_help_that_nobody_reads_ends_without_a_word(script, folder):
    assert run_for(nothing, [script, "--help"], folder) == (0, [])


def test_an_error_without_a_reader_still_is_one_line_and_code_2(folder, finished):
    code, said = run_for(nothing, words_of(TRAIN + " --k 99", folder, finished), folder)
    assert code == 2 and len(said) == 1 and said[0].startswith("error: --k 99")


def test_a_training_that_its_reader_ended_goes_on_where_it_stopped(folder, finished):
    words = words_of(TRAIN_SAE + "own.safetensors", folder, finished)
    assert run_for(one_line, words, folder) == (141, [])
    assert_whole(folder / "own.checkpoint.safetensors")
    assert "note: going on behind step " in tiny.succeed(*words)
    assert not (folder / "own.checkpoint.safetensors").exists()


# ---------------------------------------------------------------- what a failed command leaves

FAILS = [           # the command, with a new folder {at}/new/…
    EXTRACT + "{at}/new/run --pairs {at}/none.jsonl",
    EXTRACT + "{at}/new/run --pairs {at}/broken.jsonl",
    EXTRACT + "{at}/new/run --model {at}/none",
    EXTRACT + "{at}/new/run --layer 7",
    EXTRACT + "{at}/new/run --limit 0",
    SELECT + " --run {at}/new",
    SELECT + " --name new --sae {at}/none",
    TRAIN + " --name new --k 99",
    EVALUATE + " --name new",
    RANK + " --out {at}/new/here/ranked.jsonl --candidates {at}/broken.jsonl",
    "05_best_of_n sample --reward {run}/reward_head.safetensors --prompts {at}/broken.jsonl --out "
    "{at}/new/here/some.jsonl",
    TRAIN_SAE + "new/own.safetensors --texts {at}/broken.jsonl",
    TRAIN_SAE + "new/own.safetensors --layer 7",
]


def folders_of(folder):
    return {path for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.parametrize("line", FAILS, ids=lambda line: f"{line.split()[0]} {line.split()[-1]}")
def test_a_command_that_failed_leaves_no_new_folder(line, folder, finished):
    before = folders_of(folder)
    tiny.assert_one_line_error(tiny.command(*words_of(line, folder, finished)))
    assert folders_of(folder) == before


@pytest.mark.parametrize("line", [
    EXTRACT + "{at}/new/run",
    SELECT + " --name new",
    TRAIN + " --name new",
    RANK + " --out {at}/new/here/ranked.jsonl",
    TRAIN_SAE + "new/own.safetensors",
], ids=lambda line: line.split()[0])
def test_a_disk_that_takes_no_file_leaves_no_new_folder(line, folder, finished, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    before = folders_of(folder)
    result = tiny.command(*words_of(line, folder, finished))
    tiny.assert_one_line_error(result, "No space left", "new")
    assert folders_of(folder) == before


def test_a_folder_that_was_there_and_empty_stays(folder):
    (folder / "mine").mkdir()
    with pytest.raises(KeyError), files.moved_into_place(folder / "mine" / "a" / "b" / "file"):
        raise KeyError
    assert list((folder / "mine").iterdir()) == []


# ---------------------------------------------------------------- --debug

WRONG = [           # a command that ends with an error
    EXTRACT + "{at}/new --layer 7",
    SELECT + " --sae {at}/none",
    TRAIN + " --k 99",
    EVALUATE + " --name none",
    "05_best_of_n rank --reward {run}/none --candidates {at}/answers.jsonl",
    TRAIN_SAE + "own.safetensors --layer 7",
    CHECK_SAE + " --layer 7",
    CHECK + " --name none",
]


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("line", WRONG, ids=lambda line: line.split()[0])
def test_debug_anywhere_in_the_line_shows_the_traceback(line, place, folder, finished):
    script, *words = words_of(line, folder, finished)
    tiny.assert_one_line_error(tiny.command(script, *words))
    words.insert(0 if place == "first" else len(words), "--debug")
    with pytest.raises(ValueError) as caught:
        tiny.command(script, *words)
    assert type(caught.value).__name__ in ("UserError", "SAEError")
    assert len(caught.traceback) > 3
