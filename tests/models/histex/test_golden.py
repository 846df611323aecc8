"""Equality with numbers recorded from the published modules."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.section import Parts, Section, Targets
from hespotex.models import Run
from hespotex.models._base import _mark
from hespotex.models._training import fit_lightning
from hespotex.models.histex.config import PAPER, HistexConfig
from hespotex.models.histex.context import Places, staggered_index, staggered_lattice
from hespotex.models.histex.inputs import Batch, Shape
from hespotex.models.histex.model import Histex, _step, spot_loss
from hespotex.models.histex.network import CrossAttention, OriginalNetwork, elu_output
from hespotex.models.histex.scale import Scale, min_max
from hespotex.models.histex.windows import N_EXTRA, Cells, block_centre, disc_mask

pytestmark = pytest.mark.data
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
MICRONS = 0.5  # per pixel of the recorded positions


def raster_section(channels, xy=None, n_genes=2):
    """A section that is a full raster of cells with the given channels (h, w, c), colour and position among them."""
    h, w, c = channels.shape
    grid = np.indices((h, w)).reshape(2, -1).T
    xy = np.array([[28.0, 28.0], [60.0, 60.0]]) if xy is None else xy
    parts = Parts(
        ids=np.arange(h * w),
        coordinates=(grid[:, ::-1] + 0.5) * 8.0,
        share=sparse.csr_array(np.ones((len(xy), h * w))),
        features=channels.reshape(h * w, c)[:, : c - N_EXTRA],
        colour=channels.reshape(h * w, c)[:, c - N_EXTRA : c - 2],
        grid=grid,
        size_um=8.0,
        level="superpixel",
    )
    targets = Targets(np.ones((len(xy), n_genes)), np.ones(len(xy)), tuple(map(str, range(n_genes))), "counts")
    return Section("raster", np.arange(len(xy)), np.zeros((len(xy), 0)), xy, targets=targets, parts=parts)


def disc_batch(tokens, context, target):
    """The batch that the published step sees."""
    disc = Shape(7, 55 / 16).disc
    bag = np.repeat(np.arange(len(target)), len(disc))
    return Batch(
        tokens=torch.tensor(tokens),
        present=torch.ones(tokens.shape[:2], dtype=torch.bool),
        context=torch.tensor(context),
        cell=torch.from_numpy(bag * 49 + np.tile(disc, len(target))),
        bag=torch.from_numpy(bag),
        weight=torch.ones(len(bag)),
        target=torch.tensor(target),
        importance=torch.ones(len(target)),
    )


def test_attention_layer(recorded):
    layer = recorded("attention_layer")
    attention = CrossAttention(21, 7, 32, 8**-0.5)
    for name, letter in (("query", "Q"), ("key", "K"), ("value", "V"), ("out", "O")):
        getattr(attention, name).weight.data = torch.tensor(layer[f"attn_W{letter}"])
        getattr(attention, name).bias.data = torch.tensor(layer[f"attn_b{letter}"])
    query, kv = torch.tensor(layer["query"]), torch.tensor(layer["kv"])
    assert attention.scale == pytest.approx(float(layer["scale"]))
    with torch.no_grad():
        np.testing.assert_allclose(attention.query(query), layer["Q"], **CLOSE)
        np.testing.assert_allclose(attention.key(kv), layer["K"], **CLOSE)
        np.testing.assert_allclose(attention.value(kv), layer["V"], **CLOSE)
        logits = attention.logits(query, kv)
        np.testing.assert_allclose(logits, layer["logits"], **CLOSE)
        np.testing.assert_allclose(logits.softmax(-1), layer["weights"], **CLOSE)
        np.testing.assert_allclose(attention(query, kv), layer["out"], **CLOSE)
        np.testing.assert_allclose(attention.out(torch.tensor(layer["merged"])), layer["out"], **CLOSE)


def test_full_model_forward(recorded, published_network):
    full = recorded("full_model")
    network = published_network(full)
    a, b = torch.tensor(full["A"]), torch.tensor(full["B"])
    with torch.no_grad():
        x = a
        for number, (block, link) in enumerate([(network.block1, network.link1), (network.block2, network.link2)], 1):
            c, d = block.attn1(x, b), block.attn2(b, x)
            for name, attention, pair in (
                ("1", block.attn1, (x, b)),
                ("2", block.attn2, (b, x)),
                ("3", block.attn3, (c, d)),
            ):
                weights = attention.logits(*pair).softmax(-1)
                np.testing.assert_allclose(weights, full[f"block{number}_attn{name}_weights"], **CLOSE)
            np.testing.assert_allclose(c, full[f"block{number}_C1"], **CLOSE)
            np.testing.assert_allclose(d, full[f"block{number}_D1"], **CLOSE)
            x = block(x, b)
            np.testing.assert_allclose(x, full[f"block{number}_out"], **CLOSE)
            np.testing.assert_allclose(link(x), full[f"L{number}_out"], **CLOSE)
            x = x + link(x)
        np.testing.assert_allclose(x, full["x"], **CLOSE)
        np.testing.assert_allclose(network.encode(a, b), full["x"], **CLOSE)
        hidden = torch.cat([x, a], dim=-1)
        for number, layer in enumerate(network.layers, 1):
            hidden = layer(hidden)
            np.testing.assert_allclose(hidden, full[f"dec{number}_out"], **CLOSE)
        np.testing.assert_allclose(network.decode(x, a), full["Y"], **CLOSE)
        subset = torch.tensor(full["gene_subset"])
        np.testing.assert_allclose(network.decode(x, a, subset), full["Y_subset"], **CLOSE)
    assert np.array_equal(disc_mask(55 / 16), full["mask"])


def test_full_model_loss_gradients_and_four_steps(recorded, published_network, name_of):
    full = recorded("full_model")
    network = published_network(full)
    batch = disc_batch(full["A"], full["B"], full["u"])
    loss = spot_loss(network, batch)
    assert float(loss.detach()) == pytest.approx(float(full["loss"]), rel=1e-5)
    assert float(loss.detach()) ** 0.5 == pytest.approx(float(full["loss_logged"]), rel=1e-5)
    loss.backward()
    gradients = {f"grad_{name_of(name)}": value.grad for name, value in network.named_parameters()}
    for name in [name for name in full if name.startswith("grad_")]:
        theirs = full[name]
        ours = gradients[name][: len(theirs)].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max(), err_msg=name)

    network = published_network(full)
    config = HistexConfig(**{**vars(PAPER), "epochs": 4})
    fit = fit_lightning(
        _step(config, torch.nn.ModuleList([network])),
        [batch],
        Run(device="cpu", precision="32-true"),
        max_epochs=4,
        shuffle=False,
    )
    np.testing.assert_allclose([row["mse"] for row in fit.history], full["loss_4_adam_steps"], rtol=1e-5)


def test_output_activation(recorded):
    output = recorded("output_activation")
    ours = elu_output(torch.tensor(output["z"])).numpy()
    np.testing.assert_allclose(ours, output["Y"], **CLOSE)
    assert np.array_equal(ours == 0, output["Y"] == 0)


@pytest.mark.parametrize("radius", [40, 55, 72, 100])
def test_masks(recorded, radius):
    assert np.array_equal(disc_mask(radius / 16), recorded("windows_masks")[f"mask_r{radius}"])


def test_windows_and_their_context(recorded):
    windows = recorded("windows_masks")
    centre = windows["spot_centre"]
    pixels = windows["spot_px_rowcol"]
    cells = Cells.of(raster_section(windows["F"]))
    assert np.array_equal(np.rint(cells.positions(pixels[:, ::-1] * MICRONS)).astype(int), centre)
    index = cells.windows(centre - 3, 7)
    assert (index >= 0).all()
    assert np.array_equal(windows["F"].reshape(-1, 21)[index], windows["A"])
    places = Places.measured(windows["enh_pos"], windows["enh_expr"])
    published = places.values[places.nearest(windows["enh_pos"][: len(centre)], 5)]
    assert np.array_equal(published, windows["B_train_original"])
    assert np.array_equal(places.values[places.nearest(centre, 5)], windows["B_at_spot"])
    h, w, c = windows["F_padded_shape"]
    number = np.stack(np.meshgrid(np.arange(h // 7), np.arange(w // 7), indexing="ij"), axis=-1).reshape(-1, 2)
    assert np.array_equal(block_centre(number, 7), windows["block_centres"])
    assert np.array_equal(places.values[places.nearest(block_centre(number, 7), 5)], windows["B_blocks"])
    padded = cells.windows(number * 7, 7)
    assert (padded < 0).sum() == h * w - windows["F"].shape[0] * windows["F"].shape[1]
    assert c == windows["F"].shape[2]


def test_scaling_and_back(recorded, published_network):
    scaling = recorded("scaling_backtransform")
    u, low, high = min_max(scaling["counts"])
    np.testing.assert_allclose(u, scaling["u"], **CLOSE)
    assert np.array_equal(low, scaling["min"])
    assert np.array_equal(high, scaling["max"])
    u, low, high = min_max(scaling["enh"])
    np.testing.assert_allclose(u, scaling["enh_u"], **CLOSE)
    np.testing.assert_allclose(low, scaling["enh_min"])
    np.testing.assert_allclose(high, scaling["enh_max"])
    scale = Scale.published(scaling["counts"], 37)
    np.testing.assert_allclose(scale(scaling["counts"]), scaling["u"], **CLOSE)
    np.testing.assert_allclose(np.column_stack([scale.low, scale.low + scale.span]) / 37, scaling["range_over_37"])
    network = published_network(scaling)
    with torch.no_grad():
        a, b = torch.tensor(scaling["A"]), torch.tensor(scaling["B"])
        x = network.encode(a, b)
        np.testing.assert_allclose(x, scaling["x"], **CLOSE)
        y = network.decode(x, a)
    np.testing.assert_allclose(y, scaling["Y"], **CLOSE)
    counts = scale.counts(y.numpy())
    np.testing.assert_allclose(counts.reshape(2, 7, 7, 7), scaling["superpixel_counts"], **CLOSE)
    disc = Shape(7, 55 / 16).disc
    np.testing.assert_allclose(counts[:, disc].sum(axis=1), scaling["disk_sum"], rtol=1e-5)
    np.testing.assert_allclose(y[:, disc].mean(dim=1), scaling["y_spot"], **CLOSE)


def test_inference_of_the_ensemble(recorded, published_network, monkeypatch):
    ensemble = recorded("ensemble_prediction")
    channels = ensemble["F"]
    section = raster_section(channels, n_genes=7)
    model = Histex(HistexConfig(**{**vars(PAPER), "width": 32, "hidden": (24, 16, 16, 12)}))
    model.genes, model.unit, model.n_features = section.targets.genes, "counts", 21 - N_EXTRA
    model._fitted = True
    model._shape, model._scaler = Shape(7, 55 / 16), None
    low, high = 37 * ensemble["range_over_37"].T
    model._scale = Scale(low, high - low, 37)
    model._members = torch.nn.ModuleList(published_network(ensemble, f"m{i}_") for i in range(5))
    model.fitted_on = (_mark(section),)
    made = Histex._inputs

    def inputs(self, spots):
        """Recorded places and positions of the cells in place of our own."""
        ours = made(self, spots)
        object.__setattr__(ours, "places", Places.measured(ensemble["enh_pos"], ensemble["enh_u"]))
        ours.spots.cells.section.features.position[:] = channels.reshape(-1, 21)[:, 19:]
        return ours

    monkeypatch.setattr(Histex, "_inputs", inputs)
    for block_rows in (8192, 50):
        predicted = model.predict(section, block_rows=block_rows)
        np.testing.assert_allclose(
            predicted.mean.reshape(17, 23, 7), ensemble["prediction"][:17, :23], rtol=1e-5, atol=1e-6
        )
        latent = predicted.latent.reshape(17, 23, 32).transpose(2, 0, 1)
        np.testing.assert_allclose(latent, ensemble["latent_median"][:, :17, :23], **CLOSE)


@pytest.mark.parametrize("layout", ["full", "holes"])
def test_enhanced_lattice(recorded, layout):
    lattice = {k.removeprefix(f"{layout}_"): v for k, v in recorded("enhanced_lattice").items() if k.startswith(layout)}
    xy = lattice["spot_px"] * MICRONS
    assert np.array_equal(staggered_index(xy), lattice["lattice_index"])
    ours = staggered_lattice(xy, lattice["counts"])
    np.testing.assert_allclose(ours.values, lattice["lattice"])
    np.testing.assert_allclose(ours.upsampled, lattice["upsampled"], **CLOSE)
    assert np.array_equal(ours.a, lattice["node_a"])
    assert np.array_equal(ours.b, lattice["node_b"])
    assert np.array_equal(np.column_stack([ours.a[ours.kept], ours.b[ours.kept]]), lattice["kept_ab"])
    np.testing.assert_allclose(ours.coordinates / MICRONS, lattice["kept_px"])
    np.testing.assert_allclose(ours.expression, lattice["kept_values"], **CLOSE)


def test_paper_size(recorded, published_network, histex_dir):
    paper = recorded("paper_size")
    arrays = json.loads((histex_dir / "paper_size_arrays.json").read_text())["arrays"]
    made = {name: formula(p, shape, s) for p, name, shape, s in arrays if name not in ("B", "u")}
    np.testing.assert_allclose(formula(0, (8,), 1.0), paper["first_values"], **CLOSE)
    for name in ("B", "u"):
        p, _, shape, _ = next(each for each in arrays if each[1] == name)
        made[name] = (formula(p, shape, 1.0) + 1) / 2
    network = published_network(made)
    assert sum(value.numel() for value in network.parameters()) == int(paper["n_parameters"])
    batch = disc_batch(made["A"], made["B"], made["u"])
    with torch.no_grad():
        x = network.encode(batch.tokens, batch.context)
        np.testing.assert_allclose(x, paper["x"], **CLOSE)
        np.testing.assert_allclose(network.decode(x, batch.tokens), paper["Y"], **CLOSE)
        assert float(spot_loss(network, batch)) == pytest.approx(float(paper["loss"]), rel=1e-5)


def formula(p, shape, s):
    """The rule that the unstored arrays follow."""
    k = np.arange(1, np.prod(shape) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = (k + np.uint64(p) * np.uint64(2**32)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    h = (z >> np.uint64(40)).astype(np.float64)
    return ((2 * (h + 0.5) / 2**24 - 1) * s).astype(np.float32).reshape(shape)


def test_checklist_04_parameter_counts(histex_dir):
    counts = json.loads((histex_dir / "parameter_counts.json").read_text())
    for name, expected in counts.items():
        width, genes, channels = (int(part[1:]) for part in name.split("_"))
        network = OriginalNetwork(channels, genes, width, PAPER.hidden)
        assert sum(value.numel() for value in network.parameters()) == expected
