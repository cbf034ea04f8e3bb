"""T5 v1.1 and UMT5 as text encoders: pretrained by folder or hub name, or random from their config.

Captions are only normalized (Unicode NFC, outer white space removed): no lower-casing, no stripping
of links or scripts, since what a caption says is the data's business. Weights are read from
safetensors, or from a `.bin` file with `weights_only`; remote code is never run.

A call costs what its captions need: each different one is encoded once, and only as many tokens as
the longest has, rounded up to one of a few lengths. The result is always padded to `max_tokens`, so
that the transformer, which has far more work, sees one shape.

Shapes: B batch, U different captions, L tokens, K their width.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.encoders.hashed_words import split_words
from longtake.encoders.pretrained import (
    LOAD_ERRORS,
    Source,
    check_complete,
    config_digest,
    freeze,
    import_library,
    load_failure,
    locate,
    resolve_dtype,
    weights_digest,
)
from longtake.encoders.protocol import PromptEmbeds
from longtake.encoders.public_configs import T5_CONFIGS
from longtake.randomness import named_seed

_CLASSES = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_PAD, _END = 0, 1  # As in every T5 vocabulary.


class Tokenize(Protocol):
    """Captions to token ids (B, max_tokens) padded with zeros, and the mask of real tokens."""

    def __call__(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]: ...


class T5Encoder:
    """A frozen T5 encoder: the last hidden states, padded to `max_tokens`."""

    def __init__(
        self,
        model: Any,
        tokenize: Tokenize,
        *,
        max_tokens: int,
        num_lengths: int = 1,
        provenance: dict[str, object],
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1: 120 and 512 are usual")
        self.model = model
        # Read once: the parameters of a sharded model are no plain tensors any more.
        self._device, self.dtype = model.device, model.dtype
        self.num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._tokenize = tokenize
        self.max_tokens = max_tokens
        self.lengths = call_lengths(max_tokens, num_lengths)
        self.channels: int = model.config.d_model
        self.provenance: dict[str, object] = provenance | {
            "max_tokens": max_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "config_sha256": config_digest(model.config.to_diff_dict()),
            "weights_sample_sha256": weights_digest(model),
        }

    @property
    def blocks(self) -> nn.ModuleList:
        """The units of compilation and sharding."""
        return self.model.encoder.block

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> PromptEmbeds:
        """Embeddings (B, max_tokens, channels) in the encoder's dtype, zero on padding; mask.

        The model is called exactly once, whatever the captions: where it is sharded, the processes
        meet in its collectives.
        """
        texts = [normalize(text) for text in captions]
        different = list(dict.fromkeys(texts))
        place = {text: index for index, text in enumerate(different)}
        places_B = torch.tensor([place[text] for text in texts])
        # Few numbers of rows, as of tokens: each shape is compiled once. Empty captions fill up.
        rows = min(len(texts), 1 << (len(different) - 1).bit_length())
        different += [""] * (rows - len(different))
        ids_UL, mask_UL = self._tokenize(different, self.max_tokens)
        longest = int(mask_UL.sum(1).max())
        length = next(length for length in self.lengths if length >= longest)
        return self._embed(
            *map(self._send, (ids_UL[:, :length], mask_UL[:, :length], places_B, mask_UL[places_B]))
        )

    def _send(self, host: Tensor) -> Tensor:
        """To the device; from pinned memory, so that the copy waits for nothing."""
        if self._device.type == "cuda":
            host = host.contiguous().pin_memory()
        return host.to(self._device, non_blocking=True)

    def _embed(
        self, ids_UL: Tensor, mask_UL: Tensor, places_B: Tensor, mask_BL: Tensor
    ) -> PromptEmbeds:
        """Of captions cut to a call's length; `mask_BL` is that of the result, at full length."""
        # An additive mask is used as it is. Given a boolean one, the library looks whether it is
        # all true, and the host waits for the GPU.
        bias_U11L = torch.zeros(mask_UL.shape, dtype=self.dtype, device=mask_UL.device)
        bias_U11L = bias_U11L.masked_fill(~mask_UL, torch.finfo(self.dtype).min)[:, None, None]
        embeds_ULK = self.model(input_ids=ids_UL, attention_mask=bias_U11L).last_hidden_state
        embeds_BLK = (embeds_ULK * mask_UL[:, :, None]).index_select(0, places_B)
        missing = mask_BL.shape[1] - embeds_BLK.shape[1]
        return PromptEmbeds(F.pad(embeds_BLK, (0, 0, 0, missing)), mask_BL)


