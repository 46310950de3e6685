"""A --dataset_mix file is read and weighted as `data.mix` documents."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_lists import touch, write
from common.errors import UserError
from data.mix import read_mix, weights_to_repeats
from data.sources import DataSource


DEFAULTS = DataSource(Path("unused"), caption_column="text", id_token="X", max_samples=9)


def mix(tmp_path, entries, defaults=DEFAULTS):
    """Write the entries to a file and read it; a str is the content of the file."""
    content = entries if isinstance(entries, str) else json.dumps(entries)
    return read_mix(write(tmp_path / "mix.json", content), defaults)


def mix_error(tmp_path, entries):
    with pytest.raises(UserError) as raised:
        mix(tmp_path, entries)
    return str(raised.value).removeprefix(f"--dataset_mix {tmp_path / 'mix.json'}, ")


def test_all_entries_of_a_mix_that_lead_out_of_its_folder_are_listed(tmp_path):
    entries = [{"data_root": "../a"}, {"data_root": "b", "dataset_file": "/c.csv"}, {"data_root": "inside"}]
    entries += [{"dataset_name": "~/saved"}, {"dataset_name": "user/name"}]
    title, *outside = mix_error(tmp_path, entries).splitlines()
    assert "--allow_outside_paths" in title
    assert [line.strip() for line in outside] == [
        "entry 1: 'data_root' is ../a",
        "entry 2: 'dataset_file' is /c.csv",
        "entry 4: 'dataset_name' is ~/saved",
    ]
    assert len(mix(tmp_path, entries, replace(DEFAULTS, allow_outside_paths=True))) == 5


def test_a_mix_names_data_sets_relative_to_its_own_folder(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    touch(tmp_path, "a/table.csv", "other.jsonl", "saved/state.json")
    sources = mix(
        tmp_path,
        [
            {"data_root": "prepared", "repeats": 2},
            {"data_root": "a", "dataset_file": "table.csv"},
            {"dataset_file": "other.jsonl", "caption_column": "prompt", "max_samples": 3},
            {"dataset_name": "saved", "dataset_streaming": True},
            {"dataset_name": "user/name", "dataset_config_name": "large", "dataset_split": "test"},
        ],
    )
    common = {"caption_column": "text", "id_token": "X", "max_samples": 9}
    assert sources == [
        DataSource(tmp_path / "prepared", repeats=2, **common),
        DataSource(tmp_path / "a", tmp_path / "a/table.csv", **common),
        DataSource(None, tmp_path / "other.jsonl", **common | {"caption_column": "prompt", "max_samples": 3}),
        DataSource(None, dataset_name=str(tmp_path / "saved"), dataset_streaming=True, **common),
        DataSource(None, dataset_name="user/name", dataset_config_name="large", dataset_split="test", **common),
    ]


def test_paths_of_a_mix_are_absolute_and_may_start_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "home/saved/state.json")
    entries = [{"data_root": "a"}, {"data_root": "~/a", "dataset_file": "~/b.csv"}, {"dataset_name": "~/saved"}]
    write(tmp_path / "mix.json", json.dumps(entries))
    here, home, saved = read_mix(Path("mix.json"), DEFAULTS)
    assert here.data_root == tmp_path / "a"
    assert (home.data_root, home.dataset_file) == (tmp_path / "home/a", tmp_path / "home/b.csv")
    assert saved.dataset_name == str(tmp_path / "home/saved")


A_NUMBER = "it must be a number from 0.000001 to 1000000"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data_root": "a", "wieght": 2}, ": unknown key 'wieght'; did you mean 'weight'?"),
        ({"data_root": "a", "streaming": True}, ": unknown key 'streaming'; did you mean 'dataset_streaming'"),
        ({"data_root": "a", "xyzzy": 2}, ": unknown key 'xyzzy'; it must be one of data_root, dataset_file"),
        ({"data_root": "../a", "allow_outside_paths": True}, ": unknown key 'allow_outside_paths'"),
        ({"data_root": 5}, ": 'data_root' is 5; it must be text"),
        ({"data_root": "a", "repeats": "two"}, f": 'repeats' is \"two\"; {A_NUMBER}"),
        ({"data_root": "a", "repeats": 0}, f": 'repeats' is 0; {A_NUMBER}"),
        ({"data_root": "a", "repeats": True}, f": 'repeats' is true; {A_NUMBER}"),
        ({"data_root": "a", "weight": float("inf")}, f": 'weight' is Infinity; {A_NUMBER}"),
        ({"data_root": "a", "max_samples": 2.5}, ": 'max_samples' is 2.5; it must be a whole number above 0"),
        ({"data_root": "a", "dataset_streaming": "y"}, ": 'dataset_streaming' is \"y\"; it must be true or false"),
        ({"data_root": "a", "id_token": None}, ": 'id_token' is null; it must be text"),
        ({"data_root": "a", "regularization": 1}, ": 'regularization' is 1; it must be true or false"),
        ({"data_root": "a", "regularization": True, "id_token": "X"}, " has both 'regularization' and 'id_token'"),
        ({"data_root": "a", "caption_dropout": 2}, ": 'caption_dropout' is 2; it must be a number from 0 to 1"),
        ({"data_root": "a", "shuffle_tags": 0}, ": 'shuffle_tags' is 0; it must be a whole number above 0"),
        ({"data_root": "a", "weight": 1, "repeats": 1}, " has both 'repeats' and 'weight'"),
        ({"dataset_file": "a.csv", "dataset_name": "b"}, " has both 'dataset_file' and 'dataset_name'"),
        ({"repeats": 2}, " names no data"),
        ("a", " is str, not an object"),
    ],
)
def test_a_mistake_in_a_mix_is_named_with_its_entry_and_key(tmp_path, entry, message):
    assert mix_error(tmp_path, [{"data_root": "z"}, entry]).startswith(f"entry 2{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "lists no data sets"),
        ("{}", "names no data"),
        ("[1", "not valid JSON"),
        ('[{"data_root": "z", "regularization": true}]', "all entries are regularization"),
        ('[{"data_root": "z"}, {"data_root": "a", "weight": 1}]', "entry 1 has no weight; either all"),
    ],
)
def test_a_mix_that_is_not_a_list_of_comparable_entries_is_an_error(tmp_path, content, message):
    assert message in mix_error(tmp_path, content)


@pytest.mark.parametrize(
    ("weights", "counts", "repeats"), [([None] * 2, [2, 1], [None] * 2), ([1, 3], [0, 2], [None, 1])]
)
def test_data_sets_without_weight_or_samples_get_no_repeats(weights, counts, repeats):
    sources = [DataSource(Path("a"), weight=weight, repeats=0.5) for weight in weights]
    assert weights_to_repeats(sources, counts) == repeats


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(1e-3, 1e3)), min_size=1, max_size=5))
def test_weights_are_the_shares_of_an_epoch_and_every_sample_comes_at_least_once(sets):
    counts, weights = zip(*sets, strict=True)
    repeats = weights_to_repeats([DataSource(Path("a"), weight=weight) for weight in weights], counts)
    assert min(repeats) == 1
    total = sum(count * times for count, times in zip(counts, repeats, strict=True))
    for count, weight, times in zip(counts, weights, repeats, strict=True):
        assert count * times / total == pytest.approx(weight / sum(weights))


def test_a_mix_reads_only_the_controls_and_masks_that_the_run_reads(tmp_path):
    entries = [{"data_root": "a", "control_column": "edges", "mask_column": "cut"}]
    entries += [{"data_root": "b"}, {"data_root": "c", "mask_column": None}]

    def columns(**defaults: str) -> list[tuple]:
        return [(one.control_column, one.mask_column) for one in mix(tmp_path, entries, replace(DEFAULTS, **defaults))]

    assert columns() == [(None, None)] * 3
    assert columns(mask_column="mask") == [(None, "cut"), (None, "mask"), (None, None)]
    assert columns(control_column="control") == [("edges", None), ("control", None), ("control", None)]


def test_entries_for_regularization_come_last_without_the_id_token(tmp_path):
    entries = [{"data_root": "kept", "regularization": True, "weight": 2}, {"data_root": "a"}]
    entries.append({"data_root": "b", "regularization": False})
    first, second, kept = mix(tmp_path, entries)
    assert [first.data_root.name, second.data_root.name, kept.data_root.name] == ["a", "b", "kept"]
    assert [source.regularization for source in (first, second, kept)] == [False, False, True]
    assert [source.id_token for source in (first, second, kept)] == ["X", "X", None]
    # Their weights are relative to one another.
    others = [replace(kept, weight=8.0), replace(first, weight=1.0)]
    assert weights_to_repeats([kept, *others], [1, 2, 5]) == [1, 2, 1]
