"""One HTML page about a study, with pictures of its data."""

import io

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.study.page import Picture, is_page, make_page
from deit_ray.study.story import tell
from deit_ray.study.study import Study, replace_file
from deit_ray.terminal.session import Session

IMAGES = 4  # training images that each picture shows
QUALITY = 85  # of the JPEGs


def report(study: str, out: str | None = None, session: Session | None = None) -> str:
    """Writes what a study has found as one HTML page, which opens without a network.

    A file of that name that another program has written is kept under another name.

    Args:
        study: name of a study, such as digits_search-1, or digits_search for the newest.
        out: URI of the file; by default STUDY.html in the working directory.
        session: see `Session`; the study is looked up in its `results`.

    Returns:
        The URI of the file.

    Raises:
        UserError: there is no such study, or the file cannot be written.
    """
    session = session or Session()
    found = Study.open(study, session.results)
    out = out or f"{found.name}.html"
    storage.check_writable("--out", out.rpartition("/")[0] or ".")
    best = found.find_best()
    experiment = found.experiment if best is None else found.trial_experiment(best.params)
    content = make_page(tell(found), data_pictures(experiment))
    replace_file(out, content, is_page, session.console.warn)
    return out


def data_pictures(experiment: Experiment) -> list[Picture]:
    """What `data show` shows of the data set of an experiment: its images, and the augmentation's strengths.

    A picture that cannot be drawn, such as of data that are gone, says why.
    """
    from deit_ray.commands.show import draw_sheet

    titles = {
        False: "What the student sees: each image as it is stored, then its views",
        True: "What the augmentation does at each augment.strength",
    }
    pictures = []
    for strengths, title in titles.items():
        try:
            sheet, shown = draw_sheet(experiment, IMAGES, strengths)
        except UserError as error:
            pictures.append(Picture(title, f"It cannot be drawn here: {error}"))
            continue
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=QUALITY)
        note = f"{shown}, of {experiment.data.uri}"
        pictures.append(Picture(title, note, buffer.getvalue(), sheet.width))
    return pictures
