"""Files that appear under their name only when they are complete and on the disk."""

import contextlib
import os


@contextlib.contextmanager
def naming(path: str):
    """Gives an error of the disk the name of the file, which it does not know. torch.save hides it in its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, path) from None


@contextlib.contextmanager
def atomic(path: str, mode: str = "w"):
    """Opens a file that appears under its name only when it is complete and on the disk."""
    temporary = f"{path}.tmp"
    remove(temporary)  # of a killed run, or a link that someone put there
    try:
        with naming(path), open(temporary, mode.replace("w", "x")) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path: str):
    """Deletes a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def remove_link(path: str):
    """Deletes what is no folder of ours but a link to one."""
    if os.path.islink(path):
        os.remove(path)
