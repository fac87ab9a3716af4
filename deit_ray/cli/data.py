"""The commands of `deit-ray data`: prepare, check, show."""

import shlex
import sys
from typing import Annotated, Literal

import typer

from deit_ray.cli.options import Address, Set, Uri, Verbose, check_overrides, fraction_of, load, overrides_of
from deit_ray.terminal.console import Console

Chroma = Literal["420", "444"]

app = typer.Typer(no_args_is_help=True, help="Prepare, check and show data sets.")
SHOWN = 20  # classes or problems that are printed at most


@app.command("prepare")
def data_prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="a folder, a file or a URI with images (docs/data.md), or: digits"
        ),
    ],
    out: Annotated[str, typer.Option(help="folder to write: a path, or file://, s3://, gs://")],
    short_side: Annotated[
        int,
        typer.Option(
            min=0, help="scale longer short sides down to this many pixels; 0 keeps the original bytes"
        ),
    ] = 256,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality")] = 92,
    chroma: Annotated[
        Chroma, typer.Option(help="444 keeps the colours of every pixel, 420 one for four pixels")
    ] = "420",
    test_short_side: Annotated[
        int, typer.Option(min=0, help="the same for the test images; 0 keeps their original bytes")
    ] = 0,
    format: Annotated[
        str | None,
        typer.Option(
            help="format of SOURCE, if it is not recognised: ilsvrc2012, folders, parquet, webdataset "
            "or arrays"
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="file with the labels of ILSVRC2012's validation images, one 'name synset' a line"),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="SUFFIX",
            help="which image of a WebDataset sample to use, if samples have several, such as jpg",
        ),
    ] = None,
    exif: Annotated[
        bool,
        typer.Option(
            "--exif",
            help="rotate images as their EXIF data says; by default they stay as they are, as in timm",
        ),
    ] = False,
    max_bad: Annotated[
        str,
        typer.Option(
            metavar="FRACTION", help="stop when a larger fraction of the images is unreadable, such as 0.1%"
        ),
    ] = "0.1%",
    address: Address = None,
    verbose: Verbose = False,
):
    """Prepare a data set: images become shards for training. A second call replaces bad shards."""
    allowed_bad = fraction_of("--max-bad", max_bad)
    console = Console()
    console.begin(f"looking at {source}")
    from deit_ray.data.prepare import prepare
    from deit_ray.terminal.progress import shown_on

    prepared = prepare(
        source,
        out,
        short_side,
        quality,
        command="deit-ray " + shlex.join(sys.argv[1:]),
        format=format,
        labels=labels,
        image=image,
        exif=exif,
        chroma=chroma,
        test_short_side=test_short_side,
        max_bad=allowed_bad,
        address=address,
        progress=shown_on(console),
        warn=console.warn,
        verbose=verbose,
    )
    _show_prepared(console, out, prepared)


def _show_prepared(console: Console, out: str, prepared) -> None:
    """Prints a `Prepared`: what was recognised, the counts of images, and warnings."""
    from deit_ray.data.listing import printable
    from deit_ray.terminal.format import counted

    manifest = prepared.manifest
    console.say(f"recognised as {manifest.source['format']}")
    for line in prepared.recognised:
        console.say(f"  {line}")
    images = ", ".join(f"{manifest.rows(split)} {split}" for split in manifest.splits)
    console.say(f"{out}: {images} images of {counted(len(manifest.classes), 'class', 'classes')}")
    for label, name in list(enumerate(manifest.classes))[:SHOWN]:
        counts = ", ".join(f"{count[label]} {split}" for split, count in manifest.class_counts.items())
        console.say(f"  {printable(name)}: {counts}")
    if len(manifest.classes) > SHOWN:
        console.say(f"  and {len(manifest.classes) - SHOWN} more classes")
    shards = sum(map(len, manifest.splits.values()))
    whole = "" if prepared.written else ": all existed and are whole"
    console.say(f"  {prepared.written} of {counted(shards, 'shard')} written{whole}")
    for note in prepared.notes:
        console.warn(note)
    for split, names in prepared.unreadable.items():
        if names:
            console.warn(
                f"{counted(len(names), 'image')} for {split} left out, since unreadable, such as "
                f"{printable(names[0])}; see {out}/unreadable.csv"
            )
    if twice := manifest.duplicates.get("count"):
        console.warn(
            f"{counted(twice, 'test image')} also among the training images, byte for byte, "
            f"such as {printable(manifest.duplicates['such as'][0])}"
        )
    if contradicting := manifest.duplicates.get("other class"):
        console.warn(
            f"{contradicting} images are also images of another class, byte for byte: one of their labels is "
            "wrong; remove the wrong copies from the source"
        )


@app.command("check")
def data_check(uri: Uri, address: Address = None, verbose: Verbose = False):
    """Check the checksums, counts, labels and images of a data set; the exit status is 1 if any is wrong."""
    console = Console()
    console.begin(f"reading {uri}")
    from deit_ray.data.check import check
    from deit_ray.terminal.progress import shown_on

    checked = check(uri, address=address, progress=shown_on(console), warn=console.warn, verbose=verbose)
    for problem in checked.problems[:SHOWN]:
        console.say(f"  {problem}", "red")
    if len(checked.problems) > SHOWN:
        console.say(f"  and {len(checked.problems) - SHOWN} more", "red")
    console.say(f"{uri}: " + checked.verdict(), "bold red" if checked.problems else "bold green")
    raise typer.Exit(1 if checked.problems else 0)


@app.command("show")
def data_show(
    uri: Uri,
    out: Annotated[str, typer.Option(help="picture to write, .png or .jpg")] = "samples.png",
    experiment: Annotated[
        str | None,
        typer.Option(
            help="experiment file that says how views are made; by default all settings are the defaults"
        ),
    ] = None,
    set: Set = [],  # noqa: B006
    samples: Annotated[int, typer.Option(min=1, max=64, help="images to show")] = 8,
    strengths: Annotated[
        bool,
        typer.Option(
            "--strengths", help="show the policy's effect at augment.strength 0, 0.5, 1, 1.5 and 2 instead"
        ),
    ] = False,
):
    """Write a contact sheet: images as they are stored and as the student sees them, with labels."""
    if experiment:
        load(experiment, set)  # a mistake in the file is reported before torch is imported
    else:
        check_overrides(set)
    console = Console()
    console.begin(f"reading {uri}")
    from deit_ray.commands.show import show

    console.say(show(uri, out, experiment, overrides_of(set), samples, strengths))
