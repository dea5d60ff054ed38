"""Results of `attn check` on kinds of devices: which kernels are right there, and faster than XLA's programs.

A kernel that has only been compiled, or run in an interpreter, may be wrong or slow on the device itself. So "auto" and
"fastest" choose one only on a kind of device for which a file here says that it has been run. `attn check --output`
writes such a file.
"""

import functools
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent


@functools.cache
def preferred(device_kind: str) -> frozenset[str]:
    """Return the names of the implementations that were right and faster on a kind of device."""
    results = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    return frozenset(name for each in results if each["device_kind"] == device_kind for name in each["preferred"])
