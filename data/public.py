"""What data/*/prepare.py share: a public data set, downloaded or local, becomes nanopost's JSON Lines.

    rows = load_rows(url, folder, published, file)    (where, row) of the publisher's file
    records = convert(rows, function, name)           function(where, row) of each; what it drops is counted
    train, valid = hold_out(records, share)           if the publisher has no validation split
    save(folder, sft, pairs)                          {sft,pairs,prompts}_{train,valid}.jsonl, all or none

The scripts of data/notes write with write_files, too: all files or none. Only parquet needs an extra package, pyarrow.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import sys
from http.client import HTTPException
from pathlib import Path

from nanopost.config import UserError
from nanopost.files import atomic
from nanopost.records import Drop, parse_records, require


def load_rows(url: str, folder: str, published: int, file: str = "") -> list[tuple[str, dict]]:
    """[(where, row), ...] of the local `file` or, if that is empty, of the url, which is downloaded only once.

    A download that is broken is removed; one with another number of rows than was published is used with a warning.
    """
    if file:
        return read_rows(file)
    if url.endswith(".parquet"):
        import_parquet()  # before a long download that could not be read
    path = download(url, folder)
    try:
        rows = read_rows(path)
    except UserError:
        os.remove(path)
        raise
    if len(rows) != published:
        counts = f"has {len(rows):,} records, {published:,} were published"
        print(f"warning: {path} {counts}; delete it to download it again from {url}", file=sys.stderr)
    return rows


def download(url: str, folder: str) -> str:
    """The path of the downloaded file. Raises UserError, and leaves no file, if the download fails."""
    path = os.path.join(folder, "download", url.split("/main/")[-1].replace("/", "-"))
    if os.path.isfile(path):
        print(f"{path} is already there and is not downloaded again")
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    import torch  # not above: importing it takes two seconds, and data/notes downloads nothing

    try:
        torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
    except (OSError, HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{url} could not be downloaded ({reason}); go online, or give a local copy: --file") from None
    return path


def read_rows(path: str) -> list[tuple[str, dict]]:
    """[(where, row), ...] of parquet, a JSON list or JSON Lines, gzipped or not. Raises UserError if it is broken.

    where is "file:line" in JSON Lines, otherwise "file[index]", counted from 0.
    """
    if not os.path.isfile(path):  # a pipe would never end
        raise UserError(f"no file {path}")
    with open(path, "rb") as f:
        data = f.read()
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        if data.startswith(b"PAR1"):
            rows = import_parquet().read_table(io.BytesIO(data)).to_pylist()
        elif data[:100].lstrip().startswith(b"["):
            rows = json.loads(data)
        else:
            return list(parse_records(path, data.splitlines()))
    except UserError:
        raise
    except Exception as error:  # a corrupt file can raise anything, even MemoryError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is broken: {reason}; get it again") from None
    rows = [(f"{path}[{i}]", row) for i, row in enumerate(rows)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: a record must be an object, not {json.dumps(row, default=str)[:40]}")
    return rows


def import_parquet():
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet needs pyarrow; pip install pyarrow, or give JSON Lines: --file") from None
    return parquet


def string_of(where: str, row: dict, key: str) -> str:
    """row[key] without surrounding white space. Raises UserError if it is not a string."""
    require(where, row, key)
    if not isinstance(row[key], str):
        raise UserError(f"{where}: {key} must be a string, not {json.dumps(row[key], default=str)[:40]}")
    return row[key].strip()


def pair_of(chosen: list[dict], rejected: list[dict]) -> dict:
    """The pair in two conversations that differ in their last message only. Raises Drop if there is none."""
    if not all(message["content"] for message in chosen + rejected):
        raise Drop("with an empty turn")
    if chosen[:-1] != rejected[:-1]:
        raise Drop("with two different prompts")
    if chosen == rejected:
        raise Drop("with two equal answers")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def demonstrations(pairs: list[dict]) -> list[dict]:
    """SFT records from preferences: the chosen answers are imitated."""
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]


def identity(record: dict) -> str:
    """The prompt, a string or a conversation, as a string to compare and to hash."""
    return json.dumps(record["prompt"])


def hold_out(records: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """(train, valid): about this share of the prompts is held out, each with all its records.

    Only a hash of the prompt decides, so a prompt is on the same side in every file, order and version.
    """
    train, valid = [], []
    for record in records:
        digest = hashlib.sha256(identity(record).encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < share * 2**64
        (valid if held_out else train).append(record)
    return train, valid


def save(folder: str, sft: tuple, pairs: tuple):
    """Writes (train, valid) of SFT records and of pairs, and the prompts of both: up to six files, all or none.

    A training record whose prompt is held out is dropped and counted: publishers' splits do overlap. A kind without
    records has no file; one that an earlier run left is removed. Raises UserError if a split is empty.
    """
    files = {"sft_train": sft[0], "sft_valid": sft[1], "pairs_train": pairs[0], "pairs_valid": pairs[1]}
    held_out = {identity(record) for record in sft[1] + pairs[1]}
    for name in ("sft_train", "pairs_train"):
        files[name] = [record for record in files[name] if identity(record) not in held_out]
    for split in ("train", "valid"):
        prompts = {identity(r): {"prompt": r["prompt"]} for r in files[f"sft_{split}"] + files[f"pairs_{split}"]}
        if not prompts:
            raise UserError(f"{folder}: too few records to split; none is left for {split}")
        files[f"prompts_{split}"] = list(prompts.values())

    write_files(folder, {f"{name}.jsonl": map(json.dumps, records) for name, records in files.items() if records})
    for name, records in files.items():
        if not records:
            Path(folder, f"{name}.jsonl").unlink(missing_ok=True)

    dropped = len(sft[0] + pairs[0]) - len(files["sft_train"] + files["pairs_train"])
    if dropped:
        print(f"dropped {dropped:,} training records whose prompt is held out")
    print(f"{folder}: " + ", ".join(f"{name} {len(records):,}" for name, records in files.items() if records))


def write_files(folder: str, files: dict):
    """Writes {name: lines} into the folder, which is made if need be: all files or none."""
    os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, lines in files.items():
            f = stack.enter_context(atomic(os.path.join(folder, name)))
            f.writelines(line + "\n" for line in lines)
            f.flush()  # a full disk shows here, before the first file gets its name
