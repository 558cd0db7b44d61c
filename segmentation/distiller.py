"""Teacher and student: one mmsegmentation model that holds two, to be trained by mmengine's Runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmseg.models import BaseSegmentor, SegDataPreProcessor
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from core.adm import spatial_similarity
from core.distillation import full_precision, kd_loss
from core.errors import InputError, unknown
from core.ranges import NonNegative, Positive, range_of
from core.training.seed import random_state, restore_random_state, seed_everything
from core.weights import check_finite, read_state_dict
from segmentation.losses import (
    DenseADM,
    Output,
    Pixels,
    Terms,
    adm_config,
    cross_entropy,
    imitated,
    parse_method,
    pixels_of,
    resize,
    teacher_learns,
)

ROLES = ("teacher", "student")


@MODELS.register_module()
class ViewsDataPreProcessor(SegDataPreProcessor):
    """mmseg's ``SegDataPreProcessor``, also for images whose channels are those of several views, ``[3 V, H, W]``.

    Each view is normalised, and its channels reordered, as a plain image is; all are padded alike.
    """

    _channel_conversion: bool
    _enable_normalize: bool

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.flips, self.scales = self._channel_conversion, self._enable_normalize
        self._channel_conversion = self._enable_normalize = False  # mmseg's own forward pads and stacks alone

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        data = self.cast_data(data)
        return super().forward({**data, "inputs": [self.normalised(image) for image in data["inputs"]]}, training)

    def normalised(self, image: Tensor) -> Tensor:
        """``[3 V, H, W] -> [3 V, H, W]``, float32."""
        views = image.unflatten(0, (-1, 3))  # [V, 3, H, W]
        views = (views.flip(1) if self.flips else views).float()
        return ((views - self.mean) / self.std if self.scales else views).flatten(0, 1)


@MODELS.register_module()
class DistillationSegmentor(BaseSegmentor):
    """Teacher and student, trained together or the student alone under a fixed teacher, with ADM or without.

    A network's initial weights depend on the seed and its role alone: it starts alike whatever is trained beside it.

    Args:
        teacher, student: configs of two ``EncoderDecoder``; their data preprocessors are left out.
        method: vanilla, dml, kdcl, switokd or kd (a fixed teacher), each also as ``dml+adm``.
        adm: options of ADM, see ``core.adm.ADMConfig`` and ``adm_config``; without "+adm" they do nothing.
        tau: temperature of the imitation losses.
        weight: lambda, the weight of the imitation losses, one for both networks or as ``dict(teacher=0.3)``.
        normalise: each loss over pixels is divided by the number of all pixels (mmseg's default), or "valid": of those
            with a label.
        teacher_weights: file with a trained teacher (``.pth`` or ``.safetensors``); "kd" needs one.
        data_preprocessor: for both; under KDCL ``ViewsDataPreProcessor``, and images of 6 channels: one crop and flip,
            distorted once for the teacher (the first 3) and once for the student.
    Raises: InputError where these two cannot be trained so.
    """

    def __init__(
        self,
        teacher: dict[str, Any],
        student: dict[str, Any],
        method: str = "dml+adm",
        adm: Mapping[str, Any] | None = None,
        tau: float = 1.0,
        weight: float | Mapping[str, float] = 1.0,
        normalise: str = "all",
        teacher_weights: str | None = None,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.method, self.with_adm = parse_method(method)
        range_of(Positive).check("model.tau", tau)
        weights = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(ROLES, weight)
        for role, value in weights.items():
            if role not in ROLES:
                raise unknown("network in model.weight", role, ROLES)
            range_of(NonNegative).check("model.weight", value)
        if normalise not in ("all", "valid"):
            raise unknown("model.normalise", normalise, ("all", "valid"))
        if self.method == "kd" and teacher_weights is None:
            raise InputError("the method kd needs a trained teacher: give model.teacher_weights=FILE")
        config = adm_config(adm or {}, self.method, used=self.with_adm)
        self.tau, self.weights, self.normalise = tau, weights, normalise
        self.teacher_weights = teacher_weights

        self._seed = torch.initial_seed()
        for role, settings in zip(ROLES, (teacher, student), strict=True):
            with self._drawn_for(role):
                self.add_module(role, MODELS.build({**settings, "data_preprocessor": None}))
        for role in reversed(ROLES):  # the student first, with which the teacher is compared
            check_network(self.networks[role], role, self.student)
        self.ignore: int = self.student.decode_head.ignore_index
        self.frozen = self.method == "kd"
        if self.frozen:
            self.teacher.requires_grad_(False)
        self.adm: DenseADM | None = None
        if self.with_adm:
            with self._drawn_for("adapter"):
                self.adm = DenseADM(config, self.student.decode_head.channels, self.teacher.decode_head.channels)
        self._gates: list[Tensor] | None = None
        self.train()

    @property
    def networks(self) -> dict[str, Any]:
        """Both networks by role: plain ``EncoderDecoder``s, each exported as it is."""
        return {role: getattr(self, role) for role in ROLES}

    @contextmanager
    def _drawn_for(self, role: str) -> Iterator[None]:
        state = random_state()
        seed_everything(self._seed, "network", role)
        try:
            yield
        finally:
            restore_random_state(state)

    def init_weights(self) -> None:
        """Raises: InputError where the teacher's weights are absent or do not fit; else see ``check_pretrained``."""
        for role, network in self.networks.items():
            if role == "teacher" and self.teacher_weights is not None:
                load_weights(network, Path(self.teacher_weights), role)
            else:
                with self._drawn_for(role):
                    network.init_weights()
        self._is_init = True

    def train(self, mode: bool = True) -> DistillationSegmentor:
        """A fixed teacher stays in evaluation mode: its BatchNorm statistics must not move."""
        super().train(mode)
        if self.frozen:
            self.teacher.eval()
        return self

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Has this optimiser skip a paused teacher wholly (momentum and weight decay included).

        SwitOKD's loss times 0 leaves gradients of 0, which still decay and move; they are set to None right before
        the optimiser's step, also under DDP, gradient scaling and accumulation (a teacher pauses where every part of
        the batch says so). ``DistillationOptimWrapperConstructor`` calls this.
        """
        self._gates = []
        optimizer.register_step_pre_hook(lambda *_: self._skip_paused())

    def _skip_paused(self) -> None:
        if self._gates:
            learns = bool(torch.stack(self._gates).any())  # the one value that a step reads from the device: SwitOKD's
            self._gates = []
            if not learns:
                for parameter in self.teacher.parameters():
                    parameter.grad = None

    def views(self, inputs: Tensor) -> dict[str, Tensor]:
        """Normalised images ``[B, 3 V, H, W]`` -> each network's view ``[B, 3, H, W]``; one view serves both."""
        views = inputs.unflatten(1, (-1, 3))
        return {"teacher": views[:, 0], "student": views[:, -1]}

    def loss(self, inputs: Tensor, data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """The weighted terms, to be summed: "student/loss_ce", "student/loss_kd", "teacher/loss_divergence", ...

        Args: normalised images ``[B, 3, H, W]`` (or ``[B, 6, H, W]``: the teacher's view, the student's); B samples
            with ``gt_sem_seg`` ``[1, H, W]``.
        Returns: scalars; under SwitOKD also "teacher/paused", 1 where the teacher waits.
        """
        labels = torch.stack([sample.gt_sem_seg.data for sample in data_samples]).squeeze(1)  # [B, H, W]
        pixels = pixels_of(labels, self.ignore, self.normalise)  # type: ignore[arg-type]
        outputs: dict[str, Output] = {}
        losses: dict[str, Terms] = {}
        for role, view in self.views(inputs).items():
            outputs[role], losses[role] = self._forward_train(role, view, pixels)

        for role, other in imitated(self.method, outputs, pixels).items():
            if scale := self.weights.get(role, 1.0):
                losses[role]["kd"] = scale * kd_loss(outputs[role].full, other, self.tau, pixels.weight)
        if self.adm is not None:
            for role, terms in self.adm(outputs["student"], outputs["teacher"], pixels).items():
                losses[role].update(terms)

        named: dict[str, Tensor] = {}
        if self.method == "switokd":
            if self._gates is None:
                raise InputError(
                    "SwitOKD pauses the teacher, which its optimiser must know of: give "
                    "optim_wrapper.constructor='DistillationOptimWrapperConstructor', or call watch(optimizer)"
                )
            gate = teacher_learns(outputs, pixels)
            if all(parameter.grad is None for parameter in self.teacher.parameters()):
                self._gates = []  # a step begins; the one before may have been left out by gradient scaling
            self._gates.append(gate)
            # Times 0 and not left out: every process must reduce the same gradients.
            losses["teacher"] = {term: gate * value for term, value in losses["teacher"].items()}
            named["teacher/paused"] = 1.0 - gate
        named.update({f"{role}/loss_{t}": value for role, terms in losses.items() for t, value in terms.items()})
        return named

    def _forward_train(self, role: str, view: Tensor, pixels: Pixels) -> tuple[Output, Terms]:
        network = self.networks[role]
        trained = role == "student" or not self.frozen
        size = pixels.labels.shape[-2:]
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            head, maps = network.decode_head, network.extract_feat(view)
            feature = head._forward_feature(maps)
            auxiliary = [(head, head(maps)) for head in auxiliary_heads(network)] if trained else []
            logits = full_precision(head.cls_seg(feature))
            output = Output(feature, logits, resize(logits, size, head), head)
            if not trained:
                return output, {}
            terms = {"ce": cross_entropy(output.full, pixels, head)}
            if auxiliary:
                values = [cross_entropy(resize(full_precision(z), size, h), pixels, h) for h, z in auxiliary]
                terms["aux"] = torch.stack(values).sum()
            return output, terms

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Both networks' predictions ``[1, H, W]`` at the image's own size: "pred_sem_seg", the student's, and
        "pred_sem_seg_teacher"."""
        views = self.views(inputs)
        samples = self.teacher.predict(views["teacher"], data_samples)
        teachers = [sample.pred_sem_seg for sample in samples]
        samples = self.student.predict(views["student"], data_samples)
        for sample, prediction in zip(samples, teachers, strict=True):
            sample.set_data({"pred_sem_seg_teacher": prediction})
        return samples

    @torch.no_grad()
    def similarity(self, inputs: Tensor) -> Tensor:
        """S ``[B, h, w]`` of the two decode heads' maps (Eq. 6) for normalised images, in the present mode.

        Raises: ValueError where the channels differ and there is no adapter: the method was trained without ADM.
        """
        views = self.views(inputs)
        teacher, student = (n.decode_head._forward_feature(n.extract_feat(views[r])) for r, n in self.networks.items())
        if self.adm is not None:
            student = self.adm.project(student, teacher)
        return spatial_similarity(student, teacher)

    def extract_feat(self, inputs: Tensor) -> Any:
        return self.student.extract_feat(inputs)

    def encode_decode(self, inputs: Tensor, batch_data_samples: Any) -> Tensor:
        return self.student.encode_decode(inputs, batch_data_samples)

    def _forward(self, inputs: Tensor, data_samples: Any = None) -> Tensor:
        return self.student._forward(self.views(inputs)["student"])


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DistillationOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's own constructor, whose optimiser then skips a teacher that SwitOKD pauses."""

    def __call__(self, model: nn.Module) -> OptimWrapper:
        wrapper = super().__call__(model)
        bare(model).watch(wrapper.optimizer)
        return wrapper


def bare(model: Any) -> Any:
    """The model without the wrapper that several processes put around it."""
    return model.module if is_model_wrapper(model) else model


def auxiliary_heads(network: Any) -> list[Any]:
    """An ``EncoderDecoder``'s auxiliary heads: none, one or several."""
    if not network.with_auxiliary_head:
        return []
    head = network.auxiliary_head
    return list(head) if isinstance(head, nn.ModuleList) else [head]


def check_network(network: Any, role: str, student: Any) -> None:
    """Raises: InputError where ADM cannot reweight a network's heads, or their classes are not the student's."""
    head: Any = getattr(network, "decode_head", None)
    if not isinstance(head, BaseDecodeHead) or not splits(head):
        raise InputError(
            f"{role}: the decode head {type(head).__name__} does not tell its map from its classifier: use ASPPHead, "
            "PSPHead, FCNHead or another whose forward is cls_seg(_forward_feature(x))"
        )
    classes, ignored = student.decode_head.num_classes, student.decode_head.ignore_index
    for each in [head, *auxiliary_heads(network)]:
        loss = each.loss_decode
        softmax = isinstance(loss, CrossEntropyLoss) and not (loss.use_sigmoid or loss.use_mask)
        if not softmax or each.sampler is not None or each.out_channels != each.num_classes:
            raise InputError(
                f"{role}: {type(each).__name__} must have one softmax CrossEntropyLoss over its classes and no sampler"
            )
        if (each.num_classes, each.ignore_index) != (classes, ignored):
            raise InputError(
                f"{role}: {type(each).__name__} has {each.num_classes} classes and ignores label {each.ignore_index}, "
                f"the student's decode head has {classes} and ignores {ignored}: "
                "give all heads the same num_classes and ignore_index"
            )


def splits(head: BaseDecodeHead) -> bool:
    """Whether a head is the 1x1 classifier ``conv_seg`` (behind dropout) of the map of its own ``_forward_feature``.

    A class that has its own ``forward`` over an inherited ``_forward_feature`` (DepthwiseSeparableASPPHead) is not.
    """
    kinds, conv = type(head).__mro__, head.conv_seg
    own = next(kind for kind in kinds if "forward" in vars(kind) or "_forward_feature" in vars(kind))
    one_by_one = isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and conv.bias is not None
    return "_forward_feature" in vars(own) and type(head).cls_seg is BaseDecodeHead.cls_seg and one_by_one


def load_weights(network: nn.Module, file: Path, role: str | None = None, *, training: bool = True) -> None:
    """Loads an mmseg checkpoint, a state dict, a ``.safetensors``, or this role's part of a run's own checkpoint.

    ``role``: None for a pair, whose both networks are loaded.
    Raises: InputError where the file is absent, cannot be read safely, does not fit or (in ``training``) is not finite.
    """
    whose = "" if role is None else f"{role}: "
    try:
        state = read_state_dict(file)
    except InputError as error:
        raise InputError(f"{whose}{error}") from error
    prefix = f"{role}."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = network.state_dict()
    wrong = [key for key in own if key not in state or own[key].shape != state[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        pair = role is not None or any(key.startswith("student.") for key in state)
        hint = "" if pair else "; are they of one network alone? name it by --role"
        raise InputError(
            f"{whose}the weights {file} are of another network: {wrong[0]} and {len(wrong) - 1} more{hint}"
        )
    check_finite(file, state, training=training)
    network.load_state_dict(state)
