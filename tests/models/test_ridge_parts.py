"""The linear baseline below the spot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from hespotex import models
from hespotex.data.section import Parts, Section, Targets
from hespotex.data.shares import aggregate
from hespotex.errors import DataValueError, ModelMismatchError
from hespotex.models import create
from hespotex.models._inner import gene_correlation

GENES = tuple("ABC")


def linear(
    name: str = "s0", *, n: int = 60, m: int = 400, d: int = 4, seed: int = 0, depth: bool = False, noise: float = 0.0
):
    """A section whose parts follow one linear function of their features exactly, and their values."""
    rng = np.random.default_rng([seed, 3])
    weights = np.random.default_rng(5).normal(size=(d, len(GENES)))
    features = rng.uniform(-1, 1, size=(m, d)).astype(np.float32)
    truth = 6.0 + features @ weights
    share = sparse.random_array((n, m), density=0.03, rng=rng, data_sampler=lambda size: rng.uniform(0.2, 1, size))
    share = sparse.csr_array(share)
    size = np.asarray(share.sum(axis=1)).ravel()
    each = rng.uniform(0.3, 3, size=n) if depth else np.ones(n)
    counts = each[:, None] * (share @ truth) + noise * rng.normal(size=(n, len(GENES)))
    section = Section(
        name,
        np.array([f"{name}-{i}" for i in range(n)]),
        np.zeros((n, 0)),
        rng.uniform(0, 1000, size=(n, 2)),
        targets=Targets(counts, each * size * 1000, GENES, "counts"),
        parts=Parts(np.arange(m), rng.uniform(0, 1000, size=(m, 2)), share, features),
    )
    return section, truth


def scaled(values, truth):
    """Values in units in which their mean is the truth's: the median depth is arbitrary."""
    return values * truth.mean() / values.mean()


@pytest.mark.parametrize("depth", [False, True])
def test_recovers_what_parts_express_from_sums(depth):
    section, truth = linear(depth=depth)
    model = create("ridge_parts", depth="spot").fit([section])
    np.testing.assert_allclose(scaled(model.predict(section).mean, truth), truth, rtol=0.01)
    assert model.penalty == min(model.config.penalties)
    other, expected = linear("new", seed=8)
    predicted = model.predict(replace(other, targets=None)).mean
    np.testing.assert_allclose(scaled(predicted, expected), expected, rtol=0.01)


