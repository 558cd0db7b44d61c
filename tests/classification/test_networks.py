"""The CIFAR networks: sizes, maps, timm's interface, initialisation, and how networks are created by name."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classification.networks import CIFAR_NETWORKS, CifarNetwork, create_network
from classification.networks.vgg import VGG
from core.errors import InputError

# Parameters with 100 and 10 classes; channels and size of the maps at 32x32 pixels: stem and stages, then the last map.
BASIC = [(16, 32), (16, 32), (32, 16), (64, 8)]
WIDE = [(32, 32), (64, 32), (128, 16), (256, 8)]
VGG_MAPS = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]
EXPECTED: dict[str, tuple[int, int, list[tuple[int, int]], tuple[int, int]]] = {
    "cifar_resnet8": (83_892, 78_042, BASIC, (64, 8)),
    "cifar_resnet14": (181_108, 175_258, BASIC, (64, 8)),
    "cifar_resnet20": (278_324, 272_474, BASIC, (64, 8)),
    "cifar_resnet32": (472_756, 466_906, BASIC, (64, 8)),
    "cifar_resnet44": (667_188, 661_338, BASIC, (64, 8)),
    "cifar_resnet56": (861_620, 855_770, BASIC, (64, 8)),
    "cifar_resnet110": (1_736_564, 1_730_714, BASIC, (64, 8)),
    "cifar_resnet20_a": (275_572, 269_722, BASIC, (64, 8)),
    "cifar_resnet32_a": (470_004, 464_154, BASIC, (64, 8)),
    "cifar_resnet44_a": (664_436, 658_586, BASIC, (64, 8)),
    "cifar_resnet56_a": (858_868, 853_018, BASIC, (64, 8)),
    "cifar_resnet110_a": (1_733_812, 1_727_962, BASIC, (64, 8)),
    "cifar_resnet8x4": (1_233_540, 1_210_410, WIDE, (256, 8)),
    "cifar_resnet32x4": (7_433_860, 7_410_730, WIDE, (256, 8)),
    "cifar_resnet50": (23_705_252, 23_520_842, [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)], (2048, 4)),
    "cifar_wrn_10_1": (83_700, 77_850, BASIC, (64, 8)),
    "cifar_wrn_10_2": (315_316, 303_706, [(16, 32), (32, 32), (64, 16), (128, 8)], (128, 8)),
    "cifar_wrn_16_1": (180_916, 175_066, BASIC, (64, 8)),
    "cifar_wrn_16_2": (703_284, 691_674, [(16, 32), (32, 32), (64, 16), (128, 8)], (128, 8)),
    "cifar_wrn_16_10": (17_174_324, 17_116_634, [(16, 32), (160, 32), (320, 16), (640, 8)], (640, 8)),
    "cifar_wrn_40_1": (569_780, 563_930, BASIC, (64, 8)),
    "cifar_wrn_40_2": (2_255_156, 2_243_546, [(16, 32), (32, 32), (64, 16), (128, 8)], (128, 8)),
    "cifar_wrn_40_4": (8_972_340, 8_949_210, [(16, 32), (64, 32), (128, 16), (256, 8)], (256, 8)),
    "cifar_vgg8": (3_965_028, 3_918_858, VGG_MAPS, (512, 4)),
    "cifar_vgg13": (9_462_180, 9_416_010, VGG_MAPS, (512, 4)),
    "cifar_mobilenetv1": (3_309_476, 3_217_226, [(32, 32), (128, 16), (256, 8), (512, 4), (1024, 2)], (1024, 2)),
    "cifar_mobilenetv2_050": (812_836, 697_546, [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)], (1280, 2)),
    "cifar_mobilenetv2_100": (2_353_060, 2_237_770, [(32, 16), (24, 16), (32, 8), (96, 4), (320, 2)], (1280, 2)),
    "cifar_shufflenetv1": (949_258, 862_768, [(24, 32), (240, 16), (480, 8), (960, 4)], (960, 4)),
    "cifar_shufflenetv2": (1_355_528, 1_263_278, [(24, 32), (116, 16), (232, 8), (464, 4)], (1024, 4)),
}

# One small network of each family and each kind of block.
FAMILIES = [
    "cifar_resnet8",
    "cifar_resnet14",
    "cifar_resnet20_a",
    "cifar_wrn_16_2",
    "cifar_vgg8",
    "cifar_vgg13",
    "cifar_mobilenetv1",
    "cifar_mobilenetv2_050",
    "cifar_shufflenetv1",
    "cifar_shufflenetv2",
]
WITH_NECK = ("wrn", "mobilenetv2", "shufflenetv2")


def build(name: str, **options: object) -> CifarNetwork:
    torch.manual_seed(0)
    return CIFAR_NETWORKS[name](10, **options)


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shape(map_: Tensor) -> tuple[int, int]:
    assert map_.shape[2] == map_.shape[3]
    return map_.shape[1], map_.shape[2]


def test_every_network_has_an_expectation():
    assert list(EXPECTED) == list(CIFAR_NETWORKS)


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_parameters_and_maps(name: str):
    parameters_100, parameters_10, expected_maps, expected_last = EXPECTED[name]
    network = create_network(name, 10).eval()
    assert parameter_count(network) == parameters_10
    with torch.inference_mode():
        last, maps = network.forward_intermediates(images(1))
        assert [shape(map_) for map_ in maps] == expected_maps
        assert shape(last) == expected_last
        assert network.forward_head(last).shape == (1, 10)
        assert network.forward_head(last, pre_logits=True).shape == (1, network.num_features)
    assert [info["num_chs"] for info in network.feature_info] == [channels for channels, _ in expected_maps]
    assert [32 // info["reduction"] for info in network.feature_info] == [size for _, size in expected_maps]
    modules = dict(network.named_modules())
    assert all(info["module"] in modules for info in network.feature_info)
    assert network.feature_info[0]["module"] == "stem"
    assert network.num_features == expected_last[0]

    network.reset_classifier(100)
    assert network.num_classes == network.get_classifier().out_features == 100
    assert parameter_count(network) == parameters_100


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preact", [True, False])
def test_head_of_features_is_the_network(name: str, preact: bool):
    network = build(name, preact=preact)  # in training mode: evaluation logits of untrained networks span 12 decades
    x = images()
    features = network.forward_features(x)
    last, maps = network.forward_intermediates(x)
    assert torch.equal(last, features)
    assert torch.equal(network.forward_head(features), network(x))
    assert (features.min() < 0) == preact
    if not any(kind in name for kind in WITH_NECK):
        assert last is maps[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_relu_of_preactivation_maps_is_the_plain_network(name: str):
    network = build(name)
    plain = build(name, preact=False)
    plain.load_state_dict(network.state_dict())
    x = images()
    last, maps = network.forward_intermediates(x)
    plain_last, plain_maps = plain.forward_intermediates(x)
    assert torch.equal(F.relu(last), plain_last)
    assert torch.equal(network(x), plain(x))
    for map_, plain_map in zip(maps, plain_maps, strict=True):
        if any(kind in name for kind in WITH_NECK):  # what a stage hands to the next is the same in both
            assert torch.equal(map_, plain_map)
        else:
            assert map_.min() < 0
            assert torch.equal(F.relu(map_), plain_map)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preact", [True, False])
def test_handed_out_maps_are_not_modified(name: str, preact: bool):
    network = build(name, preact=preact)
    versions = {}

    def remember(module: nn.Module, inputs: object, output: Tensor) -> None:
        versions[module] = (output, output.clone(), output._version)

    for module in (network.stem, *network.stages, network.neck):
        module.register_forward_hook(remember)
    last, maps = network.forward_intermediates(images())
    before = [map_.clone() for map_ in (last, *maps)]
    logits = network.forward_head(last)
    for output, copied, version in versions.values():
        assert output._version == version
        assert torch.equal(output, copied)
    logits.sum().backward()
    assert all(torch.equal(map_, copied) for map_, copied in zip((last, *maps), before, strict=True))


@pytest.mark.parametrize("name", ["cifar_resnet14", "cifar_wrn_16_2", "cifar_mobilenetv2_050"])
def test_gradients_flow_through_every_handed_out_map(name: str):
    """A loss on all maps and the logits at once: an in-place change of a saved tensor would raise here."""
    network = build(name)
    last, maps = network.forward_intermediates(images())
    loss = network.forward_head(last * 2).square().sum() + sum(map_.square().mean() for map_ in maps)
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_in_place_operations_do_not_change_gradients():
    """ResNet-8 against the same network written without any in-place operation, in float64."""
    network = build("cifar_resnet8").double()
    x = images().double().requires_grad_()
    network(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    input_gradient, x.grad = x.grad.clone(), None
    network.zero_grad()
    y = F.relu(network.stem(x))
    for stage in network.stages:
        for block in stage:
            z = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(y)))))
            y = F.relu(z + block.shortcut(y))
    network.fc(y.mean((2, 3))).square().sum().backward()
    torch.testing.assert_close(input_gradient, x.grad)
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.fixture(scope="module")
def timm_resnet18() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet18", num_classes=3).eval()


@pytest.mark.parametrize("indices", [None, 1, 3, 5, [0, 2], [-1], [4, 1], [-2, -4], (0, 0, 3)])
@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("intermediates_only", [False, True])
def test_indices_mean_what_they_mean_in_timm(
    timm_resnet18: nn.Module, indices: object, stop_early: bool, intermediates_only: bool
):
    """timm's resnet18 and our MobileNets both have five maps: the same ones must be picked."""
    options = {"indices": indices, "stop_early": stop_early, "intermediates_only": intermediates_only}
    x = images(1)
    ours = build("cifar_mobilenetv1").eval()

    def picked(network: nn.Module) -> tuple[list[int], int | None]:
        all_maps = network.forward_intermediates(x, intermediates_only=True)
        result = network.forward_intermediates(x, **options)
        last, maps = (None, result) if intermediates_only else result
        position = [[torch.equal(map_, other) for other in all_maps].index(True) for map_ in maps]
        return position, None if last is None else [torch.equal(last, other) for other in all_maps].index(True)

    with torch.inference_mode():
        assert picked(ours) == picked(timm_resnet18)


