"""Command lines: what all scripts' parsers share.

in   sys.argv
out  arguments, or one line on stderr and exit status 2
"""

import argparse
import contextlib
import json
import math
import numbers
import signal
import sys
import warnings


class Parser(argparse.ArgumentParser):
    """--help shows the script's docstring as written; a wrong flag is one line, not the usage."""

    def __init__(self, prog, description):
        super().__init__(prog, description=description, formatter_class=Formatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the docstring as written, and every default that is a value."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ([], (), argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


def check_number(name, value, low, high=math.inf, whole=False):
    """Raise ValueError unless `value` is a number within [low, high]; text and booleans are not."""
    kind = numbers.Integral if whole else numbers.Real
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if is_number and low <= value <= high and math.isfinite(value):
        return
    limits = f"from {low} up" if high == math.inf else f"from {low} to {high}"
    kind = "whole number" if whole else "number"
    raise ValueError(f"{name} {quoted(value)}: not a {kind} {limits}")


def check_type(name, value, kind):
    """Raise ValueError unless `value` is of this class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} {quoted(value)}: not of the class {kind.__name__}")


def quoted(value):
    return json.dumps(value) if isinstance(value, str) else str(value)


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float within [low, high]."""

    def parse(text):
        value = text
        with contextlib.suppress(ValueError):
            value = kind(text)
        try:
            check_number("", value, low, high, whole=kind is int)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None
        return value

    return parse


class OldSpelling(argparse.Action):
    """A flag's name of the release before: still taken, with a line that says the new one."""

    def __init__(self, option_strings, dest, new, **options):
        super().__init__(
            option_strings, dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options
        )
        self.new = new

    def __call__(self, parser, namespace, values, option_string=None):
        print(
            f"{parser.prog}: {option_string} is now called {self.new}; "
            "the old spelling goes with the next release",
            file=sys.stderr,
        )
        setattr(namespace, self.dest, values)


class Removed(argparse.Action):
    """A flag that is no more: says what to do instead."""

    def __init__(self, option_strings, dest, instead):
        super().__init__(option_strings, dest, nargs="*", help=argparse.SUPPRESS)
        self.instead = instead

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is no more: {self.instead}")


def removed(parser, flag, instead):
    """Refuse a flag of the release before with a line that says what to do instead."""
    parser.add_argument(flag, action=Removed, instead=instead)


def truth(text):
    """An argparse type for old flags that took 0 or 1."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")
    return text == "1"


def renamed(parser, old, new, **options):
    """Take `old` for `new` (both with their dashes): add this after the new flag."""
    dest = new.removeprefix("--").replace("-", "_")
    parser.add_argument(old, dest=dest, action=OldSpelling, new=new, **options)


def show_warnings(script, beginnings: tuple, verbose=False):
    """From now on print each warning that begins so once; libraries' too if verbose."""
    said = set()

    def show(message, *_):
        text = str(message)
        if (verbose or text.startswith(beginnings)) and text not in said:
            said.add(text)
            print(f"{script}: {text}", file=sys.stderr)

    warnings.simplefilter("always")
    warnings.showwarning = show


def exit_on_signals(script, message):
    """Ctrl-C and kill unwind like an exception, so that temporary files go, and print one line."""

    def stop(signum, _frame):
        # a second signal would break the unwinding of the first
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"{script}: {message}", file=sys.stderr)
        sys.exit(128 + signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
