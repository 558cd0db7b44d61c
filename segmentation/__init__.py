"""ADM for dense prediction, on mmsegmentation (Table 5): DeepLabV3 and PSPNet as teacher and student."""

import contextlib
import io
import warnings

with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about compiled operators that nothing here uses; what is printed spoils output
    import mmseg.apis
    import mmseg.datasets  # noqa: F401
