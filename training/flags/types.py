"""How a flag is read: the parser whose errors are one line, and the types of values."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from common.errors import UserError
from common.hub_token import without_tokens
from flags.config_file import FileSetting, read_config_file


_NOT_GIVEN = object()


class Switch(argparse.Action):
    """`store_true` that can be taken back: --flag turns on, --no-flag off again what a file turned on."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool = False, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, default=default, help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str = ""
    ) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which knows the flags that were really given.

    Required flags are checked here and not by argparse, so that a misspelt one is reported as such, not as missing.
    One of each group of `required` must be given. What the file of `--config` says is given as well, and the command
    line counts more.
    """

    def __init__(self, *, required: Sequence[Sequence[str]], **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.register("action", "store_true", Switch)
        self.required = required
        self.place = ""  # in a file, of what is being parsed

    def error(self, message: str) -> NoReturn:
        """Write one line on stderr, without the usage, and leave with code 2."""
        line = " ".join(f"{self.place}{message.removeprefix('argument ')}".splitlines())
        self.exit(2, without_tokens(f"error: {line} (see --help)\n"))

    def read(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, set[str]]:
        """Parse `argv` into the flags and the set of destinations which `argv` itself, or its `--config`, named.

        Raises:
            SystemExit: code 2 for an unknown, missing or malformed flag; code 0 after `--help`.
        """
        argv = sys.argv[1:] if argv is None else list(argv)  # before a token in it is hidden
        defaults = vars(self.parse_args([]))
        for action in self._actions:
            if isinstance(action, Switch):
                # Known, but not shown in the help beside each.
                self._option_string_actions |= {f"--no-{name[2:]}": action for name in action.option_strings}
        # argparse fills in a default only where the namespace has no value yet, so what is still
        # _NOT_GIVEN afterwards was not on the command line, under any of its spellings.
        blank = dict.fromkeys(defaults, _NOT_GIVEN)
        parsed, unknown = self.parse_known_args(argv, argparse.Namespace(**blank))
        if unknown:
            self.error(self._explain(unknown))
        if vars(parsed).get("config", _NOT_GIVEN) is not _NOT_GIVEN:
            parsed, _ = self.parse_known_args(argv, self._read_file(parsed.config, argparse.Namespace(**blank)))
        given = {name: value for name, value in vars(parsed).items() if value is not _NOT_GIVEN}
        missing = [" or ".join(f"--{name}" for name in names) for names in self.required if not given.keys() & names]
        if missing:
            self.error(f"{', '.join(missing)}: required, but not given")
        return argparse.Namespace(**(defaults | given)), set(given)

    def _read_file(self, file: str, namespace: argparse.Namespace) -> argparse.Namespace:
        """Parse the settings of a file as if each had been typed, so that they are checked as those are."""
        try:
            settings = read_config_file(file)
        except UserError as error:
            self.error(str(error))
        lines: dict[str, int] = {}
        for setting in settings:
            self.place = f"--config: {file}, line {setting.line}: "
            words = self._as_typed(setting)
            flag = self._option_string_actions[f"--{setting.name}"].dest
            if flag in lines:
                self.error(f"{setting.name}: given in line {lines[flag]} already, under another name")
            lines[flag] = setting.line
            namespace, unknown = self.parse_known_args(words, namespace)
            if unknown:
                self.error(f"{setting.name}: '{unknown[0]}' is no value for it")
        self.place = ""
        return namespace

    def _as_typed(self, setting: FileSetting) -> list[str]:
        """The words of a command line that say the same as a line of a file."""
        name, value = setting.name, setting.value
        if name in ("config", "help"):
            self.error(f"{name}: is for the command line alone")
        action = self._option_string_actions.get(f"--{name}")
        if action is None or name.startswith("no-"):
            names = [word[2:] for word in self._option_string_actions if word.startswith("--")]
            close = difflib.get_close_matches(name, [name for name in names if not name.startswith("no-")], n=1)
            self.error(f"{name}: unknown flag" + (f"; did you mean {close[0]}?" if close else ""))
        if isinstance(action, Switch | argparse.BooleanOptionalAction):
            if setting.switch is None:
                self.error(f"{name}: is true or false, not {value!r}")
            return [f"--{name}" if setting.switch else f"--no-{name}"]
        if isinstance(value, str):
            return [f"--{name}={value}"]
        if action.nargs is None:
            self.error(f"{name}: takes one value, not a list")
        return [f"--{name}", *value]

    def _explain(self, unknown: list[str]) -> str:
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            return f"'{unknown[0]}' belongs to no flag; put quotes around a value that contains spaces"
        close = difflib.get_close_matches(flags[0], self._option_string_actions, n=1)
        return f"{flags[0]}: unknown flag" + (f"; did you mean {close[0]}?" if close else "")


def add_config_flag(group: argparse._ArgumentGroup) -> None:
    """The flag by which a `FlagParser` reads others from a file."""
    group.add_argument(
        "--config",
        metavar="FILE",
        type=path,
        help="YAML file of flags: their names without dashes, and their values, true or false for a flag that takes "
        "none. What the command line says counts more; there, --no-NAME turns off what the file turns on. "
        "(default: none)",
    )


def positive_int(text: str) -> int:
    """A whole number of 1 or more; argparse.ArgumentTypeError otherwise."""
    return _whole_number(text, minimum=1)


def non_negative_int(text: str) -> int:
    """A whole number of 0 or more; argparse.ArgumentTypeError otherwise."""
    return _whole_number(text, minimum=0)


def seed(text: str) -> int:
    """A whole number from 0 to 2^32 - 1, the largest that NumPy takes; argparse.ArgumentTypeError otherwise."""
    return _whole_number(text, minimum=0, maximum=2**32 - 1)


def denoising_steps(text: str) -> int:
    """A whole number from 1 to the 1000 timesteps of the noise schedule; argparse.ArgumentTypeError otherwise."""
    return _whole_number(text, minimum=1, maximum=1000)


def positive_float(text: str) -> float:
    """A finite number above 0; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: value > 0, "a number above 0")


def non_negative_float(text: str) -> float:
    """A finite number of 0 or more; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: value >= 0, "a number of 0 or more")


def finite_float(text: str) -> float:
    """A finite number; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: True, "a number")


def probability(text: str) -> float:
    """A number from 0 to 1, both included; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def decay_rate(text: str) -> float:
    """A number from 0 to 1 without 1 itself; argparse.ArgumentTypeError otherwise."""
    return _number(text, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


def _whole_number(text: str, minimum: int, maximum: float = math.inf) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is too small; give a whole number of {minimum} or more")
    if value > maximum:
        raise argparse.ArgumentTypeError(f"{value} is too large; give a whole number up to {maximum}")
    return value


def _number(text: str, is_valid: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number; give {wanted}") from None
    if not math.isfinite(value) or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text} is out of range; give {wanted}")
    return value


def prose(text: str) -> str:
    """Text for a model to read; argparse.ArgumentTypeError where it came in another encoding than UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8; save what it comes from as UTF-8") from None
    return text


def path(text: str) -> str:
    """A path with ~ expanded; argparse.ArgumentTypeError for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty; is a variable in your launcher unset?")
    return os.path.expanduser(text)


def choice(names: Sequence[str]) -> dict[str, Any]:
    """The argparse options of a flag that takes one of `names`, in upper or lower case."""

    def choose(text: str) -> str:
        if text.lower() not in names:
            raise argparse.ArgumentTypeError(f"invalid choice '{text}'; choose from {', '.join(names)}")
        return text.lower()

    return {"type": choose, "choices": names}
