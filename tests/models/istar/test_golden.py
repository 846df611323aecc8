"""Every step equals the published one to the precision of its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.panel import PanelSource, choose_panel
from hespotex.data.section import Parts, Section, Targets
from hespotex.models.istar import IStar
from hespotex.models.istar.config import PAPER
from hespotex.models.istar.features import SmoothedRows, box_filter, pad_white, rgb_map, shift_ensemble
from hespotex.models.istar.network import PartNetwork, positive
from hespotex.models.istar.preparation import reduce_mask, rescale_image, rescale_positions, tissue_mask
from hespotex.models.istar.spots import disc, disc_members, nearest_index, round_half_even
from hespotex.models.istar.training import GeneScale, SpotBatches, Supervision, batch_loss, training_step

pytestmark = pytest.mark.data


def loaded(recorded, prefix, n_features, n_genes):
    network = PartNetwork(n_features, n_genes)
    names = {name: name.replace("latent.", "latent") for name in network.state_dict()}
    network.load_state_dict({name: torch.tensor(recorded[prefix + key]) for name, key in names.items()})
    return network


def as_parts(grid_shape, features, n_spots=1):
    """A full rectangle of superpixels of 1 µm."""
    grid = np.argwhere(np.ones(grid_shape, dtype=bool))
    return Parts(
        ids=np.arange(len(grid)).astype(str),
        coordinates=grid[:, ::-1] + 0.5,
        share=sparse.csr_array((n_spots, len(grid))),
        features=features,
        grid=grid,
        size_um=1.0,
        level="superpixel",
    )


@pytest.mark.parametrize("radius", ["3.4375", "4.0", "8.0", "2.0625", "1.0", "2.5"])
def test_discs(istar, radius):
    mask = istar("spots")[f"disk_r{radius}"]
    np.testing.assert_array_equal(disc(float(radius)), np.argwhere(mask) - len(mask) // 2)


def test_patches_and_scaled_counts_of_spots(istar):
    recorded = istar("spots")
    x_map, kept = recorded["x_map"], recorded["spot_kept"]
    parts = as_parts(x_map.shape[:2], x_map.reshape(-1, 579), len(kept))
    share = disc_members(parts, recorded["locs"][:, ::-1].astype(float), float(recorded["r"]))
    members = share.indices.reshape(len(kept), -1)
    assert members.shape[1] == int(recorded["n"])
    x = x_map.reshape(-1, 579)[members]
    np.testing.assert_array_equal(np.isfinite(x).all(axis=(1, 2)), kept)
    np.testing.assert_array_equal(x[kept][0], recorded["X_spot0"])
    np.testing.assert_array_equal(x[kept][..., -5:], recorded["X_last_channels"])
    np.testing.assert_allclose(x[kept].mean(axis=1), recorded["X_spot_mean"], atol=1e-5)

    n = len(kept)
    data = Supervision(
        features=np.zeros((1, 1), np.float32),
        share=sparse.csr_array((n, 1)),
        counts=recorded["counts"],
        size=np.full(n, float(recorded["n"]), np.float32),
        depth=np.ones(n, np.float32),
    )
    np.testing.assert_allclose(GeneScale.fit(data, minmax=True).scaled(data), recorded["y"], atol=1e-5)


def test_network_and_activation(istar):
    recorded = istar("network")
    network = loaded(recorded, "w.", 579, 14)
    x = torch.tensor(recorded["X"])
    with torch.no_grad():
        np.testing.assert_allclose(network.embed(x), recorded["latent"], atol=1e-5)
        np.testing.assert_allclose(network(x), recorded["f"], atol=1e-5)
        np.testing.assert_allclose(network(x)[..., recorded["subset"]], recorded["f_subset"], atol=1e-5)
        np.testing.assert_allclose(network(x).mean(dim=1), recorded["yhat"], atol=1e-5)
    np.testing.assert_allclose(positive(torch.tensor(recorded["act_in"])), recorded["act_out"], atol=1e-6)


def test_five_steps_of_training(istar):
    """Loss of each step, first gradients and weights after five, by the step and the optimiser that training uses."""
    recorded = istar("network")
    network = loaded(recorded, "w.", 579, 14)
    x, y = recorded["X"], recorded["Y"]
    data = Supervision(
        features=x.reshape(-1, 579),
        share=sparse.csr_array(np.kron(np.eye(3), np.ones((1, 37)))),
        counts=y,
        size=np.full(3, 37, np.float32),
        depth=np.ones(3, np.float32),
    )
    (batch,) = SpotBatches(data, y, 3, seed=0)
    step = training_step(PAPER, network, GeneScale(np.ones(14, np.float32), np.zeros(14, np.float32)))
    optimizer = step.configure_optimizers()
    for number, expected in enumerate(recorded["loss"]):
        optimizer.zero_grad()
        loss = step.training_step(batch, 0)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)
        if number == 0:
            np.testing.assert_allclose(network.output.weight.grad, recorded["grad.output.weight"], atol=1e-5)
            np.testing.assert_allclose(network.latent[0].bias.grad, recorded["grad.latent0.bias"], atol=1e-5)
        optimizer.step()
    np.testing.assert_allclose(network.output.weight.detach(), recorded["after5.output.weight"], atol=1e-5)
    np.testing.assert_allclose(network.latent[0].bias.detach(), recorded["after5.latent0.bias"], atol=1e-5)
    np.testing.assert_allclose(network(torch.tensor(x)).detach(), recorded["f_after5"], atol=1e-5)
    assert float(batch_loss(network, batch, PAPER, step.slope).detach()) < recorded["loss"][-1]


def test_ensemble(istar):
    """Median latent, and median counts per superpixel after scaling back."""
    recorded = istar("ensemble")
    x = recorded["x_map"].reshape(-1, 12)
    model = IStar(PAPER, smooth="none")
    model.genes, model.n_features, model.unit, model._fitted = tuple("ABCDE"), 12, "counts", True
    model._scaler, n = None, float(recorded["n"])
    low, high = recorded["counts_min"] / n, recorded["counts_max"] / n
    model._scale = GeneScale((high - low).astype(np.float32), low.astype(np.float32))
    model._members = [loaded(recorded, f"m{number}.", 12, 5) for number in range(3)]
    section = Section(
        "s",
        np.array(["a"]),
        np.empty((1, 0)),
        np.zeros((1, 2)),
        targets=Targets(np.ones((1, 5)), np.ones(1), model.genes, "counts"),
        parts=as_parts((13, 11), x),
    )
    predicted = model.predict(section, block_rows=50)
    np.testing.assert_allclose(predicted.mean, recorded["counts_super"].reshape(-1, 5), atol=1e-5)
    np.testing.assert_allclose(predicted.latent, recorded["latent_median"].reshape(256, -1).T, atol=1e-5)


def test_box_filters(istar):
    recorded = istar("smoothing")
    for side in (4, 16):
        np.testing.assert_allclose(box_filter(recorded["f"], side, centred=False), recorded[f"box{side}"], atol=1e-5)
    np.testing.assert_allclose(box_filter(recorded["impulse"], 4, centred=False), recorded["impulse_box4"], atol=1e-6)
    rows = SmoothedRows(
        recorded["f"].reshape(-1, 3), as_parts((40, 37), None).grid, boxes=((1, 16), (2, 4)), centred=False
    )
    expected = np.concatenate([recorded["box16"][..., :1], recorded["box4"][..., 1:]], axis=2).reshape(-1, 3)
    np.testing.assert_allclose(rows[:], expected, atol=1e-5)
    np.testing.assert_allclose(rows[500:700], expected[500:700], atol=1e-5)


def toy_maps(image):
    """What was recorded in place of the transformers: colour means over superpixels and over patches."""

    def means(pixels, side):
        height, width = pixels.shape[:2]
        values = pixels.reshape(height // side, side, width // side, side, 3).astype(np.float32)
        return (values / np.float32(255)).mean(axis=(1, 3))  # in single precision, as recorded

    scale = np.arange(1, 5)
    whole = np.pad(image, [(0, -size % 256) for size in image.shape[:2]] + [(0, 0)], mode="edge")
    rows, columns = image.shape[0] // 16, image.shape[1] // 16
    regional = means(whole, 256).repeat(16, axis=0).repeat(16, axis=1)[:rows, :columns]
    return regional[..., [0, 1, 2, 0]] * scale, means(image, 16)[..., [0, 1, 2, 0]] * scale


def test_shift_ensemble_and_colour(istar):
    recorded = istar("shift")
    image = recorded["image"]
    regional, local = shift_ensemble(image, toy_maps, legacy=True)
    np.testing.assert_allclose(regional, recorded["cls_map"], atol=1e-4)
    np.testing.assert_allclose(local, recorded["sub_map"], atol=1e-4)
    np.testing.assert_allclose(rgb_map(image), recorded["rgb"], atol=1e-3)
    np.testing.assert_allclose(box_filter(regional, 16, centred=False), recorded["cls_smooth"], atol=1e-4)
    np.testing.assert_allclose(box_filter(local, 4, centred=False), recorded["sub_smooth"], atol=1e-4)
    (coverage,) = shift_ensemble(
        image, lambda part: [np.ones((part.shape[0] // 16, part.shape[1] // 16, 1))], legacy=True
    )
    np.testing.assert_allclose(coverage[..., 0], recorded["coverage"], atol=1e-6)


def test_rounding_padding_and_genes(istar):
    recorded = istar("preprocessing")
    padded = pad_white(recorded["rescaled_0.6"], 64)
    np.testing.assert_array_equal(padded, recorded["padded_0.6"])
    np.testing.assert_array_equal(round_half_even(recorded["radius_raw"]), recorded["radius_scaled_1.0"])
    np.testing.assert_array_equal(nearest_index(recorded["locs_px_xy"][:, ::-1]), recorded["locs_superpixel_ij"])
    counts = recorded["gene_counts"]
    genes = tuple(f"g{column}" for column in range(counts.shape[1]))
    panel = choose_panel([PanelSource(sparse.csr_array(counts), genes)], method="variance", n_top=5)
    theirs = {"g2" if gene == 7 else f"g{gene}" for gene in recorded["gene_top5"].tolist()}  # gene 7 copies gene 2
    assert {"g2" if gene == "g7" else gene for gene in panel} == theirs


@pytest.mark.parametrize("scale", [0.6, 1.3])
def test_images_are_scaled_as_published(istar, scale):
    recorded = istar("preprocessing")
    np.testing.assert_array_equal(rescale_image(recorded["raw"], scale), recorded[f"rescaled_{scale}"])


def test_positions_and_masks_are_scaled_as_published(istar):
    recorded = istar("preprocessing")
    np.testing.assert_array_equal(rescale_positions(recorded["locs_raw_xy"], 0.6), recorded["locs_scaled_xy"])
    np.testing.assert_array_equal(reduce_mask(recorded["mask_px"]), recorded["mask_superpixel"])


def test_the_automatic_tissue_mask(istar):
    recorded = istar("clustering")
    colours = recorded["mask_rgb"].transpose(1, 2, 0)
    features = np.concatenate([recorded["mask_cls"].transpose(1, 2, 0), colours], axis=-1)
    found = tissue_mask(features, colours, margin=6, min_size=25)
    np.testing.assert_array_equal(found, recorded["tissue_mask_mar6_min25"])


def test_the_ring_around_a_disc(istar):
    ring = istar("spots")["ring_r4_w1"]
    np.testing.assert_array_equal(disc(4, width=1) + 4, np.argwhere(ring))
