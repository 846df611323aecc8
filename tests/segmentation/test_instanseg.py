from __future__ import annotations

import pickle
from importlib.util import find_spec

import numpy as np
import pytest

from hespotex.errors import DataValueError, MissingKeyError, MissingWeightsError
from hespotex.segmentation import LazyslideSegmenter

from ._scenes import discs, f1, lattice

torch = pytest.importorskip("torch")

SHAPE = (200, 260)
pytestmark = [
    pytest.mark.skipif(find_spec("lazyslide_models") is None, reason="lazyslide-models is not installed"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # the file is made with it
]


class Darkness(torch.nn.Module):
    """Numbers the squares of 40 px whose middle holds something dark: the interface of InstanSeg's TorchScript."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        y = torch.arange(height).unsqueeze(1) // 40
        x = torch.arange(width).unsqueeze(0) // 40
        return ((image[:, 0] < 0.6).to(torch.float32) * (y * 1000 + x + 1)).unsqueeze(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("weights") / "instanseg.pt"
    torch.jit.script(Darkness()).save(str(path))
    return path


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    centres = np.stack(np.meshgrid(np.arange(60, 240, 40), np.arange(20, 200, 40)), axis=-1).reshape(-1, 2)
    return discs(SHAPE, centres, radius=9)


def test_weights_of_a_file_segment_through_lazyslides_own_transform(weights, scene) -> None:
    image, truth = scene
    segmenter = LazyslideSegmenter("instanseg", weights, diameter_px=16.0, device="cpu")
    labels = segmenter(image)
    assert labels.shape == SHAPE
    assert f1(truth, labels, 0.9) == 1.0
    assert segmenter.halo_px == 64
    assert segmenter.block_px == 512 - 128


def test_a_segmenter_travels_without_its_network_and_does_the_same(weights, scene) -> None:
    segmenter = LazyslideSegmenter("instanseg", weights, diameter_px=16.0, device="cpu")
    data = pickle.dumps(segmenter)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert again.block_px == segmenter.block_px
    assert np.array_equal(again(scene[0]), segmenter(scene[0]))


def test_weights_that_are_not_there_are_named(tmp_path) -> None:
    with pytest.raises(MissingWeightsError, match=r"absent\.pt"):
        LazyslideSegmenter("instanseg", tmp_path / "absent.pt", diameter_px=16)
    with pytest.raises(MissingWeightsError, match=r"instanseg_v0_1_0\.pt.*model='<file>'"):
        LazyslideSegmenter("instanseg", diameter_px=16)
    with pytest.raises(MissingWeightsError, match="lazyslide:histoplus"):
        LazyslideSegmenter("histoplus", diameter_px=16)


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(DataValueError, match="TorchScript"):
        LazyslideSegmenter("instanseg", tmp_path / "state.pt", diameter_px=16)
    with pytest.raises(DataValueError, match="takes no file"):
        LazyslideSegmenter("nulite", tmp_path / "state.pt", diameter_px=16)


def test_names_are_those_of_the_registry() -> None:
    with pytest.raises(MissingKeyError, match="lazyslide:nulite"):
        LazyslideSegmenter("nulit", diameter_px=16)


def test_a_segmenter_of_pixel_classes_finds_no_nuclei() -> None:
    from lazyslide_models import SegmentationOutput

    class Classes:
        def get_transform(self) -> None:
            return None

        def segment(self, image: torch.Tensor) -> SegmentationOutput:
            return SegmentationOutput(probability_map=torch.zeros(1, 2, *image.shape[1:3]))

    segmenter = LazyslideSegmenter("hest", Classes(), diameter_px=16.0, device="cpu")
    with pytest.raises(DataValueError, match="no nuclei"):
        segmenter(np.zeros((30, 30, 3), np.uint8))


def test_a_network_that_takes_plain_pixels_gets_them() -> None:
    from lazyslide_models import SegmentationOutput

    class Plain:
        seen: tuple = ()

        def get_transform(self) -> None:
            return None

        def segment(self, image: torch.Tensor) -> SegmentationOutput:
            self.seen = tuple(image.shape), image.dtype
            return SegmentationOutput(instance_map=(image[..., 0] < 100).numpy().astype(np.uint16))

    network = Plain()
    image, truth = discs((100, 120), lattice((100, 120), 90), 9)
    labels = LazyslideSegmenter("mine", network, diameter_px=16.0, device="cpu")(image)
    assert network.seen == ((1, 512, 512, 3), torch.uint8)
    assert np.array_equal(labels > 0, image[..., 0] < 100)
