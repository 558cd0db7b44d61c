"""Every offline method by the paper's label. A new one is one file and one line here; `+adm` composes with any."""

from classification.methods.base import Method
from offline_kd.methods.diswot import DisWOT
from offline_kd.methods.dkd import DKD
from offline_kd.methods.kd import KD
from offline_kd.methods.norm import NORM
from offline_kd.methods.vanilla import Vanilla

METHODS: dict[str, type[Method]] = {"vanilla": Vanilla, "kd": KD, "dkd": DKD, "diswot": DisWOT, "norm": NORM}

__all__ = ["METHODS"]
