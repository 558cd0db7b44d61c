"""Every method by the paper's label. A new one is one file and one line here; `+adm` composes with any of them."""

from collections.abc import Mapping

from classification.methods.adm import ADM, ADMConfig
from classification.methods.afd import AFD
from classification.methods.afid import AFID
from classification.methods.base import Method, Output, Outputs
from classification.methods.dml import DML
from classification.methods.kdcl import KDCL
from classification.methods.shake import SHAKE
from classification.methods.switokd import SwitOKD
from classification.methods.vanilla import Vanilla
from core.errors import unknown

METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "dml": DML,
    "kdcl": KDCL,
    "switokd": SwitOKD,
    "shake": SHAKE,
    "afd": AFD,
    "afid": AFID,
}


def parse_method(label: str, methods: Mapping[str, type[Method]] = METHODS) -> tuple[str, bool]:
    """``"dml+adm" -> ("dml", True)``. Raises: InputError offering the nearest label of ``methods``."""
    name, plus, extra = label.partition("+")
    if name in methods and (not plus or extra == "adm"):
        return name, bool(plus)
    raise unknown("method", label, [f"{m}{suffix}" for m in methods for suffix in ("", "+adm")])


__all__ = ["ADM", "METHODS", "ADMConfig", "Method", "Output", "Outputs", "parse_method"]
