import pytest

from mlm_dist.redaction import redact, redact_text, secrets_of


def test_secrets_of_a_configuration_are_left_out() -> None:
    plain = {
        "optim": {"lr": 1.0},
        "data": {"shards": "s3://bucket/x", "lanes": None},
        "model": {"args": {"key_dim": 64}},
    }
    secret = {"api_key": "x", "parts": [{"password": "y"}], "url": "https://me:z@host/x?y"}
    shown = {"api_key": "[redacted]", "parts": [{"password": "[redacted]"}], "url": "https://host/x"}
    assert redact(plain | {"deepspeed": secret}) == plain | {"deepspeed": shown}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("deepspeed.comet.api_key=abc=d", "deepspeed.comet.api_key=[redacted]"),
        (
            "deepspeed={comet: {api_key: abc, project: p}}",
            'deepspeed={"comet": {"api_key": "[redacted]", "project": "p"}}',
        ),
        ("data.sources={a: {shards: 'https://u:p@h/x'}}", 'data.sources={"a": {"shards": "https://h/x"}}'),
        ("data.sources={a: {shards: x}}", "data.sources={a: {shards: x}}"),
        ("a={b: [", "a={b: ["),
        ("data.shards=https://u:p@h/x", "data.shards=https://h/x"),
        ("--config", "--config"),
        ("run.steps=5", "run.steps=5"),
        ("mail me@host, see https://host/@x now", "mail me@host, see https://host/@x now"),
    ],
)
def test_secrets_of_a_command_line_are_left_out(text: str, shown: str) -> None:
    assert redact_text(text) == shown


def test_what_is_left_out_is_known() -> None:
    held = {
        "a": [{"password": "one"}, {"lr": 1e-3}],
        "url": "https://me:two@host/x",
        "b": {"api_key": "three", "c": "d", "AWS_SESSION_TOKEN": "four"},
    }
    assert secrets_of(held) == {"one", "https://me:two@host/x", "three", "four"}
