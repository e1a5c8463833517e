"""The files that a user writes, as typed and checked values: the cluster file and the job file.

``loader`` reads a cluster file, ``job`` a job file, ``settings`` the control machine's own settings, and
``pyinfra_hosts`` turns a cluster into pyinfra's hosts. Every finding carries file, line and key.

It is not pyinfra's dynamic inventory (that is ``inventory.py`` at the root, which calls this package), it
knows no role (the roles hand their specs in), and it never reaches a node.
"""
