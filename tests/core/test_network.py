"""Which networks ADM accepts as they are, by an adapter or not at all, and what the start-up check leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core import Adapter, ADMLoss, InputError, Network, Split, as_network, check_network, check_pair, stage_maps
from core.views import ChannelsLastFeatures, TokenFeatures

K = 5


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    """The check warns about buffers alone, and only where a test expects it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*moves buffers.*")
        yield


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=K, **options)


def images(height: int, width: int | None = None, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, height, width or height)


def torchvision_resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return Split.at(resnet18(num_classes=K), "layer4")


def torchvision_mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    m = mobilenet_v2(num_classes=K, width_mult=0.25)
    return Split(m.features, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), m.classifier))


def transformers_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: dict[str, Any] = {
        "num_labels": K,
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    }
    return Split(
        features=lambda m, x: m.resnet(x).last_hidden_state,
        head=lambda m, f: m.classifier(m.resnet.pooler(f)),
        model=ResNetForImageClassification(ResNetConfig(**sizes)),
    )


class OwnModel(nn.Module):
    """A user's model, with none of timm's names."""

    def __init__(self, zero_classifier: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(8, K)
        if zero_classifier:
            nn.init.zeros_(self.classifier.weight)

    def classify(self, f: Tensor) -> Tensor:
        return self.classifier(self.drop(f.mean(dim=(2, 3))))

    def split(self) -> Split:
        return Split(lambda m, x: m.body(x), lambda m, f: m.classify(f), model=self)


AS_THEY_ARE: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "timm resnet18": (lambda: timm_model("resnet18"), (512, 2, 2)),
    "timm mobilenetv2_050": (lambda: timm_model("mobilenetv2_050"), (1280, 2, 2)),
    "timm with functional dropout": (lambda: timm_model("ghostnet_050", drop_rate=0.5), (480, 2, 2)),
    "timm convnext": (lambda: timm_model("test_convnext", drop_path_rate=0.5), (64, 2, 2)),
    "torchvision resnet18": (torchvision_resnet18, (512, 2, 2)),
    "torchvision mobilenet_v2": (torchvision_mobilenet_v2, (1280, 2, 2)),
    "transformers resnet": (transformers_resnet, (32, 2, 2)),
    "own model": (lambda: OwnModel().split(), (8, 16, 16)),
    "own model, classifier at zero": (lambda: OwnModel(zero_classifier=True).split(), (8, 16, 16)),
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_networks_as_they_are(name: str) -> None:
    build, shape = AS_THEY_ARE[name]
    network, x = build(), images(64)
    assert isinstance(network, Network)
    assert as_network(network) is network and as_network(network, x) is network
    assert check_network(network, x).shape == (len(x), *shape)
    network.eval()
    assert any(True for _ in network.parameters())
    torch.testing.assert_close(network.forward_head(network.forward_features(x)), network(x))
    final, maps = stage_maps(network, x)
    assert final.shape == maps[-1].shape == (len(x), *shape)


VIT = {"img_size": (32, 64), "embed_dim": 24, "depth": 5, "num_heads": 2}
ADAPTED: dict[str, tuple[str, dict[str, Any], tuple[int, int], type, tuple[int, int, int], int]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"window_size": 2, "embed_dim": 12, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "drop_path_rate": 0.5},
        (32, 64),
        ChannelsLastFeatures,
        (48, 2, 4),
        3,
    ),
    "mambaout": ("test_mambaout", {}, (64, 128), ChannelsLastFeatures, (64, 2, 4), 4),
    "vit": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}, (32, 64), TokenFeatures, (24, 2, 4), 4),
    "vit, relative positions": ("vit_relpos_small_patch16_224", VIT, (32, 64), TokenFeatures, (24, 2, 4), 4),
    "mixer": ("mixer_s32_224", {}, (64, 64), TokenFeatures, (512, 2, 2), 4),
    "hiera": ("hiera_tiny_224", {"embed_dim": 12, "stages": (1, 1, 1, 1)}, (64, 64), TokenFeatures, (96, 2, 2), 4),
    "twins": (
        "twins_svt_small",
        {"embed_dims": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
        (64, 128),
        TokenFeatures,
        (64, 2, 4),
        4,
    ),
    "convit": (
        "convit_tiny",
        {"global_pool": "avg", "depth": 4, "embed_dim": 8, "num_heads": 4, "local_up_to_layer": 2},
        (32, 32),
        TokenFeatures,
        (32, 2, 2),
        4,
    ),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_timm_networks_of_other_layouts(name: str) -> None:
    timm_name, options, size, adapter, shape, stages = ADAPTED[name]
    if timm_name.startswith(("swin", "mixer", "hiera", "convit")):
        options = {**options, "img_size": size}
    model, x = timm_model(timm_name, **options), images(*size)
    network = as_network(model)  # no images needed
    assert isinstance(network, adapter) and isinstance(network, Network) and isinstance(network, type(model))
    assert type(as_network(model, x)) is type(network) and as_network(network) is network
    assert not isinstance(model, adapter)
    assert check_network(network, x).shape == (len(x), *shape)
    assert sum(1 for _ in network.parameters()) == sum(1 for _ in model.parameters())

    model.eval()
    torch.testing.assert_close(network.forward_head(network.forward_features(x)), model(x))
    final, maps = stage_maps(network, x)
    assert len(maps) == stages and maps[-1] is final
    assert all(
        m.dim() == 4 and m.shape[2] * size[1] == m.shape[3] * size[0] for m in maps
    )  # [B, C, H, W], not transposed
    if name in ("swin", "vit"):  # timm's own map, normalised as the features are
        torch.testing.assert_close(final, model.forward_intermediates(x, norm=True)[1][-1])  # type: ignore[operator]


def test_an_adapted_network_is_saved_and_loaded_as_the_timm_model() -> None:
    model, other = (timm_model("vit_tiny_patch16_224", **VIT, global_pool="avg") for _ in range(2))
    network, together = as_network(model), nn.ModuleDict({"student": as_network(other)})
    saved = network.state_dict()
    assert saved.keys() == model.state_dict().keys()
    other.load_state_dict(saved)  # strict: no key of the adapter's own
    nn.init.zeros_(other.head.weight)  # type: ignore[arg-type,union-attr]
    together["student"].load_state_dict(saved)
    assert torch.equal(other.head.weight, model.head.weight)  # type: ignore[union-attr,arg-type]
    nn.init.zeros_(other.head.weight)  # type: ignore[arg-type,union-attr]
    together.load_state_dict({f"student.{key}": value for key, value in saved.items()})
    assert torch.equal(other.head.weight, model.head.weight)  # type: ignore[union-attr,arg-type]


def test_a_class_token_is_no_part_of_the_map() -> None:
    model, x = timm_model("vit_tiny_patch16_224", **VIT, global_pool="avg").eval(), images(32, 64)
    final = as_network(model).forward_features(x)  # type: ignore[operator]
    tokens = model.forward_features(x)  # type: ignore[operator]
    assert tokens.shape[1] == 1 + 8
    torch.testing.assert_close(final[:, :, 1, 2], tokens[:, 1 + 1 * 4 + 2])


def test_token_layouts_nobody_listed_are_seen_on_images() -> None:
    class Tokens(nn.Module):
        num_features, num_classes = 8, K
        feature_info = ({"num_chs": 8, "reduction": 4, "module": "body"},)

        def __init__(self) -> None:
            super().__init__()
            self.own = OwnModel()

        def forward_features(self, x: Tensor) -> Tensor:
            return self.own.body(x).flatten(2).transpose(1, 2)

        def forward_head(self, x: Tensor) -> Tensor:
            return self.own.classifier(x.mean(dim=1))

        def forward_intermediates(self, x: Tensor, indices: Any = None) -> tuple[Tensor, list[Tensor]]:
            final = self.own.body(x)
            return final.flatten(2).transpose(1, 2), [final]

        def forward(self, x: Tensor) -> Tensor:
            return self.forward_head(self.forward_features(x))

    model, x = Tokens(), images(32)
    model.own.body[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = as_network(model, x)
    assert isinstance(network, TokenFeatures)
    assert model.training and not model.own.body[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert check_network(network, x).shape == (3, 8, 8, 8)
    with pytest.raises(
        InputError, match=r"teacher: its features are \(3, 64, 8\), not a map .*; see as_network, Split"
    ):
        check_network(as_network(model), x, "teacher")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("vit_tiny_patch16_224", {**VIT, "global_pool": "map"}),
        ("cait_xxs24_224", {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}),
        ("pit_ti_224", {}),
    ],
)
def test_class_tokens_and_attention_pooling_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"class token or by attention pooling.*global_pool='avg'"):
        as_network(timm_model(name, **options))


