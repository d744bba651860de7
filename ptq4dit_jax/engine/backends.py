"""Defines a backend: the operations of quantized layers, one method each, and what it requires of the code around them.

:mod:`ptq4dit_jax.engine.xla` is the reference, which runs everywhere and covers everything. The others are faster where they
run, and refuse calls for which they have no kernel. All multiply the stored integers, but :mod:`ptq4dit_jax.engine.fp8`.
:class:`~ptq4dit_jax.engine.dispatch.Dispatch` asks several in turn.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import ClassVar, Generic, NoReturn, TypeAlias, TypeVar

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32, Shaped

from ptq4dit_jax.devices import DeviceKind, JaxVersions
from ptq4dit_jax.engine.stacks import Leaf
from ptq4dit_jax.float8 import Operand, Weight
from ptq4dit_jax.networks.ops import Norm
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor


class NotCovered(Exception):
    """Raised by a backend for arguments that its version of an operation does not cover. The message is the reason."""


def require(covered: bool, reason: str) -> None:
    """Raises :class:`NotCovered` with the reason unless ``covered``."""
    if not covered:
        raise NotCovered(reason)


def _no_kernel(operation: str) -> NoReturn:
    raise NotCovered(f"there is no kernel for {operation}")


class Arithmetic(enum.Enum):
    """What the products of quantized layers multiply and add up.

    ``INT8`` is that of the stored model: its codes, with exact sums, so that backends can be compared bit by bit before the
    epilogue. ``E4M3`` multiplies what :mod:`ptq4dit_jax.float8` derives from the same model: other numbers, for another result.
    """

    INT8 = "int8 x int8 -> int32"
    E4M3 = "e4m3 x e4m3 -> float32"


#: What a backend receives for an array of a layer: a :data:`~ptq4dit_jax.engine.stacks.Leaf` if it ``reads_stacks``, else the
#: array itself.
LeafT = TypeVar("LeafT", bound=Leaf)
#: What it makes of a layer's input, and the weights that it multiplies by.
OperandT = TypeVar("OperandT", bound=Operand)
WeightT = TypeVar("WeightT", bound=Weight)


class Backend(Generic[LeafT, OperandT, WeightT]):
    """One implementation of the operations of quantized layers.

    A subclass names itself, overrides the operations that it implements, and raises :class:`NotCovered` for arguments that it
    does not cover. This class refuses every operation. The operations are described for ``Arithmetic.INT8``
    (:data:`IntegerBackend`); with another, read operands and sums of its types.

    Attributes:
      name: what users call it.
      arithmetic: what its products multiply. ``auto`` chooses only among backends with that of the stored model.
      platform: the platform that it is made for, ``gpu`` or ``tpu``; None for any.
      needs: a device that it runs on, in words.
      jax_versions: versions that it was tested with; None for any.
      dtypes: types in which a model can compute between the products; None for any.
      takes_float_models: whether a user may ask for a float model to be run by it.
      reads_stacks: whether its operations read layers inside their stacks
        (:class:`~ptq4dit_jax.engine.stacks.OfLayer`, in ``x``, ``weight`` and ``act`` too). Others receive layers cut out.
      differentiable: whether JAX differentiates its operations. Derivatives through others are refused with a message.
      packed_rows: rows per independently packed block of a weight, for kernels that read packed weights; None for any number.
        Models hold one form (:data:`~ptq4dit_jax.quantizers.PACKED_ROWS`); a backend that needs another unpacks or repacks
        in :meth:`unpack_ahead`.
      scans_blocks: whether blocks run in a loop over their stacks. If not, one function is called for each block in turn.
      attends_on_codes: whether :meth:`attention` multiplies integer codes. If not, it computes in floats.
      attention_library: the library whose kernel :meth:`attention` calls, if the kernel is not the backend's own.
    """

    name: ClassVar[str]
    arithmetic: ClassVar[Arithmetic] = Arithmetic.INT8
    platform: ClassVar[str | None] = None
    needs: ClassVar[str] = "any device"
    jax_versions: ClassVar[JaxVersions | None] = None
    dtypes: ClassVar[tuple[str, ...] | None] = None
    takes_float_models: ClassVar[bool] = False
    reads_stacks: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    packed_rows: ClassVar[int | None] = None
    scans_blocks: ClassVar[bool] = True
    attends_on_codes: ClassVar[bool] = False
    attention_library: ClassVar[str | None] = None

    def unfit(self, device: DeviceKind) -> str:
        """Returns why the backend does not run on a device; empty if it does."""
        return ""

    def note(self, device: DeviceKind) -> str:
        """Returns what a user should know of this backend on a device where it runs; mostly empty."""
        return ""

    def advice(self, device: DeviceKind) -> str:
        """Returns why a user should think of this backend on a device, if ``auto`` does not choose it; mostly empty."""
        return ""

    def why_not(self, device: DeviceKind, dtype: str) -> str:
        """Returns why the backend does not run models computing in ``dtype`` on a device, with this JAX; empty if it does."""
        if reason := self.unfit(device):
            return reason
        if self.jax_versions is not None and jax.__version_info__ not in self.jax_versions:
            return f"the kernels are for JAX {self.jax_versions} and this is {jax.__version__}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"the kernels compute in {' or '.join(self.dtypes)} between the products and the model in {dtype}"
        return ""

    def prepare(self, weights: Mapping[str, WeightT]) -> Mapping[str, WeightT]:
        """Returns the weights of all quantized layers in the form that the operations read fastest; their values stay the same.

        Called once in a program that applies the model many times. Operations take weights in either form.
        """
        return weights

    def prepare_for_floats(self, weights: Mapping[str, QTensor]) -> Mapping[str, QTensor]:
        """Does what :meth:`prepare` does for layers that multiply floats by dequantized weights."""
        return weights

    def imitate(self, act: ActQuantizer) -> Callable[[Float[Array, "*lead K"]], Float[Array, "*lead K"]]:
        """Returns what :meth:`encode` does to the values of a layer's input, as a pytree that is called with floats."""
        return act

    def unpack_ahead(self, weights: Mapping[str, WeightT], after: Shaped[Array, "*shape"]) -> dict[str, WeightT]:
        """Returns weights (N, K) of a block in the form that its products need, by name; their values stay the same.

        A backend may unpack all packed weights to int8 at once, but not before ``after`` (any array) has been computed.
        """
        _no_kernel("unpack_ahead")

    def linear(self, x: OperandT, weight: WeightT, bias: LeafT, dtype: DTypeLike) -> Float[Array, "... N"]:
        """Computes ``scale * (values @ codes.T) + bias``: int8 (..., K) times a weight (N, K), to (..., N) in ``dtype``.

        ``bias`` broadcasts against the result and includes the zero point of ``x``. The epilogue is in float32 at least.
        """
        _no_kernel("linear")

    def linear_parts(
        self, x: OperandT, weight: WeightT, bias: LeafT, dtype: DTypeLike, parts: int
    ) -> list[Float[Array, "... of_N"]]:
        """Computes :meth:`linear`, with the columns split into ``parts`` arrays of equal width."""
        _no_kernel("linear_parts")

    def linear_each(
        self, x: OperandT, weight: WeightT, bias: Float[Array, "L *rows N"], dtype: DTypeLike, parts: int
    ) -> list[Float[Array, "L B of_N"]]:
        """Computes :meth:`linear_parts` for a stack of independent layers: values (L, B, K) and weights (L, N, K) to ``parts``
        arrays (L, B, N / parts)."""
        _no_kernel("linear_each")

    def linear_gelu(self, x: OperandT, weight: WeightT, bias: LeafT, act: ActQuantizer) -> OperandT:
        """Computes :meth:`linear` and GELU (by tanh), and quantizes the result by ``act`` for the next layer."""
        _no_kernel("linear_gelu")

    def linear_residual(
        self, x: OperandT, weight: WeightT, bias: LeafT, gate_BD: LeafT, x_BTD: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Computes ``x + gate * linear``, (B, T, D) in the type of ``x_BTD``."""
        _no_kernel("linear_residual")

    def batched(self, a: Int8[Array, "B A M K"], b: Int8[Array, "B A N K"]) -> Int32[Array, "B A M N"]:
        """Computes ``a @ b^T`` over the last axes: int8 (B, A, M, K) and (B, A, N, K) to int32 (B, A, M, N)."""
        _no_kernel("batched")

    def encode(self, x: Float[Array, "... K"], act: ActQuantizer) -> OperandT:
        """Computes ``act.encode(x)``: (..., K) int8."""
        _no_kernel("encode")

    def modulate_encode(
        self, x_BTD: Float[Array, "B T D"], shift_BD: LeafT | None, scale_BD: LeafT, act: ActQuantizer, norm: Norm
    ) -> OperandT:
        """Quantizes ``norm(x) * (1 + scale) + shift`` by ``act``, (B, T, D) int8, in float32 at least. None means no shift."""
        _no_kernel("modulate_encode")

    def attention(
        self,
        q_BTD: Float[Array, "B T D"],
        k_BTD: Float[Array, "B T D"],
        v_BTD: Float[Array, "B T D"],
        num_heads: int,
        sites: dict[str, ActQuantizer],
    ) -> Float[Array, "B T D"]:
        """Computes softmax attention, (B, T, D). A backend that ``attends_on_codes`` quantizes q, k, v and the probabilities by
        ``sites``; another may compute in the type of q instead, where that is faster."""
        _no_kernel("attention")

    def attention_codes(
        self,
        q_BTD: Float[Array, "B T D"],
        k_BTD: Float[Array, "B T D"],
        v_BTD: Float[Array, "B T D"],
        num_heads: int,
        act: ActQuantizer,
    ) -> OperandT:
        """Computes softmax attention of floats, and quantizes it by ``act`` for the next product. ``act`` is static, with scale
        1 and no balancing: both are already in ``v_BTD`` (:func:`ptq4dit_jax.engine.layers.in_unit_steps`)."""
        _no_kernel("attention_codes")


#: A backend that multiplies the stored codes, with exact sums.
IntegerBackend: TypeAlias = Backend[LeafT, Encoded, QTensor]
