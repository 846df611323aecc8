"""How well methods predict below the spot, beside interpolation, a linear baseline and an oracle.

    python benchmarks/fine.py synthetic            # known truth of every cell: nuclei and superpixels
    python benchmarks/fine.py real --data DIR      # her2st and mouse olfactory bulb: spots held out, spots merged
    python benchmarks/fine.py quick                # a small synthetic section, shorter fits, five minutes
    python benchmarks/fine.py table                # Markdown tables of what was run

DIR is the folder of ``her2st``, ``mob_st_stahl2016`` and ``mob_st2k_stutility``; HESPOTEX_DATA by default. Prepared
sections and finished runs are kept in ``benchmarks/results/fine`` (HESPOTEX_BENCHMARKS in place of ``benchmarks/results``) and not made again: an interrupted run goes on where
it stopped. Every run is a process of its own, so that seconds and peak memory are its own.

In-sample methods are fitted on the spots of the section that they predict; the truth below the spot, and spots held
out, are seen by none. Rows marked ``transfer`` are fitted on other patients. A correlation is per gene over all
superpixels or nuclei, of log1p of values scaled to mean 1, so that methods in counts and in logarithms compare: at
superpixels of the density of transcripts, at nuclei of the composition, since a large cell's transcripts lie thin.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(os.environ.get("HESPOTEX_BENCHMARKS", Path(__file__).parent / "results")) / "fine"
COHORT, N_PATIENTS, N_GENES = 21, 4, 250
SPREAD_UM = 6.0  # of a cell's transcripts around its centre, for the truth of superpixels
MATCH_UM = 4.0  # a nucleus is a cell's if it lies nearer
HELD_OUT = 0.1
MOB_MPP = 4.55  # of the images of the mouse olfactory bulb on the denser array

IN_SAMPLE = {
    "nearest spot": {"name": "interpolate", "method": "nearest"},
    "Gaussian interpolation": {"name": "interpolate", "method": "gaussian"},
    "stage": {"name": "stage"},
    "tesla": {"name": "tesla"},
    "ridge on parts": {"name": "ridge_parts"},
    "ridge on parts, composition": {"name": "ridge_parts", "depth": "spot"},
    "istar": {"name": "istar"},
    "histex": {"name": "histex"},
    "xfuse": {"name": "xfuse", "preset": "small"},
    "stand": {"name": "stand"},
}
RIDGE = ("ridge on parts", "ridge on parts, composition")
TRANSFER = (*RIDGE, "istar", "xfuse", "stand")
# A look in five minutes: does everything run, and is it above chance.
QUICK = {
    "istar": {"n_members": 1},
    "histex": {"epochs": 5},
    "xfuse": {"epochs": 20},
    "stage": {"max_epochs": 500},
}
AT_NUCLEI = ("stand",)  # methods of the nucleus; ridge is run at both
UNTRAINED = ("interpolate", "tesla")


# Sections


def prepare(sdata, *, size_um: float = 8.0, nuclei: bool = True, mpp: float | None = None) -> None:
    """Tissue, superpixels and nuclei with their features, read at `mpp` where the image is too coarse for the default."""
    import hespotex as hx

    hx.pp.detect_tissue(sdata)
    hx.pp.superpixels(sdata, size_um)
    hx.pp.embed(sdata, "morphology", shapes_key="superpixels", mpp=mpp)
    hx.pp.embed(sdata, "rgb", shapes_key="superpixels", mpp=mpp)
    if nuclei:
        hx.pp.segment_nuclei(sdata)
        hx.pp.embed_nuclei(sdata, "morphology")


def stored(name: str, make):
    """A prepared section, made once."""
    import spatialdata

    path = RESULTS / "prepared" / f"{name}.zarr"
    if not path.exists():
        sdata = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        if part.exists():
            import shutil

            shutil.rmtree(part)
        sdata.write(part)
        part.rename(path)
    return spatialdata.read_zarr(path)


def synthetic(patient: int, size_px: int = 2400):
    import hespotex as hx

    def make():
        sdata = hx.datasets.synthetic(first_patient=patient, size_px=size_px, n_genes=N_GENES, seed=COHORT)
        prepare(sdata)
        return sdata

    return stored(f"synthetic-{size_px}-{patient}", make)


def real(name: str, data: Path):
    import hespotex as hx

    def make():
        if name.startswith("her2st"):
            sdata = hx.datasets.her2st(name.split("-")[1], path=data / "her2st")
        elif name == "mob-rep11":
            folder = data / "mob_st_stahl2016"
            sdata = hx.io.read_st(
                folder / "rep11_counts.tsv.gz", _mob_spots(folder), folder / "rep11.jpg", name="rep11", patient="E"
            )
        else:
            folder = data / "mob_st2k_stutility"
            number = name[-1]
            sdata = hx.io.read_st(
                folder / f"MOB{number}.tsv.gz",
                folder / f"alignment_table_MOB{number}.tsv",
                folder / f"MOB{number}.jpg",
                name=name,
                patient="1" if number in "12" else "2",
                mpp=MOB_MPP,
            )
        fine = name.startswith("her2st")
        prepare(sdata, size_um=8.0 if fine else 16.0, nuclei=fine, mpp=MOB_MPP if "2k" in name else None)
        return sdata

    return stored(name, make)


def _mob_spots(folder: Path) -> Path:
    """Spot table of the olfactory bulb with whole array positions for names and the measured ones beside them."""
    table = pd.read_csv(folder / "rep11_spots.tsv", sep="\t")
    x, y = table["spot"].str.split("x", expand=True).astype(float).to_numpy().T
    out = pd.DataFrame(
        {"x": x, "y": y, "new_x": x, "new_y": y, "pixel_x": table["pixel_x"], "pixel_y": table["pixel_y"]}
    )
    path = RESULTS / "prepared" / "rep11_spots.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    out.to_csv(path, sep="\t", index=False)
    return path


# Truth


def cells_of(sdata):
    """True cells: centres in µm, expression (cells, genes) and types."""
    import hespotex as hx

    truth = hx.datasets.cell_truth(sdata)
    return truth.obsm["spatial"] * 0.5, np.asarray(truth.X), truth.obs["cell_type"].astype(str).to_numpy()


def truth_at_superpixels(sdata) -> np.ndarray:
    """Expression that lies in each superpixel, each cell's spread around its centre, (m, G)."""
    from scipy import sparse
    from scipy.spatial import cKDTree

    xy, values, _ = cells_of(sdata)
    grid = sdata["superpixels"]
    centres = (grid[["col", "row"]].to_numpy() + 0.5) * grid["size_um"].iloc[0]
    near = cKDTree(centres).sparse_distance_matrix(cKDTree(xy), 3 * SPREAD_UM, output_type="coo_matrix")
    weight = np.exp(-0.5 * (near.data / SPREAD_UM) ** 2)
    share = sparse.csr_matrix((weight, (near.row, near.col)), shape=(len(centres), len(xy)))
    total = np.asarray(share.sum(axis=0)).ravel()
    return share @ (values / np.maximum(total, 1e-12)[:, None])