def test_two_predictions_are_refused() -> None:
    model = timm_model("efficientformer_l1", embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 2))
    assert isinstance(as_network(model), TokenFeatures)
    model.set_distilled_training(True)  # type: ignore[operator]
    with pytest.raises(InputError, match="two predictions"):
        as_network(model)


def test_levit_comes_in_both_layouts() -> None:
    options = {"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (1, 1, 1), "key_dim": 8}
    model = timm_model("levit_conv_128s", **options)
    assert as_network(model) is model
    assert isinstance(as_network(timm_model("levit_128s", **options)), TokenFeatures)


def test_a_single_location_is_refused() -> None:
    with pytest.raises(InputError, match=r"student: its last map is 1 x 1 at \(32, 32\) pixels"):
        check_network(timm_model("resnet18"), images(32), "student")


def test_wrong_splits_are_refused() -> None:
    m, x = OwnModel(), images(32)
    pooled = Split(lambda m, x: m.body(x).mean(dim=(2, 3)), lambda m, f: m.classifier(f), m)
    with pytest.raises(InputError, match=r"features are \(3, 8\), not a map"):
        check_network(pooled, x)
    pooled = Split(lambda m, x: m.body(x).mean(dim=(2, 3), keepdim=True), lambda m, f: m.classify(f), m)
    with pytest.raises(InputError, match="before its pooling"):
        check_network(pooled, x)
    with pytest.raises(InputError, match=r"has no parameters: .*Split\(features, head, model\)"):
        check_network(Split(nn.Identity(), nn.Identity()), x)
    with pytest.raises(InputError, match="features are tuple, not a map"):
        check_network(Split(lambda m, x: (m.body(x),), lambda m, f: m.classify(f), m), x)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match=r"it returns tuple and not logits"):
        check_network(Split(lambda m, x: m.body(x), lambda m, f: (m.classify(f),), m), x)  # type: ignore[arg-type,return-value]


