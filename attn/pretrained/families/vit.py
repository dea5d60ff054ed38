"""ViT: an encoder of the patches of a picture.

Source: Dosovitskiy et al. 2021.
"""

from collections.abc import Collection

import jax.numpy as jnp
from flax import nnx

from attn.nn.style import changed
from attn.nn.vision_transformer import VisionTransformer
from attn.pretrained.foundation import Vision
from attn.pretrained.plan import Plan, any_begins, prefix_of
from attn.pretrained.rules import Rule, attention, linear, norm
from attn.pretrained.settings import Keys

_NAMES = ("attention.query", "attention.key", "attention.value", "output.dense")


def vit(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of a ViT."""
    keys.expect(pooler_act="tanh")
    keys.skip("encoder_stride")  # of a head that is not implemented
    D, channels = keys.take("hidden_size"), keys.take("num_channels", 3)
    L = keys.layers("num_hidden_layers", most=len(names))
    (height, width), (p, q) = _pair(keys, "image_size", 224), _pair(keys, "patch_size", 16)
    if height % p or width % q:
        raise keys.error(f"key 'patch_size': got {p} x {q}, must divide image_size = {height} x {width}")
    root, bias = prefix_of("vit.", names), keys.take("qkv_bias", True, hint=bool)
    name = keys.architecture("ViTModel", "ViTForImageClassification")
    has_logits = any_begins(names, "classifier.") or name == "ViTForImageClassification"
    has_pooler = any_begins(names, f"{root}pooler.")
    pooled = keys.take("pooler_output_size", D)
    settings = VisionTransformer.settings(
        "vision_transformer",
        width=D,
        num_layers=L,
        num_heads=keys.heads("num_attention_heads", D),
        feed_forward_width=keys.take("intermediate_size"),
        style=changed(
            "vit",
            epsilon=keys.take("layer_norm_eps", 1e-12, hint=float),
            activation=keys.activation("hidden_act", "gelu"),
            qkv_bias=bias,
            logits_bias=has_logits,
        ),
        mechanism=f"learned({height // p * (width // q) + 1})",
        patch_size=p * q * channels,
        dtype=dtype,
    )
    rules = _rules_of_ends(root, {"p": p, "q": q, "c": channels})
    for number in range(L):
        rules += _layer(f"{root}encoder.layer.{number}", f"model.stack.blocks.{number}", bias)
    if has_logits:
        rules.append(Rule("classifier.weight", "model.output.kernel", "v d -> d v"))
        rules.append(Rule("classifier.bias", "model.logits_bias", "v -> v"))
    rules += linear(f"{root}pooler.dense", "pooler") if has_pooler else []
    classes = keys.num_labels()

    def build(rngs: nnx.Rngs) -> Vision:
        model = VisionTransformer(classes, settings, rngs)
        model.output = model.output if has_logits else None
        pooler = nnx.Linear(D, pooled, dtype=jnp.dtype(dtype), rngs=rngs) if has_pooler else None
        return Vision(model, size=(channels, height, width), patch=(p, q), pooler=pooler, has_logits=has_logits)

    return Plan(build, rules, ("*.mask_token",))


def _rules_of_ends(root: str, patch: dict[str, int]) -> list[Rule]:
    """Return the rules of the embeddings and of the last norm; `patch` has height, width and channels of a patch."""
    embeddings = f"{root}embeddings"
    table, kernel = "model.stack.blocks.0.attention.mechanism.0.table", "model.patch.kernel"
    return [
        Rule(f"{embeddings}.cls_token", "model.class_token", "1 1 d -> d"),
        Rule(f"{embeddings}.position_embeddings", table, "1 t d -> t d"),
        Rule(f"{embeddings}.patch_embeddings.projection.weight", kernel, "d c p q -> (p q c) d", patch),
        Rule(f"{embeddings}.patch_embeddings.projection.bias", "model.patch.bias", "d -> d"),
        *norm(f"{root}layernorm", "model.stack.norm"),
    ]


def _layer(theirs: str, ours: str, bias: bool) -> list[Rule]:
    """Return the rules of a layer, whose queries, keys and values may have biases."""
    return [
        *attention(f"{theirs}.attention", f"{ours}.attention", _NAMES, bias=bias),
        *norm(f"{theirs}.layernorm_before", f"{ours}.attention_residual.norm"),
        *linear(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.expand"),
        *linear(f"{theirs}.output.dense", f"{ours}.feed_forward.contract"),
        *norm(f"{theirs}.layernorm_after", f"{ours}.feed_forward_residual.norm"),
    ]


def _pair(keys: Keys, name: str, default: int) -> tuple[int, int]:
    """Return a size that is given as one number or as two."""
    given = keys.values.get(name)
    if isinstance(given, list) and len(given) == 2:
        keys.take(name, hint=list)
        both = Keys({f"{name}[{place}]": each for place, each in enumerate(given)}, keys.path)
        return both.take(f"{name}[0]"), both.take(f"{name}[1]")
    return (keys.take(name, default),) * 2
