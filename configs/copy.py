"""Copy strings of 1 to 32 symbols: "3 1 4 1 5" -> "3 1 4 1 5". Only the task differs from reverse.py.

python train.py --config=configs/copy.py

Training ends once the answers to 10,000 validation strings are exact with a margin, after a few hundred steps. Exact
match on 10,000 other held-out strings: benchmarks/results/default_run.json.
"""

from ml_collections import ConfigDict

from configs import reverse


def get_config() -> ConfigDict:
    """Return the config of reverse.py with another task."""
    config = reverse.get_config()
    config.task.name = "copy"
    return config
