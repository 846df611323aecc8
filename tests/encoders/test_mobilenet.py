"""The two ImageNet networks that are at hand in full, on real tissue: what their conversion measured is found again.

Against the originals only where ``ai-edge-litert`` is installed, which no extra of the package asks for.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

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
        return hx.encoders.create(f"timm:{name}", weights=weights, **{**PIXELS, **same, **options})

    return make


@pytest.fixture(scope="module")
def tissue(her2st_dir):
    """Tiles of 224 px at the image's own scale at 24 spots of a section."""
    return tiles_of(her2st_dir, "C3")


def tiles_of(her2st_dir, section):
    from PIL import Image

    spots = np.loadtxt(her2st_dir / "spots" / f"{section}_selection.tsv", skiprows=1)[::7, 4:6][:24]
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(her2st_dir / "images" / f"{section}.jpg")
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


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def more_tissue(her2st_dir):
    """The same of all four sections."""
    return np.concatenate([tiles_of(her2st_dir, section) for section in SECTIONS])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong", "measured"),
    [
        ("mobilenetv1_100", {"pad_type": None}, 0.787),
        ("mobilenetv2_100", {"pad_type": None}, 0.650),
        ("mobilenetv1_100", IMAGENET, 0.79),
        ("mobilenetv2_100", IMAGENET, 0.56),
    ],
)
def test_wrong_padding_and_normalisation_raise_nothing_and_spoil_the_features(
    network, more_tissue, name, wrong, measured
):
    right, spoilt = (network(name, "padsame", **options).encode(more_tissue, "cpu") for options in ({}, wrong))
    assert np.median(cosine(right, spoilt)) == pytest.approx(measured, abs=0.03)


@pytest.mark.parametrize("name", WIDTH)
def test_a_half_is_close_enough_to_the_exact_mean(network, tissue, name):
    exact, close = (network(name, "padsame", **options) for options in ({}, {"mean": 0.5, "std": 0.5}))
    assert cosine(exact.encode(tissue, "cpu"), close.encode(tissue, "cpu")).min() > 0.9999


ORIGINAL = {
    "mobilenetv1_100": "mobilenet_v1_1.0_224_quant_embedding_extractor.tflite",
    "mobilenetv2_100": "mobilenet_v2_1.0_224_quant.tflite",
}


@pytest.fixture(scope="module")
def original(data_dir):
    """``run(name, tiles)``: features of the quantised original."""
    litert = pytest.importorskip("ai_edge_litert.interpreter")

    def run(name, tiles):
        path = data_dir / "encoders_mobilenet_tflite" / ORIGINAL[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that all tensors are kept, of which one is wanted
            interpreter = litert.Interpreter(
                str(path),
                num_threads=1,
                experimental_preserve_all_tensors=True,
                # Of the delegates, XNNPACK rounds otherwise: features of v2 are 1 % longer by it.
                experimental_op_resolver_type=litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )
        interpreter.allocate_tensors()
        pooled = [
            tensor
            for tensor in interpreter.get_tensor_details()
            if tuple(tensor["shape"]) == (1, 1, 1, WIDTH[name]) and tensor["dtype"] == np.uint8
        ][-1]
        scale, zero = pooled["quantization"]
        features = []
        for tile in tiles:
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], tile[None])
            interpreter.invoke()
            features.append((interpreter.get_tensor(pooled["index"]).ravel().astype(np.float32) - zero) * scale)
        return np.array(features)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "measured"),
    [
        ("mobilenetv1_100", "padsame", (0.9993, 0.9968, 1.004)),
        ("mobilenetv1_100", "rot180", (0.9993, 0.9968, 1.004)),
        ("mobilenetv2_100", "padsame", (0.9967, 0.9909, 1.011)),
        ("mobilenetv2_100", "rot180", (0.9967, 0.9909, 1.011)),
    ],
)
def test_features_are_those_of_the_original(network, original, more_tissue, name, variant, measured):
    expected = original(name, more_tissue)
    turned = more_tissue if variant == "padsame" else more_tissue[:, ::-1, ::-1]
    features = network(name, variant).encode(turned, "cpu")
    mean = expected.mean(0)
    found = (
        np.median(cosine(features, expected)),
        np.median(cosine(features - mean, expected - mean)),
        np.median(np.linalg.norm(features, axis=1) / np.linalg.norm(expected, axis=1)),
    )
    assert found == pytest.approx(measured, abs=0.003)


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


def embedded(expression, encoder, *, enlarged):
    """Features and expression of the spots of each section."""
    sections = []
    for sdata, keep, values in expression.values():
        with pytest.warns(HespotexWarning, match="is enlarged 1.9-fold") if enlarged else nullcontext():
            features = hx.pp.embed(sdata, encoder, copy=True, progress_bar=False)
        sections.append((features[keep].astype(float), values))
    return sections


def score(sections) -> float:
    """Mean over the sections left out one by one, the penalty being chosen by the others."""
    scores = []
    for number, (x, y) in enumerate(sections):
        train = sections[:number] + sections[number + 1 :]
        penalty = max(10.0 ** np.arange(-1, 6.5, 0.5), key=lambda value, train=train: held_out(train, value))
        scores.append(np.nanmean(pearson(y, ridge(train, x, penalty))))
    return float(np.mean(scores))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "tile_um", "published"),
    [
        ("mobilenetv1_100", "padsame", 160.0, 0.337),
        ("mobilenetv2_100", "padsame", 160.0, 0.320),
        ("mobilenetv1_100", "padsame", 80.0, 0.309),
        ("mobilenetv2_100", "padsame", 80.0, 0.291),
        ("mobilenetv1_100", "rot180", 160.0, 0.335),
        ("mobilenetv2_100", "rot180", 160.0, 0.315),
    ],
)
def test_gene_expression_from_the_features_is_as_good_as_measured_before(
    network, expression, name, variant, tile_um, published
):
    """Ridge regression, one of four sections left out, penalty chosen by the others."""
    encoder = network(name, variant, tile_um=tile_um)
    assert score(embedded(expression, encoder, enlarged=tile_um < 100)) == pytest.approx(published, abs=0.004)


@pytest.mark.slow
@pytest.mark.parametrize(("tile_um", "published"), [(160.0, 0.305), (80.0, 0.286)])
def test_gene_expression_from_colour_is_less_and_as_measured_before(expression, tile_um, published):
    def colours(tiles):
        return np.concatenate([tiles.mean((1, 2)), tiles.std((1, 2))], axis=1)

    encoder = hx.encoders.from_module(colours, name="colours_of_tiles", tile_um=tile_um)
    assert score(embedded(expression, encoder, enlarged=False)) == pytest.approx(published, abs=0.004)
