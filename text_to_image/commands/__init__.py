"""The commands: arguments in, one call of the pipeline, files out. `python -m text_to_image` lists them."""
