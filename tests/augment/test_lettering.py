"""Words in pictures: every letter is drawn, or named by its number; titles do not run into each other."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from deit_ray.augment.lettering import NO_LETTER, fit_font
from deit_ray.augment.picture import LEAST_WIDTH, STRENGTHS, draw_strengths
from deit_ray.experiment.config import Experiment


def drawn(text: str) -> np.ndarray:
    font, text = fit_font(text, 14)
    picture = Image.new("L", (400, 30))
    ImageDraw.Draw(picture).text((2, 2), text, 255, font)
    return np.asarray(picture)


@pytest.mark.parametrize("word", ["cat", "café", "cafe\u0301", "Größe", "кошка", "γάτα", "القط", "naïve ½"])
def test_letters_of_most_alphabets_are_drawn(word):
    font, text = fit_font(word, 14)
    assert text == word
    sign = bytes(font.getmask(NO_LETTER))
    assert all(bytes(font.getmask(letter)) != sign for letter in word if not letter.isspace())
    assert drawn(word).any()


@pytest.mark.parametrize("word", ["\U000f1234", "a \U000f1234\U000f1235 cat"])
def test_letters_that_no_font_has_are_named(word):
    assert fit_font(word, 14)[1] in ("U+F1234", "a U+F1234 U+F1235 cat")
    assert (drawn(word) != drawn(word.replace("\U000f1234", "\U000f1236"))).any()  # two names stay two names


@pytest.mark.parametrize("size", [8, 16, 32, 96, 224])
def test_titles_of_strengths_have_room(size):
    section = Experiment.model_validate(
        {"name": "x", "data": {"uri": "x"}, "distillation": {"kind": "none"}}
    ).augment
    picture = draw_strengths(np.zeros((1, size, size, 3), np.uint8), section, [0.5] * 3, [0.5] * 3)
    column = (picture.width + 4) / len(STRENGTHS)
    widest = max(
        fit_font(f"strength {strength:g}", 14)[0].getlength(f"strength {strength:g}")
        for strength in STRENGTHS
    )
    assert column - 4 >= LEAST_WIDTH > widest
