"""Every example in a docstring runs and shows what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import warnings

import pytest

import hespotex as hx


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = []
    for module in pkgutil.walk_packages(hx.__path__, "hespotex."):
        if not module.name.endswith("__main__"):
            found += finder.find(importlib.import_module(module.name), module.name)
    return [each for each in found if each.examples]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name.removeprefix("hespotex."))
def test_example(example: doctest.DocTest, tmp_path, monkeypatch) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = runner.run(example, out=report.append)
    plt.close("all")
    assert result.failed == 0, "".join(report)
