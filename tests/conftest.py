"""Shared fixtures: no network, no user folders, real data where it is, one small synthetic section."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hespotex as hx
from hespotex._optional import ensure_torchvision

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which hespotex itself does not do
os.environ["MPLBACKEND"] = "Agg"
ensure_torchvision()

_DATA = Path(os.environ.get("HESPOTEX_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails at once, unless it is marked so."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None):
            raise OSError(f"tests may not use the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches go to a temporary folder, shared by the tests of one process."""
    with hx.settings.override(cache_dir=tmp_path_factory.mktemp("cache"), progress_bar=False):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real sections."""
    if not _DATA.is_dir():
        pytest.skip(f"real data is not there: set HESPOTEX_DATA, or place it in {_DATA}")
    return _DATA


@pytest.fixture(scope="session")
def her2st_dir(data_dir: Path) -> Path:
    """Folder of the her2st sections."""
    folder = data_dir / "her2st"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no her2st")
    return folder
