"""Report pages as a reader meets them: in headless Chromium, without a network."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import pytest

import starmerge_models as sm
from starmerge_models.evaluation.evaluation import Evaluation
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.study.averages import Averages
from starmerge_models.study.page import (
    Chart,
    Copy,
    KeyFigure,
    KeyFigures,
    Notes,
    Page,
    Provenance,
    Section,
    Table,
    Text,
    write_page,
)
from starmerge_models.study.page.charts import curves, dots, heat_map
from starmerge_models.study.page.choice import choice_page
from starmerge_models.study.page.evaluation import evaluation_page
from starmerge_models.study.page.inspection import inspection_page
from starmerge_models.study.page.study import study_page
from tests.study.drawn import ADVERSARIAL, choice, evaluation_of, frames
from tests.study.inspection.adapters import renamed, write_adapters
from tests.study.studies import written_store

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright"
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install --no-install-recommends chromium"
)

EVIL = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'>"
"""A name that would run a script if a page took it for HTML."""

RECIPE = "base: a/b\nmodels: [c, d]\nmethod: star\n"
ETAS = (10, 40, 90)


@dataclass
class Seen:
    """A page that is open, and what went wrong while it was."""

    page: "playwright.Page"
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


Opening = Callable[..., Seen]


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox is not to be had as root.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def _opening(browser: "playwright.Browser") -> Iterator[Opening]:
    contexts = []

    def run(file: Path, *, width: int = 1200, **options: object) -> Seen:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, offline=True, **options
        )
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.set_default_timeout(10_000)
        seen.page.on("pageerror", lambda error: seen.faults.append(str(error)))
        seen.page.on("console", lambda message: seen.faults.append(message.text))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            seen.page.wait_for_selector("html[data-ready]")
            charts = seen.page.locator(".chart").count()
            seen.page.wait_for_function(f"document.querySelectorAll('.saving').length == {charts}")
        return seen

    yield run
    for context in contexts:
        context.close()


@pytest.fixture
def opened(browser: "playwright.Browser") -> Iterator[Opening]:
    with _opening(browser) as run:
        yield run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a part of each kind."""
    scores = pd.DataFrame(
        {
            "model": ["star", "average", "auto", "base"],
            "family": ["spectral", "linear", "spectral", "none"],
            "score": [0.5, 0.123, float("nan"), -0.25],
            "low": [0.4, 0.1, float("nan"), -0.5],
            "high": [0.6, 0.2, float("nan"), 0.0],
            "rows": [9, 10, 100, 8],
        }
    )
    many = pd.DataFrame({"number": range(60), "word": [f"w{n}" for n in range(60)]})
    shown = scores.rename(columns={"model": "label", "score": "value"}).assign(row="past")
    averages, runs = frames([("star", {"eta": eta}, n, [0.5, 0.6]) for eta in ETAS for n in (2, 4)])
    pairs = pd.DataFrame(
        [{"a": a, "b": b, "cosine": 1.0 if a == b else -0.5} for a in "xy" for b in "xy"]
    )
    table = Table(
        scores,
        "Scores of models",
        intervals={"score": ("low", "high")},
        formats={"score": ".2f"},
        choices=("family",),
    )
    page = Page(
        "A plain page",
        "With all that a page can hold",
        [
            Section(
                "Words",
                [
                    Text("Some *words* and `code`."),
                    Notes(["A note"]),
                    KeyFigures([KeyFigure("star", "0.5", "of 1", "#0072B2")]),
                ],
            ),
            Section("Tables", [table, Table(many, "Many rows")]),
            Section(
                "Charts",
                [
                    Chart(dots(shown), "Dots", "A dot for each model."),
                    Chart(curves(averages, "eta", runs=runs), "Curves", "Two curves."),
                    Chart(heat_map(pairs, "a", "b", "cosine", diverging=True), "Heat", "Cells."),
                ],
            ),
            Section(
                "Files",
                [Copy("A recipe", RECIPE), Provenance({"models": {"star": {"path": "m/star"}}})],
            ),
        ],
    )  # fmt: skip
    file = tmp_path_factory.mktemp("page") / "plain.html"
    write_page(page, file)
    return file


