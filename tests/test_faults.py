"""A stage that is killed, stopped, out of disk, shut out, run twice at once or given damaged files: what lies there is whole, what
the user reads is one line, and the same command ends with the bytes of a run that nothing happened to.

Children are forked from a process that has imported everything. In most of them files are written in pieces, with pauses between
these and before the renaming, so that a kill hits a write often enough. SPARSERM_FAULTS=all: 203 kills and more damage; -s: a table.
"""

import collections
import contextlib
import ctypes
import importlib
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
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import tiny
from tqdm import tqdm

from parts import sae_tools

KILLS, STOPS, FLIPS = (29, 8, 60) if os.environ.get("SPARSERM_FAULTS") == "all" else (2, 1, 1)       # a stage; a damaged file and reader
PAUSE = 0.004
HEAD = "--reward {run}/reward_head.safetensors"
COMMANDS = {        # script, arguments, more of them in the earlier run, whose files lie there, and in this one
    "01": ("01_extract", "--model {at}/model --pairs {at}/pairs.jsonl --layer 1 --run {run}", "--limit 30", ""),
    "02": ("02_select_features", "--run {run} --sae {at}/sae.safetensors", "--k 3", "--k 4"),
    "03": ("03_train_head", "--run {run} --epochs 4", "--seeds 1", "--seeds 2"),
    "04": ("04_evaluate", "--run {run} --texts 0 --seeds 1", "--sweeps small", "--sweeps none"),
    "05 sample": ("05_best_of_n", f"sample {HEAD} --prompts {{at}}/prompts.jsonl --n 3 --max-new-tokens 8", "--seed 1", ""),
    "05 pairs": ("05_best_of_n", f"pairs {HEAD} --candidates {{run}}/candidates.jsonl --out {{run}}/dpo.jsonl", "--min-margin 0.5", ""),
    "sae": ("sae", "train --model {at}/model --texts {at}/pairs.jsonl --layer 1 --out {run}/own.safetensors --width 64 --k 4 "
            "--tokens 1280 --batch 64 --buffer 256", "--seed 1", ""),
}
NEXT = {"01": "02", "02": "03", "03": "04", "05 sample": "05 pairs"}
LOOSE = ("timings.json", "own.safetensors", "own.checkpoint.safetensors")       # not the same bytes in every run
FORKS, TABLE = multiprocessing.get_context("forkserver"), collections.defaultdict(collections.Counter)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, signals and limits in Linux's way")


# ---------------------------------------------------------------- in the child

