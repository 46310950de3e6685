"""Dataclasses of flags become a parser, and what it reads becomes dataclasses."""

from dataclasses import dataclass, field

import pytest

from cli.schema import FlagParser, flag, flag_values, group, replace_flags
from cli.types import FilePath, FiniteFloat, PositiveInt, Text


@dataclass(frozen=True)
class SizeFlags:
    width: PositiveInt = flag(8, "Width.", alias="old_width")
    lengths: tuple[PositiveInt, ...] = flag((1, 2), "Lengths: 100% of them.")
    scales: tuple[FiniteFloat, ...] | None = flag(None, "Scales.", shown="all 1")
    kind: str = flag("plain", "Kind.", choices=("plain", "wide"))
    area: int = 0  # not a flag


@dataclass(frozen=True)
class NameFlags:
    name: Text | None = flag(None, "Name.")
    file: FilePath | None = flag(None, "File.")
    is_loud: bool = flag(False, "Loud.")
    is_clean: bool = flag(True, "Clean.")


@dataclass(frozen=True)
class Settings:
    sizes: SizeFlags = group("sizes")
    names: NameFlags = group("names")
    extra: list = field(default_factory=list)


def parser(**options) -> FlagParser:
    return FlagParser(Settings, required=options.pop("required", ()), prog="script", **options)


def read(*argv: str, **options) -> tuple[Settings, frozenset[str]]:
    groups, given = parser(**options).read(argv)
    return Settings(**groups), given


def test_without_flags_the_values_are_the_defaults():
    assert read() == (Settings(SizeFlags(), NameFlags()), frozenset())
    settings, given = read(defaults={"width": 3})
    assert (settings.sizes.width, given) == (3, frozenset())


def test_values_are_parsed_by_their_types_and_recorded_as_given():
    argv = "--old_width 5 --lengths 3 4 --scales -0.5 --kind WIDE --is_loud"
    settings, given = read(*argv.split())
    assert settings.sizes == SizeFlags(5, (3, 4), (-0.5,), "wide")
    assert settings.names.is_loud
    assert given == {"width", "lengths", "scales", "kind", "is_loud"}


def test_a_flag_given_its_default_is_given():
    assert read("--width", "8") == (Settings(SizeFlags(), NameFlags()), {"width"})


def test_a_path_may_start_at_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    assert read("--file", "~/a.txt")[0].names.file == "/me/a.txt"


@pytest.mark.parametrize(
    ("argv", "is_loud", "is_clean"),
    [("--is_loud --no-is_clean", True, False), ("--is_loud --no-is_loud --no-is_clean --is_clean", False, True)],
)
def test_the_last_of_several_switches_counts(argv, is_loud, is_clean):
    names = read(*argv.split())[0].names
    assert (names.is_loud, names.is_clean) == (is_loud, is_clean)


def test_values_are_given_once_unless_later_ones_may_override_those_of_a_launcher(capsys):
    argv = ["--lengths", "3", "4", "--width", "5", "--width", "6", "--lengths", "7"]
    assert read(*argv)[0].sizes == SizeFlags(6, (7,))
    with pytest.raises(SystemExit, match="2"):
        read(*argv, may_repeat=False)
    said = capsys.readouterr().err
    assert said == "error: --lengths: passed twice; pass all values after one --lengths (see --help)\n"
    assert read(*argv[:-2], may_repeat=False)[0].sizes == SizeFlags(6, (3, 4))


def test_the_values_of_all_groups_are_listed_and_replaced_by_name():
    settings = Settings(SizeFlags(), NameFlags())
    assert list(flag_values(settings)) == ["width", "lengths", "scales", "kind", "name", "file", "is_loud", "is_clean"]
    changed = replace_flags(settings, width=2, name="a")
    assert (changed.sizes.width, changed.names.name, settings.sizes.width) == (2, "a", 8)
    with pytest.raises(TypeError, match="no such flags: area"):
        replace_flags(settings, width=2, area=3)


def test_the_help_has_each_flag_with_its_default_and_hides_what_turns_switches_off(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = " ".join(parser(omit=("file",), titles={"names": "who"}).format_help().split())
    for words in (
        "sizes: --width N, --old_width N Width. (default: 8)",
        "--lengths N [N ...] Lengths: 100% of them. (default: 1 2)",
        "--scales X [X ...] Scales. (default: all 1)",
        "--kind {plain,wide} Kind. (default: plain)",
        "who: --name TEXT Name. --is_loud Loud. (default: off)",
        "--is_clean, --no-is_clean Clean. (default: on)",
        "--config FILE",
    ):
        assert words in shown
    assert not any(words in shown for words in ("--no-is_loud", "--file", "area"))


def help_text(*argv: str, capsys) -> str:
    with pytest.raises(SystemExit, match="0"):
        read(*argv)
    return capsys.readouterr().out


def test_the_help_on_one_group_has_only_its_flags(capsys):
    shown = help_text("--width", "3", "--help", "names", capsys=capsys)
    assert shown.startswith("names:\n  --name TEXT")
    assert "--width" not in shown
    assert help_text("-h", "Na", capsys=capsys) == shown


def test_all_help_ends_with_how_to_get_that_on_a_group(capsys):
    shown = help_text("--help", capsys=capsys)
    assert "--width" in shown
    assert shown.splitlines()[-1] == "--help GROUP shows one group: sizes, names"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--help speed", "--help: no group 'speed'; groups are sizes, names (see --help)"),
        ("--is_loud True", "--is_loud: takes no value; omit 'True' (see --help)"),
        ("True --is_loud", "'True' belongs to no flag; put quotes around a value that contains spaces (see --help)"),
        (
            "--widht 3 --nmae a --widht 4",
            "--widht: unknown flag; did you mean --width? · --nmae: unknown flag; did you mean --name? (see --help)",
        ),
        ("--is_louder", "--is_louder: unknown flag; did you mean --is_loud? (see --help)"),  # not --no-is_loud
        ("--widht 3", "--widht: unknown flag; did you mean --width? (see --help)"),
        ("--wid 3", "--wid: unknown flag; did you mean --width? (see --help)"),
        ("--xyzzy a", "--xyzzy: unknown flag (see --help)"),
        ("--config a", "--config: unknown flag (see --help)"),
        ("a --name b", "'a' belongs to no flag; put quotes around a value that contains spaces (see --help)"),
        ("--name a", "--width: required, but not given (see --help)"),
        ("--width 0", "--width: 0 is too small; pass a whole number of 1 or more (see --help)"),
        ("--width", "--width: expected one argument (see --help)"),
    ],
)
def test_a_mistake_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(*argv.split(), omit=("file",), required=(("width",),), has_config=False)
    assert capsys.readouterr().err.replace("--width/--old_width", "--width") == f"error: {message}\n"
