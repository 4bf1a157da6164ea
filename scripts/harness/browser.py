"""Drive ComfyUI's own page in a real Chromium."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from playwright.sync_api import Page as BrowserPage

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]  # root in a container has no sandbox
NO_BROWSER = (
    "There is no Chromium here: none of " + ", ".join(CHROMIUM_NAMES) + " on PATH, and none of Playwright's own. "
    "Install one, or Playwright's with `python -m playwright install chromium` in the tests' environment, or leave the "
    "browser tests out with `make test BROWSER=0`."
)

# The page's settings before the first visit: no tutorial, nothing restored, nothing in the picture but the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.UseNewMenu": "Top",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Workflow.Persist": False,
    # Text of nodes is drawn at any zoom.
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}

# Newer frontends (1.45, 1.49) then load a graph of their own, which would take the place of a test's.
READY = """types => !!(window.app?.extensionManager && window.app.graph && window.app.vueAppReady !== false
    && (window.__COMFYUI_FRONTEND_VERSION__?.split('.')[1] < 40 || window.app.extensionManager.workflow.activeWorkflow)
    && types.every(type => window.LiteGraph?.registered_node_types[type]))"""

STATE = """() => JSON.stringify({
    nodes: app.graph.nodes.map(node => ({
        id: String(node.id), type: node.type, title: node.title, errors: !!node.has_errors,
        missing: !LiteGraph.registered_node_types[node.type],
        widgets: Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value])),
    })),
    links: [...app.graph.links.values()].length,
})"""

PREVIEW = "video-preview"  # an input once the video is loaded (1.49); the server has no such one

INFO = "button[aria-label^='Info for ']"
UNFOLDED = f"{INFO}, [data-testid='error-card-copy']"

ONLY_GRAPH = "* { visibility: hidden } canvas, .dom-widget, .dom-widget * { visibility: visible !important }"

FITS = 5  # tries to see the whole graph: a node still grows when its video comes
GRAPH_BOX = """() => { const {scale, offset} = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect()
    const nodes = app.graph.nodes, title = 40, margin = 20
    const left = Math.min(...nodes.map(n => n.pos[0])) - margin
    const top = Math.min(...nodes.map(n => n.pos[1])) - margin - title
    const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + margin
    const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + margin
    return [canvas.x + (left + offset[0]) * scale, canvas.y + (top + offset[1]) * scale,
            (right - left) * scale, (bottom - top) * scale] }"""

# The view glides there: until ten frames have shown it at rest.
FIT = """async () => {
    await app.extensionManager.command.execute('Comfy.Canvas.FitView')
    const frame = () => new Promise(requestAnimationFrame)
    const view = () => `${app.canvas.ds.scale} ${app.canvas.ds.offset}`
    for (let before = null, resting = 0; resting < 10; before = view()) {
        await frame()
        resting = view() === before ? resting + 1 : 0
    } }"""

# Listens before it queues. The result of app.queuePrompt() is no signal: frontend 1.32 answers false for an accepted
# workflow, later ones true. A rejected one starts nothing, so it is caught where the page posts it.
RUN = """limit => new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no end of execution within ${limit} ms`)), limit)
    const end = (kind, detail) => { clearTimeout(timer); resolve(JSON.stringify({kind, detail})) }
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(kind, event => end(kind, event.detail), {once: true})
    const post = app.api.queuePrompt
    app.api.queuePrompt = async function (...args) {
        try { return await post.apply(this, args) }
        catch (error) { end('rejected', error.response ?? String(error)); throw error }
        finally { app.api.queuePrompt = post }
    }
    app.queuePrompt(0).catch(() => {})
})"""


def find_chromium() -> str | None:
    """Path of a Chromium: one on PATH, or the one that `playwright install chromium` has put in place."""
    for name in CHROMIUM_NAMES:
        if path := shutil.which(name):
            return path
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if os.access(path, os.X_OK) else None


def write_settings(base: Path, **more: Any) -> None:
    """Give the page of a server its settings; call before the server starts. base: the server's base folder."""
    target = base / "user" / "default" / "comfy.settings.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**SETTINGS, **more}))


class Page:
    """ComfyUI's page. errors: uncaught exceptions of its scripts. failed: (status, address) of requests that failed."""

    def __init__(self, page: BrowserPage, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self.failed: list[tuple[int, str]] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", lambda r: self.failed.append((r.status, r.url)) if r.status >= 400 else None)

    def open(self, *types: str, timeout: float = 60_000) -> Page:
        """Visit the server's page and wait (ms) until it knows the given node types."""
        self.page.goto(self.url, wait_until="domcontentloaded", timeout=timeout)
        self.page.wait_for_function(READY, arg=list(types), timeout=timeout)
        return self

    def clear(self) -> None:
        """An empty graph, and nothing left of what went wrong before."""
        self.page.evaluate("() => app.graph.clear()")
        self.page.wait_for_function("() => !document.querySelector('.dom-widget, video')")
        self.errors.clear()
        self.failed.clear()

    def load(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Load a UI-format workflow, fit it into the view and return `state()`."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        return self.state()

    def fit(self) -> None:
        """Have the view show the whole graph."""
        self.page.evaluate(FIT)

    def load_api(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Load an API-format workflow and return it in UI format."""
        self.page.evaluate("workflow => app.loadApiJson(workflow, 'from api')", workflow)
        return dict(json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())")))

    def state(self) -> dict[str, Any]:
        """{"nodes": [{id, type, title, errors, missing, widgets}], "links": count} of the graph that is shown."""
        return dict(json.loads(self.page.evaluate(STATE)))

    def to_api(self) -> dict[str, Any]:
        """The graph that is shown, in API format, without titles and what the page adds for itself."""
        script = "async () => JSON.stringify((await app.graphToPrompt()).output)"
        nodes: dict[str, Any] = json.loads(self.page.evaluate(script))
        for node in nodes.values():
            node["inputs"].pop(PREVIEW, None)
        return {key: {name: node[name] for name in ("class_type", "inputs")} for key, node in nodes.items()}

    def warnings(self) -> list[str]:
        """What the page warns a person with: a dialog in frontend 1.32, an overlay in later ones."""
        texts = self.page.locator("text=/missing (node|model)/i").all_inner_texts()
        return [text for text in texts if text.strip()]

    def run(self, timeout: float = 60_000) -> dict[str, Any]:
        """Queue the graph and wait (ms) for its end: {"kind": "execution_success" | "rejected" | ..., "detail"}."""
        return dict(json.loads(self.page.evaluate(RUN, timeout)))

    def unfold_error(self) -> None:
        """Have all of an error shown: newer pages (1.49) keep it behind "View details" and an info button."""
        details = self.page.get_by_test_id("error-overlay-see-errors")
        details.or_(self.page.get_by_role("dialog")).first.wait_for()
        if details.count():
            details.click()
            self.page.locator(UNFOLDED).first.wait_for()
            for button in self.page.locator(INFO).all():
                button.click()

    def error_is_unfolded(self) -> bool:
        return self.page.locator(UNFOLDED).count() > 0

    def picture(self, target: Path) -> None:
        """Screenshot of the graph without the page around it, as the suffix of `target` says (.jpg or .png)."""
        style = self.page.add_style_tag(content=ONLY_GRAPH)
        view = self.page.viewport_size
        assert view is not None
        for _ in range(FITS):
            self.fit()
            x, y, width, height = self.page.evaluate(GRAPH_BOX)
            if y + height <= view["height"]:
                break
        self.page.screenshot(path=target, clip={"x": x, "y": y, "width": width, "height": height})
        style.evaluate("style => style.remove()")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium. Raises FileNotFoundError where there is none."""
    path = find_chromium()
    if not path:
        raise FileNotFoundError(NO_BROWSER)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Browser, url: str, *, width: int = 1600, height: int = 900, **options: Any) -> Iterator[Page]:
    """The server's page in a browser context of its own. options: more for `Browser.new_context`."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    try:
        yield Page(context.new_page(), url).open()
    finally:
        context.close()