def in_pieces(path, data):
    """Write bytes, a third at a time."""
    with open(path, "wb") as file:
        for at in range(0, len(data), len(data) // 3 + 1):
            file.write(data[at:at + len(data) // 3 + 1])
            file.flush()
            time.sleep(PAUSE)


def slow_down(own_writer):
    """Pauses in every write, rename and removal. own_writer: safetensors writes its files itself, without."""
    late = lambda event, args: event in ("os.rename", "os.remove") and not str(args[-1]).endswith(".part") and time.sleep(PAUSE)
    sys.addaudithook(late)
    for name in () if own_writer else ("01_extract", "sae"):
        importlib.import_module(name).save_file = lambda tensors, path, metadata: in_pieces(path, safetensors.torch.save(tensors, metadata))
    Path.write_bytes = in_pieces
    Path.write_text = lambda path, text, encoding, errors: in_pieces(path, text.encode(encoding, errors))


def child(name, run, words, stderr, told, slow=False, own_writer=False, limit=None, bound=False, shard=8):
    """`python SCRIPT words`; sends the time when it starts, begins a file, puts it in place.

    slow, own_writer: see slow_down. limit: no file may grow larger than so many bytes. bound: not even root may write into its folders.
    """
    stage1, module = importlib.import_module("01_extract"), importlib.import_module(COMMANDS[name][0])
    for number, path in ((1, os.devnull), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, stage1.SHARD_PAIRS, os.getpid = [module.__file__, *words], shard, lambda: 7       # two containers may count alike
    tqdm.set_lock(threading.RLock())            # no semaphore that a kill would leak
    importlib.import_module("04_evaluate").bootstrap.__defaults__ = (20, 0)     # draws: time is not what is tested here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if slow:
        slow_down(own_writer)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))       # Python ignores SIGXFSZ: the write fails, as on a full disk
    if bound:
        for folder in (run, f"{run}/activations"):
            os.chmod(folder, 0o555)
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    seen = lambda event, args: event in ("os.mkdir", "os.rename") and str(args[0]).startswith(run) and told.send(time.monotonic())

    def main():
        sys.addaudithook(seen)
        told.send(time.monotonic())
        (module if hasattr(module, "main") else sae_tools).main()
    stage1.run_main(main, *([module.SAEError] if hasattr(module, "SAEError") else []))


# ---------------------------------------------------------------- what the tests share

def start(world, name, run, more=None, **how):
    """Begin a command in a child → process, the end of the pipe that it tells times through, the file of its stderr."""
    _, arguments, _, now = COMMANDS[name]
    words = [w.format(at=world.at, run=run) for w in f"{arguments} {now if more is None else more}".split()]
    (ours, theirs), stderr = FORKS.Pipe(duplex=False), world.at / f"stderr-{time.monotonic_ns()}"
    process = FORKS.Process(target=child, args=(name, str(run), words, str(stderr), theirs), kwargs=how)
    process.start()
    return SimpleNamespace(process=process, told=ours, theirs=theirs, stderr=stderr)


def hear(job, count):
    """Wait until a command has told of so many starts, begun files and files put in place → when the last was."""
    for _ in range(count):
        assert job.told.poll(60), "nothing happens"
        last = job.told.recv()
    return last


def end(job):
    """→ exit code, lines on stderr (without the bar of transformers)."""
    job.process.join(120)
    said = [line for line in re.split(r"[\r\n]+", job.stderr.read_text()) if line and not line.startswith("Loading weights")]
    return job.process.exitcode, said


def call(*args, **how):
    return end(start(*args, **how))


def unfinished(path):
    """Has it the name of a write under way?"""
    return path.is_file() and (path.name[0] == "." or path.suffix == ".part")


def bytes_of(run):
    """Name → bytes of the finished files of a run."""
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and not unfinished(p)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder `at` with the inputs; `before[name]`: a run with the files of an earlier call of this command and of all stages before it;
    `after[name]`: its bytes after a call without a fault, `times[name]` of that; `done`: a run with all stages done, and a checkpoint."""
    at = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        FORKS.set_forkserver_preload([*(script for script, *_ in COMMANDS.values()), "transformers.models.llama.modeling_llama",
                                      "matplotlib.backends.backend_agg", __name__])
        forkserver.ensure_running()
    model, _ = tiny.save_model(at / "model"), tiny.save_pairs(at / "pairs.jsonl")
    tiny.save_sae(at / "sae.safetensors", layer=1, model=model)
    tiny.save_rows(at / "prompts.jsonl", [{"prompt": f"Is water wet, case {i}?"} for i in range(6)])
    world = SimpleNamespace(at=at, before={}, after={}, times={}, done=at / "done")
    for name, (*_, earlier, _) in COMMANDS.items():
        code, said = call(world, name, world.done, earlier)
        assert code == 0, said
        world.before[name] = Path(shutil.copytree(world.done, at / "before" / name))
        job = start(world, name, world.done, slow=True)
        assert end(job)[0] == 0
        world.after[name], world.times[name] = bytes_of(world.done), []
        while job.told.poll():
            world.times[name].append(job.told.recv())
    job = start(world, "sae", world.done)
    hear(job, 4)                # started, a checkpoint begun, put in place, the next one begun
    job.process.kill()
    assert end(job)[0] == -signal.SIGKILL
    yield world
    print("", *(f"{f:<36} {', '.join(f'{what} {n}' for what, n in counts.items())}" for f, counts in TABLE.items()), sep="\n")


@pytest.fixture
def fresh(tmp_path):
    """folder → a copy of it, the one before thrown away."""
    def copy(folder, name="run"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return Path(shutil.copytree(folder, tmp_path / name))
    return copy


def interrupt(world, fresh, name, send, draw, since, **how):
    """Send a signal at a moment drawn between the start (since 0) or the first write (1) and the last → run, exit code, stderr."""
    times = world.times[name]
    for shrink in np.geomspace(1, 0.01, 8):                 # where this call is faster than that of times: earlier
        run = fresh(world.before[name])
        job = start(world, name, run, **how)
        hear(job, since + 1)
        time.sleep(draw * shrink * (times[-1] - times[since]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.process.pid, send)
        code, said = end(job)
        if code:
            return run, code, said
    raise AssertionError("it always ended before the signal")


def assert_whole(world, name, run, why):
    """Every file is the old one or the new one."""
    old, new, found = bytes_of(world.before[name]), world.after[name], bytes_of(run)
    assert old.keys() & new.keys() <= found.keys(), why
    for file, data in found.items():
        if file in LOOSE:
            (json.loads if file.endswith(".json") else safetensors.torch.load)(data)
        else:
            assert data in (old.get(file), new.get(file)), (file, why)


def assert_ends_with(world, name, run, wanted, why):
    """The command ends well, with these files."""
    code, said = call(world, name, run)
    assert code == 0, (said, why)
    assert_same(bytes_of(run), wanted, why)


def assert_same(found, wanted, why):
    different = [n for n in found.keys() | wanted.keys() if n not in found or n not in wanted or found[n] != wanted[n] and n not in LOOSE]
    assert not different, (different, why)


def assert_refused(code, said, why=""):
    """Exit code 2 and one line in three parts."""
    assert code == 2 and len(said) == 1 and re.fullmatch(r"error: .+ · (?!None).+ · .+", said[0]), (code, "\n".join(said), why)


# ---------------------------------------------------------------- the faults

@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_leaves_old_or_new_files_and_the_same_command_ends_with_the_same_bytes(world, fresh, name):
    rng, counts = np.random.default_rng(list(COMMANDS).index(name)), TABLE[f"kill -9 · {name}"]
    for n in range(KILLS):
        draw = rng.random()
        run, code, said = interrupt(world, fresh, name, signal.SIGKILL, draw, 1, slow=True, own_writer=n % 4 == 3)
        left, old = [p.name for p in run.rglob("*") if unfinished(p)], bytes_of(run) == bytes_of(world.before[name])
        counts.update({"kills": 1, "hit a write": bool(left), "no new file yet": old})
        why = f"{name}: killed at {draw:.2f} of its writing, which left {left}; so far {dict(counts)}"
        assert code == -signal.SIGKILL, ("\n".join(said), why)
        assert_whole(world, name, run, why)
        if name in NEXT:                            # takes the files that lie there, or says that they do not belong together
            code, said = call(world, NEXT[name], fresh(run, "next"))
            counts[f"next stage {'went on' if code == 0 else 'refused'}"] += 1
            assert code == 0 or assert_refused(code, said, why) is None
        assert_ends_with(world, name, run, world.after[name], why)
        counts["same bytes in the end"] += 1


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_one_line_and_exit_code_130_and_the_same_command_goes_on(world, fresh, name):
    rng = np.random.default_rng(100 + list(COMMANDS).index(name))
    for draw in 0.05 + 0.9 * rng.random(STOPS):
        run, code, said = interrupt(world, fresh, name, signal.SIGINT, draw, 0, slow=True)
        left, old = [p.name for p in run.rglob(".*")], bytes_of(run) == bytes_of(world.before[name])
        why = f"{name}: stopped at {draw:.2f} of its time, which left {left}"
        assert code == 130 and len(said) == 1 and said[0].startswith("stopped · ") and not left, (code, "\n".join(said), why)
        assert_whole(world, name, run, why)
        assert_ends_with(world, name, run, world.after[name], why)
        TABLE[f"Ctrl-C · {name}"].update({"stopped": 1, "no new file yet": old, "same bytes in the end": 1})


FULL = [("01", 2000), ("01", 15000), ("02", 2000), ("03", 2000), ("04", 2000), ("04", 20000), ("05 sample", 1000), ("05 pairs", 1000),
        ("sae", 2000)]              # 01, 15000: pairs.jsonl fits, its only shard does not


@pytest.mark.parametrize("name, how", [*((n, {"limit": most}) for n, most in FULL), *((n, {"bound": True}) for n in COMMANDS)], ids=str)
def test_a_full_disk_or_a_folder_without_the_right_to_write_is_one_line_that_names_the_file_and_earlier_files_stay(world, fresh, name, how):
    run = fresh(world.before[name])
    code, said = call(world, name, run, **how, shard=1024)
    for folder in (run, run / "activations"):
        folder.chmod(0o755)
    assert_refused(code, said)
    assert str(run) in said[0] and re.search("too large|denied", said[0]) and not list(run.rglob(".*")), said
    assert_whole(world, name, run, said)
    assert_ends_with(world, name, run, world.after[name], said)
    TABLE["full disk · all" if "limit" in how else "read-only folder · all"].update({"tried": 1, "one line, same bytes in the end": 1})


@pytest.mark.parametrize("name", COMMANDS)
def test_two_at_once_in_one_folder_both_end_well_with_the_bytes_of_one(world, fresh, name):
    run = fresh(world.before[name])
    ends = [end(job) for job in [start(world, name, run, slow=True) for _ in range(2)]]
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same(bytes_of(run), world.after[name], name)


def cut(data, rng):
    return data[:rng.integers(len(data))]


def header_bit(data, rng):
    """One bit flipped in the length of a safetensors header (in its text or the numbers it may go unseen: there is no checksum)."""
    at, flipped = rng.integers(64), bytearray(data)
    flipped[at // 8] ^= 1 << at % 8
    return bytes(flipped)


SHARD, KINDS = "activations/layer1-00001-of-00008.safetensors", [cut] + [header_bit] * FLIPS
DAMAGED = {         # file: (damages, who makes it anew, who refuses it)
    "pairs.jsonl": ([lambda data, rng: data.replace(b"wet", b"dry", 1), cut], ["01"], ["02", "04"]),
    SHARD: (KINDS, ["01"], ["02", "04"]),
    "features.safetensors": (KINDS, ["02"], ["03", "04"]),
    "reward_head.safetensors": (KINDS, ["03"], ["04", "05 sample", "05 pairs"]),
    "evaluation.json": ([cut, lambda data, rng: b"[]\n"], ["04"], []),
    "candidates.jsonl": ([lambda data, rng: data[:-20]], ["05 sample"], ["05 pairs"]),
    "own.checkpoint.safetensors": (KINDS, [], ["sae"]),
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_is_made_anew_by_its_own_stage_and_refused_in_one_line_by_the_others(world, fresh, file):
    damages, makers, readers = DAMAGED[file]
    whole, rng = bytes_of(world.done), np.random.default_rng(list(DAMAGED).index(file))
    for n, (damage, name) in enumerate((damage, name) for damage in damages for name in makers + readers):
        run, data = fresh(world.done), damage(whole[file], rng)
        (run / file).write_bytes(data)
        why = f"{damage.__name__}, case {n}: {file} for {name}"
        if name in makers:
            assert_ends_with(world, name, run, whole, why)
        else:
            assert_refused(*call(world, name, run), why)
            assert bytes_of(run) == whole | {file: data}, why
        TABLE[f"{file.rpartition('/')[2]} · {name}"].update({"damaged": 1, "made anew" if name in makers else "refused": 1})


@pytest.mark.parametrize("damage", DAMAGED["pairs.jsonl"][0])
def test_the_self_check_says_that_edited_pairs_do_not_belong_to_the_run(world, fresh, damage):
    run = fresh(world.done)
    (run / "pairs.jsonl").write_bytes(damage((run / "pairs.jsonl").read_bytes(), np.random.default_rng(0)))
    assert call(world, "03", run, "--check") == (1, [])
