"""An image file to pixels: one decoding for training, evaluation and prediction."""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

# Pillow's own limit, beyond which its bytes may be an attack; a picture of so many pixels takes 256 MiB in colour.
MAX_PIXELS = 89_478_485
# decode() says it in one line, with what to do.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: np.rot90(pixels),
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width


class CorruptImageError(Exception):
    """The bytes of one record are not a readable image."""


def decode(data: bytes, channels: int, *, upright: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file.

    JPEG goes through simplejpeg, which gives Pillow's pixels three times as fast; Pillow reads everything else and has
    the last word on JPEGs that simplejpeg refuses. Of several frames the first is taken. A NumPy file (.npy) of (H, W)
    or (H, W, channels) is an image too, of any number of channels.

    Args:
        data: a file that Pillow or NumPy reads.
        channels: 3 for RGB, 1 for grey, 4 for RGB and alpha, 2 for grey and alpha; others for NumPy files only.
        upright: turn the picture as its EXIF data say.
        max_pixels: a picture of more is refused before its pixels are read.

    Returns:
        uint8 (H, W, channels). Deeper values keep their highest 8 bits (:func:`to_bytes`); what is transparent lies on
        white where there is no channel for alpha.

    Raises:
        CorruptImageError: the bytes cannot be decoded, or are too many pixels; the message says why.
    """
    try:
        if data[:6] == b"\x93NUMPY":
            return _array(data, channels, max_pixels)
        if data[:2] == b"\xff\xd8" and channels in (1, 3):
            try:
                height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
                _check_size(width, height, max_pixels)
                pixels = simplejpeg.decode_jpeg(data, colorspace="RGB" if channels == 3 else "GRAY")
                return _turned(pixels, _orientation_of(data)) if upright else pixels
            except ValueError:
                pass  # simplejpeg also refuses files with mere warnings, which Pillow reads
        with Image.open(io.BytesIO(data)) as image:
            return image_pixels(image, channels, upright=upright, max_pixels=max_pixels)
    except (CorruptImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise CorruptImageError("not an image file") from error
    except Exception as error:  # on damaged files Pillow's plug-ins raise errors of every kind
        raise CorruptImageError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def image_size(data: bytes, *, upright: bool = False) -> tuple[int, int]:
    """Read the size of an image from the head of its file; the pixels are not looked at.

    Args:
        data: a file that Pillow reads.
        upright: of the picture as its EXIF data turn it.

    Returns:
        Height and width, pixels.

    Raises:
        CorruptImageError: the bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            sideways = upright and _orientation(image) in _SIDEWAYS
            return (image.width, image.height) if sideways else (image.height, image.width)
    except Exception as error:  # on damaged files Pillow's plug-ins raise errors of every kind
        raise CorruptImageError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def image_pixels(
    image: Image.Image, channels: int, *, upright: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Return the pixels of an image of any mode; arguments, result and errors as for :func:`decode`."""
    _check_size(*image.size, max_pixels)
    mode = _MODES.get(channels)
    if mode is None:
        raise CorruptImageError(f"{channels} channels are read from NumPy files (.npy) only")
    turn = _orientation(image) if upright else 1
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow gives 16-bit PGM and PNG files in 32 bits.
        sixteen = image.mode.startswith("I;16") or image.format in ("PPM", "PNG")
        image = Image.fromarray(to_bytes(np.asarray(image), 65535 if sixteen else None))
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None  # None comes where it works in place
        image = converted
    if image.has_transparency_data and not mode.endswith("A"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert(mode))
    return _turned(pixels.reshape(*pixels.shape[:2], channels), turn)


def to_bytes(values: np.ndarray, most: float | None = None) -> np.ndarray:
    """Bring integers or floats to 0 to 255.

    Args:
        values: of any shape; what is below 0, and NaN, is black.
        most: the value that becomes 255. Not given: the smallest of 1 (floats), 255, 65535 and 2**31 - 1 that no value
            exceeds, or else the largest value.

    Returns:
        uint8 of the same shape.
    """
    if values.dtype == np.uint8:
        return values
    floats = np.nan_to_num(values.astype(np.float32 if values.dtype.kind == "f" else np.float64), nan=0.0)
    largest = float(floats.max(initial=0.0))
    if most is None:
        known = ((1.0,) if values.dtype.kind == "f" else ()) + (255.0, 65535.0, 2.0**31 - 1)
        most = next((limit for limit in known if largest <= limit), largest)
    # Whole numbers keep their highest 8 bits, as Pillow has it for colours; floats are rounded.
    scaled = np.clip(floats, 0, most) / most
    return (np.rint(scaled * 255) if values.dtype.kind == "f" else scaled * 255.999).astype(np.uint8)


def _array(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    values = np.load(io.BytesIO(data), allow_pickle=False)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] != channels or not values.size or values.dtype.kind not in "uif":
        raise CorruptImageError(
            f"an array {values.shape} of {values.dtype}; numbers (height, width, {channels}) are needed"
        )
    _check_size(values.shape[1], values.shape[0], max_pixels)
    return np.ascontiguousarray(to_bytes(values, 65535 if values.dtype == np.uint16 else None))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise CorruptImageError(f"{width} x {height} pixels are more than the {max_pixels} that data.max_pixels allows")


def _orientation_of(jpeg: bytes) -> int:
    """Return EXIF's orientation, which stands in one of the first segments; 1 is upright."""
    if jpeg.find(b"Exif\0\0", 0, 1 << 17) < 0:
        return 1
    with Image.open(io.BytesIO(jpeg)) as image:
        return _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data say nothing, and the picture may be whole
        return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\x93NUMPY")


def looks_like_image(start: bytes) -> bool:
    """Return whether a file that begins with these bytes, some thousands of them, is an image by its form."""
    if start.startswith(_SIGNATURES) or start[8:12] == b"WEBP" or start[4:12] in (b"ftypavif", b"ftypavis"):
        return True
    try:
        with Image.open(io.BytesIO(start)):
            return True
    except Exception:  # as above
        return False
