"""The protocol every method follows: fit on sections, predict a section in row blocks, give and take its state."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np

from ..data.blockwise import check_fits
from ..data.section import Level, Prediction, Section
from ..errors import DataTypeError, DataValueError, ModelMismatchError
from ._distributed import fit_together, sized
from ._recipe import Recipe

__all__ = ["NEEDS", "Model", "ModelInfo", "Run", "Task", "check_sections"]

Config = TypeVar("Config")

Task = Literal["transfer", "in-sample", "both"]  # other sections by their image, the section's own finer level, or both

NEEDS = {
    "embedding": "features of the observations",
    "graph": "neighbour graph of the observations",
    "nuclei": "number of nuclei of each observation",
    "parts": "nuclei or superpixels with features",
    "positions": "nuclei, superpixels or positions of a lattice, without features",
    "colour": "mean colour of the superpixels",
    "expression": "measured expression, also to predict",
}


@dataclass(frozen=True)
class ModelInfo:
    """What a method needs and does; shown by :func:`hespotex.models.available`."""

    name: str
    summary: str
    level: Level = "spot"
    task: Task = "transfer"
    needs: tuple[str, ...] = ("embedding",)  # of NEEDS
    trained: bool = True  # False: hx.tl.predict(sdata, name) works at once
    uncertainty: bool = False
    distributed: bool = False  # whether the batches of its fit can be shared out among devices
    in_memory: int = 0  # dense copies of the training expression that its fit holds at a time; 0: it reads row blocks
    cost: str = ""  # of a fit on one her2st section on two CPU cores, and how it grows
    presets: tuple[str, ...] = ()
    paper: str = ""  # DOI; else where it was published


@dataclass(frozen=True)
class Run:
    """How to fit, as opposed to what: nothing here changes the method but for the batches that one step sees."""

    seed: int = 0
    device: str = "auto"
    precision: str | None = None  # Lightning's word; None: 16-bit mixed on CUDA, 32-bit elsewhere
    progress_bar: bool = False
    checkpoint_dir: Path | None = None  # where an interrupted fit resumes from
    devices: int | Literal["auto"] = 1  # of each machine, with a process each; "auto": all CUDA devices
    num_nodes: int = 1  # machines
    accumulate_grad_batches: int = 1  # batches of each process whose mean gradient makes a step

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes", "accumulate_grad_batches"):
            value = getattr(self, name)
            if name == "devices" and value == "auto":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                wanted = "a whole number of at least 1" + (", or 'auto'" if name == "devices" else "")
                raise DataValueError(f"{name}={value!r} must be {wanted}")

    @property
    def n_processes(self) -> int:
        """Processes that fit together."""
        return 1 if self.devices == "auto" else self.devices * self.num_nodes

    @property
    def per_step(self) -> int:
        """Batches whose mean gradient makes a step."""
        return self.n_processes * self.accumulate_grad_batches


class Model(ABC, Generic[Config]):
    """Base of all methods.

    A subclass names its frozen config dataclass and its description, and implements :meth:`_fit`,
    :meth:`predict_blocks`, :meth:`state` and :meth:`load_state`.

    Parameters
    ----------
    config
        Instance of :attr:`Config`, a mapping of its fields, or ``None`` for the defaults.
    options
        Single fields of the config, overriding `config`.
    """

    Config: ClassVar[type]
    info: ClassVar[ModelInfo]

    def __init__(self, config: Any | Mapping[str, Any] | None = None, **options: Any) -> None:
        self.config: Config = _resolve_config(self.Config, config, options)
        self.recipe: Recipe | None = None  # set by tl.train and by loading
        self.genes: tuple[str, ...] = ()
        self.unit: str = ""
        self.n_features: int = 0
        self.history: list[dict[str, float]] = []  # one row per epoch, for pl.training
        self.scores: dict[str, float] = {}  # of choices inside the training sections, kept in the recipe
        self.fitted_on: tuple[str, ...] = ()  # marks of the sections, by which an in-sample method knows its own
        self._fitted = False

    @classmethod
    def preset(cls, name: str) -> Any:
        """Config of a named preset; the base knows only ``"default"``."""
        if name != "default":
            raise DataValueError(f"preset={name!r} is unknown to {cls.info.name!r}; it has 'default'")
        return cls.Config()

    @property
    def is_fitted(self) -> bool:
        """Whether a fit (or loading) came to its end; an interrupted one leaves an unfitted model."""
        return self._fitted

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a section this model reads, of :data:`NEEDS`; its config may decide."""
        return getattr(self.config, "needs", self.info.needs)

    @property
    def level(self) -> Level:
        """What a row of the prediction is; the config may decide."""
        return getattr(self.config, "level", self.info.level)

    @property
    def in_memory(self) -> int:
        """Dense float32 copies of the training expression that a fit holds at a time; the config may decide."""
        return getattr(self.config, "in_memory", self.info.in_memory)

    @property
    def reads_parts(self) -> bool:
        """Whether the model predicts for the parts of a section rather than for its observations."""
        return bool({"parts", "positions"} & set(self.needs))

    def with_options(self, **options: Any) -> Self:
        """The same fitted model with other settings of *prediction*, those in ``Config.at_prediction``.

        Raises
        ------
        DataValueError
            If an option is not one of prediction, so that it would need another fit.
        """
        allowed = tuple(getattr(self.Config, "at_prediction", ()))
        if unknown := sorted(set(options) - set(allowed)):
            has = f"it has {', '.join(allowed)}" if allowed else "it has none"
            raise DataValueError(
                f"{', '.join(map(repr, unknown))}: no option of prediction with {self.info.name!r}; {has}"
            )
        changed = copy(self)
        changed.config = _resolve_config(self.Config, self.config, options)
        return changed

    def fit(self, sections: Sequence[Section], run: Run | None = None) -> Self:
        """Fit on `sections`, all of which carry targets of the same genes in the same unit.

        Raises
        ------
        DataValueError
            If the expression would not fit into memory, with a method that reads all of it at once.
        """
        run = sized(run or Run(), self)
        self._fitted, self.recipe = False, None
        self.genes, self.unit, self.n_features = check_sections(sections, self.needs)
        self._check_memory(sections)
        self.fitted_on = tuple(map(_mark, sections)) if self.info.task == "in-sample" else ()
        self.history, self.scores = [], {}
        fit_together(self, sections, run)
        self._fitted = True
        return self

    @abstractmethod
    def _fit(self, sections: Sequence[Section], run: Run) -> None:
        """Fit on sections that were checked; genes, unit and width of the features are set."""

    @abstractmethod
    def predict_blocks(self, section: Section, *, block_rows: int = 8192) -> Iterator[Prediction]:
        """Yield the prediction in consecutive row blocks of at most `block_rows`."""

    @abstractmethod
    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Fitted state: arrays by name, and plain JSON values."""

    @abstractmethod
    def load_state(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`; the config is already set."""

    def predict(self, section: Section, *, block_rows: int = 8192) -> Prediction:
        """Predict all observations of `section`, with or without measured expression."""
        return Prediction.concatenate(list(self.predict_blocks(section, block_rows=block_rows)))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the fitted model as a folder of safetensors and JSON; see :func:`hespotex.models.load`."""
        from ._checkpoint import save

        return save(self, path, overwrite=overwrite)

    def _check_memory(self, sections: Sequence[Section]) -> None:
        """Raise if the expression that the fit reads at once would not fit into memory."""
        sizes = [section.n_obs for section in sections]
        n_obs = max(sizes) if self.info.task == "in-sample" else sum(sizes)  # the former are fitted one by one
        in_blocks = ", or take a method that reads expression in blocks: 'ridge', or 'hespotex' as it is by default"
        others = "" if self.reads_parts or self.info.task == "in-sample" else in_blocks
        check_fits(
            n_obs,
            len(self.genes),
            self.in_memory,
            f"training {self.info.name!r}: expression",
            "Take at most {genes} genes, by genes= or in hx.tl.train by n_top_genes=" + others,
        )

    def _check_section(self, section: Section) -> None:
        """Raise unless `section` fits the fitted model."""
        if not self.is_fitted:
            raise ModelMismatchError(f"this {self.info.name!r} model is not fitted; call hx.tl.train first")
        width = _width(section, self.needs)
        if width != self.n_features and {"embedding", "parts"} & set(self.needs):
            each = "part" if self.reads_parts else "observation"
            raise ModelMismatchError(
                f"section {section.name!r} has {width} features per {each}, the model was trained on "
                f"{self.n_features}; embed it with the model's own encoder: hx.tl.predict(sdata, model)"
            )
        if "colour" in self.needs:
            section.require_parts().require("colour")
        if "expression" in self.needs:
            targets = section.require_targets()
            if targets.genes != self.genes or targets.unit != self.unit:
                raise ModelMismatchError(f"section {section.name!r} differs from the model in genes or unit")
        if self.info.task == "in-sample" and _mark(section) not in self.fitted_on:
            raise ModelMismatchError(
                f"{self.info.name!r} predicts only the section it was fitted on, and {section.name!r} is another; fit "
                f"one for it, hx.tl.train(sdata, {self.info.name!r}), or take a method whose task is 'transfer' or "
                "'both' in hx.models.available()"
            )

    def _number_of(self, section: Section) -> int:
        """Which of the sections that an in-sample method was fitted on `section` is."""
        return self.fitted_on.index(_mark(section))

    def __repr__(self) -> str:
        fitted = f"{len(self.genes)} genes, unit {self.unit!r}" if self.is_fitted else "not fitted"
        return f"{type(self).__name__}({fitted})"


def _width(section: Section, needs: Sequence[str]) -> int:
    """Number of features that a model with these needs reads, of the parts or of the observations."""
    if {"parts", "positions"} & set(needs):
        parts = section.require_parts()
        return int(parts.require("features").shape[1]) if "parts" in needs else 0
    return int(section.features.shape[1]) if "embedding" in needs else 0


def _mark(section: Section) -> str:
    """Equal for one section whatever it is called, different for different ones."""
    digest = hashlib.sha256("\n".join(map(str, section.ids)).encode())
    digest.update(np.ascontiguousarray(np.round(np.asarray(section.coordinates, dtype=np.float64), 3)).data)
    return digest.hexdigest()[:16]


def check_sections(
    sections: Sequence[Section], needs: Sequence[str] = ("embedding",)
) -> tuple[tuple[str, ...], str, int]:
    """Genes, unit and feature width that all training sections agree on, or an error."""
    if isinstance(sections, Section):
        raise DataTypeError("sections must be a sequence of Section, got a single Section; wrap it in a list")
    if not sections:
        raise DataValueError("sections is empty: at least one section is needed to fit a model")
    first = sections[0].require_targets()
    if not first.genes:
        raise DataValueError("the gene panel is empty; choose genes with hx.pp.select_genes")
    for section in sections:
        targets = section.require_targets()
        if targets.genes != first.genes or targets.unit != first.unit:
            raise DataValueError(f"section {section.name!r} differs from {sections[0].name!r} in genes or unit")
        if _width(section, needs) != _width(sections[0], needs):
            raise DataValueError(
                f"section {section.name!r} has {_width(section, needs)} features, "
                f"{sections[0].name!r} has {_width(sections[0], needs)}: embed both with one encoder"
            )
        if section.n_obs == 0:
            raise DataValueError(f"section {section.name!r} has no observations")
    names = [section.name for section in sections]
    if len(set(names)) != len(names):
        raise DataValueError(f"section names must be unique, got {names}")
    return first.genes, first.unit, _width(sections[0], needs)


def _resolve_config(kind: type, config: Any, options: Mapping[str, Any]) -> Any:
    """An instance of the config dataclass `kind` from an instance, a mapping or nothing, plus single options."""
    if config is None:
        config = {}
    if isinstance(config, kind):
        config = {each.name: getattr(config, each.name) for each in fields(kind)}
    if isinstance(config, Mapping):
        values = {**config, **options}
        known = {f.name for f in fields(kind)}
        if unknown := sorted(set(values) - known):
            raise DataValueError(
                f"{kind.__name__} has no option {', '.join(map(repr, unknown))}; it has {', '.join(sorted(known))}"
            )
        return kind(**values)
    raise DataTypeError(f"config must be a {kind.__name__}, a mapping or None, got {type(config).__name__}")


def config_to_json(config: Any) -> dict[str, Any]:
    """Plain JSON values of a config dataclass."""
    if not is_dataclass(config) or isinstance(config, type):
        raise DataTypeError(f"a model's config must be a dataclass, got {type(config).__name__}")
    return asdict(config)
