"""ADM for dense prediction, on mmsegmentation (Table 5): DeepLabV3 and PSPNet as teacher and student."""

import contextlib
import io
import warnings

from core.training.command import missing_extra

with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about compiled operators that nothing here uses; what is printed spoils output
    try:
        import mmseg.apis
        import mmseg.datasets  # noqa: F401
    except ImportError as error:
        raise missing_extra(error, "segmentation") from error
