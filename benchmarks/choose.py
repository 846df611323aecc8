"""Whether the default of HESpotEx would be chosen without a look at any section that is reported.

    python benchmarks/choose.py --data DIR

Two judges, neither of which sees a reported score. (1) Fresh synthetic patients, of another seed than those of
``accuracy.py``: leave one patient out. (2) her2st: for each section that ``accuracy.py`` predicts, the other three alone, leave
one of *them* out. Variants change one thing about the default each. Finished runs are kept in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import pandas as pd
from accuracy import N_GENES, SECTIONS, her2st, once, synthetic

import hespotex as hx
from hespotex.metrics import aggregate

RESULTS = Path(__file__).parent / "results" / "choose"
SEED = 23  # of the development patients; those that are reported have another
VARIANTS = {
    "default": {},
    "networks alone": {"regression": "none"},
    "regression alone": {"regression_share": 1.0},
    "regression 3/4": {"regression_share": 0.75},
    "one network": {"n_members": 1},
    "no alignment": {"align_weight": 0.0},
    "no context": {"context": 0},
    "standardised globally": {"standardize": "global"},
    "number of nuclei as feature": {"nuclei": "feature"},
}


def scores(tables: list, path: Path, options: dict, **keywords) -> float:
    """Mean r of one variant in leave-one-group-out cross-validation of `tables`."""

    def run() -> pd.DataFrame:
        return hx.tl.cross_validate(
            tables,
            {"m": {"name": "hespotex", **options}},
            gene_selection="high_mean",
            n_top_genes=N_GENES,
            embedding_key="X_morphology",
            metrics=["pearson"],
            nulls=False,
            copy=True,
            seed=0,
            **keywords,
        )

    once(path, run)
    return float(aggregate(pd.read_parquet(path), metrics=["pearson"])["pearson"].iloc[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HESPOTEX_DATA"))
    parser.add_argument("--patients", type=int, default=6)
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data: name the folder that holds her2st, or set HESPOTEX_DATA")
    warnings.filterwarnings("ignore", category=hx.errors.HespotexWarning)

    sections = {name: her2st(name, Path(options.data)) for name in SECTIONS}
    patients = [synthetic(patient, seed=SEED) for patient in range(options.patients)]
    rows = {}
    for variant, changes in VARIANTS.items():
        stem = variant.replace(" ", "_").replace("/", "-")
        row = {"synthetic": scores(patients, RESULTS / f"synthetic--{stem}.parquet", changes)}
        for left_out in SECTIONS:
            rest = [name for name in SECTIONS if name != left_out]
            row[f"without {left_out}"] = scores(
                [sections[name] for name in rest],
                RESULTS / f"{left_out}--{stem}.parquet",
                changes,
                groups=rest,
                force=True,
            )
        rows[variant] = row
    table = pd.DataFrame(rows).T
    print("| variant | " + " | ".join(table) + " |\n| --- |" + " ---: |" * table.shape[1])
    for variant, row in table.iterrows():
        print(f"| {variant} | " + " | ".join(f"{value:.3f}" for value in row) + " |")


if __name__ == "__main__":
    main()
