"""The frame around the package: one list of dependencies, no dead links, imports that only go down."""

import ast
import re
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minimoe

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

CONDA_NAMES = {"cupy-cuda12x>=14": "cupy>=14"}  # where conda-forge's name is another one


def conda(requirements: list[str]) -> set[str]:
    return {CONDA_NAMES.get(requirement, requirement) for requirement in requirements}


def test_environment_lists_the_packages_of_pyproject():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    listed = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    listed = listed[listed.index("conda-forge") + 1 :]
    optional = [line.removeprefix("  # - ") for line in lines if line.startswith("  # - ")]
    extras = PROJECT["optional-dependencies"]

    expected = conda(PROJECT["dependencies"] + extras["lessons"] + extras["dev"])
    assert len(listed) == len(set(listed))
    assert set(listed) == expected | {"python" + PROJECT["requires-python"], "pip", "pip:"}
    assert set(optional) == conda(extras["gpu"])
    assert "      - -e ." in lines


def test_a_plain_run_leaves_out_every_marked_test():
    options = PYPROJECT["tool"]["pytest"]["ini_options"]
    markers = [marker.split(":")[0] for marker in options["markers"]]
    assert set(re.findall(r"not (\w+)", options["addopts"])) == set(markers)


def test_version_is_the_same_everywhere():
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert PROJECT["version"] == minimoe.__version__ == citation[1]


def test_makefile_has_its_targets_and_help_names_them():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    assert targets == set(phony[1].split()) == {"help", "train", "test", "lessons", "lint", "coverage", "ci", "clean"}
    assert (ROOT / "lessons/00_start_here.ipynb").exists(), "make lessons opens it"


def test_readme_shows_the_three_doors_on_its_first_screen():
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert [door for door in ("make train", "make test", "make lessons") if door not in first_screen] == []


def links(page: str) -> Iterator[str]:
    """Relative link targets: [text](target), src="target", href="target"."""
    for target in re.findall(r"\]\(\s*<?([^\s)>]+)|(?:src|srcset|href)=\"([^\"]+)\"", page):
        path = (target[0] or target[1]).split("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            yield path


def mentions(page: str) -> Iterator[str]:
    """Words that look like a path from the root of the repository, wherever they stand; `*` may be in them."""
    for word in re.findall(r"(?<![\w/.-])(?:minimoe|lessons|tests|data|\.ci|\.github)/[\w./*-]*", page):
        yield word.rstrip(".-")
    yield from re.findall(r"`([\w-]+\.(?:md|toml|yml|cff))`", page)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "lessons/README.md"])
def test_every_path_on_a_page_exists(name):
    page = ROOT / name
    text = page.read_text()
    dead = [link for link in links(text) if not (page.parent / link).exists()]
    dead += [path for path in mentions(text) if not any(ROOT.glob(path.rstrip("/")))]
    assert dead == []


# A module imports from its own floor or a lower one, and nowhere in a circle. layers.* are all layers not named here.
FLOORS = (
    {"errors", "arrays", "tree", "config", "normal", "palette", "version", "files", "intervals", "sums", "well_formed"},
    {"workers", "data_parallel", "expert_parallel"},
    {"layers.*"},
    {"layers.moe"},
    {"layers.block"},
    {"layers.decoder"},
    {"layers"},  # layers/__init__.py
    {"objective"},
    {"files", "finite_differences", "verdict", "accounting", "metrics", "safetensors_file", "handicaps", "shakespeare"},
    {"gradcheck", "optimizer", "corpus", "tokenizer", "checkpoint", "texts", "machine", "huggingface_config"},
    {"huggingface_tokenizer", "huggingface", "evaluation", "blueprint", "canvas", "step", "stopwatch"},
    {"sampling", "kv_cache", "one_token", "routing"},
    {"generation", "coloured_text", "plots", "sketch", "models", "costs", "exercises.*", "exercises"},
    {"report", "cost_plot", "microscope", "bench", "suite"},
    {"microscope_page", "suite_table"},
    {"trainer"},
    {"options"},
    {"cli"},
    {"__main__", ""},  # minimoe/__init__.py, the roof
)
FLOOR = {module: height for height, floor in enumerate(FLOORS) for module in floor}


def module_name(path: Path) -> str:
    """minimoe/layers/moe.py → layers.moe, minimoe/__init__.py → the empty name."""
    parts = path.relative_to(ROOT / "minimoe").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted((ROOT / "minimoe").rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(), str(path)) for module, path in SOURCES.items()}


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


def floor(module: str) -> int:
    height = FLOOR.get(module, FLOOR.get(module.partition(".")[0] + ".*"))
    assert height is not None, f"minimoe/{module}.py has no floor yet: give it one in FLOORS"
    return height


def test_imports_never_climb():
    edges = [(module, other) for module in SOURCES for other in imported_modules(module)]
    climbs = [f"{module} imports {other or 'minimoe'}" for module, other in edges if floor(other) > floor(module)]
    assert climbs == []


def test_imports_have_no_circle():
    graph = {module: imported_modules(module) for module in SOURCES}
    assert set(TopologicalSorter(graph).static_order()) == set(SOURCES)  # a circle raises CycleError, which names it


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
    roots = {name.split(".")[0] for name in imports(ast.walk(TREES[module]), module)}
    assert {root: FORBIDDEN[root] for root in roots & FORBIDDEN.keys()} == {}
    if not module.startswith("exercises."):  # which run the learner's own code
        calls = [node.func for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
        assert [call.id for call in calls if isinstance(call, ast.Name) and call.id in RUNS_CODE] == []
    assert "allow_pickle" not in SOURCES[module].read_text()
    eager = {name.split(".")[0] for name in imports(at_import_time(TREES[module]), module)}
    assert "cupy" not in eager, "import cupy inside a function: most machines have none"
