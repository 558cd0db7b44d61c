"""Checkpoints: a save that fails costs nothing that was saved before, and a damaged one is stepped over."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT
from safetensors import safe_open
from torch import nn

from core.errors import InputError, TrainingError
from core.training.checkpoint import (
    find_checkpoint,
    goal,
    latest_checkpoint,
    numbered,
    point,
    prune,
    read_checkpoint,
    save_checkpoint,
    write_atomically,
)


def network(value: float, size: int = 4) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    return {"student": ({"w": torch.full((size, size), value), "n": torch.tensor(3)}, {"role": "student"})}


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file's content and every link's goal."""
    files: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            files[name] = os.readlink(path)
        elif path.is_file():
            files[name] = path.read_bytes()
        else:
            files[name] = "folder"
    return files


def folder_with(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / name).write_text(name)

    return write


def cut(file: Path, by: int = 20) -> None:
    file.write_bytes(file.read_bytes()[:-by])


# --- write_atomically -------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "new/a.txt"
    write_atomically(file, lambda p: p.write_text("old"))

    def half(path: Path) -> None:
        path.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match=r"cannot write .*a\.txt: No space left on device"):
        write_atomically(file, half)
    assert tree(tmp_path) == {"new": "folder", "new/a.txt": b"old"}

    def wrong(path: Path) -> None:
        path.write_text("ne")
        raise KeyError("a mistake of ours is not a full disk")

    with pytest.raises(KeyError):
        write_atomically(file, wrong)
    assert tree(tmp_path) == {"new": "folder", "new/a.txt": b"old"}


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed\nat 1"), RuntimeError(), OSError("full")])
def test_every_writers_error_becomes_one_line(tmp_path: Path, error: Exception) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "x").write_text("x")
        raise error

    with pytest.raises(TrainingError, match="cannot write") as caught:
        write_atomically(tmp_path / "step", fail)
    assert "\n" not in str(caught.value) and tree(tmp_path) == {}


def test_an_unfinished_write_of_a_killed_process_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "step.writing").mkdir()
    (tmp_path / "step.writing/x").write_text("x")
    write_atomically(tmp_path / "step", folder_with("y"))
    assert tree(tmp_path) == {"step": "folder", "step/y": b"y"}


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_atomically(tmp_path / "step", folder_with(name))
    assert tree(tmp_path) == {"step": "folder", "step/y": b"y"}


def test_links_are_moved_and_relative(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point("last", tmp_path / name)
        assert os.readlink(tmp_path / "last") == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "last"]
    assert (tmp_path / "a").is_dir()  # moving the link leaves its former goal alone


# --- save and read ----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    from safetensors import safe_open

    state: dict[str, Any] = {"step": 3, "x": torch.arange(3), "nested": [1, {"a": (2.5, None, "s")}]}
    save_checkpoint(tmp_path, 3, network(0.5), state)
    networks, read = read_checkpoint(tmp_path / "last")
    assert torch.equal(networks["student"]["w"], torch.full((4, 4), 0.5)) and networks["student"]["n"].item() == 3
    assert read["step"] == 3 and torch.equal(read["x"], state["x"]) and read["nested"] == state["nested"]
    with safe_open(tmp_path / "last/student.safetensors", "pt") as file:
        assert file.metadata() == {"role": "student"}


def test_weights_load_in_a_plain_network_also_where_they_are_tied_or_channels_last(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    module[2].weight = module[1].weight
    save_checkpoint(tmp_path, 1, {"student": (module.state_dict(), {})}, {})
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    other.load_state_dict(load_file(tmp_path / "last/student.safetensors"))
    for key, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


def test_only_keep_and_best_remain(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, network(step), {}, best=step == 2, keep=2)
    assert [p.name for p in numbered(tmp_path)] == ["step-00000002", "step-00000005", "step-00000006"]
    assert os.readlink(tmp_path / "last") == "step-00000006" and os.readlink(tmp_path / "best") == "step-00000002"
    save_checkpoint(tmp_path, 7, network(7), {}, best=True, keep=1)
    assert [p.name for p in numbered(tmp_path)] == ["step-00000007"]


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, network(step % 7), {"step": step}, keep=2)
    found = latest_checkpoint(tmp_path, print)
    assert found is not None and found[1]["step"] == 100_000_000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    save_checkpoint(tmp_path, 1, network(1.0), {})
    before = tree(tmp_path)
    bad = network(1.0)
    bad["student"][0]["w"][2, 3] = value
    with pytest.raises(TrainingError, match="student: the weight w is not finite at step 2; nothing was saved"):
        save_checkpoint(tmp_path, 2, bad, {}, best=True)
    with pytest.raises(TrainingError, match="outside the networks: the weight phi is not finite"):
        save_checkpoint(tmp_path, 2, network(1.0), {"extra": {"phi": torch.tensor([value])}})
    assert tree(tmp_path) == before


# --- damage -----------------------------------------------------------------------------------------------------------


