"""Writes a Xenium output folder (analysis 2.0), with an H&E image that lies turned beside it."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .visium_hd_folder import write_matrix

if TYPE_CHECKING:
    from scipy import sparse

PIXEL_UM = 0.2125
CONTROLS = [
    ("NegControlProbe_00001", "NegControlProbe_00001", "Negative Control Probe"),
    ("NegControlCodeword_0500", "NegControlCodeword_0500", "Negative Control Codeword"),
    ("UnassignedCodeword_0001", "UnassignedCodeword_0001", "Unassigned Codeword"),
    ("UnassignedCodeword_0002", "UnassignedCodeword_0002", "Unassigned Codeword"),
]


def cell_names(n: int) -> tuple[np.ndarray, list[str]]:
    """Ids of cells as numbers (n, 2) and as letters: hexadecimal digits, shifted to a-p."""
    prefixes = np.arange(n, dtype=np.uint32) * 1001 + 17
    letters = ["".join(chr(ord("a") + int(digit, 16)) for digit in f"{prefix:08x}") for prefix in prefixes]
    return np.column_stack([prefixes, np.ones(n, np.uint32)]), [f"{name}-1" for name in letters]


def write_xenium_folder(
    folder: Path,
    microns: np.ndarray,
    counts: sparse.csr_matrix,
    genes: list[str],
    *,
    side_um: float = 8.0,
    pixels: np.ndarray | None = None,
    alignment: np.ndarray | None = None,
    mpp: float | None = None,
) -> list[str]:
    """Write square cells with centres at `microns` (n, 2), whose nuclei are half as wide; returns their ids.

    `pixels` (h, w, 3) are the H&E image, of `mpp` if that is to be stated, and `alignment` (3, 3) takes its pixels to those
    of the morphology image.
    """
    import pandas as pd
    import tifffile
    import zarr
    from scipy import sparse

    folder.mkdir(parents=True, exist_ok=True)
    n = len(microns)
    numbers, names = cell_names(n)
    specs = {
        "analysis_sw_version": "xenium-2.0.0.10",
        "pixel_size": PIXEL_UM,
        "region_name": "core-1",
        "run_name": "run",
        "num_cells": n,
    }
    (folder / "experiment.xenium").write_text(json.dumps(specs))
    features = [(f"ENSG{number:011d}", name, "Gene Expression") for number, name in enumerate(genes)]
    controls = sparse.csr_matrix(np.random.default_rng(0).poisson(1, (n, len(CONTROLS))))
    write_matrix(
        folder / "cell_feature_matrix.h5", sparse.hstack([counts, controls], format="csr"), names, features + CONTROLS
    )
    pd.DataFrame(
        {
            "cell_id": names,
            "x_centroid": microns[:, 0],
            "y_centroid": microns[:, 1],
            "transcript_counts": np.asarray(counts.sum(axis=1)).ravel(),
            "control_probe_counts": np.asarray(controls.sum(axis=1)).ravel(),
            "total_counts": np.asarray(counts.sum(axis=1)).ravel(),
            "cell_area": side_um**2,
            "nucleus_area": side_um**2 / 4,
        }
    ).to_parquet(folder / "cells.parquet")
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) / 2
    for file, side in (("cell_boundaries", side_um), ("nucleus_boundaries", side_um / 2)):
        vertices = (microns[:, None] + corners[None] * side).reshape(-1, 2)
        pd.DataFrame(
            {
                "cell_id": np.repeat(names, len(corners)),
                "vertex_x": vertices[:, 0].astype(np.float32),
                "vertex_y": vertices[:, 1].astype(np.float32),
                "label_id": np.repeat(np.arange(1, n + 1, dtype=np.uint32), len(corners)),
            }
        ).to_parquet(folder / f"{file}.parquet")
    pd.DataFrame(
        {
            "transcript_id": np.arange(3 * n, dtype=np.uint64),
            "cell_id": np.repeat(names, 3),
            "overlaps_nucleus": np.uint8(1),
            "feature_name": np.resize(genes, 3 * n),
            "x_location": np.repeat(microns[:, 0], 3).astype(np.float32),
            "y_location": np.repeat(microns[:, 1], 3).astype(np.float32),
            "z_location": np.float32(10),
            "qv": np.float32(40),
        }
    ).to_parquet(folder / "transcripts.parquet")
    scratch = folder / "cells.zarr"
    root = zarr.open_group(scratch, mode="w", zarr_format=2)
    root["cell_id"] = numbers
    summary = root.create_array("cell_summary", shape=(n, 8), dtype="f8")
    columns = ["cell_centroid_x", "cell_centroid_y", "cell_area", "nucleus_centroid_x", "nucleus_centroid_y"]
    summary.attrs["column_names"] = [*columns, "nucleus_area", "z_level", "nucleus_count"]
    summary[:] = np.column_stack([microns, np.full(n, side_um**2), microns, np.full((n, 3), 1.0)])
    for index in ("0", "1"):
        root[f"masks/{index}"] = np.zeros((8, 8), np.uint32)
        root[f"polygon_sets/{index}/cell_index"] = np.arange(n, dtype=np.uint32)
    with zipfile.ZipFile(folder / "cells.zarr.zip", "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(scratch.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(scratch))
    shutil.rmtree(scratch)
    if pixels is not None:
        scale = {} if mpp is None else {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
        tifffile.imwrite(
            folder / "sample_he_image.ome.tif",
            pixels,
            photometric="rgb",
            tile=(256, 256),
            metadata={"axes": "YXS", **scale},
        )
    if alignment is not None:
        np.savetxt(folder / "sample_he_imagealignment.csv", alignment, delimiter=",")
    return names
