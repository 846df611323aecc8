"""A fit that reads all expression at once looks before whether it fits into memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from hespotex import models
from hespotex.data import blockwise
from hespotex.data.section import Parts, Section
from hespotex.errors import DataValueError

DENSE = [
    "bleep",
    "hisdiff",
    "histex",
    "interpolate",
    "istar",
    "knn",
    "mlp",
    "ridge_parts",
    "stage",
    "stand",
    "tesla",
    "xfuse",
]
BLOCKWISE = ["hespotex", "mean", "ridge"]


@pytest.fixture
def section(make_section) -> Section:
    """64 spots and 6 genes."""
    section = make_section()
    xy = section.coordinates
    parts = Parts(np.arange(64), xy, sparse.eye_array(64, format="csr"), features=section.features, level="superpixel")
    return replace(section, parts=parts)


class Fitted(Exception):
    """The fit was begun."""


@pytest.fixture
def begun(monkeypatch) -> None:
    def begin(*_):
        raise Fitted

    monkeypatch.setattr("hespotex.models._base.fit_together", begin)


@pytest.mark.parametrize("name", DENSE)
def test_what_does_not_fit_is_refused_before_the_fit(name, section, begun, monkeypatch):
    model = models.create(name)
    needed = 4 * 64 * 6 * model.in_memory
    monkeypatch.setattr(blockwise, "available_bytes", lambda: needed)  # some is left for the rest
    with pytest.raises(
        DataValueError, match=rf"training '{name}': expression of 6 genes at 64 places.*n_top_genes="
    ) as caught:
        model.fit([section])
    assert ("'ridge'" in str(caught.value)) == (not model.reads_parts and model.info.task != "in-sample")
    monkeypatch.setattr(blockwise, "available_bytes", lambda: 2 * needed)
    with pytest.raises(Fitted):
        model.fit([section])


@pytest.mark.parametrize("name", BLOCKWISE)
def test_what_is_read_in_blocks_is_not(name, section, begun, monkeypatch):
    monkeypatch.setattr(blockwise, "available_bytes", lambda: 1)
    with pytest.raises(Fitted):
        models.create(name).fit([section])


def test_every_method_is_one_or_the_other():
    assert {
        name: models.create(name).in_memory > 0
        for name in models.available().index
        if models.get(name).__module__.startswith("hespotex.")
    } == {
        **dict.fromkeys(BLOCKWISE, False),
        **dict.fromkeys(DENSE, True),
    }


def test_the_settings_decide(section, begun, monkeypatch):
    monkeypatch.setattr(blockwise, "available_bytes", lambda: 1)
    with pytest.raises(DataValueError, match="training 'hespotex'.*'hespotex' as it is by default"):
        models.create("hespotex", preset="paper").fit([section])


def test_sections_add_up_where_they_are_held_together(make_section, begun, monkeypatch):
    sections = [make_section("s0"), make_section("s1", seed=1)]
    monkeypatch.setattr(blockwise, "available_bytes", lambda: int(4 * 64 * 6 * 3 / 0.79))  # just enough for one
    with pytest.raises(Fitted):
        models.create("mlp").fit(sections[:1])
    with pytest.raises(DataValueError, match="at 128 places"):
        models.create("mlp").fit(sections)


@pytest.mark.parametrize("name", [*BLOCKWISE[1:], "knn", "mlp"])
def test_what_is_said_of_a_method_is_so(name, make_planted, monkeypatch):
    """With as many rows as several blocks have, no method that is said to read blocks reads all of them at once."""
    from hespotex.data.section import Targets

    section, read = make_planted(n=20_000), []
    whole = Targets.__getitem__

    def counted(self, rows):
        found = whole(self, rows)
        read.append(len(found))
        return found

    monkeypatch.setattr(Targets, "__getitem__", counted)
    model = models.create(name, **({"max_epochs": 1} if name == "mlp" else {}))
    model.fit([section])
    assert (max(read) == section.n_obs) == (model.in_memory > 0)
