"""Regions and labels from expression on a fine grid: pure functions on arrays."""
