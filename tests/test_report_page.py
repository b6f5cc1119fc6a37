"""The page: markup in the data stays text, the network is not asked, no number is made up."""

import base64
import html
import importlib
import json
import random
import re
from decimal import Decimal
from unittest import mock

import chromium
import pytest

from parts import contexts, report
from parts.statistics import wilson

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
        return {"latent": latent, "column": latent, "side": "rejected", "weight": None,
                "against": False, "adds": -self.one(), "low": None, "high": None, "tokens": [],
                "link": None,
                **self.some("adds_firing", "frequency_chosen", "frequency_rejected")}

    def context(self, cut=(False, False)):
        return {"id": "t-1", "side": "chosen", "prompt": HOSTILE + UNUSUAL, "cut": list(cut),
                "heat": [[HOSTILE, 0.0], [UNUSUAL, 1.25], ["\n", 5.0]]}

    def contexts(self):
        silent = {**self.context(), "heat": [["quiet", 0.0]]}
        return {"top": [self.context((True, False)), self.context((False, True))],
                "middle": [self.context((True, True))], "none": [silent]}

    def histogram(self):
        return {"rate": 0.25, "different": 1234, "entropy": self.one(),
                "top": [[HOSTILE, 0.5], [" a\n", 0.125]]}

    def read(self, *tokens):
        """A response token by token: a part that raises, one that lowers, one that does neither."""
        parts = [round(self.one(), 4), -round(self.one(), 4), 0.0]
        return [[token, part] for token, part in zip(tokens, parts, strict=True)]

    def answer(self, name, **changes):
        return {"id": name, "side": "chosen", "reward": self.one(), "category": None,
                "prompt": UNUSUAL, "text": f"text of {name}", **changes}


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
    result["wrong"] = [{"id": name, "confidence": made.one(), "difference": -made.one(),
                        "prompt": UNUSUAL, "chosen": HOSTILE, "rejected": ""}
                       for name in ("w-1", "w-2")]
    result["pairs"] = {
        "w-1": {"prompt": HOSTILE, "chosen": made.read(HOSTILE, " b\n", "c"),
                "rejected": made.read("d", "é", UNUSUAL)},
        "half": {"prompt": "one side", "rejected": made.read("only", " one", " side")},
        HOSTILE: {"prompt": "", "chosen": [["no ", None], ["sum", None]], "rejected": []},
    }
    result["answers"] = {
        "best": [made.answer("w-1", category=HOSTILE), made.answer("cut", text=HOSTILE)],
        "worst": [made.answer("half", side="rejected"), made.answer("w-2")],
    }
    result["quiz"] = made_quiz(made)
    result["sae"]["warnings"] = [f"warning: {HOSTILE}"]
    result["run"]["pairs"]["test"] = 1247
    result["run"]["settings"] |= {"kind": "linear", "loss": "bt"}
    links = [f"javascript:{PWNED}", SAFE_LINK]
    for row in result["latents"]:
        row |= {"weight": made.one(), "tokens": [" a\n", HOSTILE], "link": links[row["latent"] % 2],
                "low": -made.one(), "high": made.one()}
    for row in result["latents"][:20]:
        row["histogram"] = made.histogram()
        row["agreement"] = {"mean": 0.5, "token": 0.75, "both": 0.25}
        row["contexts"] = made.contexts()
    result["latents"][2]["against"] = True
    return result


def made_quiz(made, tasks=10, latents=(7, None, 3, None, None)):
    """Directions that differ in nothing but what they are. The odd snippet of task n: n mod 5."""
    directions = []
    for latent in latents:
        rows = [{"snippets": [f" {HOSTILE} {n}.{place}" for place in range(5)], "odd": n % 5}
                for n in range(tasks)]
        directions.append({"latent": latent, "contexts": made.contexts(), "tasks": rows})
    return {"snippet": 12, "directions": directions}


NAMES = {
    2: {"name": f"commas {HOSTILE}", "right": 7, "tasks": 10},
    7: {"name": "", "right": 1, "tasks": 4},
    22: {"name": "a label of others", "right": None, "tasks": None},
}


# ---------------------------------------------------------------- what is written

START = '<script type="application/json" id="data">'


