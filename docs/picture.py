"""Takes the picture of the README from a page of `nanopost inspect`: its first lesson, the score on the end token.

pip install -e ".[browser]"
python docs/picture.py out/inspect.html docs/inspect.png
"""

import os
import shutil
import sys
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def main(page: str, picture: str):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1240, "height": 512}, reduced_motion="reduce")
        window.goto(Path(page).resolve().as_uri())
        window.locator("#lessons button").first.click()
        window.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/picture.py PAGE PICTURE")
    main(*sys.argv[1:])
