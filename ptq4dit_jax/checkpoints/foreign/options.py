"""What a user can say about a checkpoint that it does not say itself."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ptq4dit_jax.settings import section, setting


@dataclasses.dataclass(frozen=True)
class GivenShape:
    """Sizes of a network; None where not given.

    Attributes:
      num_heads: the number of attention heads.
      input_size: side of the image or latent.
      classes: the number of classes, without a null class.
      null_class: whether the last row of the table of labels means "no class".
    """

    TITLE: ClassVar[str] = "What the file does not say of the network"

    num_heads: int | None = setting(None, "Heads of attention, where the file does not tell.")
    input_size: int | None = setting(None, "Side of the latents, where the file does not tell.")
    classes: int | None = setting(None, "Number of classes, without a null class, where the file does not tell.", metavar="N")
    null_class: bool | None = setting(None, "Whether the last label means no class.")


@dataclasses.dataclass(frozen=True)
class GivenSchedule:
    """What a network predicts; None where not given.

    Attributes:
      objective: ``noise`` or ``velocity``.
      flow_steps: the number of equal Euler steps with which to sample a network that takes a step size: 128 by default for
        shortcut models, 1 for mean flows. 0 means size 0 and any number of steps: a mean flow's instantaneous velocity.
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
        """Returns the given fields of a noise schedule."""
        fields = {"num_timesteps": self.timesteps, "beta_start": self.beta_start, "beta_end": self.beta_end}
        return {name: value for name, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Everything that a user can say about a checkpoint; fields of sections go by their flat names.

    Attributes:
      shape: of the network.
      schedule: what the network predicts.
      ema: take averaged weights if there are any; False takes the trained ones.
      weights: the prefix of the set of weights to take if there are several; overrides ``ema``.
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
