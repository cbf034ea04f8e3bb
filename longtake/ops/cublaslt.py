"""Matrix products of cuBLASLt that PyTorch does not offer: with an addend or a GELU's gradient.

The library is the one that PyTorch itself multiplies with; it is called by ctypes. What an epilogue
saves is a pass over all tokens by a kernel of its own: the product's tile is on chip already.

Everything is row-major here. cuBLASLt thinks in columns, so it is handed each matrix as its
transpose, and the operands in the other order.

Source: cuBLAS library documentation, "Using the cuBLASLt API". Letters: B batch, M rows, O outputs,
I inputs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# From cublasLt.h and library_types.h; none has changed since CUDA 11.4.
_TYPES = {torch.bfloat16: 14, torch.float16: 2}  # CUDA_R_16BF, CUDA_R_16F
_R_32F = 0
_COMPUTE_32F = 68
_DESC_TRANSA, _DESC_EPILOGUE = 3, 7
_DESC_BIAS_POINTER, _DESC_BIAS_BATCH_STRIDE = 8, 10
_DESC_AUX_POINTER, _DESC_AUX_LD, _DESC_AUX_BATCH_STRIDE = 11, 12, 13
_LAYOUT_BATCH_COUNT, _LAYOUT_BATCH_STRIDE = 5, 6
_PREFERENCE_WORKSPACE, _PREFERENCE_REDUCTION, _PREFERENCE_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
# Parts of a sum are added in place or in float32, never in the dtype of the result.
_REDUCTION_IN_FLOAT32 = 3
_NOT_SUPPORTED, _OUT_OF_MEMORY = 15, 3
_WORKSPACE_BYTES = 32 << 20
# What an allocation of PyTorch is aligned to at least, and as much as cuBLASLt asks about.
_ALIGNMENT = 256


class NoKernelError(RuntimeError):
    """cuBLASLt does not support what it was asked for."""


class Epilogue(IntEnum):
    """What is done to a tile of the product before it is written."""

    NOTHING = 1
    BIAS = 4
    """A row is added to each row of the product."""
    GELU_GRADIENT = 192
    """Multiplied by the derivative of the tanh-approximated GELU at `aux`."""


@dataclass(frozen=True)
class _Problem:
    """What cuBLASLt chooses a kernel by."""

    batch: int
    rows: int
    outputs: int
    inputs: int
    is_transposed: bool  # the weight is (O, I)
    dtype: torch.dtype
    epilogue: Epilogue
    alignment: int
    device: torch.device


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def runs_cublaslt(*operands: Tensor) -> bool:
    """Whether `product` takes these: of one half precision on one GPU since Ampere, with rows of a
    multiple of 16 bytes."""
    return (
        len({(x.dtype, x.device) for x in operands}) == 1
        and operands[0].is_cuda
        and operands[0].dtype in _TYPES
        and all(x.shape[-1] % 8 == 0 and x.numel() > 0 for x in operands)
        and torch.cuda.get_device_capability(operands[0].device) >= (8, 0)
        and _library() is not None
    )


def product(
    x_BMI: Tensor,
    weight: Tensor,
    *,
    is_transposed: bool,
    addend_BMO: Tensor | None = None,
    bias_BO: Tensor | None = None,
    gelu_aux_BMO: Tensor | None = None,
) -> Tensor | None:
    """x W^T for is_transposed (W is (B, O, I)), else x W (W is (B, I, O)), plus addend and bias, or
    times gelu'(aux), with one rounding. All contiguous and of one dtype that `runs_cublaslt`.

    None if cuBLASLt has no kernel for these; that is logged once. Raises RuntimeError with its
    status if a launch fails.
    """
    batch, rows, inputs = x_BMI.shape
    outputs = weight.shape[1 if is_transposed else 2]
    out_BMO = x_BMI.new_empty(batch, rows, outputs)
    if gelu_aux_BMO is not None:
        epilogue = Epilogue.GELU_GRADIENT
    else:
        epilogue = Epilogue.NOTHING if bias_BO is None else Epilogue.BIAS
    tensors = (x_BMI, weight, out_BMO, addend_BMO, bias_BO, gelu_aux_BMO)
    pointers = [0 if x is None else x.data_ptr() for x in tensors]
    plan = _plan(
        _Problem(
            batch,
            rows,
            outputs,
            inputs,
            is_transposed,
            x_BMI.dtype,
            epilogue,
            _common_alignment(pointers),
            x_BMI.device,
        )
    )
    if plan is None:
        return None
    plan.run(*pointers, workspace=x_BMI.new_empty(_WORKSPACE_BYTES, dtype=torch.uint8))
    return out_BMO


def _common_alignment(pointers: list[int]) -> int:
    """The largest power of two, up to `_ALIGNMENT`, that all addresses are multiples of."""
    together = functools.reduce(int.__or__, pointers, _ALIGNMENT)
    return together & -together


class _Plan:
    """A kernel for one problem, and the descriptions that cuBLASLt reads at each launch."""

    def __init__(self, problem: _Problem) -> None:
        self.device = problem.device
        self.has_aux = problem.epilogue == Epilogue.GELU_GRADIENT
        self.has_bias = problem.epilogue == Epilogue.BIAS
        # Pointers of bias and aux are part of the description, which two threads may both want.
        self.lock = threading.Lock()
        p, dtype = problem, _TYPES[problem.dtype]
        self.description = _made("cublasLtMatmulDescCreate", _COMPUTE_32F, _R_32F)
        self._describe(_DESC_TRANSA, ctypes.c_int32(int(p.is_transposed)))
        self._describe(_DESC_EPILOGUE, ctypes.c_int32(p.epilogue))
        if self.has_bias:
            self._describe(_DESC_BIAS_BATCH_STRIDE, ctypes.c_int64(p.outputs))
            self._describe(_DESC_BIAS_POINTER, ctypes.c_void_p(p.alignment))
        if self.has_aux:
            self._describe(_DESC_AUX_LD, ctypes.c_int64(p.outputs))
            self._describe(_DESC_AUX_BATCH_STRIDE, ctypes.c_int64(p.rows * p.outputs))
            self._describe(_DESC_AUX_POINTER, ctypes.c_void_p(p.alignment))
        weight = (p.inputs, p.outputs) if p.is_transposed else (p.outputs, p.inputs)
        self.weight_layout = _layout(dtype, *weight, p.batch)
        self.x_layout = _layout(dtype, p.inputs, p.rows, p.batch)
        self.out_layout = _layout(dtype, p.outputs, p.rows, p.batch)
        self.algorithm = self._choose(p)

    def _describe(self, attribute: int, value: ctypes._SimpleCData) -> None:
        _call(
            "cublasLtMatmulDescSetAttribute",
            self.description,
            attribute,
            ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(value)),
        )

    def _choose(self, problem: _Problem) -> _Algorithm:
        """The kernel that cuBLASLt itself holds for the best."""
        preference = _made("cublasLtMatmulPreferenceCreate")
        wishes: list[tuple[int, ctypes._SimpleCData]] = [
            (_PREFERENCE_WORKSPACE, ctypes.c_uint64(_WORKSPACE_BYTES)),
            (_PREFERENCE_REDUCTION, ctypes.c_uint32(_REDUCTION_IN_FLOAT32)),
        ]
        wishes += [(x, ctypes.c_uint32(problem.alignment)) for x in _PREFERENCE_ALIGNMENTS]
        for attribute, value in wishes:
            _call(
                "cublasLtMatmulPreferenceSetAttribute",
                preference,
                attribute,
                ctypes.byref(value),
                ctypes.c_size_t(ctypes.sizeof(value)),
            )
        found, count = _Heuristic(), ctypes.c_int()
        _call(
            "cublasLtMatmulAlgoGetHeuristic",
            _handle(problem.device),
            self.description,
            self.weight_layout,
            self.x_layout,
            self.out_layout,
            self.out_layout,
            preference,
            1,
            ctypes.byref(found),
            ctypes.byref(count),
        )
        _call("cublasLtMatmulPreferenceDestroy", preference)
        if count.value == 0 or found.state != 0:
            raise NoKernelError(f"cuBLASLt has no kernel for {problem} (status {found.state})")
        return found.algorithm

    def run(
        self,
        x: int,
        weight: int,
        out: int,
        addend: int,
        bias: int,
        aux: int,
        *,
        workspace: Tensor,
    ) -> None:
        """Launches on the current stream; arguments are addresses, 0 for what is not there."""
        alpha, beta = ctypes.c_float(1), ctypes.c_float(1 if addend else 0)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        with self.lock, torch.cuda.device(self.device):
            if self.has_bias:
                self._describe(_DESC_BIAS_POINTER, ctypes.c_void_p(bias))
            if self.has_aux:
                self._describe(_DESC_AUX_POINTER, ctypes.c_void_p(aux))
            _call(
                "cublasLtMatmul",
                _handle(self.device),
                self.description,
                ctypes.byref(alpha),
                ctypes.c_void_p(weight),
                self.weight_layout,
                ctypes.c_void_p(x),
                self.x_layout,
                ctypes.byref(beta),
                ctypes.c_void_p(addend or out),
                self.out_layout,
                ctypes.c_void_p(out),
                self.out_layout,
                ctypes.byref(self.algorithm),
                ctypes.c_void_p(workspace.data_ptr()),
                ctypes.c_size_t(_WORKSPACE_BYTES),
                ctypes.c_void_p(stream),
            )


@functools.cache
def _plan(problem: _Problem) -> _Plan | None:
    try:
        with torch.cuda.device(problem.device):
            return _Plan(problem)
    except NoKernelError as error:
        logger.warning("%s: it is computed in separate steps instead", error)
        return None


def _layout(dtype: int, rows: int, columns: int, batch: int) -> ctypes.c_void_p:
    """Of a matrix as cuBLASLt sees it: columns lie one behind the other, and matrices, too."""
    layout = _made(
        "cublasLtMatrixLayoutCreate",
        dtype,
        ctypes.c_uint64(rows),
        ctypes.c_uint64(columns),
        ctypes.c_int64(rows),
    )
    values: list[tuple[int, ctypes._SimpleCData]] = [
        (_LAYOUT_BATCH_COUNT, ctypes.c_int32(batch)),
        (_LAYOUT_BATCH_STRIDE, ctypes.c_int64(rows * columns)),
    ]
    for attribute, value in values:
        _call(
            "cublasLtMatrixLayoutSetAttribute",
            layout,
            attribute,
            ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(value)),
        )
    return layout


@functools.cache
def _handle(device: torch.device) -> ctypes.c_void_p:
    with torch.cuda.device(device):
        return _made("cublasLtCreate")


def _made(create: str, *arguments: object) -> ctypes.c_void_p:
    """What a function of the library makes and writes to its first argument."""
    made = ctypes.c_void_p()
    _call(create, ctypes.byref(made), *arguments)
    return made


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status == 0:
        return
    if status == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA out of memory in {name}")
    kind = NoKernelError if status == _NOT_SUPPORTED else RuntimeError
    raise kind(f"{name} failed with cuBLAS status {status}")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library that PyTorch has loaded, or None where there is none."""
    if torch.version.cuda is None:
        return None
    torch.cuda.current_blas_handle()  # loads it, if nothing has been multiplied yet
    try:
        return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")
    except OSError:
        return None
