"""The published encoders trained thirty times as long as in configs/tape.py, for an accelerator.

attn lengths --config=configs/tape_longer.py --only=randomized_relative --output=runs/tape_longer
"""

from attn.studies.lengths.study import Study
from configs.tape import PUBLISHED, row, study


def get_study() -> Study:
    """Return every published encoding, with one learning rate and one seed."""
    return study({name: row(mechanism, group="published") for name, mechanism in PUBLISHED.items()}, steps=60_000)
