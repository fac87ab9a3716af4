"""The loaders that bench/ingest.py compares with ours, each set up as its documentation says.

Each is a function of a `Place` that yields uint8 batches of crops [batch, 3, 224, 224] without end, from the
same JPEG bytes. It does the random resized crop of DeiT (scale 0.08 to 1, bicubic, antialiased; FFCV has only
area averaging) and the flip; timm_full also does RandAugment. No loader normalises: like ours, they leave
that to the device. No loader takes several views of a decoded image, since no documentation does. Loaders
with a format of their own (tar, beton, chunks) write it before the clock starts. Workers stay from one epoch
to the next.
"""

import importlib.util
import itertools
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

SIZE, BATCH = 224, 256
READ_AHEAD = 2  # batches of each worker, torch's default


@dataclass(frozen=True)
class Place:
    """Where the images are, and how many workers a loader may have.

    Attributes:
        folder: has images/CLASS/NAME.jpg.
        workers: number of processes, or of threads for FFCV and SPDL.
    """

    folder: Path
    workers: int

    def files(self) -> list[tuple[str, int]]:
        """(path, label) of each image."""
        classes = sorted((self.folder / "images").iterdir())
        return [(str(path), label) for label, names in enumerate(classes) for path in sorted(names.iterdir())]


def timm_full(place: Place) -> Iterator[torch.Tensor]:
    """DeiT's training transform [main.py of the reference], without erasing and normalisation.

    timm's prefetching loader does these two on the device. Only its inner loader is used, which works on the
    host.
    """
    return timm_loader(place, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")


def timm_crop(place: Place) -> Iterator[torch.Tensor]:
    return timm_loader(place, color_jitter=None)


def timm_loader(place: Place, **augmentation) -> Iterator[torch.Tensor]:
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(place.folder / "images"))
    loader = create_loader(
        dataset, (3, SIZE, SIZE), BATCH, is_training=True, interpolation="bicubic", num_workers=place.workers,
        device=torch.device("cpu"), persistent_workers=True, use_prefetcher=True, **augmentation,
    )  # fmt: skip
    return endless(loader.loader)


def torchvision_v2(place: Place) -> Iterator[torch.Tensor]:
    """The guide to torchvision's transforms: uint8 tensors, transforms.v2, a DataLoader."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(place.folder / "images"), transform_tensor(), loader=read_tensor)
    return endless(torch_loader(dataset, place.workers))


def read_tensor(path: str) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, ImageReadMode.RGB)


def transform_tensor():
    from torchvision.transforms import InterpolationMode, v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )


def transform_pil():
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    crop = transforms.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def torch_loader(dataset: Dataset, workers: int) -> DataLoader:
    return DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True,
        prefetch_factor=READ_AHEAD,
    )  # fmt: skip


def webdataset(place: Place) -> Iterator[torch.Tensor]:
    """WebDataset's ImageNet example: resampled tars, a shuffle buffer, PIL, batches made in the workers."""
    import webdataset as wds

    tars, files, transform = place.folder / "tars", place.files(), transform_pil()
    count = 4 * place.workers
    if not tars.exists():
        tars.mkdir()
        for number in range(count):
            with tarfile.open(tars / f"{number:02d}.tar", "w") as tar:
                for i, (path, label) in list(enumerate(files))[number::count]:
                    (tars / "label").write_text(str(label))
                    tar.add(Path(path).resolve(), f"{i:06d}.jpg")
                    tar.add(tars / "label", f"{i:06d}.cls")
    dataset = (
        wds.WebDataset(sorted(map(str, tars.glob("*.tar"))), resampled=True)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH)
    )
    return endless(wds.WebLoader(dataset, batch_size=None, num_workers=place.workers))


def ffcv(place: Place) -> Iterator[torch.Tensor]:
    """FFCV's ImageNet example, with JPEG images only.

    The beton holds the bytes of the files; FFCV itself would encode the pixels again.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    beton = place.folder / "images.beton"
    if not beton.exists():
        field = RGBImageField(write_mode="jpg")
        field.encode = encode_as_it_is
        DatasetWriter(str(beton), {"image": field, "label": IntField()}, num_workers=1).from_indexed_dataset(
            Files(place.files())
        )
    image = [
        RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
        RandomHorizontalFlip(),
        ToTensor(),
        ToTorchImage(),
    ]
    loader = Loader(
        str(beton), batch_size=BATCH, num_workers=place.workers, order=OrderOption.RANDOM, os_cache=True,
        drop_last=True, pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )  # fmt: skip
    return endless(loader)


def encode_as_it_is(destination, image: tuple, malloc) -> None:
    """Writes a JPEG as FFCV's image field does, without encoding it again."""
    import numpy as np

    jpeg, height, width = image
    destination["mode"], destination["height"], destination["width"] = 0, height, width
    destination["data_ptr"], storage = malloc(len(jpeg))
    storage[:] = np.frombuffer(jpeg, np.uint8)


