"""The private or unstable torch calls that this package makes, each in one function with a test of its own."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle  # noqa: TID251 - what torch's own code has just written into memory; nothing of it comes from a file
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader

__all__ = [
    "any_nonfinite",
    "backward",
    "begin_workers",
    "copy_loader",
    "fork_works",
    "gamma_draws",
    "graphs_compiled",
    "has_cpp_compiler",
    "has_ended",
    "has_stepped",
    "has_unscaled",
    "hooks_on",
    "is_own_iteration",
    "lost_workers",
    "may_alias",
    "overflowed",
    "recorded_collectives",
    "renew_dtypes",
    "stop_workers",
    "take_step",
    "unwrap",
]


class _Kept(threading.local):
    """Small tensors, made once a thread: fits may run in several."""

    def __init__(self) -> None:
        self.cpu = torch.zeros((), dtype=torch.float32, device="cpu"), torch.ones((), dtype=torch.float32, device="cpu")
        self.found = self.cpu[0].numpy().data  # the same memory, read without a call into torch
        self.ones: dict[torch.device | torch.dtype, Tensor] = {}

    def flags(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the check of gradients writes what it finds, and a scale of one."""
        if device not in self.ones:
            self.ones[device] = torch.ones((), dtype=torch.float32, device=device)
        return torch.zeros_like(self.ones[device]), self.ones[device]

    def one(self, dtype: torch.dtype) -> Tensor:
        """The gradient of a loss by itself, on the CPU."""
        one = self.ones.get(dtype)
        if one is None or one._version:  # a hook has written into it
            one = self.ones[dtype] = torch.ones((), dtype=dtype, device="cpu")
        return one


_kept = _Kept()
_BACKWARD, _AUTOGRAD_BACKWARD = Tensor.backward, torch.autograd.backward


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """``loss.backward(gradient)``, for a scalar on the CPU without what torch does around autograd's engine.

    That is a look at what is known here, and a context for the threads of other devices; of a small net it takes as
    long as a third of the backward. Only where nobody could tell: nothing was put in the place of torch's functions,
    the loss is no subclass, no mode is on, and nobody reads the log of the graph.
    """
    if (
        type(loss) is not Tensor
        or not loss.is_cpu
        or loss.dim()
        or not loss.dtype.is_floating_point
        or Tensor.backward is not _BACKWARD
        or torch.autograd.backward is not _AUTOGRAD_BACKWARD
        or torch._C._is_torch_function_mode_enabled()
        or graph.log.isEnabledFor(logging.DEBUG)
    ):
        loss.backward(gradient)
        return
    gradients = (_kept.one(loss.dtype) if gradient is None else gradient,)
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def any_nonfinite(grads: list[Tensor], loss: Tensor | None) -> bool:
    """True if a gradient, or the loss, is NaN or infinite: one fused pass and one read of the device.

    On dense real gradients it uses the check of torch's own gradient scaler (it multiplies by 1, which keeps every
    bit); sparse and complex ones are checked one by one.
    """
    if loss is not None and loss.is_cpu:
        if not math.isfinite(loss.item()):
            return True
        loss = None
    if not grads:
        return loss is not None and not bool(torch.isfinite(loss).all())
    on_cpu = loss is None and grads[0].is_cpu
    found, one = _kept.cpu if on_cpu else _kept.flags(grads[0].device)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, one)
    except RuntimeError:  # it refuses sparse and complex gradients, and several devices
        found.zero_()
        return _any_nonfinite_singly(grads, loss)
    if not on_cpu:
        if loss is not None:
            found = found + (~torch.isfinite(loss)).to(found.dtype).sum()
        return found.item() != 0.0
    if _kept.found[()] == 0.0:
        return False
    found.zero_()
    return True


def _any_nonfinite_singly(grads: list[Tensor], loss: Tensor | None) -> bool:
    values = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    return not all(bool(torch.isfinite(v).all()) for v in (*values, *([] if loss is None else [loss])))


