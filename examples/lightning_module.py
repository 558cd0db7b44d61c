"""ADM in a LightningModule: both networks, the losses, and what is logged of them.

    python examples/lightning_module.py

Under several devices Lightning's DDP wraps the whole module, so that every gradient is averaged once.
"""

import logging
import warnings

import lightning
import torch
from adm import Adapter, ADMLoss, Split, check_pair, mutual_loss
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def network(width: int) -> Split:
    """Any model, cut behind the module whose output is the last map."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
    body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
    return Split.at(nn.Sequential(stem, body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)), "1")


class MutualADM(lightning.LightningModule):
    """Mutual learning of a student and a teacher, with ADM."""

    def __init__(self, student: nn.Module, teacher: nn.Module, adm: ADMLoss) -> None:
        super().__init__()
        self.student, self.teacher, self.adm = student, teacher, adm  # adm too: phi is a part of it, and is trained

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, targets = batch
        map_s, map_t = self.student.forward_features(images), self.teacher.forward_features(images)
        logits = {"student": self.student.forward_head(map_s), "teacher": self.teacher.forward_head(map_t)}
        parts = mutual_loss(logits, targets)
        terms = {f"{role}/{name}": loss for role, losses in parts.items() for name, loss in losses.items()}
        terms |= self.adm.terms(map_s, map_t, targets, self.student.forward_head, self.teacher.forward_head)
        loss = sum(terms.values())
        self.log_dict({"loss": loss, **terms}, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        values = (f"{name} {value:.4f}" for name, value in self.trainer.callback_metrics.items())
        self.print(f"epoch {self.current_epoch + 1}:", *values)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, targets = batch
        for name in ("student", "teacher"):
            self.log(name, (getattr(self, name)(images).argmax(1) == targets).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


lightning.seed_everything(0, verbose=False)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*num_workers.*|.*GPU.*")
pixels, digits = load_digits(return_X_y=True)
images, targets = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(digits)
train = DataLoader(TensorDataset(images[:1400], targets[:1400]), batch_size=50, shuffle=True)
test = DataLoader(TensorDataset(images[1400:], targets[1400:]), batch_size=397)

student, teacher, adapter = network(8), network(24), Adapter(16, 48)
print(check_pair(student, teacher, images[:8], adapter))
module = MutualADM(student, teacher, ADMLoss(0.2, 0.6, adapter))
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", devices=1, **quiet)
trainer.fit(module, train)
(right,) = trainer.test(module, test, verbose=False)
print(f"accuracy: student {right['student']:.3f} teacher {right['teacher']:.3f}")
