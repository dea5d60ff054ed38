"""A language model: strings without a source, palindromes, learned token by token and continued from their first half.

python train.py --config=configs/language_model.py
"""

from ml_collections import ConfigDict

from configs import decoder_only


def get_config() -> ConfigDict:
    """The model of decoder_only.py on palindromes of up to 32 symbols."""
    config = decoder_only.get_config()
    config.task.update(name="palindrome", max_length=16)
    config.training.replaced_tokens = 0.0  # a symbol that is replaced cannot be mirrored
    return config
