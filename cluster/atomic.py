"""Small files that a reader sees whole, as they were or as they are now."""

import os
import threading
from pathlib import Path


def write_atomically(path: Path, text: str, durable: bool = False) -> None:
    """Write `text` beside its place and rename it; makes the folder if need be.

    `durable`: the text is on the disk before it takes the place. Raises OSError, and leaves then what was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
