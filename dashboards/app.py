"""The web app: `serve` runs it, `create_app` makes it. Pages are rendered on the server, from what `pages.py` says of them."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware

import fffsweep
from fffsweep.dashboards import formats, links, picking, report
from fffsweep.dashboards.choice import ChoiceError
from fffsweep.dashboards.figures import COLOURS, Figure
from fffsweep.dashboards.pages import PAGE_ROWS, PAGES, Query
from fffsweep.dashboards.queries import StudyView, disk_bytes, list_studies, load_study, stamp
from fffsweep.dashboards.security import FIELD, guard, is_loopback

_READ_AHEAD = 3  # studies
_TITLES = {"study": "Study", "pareto": "Pareto", "depth": "Depth and width", "training": "Training", "compare": "Compare"}
_TYPES = {
    "csv": "text/csv",
    "parquet": "application/vnd.apache.parquet",
    "json": "application/json",
    "latex": "text/plain",
    "markdown": "text/plain",
    "html": "text/html",
}


class Disk:
    """Bytes of each study's artifacts, counted aside: a large study has tens of thousands of manifests."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._known: dict[str, tuple[float, int]] = {}
        self._counting: set[str] = set()

    def bytes(self, view: StudyView) -> int | None:
        """The last count, None before the first; a newer one is begun if the study has changed since."""
        counted_at, num_bytes = self._known.get(view.name, (0.0, -1))
        if counted_at < view.updated_at and view.name not in self._counting:
            self._counting.add(view.name)
            self._pool.submit(self._count, view)
        return None if num_bytes < 0 else num_bytes

    def _count(self, view: StudyView) -> None:
        try:
            self._known[view.name] = (view.updated_at, disk_bytes(view))
        finally:
            self._counting.discard(view.name)


@dataclass(frozen=True)
class Elsewhere:
    """Addresses at which MLflow's and Optuna's own pages are served, None where it is not known."""

    mlflow: str | None = None
    optuna: str | None = None


def create_app(
    results: Path, study: str | None = None, token: str | None = None, read_only: bool = False, elsewhere: Elsewhere | None = None
) -> FastAPI:
    """The app over a results folder. `study`: the one that `/` leads to. `token`: demanded of every request if given."""
    results, elsewhere = Path(results), elsewhere or Elsewhere()
    elsewhere = Elsewhere(links.check_base(elsewhere.mlflow, "--mlflow-url"), links.check_base(elsewhere.optuna, "--optuna-url"))
    form_secret = None if read_only else secrets.token_urlsafe(24)
    app = FastAPI(title="fffsweep", docs_url=None, redoc_url=None, openapi_url=None)
    disk = Disk()

    def rendered(template: str, status: int = 200, **context: Any) -> HTMLResponse:
        shared: dict[str, Any] = {"version": fffsweep.__version__, "colours": COLOURS, "titles": _TITLES, "home": study}
        shared |= {"form_secret": form_secret, "form_field": FIELD, "elsewhere": elsewhere, "picking": False}
        return HTMLResponse(report.templates().get_template(template).render({**shared, **context}), status)

    def failed(title: str, message: str, status: int) -> HTMLResponse:
        return rendered("message.html", status, title=title, message=message, view=None, page="")

    def query_of(request: Request) -> Query:
        values: dict[str, list[str]] = {}
        for name, value in request.query_params.multi_items():
            values.setdefault(name, []).append(value)
        return Query(values)

    @app.get("/", response_class=HTMLResponse)
    def studies() -> Response:
        views, unreadable = [], []
        for name in list_studies(results):
            try:
                views.append(load_study(results, name))
            except ValueError as error:  # another version's, or damaged: the others are shown all the same
                unreadable.append(str(error))
        views.sort(key=lambda view: -view.updated_at)
        shown: dict[str, Any] = {"views": [(view, disk.bytes(view)) for view in views], "unreadable": unreadable, "results": results}
        return rendered("studies.html", view=None, page="studies", **shown)

    @app.get("/stamp")
    def stamped(study: str = "") -> Response:
        names = [study] if study else list_studies(results)
        return JSONResponse({"stamp": " ".join(stamp(results, name) for name in names)})

    @app.get("/results")
    def whole(request: Request, study: str, format: str = "csv") -> Response:
        if format not in _TYPES or format == "html":
            return failed("No such format", f"format {format!r}: expected one of {', '.join(formats.FORMATS[1:])}", 400)
        view = load_study(results, study)
        if format == "parquet":
            return _attachment(formats.parquet(view), format, f"{study}.parquet")
        out = io.StringIO()
        formats.print_results(view, format, out)
        return _attachment(out.getvalue().encode(), format, f"{study}.{format}")

    @app.get("/report")
    def written(study: str) -> Response:
        return _attachment(report.html(load_study(results, study)).encode(), "html", f"{study}.html")

    def drawn_on(view: StudyView, page: str, query: Query, slug: str) -> Figure:
        if page not in PAGES:
            raise ValueError(f"page {page!r}: expected one of {', '.join(PAGES)}")
        drawn: dict[str, Figure] = {item.slug: item for item in PAGES[page](view, query).get("figures", [])}
        if slug not in drawn:
            raise ValueError(f"figure {slug!r} of page {page}: expected one of {', '.join(drawn) or 'none, nothing has finished yet'}")
        return drawn[slug]

    @app.get("/table", response_class=HTMLResponse)
    def table(request: Request, study: str, page: str, figure: str, line: str = "0") -> Response:
        view, query = load_study(results, study), query_of(request)
        item = drawn_on(view, page, query, figure)
        first = min(int(line), max(len(item.rows) - 1, 0)) if line.isdecimal() else 0
        back = f"/{page}?" + query.without("page", "figure", "line") + f"#{figure}"
        link = "/trial?" + urlencode({"study": study}) + "&trial="
        shown: dict[str, Any] = {"item": item, "first": first, "most": PAGE_ROWS, "back": back, "link": link, "query": query}
        return rendered("table.html", view=view, page=page, **shown)

    @app.get("/download")
    def download(request: Request, study: str, page: str, figure: str, format: str) -> Response:
        view, query = load_study(results, study), query_of(request)
        if format not in ("csv", "parquet"):
            return failed("No such download", "expected a figure's CSV or Parquet, as its buttons give them", 400)
        lines = drawn_on(view, page, query, figure).rows
        data = formats.csv_of(lines).encode() if format == "csv" else formats.parquet_of(lines)
        return _attachment(data, format, f"{figure}.{format}")

    @app.get("/artifact")
    def artifact(study: str, trial: str, label: str, name: str) -> Response:
        path = load_study(results, study).trial(trial).artifact(label, name)
        if path is None:
            return failed("No such artifact", f"{label} of {trial} has no sound artifact {name!r}", 404)
        return FileResponse(path, media_type="application/octet-stream", filename=name.rpartition("/")[2])

    @app.get("/elsewhere")
    def elsewhere_of(study: str, trial: str, tool: str, label: str = "") -> Response:
        base = {"mlflow": elsewhere.mlflow, "optuna": elsewhere.optuna}.get(tool)
        if base is None:
            return failed("Not known", f"{tool}: start the dashboard with --{tool}-url to follow this link", 404)
        view = load_study(results, study)
        return RedirectResponse(links.address(view, view.trial(trial), tool, base, label), 303)

    @app.post("/pick")
    async def pick(request: Request) -> Response:
        form = {name: values[-1] for name, values in parse_qs((await request.body()).decode(errors="replace")).items()}
        view = await run_in_threadpool(load_study, results, form.get("study", ""))
        try:
            await run_in_threadpool(picking.begin, view, form)
        except ChoiceError as error:
            return await run_in_threadpool(failed, "Not picked", str(error), 400)
        return RedirectResponse("/trial?" + urlencode({"study": view.name, "trial": form["trial"]}) + "#pick", 303)

    @app.get("/static/plotly.js")
    def plotly(request: Request) -> Response:
        headers = {"Cache-Control": "public, max-age=86400", "Content-Encoding": "gzip"}
        return Response(_plotly_gzip(), media_type="text/javascript", headers=headers)

    app.mount("/static", StaticFiles(directory=report.HERE / "static"))

    @app.get("/{page}", response_class=HTMLResponse)
    def page(request: Request, page: str, study: str = "") -> Response:
        if page not in PAGES:
            return failed("No such page", f"page {page!r}: expected one of {', '.join(PAGES)}; begin at the list of studies", 404)
        view, query = load_study(results, study), query_of(request)
        context = PAGES[page](view, query)
        downloads = "/download?" + query.text(page=page, study=study)
        link = "/trial?" + urlencode({"study": study}) + "&trial="
        return rendered(f"{page}.html", view=view, page=page, query=query, downloads=downloads, link=link, **context)

    async def timed(request: Request, call_next: Any) -> Response:
        start = time.perf_counter()
        try:
            response: Response = await call_next(request)
        except ValueError as error:  # unknown studies and trials: what was asked for, and what there is
            response = await run_in_threadpool(failed, "Not found", str(error), 404)
        response.headers["Server-Timing"] = f"total;dur={1000 * (time.perf_counter() - start):.1f}"
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=timed)
    app.add_middleware(BaseHTTPMiddleware, dispatch=guard(token, form_secret))
    return app


