"""A page contains everything that it shows, and nothing in it can act."""

from markupsafe import Markup

from browser import visit
from common.hub_token import HubToken
from pages import parts
from pages.page import Section, render_page, write_page
from pages.parts import code, figure, paragraph, table


def test_text_of_any_place_is_escaped():
    script = "<script>alert('clip')</script>"
    content = [paragraph(script), table([script], [[script]], script), code(script), script]
    page = render_page(script, [Section(script, content)], lead=script)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;clip&#39;)") == 12


def test_a_page_names_no_other_place_and_allows_no_request():
    page = render_page("A page", [Section("One", [paragraph("text")])])
    assert "://" not in page
    assert "url(" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_top_links_to_the_sections_that_have_content():
    page = render_page(
        "A page", [Section("One", [paragraph("a")]), Section("Empty", [Markup()]), Section("Two", ["b"])]
    )
    assert '<a href="#section-2">Two</a>' in page
    assert '<h2 id="section-2">Two</h2>' in page
    assert "Empty" not in page


def test_a_page_is_written_without_tokens_and_with_names_that_are_not_utf8(tmp_path):
    HubToken("not-for-any-page")
    name = b"caf\xe9.mp4".decode(errors="surrogateescape")
    write_page(
        tmp_path / "new" / "page.html", render_page("A page", [Section(name, ["--hub_token not-for-any-page"])])
    )
    (file,) = (tmp_path / "new").iterdir()
    assert "--hub_token (hidden)" in file.read_text(encoding="utf-8")
    assert r"caf\udce9.mp4" in file.read_text(encoding="utf-8")


def test_templates_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts.TEMPLATES.cache.clear()
    assert "<h1>Far away</h1>" in render_page("Far away", [])


def test_a_video_in_a_page_plays(browser, demo_clips, tmp_path):
    clip = sorted((demo_clips / "videos").iterdir())[0].read_bytes()
    write_page(tmp_path / "page.html", render_page("A page", [Section("One", [figure([clip], title="A clip")])]))
    with visit(browser, tmp_path / "page.html") as opened:
        opened.page.locator("video").evaluate("video => video.play()")
        opened.page.wait_for_function("document.querySelector('video').currentTime > 0")
        assert opened.errors == []
