"""What pyinfra reads: the nodes of the cluster file (LOCKSTEP_CLUSTER, inventory/cluster.yaml or the lab's)."""

from pyinfra import config as _config

from deploy.site import pyinfra_inventory as _pyinfra_inventory

all = _pyinfra_inventory(_config)
