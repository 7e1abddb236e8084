"""exporter.budget: what people say of a budget, and the limits that it is."""

from __future__ import annotations

import pytest

from exporter.budget import Drop, parse
from exporter.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "key", "limit"),
    [
        ("snr>=25dB", "min_snr_db", 25.0),
        ("snr >= 25", "min_snr_db", 25.0),
        ("same-top1>=0.995", "min_same_top1", 0.995),
        ("same-top1>=99.5%", "min_same_top1", 0.995),
        ("cosine>=0.999", "min_cosine", 0.999),
        ("max-abs<=1e-2", "max_abs", 0.01),
        ("integer-macs>=90%", "min_integer_macs", 0.9),
        ("speedup>=1.8", "min_speedup", 1.8),
        ("speedup>=1.8x", "min_speedup", 1.8),
        ("SNR>=25DB", "min_snr_db", 25.0),
    ],
)
def test_limit_is_read_as_people_say_it(text: str, key: str, limit: float) -> None:
    assert parse([text]) == ({key: pytest.approx(limit)}, ())


def test_drop_in_percent_is_a_share_of_fp32_and_without_it_the_metrics_own_unit() -> None:
    _, (share, own) = parse(["top1 drop<=0.5%", "psnr drop<=0.05"])
    assert (share, own) == (
        Drop(metric="top1", most=0.005, share=True),
        Drop(metric="psnr", most=0.05, share=False),
    )
    assert share.allows(0.8, 0.7961)
    assert not share.allows(0.8, 0.7959)
    assert own.allows(27.5, 27.46)
    assert not own.allows(27.5, 27.44)
    assert own.allows(27.5, 28.0)


def test_drop_of_a_negative_metric_is_a_share_of_its_size() -> None:
    _, (drop,) = parse(["loss drop<=1%"])
    assert drop.allows(-2.0, -2.019)
    assert not drop.allows(-2.0, -2.021)


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["snr"], "no limit"),
        (["snr<=25dB"], "expected >="),
        (["snr>=25%"], "dB"),
        (["max-abs>=1"], "expected <="),
        (["snrr>=25"], "did you mean 'snr'"),
        (["same-top>=1"], "did you mean 'same-top1'"),
        (["snr>=25", "snr>=20"], "a second limit"),
        (["top1 drop>=1"], "expected <="),
        (["top1 drop<=1dB"], "share in %"),
        (["top1 drop<=1", "top1 drop<=2"], "two limits"),
        (["snr>=2.5.1"], "a number"),
        ([""], "no limit"),
    ],
)
def test_what_is_no_limit_is_refused_with_what_is_one(texts: list[str], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        parse(texts)
