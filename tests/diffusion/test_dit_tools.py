"""Evaluating and drawing a DiT's run: every export with guidance and without, going on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CPU, ROOT, in_two_processes, train_whole
from small_dit import dit

from core.training.run import read_json, save_signed_json, signed

pytest.importorskip("diffusers")
pytest.importorskip("torch_fidelity")

from diffusion import proxies
from diffusion.dit.convert import save_dit
from diffusion.dit.data import LabelledConfig, load_labelled
from diffusion.dit.gaussian import LinearSchedule
from diffusion.dit.sampling import DiTStudent, load_dit_student
from diffusion.metrics import Extractor, InMemory, features_of, scores, statistics
from diffusion.pictures import tile
from diffusion.sampling import ImageNoise
from diffusion.tools import evaluate, sample, visualize
from diffusion.tools.runs import find_students

Shell = Callable[[Callable[[list[str]], int], list[str]], tuple[int, str, str]]
DATA = LabelledConfig("digits", limit=300)


def export(run: Path, step: int, **options: Any) -> Path:
    """Random weights, others at each step."""
    network = dit(channels=1, seed=step, **options)
    with torch.no_grad():
        network.final_layer.linear.weight.mul_(0.3)
    folder = run / f"export/step-{step:08d}/student"
    save_dit(folder, network, step=step)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs/dit"
    for step in (20, 100):
        export(run, step)
    (run / "config.yaml").write_text(signed("data: {name: digits, limit: 300}\nmethod: vanilla\n"))
    return run


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    steps = ["--sampling_steps", "3", "--samples", "40", "--batch_size", "16"]
    return ["--features", "digits", "--device", "cpu", "--cache", str(tmp_path / "cache"), *steps]


def report_of(run: Path, name: str = "evaluation-digits.json") -> Any:
    return json.loads((run / name).read_text())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """(iteration's folder, guidance) of all that is sampled in this process."""
    found: list[tuple[str, float]] = []
    original = DiTStudent.sample

    def spy(self: DiTStudent, indices: Any, seed: int, **options: Any) -> Any:
        found.append((self.folder.parent.name, options["guidance"]))
        return original(self, indices, seed, **options)

    monkeypatch.setattr(DiTStudent, "sample", spy)
    return found


def test_every_iteration_is_scored_with_and_without_guidance(
    run: Path, tmp_path: Path, shell: Shell, small: list[str]
) -> None:
    code, out, err = shell(evaluate.main, [str(run), *small, "--seed", "3", "--save", str(tmp_path / "png")])
    assert code == 0, err
    report = report_of(run)
    assert [(row["iteration"], row["guidance"]) for row in report["rows"]] == [(20, 4), (20, 1), (100, 4), (100, 1)]
    assert report["real"]["images"] == 300 and report["real"]["source"]["name"] == "digits"
    assert report["dit"] == {"steps": 3, "sampler": "ddpm", "cfg_channels": 3, "precision": "tf32", "vae": None}
    extractor = Extractor(features_of("digits"))
    pixels = load_labelled(DATA).pixels
    assert pixels is not None
    real = statistics(extractor(InMemory(pixels))["features"], "real")
    lines = [line.split() for line in out.splitlines()]
    for row in report["rows"]:
        student = load_dit_student(row["network"])
        images = student.sample(range(40), 3, steps=3, guidance=row["guidance"], batch_size=16)
        expected = scores(extractor(images), real, extractor)
        assert {key: row[key] for key in expected} == expected
        (line,) = [cells for cells in lines if cells[:2] == [row["network"], str(row["iteration"])]]
        place = 2 if row["guidance"] == 4 else 4
        assert line[place : place + 2] == [f"{expected[key]:.4f}" for key in ("FD-digits", "CS-digits")]
        saved = tmp_path / f"png/{student.folder.parent.name}-student-guidance-{row['guidance']:g}/00039.png"
        assert np.array_equal(np.asarray(Image.open(saved)), images[39, 0].numpy())
    assert "FD-digits, guidance 4" in out and "CS-digits, no guidance" in out
    for row in report["rows"]:  # told as it is found
        under = "no guidance" if row["guidance"] == 1 else "guidance 4"
        assert f"{row['network']}, {under}: FD-digits {row['FD-digits']:.4f}\n" in out
    assert len({row["FD-digits"] for row in report["rows"]}) == 4


def test_the_same_command_goes_on(
    run: Path, shell: Shell, small: list[str], drawn: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after two rows; then nothing is drawn twice; a new export and a changed one are drawn, others are not."""
    scores_of = evaluate.Results.add

    def cut(self: Any, row: Any) -> None:
        scores_of(self, row)
        if len(self.report["rows"]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Results, "add", cut)
        assert shell(evaluate.main, [str(run), *small])[0] == 130
    assert drawn == [("step-00000020", 4.0), ("step-00000020", 1.0)]
    before = report_of(run)["rows"]
    assert len(before) == 2

    drawn.clear()
    assert shell(evaluate.main, [str(run), *small])[0] == 0
    assert drawn == [("step-00000100", 4.0), ("step-00000100", 1.0)]
    rows = report_of(run)["rows"]
    assert rows[:2] == before and len(rows) == 4

    drawn.clear()
    code, out, _ = shell(evaluate.main, [str(run), *small])
    assert code == 0 and not drawn and f"{rows[3]['FD-digits']:.4f}" in out
    assert report_of(run)["rows"] == rows

    export(run, 300)
    export(run, 100, classes=7)
    assert shell(evaluate.main, [str(run), *small])[0] == 0
    assert drawn == [(f"step-{step:08d}", guidance) for step in (100, 300) for guidance in (4.0, 1.0)]
    again = report_of(run)["rows"]
    assert again[:2] == before and len(again) == 6
    assert {row["FD-digits"] for row in again if row["iteration"] == 100}.isdisjoint(
        row["FD-digits"] for row in rows if row["iteration"] == 100
    )


def test_another_guidance_is_added_and_other_settings_start_anew(
    run: Path, shell: Shell, small: list[str], drawn: list[tuple[str, float]]
) -> None:
    one = [str(run), *small, "--steps", "100"]
    assert shell(evaluate.main, [*one, "--guidance", "1"])[0] == 0
    code, out, _ = shell(evaluate.main, [*one, "--guidance", "2", "1", "1.5", "2"])
    assert code == 0 and drawn == [("step-00000100", g) for g in (1.0, 2.0, 1.5)]
    heads = next(line for line in out.splitlines() if line.startswith("network"))
    assert heads.index("guidance 2") < heads.index("guidance 1.5") < heads.index("no guidance")
    old = report_of(run)
    for number, change in enumerate((["--sampler", "ddim"], ["--cfg_channels", "4"], ["--seed", "1"])):
        code, out, _ = shell(evaluate.main, [*one, "--guidance", "1", *change])
        assert code == 0 and len(drawn) == 4 + number
        assert "evaluation-digits.json.before" in out
        assert report_of(run, "evaluation-digits.json.before") == old
        old = report_of(run)
        assert len(old["rows"]) == 1


def test_guidance_beyond_the_first_three_channels_is_nothing_for_grey_images(
    run: Path, shell: Shell, small: list[str], tmp_path: Path
) -> None:
    found = []
    for channels in ("3", "4"):
        out = str(tmp_path / f"{channels}.json")
        arguments = ["--cfg_channels", channels, "--steps", "20", "--guidance", "3", "--out", out]
        assert shell(evaluate.main, [str(run), *small, *arguments])[0] == 0
        found.append(report_of(tmp_path, f"{channels}.json")["rows"][0]["FD-digits"])
    assert found[0] == found[1]


def test_latents_are_decoded_and_meet_the_reference_of_guided_diffusion(
    tmp_path: Path, shell: Shell, small: list[str]
) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae: Any = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, sample_size=8, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    run = tmp_path / "runs/latents"
    save_dit(run / "export/step-00000020/student", dit(channels=4, size=4), latent_scale=0.18215, step=20)
    (run / "config.yaml").write_text(signed("data: {name: latents, root: nowhere}\n"))

    pixels = load_labelled(DATA).pixels
    assert pixels is not None
    extractor = Extractor(features_of("digits"))
    real = statistics(extractor(InMemory(pixels))["features"], "real")
    other = np.zeros(5), np.eye(5)  # sFID's, of other features
    images = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    npz = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(npz, arr_0=images, mu=real.mu.astype("f8"), sigma=real.sigma.astype("f8"), mu_s=other[0], sigma_s=other[1])
    arguments = [str(run), *small, "--vae", str(tmp_path / "vae"), "--guidance", "2"]
    code, _, err = shell(evaluate.main, [*arguments, "--real", str(npz)])
    assert code == 0, err
    report = report_of(run)
    (row,) = report["rows"]
    student = load_dit_student(row["network"])
    decoded = student.sample(range(40), 0, guidance=2.0, steps=3, batch_size=16, vae=vae.eval())
    assert decoded.shape == (40, 3, 8, 8)
    expected = scores(extractor(decoded), real, extractor)
    assert row["FD-digits"] == pytest.approx(expected["FD-digits"], rel=1e-4)
    assert row["CS-digits"] == expected["CS-digits"] and report["real"] == {"source": str(npz), "images": None}

    for arguments, message in (
        ([str(run), *small, "--guidance", "2"], "latents hold no images to compare with: name the real side by --real"),
        ([str(run), *small, "--real", str(npz)], "samples latents: name the VAE that decodes them by --vae"),
        ([str(run), *small, "--real", str(npz), "--vae", str(run)], "no VAE in"),
    ):
        code, _, err = shell(evaluate.main, [*arguments, "--out", str(tmp_path / "new.json")])
        assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.filterwarnings("ignore:FD-R8 of")
def test_jpeg_folder_by_a_residual_network(tmp_path: Path, shell: Shell, small: list[str]) -> None:
    """The CIFAR-10 stand-in: colour images in a folder a class, features of a CIFAR ResNet."""
    generator = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / f"images/{label}/{number}.jpg")
    weights = tmp_path / "resnet8.th"
    torch.save(proxies.CifarResNet(8).network.state_dict(), weights)
    run = tmp_path / "runs/jpeg"
    save_dit(run / "export/step-00000020/student", dit(channels=3, classes=2), step=20)
    (run / "config.yaml").write_text(signed(f"data: {{name: folder, root: {tmp_path / 'moved'}}}\n"))
    arguments = [str(run), *small, "--features", f"resnet8:{weights}", "--data.root", str(tmp_path / "images")]
    code, out, err = shell(evaluate.main, arguments)
    assert code == 0, err
    report = report_of(run, "evaluation-resnet8.json")
    assert report["real"]["images"] == 12 and [row["guidance"] for row in report["rows"]] == [4, 1]
    assert "FD-R8, guidance 4" in out and all(row["CS-R8"] >= 1 for row in report["rows"])


def test_networks_of_a_run_and_single_ones(run: Path) -> None:
    step = run / "export/step-00000020"
    save_dit(step / "teacher", dit(channels=1), step=20)
    assert find_students([run]) == [step / "student", step / "teacher", run / "export/step-00000100/student"]
    assert find_students([run], [100]) == [run / "export/step-00000100/student"]
    assert find_students([step / "teacher"]) == [step / "teacher"]
    torch.save({}, run / "DiT-XL-2-256x256.pt")
    assert find_students([run / "DiT-XL-2-256x256.pt"], [5]) == [run / "DiT-XL-2-256x256.pt"]


def test_single_network_reads_its_run_s_data(run: Path, shell: Shell, small: list[str], tmp_path: Path) -> None:
    folder = run / "export/step-00000020/student"
    code, _, err = shell(evaluate.main, [str(folder), *small, "--guidance", "1"])
    assert code == 0, err
    assert report_of(folder.parent)["real"]["source"]["limit"] == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--steps", "50"], "has no network of iteration 50, only of [20, 100]"),
        (["RUN", "--last_step", "clean"], "--last_step counts only for the students of a chain"),
        (["RUN", "--guidance", "-1"], "--guidance must be finite and not negative: [-1.0]"),
        (["RUN", "--guidance", "1", ".nan"], "--guidance must be a number"),
        (["RUN", "--cfg_channels", "2"], "cfg_channels"),
        (["RUN", "--sampling_steps", "1001"], "1001 sampling steps: there are 2 to 1000"),
        (["RUN", "--sampler", "ddim", "--sampling_steps", "501"], "501 sampling steps: ddim has 500 or 1000"),
        (["RUN", "--data.root", "/absent", "--data.name", "folder"], "/absent does not exist"),
        (["RUN", "--data.nme", "digits"], "did you mean data.name"),
        (["RUN", "--vae", "/absent/vae"], "no VAE in /absent/vae"),
        (["--images", "RUN", "--guidance", "2"], "--guidance counts only for DiTs"),
    ],
)
def test_wrong_input_is_one_line(run: Path, shell: Shell, small: list[str], arguments: list[str], message: str) -> None:
    given = [str(run) if a == "RUN" else a for a in arguments]
    code, _, err = shell(evaluate.main, [*small, *given])
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (run / "evaluation-digits.json").exists()


def test_a_run_without_label_dropout_is_not_guided(run: Path, shell: Shell, small: list[str]) -> None:
    for about in run.glob("export/*/student/adm.json"):
        said = {**read_json(about), "null_label": False}
        save_signed_json(said, about)
    code, _, err = shell(evaluate.main, [*small, str(run)])
    assert code == 2 and "cannot be guided; give --guidance 1" in err and err.count("\n") == 1, err
    assert not (run / "evaluation-digits.json").exists()
    assert shell(evaluate.main, [*small, str(run), "--guidance", "1"])[0] == 0


def test_damaged_results_are_not_overwritten(run: Path, shell: Shell, small: list[str]) -> None:
    (run / "evaluation-digits.json").write_text("{")
    code, _, err = shell(evaluate.main, [str(run), *small])
    assert code == 2 and "is no JSON of results" in err
    assert (run / "evaluation-digits.json").read_text() == "{"


def test_pictures_are_a_row_a_class(run: Path, tmp_path: Path, shell: Shell) -> None:
    options = ["--classes", "7", "2", "--columns", "3", "--guidance", "3", "1", "--seed", "5", "--sampler", "ddim"]
    arguments = [*options, "--sampling_steps", "4", "--device", "cpu"]
    code, _, err = shell(sample.main, [str(run), *arguments, "--out", str(tmp_path / "figures")])
    assert code == 0, err
    grids = [f"samples-{step:08d}-guidance-{g}.png" for step in (20, 100) for g in (1, 3)]
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == sorted([*grids, "samples.png"])
    student = load_dit_student(run / "export/step-00000100/student")
    images = student.sample(range(6), 5, classes=[7, 7, 7, 2, 2, 2], guidance=3.0, sampler="ddim", steps=4)
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "figures/samples-00000100-guidance-3.png")))
    assert torch.equal(grid, tile(images, 3))

    code, _, err = shell(sample.main, [str(run), "--device", "cpu", "--rows", "20", "--sampling_steps", "2"])
    assert code == 0, err
    with Image.open(run / "figures/samples-00000020-guidance-4.png") as picture:
        assert picture.size == (8 * 9 - 1, 10 * 9 - 1)  # no more rows than classes
    for wrong, message in (
        (["--classes", "10"], "has the classes 0 to 9, not 10"),
        (["--vae", "/absent/vae"], "no VAE in /absent/vae"),
        (["--steps", "1"], "has no network of iteration 1"),
        (["--gif", "true"], "--gif counts only for the students of a chain"),
    ):
        code, _, err = shell(sample.main, [str(run), *wrong, "--device", "cpu", "--sampling_steps", "2"])
        assert code == 2 and message in err and err.count("\n") == 1, err


FEW = ["--images", "6", "--rows", "2", "--times", "4", "--batch_size", "4", "--device", "cpu"]


def test_similarity_of_a_dit_and_its_teacher_over_time_and_place(tmp_path: Path, shell: Shell) -> None:
    student, teacher = (dit(channels=1, seed=seed) for seed in (1, 2))
    folders = []
    for name, network in (("student", student), ("teacher", teacher)):
        folders += [f"--{name}", str(tmp_path / name)]
        save_dit(tmp_path / name, network, step=3)
    data = ["--data.name", "digits", "--data.limit", "300"]
    code, _, err = shell(visualize.main, [*folders, *data, *FEW, "--out", str(tmp_path / "figures")])
    assert code == 0, err
    report = json.loads((tmp_path / "figures/similarity-student.json").read_text())
    assert (tmp_path / "figures/similarity-student.png").is_file()
    assert [row["t"] for row in report["rows"]] == [0, 250, 500, 749, 999]
    # Reference: one time by hand.
    data = load_labelled(DATA)
    positions = [0, 50, 100, 150, 200, 250]
    x = data.pixels[positions] / 127.5 - 1.0
    z = LinearSchedule().noisy(x, ImageNoise(0, range(6), (1, 8, 8))(), torch.full((6,), 500))
    with torch.no_grad():
        maps = [n.forward_map(z, torch.full((6,), 500), data.labels[positions])[0] for n in (student, teacher)]
    expected = torch.nn.functional.cosine_similarity(*maps, dim=1)
    assert report["rows"][2]["mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert report["rows"][2]["maximum"] == pytest.approx(expected.flatten(1).amax(1).mean().item(), abs=1e-5)


def test_similarity_of_a_dits_run_is_taken_through_its_phi(tmp_path: Path, shell: Shell) -> None:
    from diffusion.tools.train import main as train

    out = tmp_path / "run"
    network = ["--student.width", "16", "--student.depth", "2", "--student.heads", "2", "--batch_size", "16"]
    online = ["--teacher", "online", "--teacher_network.width", "24", "--teacher_network.depth", "2"]
    fit = ["--fit.steps", "4", "--fit.evaluate_every", "2", "--fit.keep", "1", "--data.limit", "80", *CPU]
    recipe = ["dit", "--config", str(ROOT / "diffusion/recipes/dit_digits.yaml"), "--method", "mse+adm"]
    train_whole(train, [*recipe, *network, *online, "--teacher_network.heads", "3", *fit, "--out", str(out)])
    code, said, err = shell(visualize.main, [str(out), *FEW])
    assert code == 0, err
    assert "export/step-00000004/student" in said and "export/step-00000004/teacher" in said
    report = json.loads((out / "figures/similarity-00000004.json").read_text())
    assert len(report["rows"]) == 5 and all(-1 < row["mean"] < 1 for row in report["rows"])
    for wrong, message in (
        (["--steps", "3"], "has no student of iteration 3, only of [2, 4]"),
        (["--steps", "2"], "keeps no checkpoint of iteration 2 with its adapter"),
        (["--data.limit", "0"], "limit must be at least 1"),
    ):
        code, _, err = shell(visualize.main, [str(out), *wrong, *FEW])
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_similarity_needs_two_dits_that_fit(run: Path, tmp_path: Path, shell: Shell) -> None:
    code, _, err = shell(visualize.main, [str(run), "--device", "cpu"])
    assert code == 2 and "was trained without a teacher: name one by --teacher" in err and err.count("\n") == 1, err
    save_dit(tmp_path / "other", dit(channels=3, seed=0), step=1)
    code, _, err = shell(visualize.main, [str(run), "--teacher", str(tmp_path / "other"), *FEW])
    assert code == 2 and "they cannot be compared" in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_two_processes_score_as_one(run: Path, tmp_path: Path) -> None:
    rows, images = {}, {}
    for world in (1, 2):
        out = tmp_path / str(world)
        arguments = ["--features", "digits", "--device", "cpu", "--samples", "33", "--sampling_steps", "4"]
        for steps in [["20"], ["20", "100"]][2 - world :]:  # two processes stop between the two
            words = [str(run), *arguments, "--steps", *steps, "--save", str(out), "--out", f"{out}.json"]
            if world == 1:
                assert evaluate.main(words) == 0
            else:
                in_two_processes(ROOT / "diffusion/tools/evaluate.py", *words)
        report = json.loads(Path(f"{out}.json").read_text())
        assert report["environment"]["processes"] == world
        rows[world] = report["rows"]
        files = sorted(out.rglob("*.png"))
        images[world] = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).int()
    assert images[1].shape == (4 * 33, 8, 8) and (images[1] - images[2]).abs().max() <= 1
    assert len(rows[1]) == len(rows[2]) == 4
    for one, two in zip(*rows.values(), strict=True):
        assert one["FD-digits"] == pytest.approx(two["FD-digits"], rel=0.02)
        assert one["CS-digits"] == pytest.approx(two["CS-digits"], rel=0.02)
