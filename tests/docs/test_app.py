"""The page on the app starts it with flags that exist, and shows where it listens."""

from doc_pages import flags_of, marked_blocks, noted_calls, read_page


PAGE = read_page("assets/docs/app.md")
BLOCKS = marked_blocks(PAGE)


def test_the_commands_start_the_app_and_forward_its_port(tmp_path, monkeypatch):
    (call,) = noted_calls(BLOCKS["start"], tmp_path)
    (tmp_path / "my-videos").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = flags_of(call)
    assert f"\nopen http://{flags.host}:{flags.port} (" in PAGE
    assert f"-L {flags.port}:{flags.host}:{flags.port} " in BLOCKS["forward"]
    assert BLOCKS.keys() == {"start", "forward"}
