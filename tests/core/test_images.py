"""Folders and image files as they lie about: hidden, linked in circles, piped, cut off, deep and turned."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classification.data.sources import FileSource, folder_sources, list_classes
from core.errors import InputError, notices
from core.images import class_folders, image_files, open_image, read_header
from diffusion.data import DataConfig, load_images
from diffusion.dit.data import class_files


def picture(file: Path, value: int = 100, **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, value, value)).save(file, **options)
    return file


def two_classes(folder: Path) -> Path:
    for name in ("a", "b"):
        picture(folder / name / "1.png")
        picture(folder / name / "sub" / "2.PNG")
    return folder


HIDDEN = ("a/._1.png", "a/.ipynb_checkpoints/1-checkpoint.png", ".ipynb_checkpoints/c.png", "a/sub/.x/y/z.png")


def test_what_is_hidden_is_left_out_everywhere_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    expected = {name: ["1.png", "sub/2.PNG"] for name in ("a", "b")}
    assert class_folders(two_classes(tmp_path / "set")) == expected and not notices()
    for name in HIDDEN:
        picture(tmp_path / "set" / name)
    (tmp_path / "set/a/.DS_Store").write_bytes(b"x")
    assert class_folders(tmp_path / "set") == expected
    assert "4 hidden file(s) and folder(s)" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert [list(c.files) for c in [class_files(tmp_path / "set")]] == [
        ["a/1.png", "a/sub/2.PNG", "b/1.png", "b/sub/2.PNG"]
    ]
    assert {n: len(f) for n, f in list_classes(tmp_path / "set").items()} == {"a": 2, "b": 2}
    assert image_files(tmp_path / "set") == ["a/1.png", "a/sub/2.PNG", "b/1.png", "b/sub/2.PNG"]
    assert len(load_images(DataConfig("folder", str(tmp_path / "set")))) == 4
    notices()
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "set", "./set")
    assert {n: len(f) for n, f in list_classes(tmp_path / "set.tar").items()} == {"a": 1, "sub": 2, "b": 1}
    assert "4 hidden image(s)" in notices()[0]


def link(place: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / place).symlink_to(root / target if not target.startswith("/") else target)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "to the root": (link("a/loop", "."), "a/loop is a link .*circle"),
    "to itself above": (link("a/sub/loop", "a"), "a/sub/loop is a link .*circle"),
    "a class that is the root": (link("c", "."), "c is a link .*circle"),
    "two": (lambda root: (link("a/x", "b")(root), link("b/y", "a")(root)), "circle"),
    "two to the root": (lambda root: (link("a/x", ".")(root), link("b/y", ".")(root)), "a/x is a link .*circle"),
    "an image of itself": (link("a/x.png", "a/x.png"), "x.png is a link that leads nowhere"),
    "a class of itself": (link("c", "c"), "c is a link that leads nowhere"),
    "a link to nothing": (link("a/x.png", "nothing"), "x.png is a link that leads nowhere"),
    "a class of nothing": (link("c", "nothing"), "c is a link that leads nowhere"),
    "a pipe": (lambda root: os.mkfifo(root / "a/x.png"), "x.png is no regular file"),
    "a device": (link("a/x.png", "/dev/zero"), "x.png is no regular file"),
}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("task", ["classification", "diffusion", "dit"])
def test_what_cannot_be_walked_ends_in_one_line(kind: str, task: str, tmp_path: Path) -> None:
    spoil, said = PLACES[kind]
    root = two_classes(tmp_path / "set")
    spoil(root)
    with pytest.raises(InputError, match=said) as raised:
        if task == "classification":
            list_classes(root)
        elif task == "dit":
            class_files(root)
        else:
            image_files(root)
    assert "\n" not in str(raised.value) and str(root) in str(raised.value)


def test_links_that_lead_on_and_folders_named_as_images_are_followed(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    picture(tmp_path / "elsewhere/3.png")
    (root / "a/more").symlink_to(tmp_path / "elsewhere")
    picture(root / "b/x.png/4.jpg")
    assert class_folders(root) == {
        "a": ["1.png", "more/3.png", "sub/2.PNG"],
        "b": ["1.png", "sub/2.PNG", "x.png/4.jpg"],
    }


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9999))
        + chunk(b"IEND", b"")
    )


def encoded(kind: str) -> bytes:
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


BROKEN: dict[str, bytes] = {
    "empty.png": b"", "empty.jpg": b"", "zeros.png": b"\0" * 500, "text.jpg": b"not an image", "bomb.png": bomb(),
    "half.webp": encoded("WEBP")[:200], "half.gif": encoded("GIF")[:200], "half.bmp": encoded("BMP")[:200],
    **{f"cut-{n}.{s}": encoded(k)[:n] for n in (8, 30, 300, 700) for k, s in (("PNG", "png"), ("JPEG", "jpg"),
                                                                        ("TIFF", "tif"), ("PPM", "ppm"))},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(BROKEN[name])
    source = FileSource(list_classes(tmp_path), ("a",))
    for read in (lambda: open_image(tmp_path / "a" / name), lambda: source.image(0),
                 lambda: load_images(DataConfig("folder", str(tmp_path)))):  # fmt: skip
        with pytest.raises(InputError, match="cannot decode") as raised:
            read()
        assert name in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["x.png", "folder.png"])
def test_what_is_no_file_does_not_hang(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name) if name == "x.png" else (tmp_path / name).mkdir()
    for read in (open_image, read_header):
        with pytest.raises(InputError, match="no regular file"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(name: str, tmp_path: Path) -> None:
    levels = np.array([[0, 257, 128 * 257, 65535, 300, 65000]], np.uint16)
    if name == "x.pgm":
        (tmp_path / name).write_bytes(b"P5 6 1 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255, 1, 253]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 7, dtype)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif has 32 bits a pixel"):
        open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_eight_bits_are_read_as_before(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode)
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(file)
    assert np.array_equal(np.asarray(open_image(file)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_not_applied(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_image(picture(tmp_path / "x.jpg", exif=exif)).size == (8, 6)
    assert read_header(tmp_path / "x.jpg") == ("RGB", (8, 6))


def test_a_class_without_a_test_image_is_said(tmp_path: Path) -> None:
    two_classes(tmp_path / "train")
    picture(tmp_path / "val/a/1.png")
    notices()
    train, test = folder_sources(str(tmp_path))
    assert train.class_names == test.class_names == ("a", "b") and len(test.targets) == 1
    assert "val has no image of 1 class(es), as b" in notices()[0]
