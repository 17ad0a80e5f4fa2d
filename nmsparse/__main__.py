"""The command line: ``python -m nmsparse`` or ``nmsparse``.

A sub-command is a module with ``add_arguments(parser)`` and ``main(args) -> int``; only the one that runs is imported.
Exit codes: 0 done, 2 bad usage or bad input (one line on stderr), 130 stopped by Ctrl-C, 1 anything unexpected.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__
from .errors import NMSparseError, UnsupportedDeviceError

COMMANDS = {
    "info": ("nmsparse.cli.info", "versions, devices, and which kernels are usable here"),
    "demo": ("nmsparse.demo", "run a small Mixture-of-Experts language model on sparse experts"),
    "convert": ("nmsparse.cli.convert", "make the experts of a Hugging Face checkpoint sparse"),
    "prune": ("nmsparse.cli.prune", "prune the experts of a model with calibration text"),
    "eval": ("nmsparse.cli.evaluate", "bits per byte of a text under a checkpoint, dense or sparse"),
    "inspect": ("nmsparse.cli.inspect", "list what a checkpoint holds"),
    "bench": ("nmsparse.bench", "time the kernels against their peers"),
}


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, str]:
    """The arguments of a command line, and the module of its sub-command."""
    parser = argparse.ArgumentParser(
        prog="nmsparse", description="N:M structured sparsity for Mixture-of-Experts models."
    )
    parser.add_argument("--version", action="version", version=f"nmsparse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    return args, COMMANDS[args.command][0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        args, module = parse_arguments(sys.argv[1:] if argv is None else argv)
        code = importlib.import_module(module).main(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("nmsparse: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NMSparseError, UnsupportedDeviceError, OSError) as error:
        return _refuse(error)
    except ImportError as error:
        if "nmsparse[" not in str(error):  # not the message of errors.require: a broken installation
            raise
        return _refuse(error)


def _refuse(error: Exception) -> int:
    print(f"nmsparse: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
