"""What mmengine's Runner is given so that a run leaves, stops and resumes like those of the other tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import all_gather_object, all_reduce, get_dist_info
from mmengine.hooks import Hook
from torch import Tensor

from core.errors import InputError, TrainingError
from core.files import make_folder, write_atomically
from core.training.checkpoint import name_and_prune, require_finite
from core.training.command import Stop
from core.training.recorder import Recorder
from core.training.run import RunFolder
from core.training.seed import random_state, restore_random_state, seed_everything
from core.training.step import share_buffers
from segmentation.distiller import bare
from segmentation.experiment import as_text, export_network
from segmentation.figures import SimilarityWatch, comparable, draw

PICTURED = 4  # evaluated images that TensorBoard shows
ADVICE = "lower the learning rate, clip gradients (--cfg-options optim_wrapper.clip_grad.max_norm=1.0) or train in fp32"


class RunHook(Hook):
    """Run folder, checkpoints, stopping and exact resuming.

    What is recorded and how: see ``core.training.recorder.Recorder``; the device is only waited for at log points and
    saves. A checkpoint follows each evaluation, every ``save_every`` iterations, and an interruption.

    Args:
        run: the folder.
        cfg: of the run; its seed is that of what training draws (dropout), with the process's number, and its ``run``
            says what to log, save, keep and select (``configs/_base_/runtime.py``).
        stop: says when to finish the iteration, save and leave.
        loaded: what this hook left in the checkpoint that the Runner resumes, None for a new run.
        summary: what to say in ``summary.json`` besides.
    """

    priority = "VERY_LOW"  # after the scheduler's step: what is saved is the state before the next iteration

    def __init__(
        self, run: RunFolder, cfg: Config, stop: Stop, *, loaded: dict[str, Any] | None, summary: Mapping[str, Any]
    ) -> None:
        self.run, self.cfg, self.stop, self.summary = run, cfg, stop, summary
        self.text = as_text(cfg)  # for the checkpoints
        self.result: dict[str, Any] = {}
        self.rank, self.processes = get_dist_info()
        self._loaded = loaded
        self._saving: dict[str, Any] = {}
        self._before_evaluation: dict[str, Any] = {}
        self._watch: SimilarityWatch | None = None
        self._started, self._rate = False, 0.0

    def before_train(self, runner: Any) -> None:
        device = next(runner.model.parameters()).device
        self.board: Any = None
        if self.run.main and "tensorboard" in self.cfg.run.trackers:
            from torch.utils.tensorboard import SummaryWriter

            purge = runner.iter + 1 if runner.iter else None  # lines of iterations that are now taken again
            self.board = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=purge)

        def track(values: dict[str, float], step: int) -> None:
            runner.visualizer.add_scalars(values, step=step)
            if self.board is not None:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
                self.board.flush()

        self.recorder = Recorder(
            self.run, device, self.processes,
            mean=mean, gather=all_gather_object, advice=ADVICE, total=runner.max_iters, unit="iteration",
            log_every=self.cfg.run.log_every, keep=self.cfg.run.keep, select=self.cfg.run.select, track=track,
        )  # fmt: skip
        self._random = self.recorder.restore(self._loaded, runner.iter, self.rank)
        wrapper = self.cfg.optim_wrapper
        mixed = {"bfloat16": "bf16"}.get(wrapper.get("dtype"), "fp16")
        precision = mixed if wrapper.get("type") == "AmpOptimWrapper" else "fp32"
        sizes = {"training images": len(runner.train_dataloader.dataset)}
        if runner.val_loop is not None:
            sizes["evaluated images"] = len(runner.val_loop.dataloader.dataset)
        self.recorder.start(runner.iter, bare(runner.model).networks, self.summary["networks"], sizes, precision)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if not self._started:  # not earlier: the loaders draw their own seeds when they start
            self._started = True
            if self._random is not None:
                restore_random_state(self._random)
            else:
                seed_everything(self.cfg.seed, "training", self.rank, runner.iter)
        self._rate = runner.optim_wrapper.get_lr()["lr"][0]

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        step, save_every = runner.iter + 1, self.cfg.run.save_every
        terms = {name.replace("/loss_", "/"): value for name, value in outputs.items() if name != "loss"}
        self.recorder.losses.observe(terms)
        stopping = self.recorder.after_step(step, len(data_batch["inputs"]), self._rate, self.stop.requested)
        if stopping:
            runner.train_loop.stop_training = True
        loop, last = runner.train_loop, step == runner.max_iters
        # The loop's own evaluation, which the checkpoint is saved behind, comes after this.
        evaluates = runner.val_loop is not None and step >= loop.val_begin and (last or step % loop.val_interval == 0)
        due = last or (save_every is not None and step % save_every == 0)
        if (due or stopping) and not evaluates:
            self.recorder.clock.pause()
            self._save(runner, step)
            self.recorder.clock.resume()

    def before_val(self, runner: Any) -> None:
        self.recorder.clock.pause()
        self._before_evaluation = random_state()
        share_buffers(bare(runner.model))
        if self.cfg.run.trackers and comparable(bare(runner.model)):
            self._watch = SimilarityWatch(bare(runner.model))

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._watch is not None:
            self._watch.update()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        values = {name: float(value) for name, value in (metrics or {}).items()}
        self._show(runner)
        restore_random_state(self._before_evaluation)  # so that evaluating changes nothing in the training
        if (select := self.cfg.run.select) not in values:
            raise TrainingError(f"run.select = {select!r} is not evaluated: choose one of {', '.join(values)}")
        best = self.recorder.evaluated(runner.iter, {"split": "val", **values})
        self._save(runner, runner.iter, best)
        self.recorder.draw()
        self.recorder.clock.resume()

    def _show(self, runner: Any) -> None:
        """S and its attentions to the trackers, and what both networks see to TensorBoard."""
        from PIL import Image

        if self._watch is not None:
            self._watch.close()
            all_reduce(self._watch.statistics.sums, op="sum")
            seen = self._watch.statistics
            if seen.sums[0] > 0:  # else these heads have another last layer
                values = {f"evaluation/{name}": value for name, value in seen.compute().items()}
                self.recorder.track(values, runner.iter)
            self._watch = None
        if self.board is None:
            return
        file = make_folder(self.run.path / "figures") / f"maps-iter_{runner.iter}.png"
        try:
            draw(bare(runner.model), runner.val_dataloader.dataset, PICTURED, file)
        except InputError as error:  # no picture ends a run
            self.run.log(f"no picture: {error}")
            return
        picture = np.asarray(Image.open(file).convert("RGB"))
        self.board.add_image("evaluation/maps", picture, runner.iter, dataformats="HWC")

    def after_train(self, runner: Any) -> None:
        if self.run.main and runner.iter >= runner.max_iters:
            student = bare(runner.model).networks["student"]
            metainfo = runner.train_dataloader.dataset.metainfo
            export_network(self.cfg, student, "student", metainfo, self.run.path)
        note = "best was chosen by the mIoU of the evaluated images: read last"
        self.result = self.recorder.finish(runner.iter, {"selected_on": "val", "note": note, **self.summary})
        if self.board is not None:
            self.board.close()

    def _save(self, runner: Any, step: int, best: bool = False) -> None:
        self.recorder.losses.check()
        share_buffers(bare(runner.model))
        for owner, part in bare(runner.model).named_children():
            require_finite(owner, part.state_dict(), f"iteration {step}")
        self._saving = self.recorder.state()
        if self.run.main:
            meta, target = {"epoch": 0, "iter": step}, self.run.checkpoints / f"iter_{step}.pth"

            def write(path: Path) -> None:
                runner.save_checkpoint(str(path.parent), path.name, meta=meta, by_epoch=False)

            write_atomically(target, write)
            name_and_prune(target, best=best, keep=self.cfg.run.keep)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self._saving
        checkpoint["meta"]["cfg"] = self.text
        # Histories are objects that weights_only=True refuses, and numpy's scalars are too.
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = type(hub["log_scalars"])()
        hub["runtime_info"] = {k: v.item() if hasattr(v, "item") else v for k, v in hub["runtime_info"].items()}


def mean(values: Tensor) -> Tensor:
    """Over all processes; changes ``values``."""
    all_reduce(values, op="mean")
    return values
