"""Cost of predicting a whole section at 8 µm: 680,000 superpixels × 1,000 genes, and two and four such sections.

    python benchmarks/fine_scale.py               # 1, 2 and 4 sections of 92 megapixels
    python benchmarks/fine_scale.py --areas 1     # one

The slide is a synthetic section repeated to 9,600 × 9,600 pixels of 0.6877 µm, with spots 200 µm apart and random
counts: nothing is scored. Every size runs in a process of its own. Predictions are written to disk block by block;
"result" is what they hold, which memory must not grow with.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

SIDE_PX, MPP, N_GENES, PITCH_UM = 9600, 0.6877, 1000, 200.0
RESULTS = Path(__file__).parent / "results" / "fine_scale"


def slide(sections: int):
    """Image, spots and tissue of `sections` times 92 megapixels."""
    import anndata as ad
    import dask.array as da
    import pandas as pd
    import shapely
    from geopandas import GeoDataFrame
    from scipy import sparse
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import get_transformation

    import hespotex as hx
    from hespotex.io._assemble import build_section

    columns, rows = (1, 1) if sections == 1 else (2, 1) if sections == 2 else (2, 2)
    piece = np.asarray(hx.datasets.synthetic(size_px=2400, n_genes=20, seed=0)["image"]["scale0"]["image"].data)
    base = da.from_array(piece, chunks=(3, 1200, 1200))
    side = SIDE_PX // 2400
    image = da.tile(base, (1, side * rows, side * columns))
    height, width = image.shape[1:]
    ticks = [np.arange(PITCH_UM / 2, size * MPP - PITCH_UM / 4, PITCH_UM) for size in (width, height)]
    x, y = np.meshgrid(*ticks)
    xy = np.column_stack([x.ravel(), y.ravel()]) / MPP
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.5, size=(len(xy), N_GENES)).astype(np.int32))
    table = ad.AnnData(
        counts,
        obs=pd.DataFrame(index=[f"s{i}" for i in range(len(xy))]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]),
    )
    sdata = build_section(
        [image], table, xy, mpp=MPP, radius_px=50 / MPP, attrs={"name": "big", "patient": "big"}, advice=""
    )
    sdata["tissue"] = ShapesModel.parse(
        GeoDataFrame(geometry=[shapely.box(0, 0, width, height)]),
        transformations=get_transformation(sdata["spots"], get_all=True),
    )
    return sdata


def run(sections: int, path: str) -> None:
    """Seconds and peak memory of every stage."""
    warnings.simplefilter("ignore")
    import hespotex as hx

    hx.settings.progress_bar = False
    sdata = slide(sections)
    genes = list(sdata["table"].var_names)
    row: dict = {"sections": sections, "megapixels": sections * SIDE_PX**2 / 1e6, "spots": sdata["table"].n_obs}

    def stage(name: str, action) -> object:
        start = time.perf_counter()
        result = action()
        row[f"{name}_s"] = round(time.perf_counter() - start, 1)
        row[f"{name}_peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        print(name, row[f"{name}_s"], row[f"{name}_peak_gb"], flush=True)
        return result

    stage("superpixels", lambda: hx.pp.superpixels(sdata, 8))
    row["superpixels"] = len(sdata["superpixels"])
    row["result_gb"] = round(row["superpixels"] * N_GENES * 4 / 1e9, 2)
    stage("rgb", lambda: hx.pp.embed(sdata, "rgb", shapes_key="superpixels", tile_um=8))
    folder = Path(tempfile.mkdtemp(dir=RESULTS))
    try:
        stage("tesla", lambda: hx.tl.predict(sdata, "tesla", genes=genes, target=folder / "tesla.zarr"))
        stage(
            "morphology",
            lambda: hx.pp.embed(sdata, "morphology", shapes_key="superpixels", tile_um=16, context_um=0),
        )
        model = stage("train", lambda: hx.tl.train(sdata, "ridge_parts", genes=genes))
        stage("predict", lambda: hx.tl.predict(sdata, model, target=folder / "ridge.zarr"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Path(path).write_text(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--areas", nargs="*", type=int, default=[1, 2, 4], choices=[1, 2, 4])
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for sections in args.areas:
        path = RESULTS / f"{sections}.json"
        if not path.exists():
            code = "import sys; sys.path.insert(0, sys.argv[1]); import fine_scale as f; f.run(int(sys.argv[2]), sys.argv[3])"
            command = [sys.executable, "-c", code, str(Path(__file__).parent), str(sections), str(path)]
            subprocess.run(command, check=True)
        print(path.read_text())


if __name__ == "__main__":
    main()
