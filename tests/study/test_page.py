"""The page that `report` writes: one file, whatever a study has found, that opens without a network."""

import json
import re
from html.parser import HTMLParser

import pytest

from deit_ray.commands.report import data_pictures
from deit_ray.results.folders import REPORT
from deit_ray.study.page import Picture, is_page, make_page
from deit_ray.study.story import tell
from deit_ray.study.study import Study
from tests.study.test_story import STUDIES
from tests.support.commands import call

DRAWN = {  # figures that are drawn; the others are sentences
    "no trial": 0,
    "a trial runs": 2,  # curves and timeline
    "one finished": 2,
    "two finished, no images": 4,  # a slice and parallel coordinates too
    "only failures": 1,
    "stopped early": 2,
    "every kind of value": 2 + 1 + 4 + 3 + 1,  # importances, slices, contours
    "very many": 2 + 1 + 10 + 3 + 1,
}


class Page(HTMLParser):
    """What a page holds.

    Attributes:
        tags: of each kind, the attributes.
        texts: without scripts and styles.
        scripts: the contents of script elements.
        open: tags that were not closed.
    """

    def __init__(self, content: bytes):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(content.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kind = self.open[-1] if self.open else ""
        if kind == "script":
            self.scripts.append(data)
        elif kind != "style":
            self.texts.append(data)

    @property
    def figures(self) -> list[dict]:
        """The figures, as plotly gets them."""
        return [json.loads(script) for script in self.scripts if script.startswith("{")]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize("case", STUDIES)
def test_every_study_has_a_whole_page(make_told, case):
    trials, ended, _ = STUDIES[case]
    content = make_page(tell(make_told(trials, ended)), [Picture("What it sees", "its data are gone")])
    assert is_page(content)
    page = Page(content)
    assert page.open == []
    assert len(page.figures) == DRAWN[case]
    sentences = page.text.count("This figure needs") + len(
        re.findall("No trial has|Importances need", page.text)
    )
    assert sentences >= 6 - DRAWN[case]
    assert [script.count("plotly.js v") > 0 for script in page.scripts].count(True) == 1
    linked = [attributes.get("src") or attributes.get("href") for _, attributes in page.tags]
    assert [link for link in linked if link and not link.startswith("data:")] == []
    for figure in page.figures:
        axes = [figure["layout"][axis] for axis in ("xaxis", "yaxis")]
        drawn = [axis for axis in axes if axis.get("visible", True) and "ticktext" not in axis]
        assert all("text" in axis["title"] for axis in drawn)
        assert "Objective Value" not in json.dumps(figure)
    assert "its data are gone" in page.text
    for trial in trials[:3]:
        assert str(trial.number) in page.text


def test_the_curves_mark_early_stops_and_the_titles_say_what_to_see(make_told):
    trials, ended, _ = STUDIES["stopped early"]
    page = Page(make_page(tell(make_told(trials, ended))))
    assert "Trial 0 learned most: val/top1 0.5000. 2 trials stopped early." in page.text
    curves = page.figures[0]["data"]
    (marks,) = [trace for trace in curves if trace["mode"] == "markers"]
    assert (marks["x"], marks["y"], marks["marker"]["symbol"]) == ([5, 5], [0.25, 0.125], "x")
    kinds, ended, _ = STUDIES["every kind of value"]
    page = Page(make_page(tell(make_told(kinds, ended))))
    assert "augment.cutmix: False or True in the best 5 trials" in page.text
    assert "data.views: 1 to 3 in the best 5 trials" in page.text


def test_report_writes_a_page_with_pictures_and_keeps_a_persons_file(finished_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--results", finished_study.results]
    (tmp_path / "short-1.html").write_text("mine")
    for kept in (True, False):
        ended = call("report", "short", *options)
        assert ended.status == 0, ended
        assert ended.out == "short-1.html: open it in a browser\n"
        assert ("it is kept as short-1.html.kept-1" in ended.err) == kept
    assert (tmp_path / "short-1.html.kept-1").read_text() == "mine"
    page = Page((tmp_path / "short-1.html").read_bytes())
    pictures = [found for tag, found in page.tags if tag == "img"]
    assert len(pictures) == 2
    assert all(picture["src"].startswith("data:image/jpeg;base64,/9j/") for picture in pictures)
    assert sum(len(picture["src"]) for picture in pictures) < 1e6
    assert "4 images as stored" in page.text
    board = Study.open("short-1", str(finished_study.results)).leaderboard()
    assert f"Best: trial {board['trial'][0]}, val/top1_ema {board['best'][0]:.4f}" in page.text
    assert is_page((finished_study.folder / REPORT).read_bytes())  # as MLflow has it


def test_pictures_of_data_that_are_gone_are_sentences(experiment, tmp_path):
    gone = experiment("digits_student", {"distillation.kind": "none"}).with_overrides(
        {"data.uri": f"{tmp_path}/gone"}
    )
    for picture in data_pictures(gone):
        assert picture.jpeg is None
        assert picture.note.startswith("It cannot be drawn here: ")
        assert f"{tmp_path}/gone" in picture.note
