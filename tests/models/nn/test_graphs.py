from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from hespotex.errors import DataValueError
from hespotex.models.nn.graphs import edge_index, nearest, neighbour_mean, ring, truncated, with_self_loops

LAYOUTS = ["hex", "square", "random", "hex_jitter", "gate30"]
UNTIED = ["random", "hex_jitter", "gate30"]


def gate_graph(xy, region=None):
    return nearest(xy, 7, region=region, symmetric=True, include_self=True)


def decoder_graph(xy, region=None):
    return nearest(truncated(xy), 4, region=region, symmetric=False, include_self=False)


def pairs(edges):
    return set(map(tuple, np.asarray(edges).T.tolist()))


@pytest.mark.parametrize("layout", UNTIED)
def test_checklist_05_gate_graph_equals_the_published(golden, layout):
    recorded = golden("graphs")
    ours = edge_index(gate_graph(recorded[f"{layout}_xy"]))
    assert pairs(ours) == pairs(recorded[f"{layout}_gate_edges"])


@pytest.mark.parametrize("layout", UNTIED)
def test_checklist_12_decoder_graph_equals_the_published(golden, layout):
    recorded = golden("graphs")
    source, target = edge_index(decoder_graph(recorded[f"{layout}_xy"]))
    assert pairs([target, source]) == pairs(recorded[f"{layout}_adj_edges"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoder_graph_takes_the_smallest_distances_even_where_they_tie(golden, layout):
    recorded = golden("graphs")
    xy = truncated(recorded[f"{layout}_xy"])
    graph = decoder_graph(recorded[f"{layout}_xy"])
    targets, sources = edge_index(graph)[1], edge_index(graph)[0]
    distance = np.linalg.norm(xy[targets] - xy[sources], axis=1).reshape(len(xy), 4)
    np.testing.assert_allclose(np.sort(distance, axis=1), recorded[f"{layout}_adj_sorted_distance"], atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gate_graph_on_lattices_holds_every_nearer_spot_and_none_beyond_the_seventh(golden, layout):
    xy = golden("graphs")[f"{layout}_xy"]
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    seventh = np.sort(distance, axis=1)[:, 7]
    graph = gate_graph(xy).toarray() > 0
    assert (graph == graph.T).all()
    assert graph.diagonal().all()
    assert graph[distance < seventh[:, None] - 1e-9].all()
    assert not graph[distance > np.maximum(seventh[:, None], seventh[None]) + 1e-9].any()


def test_checklist_12_no_self_loop_four_each_directed():
    graph = decoder_graph(np.random.default_rng(0).uniform(0, 1000, size=(50, 2)))
    assert (np.diff(graph.indptr) == 4).all()
    assert graph.diagonal().sum() == 0
    assert abs(graph - graph.T).sum() > 0


def test_checklist_05_regions_are_never_joined():
    rng = np.random.default_rng(0)
    xy, region = rng.uniform(0, 10, size=(40, 2)), rng.permutation(np.repeat([3, 7], 20))
    for graph in (gate_graph(xy, region), decoder_graph(xy * 100, region)):
        source, target = edge_index(graph)
        assert (region[source] == region[target]).all()


def test_a_region_alone_has_the_graph_it_has_among_others():
    rng = np.random.default_rng(1)
    xy, region = rng.uniform(0, 10, size=(30, 2)), np.repeat([0, 1], 15)
    both = gate_graph(xy, region).toarray()
    np.testing.assert_array_equal(both[15:, 15:], gate_graph(xy[15:]).toarray())


def test_ties_are_broken_by_the_lower_index():
    around = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=float)
    graph = nearest(around, 2, symmetric=False, include_self=False)
    assert graph.indices[:2].tolist() == [1, 2]


def test_coincident_spots_have_neighbours_other_than_themselves():
    graph = nearest(np.zeros((30, 2)), 4, symmetric=False, include_self=False)
    assert graph.diagonal().sum() == 0
    assert (np.diff(graph.indptr) == 4).all()


def test_truncation_is_towards_zero():
    assert truncated(np.array([[1.9, -1.9]])).tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("n", [1, 4])
def test_fewer_spots_than_neighbours_is_an_error(n):
    with pytest.raises(DataValueError, match=f"{n} observations, too few for 4"):
        decoder_graph(np.arange(2 * n, dtype=float).reshape(n, 2))


def test_one_small_region_among_large_is_an_error():
    region = np.array([0] * 10 + [1] * 3)
    with pytest.raises(DataValueError, match="3 observations"):
        decoder_graph(np.random.default_rng(0).uniform(size=(13, 2)) * 100, region)


def test_coordinates_that_are_not_finite_are_an_error():
    with pytest.raises(DataValueError, match="not finite"):
        nearest(np.array([[0, 0], [np.nan, 1]]), 1, symmetric=False, include_self=False)


def star():
    return sparse.csr_array(np.array([[0, 1, 1, 1, 1], *([[1, 0, 0, 0, 0]] * 4)]))


def test_checklist_14_worked_neighbour_means():
    graph = nearest(np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]), 4, symmetric=False, include_self=False)
    e = np.array([1.0, 2, 3, 4, 5])
    assert (neighbour_mean(graph, subtract_self=True) @ e)[0] == pytest.approx(13 / 3, abs=1e-12)
    assert (neighbour_mean(graph) @ e)[0] == pytest.approx(3.5, abs=1e-12)


def test_legacy_subtraction_needs_two_neighbours():
    with pytest.raises(DataValueError, match="legacy_self_subtraction=False"):
        neighbour_mean(star(), subtract_self=True)


def test_mean_ignores_values_and_self_loops_and_stays_on_lonely_spots():
    graph = sparse.csr_array(np.array([[9.0, 0.2, 0], [7.0, 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(neighbour_mean(graph).toarray(), [[0, 1, 0], [1, 0, 0], [0, 0, 1]])


def test_edge_index_is_source_then_target():
    graph = sparse.csr_array(([1.0], ([2], [0])), shape=(3, 3))  # spot 2 receives from spot 0
    assert edge_index(graph).tolist() == [[0], [2]]


def test_self_loops_are_added_once():
    graph = with_self_loops(sparse.csr_array(np.array([[5.0, 2.0], [0.0, 0.0]])))
    np.testing.assert_array_equal(graph.toarray(), [[1, 1], [0, 1]])


def lattice(side, steps):
    n = side * side
    matrix = sparse.lil_array((n, n))
    for row in range(side):
        for column in range(side):
            for down, right in steps:
                if 0 <= row + down < side and 0 <= column + right < side:
                    matrix[row * side + column, (row + down) * side + column + right] = 1
    return sparse.csr_array(matrix)


def test_ring_adds_the_diagonals_of_a_square_lattice_and_nothing_to_a_hexagonal_one():
    straight = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    diagonal = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    np.testing.assert_array_equal(ring(lattice(5, straight)).toarray(), lattice(5, straight + diagonal).toarray())
    sheared = lattice(5, [*straight, (1, -1), (-1, 1)])
    np.testing.assert_array_equal(ring(sheared).toarray(), sheared.toarray())
