"""The notebooks: whole, executed from top to bottom, and still saying what they say when they run again."""

import importlib
import inspect
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "lessons"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))

COMPONENT = ["By hand", "Forward", "Backward", "Proof", "In minimoe", "Look", "Your turn", "In the world"]
EXPERIMENT = ["By hand", "Look", "Your turn", "In the world"]
LARGEST_OUTPUT, LONGEST_RUN = 100_000, 60  # bytes, seconds
NOT_COMPARED = {"varies", "widget"}  # tags of cells with timings, trained losses, or a widget

Cell = dict[str, Any]

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def notebook(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path: Path, kind: str) -> list[Cell]:
    return [cell for cell in notebook(path)["cells"] if cell["cell_type"] == kind]


def text(source: str | list[str]) -> str:
    """A source or a text output, which a notebook file may hold as a list of lines."""
    return source if isinstance(source, str) else "".join(source)


def tags(cell: Cell) -> set[str]:
    return set(cell["metadata"].get("tags", ()))


def number(path: Path) -> int:
    return int(path.name[:2])


def is_about_a_component(path: Path) -> bool:
    """Whether a lesson derives a backward pass: all of 01 to 10 do, and later ones that say so."""
    return 1 <= number(path) <= 10 or (number(path) > 16 and "\n## Backward" in prose(path))


def prose(path: Path) -> str:
    return "\n\n".join(text(cell["source"]) for cell in cells(path, "markdown"))


def test_the_lessons_of_a_part_are_numbered_without_a_gap():
    """The core is 00 to 16; each later part begins at a full ten."""
    numbers = [number(path) for path in LESSONS]
    assert numbers[:17] == list(range(17))
    assert all(later % 10 == 0 or later - 1 in numbers for later in numbers[17:])


