"""Networks, losses and a whole fit against numbers recorded from the published package."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hespotex.models import Run
from hespotex.models._training import fit_lightning
from hespotex.models.stage import training
from hespotex.models.stage.config import PAPER
from hespotex.models.stage.losses import latent_loss, reconstruction_loss, sliced_wasserstein, total_loss
from hespotex.models.stage.network import Autoencoder, Frame

pytestmark = pytest.mark.data

LINEAR = replace(PAPER, relu=False)


def layers(networks):
    """Published names of the layers that have parameters."""
    for part, network, first in (("enc", networks.encoder, 1), ("dec", networks.decoder, 6)):
        number = first - 1
        for layer in network:
            if isinstance(layer, torch.nn.Linear):
                number += 1
                yield f"{part}.fc{number}", layer
            elif isinstance(layer, torch.nn.BatchNorm1d):
                yield f"{part}.fc{number}_bn", layer


def loaded(*recorded, config=PAPER):
    networks = Autoencoder(24, 2, config)
    for arrays in recorded:
        for name, layer in layers(networks):
            for key, value in layer.state_dict().items():
                if f"{name}.{key}" in arrays:
                    value.copy_(torch.tensor(arrays[f"{name}.{key}"]))
    return networks


def tensors(recorded, *names):
    return [torch.tensor(recorded[name]) for name in names]


def close(ours, theirs, tolerance):
    np.testing.assert_allclose(
        ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours, theirs, atol=tolerance
    )


@pytest.mark.parametrize(("config", "kind"), [(PAPER, "relu"), (LINEAR, "linear")])
def test_forward_in_evaluation(golden, config, kind):
    recorded = golden("forward")
    networks = loaded(golden("weights"), recorded, config=config).eval()
    expression, coordinates = tensors(recorded, "E", "c")
    z, reconstruction = networks(expression, coordinates)
    close(z, recorded[f"z_eval_{kind}"], 1e-5)
    close(reconstruction, recorded[f"Ehat_from_z_eval_{kind}"], 1e-5)
    decoded = networks.decoder(coordinates)
    close(decoded, recorded[f"Ehat_from_c_eval_{kind}"], 1e-5)
    if kind == "linear":
        close(decoded.clamp_min(0), recorded["Ehat_from_c_eval_linear_clipped"], 1e-5)


def test_forward_in_training_and_running_statistics(golden):
    recorded = golden("forward")
    networks = loaded(golden("weights"), recorded).train()
    z, reconstruction = networks(*tensors(recorded, "E", "c"))
    close(z, recorded["z_train_relu"], 1e-5)
    close(reconstruction, recorded["Ehat_from_z_train_relu"], 1e-5)
    for name, layer in layers(networks):
        if name.endswith("_bn"):
            close(layer.running_mean, recorded[f"after_{name}.running_mean"], 1e-5)
            close(layer.running_var, recorded[f"after_{name}.running_var"], 1e-5)


@pytest.mark.parametrize("width", [2, 3])
def test_losses(golden, width):
    recorded = {
        name.removeprefix(f"X{width}_"): array
        for name, array in golden("losses").items()
        if name.startswith(f"X{width}_")
    }
    z, c, along, expression, predicted = tensors(recorded, "z", "c", "projections", "E", "Ehat")
    z.requires_grad_()
    distance = sliced_wasserstein(z, c, along)
    distance.backward()
    close(distance, recorded["SWD"], 1e-6)
    close(z.grad, recorded["dSWD_dz"], 1e-6)
    order = torch.randperm(len(c), generator=torch.Generator().manual_seed(0))
    close(sliced_wasserstein(c, c[order], along), recorded["SWD_identical_permuted"], 1e-6)
    shifted = sliced_wasserstein(c, c + 0.5, torch.tensor(recorded["projections_shift"]))
    close(shifted, recorded["SWD_shift_half"], 1e-6)
    close(torch.nn.functional.l1_loss(z, c), recorded["L1_z"], 1e-6)
    close(torch.nn.functional.mse_loss(predicted, expression), recorded["MSE"], 1e-6)
    close(torch.nn.functional.l1_loss(predicted, expression), recorded["L1_x"], 1e-6)
    latent = latent_loss(z, c, along, PAPER.swd_weight)
    reconstruction = reconstruction_loss(predicted, expression, PAPER.l1_weight)
    close(latent, recorded["latent"], 1e-6)
    close(reconstruction, recorded["recon"], 1e-6)
    close(total_loss(latent, reconstruction, PAPER), recorded["total"], 1e-6)
    close(total_loss(None, reconstruction, PAPER), recorded["total_VGE"], 1e-6)


def test_a_whole_fit(golden, monkeypatch):
    recorded = golden("training")
    networks = loaded(golden("weights"))
    config = replace(PAPER, coord_sf=float(recorded["coord_sf"]))
    frame = Frame.fit(recorded["coord"], config)
    expression, coordinates = torch.tensor(recorded["E"]), torch.from_numpy(frame(recorded["coord"]))
    rows = [torch.tensor(recorded[f"batch{step}_index"]) for step in range(6)]
    along = iter([torch.tensor(recorded[f"batch{step}_projections"]) for step in range(6)])
    monkeypatch.setattr(training, "directions", lambda n, like: next(along))
    seen = {"z": [], "Ehat": []}
    networks.encoder.register_forward_hook(lambda _module, _input, output: seen["z"].append(output.detach()))
    networks.decoder.register_forward_hook(lambda _module, _input, output: seen["Ehat"].append(output.detach()))
    module = training.stage_module(config, networks)
    losses, training_step = [], module.training_step
    monkeypatch.setattr(module, "training_step", lambda *step: losses.append(training_step(*step)) or losses[-1])
    items = [(expression[chosen], coordinates[chosen]) for chosen in rows]
    fit_lightning(
        module,
        items,
        Run(device="cpu"),
        max_epochs=2,
        visit=lambda epoch: range(3 * epoch, 3 * epoch + 3),
        name="stage",
    )
    for step in range(6):
        close(seen["z"][step], recorded[f"batch{step}_z"], 1e-5 if step == 0 else 1e-4)
        close(seen["Ehat"][step], recorded[f"batch{step}_Ehat"], 1e-5 if step == 0 else 1e-3)
        for name, key in (("latent", "latent_loss"), ("reconstruction", "recon_loss"), ("loss", "total_loss")):
            close(losses[step][name], recorded[key][step], 1e-5)
    with torch.no_grad():
        generated = networks.decoder(torch.from_numpy(frame(recorded["generated_coord"])))
    close(generated, recorded["generated_expr"], 1e-3)
    for name, layer in layers(networks):
        for key, value in layer.state_dict().items():
            if f"final_{name}.{key}" in recorded:
                close(value, recorded[f"final_{name}.{key}"], 1e-3)
