from __future__ import annotations

from pathlib import Path

import numpy as np

from .visium_folder import write_visium_folder


def test_spatialdata_io_reads_the_folder(tmp_path: Path, section) -> None:
    from spatialdata_io import visium

    image = write_visium_folder(tmp_path / "outs", section, mpp=0.5)
    sdata = visium(tmp_path / "outs", dataset_id="sample", fullres_image_file=image)
    full = sdata["sample_full_image"]
    pixels = np.asarray(full["scale0"]["image"] if hasattr(full, "children") else full)
    assert np.array_equal(pixels, section["image"].values)
    table = sdata["table"]
    assert np.array_equal(table.X.toarray(), section["table"].X.toarray())
    assert np.abs(table.obsm["spatial"] - section["table"].obsm["spatial"]).max() <= 0.5
