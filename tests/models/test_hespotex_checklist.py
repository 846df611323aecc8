"""The statements of HESpotEx's faithfulness checklist that concern the whole model; the others stand beside the parts.

01–06, 11–19, 21, 22 on the networks: ``nn/``. 07 and 08: ``pp/test_select_genes.py``. 09: ``image/test_patches.py``.
10: ``encoders/test_open_clip.py``. 25: ``metrics/test_scores.py``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hespotex.data.section import Targets
from hespotex.data.units import normalize
from hespotex.models import Run, create
from hespotex.models.hespotex import HESpotEx
from hespotex.models.hespotex.expression import spot_embeddings
from hespotex.models.hespotex.inputs import gate_edges
from hespotex.models.nn.gate import GATE
from hespotex.models.nn.graphs import edge_index, nearest

RUN = Run(seed=0, device="cpu")
QUICK = {"gate_epochs": 2, "epochs": 2}


def paper(**options):
    return create("hespotex", preset="paper", **{**QUICK, **options})


@pytest.fixture(scope="module")
def sections(make_section):
    return [make_section(f"s{i}", seed=i, unit="log1p_cpm_panel") for i in range(3)]


@pytest.fixture(scope="module")
def fitted(sections):
    return paper().fit(sections[:2], RUN)


def networks(model):
    return {name: array for name, array in model.state()[0].items() if name.startswith("members")}


def test_paper_preset_has_the_published_settings():
    config = HESpotEx.preset("paper")
    published = {
        "unit": "log1p_cpm_panel",
        "gate_hidden": 512,
        "width": 64,
        "head_width": 1024,
        "n_layers": 4,
        "layer_order": "parallel",
        "jk_hidden": None,
        "graph": "legacy",
        "gate_graph": "legacy",
        "gate_order": "sequential",
        "gate_tying": "legacy",
        "gate_epochs": 500,
        "gate_lr": 1e-3,
        "gate_weight_decay": 1e-4,
        "gate_clip": 5.0,
        "legacy_self_subtraction": True,
        "nuclei": "multiply_legacy",
        "align_weight": 1.0,
        "lr": 1e-3,
        "weight_decay": 1e-3,
        "epochs": 30,
        "stopping": "fixed",
        "n_members": 1,
        "dropout": 0.0,
        "regression": "none",
        "standardize": "none",
        "output": "shift",
    }
    assert {name: getattr(config, name) for name in published} == published
    assert config.gene_selection == {"method": "hvg", "n_top": 1000}
    assert config.needs == ("embedding", "nuclei")


def test_checklist_06_sequential_stage_equals_the_published(golden):
    recorded = golden("stage1_sequential")
    gate = GATE(20, tying="legacy")
    for name, key in (("w1", "W1"), ("w2", "W2"), ("a_source", "a_src"), ("a_target", "a_dst")):
        getattr(gate, name).data = torch.tensor(recorded[key])
    slides = []
    for number in (1, 2, 3):
        counts = recorded[f"counts_slide{number}"]
        expression = normalize(counts, counts.sum(axis=1), "log1p_cpm_panel")
        np.testing.assert_allclose(expression, recorded[f"X_slide{number}"], atol=2e-6)
        edges = edge_index(nearest(recorded[f"xy_slide{number}"], 7, symmetric=True, include_self=True))
        assert set(map(tuple, edges.T)) == set(map(tuple, recorded[f"edges_slide{number}"].T))
        slides.append((torch.tensor(expression), torch.tensor(edges)))
    config = replace(HESpotEx.preset("paper"), gate_epochs=int(recorded["steps_per_slide"]))
    embeddings, fit = spot_embeddings(config, slides, Run(device="cpu", precision="32-true"), gate=gate)
    for number, embedding, slide in zip((1, 2, 3), embeddings, slides, strict=True):
        np.testing.assert_allclose(embedding.numpy(), recorded[f"z_slide{number}"], atol=2e-4)
        final = gate.encode(*slide).detach().numpy()
        np.testing.assert_allclose(final, recorded[f"z_final_slide{number}"], atol=2e-4)
    np.testing.assert_allclose(gate.w1.detach().numpy(), recorded["W1_final"], atol=2e-4)
    assert len(fit.history) == 3 * int(recorded["steps_per_slide"])


def test_checklist_05_the_graph_reads_coordinates_and_joins_no_regions(sections):
    config = HESpotEx.preset("paper")
    half = replace(sections[0], region=(np.arange(64) >= 32).astype(int))
    source, target = gate_edges(config, half)
    assert (half.region[source] == half.region[target]).all()
    assert np.array_equal(gate_edges(config, sections[0]), gate_edges(config, replace(sections[0], edges=None)))


def test_checklist_07_target_is_log1p_of_counts_per_million_within_the_panel(sections):
    targets = sections[0].targets
    counts = np.asarray(targets.counts, dtype=float)
    np.testing.assert_allclose(targets[:], np.log1p(counts / counts.sum(1, keepdims=True) * 1e6), rtol=1e-5)
    model = paper(gate_epochs=1, epochs=1)
    model.fit(sections[:1], RUN)
    assert model._space.basis is None
    np.testing.assert_array_equal(model._space.read(targets), targets[:])


def test_checklist_16_prediction_is_the_factor_times_both_branches(sections):
    model = paper(output="none").fit(sections[:1], RUN)
    new = sections[2]
    inputs = model._inputs(new)
    assert inputs.factor.shape == (64, 1)
    assert inputs.factor.min() > 1
    assert inputs.factor.max() == 2
    member = model._members[0]
    with torch.no_grad():
        embedding = member.embed(torch.tensor(inputs.features))
        steps = member.neighbourhood(embedding, torch.tensor(inputs.edges), torch.tensor(inputs.weights))
        by_hand = inputs.factor * (member.reader(steps) + member.gene_head(embedding)).numpy()
    np.testing.assert_allclose(model.predict(new).mean, by_hand, atol=1e-5)


def test_the_published_shift_makes_the_minimum_zero(fitted, sections):
    shifted = fitted.predict(sections[2]).mean
    plain = paper(output="none").fit(sections[:2], RUN).predict(sections[2]).mean
    assert shifted.min() == 0
    np.testing.assert_allclose(shifted, plain - plain.min(), atol=1e-5)


def test_checklist_17_equal_counts_double_and_no_factor_is_the_published_variant(sections):
    even = [replace(s, extras={**s.extras, "n_nuclei_window": np.full(64, 7.0)}) for s in sections]
    with_factor = paper(output="none").fit(even[:1], RUN)
    assert (with_factor._inputs(even[2]).factor == 2).all()
    without = paper(output="none", nuclei="none")
    assert without.config.needs == ("embedding",)
    without.fit(sections[:1], RUN)
    without.load_state({**without.state()[0], **networks(with_factor)}, without.state()[1])
    np.testing.assert_allclose(2 * without.predict(even[2]).mean, with_factor.predict(even[2]).mean, atol=1e-5)


def test_checklist_19_one_section_per_step_for_a_fixed_number_of_epochs(sections):
    model = paper(epochs=3, gate_epochs=2).fit(sections, RUN)
    stage1 = [row for row in model.history if "expression_loss" in row]
    stage2 = [row for row in model.history if "mse" in row]
    assert len(stage1) == 2 * 3  # epochs per section, one section after another
    assert [row["epoch"] for row in stage2] == [1, 2, 3]
    assert stage2[0]["loss"] == pytest.approx(stage2[0]["mse"] + stage2[0]["align"], rel=1e-5)


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_checklist_20_expression_in_the_section_changes_no_bit_of_its_prediction(sections, preset):
    model = create("hespotex", preset=preset, **QUICK).fit(sections[:2], RUN)
    with_expression, without = model.predict(sections[2]), model.predict(replace(sections[2], targets=None))
    assert np.array_equal(with_expression.mean, without.mean)
    assert np.array_equal(with_expression.latent, without.latent)


def test_checklist_21_a_prediction_depends_on_the_spot_and_its_graph_neighbours(fitted, sections):
    model = paper(output="none").fit(sections[:1], RUN)
    new = sections[2]
    before = model.predict(new).mean
    features = np.array(new.features)
    features[27] += 5
    changed = (model.predict(replace(new, features=features)).mean != before).any(axis=1)
    inputs = model._inputs(new)
    reached = set(inputs.edges[1][inputs.edges[0] == 27].tolist()) | {27}
    assert set(np.flatnonzero(changed).tolist()) == reached


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_checklist_22_blocks_and_whole_agree(sections, preset):
    model = create("hespotex", preset=preset, **QUICK).fit(sections[:2], RUN)
    whole = model.predict(sections[2])
    blocks = list(model.predict_blocks(sections[2], block_rows=10))
    assert [len(block.ids) for block in blocks] == [10] * 6 + [4]
    np.testing.assert_allclose(np.concatenate([block.mean for block in blocks]), whole.mean, atol=2e-5)


def scrambled(section):
    """The section with noise in place of its counts."""
    targets = section.targets
    noise = np.random.default_rng(5).poisson(50, size=targets.shape)
    return replace(section, targets=Targets(noise, noise.sum(1) + 1.0, targets.genes, targets.unit))


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_checklist_23_counts_of_the_section_to_be_predicted_change_nothing(sections, preset):
    """Leave one out: the held-out section is no argument of ``fit``, and its counts reach no prediction."""
    predictions, states = [], []
    for held_out in (sections[2], scrambled(sections[2])):
        training = [section for section in (*sections[:2], held_out) if section is not held_out]
        model = create("hespotex", preset=preset, **QUICK).fit(training, RUN)
        predictions.append(model.predict(held_out).mean)
        states.append(model.state()[0])
    assert np.array_equal(*predictions)
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_checklist_23_the_same_test_fails_where_the_section_takes_part_in_stage_one(sections):
    """As published: the expression stream sees the section to be predicted, and later targets depend on it."""
    states = []
    for held_out in (sections[2], scrambled(sections[2])):
        states.append(networks(paper().fit([held_out, *sections[:2]], RUN)))
    assert any(not np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_checklist_24_genes_come_in_the_order_of_the_model(sections):
    assert paper().fit(sections[:1], RUN).predict(sections[2]).genes == sections[0].targets.genes


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_same_seed_same_bits_other_seed_other_bits(sections, preset):
    state = torch.random.get_rng_state()
    runs = [create("hespotex", preset=preset, **QUICK).fit(sections[:2], Run(seed=s, device="cpu")) for s in (3, 3, 4)]
    one, again, other = (model.predict(sections[2]).mean for model in runs)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
