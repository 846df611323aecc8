"""The named encoders against what is known of their weights files: names and shapes of all tensors, without the weights.

``data/manifest.json`` was written from published facts alone, which it states for each encoder, and not from the networks
that are built here. Where third parties counted the parameters of the published files, the shapes add up to these counts.
"""

from __future__ import annotations

import math

import pytest

import hespotex as hx
from hespotex.encoders._published import PUBLISHED
from hespotex.errors import CheckpointError

from .conftest import MANIFEST, tensors

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

NO_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked")  # buffers
NAMED = [
    "conch",
    "gigapath",
    "h-optimus-0",
    "h-optimus-1",
    "h0-mini",
    "midnight-12k",
    "phikon-v2",
    "quiltnet",
    "resnet50",
    "uni",
    "uni2-h",
    "virchow",
    "virchow2",
]


def on_meta(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in tensors(name).items()}


def load(name: str, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The network of a published encoder, on the meta device, with the tensors of a file."""
    from hespotex.encoders._weights import load_into
    from hespotex.encoders.pretrained import build, module_names

    record = PUBLISHED[name]
    module = build(record, tile_px=record.tile_px, pooling=record.pooling)
    load_into(module, module_names(record, state, module, record.tile_px), repr(name), assign=True)
    return module


def test_all_named_encoders_are_there_and_in_the_manifest():
    assert set(MANIFEST) == set(NAMED) == {*PUBLISHED, "quiltnet"}
    assert set(NAMED) <= set(hx.encoders.available().index)
    assert all(len(entry["source"]) > 30 for entry in MANIFEST.values())


@pytest.mark.parametrize("name", NAMED)
def test_shapes_add_up_to_the_published_number_of_parameters(name):
    count = sum(
        math.prod(shape)
        for key, shape in tensors(name).items()
        if not key.endswith(NO_PARAMETERS) and not key.startswith("fc.")  # of a classifier, which nobody counts
    )
    published = MANIFEST[name]["parameters"]
    # Of H0-mini only "85.7 million" is known.
    assert count == (pytest.approx(published, rel=1e-3) if name == "h0-mini" else published)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_tensor_of_the_file_has_its_place_in_the_network(name):
    module = load(name, on_meta(name))
    assert module.n_features == PUBLISHED[name].n_features == hx.encoders.available().loc[name, "n_features"]


def test_the_image_tower_of_quiltnet_has_its_place():
    tower = open_clip.create_model("ViT-B-32", pretrained=None, device="meta").visual
    own = {
        key.removeprefix("visual."): shape for key, shape in tensors("quiltnet").items() if key.startswith("visual.")
    }
    assert {key: tuple(value.shape) for key, value in tower.state_dict().items()} == own


@pytest.mark.parametrize("name", ["uni", "midnight-12k", "conch", "resnet50"])
def test_a_file_of_another_size_is_refused_by_the_name_of_what_does_not_fit(name):
    norm = {"resnet50": "bn1.weight", "conch": "visual.ln_contrast.weight", "midnight-12k": "layernorm.weight"}
    key = norm.get(name, "norm.weight")
    short = key.removeprefix("visual.").replace("layernorm", "norm")
    state = on_meta(name)
    state[key] = torch.empty(7, device="meta")
    with pytest.raises(CheckpointError, match=rf"size mismatch for .*{short}.*\[7\]"):
        load(name, state)
    del state[key]
    with pytest.raises(CheckpointError, match=rf"Missing key.*{short}"):
        load(name, state)
    with pytest.raises(CheckpointError, match=r"Unexpected key.*other\.weight"):
        load(name, on_meta(name) | {"visual.other.weight": torch.empty(1, device="meta")})


def test_positions_of_another_grid_than_the_file_s_are_not_bent_to_fit():
    state = on_meta("uni")
    state["pos_embed"] = torch.empty(1, 1 + 16**2, 1024, device="meta")
    with pytest.raises(CheckpointError, match=r"size mismatch for backbone.pos_embed"):
        load("uni", state)
    state = on_meta("midnight-12k")
    del state["encoder.layer.3.attention.attention.key.bias"]
    with pytest.raises(CheckpointError, match=r"no key to make 'blocks.3.attn.qkv.bias'"):
        load("midnight-12k", state)
