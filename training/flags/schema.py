"""Flags as frozen dataclasses: fields carry type, default, help and spellings; the parser is built from them."""

import argparse
import difflib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, NoReturn, TypeVar, get_args

from common.errors import UserError
from common.hub_token import without_tokens
from flags.config_file import FileSetting, read_config_file
from flags.types import one_of, path


_NOT_GIVEN = object()
_Settings = TypeVar("_Settings")


@dataclass(frozen=True)
class Flag:
    """What the command line needs to know of a field beside its type and default."""

    help: str
    type: Callable[[str], Any]
    metavar: str | None
    choices: Sequence[str]
    also: Sequence[str]
    shown: str | None

    def describe(self, default: Any) -> str:
        """Return the help text with its default, for argparse, which formats with %."""
        shown = self.shown
        if shown is None and default not in (None, ()):
            shown = ("on" if default else "off") if isinstance(default, bool) else _as_words(default)
        return (self.help + (f" (default: {shown})" if shown else "")).replace("%", "%%")


def flag(
    default: Any,
    help: str,
    *,
    type: Callable[[str], Any] = str,
    metavar: str | None = None,
    choices: Sequence[str] = (),
    also: Sequence[str] = (),
    shown: str | None = None,
) -> Any:
    """Declare a field of a dataclass of flags.

    Args:
        default: value when the flag is not passed.
        help: what it does and when to use it; the default is added.
        type: turns the typed text, or each word of a tuple, into a value; raises argparse.ArgumentTypeError.
        metavar: placeholder for the value in `--help`.
        choices: the only values, in upper or lower case.
        also: other spellings, with their dashes.
        shown: the default in words, where the value does not say it.
    """
    return field(default=default, metadata={"flag": Flag(help, type, metavar, choices, also, shown)})


def group(title: str) -> Any:
    """Declare a field of a settings dataclass that holds a dataclass of flags; `title` is its heading in `--help`."""
    return field(metadata={"title": title})


def _flags_of(group_class: type) -> list[Field]:
    return [item for item in fields(group_class) if "flag" in item.metadata]


def _groups_of(settings_class: Any) -> list[Field]:
    return [item for item in fields(settings_class) if "title" in item.metadata]


def flag_values(settings: Any) -> dict[str, Any]:
    """Return the values of all flags of a settings object by name, in the order of `--help`."""
    groups = [getattr(settings, item.name) for item in _groups_of(settings)]
    return {item.name: getattr(values, item.name) for values in groups for item in _flags_of(values)}


def replace_flags(settings: _Settings, **changes: Any) -> _Settings:
    """Return new settings in which the named flags, of any group, have other values.

    Raises:
        TypeError: there is no such flag.
    """
    groups = {}
    for item in _groups_of(settings):
        values = getattr(settings, item.name)
        names = [flag.name for flag in _flags_of(values) if flag.name in changes]
        if names:
            groups[item.name] = replace(values, **{name: changes.pop(name) for name in names})
    if changes:
        raise TypeError(f"no such flags: {', '.join(changes)}")
    return replace(settings, **groups)


