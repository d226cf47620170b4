"""What data/*/prepare.py share: a public data set, downloaded or from a local file -> nanopost's JSON Lines.

    rows = load(url, folder, file, keys, published)     (where, row) of the publisher's file, checked
    records = convert(rows, function)                   the function of each row; what it drops is counted
    train, valid = hold_out(records, share)             where the publisher has no validation split
    save(folder, sft, pairs)                            sft_, pairs_ and prompts_ {train,valid}.jsonl, all or none
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import sys
import urllib.request
import zlib

from tqdm import tqdm

from nanopost.checkpoint import atomic
from nanopost.config import UserError
from nanopost.data import count, parse_records, report, require


class Drop(Exception):
    """Raised for a row that cannot be used; its text ends the sentence "dropped 3 ..."."""


# --------------------------------------------------------------------------------------------------------- reading


def load(url: str, folder: str, file: str, keys: tuple, published: int):
    """Yields (where, row) of a local file, or, if `file` is empty, of what the url gives, kept in folder/download.

    Raises UserError for a row without one of the keys. A download that cannot be used is removed, so that the next run
    fetches it again; one that is whole, but not of as many rows as were published, is used with a warning.
    """
    if (file or url).endswith(".parquet"):
        import_pyarrow(file or url)  # before a long download that could not be read
    path, rows = file or fetch(url, os.path.join(folder, "download")), 0
    try:
        for where, row in tqdm(read(path), desc=os.path.basename(path), unit=" rows", disable=None, leave=False):
            require(where, row, *keys)
            yield where, row
            rows += 1
        if not rows:
            raise UserError(f"{path} holds no records")
    except UserError:
        if not file:
            os.remove(path)
        raise
    if not file and rows != published:
        print(f"warning: {path} has {rows:,} records, {published:,} were published; {url} may have changed",
              file=sys.stderr)


def fetch(url: str, folder: str) -> str:
    """The path of the download, made unless it is there. Raises UserError, and leaves nothing, if it does not arrive
    whole."""
    path = os.path.join(folder, url.split("/main/")[-1].replace("/", "-"))
    if os.path.isfile(path):
        print(f"{path} is there already and not downloaded again")
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size, got = int(response.headers.get("Content-Length") or 0), 0
            os.makedirs(folder, exist_ok=True)
            with atomic(path, "wb") as f, tqdm(desc=url, total=size or None, unit="B", unit_scale=True, disable=None,
                                               dynamic_ncols=True) as bar:
                while block := response.read(1 << 18):
                    f.write(block)
                    bar.update(len(block))
                    got += len(block)
                if got < size or not got:  # a connection that breaks off is not always an exception
                    raise OSError(f"{got:,} of {size:,} bytes came")
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
        reason = " ".join(str(error).split()).strip("<>") or type(error).__name__
        raise UserError(f"{url} could not be downloaded ({reason}); go online, or give a local copy: --file") from None
    return path


def read(path: str):
    """Yields (where, row) of JSON Lines or a JSON list, either of them gzipped or not, or of a parquet file.

    where is "file:line", or "file[index]", counted from 0, for a list or parquet. Raises UserError for a missing or a
    broken file, and for a row that is not an object.
    """
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    with open(path, "rb") as f:
        if f.read(4) == b"PAR1":
            yield from read_parquet(path)
            return
        f.seek(0)
        data = f.read()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: broken gzip file ({error}); get it again") from None
    if not data[:100].lstrip().startswith(b"["):
        yield from parse_records(path, io.BytesIO(data))
        return
    try:
        rows = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: invalid JSON: {error.msg} at column {error.colno}") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}[{i}]: a record must be an object, not {json.dumps(row)[:40]}")
        yield f"{path}[{i}]", row


def import_pyarrow(path: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow, or give JSON Lines: --file") from None
    return pyarrow.parquet


def read_parquet(path: str):
    try:
        i = 0
        for batch in import_pyarrow(path).ParquetFile(path).iter_batches(1024):  # never the whole file in memory
            for row in batch.to_pylist():
                yield f"{path}[{i}]", row
                i += 1
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: broken parquet file ({str(error).splitlines()[0]}); get it again") from None


def text(where: str, row: dict, key: str) -> str:
    """row[key] without the white space around it. Raises UserError if it is no string."""
    if not isinstance(row[key], str):
        raise UserError(f"{where}: {key} must be a string, not {json.dumps(row[key])[:40]}")
    return row[key].strip()


# ------------------------------------------------------------------------------------------------------ converting


def convert(rows, function, name: str) -> list[dict]:
    """[function(where, row)] without the rows for which it raises Drop. Prints how many there are, and how many were
    dropped and why; raises UserError if none is left."""
    records, dropped = [], {}
    for where, row in rows:
        try:
            records.append(function(where, row))
        except Drop as reason:
            count(dropped, str(reason))
    report(name, len(records), "records", dropped)
    return records


def demonstrations(pairs: list[dict]) -> list[dict]:
    """SFT records from preferences: the chosen answers are imitated."""
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]


def identity(record: dict) -> str:
    """The prompt, a string or a conversation, as a string to compare and to hash."""
    return json.dumps(record["prompt"])


def hold_out(records: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """(train, valid): about this share of the prompts is held out, with all the records of each.

    A hash of the prompt alone decides, so that a prompt is on the same side in every file, order and version.
    """
    sides = [], []
    for record in records:
        digest = hashlib.sha256(identity(record).encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < share * 2**64].append(record)
    return sides


# --------------------------------------------------------------------------------------------------------- writing


def save(folder: str, sft: tuple, pairs: tuple):
    """Writes (train, valid) of SFT records and of pairs, and the prompts of both: up to six files, all or none.

    A training record whose prompt is held out is dropped and counted: publishers' splits do overlap. Of a kind that has
    no records (instructions without preferences) there is no file; one of an earlier run would not belong and is
    removed. Raises UserError if training or validation is left without records.
    """
    held, dropped, files = {identity(record) for record in sft[1] + pairs[1]}, 0, {}
    for i, split in enumerate(("train", "valid")):
        both = [], []
        for records, kept in zip((sft[i], pairs[i]), both):
            kept += [r for r in records if split == "valid" or identity(r) not in held]
            dropped += len(records) - len(kept)
        prompts = {identity(r): {"prompt": r["prompt"]} for r in both[0] + both[1]}
        if not prompts:
            raise UserError(f"{folder}: no records for {split}; too few of them are there to be split")
        files |= {f"{name}_{split}.jsonl": records
                  for name, records in zip(("sft", "pairs", "prompts"), (*both, list(prompts.values())))}
    os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, records in files.items():
            if records:
                f = stack.enter_context(atomic(os.path.join(folder, name)))
                f.writelines(json.dumps(record) + "\n" for record in records)
                f.flush()  # a full disk shows here, before the first file gets its name
    for name, records in files.items():
        if not records:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    if dropped:
        print(f"dropped {dropped:,} training records whose prompt is held out")
    print(f"{folder}: " + ", ".join(f"{name} {len(records):,}" for name, records in files.items() if records))
