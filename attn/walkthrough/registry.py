"""The claims by name, in the order of the walkthrough. A new claim is one file with a `CLAIM`, and one line here."""

from attn.walkthrough import access, positions, reading, scaling

CLAIMS = {
    "access": access.CLAIM,
    "scaling": scaling.CLAIM,
    "positions": positions.CLAIM,
    "reading": reading.CLAIM,
}
