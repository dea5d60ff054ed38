"""What the README shows really runs: its commands on a tiny run, its Python as it stands, its links and its tree."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [
        text for name, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if name == language
    ]


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture
def shell(copy_run, tiny, tmp_path):
    """Run one command of the README in a copy-like folder: small sizes, and RUN is a finished run."""
    for name in ("configs", "train.py", "launch", "Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = [f"--config.{key}={value}" for key, value in (tiny | {"training.steps": "20"}).items()]

    def run(line: str) -> subprocess.CompletedProcess:
        if line.startswith("make "):
            line = line.replace("make ", "make --dry-run --always-make ")
        elif line.startswith("pip "):
            dry = "--dry-run --quiet --no-deps --no-build-isolation"
            line = line.replace("pip install", f"cd {ROOT} && python -m pip install {dry}") + " && echo done"
        elif line.startswith("python train.py"):
            line += " " + shlex.join(small)
        line = line.replace(" RUN", f" {copy_run}")
        # `python` and `attn` are those of the environment that runs the tests.
        environment = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_the_commands_are_those_that_are_tested():
    starts = {line.split()[0] for line in COMMANDS}
    assert starts == {"make", "pip", "python", "attn", "PROJECT=my-project"}


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--resume" not in line and "1:64" not in line])
def test_the_command_runs(shell, line):
    done = shell(line)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_evaluate_runs_beyond_the_training_lengths(shell):
    [line] = [line for line in COMMANDS if "1:64" in line]
    done = shell(line.replace("1:64", "1:9"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[9].split()[0] == "9"


def test_a_run_is_resumed_as_shown(shell):
    [resume] = [line for line in COMMANDS if "--resume" in line]
    workdir = re.search(r"--workdir=\S+", resume)[0]
    [start] = [line for line in COMMANDS if workdir in line and line != resume]
    assert shell(start).returncode == 0
    done = shell(resume)
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stdout


@pytest.mark.parametrize("code", blocks("python"), ids=["ask", "change"])
def test_the_python_runs(code, copy_run, capsys):
    exec(compile(code.replace('"RUN"', repr(str(copy_run))), "README.md", "exec"), {})
    if "masks" in code:
        assert "■ · ■ · ■ ·" in capsys.readouterr().out


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_tree_is_the_tree():
    [tree] = [block for block in blocks("") if "train.py" in block]
    names = [line.split()[0] for line in tree.splitlines()]
    inside = names.index("attn/")
    for place, name in enumerate(names):
        path = ROOT / "attn" / name if inside < place <= inside + 9 else ROOT / name
        assert path.exists(), name
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders - set(names) <= {"runs/", "build/", "dist/"}
