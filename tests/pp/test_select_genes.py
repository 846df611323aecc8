import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from hespotex.data.panel import PanelSource, choose_panel
from hespotex.errors import CountsError, DataValueError, MissingKeyError
from hespotex.pp import select_genes

GENES = [f"G{number:02d}" for number in range(40)]


def section(seed: int, n: int = 60, genes: list[str] = GENES, mean: np.ndarray | None = None) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    rate = np.linspace(0.3, 8, len(genes)) if mean is None else mean
    counts = rng.negative_binomial(2, 2 / (2 + rate), size=(n, len(genes)))
    names = pd.Index([f"s{row}" for row in range(n)])
    return ad.AnnData(sparse.csr_matrix(counts, dtype=np.int32), pd.DataFrame(index=names), pd.DataFrame(index=genes))


def log_cp10k(adata: ad.AnnData) -> np.ndarray:
    counts = adata.X.toarray().astype(float)
    return np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


@pytest.mark.data
@pytest.mark.parametrize("name", ["panel_small", "panel_small_span08", "panel_1000_spots", "panel_all_genes"])
def test_checklist_08_hvg_gives_the_published_panel(data_dir, name):
    golden = np.load(data_dir / "golden" / "hespotex" / f"{name}.npz")
    sections = []
    for slide in (1, 2, 3):
        counts = golden[f"counts_slide{slide}"]
        names = pd.Index([f"s{row}" for row in range(len(counts))])
        sections.append(
            ad.AnnData(
                sparse.csr_matrix(counts.astype(np.int32)),
                pd.DataFrame(index=names),
                pd.DataFrame(index=golden["genes"]),
            )
        )
    genes = select_genes(
        sections,
        n_top=int(golden["n_top"]),
        min_spots=int(golden["min_spots_total"]),
        span=0.8 if name.endswith("span08") else 0.3,
        copy=True,
    )
    assert genes == golden["panel"].tolist()


@pytest.mark.data
@pytest.mark.parametrize("name", ["panel_small", "panel_1000_spots", "panel_all_genes"])
def test_checklist_07_panel_normalisation_is_the_published_one(data_dir, name):
    from hespotex.data.units import normalize, normalize_sparse

    golden = np.load(data_dir / "golden" / "hespotex" / f"{name}.npz")
    columns = [golden["genes"].tolist().index(gene) for gene in golden["panel"]]
    for slide in (1, 2, 3):
        counts = golden[f"counts_slide{slide}"].astype(float)
        for function in (normalize, normalize_sparse):
            values = function(counts[:, columns], counts.sum(axis=1), "log1p_cpm_panel")
            values = values.toarray() if sparse.issparse(values) else values
            np.testing.assert_allclose(values, golden[f"X_slide{slide}"], atol=1e-5)


def test_high_mean_and_most_variable_follow_their_definition():
    sections = [section(0), section(1, n=45)]
    values = [log_cp10k(adata) for adata in sections]
    means = np.mean([value.mean(axis=0) for value in values], axis=0)
    expected = sorted(np.array(GENES)[np.argsort(-means)[:7]])
    assert select_genes(sections, method="high_mean", n_top=7, copy=True) == expected

    variances = np.mean([value.var(axis=0) for value in values], axis=0)
    detected = np.concatenate([adata.X.toarray() > 0 for adata in sections]).mean(axis=0)
    variances[detected < 0.10] = -np.inf
    expected = sorted(np.array(GENES)[np.argsort(-variances)[:7]])
    assert select_genes(sections, method="most_variable", n_top=7, copy=True) == expected


def test_variance_is_that_of_raw_counts():
    sections = [section(0), section(1, n=45)]
    variances = np.mean([adata.X.toarray().var(axis=0) for adata in sections], axis=0)
    expected = sorted(np.array(GENES)[np.argsort(-variances)[:7]])
    assert select_genes(sections, method="variance", n_top=7, copy=True) == expected