@cache
def _plotly_gzip() -> bytes:
    return gzip.compress(report.plotly_script().read_bytes(), 6)


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _attachment(data: bytes, format: str, name: str) -> Response:
    return Response(data, media_type=_TYPES[format], headers={"Content-Disposition": f"attachment; filename*=UTF-8''{_quoted(name)}"})


def serve(
    results: Path,
    study: str | None,
    host: str = "127.0.0.1",
    port: int = 8321,
    token: str | None = None,
    read_only: bool = False,
    elsewhere: Elsewhere | None = None,
) -> None:
    """Serve the dashboard until interrupted. Beyond loopback a token is demanded; one is made up where none is given.

    The one thing that it can change is to pick a trial; with `read_only` not even that.
    """
    if not is_loopback(host) and token is None:
        token = secrets.token_urlsafe(24)
    app = create_app(results, study, token, read_only, elsewhere)
    logging.getLogger("uvicorn.access").disabled = True
    threading.Thread(target=_read_ahead, args=(Path(results),), daemon=True, name="read-ahead").start()
    server = _Server(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2))
    server.address = lambda actual: _address(host, actual, study, token)
    server.run()


def _read_ahead(results: Path) -> None:
    """Read the studies last changed, so that the first look at them is as quick as the next ones."""
    names = sorted(list_studies(results), key=lambda name: stamp(results, name), reverse=True)
    for name in names[:_READ_AHEAD]:
        for page in ("study", "pareto", "depth"):
            with contextlib.suppress(ValueError, OSError):  # whoever asks for the page is told
                PAGES[page](load_study(results, name), Query())


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    address: Any

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for socket in server.sockets:
                print(f"dashboard: {self.address(socket.getsockname()[1])}", flush=True)
                return


def _address(host: str, port: int, study: str | None, token: str | None) -> str:
    shown = "localhost" if is_loopback(host) else host
    values = {name: value for name, value in (("study", study), ("token", token)) if value is not None}
    return f"http://{shown}:{port}/{'study' if study else ''}" + (f"?{urlencode(values)}" if values else "")
