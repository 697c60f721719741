"""Draw the mermaid diagrams of ``docs/`` as SVG pictures in ``docs/images/diagrams/``, for the documentation site.

``python scripts/draw_diagrams.py`` draws those that have no picture yet and removes pictures of diagrams that are gone.
It needs Chromium and its driver, and npm, which brings mermaid itself. A code host draws the diagrams by itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from site_hooks import DIAGRAMS, ROOT, diagram_name

MERMAID = "mermaid@11.17.2"
#: Colours are those of the site's theme, light and dark.
CSS = """
.node rect, .node path { fill: var(--md-code-bg-color) !important; stroke: var(--md-accent-fg-color) !important; }
.cluster rect { fill: none !important; stroke: var(--md-default-fg-color--light) !important; }
.nodeLabel, .cluster-label, .edgeLabel, .edgeLabel p { color: var(--md-typeset-color) !important; }
.edgeLabel, .edgeLabel p, .labelBkg { background: var(--md-default-bg-color) !important; }
.flowchart-link { stroke: var(--md-default-fg-color--light) !important; }
.marker { fill: var(--md-default-fg-color--light) !important; stroke: none !important; }
"""
LOAD = "document.head.append(Object.assign(document.createElement('script'), {textContent: arguments[0]}))"
DRAW = """
const [id, source, css, done] = arguments;
mermaid.initialize({startOnLoad: false, theme: "neutral", themeCSS: css, fontFamily: "inherit"});
mermaid.render(id, source).then(drawn => done(drawn.svg), error => done("error: " + error));
"""


def mermaid_script() -> str:
    """Return mermaid's code for browsers, from its npm package."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", MERMAID], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (package,) = Path(folder).glob("*.tgz")
        with tarfile.open(package) as files:
            script = files.extractfile("package/dist/mermaid.min.js")
            assert script is not None
            return script.read().decode()


def main() -> int:
    """Draw; see the module's docstring."""
    sources = [
        source
        for page in sorted((ROOT / "docs").glob("*.md"))
        for source in re.findall(r"^```mermaid\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ]
    wanted = {diagram_name(source): source.strip() for source in sources}
    DIAGRAMS.mkdir(exist_ok=True)
    for old in {path.name for path in DIAGRAMS.iterdir()} - wanted.keys():
        (DIAGRAMS / old).unlink()
    lacking = {name: source for name, source in wanted.items() if not (DIAGRAMS / name).exists()}
    if lacking:
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox"):
            options.add_argument(argument)
        with webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver"))) as browser:
            browser.execute_script(LOAD, mermaid_script())
            for name, source in lacking.items():
                drawn = browser.execute_async_script(DRAW, f"diagram-{name[:-4]}", source, CSS)
                if not drawn.startswith("<svg"):
                    sys.exit(f"{drawn}\n{source}")
                drawn = re.sub(r' data-[a-z]+="[^"]*"', "", re.sub(r"(\d\.\d)\d+", r"\1", drawn))  # a third of the size
                (DIAGRAMS / name).write_text(drawn + "\n", encoding="utf-8")
    print(f"{len(wanted)} diagrams, {len(lacking)} of them drawn now.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
