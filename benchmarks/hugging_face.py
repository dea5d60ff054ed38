"""Record what Hugging Face's transformers computes for tiny models of eight families, for tests without torch.

    python benchmarks/hugging_face.py
    python benchmarks/hugging_face.py --only t5 t5_gated

Needs torch and transformers (`pip install torch transformers`), neither JAX nor this package.

Each case is a folder: config.json and the weights as `save_pretrained` writes them (three cases use the other file
formats), and recorded.npz with the logits, the hidden states of every layer and all attention maps. Names of arrays:
- inputs/NAME: arguments of the model. One row is padded on the right.
- float32/OUTPUT, float64/OUTPUT or float32/OUTPUT/LAYER: outputs under the names that transformers gives them.
- second/inputs/NAME, second/float64/OUTPUT: the same tokens without optional arguments; for decoder-only models a batch
  that is padded on the left, without position_ids. In these, padding tokens without a mask count as tokens.
- generate/input_ids, generate/attention_mask, generate/tokens: greedy decoding of 9 tokens. It runs in float64, so that
  a rounding error never decides between two tokens; float32 must give the same tokens.

Every parameter and saved buffer is redrawn with seed 0. In a new model biases are 0 and norms are 1, so that a wrong
bias or norm would change nothing.

float64 needs patches, because transformers computes parts in float32 even if all weights are float64:
- norms (T5, Llama), softmax (Llama, ViT), rotary angles (Llama) and the logits of `generate` are cast to float32. A
  torch function mode replaces the type float32 by float64 in every call, and `Tensor.float` by `Tensor.double`; the
  default type of new tensors is float64.
- rotary frequencies (Llama) and sinusoids (Marian) are rounded to float32 when the model is built. Both are computed
  again.
A torch dispatch mode raises an error if any operation still returns float32. The float32 results must agree with the
float64 results to 2e-5.

Also writes versions.json, and no_influence.json: {case: names of saved tensors that change no recorded output}. For
example, a bias of the keys adds the same number to all scores of a query, which softmax ignores.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import json
import pathlib
import shutil

import numpy as np
from hugging_face_cases import CASES, VOCABULARY, Case

try:
    import safetensors.torch
    import torch
    import transformers
except ImportError:  # --help works without them
    torch = None

ROOT = pathlib.Path(__file__).parent.parent
OUTPUTS = "logits last_hidden_state pooler_output encoder_last_hidden_state"
LAYERS = "hidden_states attentions decoder_hidden_states decoder_attentions cross_attentions encoder_hidden_states"
NAMES = (*OUTPUTS.split(), *LAYERS.split(), "encoder_attentions")
WIDTHS = 8, 5  # lengths of a batch: the second row is padded
ANSWERS = 5, 3  # lengths of the decoder's rows
PROMPTS = 6, 4, 2


def main():
    """Record the cases, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=CASES, metavar="CASE", help=f"Cases to record: {', '.join(CASES)}."
    )
    output = ROOT / "tests/pretrained/recorded"
    parser.add_argument("--output", type=pathlib.Path, default=output, help="Folder of the recordings.")
    arguments = parser.parse_args()
    if torch is None:
        parser.error("torch, transformers and safetensors are needed: pip install torch transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    silent = {}
    for name in arguments.only or CASES:
        silent[name] = record(name, CASES[name], arguments.output / name)
    update(arguments.output / "no_influence.json", silent)
    update(
        arguments.output / "versions.json", {module.__name__: module.__version__ for module in (torch, transformers)}
    )


def update(path: pathlib.Path, entries: dict):
    """Add entries to a JSON file, and sort them."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted((before | entries).items())), indent=1) + "\n")


def record(name: str, case: Case, folder: pathlib.Path) -> list[str]:
    """Write the folder of a case; return the names of the saved tensors without influence."""
    model = build(case)
    exact = in_float64(model)
    if case.ends_early:
        for changed in (model, exact):
            choose_end(changed, prompts(model))
    save(model, case, folder)
    check_saved(model, case, folder)
    first, second = inputs(model)
    recorded = {"inputs": first, "float32": run(model, first)}
    with only_float64():
        recorded["float64"] = run(exact, first)
        if second:
            recorded["second/inputs"], recorded["second/float64"] = second, run(exact, second)
    if model.can_generate():
        recorded["generate"] = generate(model, exact)
    difference = largest_difference(recorded["float32"], recorded["float64"])
    assert difference < 2e-5, f"{name}: float32 and float64 differ by {difference}"
    arrays = {f"{group}/{key}": value for group, values in recorded.items() for key, value in values.items()}
    assert all(np.isfinite(value).all() for value in arrays.values()), f"{name}: a recorded number is not finite"
    np.savez_compressed(folder / "recorded.npz", **arrays)
    silent = without_influence(exact, read(folder), first, recorded["float64"])
    numbers = sum(parameter.numel() for parameter in model.parameters())
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1000
    print(
        f"{name:14} {case.model:30} {numbers:7,} parameters  {len(arrays):3} arrays  {size:4.0f} kB  "
        f"float32 differs by {difference:.0e}  {len(silent)} without influence  torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        flush=True,
    )
    return silent


def build(case: Case):
    """Return the model of a case in evaluation mode, with all parameters and saved buffers redrawn."""
    kind = getattr(transformers, case.model)
    model = kind._from_config(kind.config_class(**case.config), attn_implementation="eager").eval()
    if case.untied:
        # T5's config always ties. Its weights are untied if the file has both tensors, as for T5 v1.1.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.all_tied_weights_keys.pop("lm_head.weight")
    random, seen = np.random.default_rng(0), set()
    for name, value in model.state_dict(keep_vars=True).items():
        # A tied parameter appears once per name, and the sinusoids are computed instead of saved.
        if id(value) not in seen and value.is_floating_point() and name not in (kind._keys_to_ignore_on_save or ()):
            seen.add(id(value))
            parent, _, leaf = name.rpartition(".")
            mean, deviation = distribution(model.get_submodule(parent), leaf, value.shape)
            drawn = mean + deviation * random.standard_normal(value.shape)
            value.data.copy_(torch.from_numpy(drawn))
    return model


def distribution(module, leaf: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the mean and the standard deviation for a parameter of a module."""
    if "Norm" in type(module).__name__ and leaf == "weight":
        return 1.0, 0.3
    if leaf.endswith("bias"):
        return 0.0, 0.3
    if isinstance(module, torch.nn.Embedding) or leaf in ("cls_token", "position_embeddings"):
        # Small embeddings of tokens let the layers decide what is decoded, instead of the last token.
        return 0.0, 0.25 if shape[0] == VOCABULARY else 1.0
    # GPT-2's matrices have the axes (in, out), all others (out, in, ...).
    inwards = shape[:1] if type(module).__name__ == "Conv1D" else shape[1:]
    return 0.0, 1.25 / np.sqrt(np.prod(inwards))  # 0.26 for a width of 24


def in_float64(model):
    """Return a copy of a model with the same weights in float64, and with constants that are computed in float64."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(module, "inv_freq"):
            rounded = module.inv_freq
            with only_float64():
                module.inv_freq = type(module)(module.config).inv_freq
            assert rounded.equal(rounded.float().double()) and not module.inv_freq.equal(rounded)
            torch.testing.assert_close(module.inv_freq, rounded, rtol=1e-6, atol=0)
        if type(module).__name__ == "MarianSinusoidalPositionalEmbedding":
            positions, width = module.weight.shape
            angles = np.arange(positions)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
            table = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
            torch.testing.assert_close(module.weight.data, table, rtol=0, atol=1e-7)
            module.weight.data = table
    return exact


@contextlib.contextmanager
def only_float64():
    """Replace float32 by float64 in every call of torch; raise an error if an operation returns float32."""

    class Promote(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            function = torch.Tensor.double if function is torch.Tensor.float else function
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
            return function(*args, **kwargs)

    class Refuse(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            for result in torch.utils._pytree.tree_leaves(results):
                if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                    raise TypeError(f"{function} returned float32 in a float64 model")
            return results

    torch.set_default_dtype(torch.float64)
    try:
        with Refuse(), Promote():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def save(model, case: Case, folder: pathlib.Path):
    """Write config and weights; a former folder of the case is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    limit = {"max_shard_size": "25KB"} if case.saved_as == "shards" else {}
    model.save_pretrained(folder, **limit)
    if case.saved_as in ("zip", "legacy"):
        # Until version 4, save_pretrained pickled the state. Its names are those of the safetensors file.
        tensors = model.state_dict()
        assert tensors.keys() == read(folder).keys()
        (folder / "model.safetensors").unlink()
        zipped = case.saved_as == "zip"
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def read(folder: pathlib.Path) -> dict:
    """Return the tensors that are saved in a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors or torch.load(folder / "pytorch_model.bin", weights_only=True)


def check_saved(model, case: Case, folder: pathlib.Path):
    """Check that transformers reads the same model from the files as was written, and that all formats are there."""
    loaded = type(model).from_pretrained(folder, attn_implementation="eager").state_dict()
    for name, value in model.state_dict().items():
        assert value.equal(loaded[name]), f"{folder}: {name} is not read as it was written"
    assert len(list(folder.glob("model-*.safetensors"))) >= (2 if case.saved_as == "shards" else 0)


def inputs(model) -> tuple[dict, dict]:
    """Return two sets of arguments as NumPy arrays; the second is empty for images."""
    config, random = model.config, np.random.default_rng(1)
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        return {"pixel_values": random.standard_normal((2, config.num_channels, *size)).astype(np.float32)}, {}
    first = padded(config, random, WIDTHS)
    if config.is_encoder_decoder:
        decoder = padded(config, random, ANSWERS)
        decoder["input_ids"][:, 0] = config.decoder_start_token_id
        first |= {f"decoder_{name}": value for name, value in decoder.items()}
        return first, {name: first[name] for name in ("input_ids", "decoder_input_ids")}
    if model.can_generate():
        first["input_ids"][0, 2] = 0  # a token as any other for GPT-2 and Llama
        return first, padded(config, random, ANSWERS, left=True)
    first["token_type_ids"] = np.sort(random.integers(config.type_vocab_size, size=first["input_ids"].shape))
    return first, {"input_ids": first["input_ids"]}


def padded(config, random, lengths: tuple[int, ...], left: bool = False) -> dict:
    """Return random tokens in rows of these lengths, padded on one side, and their mask."""
    shape = len(lengths), max(lengths)
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    mask = mask[:, ::-1] if left else mask
    padding = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    ids = np.where(mask, random.integers(3, 58, shape), padding)  # without any family's special tokens
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


def prompts(model) -> dict:
    """Return a batch to decode from: padded on the left for decoder-only models, else on the right."""
    return padded(model.config, np.random.default_rng(2), PROMPTS, left=not model.config.is_encoder_decoder)


def tensors_for(model, arrays: dict) -> dict:
    """Return arrays as tensors; real numbers get the type of the model's weights."""
    real = np.float64 if model.dtype == torch.float64 else np.float32
    typed = {name: value.astype(real) if value.dtype.kind == "f" else value for name, value in arrays.items()}
    return {name: torch.from_numpy(value) for name, value in typed.items()}


def run(model, arguments: dict) -> dict[str, np.ndarray]:
    """Return all outputs of a model by their names, one array per layer where there are several."""
    cached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    outputs = model(**tensors_for(model, arguments), **cached, output_hidden_states=True, output_attentions=True)
    arrays = {}
    for name in NAMES:
        value = outputs.get(name)
        if isinstance(value, torch.Tensor):
            arrays[name] = value.numpy()
        for layer, part in enumerate(value if isinstance(value, tuple) else ()):
            arrays[f"{name}/{layer}"] = part.numpy()
    return arrays


def decode(model, arguments: dict) -> np.ndarray:
    """Return the tokens of greedy decoding."""
    return model.generate(**tensors_for(model, arguments), do_sample=False, num_beams=1, max_new_tokens=9).numpy()


def generate(model, exact) -> dict:
    """Return prompts and the tokens that are decoded from them, after a check that float32 gives the same tokens."""
    batch = prompts(model)
    with only_float64():
        tokens = decode(exact, batch)
    assert np.array_equal(tokens, decode(model, batch)), "float32 and float64 decode different tokens"
    return batch | {"tokens": tokens}


def choose_end(model, batch: dict):
    """Make a token the end token that the first row decodes in the middle, before the other rows do."""
    decoded = decode(model, batch)[:, max(PROMPTS) :]
    first, others = decoded[0].tolist(), decoded[1:]
    end = next(t for i, t in enumerate(first) if 3 <= i < 7 and t not in first[:i] and t not in others[:, : i + 1])
    model.config.eos_token_id = model.generation_config.eos_token_id = end


def largest_difference(some: dict, others: dict) -> float:
    """Return the largest difference between two sets of outputs."""
    assert some.keys() == others.keys()
    return max(float(np.abs(value - others[name]).max()) for name, value in some.items())


def without_influence(exact, saved: dict, arguments: dict, expected: dict) -> list[str]:
    """Return the names of saved tensors whose change does not change any output by more than 1e-9."""
    values = exact.state_dict()
    evaluate = functools.partial(run, exact, arguments)
    silent = []
    for name, tensor in sorted(saved.items()):
        # The name in a file may differ from the name in the model; random values are never the same.
        own = next(value for value in values.values() if value.shape == tensor.shape and value.equal(tensor.double()))
        before = own.clone()
        own += torch.from_numpy(np.random.default_rng(3).standard_normal(own.shape))
        with only_float64():
            difference = largest_difference(evaluate(), expected)
        own.copy_(before)
        if difference <= 1e-9:
            silent.append(name)
    return silent


if __name__ == "__main__":
    main()
