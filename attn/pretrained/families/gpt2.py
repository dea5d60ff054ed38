"""GPT-2: a decoder of texts.

Source: Radford et al. 2019.
"""

from collections.abc import Collection

from flax import nnx

from attn.nn.decoder_only import DecoderOnly
from attn.nn.style import changed
from attn.pretrained.foundation import Decoder
from attn.pretrained.plan import Plan, prefix_of
from attn.pretrained.rules import Rule, norm
from attn.pretrained.settings import Keys


def gpt2(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of a GPT-2."""
    keys.expect(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    keys.skip("n_ctx")  # repeats n_positions
    keys.skip("reorder_and_upcast_attn")  # the same in float32
    D, L, root = keys.take("n_embd"), keys.layers("n_layer", most=len(names)), prefix_of("transformer.", names)
    tied = keys.take("tie_word_embeddings", True, hint=bool)
    # A file of a model without a head has no matrix of the logits, but neither has one with tied embeddings.
    has_logits = keys.architecture("GPT2Model", "GPT2LMHeadModel") != "GPT2Model" or "lm_head.weight" in names
    settings = DecoderOnly.settings(
        "decoder_only",
        width=D,
        num_layers=L,
        num_heads=keys.heads("n_head", D),
        feed_forward_width=keys.take("n_inner", 4 * D),
        style=changed(
            "gpt2",
            epsilon=keys.take("layer_norm_epsilon", 1e-5, hint=float),
            activation=keys.activation("activation_function", "gelu_new"),
        ),
        mechanism=f"learned({keys.take('n_positions')})",
        tied_embeddings=tied or not has_logits,
        dtype=dtype,
    )
    rules = [
        Rule(f"{root}wte.weight", "model.source_embed.embedding", "v d -> v d"),
        Rule(f"{root}wpe.weight", "model.stack.blocks.0.attention.mechanism.0.table", "t d -> t d"),
        *norm(f"{root}ln_f", "model.stack.norm"),
    ]
    for number in range(L):
        rules += _layer(f"{root}h.{number}", f"model.stack.blocks.{number}")
    if has_logits and not tied:
        rules.append(Rule("lm_head.weight", "model.output.kernel", "v d -> d v"))
    vocabulary = keys.take("vocab_size")

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(DecoderOnly(vocabulary, settings, rngs), has_logits=has_logits)

    ignored = ("*.attn.bias", "*.attn.masked_bias")  # masks, in old files
    return Plan(build, rules, ignored, {"lm_head.weight": f"{root}wte.weight"} if tied else {})


def _layer(theirs: str, ours: str) -> list[Rule]:
    """Return the rules of a layer, whose matrices are stored as [in, out]."""
    matrices, biases = (tuple(f"{ours}.attention.{kind}_{x}" for x in "QKV") for kind in "Wb")
    return [
        Rule(f"{theirs}.attn.c_attn.weight", matrices, "d (p n h) -> p d n h"),
        Rule(f"{theirs}.attn.c_attn.bias", biases, "(p n h) -> p n h"),
        Rule(f"{theirs}.attn.c_proj.weight", f"{ours}.attention.W_O", "(n h) d -> n h d"),
        Rule(f"{theirs}.attn.c_proj.bias", f"{ours}.attention.b_O", "d -> d"),
        Rule(f"{theirs}.mlp.c_fc.weight", f"{ours}.feed_forward.expand.kernel", "i o -> i o"),
        Rule(f"{theirs}.mlp.c_fc.bias", f"{ours}.feed_forward.expand.bias", "o -> o"),
        Rule(f"{theirs}.mlp.c_proj.weight", f"{ours}.feed_forward.contract.kernel", "i o -> i o"),
        Rule(f"{theirs}.mlp.c_proj.bias", f"{ours}.feed_forward.contract.bias", "o -> o"),
        *norm(f"{theirs}.ln_1", f"{ours}.attention_residual.norm"),
        *norm(f"{theirs}.ln_2", f"{ours}.feed_forward_residual.norm"),
    ]
