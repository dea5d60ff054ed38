"""An encoder-only Transformer that sorts: it writes each token of the answer at the same place of the source.

python train.py --config=configs/encoder_only.py

After 2,000 steps, a minute on two cores of a Zen 3, it sorts 99.97 % of 10,000 held-out strings exactly.
"""

from ml_collections import ConfigDict

from configs import reverse


def get_config() -> ConfigDict:
    """Return the config: optimizer and evaluation are those of reverse.py."""
    config = reverse.get_config()
    config.task.update(name="sort", max_length=16)
    del config.model["num_encoder_layers"], config.model["num_decoder_layers"]
    config.model.update(name="encoder_only", num_layers=2, feed_forward_width=256)
    config.training.replaced_tokens = 0.0  # it reads no answer
    return config