def truth_at_nuclei(sdata):
    """Rows of the nuclei that are a cell's, their expression and cell types."""
    from scipy.spatial import cKDTree

    xy, values, types = cells_of(sdata)
    centroid = sdata["nuclei"].geometry.centroid
    nuclei = np.column_stack([centroid.x, centroid.y]) * 0.5
    distance, cell = cKDTree(xy).query(nuclei)
    _, back = cKDTree(nuclei).query(xy)
    matched = np.flatnonzero((distance <= MATCH_UM) & (back[cell] == np.arange(len(nuclei))))
    return matched, values[cell[matched]], types[cell[matched]]


# Scores


def gene_r(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson r per gene of log1p of values scaled to mean 1; NaN where the truth is constant, 0 where only a guess is."""
    from hespotex.models._inner import gene_correlation

    def scaled(values):
        values = np.maximum(values, 0)
        return np.log1p(values / np.maximum(values.mean(axis=0), 1e-12))

    return gene_correlation(scaled(truth), scaled(predicted))


def composition(values: np.ndarray) -> np.ndarray:
    """Shares of the panel's total at each place: how much a cell holds in all is another matter than of what."""
    values = np.maximum(values, 0)
    total = values.sum(axis=1, keepdims=True)
    return np.divide(values, total, out=np.zeros_like(values, dtype=float), where=total > 0)


def within_types(truth: np.ndarray, predicted: np.ndarray, types: np.ndarray) -> float:
    """Mean r within each cell type of 100 cells or more."""
    found = [
        np.nanmean(gene_r(truth[types == kind], predicted[types == kind]))
        for kind in np.unique(types)
        if (types == kind).sum() >= 100
    ]
    return float(np.mean(found))


def linear(values: np.ndarray, unit: str) -> np.ndarray:
    return values if unit == "counts" else np.expm1(values) if unit.startswith("log1p") else 2.0**values - 1


# Runs, each in a process of its own


def _model(label: str, quick: bool = False):
    import hespotex as hx

    options = IN_SAMPLE[label] | (QUICK.get(label, {}) if quick else {})
    return hx.models.create(options.pop("name"), **options)


def _panel(sdata) -> list[str]:
    """Genes of highest mean in the spots that are given."""
    mean = np.asarray(sdata["table"].X.mean(axis=0)).ravel()
    order = np.argsort(-mean, kind="stable")[:N_GENES]
    return sorted(sdata["table"].var_names[order])


def _fit_predict(
    label: str, sections: list, test, genes: list[str], at: str, quick: bool = False
) -> tuple[np.ndarray, str, float, float]:
    """Prediction at the parts of `test`, its unit, and seconds to fit and to predict."""
    import hespotex as hx

    start = time.perf_counter()
    model = hx.tl.train(sections, _model(label, quick), genes=genes, parts_key=at)
    fitted = time.perf_counter()
    hx.tl.predict(test, model, parts_key=at, key_added="p")
    done = time.perf_counter()
    found = hx.get.prediction(test, "p", table_key=f"p_{at}")
    return np.asarray(found.X), str(model.recipe.unit), fitted - start, done - fitted


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run_synthetic(label: str, task: str, patient: int, size_px: int) -> dict:
    """Scores of one method on one synthetic patient."""
    import hespotex as hx

    hx.settings.progress_bar = False
    test = synthetic(patient, size_px)
    genes = _panel(test)
    columns = test["table"].var_names.get_indexer(genes)
    at_nuclei, at_grid = truth_at_nuclei(test), truth_at_superpixels(test)[:, columns]
    matched, nucleus_truth, types = at_nuclei[0], at_nuclei[1][:, columns], at_nuclei[2]
    row: dict = {"method": label, "task": task, "patient": patient, "nuclei": len(matched), "superpixels": len(at_grid)}
    if label == "oracle (type means)":
        of_type = {kind: composition(nucleus_truth[types == kind]).mean(axis=0) for kind in np.unique(types)}
        guess = np.stack([of_type[kind] for kind in types])
        return row | {"r_nuclei": float(np.nanmean(gene_r(composition(nucleus_truth), guess))), "r_within": 0.0}
    sections = [test]
    if task == "transfer":
        sections = [synthetic(other, size_px) for other in range(N_PATIENTS) if other != patient]
    for at in ("superpixels", "nuclei"):
        methods = (*AT_NUCLEI, *RIDGE) if at == "nuclei" else tuple(m for m in IN_SAMPLE if m not in AT_NUCLEI)
        if label not in methods:
            continue
        values, unit, fit_s, predict_s = _fit_predict(label, sections, test, genes, at, quick=size_px < 2000)
        values = linear(values, unit)
        if at == "superpixels":
            row["r_superpixels"] = float(np.nanmean(gene_r(at_grid, values)))
            row["seconds_fit"], row["seconds_predict"] = fit_s, predict_s
            under = _cell_under(test)[matched]
            kept = under >= 0
            if label in RIDGE:
                continue  # scored at nuclei with features of the nuclei
            values, truth, kinds = values[under[kept]], nucleus_truth[kept], types[kept]
        else:
            values, truth, kinds = values[matched], nucleus_truth, types
            row.setdefault("seconds_fit", fit_s)
            row.setdefault("seconds_predict", predict_s)
        row["r_nuclei"] = float(np.nanmean(gene_r(composition(truth), composition(values))))
        row["r_within"] = within_types(composition(truth), composition(values), kinds)
        if at == "nuclei":
            row["r_nuclei_counts"] = float(np.nanmean(gene_r(truth, values)))
    return row | {"peak_gb": _peak_gb()}


def _cell_under(sdata) -> np.ndarray:
    """Superpixel under each nucleus, -1 where there is none."""
    grid = sdata["superpixels"]
    size = float(grid["size_um"].iloc[0])
    centroid = sdata["nuclei"].geometry.centroid
    column, row = (np.floor(np.column_stack([centroid.x, centroid.y]) * 0.5 / size).astype(int)).T
    place = {(r, c): i for i, (r, c) in enumerate(zip(grid["row"], grid["col"], strict=True))}
    return np.array([place.get((r, c), -1) for r, c in zip(row, column, strict=True)])


def run_real(label: str, task: str, name: str, data: str) -> dict:
    """Scores of one method at spots that it did not see: held out in blocks, or merged."""
    import hespotex as hx

    hx.settings.progress_bar = False
    whole = real(name, Path(data))
    at = "nuclei" if label in AT_NUCLEI else "superpixels"
    if task == "held out":
        coarse, fine_key, kept = _without_blocks(whole)
    else:
        coarse, fine_key, kept = _merged(whole)
    genes = _panel(coarse)
    values, unit, fit_s, predict_s = _fit_predict(label, [coarse], coarse, genes, at)
    del values
    hx.tl.aggregate(coarse, f"p_{at}", fine_key, how=None if unit == "counts" else "mean", key_added="q")
    predicted = hx.get.prediction(coarse, "q", table_key=f"q_{fine_key}")[kept]
    measured = whole["table"][:, genes] if task == "held out" else coarse["fine_table"][:, genes]
    truth, library = measured.X[kept].toarray(), np.asarray(whole["table"].X.sum(axis=1)).ravel()[kept]
    covered = np.asarray(predicted.obs["q_coverage"]) > 0
    panel_share = float(coarse["table"][:, genes].X.sum() / coarse["table"].X.sum())
    guess = np.nan_to_num(np.asarray(predicted.X))
    if unit == "counts":
        guess = np.maximum(guess, 0)
        total = guess.sum(axis=1, keepdims=True) / panel_share
        guess = np.log1p(guess / np.maximum(total, 1e-12) * 1e4)
    target = np.log1p(truth / np.maximum(library, 1)[:, None] * 1e4)
    from hespotex.models._inner import gene_correlation

    r = gene_correlation(target[covered], guess[covered])
    return {
        "method": label,
        "task": task,
        "section": name,
        "spots": coarse["table"].n_obs,
        "scored": int(covered.sum()),
        "r": float(np.nanmean(r)),
        "rmse": float(np.sqrt(np.mean((target[covered] - guess[covered]) ** 2))),
        "ssim": _ssim(measured.obs.iloc[kept][covered], target[covered], guess[covered]),
        "seconds_fit": fit_s,
        "seconds_predict": predict_s,
        "peak_gb": _peak_gb(),
    } | conservation(coarse, at, genes, unit)


def conservation(sdata, at: str, genes: list[str], unit: str) -> dict:
    """How well sums over the parts of the spots that were fitted agree with their counts, and after reconciling.

    Errors are shares of all counts, or of the standard deviation where a method predicts intensities. ``poisson`` is
    what the counts would err by if their expectation were known.
    """
    import hespotex as hx

    def sums(key: str):
        found = hx.tl.aggregate(sdata, f"{key}_{at}", "spots", key_added="s", copy=True)
        return np.asarray(found.X), (found.obs["s_coverage"] > 0).to_numpy()

    mine, held = sums("p")
    counts = sdata["table"][:, genes].X.toarray()
    if unit != "counts":
        theirs = np.log1p(counts / np.maximum(np.asarray(sdata["table"].X.sum(axis=1)), 1) * 1e4)[held]
        return {"sum_error": float(np.sqrt(np.mean((mine[held] - theirs) ** 2)) / theirs.std())}
    theirs = counts[held]
    start = time.perf_counter()
    hx.tl.reconcile(sdata, f"p_{at}", key_added="exact")
    seconds = time.perf_counter() - start
    exact, _ = sums("exact")
    drawn = np.random.default_rng(0).poisson(np.maximum(mine[held], 0))
    return {
        "sum_error": float(np.abs(mine[held] - theirs).sum() / theirs.sum()),
        "poisson": float(np.abs(drawn - mine[held]).sum() / theirs.sum()),
        "reconciled_error": float(np.abs(exact[held] - theirs).max()),
        "seconds_reconcile": seconds,
    }


def _ssim(obs: pd.DataFrame, target: np.ndarray, guess: np.ndarray) -> float:
    """Mean SSIM over genes on the array; NaN where it is no full array."""
    from hespotex.metrics import lattice_windows, ssim

    try:
        windows = lattice_windows(obs["array_row"].to_numpy(), obs["array_col"].to_numpy(), lattice="square")
        return float(np.nanmean(ssim(target, guess, windows)))
    except ValueError:
        return float("nan")


def _without_blocks(whole):
    """The section without a tenth of its spots, in blocks; shapes of all spots; which were held out."""
    from hespotex.data.lattice import spot_pitch
    from hespotex.data.splits import spatial_blocks

    xy = whole["table"].obsm["spatial"]
    blocks = spatial_blocks(xy, side_um=2.5 * spot_pitch(xy))  # both in pixels: blocks of two or three spots
    order = np.random.default_rng(0).permutation(blocks.max() + 1)
    n_held = np.cumsum(np.bincount(blocks)[order])
    held = np.isin(blocks, order[: int(np.searchsorted(n_held, HELD_OUT * len(blocks))) + 1])
    coarse = _copy(whole)
    coarse["all_spots"] = whole["spots"].loc[whole["table"].obs["spot_id"]]
    coarse["table"] = whole["table"][~held].copy()
    return coarse, "all_spots", np.flatnonzero(held)


def _merged(whole):
    """Blocks of 2 × 2 spots merged; shapes of the single spots; those that are in a block."""
    import hespotex as hx

    coarse = hx.tl.coarsen(whole, merge=2)
    for name in ("superpixels", "nuclei"):
        if name in whole.shapes:
            coarse[name] = whole[name]
    for name, table in whole.tables.items():
        if name != "table":
            coarse[name] = table
    return coarse, "fine", np.arange(whole["table"].n_obs)


def _copy(sdata):
    import spatialdata

    elements = {name: element for _, name, element in sdata.gen_elements()}
    return spatialdata.SpatialData.init_from_elements(elements, attrs=dict(sdata.attrs))


def launch(kind: str, **arguments) -> bool:
    """Do a run in a process of its own and keep its row, unless it is there; whether it went well."""
    name = "-".join(str(value).replace(" ", "_").replace(",", "") for key, value in arguments.items() if key != "data")
    path = RESULTS / kind / f"{name}.json"
    if path.exists():
        print("there already:", kind, name, flush=True)
        return True
    print("running:", kind, name, flush=True)
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); import fine; fine.worker(*sys.argv[2:])"
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), kind, json.dumps(arguments), str(part)], check=False
    )
    if process.returncode:
        print("FAILED:", kind, name, flush=True)
        return False
    part.rename(path)
    print(path.read_text(), flush=True)
    return True


