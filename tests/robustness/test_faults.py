"""A command that is killed, stopped, out of disk, shut out, run twice at once or given damaged
files.

What lies there is whole, what the user reads is one line, and the same command ends with the bytes
of a run that nothing happened to.

The commands run in children, forked from a process that has imported everything. In most of them
files are written in pieces, with pauses in between and before the renaming, so that a kill hits a
write often enough.

SPARSERM_FAULTS=all: 203 kills and more damage; -s prints a table.
"""

import builtins
import collections
import contextlib
import ctypes
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import tiny
from tqdm import tqdm

from parts import files, statistics
from sae import SAEError

ALL = os.environ.get("SPARSERM_FAULTS") == "all"
KILLS = 29 if ALL else 2            # of each command
STOPS = 8 if ALL else 1             # of each command, by Ctrl-C
FLIPS = 60 if ALL else 1            # of each file and each command that reads it
PAUSE = 0.004                       # seconds

FORKS = multiprocessing.get_context("forkserver")
TABLE = collections.defaultdict(collections.Counter)
LINUX = sys.platform == "linux"
pytestmark = pytest.mark.skipif(not LINUX, reason="forks, signals and limits are Linux's")


@dataclass(frozen=True)
class Command:
    """`python -m module words`."""
    module: str
    words: str
    earlier: str = ""       # more words, in the earlier call whose files lie there
    now: str = ""           # more words, in the call that something happens to
    next: str = None        # the command that reads what this one has written


HEAD = "--reward {run}/reward_head.safetensors"
COMMANDS = {
    "01": Command(
        "01_extract", "--model {at}/model --pairs {at}/pairs.jsonl --layer 1 --run {run}",
        earlier="--limit 30", now="--overwrite", next="02"),
    "02": Command(
        "02_select_features", "--run {run} --sae {at}/sae.safetensors",
        earlier="--k 3", now="--k 4", next="03"),
    "03": Command(
        "03_train_head", "--run {run} --l2 0.1",            # without a search for it: quicker
        earlier="--k 2", now="--k best", next="04"),
    "04": Command(
        "04_evaluate", "--run {run} --texts 0 --folds 3",
        earlier="--sweeps small", now="--sweeps none"),
    "05 sample": Command(
        "05_best_of_n", f"sample {HEAD} --prompts {{at}}/prompts.jsonl --n 3 --max-new-tokens 8",
        earlier="--seed 1", next="05 pairs"),
    "05 pairs": Command(
        "05_best_of_n",
        f"pairs {HEAD} --candidates {{run}}/candidates.jsonl --out {{run}}/dpo.jsonl",
        earlier="--min-margin 0.5"),
    "train sae": Command(
        "tools.train_sae", "--model {at}/model --texts {at}/pairs.jsonl --layer 1 --width 64 --k 4 "
        "--tokens 1280 --batch 64 --buffer 256 --out {run}/own.safetensors",
        earlier="--seed 1"),
}
SELF_CHECK = Command("tools.self_check", "--run {run}")

# not the same bytes in every run
LOOSE = ("timings.json", "own.safetensors", "own.checkpoint.safetensors")


# ---------------------------------------------------------------- in the child: slow writes

class InPieces(io.FileIO):
    """A file whose every write is done a third at a time, with a pause behind each."""

    def write(self, data):
        data = bytes(data)
        size = len(data) // 3 + 1
        for at in range(0, len(data), size):
            super().write(data[at:at + size])
            sys.audit("faults.piece", self.name)
            time.sleep(PAUSE)
        return len(data)


