"""One fit: random patches, stochastic variational inference, and tests of the metagenes in between."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..._device import resolve_device
from ..._logging import logger
from ..._optional import optional_import
from .._base import Run
from .._training import Fit, fit_lightning
from .metagenes import Change, drop_and_split, extra, spare
from .slides import draw_patches

if TYPE_CHECKING:
    from .config import XFuseConfig
    from .objective import Generative
    from .slides import Slide

__all__ = ["fit_generative", "parameter_groups", "scores_without_each"]

_FINAL_SAMPLES = 10
_SPARES = 4  # of the alternative, at the start


def parameter_groups(model: Generative, lr: float) -> list[dict[str, Any]]:
    """Networks and prior widths at `lr`, the guide of metagenes and effects at twice, the baselines at five times."""
    times: dict[float, list[Any]] = {1.0: [], 2.0: [], 5.0: []}
    for name, parameter in model.named_parameters():
        if name in ("baselines.rho", "baselines.logits"):
            factor = 5.0
        elif name.startswith(
            ("metagenes.mean", "metagenes.log_sd", "baselines.effect_mean", "baselines.effect_log_sd")
        ):
            factor = 2.0
        else:
            factor = 1.0
        times[factor].append(parameter)
    return [{"params": parameters, "lr": factor * lr} for factor, parameters in times.items()]


def batches(slides: Sequence[Slide], config: XFuseConfig, seed: int) -> list[tuple[int, ...]]:
    """Slides of the patches of each step of an epoch."""
    each = np.repeat(np.arange(len(slides)), [slide.n_patches(config.patch) for slide in slides])
    each = np.random.default_rng([seed, 1]).permutation(each)
    return [tuple(each[start : start + config.batch].tolist()) for start in range(0, len(each), config.batch)]


def scores_without_each(
    model: Generative,
    slides: Sequence[Slide],
    config: XFuseConfig,
    steps: Sequence[Sequence[int]],
    samples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The bound with all metagenes, then without each, averaged over the patches of an epoch and over draws, (1 + K,)."""
    device = next(model.parameters()).device
    sizes = patches_per_level(slides, config)
    modes = [(module, module.training) for module in model.modules()]  # batch statistics may be frozen
    model.eval()
    total: np.ndarray | float = 0.0
    with torch.no_grad():
        for chosen in steps:
            patches = [patch.to(device) for patch in draw_patches(slides, chosen, config, rng)]
            for _ in range(samples):
                total = total + model.bound_without_each(patches, model.noise(patches), sizes).numpy()
    for module, mode in modes:
        module.training = mode
    return np.asarray(total) / (len(steps) * samples)


def useful_of(slots: Sequence[int], scores: np.ndarray) -> list[int]:
    """Slots whose removal lowers the bound; a single one is useful whatever it does."""
    if len(slots) == 1:
        return list(slots)
    return [slot for slot, without in zip(slots, scores[1:], strict=True) if without < scores[0]]


def patches_per_level(slides: Sequence[Slide], config: XFuseConfig) -> list[int]:
    """Patches of an epoch that show each level, those of slides without a level of their own included."""
    return np.bincount(
        [slide.level for slide in slides], weights=[slide.n_patches(config.patch) for slide in slides]
    ).tolist()


def tested(
    model: Generative,
    slides: Sequence[Slide],
    config: XFuseConfig,
    steps: Sequence[Sequence[int]],
    epoch: int,
    rng: np.random.Generator,
) -> Change:
    """What a test of the metagenes between two epochs leads to."""
    metagenes = model.metagenes
    active = metagenes.slots
    useful = useful_of(active, scores_without_each(model, slides, config, steps, config.purge_samples, rng))
    if config.expansion == "extra":
        return extra(active, useful, config.max_metagenes, spare(epoch, _SPARES))
    return drop_and_split(
        metagenes.forest, active, useful, config.max_metagenes, shuffle=lambda: bool(rng.random() < 0.5)
    )


