"""Scans to learn from: labelled ones, found, listed, divided and fetched; and synthetic ones."""
