"""The page: markup in the data stays text, the network is not asked, no number is made up."""

import base64
import html
import importlib
import json
import random
import re
import shutil
import subprocess

import pytest

from parts import report

stage1 = importlib.import_module("01_extract")
stage4 = importlib.import_module("04_evaluate")
CONTROLS = [*stage4.CONTROLS, "blind"]
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
        return {**self.rising("low", "accuracy", "high"), **self.some("ties", "ties_half"),
                "method": "bootstrap", "n": 1247, "groups": 130}

    def compared(self):
        """A summary of a control."""
        return {**self.row(), "behind": self.difference()}

    def curve(self, *sizes):
        found = {}
        for name in CURVES:
            found[name] = {size: self.compared() for size in sizes}
        for row in found["sparserm"].values():
            del row["behind"]
        return found

    def latent(self, latent):
        """A row of a head without weights, without a language model, without test pairs."""
        return {"latent": latent, "side": "rejected", "weight": None, "adds": -self.one(),
                "low": None, "high": None, "tokens": [], "texts": {}, "link": None,
                **self.some("frequency_chosen", "frequency_rejected")}

    def text(self):
        return {"id": "t-1", "side": "chosen", "score": -self.one(), "prompt": HOSTILE + UNUSUAL,
                "heat": [[HOSTILE, 0.0], [UNUSUAL, 1.234], ["\n", 5.0]]}


def choices_of(method):
    """What each fold chose: (K, L2)."""
    if method == "length":
        return [["shorter", None]] * 5
    return [[64, 0.1], [64, 0.1], [128, 0.1], [16, 0.01], [64, 0.1]]


def least():
    """An evaluation of an MLP, without test pairs, in which all is missing that may be."""
    made = Numbers(0)
    accuracy = {}
    for name in ("sparserm", *CONTROLS):
        accuracy[name] = {**made.row(), "choices": choices_of(name)}
    return {
        "verdict": ["Too small: 4 prompts."],
        "test": None,
        "accuracy": accuracy,
        "differences": {name: made.difference() for name in CONTROLS},
        "categories": {},
        "curves": {},
        "cost": {"trained_parameters": 17, "backbone_parameters": 134515008, "share": 1.3e-07},
        "other": {},
        "sae": {**made.some("explained_variance", "silent"), "l0": 6.25, "n": 99, "warnings": []},
        "fold": None,
        "repeated_answers": 0.0,
        "latents": [made.latent(n) for n in range(23)],
        "parent": {"head": "0123456789abcdef"},
        "run": {"model": "tiny", "sources": [HOSTILE, "ours.jsonl"], "layer": 1, "token": "mean",
                "normalise": "none", "sae": "sae.safetensors", "k": 8, "l2": 0.01, "folds": 5,
                "pairs": {"train": 905, "dev": 108, "test": 0},
                "settings": {"kind": "mlp", "hidden": 64, "loss": "margin", "margin": 1.0}},
    }


def most():
    """An evaluation of a linear head with all there may be, hostile wherever text is."""
    made = Numbers(1)
    result = least()
    result["verdict"] = ["SparseRM ranks most of them right.", f"And: {HOSTILE}"]
    result["test"] = made.row()
    result["calibration"] = {**made.some("temperature", "nll", "brier", "ece"),
                             "bins": [{**made.some("confidence", "accuracy"), "n": 50}] * 2}
    result["length"] = {"correlation": -made.one(), "matched_n": 9, "matched_accuracy": made.one()}
    result["categories"] = {HOSTILE: made.row(), "facts": made.row()}
    result["curves"] = {"k": made.curve("1", "4", "8"), "pairs": made.curve("50", "200")}
    controls = {name: made.compared() for name in CONTROLS if name not in ("blind", "paper")}
    result["other"] = {HOSTILE: {"sparserm": made.row(), **controls}}
    result["fold"] = made.some("norm", "cosine_mean_difference")
    result["wrong"] = [{"id": "w-1", "confidence": made.one(), "difference": -made.one(),
                        "prompt": UNUSUAL, "chosen": HOSTILE, "rejected": ""}]
    result["sae"]["warnings"] = [f"warning: {HOSTILE}"]
    result["run"]["pairs"]["test"] = 1247
    result["run"]["settings"] |= {"kind": "linear", "loss": "bt"}
    links = [f"javascript:{PWNED}", SAFE_LINK]
    for row in result["latents"]:
        row |= {"weight": made.one(), "tokens": [" a\n", HOSTILE], "link": links[row["latent"] % 2],
                "low": -made.one(), "high": made.one()}
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
    (least, {"accuracy"}),
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
    narrower = most() | {"curves": {}}
    write(narrower, tmp_path)
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


