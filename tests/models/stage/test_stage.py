"""What STAGE does beyond the published algorithm, and where it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hespotex import models
from hespotex.data.section import Targets
from hespotex.errors import DataValueError, ModelMismatchError
from hespotex.models import Run, create
from hespotex.models._inner import gene_correlation
from hespotex.models.stage.config import PAPER
from hespotex.models.stage.network import Frame

CPU = Run(seed=0, device="cpu")
QUICK = {"widths": [8, 4], "max_epochs": 4, "n_projections": 10}


def quick(**options):
    return create("stage", **{**QUICK, **options})


def test_coordinates_are_scaled_by_one_factor_to_the_unit_square(make_waves):
    xy = np.array([[-100.0, 500.0], [1900.0, 700.0], [400.0, 600.0]])
    frame = Frame.fit(xy, quick().config)
    np.testing.assert_allclose(frame(xy), [[0, 0], [1, 0.1], [0.25, 0.05]], rtol=1e-6)
    section, _ = make_waves()
    moved = replace(
        section,
        coordinates=2 * section.coordinates - 300,
        parts=replace(section.parts, coordinates=2 * section.parts.coordinates - 300),
    )
    ours, theirs = (quick().fit([each], CPU).predict(each).mean for each in (section, moved))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_published_coordinates_are_divided_only(make_waves):
    xy = np.array([[1.0, 2.0], [4.0, 8.0]])
    np.testing.assert_allclose(Frame.fit(xy, PAPER)(xy), xy / 8)
    with pytest.raises(DataValueError, match="negative coordinates.*relu=False"):
        Frame.fit(xy - 2, PAPER)
    assert Frame.fit(xy - 2, replace(PAPER, relu=False))(xy - 2).min() < 0


def test_the_order_of_spots_does_not_matter(make_waves, reordered):
    section, _ = make_waves()
    first, second = (quick().fit([each], CPU).predict(section).mean for each in (section, section))
    np.testing.assert_array_equal(first, second)
    other = reordered(section)
    model = quick().fit([other], CPU)
    np.testing.assert_array_equal(model.predict(other).mean, first)


def test_stops_by_held_out_spots_and_then_fits_on_all(make_waves):
    section, _ = make_waves(n=80)
    model = quick(max_epochs=40, patience=5, lr=2e-2).fit([section], CPU)
    best = max(model.history, key=lambda row: row["val_pearson"])
    assert model.epochs == [best["epoch"]]
    assert model.scores == {"inner_pearson": pytest.approx(best["val_pearson"])}
    assert {"loss", "latent", "reconstruction", "val_mse", "val_pearson"} <= set(model.history[0])
    assert "val_pearson" not in quick(patience=None).fit([section], CPU).history[0]


@pytest.mark.parametrize("unit", ["counts", "log1p_cp10k"])
def test_learns_a_smooth_field_in_any_unit(make_parts, unit):
    section, truth = make_parts(unit=unit)
    if unit != "counts":
        truth = np.log(truth / truth.sum(axis=1, keepdims=True))
    model = create("stage", widths=[128, 64], lr=3e-3, n_projections=20, max_epochs=150).fit([section], CPU)
    assert gene_correlation(truth, model.predict(section).mean).mean() > 0.7


def test_a_gene_in_other_units_is_learnt_alike(make_parts):
    section, _ = make_parts(unit="counts")
    targets = section.targets
    more = replace(section, targets=Targets(1000 * targets.counts, targets.library_size, targets.genes, "counts"))
    ours, theirs = (quick().fit([each], CPU).predict(each).mean for each in (section, more))
    np.testing.assert_allclose(theirs, 1000 * ours, rtol=1e-2)


def test_sections_do_not_mix(make_waves):
    (first, _), (second, _) = make_waves("s0", seed=0), make_waves("s1", seed=1)
    both = quick().fit([first, second], CPU)
    for section in (first, second):
        np.testing.assert_array_equal(both.predict(section).mean, quick().fit([section], CPU).predict(section).mean)


def test_only_its_own_section_can_be_predicted(make_waves):
    model = quick().fit([make_waves("s0", seed=0)[0]], CPU)
    with pytest.raises(ModelMismatchError, match="only the section it was fitted on"):
        model.predict(make_waves("s1", seed=1)[0])
    with pytest.raises(ModelMismatchError, match="not fitted"):
        quick().predict(make_waves()[0])


def test_measured_expression_is_not_needed_to_predict(make_waves):
    section, _ = make_waves()
    model = quick().fit([section], CPU)
    blind = replace(section, targets=None)
    np.testing.assert_array_equal(model.predict(blind).mean, model.predict(section).mean)


@pytest.mark.parametrize("unit", ["log1p_cp10k", "counts"])
def test_level_unit_blocks_and_round_trip(make_parts, tmp_path, unit):
    section, _ = make_parts(side=20, unit=unit)
    model = quick().fit([section], CPU)
    whole = model.predict(section)
    assert (whole.level, whole.unit, whole.genes) == ("superpixel", unit, section.targets.genes)
    blocks = list(model.predict_blocks(section, block_rows=150))
    assert [len(block.ids) for block in blocks] == [150, 150, 100]
    np.testing.assert_allclose(np.concatenate([block.mean for block in blocks]), whole.mean, atol=1e-5)
    loaded = models.load(model.save(tmp_path / "stage.hx"))
    np.testing.assert_array_equal(loaded.predict(section).mean, whole.mean)
    assert loaded.epochs == model.epochs


def test_interrupted_fit_goes_on_and_cleans_up(make_waves, tmp_path, monkeypatch):
    from hespotex.models.stage import training

    section, _ = make_waves()
    reference = quick().fit([section], CPU)
    run = replace(CPU, checkpoint_dir=tmp_path)
    original = training.fit_lightning

    def interrupted(*args, name, **options):
        if "choice" not in name:
            raise KeyboardInterrupt
        return original(*args, name=name, **options)

    monkeypatch.setattr(training, "fit_lightning", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick().fit([section], run)
    assert list(tmp_path.glob("*.ckpt"))
    monkeypatch.setattr(training, "fit_lightning", original)
    resumed = quick().fit([section], run)
    np.testing.assert_array_equal(resumed.predict(section).mean, reference.predict(section).mean)
    assert not list(tmp_path.iterdir())


def test_genes_without_counts_are_predicted_as_none(make_waves):
    section, _ = make_waves(n=200)
    counts = section.targets.counts.copy()
    counts[:, 0] = 0
    section = replace(section, targets=Targets(counts, section.targets.library_size, section.targets.genes))
    mean = quick(max_epochs=60, patience=None, lr=2e-2, widths=[32, 16]).fit([section], CPU).predict(section).mean
    assert np.isfinite(mean).all()
    assert mean[:, 0].mean() < 0.1 < mean[:, 1:].mean()


def test_too_few_spots_to_stop_by_and_to_fit_on(make_waves):
    section, _ = make_waves(n=5)
    assert quick().fit([section], CPU).epochs == [4]
    silent = replace(section, targets=Targets(np.zeros((5, 5)), np.zeros(5), section.targets.genes))
    assert (quick().fit([silent], CPU).predict(section).mean < 0.5).all()
    with pytest.raises(DataValueError, match="has 1 spot: .* at least 2"):
        quick().fit([make_waves(n=1)[0]], CPU)


def test_bad_positions_are_named(make_waves):
    section, _ = make_waves()
    with pytest.raises(DataValueError, match="'s0' has no parts"):
        quick().fit([replace(section, parts=None)], CPU)
    same = replace(section, coordinates=np.ones_like(section.coordinates))
    with pytest.raises(DataValueError, match="all 60 spots have the same coordinates"):
        quick().fit([same], CPU)
    broken = replace(section, coordinates=np.where(np.arange(60)[:, None] == 3, np.nan, section.coordinates))
    with pytest.raises(DataValueError, match="NaN or infinite"):
        quick().fit([broken], CPU)
    model = quick().fit([section], CPU)
    deep = replace(section, parts=replace(section.parts, coordinates=np.zeros((40, 3))))
    with pytest.raises(DataValueError, match="3 coordinates per position, its spots have 2"):
        model.predict(deep)


@pytest.mark.parametrize(
    "options",
    [
        {"widths": []},
        {"widths": [0]},
        {"coordinates": "um"},
        {"level": "cell"},
        {"coord_sf": 0},
        {"swd_weight": -1},
        {"recon_weight": 0},
        {"relu": True},
        {"n_projections": 0},
        {"batch": 1},
        {"patience": 0},
        {"held_out": 0.9},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        create("stage", **options)
