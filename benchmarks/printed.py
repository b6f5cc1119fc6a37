"""What the README's lines and the exercises print on the runs of `make demo`.

    python benchmarks/printed.py --write

runs the first program of README.md, then every block of EXERCISES.md in its order, and keeps what
they print in benchmarks/results/printed.json: the tests hold the README's values and the ranges of
the exercises against it. Left out: what needs a person (the quiz of exercise 8) and what is red on
purpose (the tests of exercise 3). It takes about six minutes and writes into runs/.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import ROOT
from parts.files import UserError, run_main

NOT_RUN = ("-m pytest", "names-safe.json")
FIGURE = re.compile(r"^(.+): (-?\d+(?:\.\d+)?)$", re.M)
# `name` 0.5 to 0.75, or `name` 17
RANGE = re.compile(r"`([^`]+)` (-?\d+(?:\.\d+)?)(?: to (-?\d+(?:\.\d+)?))?")


# ---------------------------------------------------------------- the texts

def blocks_of(text):
    """Markdown → [(bash or python, the block)]."""
    return re.findall(r"```(bash|python)\n(.*?)```", text, re.S)


def exercises_of(text):
    """EXERCISES.md → {number: its text}."""
    parts = re.split(r"^## (\d+) · ", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def ranges_of(exercise):
    """The text of an exercise → {name: (low, high)} of what it says one should expect."""
    [expected] = re.findall(r"^\*\*Expect\.\*\*(.*?)\n\n", exercise, re.M | re.S)
    expected = " ".join(expected.split())
    return {name: (float(low), float(high or low)) for name, low, high in RANGE.findall(expected)}


def fingerprint(blocks):
    """A hash of blocks: were these figures printed by this code?"""
    return hashlib.sha256(repr(blocks).encode()).hexdigest()[:16]


def first_program(text):
    """The first block of Python of a text, as blocks_of() gives it."""
    return next(block for block in blocks_of(text) if block[0] == "python")


# ---------------------------------------------------------------- running them

def lines_of(kind, block):
    """The commands of a block, without those that are not run."""
    if kind == "python":
        return [[sys.executable, "-c", block]]
    lines = block.replace("\\\n", " ").splitlines()
    return [["bash", "-c", line] for line in lines
            if line.strip() and not any(words in line for words in NOT_RUN)]


def output_of(kind, block):
    """Run a block in the project's folder → what it prints. Errors: UserError."""
    printed = ""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    env = {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}
    for words in lines_of(kind, block):
        done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"exit code {done.returncode} · {words[-1].strip()[:200]} · "
                            "its own line above says why; the runs are those of make demo")
        if kind == "python":            # the tables of the stages would be taken for figures
            printed += done.stdout
    return printed


def figures_of(number, exercise):
    """Run the blocks of an exercise → {name: value} of the lines `name: value`."""
    print(f"exercise {number}", file=sys.stderr, flush=True)
    printed = "".join(output_of(*block) for block in blocks_of(exercise))
    return {name: float(value) for name, value in FIGURE.findall(printed)}


def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("--write", action="store_true", help="into benchmarks/results/printed.json")
    args = p.parse_args()

    # export writes into no folder that is there
    shutil.rmtree(ROOT / "runs/exercise-10", ignore_errors=True)
    readme = (ROOT / "README.md").read_text("utf-8")
    exercises = (ROOT / "EXERCISES.md").read_text("utf-8")
    first = first_program(readme)
    found = {"readme": output_of(*first), "readme_code": fingerprint([first]),
             "exercises": {number: figures_of(number, text)
                           for number, text in exercises_of(exercises).items()},
             "exercises_code": fingerprint(blocks_of(exercises))}
    print(found["readme"])
    for number, figures in found["exercises"].items():
        print(f"{number}: {figures}")
    if args.write:
        common.write_result("printed", found, sort_keys=False)


if __name__ == "__main__":
    run_main(main)
