"""The page: markup in the data stays text, the network is not asked, no number is made up."""

import base64
import html
import json
import random
import re
import shutil
import subprocess

import pytest

from parts import report

CONTROLS = ["dense", *report.SAYS]
CURVES = ["sparserm", "random_directions", "random_latents", "activations", "dense"]
PWNED = "document.title='pwned'"
HOSTILE = f"</script><script>{PWNED}</script><img src=x onerror=\"{PWNED}\">"
UNUSUAL = "\u202eright to left\u202c \u2028 \u0000 \U0001f9a6 é <!-- __DATA__ & \n"
SAFE_LINK = "https://www.neuronpedia.org/gemma-2-2b/13-res-16k/7"


# ---------------------------------------------------------------- an evaluation, made by hand

class Numbers:
    """Made-up numbers. Rounded, all end in 7: one that the page works out from others would not."""

    def __init__(self, seed):
        self.number = random.Random(seed).randrange

    def one(self):
        return round(self.number(5000) / 100 + 0.00712, 5)

    def some(self, *names):
        return {name: self.one() for name in names}

    def rising(self, *names):
        return dict(zip(names, sorted(self.one() for _ in names)))

    def difference(self):
        low, mean, high = sorted([-self.one(), self.one(), self.one()])
        return {"mean": mean, "low": low, "high": high}

    def row(self):
        """A summary of parts/statistics.py."""
        return {**self.rising("low", "accuracy", "high"),
                **self.rising("half_low", "ties_half", "half_high"),
                "ties": self.one(), "n": 1247, "groups": 130, "seeds": [self.one()] * 2}

    def compared(self):
        """A summary of a control."""
        return {**self.row(), "behind": self.difference()}

    def curve(self, *sizes):
        found = {}
        for name in CURVES:
            found[name] = {size: self.compared() for size in sizes}
        return found

    def latent(self, latent):
        """A row of a head without weights, without a language model."""
        return {"latent": latent, "side": "rejected", "weight": None, "adds": -self.one(),
                "low": -self.one(), "high": self.one(), "tokens": [], "texts": {}, "link": None,
                **self.some("frequency_chosen", "frequency_rejected")}

    def text(self):
        return {"id": "t-1", "side": "chosen", "score": -self.one(), "prompt": HOSTILE + UNUSUAL,
                "heat": [[HOSTILE, 0.0], [UNUSUAL, 1.234], ["\n", 5.0]]}


def choice_of(control):
    """What dev chose: a list where a control is drawn several times."""
    return [8, 16] if "random" in control or "shuffled" in control else 1


def least():
    """An evaluation of an MLP in which everything is missing that may be."""
    made = Numbers(0)
    accuracy = {}
    for name in ("sparserm", *CONTROLS):
        accuracy[name] = {**made.row(), "choice": choice_of(name)}
    return {
        "accuracy": accuracy,
        "differences": {name: made.difference() for name in CONTROLS},
        "curves": {},
        "calibration": {**made.some("temperature", "nll", "brier", "ece"),
                        "bins": [{**made.some("confidence", "accuracy"), "n": 50}] * 2},
        "length": {"correlation": -made.one(), "matched_n": 0, "matched_accuracy": None},
        "cost": {"trained_parameters": 17, "backbone_parameters": 134515008, "share": 1.3e-07},
        "other": {},
        "sae": {**made.some("explained_variance", "silent"), "l0": 6.25, "n": 99, "warnings": []},
        "explanations": {"1": {"top": made.row(), "random": made.row(), "fall": made.difference()}},
        "stability": {"k": 8, "draws": 20, **made.some("mean", "least", "chance")},
        "fold": None,
        "latents": [made.latent(n) for n in range(23)],
        "wrong": [],
        "warnings": [],
        "parent": {"head": "0123456789abcdef"},
        "run": {"model": "tiny", "sources": [HOSTILE, "ours.jsonl"], "layer": 1, "token": "last",
                "sae": "sae.safetensors", "k": 8,
                "pairs": {"train": 905, "dev": 108, "test": 1247},
                "settings": {"kind": "mlp", "hidden": 64, "loss": "margin", "margin": 1.0}},
    }


