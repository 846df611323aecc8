"""The recorded slide, and our model with the recorded parameters."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.models.xfuse.baselines import Start
from hespotex.models.xfuse.metagenes import Metagenes
from hespotex.models.xfuse.network import Network
from hespotex.models.xfuse.objective import Generative, Noise
from hespotex.models.xfuse.slides import Raster, Slide, View, take

LEVEL_SIZES = (2, 1)  # patches of covariate level a and b in the recorded data set


@pytest.fixture(scope="session")
def recorded(data_dir):
    """Reader of the numbers recorded from the published package."""
    folder = data_dir / "golden" / "xfuse"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/xfuse")
    return lambda name: np.load(folder / f"{name}.npz")


def recorded_name(name):
    """What the recording calls one of our parameters or buffers; ``None`` for globals and bookkeeping."""
    if match := re.fullmatch(r"metagenes\.(weight|bias)\.(\d)", name):
        return f"activity_{int(match[2]) + 1}.0.{match[1]}"
    if not name.startswith("network."):
        return None
    name = name.removeprefix("network.")
    name = re.sub(r"^enc_down\.(\d)", lambda m: f"enc_down_{int(m[1]) + 1}", name)
    name = re.sub(r"^z_(mean|sd)\.(\d)", r"z_\2_\1", name)
    return re.sub(r"^(enc_block|dec_block|dec_up|dec_combine)\.(\d)", r"\1_\2", name)


def recorded_global(name, values):
    """One of our global parameters from recorded arrays (unconstrained), or ``None``."""
    if match := re.fullmatch(r"metagenes\.(mean|log_sd)\.(\d)", name):
        which = f"{'mu' if match[1] == 'mean' else 's'}_r_{int(match[2]) + 1}"
        return values[which]
    plain = {"baselines.rho": "rho_g", "baselines.logits": "lambda_g", "baselines.log_tau": "tau_g"}
    if name in plain:
        return values[plain[name]]
    stacked = {
        "baselines.effect_mean": "mu_effect_",
        "baselines.effect_log_sd": "s_effect_",
        "baselines.effect_log_width": "prior_sd_effect_",
    }
    if name in stacked:
        return np.stack([values[stacked[name] + which] for which in ("rho", "lambda")])
    return None


def _positive(name):
    return "log_" in name


@pytest.fixture
def model(recorded):
    """Depth 3, width 4, two metagenes, two sections, with the recorded parameters, in evaluation mode."""
    values = recorded("parameters")
    network = Network(3, 4, "batch", checkpoints=True)
    start = Start(1.0, np.zeros(7, np.float32), np.zeros(7, np.float32))
    generative = Generative(network, Metagenes(4, 4, 7, 2), start, n_levels=2)
    state = generative.state_dict()
    for name in state:
        if (known := recorded_name(name)) is not None and known in values:
            state[name] = torch.from_numpy(values[known])
        elif not re.search(r"\.(2|3)(\.|$)", name) and (array := recorded_global(name, values)) is not None:
            state[name] = torch.from_numpy(np.log(array) if _positive(name) else array)
    generative.load_state_dict(state)
    return generative.eval()


@pytest.fixture
def recorded_slide(recorded):
    """The recorded slide: every pixel is a cell, except those of the background."""
    r = recorded("forward_eval")
    label = r["label"]
    row, column = np.nonzero(label != 1)
    raster = Raster(r["image"], row, column)
    spot = label[row, column]
    cell = np.flatnonzero(spot > 1)
    share = sparse.csr_array((np.ones(len(cell)), (spot[cell] - 2, cell)), shape=(11, len(row)))
    return Slide.of(raster, share, r["counts"][1:].astype(np.float64))


@pytest.fixture
def patch(recorded_slide):
    """All of the recorded slide; its labels in our order, the background last."""
    size = recorded_slide.raster.shape
    return take(recorded_slide, View(np.eye(2), (np.array(size) - 1) / 2, size))


def noise_of(r, model, patch):
    """The noise behind recorded draws."""
    with torch.no_grad():
        posterior = model.network.encode(patch.image[None])
        z = [(torch.from_numpy(r[f"guide.z_{i}.value"]) - mean) / sd for i, (mean, sd) in enumerate(posterior)]
        mean, sd = model.metagenes.profiles()
        profiles = (torch.from_numpy(np.stack([r["guide.r_1.value"], r["guide.r_2.value"]])) - mean) / sd
        centre, width = model.baselines.effects(0)
        drawn = torch.from_numpy(np.stack([r["guide.effect_rho.value"], r["guide.effect_lambda.value"]]))
        return Noise(z, profiles, {0: (drawn - centre) / width})


@pytest.fixture(scope="session")
def tools():
    """What tests of recorded numbers share."""

    class Tools:
        noise = staticmethod(noise_of)
        name = staticmethod(recorded_name)
        of_globals = staticmethod(recorded_global)
        sizes = LEVEL_SIZES

    return Tools
