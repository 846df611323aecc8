from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from hespotex.data.section import Targets
from hespotex.errors import DataValueError, ModelMismatchError
from hespotex.models import Run, create, load
from hespotex.models.hespotex import HESpotEx, HESpotExConfig
from hespotex.models.hespotex.inputs import Inputs
from hespotex.models.hespotex.linear import KernelFeatures, Regression
from hespotex.models.hespotex.targets import TargetSpace

RUN = Run(seed=0, device="cpu")
QUICK = {"epochs": 2, "gate_epochs": 1, "n_members": 2}


@pytest.fixture(scope="module")
def sections(make_section):
    return [make_section(f"s{i}", seed=i, side=10) for i in range(4)]


def score(model, section):
    predicted, measured = model.predict(section).mean, section.targets[:]
    return np.mean([np.corrcoef(predicted[:, gene], measured[:, gene])[0, 1] for gene in range(measured.shape[1])])


def test_default_learns_and_carries_over_to_another_stain(sections):
    model = create("hespotex").fit(sections[:3], RUN)
    attainable = score(create("ridge").fit([sections[3]], RUN), sections[3])  # fitted on what it is asked
    assert score(model, sections[3]) > 0.6 * attainable > 0.3
    prediction = model.predict(sections[3])
    assert prediction.mean.dtype == np.float32
    assert prediction.unit == "log1p_cp10k"
    assert (prediction.mean >= 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regression": "linear"},
        {"regression": "none", "target_ranks": (), "align_weight": 0.0},
        {"standardize": "global", "context": 0, "input_rank": None, "nuclei": "feature"},
        {"nuclei": "multiply", "target_ranks": (), "center_targets": False, "regression": "none"},
        {"layer_order": "chained", "n_layers": 2, "jk_hidden": None, "scale_genes": True},
        {"gate_order": "sequential", "gate_tying": "legacy", "gate_graph": "legacy", "graph": "legacy"},
        {"output": "shift", "chunk": 16},
    ],
)
def test_every_switch_trains_predicts_and_survives_saving(sections, tmp_path, options):
    model = create("hespotex", **{**QUICK, **options}).fit(sections[:2], RUN)
    predicted = model.predict(sections[3]).mean
    assert np.isfinite(predicted).all()
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    assert np.array_equal(again.predict(sections[3]).mean, predicted)


@pytest.mark.parametrize("stopping", ["fixed", "inner"])
@pytest.mark.parametrize("number", [1, 2])
def test_stopping_needs_no_other_data_than_the_training_sections(sections, stopping, number):
    model = create("hespotex", **QUICK, stopping=stopping).fit(sections[:number], RUN)
    rows = [row for row in model.history if "mse" in row]
    assert 1 <= len(rows) <= 2
    assert all(("val_mse" in row) == (stopping == "inner") for row in rows)


def test_chunks_of_training_change_nothing_but_memory(sections):
    one, other = (
        create("hespotex", **QUICK, dropout=0.0, chunk=chunk).fit(sections[:2], RUN).predict(sections[3]).mean
        for chunk in (16384, 13)
    )
    np.testing.assert_allclose(one, other, atol=2e-4)


def test_needs_follow_the_config():
    assert HESpotExConfig().needs == ("embedding", "graph")
    assert HESpotExConfig(nuclei="feature").needs == ("embedding", "graph", "nuclei")
    assert create("hespotex", preset="paper").needs == ("embedding", "nuclei")


def test_a_section_without_graph_is_an_error_naming_the_call(sections):
    with pytest.raises(DataValueError, match="hx.pp.spatial_graph"):
        create("hespotex", **QUICK).fit([replace(sections[0], edges=None)], RUN)


def test_a_section_without_nuclei_is_an_error_naming_the_call(sections):
    bare = replace(sections[0], extras={"pixel": sections[0].extras["pixel"]})
    with pytest.raises(DataValueError, match="hx.pp.segment_nuclei"):
        create("hespotex", preset="paper").fit([bare], RUN)


def test_too_few_spots_for_the_published_graph(sections):
    few = replace_rows(sections[0], np.arange(5))
    with pytest.raises(DataValueError, match="5 observations, too few for 7"):
        create("hespotex", preset="paper", nuclei="none").fit([few], RUN)


def replace_rows(section, rows):
    targets = section.targets
    return replace(
        section,
        ids=section.ids[rows],
        features=section.features[rows],
        coordinates=section.coordinates[rows],
        edges=sparse.csr_array(section.edges[rows][:, rows]),
        targets=Targets(targets.counts[rows], targets.library_size[rows], targets.genes, targets.unit),
        region=section.region[rows],
        extras={name: values[rows] for name, values in section.extras.items()},
    )


def test_one_spot_can_be_predicted(sections):
    model = create("hespotex", **QUICK).fit(sections[:2], RUN)
    one = replace_rows(sections[3], np.array([4]))
    assert np.isfinite(model.predict(one).mean).all()


