"""Other projects' checkpoints into our classes: sizes are read off the weights, and parameters renamed.

Every `load_` function opens a native folder as well, and returns a model in evaluation mode on the CPU. All of them
raise `CheckpointError`, one line that names the file. Files are read by `unpickler`, which runs no code from them.
"""
