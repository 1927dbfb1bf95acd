"""Data sets of images with captions: folders, WebDataset shards, caches of image tokens."""