@pytest.mark.parametrize("variable", [2000, 25])
def test_high_mean_and_spread_is_the_smallest_intersection_of_two_lists(variable, monkeypatch):
    monkeypatch.setattr("hespotex.data.panel.HISDIFF_VARIABLE", variable)
    sections = [section(0), section(1, n=45)]
    counts = np.concatenate([adata.X.toarray() for adata in sections])
    chosen = select_genes(sections, method="high_mean_and_spread", n_top=9, copy=True)
    assert len(chosen) == 9
    from hespotex.data.panel import _dispersed

    sources = [PanelSource(adata.X, tuple(GENES)) for adata in sections]
    ranked = np.flatnonzero(_dispersed(sources, [source.columns(GENES) for source in sources]))
    assert len(ranked) == 40 if variable == 2000 else 25 <= len(ranked) < 40
    for k in range(1, 41):
        by_mean = set(ranked[np.argsort(-counts[:, ranked].mean(axis=0), kind="stable")[:k]])
        both = by_mean & set(ranked[np.argsort(-counts[:, ranked].std(axis=0), kind="stable")[:k]])
        names = {GENES[column] for column in both}
        if len(names) >= 9:
            assert set(chosen) <= names
            assert len(names) <= 10  # the last step can add two
            break


@pytest.mark.parametrize("at_once", [512, 7])
def test_svg_finds_the_planted_pattern_and_needs_a_graph(at_once, monkeypatch):
    monkeypatch.setattr("hespotex.data.panel._GENES_AT_ONCE", at_once)
    adata = section(0, n=100)
    row, col = np.divmod(np.arange(100), 10)
    counts = adata.X.toarray()
    counts[:, [3, 17]] = np.where(row[:, None] < 5, 20, 1)
    adata.X = sparse.csr_matrix(counts)
    with pytest.raises(MissingKeyError, match=r"hx\.pp\.spatial_graph"):
        select_genes(adata, method="svg", n_top=2, copy=True)
    near = np.abs(row[:, None] - row) + np.abs(col[:, None] - col) == 1
    near[0] = near[:, 0] = False  # an island has no say
    adata.obsp["spatial_connectivities"] = sparse.csr_matrix(near.astype(float))
    assert select_genes(adata, method="svg", n_top=2, copy=True) == ["G03", "G17"]


@pytest.mark.parametrize("method", ["hvg", "high_mean", "most_variable", "variance", "high_mean_and_spread"])
def test_panel_does_not_depend_on_order_of_sections_spots_or_genes(method):
    sections = [section(0), section(1)]
    expected = select_genes(sections, method=method, n_top=9, copy=True)
    assert expected == sorted(expected)
    rng = np.random.default_rng(0)
    turned = [adata[rng.permutation(adata.n_obs)][:, rng.permutation(adata.n_vars)].copy() for adata in sections[::-1]]
    assert select_genes(turned, method=method, n_top=9, copy=True) == expected


def test_hvg_is_the_union_over_sections_and_the_filter_a_share_of_the_spots():
    sections = [section(0), section(1)]
    single = [set(select_genes(adata, n_top=8, min_spots=0, copy=True)) for adata in sections]
    both = select_genes(sections, n_top=8, min_spots=0, copy=True)
    assert set(both) == single[0] | single[1]
    detected = sum(np.asarray((adata.X > 0).sum(axis=0)).ravel() for adata in sections)
    kept = select_genes(sections, n_top=8, min_spots_fraction=0.5, copy=True)
    assert kept == [gene for gene in both if detected[GENES.index(gene)] >= 60]


def test_paper_filter_is_off_from_1100_genes():
    rare = section(0, n=100)
    counts = rare.X.toarray()
    counts[:, 5] = 0
    counts[7, 5] = 3  # one spot of 100 is below 2.4 %
    rare.X = sparse.csr_matrix(counts)
    assert "G05" not in select_genes(rare, n_top=1000, copy=True)
    assert "G05" in select_genes(rare, n_top=1100, copy=True)


def test_only_genes_counted_everywhere_are_chosen():
    first, second = section(0), section(1, genes=GENES[:30])
    counts = first.X.toarray()
    counts[:, 2] = 0
    first.X = sparse.csr_matrix(counts)
    genes = select_genes([first, second], copy=True)
    assert set(genes) <= set(GENES[:30]) - {"G02"}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_section_too_small_for_hvg_is_refused_with_advice(n):
    few = section(0, n=n, mean=np.full(40, 0.3))
    with pytest.raises(DataValueError, match=rf"section '1': method='hvg' .* {n} spots .*method='high_mean', or leave"):
        select_genes([section(1), few], n_top=5, copy=True)
    assert len(select_genes([section(1), few], method="high_mean", n_top=5, copy=True)) == 5


def test_hvg_needs_genes_that_vary():
    alike = section(0)
    alike.X = sparse.csr_matrix(np.full((60, 40), 2))
    with pytest.raises(DataValueError, match="of which 0 vary"):
        select_genes(alike, n_top=5, copy=True)