def write(result, run, names=None):
    """→ (the text of the page, what its data script holds)."""
    report.write_page(result, run, names)
    text = (run / "report.html").read_text("utf-8")
    return text, json.loads(text.partition(START)[2].partition("</script>")[0])


@pytest.mark.parametrize("made", [least, most])
def test_the_page_holds_the_evaluation_unchanged(made, tmp_path):
    _, data = write(made(), tmp_path)
    assert data["evaluation"] == made()


def test_the_names_of_latents_lie_in_the_page_beside_the_evaluation(tmp_path):
    _, data = write(most(), tmp_path, NAMES)
    assert data["names"] == {str(latent): found for latent, found in NAMES.items()}
    assert data["evaluation"] == most()


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
    assert data == {"evaluation": most(), "images": {}, "names": {}}
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

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not chromium.find_browser():
        pytest.skip("no Chromium or Chrome on the path")
    with chromium.Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def page(tmp_path):
    """Where a page lies once it was written."""
    return tmp_path / "report.html"


def without_scripts(dom):
    """A page without its scripts and styles."""
    return re.sub(r"<(script|style).*?</\1>| style=\"[^\"]*\"", "", dom, flags=re.S)


def in_words(dom):
    """The text of a page, each piece on a line."""
    return html.unescape(re.sub(r"<[^>]*>", "\n", dom))


def dom_of(browser):
    """What the page has become, without scripts and styles."""
    return without_scripts(browser.value("document.documentElement.outerHTML"))


@pytest.fixture(scope="module", params=[least, most])
def drawn(request, browser, tmp_path_factory):
    """→ (the evaluation, what the page has become in a browser, without scripts and styles)."""
    folder = tmp_path_factory.mktemp("page")
    result = request.param()
    write(result, folder)
    browser.open(folder / "report.html")
    return result, dom_of(browser)


def is_full(result):
    return result["test"] is not None


def test_a_browser_draws_every_section_without_an_error(drawn):
    result, dom = drawn
    error = re.search(r'<p id="error".*?</p>', dom, re.S)[0]
    assert re.fullmatch(r'<p id="error"[^>]* hidden="[^>]*></p>', error), error
    open_sections = re.findall(r'<section id="([^"]*)"', dom)
    folded = re.findall(r'<details class="fold" id="([^"]*)"', dom)
    if is_full(result):
        assert open_sections == ["test", "folds", "answers", "latents"]
        assert folded == ["quiz", "tokens", "K", "pairs", "calibration", "length", "other-sets",
                          "run", "limits"]
    else:
        assert open_sections == ["test", "folds", "latents"]
        assert folded == ["quiz", "K", "pairs", "other-sets", "run", "limits"]


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
    markup = re.sub(r'(title|aria-label|data-label|value)="[^"]*"', "", dom)
    assert not re.search(r"<[^>]*\sonerror=[^>]*>|javascript:", markup)
    links = set(re.findall(r'(?:href|src)="(?!data:|#)([^"]*)"', dom))
    assert links == ({SAFE_LINK} if is_full(result) else set())


def test_a_browser_shows_markup_in_the_data_as_text(drawn):
    result, dom = drawn
    markup = re.sub(r'(title|aria-label|data-label|value)="[^"]*"', "", dom)
    shown = markup.count(html.escape(HOSTILE, quote=False))
    assert HOSTILE not in markup
    if is_full(result):     # verdict, warning, categories, other set, contexts, tokens, a pair
        assert shown > 100
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
def unsure(browser, tmp_path_factory):
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
    browser.open(folder / "report.html")
    dom = dom_of(browser)
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


# ---------------------------------------------------------------- answers and tokens

def texts(browser, selector):
    """The text of every element that a selector finds."""
    return browser.value(f"[...document.querySelectorAll({json.dumps(selector)})]"
                         ".map(found => found.textContent)")


def a_dot(*_):
    """A picture of one pixel: what is not looked at need not be drawn."""
    return ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5E"
            "rkJggg==")


def opened(browser, page, result, names=None):
    """Write a page and open it."""
    with mock.patch.object(report, "picture", a_dot):
        write(result, page.parent, names)
    browser.open(page)


