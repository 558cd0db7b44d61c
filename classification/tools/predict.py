"""The class of each image of a folder, by a network of a run, of one weight file, or exported; as CSV or JSON.

python classification/tools/predict.py runs/dml+adm images/ --out predictions.csv
python classification/tools/predict.py runs/dml+adm/checkpoints/last/student.safetensors images/ --data.image_size 32
python classification/tools/predict.py student/model.onnx images/ --out predictions.csv
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
    from classification.inference import Classifier, Prediction

FORMATS = (".csv", ".json")
EXPORTED = ("config.json", "model.onnx", "model.pt2")
"""By which a folder that `evaluate.py --export` (or timm, or transformers) wrote is known."""
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
    add(
        "model",
        help="a run folder; a weight file (.safetensors, published .pth, FILE#KEY); or an exported folder, .onnx, .pt2",
    )
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
    refuse_kept(Path(options.model))
    if not any(Path(place).exists() for place in (options.model, options.model.rpartition("#")[0] or options.model)):
        raise InputError(f"there is no {options.model}: give a run folder, an exported folder or a weight file")
    options.exported = is_exported(Path(options.model))
    is_run = Path(options.model).is_dir() and not options.exported
    if options.exported and any(value is not None for value in given_data(options).values()):
        raise InputError(f"{options.model} says itself which images it takes: leave the options of --data out")
    if (is_run or options.exported) and any((options.network, options.mean, options.std)):
        known = "a run's networks are known" if is_run else f"{options.model} says its own"
        raise InputError(f"--network, --mean and --std belong to a weight file: {known}")
    if not is_run and (options.checkpoint or options.role):
        raise InputError(f"--checkpoint and --role belong to a run folder, and {options.model} is none")
    options.checkpoint = options.checkpoint or "last"
    options.weights, options.pretrained = options.model, False  # as evaluate.py has them
    return options


def is_exported(place: Path) -> bool:
    """Whether a place is a network that was written for others, and neither a run nor a weight file."""
    if place.is_dir():
        return not (place / "config.yaml").exists() and any((place / name).is_file() for name in EXPORTED)
    return place.suffix.lower() in (".onnx", ".pt2") and place.is_file()


def given_data(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the data set, by their names there; None where one is not given. Those of reading apart."""
    said = {name.removeprefix(DATA): value for name, value in vars(options).items() if name.startswith(DATA)}
    return {name: value for name, value in said.items() if name != "workers"}


def open_model(options: argparse.Namespace, task: Task | None, device: str) -> tuple[Classifier, int, str]:
    """What predicts, by how many processes to decode, and what it is called. Raises: InputError."""
    from classification.config import ONLINE
    from classification.data import DataConfig
    from classification.experiment import main_role
    from classification.inference import of_experiment, open_run, open_weights
    from classification.tools.evaluate import weights_command

    workers = vars(options)["data.workers"]
    given = {name: value for name, value in given_data(options).items() if value is not None}
    given |= {} if workers is None else {"workers": workers}
    if options.exported:
        from classification.exported import open_exported

        place = Path(options.model)
        return open_exported(place, device), DataConfig(**given).workers, place.name
    if Path(options.model).is_dir():
        experiment = open_run(Path(options.model), options.checkpoint, given, task or ONLINE)
    else:
        refuse_kept(options.model)
        options.data = DataConfig(**{"name": "folder", **given})
        experiment = open_weights(weights_command(options), options.weights, "name" in given)
    role = options.role or main_role(experiment.distiller.output_roles)
    return of_experiment(experiment, role, device), experiment.command.config.data.workers, role


def run(options: argparse.Namespace, task: Task | None = None) -> int:
    """Predicts and writes. Raises: InputError, also where no image can be read."""
    from tqdm import tqdm

    from classification.data.sources import Images, list_images
    from classification.inference import predict

    images = Images(list_images(options.images))
    device = device_of(options)
    classifier, workers, role = open_model(options, task, device)
    skipped: list[InputError] = []
    found = predict(classifier, images, workers, device, skipped)
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