def test_interrupted_writing_leaves_no_section_with_a_panel(monkeypatch):
    sections = [section(0), section(1)]
    calls = []

    def interrupted(adata, key, **values):
        calls.append(key)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("hespotex.pp._select_genes.record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        select_genes(sections, method="high_mean", n_top=5)
    assert not any(list(adata.var) for adata in sections)


def test_a_column_of_others_is_not_replaced():
    adata = section(0)
    adata.var["mine"] = 1
    with pytest.raises(DataValueError, match=r"var\['mine'\]"):
        select_genes(adata, method="high_mean", n_top=5, key_added="mine")
    select_genes(adata, method="high_mean", n_top=5)
    select_genes(adata, method="high_mean", n_top=6)
    assert adata.var["hespotex_target"].sum() == 6


def test_writes_the_column_and_its_provenance_and_nothing_else():
    sections = [section(0), section(1)]
    before = [adata.X.copy() for adata in sections]
    assert select_genes(sections, method="high_mean", n_top=5) is None
    chosen = select_genes(sections, method="high_mean", n_top=5, copy=True)
    for adata, counts in zip(sections, before, strict=True):
        assert adata.var["hespotex_target"].dtype == bool
        assert adata.var_names[adata.var["hespotex_target"]].tolist() == chosen
        assert (counts != adata.X).nnz == 0
        assert list(adata.var) == ["hespotex_target"]
        assert not list(adata.obs)
        assert not adata.layers.keys() - {None}
        assert not adata.obsm
        assert adata.uns["hespotex"]["hespotex_target"]["params"]["method"] == "high_mean"


def test_copy_and_errors_leave_the_object_alone():
    adata = section(0)
    select_genes(adata, n_top=5, copy=True)
    normalised = adata.copy()
    normalised.X = normalised.X.astype(float) * 0.5
    for wrong, error, message in [
        ({"n_top": 0}, DataValueError, "n_top=0"),
        ({"method": "best"}, DataValueError, "possible: 'hvg'"),
        ({"min_spots": 61}, DataValueError, "panel is empty"),
        ({"min_spots_fraction": 1.5}, DataValueError, "min_spots_fraction"),
        ({"min_spots_fraction": 0.1, "min_spots": 3}, DataValueError, "not both"),
        ({"layer": "raw"}, MissingKeyError, "layer 'raw'"),
    ]:
        with pytest.raises(error, match=message):
            select_genes(adata, **wrong)
    with pytest.raises(CountsError, match="already normalised"):
        select_genes([adata, normalised])
    with pytest.raises(DataValueError, match="empty"):
        select_genes([])
    assert not list(adata.var)
    assert not adata.uns


def test_duplicate_gene_names_and_disjoint_genes_are_errors():
    adata = section(0)
    adata.var_names = [*GENES[:-1], "G00"]
    with pytest.raises(CountsError, match="G00"):
        select_genes(adata)
    with pytest.raises(DataValueError, match="share no gene"):
        select_genes([section(0), section(1, genes=[f"H{k}" for k in range(40)])])


def test_regions_of_one_table_are_sections_of_their_own():
    first, second = section(0), section(1)
    both = ad.concat([first, second], index_unique="-")
    both.obs["region"] = pd.Categorical(["a"] * 60 + ["b"] * 60)
    both.uns["spatialdata_attrs"] = {"region": ["a", "b"], "region_key": "region", "instance_key": "spot"}
    assert select_genes(both, n_top=8, copy=True) == select_genes([first, second], n_top=8, copy=True)


def test_variance_of_sparse_counts_is_exact_and_never_dense():
    adata = section(3, n=200)
    source = PanelSource(adata.X, tuple(GENES))
    from hespotex.data.panel import _variances

    np.testing.assert_allclose(_variances(source, source.columns(GENES)), log_cp10k(adata).var(axis=0), rtol=1e-5)


def test_named_layer_is_read():
    adata = section(0)
    expected = select_genes(adata, method="high_mean", n_top=5, copy=True)
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.astype(float) * 0.1
    assert select_genes(adata, method="high_mean", n_top=5, layer="counts", copy=True) == expected


def test_core_refuses_mismatched_names():
    with pytest.raises(DataValueError, match="2 names for 40 genes"):
        PanelSource(section(0).X, ("A", "B"))
    with pytest.raises(CountsError, match="no observations"):
        PanelSource(section(0).X[:0], tuple(GENES))
    with pytest.raises(DataValueError, match="at least one section"):
        choose_panel([])
