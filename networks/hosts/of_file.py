"""A call of which a file decides dims, forms and alphas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..args.parse import Problems
from ..files.adapter_file import AdapterFile, Naming, open_adapter
from ..files.dialects import rs_lora_differs
from ..plan.file_format import wanted_format
from ..plan.file_layers import on_model
from ..plan.plan import Request
from ..plan.walk import is_own


def of_file(
    request: Request, tensors: Mapping[str, Tensor], source: str, problems: Problems
) -> tuple[Request, AdapterFile]:
    """The request as the file has it, and the file as the models have its layers.

    Args:
        request: of the same models and arguments.
        tensors: key -> tensor of the file; a FileTensors, if metadata are to count.
        source: name of the file, for messages.
        problems: takes what is wrong with it.

    Raises:
        ValueError: it cannot be opened.
    """
    unet = next(model for part, model in request.parts if part is request.arch.denoiser)
    own_class = is_own(request.arch.denoiser, unet)
    file = open_adapter(tensors, Naming(request.arch, wanted_format(request.args, request.arch), own_class), source)
    if not file.families:
        problems.add(file.problem)
    try:
        file = on_model(file, request.parts)
    except ValueError as error:
        problems.add(str(error))
    flags, args = file.flags, request.args
    if flags.rs_lora is not None and "rs_lora" in args.given and flags.rs_lora != args.rs_lora:
        problems.add(rs_lora_differs(flags, args.rs_lora, source))
    request = replace(
        request,
        saved=file.layers,
        source=source,
        unknown=file.unread,
        rs_lora=flags.rs_lora,
        names_like=lambda: file.names_like,
    )
    return request, file
