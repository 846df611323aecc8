"""ST-AnD as a model: known answers, invariances, round trips, and what it says of input it cannot use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.section import Parts
from hespotex.data.shares import aggregate
from hespotex.errors import DataValueError, HespotexWarning, ModelMismatchError
from hespotex.models import Run, create, get, load
from hespotex.models.stand.counts import CountDecoder
from hespotex.models.stand.decoder import PublishedDecoder
from hespotex.models.stand.vqvae import random_symmetry

RUN = Run(seed=0, device="cpu")
QUICK = {"hidden": [16], "max_epochs": 3}
TINY_PAPER = {"max_epochs": 2, "vqvae_epochs": 1}


def with_parts(section, **fields):
    return replace(section, parts=replace(section.parts, **fields))


def with_every_spot_held(section):
    """The section with a nucleus under its first spot, which has none."""
    share = section.parts.share.tolil()
    share[0, 0] = 1
    return with_parts(section, share=sparse.csr_array(share))


@pytest.fixture(scope="module")
def section(make_tissue):
    return make_tissue()[0]


@pytest.fixture(scope="module")
def fitted(section):
    return create("stand", **QUICK).fit([section], RUN)


@pytest.mark.parametrize("level", ["nucleus", "superpixel"])
def test_learns_parts_of_another_section_from_spots(make_parts, level):
    sections = [make_parts(f"s{i}", level=level, side=20, seed=i)[0] for i in range(2)]
    new, truth = make_parts("new", level=level, side=20, seed=2)
    prediction = (
        create("stand", hidden=[32], batch=8, max_epochs=25).fit(sections, RUN).predict(replace(new, targets=None))
    )
    assert (prediction.level, prediction.unit) == (level, "counts")
    assert list(prediction.ids) == list(new.parts.ids)
    r = [np.corrcoef(prediction.mean[:, gene], truth[:, gene])[0, 1] for gene in range(truth.shape[1])]
    assert np.mean(r) > 0.7


def test_levels_are_those_of_the_measurement(section, fitted):
    spots = fitted.predict_spots(section).mean
    np.testing.assert_allclose(spots.sum(), np.sum(section.targets.counts), rtol=0.15)


def test_nuclei_outside_all_spots_are_predicted(section, fitted):
    assert (np.asarray(section.parts.share[:, :10].sum()) == 0).all()
    assert (fitted.predict(section).mean[:10] > 0).all()


def test_spread_is_that_of_the_counts(section, fitted):
    prediction = fitted.predict(section)
    theta = fitted._decoder.log_dispersion.exp().detach().numpy()
    np.testing.assert_allclose(prediction.std**2, prediction.mean + prediction.mean**2 / theta, rtol=1e-4)
    poisson = create("stand", likelihood="poisson", **QUICK).fit([section], RUN).predict(section)
    np.testing.assert_allclose(poisson.std**2, poisson.mean, rtol=1e-4)


def test_intensity_is_a_spot_full_of_such_nuclei(section, fitted):
    share, intensity = fitted.predict(section), fitted.with_options(output="intensity").predict(section)
    held = np.asarray(section.parts.share.sum(axis=1)).ravel()
    typical = held[held > 0].mean()  # the first spot holds none
    np.testing.assert_allclose(intensity.mean, typical * share.mean, rtol=1e-5)
    assert fitted.config.output == "share"


def test_a_mean_over_nuclei_is_a_spot_full_of_them(section):
    model = create("stand", pooling="mean", **QUICK).fit([section], RUN)
    share, intensity = (model.with_options(output=each).predict(section).mean for each in ("share", "intensity"))
    held = np.asarray(section.parts.share.sum(axis=1)).ravel()
    spots = model.predict_spots(section).mean[held > 0]
    pooled = aggregate(section.parts.share, intensity, "mean")[held > 0]
    np.testing.assert_allclose(pooled + model.ambient, spots, rtol=1e-4)
    np.testing.assert_allclose(held[held > 0].mean() * share, intensity, rtol=1e-5)


def test_published_share_is_a_twentieth_of_the_intensity(make_tissue):
    section = make_tissue(n_spots=17, unit="log1p_cp10k")[0]
    with pytest.warns(HespotexWarning, match="1 spots lack parts or counts"):
        model = create("stand", preset="paper", encoder="frozen", reencode=False, max_epochs=2).fit([section], RUN)
    intensity, share = model.predict(section), model.with_options(output="share").predict(section)
    np.testing.assert_allclose(20 * np.expm1(share.mean), np.expm1(intensity.mean), rtol=1e-3, atol=1e-6)
    assert (share.unit, share.std) == ("log1p_cp10k", None)
    assert not model.ambient.any()


def test_published_share_is_linear_behind_the_layer_of_coexpression():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = PublishedDecoder(6, 4, coexpression=True)
    decoder.scale.data.fill_(20.0)
    features = torch.ones(1, 6)
    with torch.no_grad():
        share, intensity = decoder.single(features, share=True), decoder.single(features)
    torch.testing.assert_close(torch.expm1(share), 0.05 * torch.expm1(intensity))


def test_training_is_in_full_precision_unless_asked_otherwise(make_tissue, monkeypatch):
    section, seen = make_tissue(n_spots=12, crops=True)[0], []

    def spy(run):
        seen.append(run.precision)
        raise KeyboardInterrupt

    monkeypatch.setattr("hespotex.models.stand.model.fit_vqvae", lambda config, crops, run: spy(run))
    for precision in (None, "bf16-mixed"):
        with pytest.raises(KeyboardInterrupt):
            create("stand", encoder="vqvae", **QUICK).fit([section], replace(RUN, precision=precision))
    assert seen == ["32-true", "bf16-mixed"]


def test_block_size_changes_nothing(section, fitted):
    whole = fitted.predict(section).mean
    np.testing.assert_allclose(fitted.predict(section, block_rows=7).mean, whole, rtol=1e-5)
    np.testing.assert_allclose(
        fitted.predict_spots(section, block_rows=3).mean, fitted.predict_spots(section).mean, rtol=1e-5
    )


def test_same_seed_gives_the_same_bits_and_leaves_the_random_state_alone(section, fitted):
    state = torch.random.get_rng_state()
    again = create("stand", **QUICK).fit([section], RUN)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(again.predict(section).mean, fitted.predict(section).mean)
    other = create("stand", **QUICK).fit([section], replace(RUN, seed=1))
    assert (other.predict(section).mean != fitted.predict(section).mean).any()


def test_the_order_of_the_parts_is_of_no_account(section, fitted):
    order = np.random.default_rng(0).permutation(section.parts.n_parts)
    parts = section.parts
    shuffled = with_parts(
        section,
        ids=parts.ids[order],
        coordinates=parts.coordinates[order],
        share=sparse.csr_array(parts.share[:, order]),
        features=parts.features[order],
    )
    np.testing.assert_allclose(fitted.predict_spots(shuffled).mean, fitted.predict_spots(section).mean, rtol=1e-5)
    again = create("stand", **QUICK).fit([shuffled], RUN)
    np.testing.assert_allclose(again.predict(section).mean, fitted.predict(section).mean, rtol=1e-3)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_round_trip_keeps_every_bit(make_tissue, tmp_path, preset):
    paper = preset == "paper"
    section = make_tissue(n_spots=12, crops=paper, unit="log1p_cp10k" if paper else "counts")[0]
    if paper:
        with pytest.warns(HespotexWarning):
            model = create("stand", preset=preset, **TINY_PAPER).fit([section], RUN)
    else:
        model = create("stand", **QUICK).fit([section], RUN)
    again = load(model.save(tmp_path / "model"))
    for options in ({"output": "share"}, {"output": "intensity"}):
        before, after = model.with_options(**options).predict(section), again.with_options(**options).predict(section)
        np.testing.assert_array_equal(after.mean, before.mean)
        assert (after.unit, after.level) == (before.unit, before.level)
    np.testing.assert_array_equal(again.predict_spots(section).mean, model.predict_spots(section).mean)


def test_counts_can_be_learnt_from_crops(make_tissue):
    section, kind, _ = make_tissue(n_spots=20, crops=True)
    model = create("stand", encoder="vqvae", vqvae_epochs=2, vqvae_batch=32, **QUICK).fit([section], RUN)
    assert model._encoder is not None
    assert {"vqvae_loss", "vqvae_reconstruction", "vqvae_quantisation"} <= set(model.history[0])
    assert (model.predict(section).mean > 0).all()


def test_the_encoder_learns_from_crops_under_spots_alone(make_tissue):
    section = make_tissue(n_spots=12, crops=True)[0]
    other = section.parts.features.copy()
    other[:10] = 255 - other[:10]
    models = [
        create("stand", encoder="vqvae", vqvae_epochs=1, **QUICK).fit([each], RUN)
        for each in (section, with_parts(section, features=other))
    ]
    states = [model.state()[0] for model in models]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_expression_of_another_section_changes_no_bit(make_tissue, fitted):
    new = make_tissue("new", seed=5)[0]
    np.testing.assert_array_equal(fitted.predict(new).mean, fitted.predict(replace(new, targets=None)).mean)


def test_spots_without_nuclei_teach_the_ambient_term(make_tissue):
    section = make_tissue(n_spots=60)[0]
    share = section.parts.share.toarray()
    share[:30] = 0
    emptied = with_parts(section, share=sparse.csr_array(share))
    emptied.targets.counts[:30] = 7
    model = create("stand", hidden=[16], max_epochs=40, patience=None).fit([emptied], RUN)
    np.testing.assert_allclose(model.ambient, 7, rtol=0.35)


def test_counts_are_read_whatever_unit_is_asked_for(section, fitted):
    other = replace(section, targets=section.targets.in_unit("log1p_cp10k"))
    model = create("stand", **QUICK).fit([other], RUN)
    assert model.unit == "counts"
    np.testing.assert_array_equal(model.predict(section).mean, fitted.predict(section).mean)


def test_a_checkpoint_folder_changes_no_bit_and_is_left_empty(section, tmp_path):
    run = replace(RUN, checkpoint_dir=tmp_path)
    with_folder = create("stand", **QUICK).fit([section], run)
    assert list(tmp_path.iterdir()) == []
    without = create("stand", **QUICK).fit([section], RUN)
    np.testing.assert_array_equal(with_folder.predict(section).mean, without.predict(section).mean)


@pytest.mark.parametrize(
    ("decoder", "options"),
    [(CountDecoder, QUICK), (PublishedDecoder, {"decoder": "published", "pooling": "noisy_and", "max_epochs": 3})],
)
def test_an_interrupted_fit_ends_where_an_uninterrupted_one_does(make_tissue, tmp_path, monkeypatch, decoder, options):
    section = with_every_spot_held(make_tissue(n_spots=12, unit="log1p_cp10k")[0])
    options = {**options, "patience": None, "batch": 4}
    whole = create("stand", **options).fit([section], RUN)
    forward, calls = decoder.forward, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 8:  # in the third epoch
            raise KeyboardInterrupt
        return forward(self, *arguments)

    run = replace(RUN, checkpoint_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            create("stand", **options).fit([section], run)
    assert list(tmp_path.iterdir())
    resumed = create("stand", **options).fit([section], run)
    np.testing.assert_array_equal(resumed.predict(section).mean, whole.predict(section).mean)


def test_genes_that_are_all_zero_are_predicted_as_next_to_nothing(make_tissue):
    section = make_tissue()[0]
    section.targets.counts[:] = 0
    predicted = create("stand", **QUICK).fit([section], RUN).predict(section).mean
    assert (predicted >= 0).all()
    assert predicted.max() < 1e-3


def test_one_spot_is_enough(make_tissue):
    section = make_tissue(n_spots=2)[0]
    lonely = replace(section, targets=replace(section.targets, library_size=np.array([0.0, 9.0])))
    with pytest.warns(HespotexWarning, match="1 spots lack counts"):
        model = create("stand", **QUICK).fit([lonely], RUN)
    assert np.isfinite(model.predict(section).mean).all()


def test_input_that_cannot_be_used(section, fitted, make_tissue):
    model = create("stand", **QUICK)
    nan = section.parts.features.copy()
    nan[20] = np.nan
    with pytest.raises(DataValueError, match="NaN or infinite"):
        model.fit([with_parts(section, features=nan)], RUN)
    empty = sparse.csr_array(section.parts.share.shape)
    with pytest.raises(DataValueError, match="no spot holds any of its"):
        model.fit([with_parts(section, share=empty)], RUN)
    with pytest.raises(DataValueError, match="have no features"):
        model.fit([with_parts(section, features=None)], RUN)
    silent = replace(section, targets=replace(section.targets, library_size=np.zeros(section.n_obs)))
    with pytest.raises(DataValueError, match="has no spot with counts"):
        model.fit([silent], RUN)
    only_empty = np.r_[9.0, np.zeros(section.n_obs - 1)]  # the first spot holds no nuclei
    apart = replace(section, targets=replace(section.targets, library_size=only_empty))
    with (
        pytest.warns(HespotexWarning, match="lack counts"),
        pytest.raises(DataValueError, match="no spot that has parts has any counts"),
    ):
        model.fit([apart], RUN)
    with pytest.raises(DataValueError, match="reads raw crops"):
        create("stand", encoder="vqvae").fit([section], RUN)
    crops = make_tissue(n_spots=3, crops=True)[0]
    beyond = with_parts(crops, features=crops.parts.features.astype(float) * 2)
    with pytest.raises(DataValueError, match="numbers from 0 to 255"):
        create("stand", encoder="vqvae").fit([beyond], RUN)
    with pytest.raises(DataValueError, match="train it with unit='log1p_cp10k'"):
        create("stand", preset="paper").fit([crops], RUN)
    narrow = with_parts(section, features=section.parts.features[:, :3])
    with pytest.raises(ModelMismatchError, match="3 features per part"):
        fitted.predict(narrow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "conv"}, "encoder='conv' is unknown"),
        ({"pooling": "noisy_and"}, "goes with decoder='published'"),
        ({"reencode": True}, "reencode=True goes with"),
        ({"hidden": [0]}, "hidden"),
        ({"dropout": 1.0}, "dropout"),
        ({"beta": 0}, "beta"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"output": "both"}, "output='both' is unknown"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(DataValueError, match=message):
        create("stand", **options)


def test_registered():
    info = get("stand").info
    assert (info.level, info.task, info.needs, info.uncertainty) == ("nucleus", "both", ("parts",), True)
    with pytest.raises(DataValueError, match="it has 'default', 'paper'"):
        create("stand", preset="small")


def test_symmetries_are_the_eight_of_a_square():
    image = torch.arange(9.0).reshape(1, 3, 3, 1).expand(200, 3, 3, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seen = {tuple(each.flatten().tolist()) for each in random_symmetry(image)}
    turned = [np.rot90(np.arange(9).reshape(3, 3), k) for k in range(4)]
    assert seen == {tuple(map(float, each.ravel())) for one in turned for each in (one, one.T)}


def test_a_row_of_one_part_stands_for_itself(fitted, section):
    one = Parts(
        section.parts.ids[:1], section.parts.coordinates[:1], section.parts.share[:, :1], section.parts.features[:1]
    )
    np.testing.assert_allclose(
        fitted.predict(replace(section, parts=one)).mean, fitted.predict(section).mean[:1], rtol=1e-5
    )
