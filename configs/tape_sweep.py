"""The published encoders in a full sweep: three learning rates, ten seeds, every length, 512 strings of each.

attn lengths --config=configs/tape_sweep.py --output=runs/tape_sweep

For an accelerator: 540 models of 100,000 steps. Rates and steps are ours, since the published code does not have them.
A row has one rate; the tables show the best of its seeds.
"""

import dataclasses

from attn.studies.lengths.study import Study
from configs.tape import PUBLISHED, row, study

_RATES = (1e-4, 3e-4, 1e-3)


def get_study() -> Study:
    """Return every published encoding with every learning rate."""
    rows = {
        f"{name}_{rate:g}": dataclasses.replace(row(mechanism, seeds=10), config={"optimizer": {"learning_rate": rate}})
        for name, mechanism in PUBLISHED.items()
        for rate in _RATES
    }
    return study(rows, steps=100_000, beyond=tuple(range(41, 501)), each=512)
