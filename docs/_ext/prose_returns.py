"""Reads the Returns section of a numpydoc docstring as prose.

Napoleon takes its first line for a type. Our types stand in the signature only, and what is returned, or
written into the object under which key, is told in words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sphinx.ext.napoleon import NumpyDocstring

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def _returns(self: NumpyDocstring, section: str) -> list[str]:
    del section
    prose = self._dedent(self._consume_to_next_section())
    if prose[:1] == [":"]:
        prose = self._dedent(prose[1:])  # what sphinx-autodoc-typehints puts there for napoleon's sake
    if len(prose) > 1 and all(line.startswith(" ") or not line for line in prose[1:]):
        prose = self._dedent(prose[1:])  # a type and what it stands for: the type is in the signature
    lines = self._format_block(":returns: ", prose)
    return [*lines, ""] if lines and lines[-1] else lines


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    del app
    NumpyDocstring._parse_returns_section = _returns
    return {"parallel_read_safe": True, "parallel_write_safe": True}
