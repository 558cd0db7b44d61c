"""ADM under the Hugging Face Trainer: one model that holds both networks, and a Trainer that logs ADM's terms.

python examples/huggingface_trainer.py
"""

import tempfile

import torch
from adm import Adapter, ADMLoss, as_network, check_pair, mutual_loss
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments


class Pair(nn.Module):
    """What the Trainer trains, and wraps under several processes: all of the loss is computed inside this forward."""

    def __init__(self, student: nn.Module, teacher: nn.Module, adm: ADMLoss) -> None:
        super().__init__()
        self.student, self.teacher, self.adm = student, teacher, adm

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        map_s, map_t = self.student.forward_features(pixel_values), self.teacher.forward_features(pixel_values)
        logits = {"student": self.student.forward_head(map_s), "teacher": self.teacher.forward_head(map_t)}
        parts = mutual_loss(logits, labels)
        terms = {f"{role}/{name}": loss for role, losses in parts.items() for name, loss in losses.items()}
        terms |= self.adm.terms(map_s, map_t, labels, self.student.forward_head, self.teacher.forward_head)
        return {"logits": logits, "terms": terms}


class ADMTrainer(Trainer):
    """Puts the means of the terms since the last log beside what the Trainer logs."""

    sums: dict[str, Tensor] = {}  # noqa: RUF012

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = sum(outputs["terms"].values())
        if return_outputs:  # evaluation
            return loss, outputs["logits"]
        added = {"steps": torch.ones(()), **outputs["terms"]}
        self.sums = {name: self.sums.get(name, 0) + value.detach() for name, value in added.items()}
        return loss

    def log(self, logs, start_time=None):
        steps = self.sums.pop("steps", 1)
        logs |= {name: (value / steps).item() for name, value in self.sums.items()}
        self.sums = {}
        super().log(logs, start_time)


def network(width: int) -> nn.Module:
    settings = {"embedding_size": width, "hidden_sizes": [width, 2 * width], "depths": [1, 1], "layer_type": "basic"}
    return as_network(ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **settings)))


def accuracies(given: EvalPrediction) -> dict[str, float]:
    right = [float((logits.argmax(1) == given.label_ids).mean()) for logits in given.predictions]
    return {"student": right[0], "teacher": right[1]}


torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images = torch.tensor(pixels).float().view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3) / 16  # 32 x 32
data = [{"pixel_values": image, "labels": int(digit)} for image, digit in zip(images, digits, strict=True)]
student, teacher, adapter = network(8), network(24), Adapter(16, 48)
print(check_pair(student, teacher, images[:8], adapter))

with tempfile.TemporaryDirectory() as folder:
    quiet = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "epoch"}
    fit = {"num_train_epochs": 4, "per_device_train_batch_size": 50, "learning_rate": 5e-3, "use_cpu": True}
    model = Pair(student, teacher, ADMLoss(0.2, 0.6, adapter))
    arguments = TrainingArguments(folder, **quiet, **fit)
    trainer = ADMTrainer(model, arguments, train_dataset=data[:1400], compute_metrics=accuracies)
    trainer.train()
    right = trainer.evaluate(data[1400:])
print(f"accuracy: student {right['eval_student']:.3f} teacher {right['eval_teacher']:.3f}")
