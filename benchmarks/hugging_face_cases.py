"""The models that hugging_face.py records."""

import dataclasses

VOCABULARY = 61


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to record: its class in transformers, its config, and how its files are written.

    Attributes:
      model: name of the class.
      config: arguments of its config.
      saved_as: "safetensors", "shards", "zip" (torch.save) or "legacy" (torch.save before version 1.6).
      untied: own output weights, in a family whose config cannot ask for them.
      ends_early: choose the end token so that the first row ends before the others.
    """

    model: str
    config: dict
    saved_as: str = "safetensors"
    untied: bool = False
    ends_early: bool = False


BERT = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 20}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_positions": 20, "bos_token_id": 60, "eos_token_id": 60}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 20,
    "pad_token_id": 2,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 24, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8}
BART = {"vocab_size": VOCABULARY, "d_model": 24, "max_position_embeddings": 20, "decoder_layers": 2}
VIT = {"hidden_size": 24, "num_hidden_layers": 2}
# Of the 4 wavelengths 6, 63, 628 and 6,283 the first is kept, the second interpolated, and the others are scaled.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0}

CASES = {
    "bert_masked": Case("BertForMaskedLM", BERT | {"num_attention_heads": 4, "intermediate_size": 36}),
    "bert_plain": Case(
        "BertModel",
        BERT | {"hidden_size": 30, "num_attention_heads": 5, "intermediate_size": 37, "hidden_act": "relu"},
        saved_as="zip",
    ),
    "bert_classes": Case(
        "BertForSequenceClassification",
        BERT | {"num_attention_heads": 3, "intermediate_size": 35, "num_labels": 3, "layer_norm_eps": 1e-5},
    ),
    "bert_tokens": Case(
        "BertForTokenClassification",
        BERT | {"num_attention_heads": 2, "intermediate_size": 17, "num_labels": 5, "num_hidden_layers": 1},
    ),
    "bert_untied": Case(
        "BertForMaskedLM",
        BERT
        | {"num_attention_heads": 6, "intermediate_size": 19, "num_hidden_layers": 1, "tie_word_embeddings": False},
    ),
    "albert_square": Case(
        "AlbertForMaskedLM",
        BERT
        | {"embedding_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"intermediate_size": 18, "hidden_act": "gelu_new"},
    ),
    "albert_masked": Case(
        "AlbertForMaskedLM",
        BERT
        | {"embedding_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"intermediate_size": 40, "hidden_act": "gelu"},
    ),
    "albert_groups": Case(
        "AlbertModel",
        BERT
        | {"embedding_size": 14, "num_hidden_layers": 4, "num_hidden_groups": 2, "num_attention_heads": 3}
        | {"intermediate_size": 32},
        saved_as="legacy",
    ),
    "gpt2": Case("GPT2LMHeadModel", GPT2 | {"n_layer": 2, "n_head": 4}),
    "gpt2_wide": Case(
        "GPT2LMHeadModel",
        GPT2
        | {"n_layer": 3, "n_head": 3, "n_inner": 31, "activation_function": "relu", "tie_word_embeddings": False}
        | {"scale_attn_by_inverse_layer_idx": False, "pad_token_id": 59},
        saved_as="shards",
        ends_early=True,
    ),
    "llama_grouped": Case(
        "LlamaForCausalLM",
        LLAMA
        | {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 38, "tie_word_embeddings": True}
        | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    ),
    "llama_untied": Case(
        "LlamaForCausalLM",
        LLAMA
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 34}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama3_scaled": Case(
        "LlamaForCausalLM",
        LLAMA
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 33, "tie_word_embeddings": True}
        | {"max_position_embeddings": 512, "eos_token_id": [2, 60]}
        | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 128}},
    ),
    "t5": Case(
        "T5ForConditionalGeneration",
        T5 | {"d_kv": 6, "num_heads": 4, "d_ff": 20, "num_layers": 2, "relative_attention_max_distance": 9},
    ),
    "t5_gated": Case(
        "T5ForConditionalGeneration",
        T5
        | {"d_kv": 4, "num_heads": 3, "d_ff": 13, "num_layers": 3, "num_decoder_layers": 2}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_max_distance": 12},
        untied=True,
    ),
    "bart": Case(
        "BartForConditionalGeneration",
        BART
        | {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 17}
        | {"decoder_layers": 1, "decoder_attention_heads": 3, "decoder_ffn_dim": 19},
    ),
    "bart_scaled": Case(
        "BartForConditionalGeneration",
        BART
        | {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 18, "scale_embedding": True}
        | {"decoder_attention_heads": 4, "decoder_ffn_dim": 15, "activation_function": "relu"},
    ),
    "bart_untied": Case(
        "BartForConditionalGeneration",
        BART
        | {"encoder_layers": 1, "encoder_attention_heads": 3, "encoder_ffn_dim": 14, "tie_word_embeddings": False}
        | {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 16, "no_repeat_ngram_size": 2},
    ),
    "marian": Case(
        "MarianMTModel",
        BART
        | {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 16, "scale_embedding": True}
        | {"decoder_attention_heads": 3, "decoder_ffn_dim": 13, "activation_function": "swish"}
        | {"pad_token_id": 60, "decoder_start_token_id": 60},
    ),
    "marian_tables": Case(
        "MarianMTModel",
        BART
        | {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 12, "scale_embedding": True}
        | {"decoder_layers": 1, "decoder_attention_heads": 3, "decoder_ffn_dim": 11, "activation_function": "swish"}
        | {"pad_token_id": 60, "decoder_start_token_id": 60, "share_encoder_decoder_embeddings": False},
    ),
    "vit_classes": Case(
        "ViTForImageClassification",
        VIT
        | {"num_attention_heads": 4, "intermediate_size": 36, "num_labels": 3}
        | {"image_size": [8, 12], "patch_size": [4, 3], "num_channels": 3},
    ),
    "vit_plain": Case(
        "ViTModel",
        VIT
        | {"hidden_size": 30, "num_attention_heads": 3, "intermediate_size": 41, "qkv_bias": False}
        | {"image_size": 9, "patch_size": 3, "num_channels": 1},
    ),
}
