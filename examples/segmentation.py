"""Dense targets with an ignore index: which digit each pixel belongs to, on scenes of four handwritten digits.

python examples/segmentation.py
"""

import torch
from adm import Adapter, ADMLoss, check_pair, feature_loss, mutual_loss
from sklearn.datasets import load_digits
from torch import Tensor, nn

IGNORE, BACKGROUND, CLASSES = 255, 10, 11


class Network(nn.Module):
    """The last map is what the 1x1 classifier reads; there is no pooling. The head resizes its logits to the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body, self.classifier = nn.Sequential(*layers), nn.Conv2d(2 * width, CLASSES, 1)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.body(images)  # [B, 1, 16, 16] -> [B, 2 width, 8, 8]

    def forward_head(self, feature_map: Tensor) -> Tensor:
        return nn.functional.interpolate(self.classifier(feature_map), scale_factor=2.0, mode="bilinear")

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def scenes(images: Tensor, digits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``[N, 1, 16, 16]`` and ``[N, 16, 16]``: a stroke's pixels are of its digit, its faint edges are ignored."""
    choice = torch.randint(len(images), (count, 2, 2))
    image = images[choice].permute(0, 1, 3, 2, 4).reshape(count, 16, 16)
    target = digits[choice].repeat_interleave(8, 1).repeat_interleave(8, 2)
    target = target.masked_fill(image < 0.5, IGNORE).masked_fill(image < 0.1, BACKGROUND)
    return image.unsqueeze(1), target


torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images, classes = torch.tensor(pixels).float().view(-1, 8, 8) / 16, torch.tensor(digits)
images_train, targets_train = scenes(images[:1400], classes[:1400], 640)
images_test, targets_test = scenes(images[1400:], classes[1400:], 200)

student, teacher, adapter = Network(8), Network(24), Adapter(16, 48)
criterion = nn.CrossEntropyLoss(ignore_index=IGNORE)  # the same one for every term
print(check_pair(student, teacher, images_train[:8], adapter))
adm = ADMLoss(0.2, 0.6, adapter, criterion=criterion)
optimizer = torch.optim.Adam([*student.parameters(), *teacher.parameters(), *adm.parameters()], lr=1e-2)
for epoch in range(1, 8):
    sums: dict[str, Tensor] = {}
    for i in torch.randperm(640).split(32):
        x, y = images_train[i], targets_train[i]
        map_s, map_t = student.forward_features(x), teacher.forward_features(x)
        logits = {"student": student.forward_head(map_s), "teacher": teacher.forward_head(map_t)}
        parts = mutual_loss(logits, y, criterion=criterion)
        terms = {f"{role}/{name}": loss for role, losses in parts.items() for name, loss in losses.items()}
        terms |= adm.terms(map_s, map_t, y, student.forward_head, teacher.forward_head)
        terms["feature"] = 0.01 * feature_loss(map_s, map_t, adapter)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.detach() / 20
    print(f"epoch {epoch}:", *(f"{name} {value:.4f}" for name, value in sums.items()), flush=True)

strokes = targets_test < BACKGROUND
with torch.no_grad():
    right = [(n.eval()(images_test).argmax(1) == targets_test)[strokes].float().mean() for n in (student, teacher)]
print(f"accuracy: student {right[0]:.3f} teacher {right[1]:.3f}")
