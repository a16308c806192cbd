"""How the text of an argument becomes a value.

Trainers hand every value over as text ("8", "True", "{'.*attn.*': 8}"); configuration files may hand over real types.
A coercer takes either and raises ValueError with what is wrong and what to write, nothing else.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..foreign.texts import MOST, exists, is_file, parse_json, read_text, user_path
from . import expressions

if TYPE_CHECKING:
    from ..records import Arg

NOT_GIVEN = ("", "none", "null", "undefined")
LAST_BLOCK = 9999  # far above every model; a range is listed number by number
MOST_PATTERNS = 2000  # each is tried on each layer
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def nearest(word: str, known: Iterable[str], introduction: str = "; did you mean {}?") -> str:
    """The nearest valid name as the end of a sentence, or nothing."""
    found = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.6)
    return introduction.format(found[0]) if found else ""


def _text(raw: Any) -> str:
    return raw.strip() if isinstance(raw, str) else str(raw)


def _boolean(arg: Arg, raw: Any) -> bool:
    text = _text(raw).lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError("is not a boolean; write True or False")


def _bounded(arg: Arg, value: float) -> None:
    if arg.minimum is not None and value < arg.minimum:
        raise ValueError(f"is too small; the least is {arg.minimum:g}")
    if arg.below is not None and value >= arg.below:
        raise ValueError(f"is too large; it must stay below {arg.below:g}")


def finite(raw: Any) -> float:
    """A number of the user, as text or typed.

    Raises:
        ValueError: it is none, or NaN or infinite, with an example of what to write.
    """
    try:
        number = math.nan if isinstance(raw, bool) else float(raw)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    except (TypeError, ValueError):
        raise ValueError("is not a number; write one such as 0.1") from None
    if not math.isfinite(number):
        raise ValueError("is not a finite number; write one such as 0.1")
    return number


def whole(raw: Any) -> int:
    """A whole number of the user; `8.0` is one, `2.7` is none.

    Raises:
        ValueError: it is none, with an example of what to write.
    """
    with contextlib.suppress(ValueError):
        number = finite(raw)
        with contextlib.suppress(ValueError):
            return int(_text(raw))  # exact, also where the float is not
        if number.is_integer():
            return int(number)
    raise ValueError("is not a whole number; write one such as 8")


def named(name: str, raw: Any, least: float = -math.inf, read: Callable[[Any], float] = finite) -> float:
    """A number that a call has under this name.

    Args:
        name: for the error.
        raw: text or number.
        least: the smallest that is right.
        read: turns `raw` into a number.

    Raises:
        ValueError: it is none, not finite, or below the least.
    """
    try:
        number = read(raw)
    except ValueError as error:
        raise ValueError(f"{name}={raw} {error}") from None
    if number < least:
        raise ValueError(f"{name}={raw} is too small; the least is {least:g}")
    return number


def _integer(arg: Arg, raw: Any) -> int:
    number = whole(raw)
    _bounded(arg, number)
    return number


def _number(arg: Arg, raw: Any) -> float:
    number = finite(raw)
    _bounded(arg, number)
    return number


def _choice(arg: Arg, raw: Any) -> str:
    text = _text(raw).lower()
    text = dict(arg.words).get(text, text)
    if text not in arg.choices:
        raise ValueError(f"is none of {', '.join(arg.choices)}{nearest(text, arg.choices)}")
    return text


def _choices(arg: Arg, raw: Any) -> tuple[str, ...]:
    found = _structure(raw)
    items = split_top(found) if isinstance(found, str) else found
    if not isinstance(items, (list, tuple)) or not items:
        raise ValueError(f"is no list of {', '.join(arg.choices)}")
    return tuple(dict.fromkeys(_choice(arg, item) for item in items))


def _word(arg: Arg, raw: Any) -> str:
    """A name which the architecture explains."""
    return _text(raw).lower()


def _name(arg: Arg, raw: Any) -> str:
    """A name or a path, as written; "" = not given."""
    return "" if _text(raw).lower() in NOT_GIVEN else _text(raw)


class FromFile(str):
    """Text out of a file that an argument names. Messages quote its place instead: a mistyped name may be that of a
    file with secrets, and logs are shown to others."""

    where: str

    @classmethod
    def of(cls, text: str, where: str) -> FromFile:
        made = cls(text)
        made.where = where
        return made

    def __repr__(self) -> str:
        return self.where


def _part_of(whole: str, part: str) -> str:
    """A part of a text, from where that is."""
    return FromFile.of(part, whole.where) if isinstance(whole, FromFile) else part


def _from_file(text: str) -> Any:
    """`@file`: TOML or JSON by its ending, otherwise one item per line (# starts a comment)."""
    path = user_path(text[1:].strip())
    if not is_file(path):
        raise ValueError(f"names the file {path}, which does not exist")
    suffix = path.suffix.lower()
    try:
        if suffix in (".json", ".toml"):
            found = (_json if suffix == ".json" else read_toml)(read_text(path))
            return _placed(found, f"an entry of {path}")
        lines = read_text(path).splitlines()
    except expressions.Repeated:
        raise
    except ValueError as error:
        raise ValueError(f"names the file {path}, which cannot be read: {error}") from None
    items = [FromFile.of(line.strip(), f"line {number} of {path}") for number, line in enumerate(lines, 1)]
    return [item for item in items if item and not item.startswith("#")]


def _placed(value: Any, where: str) -> Any:
    """The same with texts which know where they are from."""
    if isinstance(value, str):
        return FromFile.of(value, where)
    if isinstance(value, dict):
        return {_placed(key, where): _placed(each, where) for key, each in value.items()}
    return [_placed(each, where) for each in value] if isinstance(value, list) else value


def read_toml(text: str) -> dict[str, Any]:
    """TOML -> dict, with the standard library or, on Python 3.10, the `toml` package which the trainers install.

    Raises:
        ValueError: it is not TOML, or is nested so deep that nobody means it.
    """
    try:
        try:
            import tomllib
        except ModuleNotFoundError:
            import toml

            return dict(toml.loads(text))
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (IndexError, TypeError, KeyError) as error:  # of the package, for some mistakes
        raise ValueError(f"it is not TOML ({error})") from None


def _structure(raw: Any) -> Any:
    """Python literal, JSON or @file -> object; other text stays text."""
    if not isinstance(raw, str):
        return raw
    text = raw.strip()
    if text.startswith("@"):
        return _from_file(text)
    if text and text[0] in "[{(\"'":
        for read in (_python, _json):
            try:
                return read(text)
            except expressions.Repeated:
                raise
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue  # it is none, nested too deep, or a mapping from lists
        if text[0] == "{":  # no regular expression starts like this; [ and ( may
            raise ValueError("cannot be read; write it as {'regex': 8, 'another': 4}")
    return text


def _python(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes such as those of expressions, which Python keeps as they are
        tree = ast.parse(text, mode="eval")
    if isinstance(tree.body, ast.Dict):
        expressions.check_repeated(str(key.value) for key in tree.body.keys if isinstance(key, ast.Constant))
    return ast.literal_eval(tree)


def _json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        expressions.check_repeated(key for key, _ in pairs)
        return dict(pairs)

    return parse_json(text, once)


def split_top(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside brackets, so that a{1,2} and (a,b) stay whole."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == separator and depth <= 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _not_too_many(patterns: Sized) -> None:
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(
            f"has {len(patterns):,} regular expressions, and {MOST_PATTERNS:,} are the most: join them with |"
        )


def _patterns(arg: Arg, raw: Any) -> tuple[str, ...]:
    found = _structure(raw)
    if isinstance(found, str):
        found = [] if found.lower() in NOT_GIVEN else split_top(found)
    if isinstance(found, dict) and len(found) == 1:  # TOML has no list at its top: patterns = [...]
        found = next(iter(found.values()))
    if not isinstance(found, (list, tuple)) or not all(isinstance(item, str) for item in found):
        raise ValueError("is not a list of regular expressions; write ['.*attn.*', '.*mlp.*'], or @file.txt")
    _not_too_many(found)
    expressions.check_repeated(found)
    return tuple(map(expressions.checked, found))


_MAP = "write {'.*attn.*': 8} or .*attn.*=8,.*mlp.*=4, or @file.toml"


def _pairs(text: str) -> dict[str, str]:
    """`regex=8,another=4`."""
    pairs = [] if text.lower() in NOT_GIVEN else [part.rsplit("=", 1) for part in split_top(text)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"is not a list of regex=value; {_MAP}")
    expressions.check_repeated(_part_of(text, key.strip()) for key, _ in pairs)
    return {_part_of(text, key.strip()): _part_of(text, value) for key, value in pairs}


def _regex_map(arg: Arg, raw: Any) -> dict[str, float]:
    found = _structure(raw)
    lines = [found] if isinstance(found, str) else found  # a file has one regex=value per line
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        pairs = [pair for line in lines for pair in _pairs(line).items()]
        expressions.check_repeated(key for key, _ in pairs)
        found = dict(pairs)
    if not isinstance(found, dict):
        raise ValueError(f"is not a mapping of regular expressions to numbers; {_MAP}")
    _not_too_many(found)
    read = _integer if arg.kind == "regex_int" else _number
    result = {}
    for key, value in found.items():
        expression = expressions.checked(key if isinstance(key, FromFile) else str(key).strip())
        try:
            result[expression] = read(arg, value)
        except ValueError as error:
            raise ValueError(f"has {key!r} = {value!r}, which {error}") from None
    return result


def _blocks(arg: Arg, raw: Any) -> tuple[int, ...] | None:
    """Block numbers: 0-7,20-37; `all` is no choice at all, `none` and nothing, as in the trainers, is no block."""
    found = _structure(raw)
    items = found if isinstance(found, (list, tuple)) else [found]
    text = ",".join(map(str, items)).strip().lower()
    if text in ("all", "none", ""):
        return None if text == "all" else ()
    ends = [0] * (LAST_BLOCK + 2)  # how many ranges begin at a number, without those that ended before it
    for part in (_part_of(item, part) for item in map(_as_text, items) for part in split_top(item)):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        first, last = (whole(match[1]), whole(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"has {part!r}, which is no block number or range; write 0-7,20-37")
        if last > LAST_BLOCK:
            raise ValueError(f"has {part!r}, and no model has so many blocks; write 0-7,20-37")
        ends[first] += 1
        ends[last + 1] -= 1
    return tuple(number for number, inside in enumerate(accumulate(ends)) if inside)


def _as_text(item: Any) -> str:
    return item if isinstance(item, str) else str(item)


def _integers(arg: Arg, raw: Any) -> tuple[int | None, ...]:
    """A list of whole numbers, `4,,8` or `[4, 0, 8]`; an empty item is None: not given."""
    return tuple(None if item is None else _integer(arg, item) for item in _items(raw))


def _numbers(arg: Arg, raw: Any) -> tuple[float | None, ...]:
    """The same with fractions."""
    return tuple(None if item is None else _number(arg, item) for item in _items(raw))


def _items(raw: Any) -> list[Any]:
    found = _structure(raw)
    if isinstance(found, dict) and len(found) == 1:  # TOML has no list at its top: values = [...]
        found = next(iter(found.values()))
    if isinstance(found, str):
        text = found.strip()
        found = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
        found = [] if found.lower() in NOT_GIVEN else found.split(",")
    elif isinstance(found, (int, float)):
        found = [found]
    if not isinstance(found, (list, tuple)):
        raise ValueError("is not a list of numbers; write 4,8,16")
    return [None if item is None or str(item).strip() == "" else item for item in found]


CURVES: dict[str, Callable[[float], float]] = {  # position 0 to 1 -> factor
    "sine": lambda t: math.sin(math.pi * t / 2),
    "cosine": lambda t: math.sin(math.pi * (1 - t) / 2),
    "linear": lambda t: t,
    "reverse_linear": lambda t: 1 - t,
    "zeros": lambda t: 0.0,
}


@dataclass(frozen=True)
class Rates:
    """Factors on the learning rate, by depth: a list, or a named curve plus an offset."""

    values: tuple[float, ...] = ()
    curve: str = ""
    offset: float = 0.0

    def expand(self, count: int) -> list[float]:
        """One factor for each of `count` depths; a list that is too short goes on with 1.

        Raises:
            ValueError: the list is too long.
        """
        if self.curve:
            return [CURVES[self.curve](i / max(1, count - 1)) + self.offset for i in range(count)]
        if len(self.values) > count:
            raise ValueError(f"has {len(self.values)} values, but there are {count} blocks")
        return [*self.values, *[1.0] * (count - len(self.values))]

    def __bool__(self) -> bool:
        return bool(self.values or self.curve)


def _rates(arg: Arg, raw: Any) -> Rates:
    """`0,0.5,1`, or `cosine+0.25`; an empty item is 0, as in the trainer."""
    if isinstance(raw, Rates):
        return raw
    if isinstance(raw, str):
        name, _, offset = raw.strip().partition("+")
        if name.strip().lower() in CURVES:
            return Rates(curve=name.strip().lower(), offset=_number(arg, offset or 0))
        if re.fullmatch(r"[a-z_]+", name.strip().lower()) and name.strip().lower() not in NOT_GIVEN:
            known = ", ".join(CURVES)
            raise ValueError(f"is no curve; write one of {known}, or numbers{nearest(name.strip(), CURVES)}")
    return Rates(tuple(0.0 if item is None else item for item in _numbers(arg, raw)))


def _files(arg: Arg, raw: Any) -> tuple[tuple[str, float], ...]:
    """Files, each with a strength: `a.safetensors=0.5,b.safetensors`, a list of such, or {'a.safetensors': 0.5}."""
    pairs = [(os.fspath(path), value) for path, value in _with_strengths(raw)]
    paths = [path for path, _ in pairs]
    twice = next((path for number, path in enumerate(paths) if path in paths[:number]), None)
    if twice is not None:
        raise ValueError(f"has {twice!r} twice; write it once, with the sum of the strengths")
    return tuple((path, _strength_of(path, value)) for path, value in pairs)


def _with_strengths(raw: Any) -> list[tuple[str | os.PathLike[str], Any]]:
    if isinstance(raw, (str, os.PathLike)) and _is_path(os.fspath(raw)):
        return [(os.fspath(raw).strip(), 1.0)]
    found = _structure(raw)
    if isinstance(found, str):
        found = [] if found.lower() in NOT_GIVEN else split_top(found)
    items = [*found.items()] if isinstance(found, dict) else found
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"is no file; {_FILES}")
    return [_file_and_strength(item) for item in items]


_FILES = "write FILE=0.5 (FILE:0.5 where a trainer takes one = alone), FILE,FILE or {'FILE': 0.5}"


def _is_path(text: str) -> bool:
    return bool(text.strip()) and exists(user_path(text.strip()))


def _file_and_strength(item: Any) -> tuple[str | os.PathLike[str], Any]:
    """Of text, the strength is what follows the last = or :, unless that is of the path, or a drive's."""
    path, *strength = item if isinstance(item, (tuple, list)) and item else (item,)
    if not isinstance(path, (str, os.PathLike)) or len(strength) > 1:
        raise ValueError(f"has {item!r}, which is no file; {_FILES}")
    if strength:
        return path, strength[0]
    text = os.fspath(path).strip()
    head, tail = _cut(text)
    return (text, 1.0) if not head or _is_path(text) else (head, tail)


def _cut(text: str) -> tuple[str, str]:
    cut = max(text.rfind("="), text.rfind(":"))
    tail = text[cut + 1 :].strip()
    of_path = any(mark in tail for mark in "/\\") or tail.lower().endswith(".safetensors")
    return ("", "") if cut < 1 or of_path else (text[:cut].strip(), tail)


def _strength_of(path: str, value: Any) -> float:
    try:
        strength = finite(value)
    except ValueError:
        raise ValueError(f"has {value!r} as the strength of {path!r}, which is no number; {_FILES}") from None
    if strength == 0:
        raise ValueError(f"has strength 0 for {path!r}, at which it does nothing: leave it out")
    return strength


KINDS: dict[str, Callable[[Arg, Any], Any]] = {
    "bool": _boolean,
    "int": _integer,
    "float": _number,
    "choice": _choice,
    "choices": _choices,
    "word": _word,
    "text": _name,
    "files": _files,
    "patterns": _patterns,
    "regex_int": _regex_map,
    "regex_float": _regex_map,
    "blocks": _blocks,
    "ints": _integers,
    "floats": _numbers,
    "rates": _rates,
}


def coerce(arg: Arg, raw: Any) -> Any:
    """Text or typed value of an argument -> value.

    Raises:
        ValueError: with the reason and an example of what to write.
    """
    if isinstance(raw, str) and len(raw) > MOST:
        raise ValueError(f"has {len(raw):,} characters, and {MOST:,} are the most")
    return KINDS[arg.kind](arg, raw)
