from __future__ import annotations

import json

import numpy as np
import pytest

import hespotex as hx
from hespotex.data.geometry import Level, Slide, resolve_slide, shape_centres
from hespotex.encoders import create, morphology
from hespotex.encoders.morphology import Morphology
from hespotex.errors import DataValueError, ModelMismatchError, ScaleError

MPP = 1.0


def as_slide(rgb: np.ndarray, mpp: float = MPP, chunk: int = 300) -> Slide:
    import dask.array as da

    array = da.from_array(np.ascontiguousarray(rgb.transpose(2, 0, 1)), chunks=(3, chunk, chunk))
    return Slide(key="image", levels=(Level(array, 1.0),), mpp=mpp, to_microns=np.diag([mpp, mpp, 1.0]))


def embed(encoder: Morphology, slide: Slide, centres: np.ndarray) -> np.ndarray:
    out = np.full((len(centres), encoder.n_features), np.nan, np.float32)
    for rows, features in encoder.embed(slide, centres, batch_size=8, device="cpu", progress_bar=False):
        assert features.dtype == np.float32
        assert np.isnan(out[rows]).all()  # each centre once
        out[rows] = features
    assert np.isfinite(out).all()
    return out


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """H&E-like noise with dark discs, 640 x 896 px."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    nuclei = gaussian_filter((rng.random((640, 896)) > 0.996).astype(float), 2.5) * 12
    fibres = 0.25 + 0.6 * gaussian_filter(rng.normal(size=(640, 896)), (2, 6))
    from hespotex.image.color import HE_VECTORS

    density = np.stack([np.clip(nuclei, 0, 0.8), np.clip(fibres, 0, 0.8)], axis=-1) @ HE_VECTORS
    return np.clip(255 * 10**-density, 0, 255).astype(np.uint8)


CENTRES = np.array([[320.0, 320.0], [450.5, 300.25], [64.0, 500.0], [10.0, 10.0], [890.0, 636.0]])
SMALL = {"tile_um": 100.0, "context_um": 200.0, "mpp": MPP}


def test_names_are_unique_and_as_many_as_features():
    for options in ({}, {"context_um": 0}, {"mpp": 3.2}, {"mpp": 0.5}):
        encoder = Morphology(**options)
        assert len(set(encoder.feature_names)) == len(encoder.feature_names) == encoder.n_features
    assert 100 <= Morphology().n_features <= 400


def test_parameters_rebuild_the_encoder():
    for encoder in (Morphology(), Morphology(tile_um=100, context_um=0, mpp=2)):
        params = encoder.params()
        assert json.loads(json.dumps(params)) == params
        again = create(**params)
        assert isinstance(again, Morphology)
        assert again.params() == params


def test_context_follows_the_tile():
    assert Morphology(tile_um=100).context_um == 300


@pytest.mark.parametrize(
    "options", [{"tile_um": 0}, {"tile_um": float("nan")}, {"mpp": -1}, {"context_um": 50}, {"mpp": 12}]
)
def test_sizes_that_make_no_sense_are_refused(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        Morphology(**options)


def test_finer_than_half_the_slide_is_refused(tissue):
    with pytest.raises(ScaleError):
        embed(Morphology(), as_slide(tissue, mpp=3.0), CENTRES)


def test_equal_calls_give_equal_features(tissue):
    encoder = Morphology(**SMALL)
    first, second = (embed(encoder, as_slide(tissue), CENTRES) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_features_do_not_depend_on_blocks_chunks_or_parts(tissue, monkeypatch):
    encoder = Morphology(**SMALL)
    expected = embed(encoder, as_slide(tissue), CENTRES)
    monkeypatch.setattr(morphology, "_BLOCK_PX", 64)
    np.testing.assert_allclose(embed(encoder, as_slide(tissue, chunk=77), CENTRES), expected, atol=1e-5)
    monkeypatch.setattr(morphology, "_PIECE_PX", 50)
    np.testing.assert_allclose(embed(encoder, as_slide(tissue), CENTRES), expected, atol=1e-5)
    monkeypatch.setattr(morphology, "_PART_PX", 200)
    np.testing.assert_allclose(embed(encoder, as_slide(tissue), CENTRES), expected, atol=1e-5)
    monkeypatch.setattr(morphology, "_CENTRES_AT_ONCE", 1)
    np.testing.assert_allclose(embed(encoder, as_slide(tissue), CENTRES), expected, atol=1e-5)


@pytest.mark.parametrize("n_jobs", [1, 2, 5])
def test_many_places_on_a_band_that_scrolls_are_those_of_one_that_does_not(tissue, monkeypatch, n_jobs):
    from hespotex.image import stream

    encoder = Morphology(tile_um=30.0, context_um=60.0, mpp=MPP)
    slide = as_slide(np.tile(tissue, (2, 1, 1)))
    centres = np.random.default_rng(0).uniform((0, 0), (896, 1280), (300, 2))
    centres = centres[
        (centres[:, 1] < 90) | (centres[:, 1] > 1000)
    ]  # with rows of blocks between them that nobody needs
    expected = embed(encoder, slide, centres)
    monkeypatch.setattr(morphology, "_BLOCK_PX", 64)
    rows = []

    def corners(*args, **how):
        found = block_corners(*args, **how)
        rows.extend(np.unique(found[:, 0]))
        return found

    block_corners = stream.block_corners
    monkeypatch.setattr(stream, "block_corners", corners)
    with hx.settings.override(n_jobs=n_jobs):
        np.testing.assert_allclose(embed(encoder, slide, centres), expected, atol=1e-5)
    assert max(np.diff(rows)) > 64


@pytest.mark.parametrize(
    ("mpp", "shape", "options", "centres"),
    [
        (0.3, (4600, 2347), {"tile_um": 50}, [(1170, 3270)]),
        (0.5, (9000, 1408), {"tile_um": 160, "context_um": 0}, [(704, 1424), (704, 8500)]),
    ],
)
def test_a_reach_that_ends_where_a_block_does(tissue, mpp, shape, options, centres):
    times = [-(-size // part) for size, part in zip(shape, tissue.shape, strict=False)]
    slide = as_slide(np.tile(tissue, (*times, 1))[: shape[0], : shape[1]], mpp=mpp)
    encoder, centres = Morphology(**options), np.array(centres, float)
    found = embed(encoder, slide, centres)
    for row, centre in enumerate(centres):
        np.testing.assert_allclose(embed(encoder, slide, centre[None] + (0, 1e-6))[0], found[row], atol=1e-4)


def test_places_far_from_the_image_are_described_by_its_border(tissue):
    encoder = Morphology(**SMALL)
    far = np.array([[5000.0, 320.0], [320.0, -5000.0], [-3000.0, 9000.0]])
    border = far.clip(0, (896, 640))
    found = embed(encoder, as_slide(tissue), far)
    assert np.abs(found - embed(encoder, as_slide(tissue), border)).mean() < 0.1


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_an_error_stops_who_reads_ahead(tissue, monkeypatch, n_jobs):
    import threading

    def broken(self, block):
        raise MemoryError

    monkeypatch.setattr(Morphology, "_fine_maps", broken)
    monkeypatch.setattr(morphology, "_BLOCK_PX", 64)
    with hx.settings.override(n_jobs=n_jobs), pytest.raises(MemoryError) as caught:
        embed(Morphology(**SMALL), as_slide(tissue), CENTRES)
    assert caught.tb is not None  # still there, as in a notebook
    assert not [thread for thread in threading.enumerate() if thread.name == "hespotex-prefetch"]


def test_memory_grows_with_the_width_of_a_part_and_not_with_the_slide(tissue, monkeypatch):
    encoder = Morphology(**SMALL)
    monkeypatch.setattr(morphology, "_BLOCK_PX", 64)
    bands = []

    class Band(morphology._Band):
        def __init__(self, *args):
            super().__init__(*args)
            bands.append(self._values.shape[1:])

    monkeypatch.setattr(morphology, "_Band", Band)
    long = np.tile(tissue, (4, 1, 1))
    centres = np.random.default_rng(0).uniform((0, 0), long.shape[1::-1], (100, 2))
    embed(encoder, as_slide(long), centres)
    embed(encoder, as_slide(tissue), centres / (1, 4))
    assert bands[0] == bands[1]
    monkeypatch.setattr(morphology, "_PART_PX", 300)
    embed(encoder, as_slide(tissue), CENTRES)
    assert max(columns for _, columns in bands[2:]) < bands[0][1]


def test_a_sweep_reads_each_chunk_once(tissue, monkeypatch):
    import dask.array as da

    monkeypatch.setattr(morphology, "_BLOCK_PX", 64)
    reads = []

    def read(block, block_info=None):
        reads.append(block_info[0]["chunk-location"])
        return block

    slide = as_slide(tissue, chunk=100)
    level = Level(da.map_blocks(read, slide.levels[0].array, dtype=np.uint8), 1.0)
    reads.clear()  # of dask's own probe
    slide = Slide(key="image", levels=(level,), mpp=MPP, to_microns=slide.to_microns)
    embed(Morphology(**SMALL), slide, np.random.default_rng(0).uniform((0, 0), (896, 640), (100, 2)))
    assert len(reads) == len(set(reads)) == 63


def test_features_do_not_depend_on_other_centres(tissue):
    encoder = Morphology(**SMALL)
    together = embed(encoder, as_slide(tissue), CENTRES)
    for row, centre in enumerate(CENTRES):
        np.testing.assert_allclose(embed(encoder, as_slide(tissue), centre[None])[0], together[row], atol=1e-5)


def test_no_centres_no_features(tissue):
    assert (
        list(Morphology().embed(as_slide(tissue), np.empty((0, 2)), batch_size=8, device="cpu", progress_bar=False))
        == []
    )


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_right_angle_changes_nothing(tissue, turns):
    encoder = Morphology(**SMALL)
    size = 640  # a multiple of the coarsest pixel, so that the pyramids' grids coincide
    square = np.ascontiguousarray(tissue[:size, :size])
    centres = CENTRES[:3]
    turned = centres
    for _ in range(turns):
        turned = np.column_stack([turned[:, 1], size - turned[:, 0]])
    expected = embed(encoder, as_slide(square), centres)
    found = embed(encoder, as_slide(np.rot90(square, turns)), turned)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_shift_by_whole_coarse_pixels_changes_nothing(tissue):
    encoder = Morphology(**SMALL)
    unit = 2**encoder._levels
    shifted = tissue[unit:, unit:]
    centre = np.array([[330.0, 330.0]])
    expected = embed(encoder, as_slide(tissue), centre)
    np.testing.assert_allclose(embed(encoder, as_slide(shifted), centre - unit), expected, atol=1e-4)


def test_a_shift_by_one_pixel_changes_little(tissue):
    encoder = Morphology(**SMALL)
    many = np.random.default_rng(0).uniform(200, 440, (60, 2))
    expected = embed(encoder, as_slide(tissue), many)
    found = embed(encoder, as_slide(tissue[3:, 5:]), many - (5, 3))
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(expected.T, found.T, strict=True) if a.std() > 1e-6]
    assert np.median(correlations) > 0.97


@pytest.mark.parametrize("value", [255, 240, 0], ids=["white", "tinted", "black"])
def test_blank_glass_is_described_by_finite_numbers(value):
    encoder = Morphology(**SMALL)
    centres = np.array([[250.0, 200.0], [3.0, 3.0], [499.0, 100.0]])
    features = embed(encoder, as_slide(np.full((400, 500, 3), value, np.uint8)), centres)
    texture = [i for i, name in enumerate(encoder.feature_names) if "_mean" not in name and "_he_product" not in name]
    assert np.abs(features[:, texture]).max() < 2e-3
    np.testing.assert_allclose(features[0], features[1], atol=1e-3)


def test_the_version_of_the_formulas_is_part_of_the_parameters():
    params = Morphology(**SMALL).params()
    assert Morphology(**{name: value for name, value in params.items() if name != "name"}).params() == params
    with pytest.raises(ModelMismatchError, match="version=0"):
        Morphology(version=0)


def test_black_is_glass(tissue):
    encoder = Morphology(**SMALL)
    black, white = tissue.copy(), tissue.copy()
    black[:, 512:], white[:, 512:] = 0, 255
    np.testing.assert_array_equal(embed(encoder, as_slide(black), CENTRES), embed(encoder, as_slide(white), CENTRES))


def test_first_moments_are_those_of_the_pixels(tissue):
    from hespotex.image.color import stain_tables

    encoder = Morphology(tile_um=96, context_um=192, mpp=MPP)
    centre = np.array([[320.0, 328.0]])  # windows on whole cells
    found = dict(zip(encoder.feature_names, embed(encoder, as_slide(tissue), centre)[0], strict=True))
    tables = stain_tables()
    dyes = sum(tables[:, channel][:, tissue[..., channel]] for channel in range(3))
    for name, half in (("tile", 48), ("context", 96)):
        window = dyes[:, 328 - half : 328 + half, 320 - half : 320 + half]
        np.testing.assert_allclose(found[f"{name}_h_mean"], window[0].mean(), rtol=1e-4)
        np.testing.assert_allclose(found[f"{name}_e_mean"], window[1].mean(), rtol=1e-4)
        np.testing.assert_allclose(found[f"{name}_e_sd"], window[1].std(), rtol=1e-3)
        np.testing.assert_allclose(found[f"{name}_he_product"], (window[0] * window[1]).mean(), rtol=1e-3)


def test_scale_in_microns_not_pixels(tissue):
    encoder = Morphology(**SMALL)
    doubled = tissue.repeat(2, axis=0).repeat(2, axis=1)
    expected = embed(encoder, as_slide(tissue), CENTRES)
    np.testing.assert_allclose(embed(encoder, as_slide(doubled, mpp=MPP / 2), CENTRES * 2), expected, atol=1e-5)


def test_a_fine_grid_agrees_with_single_windows(tissue):
    encoder = Morphology(**SMALL)
    grid = np.stack(np.meshgrid(np.arange(4, 896, 4.0), np.arange(4, 640, 4.0)), axis=-1).reshape(-1, 2)
    some = np.random.default_rng(0).choice(len(grid), 20, replace=False)
    fine = embed(encoder, as_slide(tissue), grid)
    np.testing.assert_allclose(fine[some], embed(encoder, as_slide(tissue), grid[some]), atol=1e-5)


def test_more_nuclei_more_blobs(section):
    """On a synthetic section the blobs follow the true cells, which the encoder is not told."""
    slide = resolve_slide(section)
    centres = shape_centres(section, "spots", slide)
    encoder = Morphology(tile_um=60, context_um=0)
    features = embed(encoder, slide, centres)
    cells = section.points[next(iter(section.points))].compute()
    xy = cells[["x", "y"]].to_numpy()
    count = (np.abs(xy[None] - centres[:, None]).max(axis=2) < 60 / slide.mpp / 2).sum(axis=1)
    blobs = features[:, encoder.feature_names.index("tile_blobs1_1")]
    assert np.corrcoef(blobs, count)[0, 1] > 0.8


def test_by_name_through_pp(section):
    hx.pp.embed(section, "morphology", tile_um=60.0)
    table = section.tables["table"]
    assert table.obsm["X_morphology"].shape == (table.n_obs, Morphology().n_features)


def test_real_section_at_low_resolution(data_dir):
    from PIL import Image

    path = data_dir / "her2st_a1_lowres" / "A1_image.png"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    rgb = np.asarray(Image.open(path).convert("RGB"))
    slide = as_slide(rgb, mpp=3.2, chunk=512)
    encoder = Morphology(mpp=3.2)
    centres = np.random.default_rng(0).uniform([300, 900], [1400, 1900], (50, 2))
    features = embed(encoder, slide, centres)
    assert (features.std(axis=0) > 0).mean() > 0.95
