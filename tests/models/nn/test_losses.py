from __future__ import annotations

import numpy as np
import pytest
import torch

from hespotex.models.nn.losses import alignment_loss, pearson

GROUPS = ["random", "identical", "negated", "affine", "constant", "nan_prone", "large_offset", "two_spots", "one_spot"]


@pytest.mark.parametrize("group", GROUPS)
def test_equals_the_published_wherever_that_is_finite(golden, group):
    recorded = golden("pearson")
    for dtype, suffix, tolerance in ((torch.float32, "", 2e-6), (torch.float64, "_f64", 1e-12)):
        target = torch.tensor(recorded[f"{group}_target"]).to(dtype)
        prediction = torch.tensor(recorded[f"{group}_pred"]).to(dtype)
        for axis, name in ((1, "spot"), (0, "gene")):
            ours = pearson(target, prediction, dim=axis).numpy()
            theirs = recorded[f"{group}_r_per_{name}{suffix}"]
            assert np.isfinite(ours).all()
            assert (np.abs(ours) <= 1 + 1e-6).all()
            # float32 underflow and the rounding of constants: the published value is noise, ours is the true one
            usable = np.isfinite(theirs)
            if suffix == "" and group == "nan_prone":
                usable &= np.abs(theirs - recorded[f"{group}_r_per_{name}_f64"]) < 1e-3
            np.testing.assert_allclose(ours[usable], theirs[usable], atol=tolerance)


@pytest.mark.parametrize("group", GROUPS)
def test_gradients_equal_the_published_and_are_never_nan(golden, group):
    recorded = golden("pearson")
    prediction = torch.tensor(recorded[f"{group}_pred"]).requires_grad_()
    for axis, name in ((1, "spot"), (0, "gene")):
        loss = 1 - pearson(torch.tensor(recorded[f"{group}_target"]), prediction, dim=axis).mean()
        (gradient,) = torch.autograd.grad(loss, prediction)
        assert torch.isfinite(gradient).all()
        theirs = recorded[f"{group}_grad_pred_{name}"]
        if group not in {"constant", "nan_prone"} and np.isfinite(theirs).all():
            np.testing.assert_allclose(gradient.numpy(), theirs, atol=1e-6 * max(1.0, np.abs(theirs).max()))


def test_checklist_18_worked_values():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(6, 64, generator=rng)
    slope, level = torch.rand(6, 1, generator=rng) + 0.1, torch.randn(6, 1, generator=rng)
    assert float(alignment_loss(z, z)) == pytest.approx(0, abs=1e-6)
    assert float(alignment_loss(z, -z)) == pytest.approx(2, abs=1e-6)
    assert float(alignment_loss(z, slope * z + level)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-30, 12345.678])
def test_a_constant_side_scores_zero_without_gradient(value):
    target = torch.full((2, 64), value)
    prediction = torch.randn(2, 64, requires_grad=True)
    loss = alignment_loss(target, prediction)
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert not prediction.grad.any()


def test_values_so_close_that_squares_underflow_still_correlate():
    x = torch.linspace(0, 1, 64)[None] * 1e-25
    assert float(pearson(x, 3 * x, dim=1)) == pytest.approx(1, abs=1e-5)