def test_stop_early_skips_the_rest():
    network = build("cifar_mobilenetv2_050")
    last, maps = network.forward_intermediates(images(), indices=[1], stop_early=True)
    assert last is maps[0]
    assert network.stages[0][0][0].expand.bn.num_batches_tracked == 1
    assert network.stages[1][0][0].expand.bn.num_batches_tracked == 0
    assert network.neck.bn.num_batches_tracked == 0
    last, _ = network.forward_intermediates(images(), indices=[-1], stop_early=True)
    assert last.shape[1] == 1280


def test_wrong_requests_for_maps():
    network = build("cifar_resnet8")
    for indices in (0, 5, -1, [4], [-5], []):
        with pytest.raises(InputError, match="indices"):
            network.forward_intermediates(images(), indices=indices)
    with pytest.raises(InputError, match="NHWC"):
        network.forward_intermediates(images(), output_fmt="NHWC")


def test_wrn_batchnorms_run_once_and_groups_are_raw_sums():
    network = build("cifar_wrn_16_2")
    stem, first, *_ = network.forward_intermediates(images(), intermediates_only=True)
    assert network.neck.num_batches_tracked == 0  # the feature map was not asked for
    block = copy.deepcopy(network.stages[0])
    torch.testing.assert_close(first, block(stem))
    counted = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in (False, True):
        network = build("cifar_wrn_16_2")
        counted = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        last, maps = network.forward_intermediates(images(), norm=norm)
        network.forward_head(last)
        assert [int(module.num_batches_tracked) for module in counted] == [1] * len(counted)
        if norm:
            assert maps[-1] is last
        else:
            torch.testing.assert_close(F.batch_norm(maps[-1], None, None, training=True), last)


