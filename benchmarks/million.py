"""Time and memory of each step on a section of a million bins x 1,000 genes, and how both grow.

    python benchmarks/million.py                          # 62,500, 250,000 and 1,000,000 bins
    python benchmarks/million.py run --bins 62500         # one size
    python benchmarks/million.py run --bin-um 16 --bins 1000000
    python benchmarks/million.py table                    # Markdown of what was measured

The section is made here: bins of 8 or 16 µm side by side on an image of 1 µm per pixel, counts that follow the image, 4 % of
them not zero, a SpatialData store on disk. Every step runs in a process of its own, whose peak memory is that of the step
with everything it has to load, and reads counts from disk. What is done is kept in ``benchmarks/results/million``
(HESPOTEX_BENCHMARKS in place of ``benchmarks/results``): an interrupted run goes on with the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("HESPOTEX_BENCHMARKS", Path(__file__).parent / "results"))
SIZES = (62_500, 250_000, 1_000_000)
MPP, N_GENES, N_FIELDS = 1.0, 1000, 6
TILE_UM = 32.0  # of the morphology features: the bin and what is around it
FILLED = 0.04
ALL_GENES = {"method": "hvg", "n_top": N_GENES, "min_spots": 1}
BLOCK_ROWS = 10_000
STEPS = ("make", "graph", "embed", "train", "train ridge", "predict", "open")


def fields(side: int) -> np.ndarray:
    """Smooth random maps of the tissue, (N_FIELDS, side, side) in units of their spread."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    coarse = np.stack([gaussian_filter(rng.normal(size=(side, side)), 6, mode="wrap") for _ in range(N_FIELDS)])
    return (coarse / coarse.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def results(bin_um: int) -> Path:
    """Where what was measured lies."""
    return FOLDER / ("million" if bin_um == 8 else f"million_{bin_um}um")


def image(maps: np.ndarray, side: int, bin_um: int):
    """Pixels (3, y, x) of a section of side x side bins, painted block by block when they are read."""
    import dask.array as da
    from scipy.ndimage import gaussian_filter, map_coordinates

    per_bin = int(bin_um / MPP)
    size, block = side * per_bin, 1000
    haematoxylin, eosin = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])

    def paint(block_info=None):
        (_, _), (top, bottom), (left, right) = block_info[None]["array-location"]
        rng = np.random.default_rng([1, top, left])
        y = (np.arange(top, bottom) + 0.5) / per_bin - 0.5
        x = (np.arange(left, right) + 0.5) / per_bin - 0.5
        at = np.meshgrid(y, x, indexing="ij")
        cells, dye, pink = (map_coordinates(maps[k], at, order=1, mode="nearest") for k in range(3))
        speckle = gaussian_filter(rng.normal(size=at[0].shape), 2.0)
        nuclei = speckle / speckle.std() > 1.2 - 0.5 * cells  # more of them where the first map is high
        optical = (0.15 + (0.8 + 0.1 * dye) * nuclei)[..., None] * haematoxylin
        optical = optical + (0.25 + 0.08 * pink + 0.03 * rng.normal(size=nuclei.shape)).clip(0.02)[..., None] * eosin
        return (255 * np.exp(-optical)).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)

    chunks = tuple(min(block, size - start) for start in range(0, size, block))
    return da.map_blocks(paint, chunks=((3,), chunks, chunks), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))


def count_blocks(maps: np.ndarray):
    """Counts of the bins in blocks of rows, CSR."""
    from scipy import sparse

    rng = np.random.default_rng(2)
    values = maps.reshape(N_FIELDS, -1).T
    loading = rng.normal(size=(N_FIELDS, N_GENES)).astype(np.float32) * 0.35
    base = rng.gamma(0.6, size=N_GENES).astype(np.float32) + 0.01  # each gene is counted somewhere
    base *= FILLED / base.mean()
    for start in range(0, len(values), BLOCK_ROWS):
        rate = base * np.exp(values[start : start + BLOCK_ROWS] @ loading)
        yield sparse.csr_matrix(np.random.default_rng([3, start]).poisson(rate).astype(np.float32))