def slow_down(run, own_writer):
    """Every file below `run` is written in pieces; pauses before a file is renamed or removed.

    own_writer: but stage files are written by safetensors itself, outside of Python.
    A file that comes into its place and was written otherwise is an error: then the slow writer
    misses a way of writing.
    """
    fast_open = builtins.open
    in_pieces = set()

    def below_run(path):
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(run)

    def slow_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
        if mode in ("r", "rb") or not below_run(file):
            return fast_open(file, mode, buffering, encoding, errors, newline, **more)
        assert not more, more
        in_pieces.add(str(file))
        raw = InPieces(file, mode.replace("b", ""))
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding, errors, newline)

    def save_in_pieces(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(safetensors.torch.save(tensors, metadata))

    def watch(event, args):
        if event not in ("os.rename", "os.remove") or not below_run(args[0]):
            return
        time.sleep(PAUSE)
        of_safetensors = own_writer and ".safetensors" in str(args[0])
        if event == "os.rename" and str(args[0]) not in in_pieces and not of_safetensors:
            raise AssertionError(f"not written in pieces: {args[0]}")

    mock.patch.object(builtins, "open", slow_open).start()      # open(…)
    mock.patch.object(io, "open", slow_open).start()            # Path.write_text, write_bytes
    if not own_writer:
        mock.patch.object(files, "save_file", save_in_pieces).start()
    sys.addaudithook(watch)


# ---------------------------------------------------------------- in the child: the command

# of every file: begun, a piece written, put in place
TOLD = ("os.mkdir", "faults.piece", "os.rename")


def child(command, run, words, stderr, told, slow=False, own_writer=False, halt=None, **limits):
    """Run the command; `told` is sent (what, when) as it starts, and of each event in TOLD.

    halt: how often it may tell of something; then it waits for the signal.
    """
    module = importlib.import_module(command.module)
    make_repeatable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module.__file__, *words]
    limit_what_it_may(run, **limits)

    numbers = itertools.count(1)

    def tell(what):
        told.send((what, time.monotonic()))
        if next(numbers) == halt:
            time.sleep(120)

    def listen(event, args):
        if event in TOLD and str(args[0]).startswith(run):
            tell(event)

    def main():
        sys.addaudithook(listen)
        if slow:
            slow_down(run, own_writer)
        tell("start")
        module.main()

    files.run_main(main, SAEError)


def make_repeatable():
    """What would differ between two children, or takes time that tests nothing."""
    draws, seed = 20, 0
    stage1 = importlib.import_module("01_extract")
    mock.patch.object(stage1, "SHARD_PAIRS", 8).start()
    mock.patch.object(os, "getpid", lambda: 7).start()      # two containers may count alike
    assert len(statistics.bootstrap.__defaults__) == 2
    statistics.bootstrap.__defaults__ = (draws, seed)
    tqdm.set_lock(threading.RLock())                    # no semaphore that a kill would leak


def limit_what_it_may(run, largest_file=None, one_shard=False, read_only=False):
    """largest_file: in bytes. one_shard: for all pairs. read_only: the folders, even for root."""
    if one_shard:
        mock.patch.object(importlib.import_module("01_extract"), "SHARD_PAIRS", 1024).start()
    if largest_file:        # Python ignores SIGXFSZ: the write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if read_only:
        for folder in (run, f"{run}/activations"):
            os.chmod(folder, 0o555)
        version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
        no_capabilities = (ctypes.c_uint32 * 6)()
        ctypes.CDLL(None).capset(version_3, no_capabilities)


# ---------------------------------------------------------------- running children

def start(world, command, run, more=None, **how):
    """Begin a command in a child → its process, the pipe that it tells through, its stderr."""
    text = f"{command.words} {command.now if more is None else more}"
    words = [word.format(at=world.at, run=run) for word in text.split()]
    ours, theirs = FORKS.Pipe(duplex=False)
    stderr = world.at / f"stderr-{time.monotonic_ns()}"
    args = (command, str(run), words, str(stderr), theirs)
    process = FORKS.Process(target=child, args=args, kwargs=how)
    process.start()
    return SimpleNamespace(process=process, told=ours, theirs=theirs, stderr=stderr)


def hear(job, count):
    """Wait until a command has told so many times of what it does."""
    for _ in range(count):
        assert job.told.poll(60), "nothing happens"
        job.told.recv()


def end(job):
    """→ exit code, lines on stderr (without the bar of transformers)."""
    job.process.join(120)
    lines = re.split(r"[\r\n]+", job.stderr.read_text())
    said = [line for line in lines if line and not line.startswith("Loading weights")]
    return job.process.exitcode, said


def call(*args, **how):
    """A command from its start to its end → exit code, lines on stderr."""
    return end(start(*args, **how))


def interrupt(world, fresh, name, send, draw, since, **how):
    """Send a signal to a slow command under way → its run, exit code, lines on stderr.

    draw, since: the moment, a share of the time between the start (since 0) or the first write
    (since 1) and the last write of a call that nothing happened to. Where this one ends earlier, it
    is tried again at an earlier moment.
    """
    times = [when for _, when in world.told[name]]
    for shrink in np.geomspace(1, 0.01, 8):
        run = fresh(world.before[name])
        job = start(world, COMMANDS[name], run, slow=True, **how)
        hear(job, since + 1)
        time.sleep(draw * shrink * (times[-1] - times[since]))
        code, said = end_with(job, send)
        if code:
            return run, code, said
    raise AssertionError("it always ended before the signal")


