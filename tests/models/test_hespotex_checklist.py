"""The statements of HESpotEx's faithfulness checklist that concern the whole model; the others stand beside the parts.

01–06, 11–19, 21, 22 on the networks: ``nn/``. 07 and 08, through ``pp``: ``pp/test_select_genes.py``.
09: ``image/test_patches.py``. 10: ``encoders/test_open_clip.py``. 24: ``tl/test_train_predict.py``.
25: ``metrics/test_scores.py``.
"""

from __future__ import annotations

from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.data.panel import PanelSource, choose_panel
from hespotex.data.section import Targets
from hespotex.data.splits import Fold
from hespotex.data.units import normalize
from hespotex.models import Run, create
from hespotex.models.hespotex import HESpotEx
from hespotex.models.hespotex import model as model_module
from hespotex.models.hespotex.expression import spot_embeddings
from hespotex.models.hespotex.inputs import gate_edges
from hespotex.models.nn.gate import GATE
from hespotex.models.nn.graphs import edge_index, nearest
from hespotex.tl._cross_validate import _choose
from hespotex.tl._protocol import cross_validate_sections

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
    """The section with noise in place of its counts, some genes absent."""
    targets, rng = section.targets, np.random.default_rng(5)
    noise = rng.poisson(rng.gamma(0.5, 20, size=targets.shape[1]), size=targets.shape)
    noise[:, ::5] = 0
    return replace(section, targets=Targets(noise, noise.sum(1) + 1.0, targets.genes, targets.unit))


@pytest.fixture(scope="module")
def cohort(make_section):
    return [make_section(f"s{i}", seed=i, n_genes=24) for i in range(3)]


@pytest.fixture
def fold_result(monkeypatch):
    """All that a fold fits on training sections, the first section being the one that is predicted."""

    def fit(sections, train, **options):
        streams = []

        def recording(config, pairs, run, *, gate):
            embeddings, fitted = spot_embeddings(config, pairs, run, gate=gate)
            weights = {name: tensor.numpy().copy() for name, tensor in gate.state_dict().items()}
            spots = [embedding.numpy().copy() for embedding in embeddings[-2:]]
            streams.append({"gate": weights, "spots": spots, "losses": fitted.history})
            return embeddings, fitted

        monkeypatch.setattr(model_module, "spot_embeddings", recording)
        result = cross_validate_sections(
            sections,
            {"hespotex": lambda: create("hespotex", **options)},
            [Fold("first", np.array(train), np.array([0]))],
            panel=lambda training: _choose(training, "hvg", 8),
            unit="log1p_cpm_panel",
            run=RUN,
            nulls=False,
        )
        (fold,), (stream,) = result.folds, streams
        model = fold.models["hespotex"]
        return {
            "panel": fold.genes,
            **stream,
            "state": model.state(),
            "epochs": [row for row in model.history if "mse" in row],
            "prediction": result.predictions["hespotex", 0].mean,
        }

    return fit


HELD_OUT = [
    {"preset": "default", **QUICK, "epochs": 3, "stopping": "inner", "n_members": 1, "width": 16, "head_width": 16},
    {"preset": "paper", **QUICK},
]


def differing(one, other):
    """Names of the parts that are not equal in every bit."""
    return {name for name in one if joblib.hash(one[name]) != joblib.hash(other[name])}


@pytest.mark.parametrize("options", HELD_OUT, ids=["default, inner stopping", "paper"])
def test_checklist_23_counts_of_the_section_to_be_predicted_change_nothing(cohort, fold_result, options):
    """Panel, expression stream, chosen epochs, fitted state and prediction of a fold, in every bit."""
    held_out, *training = cohort
    clean = fold_result(cohort, [1, 2], **options)
    assert differing(clean, fold_result([scrambled(held_out), *training], [1, 2], **options)) == set()
    assert len(clean["panel"]) < 24
    if options["preset"] == "default":
        assert all("val_mse" in row for row in clean["epochs"])


@pytest.mark.parametrize("options", HELD_OUT, ids=["default, inner stopping", "paper"])
def test_checklist_23_the_same_test_fails_where_the_section_takes_part_in_the_fit(cohort, fold_result, options):
    """As published, panel and expression stream see it: then even the spot embeddings of *others* depend on it."""
    results = [
        fold_result([*cohort, replace(seen, name="again")], [3, 1, 2], **options)
        for seen in (cohort[0], scrambled(cohort[0]))
    ]
    assert differing(*results) == set(results[0])


@pytest.mark.data
@pytest.mark.parametrize("name", ["panel_small", "panel_small_span08", "panel_1000_spots", "panel_all_genes"])
def test_checklist_08_genes_of_each_slide_and_their_union_are_the_published(golden, name):
    recorded = golden(name)
    options = {"n_top": int(recorded["n_top"]), "span": 0.8 if name.endswith("span08") else 0.3}
    sources = [
        PanelSource(sparse.csr_array(recorded[f"counts_slide{slide}"].astype(np.int32)), tuple(recorded["genes"]))
        for slide in (1, 2, 3)
    ]
    for slide, source in zip((1, 2, 3), sources, strict=True):
        assert choose_panel([source], min_spots=0, **options) == tuple(recorded[f"hvg_slide{slide}"])
    assert choose_panel(sources, min_spots=0, **options) == tuple(recorded["hvg_union"])
    panel = choose_panel(sources, min_spots=int(recorded["min_spots_total"]), **options)
    assert panel == tuple(recorded["panel"])
    for slide, source in zip((1, 2, 3), sources, strict=True):
        targets = Targets(source.columns(panel).tocsr(), source.total, panel, "log1p_cpm_panel")
        np.testing.assert_allclose(targets[:], recorded[f"X_slide{slide}"], atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_same_seed_same_bits_other_seed_other_bits(sections, preset):
    state = torch.random.get_rng_state()
    runs = [create("hespotex", preset=preset, **QUICK).fit(sections[:2], Run(seed=s, device="cpu")) for s in (3, 3, 4)]
    one, again, other = (model.predict(sections[2]).mean for model in runs)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
