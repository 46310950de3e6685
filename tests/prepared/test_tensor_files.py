"""Tensors are written to shards as `prepared.tensor_files` documents, also after kills and by several ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common.errors import UserError
from prepared.tensor_files import (
    MOST_PER_SHARD,
    ShardWriter,
    cut_into_parts,
    finished_names,
    names_in,
    samples_per_shard,
)


NAMES = [f"clip.mp4-{number}" for number in range(7)]


def writer(root, names=NAMES, per_shard=3):
    return ShardWriter(root / "latents", root / ".staging", [names], [per_shard])


def tensors(names):
    """Different tensors of two kinds for each name."""
    values = {name: float(name.split("-")[1]) for name in names}
    return {name: {"video_latents": torch.full((2, 3), value), "b": torch.ones(1)} for name, value in values.items()}


def batches_of(shards, batch_size):
    return list(itertools.chain(*shards.todo(batch_size).values()))


def write_all(shards, batch_size=2):
    for batch in batches_of(shards, batch_size):
        shards.write(tensors(batch))


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_every_name_is_once_in_a_shard_of_at_most_the_size_asked_for(tmp_path):
    write_all(writer(tmp_path))
    files = sorted((tmp_path / "latents").iterdir())
    assert sorted(len(set(names_in(path))) for path in files) == [1, 3, 3]
    found = {key: tensor for path in files for key, tensor in load_file(path).items()}
    assert found.keys() == {f"{name}.{kind}" for name in NAMES for kind in ("video_latents", "b")}
    assert all(torch.equal(found[f"{name}.video_latents"], tensors([name])[name]["video_latents"]) for name in NAMES)
    assert not list((tmp_path / ".staging").rglob("*.safetensors"))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_two_writers_that_take_turns_write_the_same_bytes(tmp_path, batch_size):
    write_all(writer(tmp_path / "one"), batch_size)
    first, second = writer(tmp_path / "many"), writer(tmp_path / "many")
    assert first.todo(batch_size) == second.todo(batch_size)
    turns = itertools.cycle([second, first])
    parts = first.todo(batch_size)
    for part, batches in list(parts.items()):
        assert first.left(batches) == second.left(batches) == batches
        for batch in batches:
            next(turns).write(tensors(batch))
        assert first.left(batches) == second.left(batches) == []
        del parts[part]
        assert writer(tmp_path / "many").todo(batch_size) == parts  # of one that joins
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@given(num_written=st.integers(0, 4), batch_size=st.integers(1, 3), per_shard=st.integers(1, 8))
def test_a_run_interrupted_after_any_batch_continues_to_the_same_bytes(
    tmp_path_factory, num_written, batch_size, per_shard
):
    root = tmp_path_factory.mktemp("shards")
    write_all(writer(root / "whole", per_shard=per_shard), batch_size)
    shards = writer(root / "resumed", per_shard=per_shard)
    for batch in batches_of(shards, batch_size)[:num_written]:
        shards.write(tensors(batch))
    again = writer(root / "resumed", per_shard=per_shard)
    left = list(itertools.chain(*batches_of(again, batch_size)))
    assert len(left) == max(0, 7 - sum(map(len, shards_batches(per_shard, batch_size)[:num_written])))
    write_all(again, batch_size)
    assert contents(root / "resumed") == contents(root / "whole")


def shards_batches(per_shard, batch_size):
    """The batches of seven names: no batch crosses the end of a shard."""
    shards = [NAMES[start : start + per_shard] for start in range(0, 7, per_shard)]
    return [names[start : start + batch_size] for names in shards for start in range(0, len(names), batch_size)]


def test_a_shard_with_all_batches_is_finished_after_a_kill(tmp_path):
    write_all(writer(tmp_path / "whole", per_shard=4))
    shards = writer(tmp_path / "killed", per_shard=4)
    batches = batches_of(shards, 2)
    shards.write(tensors(batches[0]))
    kept = contents(tmp_path / "killed")
    shards.write(tensors(batches[1]))
    (shard,) = (tmp_path / "killed" / "latents").iterdir()
    shard.unlink()  # as if killed before it was in place: its batches are still staged
    for path, content in kept.items():
        (tmp_path / "killed" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "killed" / path).write_bytes(content)
    write_all(writer(tmp_path / "killed", per_shard=4))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_new_names_go_into_new_shards_and_finished_ones_stay_as_they_are(tmp_path):
    write_all(writer(tmp_path, NAMES[:4]))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").iterdir()}
    shards = writer(tmp_path, ["clip.mp4-9", *NAMES[:4], "clip.mp4-8"])
    assert list(itertools.chain(*batches_of(shards, 2))) == ["clip.mp4-9", "clip.mp4-8"]
    write_all(shards)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert finished_names(tmp_path / "latents").keys() == {*NAMES[:4], "clip.mp4-8", "clip.mp4-9"}


def test_staged_batches_are_kept_when_the_list_of_names_has_changed(tmp_path):
    shards = writer(tmp_path, per_shard=7)
    for batch in batches_of(shards, 2)[:3]:
        shards.write(tensors(batch))
    longer = writer(tmp_path, ["clip.mp4-9", *NAMES[1:]], per_shard=7)
    assert list(itertools.chain(*batches_of(longer, 1))) == ["clip.mp4-9", "clip.mp4-6"]
    write_all(longer)
    (path,) = (tmp_path / "latents").iterdir()
    assert set(names_in(path)) == {"clip.mp4-9", *NAMES[1:]}
    assert load_file(path)["clip.mp4-3.video_latents"].unique() == 3


def test_a_shard_appears_with_the_last_of_its_names_and_not_before(tmp_path):
    shards = writer(tmp_path, per_shard=4)
    shards.write(tensors(NAMES[:3]))
    shards.write(tensors(NAMES[:1]))  # as a process left over from a killed launch does, in other batches
    assert not (tmp_path / "latents").exists()
    shards.write(tensors(NAMES[3:4]))
    assert set(finished_names(tmp_path / "latents")) == set(NAMES[:4])


def test_a_shard_does_not_wait_for_names_that_are_given_up(tmp_path):
    shards = writer(tmp_path)
    for batch in batches_of(shards, 1):
        if batch != ["clip.mp4-1"]:
            shards.write(tensors(batch))
    assert "clip.mp4-0" not in finished_names(tmp_path / "latents")
    shards.merge(given_up={"clip.mp4-1"})
    assert finished_names(tmp_path / "latents").keys() == set(NAMES) - {"clip.mp4-1"}
    assert list(itertools.chain(*batches_of(writer(tmp_path), 1))) == ["clip.mp4-1"]


def test_a_batch_is_done_without_the_names_that_are_given_up(tmp_path):
    shards = writer(tmp_path)
    first, second = batch = batches_of(shards, 2)[0]
    assert shards.left([batch], given_up={first}) == [batch]
    shards.write(tensors([second]))
    assert shards.left([batch]) == [batch]
    assert shards.left([batch], given_up={first}) == shards.left([batch], given_up=batch) == []


def test_parts_are_small_enough_to_be_shared_and_large_enough_to_be_few():
    few, many = (cut_into_parts("a", [str(n) for n in range(size)], 2, size) for size in (300, 100_000))
    assert [len(batches) for batches in few.values()] == [1] * 150
    assert max(len(batches) for batches in many.values()) == 16
    for parts, size in ((few, 300), (many, 100_000)):
        assert [int(name) for batches in parts.values() for batch in batches for name in batch] == list(range(size))
        assert all(len(batch) == 2 for batches in parts.values() for batch in batches)


def test_a_rank_that_is_late_does_not_change_a_shard(tmp_path):
    one, other = writer(tmp_path), writer(tmp_path)
    write_all(one)
    before = contents(tmp_path)
    other.merge()
    assert contents(tmp_path) == before


def test_two_writers_may_finish_the_same_shard_at_the_same_time(tmp_path, monkeypatch):
    one, other = writer(tmp_path, NAMES[:3]), writer(tmp_path, NAMES[:3])

    def save_after_other(tensors, path):
        monkeypatch.setattr("safetensors.torch.save_file", save_file)
        other.merge()  # removes the folder of the batches
        save_file(tensors, path)

    one.write(tensors(NAMES[:2]))
    with monkeypatch.context() as patch:
        patch.setattr(one, "_merge_if_complete", lambda digest: None)  # as if it were interrupted here
        one.write(tensors(NAMES[2:3]))
    monkeypatch.setattr("safetensors.torch.save_file", save_after_other)
    one.merge()
    assert finished_names(tmp_path / "latents").keys() == set(NAMES[:3])


def test_a_damaged_shard_is_named(tmp_path):
    write_all(writer(tmp_path))
    damaged = min((tmp_path / "latents").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{damaged.name} is damaged .* remove it and prepare the data again"):
        writer(tmp_path)


def test_a_shard_has_about_the_size_asked_for():
    assert samples_per_shard(100, 1000) == 10
    assert samples_per_shard(3000, 1000) == 1
    assert samples_per_shard(1, 2**30) == MOST_PER_SHARD
