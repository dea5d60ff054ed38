"""BERT and ALBERT: encoders of texts, with heads for masked tokens, pooled outputs and classes.

Source: Devlin et al. 2019; Lan et al. 2020.
"""

from collections.abc import Collection

import jax.numpy as jnp
from flax import nnx

from attn.nn.encoder_only import EncoderOnly
from attn.nn.style import changed
from attn.pretrained.foundation import Encoder
from attn.pretrained.plan import Plan, any_begins, prefix_of
from attn.pretrained.rules import Rule, attention, linear, norm
from attn.pretrained.settings import Keys

_HEADS = ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification")
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
_ALBERT = ("attention.query", "attention.key", "attention.value", "attention.dense")


def bert(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of a BERT."""
    keys.expect(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    keys.skip("chunk_size_feed_forward")  # the same values, in parts
    root, D = prefix_of("bert.", names), keys.take("hidden_size")
    rules = []
    for number in range(keys.layers("num_hidden_layers", most=len(names))):
        theirs, ours = f"{root}encoder.layer.{number}", f"model.stack.blocks.{number}"
        rules += attention(theirs, f"{ours}.attention", _BERT)
        rules += norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_residual.norm")
        rules += linear(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.expand")
        rules += linear(f"{theirs}.output.dense", f"{ours}.feed_forward.contract")
        rules += norm(f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_residual.norm")
    transform = {"linear": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm"}
    return _plan(
        keys,
        names,
        dtype,
        root,
        rules,
        D,
        predictions="cls.predictions",
        transform=transform,
        pooler=f"{root}pooler.dense",
    )


def albert(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of an ALBERT."""
    keys.expect(position_embedding_type="absolute", inner_group_num=1, is_decoder=False)
    keys.expect(down_scale_factor=1, gap_size=0, net_structure_type=0, num_memory_blocks=0)
    root, distinct = prefix_of("albert.", names), keys.take("num_hidden_groups", 1)
    layers = keys.layers("num_hidden_layers", most=1_000)
    if layers % distinct:
        raise keys.error(f"key 'num_hidden_groups': got {distinct}, must divide num_hidden_layers = {layers}")
    rules = linear(f"{root}encoder.embedding_hidden_mapping_in", "model.bottom.project")
    each = layers // distinct
    for group in range(distinct):
        theirs = f"{root}encoder.albert_layer_groups.{group}.albert_layers.0"
        ours = f"model.stack.blocks.{group * each}"
        rules += attention(theirs, f"{ours}.attention", _ALBERT)
        rules += norm(f"{theirs}.attention.LayerNorm", f"{ours}.attention_residual.norm")
        rules += linear(f"{theirs}.ffn", f"{ours}.feed_forward.expand")
        rules += linear(f"{theirs}.ffn_output", f"{ours}.feed_forward.contract")
        rules += norm(f"{theirs}.full_layer_layer_norm", f"{ours}.feed_forward_residual.norm")
    E, transform = keys.take("embedding_size"), {"linear": "predictions.dense", "norm": "predictions.LayerNorm"}
    return _plan(
        keys,
        names,
        dtype,
        root,
        rules,
        E,
        distinct,
        predictions="predictions",
        transform=transform,
        pooler=f"{root}pooler",
    )


def _plan(keys, names, dtype, root, rules, E, distinct=None, *, predictions, transform, pooler) -> Plan:
    """Return the plan, given the rules of the layers; heads are there if config.json or tensors say so."""
    D, types, vocabulary = keys.take("hidden_size"), keys.take("type_vocab_size", 2), keys.take("vocab_size")
    family = {"bert": "Bert", "albert": "Albert"}[keys.values["model_type"]]
    name = keys.architecture(f"{family}Model", *(f"{family}For{head}" for head in _HEADS)).partition("For")[2]
    has_logits = any_begins(names, f"{predictions}.") or name in ("MaskedLM", "PreTraining")
    has_classifier = any_begins(names, "classifier.") or name.endswith("Classification")
    has_pooler = any_begins(names, f"{pooler}.") or name == "SequenceClassification"
    tied = keys.take("tie_word_embeddings", True, hint=bool) or not has_logits
    style = changed(
        "bert",
        epsilon=keys.take("layer_norm_eps", 1e-12, hint=float),
        activation=keys.activation("hidden_act", "gelu"),
        logits_transform=has_logits,
        logits_bias=has_logits,
    )
    settings = EncoderOnly.settings(
        "encoder_only",
        width=D,
        embedding_width=None if distinct is None else E,
        num_layers=keys.take("num_hidden_layers"),
        distinct_layers=distinct,
        num_heads=keys.heads("num_attention_heads", D),
        feed_forward_width=keys.take("intermediate_size"),
        style=style,
        mechanism=f"learned({keys.take('max_position_embeddings')})",
        tied_embeddings=tied,
        dtype=dtype,
    )
    labels = keys.num_labels()
    rules = [
        Rule(f"{root}embeddings.word_embeddings.weight", "model.source_embed.embedding", "v e -> v e"),
        Rule(f"{root}embeddings.position_embeddings.weight", POSITIONS, "t e -> t e"),
        Rule(f"{root}embeddings.token_type_embeddings.weight", "types.embedding", "t e -> t e"),
        *norm(f"{root}embeddings.LayerNorm", "model.bottom.norm"),
        *rules,
    ]
    if has_logits:
        rules += linear(transform["linear"], "model.logits_transform.linear")
        rules += norm(transform["norm"], "model.logits_transform.norm")
        # Without ties the bias beside the matrix is the one that is used.
        rules.append(Rule(f"{predictions}.{'' if tied else 'decoder.'}bias", "model.logits_bias", "v -> v"))
        rules += [] if tied else [Rule(f"{predictions}.decoder.weight", "model.output.kernel", "v e -> e v")]
    rules += linear(pooler, "pooler") if has_pooler else []
    rules += linear("classifier", "classifier") if has_classifier else []

    def build(rngs: nnx.Rngs) -> Encoder:
        options = dict(dtype=jnp.dtype(dtype), rngs=rngs)
        return Encoder(
            EncoderOnly(vocabulary, settings, rngs),
            types=nnx.Embed(types, E, **options),
            pooler=nnx.Linear(D, D, **options) if has_pooler else None,
            classifier=nnx.Linear(D, labels, **options) if has_classifier else None,
            classifies_tokens=name == "TokenClassification" or not has_pooler,
            has_logits=has_logits,
        )

    copies = {
        f"{predictions}.decoder.weight": f"{root}embeddings.word_embeddings.weight",
        f"{predictions}.decoder.bias": f"{predictions}.bias",
    }
    ignored = ("*position_ids", "*token_type_ids", "cls.seq_relationship.*", "sop_classifier.*")
    return Plan(build, rules, ignored, copies) if tied else Plan(build, rules, (*ignored, f"{predictions}.bias"))


POSITIONS = "model.stack.blocks.0.attention.mechanism.0.table"
