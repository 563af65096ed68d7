"""The screenshots of a report that the docs show: both themes, a phone, the slider. Needs a Chromium.

python analysis/report_screenshots.py docs/reports/lenet5_mnist.html docs/images
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def main(page: Path, folder: Path) -> None:
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        for name, width, height, scheme in (
            ("light", 1100, 2150, "light"),
            ("dark", 1100, 2150, "dark"),
            ("phone", 390, 1500, "light"),
        ):
            shown = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme
            ).new_page()
            shown.goto(page.absolute().as_uri())
            if name == "phone":
                shown.locator("#decision").scroll_into_view_if_needed()
            shown.screenshot(path=folder / f"report_{name}.png")
        shown = browser.new_context(viewport={"width": 1000, "height": 900}, color_scheme="light").new_page()
        shown.goto(page.absolute().as_uri())
        shown.locator("#sizes-slider").press("PageUp")
        shown.locator("#sizes").screenshot(path=folder / "report_sizes.png")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
