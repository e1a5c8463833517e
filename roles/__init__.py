"""What Lockstep manages on a node: one folder a role, the same files in each.

    spec.py        what the user may ask for (pydantic, strict)
    probe.py       shell whose output shows what the node has, its parser, the typed state
    drift.py       the pure difference between the two
    converge.py    the steps that remove it
    symptoms.yaml  what a user sees when it is wrong
    __init__.py    puts them together as ``role``

``core`` is what they share and reaches a node only through pyinfra's connections; ``registry`` lists
the roles; ``converge`` and ``verify`` drive them and know none of them by name.
"""
