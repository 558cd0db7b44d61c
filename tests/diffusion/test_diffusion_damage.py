"""Every file of a chain, of a DiT's run, of latents and of an evaluation, spoiled: one line, or the right result."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DAMAGES, Outcome, assert_refused_or_good, damaged, files_of, outcome
from runs import CPU, ROOT, assert_same, last_checkpoint, metrics, stop_at, undrawn
from runs import read as read_json

pytest.importorskip("diffusers")
pytest.importorskip("torch_fidelity")

import numpy as np
from PIL import Image

from core.errors import InputError, TrainingError, notices
from core.training.command import INTERRUPTED
from diffusion.dit.distiller import DiTDistiller
from diffusion.progressive.distiller import ProgressiveDistiller
from diffusion.tools import encode_latents, evaluate, sample, train, visualize
from tools import compare

Case = tuple[str, str]
"""A file of a folder, and the damage done to it."""
IDLE = ("run.lock", "log.txt", "curves.png")
"""Nothing reads them again, so that any damage leaves the results as they are."""
RECIPES = ROOT / "diffusion/recipes"
SMALL = ["--features", "digits", "--samples", "20", "--device", "cpu"]


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """As a shell has it: an exit code instead of the two errors that are said in a line, no notices left over."""

    def run(argv: list[str]) -> int:
        notices()
        try:
            with undrawn():
                return main(argv)
        except (InputError, TrainingError) as error:
            print(f"error: {error}")
            return 2 if isinstance(error, InputError) else 1

    return run


def done(main: Callable[[list[str]], int], argv: list[str]) -> Outcome:
    return outcome(command(main), argv)


# --- undamaged runs ---------------------------------------------------------------------------------------------------


def chain_arguments(out: Path, seed: int = 0) -> list[str]:
    """A base network and a student of one step, three steps each."""
    network = ["--network.width", "8", "--network.groups", "4", "--batch_size", "16", "--data.limit", "48"]
    lengths = ["--base.steps", "3", "--base.warmup", "1", "--rounds.steps", "2", "--rounds.last_steps", "3"]
    fit = ["--fit.log_every", "2", "--fit.evaluate_every", "2", *CPU, "--progress_bar", "false", "--seed", str(seed)]
    recipe = ["progressive", "--config", str(RECIPES / "digits_progressive.yaml"), "--out", str(out)]
    return [*recipe, "--chain", "[2,1]", *network, *lengths, *fit]


def dit_arguments(out: Path, seed: int = 0) -> list[str]:
    """Four steps, with exports after 2 and 4."""
    network = ["--student.width", "16", "--student.depth", "1", "--student.heads", "2", "--batch_size", "16"]
    network += ["--teacher_network.width", "24", "--teacher_network.depth", "1", "--teacher_network.heads", "3"]
    fit = ["--fit.steps", "4", "--fit.log_every", "2", "--fit.evaluate_every", "2", *CPU, "--progress_bar", "false"]
    recipe = ["dit", "--config", str(RECIPES / "dit_digits.yaml"), "--teacher", "online", "--seed", str(seed)]
    return [*recipe, "--data.limit", "80", *network, *fit, "--out", str(out)]


def interrupted(argv: list[str], kind: Any, last: int, **where: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, last, of=kind, **where)
        assert done(train.main, argv).code == INTERRUPTED


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two seeds: chains and DiTs, finished and cut off; latents with what they were made from."""
    from diffusers import AutoencoderKL

    top = tmp_path_factory.mktemp("damage")
    for seed in (0, 1):
        chain, dit = top / f"chain-{seed}", top / f"dit-{seed}"
        interrupted(chain_arguments(chain, seed), ProgressiveDistiller, 1, where=lambda one: one.steps == 1)
        shutil.copytree(chain, top / f"chain-cut-{seed}", symlinks=True)
        interrupted(dit_arguments(dit, seed), DiTDistiller, 3)
        shutil.copytree(dit, top / f"dit-cut-{seed}", symlinks=True)
        for argv in (chain_arguments(chain, seed), dit_arguments(dit, seed)):
            assert done(train.main, argv).code == 0
        torch.manual_seed(seed)
        blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=8, **blocks).save_pretrained(top / f"vae-{seed}")
    generator = np.random.default_rng(0)
    for number in range(6):
        file = top / "images" / "abc"[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    for seed in (0, 1):
        assert done(encode_latents.main, encode_arguments(top, top / f"latents-{seed}", seed)).code == 0
    return top


def encode_arguments(made: Path, out: Path, seed: int = 0) -> list[str]:
    sizes = ["--image_size", "16", "--shard_size", "4", "--batch_size", "2", "--workers", "1", "--device", "cpu"]
    return [str(made / "images"), "--vae", str(made / f"vae-{seed}"), "--out", str(out), *sizes]


def some(folder: Path) -> Iterator[Case]:
    """The last file of each name, as the newest checkpoint's, by the damages in turn.

    Of a finished chain and a finished DiT, whose files have the same names, each the half.
    """
    names = {Path(name).name: name for name in files_of(folder) if Path(name).name not in IDLE}
    half = {"chain-0": slice(0, None, 2), "dit-0": slice(1, None, 2)}.get(folder.name, slice(None))
    yield from list(zip(names.values(), cycle(DAMAGES)))[half]


def all_of(folder: Path) -> Iterator[Case]:
    yield from ((name, damage) for name in files_of(folder) for damage in DAMAGES)


# --- what must hold ---------------------------------------------------------------------------------------------------


def commands(run: Path, to: Path) -> dict[str, tuple[Any, list[str], Callable[[Outcome], Any]]]:
    """Of each command that reads a run: it, its arguments, and what it makes of the run."""
    dit = ["--guidance", "1", "--sampling_steps", "2"] if run.name.startswith("dit") else []
    scores, grids, maps = to / "scores.json", to / "grids", to / "maps"
    few = ["--images", "4", "--rows", "1", "--times", "2", "--device", "cpu", "--out", str(maps)]
    sampled = [str(run), "--rows", "1", "--columns", "2", "--device", "cpu", *dit, "--out", str(grids)]
    scored = [str(run), *SMALL, *dit, "--cache", str(to / "cache"), "--out", str(scores)]
    found: dict[str, tuple[Any, list[str], Callable[[Outcome], Any]]] = {
        "evaluate": (evaluate.main, scored, lambda _: {r["network"]: r["FD-digits"] for r in rows_of(scores)}),
        "sample": (
            sample.main,
            sampled,
            lambda _: {f.name: np.asarray(Image.open(f)).tolist() for f in grids.iterdir()},
        ),
        "compare": (compare.main, [str(run)], lambda result: result.said),
    }
    if not dit:
        found["visualize"] = (visualize.main, [str(run), *few], lambda _: rows_of(maps / "similarity-0001.json"))
    return found


def pictures(folder: Path) -> dict[str, Any]:
    return {file.name: np.asarray(Image.open(file)).tolist() for file in folder.iterdir()}


def rows_of(file: Path) -> Any:
    return json.loads(file.read_text())["rows"]


def whole_again(run: Path, whole: Path, result: Outcome, where: str) -> None:
    """After the run's own command: the undamaged run's weights; of a spoiled log what is left, which is said."""
    if "is finished" in result.said and "is written anew" not in result.said:
        assert (run / "summary.json").read_bytes() == (whole / "summary.json").read_bytes(), where
        return
    for folder in (file.parent for file in whole.glob("**/metrics.jsonl")):
        there = run / folder.relative_to(whole)
        finished = (
            read_json(there / "summary.json")["wall_seconds_of_last_start"]
            == read_json(folder / "summary.json")["wall_seconds_of_last_start"]
        )
        if not finished:  # else the command had no business there
            assert_same(last_checkpoint(folder), last_checkpoint(there), where)
            rows, before = metrics(there), metrics(folder)
            assert rows == before or (len(rows) <= len(before) and "they are damaged" in result.said), where
        for file in folder.glob("student/*.safetensors"):
            assert file.read_bytes() == (there / file.relative_to(folder)).read_bytes(), where


def go_through(made: Path, kind: str, cases: Iterator[Case], tmp_path: Path, every: bool = False) -> Counter[str]:
    """Each damage of a run, then one command that reads it, of a run that was cut off its own; or ``every``."""
    own = {"chain": chain_arguments, "dit": dit_arguments}[kind.removesuffix("-cut")]
    whole, place, to = made / f"{kind.removesuffix('-cut')}-0", tmp_path / f"{kind}-0", tmp_path / "to"
    shutil.copytree(made / f"{kind}-0", place, symlinks=True)
    expected, counts = {}, Counter[str]()
    for name, (main, argv, read) in commands(place, to).items() if every or not kind.endswith("-cut") else ():
        result = done(main, argv)
        assert result.code == 0 or kind.endswith("cut") or name == "compare", result.said
        if result.code == 0:
            expected[name] = read(result)
    for number, (file, damage) in enumerate(cases):
        where = f"{kind}: {file}, {damage}"
        names = list(expected) if every else list(expected)[number % max(len(expected), 1) :][:1]
        damaged(made / f"{kind}-0", made / f"{kind}-1", place, file, damage)
        for name in names:
            main, argv, read = commands(place, to)[name]
            for old in ("scores.json", "grids", "maps"):
                shutil.rmtree(to / old, ignore_errors=True) if (to / old).is_dir() else (to / old).unlink(
                    missing_ok=True
                )
            result = done(main, argv)
            assert_refused_or_good(
                result,
                f"{where}, {name}",
                lambda: assert_same(read(result), expected[name], f"{where}, {name}"),  # noqa: B023
            )
            counts[str(result.code)] += 1
        if not every and not kind.endswith("-cut"):
            continue
        result = done(train.main, own(place))
        assert_refused_or_good(result, where, lambda: whole_again(place, whole, result, where))  # noqa: B023
        counts[f"resume {result.code}"] += 1
    return counts


@pytest.mark.parametrize("kind", ["chain", "chain-cut", "dit", "dit-cut"])
def test_a_spoiled_file_of_a_run_changes_no_result(kind: str, made: Path, tmp_path: Path) -> None:
    counts = go_through(made, kind, some(made / f"{kind}-0"), tmp_path)
    assert counts["0"] + counts["resume 0"] > 0 < counts["2"] + counts["resume 2"], counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "chain-cut", "dit", "dit-cut"])
