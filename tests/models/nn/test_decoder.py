from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from hespotex.models import Run
from hespotex.models.hespotex.config import PAPER
from hespotex.models.hespotex.image import ImageItem, fit_image_stream
from hespotex.models.nn.decoder import ImageStream
from hespotex.models.nn.graphs import edge_index, nearest, neighbour_mean
from hespotex.models.nn.losses import alignment_loss, pearson

DTYPES = [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-10)]
BLOCKS = {"latent_head": "latent_head", "gene_head": "gene_head", "lstm": "reader"} | {
    f"neigh{i}": f"layers.{i - 1}" for i in (1, 2, 3, 4)
}


def parameter_name(recorded: str) -> str:
    """Our name of a recorded tensor."""
    for head in ("latent", "gene"):
        if recorded.startswith(f"{head}_"):
            layer, kind = recorded.removeprefix(f"{head}_").split("_")
            return f"{head}_head.{layer.replace('ln', 'norm')}.{kind}"
    if recorded.startswith("neigh"):
        return f"layers.{int(recorded[5]) - 1}.weight"
    return f"reader.lstm.{recorded.removeprefix('lstm_')}"


def recorded_name(ours: str) -> str:
    """Inverse of :func:`parameter_name`."""
    if ours.startswith("layers."):
        return f"neigh{int(ours[7]) + 1}_weight"
    for old, new in (("_head.", "_"), ("reader.lstm.", "lstm_"), ("norm", "ln"), (".", "_")):
        ours = ours.replace(old, new)
    return ours


def loaded(golden, dtype):
    weights, forward = golden("decoder_weights"), golden("decoder_forward")
    model = ImageStream(512, 20)
    model.load_state_dict({parameter_name(name): torch.tensor(weights[name]) for name in weights})
    graph = sparse.csr_array((np.ones(120), tuple(forward["adj_edges"])), shape=(30, 30))
    operator = neighbour_mean(graph, subtract_self=True)
    edges, means = torch.tensor(edge_index(operator)), torch.tensor(operator.data).to(dtype)
    return model.to(dtype), (torch.tensor(forward["u"]).to(dtype), edges, means, torch.tensor(forward["f"]).to(dtype))


def losses(golden, dtype, embedding, predicted):
    forward = golden("decoder_forward")
    align = alignment_loss(torch.tensor(forward["z"]).to(dtype), embedding)
    return align, torch.nn.functional.mse_loss(predicted, torch.tensor(forward["X"]).to(dtype))


def error(ours, theirs):
    return np.abs(ours.detach().numpy() - theirs).max()


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), DTYPES)
def test_checklist_16_forward_equals_the_published(golden, dtype, suffix, tolerance):
    recorded = golden("decoder_forward")
    model, inputs = loaded(golden, dtype)
    embedding, predicted = model(*inputs)
    steps = model.neighbourhood(embedding, inputs[1], inputs[2])
    assert error(embedding, recorded[f"e{suffix}"]) < tolerance
    assert error(model.reader(steps), recorded[f"y_gcn{suffix}"]) < tolerance
    assert error(model.gene_head(embedding), recorded[f"y_mlp{suffix}"]) < tolerance
    assert error(predicted, recorded[f"y_hat{suffix}"]) < tolerance
    assert error(model.mean(embedding, *inputs[1:3]), recorded["m"]) < 1e-5
    for number in (1, 2, 3, 4):
        assert error(steps[number - 1], recorded[f"neigh{number}_out"]) < 1e-5
    assert error(model.reader.lstm(steps)[0], recorded["lstm_out"]) < 1e-5
    align, mse = losses(golden, dtype, embedding, predicted)
    assert float(align.detach()) == pytest.approx(float(recorded[f"L_align{suffix}"]), abs=tolerance)
    assert float(mse.detach()) == pytest.approx(float(recorded[f"L_mse{suffix}"]), abs=tolerance)
    by_gene = 1 - pearson(torch.tensor(recorded["X"]).to(dtype), predicted, 0).mean()
    assert float(by_gene.detach()) == pytest.approx(float(recorded[f"L_pcc_gene{suffix}"]), abs=tolerance)


