"""Files between the stages: whole or absent, with their lineage; and errors of one line.

A stage file is safetensors with one metadata key, `sparserm`: sorted JSON with the settings and the
SHA-256 of what it was made from.
"""

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class UserError(ValueError):
    """Something the user can mend; its text is `what is wrong · where · what to do`."""


@contextlib.contextmanager
def moved_into_place(path):
    """Gives a temporary path, moved to `path` at the end: a kill leaves the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a process id would not do: two containers may share it
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
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
    """The settings and parents recorded in a stage file, of stage `stage` if given → dict."""
    try:
        with safe_open(path, "pt") as file:
            meta = dict(json.loads((file.metadata() or {})["sparserm"]))
    except FileNotFoundError:
        raise UserError(f"file not found · {path} · run {made_by} first, or name the "
                        "right folder or file") from None
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"not a complete stage file · {path} · "
                        f"delete it and run {made_by} again") from None
    if stage and meta.get("stage") != stage:
        raise UserError(f"not a file of stage {made_by[1]} · {path} · run {made_by} again")
    return meta


def up_to_date(path, wanted):
    """Is this stage file complete, and made with these settings from these parents?"""
    try:
        found = read_meta(path)
    except UserError:
        return False
    return all(found.get(key) == value for key, value in wanted.items())


def load_stage(path, made_by="an earlier stage", stage=None):
    """→ (tensors, metadata) of a stage file."""
    meta = read_meta(path, made_by, stage)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, meta


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
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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


def run_main(main, *errors):
    """Call main(); an error becomes one line and exit code 2 (--debug: the traceback)."""
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
    except (Exception, KeyboardInterrupt) as error:
        if stopped or isinstance(error, KeyboardInterrupt):
            print("\nstopped · finished files are kept · the same command goes on from there",
                  file=sys.stderr)
            sys.exit(130)
        if "--debug" in sys.argv:
            raise
        one_line = " ".join(message_of(error, errors).split())
        print(f"error: {one_line}", file=sys.stderr)
        sys.exit(2)
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def message_of(error, errors):
    """What went wrong, where, and what to do → str. errors: the types whose text says so itself."""
    if isinstance(error, (UserError, *errors)):
        return str(error)
    if isinstance(error, OSError):
        return (f"{error.strerror or error} · {error.filename or 'input or output'} · "
                "check the path, the rights and the free space")
    line = traceback.extract_tb(error.__traceback__)[-1]  # no check names it, or a fault of ours
    return (f"unexpected {type(error).__name__}: {error} · "
            f"{Path(line.filename).name}, line {line.lineno} · "
            "a file of the run may be damaged: make it again; --debug shows more")
