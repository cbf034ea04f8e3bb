"""T5 and UMT5: true lengths, padding that changes nothing, seeded random weights, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.encoders import TextEncoder, TextEncoderConfig, build_text_encoder
from longtake.encoders.public_configs import T5_CONFIGS
from longtake.encoders.t5 import HashedTokenizer, call_lengths, normalize

transformers = pytest.importorskip("transformers")

CLASSES = {"t5": ("T5Config", "T5EncoderModel"), "umt5": ("UMT5Config", "UMT5EncoderModel")}
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "car", "drives", "along", "the", "coast"]


def _save_tokenizer(folder: Path) -> None:
    """T5's tokenizer with a vocabulary of whole words; it closes every caption with </s>."""
    pieces = [(word if index < 3 else f"▁{word}", 0.0) for index, word in enumerate(WORDS)]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline's folder per kind: text_encoder/ with a tiny random model, tokenizer/."""
    saved = {}
    for kind, (config_class, model_class) in CLASSES.items():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**T5_CONFIGS[kind]["tiny"])
        saved[kind] = tmp_path_factory.mktemp(kind)
        getattr(transformers, model_class)(config).save_pretrained(saved[kind] / "text_encoder")
        _save_tokenizer(saved[kind] / "tokenizer")
    return saved


def _load(kind: Any, path: str | Path, **settings: Any) -> TextEncoder:
    config = TextEncoderConfig(kind=kind, path=str(path), **settings)
    encoder = build_text_encoder(config, "cpu", settings.get("seed", 0))
    assert encoder is not None
    return encoder


def _load_pipeline(kind: str, folders: dict[str, Path], **settings: Any) -> TextEncoder:
    parts = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    return _load(kind, folders[kind], **(parts | settings))


