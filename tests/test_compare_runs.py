"""The script that writes pages of runs from their folders."""

import os

import pytest

from compare_runs import main
from drawn_runs import write_run


def test_one_run_gets_its_own_page_and_several_one_beside_them(tmp_path, capsys):
    one, other = (str(write_run(tmp_path / name)) for name in ("one", "other"))
    main([one, one])
    main([one, f"{other}/"])
    main([one, other, "--output_file", str(tmp_path / "pages" / "mine.html")])
    titles = [file.read_text(encoding="utf-8").split("<h1>")[1][:7] for file in sorted(tmp_path.rglob("*.html"))]
    assert titles == ["2 runs:", "Run: on", "2 runs:"]
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'pages' / 'mine.html'}"


def test_names_of_folders_need_not_be_utf_8(tmp_path, capsys):
    one, other = (write_run(tmp_path / os.fsdecode(name), facts={}, video_steps=(40,)) for name in (b"\xff", b"b"))
    main([str(one)])
    assert capsys.readouterr().out == f"wrote {tmp_path}/\\udcff/report.html\n"
    main([str(one), str(other), "--output_file", str(tmp_path / "all.html")])
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert 'href="%FF/report.html"' in page and 'href="%FF/validation/step-40/' in page


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "RUN: nowhere has no metrics.jsonl; pass the --output_dir of a run"),
        (["one", "--output_file", "a.pdf"], "--output_file: a.pdf must end in .html"),
        (["one", "--output"], "--output: unknown flag; did you mean --output_file?"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, error):
    write_run(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert error in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))
