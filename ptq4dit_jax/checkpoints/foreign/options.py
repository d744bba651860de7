"""What a user may say of a checkpoint that it does not say itself."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ptq4dit_jax.settings import section, setting


@dataclasses.dataclass(frozen=True)
class GivenShape:
    """Sizes of a network; None where nothing is said.

    Attributes:
      num_heads: of attention.
      input_size: side of the image or latent.
      classes: their number, without a null class.
      null_class: whether the last row of the table of labels means "no class".
    """

    TITLE: ClassVar[str] = "What the file does not say of the network"

    num_heads: int | None = setting(None, "Heads of attention, where the file does not tell.")
    input_size: int | None = setting(None, "Side of the latents, where the file does not tell.")
    classes: int | None = setting(None, "Number of classes, without a null class, where the file does not tell.", metavar="N")
    null_class: bool | None = setting(None, "Whether the last label means no class.")


@dataclasses.dataclass(frozen=True)
class GivenSchedule:
    """What a network predicts; None where nothing is said.

    Attributes:
      objective: ``noise`` or ``velocity``.
      flow_steps: the number of equal Euler steps that a network made for a step size is to be sampled with: 128 by default for
        shortcut models, 1 for mean flows. 0 gives it the size 0 and any number of steps: the velocity itself of a mean flow.
      data_time: the end of a flow's time at which x is data, 0 or 1.
      timesteps, beta_start, beta_end: of the linear schedule of a model that predicts noise.
    """

    TITLE: ClassVar[str] = "What the file does not say of the schedule"

    objective: str | None = setting(None, "What it predicts, noise or velocity, where nothing tells a SiT from a DiT.")
    flow_steps: int | None = setting(
        None,
        "Euler steps that a network made for a step size is for; 0 for size 0 and any number of steps.",
        shown="128 for shortcut models, 1 for mean flows",
    )
    data_time: int | None = setting(None, "The time of a flow at which x is data, 0 or 1, where the file does not tell.")
    timesteps: int | None = setting(None, "Steps of the noise schedule, where the file does not tell.")
    beta_start: float | None = setting(None, "Its first beta.")
    beta_end: float | None = setting(None, "Its last beta.")

    @property
    def betas(self) -> dict[str, Any]:
        """The fields of a noise schedule that are given."""
        fields = {"num_timesteps": self.timesteps, "beta_start": self.beta_start, "beta_end": self.beta_end}
        return {name: value for name, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Everything that a user may say of a checkpoint; of the sections by the flat names of their fields.

    Attributes:
      shape: of the network.
      schedule: what it predicts.
      ema: take averaged weights if there are any; False takes those that were being trained.
      weights: the prefix of the set of weights to take, where there are several; overrides ``ema``.
      as_diffusers: compute what diffusers computes (time frequencies over 127, MLP norm epsilon of its config) instead of what
        Meta's code, with which published weights were trained, computes from the same weights. For its folders only.
      ignore: keys of the checkpoint's configuration, or names of configuration files, to leave out.
    """

    TITLE: ClassVar[str] = "Which weights are read, and how"

    shape: GivenShape = section(GivenShape())
    schedule: GivenSchedule = section(GivenSchedule())
    ema: bool = setting(True, "Averaged weights if there are any, or those being trained.", flag="ema/--model-weights")
    weights: str | None = setting(None, "The set of weights to take, by the prefix of its names in the file.", metavar="NAME")
    as_diffusers: bool = setting(False, "Compute what diffusers computes, from its folder, or what Meta's code does.")
    ignore: tuple[str, ...] = setting(
        (), "A key of its configuration, or a file beside it, to leave out; may be repeated.", metavar="KEY", shown=""
    )
