"""Fixtures that test files here share."""

from tests.support.network_exports import exports, with_stand_in
from tests.support.pytorch_checkpoints import checkpoints
from tests.support.stand_in_gpu import gpu
from tests.support.trtllm_builds import built, machine, model

__all__ = ["built", "checkpoints", "exports", "gpu", "machine", "model", "with_stand_in"]
