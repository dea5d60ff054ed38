"""Train a model: `python train.py --config=configs/reverse.py --config.model.num_heads=8 --workdir=runs/x`.

Every setting of the config can be replaced by `--config.SECTION.NAME=VALUE`; `--print_config` shows them all.
All devices are used, each for a part of every batch. `--config.mesh.model=N` divides heads and feed-forward layers
among N devices, `--config.mesh.sequence=N` the tokens of each text; docs/training.md says when.
"""

import json
import sys

from absl import flags

from attn import cli, startup  # other imports take seconds, so they come after ^C is handled

_CONFIG = flags.DEFINE_string("config", None, "Python file with a function get_config(). Default: configs/reverse.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run. Default: a new one under runs/.")
_RESUME = flags.DEFINE_bool(
    "resume", False, "Resume from the newest checkpoint of --workdir, or of the newest run under runs/."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Multi-host training. auto: if a cluster is detected; on: required; off: never.",
)
_IMPORTS = flags.DEFINE_string(
    "imports", None, "Modules to import first, separated by commas: those that register mechanisms, models, tasks, ..."
)
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the resulting config and exit.")


def main(argv: list[str]) -> int:
    """Parse the command line, run the experiment, and return the exit status."""
    cli.allow_any_text()
    if {"-h", "--help", "--helpshort", "--helpfull"} & set(argv):
        print(__doc__)
        print(flags.FLAGS.module_help(sys.modules[__name__]))
        return 0
    with startup.leaving_at_once(startup.NOTHING_WRITTEN):
        from attn import experiment

        request = _request(argv)
    return request if isinstance(request, int) else experiment.run(request)


def _request(argv: list[str]):
    """Parse the command line into an `experiment.Request`; return an exit status if there is nothing to run."""
    from attn import experiment
    from attn.settings import nearest
    from attn.training.config import ConfigError, to_mapping
    from attn.training.flags import split_overrides

    try:
        arguments, overrides = split_overrides(argv)
        stray = flags.FLAGS(arguments)[1:]
        if stray:
            raise ConfigError(f"stray argument {stray[0]!r}; settings are given as --config.SECTION.NAME=VALUE")
        if _IMPORTS.value is not None:
            overrides["imports"] = _IMPORTS.value
        request = experiment.Request(_CONFIG.value, overrides, _WORKDIR.value, _RESUME.value, _DISTRIBUTED.value)
        if _PRINT_CONFIG.value:
            print(json.dumps(to_mapping(experiment.prepare(request)[1]), indent=2))
            return 0
        return request
    except flags.UnrecognizedFlagError as error:
        known = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])]
        return experiment.fail(f"unknown flag --{error.flagname}{nearest(error.flagname, known)}", 2)
    except (ConfigError, experiment.RunError, flags.Error, OSError) as error:
        return experiment.fail(" ".join(str(error).split()), 2)


if __name__ == "__main__":
    startup.run(lambda: main(sys.argv))
