"""An endpoint that runs already, on this machine or at a provider: its address, its key, and what it can do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from gymtrl.errors import RunError, UserError
from gymtrl.processes import KEY_VARIABLE

TOKEN_FIELDS: dict[str, Any] = {"logprobs": True, "top_logprobs": 0, "return_tokens_as_token_ids": True}
"""What Gym asks for besides the answer where it records token ids."""

_SECONDS = 300.0  # a model that reasons takes its time, also for a greeting


@dataclass(frozen=True)
class Hosted:
    """An endpoint that runs already.

    Attributes:
        url (`str`): OpenAI-compatible base URL, `/v1` included where it has one.
        model (`str`): The model's name there.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            plain = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
            secret = parts.username or parts.password
        except ValueError:
            plain, secret = False, None
        if secret:
            raise UserError("the endpoint's URL holds a user name", remedy=f"give its key in ${KEY_VARIABLE}")
        if not plain:
            raise UserError(f"{self.url} is no base URL", remedy="give one such as https://host/v1")

    @property
    def headers(self) -> dict[str, str]:
        """What a request carries besides its body; the key is in it, and is sent nowhere else and never written."""
        key = os.environ.get(KEY_VARIABLE)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def at(self, path: str) -> str:
        """The URL of something below the base URL; `/tokenize` of vLLM is not below `/v1`."""
        base = self.url.rstrip("/")
        return f"{base.removesuffix('/v1')}{path}" if path == "/tokenize" else f"{base}{path}"


def gives_token_ids(hosted: Hosted, max_output_tokens: int) -> bool:
    """Checks that an endpoint answers, and whether it returns token ids and log-probabilities as Gym asks for them.

    Args:
        hosted (`Hosted`): The endpoint.
        max_output_tokens (`int`): As many as later requests ask for: some endpoints refuse more than they generate.

    Raises:
        UserError: It refuses the key, or does not know the model, or cannot be asked.
        RunError: Nothing answers there, or it fails.
    """
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"model": hosted.model, "messages": messages, "max_tokens": max_output_tokens}
    answer = _post(hosted, asked | TOKEN_FIELDS)
    if answer.status_code == 200:
        try:
            content = answer.json()["choices"][0]["logprobs"]["content"]
            if all(str(entry["token"]).startswith("token_id:") for entry in content):
                return _post(hosted, {k: asked[k] for k in ("model", "messages")}, "/tokenize").status_code == 200
        except (ValueError, LookupError, TypeError):
            pass
        return False
    # Whoever does not know the fields may refuse them.
    _require_ok(hosted, _post(hosted, asked))
    return False


def _post(hosted: Hosted, body: dict[str, Any], path: str = "/chat/completions") -> httpx.Response:
    try:
        return httpx.post(hosted.at(path), json=body, headers=hosted.headers, timeout=_SECONDS)
    except httpx.HTTPError as error:
        raise RunError(
            f"nothing answers at {hosted.url}: {type(error).__name__}", remedy="start it, or check the URL"
        ) from None


def _require_ok(hosted: Hosted, answer: httpx.Response) -> None:
    status, said = answer.status_code, answer.text[:300]
    if status in (401, 403):
        raise UserError(f"{hosted.url} refuses the key ({status})", remedy=f"put the right one into ${KEY_VARIABLE}")
    if status == 404:
        raise UserError(f"{hosted.url} has no model '{hosted.model}', or is no base URL: {said}")
    if 400 <= status < 500 and status != 429:
        raise UserError(f"{hosted.url} refuses a request ({status}): {said}")
    if status != 200:
        raise RunError(f"{hosted.url} fails ({status}): {said}", remedy="try again later")
