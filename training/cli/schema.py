"""Flags as frozen dataclasses: fields have type, default, help and aliases, and the parser is built from them."""

import argparse
import difflib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import Field, field, fields, replace
from itertools import pairwise
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from cli.config_file import FileSetting, read_config_file
from cli.foreign import ADVICE, OURS
from cli.types import Value, one_of, path
from common.errors import UserError
from common.hub_token import without_tokens


_Settings = TypeVar("_Settings")
_PATHS = ("FILE", "FOLDER", "MODEL", "PATH", "PATHS")  # metavars


def flag(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    choices: Sequence[str] = (),
    alias: str | None = None,
    shown: str | None = None,
    is_positional: bool = False,
) -> Any:
    """Declare a field of a dataclass of flags, whose annotation says which values it takes (see `cli.types`).

    Args:
        default: value when the flag is not passed.
        help: what it does and when to use it; the default is added.
        metavar: placeholder for the value in `--help`, if not that of the type.
        choices: the only values, in upper or lower case.
        alias: another name, without dashes.
        shown: the default in words, where the value does not say it.
        is_positional: its values have no name before them, and at least one is required.
    """
    described = {"help": help, "metavar": metavar, "choices": choices, "alias": alias, "shown": shown}
    described["is_positional"] = is_positional
    return field(default=default, metadata=described)


def group(title: str) -> Any:
    """Declare a field of a settings dataclass that holds a dataclass of flags; `title` is its heading in `--help`."""
    return field(metadata={"title": title})


def _flags_of(group_class: type) -> list[Field]:
    return [item for item in fields(group_class) if "help" in item.metadata]


def _groups_of(settings_class: Any) -> list[Field]:
    return [item for item in fields(settings_class) if "title" in item.metadata]


def flag_values(settings: Any) -> dict[str, Any]:
    """Return the values of all flags of a settings object by name, in the order of `--help`."""
    groups = [getattr(settings, item.name) for item in _groups_of(settings)]
    return {item.name: getattr(values, item.name) for values in groups for item in _flags_of(values)}


def replace_flags(settings: _Settings, **changes: Any) -> _Settings:
    """Return new settings in which the named flags, of any group, have other values; TypeError for unknown ones."""
    groups = {}
    for item in _groups_of(settings):
        names = [flag.name for flag in _flags_of(item.type) if flag.name in changes]
        if names:
            groups[item.name] = replace(getattr(settings, item.name), **{name: changes.pop(name) for name in names})
    if changes:
        raise TypeError(f"no such flags: {', '.join(changes)}")
    return replace(settings, **groups)


