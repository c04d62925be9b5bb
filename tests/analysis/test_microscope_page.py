"""The microscope's page: all that it shows is in it, nothing else can run, and in a browser every switch works."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import time
import unicodedata
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from minimoe.analysis import microscope, microscope_page, routing_trace
from minimoe.analysis.microscope import Seen
from minimoe.analysis.microscope_page import WEB
from minimoe.analysis.routing_trace import Trace
from minimoe.core.errors import UserError
from minimoe.draw import palette
from minimoe.storage.checkpoint import Model
from minimoe.text import tokenizer

HOSTILE = (
    "</script><script>document.title='acted'</script><img src=x onerror=\"document.title='acted'\">"
    "<!--<script> ${1} $data &lt;b&gt; ' \" \\u003c "
    "\u05d0\u05d1\u05d2 \u202edrow\u202c \u2028\u2029 \x00\x1b[31m\x07 \u200b e\u0301\n\t\n"
)
STORY = "The miller's wife said: nothing.\nThe mill turned, and turned.\n"


def trace_of(ids, layers, experts, active, seed=0):
    """Tokens with a random routing, in windows of 16."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((layers, len(ids), experts), np.float32)
    chosen = np.argsort(-logits, axis=-1)[..., :active]
    weights = np.exp(np.take_along_axis(logits, chosen, -1))
    weights /= weights.sum(-1, keepdims=True)
    return Trace(ids, np.arange(len(ids)) // 16, chosen, weights, logits)


@pytest.fixture
def look(monkeypatch, small):
    """Texts by name → what there is to see of them, with a random routing."""

    def look(texts, layers=3, experts=8, active=2) -> Seen:
        codec = tokenizer.build("char", "".join(texts.values()))
        config = dataclasses.replace(
            small, layers=layers, context=16, experts=experts, active_experts=active, renormalize=active > 1
        )
        monkeypatch.setattr(routing_trace, "trace", lambda _, config, ids: trace_of(ids, layers, experts, active))
        model = Model(None, config, codec, None)
        return microscope.look(model, {name: codec.encode(text) for name, text in texts.items()})

    return look


class Page(HTMLParser):
    """The elements of a page, and what stands in its scripts and its style sheet."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.raw, self.words, self.inside = [], [], [], False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.raw.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.raw[-1] += data
        else:
            self.words.append(data)

    @property
    def style(self):
        return self.raw[0]

    @property
    def data(self):
        return json.loads(self.raw[1])

    @property
    def script(self):
        return self.raw[2]


def unpack(packed):
    """The inverse of what the page holds."""
    content = zlib.decompress(base64.b64decode(packed["content"]))
    return np.frombuffer(content, {"Uint8Array": "<u1", "Uint16Array": "<u2", "Uint32Array": "<u4"}[packed["type"]])


def test_every_token_is_on_the_page_with_its_experts_and_weights(look):
    seen = look({"story": STORY, "sums": "1 + 1 = 2\n"}, layers=3, active=3)
    data = Page(microscope_page.page(seen)).data
    assert data["names"] == data["keys"] == ["story", "sums"]
    for text, trace in zip(data["tokens"], seen.traces.values(), strict=True):
        count = len(trace.tokens)
        assert (text["shown"], text["total"]) == (count, count)
        shown = [data["vocabulary"][place] for place in unpack(text["places"])]
        assert shown == [seen.token_texts[token] for token in trace.tokens.tolist()]
        experts = unpack(text["experts"]).reshape(3, 3, count)
        weights = unpack(text["weights"]).reshape(3, 3, count)
        np.testing.assert_array_equal(experts, trace.experts.transpose(0, 2, 1))
        np.testing.assert_allclose(weights / 100, trace.weights.transpose(0, 2, 1), atol=0.005001)


def test_statistics_on_the_page_are_those_of_the_microscope(look):
    seen = look({"story": STORY, "sums": "1 + 1 = 2\n"})
    data, whole = Page(microscope_page.page(seen)).data, microscope.to_dict(seen)
    for layer, expected in zip(data["by_layer"], whole["by_layer"], strict=True):
        for choice, about in layer["choices"].items():
            np.testing.assert_allclose(about["load"]["sums"], expected["choices"][choice]["load"]["sums"], rtol=1e-3)
            assert [[f["text"] for f in expert] for expert in about["favourites"]] == [
                [f["text"] for f in expert] for expert in expected["choices"][choice]["favourites"]
            ]
        np.testing.assert_allclose(layer["co_activation"], expected["co_activation"], rtol=1e-3)


@pytest.mark.parametrize(("most", "kind"), [(255, "Uint8Array"), (256, "Uint16Array"), (65536, "Uint32Array")])
def test_columns_are_as_narrow_as_their_numbers(most, kind):
    packed = microscope_page._packed(np.array([[0, most], [7, 1]]))
    assert packed["type"] == kind
    assert unpack(packed).tolist() == [0, most, 7, 1]


def test_a_long_text_is_cut_and_the_page_knows(look, monkeypatch):
    monkeypatch.setattr(microscope_page, "MOST_CHOICES", 3 * 2 * 2 * 20)
    data = Page(microscope_page.page(look({"story": STORY, "short": "1 + 1\n"}))).data
    assert [(text["shown"], text["total"]) for text in data["tokens"]] == [(20, len(STORY)), (6, 6)]
    assert len(unpack(data["tokens"][0]["places"])) == 20
    assert data["texts"]["story"]["tokens"] == len(STORY)


def test_the_policy_names_the_one_script_and_the_one_style_sheet(look):
    page = Page(microscope_page.page(look({"story": STORY})))
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]

    def checksum(content):
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src {checksum(page.script)}",
        f"style-src {checksum(page.style)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_the_page_asks_for_nothing_outside_itself(look):
    page = Page(microscope_page.page(look({"story": STORY})))
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "a"})
    asking = ("src", "href", "srcset", "action", "data", "style", "background")
    assert [(tag, a) for tag, a in page.elements if any(name in a for name in asking)] == []
    assert [(tag, a) for tag, a in page.elements if any(name.startswith("on") for name in a)] == []
    assert not re.search(r"url\(|@import|https?:", page.style)
    namespace = page.script.replace('"http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|fetch|XMLHttp|WebSocket|import\b|eval|Function\(|open\(", namespace)


def test_the_script_never_makes_markup_of_a_string():
    script = "".join(path.read_text(encoding="utf-8") for path in WEB.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|srcdoc|DOMParser|setHTML", script)


def test_every_declaration_of_the_style_sheet_names_a_property(look):
    """A name that is broken in two is no error to a browser: it leaves that line out."""
    sheet = re.sub(r"/\*.*?\*/", "", Page(microscope_page.page(look({"story": STORY}))).style, flags=re.DOTALL)
    declared = [line for rules in re.findall(r"\{([^{}]*)\}", sheet) for line in rules.split(";") if line.strip()]
    assert len(declared) > 200
    names = [line.partition(":")[0].strip() for line in declared]
    assert [name for name in names if not re.fullmatch(r"(--)?[a-z]+(-[a-z]+)*", name)] == []


def test_hostile_text_is_only_data(look):
    seen = look({HOSTILE: HOSTILE, "</style><script>": STORY})
    html = microscope_page.page(seen, title=HOSTILE)
    page, plain = Page(html), Page(microscope_page.page(look({"a": STORY, "b": STORY}), title="plain"))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert "<" not in page.raw[1] and page.raw[1].isascii()
    assert page.data["keys"][0] == HOSTILE
    shown = "".join([*page.data["vocabulary"], *page.data["names"], *page.words])
    steering = [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\n\t"]
    assert steering == []


def test_every_expert_has_its_colour_a_legible_ink_and_a_mark(look):
    style = Page(microscope_page.page(look({"story": STORY}, experts=64))).style
    rules = re.findall(r"^\.e(\d+) \{ background: (\S+); color: (\S+); text-decoration: (.+); \}$", style, re.MULTILINE)
    assert [int(expert) for expert, *_ in rules] == list(range(64))
    assert len({(ground, mark) for _, ground, _, mark in rules}) == 64
    for expert, ground, ink, _ in rules:
        assert ground == palette.colour(int(expert))
        assert palette.contrast(ground, ink) >= 4.5


def test_a_page_that_cannot_be_written_is_refused(look, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        microscope_page.write(tmp_path / "no" / "page.html", look({"story": STORY}))


@pytest.mark.slow
def test_a_megabyte_of_text_makes_a_page_of_a_few_megabytes(look):
    seen = look({"long": (STORY * 17_000)[:1_000_000]}, layers=4)
    start = time.perf_counter()
    html = microscope_page.page(seen)
    assert time.perf_counter() - start < 30
    assert 4_000_000 < len(html) < 14_000_000


# In a browser: pip install playwright, and a Chromium on the PATH.


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on the PATH")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """Writes a page, opens it from disk, and in the end finds that nothing was complained of or asked for."""
    complaints, requests, opened = [], [], []

    def visit(seen, **options):
        path = tmp_path / "page.html"
        microscope_page.write(path, seen, title="A test")
        tab = chromium.new_page(**({"viewport": {"width": 1200, "height": 900}} | options))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("body[data-ready]")
        opened.append((tab, path.as_uri()))
        return tab

    yield visit
    assert complaints == []
    assert requests == [uri for _, uri in opened]
    for tab, _ in opened:
        assert tab.title() == "A test"
        tab.close()


def chosen_classes(tab):
    return tab.eval_on_selector_all("#tokens span", "spans => spans.map(span => span.className)")


def switch(tab, name, ready):
    tab.get_by_role("radio", name=name, exact=True).check(force=True)
    tab.wait_for_selector(f'body[data-ready="{ready}"]')


@pytest.mark.browser
def test_switches_show_the_text_layer_and_choice_they_name(look, visit):
    seen = look({"story": STORY, "sums": "1 + 1 = 2\n"})
    tab = visit(seen)
    experts = {name: trace.experts for name, trace in seen.traces.items()}
    assert chosen_classes(tab) == [f"e{e}" for e in experts["story"][0, :, 0]]
    assert tab.inner_text("#tokens").replace("\u00a0", " ").startswith("The miller's wife said: nothing.↵\nThe")
    switch(tab, "2", "0 2 first")
    assert chosen_classes(tab) == [f"e{e}" for e in experts["story"][2, :, 0]]
    switch(tab, "second", "0 2 second")
    assert chosen_classes(tab) == [f"e{e}" for e in experts["story"][2, :, 1]]
    switch(tab, "either", "0 2 either")
    assert chosen_classes(tab) == [f"e{a} also{b}" for a, b in experts["story"][2]]
    switch(tab, "sums", "1 2 either")
    assert chosen_classes(tab) == [f"e{a} also{b}" for a, b in experts["sums"][2]]
    load = seen.layers[2].choices["either"].load
    shown = tab.eval_on_selector_all("#load tbody tr", "rows => rows.map(row => row.innerText.split(/\\s+/))")
    assert shown == [[str(e), *(f"{share:.1%}" for share in load[:, e])] for e in range(8)]


@pytest.mark.browser
def test_keys_alone_reach_everything(look, visit):
    seen = look({"story": STORY * 60, "sums": "1 + 1 = 2\n"})
    tab = visit(seen)
    where = "document.activeElement.dataset.token"
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector('body[data-ready="1 0 first"]')
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_selector('body[data-ready="0 0 first"]')
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector('body[data-ready="0 1 first"]')
    for _ in range(20):
        tab.keyboard.press("Tab")
        if tab.evaluate(where) is not None:
            break
    assert tab.evaluate(where) == "0"
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate(where) == "1"
    assert "Token 2 of" in tab.inner_text("#detail")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate(where) == str(STORY.index("\n") + 2)
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate(where) == "0"
    tab.keyboard.press("PageDown")
    assert tab.evaluate(where) == "1500"
    assert tab.input_value("#page") == "2"
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate(where) == "1499"
    assert tab.input_value("#page") == "1"
    tab.keyboard.press("End")
    assert tab.evaluate(where) == "1499"
    tab.keyboard.press("PageDown")
    tab.keyboard.press("End")
    assert tab.evaluate(where) == "2999"


@pytest.mark.browser
def test_a_token_pointed_at_shows_its_weights_in_every_layer(look, visit):
    seen = look({"story": STORY})
    tab = visit(seen)
    tab.hover("#tokens span:nth-child(6)")
    shown = tab.inner_text("#detail").split()
    trace = seen.traces["story"]
    for layer in range(3):
        pairs = [f"{e} {100 * w:.0f}%" for e, w in zip(trace.experts[layer, 5], trace.weights[layer, 5], strict=True)]
        assert " ".join([str(layer), *pairs]) in " ".join(shown)
    assert shown[0] == STORY[5]
    assert tab.eval_on_selector_all(".pointed", "spans => spans.map(span => span.dataset.token)") == ["5"]
    tab.hover("h1")
    assert tab.locator(".pointed").count() == 0
    assert tab.inner_text("#detail").split()[0] == STORY[0]


@pytest.mark.browser
def test_an_expert_can_be_seen_alone_and_numbers_hidden(look, visit):
    seen = look({"story": STORY})
    tab = visit(seen)
    first = seen.traces["story"].experts[0, :, 0]
    number = 'getComputedStyle(document.querySelector("#tokens span"), "::after").content'
    assert tab.evaluate(number) == f'"{first[0]}"'
    tab.get_by_role("button", name="3", exact=True).click()
    assert chosen_classes(tab) == ["e3" if e == 3 else "away" for e in first]
    tab.get_by_role("button", name="3", exact=True).click()
    assert "away" not in chosen_classes(tab)
    tab.uncheck("#numbers")
    assert tab.evaluate(number) == "none"


@pytest.mark.browser
def test_hostile_text_does_nothing_in_a_browser(look, visit):
    tab = visit(look({HOSTILE: HOSTILE * 3, "<b>": STORY}))
    switch(tab, "either", "0 0 either")
    tab.hover("#tokens span:nth-child(9)")
    assert tab.evaluate("document.querySelectorAll('img, b:not(.bar b, .why b), script:not([type])').length") == 1
    boxes = "all => all.map(span => span.getClientRects()[0]).map(box => [box.left, box.top])"
    places = tab.eval_on_selector_all("#tokens span", boxes)
    for (left, top), (next_left, next_top) in zip(places, places[1:], strict=False):
        assert next_left > left or next_top > top + 5, "from left to right, line by line, whatever the text asks for"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_legible_by_day_and_by_night(look, visit, scheme):
    tab = visit(look({"story": STORY, "sums": "1 + 1 = 2\n"}), color_scheme=scheme)
    colours = tab.evaluate(
        """() => ["--paper", "--raised", "--ink", "--quiet"].map(
            name => getComputedStyle(document.documentElement).getPropertyValue(name).trim())"""
    )
    paper, raised, ink, quiet = (colour.upper() for colour in colours)
    assert (palette.luminance(paper) > 0.5) == (scheme == "light")
    assert min(palette.contrast(a, b) for a in (paper, raised) for b in (ink, quiet)) >= 4.5


@pytest.mark.browser
def test_a_narrow_screen_is_wide_enough(look, visit):
    tab = visit(look({"story": STORY, "sums": "1 + 1 = 2\n"}, experts=16), viewport={"width": 360, "height": 700})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.click("#detail .close")
    assert not tab.is_visible("#detail")
    tab.hover("#tokens span:nth-child(3)")
    assert tab.is_visible("#detail")


@pytest.mark.browser
@pytest.mark.parametrize(("layers", "active", "texts"), [(1, 1, 1), (32, 2, 1), (2, 8, 6)])
def test_few_and_many_layers_choices_and_texts_are_shown(look, visit, layers, active, texts):
    seen = look({f"text {i}": STORY for i in range(texts)}, layers=layers, active=active)
    tab = visit(seen)
    assert tab.locator("#layers input").count() == layers
    assert tab.is_visible("#choices") == tab.is_visible("#together") == (active > 1)
    assert tab.is_visible("#differences") == (texts > 1)


@pytest.mark.browser
def test_hundreds_of_experts_are_shown(look, visit):
    tab = visit(look({"story": STORY}, layers=1, experts=400))
    tab.wait_for_selector("#co-activation td", state="attached")
    assert tab.locator("#co-activation td").count() == 400 * 400
    assert tab.locator("#key button").count() == 400


@pytest.mark.browser
def test_a_megabyte_of_text_stays_quick_to_read(look, visit):
    tab = visit(look({"long": (STORY * 17_000)[:1_000_000]}, layers=4))
    assert tab.evaluate("document.querySelectorAll('*').length") < 4000
    start = time.perf_counter()
    switch(tab, "3", "0 3 first")
    tab.fill("#page", "600")
    tab.press("#page", "Enter")
    tab.wait_for_selector('#tokens span[data-token="898500"]')
    assert time.perf_counter() - start < 5
