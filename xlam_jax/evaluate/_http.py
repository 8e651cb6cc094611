"""Fetches pages from the servers of suites, such as a shop or Wikipedia."""

import asyncio
import ssl
from functools import cache

import httpx2

from xlam_jax.evaluate.endpoint import EndpointFault

AGENT = "xlam_jax.evaluate"
TRIES = 4
LONGEST = 10 << 20
"""Maximum size of a page in bytes."""


@cache
def _certificates() -> ssl.SSLContext:
    return httpx2.create_ssl_context()  # slow, hence cached


async def fetch(url: str, form: dict[str, str] | None = None, *, timeout: float = 30.0) -> tuple[str, str]:
    """Returns (address after redirects, page). `form` is sent by POST. `timeout` is in seconds per read or write.

    Retries temporary failures (no connection, 429, 5xx) with increasing pauses. Raises `EndpointFault` of the kind
    `environment`.
    """
    fault = ""
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(0.5 * 2 ** (attempt - 1))
        try:
            return await _fetch(url, form, timeout)
        except httpx2.HTTPStatusError as error:
            code = error.response.status_code
            fault = f"answered {code}"
            if code != 429 and code < 500:
                break
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            fault = f"cannot be fetched ({str(error) or type(error).__name__})"
    raise EndpointFault("environment", f"{url}: {fault}")


async def _check_port(request: httpx2.Request) -> None:
    """Raises `httpx2.InvalidURL` for an invalid port, also in redirects; connecting would raise another error."""
    if (request.url.port or 0) > 65535:
        raise httpx2.InvalidURL("the port is larger than 65535")


async def _fetch(url: str, form: dict[str, str] | None, timeout: float) -> tuple[str, str]:
    # A compressed page could be small on the wire and large in memory.
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    method = "GET" if form is None else "POST"
    async with (
        httpx2.AsyncClient(
            timeout=timeout,
            headers=headers,
            follow_redirects=True,
            verify=_certificates(),
            event_hooks={"request": [_check_port]},
        ) as client,
        client.stream(method, url, data=form) as response,
    ):
        response.raise_for_status()
        page = bytearray()
        async for part in response.aiter_raw():
            page += part
            if len(page) > LONGEST:
                raise ValueError(f"the page has more than {LONGEST} bytes")
        address = str(response.url) if response.history else url
        return address, page.decode(errors="replace")
