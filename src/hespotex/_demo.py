"""The demo: synthetic patients, a model for them, a patient and a slide it has not seen, and a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._settings import settings
from .errors import DataValueError

if TYPE_CHECKING:
    import pandas as pd
    from spatialdata import SpatialData

    from .models import Model

__all__ = ["run_demo"]

Step = Callable[[str], AbstractContextManager[None]]
KEYS = ("hespotex", "ridge")
PROGRAMS = ("tumour", "fibroblast", "t_cell")  # one marker of each is drawn, chosen before any score is known
MARK = ".hespotex-demo"  # tells a folder of ours, which may be written over, from anybody else's


@dataclass(frozen=True)
class Size:
    """How much is simulated."""

    n_train: int
    size_px: int
    n_genes: int


FULL = Size(n_train=4, size_px=1600, n_genes=120)
QUICK = Size(n_train=3, size_px=1200, n_genes=80)


def run_demo(out: Path, *, seed: int | None, quick: bool, step: Step) -> Path:
    """Run the demo and return the path of its report.

    Parameters
    ----------
    out
        Folder to write to; one that exists must be empty or an earlier demo's.
    seed
        Seed of the synthetic world and of the models; ``settings.seed`` by default.
    quick
        Fewer and smaller patients.
    step
        Shows that a step is running, as a context manager.
    """
    import matplotlib as mpl

    from . import datasets, pp, tl

    mark = out / MARK
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not mark.exists())):
        raise DataValueError(f"--out {out} holds other files; name a folder that is empty or does not exist")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    seed = settings.seed if seed is None else seed
    size = QUICK if quick else FULL
    simulate: dict[str, Any] = {"size_px": size.size_px, "n_genes": size.n_genes, "seed": seed}
    spots: dict[str, Any] = {"pitch_um": 60, "diameter_um": 50}
    with settings.override(progress_bar=False, seed=seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries underneath; a demo's screen is for its own words
        mpl.use("Agg")
        with step(f"Simulating {size.n_train + 1} patients and one slide that has only an image"):
            patients = datasets.synthetic(size.n_train + 1, **spots, **simulate)
            slide = datasets.synthetic(with_expression=False, first_patient=size.n_train + 1, **simulate)
        *train, test = patients
        with step("Turning the image around each spot into features, connecting neighbours"):
            for sdata in patients:
                pp.embed(sdata)
                pp.spatial_graph(sdata)
        with step("Finding nuclei on every section"):
            for sdata in patients:
                pp.segment_nuclei(sdata)
        models = {}
        for key in KEYS:
            with step(f"Training {key} on {len(train)} patients"):
                models[key] = tl.train(train, key)
                models[key].save(out / f"{key}.hx", overwrite=True)
        with step("Predicting the patient that was held out, and the slide that has only an image"):
            for model in models.values():
                tl.predict(test, model)
            tl.predict(slide, models["hespotex"])
        with step("Scoring, beside null models and the noise ceiling"):
            tl.evaluate(test, list(KEYS), nulls=False)  # stored with the genes, for the titles of the maps
            scores = tl.evaluate(test, list(KEYS), reference=train, copy=True)
            assert scores is not None  # copy=True
            summary = summarise(scores)
            scores.to_csv(out / "scores.csv", index=False)
            summary.to_csv(out / "metrics.csv")
        with step("Drawing"):
            genes = _markers(test, models["hespotex"])
            _draw(out, train, test, slide, models, genes, scores)
    report = out / "report.md"
    report.write_text(_report(out, summary, train, test, genes, models["hespotex"]), encoding="utf-8")
    return report


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and median correlation, error, noise ceiling and share of it: models from best to worst, then nulls."""
    import pandas as pd

    from .metrics import aggregate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one patient says nothing about others, which the report says too
        table = aggregate(scores, min_spots=1).set_index("model")
    columns = {
        "pearson": "mean r",
        "pearson_median": "median r",
        "rmse": "RMSE",
        "pearson_of_ceiling": "r / ceiling",
        "ceiling": "ceiling",
    }
    table = table[[name for name in columns if name in table]].rename(columns=columns)
    falling = table.sort_values("mean r", ascending=False, kind="stable")
    is_null = falling.index.str.startswith("null")
    return pd.concat([falling[~is_null], falling[is_null]])


def _markers(test: SpatialData, model: Model) -> list[str]:
    """The first predicted marker of each programme shown."""
    program = test["table"].var["program"]
    firsts = [[gene for gene in program.index[program == name] if gene in model.genes] for name in PROGRAMS]
    found = [genes[0] for genes in firsts if genes]
    return found or list(model.genes[:3])


def _draw(
    out: Path,
    train: Sequence[SpatialData],
    test: SpatialData,
    slide: SpatialData,
    models: dict[str, Model],
    genes: list[str],
    scores: pd.DataFrame,
) -> None:
    import matplotlib.pyplot as plt

    from . import pl

    pl.spatial(test, genes, "hespotex", save=out / "held_out_patient.png")
    pl.predicted_vs_measured(test, genes, "hespotex", save=out / "predicted_vs_measured.png")
    pl.spatial(slide, genes, save=out / "image_only_slide.png")
    pl.gene_correlation(
        scores, title=f"one unseen patient, {len(train)} for training", save=out / "gene_correlation.png"
    )
    pl.training(models["hespotex"], save=out / "training.png")
    plt.close("all")


def _report(
    out: Path,
    summary: pd.DataFrame,
    train: Sequence[SpatialData],
    test: SpatialData,
    genes: Sequence[str],
    model: Model,
) -> str:
    n_train = sum(sdata["table"].n_obs for sdata in train)
    rows = ["| model | " + " | ".join(summary.columns) + " |", "| --- |" + " ---: |" * summary.shape[1]]
    rows += [
        f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
        for name, values in zip(summary.index, summary.to_numpy(), strict=True)
    ]
    table = "\n".join(rows)
    return f"""# hespotex demo

Trained on {len(train)} synthetic patients ({n_train} spots, {len(model.genes)} genes), judged on another one ({test["table"].n_obs} spots).
In these sections morphology drives part of the expression: some genes follow cell types that can be seen, some depend on neighbours,
and some on nothing that the image shows. They test the machinery; they say nothing about real tissue.

## A patient the model has not seen

![measured above predicted](held_out_patient.png)

Measured above, predicted below, on one colour scale (log1p of counts per 10,000). The genes ({", ".join(genes)}) are the first predicted marker
of each of three cell types, not the best ones.

## How good is it?

{table}

r is taken per gene across the spots of the unseen patient, then averaged over genes. The ceiling is what a perfect model could reach, given
how noisy the counts are. Nulls know almost nothing: what they score is not knowledge of histology. `null_depth` reads the counts
to be predicted and is shown as a diagnostic. One patient tells little about the next: see `hx.tl.cross_validate`. All scores by gene: `scores.csv`.

![scores of all genes](gene_correlation.png)

![predicted against measured](predicted_vs_measured.png)

## A slide that has only an image

![predicted genes](image_only_slide.png)

Tissue, tiles and features were made with the parameters that the model carries.

## Do it with your sections

```python
import hespotex as hx

for sdata in sections:                         # SpatialData with H&E and counts
    hx.pp.embed(sdata); hx.pp.spatial_graph(sdata)
model = hx.tl.train(sections, "hespotex")
hx.tl.predict(slide, model)                    # a slide with no expression at all
```

The models trained here are in `hespotex.hx` and `ridge.hx`: `hx.tl.predict(slide, "{(out / "hespotex.hx").as_posix()}")`.

![training](training.png)
"""
