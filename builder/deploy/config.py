"""How a build is served. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from plugins.common.config import Config


class DeployConfig(Config):
    """The options of `twofour deploy`."""

    model_name: str = "llm"
    streaming: bool | None = None  # None: yes, unless the response cache is asked for: Triton cannot do both
    response_cache: bool = False
    dynamic_batching: bool = False  # requests reach the engine in groups; it batches continuously either way
    max_queue_delay_microseconds: int = Field(default=0, ge=0)  # how long dynamic batching waits for a group
    max_queue_size: int = Field(default=0, ge=0)  # requests that may wait behind the running batch; 0: no limit
    max_tokens: int = Field(default=64, ge=1)  # for a request that does not say
    engine_path: str | None = None  # what config.pbtxt says, from the model's directory; None: worked out
