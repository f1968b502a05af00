"""The report in a browser: it draws, searches, and asks nobody for anything, whatever its documents hold."""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import report_data

from matryoshka import page

playwright = pytest.importorskip("playwright.sync_api", reason="not installed: playwright")
SCREENSHOTS = Path(__file__).parents[2] / "runs" / "screenshots"  # left behind for whoever wants to look
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")

Scheme = Literal["light", "dark"]


@dataclass
class Visit:
    """A page in the browser, and everything that it did which a report must not do."""

    view: Any
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.view.on("request", lambda request: self.asked.append(request.url))
        self.view.on("console", lambda message: self.complaints.append(message.text))
        self.view.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.view.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))


class Browser:
    """Opens reports."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium
        self._contexts: list[Any] = []

    def open(self, path: Path, width: int = 1280, scheme: Scheme = "light", *, with_scripts: bool = True) -> Visit:
        own = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "java_script_enabled": with_scripts}
        self._contexts.append(self._chromium.new_context(**own))
        visit = Visit(self._contexts[-1].new_page())
        visit.watch()
        visit.view.goto(path.as_uri())
        if with_scripts:
            visit.view.wait_for_selector("html[data-drawn]")
        return visit

    def close_pages(self) -> None:
        while self._contexts:
            self._contexts.pop().close()


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with playwright.sync_playwright() as api:
        chromium = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Browser(chromium)
        chromium.close()


@pytest.fixture
def browser(running: Browser) -> Iterator[Browser]:
    yield running
    running.close_pages()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("full"), report_data.report(60))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("hostile"), report_data.report(60, report_data.HOSTILE))


def _write(folder: Path, report: dict[str, Any]) -> Path:
    path = folder / "report.html"
    path.write_text(page.render(report), "utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_drawn_at_every_width_in_both_schemes_without_sideways_scrolling(
    browser: Browser, full: Path, width: int, scheme: Scheme
) -> None:
    visit = browser.open(full, width, scheme)
    marks = visit.view.evaluate(
        "[...document.querySelectorAll('.chart')].map((chart) => chart.querySelectorAll('svg .role-mark > *').length)"
    )
    assert len(marks) == 16
    assert min(marks) > 0
    assert visit.view.evaluate("document.documentElement.scrollWidth") <= width
    edges = visit.view.evaluate(
        "[...document.querySelectorAll('.chart svg')].map((chart) => chart.getBoundingClientRect().right)"
    )
    assert max(edges) <= width
    paper = visit.view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 384) == (scheme == "dark")
    assert (visit.asked, visit.complaints) == ([full.as_uri()], [])
    visit.view.screenshot(path=SCREENSHOTS / f"sample-{width}-{scheme}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_of_a_run_is_drawn_from_its_own_folder_and_asks_nobody(
    browser: Browser, finished_pipeline: Path, width: int, scheme: Scheme
) -> None:
    path = finished_pipeline / page.HTML
    visit = browser.open(path, width, scheme)
    assert visit.view.locator(".chart svg").count() == visit.view.locator(".chart").count() > 0
    assert visit.view.locator("h1").inner_text()
    assert (visit.asked, visit.complaints) == ([path.as_uri()], [])
    visit.view.screenshot(path=SCREENSHOTS / f"run-{width}-{scheme}.png", full_page=True)


def test_documents_with_scripts_and_odd_characters_do_no_harm(browser: Browser, hostile: Path) -> None:
    visit = browser.open(hostile)
    view = visit.view
    view.locator("details.extreme summary").first.click()
    view.locator("#figure-map-after svg .mark-symbol.role-mark path").first.hover()
    view.wait_for_selector("#vg-tooltip-element.visible")
    view.locator("#question").fill("onerror")
    view.keyboard.press("Enter")
    assert "onerror" in view.locator("#answer h3").inner_text()
    for select in view.locator("select").all():
        select.select_option(index=1)
    assert view.evaluate("window.harmed === undefined && document.querySelectorAll('img, iframe, main script').length === 0")
    assert (visit.asked, visit.complaints) == ([hostile.as_uri()], [])


def test_a_query_is_found_and_shown_by_keyboard_alone(browser: Browser, full: Path) -> None:
    view = browser.open(full).view
    view.locator("#question").focus()
    view.keyboard.type("treated asthma")
    assert view.locator("#found").inner_text() == "1 of 60 queries of the sample"
    assert view.locator("#question").get_attribute("aria-expanded") == "true"
    view.keyboard.press("ArrowDown")
    assert view.locator("#question").get_attribute("aria-activedescendant") == "suggestion-0"
    view.keyboard.press("Enter")
    assert view.locator("#suggestions").is_hidden()
    assert view.locator("#answer h3").inner_text() == "How is asthma treated? (case 6)"
    assert view.locator("#answer .column h5").all_inner_texts() == [f"{dim} dims" for dim in report_data.DIMS]
    assert view.locator("#answer .column").first.locator(".relevant .mark").all_inner_texts() == [
        "✓ relevant, grade 2",
        "✓ relevant",
    ]
    steps = view.locator("#answer .funnel li").all_inner_texts()
    assert "40 dropped" in steps[1]
    assert "1 of 2 relevant kept, 1 lost here" in steps[1]
    view.keyboard.press("ArrowDown")
    view.keyboard.press("Escape")
    assert view.locator("#suggestions").is_hidden()


def test_of_thousands_of_relevant_documents_all_are_counted_and_those_shown_are_marked(browser: Browser, full: Path) -> None:
    view = browser.open(full).view
    view.locator("#question").fill("(case 59)")
    view.keyboard.press("Enter")
    assert view.locator("#answer > p").first.inner_text() == "2,000 relevant documents."
    first = view.locator("#answer .column").first
    assert first.locator(".quiet").inner_text() == "2 of 2,000 relevant found"
    assert first.locator(".relevant").count() == 2
    assert "2 of 2,000 relevant kept, 1,998 lost here" in view.locator("#answer .funnel li").first.inner_text()


def test_the_scheme_can_be_switched_and_charts_follow(browser: Browser, full: Path) -> None:
    view = browser.open(full, scheme="light").view
    before = view.locator("#figure-layers-moved .mark-rect.role-mark path").first.get_attribute("fill")
    view.get_by_role("button", name="Switch to dark colours").click()
    view.wait_for_selector("html[data-drawn=dark]")
    assert view.locator("#figure-layers-moved .mark-rect.role-mark path").first.get_attribute("fill") != before
    assert view.get_by_role("button", name="Switch to light colours").is_visible()


def test_a_chosen_metric_is_drawn_and_stays_when_the_scheme_changes(browser: Browser, full: Path) -> None:
    view = browser.open(full).view
    figure = view.locator("#figure-quality")
    spot = figure.locator(".mark-symbol.role-mark path").first
    before = spot.get_attribute("transform")
    figure.get_by_label("Metric").select_option("Success@1")
    playwright.expect(spot).not_to_have_attribute("transform", before)
    chosen = spot.get_attribute("transform")
    view.emulate_media(color_scheme="dark")
    view.wait_for_selector("html[data-drawn=dark]")
    assert figure.locator(".mark-symbol.role-mark path").first.get_attribute("transform") == chosen


def test_one_document_is_pointed_at_in_both_maps(browser: Browser, full: Path) -> None:
    view = browser.open(full).view
    view.locator("#figure-map-before svg .mark-symbol.role-mark path").nth(5).hover(force=True)
    for side in ("before", "after"):
        view.wait_for_selector(f"#figure-map-{side} .mark-symbol.role-mark path[opacity='1']")


def test_tables_are_sorted_by_their_headings_and_taken_away_as_csv(browser: Browser, hostile: Path) -> None:
    view = browser.open(hostile).view
    table = view.locator("[data-table=comparisons]")
    gains = table.locator("tbody tr td:nth-child(6)")
    for order, direction in ((True, "descending"), (False, "ascending")):
        table.get_by_role("button", name="gain").click()
        values = [float(text.replace("\N{MINUS SIGN}", "-")) for text in gains.all_inner_texts()]
        assert values == sorted(values, reverse=order)
        assert table.locator("th:nth-child(6)").get_attribute("aria-sort") == direction
    with view.expect_download() as download:
        view.locator("#every-query").get_by_role("button", name="Download CSV").click()
    lines = Path(download.value.path()).read_text("utf-8-sig")
    assert lines.startswith("query,base,tuned,bm25,change,id")
    assert "'=HYPERLINK" in lines
    assert '"=HYPERLINK' not in lines


def test_every_query_can_be_filtered_and_turned_over(browser: Browser, full: Path) -> None:
    place = browser.open(full).view.locator("#every-query")
    assert place.locator("[role=status]").inner_text() == "1 to 25 of 60"
    place.get_by_role("button", name="Next").click()
    assert place.locator("[role=status]").inner_text() == "26 to 50 of 60"
    place.get_by_label("Filter queries by words").fill("asthma treated")
    assert place.locator("tbody tr").count() == 1
    place.get_by_label("Filter queries by words").fill("no such words")
    assert place.locator("[role=status]").inner_text() == "No query has these words."


def test_everything_has_a_name_and_the_keyboard_reaches_the_report_at_once(browser: Browser, full: Path) -> None:
    view = browser.open(full).view
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.textContent") == "Skip to the report"
    view.keyboard.press("Enter")
    assert view.evaluate("document.activeElement.id") == "main"
    assert (
        view.get_by_role("main").count(),
        view.get_by_role("navigation").count(),
        view.get_by_role("heading", level=1).count(),
    ) == (1,) * 3
    named = (
        "(all) => all.every((own) => own.ariaLabel || own.labels?.length || own.textContent.trim() || own.ariaLabelledByElements)"
    )
    for role in ("button", "combobox", "link", "region", "table", "img", "searchbox"):
        assert view.get_by_role(role).evaluate_all(named), role
    levels = view.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5')].map((own) => Number(own.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_without_scripts_every_number_is_still_there(browser: Browser, full: Path) -> None:
    visit = browser.open(full, with_scripts=False)
    assert visit.view.locator("[data-table=quality] tbody tr").count() == len(report_data.report(60)["rows"])
    assert visit.asked == [full.as_uri()]
