"""Puts the helper modules of these tests on the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for interop_cases, flax_cases and jax_nn_cases
