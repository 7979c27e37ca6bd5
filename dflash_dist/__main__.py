"""`python -m dflash_dist COMMAND ...`: the one face of the package."""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import sys
import traceback

from dflash_dist import __version__
from dflash_dist.reading import is_ours
from dflash_dist.stopping import asked_to_stop

# command -> (module with a `main(argv)`, what it does); modules load when called, so that --help is instant
COMMANDS = {
    "init": ("dflash_dist.init", "write the config of a run for any target and data"),
    "capture": (
        "dflash_dist.prepare.capture",
        "store the target's features, so that training need not run the target",
    ),
    "train": ("dflash_dist.training.train", "train a draft from a config; alone or under torchrun"),
    "preview": ("dflash_dist.prepare.preview", "look at the data of a config as training will see it"),
    "regenerate": ("dflash_dist.answers.regenerate", "let the target write the answers of a data set again"),
    "export": ("dflash_dist.export.export", "write a run's draft as serving engines load it"),
    "check": ("dflash_dist.export.check", "look for what serving engines would do wrong with a draft folder"),
    "evaluate": ("dflash_dist.evaluate.evaluate", "decode speculatively and plainly; report acceptance and speed"),
    "report": ("dflash_dist.evaluate.page", "write a run as one page for a browser: curves, slots, examples, config"),
    "bench": (
        "dflash_dist.cost.bench",
        "time training steps at any shape, against a plain implementation and the peak",
    ),
    "plan": ("dflash_dist.cost.plan", "say what a run will hold, take and cost on so many GPUs, from shapes alone"),
    "bench-data": ("dflash_dist.cost.bench_data", "time tokenising and packing against the obvious loop"),
    "demo": ("dflash_dist.demo", "all of it on a real small target: answers, training, export, evaluation"),
}

# What stays of a command that Ctrl-C ends, for the next one with the same words; of the others nothing has to.
KEPT = {
    "capture": "the shards that are written stay",
    "train": "tokenised data and checkpoints stay",
    "regenerate": "all finished answers stay",
    "evaluate": "all decoded prompts stay, where there is a --json",
    "demo": "all finished stages stay",
}

# Of the system and not of the program: no right to a file, no room, no disk.
OUTSIDE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE}


def main() -> None:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m dflash_dist COMMAND [--help] ...\n\ncommands:")
        for name, (_, meaning) in COMMANDS.items():
            print(f"  {name:<12} {meaning}")
        return
    if argv[0] == "--version":
        print(__version__)
        return
    command, *rest = map(_at_home, argv)
    if command not in COMMANDS:
        sys.exit(f"unknown command {command!r}: choose one of {', '.join(COMMANDS)}")
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    try:
        with asked_to_stop((signal.SIGINT,), interrupt):
            importlib.import_module(COMMANDS[command][0]).main(rest)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if interrupted:  # also where a library made another error of it, in the middle of its import
            _say_interrupted(command)
            sys.exit(128 + signal.SIGINT)
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        if rank and _is_loss_of_a_peer(error):
            sys.exit(f"{rank}ended because another rank did: look for what that one said, or torchrun below ({error})")
        told = isinstance(error, (ValueError, FloatingPointError, RuntimeError)) and is_ours(error)
        told = told or (isinstance(error, OSError) and error.errno in OUTSIDE)
        if rank:
            from dflash_dist.ranks.watchdog import tell_torchrun  # imports torch, which took part in this by now

            tell_torchrun(f"error: {error}" if told else traceback.format_exc())
        if not told:
            raise
        sys.exit(f"{rank}error: {error}")


def _say_interrupted(command: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on it ends the process without a word
    if os.environ.get("RANK", "0") == "0":
        kept = f"{KEPT[command]}, and the same command goes on" if command in KEPT else "start the same command again"
        print(f"\ninterrupted: {kept}", file=sys.stderr, flush=True)


def _at_home(argument: str) -> str:
    """With `~/` expanded, also in --out=~/x and a.b=~/x, where no shell does it."""
    name, path = re.fullmatch(r"([\w.-]+=)?(.*)", argument, re.DOTALL).groups("")  # type: ignore[union-attr]
    return name + os.path.expanduser(path) if path.startswith("~/") else argument


def _is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether gloo or NCCL report the end of another rank, maybe in the middle of loading. A hub's lost connection is
    no RuntimeError."""
    if isinstance(error, ValueError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("closed by peer", "reset by peer", "remote process exited")
    )


if __name__ == "__main__":
    main()
