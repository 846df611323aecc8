"""The statements of HISTEX's faithfulness checklist, numbered; 04 stands in ``test_golden.py`` too, 17 in ``metrics/test_raster.py``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.section import Parts, Section, Targets
from hespotex.models import Run, create
from hespotex.models.histex import Histex
from hespotex.models.histex.config import PAPER, HistexConfig
from hespotex.models.histex.context import Places, densified, staggered_lattice
from hespotex.models.histex.inputs import Batches, Inputs, Shape, fit_scale, spots_of
from hespotex.models.histex.model import batch_size, spot_loss
from hespotex.models.histex.network import OriginalNetwork, network_of
from hespotex.models.histex.scale import Scale
from hespotex.models.histex.windows import Cells, axis_position, disc_mask

RUN = Run(seed=0, device="cpu")
VISIUM = {"side": 26, "pitch_um": 100.0, "radius_um": 27.5, "n_features": 3, "n_genes": 3}


def tiny_paper(**options):
    small = {"width": 8, "hidden": (8, 6, 6, 6), "epochs": 2, "n_context": 3}
    return create("histex", preset="paper", **{**small, **options})


@pytest.fixture(scope="module")
def section(make_parts):
    """A section with spots as large as Visium's."""
    return make_parts(**VISIUM)[0]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return OriginalNetwork(9, 4, 16, (12, 8, 8, 8)).eval()


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 49, 9, generator=generator), torch.rand(2, 5, 4, generator=generator)


def batches_of(section, config):
    spots = spots_of(section)
    shape = Shape.of([spots], config.mode)
    scale = fit_scale([spots], shape, config.mode)
    inputs = Inputs.of(config, shape, spots, scale, None)
    return inputs, Batches([inputs], scale, size=4, seed=None), scale


def raster(height, width, n_features):
    grid = np.indices((height, width)).reshape(2, -1).T
    rng = np.random.default_rng(0)
    share = np.zeros((1, len(grid)))
    share[0, 0] = 1
    return Section(
        "raster",
        np.arange(1),
        np.zeros((1, 0)),
        np.array([[4.0, 4.0]]),
        targets=Targets(np.ones((1, 1)), np.ones(1), ("A",), "counts"),
        parts=Parts(
            ids=np.arange(len(grid)),
            coordinates=(grid[:, ::-1] + 0.5) * 8.0,
            share=sparse.csr_array(share),
            features=np.broadcast_to(rng.normal(size=n_features).astype(np.float32), (len(grid), n_features)),
            colour=np.full((len(grid), 3), 0.5, dtype=np.float32),
            grid=grid,
            size_um=8.0,
            level="superpixel",
        ),
    )


def test_the_paper_preset_has_the_published_settings():
    published = {
        "mode": "original", "width": 128, "hidden": (1024, 512, 512, 512), "n_context": 5, "n_members": 5,
        "epochs": 500, "lr": 1e-4, "weight_decay": 0.0, "batch": 32, "overlap": 1, "unit": "counts",
    }  # fmt: skip
    assert vars(Histex.preset("paper")) == published


