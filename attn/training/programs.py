"""Compiling programs: several at a time, and each only once on a machine."""

import contextlib
import hashlib
import os
import pathlib
import platform
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped

_TRACING = threading.Lock()
_CPU = ("model name", "flags", "Features", "CPU part")  # what /proc/cpuinfo says of a processor, on x86 and on ARM


def compiled(program: Wrapped, *arguments, mesh: Mesh, level: int = 1) -> Compiled:
    """Compile a jitted function for arguments, of which only shapes and shardings count.

    On a CPU, thorough optimization of what LLVM sees costs more than it saves. At level 1 a training step compiles in
    three quarters of the time and is as fast: what takes long are matrix products, which are in a library. At level 0 a
    program compiles faster still, and takes twice as long: for what runs once.
    """
    # Python traces one program at a time anyway. In turns, the first is traced soonest, and others while it compiles.
    with _TRACING:
        lowered = program.lower(*arguments)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return lowered.compile({"xla_backend_optimization_level": level} if on_cpu else None)


@contextlib.contextmanager
def compiling() -> Iterator[ThreadPoolExecutor]:
    """Threads to compile in, not waited for after an error or an interruption: a compilation cannot be stopped.

    Several hosts must compile in one order; one host may do it all at once.
    """
    pool = ThreadPoolExecutor(1 if jax.process_count() > 1 else None)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def keep_programs(folder: pathlib.Path | None = None):
    """Keep compiled programs in a folder, from where later processes load them; unless they are kept elsewhere.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=0 keeps none.

    Args:
      folder: the user's own for programs of this processor, unless given. Where it cannot be written, none is kept.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home is a RuntimeError
        folder = _of_this_processor() if folder is None else folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
            # A full disk, or a file that is damaged: the program is compiled again.
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def _of_this_processor() -> pathlib.Path:
    """The user's folder for programs of this processor: others may lack instructions that these use."""
    about = platform.processor() + platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        about = "".join(sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(_CPU)}))
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "attn" / f"programs-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
