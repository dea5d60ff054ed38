"""Mistakes in a file outside of the package: one line names the mechanism, its function, and the line of the file."""

import re
import subprocess
import sys

import pytest

from attn import experiment
from attn.tasks import Generated
from attn.training.checks import check_runs
from attn.training.config import ConfigError, from_mapping

FILE = """
import jax.numpy as jnp
from attn.mechanisms import HeadParam, Mechanism, register

@register
class mistaken(Mechanism):
    {function}
        {body}
    def key(self, x, k):
        return x
"""
MISTAKES = [  # function, body, words of the message; the body is line 8 of the file
    ("def score(self, q, k):", "return lambda s, q, k: s * nope", "NameError: name 'nope' is not defined, in `score`"),
    ("def query(self, x, q):", "return x * self.gain", "AttributeError: 'mistaken' object has no attribute 'gain', in"),
    (
        "def query(self, x, q):",
        "return x[:, :2]",
        "returned float32[6, 2], must be float32[6, 8], as its argument, in `query`",
    ),
    (
        "def value(self, x, k):",
        "return x.sum()",
        "returned float32[], must be float32[6, 8], as its argument, in `value`",
    ),
    (
        "def embedding(self, rows):",
        "return jnp.ones(3)",
        "returned float32[3], must be of shape [6, 32], in `embedding`",
    ),
    ("def mask(self, q, k):", "return lambda i, j: i <= j + 1.5", "'Rows' and 'float', in `mask`"),
    ("def query(self, x, q):", "self.x = x", "returned NoneType, must be float32[6, 8], as its argument, in `query`"),
    ("def query(self, x, q):", "return x.astype('bfloat16')", "returned bfloat16[6, 8], must be float32[6, 8], as its"),
    (
        "def setup(self, layer, rngs):",
        "self.table = jnp.ones(3)",
        "mistaken.table: got an array of JAX, must be a",
    ),
    (
        "def setup(self, layer, rngs):",
        "import numpy; self.table = numpy.ones(3)",
        "mistaken.table: got ndarray, must be",
    ),
    (
        "def setup(self, layer, rngs):",
        "self.rngs = rngs",
        "mistaken.rngs: got Rngs, must be a HeadParam, an nnx.Param or",
    ),
    (
        "def setup(self, layer, rngs):",
        "self.slopes = HeadParam(jnp.arange(layer.num_heads))",
        "mistaken.slopes: got a parameter of int32, must be float32",
    ),
    ("def mask(self, q, k):", "return 3", "returned int, must be a mask of `attn`, a function, or None, in `mask`"),
    ("def score(self, q, k):", "return lambda s, q, k: s * (q - k)", "'Rows' and 'Rows', in `score`"),
    ("def score(self, q, k):", "return lambda s, q, k: s[None]", "score mistaken returned shape (1, 6, 6)"),
    ("def setup(self, layer, rngs):", "self.gain = layer.heads", "'Layer' object has no attribute 'heads', in `setup`"),
    (
        "def setup(self, layer, rngs):",
        "self.gain = HeadParam(jnp.ones(layer.head_width))",
        "HeadParam gain: got shape (8,), must have one slice per head: the first axis must be 4, in `setup`",
    ),
]


WRONG_RULE = """
from attn import tasks

@tasks.register("wrong", fixed_length=True)
def wrong(symbols, length, num_symbols):
    return symbols + 1, length  # beyond the last symbol
"""


@pytest.mark.parametrize("function, body, words", MISTAKES)
def test_a_mistake_in_a_mechanism_is_one_line_that_names_it(write_module, tmp_path, function, body, words):
    module = write_module("mistaken", FILE.format(function=function, body=body))
    model = {"mechanism": "sinusoidal + mistaken", "width": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}
    config = from_mapping({"imports": [module], "model": model, "task": {"max_length": 5}})
    with pytest.raises(ConfigError) as error:
        check_runs(config, Generated(config.task))
    message = str(error.value)
    assert message.startswith("config.model: ") and words in message and "\n" not in message
    is_raised_in_the_file = "Error: " in message or "unsupported operand" in message
    assert message.endswith(f", line 8 of {tmp_path / module}.py") == is_raised_in_the_file


def test_a_file_that_computes_with_jax_while_it_is_imported_is_named(write_module, repository, tmp_path):
    """JAX would have started with one device, and could not join other hosts."""
    module = write_module("eager", "import jax.numpy as jnp\nSLOPE = jnp.float32(0.3)\n")
    words = [sys.executable, "train.py", f"--imports={module}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    assert f"importing {module} computes with JAX before its devices are set up" in done.stderr


def test_wrong_answers_of_a_rule_are_one_line_and_nothing_is_written(write_module, repository, tmp_path, capsys):
    module = write_module("wrong", WRONG_RULE)
    settings = {"imports": module, "task.name": "wrong", "task.max_length": "4"}
    request = experiment.Request(str(repository / "configs/reverse.py"), settings, str(tmp_path / "run"), False, "off")
    assert experiment.run(request) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rule 'wrong': the answer to ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


UNNAMED_MAPS = """
from attn.nn.decoder_only import DecoderOnly
from attn.nn.models import register

@register("unnamed")
class Unnamed(DecoderOnly):
    maps = ()
"""


def test_attention_weights_without_a_name_are_found_before_training(write_module):
    module = write_module("unnamed", UNNAMED_MAPS)
    config = from_mapping({"imports": [module], "model": {"name": "unnamed", "num_layers": 1}})
    with pytest.raises(ConfigError, match=r"'unnamed' returns attention weights \['decoder'\], which its maps"):
        check_runs(config, Generated(config.task))


EMPTY_ANSWERS = """
from attn import tasks

@tasks.register("nothing", most_symbols=lambda n: 1)
def nothing(symbols, length, num_symbols):
    return symbols[:1], 0
"""


def test_answers_without_a_symbol_are_evaluated_and_reported(write_module, repository, tiny, tmp_path, capsys):
    settings = {"imports": write_module("nothing", EMPTY_ANSWERS), "task.name": "nothing", "training.steps": "20"}
    request = experiment.Request(
        str(repository / "configs/reverse.py"), tiny | settings, str(tmp_path / "run"), False, "off"
    )
    assert experiment.run(request) == 0
    assert re.search(r"^error rate +-  ", capsys.readouterr().out, re.M)
