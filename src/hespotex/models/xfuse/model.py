"""The model: what is fitted in which order, and how a section is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..._device import resolve_device
from ...data.section import Prediction, Section
from ...errors import DataValueError, ModelMismatchError
from .._base import Model, ModelInfo, Run, _mark
from .._inner import of_shape, row_blocks
from .._registry import register
from .._samples import check_room
from .._training import forget_checkpoints
from ..nn.pooling import bag_rows
from .baselines import Start, cluster_profiles, fit_start
from .config import PAPER, SMALL, XFuseConfig
from .inference import activities, check_draws, mean_and_std
from .likelihood import nb_mean
from .metagenes import Metagenes
from .network import Network
from .objective import Generative
from .slides import Colours, Raster, Slide, draw_patches
from .training import batches, fit_generative

__all__ = ["XFuse"]

_LEAST_WIDTH = 0.05  # of the effects of metagenes on a gene that the clusters do not differ in
_MOST_PASSES = 500  # of the fit that training starts from; it need not be better than a start


@register
class XFuse(Model[XFuseConfig]):
    """Expression of superpixels by a joint generative model of image and counts, after XFuse (Nature Biotechnology).

    Latent fields of several resolutions generate the colours of the cells, and at each cell a positive scale and a
    mixture of metagenes; a spot's counts are negative binomial, with sizes that sum over its cells by their share. The
    encoder, which approximates the posterior of the fields, reads colours alone, so that a section without counts can
    be predicted too. The prediction is the expected count of a whole cell: mean and standard deviation over draws from
    the posterior. Its latent representation is the mean activity of each metagene times the scale; :attr:`profiles`
    holds what the metagenes mean.

    A re-implementation from the published description, not the authors' code. ``preset="paper"`` has their settings,
    which take days on a GPU; ``"small"`` is for a section of a few hundred spots on a laptop.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from hespotex import models
    >>> from hespotex.data.section import Parts, Section, Targets
    >>> grid = np.stack(np.divmod(np.arange(64), 8), axis=1)
    >>> colour = np.random.default_rng(0).uniform(size=(64, 3))
    >>> share = sparse.csr_array(([1.0, 1.0], ([0, 1], [18, 45])), shape=(2, 64))
    >>> parts = Parts(np.arange(64).astype(str), grid * 8.0, share, colour=colour, grid=grid, level="superpixel")
    >>> targets = Targets(np.array([[3, 1], [2, 4]]), np.array([4, 6]), ("A", "B"), unit="counts")
    >>> xy = np.array([[18.0, 18.0], [42.0, 42.0]])
    >>> section = Section("s", np.array(["0", "1"]), np.zeros((2, 0)), xy, targets=targets, parts=parts)
    >>> model = models.create("xfuse", preset="small", depth=2, width=2, patch=8, epochs=2, n_samples=2)
    >>> model.fit([section]).predict(section).mean.shape
    (64, 2)
    """

    Config: ClassVar[type] = XFuseConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="xfuse",
        summary="Joint generative model of image and counts; an encoder of the image predicts superpixels",
        level="superpixel",
        task="both",
        needs=("positions", "colour"),
        uncertainty=True,
        in_memory=1,
        cost="small: minutes; default: hours; grows with cells x epochs and, slowly, with spots x genes",
        presets=("default", "small", "paper"),
        paper="10.1038/s41587-021-01075-3",
    )

    @classmethod
    def preset(cls, name: str) -> XFuseConfig:
        """``"default"``; ``"small"``: minutes on a laptop for one section; ``"paper"``: the published settings."""
        presets = {"default": XFuseConfig(), "small": SMALL, "paper": PAPER}
        if name not in presets:
            raise DataValueError(f"preset={name!r} is unknown to 'xfuse'; it has {', '.join(map(repr, presets))}")
        return presets[name]

    @property
    def profiles(self) -> np.ndarray:
        """Expected counts of each gene where a metagene alone is active with scale 1, (K, G).

        The columns of the latent representation times these, summed, are the prediction, up to the spread of the
        draws.
        """
        with torch.no_grad():
            mean, sd = self._generative.metagenes.profiles()
            log_rates, logits = self._generative.rates(mean + sd.square() / 2, None)  # the mean of a log-normal
            return nb_mean(log_rates.exp(), logits).numpy()

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Raster the sections, fit the baselines that training starts from, then all of the model at once."""
        config = self.config
        self.unit, self._seed = "counts", run.seed
        self._size_um = _common_size(sections)
        self._colours = Colours.fit(sections) if config.colour_range == "quantile" else Colours()
        slides = [self._slide(section) for section in sections]
        with_spots = [index for index, slide in enumerate(slides) if slide.n_spots]
        if not with_spots:
            raise DataValueError(
                f"none of the sections has a spot with at least min_counts={config.min_counts:g} counts of the panel: "
                "there is nothing to learn from"
            )
        self._levels: tuple[str, ...] = ()
        if config.section_effects and len(with_spots) > 1:
            self._levels = tuple(_mark(sections[index]) for index in with_spots)
            # The background alone would teach the effects of a section without spots, and teach them to be low.
            level_of = {index: level for level, index in enumerate(with_spots)}
            slides = [replace(slide, level=level_of.get(index, len(level_of))) for index, slide in enumerate(slides)]
        self._generative = self._start(slides, run.seed)
        # Rates of whole spots and log-gamma functions are beyond 16 bits.
        fit = fit_generative(self._generative, slides, config, replace(run, precision=run.precision or "32-true"))
        self.history = fit.history
        self._generative = self._compact(self._generative)
        forget_checkpoints(fit)

    def _slide(self, section: Section) -> Slide:
        parts = section.require_parts()
        targets = section.require_targets().in_unit("counts")
        bag_rows(parts.share, section.name)
        raster = Raster.of(section, self._colours, self.config.margin)
        if min(raster.shape) < 2**self.config.depth:
            raise DataValueError(
                f"section {section.name!r} is {' x '.join(map(str, raster.shape))} superpixels large, too small for "
                f"depth={self.config.depth}; lower depth, or make smaller superpixels with hx.pp.superpixels"
            )
        return Slide.of(
            raster,
            parts.share,
            targets[:],
            missing=self.config.missing_genes,
            min_counts=self.config.min_counts,
            name=section.name,
        )

    def _start(self, slides: Sequence[Slide], seed: int) -> Generative:
        """The model before training: its networks from `seed`, its levels from the data."""
        config = self.config
        counts = [np.where(slide.measured, slide.counts[:-1], np.nan) for slide in slides if slide.n_spots]
        published = config.background_in_size
        start = fit_start(counts, background=published, most_passes=None if published else _MOST_PASSES)
        size = float(np.nanmean([slide.label_size(background=published) for slide in slides if slide.n_spots]))
        first = draw_patches(slides, batches(slides, config, seed)[0], config, np.random.default_rng([seed, 0]))
        image = torch.stack([patch.image for patch in first]).transpose(0, 1).flatten(1)
        generative = self._build(start, config.max_metagenes, config.metagenes, seed)
        generative.network.start_at(image.mean(dim=1), image.std(dim=1), start.scale / size, config.latent_sd)
        if config.start_profiles == "clusters" and config.metagenes > 1:
            profiles = torch.from_numpy(cluster_profiles(counts, config.metagenes, seed))
            width = profiles.square().mean(dim=0).sqrt().clamp_min(_LEAST_WIDTH)
            generative.metagenes.start_at(profiles, width / 3)
            with torch.no_grad():
                generative.baselines.log_tau.copy_(width.log())
        return generative

    def _build(self, start: Start, slots: int, active: int, seed: int = 0) -> Generative:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Network(config.depth, config.width, config.norm, checkpoints=config.activation_checkpoints)
            metagenes = Metagenes(slots, config.width, len(start.log_rate), active)
        return Generative(network, metagenes, start, len(self._levels))

    def _compact(self, trained: Generative) -> Generative:
        """The same model with no slot left empty."""
        slots = trained.metagenes.slots
        compact = self._build(_no_start(len(self.genes)), len(slots), len(slots))
        compact.network.load_state_dict(trained.network.state_dict())
        compact.baselines.load_state_dict(trained.baselines.state_dict())
        for new, old in enumerate(slots):
            compact.metagenes.take_over(new, trained.metagenes, old)
        return compact.eval()

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Draw scale and activities of the whole section once, then multiply with the profiles block by block."""
        self._check_section(section)
        parts = section.require_parts()
        if parts.size_um is not None and self._size_um is not None and not np.isclose(parts.size_um, self._size_um):
            raise ModelMismatchError(
                f"section {section.name!r} has superpixels of {parts.size_um:g} µm, the model was trained on "
                f"{self._size_um:g} µm; make them anew with hx.pp.superpixels(sdata, size_um={self._size_um:g})"
            )
        check_draws(parts.n_parts, len(self._generative.metagenes.slots), self.config.n_samples)
        if self.config.keep_samples:
            check_room(parts.n_parts, len(self.genes), self.config.n_samples)
        blocks = list(row_blocks(parts.n_parts, block_rows))
        raster = Raster.of(section, self._colours, self.config.margin)
        config = self.config
        device = resolve_device()
        self._generative.to(device)
        try:
            drawn = activities(
                self._generative,
                raster,
                config.n_samples,
                self._seed,
                tile=config.tile if config.norm == "batch" else max(raster.shape),
                unit_scale=config.scale == "one",
            )
        finally:
            self._generative.cpu()
        profiles = self._drawn_profiles(_mark(section))
        for rows in blocks:
            draws = (activity[rows] @ profile for activity, profile in zip(drawn, profiles, strict=True))
            samples = np.stack(list(draws), axis=2) if config.keep_samples else None
            mean, std = mean_and_std(draws if samples is None else np.moveaxis(samples, 2, 0))
            yield Prediction(
                np.asarray(parts.ids)[rows],
                self.genes,
                "counts",
                mean,
                std=std,
                samples=samples,
                latent=drawn[:, rows].mean(axis=0),
                level=parts.level,
            )

    def _drawn_profiles(self, mark: str) -> list[np.ndarray]:
        """Expected counts per metagene and gene, (K, G), one for each draw.

        The effects are those of the section where it was trained on, and none elsewhere.
        """
        generative, drawn = self._generative, []
        with torch.no_grad():
            mean, sd = generative.metagenes.profiles()
            for sample in range(self.config.n_samples):
                rng = np.random.default_rng([self._seed, sample, 1 << 31])
                eps = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
                effects = None
                if mark in self._levels:
                    centre, width = generative.baselines.effects(self._levels.index(mark))
                    effects = centre + width * torch.from_numpy(rng.standard_normal(centre.shape, dtype=np.float32))
                log_rates, logits = generative.rates(mean + sd * eps, effects)
                drawn.append(nb_mean(log_rates.exp(), logits).numpy())
        return drawn

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Weights, profiles of the metagenes and the colour scale."""
        arrays = {f"model.{name}": value.numpy() for name, value in self._generative.state_dict().items()}
        if self._colours.low is not None and self._colours.high is not None:
            arrays |= {"colours.low": self._colours.low, "colours.high": self._colours.high}
        return arrays, {
            "metagenes": len(self._generative.metagenes.slots),
            "levels": list(self._levels),
            "size_um": self._size_um,
            "seed": self._seed,
        }

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self._levels = tuple(values["levels"])
        self._size_um = None if values["size_um"] is None else float(values["size_um"])
        self._seed = int(values["seed"])
        self._colours = Colours(arrays.get("colours.low"), arrays.get("colours.high"))
        of_shape(arrays["model.baselines.rho"], (len(self.genes),), "model.baselines.rho")
        count = int(values["metagenes"])
        self._generative = self._build(_no_start(len(self.genes)), count, count)
        weights = {name.removeprefix("model."): array for name, array in arrays.items() if name.startswith("model.")}
        self._generative.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
        self._generative.eval()


def _no_start(n_genes: int) -> Start:
    zeros = np.zeros(n_genes, dtype=np.float32)
    return Start(1.0, zeros, zeros)


def _common_size(sections: Sequence[Section]) -> float | None:
    """Side of the cells in µm, which all sections must share."""
    sizes = {section.require_parts().size_um for section in sections}
    if len(sizes) > 1:
        raise DataValueError(
            f"the sections have superpixels of {', '.join(f'{size} µm' for size in sorted(sizes, key=str))}; make them "
            "of one size with hx.pp.superpixels(sdata, size_um=...)"
        )
    return sizes.pop()
