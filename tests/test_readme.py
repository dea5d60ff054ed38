"""The README works: its commands on a tiny run, its Python as it stands, its links and its tree."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from attn import experiment
from attn.training.flags import load_config, split_overrides

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING, DATA = ((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "docs/data.md"))


RECORDED = ROOT / "tests" / "pretrained" / "recorded"


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture
def shell(copy_run, tiny, tmp_path):
    """Run one command of the README in a copy-like folder: small sizes, and RUN is a finished run."""
    shutil.copytree(RECORDED / "bert_masked", tmp_path / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "text", "##s"]
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words))
    files = ("Makefile", "pyproject.toml", "requirements.txt", "requirements-browser.txt", "train.py")
    for name in ("benchmarks", "configs", "launch", *files):
        (tmp_path / name).symlink_to(ROOT / name)
    small = {f"--config.{key}={value}" for key, value in (tiny | {"training.steps": "20"}).items()}
    one_stack = {setting for setting in small if "coder_layers" not in setting}
    recurrent = {setting for setting in one_stack if "feed_forward" not in setting}
    of_pairs = {setting for setting in small if not setting.startswith("--config.task.")}

    def run(line: str) -> subprocess.CompletedProcess:
        if line.startswith("make "):
            line = line.replace("make ", "make --dry-run --always-make ")
        elif line.startswith("pip "):
            dry = "--dry-run --quiet --no-deps --no-build-isolation"
            line = line.replace("pip install", f"cd {ROOT} && python -m pip install {dry}") + " && echo done"
        elif line.startswith("python train.py"):
            sizes = {
                "configs/pairs.py": of_pairs,
                "configs/lstm.py": recurrent,
                "configs/decoder_only.py": one_stack,
                "configs/bert.py": one_stack - {setting for setting in one_stack if "symbols" in setting},
                "configs/language_model.py": one_stack,
            }
            [sizes] = [sizes[name] for name in sizes if name in line] or [small]
            line += " " + shlex.join(sorted(sizes))
        elif line.startswith("python benchmarks/spelling.py"):
            line += " --pairs=2000"
        line = line.replace(" RUN", f" {copy_run}").replace(" FOLDER", f" {tmp_path / 'model'}")
        # `python` and `attn` are those of the environment that runs the tests.
        path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "TFDS_DATA_DIR": str(tmp_path / "tfds")}
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_the_commands_are_those_that_are_tested():
    starts = {line.split()[0] for line in COMMANDS}
    assert starts == {"make", "pip", "python", "attn", "tfds", "PROJECT=my-project"}


# What the tests below and those of `attn walkthrough` and `attn lengths` run.
APART = ("eight-heads", "1:64", "spelling.tsv", "tfds build", "walkthrough", "lengths --")
TRAININGS = [line for line in COMMANDS if line.startswith("python train.py") and "--resume" not in line]


def by_day_or_night(line):
    """Each training compiles for many seconds: by day the settings are read, and `make train` is run elsewhere."""
    return pytest.param(line, marks=pytest.mark.nightly if line in TRAININGS else ())


@pytest.mark.parametrize("line", [by_day_or_night(x) for x in COMMANDS if not any(word in x for word in APART)])
def test_the_command_runs(shell, line):
    done = shell(line)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("line", TRAININGS)
def test_the_settings_of_a_training_are_known(line):
    words, overrides = split_overrides(shlex.split(line)[2:])
    given = dict(word.split("=") for word in words)
    assert set(given) <= {"--config", "--workdir"}
    load_config(str(ROOT / given.get("--config", str(experiment.DEFAULT_CONFIG))), overrides)  # raises what is wrong


@pytest.mark.nightly
def test_evaluate_runs_beyond_the_training_lengths(shell):
    [line] = [line for line in COMMANDS if "1:64" in line]
    done = shell(line.replace("1:64", "1:9"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[9].split()[0] == "9"


@pytest.mark.nightly
def test_a_run_is_resumed_as_shown(shell):
    [resume] = [line for line in COMMANDS if "--resume" in line]
    workdir = re.search(r"--workdir=\S+", resume)[0]
    [start] = [line for line in COMMANDS if workdir in line and line != resume]
    assert shell(start).returncode == 0
    done = shell(resume)
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stdout


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_pairs_are_made_trained_on_and_loaded_as_shown(shell, tmp_path, monkeypatch, trains):
    make, train = (line for line in COMMANDS if "spelling.tsv" in line)
    done = shell(make)
    assert done.returncode == 0, done.stderr
    if trains:
        done = shell(train)
        assert done.returncode == 0, done.stderr
        assert "held-out exact match" in done.stdout
    monkeypatch.chdir(tmp_path)
    [code] = [code for code in blocks("python", DATA) if "spelling.tsv" in code]
    exec(compile(code, "README.md", "exec"), space := {})
    assert 32 < space["examples"].source.shape[0] <= 64


@pytest.mark.nightly
def test_data_sets_are_loaded_as_shown(shell, tmp_path):
    [code] = [code for code in blocks("python", DATA) if "tfds.data_source" in code]
    code += "\nassert len(test) == 10_000 and 'source' in test[0]"
    code += "\nimport sys; assert 'tensorflow' not in sys.modules"
    (tmp_path / "loaded.py").write_text(code)
    done = shell("python loaded.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_data_sets_are_built_as_shown(shell, tmp_path):
    """The line is taken apart and carried out by TFDS's own code, but for its start, which imports TensorFlow.

    Of each split a hundred examples will do.
    """
    [line] = [line for line in COMMANDS if line.startswith("tfds build")]
    script = (
        "import sys, simple_parsing; from tensorflow_datasets.scripts.cli import build;"
        "simple_parsing.parse(build.Args, args=sys.argv[1:]).execute()"
    )
    line += " --max_examples_per_split=100"
    done = shell(line.replace("tfds build", f"python -c {shlex.quote(script)}"))
    assert done.returncode == 0, done.stderr
    for config in ("symbols16_lengths1to32", "symbols16_lengths1to64", "symbols2_lengths1to40"):
        assert len(list(tmp_path.glob(f"tfds/attn_reverse/{config}/1.0.0/*.array_record*"))) == 4


IN_PROCESS = {"ask": "attn.load", "view": "attn.view", "change": "masks", "foundation": "attn.pretrained"}


@pytest.mark.parametrize("name", IN_PROCESS)
def test_the_python_runs(name, copy_run, shell, tmp_path, monkeypatch, capsys):
    [code] = [code for code in blocks("python") if IN_PROCESS[name] in code]
    code = code.replace('"RUN"', repr(str(copy_run))).replace('"FOLDER"', '"model"')
    monkeypatch.chdir(tmp_path)  # where the fixture has put a model
    exec(compile(code, "README.md", "exec"), {})
    if name == "foundation":
        assert (tmp_path / "COPY" / "model.safetensors").exists()
    if name == "change":
        assert "■ · ■ · ■ ·" in capsys.readouterr().out


def test_what_is_added_is_what_is_tested():
    """Each is a file, or a part of one, that tests/extending trains with."""
    mine = "".join(path.read_text() for path in (ROOT / "tests/extending/mine").glob("*.py"))
    [mechanism] = [code for code in blocks("python") if "mechanisms.register" in code]
    [task] = [code for code in blocks("python", CONTRIBUTING) if "tasks.register" in code]
    for code in (mechanism, *task.split("\n\n\n")):
        assert code.strip() in mine


def test_the_lines_of_an_architecture_are_counted():
    """The last column of the table is the length of the family's file."""
    rows = re.findall(r"^\| ([\w, -]+) \| `\w+` \| .* \| (\d+) \|$", README, re.MULTILINE)
    files = [names.split(", ")[0].lower().replace("-", "") for names, _ in rows]
    assert set(files) == {path.stem for path in (ROOT / "attn/pretrained/families").glob("[!_]*.py")}
    for file, (_, count) in zip(files, rows):
        assert len((ROOT / f"attn/pretrained/families/{file}.py").read_text().splitlines()) == int(count), file


def test_every_python_block_is_run():
    assert len(blocks("python")) == len(IN_PROCESS) + 1


def test_it_is_short():
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
    for link in (link for link in links if not link.startswith("http")):
        assert (ROOT / name).parent.joinpath(link).exists(), link


def test_the_tree_is_the_tree():
    [tree] = [block for block in blocks("", CONTRIBUTING) if "train.py" in block]
    names = [line.split()[0] for line in tree.splitlines()]
    for line, name in zip(tree.splitlines(), names):
        path = ROOT / "attn" / name if line.startswith(" ") else ROOT / name
        assert path.exists(), name
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders - set(names) <= {"runs/", "build/", "dist/"}
