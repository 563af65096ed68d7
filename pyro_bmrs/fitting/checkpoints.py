"""Checkpoints of a fit: one safetensors file each, whole or not there, with its JSON in the header."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from pyro_bmrs.files import (
    NewerFileError,
    clear_unfinished,
    read_tensors,
    refuse_newer,
    write_atomically,
    write_tensors,
)

FORMAT, VERSION = "pyro_bmrs.checkpoint", 1
LEDGER_COLUMNS = ["epoch", "layer", "unit", "score", "log_evidence_change"]
# Written by a fit along rising KL weights, beside the checkpoints.
_STAGE = re.compile(r"stage-\d\d\.safetensors")
_NAME = re.compile(r"epoch-(\d+)(?:-batch-(\d+))?\.safetensors")


@dataclass
class FitState:
    """How far a fit has come, beside its tensors.

    Attributes:
        epoch: finished epochs.
        batch: finished batches of the epoch that follows.
        steps: (loss, log-likelihood, examples) of each of these batches.
        history, removals: rows so far.
        best_score, best_epoch: of the epoch whose parameters would be kept.
        finished: whether the fit has ended without an interruption.
    """

    epoch: NonNegativeInt = 0
    batch: NonNegativeInt = 0
    steps: list[tuple[float, float, float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    removals: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = float("inf")
    best_epoch: NonNegativeInt = 0
    finished: bool = False

    __pydantic_config__ = ConfigDict(extra="forbid")


def _state(entries: Mapping[str, Any]) -> FitState:
    """The state in a checkpoint's header; raises ValueError if it is damaged."""
    try:
        return TypeAdapter(FitState).validate_json(json.dumps(entries), strict=True)
    except ValidationError:
        raise ValueError("its progress is damaged") from None


def stage_file(folder: Path, number: int) -> Path:
    """Where the state of a stage is."""
    return folder / f"stage-{number:02d}.safetensors"


def stage_files(folder: Path) -> list[Path]:
    """Those that are there, the first stage first."""
    return sorted(path for path in folder.glob("*") if _STAGE.fullmatch(path.name))


