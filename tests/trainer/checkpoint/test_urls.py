"""Messages show places without secrets."""

import pytest
from longspan.trainer.checkpoint.urls import redacted


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("/mnt/a@b?c=d", "/mnt/a@b?c=d"),
        ("s3://bucket/run@1/x", "s3://bucket/run@1/x"),
        ("s3://KEY:sEcret@bucket/prefix", "s3://***@bucket/prefix"),
        ("s3://KEY:sE/cr@et+@bucket/prefix", "s3://***@bucket/prefix"),
        ("https://token@host/x", "https://***@host/x"),
        ("s3://b/x?token=sEcret&a=1#k=v", "s3://b/x?token=***&a=***#k=***"),
        (
            'no answer: "http://u:p@h/b?sig=sEcret" twice',
            'no answer: "http://***@h/b?sig=***" twice',
        ),
        ("s3://a:b@c and s3://d:e@f", "s3://***@c and s3://***@f"),
    ],
)
def test_secrets_are_not_shown(url, shown):
    assert redacted(url) == shown