def kill_in_a_write(world, fresh, name, draw):
    """Kill a slow command right behind a piece of a file, or before its renaming.

    draw: which of them, a share of all. → its run, exit code, lines on stderr.
    """
    what_of = enumerate((what for what, _ in world.told[name]), 1)
    in_a_write = [n for n, what in what_of if what in ("faults.piece", "os.rename")]
    halt = in_a_write[int(draw * len(in_a_write))]
    run = fresh(world.before[name])
    job = start(world, COMMANDS[name], run, slow=True, halt=halt)
    hear(job, halt)
    return run, *end_with(job, signal.SIGKILL)


def end_with(job, send):
    """Send a signal → exit code, lines on stderr."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.process.pid, send)
    return end(job)


def unfinished(path):
    """Has it the name of a write under way?"""
    return path.is_file() and (path.name[0] == "." or path.suffix == ".part")


def bytes_of(run):
    """Name → bytes of the finished files of a run."""
    paths = [path for path in sorted(run.rglob("*")) if path.is_file()]
    finished = [path for path in paths if not unfinished(path)]
    return {str(path.relative_to(run)): path.read_bytes() for path in finished}


# ---------------------------------------------------------------- what the tests share

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The inputs, and what every command does when nothing happens to it.

    at            folder of the inputs
    before[name]  a run with the files of an earlier call of this command, and of all before it
    after[name]   its bytes after the command; told[name] what it told
    done          a run with everything done, and the checkpoint of a training that was killed
    """
    at = tmp_path_factory.mktemp("faults")
    start_fork_server()
    model = tiny.save_model(at / "model")
    tiny.save_pairs(at / "pairs.jsonl")
    tiny.save_sae(at / "sae.safetensors", layer=1, model=model)
    tiny.save_rows(at / "prompts.jsonl", [{"prompt": f"Is water wet, case {i}?"} for i in range(6)])

    world = SimpleNamespace(at=at, before={}, after={}, told={}, done=at / "done")
    for name, command in COMMANDS.items():
        code, said = call(world, command, world.done, command.earlier)
        assert code == 0, said
        world.before[name] = Path(shutil.copytree(world.done, at / "before" / name))
        job = start(world, command, world.done, slow=True)
        code, said = end(job)
        assert code == 0, said
        world.after[name] = bytes_of(world.done)
        world.told[name] = []
        while job.told.poll():
            world.told[name].append(job.told.recv())
    leave_a_checkpoint(world)

    yield world
    for title, counts in TABLE.items():
        print(f"\n{title:<36} {', '.join(f'{what} {n}' for what, n in counts.items())}", end="")
    print()


