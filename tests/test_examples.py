"""The examples as a user runs them, with ``adm`` on the path; what two processes compute is what one does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, adm_on_path

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"lightning_module": "lightning", "huggingface_trainer": "transformers", "timm_task": "timm.task"}
SLOW = ("huggingface_trainer", "timm_task", "ddp", "fsdp2")  # 10 s and more
MUTUAL = {"student/ce", "student/kd", "teacher/ce", "teacher/kd"}
TERMS = {"fixed_teacher": {"ce", "kd", "consensus", "phi"}}  # of the others: mutual learning's and both of ADM's
BOTH = ("ddp", "fsdp2")


def run(packages: Path, *words: object, processes: int = 1) -> str:
    """What a script prints, outside the checkout, with ``adm`` found in ``packages`` alone."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=packages, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def epochs(printed: str) -> list[dict[str, float]]:
    """The numbers of each line about an epoch, the Hugging Face Trainer's own included."""
    found = []
    for line in printed.splitlines():
        if line.startswith("epoch ") or "'grad_norm'" in line:
            pairs = re.findall(r"'?([a-z_]+(?:/[a-z_]+)?)'?:? '?(-?[\d.]+(?:e-?\d+)?)\b", line)
            found.append({name: float(value) for name, value in pairs})
    return found


def accuracies(printed: str) -> list[float]:
    (line,) = re.findall(r"^accuracy: student ([\d.]+) teacher ([\d.]+)$", printed, flags=re.M)
    return [float(number) for number in line]


