"""Conditions on columns of numbers, such as "motion > 0.2 and sharpness > 40".

They are read by Python's own parser, so that `and`, `or`, `not`, parentheses and chains of comparisons mean what they
mean there. They are never run: only comparisons of names and numbers are accepted, and these are evaluated here.
"""

import ast
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any


_LONGEST = 1000  # characters, which also bounds the depth of parentheses
_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True)
class Condition:
    """A condition on columns of numbers."""

    text: str
    names: Mapping[
        str, int
    ]  # the columns in the order of the text, each with the place of its first character, from 0
    tree: ast.expr

    def holds(self, columns: Mapping[str, Any]) -> Any:
        """Return for each row whether the condition holds; a comparison with nan does not, unless it is `!=`.

        Args:
            columns: a NumPy array of floats for each of `names`, all of one shape, which is that of the result.
        """
        return _evaluate(self.tree, columns)


def parse_condition(text: str) -> Condition:
    """Parse a condition; the ValueError says where it cannot be read."""
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text)} characters; at most {_LONGEST} are read")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        what = "has a parenthesis that is never closed" if "never closed" in error.msg else "cannot be read"
        raise _misread(text, error.offset - 1 if error.offset else len(text), what) from error
    except (ValueError, MemoryError, RecursionError) as error:  # a null character, too many parentheses
        raise _misread(text, 0, "cannot be read") from error
    names: dict[str, int] = {}
    for name, place in _names(tree, text):
        names.setdefault(name, place)
    return Condition(text, names, tree)


def _misread(text: str, place: int, what: str) -> ValueError:
    rest = f"'{text[place:]}'" if text[place:] else "its end"
    advice = 'write comparisons of scores and numbers, as in "motion > 0.2 and sharpness > 40"'
    return ValueError(f'"{text}" {what} at {rest} (character {place + 1}); {advice}')


def _names(node: ast.expr, text: str) -> Iterator[tuple[str, int]]:
    """Check a condition; yield the columns that it names, each with its place in the text."""
    match node:
        case ast.BoolOp():
            for part in node.values:
                yield from _names(part, text)
        case ast.UnaryOp(op=ast.Not()):
            yield from _names(node.operand, text)
        case ast.Compare() if {type(op) for op in node.ops} <= _COMPARISONS.keys():
            operands = [node.left, *node.comparators]
            for operand in operands:
                if isinstance(operand, ast.Name):
                    yield operand.id, _place(operand, text)
                elif not _is_number(operand):
                    raise _misread(text, _place(operand, text), "has neither a score nor a number")
            if not all(any(isinstance(one, ast.Name) for one in pair) for pair in pairwise(operands)):
                raise _misread(text, _place(node, text), "compares only numbers")
        case _:
            raise _misread(text, _place(node, text), "has no comparison")


def _place(node: ast.expr, text: str) -> int:
    return len(text.encode()[: node.col_offset].decode())  # Python counts the bytes of UTF-8


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value < 1e300


def _evaluate(node: ast.expr, columns: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.BoolOp):
        combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        return reduce(combine, [_evaluate(part, columns) for part in node.values])
    if isinstance(node, ast.UnaryOp):
        return ~_evaluate(node.operand, columns)
    operands = [node.left, *node.comparators]
    values = [columns[one.id] if isinstance(one, ast.Name) else float(ast.literal_eval(one)) for one in operands]
    compared = [_COMPARISONS[type(op)](*pair) for op, pair in zip(node.ops, pairwise(values), strict=True)]
    return reduce(operator.and_, compared)
