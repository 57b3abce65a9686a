"""The section `engine` of a run: what samples the completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rl.config.sections import HOME, SERVER, Auto, Section

OF_OWN_VLLM = (*("gpu_memory_utilization", "kv_cache_gib", "enforce_eager", "process", "recompute_kv"),)
"""Keys of `engine` that say how a run starts vLLM itself."""
OF_SERVERS = (*("urls", "token_file", "weights_folder", "weights_url"),)


class EngineConfig(Section):
    """What samples. `auto`: vLLM if it can be imported, else transformers. `server`: vLLM servers, whose own
    options replace the keys about vLLM's process and memory.
    """

    name: Literal["auto", "vllm", "transformers", "server"] = "auto"
    urls: list[Annotated[str, Field(pattern=SERVER)]] = Field(
        default=[], description="servers, such as http://127.0.0.1:8000; `cohort serve` starts one"
    )
    token_file: Annotated[str, HOME] | None = Field(
        default=None, description="file with the token that servers ask for; `cohort serve` makes it"
    )
    weights_folder: Annotated[str, HOME] | None = Field(
        default=None, description="folder where servers find new weights; default: weights in run_dir"
    )
    weights_url: str | None = Field(
        default=None,
        pattern=r"^(http|nccl)://[\w.-]+:\d{1,5}$",
        description="this host's address, http://10.0.0.5:9000 for servers that share no folder with it, "
        "nccl://10.0.0.5:9000 to send weights from GPU to GPU",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(default="auto", description="of its weights")
    max_num_seqs: Annotated[int, Field(ge=1)] | Auto | None = Field(
        default="auto", description="completions at once; auto: all in flight, 256 to 512, or what fits"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] | Auto = Field(
        default="auto", description="vLLM's share of the GPU; auto: its weights and the cache it can use"
    )
    kv_cache_gib: float = Field(default=2.0, gt=0, description="cache of vLLM on a CPU")
    enforce_eager: bool | None = Field(default=None, description="default: eager on CPU, CUDA graphs on GPU")
    process: Literal["auto", "own", "early", "inside"] = Field(
        default="auto", description="of vLLM; auto: own on GPU; early: own, begun while the policy loads"
    )
    seed_requests: bool | None = Field(default=None, description="for vLLM; default: if seeds cost nothing")
    recompute_kv: bool = Field(default=False, description="rebuild caches of running completions at a sync")
    verify_sync: bool = Field(default=True, description="prove at every weight sync that weights arrived")
    canary_tolerance: float | None = Field(
        default=None, gt=0, description="mean log-prob gap, nats; default: 0.0025 in fp32, 0.2 in bf16"
    )
    timeout_s: float = Field(
        default=600.0, gt=0, description="longest wait for one sampling call, and for a first server"
    )

    @property
    def gpu_share(self) -> float:
        """`gpu_memory_utilization`; about a third if it is auto and nothing could be planned."""
        return 0.35 if self.gpu_memory_utilization == "auto" else self.gpu_memory_utilization

    @model_validator(mode="after")
    def check_servers(self) -> EngineConfig:
        of_servers = [key for key in OF_SERVERS if getattr(self, key)]
        if self.name != "server" and of_servers:
            raise ValueError(
                f"engine.{of_servers[0]} does nothing under engine.name={self.name}; set engine.name=server"
            )
        if self.name != "server":
            return self
        if not self.urls or not self.token_file:
            raise ValueError(
                "engine.name=server needs engine.urls=[http://127.0.0.1:8000] and engine.token_file; "
                "`cohort serve MODEL` starts a server and prints both"
            )
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError(f"engine.urls={self.urls} names a server twice; name each once")
        if self.weights_folder and (self.weights_url or "").startswith("nccl"):
            raise ValueError("engine.weights_folder does nothing if engine.weights_url=nccl://; remove one")
        fields = type(self).model_fields
        if own := [key for key in OF_OWN_VLLM if getattr(self, key) != fields[key].default]:
            raise ValueError(
                f"engine.{own[0]}={getattr(self, own[0])}: under engine.name=server the server decides that; "
                "remove it, and give `cohort serve` vLLM's option"
            )
        return self
