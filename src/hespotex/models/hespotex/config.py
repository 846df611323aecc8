"""What can be chosen about HESpotEx: each switch, its published value and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...data.units import check_unit
from ...errors import DataValueError
from .._config import check_choices, check_least

__all__ = ["PAPER", "HESpotExConfig"]

Standardize = Literal["none", "global", "section"]
Nuclei = Literal["none", "multiply", "multiply_legacy", "feature"]
Graph = Literal["lattice", "legacy"]
GateOrder = Literal["joint", "sequential"]
Tying = Literal["shared", "legacy"]
LayerOrder = Literal["parallel", "chained"]
Regression = Literal["none", "linear", "kernel"]
Stopping = Literal["fixed", "inner"]
Output = Literal["none", "clip", "shift"]

_CHOICES: dict[str, Any] = {
    "standardize": Standardize,
    "nuclei": Nuclei,
    "graph": Graph,
    "gate_graph": Graph,
    "gate_order": GateOrder,
    "gate_tying": Tying,
    "layer_order": LayerOrder,
    "regression": Regression,
    "stopping": Stopping,
    "output": Output,
}


@dataclass(frozen=True)
class HESpotExConfig:
    """Settings of :class:`HESpotEx`; the defaults are ours, ``preset="paper"`` gives the published ones.

    Attributes
    ----------
    unit
        Unit of the targets that :func:`hespotex.tl.train` uses for this model.
    gene_selection
        Keyword arguments of :func:`hespotex.pp.select_genes` that it chooses the genes with.
    standardize
        Image features as they come (``"none"``); or in units of their spread in training, after subtraction of
        their mean over all training observations (``"global"``) or over their own section (``"section"``, against
        stain shift).
    context
        Rounds of averaging over the ring of spots around, whose results are appended to the image features.
    input_rank
        Principal components of these features that are kept; ``None``: the features themselves.
    nuclei
        ``"multiply"``: the prediction is multiplied by a factor in [1, 2] from the number of nuclei, against a
        reference count of the training sections; ``"multiply_legacy"``: by the published factor, from the label
        count of the patch window against the section's own maximum; ``"feature"``: the number of nuclei is
        appended to the image features; ``"none"``.
    graph
        Decoder graph: the section's own symmetric lattice graph, or the published directed graph of the four
        nearest on integer pixels.
    legacy_self_subtraction
        Neighbour term (Σ neighbours − self) / (k − 1) as the published code computes it, in place of the mean.
    align_weight
        Weight of the alignment of patch embeddings with spot embeddings; 0 leaves the expression stream out.
    standardize_alignment
        Scale each dimension of the spot embeddings over all training spots before aligning.
    gate_graph
        Graph of the expression stream: the section's lattice graph, or the published seven nearest, symmetric.
    gate_order
        ``"joint"``: each epoch visits all sections, which are then embedded with the final weights;
        ``"sequential"``: as published, one section after another, each embedded when its turn ends.
    gate_tying
        See :class:`hespotex.models.nn.gate.GATE`.
    gate_hidden, gate_epochs, gate_lr, gate_weight_decay, gate_clip
        Width and training of the expression stream; epochs per section.
    width, head_width, dropout
        Width of the embeddings; hidden width of and dropout in the two heads of the image stream.
    n_layers, layer_order
        Neighbour layers; ``"parallel"`` as in the published code, ``"chained"`` as in the published figure.
    jk_hidden
        Hidden size of the LSTM; ``None`` is the number of outputs, as published, whose cost grows with its square.
    scale_genes
        Learn every gene in units of its spread over the training observations.
    target_ranks
        Learn principal components of the training targets in place of the genes: as many as the best of these
        candidates, by a ridge regression on left-out training groups; empty: the genes.
    center_targets
        Learn each section's expression about its own mean and predict about the mean of all: the level of a section
        is a matter of depth and staining, and inputs centred per section cannot tell it.
    regression
        A regression in closed form on the same inputs that joins the networks: ``"linear"`` (ridge), ``"kernel"``
        (with a Gaussian kernel beside the linear one), or ``"none"``.
    regression_share
        Its share of the prediction.
    n_landmarks
        Training observations that the kernel is spanned by.
    n_members
        Networks trained side by side, whose predictions are averaged.
    epochs, lr, weight_decay
        Training of the image stream.
    stopping
        ``"fixed"``: all `epochs`; ``"inner"``: the number of epochs, at most `epochs`, is chosen by leaving out
        groups of the training sections.
    inner_folds
        Largest number of folds of that choice.
    output
        Predictions as they come, clipped to the values the unit can take (``"clip"``), or less their minimum over
        the section, as published (``"shift"``).
    mixed_precision
        Whether 16-bit mixed precision may be used on a GPU.
    chunk
        Observations decoded at a time in training; bounds memory, changes no result.
    window
        Sections of more observations are worked on in compact windows of at most so many, together with the neighbours
        their numbers depend on: each window is a step of the optimiser, and memory does not grow with the section.
        ``None`` takes every section whole, as published.
    """

    unit: str = "log1p_cp10k"
    gene_selection: Mapping[str, Any] = field(default_factory=dict)
    standardize: Standardize = "section"
    context: int = 2
    input_rank: int | None = 512
    nuclei: Nuclei = "none"
    graph: Graph = "lattice"
    legacy_self_subtraction: bool = False
    align_weight: float = 0.1
    standardize_alignment: bool = True
    gate_graph: Graph = "lattice"
    gate_order: GateOrder = "joint"
    gate_tying: Tying = "shared"
    gate_hidden: int = 128
    gate_epochs: int = 30
    gate_lr: float = 1e-3
    gate_weight_decay: float = 1e-4
    gate_clip: float = 5.0
    width: int = 64
    head_width: int = 128
    dropout: float = 0.2
    n_layers: int = 4
    layer_order: LayerOrder = "parallel"
    jk_hidden: int | None = 32
    scale_genes: bool = False
    target_ranks: tuple[int, ...] = (5, 8, 16, 32)
    center_targets: bool = True
    regression: Regression = "kernel"
    regression_share: float = 0.5
    n_landmarks: int = 1024
    n_members: int = 3
    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-2
    stopping: Stopping = "fixed"
    inner_folds: int = 3
    output: Output = "clip"
    mixed_precision: bool = True
    chunk: int = 16384
    window: int | None = 65536

    def __post_init__(self) -> None:
        check_unit(self.unit)
        object.__setattr__(self, "target_ranks", tuple(map(int, self.target_ranks)))
        if any(rank < 1 for rank in self.target_ranks):
            raise DataValueError(f"target_ranks={self.target_ranks} must be at least 1 each")
        check_choices(self, _CHOICES)
        check_least(self, _LEAST)
        if not 0 <= self.dropout < 1:
            raise DataValueError(f"dropout={self.dropout!r} must be in [0, 1)")
        if not 0 <= self.regression_share <= 1:
            raise DataValueError(f"regression_share={self.regression_share!r} must be in [0, 1]")
        own_scale = self.target_ranks or self.scale_genes or self.center_targets or self.regression != "none"
        if self.nuclei.startswith("multiply") and own_scale:
            raise DataValueError(
                f"nuclei={self.nuclei!r} multiplies expression itself: it goes with target_ranks=(), scale_genes=False, "
                "center_targets=False and regression='none'"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a section these settings read besides its embedding."""
        uses_lattice = self.graph == "lattice" or self.context > 0
        uses_lattice = uses_lattice or (self.align_weight > 0 and self.gate_graph == "lattice")
        needs = ["embedding"]
        if uses_lattice:
            needs.append("graph")
        if self.nuclei != "none":
            needs.append("nuclei")
        return tuple(needs)

    @property
    def in_memory(self) -> int:
        """Dense copies of the training expression: without components to learn, all genes are kept."""
        return 0 if self.target_ranks else 1


