"""The statements of ST-AnD's faithfulness checklist; numbers recorded from the released code: ``test_golden.py``.

13 in full: ``test_golden.py::test_split``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hespotex.data.shares import aggregate
from hespotex.errors import HespotexWarning
from hespotex.metrics import pearson
from hespotex.models import Run, create
from hespotex.models.nn.pooling import Bags
from hespotex.models.stand import STAnD, published_split
from hespotex.models.stand.counts import CountDecoder
from hespotex.models.stand.decoder import PublishedDecoder
from hespotex.models.stand.pooling import noisy_and, pool
from hespotex.models.stand.vqvae import VQVAE

RUN = Run(seed=0, device="cpu")
KINDS = ["noisy_and", "noisy_or", "max", "isr", "gm", "lse", "mean", "sum"]


def bags_of(*sizes: int) -> Bags:
    bag = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Bags(torch.arange(len(bag)), bag, torch.ones(len(bag)), len(sizes))


def published(pooling: str = "noisy_and", n_genes: int = 7, **options) -> PublishedDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        decoder = PublishedDecoder(784, n_genes, pooling=pooling, **options)
        decoder.scale.data.uniform_(1, 30)
    return decoder


def nuclei(n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(4).normal(size=(n, 784)).astype(np.float32))


def images(n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).uniform(-0.5, 0.5, size=(n, 28, 28, 3)).astype(np.float32))


def vqvae() -> VQVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return VQVAE()


def n_parameters(module: torch.nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


@pytest.fixture(scope="module")
def paper(make_tissue):
    sections = [make_tissue(f"s{i}", n_spots=9, crops=True, unit="log1p_cp10k", seed=i)[0] for i in range(2)]
    with pytest.warns(HespotexWarning, match="2 spots lack parts or counts"):
        model = create("stand", preset="paper", max_epochs=2, vqvae_epochs=1).fit(sections, RUN)
    return model, sections


def test_paper_preset_has_the_published_settings():
    config = STAnD.preset("paper")
    wanted = {
        "encoder": "vqvae",
        "decoder": "published",
        "pooling": "noisy_and",
        "beta": 0.05,
        "gamma": 5.0,
        "coexpression": False,
        "lr": 1e-3,
        "batch": 8,
        "max_epochs": 100,
        "patience": None,
        "vqvae_epochs": 100,
        "vqvae_lr": 1e-3,
        "vqvae_batch": 128,
        "reencode": True,
        "output": "intensity",
        "unit": "log1p_cp10k",
    }
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_01_crops_become_a_grid_of_7_by_7_by_16_and_784_features():
    network, x = vqvae(), images(2)
    assert network.encode(x).shape == (2, 7, 7, 16)
    assert network.features(x).shape == (2, 784)
    assert network.decode(network.encode(x)).shape == x.shape


def test_02_number_of_parameters_of_the_vqvae():
    network = vqvae()
    counts = [n_parameters(network.encoder), network.codebook.numel(), n_parameters(network.decoder)]
    assert counts == [20_432, 16_384, 28_611]
    assert n_parameters(network) == 65_427


def test_03_latents_are_rows_of_the_codebook_and_the_gradient_passes_straight_through():
    network, x = vqvae(), images(2)
    assert network.codebook.shape == (1024, 16)
    latents = network.features(x).reshape(-1, 16)
    assert all((latent == network.codebook).all(dim=1).any() for latent in latents)
    reconstruction, _ = network.losses(x, 1.0)
    reconstruction.backward()
    assert network.codebook.grad is None
    got = network.encoder[4].bias.grad
    e = network.codebook[network.codes(network.encode(x))].detach().requires_grad_()
    F.mse_loss(network.decode(e), x).backward()
    torch.testing.assert_close(got, e.grad.sum(dim=(0, 1, 2)), rtol=1e-4, atol=1e-7)


def test_04_commitment_weighs_a_quarter_and_the_error_is_relative_to_the_variance():
    network, x = vqvae(), images(4)
    with torch.no_grad():
        z = network.encode(x)
        e = network.codebook[network.codes(z)]
        reconstruction, quantisation = network.losses(x, 0.5)
        assert quantisation.item() == pytest.approx(1.25 * F.mse_loss(z, e).item(), rel=1e-5)
        assert reconstruction.item() == pytest.approx(2 * F.mse_loss(network.decode(e), x).item(), rel=1e-5)
    quantisation = network.losses(x, 0.5)[1]
    quantisation.backward()
    assert network.encoder[4].bias.grad.abs().max() > 0
    torch.testing.assert_close(
        network.encoder[4].bias.grad, 0.25 * 2 * (z - e).sum(dim=(0, 1, 2)) / z.numel(), rtol=1e-3, atol=1e-9
    )


def test_05_number_of_parameters_of_the_decoder():
    def expected(g: int) -> int:
        return 785 * g + (g + 1) * g + 2 * g

    for g in (1, 9, 50):
        assert n_parameters(PublishedDecoder(784, g)) == expected(g)
    assert expected(14_605) == 224_814_765


def test_06_noisy_and_runs_from_0_to_1_and_rises():
    threshold = torch.linspace(0, 1, 11)
    p = torch.linspace(0, 1, 101)[:, None].expand(-1, 11)
    curve = noisy_and(p, threshold, 5.0)
    torch.testing.assert_close(curve[0], torch.zeros(11), atol=1e-5, rtol=0)
    torch.testing.assert_close(curve[-1], torch.ones(11), atol=1e-5, rtol=0)
    assert (curve.diff(dim=0) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_07_the_order_of_nuclei_is_of_no_account_and_duplicates_count_by_number_alone(kind):
    decoder, h = published(kind), nuclei(6)
    with torch.no_grad():
        once = decoder(h, bags_of(6))
        torch.testing.assert_close(decoder(h[[3, 0, 5, 1, 4, 2]], bags_of(6)), once, rtol=1e-5, atol=1e-6)
        if kind in ("noisy_and", "mean", "max", "gm", "lse"):
            p = decoder.activations(h)
            pooled = pool(kind, p, bags_of(6), gamma=5.0, threshold=decoder.threshold)
            doubled = pool(kind, p.repeat(2, 1), bags_of(12), gamma=5.0, threshold=decoder.threshold)
            torch.testing.assert_close(doubled, pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["noisy_and", "sum", "max", "gm", "lse"])
def test_08_doubling_all_nuclei_doubles_the_abundance(kind):
    decoder, h = published(kind), nuclei(5)
    with torch.no_grad():
        p = decoder.activations(h)
        once, twice = decoder.abundance(p, bags_of(5)), decoder.abundance(p.repeat(2, 1), bags_of(10))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-6)


def test_09_twenty_equal_nuclei_are_pooled_to_what_one_is_alone():
    decoder, h = published(), nuclei(1)
    with torch.no_grad():
        torch.testing.assert_close(decoder(h.expand(20, -1), bags_of(20)), decoder.single(h), rtol=1e-5, atol=1e-6)
        in_linear_units = torch.expm1(decoder.single(h)) / 20
        torch.testing.assert_close(torch.expm1(decoder.single(h, share=True)), in_linear_units, rtol=1e-4, atol=1e-5)


def test_10_a_gene_below_zero_stays_at_zero_as_published_and_never_in_the_default():
    decoder, h = published(), nuclei(4)
    decoder.scale.data[2] = -0.03
    y = decoder(h, bags_of(4))
    assert (y[:, 2] == 0).all()
    y.sum().backward()
    for gradient in (decoder.scale.grad[2], decoder.last.bias.grad[2], decoder.threshold.grad[2]):
        assert gradient == 0
    repaired = CountDecoder(784, 7, hidden=(8,))
    counts = torch.full((3, 7), 2.0)
    repaired.start(0 * counts, torch.ones(3), torch.full((3,), 4.0))  # not even genes that were never seen
    mu = repaired(nuclei(12), bags_of(4, 4, 4))
    assert (mu > 0).all()
    repaired.loss(mu, counts).backward()
    assert (repaired.log_scale.grad != 0).all()
    assert (repaired.network[-1].bias.grad != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_11_a_bag_is_the_same_alone_and_beside_a_longer_one(kind):
    decoder, h = published(kind), nuclei(8)
    with torch.no_grad():
        torch.testing.assert_close(decoder(h, bags_of(3, 5))[:1], decoder(h[:3], bags_of(3)), rtol=1e-5, atol=1e-6)


def test_12_the_loss_is_the_mean_squared_difference_of_log_expression(make_tissue):
    section = make_tissue(n_spots=12, unit="log1p_cp10k")[0]
    still = {"encoder": "frozen", "reencode": False, "max_epochs": 1, "batch": 16, "lr": 1e-12}
    with pytest.warns(HespotexWarning, match="1 spots lack"):
        model = create("stand", preset="paper", **still).fit([section], RUN)
    expected, measured = model.predict_spots(section).mean[1:], section.targets[1:]  # the first holds no nuclei
    by_hand = np.mean([np.mean((y - t) ** 2) for y, t in zip(expected, measured, strict=True)])
    assert model.history[-1]["loss"] == pytest.approx(by_hand, rel=1e-4)


def test_13_the_split_depends_on_the_names_alone():
    names = [f"SPOT{i:03d}" for i in range(37)]
    parts = published_split(names)
    assert parts == published_split(names[::-1])
    assert sorted(sum(parts, [])) == names
    assert len(parts) == 10


def test_14_shares_add_up_to_the_spot(make_tissue):
    section, *_ = make_tissue()
    model = create("stand", hidden=[16], max_epochs=5).fit([section], RUN)
    spots = model.predict_spots(section).mean
    shares = model.predict(section).mean
    np.testing.assert_allclose(aggregate(section.parts.share, shares) + model.ambient, spots, rtol=1e-5)
    np.testing.assert_allclose(spots[0], model.ambient, rtol=1e-6)


def test_15_type_specific_expression_is_recovered_from_spots(make_tissue):
    section, kind, profiles = make_tissue(n_spots=200, n_genes=20, seed=3)
    predicted = create("stand", hidden=[32], batch=16, max_epochs=20).fit([section], RUN).predict(section).mean
    of_types = np.stack([predicted[kind == each].mean(axis=0) for each in (0, 1)])
    for own, true in zip(of_types, profiles, strict=True):
        assert np.corrcoef(own, true)[0, 1] > 0.95
    assert np.corrcoef(of_types[1] - of_types[0], profiles[1] - profiles[0])[0, 1] > 0.95
    assert np.nanmean(pearson(profiles[kind], predicted)) > 0.9


def test_16_prediction_is_deterministic(paper):
    model, sections = paper
    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(model.predict(sections[0]).mean, model.predict(sections[0]).mean)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_17_genes_that_are_zero_everywhere_or_cannot_be_scored_are_counted(paper, make_tissue):
    model, sections = paper
    predicted = model.predict(sections[0]).mean
    assert model.scores["genes_always_zero"] == (predicted == 0).all(axis=0).sum()
    section, *_ = make_tissue()
    section.targets.counts[:, 1] = 0
    default = create("stand", hidden=[8], max_epochs=2).fit([section], RUN)
    assert all(row["val_unscored"] >= 1 for row in default.history)
    r = pearson(section.targets[:], default.predict_spots(section).mean)
    assert np.isnan(r[1])
    assert np.isfinite(np.delete(r, 1)).all()
