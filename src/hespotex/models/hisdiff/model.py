"""The model: how it is fitted on sections, and how samples of a section become a prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..._device import resolve_device
from ..._logging import logger
from ...data.lattice import spot_pitch
from ...data.section import Prediction, Section
from ...errors import DataValueError
from .._base import Model, ModelInfo, Run
from .._inner import inner_folds, of_shape, row_blocks
from .._registry import register
from .._rows import RowBatches
from .._samples import check_room
from .._standardize import Standardizer
from .._training import Fit, fit_lightning, forget_checkpoints
from .config import PRESETS, HisDiffConfig
from .diffusion import Schedule, sample
from .expression import ExpressionSpace
from .neighbours import neighbour_index, neighbours_at_pitch
from .network import Context, Denoiser
from .noise import SpotNoise, spot_keys
from .training import Spots, make_step

__all__ = ["HisDiff"]

_CHOICE, _FINAL = "hisdiff-choice", "hisdiff-final"
_TOKENS_AT_ONCE = 65_536  # in one pass of the network when sampling
_VALIDATIONS = 50
_DENSER = 0.75  # of the training pitch, below which neighbours are taken at that pitch

Neighbours = tuple[np.ndarray, np.ndarray]  # indices and which stand for none, (n, k) each


@register
class HisDiff(Model[HisDiffConfig]):
    """Samples of a spot's expression given its histology, after HisDiff and Stem.

    A transformer over genes learns to remove noise from expression vectors; what it sees of the image is one vector
    made of the spot's embedding and, in HisDiff, of what it attends to among its neighbours. Starting from noise it
    generates expression; the prediction is the mean of `n_samples` such samples, its spread their standard deviation.

    A re-implementation from a written account of the released code, not the authors' code. ``preset="paper"`` does what
    HisDiff's authors do and ``preset="stem"`` what Stem's do, except that nothing is chosen by sections to be
    predicted; the default repairs the defects that the documentation lists, and ``preset="small"`` generates
    components of expression with a small network, for a laptop.

    Notes
    -----
    The noise of a spot follows from the seed, the number of the sample and the spot's name: samples depend neither on
    the order of the spots nor, beyond rounding, on how many are drawn at once.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex import models
    >>> from hespotex.data.section import Section, Targets
    >>> rng = np.random.default_rng(0)
    >>> targets = Targets(rng.poisson(3, size=(40, 5)), np.full(40, 100.0), tuple("ABCDE"))
    >>> position = rng.uniform(0, 2000, size=(40, 2))
    >>> section = Section("s", np.arange(40).astype(str), rng.normal(size=(40, 8)), position, targets=targets)
    >>> model = models.create("hisdiff", preset="small", depth=1, width=8, heads=2, max_updates=2).fit([section])
    >>> prediction = model.with_options(n_samples=3, keep_samples=True).predict(section)
    >>> prediction.mean.shape, prediction.std.shape, prediction.samples.shape
    ((40, 5), (40, 5), (40, 5, 3))
    """

    Config: ClassVar[type] = HisDiffConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="hisdiff",
        summary="Diffusion over the gene vector, conditioned on the embeddings of a spot and its neighbours",
        uncertainty=True,
        distributed=True,
        in_memory=2,
        cost="'small': minutes; 'default' wants a GPU; grows with spots × genes × steps × samples",
        presets=tuple(PRESETS),
        paper="10.48550/arXiv.2501.15598",
    )

    seed: int
    _pitch_um: float | None

    @classmethod
    def preset(cls, name: str) -> HisDiffConfig:
        """``"default"``, ``"small"`` for a laptop, ``"paper"`` (HisDiff), or ``"stem"`` (Stem), both as published."""
        if name not in PRESETS:
            raise DataValueError(f"preset={name!r} is unknown to 'hisdiff'; it has {', '.join(map(repr, PRESETS))}")
        return PRESETS[name]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Choose the number of epochs where asked to, then train on all spots that have counts."""
        config, self.seed = self.config, run.seed
        if run.precision is None:
            bfloat = config.mixed_precision and resolve_device(run.device).type == "cuda"
            run = replace(run, precision="bf16-mixed" if bfloat else "32-true")
        self._embedding = Standardizer.fit(sections, config.standardize)
        features = self._embedding.read_all(sections)
        expression = np.concatenate([section.require_targets()[:] for section in sections])
        if not np.isfinite(expression).all():
            raise DataValueError("the measured expression holds values that are NaN or infinite; leave those genes out")
        starts = np.cumsum([0] + [section.n_obs for section in sections])
        pitches = [pitch for section in sections if (pitch := _pitch(section)) is not None]
        self._pitch_um = float(np.median(pitches)) if pitches else None
        around = _joined([self._neighbours(section) for section in sections], starts)
        measured = (expression != 0).any(axis=1)
        if not measured.any():
            raise DataValueError("no spot has a count of any gene of the panel; choose genes with hx.pp.select_genes")
        fits: list[Fit] = []
        epochs = self._epochs(int(measured.sum()))
        folds = inner_folds(sections)[1] if config.stopping == "inner" else []
        if folds:
            held = np.concatenate([starts[i] + rows for i, rows in folds[0].held_out.items()])
            kept = np.setdiff1d(np.arange(len(measured)), held)
            held, kept = held[measured[held]], kept[measured[kept]]
            if len(held) and len(kept):
                fits.append(self._train(features, expression, around, kept, run, epochs, _CHOICE, held))
                epochs, self.history = fits[-1].best_epoch or epochs, fits[-1].history
                self.scores = {"inner_denoising_error": fits[-1].best_score}
                logger.info("hisdiff: %d epochs, by a left-out training group", epochs)
        final = self._train(features, expression, around, np.flatnonzero(measured), run, epochs, _FINAL)
        self.history = self.history or final.history
        forget_checkpoints(*fits, final)

    def _epochs(self, n_spots: int) -> int:
        """Most passes over `n_spots` that the settings allow."""
        config = self.config
        if config.max_updates is None:
            return config.epochs
        return max(1, min(config.epochs, config.max_updates // -(-n_spots // config.batch)))

    def _train(
        self,
        features: np.ndarray,
        expression: np.ndarray,
        around: tuple[Neighbours, Neighbours] | None,
        rows: np.ndarray,
        run: Run,
        epochs: int,
        name: str,
        held: np.ndarray | None = None,
    ) -> Fit:
        """Fit space and network on `rows`, and keep both; with `held`, the best epoch's."""
        config = self.config
        self._space = ExpressionSpace.fit(
            expression[rows], scale_genes=config.scale_genes, components=config.components
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            network = self._build()
        values = torch.from_numpy(self._space.encode(expression).astype(np.float32))
        spots = Spots(torch.from_numpy(features), values, *_tensors(around))
        module = make_step(config, network, spots, run.seed)
        every = 1 if held is None else max(1, epochs // _VALIDATIONS)
        epochs -= epochs % every
        batches = RowBatches(rows, config.batch, epochs, run.seed)
        fit = fit_lightning(
            module,
            batches,
            run,
            max_epochs=epochs,
            validation=[] if held is None else list(torch.from_numpy(held).split(config.batch)),
            monitor=None if held is None else "val_loss",
            validate_every=every,
            gradient_clip=config.gradient_clip,
            visit=batches.visit,
            name=name,
        )
        self._network = module.trained
        return fit

    def _build(self) -> Denoiser:
        return Denoiser(self._space.width, self.n_features, self.config)

    def _neighbours(self, section: Section) -> tuple[Neighbours, Neighbours] | None:
        """Both neighbourhoods of all spots of a section."""
        if self.config.condition == "spot":
            return None
        config = self.config
        assert section.region is not None
        place, region = section.coordinates, np.asarray(section.region)
        sizes = ((config.near, config.near_um), (config.wide, config.wide_um))
        pitch = _pitch(section)
        if pitch is not None and self._pitch_um is not None and pitch < _DENSER * self._pitch_um:
            near, wide = (
                neighbours_at_pitch(place, k, region=region, pitch_um=self._pitch_um, radius_um=radius)
                for k, radius in sizes
            )
        else:
            near, wide = (neighbour_index(place, k, region=region, radius_um=radius) for k, radius in sizes)
        return near, wide

    def _context(
        self,
        section: Section,
        centre: np.ndarray | float,
        rows: np.ndarray,
        around: tuple[Neighbours, Neighbours] | None,
        device: torch.device,
    ) -> Context:
        """What the image shows of some spots; only the embeddings they need are read."""
        if around is None:
            return Context(torch.from_numpy(self._embedding.read(section, centre, rows)).to(device))
        (near, near_absent), (wide, wide_absent) = ((index[rows], absent[rows]) for index, absent in around)
        needed = np.unique(np.concatenate([rows, near.ravel(), wide.ravel()]))
        features = torch.from_numpy(self._embedding.read(section, centre, needed)).to(device)

        def gathered(index: np.ndarray) -> torch.Tensor:
            return features[torch.from_numpy(np.searchsorted(needed, index)).to(device)]

        masks = (torch.from_numpy(each).to(device) for each in (near_absent, wide_absent))
        return Context(gathered(rows), gathered(near), gathered(wide), *masks)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield mean, standard deviation (of more than one sample) and, where asked for, the samples."""
        self._check_section(section)
        config, ids = self.config, np.asarray(section.ids)
        if config.keep_samples:
            check_room(section.n_obs, len(self.genes), config.n_samples)
        self._embedding.warn_if_few(section)
        around, centre = self._neighbours(section), self._embedding.centre(section)
        keys = spot_keys(ids)
        schedule = Schedule.linear().for_sampler(config.sampler, config.steps)
        device = resolve_device()
        at_once = max(1, _TOKENS_AT_ONCE // self._space.width)
        self._network.to(device)
        try:
            for block in row_blocks(section.n_obs, block_rows):
                moments = _Moments(block.stop - block.start, len(self.genes), config)
                for part in row_blocks(block.stop - block.start, min(at_once, block_rows)):
                    rows = np.arange(block.start + part.start, block.start + part.stop)
                    context = self._context(section, centre, rows, around, device)
                    for draw, values in enumerate(self._samples(context, keys[rows], schedule, device)):
                        moments.add(part, draw, values)
                yield Prediction(
                    ids[block], self.genes, self.unit, moments.mean, std=moments.std, samples=moments.samples
                )
        finally:
            self._network.cpu()

    def _samples(
        self, context: Context, keys: np.ndarray, schedule: Schedule, device: torch.device
    ) -> Iterator[np.ndarray]:
        """Samples of some spots, one after another, (n, G) float32 each."""
        config, network, width = self.config, self._network, self._space.width
        tables = Schedule.linear().tables(device)
        seed = self.seed if config.sample_seed is None else config.sample_seed
        bfloat = device.type == "cuda" and config.mixed_precision
        autocast = torch.autocast("cuda", dtype=torch.bfloat16) if bfloat else nullcontext()
        with torch.inference_mode(), autocast:
            sight = network.look(context)  # does not depend on the time: once for all steps and samples

        def predict(x: torch.Tensor, time: int) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode(), autocast:
                output = network.denoise(x, torch.full((1,), time, device=device), sight).float()
            estimate = tables.noise_of(output[:, 0], x, time, config.output)
            # Untrained, the value stays where it starts: between the two variances.
            return estimate, output[:, 1] if config.likelihood != "none" else torch.zeros_like(x)

        for draw in range(config.n_samples):
            noise = SpotNoise(seed, keys, draw, paired=config.paired)

            def fresh(noise: SpotNoise = noise) -> torch.Tensor:
                return torch.from_numpy(noise(width)).to(device)

            with torch.inference_mode():
                values = sample(schedule, predict, fresh(), fresh, config.sampler).cpu().numpy()
            decoded = self._space.decode(values, None if self._space.basis is None else noise(len(self.genes)))
            yield np.maximum(decoded, 0.0) if config.clip else decoded

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Weights, scales and the seed of the samples."""
        parts = {
            "network": {name: value.numpy() for name, value in self._network.state_dict().items()},
            "expression": self._space.state(),
            "features": self._embedding.state(),
        }
        arrays = {f"{part}.{name}": array for part, each in parts.items() for name, array in each.items()}
        return arrays, {"seed": self.seed, "pitch_um": self._pitch_um}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""

        def part(name: str) -> dict[str, np.ndarray]:
            return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}

        self.seed = int(values["seed"])
        pitch = values.get("pitch_um")
        self._pitch_um = None if pitch is None else float(pitch)
        self._embedding = Standardizer.from_state(part("features"), self.config.standardize)
        self._space = ExpressionSpace.from_state(part("expression"))
        of_shape(self._space.mean, (len(self.genes),), "expression.mean")
        self._network = self._build()
        self._network.load_state_dict({name: torch.tensor(array) for name, array in part("network").items()})
        self._network.requires_grad_(False).eval()


def _pitch(section: Section) -> float | None:
    """Distance of neighbouring spots in µm; ``None`` where there are no two, or places are not known."""
    places = np.asarray(section.coordinates)
    apart = np.isfinite(places).all() and len(np.unique(places, axis=0)) > 1
    try:
        return spot_pitch(places, np.asarray(section.region)) if apart else None
    except DataValueError:  # each alone in its region
        return None


class _Moments:
    """Mean and standard deviation of samples that come one after another, and the samples where they are kept."""

    def __init__(self, n: int, n_genes: int, config: HisDiffConfig) -> None:
        self._mean = np.zeros((n, n_genes))
        self._squares = np.zeros((n, n_genes))
        self._n_samples = config.n_samples
        # Noise and its negative leave the mean where it is: only a sample without its opposite costs freedom.
        self._freedom = config.n_samples - (config.n_samples % 2 / config.n_samples if config.paired else 1)
        self.samples = np.empty((n, n_genes, config.n_samples), dtype=np.float32) if config.keep_samples else None

    def add(self, rows: slice, draw: int, values: np.ndarray) -> None:
        """Take sample number `draw` of some rows; their samples come in order."""
        if self.samples is not None:
            self.samples[rows, :, draw] = values
        before = values - self._mean[rows]
        self._mean[rows] += before / (draw + 1)
        self._squares[rows] += before * (values - self._mean[rows])

    @property
    def mean(self) -> np.ndarray:
        return self._mean.astype(np.float32)

    @property
    def std(self) -> np.ndarray | None:
        """``None`` of a single sample, which has no spread."""
        if self._n_samples < 2:
            return None
        return np.sqrt(self._squares / self._freedom).astype(np.float32)


def _joined(
    each: Sequence[tuple[Neighbours, Neighbours] | None], starts: np.ndarray
) -> tuple[Neighbours, Neighbours] | None:
    """Neighbourhoods of all sections as row numbers of their concatenation."""
    known = [pair for pair in each if pair is not None]
    if not known:
        return None

    def joined(which: int) -> Neighbours:
        index = np.concatenate([pair[which][0] + start for pair, start in zip(known, starts, strict=False)])
        return index, np.concatenate([pair[which][1] for pair in known])

    return joined(0), joined(1)


def _tensors(
    around: tuple[Neighbours, Neighbours] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    if around is None:
        return None, None, None, None
    (near, near_absent), (wide, wide_absent) = ((torch.from_numpy(i), torch.from_numpy(a)) for i, a in around)
    return near, wide, near_absent, wide_absent