def test_wrn_shortcut_takes_the_activated_input():
    block = build("cifar_wrn_16_2").stages[0][0].eval()
    x = images(1)[:, :1].expand(1, 16, 32, 32) - 100.0  # negative everywhere: the activated input is zero
    torch.testing.assert_close(block(x), torch.zeros(1, 32, 32, 32))


def test_vgg_pools_64_pixel_images_once_more():
    network = VGG(10, count=1).eval()
    with torch.inference_mode():
        assert [shape(map_)[1] for map_ in network.forward_intermediates(images(1, 64))[1]] == [64, 32, 16, 8, 4]


def test_initialisation():
    def std(weight: Tensor) -> float:
        return float(weight.detach().std())

    def he(conv: nn.Conv2d) -> float:
        return math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))

    resnet, wrn = build("cifar_resnet20"), build("cifar_wrn_16_2")
    vgg, mobilenet = build("cifar_vgg8"), build("cifar_mobilenetv2_100")
    shufflenet = build("cifar_shufflenetv2")
    for conv in (
        resnet.stages[2][1].conv2,
        wrn.stages[2][1].conv2,
        vgg.stages[2][0].conv,
        mobilenet.stages[3][1][0].depthwise.conv,  # depthwise: all its channels count
    ):
        assert std(conv.weight) == pytest.approx(he(conv), rel=0.05)
    default = 1 / math.sqrt(3 * shufflenet.neck.conv.in_channels)  # PyTorch: uniform within 1 / sqrt(fan in)
    assert std(shufflenet.neck.conv.weight) == pytest.approx(default, rel=0.05)

    for network in (vgg, mobilenet):
        assert std(network.fc.weight) == pytest.approx(0.01, rel=0.05)
    assert std(resnet.fc.weight) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)
    assert std(wrn.fc.weight) == pytest.approx(1 / math.sqrt(3 * 128), rel=0.1)
    for network in (wrn, vgg, mobilenet):
        assert network.fc.bias.count_nonzero() == 0
        network.reset_classifier(50)
        assert network.fc.bias.count_nonzero() == 0
    assert resnet.fc.bias.count_nonzero() == 10
    assert vgg.stem[0].conv.bias.count_nonzero() == 0
    assert all(torch.equal(block.bn2.weight, torch.ones(64)) for block in resnet.stages[2])  # no zero init