@pytest.fixture(scope="module")
def shared(browser: "playwright.Browser", plain: Path) -> Iterator[Seen]:
    """The same page, opened once for tests that leave it as it was."""
    with _opening(browser) as run:
        yield run(plain, permissions=["clipboard-read", "clipboard-write"])


def _cells(seen: Seen, caption: str, column: int) -> list[str]:
    rows = seen.page.locator(f"table:has(caption:text-is('{caption}')) tbody tr")
    return rows.evaluate_all(f"rows => rows.map(row => row.cells[{column}].innerText)")


def _shows(seen: Seen, caption: str, column: int, expected: list[str]) -> bool:
    """Wait until a column has the expected cells: DataTables draws a little later."""
    end = time.monotonic() + 5
    while _cells(seen, caption, column) != expected and time.monotonic() < end:
        seen.page.wait_for_timeout(20)
    assert _cells(seen, caption, column) == expected
    return True


def test_the_page_loads_without_network_and_says_what_it_is(plain: Path, shared: Seen) -> None:
    seen = shared
    assert seen.faults == []
    assert seen.requests == [plain.as_uri()]
    assert seen.page.title() == "A plain page"
    assert seen.page.locator("html").get_attribute("lang") == "en"
    assert seen.page.locator(".chart svg").count() == 3
    assert plain.stat().st_size < 2_000_000
    # Another script than the page's own does not run, whoever put it there.
    seen.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.broken = 1'}))"
    )
    assert seen.page.evaluate("window.broken") is None
    assert "Content Security Policy" in seen.faults.pop()
    assert seen.faults == []


def test_tables_are_sorted_by_click_and_by_key(plain: Path, opened: Opening) -> None:
    seen = opened(plain)
    caption = "Scores of models"
    table = seen.page.locator(f"table:has(caption:text-is('{caption}'))")
    assert _shows(seen, caption, 0, ["star", "average", "auto", "base"])
    score = table.locator("thead th").nth(2)
    score.click()
    numbers = ["0.50 [0.40, 0.60]", "0.12 [0.10, 0.20]", "−0.25 [−0.50, 0.00]", "–"]
    assert _shows(seen, caption, 2, numbers)
    score.click()
    assert _shows(seen, caption, 0, ["auto", "base", "average", "star"])

    rows = table.locator("thead th").nth(3)
    seen.page.locator("input[type=search]").first.focus()
    for _ in range(10):
        seen.page.keyboard.press("Tab")
        if rows.locator(":focus").count():
            break
    seen.page.keyboard.press("Enter")
    assert _shows(seen, caption, 3, ["100", "10", "9", "8"])
    assert rows.get_attribute("aria-sort") == "descending"
    seen.page.keyboard.press("Space")
    assert _shows(seen, caption, 3, ["8", "9", "10", "100"])
    assert seen.faults == []


def test_tables_are_filtered_by_words_and_by_choice(shared: Seen) -> None:
    seen = shared
    caption = "Scores of models"
    seen.page.get_by_label(f"Filter: {caption}").fill("spectral 0.5")
    assert _shows(seen, caption, 0, ["star"])
    seen.page.get_by_label(f"Filter: {caption}").fill("")
    choice = seen.page.get_by_label(f"family: {caption}")
    assert choice.locator("option").all_inner_texts() == ["all", "spectral", "linear", "none"]
    choice.select_option("spectral")
    assert _shows(seen, caption, 0, ["star", "auto"])
    choice.select_option("all")
    assert _shows(seen, caption, 0, ["star", "average", "auto", "base"])
    assert _shows(seen, "Many rows", 0, [str(number) for number in range(25)])
    seen.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert _shows(seen, "Many rows", 0, [str(number) for number in range(60)])
    assert seen.page.locator("details").evaluate("details => details.open")
    seen.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert _shows(seen, "Many rows", 0, [str(number) for number in range(25)])
    assert not seen.page.locator("details").evaluate("details => details.open")


