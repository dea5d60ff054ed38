"""The claims by name, in the order of the walkthrough. A new claim is a file with a `CLAIM`, and one line here."""

from attn.studies.walkthrough import (
    access,
    atoms,
    blocks,
    bottleneck,
    cross,
    heads,
    parallel,
    positions,
    reading,
    scaling,
)

CLAIMS = {
    "bottleneck": bottleneck.CLAIM,
    "access": access.CLAIM,
    "scaling": scaling.CLAIM,
    "heads": heads.CLAIM,
    "cross": cross.CLAIM,
    "positions": positions.CLAIM,
    "parallel": parallel.CLAIM,
    "reading": reading.CLAIM,
    "blocks": blocks.CLAIM,
    "atoms": atoms.CLAIM,
}
