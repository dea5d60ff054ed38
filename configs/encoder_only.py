"""An encoder-only Transformer that sorts: token t of the answer is predicted at token t of the source.

python train.py --config=configs/encoder_only.py
"""

from ml_collections import ConfigDict

from configs import reverse


def get_config() -> ConfigDict:
    """Return the config; optimizer and evaluation are those of reverse.py."""
    config = reverse.get_config()
    config.task.name = "sort"
    del config.model["num_encoder_layers"], config.model["num_decoder_layers"]
    config.model.update(name="encoder_only", num_layers=2)
    config.training.replaced_tokens = 0.0  # the model does not read the answer
    return config
