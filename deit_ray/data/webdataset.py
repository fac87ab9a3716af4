"""WebDataset: tars of samples, each an image and a label with the same key. Nothing is unpacked."""

import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from deit_ray import storage
from deit_ray.data.labels import numbered_classes
from deit_ray.data.listing import (
    TEST_FRACTION,
    Ranges,
    Source,
    Split,
    Unused,
    find_split,
    listing,
    printable,
    split_by_class,
    split_of_folder,
    split_word,
)
from deit_ray.data.tarfiles import index
from deit_ray.data.walk import image_suffixes, reason_to_skip, suffix_of
from deit_ray.errors import UserError
from deit_ray.terminal.format import counted

LABEL = ".cls"
SAMPLE = "a sample is KEY.jpg and KEY.cls"
CLASS_FILES = ("classnames.txt", "classes.txt")
NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*([eE][-+]?\d+)?|[-+]?(nan|inf)", re.IGNORECASE)
DIGITS = 9  # of a label; a longer one can be no class number


def webdataset(uris: list[str], folder: str, image: str | None = None) -> Source:
    """WebDataset: tars of samples KEY.jpg and KEY.cls, the label a number or a word.

    A word in a tar's name or folder names its split. Class names come from classnames.txt (or classes.txt) in
    the folder; without such a file, the labels are the class names.

    Args:
        image: of samples with several images, what follows the key in the names of those to use, such as
            jpg or input.jpg.

    Raises:
        UserError: a tar or a sample is broken or ambiguous, or no tar belongs to the training split.
    """
    by_split: dict[str, list[str]] = {}
    for uri in uris:
        by_split.setdefault(split_word(uri[len(folder) :]), []).append(uri)
    test, others = find_split(by_split)
    chosen = {"train": by_split.get("train", [])} | ({"test": by_split[test]} if test else {})
    notes = [f"the {len(by_split[o])} tars named {o} are not used: {test} is the test split" for o in others]
    if not chosen["train"] and not test:
        chosen = {"train": uris}
    elif not chosen["train"]:
        raise UserError(f"{folder}: has tars named {test}, but none named train, such as train-000000.tar")
    elif "" in by_split:
        named = ", ".join(uri.rpartition("/")[2] for uri in by_split[""][:3])
        notes.append(
            f"{len(by_split[''])} tars are not used, since no word in their names is a split: {named}"
        )
    unused = Unused()
    found = {split: _Samples(files, image, unused, notes) for split, files in chosen.items()}
    classes = _classes(folder, found)
    splits = {split: samples.split(classes) for split, samples in found.items()}
    recognised = [f"{split}: {samples.described()}" for split, samples in found.items()]
    if "test" not in splits:
        splits = split_by_class(splits["train"].images, splits["train"].reader)
        recognised.append(
            f"test: {TEST_FRACTION:.0%} of each class are kept for testing, since no tar is for it"
        )
    return Source("webdataset", classes, splits, notes + unused.notes(), recognised)


def _classes(folder: str, found: dict[str, "_Samples"]) -> list[str]:
    """The class names, by label."""
    kinds = {text.isdigit() for samples in found.values() for text in samples.labels}
    if len(kinds) > 1:
        examples = [
            next(t for s in found.values() for t in s.labels if t.isdigit() == kind) for kind in kinds
        ]
        raise UserError(
            f"{folder}: the labels are numbers and words, such as {' and '.join(sorted(examples))}"
        )
    names = set(storage.list_names(folder))
    file = next((storage.join(folder, name) for name in CLASS_FILES if name in names), None)
    if kinds == {True}:
        numbers = np.concatenate([np.array(samples.labels, np.int64) for samples in found.values()])
        if file:
            return read_class_names(file, int(numbers.max()) + 1)
        return numbered_classes(numbers, folder, "sample")
    return read_class_names(file, 1) if file else sorted(set(found["train"].labels))