def test_checklist_17_without_the_factor_it_is_the_published_variant(golden):
    model, inputs = loaded(golden, torch.float32)
    assert error(model(*inputs[:3])[1], golden("decoder_forward")["y_hat_without_nuclei"]) < 1e-5


def test_checklist_18_gradients_equal_the_published_and_alignment_reaches_the_latent_head_only(golden):
    recorded = golden("decoder_training")
    model, inputs = loaded(golden, torch.float64)
    align, mse = losses(golden, torch.float64, *model(*inputs))
    for name, loss in (("align_only", align), ("mse_only", mse), ("total", align + mse)):
        model.zero_grad(set_to_none=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss.backward(retain_graph=True)
        for block, ours in BLOCKS.items():
            parts = [parameter.grad.flatten() for parameter in model.get_submodule(ours).parameters()]
            expected = float(recorded[f"gradnorm_{name}_{block}_f64"])
            assert float(torch.cat(parts).norm()) == pytest.approx(expected, rel=1e-10, abs=1e-14)
            if name == "align_only":
                assert (expected == 0) == (block != "latent_head")
            else:
                assert expected > 0
    gradients = dict(model.named_parameters())
    for key in recorded:
        if key.startswith("grad_"):
            name, _, rows = key.removeprefix("grad_").partition("_rows0_")
            ours = gradients[parameter_name(name)].grad[: int(rows) + 1 if rows else None]
            assert error(ours, recorded[key]) < 1e-5 * max(1.0, np.abs(recorded[key]).max())
    for name, parameter in gradients.items():
        expected = float(recorded[f"gradnorm_{recorded_name(name)}_f64"])
        assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), [(torch.float32, "", 2e-4), (torch.float64, "_f64", 1e-10)])
@pytest.mark.parametrize("steps", [1, 3])
def test_checklist_19_training_steps_equal_the_published(golden, steps, dtype, suffix, tolerance):
    recorded, forward = golden("decoder_training"), golden("decoder_forward")
    model, inputs = loaded(golden, dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    target, spots = (torch.tensor(forward[name]).to(dtype) for name in ("X", "z"))
    run = Run(device="cpu", precision="32-true" if dtype == torch.float32 else "64-true")
    fit = fit_image_stream(PAPER, torch.nn.ModuleList([model]), [ImageItem(*inputs, target, spots)], run, epochs=steps)
    assert len(fit.history) == steps
    for step, row in enumerate(fit.history):  # which keeps losses, before each step, as float32
        for name in ("align", "mse"):
            expected = recorded[f"L_{name}_before_each_step{suffix}"][step]
            assert row[name] == pytest.approx(expected, rel=1e-6, abs=max(tolerance, 1e-6))
        assert row["loss"] == pytest.approx(row["align"] + row["mse"], rel=1e-6)
    with torch.no_grad():
        embedding, predicted = model(*inputs)
        align, mse = losses(golden, dtype, embedding, predicted)
        after = {"align": align, "mse": mse, "pcc_gene": 1 - pearson(target, predicted, 0).mean()}
    assert error(predicted, recorded[f"y_hat_step{steps}{suffix}"]) < tolerance
    for name, value in after.items():
        assert float(value) == pytest.approx(float(recorded[f"L_{name}_after_step{steps}{suffix}"]), abs=tolerance)
    for block, ours in BLOCKS.items():
        moved = [
            (parameter.detach() - before[f"{ours}.{name}"]).flatten()
            for name, parameter in model.get_submodule(ours).named_parameters()
        ]
        expected = float(recorded[f"moved_step{steps}_{block}{suffix}"])
        assert float(torch.cat(moved).norm()) == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 1e-9)
    parameters = dict(model.named_parameters())
    for key in recorded:
        name = key.removesuffix(f"_step{steps}")
        if name != key and name.endswith(("weight", "bias", "l0", "l1")):
            assert error(parameters[parameter_name(name)], recorded[key]) < 2e-4


