"""What a result was trained with is what sampling asks for, and what generate.py takes."""

import json

import pytest

from common.errors import UserError
from studio.commands import check_command, sample_command
from studio.given import Given, find_run, given_of


FLAGS = {"pretrained_model_name_or_path": "base", "height": 64, "width": 96, "max_num_frames": 17}


@pytest.fixture
def root(tmp_path, monkeypatch):
    for folder in ("base", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model_index.json").touch()
    for file in ("a.png", "b.png", "c.png", "d.png", "a.mp4", "b.mp4"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(root, task, **flags):
    for folder in (root / "run", root / "run/checkpoint-5"):
        folder.mkdir(parents=True)
        (folder / "pytorch_lora_weights.safetensors").touch()
    (root / "run/run_facts.json").write_text(json.dumps({"task": task, "flags": FLAGS | flags}) + "\n")


@pytest.mark.parametrize(
    ("task", "flags", "files", "wanted"),
    [
        ("text-to-video", {}, [], {}),
        ("image-to-video", {}, ["a.png", "b.png"], {"image": ("a.png", "b.png")}),
        (
            "image-to-video",
            {"condition_frames": "first,last"},
            ["a.png", "b.png", "c.png", "d.png"],
            {"image": ("a.png", "c.png"), "last_image": ("b.png", "d.png")},
        ),
        (
            "image-to-video",
            {"condition_frames": "first:4"},
            ["a.mp4", "b.mp4"],
            {"video": ("a.mp4", "b.mp4"), "condition_frames": "first:4"},
        ),
        (
            "control-to-video",
            {},
            ["a.mp4", "b.mp4"],
            {"control": ("a.mp4", "b.mp4"), "compute_control": "none"},
        ),
        (
            "control-to-video",
            {"compute_control": "blur"},
            ["a.mp4", "b.mp4"],
            {"control": ("a.mp4", "b.mp4"), "compute_control": "blur"},
        ),
    ],
)
def test_a_lora_is_sampled_with_the_files_model_and_size_that_it_was_trained_with(root, task, flags, files, wanted):
    write_run(root, task, **flags)
    given = given_of(find_run(root, "run/checkpoint-5"))
    command = sample_command("other", "run/checkpoint-5", "one\ntwo", given, files, 5, 6.0, 1, "")
    settings = check_command(command, root)
    nothing = {"image": (), "last_image": (), "video": (), "condition_frames": None, "control": ()}
    for name, value in (nothing | {"compute_control": None} | wanted).items():
        assert getattr(settings.content, name) == value
    assert settings.model.pretrained_model_name_or_path == "base"
    assert (settings.sampling.height, settings.sampling.width, settings.sampling.num_frames) == (64, 96, 17)
    if files:
        with pytest.raises(UserError, match="for each prompt: choose or type them"):
            given.sampled([])


def test_a_file_whose_name_begins_with_a_hyphen_is_no_flag(root):
    (root / "-a.mp4").touch()
    command = sample_command("base", "", "one", Given("control video"), ["-a.mp4"], 5, 6.0, 1, "")
    assert check_command(command, root).content.control == ("./-a.mp4",)


def test_the_base_is_that_of_the_run_or_its_place_is_asked_for(root):
    def sampled_from(base, more="", **flags):
        (root / "run/run_facts.json").write_text(
            json.dumps({"flags": FLAGS | {"pretrained_model_name_or_path": base} | flags}) + "\n"
        )
        command = sample_command("other", "run", "one", Given(), [], 5, 6.0, 1, more)
        model = check_command(command, root).model
        return model.pretrained_model_name_or_path, model.revision, model.variant

    write_run(root, "text-to-video")
    assert sampled_from(str(root / "base")) == ("base", None, None)
    assert sampled_from("owner/name", revision="v2", variant="fp16") == ("owner/name", "v2", "fp16")
    for gone in ("/etc", "../base", "a/b/base", str(root / "base/gone")):
        with pytest.raises(UserError, match=f"base model {gone} is not in .* by --model_path in More flags"):
            sampled_from(gone)
        assert sampled_from(gone, "--model_path base", revision="v2") == ("base", None, None)


def test_nothing_is_known_of_a_lora_from_elsewhere_or_whose_facts_are_damaged(root):
    (root.parent / "run_facts.json").write_text("{}")
    for name in (None, "", "a.mp4", "owner/name", "..", "/etc"):
        assert find_run(root, name) is None
    write_run(root, "control-to-video", compute_control="x", condition_frames=3)
    assert given_of(find_run(root, "run")) == Given("control video", control="own clips")