def worker(kind: str, arguments: str, path: str) -> None:
    warnings.simplefilter("ignore")
    row = {"synthetic": run_synthetic, "quick": run_synthetic, "real": run_real}[kind](**json.loads(arguments))
    Path(path).write_text(json.dumps(row))


def rows(kind: str) -> pd.DataFrame:
    return pd.DataFrame([json.loads(path.read_text()) for path in sorted((RESULTS / kind).glob("*.json"))])


COLUMNS = {
    "synthetic": {
        "r_superpixels": "r superpixels",
        "r_nuclei": "r nuclei",
        "r_within": "within type",
        "seconds_fit": "fit, s",
        "seconds_predict": "predict, s",
        "peak_gb": "peak, GB",
    },
    "real": {
        "spots": "spots fitted",
        "scored": "scored",
        "r": "r",
        "rmse": "RMSE",
        "ssim": "SSIM",
        "seconds_fit": "fit, s",
        "seconds_predict": "predict, s",
        "peak_gb": "peak, GB",
    },
}
SUMS = {
    "sum_error": "error of sums",
    "poisson": "of a right expectation",
    "reconciled_error": "largest error after reconcile, counts",
    "seconds_reconcile": "reconcile, s",
}


def table() -> None:
    """Markdown of what was run, best first; methods below Gaussian interpolation are marked."""
    for kind, by, score in (
        ("quick", ["task"], "r_superpixels"),
        ("synthetic", ["task"], "r_superpixels"),
        ("real", ["task", "section"], "r"),
    ):
        found = rows(kind)
        if found.empty:
            continue
        for group, each in found.groupby(by):
            mean = each.groupby("method").mean(numeric_only=True)
            columns = COLUMNS["real" if kind == "real" else "synthetic"]
            shown = mean.reindex(columns=list(columns)).sort_values(score, ascending=False).round(3)
            if "Gaussian interpolation" in mean.index:
                least = mean.loc["Gaussian interpolation", score]
                shown["loses to interpolation"] = np.where(mean.loc[shown.index, score] < least, "yes", "")
            print(f"\n## {kind}, {', '.join(group)}\n")
            print(shown.rename(columns=columns).reset_index().to_markdown(index=False))
    if not (found := rows("real")).empty:
        print("\n## sums over the spots that were fitted, mean over sections and tasks\n")
        mean = found.groupby("method")[list(SUMS)].mean(numeric_only=True).round(3)
        print(mean.rename(columns=SUMS).reset_index().to_markdown(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["synthetic", "real", "quick", "table"])
    parser.add_argument("--data", default=os.environ.get("HESPOTEX_DATA", "../shared/data"))
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--patients", nargs="*", type=int, default=list(range(N_PATIENTS)))
    parser.add_argument("--sections", nargs="*", default=["her2st-C2", "mob-rep11", "mob-2k1"])
    args = parser.parse_args()
    wanted = args.methods or list(IN_SAMPLE)
    if args.what == "table":
        table()
        return
    done = [launch(args.what, **each) for each in _plan(args, wanted)]
    table()
    if not all(done):
        sys.exit(f"{done.count(False)} of {len(done)} runs failed")


def _plan(args: argparse.Namespace, wanted: list[str]) -> Iterator[dict]:
    """Arguments of all runs, in order."""
    if args.what == "real":
        for name, task, label in itertools.product(args.sections, ("held out", "merged"), wanted):
            if label not in AT_NUCLEI or name.startswith("her2st"):  # no nuclei are seen at 3 µm/px
                yield {"label": label, "task": task, "name": name, "data": args.data}
        return
    quick = args.what == "quick"
    for patient in [0] if quick else args.patients:
        common = {"patient": patient, "size_px": 1200 if quick else 2400}
        if not args.methods:
            yield {"label": "oracle (type means)", "task": "in-sample", **common}
        for label in wanted:
            yield {"label": label, "task": "in-sample", **common}
            if label in TRANSFER and not quick:
                yield {"label": label, "task": "transfer", **common}


if __name__ == "__main__":
    main()
