"""Sound files for training and generation: WAV by the standard library, other formats through soundfile."""

from __future__ import annotations

import contextlib
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks.cli.command_line import write_atomically
from networks.foreign.texts import printable


def length_of(path: Path, rate: int) -> int:
    """Samples of one channel. Raises ValueError when the file cannot be read or has another rate."""
    with _reading(path):
        if path.suffix.lower() != ".wav":
            info = _soundfile(path).info(str(path))
            return _checked(path, info.samplerate, rate, info.frames)
        with wave.open(str(path), "rb") as file:
            if not 0 < _size(file) <= path.stat().st_size:
                raise EOFError("it is empty or cut off")
            return _checked(path, file.getframerate(), rate, file.getnframes())


def read_sound(path: Path, rate: int) -> Tensor:
    """(2, S) from -1 to 1; one channel becomes two. Raises ValueError as `length_of` does."""
    length_of(path, rate)
    with _reading(path):
        if path.suffix.lower() != ".wav":
            samples = torch.from_numpy(_soundfile(path).read(str(path), dtype="float32", always_2d=True)[0]).T
        else:
            with wave.open(str(path), "rb") as file:
                width, channels, raw = file.getsampwidth(), file.getnchannels(), file.readframes(file.getnframes())
                if len(raw) != _size(file):
                    raise EOFError("it is cut off")
            samples = _decode(path, raw, width).view(-1, channels).T
    return (samples if len(samples) > 1 else samples.expand(2, -1))[:2].contiguous()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise ValueError for all that the libraries say of a damaged file."""
    try:
        yield
    except (wave.Error, OSError, EOFError, RuntimeError) as error:
        reason = printable(str(error) or "it is empty", 200)
        raise ValueError(f"sound {path} cannot be read ({reason}). Replace or remove it.") from error


def _size(file: wave.Wave_read) -> int:
    """Bytes of its samples, as it says itself."""
    return file.getnframes() * file.getnchannels() * file.getsampwidth()


def write_wav(path: Path, sound: Tensor, rate: int) -> None:
    """Write (channels, S) from -1 to 1 as 16-bit WAV, atomically."""
    values = (sound.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()

    def write(temporary: Path) -> None:
        with wave.open(str(temporary), "wb") as file:
            file.setnchannels(values.shape[1])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(values.numpy().astype("<i2").tobytes())

    write_atomically(path, write)


def _decode(path: Path, raw: bytes, width: int) -> Tensor:
    """PCM bytes -> flat samples from -1 to 1: 8 bits are unsigned, 16, 24 and 32 little-endian signed."""
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, width)
    if width == 1:
        return data[:, 0].float() / 127.5 - 1
    if width > 4:
        raise ValueError(f"sound {path} has {8 * width} bits a sample; convert it to 16 or 24.")
    value = sum(data[:, i].long() << (8 * i) for i in range(width - 1)) + (
        data[:, -1].to(torch.int8).long() << (8 * width - 8)
    )
    return (value.double() / 2 ** (8 * width - 1)).float()


def _checked(path: Path, found: int, wanted: int, samples: int) -> int:
    if found != wanted:
        raise ValueError(
            f"sound {path} has {found} samples a second, the model works at {wanted}. Convert it, for example with: "
            f"ffmpeg -i {path.name} -ar {wanted} -ac 2 {path.stem}-{wanted}.wav"
        )
    return samples


def _soundfile(path: Path) -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise ValueError(
            f"sound {path}: only .wav is read without the soundfile package. Install it, or convert the file to WAV."
        ) from error
    return soundfile
