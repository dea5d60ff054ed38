"""BART and Marian: encoders and decoders with the norm after each sublayer.

Source: Lewis et al. 2020; Junczys-Dowmunt et al. 2018.
"""

from collections.abc import Collection, Mapping

import jax.numpy as jnp
from flax import nnx

from attn.nn.style import changed
from attn.nn.transformer import Mechanisms, Transformer, TransformerSettings
from attn.pretrained.foundation import EncoderDecoder
from attn.pretrained.plan import Plan, any_begins, prefix_of
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
    return _plan(keys, names, dtype, prefix_of("model.", names), [], "marian", "sinusoidal(halves=True)")


_BOTTOM = {"encoder": "source_bottom", "decoder": "answer_bottom"}


def _plan(keys, names, dtype, root, rules, style, positions) -> Plan:
    """Return the plan, given the rules of what is below the layers."""
    keys.expect(is_encoder_decoder=True, is_decoder=False)
    D, stacks = keys.take("d_model"), ("encoder", "decoder")
    layers = {each: keys.layers(f"{each}_layers", most=len(names)) for each in stacks}
    keys.skip("num_hidden_layers")  # repeats encoder_layers
    heads = {"bart": ("BartModel", "BartForConditionalGeneration"), "marian": ("MarianModel", "MarianMTModel")}[style]
    has_logits = keys.architecture(*heads) == heads[1] or any_begins(names, "final_logits_bias")
    tied = keys.take("tie_word_embeddings", True, hint=bool)
    # One table for source and answer, or two, of which the second may also be the matrix of the logits.
    shares = keys.take("share_encoder_decoder_embeddings", True, hint=bool)
    one_table = tied and shares
    vocabulary = keys.take("vocab_size")
    of_answer = keys.take("decoder_vocab_size", vocabulary)
    if one_table and of_answer != vocabulary:
        raise keys.error(f"key 'decoder_vocab_size': got {of_answer}, must be vocab_size = {vocabulary} for one table")
    style_text = changed(
        style,
        activation=keys.activation("activation_function", "gelu"),
        embedding_scale=keys.take("scale_embedding", False, hint=bool),
        logits_bias=has_logits,
    )
    mechanism = Mechanisms(positions, positions, "none")
    options = dict(style=style_text, mechanism=mechanism, tied_embeddings=one_table, dtype=dtype)
    settings = _settings(keys, D, layers, **options)
    shared, tables = f"{root}shared.weight", [f"{root}{stack}.embed_tokens.weight" for stack in stacks]
    if one_table:
        rules.append(Rule(shared, "model.source_embed.embedding", "v d -> v d"))
        copies = dict.fromkeys([*tables, "lm_head.weight"], shared)
    else:
        parts = ("source_embed", "answer_embed")
        rules += [Rule(name, f"model.{part}.embedding", "v d -> v d") for name, part in zip(tables, parts)]
        copies = {"lm_head.weight": tables[1]} if tied else {}
    if has_logits and not tied:
        rules.append(Rule("lm_head.weight", "model.output.kernel", "v d -> d v"))
    rules += [Rule("final_logits_bias", "model.logits_bias", "1 v -> v")] if has_logits else []
    for stack, count in layers.items():
        for number in range(count):
            rules += _layer(f"{root}{stack}.layers.{number}", f"model.{stack}.blocks.{number}", stack == "decoder")

    def build(rngs: nnx.Rngs) -> EncoderDecoder:
        model = Transformer(of_answer, settings, rngs)
        if not one_table:
            model.source_embed = nnx.Embed(vocabulary, D, dtype=jnp.dtype(dtype), rngs=rngs)
            model.output = None if tied or not has_logits else model.output
        return EncoderDecoder(model, has_logits=has_logits)

    # Marian's positions are computed, but old files hold them; the shared table is not used where each has its own.
    ignored = ("*.embed_positions.weight",) * (style == "marian") + (shared,) * (not one_table)
    return Plan(build, rules, ignored, copies)


def _settings(keys: Keys, width: int, layers: Mapping[str, int], **options) -> TransformerSettings:
    return Transformer.settings(
        "transformer",
        width=width,
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        num_heads=keys.heads("encoder_attention_heads", width),
        num_decoder_heads=keys.heads("decoder_attention_heads", width),
        feed_forward_width=keys.take("encoder_ffn_dim"),
        decoder_feed_forward_width=keys.take("decoder_ffn_dim"),
        **options,
    )


def _layer(theirs: str, ours: str, has_cross: bool) -> list[Rule]:
    """Return the rules of a layer, with cross-attention or without."""
    rules = []
    for name, part in [("self_attn", "attention"), ("encoder_attn", "cross")][: 1 + has_cross]:
        rules += attention(f"{theirs}.{name}", f"{ours}.{part}", _NAMES)
        rules += norm(f"{theirs}.{name}_layer_norm", f"{ours}.{part}_residual.norm")
    rules += linear(f"{theirs}.fc1", f"{ours}.feed_forward.expand")
    rules += linear(f"{theirs}.fc2", f"{ours}.feed_forward.contract")
    return [*rules, *norm(f"{theirs}.final_layer_norm", f"{ours}.feed_forward_residual.norm")]