def changes_between(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A text for each setting that differs."""
    return [
        f"{name} {before.get(name)!r} → {now.get(name)!r}"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name)
    ]


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A text that differs for tensors of other values."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(tensor.detach().cpu().double().numpy().tobytes())
    return found.hexdigest()


class Checkpoints:
    """The checkpoints of one fit in a folder.

    Args:
        folder: created if it is missing.
        keep: how many of the newest are kept, each with that of the best epoch before it.
        settings: what tells this fit from others; must be JSON.
    """

    def __init__(self, folder: Path | str, keep: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.keep = Path(folder), keep
        self.settings = json.loads(json.dumps(settings))

    @property
    def ledger(self) -> Path:
        """The file of the removals so far, a row each. A running fit only appends to it."""
        return self.folder / "ledger.csv"

    def save(self, progress: FitState, tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint, and delete those that are no longer needed."""
        part = f"-batch-{progress.batch:06d}" if progress.batch else ""
        path = self.folder / f"epoch-{progress.epoch:04d}{part}.safetensors"
        header = {
            "format": FORMAT, "version": VERSION, "settings": self.settings, "progress": asdict(progress),
        }  # fmt: skip
        write_tensors(path, tensors, header)
        self._delete_old(path)
        return path

    def _delete_old(self, saved: Path) -> None:
        """Keep the newest, and the best epoch of each. Any after the one just saved can't be read, and is left."""
        paths = self._paths()
        paths = paths[paths.index(saved) :]
        newest = paths[: self.keep]
        needed = {*newest, *map(self._best_before, newest)}
        for path in paths:
            if path not in needed:
                path.unlink(missing_ok=True)

    def _best_before(self, path: Path) -> Path:
        """The checkpoint of the best epoch when `path` was written; `path` itself if it does not say."""
        try:
            header, _ = read_tensors(path, header_only=True)
            return self._of_epoch(int(header["progress"]["best_epoch"]))
        except (ValueError, TypeError, KeyError):
            return path

    def _of_epoch(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.safetensors"

    def _paths(self) -> list[Path]:
        """The checkpoints, the newest first."""
        found = [(match, path) for path in self.folder.glob("*") if (match := _NAME.fullmatch(path.name))]
        found.sort(key=lambda item: (int(item[0][1]), int(item[0][2] or 0)), reverse=True)
        return [path for _, path in found]

    def newest(self) -> Iterator[tuple[Path, FitState, dict[str, Tensor]]]:
        """The readable checkpoints, newest first, with a warning for each unreadable one.

        Raises:
            ValueError: for a checkpoint of another fit, naming the settings that differ.
        """
        for path in self._paths():
            try:
                header, tensors = self._read(path)
                progress = _state(header["progress"])
            except NewerFileError:
                raise
            except (ValueError, TypeError, KeyError) as error:
                warnings.warn(f"checkpoint {path} can't be used, the one before it is: {error}", stacklevel=2)
                continue
            self._check_same_fit(path, header["settings"])
            yield path, progress, tensors

    def clear_unless_unfinished(self) -> None:
        """Remove all checkpoints, unless the newest is of this very fit, unfinished."""
        with warnings.catch_warnings(action="ignore"):
            try:
                newest = next(self.newest(), None)
            except NewerFileError:
                raise
            except ValueError:
                newest = None
        if newest is None or newest[1].finished:
            for path in self._paths():
                path.unlink(missing_ok=True)
            for path in stage_files(self.folder):
                path.unlink(missing_ok=True)

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        header, tensors = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError("it is no checkpoint of a fit")
        refuse_newer(path, "checkpoint", header.get("version"), VERSION)
        for name in ("settings", "progress"):
            if not isinstance(header.get(name), dict):
                raise ValueError(f"its {name} are no dictionary")
        return header, tensors

    @classmethod
    def unfinished(cls, folder: Path) -> dict[str, Any]:
        """The settings of the fit in a folder that has not come to its end; none where there is no such fit."""
        old = cls(folder, 1, {})
        for path in old._paths():
            with suppress(ValueError, OSError, KeyError, TypeError):
                header, _ = read_tensors(path, header_only=True)
                return {} if header["progress"]["finished"] else dict(header["settings"])
        return {}

    def _check_same_fit(self, path: Path, settings: Mapping[str, Any]) -> None:
        if changed := changes_between(settings, self.settings):
            raise ValueError(
                f"checkpoints {self.folder} holds another fit ({'; '.join(changed)}): choose another folder, or "
                f"remove it to start anew ({path.name})"
            )

    def of_best(self, progress: FitState, newest: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the best epoch so far.

        If they can't be read, the newest, with a warning. `progress` then counts these as the best until the next
        epoch.
        """
        path = self._of_epoch(progress.best_epoch)
        try:
            return self._read(path)[1]
        except (ValueError, KeyError) as error:
            warnings.warn(f"best checkpoint {path} can't be used, the newest is: {error}", stacklevel=2)
            progress.best_epoch, progress.best_score = progress.epoch, float("inf")
            return newest

    def append_to_ledger(self, rows: list[dict[str, Any]]) -> None:
        """Add rows of removals, and wait until they are on the disk."""
        with self.ledger.open("a", newline="") as file:
            _writer(file).writerows(rows)
            file.flush()
            os.fsync(file.fileno())

    def start_ledger(self, rows: list[dict[str, Any]]) -> None:
        """Write the ledger as it was at a checkpoint, and remove half-written files.

        Removals that a killed fit noted later will happen again.
        """

        def write(beside: Path) -> None:
            with beside.open("w", newline="") as file:
                writer = _writer(file)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.ledger, write)
        clear_unfinished(
            self.folder,
            lambda name: name == self.ledger.name or any(one.fullmatch(name) for one in (_NAME, _STAGE)),
        )


def _writer(file: Any) -> csv.DictWriter[str]:
    return csv.DictWriter(file, LEDGER_COLUMNS, lineterminator="\n")
