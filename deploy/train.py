"""Starts or resumes a job, or leaves it running; nothing else of the nodes is changed.

    pyinfra inventory.py deploy/train.py -y [--dry] [--data job=PATH] [--data retry=true]

The job is the cluster file's unless ``job`` names another. Nothing starts unless every node of the
job is right in every role; deploy/cluster.py makes it so.
"""

from roles import job
from roles.converge import converge

converge(job.role)
