"""The attention viewer: one self-contained page, or a picture, of anyone's attention weights, masks and scores.

`viewer/` has the TypeScript that the page runs; its compiled form is in `static/`.
"""

from attn.viewer.kinds import Axis, Kind, Picture
from attn.viewer.view import View, view

__all__ = ["Axis", "Kind", "Picture", "View", "view"]
