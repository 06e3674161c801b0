"""How a frozen weight is stored, and how it is multiplied with.

    int8      a row's largest magnitude is 127; the layout of bitsandbytes' LLM.int8() without
              outliers
    nf4       4-bit codes of a normal distribution in blocks of 64 (QLoRA: Dettmers et al. 2023),
              made and read by bitsandbytes; 4.5 bits a weight with the blocks' scales
    fp8       8-bit floats (e4m3) with a scale for each row, multiplied as they are: the other
              factor is rounded to 8-bit floats row by row at the time. Twice the rate of bf16
              products on cards of compute capability 8.9 and later
    nf4-fp8   stored as nf4, unpacked to 8-bit floats and multiplied as those
    nf4-e4m3  the same, and these 8-bit floats are the weight: nothing is lost in unpacking it. For
              weights that are rounded with this in mind (`model.rounding`)

Rounding the other factor makes training fast and is noise to it. What is measured and answered is
the rounded weight, multiplied exactly: of the loss of SmolLM2-135M on Chinese questions, 1.3 %
higher in fp8, half came from that noise.

LLM.int8() (Dettmers et al. 2022) rounds the activations to 8 bits too and keeps columns with
outliers beyond a threshold apart. With int8 and nf4 here only the weight is rounded: the product is
exact in the activations' format, needs no threshold, and its gradient is that of the same product.
A step of training multiplies so many tokens that unpacking the weight costs little beside the
product.

int8 is plain torch: bitsandbytes' quantiser takes only float16 on a GPU, and its two functions
write float32 copies of the weight where one pass does (tests hold both to be equal).

The backward product with an fp8 weight uses the same codes: a row's scale belongs to a column of
the gradient there, which is multiplied by it before it is rounded. The card multiplies 8-bit floats
only where both factors lie along the summed dimension, so that product needs the codes transposed,
kept as a second copy or made on the spot.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from chatfine.model.bnb import bitsandbytes
from chatfine.model.fp8 import (
    E4M3,
    E4M3_MAX,
    FP8_SMALLEST,
    multiplies_fp8,
    multiply_back,
    multiply_fp8,
    round_rows,
)

FP8_ROOM = 16
NF4_BLOCK = 64
# quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E)
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
Packed = tuple[torch.Tensor, ...]
"""Codes and scales; of an fp8 weight also the codes transposed, where they are kept."""


class Storage:
    """How a weight (out, in) is packed. Both tensors have a row for each row of the weight, so the
    packed form of some rows is those rows of the packed form: what FSDP2 slices stays whole.

    Codes and scales are integers and bytes, which neither `model.to(dtype)` nor FSDP2's mixed
    precision casts.
    """

    name: str
    layout: str
    """The name of the storage whose bytes these are."""

    def pack(self, weight: torch.Tensor) -> Packed:
        """Codes and scales of `weight` (out, in), whatever float format it is in."""
        raise NotImplementedError

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The rounded weight (rows, in) in `dtype`."""
        raise NotImplementedError

    def shapes(
        self, out_features: int, in_features: int
    ) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
        """Shape and number format of the codes, and the shape of the scales (always bytes)."""
        raise NotImplementedError

    def product(self, x: torch.Tensor, packed: Packed, in_features: int) -> torch.Tensor:
        """x Wᵀ (N, out) of x (N, in)."""
        return F.linear(x, self.unpack(packed, in_features, x.dtype))

    def product_back(self, grad: torch.Tensor, packed: Packed, in_features: int) -> torch.Tensor:
        """grad W (N, in) of grad (N, out)."""
        return grad @ self.unpack(packed, in_features, grad.dtype)