def test_charts_tell_their_numbers_and_follow_choices(shared: Seen) -> None:
    seen = shared
    dot = seen.page.locator("figure:has(figcaption:text-is('Dots')) .mark-symbol path").first
    dot.hover(force=True)
    tip = seen.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    for text in ("past", "star", "0.500", "0.400", "0.600", "spectral"):
        assert text in tip.inner_text()
    drawing = seen.page.locator("figure:has(figcaption:text-is('Dots')) .chart")
    assert drawing.get_attribute("role") == "graphics-document"
    assert drawing.get_attribute("aria-label") == "A dot for each model."
    assert dot.get_attribute("aria-label").startswith("score: 0.5; row: past; label: star")
    with seen.page.expect_download() as waiting:
        seen.page.get_by_role("button", name="Save as SVG: Dots").click()
    assert waiting.value.suggested_filename == "chart.svg"
    assert Path(waiting.value.path()).read_text().startswith("<svg")
    assert seen.faults == []


def test_the_theme_is_the_systems_until_it_is_chosen(plain: Path, opened: Opening) -> None:
    seen = opened(plain, color_scheme="dark")
    button = seen.page.get_by_role("button", name="Dark theme")

    def colours() -> list[str]:
        return seen.page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, "
            "getComputedStyle(document.querySelector('.chart svg text')).fill]"
        )

    dark = colours()
    assert button.get_attribute("aria-pressed") == "true"
    button.press("Enter")
    light = colours()
    assert button.get_attribute("aria-pressed") == "false"
    assert light[0] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))
    button.click()
    assert colours() == dark
    seen.page.emulate_media(media="print")
    assert colours() == light
    assert not seen.page.get_by_role("navigation").is_visible()


