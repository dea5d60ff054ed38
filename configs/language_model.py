"""A language model of palindromes: it learns whole strings, without a source, and continues their first halves.

python train.py --config=configs/language_model.py
"""

from ml_collections import ConfigDict

from configs import decoder_only


def get_config() -> ConfigDict:
    """Return the config of decoder_only.py on palindromes of up to 32 symbols."""
    config = decoder_only.get_config()
    config.task.update(name="palindrome", max_length=16)
    config.training.replaced_tokens = 0.0  # the mirror image of a replaced symbol could not be known
    return config