def start_fork_server():
    """The process that children are forked from, with everything imported."""
    scripts = [command.module for command in COMMANDS.values()]
    slow_imports = ["transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        FORKS.set_forkserver_preload([*scripts, *slow_imports, __name__])
        forkserver.ensure_running()


def leave_a_checkpoint(world):
    """Kill a training of an SAE between two of its checkpoints."""
    job = start(world, COMMANDS["train sae"], world.done)
    hear(job, 4)                # started, a checkpoint begun, put in place, the next one begun
    job.process.kill()
    assert end(job)[0] == -signal.SIGKILL


@pytest.fixture
def fresh(tmp_path):
    """folder → a copy of it, the one before thrown away."""
    def copy(folder, name="run"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return Path(shutil.copytree(folder, tmp_path / name))
    return copy


def generator_for(name, among):
    """Random numbers that are the same in every session."""
    return np.random.default_rng(list(among).index(name))


def assert_whole(world, name, run, why):
    """Every file is the old one or the new one, and none that both have is missing."""
    old, new, found = bytes_of(world.before[name]), world.after[name], bytes_of(run)
    lost = (old.keys() & new.keys()) - found.keys()
    assert not lost, (lost, why)
    for file, data in found.items():
        if file not in LOOSE:
            assert data in (old.get(file), new.get(file)), (file, why)
        elif file.endswith(".json"):
            json.loads(data)
        else:
            safetensors.torch.load(data)


def assert_ends_with(world, name, run, wanted, why):
    """The command ends well, with these files."""
    code, said = call(world, COMMANDS[name], run)
    assert code == 0, (said, why)
    assert_same(bytes_of(run), wanted, why)


def assert_same(found, wanted, why):
    """The same names, and the same bytes but for those that no two runs share."""
    assert found.keys() == wanted.keys(), (found.keys() ^ wanted.keys(), why)
    different = [file for file in found if file not in LOOSE and found[file] != wanted[file]]
    assert not different, (different, why)


def assert_refused(code, said, why=""):
    """Exit code 2 and one line in three parts."""
    three_parts = r"error: .+ · (?!None).+ · .+"
    assert (code, len(said)) == (2, 1), (code, "\n".join(said), why)
    assert re.fullmatch(three_parts, said[0]), (said, why)


# ---------------------------------------------------------------- kills and stops

@pytest.mark.parametrize("name", COMMANDS)
def test_after_a_kill_files_are_old_or_new_and_the_command_ends_as_ever(world, fresh, name):
    rng = generator_for(name, COMMANDS)
    counts = TABLE[f"kill -9 · {name}"]
    for n in range(KILLS):
        draw = rng.random()
        if n % 2 == 0:
            run, code, said = kill_in_a_write(world, fresh, name, draw)
        else:               # at any moment between the first write and the last
            own_writer = n % 4 == 3
            run, code, said = interrupt(world, fresh, name, signal.SIGKILL, draw, 1,
                                        own_writer=own_writer)
        left = [path.name for path in run.rglob("*") if unfinished(path)]
        why = f"{name}: kill {n} at {draw:.3f} of its writing, which left {left}"
        assert code == -signal.SIGKILL, ("\n".join(said), why)
        old = bytes_of(run) == bytes_of(world.before[name])
        counts.update({"kills": 1, "hit a write": bool(left), "no new file yet": old})

        assert_whole(world, name, run, why)
        counts["every file whole"] += 1
        if COMMANDS[name].next:
            copy = fresh(run, "next")
            counts[f"next stage {went_on_or_refused(world, COMMANDS[name].next, copy, why)}"] += 1
        assert_ends_with(world, name, run, world.after[name], why)
        counts["same bytes in the end"] += 1
    assert counts["hit a write"] >= KILLS / 2, counts       # else it says little


def went_on_or_refused(world, name, run, why):
    """The next stage takes the files that lie there, or says that they do not belong together."""
    code, said = call(world, COMMANDS[name], run)
    if code:
        assert_refused(code, said, why)
    return "refused" if code else "went on"


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_one_line_and_code_130_and_the_same_command_goes_on(world, fresh, name):
    rng = np.random.default_rng(100 + list(COMMANDS).index(name))
    for draw in 0.05 + 0.9 * rng.random(STOPS):
        run, code, said = interrupt(world, fresh, name, signal.SIGINT, draw, 0)
        left = [path.name for path in run.rglob(".*")]
        why = f"{name}: stopped at {draw:.2f} of its time, which left {left}"
        assert (code, len(said)) == (130, 1), (code, "\n".join(said), why)
        assert said[0].startswith("stopped · "), (said, why)
        assert not left, why
        old = bytes_of(run) == bytes_of(world.before[name])

        assert_whole(world, name, run, why)
        assert_ends_with(world, name, run, world.after[name], why)
        TABLE[f"Ctrl-C · {name}"].update(
            {"stopped": 1, "no new file yet": old, "same bytes in the end": 1})


# ---------------------------------------------------------------- no space, no right, two at once

FULL = [        # command, and how large a file may become
    ("01", 2000),
    ("01", 15000),          # pairs.jsonl fits, its only shard does not
    ("02", 2000),
    ("03", 2000),
    ("04", 2000),
    ("04", 20000),
    ("05 sample", 1000),
    ("05 pairs", 1000),
    ("train sae", 2000),
]


@pytest.mark.parametrize("name, largest_file", FULL)
def test_a_full_disk_is_one_line_with_the_file_and_earlier_files_stay(
        world, fresh, name, largest_file):
    run = fresh(world.before[name])
    assert_fails_and_recovers(world, name, run, "too large", largest_file=largest_file)
    TABLE["full disk · all"].update({"tried": 1, "one line, same bytes in the end": 1})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_folder_is_one_line_with_the_file_and_earlier_files_stay(world, fresh, name):
    run = fresh(world.before[name])
    assert_fails_and_recovers(world, name, run, "denied", read_only=True)
    TABLE["read-only folder · all"].update({"tried": 1, "one line, same bytes in the end": 1})


def assert_fails_and_recovers(world, name, run, reason, **limits):
    """One line with a file of the run and the reason; without the limits the end is as ever."""
    code, said = call(world, COMMANDS[name], run, one_shard=True, **limits)
    for folder in (run, run / "activations"):
        folder.chmod(0o755)
    assert_refused(code, said)
    assert str(run) in said[0] and reason in said[0], said
    assert not list(run.rglob(".*")), said
    assert_whole(world, name, run, said)
    assert_ends_with(world, name, run, world.after[name], said)


@pytest.mark.parametrize("name", COMMANDS)
def test_two_at_once_in_one_folder_both_end_well_with_the_bytes_of_one(world, fresh, name):
    run = fresh(world.before[name])
    jobs = [start(world, COMMANDS[name], run, slow=True) for _ in range(2)]
    ends = [end(job) for job in jobs]
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same(bytes_of(run), world.after[name], name)


# ---------------------------------------------------------------- damaged files

def cut(data, rng):
    """Cut anywhere."""
    return data[:rng.integers(len(data))]


def without_end(data, rng):
    """The last line is cut."""
    return data[:-20]


def edited(data, rng):
    """By hand, and still valid."""
    return data.replace(b"wet", b"dry", 1)


def a_list(data, rng):
    """Valid JSON of another kind."""
    return b"[]\n"


def header_bit(data, rng):
    """One bit of the length of a safetensors header; elsewhere in it one may go unseen."""
    at = rng.integers(64)
    flipped = bytearray(data)
    flipped[at // 8] ^= 1 << at % 8
    return bytes(flipped)


@dataclass(frozen=True)
class Damaged:
    """What may be done to a file of a run, which commands make it anew, and which refuse it."""
    damages: list
    makers: list
    readers: list = ()


OF_STAGE_FILES = [cut] + [header_bit] * FLIPS
FILES = {
    "pairs.jsonl": Damaged([edited, cut], ["01"], ["02", "04"]),
    "activations/layer1-mean-00001-of-00008.safetensors": Damaged(
        OF_STAGE_FILES, ["01"], ["02", "04"]),
    "features.safetensors": Damaged(OF_STAGE_FILES, ["02"], ["03", "04"]),
    "reward_head.safetensors": Damaged(OF_STAGE_FILES, ["03"], ["04", "05 sample", "05 pairs"]),
    "evaluation.json": Damaged([cut, a_list], ["04"]),
    "candidates.jsonl": Damaged([without_end], ["05 sample"], ["05 pairs"]),
    "own.checkpoint.safetensors": Damaged(OF_STAGE_FILES, [], ["train sae"]),
}


def damaged_copies(world, fresh, file, names):
    """Yield, for each damage and command: its name, a run with the file damaged, why."""
    rng = generator_for(file, FILES)
    for n, damage in enumerate(FILES[file].damages):
        for name in names:
            run = fresh(world.done)
            (run / file).write_bytes(damage((run / file).read_bytes(), rng))
            yield name, run, f"{damage.__name__}, case {n}: {file} for {name}"


@pytest.mark.parametrize("file", [file for file in FILES if FILES[file].makers])
def test_a_damaged_file_is_made_anew_by_the_command_that_makes_it(world, fresh, file):
    whole = bytes_of(world.done)
    for name, run, why in damaged_copies(world, fresh, file, FILES[file].makers):
        assert_ends_with(world, name, run, whole, why)
        TABLE[f"{Path(file).name} · {name}"].update({"damaged": 1, "made anew": 1})


@pytest.mark.parametrize("file", [file for file in FILES if FILES[file].readers])
def test_a_damaged_file_is_refused_in_one_line_by_those_that_read_it(world, fresh, file):
    for name, run, why in damaged_copies(world, fresh, file, FILES[file].readers):
        found = bytes_of(run)
        assert_refused(*call(world, COMMANDS[name], run), why)
        assert bytes_of(run) == found, why
        TABLE[f"{Path(file).name} · {name}"].update({"damaged": 1, "refused": 1})


@pytest.mark.parametrize("damage", FILES["pairs.jsonl"].damages)
def test_the_self_check_says_that_changed_pairs_do_not_belong_to_the_run(world, fresh, damage):
    run = fresh(world.done)
    pairs = run / "pairs.jsonl"
    pairs.write_bytes(damage(pairs.read_bytes(), np.random.default_rng(0)))
    assert call(world, SELF_CHECK, run) == (1, [])


def test_the_self_check_finds_nothing_in_a_whole_run(world, fresh):
    assert call(world, SELF_CHECK, fresh(world.done)) == (0, [])