def test_a_browser_shows_the_answers_from_the_best_and_from_the_worst(browser, page):
    result = most()
    opened(browser, page, result)
    best, worst = result["answers"].values()
    shown = [text.partition(" · ")[0] for text in texts(browser, "#answers .text > small")]
    assert shown == [f"reward +{answer['reward']:.3f}" for answer in best + worst]


def test_an_answer_that_was_read_is_shaded_and_another_is_plain_text(browser, page):
    opened(browser, page, most())
    shaded = browser.value("[...document.querySelectorAll('#answers .text')]"
                           ".map(text => text.querySelectorAll('.raises, .lowers').length)")
    assert shaded == [2, 0, 2, 0]
    plain = texts(browser, "#answers .said:not(.soft)")
    assert plain[1] == HOSTILE and plain[3] == "text of w-2"


def decimals(text):
    """The signed numbers of four decimals in a text, exactly."""
    return [Decimal(found.replace("−", "-")) for found in re.findall(r"[+−]\d+\.\d{4}\b", text)]


@pytest.mark.parametrize("side, number", [("chosen", 0), ("rejected", 1)])
def test_the_parts_of_a_response_add_up_to_what_stands_below_it(side, number, browser, page):
    result = most()
    opened(browser, page, result)
    wanted = [Decimal(str(part)) for _, part in result["pairs"]["w-1"][side]]
    *parts, total = decimals(texts(browser, "#tokens .numbers")[number])
    assert parts == wanted and total == sum(wanted)
    below = texts(browser, "#tokens .list .ends small")[number]
    assert decimals(below) == [sum(wanted)] and below.endswith(" + bias")


def test_chosen_minus_rejected_is_the_difference_of_the_two_sums(browser, page):
    opened(browser, page, most())
    line, = [text for text in texts(browser, "#tokens .list p") if "minus rejected" in text]
    chosen, rejected, difference = decimals(line)
    sums = [decimals(text)[-1] for text in texts(browser, "#tokens .numbers")]
    assert [chosen, rejected] == sums
    assert difference == chosen - rejected


@pytest.mark.parametrize("kind, place", [("raises", 0), ("lowers", 1), ("", 2)])
def test_a_token_is_told_by_its_sign_with_a_line_and_a_title(kind, place, browser, page):
    result = most()
    opened(browser, page, result)
    _, part = result["pairs"]["w-1"]["rejected"][place]
    span = f"document.querySelectorAll('#tokens .list .said:not(.soft)')[1].children[{place}]"
    assert browser.value(f"{span}.className") == kind
    assert decimals(browser.value(f"{span}.title")) == [Decimal(str(part))]
    lines = {"raises": "solid", "lowers": "dotted", "": "none"}
    assert browser.value(f"getComputedStyle({span}).borderBottomStyle") == lines[kind]


def test_the_page_says_that_the_head_was_trained_on_means_not_on_single_tokens(browser, page):
    opened(browser, page, most())
    text, = texts(browser, "#tokens")
    assert "trained on means over whole responses, not on single tokens" in text


CHOOSE = """(() => {
    const choice = document.querySelector('#tokens select');
    choice.value = ID;
    choice.dispatchEvent(new Event('change'));
})()"""


@pytest.mark.parametrize("name, words", [
    ("w-1", ["reward = parts", "chosen minus rejected", "The bias stands in both"]),
    ("half", ["only one side", "reward = parts", "The other response was not read"]),
    (HOSTILE, ["no sum"]),
])
def test_any_pair_is_shown_by_its_id_as_far_as_it_was_read(name, words, browser, page):
    opened(browser, page, most())
    browser.value(CHOOSE.replace("ID", json.dumps(name)))
    shown = " ".join(texts(browser, "#any-pair")[0].split())
    for wanted in words:
        assert wanted in shown
    assert ("bias" in shown) is (name != HOSTILE)


def test_where_the_reward_is_no_sum_over_tokens_the_texts_are_not_shaded(browser, page):
    result = most()
    for pair in result["pairs"].values():
        for side in {"chosen", "rejected"} & set(pair):
            pair[side] = [[token, None] for token, _ in pair[side]]
    opened(browser, page, result)
    assert texts(browser, ".raises, .lowers") == []
    section, = texts(browser, "#tokens")
    assert "no sum over tokens" in section and "trained on means" not in section


