"""The one place that drives Lightning: device, precision, seed, early stopping, interruption and resuming.

Models hand over a :class:`~lightning.pytorch.LightningModule` and a sequence of items; one item is what one
optimiser step sees, such as the tensors of a section. ``training_step`` returns the loss or a mapping with
``"loss"`` and further scalars; ``validation_step`` returns a mapping of scalars. Nothing needs ``self.log``.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._device import resolve_device
from .._logging import logger
from .._optional import optional_import
from ..errors import DataValueError, HespotexWarning, ModelMismatchError
from ._base import Run
from ._distributed import ALONE, Group, group_of
from ._order import UNWEIGHTED, Order, weighted_steps
from ._state import read_state, state_key, write_state

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import LightningModule

__all__ = ["Fit", "fit_lightning", "forget_checkpoints"]

# An interrupted fit loses at most this many times what writing its state takes, and writing costs 5 % at most.
_SAVE_EVERY = 20


@dataclass(frozen=True)
class Fit:
    """What a finished fit leaves behind besides the weights in the module.

    Attributes
    ----------
    history
        One row per epoch: ``"epoch"`` (from 1), the means over the items of what ``training_step`` returned, and of
        what ``validation_step`` returned with the prefix ``"val_"``.
    best_epoch
        Epoch whose weights the module now holds; the last one if nothing was monitored.
    best_score
        Monitored value at that epoch; NaN if nothing was monitored.
    checkpoint
        File that the fit would resume from; :func:`forget_checkpoints` removes it.
    group
        Processes that fitted together.
    """

    history: list[dict[str, float]]
    best_epoch: int
    best_score: float
    checkpoint: Path | None = None
    group: Group = ALONE


def fit_lightning(
    module: LightningModule,
    items: Sequence[Any],
    run: Run,
    *,
    max_epochs: int,
    validation: Sequence[Any] = (),
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    patience: int | None = None,
    validate_every: int = 1,
    gradient_clip: float | None = None,
    shuffle: bool = True,
    visit: Callable[[int], Sequence[int]] | None = None,
    name: str = "fit",
) -> Fit:
    """Fit `module` on `items`; afterwards it is on the CPU, in evaluation mode, and holds the best weights.

    Parameters
    ----------
    module
        Module to fit, in place, with its initial weights: a caller that wants them seeded makes it inside
        :func:`torch.random.fork_rng`.
    items
        What one optimiser step each sees: tensors, or tuples, mappings or dataclasses of tensors. A lazy sequence
        is asked for one item at a time.
    run
        Seed, device, precision, progress and checkpoint folder.
    max_epochs
        Passes over `items`.
    validation
        Items of ``validation_step``; never the section to be predicted.
    monitor
        Column of the history to judge epochs by, such as ``"val_loss"``; ``None`` keeps the last epoch.
    mode
        Whether a low or a high value of `monitor` is good.
    patience
        Epochs without a better value after which training stops; ``None`` runs all epochs.
    validate_every
        Epochs between two validations.
    gradient_clip
        Largest norm of the gradient.
    shuffle
        Whether each epoch visits the items in a new order.
    visit
        Indices of the items that an epoch (from 0) visits, in order and always as many; in place of all of them.
    name
        Shown beside the progress bar and in messages.

    Notes
    -----
    Random numbers depend on ``run.seed`` and the epoch alone, and the global state is left as it was, so that equal
    input gives equal weights and a resumed fit ends where an uninterrupted one would have ended. With
    ``run.checkpoint_dir`` the state is written at the ends of epochs, to a file named after a hash of initial
    weights, data, network, optimiser and arguments: whatever changes, changes the name, and a stale state is never
    taken up.
    :func:`forget_checkpoints` removes them once the whole model is fitted.

    Where several processes take part, item i of an epoch goes to process i modulo their number, and a step follows the
    mean gradient of as many consecutive items as there are processes, times ``run.accumulate_grad_batches``; of the items
    that are left, at the end of an epoch. Random numbers then depend on the item, so that it does not matter which
    process sees it: two processes do what one does that accumulates two items, up to rounding. All of them validate on
    everything, go by what the first finds, and end with the same weights.

    Raises
    ------
    DataValueError
        If there are no items, `monitor` is not in the history, the loss is not finite, or a network that looks at
        batches as a whole (batch normalisation) is to be fitted by several processes.
    ModelMismatchError
        If the processes that take part have different data or saved states.
    KeyboardInterrupt
        If interrupted; the message says whether and from where the fit can go on.
    """
    if len(items) == 0:
        raise DataValueError("items is empty: there is nothing to fit on")
    if max_epochs < 1:
        raise DataValueError(f"max_epochs={max_epochs} must be at least 1")
    lightning = optional_import("lightning.pytorch", feature="training neural models")
    import torch

    device = resolve_device(run.device)
    precision = run.precision or ("16-mixed" if device.type == "cuda" else "32-true")
    group = group_of(run)
    path = None
    if run.checkpoint_dir is not None:
        loop = (max_epochs, monitor, mode, patience, validate_every, gradient_clip, shuffle)
        settings = (*loop, run.seed, device.type, precision, group.size, run.accumulate_grad_batches)
        mark = state_key(module, items, validation, settings)
        path = Path(run.checkpoint_dir) / f"{name}-{mark[:20]}.ckpt"
    order = Order(items, run.seed, shuffle=shuffle, visit=visit, group=group, accumulate=run.accumulate_grad_batches)
    watcher = _watcher(order, path, monitor=monitor, mode=mode, patience=patience, max_epochs=max_epochs, name=name)
    saved = None if path is None else read_state(path)
    if group.size > 1:
        _check_group(group, module, order, len(validation), path, saved, name)
    if saved is not None:
        state = saved["callbacks"][watcher.state_key]
        if state["finished"]:
            watcher.load_state_dict(state)
            module.load_state_dict(saved["state_dict"])
            return watcher.finish(module)
        logger.info("%s resumes after epoch %d from %s", name, len(state["history"]), path)
    with (
        _quiet(),
        _restored_flags(),
        _forked(device),
        _progress(watcher, run, max_epochs, name),
        weighted_steps(module, order),
    ):
        trainer = lightning.Trainer(
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            precision=precision,
            max_epochs=max_epochs,
            accumulate_grad_batches=run.accumulate_grad_batches,
            callbacks=[watcher],
            check_val_every_n_epoch=validate_every,
            gradient_clip_val=gradient_clip,
            deterministic="warn",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **_strategy(device, run, group),
        )
        # Lightning answers Ctrl-C by ignoring further ones for good and leaving the interpreter.
        with _own_interrupt(trainer, path, name):
            trainer.fit(
                module,
                train_dataloaders=order,
                val_dataloaders=Order(validation, run.seed, shuffle=False) if len(validation) else None,
                ckpt_path=None if saved is None else str(path),
                weights_only=True,
            )
    module.to(torch.device("cpu"))
    return watcher.finish(module)


def forget_checkpoints(*fits: Fit) -> None:
    """Remove what `fits` would resume from; where several processes fitted, the first does once all have finished."""
    for fit in fits:
        if fit.checkpoint is not None:
            fit.group.gather(None)
            if fit.group.rank == 0:
                fit.checkpoint.unlink(missing_ok=True)


def _strategy(device: torch.device, run: Run, group: Group) -> dict[str, Any]:
    """The trainer's arguments that say which processes and devices take part."""
    from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    if group.size == 1:
        return {
            "devices": [device.index or 0] if device.type == "cuda" else 1,
            "plugins": [LightningEnvironment()],  # a SLURM job must not be taken for a distributed run
        }
    return {
        "devices": list(range(int(run.devices))) if device.type == "cuda" else int(run.devices),
        "num_nodes": run.num_nodes,
        "plugins": [TorchElasticEnvironment()],
        # Modules keep weights that a fit leaves alone, and whole data sets as buffers.
        "strategy": DDPStrategy(find_unused_parameters=True, broadcast_buffers=False),
    }


