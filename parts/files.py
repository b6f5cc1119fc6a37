"""Files between the stages: whole or absent, with their lineage; and errors of one line.

A stage file is safetensors with one metadata key, `sparserm`: sorted JSON with the settings and the
SHA-256 of what it was made from.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import traceback
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parts.contents import what_is_wrong, wrong_numbers


class UserError(ValueError):
    """Something the user can mend; its text is `what is wrong · where · what to do`."""


@contextlib.contextmanager
def moved_into_place(path):
    """Gives a temporary path, moved to `path` at the end: a kill leaves the old file or the new.

    Folders that it had to make go again where nothing came to lie in them.
    """
    path = Path(path)
    part = part_of(path)
    with parents_made(path):
        try:
            with named_in_errors(path):
                part.touch()
                # safetensors would leave a file that only its owner can read
                mode = part.stat().st_mode
                yield part
                part.chmod(mode)
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_moved_into_place(path):
    """Gives a temporary folder, moved to `path` at the end; there must be no folder with files yet.

    What a killed process left of the same name goes first (so does a running one's: two that write
    one folder at a time are not meant).
    """
    path = Path(path)
    for abandoned in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 8}.part"):
        shutil.rmtree(abandoned, ignore_errors=True)
    part = part_of(path)
    with folder_named_in_errors(path), parents_made(path):
        try:
            part.mkdir()
            yield part
            os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def part_of(path):
    """The temporary name, beside `path`, of what is moved there."""
    # a process id would not do: two containers may share it
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")


@contextlib.contextmanager
def parents_made(path):
    """Make the folders above a path; those that are empty in the end go again."""
    new_folders = [folder for folder in path.parents if not folder.exists()]    # the deepest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):      # not empty: something does lie there
            for folder in new_folders:
                folder.rmdir()


@contextlib.contextmanager
def folder_named_in_errors(path):
    """A full disk or a place without rights, told by the name that was asked for."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot be written ({reason}) · {path} · "
                        "check the rights, the place and the free space") from None


@contextlib.contextmanager
def named_in_errors(path):
    """A full disk is an OSError without a file name in Python, and none at all in safetensors."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        raise UserError(f"cannot be written ({error}) · {path} · "
                        "check the rights and the free space") from None


def save_stage(path, tensors, meta):
    """Write tensors and one metadata key `sparserm` (sorted JSON)."""
    with moved_into_place(path) as part:
        save_file({name: t.contiguous() for name, t in tensors.items()}, part,
                  metadata={"sparserm": json.dumps(meta, sort_keys=True)})


def read_meta(path, made_by="an earlier stage", stage=None):
    """The settings and parents recorded in a stage file, of stage `stage` if given → Settings.

    The file's tensors are checked too, by the header alone: names, types and shapes.
    """
    if Path(path).is_dir():
        raise UserError(f"a folder, where a file of {made_by} is read · {path} · name the file")
    with told_where_moved(path):
        try:
            table, tensors = read_header(path)
        except FileNotFoundError:
            raise UserError(f"file not found · {path} · run {made_by} first, or name the "
                            "right folder or file") from None
        except (SafetensorError, KeyError, ValueError, TypeError, RecursionError):
            raise UserError(f"not a complete stage file · {path} · "
                            f"delete it and run {made_by} again") from None
    advice = f"{path} · it is damaged or of another version: delete it and run {made_by} again"
    meta = Settings(table, advice, tensors)
    if stage and meta.get("stage") != stage:
        raise UserError(f"not a file of stage {made_by[1]} · {path} · run {made_by} again")
    wrong = what_is_wrong(meta, tensors)
    if wrong:
        raise UserError(f"{wrong} · {advice}")
    return meta


def read_header(path):
    """→ (settings, {tensor: (type, shape)}) of a stage file, without reading its numbers."""
    with safe_open(path, "pt") as file:
        table = dict(json.loads((file.metadata() or {})["sparserm"]))
        tensors = {}
        for name in file.keys():
            tensor = file.get_slice(name)
            tensors[name] = (tensor.get_dtype(), tensor.get_shape())
    return table, tensors


class Settings(dict):
    """Settings of a stage file; one that is asked for and missing is an error with a cause."""

    def __init__(self, table, advice, tensors=()):
        """advice: where · what to do. tensors: their names."""
        super().__init__(table)
        self.advice = advice
        self.tensors = list(tensors)
        for name, value in self.items():
            if isinstance(value, dict):
                self[name] = Settings(value, advice)        # parent, settings

    def __missing__(self, name):
        raise UserError(f"setting {name} is missing · {self.advice}")


def up_to_date(path, wanted):
    """Is this stage file complete, and made with these settings from these parents?"""
    try:
        found = read_meta(path)
    except UserError:
        return False
    return all(found.get(key) == value for key, value in wanted.items())


def state_of(path):
    """What tells a file from one that was put in its place; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