# ---------------------------------------------------------------- latents and their names

def column_of_latents(browser, number):
    """A column of the tables of latents as numbers: (first 20, sums, the others, their sum)."""
    cells = browser.value(f"""[...document.querySelectorAll('#latents table')].map(table =>
        [...table.querySelectorAll('tr.has-more, tr.sum')].map(row =>
            [row.className, row.children[{number}].textContent]))""")
    found = []
    for table in cells:
        for kind in ("has-more", "sum"):
            found.append([decimals(text)[0] for name, text in table if name == kind])
    return found


@pytest.mark.parametrize("number, name", [(2, "adds_firing"), (3, "adds")])
def test_each_column_of_latents_that_is_a_sum_adds_up(number, name, browser, page):
    result = most()
    opened(browser, page, result)
    first, (rest, total), others, (rest_again,) = column_of_latents(browser, number)
    assert (len(first), len(others)) == (20, 3)
    assert sum(others) == rest == rest_again
    assert sum(first) + rest == total
    exact = sum(row[name] for row in result["latents"])
    assert float(total) == pytest.approx(exact, abs=23 * 0.00005)


def test_with_few_latents_the_column_adds_up_without_a_rest(browser, page):
    result = most()
    result["latents"] = result["latents"][:8]
    opened(browser, page, result)
    rows, (total,) = column_of_latents(browser, 3)
    assert len(rows) == 8 and sum(rows) == total


def test_of_an_mlp_nothing_is_summed_and_the_page_says_why(browser, page):
    opened(browser, page, least())
    assert texts(browser, "#latents tr.sum") == []
    assert "these do not add up" in texts(browser, "#latents")[0]


def test_a_weight_against_its_side_is_marked_and_no_other(browser, page):
    opened(browser, page, most())
    rows = texts(browser, "#latents tr.has-more")
    assert [n for n, row in enumerate(rows) if "against its side" in row] == [2]


def test_the_tokens_on_which_a_latent_fires_are_marked_and_no_others(browser, page):
    result = most()
    opened(browser, page, result)
    found = result["latents"][0]["contexts"]
    wanted = []
    for end in ("top", "middle", "none"):
        for shown in found[end]:
            wanted.append([f > 0 for _, f in shown["heat"]])
    details = "document.querySelector('#latents details')"
    marked = browser.value(f"""[...{details}.querySelectorAll('.text')].map(text =>
        [...text.querySelectorAll('.said:not(.soft) span')].map(s => s.className === 'fires'))""")
    assert marked == wanted
    shares = browser.value(f"""[...{details}.querySelectorAll('.text')[0]
        .querySelectorAll('.said:not(.soft) span')].map(s => s.style.getPropertyValue('--part'))""")
    assert [float(share) for share in shares] == [0, 0.25, 1]       # of the largest, 5.0


@pytest.mark.parametrize("place, before, after", [
    (0, True, False), (1, False, True), (2, True, True), (3, False, False)])
def test_a_context_that_is_cut_says_at_which_end(place, before, after, browser, page):
    opened(browser, page, most())
    shown = texts(browser, "#latents .text .said:not(.soft)")[place]
    assert (shown[0] == "…", shown[-1] == "…") == (before, after)


def test_a_latent_shows_its_rate_its_tokens_their_entropy_and_the_commonest(browser, page):
    result = most()
    opened(browser, page, result)
    entropy = result["latents"][0]["histogram"]["entropy"]
    shown = texts(browser, "#latents details")[0]
    assert ("fires on25.0 % of the tokens, 1,234 different ones; the commonest is 50.0 % of them, "
            f"their entropy {entropy:.3f} bits") in shown
    bars = browser.value("""[...document.querySelector('#latents details .bars').children]
        .map(bar => [bar.textContent, bar.querySelector('i').style.getPropertyValue('--part')])""")
    assert [share for _, share in bars] == ["1", "0.25"]
    assert bars[1][0] == "␣a⏎12.5 %"


