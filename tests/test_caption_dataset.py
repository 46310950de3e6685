"""caption_dataset.py writes captions from a server into a table that training reads, whatever fails on the way."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import av
import pytest
from PIL import Image

import caption_dataset
from args import parse_prepare_args
from caption_server import Answer, CaptionServer, Question, caption_of, refused, said, serving
from captions.endpoint import EndpointCaptioner
from captions.pool import MOST_FAILURES_IN_A_ROW
from captions.table import Caption, CaptionFile, CaptionSettings
from captions.text import IMAGE_PROMPT, VIDEO_PROMPT, NoCaption, Questions
from clip_lists import write, write_table
from common.errors import UserError
from encoded_clips import encode, numbered_frame
from planning.plan import plan_raw_clips
from repository import TRAINING


LENGTHS = {"fly.mp4": 30, "run.mkv": 12, "walk/walk.mp4": 20}
KEY = "sk-secret-0123456789"


@pytest.fixture
def server(monkeypatch):
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "my clips"
    (folder / "walk").mkdir(parents=True)
    for name, length in LENGTHS.items():
        encode(folder / name, frames=length)
    return folder


@pytest.fixture
def clips(encoded, tmp_path) -> Path:
    return shutil.copytree(encoded, tmp_path / encoded.name)


def flags(clips: Path, server: CaptionServer, *more: str) -> list[str]:
    return ["--data_root", str(clips), "--endpoint", server.endpoint, *more]


def caption(clips: Path, server: CaptionServer, *more: str) -> list[dict]:
    """Caption a folder; return the rows of the table."""
    caption_dataset.main(flags(clips, server, *more))
    return rows_of(clips / "captions.jsonl")


def refuse(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit, match=r"^2$"):
        caption_dataset.main(argv)
    return capsys.readouterr().err.split("error: ", 1)[1].rstrip()


def rows_of(table: Path) -> list[dict]:
    return [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]


def captions_of(rows: list[dict]) -> dict[str, str]:
    return {row["video"]: row["caption"] for row in rows}


def all_captioned() -> dict[str, str]:
    return {name: caption_of(length) for name, length in LENGTHS.items()}


def test_every_clip_is_captioned_in_the_order_of_the_list(clips, server):
    named = all_captioned().items()
    rows = [{"video": name, "caption": text, "captioned_by": "watcher"} for name, text in named]
    assert caption(clips, server) == rows
    assert not (clips / "captions.jsonl.part").exists()


def test_the_frames_are_spread_over_the_clip(clips, server):
    caption(clips, server, "--num_frames", "5")
    seen = {question.numbers[-1] + 1: question.numbers for question in server.questions}
    assert seen == {length: [round(i * (length - 1) / 4 + 1e-9) for i in range(5)] for length in LENGTHS.values()}


def test_skipped_frames_are_not_sent(clips, server):
    caption(clips, server, "--num_frames", "2", "--skip_frames_start", "3", "--skip_frames_end", "1")
    assert sorted(question.numbers for question in server.questions) == [[3, 10], [3, 18], [3, 28]]


def test_of_a_shorter_clip_each_frame_is_sent_once(clips, server):
    caption(clips, server, "--num_frames", "16")
    assert [question.numbers for question in server.questions if len(question.frames) < 16] == [list(range(12))]


def test_frames_are_shrunk_to_the_largest_size_and_not_enlarged(clips, server):
    encode(clips / "fly.mp4", frames=30, height=96, width=160)
    caption(clips, server, "--max_size", "80")
    assert {frame.shape for question in server.questions for frame in question.frames} == {(48, 80, 3)}


@pytest.mark.parametrize(("variable", "more"), [("OPENAI_API_KEY", []), ("MY_KEY", ["--api_key_variable", "MY_KEY"])])
def test_prompt_key_and_numbers_are_those_of_the_flags(clips, server, monkeypatch, variable, more):
    monkeypatch.setenv(variable, KEY)
    caption(clips, server, "--temperature", "0.5", "--max_tokens", "77", "--prompt", "Say what you see.", *more)
    for question in server.questions:
        assert question.prompt == "Say what you see."
        assert question.headers["Authorization"] == f"Bearer {KEY}"
        del question.body["messages"]
        assert question.body == {"model": "watcher", "temperature": 0.5, "max_tokens": 77}


def test_the_prompt_can_come_from_a_file(clips, server, tmp_path):
    caption(clips, server, "--prompt_file", str(write(tmp_path / "prompt.txt", "Name the colours.\n")))
    assert {question.prompt.strip() for question in server.questions} == {"Name the colours."}


def test_the_built_in_prompt_depends_on_video_or_still_image(clips, server):
    Image.fromarray(numbered_frame(200)).save(clips / "still.png")
    caption(clips, server)
    prompts = {question.numbers[-1]: (question.prompt, len(question.frames)) for question in server.questions}
    assert prompts.pop(200) == (IMAGE_PROMPT, 1)
    assert set(prompts.values()) == {(VIDEO_PROMPT, 8)}


def test_a_template_asks_to_omit_what_is_learned_and_a_changed_one_asks_again(clips, server):
    server.answer = lambda question, _: refused(500) if question.numbers[-1] == 11 else said("A fly.")
    with pytest.raises(SystemExit):
        caption(clips, server, "--max_retries", "0", "--overwrite")
    server.questions.clear()
    server.answer = lambda *_: said("A fly.")
    caption(clips, server, "--template", "style", "--overwrite")
    assert {question.prompt for question in server.questions} == {Questions.built_in("style").video}
    assert server.lengths_asked() == sorted(LENGTHS.values())


def test_without_a_key_none_is_sent_and_temperature_is_zero(clips, server):
    caption(clips, server)
    assert all("Authorization" not in question.headers for question in server.questions)
    assert {question.body["temperature"] for question in server.questions} == {0}


def test_each_worker_has_one_request_under_way(clips, server):
    together, lock, under_way, most = threading.Barrier(2), threading.Lock(), 0, 0

    def answer(question: Question, before: int) -> Answer:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait()  # for another one that is under way
        with lock:
            under_way -= 1
        return said("Bars.")

    encode(clips / "fourth.mp4", frames=16)
    server.answer = answer
    assert len(caption(clips, server, "--num_workers", "2")) == 4
    assert most == 2


def test_the_preparation_reads_the_table_with_the_printed_flags(clips, server, capsys):
    caption(clips, server)
    told = shlex.split(capsys.readouterr().out.split("with: ")[1])
    args = parse_prepare_args([*told, "--model_id", "some/model", "--output_dir", "out", "--frame_buckets", "9"])
    data = plan_raw_clips(args.sources, args.clips)
    assert data.bad == []
    planned = [(planned.clip.video, planned.clip.caption) for planned in data.clips]
    assert planned == [(clips / name, text) for name, text in all_captioned().items()]


def test_an_answer_without_a_caption_is_a_failure(clips, server, capsys):
    server.answer = lambda question, before: said(None if question.numbers[-1] == 11 else '"Bars\n move."')
    title, line = refuse(flags(clips, server), capsys).splitlines()
    assert title == "1 of 3 clips got no caption; run again to caption only these:"
    assert line == f"  {clips / 'run.mkv'} ({clips}): the model's answer has nothing in it"
    assert captions_of(rows_of(clips / "captions.jsonl")) == {"fly.mp4": "Bars move.", "walk/walk.mp4": "Bars move."}


def test_clips_without_a_caption_are_listed_in_order_with_their_reasons(clips, server, capsys):
    finished = {11: threading.Event(), 19: threading.Event()}

    def answer(question: Question, before: int) -> Answer:
        last = question.numbers[-1]
        if last == 29:
            finished[11].wait()
        if last == 11:
            finished[19].wait()
        if last in finished:
            finished[last].set()
        return Answer("", 302)

    server.answer = answer
    lines = refuse(flags(clips, server), capsys).splitlines()[1:]
    assert lines == [f"  {clips / name} ({clips}): the server says 302: Found" for name in LENGTHS]


@pytest.mark.parametrize("body", ["<html>", {"choices": []}, {"choices": [{"message": None}]}, [1]])
def test_an_answer_that_is_not_a_chat_completion_is_a_failure(clips, server, capsys, body):
    server.answer = lambda question, before: Answer(body)
    assert refuse(flags(clips, server), capsys).count("the server's answer is not a chat completion: ") == 3
    assert not (clips / "captions.jsonl").exists()


def test_existing_captions_are_kept(clips, server):
    write(clips / "run.txt", "They run.\n")
    rows = caption(clips, server)
    assert captions_of(rows) == all_captioned() | {"run.mkv": "They run."}
    assert [row["captioned_by"] for row in rows] == ["watcher", "user", "watcher"]
    assert server.lengths_asked() == [20, 30]


def test_a_second_run_captions_only_new_clips_and_keeps_corrections(clips, server):
    rows = caption(clips, server)
    rows[0]["caption"] = "They fly."
    (clips / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode(clips / "swim.mp4", frames=16)
    server.lengths_asked()
    expected = all_captioned() | {"fly.mp4": "They fly.", "swim.mp4": caption_of(16)}
    assert captions_of(caption(clips, server)) == expected
    assert server.lengths_asked() == [16]


def test_no_server_is_needed_if_all_clips_have_captions(clips, server, capsys):
    rows = caption(clips, server)
    caption_dataset.main(["--data_root", str(clips), "--endpoint", "http://127.0.0.1:9/v1"])
    assert rows_of(clips / "captions.jsonl") == rows
    assert "3 captions, 0 of them new" in capsys.readouterr().out


def test_overwrite_captions_all_clips_again(clips, server):
    write(clips / "run.txt", "They run.\n")
    caption(clips, server)
    server.lengths_asked()
    server.answer = lambda question, before: said("Anew.")
    assert set(captions_of(caption(clips, server, "--overwrite")).values()) == {"Anew."}
    assert server.lengths_asked() == [12, 20, 30]


def test_a_stopped_overwriting_run_keeps_its_captions_unless_the_prompt_changed(clips, server, capsys):
    def fail_for_run(question: Question, before: int) -> Answer:
        return refused(400) if question.numbers[-1] == 11 else said(f"Anew: {question.prompt}")

    write(clips / "run.txt", "They run.\n")
    server.answer = fail_for_run
    anew = flags(clips, server, "--overwrite", "--prompt", "One.")
    refuse(anew, capsys)
    anew_but_one = dict.fromkeys(LENGTHS, "Anew: One.") | {"run.mkv": "They run."}
    assert captions_of(rows_of(clips / "captions.jsonl")) == anew_but_one
    server.lengths_asked()
    refuse(anew, capsys)
    assert server.lengths_asked() == [12]
    refuse([*anew[:-1], "Two."], capsys)
    assert server.lengths_asked() == [12, 20, 30]
    server.answer = lambda question, before: said("At last.")
    caption_dataset.main(anew)
    assert server.lengths_asked() == [12]
    assert not (clips / "captions.jsonl.part").exists()


def test_a_run_on_fewer_clips_keeps_the_captions_of_the_others(clips, server, tmp_path):
    table = write(tmp_path / "list.csv", "video\n" + "\n".join(LENGTHS))
    argv = ["--dataset_file", str(table), *flags(clips, server)]
    caption_dataset.main(argv)
    caption_dataset.main([*argv, "--max_samples", "1"])
    assert captions_of(rows_of(clips / "captions.jsonl")) == all_captioned()
    assert len(server.questions) == 3
    (clips / "run.mkv").unlink()
    caption_dataset.main([*argv, "--max_samples", "1"])
    assert "run.mkv" not in captions_of(rows_of(clips / "captions.jsonl"))


def test_captions_of_a_stopped_run_survive_a_run_on_fewer_clips(clips, server):
    kept = '{"video": "run.mkv", "caption": "They run.", "author": "watcher", "settings": "x"}\n'
    write(clips / "captions.jsonl.part", kept)
    caption(clips, server, "--max_samples", "1")
    assert captions_of(caption(clips, server)) == all_captioned() | {"run.mkv": "They run."}


def test_a_deleted_caption_is_written_again(clips, server):
    rows = caption(clips, server)
    rows[1]["caption"] = ""
    (clips / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.lengths_asked()
    assert captions_of(caption(clips, server)) == all_captioned()
    assert server.lengths_asked() == [12]


def test_a_list_of_paths_needs_no_captions_and_blank_ones_are_filled(clips, server):
    write(clips / "videos.txt", "walk/walk.mp4\nrun.mkv\nfly.mp4\n")
    assert list(captions_of(caption(clips, server))) == ["walk/walk.mp4", "run.mkv", "fly.mp4"]
    (clips / "captions.jsonl").unlink()
    write(clips / "prompts.txt", "\nThey run.\n\n")
    assert captions_of(caption(clips, server)) == all_captioned() | {"run.mkv": "They run."}


def test_a_table_keeps_its_other_columns_and_its_captions(clips, server, tmp_path):
    (clips / "first.png").touch()
    rows = [{"file": "fly.mp4", "text": "They fly.", "camera": "fixed"}]
    rows.append({"file": "run.mkv", "text": "", "image": "first.png"})
    table = write_table(tmp_path / "list.jsonl", rows)
    columns = ["--dataset_file", str(table), "--video_column", "file", "--caption_column", "text"]
    assert caption(clips, server, *columns) == [
        {"video": "fly.mp4", "caption": "They fly.", "captioned_by": "user", "camera": "fixed"},
        {"video": "run.mkv", "caption": caption_of(12), "captioned_by": "watcher", "image": "first.png"},
    ]


def test_the_table_is_written_beside_the_list(clips, server):
    table = write(clips / "list.csv", "video\nrun.mkv\nfly.mp4")
    caption_dataset.main(["--dataset_file", str(table), "--endpoint", server.endpoint])
    assert captions_of(rows_of(clips / "captions.jsonl")) == {"run.mkv": caption_of(12), "fly.mp4": caption_of(30)}


def test_a_clip_listed_twice_is_captioned_once(clips, server, tmp_path):
    table = write(tmp_path / "list.csv", "video\nrun.mkv\nrun.mkv")
    assert [row["caption"] for row in caption(clips, server, "--dataset_file", str(table))] == [caption_of(12)] * 2
    assert server.lengths_asked() == [12]


def test_parts_of_a_file_get_captions_of_their_own(clips, server):
    def parts(*frames: tuple[str, str]) -> list[dict]:
        rows = [{"video": "fly.mp4", "start_frame": start, "end_frame": end} for start, end in frames]
        return caption(clips, server, "--dataset_file", str(write_table(clips / "list.csv", rows)))

    made = parts(("0", "10"), ("12", "25"))
    assert [(row["start_frame"], row["end_frame"]) for row in made] == [("0", "10"), ("12", "25")]
    assert sorted((question.numbers[0], question.numbers[-1]) for question in server.questions) == [(0, 9), (12, 24)]
    server.questions.clear()
    again = parts(("0", "10"), ("3", "30"))
    assert [(question.numbers[0], question.numbers[-1]) for question in server.questions] == [(3, 29)]
    assert [row["start_frame"] for row in again] == ["0", "3", "12"]  # the last one is of the earlier table


def test_a_busy_server_gets_the_request_again_and_a_truncated_answer_ends_with_a_sentence(clips, server):
    server.answer = lambda question, before: refused(429) if before < 2 else said("Bars move. They are wh", "length")
    assert set(captions_of(caption(clips, server)).values()) == {"Bars move."}
    assert server.lengths_asked() == [12] * 3 + [20] * 3 + [30] * 3


def test_a_failed_clip_is_listed_and_captioned_in_the_next_run(clips, server, capsys):
    described = server.answer
    died = refused(500, "worker died")
    server.answer = lambda question, before: died if question.numbers[-1] == 11 else described(question, before)
    message = refuse(flags(clips, server, "--max_retries", "2"), capsys)
    assert message.endswith(f"{clips / 'run.mkv'} ({clips}): the server says 500: worker died")
    assert server.lengths_asked() == [12, 12, 12, 20, 30]
    assert captions_of(rows_of(clips / "captions.jsonl")).keys() == {"fly.mp4", "walk/walk.mp4"}
    server.answer = described
    assert captions_of(caption(clips, server)) == all_captioned()
    assert server.lengths_asked() == [12]


def test_a_refused_request_is_sent_once(clips, server, capsys):
    server.answer = lambda question, before: refused(400, "At most 1 image")
    assert refuse(flags(clips, server), capsys).count("the server says 400: At most 1 image") == 3
    assert server.lengths_asked() == [12, 20, 30]


def test_a_run_in_which_every_clip_fails_ends_early(clips, server, capsys):
    for number in range(MOST_FAILURES_IN_A_ROW):
        shutil.copy(clips / "fly.mp4", clips / f"{number}.mp4")
    server.answer = lambda question, before: refused(400)
    message = refuse(flags(clips, server, "--num_workers", "1"), capsys)
    assert message.startswith(f"{MOST_FAILURES_IN_A_ROW} clips in a row got no caption, so no more are tried")
    assert len(server.questions) <= MOST_FAILURES_IN_A_ROW + 1


def test_a_key_that_expires_ends_the_run_and_is_not_shown(clips, server, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answer = lambda question, before: refused(401, f"Incorrect API key provided: {KEY}")
    message = refuse(flags(clips, server), capsys)
    reason = "the server says 401: Incorrect API key provided: (hidden); run again to resume"
    assert message == f"--endpoint {server.endpoint}: {reason}"


def test_a_clip_that_does_not_decode_is_listed_at_the_end(clips, server, capsys):
    encode(clips / "fly.mp4", frames=30, g="10")
    with av.open(str(clips / "fly.mp4")) as container:
        first = next(container.demux(video=0))
    content = bytearray((clips / "fly.mp4").read_bytes())
    content[first.pos : first.pos + first.size] = bytes(first.size)  # the probe decodes what follows the last keyframe
    (clips / "fly.mp4").write_bytes(content)
    message = refuse(flags(clips, server), capsys)
    assert f"  {clips / 'fly.mp4'} ({clips}): " in message
    assert captions_of(rows_of(clips / "captions.jsonl")).keys() == {"run.mkv", "walk/walk.mp4"}


def test_unusable_clips_are_listed_before_the_first_request(clips, server, capsys):
    write(clips / "empty.mp4", b"")
    assert "empty.mp4" in refuse(flags(clips, server), capsys)
    assert server.questions == []
    assert captions_of(caption(clips, server, "--on_bad_clip", "skip")) == all_captioned()
    assert "1 of the clips cannot be used and are skipped:" in capsys.readouterr().out


def start(clips: Path, server: CaptionServer, *more: str) -> subprocess.Popen:
    script = Path(caption_dataset.__file__)
    command = [sys.executable, str(script), *flags(clips, server, "--num_workers", "1", *more)]
    # Shells start background processes, such as the tests, with this signal ignored.
    options = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL), "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(("sent", "code", "kept"), [(signal.SIGKILL, -9, 1), (signal.SIGINT, 128 + 2, 2)])
def test_a_stopped_or_killed_run_continues(clips, server, sent, code, kept):
    described, started, said = server.answer, threading.Event(), []

    def end_at_the_second(question: Question, before: int) -> Answer:
        started.wait()
        if len(server.questions) == 2:
            os.kill(process.pid, sent)
            for line in process.stderr:  # until the signal is noticed, or the process has ended
                said.append(line)
                if "under way" in line:
                    break
        return described(question, before)

    server.answer = end_at_the_second
    process = start(clips, server)
    started.set()
    assert process.wait() == code
    assert any("answers that are under way are waited for" in line for line in said) == (sent == signal.SIGINT)
    assert not (clips / "captions.jsonl").exists()
    asked = server.lengths_asked()
    assert len(asked) == 2
    server.answer = described
    assert captions_of(caption(clips, server)) == all_captioned()
    assert len(server.lengths_asked()) == 3 - kept


def test_an_incomplete_line_of_a_killed_run_is_ignored(clips, server):
    kept = b'{"video": "run.mkv", "caption": "Sie laufen.", "author": "watcher", "settings": "x"}\n'
    part = write(clips / "captions.jsonl.part", kept + '{"video": "fly.mp4", "caption": "ü'.encode()[:-1])
    assert captions_of(caption(clips, server)) == all_captioned() | {"run.mkv": "Sie laufen."}
    assert server.lengths_asked() == [20, 30]
    assert not part.exists()


def test_damaged_captions_of_a_stopped_run_are_refused(clips, server, capsys):
    part = write(clips / "captions.jsonl.part", '{"video": "run.mkv"}\n')
    message = refuse(flags(clips, server), capsys)
    assert message == f"{part} is not what caption_dataset.py left there; remove it"


def test_a_full_disk_loses_no_earlier_caption(tmp_path):
    def keep(name: str) -> None:
        CaptionFile(tmp_path / "captions.jsonl").append(name, Caption("They move." * 9, "watcher"), settings)

    settings = CaptionSettings("watcher", None, 8, (0, 0), 512, 0.0, 512)
    keep("fly.mp4")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "captions.jsonl.part").stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"captions\.jsonl\.part cannot be written \(File too large\)"):
            keep("run.mkv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with open(tmp_path / "captions.jsonl.part", "rb") as part:  # without the incomplete line
        assert len(part.readlines()) == 1
    keep("walk.mp4")
    assert CaptionFile(tmp_path / "captions.jsonl").captions().keys() == {"fly.mp4", "walk.mp4"}


def test_no_request_is_sent_again_once_stopped(server):
    stopped = threading.Event()

    def stop(question: Question, before: int) -> Answer:
        stopped.set()
        return refused(503)

    server.answer = stop
    options = {"temperature": 0.0, "max_tokens": 9, "timeout": 60.0, "max_retries": 9, "stopped": stopped}
    captioner = EndpointCaptioner(server.endpoint, None, None, **options)
    with pytest.raises(NoCaption, match="the run was stopped"):
        captioner.describe([Image.fromarray(numbered_frame(3))], "What is it?")
    assert len(server.questions) == 1


def test_torch_is_not_imported_to_ask_a_server(clips, server):
    argv = flags(clips, server)
    code = f"import sys, caption_dataset\ncaption_dataset.main({argv!r})\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAINING, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "Captioning: 100%" in done.stderr


def test_an_unreachable_server_is_one_line_with_a_command_to_start_one(clips, capsys):
    message = refuse(["--data_root", str(clips), "--endpoint", "http://127.0.0.1:9/v1"], capsys)
    reason = r"the server cannot be reached \(.+\); start a server there, such as: vllm serve \S+"
    assert re.fullmatch(f"--endpoint http://127.0.0.1:9/v1: {reason}", message)
    assert list(clips.glob("captions*")) == []


def test_an_unknown_model_is_refused_with_a_list_of_the_servers_models(clips, server, capsys):
    server.models = Answer({"data": [{"id": "watcher"}, {"id": "reader"}]})
    offered = "set --model to one of those offered:\n  watcher\n  reader"
    for more, problem in ((["--model", "seer"], "there is no model 'seer'"), ([], "no model is named")):
        message = refuse(flags(clips, server, *more), capsys)
        assert message == f"--endpoint {server.endpoint}: {problem}; {offered}"
    assert {row["captioned_by"] for row in caption(clips, server, "--model", "reader")} == {"reader"}


@pytest.mark.parametrize(
    ("models", "said_of_it"),
    [
        (Answer({"error": {"message": "bad key"}}, 401), "the server says 401: bad key; put the right key into"),
        (Answer({"detail": "Not Found"}, 404), "its /models lists no models (the server says 404: "),
        (Answer("<html>Hello</html>"), "its /models lists no models (the server says 200: <html>Hello</html>)"),
        (Answer({"models": []}), "its /models lists no models"),
        (Answer({"data": []}), "it offers no model; load one there, such as: vllm serve"),
    ],
)
def test_a_server_that_does_not_list_its_models_is_one_line(clips, server, capsys, models, said_of_it):
    server.models = models
    message = refuse(flags(clips, server), capsys)
    assert message.startswith(f"--endpoint {server.endpoint}: {said_of_it}")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"video": "fly.mp4", "caption": "work"}\n', " exists already, and caption_dataset.py did not write it"),
        (
            '{"video": "fly.mp4", "caption": "Fly.", "captioned_by": "watcher"}\n{"video": "run.mkv", "caption": 5}\n',
            ": captions.jsonl:2 has no video or no text as its caption",
        ),
    ],
)
def test_a_damaged_table_or_one_of_another_origin_is_not_overwritten(clips, server, capsys, content, problem):
    table = write(clips / "captions.jsonl", content)
    assert refuse(flags(clips, server), capsys).startswith(f"--output_file: {table}{problem}")
    assert table.read_text() == content


def test_a_table_in_the_folder_of_clips_is_not_ignored(clips, server, capsys):
    write(clips / "metadata.csv", "video,caption\nfly.mp4,They fly.\n")
    assert f"pass --dataset_file {clips / 'metadata.csv'}" in refuse(flags(clips, server), capsys)


def test_an_output_file_that_cannot_be_written_is_refused_before_the_first_request(clips, server, capsys):
    message = refuse(flags(clips, server, "--output_file", str(clips / "run.mkv" / "x.jsonl")), capsys)
    assert message.startswith(f"--output_file: {clips / 'run.mkv' / 'x.jsonl'} cannot be written (")
    assert server.questions == []


@pytest.mark.parametrize("content", ["", '{"video": "run.mkv", "caption": null, "captioned_by": "watcher"}\n'])
def test_an_emptied_table_is_filled_again(clips, server, content):
    write(clips / "captions.jsonl", content)
    assert captions_of(caption(clips, server)) == all_captioned()


@pytest.mark.parametrize(
    ("endpoint", "environment", "message"),
    [
        ("http://a..b/v1", {}, "--endpoint http://a..b/v1: is not an address ("),
        ("http://xn--a/v1", {}, "--endpoint http://xn--a/v1: "),
        (None, {"ALL_PROXY": "gopher://x"}, "the proxy in the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY)"),
        (None, {"OPENAI_API_KEY": f"{KEY}\v{KEY}"}, "the key in the environment variable OPENAI_API_KEY has"),
    ],
)
def test_a_bad_address_proxy_or_key_is_one_line(clips, server, capsys, monkeypatch, endpoint, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    error = refuse(["--data_root", str(clips), "--endpoint", endpoint or server.endpoint], capsys)
    assert message in error
    assert KEY not in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--endpoint or --model: required, but not given"),
        (["--endpoint", "localhost:8000"], "--endpoint: 'localhost:8000' is not an address such as http://"),
        (["--endpoint", "http://me:secret@x/v1"], "--endpoint: remove user and password from the address"),
        (["--model", "x", "--num_workers", "2"], "--num_workers: only for a model behind an --endpoint"),
        (["--model", "x", "--prompt", " "], "--prompt is empty; omit it for the built-in prompt"),
        (["--model", "x", "--prompt", "\udcb0"], "--prompt: the text is not UTF-8"),
        (["--model", "x", "--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file are both given"),
        (["--model", "x", "--prompt", "a", "--template", "style"], "--template chooses a built-in question; omit it"),
        (["--model", "x", "--prompt_file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--model", "x", "--output_file", "captions.csv"], "--output_file: captions.csv must end in .jsonl"),
        (["--model", "x", "--id_token", "X"], "--id_token: unknown flag"),
        (["--model", "x", "--dataset_config_name", "x"], "--dataset_config_name: no effect without --dataset_name"),
        (["--model", "x"], "folder has nothing that can be read as clips"),
        (["--model", "x", "--caption_column", "txt", "--dataset_file", "a.csv"], "a.csv has no column 'txt'"),
    ],
)
def test_mistakes_in_flags_and_lists_are_one_line(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.csv", "video\nx.mp4\n")
    error = refuse(["--data_root", "folder", *more], capsys)
    assert error.startswith(message)
    assert len(error.splitlines()) == 1


def test_a_data_set_without_a_folder_needs_a_name_for_the_table(capsys):
    error = refuse(["--dataset_name", "name/of-it", "--model", "x"], capsys)
    assert error.startswith("--output_file: required with --dataset_name but no --data_root")


def test_only_clips_that_fulfil_the_condition_are_captioned(clips, server, capsys):
    write_table(clips / "scores.csv", [{"video": name, "frames": str(count)} for name, count in LENGTHS.items()])
    rows = caption(clips, server, "--keep", "frames >= 20")
    assert captions_of(rows).keys() == LENGTHS.keys() - {"run.mkv"}
    assert len(server.questions) == 2
    assert "dropped by --keep: frames is 12" in capsys.readouterr().out