def test_features_that_are_not_finite_are_an_error(sections):
    features = np.array(sections[0].features)
    features[3, 2] = np.nan
    with pytest.raises(DataValueError, match="NaN or infinite"):
        create("hespotex", **QUICK).fit([replace(sections[0], features=features)], RUN)


def test_predicting_with_another_embedding_is_an_error(sections):
    model = create("hespotex", **QUICK).fit(sections[:1], RUN)
    with pytest.raises(ModelMismatchError, match="5 features"):
        model.predict(replace(sections[1], features=np.zeros((100, 5), np.float32)))


def test_predicting_unfitted_is_an_error(sections):
    with pytest.raises(ModelMismatchError, match="not fitted"):
        create("hespotex").predict(sections[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"standardize": "slide"}, "possible: 'none', 'global', 'section'"),
        ({"n_members": 0}, "n_members=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"target_ranks": (0,)}, "target_ranks"),
        ({"regression_share": 1.5}, "regression_share"),
        ({"nuclei": "multiply"}, "multiplies expression itself"),
        ({"unit": "tpm"}, "log1p_cp10k"),
        ({"learning_rate": 1}, "no option 'learning_rate'"),
    ],
)
def test_impossible_settings_are_errors(options, message):
    with pytest.raises(DataValueError, match=message):
        create("hespotex", **options)


def test_unknown_preset_is_an_error():
    with pytest.raises(DataValueError, match="'default', 'paper'"):
        HESpotEx.preset("best")


def test_a_stain_shift_of_a_section_does_not_change_its_inputs(sections):
    inputs = Inputs.fit(HESpotExConfig(), sections[:2])
    shifted = replace(sections[3], features=np.asarray(sections[3].features) + 3.0)
    np.testing.assert_allclose(inputs(shifted).features, inputs(sections[3]).features, atol=1e-3)


def test_features_constant_in_training_are_left_out_even_if_they_vary_later(sections):
    def constant(section, value):
        features = np.array(section.features)
        features[:, 0] = value
        return replace(section, features=features)

    inputs = Inputs.fit(HESpotExConfig(input_rank=None), [constant(s, 2.0) for s in sections[:2]])
    wild = inputs(constant(sections[3], 1e6 * np.arange(100)))
    np.testing.assert_array_equal(wild.features, inputs(constant(sections[3], 2.0)).features)


def test_the_context_of_a_spot_is_the_mean_of_its_ring(sections):
    config = HESpotExConfig(input_rank=None, context=1)
    section = sections[0]
    inputs = Inputs.fit(config, [section])
    x = np.asarray(section.features, dtype=np.float64)
    x -= x.mean(axis=0)
    ring = [33, 34, 35, 43, 45, 53, 54, 55]  # around spot 44 of a lattice ten wide
    own = inputs._with_context(section)[44]
    np.testing.assert_allclose(own, np.concatenate([x[44], x[ring].mean(axis=0)]), atol=1e-4)


def test_all_components_lose_nothing(sections):
    space = TargetSpace.fit(sections, scale_genes=True, rank=6)
    targets = sections[0].targets
    np.testing.assert_allclose(space.decode(space.read(targets)), targets[:], atol=1e-4)
    assert np.mean(np.square(np.concatenate([v - v.mean(0) for v in map(space.read, map(_targets, sections))]))) == (
        pytest.approx(1.0, rel=1e-3)
    )


def _targets(section):
    return section.targets


def test_the_kernel_is_exact_where_every_row_is_a_landmark():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    kernel = KernelFeatures.fit([x[:20], x[20:]], 50)
    phi = kernel(x).astype(np.float64)
    distance = np.square(x[:, None] - x[None]).sum(2)
    expected = x @ x.T / 4 + 2 * np.exp(-distance / kernel.width)
    np.testing.assert_allclose(phi @ phi.T, expected, atol=2e-3)


def test_regression_finds_a_linear_law_and_a_small_rank(sections):
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(100, 5)).astype(np.float32) for _ in sections]
    weights = rng.normal(size=(5, 2)).astype(np.float32)
    targets = [x @ weights + 1 for x in features]
    space = TargetSpace(np.zeros(2, np.float32), np.ones(2, np.float32), None)
    regression, rank = Regression.fit(sections, features, targets, [], space, [])
    assert rank == 2
    predicted = regression(features[0])
    assert all(np.corrcoef(predicted[:, i], targets[0][:, i])[0, 1] > 0.99 for i in (0, 1))


def test_an_interrupted_fit_leaves_no_files_behind_when_it_is_done(sections, tmp_path):
    run = Run(seed=0, device="cpu", checkpoint_dir=tmp_path)
    kept = create("hespotex", **QUICK).fit(sections[:2], run).predict(sections[3]).mean
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(kept, create("hespotex", **QUICK).fit(sections[:2], RUN).predict(sections[3]).mean)