def make(folder: Path, n: int, bin_um: int) -> dict[str, float]:
    import anndata as ad
    import pandas as pd
    import shapely
    import spatialdata as sd
    import zarr
    from anndata.io import sparse_dataset, write_elem
    from geopandas import GeoDataFrame
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    side = int(np.sqrt(n))
    maps = fields(side)
    systems = {"global": Identity(), "microns": Scale([MPP, MPP], axes=("x", "y"))}
    row, column = np.divmod(np.arange(n), side)
    corner = np.column_stack([column, row]) * bin_um / MPP
    ids = np.char.add(
        f"s_{bin_um:03d}um_", np.char.add(np.char.zfill(row.astype(str), 5), np.char.zfill(column.astype(str), 5))
    )
    squares = GeoDataFrame(geometry=shapely.box(*corner.T, *(corner + bin_um / MPP).T), index=np.arange(n))
    obs = pd.DataFrame(
        {
            "region": pd.Categorical.from_codes(np.zeros(n, dtype=np.int8), ["bins"]),
            "location_id": np.arange(n),
            "array_row": row,
            "array_col": column,
        },
        index=ids.astype(object),
    )
    table = ad.AnnData(
        obs=obs,
        var=pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]),
        obsm={"spatial": corner + bin_um / MPP / 2},
    )
    sdata = sd.SpatialData(
        images={
            "image": Image2DModel.parse(
                image(maps, side, bin_um), dims="cyx", scale_factors=[2, 2], transformations=systems
            )
        },
        shapes={"bins": ShapesModel.parse(squares, transformations=dict(systems))},
        tables={"table": TableModel.parse(table, region="bins", region_key="region", instance_key="location_id")},
        attrs={"hespotex": {"name": f"bins{n}"}},
    )
    store = folder / "section.zarr"
    shutil.rmtree(store, ignore_errors=True)
    sdata.write(store)
    group = zarr.open_group(store / "tables" / "table", mode="r+")
    blocks = count_blocks(maps)
    write_elem(group, "X", next(blocks))
    for block in blocks:
        sparse_dataset(group["X"]).append(block)
    zarr.consolidate_metadata(store)
    return {"stored": float(group["X"]["data"].shape[0])}


def read(folder: Path):
    import hespotex as hx

    return hx.io.read_lazy(folder / "section.zarr")


def keep(folder: Path, sdata, *slots: str) -> None:
    """Write slots of the table back to the store."""
    import zarr
    from anndata.io import write_elem

    group = zarr.open_group(folder / "section.zarr" / "tables" / "table", mode="r+")
    for slot in slots:
        value = getattr(sdata["table"], slot)
        write_elem(group, slot, value if slot == "obs" else dict(value))
    zarr.consolidate_metadata(folder / "section.zarr")


def graph(folder: Path, n: int) -> dict[str, float]:
    import hespotex as hx

    sdata = read(folder)
    hx.pp.spatial_graph(sdata)
    keep(folder, sdata, "obsp", "uns")
    return {"edges": float(sdata["table"].obsp["spatial_connectivities"].nnz)}


def embed(folder: Path, n: int) -> dict[str, float]:
    import hespotex as hx

    sdata = read(folder)
    hx.pp.embed(sdata, "morphology", tile_um=TILE_UM, progress_bar=False)
    keep(folder, sdata, "obs", "obsm", "uns")
    return {"features": float(sdata["table"].obsm["X_morphology"].shape[1])}


def train(folder: Path, n: int) -> dict[str, float]:
    import hespotex as hx

    config = {"epochs": 1, "gate_epochs": 2, "gene_selection": ALL_GENES}
    model = hx.tl.train(read(folder), "hespotex", config=config, device="cpu", progress_bar=False)
    model.save(folder / "model", overwrite=True)
    return {"genes": float(len(model.genes)), **model.scores}


def train_ridge(folder: Path, n: int) -> dict[str, float]:
    import hespotex as hx

    sdata = read(folder)
    model = hx.tl.train(sdata, "ridge", genes=list(sdata["table"].var_names), progress_bar=False)
    return {"genes": float(len(model.genes)), **model.scores}


