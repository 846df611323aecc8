"""The two ImageNet networks that are at hand in full, on real tissue: what their conversion measured is found again."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import hespotex as hx
from hespotex.errors import HespotexWarning
from hespotex.metrics import pearson

pytest.importorskip("timm")
pytestmark = pytest.mark.data

SECTIONS = ("C2", "C3", "C4", "C5")
WIDTH = {"mobilenetv1_100": 1024, "mobilenetv2_100": 1280}
PIXELS = {"mean": 128 / 255, "std": 128 / 255}  # of both files; timm's own for v2 would be wrong


@pytest.fixture(scope="module")
def network(data_dir):
    """``make(name, variant, **options)``."""

    def make(name, variant, **options):
        weights = data_dir / "encoders_timm" / f"{name}_{variant}.safetensors"
        same = {"pad_type": "same"} if variant == "padsame" else {}
        return hx.encoders.create(f"timm:{name}", weights=weights, **PIXELS, **same, **options)

    return make


@pytest.fixture(scope="module")
def tissue(her2st_dir):
    """Tiles of 224 px at the image's own scale at 24 spots of a section."""
    from PIL import Image

    spots = np.loadtxt(her2st_dir / "spots" / "C3_selection.tsv", skiprows=1)[::7, 4:6][:24]
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(her2st_dir / "images" / "C3.jpg")
        boxes = [(x - 112, y - 112, x + 112, y + 112) for x, y in np.round(spots).astype(int).tolist()]
        return np.stack([np.asarray(image.crop(box)) for box in boxes])
    finally:
        Image.MAX_IMAGE_PIXELS = before


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("name", WIDTH)
def test_the_file_with_turned_kernels_gives_the_same_on_the_turned_tile(network, tissue, name):
    same, turned = network(name, "padsame"), network(name, "rot180")
    features = same.encode(tissue, "cpu")
    assert features.shape == (24, WIDTH[name])
    assert features.min() >= 0
    assert features.max() <= 6  # of ReLU6, averaged
    np.testing.assert_allclose(features, turned.encode(tissue[:, ::-1, ::-1], "cpu"), atol=2e-3)
    # Upright, it gives the features of the turned tile: 0.928 and 0.841 in the median.
    upright = cosine(features, turned.encode(tissue, "cpu"))
    assert np.median(upright) == pytest.approx({"mobilenetv1_100": 0.928, "mobilenetv2_100": 0.841}[name], abs=0.03)


@pytest.mark.parametrize("name", WIDTH)
def test_bfloat16_keeps_the_features(network, tissue, name):
    blank = np.zeros((1, 224, 224, 3), np.uint8)
    tiles = np.concatenate([tissue, blank])
    full, half = (network(name, "padsame", dtype=dtype).encode(tiles, "cpu") for dtype in ("float32", "bfloat16"))
    assert cosine(full, half).min() >= 0.993


@pytest.fixture(scope="module")
def expression(her2st_dir):
    """Sections with their spots of at least 100 counts, and log1p of counts per 10,000 of the 250 most variable genes."""
    sections = {}
    for section in SECTIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HespotexWarning)  # of spots without counts
            sdata = hx.datasets.her2st(section, path=her2st_dir)
        table = sdata["table"]
        counts = table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)
        total = counts.sum(1)
        values = np.log1p(counts / np.maximum(total, 1)[:, None] * 1e4)
        sections[section] = (sdata, total >= 100, dict(zip(table.var_names, values.T, strict=True)))
    shared = sorted(set.intersection(*(set(genes) for *_, genes in sections.values())))
    kept, detected, by_section = {}, [], []
    for section, (_, keep, genes) in sections.items():
        kept[section] = np.column_stack([genes[gene] for gene in shared])[keep]
        detected.append(kept[section] > 0)
        by_section.append(kept[section].var(0))
    often = np.concatenate(detected).mean(0) > 0.1
    chosen = np.argsort(-np.where(often, np.mean(by_section, axis=0), -1))[:250]
    return {section: (sections[section][0], sections[section][1], kept[section][:, chosen]) for section in SECTIONS}


def ridge(train: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray, penalty: float) -> np.ndarray:
    features, targets = (np.concatenate(parts) for parts in zip(*train, strict=True))
    centre, spread = features.mean(0), features.std(0) + 1e-8
    z, query, mean = (features - centre) / spread, (x - centre) / spread, targets.mean(0)
    weights = np.linalg.solve(z @ z.T + penalty * np.eye(len(z)), targets - mean)
    return query @ z.T @ weights + mean


def held_out(sections: list[tuple[np.ndarray, np.ndarray]], penalty: float) -> float:
    """Mean correlation over the genes, mean over the sections that are left out one by one."""
    scores = []
    for number, (x, y) in enumerate(sections):
        train = sections[:number] + sections[number + 1 :]
        scores.append(np.nanmean(pearson(y, ridge(train, x, penalty))))
    return float(np.mean(scores))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), [("mobilenetv1_100", 0.337), ("mobilenetv2_100", 0.320)])
def test_gene_expression_from_the_features_is_as_good_as_measured_before(network, expression, name, published):
    """Tiles of 160 µm, ridge regression, one of four sections left out, penalty chosen by the others."""
    encoder = network(name, "padsame", tile_um=160.0)
    sections = []
    for sdata, keep, values in expression.values():
        features = hx.pp.embed(sdata, encoder, copy=True, progress_bar=False)
        sections.append((features[keep].astype(float), values))
    scores = []
    for number, (x, y) in enumerate(sections):
        train = sections[:number] + sections[number + 1 :]
        penalty = max(10.0 ** np.arange(2, 6.5, 0.5), key=lambda value, train=train: held_out(train, value))
        scores.append(np.nanmean(pearson(y, ridge(train, x, penalty))))
    assert np.mean(scores) == pytest.approx(published, abs=0.004)
