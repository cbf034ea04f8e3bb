"""Reading an image as RGB: orientation applied, transparency flattened, 16 bit reduced to 8."""

from __future__ import annotations

import os

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from longtake.data.files import MediaError, open_regular
from longtake.data.transforms import Fit, fit_frame

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the file name's extension says that this is an image."""
    return os.fspath(path).lower().endswith(IMAGE_SUFFIXES)


def read_image(path: str | os.PathLike[str], *, fit: Fit | None = None, max_pixels: int) -> Tensor:
    """Pixels uint8 (3, H, W): the whole picture, or what `fit` asks for.

    Transparent parts become white, as browsers and captioners show them.

    Raises:
        MediaError: not an image of a known kind, animated, damaged or larger than `max_pixels`.
    """
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    text = f"{width}x{height} is more than max_pixels={max_pixels}"
                    raise MediaError(path, "too_large", text)
                if getattr(image, "n_frames", 1) > 1:
                    raise MediaError(path, "unsupported", "animated images are not read")
                rgb = _to_rgb(ImageOps.exif_transpose(image))
        except MediaError:
            raise
        except Image.DecompressionBombError as error:
            raise MediaError(path, "too_large", str(error)) from error
        except Exception as error:  # Pillow's parsers raise whatever a damaged file leads them to
            text = f"cannot be read as an image ({type(error).__name__}: {error})"
            raise MediaError(path, "unreadable", text) from error
    pixels_HWC = np.asarray(rgb)
    if fit is None:
        return torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1)
    # The scaler of the videos, so that both kinds of sample look alike to the model.
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
    try:
        return fit_frame(frame, fit, shown=pixels_HWC.shape[:2])
    except MemoryError as error:
        text = f"needs too much memory: {error}"
        raise MediaError(path, "too_large", text) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")
