"""Numbers recorded from the published TESLA program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tesla_dir(data_dir: Path) -> Path:
    """Folder of the recorded numbers."""
    folder = data_dir / "golden" / "tesla"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/tesla")
    return folder


@pytest.fixture(scope="session")
def tesla(tesla_dir: Path) -> Callable[[str], Any]:
    """Reader of a file: ``tesla("refine")["wide"]``."""
    return lambda name: np.load(tesla_dir / f"{name}.npz")


@pytest.fixture(scope="session")
def tesla_image(tesla_dir: Path) -> np.ndarray:
    """The image, RGB."""
    from PIL import Image

    return np.asarray(Image.open(tesla_dir / "image_bgr.png").convert("RGB"))
