"""BART and Marian: encoders and decoders with the norm after each sublayer.

Source: Lewis et al. 2020; Junczys-Dowmunt et al. 2018.
"""

from collections.abc import Collection

from flax import nnx

from attn.nn.style import changed
from attn.nn.transformer import Mechanisms, Transformer
from attn.pretrained.foundation import EncoderDecoder
from attn.pretrained.plan import Plan, has_head, prefix_of
from attn.pretrained.rules import Rule, attention, linear, norm
from attn.pretrained.settings import Keys

_NAMES = ("q_proj", "k_proj", "v_proj", "out_proj")


def bart(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of a BART: positions are learned, in a table per stack whose first two rows are not used."""
    root, longest = prefix_of("model.", names), keys.take("max_position_embeddings")
    positions = f"learned({longest}, first=2, per_stack=True)"
    rules = [
        rule
        for stack in ("encoder", "decoder")
        for rule in (
            Rule(
                f"{root}{stack}.embed_positions.weight",
                f"model.{stack}.blocks.0.attention.mechanism.0.table",
                "t d -> t d",
            ),
            *norm(f"{root}{stack}.layernorm_embedding", f"model.{_BOTTOM[stack]}.norm"),
        )
    ]
    return _plan(keys, names, dtype, root, rules, "bart", positions)


def marian(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of a Marian: positions are sines, then cosines."""
    keys.skip("max_position_embeddings")  # the positions are computed
    if not keys.take("share_encoder_decoder_embeddings", True, hint=bool):
        raise keys.error("key 'share_encoder_decoder_embeddings': got False, must be True: no other is implemented")
    keys.expect(decoder_vocab_size=keys.take("vocab_size"))
    return _plan(keys, names, dtype, prefix_of("model.", names), [], "marian", "sinusoidal(halves=True)")


_BOTTOM = {"encoder": "source_bottom", "decoder": "answer_bottom"}


def _plan(keys, names, dtype, root, rules, style, positions) -> Plan:
    """Return the plan, given the rules of what is below the layers."""
    keys.expect(is_encoder_decoder=True, is_decoder=False, tie_word_embeddings=True)
    D, layers = keys.take("d_model"), {each: keys.take(f"{each}_layers") for each in ("encoder", "decoder")}
    keys.skip("num_hidden_layers")  # repeats encoder_layers
    has_logits = has_head(keys, names, "final_logits_bias", "ConditionalGeneration MTModel")
    settings = Transformer.settings(
        "transformer",
        width=D,
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        num_heads=keys.take("encoder_attention_heads"),
        num_decoder_heads=keys.take("decoder_attention_heads"),
        feed_forward_width=keys.take("encoder_ffn_dim"),
        decoder_feed_forward_width=keys.take("decoder_ffn_dim"),
        style=changed(
            style,
            activation=keys.activation("activation_function", "gelu"),
            embedding_scale=keys.take("scale_embedding", False, hint=bool),
            logits_bias=has_logits,
        ),
        mechanism=Mechanisms(positions, positions, "none"),
        tied_embeddings=True,
        dtype=dtype,
    )
    rules = [Rule(f"{root}shared.weight", "model.source_embed.embedding", "v d -> v d"), *rules]
    rules += [Rule("final_logits_bias", "model.logits_bias", "1 v -> v")] if has_logits else []
    for stack, count in layers.items():
        for number in range(count):
            theirs, ours = f"{root}{stack}.layers.{number}", f"model.{stack}.blocks.{number}"
            sublayers = [("self_attn", "attention"), ("encoder_attn", "cross")][: 1 + (stack == "decoder")]
            for name, part in sublayers:
                rules += attention(f"{theirs}.{name}", f"{ours}.{part}", _NAMES)
                rules += norm(f"{theirs}.{name}_layer_norm", f"{ours}.{part}_residual.norm")
            rules += linear(f"{theirs}.fc1", f"{ours}.feed_forward.expand")
            rules += linear(f"{theirs}.fc2", f"{ours}.feed_forward.contract")
            rules += norm(f"{theirs}.final_layer_norm", f"{ours}.feed_forward_residual.norm")
    vocabulary = keys.take("vocab_size")

    def build(rngs: nnx.Rngs) -> EncoderDecoder:
        return EncoderDecoder(Transformer(vocabulary, settings, rngs), has_logits=has_logits)

    shared = f"{root}shared.weight"
    embeddings = (f"{root}encoder.embed_tokens.weight", f"{root}decoder.embed_tokens.weight", "lm_head.weight")
    # Marian's positions are computed, but old files hold them.
    ignored = ("*.embed_positions.weight",) if style == "marian" else ()
    return Plan(build, rules, ignored, dict.fromkeys(embeddings, shared))
