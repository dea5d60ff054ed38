"""Llama: a decoder of texts with rotary positions, gated feed-forward layers and grouped heads.

Source: Touvron et al. 2023; Grattafiori et al. 2024.
"""

from collections.abc import Collection

from flax import nnx

from attn.nn.decoder_only import DecoderOnly
from attn.nn.style import changed
from attn.pretrained.foundation import Decoder
from attn.pretrained.plan import Plan, prefix_of
from attn.pretrained.rules import Rule, attention, linear, norm
from attn.pretrained.settings import Keys

_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of a Llama."""
    D, L = keys.take("hidden_size"), keys.layers("num_hidden_layers", most=len(names))
    H = keys.take("head_dim", None)
    N = keys.heads("num_attention_heads", D, H)
    K, root = keys.take("num_key_value_heads", N), prefix_of("model.", names)
    if N % K:
        raise keys.error(f"key 'num_key_value_heads': got {K}, must divide num_attention_heads = {N}")
    bias, wide_bias = (keys.take(name, False, hint=bool) for name in ("attention_bias", "mlp_bias"))
    tied = keys.take("tie_word_embeddings", False, hint=bool)
    has_logits = keys.architecture("LlamaModel", "LlamaForCausalLM") != "LlamaModel" or "lm_head.weight" in names
    settings = DecoderOnly.settings(
        "decoder_only",
        width=D,
        num_layers=L,
        num_heads=N,
        num_groups=K,
        head_width=H,
        feed_forward_width=keys.take("intermediate_size"),
        style=changed(
            "llama",
            epsilon=keys.take("rms_norm_eps", 1e-6, hint=float),
            activation=keys.activation("hidden_act", "silu"),
            qkv_bias=bias,
            attention_output_bias=bias,
            feed_forward_bias=wide_bias,
        ),
        mechanism=rotary(keys),
        tied_embeddings=tied or not has_logits,
        dtype=dtype,
    )
    rules = [
        Rule(f"{root}embed_tokens.weight", "model.source_embed.embedding", "v d -> v d"),
        *norm(f"{root}norm", "model.stack.norm", bias=False),
    ]
    for number in range(L):
        rules += _layer(f"{root}layers.{number}", f"model.stack.blocks.{number}", bias, wide_bias)
    if has_logits and not tied:
        rules.append(Rule("lm_head.weight", "model.output.kernel", "v d -> d v"))
    vocabulary = keys.take("vocab_size")
    keys.skip("max_position_embeddings")  # rotary positions have no table
    keys.expect(partial_rotary_factor=1.0, layer_types=["full_attention"] * L)

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(DecoderOnly(vocabulary, settings, rngs), has_logits=has_logits)

    copies = {"lm_head.weight": f"{root}embed_tokens.weight"} if tied else {}
    return Plan(build, rules, ("*rotary_emb.inv_freq",), copies)


def _layer(theirs: str, ours: str, bias: bool, wide_bias: bool) -> list[Rule]:
    """Return the rules of a layer, whose attention and feed-forward layer may have biases."""
    rules = attention(f"{theirs}.self_attn", f"{ours}.attention", _NAMES, bias=bias, output_bias=bias)
    for name, part in (("gate_proj", "gate"), ("up_proj", "expand"), ("down_proj", "contract")):
        rules += linear(f"{theirs}.mlp.{name}", f"{ours}.feed_forward.{part}", bias=wide_bias)
    rules += norm(f"{theirs}.input_layernorm", f"{ours}.attention_residual.norm", bias=False)
    return [*rules, *norm(f"{theirs}.post_attention_layernorm", f"{ours}.feed_forward_residual.norm", bias=False)]


def rotary(keys: Keys) -> str:
    """Return the mechanism of the rotary positions; newer files have `rope_parameters`, older ones `rope_scaling`."""
    base = keys.take("rope_theta", 10_000.0, hint=float)
    given = keys.take("rope_scaling", {}, hint=dict) | keys.take("rope_parameters", {}, hint=dict)
    inner = Keys(given, keys.path)
    base = inner.take("rope_theta", base, hint=float)
    kind = inner.take("rope_type", inner.take("type", "default", hint=str), hint=str)
    inner.expect(partial_rotary_factor=1.0)
    if kind == "default":
        text = f"rotary({base})"
    elif kind == "linear":
        text = f"rotary({base}, factor={inner.take('factor', hint=float)})"
    elif kind == "llama3":
        factor, low, high = (inner.take(n, hint=float) for n in ("factor", "low_freq_factor", "high_freq_factor"))
        original = inner.take("original_max_position_embeddings")
        if not low < high:
            raise keys.error(f"key 'low_freq_factor': got {low}, must be less than high_freq_factor = {high}")
        text = f"llama3_rotary({base}, factor={factor}, low={low}, high={high}, original={original})"
    else:
        raise keys.error(f"key 'rope_type': got {kind!r}, must be default, linear or llama3")
    inner.check_all_read()
    return text
