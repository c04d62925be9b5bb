"""Two lessons as a reader meets them: in JupyterLab, in a browser, with a slider to move and a token to point at.

    pip install -e ".[lessons,browser]" and Chromium; then: pytest -m browser tests/test_lessons_in_browser.py

JupyterLab runs on a copy, under settings of its own, so neither the checkout nor the reader's configuration changes.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (  # no sandbox for root in a container, no graphics card, and nothing that the browser fetches for itself
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 300  # seconds; a quiet machine needs a tenth of it
SETTINGS = {  # JupyterLab would ask whether it may fetch news, and look for a newer version of itself
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


class Reader:
    """A browser with one lesson open, and what a reader would complain about: errors, and calls to the outside."""

    def __init__(self, browser: Any, address: str, notebook: Path) -> None:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        self.cells = sum(cell["cell_type"] == "code" for cell in content["cells"])
        self.expect = pytest.importorskip("playwright.sync_api").expect
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": 1200, "height": 900})
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("console", lambda message: self._errors(message))
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._outside(request.url))
        self.page.on("websocket", lambda connection: self._outside(connection.url))
        self.page.goto(address.format(notebook=notebook.name))
        self.page.get_by_text(re.compile(r"Python 3 .*\| Idle")).wait_for()

    def _errors(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text} at {message.location}")

    def _outside(self, url: str) -> None:
        place = urlsplit(url)
        if place.scheme not in ("data", "blob") and place.hostname != "127.0.0.1":
            self.complaints.append(f"asked for {url}")

    def run_all_cells(self) -> None:
        """By the menu; returns when no cell waits any longer, be it that an error stopped them."""
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        self.expect(prompts).to_have_count(self.cells)  # long notebooks are built bit by bit
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.expect(prompts.first).not_to_have_text("[ ]:")
        self.expect(prompts.filter(has_text="*")).to_have_count(0)
        assert prompts.all_text_contents() == [f"[{count}]:" for count in range(1, self.cells + 1)], self.errors()
        assert self.errors() == []

    def outline_under_the_pointer(self, token: Any) -> str:
        """The outline's style; tried again when the token slid away while the page found its height."""
        for _ in range(50):
            token.hover()
            self.page.wait_for_timeout(200)
            under, style = token.evaluate("e => [e.matches(':hover'), getComputedStyle(e).outlineStyle]")
            if under:
                return style
        raise AssertionError("the token never stayed under the pointer")

    def errors(self) -> list[str]:
        kinds = (f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in ("error", "stderr"))
        return self.page.locator(",".join(kinds)).all_text_contents()


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the lessons without outputs, so that whatever is shown was made here."""
    folder = tmp_path_factory.mktemp("lab") / "lessons"
    shutil.copytree(ROOT / "lessons", folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    for path in folder.glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell.update(execution_count=None, outputs=[])
        path.write_text(json.dumps(notebook), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lab(lessons: Path) -> Iterator[str]:
    """A running JupyterLab → the address of a notebook in it."""
    pytest.importorskip("jupyterlab", reason="needs the lessons extra")
    room = lessons.parent
    for name, value in SETTINGS.items():
        path = room / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # the figures belong in the page
    env |= {f"JUPYTER_{kind}_DIR": str(room / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(room / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(room / "workspaces")}
    env |= {"IPYTHONDIR": str(room / "ipython"), "PYTHONPATH": str(ROOT)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(8)
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={lessons}",
        "--LabApp.extension_manager=readonly",  # the other one asks PyPI for extensions
    ]
    log = room / "lab.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "jupyter", "lab", *options]
        server = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=room)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, log)
            yield f"http://127.0.0.1:{port}/lab/tree/{{notebook}}?token={token}&reset"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the browser extra")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the PATH")
    api.expect.set_options(timeout=PATIENCE * 1000)
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


def test_a_slider_in_a_lesson_redraws_its_figure(browser: Any, lab: str, lessons: Path):
    reader = Reader(browser, lab, lessons / "07_noisy_top_k_gating.ipynb")
    reader.run_all_cells()
    widget = reader.page.locator(".jp-OutputArea-child:has(.widget-slider)")
    figure, slider = widget.locator("img"), widget.locator(".widget-slider").first
    before = figure.get_attribute("src")
    # By a key, which finds the handle wherever the page has scrolled it.
    slider.get_by_role("slider").press("ArrowLeft")
    reader.expect(slider.locator(".widget-readout")).to_have_text("0.90")
    reader.expect(figure).not_to_have_attribute("src", before)
    assert reader.complaints == []


def test_a_token_under_the_pointer_names_its_experts(browser: Any, lab: str, lessons: Path):
    reader = Reader(browser, lab, lessons / "00_start_here.ipynb")
    reader.run_all_cells()
    text = reader.page.get_by_role("group", name="Text coloured by expert")
    token = text.locator("pre span").nth(6)
    assert reader.outline_under_the_pointer(token) == "solid"
    reader.expect(token).to_have_attribute("title", re.compile(r"^L0: \d \d+% \d \d+%\nL1: \d \d+% \d \d+%$"))

    colours = "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
    first = text.locator("pre span").evaluate_all(colours)
    text.get_by_text("layer 1", exact=True).click()
    second = text.locator("pre span").evaluate_all(colours)
    assert first != second
    assert min(len(set(first)), len(set(second))) > 2
    assert reader.complaints == []