def read_class_names(uri: str, least: int) -> list[str]:
    """The class names of a file with one name on each line."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{uri}: is not text in UTF-8; it must hold a class name on each line") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) < least:
        raise UserError(f"{uri}: has {len(names)} class names, but there are labels up to {least - 1}")
    return names


@dataclass(frozen=True)
class _Member:
    """A file in a tar.

    Attributes:
        name: its name in the tar.
        stem: the normalised name without its last suffix.
        place: (offset, size).
    """

    name: str
    stem: str
    place: tuple[int, int]

    def field_of(self, key: str) -> str:
        """What follows a key in the name, such as jpg or input.jpg."""
        return posixpath.normpath(self.name)[len(key) + 1 :].lower()


@dataclass
class _Tar:
    """The images and labels of a tar, and how many members have which suffix."""

    uri: str
    images: list[_Member] = field(default_factory=list)
    labels: dict[str, _Member] = field(default_factory=dict)
    suffixes: Counter = field(default_factory=Counter)


class _Samples:
    """The samples of a split.

    Attributes:
        labels: the label of each sample, as text: digits, or a word.
    """

    def __init__(self, uris: list[str], image: str | None, unused: Unused, notes: list[str]):
        self.uris, self.image, self.unused = uris, image, unused
        self.parts: list[list[_Member]] = []
        self.labels: list[str] = []
        self.suffixes: Counter[str] = Counter()
        keys, twice = set(), []
        for uri in uris:
            tar = self._read(uri, notes)
            pairs = self._pair(tar)
            self.parts.append([image for image, _ in pairs])
            self.labels += _read_labels(uri, [label for _, label in pairs])
            self.suffixes.update(suffix_of(image.name) for image, _ in pairs)
            inside = {hash(label.stem) for _, label in pairs}
            if inside & keys:
                twice.append(uri.rpartition("/")[2])
            keys |= inside
        if twice:
            notes.append(
                f"{len(twice)} tars hold keys that an earlier tar holds too, such as {twice[0]}; they are "
                "used as different samples: is a tar there twice?"
            )

    def _read(self, uri: str, notes: list[str]) -> _Tar:
        found, tar, names, inside = index(uri, self.unused), _Tar(uri), set(), set()
        notes += found.notes
        for name, *place in found.members:
            path = posixpath.normpath(name).lstrip("/")
            folders, _, base = path.rpartition("/")
            reasons = [reason_to_skip(part, True) for part in folders.split("/")] + [
                reason_to_skip(base, False)
            ]
            if reason := next((reason for reason in reasons if reason), None):
                self.unused.add(name, reason)
                continue
            inside |= {split_of_folder(part) for part in folders.split("/")} - {""}
            suffix = posixpath.splitext(base)[1].lower()
            member = _Member(name, posixpath.normpath(name)[: -len(suffix) or None], tuple(place))
            tar.suffixes[suffix or "without a suffix"] += 1
            if suffix not in (LABEL, *image_suffixes()):
                known = suffix_of(base) or "without a suffix"
                self.unused.add(name, f"neither an image that Pillow reads nor a label: {known}")
                continue
            if path in names:
                raise UserError(f"{uri}: {printable(name)} is in it twice; a key must stand for one sample")
            names.add(path)
            if suffix == LABEL:
                tar.labels[member.stem] = member
            else:
                tar.images.append(member)
        if len(inside) > 1:
            raise UserError(
                f"{uri}: its members lie in folders for {' and '.join(sorted(inside))}; make a tar for each "
                "split, with that word in its name"
            )
        return tar

    def _pair(self, tar: _Tar) -> list[tuple[_Member, _Member]]:
        """(image, label) of each sample, in the order of the images."""
        if not tar.images or not tar.labels:
            seen = ", ".join(f"{count} {suffix}" for suffix, count in tar.suffixes.most_common()) or "nothing"
            hint = ""
            if tar.images:
                hint = "; if folders are the classes, unpack it and prepare the folder that holds them"
            raise UserError(f"{tar.uri}: holds no samples; {SAMPLE}; it holds {seen}{hint}")
        longer = {prefix: stem for stem in tar.labels for prefix in _prefixes(stem)}
        by_key: dict[str, list[_Member]] = {}
        for image in tar.images:
            stems = (image.stem, *_prefixes(image.stem))
            key = next((stem for stem in stems if stem in tar.labels), longer.get(image.stem))
            if key is None:
                raise UserError(f"{tar.uri}: {self._without_label(image, tar)}")
            by_key.setdefault(key, []).append(image)
        for stem in tar.labels.keys() - by_key.keys():
            self.unused.add(tar.labels[stem].name, "labels without an image")
        return [(self._choose(tar.uri, key, images), tar.labels[key]) for key, images in by_key.items()]

    def _without_label(self, image: _Member, tar: _Tar) -> str:
        labels = ", ".join(printable(label.name) for label in list(tar.labels.values())[:3])
        return f"{printable(image.name)} has no label; {SAMPLE}; the labels there are {labels} and so on"

    def _choose(self, uri: str, key: str, images: list[_Member]) -> _Member:
        """The image of a sample; further images, such as KEY.mask.png, are counted as unused."""
        fields = [image.field_of(key) for image in images]
        if self.image:
            wanted = self.image.lower().lstrip(".")
            chosen = [image for image, name in zip(images, fields, strict=True) if name == wanted]
            problem = f"{printable(key)} has no image {wanted}: it has {', '.join(fields)} (--image)"
        else:
            exact = [image for image in images if image.stem == key]
            chosen = exact or images
            problem = (
                f"{printable(key)} has {len(chosen)} images ({', '.join(fields)}); choose one with "
                f"--image {fields[0]}"
            )
        if len(chosen) != 1:
            raise UserError(f"{uri}: {problem}")
        for image, name in zip(images, fields, strict=True):
            if image is not chosen[0]:
                self.unused.add(image.name, f"another image of the sample is used: {name}")
        return chosen[0]

    def split(self, classes: list[str]) -> Split:
        """The split's images, labelled by their places in `classes`.

        Raises:
            UserError: a label is none of the classes.
        """
        places = {name: number for number, name in enumerate(classes)}
        numbers = [int(text) if text.isdigit() else places.get(text, -1) for text in self.labels]
        if -1 in numbers:
            word = self.labels[numbers.index(-1)]
            raise UserError(f"{self.uris[0]}: the label {word} is none of the {len(classes)} classes")
        parts, first = [], 0
        for number, images in enumerate(self.parts):
            offsets, sizes = zip(*(image.place for image in images), strict=True)
            names, labels = [image.name for image in images], numbers[first : first + len(images)]
            parts.append(listing(names, labels, number, offsets, sizes))
            first += len(images)
        return Split(pa.concat_tables(parts).combine_chunks(), Ranges(tuple(self.uris)))

    def described(self) -> str:
        """Counts tars, samples and suffixes."""
        listed = ", ".join(f"{count} {suffix}" for suffix, count in self.suffixes.most_common())
        one, last = (uri.rpartition("/")[2] for uri in (self.uris[0], self.uris[-1]))
        tars = f"{len(self.uris)} tars ({one} to {last})" if len(self.uris) > 1 else one
        return f"{tars}: {counted(len(self.labels), 'sample')} ({listed}; labels {LABEL})"


def _prefixes(stem: str) -> Iterator[str]:
    """The stem without its last dotted part, without its last two, and so on, within its last folder."""
    folder, slash, base = stem.rpartition("/")
    parts = base.split(".")
    yield from (folder + slash + ".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))


def _read_labels(uri: str, labels: list[_Member]) -> list[str]:
    """The text of each label: digits, or a word.

    Raises:
        UserError: a label is neither.
    """
    offsets, sizes = zip(*(label.place for label in labels), strict=True)
    contents = Ranges((uri,)).read(listing([label.name for label in labels], 0, 0, offsets, sizes))
    found = []
    for label, content in zip(labels, contents, strict=True):
        text = content.decode(errors="replace").strip() if isinstance(content, bytes) else ""
        is_number = text.isascii() and text.isdigit()
        if is_number:
            wrong = len(text.lstrip("0")) > DIGITS
        else:
            wrong = not text.isprintable() or not text or NUMBER.fullmatch(text) or "\ufffd" in text
        if wrong:
            raise UserError(
                f"{uri}: {printable(label.name)}: is {printable(text[:40]) or 'empty'}; must be the number "
                "of the class, from 0, or a word"
            )
        found.append(str(int(text)) if is_number else text)
    return found
