"""The rooms of the package: imports only go down, no circle, and the pages that show the rooms are up to date."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import rooms

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minimoe"


def module_name(path: Path) -> str:
    """minimoe/layers/moe.py → layers.moe, minimoe/__init__.py → the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(), str(path)) for module, path in SOURCES.items()}
ROOT_MODULES = ("version", "reference", "", "__main__")  # the first two import nothing, the last two everything


def imports(nodes: Iterator[ast.AST], module: str) -> Iterator[str]:
    """Every absolute dotted name that is imported: `from a import b` gives a.b."""
    package = "minimoe." + module if SOURCES[module].name == "__init__.py" else "minimoe." + module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.strip(".").split(".")
            base = above[: len(above) - node.level + 1] if node.level else []
            yield from (".".join(filter(None, [*base, node.module, alias.name])) for alias in node.names)


def imported_modules(module: str) -> set[str]:
    """The modules of the package that a module imports, inside its functions too."""
    found = set()
    for name in imports(ast.walk(TREES[module]), module):
        if name == "minimoe" or name.startswith("minimoe."):
            name = name.removeprefix("minimoe").removeprefix(".")
            while name not in SOURCES:  # the last parts may be a function in the module
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {module}


def height(module: str) -> int:
    """The place of a module's room in the order; at the root, what imports nothing is lowest and the rest highest."""
    room = module.partition(".")[0]
    if module in ROOT_MODULES:
        return -1 if module in ("version", "reference") else len(rooms.ROOMS)
    return rooms.ROOMS.index(room)


def test_every_folder_is_a_room_and_every_room_a_folder():
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py")} - {"."}
    inside = {f"{room}/{inner}" for room, inners in rooms.INSIDE.items() for inner in inners}
    assert folders == {*rooms.ROOMS, *inside}


def test_few_modules_stand_at_the_root():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "reference", "version"}


@pytest.mark.parametrize("room", [*rooms.ROOMS, *(f"{r}/{i}" for r, inner in rooms.INSIDE.items() for i in inner)])
def test_a_room_opens_with_the_question_that_it_answers(room: str):
    opening = rooms.docstring(room).partition("?")[0]
    assert len(rooms.docstring(room)) > len(opening) + 1, "an answer follows the question"
    assert len(opening) < 60
    assert "\n\n" not in opening


def test_no_import_climbs():
    edges = [(module, other) for module in SOURCES for other in imported_modules(module)]
    climbs = [f"{module} imports {other or 'minimoe'}" for module, other in edges if height(other) > height(module)]
    assert climbs == []


def test_imports_have_no_circle():
    graph = {module: imported_modules(module) for module in SOURCES}
    assert set(TopologicalSorter(graph).static_order()) == set(SOURCES)  # a circle raises CycleError, which names it


@pytest.mark.parametrize("page", rooms.PAGES)
def test_the_pages_show_the_rooms_as_they_are(page: str):
    assert rooms.stated(page) == rooms.PAGES[page](), "run python tests/tools/rooms.py"


def test_the_tests_mirror_the_rooms():
    """A test file in a room's folder is named after a module of that room."""
    strangers = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.parent.relative_to(ROOT / "tests")
        if folder.parts and folder.parts[0] in rooms.ROOMS:
            module = PACKAGE / folder / f"{path.stem.removeprefix('test_')}.py"
            strangers += [] if module.exists() else [str(path.relative_to(ROOT))]
    assert strangers == []


MACHINE = {
    **dict.fromkeys(("multiprocessing", "threading", "concurrent", "signal", "mmap", "subprocess"), "processes"),
    **dict.fromkeys(("os", "pathlib", "io", "tempfile", "safetensors", "json"), "files"),
    **dict.fromkeys(("matplotlib", "tqdm"), "drawing"),
    **dict.fromkeys(("time", "datetime"), "clocks"),
}


@pytest.mark.parametrize("module", [module for module in SOURCES if module.split(".")[0] in ("layers", "losses")])
def test_the_mathematics_knows_no_process_no_file_and_no_drawing(module: str):
    roots = roots_of(module)
    assert {root: MACHINE[root] for root in roots & MACHINE.keys()} == {}


READERS = {
    "cost.offloading",
    "cost.published",
    "storage.huggingface",
    "storage.safetensors_file",
    "text.huggingface_tokenizer",
}
"""Modules with regular expressions: for names of published models, a size that is typed, and what stands in files."""


def test_no_regular_expression_sorts_parameters_by_name():
    """Components state their own facts: see ``tree.marks``."""
    computing = ("layers", "losses", "optim", "parallel", "cost", "inference", "storage", "training", "timing")
    users = {module for module in SOURCES if module.split(".")[0] in computing and "re" in roots_of(module)}
    assert users <= READERS


def roots_of(module: str) -> set[str]:
    """The first words of what a module imports."""
    return {name.split(".")[0] for name in imports(ast.walk(TREES[module]), module)}


FORBIDDEN = {
    "torch": "gradients are written by hand",
    "autograd": "gradients are written by hand",
    "jax": "gradients are written by hand",
    "numba": "NumPy is fast enough, and readable",
    "einops": "shapes stand in comments",
    **dict.fromkeys(("pickle", "marshal", "shelve", "dill", "joblib"), "a checkpoint must not be able to run code"),
}
RUNS_CODE = ("eval", "exec", "compile", "__import__")


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: everything outside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import_time(node)


@pytest.mark.parametrize("module", SOURCES)
def test_package_keeps_its_vows(module):
    roots = roots_of(module)
    assert {root: FORBIDDEN[root] for root in roots & FORBIDDEN.keys()} == {}
    if not module.startswith("exercises."):  # which run the learner's own code
        calls = [node.func for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
        assert [call.id for call in calls if isinstance(call, ast.Name) and call.id in RUNS_CODE] == []
    assert "allow_pickle" not in SOURCES[module].read_text()
    eager = {name.split(".")[0] for name in imports(at_import_time(TREES[module]), module)}
    assert "cupy" not in eager, "import cupy inside a function: most machines have none"
