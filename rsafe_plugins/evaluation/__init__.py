"""Labelled data in, metrics out."""
