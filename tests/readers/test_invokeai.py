"""The model of InvokeAI: against lists recorded from runs of it, and against itself where INVOKEAI_PATH is its folder
(with INVOKEAI_PYTHON, if that is another Python than this one)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
from common import KINDS
from outside import Case, assert_equal, diffusers_places, file_of, run

from networks.files.readers.invokeai import BASES, READERS, File
from networks.files.readers.trainers import suffixes_of

ARCHS = tuple(arch for arch, base in BASES.items() if base.names)
(INVOKEAI,) = READERS

if os.environ.get("INVOKEAI_PATH"):
    WIDE = ("lora", "dora", "dora input", "lokr", "lokr dora", "loha", "ia3")
    ALL = tuple(kind for kind in KINDS if kind not in ("norms", "rs-lora"))
    CASES = [(arch, kind) for arch in ARCHS for kind in (ALL if arch in ("flux", "sd") else WIDE)]

    @pytest.fixture(scope="module")
    def real(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], tuple[Case, object]]:
        folder = tmp_path_factory.mktemp("invokeai")
        cases = {}
        for arch, kind in CASES:
            root = "model." if arch == "anima" else ""
            where = diffusers_places(arch, frozenset({"flux", "anima"}), root)
            cases[arch, kind] = Case(arch, kind, "apply", file_of(arch, kind, folder), where)
        made = run("invokeai_program.py", "INVOKEAI_PATH", cases.values(), folder)
        return dict(zip(cases, zip(cases.values(), made, strict=True), strict=True))

    @pytest.mark.parametrize(("arch", "kind"), CASES)
    def test_the_program_itself(arch: str, kind: str, real: Mapping[tuple[str, str], tuple[Case, object]]) -> None:
        case, made = real[arch, kind]
        given = case.trained.given
        assert_equal(INVOKEAI.applied(File(given, suffixes_of(given)), BASES[arch]), made, given)