@pytest.mark.parametrize("kind", CLASSES)
def test_t5_embeddings_of_real_tokens_do_not_see_the_padding(
    kind: str, folders: dict[str, Path]
) -> None:
    captions = ["a red car drives along the coast", "red car", ""]
    prompt = _load_pipeline(kind, folders, max_tokens=12).encode(captions)
    assert prompt.embeds_BLK.shape == (3, 12, 64)
    assert prompt.mask_BL.sum(1).tolist() == [8, 3, 1]
    assert not prompt.embeds_BLK[~prompt.mask_BL].any()
    model = getattr(transformers, CLASSES[kind][1]).from_pretrained(folders[kind] / "text_encoder")
    for embeds_LK, mask_L, caption in zip(prompt.embeds_BLK, prompt.mask_BL, captions, strict=True):
        ids = torch.tensor([[WORDS.index(word) for word in [*caption.split(), "</s>"]]])
        with torch.no_grad():
            own_LK = model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(embeds_LK[mask_L], own_LK, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_t5_never_looks_at_values_on_the_host(kind: str, no_host_reads: Any) -> None:
    encoder = _load(kind, "tiny", weights="random")
    ids_BL, mask_BL = torch.ones(2, 8, dtype=torch.long), torch.arange(8) < torch.tensor([[8], [3]])
    places_B, full_BL = torch.tensor([1, 0, 1]), torch.ones(3, 12, dtype=torch.bool)
    with no_host_reads, torch.no_grad():
        prompt = encoder._embed(ids_BL, mask_BL, places_B, full_BL)
    assert prompt.embeds_BLK.shape == (3, 12, 64)


def _calls(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the model is called with from here on."""
    shapes, forward = [], encoder.model.forward

    def note(input_ids: Tensor, attention_mask: Tensor) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(encoder.model, "forward", note)
    return shapes


@pytest.mark.parametrize("kind", CLASSES)
def test_t5_encodes_each_caption_once_and_no_longer_than_the_longest(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = ["a b c", "", "a b c", "d", "", "  a b c ", "e f g h i j", "d", "a b c"]
    short, plain = (
        _load(kind, "tiny", weights="random", max_tokens=60, num_lengths=n) for n in (4, 1)
    )
    calls, plain_calls = _calls(short, monkeypatch), _calls(plain, monkeypatch)
    prompt = short.encode(captions)
    assert calls == [(4, 16)], "four captions, seven tokens"
    assert prompt.embeds_BLK.shape == (9, 60, 64)
    for row, caption in enumerate(captions):
        alone = plain.encode([caption])
        assert torch.equal(prompt.mask_BL[row], alone.mask_BL[0])
        torch.testing.assert_close(prompt.embeds_BLK[row], alone.embeds_BLK[0], atol=1e-5, rtol=0)
    assert plain_calls == [(1, 60)] * 9

    calls.clear()
    for batch in (["a", "b", "c"], ["a b c d e f g h i j k l m n o p q", *"abcd"], ["x " * 99] * 2):
        short.encode(batch)
    # Never more rows than captions; five are filled up by none, since a sixth would be one more.
    assert calls == [(3, 16), (5, 32), (1, 60)]
    assert not prompt.embeds_BLK[~prompt.mask_BL].any()


def test_t5_lengths_are_few_and_end_with_the_whole() -> None:
    assert call_lengths(120, 4) == [32, 64, 96, 120]
    assert call_lengths(512, 4) == [128, 256, 384, 512]
    assert call_lengths(12, 4) == [8, 12]
    assert call_lengths(120, 1) == [120]
    with pytest.raises(ValueError, match="num_lengths=0 must be at least 1: 4 is usual"):
        call_lengths(120, 0)


def test_t5_cuts_long_captions_and_keeps_the_end_token(folders: dict[str, Path]) -> None:
    encoder = _load_pipeline("t5", folders, max_tokens=4)
    cut = encoder.encode(["a red car drives along the coast"])
    short = encoder.encode(["a red car"])
    assert cut.mask_BL.all()
    assert torch.equal(cut.embeds_BLK, short.embeds_BLK)


def test_t5_captions_are_normalized_and_not_cleaned() -> None:
    assert normalize("  Cafe\u0301, see HTTP://x.y <b>“日本”</b>\n") == (
        "Café, see HTTP://x.y <b>“日本”</b>"
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_t5_random_weights_are_a_function_of_the_seed_and_stay_finite_in_bf16(kind: str) -> None:
    def build(seed: int) -> TextEncoder:
        config = TextEncoderConfig(
            kind=kind, path="tiny", weights="random", dtype="bf16", max_tokens=16
        )
        encoder = build_text_encoder(config, "cpu", seed)
        assert encoder is not None
        return encoder

    prompt = build(0).encode(["one two three", ""])
    assert prompt.embeds_BLK.dtype == torch.bfloat16
    assert prompt.mask_BL.sum(1).tolist() == [4, 1]
    valid = prompt.embeds_BLK[prompt.mask_BL].float()
    assert 0.5 < float(valid.std()) < 1.5  # The last layer norm leaves unit variance.
    assert torch.equal(build(0).encode(["one two three", ""]).embeds_BLK, prompt.embeds_BLK)
    digests = [build(seed).provenance["weights_sample_sha256"] for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    provenance = build(0).provenance
    assert provenance["weights"] == "random"
    assert provenance["tokenizer"] == "stand-in: hashes of words"


@pytest.mark.parametrize("kind", CLASSES)
def test_t5_random_weights_have_the_spread_of_the_class_itself(kind: str) -> None:
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(0)
    own = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**T5_CONFIGS[kind]["tiny"])
    )
    ours = _load(kind, "tiny", weights="random").model
    assert ours.shared.weight is ours.encoder.embed_tokens.weight
    for (name, own_parameter), (our_name, our_parameter) in zip(
        own.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert name == our_name
        spread, own_spread = our_parameter.detach().std(), own_parameter.detach().std()
        assert float(spread) == pytest.approx(float(own_spread), rel=0.15), name
        difference = our_parameter.detach().mean() - own_parameter.detach().mean()
        assert abs(float(difference)) < 0.1, name


def test_t5_random_weights_use_the_config_and_tokenizer_that_are_there(
    folders: dict[str, Path],
) -> None:
    encoder = _load_pipeline("t5", folders, weights="random", max_tokens=6)
    assert encoder.provenance["tokenizer"] == str(folders["t5"] / "tokenizer")
    other = _load_pipeline("umt5", folders, weights="random", max_tokens=6)
    digests = [one.provenance["vocabulary_sha256"] for one in (encoder, other)]
    assert digests[0] == digests[1], "one vocabulary in two folders"
    assert encoder.channels == 64
    assert encoder.encode(["a red car"]).mask_BL.sum() == 4


@pytest.mark.parametrize(
    ("kind", "name", "parameters"),
    [
        ("t5", "t5-v1_1-small", 35_332_800),
        ("t5", "t5-v1_1-xxl", 4_762_310_656),
        ("umt5", "umt5-xxl", 5_680_910_336),
    ],
)
def test_t5_public_configs_have_the_published_size(kind: str, name: str, parameters: int) -> None:
    config_class, model_class = CLASSES[kind]
    with torch.device("meta"):
        config = getattr(transformers, config_class)(**T5_CONFIGS[kind][name])
        model = getattr(transformers, model_class)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_t5_stand_in_tokenizer_is_stable_and_ends_every_caption() -> None:
    ids_BL, mask_BL = HashedTokenizer(512)(["A cat, a cat", ""], 8)
    assert ids_BL[0, 0] == ids_BL[0, 3]
    assert ids_BL[0, 1] == ids_BL[0, 4]
    assert ids_BL[0, 5] == ids_BL[1, 0] == 1
    assert mask_BL.sum(1).tolist() == [6, 1]
    assert int(ids_BL[0, :5].min()) >= 3


def test_t5_refusals_say_what_to_do(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="t5 overflows in fp16: use dtype bf16 or fp32"):
        _load("t5", "tiny", weights="random", dtype="fp16")
    with pytest.raises(ValueError, match="encoder of type 'umt5', not 't5': set"):
        _load_pipeline("t5", {"t5": folders["umt5"]})
    with pytest.raises(ValueError, match=r"no config of t5 is known .* t5-v1_1-xxl"):
        _load("t5", "nobody/nothing", weights="random")
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        _load("t5", "tiny", weights="random", max_tokens=0)
    with pytest.raises(ValueError, match=r"cannot load a tokenizer .* set tokenizer_path"):
        _load("t5", folders["t5"], subfolder="text_encoder")
    pieces = [(word, 0.0) for word in [*WORDS[:3], *(f"▁{index}" for index in range(601))]]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 604 tokens, the encoder only 512 .* tokenizer_path"):
        _load_pipeline("t5", folders, tokenizer_path=str(tmp_path), tokenizer_subfolder=None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot load T5EncoderModel .*--encoder-weights random"):
        _load("t5", "nobody/nothing")