def test_every_damage_of_every_file_changes_no_result(kind: str, made: Path, tmp_path: Path) -> None:
    print(kind, go_through(made, kind, all_of(made / f"{kind}-0"), tmp_path, every=True))


def test_a_teacher_exchanged_for_another_runs_is_made_anew(made: Path, tmp_path: Path) -> None:
    """Its weights alone, and its folder with all that it says of itself."""
    run, name = tmp_path / "chain-cut-0", "base/teacher/diffusion_pytorch_model.safetensors"
    for whole_folder in (False, True):
        damaged(made / "chain-cut-0", made / "chain-cut-1", run, name, "another's")
        if whole_folder:
            shutil.copytree(made / "chain-cut-1/base/teacher", run / "base/teacher", dirs_exist_ok=True)
        result = done(train.main, chain_arguments(run))
        assert result.code == 0 and "base/teacher" in result.said and "is written anew" in result.said, result.said
        whole_again(run, made / "chain-0", result, name)
        assert (run / name).read_bytes() == (made / "chain-0" / name).read_bytes()


# --- latents ----------------------------------------------------------------------------------------------------------


def test_spoiled_latents_are_refused_or_made_anew(made: Path, tmp_path: Path) -> None:
    cases = zip(files_of(made / "latents-0"), ("half", "flipped", "another's"), strict=True)
    spoil_latents(made, cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_latents_spoiled_in_every_way_are_refused_or_made_anew(damage: str, made: Path, tmp_path: Path) -> None:
    spoil_latents(made, ((file, damage) for file in files_of(made / "latents-0")), tmp_path)


def spoil_latents(made: Path, cases: Iterable[Case], tmp_path: Path) -> None:
    """Trains on the spoiled ones, and encodes once more."""
    whole, place = made / "latents-0", tmp_path / "latents"
    more = ["--data.name", "latents", "--data.limit", "6", "--batch_size", "2", "--student.patch", "4"]
    more += ["--method", "vanilla", "--fit.steps", "6"]
    assert done(train.main, [*vanilla(tmp_path / "expected"), *more, "--data.root", str(whole)]).code == 0
    for file, damage in cases:
        where = f"{file}, {damage}"
        damaged(whole, made / "latents-1", place, file, damage)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        result = done(train.main, [*vanilla(tmp_path / "run"), *more, "--data.root", str(place)])
        assert_refused_or_good(
            result,
            where,
            lambda: assert_same(metrics(tmp_path / "run"), metrics(tmp_path / "expected"), where),  # noqa: B023
        )
        result = done(encode_latents.main, encode_arguments(made, place))
        assert_refused_or_good(result, where, lambda: assert_same(contents(place), contents(whole), where))  # noqa: B023


def vanilla(out: Path) -> list[str]:
    words = dit_arguments(out)
    first = words.index("--teacher")
    kept = words[:first] + words[first + 2 :]
    return [w for n, w in enumerate(kept) if "teacher_network" not in w and "teacher_network" not in kept[n - 1]]


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_bytes().hex() for file in folder.iterdir()}


