from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.preprocessing import StandardScaler

from hespotex import models
from hespotex.data.section import Section, Targets, rows_of
from hespotex.errors import DataTypeError, DataValueError, ModelMismatchError


def stacked(sections: list[Section]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([s.features for s in sections]), np.concatenate([s.targets[:] for s in sections])


@pytest.mark.parametrize("d", [6, 300], ids=["n>d", "n<d"])
@pytest.mark.parametrize("penalty", [0.01, 2.0])
def test_equals_scikit_learn(make_planted, d, penalty):
    sections = [make_planted(f"s{i}", 50, d, seed=i) for i in range(2)]
    x, y = stacked(sections)
    scaler = StandardScaler().fit(x)
    reference = SklearnRidge(alpha=penalty * len(x)).fit(scaler.transform(x), y)
    model = models.create("ridge", penalties=[penalty], components=[None]).fit(sections)
    test = make_planted("new", 30, d, seed=7)
    expected = reference.predict(scaler.transform(test.features))
    np.testing.assert_allclose(model.predict(test).mean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [20, 200], ids=["n>d", "n<d"])
def test_components_equal_regression_on_scores(make_planted, d):
    section = make_planted("s", 90, d, seed=1)
    x, y = stacked([section])
    z = StandardScaler().fit_transform(x.astype(np.float64))
    pca = PCA(5, svd_solver="full").fit(z)
    reference = SklearnRidge(alpha=0.3 * len(x)).fit(pca.transform(z), y)
    model = models.create("ridge", penalties=[0.3], components=[5]).fit([section])
    np.testing.assert_allclose(model.predict(section).mean, reference.predict(pca.transform(z)), atol=2e-4)


def test_recovers_planted_signal_on_an_unseen_group(make_planted, trio):
    model = models.create("ridge").fit(trio)
    test = make_planted("new", 60, seed=9)
    assert np.abs(model.predict(test).mean - test.targets[:]).max() < 0.5
    assert model.penalty < 0.1
    assert max(choice["pearson"] for choice in model.choices) > 0.99


def test_pure_noise_is_shrunk_hard(make_planted):
    rng = np.random.default_rng(0)
    sections = []
    for i in range(3):
        section = make_planted(f"s{i}", 60, 50, seed=i)
        targets = replace(section.targets, counts=rng.normal(size=(60, 4)))
        sections.append(replace(section, targets=targets))
    model = models.create("ridge").fit(sections)
    assert np.ptp(model.predict(sections[0]).mean, axis=0).max() < 3.0


def test_few_components_are_chosen_where_the_rest_is_noise():
    rng = np.random.default_rng(3)
    sections = []
    for i in range(3):
        latent = rng.normal(size=(60, 2))
        features = np.repeat(latent, 20, axis=1)
        features = (features + 0.8 * rng.normal(size=features.shape)).astype(np.float32)
        targets = Targets(latent + 0.1 * rng.normal(size=(60, 2)), np.ones(60), ("a", "b"), unit="counts")
        sections.append(Section(f"s{i}", np.arange(60).astype(str), features, latent, targets=targets))
    model = models.create("ridge", components=(2, None), penalties=(1e-4,)).fit(sections)
    assert model.components == 2


@pytest.mark.parametrize(
    ("n_sections", "groups", "kind"), [(3, True, "group"), (3, False, "section"), (1, False, "block")]
)
def test_what_is_held_out(make_planted, n_sections, groups, kind):
    sections = [make_planted(f"s{i}", seed=i, group=f"p{i}" if groups else "one") for i in range(n_sections)]
    assert models.create("ridge").fit(sections).state()[1]["chosen_by"] == kind


def test_too_few_observations_to_choose(make_planted):
    model = models.create("ridge").fit([make_planted(n=3)])
    assert model.state()[1]["chosen_by"] == "none"
    assert model.penalty == 1.0
    assert np.isfinite(model.predict(make_planted(n=2)).mean).all()


def test_one_observation_gives_its_own_values(make_planted):
    section = make_planted(n=1)
    np.testing.assert_allclose(
        models.create("ridge").fit([section]).predict(section).mean, section.targets[:], rtol=1e-5
    )


def test_order_of_spots_and_sections_does_not_matter(trio, reordered):
    model = models.create("ridge").fit(trio)
    other = models.create("ridge").fit([reordered(section) for section in trio[::-1]])
    np.testing.assert_allclose(model.predict(trio[0]).mean, other.predict(trio[0]).mean, atol=1e-4)


def test_constant_feature_and_constant_gene(make_planted):
    section = make_planted()
    section.features[:, 2] = 5.0
    section.targets.counts[:, 1] = 2.0
    model = models.create("ridge").fit([section])
    mean = model.predict(section).mean
    np.testing.assert_allclose(mean[:, 1], 2.0, rtol=1e-5)
    moved = section.features.copy()
    moved[:, 2] = -100.0
    np.testing.assert_array_equal(mean, model.predict(replace(section, features=moved)).mean)


def test_features_are_read_in_blocks(make_planted):
    class Counting:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.shape, self.largest = array, array.shape, 0

        def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
            block = self.array[rows]
            self.largest = max(self.largest, len(block))
            return block

    section = make_planted(n=9000, d=3)
    lazy = Counting(section.features)
    model = models.create("ridge").fit([replace(section, features=lazy)])
    assert lazy.largest <= 4096
    blocks = list(model.predict_blocks(section, block_rows=4000))
    assert [len(block.ids) for block in blocks] == [4000, 4000, 1000]
    whole = model.predict(section, block_rows=9000).mean
    np.testing.assert_allclose(np.concatenate([rows_of(block.mean) for block in blocks]), whole, rtol=1e-5, atol=1e-5)


def test_more_groups_than_folds_still_leave_each_out_once(make_planted):
    from hespotex.models._inner import MAX_FOLDS, inner_folds

    sections = [make_planted(f"s{i}", 5, group=f"p{i}") for i in range(MAX_FOLDS + 3)]
    kind, folds = inner_folds(sections)
    held = sorted(index for fold in folds for index in fold.held_out)
    assert (kind, len(folds), held) == ("group", MAX_FOLDS, list(range(len(sections))))


def test_blocks_of_one_section_are_compact_and_disjoint(make_planted):
    from hespotex.models._inner import inner_folds

    section = make_planted(n=101)
    rows = [fold.held_out[0] for fold in inner_folds([section])[1]]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(101))
    assert max(section.coordinates[block].std(axis=0).mean() for block in rows) < section.coordinates.std(axis=0).mean()


