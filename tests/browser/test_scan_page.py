"""The page of a scan in a real browser: quiet, complete, and usable with and without a mouse."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Request

from tests.reported_scans import full_report, segmented_head
from wmh_lora.report.html import scan_html
from wmh_lora.volume import Volume

pytestmark = pytest.mark.browser

LOAD_MS = 120_000  # software rendering on a busy machine
WIDE, NARROW = 1280, 400


@dataclass
class Watched:
    """A page, and everything that it said or asked for."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def console(self, message: ConsoleMessage) -> None:
        # reading back pixels, as screenshots do, is slow in software and the driver says so
        if "GPU stall due to ReadPixels" not in message.text:
            self.messages.append(f"{message.type}: {message.text}")

    def request(self, request: Request) -> None:
        if not request.url.startswith("data:"):
            self.requests.append(request.url)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    segmentation = segmented_head(folder)
    target = folder / "sub-01_wmh.html"
    target.write_text(scan_html(segmentation, full_report(segmentation)), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def oblique(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the same head, scanned at an angle."""
    segmentation = segmented_head()
    turn = np.eye(4)
    turn[:3, :3] = [[0.96, 0.28, 0.0], [-0.28, 0.96, 0.0], [0.0, 0.0, 1.0]]
    volume = Volume(segmentation.volume.data, turn @ segmentation.volume.affine)
    tilted = replace(segmentation, volume=volume)
    target = tmp_path_factory.mktemp("oblique") / "oblique_wmh.html"
    target.write_text(scan_html(tilted, full_report(tilted)), encoding="utf-8")
    return target


def opened(browser: Browser, path: Path, width: int, scheme: str = "light") -> Watched:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page.set_default_timeout(LOAD_MS)
    watched = Watched(page)
    page.on("console", watched.console)
    page.on("pageerror", lambda error: watched.messages.append(f"uncaught: {error}"))
    page.on("request", watched.request)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-viewer]", state="attached", timeout=LOAD_MS)
    settle(page)
    return watched


@pytest.fixture(scope="module")
def watched(browser: Browser, path: Path) -> Iterator[Watched]:
    """The page at desktop width; the tests below leave it in any state."""
    found = opened(browser, path, WIDE)
    yield found
    found.page.close()


@pytest.fixture
def page(watched: Watched) -> Page:
    watched.page.locator("#reset").click()
    settle(watched.page)
    return watched.page


WINDOW = ("level", "width")


def settle(page: Page) -> None:
    """Wait for two frames: one colours the volumes, the next shows them."""
    page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    page.wait_for_timeout(100)


def canvas(page: Page) -> NDArray[np.int16]:
    """What the viewer shows, (rows, columns, 3)."""
    settle(page)
    with Image.open(io.BytesIO(page.locator("#canvas").screenshot())) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)


def orange(pixels: NDArray[np.int16]) -> int:
    """Pixels that are clearly redder than blue: lesions, in a grey picture."""
    return int(np.count_nonzero(pixels[..., 0] - pixels[..., 2] > 40))


def place(page: Page) -> str:
    return page.locator("#place").inner_text()


def slice_number(page: Page) -> str:
    return page.locator("#slice-value").inner_text()


def test_is_silent_and_fetches_nothing(watched: Watched, path: Path) -> None:
    assert watched.page.locator("html").get_attribute("data-viewer") == "ready"
    assert watched.messages == []
    assert watched.requests == [path.as_uri()]


def test_shows_the_scan(page: Page) -> None:
    page.locator("#crosshair").uncheck()
    page.locator("#show-mask").uncheck()
    pixels = canvas(page)
    tissue = (pixels.min(axis=-1) > 60) & (np.ptp(pixels, axis=-1) < 12)
    assert tissue.mean() > 0.1
    assert pixels.std() > 20


def test_shows_and_hides_the_overlays(page: Page) -> None:
    page.locator("#crosshair").uncheck()
    with_mask = canvas(page)
    assert orange(with_mask) > 100
    page.locator("#show-mask").uncheck()
    bare = canvas(page)
    assert orange(bare) == 0
    for name in ("probability", "uncertainty", "ventricles"):
        page.locator(f"#show-{name}").check()
        changed = np.abs(canvas(page) - bare).max(axis=-1) > 20
        assert changed.sum() > 100, name
        page.locator(f"#show-{name}").uncheck()
    assert np.array_equal(canvas(page), bare)


def test_letters_keep_off_the_edges(page: Page) -> None:
    page.locator("#crosshair").uncheck()
    pixels = canvas(page).max(axis=-1)[1:-1, 1:-1]  # the outermost may show the page as well
    row, column = (n // 2 for n in pixels.shape)
    across, down = pixels[row - 10 : row + 10], pixels[:, column - 10 : column + 10].T
    for band in (across, down):
        for letter, edge in ((band[:, :16], band[:, :2]), (band[:, -16:], band[:, -2:])):
            assert letter.max() > 150
            assert edge.max() < 60


def test_opacity_and_window_change_the_picture(page: Page) -> None:
    page.locator("#crosshair").uncheck()
    first = canvas(page)
    page.locator("#opacity-mask").fill("10")
    faint = canvas(page)
    assert orange(faint) < orange(first)
    page.locator("#level").fill(page.locator("#level").get_attribute("max") or "")
    assert canvas(page).mean() < faint.mean()


def test_level_and_window_follow_a_box_drawn_on_the_picture(page: Page) -> None:
    def told() -> tuple[float, ...]:
        return tuple(float(page.locator(f"#{name}-value").inner_text()) for name in WINDOW)

    def set_to() -> tuple[float, ...]:
        return tuple(float(page.locator(f"#{name}").input_value()) for name in WINDOW)

    before = told()
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down(button="right")
    page.mouse.move(x + 40, y + 40, steps=4)
    page.mouse.up(button="right")
    settle(page)
    assert told() != before
    step = float(page.locator("#level").get_attribute("step") or "nan")
    np.testing.assert_allclose(set_to(), told(), atol=step)
    drawn = canvas(page)
    page.locator("#width").press("ArrowRight")
    assert np.abs(canvas(page) - drawn).mean() < 5.0  # no jump back


def test_a_row_moves_the_crosshair_to_its_lesion(page: Page) -> None:
    rows = page.locator("tr[data-focus]")
    assert rows.count() == 2
    for number in (1, 0):
        row = rows.nth(number)
        row.click()
        focus = [float(mm) for mm in str(row.get_attribute("data-focus")).split()]
        shown = place(page)
        for name, mm in zip(("right", "anterior", "superior"), focus):
            assert f"{name} {mm:.0f}" in shown
        assert "probability 0.90" in shown
        assert "current" in str(row.get_attribute("class"))


def test_finds_lesions_of_an_oblique_scan(browser: Browser, oblique: Path) -> None:
    page = opened(browser, oblique, WIDE).page
    for number in (1, 0):
        page.locator("tr[data-focus]").nth(number).click()
        assert "probability 0.90" in place(page)
    page.close()


def test_planes_change_the_picture_and_the_slices(page: Page) -> None:
    seen = {}
    for plane in ("axial", "coronal", "sagittal", "multi"):
        page.locator(f"input[value={plane}]").check(force=True)
        seen[plane] = canvas(page).tobytes()
        assert slice_number(page).split(" of ")[1] not in ("", "1")
    assert len(set(seen.values())) == 4


def test_keys_walk_through_slices_and_lesions(page: Page) -> None:
    page.locator("#canvas").focus()
    before = int(slice_number(page).split()[0])
    page.keyboard.press("ArrowUp")
    assert int(slice_number(page).split()[0]) == before + 1
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert int(slice_number(page).split()[0]) == before - 1
    page.keyboard.press("Home")
    assert int(slice_number(page).split()[0]) == 1
    page.keyboard.press("ArrowRight")
    assert page.locator("tr.current th").inner_text() == "2"
    page.keyboard.press("ArrowLeft")
    assert page.locator("tr.current th").inner_text() == "1"
    page.keyboard.press("m")
    assert not page.locator("#show-mask").is_checked()


def test_the_wheel_changes_the_slice_once_the_picture_is_chosen(page: Page) -> None:
    page.locator("#canvas").click()
    before = slice_number(page)
    page.mouse.wheel(0, 120)
    settle(page)
    assert slice_number(page) != before


def test_tab_reaches_every_control_and_shows_where_it_is(page: Page) -> None:
    page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
    page.locator("h1").click()
    reached, unseen = set(), set()
    for _ in range(80):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(
            """() => {
              const e = document.activeElement;
              const seen = e.type === "radio" ? e.nextElementSibling : e;
              const style = getComputedStyle(seen);
              return [e.id || e.className || e.name || e.tagName,
                      style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
            }"""
        )
        if name == "BODY":
            break
        reached.add(name)
        if not outlined:
            unseen.add(name)
    expected = {"canvas", "slice", "level", "width", "crosshair", "reset", "plane", "goto", "sort"}
    overlays = ("mask", "probability", "uncertainty", "ventricles")
    expected |= {f"{kind}-{name}" for kind in ("show", "opacity") for name in overlays}
    assert expected <= reached
    assert unseen == set()


def test_lesions_are_walked_with_arrows_and_sorted_by_heads(page: Page) -> None:
    rows = page.locator("tr[data-focus] th")
    page.locator("tr[data-focus] button").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("() => document.activeElement.textContent") == "2"
    assert page.locator("tr.current th").inner_text() == "2"
    head = page.locator("button.sort", has_text="mL").first
    head.click()
    assert rows.all_inner_texts() == ["2", "1"]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("mL")
    head.click()
    assert rows.all_inner_texts() == ["1", "2"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_fits_its_window(
    browser: Browser, path: Path, pictures: Path, width: int, scheme: str
) -> None:
    watched = opened(browser, path, width, scheme)
    page = watched.page
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    inside = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(e =>
             !e.closest(".scroll, .pan, svg, .sr, select") &&
             e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert inside == []
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    level = sum(int(part) for part in background[4:-1].split(",")) / 3
    assert level > 200 if scheme == "light" else level < 60
    page.screenshot(path=pictures / f"scan-{width}-{scheme}.png", full_page=True)
    assert watched.messages == []
    page.close()


def test_prints_without_the_viewer(page: Page, pictures: Path) -> None:
    page.emulate_media(media="print")
    try:
        assert not page.locator("#canvas").is_visible()
        assert page.locator("img.montage").is_visible()
        assert page.locator("#lesion-table").is_visible()
        page.screenshot(path=pictures / "scan-print.png", full_page=True)
    finally:
        page.emulate_media(media="screen")


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("HTMLCanvasElement.prototype.getContext = () => null;", "no WebGL 2"),
        ("delete window.DecompressionStream;", "too old"),
    ],
)
def test_says_so_where_the_viewer_cannot_run(
    browser: Browser, path: Path, removed: str, words: str
) -> None:
    page = browser.new_page()
    page.add_init_script(removed)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-viewer=missing]", state="attached", timeout=LOAD_MS)
    assert words in page.locator("#fallback").inner_text()
    assert not page.locator("#canvas").is_visible()
    assert page.locator("img.montage").is_visible()
    page.locator("tr[data-focus]").nth(1).click()  # the table works on its own
    assert page.locator("tr.current th").inner_text() == "2"
    page.close()


def test_reads_without_scripts(browser: Browser, path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert "needs JavaScript" in page.locator("#fallback").inner_text()
    assert page.locator("img.montage").is_visible()
    context.close()