def predict(folder: Path, n: int) -> dict[str, float]:
    import hespotex as hx

    target = folder / "prediction.zarr"
    shutil.rmtree(target, ignore_errors=True)
    hx.tl.predict(read(folder), str(folder / "model"), target=target, device="cpu", progress_bar=False)
    return {"gb": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) / 1e9}


def open_(folder: Path, n: int) -> dict[str, float]:
    """Open the prediction with spatialdata, all of it in memory, and hold some against the counts: mean correlation."""
    import spatialdata

    (found,) = spatialdata.read_zarr(folder / "prediction.zarr").tables.values()
    rows = slice(n // 3, n // 3 + 20_000)
    predicted = found.X[rows]
    table = read(folder)["table"]
    counts = table.X[rows].toarray()
    measured = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4)
    measured = measured[:, table.var_names.get_indexer(found.var_names)]
    p, m = (values - values.mean(axis=0) for values in (predicted, measured))
    r = (p * m).mean(axis=0) / np.maximum(p.std(axis=0) * m.std(axis=0), 1e-12)
    assert found.n_obs == n
    assert np.isfinite(predicted).all()
    return {"genes": float(found.n_vars), "pearson": float(r.mean())}


ACTIONS = {
    "graph": graph,
    "embed": embed,
    "train": train,
    "train ridge": train_ridge,
    "predict": predict,
    "open": open_,
}


def measure(step: str, n: int, bin_um: int) -> dict[str, float | str]:
    """Run one step; its time includes reading and writing, but not the import of the libraries."""
    import spatialdata  # noqa: F401

    import hespotex as hx

    folder = results(bin_um) / str(n)
    folder.mkdir(parents=True, exist_ok=True)
    with hx.settings.override(cache_dir=folder / "cache"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start, used = time.perf_counter(), time.process_time()
        found = make(folder, n, bin_um) if step == "make" else ACTIONS[step](folder, n)
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"step": step, "bins": n, "seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak, **found}


def run(sizes: list[int], steps: list[str], bin_um: int, *, anew: bool) -> None:
    for n in sizes:
        for step in steps:
            place = results(bin_um) / str(n) / f"{step.replace(' ', '_')}.json"
            if place.exists() and not anew:
                continue
            command = [sys.executable, __file__, "one", "--step", step, "--bins", str(n), "--bin-um", str(bin_um)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{step} of {n} bins failed\n{done.stderr}")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(done.stdout.splitlines()[-1])
            print(place.read_text(), flush=True)


def table(bin_um: int) -> None:
    """One row per step: seconds and peak memory by size, and a bin's processor time in the largest over the smallest.

    Processor time, which counts all threads, is not changed by what else the machine has to do.
    """
    rows = [json.loads(path.read_text()) for path in results(bin_um).glob("*/*.json")]
    sizes = sorted({row["bins"] for row in rows})
    found = {(row["step"], row["bins"]): row for row in rows}
    print(
        "| step | "
        + " | ".join(f"{n:,} bins: s | GiB" for n in sizes)
        + " | processor time per bin, largest / smallest |"
    )
    print("| --- | " + " | ".join("---: | ---:" for _ in sizes) + " | ---: |")
    for step in STEPS:
        own = [found.get((step, n)) for n in sizes]
        cells = [f"{row['seconds']:.0f} | {row['peak_gib']:.2f}" if row else " | " for row in own]
        first, last = own[0], own[-1]
        ratio = ""
        if first and last:
            ratio = f"{last['cpu_seconds'] / last['bins'] * first['bins'] / first['cpu_seconds']:.2f}"
        print(f"| {step} | " + " | ".join(cells) + f" | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=("run", "table", "one"), default="run")
    parser.add_argument("--bins", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--bin-um", type=int, choices=(8, 16), default=8)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--anew", action="store_true", help="measure what was measured already, too")
    options = parser.parse_args()
    if options.action == "one":
        print(json.dumps(measure(options.step, options.bins[0], options.bin_um)))
    elif options.action == "table":
        table(options.bin_um)
    else:
        run(options.bins, options.steps, options.bin_um, anew=options.anew)
        table(options.bin_um)


if __name__ == "__main__":
    main()