def _check_group(
    group: Group,
    module: Any,
    order: Order,
    n_validation: int,
    path: Path | None,
    saved: Mapping[str, Any] | None,
    name: str,
) -> None:
    """Raise unless all processes set out from the same; before they wait for each other in vain."""
    from torch.nn.modules.batchnorm import _BatchNorm

    if any(isinstance(each, _BatchNorm) for each in module.modules()):
        raise DataValueError(f"{name!r} normalises by batch, which several processes would do each by its own batches")
    epochs = None if saved is None else len(saved["callbacks"]["hespotex"]["history"])
    shapes = [tuple(value.shape) for value in module.state_dict().values()]
    found = group.gather(
        {
            "batches": (len(order.items), order.n_visited, n_validation),
            "shapes of the weights": shapes,
            "seed": order.seed,
            "data or settings": None if path is None else path.name,
            "epochs kept in checkpoint_dir": epochs,
        }
    )
    if differing := [key for key in found[0] if any(each[key] != found[0][key] for each in found)]:
        raise ModelMismatchError(
            f"the processes that fit {name!r} together differ in {', '.join(differing)}; give all of them the same "
            "sections and arguments, and a checkpoint_dir that they share"
        )
    if order.n_visited < group.size and group.rank == 0:
        warnings.warn(
            f"an epoch of {name!r} has {order.n_visited} batches, so that only as many of {group.size} processes have "
            "something to do",
            HespotexWarning,
            stacklevel=3,
        )