def test_two_halves_that_are_not_the_whole_are_refused() -> None:
    class Scaled(Split):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * super().forward(x)

    m = OwnModel()
    with pytest.raises(InputError, match=r"forward_head\(forward_features\(x\)\) is not forward\(x\)"):
        check_network(Scaled(lambda m, x: m.body(x), lambda m, f: m.classify(f), m), images(32))


@pytest.mark.parametrize("zero_classifier", [False, True])
def test_heads_that_ignore_the_attention_are_refused(zero_classifier: bool) -> None:
    """Here each location is normalised before the pooling, so that its weight does not count."""
    m = OwnModel(zero_classifier)
    network = Split(lambda m, x: m.body(x), lambda m, f: m.classify(F.normalize(f, dim=1)), m)
    with pytest.raises(InputError, match="teacher: its logits do not change"):
        check_network(network, images(32), "teacher")


def test_batchnorm_in_the_head_warns() -> None:
    m = OwnModel()
    network = Split(m.body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), m.classifier))
    with pytest.warns(UserWarning, match="student: its head moves buffers") as caught:
        check_network(network, images(32), "student")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="moves buffers"):
        check_network(timm_model("mobilenetv4_conv_small_035"), images(64))


@pytest.mark.parametrize("refused", [False, True])
def test_the_check_leaves_everything_as_it_was(refused: bool) -> None:
    class Noisy(OwnModel):
        """Draws random numbers in any mode, and rebuilds a buffer in another shape at its first forward."""

        def __init__(self) -> None:
            super().__init__(zero_classifier=True)
            self.register_buffer("cache", torch.zeros(1))

        def features(self, x: Tensor) -> Tensor:
            self.cache = torch.full((2, 2), torch.rand(()).item())
            return self.body(x)

        def head(self, f: Tensor) -> Tensor:
            return self.classify(F.normalize(f, dim=1) if refused else f)

    m = Noisy()
    network = Split(lambda m, x: m.features(x), lambda m, f: m.head(f), m)
    m.train()
    m.body[1].eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()
    if refused:
        with pytest.raises(InputError):
            check_network(network, images_without_drawing())
    else:
        check_network(network, images_without_drawing())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in network.modules()] == modes
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def images_without_drawing() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def test_the_check_does_not_spoil_convit() -> None:
    """It rebuilds its position buffers at its first forward."""
    _, options, size, *_ = ADAPTED["convit"]
    model, x = timm_model("convit_tiny", **options, img_size=size).eval(), images(*size)
    check_network(as_network(model), x)
    after = model(x)
    untouched = timm_model("convit_tiny", **options, img_size=size).eval()
    untouched.load_state_dict(model.state_dict())
    torch.testing.assert_close(after, untouched(x))


# Stage maps.


def test_stage_maps_leave_out_the_stem() -> None:
    x = images(64)
    for name, channels in (
        ("resnet18", [64, 128, 256, 512]),
        ("mobilenetv2_050", [16, 16, 48, 1280]),  # the last map is the one behind the last 1x1 convolution
        ("test_convnext", [24, 32, 48, 64]),  # has no stem's map
    ):
        network = timm_model(name).eval()
        final, maps = stage_maps(network, x)
        assert [m.shape[1] for m in maps] == channels and [m.shape[2] for m in maps] == [16, 8, 4, 2]
        assert maps[-1] is final
        torch.testing.assert_close(final, network.forward_features(x))  # type: ignore[operator]


