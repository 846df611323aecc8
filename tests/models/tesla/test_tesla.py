"""What TESLA does beyond the published statements: our defaults, blocks, storage and bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

import hespotex as hx
from hespotex.data.section import Targets
from hespotex.errors import DataValueError, ModelMismatchError
from hespotex.models import create, load


def correlation(predicted, truth):
    return np.mean([np.corrcoef(predicted[:, g], truth[:, g])[0, 1] for g in range(truth.shape[1])])


def with_parts(section, **changed):
    return replace(section, parts=replace(section.parts, **changed))


@pytest.fixture
def section(make_parts):
    return make_parts()[0]


def fit(section, **options):
    return create("tesla", **options).fit([section])


def test_it_follows_the_truth_below_the_spot(make_parts):
    section, truth = make_parts(depth=60.0)
    predicted = fit(section).predict(section)
    assert predicted.level == "superpixel"
    assert predicted.unit == "counts"
    assert np.array_equal(predicted.ids, section.parts.ids)
    assert correlation(predicted.mean, truth) > 0.9


def test_colour_draws_the_border_between_two_tissues(make_parts):
    section, _ = make_parts(side=40)
    left = section.parts.coordinates[:, 0] < 168  # between two columns of spots, nearer to the left one
    spots = section.coordinates[:, 0] < 168
    counts = np.where(spots, 1.0, 9.0)[:, None]
    targets = Targets(counts, np.full(section.n_obs, 10.0), ("A",), unit="counts")
    section = with_parts(replace(section, targets=targets), colour=np.where(left, 0.2, 0.8)[:, None] * np.ones(3))

    def error(**options):
        return np.abs(fit(section, **options).predict(section).mean[:, 0] - np.where(left, 1.0, 9.0)).mean()

    assert error(colour_weight=1.0) < 0.8 * error(colour_weight=0.0)


def test_spot_and_superpixel_of_one_look_share_the_third_axis(section):
    colour = np.random.default_rng(0).uniform(size=(section.parts.n_parts, 3))
    bare = np.zeros(section.n_obs)
    bare[3] = 1
    share = sparse.csr_array(section.parts.share.multiply((1 - bare)[:, None]))
    lone = sparse.csr_array((np.ones(1), ([0], [17])), shape=share.shape)
    only = sparse.csr_array(share.multiply((np.arange(section.n_obs) != 0)[:, None])) + lone
    changed = with_parts(section, colour=colour, share=only)
    space = create("tesla")._space(changed)
    z = np.empty(section.n_obs)
    z[space.order] = space.spots[:, 2]
    assert z[0] == pytest.approx(space.superpixels[17, 2])
    # A spot that covers no superpixel has the colour of the nearest.
    nearest = np.hypot(*(section.parts.coordinates - section.coordinates[3]).T).argmin()
    assert z[3] == pytest.approx(space.superpixels[nearest, 2])


def test_weight_of_colour_does_not_grow_with_the_section(make_parts):
    small, large = make_parts(side=20)[0], make_parts(side=60)[0]
    spreads = [create("tesla")._space(section).superpixels[:, 2].std() for section in (small, large)]
    assert spreads == pytest.approx([0.5 * 40] * 2)
    published = [create("tesla", preset="paper")._space(s).superpixels[:, 2].std() for s in (small, large)]
    assert published[1] / published[0] == pytest.approx(3, rel=0.01)


def test_superpixels_far_from_all_spots_take_the_nearest_and_are_marked(section):
    far = section.parts.coordinates.copy()
    far[:5] += 5000.0
    moved = with_parts(section, coordinates=far)
    predicted = fit(moved, colour_weight=0.0).predict(moved)
    corner = np.flatnonzero((section.coordinates == section.coordinates.max(axis=0)).all(axis=1))
    np.testing.assert_allclose(predicted.mean[:5], np.repeat(section.targets[corner], 5, axis=0), rtol=1e-6)
    assert (predicted.ood[:5] == 1).all()
    assert (predicted.ood[5:] == 0).all()
    assert np.isfinite(predicted.mean).all()


def test_order_of_the_spots_does_not_matter(section):
    order = np.random.default_rng(0).permutation(section.n_obs)
    targets, parts = section.targets, section.parts
    shuffled = replace(
        section,
        ids=section.ids[order],
        features=section.features[order],
        coordinates=section.coordinates[order],
        region=section.region[order],
        targets=replace(targets, counts=targets.counts[order], library_size=targets.library_size[order]),
        parts=replace(parts, share=sparse.csr_array(parts.share[order])),
    )
    for options in ({}, {"colour_weight": 0.0}, {"colour_weight": 0.0, "neighbours": 3}):
        one, other = (fit(each, **options).predict(each).mean for each in (section, shuffled))
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_blocks_give_what_the_whole_gives(section, preset):
    model = create("tesla", preset=preset, unit="counts").fit([section])
    whole, blocks = model.predict(section), list(model.predict_blocks(section, block_rows=100))
    assert max(len(block.ids) for block in blocks) == 100
    assert np.array_equal(np.concatenate([block.mean for block in blocks]), whole.mean)
    assert np.array_equal(np.concatenate([block.ood for block in blocks]), whole.ood)


def test_saved_and_loaded_it_predicts_the_same(section, tmp_path):
    model = fit(section, power=3)
    model.save(tmp_path / "model.hx")
    again = load(tmp_path / "model.hx")
    assert again.config == model.config
    assert np.array_equal(again.predict(section).mean, model.predict(section).mean)


def test_unit_is_that_of_the_targets(make_parts):
    section, _ = make_parts(unit="log1p_cp10k")
    predicted = fit(section).predict(section)
    assert predicted.unit == "log1p_cp10k"
    assert predicted.mean.dtype == np.float32
    assert predicted.mean.max() <= section.targets[:].max() + 1e-5


def test_nuclei_are_interpolated_as_superpixels_are(make_parts):
    section, _ = make_parts(level="nucleus")
    assert fit(section).predict(section).level == "nucleus"


def test_genes_without_counts_stay_0_and_fewer_spots_than_neighbours_do(section):
    counts = section.targets.counts.copy()
    counts[:, 1] = 0
    silent = replace(section, targets=replace(section.targets, counts=counts))
    assert not fit(silent).predict(silent).mean[:, 1].any()
    assert np.isfinite(fit(section, neighbours=10_000).predict(section).mean).all()
    paper = create("tesla", preset="paper", neighbours=10_000).fit([section])
    assert paper.predict(section).mean.any(axis=1).all()


def test_tissue_of_one_colour_is_interpolated_in_space(section):
    even = with_parts(section, colour=np.full((section.parts.n_parts, 3), 0.7))
    np.testing.assert_allclose(
        fit(even).predict(even).mean, fit(section, colour_weight=0.0).predict(section).mean, rtol=1e-6
    )


def first_spot(section):
    targets = section.targets
    one = replace(targets, counts=targets.counts[:1], library_size=targets.library_size[:1])
    parts = replace(section.parts, share=sparse.csr_array(section.parts.share[:1]))
    return replace(
        section,
        ids=section.ids[:1],
        features=section.features[:1],
        coordinates=section.coordinates[:1],
        region=section.region[:1],
        targets=one,
        parts=parts,
    )


def test_bad_sections(section):
    with pytest.raises(DataValueError, match="one spot"):
        fit(first_spot(section))
    with pytest.raises(DataValueError, match="no parts"):
        fit(replace(section, parts=None))
    with pytest.raises(DataValueError, match="colour"):
        fit(with_parts(section, colour=None))
    with pytest.raises(DataValueError, match="no measured expression"):
        fit(replace(section, targets=None))
    with pytest.raises(DataValueError, match="no spot holds any"):
        fit(with_parts(section, share=sparse.csr_array(section.parts.share.shape)))
    colour = section.parts.colour.copy()
    colour[4] = np.nan
    with pytest.raises(DataValueError, match="hx.pp.embed"):
        fit(with_parts(section, colour=colour))


def test_another_section_is_refused(make_parts, section):
    model = fit(section)
    with pytest.raises(ModelMismatchError, match="fitted on"):
        model.predict(make_parts("other", side=30)[0])
    with pytest.raises(ModelMismatchError, match="not fitted"):
        create("tesla").predict(section)


@pytest.mark.parametrize(
    "options",
    [
        {"neighbours": 0},
        {"colour_weight": -1},
        {"power": 0},
        {"radius": 0},
        {"px_um": 0},
        {"weighting": "linear"},
        {"cut": "none"},
        {"empty": "nan"},
        {"colour_scale": "x"},
        {"colour_formula": "two"},
        {"unit": "tpm"},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        create("tesla", **options)


def test_presets():
    assert hx.models.get("tesla").info.presets == ("default", "paper")
    with pytest.raises(DataValueError, match="small"):
        create("tesla", preset="small")
