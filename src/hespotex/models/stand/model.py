"""The model: what is fitted in which order, and how nuclei and spots are predicted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..._device import resolve_device
from ..._logging import logger
from ...data.section import Prediction, Section
from ...errors import DataValueError, HespotexWarning
from .._base import Model, ModelInfo, Run
from .._inner import Scaler, inner_folds, of_shape, row_blocks
from .._registry import register
from .._training import Fit, forget_checkpoints
from ..nn.pooling import Bags, bag_rows
from .config import PAPER, STAnDConfig
from .counts import CountDecoder
from .decoder import PublishedDecoder
from .spots import Spots, read_parts
from .training import fit_decoder
from .vqvae import LATENT, VQVAE, as_crops, fit_vqvae, scaled

__all__ = ["STAnD"]

_READ_AT_ONCE = 8192
_ENCODE_AT_ONCE = 256  # crops; the distances of one to all codes take 200 kB


@register
class STAnD(Model[STAnDConfig]):
    """Expression of nuclei from their images, after ST-AnD (Huang, 2022).

    A network maps the features of a nucleus to its expression; what it says of the nuclei of a spot is pooled and compared
    with what the spot measured. Nuclei of other slides then need only their image. Superpixels serve as well.

    A re-implementation from a written account of the released code. ``preset="paper"`` does what that code does: a VQ-VAE
    on raw crops, sigmoid activations, noisy-AND pooling, squared error on log expression. The default repairs its defects:
    expected counts of nuclei that add up, an ambient term, and a negative binomial likelihood; see :class:`STAnDConfig`.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from hespotex import models
    >>> from hespotex.data.section import Parts, Section, Targets
    >>> rng = np.random.default_rng(0)
    >>> share = sparse.csr_array(np.kron(np.eye(20), np.ones((1, 3))))
    >>> parts = Parts(np.arange(60).astype(str), rng.uniform(size=(60, 2)), share, rng.normal(size=(60, 4)))
    >>> targets = Targets(rng.poisson(3, size=(20, 5)), np.full(20, 100.0), tuple("ABCDE"), unit="counts")
    >>> names, xy = np.arange(20).astype(str), rng.uniform(size=(20, 2))
    >>> section = Section("s", names, np.zeros((20, 0)), xy, targets=targets, parts=parts)
    >>> model = models.create("stand", hidden=[8], max_epochs=2).fit([section])
    >>> model.predict(section).mean.shape, model.predict_spots(section).mean.shape
    ((60, 5), (20, 5))
    """

    Config: ClassVar[type] = STAnDConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="stand",
        summary="Per-nucleus expression whose sum over the nuclei of a spot explains its counts",
        level="nucleus",
        task="both",
        needs=("parts",),
        uncertainty=True,
        distributed=True,
        in_memory=1,
        cost="ten seconds; grows with parts under spots × genes",
        presets=("default", "paper"),
        paper="https://github.com/huangch/ST-AnD",
    )

    epochs: int

    @classmethod
    def preset(cls, name: str) -> STAnDConfig:
        """``"default"``, or ``"paper"``: what the author does, less what looks at the sections to be predicted."""
        presets = {"default": STAnDConfig(), "paper": PAPER}
        if name not in presets:
            raise DataValueError(f"preset={name!r} is unknown to 'stand'; it has 'default', 'paper'")
        return presets[name]

    @property
    def ambient(self) -> np.ndarray:
        """Expected counts of a spot that none of its parts accounts for, at unit size factor, (G,); 0 as published."""
        if isinstance(self._decoder, CountDecoder):
            return self._decoder.ambient.detach().numpy().copy()
        return np.zeros(len(self.genes), dtype=np.float32)

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Fit the encoder where there is one, choose the number of epochs on held-out spots, and fit on all."""
        if self.config.decoder == "counts":
            self.unit = "counts"
        elif not self.unit.startswith("log1p"):
            raise DataValueError(
                f"unit={self.unit!r}: decoder='published' predicts logarithms of 1 + x; train it with unit='log1p_cp10k'"
            )
        run = replace(run, precision=run.precision or "32-true")  # of two codes, half precision cannot tell the nearer
        spots = self._supervising(sections)
        amount = np.concatenate([each.amount for each in spots])
        if not (amount > 0).any():
            raise DataValueError("no spot that has parts has any counts; there is nothing to learn from")
        self._typical = float(amount[amount > 0].mean())
        fits: list[Fit] = []  # whose resume files go once the whole model stands
        self._encoder = self._scaler = None
        if self.config.encoder == "vqvae":
            self._encoder, fit = fit_vqvae(self.config, np.concatenate([each.features for each in spots]), run)
            fits.append(fit)
            self.history = [
                {"epoch": row["epoch"], **{f"vqvae_{key}": value for key, value in row.items() if key != "epoch"}}
                for row in fit.history
            ]
        if not self.config.reencode:
            features = [each.features for each in spots]
            if self._encoder is not None:
                with _on(resolve_device(run.device), self._encoder) as device:
                    features = [self._encode(each, device) for each in features]
            if self.config.decoder == "counts":
                self._scaler = Scaler.fit(
                    [Section("parts", np.arange(len(each)), each, np.zeros((len(each), 2))) for each in features]
                )
                features = [self._scaler(each) for each in features]
            spots = [replace(each, features=own) for each, own in zip(spots, features, strict=True)]
        self.epochs, history = self._choose_epochs(sections, spots, run, fits)
        self._decoder = self._new_decoder(run.seed)
        everything = {index: np.arange(len(each.rows)) for index, each in enumerate(spots)}
        fits.append(self._train(self._decoder, spots, everything, run, self.epochs, "ST-AnD"))
        self.history += history or fits[-1].history
        if isinstance(self._decoder, PublishedDecoder):
            zero = int((self._decoder.scale <= 0).sum())
            self.scores["genes_always_zero"] = float(zero)
            logger.info("stand: %d of %d genes have no positive scale and are zero everywhere", zero, len(self.genes))
        forget_checkpoints(*fits)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield the expression of parts, under spots or not, and with the count decoder its standard deviation."""
        self._check_section(section)
        parts = section.require_parts()
        with _on(resolve_device(), self._decoder, self._encoder) as device:
            for rows in row_blocks(parts.n_parts, block_rows):
                features = torch.from_numpy(self._read(section, rows, device)).to(device)
                std = None
                with torch.inference_mode():
                    if isinstance(self._decoder, CountDecoder):
                        mean = self._parts_of_output * self._decoder.expected(features)
                        std = self._decoder.variance(mean).sqrt().cpu().numpy()
                    else:
                        mean = self._decoder.single(features, share=self.config.output == "share")
                values = mean.float().cpu().numpy()
                ids = np.asarray(parts.ids)[rows]
                yield Prediction(ids, self.genes, self.unit, values, std=std, level=parts.level)

    def predict_spots(self, section: Section, *, block_rows: int = 256) -> Prediction:
        """What the parts of each spot amount to: with the count decoder, their sum and the ambient term.

        Parameters
        ----------
        section
            A section whose parts lie under its observations.
        block_rows
            Observations at a time.

        Returns
        -------
        Expression of the observations, counts at unit size factor; a spot without parts has the ambient term alone.
        """
        self._check_section(section)
        share = section.require_parts().share
        blocks = []
        with _on(resolve_device(), self._decoder, self._encoder) as device, torch.inference_mode():
            for rows in row_blocks(section.n_obs, block_rows):
                bags = Bags.of(share, rows)
                used, inverse = np.unique(bags.part.numpy(), return_inverse=True)
                features = self._read(section, used, device)[inverse]
                on_device = Bags(bags.part.to(device), bags.bag.to(device), bags.weight.to(device), bags.n)
                blocks.append(self._decoder(torch.from_numpy(features).to(device), on_device).float().cpu().numpy())
        return Prediction(section.ids, self.genes, self.unit, np.concatenate(blocks))

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Weights of decoder and encoder, scaling, and what a typical spot holds."""
        arrays = {f"decoder.{name}": value.numpy() for name, value in self._decoder.state_dict().items()}
        if self._encoder is not None:
            arrays |= {f"encoder.{name}": value.numpy() for name, value in self._encoder.state_dict().items()}
        if self._scaler is not None:
            arrays |= self._scaler.state()
        return arrays, {"epochs": self.epochs, "typical": self._typical}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""

        def part(name: str) -> dict[str, torch.Tensor]:
            start = f"{name}."
            return {
                key.removeprefix(start): torch.tensor(array) for key, array in arrays.items() if key.startswith(start)
            }

        self.epochs, self._typical = int(values["epochs"]), float(values["typical"])
        self._encoder = self._scaler = None
        if self.config.encoder == "vqvae":
            self._encoder = VQVAE()
            self._encoder.load_state_dict(part("encoder"))
            self._encoder.eval()
        if self.config.decoder == "counts":
            self._scaler = Scaler.from_state(arrays)
            of_shape(self._scaler.mean, (self._n_inputs,), "feature_mean")
        self._decoder = self._new_decoder(0)
        self._decoder.load_state_dict(part("decoder"))
        self._decoder.eval()

    @property
    def _n_inputs(self) -> int:
        """Width of what the decoder reads."""
        return LATENT if self.config.encoder == "vqvae" else self.n_features

    @property
    def _parts_of_output(self) -> float:
        """How many parts of those that the count decoder speaks of make what is asked for."""
        if self.config.output == "share":
            return 1.0 if self.config.pooling == "sum" else 1.0 / self._typical
        return self._typical if self.config.pooling == "sum" else 1.0

    def _new_decoder(self, seed: int) -> CountDecoder | PublishedDecoder:
        """A decoder with the initial weights of `seed`."""
        config, genes = self.config, len(self.genes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if config.decoder == "counts":
                return CountDecoder(
                    self._n_inputs,
                    genes,
                    hidden=config.hidden,
                    dropout=config.dropout,
                    pooling=config.pooling,
                    dispersion=config.likelihood == "nb",
                )
            return PublishedDecoder(
                self._n_inputs,
                genes,
                pooling=config.pooling,
                beta=config.beta,
                gamma=config.gamma,
                coexpression=config.coexpression,
            )

    def _supervising(self, sections: Sequence[Section]) -> list[Spots]:
        """The spots of each section that can teach: those with counts, and as published with parts."""
        totals = [np.asarray(section.require_targets().library_size, dtype=np.float64) for section in sections]
        spots, left_out = [], 0
        for section, total in zip(sections, totals, strict=True):
            share = section.require_parts().share
            with_parts = bag_rows(share, section.name)
            rows = np.flatnonzero(total > 0)
            if self.config.decoder == "published":
                rows = np.intersect1d(rows, with_parts)
            if len(rows) == 0:
                raise DataValueError(f"section {section.name!r} has no spot with counts to learn from; leave it out")
            left_out += section.n_obs - len(rows)
            used = np.unique(share[rows].indices)
            if self.config.encoder == "vqvae":  # crops are kept as bytes, and read a block at a time
                blocks = [used[block] for block in row_blocks(len(used), _READ_AT_ONCE)]
                features = np.concatenate([as_crops(read_parts(section, block), section.name) for block in blocks])
            else:
                features = read_parts(section, used)
            target = section.require_targets().in_unit(self.unit)[rows]
            depth = total[rows] if self.config.size_factor == "spot" else np.full(len(rows), np.median(total[rows]))
            spots.append(Spots(rows, share[rows][:, used], features, target, depth.astype(np.float32)))
        if left_out:
            lack = "counts" if self.config.decoder == "counts" else "parts or counts"
            warnings.warn(f"{left_out} spots lack {lack} and are left out of the fit", HespotexWarning, stacklevel=4)
        median = np.float32(np.median(np.concatenate([each.size for each in spots])))
        return [replace(each, size=each.size / median) for each in spots]

    def _train(
        self,
        decoder: CountDecoder | PublishedDecoder,
        spots: Sequence[Spots],
        chosen: Mapping[int, np.ndarray],
        run: Run,
        epochs: int,
        name: str,
        held_out: Mapping[int, np.ndarray] | None = None,
    ) -> Fit:
        encoder = self._encoder if self.config.reencode else None
        return fit_decoder(
            self.config, decoder, spots, chosen, run, epochs=epochs, name=name, encoder=encoder, held_out=held_out
        )

    def _choose_epochs(
        self, sections: Sequence[Section], spots: Sequence[Spots], run: Run, fits: list[Fit]
    ) -> tuple[int, list[dict[str, float]]]:
        """The number of epochs that serves held-out spots best, and the history that shows it, if any are held out."""
        most = self.config.max_epochs
        folds = [] if self.config.patience is None else inner_folds(sections)[1]
        for fold in folds:
            kept = _positions(spots, fold.kept(sections))
            held_out = _positions(spots, fold.held_out)
            if not kept or not held_out:
                continue  # its spots have no counts
            decoder = self._new_decoder(run.seed)
            fit = self._train(decoder, spots, kept, run, most, "ST-AnD, choice of epochs", held_out)
            fits.append(fit)
            if np.isfinite(fit.best_score):
                self.scores["inner_pearson"] = fit.best_score
            epochs = fit.best_epoch or most
            logger.info("stand: %d epochs, r %.3f on held-out spots", epochs, fit.best_score)
            return epochs, fit.history
        return most, []

    def _read(self, section: Section, rows: slice | np.ndarray, device: torch.device) -> np.ndarray:
        """What the decoder reads of some parts, (k, width) float32."""
        features = read_parts(section, rows)
        if self._encoder is not None:
            features = self._encode(as_crops(features, section.name), device)
        return features if self._scaler is None else self._scaler(features)

    def _encode(self, crops: np.ndarray, device: torch.device) -> np.ndarray:
        """Quantised latents of crops, (k, 784) float32."""
        latents = [np.empty((0, LATENT), dtype=np.float32)]
        with torch.inference_mode():
            for rows in row_blocks(len(crops), _ENCODE_AT_ONCE):
                images = scaled(torch.from_numpy(crops[rows]).to(device))
                latents.append(self._encoder.features(images).float().cpu().numpy())  # type: ignore[union-attr]
        return np.concatenate(latents)


def _positions(spots: Sequence[Spots], rows: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Positions among each section's supervising spots of its observations `rows`; sections without any are absent."""
    found = {index: np.flatnonzero(np.isin(spots[index].rows, own)) for index, own in rows.items()}
    return {index: positions for index, positions in found.items() if len(positions)}


@contextmanager
def _on(device: torch.device, *modules: nn.Module | None) -> Iterator[torch.device]:
    """`modules` on `device`, and afterwards on the CPU again."""
    present = [module for module in modules if module is not None]
    for module in present:
        module.to(device)
    try:
        yield device
    finally:
        for module in present:
            module.cpu()
