"""The class of each image of a folder, by a network of a run or of one weight file; as CSV or JSON.

python classification/tools/predict.py runs/dml+adm images/ --out predictions.csv
python classification/tools/predict.py runs/dml+adm/checkpoints/last/student.safetensors images/ --data.image_size 32
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import InputError
from core.files import write_atomically
from core.training.command import DONE, LineParser, device_of, run_command
from core.training.kept import refuse_kept

if TYPE_CHECKING:
    from classification.config import Task
    from classification.inference import Prediction

FORMATS = (".csv", ".json")
DATA = "data."
DIGITS = 6  # of a probability


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises: InputError, TrainingError."""
    return run(parse_options(argv))


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Needs no torch. Raises: InputError for anything wrong with it."""
    parser = LineParser(
        description="Says the class of each image, as the evaluation of a run would.", allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="a run folder; or a weight file (.safetensors, published .pth, FILE#KEY)")
    add("images", type=Path, help="a folder of images, with class folders or not, a .tar of one, or one image")
    add("--checkpoint", help="of a run: last (unless given), best or step-00000123")
    add("--role", help="which network of a run, or its average as student_ema; the student unless given")
    add("--network", help="of a weight file, as cifar_resnet20 or a timm name; our files say it")
    add("--mean", type=float, nargs="+", help="of a weight file, per channel, of images in [0, 1]; our files say it")
    add("--std", type=float, nargs="+", help="likewise")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU where there is one")
    add("--out", type=Path, help="FILE.csv or FILE.json; CSV to the terminal unless given")
    add("--data.name", help="data set, for class names and image size; a run knows its own")
    add("--data.root", help="where it is now; without it, classes have numbers")
    add("--data.classes", type=int, help="only its first so many classes")
    add("--data.image_size", type=int, help="height and width in pixels that the network wants")
    add("--data.workers", type=int, help="processes that decode, where there are thousands of images")
    options = parser.parse_args(argv)
    if options.out is not None and options.out.suffix.lower() not in FORMATS:
        raise InputError(f"--out {options.out}: its name must end in {' or '.join(FORMATS)}")
    is_run = Path(options.model).is_dir()
    if is_run and any((options.network, options.mean, options.std)):
        raise InputError("--network, --mean and --std belong to a weight file: a run's networks are known")
    if not is_run and (options.checkpoint or options.role):
        raise InputError(f"--checkpoint and --role belong to a run folder, and {options.model} is none")
    options.checkpoint = options.checkpoint or "last"
    options.weights, options.pretrained = options.model, False  # as evaluate.py has them
    return options


def run(options: argparse.Namespace, task: Task | None = None) -> int:
    """Predicts and writes. Raises: InputError, also where no image can be read."""
    from tqdm import tqdm

    from classification.config import ONLINE
    from classification.data import DataConfig
    from classification.data.sources import Images, list_images
    from classification.experiment import main_role
    from classification.inference import open_run, open_weights, predict
    from classification.tools.evaluate import weights_command

    images = Images(list_images(options.images))
    given = {name.removeprefix(DATA): value for name, value in vars(options).items() if name.startswith(DATA)}
    given = {name: value for name, value in given.items() if value is not None}
    if Path(options.model).is_dir():
        experiment = open_run(Path(options.model), options.checkpoint, given, task or ONLINE)
    else:
        refuse_kept(options.model)
        options.data = DataConfig(**{"name": "folder", **given})
        experiment = open_weights(weights_command(options), options.weights, "name" in given)
    role = options.role or main_role(experiment.distiller.output_roles)
    skipped: list[InputError] = []
    found = predict(experiment, role, images, device_of(options), skipped)
    hidden = None if options.out is not None else True  # the rows themselves go to the terminal
    shown = tqdm(found, total=len(images.files), unit="image", disable=hidden, leave=False, dynamic_ncols=True)
    lines = as_json(shown) if options.out is not None and options.out.suffix.lower() == ".json" else as_csv(shown)
    text = []
    for line in lines:
        if options.out is None:
            sys.stdout.buffer.write(_encoded(line))
        else:
            text.append(line)
    for error in skipped:
        print(f"skipped: {error}", file=sys.stderr)
    if len(skipped) == len(images.files):
        raise InputError(f"none of the {len(skipped)} image(s) of {options.images} can be read")
    if options.out is not None:
        write_atomically(options.out, lambda file: file.write_bytes(_encoded("".join(text))))
        print(f"{len(images.files) - len(skipped):,} predictions of {role} written to {options.out}")
    if skipped:
        print(f"{len(skipped):,} of {len(images.files):,} images cannot be read and are skipped", file=sys.stderr)
    return DONE


def as_csv(predictions: Iterator[Prediction]) -> Iterator[str]:
    """Lines: file, class, probability, class_2, probability_2, ..., as many as are told; nothing of no prediction."""
    for number, (file, classes, probabilities) in enumerate(predictions):
        if number == 0:
            more = [f"{name}_{place}" for place in range(2, len(classes) + 1) for name in ("class", "probability")]
            yield _csv_line(["file", "class", "probability", *more])
        pairs = zip(classes, probabilities, strict=True)
        yield _csv_line([file, *(cell for name, p in pairs for cell in (name, f"{p:.{DIGITS}g}"))])


def _csv_line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def as_json(predictions: Iterator[Prediction]) -> Iterator[str]:
    """Lines of a list of ``{"file", "class", "probability", "top": [{"class", "probability"}, ...]}``."""
    start = "[\n"
    for file, classes, probabilities in predictions:
        pairs = zip(classes, probabilities, strict=True)
        top: list[dict[str, Any]] = [{"class": name, "probability": float(f"{p:.{DIGITS}g}")} for name, p in pairs]
        yield start + json.dumps({"file": file, **top[0], "top": top})
        start = ",\n"
    yield "\n]\n"


def _encoded(text: str) -> bytes:
    """File names need not be UTF-8."""
    return text.encode(errors="surrogateescape")


if __name__ == "__main__":
    run_command(main)