@pytest.mark.parametrize("latent, words", [
    (2, [f"commas {HOSTILE}", "7 of 10 right, 70.0 % [39.7 %, 89.2 %]"]),
    (7, ["no name", "1 of 4 right, 25.0 % [4.6 %, 69.9 %]"]),
    (22, ["a label of others", "not tested in the quiz"]),
])
def test_a_name_stands_with_its_score_where_its_latent_is_shown(latent, words, browser, page):
    opened(browser, page, most(), NAMES)
    heads = {}
    for text in texts(browser, "#latents tr.has-more th"):
        number = re.match(r"\d+", text)[0]
        heads[int(number)] = text[len(number):]
    for wanted in words:
        assert wanted in heads[latent]
    assert {latent for latent, text in heads.items() if text} == set(NAMES)


# ---------------------------------------------------------------- the quiz

CARD = "document.querySelector('#quiz-card')"
SHUFFLED = [1, 2, 4, 0, 3]      # a place that is wrong for each right one: none stays


@pytest.fixture
def quiz(browser, page):
    """A page with a quiz that nobody has begun, and a latent that has a name already."""
    opened(browser, page, most(), {7: {"name": "taken before", "right": 3, "tasks": 10}})
    browser.value("localStorage.clear()")
    browser.open(page)
    return browser


def card(browser):
    """The words of the quiz, one space between them."""
    return " ".join(" ".join(texts(browser, "#quiz-card > *")).split())


def give_name(browser, name):
    browser.value(f"{CARD}.querySelector('input').value = {json.dumps(name)}")
    browser.value(f"{CARD}.querySelector('form button').click()")


def press(browser, text):
    """Click the button that begins with a text."""
    browser.value(f"[...{CARD}.querySelectorAll('button')]"
                  f".find(button => button.textContent.startsWith({json.dumps(text)})).click()")


def pick(browser, place):
    browser.value(f"{CARD}.querySelectorAll('.snippets button')[{place}].click()")


def take(browser, name, right, tasks=10):
    """Name a direction and answer its tasks, so many of them right."""
    give_name(browser, name)
    for n in range(tasks):
        odd = n % 5
        pick(browser, odd if n < right else SHUFFLED[odd])


@pytest.mark.parametrize("right, judged", [
    (0, "Not told apart from chance"), (4, "Not told apart from chance"),
    (6, "Better than chance"), (10, "Better than chance")])
def test_after_ten_tasks_the_share_right_is_shown_with_wilsons_interval(right, judged, quiz):
    take(quiz, "a name", right)
    low, high = wilson(right / 10, 10)
    said = card(quiz)
    assert said.startswith(f"Direction A: {right} of 10 right")
    assert f"{right * 10}.0 % right, 95 % interval [{100 * low:.1f} %, {100 * high:.1f} %]" in said
    assert "chance is 20.0 %" in said and judged in said


