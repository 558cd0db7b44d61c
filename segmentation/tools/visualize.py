"""What both networks of a run see: image, truth, predictions, their maps' similarity and both attentions.

    python segmentation/tools/visualize.py runs/x --images 4

Writes `<run>/figures/maps.png`; `--checkpoint` other than last puts its name into the file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.errors import InputError
from core.files import make_folder
from core.training.command import DONE, LineParser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    parser = LineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", help="run folder")
    add("--checkpoint", default="last", help="last, best or iter_400")
    add("--images", type=int, default=4, help="rows of the figure, spread evenly over the evaluated images")
    add("--data-root", help="folder of the data set, if not where the run's config says")
    options = parser.parse_args(argv)
    if options.images < 1:
        raise InputError("--images must be at least 1")

    from segmentation.experiment import restore  # after the command line is read: --help is quick
    from segmentation.figures import draw

    found = restore(options.run, None, options.checkpoint, None, options.data_root)
    suffix = "" if options.checkpoint == "last" else f"-{found.checkpoint.stem}"
    file = make_folder(Path(options.run) / "figures") / f"maps{suffix}.png"
    if not draw(found.model, found.loader.dataset, options.images, file):
        print("the maps have different channels and no adapter (a run without ADM): there is no S to draw")
    print(f"written to {file}")
    return DONE


if __name__ == "__main__":
    run_command(main)
