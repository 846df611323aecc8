"""Writes a Space Ranger output folder, as 10x Visium HD lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy import sparse

PITCH_UM = 2.0


def write_matrix(
    path: Path, counts: sparse.csr_matrix, barcodes: list[str], features: list[tuple[str, str, str]]
) -> None:
    """A feature-barcode matrix of Cell Ranger 3; `features` are (id, name, type)."""
    import h5py

    transposed = counts.T.tocsc()  # features x barcodes
    with h5py.File(path, "w") as file:
        file.attrs["library_ids"] = np.array([b"sample"])
        file.attrs["chemistry_description"] = "Visium HD"
        file.attrs["software_version"] = "spaceranger-3.1.2"
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        matrix["data"] = transposed.data.astype(np.int32)
        matrix["indices"], matrix["indptr"] = transposed.indices.astype(np.int64), transposed.indptr.astype(np.int64)
        matrix["shape"] = np.array(transposed.shape, dtype=np.int32)
        group = matrix.create_group("features")
        for key, values in zip(("id", "name", "feature_type"), zip(*features, strict=True), strict=True):
            group[key] = np.array(values, dtype="S")
        group["genome"] = np.array(["GRCh38"] * len(features), dtype="S")
        group["_all_tag_keys"] = np.array([b"genome"])


def write_visium_hd_folder(
    folder: Path,
    pixels: np.ndarray,
    counts: dict[int, sparse.csr_matrix],
    positions: dict[int, tuple[np.ndarray, np.ndarray]],
    *,
    mpp: float,
    genes: list[str],
    prefix: str = "",
) -> Path:
    """Write `counts` of bins by their size in µm, and return the path of the microscope image.

    `positions` are rows and columns of the array (n, 2), and x and y in pixels of `pixels` (h, w, 3), (n, 2).
    """
    import h5py
    import pandas as pd
    import tifffile
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    layout = {"file_format": "1.0", "transform": np.eye(3).ravel().tolist()}
    matrices = {
        f"{a}_colrow_to_{b}_colrow": np.eye(3).ravel().tolist()
        for a, b in (("cytassist", "spot"), ("spot", "cytassist"), ("microscope", "spot"), ("spot", "microscope"))
    }
    metadata = {"hd_layout_json": json.dumps(layout), "transform_matrices": matrices}
    with h5py.File(folder / f"{prefix}feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps(metadata)
    height, width = pixels.shape[:2]
    factors = {kind: side / max(height, width) for kind, side in (("hires", 400), ("lowres", 120))}
    features = [(f"ENSG{number:011d}", name, "Gene Expression") for number, name in enumerate(genes)]
    for size, matrix in counts.items():
        bins = folder / "binned_outputs" / f"square_{size:03d}um"
        (bins / "spatial").mkdir(parents=True)
        array, xy = positions[size]
        barcodes = [f"s_{size:03d}um_{row:05d}_{column:05d}-1" for row, column in array]
        write_matrix(bins / "filtered_feature_bc_matrix.h5", matrix, barcodes, features)
        shuffled = np.random.default_rng(size).permutation(len(barcodes))  # the order of the two files differs
        pd.DataFrame(
            {
                "barcode": np.array(barcodes)[shuffled],
                "in_tissue": 1,
                "array_row": array[shuffled, 0],
                "array_col": array[shuffled, 1],
                "pxl_row_in_fullres": xy[shuffled, 1],
                "pxl_col_in_fullres": xy[shuffled, 0],
            }
        ).to_parquet(bins / "spatial" / "tissue_positions.parquet")
        scales = {
            "spot_diameter_fullres": size / mpp,
            "bin_size_um": float(size),
            "microns_per_pixel": mpp,
            "regist_target_img_scalef": factors["hires"],
            "fiducial_diameter_fullres": 100 / mpp,
            **{f"tissue_{kind}_scalef": factor for kind, factor in factors.items()},
        }
        (bins / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
        for kind, factor in factors.items():
            small = Image.fromarray(pixels).resize((round(width * factor), round(height * factor)))
            small.save(bins / "spatial" / f"tissue_{kind}_image.png")
    image = folder / "microscope_image" / "sample.btf"
    image.parent.mkdir()
    tifffile.imwrite(image, pixels, photometric="rgb", tile=(256, 256), bigtiff=True)
    return image
