"""Sampling of tokens from a prior."""