def _watcher(
    order: Order,
    path: Path | None,
    *,
    monitor: str | None,
    mode: str,
    patience: int | None,
    max_epochs: int,
    name: str,
) -> Any:
    """The callback that seeds, records, keeps the best weights, stops and saves."""
    import torch
    from lightning.pytorch import Callback

    sign = {"min": 1.0, "max": -1.0}[mode]

    class Watcher(Callback):
        state_key = "hespotex"

        def __init__(self) -> None:
            self.history: list[dict[str, float]] = []
            self.best_epoch, self.best_score = 0, float("nan")
            self.best_weights: dict[str, torch.Tensor] | None = None
            self.finished = False
            self.bar: Any = None
            self.sums: dict[str, torch.Tensor] = {}
            self.counts: dict[str, int] = {}
            self.saved_at, self.save_took = float("-inf"), 0.0

        def state_dict(self) -> dict[str, Any]:
            return {
                "history": self.history,
                "best_epoch": self.best_epoch,
                "best_score": self.best_score,
                "best_weights": self.best_weights,
                "finished": self.finished,
            }

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            for key, value in state.items():
                setattr(self, key, value)
            order.epoch = len(self.history)

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            if self.bar is not None:
                self.bar.update(len(self.history) - self.bar.n)

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            torch.manual_seed(_mix(order.seed, trainer.current_epoch))
            self.sums, self.counts = {}, {}

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if order.per_step > 1:
                torch.manual_seed(_mix(order.seed, trainer.current_epoch, order.place(batch_idx)))

        def _add(self, values: Any, prefix: str) -> None:
            if not isinstance(values, Mapping):
                values = {"loss": values}
            for key, value in values.items():
                value = torch.as_tensor(value).detach().float()
                self.sums[prefix + key] = self.sums.get(prefix + key, 0.0) + value
                self.counts[prefix + key] = self.counts.get(prefix + key, 0) + 1

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if UNWEIGHTED in outputs:
                outputs = {**outputs, "loss": outputs[UNWEIGHTED]}
                del outputs[UNWEIGHTED]
            if order.counts(batch_idx):
                self._add(outputs, "")

        def on_validation_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            self._add(outputs, "val_")

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            epoch = len(self.history) + 1
            due = path is not None and time.monotonic() - self.saved_at > _SAVE_EVERY * self.save_took
            sums = {key: float(total) for key, total in self.sums.items()}
            found = order.group.gather((sums, self.counts, due))
            row, due = _means([each[0] for each in found], [each[1] for each in found]), found[0][2]
            if not np.isfinite(row["loss"]):
                raise DataValueError(
                    f"the loss of {name!r} became {row['loss']} in epoch {epoch}; lower the learning rate, or set "
                    "precision='32-true'"
                )
            self.history.append({"epoch": epoch, **row})
            if monitor is None:
                self.best_epoch = epoch
            elif monitor in row:
                value = row[monitor]
                if np.isfinite(value) and (self.best_weights is None or sign * value < sign * self.best_score):
                    self.best_epoch, self.best_score = epoch, value
                    self.best_weights = {
                        key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()
                    }
                elif patience is not None and epoch - self.best_epoch >= patience:
                    trainer.should_stop = True
            elif epoch >= max_epochs:
                raise DataValueError(f"monitor={monitor!r} is not in the history, which has {', '.join(row)}")
            self.finished = trainer.should_stop or epoch >= max_epochs
            order.epoch = epoch
            if self.bar is not None:
                self.bar.set_postfix({key: f"{value:.4g}" for key, value in row.items()}, refresh=False)
                self.bar.update(1)
            if path is not None and (self.finished or due):
                start = time.monotonic()
                write_state(trainer, path)
                self.saved_at = time.monotonic()
                self.save_took = self.saved_at - start

        def finish(self, module: Any) -> Fit:
            if self.best_weights is not None:
                module.load_state_dict(self.best_weights)
            module.eval()
            return Fit(self.history, self.best_epoch, self.best_score, path, order.group)

    return Watcher()


