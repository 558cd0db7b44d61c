"""docs/core.md: its reference is what the docstrings say now, and leaves out no public name, parameter or default."""

from __future__ import annotations

import inspect
import re

import pytest

import core
from tools import reference


def test_the_page_is_up_to_date() -> None:
    page = reference.PAGE.read_text()
    assert reference.with_reference(page) == page, "run `python tools/reference.py`"


@pytest.mark.parametrize("name", core.__all__)
def test_an_entry_has_every_parameter_with_its_default_and_the_whole_docstring(name: str) -> None:
    value = getattr(core, name)
    entry = reference.entry(name)
    assert f"### {name}\n" in entry and f"({value.__module__.replace('.', '/')}.py)" in entry.replace("](../", "](")
    if not (inspect.isclass(value) and (issubclass(value, Exception) or name == "Network")):
        for parameter in inspect.signature(value).parameters.values():
            shown = f"{parameter.name}: {parameter.annotation}"
            if parameter.default is not parameter.empty:
                shown += f" = {reference.default(parameter.default)}"
            assert shown in entry, shown
    assert letters(inspect.getdoc(value) or "") in letters(entry)


def letters(text: str) -> str:
    """Without what Markdown adds or takes away."""
    return re.sub(r"[\s`*-]", "", text)


def test_it_sees_a_changed_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    page = reference.PAGE.read_text()
    monkeypatch.setattr(core.kd_loss, "__doc__", "Another ``text``.\n\nArgs:\n    tau: other.\nReturns: nothing.")
    changed = reference.with_reference(page)
    assert changed != page and "Another `text`.\n\n**Args**:\n\n- `tau`: other.\n\n**Returns**: nothing.\n" in changed
