"""The project's profile file: what was measured of a model's stages, as versioned JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddg_sim.contention import Slowdown
from ddg_sim.costs import Costs
from ddg_sim.files import read_text, replacing
from ddg_sim.notation import render
from ddg_sim.schedule import OpKind, Schedule, Sync
from ddg_sim.times import Samples


class ProfileError(ValueError):
    """A profile file that is missing, broken or invalid; one line with path and field."""


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Factor = Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)]
Kind = Literal["forward", "backward", "update", "recompute"]
Bytes = Annotated[int, Field(ge=0, strict=True)]


class OperationTimes(BaseModel):
    """One stage: seconds per operation on one mini-batch when it computes alone.

    ``samples`` are measured seconds by kind, around the medians that the other fields hold.
    ``input_share`` is the part of ``backward`` that its first half takes, where there are two.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: dict[Kind, Annotated[list[Seconds], Field(min_length=1)]] = {}
    forward: Seconds
    backward: Seconds
    update: Seconds
    recompute: Seconds
    input_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] = 0.5


class StageProfile(OperationTimes):
    """One stage: seconds of its operations under backpropagation, sizes in bytes.

    ``contention`` says how many times longer its operations take while all others compute too:
    one number, or per kind of its own operation and kind of theirs; "wait" after waiting for them.
    ``message`` is what the host spends on each message that the stage sends or receives.
    """

    layers: list[str]
    overhead: Seconds
    message: Seconds = 0.0
    contention: Factor | dict[Kind, dict[Kind | Literal["wait"], Factor]] = 1.0
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
    ``programs`` holds the operations of other methods, which cost what their rules ask, per stage;
    the key is `program_text`.

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
    programs: dict[str, list[OperationTimes]] = {}

    @model_validator(mode="after")
    def _lengths(self) -> Profile:
        expected = len(self.stages) - 1
        for name, found in (("cuts", self.cuts), ("links", self.links)):
            if len(found) != expected:
                raise ValueError(
                    f"{name} must have {expected} entries for {len(self.stages)} stages,"
                    f" got {len(found)}"
                )
        for text, times in self.programs.items():
            if len(times) != len(self.stages):
                raise ValueError(
                    f"programs[{text!r}] must have {len(self.stages)} entries, got {len(times)}"
                )
        if any(after <= before for before, after in zip(self.cuts, self.cuts[1:], strict=False)):
            raise ValueError(f"cuts must increase, got {self.cuts}")
        return self

    @property
    def contention(self) -> list[float | Slowdown]:
        """Per stage, how much longer it takes while all others compute; see `contended`."""
        return [
            stage.contention
            if isinstance(stage.contention, float)
            else {
                (OpKind[own.upper()], None if other == "wait" else OpKind[other.upper()]): factor
                for own, factors in stage.contention.items()
                for other, factor in factors.items()
            }
            for stage in self.stages
        ]

    def times(self, schedule: Schedule | None = None) -> Sequence[OperationTimes]:
        """Per stage the operations of a schedule's program, where they were measured.

        Otherwise, and for None, those of backpropagation.
        """
        known = None if schedule is None else self.programs.get(program_text(schedule))
        return self.stages if known is None else known

    def costs(self, schedule: Schedule | None = None, cores: int | None = None) -> Costs:
        """Seconds of every operation when its stage computes alone, and of every message.

        Args:
            schedule: whose operations, see `times`.
            cores: that all workers share; None: each has one of its own.
        """
        times = self.times(schedule)
        return Costs(
            forward=tuple(stage.forward for stage in times),
            backward=tuple(stage.backward for stage in times),
            update=tuple(stage.update for stage in times),
            recompute=tuple(stage.recompute for stage in times),
            input_share=tuple(stage.input_share for stage in times),
            activation_transfer=tuple(link.activation for link in self.links),
            gradient_transfer=tuple(link.gradient for link in self.links),
            overhead=tuple(stage.overhead for stage in self.stages),
            message=tuple(stage.message for stage in self.stages),
            barrier=self.barrier,
            cores=cores,
        )

    def varying_costs(self, schedule: Schedule | None = None, cores: int | None = None) -> Costs:
        """The same with measured samples in the place of medians, where there are some."""
        steady = self.costs(schedule, cores)
        found: dict[str, Any] = {
            kind: tuple(
                Samples(tuple(stage.samples[kind])) if kind in stage.samples else fixed
                for stage, fixed in zip(self.times(schedule), getattr(steady, kind), strict=True)
            )
            for kind in get_args(Kind)
        }
        return replace(steady, **found)

    def write(self, path: str | Path) -> None:
        """Write the profile as JSON; the file appears whole or not at all.

        Raises:
            OSError: if the folder does not exist or cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def program_text(schedule: Schedule) -> str:
    """What of a schedule its operations' times depend on, in one line: everything but its name.

    Synchronisation changes when an operation runs, not what it does.

    >>> from ddg_sim.methods import ddg, pipedream
    >>> program_text(ddg(2, Sync.BARRIER)) == program_text(pipedream(2))
    True
    """
    plain = replace(schedule, method="any", sync=Sync.NONE)
    return "; ".join(render(plain).splitlines())


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
