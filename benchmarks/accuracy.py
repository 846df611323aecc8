"""How well expression is predicted: HESpotEx beside ridge, other baselines and nulls.

    python benchmarks/accuracy.py her2st    --data DIR   # C2-C5, leave one section out: adjacent sections of one tumour
    python benchmarks/accuracy.py a1        --data DIR   # C2-C5 -> A1, another patient, at A1's 3.2 µm/px
    python benchmarks/accuracy.py synthetic              # 8 synthetic patients, leave one patient out
    python benchmarks/accuracy.py table                  # Markdown tables of what was run

DIR is the folder of ``her2st``, ``her2st_a1_lowres`` and ``encoders_timm``; HESPOTEX_DATA by default. Prepared sections
and finished runs are kept in ``benchmarks/results`` and not made again: an interrupted run goes on where it stopped.
Panels are chosen in every fold, on its training sections; every model predicts log1p of counts per 10,000 of the full
library. ``paper (own unit)`` is the published algorithm in the unit and with the panel of its authors.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

import hespotex as hx
from hespotex.data.splits import spatial_blocks
from hespotex.metrics import aggregate, block_draws, paired_difference, resample_interval

RESULTS = Path(__file__).parent / "results" / "accuracy"
PANELS = {"250 highest-mean": "high_mean", "250 most variable": "most_variable"}
N_GENES, SEEDS, N_PATIENTS = 250, (0, 1, 2), 8
COHORT = 11  # seed of the synthetic patients
EMBEDDINGS = {"morphology": "X_morphology", "MobileNet": "X_mobilenet"}
ABLATIONS = {
    "hespotex (networks alone)": {"name": "hespotex", "regression": "none"},
    "hespotex (regression alone)": {"name": "hespotex", "regression_share": 1.0},
}
MODELS = {
    "hespotex": "hespotex",
    "hespotex (paper)": {"name": "hespotex", "preset": "paper"},
    "ridge": "ridge",
    "mlp": "mlp",
    "knn": "knn",
    "mean": "mean",
}
SECTIONS = ("C2", "C3", "C4", "C5")


def mobilenet(data: Path) -> dict:
    """Keyword arguments of the ImageNet MobileNet, as its README prescribes."""
    return {
        "weights": data / "encoders_timm" / "mobilenetv1_100_padsame.safetensors",
        "pad_type": "same",
        "mean": 128 / 255,
        "std": 128 / 255,
    }


def prepare(sdata, data: Path | None, *, mpp: float | None = None, nuclei: bool = True) -> None:
    """Embeddings, graph and nuclei of a section."""
    hx.pp.embed(sdata, "morphology", **({"mpp": mpp} if mpp else {}))
    if data is not None:
        # At 3.2 µm/px a tile of 160 µm has 50 px: it is read as 64 px, and so are the training sections.
        size = {"tile_um": 160.0} if mpp is None else {"tile_um": 64 * mpp, "tile_px": 64}
        hx.pp.embed(sdata, "timm:mobilenetv1_100", key_added="X_mobilenet", **mobilenet(data), **size)
    hx.pp.spatial_graph(sdata)
    if nuclei:
        hx.pp.segment_nuclei(sdata)


def prepared(name: str, make) -> object:
    """The table of a section with all that models read, made once."""
    import anndata as ad

    path = RESULTS / "prepared" / f"{name}.h5ad"
    if not path.exists():
        sdata = make()
        table = sdata["table"].copy()
        table.uns["hespotex"] = {**table.uns.get("hespotex", {}), **sdata.attrs["hespotex"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        table.write_h5ad(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return ad.io.read_h5ad(path)


def her2st(name: str, data: Path, mpp: float | None = None):
    def make():
        sdata = hx.datasets.her2st(name, path=data / "her2st")
        prepare(sdata, data, mpp=mpp, nuclei=mpp is None)
        return sdata

    return prepared(name if mpp is None else f"{name}-{mpp}", make)


def a1(data: Path):
    def make():
        folder = data / "her2st_a1_lowres"
        sdata = hx.io.read_st(
            folder / "A1_counts.tsv.gz",
            folder / "A1_selection.tsv",
            folder / "A1_image.png",
            name="A1",
            patient="A",
            frame_size=(6954, 7435),
        )
        prepare(sdata, data, mpp=3.2, nuclei=False)
        return sdata

    return prepared("A1-3.2", make)


def synthetic(patient: int, seed: int = COHORT):
    def make():
        sdata = hx.datasets.synthetic(first_patient=patient, size_px=3000, lattice="visium", n_genes=400, seed=seed)
        prepare(sdata, None)
        return sdata

    return prepared(f"synthetic-{patient}" if seed == COHORT else f"synthetic-{seed}-{patient}", make)


def once(path: Path, run) -> None:
    """Run and keep a table of scores, unless it is there."""
    if path.exists():
        print("there already:", path.name)
        return
    print("running:", path.name, flush=True)
    table = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def paired_blocks(tables: list, one: str, other: str) -> tuple[float, float]:
    """95 % interval of the difference in mean r of two cross-validated models, by bootstrap of spatial blocks."""
    draws, estimates = [], []
    for index, table in enumerate(tables):
        use = np.asarray(table.X.sum(axis=1)).ravel() >= 1
        blocks = spatial_blocks(table.obsm["spatial"][use] * table.uns["hespotex"]["X_morphology"]["slide_mpp"])
        both = []
        for label in (one, other):
            result = hx.get.prediction(table, hx._keys.sanitize(f"{label}_cv"))
            pair = result.layers["measured"][use], result.X[use]
            both.append((np.nanmean(hx.metrics.pearson(*pair)), block_draws(*pair, blocks, seed=[0, index])))
        estimates.append(both[0][0] - both[1][0])
        draws.append(both[0][1] - both[1][1])
    interval = resample_interval(float(np.mean(estimates)), np.mean(draws, axis=0))
    return interval.lower, interval.upper


def cross_validation(task: str, tables: list, embeddings: dict[str, str], seeds, part: str, groups=None) -> None:
    force = groups is not None
    # The published 500 epochs per section take most of the time: they run last, and with one seed on the larger set.
    quick = {label: spec for label, spec in MODELS.items() if "paper" not in label}
    slow = {label: spec for label, spec in MODELS.items() if "paper" in label}
    plan = [("", quick, seed) for seed in seeds] + [("ablation-", ABLATIONS, seeds[0])] if part != "paper" else []
    if part != "quick":
        plan += [("paper-", slow, seed) for seed in (seeds if task != "synthetic" else seeds[:1])]
    for prefix, models, seed in plan:
        for embedding, key in embeddings.items():
            for selection in PANELS.values():

                def run(key=key, selection=selection, seed=seed, models=models, is_first=prefix == "") -> pd.DataFrame:
                    scores = hx.tl.cross_validate(
                        tables,
                        models,
                        groups=groups,
                        force=force,
                        gene_selection=selection,
                        n_top_genes=N_GENES,
                        embedding_key=key,
                        seed=seed,
                        nulls=is_first,
                    )
                    if {"hespotex", "ridge"} <= set(models):
                        scores["paired_lower"], scores["paired_upper"] = paired_blocks(tables, "hespotex", "ridge")
                    return scores

                once(RESULTS / f"{task}--{embedding}--{selection}--{prefix}{seed}.parquet", run)
    if part == "quick":
        return
    for embedding, key in embeddings.items():

        def own(key=key) -> pd.DataFrame:
            # Normalised within the panel, a gene that one section lacks would change the unit there.
            shared = sorted(set.intersection(*(set(table.var_names) for table in tables)))
            return hx.tl.cross_validate(
                [table[:, shared].copy() for table in tables],
                {"hespotex (paper, own unit)": {"name": "hespotex", "preset": "paper"}},
                groups=groups,
                force=force,
                gene_selection="hvg",
                n_top_genes=1000,
                unit="log1p_cpm_panel",
                embedding_key=key,
                seed=0,
                copy=True,
            )

        once(RESULTS / f"{task}--{embedding}--own--0.parquet", own)


def transfer(data: Path, seeds) -> None:
    """C2-C5 to A1, everything read at A1's resolution."""
    train = [her2st(name, data, mpp=3.2) for name in SECTIONS]
    test = a1(data)
    quick = {label: spec for label, spec in MODELS.items() if "paper" not in label}
    quick["null_encoder_ridge"] = {"name": "ridge", "components": (256,)}
    # Nuclei are not resolved at 3.2 µm/px, so that the published factor has nothing to count: its variant without one.
    slow = {"hespotex (paper, no nuclei)": {"name": "hespotex", "preset": "paper", "nuclei": "none"}}
    plan = [("", quick, seed) for seed in seeds] + [("paper-", slow, seeds[0])]
    for embedding, key in EMBEDDINGS.items():
        for selection in PANELS.values():
            for prefix, models, seed in plan:

                def run(key=key, selection=selection, models=models, seed=seed, is_first=prefix == "") -> pd.DataFrame:
                    keys = {}
                    for label, spec in models.items():
                        model = hx.models.create(**({"name": spec} if isinstance(spec, str) else spec))
                        hx.tl.train(
                            train,
                            model,
                            gene_selection=selection,
                            n_top_genes=N_GENES,
                            unit="log1p_cp10k",
                            embedding_key=key,
                            seed=seed,
                        )
                        keys[hx._keys.sanitize(label)] = label
                        hx.tl.predict(test, model, key_added=hx._keys.sanitize(label))
                    scores = hx.tl.evaluate(test, list(keys), reference=train, seed=seed, nulls=is_first, copy=True)
                    return scores.assign(model=scores["model"].replace(keys), seed=seed)

                once(RESULTS / f"a1--{embedding}--{selection}--{prefix}{seed}.parquet", run)


