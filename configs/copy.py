"""Copy strings of 1 to 32 symbols: "3 1 4 1 5" -> "3 1 4 1 5". All but the task is as in reverse.py.

python train.py --config=configs/copy.py
"""

from ml_collections import ConfigDict

from configs import reverse


def get_config() -> ConfigDict:
    """The settings of reverse.py with another task."""
    config = reverse.get_config()
    config.task.name = "copy"
    return config
