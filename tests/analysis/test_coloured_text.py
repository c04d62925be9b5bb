"""Coloured text: every token in the colour of its expert, in every layer, and no text that can do harm."""

import json
import re
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_json import mixtral_like

from minimoe.analysis import coloured_text
from minimoe.analysis.coloured_text import ColouredText, token_texts, visible
from minimoe.analysis.routing_trace import Trace
from minimoe.core.errors import UserError
from minimoe.draw import palette
from minimoe.text import huggingface_tokenizer, tokenizer

NASTY = (
    "<script>alert('x')</script></pre> & \"q\"\n\ttab\r"
    "\x1b[31mred\x1b]0;title\x07\x00\x9b\u202edrow\u202c\u200b\u2028e\u0301"
)


def coloured(text, layers=2, experts=8, active=2, kind="char", **options):
    """``text`` with a random routing."""
    rng = np.random.default_rng(0)
    tokens = tokenizer.build(kind, text)
    ids = tokens.encode(text)
    logits = rng.standard_normal((layers, len(ids), experts))
    chosen = np.argsort(-logits, axis=-1)[..., :active]
    weights = np.exp(np.take_along_axis(logits, chosen, -1))
    weights /= weights.sum(-1, keepdims=True)
    return ColouredText(Trace(ids, np.zeros(len(ids), int), chosen, weights, logits), tokens, **options)


