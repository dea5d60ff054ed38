"""The published encoders trained thirty times as long as in configs/tape.py, for an accelerator.

attn lengths --config=configs/tape_longer.py --only=randomized_relative --output=runs/tape_longer
"""

from attn.lengths.table import Table
from configs.tape import PUBLISHED, row, table


def get_table() -> Table:
    """Every published encoding, one rate and one seed."""
    return table({name: row(positions, group="published") for name, positions in PUBLISHED.items()}, steps=60_000)
