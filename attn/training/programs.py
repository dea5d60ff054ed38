"""Compiling programs: several at a time, and each only once on a machine."""

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
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # how its files begin
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
      folder: the user's own, unless given. Where it cannot be written, none is kept.
    """
    # A full disk, or a file that is damaged: the program is compiled again.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home is a RuntimeError
        folder = (_users_folder() if folder is None else folder.resolve()) / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            _sweep(folder)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _users_folder() -> pathlib.Path:
    """The user's folder for programs."""
    given = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else pathlib.Path.home() / ".cache") / "attn" / "programs"


def _processor() -> str:
    """A name for this kind of processor: others may lack instructions that its programs use."""
    about = platform.processor() + platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        about = "".join(sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(_CPU)}))
    return hashlib.sha256(about.encode()).hexdigest()[:16]


def _sweep(folder: pathlib.Path):
    """Delete programs that are damaged, which JAX would neither load nor replace, and the oldest beyond a limit."""
    kept = 0
    for path in sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime, reverse=True):
        kept += path.stat().st_size
        if kept > _LIMIT or not _is_whole(path.read_bytes()):
            path.unlink()


def _is_whole(data: bytes) -> bool:
    """Return whether a program seems to be written to its end."""
    if data.startswith(_ZSTANDARD):  # which JAX uses where it is installed
        return True
    with contextlib.suppress(zlib.error):
        return bool(zlib.decompress(data))
    return False
