"""Several processes: both networks and the loss in ONE module under DistributedDataParallel.

torchrun --nproc_per_node 2 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from adm import ADMLoss, check_pair, feature_loss, mutual_loss
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Network(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(1, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), nn.MaxPool2d(2)]
        for _ in range(layers):
            parts += [nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU()]
        self.body, self.fc = nn.Sequential(*parts), nn.Linear(24, 10)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.body(images)  # [B, 1, 8, 8] -> [B, 24, 4, 4]

    def forward_head(self, feature_map: Tensor) -> Tensor:
        return self.fc(feature_map.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class Pair(nn.Module):
    """What DDP wraps: every parameter is used inside this forward. What is called through `.module` goes past DDP."""

    def __init__(self, student: nn.Module, teacher: nn.Module, adm: ADMLoss) -> None:
        super().__init__()
        self.student, self.teacher, self.adm = student, teacher, adm

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        map_s, map_t = self.student.forward_features(images), self.teacher.forward_features(images)
        logits = {"student": self.student.forward_head(map_s), "teacher": self.teacher.forward_head(map_t)}
        parts = mutual_loss(logits, targets)
        terms = {f"{role}/{name}": loss for role, losses in parts.items() for name, loss in losses.items()}
        terms |= self.adm.terms(map_s, map_t, targets, self.student.forward_head, self.teacher.forward_head)
        terms["feature"] = 0.1 * feature_loss(map_s, map_t)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def main(epochs: int = 8) -> Pair:
    torch.manual_seed(0)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    pixels, digits = load_digits(return_X_y=True)
    images, targets = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(digits)
    model = pair = Pair(Network(1), Network(2), ADMLoss(0.2, 0.6))
    print(check_pair(pair.student, pair.teacher, images[:8]))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # on GPUs "nccl", and all tensors on the device of LOCAL_RANK
        model = DistributedDataParallel(pair)
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(1400, generator=torch.Generator().manual_seed(epoch))  # the same on every process
        for mine in order[rank::world].split(50 // world):
            terms = model(images[mine], targets[mine])
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch}:", *(f"{name} {value:.4f}" for name, value in terms.items()), flush=True)
    right = [(n(images[1400:]).argmax(1) == targets[1400:]).float().mean() for n in (pair.student, pair.teacher)]
    if rank == 0:
        print(f"accuracy: student {right[0]:.3f} teacher {right[1]:.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return pair


if __name__ == "__main__":
    main()
