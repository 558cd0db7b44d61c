"""One colour for each role and each group, in every figure: Okabe and Ito's, told apart by colour-blind readers too."""

from __future__ import annotations

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#666666",
)  # fmt: skip
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
"""Of groups and other things that have no colour of their own, in their order."""
TERMS = (GREY, GREEN, PURPLE, ORANGE, SKY, "#332288", "#882255")
"""Of loss terms, which stand beside the roles' colours."""
SIDES = {"consensus": VERMILION, "divergence": BLUE}
"""ADM's two: what trains the student, and what the teacher."""
ROLES = {"teacher": (BLUE, SKY, "#332288"), "student": (VERMILION, ORANGE, "#882255")}
"""Of teacher, teacher_2, teacher_3; of student, student_2, student_3."""
RIVALS = (GREEN, GREY, "#332288")
"""Of the networks of other runs, beside a teacher and a student."""


def series_color(number: int) -> str:
    """The colour of the thing at a place, counted from 0; they come again after seven."""
    return SERIES[number % len(SERIES)]


def role_color(role: str) -> str:
    """A network's: the same whatever else is drawn."""
    kind, _, more = role.partition("_")
    if kind not in ROLES or (more and not more.isdecimal()):
        return PURPLE  # what a method adds, or a student's moving average
    return ROLES[kind][(int(more) - 1 if more else 0) % len(ROLES[kind])]


def rival_color(number: int) -> str:
    """Of the other run at a place, counted from 0."""
    return RIVALS[number % len(RIVALS)]
