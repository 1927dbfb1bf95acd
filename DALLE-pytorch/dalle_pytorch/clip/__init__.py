"""CLIP models, which score images against texts."""