def test_equals_weighted_least_squares_on_pooled_features():
    section, _ = linear(depth=True, noise=0.5)
    model = create("ridge_parts", penalties=[1e-9], depth="spot").fit([section])
    share, library = section.parts.share, section.targets.library_size
    pooled = np.column_stack([share @ section.parts.features, share.sum(axis=1)])
    size = pooled[:, -1]
    per_part = library / size
    depth = per_part / np.median(per_part)
    root = np.sqrt(depth * size)[:, None]
    design, counts = depth[:, None] * pooled / root, section.targets[:] / root
    solution = np.linalg.lstsq(design, counts, rcond=None)[0]
    expected = section.parts.features @ solution[:-1] + solution[-1]
    np.testing.assert_allclose(model.predict(section).mean, np.maximum(expected, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", ["superpixel", "nucleus"])
def test_sums_of_the_prediction_are_the_counts_of_spots(make_parts, level):
    section, truth = make_parts(level=level)
    model = create("ridge_parts").fit([section])
    prediction = model.predict(section)
    assert (prediction.level, prediction.unit) == (level, "counts")
    assert prediction.mean.min() >= 0
    assert np.mean(gene_correlation(truth, prediction.mean)) > 0.85
    expected, counts = aggregate(section.parts.share, prediction.mean), section.targets[:]
    assert expected.sum() == pytest.approx(counts.sum(), rel=0.1)
    assert np.mean(gene_correlation(counts, expected)) > 0.8


def test_depth_of_spots_is_not_taken_for_biology():
    section, truth = linear(depth=True)
    by_spot = create("ridge_parts", depth="spot").fit([section]).predict(section).mean
    by_section = create("ridge_parts").fit([section]).predict(section).mean
    np.testing.assert_allclose(scaled(by_spot, truth), truth, rtol=0.01)
    assert np.abs(scaled(by_section, truth) - truth).max() > 0.1


def test_depth_of_sections_is_taken_out_either_way():
    first, truth = linear("s0")
    second, _ = linear("s1", seed=1)
    deep = Targets(7 * second.targets.counts, 7 * second.targets.library_size, GENES, "counts")
    for depth in ("spot", "section"):
        predicted = create("ridge_parts", depth=depth).fit([first, replace(second, targets=deep)]).predict(first).mean
        np.testing.assert_allclose(scaled(predicted, truth), truth, rtol=0.01)


def test_order_of_spots_parts_and_sections_does_not_matter():
    sections = [linear(f"s{i}", seed=i, noise=0.5)[0] for i in range(3)]

    def turned(section, seed):
        rng = np.random.default_rng(seed)
        spots, parts = rng.permutation(section.n_obs), rng.permutation(section.parts.n_parts)
        old, targets = section.parts, section.targets
        return replace(
            section,
            ids=section.ids[spots],
            features=section.features[spots],
            coordinates=section.coordinates[spots],
            region=section.region[spots],
            targets=Targets(targets.counts[spots], targets.library_size[spots], GENES, "counts"),
            parts=Parts(old.ids[parts], old.coordinates[parts], old.share[spots][:, parts], old.features[parts]),
        )

    model = create("ridge_parts").fit(sections)
    other = create("ridge_parts").fit([turned(section, i) for i, section in enumerate(sections)][::-1])
    np.testing.assert_allclose(model.predict(sections[0]).mean, other.predict(sections[0]).mean, rtol=1e-4)
    assert model.penalty == other.penalty


def test_spots_without_parts_or_counts_teach_nothing():
    section, _ = linear(noise=0.5)
    share = section.parts.share.copy().tolil()
    share[3] = 0
    library = section.targets.library_size.copy()
    library[5] = 0
    counts = section.targets.counts.copy()
    section = replace(section, parts=replace(section.parts, share=sparse.csr_array(share)))
    model, wild = (
        create("ridge_parts", penalties=[0.1]).fit(
            [replace(section, targets=Targets(values, library, GENES, "counts"))]
        )
        for values in (counts, np.where(np.isin(np.arange(60), [3, 5])[:, None], 1e6, counts))
    )
    np.testing.assert_array_equal(model.predict(section).mean, wild.predict(section).mean)


def test_blocks_targets_in_another_unit_and_round_trip(make_parts, tmp_path):
    section, _ = make_parts()
    model = create("ridge_parts").fit([section])
    whole = model.predict(section)
    blocks = list(model.predict_blocks(section, block_rows=700))
    assert [len(block.ids) for block in blocks] == [700, 700, 200]
    np.testing.assert_allclose(np.concatenate([block.mean for block in blocks]), whole.mean, rtol=1e-5, atol=1e-5)
    logs = replace(section, targets=section.targets.in_unit("log1p_cp10k"))
    np.testing.assert_array_equal(create("ridge_parts").fit([logs]).predict(section).mean, whole.mean)
    loaded = models.load(model.save(tmp_path / "ridge_parts.hx"))
    np.testing.assert_array_equal(loaded.predict(section).mean, whole.mean)
    assert (loaded.penalty, loaded.choices) == (model.penalty, model.choices)


def test_features_are_read_in_blocks():
    class Counting:
        def __init__(self, array):
            self.array, self.shape, self.largest = array, array.shape, 0

        def __getitem__(self, rows):
            block = self.array[rows]
            self.largest = max(self.largest, len(block))
            return block

    section, _ = linear(m=9000)
    lazy = Counting(section.parts.features)
    lazily = replace(section, parts=replace(section.parts, features=lazy))
    ours, theirs = (create("ridge_parts").fit([each]).predict(section).mean for each in (lazily, section))
    assert lazy.largest <= 4096
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("groups", "n", "kind"), [(True, 20, "group"), (False, 20, "section")])
def test_what_is_held_out(groups, n, kind):
    sections = [replace(linear(f"s{i}", seed=i, n=n)[0], group=f"p{i}" if groups else "one") for i in range(3)]
    assert create("ridge_parts").fit(sections).state()[1]["chosen_by"] == kind


def test_too_few_spots_to_choose_and_a_single_one():
    model = create("ridge_parts").fit([linear(n=4)[0]])
    assert (model.state()[1]["chosen_by"], model.penalty) == ("none", 1.0)
    section, _ = linear(n=1)
    mean = create("ridge_parts").fit([section]).predict(section).mean
    np.testing.assert_allclose(aggregate(section.parts.share, mean), section.targets[:], rtol=1e-4)


def test_gene_without_counts_is_predicted_as_none():
    section, _ = linear()
    counts = section.targets.counts.copy()
    counts[:, 1] = 0
    section = replace(section, targets=Targets(counts, section.targets.library_size, GENES, "counts"))
    mean = create("ridge_parts").fit([section]).predict(section).mean
    assert (mean[:, 1] == 0).all()
    assert (mean[:, 0] > 0).all()


def test_bad_input_is_named():
    section, _ = linear()
    with pytest.raises(DataValueError, match="'s0' has no parts"):
        create("ridge_parts").fit([replace(section, parts=None)])
    bare = replace(section, parts=replace(section.parts, share=sparse.csr_array((60, 400))))
    with pytest.raises(DataValueError, match="'s0': no spot holds any of its 400 parts"):
        create("ridge_parts").fit([bare])
    silent = replace(section, targets=Targets(0 * section.targets.counts, np.zeros(60), GENES, "counts"))
    with pytest.raises(DataValueError, match="has any counts"):
        create("ridge_parts").fit([silent])
    features = section.parts.features.copy()
    features[7, 2] = np.nan
    with pytest.raises(DataValueError, match="'s0' has features that are NaN"):
        create("ridge_parts").fit([replace(section, parts=replace(section.parts, features=features))])
    model = create("ridge_parts").fit([section])
    with pytest.raises(ModelMismatchError, match="9 features per part"):
        model.predict(linear(d=9)[0])
    with pytest.raises(ModelMismatchError, match="not fitted"):
        create("ridge_parts").predict(section)


@pytest.mark.parametrize(
    "options", [{"penalties": []}, {"penalties": [0.0]}, {"unit": "log1p_cp10k"}, {"depth": "none"}]
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        create("ridge_parts", **options)