def call_lengths(max_tokens: int, count: int) -> list[int]:
    """The numbers of tokens that calls are rounded up to: `count` even parts of `max_tokens`, each
    rounded up to a multiple of 8, which matrix units are made for.

    Raises:
        ValueError: count is less than 1.
    """
    if count < 1:
        raise ValueError(f"num_lengths={count} must be at least 1: 4 is usual, 1 pads in full")
    parts = [-(-max_tokens * part // count) for part in range(1, count + 1)]
    return sorted({min(max_tokens, -(-part // 8) * 8) for part in parts})


def normalize(caption: str) -> str:
    """Unicode NFC without outer white space; nothing else is changed."""
    return unicodedata.normalize("NFC", caption).strip()


def load_t5(
    kind: str,
    path: str,
    *,
    subfolder: str | None,
    tokenizer_path: str | None,
    tokenizer_subfolder: str | None,
    revision: str | None,
    max_tokens: int,
    num_lengths: int,
    weights: str,
    dtype: str,
    device: torch.device,
    seed: int,
) -> T5Encoder:
    """A T5 or UMT5 encoder, frozen, on the device; see `TextEncoderConfig` for the arguments."""
    torch_dtype = resolve_dtype(dtype, device)
    if torch_dtype == torch.float16:
        raise ValueError(f"{kind} overflows in fp16: use dtype bf16 or fp32")
    transformers = import_library("transformers")
    model_class = getattr(transformers, _CLASSES[kind])
    source = locate(path, subfolder, revision)
    if weights == "random":
        model = _build_random(kind, model_class, source, torch_dtype, device, seed)
    else:
        model = _load_weights(kind, model_class, source, torch_dtype).to(device)
    freeze(model)
    tokenize, tokenizer = _build_tokenizer(
        transformers,
        tokenizer_path or path,
        tokenizer_subfolder,
        revision,
        vocab_size=model.config.vocab_size,
        # With random weights only a tokenizer that was asked for, or lies there, is a real one.
        may_stand_in=weights == "random" and tokenizer_path is None,
    )
    return T5Encoder(
        model,
        tokenize,
        max_tokens=max_tokens,
        num_lengths=num_lengths,
        provenance={
            "class": model_class.__name__,
            "library": f"transformers {transformers.__version__}",
            **source.describe(),
            "weights": weights,
            **tokenizer,
        },
    )


def _read_config(kind: str, model_class: Any, source: Source) -> Any:
    try:
        values, _ = model_class.config_class.get_config_dict(source.name, **source.options)
    except LOAD_ERRORS as error:
        raise load_failure(model_class.__name__, source, error) from error
    if values.get("model_type", kind) != kind:
        raise ValueError(
            f"{source.name!r} holds a text encoder of type {values['model_type']!r}, not {kind!r}: "
            "set the text encoder's kind to 't5' or 'umt5' accordingly"
        )
    return model_class.config_class.from_dict(values)


def _load_weights(kind: str, model_class: Any, source: Source, dtype: torch.dtype) -> Any:
    config = _read_config(kind, model_class, source)
    try:
        model, loading_info = model_class.from_pretrained(
            source.name, config=config, dtype=dtype, output_loading_info=True, **source.options
        )
    except LOAD_ERRORS as error:
        raise load_failure(model_class.__name__, source, error) from error
    check_complete(model_class.__name__, source, loading_info)
    return model


def _build_random(
    kind: str, model_class: Any, source: Source, dtype: torch.dtype, device: torch.device, seed: int
) -> Any:
    """The class with seeded weights drawn on the device: billions of them take seconds on a GPU."""
    if source.folder is None:
        known, name = T5_CONFIGS[kind], source.name.rsplit("/", 1)[-1]
        if name not in known:
            raise ValueError(
                f"no config of {kind} is known under the name {source.name!r} to build random "
                f"weights from: use {' or '.join(known)}, or a folder with config.json"
            )
        config = model_class.config_class(**known[name])
    else:
        config = _read_config(kind, model_class, source)
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    assert not list(model.buffers()), "buffers would be left uninitialized by to_empty"
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gave the shared embedding two separate storages.
    _init_weights(model, config, seed)
    return model


@torch.no_grad()
def _init_weights(model: nn.Module, config: Any, seed: int) -> None:
    """T5's own initialization, which keeps activations small enough for bf16 at any depth.

    Source: Mesh TensorFlow's, as in the T5 code: embeddings N(0, 1), a matrix N(0, 1 / fan_in), and
    the queries another 1 / sqrt(d_kv) smaller because T5's attention does not scale its logits.
    """
    for name, parameter in model.named_parameters():
        layer = name.split(".")[-2]
        if layer.endswith("layer_norm"):
            parameter.fill_(1.0)
            continue
        if layer == "shared":
            std = 1.0
        elif layer == "relative_attention_bias":
            std = config.d_model**-0.5
        else:
            std = parameter.shape[1] ** -0.5
            if layer == "q":
                std *= config.d_kv**-0.5
        generator = torch.Generator(parameter.device)
        generator.manual_seed(named_seed(seed, f"encoders/t5/{name}"))
        parameter.normal_(std=std, generator=generator)


def _build_tokenizer(
    transformers: Any,
    path: str,
    subfolder: str | None,
    revision: str | None,
    *,
    vocab_size: int,
    may_stand_in: bool,
) -> tuple[Tokenize, dict[str, object]]:
    """The tokenizer, and what identifies it for the provenance."""
    folder = Path(path).expanduser()
    folder = folder / subfolder if subfolder else folder
    if folder.is_dir():
        name, options = str(folder), {}
        there = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    else:
        name, there = path, False
        options = {"subfolder": subfolder or "", "revision": revision or "main"}
    if may_stand_in and not there:
        return HashedTokenizer(vocab_size), {"tokenizer": "stand-in: hashes of words"}
    try:
        # UMT5 has the same class. Naming it, not "auto", leaves no way for a repository's own code.
        tokenizer = transformers.T5Tokenizer.from_pretrained(name, **options)
        # Where no file is found the library makes an empty vocabulary and says nothing.
        if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, "▁"}:
            raise ValueError("no tokenizer.json or spiece.model there")
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(
            f"cannot load a tokenizer from {name!r}: {reason}; set tokenizer_path (and "
            "tokenizer_subfolder) to where tokenizer.json or spiece.model lies"
        ) from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {name!r} has {len(tokenizer)} tokens, the encoder only {vocab_size} "
            "embeddings: they do not belong together; set tokenizer_path"
        )

    def tokenize(captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        batch = tokenizer(
            list(captions),
            max_length=max_tokens,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"].bool()

    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    digest = hashlib.sha256(vocabulary).hexdigest()
    return tokenize, {"tokenizer": name, "vocabulary_sha256": digest}


class HashedTokenizer:
    """A stand-in where no tokenizer is at hand: a word's id is its hash. For random weights."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        ids_BL = torch.full((len(captions), max_tokens), _PAD)
        for ids_L, caption in zip(ids_BL, captions, strict=True):
            ids = [self._word_id(word) for word in split_words(caption)[: max_tokens - 1]]
            ids_L[: len(ids) + 1] = torch.tensor([*ids, _END])
        return ids_BL, ids_BL != _PAD

    def _word_id(self, word: str) -> int:
        reserved = 3  # Padding, end and unknown.
        digest = hashlib.sha256(word.encode(errors="surrogatepass")).digest()
        return reserved + int.from_bytes(digest[:8], "little") % (self._vocab_size - reserved)
