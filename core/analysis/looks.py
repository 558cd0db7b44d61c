"""How a method is drawn, the same in every figure: a colour, a marker and a line; and the marker of a network."""

from __future__ import annotations

from collections.abc import Sequence

from .colors import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
"""Of things in their order: what tells them apart without their colours."""
METHODS = {
    "vanilla": (GREY, "s", "-"),
    "dml": (BLUE, "o", "-"), "kd": (BLUE, "o", "-"), "pd": (BLUE, "o", "-"), "mse": (BLUE, "o", "-"),
    "kdcl": (SKY, "^", "--"), "dkd": (SKY, "^", "--"), "afd": (SKY, "^", "--"),
    "switokd": (GREEN, "v", "-."), "diswot": (GREEN, "v", "-."), "afid": (GREEN, "v", "-."),
    "shake": ("#222222", "P", ":"), "norm": ("#222222", "P", ":"),
}  # fmt: skip
"""Colour, marker and line of a method alone. With ADM it keeps its line, and has ADM's colour and marker."""
ADM, CONTROLS = (VERMILION, "D"), {"uniform": (ORANGE, "<"), "shuffled": (PURPLE, "X")}


def method_look(method: str, control: str | None = None) -> dict[str, str]:
    """Colour, marker and line style, as matplotlib names them, of a method ("dml", "dml+adm").

    ``control``: "uniform" or "shuffled", of ADM with its attention replaced.
    """
    base, _, added = method.partition("+")
    color, marker, style = METHODS.get(base, ("#222222", "*", "-"))
    if added:
        color, marker = CONTROLS.get(control or "", ADM)
    return {"color": color, "marker": marker, "linestyle": style}


def method_looks(methods: Sequence[tuple[str, str | None]]) -> list[dict[str, str]]:
    """The look of each (method, control) of a figure; where it comes again, with a hollow marker, then another line."""
    looks: list[dict[str, str]] = []
    of_each = [method_look(*named) for named in methods]
    for number, look in enumerate(of_each):
        again = of_each[:number].count(look)
        line = STYLES[(STYLES.index(look["linestyle"]) + again // 2) % len(STYLES)]
        looks.append(look | {"linestyle": line} | ({"markerfacecolor": "white"} if again % 2 else {}))
    return looks


def role_marker(role: str) -> str:
    """A network's, beside its colour (``role_color``): teachers round, students square, what a method adds pointed."""
    return {"teacher": "o", "student": "s"}.get(role.partition("_")[0], "^")