def test_options_of_the_networks():
    assert create_network("cifar_vgg8", 10, in_chans=1)(images()[:, :1]).shape == (2, 10)
    headless = create_network("cifar_resnet8", 0)
    assert headless(images()).shape == (2, 64)
    same = create_network("cifar_resnet20", 10, shortcut="A")
    assert same.state_dict().keys() == create_network("cifar_resnet20_a", 10).state_dict().keys()
    assert create_network("cifar_wrn_16_2", 10, preact=False).preact is False


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar_wrn_16-2", {}, "did you mean 'cifar_wrn_16_2'"),
        ("resnet_18", {}, "did you mean 'resnet18'"),
        ("cifar_resnet20", {"widht": 2, "depth": 3}, "widht, depth"),
        ("cifar_wrn_16_2", {"width": 3}, "cifar_wrn_16_2 has no option width: its options are preact"),
        ("cifar_resnet20", {"shortcut": "C"}, "shortcut"),
        ("cifar_resnet20", {"pretrained": True}, "weight file"),
        ("resnet18", {"dropp": 1}, "dropp"),
        ("resnet18.no_such_tag", {}, "no_such_tag"),
    ],
)
def test_what_cannot_be_created_says_why(name: str, options: dict, message: str):
    with pytest.raises(InputError, match=message) as raised:
        create_network(name, 10, **options)
    assert "\n" not in str(raised.value)


def test_timm_resnets_start_with_residual_batchnorms_at_one():
    assert create_network("resnet18", 10).layer1[0].bn2.weight.min() == 1
    assert create_network("resnet18", 10, zero_init_last=True).layer1[0].bn2.weight.max() == 0
    mobilenet = create_network("mobilenetv2_050", 7, in_chans=1)
    assert mobilenet.get_classifier().out_features == 7
    assert mobilenet.conv_stem.in_channels == 1


def test_timm_knows_the_networks():
    timm = pytest.importorskip("timm")
    from classification.networks import timm_models  # noqa: F401

    assert set(timm.list_models("cifar*")) == set(CIFAR_NETWORKS)
    network = timm.create_model("cifar_wrn_16_2", num_classes=10, pretrained_cfg_overlay={}, cache_dir="nowhere")
    assert type(network) is type(build("cifar_wrn_16_2"))
    assert network.num_classes == 10
    assert parameter_count(timm.create_model("cifar_resnet20")) == EXPECTED["cifar_resnet20"][0]
    assert parameter_count(timm.create_model("resnet50", num_classes=1000)) == 25_557_032  # timm's own is still there
    with pytest.raises(InputError, match="weight file"):
        timm.create_model("cifar_resnet20", pretrained=True)
    with pytest.raises(TypeError, match="foo"):
        timm.create_model("cifar_resnet20", foo=1)
