from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hespotex.models import Run
from hespotex.models.hespotex.config import PAPER
from hespotex.models.hespotex.expression import spot_embeddings
from hespotex.models.nn import gate as gate_module
from hespotex.models.nn.gate import GATE, NeighbourhoodAttention

DTYPES = [torch.float32, torch.float64]


def loaded(recorded, dtype=torch.float32, tying="shared"):
    """The autoencoder with recorded weights, its input and its edges."""
    model = GATE(recorded["X"].shape[1], tying=tying).to(dtype)
    for name, key in (("w1", "W1"), ("w2", "W2"), ("a_source", "a_src"), ("a_target", "a_dst")):
        getattr(model, name).data = torch.tensor(recorded[key]).to(dtype)
    return model, torch.tensor(recorded["X"]).to(dtype), torch.tensor(recorded["edges"])


def error(ours, theirs):
    return np.abs(ours.detach().numpy() - theirs).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", ["gate_forward", "gate_directed"])
def test_forward_equals_the_published(golden, file, dtype):
    recorded = golden(file)
    model, x, edges = loaded(recorded, dtype)
    z, x_hat = model(x, edges)
    h1, alpha = model.encode_hidden(x, edges)
    exact = dtype == torch.float64 and "z_f64" in recorded
    suffix, tolerance = ("_f64", 1e-12) if exact else ("", 1e-5)
    assert error(z, recorded[f"z{suffix}"]) < tolerance
    assert error(x_hat, recorded[f"X_hat{suffix}"]) < tolerance
    assert error(alpha, recorded[f"alpha{suffix}"]) < (1e-14 if exact else 1e-6)
    assert error(h1, recorded["h1"]) < 1e-5
    projected, h3 = x @ model.w1, torch.nn.functional.elu(model.attend(z @ model.w2.T, edges, alpha))
    for name, vector in (("s", model.a_source), ("t", model.a_target)):
        assert error(projected @ vector, recorded[f"{name}{suffix}"]) < tolerance
    assert error(h3, recorded["h3"]) < 1e-5
    loss = torch.nn.functional.mse_loss(x_hat, x)
    assert float(loss.detach()) == pytest.approx(float(recorded[f"loss{suffix}"]), abs=tolerance)


def test_checklist_01_widths_one_head_no_bias_no_dropout():
    model = GATE(33)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {"w1": (33, 512), "a_source": (512,), "a_target": (512,), "w2": (512, 64)}
    x, edges = torch.randn(5, 33), torch.arange(5).repeat(2, 1)
    z, x_hat = model.train()(x, edges)
    assert z.shape == (5, 64)
    assert x_hat.shape == (5, 33)
    torch.testing.assert_close(model.eval()(x, edges)[1], x_hat)
    assert sum(p.numel() for p in GATE(2468).parameters()) == 1_297_408


def test_checklist_02_embedding_is_linear_in_the_elu_output(golden):
    recorded = golden("gate_forward")
    model, x, edges = loaded(recorded, torch.float64)
    h1, _ = model.encode_hidden(x, edges)
    assert (h1 > -1).all()  # ELU
    torch.testing.assert_close(model.encode(x, edges), h1 @ model.w2)
    z, x_hat = model(x, edges)
    model.w2.data *= 2.0  # z doubles, and with it what the decoder starts from quadruples
    torch.testing.assert_close(model(x, edges)[0], 2 * z)
    assert not torch.allclose(model(x, edges)[1], x_hat)


def test_checklist_03_sigmoid_before_the_softmax_bounds_the_weights(golden):
    edges = torch.tensor([[0, 1, 0], [0, 0, 1]])
    scores = torch.tensor([0.0, float("inf")])
    weights = NeighbourhoodAttention.weights(scores, torch.zeros(2), edges)
    assert weights[:2].tolist() == pytest.approx([0.3775, 0.6225], abs=1e-4)
    recorded = golden("gate_forward")
    model, x, edges = loaded(recorded)
    alpha, target = model.encode_hidden(100 * x, edges)[1].detach(), edges[1]
    for node in range(len(x)):
        own = alpha[target == node]
        assert float(own.sum()) == pytest.approx(1, abs=1e-5)
        assert float(own.max() / own.min()) <= np.e + 1e-4


def test_checklist_04_decoder_reuses_scores_and_transposed_weights(golden):
    recorded = golden("gate_forward")
    assert np.array_equal(recorded["alpha"], recorded["alpha_decoder"])
    model, x, edges = loaded(recorded, torch.float64)
    z, x_hat = model(x, edges)
    _, alpha = model.encode_hidden(x, edges)
    by_hand = torch.zeros(len(x), len(x), dtype=torch.float64)
    by_hand[edges[1], edges[0]] = alpha
    h3 = torch.nn.functional.elu(by_hand @ (z @ model.w2.T))
    torch.testing.assert_close(x_hat, h3 @ model.w1.T)


def test_attention_runs_from_source_to_target():
    model = GATE(3).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    edges = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]])  # 1 receives from 0; 0 and 2 from themselves
    before = model.encode(x, edges)
    x[0] += 1
    after = model.encode(x, edges)
    assert not torch.allclose(before[1], after[1])
    torch.testing.assert_close(before[2], after[2])
    x[1] += 1
    torch.testing.assert_close(model.encode(x, edges)[0], after[0])


