"""Every kind of bad input, met through the public functions.

Each case damages a section and says which calls have to refuse it: with a typed error that is also the built-in one
callers expect, with a message that names what was found and what mends it, and with the section left as it was.
Finer cases of one function are tested beside it.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse

import hespotex as hx
from hespotex.errors import (
    AmbiguousKeyError,
    CheckpointError,
    CountsError,
    DataTypeError,
    DataValueError,
    GeometryError,
    HespotexError,
    HespotexWarning,
    ImageFormatError,
    MissingKeyError,
    ModelMismatchError,
    ScaleError,
)

from .conftest import fresh, stored

if TYPE_CHECKING:
    from spatialdata import SpatialData

N_GENES = 6
EMBEDDING = "X_morphology"

Call = Callable[[], Any]


@pytest.fixture(scope="module")
def _prepared() -> SpatialData:
    sdata = hx.datasets.synthetic(size_px=560, pitch_um=40.0, diameter_um=40.0, n_genes=24, seed=4)
    hx.pp.embed(sdata, "morphology")
    hx.pp.spatial_graph(sdata)
    return sdata


@pytest.fixture(scope="module")
def model(_prepared: SpatialData) -> hx.models.Model:
    return hx.tl.train(fresh(_prepared), "ridge", genes=genes_of(_prepared))


@pytest.fixture
def sdata(_prepared: SpatialData) -> SpatialData:
    """A small section with embedding and graph, to be damaged."""
    return fresh(_prepared)


@dataclass
class Bench:
    """What a case works with: a section to damage, a sound one, a model for both, an empty folder."""

    sdata: SpatialData
    model: hx.models.Model
    folder: Path

    def __post_init__(self) -> None:
        self.sound = fresh(self.sdata)
        self.sound.attrs["hespotex"] |= {"name": "sound", "patient": "somebody else"}

    @property
    def table(self) -> Any:
        return self.sdata["table"]

    @table.setter
    def table(self, table: Any) -> None:
        self.sdata["table"] = table

    def paint(self, pixels: np.ndarray) -> None:
        """Replace the image by `pixels` (c, y, x)."""
        from spatialdata.models import Image2DModel
        from spatialdata.transformations import get_transformation

        systems = get_transformation(self.sdata["image"], get_all=True)
        del self.sdata["image"]
        self.sdata["image"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=systems)

    def scale(self, x: float, y: float) -> None:
        """Set the µm per pixel of image and spots."""
        from spatialdata.transformations import Scale, set_transformation

        for name in ("image", "spots"):
            set_transformation(self.sdata[name], Scale([x, y], axes=("x", "y")), "microns")

    def reads_image(self) -> list[Call]:
        """Calls that read the image; the prediction has to embed it first."""
        if EMBEDDING in self.table.obsm:
            del self.table.obsm[EMBEDDING]
        return [
            lambda: hx.pp.embed(self.sdata),
            lambda: hx.pp.detect_tissue(self.sdata),
            lambda: hx.pp.segment_nuclei(self.sdata),
            lambda: hx.tl.predict(self.sdata, self.model),
        ]

    def reads_places(self) -> list[Call]:
        """Calls that need to know where each row of the table lies."""
        return [
            lambda: hx.pp.embed(self.sdata, key_added="X_again"),
            lambda: hx.pp.segment_nuclei(self.sdata),
            lambda: hx.tl.train(self.sdata, "mean", genes=genes_of(self.sdata)),
            lambda: hx.tl.predict(self.sdata, self.model),
        ]

    def reads_counts(self) -> list[Call]:
        """Calls that read the counts."""
        return [
            lambda: hx.tl.train(self.sdata, "mean", genes=genes_of(self.sdata)),
            lambda: hx.tl.train(self.sdata, "mean", n_top_genes=5),
            lambda: hx.tl.cross_validate([self.sound, self.sdata], "mean", n_top_genes=5),
            lambda: hx.pp.select_genes(self.sdata),
            lambda: hx.pp.normalize_counts(self.sdata),
        ]


def genes_of(sdata: SpatialData) -> list[str]:
    return [str(gene) for gene in sdata["table"].var_names[:N_GENES]]


@dataclass(frozen=True)
class Case:
    error: type[HespotexError]
    builtin: type[Exception]
    words: tuple[str, ...]
    damage: Callable[[Bench], list[Call] | Call]


CASES: dict[str, Case] = {}


def refused(name: str, error: type[HespotexError], builtin: type[Exception], *words: str) -> Callable[[Any], Any]:
    """Add a case: `damage` changes the section and returns the calls that must raise `error`, saying `words`."""

    def add(damage: Callable[[Bench], list[Call] | Call]) -> None:
        assert name not in CASES
        CASES[name] = Case(error, builtin, words, damage)

    return add


# -- images ------------------------------------------------------------------------------------------------------------


@refused("no image", MissingKeyError, KeyError, "no image", "sdata.images", "hx.io")
def _(bench: Bench) -> list[Call]:
    del bench.sdata["image"]
    return bench.reads_image()


@refused("several images", AmbiguousKeyError, KeyError, "several images", "image_key=", "'image'", "'second'")
def _(bench: Bench) -> list[Call]:
    bench.sdata["second"] = bench.sdata["image"].copy()
    return bench.reads_image()


@refused("grey image", ImageFormatError, ValueError, "'image'", "1 channel;", "3 (red, green, blue)")
def _(bench: Bench) -> list[Call]:
    bench.paint(np.full((1, 560, 560), 200, np.uint8))
    return bench.reads_image()


@refused("RGBA image", ImageFormatError, ValueError, "'image'", "4 channels", "image.isel(c=slice(0, 3))")
def _(bench: Bench) -> list[Call]:
    bench.paint(np.full((4, 560, 560), 200, np.uint8))
    return bench.reads_image()


@refused("float image", ImageFormatError, ValueError, "'image'", "float32", "uint8", "(image * 255)")
def _(bench: Bench) -> list[Call]:
    bench.paint(np.full((3, 560, 560), 0.5, np.float32))
    return bench.reads_image()


@refused("16-bit image", ImageFormatError, ValueError, "'image'", "uint16", "uint8", "(image // 257)")
def _(bench: Bench) -> list[Call]:
    bench.paint(np.full((3, 560, 560), 40_000, np.uint16))
    return bench.reads_image()


@refused("grey array for a reader", ImageFormatError, ValueError, "(560, 560)", "(height, width, 3)")
def _(bench: Bench) -> Call:
    return lambda: hx.io.from_anndata(bench.table, np.zeros((560, 560), np.uint8), mpp=0.5)


# -- scale -------------------------------------------------------------------------------------------------------------


@refused("mpp unknown", ScaleError, ValueError, "pixel size of image 'image' is unknown", "hx.pp.set_scale", "mpp=")
def _(bench: Bench) -> list[Call]:
    from spatialdata.transformations import Identity, set_transformation

    for name in ("image", "spots"):
        set_transformation(bench.sdata[name], {"global": Identity()}, set_all=True)
    bench.table.obs = bench.table.obs.drop(columns=["array_row", "array_col"])
    return [*bench.reads_image(), lambda: hx.pp.make_tiles(bench.sdata)]


@refused("mpp unknown to a reader", ScaleError, ValueError, "does not state its µm per pixel", "mpp=")
def _(bench: Bench) -> Call:
    from PIL import Image

    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(bench.folder / "slide.png")
    return lambda: hx.io.read_image(bench.folder / "slide.png")


@refused("x and y scale apart", ScaleError, ValueError, "0.6 µm/px", "0.5 along the other", "hx.pp.set_scale")
def _(bench: Bench) -> list[Call]:
    bench.scale(0.5, 0.6)
    return bench.reads_image()


@refused(
    "upsampling beyond twofold", ScaleError, ValueError, "0.5 µm/px", "5.0-fold", "2-fold", "0.25 µm/px or coarser"
)
def _(bench: Bench) -> list[Call]:
    return [
        lambda: hx.pp.embed(bench.sdata, mpp=0.1, key_added="X_fine"),
        lambda: hx.pp.segment_nuclei(bench.sdata, mpp=0.1),
    ]


# -- places ------------------------------------------------------------------------------------------------------------


@refused("spots outside the image", GeometryError, ValueError, "outside image 'image' (300 × 300 px)", "x=", "swapped")
def _(bench: Bench) -> list[Call]:
    bench.paint(np.full((3, 300, 300), 200, np.uint8))
    return bench.reads_places()[:2]


@refused("spots outside the image for a reader", GeometryError, ValueError, "outside the image of 300 x 300 px")
def _(bench: Bench) -> Call:
    bench.table.uns["spatial"] = {"a": {"scalefactors": {"spot_diameter_fullres": 80.0}}}
    return lambda: hx.io.from_anndata(bench.table, np.zeros((300, 300, 3), np.uint8), mpp=0.5)


@refused("unconnected coordinate system", GeometryError, ValueError, "'spots'", "'elsewhere'", "set_transformation")
def _(bench: Bench) -> list[Call]:
    from spatialdata.transformations import Identity, set_transformation

    set_transformation(bench.sdata["spots"], {"elsewhere": Identity()}, set_all=True)
    return bench.reads_places()


@refused("string ids against integer ids", GeometryError, ValueError, "str", "int", ".index.astype(str)")
def _(bench: Bench) -> list[Call]:
    bench.sdata["spots"] = bench.sdata["spots"].reset_index(drop=True)
    bench.table.obs["spot_id"] = [str(number) for number in range(bench.table.n_obs)]
    return [*bench.reads_places(), lambda: hx.pp.spatial_graph(bench.sdata)]


@refused("integer ids against string ids", GeometryError, ValueError, "str", "int", "astype(str)")
def _(bench: Bench) -> list[Call]:
    spots = bench.sdata["spots"]
    spots.index = [str(number) for number in range(len(spots))]
    bench.table.obs["spot_id"] = np.arange(bench.table.n_obs)
    return [*bench.reads_places(), lambda: hx.pp.spatial_graph(bench.sdata)]


# -- names -------------------------------------------------------------------------------------------------------------


@refused("duplicate ids of spots", GeometryError, ValueError, "'table'", "occurs twice")
def _(bench: Bench) -> list[Call]:
    bench.table.obs["spot_id"] = [bench.table.obs["spot_id"].iloc[0], *bench.table.obs["spot_id"].iloc[:-1]]
    return [*bench.reads_places(), lambda: hx.pp.spatial_graph(bench.sdata)]


@refused("duplicate ids of shapes", GeometryError, ValueError, "'spots' occur twice")
def _(bench: Bench) -> list[Call]:
    spots = bench.sdata["spots"]
    spots.index = [spots.index[0], *spots.index[:-1]]
    return [*bench.reads_places(), lambda: hx.pp.spatial_graph(bench.sdata)]


@refused("duplicate spot names", DataValueError, ValueError, "spot", "more than once", "obs_names_make_unique()")
def _(bench: Bench) -> list[Call]:
    bench.table.obs_names = [bench.table.obs_names[0], *bench.table.obs_names[:-1]]
    alone = bench.table
    return [
        *bench.reads_places()[2:],
        lambda: hx.tl.train(alone, "mean", genes=genes_of(bench.sdata)),
        lambda: hx.tl.predict(alone, bench.model),
        lambda: hx.io.from_anndata(alone, np.zeros((560, 560, 3), np.uint8), mpp=0.5),
    ]


@refused("duplicate gene names", DataValueError, ValueError, "gene", "more than once", "var_names_make_unique()")
def _(bench: Bench) -> list[Call]:
    bench.table.var_names = [*bench.table.var_names[:-1], bench.table.var_names[0]]
    return [
        *bench.reads_counts(),
        lambda: hx.tl.predict(bench.sdata, bench.model),
        lambda: hx.io.from_anndata(bench.table, np.zeros((560, 560, 3), np.uint8), mpp=0.5),
    ]


# -- counts ------------------------------------------------------------------------------------------------------------


def with_counts(bench: Bench, change: Callable[[np.ndarray], np.ndarray]) -> list[Call]:
    bench.table.X = sparse.csr_matrix(change(bench.table.X.toarray().astype(np.float64)))
    return bench.reads_counts()


@refused("negative counts", CountsError, ValueError, "negative", "raw counts are needed", "layer=")
def _(bench: Bench) -> list[Call]:
    return with_counts(bench, lambda counts: counts - counts.mean(axis=0))


@refused("NaN in counts", CountsError, ValueError, "values are NaN", "left out of the table, not filled")
def _(bench: Bench) -> list[Call]:
    return with_counts(bench, lambda counts: np.where(counts > 3, np.nan, counts))


@refused("already normalised counts", CountsError, ValueError, "not whole numbers", "already normalised", "layer=")
def _(bench: Bench) -> list[Call]:
    return with_counts(bench, np.log1p)


@refused("no counts at all", CountsError, ValueError, "X is empty")
def _(bench: Bench) -> list[Call]:
    bench.table.X = None
    return bench.reads_counts()


@refused("only spots without counts", DataValueError, ValueError, "none of its", "min_counts=1")
def _(bench: Bench) -> Call:
    bench.table.X = sparse.csr_matrix(bench.table.shape, dtype=np.float32)
    return lambda: hx.tl.train(bench.sdata, "mean", genes=genes_of(bench.sdata))


@refused("none of the genes measured", DataValueError, ValueError, "none of the genes")
def _(bench: Bench) -> Call:
    return lambda: hx.tl.train(bench.sdata, "mean", genes=["NOT_A_GENE"])


# -- few rows ----------------------------------------------------------------------------------------------------------


@refused("empty table", DataValueError, ValueError, "table 'table' has no observations")
def _(bench: Bench) -> list[Call]:
    import scanpy as sc

    sc.pp.filter_cells(bench.table, min_counts=10**9)  # SpatialData itself refuses an empty table, but not this
    return [
        *bench.reads_places(),
        *bench.reads_counts(),
        lambda: hx.pp.spatial_graph(bench.sdata),
    ]


@refused("fewer spots than neighbours", DataValueError, ValueError, "n_neighs=6", "5 observations", "lower it")
def _(bench: Bench) -> Call:
    bench.table = bench.table[[0, 3, 7, 12, 20]].copy()
    return lambda: hx.pp.spatial_graph(bench.sdata, kind="knn", n_neighs=6)


@refused("one spot", DataValueError, ValueError, "at least 2 observations", "there is 1")
def _(bench: Bench) -> Call:
    bench.table = bench.table[:1].copy()
    return lambda: hx.pp.spatial_graph(bench.sdata)


# -- nuclei ------------------------------------------------------------------------------------------------------------


@refused(
    "no nuclei on the image", DataValueError, ValueError, "no nuclei on image 'image'", "'watershed'", "diameter_um"
)
def _(bench: Bench) -> Call:
    bench.paint(np.full((3, 560, 560), 240, np.uint8))
    return lambda: hx.pp.segment_nuclei(bench.sdata)


@refused("no nuclei where a model needs them", DataValueError, ValueError, "n_nuclei", "hx.pp.segment_nuclei")
def _(bench: Bench) -> Call:
    return lambda: hx.tl.train(bench.sdata, "hespotex", preset="paper", genes=genes_of(bench.sdata))


# -- models ------------------------------------------------------------------------------------------------------------


@refused("a model for another encoder", ModelMismatchError, ValueError, EMBEDDING, "tile_um: 60.0 here", "in training")
def _(bench: Bench) -> Call:
    hx.pp.embed(bench.sdata, tile_um=60.0)
    return lambda: hx.tl.predict(bench.sdata, bench.model)


@refused("a model for another dimension", ModelMismatchError, ValueError, EMBEDDING, "3 features", "embed again")
def _(bench: Bench) -> list[Call]:
    bench.table.obsm[EMBEDDING] = np.ones((bench.table.n_obs, 3), np.float32)
    alone = bench.table
    return [lambda: hx.tl.predict(bench.sdata, bench.model), lambda: hx.tl.predict(alone, bench.model)]


@refused("no embedding on an AnnData", MissingKeyError, KeyError, EMBEDDING, "hx.pp.embed")
def _(bench: Bench) -> Call:
    del bench.table.obsm[EMBEDDING]
    return lambda: hx.tl.predict(bench.table, bench.model)


@refused("a file in place of a section", DataTypeError, TypeError, "SpatialData")
def _(bench: Bench) -> list[Call]:
    return [
        lambda: hx.tl.train("section.zarr"),
        lambda: hx.tl.predict("section.zarr", bench.model),
        lambda: hx.pp.embed("section.zarr"),
        lambda: hx.pp.spatial_graph("section.zarr"),
    ]


# -- saved models ------------------------------------------------------------------------------------------------------


def saved(bench: Bench) -> Path:
    return bench.model.save(bench.folder / "model.hx")


def opens(bench: Bench, path: Path) -> list[Call]:
    return [lambda: hx.models.load(path), lambda: hx.tl.predict(bench.sdata, path)]


@refused("truncated checkpoint", CheckpointError, ValueError, "model.safetensors", "altered or truncated")
def _(bench: Bench) -> list[Call]:
    path = saved(bench)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return opens(bench, path)


@refused("incomplete checkpoint", CheckpointError, ValueError, "lacks recipe.json")
def _(bench: Bench) -> list[Call]:
    path = saved(bench)
    (path / "recipe.json").unlink()
    return opens(bench, path)


@refused("altered checkpoint", CheckpointError, ValueError, "recipe.json", "altered or truncated")
def _(bench: Bench) -> list[Call]:
    path = saved(bench)
    file = path / "recipe.json"
    file.write_text(file.read_text().replace(bench.model.genes[0], "ANOTHER"))
    return opens(bench, path)


@refused("newer checkpoint", CheckpointError, ValueError, "format 99", "upgrade hespotex")
def _(bench: Bench) -> list[Call]:
    path = saved(bench)
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    return opens(bench, path)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


@refused("pickle", CheckpointError, ValueError, "is a file", "Pickled", "can run code")
def _(bench: Bench) -> list[Call]:
    path = bench.folder / "model.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    return opens(bench, path)


@pytest.mark.filterwarnings("ignore::hespotex.errors.HespotexWarning")  # what is left out, before nothing is left
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_refused_in_words_and_leaves_the_section_alone(
    case: Case, sdata: SpatialData, model: hx.models.Model, tmp_path: Path
) -> None:
    bench = Bench(sdata, model, tmp_path)
    calls = case.damage(bench)
    before = stored(sdata)
    for call in calls if isinstance(calls, list) else [calls]:
        with pytest.raises(case.error) as caught:
            call()
        assert isinstance(caught.value, HespotexError)
        assert isinstance(caught.value, case.builtin)
        for word in case.words:
            assert word in str(caught.value)
        assert stored(sdata) == before


@pytest.mark.parametrize("key", ["X my key", "a/b", "__x", "", "_index", 3])
def test_a_key_that_cannot_be_stored_is_refused_by_every_step(sdata: SpatialData, key: Any) -> None:
    before = stored(sdata)
    for call in (
        lambda: hx.pp.embed(sdata, key_added=key),
        lambda: hx.pp.detect_tissue(sdata, key_added=key),
        lambda: hx.pp.make_tiles(sdata, key_added=key),
        lambda: hx.pp.segment_nuclei(sdata, key_added=key),
        lambda: hx.pp.spatial_graph(sdata, key_added=key),
        lambda: hx.pp.select_genes(sdata, method="high_mean", key_added=key),
        lambda: hx.pp.normalize_counts(sdata, key_added=key),
    ):
        with pytest.raises((DataValueError, DataTypeError), match=r"^key_added"):
            call()
    assert stored(sdata) == before


@pytest.mark.parametrize("device", ["cuda:abc", "cuda:", "cpu:0", "gpu", ""])
def test_settings_refuse_a_device_that_cannot_be(device: str) -> None:
    with pytest.raises(DataValueError, match=r"settings\.device"):
        hx.settings.device = device


def test_empty_variables_of_the_environment_are_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from hespotex._settings import _FIELDS, Settings

    for name in _FIELDS:
        monkeypatch.setenv(f"HESPOTEX_{name.upper()}", "")
    settings = Settings()
    assert (settings.seed, settings.device, settings.default_model) == (0, "auto", None)
    monkeypatch.setenv("HESPOTEX_SEED", "3")
    assert Settings().seed == 3


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only some systems limit a process to some CPUs")
def test_threads_are_those_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from hespotex._settings import Settings

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert Settings().n_jobs == 3


# -- what is said, and goes on -----------------------------------------------------------------------------------------


def test_a_preview_is_warned_about(sdata: SpatialData) -> None:
    Bench.scale(bench := Bench(sdata, None, None), 3.0, 3.0)
    with pytest.warns(HespotexWarning, match=r"'image' has 3 µm/px.*preview.*full-resolution"):
        hx.pp.embed(sdata, mpp=3.0, key_added="X_coarse")
    assert np.isfinite(bench.table.obsm["X_coarse"]).all()


def test_the_preview_of_visium_in_place_of_the_image_is_warned_about(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obsm["spatial"] = table.obsm["spatial"] * 10  # as of an image of 5,600 px
    scales = {"tissue_lowres_scalef": 600 / 5600, "spot_diameter_fullres": 800.0}
    table.uns["spatial"] = {"a": {"scalefactors": scales}}
    before = stored(table)
    with pytest.warns(HespotexWarning, match=r"lowres preview.*pass the full-resolution image"):
        read = hx.io.from_anndata(table, np.full((600, 600, 3), 200, np.uint8), mpp=0.5)
    assert read["table"].obsm["spatial"].max() < 600
    assert stored(table) == before


def test_spots_without_counts_are_left_out_of_training_and_predicted(sdata: SpatialData) -> None:
    counts = sdata["table"].X.toarray()
    counts[3] = 0
    sdata["table"].X = sparse.csr_matrix(counts)
    with pytest.warns(HespotexWarning, match=rf"1 of {len(counts)} observations have fewer than 1 counts"):
        model = hx.tl.train(sdata, "ridge", genes=genes_of(sdata))
    assert model.recipe.training["sections"][0]["n_obs"] == len(counts) - 1
    hx.tl.predict(sdata, model)
    assert np.isfinite(sdata["table"].obsm["ridge"]).all()
    with pytest.warns(HespotexWarning, match=f"1 of {len(counts)} spots have no counts"):
        hx.pp.normalize_counts(sdata)


def test_genes_absent_from_a_section_are_listed_and_left_out_of_training(sdata: SpatialData) -> None:
    with pytest.warns(HespotexWarning, match=r"1 of 7 genes .* left out: NOT_A_GENE"):
        model = hx.tl.train(sdata, "mean", genes=[*genes_of(sdata), "NOT_A_GENE"])
    assert list(model.genes) == genes_of(sdata)


@pytest.mark.parametrize("kept", [slice(3, None), slice(N_GENES, None)], ids=["some", "all"])
def test_genes_the_section_never_measured_are_listed_and_predicted(
    sdata: SpatialData, model: hx.models.Model, kept: slice
) -> None:
    names = sdata["table"].var_names
    missing = [gene for gene in model.genes if gene not in names[kept]]
    sdata["table"] = sdata["table"][:, kept].copy()
    with pytest.warns(HespotexWarning, match=f"{len(missing)} of the model's {N_GENES} genes.*{', '.join(missing)}"):
        hx.tl.predict(sdata, model)
    result = hx.get.prediction(sdata, "ridge")
    assert list(result.var_names) == list(model.genes)
    assert list(result.var_names[~result.var["measured"]]) == missing


def test_one_spot_is_embedded_learnt_from_and_predicted(sdata: SpatialData, model: hx.models.Model) -> None:
    whole = hx.tl.predict(sdata, model, copy=True)
    sdata["table"] = sdata["table"][:1].copy()
    hx.pp.embed(sdata, key_added="X_again")
    np.testing.assert_allclose(hx.tl.predict(sdata, model, copy=True).X, whole.X[:1], rtol=1e-4)
    for name in ("mean", "ridge", "knn"):
        own = hx.tl.train(sdata, name, genes=genes_of(sdata), embedding_key=EMBEDDING)
        assert np.isfinite(hx.tl.predict(sdata, own, copy=True).X).all()


def test_a_few_spots_get_a_graph_of_their_own(sdata: SpatialData) -> None:
    for n_obs in (5, 3, 2):
        sdata["table"] = sdata["table"][:n_obs].copy()
        hx.pp.spatial_graph(sdata)
        assert (np.diff(sdata["table"].obsp["spatial_connectivities"].indptr) > 0).all()


# -- interruption ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_training_leaves_the_section_alone_and_the_same_call_goes_on(
    sdata: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    step, taken, stop_at = torch.optim.AdamW.step, [], 3

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    def train(folder: Path | None) -> hx.models.Model:
        config = {"epochs": 4, "n_members": 1, "width": 8, "head_width": 8, "n_layers": 1, "jk_hidden": 4}
        return hx.tl.train(sdata, "hespotex", config=config, genes=genes_of(sdata), checkpoint_dir=folder, device="cpu")

    before = stored(sdata)
    monkeypatch.setattr("hespotex.models._training._SAVE_EVERY", 0)  # epochs are too short here to be worth writing
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted in epoch 3; .*the same call goes on"):
        train(tmp_path / "states")
    assert stored(sdata) == before
    train(tmp_path / "states")
    assert len(taken) == 3 + 2  # epochs 3 and 4
    resumed = sdata.attrs["hespotex"]["model"]
    train(None)
    assert sdata.attrs["hespotex"]["model"] == resumed  # the identity hashes all that was fitted
