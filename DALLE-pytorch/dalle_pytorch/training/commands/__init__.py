"""The training commands: arguments in, one training, a native folder out."""
