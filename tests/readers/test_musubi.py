"""The models of musubi-tuner: against lists recorded from runs of it, and against itself where MUSUBI_PATH is the folder
that holds musubi_tuner (with MUSUBI_PYTHON, if that is another Python than this one)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
from outside import Case, assert_equal, file_of, own_places, run
from registry_archs import data_of

from networks.files.readers.musubi import READERS
from networks.files.readers.trainers import Trainer

BY_NAME: dict[str, Trainer] = {reader.name: reader for reader in READERS}

if os.environ.get("MUSUBI_PATH"):
    WAYS = {
        arch: {"musubi": "modules", "musubi_generate": _way}
        for reader in READERS
        for arch, route in reader.routes.items()
        for _way in ["strict" if route.strict else "loading" if route.one_form else "modules"]
    }
    WIDE = ("lora", "dora", "lokr")
    ALL = ("dora input", "lokr whole", "lokr dora", "loha", "glora", "dylora", "full", "diag-oft", "oft input", "ia3")
    CASES = [
        (arch, kind, reader)
        for arch, ways in WAYS.items()
        for reader, way in ways.items()
        for kind in (*WIDE, *(ALL if arch in ("flux", "flux_2") else ()))
        if reader == "musubi" or way != "modules"
    ]

    @pytest.fixture(scope="module")
    def real(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str, str], tuple[Case, object]]:
        folder, files, cases = tmp_path_factory.mktemp("musubi"), {}, {}
        for arch, kind, reader in CASES:
            wide = data_of(arch).widest if kind == "lora" and arch != "hidream_o1" else {}
            if (arch, kind) not in files:
                files[arch, kind] = file_of(arch, kind, folder, encoders=False, **wide)
            place = own_places(arch, encoders=False)
            cases[arch, kind, reader] = Case(arch, kind, WAYS[arch][reader], files[arch, kind], place)
        made = run("musubi_program.py", "MUSUBI_PATH", cases.values(), folder)
        return dict(zip(cases, zip(cases.values(), made, strict=True), strict=True))

    @pytest.mark.parametrize(("arch", "kind", "reader"), CASES)
    def test_the_program_itself(
        arch: str, kind: str, reader: str, real: Mapping[tuple[str, str, str], tuple[Case, object]]
    ) -> None:
        case, made = real[arch, kind, reader]
        reading = BY_NAME[reader].read(case.trained.given)
        assert reading is not None
        assert_equal(reading, made, case.trained.given)
