"""What a teacher said about each training image one epoch ago (Eq. 12), kept on disk in the run folder.

Epoch e reads what epoch e - 1 wrote, and writes into the other of two generations (by the epoch's parity): a part of an
epoch that runs again after a kill only overwrites its own rows, and never what it reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from core.distillation import full_precision
from core.errors import InputError, TrainingError
from core.files import write_atomically
from core.training.distiller import Batch, Progress
from core.training.fit import FitConfig

if TYPE_CHECKING:
    from classification.data import DataSets, InMemoryLoader, StreamLoader

FOLDER = "predictions"


def delta_of(epoch: int, epochs: float, delta: tuple[float, float]) -> float:
    """Eq. 12's delta in an epoch, counted from 0, of a run of so many: 0 in the first, then linear.

    ``delta``: its values in the second and in the last epoch; a run of two has the first of them in its second.
    """
    last = math.ceil(epochs) - 1
    if epoch == 0:
        return 0.0
    return delta[0] + (delta[1] - delta[0]) * (epoch - 1) / (last - 1) if last > 1 else delta[0]


def data_hash(targets: Tensor, indices: Tensor, classes: int) -> str:
    """Tells one training set from another: its targets and their positions in the stored split, both int64 ``[N]``."""
    values = np.ascontiguousarray(torch.stack([targets, indices]).cpu().numpy(), dtype="<i8")
    return hashlib.sha256(f"{len(targets)} {classes} ".encode() + values.tobytes()).hexdigest()[:16]


class PredictionStore:
    """The probabilities of one teacher for N images and K classes, of this epoch and of the one before.

    Four files: ``<path>.probabilities`` float16 ``[2, N, K]``, ``<path>.epochs`` int32 ``[2, N]`` (which epoch wrote a
    row, plus 1; 0 for none), ``<path>.sums`` uint32 ``[2, N]`` (a row's CRC-32; not there in runs of before) and
    ``<path>.json``, which names N, K and the data set. All but the last are sparse: a row
    takes disk space only once it is written (4 bytes an image and class in all). They are mapped for each reading, so
    that only the rows asked for come into memory. Several processes may write rows of their own at the same time; on
    several machines they need one file system.

    Args: the path without suffix; N; K; the data set (see ``data_hash``).
    """

    def __init__(self, path: Path, samples: int, classes: int, data: str) -> None:
        self.samples, self.classes, self.data = samples, classes, data
        self.header = path.with_name(f"{path.name}.json")
        self.probabilities = path.with_name(f"{path.name}.probabilities")
        self.epochs = path.with_name(f"{path.name}.epochs")
        self.sums = path.with_name(f"{path.name}.sums")

    def create(self) -> None:
        """Makes an empty store, in place of one that may be there. Raises: TrainingError where that cannot be."""
        try:
            self.header.parent.mkdir(parents=True, exist_ok=True)
            self.header.unlink(missing_ok=True)  # whoever finds it finds a whole store
            for file, size in ((self.probabilities, 2 * self.classes), (self.epochs, 4), (self.sums, 4)):
                with open(file, "wb") as opened:
                    opened.truncate(2 * self.samples * size)
        except OSError as error:
            raise TrainingError(f"cannot make {self.header.parent}: {error.strerror}") from error
        text = json.dumps(self._identity(), indent=2) + "\n"
        write_atomically(self.header, lambda path: path.write_text(text))

    def check(self) -> None:
        """Raises: InputError where there is no store, a damaged one, or one of another data set."""
        mend = f"bring back {self.header.parent} as the run left it, or start anew with another --out"
        try:
            found = dict(json.loads(self.header.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"no predictions of the epoch before can be read from {self.header}: {mend}") from error
        for key, value in self._identity().items():
            if found.get(key) != value:
                raise InputError(
                    f"{self.header} is of a training set with {key} {found.get(key)}, this one has {value}: resume "
                    "with the data set that the run began with, or choose another --out"
                )
        try:
            self._map(self.probabilities, np.float16, self.classes), self._map(self.epochs, np.int32)
            if self.sums.exists():
                self._map(self.sums, np.uint32)
        except (OSError, ValueError) as error:  # gone, or shorter than it should be
            raise InputError(f"the files beside {self.header} are missing or cut off: {mend}") from error

    def write(self, epoch: int, rows: np.ndarray, probabilities: np.ndarray) -> None:
        """Stores float16 ``[B, K]`` for the images ``[B]`` of this process. Raises: TrainingError for a full disk."""
        if probabilities.shape != (len(rows), self.classes) or probabilities.dtype != np.float16:
            raise ValueError(f"{len(rows)} rows of {self.classes} float16 classes, got {probabilities.shape}")
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.samples:
            raise ValueError(f"rows {rows.min()} .. {rows.max()} of a store of {self.samples} samples")
        # Rows are tagged before they change: what a kill in between leaves is no longer taken for an older epoch's.
        _write_rows(self.epochs, epoch % 2 * self.samples + rows, np.full((len(rows), 1), epoch + 1, np.int32))
        _write_rows(self.probabilities, epoch % 2 * self.samples + rows, probabilities)
        if self.sums.exists():
            _write_rows(self.sums, epoch % 2 * self.samples + rows, _sums(probabilities)[:, None])

    def read(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float16 ``[B, K]``, bool ``[B]``): what that epoch (-1: none) wrote of these images, or 0; if it did.

        Raises: InputError where it is not what was written.
        """
        written = self._written(epoch, rows)
        probabilities = np.array(self._map(self.probabilities, np.float16, self.classes)[epoch % 2, rows])
        sums = self._map(self.sums, np.uint32)[epoch % 2, rows] if self.sums.exists() else _sums(probabilities)
        if (written & (sums != _sums(probabilities))).any():
            raise InputError(
                f"{self.probabilities} (or .sums beside it) is damaged: bring it back, or start anew with another --out"
            )
        probabilities[~written] = 0
        return probabilities, written

    def count(self, epoch: int) -> int:
        """How many images have a row of that epoch."""
        return int(self._written(epoch, slice(None)).sum())

    def sync(self) -> None:
        """Returns once all that was written is on the disk itself."""
        for file in (f for f in (self.epochs, self.probabilities, self.sums) if f.exists()):
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())

    def _identity(self) -> dict[str, Any]:
        return {"samples": self.samples, "classes": self.classes, "targets_hash": self.data}

    def _written(self, epoch: int, rows: Any) -> np.ndarray:
        return (self._map(self.epochs, np.int32)[epoch % 2, rows] == epoch + 1) & (epoch >= 0)

    def _map(self, file: Path, dtype: Any, *row: int) -> np.ndarray:
        return np.memmap(file, dtype, "r", shape=(2, self.samples, *row))


