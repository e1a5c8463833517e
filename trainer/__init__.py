"""What runs on the nodes: text files in, a trained causal language model out.

One process a GPU (or a CPU rank), one YAML file, one run directory on shared storage. It knows
nothing of how it was launched beyond the usual RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT, and it imports nothing of Lockstep's other packages.

``trainer.config``, ``trainer.reader``, ``trainer.checkpoint``, ``trainer.evidence``,
``trainer.metrics`` and ``trainer.data`` import without torch, so that a control machine may use them.
"""