def most():
    """An evaluation of a linear head with all there may be, hostile wherever text is."""
    made = Numbers(1)
    result = least()
    result["curves"] = {"k": made.curve("1", "4", "8"), "pairs": made.curve("50", "200")}
    result["length"] |= {"matched_n": 9, "matched_accuracy": made.one()}
    controls = {name: made.compared() for name in CONTROLS}
    result["other"] = {HOSTILE: {**made.row(), "controls": controls}}
    result["fold"] = made.some("norm", "cosine_mean_difference", "cosine_dense")
    result["wrong"] = [{"id": "w-1", "confidence": made.one(), "difference": -made.one(),
                        "prompt": UNUSUAL, "chosen": HOSTILE, "rejected": ""}]
    result["warnings"] = [f"SAE: {HOSTILE}"]
    result["run"]["settings"] |= {"kind": "linear", "loss": "bt"}
    links = [f"javascript:{PWNED}", SAFE_LINK]
    for row in result["latents"]:
        row |= {"weight": made.one(), "tokens": [" a\n", HOSTILE], "link": links[row["latent"] % 2]}
    for row in result["latents"][:20]:
        row["texts"] = {"highest": [made.text()], "lowest": [made.text()]}
    return result


# ---------------------------------------------------------------- what is written

START = '<script type="application/json" id="data">'


def write(result, run):
    """→ (the text of the page, what its data script holds)."""
    report.write_page(result, run)
    text = (run / "report.html").read_text("utf-8")
    return text, json.loads(text.partition(START)[2].partition("</script>")[0])


@pytest.mark.parametrize("made", [least, most])
def test_the_page_holds_the_evaluation_unchanged(made, tmp_path):
    _, data = write(made(), tmp_path)
    assert data["evaluation"] == made()


def test_markup_in_the_data_neither_ends_its_script_nor_begins_another(tmp_path):
    text, _ = write(most(), tmp_path)
    assert text.count("<script") == text.count("</script>") == 3        # error box, data, page
    assert text.count('id="data"') == 1


@pytest.mark.parametrize("made, names", [
    (least, {"accuracy", "reliability"}),
    (most, {"accuracy", "reliability", "curve_k", "curve_pairs"}),
])
def test_the_page_holds_the_pictures_that_lie_beside_it(made, names, tmp_path):
    _, data = write(made(), tmp_path)
    assert set(data["images"]) == {path.stem for path in tmp_path.glob("*.png")} == names
    for name, image in data["images"].items():
        assert base64.b64decode(image) == (tmp_path / f"{name}.png").read_bytes()


def no_picture(*_):
    """What `picture` is where matplotlib is missing."""


def test_without_pictures_the_page_is_written_and_the_reason_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "picture", no_picture)
    _, data = write(most(), tmp_path)
    assert data == {"evaluation": most(), "images": {}}
    assert "matplotlib is missing" in capsys.readouterr().out


def test_pictures_of_an_earlier_wider_evaluation_do_not_stay(tmp_path):
    write(most(), tmp_path)
    write(least(), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "reliability.png"}


def test_the_names_of_the_files_written_are_given_back(tmp_path):
    written = report.write_page(most(), tmp_path)
    assert sorted(written) == sorted(path.name for path in tmp_path.iterdir())


ASKS_THE_NETWORK = r"fetch\(|XMLHttp|import\(|@import|url\(|<link[^>]*href=\"(?!data:)"
MAKES_MARKUP_OF_TEXT = r"innerHTML|insertAdjacent|document\.write"


def test_the_template_asks_nothing_of_the_network_and_makes_no_markup_of_text():
    template = report.TEMPLATE.read_text("utf-8")
    assert template.count("__DATA__") == 1
    addresses = set(re.findall(r"https?://[^'\"/]*", template))
    assert addresses == {"https://www.neuronpedia.org"}                 # a link, for latents
    assert not re.search(f"{ASKS_THE_NETWORK}|{MAKES_MARKUP_OF_TEXT}", template)
    assert "default-src 'none'" in template