def test_01_channels_of_an_image_of_2240_by_1120_pixels_at_half_a_micron():
    cells = Cells.of(raster(2240 // 16, 1120 // 16, 1024))
    assert cells.lookup.shape == (140, 70)
    assert cells.section.features.shape == (140 * 70, 1029)
    channels = cells.section.features[np.array([0, 70 * 140 - 1])]
    assert (channels[:, 1024:1027] == 0.5).all()
    # a mean over rows 0, 0, 1 and 2 of the reflected positions, whose order is i-2 … i+1
    assert channels[0, 1027] == pytest.approx((1 + 0 + 0 + 1) / 4 / 139)
    assert axis_position(140)[70] == pytest.approx((68 + 69 + 70 + 71) / 4 / 139)


def test_02_the_disc_of_55_pixels_has_37_cells():
    mask = disc_mask(55 / 16)
    assert mask.shape == (7, 7)
    assert mask.sum(axis=0).tolist() == mask.sum(axis=1).tolist() == [3, 5, 7, 7, 7, 5, 3]


def test_02_the_disc_follows_from_the_shares(section):
    shape = Shape.of([spots_of(section)], "original")
    assert shape == Shape(7, 55 / 16)
    assert len(shape.disc) == 37


def test_03_window_and_context_tensors(section):
    config = PAPER
    _, batches, _ = batches_of(section, config)
    assert batches[0].tokens.shape == (4, 49, 3 + 5)
    assert batches[0].context.shape == (4, 5, 3)


def test_04_number_of_parameters():
    for genes in (12, 313):
        network = OriginalNetwork(1029, genes, 128, PAPER.hidden)
        assert sum(value.numel() for value in network.parameters()) == 2_910_080 + 1_280 * genes


def test_05_roles_of_query_key_and_value(network, sample):
    tokens, context = sample
    with torch.no_grad():
        block = network.block1
        assert block(tokens, context).shape == (2, 49, 16)
        seen, summary = block.attn1(tokens, context), block.attn2(context, tokens)
        assert seen.shape == (2, 49, 16)
        assert summary.shape == (2, 5, 16)
        changed = OriginalNetwork(9, 4, 16, (12, 8, 8, 8))
        changed.load_state_dict(network.state_dict())
        changed.block1.attn1.value.weight.zero_()
        assert torch.equal(changed.block1.attn2(context, tokens), summary)
        assert not torch.equal(changed.block1.attn1(tokens, context), seen)
        # values of the output come from the summary alone: with one constant summary all tokens get the same
        same = block.attn3(seen, summary[:, :1].expand(-1, 5, -1))
        np.testing.assert_allclose(same, same[:, :1].expand_as(same), atol=1e-6)


def test_06_attention_scale():
    original = network_of(replace(PAPER, hidden=(4,)), 6, 3)
    fixed = network_of(HistexConfig(width=128), 6, 3)
    assert {each.scale for each in (original.block1.attn1, original.block2.attn3)} == {8**-0.5}
    assert {each.scale for each in (fixed.block1.attn1, fixed.block2.attn3)} == {16**-0.5}


@pytest.mark.parametrize("mode", ["original", "fixed"])
def test_07_outputs_are_never_negative(mode):
    torch.manual_seed(0)
    network = network_of(HistexConfig(mode=mode, width=8, hidden=(8,)), 6, 5)
    n_tokens, n_context = (6, 5) if mode == "original" else (8, 7)
    with torch.no_grad():
        for size in (1.0, 1e3, 1e6):
            tokens, context = size * torch.randn(3, 9, n_tokens), size * torch.randn(3, 4, n_context)
            output = network.decode(network.encode(tokens, context, torch.ones(3, 9, dtype=torch.bool)), tokens)
            assert (output >= 0).all()


def test_08_the_published_decoder_is_affine_before_its_last_layer(network, sample):
    tokens = sample[0]
    latent = torch.randn(2, 49, 16, generator=torch.Generator().manual_seed(2))

    def hidden(x):
        for layer in network.layers:
            x = layer(x)
        return x

    with torch.no_grad():
        a, b = torch.cat([latent, tokens], -1), torch.cat([latent.flip(0), tokens.flip(1)], -1)
        zero = hidden(torch.zeros_like(a))
        np.testing.assert_allclose(hidden(a + b) - zero, (hidden(a) - zero) + (hidden(b) - zero), atol=1e-4)


class _Constant:
    """A network that predicts one value, and another at some tokens."""

    def __init__(self, value, n_genes, elsewhere=()):
        self.value, self.n_genes, self.elsewhere = value, n_genes, elsewhere

    def encode(self, tokens, context, present):
        output = torch.full((*tokens.shape[:2], 1), self.value)
        output[:, list(self.elsewhere)] = 1e3
        return output

    def decode(self, latent, tokens):
        return latent.expand(-1, self.n_genes)


def test_09_loss_of_a_constant_and_corners_that_do_not_count(section):
    _, batches, _ = batches_of(section, PAPER)
    batch = batches[0]
    expected = float(((0.3 - batch.target) ** 2).mean())
    assert float(spot_loss(_Constant(0.3, 3), batch)) == pytest.approx(expected, rel=1e-5)
    corners = np.flatnonzero(~disc_mask(55 / 16))
    assert len(corners) == 12
    assert float(spot_loss(_Constant(0.3, 3, corners), batch)) == pytest.approx(expected, rel=1e-5)
    assert float(spot_loss(_Constant(0.3, 3, [24]), batch)) > 2 * expected


def test_10_counts_of_a_disc_sum_to_the_count_of_the_spot():
    counts = np.random.default_rng(0).poisson(9, size=(12, 4)).astype(float)
    scale = Scale.published(counts, 37)
    scaled = np.random.default_rng(1).uniform(size=(37, 4)).astype(np.float32)
    expected = scaled.mean(axis=0) * (counts.max(axis=0) - counts.min(axis=0)) + counts.min(axis=0)
    np.testing.assert_allclose(scale.counts(scaled).sum(axis=0), expected, rtol=1e-5)


def test_11_optimiser_and_batch(section):
    assert [batch_size(n, 32) for n in (1, 15, 16, 40, 512, 9999)] == [1, 1, 1, 2, 32, 32]
    seen = {}

    def spy(module, items, run, **options):
        optimiser = module.configure_optimizers()
        seen.update(items=items, options=options, optimiser=optimiser)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hespotex.models.histex.model.fit_lightning", spy)
        with pytest.raises(KeyboardInterrupt):
            create("histex", preset="paper", width=8, hidden=(4,)).fit([section], RUN)
    group = seen["optimiser"].param_groups[0]
    # AdamW without weight decay is Adam
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 0.0)
    assert seen["options"]["shuffle"] is False
    assert seen["options"]["max_epochs"] == 500
    assert len(seen["items"]) == section.n_obs


def test_12_five_networks_and_their_median(section):
    model = tiny_paper(n_members=5, epochs=1).fit([section], RUN)
    singles = []
    for number in range(5):
        single = tiny_paper(n_members=1)
        single.__dict__.update({key: value for key, value in vars(model).items() if key != "config"})
        single._members = torch.nn.ModuleList([model._members[number]])
        singles.append(single.predict(section))
    together = model.predict(section)
    np.testing.assert_allclose(together.mean, np.median([each.mean for each in singles], axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        together.latent, np.median([each.latent for each in singles], axis=0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        together.std, np.std([each.mean for each in singles], axis=0, ddof=1), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["original", "fixed"])
def test_13_some_genes_equal_the_same_columns_of_all(mode):
    torch.manual_seed(0)
    network = network_of(HistexConfig(mode=mode, width=8, hidden=(8,)), 6, 5)
    extra = 0 if mode == "original" else 2
    tokens, latent = torch.randn(3, 6 + extra), torch.randn(3, 8)
    genes = torch.tensor([4, 0])
    with torch.no_grad():
        np.testing.assert_allclose(
            network.decode(latent, tokens, genes), network.decode(latent, tokens)[:, genes], rtol=1e-6
        )


def test_14_enhanced_lattice_of_six_columns_and_five_rows():
    column, row = np.divmod(np.arange(30), 5)
    xy = np.column_stack([27.5 + 100 * column, 27.5 + 100 * row + 50 * (column % 2)])
    lattice = staggered_lattice(xy, np.ones((30, 1)))
    assert lattice.kept.size == 144
    assert lattice.kept.sum() == 99
    kept = set(map(tuple, lattice.coordinates))
    assert set(map(tuple, xy)) <= kept


def test_15_constant_channels_give_a_prediction_that_is_constant_in_each_block(section):
    class Flat:
        """Cells whose channels are all the same, position among them."""

        def __init__(self, shape):
            self.shape = shape

        def __getitem__(self, rows):
            return np.full((np.arange(self.shape[0])[rows].size, self.shape[1]), 0.7, dtype=np.float32)

    made = Cells.of.__func__

    def flat(cls, section):
        cells = made(cls, section)
        object.__setattr__(cells.section, "features", Flat(cells.section.features.shape))
        return cells

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cells, "of", classmethod(flat))
        mean = tiny_paper().fit([section], RUN).predict(section).mean.reshape(26, 26, 3)
    for i in range(0, 21, 7):  # blocks at the end are padded with zeros, which attention sees too
        for j in range(0, 21, 7):
            block = mean[i : i + 7, j : j + 7].reshape(49, 3)
            np.testing.assert_allclose(block, block[:1].repeat(49, axis=0), rtol=1e-4, atol=1e-6)


def test_16_the_context_of_a_spot_is_the_nearest_to_it_and_never_itself(make_parts):
    section, _ = make_parts(n_genes=2)
    inputs, batches, scale = batches_of(section, HistexConfig())
    position, n = inputs.spots.position, section.n_obs
    centre = np.floor(position) + 0.5
    index = inputs.places.nearest(centre, 5, np.arange(n))
    for spot in range(n):
        allowed = ~(inputs.places.sources == spot).any(axis=1)
        distance = np.linalg.norm(inputs.places.positions - centre[spot], axis=1)
        expected = np.sort(distance[allowed])[:5]
        np.testing.assert_allclose(np.sort(distance[index[spot]]), expected)
        assert not (inputs.places.sources[index[spot]] == spot).any()
    # its own counts reach its target and nothing else of its sample
    changed = np.array(section.targets.counts, dtype=float)
    changed[5] += 1000
    other, _, _ = batches_of(replace(section, targets=replace(section.targets, counts=changed)), HistexConfig())
    rows = np.array([5])
    before, after = inputs.training(rows, scale), other.training(rows, scale)
    # scaled anew with the changed counts: compare what the context reads in counts
    other_scale = fit_scale([other.spots], other.shape, "fixed")
    np.testing.assert_allclose(
        scale.counts(before.context[:, :, :2].numpy()), other_scale.counts(after.context[:, :, :2].numpy()), rtol=1e-4
    )
    assert not torch.equal(before.target, after.target)


def test_16_places_between_spots_come_from_both():
    row, column = np.divmod(np.arange(25), 5)
    measured = Places.measured(np.column_stack([row, column]) * 10.0, np.arange(25.0)[:, None])
    places = densified(measured)
    assert 3 * 25 < len(places.positions) < 4 * 25
    np.testing.assert_array_equal(places.values[:25], measured.values)
    between = places.sources[25:]
    assert (between[:, 0] != between[:, 1]).all()
    np.testing.assert_allclose(places.values[25:, 0], between.mean(axis=1))
    np.testing.assert_allclose(places.positions[25:], measured.positions[between].mean(axis=1))


@pytest.mark.parametrize("mode", ["original", "fixed"])
def test_18_padding_changes_nothing_inside(section, mode):
    spots = spots_of(section)
    cells = spots.cells
    whole = cells.windows(np.array([[2, 3]]), 7)[0].reshape(7, 7)
    over = cells.windows(np.array([[-2, 22]]), 7)[0].reshape(7, 7)
    assert (whole >= 0).all()
    assert np.array_equal(over >= 0, (np.arange(7)[:, None] >= 2) & (np.arange(7) < 4))
    assert np.array_equal(over[2:, :4], cells.windows(np.array([[0, 22]]), 7)[0].reshape(7, 7)[:5, :4])
    config = replace(PAPER, mode=mode)
    inputs = replace(batches_of(section, config)[0], shape=Shape(7, 3.4))
    tokens, present = inputs.tokens(over.reshape(1, -1))
    there = over.ravel() >= 0
    assert np.array_equal(present.numpy()[0], there)
    channels = cells.section.features[over.ravel()[there]]
    np.testing.assert_array_equal(tokens[0, there, : channels.shape[1]], channels)
    assert not tokens[0, ~there, : channels.shape[1]].any()


def test_18_masked_cells_do_not_reach_the_others():
    torch.manual_seed(0)
    network = network_of(HistexConfig(width=8, hidden=(8,)), 6, 5)
    tokens, context = torch.randn(2, 9, 8), torch.randn(2, 4, 7)
    present = torch.ones(2, 9, dtype=torch.bool)
    present[:, 6:] = False
    other = tokens.clone()
    other[:, 6:] = 50.0
    with torch.no_grad():
        a, b = network.encode(tokens, context, present), network.encode(other, context, present)
    np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-6)