def empty(file: Path) -> None:
    file.write_bytes(b"")


def scramble(file: Path) -> None:
    file.write_bytes(bytes(len(file.read_bytes())))


@pytest.mark.parametrize(
    ("name", "damage"),
    [("state.pt", d) for d in (cut, empty, scramble, Path.unlink)] + [("student.safetensors", d) for d in (cut, empty)],
)
def test_the_checkpoint_before_a_damaged_one_is_used_and_said(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, network(step), {"step": step}, best=step == 3, keep=3)
    for step in (2, 3):
        damage(tmp_path / f"step-{step:08d}" / name)
    said: list[str] = []
    found = latest_checkpoint(tmp_path, said.append)
    assert found is not None and found[1]["step"] == 1 and found[0]["student"]["w"][0, 0] == 1
    assert [s for s in said if "step-00000003 is damaged" in s] and [s for s in said if "step-00000002 is damaged" in s]
    assert said[-1].startswith("resuming from") and "step-00000001" in said[-1]
    assert all("\n" not in line for line in said)
    assert [p.name for p in numbered(tmp_path)] == ["step-00000001"]
    assert os.readlink(tmp_path / "last") == "step-00000001" and not (tmp_path / "best").is_symlink()


def another_runs(file: Path) -> None:
    """The same file of a run with other weights."""
    other = save_checkpoint(file.parents[1] / "other", 3, network(9.0), {"step": 3})
    shutil.copy(other / file.name, file)
    shutil.rmtree(other.parent)


@pytest.mark.parametrize("damage", [Path.unlink, another_runs], ids=["missing", "another run's"])
def test_weights_that_are_not_those_that_were_saved_are_stepped_over(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, network(step), {"step": step})
    damage(tmp_path / "step-00000002/student.safetensors")
    said: list[str] = []
    found = latest_checkpoint(tmp_path, said.append)
    assert found is not None and found[1]["step"] == 1
    assert "student.safetensors is missing, or not the file that was saved" in said[0]


