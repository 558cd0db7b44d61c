"""A student and a teacher train each other on handwritten digits: mutual learning, ADM and a feature loss.

python examples/plain.py --alpha 0.2 --beta 0.6 --gamma 1
"""

import argparse

import torch
from adm import Adapter, ADMLoss, AttentionStatistics, check_pair, feature_loss, mutual_loss, spatial_similarity
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Network(nn.Module):
    """Two halves that make one network: up to the last map, and from there to the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.features = nn.Sequential(stem, body)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images)  # [B, 1, 8, 8] -> [B, 2 width, 4, 4]

    def forward_head(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.head(feature_map)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


parser = argparse.ArgumentParser()
for name, default in {"alpha": 0.2, "beta": 0.6, "gamma": 1.0, "width": 8, "epochs": 8, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
parser.add_argument("--control", default="none", help="or uniform, shuffled")
options = parser.parse_args()
torch.manual_seed(options.seed)

# Your own data: anything that gives batches of images [B, C, H, W] and class indices [B].
pixels, digits = load_digits(return_X_y=True)
images, targets = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(digits)
loader = DataLoader(TensorDataset(images[:1400], targets[:1400]), batch_size=50, shuffle=True)

# Your own networks: with `forward_features` and `forward_head`, or made so by `as_network`, `Split.at` or `Split`.
student, teacher = Network(options.width), Network(24)
adapter = Adapter(2 * options.width, 48)  # the channels of their last maps; nothing to train where they are equal
print(check_pair(student, teacher, images[:8], adapter))
adm = ADMLoss(options.alpha, options.beta, adapter, control=options.control)
parameters = [*student.parameters(), *teacher.parameters(), *adm.parameters()]
optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)

for epoch in range(1, options.epochs + 1):
    sums: dict[str, torch.Tensor] = {}
    statistics = AttentionStatistics()
    for x, y in loader:
        map_s, map_t = student.forward_features(x), teacher.forward_features(x)
        logits = {"student": student.forward_head(map_s), "teacher": teacher.forward_head(map_t)}
        parts = mutual_loss(logits, y)
        terms = {f"{role}/{name}": loss for role, losses in parts.items() for name, loss in losses.items()}
        terms |= adm.terms(map_s, map_t, y, student.forward_head, teacher.forward_head)
        terms["feature"] = options.gamma * feature_loss(map_s, map_t, adapter)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.detach() / len(loader)
        statistics.update(spatial_similarity(adm.project(map_s, map_t), map_t))
    means = {name: value.item() for name, value in sums.items()} | statistics.compute()
    print(f"epoch {epoch}:", *(f"{name} {value:.4f}" for name, value in means.items()), flush=True)

student.eval(), teacher.eval()
with torch.no_grad():
    right = [(network(images[1400:]).argmax(1) == targets[1400:]).float().mean() for network in (student, teacher)]
print(f"accuracy: student {right[0]:.3f} teacher {right[1]:.3f}")