def test_checklist_11_heads_are_linear_relu_norm_linear():
    model = ImageStream(512, 33)
    for head, widths in ((model.latent_head, (512, 1024, 64)), (model.gene_head, (64, 1024, 33))):
        assert (head.fc1.in_features, head.fc1.out_features, head.fc2.out_features) == widths
        x = torch.randn(7, widths[0])
        hidden = torch.relu(x @ head.fc1.weight.T + head.fc1.bias)
        normed = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(head.train()(x), normed @ head.fc2.weight.T + head.fc2.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("genes", "lstm", "total"), [(33, 22_044, 750_205), (785, 7_608_220, 9_107_181)])
def test_worked_parameter_counts(genes, lstm, total):
    model = ImageStream(512, genes)
    assert sum(p.numel() for p in model.reader.parameters()) == lstm
    assert sum(p.numel() for p in model.parameters()) == total


def test_worked_parameter_count_of_the_tutorial():
    with torch.device("meta"):
        model = ImageStream(512, 2468)
    assert sum(p.numel() for p in model.parameters()) == 76_987_620


def test_checklist_13_four_layers_of_unit_rows_fed_by_the_patch_embedding(golden):
    model, inputs = loaded(golden, torch.float64)
    assert [tuple(layer.weight.shape) for layer in model.layers] == [(64, 128)] * 4
    assert all(name.endswith("weight") for name, _ in model.layers.named_parameters())
    embedding = model.embed(inputs[0])
    steps = model.neighbourhood(embedding, *inputs[1:3])
    torch.testing.assert_close(steps.norm(dim=2), torch.ones(4, 30, dtype=torch.float64))
    assert (steps >= 0).all()
    model.layers = torch.nn.ModuleList([model.layers[index] for index in (2, 0, 3, 1)])
    torch.testing.assert_close(model.neighbourhood(embedding, *inputs[1:3]), steps[[2, 0, 3, 1]])


def test_checklist_15_reader_is_bounded_and_averages_four_steps(golden):
    model, _ = loaded(golden, torch.float64)
    assert (model.reader.lstm.num_layers, model.reader.lstm.hidden_size) == (2, 20)
    steps = 100 * torch.randn(4, 50, 64, dtype=torch.float64)
    read = model.reader(steps)
    assert read.shape == (50, 20)
    assert (read.abs() < 1).all()
    torch.testing.assert_close(read, model.reader.lstm(steps)[0].mean(0))


def test_a_bottleneck_reader_grows_linearly_with_the_genes():
    small, large = (ImageStream(8, genes, jk_hidden=16).reader for genes in (100, 200))
    sizes = [sum(p.numel() for p in reader.parameters()) for reader in (small, large)]
    assert sizes[1] - sizes[0] == 100 * 17


@pytest.mark.parametrize("order", ["parallel", "chained"])
def test_checklist_21_what_a_prediction_depends_on(order):
    line = np.column_stack([np.arange(30) ** 1.01, np.zeros(30)])
    operator = neighbour_mean(nearest(line, 2, symmetric=True, include_self=False))
    edges, means = torch.tensor(edge_index(operator)), torch.tensor(operator.data)
    torch.manual_seed(0)
    model = ImageStream(5, 3, jk_hidden=4, order=order).double()
    x = torch.randn(30, 5, dtype=torch.float64)
    before = model(x, edges, means)[1]
    x[15] += 1
    changed = (model(x, edges, means)[1] != before).any(1).nonzero().flatten()
    reach = int((changed - 15).abs().max())
    one_hop = int(np.abs(np.flatnonzero(operator.toarray()[:, 15]) - 15).max())
    assert reach == one_hop if order == "parallel" else reach > one_hop


@pytest.mark.parametrize("order", ["parallel", "chained"])
@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_checklist_22_chunked_equals_whole_in_values_and_gradients(golden, order, chunk):
    model, inputs = loaded(golden, torch.float64)
    model.order = order
    results = []
    for size in (None, chunk):
        model.zero_grad()
        embedding, predicted = model(*inputs, chunk=size)
        sum(losses(golden, torch.float64, embedding, predicted)).backward()
        with torch.no_grad():
            torch.testing.assert_close(model(*inputs, chunk=size)[1], predicted.detach())
        results.append([embedding, predicted, *(p.grad.clone() for p in model.parameters())])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
