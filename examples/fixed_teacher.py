"""Offline: a teacher that is trained already and stays as it is; distillation (Eq. 2) and ADM's consensus.

    python examples/fixed_teacher.py

beta is 0: the divergence term would train the teacher.
"""

from collections import OrderedDict

import torch
from adm import Adapter, ADMLoss, Split, check_pair, kd_loss
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


def network(width: int) -> Split:
    """Any model, cut behind the module whose output is the last map."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
    body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
    parts = OrderedDict(
        stem=stem, body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(2 * width, 10)
    )
    return Split.at(nn.Sequential(parts), "body")


torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images, targets = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(digits)
train, test = slice(1400), slice(1400, None)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return (model.eval()(images[test]).argmax(1) == targets[test]).float().mean().item()


# Your own teacher: load its weights instead.
teacher = network(24)
optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
for _ in range(5):
    for i in torch.randperm(1400).split(50):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images[i]), targets[i]).backward()
        optimizer.step()
teacher.eval().requires_grad_(False)

student, adapter = network(8), Adapter(16, 48)
print(check_pair(student, teacher, images[:8], adapter))
adm = ADMLoss(alpha=1.0, beta=0.0, adapter=adapter)
optimizer = torch.optim.SGD([*student.parameters(), *adm.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4)
for epoch in range(1, 6):
    student.train()
    sums: dict[str, torch.Tensor] = {}
    for i in torch.randperm(1400).split(50):
        with torch.no_grad():
            map_t = teacher.forward_features(images[i])
            logits_t = teacher.forward_head(map_t)
        map_s = student.forward_features(images[i])
        logits_s = student.forward_head(map_s)
        terms = {"ce": F.cross_entropy(logits_s, targets[i]), "kd": kd_loss(logits_s, logits_t, tau=4.0)}
        terms |= adm.terms(map_s, map_t, targets[i], student.forward_head, teacher.forward_head)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.detach() / 28
    print(f"epoch {epoch}:", *(f"{name} {value:.4f}" for name, value in sums.items()), flush=True)
print(f"accuracy: student {accuracy(student):.3f} teacher {accuracy(teacher):.3f}")
