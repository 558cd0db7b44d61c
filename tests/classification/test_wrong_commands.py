"""Wrong commands and hostile folders through classification's and offline_kd's tools: one line, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import CPU, RECIPE, ROOT, SMALL, arguments, environment, train_whole

from classification.tools import evaluate, train, visualize
from offline_kd.tools import train as offline

pytestmark = pytest.mark.usefixtures("quick")
STUDENT = ["--networks.student.name", "cifar_resnet8", "--networks.teacher.name", "cifar_resnet8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_whole(train.main, arguments(folder, "--fit.steps", "2", *STUDENT, method="dml"))
    return folder


def refused(result: tuple[int, str, str], said: str, code: int = 2) -> None:
    lines = result[2].strip().splitlines()
    assert result[0] == code and lines[-1].startswith("error: ") and said in lines[-1], result[2][-1500:]
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in result[2]


CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "names no options"),
    "list": (b"[1, 2]\n", "names no options"),
    "text": (b"hello\n", "names no options"),
    "binary": (bytes(range(256)), "is no text"),
    "latin": (b"# \xe9\nseed: 1\n", "is no text"),
    "deep": (b"a: " + b"[" * 5000, "nested too deep"),
    "itself": (b"data: &a {name: digits, x: *a}\n", "refers to itself"),
    "laughs": (b"a: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(
        f"{b}: &{b} [{','.join(9 * ['*' + a])}]\n".encode() for a, b in zip("abcdef", "bcdefg", strict=True)
    ), "says too much"),
    "twice": (b"data: {classes: 3, classes: 4}\n", "classes stands twice"),
    "code": (b"seed: !!python/object/apply:os.system ['touch ran']\n", "constructor"),
    "nested": (b"networks: {student: {nme: cifar_resnet8}}\n", "unknown option networks.student.nme"),
    "number": (b"networks: {1: {name: cifar_resnet8}}\n", "networks.1: its role must be"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_are_none_end_in_one_line(kind: str, tmp_path: Path, shell: Any) -> None:
    content, said = CONFIGS[kind]
    (tmp_path / "a.yaml").write_bytes(content)
    words = ["--config", str(tmp_path / "a.yaml"), *SMALL, *CPU, "--method", "dml", "--out", str(tmp_path / "run")]
    refused(shell(train.main, words), said)
    assert not (tmp_path / "run").exists()


def test_no_words_at_all_and_a_pipe_for_a_config(tmp_path: Path, shell: Any) -> None:
    refused(shell(train.main, []), "no networks")
    os.mkfifo(tmp_path / "pipe")
    refused(shell(train.main, ["--config", str(tmp_path / "pipe")]), "is no file")


def test_places_that_cannot_be_end_in_one_line(tmp_path: Path, shell: Any) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for out, said in ((tmp_path / "loop", "--out"), (tmp_path / ("x" * 300), "name too long")):
        refused(shell(train.main, arguments(out, "--fit.steps", "1")), said)
    refused(shell(train.main, arguments(tmp_path / "run", "--networks.student.weights", "x" * 5000)), "name too long")


def test_what_stands_where_a_file_should_go_is_kept(run: Path, tmp_path: Path, shell: Any) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("folder", "it is a folder"), ("pipe", "no regular file")):
        refused(shell(evaluate.main, [str(run), "--out", str(tmp_path / name)]), said)
    assert (tmp_path / "folder/mine.txt").read_text() == "mine" and (tmp_path / "pipe").is_fifo()
    refused(shell(evaluate.main, [str(run), "--out", str(tmp_path / "folder/mine.txt/x")]), "mine.txt/x: ", 1)


def test_a_checkpoint_is_one_of_the_run_and_flags_without_use_are_refused(run: Path, shell: Any) -> None:
    for name in ("../../other/checkpoints/last", "/etc", ".", "", "step-1"):
        refused(shell(evaluate.main, [str(run), "--checkpoint", name]), f"has no checkpoint {name!r}")
    refused(shell(evaluate.main, [str(run), "--export_role", "student"]), "only with --export FOLDER")
    refused(shell(evaluate.main, ["--weights", "a.pth", "--checkpoint", "best"]), "belongs to a run folder")
    refused(shell(evaluate.main, ["--weights", "nosuch.pth"]), "no weight file nosuch.pth")
    refused(shell(visualize.main, [str(run), "--images", "100000"]), "50 rows at most")


@pytest.mark.parametrize(
    ("method", "weights"),
    [("kd", ("ce", "kd")), ("dkd", ("ce", "alpha", "beta")), ("diswot", ("ce", "kd", "relation", "semantic"))],
)
def test_a_student_that_nothing_trains_is_refused(
    method: str, weights: tuple[str, ...], run: Path, tmp_path: Path, shell: Any
) -> None:
    words = [*SMALL, *CPU, *STUDENT, "--networks.teacher.weights", str(run), "--out", str(tmp_path / "run")]
    off = [word for name in weights for word in (f"--{method}.{name}", "0")]
    refused(shell(offline.main, [*words, "--method", method, *off]), "are all 0: nothing would train the student")


def pictures(root: Path, classes: str = "abc") -> Path:
    for number, place in enumerate(root / split / name for split in ("train", "val") for name in classes):
        place.mkdir(parents=True)
        for image in range(3):
            Image.new("RGB", (8, 8), (number * 30, image * 60, 90)).save(place / f"{image}.png")
    return root


def test_a_name_with_a_newline_stays_in_one_line_and_a_pipe_is_no_tar(tmp_path: Path, shell: Any) -> None:
    root = pictures(tmp_path / "data")
    data = ["--data.name", "folder", "--data.root", str(root), "--data.image_size", "8"]
    words = ["--config", str(RECIPE), *CPU, *STUDENT, *data, "--out", str(tmp_path / "run"), "--data.workers", "0"]
    (root / "train/a/x\ny.png").write_bytes(b"broken")
    refused(shell(train.main, words), "x y.png: broken or no image")
    (root / "train/a/x\ny.png").unlink()
    os.rename(root / "val", tmp_path / "val")
    os.mkfifo(root / "val.tar")
    refused(shell(train.main, words), "val.tar is no regular file")
    assert not (tmp_path / "run").exists()


def test_black_crops_are_said(tmp_path: Path, shell: Any) -> None:
    data = ["--data.name", "folder", "--data.root", str(pictures(tmp_path / "data")), "--data.image_size", "8"]
    words = ["--config", str(RECIPE), *CPU, *STUDENT, *data, "--out", str(tmp_path / "run"), "--data.padding", "8"]
    code, _, said = shell(train.main, [*words, "--method", "dml", "--dry-run", "--batch_size", "3"])
    assert code == 0 and "black all over" in said


def test_closed_outputs_end_no_command() -> None:
    for streams in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} tools/reproduce.py list {streams}"
        done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
