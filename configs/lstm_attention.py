"""An LSTM whose decoder attends to all states of the encoder, by additive attention. All else is as in lstm.py.

python train.py --config=configs/lstm_attention.py
python train.py --config=configs/lstm_attention.py --config.model.attention=multiplicative --config.model.width=66

Width 59 gives it the parameter count of configs/reverse.py to within 1 % (87,556 and 86,848), and so does width 66 with
multiplicative attention (87,120).

On two CPU cores: 27 seconds from start to final line, exact match 99.96 % of 10,000 held-out strings; multiplicative 18
seconds, 99.80 % (seed 0).
"""

from ml_collections import ConfigDict

from configs import lstm


def get_config() -> ConfigDict:
    """Return the config of lstm.py with attention and equally many parameters."""
    config = lstm.get_config()
    config.model.update(attention="additive", width=59)
    return config