def test_readers_by_ear_and_keyboard_find_their_way(plain: Path, opened: Opening) -> None:
    page = opened(plain).page
    for role in ("banner", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1, role
    assert page.get_by_role("navigation", name="Contents").count() == 1
    assert page.get_by_role("heading", level=1).all_inner_texts() == ["A plain page"]
    titles = ["Words", "Tables", "Charts", "Files"]
    assert page.get_by_role("heading", level=2).all_inner_texts() == titles
    for title in titles:
        assert page.get_by_role("region", name=title, exact=True).count() == 1
    # Each table has a caption and heads of columns and rows; each figure, list, field and region
    # that scrolls a name, and the keyboard reaches it.
    tables = "[...document.querySelectorAll('table')]"
    assert page.evaluate(f"{tables}.every(t => t.caption.textContent.trim())")
    assert page.evaluate(f"{tables}.every(t => t.querySelector('th[scope=col]'))")
    assert page.get_by_role("rowheader", name="star", exact=True).count() == 1
    for kind in ("figure", "button", "searchbox", "combobox"):
        for element in page.get_by_role(kind).all():
            assert element.aria_snapshot().split('"')[1:2], f"a {kind} without a name"
    for element in page.locator(".scroll, .dt-layout-table").all():
        assert element.get_attribute("role") == "region"
        assert element.get_attribute("aria-label")
        assert element.get_attribute("tabindex") == "0"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_text("Provenance", exact=True).first.press("Enter")
    assert page.get_by_role("cell", name="m/star").is_visible()


def test_recipes_are_copied(shared: Seen) -> None:
    page = shared.page
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.locator("#status[role=status]").inner_text() == "Copied."
    assert page.evaluate("navigator.clipboard.readText()") == RECIPE


def test_without_javascript_the_tables_stand_there_whole(plain: Path, opened: Opening) -> None:
    seen = opened(plain, java_script_enabled=False)
    assert len(_cells(seen, "Many rows", 0)) == 60
    assert not seen.page.get_by_role("button").all()


def _with_responses(score: Score) -> Score:
    answered = [replace(one, response=f"{EVIL} {one.id}") for one in score.predictions]
    return replace(score, predictions=tuple(answered))


def _evil_evaluation() -> Evaluation:
    names = ("base", EVIL, ADVERSARIAL[0], ADVERSARIAL[2], "star")
    tasks = (EVIL, "task")
    found = evaluation_of(
        {name: dict.fromkeys(tasks, 0.1 + 0.05 * n) for n, name in enumerate(names)},
        dict.fromkeys(tasks[1:], 0.9),
    )
    scores = {
        model: {task: _with_responses(score) for task, score in own.items()}
        for model, own in found.scores.items()
    }
    return replace(found, scores=scores)


def test_names_and_responses_are_text_whatever_they_hold(tmp_path: Path, opened: Opening) -> None:
    file = tmp_path / "evil.html"
    page = evaluation_page(
        _evil_evaluation(), title=EVIL, remarks=[EVIL], commands={EVIL: f"merge {EVIL}"}
    )
    write_page(page, file)
    seen = opened(file, width=400)
    assert seen.faults == []
    assert seen.requests == [file.as_uri()]
    assert seen.page.evaluate("window.broken") is None
    assert seen.page.locator("img").count() == 0
    assert seen.page.title() == EVIL
    assert seen.page.get_by_role("heading", level=1).inner_text() == EVIL
    search = seen.page.get_by_label("Filter: Answers of the models")
    search.fill("script")
    head = seen.page.locator("table:has(caption:text-is('Answers of the models')) thead th").nth(4)
    head.click()
    seen.page.locator(".mark-symbol path").first.hover(force=True)
    seen.page.locator("#vg-tooltip-element.visible").wait_for()
    assert seen.page.locator("#vg-tooltip-element img").count() == 0
    assert seen.page.evaluate("window.broken") is None

    # On a narrow screen what is wide scrolls in its place, and nothing else does.
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 400
    caption = seen.page.locator("caption", has_text="Scores by task and model")
    wide = seen.page.locator(".dt-layout-table", has=caption)
    assert wide.evaluate("e => e.scrollWidth > e.clientWidth + 100 && e.clientWidth <= 400")
    assert seen.page.locator(".figures > div").first.bounding_box()["width"] <= 400


def _choice_page(_: Path, __: pytest.TempPathFactory) -> Page:
    return choice_page(choice(), title="A choice")


def _study_page(_: Path, factory: pytest.TempPathFactory) -> Page:
    return study_page(Averages(written_store(factory.mktemp("study") / "s")[1]))


def _inspection_page(base: Path, factory: pytest.TempPathFactory) -> Page:
    models = write_adapters(factory.mktemp("adapters"), base)
    found = sm.inspect(base, models, eta=90, methods=["average", "star"])
    return inspection_page(renamed(found, {"one": EVIL, "average": EVIL, "q_proj": EVIL}))


@pytest.mark.parametrize("made", [_choice_page, _study_page, _inspection_page])
def test_every_kind_of_page_is_drawn_without_a_fault(
    made: Callable[[Path, pytest.TempPathFactory], Page],
    tiny_base: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    opened: Opening,
) -> None:
    page = made(tiny_base, tmp_path_factory)
    write_page(page, tmp_path / "page.html")
    seen = opened(tmp_path / "page.html", width=400)
    for choice_of in seen.page.locator(".vega-bindings select").all():
        choice_of.select_option(index=1)
    assert seen.faults == []
    assert seen.requests == [(tmp_path / "page.html").as_uri()]
    assert seen.page.evaluate("window.broken") is None
    charts = [
        part for section in page.sections for part in section.parts if isinstance(part, Chart)
    ]
    assert seen.page.locator(".chart svg").count() == len(charts)
    marks = seen.page.locator(".chart").evaluate_all(
        "charts => charts.map(chart => chart.querySelectorAll('[role=graphics-symbol]').length)"
    )
    assert all(marks), "each chart draws something"
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 400


def test_specifications_cannot_leave_their_script(plain: Path) -> None:
    text = plain.read_text(encoding="utf-8")
    content = text.partition('<script type="application/json" id="charts">')[2]
    assert len(json.loads(content.partition("</script>")[0])) == 3
    assert text.count("<script") == text.count("</script>") == 3
