"""The commands and Python blocks of the documents and docstrings run, at a size that takes seconds.

Each document is followed from top to bottom in a folder of its own, with small made-up data.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import (
    ROOT,
    TINY,
    Block,
    command_lines,
    documents,
    entry_points,
    make_street,
    make_vae,
    make_world,
    text_of,
    without_repeats,
)
from runs import adm_on_path

from tools.groups import compare_runs
from tools.runs import read_runs

# What is not called, by its beginning, and why not. Anything else that a document says is run.
NOT_RUN = {
    "pip install": "installs",
    "python -m pip install": "installs",
    "python -m pytest": "the tests themselves",
    "python examples/": "tests/test_examples.py runs each",
    "torchrun --nproc_per_node 2 examples/": "tests/test_examples.py runs each",
    **{
        f"python tools/prepare_data.py {name} --from": "tests/tools/test_prepare_data.py makes each"
        for name in ("tiny-imagenet-32", "cifar10-jpeg", "cifar10-jpeg-2000", "camvid", "cifar10-resnets")
    },
    "ruff": "`make test` and `make lint` are called as they are",
    "mypy": "`make lint` is called as it is",
    "python classification/tools/visualize.py runs/dml+adm --checkpoint all --boxes": "digits have no boxes; that of "
    "docs/results.md is run",
}
# What is put behind a command, by what it says, so that it takes seconds and needs no download. All that match are.
SHORT = {
    r"(classification|offline_kd)/tools/train\.py": "--data.per_class 8 --batch_size 8 --fit.steps 2 --fit.trackers []"
    " --fit.evaluate_every 2 --fit.device cpu",
    r"(classification|offline_kd)/tools.*(cifar100|imagenet)\.yaml(?!.* --data\.root data/)": "--data.name digits"
    " --data.classes 3 --data.download false --fit.precision fp32",
    r"/cifar100\.yaml(?!.* --data\.root data/)": "--data.image_size 8",
    r"/imagenet\.yaml(?!.* --data\.root data/)": "--data.image_size 64",
    r"own_data\.yaml": "--data.validation 0",
    r"--data\.classes 100": "--data.classes 10 --data.image_size 8",
    r"classification/tools/evaluate\.py.* cifar10$": "--data.name digits --data.image_size 32",
    r"(classification|offline_kd)/tools/report\.py": "--no-latency --images 1 --device cpu",
    r"offline_kd/tools/score\.py": "--seeds 2 --batch_size 4 --data.image_size 8 --device cpu",
    r"segmentation/tools/train\.py": "--data-root street --cfg-options train_cfg.max_iters=2 " + " ".join(TINY),
    r"train\.py progressive": "--data.name digits --data.limit 64 --network.width 8 --network.multipliers [1,1]"
    " --network.blocks 1 --network.attention [] --network.groups 4 --base.steps 2 --base.warmup 1 --rounds.steps 2"
    " --rounds.last_steps 2 --batch_size 4 --fit.device cpu --fit.trackers []",
    r"cifar10_progressive": "--chain [16,8,4,2,1]",
    r"train\.py dit": "--student.size null --student.width 16 --student.depth 1 --student.heads 2 --student.patch 2"
    " --batch_size 4 --fit.steps 2 --fit.evaluate_every 2 --fit.device cpu --fit.trackers []",
    r"encode_latents\.py": "--image_size 8 --batch_size 8 --device cpu",
    r"diffusion/tools/evaluate\.py": "--samples 40 --splits 2 --batch_size 40 --cache cache --device cpu",
    r"diffusion/tools/evaluate\.py (?!.*--features)": "--features digits",
    r"diffusion/tools/(evaluate|sample)\.py runs/(s2|dit)": "--sampling_steps 2",
    r"diffusion/tools/visualize\.py": "--images 8 --rows 1 --times 2 --device cpu",
    r"tools/benchmark/run\.py": "--quick --pairs 2 --rows loader",
    r"reproduce\.py run": "--dry-run",
    r"reproduce\.py report .*--document": "results.md",
    r"reproduce\.py keep": "--results kept",
}
# What stands in for what a test has not: a download, a data set of so many classes, a run of so many steps.
STANDS_IN = {
    r"stabilityai/sd-vae-ft-ema|sd-vae/": "vae",
    r"deeplabv3_cityscapes_40k_b16": "deeplabv3_camvid",
    r"207,? 360": lambda found: found[0].replace("207", "2").replace("360", "3"),
    r"^207$": "2",
    r"^360$": "3",
    r"step-\d{8}": "step-00000002",
}
# What must have been made before, by other documents' commands; and other names of what a document makes.
BEFORE = {
    "docstrings of offline_kd": "python classification/tools/train.py --config classification/recipes/cifar100.yaml"
    " --method vanilla --networks.teacher.name cifar_resnet32x4 --out runs/teacher",
    "docstrings of diffusion": "python diffusion/tools/encode_latents.py imagenet/ --vae vae --out latents\n"
    "python diffusion/tools/train.py dit --config diffusion/recipes/dit_imagenet.yaml --method vanilla --out runs/b2",
}
ALSO = {
    "docstrings of diffusion": {"runs/digits": "pd+adm", "runs/a": "pd+adm", "data/imagenet-latents": "../latents"},
    "docstrings of tools": {
        "runs/benchmark-before": "benchmark",
        "runs/runs.jsonl": "../results/methods_digits/runs.jsonl",  # runs/dml-0 and others
        "runs/quickstart/runs.jsonl": "../../results/quickstart/runs.jsonl",
    },
    "CONTRIBUTING.md": {"runs/quickstart/runs.jsonl": "../../results/quickstart/runs.jsonl"},
}
NEEDS = {"segmentation": ["mmseg"], "diffusion": ["diffusers"], "results": ["mmseg", "diffusers"]}  # by name
OWN_TESTS = ("README.md", "CONTRIBUTING.md")  # of their Python blocks


def reason_not_to_run(command: tuple[str, ...]) -> str | None:
    return next((why for begin, why in NOT_RUN.items() if " ".join(command).startswith(begin)), None)


def script_of(command: tuple[str, ...]) -> tuple[str, list[str]]:
    """The script and its words, whatever launches it."""
    place = next(i for i, word in enumerate(command) if word.endswith(".py"))
    return command[place], list(command[place + 1 :])


def shortened(command: tuple[str, ...]) -> tuple[str, list[str]]:
    """The script and its words, those that the tables above put behind it included."""
    line = " ".join(command)
    more = [word for pattern, words in SHORT.items() if re.search(pattern, line) for word in shlex.split(words)]
    script, words = script_of(command)
    expanded = [name for word in words for name in (sorted(glob.glob(word)) or [word])]
    return script, [*map(stood_in, expanded), *more]


def stood_in(text: str) -> str:
    for pattern, other in STANDS_IN.items():
        text = re.sub(pattern, other, text)
    return text


def call(script: str, words: list[str]) -> None:
    """As ``python SCRIPT WORDS`` would, in this process."""
    from accelerate.state import AcceleratorState

    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    try:
        assert main(words) in (0, None)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_every_command_and_block_is_accounted_for() -> None:
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M))
    scripts, said = set(map(str, entry_points())), set()
    for name, blocks in documents().items():
        for block in blocks:
            assert block.language in ("bash", "python", "mermaid", "bibtex"), (
                f"{name}: a block of {block.language!r} is run by no test"
            )
            for command in command_lines(block.text) if block.language == "bash" else ():
                line = f"{name}: {text_of(command)}"
                if reason_not_to_run(command) is None:
                    script = script_of(command)[0]
                    assert script in scripts, f"{line}: no such command; NOT_RUN may say why it is not run"
                    said.add(script)
                for extra in re.findall(r"\.\[(.*)\]", line):
                    assert set(extra.split(",")) <= extras, line
    assert said == scripts, f"no document shows {scripts - said}"


@pytest.mark.slow
@pytest.mark.parametrize("name", documents())
def test_a_document_can_be_followed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    needs = [package for word, packages in NEEDS.items() if word in name for package in packages]
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    make_world(tmp_path)
    if "mmseg" in needs:
        make_street(tmp_path / "street")
        shutil.copy(next((tmp_path / "street").rglob("*_leftImg8bit.png")), tmp_path / "street.png")
    if "diffusion" in name:
        make_vae(tmp_path / "vae")
    for link, target in ALSO.get(name, {}).items():
        (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(adm_on_path(tmp_path))
    scope: dict[str, Any] = {}
    for block in [Block("bash", BEFORE.get(name, "")), *documents()[name]]:
        if block.language == "bash":
            commands = command_lines(block.text)
            for command in without_repeats(commands) if name == "docs/results.md" else commands:
                if reason_not_to_run(command) is None:
                    call(*shortened(command))
        elif block.language == "python" and name not in OWN_TESTS:
            exec(compile(stood_in(block.text), f"<{name}>", "exec"), scope)


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), flags=re.M | re.S)


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import timm
    import torchvision
    from safetensors.torch import save_file

    from classification.networks import create_network

    loop, prepare, load = blocks("README.md")
    monkeypatch.syspath_prepend(adm_on_path(tmp_path))
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    student, teacher = torchvision.models.resnet18(num_classes=4), timm.create_model("resnet34", num_classes=4)
    scope = {"student": student, "teacher": teacher, "x": x, "target": target, "loss": torch.zeros(())}
    exec(prepare, scope)
    exec(loop, scope)
    assert "no adapter needed" in capsys.readouterr().out
    scope["loss"].backward()
    for network in (student, teacher):
        assert network.conv1.weight.grad is not None and network.fc.weight.grad is not None

    monkeypatch.chdir(tmp_path)
    file = Path(re.search(r'load_file\("(.*)"\)', load).group(1))
    file.parent.mkdir(parents=True)
    trained = create_network("cifar_resnet8", num_classes=10)
    save_file(trained.state_dict(), file)
    exec(load, scope)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(scope["student"].eval()(images), trained.eval()(images))


def test_the_first_screen_of_the_readme_says_what_kept_runs_say() -> None:
    runs = read_runs([f"{ROOT}/results/quickstart/{name}-*" for name in ("vanilla", "kd", "kd+adm", "uniform")])
    over_vanilla, over_kd = (compare_runs(runs, None, baseline).versus for baseline in ("vanilla", "kd"))
    text = " ".join((ROOT / "README.md").read_text().partition("## ")[0].split())
    (control,) = (group for group, role in over_kd if role == "student" and "uniform" in group)
    (adm,) = {group for group, _ in over_kd} - {"vanilla", control}
    for found in (over_vanilla["kd", "student"], over_kd[adm, "student"], over_kd[control, "student"]):
        assert found.told(1) in text, f"README.md does not say {found.told(1)}"


def test_contributing(tmp_path: Path) -> None:
    from classification.methods import METHODS
    from classification.networks import CIFAR_NETWORKS
    from classification.tools import train

    method, network, data = blocks("CONTRIBUTING.md")
    scope: dict = {}
    try:
        exec(method, scope)
        recipe = ROOT / "classification/recipes/digits.yaml"
        arguments = f"--config {recipe} --method oneway+adm --oneway.tau 2 --data.per_class 4 --fit.epochs 1"
        assert train.main([*arguments.split(), "--out", str(tmp_path / "run"), "--fit.device", "cpu"]) == 0
        exec(network, scope)
        assert scope["network"](torch.randn(2, 3, 32, 32)).shape == (2, 10)
    finally:
        METHODS.pop("oneway", None)
        CIFAR_NETWORKS.pop("cifar_resnet26", None)
    exec(data, scope)
    assert scope["batch"]["image"].shape == (16, 3, 32, 32) and scope["batch"]["image"].dtype == torch.uint8
