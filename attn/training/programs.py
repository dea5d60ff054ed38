"""Compiling programs: several at a time, and each only once per machine."""

import contextlib
import hashlib
import os
import pathlib
import platform
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped

_TRACING = threading.Lock()
_LIMIT = 1 << 26  # bytes of all programs that are kept
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # first bytes of a Zstandard file
_CPU = ("model name", "flags", "Features", "CPU part")  # lines of /proc/cpuinfo that identify a CPU, on x86 and ARM


def compiled(program: Wrapped, *arguments, mesh: Mesh, level: int = 1) -> Compiled:
    """Compile a jitted function for arguments, of which only shapes and shardings matter.

    It is traced under the mesh, so that attention knows the device that it is compiled for.

    On a CPU, LLVM's full optimization takes longer than it saves. At level 1 a training step compiles in three quarters
    of the time and is as fast, since most of its time goes into matrix products, which come from a library. At level 0
    a program compiles faster still, but takes twice as long to run: for programs that run once.
    """
    # Python traces one program at a time anyway. With the lock the first one is traced without pauses, so that it
    # starts to compile early, while the others are traced.
    with _TRACING, jax.set_mesh(mesh):
        lowered = program.lower(*arguments)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return lowered.compile({"xla_backend_optimization_level": level} if on_cpu else None)


@contextlib.contextmanager
def compiling() -> Iterator[ThreadPoolExecutor]:
    """Make threads to compile in. After an error or ^C they are not waited for: a compilation cannot be stopped.

    Several hosts must compile in the same order, so each of them uses one thread.
    """
    pool = ThreadPoolExecutor(1 if jax.process_count() > 1 else None)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def keep_programs(folder: pathlib.Path | None = None):
    """Keep compiled programs in a folder, from which later processes load them, unless JAX has a cache already.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.

    Args:
      folder: None for the user's cache folder. If it cannot be written, no programs are kept.
    """
    # With a full disk or a damaged file the program is compiled again, so the warning does not help.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
        folder = (_users_folder() if folder is None else folder.resolve()) / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            _sweep(folder)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _users_folder() -> pathlib.Path:
    """Return the user's folder for programs."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else pathlib.Path.home() / ".cache") / "attn" / "programs"


def _processor() -> str:
    """Return a name for this kind of CPU: another kind may lack instructions that its programs use."""
    description = platform.processor() + platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        description = "".join(sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(_CPU)}))
    return hashlib.sha256(description.encode()).hexdigest()[:16]


def _sweep(folder: pathlib.Path):
    """Delete damaged programs, which JAX would neither load nor replace, and the oldest ones beyond `_LIMIT`."""
    total = 0  # bytes, from the newest on
    for path in sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime, reverse=True):
        total += path.stat().st_size
        if total > _LIMIT or not _is_complete(path.read_bytes()):
            path.unlink()


def _is_complete(data: bytes) -> bool:
    """Return whether the file of a program seems complete; one in Zstandard's format is not checked."""
    if data.startswith(_ZSTANDARD):  # JAX uses Zstandard if it is installed, zlib otherwise
        return True
    with contextlib.suppress(zlib.error):
        return bool(zlib.decompress(data))
    return False
