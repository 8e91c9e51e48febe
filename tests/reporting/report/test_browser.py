"""The report in a headless Chromium: it opens, it asks for nothing, a click sorts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pimerge.reporting.report.gathering import gather
from pimerge.reporting.report.page import page
from tests.support.documents import EVIL

webdriver = pytest.importorskip("selenium.webdriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver, program = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or program is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def opened(browser: Any, reported: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report, open; what was logged is what it did."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page(gather(reported), reported), encoding="utf-8")
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(file.as_uri())
    return browser


def experts(opened: Any, section: str) -> list[str]:
    script = f"return [...document.querySelectorAll('#{section} tbody tr')].map(row => row.cells[1].textContent)"
    found: list[str] = opened.execute_script(script)
    return found


def test_it_opens_without_errors_and_without_requests(opened: Any) -> None:
    assert opened.title == "work & play · pimerge report"
    assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith(("file://", "data:")) for url in urls)
    assert opened.execute_script("return document.images[0].naturalWidth") == 9


def test_a_click_sorts_a_table_and_the_keyboard_turns_it(opened: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    header = opened.find_element(By.XPATH, "//section[@id='ranking']//th[.='combined']")
    button = header.find_element(By.TAG_NAME, "button")
    assert experts(opened, "ranking") == ["b", EVIL, "c", "d"]
    button.click()
    assert (experts(opened, "ranking"), header.get_attribute("aria-sort")) == (["c", "b", EVIL, "d"], "ascending")
    button.send_keys(Keys.ENTER)
    assert (experts(opened, "ranking"), header.get_attribute("aria-sort")) == ([EVIL, "b", "c", "d"], "descending")
    by_name = opened.find_element(By.XPATH, "//section[@id='ranking']//th[.='expert']/button")
    by_name.click()
    by_name.click()
    assert experts(opened, "ranking") == ["d", "c", "b", EVIL]
    assert header.get_attribute("aria-sort") == "none"


def test_it_fits_a_narrow_window(opened: Any) -> None:
    opened.set_window_size(500, 900)
    width, window = opened.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= window
    opened.set_window_size(1280, 1000)