class _Switch(argparse.Action):
    """`store_true` that can be taken back: --flag turns on, --no-flag turns off what a file turned on."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool = False, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, default=default, help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str = ""
    ) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


class FlagParser(argparse.ArgumentParser):
    """Reads a command line into the groups of a settings dataclass; errors are one line.

    Required flags are checked here and not by argparse, so that a misspelt one is reported as such, not as missing.
    Values from the file of `--config` count as given too; the command line overrides them.

    Args:
        settings: a dataclass whose fields from `group` hold dataclasses of flags.
        required: of each of these, one flag must be given.
        omit: names of flags that this script does not have; they keep their defaults.
        defaults: by name, where this script's differ.
        titles: headings by group, where this script's differ.
        has_config: whether `--config` is a flag.
    """

    def __init__(
        self,
        settings: type,
        *,
        required: Sequence[Sequence[str]],
        omit: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
        titles: Mapping[str, str] | None = None,
        has_config: bool = True,
        **options: Any,
    ):
        super().__init__(allow_abbrev=False, **options)
        self.required = required
        self.groups = _groups_of(settings)
        self.defaults = dict(defaults or {})
        self.place = ""  # in a file, of what is being parsed
        by_title: dict[str, argparse._ArgumentGroup] = {}
        for item in self.groups:
            title = (titles or {}).get(item.name, item.metadata["title"])
            listed = [one for one in _flags_of(item.type) if one.name not in omit]
            if listed and title not in by_title:
                by_title[title] = self.add_argument_group(title)
            for one in listed:
                self._add(by_title[title], one)
        if has_config:
            by_title[title].add_argument("--config", metavar="FILE", type=path, help=_CONFIG_HELP)

    def _add(self, heading: argparse._ArgumentGroup, item: Field) -> None:
        described, default = item.metadata["flag"], self.defaults.get(item.name, item.default)
        options: dict[str, Any] = {"default": default, "help": described.describe(default)}
        is_bool = item.type is bool or bool in get_args(item.type)
        if is_bool:
            options["action"] = _Switch if default is False else argparse.BooleanOptionalAction
        else:
            options |= {"metavar": described.metavar, "type": described.type}
            if described.choices:
                options |= {"type": one_of(described.choices), "choices": described.choices}
            if _is_tuple(item.type):
                options["nargs"] = "+"
        heading.add_argument(f"--{item.name}", *described.also, **options)

    def error(self, message: str) -> NoReturn:
        """Write one line on stderr, without the usage, and exit with code 2."""
        line = " ".join(f"{self.place}{message.removeprefix('argument ')}".splitlines())
        self.exit(2, without_tokens(f"error: {line} (see --help)\n"))

    def read(self, argv: Sequence[str] | None) -> tuple[dict[str, Any], frozenset[str]]:
        """Parse a command line.

        Args:
            argv: the flags; those of the running process when None.

        Returns:
            The dataclasses of flags by the name of their group, and the names of the flags that `argv` or its
            `--config` gave.

        Raises:
            SystemExit: code 2 for an unknown, missing or malformed flag; code 0 after `--help`.
        """
        argv = sys.argv[1:] if argv is None else list(argv)  # before a token in it is hidden
        names = vars(self.parse_args([]))
        for action in self._actions:
            if isinstance(action, _Switch):
                # Known, but not shown in the help beside each.
                self._option_string_actions |= {f"--no-{name[2:]}": action for name in action.option_strings}
        # argparse fills in a default only where the namespace has no value yet, so what is still
        # _NOT_GIVEN afterwards was not on the command line, under any of its spellings.
        blank = dict.fromkeys(names, _NOT_GIVEN)
        parsed, unknown = self.parse_known_args(argv, argparse.Namespace(**blank))
        if unknown:
            self.error(self._explain(unknown))
        if vars(parsed).get("config", _NOT_GIVEN) is not _NOT_GIVEN:
            parsed, _ = self.parse_known_args(argv, self._read_file(parsed.config, argparse.Namespace(**blank)))
        given = {name: value for name, value in vars(parsed).items() if value is not _NOT_GIVEN}
        missing = [" or ".join(f"--{name}" for name in names) for names in self.required if not given.keys() & names]
        if missing:
            self.error(f"{', '.join(missing)}: required, but not given")
        return {item.name: self._fill(item.type, given) for item in self.groups}, frozenset(given)

    def _fill(self, group_class: type, given: Mapping[str, Any]) -> Any:
        """Make a dataclass of flags from what was given and this script's defaults."""
        values = {}
        for item in _flags_of(group_class):
            value = given.get(item.name, self.defaults.get(item.name, MISSING))
            if value is not MISSING:
                values[item.name] = tuple(value) if isinstance(value, list) else value
        return group_class(**values)

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
                self.error(f"{setting.name}: '{unknown[0]}' is not a value for it")
        self.place = ""
        return namespace

    def _as_typed(self, setting: FileSetting) -> list[str]:
        """Return the words of a command line that say the same as a line of a file."""
        name, value = setting.name, setting.value
        if name in ("config", "help"):
            self.error(f"{name}: only on the command line")
        action = self._option_string_actions.get(f"--{name}")
        if action is None or name.startswith("no-"):
            names = [word[2:] for word in self._option_string_actions if word.startswith("--")]
            close = difflib.get_close_matches(name, [name for name in names if not name.startswith("no-")], n=1)
            self.error(f"{name}: unknown flag" + (f"; did you mean {close[0]}?" if close else ""))
        if isinstance(action, _Switch | argparse.BooleanOptionalAction):
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


_CONFIG_HELP = (
    "YAML file of flags: their names without dashes, and their values, true or false for a flag that takes none. The "
    "command line overrides it; there, --no-NAME turns off what the file turns on. (default: none)"
)


def _is_tuple(annotation: Any) -> bool:
    """Whether a field holds a tuple, or a tuple or None."""
    return any(getattr(one, "__origin__", None) is tuple for one in (annotation, *get_args(annotation)))


def _as_words(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
