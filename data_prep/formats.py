"""The formats that pixels are prepared in, and their writers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.writers import Writer, dali, ffcv
from semi_fast.data_prep.writers.resident import needed_bytes

FORMATS = ("resident", "ffcv", "dali")
IMAGE_FORMATS = ("raw", "png", "jpeg")


@dataclass(frozen=True)
class Formats:
    """What the pixels are written as."""

    names: tuple[str, ...] = ("resident",)
    """Of `FORMATS`, at least one."""
    image_format: str = "raw"
    """What DALI's shards hold: raw, png or jpeg."""
    quality: int = 95
    """Of jpeg."""

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in FORMATS or self.names.count(name) > 1:
                raise ValueError(
                    f"--formats must be some of {','.join(FORMATS)}, each once; got {','.join(self.names)}"
                )
        if not self.names:
            raise ValueError(f"--formats must name at least one of {','.join(FORMATS)}")
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(f"--image-format must be one of {', '.join(IMAGE_FORMATS)}; got {self.image_format}")
        if self.image_format == "jpeg" and self.names == ("dali",):
            raise ValueError("--image-format jpeg does not keep the pixels exactly: add resident or ffcv to --formats")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must lie in 1..100; got {self.quality}")
        if self.quality != Formats.quality and self.image_format != "jpeg":
            raise ValueError(f"--quality is of --image-format jpeg; got {self.image_format}: leave out --quality")
        if self.image_format != "raw" and "dali" not in self.names:
            raise ValueError(
                f"--image-format {self.image_format} is of DALI's shards; got --formats {','.join(self.names)}: add "
                "dali, or leave out --image-format"
            )

    @property
    def arguments(self) -> str:
        """The flags of the command that are not the defaults."""
        given = ["" if self.names == ("resident",) else f" --formats {','.join(self.names)}"]
        if "dali" in self.names and self.image_format != "raw":
            given.append(f" --image-format {self.image_format}")
            given.append(f" --quality {self.quality}" if self.image_format == "jpeg" else "")
        return "".join(given)

    def needed_bytes(self, raw: Raw) -> int:
        """Disk space for `raw` in these formats, a little more than it takes."""
        needed = needed_bytes(raw, images="resident" in self.names)
        if "ffcv" in self.names:
            needed += ffcv.needed_bytes(raw)
        if "dali" in self.names:
            needed += dali.needed_bytes(raw, self.image_format)
        return needed

    def writers(self, raw: Raw, root: Path) -> list[Writer]:
        """Those of the containers."""
        found: list[Writer] = []
        if "ffcv" in self.names:
            found.append(ffcv.FfcvWriter(raw, root))
        if "dali" in self.names:
            found.append(dali.DaliWriter(raw, root, image_format=self.image_format, quality=self.quality))
        return found


RESIDENT = Formats()
