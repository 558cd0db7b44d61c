"""Names on the Hugging Face hub without a way to it: one line, which says how to do without."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from runs import CPU, RECIPE

from classification.networks.libraries import hub_says_once
from classification.tools import train

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf-hub:timm/resnet18.a1_in1k", "name a folder: local-dir:FOLDER"),
        ("transformers/microsoft/resnet-18", "name a folder: transformers/FOLDER"),
        ("resnet18.a1_in1k", "leave pretrained out and give a weight file"),
    ],
)
def test_a_name_on_the_hub_is_refused_in_a_line(
    name: str, words: str, shell: Any, quick: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = ["--data.classes", "3", "--data.per_class", "10", "--data.image_size", "32", "--out", str(tmp_path / "run")]
    networks = ["--networks.teacher.name", "cifar_resnet8", "--networks.student.name", name]
    networks += ["--networks.student.pretrained", "true"]
    code, _, err = shell(train.main, ["--config", str(RECIPE), "--method", "dml", *data, *networks, *CPU])
    assert code == 2 and err.count("\n") == 1 and name in err and words in err, err
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_hubs_own_lines_of_each_try_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")
    with hub_says_once():
        logger.warning("Retrying in 1s")
        logger.error("broken")
    logger.warning("and later")
    assert [record.getMessage() for record in caplog.records] == ["broken", "and later"]
