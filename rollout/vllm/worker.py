"""The engine's end of a weight sync: vLLM's `worker_extension_cls`, in whichever process the model lives.

The first update goes through vLLM's own reload: 0.1 s of Python and more, however small the model is. Later
ones write into the parameters if two conditions hold. The first one left every tensor unchanged in the
expected rows of a parameter, and vLLM makes nothing else of its parameters (`can_be_written`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import ModelConfig, set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollout.fingerprint import compared_part, fingerprints, listed
from rollout.vllm.broadcast import SCHEME, Group, joined
from rollout.vllm.bucket import Layout, open_bucket, received
from rollout.vllm.internals import quicken_logprobs, require
from rollout.vllm.names import Names
from rollout.vllm.weight_files import ReadFiles, opened, overwritten
from rollout.vllm.weights import (
    Slot,
    can_be_written,
    complete_layers,
    find_slots,
    read_slots,
    repack,
    whole_slots,
    write_slot,
)

_OF_NO_CODE = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "use_cache")
_ALIKE = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3_text", "phi3", "granite", "granitemoe", "granitemoeshared", "olmoe", "glm4", "glm4_moe"),
}


def hash_of_architecture(config: ModelConfig, plain: Any = ModelConfig.compute_hash) -> str:
    """The key of vLLM's compiled code, without what changes no code of the families `_ALIKE`.

    Left out are folder, sleep mode, longest sequence, special tokens and the dtype on disk. With them each
    checkpoint of a model would be compiled anew, Triton's kernels included: 40 s. Code of other families may
    depend on them: Llama 4's on the longest sequence and on the folder's generation_config.json.
    """
    own = config.hf_config
    if own is not config.hf_text_config or own.model_type not in _ALIKE or config.quantization is not None:
        return plain(config)
    config = copy.copy(config)
    config.model, config.revision, config.enable_sleep_mode = "", None, False
    config.hf_config = config.hf_text_config = copy.deepcopy(own)
    for name in _OF_NO_CODE:
        vars(config.hf_config).pop(name, None)
    if "longrope" not in str(own):  # its factors depend on the longest sequence
        config.max_model_len = 0
    return plain(config)


cast(Any, ModelConfig).compute_hash = hash_of_architecture


class WeightReceiver:
    """Methods that vLLM adds to its worker; `LocalCore.call` reaches them by name.

    Every name starts with `cohort_`, since vLLM refuses a name that its worker has already.
    """

    cohort_slots: dict[str, Slot]
    cohort_names: Names
    cohort_open: bool
    cohort_may_write: bool
    cohort_writes: bool
    cohort_came: dict[str, int]  # fingerprints of what a reload was given
    cohort_bucket: Tensor
    cohort_layers: dict[str, frozenset[str]]
    cohort_begun: bool = False  # a load, since when the weights are unknown
    cohort_group: Group
    cohort_coming: tuple[str, set[str]] = ("", set())  # content, and the names that have yet to come
    cohort_content: str = ""  # of the pushed weights that it holds; "": of its start, or a load broke off
    cohort_holder: tuple[str, float] = ("", 0.0)  # the run that has this server, and until when
    get_model: Any
    wake_up: Any
    model_runner: Any
    model_config: Any
    vllm_config: Any
    rank: int

    def cohort_describe(self, uncompiled: bool) -> list[list[Any]]:
        """[name, shape, dtype, source, sampled, axis, ranges] of every tensor, as `HeldTensor` has them.

        `uncompiled`: this process compiles nothing from here on (see `LocalCore`).
        """
        if uncompiled:
            torch.compiler.set_stance("force_eager")
        if not hasattr(self, "cohort_slots"):  # asking again changes nothing
            require("worker", self)
            if torch.cuda.is_available():
                quicken_logprobs()
            model = self.get_model()
            self.cohort_names = Names(self.model_config.hf_config, model)
            self.cohort_slots = find_slots(model, self.cohort_names)
            self.cohort_open = self.cohort_writes = False
        return [
            [name, list(h.shape), str(h.dtype).removeprefix("torch."), h.source, h.sampled, h.axis, h.ranges]
            for name, h in ((name, slot.held) for name, slot in self.cohort_slots.items())
        ]

    @torch.inference_mode()
    def cohort_wake(self, tag: str) -> None:
        """Takes memory for vLLM's part `tag`. The cache is zeroed: kernels multiply masked values by 0."""
        self.wake_up([tag])
        for cache in self.model_runner.kv_caches if tag == "kv_cache" else ():
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                tensor.zero_()

    @torch.no_grad()
    def cohort_begin(self) -> None:
        """From here to `cohort_finish` the model holds no weights that could be used."""
        if self.cohort_open:  # an update broke off; what it loaded would count towards this one
            self.cohort_close()
        if self.cohort_writes:  # each tensor by itself, whatever layer it is of
            self.cohort_layers = {name: frozenset({name}) for name in self.cohort_slots}
            return
        self.cohort_may_write, self.cohort_came = can_be_written(self.get_model(), self.cohort_slots), {}
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.get_model())
        self.cohort_open = True
        self.cohort_layers = complete_layers(self.cohort_slots)

    @torch.no_grad()
    def cohort_receive(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Loads tensors under their Hugging Face names; they must stay as they are until `cohort_finish`."""
        if self.cohort_writes:
            for name, tensor in tensors:
                write_slot(self.cohort_slots[name], tensor)
            return
        with set_current_vllm_config(self.vllm_config):
            self.get_model().load_weights(
                p for pair in self.cohort_noted(tensors) for p in self.cohort_names.as_checkpoint(*pair)
            )

    def cohort_noted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if self.cohort_may_write:
                part = compared_part(tensor, self.cohort_slots[name].held, version=0)
                self.cohort_came |= fingerprints([(name, part)])
            yield name, tensor

    def cohort_receive_bucket(self, layout: Layout, handle: list[Any] | None) -> None:
        """Loads a filling of the bucket; `handle` comes with the first one."""
        if handle is not None:
            self.cohort_bucket = open_bucket(handle)
        held = {name: slot.held for name, slot in self.cohort_slots.items()}
        self.cohort_receive(received(self.cohort_bucket, layout, held, self.cohort_layers))
        if self.cohort_bucket.is_cuda:
            torch.cuda.synchronize()  # the sender fills the bucket again as soon as this returns

    def cohort_release(self) -> None:
        """Releases the bucket, while the process that shares it is still there."""
        is_cuda = self.cohort_bucket.is_cuda
        del self.cohort_bucket
        if is_cuda:
            torch.cuda.ipc_collect()

    @torch.no_grad()
    def cohort_finish(self, version: int) -> None:
        if self.cohort_writes:
            return
        self.cohort_close()
        repack(self.cohort_slots)
        if self.cohort_may_write:
            self.cohort_writes = self.cohort_came == fingerprints(read_slots(self.cohort_slots, version))

    def cohort_close(self) -> None:
        """Gives every layer its parameters back, with what was loaded."""
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.get_model(), self.model_config)
        self.cohort_open = False

    @torch.no_grad()
    def cohort_fingerprints(self, version: int) -> dict[str, int]:
        """Fingerprints of the tensors that the kernels use."""
        return fingerprints(read_slots(self.cohort_slots, version))

    @torch.no_grad()
    def cohort_load(self, push: dict[str, Any]) -> dict[str, str]:
        """Loads files of `rollout.vllm.weight_files` if they are undamaged and fit, or ends a broadcast; says
        what it then holds.
        """
        return self.cohort_told(
            self.cohort_end if push["where"].startswith(SCHEME) else self.cohort_read, push
        )

    def cohort_told(self, work: Callable[..., None], *arguments: Any) -> dict[str, str]:
        """Answers with a fault, since vLLM ends an engine whose worker raises. "refused" leaves the weights
        as they were; after "broken" they are unknown, and the next push has to be whole.
        """
        if not hasattr(self, "cohort_slots"):
            self.cohort_describe(False)
        try:
            work(*arguments)
        except Exception as fault:
            said = str(fault) if isinstance(fault, ValueError) else f"{type(fault).__name__}: {fault}"
            return {"holds": self.cohort_content, "broken" if self.cohort_begun else "refused": said}
        return {"holds": self.cohort_content}

    def cohort_read(self, push: dict[str, Any]) -> None:
        self.cohort_begun = False
        if push["base"] and self.cohort_content not in (push["base"], push["content"]):
            raise ValueError(
                f"the delta to {push['content']} is laid over {push['base']}, but the server holds "
                f"{self.cohort_content or 'weights that nobody pushed'}"
            )
        with opened(push) as files:
            files.check({name: slot.held for name, slot in self.cohort_slots.items()}, bool(push["base"]))
            whole = ((name, values) for name, values, _ in files.tensors())
            tensors = self.cohort_overwritten(files) if push["base"] else whole
            self.cohort_begun, self.cohort_content = True, ""
            self.cohort_begin()
            self.cohort_receive(tensors)
            self.cohort_finish(push["version"])
            self.cohort_content = push["content"]

    def cohort_join(self, url: str, key: str, size: int, timeout_s: float) -> dict[str, str]:
        """Joins the group `key` of the trainer at `url`, whose broadcasts have at most `size` bytes."""
        place = {"rank": 1 + self.rank, "size": 1 + self.vllm_config.parallel_config.world_size}

        def join() -> None:
            self.cohort_begun = False
            if hasattr(self, "cohort_group"):
                self.cohort_group.close()
            device = next(iter(self.cohort_slots.values())).held.device
            self.cohort_bucket = torch.empty(size, dtype=torch.uint8, device=device)
            self.cohort_group = joined(url, key, bytes_B=self.cohort_bucket, timeout_s=timeout_s, **place)

        return self.cohort_told(join)

    def cohort_await(self, content: str, plan: dict[str, list[Any]]) -> dict[str, str]:
        """Gets ready for broadcasts if `plan` {name: [shape, dtype]} is what the model has."""

        def check() -> None:
            self.cohort_begun = False
            held = {n: s.held for n, s in self.cohort_slots.items() if s.held.source == n}
            own = {n: [list(h.shape), str(h.dtype).removeprefix("torch.")] for n, h in held.items()}
            for name in sorted(plan.keys() | own.keys()):
                if plan.get(name) != own.get(name):
                    raise ValueError(
                        f"{name} is {plan.get(name, 'not sent')}, and in the model {own.get(name, 'missing')}"
                    )
            self.cohort_begun, self.cohort_content = True, ""
            self.cohort_coming = content, set(plan)
            self.cohort_begin()

        return self.cohort_told(check)

    @torch.no_grad()
    def cohort_take(self, layout: Layout, num_bytes: int) -> dict[str, str]:
        """Loads the tensors that the next broadcast brings."""

        def take() -> None:
            self.cohort_group.move(self.cohort_bucket[:num_bytes])
            self.cohort_receive_bucket(layout, None)
            self.cohort_coming[1].difference_update(name for name, _ in layout)

        return self.cohort_told(take)

    def cohort_end(self, push: dict[str, Any]) -> None:
        content, missing = self.cohort_coming
        if content != push["content"] or missing:
            raise ValueError(f"of {push['content']} it was not sent {listed(sorted(missing)) or 'anything'}")
        self.cohort_finish(push["version"])
        self.cohort_content = push["content"]

    def cohort_overwritten(self, files: ReadFiles) -> Iterable[tuple[str, Tensor]]:
        """Whole tensors: the delta over what the model holds, if that can be read, else ValueError.

        A reload gets all of them at once, since it would treat a layer that lacks a tensor as complete.
        """
        device = next(iter(self.cohort_slots.values())).held.device
        if not self.cohort_writes and device.type != "cpu":
            raise ValueError("vLLM makes something else of this model's weights: it takes whole ones only")
        over = {name: (values, positions) for name, values, positions in files.tensors()}
        wanted = over if self.cohort_writes else self.cohort_slots
        slots = {name: self.cohort_slots[name] for name in wanted}
        made = (
            (name, overwritten(base, *over[name]) if name in over else base.clone())
            for name, base in whole_slots(slots)
        )
        return made if self.cohort_writes else list(made)

    def cohort_lease(self, run: str, seconds: float) -> dict[str, Any]:
        """Gives the server to `run` for that long, unless another has it; who has it, and what it holds."""
        now = time.monotonic()
        if self.cohort_holder[0] in ("", run) or self.cohort_holder[1] <= now:
            self.cohort_holder = run, now + seconds
        holder, until = self.cohort_holder
        return {"holder": holder, "left": until - now, "holds": self.cohort_content}

    def cohort_facts(self) -> dict[str, Any]:
        """Which pushed weights the model holds, and what the server's config does not tell a trainer."""
        device = next(self.get_model().parameters()).device.type
        return {
            "holds": self.cohort_content,
            "vocab_size": self.model_config.get_vocab_size(),
            "device": device,
        }
