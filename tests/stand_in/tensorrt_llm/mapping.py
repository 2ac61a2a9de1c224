"""STAND-IN: which rank this is, and the collectives between ranks, which are threads here."""

import queue
import threading
from dataclasses import dataclass, field

import torch


class Group:
    """Ranks that add up or collect a tensor together, in the order of their numbers: the sum is the same everywhere."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=120)
        self.parts = [None] * size

    def exchange(self, rank, tensor):
        self.parts[rank] = tensor
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


class Pipe:
    """What a pipeline stage hands to the next."""

    def __init__(self, stages):
        self.queues = [queue.Queue() for _ in range(stages)]

    def send(self, stage, tensor):
        self.queues[stage + 1].put(tensor)

    def receive(self, stage):
        return self.queues[stage].get(timeout=120)


@dataclass
class Mapping:
    world_size: int = 1
    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    enable_attention_dp: bool = False
    group: Group | None = field(default=None, repr=False)
    pipe: Pipe | None = field(default=None, repr=False)

    @property
    def tp_rank(self):
        return self.rank % self.tp_size

    @property
    def tp_group(self):
        return list(range(self.tp_size))

    def has_pp(self):
        return self.pp_size > 1

    @property
    def pp_rank(self):
        return self.rank // self.tp_size

    def is_first_pp_rank(self):
        return self.pp_rank == 0

    def is_last_pp_rank(self):
        return self.pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers):
        """As in 1.2, where the first stages take what does not divide."""
        return torch.tensor_split(torch.arange(num_layers), self.pp_size)[self.pp_rank].tolist()

    def to_dict(self):
        return {"world_size": self.world_size, "rank": self.rank, "tp_size": self.tp_size, "pp_size": self.pp_size}

    @classmethod
    def from_dict(cls, values):
        return cls(**{key: values[key] for key in ("world_size", "tp_size", "pp_size", "rank") if key in values})
