"""Published formats into our classes: sizes are read off the weights, and parameters renamed, here and nowhere else.

Every `load_` function opens a native folder as well. All of them raise `CheckpointError` with one line that names the
file and what is wrong with it; files are read by `foreign`, which runs nothing in them.
"""

from dalle_pytorch.published.clip import load_clip, load_trainable_clip
from dalle_pytorch.published.dalle import load_dalle
from dalle_pytorch.published.load import UnknownFormatError, open_published
from dalle_pytorch.published.vaes import load_discrete_vae, read_openai_dvae, read_vqgan

__all__ = [
    "UnknownFormatError",
    "load_clip",
    "load_dalle",
    "load_discrete_vae",
    "load_trainable_clip",
    "open_published",
    "read_openai_dvae",
    "read_vqgan",
]
