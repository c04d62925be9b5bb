"""The README's table of components agrees with the code and with what gradcheck measures."""

import re

import readme_table


def test_the_table_of_components_is_the_one_that_is_measured() -> None:
    stated, measured = readme_table.stated().splitlines(), readme_table.table().splitlines()
    exponent = re.compile(r"1e(-\d+) \|$")
    assert [exponent.sub("", line) for line in stated] == [exponent.sub("", line) for line in measured]
    for mine, now in zip(stated[2:], measured[2:], strict=True):
        claimed, found = exponent.search(mine), exponent.search(now)
        assert claimed and found
        assert abs(int(claimed[1]) - int(found[1])) <= 1, f"run tests/tools/readme_table.py: {mine} is now {now}"