def test_aggregation_in_blocks_of_columns_changes_neither_values_nor_gradients(golden, monkeypatch):
    recorded = golden("gate_gradients")
    results = []
    for limit in (2**24, 7 * 298):
        monkeypatch.setattr(gate_module, "_MESSAGES", limit)
        model, x, edges = loaded({**golden("gate_forward")}, torch.float64)
        loss = torch.nn.functional.mse_loss(model(x, edges)[1], x)
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in model.parameters())))
        with torch.no_grad():
            torch.testing.assert_close(torch.nn.functional.mse_loss(model(x, edges)[1], x), loss.detach())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert float(results[0][0]) == pytest.approx(float(recorded["loss_f64"]), abs=1e-12)


def test_shared_gradients_are_the_sum_of_both_uses(golden):
    recorded, start = golden("gate_gradients"), golden("gate_forward")
    model, x, edges = loaded(start, torch.float64)
    torch.nn.functional.mse_loss(model(x, edges)[1], x).backward()
    assert float(model.w1.grad.norm()) == pytest.approx(float(recorded["grad_W1_norm_f64"]), rel=1e-12)
    assert float(model.w2.grad.norm()) == pytest.approx(float(recorded["grad_W2_norm_f64"]), rel=1e-12)
    for ours, name in ((model.w1, "grad_W1"), (model.w2, "grad_W2")):
        assert error(ours.grad, recorded[name]) < 1e-5 * np.abs(recorded[name]).max()
    assert error(model.a_source.grad, recorded["grad_a_src_f64"]) < 1e-12
    assert error(model.a_target.grad, recorded["grad_a_dst_f64"]) < 1e-12


def test_legacy_gradients_are_kept_apart(golden):
    recorded, start = golden("gate_gradients"), golden("gate_forward")
    model, x, edges = loaded(start, torch.float64, "legacy")
    torch.nn.functional.mse_loss(model(x, edges)[1], x).backward()
    for name, encoder, decoder in (("W1", model.w1, model.w1_decoder), ("W2", model.w2, model.w2_decoder)):
        for use, gradient in (("encoder", encoder.grad), ("decoder", decoder.grad)):
            expected = float(recorded[f"grad_{name}_{use}_use_norm_f64"])
            assert float(gradient.norm()) == pytest.approx(expected, rel=1e-12)
        total, own = recorded[f"grad_{name}"], recorded[f"grad_{name}_encoder_use"]
        assert error(encoder.grad, own) < 1e-5 * np.abs(total).max()
        assert error(decoder.grad.T, total - own) < 1e-5 * np.abs(total).max()


def trained(golden, monkeypatch, steps, dtype=torch.float32, **options):
    """The recorded start after some steps of the expression stream, its embedding, the fit, norms before clipping."""
    model, x, edges = loaded(golden("gate_forward"), dtype, options.get("gate_tying", PAPER.gate_tying))
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def recording(*args, **kwargs):
        norms.append(float(norm := clip(*args, **kwargs)))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    config = replace(PAPER, gate_epochs=steps, **options)
    run = Run(device="cpu", precision="32-true" if dtype == torch.float32 else "64-true")
    (embedding,), fit = spot_embeddings(config, [(x, edges)], run, gate=model)
    return model, embedding, fit, norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("tying", "options"),
    [("legacy", {}), ("shared", {"gate_tying": "shared"}), ("shared", {"gate_tying": "shared", "gate_order": "joint"})],
    ids=["paper", "shared", "shared and joint"],
)
def test_checklist_06_optimiser_steps_equal_the_recorded(golden, monkeypatch, tying, options, steps, dtype):
    recorded = golden(f"gate_adam_{tying}")
    model, embedding, fit, norms = trained(golden, monkeypatch, steps, dtype, **options)
    suffix, tolerance = ("_f64", 1e-10) if dtype == torch.float64 else ("", 2e-4)
    # The history keeps losses, before each step, as float32.
    before = recorded[f"loss_before_each_step{suffix}"][:steps]
    np.testing.assert_allclose([row["loss"] for row in fit.history], before, rtol=1e-6, atol=max(tolerance, 1e-6))
    np.testing.assert_allclose(norms, recorded[f"grad_norm_before_clip{suffix}"][:steps], rtol=max(tolerance, 1e-9))
    _, x, edges = loaded(golden("gate_forward"), dtype)
    with torch.no_grad():
        z, x_hat = model(x, edges)
    loss = torch.nn.functional.mse_loss(x_hat, x)
    assert torch.equal(z, embedding)
    assert error(z, recorded[f"z_step{steps}{suffix}"]) < tolerance
    assert error(x_hat, recorded[f"X_hat_step{steps}{suffix}"]) < tolerance
    assert float(loss) == pytest.approx(float(recorded[f"loss_after_step{steps}{suffix}"]), abs=tolerance)
    for name, key in (("w1", "W1"), ("w2", "W2"), ("a_source", "a_src"), ("a_target", "a_dst")):
        assert error(getattr(model, name), recorded[f"{key}_step{steps}"]) < 2e-4


def test_one_step_moves_tied_weights_twice_or_not_at_all(golden, monkeypatch):
    start = torch.tensor(golden("gate_forward")["W1"])
    for tying, expected in (("legacy", (0.0, 2e-3)), ("shared", (1e-3,))):
        model = trained(golden, monkeypatch, 1, gate_tying=tying)[0]
        moved = (model.w1.detach() - start).abs().flatten()
        nearest = torch.stack([(moved - step).abs() for step in expected]).min(dim=0).values
        assert float((nearest < 1e-4).float().mean()) > 0.95


def test_legacy_memory_is_joined_again_after_a_copy(golden):
    model, x, edges = loaded(golden("gate_forward"), tying="legacy")
    model(x, edges)
    assert model.w1_decoder.data_ptr() == model.w1.data_ptr()
    moved = model.double()  # as a move to a device does, this separates the two
    moved(x.double(), edges)
    assert moved.w1_decoder.data_ptr() == moved.w1.data_ptr()
