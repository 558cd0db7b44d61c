"""What the tests of the offline commands share: a small run on real digits."""

from __future__ import annotations

from pathlib import Path

TEACHER, STUDENT = "cifar_wrn_10_2", "cifar_resnet8"  # last maps of 128 and 64 channels
# 5 digits, 120 images of each, at 8 pixels: epochs of 12 steps, and 180 test images.
DIGITS = ["--data.name", "digits", "--data.classes", "5", "--data.per_class", "120", "--data.image_size", "8"]
FIT = ["--batch_size", "50", "--fit.log_every", "7", "--fit.device", "cpu", "--fit.trackers", "[]"]


def arguments(out: Path, teacher: Path | str, *more: str, method: str = "kd+adm", student: str = STUDENT) -> list[str]:
    """Two epochs of 24, 24 and 12 images."""
    networks = ["--networks.teacher.name", TEACHER, "--networks.teacher.weights", str(teacher)]
    networks += ["--networks.student.name", student, "--method", method, "--out", str(out)]
    short = ["--data.per_class", "12", "--batch_size", "24", "--fit.epochs", "2", "--fit.log_every", "2"]
    return [*DIGITS, *FIT, *short, *networks, *more]
