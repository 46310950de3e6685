"""The columns of an index are mapped, joined and described as `prepared.index` documents."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.buckets import Bucket
from prepared.index import PreparedIndex
from prepared_folders import index_of, rows_of, write_prepared


SMALL, LONG = Bucket(9, 64, 96), Bucket(17, 64, 96)
TENSORS = {"video_latents": torch.zeros(32, 3, 8, 12), "prompt_embeds": torch.zeros(226, 64)}


@pytest.fixture
def joined(tmp_path) -> PreparedIndex:
    """Two folders, a0 to a2 and b0 to b2, of which the second repeats."""
    first, second = (
        write_prepared(tmp_path / folder, {f"{folder}{n}": TENSORS for n in range(3)}, bucket, repeats=0.5)
        for folder, bucket in (("a", LONG), ("b", SMALL))
    )
    return PreparedIndex([*first.folders, *second.with_facts(times=3).folders])


def test_the_samples_of_several_folders_are_joined(joined):
    assert [clip.name for clip in joined] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [joined[place].name for place in (0, 2, 3, -1)] == ["a0", "a2", "b0", "b2"]
    with pytest.raises(IndexError):
        joined[6]
    assert list(joined.buckets) == [LONG] * 3 + [SMALL] * 3
    assert joined.buckets.counts == {SMALL: 3, LONG: 3}
    assert joined.repeats.tolist() == [clip.repeats for clip in joined] == [0.5] * 3 + [1.5] * 3


def test_some_samples_are_taken_with_copies_once_per_epoch(joined):
    taken = joined.take([4, 1, 1])
    assert [(clip.name, clip.repeats) for clip in taken] == [("a1", 1), ("a1", 1), ("b1", 1)]
    assert list(taken.buckets) == [LONG, LONG, SMALL]
    assert taken[2].video_latents == joined[4].video_latents


def test_omitted_samples_are_nowhere(joined):
    left = joined.omit(np.array([1, 5])).omit(np.array([0]))  # a1, b2, then a0
    assert [clip.name for clip in left] == ["a2", "b0", "b1"]
    assert [left[place].name for place in (0, 1, -1)] == ["a2", "b0", "b1"]
    assert list(left.buckets) == [LONG, SMALL, SMALL]
    assert left.repeats.tolist() == [0.5, 1.5, 1.5]
    assert list(left.describe()) == [list(joined.describe())[place] for place in (2, 3, 4)]
    assert [clip.name for clip in left.take([2, 0])] == ["a2", "b1"]
    assert left.without_omitted(np.arange(6)).tolist() == [2, 3, 4]
    assert list(pickle.loads(pickle.dumps(left))) == list(left)
    first, second = left.folders
    kept = PreparedIndex([replace(first, regularization=True), second], left.omitted)
    assert kept.regularization.tolist() == [True, False, False]
    assert [clip.name for clip in kept.without_regularization()] == ["b0", "b1"]


def test_a_worker_maps_the_file_again(joined):
    """A process that is not a fork gets the dataset pickled."""
    pickled = pickle.dumps(joined)
    assert len(pickled) < 1000
    assert list(pickle.loads(pickled)) == list(joined)


def test_nothing_is_copied_when_an_index_is_mapped(joined):
    numbers = joined.folders[0].numbers("num_frames")
    assert not numbers.flags.owndata
    assert joined.folders[0].column("name").buffers()[2].is_mutable is False


def test_captions_are_distinct_and_in_order(tmp_path):
    index = index_of([SMALL] * 5, caption=["b", "", "a", "b", None])
    assert index.captions.to_pylist() == ["b", "a"]
    write_prepared(tmp_path / "a", {"a": TENSORS}, SMALL, caption="a cat")
    written = write_prepared(tmp_path / "b", {"b": TENSORS}, SMALL, caption="a dog")
    assert PreparedIndex([*written.folders, *index.folders]).captions.to_pylist() == ["a dog", "b", "a"]


def test_names_of_files_that_are_not_utf8_are_escaped(tmp_path):
    write_prepared(tmp_path, {"a": TENSORS}, SMALL, clip="caf\udce9.mp4", source="videos.txt:1")
    assert rows_of(tmp_path)[0]["clip"] == "caf\\udce9.mp4"


def test_the_file_of_a_caption_is_that_of_a_sample_trained_on(tmp_path):
    origin = {"clip": "a.mp4", "frames": [3, 19], "caption": "a rabbit"}
    index = write_prepared(tmp_path / "prepared", dict.fromkeys(("one", "two"), TENSORS), SMALL, **origin)
    assert index.origin_of("a rabbit") == index.omit(np.array([0])).origin_of("a rabbit") == ("a.mp4", 3, 19)
    assert index.omit(np.array([0, 1])).origin_of("a rabbit") is index.origin_of("a cat") is None