class Moved(UserError):
    """Another process has put another file in the place of the one that is read."""

    def __init__(self, path):
        super().__init__(f"gone or replaced while it was read · {path} · run the command again")


@contextlib.contextmanager
def told_where_moved(path):
    """Another process may move the file while it is opened: torch then says RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if "unable to open file" not in str(error):
            raise
        raise Moved(path) from None


READINGS = 5        # of a file that other processes replace again and again


def load_stage(path, made_by="an earlier stage", stage=None):
    """→ (tensors, metadata) of a stage file. One that is replaced meanwhile is read anew."""
    for _ in range(READINGS - 1):
        with contextlib.suppress(Moved):
            return read_stage(path, made_by, stage)
    return read_stage(path, made_by, stage)


def read_stage(path, made_by, stage):
    """→ (tensors, metadata), all of one file: raises Moved where another one came in its place."""
    before = state_of(path)
    try:
        meta = read_meta(path, made_by, stage)
        tensors = read_tensors(path, meta.tensors)
    except Exception:               # whatever half of one file and half of another may look like
        if state_of(path) != before:
            raise Moved(path) from None
        raise
    if state_of(path) != before:
        raise Moved(path)
    wrong = wrong_numbers(tensors)
    if wrong:
        raise UserError(f"{wrong} · {meta.advice}")
    return tensors, meta


def read_tensors(path, names):
    """→ {name: tensor}."""
    tensors = {}
    for name in names:
        with safe_open(path, "pt") as file:     # opened anew: the last one's pages are freed
            tensors[name] = file.get_tensor(name).clone()
    return tensors


def check_finite(table, where):
    """Refuse NaN and Inf in chosen or rejected [n, d], and name the pair."""
    for side in ("chosen", "rejected"):
        bad = (~table[side].isfinite()).any(1).nonzero().flatten()
        if len(bad):
            raise UserError(f"NaN or Inf in {side}, line {int(table['pair'][bad[0]]) + 1} of "
                            f"pairs.jsonl · {where} · "
                            "delete it, and run the stage that made it again")


def write_text(path, text):
    """Write a text file."""
    with moved_into_place(path) as part:
        # half of a UTF-16 pair stays a JSON escape
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_rows(path, rows):
    """Write a JSONL file."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    write_text(path, "".join(lines))


def read_json_rows(path):
    """A JSONL file that the project has written → list of rows."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def file_hash(path):
    """SHA-256 of a file, in hex. Within a command a file is read for it once, unless it changes."""
    now = os.stat(path)
    return hash_once(os.path.abspath(path), now.st_ino, now.st_size, now.st_mtime_ns)


@functools.cache
def hash_once(path, *state):
    """The work of file_hash()."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- the end of a command

READER_GONE = 141       # what a shell reports of a command that SIGPIPE has ended


def run_main(main, *errors):
    """Call main(). An error becomes one line and exit code 2, or its traceback with --debug.

    errors: further types whose text says what, where and what to do. Ctrl-C ends with one line and
    130. Where the reader of the output goes away (`| head`), the command ends at its next line
    without a word, with 141. In both cases finished files stay, and the same command goes on.
    """
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]         # at any place in the line
    stopped = []
    before = signal.getsignal(signal.SIGINT)

    def stop(*_):           # torch and others may make another exception of KeyboardInterrupt
        stopped.append(True)
        raise KeyboardInterrupt

    ours = before is signal.default_int_handler     # else it is ignored (nohup), or the caller's
    if ours:
        signal.signal(signal.SIGINT, stop)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(READER_GONE)
    except (Exception, KeyboardInterrupt) as error:
        if stopped or isinstance(error, KeyboardInterrupt):
            tell("\nstopped · finished files are kept · the same command goes on from there")
            sys.exit(130)
        if debug:
            raise
        tell("error: " + " ".join(message_of(error, errors).split()))
        sys.exit(2)
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
        let_go_of_broken_pipes()


def tell(line):
    """A line on stderr, if anybody reads it."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr)


def let_go_of_broken_pipes():
    """What nobody reads any more goes nowhere: Python would try once more at exit, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def message_of(error, errors):
    """What went wrong, where, and what to do → str. errors: the types whose text says so itself."""
    if isinstance(error, (UserError, *errors)):
        return str(error)
    if isinstance(error, OSError):
        return (f"{error.strerror or error} · {error.filename or 'input or output'} · "
                "check the path, the rights and the free space")
    line = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(line.filename).name}, line {line.lineno}"
    if isinstance(error, (MemoryError, RuntimeError)) and NO_MEMORY.search(repr(error)):
        return (f"out of memory ({error}) · {place} · "
                "fewer or shorter texts, a smaller model or SAE, or more memory")
    return (f"unexpected {type(error).__name__}: {error} · {place} · "
            "a fault of the script, or a case that it does not know: run it again with --debug, "
            "and report what that prints")


NO_MEMORY = re.compile("MemoryError|can't allocate memory|out of memory")
