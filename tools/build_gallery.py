"""Make the pictures of ``docs/gallery.md``: ``python tools/build_gallery.py``.

Synthetic scans go through the commands that a user would give, and what these write is shown: the
gallery holds nobody's scan. Takes some minutes, the packages of ``make install`` and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from scipy import ndimage
from scipy.spatial.transform import Rotation

from wmh_lora.data.synthesis import demo_case
from wmh_lora.volume import Volume, write_nifti

TARGET = Path(__file__).parents[1] / "docs" / "images" / "gallery"

SEEDS = (45, 52, 46, 35, 22)  # thick slices, from 8 to 54 mL

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# WebGL 2 in software, on machines without a graphics card; the sandbox needs rights that
# containers do not give.
_BROWSER_OPTIONS = (
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
)
_PATIENCE_MS = 120_000
_COLOURS = 256


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="keep scans and results in this folder")
    parser.add_argument(
        "--again", action="store_true", help="take the results of --work, and make pictures alone"
    )
    given = parser.parse_args()
    if given.again and given.work is None:
        parser.error("--again needs the folder of --work")
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        if not given.again:
            make_results(work)
        draw_pictures(work)


def make_results(work: Path) -> None:
    """Make the scans, and run the commands of the gallery on them."""
    write_scans(work)
    first, second = "scans/sub-01_FLAIR.nii.gz", "visits/sub-01_ses-2_FLAIR.nii.gz"
    command(work, "segment", "scans", "-o", "results")
    command(work, "segment", first, "-o", "views", "--tta", "flip")
    folders = ("--prediction", "results", "--reference", "references", "--images", "scans")
    command(work, "evaluate", *folders, "-o", "evaluation")
    command(work, "longitudinal", first, second, "-o", "changes")


def draw_pictures(work: Path) -> None:
    """Keep what the commands drew, and what their pages look like."""
    TARGET.mkdir(parents=True, exist_ok=True)
    page = work / "views" / "sub-01_wmh.html"
    with chromium() as browser:
        keep("page", screenshot(browser, page, 1280, 1424))
        keep("page-narrow", screenshot(browser, page, 400, 1900))
        keep("cohort", screenshot(browser, work / "results" / "wmh.html", 1280))
    figures = work / "evaluation" / "figures"
    keep("montage", Image.open(work / "views" / "sub-01_wmh.png"))
    keep("change", Image.open(work / "changes" / "sub-01_longitudinal.png"))
    keep("errors", Image.open(figures / "predictions.png"))
    keep("agreement", Image.open(figures / "bland_altman.png"), width=700)


def write_scans(work: Path) -> None:
    """Write the scans with their references, and a second visit of the first one."""
    for number, seed in enumerate(SEEDS, start=1):
        image, affine, reference = demo_case(seed)
        volume = Volume(image, affine)
        write(work / "scans" / f"sub-{number:02d}_FLAIR.nii.gz", image, volume)
        write(work / "references" / f"sub-{number:02d}_mask.nii.gz", reference, volume)
    image, affine, reference = demo_case(SEEDS[0])
    write(work / "visits" / "sub-01_ses-2_FLAIR.nii.gz", *second_visit(image, affine, reference))


def second_visit(
    image: NDArray[np.float32], affine: NDArray[np.float64], reference: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], Volume]:
    """Let the head move and its lesions grow, and put a new one where there was none."""
    volume = Volume(image, affine)
    bright = np.percentile(image[reference == 1], 60)
    spacing = np.array(volume.spacing_mm)
    distance = ndimage.distance_transform_edt(reference == 0, sampling=spacing)
    grown = distance < 1.5
    centre = deepest_tissue(image, spacing, away=distance)
    place = np.indices(image.shape).reshape(3, -1).T
    radius = np.linalg.norm((place - centre) * spacing, axis=1).reshape(image.shape)
    lesion = ndimage.gaussian_filter((grown | (radius < 6.0)).astype(np.float32), 0.5)
    later = image * (1 - lesion) + np.maximum(image, bright) * lesion
    movement = np.eye(4)
    movement[:3, :3] = Rotation.from_euler("xyz", [4.0, -3.0, 5.0], degrees=True).as_matrix()
    movement[:3, 3] = [3.0, -4.0, 5.0]
    later = later.astype(np.float32)
    return later, Volume(later, movement @ affine)


def deepest_tissue(
    image: NDArray[np.float32], spacing: NDArray[np.float64], *, away: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Voxel that lies deepest in even tissue, at least 25 mm from any lesion."""
    smooth = ndimage.gaussian_filter(image, 2.0 / spacing)
    inside = smooth[image > 0]
    level = np.median(inside)
    even = np.abs(smooth - level) < 0.08 * level
    depth = ndimage.distance_transform_edt(even & (away > 25.0), sampling=spacing)
    return np.array(np.unravel_index(int(depth.argmax()), image.shape))


def write(path: Path, data: NDArray[np.generic], volume: Volume) -> None:
    """Write an image, replacing an earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, data, volume, overwrite=True)


def command(work: Path, name: str, *words: str) -> None:
    """Run ``wmh-lora`` in the working folder."""
    line = [sys.executable, "-m", "wmh_lora", name, *words, "--overwrite"]
    subprocess.run(line, cwd=work, check=True)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the system's browser; nothing is downloaded."""
    path = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        raise SystemExit(f"no browser found ({', '.join(_BROWSERS)}): apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_BROWSER_OPTIONS))
        yield browser
        browser.close()


def screenshot(browser: Browser, page_file: Path, width: int, height: int = 0) -> Image.Image:
    """Picture of a page, or of its upper part, as it is when everything is in place."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(_PATIENCE_MS)
    page.goto(page_file.resolve().as_uri())
    if page.locator("#canvas").count():
        page.wait_for_selector("html[data-viewer=ready]", state="attached")
        page.locator("tr[data-focus]").first.click()
        page.locator("#show-uncertainty").scroll_into_view_if_needed()
        page.evaluate("() => window.scrollTo(0, 0)")
        page.wait_for_timeout(1000)
    data = page.screenshot(full_page=True)
    page.close()
    picture = Image.open(io.BytesIO(data))
    return picture.crop((0, 0, width, min(height or picture.height, picture.height)))


def keep(name: str, picture: Image.Image, width: int = 1000) -> None:
    """Write a picture as a small PNG."""
    picture = picture.convert("RGB")
    if picture.width > width:
        height = round(picture.height * width / picture.width)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    # by octree, which keeps the few pixels of an overlay in their colour
    small = picture.quantize(_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    path = TARGET / f"{name}.png"
    small.save(path, optimize=True)
    sys.stdout.write(f"{path}: {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
