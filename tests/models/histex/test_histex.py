"""Behaviour of the whole model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.section import Parts, Targets
from hespotex.data.shares import aggregate
from hespotex.errors import CheckpointError, DataValueError, ModelMismatchError
from hespotex.models import Run, create, get, load
from hespotex.models._inner import gene_correlation
from hespotex.models.histex.context import Places, densified, is_staggered
from hespotex.models.histex.inputs import Batches, Inputs, Shape, fit_scale, spots_of
from hespotex.models.histex.model import spot_loss
from hespotex.models.histex.network import network_of
from hespotex.models.histex.scale import Scale

RUN = Run(seed=0, device="cpu")
QUICK = {"epochs": 1, "width": 8, "hidden": (8,), "n_members": 2}


@pytest.fixture(scope="module")
def section(make_parts):
    return make_parts(side=24)[0]


@pytest.fixture(scope="module")
def fitted(section):
    return create("histex", **QUICK).fit([section], RUN)


def changed(section, **fields):
    """The section with other fields of its parts."""
    return replace(section, parts=replace(section.parts, **fields))


def subset(section, cells):
    """The section with some of its superpixels only, in that order."""
    parts = section.parts
    rows = {name: getattr(parts, name)[cells] for name in ("ids", "coordinates", "features", "colour", "grid")}
    return changed(section, share=parts.share[:, cells], **rows)


def test_finds_the_truth_below_the_spots(make_parts):
    section, truth = make_parts(side=30)
    model = create("histex", epochs=8, width=32, hidden=(64,), n_members=1).fit([section], RUN)
    predicted = model.predict(section)
    assert np.nanmean(gene_correlation(truth, predicted.mean)) > 0.85
    sums = aggregate(section.parts.share, predicted.mean)
    assert sums.sum() == pytest.approx(np.sum(section.targets.counts), rel=0.2)
    assert len(model.history) == 8
    assert model.history[-1]["mse"] < 0.3 * model.history[0]["mse"]


def test_the_prediction_names_what_it_is(fitted, section):
    predicted = fitted.predict(section)
    assert predicted.level == "superpixel"
    assert predicted.unit == "counts"
    assert list(predicted.ids) == list(section.parts.ids)
    assert predicted.genes == section.targets.genes
    assert predicted.mean.dtype == predicted.std.dtype == np.float32
    assert (predicted.mean >= 0).all()
    assert (predicted.std >= 0).all()
    assert predicted.latent.shape == (section.parts.n_parts, 2 * 8)


def test_counts_are_learnt_whatever_unit_the_targets_are_in(fitted, section):
    logs = replace(section, targets=section.targets.in_unit("log1p_cp10k"))
    other = create("histex", **QUICK).fit([logs], RUN).predict(logs)
    assert other.unit == "counts"
    np.testing.assert_array_equal(other.mean, fitted.predict(section).mean)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_row_blocks_change_nothing(section, preset):
    model = create("histex", preset=preset, **QUICK).fit([section], RUN)
    whole = model.predict(section)
    blocks = list(model.predict_blocks(section, block_rows=100))
    assert max(len(block.ids) for block in blocks) == 100
    for name in ("mean", "std", "latent"):
        joined = np.concatenate([getattr(block, name) for block in blocks])
        np.testing.assert_allclose(joined, getattr(whole, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_order_of_the_superpixels_changes_nothing(section, preset):
    model = create("histex", preset=preset, **QUICK).fit([section], RUN)
    order = np.random.default_rng(0).permutation(section.parts.n_parts)
    np.testing.assert_allclose(
        model.predict(subset(section, order)).mean, model.predict(section).mean[order], rtol=1e-4, atol=1e-5
    )


def test_order_of_the_spots_changes_no_context(section):
    order = np.random.default_rng(1).permutation(section.n_obs)
    targets = section.targets
    shuffled = replace(
        section,
        ids=section.ids[order],
        features=section.features[order],
        coordinates=section.coordinates[order],
        region=None,
        targets=replace(targets, counts=targets.counts[order], library_size=targets.library_size[order]),
        parts=replace(section.parts, share=section.parts.share[order]),
    )
    model = create("histex", **QUICK)
    model.fit([section], RUN)
    first = model.predict(section).mean
    model.fitted_on = create("histex", **QUICK).fit([shuffled], RUN).fitted_on
    np.testing.assert_allclose(model.predict(shuffled).mean, first, rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_bits_and_leave_the_global_state_alone(fitted, section):
    before = torch.random.get_rng_state()
    again = create("histex", **QUICK).fit([section], RUN)
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(again.predict(section).mean, fitted.predict(section).mean)
    other = create("histex", **QUICK).fit([section], Run(seed=1, device="cpu"))
    assert not np.array_equal(other.predict(section).mean, fitted.predict(section).mean)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_saving_and_loading_gives_the_same_bits(section, tmp_path, preset):
    model = create("histex", preset=preset, **QUICK).fit([section], RUN)
    expected = model.predict(section)
    again = load(model.save(tmp_path / "model"))
    for name in ("mean", "std", "latent"):
        np.testing.assert_array_equal(getattr(again.predict(section), name), getattr(expected, name))


def test_a_state_of_other_genes_is_an_error(fitted):
    arrays, values = fitted.state()
    model = create("histex", **QUICK)
    model.genes, model.n_features = ("A",), fitted.n_features
    with pytest.raises(CheckpointError, match="scale_low"):
        model.load_state(arrays, values)


def test_an_interrupted_fit_goes_on(section, tmp_path, monkeypatch):
    options = {**QUICK, "epochs": 3}
    whole = create("histex", **options).fit([section], RUN)
    run, calls = replace(RUN, checkpoint_dir=tmp_path), []

    def interrupted(network, batch):
        calls.append(1)
        if len(calls) > 110:  # in the third epoch, of 25 batches and two networks each
            raise KeyboardInterrupt
        return spot_loss(network, batch)

    with monkeypatch.context() as patch:
        patch.setattr("hespotex.models.histex.model.spot_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            create("histex", **options).fit([section], run)
    assert list(tmp_path.iterdir())
    resumed = create("histex", **options).fit([section], run)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(resumed.predict(section).mean, whole.predict(section).mean)


def test_several_sections_share_one_network(make_parts):
    sections = [make_parts(f"s{i}", side=15 + i, seed=i)[0] for i in range(2)]
    model = create("histex", **QUICK).fit(sections, RUN)
    for section in sections:
        assert model.predict(section).mean.shape == (section.parts.n_parts, 4)
    spots = [spots_of(section) for section in sections]
    shape = Shape.of(spots, "fixed")
    scale = fit_scale(spots, shape, "fixed")
    inputs = [Inputs.of(model.config, shape, each, scale, None) for each in spots]
    mixed = Batches(inputs, scale, size=99, seed=None)[0]
    alone = [each.training(each.spots.rows, scale) for each in inputs]
    for name in ("tokens", "present", "context", "weight", "target", "importance"):
        assert torch.equal(getattr(mixed, name), torch.cat([getattr(each, name) for each in alone]))
    networks = [network_of(model.config, 5 + 5, 4)]
    with torch.no_grad():
        together, first, second = (float(spot_loss(networks[0], each)) for each in (mixed, *alone))
    n, m = (len(each.target) for each in alone)
    assert together == pytest.approx((n * first + m * second) / (n + m), rel=1e-5)


@pytest.mark.parametrize("turn", [[[0, 1], [-1, 0]], [[-1, 0], [0, 1]], [[0.8, 0.6], [-0.6, 0.8]]])
def test_microns_may_be_turned_against_the_grid(section, fitted, turn):
    """As where an image is aligned to another frame by a rotation or a reflection."""
    moved = changed(section, coordinates=section.parts.coordinates @ np.array(turn) + [5000.0, -700.0])
    moved = replace(moved, coordinates=section.coordinates @ np.array(turn) + [5000.0, -700.0])
    ours, theirs = spots_of(section), spots_of(moved)
    np.testing.assert_array_equal(theirs.position, ours.position)
    assert Shape.of([theirs], "fixed") == Shape.of([ours], "fixed")
    again = create("histex", **QUICK).fit([moved], RUN)
    np.testing.assert_allclose(again.predict(moved).mean, fitted.predict(section).mean, rtol=1e-5)


def test_more_overlap_is_an_option_of_prediction(fitted, section):
    more = fitted.with_options(overlap=3)
    assert more.predict(section).mean.shape == fitted.predict(section).mean.shape
    assert not np.array_equal(more.predict(section).mean, fitted.predict(section).mean)
    with pytest.raises(DataValueError, match="no option of prediction"):
        fitted.with_options(epochs=3)


@pytest.mark.parametrize("overlap", [1, 2, 3, 8])
def test_every_superpixel_lies_in_some_window_of_the_prediction(section, overlap):
    config = create("histex", overlap=overlap).config
    spots = spots_of(section)
    shape = Shape.of([spots], "fixed")
    inputs = Inputs.of(config, shape, spots, fit_scale([spots], shape, "fixed"), None)
    place = spots.cells.place[100:200]
    windows = spots.cells.windows(inputs.corners(place), shape.side)
    assert set(range(100, 200)) <= set(windows.ravel().tolist())


def test_a_section_with_holes_is_predicted_where_there_is_tissue(section):
    kept = np.flatnonzero(np.random.default_rng(0).uniform(size=section.parts.n_parts) > 0.3)
    holes = subset(section, kept)
    model = create("histex", **QUICK).fit([holes], RUN)
    assert np.isfinite(model.predict(holes).mean).all()
    assert model.predict(holes).mean.shape == (len(kept), 4)


def test_spots_without_superpixels_supervise_nothing(section):
    share = section.parts.share.tolil()
    share[:4] = 0
    partly = changed(section, share=sparse.csr_array(share))
    assert spots_of(partly).rows.tolist() == list(range(4, section.n_obs))
    assert np.isfinite(create("histex", **QUICK).fit([partly], RUN).predict(partly).mean).all()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_genes_without_counts_are_predicted_near_zero(section, preset):
    counts = np.array(section.targets.counts)
    counts[:, 1] = 0
    silent = replace(section, targets=replace(section.targets, counts=counts))
    mean = create("histex", preset=preset, **QUICK).fit([silent], RUN).predict(silent).mean
    assert np.isfinite(mean).all()
    assert mean[:, 1].max() < 0.5 * mean[:, 0].mean()


def test_bright_spots_do_not_press_the_others():
    density = np.random.default_rng(0).uniform(0, 2, size=(100, 1))
    scale = Scale.of_density(density)
    density[0] = 1000
    assert Scale.of_density(density).span[0] == pytest.approx(scale.span[0], rel=0.1)
    assert Scale.of_density(np.zeros((3, 1))).span[0] == 1


def test_equal_distances_are_decided_by_place_not_by_order():
    row, column = np.divmod(np.arange(25), 5)
    places = Places.measured(np.column_stack([row, column]).astype(float), np.zeros((25, 1), dtype=np.float32))
    assert places.nearest(np.array([[2.0, 2.0]]), 3).tolist() == [[12, 7, 11]]
    order = np.random.default_rng(0).permutation(25)
    mixed = Places.measured(places.positions[order], places.values)
    assert order[mixed.nearest(np.array([[2.0, 2.0]]), 3)].tolist() == [[12, 7, 11]]


def test_places_are_not_interpolated_across_a_hole():
    line = np.column_stack([np.repeat([0.0, 1.0], 3), np.tile([0.0, 1.0, 2.0], 2)])
    far = np.concatenate([line, line + [0, 50]])
    places = densified(Places.measured(far, np.zeros((12, 1), dtype=np.float32)))
    assert not ((places.positions[:, 1] > 3) & (places.positions[:, 1] < 49)).any()
    in_line = Places.measured(np.column_stack([np.zeros(4), np.arange(4.0)]), np.zeros((4, 1), dtype=np.float32))
    assert len(densified(in_line).positions) == 4


def test_the_published_lattice_is_told_from_others(section):
    column, row = np.divmod(np.arange(12), 3)
    staggered = np.column_stack([27.5 + 100 * column, 27.5 + 100 * row + 50 * (column % 2)])
    assert is_staggered(staggered)
    assert not is_staggered(staggered + 3)
    assert not is_staggered(np.column_stack([27.5 + 100 * column, 27.5 + 50 * row]))
    assert not is_staggered(section.coordinates)


def test_paper_preset_reads_the_published_lattice(make_parts):
    section, _ = make_parts(side=50, radius_um=27.5, pitch_um=100.0)
    column, row = np.divmod(np.arange(16), 4)
    xy = np.column_stack([27.5 + 100 * column, 27.5 + 100 * row + 50 * (column % 2)])
    section = replace(section, coordinates=xy)
    config = get("histex").preset("paper")
    spots = spots_of(section)
    shape = Shape.of([spots], "original")
    places = Inputs.of(config, shape, spots, fit_scale([spots], shape, "original"), None).places
    assert len(places.positions) > 2.5 * 16
    assert places.values.min() == 0
    assert places.values.max() == pytest.approx(1)
    assert {tuple(p) for p in (xy[:, ::-1] / 8).tolist()} <= {tuple(p) for p in places.positions.tolist()}


def test_another_section_needs_another_fit(fitted, make_parts):
    with pytest.raises(ModelMismatchError, match="predicts only the section it was fitted on"):
        fitted.predict(make_parts("other", side=26)[0])


def test_one_spot_or_too_few_are_an_error(make_parts):
    section, _ = make_parts(side=5)
    assert section.n_obs == 1
    with pytest.raises(DataValueError, match="n_context=5, but only 1 measured places"):
        create("histex", preset="paper", **QUICK).fit([section], RUN)
    with pytest.raises(DataValueError, match="set n_context to at most"):
        create("histex", **QUICK).fit([section], RUN)
    few, _ = make_parts(side=10)
    with pytest.raises(DataValueError, match=r"n_context=8, but only \d measured places"):
        create("histex", **QUICK, n_context=8).fit([few], RUN)
    model = create("histex", **QUICK, n_context=1).fit([few], RUN)
    assert model.predict(few).mean.shape == (100, 4)


def test_bad_sections_are_errors(section, make_parts):
    def fit(bad):
        create("histex", **QUICK).fit([bad], RUN)

    features = np.array(section.parts.features)
    features[300] = np.nan
    with pytest.raises(DataValueError, match="features that are NaN"):
        fit(changed(section, features=features))
    with pytest.raises(DataValueError, match=r"no colour; make them with hx.pp.embed\(sdata, 'rgb'"):
        fit(changed(section, colour=None))
    with pytest.raises(DataValueError, match=r"hx.pp.superpixels\(sdata\)"):
        fit(changed(section, grid=None))
    with pytest.raises(DataValueError, match="share a row and column"):
        fit(changed(section, grid=np.zeros_like(section.parts.grid)))
    with pytest.raises(DataValueError, match="lie in one row"):
        fit(changed(section, coordinates=section.parts.coordinates * [1, 0]))
    with pytest.raises(DataValueError, match="no spot holds any"):
        fit(changed(section, share=sparse.csr_array(section.parts.share.shape)))
    with pytest.raises(DataValueError, match="predicts superpixels"):
        fit(make_parts(level="nucleus")[0])
    with pytest.raises(DataValueError, match="no parts"):
        fit(replace(section, parts=None))
    counts = np.array(section.targets.counts, dtype=float)
    counts[3, 1] = np.nan
    with pytest.raises(DataValueError, match="counts that are NaN"):
        fit(replace(section, targets=replace(section.targets, counts=counts)))
    nothing = Parts(np.empty(0), np.empty((0, 2)), section.parts.share[:, :0], np.empty((0, 5)), np.empty((0, 3)),
                    np.empty((0, 2), dtype=int), 8.0, "superpixel")  # fmt: skip
    with pytest.raises(DataValueError, match="no superpixels"):
        fit(replace(section, parts=nothing))


def test_prediction_needs_measured_expression_of_the_same_genes(fitted, section):
    with pytest.raises(DataValueError, match="no measured expression"):
        fitted.predict(replace(section, targets=None))
    fewer = Targets(section.targets.counts[:, :2], section.targets.library_size, ("g0", "g1"), "counts")
    with pytest.raises(ModelMismatchError, match="genes or unit"):
        fitted.predict(replace(section, targets=fewer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "log1p_cp10k"}, "unit='log1p_cp10k'"),
        ({"mode": "new"}, "mode='new'"),
        ({"width": 12}, "multiple of 8"),
        ({"hidden": ()}, "at least one layer"),
        ({"n_context": 0}, "n_context=0"),
        ({"overlap": 0}, "overlap=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(DataValueError, match=message):
        create("histex", **options)


def test_unknown_presets_are_named():
    with pytest.raises(DataValueError, match="'default', 'paper'"):
        create("histex", preset="large")