_LEAST: dict[str, float] = {
    "context": 0,
    "input_rank": 1,
    "align_weight": 0,
    "gate_hidden": 1,
    "gate_epochs": 1,
    "width": 1,
    "head_width": 1,
    "n_layers": 1,
    "jk_hidden": 1,
    "n_landmarks": 2,
    "n_members": 1,
    "epochs": 1,
    "inner_folds": 2,
    "chunk": 1,
    "window": 64,
}

# What the authors do, less what looks at the section to be predicted: panel, expression stream and the choice of the
# epoch are fitted on the training sections. Their filter of 1,000 spots of 42,212 is the same fraction of training spots.
PAPER = HESpotExConfig(
    unit="log1p_cpm_panel",
    gene_selection={"method": "hvg", "n_top": 1000},
    standardize="none",
    context=0,
    input_rank=None,
    nuclei="multiply_legacy",
    graph="legacy",
    legacy_self_subtraction=True,
    align_weight=1.0,
    standardize_alignment=False,
    gate_graph="legacy",
    gate_order="sequential",
    gate_tying="legacy",
    gate_hidden=512,
    gate_epochs=500,
    head_width=1024,
    dropout=0.0,
    jk_hidden=None,
    scale_genes=False,
    target_ranks=(),
    center_targets=False,
    regression="none",
    n_members=1,
    epochs=30,
    stopping="fixed",
    output="shift",
    weight_decay=1e-3,
    mixed_precision=False,
    chunk=4096,
    window=None,
)