def overflowed(scaler: torch.amp.GradScaler, optimizers: Iterable[Optimizer], values: Iterable[Tensor] = ()) -> bool:
    """True if ``scaler`` found a gradient that is not finite when it unscaled ``optimizers``; or one of ``values`` is.

    One read of the device, as in the scaler's own ``step``. It says nothing of what it found, and would judge each
    optimizer by itself.
    """
    flags = [flag for one in optimizers for flag in scaler._found_inf_per_device(one).values()]
    flags += [(~torch.isfinite(value)).float().reshape(()) for value in values]
    return bool(flags) and torch.stack([flag.to(flags[0].device) for flag in flags]).sum().item() != 0.0


def has_unscaled(scaler: torch.amp.GradScaler) -> bool:
    """True if ``scaler`` has checked a gradient since its last ``update``, which fails where it has not."""
    return any(state["found_inf_per_device"] for state in scaler._per_optimizer_states.values())


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process so far."""
    from torch._dynamo.utils import counters  # takes seconds to import: only where something is to be compiled

    return int(counters["stats"]["unique_graphs"])


def has_cpp_compiler() -> bool:
    """True if torch finds the C++ compiler that it needs to compile for a CPU; it says so at the first step only."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def copy_loader(loader: DataLoader[Any], parts: Mapping[str, Any]) -> DataLoader[Any]:
    """A shallow copy of ``loader`` with attributes replaced, subclass included; it shares no running workers.

    The class refuses to have its sampler set after construction, hence the way round it.
    """
    clone = copy.copy(loader)
    clone.__dict__.update(parts, _iterator=None)
    return clone


def begin_workers(iterator: Any, indices: Iterator[Any], first: int) -> None:
    """Send the first batches of ``indices`` to the idle workers of ``iterator``, beginning with worker ``first``."""
    iterator._sampler_iter = indices
    for _ in range(first):
        next(iterator._worker_queue_idx_cycle)
    for _ in range(iterator._prefetch_factor * iterator._num_workers):
        iterator._try_put_index()


def stop_workers(iterator: Any) -> None:
    """End the worker processes of a DataLoader's iterator now, also while something still refers to it."""
    with suppress(RuntimeError):  # from its handler of SIGCHLD if one had died; its own finally has ended the others
        iterator._shutdown_workers()


def lost_workers(iterator: Any, patience_s: float = 0.0) -> list[tuple[int, Any, list[int]]]:
    """Workers of a DataLoader's iterator that have died: number, process, and how many batches ahead theirs were.

    0 is the batch that the main process asks for next. Waits up to ``patience_s`` for one to end: a broken connection
    may be seen before that.
    """
    processes = getattr(iterator, "_workers", ())
    with suppress(RuntimeError):  # torch's handler of SIGCHLD raises wherever the main thread is
        wait([process.sentinel for process in processes], patience_s)
    found = []
    for number, process in enumerate(processes):
        if process.exitcode not in (None, 0):
            tasks = [i for i, task in iterator._task_info.items() if task[0] == number and len(task) == 1]
            found.append((number, process, [i - iterator._rcvd_idx for i in sorted(tasks)]))
    return found


def has_stepped(optimizer: Optimizer) -> None:
    """Tell torch's schedulers that ``optimizer`` has moved before, in the process that wrote a checkpoint.

    They would warn of a wrong order where an epoch ends before its first step in this one.
    """
    optimizer._opt_called = True  # type: ignore[attr-defined]


