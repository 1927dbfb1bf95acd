"""Priors: models of image tokens given text."""
