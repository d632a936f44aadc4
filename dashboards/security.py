"""Who may see the dashboard: the machine itself, or whoever holds the token."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse

COOKIE = "fffsweep_token"
FIELD = "form_secret"  # of every form that changes something
_LARGEST_FORM = 10_000  # bytes
HEADERS = {
    # plotly.js and the pages' themes set styles inline; scripts come from files alone
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Next = Callable[[Request], Awaitable[Response]]


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def guard(token: str | None, forms: str | None = None) -> Callable[[Request, Next], Awaitable[Response]]:
    """Middleware: without a token only loopback names are answered, so that no web page can reach in under a name of its own;
    with one, only requests that bring it (`?token=` once, then a cookie, or a bearer header).

    forms: the secret that every form carries; a POST without it is refused, for another site can send one but cannot read ours.
    None: read-only, nothing but GET and HEAD is answered.
    """

    async def check(request: Request, call_next: Next) -> Response:
        response = await _answer(request, call_next, token, forms)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return check


async def _answer(request: Request, call_next: Next, token: str | None, forms: str | None) -> Response:
    allowed = ("GET", "HEAD") if forms is None else ("GET", "HEAD", "POST")
    if request.method not in allowed:
        why = "the dashboard is read-only" if request.method == "POST" else f"only {', '.join(allowed)} are allowed"
        return PlainTextResponse(f"{why}\n", 405, {"Allow": ", ".join(allowed)})
    if token is None:
        if not is_loopback(request.url.hostname or ""):
            return PlainTextResponse("this dashboard answers on localhost only; serve it with a token to reach it by another name\n", 421)
        return await _unforged(request, call_next, forms)
    given = request.query_params.get("token")
    if given is not None and _equal(given, token):
        response = RedirectResponse(str(request.url.remove_query_params("token").replace(scheme="", netloc="")) or "/", 303)
        response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    if _equal(bearer, token) or _equal(request.cookies.get(COOKIE, ""), token):
        return await _unforged(request, call_next, forms)
    return PlainTextResponse("a token is needed: open the address that `fffsweep ui` printed, with ?token=...\n", 401)


async def _unforged(request: Request, call_next: Next, forms: str | None) -> Response:
    """Let a POST through if it carries the forms' secret and the browser, where it says so, sends it from our own page."""
    if request.method == "POST":
        body = await request.body()
        given = parse_qs(body.decode(errors="replace")).get(FIELD, [""])[-1] if len(body) <= _LARGEST_FORM else ""
        if forms is None or not _equal(given, forms) or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return PlainTextResponse("this form is not from this dashboard, or from before it was started anew: reload the page\n", 403)
    return await call_next(request)


def _equal(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())
