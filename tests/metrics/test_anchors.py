"""Ceiling and nulls on four public sections of one tumour, against independently measured values.

Adjacent sections of one tumour: nothing here is a score on an unseen patient.
"""

import gzip

import numpy as np
import pandas as pd
import pytest

from hespotex import metrics as m
from hespotex.data.units import normalize

pytestmark = pytest.mark.data
SECTIONS = ("C2", "C3", "C4", "C5")
TOLERANCE = 0.02


def raw(counts, library):
    return np.log1p(counts.astype(float))


# genes, transform: ceiling, null_coordinate (20 per sibling), null_depth
ROWS = {
    ("785", "log1p_cp10k"): (0.42, 0.08, 0.14),
    ("785", "log1p_cpm_panel"): (0.50, 0.14, 0.30),
    ("785", raw): (0.57, 0.20, 0.37),
    ("250", "log1p_cp10k"): (0.64, 0.17, 0.26),
    ("250", "log1p_cpm_panel"): (0.70, 0.15, 0.45),
    ("50", "log1p_cp10k"): (0.78, 0.21, 0.25),
}


@pytest.fixture(scope="module")
def sections(her2st_dir):
    tables, places = {}, {}
    for name in SECTIONS:
        with gzip.open(her2st_dir / "counts" / f"{name}.tsv.gz", "rt") as file:
            table = pd.read_csv(file, sep="\t", index_col=0)
        spots = pd.read_csv(her2st_dir / "spots" / f"{name}_selection.tsv", sep="\t")
        spots.index = [f"{x}x{y}" for x, y in zip(spots["x"], spots["y"], strict=True)]
        ids = [spot for spot in table.index if spot in spots.index]
        tables[name], places[name] = table.loc[ids], spots.loc[ids, ["x", "y"]].to_numpy(float)
    shared = sorted(set.intersection(*(set(table.columns) for table in tables.values())))
    counts = {name: table[shared].to_numpy(np.int64) for name, table in tables.items()}
    library = {name: table.to_numpy().sum(axis=1) for name, table in tables.items()}
    listed = (her2st_dir / "her_hvg_785.txt").read_text().split()
    means = np.mean([normalize(counts[name], library[name]).mean(axis=0) for name in SECTIONS], axis=0)
    order = np.argsort(-means)
    panels = {"785": [shared.index(gene) for gene in listed], "250": order[:250], "50": order[:50]}
    return counts, library, places, panels


def values_of(counts, library, transform):
    return transform(counts, library) if callable(transform) else normalize(counts, library, transform)


@pytest.mark.parametrize(("panel", "transform"), ROWS, ids=lambda value: getattr(value, "__name__", value))
def test_ceiling_and_nulls_are_those_measured(sections, panel, transform):
    counts, library, places, panels = sections
    chosen = {name: counts[name][:, panels[panel]] for name in SECTIONS}
    values = {name: values_of(chosen[name], library[name], transform) for name in SECTIONS}
    halves = [m.split_half(chosen[name], library[name], transform, n_draws=2) for name in SECTIONS]
    by_place, by_depth = [], []
    for name in SECTIONS:
        others = [other for other in SECTIONS if other != name]
        train = [values[other] for other in others]
        near = m.null_coordinate(train, [places[other] for other in others], places[name], k=20)
        depth = m.null_depth(train, [library[other] for other in others], library[name])
        by_place.append(np.nanmean(m.pearson(values[name], near)))
        by_depth.append(np.nanmean(m.pearson(values[name], depth)))
    found = m.ceiling(halves)
    measured = (found.pessimistic, np.mean(by_place), np.mean(by_depth))
    np.testing.assert_allclose(measured, ROWS[panel, transform], atol=TOLERANCE)
    assert found.mean_first == pytest.approx(ROWS[panel, transform][0], abs=TOLERANCE + 0.005)
