from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from hespotex import models
from hespotex.errors import DataTypeError, DataValueError
from hespotex.models import _registry
from hespotex.models.mean import Mean
from hespotex.models.ridge import Ridge, RidgeConfig

BASELINES = ("ridge", "mlp", "knn", "mean")


def test_names_and_suggestion():
    assert models.get("ridge") is Ridge
    with pytest.raises(DataValueError, match="did you mean 'ridge'"):
        models.get("rigde")
    table = models.available()
    assert {*BASELINES, "hespotex"} <= set(table.index)
    assert table.loc["ridge", "needs"] == "embedding"


def test_config_from_instance_mapping_and_options():
    assert models.create("ridge", penalties=[2]).config.penalties == (2.0,)
    assert models.create("ridge", config={"score_rows": 5}, penalties=[2]).config == RidgeConfig((2.0,), score_rows=5)
    assert models.create("ridge", config=RidgeConfig(score_rows=5)).config.score_rows == 5
    assert models.create("ridge", preset="default").config == RidgeConfig()
    with pytest.raises(DataValueError, match="no option 'alpha'; it has components, penalties"):
        models.create("ridge", alpha=1.0)
    with pytest.raises(DataTypeError, match="RidgeConfig"):
        models.create("ridge", config=3)
    with pytest.raises(DataValueError, match="either preset= or config="):
        models.create("ridge", preset="default", config={})
    with pytest.raises(DataValueError, match="preset='paper' is unknown"):
        models.create("ridge", preset="paper")


def test_third_party_models_come_through_entry_points(monkeypatch, trio, tmp_path):
    @dataclass(frozen=True)
    class DoubleConfig:
        factor: float = 2.0

    class Double(Mean):
        Config: ClassVar[type] = DoubleConfig
        info = replace(Mean.info, name="double")

        def predict_blocks(self, section, *, block_rows=8192):
            for block in super().predict_blocks(section, block_rows=block_rows):
                yield replace(block, mean=self.config.factor * block.mean)

    class Point:
        name = "double"

        def load(self):
            return Double

    monkeypatch.setattr(_registry, "entry_points", lambda group: [Point()] if group == "hespotex.models" else [])
    monkeypatch.setattr(_registry, "_REGISTERED", dict(_registry._REGISTERED))
    assert "double" in models.available().index
    model = models.create("double", factor=3.0).fit(trio)
    model.save(tmp_path / "m")
    expected = 3 * models.create("mean").fit(trio).predict(trio[0]).mean
    np.testing.assert_allclose(models.load(tmp_path / "m").predict(trio[0]).mean, expected)


@pytest.mark.parametrize("name", BASELINES)
def test_test_counts_change_nothing(name, make_planted, trio):
    options = {"mlp": {"hidden": [8], "max_epochs": 2}}.get(name, {})
    model = models.create(name, **options).fit(trio)
    test = make_planted("new", seed=7)
    noise = np.random.default_rng(0).poisson(5, size=test.targets.shape)
    scrambled = replace(test, targets=replace(test.targets, counts=noise))
    np.testing.assert_array_equal(model.predict(test).mean, model.predict(scrambled).mean)
    np.testing.assert_array_equal(model.predict(test).mean, model.predict(replace(test, targets=None)).mean)


def test_models_need_no_scverse_package():
    code = (
        "import sys\n"
        "for name in ('anndata', 'scanpy', 'squidpy', 'spatialdata'): sys.modules[name] = None\n"
        "from hespotex import models\n"
        "import hespotex.models.ridge, hespotex.models.mlp, hespotex.models.knn, hespotex.models.mean\n"
        "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules and 'lightning' not in sys.modules\n"
        "import hespotex.models.hespotex\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
