"""A vision Transformer in small: which digit is in a noisy black-and-white picture of 12 x 12 pixels, 16 patches?

python train.py --config=configs/vit.py

After 2,500 steps, 25 seconds on two cores of a Zen 4, it reads 99.79 % of 10,000 held-out pictures (seed 0;
seeds 1 to 3 at least 99.71 %). `attn inspect` draws the attention of the class token over
the picture. The answer is a symbol: 1 for digit 0 to 10 for digit 9.
"""

from ml_collections import ConfigDict

from configs import encoder_only


def get_config() -> ConfigDict:
    """Return the config: that of encoder_only.py with pictures, whose patches have rows and columns as positions."""
    config = encoder_only.get_config()
    config.task.update(name="digit", symbols=16, min_length=16, max_length=16)
    config.model.update(
        name="vision_transformer",
        style="vit",
        mechanism="learned_grid(4, 4)",
    )
    # Noise makes some pictures hard, so that it does not become exact with a margin.
    config.training.update(steps=2_500, stop_when_exact=0)
    return config
