"""GPT-2 in small: a decoder-only Transformer of its style, with learned positions, reverses or copies strings.

python train.py --config=configs/gpt2.py
python train.py --config=configs/gpt2.py --config.task.name=copy

Both end when they are exact, after 800 and 700 steps, 18 and 16 seconds on two cores of a Zen 4, with
100.00 % of 10,000 held-out strings (seed 0; of reverse seeds 1 to 3 also 100.00 %).
"""

from ml_collections import ConfigDict

from configs import decoder_only


def get_config() -> ConfigDict:
    """Return the config: that of decoder_only.py in the style of GPT-2, on strings of 1 to 16 symbols."""
    config = decoder_only.get_config()
    config.task.max_length = 16
    config.model.update(
        style="gpt2",
        mechanism="learned(34)",  # the positions of 16 symbols, of their answer, and of an end token after each
        num_layers=2,
        feed_forward_width=256,
        tied_embeddings=True,
    )
    config.training.steps = 4_000  # at most
    return config
