"""Prediction of many slides: which there are, one of them, all of them, and what is noted about them."""

from __future__ import annotations
