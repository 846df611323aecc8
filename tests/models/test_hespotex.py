from __future__ import annotations

from dataclasses import replace

import joblib
import numpy as np
import pytest
from scipy import sparse

from hespotex.data.section import Targets
from hespotex.errors import DataValueError, HespotexWarning, ModelMismatchError
from hespotex.models import Run, create, load
from hespotex.models.hespotex import HESpotEx, HESpotExConfig
from hespotex.models.hespotex.inputs import Inputs
from hespotex.models.hespotex.linear import KernelFeatures, Regression
from hespotex.models.hespotex.targets import TargetSpace
from hespotex.models.nn.decoder import ImageStream
from hespotex.models.nn.gate import GATE

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
    with pytest.warns(HespotexWarning, match="1 observations"):
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
    regression, rank, score = Regression.fit(sections, features, targets, [], space, [])
    assert rank == 2
    predicted = regression(features[0])
    assert all(np.corrcoef(predicted[:, i], targets[0][:, i])[0, 1] > 0.99 for i in (0, 1))


@pytest.mark.parametrize(
    ("options", "part", "call", "message", "kept"),
    [
        ({"preset": "paper"}, GATE, 5, "expression stream was interrupted in epoch 5", (4, 0)),  # one section per epoch
        ({"preset": "paper"}, ImageStream, 4, "image stream was interrupted in epoch 2", (6, 2)),
        ({}, GATE, 4, "expression stream was interrupted in epoch 2", (2, 0)),
        ({}, ImageStream, 6, "image stream was interrupted in epoch 3", (6, 4)),
        ({"stopping": "inner"}, ImageStream, 5, "image stream, inner fold 2 was interrupted in epoch 2", (6, 4)),
    ],
    ids=["paper, expression", "paper, image", "expression", "image", "inner fold"],
)
def test_a_fit_interrupted_in_either_stage_ends_as_an_uninterrupted_one(
    sections, tmp_path, monkeypatch, options, part, call, message, kept
):
    """The training calls of both networks that lie in finished epochs, `kept`, are not made again."""
    calls = {GATE: 0, ImageStream: 0}
    stop_at = None

    def counted(kind, forward):
        def inner(self, *args, **kwargs):
            calls[kind] += self.training
            if kind is part and calls[kind] == stop_at:
                raise KeyboardInterrupt
            return forward(self, *args, **kwargs)

        return inner

    def fit(model, run):
        calls.update(dict.fromkeys(calls, 0))
        model.fit(sections[:2], run)
        return model, tuple(calls.values())

    def new():
        small = {"gate_hidden": 16, "width": 8, "head_width": 16, "n_members": 1}
        return create("hespotex", **{"gate_epochs": 3, "epochs": 3, **small, **options})

    for kind in calls:
        monkeypatch.setattr(kind, "forward", counted(kind, kind.forward))
    monkeypatch.setattr("hespotex.models._training._SAVE_EVERY", 0)
    run = Run(seed=0, device="cpu", checkpoint_dir=tmp_path)
    expected, made = fit(new(), RUN)
    stop_at, stopped = call, new()
    with pytest.raises(KeyboardInterrupt, match=f"{message}; .*the same call goes on"):
        fit(stopped, run)
    assert not stopped.is_fitted
    stop_at = None
    resumed, made_again = fit(new(), run)
    assert made_again == (made[0] - kept[0], made[1] - kept[1])
    assert resumed.history == expected.history
    assert joblib.hash(resumed.state()) == joblib.hash(expected.state())
    assert np.array_equal(resumed.predict(sections[3]).mean, expected.predict(sections[3]).mean)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_fit_leaves_no_files_behind_when_it_is_done(sections, tmp_path):
    run = Run(seed=0, device="cpu", checkpoint_dir=tmp_path)
    kept = create("hespotex", **QUICK).fit(sections[:2], run).predict(sections[3]).mean
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(kept, create("hespotex", **QUICK).fit(sections[:2], RUN).predict(sections[3]).mean)


def with_features(section, features):
    return replace(section, features=np.asarray(features, dtype=np.float32))


def test_features_that_never_vary_still_give_a_prediction(sections):
    flat = [with_features(section, np.full((section.n_obs, 5), 3.3)) for section in sections]
    model = create("hespotex", **QUICK).fit(flat[:2], RUN)
    assert np.isfinite(model.predict(flat[2]).mean).all()


def test_a_feature_of_great_size_does_not_silence_the_others(sections):
    shifted = [
        with_features(section, np.column_stack([section.features, np.random.default_rng(i).normal(3e6, 1e6, 100)]))
        for i, section in enumerate(sections)
    ]
    inputs = Inputs.fit(HESpotExConfig(context=0), shifted)
    assert (inputs.scale > 0).all()
    constant = [with_features(section, np.column_stack([section.features, np.full(100, 0.1)])) for section in sections]
    assert np.flatnonzero(Inputs.fit(HESpotExConfig(context=0), constant).scale == 0).tolist() == [12]


@pytest.mark.parametrize("stage", ["spot_embeddings", "fit_image_stream"])
def test_an_interrupted_fit_leaves_an_unfitted_model(sections, monkeypatch, stage, tmp_path):
    model = create("hespotex", **QUICK).fit(sections[:2], RUN)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"hespotex.models.hespotex.model.{stage}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fit(sections[:3], RUN)
    assert not model.is_fitted
    with pytest.raises(ModelMismatchError, match="not fitted"):
        model.predict(sections[3])
    with pytest.raises(DataValueError, match="not fitted"):
        model.save(tmp_path / "model")
    assert model.fit(sections[:2], RUN).is_fitted


def test_so_few_observations_that_they_are_no_reference_are_warned_about(sections):
    model = create("hespotex", **QUICK).fit(sections[:2], RUN)
    with pytest.warns(HespotexWarning, match="12 observations"):
        assert np.isfinite(model.predict(replace_rows(sections[3], np.arange(12))).mean).all()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [QUICK, {"preset": "paper", "gate_epochs": 3, "epochs": 3}])
def test_a_gpu_gives_what_the_cpu_gives(sections, options):
    on_cpu = create("hespotex", **options).fit(sections[:2], Run(seed=0, device="cpu", precision="32-true"))
    on_gpu = create("hespotex", **options).fit(sections[:2], Run(seed=0, device="cuda", precision="32-true"))
    expected, found = on_cpu.predict(sections[3]).mean, on_gpu.predict(sections[3]).mean
    assert np.abs(expected - found).max() < 0.05 * expected.std()
    assert all(parameter.device.type == "cpu" for parameter in on_gpu._members.parameters())
