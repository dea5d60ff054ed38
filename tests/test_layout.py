"""The house: floors, and what `import attn` costs."""

import subprocess
import sys

import pytest


def test_import_contracts_hold(repository):
    script = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


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
