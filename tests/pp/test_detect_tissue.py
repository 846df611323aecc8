from __future__ import annotations

import numpy as np
from geopandas.testing import assert_geodataframe_equal

import hespotex as hx
from hespotex.pp import _detect_tissue


def test_a_cluster_finds_the_same_tissue(section, cluster, monkeypatch):
    monkeypatch.setattr(_detect_tissue, "BLOCK_SOURCE_PX", 256)
    local = hx.pp.detect_tissue(section, copy=True, min_area_um2=1000)
    remote = hx.pp.detect_tissue(section, copy=True, min_area_um2=1000, client=cluster)
    assert_geodataframe_equal(remote, local)


def test_the_tissue_does_not_depend_on_blocks(section, monkeypatch):
    whole = hx.pp.detect_tissue(section, copy=True, min_area_um2=1000)
    monkeypatch.setattr(_detect_tissue, "BLOCK_SOURCE_PX", 96)
    assert_geodataframe_equal(hx.pp.detect_tissue(section, copy=True, min_area_um2=1000), whole)
    assert 0.2 < whole.area_um2.sum() / np.prod([800 * 0.5, 800 * 0.5]) <= 1
