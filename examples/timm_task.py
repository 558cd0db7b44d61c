"""ADM as a task of timm's training loop, like timm.task.FeatureDistillationTask, but with a teacher that learns too.

python examples/timm_task.py
"""

import timm
import torch
from adm import Adapter, ADMLoss, check_pair, mutual_loss
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn


class Pair(nn.Module):  # everything that is trained: DDP wraps this one module
    def __init__(self, student: nn.Module, teacher: nn.Module, adm: ADMLoss) -> None:
        super().__init__()
        self.student, self.teacher, self.adm = student, teacher, adm

    def no_weight_decay(self) -> set[str]:  # create_optimizer_v2 asks for it
        networks = {"student": self.student, "teacher": self.teacher}.items()
        return {f"{role}.{name}" for role, n in networks for name in getattr(n, "no_weight_decay", set)()}

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        map_s, map_t = self.student.forward_features(images), self.teacher.forward_features(images)
        logits = {"student": self.student.forward_head(map_s), "teacher": self.teacher.forward_head(map_t)}
        parts = mutual_loss(logits, target, criterion=self.adm.criterion)
        terms = {f"{role}/{name}": loss for role, losses in parts.items() for name, loss in losses.items()}
        terms |= self.adm.terms(map_s, map_t, target, self.student.forward_head, self.teacher.forward_head)
        return logits["student"], terms


class ADMTask(TrainingTask):  # evaluates and saves the student; the teacher and phi are its state
    def __init__(self, student: nn.Module, teacher: nn.Module, adm: ADMLoss) -> None:
        super().__init__(verbose=False)
        self.trainable_module = Pair(student, teacher, adm)

    def prepare_distributed(self, device_ids: list[int] | None = None, **options: bool) -> "ADMTask":
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **options
        )
        return self

    def pair(self, module: nn.Module | None = None, ema: bool = False) -> Pair:
        return unwrap_model(module or self.get_trainable_module(ema=ema))

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module:
        return self.pair(module, ema).student

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, dict[str, Tensor]]:
        return {part: getattr(self.pair(module, ema), part).state_dict() for part in ("teacher", "adm")}

    def load_task_state(self, state, strict: bool = True, module: nn.Module | None = None, ema: bool = False) -> None:
        for part in state:
            getattr(self.pair(module, ema), part).load_state_dict(state[part], strict)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        output, terms = self.trainable_module(input, target)
        return {"loss": sum(terms.values()), "output": output, **terms}


torch.manual_seed(0)
images = torch.tensor(load_digits().images).float().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None] / 16
targets = torch.tensor(load_digits().target)  # of images [N, 1, 32, 32]
settings = {"num_classes": 10, "in_chans": 1, "output_stride": 8}
student, teacher = (timm.create_model(f"test_{name}", **settings) for name in ("efficientnet", "resnet"))
adapter = Adapter(student.num_features, teacher.num_features)
print(check_pair(student, teacher, images[:8], adapter))
task = ADMTask(student, teacher, ADMLoss(0.2, 0.6, adapter, criterion=nn.CrossEntropyLoss(label_smoothing=0.1)))
optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=3e-3, weight_decay=0.05)
for epoch in range(1, 3):
    for i in torch.randperm(1400).split(50):
        result = task(images[i], targets[i])
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    print(f"epoch {epoch}:", *(f"{name} {value:.4f}" for name, value in result.items() if name != "output"), flush=True)
right = [(n(images[1400:]).argmax(1) == targets[1400:]).float().mean() for n in (student.eval(), teacher.eval())]
print(f"accuracy: student {right[0]:.3f} teacher {right[1]:.3f}")