def fork_works() -> bool:
    """True if a fork of this process can use CUDA and differentiate: asked of a fork that does nothing else.

    It cannot once CUDA was looked for here, or autograd has begun its threads, and torch does not say so before.
    """
    if not torch.backends.cuda.is_built():
        return True
    child = os.fork()
    if child == 0:
        works = False
        try:
            works = not torch.cuda._is_in_bad_fork()
            torch.ones((), requires_grad=True).backward()
        except RuntimeError:
            works = False
        finally:
            os._exit(0 if works else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def is_own_iteration(loader: DataLoader[Any]) -> bool:
    """True if the class of ``loader`` iterates in a way of its own, so that its parts cannot be replaced one by one."""
    kind = type(loader)
    return kind.__iter__ is not DataLoader.__iter__ or kind._get_iterator is not DataLoader._get_iterator


def has_ended(iterator: Any) -> bool:
    """True if the iterator of a DataLoader has seen the end of its IterableDataset while it filled its last batch."""
    return bool(getattr(getattr(iterator, "_dataset_fetcher", None), "ended", False))


def gamma_draws(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """Standard gamma variates from ``generator``; torch.distributions draw from the global one only."""
    return torch._standard_gamma(concentration, generator=generator)


def may_alias(tensor: Tensor) -> bool:
    """True for a leaf (it may be a parameter or a buffer) and for a view, whose memory others may hold or change."""
    return tensor.is_leaf or tensor._is_view()


# of the two wrappers that torch puts around every step: for the profiler and hooks, and to switch gradients off
_HOOKED = Optimizer.profile_hook_step(lambda: None).__code__
_SWITCHED = torch_optimizer._use_grad_for_differentiable(lambda: None).__code__
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def hooks_on(one: object) -> list[list[Any]]:
    """The functions that torch calls with the gradient of a tensor, or around the step of an optimizer, by kind."""
    return [list(held.values()) for name in _HOOKS if (held := getattr(one, name, None))]


def take_step(optimizer: Optimizer) -> None:
    """``optimizer.step()`` without what torch puts around it, which can cost as much as the step of a small net.

    Only where nobody could tell: no profiler is on, no hook is registered, and nothing was put in the place of ``step``
    (a torch scheduler does that).
    """
    step: Any = type(optimizer).step
    if (
        getattr(step, "__code__", None) is not _HOOKED
        or "step" in optimizer.__dict__
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    ):
        optimizer.step()
        return
    step = step.__wrapped__
    if getattr(step, "__code__", None) is not _SWITCHED or optimizer.defaults.get("differentiable"):
        step(optimizer)
        return
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        step.__wrapped__(optimizer)
    finally:
        torch._C._set_grad_enabled(before)


def unwrap(module: nn.Module) -> None:
    """Undo what ``torch.distributed.fsdp.fully_shard`` did to ``module``, but for its parameters.

    Its class, its hooks and the attributes that torch has added; torch itself has no way back.
    """
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        module.__dict__.pop(name, None)
    if not isinstance(module, FSDPModule):
        return
    state: Any = module._get_fsdp_state()
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in _groups(state):
        handles += group._module_to_pre_save_state_dict_hook_handle.values()
        handles += group._module_to_pre_load_state_dict_hook_handle.values()
        handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
    for handle in handles:
        handle.remove()
    for name in [name for name in module.__dict__ if name.startswith("__composable_api_")]:
        del module.__dict__[name]
    _module_state_mapping.pop(module, None)
    module.__class__ = type(module).__mro__[2]  # FSDP<its class>, FSDPModule, its class


def renew_dtypes(modules: Iterable[nn.Module]) -> None:
    """Let FSDP look again at which parameters train: it does so once, and fails for those that were all frozen then."""
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            for group in _groups(module._get_fsdp_state()):
                group._init_mp_dtypes()


def _groups(state: Any) -> list[Any]:
    """Of an FSDP state: a list since torch 2.12, one or none before."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def at_end_of_backward(function: Any) -> None:
    """Call ``function`` when the backward that is under way has ended; only from a hook of that backward."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def recorded_collectives() -> list[dict[str, Any]]:
    """The last collectives that this process has called, oldest first, as torch's flight recorder has them.

    Empty where torch has none, or ``TORCH_FR_BUFFER_SIZE=0`` switched it off. Takes up to 0.2 s.
    """
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_fr_trace", None)
    return [] if dump is None else list(pickle.loads(dump(True, True, False)).get("entries", ()))
