"""The model: what is fitted in which order, and how a section is predicted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..._device import resolve_device
from ..._logging import logger
from ...data.section import Prediction, Section
from ...errors import DataValueError, HespotexWarning
from .._base import Model, ModelInfo, Run
from .._inner import inner_folds, of_shape, row_blocks
from .._registry import register
from .._training import Fit, forget_checkpoints
from ..nn.gate import GATE
from ..nn.graphs import edge_index
from .config import PAPER, HESpotExConfig
from .expression import SpotSection, spot_embeddings
from .image import NAME as IMAGE
from .image import ImageItems, ImageSection, fit_image_stream, new_members
from .inputs import Inputs, SectionInputs, gate_edges
from .linear import KernelFeatures, Regression
from .targets import TargetSpace
from .windows import cut, reached

if TYPE_CHECKING:
    from scipy import sparse
    from torch import Tensor, nn

__all__ = ["HESpotEx"]

FEW = 20  # observations, below which the mean of a section is no reference


@register
class HESpotEx(Model[HESpotExConfig]):
    """Spot-level expression from image features, after HESpotEx (Nature Computational Science, 2026).

    Stage 1 compresses the measured expression of each training spot and its neighbours into a spot embedding by
    a graph attention autoencoder. Stage 2 maps image features to a patch embedding that is drawn towards the
    spot embedding, and decodes it with its neighbours' into expression. A new section needs only image features
    and the graph.

    A re-implementation from the published description, not the authors' code. ``preset="paper"`` does what they do,
    except that nothing is fitted on, or chosen by, sections to be predicted. The default repairs the defects that its
    documentation lists, learns principal components of expression, and averages the networks with a kernel regression in
    closed form on the same inputs, in equal shares; see :class:`HESpotExConfig`.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex import models
    >>> from hespotex.data.section import Section, Targets
    >>> rng = np.random.default_rng(0)
    >>> pixel = rng.uniform(0, 100, size=(40, 2))
    >>> features = rng.normal(size=(40, 8))
    >>> targets = Targets(rng.poisson(3, size=(40, 5)), np.full(40, 100.0), tuple("ABCDE"))
    >>> section = Section("s", np.arange(40).astype(str), features, pixel, targets=targets, extras={"pixel": pixel})
    >>> model = models.create("hespotex", preset="paper", nuclei="none", gate_epochs=2, epochs=2)
    >>> model.fit([section]).predict(section).mean.shape
    (40, 5)
    """

    Config: ClassVar[type] = HESpotExConfig
    info: ClassVar[ModelInfo] = ModelInfo(
        name="hespotex",
        summary="Graph attention autoencoder on expression guides a neighbourhood decoder on image features",
        needs=HESpotExConfig().needs,
        distributed=True,
        cost="under a minute; grows with spots × genes; 'paper': hours",
        presets=("default", "paper"),
        paper="10.1038/s43588-026-00992-0",
    )

    @classmethod
    def preset(cls, name: str) -> HESpotExConfig:
        """``"default"``, or ``"paper"``: what the authors do, less what looks at the section to be predicted."""
        presets = {"default": HESpotExConfig(), "paper": PAPER}
        if name not in presets:
            raise DataValueError(f"preset={name!r} is unknown to 'hespotex'; it has 'default', 'paper'")
        return presets[name]

    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Fit both stages on `sections`."""
        if not self.config.mixed_precision and run.precision is None:
            run = replace(run, precision="32-true")
        self._inputs = Inputs.fit(self.config, sections)
        ranks = sorted(self.config.target_ranks)
        self._space = TargetSpace.fit(sections, scale_genes=self.config.scale_genes, rank=ranks[-1] if ranks else None)
        inputs = [self._inputs.of(section) for section in sections]
        windows = [each.windows() for each in inputs]
        targets = [self._space.read(section.require_targets()) for section in sections]
        if self.config.center_targets:
            targets = [target - target.mean(axis=0) for target in targets]
        self._n_inputs = inputs[0].shape[1]
        self._kernel = self._regression = None
        if self.config.regression != "none" or len(ranks) > 1:
            if self.config.regression == "kernel":
                self._kernel = KernelFeatures.fit(inputs, self.config.n_landmarks)
            folds = inner_folds(sections)[1]
            regression, rank, score = Regression.fit(
                sections, inputs, targets, folds, self._space, ranks, kernel=self._kernel
            )
            if score is not None:
                self.scores["inner_pearson_of_regression"] = score
            self._space, targets = self._space.truncated(rank), [target[:, :rank] for target in targets]
            if self.config.regression != "none":
                self._regression = regression
        fits: list[Fit] = []  # whose resume files go once the whole model stands
        spots = self._fit_expression_stream(sections, targets, windows, run, fits)
        parts = [ImageSection(*each) for each in zip(inputs, windows, targets, spots, strict=True)]
        items = ImageItems(parts, hops=self._hops)
        epochs, curve = self._choose_epochs(sections, parts, items, run, fits)
        self._members = self._new_members(run.seed)
        fit = fit_image_stream(self.config, self._members, items, run, epochs=epochs)
        self.history += [
            {**row, **({"val_mse": curve[index]} if curve else {})} for index, row in enumerate(fit.history)
        ]
        forget_checkpoints(*fits, fit)

    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Embed the whole section, then decode it block by block; the numbers do not depend on `block_rows`."""
        self._check_section(section)
        if self.config.standardize == "section" and section.n_obs < FEW:
            warnings.warn(
                f"section {section.name!r} has {section.n_obs} observations: features are taken relative to their mean, "
                "which says little of so few; predict the whole section and select afterwards",
                HespotexWarning,
                stacklevel=2,
            )
        inputs = self._inputs.of(section)
        device = resolve_device()
        self._members.to(device)
        try:
            encoded = self._encode(inputs, device, block_rows)
            floor = np.float32(0.0)
            blocks = list(row_blocks(section.n_obs, block_rows))
            if self.config.output == "shift":
                floor = np.min([self._decode(encoded, rows, device).min() for rows in blocks])
            for rows in blocks:
                mean = self._decode(encoded, rows, device) - floor
                if self.config.output == "clip":
                    np.maximum(mean, 0.0, out=mean)
                latent = np.concatenate([embedding[rows] for embedding in encoded.embeddings], axis=1)
                yield Prediction(np.asarray(section.ids)[rows], self.genes, self.unit, mean, latent=latent)
        finally:
            self._members.cpu()

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Networks, input scales, target space and regression; the expression stream is needed for training only."""
        input_arrays, input_values = self._inputs.state()
        kernel_arrays, kernel_values = ({}, {}) if self._kernel is None else self._kernel.state()
        parts = {
            "kernel": kernel_arrays,
            "inputs": input_arrays,
            "space": self._space.state(),
            "regression": {} if self._regression is None else self._regression.state(),
            "members": {name: tensor.cpu().numpy() for name, tensor in self._members.state_dict().items()},
        }
        arrays = {f"{part}.{name}": array for part, each in parts.items() for name, array in each.items()}
        values = {"inputs": input_values, "kernel": kernel_values}
        return arrays, {**values, "n_inputs": self._n_inputs}

    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""

        def part(name: str) -> dict[str, np.ndarray]:
            return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}

        self._inputs = Inputs.from_state(self.config, part("inputs"), values["inputs"])
        self._space = TargetSpace.from_state(part("space"))
        self._regression = Regression.from_state(part("regression")) if self.config.regression != "none" else None
        kernel = part("kernel")
        self._kernel = KernelFeatures.from_state(kernel, values["kernel"]) if kernel else None
        self._n_inputs = int(values["n_inputs"])
        of_shape(self._inputs.centre, (self.n_features,), "inputs.centre")
        of_shape(self._space.mean, (len(self.genes),), "space.mean")
        if self._regression is not None:
            of_shape(self._regression.weights, (None, self._space.width), "regression.weights")
        self._members = self._new_members(0)
        self._members.load_state_dict({name: torch.tensor(array) for name, array in part("members").items()})
        self._members.eval()

    def _new_members(self, seed: int) -> nn.ModuleList:
        """Networks with the initial weights of `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return new_members(self.config, self._n_inputs, self._space.width)

    def _fit_expression_stream(
        self,
        sections: Sequence[Section],
        targets: Sequence[np.ndarray],
        windows: Sequence[Sequence[np.ndarray]],
        run: Run,
        fits: list[Fit],
    ) -> Sequence[np.ndarray | None]:
        """Spot embeddings of the sections, or as many ``None``."""
        if self.config.align_weight == 0:
            return [None] * len(sections)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            gate = GATE(
                self._space.width,
                hidden=self.config.gate_hidden,
                embedding=self.config.width,
                tying=self.config.gate_tying,
            )
        pairs = [
            SpotSection(torch.from_numpy(target), torch.from_numpy(gate_edges(self.config, section)), own)
            for section, target, own in zip(sections, targets, windows, strict=True)
        ]
        embeddings, fit = spot_embeddings(self.config, pairs, run, gate=gate)
        fits.append(fit)
        self.history += [{"epoch": row["epoch"], "expression_loss": row["loss"]} for row in fit.history]
        spots = [embedding.numpy() for embedding in embeddings]
        if not self.config.standardize_alignment:
            return spots
        everything = np.concatenate(spots)
        centre, spread = everything.mean(axis=0), everything.std(axis=0)
        return [(each - centre) / np.where(spread > 1e-6, spread, 1.0) for each in spots]

    def _choose_epochs(
        self,
        sections: Sequence[Section],
        parts: Sequence[ImageSection],
        items: ImageItems,
        run: Run,
        fits: list[Fit],
    ) -> tuple[int, list[float]]:
        """Number of epochs with the least error on left-out groups, and the error after each epoch."""
        folds = inner_folds(sections)[1] if self.config.stopping == "inner" else []
        if not folds:
            return self.config.epochs, []
        chosen = [
            folds[index]
            for index in np.linspace(0, len(folds) - 1, min(len(folds), self.config.inner_folds)).astype(int)
        ]
        curves = []
        for number, fold in enumerate(chosen):
            training, held = (
                ImageItems(parts, hops=self._hops, counted=rows, whole=items.whole)
                for rows in (fold.kept(sections), fold.held_out)
            )
            fit = fit_image_stream(
                self.config,
                self._new_members(run.seed),
                training,
                run,
                epochs=self.config.epochs,
                validation=held,
                name=f"{IMAGE}, inner fold {number + 1}",
            )
            fits.append(fit)
            curves.append([row["val_mse"] for row in fit.history])
        curve = np.mean(curves, axis=0)
        best = int(np.argmin(curve)) + 1
        logger.info("hespotex: %d of at most %d epochs chosen on left-out training groups", best, self.config.epochs)
        return best, curve.tolist()

    @property
    def _hops(self) -> int:
        """Neighbour layers that a prediction looks through one after another."""
        return self.config.n_layers if self.config.layer_order == "chained" else 1

    def _encode(self, inputs: SectionInputs, device: torch.device, block_rows: int) -> _Encoded:
        """Patch embedding of all observations by each member, and what the regression says of them."""
        windows = inputs.windows()
        n = len(inputs)
        embeddings = [np.empty((n, self.config.width), dtype=np.float32) for _ in self._members]
        closed = None if self._regression is None else np.empty((n, self._space.width), dtype=np.float32)
        for window in windows:
            features = inputs[:] if len(windows) == 1 else inputs[window]
            if self._regression is not None and closed is not None:
                for rows in row_blocks(len(window), block_rows):
                    own = features[rows]
                    closed[window[rows]] = self._regression(own if self._kernel is None else self._kernel(own))
            with torch.inference_mode():
                read = torch.from_numpy(features).to(device)
                for member, embedding in zip(self._members, embeddings, strict=True):
                    embedding[window] = member.embed(read, chunk=block_rows).float().cpu().numpy()  # type: ignore[operator]
        steps = None
        if len(windows) == 1:
            steps = [
                self._neighbourhood(inputs.operator, each, member, device) for each, member in self._pairs(embeddings)
            ]
        return _Encoded(inputs, embeddings, closed, steps)

    def _pairs(self, embeddings: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Any]]:
        return zip(embeddings, self._members, strict=True)

    def _neighbourhood(
        self, operator: sparse.csr_array, embedding: np.ndarray, member: Any, device: torch.device
    ) -> Tensor:
        """Layer outputs of the observations that `operator` joins, (layers, m, width)."""
        with torch.inference_mode():
            edges = torch.from_numpy(edge_index(operator)).to(device)
            weights = torch.from_numpy(operator.data.astype(np.float32)).to(device)
            return member.neighbourhood(torch.from_numpy(embedding).to(device), edges, weights)

    def _decode(self, encoded: _Encoded, rows: slice, device: torch.device) -> np.ndarray:
        """Expression of some observations, (m, G) float32."""
        factors = encoded.inputs.factor
        factor = None if factors is None else torch.from_numpy(factors[rows]).to(device)
        outputs = []
        for number, (embedding, member) in enumerate(self._pairs(encoded.embeddings)):
            if encoded.steps is not None:
                steps = encoded.steps[number][:, rows]
            else:
                wanted = np.arange(len(embedding))[rows]
                every = reached(encoded.inputs.operator, wanted, self._hops)
                around = self._neighbourhood(cut(encoded.inputs.operator, every), embedding[every], member, device)
                steps = around[:, torch.from_numpy(np.searchsorted(every, wanted)).to(device)]
            with torch.inference_mode():
                outputs.append(member.decode(torch.from_numpy(embedding[rows]).to(device), steps, factor))
        values = torch.stack(outputs).mean(dim=0).float().cpu().numpy()
        if encoded.closed is not None:
            share = np.float32(self.config.regression_share)
            values = (1 - share) * values + share * encoded.closed[rows]
        return self._space.decode(values)


@dataclass(frozen=True, eq=False)
class _Encoded:
    """What of a section to predict is as long as the section.

    Attributes
    ----------
    inputs
        Reader of its inputs.
    embeddings
        Patch embedding by each member, (n, width).
    closed
        What the regression predicts in the target space, (n, r), or ``None``.
    steps
        Outputs of the neighbour layers of each member, (layers, n, width); ``None`` for a section in windows, where
        those of a block are made when it is decoded.
    """

    inputs: SectionInputs
    embeddings: list[np.ndarray]
    closed: np.ndarray | None
    steps: list[Tensor] | None
