"""What a table's runs add to their baselines and to their controls, and what may be said of it by a stated rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from core.analysis.looks import CONTROLS
from tools.groups import experiment, method_of
from tools.ours import Number
from tools.paper import Scale, Table
from tools.stats import Difference, Grid, counted, p_value, paired

Kind = Literal["ADM", "control", "attention", "method"]
"""ADM less its baseline, a control less that baseline, ADM less its control, another method less its baseline."""
KINDS: Mapping[Kind, str] = {
    "ADM": "ADM (or a part of it) less its baseline",
    "control": "a control less the same baseline: as much weight, the attention uniform or shuffled",
    "attention": "ADM less its control: what the attention itself adds",
    "method": "another method less its baseline: whether the setting shows a gain that is known",
}
POINT = 1.0  # of a measure in percent: what is no more than this may be called no difference
LEVEL = 0.05
RULE = (
    "Each difference is paired by seed; its interval is the 95 % t interval of the mean. **Gain**: the whole interval "
    "lies on the better side of 0; **loss**: on the worse; **no difference larger than 1 point**: within ±1 point, of "
    "measures in percent; else, and where all seeds give the same, **cannot tell**. One seed has no interval. Only "
    "what holds when corrected for all comparisons of its kind (Holm, 5 %) is taken for more than chance."
)


@dataclass(frozen=True, eq=False)
class Added:
    """What is left of a number less another one, ours."""

    table: Table
    scale: Scale
    kind: Kind
    one: Number
    base: Number
    difference: Difference

    @property
    def name(self) -> str:
        """The number's row and column."""
        cell = self.one.cell
        return f"{cell.row}, {self.one.column}"

    @property
    def to(self) -> str:
        """The baseline's row or column, whichever tells it from the number's."""
        ours, theirs = self.one.cell, self.base.cell
        return theirs.row if theirs.column == ours.column else theirs.column

    @property
    def paper(self) -> float | None:
        ours, theirs = self.one.cell.paper, self.base.cell.paper
        return None if ours is None or theirs is None else ours - theirs

    @property
    def sign(self) -> int:
        """Of what is better."""
        return 1 if self.one.cell.metric.higher_is_better else -1

    @property
    def percent(self) -> bool:
        return self.one.cell.metric.unit == "%"

    @property
    def p(self) -> float | None:
        """Two-sided, that the mean is 0; None of one seed."""
        return p_value(list(self.difference.by_seed.values()))

    @property
    def verdict(self) -> str:
        """By RULE, uncorrected."""
        if self.difference.interval is None:
            return "one seed"
        if self.p is None:
            return "cannot tell"
        low, high = sorted(self.sign * end for end in self.difference.interval)
        if low > 0 or high < 0:
            return "gain" if low > 0 else "loss"
        within = self.percent and low >= -POINT and high <= POINT
        return "no difference larger than 1 point" if within else "cannot tell"


def differences(table: Table, scale: Scale, found: Sequence[Number]) -> list[Added]:
    """Of each run that has a baseline or is a control, where both have a seed in common."""
    made = []
    for one in found:
        base = table.baseline(one.cell)
        for theirs in (other for other in found if other.cell is base):
            made.append(Added(table, scale, kind_of(one), one, theirs, paired(one.by_seed, theirs.by_seed)))
    for control in found:
        for one in found if kind_of(control) == "control" else ():
            if _is_control_of(control, one):
                made.append(Added(table, scale, "attention", one, control, paired(one.by_seed, control.by_seed)))
    return [added for added in made if added.difference.by_seed]


def kind_of(one: Number) -> Kind:
    """Of a number's difference from its baseline."""
    method, control = method_of(next(iter(one.runs.values()))) if one.runs else ("", None)
    return "control" if control else "ADM" if method.endswith("+adm") else "method"