def path_values(settings: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of each file, folder or model that a flag names and that is not its default."""
    for item in _groups_of(settings):
        for one in _flags_of(item.type):
            value = getattr(getattr(settings, item.name), one.name)
            names_path = bool not in _parts(one.type) and _value_options(one).get("metavar") in _PATHS
            if value and value != one.default and (names_path or one.name == "dataset_name"):
                yield from ((one.name, text) for text in ([value] if isinstance(value, str) else value))


class FlagParser(argparse.ArgumentParser):
    """Reads a command line into the groups of a settings dataclass; errors are one line.

    Required flags are checked here and not by argparse, so that a misspelt one is reported as such, not as missing.
    Values from the file of `--config` count as given too; the command line overrides them.

    Args:
        settings: a dataclass whose fields from `group` hold dataclasses of flags.
        required: one flag of each of these must be given.
        omit: names of flags that this script does not have; they keep their defaults.
        defaults: by name, where this script's differ.
        titles: headings by group, where this script's differ.
        has_config: whether `--config` is a flag.
        may_repeat: whether the last of a repeated flag counts, so that flags after a launcher's name override its own;
            otherwise repeating one that takes several values is a mistake, because the earlier ones would be lost.
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
        may_repeat: bool = True,
        **options: Any,
    ):
        # Without defaults argparse returns only what was given; `_fill` adds them.
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False, **options)
        self.required = required
        self.may_repeat = may_repeat
        self.groups = _groups_of(settings)
        self.defaults = dict(defaults or {})
        self.place = ""  # of the setting of a file that is being parsed
        self.add_argument("-h", "--help", action=_Help, nargs="*", metavar="GROUP", help="Show this, or one group.")
        self.headings: dict[str, argparse._ArgumentGroup] = {}
        for item in self.groups:
            title = (titles or {}).get(item.name, item.metadata["title"])
            if title not in self.headings:
                self.headings[title] = self.add_argument_group(title)
            for one in _flags_of(item.type):
                if one.name not in omit:
                    _add(self.headings[title], one, self.defaults.get(one.name, one.default))
        if has_config:
            self.headings[title].add_argument("--config", metavar="FILE", type=path, help=_CONFIG_HELP)
        self.epilog = f"--help GROUP shows one group: {', '.join(self._group_names())}"

    def _group_names(self) -> list[str]:
        return [title.split(" (")[0] for title, heading in self.headings.items() if heading._group_actions]

    def help_on(self, name: str) -> str:
        """Return the help on the flags of one group, by its name or a beginning of it; "" for all."""
        if not name:
            return self.format_help()
        found = [group for group in self.headings.values() if group.title.startswith(name.lower())]
        if not found:
            self.error(f"--help: no group '{name}'; groups are {', '.join(self._group_names())}")
        formatter = self._get_formatter()
        for group in found:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return formatter.format_help()

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
        argv = sys.argv[1:] if argv is None else list(argv)  # a copy, because parsing hides a token in sys.argv
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._explain(unknown, argv))
        given = vars(parsed)
        if "config" in given:
            given = vars(self._read_file(given["config"])) | given
        missing = [" or ".join(f"--{name}" for name in names) for names in self.required if not given.keys() & names]
        if missing:
            self.error(f"{', '.join(missing)}: required, but not given")
        return {item.name: self._fill(item.type, given) for item in self.groups}, frozenset(given)

    def _fill(self, group_class: type, given: Mapping[str, Any]) -> Any:
        """Make a dataclass of flags from the given values and this script's defaults."""
        values = self.defaults | given
        values = {item.name: values[item.name] for item in _flags_of(group_class) if item.name in values}
        return group_class(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )

    def _read_file(self, file: str) -> argparse.Namespace:
        """Parse the settings of a file as if each had been typed, so that they get the same checks."""
        try:
            settings = read_config_file(file)
        except UserError as error:
            self.error(str(error))
        namespace = argparse.Namespace()
        lines: dict[str, int] = {}
        for setting in settings:
            self.place = f"--config: {file}, line {setting.line}: "
            words = self._as_typed(setting)
            name = self._option_string_actions[f"--{setting.name}"].dest
            if name in lines:
                self.error(f"{setting.name}: already set in line {lines[name]}, under another name")
            lines[name] = setting.line
            namespace, unknown = self.parse_known_args(words, namespace)
            if unknown:
                self.error(f"{setting.name}: '{unknown[0]}' is not a value for it")
        self.place = ""
        return namespace

    def _as_typed(self, setting: FileSetting) -> list[str]:
        """Return the words of a command line with the meaning of a line of a file."""
        name, value = setting.name, setting.value
        if name in ("config", "help"):
            self.error(f"{name}: only on the command line")
        action = self._option_string_actions.get(f"--{name}")
        if action is None or name.startswith("no-"):
            names = [word[2:] for word in self._option_string_actions if word.startswith("--")]
            self.error(_unknown(name, [name for name in names if not name.startswith("no-")]))
        if action.nargs == 0:
            if setting.switch is None:
                self.error(f"{name}: must be true or false, not {value!r}")
            return [f"--{name}" if setting.switch else f"--no-{name}"]
        if isinstance(value, str):
            return [f"--{name}={value}"]
        if action.nargs is None:
            self.error(f"{name}: takes one value, not a list")
        return [f"--{name}", *value]

    def _explain(self, unknown: list[str], argv: Sequence[str]) -> str:
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if flags:
            known = [word for word in self._option_string_actions if not word.startswith("--no-")]
            long = [flag for flag in flags if flag.startswith("--")]
            return " · ".join(_unknown(flag, known) for flag in dict.fromkeys(long or flags[:1]))
        for flag, value in pairwise(argv):
            action = self._option_string_actions.get(flag)
            if value == unknown[0] and action is not None and action.nargs == 0:
                return f"{flag}: takes no value; omit '{value}'"
        return f"'{unknown[0]}' belongs to no flag; put quotes around a value that contains spaces"


