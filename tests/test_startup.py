"""The start and the end of commands: ^C at any moment is one line, and a reader that leaves stops nothing."""

import os
import signal
import subprocess
import sys

import pytest

from attn import startup

# Sends ^C to itself when a module is about to be imported.
INTERRUPTED_AT = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""
# A process that is started in the background of a script ignores ^C, and so do its children.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
TRAIN = "import runpy; runpy.run_path({script!r}, run_name='__main__')"
ASK = "from attn import cli; cli.script()"


def run(program: str, *words: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Run a program as a process of its own."""
    kept = {name: value for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", LISTENING + program, *words], env=kept, capture_output=True, text=True, timeout=300
    )


@pytest.mark.some(1)
@pytest.mark.parametrize("module", ["jax", "attn.experiment"])
def test_interrupted_while_it_imports_training_says_one_line(repository, tmp_path, module):
    program = INTERRUPTED_AT.format(module=module) + TRAIN.format(script=str(repository / "train.py"))
    done = run(program, f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped before the run began\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.some(1)
@pytest.mark.parametrize("words", [["predict", "RUN", "1"], ["lengths"]])
def test_interrupted_while_it_imports_a_command_says_one_line(tmp_path, words):
    done = run(INTERRUPTED_AT.format(module="flax") + ASK, *words)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_interrupted_inside_of_a_compilation_a_command_leaves_at_once(copy_run):
    """The main thread waits for ever inside of C, with the interpreter released, as it does while XLA compiles."""
    stuck = """
import ctypes, os, signal, threading
from attn import cli, commands
def predict(arguments):
    lock, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    library.pthread_mutex_lock(lock)
commands.predict = predict
cli.script()
"""
    done = run(stuck, "predict", str(copy_run), "1")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.some(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_compiles_training_does_not_wait_for_the_compilation(repository, tiny, tmp_path, number):
    """The compilation never ends."""
    endless = f"""
import os, threading
from attn.training import loop
def compile_steps(*_):
    os.kill(os.getpid(), {int(number)})
    threading.Event().wait()
loop.compile_steps = compile_steps
"""
    flags = [f"--config.{key}={value}" for key, value in tiny.items()]
    words = [f"--config={repository}/configs/copy.py", *flags, f"--workdir={tmp_path / '-my run'}", "--distributed=off"]
    done = run(endless + TRAIN.format(script=str(repository / "train.py")), *words)
    go_on = f"python train.py --resume '--workdir={tmp_path / '-my run'}'"
    assert (done.returncode, done.stderr) == (130, f"stopped; resume with: {go_on}\n")
    assert {"config.json", "data.json"} <= {path.name for path in (tmp_path / "-my run").iterdir()}
    assert not (tmp_path / "-my run/lock.json").exists()


def test_a_reader_that_leaves_ends_nothing(tmp_path):
    """As `| head -1` with a pipe that is full at once: all that follows goes nowhere, the work is done."""
    program = f"""
from attn import startup
def work():
    for _ in range(20_000):
        print("a line")
    open({str(tmp_path / "done")!r}, "w").close()
    return 0
startup.run(work)
"""
    for unbuffered in (None, "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered or ""}
        words, pipe = [sys.executable, "-c", program], subprocess.PIPE
        with subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout.readline() == "a line\n"
            process.stdout.close()
            assert (process.wait(timeout=60), process.stderr.read()) == (0, "")
        (tmp_path / "done").unlink()


def test_libraries_keep_quiet_where_home_cannot_be_written():
    program = "from attn import startup; startup.begin(); import matplotlib.font_manager, sys; print('here')"
    nowhere = {"HOME": "/proc/nowhere", "XDG_CONFIG_HOME": None, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None}
    done = run(program, **nowhere)
    assert (done.returncode, done.stdout, done.stderr) == (0, "here\n", "")


@pytest.mark.parametrize(("given", "level"), [(None, "3"), ("0", "0")])
def test_alarms_of_the_compiler_are_off_unless_asked_for(given, level):
    show = "import os; print(os.environ.get('TF_CPP_MIN_LOG_LEVEL'))"
    done = run(f"from attn import startup; startup.begin(); {show}", TF_CPP_MIN_LOG_LEVEL=given)
    assert done.stdout == f"{level}\n"
    assert run(f"import attn; {show}", TF_CPP_MIN_LOG_LEVEL=given).stdout == f"{given}\n"


def test_where_interrupts_are_ignored_they_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with startup.leaving_at_once("stopped"):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