def _is_control_of(control: Number, one: Number) -> bool:
    """Whether both are the same measurement of runs that differ in the control alone."""

    def measurement(number: Number) -> tuple[object, ...]:
        cell = number.cell
        return cell.read, cell.where, cell.at, cell.metric

    def rest(number: Number) -> Mapping[str, object]:
        config = experiment(next(iter(number.runs.values())))
        return {key: value for key, value in config.items() if key not in ("adm.control", "adm.attention")}

    if not one.runs or kind_of(one) != "ADM" or measurement(one) != measurement(control):
        return False
    plain = next(iter(one.runs.values())).config.get("adm.attention")
    return rest(one) == rest(control) and plain not in CONTROLS


def once(every: Iterable[Added]) -> list[Added]:
    """Without those that come of the same runs in the same way as one before: tables share runs."""
    seen: dict[object, Added] = {}
    for added in every:
        cells = ((one.cell.read, str(one.cell.where), one.cell.at) for one in (added.one, added.base))
        paths = (tuple(run.path for run in one.runs.values()) for one in (added.one, added.base))
        seen.setdefault((added.kind, *cells, *paths), added)
    return list(seen.values())


def holding(of_kind: Sequence[Added]) -> list[Added]:
    """Those that hold when corrected for all of them, by Holm."""
    known = sorted(((added.p, n) for n, added in enumerate(of_kind) if added.p is not None))
    found = []
    for place, (p, n) in enumerate(known):
        if p * (len(known) - place) > LEVEL:
            break
        found.append(of_kind[n])
    return found


def said(every: Sequence[Added]) -> list[str]:
    """What follows, then a sentence for each kind of difference."""
    told = []
    for kind, what in KINDS.items():
        of_kind = [added for added in every if added.kind == kind]
        with_interval = [added for added in of_kind if added.difference.interval is not None]
        if not of_kind:
            continue
        single = len(of_kind) - len(with_interval)
        text = f"**{what[0].upper()}{what[1:]}**: {counted(len(with_interval), 'interval')}"
        text += f", and {counted(single, 'difference')} of one seed" if single else ""
        if with_interval:
            gains, losses = (sum(one.verdict == word for one in with_interval) for word in ("gain", "loss"))
            within = sum(one.verdict.startswith("no difference") for one in with_interval)
            text += f": {counted(gains, 'gain')}, {counted(losses, 'loss')}, {within} within 1 point"
            text += f"; by chance alone {len(with_interval) * LEVEL / 2:.1f} gains and as many losses"
            held = holding(with_interval)
            names = "; ".join(f"{one.table.label}, {one.name}, {one.difference.told()}" for one in held)
            text += f". Corrected for all of them, {f'{len(held)} hold: {names}' if held else 'none holds'}"
        told.append(f"{text}.")
    return [conclusion(every), *told] if told else []


def conclusion(every: Sequence[Added]) -> str:
    """What may be said of ADM, and of its attention: by the intervals that hold when corrected."""
    parts = []
    for kind, what in (("ADM", "ADM adds to its baseline"), ("attention", "the attention is what adds")):
        known = [added for added in every if added.kind == kind and added.difference.interval is not None]
        held = holding(known)
        better = sum(added.verdict == "gain" for added in held)
        against = f", and {len(held) - better} say the contrary" if better < len(held) else ""
        says = f"{better} of {len(known)} intervals say that {what}{against}"
        parts.append(says if held else f"it is not shown that {what}")
    return f"**By the rule, {'; '.join(parts)}.**"


def gains_caption(added: Sequence[Added]) -> str:
    several = f", not corrected for {len(added)} comparisons" if len(added) > 1 else ""
    return f"What it adds, paired by seed with a 95 % t interval{several}"


def gains(added: Sequence[Added]) -> Grid:
    """The differences of a table as lines of text, the head first."""
    rows = [["difference", "less", "paper", "ours", "by the rule"]]
    for one in added:
        lower = "" if one.sign > 0 else " (lower is better)"
        paper = "" if one.paper is None else f"{one.paper:+.2f}"
        rows.append([f"{one.name}{lower}", one.to, paper, one.difference.told(), one.verdict])
    return rows
