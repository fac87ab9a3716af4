"""Fonts for pictures: one that has every letter of a text, or the text without the letters that none has."""

import importlib.util
from functools import cache
from pathlib import Path

from PIL import ImageFont

# PIL looks for these in the folders of the system's fonts. The first that has all letters of a text is used.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "DroidSansFallbackFull.ttf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "unifont.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "arialuni.ttf",
)
NO_LETTER = "\U0010ffff"  # no font has it: it is drawn as the font's sign for a missing letter


def fit_font(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """Returns (a font, the text to draw with it).

    A letter that no font has is replaced by its number, such as U+732B.

    Args:
        size: of the letters, in pixels.
    """
    fonts = _fonts(size)
    for font in fonts:
        if not _missing(font, text):
            return font, text
    best = min(fonts, key=lambda font: len(_missing(font, text)))
    missing = _missing(best, text)
    drawn = "".join(f" U+{ord(letter):04X} " if letter in missing else letter for letter in text)
    return best, " ".join(drawn.split())


@cache
def _fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """PIL's own font, DejaVu Sans as it comes with Matplotlib, and what the system has of SYSTEM_FONTS."""
    found = [ImageFont.load_default(size)]
    package = importlib.util.find_spec("matplotlib")
    if package and package.origin:
        file = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            found.append(ImageFont.truetype(str(file), size))
    for name in SYSTEM_FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # the system does not have it
            continue
    return found


def _missing(font: ImageFont.FreeTypeFont, text: str) -> set[str]:
    """The letters of a text that a font does not have."""
    sign = _shape(font, NO_LETTER)
    return {letter for letter in set(text) if not letter.isspace() and _shape(font, letter) == sign}


@cache
def _shape(font: ImageFont.FreeTypeFont, letter: str) -> tuple:
    """A letter's picture, to compare with others."""
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
