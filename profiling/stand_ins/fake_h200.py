"""A fake H200: enough of one for torch.compile to plan for it on a machine without a GPU.

Used by compiled.py and collectives.py; nothing is ever executed on it. Patches private functions of
torch (checked with 2.13 and triton 3.9). Call `triton_for_h200` before any trace: without a driver
torch cannot read a Triton kernel, takes every argument for mutated, and silently clones it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class H200:
    """The device properties that Inductor's heuristics ask for."""

    name, major, minor, multi_processor_count, warp_size = "NVIDIA H200", 9, 0, 132, 32
    total_memory, L2_cache_size, gcnArchName = 141 << 30, 60 << 20, ""
    regs_per_multiprocessor, max_threads_per_multi_processor = 65536, 2048
    max_threads_per_block = 1024
    shared_memory_per_block_optin, shared_memory_per_multiprocessor = 232448, 233472


class Driver:
    """Stands in for Triton's CUDA driver: names the target, runs nothing."""

    @staticmethod
    def get_current_target() -> Any:
        """Compute capability 9.0."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda *_: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
    get_device_interface = staticmethod(lambda: torch.cuda)


def _constant(value: Any) -> Callable:
    return lambda *_, **__: value


@contextlib.contextmanager
def pretend_h200() -> Iterator[None]:
    """Within it torch sees one H200, as far as compiling for it asks."""
    import torch._inductor.fx_passes.reinplace as reinplace
    import torch._inductor.scheduler as scheduler
    import torch._inductor.utils as utils
    from torch._dynamo.device_interface import CudaInterface

    saved, missing = [], object()

    def put(owner: Any, name: str, value: Any) -> None:
        before = owner.__code__ if name == "__code__" else owner.__dict__.get(name, missing)
        saved.append((owner, name, before))
        setattr(owner, name, value)

    both: dict[str, Any] = {"get_device_properties": H200(), "current_device": 0, "device_count": 1}
    both |= {"is_bf16_supported": True, "synchronize": None, "is_available": True}
    of_cuda = {"get_device_capability": (9, 0), "get_device_name": H200.name, "_lazy_init": None}
    of_cuda |= {"get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None}
    of_cuda |= {"is_initialized": False, "_exchange_device": 0, "_maybe_exchange_device": 0}
    of_cuda |= {"set_device": None}
    of_interface = {"get_compute_capability": 90, "is_triton_capable": True}
    of_interface |= {"raise_if_triton_unavailable": None}
    for name, value in (both | of_cuda).items():
        put(torch.cuda, name, _constant(value))
    for name, value in (both | of_interface).items():
        put(CudaInterface, name, staticmethod(_constant(value)))
    for name in ("get_device_properties", "current_device"):
        put(CudaInterface.Worker, name, staticmethod(_constant(both[name])))
    for module in (utils, scheduler):
        if hasattr(module, "has_triton"):
            put(module, "has_triton", _constant(True))
    # copy_ between fake CUDA tensors needs a CUDA build; this calls it only to check shapes
    replacement = (lambda inp, src, view_ops: inp).__code__
    put(reinplace._inplace_generalized_scatter, "__code__", replacement)
    layout = torch._C._conv_determine_backend_memory_format  # type: ignore[attr-defined]

    def channels_last(x: Tensor, w: Tensor, b: Any) -> Any:
        """Without cuDNN a convolution would be planned as NCHW; cuDNN keeps channels-last."""
        return torch.channels_last if x.dim() == 4 else layout(x, w, b)

    put(torch._C, "_conv_determine_backend_memory_format", channels_last)
    try:
        yield
    finally:
        for owner, name, value in reversed(saved):
            delattr(owner, name) if value is missing else setattr(owner, name, value)


def trace(module: nn.Module, inputs: list[Tensor]) -> dict[str, tuple]:
    """The forward and backward graphs of module(*inputs), a loss, and their fake inputs.

    The inputs are fake tensors; module's parameters and buffers are replaced by fake ones.
    """
    import torch._dynamo.utils as dynamo_utils
    import torch._inductor.lowering  # the decomposition of max-pool asks it
    from torch._functorch.aot_autograd import aot_module, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: dict[str, tuple] = {}

    def keep(name: str) -> Callable:
        def compiler(graph: Any, args: Any) -> Any:
            graphs[name] = (graph, args)
            return make_boxed_func(graph.forward)

        return compiler

    options: dict[str, Any] = {"partition_fn": min_cut_rematerialization_partition}
    options |= {"fw_compiler": keep("forward"), "bw_compiler": keep("backward")}
    options |= {"keep_inference_input_mutations": True, "decompositions": select_decomp_table()}
    strict = dynamo_utils.assert_no_fake_params_or_buffers
    dynamo_utils.assert_no_fake_params_or_buffers = lambda _: None
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with_fake_parameters(module, mode)
        with mode:
            out = aot_module(module, **options)(*(_fake(x) for x in inputs))
            out.backward(torch.empty_like(out))
    finally:
        dynamo_utils.assert_no_fake_params_or_buffers = strict
    return graphs


def triton_for_h200() -> None:
    """Let Triton compile for an H200, for the rest of this process.

    torch reads each kernel's code at every call to see what it writes. That is cached for each
    kernel and types, which halves the time of a trace.
    """
    import torch._higher_order_ops.triton_kernel_wrap as wrap
    import triton

    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type] - it has what torch asks for
    name = "identify_accessed_tensors"
    read = getattr(wrap, name, None)  # before 2.13 it has another name: then only slower
    if read is None:
        return
    known: dict[str, Any] = {}

    def cached(kernel: Any, kwargs: dict, *rest: Any) -> Any:
        kinds = {k: v.dtype if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        key = f"{id(kernel)} {kinds} {rest}"
        if key not in known:
            known[key] = read(kernel, kwargs, *rest)
        return known[key]

    setattr(wrap, name, cached)


def with_fake_parameters(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with parameters and buffers that have shape, strides and dtype, and no memory."""
    with mode:
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                part._parameters[name] = nn.Parameter(_fake(value))
            for name, value in part.named_buffers(recurse=False):
                part._buffers[name] = _fake(value)
    return module


def _fake(tensor: Tensor) -> Tensor:
    """Under a fake mode: the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
