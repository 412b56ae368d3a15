"""Where the processes of one group meet, as `torchrun` arranges it: the store is here, and every process is its client."""

from __future__ import annotations

from torch.distributed import TCPStore


class Rendezvous:
    """Holds the store for as long as it lives; its port is never free, so that nobody else can take it in between."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def environment(self, rank: int) -> dict[str, str]:
        """Of one process of the group, all of them on this machine."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
