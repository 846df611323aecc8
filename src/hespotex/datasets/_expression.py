"""What the cells of a synthetic section express, and what an array of spots catches of it.

Expression is a product: activities of a few programmes in each cell times the genes of each programme.
Some programmes follow the type of a cell, which its nucleus shows; some follow its neighbours, or are a
threshold on its atypia; one leaves no trace in the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ._tissue import CELL_TYPES, Cells, Tissue

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = [
    "PROGRAMS",
    "Genome",
    "activities",
    "capture",
    "draw_counts",
    "make_genome",
    "patient_programs",
    "with_ambient",
]

_NICHE: Final = ("interferon", "invasion", "hypoxia", "proliferation")
PROGRAMS: Final = ("housekeeping", *CELL_TYPES, *_NICHE, "hidden")

_SHARES: Final = {"housekeeping": 0.20, "types": 0.46, "niche": 0.26, "hidden": 0.08}
_RNA_CONTENT: Final = {
    "tumour": 1.3,
    "epithelium": 1.3,
    "fibroblast": 1.9,
    "t_cell": 0.7,
    "b_cell": 0.8,
    "adipocyte": 4.0,
}
_CELL_NOISE = 0.35  # log sd of a cell's RNA content
_SPOT_NOISE = 0.40  # log sd of a spot's efficiency
_DISPERSION = 0.08  # variance = mean + 0.08 mean²
_BLEED_UM = 12.0  # how far transcripts wander before they are caught
_AMBIENT = 0.04


@dataclass(frozen=True, eq=False)
class Genome:
    """Genes of a world, shared by its patients.

    Attributes
    ----------
    names
        Names of the genes.
    program
        The programme each gene belongs to.
    programs
        Expression of each gene per unit of activity, (programmes, genes).
    """

    names: list[str]
    program: list[str]
    programs: np.ndarray


def make_genome(rng: np.random.Generator, n_genes: int) -> Genome:
    """Draw the genes of a world."""
    groups = {
        "housekeeping": ("housekeeping",),
        "types": CELL_TYPES,
        "niche": _NICHE,
        "hidden": ("hidden",),
    }
    weight = np.array([_SHARES[group] / len(members) for group, members in groups.items() for _ in members])
    order = [program for members in groups.values() for program in members]
    # quotas by rounding the cumulative shares: the same mixture at any number of genes
    quota = np.diff(np.round(np.concatenate([[0], np.cumsum(weight / weight.sum())]) * n_genes).astype(int))
    program = [name for name, number in zip(order, quota, strict=True) for _ in range(number)]
    names = [f"{name.upper()}{i + 1}" for name, number in zip(order, quota, strict=True) for i in range(number)]

    base = np.exp(rng.normal(0, 0.8, n_genes))
    programs = np.zeros((len(PROGRAMS), n_genes))
    own = np.array([PROGRAMS.index(name) for name in program])
    is_base = own == 0
    programs[0] = np.where(is_base, base, 0.55 * base)
    fold = np.exp(rng.normal(1.6, 0.5, n_genes))
    programs[own[~is_base], np.flatnonzero(~is_base)] += (base * fold)[~is_base]
    # no gene is constant over types
    types = slice(1, 1 + len(CELL_TYPES))
    programs[types] += base * 0.25 * np.abs(rng.normal(size=(len(CELL_TYPES), n_genes)))
    return Genome(names, program, programs)


def patient_programs(rng: np.random.Generator, genome: Genome, shift: float) -> np.ndarray:
    """Programmes of one patient: each gene has its own level, each programme its own strength."""
    n_programs, n_genes = genome.programs.shape
    level = np.exp(0.35 * shift * rng.normal(size=n_genes))
    strength = np.exp(shift * (0.20 * rng.normal(size=(n_programs, 1)) + 0.15 * rng.normal(size=(n_programs, n_genes))))
    return genome.programs * level * strength


def activities(rng: np.random.Generator, tissue: Tissue, cells: Cells) -> np.ndarray:
    """Activity of each programme in each cell, (cells, programmes)."""
    from scipy.spatial import cKDTree

    kind = cells.kind
    is_kind = {name: kind == code for code, name in enumerate(CELL_TYPES)}
    content = np.array([_RNA_CONTENT[name] for name in CELL_TYPES])[kind]
    content = content * (1 + 0.5 * cells.grade) * np.exp(rng.normal(0, _CELL_NOISE, len(kind)))

    level = np.zeros((len(kind), len(PROGRAMS)))
    level[:, 0] = 1
    level[np.arange(len(kind)), 1 + kind] = 1
    depth = tissue.sample(tissue.depth_in_tumour, cells.xy_um)
    tumour, stroma = is_kind["tumour"], is_kind["fibroblast"]
    contacts = np.zeros(len(kind))
    if is_kind["t_cell"].any():
        near = cKDTree(cells.xy_um[is_kind["t_cell"]]).query_ball_point(cells.xy_um, 35.0, return_length=True)
        contacts = np.asarray(near, dtype=float)
    column = PROGRAMS.index
    level[:, column("interferon")] = (tumour + 0.5 * stroma) * 2.2 * contacts / (contacts + 2)
    level[:, column("invasion")] = 2 * np.where(tumour, np.exp(-np.maximum(depth, 0) / 25), 0)
    level[:, column("invasion")] += 1.2 * np.where(stroma, np.exp(-np.maximum(-depth, 0) / 30), 0)
    level[:, column("hypoxia")] = 1.8 * tumour / (1 + np.exp(-(depth - 70) / 12))
    level[:, column("proliferation")] = 1.6 * tumour / (1 + np.exp(-(cells.grade - 0.55) / 0.06))
    level[:, column("hidden")] = np.exp(0.8 * tissue.sample(tissue.gradient, cells.xy_um) - 0.32)
    return level * content[:, None]


def capture(spots_um: np.ndarray, radius_um: float, cells_um: np.ndarray) -> csr_matrix:
    """Share of each cell that each spot catches, (spots, cells): all inside, less and less beyond the rim."""
    from scipy import sparse
    from scipy.spatial import cKDTree

    found = cKDTree(spots_um).sparse_distance_matrix(
        cKDTree(cells_um), radius_um + 3 * _BLEED_UM, output_type="coo_matrix"
    )
    beyond = np.maximum(found.data - radius_um, 0)
    share = np.exp(-0.5 * (beyond / _BLEED_UM) ** 2)
    return sparse.csr_matrix((share, (found.row, found.col)), shape=(len(spots_um), len(cells_um)))


def with_ambient(expected: np.ndarray) -> np.ndarray:
    """Expected expression of spots with the section's own soup in it."""
    return expected + _AMBIENT * expected.mean(axis=0)


def draw_counts(rng: np.random.Generator, expected: np.ndarray) -> np.ndarray:
    """Negative-binomial counts, each spot with its own efficiency."""
    efficiency = np.exp(rng.normal(0, _SPOT_NOISE, (len(expected), 1)))
    gamma = rng.gamma(1 / _DISPERSION, _DISPERSION, expected.shape)
    return rng.poisson(expected * efficiency * gamma).astype(np.int32)
