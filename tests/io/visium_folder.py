"""Writes a Space Ranger output folder, as 10x Visium lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from spatialdata import SpatialData


def write_visium_folder(folder: Path, sdata: SpatialData, *, mpp: float, dataset_id: str = "sample") -> Path:
    """Write a synthetic section as Space Ranger would and return the path of the full-resolution image."""
    import h5py
    import pandas as pd
    import tifffile
    from PIL import Image

    table = sdata["table"]
    image = sdata["image"]
    pixels = np.moveaxis(np.asarray(image.data if hasattr(image, "data") else image["scale0"]["image"].data), 0, -1)
    barcodes = [f"{_barcode(i)}-1" for i in range(table.n_obs)]
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)

    counts = table.X.T.tocsc()  # features x barcodes
    with h5py.File(folder / f"{dataset_id}_filtered_feature_bc_matrix.h5", "w") as file:
        # what anndata's and spatialdata-io's readers ask of a Cell Ranger 3 file
        file.attrs["library_ids"] = np.array([dataset_id.encode()])
        file.attrs["chemistry_description"] = "Spatial 3' v1"
        file.attrs["software_version"] = "spaceranger-2.0.0"
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        matrix["data"], matrix["indices"], matrix["indptr"] = counts.data, counts.indices, counts.indptr
        matrix["shape"] = np.array(counts.shape, dtype=np.int32)
        features = matrix.create_group("features")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(table.n_vars)], dtype="S")
        features["name"] = np.array(table.var_names.to_list(), dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * table.n_vars, dtype="S")
        features["genome"] = np.array(["synthetic"] * table.n_vars, dtype="S")
        features["_all_tag_keys"] = np.array([b"genome"])

    xy = np.round(table.obsm["spatial"]).astype(int)
    pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": 1,
            "array_row": table.obs["array_row"].to_numpy(),
            "array_col": table.obs["array_col"].to_numpy(),
            "pxl_row_in_fullres": xy[:, 1],
            "pxl_col_in_fullres": xy[:, 0],
        }
    ).to_csv(spatial / "tissue_positions.csv", index=False)

    height, width = pixels.shape[:2]
    diameter = 2 * float(sdata["spots"]["radius"].iloc[0])
    scales = {"spot_diameter_fullres": diameter, "fiducial_diameter_fullres": diameter * 1.6}
    for kind, side in (("hires", 400), ("lowres", 120)):
        factor = side / max(height, width)
        scales[f"tissue_{kind}_scalef"] = factor
        small = Image.fromarray(np.ascontiguousarray(pixels))
        small.resize((round(width * factor), round(height * factor))).save(spatial / f"tissue_{kind}_image.png")
    (spatial / "scalefactors_json.json").write_text(json.dumps(scales))

    fullres = folder / "tissue_full_image.tif"
    tifffile.imwrite(fullres, pixels, photometric="rgb", resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER")
    return fullres


def _barcode(number: int) -> str:
    """Sixteen letters, one per base-4 digit."""
    return "".join("ACGT"[(number >> (2 * digit)) & 3] for digit in range(16))
