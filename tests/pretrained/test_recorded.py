"""Logits, hidden states and attention maps equal those of the library transformers, for every family.

All parameters of the recorded models were drawn again, so that no bias of 0 and no gain of 1 hides an error.
"""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import pretrained
from attn.pretrained.families import FAMILIES
from attn.pretrained.files import open_tensors, save_tensors
from attn.pretrained.loading import filled, load, save
from attn.pretrained.rules import by_path
from attn.studies.recordings import CASES, FOLDER, real_rows, recording

TOLERANCES = {"float32": 1e-5, "float64": 1e-9}
# Names of the tensors that change nothing: biases of keys, which the softmax cancels.
NO_INFLUENCE = json.loads((FOLDER / "no_influence.json").read_text())
every_case = pytest.mark.parametrize("case", CASES)
WRITERS = [case for case in CASES if recording(case).group("generate")]


@contextlib.contextmanager
def float64(on: bool = True):
    """Let JAX compute in float64."""
    with jax.enable_x64(on):
        yield


def output_of(out: pretrained.Output, name: str) -> np.ndarray:
    """Return an output by its name in the recordings, such as "attentions/1"."""
    name, _, layer = name.partition("/")
    return np.asarray(out[name][int(layer)] if layer else out[name])


def test_every_family_is_recorded():
    assert {recording(case).path.name.split("_")[0].rstrip("3") for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_case
def test_outputs_equal_the_recorded_ones(case, dtype):
    recorded = recording(case)
    with float64(dtype == "float64"):
        model = load(recorded.path, dtype=dtype)
        for batch in recorded.batches:
            inputs, expected = recorded.inputs(batch), recorded.outputs(dtype, batch)
            out = model(**inputs) if expected else None
            for name, values in expected.items():
                rows = real_rows(name, inputs, values)
                found = output_of(out, name)
                assert found.dtype == dtype and found.shape == values.shape
                message = f"{batch}{name} is the first output that differs"
                # Hidden states of T5 reach 30, where 1e-5 is less than ten steps of float32.
                scale = max(1, np.abs(values[rows]).max()) if "hidden" in name else 1
                np.testing.assert_allclose(
                    found[rows], values[rows], atol=TOLERANCES[dtype] * scale, rtol=0, err_msg=message
                )
            if expected:
                lengths = {name.partition("/")[0] for name in expected}
                given = {name for name in vars(out) if out[name] is not None}
                assert lengths <= given and given - lengths <= {"last_hidden_state", "pooler_output"}


@pytest.mark.parametrize("case", WRITERS)
def test_greedy_decoding_writes_the_recorded_tokens(case):
    """In float64, in which no two logits are so close that another processor would choose the other."""
    recorded = recording(case).group("generate")
    with jax.enable_x64(True):
        model = load(recording(case).path, dtype="float64")
        tokens = model.generate(recorded["input_ids"], recorded["attention_mask"], max_new_tokens=9)
    np.testing.assert_array_equal(tokens, recorded["tokens"])


@pytest.mark.parametrize("case", WRITERS)
def test_the_cache_gives_the_logits_of_a_full_pass(case):
    recorded = recording(case).inputs()
    with jax.enable_x64(True):
        model = load(recording(case).path, dtype="float64")
        source = recorded["input_ids"][0]
        texts = recorded.get("decoder_input_ids", recorded["input_ids"])[:1, :5]
        inputs = (
            {"input_ids": [source], "decoder_input_ids": texts}
            if "decoder_input_ids" in recorded
            else {"input_ids": texts}
        )
        full = model(**inputs).logits[0]
        if "decoder_input_ids" in recorded:
            state, first = model.model.prefill(jnp.asarray(source), jnp.ones(len(source), bool), 7), 0
        else:
            logits, state = model.model.prefill(jnp.asarray(texts[0, :2]), jnp.ones(2, bool), 7)
            np.testing.assert_allclose(logits, full[1], atol=1e-9)
            first = 2
        for index in range(first, texts.shape[1]):
            logits, state = model.model.step(jnp.asarray(texts[0, index]), jnp.int32(index), state)
            np.testing.assert_allclose(logits, full[index], atol=1e-9)


@every_case
def test_what_is_saved_loads_again_bit_for_bit(case, tmp_path):
    path = recording(case).path
    model = load(path)
    save(model, tmp_path)
    before, after = open_tensors(path), open_tensors(tmp_path)
    assert after.keys() == before.keys() - set(model.origin.copies)
    for name, tensor in after.items():
        values, expected = tensor.read(), before[name].read()
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values, expected, err_msg=name)
    again = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@every_case
def test_every_tensor_matters(case, tmp_path):
    """Changing any one tensor changes the logits, but for those of which the recording says that they cannot.

    Of a model without logits it changes another output.
    """
    recorded = recording(case)
    model = load(recorded.path)
    params = {path: np.asarray(x) for path, x in by_path(model.params).items()}

    @jax.jit
    def run(params):
        outs = [pretrained.Pretrained(params, model.origin)(**recorded.inputs(batch)) for batch in recorded.batches]
        return [jax.tree.leaves(out) if out.logits is None else [out.logits] for out in outs]

    usual, without = run(model.params), []
    for rule in model.origin.rules:
        changed = rule.write(params)
        changed = changed + np.random.default_rng(0).normal(size=changed.shape).astype(np.float32)
        new = filled(model.params, {**params, **rule.read(changed, params)})
        differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), run(new), usual)
        if max(jax.tree.leaves(differences)) < 1e-4:
            without.append(rule.theirs)
    assert sorted(without) == sorted({*NO_INFLUENCE[case]} - {*model.origin.ignored})


@every_case
def test_each_missing_or_misshapen_tensor_is_one_line(case, tmp_path):
    recorded = recording(case)
    (tmp_path / "config.json").write_bytes((recorded.path / "config.json").read_bytes())
    arrays = {name: tensor.read() for name, tensor in open_tensors(recorded.path).items()}
    for name in list(arrays)[:: max(1, len(arrays) // 5)]:
        for change in ("missing", "misshapen"):
            changed = {key: x for key, x in arrays.items() if key != name}
            if change == "misshapen":
                changed[name] = np.zeros((*arrays[name].shape, 2), np.float32)
            save_tensors(tmp_path / "model.safetensors", changed)
            with pytest.raises(pretrained.FileError) as error:
                load(tmp_path)
            assert "\n" not in str(error.value) and name in str(error.value)
            assert str(tmp_path) in str(error.value)