class Files(Dataset):
    """A dataset of ((JPEG bytes, height, width), label), one for each file."""

    def __init__(self, files: list[tuple[str, int]]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple:
        from PIL import Image

        path, label = self.files[number]
        with Image.open(path) as image:
            return (Path(path).read_bytes(), image.height, image.width), label


def spdl(place: Place) -> Iterator[torch.Tensor]:
    """SPDL's DataLoader with threads. PIL decodes, since SPDL's decoders need FFmpeg, not found on PyPI."""
    from spdl.dataloader import DataLoader as SpdlLoader

    transform, paths = transform_pil(), [path for path, _ in place.files()]

    def load(path: str) -> torch.Tensor:
        from PIL import Image

        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    loader = SpdlLoader(
        Shuffled(paths),
        preprocessor=load,
        batch_size=BATCH,
        drop_last=True,
        aggregator=torch.stack,
        num_threads=place.workers,
    )
    return endless(loader)


class Shuffled:
    """Items, in another order at each iteration."""

    def __init__(self, items: list):
        self.items = items

    def __iter__(self) -> Iterator:
        return iter([self.items[i] for i in torch.randperm(len(self.items))])


def litdata(place: Place) -> Iterator[torch.Tensor]:
    """LitData's ImageNet example: `optimize` keeps JPEG bytes, the dataset decodes, transforms.v2 crops."""
    import litdata as ld

    chunks, files = place.folder / "litdata", place.files()
    if not chunks.exists():
        ld.optimize(read_pil, files, str(chunks), num_workers=1, chunk_bytes="64MB")
    dataset = ld.StreamingDataset(str(chunks), shuffle=True, drop_last=True, transform=CropImage())
    return endless(
        ld.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=place.workers, persistent_workers=True)
    )


class CropImage:
    """Turns an item of LitData into a crop, uint8 [3, SIZE, SIZE]."""

    def __init__(self):
        self.transform = transform_tensor()

    def __call__(self, item: dict) -> torch.Tensor:
        return self.transform(item["image"])


def read_pil(item: tuple[str, int]) -> dict:
    from PIL import Image

    return {"image": Image.open(str(Path(item[0]).resolve())), "class": item[1]}


def grain(place: Place) -> Iterator[torch.Tensor]:
    """The MapDataset of Grain's tutorial: shuffle, map, batch, then processes.

    PIL and torchvision decode, since Grain has no decoder.
    """
    import grain.python as pygrain

    dataset = (
        pygrain.MapDataset.source(place.files())
        .shuffle(seed=0)
        .repeat()
        .map(LoadArray())
        .batch(BATCH, drop_remainder=True)
    )
    options = pygrain.MultiprocessingOptions(num_workers=place.workers)
    return map(torch.from_numpy, dataset.to_iter_dataset().mp_prefetch(options))


class LoadArray:
    """Turns (path, label) into a crop, uint8 [3, SIZE, SIZE]."""

    def __init__(self):
        self.transform = transform_pil()

    def __call__(self, item: tuple[str, int]):
        from PIL import Image

        with Image.open(item[0]) as image:
            return self.transform(image.convert("RGB")).numpy()


def endless(loader) -> Iterator[torch.Tensor]:
    """The images of a loader's batches, epoch after epoch without end."""
    for _ in itertools.count():
        for batch in loader:
            yield batch[0] if isinstance(batch, list | tuple) else batch


CROP_ONLY: dict[str, Callable[[Place], Iterator[torch.Tensor]]] = {
    "timm_crop": timm_crop,
    "torchvision_v2": torchvision_v2,
    "webdataset": webdataset,
    "ffcv": ffcv,
    "spdl": spdl,
    "litdata": litdata,
    "grain": grain,
}
LOADERS = {"timm_full": timm_full} | CROP_ONLY
PACKAGES = ("webdataset", "ffcv", "spdl", "litdata", "grain")  # may be missing


def installed(name: str) -> bool:
    return name not in PACKAGES or importlib.util.find_spec(name) is not None
