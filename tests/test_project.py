"""The frame around the package: one list of dependencies, no dead links, the targets of the Makefile."""

import re
import tomllib
from collections.abc import Iterator
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
