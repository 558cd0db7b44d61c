"""One colour for each role and each group, in every figure: Okabe and Ito's, told apart by colour-blind readers too."""

from __future__ import annotations

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
