"""Shared fixtures: no network, no user folders, real data where it is, one small synthetic section."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hespotex as hx
from hespotex._optional import ensure_torchvision

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which hespotex itself does not do
os.environ["MPLBACKEND"] = "Agg"
ensure_torchvision()

_DATA = Path(os.environ.get("HESPOTEX_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails at once, unless it is marked so; processes of this machine may talk."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"tests may not use the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches go to a temporary folder, shared by the tests of one process."""
    with hx.settings.override(cache_dir=tmp_path_factory.mktemp("cache"), progress_bar=False):
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, also where the tests were started in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def cluster(_own_cache: None) -> Iterator[Any]:
    """Client of a dask cluster of two processes on this machine."""
    distributed = pytest.importorskip("distributed")
    import dask

    quiet = {
        "distributed.worker.daemon": False,
        "distributed.admin.event-loop": "asyncio",
        "logging.distributed": "error",
    }
    with (
        dask.config.set(quiet),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1", memory_limit=0
        ) as workers,
        distributed.Client(workers, set_as_default=False) as client,
    ):
        yield client


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


@pytest.fixture(scope="session")
def plain_section() -> Any:
    """Maker of small sections for tests of geometry and streaming: noise with known pixels, spots at known places.

    ``make(pixels=None, *, scale_factors=None, mpp=0.5, to_global=None, centres=None, radius=20, ids=None, chunks=None,
    table=True, extra_systems=...)`` returns a SpatialData with ``image``, ``spots`` and ``table``; `to_global` is
    applied to image and spots alike.
    """
    import anndata as ad
    import numpy as np
    import pandas as pd
    import spatialdata as sd
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale, Sequence

    def make(
        pixels: Any = None,
        *,
        scale_factors: list[int] | None = None,
        mpp: float | None = 0.5,
        to_global: Any = None,
        centres: Any = None,
        radius: float = 20.0,
        ids: Any = None,
        chunks: int | None = None,
        table: bool = True,
    ) -> sd.SpatialData:
        rng = np.random.default_rng(0)
        if pixels is None:
            pixels = rng.integers(0, 255, (3, 600, 500), dtype=np.uint8)
        to_global = to_global or Identity()
        systems = {"global": to_global}
        if mpp is not None:
            systems["microns"] = Sequence([to_global, Scale([mpp, mpp], axes=("x", "y"))])
        image = Image2DModel.parse(
            pixels,
            dims=("c", "y", "x"),
            scale_factors=scale_factors,
            chunks=chunks,
            transformations=dict(systems),
        )
        height, width = pixels.shape[1:]
        if centres is None:
            centres = rng.uniform([60, 60], [width - 60, height - 60], (12, 2))
        centres = np.asarray(centres, dtype=float)
        ids = [f"s{i}" for i in range(len(centres))] if ids is None else list(ids)
        spots = ShapesModel.parse(
            centres, geometry=0, radius=radius, index=pd.Index(ids), transformations=dict(systems)
        )
        tables = {}
        if table:
            order = rng.permutation(len(ids))  # tables and shapes need not agree in order
            names = [ids[i] for i in order]
            obs = pd.DataFrame({"region": pd.Categorical(["spots"] * len(ids)), "spot_id": names})
            obs.index = pd.Index([f"obs_{name}" for name in names])
            adata = ad.AnnData(rng.poisson(2, (len(ids), 5)).astype(np.float32), obs=obs)
            adata.obsm["spatial"] = centres[order]
            tables["table"] = TableModel.parse(adata, region="spots", region_key="region", instance_key="spot_id")
        return sd.SpatialData(images={"image": image}, shapes={"spots": spots}, tables=tables)

    return make


@pytest.fixture(scope="session")
def golden(data_dir: Path) -> Callable[[str], Any]:
    """Reader of the numbers recorded from the published HESpotEx modules: ``golden("graphs")["random_xy"]``."""
    import numpy as np

    folder = data_dir / "golden" / "hespotex"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/hespotex")
    return lambda name: np.load(folder / f"{name}.npz")


