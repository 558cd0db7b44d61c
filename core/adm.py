"""Asymmetric Decision-Making: the student learns harder where two maps agree, the teacher where they differ.

Eq. 6 ``spatial_similarity``, the attentions of Eq. 7 and 8, the losses of Eq. 7, 8, 11, 12, and ``ADMLoss`` (Eq. 9).
Maps are the last spatial features ``[B, C, H, W]`` before global pooling (or ``[B, C, L]`` of sequences, ``[B, C, D, H,
W]`` of volumes: wherever H, W stands); a ``head`` is whatever a network does with that map to reach its logits
(activation, pooling, classifier). Targets and criteria: module ``targets``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter
from .distillation import NoiseFilter
from .errors import InputError, unknown
from .maps import check_maps, full_precision, pool_to, smaller_size
from .processes import warn_where_apart
from .ranges import NonNegative, Positive, Unit, check_ranges
from .targets import Criterion, blended_loss, check_imitation, imitation_loss, kd_loss, label_loss, read_criterion

Head = Callable[[Tensor], Tensor]
Form = Literal["ce", "kd"]
Control = Literal["none", "uniform", "shuffled"]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}

# Algorithm 1's guard. Where a map's mean weight m = 1 -+ S_bar is tiny, the attention's mean is m / (m + EPSILON) < 1.
EPSILON = 1e-5


def spatial_similarity(map_student: Tensor, map_teacher: Tensor) -> Tensor:
    """Eq. 6: the cosine of both feature vectors at each location.

    Args: maps ``[B, C, Hs, Ws]`` and ``[B, C, Ht, Wt]`` of equal C; the larger is average-pooled to the smaller's size.
    Returns: S ``[B, H, W]`` in [-1, 1], detached, float32 (float64 for float64 maps), 0 where a vector is zero.
    Raises: InputError, a ValueError, where the channels differ (project the student's map by an ``Adapter`` first).
    """
    maps = (map_student, map_teacher)
    if (
        not all(isinstance(x, Tensor) and 3 <= x.dim() <= 5 for x in maps)
        or map_student.shape[:2] != map_teacher.shape[:2]
    ):
        student, teacher = (tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in maps)
        raise InputError(
            f"cannot compare a student map {student} with a teacher map {teacher}: "
            "both must be [B, C, H, W] with equal B and C; for unequal channels use Adapter(Cs, Ct)"
        )
    size = smaller_size(map_student, map_teacher)
    s, t = (pool_to(full_precision(x.detach()), size) for x in (map_student, map_teacher))  # [B, C, H, W]
    norms = [torch.linalg.vector_norm(x, dim=1).clamp_min(1e-8) for x in (s, t)]  # 2 x [B, H, W]
    # float32 cosines reach 1 + 2e-6, which would turn the divergence attention negative: clamp.
    return ((s * t).sum(dim=1) / (norms[0] * norms[1])).clamp(-1.0, 1.0)


def control(similarity: Tensor, kind: Control = "none") -> Tensor:
    """S ``[B, H, W]`` as it is, or a control in its place, without which no gain may be called the attention's.

    ``uniform``: S is 0 everywhere, so that both attentions are 1 (up to Algorithm 1's guard of 1e-5) and the ``ce``
    losses a second cross-entropy. ``shuffled``: S permuted over the places of each image, by torch's generator: the
    same weights where they mean nothing. Take it once for a pair: all its terms then see one S.
    Raises: ValueError for another kind.
    """
    if kind == "none":
        return similarity
    if kind == "uniform":
        return torch.zeros_like(similarity)
    if kind == "shuffled":
        places = torch.rand_like(similarity).flatten(1).argsort(dim=1)  # a permutation for each image
        return similarity.flatten(1).gather(1, places).view_as(similarity)
    raise InputError(f"unknown control {kind!r}: 'none', 'uniform' or 'shuffled'")


def consensus_attention(similarity: Tensor) -> Tensor:
    """(1 + S) / (1 + S_bar) of Eq. 7: ``[B, H, W] -> [B, 1, H, W]``, non-negative, mean 1 for each image."""
    return _attention(1.0 + similarity)


def divergence_attention(similarity: Tensor) -> Tensor:
    """(1 - S) / (1 - S_bar) of Eq. 8: ``[B, H, W] -> [B, 1, H, W]``, non-negative, mean 1 for each image.

    Exactly 0 everywhere for an image whose maps agree everywhere (S == 1): there is no divergence to learn from.
    """
    return _attention(1.0 - similarity)


def _attention(weight: Tensor) -> Tensor:
    # [B, 1, H, W]: one weight per location of its own image (Algorithm 1, as printed, yields [B, B, H, W]).
    places = tuple(range(1, weight.dim()))
    return (weight / (weight.mean(dim=places, keepdim=True) + EPSILON)).unsqueeze(1)


def resize_similarity(similarity: Tensor, size: tuple[int, ...]) -> Tensor:
    """S ``[B, H, W]`` for the network with the larger map: bilinear (linear, trilinear), before any mean is taken."""
    if similarity.shape[1:] == size:
        return similarity
    resized = F.interpolate(similarity.unsqueeze(1), size=size, mode=_LINEAR[len(size)], align_corners=False).squeeze(1)
    return resized.clamp(-1.0, 1.0)  # interpolation, too, rounds beyond 1


def attend(feature_map: Tensor, similarity: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """``attention(S) * F``: the map ``[B, C, H, W]`` reweighted at each location, in the map's own precision."""
    weight = attention(resize_similarity(similarity, feature_map.shape[2:]))  # [B, 1, H, W]
    return weight.to(feature_map.dtype) * feature_map


def consensus_loss(
    similarity: Tensor, map_student: Tensor, target: Any, student_head: Head, criterion: Criterion = F.cross_entropy
) -> Tensor:
    """Eq. 7, trains the student: ``criterion(W_s(GAP((1 + S) / (1 + S_bar) F_s)), y)``, a scalar.

    Args: S ``[B, h, w]``; the student's map ``[B, Cs, Hs, Ws]``; targets, head and criterion as in ``ADMLoss``.
    """
    return label_loss(student_head(attend(map_student, similarity, consensus_attention)), target, criterion)


def divergence_loss(
    similarity: Tensor, map_teacher: Tensor, target: Any, teacher_head: Head, criterion: Criterion = F.cross_entropy
) -> Tensor:
    """Eq. 8, trains the teacher: ``criterion(W_t(GAP((1 - S) / (1 - S_bar) F_t)), y)``, a scalar.

    Args: S ``[B, h, w]``; the teacher's map ``[B, Ct, Ht, Wt]``; targets, head and criterion as in ``ADMLoss``.
    """
    return label_loss(teacher_head(attend(map_teacher, similarity, divergence_attention)), target, criterion)


def consensus_kd_loss(
    similarity: Tensor,
    map_student: Tensor,
    map_teacher: Tensor,
    student_head: Head,
    teacher_head: Head,
    tau: float = 1.0,
    weight: Tensor | None = None,
    *,
    target: Tensor | None = None,
    criterion: Criterion = F.cross_entropy,
) -> Tensor:
    """Eq. 11, trains the student: it imitates what the teacher says about its own map under the same attention.

    Args: S ``[B, h, w]``; both maps and heads; tau > 0.
        ``weight``: a factor for each distribution that the heads put out, as in ``kd_loss``. Or the ``target`` and the
        ``criterion``: which of them it ignores and what it weighs, as in ``imitation_loss``.
    Returns: a scalar. Raises: InputError for a criterion that this form cannot honour.
    """
    with torch.no_grad():
        teacher_logits = teacher_head(attend(map_teacher, similarity, consensus_attention))
    student_logits = student_head(attend(map_student, similarity, consensus_attention))
    if weight is not None:
        return kd_loss(student_logits, teacher_logits, tau, weight)
    return imitation_loss(student_logits, teacher_logits, tau, target, criterion)


def divergence_kd_loss(
    similarity: Tensor,
    map_teacher: Tensor,
    target: Tensor,
    teacher_head: Head,
    previous: Tensor | None = None,
    delta: float | Tensor = 0.0,
    criterion: Criterion = F.cross_entropy,
) -> Tensor:
    """Eq. 12, trains the teacher: cross-entropy towards ``(1 - delta) onehot(y) + delta previous``, a scalar.

    Args: S ``[B, h, w]``; the teacher's map and head; targets and criterion as in ``ADMLoss``.
        ``previous``: the teacher's own probabilities ``[B, K, ...]`` for these samples in the last epoch (None in the
        first); ``delta``: a number, or one for each sample ``[B]`` (0 where its row of ``previous`` means nothing).
    Written as soft cross-entropy: same gradient as KL, which is NaN on one-hot targets. Equals Eq. 8 at delta 0.
    Raises: InputError for a criterion that this form cannot honour, or shapes that do not fit.
    """
    logits = full_precision(teacher_head(attend(map_teacher, similarity, divergence_attention)))  # [B, K]
    if previous is None:
        return label_loss(logits, target, criterion)
    return blended_loss(logits, target, previous, delta, criterion)


def phi_loss(projected: Tensor, map_teacher: Tensor, map_student: Tensor | None = None) -> Tensor:
    """phi's own loss, its relative squared residual ``sum (F_t - phi(F_s))^2 / sum F_t^2``; 1 is what phi = 0 gives.

    ``projected``: phi(F_s.detach()) ``[B, Ct, h, w]``; the teacher's map ``[B, Ct, Ht, Wt]`` is detached and pooled to
    that size. ``map_student`` ``[B, Cs, Hs, Ws]``: where its energy is over four times the teacher's, a quarter of it
    is the denominator. The curvature in phi's weight is then at most 8, and SGD with momentum 0.9 at learning rate 0.1
    (stable below 38) cannot diverge whatever the student's scale.
    """
    size = projected.shape[2:]
    teacher = full_precision(pool_to(map_teacher.detach(), size))
    energy = teacher.square().sum()
    if map_student is not None:
        student = full_precision(pool_to(map_student.detach(), size))
        energy = torch.maximum(energy, student.square().sum() / 4.0)
    return (teacher - full_precision(projected)).square().sum() / energy.clamp_min(1e-12)


@dataclass(frozen=True)
class ADMConfig:
    """Weights and forms of ADM.

    Args:
        alpha: weight of the consensus loss (trains the student).
        beta: weight of the divergence loss (trains the teacher).
        gamma: weight of the feature loss (Eq. 5, trains the student).
        consensus: ce (Eq. 7) or kd (Eq. 11, ImageNet's headline figures); Table 15 has each form of both sides.
        divergence: ce (Eq. 8) or kd (Eq. 12, towards what the teacher itself said in the epoch before, which is kept
            on disk in the run folder: 4 bytes an image and class).
        tau: temperature of the kd form of consensus.
        delta: weight of that earlier prediction in divergence's kd form: it grows linearly over the epochs, from the
            first value in the second epoch to the second value in the last (0 in the first epoch).
        feature_filter: Table 18's noise filters of the feature loss.
        feature_targets: student is whom the feature loss trains; both lets the teacher imitate the student's maps too,
            which the paper warns of (Section 3.2, Appendix C).
        phi: needed projects the student's map where the last maps differ in channels; always also where they agree, so
            that channel k of one network need not mean what channel k of the other does.
        phi_loss: own trains the last adapter by its own relative residual; feature by the feature loss (the paper's
            letter).
        control: none is ADM; uniform (attention 1 everywhere) and shuffled (S at permuted places of each image) are
            what it must be compared with before a gain is called the attention's.
    Raises: InputError for a negative weight, a value out of range or an unknown word.
    """

    alpha: NonNegative = 0.01
    beta: NonNegative = 0.01
    gamma: NonNegative = 1.0
    consensus: Form = "ce"
    divergence: Form = "ce"
    tau: Positive = 1.0
    delta: tuple[Unit, Unit] = (0.2, 0.6)
    feature_filter: NoiseFilter = "none"
    feature_targets: Literal["student", "both"] = "student"
    phi: Literal["needed", "always"] = "needed"
    phi_loss: Literal["own", "feature"] = "own"
    control: Control = "none"

    def __post_init__(self) -> None:
        check_ranges("adm.", self)
        for name, kind in get_type_hints(type(self)).items():  # a config that no parser has read is checked here
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise unknown(f"value of adm.{name}", str(getattr(self, name)), get_args(kind))


class ADMLoss(nn.Module):
    """Eq. 9: ``alpha L_co + beta L_di`` for one student and one teacher, to be added to any loss.

    The paper's weights, where L_co is Eq. 7 or 11 and gamma that of ``feature_loss``, which is the caller's own:
    CIFAR-100 alpha 0.01, beta 0.01, gamma 1; ImageNet 0.2, 0.6, 0.01 with ``consensus="kd"``; under a fixed teacher
    alpha 1 (CIFAR-100) or 0.1 (ImageNet), beta and gamma 0.

    Args:
        alpha, beta, consensus, divergence, tau, control: as in ``ADMConfig``; a weight of 0 leaves that side's head
            alone.
        adapter: ``Adapter(Cs, Ct)``, needed where the channels differ (``always=True`` where they agree). S then
            compares F_t with phi(F_s), and the returned scalar holds phi's own loss: hand ``adm.parameters()`` to the
            optimiser.
        train_adapter: phi by its own loss (default). False: by whatever feature loss you compute with it.
        criterion: what the targets are (module ``targets``): ``nn.CrossEntropyLoss(...)`` (the default without options)
            for class indices ``[B]`` or ``[B, H, W]`` and for probabilities ``[B, K]``, ``nn.BCEWithLogitsLoss(...)``
            for several labels ``[B, K]`` in [0, 1]. What it ignores has no gradient in either form (a batch of which it
            ignores everything gives 0), and its weights count in both. Or any ``criterion(head_output, target)``, a
            scalar, for the "ce" forms alone.
    Raises: InputError, a ValueError, as ``ADMConfig``, and for a criterion that a "kd" form cannot honour. At its first
        call, and where shapes change, as ``check_maps`` for maps that cannot be compared.
        Warns at the first call where beta > 0 and the student's map has a gradient but not the teacher's, and where
        a DistributedDataParallel holds one of two networks that train without the other.
    """

    def __init__(
        self,
        alpha: float,
        beta: float,
        adapter: Adapter | None = None,
        *,
        consensus: Form = "ce",
        divergence: Form = "ce",
        tau: float = 1.0,
        train_adapter: bool = True,
        criterion: Criterion = F.cross_entropy,
        control: Control = "none",
    ) -> None:
        super().__init__()
        self.config = ADMConfig(alpha, beta, consensus=consensus, divergence=divergence, tau=tau, control=control)
        self.adapter, self.train_adapter, self.criterion = adapter, train_adapter, read_criterion(criterion)
        if alpha > 0 and consensus == "kd":
            check_imitation(self.criterion, "consensus='kd'", labelled=False)
        if beta > 0 and divergence == "kd":
            check_imitation(self.criterion, "divergence='kd'")
        self._shapes: tuple[Any, Any] | None = None

    def _check(self, map_student: Any, map_teacher: Any) -> None:
        """Looks at maps whose shapes are not the last call's: free in a loop."""
        if torch.compiler.is_compiling():  # at each trace; what is compiled holds nothing of it
            check_maps(map_student, map_teacher)
            return
        shapes = getattr(map_student, "shape", None), getattr(map_teacher, "shape", None)
        if shapes == self._shapes:
            return
        check_maps(map_student, map_teacher)
        trained = self._shapes is None and torch.is_grad_enabled() and map_student.requires_grad
        if trained and self.config.beta > 0 and not map_teacher.requires_grad:
            warnings.warn(
                "the teacher's map has no gradient, so that beta trains its head alone: give beta=0 where the teacher "
                "is fixed, else compute its map with gradient",
                stacklevel=6,  # whoever called the module
            )
        self._shapes = shapes

    def project(self, map_student: Tensor, map_teacher: Tensor) -> Tensor:
        """phi(F_s) ``[B, Ct, h, w]``, F_s detached: at the size of comparison, or as it is without an adapter.

        Raises: InputError where the channels differ and there is no adapter.
        """
        if self.adapter is not None:
            return self.adapter(map_student.detach(), smaller_size(map_student, map_teacher))
        if (cs := map_student.shape[1]) != (ct := map_teacher.shape[1]):
            raise InputError(
                f"the student's map has {cs} channels, the teacher's {ct}: write "
                f"ADMLoss(alpha, beta, adapter=Adapter({cs}, {ct})) and give adm.parameters() to the optimiser"
            )
        return map_student.detach()

    def terms(
        self,
        map_student: Tensor,
        map_teacher: Tensor,
        target: Tensor,
        student_head: Head,
        teacher_head: Head,
        *,
        previous: Tensor | None = None,
        delta: float | Tensor = 0.0,
    ) -> dict[str, Tensor]:
        """The weighted parts, by name: "consensus" (student), "divergence" (teacher), "phi" (adapter alone).

        Args: maps ``[B, Cs, Hs, Ws]``, ``[B, Ct, Ht, Wt]`` (or of sequences or volumes); targets that fit the
            criterion, class indices ``[B]`` unless told; each network's own head, map -> logits.
            ``previous`` ``[B, K]``, ``delta`` (a number or ``[B]``): only for the "kd" form of divergence (Eq. 12).
        Returns: scalars to be added; a name is left out where its weight is 0, "phi" where phi has no parameters.
        Raises: InputError, a ValueError, for maps that cannot be compared or targets that do not fit the heads' logits.
        """
        if self._shapes is None and not torch.compiler.is_compiling():
            warn_where_apart(student_head, teacher_head)
        self._check(map_student, map_teacher)
        config, terms = self.config, {}
        projected = self.project(map_student, map_teacher)
        similarity = control(spatial_similarity(projected, map_teacher), config.control)  # [B, H, W]
        if config.alpha > 0:
            if config.consensus == "ce":
                loss = consensus_loss(similarity, map_student, target, student_head, self.criterion)
            else:
                loss = consensus_kd_loss(
                    similarity, map_student, map_teacher, student_head, teacher_head, config.tau,
                    target=target, criterion=self.criterion,
                )  # fmt: skip
            terms["consensus"] = config.alpha * loss
        if config.beta > 0:
            if config.divergence == "ce":
                loss = divergence_loss(similarity, map_teacher, target, teacher_head, self.criterion)
            else:
                loss = divergence_kd_loss(
                    similarity, map_teacher, target, teacher_head, previous, delta, self.criterion
                )
            terms["divergence"] = config.beta * loss
        if self.train_adapter and self.adapter is not None and self.adapter.conv is not None:
            terms["phi"] = phi_loss(projected, map_teacher, map_student)
        return terms

    def forward(
        self,
        map_student: Tensor,
        map_teacher: Tensor,
        target: Tensor,
        student_head: Head,
        teacher_head: Head,
        *,
        previous: Tensor | None = None,
        delta: float | Tensor = 0.0,
    ) -> Tensor:
        """The scalar of Eq. 9, plus phi's own loss where there is one: the sum of ``terms``, same arguments."""
        terms = self.terms(map_student, map_teacher, target, student_head, teacher_head, previous=previous, delta=delta)
        return sum(terms.values(), start=map_student.new_zeros(()))

    def extra_repr(self) -> str:
        return str(self.config)