def test_stage_maps_of_networks_for_small_images() -> None:
    """Their stem's map is as large as the first stage's: it goes by its name."""

    class Small(nn.Module):
        feature_info: tuple[dict[str, Any], ...] = (
            {"num_chs": 4, "reduction": 1, "module": "stem"},
            {"num_chs": 5, "reduction": 1, "module": "stages.0"},
            {"num_chs": 6, "reduction": 2, "module": "stages.1"},
        )

        def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            maps = [torch.zeros(1, i["num_chs"], 8 // i["reduction"], 8 // i["reduction"]) for i in self.feature_info]
            return maps[-1] + 1, maps

    final, maps = stage_maps(Small(), images(8))
    assert [m.shape[1] for m in maps] == [5, 6] and maps[-1] is final


def test_stage_maps_of_a_split_are_its_last_map() -> None:
    final, maps = stage_maps(OwnModel().split(), images(32))
    assert len(maps) == 1 and maps[0] is final


# Pairs.


def test_a_pair_is_described() -> None:
    student, teacher, x = OwnModel().split(), timm_model("resnet18"), images(64)
    pair = check_pair(student, teacher, x)
    assert (pair.student, pair.teacher, pair.needs_adapter) == ((8, 16, 16), (512, 2, 2), True)
    said = str(pair).splitlines()
    assert said[0] == "student's map: 8 channels, 16 x 16 places" and "Adapter(8, 512) is needed" in said[2]
    assert not check_pair(student, student, x).needs_adapter
    check_pair(student, teacher, x, Adapter(8, 512))
    with pytest.raises(InputError, match=r"adapter is 512 -> 8, the maps have 8 and 512 channels: Adapter\(8, 512\)"):
        check_pair(student, teacher, x, Adapter(512, 8))


def test_pairs_that_cannot_work_are_refused() -> None:
    x = images(64)
    with pytest.raises(InputError, match="teacher: its last map is 1 x 1"):
        check_pair(timm_model("resnet18"), Split.at(timm_model("resnet18"), "global_pool.pool"), x)
    wide = Split(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d((4, 9))), OwnModel().split().model)  # type: ignore[arg-type]
    wide.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K))
    with pytest.raises(InputError, match=r"no even reductions of one image \(16 x 16 against 4 x 9\)"):
        check_pair(OwnModel().split(), wide, x)


def test_channels_last_is_refused() -> None:
    options = ADAPTED["swin"][1]
    raw, x = timm_model("swin_tiny_patch4_window7_224", **options, img_size=(64, 64)), images(64)
    with pytest.raises(InputError, match=r"student: its features \(3, 4, 4, 48\) are NHWC.*as_network\(model\)"):
        check_network(raw, x, "student")
    assert check_network(as_network(raw), x).shape == (3, 48, 4, 4)
    m = OwnModel()
    own = Split(lambda m, x: m.body(x).permute(0, 2, 3, 1), lambda m, f: m.classifier(f.mean(dim=(1, 2))), m)
    with pytest.raises(InputError, match=r"averages over dimensions 1 to 2 of its features \(3, 16, 16, 8\)"):
        check_network(own, x)


def test_a_head_that_writes_into_the_map_is_refused() -> None:
    m = OwnModel()
    network = Split(lambda m, x: m.body(x), lambda m, f: m.classify(f.mul_(2)), m)
    with pytest.raises(InputError, match="changes the map in place"):
        check_network(network, images(32))


def test_a_network_wrapped_by_itself_is_warned_about() -> None:
    network = OwnModel().split()
    with pytest.warns(UserWarning, match="student is wrapped by itself") as caught:
        check_network(nn.DataParallel(network), images(32), "student")
    assert caught[0].filename == __file__


# In anybody's loop.


def test_the_three_lines() -> None:
    """A timm teacher and a user's student, of other width and map size: every parameter learns."""
    teacher, student, x, target = (
        timm_model("resnet18", zero_init_last=False),
        OwnModel().split(),
        images(64),
        torch.tensor([0, 1, 2]),
    )
    adm = ADMLoss(alpha=0.2, beta=0.6, adapter=Adapter(8, 512))
    map_student, map_teacher = student.forward_features(x), teacher.forward_features(x)  # type: ignore[operator]
    loss = F.cross_entropy(student.forward_head(map_student), target)
    loss = loss + adm(map_student, map_teacher, target, student.forward_head, teacher.forward_head)
    loss.backward()
    for module in (teacher, student, adm):
        for name, p in module.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
