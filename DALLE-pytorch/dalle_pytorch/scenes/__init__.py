"""Scenes drawn by code, with captions that say everything that is in them.

A scene is one or two subjects, big or small, at a place, on a background. A subject is a glyph (a digit, a letter or a
shape) in a colour, or a thing (cat, rocket, cake …) in its own colours or another; either can be made of a material.
A subject is a sticker: a white rim, about as wide as one image token, keeps its colour and the background out of the
same token. Scene `i` of a split is always the same, and is drawn at any resolution: subjects and textures lie on a
16×16 grid, so that image tokens can carry them, and every texture has a fine grain below it, on a 256×256 lattice, that
only a picture of 256 pixels shows. Tokens cannot carry the grain: the diffusion decoder has to invent it.

Some combinations of subject, colour and background never appear in training. A scene that holds one is a test scene,
or one for validation: what is chosen during development is chosen on these.
"""

from dalle_pytorch.scenes.captions import (
    change_caption,
    states_place,
    states_size,
    with_terse_caption,
    with_unplaced_caption,
    words,
)
from dalle_pytorch.scenes.drawing import draw, subject_mask, write_folder
from dalle_pytorch.scenes.scenes import MIXTURES, make_scene
from dalle_pytorch.scenes.twins import make_twins
from dalle_pytorch.scenes.world import Scene, Subject, split_of
