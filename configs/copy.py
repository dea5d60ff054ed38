"""Copy strings of 1 to 32 symbols: "3 1 4 1 5" -> "3 1 4 1 5". All but the task is as in reverse.py.

python train.py --config=configs/copy.py

On two CPU cores: 19 seconds from start to final line, exact match 100.00 % of 10,000 held-out strings
(seeds 0, 1 and 2; benchmarks/results/default_run.json).
"""

from ml_collections import ConfigDict

from configs import reverse


def get_config() -> ConfigDict:
    """The settings of reverse.py with another task."""
    config = reverse.get_config()
    config.task.name = "copy"
    return config
