"""The list of bugs fits the package, and CAUGHT.md fits the list. Whether they are caught, run.py proves."""

import importlib
import inspect
from pathlib import Path

import pytest
from run import TABLE, catchers, mirror, table

from minimoe.exercises import bugs
from minimoe.exercises.bugs import KINDS, Bug
from minimoe.layers import moe, routing
from minimoe.layers.routers import noisy_top_k

ROOT = Path(__file__).parent.parent.parent
BUGS = bugs.load()

every_bug = pytest.mark.parametrize("bug", BUGS.values(), ids=list(BUGS))


@every_bug
def test_a_bug_changes_a_line_that_stands_in_the_package_and_leaves_a_module_that_imports(bug: Bug) -> None:
    module = importlib.import_module(bug.module)
    source = inspect.getsource(module)
    broken = bug.put_into(source)
    assert broken != source
    exec(compile(broken, bug.file, "exec"), {"__name__": bug.module, "__file__": module.__file__})


def test_the_list_is_long_knows_its_kinds_and_says_nothing_twice() -> None:
    assert len(BUGS) >= 40
    assert {bug.kind for bug in BUGS.values()} == set(KINDS)
    assert len({(bug.file, *bug.changes) for bug in BUGS.values()}) == len(BUGS)


def test_the_table_is_that_of_the_list_and_every_bug_has_its_test() -> None:
    known = catchers()
    assert TABLE.read_text(encoding="utf-8") == table(known), "run tests/mutations/run.py --update"
    assert [name for name in BUGS if name not in known] == []


def test_every_bug_is_caught_by_a_test_of_its_own_module() -> None:
    """So whoever changes a module sees a mistake in the file of its tests, without running all others."""
    assert {name: test for name, test in catchers().items() if not test.startswith(f"{mirror(BUGS[name])}::")} == {}


def test_every_test_that_the_table_names_exists() -> None:
    def exists(test: str) -> bool:
        file, _, name = test.partition("::")
        return (ROOT / file).is_file() and f"def {name.rpartition('::')[2]}(" in (ROOT / file).read_text("utf-8")

    assert [test for test in catchers().values() if not exists(test)] == []


def test_a_line_that_does_not_stand_there_once_is_an_error() -> None:
    bug = Bug("gone", "layers/routers/noisy_top_k.py", "stale", [("no such line", "")], [])
    with pytest.raises(ValueError, match="0 times 'no such line'"):
        bug.put_into("x = 1\n")
    with pytest.raises(ValueError, match="2 times 'x'"):
        bug._replace(changes=[("x", "y")]).put_into("x = x\n")


def test_an_installed_bug_is_gone_when_the_block_ends() -> None:
    intact = dict(vars(noisy_top_k))
    with bugs.installed(BUGS["wrong matrix"]):
        assert noisy_top_k.gate_backward is not intact["gate_backward"]
    assert vars(noisy_top_k) == intact


def test_an_installed_bug_reaches_a_module_that_imported_the_function_by_name_until_the_block_ends() -> None:
    intact = moe.combine
    with bugs.installed(BUGS["routing: only the first choice answers"]):
        assert moe.combine is routing.combine is not intact
    assert moe.combine is routing.combine is intact


def test_a_bug_shows_its_file_and_what_is_exchanged_for_what() -> None:
    changes = [("    mask=mask,\n", "    mask=None,\n    other=1,\n"), ("a", "b")]
    bug = Bug("two changes", "layers/moe.py", "leak", changes, [])
    assert str(bug) == "layers/moe.py\n- mask=mask,\n+ mask=None,\n      other=1,\n- a\n+ b"
