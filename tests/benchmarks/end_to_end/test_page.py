"""The results page in a real browser, opened from disk."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from benchmarks.reporting.page.data import read_tables
from benchmarks.reporting.page.write import write_page
from benchmarks.verdict.page import describe_answers

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the committed results."""
    target = tmp_path_factory.mktemp("page")
    write_page(ROOT / "results", target, describe_answers(ROOT / "results"))
    return target


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *quiet])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.errors, opened.requests = [], []
    opened.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on("request", lambda request: opened.requests.append(request.url))
    opened.goto((folder / "index.html").as_uri())
    opened.wait_for_selector("#chart-parameters svg")
    yield opened
    assert opened.errors == []
    opened.close()


def rows(page: Any, table: str = "board") -> list[list[str]]:
    return [text.split("\t") for text in page.locator(f"#{table} tbody tr").all_inner_texts()]


def column(page: Any, title: str) -> list[float]:
    titles = page.locator("#board thead th").all_inner_texts()
    cells = [row[titles.index(title)] for row in rows(page)]
    return [float(cell.split(" ")[0].replace(",", "")) for cell in cells if cell != "n/a"]


def test_the_page_is_small_and_asks_no_network(page: Any, folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5_000_000
    assert page.requests
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


def test_every_section_is_reached_from_the_top_and_has_content(page: Any) -> None:
    links = page.locator("header nav a").all()
    assert len(links) >= 10
    for link in links:
        section = page.locator(link.get_attribute("href"))
        assert section.count() == 1
        assert len(section.inner_text()) > 40


def test_the_leaderboard_is_sorted_by_the_mean_and_by_what_is_clicked(page: Any) -> None:
    assert column(page, "mean") == sorted(column(page, "mean"), reverse=True)
    page.locator("#board thead button", has_text="parameters").click()
    assert column(page, "parameters") == sorted(column(page, "parameters"))
    assert page.locator("#board th[aria-sort]", has_text="parameters").get_attribute("aria-sort") == "ascending"
    page.locator("#board thead button", has_text="parameters").click()
    assert column(page, "parameters") == sorted(column(page, "parameters"), reverse=True)


def test_the_keyboard_sorts_as_the_mouse_does(page: Any) -> None:
    page.locator("#board thead button", has_text="seeds").focus()
    page.keyboard.press("Enter")
    assert column(page, "seeds") == sorted(column(page, "seeds"))


def test_a_filter_of_sizes_leaves_what_is_small_enough(page: Any) -> None:
    everything = len(rows(page))
    page.fill("#size", "400000")
    assert 0 < len(rows(page)) < everything
    assert max(column(page, "parameters")) <= 400_000
    assert f"{len(rows(page))} of {everything}" in page.locator("#count").inner_text()


def test_the_order_survives_a_filter(page: Any) -> None:
    page.locator("#board thead button", has_text="parameters").click()
    page.fill("#name", "o")
    assert len(rows(page)) > 1
    assert all("o" in row[0] for row in rows(page))
    assert column(page, "parameters") == sorted(column(page, "parameters"))


def test_the_mean_is_over_the_chosen_tasks(page: Any) -> None:
    first = rows(page)[0][0]
    boxes = page.locator("#tasks input")
    names = [box.get_attribute("value") for box in boxes.all()]
    for box in boxes.all()[1:]:
        box.uncheck()
    titles = page.locator("#board thead th").all_inner_texts()
    (row,) = [row for row in rows(page) if row[0] == first]
    assert row[titles.index("mean")].split(" ")[0] == row[titles.index(names[0])]
    assert names[1] not in titles


def test_a_number_leads_to_its_record(page: Any) -> None:
    page.locator("#board tbody button").first.click()
    facts = page.locator("#record-facts").inner_text()
    paths = re.findall(r"results/\S+\.json", facts)
    assert paths
    assert "python -m benchmarks.run" in facts
    for path in paths:
        assert (ROOT / path).is_file()
    page.keyboard.press("Escape")
    assert not page.locator("#record").is_visible()


def test_six_questions_are_answered_above_the_leaderboard(page: Any) -> None:
    answers = page.locator("#questions dd").all()
    assert len(answers) == 6
    assert all(len(answer.inner_text()) > 20 for answer in answers)
    assert re.search(r"lora 0\b", page.locator("#answer-added").inner_text())
    shown = {row[0]: row for row in rows(page)}
    merges = page.locator("#board thead th").all_inner_texts().index("merges")
    assert (shown["lora"][merges], shown["ept"][merges], shown["mixlora"][merges]) == ("yes", "per task", "no")
    page.locator("#answer-record button").click()
    assert "results/" in page.locator("#record-facts").inner_text()
    page.keyboard.press("Escape")


def test_a_pair_of_methods_is_compared_with_one_choice(page: Any) -> None:
    def differences() -> list[float]:
        return [float(text) for text in re.findall(r": ([+-]\d+\.\d) ±", page.locator("#answer-pair").inner_text())]

    page.select_option("#first", "ept")
    page.select_option("#second", "moelora")
    found = differences()
    both = "(suite) => ['ept', 'moelora'].every((name) => suite.rows.some((row) => row.label === name))"
    assert len(found) == page.evaluate(f"PAGE.suites.filter({both}).length") > 0
    page.select_option("#first", "moelora")
    page.select_option("#second", "ept")
    assert differences() == [-value for value in found]


def test_evidence_of_a_suite_shows_that_suite(page: Any) -> None:
    links = page.locator("#verdict a[href='#pairs']")
    for number in range(links.count()):
        links.nth(number).click()
        shown = int(page.locator("#suite").input_value())
        assert page.evaluate(f"PAGE.suites[{shown}].folder").endswith(f"/{links.nth(number).inner_text()}")


def test_another_suite_brings_its_own_tasks_and_rows(page: Any) -> None:
    before = page.locator("#tasks").inner_text()
    page.select_option("#suite", index=1)
    assert page.locator("#tasks").inner_text() != before
    assert column(page, "mean") == sorted(column(page, "mean"), reverse=True)


def test_the_longest_runs_are_shown_first(page: Any) -> None:
    steps = page.evaluate("PAGE.suites.map((one) => one.steps)")
    assert steps == sorted(steps, reverse=True)
    assert len(steps) > 1


def test_a_chart_of_times_stands_only_where_steps_were_timed(page: Any) -> None:
    for number, timed in enumerate(
        page.evaluate("PAGE.suites.map((one) => one.rows.some((row) => row.step !== null))")
    ):
        page.select_option("#suite", index=number)
        assert page.locator("#chart-step").is_visible() == timed
        assert page.locator("#untimed").is_visible() != timed
        assert page.locator("#chart-parameters").is_visible()
        assert page.locator("#endpoint").inner_text() == page.evaluate(f"PAGE.suites[{number}].endpoint") != ""


def test_curves_are_drawn_over_steps_and_over_seconds(page: Any) -> None:
    page.wait_for_selector("#chart-curves svg")
    page.select_option("#curve-axis", "seconds")
    page.wait_for_selector("#chart-curves svg:has-text('seconds')")


def test_the_matrix_of_pairs_is_antisymmetric(page: Any) -> None:
    matrix = [row[1:] for row in rows(page, "matrix")]
    assert len(matrix) > 2
    for i, line in enumerate(matrix):
        assert line[i] == "-"
        for j in range(i):
            first, second = (float(cell.split(" ")[0]) for cell in (matrix[i][j], matrix[j][i]))
            assert first == -second


def test_the_csv_holds_what_is_shown(page: Any) -> None:
    page.fill("#name", "lora")
    address = page.locator("#csv").get_attribute("href")
    table = list(csv.reader(io.StringIO(unquote(address.partition(",")[2]))))
    assert table[0] == page.locator("#board thead th").all_inner_texts()
    assert sorted(line[0] for line in table[1:]) == sorted(row[0] for row in rows(page))


def test_dark_and_light_follow_the_reader(page: Any) -> None:
    def lightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    page.emulate_media(color_scheme="light")
    light = lightness()
    page.emulate_media(color_scheme="dark")
    assert lightness() < 200 < light


@pytest.mark.parametrize("width", [400, 1200])
def test_no_section_is_wider_than_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function("document.querySelector('#chart-parameters svg').getBoundingClientRect().width < innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_paper_shows_tables_and_no_controls(page: Any) -> None:
    page.emulate_media(media="print")
    assert not page.locator("header nav").is_visible()
    assert not page.locator("#filters").is_visible()
    assert page.locator("#board").is_visible()


def test_charts_say_what_they_show_and_a_table_says_the_same(page: Any) -> None:
    for chart in page.locator(".chart").all():
        assert len(chart.get_attribute("aria-label")) > 20
    details = page.locator("#costs details")
    details.locator("summary").click()
    assert len(rows(page, "table-costs")) == len(rows(page))


def test_tables_of_a_file_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "two.md"
    path.write_text(
        "### First\n\n| a | b |\n|:--|--:|\n| x \\| y | 1 |\n\n- note\n\n### Second\n\n| c |\n|:--|\n| 2 |\n"
    )
    first, second = read_tables(path)
    assert (first["title"], first["columns"], first["rows"], first["notes"]) == (
        "First",
        ["a", "b"],
        [["x | y", "1"]],
        ["note"],
    )
    assert second["rows"] == [["2"]]
