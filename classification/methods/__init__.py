"""Every method by the paper's label. A new one is one file and one line here; `+adm` composes with any of them."""

from collections.abc import Mapping

from classification.methods.adm import ADM
from classification.methods.afd import AFD
from classification.methods.afid import AFID
from classification.methods.base import Method, Output, Outputs
from classification.methods.dml import DML
from classification.methods.kdcl import KDCL
from classification.methods.shake import SHAKE
from classification.methods.switokd import SwitOKD
from classification.methods.vanilla import Vanilla
from core.errors import parse_label

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
    return parse_label(label, methods)


__all__ = ["ADM", "METHODS", "Method", "Output", "Outputs", "parse_method"]
