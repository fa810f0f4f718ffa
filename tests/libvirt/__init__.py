"""Two hosts with a libvirtd each on this machine, unmodified, for migrations from one to the other.

``network``  the namespace of networks that both are in, apart from this machine's
``host``     one of them: processes, ``/run``, ``/etc``, ``/var``, ``/dev/shm`` of its own
``rooms``    what such a host sees of this machine
``settings`` how its libvirtd and its QEMUs are configured
``domain``   a domain with our guest, and what that guest says
``pair``     both hosts, and what they need of this machine

Nothing of them is seen outside but the folder: libvirt's own services are neither needed nor met.
"""
