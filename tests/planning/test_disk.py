from dataclasses import replace

import pytest

from longtake.planning import DiskPlan, alternatives, assumptions, mean_tokens, size_text
from longtake.store.forms import record_bytes

# Ten million clips of 64x512x512: "1 MB for 120 tokens and 4 MB for a latent: 50 TB".
SEED = DiskPlan(
    clips=10_000_000, latent=(4, 64, 64, 64), form="fp32", captions=10_000_000, tokens=120
)


def test_fifty_terabytes():
    assert SEED.caption_bytes == 983_040
    assert SEED.clip_bytes == 4_194_304
    assert SEED.total == 10_000_000 * (983_040 + 4_194_304)
    assert size_text(SEED.total) == "51.8 TB"


def test_what_fifty_terabytes_hide():
    text = "\n".join(assumptions(SEED, 40.0))
    assert "The same sample in bf16: 30.8 TB" in text
    assert "51.8 TB in bf16, 30.8 TB in 8 bits" in text
    assert "At their true length of 40: 45.2 TB" in text
    assert "With its mirrored side: 93.7 TB" in text
    assert "Two: 103.5 TB" in text
    assert "with 40 on average: 45.2 TB" in "\n".join(assumptions(SEED, None))
    stored = replace(SEED, form="8bit", tokens=40.0, variants=2, replicas=2)
    text = "\n".join(assumptions(stored, 40.0))
    assert not any(words in text for words in ("A sample", "true length", "mirrored", "One copy"))


@pytest.mark.parametrize("form", ["bf16", "8bit"])
@pytest.mark.parametrize("with_posterior", [True, False])
def test_the_plan_counts_as_the_store_does(form, with_posterior):
    for shape in ((4, 64, 64, 64), (16, 5, 34, 60), (24, 1, 8, 8)):
        plan = replace(SEED, latent=shape, form=form, with_posterior=with_posterior)
        assert plan.clip_bytes == record_bytes(shape, form, with_posterior=with_posterior)


def test_replicas_and_variants_multiply():
    more = replace(SEED, replicas=3, variants=4)
    assert more.latent_total == 12 * SEED.latent_total
    assert more.text_total == 3 * SEED.text_total


def test_every_form_is_an_alternative():
    assert [(p.form, p.tokens) for p in alternatives(SEED, 30.0)] == [
        (form, tokens) for tokens in (120.0, 30.0) for form in ("fp32", "bf16", "8bit")
    ]
    assert len(alternatives(SEED, None)) == len(alternatives(SEED, 120.0)) == 3
    assert len(alternatives(replace(SEED, text_channels=0), 30.0)) == 3


def test_captions_are_cut_before_their_mean_is_taken():
    assert mean_tokens({20: 0.6, 80: 0.4}, 120) == pytest.approx(44)
    assert mean_tokens({20: 3, 500: 1}, 120) == pytest.approx(45)
    for wrong, problem in (({20: 0.0}, "above 0"), ({20: -1, 3: 2}, "above 0"), ({0: 1}, "0 tok")):
        with pytest.raises(ValueError, match=problem):
            mean_tokens(wrong, 120)


def test_impossible_plans_are_refused():
    for change, problem in (
        ({"clips": 0}, "clips=0 must be at least 1"),
        ({"latent": (4, 0, 2, 2)}, "latent=4x0x2x2: every size must be at least 1"),
        ({"tokens": 121.0}, "tokens=121 must be above 0 and at most max_tokens=120"),
        ({"text_channels": -1}, "text_channels=-1 must not be negative"),
    ):
        with pytest.raises(ValueError, match=problem):
            replace(SEED, **change)
