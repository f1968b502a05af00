import base64
import copy
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_data
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import report as report_job
from matryoshka import page, storage

REPORT = report_data.report(20)
KEYS = sorted(REPORT)


class Elements(HTMLParser):
    """The elements of a page, as a browser would see them: their names, their attributes, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._inside = tag if tag in self.raw else ""

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside].append(data)
        else:
            self.words.append(data)

    @property
    def data(self) -> Any:
        return json.loads(next(text for text in self.raw["script"] if text.startswith("{")))


@pytest.fixture(scope="module")
def hostile() -> tuple[str, Elements]:
    text = page.render(report_data.report(20, report_data.HOSTILE))
    return text, Elements(text)


def test_the_verdict_stands_on_top_with_three_numbers():
    words = [text.strip() for text in Elements(page.render(REPORT)).words if text.strip()]
    start, end = words.index("Fine-tune"), words.index("Is the gain real, and what did it cost elsewhere?")
    assert {"+0.156", "17.0 min", "\N{MINUS SIGN}83%"} <= set(words[start:end])
    assert not [text for text in words if text.startswith("Verdict:")]
    (said,) = (place for place, text in enumerate(words) if text.startswith("Upper half of the layers"))
    assert said > end  # with the model


@pytest.mark.parametrize(
    ("decision", "words"),
    [("do not bother", "Do not bother"), ("not enough evidence", "Not enough evidence"), ("wait <b>", "wait &lt;b&gt;")],
)
def test_each_verdict_is_in_words(decision: str, words: str):
    assert f"</span>{words}</h1>" in page.render({"verdict": {"decision": decision}})


def test_a_small_set_is_called_small():
    verdict = {"decision": "not enough evidence", "is_small": True, "num_queries": 20, "detectable_gain": 0.0812}
    assert "20 queries tell little. Only a true gain of 0.081 or more" in page.render({"verdict": verdict})
    assert "tell little" not in page.render({"verdict": {**verdict, "is_small": False}})


@settings(max_examples=12)
@given(missing=st.sets(st.sampled_from(KEYS)), empty=st.sets(st.sampled_from(KEYS)))
def test_any_part_of_a_report_may_be_missing_or_none(missing: set[str], empty: set[str]):
    report = {key: None if key in empty else value for key, value in REPORT.items() if key not in missing}
    elements = Elements(page.render(report))
    shown = {key for key in KEYS if report.get(key)}
    assert elements.names.count("h1") == 1
    assert ("evidence" in elements.data["figures"]) == ("verdict" in shown)
    assert ("quality" in elements.data["figures"]) == ("rows" in shown)


def _places(value: Any, *before: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the path to every value of a part of a report, of a list to the first and the last one."""
    if isinstance(value, dict | list | tuple):
        for key in value if isinstance(value, dict) else sorted({0, len(value) - 1} - {-1}):
            yield (*before, key)
            yield from _places(value[key], *before, key)


SMALL = json.loads(json.dumps(report_data.report(4)))
PLACES = sorted((place for place in _places(SMALL) if place[0] != "searches"), key=str)


@settings(max_examples=25, deadline=None)
@given(place=st.sampled_from(PLACES), how=st.sampled_from(["missing", "null", "empty"]))
def test_any_value_within_a_part_may_be_missing_or_null(place: tuple[Any, ...], how: str):
    part = {place[0]: copy.deepcopy(SMALL[place[0]])}
    holder: Any = part
    for key in place[:-1]:
        holder = holder[key]
    found = holder[place[-1]]
    if how == "missing":
        del holder[place[-1]]
    else:
        holder[place[-1]] = type(found)() if how == "empty" and isinstance(found, dict | list) else None
    assert Elements(page.render(part)).names.count("h1") == 1


def test_a_report_of_an_earlier_version_has_a_page():
    rows = [{"system": "base", "dim": 64, "metric": "nDCG@10", "value": 0.5}]
    elements = Elements(page.render({"title": "Old", "sentences": ["It is old."], "rows": rows, "models": [], "ranking": None}))
    assert list(elements.data["figures"]) == ["quality"]
    assert "It is old." in elements.words


def test_texts_of_documents_make_no_element_and_no_attribute(hostile: tuple[str, Elements]):
    plain = Elements(page.render(REPORT))
    assert hostile[1].names == plain.names
    assert hostile[1].attributes == plain.attributes
    assert not [name for name in plain.attributes if name.startswith("on") or name == "src"]


def test_what_scripts_read_is_json_that_ends_no_script_and_is_what_the_report_says(hostile: tuple[str, Elements]):
    text, elements = hostile
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert not set(data) & set("<>&\u2028\u2029")
    texts = [text.replace("\ud800", "?") for text in report_data.report(20, report_data.HOSTILE)["per_query"]["texts"]]
    assert elements.data["per_query"]["texts"] == texts


def test_numbers_that_are_none_and_halves_of_characters_can_be_written():
    rows = [{"system": "base", "dim": dim, "metric": "nDCG@10", "value": value} for dim, value in ((64, float("nan")), (32, 0.5))]
    text = page.render({"title": "half \ud800", "rows": rows})
    assert "half ?" in text.encode().decode()
    assert [row["dim"] for row in Elements(text).data["figures"]["quality"]["datasets"]["rows"]] == [32]


def test_the_policy_forbids_every_request_and_every_script_and_style_but_those_of_the_page(hostile: tuple[str, Elements]):
    text, elements = hostile
    policy = re.search('Content-Security-Policy" content="(.*?)"', text)
    assert policy
    assert policy[1].startswith("default-src &#39;none&#39;; ")
    scripts = [script for script in elements.raw["script"] if not script.startswith("{")]
    for own in (*scripts, *elements.raw["style"]):
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert digest.replace("+", "&#43;") in policy[1] or digest in policy[1]
    assert len(scripts) == 2
    assert "unsafe" not in policy[1]
    assert "style" not in elements.attributes


def test_ten_thousand_queries_make_less_than_five_megabytes():
    assert len(page.render(report_data.report(10_000)).encode()) < 5_000_000


def test_the_page_lies_beside_the_report_or_where_it_is_asked_for(tmp_path: Path):
    storage.publish_json(tmp_path / "report.json", {"title": "Here"})
    assert page.write(tmp_path) == tmp_path / "report.html"
    assert page.write(tmp_path, tmp_path / "other.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_a_folder_without_a_report_and_a_file_that_is_none_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"report\.json: cannot be read"):
        page.write(tmp_path)
    storage.publish_json(tmp_path / "report.json", [1])
    with pytest.raises(ValueError, match=r"report\.json: not a report \(found list\)\. Pass another folder\."):
        page.write(tmp_path)


def test_the_job_makes_the_page_of_a_folder(tmp_path: Path):
    storage.publish_json(tmp_path / "report.json", REPORT)
    settings = report_job.Settings(run=str(tmp_path), output=str(tmp_path / "mail" / "report.html"))
    report_job.run(settings)
    assert (tmp_path / "mail" / "report.html").read_text("utf-8") == page.render(REPORT)
