"""An archive for a bug report has no secret, and everything else as it is."""

from __future__ import annotations

import json

import pytest

from shim.commands.collect import redacted

HIDDEN = "s3cr3t-of-somebody"


@pytest.mark.parametrize(
    "text",
    [
        f"password={HIDDEN}",
        f"DB_PASSWORD={HIDDEN} next",
        f"password: '{HIDDEN} with spaces'",
        f'kernel_parameters = "root.token={HIDDEN}"',
        json.dumps({"api_key": f"{HIDDEN}, with a comma", "next": 1}, indent=2),
        f'msg="mount: {{\\"secret\\": \\"{HIDDEN}\\"}}: no" logger=shim',
        f"Authorization: Bearer {HIDDEN}",
        f"sent Bearer {HIDDEN}==",
        f"https://user:{HIDDEN}@host/path",
        f"https://{HIDDEN}@host/path",
        f"http://host/v1/traces?access_token={HIDDEN}&x=1",
        f"aws_access_key_id={HIDDEN}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{HIDDEN.replace('-', '')}\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret_is_redacted(text: str) -> None:
    shown = redacted(text)

    assert "(redacted)" in shown
    assert HIDDEN not in shown
    assert HIDDEN.replace("-", "") not in shown


@pytest.mark.parametrize(
    "text",
    [
        "boot: template 0123456789ab: cloned",
        '"template_key": "0123456789ab",',
        "network: a question of the guest: basic check",
        "http://127.0.0.1:4318/v1/traces",
        "unix:///run/containerd/s/0123",
    ],
)
def test_text_that_is_not_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_what_follows_a_secret_stays() -> None:
    text = f'{{"token": "{HIDDEN}", "state": "running"}}'
    assert redacted(text) == '{"token": (redacted), "state": "running"}'