def _sums(rows: np.ndarray) -> np.ndarray:
    """The CRC-32 of each row."""
    return np.array([zlib.crc32(row.tobytes()) for row in rows], np.uint32)


def _write_rows(file: Path, rows: np.ndarray, values: np.ndarray) -> None:
    # Not through a map: there a full disk ends the process by a signal, without a word.
    values = np.ascontiguousarray(values)
    try:
        with open(file, "r+b", buffering=0) as opened:
            for row, value in zip(rows.tolist(), values, strict=True):
                if os.pwrite(opened.fileno(), value, row * value.nbytes) != value.nbytes:
                    raise TrainingError(f"cannot write {file}: the disk is full")
    except OSError as error:
        raise TrainingError(f"cannot write {file}: {error.strerror}") from error


class PreviousPredictions(nn.Module):
    """Eq. 12's memory: adds to each batch what its teachers said one epoch ago, and stores what they say now.

    Without parameters. Where nothing is attached (dry run, evaluation) it does nothing: delta is then 0. On a GPU no
    step waits for it: the rows' numbers come from the loader, and what is to be stored is copied while the next step
    is being computed. It waits for the GPU at the end of an epoch and before a checkpoint alone.

    Its extra state in a checkpoint names the stores and what the next step needs of them: resuming with stores that
    lack it raises InputError.

    Args: the teachers' roles; ``adm.delta``.
    """

    def __init__(self, teachers: Sequence[str], delta: tuple[float, float]) -> None:
        super().__init__()
        self.teachers, self.delta = list(teachers), delta
        self.stores: dict[str, PredictionStore] = {}
        self.made = False  # whether the stores are there: created at step 0, or found by a resumed run
        self._rows = np.empty(0, np.int64)  # of this process's batch
        self._shares: tuple[int, list[Tensor]] = (-1, [])
        self._pending: tuple[int, np.ndarray, dict[str, Tensor], Any] | None = None
        self._next = (0, 0)  # epoch, and its steps done

    def attach(
        self,
        run: Path,
        datasets: DataSets,
        loader: InMemoryLoader | StreamLoader,
        config: FitConfig,
        accelerator: Any,
    ) -> None:
        """Names the run folder and the training data; nothing is written before the first step.

        Raises: InputError where the run's checkpoints would not allow an exact resume.
        """
        check_saves(config, len(loader))
        split, classes = datasets.train, datasets.num_classes
        data = data_hash(split.targets, split.indices, classes)
        self.loader, self.accelerator = loader, accelerator
        self.stores = {role: PredictionStore(run / FOLDER / role, len(split), classes, data) for role in self.teachers}

    def before_step(self, batch: Batch, progress: Progress) -> Batch:
        """The batch with ``previous/<teacher>`` ``[B, K]`` and ``delta/<teacher>`` ``[B]`` (0: nothing known), float32.

        Raises: InputError for batches without ``index``.
        """
        if not self.stores:
            return batch
        if "index" not in batch:
            raise InputError("adm.divergence kd needs the number of each image, and these batches have no index")
        if not self.made:
            self._make(progress)
        epoch = int(progress.epoch)
        self._rows = self._rows_of(batch["index"], epoch, progress.step - epoch * len(self.loader))
        delta = delta_of(epoch, progress.epochs, self.delta)
        added: dict[str, Tensor] = {}
        for role, store in self.stores.items():
            previous, known = store.read(epoch - 1, self._rows)
            added[f"previous/{role}"] = _to(previous, batch["index"].device).float()
            added[f"delta/{role}"] = _to(delta * known.astype(np.float32), batch["index"].device)
        return {**batch, **added}

    def after_step(self, logits: Mapping[str, Tensor], progress: Progress) -> None:
        """Stores the softmax of the whole step's logits ``[B, K]``, by role."""
        if not self.stores:
            return
        self._write()  # the step before's, which has arrived meanwhile
        probabilities = {role: full_precision(logits[role]).softmax(dim=1).half() for role in self.stores}
        on_cpu = {role: values.to("cpu", non_blocking=True) for role, values in probabilities.items()}
        copied = None
        if next(iter(probabilities.values())).is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending = (int(progress.epoch), self._rows, on_cpu, copied)
        self._next = divmod(progress.step + 1, len(self.loader))
        if copied is None or self._next[1] == 0:
            self._write()
        if self._next[1] == 0:  # the next epoch reads what all processes wrote
            self.accelerator.wait_for_everyone()

    def _write(self) -> None:
        if self._pending is None:
            return
        epoch, rows, probabilities, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        for role, values in probabilities.items():
            self.stores[role].write(epoch, rows, values.numpy())

    def _make(self, progress: Progress) -> None:
        if progress.step > 0:  # a checkpoint without extra state
            raise InputError("the checkpoint says nothing of the teacher's predictions: start anew with another --out")
        for store in self.stores.values():
            if self.accelerator.is_main_process:
                store.create()
            self.accelerator.wait_for_everyone()
            store.check()
        self.made = True

    def _rows_of(self, index: Tensor, epoch: int, step: int) -> np.ndarray:
        if index.device.type == "cpu":
            return index.numpy()
        if self._shares[0] != epoch:  # reading the batch's own would wait for the GPU
            self._shares = epoch, self.loader.indices(epoch)
        return self._shares[1][step].numpy()

    def get_extra_state(self) -> dict[str, Any]:
        if not self.made:
            return {}
        self._write()
        epoch, steps = self._next
        state = {}
        for role, store in self.stores.items():
            store.sync()
            state[role] = {
                "path": f"{FOLDER}/{role}",
                "shape": [2, store.samples, store.classes],
                "data": store.data,
                "epoch": epoch,  # the next step's; and how many rows it finds of the epoch before and of its own
                "previous": store.count(epoch - 1),
                "current": steps * self.loader.batch_size,
            }
        return state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Raises: InputError where the attached stores do not hold what a resume from this checkpoint needs."""
        for role, store in self.stores.items():
            store.check()
            if problem := next(_problems(store, state.get(role, {})), None):
                raise InputError(
                    f"{store.header.parent} does not fit the checkpoint ({role}: {problem}): bring it back as it was "
                    "then, or start anew with another --out"
                )
            self._next = state[role]["epoch"], state[role]["current"] // self.loader.batch_size
        self.made = bool(self.stores)


def _problems(store: PredictionStore, said: Mapping[str, Any]) -> Iterator[str]:
    if not said:
        yield "the checkpoint says nothing of it"
    elif said["shape"] != [2, store.samples, store.classes] or said["data"] != store.data:
        yield f"it was made for {said['shape'][1]} samples of {said['shape'][2]} classes, data {said['data']}"
    else:
        epoch = said["epoch"]
        if (rows := store.count(epoch - 1)) != said["previous"]:
            yield f"{rows} predictions of epoch {epoch - 1} instead of {said['previous']}, later epochs overwrite them"
        if (rows := store.count(epoch)) < said["current"]:
            yield f"{rows} predictions of epoch {epoch} instead of {said['current']}"


def check_saves(config: FitConfig, steps_per_epoch: int) -> None:
    """Raises: InputError where a run has no checkpoint at the end of each epoch.

    From an older checkpoint, the predictions of the epoch before would have been overwritten.
    """
    every = config.evaluate_every
    if every is not None and steps_per_epoch % every:
        raise InputError(
            f"adm.divergence kd needs a checkpoint at the end of each epoch, and fit.evaluate_every {every} does not "
            f"divide the {steps_per_epoch} steps of one: leave it out, or give a divisor"
        )


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
