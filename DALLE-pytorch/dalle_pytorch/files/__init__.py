"""Files: atomic writes, images, tokens, downloads."""
