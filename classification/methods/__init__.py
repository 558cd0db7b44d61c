"""Every method by the paper's label. A new one is one file and one line here; `+adm` composes with any of them."""

from classification.methods.adm import ADM
from classification.methods.afd import AFD
from classification.methods.afid import AFID
from classification.methods.base import Method, Output, Outputs
from classification.methods.dml import DML
from classification.methods.kdcl import KDCL
from classification.methods.shake import SHAKE
from classification.methods.switokd import SwitOKD
from classification.methods.vanilla import Vanilla

METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "dml": DML,
    "kdcl": KDCL,
    "switokd": SwitOKD,
    "shake": SHAKE,
    "afd": AFD,
    "afid": AFID,
}


__all__ = ["ADM", "METHODS", "Method", "Output", "Outputs"]
