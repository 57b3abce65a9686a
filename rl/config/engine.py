"""The section of who samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rl.config.sections import HOME, Auto, Section

OF_OWN_VLLM = (*("gpu_memory_utilization", "kv_cache_gib", "enforce_eager", "process", "recompute_kv"),)
"""Keys of `engine` that say how a run starts vLLM itself."""
OF_SERVERS = (*("urls", "token_file", "weights_folder", "weights_url"),)


class EngineConfig(Section):
    """Who samples. `auto`: vLLM where it can be imported, else transformers. `server`: vLLM servers, whose
    own options decide what `OF_OWN_VLLM` are here.
    """

    name: Literal["auto", "vllm", "transformers", "server"] = "auto"
    urls: list[Annotated[str, Field(pattern=r"^https?://[^/@?#]+/?$")]] = Field(
        default=[], description="servers, such as http://127.0.0.1:8000; `cohort serve` starts one"
    )
    token_file: Annotated[str, HOME] | None = Field(
        default=None, description="file of the token that servers ask for; `cohort serve` makes it"
    )
    weights_folder: Annotated[str, HOME] | None = Field(
        default=None, description="where servers find new weights; default: weights in run_dir"
    )
    weights_url: str | None = Field(
        default=None,
        pattern=r"^http://[\w.-]+:\d{1,5}$",
        description="this host for servers that see no folder of it, such as http://10.0.0.5:9000",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_num_seqs: Annotated[int, Field(ge=1)] | Auto | None = Field(
        default="auto", description="sampled together; auto: all in flight, from 256 to 512, or what fits"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] | Auto = Field(
        default="auto", description="vLLM's share of the GPU; auto: its weights and the cache it can use"
    )
    kv_cache_gib: float = Field(default=2.0, gt=0, description="vLLM on CPU only")
    enforce_eager: bool | None = Field(default=None, description="default: eager on CPU, CUDA graphs on GPU")
    process: Literal["auto", "own", "inside"] = Field(default="auto", description="vLLM; auto: own on a GPU")
    seed_requests: bool | None = Field(default=None, description="vLLM; default: where seeds cost nothing")
    recompute_kv: bool = Field(default=False, description="of running completions at each weight update")
    verify_sync: bool = Field(default=True, description="proof of arrival at every weight sync")
    canary_tolerance: float | None = Field(
        default=None, gt=0, description="nats, mean; 0.0025 fp32, 0.2 bf16"
    )
    timeout_s: float = Field(default=600.0, gt=0, description="longest wait for one sampling call")

    @property
    def gpu_share(self) -> float:
        """`gpu_memory_utilization`; of a run that nothing could be planned for, a third or so."""
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
        fields = type(self).model_fields
        if own := [key for key in OF_OWN_VLLM if getattr(self, key) != fields[key].default]:
            raise ValueError(
                f"engine.{own[0]}={getattr(self, own[0])}: under engine.name=server the server decides that; "
                "remove it, and give `cohort serve` vLLM's option"
            )
        return self