def test_wilsons_interval_of_the_page_is_that_of_the_evaluation(quiz):
    for tasks in (1, 4, 10, 37, 130):
        for right in {0, 1, tasks // 3, tasks - 1, tasks}:
            assert quiz.value(f"wilson({right}, {tasks})") == pytest.approx(
                wilson(right / tasks, tasks), abs=1e-12)


def test_a_task_shows_five_snippets_and_marks_none(quiz):
    give_name(quiz, "")
    assert card(quiz).startswith("Direction A, task 1 of 10 Your name: no name.")
    assert texts(quiz, ".snippets button") == [f"{HOSTILE} 0.{place}" for place in range(5)]
    buttons = quiz.value(f"[...{CARD}.querySelectorAll('.snippets button')]"
                         ".map(button => button.className + button.innerHTML.includes('<span'))")
    assert buttons == ["false"] * 5


def test_a_pick_can_be_taken_back(quiz):
    give_name(quiz, "x")
    pick(quiz, 1)
    press(quiz, "One back")
    assert "task 1 of 10" in card(quiz)
    for n in range(10):
        pick(quiz, n % 5)
    assert card(quiz).startswith("Direction A: 10 of 10 right")


def test_a_random_direction_looks_like_any_other_until_the_end(quiz):
    screens = []
    for at, letter in enumerate("ABCDE"):
        found = [quiz.value(f"{CARD}.innerHTML")]
        give_name(quiz, "the same")
        for n in range(10):
            found.append(quiz.value(f"{CARD}.innerHTML"))
            pick(quiz, n % 5)
        found.append(quiz.value(f"{CARD}.innerHTML"))
        screens.append([html.replace(f"irection {letter}", "irection ?")
                        .replace(f", {at + 1} of 5", ", ? of 5")
                        .replace(f"irection {'BCDEF'[at]}", "irection next") for html in found])
        press(quiz, "Go on" if at < 4 else "Show")
    last = screens.pop()[:-1]       # after the last direction there is nothing to go on with
    latent, *others = [found[:-1] for found in screens]
    assert others == [latent] * 3 and last == latent
    assert "latent" not in "".join(latent) and "random" not in "".join(latent)
    assert screens[0][-1] == screens[1][-1] == screens[2][-1]


def take_all(browser, rights=(9, 2, 7, 3, 1)):
    """Five directions: latent 7, random, latent 3, random, random; to the end."""
    for n, right in enumerate(rights):
        take(browser, f"name {n}", right)
        press(browser, "Go on" if n < 4 else "Show")


def test_at_the_end_it_is_said_which_were_random_and_what_they_score_together(quiz):
    take_all(quiz)
    low, high = wilson(6 / 30, 30)
    assert ("The random directions together: 6 of 30 right, 20.0 % "
            f"[{100 * low:.1f} %, {100 * high:.1f} %]") in card(quiz)
    rows = quiz.value(f"""[...{CARD}.querySelectorAll('tbody tr')].map(row =>
        [...row.children].map(cell => cell.textContent))""")
    assert [(row[0], row[1].partition("named")[0], *row[2:4]) for row in rows] == [
        ("A: name 0", "latent 7", "9", "10"),
        ("B: name 1", "a random direction", "2", "10"),
        ("C: name 2", "latent 3", "7", "10"),
        ("D: name 3", "a random direction", "3", "10"),
        ("E: name 4", "a random direction", "1", "10"),
        ("all latents", "", "16", "20"),
        ("all random ones", "", "6", "30"),
    ]
    assert "taken before3 of 10 right" in rows[0][1]


def saved(browser):
    """Save the names → (the file, its content)."""
    press(browser, "Save")
    path = browser.downloaded()
    return path, json.loads(path.read_text("utf-8"))


def test_the_saved_file_is_read_by_names_and_holds_no_random_direction(quiz):
    take_all(quiz)
    path, found = saved(quiz)
    assert path.name.startswith("names") and path.suffix == ".json"
    assert found == {
        "sae": "sae.safetensors", "layer": 1,
        "names": [{"index": 7, "description": "name 0", "right": 9, "tasks": 10},
                  {"index": 3, "description": "name 2", "right": 7, "tasks": 10}],
        "null": {"right": 6, "tasks": 30},
    }
    assert contexts.read_names(path) == {7: {"name": "name 0", "right": 9, "tasks": 10},
                                         3: {"name": "name 2", "right": 7, "tasks": 10}}


@pytest.mark.parametrize("name", ["", f"“{HOSTILE}”\\n\"", "é 🦦 \u2028"])
def test_a_name_is_saved_as_it_was_typed_and_may_be_empty(name, quiz):
    take(quiz, name, 5)
    press(quiz, "Stop here")
    path, _ = saved(quiz)
    assert contexts.read_names(path) == {7: {"name": name.strip(), "right": 5, "tasks": 10}}
    assert "there is no null" in card(quiz)


def test_what_was_done_survives_a_reload(quiz, page):
    take(quiz, "first", 8)
    press(quiz, "Go on")
    give_name(quiz, "second")
    for n in range(3):
        pick(quiz, n)
    before = card(quiz)
    quiz.open(page)
    assert card(quiz) == before
    assert before.startswith("Direction B, task 4 of 10 Your name: second.")


@pytest.mark.parametrize("stored", ["{", "null", '{"names": [], "picks": []}'])
def test_what_was_stored_of_something_else_is_not_used(stored, quiz, page):
    quiz.value(f"localStorage.setItem(STORE, {json.dumps(stored)})")
    quiz.open(page)
    assert card(quiz).startswith("Direction A, 1 of 5")


NO_STORAGE = """Object.defineProperty(window, 'localStorage',
    { get() { throw new DOMException('not allowed', 'SecurityError'); } })"""


def test_the_quiz_works_where_the_browser_keeps_nothing(quiz, page):
    script = quiz.ask("Page.addScriptToEvaluateOnNewDocument", source=NO_STORAGE)
    try:
        quiz.open(page)
        take(quiz, "a name", 10)
        assert card(quiz).startswith("Direction A: 10 of 10 right")
        assert texts(quiz, "#error:not([hidden])") == []
    finally:
        quiz.ask("Page.removeScriptToEvaluateOnNewDocument", **script)


@pytest.mark.parametrize("sure, left", [("true", "Direction A, 1 of 5"),
                                        ("false", "Which were random")])
def test_all_is_forgotten_only_when_the_reader_is_sure(sure, left, quiz, page):
    take(quiz, "x", 10)
    press(quiz, "Stop here")
    quiz.value(f"confirm = () => {sure}")
    press(quiz, "Forget")
    assert card(quiz).startswith(left)
    quiz.open(page)
    assert card(quiz).startswith(left)


def test_the_quiz_is_taken_with_the_keyboard_alone(quiz):
    quiz.value("location.hash = '#quiz'")
    quiz.value(f"{CARD}.querySelector('input').focus()")
    for key in "dog":
        quiz.press(key)
    quiz.press("Enter")
    assert "Your name: dog." in card(quiz)
    for n in range(10):
        for _ in range(n % 5 + 1):
            quiz.press("Tab")
        quiz.press("Enter" if n % 2 else "Space")
    assert card(quiz).startswith("Direction A: 10 of 10 right")


def test_without_a_language_model_the_quiz_says_what_it_needs(browser, page):
    opened(browser, page, least())
    assert "needs the language model" in texts(browser, "#quiz")[0]
    assert texts(browser, "#quiz-card, .snippets") == []


# ---------------------------------------------------------------- the page as a whole

def test_with_every_step_of_the_quiz_nothing_but_the_page_is_asked_for(quiz, page):
    quiz.requests.clear()
    quiz.open(page)
    take_all(quiz)
    saved(quiz)
    assert quiz.requests[0] == page.as_uri()
    assert {address.partition(":")[0] for address in quiz.requests[1:]} <= {"data", "blob"}
    assert len(quiz.requests) > 1       # the pictures, which lie in the page


@pytest.mark.parametrize("name", ["quiz", "tokens", "K"])
def test_a_link_to_a_folded_section_unfolds_it(name, browser, page):
    opened(browser, page, most())
    section = f"document.getElementById('{name}')"
    assert browser.value(f"{section}.open") is False
    browser.value(f"location.hash = '{name}'; unfold()")
    assert browser.value(f"{section}.open") is True


@pytest.mark.parametrize("made", [least, most])
def test_every_link_above_leads_to_a_section(made, browser, page):
    opened(browser, page, made())
    assert browser.value("[...document.querySelectorAll('nav a')]"
                         ".filter(link => !document.querySelector(link.hash)).length") == 0


BEYOND = """(() => {
    for (const fold of document.querySelectorAll('details')) fold.open = true;
    const limit = document.documentElement.clientWidth;
    const cut = [...document.querySelectorAll('.scroll, .said')]
        .filter(box => box.scrollWidth > box.clientWidth);
    const beyond = [...document.body.querySelectorAll('*')]
        .filter(node => node.getBoundingClientRect().right > limit + 1);
    return [limit, cut.length, beyond.map(node => node.outerHTML.slice(0, 80))];
})()"""


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_cuts_no_column_off_with_everything_unfolded(width, browser, page):
    browser.size(width, 900)
    opened(browser, page, most(), NAMES)
    browser.value(CHOOSE.replace("ID", "'w-1'"))
    limit, cut, beyond = browser.value(BEYOND)
    assert width - 20 < limit <= width
    assert (cut, beyond) == (0, [])


@pytest.mark.parametrize("width", [400, 1200])
def test_the_quiz_fits_at_every_step(width, quiz):
    quiz.size(width, 900)
    shown = [quiz.value(BEYOND)[1:]]
    give_name(quiz, "a-name-without-any-space-" * 8)
    shown.append(quiz.value(BEYOND)[1:])
    for n in range(10):
        pick(quiz, n % 5)
    press(quiz, "Stop here")
    shown.append(quiz.value(BEYOND)[1:])
    assert shown == [[0, []]] * 3
