"""Predicting by a run of offline distillation: by its student or its teacher, as evaluation sees them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from runs import offline_arguments

from classification.experiment import command_of, images_at, restore
from classification.tools import predict as online_predict
from core.training.checkpoint import find_checkpoint
from offline_kd.config import OFFLINE
from offline_kd.tools import predict


def test_the_student_of_a_run_predicts(
    tmp_path: Path, teacher: Path, command: Callable[[list[str]], tuple[int, str, str]], shell: Any, quick: None
) -> None:
    run, images = tmp_path / "run", tmp_path / "images"
    assert command(offline_arguments(run, teacher))[0] == 0
    experiment = restore(command_of(run, OFFLINE), find_checkpoint(run, "last"))
    pixels = images_at(experiment.datasets.test, 20)
    images.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / f"{number:02d}.png")
    for role in ("student", "teacher"):
        code, out, said = shell(predict.main, [str(run), str(images), "--role", role, "--device", "cpu"])
        assert code == 0, said
        expected = experiment.distiller.outputs(pixels)[role].logits.argmax(1).tolist()
        assert [int(row["class"]) for row in csv.DictReader(out.splitlines())] == expected
    expected = f"error: {run} is a run of offline_kd: use the tools in offline_kd/tools\n"
    assert shell(online_predict.main, [str(run), str(images)]) == (2, "", expected)
