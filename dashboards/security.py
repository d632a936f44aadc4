"""Who may see the dashboard: the machine itself, or whoever holds the token."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse

COOKIE = "fffsweep_token"
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


def guard(token: str | None) -> Callable[[Request, Next], Awaitable[Response]]:
    """Middleware: without a token only loopback names are answered, so that no web page can reach in under a name of its own;
    with one, only requests that bring it (`?token=` once, then a cookie, or a bearer header). Nothing here changes state, so only
    GET and HEAD are allowed and there is nothing to forge."""

    async def check(request: Request, call_next: Next) -> Response:
        response = await _answer(request, call_next, token)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return check


async def _answer(request: Request, call_next: Next, token: str | None) -> Response:
    if request.method not in ("GET", "HEAD"):
        return PlainTextResponse("only GET and HEAD are allowed\n", 405, {"Allow": "GET, HEAD"})
    if token is None:
        if not is_loopback(request.url.hostname or ""):
            return PlainTextResponse("this dashboard answers on localhost only; serve it with a token to reach it by another name\n", 421)
        return await call_next(request)
    given = request.query_params.get("token")
    if given is not None and _equal(given, token):
        response = RedirectResponse(str(request.url.remove_query_params("token").replace(scheme="", netloc="")) or "/", 303)
        response.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    if _equal(bearer, token) or _equal(request.cookies.get(COOKIE, ""), token):
        return await call_next(request)
    return PlainTextResponse("a token is needed: open the address that `fffsweep ui` printed, with ?token=...\n", 401)


def _equal(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())
