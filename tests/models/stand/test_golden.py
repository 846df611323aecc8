"""Our modules against numbers recorded from the released ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hespotex.models.nn.pooling import Bags
from hespotex.models.stand import published_split
from hespotex.models.stand.decoder import PublishedDecoder
from hespotex.models.stand.keras import KerasAdam
from hespotex.models.stand.pooling import noisy_and, pool, singletons
from hespotex.models.stand.vqvae import scaled

pytestmark = pytest.mark.data

CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def one_bag(n: int) -> Bags:
    return Bags(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.ones(n), 1)


def two_bags(values) -> tuple[torch.Tensor, Bags]:
    """The recorded padded bags, side by side and without the padding."""
    sizes = values["n_nuclei"].tolist()
    features = torch.cat([torch.tensor(bag[:n]) for bag, n in zip(values["X_bags"], sizes, strict=True)])
    bag = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))
    return features, Bags(torch.arange(len(bag)), bag, torch.ones(len(bag)), 2)


def test_vqvae_forward(recorded_vqvae):
    network, values = recorded_vqvae
    x = scaled(torch.tensor(values["crops"].reshape(8, -1)))
    np.testing.assert_allclose(x, values["x"], **CLOSE)
    with torch.no_grad():
        steps = [x.permute(0, 3, 1, 2)]
        for layer in network.encoder:
            steps.append(layer(steps[-1]))
        np.testing.assert_allclose(steps[2].permute(0, 2, 3, 1), values["enc1_out"], **CLOSE)
        np.testing.assert_allclose(steps[4].permute(0, 2, 3, 1), values["enc2_out"], **CLOSE)
        z = network.encode(x)
        np.testing.assert_allclose(z, values["z"], **CLOSE)
        np.testing.assert_array_equal(network.codes(z), values["code_index"])
        np.testing.assert_allclose(network.codebook[network.codes(z)], values["e"], **CLOSE)
        np.testing.assert_allclose(network.features(x), values["feature_784"], **CLOSE)
        through = torch.tensor(values["straight_through"])
        steps = [through.permute(0, 3, 1, 2)]
        for layer in network.decoder:
            steps.append(layer(steps[-1]))
        np.testing.assert_allclose(steps[2].permute(0, 2, 3, 1), values["dec1_out"], **CLOSE)
        np.testing.assert_allclose(steps[4].permute(0, 2, 3, 1), values["dec2_out"], **CLOSE)
        np.testing.assert_allclose(network.decode(through), values["reconstruction"], **CLOSE)


def test_vqvae_losses_and_gradients(recorded_vqvae):
    network, values = recorded_vqvae
    reconstruction, quantisation = network.losses(torch.tensor(values["x"]), float(values["sigma2"]))
    assert reconstruction.item() == pytest.approx(float(values["loss_reconstruction"]), rel=1e-5)
    assert quantisation.item() == pytest.approx(float(values["loss_vq"]), rel=1e-5)
    assert quantisation.item() == pytest.approx(1.25 * float(values["mse_z_e"]), rel=1e-5)
    (reconstruction + quantisation).backward()
    for name, gradient in (
        ("grad_enc1_W", network.encoder[0].weight.grad),
        ("grad_enc3_W", network.encoder[4].weight.grad),
        ("grad_dec3_W", network.decoder[4].weight.grad),
    ):
        np.testing.assert_allclose(gradient.permute(2, 3, 1, 0), values[name], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(network.codebook.grad.T, values["grad_E"], **CLOSE)


def test_vqvae_follows_four_steps_of_adam(recorded_vqvae):
    network, values = recorded_vqvae
    optimiser = KerasAdam(network.parameters(), lr=1e-3)
    x = torch.tensor(values["x"])
    for recorded_losses in values["loss_4_adam_steps"]:
        reconstruction, quantisation = network.losses(x, float(values["sigma2"]))
        losses = [each.item() for each in (reconstruction + quantisation, reconstruction, quantisation)]
        np.testing.assert_allclose(losses, recorded_losses, rtol=1e-5, atol=2e-6)
        optimiser.zero_grad()
        (reconstruction + quantisation).backward()
        optimiser.step()


@pytest.mark.parametrize("kind", ["noisy_and", "noisy_or", "max", "isr", "gm", "lse"])
def test_poolings(recorded, kind):
    values = recorded("pooling")
    p, threshold, gamma = torch.tensor(values["p"]), torch.tensor(values["b"]), float(values["default_gamma"])
    abundance = float(values["default_beta"]) * len(p)
    pooled = abundance * pool(kind, p, one_bag(len(p)), gamma=gamma, threshold=threshold)
    np.testing.assert_allclose(pooled, values[f"{kind}_pooled"], **CLOSE)
    single = pool(kind, p, singletons(p), gamma=gamma, threshold=threshold)
    np.testing.assert_allclose(single, values[f"{kind}_single"], **CLOSE)


def test_noisy_and_curve(recorded):
    values = recorded("pooling")
    curve = noisy_and(torch.tensor(values["curve_p"]), torch.tensor(values["b"]), float(values["default_gamma"]))
    np.testing.assert_allclose(curve, values["curve_P"], **CLOSE)


def test_denormaliser(recorded):
    values = recorded("denormaliser")
    decoder = PublishedDecoder(3, 9)
    decoder.scale.data = torch.tensor(values["w"])
    y = decoder.denormalize(torch.tensor(values["a"]))
    np.testing.assert_allclose(y.detach(), values["y_hat"], **CLOSE)
    y.sum().backward()
    np.testing.assert_allclose(decoder.scale.grad, values["grad_w_of_sum"], **CLOSE)


def test_decoder_forward(recorded_decoder):
    decoder, values = recorded_decoder
    h = torch.tensor(values["h"])
    with torch.no_grad():
        p = decoder.activations(h)
        np.testing.assert_allclose(p, values["p"], **CLOSE)
        np.testing.assert_allclose(decoder.abundance(p, one_bag(5)), values["a"], **CLOSE)
        single = pool("noisy_and", p, singletons(p), gamma=5.0, threshold=decoder.threshold)
        np.testing.assert_allclose(single, values["P_single"], **CLOSE)
        for name in ("y_hat_pooled", "y_functional_call"):
            np.testing.assert_allclose(decoder(h, one_bag(5)), values[name], **CLOSE)
        np.testing.assert_allclose(decoder.single(h), values["y_hat_single"], **CLOSE)
        np.testing.assert_allclose(decoder.single(h[:1]), values["y_hat_single_20same_row0"], **CLOSE)
        twenty = decoder(h[:1].expand(20, -1), one_bag(20))
        np.testing.assert_allclose(twenty, values["y_hat_pooled_20_copies_of_row0"], **CLOSE)
    assert sum(each.numel() for each in decoder.parameters()) == int(values["n_trainable"])


def test_decoder_loss_gradients_and_four_steps_of_adam(recorded_decoder):
    decoder, values = recorded_decoder
    features, bags = two_bags(values)
    target = torch.tensor(values["Y"][:, 0])
    optimiser = KerasAdam(decoder.parameters(), lr=1e-3)
    for step, recorded_loss in enumerate(values["train_loss_4_adam_steps"]):
        loss = F.mse_loss(decoder(features, bags), target)
        assert loss.item() == pytest.approx(float(recorded_loss), rel=1e-5)
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            assert loss.item() == pytest.approx(float(values["test_loss"]), rel=1e-5)
            np.testing.assert_allclose(decoder.last.weight.grad.T, values["grad_f2_W"], **CLOSE)
            np.testing.assert_allclose(decoder.threshold.grad, values["grad_b"], **CLOSE)
            np.testing.assert_allclose(decoder.scale.grad, values["grad_w"], **CLOSE)
        optimiser.step()
    np.testing.assert_allclose(decoder.threshold.detach(), values["b_after_4"], **CLOSE)
    np.testing.assert_allclose(decoder.scale.detach(), values["w_after_4"], **CLOSE)


def test_split(data_dir, recorded):
    values = json.loads((data_dir / "golden" / "stand" / "split.json").read_text())
    parts = published_split(values["folder_names"][::-1], values["k"], values["seed"])
    assert [sorted(part) for part in parts] == [values["parts_sorted"][str(i)] for i in range(values["k"])]
