"""Conditions are read as Python reads comparisons, and nothing else is."""

import numpy as np
import pytest

from cli.conditions import parse_condition


COLUMNS = {"motion": np.array([0.1, 1, 6, np.nan]), "sharpness": np.array([50.0, 30, 50, 50])}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("motion > 0.2 and sharpness > 40", [False, False, True, False]),
        ("0.2 < motion < 5", [False, True, False, False]),
        ("not (motion > .2) or sharpness == 30", [True, True, False, True]),
        ("motion <= 1 or sharpness != 50 and motion >= 6", [True, True, False, False]),  # and binds more
        ("-1 <= motion\n and 5e1 == sharpness", [True, False, True, False]),
        ("not motion > 0", [False, False, False, True]),  # an empty score fulfils no comparison
        ("motion < sharpness", [True, True, True, False]),
    ],
)
def test_a_condition_means_what_it_means_in_python(text, kept):
    assert parse_condition(text).holds(COLUMNS).tolist() == kept


def test_names_are_found_once_in_their_order_with_their_place():
    assert parse_condition("é > 1 and (b < 2 or é > 3)").names == {"é": 0, "b": 11}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motion > 0.2 adn sharpness > 40", "cannot be read at 'adn sharpness > 40' (character 14)"),
        ("motion >", "cannot be read at its end (character 9)"),
        ("", "cannot be read at its end (character 1)"),
        ("motion = 3", "cannot be read at '= 3' (character 8)"),
        ("motion > 1 and (black < 2", "never closed at '(black < 2' (character 16)"),
        ("motion", "has no comparison at 'motion' (character 1)"),
        ("motion > 1 and black", "has no comparison at 'black' (character 16)"),
        ("é > 1 and motion in (1, 2)", "has no comparison at 'motion in (1, 2)' (character 11)"),
        ("motion > 'a'", "has neither a score nor a number at ''a'' (character 10)"),
        ("motion > True", "has neither a score nor a number at 'True' (character 10)"),
        ("motion > 1e999", "has neither a score nor a number at '1e999' (character 10)"),
        ("open('x').read() > 1", "has neither a score nor a number at 'open('x').read() > 1' (character 1)"),
        ("motion > 1 or 1 < 2", "compares only numbers at '1 < 2' (character 15)"),
        ("(" * 450 + "motion" + ")" * 450, "cannot be read"),
        ("motion > \0", "cannot be read"),
        ("motion > 1" + " and motion > 1" * 99, "at most 1000 are read"),
    ],
)
def test_anything_else_is_refused_at_its_place(text, message):
    with pytest.raises(ValueError) as raised:
        parse_condition(text)
    assert message in str(raised.value)
