from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("side", "middle"), [(4, slice(1, 3)), (5, slice(1, 4)), (2, slice(0, 2)), (3, slice(0, 3))])
@pytest.mark.parametrize("n_prefix", [1, 5])
def test_tokens_are_pooled_without_registers(side, middle, n_prefix):
    from hespotex.encoders._pooling import pool

    grid = torch.randn(2, side, side, 3)
    prefix = torch.randn(2, n_prefix, 3)
    tokens = torch.cat([prefix, grid.flatten(1, 2)], 1)
    class_token, mean, centre = prefix[:, 0], grid.mean((1, 2)), grid[:, middle, middle].mean((1, 2))
    expected = {
        "class": class_token,
        "mean": mean,
        "class+mean": torch.cat([class_token, mean], 1),
        "class+centre": torch.cat([class_token, centre], 1),
    }
    for how, values in expected.items():
        np.testing.assert_allclose(pool(tokens, n_prefix, how).numpy(), values.numpy(), atol=1e-6)
