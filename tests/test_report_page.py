"""The evaluation page: markup in the data stays text, nothing is asked of the network, every number is one of evaluation.json."""

import html
import json
import random
import re
import shutil
import subprocess

import pytest

from parts import report

CONTROLS = ["dense", *report.SAYS]
HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
UNUSUAL = "\u202eright to left\u202c \u2028 \u0000 \U0001f9a6 é <!-- __DATA__ & \n"
SAFE_LINK = "https://www.neuronpedia.org/gemma-2-2b/13-res-16k/7"


def evaluation(full):
    """An evaluation by hand; full: with curves, other data, texts, a linear head. Otherwise an MLP and nothing that may be missing."""
    number = random.Random(full).randrange
    decimal = lambda: round(number(5000) / 100 + 0.00712, 5)   # all end in 7 when rounded: a number worked out on the page would not
    span = lambda: dict(zip(("low", "mean", "high"), sorted((-decimal(), decimal(), decimal()))))
    three = lambda *names: dict(zip(names, sorted((decimal(), decimal(), decimal()))))
    row = lambda: {**three("low", "accuracy", "high"), **three("half_low", "ties_half", "half_high"), "ties": decimal(),
                   "n": 1247, "groups": 130, "seeds": [decimal()] * 2}
    text = lambda: {"id": "t-1", "side": "chosen", "score": -decimal(), "prompt": HOSTILE + UNUSUAL,
                    "heat": [[HOSTILE, 0.0], [UNUSUAL, 1.234], ["\n", 5.0]]}
    latent = lambda j: {"latent": j, "side": "rejected", "adds": -decimal(), "frequency_chosen": decimal(), "frequency_rejected": decimal(),
                        "low": -decimal(), "high": decimal(), "weight": decimal() if full else None, "tokens": [" a\n", HOSTILE] * full,
                        "texts": {"highest": [text()], "lowest": [text()]} if full and j < 20 else {},
                        "link": ["javascript:document.title='pwned'", SAFE_LINK][j % 2] if full else None}
    names = ["sparserm", "random_directions", "random_latents", "activations", "dense"]
    curve = lambda sizes: {name: {s: {**row(), "behind": span()} for s in sizes} for name in names}
    return {
        "accuracy": {n: {**row(), "choice": [8, 16] if "random" in n or "shuffled" in n else 1} for n in ["sparserm", *CONTROLS]},
        "differences": {n: span() for n in CONTROLS}, "curves": {"k": curve("148"), "pairs": curve(["50", "200"])} if full else {},
        "calibration": {**{n: decimal() for n in ("temperature", "nll", "brier", "ece")},
                        "bins": [{"confidence": decimal(), "accuracy": decimal(), "n": 50}] * 2},
        "length": {"correlation": -decimal(), "matched_n": 9 * full, "matched_accuracy": decimal() if full else None},
        "cost": {"trained_parameters": 17, "backbone_parameters": 134515008, "share": 1.3e-07},
        "other": {HOSTILE: {**row(), "controls": {n: {**row(), "behind": span()} for n in CONTROLS}}} if full else {},
        "sae": {"explained_variance": decimal(), "l0": 6.25, "n": 99, "silent": decimal(), "warnings": []},
        "explanations": {"1": {"top": row(), "random": row(), "fall": span()}},
        "stability": {"k": 8, "draws": 20, "mean": decimal(), "least": decimal(), "chance": decimal()},
        "fold": {n: decimal() for n in ("norm", "cosine_mean_difference", "cosine_dense")} if full else None,
        "latents": [latent(j) for j in range(23)], "parent": {"head": "0123456789abcdef"},
        "wrong": [{"id": "w-1", "confidence": decimal(), "difference": -decimal(), "prompt": UNUSUAL, "chosen": HOSTILE,
                   "rejected": ""}] * full,
        "warnings": [f"SAE: {HOSTILE}"] * full,
        "run": {"model": "tiny", "sources": [HOSTILE, "ours.jsonl"], "layer": 1, "token": "last", "sae": "sae.safetensors", "k": 8,
                "pairs": {"train": 905, "dev": 108, "test": 1247},
                "settings": {"kind": "linear" if full else "mlp", "hidden": 64, "loss": "bt" if full else "margin", "margin": 1.0}}}


