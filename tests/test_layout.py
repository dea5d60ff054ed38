"""The layers of the package, and the cost of `import attn`."""

import ast
import subprocess
import sys

import pytest


def test_import_contracts_hold(repository):
    script = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


def test_the_attention_functions_import_jax_jaxtyping_and_numpy_alone(repository):
    """The contract of import-linter forbids some packages by name; this allows three."""
    for path in sorted((repository / "attn/functional").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                package = name.split(".")[0]
                is_ours = name == "attn.functional" or name.startswith("attn.functional.")
                allowed = is_ours or package in {"jax", "jaxtyping", "numpy"} or package in sys.stdlib_module_names
                assert allowed, f"{path.name} imports {name}"


def test_nothing_below_the_commands_names_the_studies(repository):
    for path in sorted((repository / "attn").rglob("*.py")):
        if "studies" in path.parts or path.name in ("commands.py", "cli.py"):
            continue
        assert "attn.studies" not in path.read_text(), path


@pytest.mark.parametrize(
    "module", ["flax", "optax", "orbax", "matplotlib", "tensorboardX", "ml_collections", "absl.flags"]
)
def test_import_attn_stays_light(module, loaded_by_attn):
    assert module not in loaded_by_attn


def test_import_attn_starts_no_backend(loaded_by_attn):
    assert "backends: []" in loaded_by_attn


@pytest.fixture(scope="module")
def loaded_by_attn(repository) -> list[str]:
    script = (
        "import sys, attn; from jax._src import xla_bridge;"
        "print(*sys.modules, f'backends: {list(xla_bridge._backends)}', sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
