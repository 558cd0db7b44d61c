"""One colour for each role, method and group, in every figure: Okabe and Ito's, which colour-blind readers tell apart."""

from __future__ import annotations

from collections.abc import Sequence

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#666666",
)  # fmt: skip
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
"""Of groups, terms and other things that have no colour of their own, in their order."""
ROLES = {"teacher": (BLUE, SKY), "student": (VERMILION, ORANGE)}
"""Of a role, and of its kind's others (teacher_2, student_ema)."""


def series_color(number: int) -> str:
    """The colour of the thing at a place, counted from 0; they come again after seven."""
    return SERIES[number % len(SERIES)]


def role_color(role: str) -> str:
    """A network's: the same whatever else is drawn."""
    kind, _, more = role.partition("_")
    if kind in ROLES:
        return ROLES[kind][1 if more else 0]
    return PURPLE  # a network that a method adds


def rival_color(number: int) -> str:
    """That of a network of another run that stands beside a teacher and a student, counted from 0."""
    return (GREEN, PURPLE, GREY)[number % 3]


# --- methods ----------------------------------------------------------------------------------------------------------

STYLES = ("-", "--", "-.", ":")
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
    """The look of each (method, control) of a figure; those of one method differ by hollow markers, then by line."""
    looks: list[dict[str, str]] = []
    for number, named in enumerate(methods):
        look, again = method_look(*named), methods[:number].count(named)
        look["linestyle"] = STYLES[(STYLES.index(look["linestyle"]) + again // 2) % len(STYLES)]
        looks.append(look | ({"markerfacecolor": "white"} if again % 2 else {}))
    return looks