# ---------------------------------------------------------------- what a browser makes of it

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--dump-dom")


@pytest.fixture(scope="module", params=[least, most])
def drawn(request, tmp_path_factory):
    """→ (the evaluation, what the page has become in a browser, without scripts and styles)."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium or Chrome on the path")
    folder = tmp_path_factory.mktemp("page")
    result = request.param()
    write(result, folder)
    command = [browser, *FLAGS, f"--user-data-dir={folder}/profile"]
    done = subprocess.run([*command, (folder / "report.html").as_uri()],
                          capture_output=True, timeout=60, check=True)
    dom = re.sub(r"<(script|style).*?</\1>| style=\"[^\"]*\"", "", done.stdout.decode(), flags=re.S)
    return result, dom


def test_a_browser_draws_every_section_without_an_error(drawn):
    _, dom = drawn
    error = re.search(r'<p id="error".*?</p>', dom, re.S)[0]
    assert re.fullmatch(r'<p id="error"[^>]* hidden="[^>]*></p>', error), error
    assert len(re.findall("<section ", dom)) == 15
    assert all(name.replace("_", " ") in dom for name in CONTROLS)


def test_a_browser_shows_the_run_and_its_accuracy_first(drawn):
    result, dom = drawn
    accuracy = result["accuracy"]["sparserm"]["accuracy"]
    assert "<title>SparseRM evaluation: tiny, layer 1</title>" in dom
    assert f'<div class="headline">{accuracy:.3f}</div>' in dom


def test_a_browser_runs_nothing_of_the_data_and_links_only_to_pages_of_latents(drawn):
    result, dom = drawn
    markup = re.sub(r'(title|aria-label)="[^"]*"', "", dom)
    assert not re.search(r"<[^>]*\sonerror=[^>]*>|javascript:", markup)
    links = set(re.findall(r'(?:href|src)="(?!data:|#)([^"]*)"', dom))
    assert links == ({SAFE_LINK} if result["other"] else set())


def test_a_browser_shows_markup_in_the_data_as_text(drawn):
    result, dom = drawn
    shown = dom.count(html.escape(HOSTILE, quote=False))
    assert HOSTILE not in dom
    if result["other"]:             # a warning, the other set, texts, tokens, a wrong pair
        assert shown > 40
    else:                           # where the pairs come from
        assert shown == 1


def numbers(value):
    """All numbers inside a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


def rounded(value):
    """All numbers inside a JSON value as the page shows them, without their sign."""
    return {f"{abs(number):.3f}" for number in numbers(value)}


def numbers_shown(dom):
    return set(re.findall(r"(?<![\d.])\d+\.\d{3}(?![\d.])", dom))


def test_every_number_that_a_browser_shows_is_one_of_the_evaluation(drawn):
    result, dom = drawn
    assert len(numbers_shown(dom)) > 50
    assert numbers_shown(dom) <= rounded(result)


def test_a_browser_shows_every_accuracy_and_difference_with_its_interval(drawn):
    result, dom = drawn
    rows = [*result["accuracy"].values(), *result["other"].values()]
    must = [*result["differences"].values(), result["explanations"]["1"]["fall"]]
    for other in result["other"].values():
        rows += other["controls"].values()
        must += [row["behind"] for row in other["controls"].values()]
    must += [[row["low"], row["accuracy"], row["high"]] for row in rows]
    assert rounded(must) <= numbers_shown(dom)


def test_a_browser_shows_every_point_of_the_curves_the_bins_and_the_one_vector(drawn):
    result, dom = drawn
    must = [result["fold"]]
    must += [[b["confidence"], b["accuracy"]] for b in result["calibration"]["bins"]]
    for curve in result["curves"].values():
        for rows in curve.values():
            for row in rows.values():
                must.append([row["ties_half"], row["half_low"], row["half_high"]])
    assert rounded(must) <= numbers_shown(dom)
