"""Images as streams, their colours and dense features; arrays in, arrays out."""

from __future__ import annotations
