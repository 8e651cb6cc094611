"""Pages of the servers that suites talk to: a shop, Wikipedia, tools."""

import asyncio
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.client import HTTPException
from urllib.parse import urlencode

from xlam_jax.evaluate.endpoint import EndpointFault

AGENT = "xlam_jax.evaluate"
TRIES = 4
LONGEST = 10 << 20
"""Bytes of a page."""


@cache
def _threads() -> ThreadPoolExecutor:
    """The default executor has as many threads as the machine has cores, which wait most of the time here."""
    return ThreadPoolExecutor(256, thread_name_prefix="pages")


async def fetch(url: str, form: dict[str, str] | None = None, *, timeout: float = 30.0) -> tuple[str, str]:
    """Returns (the address after redirects, the page). `form` is posted. `timeout` is in seconds.

    What may pass (not reached, 429, 5xx) is tried again with growing pauses. Raises `EndpointFault` of the kind
    environment.
    """
    fault = ""
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(0.5 * 2 ** (attempt - 1))
        try:
            return await asyncio.get_running_loop().run_in_executor(_threads(), _fetch, url, form, timeout)
        except urllib.error.HTTPError as error:
            fault = f"answered {error.code}"
            with error:
                if error.code != 429 and error.code < 500:
                    break
        except (OSError, HTTPException, ValueError) as error:
            fault = f"cannot be fetched ({getattr(error, 'reason', None) or error})"
    raise EndpointFault("environment", f"{url}: {fault}")


def _fetch(url: str, form: dict[str, str] | None, timeout: float) -> tuple[str, str]:
    data = urlencode(form).encode() if form is not None else None
    request = urllib.request.Request(url, data, {"User-Agent": AGENT})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        data = response.read(LONGEST)
        if response.length:  # reading a part does not tell by itself that the rest is missing
            raise ValueError(f"only {len(data)} bytes of the page came")
        return response.url, data.decode(errors="replace")