# --- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "damages"), [("cache", ["zeros", "another's"]), ("json", ["flipped"]), ("images", ["half", "missing"])]
)
def test_a_spoiled_evaluation_is_refused_or_made_anew(
    kept: str, damages: list[str], made: Path, tmp_path: Path
) -> None:
    spoil_evaluation(kept, damages, made, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["cache", "json", "images"])
def test_an_evaluation_spoiled_in_every_way_is_refused_or_made_anew(kept: str, made: Path, tmp_path: Path) -> None:
    spoil_evaluation(kept, DAMAGES, made, tmp_path)


def spoil_evaluation(kept: str, damages: Iterable[str], made: Path, tmp_path: Path) -> None:
    """Spoils the real images' statistics, the scores or a sampled image; compares, and evaluates once more."""
    runs = [tmp_path / f"chain-{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        shutil.copytree(made / f"chain-{seed}", run, symlinks=True)

    def score(run: Path, limit: str = "48") -> Outcome:
        words = ["--cache", str(run / "cache"), "--save", str(run / "images"), "--data.limit", limit]
        return done(evaluate.main, [str(run), *SMALL, *words])

    assert score(runs[0]).code == 0 and score(runs[1], "47").code == 0
    name = "evaluation-digits.json"
    (file,) = (
        [name]
        if kept == "json"
        else ["images/round-0001-steps-0001/00003.png"]
        if kept == "images"
        else [f"cache/{one.name}" for one in (runs[0] / "cache").iterdir()]
    )
    (theirs,) = (runs[1] / "cache").iterdir()
    theirs.rename(runs[1] / file) if kept == "cache" else None
    expected, says = rows_of(runs[0] / name), done(compare.main, [str(runs[0])])
    shutil.copytree(runs[0], tmp_path / "whole", symlinks=True)
    for damage in damages:
        damaged(tmp_path / "whole", runs[1], runs[0], file, damage)
        where = f"{file}, {damage}"
        looked = done(compare.main, [str(runs[0])])
        assert_refused_or_good(looked, where, lambda: assert_same(looked.said, says.said, where))  # noqa: B023
        if kept != "json":
            (runs[0] / name).unlink()
        scores = [{key: row[key] for key in row if key != "sampling_seconds"} for row in expected]
        result = score(runs[0])
        again = rows_of(runs[0] / name) if result.code == 0 else []
        found = [{key: row[key] for key in row if key != "sampling_seconds"} for row in again]
        assert_refused_or_good(result, where, lambda: assert_same(found, scores, where))  # noqa: B023
        if kept == "images":
            folder = (runs[0] / file).parent
            argv = ["--images", str(folder), *SMALL, "--data.name", "digits", "--cache", str(tmp_path / "cache")]
            assert_refused_or_good(done(evaluate.main, argv), where, lambda: None)
