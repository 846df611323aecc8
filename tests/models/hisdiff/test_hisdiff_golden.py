"""The parts of HisDiff and Stem against numbers recorded from the released modules."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hespotex.models.hisdiff.config import PAPER, STEM
from hespotex.models.hisdiff.diffusion import (
    Schedule,
    _Deterministic,
    denoising_terms,
    discrete_log_likelihood,
    normal_cdf,
    normal_kl,
    sample,
    spaced,
)
from hespotex.models.hisdiff.network import Context, Denoiser, TimeEmbedding

pytestmark = pytest.mark.data

CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def recorded(data_dir):
    folder = data_dir / "golden" / "hisdiff"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/hisdiff")

    def read(name):
        if name.endswith(".json"):
            return json.loads((folder / name).read_text())
        with np.load(folder / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    return read


def tensor(array):
    return torch.from_numpy(np.array(array))


def rows(array):
    """(n, 1, G) as recorded to (n, G)."""
    return tensor(array)[:, 0]


def loaded(network, numbers):
    """The network with the recorded weights."""
    names = {
        "cond1": "condition.hidden",
        "cond2": "condition.out",
        "time1": "time.hidden",
        "time2": "time.out",
        "tok1": "value_hidden",
        "tok2": "value_out",
        "final_ada": "last_modulation",
        "final": "last",
    }
    parts = {"ada": "modulation", "qkv": "qkv", "proj": "projection", "fc1": "expand", "fc2": "contract"}
    for block in range(len(network.blocks)):
        names |= {f"blk{block}_{short}": f"blocks.{block}.{name}" for short, name in parts.items()}
    weights = {"gene": tensor(numbers["gene_vec"])}
    for short, name in names.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = (
            tensor(numbers[f"{short}_W"]),
            tensor(numbers[f"{short}_b"]),
        )
    if "mha1_Wqkv" in numbers:
        for short, name in (("mha1", "condition.near"), ("mha2", "condition.wide")):
            weights[f"{name}.in_proj_weight"] = tensor(numbers[f"{short}_Wqkv"])
            weights[f"{name}.in_proj_bias"] = tensor(numbers[f"{short}_bqkv"])
            weights[f"{name}.out_proj.weight"] = tensor(numbers[f"{short}_Wo"])
            weights[f"{name}.out_proj.bias"] = tensor(numbers[f"{short}_bo"])
    network.load_state_dict(weights)
    return network.eval()


def tiny(config, numbers):
    return loaded(Denoiser(6, 64, replace(config, depth=2, width=48)), numbers)


def context_of(numbers):
    return Context(tensor(numbers["local"]), tensor(numbers["neighbour"]), tensor(numbers["global_"]))


def test_schedule(recorded):
    numbers, schedule = recorded("schedule"), Schedule.linear()
    left = schedule.alphas_cumprod
    found = {
        "betas": schedule.betas,
        "alphas_cumprod": left,
        "alphas_cumprod_prev": schedule.alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(left),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - left),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / left),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / left - 1),
        "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_log_variance,
        "posterior_mean_coef1": schedule.posterior_mean_clean,
        "posterior_mean_coef2": schedule.posterior_mean_noisy,
        "betas_after_respace_1000": schedule.respaced(1000).betas,
    }
    assert found.keys() == numbers.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, numbers[name], rtol=1e-12, err_msg=name)


def test_respacing(recorded):
    numbers, schedule = recorded("respacing"), Schedule.linear()
    kept = {str(steps): spaced(1000, steps) for steps in (1000, 250, 100, 50, 20, 5)}
    sections = [(10, 0, 334), (15, 334, 333), (20, 667, 333)]
    kept["10_15_20"] = np.concatenate([start + spaced(size, steps) for steps, start, size in sections])
    kept |= {"ddim50": np.arange(0, 1000, 20), "ddim25": np.arange(0, 1000, 40)}
    for name, times in kept.items():
        respaced = schedule.keeping(times)
        np.testing.assert_array_equal(respaced.times, numbers[f"map_{name}"])
        np.testing.assert_allclose(respaced.betas, numbers[f"betas_{name}"], rtol=1e-12)
    for steps in (50, 5):
        respaced = schedule.respaced(steps)
        for name, values in {
            "posterior_variance": respaced.posterior_variance,
            "posterior_log_variance_clipped": respaced.posterior_log_variance,
            "posterior_mean_coef1": respaced.posterior_mean_clean,
            "posterior_mean_coef2": respaced.posterior_mean_noisy,
        }.items():
            np.testing.assert_allclose(values, numbers[f"{name}_{steps}"], rtol=1e-12)


def test_noisy_values_and_posterior(recorded):
    numbers, schedule = recorded("q_sample"), Schedule.linear()
    tables, step = schedule.tables(), tensor(numbers["t"])
    clean, noise, noisy = rows(numbers["x0"]), rows(numbers["eps"]), rows(numbers["x_t"])
    np.testing.assert_allclose(tables.noisy(clean, noise, step), noisy, **CLOSE)
    np.testing.assert_allclose(tables.signal[step] * clean, rows(numbers["q_mean"]), **CLOSE)
    np.testing.assert_allclose((tables.noise[step] ** 2).expand(-1, 6), rows(numbers["q_variance"]), **CLOSE)
    np.testing.assert_allclose((2 * tables.noise[step].log()).expand(-1, 6), rows(numbers["q_log_variance"]), **CLOSE)
    np.testing.assert_allclose(tables.posterior_mean(clean, noisy, step), rows(numbers["posterior_mean"]), **CLOSE)
    np.testing.assert_allclose(
        tables.log_variance[step].expand(-1, 6), rows(numbers["posterior_log_variance"]), **CLOSE
    )
    variance = schedule.posterior_variance[numbers["t"]]
    np.testing.assert_allclose(np.repeat(variance[:, None], 6, axis=1), numbers["posterior_variance"][:, 0], **CLOSE)


def test_learned_variance(recorded):
    numbers, tables = recorded("learned_range"), Schedule.linear().tables()
    step, noisy = tensor(numbers["t"]), rows(numbers["x_t"])
    log_variance = tables.learned_log_variance(rows(numbers["v"]), step)
    clean = tables.clean(noisy, rows(numbers["eps_hat"]), step)
    np.testing.assert_allclose(log_variance, rows(numbers["log_variance"]), **CLOSE)
    np.testing.assert_allclose(log_variance.exp(), rows(numbers["variance"]), **CLOSE)
    np.testing.assert_allclose(clean, rows(numbers["pred_x0"]), **CLOSE)
    np.testing.assert_allclose(tables.posterior_mean(clean, noisy, step), rows(numbers["mean"]), **CLOSE)


def test_loss_and_its_gradients(recorded):
    numbers, tables = recorded("loss_terms"), Schedule.linear().tables()
    estimate, value = rows(numbers["eps_hat"]).requires_grad_(), rows(numbers["v"]).requires_grad_()
    step = tensor(numbers["t"])
    squared, bits = denoising_terms(
        tables,
        rows(numbers["x0"]),
        rows(numbers["x_t"]),
        rows(numbers["eps"]),
        step,
        estimate,
        value,
        "discrete",
    )
    assert (step == 0).any()
    assert (step > 0).any()
    np.testing.assert_allclose(squared.detach(), numbers["mse"], **CLOSE)
    np.testing.assert_allclose(bits.detach(), numbers["vb"], **CLOSE)
    np.testing.assert_allclose(bits.detach(), numbers["vb_direct"], **CLOSE)
    np.testing.assert_allclose((squared + bits).detach(), numbers["loss"], **CLOSE)
    (squared + bits).sum().backward()
    np.testing.assert_allclose(estimate.grad, rows(numbers["grad_eps_hat"]), **CLOSE)
    np.testing.assert_allclose(value.grad, rows(numbers["grad_v"]), **CLOSE)


def test_parts_of_the_loss(recorded):
    numbers = {name: tensor(values) for name, values in recorded("loss_terms").items()}
    found = discrete_log_likelihood(numbers["dl_x"], numbers["dl_mean"], numbers["dl_log_scale"])
    np.testing.assert_allclose(found, numbers["dl_log_prob"], **CLOSE)
    kl = normal_kl(numbers["kl_mean1"], numbers["kl_logvar1"], numbers["kl_mean2"], numbers["kl_logvar2"])
    np.testing.assert_allclose(kl, numbers["kl"], **CLOSE)
    np.testing.assert_allclose(normal_cdf(numbers["cdf_x"]), numbers["cdf"], **CLOSE)


@torch.no_grad()
def test_network_and_all_that_is_inside(recorded):
    numbers = recorded("dit_hisdiff")
    network = tiny(PAPER, numbers)
    context, x, time = context_of(numbers), rows(numbers["x_t"]), tensor(numbers["t"])
    _, near, wide = network.condition.attend(context)
    np.testing.assert_allclose(near, numbers["y1"], **CLOSE)
    np.testing.assert_allclose(wide, numbers["y2"], **CLOSE)
    condition = network.condition(context)
    np.testing.assert_allclose(condition, numbers["y"], **CLOSE)
    np.testing.assert_allclose(TimeEmbedding.sinusoid(time), numbers["sinusoid"], **CLOSE)
    np.testing.assert_allclose(network.time(time), numbers["time"], **CLOSE)
    steering = network.time(time) + condition
    np.testing.assert_allclose(steering, numbers["c"], **CLOSE)
    tokens = network.tokens(x)
    np.testing.assert_allclose(tokens, numbers["tokens"], **CLOSE)
    outputs = {}
    for number, block in enumerate(network.blocks):
        for name in ("attention", "mlp"):
            original = getattr(block, name)

            def spy(values, original=original, key=(number, name)):
                outputs[key] = original(values)
                return outputs[key]

            setattr(block, name, spy)
        tokens = block(tokens, steering)
        np.testing.assert_allclose(outputs[number, "attention"], numbers[f"block{number}_attn"], **CLOSE)
        np.testing.assert_allclose(outputs[number, "mlp"], numbers[f"block{number}_mlp"], **CLOSE)
        np.testing.assert_allclose(tokens, numbers[f"block{number}"], **CLOSE)
    np.testing.assert_allclose(network(x, time, context), numbers["out"], **CLOSE)


@torch.no_grad()
def test_network_of_stem(recorded):
    numbers = recorded("dit_stem")
    network, context = tiny(STEM, numbers), Context(tensor(numbers["y_in"]))
    np.testing.assert_allclose(network.condition(context), numbers["y"], **CLOSE)
    np.testing.assert_allclose(network(rows(numbers["x_t"]), tensor(numbers["t"]), context), numbers["out"], **CLOSE)


def test_training_steps(recorded):
    numbers, weights, tables = recorded("training_step"), recorded("dit_hisdiff"), Schedule.linear().tables()
    network, context = tiny(PAPER, weights).train(), context_of(weights)
    clean, noise, step = rows(numbers["x0"]), rows(numbers["eps"]), tensor(numbers["t"])
    noisy = tables.noisy(clean, noise, step)

    def terms():
        output = network(noisy, step, context)
        return denoising_terms(tables, clean, noisy, noise, step, output[:, 0], output[:, 1], "discrete")

    squared, bits = terms()
    np.testing.assert_allclose(squared.detach(), numbers["mse"], **CLOSE)
    np.testing.assert_allclose(bits.detach(), numbers["vb"], **CLOSE)
    (squared + bits).mean().backward()
    for name, parameter in {
        "mha1_Wqkv": network.condition.near.in_proj_weight,
        "cond2_W": network.condition.out.weight,
        "gene_vec": network.gene,
        "blk0_ada_W": network.blocks[0].modulation.weight,
        "final_W": network.last.weight,
    }.items():
        np.testing.assert_allclose(parameter.grad, numbers[f"grad_{name}"], rtol=1e-4, atol=1e-5, err_msg=name)
    optimiser = torch.optim.AdamW(network.parameters(), lr=PAPER.lr, weight_decay=PAPER.weight_decay)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = sum(terms()).mean()
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
    np.testing.assert_allclose(losses, numbers["loss_4_adamw_steps"], rtol=1e-5)


def denoiser_of(recorded):
    weights = recorded("dit_hisdiff")
    network = tiny(PAPER, weights)
    with torch.no_grad():
        sight = network.look(context_of(weights))

    @torch.no_grad()
    def predict(x, time):
        output = network.denoise(x, torch.full((len(x),), time), sight)
        return output[:, 0], output[:, 1]

    return predict


def close_to_largest(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_single_steps_of_both_samplers(recorded):
    numbers, predict, tables = recorded("sampling"), denoiser_of(recorded), Schedule.linear().tables()
    x, noise = rows(numbers["x_t"]), rows(numbers["noise"])
    for time in numbers["t_list"].tolist():
        estimate, value = predict(x, time)
        clean = tables.clean(x, estimate, time)
        mean = tables.posterior_mean(clean, x, time)
        log_variance = tables.learned_log_variance(value, time)
        stepped = mean + (time > 0) * torch.exp(0.5 * log_variance) * noise
        for name, values in {
            "pred_x0": clean,
            "mean": mean,
            "log_variance": log_variance,
            "variance": log_variance.exp(),
            "sample": stepped,
        }.items():
            close_to_largest(values, numbers[f"t{time}_{name}"][:, 0])
        step = _Deterministic(Schedule.linear(), tables, lambda: None)
        close_to_largest(step(x, estimate, value, time), numbers[f"t{time}_ddim_eta0"][:, 0])


@pytest.mark.parametrize("steps", [5, 20])
def test_sampling_loops(recorded, steps):
    numbers, predict = recorded("sampling"), denoiser_of(recorded)
    schedule, start = Schedule.linear().respaced(steps), rows(numbers[f"loop{steps}_z"])
    visited, noise = [], iter(numbers[f"loop{steps}_noise"])

    def watched(x, time):
        visited.append(x)
        return predict(x, time)

    end = sample(schedule, watched, start, lambda: rows(next(noise)), "ddpm")
    assert next(noise, None) is None
    assert len(visited) == steps == numbers[f"loop{steps}_noise_calls"]
    close_to_largest(np.stack([*visited[1:], end]), numbers[f"loop{steps}_trajectory"][:, :, 0])
    deterministic = sample(schedule, predict, start, lambda: None, "ddim")
    close_to_largest(deterministic, numbers[f"loop{steps}_ddim_eta0"][:, 0])


def unstored(place, shape, scale):
    """The arrays that are given by a rule."""
    mask = (1 << 64) - 1
    size = int(np.prod(shape))
    with np.errstate(over="ignore"):
        h = (np.arange(1, size + 1, dtype=np.uint64) + np.uint64((place << 32) & mask)) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(31)
    share = ((h >> np.uint64(40)).astype(np.float64) + 0.5) / 2**24
    return ((2 * share - 1) * scale).astype(np.float32).reshape(shape)


@torch.no_grad()
def test_the_true_size(recorded):
    numbers, listed = recorded("paper_size"), recorded("paper_size_arrays.json")
    np.testing.assert_array_equal(unstored(0, (8,), 1.0), numbers["first_values"])
    arrays = {name: unstored(place, shape, scale) for place, name, shape, scale in listed["arrays"]}
    network = Denoiser(10, 1024, PAPER).eval()
    assert sum(p.numel() for p in network.parameters()) == numbers["n_parameters"] == 42_451_202 + 384 * 10
    loaded(network, arrays)
    near = tensor(arrays["neighbour"])
    wide = torch.cat([near, tensor(arrays["global, rows 9 to 48"])], dim=1)
    context, time, x = Context(near[:, 0], near, wide), tensor(numbers["t"]), rows(arrays["x_t"])
    condition = network.condition(context)
    np.testing.assert_allclose(condition, numbers["y"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(network.time(time), numbers["time"], **CLOSE)
    tokens = network.tokens(x)
    for number, block in enumerate(network.blocks):
        tokens = block(tokens, network.time(time) + condition)
        if number in (0, 11):
            expected = numbers[f"block{number}"]
            np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    found = network(x, time, context)
    np.testing.assert_allclose(found, numbers["out"], rtol=1e-4, atol=1e-5 * np.abs(numbers["out"]).max())