def page() -> list[str]:
    """The lines of the page about the lessons."""
    return (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()


def contents() -> list[str]:
    """The rows of its tables of lessons, part after part."""
    return [line for line in page() if line.startswith("| [")]


def timeline() -> list[list[str]]:
    """The rows of its timeline as (year, who, what was new, lessons, source)."""
    return [line.strip("| ").split(" | ") for line in page() if re.match(r"\| \d{4} \|", line)]


LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def test_the_contents_link_every_lesson_by_its_title():
    linked = LINK.findall("\n".join(contents()))
    assert linked == [(text(cells(path, "markdown")[0]["source"]).splitlines()[0][2:], path.name) for path in LESSONS]


@every_lesson
def test_the_contents_say_what_a_lesson_needs_and_how_long_it_takes(path: Path):
    opening = text(cells(path, "markdown")[0]["source"])
    needs = sorted(re.findall(r"\]\((\d\d)_", re.search(r"^\*\*You need\*\*.*", opening, re.MULTILINE)[0]))
    minutes = re.search(r"^\*\*Time\*\* about (\d+) minutes\.$", opening, re.MULTILINE)[1]
    (row,) = [line for line in contents() if path.name in line]
    assert row.endswith(f"| {', '.join(needs) or '–'} | {minutes} min |")


def test_a_route_through_the_lessons_leaves_out_none_that_it_needs():
    needs = {line[3:5]: re.findall(r"\d\d", line.split("|")[3]) for line in contents()}
    routes = re.findall(r"^\| [^|]+ \| ([^|]*\b\d\d\b.*) \|$", prose(LESSONS[0]), re.MULTILINE)
    assert len(routes) >= 4
    for route in routes:
        on_it = set(re.findall(r"\[(\d\d)\]", route))
        for first, last in re.findall(r"\b(\d\d) to (\d\d)\b", route):
            on_it |= {f"{lesson:02d}" for lesson in range(int(first), int(last) + 1)}
        assert {need for lesson in on_it for need in needs[lesson]} <= on_it, route


def test_the_timeline_runs_from_1991_to_now():
    years = [int(year) for year, *_ in timeline()]
    assert years[0] == 1991
    assert years == sorted(years)
    papers = re.findall(r"\[arXiv (\d{4}\.\d{5})\]", "\n".join(row[4] for row in timeline()))
    assert papers == sorted(papers), "within a year, the earlier paper comes first"


@pytest.mark.parametrize("row", timeline(), ids=lambda row: " ".join(row[:2]))
def test_a_line_of_the_timeline_agrees_with_the_lesson_that_it_links(row: list[str]):
    year, who, new, lessons, source = row
    assert new.endswith(".")
    links = LINK.findall(lessons)
    assert links
    assert [file for label, file in links if not (file.startswith(label) and (FOLDER / file).exists())] == []
    ((reference, address),) = LINK.findall(source)
    told = "\n".join(prose(FOLDER / file) for _, file in links)
    assert reference in told
    # The lesson names the first author or the method.
    names = [re.split(r",| et al\.| and ", who)[0], *re.findall(r"\*\*(.+)\*\*", who)]
    assert any(name in told for name in names)
    if paper := re.fullmatch(r"arXiv ((\d\d)\d\d\.\d+)", reference):
        assert address == f"https://arxiv.org/abs/{paper[1]}"
        assert year == f"20{paper[2]}"
    else:
        assert f".{year}." in address


def test_the_timeline_links_every_lesson_on_routers_and_history():
    linked = {file for row in timeline() for _, file in LINK.findall(row[3])}
    assert [path.name for path in LESSONS if number(path) // 10 in (2, 6) and path.name not in linked] == []


@every_lesson
def test_a_lesson_was_saved_executed_from_top_to_bottom(path: Path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


@every_lesson
def test_a_lesson_shows_no_error_and_no_warning(path: Path):
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []


@every_lesson
def test_a_lesson_has_its_sections_in_order(path: Path):
    lines = prose(path).splitlines()
    assert re.fullmatch(rf"# {number(path):02d} · .+", lines[0])
    headings = [line.removeprefix("## ").split(":")[0] for line in lines if line.startswith("## ")]
    expected = [] if number(path) == 0 else COMPONENT if is_about_a_component(path) else EXPERIMENT
    assert [heading for heading in headings if heading in expected] == expected


@every_lesson
def test_the_outputs_of_a_lesson_are_small(path: Path):
    sizes = {cell["id"]: len(json.dumps(cell["outputs"])) for cell in cells(path, "code")}
    assert {cell: size for cell, size in sizes.items() if size > LARGEST_OUTPUT} == {}


@every_lesson
def test_a_lesson_holds_no_path_of_the_machine_it_ran_on(path: Path):
    content = path.read_text(encoding="utf-8")
    assert re.findall(r"(?:/home|/root|/tmp|/usr|/work|/Users|/opt|/private)/[\w./-]+|\b[A-Z]:\\\\\w+", content) == []


@every_lesson
def test_every_link_of_a_lesson_leads_somewhere(path: Path):
    targets = re.findall(r"\]\(<?([^)\s>]+)", prose(path))
    files = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [file for file in files if not (FOLDER / file).exists()] == []


@every_lesson
def test_a_lesson_introduces_its_symbols(path: Path):
    opening = text(cells(path, "markdown")[0]["source"])
    assert number(path) == 0 or re.search(r"^\*\*Symbols\*\* \S", opening, re.MULTILINE)


@every_lesson
def test_a_lesson_ends_with_links_to_its_neighbours(path: Path):
    footer = text(cells(path, "markdown")[-1]["source"])
    place = LESSONS.index(path)
    neighbours = [other.name for other in LESSONS[max(place - 1, 0) : place + 2] if other != path]
    assert [name for name in [*neighbours, "README.md"] if f"({name})" not in footer] == []


@every_lesson
def test_a_lesson_and_its_checks_have_the_same_exercises(path: Path):
    if number(path) == 0:
        return
    sources = [text(cell["source"]) for cell in cells(path, "code") if "exercise" in tags(cell)]
    checks = importlib.import_module(f"minimoe.exercises.lesson_{number(path):02d}")
    names = [
        name
        for name, function in inspect.getmembers(checks, inspect.isfunction)
        if function.__module__ == checks.__name__ and not name.startswith("_")
    ]
    asked = [match for source in sources for match in re.findall(r"^check\.(\w+)\(\1\)$", source, re.MULTILINE)]
    assert sorted(asked) == sorted(names)
    assert len(asked) >= 3
    for name, source in zip(asked, sources, strict=True):
        assert f"def {name}(" in source


@every_lesson
def test_the_exercises_of_a_lesson_are_committed_unattempted(path: Path):
    outputs = [json.dumps(cell["outputs"]) for cell in cells(path, "code") if "exercise" in tags(cell)]
    assert [output for output in outputs if "not attempted yet" not in output] == []


@pytest.mark.slow
@every_lesson
def test_a_lesson_runs_again_and_says_the_same(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own puts figures on the page, any other loses them
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib.font_manager")  # builds its cache of fonts, which it would announce on stderr
    again = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        again, timeout=2 * LONGEST_RUN, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start

    executed = [cell for cell in again.cells if cell.cell_type == "code"]
    assert [text(o.text) for cell in executed for o in cell.outputs if o.get("name") == "stderr"] == []
    stale = [stale_words(old, new) for old, new in zip(cells(path, "code"), executed, strict=True)]
    assert [sentence for sentence in stale if sentence] == []
    assert seconds < LONGEST_RUN


def stale_words(committed: Cell, executed: Cell) -> str:
    """What a cell shows now and did not show when it was committed; empty if nothing."""
    if "widget" in tags(committed):
        return ""
    old, new = shown(committed), shown(executed)
    if [kind for kind, _ in old] != [kind for kind, _ in new]:
        return f"cell {committed['id']} shows {[kind for kind, _ in new]}, committed {[kind for kind, _ in old]}"
    if tags(committed) & NOT_COMPARED:
        return ""
    for (_, before), (_, now) in zip(old, new, strict=True):
        if not same_words(before, now):
            return f"cell {committed['id']} now says\n{now}\nand was committed with\n{before}"
    return ""


def shown(cell: Cell) -> list[tuple[str, str]]:
    """The outputs of a cell as (kind, text), printed text in one piece; of a figure only that it is there."""
    printed = "".join(text(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
    result = [("printed", printed)] if printed else []
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            result.append(("figure", ""))
        elif data:
            result.append(("value", text(data.get("text/plain", ""))))
    return result


NUMBER = re.compile(r"[-−+]?\d[\d,]*(?:\.\d*)?(?:[eE][-+]?\d+)?")


def same_words(old: str, new: str) -> bool:
    """Equal words, and numbers equal but for what another machine's rounding may change."""
    words = [NUMBER.sub(" # ", side).split() for side in (old, new)]
    numbers = [NUMBER.findall(side) for side in (old, new)]
    return words[0] == words[1] and all(same_number(a, b) for a, b in zip(*numbers, strict=True))


def same_number(old: str, new: str) -> bool:
    """Equal to 1 % or one unit of the last digit; two numbers below 1e-6 are both rounding."""
    a, b = (float(side.replace(",", "").replace("−", "-")) for side in (old, new))
    if old == new or (max(abs(a), abs(b)) < 1e-6 and "e" in old + new):
        return True
    if "." not in old + new and "e" not in old + new:
        return False  # whole numbers are counts
    unit = 10.0 ** -len(old.partition(".")[2]) if "." in old and "e" not in old else 0.0
    return abs(a - b) <= max(0.01 * max(abs(a), abs(b)), 1.01 * unit)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("the mean term", "a mean term"),
        ("loss 2.31", "loss 2.41"),
        ("8 experts", "7 experts"),
        ("3 of 4", "3 of 4 or 5"),
        ("1e-03", "1e-02"),
        ("error 3.1e-11", "error 3.1e-01"),
        ("12,500 tokens", "12,600 tokens"),
        ("−0.5", "0.5"),
    ],
)
def test_a_changed_word_or_number_is_stale(old: str, new: str):
    assert not same_words(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [("3.1e-11  ok", "9.9e-12 ok"), ("loss 2.314", "loss 2.315"), ("[ 0.12 -0.5 ]", "[0.12 -0.5]"), ("0.3", "0.4")],
)
def test_rounding_is_not_stale(old: str, new: str):
    assert same_words(old, new)
