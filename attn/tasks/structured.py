"""Sources with structure, made of drawn symbols: strings whose masked symbols can be restored, and pictures of digits.

All is a pure function of the drawn symbols: where a choice is random, a hash of them makes it.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from attn.functional.hashing import mix
from attn.tasks.held_out import hash_of

_STEP = np.uint32(0x9E3779B9)  # between the inputs of hashes of one string, which then have nothing in common
PATCHES_PER_ROW, PATCH_SIDE = 4, 3  # of pictures; the side is in pixels
NUM_PATCHES = 1 << PATCH_SIDE**2  # different black-and-white patches
_NOISE = 16  # one pixel of so many is inverted
_GLYPHS = """
..###.. ...##.. .#####. ######. ##..##. ####### ...###. ####### .#####. .#####.
.##.##. ..###.. ##...## .....## ##..##. ##..... ..##... .....## ##...## ##...##
##...## .####.. .....## .....## ##..##. ##..... .##.... ....##. ##...## ##...##
##...## ...##.. ....##. .....## ##..##. ######. ##..... ...##.. .##.##. ##...##
##...## ...##.. ...##.. ..####. ####### .....## ######. ...##.. ..###.. .######
##...## ...##.. ..##... .....## ....##. .....## ##...## ..##... .##.##. .....##
##...## ...##.. .##.... .....## ....##. .....## ##...## ..##... ##...## ....##.
.##.##. ...##.. ##..... .....## ....##. ##..##. ##...## .##.... ##...## ...##..
..###.. ...##.. ####### ######. ....##. .####.. .#####. .##.... .#####. .###...
"""
# [10 9 7], True where there is ink.
GLYPHS = np.array([[list(row) for row in line.split()] for line in _GLYPHS.split("\n")[1:-1]]).swapaxes(0, 1) == "#"


def interleaved(symbols: Int[Array, "d"], num_symbols: int) -> Int[Array, "n"]:
    """Return the drawn symbols with the sum of its two neighbours, modulo V, between any two: n = 2 d - 1 symbols."""
    t = jnp.arange(2 * len(symbols) - 1)
    left, right = symbols[t // 2], symbols[(t + 1) // 2]
    return jnp.where(t % 2 == 0, left, 1 + (left + right - 1) % num_symbols)  # 1..V, so that V stands for 0


def with_masks(symbols: Int[Array, "d"], length: Int[Array, ""] | int, num_symbols: int) -> Int[Array, "n"]:
    """Return the interleaved symbols with about half of the sums masked, as symbol V + 1.

    Both neighbours of a masked sum are visible. From the left alone nothing is known of it, since its right neighbour
    was drawn independently of all that stands to the left; in the same way nothing is known from the right alone.
    A sum at the end of the string is never masked, since its right neighbour is not in the string.
    """
    t = jnp.arange(2 * len(symbols) - 1)
    is_chosen = mix(hash_of(symbols) + t.astype(np.uint32) * _STEP) % 2 == 1
    is_masked = is_chosen & (t % 2 == 1) & (t < length - 1)
    return jnp.where(is_masked, num_symbols + 1, interleaved(symbols, num_symbols))


def digit(symbols: Int[Array, "n"]) -> UInt32[Array, ""]:
    """Return the digit 0..9 in the picture of a string."""
    return _appearance(symbols)[0]


def patches(symbols: Int[Array, "n"]) -> Int[Array, "n"]:
    """Return the patches of the picture of a string, as symbols: 1 + the number whose bits are the pixels of a patch.

    The lowest bit is the first pixel; patches and their pixels are in the order in which one reads. The picture is
    12 pixels wide. 16 patches are a square, in which the digit stands anywhere; fewer are the beginning of the picture,
    and further ones have no ink. Noise inverts one pixel of 16. So two strings rarely have the same picture: of a
    million held-out pictures of 16 patches about 5 are among 80,000 of training.
    """
    _, top, left = appearance = _appearance(symbols)
    patch, pixel = jnp.arange(len(symbols))[:, None], jnp.arange(PATCH_SIDE**2)
    y = PATCH_SIDE * (patch // PATCHES_PER_ROW) + pixel // PATCH_SIDE  # [n 9]
    x = PATCH_SIDE * (patch % PATCHES_PER_ROW) + pixel % PATCH_SIDE
    ink = _ink(appearance[0], y - top.astype(y.dtype), x - left.astype(x.dtype))
    number = patch * PATCH_SIDE**2 + pixel + 1  # of the pixel; 0 is for the appearance
    noise = mix(hash_of(symbols) + number.astype(np.uint32) * _STEP) % _NOISE == 0
    return 1 + jnp.sum((ink ^ noise) << pixel, axis=1).astype(symbols.dtype)


def _appearance(symbols: Int[Array, "n"]) -> tuple[UInt32[Array, ""], UInt32[Array, ""], UInt32[Array, ""]]:
    """Return the digit, and the row and the column of its upper left corner."""
    count, height, width = GLYPHS.shape
    side = PATCHES_PER_ROW * PATCH_SIDE
    tops, lefts = side - height + 1, side - width + 1
    number = mix(hash_of(symbols)) % np.uint32(count * tops * lefts)
    return number % count, number // count % tops, number // (count * tops)


def _ink(digit: UInt32[Array, ""], y: Int[Array, "n p"], x: Int[Array, "n p"]) -> Bool[Array, "n p"]:
    """Return whether there is ink at these pixels of a digit's glyph; there is none around it."""
    _, height, width = GLYPHS.shape
    is_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return jnp.asarray(GLYPHS)[digit, jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)] & is_inside