class _Help(argparse.Action):
    """Print the help, or that on one group, and exit."""

    def __call__(self, parser: FlagParser, namespace: argparse.Namespace, words: list[str], option: str) -> NoReturn:
        print(parser.help_on(" ".join(words)), end="")
        parser.exit()


class _Values(argparse.Action):
    """Store the values of a flag that takes several."""

    def __call__(self, parser: FlagParser, namespace: argparse.Namespace, values: list[Any], option: str) -> None:
        if self.dest in namespace and not parser.may_repeat:
            parser.error(f"{option}: passed twice; pass all values after one {option}")
        setattr(namespace, self.dest, values)


_CONFIG_HELP = (
    "YAML file of flags: names without dashes, and values; true or false for a flag without a value. The command line "
    "overrides it, and --no-NAME turns off a flag that the file turns on."
)


def _unknown(name: str, known: Collection[str]) -> str:
    plain = name.lstrip("-")
    dashes = name.removesuffix(plain)
    ours = [f"{dashes}{word}" for word in OURS.get(plain, "").split()]
    advice = ADVICE.get(plain, "")
    if not ours or not set(ours) <= set(known):
        ours = [] if advice else difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {', '.join(ours)}?" if ours else advice
    return f"{name}: unknown flag" + (f"; {advice}" if advice else "")


def _add(heading: argparse._ArgumentGroup, item: Field, default: Any) -> None:
    """Declare a flag to argparse."""
    names = [name for name in (item.name, item.metadata["alias"]) if name]
    spellings, options = [f"--{name}" for name in names], {"dest": item.name, "help": _describe(item, default)}
    if item.metadata["is_positional"]:
        heading.add_argument(**options, **_value_options(item))
    elif bool not in _parts(item.type):
        heading.add_argument(*spellings, **options, **_value_options(item))
    elif default is False:
        heading.add_argument(*spellings, **options, action="store_true")
        # To turn off what a file turned on; the help of --config explains it once for all flags.
        hidden = options | {"help": argparse.SUPPRESS}
        heading.add_argument(*[f"--no-{name}" for name in names], **hidden, action="store_false")
    else:
        heading.add_argument(*spellings, **options, action=argparse.BooleanOptionalAction)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all that it is made of: for `PositiveInt | None`, it, PositiveInt, int, Value, None."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _value_options(item: Field) -> dict[str, Any]:
    """Return argparse's options for a flag with values."""
    parts = list(_parts(item.type))
    value = next((part for part in parts if isinstance(part, Value)), Value(str, "NAME"))
    options = {"type": value.parse, "metavar": item.metadata["metavar"] or value.metavar}
    if choices := item.metadata["choices"]:
        options = {"type": one_of(choices), "choices": choices}
    if any(get_origin(part) is tuple for part in parts):
        options |= {"nargs": "+", "action": _Values}
    return options


def _describe(item: Field, default: Any) -> str:
    """Return the help text with its default, for argparse, which formats with %."""
    shown = item.metadata["shown"]
    if shown is None and isinstance(default, bool):
        shown = "on" if default else "off"
    elif shown is None and default not in (None, ()):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return (item.metadata["help"] + (f" (default: {shown})" if shown else "")).replace("%", "%%")