def sentences_of(table):
    """The names that a table of the page's script has a text for, in its order."""
    template = report.TEMPLATE.read_text("utf-8")
    body = template.partition(f"const {table} = {{")[2].partition("};")[0]
    return re.findall(r"(?:^|[{,])\s*(\w+): ['\"\[]", body, re.M)


def test_the_page_has_a_sentence_for_every_control():
    assert set(sentences_of("WHAT")) == {"sparserm", *CONTROLS}


def test_the_page_has_words_for_every_token_rule():
    assert set(sentences_of("TOKEN")) == set(stage1.RULES)


# ---------------------------------------------------------------- what a browser makes of it

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--dump-dom")


def in_a_browser(page, *flags):
    """What a page has become in a browser, as text."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium or Chrome on the path")
    command = [browser, *FLAGS, f"--user-data-dir={page.parent}/profile", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()


def without_scripts(dom):
    """A page without its scripts and styles."""
    return re.sub(r"<(script|style).*?</\1>| style=\"[^\"]*\"", "", dom, flags=re.S)


def in_words(dom):
    """The text of a page, each piece on a line."""
    return html.unescape(re.sub(r"<[^>]*>", "\n", dom))


@pytest.fixture(scope="module", params=[least, most])
def drawn(request, tmp_path_factory):
    """→ (the evaluation, what the page has become in a browser, without scripts and styles)."""
    folder = tmp_path_factory.mktemp("page")
    result = request.param()
    write(result, folder)
    return result, without_scripts(in_a_browser(folder / "report.html"))


def is_full(result):
    return result["test"] is not None


def test_a_browser_draws_every_section_without_an_error(drawn):
    result, dom = drawn
    error = re.search(r'<p id="error".*?</p>', dom, re.S)[0]
    assert re.fullmatch(r'<p id="error"[^>]* hidden="[^>]*></p>', error), error
    open_sections = re.findall(r'<section id="([^"]*)"', dom)
    folded = re.findall(r'<details class="fold" id="([^"]*)"', dom)
    if is_full(result):
        assert open_sections == ["test", "folds", "categories"]
        assert folded == ["K", "pairs", "calibration", "length", "other-sets", "latents",
                          "most-wrong", "run", "limits"]
    else:
        assert open_sections == ["test", "folds"]
        assert folded == ["K", "pairs", "other-sets", "latents", "run", "limits"]


def test_a_browser_shows_the_verdict_then_the_test_split_then_the_folds(drawn):
    result, dom = drawn
    assert "<title>SparseRM evaluation: tiny, layer 1</title>" in dom
    places = [dom.index(html.escape(sentence, quote=False)) for sentence in result["verdict"]]
    if is_full(result):
        places.append(dom.index(f'<div class="headline">{result["test"]["accuracy"]:.3f}</div>'))
    else:
        places.append(dom.index("This run has no test pairs"))
        assert 'class="headline"' not in dom
    places.append(dom.index("over 5 folds"))
    places.append(dom.index('<details class="fold"'))
    assert places == sorted(places)


def test_a_browser_puts_sparserm_first_and_the_controls_by_accuracy(drawn):
    result, dom = drawn
    section = dom.partition('<section id="folds"')[2].partition("</section>")[0]
    names = re.findall(r'<th scope="row">([^<]*)<', section)
    controls = sorted(CONTROLS, key=lambda name: -result["accuracy"][name]["accuracy"])
    assert names == ["SparseRM", *(name.replace("_", " ") for name in controls)]


def test_a_browser_says_in_words_where_z_is_read(drawn):
    _, dom = drawn
    assert "the mean over all tokens of the response (--token mean)" in in_words(dom)


def test_a_browser_runs_nothing_of_the_data_and_links_only_to_pages_of_latents(drawn):
    result, dom = drawn
    markup = re.sub(r'(title|aria-label|data-label)="[^"]*"', "", dom)
    assert not re.search(r"<[^>]*\sonerror=[^>]*>|javascript:", markup)
    links = set(re.findall(r'(?:href|src)="(?!data:|#)([^"]*)"', dom))
    assert links == ({SAFE_LINK} if is_full(result) else set())


def test_a_browser_shows_markup_in_the_data_as_text(drawn):
    result, dom = drawn
    markup = re.sub(r'(title|aria-label|data-label)="[^"]*"', "", dom)
    shown = markup.count(html.escape(HOSTILE, quote=False))
    assert HOSTILE not in markup
    if is_full(result):     # verdict, warning, category, other set, texts, tokens, a wrong pair
        assert shown > 40
    else:                   # where the pairs come from: above, and in the section on the run
        assert shown == 2


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
    rows = [*result["accuracy"].values(), *result["categories"].values()]
    for other in result["other"].values():
        rows += other.values()
    if is_full(result):
        rows.append(result["test"])
    must = [result["differences"]]
    for row in rows:
        must.append([row["low"], row["accuracy"], row["high"], row["ties_half"]])
        must.append(row.get("behind", {}))
    assert rounded(must) <= numbers_shown(dom)


def test_a_browser_shows_the_curves_the_bins_the_length_and_the_one_vector(drawn):
    result, dom = drawn
    calibration = result.get("calibration", {"bins": []})
    must = [result["fold"]]
    must += [calibration.get(name) for name in ("temperature", "nll", "brier", "ece")]
    must += [[b["confidence"], b["accuracy"]] for b in calibration["bins"]]
    if is_full(result):
        must += [result["length"]["correlation"], result["length"]["matched_accuracy"]]
    for curve, rows_of in result["curves"].items():
        for name, rows in rows_of.items():
            sizes = ["1"] if (curve, name) == ("k", "dense") else rows      # dense has no K
            for size in sizes:
                must.append([rows[size][key] for key in ("accuracy", "low", "high")])
        must += [row["behind"] for row in rows_of["random_directions"].values()]
    assert rounded(must) <= numbers_shown(dom)


@pytest.fixture(scope="module")
def unsure(tmp_path_factory):
    """A page on differences of every kind → (its text, {name of a control: its row in words})."""
    result = least()
    result["accuracy"]["words"]["method"] = "Wilson"
    result["differences"] |= {
        "dense": {"mean": 0.25, "low": None, "high": None},
        "words": {"mean": 0.25, "low": 0.125, "high": 0.5},
        "paper": {"mean": -0.25, "low": -0.5, "high": -0.125},
        "length": {"mean": 0.25, "low": 0.0, "high": 0.5},
    }
    result["accuracy"]["blind"] |= {"n": 300, "groups": 111}
    curve = Numbers(2).curve("4", "8", "16")
    for size, like in (("4", "dense"), ("8", "words"), ("16", "length")):
        curve["random_directions"][size]["behind"] = result["differences"][like]
    result["curves"] = {"k": curve}
    folder = tmp_path_factory.mktemp("unsure")
    write(result, folder)
    dom = without_scripts(in_a_browser(folder / "report.html"))
    section = dom.partition('<section id="folds"')[2].partition("</section>")[0]
    rows = {}
    for row in re.findall(r"<tr.*?</tr>", section, re.S):
        words = " ".join(in_words(row).split())
        rows[words.partition(" ")[0]] = words
    return in_words(dom), rows


@pytest.mark.parametrize("control, said", [
    ("dense", "cannot tell +0.250 too few prompts differ"),
    ("words", "SparseRM is better +0.250 [+0.125, +0.500]"),
    ("paper", "SparseRM is worse −0.250 [−0.500, −0.125]"),
    ("length", "no clear difference +0.250 [+0.000, +0.500]"),
])
def test_a_browser_judges_a_difference_by_its_interval_in_words(control, said, unsure):
    _, rows = unsure
    assert rows[control].endswith(said)


def test_a_browser_names_the_ks_at_which_the_difference_is_clear(unsure):
    text, _ = unsure
    assert "SparseRM is clearly above random directions at K = 8." in text


def test_a_browser_says_which_interval_is_wilsons(unsure):
    _, rows = unsure
    assert [name for name, row in rows.items() if "Wilson" in row] == ["words"]


def test_a_browser_says_where_a_control_was_tested_on_fewer_pairs(unsure):
    _, rows = unsure
    assert "On 300 pairs of 111 prompts only." in rows["blind"]
    assert [name for name, row in rows.items() if " prompts only." in row] == ["blind"]


MEASURE = """<script>
document.body.style.maxWidth = 'WIDTHpx';          // a window may have a least width
for (const fold of document.querySelectorAll('details')) fold.open = true;
const wide = [...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth);
const beyond = document.body.scrollWidth - document.body.clientWidth;
document.title = `${document.body.clientWidth} wide, ${wide.length} cut off, ${beyond} beyond`;
</script>"""


@pytest.mark.parametrize("window, width", [(400, 400), (1200, 1056)])
def test_a_browser_cuts_no_column_off_with_everything_unfolded(window, width, tmp_path):
    text, _ = write(most(), tmp_path)
    page = tmp_path / "unfolded.html"
    page.write_text(text.replace("</html>", MEASURE.replace("WIDTH", str(width))), "utf-8")
    dom = in_a_browser(page, f"--window-size={window},900")
    assert re.search(r"<title>(.*?)</title>", dom)[1] == f"{width} wide, 0 cut off, 0 beyond"
