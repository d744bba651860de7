"""Block reconstruction: learns the rounding of the weights and the scales of the activations, unit by unit."""

from ptq4dit_jax.reconstruction.closed_form import round_closed_form
from ptq4dit_jax.reconstruction.learning import check_mesh
from ptq4dit_jax.reconstruction.pipeline import reconstruct
from ptq4dit_jax.reconstruction.resume import Journal, forget_journal, journal_beside
from ptq4dit_jax.reconstruction.shared_journal import SharedJournal
from ptq4dit_jax.reconstruction.units import units
from ptq4dit_jax.reconstruction.walk import MemoryPlan

__all__ = [
    "Journal",
    "MemoryPlan",
    "SharedJournal",
    "check_mesh",
    "forget_journal",
    "journal_beside",
    "reconstruct",
    "round_closed_form",
    "units",
]
