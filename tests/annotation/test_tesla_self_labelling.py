"""Self-labelling against numbers recorded from the published program; statements 12 to 16 of its checklist."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from hespotex.annotation.self_labelling import (
    SelfLabellingConfig,
    build_network,
    continuity,
    main_labels,
    merge_minor,
    respond,
    self_label,
    target_clusters,
)
from hespotex.errors import DataValueError

CASES = ("small_min", "large_mean", "minumi1")


def recorded_network(recorded, prefix):
    weights = {
        name.removeprefix(prefix).replace(".0.", "."): torch.tensor(recorded[name])
        for name in recorded.files
        if name.startswith(prefix)
    }
    network = build_network(2, len(weights["conv1.bias"]))
    network.load_state_dict(weights)
    return network


def published(recorded):
    return SelfLabellingConfig(
        channels=12,
        threshold=int(recorded["threshold"]),
        radius=int(recorded["radius"]),
        min_labels=int(recorded["minLabels"]),
        normalisation="published",
        bounds="published",
    )


def image_of(recorded):
    return np.stack([recorded["img_band"], recorded["gene_band"]], axis=-1).astype(np.float32)


def shown(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))[None])


@pytest.fixture
def two_halves():
    """An image whose left half is dark and without the marker."""
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(0.2, 0.05, size=(24, 30, 2)), 0, 1)
    image[:, 15:] += 0.6
    return image.astype(np.float32)


SMALL = SelfLabellingConfig(channels=8, threshold=20, min_labels=2, max_iterations=20)


@pytest.mark.data
def test_checklist_12_13_network_and_loss_are_the_recorded_ones(tesla):
    recorded = tesla("network100")
    network = recorded_network(recorded, "w.")
    assert sum(each.numel() for each in network.parameters()) == recorded["n_params"] == 265_900
    image = shown(recorded["input"])
    response = respond(network, image, "published")
    np.testing.assert_allclose(response.permute(1, 2, 0).numpy(), recorded["R"], atol=1e-5)
    labels = response.argmax(dim=0)
    assert np.array_equal(labels.numpy(), recorded["labels"])
    similarity = functional.cross_entropy(response.flatten(1).T, labels.flatten())
    assert float(similarity) == pytest.approx(float(recorded["CE_unrefined"]), abs=1e-5)
    assert float(continuity(response)) == pytest.approx(float(recorded["continuity"]), abs=1e-5)
    network.eval()
    with torch.no_grad():
        evaluated = network(image)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(evaluated, recorded["R_eval_after_one_train_pass"], atol=1e-4)


def test_checklist_12_parameters_and_shape():
    network = build_network()
    assert sum(each.numel() for each in network.parameters()) == 265_900
    assert respond(network, torch.rand(1, 2, 9, 13)).shape == (100, 9, 13)


def test_checklist_13_continuity_is_the_mean_step_along_both_axes():
    response = torch.arange(6.0).reshape(1, 2, 3) ** 2
    assert float(continuity(response)) == pytest.approx((9 + 15 + 21) / 3 + (1 + 3 + 7 + 9) / 4)
    assert float(continuity(torch.full((4, 5, 6), 2.5))) == 0
    assert float(continuity(torch.ones(4, 1, 1))) == 0


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_checklist_14_training_is_the_recorded_one(tesla, case):
    recorded = tesla(f"annotation_{case}")
    config = published(recorded)
    network, shape = recorded_network(recorded, "w0."), recorded["img_band"].shape
    first = respond(copy.deepcopy(network), shown(image_of(recorded)), "published")
    np.testing.assert_allclose(first.flatten(1).T.numpy(), recorded["R0"], atol=1e-4)
    for step in "01":
        raw = torch.tensor(recorded[f"raw{step}"].reshape(shape))
        merged = merge_minor(raw, config.threshold, config.radius, bounds="published")
        assert np.array_equal(merged.numpy().ravel(), recorded[f"refined{step}"])
    made = self_label(image_of(recorded), config, device="cpu", network=network)
    assert len(made.history) == len(recorded["iter_main"])
    weighted = {"similarity": ("iter_L_sim", 1), "continuity": ("iter_L_con", config.continuity_weight)}
    for name, (key, weight) in weighted.items():
        here = [row[name] * weight for row in made.history]
        np.testing.assert_allclose(here[:3], recorded[key][:3], atol=1e-4)
        np.testing.assert_allclose(here, recorded[key], atol=0.02)
    assert [row["n_main"] for row in made.history] == recorded["iter_main"].tolist()
    assert (made.raw.ravel() == recorded["labels_raw"]).mean() >= 0.99
    assert (made.labels.ravel() == recorded["labels_refined"]).mean() >= 0.99
    if "prob" in recorded.files:
        answer = respond(made.network, shown(image_of(recorded)), "published").softmax(dim=0)
        assert np.median(np.abs(answer.flatten(1).T.numpy() - recorded["prob"])) < 1e-3


def test_checklist_14_training_stops(two_halves):
    never = self_label(two_halves, SelfLabellingConfig(channels=8, threshold=1, min_labels=1), device="cpu")
    assert len(never.history) <= 30
    made = self_label(two_halves, SMALL, device="cpu")
    assert made.history[-1]["n_main"] <= 2 or len(made.history) == 20
    assert all(row["n_main"] > 2 for row in made.history[:-1])
    config = SelfLabellingConfig()
    assert (config.max_iterations, config.min_labels) == (30, 30)


def test_checklist_15_same_seed_same_labels_and_no_trace_on_the_global_generator(two_halves):
    before = torch.random.get_rng_state()
    one, other = (self_label(two_halves, SMALL, seed=3, device="cpu") for _ in range(2))
    assert np.array_equal(one.labels, other.labels)
    assert one.history == other.history
    assert torch.equal(before, torch.random.get_rng_state())
    another = self_label(two_halves, SMALL, seed=4, device="cpu")
    assert another.history != one.history


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_checklist_16_targets_are_the_recorded_ones(tesla, case):
    recorded = tesla(f"annotation_{case}")
    size = str(recorded["target_size"]) if "target_size" in recorded.files else "small"
    labels = recorded["labels_refined"].reshape(recorded["gene_band"].shape)
    targets, means = target_clusters(labels, recorded["gene_band"], size)
    assert targets.tolist() == recorded["targets"].tolist()
    np.testing.assert_allclose(means, recorded["label_mean"], atol=1e-9)


def test_checklist_16_rule_of_the_targets():
    labels = np.repeat(np.arange(4), 10).reshape(4, 10)
    band = np.array([0.8, 0.41, 0.4, 0.2])[labels]
    assert target_clusters(labels, band)[0].tolist() == [0, 1]
    assert target_clusters(labels, band, "large")[0].tolist() == [0, 1, 2]
    assert target_clusters(labels, band, tissue=labels > 1)[0].tolist() == [2]
    only = target_clusters(np.zeros((2, 2), dtype=int), np.full((2, 2), 0.1))
    assert only[0].tolist() == [0]


@pytest.mark.data
@pytest.mark.parametrize("image", ["wide", "tall"])
def test_published_merging_is_the_recorded_one_and_ours_sees_the_whole_image(tesla, image):
    from hespotex.annotation.self_labelling import _by_size

    recorded = tesla("refine")
    threshold, radius = int(recorded["threshold"]), int(recorded["radius"])
    numbered = _by_size(torch.tensor(recorded[image]))
    merged = merge_minor(numbered, threshold, radius, bounds="published")
    assert np.array_equal(merged.numpy(), recorded[f"{image}_refined"])
    ours = merge_minor(numbered, threshold, radius)
    assert np.array_equal(ours.numpy(), by_hand(numbered.numpy(), threshold, radius))


def by_hand(labels, threshold, radius):
    values, size = np.unique(labels, return_counts=True)
    main, merged = values[size >= threshold], labels.copy()
    for minor in values[size < threshold]:
        seen = np.concatenate(
            [
                labels[max(0, r - radius) : r + radius + 1, max(0, c - radius) : c + radius + 1].ravel()
                for r, c in np.argwhere(labels == minor)
            ]
        )
        count = np.array([(seen == label).sum() for label in main])
        if count.any():
            merged[labels == minor] = main[count.argmax()]
    return merged


def test_merging_equals_counting_by_hand():
    labels = np.random.default_rng(1).choice(6, p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02], size=(23, 31))
    merged = merge_minor(torch.tensor(labels), 100, 2).numpy()
    assert np.array_equal(merged, by_hand(labels, 100, 2))


def test_a_rare_label_far_from_main_ones_stays():
    labels = np.full((12, 12), 1)
    labels[:6] = 2
    labels[0, 0] = 3
    everything_minor = merge_minor(torch.tensor(labels), 1000, 3)
    assert np.array_equal(everything_minor.numpy(), labels)
    island = np.where(np.arange(20)[:, None] < 10, 0, np.where(np.arange(20)[:, None] < 16, 1, 2)) * np.ones(
        (1, 3), int
    )
    # The middle band is rare and touches the first; the last touches only the middle one.
    merged = merge_minor(torch.tensor(island), 20, 1).numpy()
    assert set(np.unique(merged[10:16])) == {0}
    assert set(np.unique(merged[16:])) == {2}
    assert main_labels(torch.tensor(island), 20).tolist() == [0]


def test_halves_are_told_apart(two_halves):
    made = self_label(two_halves, SMALL, seed=0, device="cpu")
    inside = made.labels[3:-3]
    left, right = inside[:, 3:12], inside[:, 18:-3]
    assert set(np.unique(left)) & set(np.unique(right)) == set()
    targets, _ = target_clusters(made.labels, two_halves[..., 1])
    assert np.isin(right, targets).all()
    assert not np.isin(left, targets).any()
    counts = np.bincount(made.labels.ravel())
    assert counts[0] == counts.max()


def test_trained_network_answers_the_same_for_an_image_and_a_part_of_it(two_halves):
    made = self_label(two_halves, SMALL, device="cpu")
    assert not made.network.training
    with torch.no_grad():
        whole = made.network(shown(two_halves))[0]
        part = made.network(shown(two_halves[:, :20]))[0]
    np.testing.assert_allclose(part[..., :16].numpy(), whole[..., :16].numpy(), atol=1e-4)
    assert np.array_equal(whole.argmax(dim=0).numpy(), made.raw)


@pytest.mark.gpu
def test_labels_on_a_gpu(two_halves):
    made = self_label(two_halves, SMALL, device="cuda")
    assert next(made.network.parameters()).device.type == "cpu"
    assert made.labels.shape == (24, 30)


def test_bad_images():
    with pytest.raises(DataValueError, match="one pixel"):
        self_label(np.ones((1, 1, 2)), device="cpu")
    with pytest.raises(DataValueError, match="NaN"):
        self_label(np.full((4, 4, 2), np.nan), device="cpu")
    with pytest.raises(DataValueError, match="shape"):
        self_label(np.ones((4, 4)), device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 0},
        {"threshold": 0},
        {"radius": 0},
        {"lr": 0},
        {"momentum": -1},
        {"normalisation": "batch"},
        {"bounds": "x"},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        SelfLabellingConfig(**options)


def test_impossible_targets():
    labels = np.zeros((3, 3), dtype=int)
    with pytest.raises(DataValueError, match="size="):
        target_clusters(labels, np.ones((3, 3)), "huge")
    with pytest.raises(DataValueError, match="0 everywhere"):
        target_clusters(labels, np.zeros((3, 3)))
    with pytest.raises(DataValueError, match="tissue"):
        target_clusters(labels, np.ones((3, 3)), tissue=np.zeros((3, 3), dtype=bool))