class Plain(Storage):
    """The weight as it is: what `model.lora` puts an adapter on where nothing is packed."""

    name = layout = "none"

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight."""
        return packed[0]


class Int8(Storage):
    """One byte a weight and a float32 scale a row."""

    name = layout = "int8"

    def pack(self, weight: torch.Tensor) -> Packed:
        """Codes (out, in) int8, scales (out, 4) bytes: the largest magnitude of each row."""
        wide = weight.to(torch.float32, copy=True)  # the one copy: all else is done in place
        largest = torch.linalg.vector_norm(wide, math.inf, 1, keepdim=True)
        codes = wide.mul_(127 / largest.clamp(min=1e-30)).round_().to(torch.int8)
        return codes, largest.view(torch.uint8)

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """One pass: the product is taken in float32 and rounded as it is written."""
        codes, scales = packed
        step = scales.view(torch.float32) / 127
        weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        return torch.mul(codes, step, out=weight)

    def shapes(
        self, out_features: int, in_features: int
    ) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
        """See `Storage.shapes`."""
        return (out_features, in_features), torch.int8, (out_features, 4)


class NF4(Storage):
    """Half a byte a weight and a float32 scale for 64 of them.

    Rows are filled up to whole blocks, so that no block belongs to two of them. The scales are not
    quantised a second time: that would save 0.37 bits of 4.5 and tie rows together.
    """

    name = layout = "nf4"

    def pack(self, weight: torch.Tensor) -> Packed:
        """Codes (out, in / 2) uint8, scales (out, 4 · in / 64) bytes, in rounded up to 64."""
        rows = weight.shape[0]
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            weight = weight.float()
        padded = F.pad(weight, (0, -weight.shape[1] % NF4_BLOCK)).contiguous()
        codes, state = bitsandbytes().quantize_4bit(padded, blocksize=NF4_BLOCK, quant_type="nf4")
        return codes.view(rows, -1), state.absmax.view(rows, -1).view(torch.uint8)

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight as bitsandbytes unpacks it; plain torch where a compiler can fuse that."""
        codes, scales = packed
        if torch.compiler.is_compiling():
            return nf4_values(codes, scales.view(torch.float32), in_features).to(dtype)
        wide = dtype if dtype != torch.float64 else torch.float32  # which its kernels lack
        functional = bitsandbytes()
        state = functional.QuantState(
            scales.view(torch.float32).reshape(-1), (codes.shape[0], 2 * codes.shape[1]),
            dtype=wide, blocksize=NF4_BLOCK, quant_type="nf4",
        )  # fmt: skip
        # a column, because it transposes what comes from a single row
        weight: torch.Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
        return weight[:, :in_features].to(dtype)

    def shapes(
        self, out_features: int, in_features: int
    ) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
        """See `Storage.shapes`."""
        blocks = -(-in_features // NF4_BLOCK)
        return (out_features, blocks * NF4_BLOCK // 2), torch.uint8, (out_features, 4 * blocks)


class Fp8(Storage):
    """One byte a weight, an e4m3 number, and a float32 scale a row.

    A row's largest magnitude becomes 448 / FP8_ROOM at most: e4m3 is a floating-point format, so
    room above costs no precision, and what an adapter adds to the weight fits in beside it
    (`model.lora_fp8`). Where the card can't multiply the two (or a dimension is no multiple of 16)
    the weight is unpacked, as with the other storages.
    """

    name = layout = "fp8"

    def pack(self, weight: torch.Tensor) -> Packed:
        """Codes (out, in) as bytes, scales (out, 4) bytes."""
        codes, scales = round_rows(weight, FP8_ROOM)
        return codes.view(torch.uint8), scales.view(torch.uint8)

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The rounded weight."""
        codes, scales = packed[:2]
        weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        # every e4m3 number is a bf16 one; the product is taken in float32 and rounded as it is
        # written
        return torch.mul(codes.view(E4M3).to(dtype), scales.view(torch.float32), out=weight)

    def shapes(
        self, out_features: int, in_features: int
    ) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
        """See `Storage.shapes`."""
        return (out_features, in_features), torch.uint8, (out_features, 4)

    def product(self, x: torch.Tensor, packed: Packed, in_features: int) -> torch.Tensor:
        """See `Storage.product`."""
        if not multiplies_fp8(x, len(packed[0]), in_features):
            return super().product(x, packed, in_features)
        codes, scales = self.fp8(packed, in_features)
        rounded, own = round_rows(x)
        return multiply_fp8(rounded, codes, own, scales, x.dtype)

    def product_back(self, grad: torch.Tensor, packed: Packed, in_features: int) -> torch.Tensor:
        """See `Storage.product_back`."""
        if not multiplies_fp8(grad, len(packed[0]), in_features):
            return super().product_back(grad, packed, in_features)
        return multiply_back(grad, *self.fp8_turned(packed, in_features))

    def fp8(self, packed: Packed, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 codes (out, in) and float32 scales (out, 1)."""
        return packed[0].view(E4M3), self.fp8_scales(packed)

    def fp8_scales(self, packed: Packed) -> torch.Tensor:
        """The scales (out, 1) alone."""
        return packed[1].view(torch.float32)

    def fp8_turned(self, packed: Packed, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same codes as (in, out), each row in one piece, and the scales (out, 1)."""
        turned = packed[2] if len(packed) > 2 else packed[0].t().contiguous()
        return turned.view(E4M3), packed[1].view(torch.float32)


class _Exact(Storage):
    """Products of the rounded weight alone: the other factor stays as it is."""

    def product(self, x: torch.Tensor, packed: Packed, in_features: int) -> torch.Tensor:
        """See `Storage.product`."""
        return Storage.product(self, x, packed, in_features)

    def product_back(self, grad: torch.Tensor, packed: Packed, in_features: int) -> torch.Tensor:
        """See `Storage.product_back`."""
        return Storage.product_back(self, grad, packed, in_features)


class ExactFp8(_Exact, Fp8):
    """`Fp8` with exact products."""

    name = "fp8-exact"


class NF4Fp8(NF4, Fp8):
    """Stored as NF4; unpacked to e4m3 numbers, whose rounding is small beside that of 4 bits, and
    multiplied as `Fp8` does."""

    name = "nf4-fp8"

    def product(self, x: torch.Tensor, packed: Packed, in_features: int) -> torch.Tensor:
        """See `Storage.product`."""
        return Fp8.product(self, x, packed, in_features)

    def product_back(self, grad: torch.Tensor, packed: Packed, in_features: int) -> torch.Tensor:
        """See `Storage.product_back`."""
        return Fp8.product_back(self, grad, packed, in_features)

    def fp8(self, packed: Packed, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Fp8.fp8`."""
        scales = self.fp8_scales(packed)
        largest = packed[1].view(torch.float32)  # (out, blocks)
        return nf4_values(packed[0], largest / scales, in_features).to(E4M3), scales

    def fp8_scales(self, packed: Packed) -> torch.Tensor:
        """See `Fp8.fp8_scales`."""
        largest = packed[1].view(torch.float32)
        return largest.amax(1, keepdim=True).clamp(min=FP8_SMALLEST) * (FP8_ROOM / E4M3_MAX)

    def fp8_turned(self, packed: Packed, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Fp8.fp8_turned`."""
        codes, scales = self.fp8(packed, in_features)
        return codes.t().contiguous(), scales


class NF4E4m3(NF4Fp8):
    """NF4 codes whose weight is what `NF4Fp8` multiplies: levels times scales as e4m3 numbers."""

    name = "nf4-e4m3"

    def unpack(self, packed: Packed, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The rounded weight."""
        if torch.compiler.is_compiling():
            codes, scales = self.fp8(packed, in_features)
            return (codes.to(torch.float32) * scales).to(dtype)
        scales = self.fp8_scales(packed)
        parts = (packed[1].view(torch.float32) / scales).view(torch.uint8)
        near = super().unpack((packed[0], parts), in_features, torch.float32).to(E4M3)
        return (near.to(torch.float32) * scales).to(dtype)


class ExactNF4E4m3(_Exact, NF4E4m3):
    """`NF4E4m3` with exact products."""

    name = "nf4-e4m3-exact"


PLAIN = Plain()
STORAGES: dict[str, Storage] = {
    one.name: one for one in (Int8(), NF4(), Fp8(), ExactFp8(), NF4Fp8(), NF4E4m3(), ExactNF4E4m3())
}
EXACT = {"fp8": "fp8-exact", "nf4-fp8": "nf4", "nf4-e4m3": "nf4-e4m3-exact"}
"""Storages that round the other factor too → the same weight, multiplied exactly."""
UNPACKED = ("int8", "nf4", "nf4-fp8", "nf4-e4m3", "nf4-e4m3-exact")
"""Those whose weight is written in another format before it is multiplied."""


def unpacked_again(name: str, packed: Packed, grad: torch.Tensor) -> Packed:
    """`packed` for the backward product of `grad` (N, out).

    A compiler sees forward and backward pass as one program, in which the weight is unpacked twice,
    and would keep the first result for the second. So the codes depend on the gradient, by nothing.
    """
    if not torch.compiler.is_compiling() or name not in UNPACKED:
        return packed
    codes, *rest = packed
    nothing = grad[0, :1].isnan().to(codes.dtype) & 0
    return codes | nothing, *rest


def nf4_values(codes: torch.Tensor, scales: torch.Tensor, in_features: int) -> torch.Tensor:
    """The float32 numbers (out, in) of NF4 codes (out, in / 2), the first of two in the high bits,
    times their blocks' scales (out, blocks). Plain torch, which a compiler can fuse."""
    table = torch.tensor(NF4_LEVELS, device=codes.device)
    pair = torch.stack((codes >> 4, codes & 15), -1)  # (out, in / 2, 2)
    blocks = table[pair.int()].view(len(codes), -1, NF4_BLOCK)
    return (blocks * scales[..., None]).view(len(codes), -1)[:, :in_features]
