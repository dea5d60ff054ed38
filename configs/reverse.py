"""Reverse strings of 1 to 32 symbols: "3 1 4 1 5" -> "5 1 4 1 3".

python train.py --config=configs/reverse.py

Training ends once the answers to 10,000 validation strings are exact with a margin, after a few hundred steps.
Exact match on 10,000 other held-out strings: benchmarks/results/default_run.json.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the config: one layer per stack, sinusoidal positions in both, Muon, until the answers are exact."""
    config = ConfigDict()
    config.task = dict(name="reverse", symbols=16, min_length=1, max_length=32)
    config.data = dict(source="generated", folder=None)  # or source="tfds": read from TFDS's folder, or from `folder`
    config.model = dict(
        name="transformer",
        width=64,
        num_heads=4,
        head_width=None,  # width / num_heads
        num_encoder_layers=1,
        num_decoder_layers=1,
        feed_forward_width=128,
        style="plain",
        mechanism="sinusoidal",
        norm=None,  # that of the style
        dropout=0.0,
        tied_embeddings=False,
        dtype="float32",
    )
    config.optimizer = dict(
        name="muon",
        learning_rate=0.035,  # of the hidden weight matrices
        rest_learning_rate=0.02,  # of embeddings, norms, biases and logits
        momentum=0.95,
        warmup_fraction=0.05,  # of `training.steps`; then the rates fall as 1 / step
        decay="inverse",
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.15,
        clip_norm=10.0,
        averaging=0.2,  # the evaluated and saved parameters are an average over about the last fifth of the steps
    )
    config.training = dict(
        seed=0,
        steps=2_000,  # at most
        stop_when_exact=10_000,  # number of validation strings that must be exact with a margin; 0 never stops early
        replaced_tokens=0.2,  # fraction of the decoder's input, so that the model learns to read the source instead
        batch_size=32,
        steps_per_call=100,
        evaluate_every=100,
        checkpoint_every=1_000,
        snapshots=16,  # steps at which the parameters are kept, to look back at training; 0 for none
    )
    config.evaluation = dict(examples=10_000, intermediate_examples=500, batch_size=500, beam_width=1, seed=0)
    return config


def with_fixed_steps(config: ConfigDict, steps: int, **optimizer) -> ConfigDict:
    """Change a config to AdamW, cosine decay and a fixed number of steps, for models that do not become exact."""
    defaults = dict(learning_rate=3e-3, warmup_fraction=0.1, decay="cosine", beta1=0.9, beta2=0.95, weight_decay=0.0)
    config.optimizer = dict(name="adamw", **(defaults | optimizer), clip_norm=10.0)
    config.training.update(steps=steps, stop_when_exact=0, replaced_tokens=0.0, evaluate_every=steps // 4)
    return config