class Page(HTMLParser):
    """The tags of a page, the tokens in its <pre>, its style sheet and, without one, the text that remains."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.tokens, self.style, self.unstyled, self.inside = [], [], "", "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "input":
            self.inside.append(tag)
        if tag == "span" and "pre" in self.inside:
            self.tokens.append([dict(attributes)["title"], ""])

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if self.inside[-1] == "style":
            self.style += data
        elif self.inside[-1] == "span" and "pre" in self.inside:
            self.tokens[-1][1] += data
        self.unstyled += data if self.inside[-1] != "style" else ""

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def colour_in_layer(page, layer, tooltip):
    """What the style sheet says of a token with this tooltip: the colours of all rules that match it."""
    found = []
    for selectors, background in re.findall(r"^(#.*\.e\d+)\{background:(#\w+)", page.style, re.MULTILINE):
        words = re.findall(rf'-{layer}:checked~pre \[title\*="([^"]*)"\]', selectors)
        found += [background for word in words if word in tooltip]
    return found


@pytest.mark.parametrize("experts", [8, 24])
def test_every_token_has_the_colour_of_its_first_choice_in_every_layer(experts):
    shown = coloured("how now, brown cow? " * 5, layers=12, experts=experts)
    page = Page(shown.to_html())
    for t, (tooltip, _) in enumerate(page.tokens):
        for layer in range(12):
            first = shown.trace.experts[layer, t, 0]
            assert colour_in_layer(page, layer, tooltip) == [palette.colour(first)]


def test_experts_of_one_colour_differ_in_their_mark():
    style = Page(coloured("mark", experts=40).to_html()).style
    rules = dict(re.findall(r"\.e(\d+)\{(.*)\}", style))
    assert len(rules) == 40
    assert len(set(rules.values())) == 40
    key = coloured("mark", experts=40).to_terminal().splitlines()[0]
    assert len(set(re.findall(r"\x1b\[([\d;]+)m \d+ ", key))) == 40


def test_tooltips_name_experts_and_weights_of_every_layer():
    shown = coloured("ab", layers=2, active=3)
    (tooltip, _), _ = Page(shown.to_html()).tokens
    lines = []
    for layer in range(2):
        pairs = zip(shown.trace.experts[layer, 0], shown.trace.weights[layer, 0], strict=True)
        lines.append(f"L{layer}: " + " ".join(f"{e} {100 * w:.0f}%" for e, w in pairs))
    assert tooltip.split("\n") == lines


def test_style_sheet_asks_for_legible_text():
    style = Page(coloured("a").to_html()).style
    pairs = re.findall(r"background:(#\w{6});color:(#\w{6})", style)
    assert len(pairs) == 8
    assert all(palette.contrast(*pair) >= 4.5 for pair in pairs)


def test_layers_are_radio_buttons_that_work_without_a_script():
    html = coloured("abc", layers=3).to_html()
    page = Page(html)
    radios = page.named("input")
    assert [radio["type"] for radio in radios] == ["radio"] * 3
    assert len({radio["name"] for radio in radios}) == 1
    assert [radio["id"] for radio in radios] == [label["for"] for label in page.named("label")]
    assert ["checked" in radio for radio in radios] == [True, False, False]
    assert not page.named("script")
    assert "http" not in html and "javascript" not in html and not re.search(r"\son\w+=", html)


def test_two_on_one_page_do_not_share_a_name():
    shown = coloured("abc")
    names = [Page(shown._repr_html_()).named("input")[0]["name"] for _ in range(2)]
    assert names[0] != names[1]
    style = Page(shown.to_html()).style
    rules = [rule for rule in style.split("}") if rule.strip()]
    assert all(
        selector.lstrip().startswith("#experts-") for rule in rules for selector in rule.split("{")[0].split(",")
    )


def test_markup_in_the_text_is_only_text():
    html = coloured(NASTY).to_html()
    page = Page(html)
    closed = sum(tag != "input" for tag, _ in page.tags)
    assert html.count("<") == len(page.tags) + closed
    assert html.count("&") == len(re.findall("&(?:lt|gt|amp|quot|#x27|ensp);", html))
    assert {tag for tag, _ in page.tags} == {"div", "style", "input", "label", "p", "span", "pre"}
    assert "".join(text for _, text in page.tokens) == "".join(map(visible, NASTY))


def test_new_lines_are_shown_and_kept():
    page = Page(coloured("one\ntwo\n\nthree").to_html())
    assert "".join(text for _, text in page.tokens) == "one↵\ntwo↵\n↵\nthree"


@given(st.text(st.characters(codec=None)))
def test_nothing_shown_is_invisible_or_acts(text):
    shown = visible(text)
    assert all(c in "\n\t" or unicodedata.category(c)[0] != "C" for c in shown)
    assert not set(shown) & {"\u2028", "\u2029"}
    assert shown.count("\n") == text.count("\n")
    shown.encode()  # half a surrogate pair could not be saved in a notebook


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        ("\t", "→\t"),
        ("\x1b[0m", "⟨1B⟩[0m"),
        ("\u202e", "⟨202E⟩"),
        ("\u200b", "⟨200B⟩"),
        ("\ud800", "⟨D800⟩"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("é漢🎉", "é漢🎉"),
        ("", ""),
    ],
)
def test_visible_text(text, shown):
    assert visible(text) == shown


def test_bytes_that_are_half_a_character_are_shown_as_numbers():
    ids = tokenizer.ByteTokenizer().encode("aé").tolist()
    assert token_texts(tokenizer.ByteTokenizer(), ids) == ["a", "⟨C3⟩", "⟨A9⟩"]
    assert token_texts(tokenizer.build("char", "\ufffd"), [0]) == ["\ufffd"]
    chat = tokenizer.with_chat_tokens(tokenizer.ByteTokenizer())
    assert token_texts(chat, [*ids, chat.id_of("user"), chat.id_of("end")]) == ["a", "⟨C3⟩", "⟨A9⟩", "⟨user⟩", "⟨end⟩"]


def test_pieces_of_words_keep_the_space_in_front_of_them(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(mixtral_like()))
    pieces = huggingface_tokenizer.load(tmp_path)
    ids = pieces.encode("the bread the\né").tolist()
    shown = token_texts(pieces, ids)
    assert shown == ["⟨s⟩", " the", " bread", " the", "\n", "⟨C3⟩", "⟨A9⟩"]
    assert token_texts(pieces, [0, 2]) == ["⟨unk⟩", "⟨/s⟩"]
    assert token_texts(pieces, [pieces.vocab_size + 7]) == [f"⟨{pieces.vocab_size + 7}⟩"]


def test_a_thousand_characters_in_four_layers_stay_below_100_kb():
    text = ('The miller\'s wife said: "4 < 5 & 6 > 5."\n' * 30)[:1000]
    assert len(coloured(text, layers=4).to_html().encode()) < 100_000


def test_a_long_text_is_cut_and_says_so():
    shown = coloured("word " * 1000, limit=30)
    page = Page(shown.to_html())
    assert len(page.tokens) == 30
    assert "the first 30 of 5,000 tokens" in shown.to_html()
    assert "the first 30 of 5,000 tokens" in repr(shown)
    assert "5 tokens" in repr(coloured("whole"))
    assert len(re.findall(r"\x1b\[[\d;]+m[word ]\x1b", shown.to_terminal().split("\n", 1)[1])) == 30


def rows_below(text):
    """The plain form as (line of text, [line of each layer]), without the names in front."""
    lines = [line[9:] for line in text.splitlines()]
    starts = [i for i, line in enumerate(text.splitlines()) if not line.startswith("layer")]
    return [(lines[a], lines[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


def test_the_plain_form_has_each_tokens_expert_below_it_in_every_layer():
    shown = coloured("how now, brown\ncow?" * 9, layers=3)
    for layer in range(3):
        below = "".join(f"{marks[layer]:<{len(line)}}" for line, marks in rows_below(shown.to_text()))
        assert below == "".join(str(e) for e in shown.trace.experts[layer, :, 0])
    read = "".join(line for line, _ in rows_below(shown.to_text()))
    assert read.replace("↵", "\n") == "how now, brown\ncow?" * 9


def test_the_plain_form_keeps_wide_characters_and_long_numbers_in_place():
    shown = coloured("a漢\te\u0301 b", layers=1, experts=24)
    first = shown.trace.experts[0, :, 0]
    ((line, (marks,)),) = rows_below(shown.to_text())
    assert line == "a  漢 →  e  ◌\u0301     b"
    assert marks == "".join(f"{e:<3}" for e in first).rstrip()


def test_the_plain_form_breaks_long_lines_and_skips_empty_ones():
    long = coloured("word " * 100, layers=2).to_text()
    assert max(len(line) for line in long.splitlines()) == len("layer 0  ") + coloured_text.PLAIN_COLUMNS
    assert coloured("a\n\nb", layers=2).to_text().count("\n") == 3 * 3
    assert len(coloured("word " * 100, layers=1, limit=30).to_text().splitlines()[0].strip()) == 29  # "... word"


def test_without_its_style_sheet_the_page_still_shows_the_experts():
    shown = coloured(NASTY)
    page = Page(shown.to_html())
    assert shown.to_text() in page.unstyled
    hidden = re.findall(r"#[\w-]+ \.(\w+)\{display:none\}", page.style)
    assert hidden == [next(attributes["class"] for attributes in page.named("div") if "class" in attributes)]


def plain(text):
    """``text`` without the codes that set colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_terminal_shows_the_text_and_nothing_that_steers_it():
    key, text = coloured(NASTY).to_terminal(layer=1).split("\n", 1)
    assert plain(text) == "".join(map(visible, NASTY)) + "\n"
    assert plain(key).split() == ["layer", "1,", "expert", *"01234567"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", plain(key + text))


def test_terminal_colours_follow_the_layer():
    shown = coloured("abcdefgh", layers=3, experts=9)
    for layer in range(3):
        codes = re.findall(r"48;5;(\d+)(?:;4)?m\w", shown.to_terminal(layer).split("\n", 1)[1])
        experts = shown.trace.experts[layer, :, 0]
        assert [int(code) for code in codes] == [palette.TERMINAL[e % 8] for e in experts]


def test_terminal_colours_end_before_the_line_does():
    text = coloured("ab\n\ncd\n").to_terminal()
    for line in text.splitlines():
        starts = re.findall(r"\x1b\[(?!0m)", line)
        assert len(starts) == line.count("\x1b[0m")
        assert not line or line.endswith("\x1b[0m")


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(UserError, match="no layer 2; choose one from 0 to 1"):
        coloured("ab").to_terminal(layer=2)
    with pytest.raises(UserError, match="limit 0"):
        coloured("ab", limit=0)
    with pytest.raises(UserError, match="vocabulary of 2"):
        ColouredText(coloured("abc").trace, tokenizer.build("char", "ab"))


def test_ink_in_the_terminal_is_legible_and_a_text_of_just_the_limit_is_whole():
    for expert in range(8):
        ((ink, ground),) = re.findall(r"38;5;(\d+);48;5;(\d+)", coloured_text._in_colour("x", expert))
        assert {"16": "#000000", "231": "#FFFFFF"}[ink] == palette.ink(palette.COLOURS[expert]).upper()
    assert "(4 tokens;" in repr(coloured("word", limit=4))


def test_a_token_without_an_expert_has_no_colour_and_says_so() -> None:
    shown = coloured("ab", layers=1)
    shown.trace.experts[0, 0] = -1
    shown.trace.weights[0, 0] = 0
    assert 'title="L0: none"' in shown.to_html()
    assert shown.to_terminal().splitlines()[1].startswith("a\x1b[")
    assert shown.to_text().splitlines()[1].split()[2].startswith("-")


def test_layers_have_the_numbers_of_the_model_after_dense_ones():
    shown = coloured("ab\ncd")
    later = ColouredText(shown.trace._replace(first_layer=3), shown.tokenizer)
    for layer in (0, 1):
        key, text = later.to_terminal(3 + layer).split("\n", 1)
        assert key.startswith(f"layer {3 + layer},")
        assert text == shown.to_terminal(layer).split("\n", 1)[1]
    assert later.to_terminal() == later.to_terminal(3)
    assert re.findall("layer (.)", later.to_text()) == ["3", "4"] * 2
    page = later.to_html()
    assert re.findall(">layer (.)</label>", page) == ["3", "4"]
    assert set(re.findall(r"\bL(\d):", page)) == {"3", "4"}
    with pytest.raises(UserError, match="Layer 2 is dense; choose one from 3 to 4"):
        later.to_terminal(2)
    with pytest.raises(UserError, match="no layer 5; choose one from 3 to 4"):
        later.to_terminal(5)
