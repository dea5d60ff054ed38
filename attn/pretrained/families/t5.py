"""T5, also gated as in its version 1.1: an encoder and a decoder with relative positions.

Source: Raffel et al. 2020; the gate: Shazeer 2020.
"""

from collections.abc import Collection

from flax import nnx

from attn.functional.positions import relative_buckets
from attn.nn.style import changed
from attn.nn.transformer import Mechanisms, Transformer
from attn.pretrained.foundation import EncoderDecoder
from attn.pretrained.plan import Plan
from attn.pretrained.rules import Rule, attention, linear, norm
from attn.pretrained.settings import Keys

_NAMES = ("q", "k", "v", "o")


def t5(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of a T5."""
    keys.expect(is_encoder_decoder=True, is_decoder=False)
    keys.skip("is_gated_act", "dense_act_fn", "n_positions")  # feed_forward_proj says the same; there are no positions
    gated, _, activation = keys.take("feed_forward_proj", "relu", hint=str).rpartition("-")
    if gated not in ("", "gated"):
        raise keys.error(f"key 'feed_forward_proj': got {keys.values['feed_forward_proj']!r}, must be like gated-gelu")
    # In this family "gated-gelu" has always been the approximation by tanh.
    keys.values = keys.values | {"dense_act_fn": "gelu_new" if gated and activation == "gelu" else activation}
    # Older files say by tie_word_embeddings whether logits are scaled; a matrix of its own is used if it is there.
    scaled = keys.take("scale_decoder_outputs", keys.take("tie_word_embeddings", True, hint=bool), hint=bool)
    has_logits = keys.architecture("T5Model", "T5ForConditionalGeneration", "T5WithLMHeadModel") != "T5Model"
    tied = "lm_head.weight" not in names
    D, L = keys.take("d_model"), keys.layers("num_layers", most=len(names))
    buckets = keys.take("relative_attention_num_buckets", 32), keys.take("relative_attention_max_distance", 128)
    relative_buckets(0, num_buckets=buckets[0] // 2, max_distance=buckets[1])  # raises if they cannot be
    table = f"t5({buckets[0]}, {buckets[1]}, per_stack=True"
    decoder_layers = keys.layers("num_decoder_layers", L, most=len(names))
    settings = Transformer.settings(
        "transformer",
        width=D,
        num_encoder_layers=L,
        num_decoder_layers=decoder_layers,
        num_heads=keys.take("num_heads"),
        head_width=keys.take("d_kv"),
        feed_forward_width=keys.take("d_ff"),
        style=changed(
            "t5",
            epsilon=keys.take("layer_norm_epsilon", 1e-6, hint=float),
            activation=keys.activation("dense_act_fn", "relu"),
            gated=gated == "gated",
            logits_scale=scaled,
        ),
        mechanism=Mechanisms(f"{table}) + unscaled", f"{table}, bidirectional=False) + unscaled", "unscaled"),
        tied_embeddings=tied,
        dtype=dtype,
    )
    rules = [Rule("shared.weight", "model.source_embed.embedding", "v d -> v d")]
    for stack, count in (("encoder", L), ("decoder", decoder_layers)):
        rules += _stack(stack, count, gated == "gated")
    if not tied:
        rules.append(Rule("lm_head.weight", "model.output.kernel", "v d -> d v"))
    vocabulary = keys.take("vocab_size")

    def build(rngs: nnx.Rngs) -> EncoderDecoder:
        model = Transformer(vocabulary, settings, rngs)
        model.answer_embed = None  # one table for source and answer, also where the logits have their own matrix
        return EncoderDecoder(model, has_logits=has_logits or not tied)

    embeddings = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    ignored = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)  # unused, in old files
    return Plan(build, rules, ignored, dict.fromkeys(embeddings, "shared.weight"))


def _stack(stack: str, count: int, gated: bool) -> list[Rule]:
    """Return the rules of a stack."""
    bias, blocks = "SelfAttention.relative_attention_bias.weight", f"model.{stack}.blocks"
    rules = [
        Rule(f"{stack}.block.0.layer.0.{bias}", f"{blocks}.0.attention.mechanism.0.table", "b n -> n b"),
        *norm(f"{stack}.final_layer_norm", f"model.{stack}.norm", bias=False),
    ]
    for number in range(count):
        ours = f"{blocks}.{number}"
        sublayers = [("SelfAttention", "attention"), ("EncDecAttention", "cross")][: 1 + (stack == "decoder")]
        for place, (theirs, part) in enumerate(sublayers):
            theirs, layer = f"{stack}.block.{number}.layer.{place}.{theirs}", f"{stack}.block.{number}.layer.{place}"
            rules += attention(theirs, f"{ours}.{part}", _NAMES, bias=False, output_bias=False)
            rules += norm(f"{layer}.layer_norm", f"{ours}.{part}_residual.norm", bias=False)
        layer = f"{stack}.block.{number}.layer.{len(sublayers)}"
        parts = {"wi_0": "gate", "wi_1": "expand", "wo": "contract"} if gated else {"wi": "expand", "wo": "contract"}
        for theirs, part in parts.items():
            rules += linear(f"{layer}.DenseReluDense.{theirs}", f"{ours}.feed_forward.{part}", bias=False)
        rules += norm(f"{layer}.layer_norm", f"{ours}.feed_forward_residual.norm", bias=False)
    return rules
