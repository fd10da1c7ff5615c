"""Text as images: random strings, rendered when they are asked for; nothing to download.

Source: the Text class of Tancik et al. 2021, whose own generator is not published.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import rng
from .files import ImageSet, Splits, drawn_images, drawn_splits, size_pair

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
)
_WORDS = (
    "about after again air all also always and animal answer apple ask away back bear because "
    "before begin best bird black blue boat body book both box bread bring build busy call came "
    "car carry cat change city clear close cloud cold colour come country cut dark day deep door "
    "down draw dream drive early earth eat every eye face fall family far farm fast father few "
    "field find fire first fish five floor flower fly follow food forest four friend from game "
    "garden gave give glass gold good grass great green ground grow half hand happy hard head "
    "hear heart help high hill home horse hour house idea island join jump just keep kind king "
    "know lake language large last late laugh leaf learn left letter life light line listen "
    "little live long look love machine make many map mark mean measure milk mind money month "
    "moon morning mother mountain move much music name near never new night north note number "
    "ocean often old once open order other over page paint paper part path people piece place "
    "plain plant play point power pull question quick quiet rain reach read ready real red rest "
    "river road rock room round run sand school sea second seven ship short show silver simple "
    "sing sky sleep slow small snow song sound south space spring square stand star start stone "
    "stop story street strong summer sun table talk teach tell thing think three time together "
    "town train travel tree true under until valley very voice walk warm watch water weather "
    "week west wheel white wild wind window winter wonder wood word work world write year young"
)
WORDS = tuple(_WORDS.split())
_SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

_APART = 0.35  # least difference in luma between text and ground, both in [0,1]


def text_images(
    count: int,
    *,
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    first: int = 0,
    memory: int = 2 << 30,
) -> ImageSet:
    """Images of random text; image i is a function of (seed, first + i, size) and the fonts.

    One to four words (one in four made of random letters and digits) on one to three lines, in one
    typeface, at most two on a line; each line in its own colour and place; the widest takes 0.7 to
    1.3 of the width where it fits the height. Half of the grounds are white, half any colour; luma
    differs by 0.35 at least.

    Args:
        count: n, how many.
        size: n for (n, n), or (H, W), at least 8.
        first: ranges first .. first + count − 1 that do not meet give separate sets.
        memory: bytes of rendered images to hold.

    Raises:
        ValueError: a number out of range. ImportError: Pillow is absent, or has no FreeType.

    Fonts are DejaVu where matplotlib is installed, else the one Pillow carries: other pixels.
    """
    size = size_pair("text_images", size)
    shape: dict[str, Any] = {"size": size, "channels": 3, "seed": seed, "first": first}
    return drawn_images("text", partial(_render, size=size), count, memory=memory, **shape)


def text_splits(
    size: int | tuple[int, int] = 64,
    train: int = 10_000,
    validation: int = 200,
    test: int = 200,
    seed: int = 0,
) -> Splits:
    """(train, validation, test) of so many text images; none moves when another part grows.

    They are ranges of one sequence, from 0, 2³⁰ and 2³¹. Errors as ``text_images``.
    """
    make = partial(text_images, size=size, seed=seed)
    return drawn_splits("text", make, (train, validation, test))


def _render(key: Tensor, index: int, *, size: tuple[int, int]) -> np.ndarray:
    """[H,W,3] uint8 of one image."""
    from PIL import Image, ImageDraw

    draws = iter(rng.uniform(key, 96, index, rng.TEXT, torch.float64)[0].tolist())
    H, W = size
    lines = _lines(draws)
    face = int(next(draws) * len(FACES))
    width = max(_font(face, 32).getlength(line) for line in lines) / 32  # in font sizes
    fitting = min(W * (0.7 + 0.6 * next(draws)) / width, 0.8 * H / len(lines))
    font = _font(face, round(max(fitting, min(H, W) / 6, 6)))
    ground = (255, 255, 255) if next(draws) < 0.5 else _colour(draws)
    image = Image.new("RGB", (W, H), ground)
    draw = ImageDraw.Draw(image)
    step = _between(1.1 * font.size, max(1.1 * font.size, H / len(lines)), next(draws))
    top = _between(0, H - step * len(lines), next(draws))
    for number, line in enumerate(lines):
        left = _between(0, W - font.getlength(line), next(draws))
        place = (round(left), round(top + step * number))
        draw.text(place, line, font=font, fill=_ink(ground, draws), anchor="la")
    return np.asarray(image)


def _lines(draws: Iterator[float]) -> list[str]:
    """1 to 4 words on 1 to 3 lines, two on a line at most."""
    words = []
    for _ in range(1 + int(next(draws) * 4)):
        if next(draws) < 0.25:
            length = 2 + int(next(draws) * 6)
            words.append("".join(_SYMBOLS[int(next(draws) * 62)] for _ in range(length)))
        else:
            word, case = WORDS[int(next(draws) * len(WORDS))], next(draws)
            words.append(word if case < 0.6 else word.capitalize() if case < 0.85 else word.upper())
    n, fewest = len(words), (len(words) + 1) // 2
    count = fewest + int(next(draws) * (min(3, n) - fewest + 1))
    return [" ".join(words[k * n // count : (k + 1) * n // count]) for k in range(count)]


def _between(a: float, b: float, u: float) -> float:
    """A place between two, whichever is larger: text wider than the image is cut at either side."""
    return a + (b - a) * u


def _colour(draws: Iterator[float]) -> tuple[int, ...]:
    return tuple(int(next(draws) * 256) for _ in range(3))


def _luma(colour: tuple[int, ...]) -> float:
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def _ink(ground: tuple[int, ...], draws: Iterator[float]) -> tuple[int, ...]:
    """The first of four colours far enough from the ground, else black or white."""
    for colour in [_colour(draws) for _ in range(4)]:
        if abs(_luma(colour) - _luma(ground)) >= _APART:
            return colour
    return (0, 0, 0) if _luma(ground) > 0.5 else (255, 255, 255)


@lru_cache(maxsize=1024)
def _font(face: int, size: int) -> Any:
    """One of ``FACES`` at a size in pixels."""
    from PIL import ImageFont, features

    if not features.check("freetype2"):
        raise ImportError("text_images: this Pillow has no FreeType; accepted is a Pillow with it")
    folder = _folder()
    if folder is None:
        return ImageFont.load_default(size)
    path = folder / f"{FACES[face]}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1)
def _folder() -> Path | None:
    """matplotlib's folder of fonts, or None."""
    try:
        import matplotlib
    except ImportError:
        return None
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return folder if all((folder / f"{face}.ttf").exists() for face in FACES) else None