def test_unmeasured_section_and_bad_features(make_planted):
    model = models.create("ridge").fit([make_planted()])
    blind = make_planted("new", targets=None)
    np.testing.assert_array_equal(model.predict(blind).mean, model.predict(make_planted("new")).mean)
    with pytest.raises(DataValueError, match="'new' has no measured expression"):
        models.create("ridge").fit([make_planted(), blind])
    broken = make_planted("broken")
    broken.features[3, 1] = np.nan
    with pytest.raises(DataValueError, match="'broken' has features that are NaN"):
        models.create("ridge").fit([broken])
    with pytest.raises(ModelMismatchError, match="9 features"):
        model.predict(make_planted(d=9))
    with pytest.raises(ModelMismatchError, match="not fitted"):
        models.create("ridge").predict(blind)


def test_sections_that_do_not_belong_together(make_planted):
    with pytest.raises(DataTypeError, match="wrap it in a list"):
        models.create("ridge").fit(make_planted())
    with pytest.raises(DataValueError, match="sections is empty"):
        models.create("ridge").fit([])
    with pytest.raises(DataValueError, match="unique"):
        models.create("ridge").fit([make_planted("a"), make_planted("a")])
    with pytest.raises(DataValueError, match="genes or unit"):
        models.create("ridge").fit([make_planted("a"), make_planted("b", n_genes=3)])
    with pytest.raises(DataValueError, match="one encoder"):
        models.create("ridge").fit([make_planted("a"), make_planted("b", d=9)])
    with pytest.raises(DataValueError, match="no observations"):
        models.create("ridge").fit([make_planted(n=0)])


@pytest.mark.parametrize(
    "options", [{"penalties": []}, {"penalties": [0.0]}, {"components": []}, {"components": [0]}, {"score_rows": 1}]
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        models.create("ridge", **options)
