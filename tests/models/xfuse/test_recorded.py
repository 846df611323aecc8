"""The model against numbers recorded from the published package."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hespotex.data.shares import disc_shares
from hespotex.models.xfuse.baselines import fit_start
from hespotex.models.xfuse.likelihood import nb_log_prob, nb_mean, total_counts
from hespotex.models.xfuse.metagenes import Change
from hespotex.models.xfuse.network import Network, centre_crop, inverse_softplus
from hespotex.models.xfuse.objective import Noise
from hespotex.models.xfuse.slides import Colours

pytestmark = pytest.mark.data


def close(ours, recorded, tolerance=1e-5):
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    np.testing.assert_allclose(ours, recorded, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("file", ["forward_eval", "forward_train"])
def test_forward(recorded, model, patch, tools, file):
    r = recorded(file)
    model.train(file == "forward_train")
    if file == "forward_eval":
        for level, y in enumerate(model.network.features(patch.image[None])):
            close(y, r[f"y{level}"])
    posterior = model.network.encode(patch.image[None])
    for level, (mean, sd) in enumerate(posterior):
        close(mean, r[f"guide.z_{level}.loc"])
        close(sd, r[f"guide.z_{level}.sd"])
    noise = tools.noise(r, model, patch)
    drawn = model.draw([patch], noise, tools.sizes)
    if file == "forward_eval":
        close(model.network.decode([torch.from_numpy(r[f"guide.z_{i}.value"]) for i in range(3)]), r["d"], 2e-5)
    close(drawn.scale, r["model.a.value"], 2e-5)
    close(torch.softmax(drawn.logits, 1), r["model.pi.value"], 2e-5)
    close(drawn.profiles, r["model.r_mg.value"])

    order = np.roll(np.arange(11), 1)  # the background is last with us, first in the recording
    weighted = (drawn.scale * torch.softmax(drawn.logits, 1))[0].flatten(1).T
    log_rates, logits = model.rates(drawn.profiles, drawn.effects[0])
    size = total_counts(patch.bags.sum(weighted[patch.bags.part]), log_rates)
    close(size[order], r["model.R_plus_1e-8"], 1e-4)
    close(logits.expand(11, 7), r["model.lambda_bg"])
    assert patch.counts[order].tolist() == r["model.x_sg.x"].tolist()
    close(nb_log_prob(patch.counts, size, logits)[order], r["model.x_sg.log_prob"], 1e-4)
    close(nb_mean(size, logits)[order], r["model.x_sg.mean"], 1e-4)
    close((nb_mean(size, logits) * (1 + logits.exp()))[order], r["model.x_sg.variance"], 1e-4)

    counts = model.counts_term([patch], drawn)[0]
    close(counts, r["model.x_sg.log_prob_sum"], 1e-5)
    close(drawn.image, r["model.image.log_prob_sum"], 1e-5)
    latent = sum(r[f"model.z_{i}.log_prob_sum"] - r[f"guide.z_{i}.log_prob_sum"] for i in range(3))
    close(drawn.latent, latent, 1e-5)
    profile = [r[f"model.r_{m}.log_prob_sum"] - r[f"guide.r_{m}.log_prob_sum"] for m in (1, 2)]
    close(drawn.profile_terms, np.array(profile), 1e-4)
    effect = sum((r[f"model.effect_{w}.log_prob_sum"] - r[f"guide.effect_{w}.log_prob_sum"]) for w in ("rho", "lambda"))
    close(drawn.effect, effect, 1e-4)
    assert float(model.bound([patch], noise, tools.sizes)["elbo"].detach()) == pytest.approx(float(r["ELBO"]), abs=1e-2)


def test_statistics_after_a_pass_in_training_mode(recorded, model, patch, tools):
    after = recorded("running_after_train_pass")
    model.train()
    with torch.no_grad():
        model.draw([patch], model.noise([patch]), tools.sizes)
    state = {tools.name(name): value for name, value in model.state_dict().items()}
    compared = [name for name in after.files if "running_mean" in name and name.startswith(("enc", "z_"))]
    assert len(compared) > 10
    for name in compared:  # those behind the draws differ with them
        close(state[name], after[name])


def test_gradients(recorded, model, patch, tools):
    r = recorded("gradient")
    values = recorded("parameters")
    model.train()
    noise = Noise(
        [torch.from_numpy(r[f"guide.z_{i}.eps"]) for i in range(3)],
        torch.from_numpy(np.stack([r["guide.r_1.eps"], r["guide.r_2.eps"]])),
        {0: torch.from_numpy(np.stack([r["guide.effect_rho.eps"], r["guide.effect_lambda.eps"]]))},
    )
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("tracked")}
    loss = -model.bound([patch], noise, tools.sizes)["elbo"]
    assert float(loss.detach()) == pytest.approx(float(r["minus_ELBO"]), abs=1e-2)
    loss.backward()

    recorded_gradients = {name.removeprefix("grad."): r[name] for name in r.files if name.startswith("grad.")}
    compared = 0
    for name, parameter in model.named_parameters():
        known = tools.name(name)
        if known is not None:
            expected = recorded_gradients.get(known)
            if known.endswith("bias") and known.replace("bias", "weight") in values:
                module, position, _ = known.rsplit(".", 2)
                if f"{module}.{int(position) + 1}.running_mean" in values:
                    continue  # before a batch norm: rounding noise
        else:
            expected = None
            if name.split(".")[-1] not in {"2", "3"}:
                expected = tools.of_globals(name, recorded_gradients)
        if expected is None:
            continue
        scale = np.abs(expected).max()
        np.testing.assert_allclose(parameter.grad.numpy(), expected, atol=2e-4 * scale, rtol=1e-4, err_msg=name)
        compared += 1
    assert compared > 80

    for name, count in before.items():
        recorded_count = r[f"batches_tracked_increase.{tools.name(name)}"]
        assert int(dict(model.named_buffers())[name] - count) == int(recorded_count), name
    for module in ("enc_block_0.1", "enc_in.1"):
        ours = next(b for n, b in model.named_buffers() if tools.name(n) == f"{module}.running_mean")
        close(ours, r[f"running_after.{module}.running_mean"])


def test_metagene_test(recorded, model, patch, tools):
    r = recorded("metagene_test")
    with torch.no_grad():
        ours = model.bound_without_each([patch], tools.noise(r, model, patch), tools.sizes)
    np.testing.assert_allclose(ours.numpy(), r["scores_full_then_without_each"], atol=1e-2)


def test_split(recorded, model):
    r = recorded("split")
    model.metagenes.apply_change(Change(copies=[(0, 2)]))
    with torch.no_grad():
        d = model.network.decode([torch.from_numpy(r[f"guide.z_{i}.value"]) for i in range(3)])
        activity = torch.softmax(model.metagenes.logits(model.network.activity_features(d)), dim=1)[0]
    close(activity, r["pi"])
    for slot in range(3):
        close(model.metagenes.mean[slot], r[f"mu_r_{slot + 1}"], 0)


def test_start(recorded, recorded_slide):
    r = recorded("forward_eval")
    start = fit_start([r["counts"][1:].astype(np.float64)] * 3, background=True)
    assert start.scale == pytest.approx(float(r["init_scale_s0"][0]), abs=1e-3)
    close(np.exp(start.log_rate), r["init_rate"], 1e-3)
    close(start.logits, r["init_logits"], 1e-3)

    image = torch.from_numpy(r["image"])
    network = Network(3, 4, "batch")
    network.start_at(image.mean(dim=(1, 2)), image.std(dim=(1, 2)), start.scale / float(r["spot_size_A"]))
    network.eval()
    with torch.no_grad():
        d = torch.randn(1, 4, 37, 42)
        mu, sd = network.image(d)
        scale = network.scale(d)
    close(mu[0], r["init_img_mu"])
    close(sd[0], r["init_img_sd"])
    close(scale[0, 0], r["init_scale_map"], 1e-4)


def test_spot_size(recorded, patch):
    sizes = patch.bags.size()
    assert float(sizes.mean()) == pytest.approx(float(recorded("forward_eval")["spot_size_A"]))


def test_pure_parts(recorded):
    r = recorded("pure")
    close(inverse_softplus(torch.from_numpy(r["isoftplus_in"])), r["isoftplus_out"])
    for size in ((8, 9), (7, 10)):
        cropped = centre_crop(torch.from_numpy(r["crop_in"]), size)
        assert cropped.tolist() == r[f"crop_{size[0]}x{size[1]}"].tolist()


def test_painted_discs_are_the_cells_mostly_under_a_spot(recorded):
    import shapely

    r = recorded("pure")
    height, width = r["paint_label"].shape
    row, column = np.divmod(np.arange(height * width), width)
    squares = shapely.box(column - 0.5, row - 0.5, column + 0.5, row + 0.5)
    x, y, radius = r["paint_spots"].T
    share = disc_shares(np.round(np.column_stack([x, y])), radius, squares, 1.0).toarray()
    painted = np.array([(r["paint_label"].ravel() == spot + 1) for spot in range(len(x))])
    assert (share[painted] > 0.5).all()
    assert np.abs(painted - share).sum(axis=1).max() < 0.35 * share[0].sum()


def test_colours_of_a_converted_image_fill_the_same_range(recorded):
    converted = recorded("pure")["convert_image_out"].transpose(2, 0, 1)
    assert converted.min(axis=(1, 2)) == pytest.approx([-0.9] * 3)
    assert converted.max(axis=(1, 2)) == pytest.approx([0.9] * 3)
    close(Colours()(converted), converted)
