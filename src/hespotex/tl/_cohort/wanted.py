"""What a call asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.provenance import digest
from .manifest import Row
from .one import Format, Job
from .slides import SlideState, printable
from .written import Written

__all__ = ["WORK", "Wanted"]

WORK = ".hespotex"  # folder in `out` of what is not finished
_CONTENT = 1  # of results; raised when the same slide, model and options give another result
_DETERMINING = ("table_key", "shapes_key", "image_key", "mpp", "genes", "key_added")  # the result, but for the model's


@dataclass(frozen=True)
class Wanted:
    """What a result in the folder has to be made of."""

    out: Path
    format: Format
    model: str
    overwrite: bool
    shared: dict[str, Any]

    @property
    def options(self) -> str:
        """What else determines the numbers, for people and for comparison."""
        determining = {name: self.shared[name] for name in _DETERMINING}
        given = {name: value for name, value in (determining | self.shared["options"]).items() if value is not None}
        return json.dumps(given | {"format": self.format}, sort_keys=True, default=str)

    def result(self, slide: Path, state: SlideState) -> Written:
        """What the result of a slide will say of itself."""
        about = [state.size, state.mtime_ns, state.fingerprint, *([state.store] if state.store else [])]
        return Written(
            identity=digest(_CONTENT, about, self.model, self.options),
            model=self.model,
            options=self.options,
            file=printable(slide.name),
            size=state.size,
            fingerprint=state.fingerprint,
        )

    def job(self, row: Row, path: Path, result: Written, staging: Path, *, replaces: bool) -> Job:
        """The work on a slide."""
        return Job(
            slide=row.slide,
            path=str(path),
            output=str(self.out / row.output),
            work=str(self.out / WORK / "slides" / row.output),
            staging=str(staging),
            result=result,
            replace=replaces,
            format=self.format,
            **self.shared,
        )
