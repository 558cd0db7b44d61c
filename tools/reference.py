"""The reference section of docs/core.md, written from the signatures and docstrings of ``core``'s public names.

python tools/reference.py
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import core
from core.training.command import run_command

PAGE = Path(__file__).resolve().parents[1] / "docs/core.md"
BEGIN = "<!-- From here to the end: `python tools/reference.py` writes it from the docstrings. -->\n"


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    old = PAGE.read_text()
    if (new := with_reference(old)) != old:
        PAGE.write_text(new)
    print(f"{PAGE}: {'written' if new != old else 'up to date'}")
    return 0


def with_reference(page: str) -> str:
    """The page with its reference made anew."""
    guide, found, _ = page.partition(BEGIN)
    assert found, f"{PAGE} lacks the line {BEGIN}"
    return guide + BEGIN + reference()


def reference() -> str:
    names = [name for name in core.__all__ if inspect.isroutine(value := getattr(core, name)) or inspect.isclass(value)]
    assert names == core.__all__, "a public name that is neither a class nor a function has no signature"
    index = ", ".join(f"[{name}](#{name.lower()})" for name in names)
    return "\n".join(["\n## Reference\n", f"{index}.\n", *aliases(names), *(entry(name) for name in names)])


def entry(name: str) -> str:
    """A heading, the file, the signature, the docstring; of a class, its own public methods after it."""
    value = getattr(core, name)
    place = value.__module__.replace(".", "/") + ".py"
    parts = [f"### {name}\n", f"In [`{place}`](../{place}).\n", signature(name, value), prose(value)]
    if inspect.isclass(value):
        for method, function in vars(value).items():
            bare = getattr(function, "__func__", function)  # of a class method
            if not method.startswith("_") and inspect.isfunction(bare) and bare.__doc__:
                parts += [signature(f"{name}.{method}", bare), prose(bare)]
    return "\n".join(part for part in parts if part)


def signature(name: str, value: Any) -> str:
    """Indented, and on one line for each parameter where one line would be too long."""
    if inspect.isclass(value) and (issubclass(value, Exception) or getattr(value, "_is_protocol", False)):
        return f"    class {name}\n"
    found = inspect.signature(value)
    parameters: list[str] = []
    for p in found.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        kind = "" if p.annotation is p.empty else f": {p.annotation}"
        parameters.append(p.name + kind + ("" if p.default is p.empty else f" = {default(p.default)}"))
    returned = found.return_annotation
    arrow = "" if returned in (found.empty, None, "None") else f" -> {returned}"
    line = f"    {name}({', '.join(parameters)}){arrow}\n"
    if len(line) <= 121:
        return line
    return f"    {name}(\n" + "".join(f"        {p},\n" for p in parameters) + f"    ){arrow}\n"


def default(value: Any) -> str:
    return value.__name__ if inspect.isroutine(value) else repr(value)


def prose(value: Any) -> str:
    """A docstring as Markdown: single backticks, a paragraph for each of Args, Returns, Raises, a list of arguments."""
    text = inspect.getdoc(value) or ""
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.S)
    lines: list[str] = []
    for line in text.splitlines():
        heads = re.match(r"(Args|Returns|Raises|Warns)\b(:?)", line)
        if heads:
            lines += ["", f"**{heads[1]}**{heads[2]}{line[heads.end() :]}"]
            lines += [""] if line.strip() == "Args:" else []
        elif item := re.match(r"    (\w+(?:, \w+)*): ", line):
            lines.append(f"- `{item[1].replace(', ', '`, `')}`: {line[item.end() :]}")
        else:
            lines.append("  " + line.strip() if line.startswith("        ") else line.strip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def aliases(names: list[str]) -> Iterator[str]:
    """What the signatures call by a name of their own: sets of words, ranges of numbers, kinds of callables."""
    found: dict[str, str] = {}
    for value in (getattr(core, name) for name in names):
        module = vars(sys.modules[value.__module__])
        functions = [value, *(vars(value).values() if inspect.isclass(value) else ())]
        for function in filter(inspect.isfunction, [value.__init__ if inspect.isclass(value) else value, *functions]):
            for annotation in map(str, function.__annotations__.values()):
                for word in re.findall(r"\b[A-Z]\w+", annotation):
                    if get_args(module.get(word)):
                        found[word] = described(module[word])
    yield "\n".join(f"- `{word}`: {text}" for word, text in sorted(found.items())) + "\n"


def described(alias: Any) -> str:
    arguments = get_args(alias)
    if all(isinstance(argument, str) for argument in arguments):
        return ", ".join(f"`{argument!r}`" for argument in arguments)
    if hasattr(alias, "__metadata__"):
        return f"a number, {alias.__metadata__[0]}"
    return f"`{str(alias).replace('collections.abc.', '').replace('torch.', '').replace('typing.', '')}`"


if __name__ == "__main__":
    run_command(main)