def write(result, run):
    """→ (path of the page, its text, what its data script holds)."""
    report.write_page(result, run)
    text = (run / "report.html").read_text("utf-8")
    return run / "report.html", text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def numbers(value):
    """All numbers inside a JSON value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, (int, float)) else [n for v in inside for n in numbers(v)]


@pytest.mark.parametrize("full", [True, False])
def test_the_page_holds_the_evaluation_unchanged_and_asks_nothing_of_the_network(full, tmp_path, monkeypatch):
    if not full:
        monkeypatch.setattr(report, "picture", lambda *_: None)            # as where matplotlib is missing
    result = evaluation(full)
    _, text, data = write(result, tmp_path)
    assert data["evaluation"] == result
    assert set(data["images"]) == {p.stem for p in tmp_path.glob("*.png")} and bool(data["images"]) <= full
    assert text.count("<script") == text.count("</script>") == 3 and text.count('id="data"') == 1       # error box, data, page
    template = report.TEMPLATE.read_text("utf-8")
    assert template.count("__DATA__") == 1 and set(re.findall(r"https?://[^'\"/]*", template)) == {"https://www.neuronpedia.org"}
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|fetch\(|XMLHttp|import\(|@import|url\(|<link[^>]*href=\"(?!data:)",
                         template)
    assert "default-src 'none'" in template


@pytest.mark.parametrize("full", [True, False])
def test_a_browser_draws_every_number_from_the_evaluation_and_runs_nothing_from_it(full, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no Chromium or Chrome on the path")
    result = evaluation(full)
    page, _, _ = write(result, tmp_path)
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync --dump-dom").split()
    dom = subprocess.run([browser, *flags, f"--user-data-dir={tmp_path}/profile", page.as_uri()],
                         capture_output=True, timeout=60, check=True).stdout.decode()
    dom = re.sub(r"<(script|style).*?</\1>| style=\"[^\"]*\"", "", dom, flags=re.S)
    assert "<title>SparseRM evaluation: tiny, layer 1</title>" in dom
    assert re.search(r'<p id="error"[^>]* hidden="[^>]*></p>', dom), re.search(r'<p id="error".*?</p>', dom, re.S)[0]
    assert f'<div class="headline">{result["accuracy"]["sparserm"]["accuracy"]:.3f}</div>' in dom
    assert all(name.replace("_", " ") in dom for name in CONTROLS) and len(re.findall("<section ", dom)) == 15
    assert not re.search(r"<[^>]*\sonerror=[^>]*>|javascript:", re.sub(r'(title|aria-label)="[^"]*"', "", dom))
    assert set(re.findall(r'(?:href|src)="(?!data:|#)([^"]*)"', dom)) == ({SAFE_LINK} if full else set())
    escaped = html.escape(HOSTILE, quote=False)
    assert dom.count(escaped) > 40 if full else HOSTILE not in dom      # warning, other set, texts, tokens, wrong pair
    shown, rounded = set(re.findall(r"(?<![\d.])\d+\.\d{3}(?![\d.])", dom)), lambda part: {f"{abs(n):.3f}" for n in numbers(part)}
    assert shown <= rounded(result)
    rows = [*result["accuracy"].values(), *result["other"].values()]
    curves = [row for curve in result["curves"].values() for of in curve.values() for row in of.values()]
    bins = [[b["confidence"], b["accuracy"]] for b in result["calibration"]["bins"]]
    across = [row for other in result["other"].values() for row in other["controls"].values()]
    rows, behind = rows + across, [row["behind"] for row in across]
    must = [bins, behind, [[row[n] for n in ("ties_half", "half_low", "half_high")] for row in curves],
            *result["differences"].values(), result["fold"], result["explanations"]["1"]["fall"],
            [[row["low"], row["accuracy"], row["high"]] for row in rows]]
    assert rounded(must) - shown == set()