@pytest.fixture(scope="session")
def tesla_dir(data_dir: Path) -> Path:
    """Folder of the recorded numbers."""
    folder = data_dir / "golden" / "tesla"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/tesla")
    return folder


@pytest.fixture(scope="session")
def tesla(tesla_dir: Path) -> Callable[[str], Any]:
    """Reader of the numbers recorded from the published TESLA program: ``tesla("refine")["wide"]``."""
    import numpy as np

    return lambda name: np.load(tesla_dir / f"{name}.npz")


@pytest.fixture(scope="session")
def tesla_image(tesla_dir: Path) -> Any:
    """The image, RGB."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(tesla_dir / "image_bgr.png").convert("RGB"))


@pytest.fixture(scope="session")
def _small_section() -> SpatialData:
    return hx.datasets.synthetic(size_px=800, pitch_um=40.0, diameter_um=40.0, n_genes=60, seed=2)


@pytest.fixture
def section(_small_section: SpatialData) -> SpatialData:
    """A synthetic section: 800 x 800 px at 0.5 µm/px, 69 spots on a hexagonal lattice, 60 genes; free to be changed."""
    return fresh(_small_section)


@pytest.fixture(scope="session")
def _small_patients() -> list[SpatialData]:
    return hx.datasets.synthetic(n_patients=3, size_px=800, pitch_um=40.0, diameter_um=40.0, n_genes=60, seed=3)


@pytest.fixture
def patients(_small_patients: list[SpatialData]) -> list[SpatialData]:
    """One section each of three synthetic patients, as `section`; free to be changed."""
    return [fresh(sdata) for sdata in _small_patients]


def fresh(sdata: SpatialData) -> SpatialData:
    """A copy that shares the pixels of the image and nothing else."""
    from copy import deepcopy

    from spatialdata import SpatialData

    return SpatialData(
        images={key: image.copy() for key, image in sdata.images.items()},
        points=dict(sdata.points.items()),
        shapes={key: shapes.copy() for key, shapes in sdata.shapes.items()},
        tables={key: table.copy() for key, table in sdata.tables.items()},
        attrs=deepcopy(sdata.attrs),
    )


def stored(data: SpatialData | AnnData) -> dict[tuple[str, ...], str]:
    """Digest of everything an object holds, by place: equal before and after a call that leaves it alone.

    Elements count as what SpatialData keeps of them; an image by the name of its lazy pixels and its transformations.
    """
    from anndata import AnnData
    from spatialdata.transformations import get_transformation

    if isinstance(data, AnnData):
        return _stored_in_table(data)
    found = {("attrs", key): _digest(value) for key, value in data.attrs.get("hespotex", {}).items()}
    for name, table in data.tables.items():
        found |= {(name, *place): digest for place, digest in _stored_in_table(table).items()}
    for kind, name, element in data.gen_spatial_elements():
        found["element", name] = _digest([kind, str(get_transformation(element, get_all=True)), _values(element)])
    return found


def _stored_in_table(table: AnnData) -> dict[tuple[str, ...], str]:
    found = {("X",): _digest(table.X), ("names",): _digest([*table.obs_names, *table.var_names])}
    for slot in ("obs", "var", "obsm", "obsp", "layers", "uns"):
        held = getattr(table, slot)
        found |= {(slot, key): _digest(held[key]) for key in held if key not in (None, "hespotex")}
    return found | {("uns", key): _digest(value) for key, value in table.uns.get("hespotex", {}).items()}


def _values(element: Any) -> Any:
    if hasattr(element, "to_wkb"):
        return element.to_wkb()
    first = next(iter(element["scale0"].values())) if hasattr(element, "children") else element
    return str(getattr(first, "data", first).name) if hasattr(first, "data") else str(first.shape)


def _digest(value: Any) -> str:
    import joblib
    from scipy import sparse

    if sparse.issparse(value):
        value = [value.shape, *(getattr(value.tocoo(), part) for part in ("row", "col", "data"))]
    return str(joblib.hash(value))
