"""Helpers without torch: recipes, seeds, files, checksums, processes."""
