"""``lockstep bundle``: everything that a declared cluster needs, gathered where there is internet or a mirror.

The result is a folder that is carried to where there is none: packages with all that they depend on for
each system of the nodes, the environments' archives, the wheels of their pins and the sources of their
editable packages, and a cluster file that uses them. It holds no secret, and no node is changed.
"""