def clean_up(model: Generative, slides: Sequence[Slide], config: XFuseConfig, seed: int) -> None:
    """After training: drop useless metagenes one after another, or do what the published clean-up does."""
    rng = np.random.default_rng([seed, 2])
    steps = batches(slides, config, seed)
    metagenes = model.metagenes
    if config.final_purge == "extra":
        slots = metagenes.slots
        useful = useful_of(slots, scores_without_each(model, slides, config, steps, _FINAL_SAMPLES, rng))
        metagenes.apply_change(extra(slots, useful, config.max_metagenes, spare(config.epochs, 0)))
    while config.final_purge == "drop" and len(slots := metagenes.slots) > 1:
        scores = scores_without_each(model, slides, config, steps, config.purge_samples, rng)
        if len(useful_of(slots, scores)) == len(slots):
            break
        # Two copies of one metagene are each useless while the other is there: one goes, and all are tested again.
        metagenes.apply_change(Change(dropped=[slots[int(np.argmax(scores[1:]))]]))
    logger.info("xfuse: %d metagenes after training", len(metagenes.slots))


def fit_generative(model: Generative, slides: Sequence[Slide], config: XFuseConfig, run: Run) -> Fit:
    """Train `model` in place; afterwards it is on the CPU and in evaluation mode."""
    steps = batches(slides, config, run.seed)
    items = steps * -(-config.steps_per_epoch // len(steps))
    fit = fit_lightning(
        _step(model, slides, config, steps, run.seed), items, run, max_epochs=config.epochs, name="xfuse"
    )
    device = resolve_device(run.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(run.seed)
        clean_up(model.to(device), slides, config, run.seed)
    model.cpu()
    return fit


def _mark(slides: Sequence[Slide]) -> str:
    digest = hashlib.sha256()
    for slide in slides:
        for array in (slide.raster.image, slide.cells, slide.labels.data, slide.labels.indices, slide.counts):
            digest.update(np.ascontiguousarray(array).data)
        digest.update(f"{slide.level}{slide.measured.tolist()}".encode())
    return digest.hexdigest()


def _falling(progress: float) -> float:
    """From 1 to a fiftieth along half a cosine."""
    return 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2


def _step(
    model: Generative, slides: Sequence[Slide], config: XFuseConfig, steps: Sequence[tuple[int, ...]], seed: int
) -> Any:
    lightning = optional_import("lightning.pytorch", feature="training xfuse")
    sizes = patches_per_level(slides, config)

    class Step(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.mark = _mark(slides)  # by which an interrupted fit knows its data
            self.settings = repr(config)

        def on_train_epoch_start(self) -> None:
            epoch = int(self.current_epoch)
            if epoch >= config.freeze_norm * config.epochs:
                for module in model.modules():
                    if isinstance(module, torch.nn.BatchNorm2d):
                        module.eval()
            last = config.epochs - config.purge_interval
            if config.expansion != "none" and epoch > 0 and epoch % config.purge_interval == 0 and epoch <= last:
                change = tested(model, slides, config, steps, epoch, np.random.default_rng([seed, 3, epoch]))
                model.metagenes.apply_change(change, self.optimizers().optimizer)

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
            # From torch's generator, which the fit seeds anew in every epoch.
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
            patches = [patch.to(self.device) for patch in draw_patches(slides, list(map(int, batch)), config, rng)]
            warm = config.warm_up * config.epochs
            weight = min(1.0, self.current_epoch / warm) if warm else 1.0
            terms = model.bound(patches, model.noise(patches), sizes, prior_weight=weight)
            count = torch.tensor(float(len(model.metagenes.slots)))
            return {"loss": -terms.pop("elbo"), **{k: v.detach() for k, v in terms.items()}, "metagenes": count}

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(parameter_groups(model, config.lr), amsgrad=True)
            if not config.anneal:
                return optimizer
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: _falling(epoch / config.epochs))
            return [optimizer], [schedule]

    return Step()
