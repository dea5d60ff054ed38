"""An encoder-only Transformer that sorts: each token of the answer is written where one of the source stands.

python train.py --config=configs/encoder_only.py
"""

from ml_collections import ConfigDict

from configs import reverse


def get_config() -> ConfigDict:
    """Optimizer and evaluation are those of reverse.py."""
    config = reverse.get_config()
    config.task.name = "sort"
    del config.model["num_encoder_layers"], config.model["num_decoder_layers"]
    config.model.update(name="encoder_only", num_layers=2)
    config.training.replaced_tokens = 0.0  # it reads no answer
    return config
