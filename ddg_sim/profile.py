"""The project's profile file: what was measured of a model's stages, as versioned JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddg_sim.costs import Costs
from ddg_sim.files import read_text, replacing


class ProfileError(ValueError):
    """A profile file that is missing, broken or invalid; one line with path and field."""


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Bytes = Annotated[int, Field(ge=0, strict=True)]


class StageProfile(BaseModel):
    """One stage: seconds per operation on one mini-batch when it computes alone, sizes in bytes.

    ``contention`` says how many times longer its operations take while all others compute too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[str]
    forward: Seconds
    backward: Seconds
    update: Seconds
    recompute: Seconds
    overhead: Seconds
    contention: Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)] = 1.0
    output_bytes: Bytes
    parameter_bytes: Bytes


class LinkProfile(BaseModel):
    """The link to the next stage: seconds per activation and per gradient, bytes of either."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    activation: Seconds
    gradient: Seconds
    bytes: Bytes


class Profile(BaseModel):
    """A measured model, cut into stages; ``cuts`` holds the first layer of stages 1..K-1.

    ``barrier`` is the seconds from the last worker's coming to a barrier until all go on.

    >>> stage = StageProfile(layers=["fc"], forward=0.1, backward=0.2, update=0.01, recompute=0.1,
    ...                      overhead=0.0, output_bytes=40, parameter_bytes=400)
    >>> profile = Profile(version=1, model="mlp", data="digits", batch_size=8, device="cpu",
    ...                   threads=1, torch="2.11", cuts=[], stages=[stage], links=[])
    >>> profile.costs().backward
    (0.2,)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    model: str
    data: str
    batch_size: Annotated[int, Field(ge=1, strict=True)]
    device: str
    threads: Annotated[int, Field(ge=1, strict=True)]
    torch: str
    cuts: list[Annotated[int, Field(ge=1, strict=True)]]
    stages: Annotated[list[StageProfile], Field(min_length=1)]
    links: list[LinkProfile]
    barrier: Seconds = 0.0

    @model_validator(mode="after")
    def _lengths(self) -> Profile:
        expected = len(self.stages) - 1
        for name, found in (("cuts", self.cuts), ("links", self.links)):
            if len(found) != expected:
                raise ValueError(
                    f"{name} must have {expected} entries for {len(self.stages)} stages,"
                    f" got {len(found)}"
                )
        if any(after <= before for before, after in zip(self.cuts, self.cuts[1:], strict=False)):
            raise ValueError(f"cuts must increase, got {self.cuts}")
        return self

    @property
    def contention(self) -> tuple[float, ...]:
        """Per stage, how many times longer it takes while all others compute; see `contended`."""
        return tuple(stage.contention for stage in self.stages)

    def costs(self) -> Costs:
        """Seconds of every operation when its stage computes alone, and of every message."""
        return Costs(
            forward=tuple(stage.forward for stage in self.stages),
            backward=tuple(stage.backward for stage in self.stages),
            update=tuple(stage.update for stage in self.stages),
            recompute=tuple(stage.recompute for stage in self.stages),
            activation_transfer=tuple(link.activation for link in self.links),
            gradient_transfer=tuple(link.gradient for link in self.links),
            overhead=tuple(stage.overhead for stage in self.stages),
            barrier=self.barrier,
        )

    def write(self, path: str | Path) -> None:
        """Write the profile as JSON; the file appears whole or not at all.

        Raises:
            OSError: if the folder does not exist or cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read(path: str | Path) -> Profile:
    """Read a profile file.

    Raises:
        ProfileError: in one line, with the path and the first offending field.

    >>> read("no/such/profile.json")
    Traceback (most recent call last):
    ...
    ddg_sim.profile.ProfileError: no/such/profile.json: cannot be read: No such file or directory
    """
    text = read_text(path, ProfileError)
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        raise ProfileError(f"{path}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Pydantic's first complaint in one line: field, what is wrong, what was found.

    >>> try:
    ...     LinkProfile(activation=-1.0, gradient=0.0, bytes=0)
    ... except ValidationError as error:
    ...     first_problem(error)
    'activation: input should be greater than or equal to 0 (got -1.0)'
    """
    details = error.errors(include_url=False)[0]
    field = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]
    ).lstrip(".")
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "json_invalid":
        return f"not valid JSON: {message.removeprefix('Invalid JSON: ')}"
    message = message[0].lower() + message[1:]
    if not field:
        return message
    shown = "" if details["type"] == "missing" else f" (got {_short(details['input'])})"
    return f"{field}: {message}{shown}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
