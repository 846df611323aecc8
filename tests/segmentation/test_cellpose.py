from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest

from hespotex.errors import MissingDependencyError, MissingWeightsError
from hespotex.segmentation import CellposeSegmenter
from hespotex.segmentation.cellpose import find_weights

from ._scenes import discs, f1, lattice


class Stub:
    """What hespotex uses of ``CellposeModel``."""

    def __init__(self, truth: np.ndarray) -> None:
        self.truth = truth
        self.seen: dict = {}

    def eval(self, image: np.ndarray, **options) -> tuple:
        self.seen = {"shape": image.shape, **options}
        return self.truth.astype(np.uint16), [], np.zeros(1)


def test_the_model_gets_rgb_and_a_diameter_and_its_masks_come_back() -> None:
    truth = np.eye(12, dtype=int)
    stub = Stub(truth)
    segmenter = CellposeSegmenter(stub, diameter_px=14.0, flow_threshold=0.8)
    labels = segmenter(np.zeros((12, 12, 3), np.uint8))
    assert np.array_equal(labels, truth)
    assert labels.dtype == np.int32
    assert stub.seen == {"shape": (12, 12, 3), "channel_axis": -1, "diameter": 14.0, "flow_threshold": 0.8}
    assert segmenter.halo_px == 56


def test_missing_weights_are_not_downloaded(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingWeightsError, match="absent"):
        CellposeSegmenter(tmp_path / "absent", diameter_px=10)
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
    with pytest.raises(MissingWeightsError, match="cpsam_v2"):
        find_weights()
    (tmp_path / "cpsam_v2").touch()
    assert find_weights() == tmp_path / "cpsam_v2"


def test_without_cellpose_the_extra_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cellpose.models", None)
    (tmp_path / "weights").touch()
    with pytest.raises(MissingDependencyError, match=r"hespotex\[cellpose\]"):
        CellposeSegmenter(tmp_path / "weights", diameter_px=10)


def test_the_installed_version_takes_what_is_passed() -> None:
    models = pytest.importorskip("cellpose.models")
    stub = Stub(np.zeros((4, 4), int))
    CellposeSegmenter(stub, diameter_px=8.0)(np.zeros((4, 4, 3), np.uint8))
    assert set(stub.seen) - {"shape"} <= set(inspect.signature(models.CellposeModel.eval).parameters)
    assert {"gpu", "pretrained_model", "device"} <= set(inspect.signature(models.CellposeModel).parameters)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_masks_survive_a_round_trip_through_the_installed_dynamics() -> None:
    """The masks step of the installed version on perfect flows: what ``eval`` does behind the network."""
    dynamics = pytest.importorskip("cellpose.dynamics")
    import torch

    _, truth = discs((160, 160), lattice((160, 160), 26), 8)
    flows = dynamics.labels_to_flows([truth], device=torch.device("cpu"))[0]
    masks = dynamics.resize_and_compute_masks(
        5 * flows[2:4], np.where(truth > 0, 6.0, -6.0), device=torch.device("cpu")
    )
    assert f1(truth, np.asarray(masks).astype(int), 0.9) == 1.0
