"""BERT and ALBERT: encoders of texts, with heads for masked tokens, pooled outputs and classes.

Source: Devlin et al. 2019; Lan et al. 2020.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from attn.nn.encoder_only import EncoderOnly
from attn.nn.one_stack import OneStackSettings
from attn.nn.style import changed
from attn.pretrained.foundation import Encoder
from attn.pretrained.plan import Plan, any_begins, prefix_of
from attn.pretrained.rules import Rule, attention, linear, norm
from attn.pretrained.settings import Keys

_HEADS = ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification")
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
_ALBERT = ("attention.query", "attention.key", "attention.value", "attention.dense")


class _Names(NamedTuple):
    """The names of tensors outside of the layers: their beginning, and those of the heads."""

    family: str
    root: str
    predictions: str
    transform: str
    transform_norm: str
    pooler: str


class _Has(NamedTuple):
    """The heads that a model has, because config.json or a tensor says so, and their kinds."""

    logits: bool
    tied: bool
    pooler: bool
    classifier: bool
    classifies_tokens: bool


def bert(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of a BERT."""
    keys.expect(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    keys.skip("chunk_size_feed_forward")  # the same values, in parts
    root, transform = prefix_of("bert.", names), "cls.predictions.transform"
    heads = _Names(
        "Bert", root, "cls.predictions", f"{transform}.dense", f"{transform}.LayerNorm", f"{root}pooler.dense"
    )
    rules = []
    for number in range(keys.layers("num_hidden_layers", most=len(names))):
        theirs, ours = f"{root}encoder.layer.{number}", f"model.stack.blocks.{number}"
        rules += attention(theirs, f"{ours}.attention", _BERT)
        rules += norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_residual.norm")
        rules += linear(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.expand")
        rules += linear(f"{theirs}.output.dense", f"{ours}.feed_forward.contract")
        rules += norm(f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_residual.norm")
    return _plan(keys, names, dtype, heads, rules)


def albert(keys: Keys, names: Collection[str], dtype: str) -> Plan:
    """Return the plan of an ALBERT."""
    keys.expect(position_embedding_type="absolute", inner_group_num=1, is_decoder=False)
    keys.expect(down_scale_factor=1, gap_size=0, net_structure_type=0, num_memory_blocks=0)
    root, distinct = prefix_of("albert.", names), keys.take("num_hidden_groups", 1)
    heads = _Names("Albert", root, "predictions", "predictions.dense", "predictions.LayerNorm", f"{root}pooler")
    layers = keys.layers("num_hidden_layers", most=1_000)
    if layers % distinct:
        raise keys.error(f"key 'num_hidden_groups': got {distinct}, must divide num_hidden_layers = {layers}")
    rules = linear(f"{root}encoder.embedding_hidden_mapping_in", "model.bottom.project")
    for group in range(distinct):
        theirs = f"{root}encoder.albert_layer_groups.{group}.albert_layers.0"
        ours = f"model.stack.blocks.{group * (layers // distinct)}"  # the first of those that are the same object
        rules += attention(theirs, f"{ours}.attention", _ALBERT)
        rules += norm(f"{theirs}.attention.LayerNorm", f"{ours}.attention_residual.norm")
        rules += linear(f"{theirs}.ffn", f"{ours}.feed_forward.expand")
        rules += linear(f"{theirs}.ffn_output", f"{ours}.feed_forward.contract")
        rules += norm(f"{theirs}.full_layer_layer_norm", f"{ours}.feed_forward_residual.norm")
    options = dict(embedding_width=keys.take("embedding_size"), distinct_layers=distinct)
    return _plan(keys, names, dtype, heads, rules, **options)


def _plan(keys: Keys, names: Collection[str], dtype: str, heads: _Names, rules: list[Rule], **options) -> Plan:
    """Return the plan, given the rules of the layers and further settings of the model."""
    has, types, vocabulary = _has(keys, names, heads), keys.take("type_vocab_size", 2), keys.take("vocab_size")
    settings, labels = _settings(keys, has, dtype, **options), keys.num_labels()
    D, E = settings.width, settings.embedding_width or settings.width

    def build(rngs: nnx.Rngs) -> Encoder:
        options = dict(dtype=jnp.dtype(dtype), rngs=rngs)
        return Encoder(
            EncoderOnly(vocabulary, settings, rngs),
            types=nnx.Embed(types, E, **options),
            pooler=nnx.Linear(D, D, **options) if has.pooler else None,
            classifier=nnx.Linear(D, labels, **options) if has.classifier else None,
            classifies_tokens=has.classifies_tokens,
            has_logits=has.logits,
        )

    rules = [*_rules_of_ends(heads, has), *rules]
    ignored = ("*position_ids", "*token_type_ids", "cls.seq_relationship.*", "sop_classifier.*")
    if not has.tied:  # the bias beside the matrix is the one that is used
        return Plan(build, rules, (*ignored, f"{heads.predictions}.bias"))
    copies = {
        f"{heads.predictions}.decoder.weight": f"{heads.root}embeddings.word_embeddings.weight",
        f"{heads.predictions}.decoder.bias": f"{heads.predictions}.bias",
    }
    return Plan(build, rules, ignored, copies)


def _has(keys: Keys, names: Collection[str], heads: _Names) -> _Has:
    known = (f"{heads.family}Model", *(f"{heads.family}For{head}" for head in _HEADS))
    _, _, name = keys.architecture(*known).partition("For")
    logits = any_begins(names, f"{heads.predictions}.") or name in ("MaskedLM", "PreTraining")
    pooler = any_begins(names, f"{heads.pooler}.") or name == "SequenceClassification"
    return _Has(
        logits,
        tied=keys.take("tie_word_embeddings", True, hint=bool) or not logits,
        pooler=pooler,
        classifier=any_begins(names, "classifier.") or name.endswith("Classification"),
        classifies_tokens=name == "TokenClassification" or not pooler,
    )


def _settings(keys: Keys, has: _Has, dtype: str, **options) -> OneStackSettings:
    D = keys.take("hidden_size")
    return EncoderOnly.settings(
        "encoder_only",
        width=D,
        num_layers=keys.take("num_hidden_layers"),
        num_heads=keys.heads("num_attention_heads", D),
        feed_forward_width=keys.take("intermediate_size"),
        style=changed(
            "bert",
            epsilon=keys.take("layer_norm_eps", 1e-12, hint=float),
            activation=keys.activation("hidden_act", "gelu"),
            logits_transform=has.logits,
            logits_bias=has.logits,
        ),
        mechanism=f"learned({keys.take('max_position_embeddings')})",
        tied_embeddings=has.tied,
        dtype=dtype,
        **options,
    )


def _rules_of_ends(heads: _Names, has: _Has) -> list[Rule]:
    """Return the rules of the embeddings and of the heads."""
    embeddings, predictions = f"{heads.root}embeddings", heads.predictions
    rules = [
        Rule(f"{embeddings}.word_embeddings.weight", "model.source_embed.embedding", "v e -> v e"),
        Rule(
            f"{embeddings}.position_embeddings.weight", "model.stack.blocks.0.attention.mechanism.0.table", "t e -> t e"
        ),
        Rule(f"{embeddings}.token_type_embeddings.weight", "types.embedding", "t e -> t e"),
        *norm(f"{embeddings}.LayerNorm", "model.bottom.norm"),
    ]
    if has.logits:
        rules += linear(heads.transform, "model.logits_transform.linear")
        rules += norm(heads.transform_norm, "model.logits_transform.norm")
        rules.append(Rule(f"{predictions}.{'' if has.tied else 'decoder.'}bias", "model.logits_bias", "v -> v"))
        rules += [] if has.tied else [Rule(f"{predictions}.decoder.weight", "model.output.kernel", "v e -> e v")]
    rules += linear(heads.pooler, "pooler") if has.pooler else []
    return [*rules, *(linear("classifier", "classifier") if has.classifier else [])]
