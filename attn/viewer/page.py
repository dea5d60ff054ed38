"""The page: one HTML document that loads nothing, and the frame that shows it in a notebook."""

import base64
import functools
import hashlib
import html
import importlib.resources
import io
import json

import numpy as np

from attn.viewer.kinds import Kind, Picture

_STATIC = importlib.resources.files("attn.viewer") / "static"
_THUMBNAILS = 400  # pixels of the picture that is shown without JavaScript
_HEIGHT = 720  # pixels of the frame in a notebook


@functools.cache
def _asset(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def document(payload: dict, title: str, kinds: list[Kind]) -> str:
    """Return the page of a payload.

    Its Content-Security-Policy forbids to load anything and to run any script but the viewer's own, by its hash.
    """
    script, style = _asset("viewer.js"), _asset("viewer.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    picture = f"data:image/png;base64,{base64.b64encode(mosaic(kinds[0])).decode()}"
    name, shown = html.escape(_printable(title) or "Attention"), html.escape(_printable(kinds[0].title))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{style}</style></head>\n"
        '<body><main id="attn-viewer"><noscript>'
        f"<h1>{name}</h1><p>Without JavaScript only this picture is shown: {shown}, one row of heads per layer, dark "
        f'is large.</p><img alt="{shown} of all heads" width="640" src="{picture}">'
        "</noscript></main>\n"
        f'<script type="application/json" id="attn-data">{as_json(payload)}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def frame(page: str, title: str) -> str:
    """Return a frame around a page, for a notebook: nothing of the page reaches the notebook, nor the reverse.

    Where the notebook is not trusted, or frames are removed, the line before it remains.
    """
    # The negative margin lets the frame cover the line.
    return (
        f'<div style="width:100%"><div style="height:1.4em;font:14px/1.4 system-ui,sans-serif">Attention maps: trust '
        "this notebook to see them.</div>"
        f'<iframe title="{html.escape(_printable(title) or "Attention", quote=True)}" '
        f'srcdoc="{html.escape(page, quote=True)}" sandbox="allow-scripts allow-downloads" loading="lazy" '
        f'style="position:relative;width:100%;height:{_HEIGHT}px;margin-top:-1.4em;border:0;background:#fff;color-scheme:normal">'
        "</iframe></div>"
    )


def as_json(payload: dict) -> str:
    """Return JSON that is safe inside of a script element: no tag and no line separator of JavaScript can occur."""
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def picture_of(picture: Picture | None) -> dict | None:
    """Return the payload of a picture, its pixels as a PNG file."""
    if picture is None:
        return None
    pixels = np.nan_to_num(picture.pixels.astype(np.float64))
    low, high = pixels.min(), pixels.max()
    pixels = (pixels - low) / ((high - low) or 1)
    height, width = pixels.shape[:2]
    return {
        "url": f"data:image/png;base64,{base64.b64encode(_png(pixels, cmap='gray')).decode()}",
        "width": width,
        "height": height,
        "grid": list(picture.grid),
        "first": picture.first,
        "rows_too": picture.rows_too,
    }


def mosaic(kind: Kind) -> bytes:
    """Return a PNG file of small pictures of the heads, one row per layer; of many, as many as fit."""
    from attn.viewer.static_pictures import thumbnail  # imported here, since it imports matplotlib

    most = max(len(layer) for layer in kind.layers)
    side = max(2, min(12, _THUMBNAILS // max(most, len(kind.layers)) - 1))
    shown = _THUMBNAILS // (side + 1)
    rows = []
    for layer in kind.layers[:shown]:
        heads = [np.pad(np.rint(thumbnail(head, side) * 7) / 7, 1) for head in layer[:shown]]
        rows.append(np.pad(np.hstack(heads), ((0, 0), (0, (min(most, shown) - len(heads)) * (side + 2)))))
    return _png(np.vstack(rows), cmap="Blues")


def _png(pixels: np.ndarray, cmap: str) -> bytes:
    from matplotlib import image  # imported here, since it takes a while

    file = io.BytesIO()
    image.imsave(file, pixels, vmin=0, vmax=1, cmap=cmap, format="png", metadata={"Software": None})
    return file.getvalue()


def _hash(text: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows exactly this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _printable(text: str) -> str:
    """Return text without lone surrogates, which UTF-8 cannot encode, and without control characters."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else " " for char in text).strip()
