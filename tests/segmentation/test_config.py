"""Configs: the stock networks and settings in ours, options checked, and what this machine cannot do replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from mmengine.config import Config
from street import CONFIGS, DEEPLAB, TINY

from core.errors import InputError
from segmentation import config
from segmentation.config import STOCK_CONFIGS as STOCK
from segmentation.config import build, check_parts, complete, load_config, parse_options
from segmentation.options import say_odd
from segmentation.training import check_forward

SHIPPED = sorted(path for path in CONFIGS.glob("*.py"))


def test_all_six_are_shipped() -> None:
    names = {f"{head}_{setting}" for head in ("deeplabv3", "pspnet") for setting in ("camvid", "cityscapes_mmseg")}
    assert names | {"deeplabv3_cityscapes_40k_b16", "pspnet_cityscapes_40k_b16"} == {p.stem for p in SHIPPED}


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet"])
@pytest.mark.parametrize("setting", ["40k_b16", "mmseg"])
def test_the_networks_are_mmsegs_own(head: str, setting: str) -> None:
    cfg = load_config(CONFIGS / f"{head}_cityscapes_{setting}.py")
    for role, name in (("teacher", "r101-d8_4xb2-40k"), ("student", "r18-d8_4xb2-80k")):
        stock = Config.fromfile(str(STOCK / head / f"{head}_{name}_cityscapes-512x1024.py"))
        preprocessor = stock.model.pop("data_preprocessor")
        assert cfg.model[role].to_dict() == stock.model.to_dict()
        assert cfg.model.data_preprocessor.to_dict() == {**preprocessor.to_dict(), "size": (512, 1024)}


def test_the_mmseg_setting_is_mmsegs_own() -> None:
    cfg = load_config(CONFIGS / "deeplabv3_cityscapes_mmseg.py")
    stock = Config.fromfile(str(STOCK / "deeplabv3/deeplabv3_r101-d8_4xb2-40k_cityscapes-512x1024.py"))
    assert cfg.optim_wrapper.optimizer.to_dict() == stock.optim_wrapper.optimizer.to_dict()
    assert cfg.param_scheduler[0].to_dict() == stock.param_scheduler[0].to_dict()
    assert cfg.train_cfg.to_dict() == stock.train_cfg.to_dict()
    assert cfg.batch_size == 4 * stock.train_dataloader.batch_size
    for name in ("train_dataloader", "val_dataloader"):
        ours, theirs = cfg[name].dataset.dataset.to_dict(), stock[name].dataset.to_dict()
        assert ours == {key: value for key, value in theirs.items() if key != "data_root"}


def test_table_5s_setting() -> None:
    cfg = load_config(CONFIGS / "pspnet_cityscapes_40k_b16.py")
    assert cfg.optim_wrapper.optimizer.to_dict() == {
        "type": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4,
    }  # fmt: skip
    assert cfg.batch_size == 16
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[0].end == 40000
    assert cfg.param_scheduler[0].eta_min == 0
    assert (cfg.model.method, cfg.model.adm.alpha, cfg.model.adm.beta, cfg.model.adm.gamma) == (
        "dml+adm", 0.2, 0.6, 0.01,
    )  # fmt: skip


def test_a_shorter_run_has_a_shorter_schedule_and_a_crop_reaches_all_that_reads_it() -> None:
    options = parse_options(["train_cfg.max_iters=100", "crop_size=(64,80)"])
    cfg = load_config(DEEPLAB, options)
    assert cfg.param_scheduler[0].end == 100
    assert cfg.model.data_preprocessor.size == (64, 80)
    crops = [step.crop_size for step in cfg.train_dataloader.dataset.dataset.pipeline if step.type == "RandomCrop"]
    assert crops == [(64, 80)]


@pytest.mark.parametrize(("method", "views"), [("kdcl+adm", True), ("dml", False)])
def test_only_kdcl_has_two_views(method: str, views: bool) -> None:
    cfg = complete(load_config(DEEPLAB, {"model.method": method}), 1, "cpu")
    steps = [step.type for step in cfg.train_dataloader.dataset.dataset.pipeline]
    assert ("PhotoMetricDistortionPerNetwork" in steps) == views
    assert ("PhotoMetricDistortion" in steps) != views
    assert (cfg.model.data_preprocessor.type == "ViewsDataPreProcessor") == views


def test_offline_distillation_has_the_papers_offline_weights() -> None:
    adm = load_config(DEEPLAB, {"model.method": "kd+adm"}).model.adm
    assert (adm.alpha, adm.beta, adm.gamma) == (0.1, 0.0, 0.0)


def norms(section: Any) -> set[str]:
    """The types of every norm_cfg."""
    found = set()
    for key, value in section.items():
        if key == "norm_cfg":
            found.add(value["type"])
        elif isinstance(value, dict):
            found |= norms(value)
    return found


def test_the_cpu_gets_plain_batchnorm_and_gloo_a_gpu_keeps_the_config() -> None:
    cfg = load_config(CONFIGS / "deeplabv3_cityscapes_40k_b16.py")
    on_cpu, on_gpu = complete(cfg, 4, "cpu"), complete(cfg, 4, "cuda")
    assert norms(on_cpu.model.to_dict()) == {"BN"}
    assert norms(on_gpu.model.to_dict()) == norms(cfg.model.to_dict()) == {"SyncBN"}
    assert on_cpu.env_cfg.dist_cfg.backend == "gloo"
    assert on_gpu.env_cfg.dist_cfg.backend == "nccl"
    assert on_gpu.train_dataloader.batch_size == 4


def test_synchronised_batchnorm_takes_one_image_a_gpu() -> None:
    cfg = load_config(CONFIGS / "deeplabv3_cityscapes_40k_b16.py", {"batch_size": 2})
    assert complete(cfg, 2, "cuda").train_dataloader.batch_size == 1
    with pytest.raises(InputError, match=r"batch_size 2 over 2 process\(es\) gives BatchNorm one image at a time"):
        complete(cfg, 2, "cpu")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("batchsize=4", "unknown option batchsize: did you mean batch_size?"),
        ("train_cfg.max_iter=9", "unknown option train_cfg.max_iter: did you mean train_cfg.max_iters?"),
        ("run.log_evry=9", "did you mean run.log_every?"),
        ("model.adm.alfa=1", "did you mean model.adm.alpha?"),
        ("model.student.backbone.dept=18", "did you mean model.student.backbone.depth?"),
        ("train_dataloader.num_worker=2", "did you mean train_dataloader.num_workers?"),
        ("optim_wrapper.optimizer.nestrov=True", "did you mean optim_wrapper.optimizer.nesterov?"),
        ("param_scheduler.0.powr=1", "did you mean param_scheduler.0.power?"),
        ("param_scheduler.7.power=1", "param_scheduler has the items 0 to 0"),
        ("train_cfg.max_iters.x=1", "train_cfg.max_iters is 750, it has no parts"),
        ("train_cfg.max_iters=many", "is a number or a switch, not 'many'"),
        ("model.adm.alpha=-1", "adm.alpha must not be negative"),
        ("crop_size=(64,)", "two numbers, height and width"),
        ("crop_size=(0,8)", "crop_size.0 must be in [4, 4096]: 0"),
    ],
)
def test_an_option_that_nothing_reads_is_an_error_that_names_the_nearest(option: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(DEEPLAB, parse_options([option]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_that_a_class_takes_is_no_error_though_the_config_leaves_it_out() -> None:
    options = [
        "model.student.backbone.with_cp=True",
        "optim_wrapper.clip_grad.max_norm=1.0",
        "optim_wrapper.optimizer.nesterov=True",
        "train_dataloader.prefetch_factor=4",
        "val_dataloader.dataset.dataset.indices=8",
        "model.teacher.decode_head.loss_decode.avg_non_ignore=True",
        "model.teacher_weights=x.pth",
        "randomness.deterministic=True",
    ]
    cfg = load_config(DEEPLAB, parse_options(options))
    assert cfg.model.student.backbone.with_cp is True
    assert cfg.optim_wrapper.clip_grad.max_norm == 1.0


def test_a_config_that_is_none_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for text, message in (
        ("model = dict(", "is no config: SyntaxError"),
        ("model = dict(type='EncoderDecoder')", "lacks train_dataloader: start from one of"),
        (f"_base_ = {str(DEEPLAB)!r}\nmodel = dict(teacher=dict(stock='x/nothing.py'))", "unknown stock config"),
    ):
        file.write_text(text)
        with pytest.raises(InputError) as error:
            load_config(file)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("head", "crop", "message"),
    [
        ("deeplabv3", (8, 64), "ASPPHead a map of 1 x 8 cells, it needs 2 x 2: choose at least 9 pixels"),
        ("pspnet", (40, 64), "PSPHead a map of 5 x 8 cells, it needs 6 x 6: choose at least 41 pixels"),
    ],
)
def test_a_crop_too_small_for_the_head_is_an_error(head: str, crop: tuple[int, int], message: str) -> None:
    cfg = load_config(CONFIGS / f"{head}_camvid.py", {"crop_size": crop})
    with pytest.raises(InputError, match=message):
        complete(cfg, 1, "cpu")


def test_a_batch_that_cannot_be_shared_is_an_error() -> None:
    with pytest.raises(InputError, match=r"batch_size 4 cannot be shared by 3"):
        complete(load_config(DEEPLAB), 3, "cpu")


def test_pretrained_weights_are_looked_for_before_anything_is_built_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "open-mmlab://resnet18_v1c"
    cfg = complete(load_config(DEEPLAB, {"model.student.pretrained": name}), 1, "cpu")
    networks = {"student": config.build({**cfg.model.student, "pretrained": None})}

    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(config.CheckpointLoader, "load_checkpoint", no_network)
    with pytest.raises(InputError) as error:
        config.check_pretrained(cfg, networks)
    assert "resnet18_v1c" in str(error.value)
    assert ".pth and put it into" in str(error.value)
    assert "model.student.pretrained=FILE" in str(error.value)
    monkeypatch.undo()

    cfg.model.student.pretrained = str(tmp_path / "mine.pth")
    with pytest.raises(InputError, match=r"mine\.pth, and there is no such file"):
        config.check_pretrained(cfg, networks)
    torch.save({"state_dict": {"stem.0.weight": torch.zeros(1)}}, tmp_path / "mine.pth")
    with pytest.raises(InputError, match=r"mine\.pth, which is of another network: \d+ weights do not fit"):
        config.check_pretrained(cfg, networks)
    torch.save({"state_dict": networks["student"].backbone.state_dict()}, tmp_path / "mine.pth")
    config.check_pretrained(cfg, networks)


WRONG = """
train_cfg.max_iters=0 train_cfg.max_iters=-1 train_cfg.max_iters=1.5 train_cfg.max_iters=abc
train_cfg.val_interval=0 run.log_every=0 run.log_every=-3 run.log_every=1.5 run.save_every=0
run.save_every=abc crop_size=64 crop_size=0,64 crop_size=a,b crop_size=64,64,64 seed=-1 seed=abc seed=1.5
seed=99999999999 optim_wrapper.optimizer.lr=-1 optim_wrapper.optimizer.lr=nan optim_wrapper.optimizer.lr=abc
optim_wrapper.optimizer.lr=1e400 optim_wrapper.optimizer.type=Foo optim_wrapper.optimizer.momentum=5
optim_wrapper.optimizer.weight_decay=-1 param_scheduler.0.type=Foo param_scheduler.0.power=-1
model.adm.alpha=abc model.adm.alpha=-1 model.adm.alpha=nan model.adm.tau=0 model.adm.control=foo
model.adm.nosuch=1 train_dataloader.num_workers=-1 train_dataloader.num_workers=1.5
val_dataloader.num_workers=-2 model.student.decode_head.num_classes=-1 model.student.decode_head.num_classes=0
model.student.decode_head.channels=0 model.student.backbone.depth=7 model.student.backbone.depth=abc
model.student.backbone.base_channels=0 run.keep=0 run.keep=-1 run.keep=abc batch_size=0 batch_size=-1
batch_size=1.5 batch_size=abc run.trackers=foo run.select=nosuch optim_wrapper.clip_grad.max_norm=-1
model.student.decode_head.dropout_ratio=2 model.method=foo nosuch=1 train_cfg.nosuch=1 model.student.nosuch=1
data_root=5 run=5 model=5 seed=None batch_size=None train_cfg=5 optim_wrapper=5 train_dataloader=None
model.student=5 param_scheduler=5 model.student.decode_head.type=Foo model.student.backbone.type=Foo
run.select=5 model.student.decode_head.loss_decode.loss_weight=nan
model.student.decode_head.loss_decode.type=Foo train_dataloader.sampler.type=Foo
train_dataloader.dataset.type=Foo val_evaluator.0.type=Foo train_cfg.type=Foo
train_cfg.max_iters=[6] train_cfg.val_begin=abc train_cfg.val_begin=1.5 train_cfg.val_begin=-1
train_cfg.dynamic_intervals=5 train_cfg.type=EpochBasedTrainLoop seed=[1] optim_wrapper.optimizer.lr=[1]
optim_wrapper.optimizer.lr=True optim_wrapper.optimizer.type=5 optim_wrapper.optimizer.type=None
optim_wrapper.optimizer.nesterov=abc optim_wrapper.optimizer.dampening=nan optim_wrapper.optimizer.dampening=-1
optim_wrapper.clip_grad.nosuch=1 optim_wrapper.clip_grad.norm_type=abc optim_wrapper.paramwise_cfg.nosuch=1
param_scheduler.0.end=1.5 param_scheduler.0.by_epoch=True model.adm.alpha=[1] train_dataloader.batch_size=7
train_dataloader.dataset.seed=3 randomness.seed=5 model.data_preprocessor.size=(8,8)
val_dataloader.dataset.dataset.data_root=x train_dataloader.dataset.dataset.pipeline.3.crop_size=(8,8)
train_pipeline=5 resume=True load_from=x.pth launcher=pytorch work_dir=x experiment_name=x auto_scale_lr=5
env_cfg.nosuch=1 env_cfg.mp_cfg.mp_start_method=foo log_level=FOO default_scope=foo sync_bn=foo
val_cfg.type=Foo default_hooks.checkpoint.type=Foo visualizer.type=Foo model_wrapper_cfg.type=Foo
model.data_preprocessor.std=[nan,1,1] model.data_preprocessor.std=[0,1,1] model.teacher_weights=5
model.student.backbone.init_cfg=5 model.student.backbone.strides=(0,0,0,0) model.student.decode_head.dilations=[0]
model.student.decode_head.loss_decode.class_weight=nowhere.json val_dataloader.batch_size=0
optim_wrapper.optimizer.foreach=abc model.student.backbone.style=foo model.data_preprocessor.std=[1e-30,1,1]
model.data_preprocessor.mean=[1e30,0,0] custom_hooks=5 randomness=5 randomness=[1] visualizer.vis_backends=[5]
model=[1] train_cfg=[1] run=[1] optim_wrapper=[1] train_dataloader=[1] model.student=[1] model.adm=[1] env_cfg=[1]
compile=abc model_wrapper_cfg=5 activation_checkpointing=5 find_unused_parameters=abc sync_bn=5
randomness.deterministic=abc custom_imports.imports=[nosuch]
"""


@pytest.mark.parametrize("option", WRONG.split())
def test_a_wrong_option_is_refused_in_one_line_that_names_it(option: str) -> None:
    with pytest.raises(InputError) as caught:
        build(complete(load_config(DEEPLAB, parse_options([option])), 1, "cpu").model)
    said = str(caught.value)
    assert "\n" not in said
    key, _, value = option.partition("=")
    assert any(word in said for word in (key, key.rpartition(".")[2], value, "networks cannot be built")), said


# What mmengine would build only when the run has begun.
UNBUILDABLE = """
optim_wrapper.optimizer.type=Adam optim_wrapper.optimizer.type=LBFGS optim_wrapper.constructor=Foo
optim_wrapper.clip_grad=5 val_evaluator.0.role=foo run.select=student/IoU.nosuch run.select=student/IoU.bicycle
train_dataloader.prefetch_factor=2 val_evaluator.0.format_only=True activation_checkpointing=nosuch compile.nosuch=1
train_dataloader.timeout=-1 val_evaluator=[] custom_hooks=[5]
model.student.decode_head.in_channels=7 model.student.decode_head.in_index=9
model.student.test_cfg.mode=foo train_dataloader.dataset.dataset.pipeline=[]
train_dataloader.dataset.dataset.pipeline.2.ratio_range=(0,0)
"""


@pytest.mark.parametrize("option", UNBUILDABLE.split())
def test_what_cannot_be_built_is_refused_before_the_run_begins(option: str, street: Path) -> None:
    with pytest.raises(InputError) as caught:
        ready = complete(load_config(DEEPLAB, {**parse_options([*TINY, option]), "data_root": str(street)}), 1, "cpu")
        model = build(ready.model)
        check_parts(ready, model)
        check_forward(model, ready)
    assert "\n" not in str(caught.value)
    assert any(part.rstrip("_") in str(caught.value) for part in re.split(r"[.=_]", option)), str(caught.value)


def test_options_of_adm_without_adm_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.adm\.alpha does nothing without ADM: give the method dml\+adm"):
        load_config(DEEPLAB, {"model.adm.alpha": 0.5, "model.method": "dml"})


def test_a_sampler_that_loses_exact_resuming_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.errors._notices", [])
    for value in ("sampler=None", "sampler.type=InfiniteSampler"):
        say_odd(load_config(DEEPLAB, parse_options([f"train_dataloader.{value}"])))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("NumberedSampler" in line and "resume" in line for line in lines), lines


def test_what_is_legal_and_probably_meant_otherwise_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.errors._notices", [])
    say_odd(load_config(DEEPLAB))
    assert capsys.readouterr().err == ""
    odd = {
        "run.log_every": 751, "run.save_every": 751, "train_cfg.val_interval": 751, "train_cfg.val_begin": 751,
        "optim_wrapper.accumulative_counts": 751, "param_scheduler.0.begin": 750, "param_scheduler.0.eta_min": 1.0,
    }  # fmt: skip
    say_odd(load_config(DEEPLAB, odd))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(odd)
    assert all(any(line.startswith(f"note: {key} {value} ") for line in lines) for key, value in odd.items()), lines