def test_equal_checkpoints_have_equal_bytes(tmp_path: Path) -> None:
    """Also in another process, whose order of metadata is its own; and any reader reads them."""
    about = {name: str(number) for number, name in enumerate(["role", "architecture", "mean", "std", "num_classes"])}
    networks = {"student": ({"w": torch.eye(3), "ü": torch.ones(2).half()}, about)}
    folders = [save_checkpoint(tmp_path / name, 1, networks, {"step": 1}) for name in "ab"]
    first, second = (tree(folder) for folder in folders)
    assert first == second
    code = f"""
import torch
from pathlib import Path
from core.training.checkpoint import save_checkpoint
networks = {{"student": ({{"w": torch.eye(3), "ü": torch.ones(2).half()}}, {about!r})}}
save_checkpoint(Path({str(tmp_path / "c")!r}), 1, networks, {{"step": 1}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert tree(tmp_path / "c/step-00000001") == first
    with safe_open(folders[0] / "student.safetensors", "pt") as opened:
        assert opened.metadata() == about and set(opened.keys()) == {"w", "ü"}
        assert torch.equal(opened.get_tensor("w"), torch.eye(3))


def test_all_damaged_is_wrong_input_and_nothing_is_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, network(step), {})
        cut(tmp_path / f"step-{step:08d}/state.pt")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"none of the checkpoints in .* can be read: move the run folder away"):
        latest_checkpoint(tmp_path, lambda line: None)
    assert tree(tmp_path) == before


def test_none_where_there_is_none_and_leftovers_are_cleared(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere", print) is None
    (tmp_path / "step-00000004.writing").mkdir()
    (tmp_path / "step-00000004.writing/state.pt").write_text("half")
    (tmp_path / "last.writing").symlink_to("step-00000004")
    assert latest_checkpoint(tmp_path, print) is None
    assert tree(tmp_path) == {}


def test_a_link_lost_between_rename_and_link_does_not_matter(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, network(1), {"step": 1})
    save_checkpoint(tmp_path, 2, network(2), {"step": 2})
    point("last", tmp_path / "step-00000001")  # killed before the link moved
    found = latest_checkpoint(tmp_path, print)
    assert found is not None and found[1]["step"] == 2 and os.readlink(tmp_path / "last") == "step-00000002"


def test_what_a_kill_in_the_last_pruning_left_goes(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, network(step), {"step": step}, best=step == 2, keep=9)
    prune(tmp_path, 2)
    assert [p.name for p in numbered(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]
    prune(tmp_path / "nowhere", 2)


# --- file systems without links ---------------------------------------------------------------------------------------


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: object, target_is_directory: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))  # as exFAT and vfat say it

    monkeypatch.setattr(Path, "symlink_to", refuse)


@pytest.mark.usefixtures("no_links")
def test_where_there_are_no_links_text_files_say_last_and_best(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in range(1, 5):
        save_checkpoint(folder, step, network(step), {"step": step}, best=step == 2, keep=1)
    assert [p.name for p in numbered(folder)] == ["step-00000002", "step-00000004"]
    assert (folder / "last").read_text() == "step-00000004\n" and (folder / "best").read_text() == "step-00000002\n"
    assert find_checkpoint(tmp_path, "last") == goal(folder / "last") == folder / "step-00000004"
    assert find_checkpoint(tmp_path, "best") == folder / "step-00000002"
    assert read_checkpoint(goal(folder / "last"))[1]["step"] == 4
    cut(folder / "step-00000004/state.pt")
    (folder / "best").write_text("step-00000003\n")  # which is not there
    found = latest_checkpoint(folder, print)
    assert found is not None and found[1]["step"] == 2 and (folder / "last").read_text() == "step-00000002\n"
    assert not (folder / "best").exists()
    with pytest.raises(InputError, match=r"has no checkpoint 'best': it has last, step-00000002"):
        find_checkpoint(tmp_path, "best")


def test_a_link_to_itself_is_no_checkpoint_and_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save_checkpoint(folder, step, network(float(step)), {})
    (folder / "best").unlink(missing_ok=True)
    (folder / "best").symlink_to("best")
    with pytest.raises(InputError, match="has no checkpoint 'best': it has last"):
        find_checkpoint(tmp_path, "best")
    assert find_checkpoint(tmp_path, "last").name == "step-00000003"
    prune(folder, 1)
    assert [path.name for path in numbered(folder)] == ["step-00000003"]
    said: list[str] = []
    assert latest_checkpoint(folder, said.append) is not None
    assert len(said) == 1 and "best is damaged: it names best, which is not there" in said[0]
    assert not os.path.lexists(folder / "best")


def test_text_files_and_links_take_each_others_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, network(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", lambda path, target: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no")))
        save_checkpoint(tmp_path, 2, network(2), {})
    assert (tmp_path / "last").is_file() and not (tmp_path / "last").is_symlink()
    save_checkpoint(tmp_path, 3, network(3), {})
    assert os.readlink(tmp_path / "last") == "step-00000003"


@pytest.mark.usefixtures("no_links")
def test_a_damaged_text_file_ends_in_one_line_and_a_resume_writes_it_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 1, network(1), {"step": 1})
    for content in (b"", b"step-", bytes(14), b"\xff\xfe", b"../../elsewhere", bytes(4096)):
        (folder / "last").write_bytes(content)
        with pytest.raises(InputError, match=r"checkpoints/last") as error:
            read_checkpoint(find_checkpoint(tmp_path, "last"))
        assert "\n" not in str(error.value)
        assert latest_checkpoint(folder, print) is not None and goal(folder / "last").name == "step-00000001"


# --- full disk --------------------------------------------------------------------------------------------------------


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "writer", ["torch.save", "core.training.checkpoint.save_tensors", "os.fsync", "pathlib.Path.symlink_to"]
)
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    save_checkpoint(tmp_path, 1, network(1), {"step": 1}, best=True)
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(writer, no_space)
        with pytest.raises(TrainingError, match=r"cannot write .*: No space left on device"):
            save_checkpoint(tmp_path, 2, network(2), {"step": 2}, best=True)
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before
    if writer != "pathlib.Path.symlink_to":  # there the new checkpoint itself is whole
        assert after == before
    assert not [name for name in after if "writing" in name]
    assert latest_checkpoint(tmp_path, print) is not None


SAVE = """
import sys, torch
from pathlib import Path
from core.training.checkpoint import save_checkpoint
from core.training.command import run_command
size, folder = int(sys.argv[1]), Path(sys.argv[2])
def main():
    save_checkpoint(folder, 1, {"student": ({"w": torch.ones(4)}, {})}, {"step": 1})
    if sys.argv[3] == "limit":
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    big = torch.ones(size)
    where = sys.argv[4]
    save_checkpoint(folder, 2, {"student": ({"w": big if where == "weights" else big[:4]}, {})}, {"x": big.clone()})
run_command(main)
"""


def save_in_a_process(folder: Path, how: str, where: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SAVE, "1000000", str(folder), how, where]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def check_failed_save(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: cannot write"), done.stderr
    assert [p.name for p in numbered(folder)] == ["step-00000001"]
    assert not list(folder.glob("*writing*"))
    found = latest_checkpoint(folder, print)
    assert found is not None and found[1]["step"] == 1


@pytest.mark.parametrize("where", ["weights", pytest.param("state", marks=pytest.mark.slow)])
def test_a_real_limit_on_file_sizes(tmp_path: Path, where: str) -> None:
    check_failed_save(save_in_a_process(tmp_path, "limit", where), tmp_path)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("where", [pytest.param("weights", marks=pytest.mark.slow), "state"])
def test_a_really_full_disk(tiny_disk: Path, where: str) -> None:
    check_failed_save(save_in_a_process(tiny_disk / "checkpoints", "disk", where), tiny_disk / "checkpoints")