def _means(sums: Sequence[Mapping[str, float]], counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Means over the batches that several processes have seen; all of them validate on the same, so that one counts."""
    row = {}
    for key in sums[0]:
        processes = range(1) if key.startswith("val_") else range(len(sums))
        total = sum(sums[i].get(key, 0.0) for i in processes)
        row[key] = total / sum(counts[i].get(key, 0) for i in processes)
    return row


def _mix(*numbers: int) -> int:
    """A seed for torch that differs for all (seed, epoch) and (seed, epoch, place in the epoch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _own_interrupt(trainer: Any, path: Path | None, name: str) -> Iterator[None]:
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if path is None:
            advice = "nothing was kept; give checkpoint_dir= to be able to go on"
        elif path.is_file():
            advice = f"its last epochs are kept in {path.parent}: the same call goes on from there"
        else:
            advice = "not one epoch was finished"
        raise KeyboardInterrupt(f"{name} was interrupted in epoch {trainer.current_epoch + 1}; {advice}") from None
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notes about hardware and loaders out of the user's terminal."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.(pytorch|fabric)")
            warnings.filterwarnings("ignore", message=r".*does not have a deterministic implementation.*")
            warnings.filterwarnings("ignore", message=r".*find_unused_parameters=True was specified.*")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


@contextmanager
def _restored_flags() -> Iterator[None]:
    """Put back the process-wide torch flags that ``Trainer(deterministic=...)`` sets."""
    import torch

    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False  # a help in debugging, which costs a tenth of the time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        deterministic.fill_uninitialized_memory = fills
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@contextmanager
def _forked(device: torch.device) -> Iterator[None]:
    import torch

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if device.type == "mps":
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type="mps"))
        yield


@contextmanager
def _progress(watcher: Any, run: Run, max_epochs: int, name: str) -> Iterator[None]:
    if not run.progress_bar or max_epochs < 2:
        yield
        return
    from tqdm.auto import tqdm

    with tqdm(total=max_epochs, desc=name, unit="epoch") as bar:
        watcher.bar = bar
        try:
            yield
        finally:
            watcher.bar = None
