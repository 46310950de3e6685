"""A YAML file of flags, for `--config`: each key is a flag's name, each value what would be typed after it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError


SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as in YAML 1.1


@dataclass(frozen=True)
class FileSetting:
    """One line of the file."""

    name: str
    value: str | list[str]  # as typed: YAML would make a number of 1_000, and false of the precision `no`
    line: int

    @property
    def switch(self) -> bool | None:
        """The value for a flag without values; None unless it means true or false."""
        return SWITCH_WORDS.get(self.value.lower()) if isinstance(self.value, str) else None


def read_config_file(file: str) -> list[FileSetting]:
    """Read the settings of a file, in their order; raises a UserError if it is no readable mapping of values."""
    import yaml  # slow to import, and few runs need it

    def refuse(problem: str, node: yaml.Node) -> UserError:
        return UserError(f"--config: {file}, line {node.start_mark.line + 1}: {problem}")

    def read_text(node: yaml.Node, name: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise refuse(f"{name}: must be a value or a list of values", node)
        if node.tag == "tag:yaml.org,2002:null":
            raise refuse(f"{name}: has no value; add one, or remove the line", node)
        return node.value

    root = _parse(file)
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise refuse("a flag's name and a colon are missing; write lines such as `learning_rate: 1e-4`", root)
    settings: dict[str, FileSetting] = {}
    for key, node in root.value:
        name = read_text(key, "a flag's name")
        if name in settings:
            raise refuse(f"{name}: already set in line {settings[name].line}", key)
        is_list = isinstance(node, yaml.SequenceNode)
        value = [read_text(item, name) for item in node.value] if is_list else read_text(node, name)
        settings[name] = FileSetting(name, value, key.start_mark.line + 1)
    return list(settings.values())


def _parse(file: str) -> Any:
    """Return the file as YAML's tree of nodes, without constructing values; None for an empty file."""
    import yaml

    try:
        return yaml.compose(Path(file).read_bytes(), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"--config: no file '{file}'") from None
    except OSError as error:
        raise UserError(f"--config: '{file}' cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"--config: {file}{where}: not valid YAML: {reason}") from error
    except RecursionError as error:
        raise UserError(f"--config: {file}: lists are nested too deep") from error
