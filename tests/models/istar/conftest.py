"""Numbers recorded from the published iStar scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def istar(data_dir) -> Callable[[str], Any]:
    """Reader of the recorded numbers: ``istar("spots")["counts"]``."""
    folder = data_dir / "golden" / "istar"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/istar")
    return lambda name: np.load(folder / f"{name}.npz")