def runs() -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Finished runs: task, embedding, panel and the scores of all seeds."""
    found: dict[tuple[str, str, str], list[pd.DataFrame]] = {}
    for path in sorted(RESULTS.glob("*.parquet")):
        task, embedding, panel, seed = path.stem.split("--")
        found.setdefault((task, embedding, panel), []).append(
            pd.read_parquet(path).assign(seed=int(seed.split("-")[-1]))
        )
    for (task, embedding, panel), tables in found.items():
        scores = pd.concat(tables, ignore_index=True)
        # Of the measurement alone: the same for all models.
        of_gene = scores.groupby(["section", "gene"])["split_half"].transform("first")
        yield task, embedding, panel, scores.assign(split_half=scores["split_half"].fillna(of_gene))


def print_tables() -> None:
    titles = {value: key for key, value in PANELS.items()} | {"own": "its own panel and unit (log1p CPM of the panel)"}
    for task, embedding, panel, scores in runs():
        n_seeds = scores["seed"].nunique()
        print(f"\n### {task}, {embedding}, {titles[panel]} ({n_seeds} seed{'s' if n_seeds > 1 else ''})\n")
        # Shuffled spots and exchanged genes are of one model as good as of another.
        scores = scores[~scores["model"].str.contains(":") | scores["model"].str.endswith(":hespotex")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hx.errors.HespotexWarning)
            cohort = aggregate(scores, by=["model", "seed"])
            patients = aggregate(scores, by=["model", "seed"], level="patient")
        several = patients["patient"].nunique() > 1
        head = ["model", "mean r", "95 % by blocks", "sd over seeds", *(["sd over patients"] if several else [])]
        head += ["median r", "RMSE", "variance ratio", "r / ceiling"]
        print(f"| {' | '.join(head)} |\n| --- | ---: | --- |{' ---: |' * (len(head) - 3)}")
        for label in cohort.groupby("model")["pearson"].mean().sort_values(ascending=False).index:
            rows = cohort[cohort["model"] == label]
            mean = rows.mean(numeric_only=True)
            span = ""
            if np.isfinite(mean.get("pearson_lower", np.nan)):
                span = f"{mean['pearson_lower']:.3f} to {mean['pearson_upper']:.3f}"
            cells = [label, f"{mean['pearson']:.3f}", span, f"{rows['pearson'].std():.4f}" if len(rows) > 1 else ""]
            if several:
                cells.append(f"{patients[patients['model'] == label].groupby('patient')['pearson'].mean().std():.3f}")
            cells += [f"{mean['pearson_median']:.3f}", f"{mean['rmse']:.3f}", f"{mean['variance_ratio']:.2f}"]
            cells.append(f"{mean['pearson_of_ceiling']:.2f}")
            print(f"| {' | '.join(cells)} |")
        print(f"\nCeiling {cohort['ceiling'].mean():.3f} (pessimistic {cohort['ceiling_pessimistic'].mean():.3f}).")
        if not {"hespotex", "ridge"} <= set(cohort["model"]):
            continue
        wide = patients.pivot_table(index="patient", columns="model", values="pearson")
        if several:
            paired = paired_difference(wide["hespotex"].to_numpy(), wide["ridge"].to_numpy())
            span = f"{paired.interval.lower:+.3f} to {paired.interval.upper:+.3f}"
            print(
                f"`hespotex` − `ridge`, paired over {paired.n} patients: {paired.interval.estimate:+.3f} (95 % {span}; "
                f"sign-flip p = {paired.p_value:.4f}), above ridge in {int((wide['hespotex'] > wide['ridge']).sum())} of {len(wide)}."
            )
        else:
            span = ""
            if "paired_lower" in scores and scores["paired_lower"].notna().any():
                first = scores[scores["paired_lower"].notna()].iloc[0]
                span = f" (95 % by blocks {first['paired_lower']:+.3f} to {first['paired_upper']:+.3f})"
            difference = float((wide["hespotex"] - wide["ridge"]).iloc[0])
            print(f"`hespotex` − `ridge`, one patient: {difference:+.3f}{span}, {n_sections_above(scores)}.")


def n_sections_above(scores: pd.DataFrame) -> str:
    """In how many sections hespotex is above ridge."""
    wide = aggregate(scores, by=["model", "seed"], level="section").pivot_table(
        index="section", columns="model", values="pearson"
    )
    return f"above ridge in {int((wide['hespotex'] > wide['ridge']).sum())} of {len(wide)} sections"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["her2st", "a1", "synthetic", "table"])
    parser.add_argument("--data", type=Path, default=os.environ.get("HESPOTEX_DATA"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--part", choices=["quick", "paper", "all"], default="all", help="models to run; all by default"
    )
    parser.add_argument("--patients", type=int, default=N_PATIENTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*in training and test.*", category=hx.errors.HespotexWarning)
    if options.task in {"her2st", "a1"} and options.data is None:
        parser.error("--data: name the folder that holds her2st, or set HESPOTEX_DATA")
    if options.task == "her2st":
        tables = [her2st(name, Path(options.data)) for name in SECTIONS]
        cross_validation("her2st", tables, EMBEDDINGS, options.seeds, options.part, groups=list(SECTIONS))
    elif options.task == "a1":
        transfer(Path(options.data), options.seeds)
    elif options.task == "synthetic":
        tables = [synthetic(patient) for patient in range(options.patients)]
        cross_validation("synthetic", tables, {"morphology": "X_morphology"}, options.seeds, options.part)
    print_tables()


if __name__ == "__main__":
    main()