@pytest.mark.parametrize(
    "name", [pytest.param(p.stem, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in EXAMPLES]
)
def test_an_example_learns(tmp_path: Path, name: str) -> None:
    if not find_spec("sklearn"):
        pytest.skip("needs scikit-learn for its digits")
    package = NEEDS.get(name)
    if package and not (find_spec(package.split(".")[0]) and find_spec(package)):
        pytest.skip(f"needs {package}")
    printed = run(adm_on_path(tmp_path), ROOT / f"examples/{name}.py", processes=2 if name in BOTH else 1)
    first, *_, last = lines = epochs(printed)
    for line in lines:
        assert TERMS.get(name, {*MUTUAL, "consensus", "divergence"}) <= line.keys(), printed
    assert last["loss"] < 0.9 * first["loss"]
    for term in {"student/ce", "teacher/ce", "ce", "consensus", "divergence", "phi"} & first.keys():
        assert last[term] < first[term], term
    assert min(accuracies(printed)) > 0.5, printed  # chance is 0.1


def test_examples_are_short_and_know_adm_alone() -> None:
    readme = (ROOT / "examples/README.md").read_text()
    for file in EXAMPLES:
        text = file.read_text()
        assert len(text.splitlines()) <= 80, file
        assert "from adm import" in text and not re.search(r"^(from|import) (core|classification)\b", text, flags=re.M)
        assert f"({file.name})" in readme, f"examples/README.md leaves out {file.name}"


def spread(packages: Path, *words: object) -> dict[str, float]:
    return epochs(run(packages, ROOT / "examples/plain.py", "--width", 24, "--epochs", 4, *words))[-1]


@pytest.mark.slow
def test_a_feature_loss_is_what_ties_one_map_to_the_other(tmp_path: Path) -> None:
    """What docs/core.md says of S between maps of equal channels, and of the attention's spread."""
    packages = adm_on_path(tmp_path)
    without, with_it = (spread(packages, "--gamma", gamma) for gamma in (0, 10))
    assert without["attention/similarity"] + 0.2 < with_it["attention/similarity"]
    for name, sign in (("consensus", 1), ("divergence", -1)):
        key = f"attention/{name}_variance"
        assert sign * without[key] > sign * with_it[key]


# The weights after an epoch of an example, saved by each process.
WEIGHTS = """
import os, runpy, sys, torch
made = runpy.run_path(sys.argv[1])["main"](epochs=1)
torch.save(made if isinstance(made, dict) else made.state_dict(), sys.argv[2] + os.environ.get("RANK", ""))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_two_processes_are_one_on_the_whole_batch(tmp_path: Path, name: str) -> None:
    packages = adm_on_path(tmp_path)
    (tmp_path / "weights.py").write_text(WEIGHTS)
    for processes in (1, 2):
        words = tmp_path / "weights.py", ROOT / f"examples/{name}.py", tmp_path / f"of-{processes}-"
        run(packages, *words, processes=processes)
    one, first, second = (torch.load(tmp_path / f"of-{end}", weights_only=True) for end in ("1-", "2-0", "2-1"))
    assert len(one) > 10 and one.keys() == first.keys() == second.keys()
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[key], second[key]), key


# What the page warns of: each network wrapped by itself, and its halves called past the wrapper.
APART = """
import os, runpy, sys, torch, warnings
import torch.distributed as dist
from adm import ADMLoss, check_pair
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
example = runpy.run_path(sys.argv[1])
dist.init_process_group("gloo")
student, teacher = example["Network"](1), example["Network"](2)
images, targets = torch.randn(4, 1, 8, 8), torch.arange(4)  # each process has its own
wrapped = [DistributedDataParallel(network) for network in (student, teacher)]
s, t = (network.module for network in wrapped)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    check_pair(*wrapped, images)
    assert sum("wrapped by itself" in str(warning.message) for warning in said) == 2
    maps = s.forward_features(images), t.forward_features(images)
    ADMLoss(0.2, 0.6)(*maps, targets, s.forward_head, t.forward_head).backward()
    (warning,) = said[2:]
    assert "wrapped by itself" in str(warning.message) and warning.filename == __file__
with warnings.catch_warnings():
    warnings.simplefilter("error")  # of one module, or of networks that no wrapper holds, there is nothing to say
    one = DistributedDataParallel(example["Pair"](example["Network"](1), example["Network"](2), ADMLoss(0.2, 0.6)))
    one(images, targets)["loss"].backward()
gradients = [torch.zeros_like(s.fc.weight) for _ in range(2)]
dist.all_gather(gradients, s.fc.weight.grad)
sharded = fully_shard(example["Network"](1), mesh=dist.init_device_mesh("cpu", (2,)))
try:
    sharded.forward_features(images)
    failed = False
except RuntimeError:
    failed = True
if dist.get_rank() == 0:
    print("same" if torch.equal(*gradients) else "other", "fails" if failed else "runs")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_wrapped_networks_apart_are_not_reduced_and_sharded_ones_fail(tmp_path: Path) -> None:
    (tmp_path / "apart.py").write_text(APART)
    printed = run(adm_on_path(tmp_path), tmp_path / "apart.py", ROOT / "examples/ddp.py", processes=2)
    assert printed.split() == ["other", "fails"]


def test_timms_task_saves_and_resumes_both_networks() -> None:
    pytest.importorskip("timm.task", reason="needs timm with timm.task")
    import timm

    source = (ROOT / "examples/timm_task.py").read_text().partition("torch.manual_seed")[0]
    scope: dict[str, Any] = {}
    exec(source.replace("from adm import", "from core import"), scope)

    def task(seed: int) -> Any:
        torch.manual_seed(seed)
        networks = [timm.create_model("test_efficientnet", num_classes=3, output_stride=8) for _ in range(2)]
        return scope["ADMTask"](*networks, scope["ADMLoss"](0.2, 0.6, scope["Adapter"](256, 256, always=True)))

    ours, other = task(0), task(1)
    ours.setup_ema()
    state = ours.get_checkpoint_state()
    assert state["state_dict"].keys() == ours.trainable_module.student.state_dict().keys()
    assert ours.get_eval_model(ema=True) is not ours.get_eval_model()
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    for a, b in zip(ours.trainable_module.parameters(), other.trainable_module.parameters(), strict=True):
        assert torch.equal(a, b)
