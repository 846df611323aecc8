"""A small section with a stored prediction, made by hand: plots must not depend on models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spatialdata import SpatialData

mpl.use("Agg")

GENES = ("EPCAM", "CD4", "COL1A1")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def make_section(*, measured_genes: tuple[str, ...] = (*GENES, "ACTB")) -> SpatialData:
    from anndata import AnnData
    from scipy import sparse
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    from hespotex.data.provenance import record
    from hespotex.data.stored import write_prediction

    rng = np.random.default_rng(0)
    to = {"global": Identity(), "microns": Scale([0.5, 0.5], axes=("x", "y"))}
    pixels = rng.integers(150, 250, (3, 120, 160), dtype=np.uint8)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=to)
    grid = np.stack(np.meshgrid(np.arange(20, 160, 20), np.arange(20, 120, 20)), axis=-1).reshape(-1, 2).astype(float)
    ids = [f"s{i}" for i in range(len(grid))]
    spots = ShapesModel.parse(grid, geometry=0, radius=7.0, index=pd.Index(ids), transformations=dict(to))
    counts = rng.poisson(5, (len(grid), len(measured_genes))) * (1 + (grid[:, :1] > 80) * 3)
    adata = AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"region": pd.Categorical(["spots"] * len(grid)), "spot_id": ids}, index=ids),
        var=pd.DataFrame(index=list(measured_genes)),
        obsm={"spatial": grid},
    )
    table = TableModel.parse(adata, region="spots", region_key="region", instance_key="spot_id")
    values = np.column_stack([grid[:, 0] / 40, grid[:, 1] / 40, np.ones(len(grid))]).astype(np.float32)
    form = write_prediction(table, "ridge", values, GENES, {}, own_table=False)
    record(table, "ridge", kind="prediction", form=form, unit="log1p_cp10k", genes=list(GENES), created_by="test")
    return SpatialData(images={"image": image}, shapes={"spots": spots}, tables={"table": table})


@pytest.fixture
def section() -> SpatialData:
    return make_section()
